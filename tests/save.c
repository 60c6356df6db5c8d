#include "fst.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"
#include "model.h"
#include "os.h"
#include "support.h"

#define ELEMENTS(array) (sizeof(array) / sizeof *(array))

static fst_error error;

/* ---- Files ----------------------------------------------------------------------------------- */

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) test_fail(__FILE__, __LINE__, "cannot open %s", path);
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *data = calloc(1, *size + 1);
    CHECK(data && fread(data, 1, *size, file) == *size);
    fclose(file);
    return data;
}

static void check_file(const char *path, const void *want, size_t size) {
    size_t got_size;
    char *got = read_file(path, &got_size);
    CHECK_INT(size, got_size);
    CHECK_BYTES(want, got, size);
    free(got);
}

/* Files in the case's directory, hidden ones too. */
static int count_files(void) {
    DIR *directory = opendir(test_directory());
    CHECK(directory);
    int count = 0;
    for (struct dirent *entry; (entry = readdir(directory));)
        count += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(directory);
    return count;
}

/* ---- Models ---------------------------------------------------------------------------------- */

static fst_model *load_two(const char *one, const char *two, fst_dtype cast, int device) {
    const char *const files[] = {one, two, NULL};
    fst_options options = FST_OPTIONS_INIT;
    options.cast = cast;
    options.device = device;
    fst_model *model;
    if (fst_load(files, &options, &model, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
    return model;
}

static fst_model *load(const char *path) { return load_two(path, NULL, FST_NATIVE, FST_DEVICE_CPU); }

static const float floats[6] = {0, 1, -2, 0.5f, 65504, 3};
static const unsigned char bytes[5] = {1, 2, 3, 4, 5};
static const support_tensor small[] = {
    {"floats", "F32", "[2,3]", floats, sizeof floats},
    {"bytes", "U8", "[5]", bytes, sizeof bytes},
};

static fst_model *load_small(void) {
    support_checkpoint(test_path("in"), "{\"format\":\"pt\"}", small, ELEMENTS(small), 1);
    return load(test_path("in"));
}

/* A model whose only file has this JSON for a header and no data. */
static fst_model *load_json(const char *name, const char *json) {
    size_t length = strlen(json);
    char *file = malloc(8 + length);
    CHECK(file);
    for (int i = 0; i < 8; i++) file[i] = (char)(length >> (8 * i));
    memcpy(file + 8, json, length);
    support_write(test_path(name), file, 8 + length);
    free(file);
    return load(test_path(name));
}

/* Saves as "out", frees the model, and loads that. */
static fst_model *save_and_load(fst_model *model) {
    fst_status status = fst_save(model, test_path("out"), NULL, &error);
    fst_model_free(model);
    if (status) test_fail(__FILE__, __LINE__, "%s", error.text);
    return load(test_path("out"));
}

static void check_tensor(const fst_model *model, size_t i, const char *name, fst_dtype dtype,
                         const void *data, size_t nbytes) {
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_at(model, i, &tensor));
    CHECK_STR(name, tensor.name);
    CHECK_INT(dtype, tensor.dtype);
    CHECK_INT(nbytes, tensor.nbytes);
    CHECK_BYTES(data, tensor.data, nbytes);
}

static void check_metadata(const fst_model *model, size_t i, const char *key, size_t key_length,
                           const char *value, size_t value_length) {
    fst_string k, v;
    CHECK_INT(FST_OK, fst_model_metadata_at(model, 0, i, &k, &v));
    CHECK_INT(key_length, k.length);
    CHECK_BYTES(key, k.data, key_length);
    CHECK_INT(value_length, v.length);
    CHECK_BYTES(value, v.data, value_length);
}

/* ---- What is written ------------------------------------------------------------------------- */

TEST(save, tensors_come_back) {
    fst_model *model = save_and_load(load_small());
    CHECK_INT(2, fst_model_count(model));
    check_tensor(model, 0, "floats", FST_F32, floats, sizeof floats);
    check_tensor(model, 1, "bytes", FST_U8, bytes, sizeof bytes);
    fst_tensor tensor;
    fst_model_at(model, 0, &tensor);
    CHECK_INT(2, tensor.ndim);
    CHECK_INT(2, tensor.shape[0]);
    CHECK_INT(3, tensor.shape[1]);
    fst_model_free(model);
}

TEST(save, data_starts_at_a_page_behind_spaces) {
    fst_model *model = load_small();
    CHECK_INT(FST_OK, fst_save(model, test_path("out"), NULL, &error));
    fst_model_free(model);
    size_t size;
    char *file = read_file(test_path("out"), &size);
    uint64_t length;
    memcpy(&length, file, 8);
    CHECK_INT(4096 - 8, length);
    CHECK_INT(4096 + sizeof floats + sizeof bytes, size);
    size_t end = 4096;
    while (file[end - 1] == ' ') end--;
    CHECK_INT('}', file[end - 1]);
    CHECK_INT('{', file[8]);
    CHECK_BYTES(floats, file + 4096, sizeof floats);
    CHECK_BYTES(bytes, file + 4096 + sizeof floats, sizeof bytes);
    free(file);
}

TEST(save, cast_tensors_have_their_new_dtype) {
    static const uint16_t bf16[6] = {0, 0x3F80, 0xC000, 0x3F00, 0x4780, 0x4040};
    support_checkpoint(test_path("in"), NULL, small, ELEMENTS(small), 0);
    fst_model *model = save_and_load(load_two(test_path("in"), NULL, FST_BF16, FST_DEVICE_CPU));
    check_tensor(model, 0, "floats", FST_BF16, bf16, sizeof bf16);
    check_tensor(model, 1, "bytes", FST_U8, bytes, sizeof bytes);
    fst_model_free(model);
}

TEST(save, order_is_that_of_the_inputs) {
    static const support_tensor first[] = {{"z", "U8", "[1]", "a", 1}, {"b", "U8", "[2]", "bc", 2}};
    static const support_tensor second[] = {{"a", "U8", "[3]", "def", 3}};
    support_checkpoint(test_path("1"), NULL, first, 2, 0);
    support_checkpoint(test_path("2"), NULL, second, 1, 0);
    fst_model *loaded = load_two(test_path("2"), test_path("1"), FST_NATIVE, FST_DEVICE_CPU);
    fst_model *model = save_and_load(loaded);
    check_tensor(model, 0, "a", FST_U8, "def", 3);
    check_tensor(model, 1, "z", FST_U8, "a", 1);
    check_tensor(model, 2, "b", FST_U8, "bc", 2);
    fst_model_free(model);
    size_t size;
    char *file = read_file(test_path("out"), &size);
    CHECK_INT(4096 + 6, size);
    CHECK_BYTES("defabc", file + 4096, 6);
    free(file);
}

TEST(save, scalar_and_empty_tensors) {
    static const support_tensor tensors[] = {
        {"empty", "F32", "[0,3]", NULL, 0},
        {"scalar", "F32", "[]", floats + 1, 4},
        {"none", "I64", "[0]", NULL, 0},
    };
    support_checkpoint(test_path("in"), NULL, tensors, 3, 0);
    fst_model *model = save_and_load(load(test_path("in")));
    CHECK_INT(3, fst_model_count(model));
    size_t empty = fst_model_index(model, "empty"), scalar = fst_model_index(model, "scalar");
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_at(model, empty, &tensor));
    CHECK_INT(2, tensor.ndim);
    CHECK_INT(0, tensor.shape[0]);
    check_tensor(model, scalar, "scalar", FST_F32, floats + 1, 4);
    fst_model_free(model);
}

