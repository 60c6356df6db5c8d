/* Memory that runs out: each allocation of the library fails in turn. The linker sends its calls of the allocator
 * here (CMakeLists.txt), and those of this program's other files, but not support.c's: what the fakes hold is no
 * business of these cases. yyjson, a library of its own, is handed an allocator that comes here too. */
#include <dirent.h>
#include <dlpack/dlpack.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yyjson.h>

#include "harness.h"
#include "loading.h"
#include "model.h"
#include "peers.h"
#include "status.h"
#include "support.h"

/* ---- The allocator --------------------------------------------------------------------------- */

static atomic_int fail_at; /* the so-manieth call that can fail does, from 1; 0: none */
static atomic_int calls;   /* since fail_at was set */
static atomic_long live;   /* allocations that were not freed, of all that came by here */

static int must_fail(void) {
    int at = atomic_load(&fail_at);
    return at && atomic_fetch_add(&calls, 1) + 1 == at;
}

static void *counted(void *memory) {
    if (memory) atomic_fetch_add(&live, 1);
    return memory;
}

static void *no_memory(void) {
    errno = ENOMEM;
    return NULL;
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);
void __real_free(void *memory);
char *__real_strdup(const char *text);
char *__real_strndup(const char *text, size_t length);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                          void *arg);
yyjson_doc *__real_yyjson_read_opts(char *json, size_t length, yyjson_read_flag flags,
                                    const yyjson_alc *allocator, yyjson_read_err *error);

void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t size);
void __wrap_free(void *memory);
char *__wrap_strdup(const char *text);
char *__wrap_strndup(const char *text, size_t length);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                          void *arg);
yyjson_doc *__wrap_yyjson_read_opts(char *json, size_t length, yyjson_read_flag flags,
                                    const yyjson_alc *allocator, yyjson_read_err *error);

void *__wrap_malloc(size_t size) { return must_fail() ? no_memory() : counted(__real_malloc(size)); }

void *__wrap_calloc(size_t count, size_t size) {
    return must_fail() ? no_memory() : counted(__real_calloc(count, size));
}

void *__wrap_realloc(void *memory, size_t size) {
    if (must_fail()) return no_memory();
    void *larger = __real_realloc(memory, size);
    return memory ? larger : counted(larger);
}

void __wrap_free(void *memory) {
    if (memory) atomic_fetch_sub(&live, 1);
    __real_free(memory);
}

char *__wrap_strdup(const char *text) { return must_fail() ? no_memory() : counted(__real_strdup(text)); }

char *__wrap_strndup(const char *text, size_t length) {
    return must_fail() ? no_memory() : counted(__real_strndup(text, length));
}

static void *json_malloc(void *context, size_t size) {
    (void)context;
    return __wrap_malloc(size);
}

static void *json_realloc(void *context, void *memory, size_t old_size, size_t size) {
    (void)context, (void)old_size;
    return __wrap_realloc(memory, size);
}

static void json_free(void *context, void *memory) {
    (void)context;
    __wrap_free(memory);
}

yyjson_doc *__wrap_yyjson_read_opts(char *json, size_t length, yyjson_read_flag flags,
                                    const yyjson_alc *allocator, yyjson_read_err *error) {
    static const yyjson_alc ours = {json_malloc, json_realloc, json_free, NULL};
    return __real_yyjson_read_opts(json, length, flags, allocator ? allocator : &ours, error);
}

static atomic_int thread_refused;

/* A thread needs memory too. What of it the system allocates is its own business: the whole call fails. */
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                          void *arg) {
    if (!must_fail()) return __real_pthread_create(thread, attributes, run, arg);
    atomic_store(&thread_refused, 1);
    return EAGAIN;
}

/* ---- One call, over and over ----------------------------------------------------------------- */

/* What a case does. `act` checks and frees what it gets, and that it gets nothing when it fails. */
typedef struct scene {
    fst_status (*act)(const struct scene *s, fst_error *error);
    const char *files[2];
    int device;
    fst_reader_kind reader;
    int keeps_engine; /* the act leaves it to the next */
    fst_model *model;
} scene;

/* What a system call, or what stands behind seam 1, could not get memory for is an ENOMEM of that call. */
static void check_error(fst_status status, const fst_error *error) {
    CHECK(status == FST_E_MEMORY || (status == FST_E_IO && error->code == ENOMEM));
    CHECK_INT(status, error->status);
    CHECK_INT(status, fst_last_error()->status);
    CHECK(strstr(error->text, "memory") || strstr(error->text, "thread"));
}

