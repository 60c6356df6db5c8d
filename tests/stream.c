/* Tensors one by one: each once and right, memory that is bounded, a consumer that is slow, leaves, or holds all. */
#include <dlpack/dlpack.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"
#include "model.h"
#include "pipeline.h"
#include "sample.h"
#include "support.h"

#define KIB ((uint64_t)1 << 10)

/* Large and small, kept and cast, empty ones, in two files; about 1.5 MB. */
static const char *const *two_files(uint64_t seed) {
    static const char *files[3];
    sample_begin(seed);
    sample_add(FST_F32, 50000);
    sample_add(FST_F16, 0);
    for (int i = 0; i < 40; i++) sample_add(i % 3 ? FST_BF16 : FST_I8, 100 + (uint64_t)i * 7);
    sample_add(FST_U8, 150000);
    sample_add(FST_F32, 30000);
    sample_add(FST_F32, 0);
    sample_add(FST_I64, 40000);
    for (int i = 0; i < 20; i++) sample_add(FST_F32, 4000);
    sample_add(FST_U8, 0);
    files[0] = test_path("1.safetensors");
    files[1] = test_path("2.safetensors");
    sample_write(files[0], 0, 30, seed % 7);
    sample_write(files[1], 30, sample_count(), seed % 5);
    return files;
}

/* `count` tensors of `nbytes` bytes that are kept as they are, in one file. */
static const char *const *equal_tensors(size_t count, uint64_t nbytes) {
    sample_begin(9);
    for (size_t i = 0; i < count; i++) sample_add(FST_U8, nbytes);
    const char *path = test_path("equal.safetensors");
    sample_write(path, 0, count, 0);
    return support_list(path);
}

