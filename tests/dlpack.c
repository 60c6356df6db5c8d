/* DLPack export: what the managed tensor says, and who frees what. docs/dlpack.md, dlpack.h. */
#include "harness.h"

#include <dlpack/dlpack.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "model.h"

/* ---- A device that counts, and a model of one tensor made by hand ------------------------------ */

static atomic_int blocks_live, blocks_freed;

static int count_alloc(const fst_gpu *gpu, uint64_t size, void **out) {
    (void)gpu;
    *out = aligned_alloc(256, (size + 255) / 256 * 256 + 256);
    if (!*out) return FST_GPU_OUT_OF_MEMORY;
    atomic_fetch_add(&blocks_live, 1);
    return 0;
}

static void count_free(const fst_gpu *gpu, void *block, uint64_t size) {
    (void)gpu;
    (void)size;
    atomic_fetch_sub(&blocks_live, 1);
    atomic_fetch_add(&blocks_freed, 1);
    free(block);
}

/* The CPU device with the two calls above. Static: results may outlive a case. */
static const fst_gpu *counting_device(int dlpack_type, int index) {
    static fst_gpu_calls calls;
    static fst_gpu gpu;
    gpu = *fst_gpu_cpu();
    calls = *gpu.calls;
    calls.alloc_block = count_alloc;
    calls.free_block = count_free;
    gpu.calls = &calls;
    gpu.dlpack_type = dlpack_type;
    gpu.index = index;
    atomic_store(&blocks_live, 0);
    atomic_store(&blocks_freed, 0);
    return &gpu;
}

static fst_block *new_block(const fst_gpu *gpu, uint64_t nbytes) {
    fst_block *block = malloc(sizeof *block);
    CHECK(block);
    void *data = NULL;
    CHECK_INT(0, gpu->calls->alloc_block(gpu, nbytes, &data));
    *block = (fst_block){.gpu = gpu, .data = data, .nbytes = nbytes};
    atomic_init(&block->references, 1);
    return block;
}

typedef struct {
    fst_model model;
    fst_entry entry;
    fst_model_tensor tensor;
    char *files[2];
} one_tensor;

/* `block` NULL: as fst_open leaves it. */
static fst_model *hand_built(one_tensor *it, const fst_gpu *gpu, fst_block *block, fst_dtype dtype,
                             size_t ndim, const uint64_t *shape) {
    static char path[] = "dir/a.safetensors";
    uint64_t bits = fst_dtype_bits(dtype);
    for (size_t d = 0; d < ndim; d++) bits *= shape[d];
    *it = (one_tensor){.files = {path, NULL}};
    it->entry = (fst_entry){.name = "w",
                            .name_length = 1,
                            .ndim = (uint32_t)ndim,
                            .shape = shape,
                            .dtype = dtype,
                            .end = bits / 8};
    it->tensor = (fst_model_tensor){.entry = &it->entry, .dtype = dtype, .block = block, .data = block ? block->data : NULL, .nbytes = bits / 8};
    it->model.paths.count = 1;
    it->model.paths.files = it->files;
    it->model.count = 1;
    it->model.tensors = &it->tensor;
    it->model.gpu = gpu;
    return &it->model;
}

/* Exports a tensor of `nbytes` bytes at most, whose model lets go of it at once. */
static fst_status export_one(fst_dtype dtype, size_t ndim, const uint64_t *shape, uint64_t nbytes,
                             DLManagedTensorVersioned **out) {
    const fst_gpu *gpu = counting_device(kDLCPU, 0);
    fst_block *block = new_block(gpu, nbytes);
    one_tensor it;
    fst_status status = fst_model_dlpack(hand_built(&it, gpu, block, dtype, ndim, shape), 0, out);
    fst_block_drop(block);
    CHECK_INT(status ? 0 : 1, atomic_load(&blocks_live));
    return status;
}

