/* What a load does with the options of a session: rules, memory and contexts of the caller's, ways of reading; and what
 * becomes of all that when things go wrong, by seed. */
#include <dlpack/dlpack.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dtype.h"
#include "harness.h"
#include "model.h"
#include "os.h"
#include "pipeline.h"
#include "sample.h"
#include "support.h"

#define KIB ((uint64_t)1 << 10)
#define MIB ((uint64_t)1 << 20)

enum { STORED = 582002 };

/* Five tensors that a cast changes or keeps, of so many bytes. */
static const char *const *few(void) {
    sample_begin(1);
    sample_add(FST_F32, 60000);
    sample_add(FST_I16, 1000);
    sample_add(FST_F16, 100001);
    sample_add(FST_F32, 0);
    sample_add(FST_BF16, 70000);
    sample_write(test_path("few.safetensors"), 0, 5, 1);
    return support_list(test_path("few.safetensors"));
}

static fst_model *load(const char *const *files, const fst_options *options) {
    fst_model *model;
    fst_error error;
    if (fst_load(files, options, &model, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
    return model;
}

static void load_and_check(const char *const *files, const fst_options *options) {
    fst_model *model = load(files, options);
    sample_check(model, options->cast);
    fst_model_free(model);
}

/* ---- Rules ----------------------------------------------------------------------------------------------- */

typedef struct rules {
    int skip[8], ends_at; /* 1 + the tensor at which it ends the load */
    fst_dtype cast[8];
    void *memory[8];
    uint64_t memory_bytes[8];
    size_t calls;
    int wrong;
} rules;

static int by_list(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    rules *r = arg;
    size_t i = sample_index(tensor);
    if (i >= 8) return 1;
    r->wrong |= tensor->data != NULL || tensor->dtype != tensor->stored_dtype || i != r->calls ||
                tensor->nbytes != sample_stored_bytes(i) || tensor->file != 0 || tensor->ndim != 1 ||
                rule->skip || rule->memory || rule->cast != FST_BF16;
    r->calls++;
    if (r->cast[i]) rule->cast = r->cast[i] == FST_DTYPE_COUNT ? FST_NATIVE : r->cast[i];
    rule->skip = r->skip[i];
    rule->memory = r->memory[i];
    rule->memory_bytes = r->memory_bytes[i];
    return r->ends_at == (int)i + 1;
}

static fst_status load_by(rules *r, int device, fst_model **model, fst_error *error) {
    fst_options options = support_options(device);
    options.cast = FST_BF16;
    options.rule = by_list;
    options.rule_arg = r;
    r->calls = 0;
    r->wrong = 0;
    fst_status status = fst_load(few(), &options, model, error);
    CHECK(!r->wrong);
    if (status) CHECK(*model == NULL);
    return status;
}

TEST(pipeline, a_rule_skips_and_casts_each_tensor) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        rules r = {.skip = {[1] = 1}, .cast = {[0] = FST_F64, [2] = FST_DTYPE_COUNT}};
        const fst_dtype wanted[] = {FST_F64, 0, FST_NATIVE, FST_BF16, FST_BF16};
        fst_stats stats = {.size = sizeof stats};
        fst_tensor tensor;
        fst_model *model;
        fst_error error;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        CHECK_INT(FST_OK, load_by(&r, device, &model, &error));
        CHECK_INT(5, r.calls);
        CHECK_INT(4, fst_model_count(model));
        CHECK_INT((size_t)-1, fst_model_index(model, "t.1"));
        for (size_t i = 0; i < 4; i++) {
            CHECK_INT(FST_OK, fst_model_at(model, i, &tensor));
            CHECK_STR(NULL, sample_compare(&tensor, wanted[sample_index(&tensor)]));
        }
        CHECK_INT(FST_OK, fst_model_stats(model, &stats));
        CHECK_INT(1, stats.tensors_ignored);
        fst_model_free(model);
        fake_gpu_end();
    }
}

TEST(pipeline, a_rule_skips_everything) {
    rules r = {.skip = {1, 1, 1, 1, 1}};
    fst_model *model;
    fst_error error;
    CHECK_INT(FST_OK, load_by(&r, FST_DEVICE_CPU, &model, &error));
    CHECK_INT(0, fst_model_count(model));
    fst_model_free(model);
}

TEST(pipeline, a_rule_ends_the_load) {
    rules r = {.ends_at = 3};
    fst_model *model;
    fst_error error;
    CHECK_INT(FST_E_CANCELLED, load_by(&r, FST_DEVICE_CPU, &model, &error));
    CHECK_INT(3, r.calls);
    CHECK(strstr(error.text, "\"t.2\"") != NULL);
}

TEST(pipeline, a_rule_with_a_dtype_that_is_none) {
    const fst_dtype wrong[] = {(fst_dtype)99, (fst_dtype)-1};
    fst_model *model;
    fst_error error;
    for (int i = 0; i < 2; i++) {
        rules r = {.cast = {[2] = wrong[i]}};
        CHECK_INT(FST_E_ARG, load_by(&r, FST_DEVICE_CPU, &model, &error));
        CHECK(strstr(error.text, "\"t.2\"") != NULL);
    }
    rules r = {.cast = {[2] = FST_I32}};
    CHECK_INT(FST_E_NO_CAST, load_by(&r, FST_DEVICE_CPU, &model, &error));
    CHECK(strstr(error.text, "\"t.2\"") != NULL);
    r = (rules){.cast = {[1] = FST_I32}}; /* of no effect where tensors are kept anyway */
    CHECK_INT(FST_OK, load_by(&r, FST_DEVICE_CPU, &model, &error));
    fst_model_free(model);
}

