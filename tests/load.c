/* Whole loads, on the CPU device and on a fake GPU that runs late: right bytes, one error, nothing left. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "model.h"
#include "pipeline.h"
#include "support.h"

/* Bytes of a tensor, wherever it is: the devices of these tests keep theirs in host memory. */
static const unsigned char *bytes_of(const fst_model *model, const char *name, uint64_t size) {
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_find(model, name, &tensor));
    CHECK_INT(size, tensor.nbytes);
    CHECK_INT(0, (uintptr_t)tensor.data % 256);
    return tensor.data;
}

/* Large and small tensors, kept and cast, at an odd place: [path] in the case's directory. */
enum { LARGE = 300000, MANY = 500 };
static float large[LARGE];
static unsigned char small[MANY][40];
static char names[MANY][16];

static size_t mixed_file(const char *path, size_t padding) {
    support_tensor tensors[MANY + 3];
    static uint16_t halves[LARGE];
    static char shape[2][32];
    for (size_t i = 0; i < LARGE; i++) large[i] = (float)i * 0.37f - 9000.0f;
    support_random(halves, sizeof halves, 3);
    support_random(small, sizeof small, 5);
    sprintf(shape[0], "[%d]", LARGE);
    sprintf(shape[1], "[2,%d]", LARGE / 2);
    tensors[0] = (support_tensor){"large", "F32", shape[0], large, sizeof large};
    for (int i = 0; i < MANY; i++) {
        sprintf(names[i], "small.%d", i);
        tensors[1 + i] = (support_tensor){names[i], "I8", "[40]", small[i], 40};
    }
    tensors[MANY + 1] = (support_tensor){"halves", "I16", shape[1], halves, sizeof halves};
    tensors[MANY + 2] = (support_tensor){"empty", "F32", "[0,7]", NULL, 0};
    return support_checkpoint(path, "{\"format\":\"pt\"}", tensors, MANY + 3, padding);
}

static void check_mixed(const fst_model *model, int cast) {
    CHECK_INT(MANY + 3, fst_model_count(model));
    if (cast) {
        const uint16_t *got = (const uint16_t *)(const void *)bytes_of(model, "large", LARGE * 2);
        for (size_t i = 0; i < LARGE; i++) { /* round to nearest even on the bits; no NaN in there */
            uint32_t bits;
            memcpy(&bits, &large[i], 4);
            bits += 0x7FFF + (bits >> 16 & 1);
            CHECK_INT(bits >> 16, got[i]);
        }
    } else {
        CHECK_BYTES(large, bytes_of(model, "large", sizeof large), sizeof large);
    }
    for (int i = 0; i < MANY; i++) CHECK_BYTES(small[i], bytes_of(model, names[i], 40), 40);
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_find(model, "empty", &tensor));
    CHECK_INT(0, tensor.nbytes);
    CHECK(tensor.data != NULL);
}

static void load_mixed(int device, fst_dtype cast, size_t padding) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(device);
    fst_model *model;
    fst_error error;
    mixed_file(path, padding);
    options.cast = cast;
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, &error));
    check_mixed(model, cast != FST_NATIVE);
    fst_model_free(model);
}

static int count_progress(void *arg, const fst_progress *progress) {
    fst_progress *last = arg;
    if (progress->bytes_done < last->bytes_done) return 1;
    *last = *progress;
    return 0;
}

TEST(load, cpu_as_stored) { load_mixed(FST_DEVICE_CPU, FST_NATIVE, 0); }
TEST(load, cpu_cast) { load_mixed(FST_DEVICE_CPU, FST_BF16, 0); }
TEST(load, cpu_odd_header) { load_mixed(FST_DEVICE_CPU, FST_BF16, 3); }

TEST(load, one_call) {
    const char *path = test_path("mixed.safetensors");
    mixed_file(path, 0);
    fst_model *model = fst_load_cast(support_list(path), FST_BF16);
    CHECK(model != NULL);
    fst_model_free(model);
}

TEST(load, fake_gpu_runs_late_and_out_of_order) {
    for (uint64_t seed = 1; seed <= 40; seed++) {
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        load_mixed(FST_DEVICE_GPU(0), seed % 2 ? FST_BF16 : FST_NATIVE, seed % 5);
        fake_gpu_end();
    }
}

TEST(load, peak_device_memory_is_blocks_and_staging) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_stats stats = {.size = sizeof stats};
    fst_model *model;
    mixed_file(path, 0);
    options.cast = FST_BF16;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    CHECK_INT(fake_gpu_peak(), stats.peak_device_bytes);
    CHECK(stats.pinned_bytes > 0);
    CHECK_STR("fake:0", stats.device);
    fst_model_free(model);
    fake_gpu_end();
}