static fst_stream *open_stream(const char *const *files, const fst_options *options) {
    fst_stream *stream;
    fst_error error;
    if (fst_stream_open(files, options, &stream, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
    return stream;
}

/* The next tensor, that must come and be right. Its index, SAMPLE_MAX behind the last. */
static size_t take(fst_stream *stream, const fst_options *options, DLManagedTensorVersioned **handle) {
    fst_tensor tensor;
    fst_error error;
    if (fst_stream_next(stream, &tensor, handle, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
    if (!tensor.name) return SAMPLE_MAX;
    const char *wrong = sample_compare(&tensor, options->cast);
    if (wrong) test_fail(__FILE__, __LINE__, "tensor \"%s\": %s", tensor.name, wrong);
    if (handle) {
        CHECK(*handle != NULL);
        CHECK((*handle)->dl_tensor.data == (tensor.nbytes ? tensor.data : NULL));
    }
    return sample_index(&tensor);
}

/* What was taken before is at `data` still. `headers` is from fst_open. */
static void check_data(const fst_model *headers, size_t index, fst_dtype cast, void *data) {
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_at(headers, index, &tensor));
    tensor.dtype = sample_result_dtype(index, cast);
    tensor.nbytes = sample_result_bytes(index, cast);
    tensor.data = data;
    const char *wrong = sample_compare(&tensor, cast);
    if (wrong) test_fail(__FILE__, __LINE__, "tensor \"%s\", later: %s", tensor.name, wrong);
}

/* ---- Each tensor once ------------------------------------------------------------------------------- */

/* Keeps nothing; each tensor is there until the next call. */
static void walk(const char *const *files, const fst_options *options) {
    fst_stream *stream = open_stream(files, options);
    static char seen[SAMPLE_MAX];
    size_t index, count = 0;
    memset(seen, 0, sizeof seen);
    for (; (index = take(stream, options, NULL)) != SAMPLE_MAX; count++) {
        CHECK(!seen[index]);
        seen[index] = 1;
        if (!(options->flags & FST_AS_READY)) CHECK_INT(count, index);
    }
    CHECK_INT(sample_count(), count);
    CHECK_INT(SAMPLE_MAX, take(stream, options, NULL)); /* the end stays the end */
    fst_stream_close(stream);
}

/* Keeps all, also beyond the stream. */
static void walk_and_keep(const char *const *files, const fst_options *options) {
    static DLManagedTensorVersioned *handles[SAMPLE_MAX];
    static size_t indexes[SAMPLE_MAX];
    fst_stream *stream = open_stream(files, options);
    fst_model *headers;
    size_t count = 0;
    while ((indexes[count] = take(stream, options, &handles[count])) != SAMPLE_MAX) count++;
    CHECK(handles[count] == NULL);
    CHECK_INT(sample_count(), count);
    fst_stream_close(stream);
    CHECK_INT(FST_OK, fst_open(files, NULL, &headers, NULL));
    for (size_t i = 0; i < count; i++) {
        check_data(headers, indexes[i], options->cast, handles[i]->dl_tensor.data);
        handles[i]->deleter(handles[i]);
    }
    fst_model_free(headers);
}

static void each_once(int device, uint64_t seeds) {
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        const char *const *files = two_files(seed);
        for (int way = 0; way < 8; way++) {
            fst_options options = support_options(device);
            options.cast = way & 1 ? FST_BF16 : FST_NATIVE;
            options.flags = way & 2 ? FST_AS_READY : 0;
            fake_gpu_begin(&(fake_gpu_options){.seed = seed * 8 + (uint64_t)way});
            (way & 4 ? walk_and_keep : walk)(files, &options);
            CHECK_INT(0, fake_gpu_blocks() - (device == FST_DEVICE_CPU ? 0 : 1)); /* the staging ring */
            fake_gpu_end();
        }
    }
}

TEST(stream, each_tensor_once_on_the_cpu) { each_once(FST_DEVICE_CPU, 3); }
TEST(stream, each_tensor_once_on_a_gpu_that_is_late) { each_once(FST_DEVICE_GPU(0), 6); }

TEST(stream, a_file_without_tensors_is_at_its_end) {
    fst_options options = support_options(FST_DEVICE_CPU);
    sample_begin(1);
    sample_write(test_path("none.safetensors"), 0, 0, 0);
    walk(support_list(test_path("none.safetensors")), &options);
}

TEST(stream, of_empty_tensors_alone) {
    for (unsigned flags = 0; flags <= FST_AS_READY; flags += FST_AS_READY) {
        fst_options options = support_options(FST_DEVICE_GPU(0));
        options.flags = flags;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        sample_begin(1);
        for (int i = 0; i < 5; i++) sample_add(FST_F32, 0);
        sample_write(test_path("empty.safetensors"), 0, 5, 0);
        walk(support_list(test_path("empty.safetensors")), &options);
        walk_and_keep(support_list(test_path("empty.safetensors")), &options);
        fake_gpu_end();
    }
}

/* ---- The bound on memory ------------------------------------------------------------------------------ */

TEST(stream, never_holds_more_than_its_bound) {
    for (uint64_t seed = 1; seed <= 8; seed++) {
        const char *const *files = two_files(seed);
        fst_stats stats = {.size = sizeof stats};
        fst_options options = support_options(FST_DEVICE_GPU(0));
        options.cast = seed % 2 ? FST_BF16 : FST_NATIVE;
        options.flags = seed % 3 ? FST_AS_READY : 0;
        options.memory_bytes = seed % 2 ? 320000 : 400000; /* the largest tensor's size; more */
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        fst_stream *stream = open_stream(files, &options);
        size_t count = 0;
        while (take(stream, &options, NULL) != SAMPLE_MAX) count++;
        CHECK_INT(sample_count(), count);
        CHECK_INT(FST_OK, fst_model_stats(fst_stream_model(stream), &stats));
        fst_stream_close(stream);
        uint64_t ring = 8 * (64 * KIB + 8 * KIB + 8 * KIB);
        CHECK(fake_gpu_peak() <= options.memory_bytes + ring);
        CHECK(fake_gpu_peak() <= stats.peak_device_bytes);
        CHECK(stats.peak_device_bytes <= options.memory_bytes + ring);
        fake_gpu_end();
    }
}

static atomic_uint_fast64_t bytes_asked;
static ssize_t (*real_pread)(int fd, void *buffer, size_t size, uint64_t offset);

static ssize_t counting_pread(int fd, void *buffer, size_t size, uint64_t offset) {
    atomic_fetch_add(&bytes_asked, size);
    return real_pread(fd, buffer, size, offset);
}

static void count_reads(int begin) {
    fst_release_cached();
    if (begin) real_pread = fst_os_calls.pread;
    fst_os_calls.pread = begin ? counting_pread : real_pread;
    atomic_store(&bytes_asked, 0);
}

TEST(stream, a_tensor_larger_than_the_bound_is_refused_before_anything_is_read) {
    const char *const *files = two_files(1);
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_stream *stream = (fst_stream *)(void *)&options;
    fst_error error;
    options.memory_bytes = 190 * KIB; /* less than the first, of 200,000 bytes */
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    count_reads(1);
    CHECK_INT(FST_E_ARG, fst_stream_open(files, &options, &stream, &error));
    uint64_t asked = atomic_load(&bytes_asked);
    count_reads(0);
    CHECK(stream == NULL);
    CHECK(strstr(error.text, "\"t.0\"") && strstr(error.text, "194560"));
    CHECK(asked > 0 && asked < 20 * KIB); /* the headers */
    CHECK_INT(FST_E_ARG, fst_last_error()->status);
    fake_gpu_end();
}

TEST(stream, an_unset_bound_gives_way_to_a_larger_tensor) {
    fst_options options = support_options(FST_DEVICE_CPU);
    options.memory_bytes = 0;
    walk(two_files(2), &options);
}

/* All that is read ahead fits in the bound and the slots. */
TEST(stream, a_slow_consumer_pushes_back_on_the_readers) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        const char *const *files = equal_tensors(64, 64 * KIB);
        fst_options options = support_options(device);
        options.memory_bytes = 512 * KIB;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        count_reads(1);
        fst_stream *stream = open_stream(files, &options);
        for (int taken = 0; taken < 3; taken++) {
            uint64_t before, now = 0;
            do {
                before = now;
                usleep(50000);
                now = atomic_load(&bytes_asked);
            } while (before != now);
            CHECK(now <= (uint64_t)taken * 64 * KIB + 512 * KIB + 6 * 64 * KIB + 16 * KIB);
            CHECK(now >= 512 * KIB);
            CHECK_INT(taken, take(stream, &options, NULL));
        }
        for (size_t i = 3; i < 64; i++) CHECK_INT(i, take(stream, &options, NULL));
        CHECK_INT(SAMPLE_MAX, take(stream, &options, NULL));
        fst_stream_close(stream);
        count_reads(0);
        fake_gpu_end();
    }
}