/* Acts with the first allocation failing, then the second, and so on, until an act needs no more. Returns how many
 * failed. Each failure must give back all that it took: what is held is counted before and after. */
static int fail_each(const scene *s) {
    unsigned descriptors = support_open_descriptors(), threads = support_threads();
    long held = atomic_load(&live);
    int blocks = fake_gpu_blocks();
    for (int at = 1;; at++) {
        fst_error error = {.status = FST_OK};
        atomic_store(&calls, 0);
        atomic_store(&thread_refused, 0);
        atomic_store(&fail_at, at);
        fst_status status = s->act(s, &error);
        atomic_store(&fail_at, 0);
        int reached = atomic_load(&calls) >= at;
        /* Files are also opened by fewer threads. */
        if (reached && !(status == FST_OK && atomic_load(&thread_refused))) check_error(status, &error);
        else CHECK_INT(FST_OK, status);
        CHECK_INT(blocks, fake_gpu_blocks());
        CHECK_INT(held, atomic_load(&live));
        CHECK_INT(descriptors, support_open_descriptors());
        CHECK_INT(threads, support_threads());
        if (!reached) return at - 1;
    }
}

/* ---- Loads ----------------------------------------------------------------------------------- */

enum { LARGE = 40000, MANY = 150, BLOCKS = 4 };

/* Enough tensors, names and metadata that every list grows: two files with an index. */
static void write_files(void) {
    static float large[LARGE];
    static char names[MANY][16], metadata[8000];
    support_tensor tensors[MANY + 1];
    for (size_t i = 0; i < LARGE; i++) large[i] = (float)(i % 256);
    for (int i = 0; i < MANY; i++) {
        sprintf(names[i], "small.%d", i);
        tensors[i] = (support_tensor){names[i], "U8", "[6]", names[i], 6};
    }
    tensors[MANY] = (support_tensor){"large", "F32", "[40000]", large, sizeof large};
    snprintf(metadata, sizeof metadata, "{\"format\":\"pt\",\"notes\":\"%07000d\"}", 0);
    support_checkpoint(test_path("1.safetensors"), metadata, tensors, MANY + 1, 0);
    tensors[MANY].name = "other";
    support_checkpoint(test_path("2.safetensors"), "{\"format\":\"pt\"}", &tensors[MANY], 1, 3);

    char *index = malloc(MANY * 64 + 256), *end = index;
    CHECK(index);
    end += sprintf(end, "{\"weight_map\":{\"large\":\"1.safetensors\",\"other\":\"2.safetensors\"");
    for (int i = 0; i < MANY; i++) end += sprintf(end, ",\"small.%d\":\"1.safetensors\"", i);
    end += sprintf(end, "}}");
    support_write(test_path("model.safetensors.index.json"), index, (size_t)(end - index));
    free(index);
}

static void check_cast(const fst_model *model, const char *name) {
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_find(model, name, &tensor));
    CHECK_INT(LARGE * 2, tensor.nbytes);
    const uint16_t *codes = tensor.data;
    for (int i = 0; i < LARGE; i++) { /* BF16 has all of 0 to 255 */
        float value = (float)(i % 256);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        CHECK_INT(bits >> 16, codes[i]);
    }
}

static fst_options options_of(const scene *s) {
    fst_options options = FST_OPTIONS_INIT;
    options.cast = FST_BF16;
    options.device = s->device;
    options.reader = s->reader;
    options.threads = 3;
    options.slot_bytes = 64 << 10;
    return options;
}

static fst_status load(const scene *s, fst_error *error) {
    fst_options options = options_of(s);
    fst_model *model = (fst_model *)(uintptr_t)1;
    fst_status status = fst_load(s->files, &options, &model, error);
    if (status) {
        CHECK(model == NULL);
    } else {
        CHECK_INT(MANY + 2, fst_model_count(model));
        check_cast(model, "large");
        check_cast(model, "other");
    }
    fst_model_free(model);
    if (!s->keeps_engine) fst_release_cached();
    return status;
}

/* Each tensor by DLPack, given back at once. */
static fst_status stream(const scene *s, fst_error *error) {
    fst_options options = options_of(s);
    fst_stream *from = (fst_stream *)(uintptr_t)1;
    fst_status status = fst_stream_open(s->files, &options, &from, error);
    if (status) CHECK(from == NULL);
    for (int count = 0; !status; count++) {
        DLManagedTensorVersioned *exported = NULL;
        fst_tensor tensor;
        status = fst_stream_next(from, &tensor, &exported, error);
        if (status) {
            CHECK(exported == NULL);
        } else if (!tensor.name) {
            CHECK_INT(MANY + 2, count);
            break;
        } else {
            exported->deleter(exported);
        }
    }
    fst_stream_close(from);
    if (!s->keeps_engine) fst_release_cached();
    return status;
}