#define SHAPE(...) \
    sizeof((const uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t), (const uint64_t[]) { __VA_ARGS__ }

static void check_extents(const DLTensor *tensor, int32_t ndim, const int64_t *shape,
                          const int64_t *strides) {
    CHECK_INT(ndim, tensor->ndim);
    CHECK(tensor->shape && tensor->strides);
    for (int32_t d = 0; d < ndim; d++) {
        CHECK_INT(shape[d], tensor->shape[d]);
        CHECK_INT(strides[d], tensor->strides[d]);
    }
}

static void delete_and_count(DLManagedTensorVersioned *managed) {
    managed->deleter(managed);
    CHECK_INT(0, atomic_load(&blocks_live));
    CHECK_INT(1, atomic_load(&blocks_freed));
}

/* ---- What the tensor says ---------------------------------------------------------------------- */

/* dlpack.h's own names, and the widths that it and PyTorch ask for. */
static const struct {
    fst_dtype dtype;
    uint8_t code, bits;
    uint16_t lanes;
} expected_types[] = {
    {FST_BOOL, kDLBool, 8, 1},
    {FST_F4, kDLFloat4_e2m1fn, 4, 2},
    {FST_F6_E2M3, kDLFloat6_e2m3fn, 6, 1},
    {FST_F6_E3M2, kDLFloat6_e3m2fn, 6, 1},
    {FST_U8, kDLUInt, 8, 1},
    {FST_I8, kDLInt, 8, 1},
    {FST_F8_E5M2, kDLFloat8_e5m2, 8, 1},
    {FST_F8_E4M3, kDLFloat8_e4m3fn, 8, 1},
    {FST_F8_E8M0, kDLFloat8_e8m0fnu, 8, 1},
    {FST_F8_E4M3FNUZ, kDLFloat8_e4m3fnuz, 8, 1},
    {FST_F8_E5M2FNUZ, kDLFloat8_e5m2fnuz, 8, 1},
    {FST_I16, kDLInt, 16, 1},
    {FST_U16, kDLUInt, 16, 1},
    {FST_F16, kDLFloat, 16, 1},
    {FST_BF16, kDLBfloat, 16, 1},
    {FST_I32, kDLInt, 32, 1},
    {FST_U32, kDLUInt, 32, 1},
    {FST_F32, kDLFloat, 32, 1},
    {FST_C64, kDLComplex, 64, 1},
    {FST_F64, kDLFloat, 64, 1},
    {FST_I64, kDLInt, 64, 1},
    {FST_U64, kDLUInt, 64, 1},
};
#define EXPECTED_TYPES (sizeof expected_types / sizeof expected_types[0])

TEST(dlpack, code_bits_and_lanes_of_every_dtype) {
    CHECK_INT(FST_DTYPE_COUNT - 1, EXPECTED_TYPES);
    for (size_t i = 0; i < EXPECTED_TYPES; i++) {
        DLManagedTensorVersioned *managed = NULL;
        CHECK_INT(i + 1, expected_types[i].dtype);
        CHECK_INT(FST_OK, export_one(expected_types[i].dtype, SHAPE(3, 8), 24 * 8, &managed));
        DLDataType got = managed->dl_tensor.dtype;
        CHECK_INT(expected_types[i].code, got.code);
        CHECK_INT(expected_types[i].bits, got.bits);
        CHECK_INT(expected_types[i].lanes, got.lanes);
        delete_and_count(managed);
    }
}

/* dlpack.h's GetDataSize, with the lanes of a sub-byte type counted before the bits become bytes. */
TEST(dlpack, size_by_dlpacks_rule_is_nbytes) {
    for (size_t i = 0; i < EXPECTED_TYPES; i++) {
        DLManagedTensorVersioned *managed = NULL;
        CHECK_INT(FST_OK, export_one(expected_types[i].dtype, SHAPE(3, 8), 24 * 8, &managed));
        const DLTensor *tensor = &managed->dl_tensor;
        uint64_t elements = (uint64_t)(tensor->shape[0] * tensor->shape[1]);
        CHECK_INT(24 * fst_dtype_bits(expected_types[i].dtype) / 8,
                  elements * tensor->dtype.bits * tensor->dtype.lanes / 8);
        delete_and_count(managed);
    }
}

TEST(dlpack, version_flags_offset_and_device) {
    const fst_gpu *gpu = counting_device(kDLROCM, 3);
    fst_block *block = new_block(gpu, 1024);
    one_tensor it;
    fst_model *model = hand_built(&it, gpu, block, FST_F32, SHAPE(4));
    it.tensor.data = (unsigned char *)block->data + 512;
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, fst_model_dlpack(model, 0, &managed));
    CHECK_INT(DLPACK_MAJOR_VERSION, managed->version.major);
    CHECK_INT(DLPACK_MINOR_VERSION, managed->version.minor);
    CHECK_INT(0, managed->flags);
    CHECK_INT(0, managed->dl_tensor.byte_offset);
    CHECK_INT(kDLROCM, managed->dl_tensor.device.device_type);
    CHECK_INT(3, managed->dl_tensor.device.device_id);
    CHECK(managed->dl_tensor.data == (char *)block->data + 512);
    fst_block_drop(block);
    delete_and_count(managed);
}