TEST(save, no_tensors_is_a_file_too) {
    fst_model *model = save_and_load(load_json("in", "{}"));
    CHECK_INT(0, fst_model_count(model));
    CHECK_INT(0, fst_model_has_metadata(model, 0));
    fst_model_free(model);
    size_t size;
    char *file = read_file(test_path("out"), &size);
    CHECK_INT(4096, size);
    CHECK_BYTES("\xF8\x0F\0\0\0\0\0\0{} ", file, 11);
    free(file);
}

TEST(save, metadata_alone) {
    fst_model *model = save_and_load(load_json("in", "{\"__metadata__\":{\"a\":\"b\"}}"));
    CHECK_INT(0, fst_model_count(model));
    check_metadata(model, 0, "a", 1, "b", 1);
    fst_model_free(model);
}

TEST(save, names_that_json_escapes) {
    static const char *const escapes[] = {
        "a\\\"b", "\\\\", "\\u0001\\n\\t\\u001f", "\\u007f", "\xC3\xBC\xF0\x9F\x98\x80", ""};
    static const char *const names[] = {"a\"b", "\\", "\x01\n\t\x1F", "\x7F", "\xC3\xBC\xF0\x9F\x98\x80", ""};
    support_tensor tensors[ELEMENTS(names)];
    for (size_t i = 0; i < ELEMENTS(names); i++)
        tensors[i] = (support_tensor){escapes[i], "U8", "[1]", bytes + i % 5, 1};
    support_checkpoint(test_path("in"), NULL, tensors, ELEMENTS(names), 0);
    fst_model *model = save_and_load(load(test_path("in")));
    CHECK_INT(ELEMENTS(names), fst_model_count(model));
    for (size_t i = 0; i < ELEMENTS(names); i++) check_tensor(model, i, names[i], FST_U8, bytes + i % 5, 1);
    fst_model_free(model);
}