TEST(stream, a_consumer_that_keeps_everything_is_told_and_goes_on_when_it_released) {
    for (int way = 0; way < 4; way++) {
        DLManagedTensorVersioned *handles[64] = {NULL};
        const char *const *files = equal_tensors(64, 64 * KIB);
        fst_options options = support_options(way & 1 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        size_t taken = 0, released = 0, again = 0;
        options.flags = way & 2 ? FST_AS_READY : 0;
        options.memory_bytes = 512 * KIB;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_stream *stream = open_stream(files, &options);
        while (taken < 64) {
            fst_tensor tensor;
            fst_error error;
            fst_status status = fst_stream_next(stream, &tensor, &handles[taken], &error);
            if (status == FST_OK) {
                CHECK(sample_compare(&tensor, FST_NATIVE) == NULL);
                taken++;
                continue;
            }
            CHECK_INT(FST_E_AGAIN, status);
            CHECK_INT(FST_E_AGAIN, error.status);
            CHECK_INT(FST_E_AGAIN, fst_last_error()->status);
            CHECK(handles[taken] == NULL && tensor.name == NULL);
            CHECK_INT(512 * KIB, (taken - released) * 64 * KIB); /* not before all of it is held */
            if (++again % 2) continue;                           /* and once more, with nothing released */
            for (int i = 0; i < 8; i++, released++) handles[released]->deleter(handles[released]);
        }
        CHECK_INT(14, again);
        CHECK_INT(SAMPLE_MAX, take(stream, &options, NULL));
        fst_stream_close(stream);
        for (; released < taken; released++) handles[released]->deleter(handles[released]);
        fake_gpu_end();
    }
}

/* Nobody holds anything, so something always comes, however busy the machine is. */
static atomic_int spinning;
static void *spin(void *arg) {
    while (atomic_load(&spinning)) continue;
    return arg;
}

TEST(stream, again_is_never_said_to_one_who_holds_nothing) {
    enum { SPINNERS = 8, TENSORS = 400 };
    pthread_t spinners[SPINNERS];
    const char *const *files = equal_tensors(TENSORS, 1 * KIB);
    fst_status status = FST_OK;
    atomic_store(&spinning, 1);
    for (int i = 0; i < SPINNERS; i++) CHECK_INT(0, pthread_create(&spinners[i], NULL, spin, NULL));
    for (unsigned threads = 1; threads <= 6 && !status; threads++) {
        fst_options options = support_options(FST_DEVICE_CPU);
        fst_tensor tensor;
        options.memory_bytes =
            threads == 1 ? 1 * KIB : 4 * KIB; /* of one tensor; of four, in blocks of one */
        options.threads = threads;
        fst_stream *stream = open_stream(files, &options);
        for (int i = 0; i < TENSORS && !status; i++) status = fst_stream_next(stream, &tensor, NULL, NULL);
        fst_stream_close(stream);
    }
    atomic_store(&spinning, 0);
    for (int i = 0; i < SPINNERS; i++) pthread_join(spinners[i], NULL);
    CHECK_INT(FST_OK, status);
}

static void *take_from_budget(void *budget) { return fst_budget_take(budget, 100) ? NULL : budget; }

TEST(stream, memory_that_was_given_back_is_not_waited_for) {
    for (int i = 0; i < 300; i++) {
        fst_budget *budget = fst_budget_new(100);
        pthread_t thread;
        void *failed;
        CHECK(budget && fst_budget_take(budget, 100));
        CHECK_INT(0, fst_budget_is_waited_for(budget));
        CHECK_INT(0, pthread_create(&thread, NULL, take_from_budget, budget));
        int tries = 0;
        while (!fst_budget_is_waited_for(budget) && tries++ < 100000) usleep(10);
        fst_budget_give(budget, 100);
        int waited = fst_budget_is_waited_for(budget); /* most often before the thread woke up */
        pthread_join(thread, &failed);
        CHECK_INT(0, waited);
        CHECK(failed == NULL);
        fst_budget_drop(budget);
    }
}

/* Blocks that only empty tensors lie in would hold memory that nobody can release. */
TEST(stream, empty_tensors_between_tensors_as_large_as_the_bound) {
    for (int way = 0; way < 8; way++) {
        fst_options options = support_options(way & 1 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        options.flags = way & 2 ? FST_AS_READY : 0;
        options.memory_bytes = 256 * KIB;
        sample_begin(3);
        if (way & 4) sample_add(FST_F32, 0);
        for (int i = 0; i < 4; i++) {
            sample_add(FST_U8, 256 * KIB);
            sample_add(FST_F32, 0);
        }
        sample_write(test_path("x.safetensors"), 0, sample_count(), 0);
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        walk(support_list(test_path("x.safetensors")), &options);
        fake_gpu_end();
    }
}

/* ---- Releasing ------------------------------------------------------------------------------------------ */

TEST(stream, memory_goes_back_block_by_block) {
    DLManagedTensorVersioned *handles[12];
    const char *const *files = equal_tensors(12, 64 * KIB);
    fst_options options = support_options(FST_DEVICE_GPU(0));
    options.memory_bytes = 1024 * KIB; /* blocks of a quarter: four tensors each */
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fst_stream *stream = open_stream(files, &options);
    for (size_t i = 0; i < 12; i++) CHECK_INT(i, take(stream, &options, &handles[i]));
    int blocks = fake_gpu_blocks();
    for (int i = 0; i < 4; i++) {
        CHECK_INT(blocks, fake_gpu_blocks());
        handles[i]->deleter(handles[i]);
    }
    CHECK_INT(blocks - 1, fake_gpu_blocks());
    CHECK_INT(SAMPLE_MAX, take(stream, &options, NULL));
    fst_stream_close(stream);
    CHECK_INT(blocks - 1, fake_gpu_blocks());
    for (int i = 11; i >= 4; i--) {
        handles[i]->deleter(handles[i]);
        CHECK_INT(blocks - (i > 8 ? 1 : i > 4 ? 2 : 3), fake_gpu_blocks());
    }
    fake_gpu_end();
}

/* Without handles a block is gone with the call behind its last tensor. */
TEST(stream, a_tensor_without_a_handle_is_there_until_the_next_call) {
    const char *const *files = equal_tensors(3, 1024 * KIB);
    fst_options options = support_options(FST_DEVICE_GPU(0));
    options.memory_bytes = 3 * 1024 * KIB;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fst_stream *stream = open_stream(files, &options);
    for (size_t i = 0; i < 3; i++) CHECK_INT(i, take(stream, &options, NULL));
    int blocks = fake_gpu_blocks();
    CHECK(blocks >= 1);
    CHECK_INT(SAMPLE_MAX, take(stream, &options, NULL));
    CHECK_INT(blocks - 1, fake_gpu_blocks());
    fst_stream_close(stream);
    fake_gpu_end();
}

/* Handles that other threads release, as fast as they come. */
static struct {
    pthread_mutex_t lock;
    DLManagedTensorVersioned *handles[SAMPLE_MAX];
    size_t count;
    int closed;
} queue = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void *release_from_queue(void *arg) {
    for (int closed = 0; !closed;) {
        DLManagedTensorVersioned *handle = NULL;
        pthread_mutex_lock(&queue.lock);
        if (queue.count) handle = queue.handles[--queue.count];
        else closed = queue.closed;
        pthread_mutex_unlock(&queue.lock);
        if (handle) handle->deleter(handle);
        else usleep(100);
    }
    return arg;
}

TEST(stream, several_threads_release) {
    for (uint64_t seed = 1; seed <= 6; seed++) {
        const char *const *files = two_files(seed);
        pthread_t threads[3];
        size_t count = 0, again = 0;
        fst_status status = FST_OK;
        fst_error error = {.status = FST_OK};
        const char *wrong = NULL;
        fst_options options = support_options(seed % 2 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        options.cast = FST_BF16;
        options.memory_bytes = 320000;
        options.flags = seed % 3 ? FST_AS_READY : 0;
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        fst_stream *stream = open_stream(files, &options);
        queue.count = 0;
        queue.closed = 0;
        for (int i = 0; i < 3; i++) CHECK_INT(0, pthread_create(&threads[i], NULL, release_from_queue, NULL));
        for (;;) {
            DLManagedTensorVersioned *handle;
            fst_tensor tensor;
            status = fst_stream_next(stream, &tensor, &handle, &error);
            if (status == FST_E_AGAIN && again++ < 10000) continue; /* some 40 s */
            if (status || !tensor.name) break;
            if (!wrong) wrong = sample_compare(&tensor, FST_BF16);
            pthread_mutex_lock(&queue.lock);
            queue.handles[queue.count++] = handle;
            pthread_mutex_unlock(&queue.lock);
            count++;
        }
        fst_stream_close(stream); /* while they release */
        pthread_mutex_lock(&queue.lock);
        queue.closed = 1;
        pthread_mutex_unlock(&queue.lock);
        for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
        CHECK_STR(NULL, wrong);
        CHECK_INT(FST_OK, status);
        CHECK_INT(sample_count(), count);
        fake_gpu_end();
    }
}

/* ---- Memory of the caller's ------------------------------------------------------------------------------ */

typedef struct places {
    unsigned char *memory;
    size_t every, used;
} places;

/* Every so-manieth tensor goes to memory of ours, aligned to its element alone. */
static int place(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    places *p = arg;
    size_t index = sample_index(tensor), nbytes = (size_t)sample_result_bytes(index, rule->cast);
    if (index % p->every) return 0;
    rule->memory = p->memory + p->used + 8;
    rule->memory_bytes = nbytes;
    p->used += nbytes / 16 * 16 + 32;
    return 0;
}

TEST(stream, tensors_in_memory_of_the_caller) {
    places p = {malloc(4 << 20), 1, 0};
    CHECK(p.memory);
    for (int way = 0; way < 16; way++) {
        fst_options options = support_options(way & 1 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        options.flags = way & 2 ? FST_AS_READY : 0;
        options.cast = way & 4 ? FST_BF16 : FST_NATIVE;
        options.rule = place;
        options.rule_arg = &p;
        options.memory_bytes = 320000;
        const char *const *files = two_files((uint64_t)way);
        fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)way});
        for (p.every = 1; p.every <= 3; p.every += 2) {
            p.used = 0;
            memset(p.memory, 0xEE, 4 << 20);
            if (way & 8 && p.every == 1) walk_and_keep(files, &options);
            else walk(files, &options);
            CHECK(p.memory[7] == 0xEE && p.memory[p.used + 8] == 0xEE); /* before and behind */
        }
        fake_gpu_end();
    }
    free(p.memory);
}

/* ---- A stream of the caller's ---------------------------------------------------------------------------- */

/* Nothing waits on the host: what the caller queues behind on their own stream finds the data there. */
TEST(stream, data_is_ready_on_the_callers_stream) {
    static DLManagedTensorVersioned *handles[SAMPLE_MAX];
    static unsigned char *copies[SAMPLE_MAX];
    for (uint64_t seed = 1; seed <= 12; seed++) {
        const char *const *files = two_files(seed);
        char reason[256];
        fst_error error;
        const fst_gpu *gpu;
        fst_queue mine;
        fst_options options = support_options(FST_DEVICE_GPU(0));
        options.cast = seed % 2 ? FST_BF16 : FST_NATIVE;
        options.flags = seed % 3 ? FST_AS_READY : 0;
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_GPU(0), &gpu, reason, sizeof reason, &error));
        CHECK_INT(0, gpu->calls->stream_new(gpu, &mine));
        options.stream = mine;
        fst_stream *stream = open_stream(files, &options);
        size_t count = 0;
        for (;; count++) {
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, &handles[count], &error));
            if (!tensor.name) break;
            size_t index = sample_index(&tensor);
            copies[index] = malloc(tensor.nbytes + 1);
            CHECK(copies[index]);
            if (tensor.nbytes)
                CHECK_INT(0, gpu->calls->to_host(gpu, mine, copies[index], tensor.data, tensor.nbytes));
        }
        CHECK_INT(sample_count(), count);
        fst_stream_close(stream);
        fst_release_cached();
        CHECK_INT(0, gpu->calls->stream_wait(gpu, mine));
        gpu->calls->stream_free(gpu, mine);
        fst_model *headers;
        CHECK_INT(FST_OK, fst_open(files, NULL, &headers, NULL));
        for (size_t i = 0; i < count; i++) {
            check_data(headers, i, options.cast, copies[i]);
            free(copies[i]);
            handles[i]->deleter(handles[i]);
        }
        fst_model_free(headers);
        fake_gpu_end();
    }
}