TEST(load, pinning_refused_is_no_failure) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 2, .refuse_to_pin = 1});
    load_mixed(FST_DEVICE_GPU(0), FST_BF16, 1);
    fake_gpu_end();
}

TEST(load, short_reads_and_interruptions_are_retried) {
    fake_os_begin(&(fake_os_options){.short_reads = 1});
    load_mixed(FST_DEVICE_CPU, FST_BF16, 1);
    fake_gpu_begin(&(fake_gpu_options){.seed = 3});
    load_mixed(FST_DEVICE_GPU(0), FST_NATIVE, 1);
    fake_gpu_end();
    fake_os_end();
}

TEST(load, second_load_starts_no_thread_and_pins_nothing) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    mixed_file(path, 0);
    fst_release_cached();
    unsigned before = support_threads();
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
    fst_model_free(model);
    CHECK_INT(before + 3, support_threads());
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
    fst_model_free(model);
    CHECK_INT(before + 3, support_threads());
    fst_release_cached();
    CHECK_INT(before, support_threads());
}

static void *load_in_thread(void *path) {
    const char *files[] = {path, NULL};
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    options.cast = FST_BF16;
    for (int i = 0; i < 5; i++) {
        if (fst_load(files, &options, &model, NULL)) return path;
        fst_model_free(model);
    }
    return NULL;
}

TEST(load, from_several_threads_at_once) {
    const char *path = test_path("mixed.safetensors");
    pthread_t threads[4];
    void *failed;
    mixed_file(path, 0);
    for (int i = 0; i < 4; i++)
        CHECK_INT(0, pthread_create(&threads[i], NULL, load_in_thread, (void *)(uintptr_t)path));
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], &failed);
        CHECK(failed == NULL);
    }
}

TEST(load, in_a_child_after_a_load_in_the_parent) {
    load_mixed(FST_DEVICE_CPU, FST_BF16, 0);
    pid_t child = fork();
    if (child == 0) {
        const char *path = test_path("child.safetensors");
        fst_options options = support_options(FST_DEVICE_CPU);
        fst_model *model;
        float one = 1;
        support_checkpoint(path, NULL, &(support_tensor){"x", "F32", "[1]", &one, 4}, 1, 0);
        _exit(fst_load(support_list(path), &options, &model, NULL) == FST_OK ? 0 : 1);
    }
    int status = -1;
    CHECK_INT(child, waitpid(child, &status, 0));
    CHECK_INT(0, status);
}

TEST(load, statistics_add_up) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_stats stats = {.size = sizeof stats};
    fst_model *model;
    struct stat st;
    mixed_file(path, 0);
    CHECK_INT(0, stat(path, &st));
    options.cast = FST_BF16;
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    CHECK_INT(st.st_size, stats.bytes_read);
    CHECK_INT(LARGE * 2 + MANY * 40 + LARGE * 2, stats.bytes_out);
    CHECK_INT(3, stats.threads);
    CHECK_INT(0, stats.pinned_bytes);
    CHECK_STR("cpu", stats.device);
    CHECK(stats.seconds > 0 && stats.chunks > 1 && stats.launches > 0);
    CHECK(strcmp(stats.limit, "read") == 0 || strcmp(stats.limit, "kernel") == 0 ||
          strcmp(stats.limit, "allocation") == 0);
    fst_model_free(model);
}

/* Kernels are timed also when they are not done at the time their chunk's copy is waited for. */
TEST(load, statistics_count_the_kernels_of_all_timed_chunks) {
    const char *path = test_path("mixed.safetensors");
    mixed_file(path, 0);
    for (uint64_t seed = 1; seed < 20; seed++) {
        fst_options options = support_options(FST_DEVICE_GPU(0));
        fst_stats stats = {.size = sizeof stats};
        fst_model *model;
        options.cast = FST_BF16;
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
        CHECK_INT(FST_OK, fst_model_stats(model, &stats));
        CHECK(stats.copy_seconds > 0);
        CHECK(stats.convert_seconds == stats.copy_seconds); /* a millisecond each */
        fst_model_free(model);
        fake_gpu_end();
    }
}

