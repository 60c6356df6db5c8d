/* Checkpoints of bitsandbytes: what their states say, loads, and states that do not fit. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "model.h"
#include "support.h"

static const uint32_t nf4[16] = {0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F,
                                 0xBDBA7871, 0x00000000, 0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A,
                                 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000};

static fst_status try(const char *path, int device, fst_dtype cast, fst_model **model, fst_error *error) {
    fst_options options = support_options(device);
    options.cast = cast;
    return fst_load(support_list(path), &options, model, error);
}

/* On the CPU and on the fake GPU: one tensor, "m.weight", with these bytes. */
static void check_load(const char *path, fst_dtype cast, const void *want, size_t nbytes) {
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        fst_model *model;
        fst_error error;
        fst_tensor tensor;
        fake_gpu_begin(&(fake_gpu_options){.seed = 3});
        if (try(path, device, cast, &model, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
        CHECK_INT(1, fst_model_count(model));
        CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &tensor));
        CHECK_INT(nbytes, tensor.nbytes);
        CHECK_BYTES(want, tensor.data, nbytes);
        fst_model_free(model);
        fake_gpu_end();
    }
}

#define STATE "m.weight.quant_state.bitsandbytes__nf4"

/* Eight codes under one scale, with this state. */
static const char *small(const char *state) {
    static const unsigned char codes[] = {0x0F, 0x7A, 0xE1, 0x58}, absmax[] = {0xCD, 0xCC, 0x4C, 0x3D};
    char shape[32];
    snprintf(shape, sizeof shape, "[%zu]", strlen(state));
    const support_tensor tensors[] = {{"m.weight", "U8", "[4,1]", codes, 4},
                                      {"m.weight.absmax", "F32", "[1]", absmax, 4},
                                      {"m.weight.quant_map", "F32", "[16]", nf4, 64},
                                      {STATE, "U8", shape, state, strlen(state)}};
    support_checkpoint(test_path("m.safetensors"), NULL, tensors, 4, 1);
    return test_path("m.safetensors");
}

TEST(bitsandbytes, nf4) {
    static const uint32_t f32[] = {0xBD4CCCCD, 0x3D4CCCCD, 0x00000000, 0x3C499D7E,
                                   0x3D140FC3, 0xBD0E948E, 0xBC175DCC, 0x3B826266};
    static const uint16_t bf16[] = {0xBD4D, 0x3D4D, 0x0000, 0x3C4A, 0x3D14, 0xBD0F, 0xBC17, 0x3B82};
    const char *path =
        small("{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [2, 4]}");
    check_load(path, FST_F32, f32, sizeof f32);
    check_load(path, FST_BF16, bf16, sizeof bf16);
}

/* A file without a map: the published values count. The vectors of nf4 and of fp4. */
TEST(bitsandbytes, without_a_map) {
    static const unsigned char codes[2][4] = {{0x0F, 0x7A, 0xE1, 0x58}, {0x3B, 0x1A, 0x3B, 0x1A}};
    static const unsigned char absmax[] = {0xCD, 0xCC, 0x4C, 0x3D};
    static const uint32_t f32[2][8] = {
        {0xBD4CCCCD, 0x3D4CCCCD, 0x00000000, 0x3C499D7E, 0x3D140FC3, 0xBD0E948E, 0xBC175DCC, 0x3B826266},
        {0x3D4CCCCD, 0xBD4CCCCD, 0x39888889, 0xBD088889, 0x3D4CCCCD, 0xBD4CCCCD, 0x39888889, 0xBD088889}};
    static const char *const kinds[2] = {"nf4", "fp4"};
    for (int i = 0; i < 2; i++) {
        char state[100], name[80], shape[32];
        snprintf(state, sizeof state, "{\"quant_type\": \"%s\", \"blocksize\": 64, \"shape\": [2, 4]}",
                 kinds[i]);
        snprintf(name, sizeof name, "m.weight.quant_state.bitsandbytes__%s", kinds[i]);
        snprintf(shape, sizeof shape, "[%zu]", strlen(state));
        const support_tensor tensors[] = {{"m.weight", "U8", "[4,1]", codes[i], 4},
                                          {"m.weight.absmax", "F32", "[1]", absmax, 4},
                                          {name, "U8", shape, state, strlen(state)}};
        support_checkpoint(test_path("m.safetensors"), NULL, tensors, 3, 1);
        check_load(test_path("m.safetensors"), FST_F32, f32[i], sizeof f32[i]);
    }
}