/* Memory that was lent is gone with the next call: work on it has to be done. */
/* Nobody waits before the next call: memory that is lent goes back behind what was queued. */
TEST(stream, the_callers_stream_with_a_tensor_that_is_lent) {
    static fst_tensor tensors[SAMPLE_MAX];
    const char *const *files = two_files(4);
    char reason[256];
    fst_options options = support_options(FST_DEVICE_GPU(0));
    const fst_gpu *gpu;
    fst_queue mine;
    fst_error error;
    size_t count = 0;
    options.cast = FST_BF16;
    fake_gpu_begin(&(fake_gpu_options){.seed = 4});
    CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_GPU(0), &gpu, reason, sizeof reason, &error));
    CHECK_INT(0, gpu->calls->stream_new(gpu, &mine));
    options.stream = mine;
    fst_stream *stream = open_stream(files, &options);
    for (;; count++) {
        fst_tensor *tensor = &tensors[count];
        CHECK_INT(FST_OK, fst_stream_next(stream, tensor, NULL, &error));
        if (!tensor->name) break;
        void *copy = malloc(tensor->nbytes + 1);
        CHECK(copy);
        if (tensor->nbytes) CHECK_INT(0, gpu->calls->to_host(gpu, mine, copy, tensor->data, tensor->nbytes));
        tensor->data = copy;
    }
    CHECK_INT(sample_count(), count);
    CHECK_INT(0, gpu->calls->stream_wait(gpu, mine));
    for (size_t i = 0; i < count; i++) {
        CHECK_STR(NULL, sample_compare(&tensors[i], FST_BF16));
        free(tensors[i].data);
    }
    fst_stream_close(stream);
    gpu->calls->stream_free(gpu, mine);
    fake_gpu_end();
}