/* More than there is: the host would promise it, and kill somebody later. */
TEST(load, host_memory_short_is_found_before_anything_is_read) {
    enum { TIB = 4 };
    const char *path = test_path("huge.safetensors");
    char header[128];
    unsigned char first[8] = {0};
    uint64_t bytes = (uint64_t)TIB << 40, length;
    fst_progress last = {.bytes_done = 0};
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"U8\",\"shape\":[%llu],\"data_offsets\":[0,%llu]}}",
             (unsigned long long)bytes, (unsigned long long)bytes);
    length = strlen(header);
    memcpy(first, &length, 8);
    FILE *file = fopen(path, "w");
    CHECK(file && fwrite(first, 1, 8, file) == 8 && fwrite(header, 1, length, file) == length);
    fclose(file);
    if (truncate(path, (off_t)(8 + length + bytes))) test_skip(0, "the file system has no files of 4 TiB");
    options.progress = count_progress;
    options.progress_arg = &last;
    options.slot_bytes = (size_t)64 << 20; /* or the plan alone takes half a minute */
    CHECK_INT(FST_E_MEMORY, fst_load(support_list(path), &options, &model, &error));
    CHECK(strstr(error.text, "available"));
    CHECK_INT(0, last.bytes_done);
}

TEST(load, statistics_of_an_older_caller) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    struct {
        size_t size;
        uint64_t bytes_read, canary;
    } old = {16, 0, 77};
    fst_model *model;
    mixed_file(path, 0);
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
    CHECK_INT(FST_OK, fst_model_stats(model, (fst_stats *)(void *)&old));
    CHECK(old.bytes_read > 0);
    CHECK_INT(77, old.canary);
    fst_model_free(model);
}

TEST(load, auto_without_a_gpu_says_why) {
    const char *path = test_path("mixed.safetensors");
    fst_stats stats = {.size = sizeof stats};
    fst_model *model;
    mixed_file(path, 0);
    CHECK_INT(FST_OK, fst_load(support_list(path), NULL, &model, NULL));
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    if (strcmp(stats.device, "cpu") == 0)
        CHECK(strstr(stats.device_reason, "no GPU works (hip: ") && strstr(stats.device_reason, "cuda: "));
    else CHECK(strstr(stats.device_reason, "the first GPU that works"));
    fst_model_free(model);
}

TEST(load, open_has_shapes_and_metadata_but_no_data) {
    const char *path = test_path("mixed.safetensors");
    fst_string key, value;
    fst_tensor tensor;
    fst_model *model;
    size_t start = mixed_file(path, 2);
    CHECK_INT(FST_OK, fst_open(support_list(path), NULL, &model, NULL));
    CHECK_INT(FST_OK, fst_model_find(model, "halves", &tensor));
    CHECK(tensor.data == NULL);
    CHECK_INT(2, tensor.ndim);
    CHECK_INT(LARGE / 2, tensor.shape[1]);
    CHECK_INT(start + sizeof large + MANY * 40, tensor.file_offset);
    CHECK_INT(1, fst_model_metadata_count(model, 0));
    CHECK_INT(FST_OK, fst_model_metadata_at(model, 0, 0, &key, &value));
    CHECK_STR("format", key.data);
    CHECK_STR("pt", value.data);
    CHECK_INT(FST_E_ARG, fst_model_metadata_at(model, 0, 1, &key, &value));
    CHECK(key.data == NULL);
    fst_model_free(model);
}

TEST(load, several_files_in_their_order) {
    const char *a = test_path("a.safetensors"), *b = test_path("b.safetensors");
    const char *files[] = {b, a, NULL};
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_tensor tensor;
    fst_model *model;
    support_checkpoint(a, NULL, &(support_tensor){"in.a", "U8", "[3]", "abc", 3}, 1, 0);
    support_checkpoint(b, NULL, &(support_tensor){"in.b", "U8", "[3]", "def", 3}, 1, 0);
    CHECK_INT(FST_OK, fst_load(files, &options, &model, NULL));
    CHECK_INT(FST_OK, fst_model_at(model, 0, &tensor));
    CHECK_STR("in.b", tensor.name);
    CHECK_BYTES("abc", bytes_of(model, "in.a", 3), 3);
    CHECK_INT((size_t)-1, fst_model_index(model, "in.c"));
    fst_model_free(model);
}

static void two_shards(const char *index) {
    support_tensor first[] = {{"x", "U8", "[1]", "x", 1}, {"stray", "U8", "[1]", "s", 1}};
    support_checkpoint(test_path("1.safetensors"), NULL, first, 2, 0);
    support_checkpoint(test_path("2.safetensors"), NULL, &(support_tensor){"y", "U8", "[1]", "y", 1}, 1, 0);
    support_write(test_path("model.safetensors.index.json"), index, strlen(index));
}