TEST(save, metadata_with_nuls_and_control_characters) {
    const char *json = "{\"__metadata__\":{\"\":\"\",\"k\\u0000\":\"\\u0000a\\u0000\","
                       "\"\\\"\\\\\":\"\\n\\u0085\\ud83d\\ude00\"}}";
    fst_model *model = save_and_load(load_json("in", json));
    CHECK_INT(3, fst_model_metadata_count(model, 0));
    check_metadata(model, 0, "", 0, "", 0);
    check_metadata(model, 1, "k\0", 2, "\0a\0", 3);
    check_metadata(model, 2, "\"\\", 2, "\n\xC2\x85\xF0\x9F\x98\x80", 7);
    fst_model_free(model);
}

TEST(save, metadata_that_is_empty_stays_so) {
    fst_model *model = save_and_load(load_json("in", "{\"__metadata__\":{}}"));
    CHECK_INT(1, fst_model_has_metadata(model, 0));
    CHECK_INT(0, fst_model_metadata_count(model, 0));
    fst_model_free(model);
}

TEST(save, metadata_of_all_files_is_merged) {
    fst_model_free(load_json("1", "{\"__metadata__\":{\"z\":\"1\",\"same\":\"2\"}}"));
    fst_model_free(load_json("2", "{}"));
    fst_model_free(load_json("3", "{\"__metadata__\":{\"same\":\"2\",\"a\":\"3\",\"sam\":\"4\"}}"));
    const char *const files[] = {test_path("1"), test_path("2"), test_path("3"), NULL};
    fst_options options = FST_OPTIONS_INIT;
    options.device = FST_DEVICE_CPU;
    fst_model *model;
    CHECK_INT(FST_OK, fst_load(files, &options, &model, &error));
    model = save_and_load(model);
    CHECK_INT(4, fst_model_metadata_count(model, 0));
    check_metadata(model, 0, "z", 1, "1", 1);
    check_metadata(model, 1, "same", 4, "2", 1);
    check_metadata(model, 2, "a", 1, "3", 1);
    check_metadata(model, 3, "sam", 3, "4", 1);
    fst_model_free(model);
}

TEST(save, metadata_conflict_names_the_key_and_both_files) {
    fst_model_free(load_json("first", "{\"__metadata__\":{\"a\":\"1\",\"form\\u0000at\":\"pt\"}}"));
    fst_model_free(load_json("second", "{\"__metadata__\":{\"form\\u0000at\":\"tf\"}}"));
    fst_model *model = load_two(test_path("first"), test_path("second"), FST_NATIVE, FST_DEVICE_CPU);
    fst_status status = fst_save(model, test_path("out"), NULL, &error);
    fst_model_free(model);
    CHECK_INT(FST_E_CONFLICT, status);
    CHECK_STR(test_path("out"), error.path);
    CHECK(strstr(error.text, "'form\\x00at'"));
    CHECK(strstr(error.text, test_path("first")));
    CHECK(strstr(error.text, test_path("second")));
    CHECK_INT(2, count_files());
}