/* Results of BF16 at an odd element of memory that is just large enough. */
TEST(pipeline, results_in_memory_of_the_caller) {
    unsigned char *memory = malloc(MIB);
    CHECK(memory);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        rules r = {.memory = {memory + 2, NULL, memory + 200002, memory + 600000},
                   .memory_bytes = {120000, 0, 200002, 0}};
        DLManagedTensorVersioned *handle;
        fst_tensor tensor;
        fst_model *model;
        fst_error error;
        memset(memory, 0xEE, MIB);
        fake_gpu_begin(&(fake_gpu_options){.seed = 2});
        CHECK_INT(FST_OK, load_by(&r, device, &model, &error));
        sample_check(model, FST_BF16);
        for (size_t i = 0; i < 4; i++) {
            CHECK_INT(FST_OK, fst_model_at(model, i, &tensor));
            if (r.memory[i]) CHECK(tensor.data == r.memory[i]);
        }
        CHECK(memory[1] == 0xEE && memory[120002] == 0xEE && memory[200001] == 0xEE);
        CHECK(memory[400004] == 0xEE && memory[600000] == 0xEE);
        CHECK_INT(FST_OK, fst_model_dlpack(model, 0, &handle));
        fst_model_free(model);
        CHECK(handle->dl_tensor.data == memory + 2);
        handle->deleter(handle);
        CHECK_INT(0, fake_gpu_blocks() > 1);
        fake_gpu_end();
    }
    free(memory);
}

TEST(pipeline, memory_that_does_not_do_is_refused_by_name) {
    static _Alignas(8) unsigned char memory[200010];
    const struct {
        size_t shift;
        uint64_t nbytes;
    } wrong[] = {{0, 200001}, {1, 200008}, {0, 0}};
    for (int i = 0; i < 3; i++) {
        rules r = {.memory = {[2] = memory + wrong[i].shift}, .memory_bytes = {[2] = wrong[i].nbytes}};
        fst_model *model;
        fst_error error;
        CHECK_INT(FST_E_ARG, load_by(&r, FST_DEVICE_CPU, &model, &error));
        CHECK(strstr(error.text, "\"t.2\"") && strstr(error.text, i == 1 ? "aligned" : "200002"));
    }
    rules r = {.memory_bytes = {[2] = 5}}; /* of memory that is none */
    fst_model *model;
    fst_error error;
    CHECK_INT(FST_OK, load_by(&r, FST_DEVICE_CPU, &model, &error));
    fst_model_free(model);
}

static int skip_in_second(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    (void)arg;
    rule->skip = tensor->file == 1 && strcmp(tensor->name, "same") == 0;
    return 0;
}

TEST(pipeline, a_rule_leaves_out_one_of_two_of_a_name) {
    const char *files[] = {test_path("a.safetensors"), test_path("b.safetensors"), NULL};
    support_tensor both[] = {{"same", "U8", "[3]", "def", 3}, {"other", "U8", "[2]", "gh", 2}};
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_tensor tensor;
    fst_model *model;
    support_checkpoint(files[0], NULL, &(support_tensor){"same", "U8", "[3]", "abc", 3}, 1, 0);
    support_checkpoint(files[1], NULL, both, 2, 0);
    CHECK_INT(FST_E_DUPLICATE, fst_load(files, &options, &model, NULL));
    options.rule = skip_in_second;
    model = load(files, &options);
    CHECK_INT(2, fst_model_count(model));
    CHECK_INT(FST_OK, fst_model_find(model, "same", &tensor));
    CHECK_BYTES("abc", tensor.data, 3);
    CHECK_INT(FST_OK, fst_model_find(model, "other", &tensor));
    CHECK_BYTES("gh", tensor.data, 2);
    fst_model_free(model);
}

static int skip_x(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    ++*(int *)arg;
    rule->skip = strcmp(tensor->name, "x") == 0;
    return 0;
}

/* What an index does not list is not even shown to the rule; what the rule skips, the index may list. */
TEST(pipeline, an_index_and_a_rule) {
    support_tensor first[] = {{"x", "U8", "[1]", "x", 1}, {"stray", "U8", "[1]", "s", 1}};
    static const char index[] = "{\"weight_map\":{\"x\":\"1.safetensors\",\"y\":\"2.safetensors\"}}";
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_stats stats = {.size = sizeof stats};
    fst_model *model;
    int calls = 0;
    support_checkpoint(test_path("1.safetensors"), NULL, first, 2, 0);
    support_checkpoint(test_path("2.safetensors"), NULL, &(support_tensor){"y", "U8", "[1]", "y", 1}, 1, 0);
    support_write(test_path("model.safetensors.index.json"), index, strlen(index));
    options.rule = skip_x;
    options.rule_arg = &calls;
    model = load(support_list(test_directory()), &options);
    CHECK_INT(2, calls);
    CHECK_INT(1, fst_model_count(model));
    CHECK_INT(0, fst_model_index(model, "y"));
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    CHECK_INT(2, stats.tensors_ignored);
    fst_model_free(model);
    CHECK_INT(FST_OK,
              fst_open(support_list(test_directory()), &options, &model, NULL)); /* headers as they are */
    CHECK_INT(2, fst_model_count(model));
    fst_model_free(model);
}

/* ---- Allocators ------------------------------------------------------------------------------------------ */

typedef struct arena {
    atomic_int live, allocated, at_once;
    int refuse_at, misalign_at, device, other_thread, wrong;
    pthread_t thread;
} arena;

static void *arena_allocate(void *arg, uint64_t nbytes, int device) {
    arena *a = arg;
    int number = atomic_fetch_add(&a->allocated, 1) + 1;
    if (atomic_fetch_add(&a->at_once, 1)) a->wrong = 1;
    a->other_thread |= !pthread_equal(a->thread, pthread_self());
    a->wrong |= device != a->device || nbytes == 0 || nbytes % 256;
    char *memory = number == a->refuse_at ? NULL : aligned_alloc(256, nbytes + 256);
    if (memory) {
        *(uint64_t *)(void *)(memory + nbytes) = nbytes; /* what must come back */
        if (number == a->misalign_at) memory += 128;
        atomic_fetch_add(&a->live, 1);
    }
    atomic_fetch_sub(&a->at_once, 1);
    return memory;
}

static void arena_release(void *arg, void *memory, uint64_t nbytes, int device) {
    arena *a = arg;
    char *start = (char *)((uintptr_t)memory & ~(uintptr_t)255);
    if (device != a->device || *(uint64_t *)(void *)(start + nbytes) != nbytes) a->wrong = 1;
    atomic_fetch_sub(&a->live, 1);
    free(start);
}