/* ---- The end, early --------------------------------------------------------------------------------------- */

/* Closes after `count` tensors, of which all are held. */
static void close_after(size_t count, int device, uint64_t memory) {
    DLManagedTensorVersioned *handles[SAMPLE_MAX];
    const char *const *files = two_files(count);
    fst_options options = support_options(device);
    unsigned descriptors = support_open_descriptors();
    options.cast = FST_BF16;
    options.memory_bytes = memory;
    fake_gpu_begin(&(fake_gpu_options){.seed = count});
    fake_os_begin(&(fake_os_options){.short_reads = count % 2 == 1});
    fst_stream *stream = open_stream(files, &options);
    for (size_t i = 0; i < count; i++) CHECK_INT(i, take(stream, &options, &handles[i]));
    fst_stream_close(stream);
    CHECK_INT(descriptors, support_open_descriptors());
    fst_model *headers;
    CHECK_INT(FST_OK, fst_open(files, NULL, &headers, NULL));
    for (size_t i = 0; i < count; i++) {
        check_data(headers, i, FST_BF16, handles[i]->dl_tensor.data);
        handles[i]->deleter(handles[i]);
    }
    fst_model_free(headers);
    fake_os_end();
    fake_gpu_end();
}

TEST(stream, closed_in_the_middle) {
    unsigned threads;
    fst_release_cached();
    threads = support_threads();
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++)
        for (size_t count = 0; count <= 40; count += count < 4 ? 1 : 9) {
            close_after(count, device, 320000);
            close_after(count, device, 0);
        }
    fst_release_cached();
    CHECK_INT(threads, support_threads());
}

TEST(stream, none_is_closed) {
    fst_tensor tensor;
    fst_error error;
    fst_stream_close(NULL);
    CHECK(fst_stream_model(NULL) == NULL);
    CHECK_INT(FST_E_ARG, fst_stream_next(NULL, &tensor, NULL, &error));
    CHECK_INT(FST_E_ARG, error.status);
}

/* ---- Failures --------------------------------------------------------------------------------------------- */