TEST(load, an_index_decides_what_counts) {
    fst_stats stats = {.size = sizeof stats};
    fst_model *model;
    two_shards("{\"weight_map\":{\"x\":\"1.safetensors\",\"y\":\"2.safetensors\"}}");
    CHECK_INT(FST_OK, fst_load(support_list(test_directory()), NULL, &model, NULL));
    CHECK_INT(2, fst_model_count(model));
    CHECK_INT((size_t)-1, fst_model_index(model, "stray"));
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    CHECK_INT(1, stats.tensors_ignored);
    fst_model_free(model);
}

TEST(load, an_index_in_another_order_than_the_header) {
    support_tensor tensors[] = {{"z", "U8", "[1]", "z", 1},
                                {"stray", "U8", "[1]", "s", 1},
                                {"b", "U8", "[1]", "b", 1},
                                {"a", "U8", "[1]", "a", 1}};
    const char *index =
        "{\"weight_map\":{\"b\":\"1.safetensors\",\"z\":\"1.safetensors\",\"a\":\"1.safetensors\"}}";
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    support_checkpoint(test_path("1.safetensors"), NULL, tensors, 4, 0);
    support_write(test_path("model.safetensors.index.json"), index, strlen(index));
    CHECK_INT(FST_OK, fst_load(support_list(test_directory()), &options, &model, NULL));
    CHECK_INT(3, fst_model_count(model));
    CHECK_INT((size_t)-1, fst_model_index(model, "stray"));
    CHECK_BYTES("z", bytes_of(model, "z", 1), 1);
    CHECK_BYTES("b", bytes_of(model, "b", 1), 1);
    CHECK_BYTES("a", bytes_of(model, "a", 1), 1);
    fst_model_free(model);
}

/* ---- Progress and cancel ---- */

TEST(load, progress_ends_with_all_bytes) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_progress last = {.bytes_done = 0};
    fst_model *model;
    mixed_file(path, 0);
    options.progress = count_progress;
    options.progress_arg = &last;
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
    CHECK(last.bytes_total > 0);
    CHECK_INT(last.bytes_total, last.bytes_done);
    fst_model_free(model);
}

static int always_cancel(void *arg, const fst_progress *progress) {
    (void)arg, (void)progress;
    return 1;
}

TEST(load, progress_cancels) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_model *model;
    fst_error error;
    mixed_file(path, 0);
    options.progress = always_cancel;
    fake_gpu_begin(&(fake_gpu_options){.seed = 4});
    CHECK_INT(FST_E_CANCELLED, fst_load(support_list(path), &options, &model, &error));
    CHECK(model == NULL);
    fake_gpu_end();
}

TEST(load, cancel_flag) {
    const char *path = test_path("mixed.safetensors");
    volatile int cancel = 1;
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    mixed_file(path, 0);
    options.cancel = &cancel;
    CHECK_INT(FST_E_CANCELLED, fst_load(support_list(path), &options, &model, NULL));
    CHECK_INT(FST_E_CANCELLED, fst_last_error()->status);
}

/* ---- Faults ---- */

static void every_call_may_fail(void) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_GPU(0));
    unsigned descriptors = support_open_descriptors(), threads;
    int failures = 0;
    mixed_file(path, 0);
    options.cast = FST_BF16;
    fst_release_cached();
    threads = support_threads();
    for (int at = 1;; at++) {
        fst_model *model;
        fst_error error;
        fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)at, .fail_at = at});
        fst_status status = fst_load(support_list(path), &options, &model, &error);
        int reached = fake_gpu_calls() >= at;
        if (status == FST_OK) check_mixed(model, 1);
        CHECK((status == FST_OK) == !reached);
        if (reached) {
            CHECK(status == FST_E_DEVICE || status == FST_E_DEVICE_MEMORY);
            CHECK(model == NULL);
            CHECK(strstr(error.text, "fake:0") != NULL);
            failures++;
        }
        fst_model_free(model);
        fake_gpu_end();
        CHECK_INT(descriptors, support_open_descriptors());
        CHECK_INT(threads, support_threads());
        if (!reached) break;
    }
    CHECK(failures > 50);
}

TEST(load, every_device_call_may_fail) { every_call_may_fail(); }