/* Blocks cross rows, chunks cut blocks, scales are nested, codes are stored as another type, their number is odd. */
static void load_nested(const char *dtype, uint64_t rows, uint64_t cols) {
    enum { MOST = 300000 };
    static unsigned char codes[MOST / 2], absmax[MOST / 64 + 1], want[4 * MOST], scratch[4 * MOST];
    static float nested[MOST / 64 / 256 + 2], nested_map[256];
    const uint64_t count = rows * cols, scales = (count + 63) / 64, groups = (scales + 255) / 256;
    char state[300], shapes[5][40];
    support_random(codes, sizeof codes, 3);
    support_random(absmax, sizeof absmax, 4);
    for (int i = 0; i < 256; i++) nested_map[i] = (float)(i - 100) / 127;
    for (uint64_t i = 0; i < groups; i++) nested[i] = 0.01f + 0.001f * (float)i;
    snprintf(
        state, sizeof state,
        "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float16\", \"shape\": [%llu, %llu], "
        "\"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 0.04500000178813934}",
        (unsigned long long)rows, (unsigned long long)cols);
    const size_t bytes = (size_t)(count + 1) / 2, size = fst_dtype_bits(fst_dtype_from_name(dtype)) / 8;
    const uint64_t counts[] = {bytes / size, scales, groups, strlen(state)};
    for (int i = 0; i < 4; i++)
        snprintf(shapes[i], sizeof shapes[i], "[%llu]", (unsigned long long)counts[i]);
    const support_tensor tensors[] = {
        {"m.weight", dtype, shapes[0], codes, bytes},
        {"m.weight.absmax", "U8", shapes[1], absmax, scales},
        {"m.weight.nested_absmax", "F32", shapes[2], nested, groups * 4},
        {"m.weight.nested_quant_map", "F32", "[256]", nested_map, sizeof nested_map},
        {"m.weight.quant_map", "F32", "[16]", nf4, 64},
        {STATE, "U8", shapes[3], state, strlen(state)}};
    const fst_bnb4_args args = {.src = codes,
                                .dst = scratch,
                                .map = nf4,
                                .absmax = absmax,
                                .nested = nested,
                                .nested_map = nested_map,
                                .offset = 0.04500000178813934f,
                                .dst_dtype = FST_F32,
                                .elements = count,
                                .count = count,
                                .block = 64,
                                .nested_block = 256};
    CHECK_INT(0, fst_kernels_cpu()->bnb4(NULL, &args)); /* tests/kernels_bnb.c says that this is right */
    memcpy(want, scratch, (size_t)count * 4);
    support_checkpoint(test_path("m.safetensors"), NULL, tensors, 6, 5);
    check_load(test_path("m.safetensors"), FST_F32, want, (size_t)count * 4);
}

TEST(bitsandbytes, chunks_cut_blocks_that_cross_rows) { load_nested("U8", 500, 599); }
TEST(bitsandbytes, codes_stored_as_another_type) {
    load_nested("BF16", 500, 96);
    load_nested("F32", 500, 96);
}
TEST(bitsandbytes, an_odd_number_of_elements) { load_nested("U8", 331, 3); }

/* ---- 8 bits ---- */

static const char *small8(const char *layout, size_t nbytes, const char *shape) {
    static const unsigned char codes[] = {127, 129, 1, 192}, scb[] = {0xCD, 0xCC, 0x4C, 0x3F};
    const support_tensor tensors[] = {{"m.weight", "I8", "[1,4]", codes, 4},
                                      {"m.SCB", "F32", "[1]", scb, 4},
                                      {"m.weight_format", "U8", shape, layout, nbytes}};
    support_checkpoint(test_path("m.safetensors"), NULL, tensors, 3, 1);
    return test_path("m.safetensors");
}

TEST(bitsandbytes, int8) {
    static const uint32_t f32[] = {0x3F4CCCCD, 0xBF4CCCCD, 0x3BCE69A0, 0xBECE69A0};
    static const uint16_t bf16[] = {0x3F4D, 0xBF4D, 0x3BCE, 0xBECE}, f16[] = {0x3A66, 0xBA66, 0x1E73, 0xB673};
    const char *path = small8("\0", 1, "[]");
    check_load(path, FST_F32, f32, sizeof f32);
    check_load(path, FST_BF16, bf16, sizeof bf16);
    check_load(path, FST_F16, f16, sizeof f16);
}

