/* Loads on a real GPU: the one that FST_TEST_DEVICE names, or the first; skipped where there is none. And
 * the search for devices, which works anywhere. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "model.h"
#include "support.h"

static int real_device(void) {
    const char *asked = getenv("FST_TEST_DEVICE");
    char reason[256];
    const fst_gpu *gpu;
    fst_error error;
    int device = asked ? FST_DEVICE_GPU(atoi(asked)) : FST_DEVICE_AUTO;
    fst_status status = fst_gpu_find(device, &gpu, reason, sizeof reason, &error);
    if (status) test_skip(1, error.text);
    if (gpu->host_access) test_skip(1, reason);
    return FST_DEVICE_GPU(gpu->index);
}

enum { LARGE = 3000001, MANY = 300 };
static char names[MANY][16];

/* Floats of every width and kept integers, large ones and many small ones, from an odd place on. */
static const char *write_mixed(void) {
    static unsigned char noise[LARGE * 4];
    static const char *const dtypes[] = {"F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I32", "U8", "F64"};
    static const unsigned bytes[] = {4, 2, 2, 1, 1, 4, 1, 8};
    support_tensor tensors[8 + MANY];
    char shapes[8][32];
    const char *path = test_path("mixed.safetensors");
    support_random(noise, sizeof noise, 11);
    for (int i = 0; i < 8; i++) {
        unsigned count = (unsigned)sizeof noise / bytes[i];
        sprintf(shapes[i], "[%u]", count);
        tensors[i] = (support_tensor){dtypes[i], dtypes[i], shapes[i], noise, (size_t)count * bytes[i]};
    }
    for (int i = 0; i < MANY; i++) {
        sprintf(names[i], "small.%d", i);
        tensors[8 + i] =
            (support_tensor){names[i], dtypes[i % 8], "[3,5]", noise + 64 * i, 15u * bytes[i % 8]};
    }
    support_checkpoint(path, NULL, tensors, 8 + MANY, 5);
    return path;
}