TEST(save, metadata_values_that_differ_after_a_nul_conflict) {
    fst_model_free(load_json("1", "{\"__metadata__\":{\"k\":\"a\\u0000b\"}}"));
    fst_model_free(load_json("2", "{\"__metadata__\":{\"k\":\"a\\u0000c\"}}"));
    fst_model *model = load_two(test_path("1"), test_path("2"), FST_NATIVE, FST_DEVICE_CPU);
    fst_status status = fst_save(model, test_path("out"), NULL, &error);
    fst_model_free(model);
    CHECK_INT(FST_E_CONFLICT, status);
}

TEST(save, header_over_the_limit) {
    char *value = malloc(FST_HEADER_MAX);
    CHECK(value);
    memset(value, 'x', FST_HEADER_MAX);
    fst_string pair[2] = {{"k", 1}, {value, FST_HEADER_MAX}};
    fst_header header = {.has_metadata = 1, .metadata_count = 1, .metadata = pair};
    char *files[] = {(char[]){"in"}, NULL};
    fst_model model = {.paths = {.count = 1, .files = files}, .headers = &header, .gpu = fst_gpu_cpu()};
    fst_status status = fst_save(&model, test_path("out"), NULL, &error);
    free(value);
    CHECK_INT(FST_E_HEADER_SIZE, status);
    CHECK_INT(0, count_files());
}

TEST(save, largest_header_is_within_the_limit) {
    size_t length = 99999744 - 8 - strlen("{\"__metadata__\":{\"k\":\"\"}}"); /* 4096 * 24414 = 99,999,744 */
    char *value = malloc(length + 1);
    CHECK(value);
    memset(value, 'x', length + 1);
    fst_string pair[2] = {{"k", 1}, {value, length}};
    fst_header header = {.has_metadata = 1, .metadata_count = 1, .metadata = pair};
    char *files[] = {(char[]){"in"}, NULL};
    fst_model model = {.paths = {.count = 1, .files = files}, .headers = &header, .gpu = fst_gpu_cpu()};
    fst_status fits = fst_save(&model, test_path("out"), NULL, &error);
    pair[1].length++;
    fst_status over = fst_save(&model, test_path("over"), NULL, &error);
    free(value);
    CHECK_INT(FST_OK, fits);
    CHECK_INT(FST_E_HEADER_SIZE, over);
    struct stat st;
    CHECK_INT(0, stat(test_path("out"), &st));
    CHECK_INT(99999744, st.st_size);
}

/* ---- Where it is written --------------------------------------------------------------------- */

TEST(save, replaces_its_own_input) {
    fst_model *model = load_small();
    CHECK_INT(FST_OK, fst_save(model, test_path("in"), NULL, &error));
    fst_model_free(model);
    model = load(test_path("in"));
    check_tensor(model, 0, "floats", FST_F32, floats, sizeof floats);
    fst_model_free(model);
    CHECK_INT(1, count_files());
}

TEST(save, replaces_a_link_and_not_what_it_leads_to) {
    fst_model *model = load_small();
    support_write(test_path("blob"), "old", 3);
    CHECK_INT(0, symlink("blob", test_path("out")));
    CHECK_INT(FST_OK, fst_save(model, test_path("out"), NULL, &error));
    fst_model_free(model);
    struct stat st;
    CHECK_INT(0, lstat(test_path("out"), &st));
    CHECK(S_ISREG(st.st_mode));
    check_file(test_path("blob"), "old", 3);
}

static fst_status save_small(const char *path) {
    fst_model *model = load_small();
    fst_status status = fst_save(model, path, NULL, &error);
    fst_model_free(model);
    return status;
}

TEST(save, never_replaces_a_device) {
    CHECK_INT(FST_E_FILE_TYPE, save_small("/dev/null"));
    struct stat st;
    CHECK_INT(0, stat("/dev/null", &st));
    CHECK(S_ISCHR(st.st_mode));
}

TEST(save, never_replaces_a_fifo) {
    CHECK_INT(0, mkfifo(test_path("out"), 0600));
    CHECK_INT(FST_E_FILE_TYPE, save_small(test_path("out")));
}

TEST(save, never_replaces_a_directory) {
    CHECK_INT(0, mkdir(test_path("out"), 0700));
    CHECK_INT(FST_E_FILE_TYPE, save_small(test_path("out")));
    CHECK_STR(test_path("out"), error.path);
    CHECK_INT(-1, error.file);
}