static arena arena_for(int device) {
    return (arena){.device = device == FST_DEVICE_CPU ? -1 : 0, .thread = pthread_self()};
}

TEST(pipeline, blocks_come_from_the_allocator_and_go_back_with_the_last_tensor) {
    uint64_t usual = fst_block_bytes;
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        arena a = arena_for(device);
        fst_allocator allocator = {arena_allocate, arena_release, &a};
        fst_options options = support_options(device);
        DLManagedTensorVersioned *handles[2];
        fst_model *model;
        options.allocator = &allocator;
        options.cast = FST_BF16;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_block_bytes = 64 << 10;
        model = load(few(), &options);
        fst_block_bytes = usual;
        memset(&allocator, 0, sizeof allocator); /* it was copied */
        sample_check(model, FST_BF16);
        int blocks = atomic_load(&a.live);
        CHECK(blocks >= 3);
        CHECK(fake_gpu_blocks() <= 1); /* the staging ring, which is not of the caller's concern */
        CHECK_INT(FST_OK, fst_model_dlpack(model, 0, &handles[0]));
        CHECK_INT(FST_OK, fst_model_dlpack(model, 0, &handles[1]));
        fst_model_free(model);
        CHECK_INT(1, atomic_load(&a.live));
        handles[0]->deleter(handles[0]);
        CHECK_INT(1, atomic_load(&a.live));
        handles[1]->deleter(handles[1]);
        CHECK_INT(0, atomic_load(&a.live));
        CHECK_INT(blocks, atomic_load(&a.allocated));
        CHECK(!a.wrong && !a.other_thread);
        fake_gpu_end();
    }
}

static void fail_allocations(int streams) {
    uint64_t usual = fst_block_bytes;
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++)
        for (int way = 0; way < 6; way++) {
            arena a = arena_for(device);
            fst_allocator allocator = {arena_allocate, arena_release, &a};
            fst_options options = support_options(device);
            fst_model *model = NULL;
            fst_stream *stream = NULL;
            fst_error error;
            *(way % 2 ? &a.misalign_at : &a.refuse_at) = 1 + way / 2;
            options.allocator = &allocator;
            options.cast = FST_BF16;
            options.memory_bytes = 256 << 10;
            fake_gpu_begin(&(fake_gpu_options){.seed = 1});
            fst_block_bytes = 64 << 10;
            fst_status status = streams ? fst_stream_open(few(), &options, &stream, &error)
                                        : fst_load(few(), &options, &model, &error);
            for (fst_tensor tensor = {.name = ""}; streams && !status && tensor.name;)
                status = fst_stream_next(stream, &tensor, NULL, &error);
            fst_stream_close(stream);
            fst_block_bytes = usual;
            if (way % 2) CHECK_INT(FST_E_ARG, status);
            else CHECK_INT(device == FST_DEVICE_CPU ? FST_E_MEMORY : FST_E_DEVICE_MEMORY, status);
            CHECK(strstr(error.text, way % 2 ? "aligned" : "out of memory"));
            CHECK(model == NULL);
            CHECK_INT(0, atomic_load(&a.live));
            CHECK_INT(1 + way / 2, atomic_load(&a.allocated));
            CHECK(!a.wrong);
            fake_gpu_end();
        }
}

TEST(pipeline, an_allocator_that_fails_or_gives_odd_memory) { fail_allocations(0); }
TEST(pipeline, an_allocator_that_fails_or_gives_odd_memory_in_a_stream) { fail_allocations(1); }

TEST(pipeline, a_stream_takes_its_blocks_from_the_allocator) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        arena a = arena_for(device);
        fst_allocator allocator = {arena_allocate, arena_release, &a};
        DLManagedTensorVersioned *handles[5];
        fst_options options = support_options(device);
        fst_stream *stream;
        options.allocator = &allocator;
        options.cast = FST_BF16;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        CHECK_INT(FST_OK, fst_stream_open(few(), &options, &stream, NULL));
        for (int i = 0; i < 5; i++) {
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, &handles[i], NULL));
            CHECK_STR(NULL, sample_compare(&tensor, FST_BF16));
        }
        fst_stream_close(stream);
        CHECK(atomic_load(&a.live) >= 1);
        for (int i = 0; i < 5; i++) handles[i]->deleter(handles[i]);
        CHECK_INT(0, atomic_load(&a.live));
        CHECK(!a.wrong);
        fake_gpu_end();
    }
}

TEST(pipeline, half_an_allocator_is_refused) {
    const fst_allocator halves[] = {{arena_allocate, NULL, NULL}, {NULL, arena_release, NULL}, {0}};
    for (int i = 0; i < 3; i++) {
        fst_options options = support_options(FST_DEVICE_CPU);
        fst_model *model;
        options.allocator = &halves[i];
        CHECK_INT(FST_E_ARG, fst_load(few(), &options, &model, NULL));
    }
}

/* ---- Contexts -------------------------------------------------------------------------------------------- */

enum { SLOTS = 8 }; /* of an engine with support_options */

TEST(pipeline, contexts_share_nothing_and_keep_what_they_have) {
    fst_context *a = fst_context_new(), *b = fst_context_new();
    fst_options options = support_options(FST_DEVICE_GPU(0));
    CHECK(a && b);
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    unsigned threads = support_threads();
    const char *const *files = few();
    for (int i = 0; i < 3; i++) { /* the second and third load find what the first made */
        options.context = a;
        load_and_check(files, &options);
        CHECK_INT(SLOTS, fake_gpu_pins());
        CHECK_INT(threads + 3, support_threads());
    }
    fst_release_cached(); /* is about the process's own */
    CHECK_INT(SLOTS, fake_gpu_pins());
    options.context = b;
    load_and_check(files, &options);
    CHECK_INT(2 * SLOTS, fake_gpu_pins());
    options.context = NULL;
    load_and_check(files, &options);
    CHECK_INT(3 * SLOTS, fake_gpu_pins());
    CHECK_INT(threads + 9, support_threads());
    fst_context_release(a);
    CHECK_INT(2 * SLOTS, fake_gpu_pins());
    options.context = a; /* it can be used again */
    load_and_check(files, &options);
    CHECK_INT(3 * SLOTS, fake_gpu_pins());
    fst_context_free(a);
    CHECK_INT(2 * SLOTS, fake_gpu_pins());
    fst_context_free(b);
    fst_context_free(NULL);
    fst_context_release(NULL);
    CHECK_INT(0, fake_gpu_pins());
    CHECK_INT(threads, support_threads());
    fake_gpu_end();
}