/* Takes tensors until the stream ends or fails. A failure stays what it is. How many came. */
static size_t run(const char *const *files, const fst_options *options, fst_status *status,
                  fst_error *error) {
    fst_stream *stream = (fst_stream *)(void *)error;
    size_t count = 0;
    *status = fst_stream_open(files, options, &stream, error);
    if (*status) {
        CHECK(stream == NULL);
        return 0;
    }
    for (;; count++) {
        DLManagedTensorVersioned *handle = NULL;
        fst_tensor tensor;
        *status = fst_stream_next(stream, &tensor, count % 2 ? &handle : NULL, error);
        if (*status || !tensor.name) break;
        CHECK_STR(NULL, sample_compare(&tensor, options->cast));
        if (handle) handle->deleter(handle);
    }
    for (int i = 0; *status && i < 3; i++) {
        DLManagedTensorVersioned *handle = (DLManagedTensorVersioned *)(void *)error;
        fst_tensor tensor;
        fst_error again;
        CHECK_INT(*status, fst_stream_next(stream, &tensor, &handle, &again));
        CHECK(memcmp(error, &again, sizeof again) == 0);
        CHECK(handle == NULL && tensor.name == NULL);
        CHECK_INT(*status, fst_last_error()->status);
    }
    fst_stream_close(stream);
    return count;
}

TEST(stream, every_device_call_may_fail) {
    int failures = 0;
    const char *const *files = two_files(5);
    unsigned descriptors = support_open_descriptors();
    for (unsigned flags = 0; flags <= FST_AS_READY; flags += FST_AS_READY)
        for (int at = 1;; at += at < 60 ? 1 : 3) {
            fst_options options = support_options(FST_DEVICE_GPU(0));
            fst_status status;
            fst_error error;
            options.cast = FST_BF16;
            options.flags = flags;
            options.memory_bytes = 320000;
            fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)at, .fail_at = at});
            run(files, &options, &status, &error);
            int reached = fake_gpu_calls() >= at;
            if (status == FST_OK)
                CHECK(!reached || fake_gpu_calls() - at < 12); /* at the very end: see close */
            else CHECK(status == FST_E_DEVICE || status == FST_E_DEVICE_MEMORY);
            failures += status != FST_OK;
            fake_gpu_end();
            CHECK_INT(descriptors, support_open_descriptors());
            if (!reached) break;
        }
    CHECK(failures > 60);
}

TEST(stream, every_system_call_may_fail) {
    int failures = 0;
    const char *const *files = two_files(6);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++)
        for (int at = 1;; at++) {
            fst_options options = support_options(device);
            fst_status status;
            fst_error error;
            options.cast = FST_BF16;
            options.memory_bytes = 320000;
            fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)at});
            fake_os_begin(&(fake_os_options){.fail_at = at, .error = EIO});
            run(files, &options, &status, &error);
            int reached = fake_os_calls() >= at;
            CHECK_INT(!reached, status == FST_OK);
            CHECK(status == FST_OK || status == FST_E_IO || status == FST_E_MEMORY);
            failures += reached;
            fake_os_end();
            fake_gpu_end();
            if (!reached) break;
        }
    CHECK(failures > 60);
}

TEST(stream, device_memory_runs_out) {
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_status status;
    fst_error error;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .memory = 900 << 10});
    size_t count = run(two_files(1), &options, &status, &error);
    CHECK_INT(FST_E_DEVICE_MEMORY, status);
    CHECK(count < sample_count());
    CHECK_INT(0, fake_gpu_blocks() > 1); /* but the staging ring */
    fake_gpu_end();
}

static const char *hook_path;
static void cut_short(void) {
    if (truncate(hook_path, 400000)) abort();
}
static void write_into(void) {
    FILE *file = fopen(hook_path, "r+b");
    if (!file || fseek(file, -3, SEEK_END) || fputc('!', file) == EOF || fclose(file)) abort();
}

TEST(stream, a_file_cut_short_in_the_middle) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        const char *const *files = two_files(7);
        fst_options options = support_options(device);
        fst_status status;
        fst_error error;
        hook_path = files[1];
        options.memory_bytes = 320000;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fake_os_begin(&(fake_os_options){.after = 300000, .hook = cut_short});
        size_t count = run(files, &options, &status, &error);
        fake_os_end();
        fake_gpu_end();
        CHECK_INT(FST_E_CHANGED, status);
        CHECK_STR(files[1], error.path);
        CHECK(error.offset >= 400000); /* where it ends, or where a chunk behind that begins */
        CHECK(count < sample_count());
    }
}