TEST(save, into_a_missing_directory) {
    CHECK_INT(FST_E_IO, save_small(test_path("missing/out")));
    CHECK_INT(ENOENT, error.code);
}

TEST(save, into_a_directory_that_may_not_be_written_to) {
    if (geteuid()) test_skip(0, "needs root, to become somebody else");
    fst_model *model = load_small();
    CHECK_INT(0, chmod(test_directory(), 0555));
    pid_t child = fork();
    if (!child) {
        fst_status status = setuid(65534) ? FST_OK : fst_save(model, test_path("out"), NULL, &error);
        _exit(status == FST_E_IO && error.code == EACCES ? 0 : 1);
    }
    int result;
    CHECK_INT(child, waitpid(child, &result, 0));
    fst_model_free(model);
    CHECK_INT(0, result);
    CHECK_INT(1, count_files());
}

/* ---- Arguments ------------------------------------------------------------------------------- */

TEST(save, wrong_arguments) {
    fst_model *model = load_small();
    fst_save_options unset = {0};
    CHECK_INT(FST_E_ARG, fst_save(NULL, test_path("out"), NULL, &error));
    CHECK_INT(FST_E_ARG, fst_save(model, NULL, NULL, &error));
    CHECK_INT(FST_E_ARG, fst_save(model, "", NULL, &error));
    CHECK_INT(FST_E_ARG, fst_save(model, test_path("out"), &unset, &error));
    CHECK_INT(FST_E_ARG, error.status);
    CHECK_INT(FST_E_ARG, fst_last_error()->status);
    fst_model_free(model);
    CHECK_INT(1, count_files());
}

TEST(save, options_of_another_version) {
    fst_model *model = load_small();
    struct {
        fst_save_options known;
        int later;
    } newer = {{.size = sizeof newer}, 0};
    fst_save_options older = {.size = sizeof older.size};
    CHECK_INT(FST_OK, fst_save(model, test_path("out"), &newer.known, &error));
    CHECK_INT(FST_OK, fst_save(model, test_path("out"), &older, &error));
    newer.later = 1;
    fst_status status = fst_save(model, test_path("out"), &newer.known, &error);
    fst_model_free(model);
    CHECK_INT(FST_E_ARG, status);
}

TEST(save, model_without_data) {
    support_checkpoint(test_path("in"), NULL, small, ELEMENTS(small), 0);
    const char *const files[] = {test_path("in"), NULL};
    fst_model *model;
    CHECK_INT(FST_OK, fst_open(files, NULL, &model, &error));
    fst_status status = fst_save(model, test_path("out"), NULL, NULL);
    fst_model_free(model);
    CHECK_INT(FST_E_NO_DATA, status);
    CHECK_INT(FST_E_NO_DATA, fst_last_error()->status);
    CHECK_INT(1, count_files());
}

/* ---- Failing system calls -------------------------------------------------------------------- */

static fst_os real;
static int writes, write_fails_at, short_writes, fsync_result, close_result, rename_result;

static ssize_t fake_pwrite(int fd, const void *buffer, size_t size, uint64_t offset) {
    if (++writes == write_fails_at) return -ENOSPC;
    if (short_writes && writes % 3 == 0) return -EINTR;
    if (short_writes && size > 1000) size = 1 + (size_t)writes * 337 % 1000;
    return real.pwrite(fd, buffer, size, offset);
}

static int fake_fsync(int fd) { return fsync_result ? fsync_result : real.fsync(fd); }

static int fake_close(int fd) {
    int rc = real.close(fd);
    return close_result ? close_result : rc;
}

static int fake_rename(const char *from, const char *to) {
    return rename_result ? rename_result : real.rename(from, to);
}

static fst_status save_with_fakes(const fst_model *model) {
    real = fst_os_calls;
    fst_os_calls.pwrite = fake_pwrite;
    fst_os_calls.fsync = fake_fsync;
    fst_os_calls.close = fake_close;
    fst_os_calls.rename = fake_rename;
    writes = 0;
    fst_status status = fst_save(model, test_path("out"), NULL, &error);
    fst_os_calls = real;
    return status;
}