TEST(dlpack, strides_are_row_major) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_BF16, SHAPE(2, 3, 5, 7), 420, &managed));
    check_extents(&managed->dl_tensor, 4, (int64_t[]){2, 3, 5, 7}, (int64_t[]){105, 35, 7, 1});
    delete_and_count(managed);
}

TEST(dlpack, scalar_has_no_dimension_and_pointers_all_the_same) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_F64, 0, NULL, 8, &managed));
    check_extents(&managed->dl_tensor, 0, NULL, NULL);
    CHECK(managed->dl_tensor.data);
    delete_and_count(managed);
}

TEST(dlpack, empty_tensor_has_strides_and_no_data) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_F32, SHAPE(3, 0, 2), 256, &managed));
    check_extents(&managed->dl_tensor, 3, (int64_t[]){3, 0, 2}, (int64_t[]){2, 2, 1});
    CHECK(!managed->dl_tensor.data); /* dlpack.h: "should be set to NULL" */
    delete_and_count(managed);
}

TEST(dlpack, empty_tensor_without_a_block) {
    const fst_gpu *gpu = counting_device(kDLCPU, 0);
    one_tensor it;
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, fst_model_dlpack(hand_built(&it, gpu, NULL, FST_I32, SHAPE(0)), 0, &managed));
    check_extents(&managed->dl_tensor, 1, (int64_t[]){0}, (int64_t[]){1});
    managed->deleter(managed);
}

TEST(dlpack, sixty_four_dimensions) {
    uint64_t shape[FST_MAX_DIMS];
    int64_t want_shape[FST_MAX_DIMS], want_strides[FST_MAX_DIMS];
    for (int d = 0; d < FST_MAX_DIMS; d++) {
        shape[d] = d % 16 == 0 ? 2 : 1;
        want_shape[d] = (int64_t)shape[d];
        want_strides[d] = d < 16 ? 8 : d < 32 ? 4 : d < 48 ? 2 : 1;
    }
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_U16, FST_MAX_DIMS, shape, 32, &managed));
    check_extents(&managed->dl_tensor, FST_MAX_DIMS, want_shape, want_strides);
    delete_and_count(managed);
}

TEST(dlpack, f4_halves_the_last_dimension) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_F4, SHAPE(3, 5, 8), 60, &managed));
    check_extents(&managed->dl_tensor, 3, (int64_t[]){3, 5, 4}, (int64_t[]){20, 4, 1});
    delete_and_count(managed);
}

TEST(dlpack, f4_with_an_empty_last_dimension) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_F4, SHAPE(3, 0), 256, &managed));
    check_extents(&managed->dl_tensor, 2, (int64_t[]){3, 0}, (int64_t[]){1, 1});
    delete_and_count(managed);
}

TEST(dlpack, f6_keeps_its_shape_packed) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_F6_E3M2, SHAPE(2, 6), 9, &managed));
    check_extents(&managed->dl_tensor, 2, (int64_t[]){2, 6}, (int64_t[]){6, 1});
    CHECK_INT(0, managed->flags & DLPACK_FLAG_BITMASK_IS_SUBBYTE_TYPE_PADDED);
    delete_and_count(managed);
}

/* Only an empty tensor can have such an extent. F4's is halved before it is compared. */
TEST(dlpack, largest_extent_is_int64_max) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_U8, SHAPE(0, INT64_MAX), 256, &managed));
    check_extents(&managed->dl_tensor, 2, (int64_t[]){0, INT64_MAX}, (int64_t[]){INT64_MAX, 1});
    delete_and_count(managed);
    CHECK_INT(FST_OK, export_one(FST_F4, SHAPE(0, UINT64_MAX - 1), 256, &managed));
    check_extents(&managed->dl_tensor, 2, (int64_t[]){0, INT64_MAX}, (int64_t[]){INT64_MAX, 1});
    delete_and_count(managed);
}