static fst_status open_headers(const scene *s, fst_error *error) {
    fst_model *model = (fst_model *)(uintptr_t)1;
    fst_status status = fst_open(s->files, NULL, &model, error);
    if (status) CHECK(model == NULL);
    else CHECK_INT(MANY + 2, fst_model_count(model));
    fst_model_free(model);
    return status;
}

static scene prepare(fst_status (*act)(const scene *, fst_error *), int device) {
    write_files();
    fst_release_cached();
    return (scene){.act = act, .files = {test_path("model.safetensors.index.json"), NULL}, .device = device};
}

/* Small blocks: there are several, and most are allocated while the threads already read. */
static void fail_acts(scene s, int least) {
    uint64_t usual = fst_block_bytes;
    fst_error error;
    fst_block_bytes = 64 << 10;
    CHECK_INT(FST_OK, s.act(&s, &error));
    int failed = fail_each(&s);
    fst_block_bytes = usual;
    CHECK(failed >= least);
    fst_release_cached();
}

TEST(memory, of_a_load_on_the_cpu) { fail_acts(prepare(load, FST_DEVICE_CPU), 50); }

TEST(memory, of_a_load_on_a_gpu) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fail_acts(prepare(load, FST_DEVICE_GPU(0)), 50);
    fake_gpu_end();
}

/* Of a state that is read before planning, too. */
static fst_status load_quantized(const scene *s, fst_error *error) {
    fst_options options = options_of(s);
    fst_model *model = (fst_model *)(uintptr_t)1;
    fst_status status = fst_load(s->files, &options, &model, error);
    if (status) CHECK(model == NULL);
    else CHECK_INT(1, fst_model_count(model));
    fst_model_free(model);
    fst_release_cached();
    return status;
}

TEST(memory, of_a_quantized_load) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        scene s = prepare(load_quantized, device);
        s.files[0] = FST_TEST_DATA "/bnb-nf4-nested/model.safetensors";
        fail_acts(s, 20);
    }
    fake_gpu_end();
}

static int name_part(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    (void)arg, (void)tensor;
    rule->into = "qkv";
    return 0;
}

/* As far as the plan: what comes of a part is another matter. */
static fst_status choose(const scene *s, fst_error *error) {
    static const fst_shard_rule rules[] = {
        {"*.weight", FST_ONLY, 0}, {"*.other.*", FST_SKIP, 0}, {"x.*", 0, 8}, {NULL, 0, 0}};
    fst_loading l = {.error = error};
    fst_options options = options_of(s);
    options.shards = rules;
    options.rule = name_part;
    fst_status status = fst_loading_begin(&l, s->files, &options);
    if (!status) status = fst_loading_open(&l, s->files);
    if (!status) CHECK_INT(2, l.model->count);
    if (!status) CHECK_STR("qkv", l.choices[1].into);
    if (status) fst_set_last_error(error);
    fst_loading_end(&l);
    fst_model_free(l.model);
    return status;
}

TEST(memory, of_shard_rules) {
    static unsigned char codes[16], scale[4];
    const support_tensor tensors[] = {{"other", "U8", "[16]", codes, 16},
                                      {"x.weight", "F8_E4M3", "[4,4]", codes, 16},
                                      {"x.weight_scale_inv", "F32", "[1,1]", scale, 4}};
    support_checkpoint(test_path("1.safetensors"), NULL, tensors, 3, 0);
    scene s = {.act = choose, .files = {test_path("1.safetensors"), NULL}, .device = FST_DEVICE_CPU};
    fail_acts(s, 15);
}

TEST(memory, of_a_load_that_finds_an_engine) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 2});
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        scene s = prepare(load, device);
        s.keeps_engine = 1;
        fail_acts(s, 45);
    }
    fake_gpu_end();
}

TEST(memory, of_a_load_by_every_reader) {
    for (fst_reader_kind reader = FST_READER_THREADS; reader <= FST_READER_URING; reader++) {
        scene s = prepare(load, FST_DEVICE_CPU);
        s.reader = reader;
        fail_acts(s, 50);
    }
}

/* Weights that wait for their scales, so many that all lists grow. */
static const char *write_weights(void) {
    static double values[6] = {1, 2, 3, 4, 5, 448};
    static char names[MANY][16];
    support_tensor tensors[MANY];
    for (int i = 0; i < MANY; i++) {
        sprintf(names[i], "%d.weight", i);
        tensors[i] = (support_tensor){names[i], "F64", "[2,3]", values, sizeof values};
    }
    support_checkpoint(test_path("weights.safetensors"), NULL, tensors, MANY, 0);
    return test_path("weights.safetensors");
}