TEST(pipeline, a_model_outlives_its_context) {
    fst_context *context = fst_context_new();
    fst_options options = support_options(FST_DEVICE_GPU(0));
    options.context = context;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fst_model *model = load(few(), &options);
    fst_context_free(context);
    sample_check(model, FST_NATIVE);
    fst_model_free(model);
    fake_gpu_end();
}

TEST(pipeline, memory_of_freed_models_stays_with_the_contexts) {
    fst_context *context = fst_context_new();
    fst_options options = support_options(FST_DEVICE_GPU(0));
    options.context = context;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    const char *const *files = few();
    fst_model *model = load(files, &options);
    uint64_t before = fake_gpu_kept(), peak = fake_gpu_peak();
    fst_model_free(model);
    uint64_t kept = fake_gpu_kept();
    CHECK(kept >= before + STORED);
    load_and_check(files, &options);
    CHECK_INT(kept, fake_gpu_kept());
    CHECK_INT(peak, fake_gpu_peak());
    options.context = NULL;
    load_and_check(files, &options);
    fst_context_free(context); /* the process's own holds it still */
    CHECK(fake_gpu_kept() > 0);
    model = load(files, &options);
    fst_release_cached();
    CHECK_INT(0, fake_gpu_kept());
    fst_model_free(model);
    CHECK_INT(0, fake_gpu_kept());
    fake_gpu_end();
}

/* What the error of a load that does not fit says of it. */
static unsigned long long free_bytes(const char *const *files) {
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_model *model;
    fst_error error;
    options.cast = FST_F64;
    CHECK_INT(FST_E_DEVICE_MEMORY, fst_load(files, &options, &model, &error));
    const char *number = strstr(error.text, "in all, ");
    CHECK(number != NULL);
    return number ? strtoull(number + strlen("in all, "), NULL, 10) : 0;
}

TEST(pipeline, memory_that_is_kept_is_free_for_the_next_load) {
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .memory = 2 * MIB});
    const char *const *files = few();
    fst_model *model = load(files, &options);
    unsigned long long beside_it = free_bytes(files);
    fst_model_free(model);
    CHECK(fake_gpu_kept() >= STORED);
    CHECK(free_bytes(files) >= beside_it + STORED);
    load_and_check(files, &options);
    fake_gpu_end();
}

/* Another number of threads, or slots of another size, are another engine; two are kept. */
TEST(pipeline, a_context_keeps_two_shapes) {
    fst_context *context = fst_context_new();
    fst_options options = support_options(FST_DEVICE_GPU(0));
    options.context = context;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    const char *const *files = few();
    for (unsigned i = 0; i < 6; i++) {
        options.threads = 1 + i % 3;
        load_and_check(files, &options);
    }
    CHECK_INT(6 + SLOTS, fake_gpu_pins()); /* of two threads, and of three */
    fst_context_free(context);
    fake_gpu_end();
}

static size_t large_cache(void) { return (size_t)128 << 20; }

/* A chunk is no larger than its file. */
TEST(pipeline, small_files_have_more_slots_that_are_smaller) {
    static const struct {
        size_t nbytes, slot_bytes;
        unsigned slots;
    } cases[] = {{1, 2 << 20, 32},
                 {(2 << 20) - 4096, 2 << 20, 32},
                 {2 << 20, 4 << 20, 16},
                 {(8 << 20) - 4096, 8 << 20, 8},
                 {8 << 20, 16 << 20, 4}};
    size_t (*usual)(void) = fst_os_calls.cache_bytes;
    const char *path = test_path("size.safetensors");
    unsigned char *zeros = calloc(8, 1 << 20);
    CHECK(zeros);
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fst_os_calls.cache_bytes = large_cache;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fst_options options = support_options(FST_DEVICE_GPU(0));
        fst_stats stats = {.size = sizeof stats};
        fst_model *model;
        char shape[32];
        snprintf(shape, sizeof shape, "[%zu]", cases[i].nbytes);
        support_checkpoint(path, NULL, &(support_tensor){"t", "U8", shape, zeros, cases[i].nbytes}, 1, 0);
        options.slot_bytes = 0;
        CHECK_INT(FST_OK, fst_load(support_list(path), &options, &model, NULL));
        CHECK_INT(FST_OK, fst_model_stats(model, &stats));
        CHECK_INT(cases[i].slot_bytes, stats.slot_bytes);
        CHECK_INT(cases[i].slots, stats.slots);
        fst_model_free(model);
    }
    fst_os_calls.cache_bytes = usual;
    fake_gpu_end();
    free(zeros);
}

typedef struct loader {
    const char *const *files;
    fst_options options;
    int rounds;
    const char *wrong;
} loader;

static void *load_again_and_again(void *arg) {
    loader *l = arg;
    for (int i = 0; i < l->rounds && !l->wrong; i++) {
        fst_tensor tensor;
        fst_model *model;
        if (fst_load(l->files, &l->options, &model, NULL)) {
            l->wrong = "a load failed";
            break;
        }
        for (size_t k = 0; k < fst_model_count(model) && !l->wrong; k++) {
            fst_model_at(model, k, &tensor);
            l->wrong = sample_compare(&tensor, l->options.cast);
        }
        fst_model_free(model);
    }
    return NULL;
}