/* ---- What is refused: nothing is held, and the last error says why ------------------------------ */

static void check_refused(fst_dtype dtype, size_t ndim, const uint64_t *shape, const char *why) {
    DLManagedTensorVersioned *managed = (void *)&managed;
    CHECK_INT(FST_E_DLPACK, export_one(dtype, ndim, shape, 256, &managed));
    CHECK(!managed);
    CHECK_INT(1, atomic_load(&blocks_freed));
    CHECK_INT(FST_E_DLPACK, fst_last_error()->status);
    CHECK_INT(0, fst_last_error()->file);
    CHECK_STR("dir/a.safetensors", fst_last_error()->path);
    CHECK(strstr(fst_last_error()->text, "\"w\""));
    CHECK(strstr(fst_last_error()->text, why));
}

TEST(dlpack, f4_with_an_odd_last_dimension_is_refused) { check_refused(FST_F4, SHAPE(2, 3), "odd"); }
TEST(dlpack, empty_f4_with_an_odd_last_dimension_is_refused) { check_refused(FST_F4, SHAPE(0, 3), "odd"); }
TEST(dlpack, f4_without_a_dimension_is_refused) { check_refused(FST_F4, 0, NULL, "none"); }

TEST(dlpack, extent_over_int64_max_is_refused) {
    check_refused(FST_U8, SHAPE(0, (uint64_t)INT64_MAX + 1), "extent");
}

TEST(dlpack, first_extent_over_int64_max_is_refused) {
    check_refused(FST_U8, SHAPE(UINT64_MAX, 0), "extent");
}

TEST(dlpack, stride_over_int64_max_is_refused) {
    check_refused(FST_U8, SHAPE(0, (uint64_t)1 << 32, (uint64_t)1 << 31), "stride");
}

TEST(dlpack, opened_model_has_no_data) {
    one_tensor it;
    DLManagedTensorVersioned *managed = (void *)&it;
    CHECK_INT(FST_E_NO_DATA, fst_model_dlpack(hand_built(&it, NULL, NULL, FST_F32, SHAPE(2)), 0, &managed));
    CHECK(!managed);
    CHECK_INT(FST_E_NO_DATA, fst_last_error()->status);
    CHECK(strstr(fst_last_error()->text, "fst_load"));
}

TEST(dlpack, opened_model_has_no_data_for_an_empty_tensor_either) {
    one_tensor it;
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_E_NO_DATA, fst_model_dlpack(hand_built(&it, NULL, NULL, FST_F32, SHAPE(0)), 0, &managed));
}

TEST(dlpack, index_past_the_end_is_refused) {
    one_tensor it;
    DLManagedTensorVersioned *managed = (void *)&it;
    fst_model *model = hand_built(&it, counting_device(kDLCPU, 0), NULL, FST_F32, SHAPE(0));
    CHECK_INT(FST_E_ARG, fst_model_dlpack(model, 1, &managed));
    CHECK(!managed);
    CHECK_INT(FST_E_ARG, fst_last_error()->status);
    CHECK_INT(-1, fst_last_error()->file);
    CHECK_INT(FST_E_ARG, fst_model_dlpack(model, SIZE_MAX, &managed));
}

TEST(dlpack, null_model_is_refused) {
    int some = 0;
    DLManagedTensorVersioned *managed = (void *)&some;
    CHECK_INT(FST_E_ARG, fst_model_dlpack(NULL, 0, &managed));
    CHECK(!managed);
}

TEST(dlpack, null_out_is_refused) {
    const fst_gpu *gpu = counting_device(kDLCPU, 0);
    fst_block *block = new_block(gpu, 8);
    one_tensor it;
    CHECK_INT(FST_E_ARG, fst_model_dlpack(hand_built(&it, gpu, block, FST_F32, SHAPE(2)), 0, NULL));
    CHECK_INT(1, atomic_load(&block->references));
    fst_block_drop(block);
    CHECK_INT(1, atomic_load(&blocks_freed));
}