TEST(load, every_system_call_may_fail) {
    const char *path = test_path("mixed.safetensors");
    int failures = 0;
    mixed_file(path, 0);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        fst_options options = support_options(device);
        options.cast = FST_BF16;
        for (int at = 1;; at++) {
            fst_model *model;
            fst_error error;
            fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)at});
            fake_os_begin(&(fake_os_options){.fail_at = at, .error = EIO});
            fst_status status = fst_load(support_list(path), &options, &model, &error);
            int reached = fake_os_calls() >= at;
            CHECK((status == FST_OK) == !reached);
            if (reached) {
                CHECK(status == FST_E_IO || status == FST_E_MEMORY);
                if (status == FST_E_IO) {
                    CHECK_INT(EIO, error.code);
                    /* The file, or what lies beside it. */
                    CHECK(!strcmp(path, error.path) || strstr(error.path, "config.json"));
                }
                failures++;
            }
            fst_model_free(model);
            fake_os_end();
            fake_gpu_end();
            if (!reached) break;
        }
    }
    CHECK(failures > 20);
}

TEST(load, a_read_error_names_file_byte_and_tensor) {
    const char *path = test_path("x.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    size_t start =
        support_checkpoint(path, NULL, &(support_tensor){"the.tensor", "U8", "[3]", "abc", 3}, 1, 0);
    fake_os_begin(&(fake_os_options){0});
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, &error));
    int calls = fake_os_calls();
    fst_model_free(model);
    fake_os_end();
    fake_os_begin(&(fake_os_options){.fail_at = calls - 1, .error = EIO}); /* behind it only the last look */
    CHECK_INT(FST_E_IO, fst_load(support_list(path), &options, &model, &error));
    fake_os_end();
    CHECK_INT(start, error.offset);
    CHECK_INT(0, error.file);
    CHECK(strstr(error.text, "the.tensor") != NULL);
}

TEST(load, blocks_that_come_while_others_are_filled) {
    uint64_t usual = fst_block_bytes;
    fst_block_bytes = 64 << 10;
    for (uint64_t seed = 1; seed <= 10; seed++) {
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        load_mixed(FST_DEVICE_GPU(0), seed % 2 ? FST_BF16 : FST_NATIVE, seed % 5);
        fake_gpu_end();
    }
    load_mixed(FST_DEVICE_CPU, FST_BF16, 0);
    every_call_may_fail();
    fst_block_bytes = usual;
}

TEST(load, device_memory_runs_out) {
    const char *path = test_path("mixed.safetensors");
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_model *model;
    fst_error error;
    mixed_file(path, 0);
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .memory = 1 << 20});
    CHECK_INT(FST_E_DEVICE_MEMORY, fst_load(support_list(path), &options, &model, &error));
    CHECK_INT(0, fake_gpu_blocks());
    fake_gpu_end();
}

static const char *hook_path;
static void cut_short(void) {
    if (truncate(hook_path, 4000)) abort();
}
static void write_into(void) {
    FILE *file = fopen(hook_path, "r+b");
    if (!file || fseek(file, -3, SEEK_END) || fputc('!', file) == EOF || fclose(file)) abort();
}
static void append_to(void) {
    FILE *file = fopen(hook_path, "ab");
    if (!file || fputc('!', file) == EOF || fclose(file)) abort();
}
static void write_and_set_back(void) {
    struct stat st;
    if (stat(hook_path, &st)) abort();
    write_into();
    struct timespec times[2] = {st.st_atim, st.st_mtim};
    if (utimensat(AT_FDCWD, hook_path, times, 0)) abort();
}
static void replace(void) {
    char other[4096];
    snprintf(other, sizeof other, "%s.new", hook_path);
    support_write(other, "not a checkpoint", 16);
    if (rename(other, hook_path)) abort();
}
static void vanish(void) {
    if (unlink(hook_path)) abort();
}

/* A load in the middle of which `hook` does something to the file. */
static fst_status load_with(void (*hook)(void), fst_error *error, int *right) {
    hook_path = test_path("changing.safetensors");
    mixed_file(hook_path, 0);
    struct timespec pause = {0, 20000000}; /* the change must not share the file's time stamp */
    nanosleep(&pause, NULL);
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fake_os_begin(&(fake_os_options){.after = 200000, .hook = hook});
    fst_status status = fst_load(support_list(hook_path), &options, &model, error);
    if (status == FST_OK) check_mixed(model, 0);
    *right = status == FST_OK;
    fst_model_free(model);
    fake_os_end();
    return status;
}