/* ---- What does not fit ---- */

static void check_refused(const char *path, fst_status wanted, const char *text) {
    fst_model *model;
    fst_error error;
    CHECK_INT(wanted, try(path, FST_DEVICE_CPU, FST_BF16, &model, &error));
    if (!strstr(error.text, text)) test_fail(__FILE__, __LINE__, "\"%s\" is not in \"%s\"", text, error.text);
    CHECK(strstr(error.text, "m.weight"));
    CHECK(error.offset > 0);
    CHECK_INT(FST_OK, try(path, FST_DEVICE_CPU, FST_NATIVE, &model, &error)); /* as stored it loads */
    fst_model_free(model);
}

TEST(bitsandbytes, other_layouts_of_8_bits) {
    check_refused(small8("\2", 1, "[]"), FST_E_UNSUPPORTED, "layout 2");
    check_refused(small8("\0\0", 2, "[2]"), FST_E_QUANTIZED, "one byte");
}

TEST(bitsandbytes, states_that_are_no_json) {
    check_refused(small("nf4"), FST_E_JSON, "not JSON");
    check_refused(small("{\"blocksize\": 64,"), FST_E_JSON, "not JSON");
    check_refused(small("[64]"), FST_E_QUANTIZED, "no object");
}

TEST(bitsandbytes, states_that_do_not_fit) {
    static const struct {
        const char *state, *text;
    } cases[] = {
        {"{\"quant_type\": \"fp4\", \"blocksize\": 64, \"shape\": [2, 4]}", "quant_type"},
        {"{\"shape\": [2, 4]}", "blocksize"},
        {"{\"blocksize\": 0, \"shape\": [2, 4]}", "blocksize"},
        {"{\"blocksize\": -64, \"shape\": [2, 4]}", "blocksize"},
        {"{\"blocksize\": \"64\", \"shape\": [2, 4]}", "blocksize"},
        {"{\"blocksize\": 64}", "\"shape\" is missing"},
        {"{\"blocksize\": 64, \"shape\": []}", "shape"},
        {"{\"blocksize\": 64, \"shape\": [2, -4]}", "shape"},
        {"{\"blocksize\": 64, \"shape\": [1,1,1,1,1,1,1,2,4]}", "shape"},
        {"{\"blocksize\": 64, \"shape\": [4294967296, 4294967296]}", "shape"},
        {"{\"blocksize\": 64, \"shape\": [2, 5]}", "5 bytes of codes"},
        {"{\"blocksize\": 64, \"shape\": [0, 4]}", "0 bytes of codes"},
        {"{\"blocksize\": 4, \"shape\": [2, 4]}", "2 scales"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_refused(small(cases[i].state), FST_E_QUANTIZED, cases[i].text);
}

TEST(bitsandbytes, nested_scales_that_do_not_fit) {
    static const unsigned char zeros[1024];
    static const struct {
        const char *more, *text;
    } cases[] = {{"", "nested_blocksize"},
                 {", \"nested_blocksize\": 256", "nested_offset"},
                 {", \"nested_blocksize\": 256, \"nested_offset\": \"0\"", "nested_offset"},
                 {", \"nested_blocksize\": 256, \"nested_offset\": 0.5", "1 scales of scales"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char state[200], shape[20];
        snprintf(state, sizeof state, "{\"blocksize\": 64, \"shape\": [2, 4]%s}", cases[i].more);
        snprintf(shape, sizeof shape, "[%zu]", strlen(state));
        const support_tensor tensors[] = {{"m.weight", "U8", "[4,1]", zeros, 4},
                                          {"m.weight.absmax", "U8", "[1]", zeros, 1},
                                          {"m.weight.nested_absmax", "F32", "[2]", zeros, 8},
                                          {"m.weight.nested_quant_map", "F32", "[256]", zeros, 1024},
                                          {"m.weight.quant_map", "F32", "[16]", nf4, 64},
                                          {STATE, "U8", shape, state, strlen(state)}};
        support_checkpoint(test_path("m.safetensors"), NULL, tensors, 6, 0);
        check_refused(test_path("m.safetensors"), FST_E_QUANTIZED, cases[i].text);
    }
}