/* All data was right, but who knows of which of the two files. */
TEST(stream, a_file_that_changed_is_told_before_the_last_tensor) {
    for (int way = 0; way < 4; way++) {
        const char *const *files = two_files(8);
        fst_options options = support_options(way & 1 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        fst_error error;
        options.flags = way & 2 ? FST_AS_READY : 0;
        hook_path = files[0];
        usleep(20000); /* the change must not share the file's time stamp */
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_stream *stream = open_stream(files, &options);
        for (size_t i = 0; i + 1 < sample_count(); i++) CHECK(take(stream, &options, NULL) < SAMPLE_MAX);
        write_into();
        for (int i = 0; i < 2; i++) {
            fst_tensor tensor;
            CHECK_INT(FST_E_CHANGED, fst_stream_next(stream, &tensor, NULL, &error));
            CHECK(tensor.name == NULL);
            CHECK_STR(files[0], error.path);
        }
        fst_stream_close(stream);
        fake_gpu_end();
    }
}

TEST(stream, headers_that_are_wrong_are_refused_at_the_opening) {
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_status status;
    fst_error error;
    support_write(test_path("bad.safetensors"), "\2\0\0\0\0\0\0\0[]", 10);
    CHECK_INT(0, run(support_list(test_path("bad.safetensors")), &options, &status, &error));
    CHECK(status != FST_OK && error.file == 0);
    CHECK_INT(0, run(support_list(test_path("none.safetensors")), &options, &status, &error));
    CHECK_INT(FST_E_IO, status);
}

TEST(stream, arguments_that_are_wrong) {
    static const char *const none[] = {NULL};
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_stream *stream = (fst_stream *)(void *)&options;
    fst_error error;
    CHECK_INT(FST_E_ARG, fst_stream_open(NULL, &options, &stream, &error));
    CHECK(stream == NULL);
    CHECK_INT(FST_E_ARG, fst_stream_open(none, &options, &stream, &error));
    CHECK_INT(FST_E_ARG, fst_stream_open(two_files(1), &options, NULL, &error));
    options.size = 1;
    CHECK_INT(FST_E_ARG, fst_stream_open(two_files(1), &options, &stream, &error));
    CHECK_INT(FST_E_ARG, error.status);
    options = support_options(FST_DEVICE_CPU);
    stream = open_stream(two_files(1), &options);
    CHECK_INT(FST_E_ARG, fst_stream_next(stream, NULL, NULL, &error));
    CHECK_INT(0, take(stream, &options, NULL)); /* as if nothing had been */
    fst_stream_close(stream);
}

/* ---- Progress and cancel ------------------------------------------------------------------------------------ */

typedef struct progress {
    fst_progress last;
    int calls, cancel_at, backwards;
} progress;

static int note_progress(void *arg, const fst_progress *now) {
    progress *p = arg;
    p->backwards += now->bytes_done < p->last.bytes_done;
    p->last = *now;
    return ++p->calls == p->cancel_at;
}

TEST(stream, progress_is_told_while_the_consumer_waits_and_at_the_end) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        const char *const *files = two_files(3);
        progress p = {.calls = 0};
        fst_options options = support_options(device);
        options.progress = note_progress;
        options.progress_arg = &p;
        options.memory_bytes = 320000;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_stream *stream = open_stream(files, &options);
        for (size_t i = 0; i < sample_count(); i++) {
            CHECK_INT(i, take(stream, &options, NULL));
            if (i % 20 == 0) usleep(60000);
        }
        CHECK_INT(SAMPLE_MAX, take(stream, &options, NULL));
        fst_stream_close(stream);
        fake_gpu_end();
        CHECK(p.calls >= 2 && p.backwards == 0);
        CHECK(p.last.bytes_total > 1000000);
        CHECK_INT(p.last.bytes_total, p.last.bytes_done);
    }
}

TEST(stream, progress_cancels) {
    for (int at = 1; at <= 2; at++) {
        progress p = {.cancel_at = at};
        fst_options options = support_options(FST_DEVICE_GPU(0));
        fst_status status;
        fst_error error;
        options.progress = note_progress;
        options.progress_arg = &p;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        run(two_files(3), &options, &status, &error);
        fake_gpu_end();
        CHECK_INT(FST_E_CANCELLED, status);
        CHECK_INT(at, p.calls);
    }
}

/* Also when the next tensor is there already. */
TEST(stream, the_flag_cancels_at_the_next_call) {
    const char *const *files = two_files(9);
    volatile int cancel = 0;
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_error error;
    fst_tensor tensor;
    options.cancel = &cancel;
    fst_stream *stream = open_stream(files, &options);
    CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, NULL, &error));
    usleep(100000);
    __atomic_store_n(&cancel, 1, __ATOMIC_RELAXED);
    CHECK_INT(FST_E_CANCELLED, fst_stream_next(stream, &tensor, NULL, &error));
    fst_stream_close(stream);
}