TEST(load, file_cut_short_during_the_load) {
    fst_error error;
    int right;
    CHECK_INT(FST_E_CHANGED, load_with(cut_short, &error, &right));
    CHECK_STR(hook_path, error.path);
}
TEST(load, file_cut_short_inside_its_header) {
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    hook_path = test_path("changing.safetensors");
    mixed_file(hook_path, 0);
    fake_os_begin(&(fake_os_options){.after = 8, .hook = cut_short}); /* behind the length, before the JSON */
    CHECK_INT(FST_E_CHANGED, fst_load(support_list(hook_path), &options, &model, &error));
    fake_os_end();
    CHECK_INT(4000, error.offset);
}
TEST(load, file_written_during_the_load) {
    fst_error error;
    int right;
    CHECK_INT(FST_E_CHANGED, load_with(write_into, &error, &right));
}
TEST(load, file_grown_during_the_load) {
    fst_error error;
    int right;
    CHECK_INT(FST_E_CHANGED, load_with(append_to, &error, &right));
}
TEST(load, file_written_and_its_time_set_back) {
    fst_error error;
    int right;
    CHECK_INT(FST_E_CHANGED, load_with(write_and_set_back, &error, &right));
}
TEST(load, path_replaced_during_the_load_gives_the_old_bytes) {
    fst_error error;
    int right;
    CHECK_INT(FST_OK, load_with(replace, &error, &right));
    CHECK(right);
}
TEST(load, path_unlinked_during_the_load_gives_the_old_bytes) {
    fst_error error;
    int right;
    CHECK_INT(FST_OK, load_with(vanish, &error, &right));
    CHECK(right);
}

/* ---- Bad input ---- */

static fst_status load_status(const char *path, fst_error *error) {
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model = (fst_model *)(void *)&options;
    fst_status status = fst_load(support_list(path), &options, &model, error);
    if (status) CHECK(model == NULL);
    fst_model_free(status ? NULL : model);
    return status;
}

TEST(load, truncated_at_every_byte_of_the_header_and_many_of_the_data) {
    const char *path = test_path("whole.safetensors"), *cut = test_path("cut.safetensors");
    static char data[6400];
    char bytes[8192];
    support_tensor tensors[] = {{"a", "U8", "[3200]", data, 3200}, {"b", "F32", "[800]", data, 3200}};
    size_t start = support_checkpoint(path, NULL, tensors, 2, 0), size = start + sizeof data;
    FILE *file = fopen(path, "rb");
    CHECK(file && fread(bytes, 1, sizeof bytes, file) == size);
    fclose(file);
    unsigned descriptors = support_open_descriptors();
    for (size_t at = 0; at < size; at += at < start ? 1 : sizeof data / 64) {
        fst_error error;
        support_write(cut, bytes, at);
        fst_status status = load_status(cut, &error);
        CHECK_INT(at < start ? FST_E_TRUNCATED : FST_E_OFFSETS, status);
        CHECK_STR(cut, error.path);
        CHECK_INT(0, error.file);
    }
    CHECK_INT(descriptors, support_open_descriptors());
}

TEST(load, missing_file) {
    fst_error error;
    CHECK_INT(FST_E_IO, load_status(test_path("nothing.safetensors"), &error));
    CHECK_INT(ENOENT, error.code);
    CHECK_STR(test_path("nothing.safetensors"), error.path);
}
TEST(load, empty_file) {
    fst_error error;
    support_write(test_path("empty.safetensors"), "", 0);
    CHECK_INT(FST_E_TRUNCATED, load_status(test_path("empty.safetensors"), &error));
}
TEST(load, fifo_does_not_hang) {
    fst_error error;
    CHECK_INT(0, mkfifo(test_path("fifo.safetensors"), 0600));
    CHECK_INT(FST_E_FILE_TYPE, load_status(test_path("fifo.safetensors"), &error));
}
TEST(load, device_node) {
    fst_error error;
    CHECK_INT(FST_E_FILE_TYPE, load_status("/dev/zero", &error));
}
TEST(load, directory_without_checkpoints) {
    fst_error error;
    CHECK(load_status(test_directory(), &error) != FST_OK);
    CHECK(strncmp(test_directory(), error.path, strlen(test_directory())) == 0);
}
TEST(load, dangling_link) {
    fst_error error;
    CHECK_INT(0, symlink("nowhere", test_path("link.safetensors")));
    CHECK_INT(FST_E_IO, load_status(test_path("link.safetensors"), &error));
    CHECK_INT(ENOENT, error.code);
}