/* Saves over an old file, which must be whole afterwards, alone with the input, and nothing held. */
static void check_old_file_survives(const fst_model *model, fst_status want, int code) {
    support_write(test_path("out"), "the old file", 12);
    unsigned before = support_open_descriptors();
    CHECK_INT(want, save_with_fakes(model));
    CHECK_INT(code, error.code);
    CHECK_STR(test_path("out"), error.path);
    CHECK_INT(before, support_open_descriptors());
    check_file(test_path("out"), "the old file", 12);
    CHECK_INT(2, count_files());
}

TEST(save, disk_full_at_every_write) {
    fst_model *model = load_small();
    CHECK_INT(FST_OK, save_with_fakes(model));
    int total = writes;
    CHECK_INT(3, total); /* the header and two tensors */
    for (write_fails_at = 1; write_fails_at <= total; write_fails_at++)
        check_old_file_survives(model, FST_E_IO, ENOSPC);
    write_fails_at = 0;
    fst_model_free(model);
}

TEST(save, short_and_interrupted_writes) {
    fst_model *model = load_small();
    short_writes = 1;
    fst_status status = save_with_fakes(model);
    short_writes = 0;
    CHECK_INT(FST_OK, status);
    CHECK_INT(FST_OK, fst_save(model, test_path("plain"), NULL, &error));
    fst_model_free(model);
    size_t size;
    char *want = read_file(test_path("plain"), &size);
    check_file(test_path("out"), want, size);
    free(want);
}

static void check_failing(int *result, int code) {
    fst_model *model = load_small();
    *result = -code;
    check_old_file_survives(model, FST_E_IO, code);
    *result = 0;
    fst_model_free(model);
}

TEST(save, failing_fsync) { check_failing(&fsync_result, EIO); }
TEST(save, failing_close) { check_failing(&close_result, EDQUOT); }
TEST(save, failing_rename) { check_failing(&rename_result, EPERM); }

/* ---- Progress and cancelling ----------------------------------------------------------------- */

typedef struct watch {
    int calls, stop_at;
    uint64_t done, total;
    double seconds;
} watch;

static int watch_progress(void *arg, const fst_progress *now) {
    watch *w = arg;
    if (now->bytes_done < w->done || now->seconds < w->seconds || now->bytes_done > now->bytes_total)
        test_note(__FILE__, __LINE__, "progress goes backwards");
    w->done = now->bytes_done;
    w->total = now->bytes_total;
    w->seconds = now->seconds;
    return ++w->calls == w->stop_at;
}

TEST(save, progress_ends_with_the_size_of_the_file) {
    fst_model *model = load_small();
    watch w = {0};
    fst_save_options options = {sizeof options, watch_progress, &w, NULL};
    CHECK_INT(FST_OK, fst_save(model, test_path("out"), &options, &error));
    fst_model_free(model);
    struct stat st;
    CHECK_INT(0, stat(test_path("out"), &st));
    CHECK_INT(st.st_size, w.done);
    CHECK_INT(st.st_size, w.total);
}

TEST(save, progress_cancels) {
    fst_model *model = load_small();
    support_write(test_path("out"), "old", 3);
    watch w = {.stop_at = 1};
    fst_save_options options = {sizeof options, watch_progress, &w, NULL};
    CHECK_INT(FST_E_CANCELLED, fst_save(model, test_path("out"), &options, &error));
    fst_model_free(model);
    CHECK_INT(1, w.calls);
    check_file(test_path("out"), "old", 3);
    CHECK_INT(2, count_files());
}

TEST(save, flag_cancels) {
    fst_model *model = load_small();
    volatile int cancel = 1;
    fst_save_options options = {sizeof options, NULL, NULL, &cancel};
    fst_status status = fst_save(model, test_path("out"), &options, &error);
    fst_model_free(model);
    CHECK_INT(FST_E_CANCELLED, status);
    CHECK_INT(1, count_files());
}

/* The last moment: everything is written, but not yet renamed. */
static volatile int cancel_at_sync;
static int cancelling_fsync(int fd) {
    cancel_at_sync = 1;
    return real.fsync(fd);
}