/* Eight threads; meanwhile, if wanted, somebody releases. */
static void load_from_eight(int device, int release) {
    fst_context *context = fst_context_new();
    pthread_t threads[8];
    loader loaders[8];
    const char *const *files = few();
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    unsigned before = support_threads();
    for (int i = 0; i < 8; i++) {
        loaders[i] = (loader){files, support_options(device), 5, NULL};
        loaders[i].options.context = context;
        loaders[i].options.cast = i % 2 ? FST_BF16 : FST_NATIVE;
        CHECK_INT(0, pthread_create(&threads[i], NULL, load_again_and_again, &loaders[i]));
    }
    for (int i = 0; release && i < 200; i++) {
        fst_context_release(context);
        usleep(100);
    }
    for (int i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 8; i++) CHECK_STR(NULL, loaders[i].wrong);
    CHECK(support_threads() <= before + 2 * 3);
    CHECK(fake_gpu_pins() <= 2 * SLOTS);
    fst_context_free(context);
    CHECK_INT(before, support_threads());
    fake_gpu_end();
}

TEST(pipeline, eight_threads_load_through_one_context) {
    load_from_eight(FST_DEVICE_CPU, 0);
    load_from_eight(FST_DEVICE_GPU(0), 0);
}

TEST(pipeline, a_context_is_released_while_loads_run) {
    load_from_eight(FST_DEVICE_CPU, 1);
    load_from_eight(FST_DEVICE_GPU(0), 1);
}

/* ---- Pinned memory ----------------------------------------------------------------------------------------- */

TEST(pipeline, memory_that_cannot_be_pinned_is_told_and_is_no_failure) {
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_stats stats = {.size = sizeof stats};
    options.cast = FST_BF16;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .refuse_to_pin = 1});
    fst_model *model = load(few(), &options);
    sample_check(model, FST_BF16);
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    CHECK_INT(SLOTS, stats.slots_unpinned);
    CHECK_INT(0, stats.pinned_bytes);
    CHECK_INT(SLOTS, stats.slots);
    CHECK_INT(0, fake_gpu_pins());
    fst_model_free(model);
    fake_gpu_end();
}

TEST(pipeline, slots_that_cannot_be_pinned_are_left_out) {
    fst_options options = support_options(FST_DEVICE_GPU(0));
    fst_stats stats = {.size = sizeof stats};
    options.cast = FST_BF16;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .pins_at_most = 3});
    fst_model *model = load(few(), &options);
    sample_check(model, FST_BF16);
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    CHECK_INT(SLOTS - 3, stats.slots_unpinned);
    CHECK_INT(3, stats.slots);
    CHECK_INT(3, fake_gpu_pins());
    CHECK_INT(3 * 80 * KIB, stats.pinned_bytes);
    fst_model_free(model);
    fake_gpu_end();
    fake_gpu_begin(&(fake_gpu_options){.seed = 1}); /* as it should be */
    model = load(few(), &options);
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    CHECK_INT(0, stats.slots_unpinned);
    CHECK_INT(SLOTS, stats.slots);
    CHECK_INT(SLOTS * 80 * KIB, stats.pinned_bytes);
    fst_model_free(model);
    fake_gpu_end();
}

/* ---- Looking ahead ----------------------------------------------------------------------------------------- */

/* A file whose every second MiB is in memory, read by one thread, and what is asked of the kernel before it is read. */
#define MIBS 8u
static fst_os real;
static size_t asked_ahead[MIBS]; /* bytes of each MiB */
static size_t longest_advice, data_begins;
static int has_read;
static const char *device_says; /* what the system says of the device's readahead */

static int says_other(int fd, fst_file_system *out) {
    (void)fd;
    *out = FST_FS_OTHER;
    return 0;
}
static int says_owner(int fd) { return fd >= 0; }
static int every_second(int fd, uint64_t offset, uint64_t size, uint64_t *pages) {
    (void)fd;
    *pages = 0;
    for (uint64_t at = offset; at < offset + size; at += 4096)
        *pages += at < data_begins || (at - data_begins) / (1024 * KIB) % 2 == 0;
    return 0;
}
static int note_advice(int fd, uint64_t offset, uint64_t size, fst_advice advice) {
    (void)fd;
    if (advice != FST_ADVICE_WILLNEED || has_read) return 0;
    if (size > longest_advice) longest_advice = size;
    CHECK(offset >= data_begins && offset + size <= data_begins + MIBS * 1024 * KIB);
    for (uint64_t at = offset - data_begins; size; at++, size--) asked_ahead[at / (1024 * KIB)]++;
    return 0;
}
static ssize_t note_read(int fd, void *buffer, size_t size, uint64_t offset) {
    has_read |= offset >= data_begins;
    return real.pread(fd, buffer, size, offset);
}
static ssize_t say_readahead(const char *path, char *out, size_t size) {
    if (!strstr(path, "read_ahead_kb")) return real.read_text(path, out, size);
    if (!device_says) return -ENOENT;
    return snprintf(out, size, "%s\n", device_says);
}

TEST(pipeline, what_is_missing_is_asked_for_beyond_what_is_there) {
    static const struct {
        const char *device_says;
        size_t step;
    } cases[] = {{NULL, 128 * KIB}, {"64", 128 * KIB}, {"256", 256 * KIB}, {"8192", 1024 * KIB}};
    const char *path = test_path("half.safetensors");
    unsigned char *data = malloc(MIBS * 1024 * KIB);
    CHECK(data);
    support_random(data, MIBS * 1024 * KIB, 1);
    const support_tensor whole = {"t", "U8", "[8388608]", data, MIBS * 1024 * KIB};
    data_begins = support_checkpoint(path, NULL, &whole, 1, 0);
    data_begins = support_checkpoint(path, NULL, &whole, 1, 4096 - data_begins % 4096);
    CHECK_INT(0, data_begins % 4096);
    real = fst_os_calls;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fst_options options = support_options(FST_DEVICE_CPU);
        fst_tensor tensor;
        device_says = cases[i].device_says, has_read = 0, longest_advice = 0;
        memset(asked_ahead, 0, sizeof asked_ahead);
        options.threads = 1, options.slot_bytes = 512 * KIB;
        options.cache = FST_CACHE_KEEP;
        fst_os_calls.file_system = says_other;
        fst_os_calls.is_owner = says_owner;
        fst_os_calls.cachestat = every_second;
        fst_os_calls.advise = note_advice;
        fst_os_calls.pread = note_read;
        fst_os_calls.read_text = say_readahead;
        fst_model *model = load(support_list(path), &options);
        fst_os_calls = real;
        CHECK_INT(FST_OK, fst_model_at(model, 0, &tensor));
        CHECK_BYTES(data, tensor.data, MIBS * 1024 * KIB);
        /* All of what is missing, before the first byte is read, and once; nothing else. */
        for (unsigned m = 0; m < MIBS; m++) CHECK_INT(m % 2 ? 1024 * KIB : 0, asked_ahead[m]);
        CHECK_INT(cases[i].step, longest_advice);
        fst_model_free(model);
    }
    free(data);
}