static fst_model *load(const char *path, int device, fst_dtype cast, unsigned flags) {
    const char *files[] = {path, NULL};
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model;
    fst_error error;
    options.cast = cast;
    options.device = device;
    options.flags = flags;
    options.slot_bytes = 1 << 20;
    if (fst_load(files, &options, &model, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
    return model;
}

/* Every byte is what the CPU device makes of the same file. */
static void check_same(const fst_model *there, const fst_model *here) {
    const fst_gpu *gpu = there->gpu;
    int saved;
    CHECK_INT(fst_model_count(here), fst_model_count(there));
    CHECK_INT(0, gpu->calls->enter(gpu, &saved));
    for (size_t i = 0; i < fst_model_count(there); i++) {
        fst_tensor a, b;
        CHECK_INT(FST_OK, fst_model_at(there, i, &a));
        CHECK_INT(FST_OK, fst_model_at(here, i, &b));
        CHECK_INT(b.nbytes, a.nbytes);
        CHECK_INT(0, (uintptr_t)a.data % 256);
        unsigned char *copy = malloc(a.nbytes + 1);
        CHECK(copy != NULL);
        CHECK_INT(0, gpu->calls->to_host(gpu, NULL, copy, a.data, a.nbytes));
        CHECK_INT(0, gpu->calls->stream_wait(gpu, NULL));
        CHECK_BYTES(b.data, copy, a.nbytes);
        free(copy);
    }
    gpu->calls->leave(gpu, saved);
}

static void compare_devices(fst_dtype cast, unsigned flags) {
    int device = real_device();
    const char *path = write_mixed();
    fst_model *there = load(path, device, cast, flags), *here = load(path, FST_DEVICE_CPU, cast, flags);
    check_same(there, here);
    fst_model_free(there);
    fst_model_free(here);
}

TEST(device, as_stored) { compare_devices(FST_NATIVE, 0); }
TEST(device, to_bf16) { compare_devices(FST_BF16, 0); }
TEST(device, to_f16) { compare_devices(FST_F16, 0); }
TEST(device, to_f32) { compare_devices(FST_F32, 0); }
TEST(device, to_f64) { compare_devices(FST_F64, 0); }
TEST(device, to_e4m3) { compare_devices(FST_F8_E4M3, 0); }
TEST(device, to_e5m2_not_saturating) { compare_devices(FST_F8_E5M2, FST_NON_SATURATING); }

TEST(device, memory_comes_back) {
    int device = real_device();
    const char *path = write_mixed();
    fst_model *model = load(path, device, FST_BF16, 0);
    const fst_gpu *gpu = model->gpu;
    uint64_t first, last, total;
    int saved;
    fst_model_free(model);
    fst_release_cached();
    CHECK_INT(0, gpu->calls->enter(gpu, &saved));
    CHECK_INT(0, gpu->calls->stream_wait(gpu, NULL));
    CHECK_INT(0, gpu->calls->memory(gpu, &first, &total));
    for (int i = 0; i < 5; i++) fst_model_free(load(path, device, FST_BF16, 0));
    fst_release_cached();
    CHECK_INT(0, gpu->calls->stream_wait(gpu, NULL));
    CHECK_INT(0, gpu->calls->memory(gpu, &last, &total));
    gpu->calls->leave(gpu, saved);
    CHECK_INT(first, last);
}

#define KEPT_FREE (64u << 20) /* less than the tensors of the file take */

TEST(device, a_full_device_is_an_error_that_leaves_nothing) {
    int device = real_device();
    const char *path = write_mixed(), *files[] = {path, NULL};
    fst_model *model = load(path, device, FST_NATIVE, 0);
    const fst_gpu *gpu = model->gpu;
    uint64_t available, total;
    void *hog = NULL;
    int saved;
    fst_model_free(model);
    fst_release_cached();
    CHECK_INT(0, gpu->calls->enter(gpu, &saved));
    CHECK_INT(0, gpu->calls->stream_wait(gpu, NULL));
    CHECK_INT(0, gpu->calls->memory(gpu, &available, &total));
    CHECK_INT(0, gpu->calls->alloc_block(gpu, available - KEPT_FREE, &hog));
    fst_options options = FST_OPTIONS_INIT;
    fst_error error;
    options.device = device;
    CHECK_INT(FST_E_DEVICE_MEMORY, fst_load(files, &options, &model, &error));
    CHECK(model == NULL);
    gpu->calls->free_block(gpu, hog, available - KEPT_FREE);
    gpu->calls->leave(gpu, saved);
    fst_model_free(load(path, device, FST_BF16, 0)); /* and the next load works */
}

/* While something holds it, freed memory stays at hand, in whatever pieces, for a block of any size; then it goes back. */
TEST(device, freed_memory_is_there_for_larger_blocks) {
    enum { PIECES = 8 };
    int device = real_device();
    fst_model *model = load(write_mixed(), device, FST_NATIVE, 0);
    const fst_gpu *gpu = model->gpu;
    uint64_t available, total, piece;
    void *blocks[PIECES], *whole = NULL;
    int saved;
    fst_model_free(model);
    fst_release_cached();
    CHECK_INT(0, gpu->calls->enter(gpu, &saved));
    CHECK_INT(0, gpu->calls->stream_wait(gpu, NULL));
    CHECK_INT(0, gpu->calls->kept(gpu));
    CHECK_INT(0, gpu->calls->memory(gpu, &available, &total));
    piece = available / 10;
    gpu->calls->hold(gpu);
    for (int i = 0; i < PIECES; i++) CHECK_INT(0, gpu->calls->alloc_block(gpu, piece, &blocks[i]));
    for (int i = 0; i < PIECES; i++) gpu->calls->free_block(gpu, blocks[i], piece);
    CHECK_INT(0, gpu->calls->stream_wait(gpu, NULL));
    CHECK_INT(strncmp(gpu->label, "cuda", 4) == 0, gpu->calls->kept(gpu) >= PIECES * piece);
    CHECK(fst_gpu_available(gpu) / 10 >= piece - piece / 100);
    CHECK_INT(0, gpu->calls->alloc_block(gpu, PIECES * piece, &whole));
    gpu->calls->free_block(gpu, whole, PIECES * piece);
    gpu->calls->let_go(gpu);
    CHECK_INT(0, gpu->calls->stream_wait(gpu, NULL));
    CHECK_INT(0, gpu->calls->kept(gpu));
    gpu->calls->leave(gpu, saved);
}

/* ---- The search ---- */

TEST(device, cpu_is_always_there) {
    char reason[64];
    const fst_gpu *gpu;
    CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_CPU, &gpu, reason, sizeof reason, NULL));
    CHECK_STR("cpu", gpu->label);
    CHECK_STR("asked for", reason);
    CHECK(gpu->name[0] != 0);
}

TEST(device, auto_finds_something_and_says_why) {
    char reason[256];
    const fst_gpu *gpu;
    CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_AUTO, &gpu, reason, sizeof reason, NULL));
    CHECK(strlen(reason) > 5);
}

TEST(device, a_reason_that_does_not_fit_is_cut) {
    char reason[8];
    const fst_gpu *gpu;
    CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_AUTO, &gpu, reason, sizeof reason, NULL));
    CHECK(memchr(reason, 0, sizeof reason) != NULL);
}

TEST(device, numbers_out_of_range) {
    char reason[64];
    const fst_gpu *gpu;
    fst_error error;
    CHECK_INT(FST_E_ARG, fst_gpu_find(-5, &gpu, reason, sizeof reason, &error));
    CHECK(gpu == NULL);
    CHECK_INT(FST_E_NO_DEVICE, fst_gpu_find(FST_DEVICE_GPU(63), &gpu, reason, sizeof reason, &error));
    CHECK_INT(FST_E_NO_DEVICE, fst_gpu_find(FST_DEVICE_GPU(1000000), &gpu, reason, sizeof reason, &error));
    CHECK(strstr(error.text, "no GPU 1000000") != NULL);
}

TEST(device, a_fake_takes_the_place_of_gpu_0_only) {
    char reason[64];
    const fst_gpu *gpu;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_AUTO, &gpu, reason, sizeof reason, NULL));
    CHECK_STR("fake:0", gpu->label);
    CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_CPU, &gpu, reason, sizeof reason, NULL));
    CHECK_STR("cpu", gpu->label);
    fake_gpu_end();
}