static fst_status load_scaled(const scene *s, fst_error *error) {
    fst_options options = options_of(s);
    fst_model *model = (fst_model *)(uintptr_t)1;
    fst_tensor tensor;
    options.cast = FST_F8_E4M3;
    options.scale = FST_QUANTIZE_TENSOR;
    fst_status status = fst_load(s->files, &options, &model, error);
    if (status) {
        CHECK(model == NULL);
    } else {
        CHECK_INT(2 * MANY, fst_model_count(model));
        CHECK_INT(FST_OK, fst_model_find(model, "149.weight_scale", &tensor));
        CHECK(*(float *)tensor.data == 1);
    }
    fst_model_free(model);
    if (!s->keeps_engine) fst_release_cached();
    return status;
}

TEST(memory, of_a_load_that_computes_scales) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        scene s = prepare(load_scaled, device);
        s.files[0] = write_weights();
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fail_acts(s, 50);
        fake_gpu_end();
    }
}

TEST(memory, of_a_stream) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 5});
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++)
        fail_acts(prepare(stream, device), 50);
    fake_gpu_end();
}

TEST(memory, of_opening_an_index) {
    scene s = prepare(open_headers, 0);
    CHECK(fail_each(&s) >= 35);
}

TEST(memory, of_opening_a_directory) {
    scene s = prepare(open_headers, 0);
    s.files[0] = test_directory();
    CHECK(fail_each(&s) >= 35);
    CHECK_INT(0, unlink(test_path("model.safetensors.index.json")));
    CHECK(fail_each(&s) >= 15);
}

/* ---- What is done with a model --------------------------------------------------------------- */

static fst_model *load_model(int device) {
    scene s = prepare(NULL, device);
    fst_options options = FST_OPTIONS_INIT;
    options.device = device;
    fst_model *model;
    CHECK_INT(FST_OK, fst_load(s.files, &options, &model, NULL));
    return model;
}

static fst_status export_first(const scene *s, fst_error *error) {
    DLManagedTensorVersioned *tensor = (DLManagedTensorVersioned *)(uintptr_t)1;
    fst_status status = fst_model_dlpack(s->model, 0, &tensor);
    *error = *fst_last_error();
    if (status) CHECK(tensor == NULL);
    else tensor->deleter(tensor);
    return status;
}

TEST(memory, of_an_export_to_dlpack) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 3});
    scene s = {.act = export_first, .model = load_model(FST_DEVICE_GPU(0))};
    CHECK_INT(1, fail_each(&s));
    fst_model_free(s.model);
    fake_gpu_end(); /* no block is held */
}

static int count_entries(void) {
    DIR *directory = opendir(test_directory());
    int count = 0;
    CHECK(directory);
    while (readdir(directory)) count++;
    closedir(directory);
    return count;
}

/* The file is the new one or the old one, and nothing lies beside it. */
static fst_status save(const scene *s, fst_error *error) {
    const char *path = s->files[0];
    fst_model *saved;
    support_write(path, "old", 3);
    int before = count_entries();
    fst_status status = fst_save(s->model, path, NULL, error);
    CHECK_INT(before, count_entries());
    struct stat st;
    CHECK_INT(0, stat(path, &st));
    if (status && st.st_size == 3) return status;
    atomic_store(&fail_at, 0);
    CHECK_INT(FST_OK, fst_open(s->files, NULL, &saved, NULL));
    CHECK_INT(MANY + 2, fst_model_count(saved));
    fst_model_free(saved);
    return status;
}

static void fail_saves(int device) {
    scene s = {.act = save, .files = {test_path("out.safetensors"), NULL}, .model = load_model(device)};
    CHECK(fail_each(&s) >= 3);
    fst_model_free(s.model);
}

TEST(memory, of_a_save_from_the_cpu) { fail_saves(FST_DEVICE_CPU); }

TEST(memory, of_a_save_from_a_gpu) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 4});
    fail_saves(FST_DEVICE_GPU(0));
    fake_gpu_end();
}

/* ---- Conversions of directories ------------------------------------------------------------------ */

static void remove_output(const char *path) {
    char **names, inner[2048];
    if (fst_os_calls.list(path, &names)) return;
    for (char **name = names; *name; name++) {
        CHECK(snprintf(inner, sizeof inner, "%s/%s", path, *name) < (int)sizeof inner);
        remove_output(inner);
        unlink(inner);
    }
    free(names);
    rmdir(path);
}