TEST(stream, the_flag_cancels) {
    for (int way = 0; way < 4; way++) {
        const char *const *files = equal_tensors(64, 64 * KIB);
        volatile int cancel = way & 2;
        fst_options options = support_options(way & 1 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        fst_tensor tensor;
        fst_error error;
        fst_status status = FST_OK;
        options.cancel = &cancel;
        options.memory_bytes = 256 * KIB;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_stream *stream = open_stream(files, &options);
        size_t count = 0;
        for (; count < 64 && !status; count++) {
            if (count == 20) __atomic_store_n(&cancel, 1, __ATOMIC_RELAXED);
            status = fst_stream_next(stream, &tensor, NULL, &error);
        }
        CHECK_INT(FST_E_CANCELLED, status);
        CHECK(way & 2 ? count <= 6 : count > 20 && count <= 26); /* what was read is given */
        CHECK_INT(FST_E_CANCELLED, fst_stream_next(stream, &tensor, NULL, &error));
        fst_stream_close(stream);
        fake_gpu_end();
    }
}

/* ---- What DLPack cannot express -------------------------------------------------------------------------------- */

TEST(stream, a_tensor_that_dlpack_refuses_does_not_end_it) {
    for (unsigned flags = 0; flags <= FST_AS_READY; flags += FST_AS_READY) {
        fst_options options = support_options(FST_DEVICE_GPU(0));
        options.flags = flags;
        options.memory_bytes = 64 * KIB;
        sample_begin(5);
        for (int i = 0; i < 12; i++) {
            size_t index = sample_add(i % 4 == 3 ? FST_F4 : FST_U8, i % 4 == 3 ? 60000 : 40000);
            if (i % 4 == 3) sample_shape(index, "[20000,3]");
        }
        sample_write(test_path("f4.safetensors"), 0, 12, 0);
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_stream *stream = open_stream(support_list(test_path("f4.safetensors")), &options);
        unsigned refused = 0, taken = 0;
        while (taken < 12) {
            DLManagedTensorVersioned *handle;
            fst_tensor tensor;
            fst_error error;
            fst_status status = fst_stream_next(stream, &tensor, &handle, &error);
            if (status == FST_OK) {
                CHECK_STR(NULL, sample_compare(&tensor, FST_NATIVE));
                handle->deleter(handle);
            } else {
                CHECK_INT(FST_E_DLPACK, status);
                CHECK(handle == NULL && tensor.name == NULL && strstr(error.text, "odd"));
                CHECK(sample_stored_bytes(take(stream, &options, NULL)) == 30000);
                refused++;
            }
            taken++;
        }
        CHECK_INT(3, refused);
        CHECK_INT(SAMPLE_MAX, take(stream, &options, NULL));
        fst_stream_close(stream);
        fake_gpu_end();
    }
}

/* ---- What is told ------------------------------------------------------------------------------------------------ */

TEST(stream, statistics_are_complete_after_the_last_tensor) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        const char *const *files = two_files(3);
        fst_stats stats = {.size = sizeof stats};
        fst_options options = support_options(device);
        uint64_t out = 0, stored = 0;
        options.cast = FST_BF16;
        options.memory_bytes = 320000;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        count_reads(1);
        fst_stream *stream = open_stream(files, &options);
        for (size_t i = 0; i < sample_count(); i++) {
            CHECK_INT(i, take(stream, &options, NULL));
            out += sample_result_bytes(i, FST_BF16);
            stored += sample_stored_bytes(i);
        }
        uint64_t asked = atomic_load(&bytes_asked);
        CHECK_INT(FST_OK, fst_model_stats(fst_stream_model(stream), &stats));
        CHECK_INT(out, stats.bytes_out);
        CHECK_INT(asked, stats.bytes_read);
        CHECK_INT(stored, stats.bytes_cached + stats.bytes_buffered + stats.bytes_direct);
        CHECK_STR(device == FST_DEVICE_CPU ? "cpu" : "fake:0", stats.device);
        CHECK_INT(3, stats.threads);
        CHECK_INT(device == FST_DEVICE_CPU ? 6 : 8, stats.slots);
        CHECK(stats.chunks > 10 && stats.launches > 10 && stats.seconds > 0);
        CHECK(stats.reader && strstr(stats.reader, "threads"));
        CHECK(stats.peak_device_bytes >= 100000);
        fst_stream_close(stream);
        count_reads(0);
        fake_gpu_end();
    }
}

TEST(stream, a_slow_consumer_is_what_limits) {
    fst_stats stats = {.size = sizeof stats};
    fst_options options = support_options(FST_DEVICE_CPU);
    options.memory_bytes = 256 * KIB;
    fst_stream *stream = open_stream(equal_tensors(16, 64 * KIB), &options);
    while (take(stream, &options, NULL) != SAMPLE_MAX) usleep(20000);
    CHECK_INT(FST_OK, fst_model_stats(fst_stream_model(stream), &stats));
    fst_stream_close(stream);
    CHECK_STR("consumer", stats.limit);
    CHECK(stats.consumer_seconds > 0.2);
    CHECK(stats.allocate_seconds < 0.1);
}

TEST(stream, its_model_has_names_and_no_data) {
    DLManagedTensorVersioned *handle;
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_tensor tensor;
    fst_error error;
    fst_stream *stream = open_stream(two_files(2), &options);
    const fst_model *model = fst_stream_model(stream);
    CHECK_INT(sample_count(), fst_model_count(model));
    CHECK_INT(0, take(stream, &options, NULL));
    CHECK_INT(FST_OK, fst_model_find(model, "t.0", &tensor));
    CHECK(tensor.data == NULL);
    CHECK_INT(200000, tensor.nbytes);
    CHECK_INT(FST_E_NO_DATA, fst_save(model, test_path("out.safetensors"), NULL, &error));
    CHECK_INT(FST_E_NO_DATA, fst_model_dlpack((fst_model *)(uintptr_t)model, 0, &handle));
    fst_stream_close(stream);
}

/* Two at once, through one context, and loads between. */
TEST(stream, two_at_once) {
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_context *context = fst_context_new();
    fst_model *model;
    CHECK(context);
    options.context = context;
    options.cast = FST_BF16;
    const char *const *files = two_files(2);
    fake_gpu_begin(&(fake_gpu_options){.seed = 2});
    fst_stream *a = open_stream(files, &options), *b = open_stream(files, &options);
    for (size_t i = 0; i < sample_count(); i++) {
        CHECK_INT(i, take(a, &options, NULL));
        CHECK_INT(i, take(b, &options, NULL));
        if (i % 30) continue;
        CHECK_INT(FST_OK, fst_load(files, &options, &model, NULL));
        sample_check(model, FST_BF16);
        fst_model_free(model);
    }
    fst_stream_close(a);
    fst_stream_close(b);
    fst_context_free(context);
    fake_gpu_end();
}