TEST(dlpack, success_leaves_the_last_error) {
    fst_error before;
    CHECK_INT(FST_E_ARG, fst_model_dlpack(NULL, 0, NULL));
    before = *fst_last_error();
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_F32, SHAPE(2), 8, &managed));
    CHECK_BYTES(&before, fst_last_error(), sizeof before);
    delete_and_count(managed);
}

/* ---- Who frees --------------------------------------------------------------------------------- */

TEST(dlpack, tensor_outlives_the_model) {
    const fst_gpu *gpu = counting_device(kDLCPU, 0);
    fst_block *block = new_block(gpu, 8);
    memcpy(block->data, "contents", 8);
    one_tensor it;
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, fst_model_dlpack(hand_built(&it, gpu, block, FST_U8, SHAPE(2, 4)), 0, &managed));
    fst_block_drop(block);
    memset(&it, 0xEE, sizeof it); /* the model and its tables are gone */
    CHECK_INT(0, atomic_load(&blocks_freed));
    check_extents(&managed->dl_tensor, 2, (int64_t[]){2, 4}, (int64_t[]){4, 1});
    CHECK_BYTES("contents", managed->dl_tensor.data, 8);
    delete_and_count(managed);
}

TEST(dlpack, model_outlives_the_tensor) {
    const fst_gpu *gpu = counting_device(kDLCPU, 0);
    fst_block *block = new_block(gpu, 8);
    one_tensor it;
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, fst_model_dlpack(hand_built(&it, gpu, block, FST_F32, SHAPE(2)), 0, &managed));
    managed->deleter(managed);
    CHECK_INT(0, atomic_load(&blocks_freed));
    fst_block_drop(block);
    CHECK_INT(1, atomic_load(&blocks_freed));
}

TEST(dlpack, deleter_takes_null) {
    DLManagedTensorVersioned *managed = NULL;
    CHECK_INT(FST_OK, export_one(FST_F32, SHAPE(2), 8, &managed));
    managed->deleter(NULL);
    CHECK_INT(0, atomic_load(&blocks_freed));
    delete_and_count(managed);
}

TEST(dlpack, same_tensor_twice_is_two_references) {
    const fst_gpu *gpu = counting_device(kDLCPU, 0);
    fst_block *block = new_block(gpu, 8);
    one_tensor it;
    fst_model *model = hand_built(&it, gpu, block, FST_F32, SHAPE(2));
    DLManagedTensorVersioned *one = NULL, *two = NULL;
    CHECK_INT(FST_OK, fst_model_dlpack(model, 0, &one));
    CHECK_INT(FST_OK, fst_model_dlpack(model, 0, &two));
    CHECK(one != two && one->dl_tensor.data == two->dl_tensor.data);
    fst_block_drop(block);
    one->deleter(one);
    CHECK_INT(0, atomic_load(&blocks_freed));
    delete_and_count(two);
}

#define THREADS 8
#define EXPORTS 64

typedef struct {
    fst_model *model;
    pthread_barrier_t *start;
    DLManagedTensorVersioned *made[EXPORTS];
    int failed;
} exporter;

static void *export_many(void *arg) {
    exporter *self = arg;
    pthread_barrier_wait(self->start);
    for (int i = 0; i < EXPORTS; i++)
        if (fst_model_dlpack(self->model, 0, &self->made[i])) self->failed = 1;
    return NULL;
}

static void *delete_many(void *arg) {
    exporter *self = arg;
    pthread_barrier_wait(self->start);
    for (int i = 0; i < EXPORTS; i++)
        if (self->made[i]) self->made[i]->deleter(self->made[i]);
    return NULL;
}

static void run_threads(exporter *all, void *(*fn)(void *)) {
    pthread_t threads[THREADS];
    for (int t = 0; t < THREADS; t++) CHECK_INT(0, pthread_create(&threads[t], NULL, fn, &all[t]));
    for (int t = 0; t < THREADS; t++) CHECK_INT(0, pthread_join(threads[t], NULL));
}