static int quick_fsync(int fd) {
    (void)fd;
    return 0;
}

/* Into an empty place: config.json, which comes last, is there or not. */
static fst_status convert(const scene *s, fst_error *error) {
    fst_options options = options_of(s);
    fst_convert_stats stats = {.size = sizeof stats};
    fst_convert_options more = {sizeof more, 100000};
    int armed = atomic_exchange(&fail_at, 0);
    remove_output(test_path("out"));
    atomic_store(&fail_at, armed);
    fst_status status = fst_convert_directory(s->files[0], s->files[1], &options, &more, &stats, error);
    fst_release_cached();
    atomic_store(&fail_at, 0);
    CHECK_INT(status == FST_OK, access(test_path("out/config.json"), F_OK) == 0);
    if (!status) CHECK_INT(MANY + 2, stats.tensors);
    return status;
}

static void fail_conversions(int device) {
    static const char config[] = "{\"text_config\":{\"dtype\":\"float32\"}}";
    fst_release_cached(); /* of others */
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    write_files();
    CHECK_INT(0, rename(test_path("1.safetensors"), test_path("in/1.safetensors")));
    CHECK_INT(0, rename(test_path("2.safetensors"), test_path("in/2.safetensors")));
    support_write(test_path("in/config.json"), config, strlen(config));
    support_write(test_path("in/other.json"), "{}", 2);
    fst_os before = fst_os_calls;
    fst_os_calls.fsync = quick_fsync;
    scene s = {.act = convert, .files = {test_path("in"), test_path("out")}, .device = device};
    test_path("out/config.json"); /* the harness keeps the path */
    int failed = fail_each(&s);
    fst_os_calls = before;
    CHECK(failed > 80);
}

TEST(memory, of_a_conversion_on_the_cpu) { fail_conversions(FST_DEVICE_CPU); }

TEST(memory, of_a_conversion_on_a_gpu) {
    fake_gpu_begin(&(fake_gpu_options){.seed = 6});
    fail_conversions(FST_DEVICE_GPU(0));
    fake_gpu_end();
}

/* ---- Ranks that share the reading ---------------------------------------------------------------- */

static fst_status alone_open(void *comm, const fst_gpu *gpu, fst_comm_use **out, unsigned *rank,
                             unsigned *ranks, char *why, size_t size) {
    (void)gpu, (void)why, (void)size;
    *out = comm;
    *rank = 0, *ranks = 1;
    return FST_OK;
}
static int alone_gather(fst_comm_use *use, void *memory, size_t nbytes, fst_queue stream,
                        fst_comm_request *request) {
    (void)use, (void)memory, (void)nbytes, (void)stream, (void)request;
    return 0;
}
static int alone_test(fst_comm_use *use, fst_comm_request *request, int *done) {
    (void)use, (void)request;
    *done = 1;
    return 0;
}
static int alone_on_device(fst_comm_use *use, fst_comm_request *request, int *done) {
    (void)use, (void)request, (void)done;
    return 0;
}
static void alone_leave(fst_comm_use *use, int lost) { (void)use, (void)lost; }
static void alone_close(fst_comm_use *use) { (void)use; }

/* One rank opens, agrees with itself, and goes. */
static fst_status meet(const scene *s, fst_error *error) {
    char reason[256];
    fst_peers *peers = (fst_peers *)(uintptr_t)1;
    fst_peers_options options = {.kind = FST_COMM_MPI, .comm = &reason};
    CHECK_INT(FST_OK, fst_gpu_find(s->device, &options.gpu, reason, sizeof reason, error));
    fst_status status = fst_peers_open(&options, &peers, error);
    if (status) CHECK(peers == NULL);
    else status = fst_peers_agree(peers, FST_OK, NULL, 0, error);
    fst_peers_close(peers);
    if (status) fst_set_last_error(error);
    return status;
}

TEST(memory, of_ranks_that_meet) {
    fst_comm_calls alone = {.name = "ALONE",
                            .open = alone_open,
                            .gather = alone_gather,
                            .test = alone_test,
                            .leave = alone_leave,
                            .close = alone_close};
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fst_peers_set_fake(&alone);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        scene s = {.act = meet, .device = device};
        alone.on_device = device != FST_DEVICE_CPU;
        alone.test = alone.on_device ? alone_on_device : alone_test;
        CHECK(fail_each(&s) >= (alone.on_device ? 3 : 2));
    }
    fst_peers_set_fake(NULL);
    fake_gpu_end();
}