TEST(load, unreadable_file) {
    const char *path = test_path("secret.safetensors");
    mixed_file(path, 0);
    CHECK_INT(0, chmod(path, 0));
    CHECK_INT(0, chmod(test_directory(), 0755));
    pid_t child = fork();
    if (child == 0) { /* root reads everything: be somebody else */
        fst_model *model;
        fst_error error;
        if (getuid() == 0 && (setgid(65534) || setuid(65534))) _exit(9);
        fst_status status = fst_open(support_list(path), NULL, &model, &error);
        _exit(status == FST_E_IO && error.code == EACCES ? 0 : 1);
    }
    int status = -1;
    CHECK_INT(child, waitpid(child, &status, 0));
    CHECK_INT(0, status);
}

TEST(load, one_name_in_two_files) {
    const char *a = test_path("a.safetensors"), *b = test_path("b.safetensors");
    const char *files[] = {a, b, NULL};
    fst_model *model;
    fst_error error;
    support_checkpoint(a, NULL, &(support_tensor){"same", "U8", "[3]", "abc", 3}, 1, 0);
    size_t start = support_checkpoint(b, NULL, &(support_tensor){"same", "U8", "[3]", "abc", 3}, 1, 5);
    CHECK_INT(FST_E_DUPLICATE, fst_load(files, NULL, &model, &error));
    CHECK_INT(1, error.file);
    CHECK_INT(start, error.offset);
    CHECK(strstr(error.text, "same") && strstr(error.text, a));
}

TEST(load, one_file_named_twice) {
    const char *a = test_path("a.safetensors");
    const char *files[] = {a, a, NULL};
    fst_model *model;
    support_checkpoint(a, NULL, &(support_tensor){"same", "U8", "[3]", "abc", 3}, 1, 0);
    CHECK_INT(FST_E_DUPLICATE, fst_load(files, NULL, &model, NULL));
}

TEST(load, second_of_two_files_is_bad) {
    const char *a = test_path("a.safetensors"), *b = test_path("b.safetensors");
    const char *files[] = {a, b, NULL};
    fst_model *model;
    fst_error error;
    unsigned descriptors = support_open_descriptors();
    support_checkpoint(a, NULL, &(support_tensor){"x", "U8", "[3]", "abc", 3}, 1, 0);
    support_write(b, "\2\0\0\0\0\0\0\0[]", 10);
    CHECK(fst_load(files, NULL, &model, &error) != FST_OK);
    CHECK_INT(1, error.file);
    CHECK_STR(b, error.path);
    CHECK_INT(descriptors, support_open_descriptors());
}

/* Files are opened by several threads. */
TEST(load, first_of_several_bad_files_is_the_error) {
    enum { FILES = 40 };
    static char paths[FILES][512];
    const char *files[FILES + 1] = {NULL};
    fst_model *model;
    fst_error error;
    for (int i = 0; i < FILES; i++) {
        char name[32];
        sprintf(name, "t%d", i);
        snprintf(paths[i], sizeof paths[i], "%s", test_path(name));
        files[i] = paths[i];
        support_tensor tensor = {name, "U8", "[4]", "abcd", 4};
        support_checkpoint(paths[i], NULL, &tensor, 1, 0);
    }
    CHECK_INT(FST_OK, fst_open(files, NULL, &model, &error));
    CHECK_INT(FILES, fst_model_count(model));
    for (int i = 0; i < FILES; i++) {
        fst_tensor tensor;
        CHECK_INT(FST_OK, fst_model_at(model, (size_t)i, &tensor));
        CHECK_INT(i, tensor.file);
    }
    fst_model_free(model);
    support_write(paths[31], "bad", 3);
    support_write(paths[17], "worse", 5);
    for (int i = 0; i < 20; i++) {
        unsigned before = support_open_descriptors();
        CHECK_INT(FST_E_TRUNCATED, fst_open(files, NULL, &model, &error));
        CHECK_INT(17, error.file);
        CHECK_STR(paths[17], error.path);
        CHECK_INT(before, support_open_descriptors());
    }
}

TEST(load, index_lists_a_tensor_that_its_file_lacks) {
    fst_model *model;
    fst_error error;
    two_shards("{\"weight_map\":{\"x\":\"1.safetensors\",\"missing\":\"2.safetensors\"}}");
    CHECK_INT(FST_E_INDEX, fst_load(support_list(test_directory()), NULL, &model, &error));
    CHECK(strstr(error.text, "missing") && strstr(error.path, "2.safetensors"));
}

TEST(load, index_lists_a_tensor_in_the_wrong_file) {
    fst_model *model;
    fst_error error;
    two_shards("{\"weight_map\":{\"x\":\"2.safetensors\",\"y\":\"2.safetensors\"}}");
    CHECK_INT(FST_E_INDEX, fst_load(support_list(test_directory()), NULL, &model, &error));
}