/* ---- Ways of reading --------------------------------------------------------------------------------------- */

static size_t resident(const char *path) {
    static unsigned char pages[4096];
    int fd = open(path, O_RDONLY);
    off_t size = lseek(fd, 0, SEEK_END);
    size_t count = 0, all = ((size_t)size + 4095) / 4096;
    void *map = mmap(NULL, (size_t)size, PROT_NONE, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED && all <= sizeof pages);
    CHECK_INT(0, mincore(map, (size_t)size, pages));
    munmap(map, (size_t)size);
    close(fd);
    for (size_t i = 0; i < all; i++) count += pages[i] & 1;
    return count;
}

/* 0 where files cannot be driven out of memory. */
static int make_cold(const char *path) {
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_INT(0, fsync(fd));
    for (int i = 0; i < 100 && resident(path); i++) {
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        if (i) usleep(2000);
    }
    close(fd);
    return resident(path) == 0;
}

/* All of it is data of one tensor that is cast and one that is not: 5 MB. */
static const char *big_file(void) {
    sample_begin(4);
    sample_add(FST_F32, 600001);
    sample_add(FST_U8, 2600003);
    sample_write(test_path("big.safetensors"), 0, 2, 3);
    return test_path("big.safetensors");
}

TEST(pipeline, every_way_of_reading_gives_the_same_bytes_and_is_told) {
    for (int way = 0; way < 48; way++) {
        const char *path = big_file();
        fst_options options = support_options(way & 1 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        fst_stats stats = {.size = sizeof stats};
        char reader[512]; /* the model's text does not outlive it */
        options.reader = (fst_reader_kind)(way / 2 % 4);
        options.cache = (fst_cache)(way / 8 % 3);
        options.cast = way / 24 ? FST_BF16 : FST_NATIVE;
        int cold = make_cold(path);
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_model *model = load(support_list(path), &options);
        sample_check(model, options.cast);
        CHECK_INT(FST_OK, fst_model_stats(model, &stats));
        snprintf(reader, sizeof reader, "%s", stats.reader);
        fst_model_free(model);
        fake_gpu_end();
        CHECK_INT(600001 * 4 + 2600003, stats.bytes_cached + stats.bytes_buffered + stats.bytes_direct);
        CHECK(strstr(reader, "residency: ") != NULL);
        if (!cold) continue;
        CHECK(stats.bytes_buffered + stats.bytes_direct > 4000000);
        int direct = options.reader == FST_READER_DIRECT || options.cache == FST_CACHE_AVOID;
        if (direct && !strstr(reader, "without O_DIRECT")) {
            CHECK(stats.bytes_direct > 4000000);
            CHECK(strstr(reader, "O_DIRECT") != NULL);
            CHECK(resident(path) < 400); /* what the reading of the header brought in */
        }
        if (!direct) {
            CHECK_INT(0, stats.bytes_direct);
            CHECK(resident(path) > 1000);
        }
        CHECK_INT(options.reader == FST_READER_URING, strstr(reader, "io_uring") != NULL);
    }
}

TEST(pipeline, a_ring_that_is_refused_is_told_and_no_failure) {
    static const struct {
        fake_os_kind kind;
        int error;
        const char *told;
    } refusals[] = {{FAKE_OS_URING_OPEN, EPERM, "EPERM"},
                    {FAKE_OS_URING_OPEN, ENOSYS, "ENOSYS"},
                    {FAKE_OS_URING_OPEN, EINVAL, "EINVAL"},
                    {FAKE_OS_URING_BUFFERS, ENOMEM, "ENOMEM"},
                    {FAKE_OS_URING_BUFFERS, EOPNOTSUPP, "EOPNOTSUPP"},
                    {FAKE_OS_URING_FILES, EINVAL, ""},
                    {FAKE_OS_URING_FILE, EINVAL, ""},
                    {FAKE_OS_URING_READ, EAGAIN, ""}};
    for (int way = 0; way < 16; way++) {
        const char *path = big_file();
        fst_options options = support_options(way & 1 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        fst_stats stats = {.size = sizeof stats};
        char reader[512]; /* the model's text does not outlive it */
        options.reader = FST_READER_URING;
        options.cast = FST_BF16;
        int cold = make_cold(path);
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fake_os_begin(
            &(fake_os_options){.refuse = 1u << refusals[way / 2].kind, .refusal = refusals[way / 2].error});
        fst_model *model = load(support_list(path), &options);
        sample_check(model, FST_BF16);
        CHECK_INT(FST_OK, fst_model_stats(model, &stats));
        snprintf(reader, sizeof reader, "%s", stats.reader);
        fst_model_free(model);
        int asked = fake_os_calls_of(refusals[way / 2].kind);
        fake_os_end();
        fake_gpu_end();
        if (cold && asked) CHECK(strstr(reader, refusals[way / 2].told) != NULL);
        if (cold && refusals[way / 2].kind == FAKE_OS_URING_OPEN) CHECK(asked > 0);
    }
}

/* ---- By seed ------------------------------------------------------------------------------------------------- */

static uint64_t next_random(uint64_t *state) { /* xorshift64* */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Du >> 16;
}

static atomic_uint delays;
static ssize_t (*prompt_pread)(int fd, void *buffer, size_t size, uint64_t offset);

/* Reads that come when others, begun later, are done. */
static ssize_t delayed_pread(int fd, void *buffer, size_t size, uint64_t offset) {
    unsigned turn = atomic_fetch_add(&delays, 1);
    if (turn % 7 == 3) usleep(turn * 37 % 800);
    return prompt_pread(fd, buffer, size, offset);
}

typedef struct trial {
    const char *files[4];
    fst_options options;
    int streams, handles, short_reads, delayed, refuse_to_pin;
    fst_tuning tuning;
} trial;

static arena trial_arena;
static const fst_allocator trial_allocator = {arena_allocate, arena_release, &trial_arena};

static fst_dtype random_dtype(uint64_t *random, fst_dtype cast) {
    for (;;) {
        fst_dtype dtype = (fst_dtype)(1 + next_random(random) % (FST_DTYPE_COUNT - 1));
        if (!fst_dtype_is_castable(dtype) || fst_dtype_can_cast(dtype, cast)) return dtype;
    }
}

/* Mostly small, some large, some empty: of 4 elements each, so that bytes are filled. */
static uint64_t random_count(uint64_t *random) {
    uint64_t kind = next_random(random) % 10, most = kind < 6 ? 200 : kind < 9 ? 6000 : 40000;
    return next_random(random) % 12 == 0 ? 0 : next_random(random) % most * 4;
}

static void make_trial(uint64_t seed, trial *t) {
    static const fst_dtype casts[] = {FST_NATIVE, FST_BF16, FST_F16, FST_F32, FST_F8_E4M3};
    static char names[3][40];
    uint64_t random = seed * 0x9E3779B97F4A7C15u + 1;
    size_t files = 1 + next_random(&random) % 3, first = 0;
    *t = (trial){.options = support_options(next_random(&random) % 3 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU)};
    t->options.cast = casts[next_random(&random) % 5];
    t->options.threads = 1 + (unsigned)(next_random(&random) % 5);
    t->options.slot_bytes = (64 << 10) + next_random(&random) % 3 * 20000;
    t->options.reader = (fst_reader_kind)(next_random(&random) % 4);
    t->options.cache = (fst_cache)(next_random(&random) % 3);
    t->options.flags = next_random(&random) % 2 ? FST_AS_READY : 0;
    t->streams = next_random(&random) % 2 == 1;
    t->handles = next_random(&random) % 2 == 1;
    t->short_reads = next_random(&random) % 3 == 1;
    t->delayed = next_random(&random) % 3 == 1;
    t->refuse_to_pin = next_random(&random) % 8 == 1;
    if (next_random(&random) % 4) t->tuning.strip_bytes = (size_t)4096 << next_random(&random) % 5;
    if (next_random(&random) % 3 == 0) t->tuning.slots = 2 + (unsigned)(next_random(&random) % 4);
    if (next_random(&random) % 4 == 1) t->options.allocator = &trial_allocator;
    trial_arena = arena_for(t->options.device);
    if (next_random(&random) % 3) t->options.memory_bytes = (1 + next_random(&random) % 3) * 1300000;
    fst_block_bytes = ((uint64_t)4 << 10) << next_random(&random) % 10;
    sample_begin(seed);
    for (size_t i = 0; i < files; i++) {
        size_t count = next_random(&random) % (next_random(&random) % 4 ? 12 : 150);
        for (size_t k = 0; k < count; k++) {
            uint64_t elements = random_count(&random);
            sample_add(random_dtype(&random, t->options.cast), elements);
        }
        sprintf(names[i], "%zu.safetensors", i);
        t->files[i] = test_path(names[i]);
        sample_write(t->files[i], first, sample_count(), next_random(&random) % 9);
        first = sample_count();
        if (next_random(&random) % 3 == 0) make_cold(t->files[i]);
    }
}

/* One load, or one stream. What comes must be right. */
static fst_status act(const trial *t, size_t *count, fst_error *error) {
    DLManagedTensorVersioned *handles[4] = {NULL};
    fst_status status;
    fst_stream *stream;
    fst_model *model;
    *count = 0;
    if (!t->streams) {
        status = fst_load(t->files, &t->options, &model, error);
        if (!status) sample_check(model, t->options.cast);
        *count = fst_model_count(model);
        fst_model_free(model);
        return status;
    }
    status = fst_stream_open(t->files, &t->options, &stream, error);
    while (!status) {
        fst_tensor tensor;
        size_t turn = *count % 4;
        if (handles[turn]) handles[turn]->deleter(handles[turn]);
        handles[turn] = NULL;
        if (t->delayed && *count % 16 == 5) usleep(500);
        status = fst_stream_next(stream, &tensor, t->handles ? &handles[turn] : NULL, error);
        if (status == FST_E_AGAIN) { /* with four tensors held it can be */
            for (int i = 0; i < 4; i++, status = FST_OK) {
                if (handles[i]) handles[i]->deleter(handles[i]);
                handles[i] = NULL;
            }
            status = fst_stream_next(stream, &tensor, NULL, error);
        } else if (status == FST_E_DLPACK) {
            status = fst_stream_next(stream, &tensor, NULL, error);
        }
        if (!status && !tensor.name) break;
        if (!status) CHECK_STR(NULL, sample_compare(&tensor, t->options.cast));
        *count += !status;
    }
    for (int i = 0; i < 4; i++)
        if (handles[i]) handles[i]->deleter(handles[i]);
    fst_stream_close(stream);
    return status;
}

static void begin_trial(const trial *t, uint64_t seed, int fail_call, fake_os_kind kind, int fail_at) {
    fake_gpu_begin(
        &(fake_gpu_options){.seed = seed, .fail_at = fail_call, .refuse_to_pin = t->refuse_to_pin});
    fake_os_begin(
        &(fake_os_options){.short_reads = t->short_reads, .fail_at = fail_at, .kind = kind, .error = EIO});
    prompt_pread = fst_os_calls.pread;
    fst_pipeline_tuning = t->tuning;
    if (t->delayed) fst_os_calls.pread = delayed_pread;
}

static void end_trial(void) {
    fst_pipeline_tuning = (fst_tuning){0};
    fake_os_end();
    fake_gpu_end();
    CHECK_INT(0, atomic_load(&trial_arena.live));
    CHECK(!trial_arena.wrong);
}

TEST(pipeline, whatever_is_loaded_in_whatever_way_is_right) {
    uint64_t usual = fst_block_bytes;
    const uint64_t seeds = getenv("FST_TEST_SEEDS") ? strtoull(getenv("FST_TEST_SEEDS"), NULL, 10) : 300;
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        size_t count;
        fst_error error;
        trial t;
        make_trial(seed, &t);
        begin_trial(&t, seed, 0, FAKE_OS_NEEDED, 0);
        fst_status status = act(&t, &count, &error);
        end_trial();
        if (status) test_fail(__FILE__, __LINE__, "seed %llu: %s", (unsigned long long)seed, error.text);
        CHECK_INT(sample_count(), count);
    }
    fst_block_bytes = usual;
}

/* One call fails: there is one status and nothing is left, and the next load, in the same threads and rings, is right. */
TEST(pipeline, whatever_fails_in_whatever_load_leaves_nothing) {
    static const fake_os_kind kinds[] = {FAKE_OS_NEEDED,     FAKE_OS_PREAD_DIRECT, FAKE_OS_URING_WAIT,
                                         FAKE_OS_URING_READ, FAKE_OS_URING_RESULT, FAKE_OS_OPEN_DIRECT};
    uint64_t usual = fst_block_bytes;
    unsigned descriptors = support_open_descriptors(), failures = 0;
    for (uint64_t seed = 1; seed <= 120; seed++) {
        uint64_t random = seed * 77777;
        fake_os_kind kind = kinds[next_random(&random) % 3 ? 0 : next_random(&random) % 6];
        size_t count;
        fst_error error = {.status = FST_OK};
        trial t;
        make_trial(seed, &t);
        begin_trial(&t, seed, 0, kind, 0);
        CHECK_INT(FST_OK, act(&t, &count, &error));
        int device_calls = fake_gpu_calls(), calls = fake_os_calls_of(kind);
        end_trial();
        int fail_call = 0, fail_at = 0;
        if (t.options.device != FST_DEVICE_CPU && next_random(&random) % 2)
            fail_call = 1 + (int)(next_random(&random) % (uint64_t)device_calls);
        else if (calls) fail_at = 1 + (int)(next_random(&random) % (uint64_t)calls);
        begin_trial(&t, seed, fail_call, kind, fail_at);
        fst_status status = act(&t, &count, &error);
        if (status) {
            failures++;
            CHECK_INT(status, error.status);
            CHECK(fail_call ? status == FST_E_DEVICE || status == FST_E_DEVICE_MEMORY
                            : status == FST_E_IO || status == FST_E_MEMORY);
            CHECK(error.text[0] && !strchr(error.text, '\n'));
        } else CHECK_INT(sample_count(), count);
        int reached = fail_call ? fake_gpu_calls() >= fail_call : fake_os_calls_of(kind) >= fail_at;
        if (reached && act(&t, &count, &error))
            test_fail(__FILE__, __LINE__, "the next load: %s", error.text);
        if (reached) CHECK_INT(sample_count(), count);
        end_trial();
        CHECK_INT(descriptors, support_open_descriptors());
    }
    CHECK(failures > 50);
    fst_block_bytes = usual;
}

/* ---- Cancel ---------------------------------------------------------------------------------------------------- */

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SOON 0.3
#else
#define SOON 0.1
#endif

/* 2 GB in eight tensors, none of it on the disk. */
static const char *sparse_file(void) {
    const char *path = test_path("sparse.safetensors");
    char bytes[2048];
    size_t at = 8;
    uint64_t each = 256 * MIB;
    for (uint64_t i = 0; i < 8; i++)
        at += (size_t)sprintf(bytes + at,
                              "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[%llu],\"data_offsets\":[%llu,%llu]}",
                              i ? "," : "{", (int)i, (unsigned long long)each, (unsigned long long)(i * each),
                              (unsigned long long)((i + 1) * each));
    bytes[at++] = '}';
    for (int i = 0; i < 8; i++) bytes[i] = (char)((at - 8) >> (8 * i));
    support_write(path, bytes, at);
    CHECK_INT(0, truncate(path, (off_t)(at + 8 * each)));
    return path;
}

static struct {
    volatile int flag;
    unsigned after; /* microseconds */
    double set;
} canceller;

static void *cancel_later(void *arg) {
    usleep(canceller.after);
    canceller.set = fst_os_now();
    __atomic_store_n(&canceller.flag, 1, __ATOMIC_RELAXED);
    return arg;
}

static int by_seconds(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void cancel_from_another_thread(int device, fst_reader_kind reader) {
    enum { TIMES = 5 };
    const char *path = sparse_file();
    double took[TIMES];
    unsigned descriptors = support_open_descriptors();
    for (int i = 0; i < TIMES; i++) {
        fst_options options = support_options(device);
        pthread_t thread;
        fst_model *model;
        fst_error error;
        options.slot_bytes = 4 << 20;
        options.reader = reader;
        options.cancel = &canceller.flag;
        canceller.flag = 0;
        canceller.after = 20000 + 8000 * (unsigned)i;
        fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)i});
        fake_os_begin(&(fake_os_options){0});
        CHECK_INT(0, pthread_create(&thread, NULL, cancel_later, NULL));
        fst_status status = fst_load(support_list(path), &options, &model, &error);
        double now = fst_os_now();
        pthread_join(thread, NULL);
        CHECK_INT(FST_E_CANCELLED, status);
        CHECK(model == NULL);
        took[i] = now - canceller.set;
        fake_os_end();
        fake_gpu_end();
        CHECK_INT(descriptors, support_open_descriptors());
    }
    qsort(took, TIMES, sizeof *took, by_seconds);
    if (took[1] > SOON) /* the second best: others may be busy on this machine */
        test_fail(__FILE__, __LINE__, "it took %.3f s from the flag to the return", took[1]);
}

TEST(pipeline, a_load_of_gigabytes_is_cancelled_at_once) {
    cancel_from_another_thread(FST_DEVICE_CPU, FST_READER_AUTO);
    cancel_from_another_thread(FST_DEVICE_CPU, FST_READER_URING);
    cancel_from_another_thread(FST_DEVICE_GPU(0), FST_READER_AUTO);
    cancel_from_another_thread(FST_DEVICE_GPU(0), FST_READER_DIRECT);
}