/* Made in eight threads, and deleted in eight others, the model's own reference gone in between. */
TEST(dlpack, deleters_race_and_the_block_is_freed_once) {
    for (int round = 0; round < 20; round++) {
        const fst_gpu *gpu = counting_device(kDLCPU, 0);
        fst_block *block = new_block(gpu, 8);
        one_tensor it;
        fst_model *model = hand_built(&it, gpu, block, FST_F32, SHAPE(2));
        pthread_barrier_t start;
        CHECK_INT(0, pthread_barrier_init(&start, NULL, THREADS));
        exporter all[THREADS];
        for (int t = 0; t < THREADS; t++) all[t] = (exporter){.model = model, .start = &start};
        run_threads(all, export_many);
        for (int t = 0; t < THREADS; t++) CHECK_INT(0, all[t].failed);
        CHECK_INT(1 + THREADS * EXPORTS, atomic_load(&block->references));
        fst_block_drop(block);
        CHECK_INT(0, atomic_load(&blocks_freed));
        run_threads(all, delete_many);
        CHECK_INT(1, atomic_load(&blocks_freed));
        pthread_barrier_destroy(&start);
    }
}

/* ---- Real loads -------------------------------------------------------------------------------- */

/* Three tensors of U8 as a file: "a" [4], "b" [2, 2], "e" [0]. */
static const char *small_file(void) {
    static const char json[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
                               "\"b\":{\"dtype\":\"U8\",\"shape\":[2,2],\"data_offsets\":[4,8]},"
                               "\"e\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[8,8]}}";
    unsigned char length[8] = {(unsigned char)(sizeof json - 1)};
    const char *path = test_path("small.safetensors");
    FILE *file = fopen(path, "wb");
    CHECK(file);
    CHECK_INT(8, fwrite(length, 1, 8, file));
    CHECK_INT(sizeof json - 1, fwrite(json, 1, sizeof json - 1, file));
    CHECK_INT(8, fwrite("aaaabbbb", 1, 8, file));
    CHECK_INT(0, fclose(file));
    return path;
}

static fst_model *load_counted(void) {
    const char *files[] = {small_file(), NULL};
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model = NULL;
    options.device = FST_DEVICE_GPU(0);
    fst_gpu_set_fake(counting_device(kDLCPU, 0));
    fst_status status = fst_load(files, &options, &model, NULL);
    fst_gpu_set_fake(NULL);
    if (status) test_fail(__FILE__, __LINE__, "%s", fst_last_error()->text);
    return model;
}

TEST(dlpack, model_freed_before_its_tensors) {
    fst_model *model = load_counted();
    DLManagedTensorVersioned *tensors[3] = {NULL};
    for (size_t i = 0; i < 3; i++) CHECK_INT(FST_OK, fst_model_dlpack(model, i, &tensors[i]));
    fst_model_free(model);
    fst_release_cached(); /* the staging ring is device memory too */
    CHECK(atomic_load(&blocks_live) > 0);
    CHECK_BYTES("aaaa", tensors[0]->dl_tensor.data, 4);
    CHECK_BYTES("bbbb", tensors[1]->dl_tensor.data, 4);
    for (size_t i = 0; i < 3; i++) tensors[i]->deleter(tensors[i]);
    CHECK_INT(0, atomic_load(&blocks_live));
}

TEST(dlpack, tensors_freed_before_their_model) {
    fst_model *model = load_counted();
    int live = atomic_load(&blocks_live);
    for (size_t i = 0; i < 3; i++) {
        DLManagedTensorVersioned *tensor = NULL;
        CHECK_INT(FST_OK, fst_model_dlpack(model, i, &tensor));
        tensor->deleter(tensor);
    }
    CHECK_INT(live, atomic_load(&blocks_live));
    fst_model_free(model);
    fst_release_cached();
    CHECK_INT(0, atomic_load(&blocks_live));
}

TEST(dlpack, opened_file_has_no_data) {
    const char *files[] = {small_file(), NULL};
    fst_model *model = NULL;
    CHECK_INT(FST_OK, fst_open(files, NULL, &model, NULL));
    DLManagedTensorVersioned *managed = (void *)model;
    for (size_t i = 0; i < 3; i++) CHECK_INT(FST_E_NO_DATA, fst_model_dlpack(model, i, &managed));
    CHECK(!managed);
    fst_model_free(model);
}