static int data_reads;
static void count_data_read(void) { data_reads++; }

TEST(load, cast_without_a_kernel_reads_no_data) {
    const char *path = test_path("x.safetensors");
    support_tensor tensors[] = {{"good", "F32", "[1]", "1234", 4}, {"bad", "F4", "[2]", "5", 1}};
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    size_t start = support_checkpoint(path, NULL, tensors, 2, 0);
    data_reads = 0;
    options.cast = FST_F8_E5M2; /* from F32, not from F4 */
    fake_os_begin(&(fake_os_options){.after = start, .hook = count_data_read});
    CHECK_INT(FST_E_NO_CAST, fst_load(support_list(path), &options, &model, &error));
    CHECK(strstr(error.text, "\"bad\"") != NULL);
    CHECK_INT(0, data_reads);
    options.cast = FST_NATIVE; /* and a load that works is noticed */
    CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, &error));
    CHECK_INT(1, data_reads);
    fst_model_free(model);
    fake_os_end();
    options.cast = FST_I32; /* a target that no kernel has */
    CHECK_INT(FST_E_NO_CAST, fst_load(support_list(path), &options, &model, &error));
    CHECK(strstr(error.text, "\"good\"") != NULL);
}

TEST(load, arguments_that_are_wrong) {
    static const char *const none[] = {NULL};
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model = (fst_model *)(void *)&options;
    struct {
        fst_options known;
        int newer;
    } larger = {options, 1};
    CHECK_INT(FST_E_ARG, fst_load(NULL, &options, &model, NULL));
    CHECK(model == NULL);
    CHECK_INT(FST_E_ARG, fst_load(none, &options, &model, NULL));
    CHECK_INT(FST_E_ARG, fst_load(support_list("x"), &options, NULL, NULL));
    CHECK(fst_load_cast(NULL, FST_BF16) == NULL);
    CHECK_INT(FST_E_ARG, fst_last_error()->status);
    options.size = 0;
    CHECK_INT(FST_E_ARG, fst_load(support_list("x"), &options, &model, NULL));
    options = support_options(FST_DEVICE_CPU);
    options.cast = (fst_dtype)99;
    CHECK_INT(FST_E_ARG, fst_load(support_list("x"), &options, &model, NULL));
    options = support_options(-1);
    CHECK_INT(FST_E_ARG, fst_load(support_list("x"), &options, &model, NULL));
    options = support_options(FST_DEVICE_CPU);
    options.flags = 1u << 31;
    CHECK_INT(FST_E_ARG, fst_load(support_list("x"), &options, &model, NULL));
    options = support_options(FST_DEVICE_CPU);
    options.slot_bytes = 5;
    CHECK_INT(FST_E_ARG, fst_load(support_list("x"), &options, &model, NULL));
    larger.known.size = sizeof larger;
    CHECK_INT(FST_E_ARG, fst_load(support_list("x"), &larger.known, &model, NULL));
}

TEST(load, a_gpu_that_is_not_there) {
    const char *path = test_path("x.safetensors");
    fst_options options = support_options(FST_DEVICE_GPU(60));
    fst_model *model;
    fst_error error;
    support_checkpoint(path, NULL, &(support_tensor){"x", "U8", "[3]", "abc", 3}, 1, 0);
    CHECK_INT(FST_E_NO_DEVICE, fst_load(support_list(path), &options, &model, &error));
    CHECK(strstr(error.text, "no GPU 60") != NULL);
}

TEST(load, access_that_is_wrong) {
    const char *path = test_path("x.safetensors");
    fst_tensor tensor;
    fst_model *model;
    support_checkpoint(path, NULL, &(support_tensor){"x", "U8", "[3]", "abc", 3}, 1, 0);
    CHECK_INT(FST_OK, fst_open(support_list(path), NULL, &model, NULL));
    CHECK_INT(FST_E_ARG, fst_model_at(model, 1, &tensor));
    CHECK(tensor.name == NULL);
    CHECK_INT(FST_E_NOT_FOUND, fst_model_find(model, "y", &tensor));
    CHECK_INT(FST_E_ARG, fst_model_find(model, NULL, &tensor));
    CHECK_INT(FST_E_ARG, fst_model_at(NULL, 0, &tensor));
    CHECK_INT((size_t)-1, fst_model_index(model, ""));
    CHECK(fst_model_file_path(model, 1) == NULL);
    CHECK_INT(0, fst_model_has_metadata(model, 0));
    fst_model_free(model);
    fst_model_free(NULL);
}