TEST(save, flag_cancels_before_the_rename) {
    fst_model *model = load_small();
    real = fst_os_calls;
    fst_os_calls.fsync = cancelling_fsync;
    fst_save_options options = {sizeof options, NULL, NULL, &cancel_at_sync};
    fst_status status = fst_save(model, test_path("out"), &options, &error);
    fst_os_calls = real;
    cancel_at_sync = 0;
    fst_model_free(model);
    CHECK_INT(FST_E_CANCELLED, status);
    CHECK_INT(1, count_files());
}

/* ---- From a device --------------------------------------------------------------------------- */

/* Tensors over, of and under the 8 MiB of a buffer, so that buffers hold parts of several. */
static void write_large(const char *path) {
    enum { A = (20 << 20) + 3, B = 8 << 20, C = 1000, D = 5 << 20 };
    unsigned char *data = malloc(A + B + C + D);
    CHECK(data);
    support_random(data, A + B + C + D, 7);
    support_tensor tensors[] = {{"a", "U8", "[20971523]", data, A},
                                {"b", "BF16", "[4,1048576]", data + A, B},
                                {"none", "F16", "[0]", NULL, 0},
                                {"c", "I8", "[1000]", data + A + B, C},
                                {"d", "U8", "[5242880]", data + A + B + C, D}};
    support_checkpoint(path, "{\"format\":\"pt\"}", tensors, ELEMENTS(tensors), 3);
    free(data);
}

TEST(save, device_writes_what_the_cpu_does) {
    write_large(test_path("in"));
    fst_model *model = load(test_path("in"));
    CHECK_INT(FST_OK, fst_save(model, test_path("cpu"), NULL, &error));
    fst_model_free(model);
    for (uint64_t seed = 1; seed <= 3; seed++) {
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        model = load_two(test_path("in"), NULL, FST_NATIVE, FST_DEVICE_GPU(0));
        fst_status status = fst_save(model, test_path("out"), NULL, &error);
        fst_model_free(model);
        fake_gpu_end();
        CHECK_INT(FST_OK, status);
        size_t size;
        char *want = read_file(test_path("cpu"), &size);
        check_file(test_path("out"), want, size);
        free(want);
    }
}

/* Loads "in" undisturbed, and saves it with these options of the device. */
static fst_status save_from_fake(const fake_gpu_options *options) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 5});
    fst_model *model = load_two(test_path("in"), NULL, FST_NATIVE, FST_DEVICE_GPU(0));
    fake_gpu_begin(options);
    fst_status status = fst_save(model, test_path("out"), NULL, &error);
    fst_model_free(model);
    fake_gpu_end();
    return status;
}

TEST(save, every_failing_device_call_is_reported) {
    write_large(test_path("in"));
    CHECK_INT(FST_OK, save_from_fake(&(fake_gpu_options){.seed = 6}));
    int total = fake_gpu_calls();
    CHECK(total > 10);
    support_write(test_path("out"), "old", 3);
    for (int at = 1; at <= total; at++) {
        CHECK_INT(FST_E_DEVICE, save_from_fake(&(fake_gpu_options){.seed = 6, .fail_at = at}));
        CHECK_INT(719, error.code);
        check_file(test_path("out"), "old", 3);
        CHECK_INT(2, count_files());
    }
}

TEST(save, device_that_cannot_pin) {
    write_large(test_path("in"));
    CHECK_INT(FST_OK, save_from_fake(&(fake_gpu_options){.seed = 6}));
    size_t size;
    char *want = read_file(test_path("out"), &size);
    CHECK_INT(0, unlink(test_path("out")));
    CHECK_INT(FST_OK, save_from_fake(&(fake_gpu_options){.seed = 6, .refuse_to_pin = 1}));
    check_file(test_path("out"), want, size);
    free(want);
}

static void *map_fails(size_t size) {
    (void)size;
    return NULL;
}

TEST(save, no_memory_for_the_buffers_of_a_device) {
    write_large(test_path("in"));
    fake_gpu_begin(&(fake_gpu_options){.seed = 5});
    fst_model *model = load_two(test_path("in"), NULL, FST_NATIVE, FST_DEVICE_GPU(0));
    fst_os before = fst_os_calls;
    fst_os_calls.map = map_fails;
    fst_status status = fst_save(model, test_path("out"), NULL, &error);
    fst_os_calls = before;
    fst_model_free(model);
    fake_gpu_end();
    CHECK_INT(FST_E_MEMORY, status);
    CHECK_INT(1, count_files());
}
