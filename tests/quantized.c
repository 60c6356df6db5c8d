/* Loads that dequantize: the vectors of the formats' specification, and whatever a chunk may cut. On the CPU device and
 * on the fake GPU that runs late. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "model.h"
#include "pipeline.h"
#include "support.h"

static fst_options options_for(int device, fst_dtype cast) {
    fst_options options = support_options(device);
    options.cast = cast;
    return options;
}

/* Hex text ("38 B8 01" or "3C23D70A") -> little-endian words of `size` bytes. */
static size_t parse(const char *text, size_t size, unsigned char *out) {
    size_t count = 0;
    for (char *end; *text; text = end) {
        while (*text == ' ' || *text == '/') text++;
        if (!*text) break;
        unsigned long word = strtoul(text, &end, 16);
        for (size_t i = 0; i < size; i++) out[count * size + i] = (unsigned char)(word >> (8 * i));
        count++;
    }
    return count;
}

static size_t size_of(fst_dtype dtype) { return fst_dtype_bits(dtype) / 8; }

typedef struct vector {
    const char *codes_name, *codes_dtype, *codes_shape, *codes;
    size_t codes_size; /* bytes of a code as written here */
    const char *scale_name, *scale_dtype, *scale_shape, *scales;
    const char *config;
    const char *name; /* of the weight */
    const char *f32, *bf16, *f16;
} vector;

static void check_vector(const vector *v) {
    static const fst_dtype targets[] = {FST_F32, FST_BF16, FST_F16};
    const char *wanted[] = {v->f32, v->bf16, v->f16};
    unsigned char codes[256], scales[256], want[1024];
    support_tensor tensors[] = {{v->codes_name, v->codes_dtype, v->codes_shape, codes, 0},
                                {v->scale_name, v->scale_dtype, v->scale_shape, scales, 0}};
    tensors[0].nbytes = parse(v->codes, v->codes_size, codes) * v->codes_size;
    size_t scale_size = size_of(fst_dtype_from_name(v->scale_dtype));
    tensors[1].nbytes = parse(v->scales, scale_size, scales) * scale_size;
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 2, 1);
    remove(test_path("config.json"));
    if (v->config) support_write(test_path("config.json"), v->config, strlen(v->config));
    for (int i = 0; i < 6; i++) {
        fst_options options = options_for(i < 3 ? FST_DEVICE_CPU : FST_DEVICE_GPU(0), targets[i % 3]);
        fst_model *model;
        fst_error error;
        fst_tensor tensor;
        if (!wanted[i % 3]) continue;
        if (i >= 3) fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)i});
        if (fst_load(support_list(path), &options, &model, &error))
            test_fail(__FILE__, __LINE__, "%s", error.text);
        CHECK_INT(1, fst_model_count(model));
        CHECK_INT(FST_OK, fst_model_find(model, v->name, &tensor));
        size_t count = parse(wanted[i % 3], size_of(targets[i % 3]), want);
        CHECK_INT(count * size_of(targets[i % 3]), tensor.nbytes);
        CHECK_BYTES(want, tensor.data, tensor.nbytes);
        CHECK_INT(targets[i % 3], tensor.dtype);
        CHECK_INT(fst_dtype_from_name(v->codes_dtype), tensor.stored_dtype);
        fst_model_free(model);
        if (i >= 3) fake_gpu_end();
    }
}

/* ---- The vectors of quant-formats 2.6, 3.6 and 4.4 ---- */

TEST(quantized, fp8_blocks_ragged_both_ways) {
    check_vector(&(vector){
        "m.weight", "F8_E4M3", "[3,5]", "38 B8 01 7E C5 / 00 80 4A 3F 08 / FE 31 77 87 5D", 1,
        "m.weight_scale_inv", "F32", "[2,3]", "3C23D70A 3B03126F 3F9D70A4 38D1B717 40490FDB 3DCCCCCD",
        "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[2,2]}}", "m.weight",
        "3C23D70A BC23D70A 3683126F 3F656042 C07FD70A 00000000 80000000 3C23D70B 3B75C290 3C9D70A4 BD378034 386BEDFA "
        "443C7EDD BD2FEDE0 40266667",
        "3C24 BC24 3683 3F65 C080 / 0000 8000 3C24 3B76 3C9D / BD38 386C 443C BD30 4026",
        "211F A11F 0042 3B2B C3FF / 0000 8000 211F 1BAE 24EC / A9BC 03B0 61E4 A97F 4133"});
}

TEST(quantized, fp8_with_a_power_of_two) {
    check_vector(&(vector){"m.weight", "F8_E4M3", "[2,2]", "3A 7E 01 C5", 1, "m.weight_scale_inv", "F8_E8M0",
                           "[1,1]", "78", NULL, "m.weight", "3C200000 40600000 37800000 BCD00000",
                           "3C20 4060 3780 BCD0", NULL});
}

TEST(quantized, fp8_with_one_scale) {
    check_vector(&(vector){"m.weight", "F8_E4M3", "[1,4]", "38 7E A3 01", 1, "m.weight_scale", "F32", "[]",
                           "3A83126F", NULL, "m.weight", "3A83126F 3EE56042 B9343959 3603126F",
                           "3A83 3EE5 B934 3603", "1419 372B 89A2 0021"});
}

TEST(quantized, fp8_with_a_scale_a_row) {
    check_vector(&(vector){"m.weight", "F8_E4M3", "[2,4]", "38 7E A3 05 38 7E A3 05", 1, "m.weight_scale",
                           "BF16", "[2,1]", "3C24 3C24", NULL, "m.weight",
                           "3C240000 408F8000 BAE18000 38CD0000 3C240000 408F8000 BAE18000 38CD0000",
                           "3C24 4090 BAE2 38CD 3C24 4090 BAE2 38CD",
                           "2120 447C 970C 0668 2120 447C 970C 0668"});
}

/* 127, -128, 3, -1 times a bf16 scale: exact in f32. */
TEST(quantized, int8_without_zero_points) {
    check_vector(&(vector){"m.weight", "I8", "[1,4]", "7F 80 03 FF", 1, "m.weight_scale", "BF16", "[1,1]",
                           "3C23", NULL, "m.weight", "3FA1BA00 BFA30000 3CF48000 BC230000",
                           "3FA2 BFA3 3CF4 BC23", "3D0E BD18 27A4 A118"});
}

TEST(quantized, mxfp4_of_gpt_oss) {
    check_vector(&(vector){
        "e.up_blocks", "U8", "[1,2,1,16]",
        "10 32 54 76 98 BA DC FE 0F F0 71 17 88 2A E5 4D 10 32 54 76 98 BA DC FE 0F F0 71 17 88 2A E5 4D", 1,
        "e.up_scales", "U8", "[1,2,1]", "7A 7F", NULL, "e.up", NULL,
        "0000 3C80 3D00 3D40 3D80 3DC0 3E00 3E40 8000 BC80 BD00 BD40 BD80 BDC0 BE00 BE40 "
        "BE40 0000 0000 BE40 3C80 3E40 3E40 3C80 8000 8000 BD00 3D00 3DC0 BE00 BDC0 3D80 "
        "0000 3F00 3F80 3FC0 4000 4040 4080 40C0 8000 BF00 BF80 BFC0 C000 C040 C080 C0C0 "
        "C0C0 0000 0000 C0C0 3F00 40C0 40C0 3F00 8000 8000 BF80 3F80 4040 C080 C040 4000",
        NULL});
}

/* Two companions: the vector's place for one is too small. */
TEST(quantized, nvfp4_in_both_conventions) {
    static const unsigned char codes[] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE}, scale[] = {0x73};
    static const unsigned char globals[2][4] = {{0, 0, 0x7A, 0x45}, {0x6F, 0x12, 0x83, 0x39}};
    static const char *const names[2][3] = {{"m.weight_packed", "m.weight_scale", "m.weight_global_scale"},
                                            {"m.weight", "m.weight_scale", "m.weight_scale_2"}};
    static const uint32_t wanted[2][8] = {
        {0, 0x3CB43958, 0x3D343958, 0x3D872B02, 0x3DB43958, 0x3E072B02, 0x3E343958, 0x3E872B02},
        {0, 0x3CB43959, 0x3D343959, 0x3D872B03, 0x3DB43959, 0x3E072B03, 0x3E343959, 0x3E872B03}};
    for (int way = 0; way < 4; way++) {
        const support_tensor tensors[] = {{names[way / 2][0], "U8", "[1,8]", codes, 8},
                                          {names[way / 2][1], "F8_E4M3", "[1,1]", scale, 1},
                                          {names[way / 2][2], "F32", "[1]", globals[way / 2], 4}};
        const char *path = test_path("model.safetensors");
        fst_options options = options_for(way % 2 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, FST_F32);
        fst_model *model;
        fst_tensor tensor;
        fst_error error;
        support_checkpoint(path, NULL, tensors, 3, 0);
        fake_gpu_begin(&(fake_gpu_options){.seed = 2});
        if (fst_load(support_list(path), &options, &model, &error))
            test_fail(__FILE__, __LINE__, "%s", error.text);
        CHECK_INT(1, fst_model_count(model));
        CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &tensor));
        for (int i = 0; i < 16; i++) {
            uint32_t got;
            memcpy(&got, (const char *)tensor.data + 4 * i, 4);
            CHECK_INT(wanted[way / 2][i % 8] | (i < 8 ? 0 : 0x80000000), got);
        }
        fst_model_free(model);
        fake_gpu_end();
    }
}

TEST(quantized, mxfp4_at_the_ends_of_its_scales) {
    check_vector(&(vector){
        "m.weight_packed", "U8", "[2,16]",
        "10 32 54 76 00 00 00 00 00 00 00 00 00 00 00 00 10 32 54 76 00 00 00 00 00 00 00 00 00 00 00 00", 1,
        "m.weight_scale", "U8", "[2,1]", "00 FE", NULL, "m.weight", NULL,
        "0000 0020 0040 0060 0080 00C0 0100 0140 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 "
        "0000 7E80 7F00 7F40 7F80 7F80 7F80 7F80 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        NULL});
}

TEST(quantized, mxfp8) {
    char codes[32 * 3 + 1] = "", f32[32 * 9 + 1] = "";
    static const char *const some[] = {"7E", "38", "81", "B9"}, *const values[] = {"3F600000", "3B000000",
                                                                                   "B6800000", "BB100000"};
    for (int i = 0; i < 32; i++)
        strcat(strcat(codes, some[i % 4]), " "), strcat(strcat(f32, values[i % 4]), " ");
    check_vector(&(vector){"m.weight", "F8_E4M3", "[1,32]", codes, 1, "m.weight_scale", "U8", "[1,1]", "76",
                           NULL, "m.weight", f32, NULL, NULL});
}

/* One weight and its companions, to F32. */
static void check_one(const support_tensor *tensors, size_t count, const char *config, const uint32_t *want,
                      size_t words) {
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, count, 3);
    remove(test_path("config.json"));
    if (config) support_write(test_path("config.json"), config, strlen(config));
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        fst_options options = options_for(device, FST_F32);
        fst_model *model;
        fst_error error;
        fst_tensor tensor;
        fake_gpu_begin(&(fake_gpu_options){.seed = 4});
        if (fst_load(support_list(path), &options, &model, &error))
            test_fail(__FILE__, __LINE__, "%s", error.text);
        CHECK_INT(1, fst_model_count(model));
        CHECK_INT(FST_OK, fst_model_at(model, 0, &tensor));
        CHECK_INT(words * 4, tensor.nbytes);
        CHECK_BYTES(want, tensor.data, words * 4);
        fst_model_free(model);
        fake_gpu_end();
    }
    remove(test_path("config.json"));
}

/* The vector of 3.6, and 2 x the scale. */
TEST(quantized, int8_with_zero_points) {
    static const unsigned char codes[] = {0x80, 0x7F, 0x00, 0x05}, zeros[] = {3, 3, 3, 0x80};
    static const uint16_t scales[] = {0x3C23, 0x3C23, 0x3C23, 0x3C23};
    static const uint32_t want[] = {0xBFA6D200, 0x3F9DE800, 0xBCF48000, 0x3FA95E00};
    check_one((support_tensor[]){{"m.weight", "I8", "[4,1]", codes, 4},
                                 {"m.weight_scale", "BF16", "[4,1]", scales, 8},
                                 {"m.weight_zero_point", "I8", "[4,1]", zeros, 4}},
              3, NULL, want, 4);
    check_one((support_tensor[]){{"m.weight", "I8", "[2,2]", codes, 4},
                                 {"m.weight_scale", "BF16", "[1]", scales, 2},
                                 {"m.weight_zero_point", "I8", "[1]", zeros, 1}},
              3, NULL, (const uint32_t[]){0xBFA6D200, 0x3F9DE800, 0xBCF48000, 0x3CA30000}, 4);
}

/* Two matrices of 2 x 1, each row with a scale and a zero point of its own; then one of each for a matrix. */
TEST(quantized, int8_with_zero_points_in_a_stack) {
    static const unsigned char codes[] = {0x80, 0x7F, 0x00, 0x05}, zeros[] = {3, 3, 3, 0x80};
    static const uint16_t scales[] = {0x3C23, 0x3C23, 0x3C23, 0x3C23}, two[] = {0x3F80, 0x4000};
    check_one((support_tensor[]){{"e.weight", "I8", "[2,2,1]", codes, 4},
                                 {"e.weight_scale", "BF16", "[2,2,1]", scales, 8},
                                 {"e.weight_zero_point", "I8", "[2,2,1]", zeros, 4}},
              3, NULL, (const uint32_t[]){0xBFA6D200, 0x3F9DE800, 0xBCF48000, 0x3FA95E00}, 4);
    static const float want[] = {-128 + 1, 127 + 1, 2 * (0 - 5), 2 * (5 - 5)};
    check_one(
        (support_tensor[]){{"e.weight", "I8", "[2,2,1]", codes, 4},
                           {"e.weight_scale", "BF16", "[2,1,1]", two, 4},
                           {"e.weight_zero_point", "I8", "[2,1,1]", (const unsigned char[]){0xFF, 5}, 2}},
        3, NULL, (const uint32_t *)(const void *)want, 4);
}

TEST(quantized, fp8_with_a_scale_a_column) {
    static const unsigned char codes[] = {0x38, 0x40, 0x38, 0x40, 0xB8, 0x00,
                                          0x38, 0x38, 0x38, 0x40, 0x40, 0x40};
    static const float scales[] = {2, 3, 5, 7, 11, 13};
    static const float want[] = {2, 6, 5, 4, -3, 0, 7, 11, 13, 14, 22, 26};
    static const char *const shapes[] = {"[2,1,3]", "[2,3]"}; /* rows would be [2,2] */
    for (int i = 0; i < 2; i++)
        check_one((support_tensor[]){{"e.up_proj", "F8_E4M3", "[2,2,3]", codes, 12},
                                     {"e.up_proj_scale", "F32", shapes[i], scales, 24}},
                  2, NULL, (const uint32_t *)(const void *)want, 12);
}

static const char *const inverse =
    "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[2,2],\"weight_scale_semantics\":\"inverse\"}}";

/* 1/3 and 448/3 are rounded by the division. */
TEST(quantized, fp8_divided_by_its_scale) {
    static const unsigned char codes[] = {0x38, 0x7E, 0xB8, 0x40};
    static const float one[] = {3}, rows[] = {3, -0.5f}, block[] = {4};
    check_one((support_tensor[]){{"m.weight", "F8_E4M3", "[2,2]", codes, 4},
                                 {"m.weight_scale_inv", "F32", "[]", one, 4}},
              2, inverse, (const uint32_t[]){0x3EAAAAAB, 0x43155555, 0xBEAAAAAB, 0x3F2AAAAB}, 4);
    check_one((support_tensor[]){{"m.weight", "F8_E4M3", "[2,2]", codes, 4},
                                 {"m.weight_scale_inv", "F32", "[2]", rows, 8}},
              2, inverse, (const uint32_t[]){0x3EAAAAAB, 0x43155555, 0x40000000, 0xC0800000}, 4);
    check_one((support_tensor[]){{"m.weight", "F8_E4M3", "[2,2]", codes, 4},
                                 {"m.weight_scale_inv", "F32", "[1,1]", block, 4}},
              2, inverse, (const uint32_t[]){0x3E800000, 0x42E00000, 0xBE800000, 0x3F000000}, 4);
}

TEST(quantized, deepseek_v4_names) {
    static const unsigned char codes[] = {0x3A, 0x7E, 0x01, 0xC5}, scale[] = {0x78};
    static const unsigned char nibbles[16] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE},
                               power[] = {0x7F};
    static const float halves[32] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    check_one((support_tensor[]){{"layers.0.attn.wq.weight", "F8_E4M3", "[2,2]", codes, 4},
                                 {"layers.0.attn.wq.scale", "F8_E8M0", "[1,1]", scale, 1}},
              2, NULL, (const uint32_t[]){0x3C200000, 0x40600000, 0x37800000, 0xBCD00000}, 4);
    check_one((support_tensor[]){{"layers.0.ffn.experts.0.w1.weight", "I8", "[1,16]", nibbles, 16},
                                 {"layers.0.ffn.experts.0.w1.scale", "F8_E8M0", "[1,1]", power, 1}},
              2, NULL, (const uint32_t *)(const void *)halves, 32);
}

/* ---- What is counted ---- */

static fst_stats stats_of(const char *path, int device) {
    fst_options options = options_for(device, FST_BF16);
    fst_stats stats = {.size = sizeof stats};
    fst_model *model;
    fst_error error;
    if (fst_load(support_list(path), &options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    fst_model_stats(model, &stats);
    fst_model_free(model);
    return stats;
}

TEST(quantized, scales_that_are_nan_are_counted) {
    static unsigned char codes[64 * 32], powers[64], e4m3[4] = {0x7F, 0xFF, 0x38, 0x7E};
    static const uint32_t f32[] = {0x7FC00000, 0x3F800000, 0xFF800001, 0x7F800000};
    static const uint16_t bf16[] = {0x7F81, 0x7F80, 0x3F80, 0xFFFF}, f16[] = {0x7C01, 0x7C00, 0x3F80, 0xFE00};
    static const uint32_t one = 0x7F800001;
    powers[3] = powers[63] = 0xFF, powers[5] = 0xFE;
    const support_tensor tensors[] = {{"a.weight", "F8_E4M3", "[4,2]", codes, 8},
                                      {"a.weight_scale", "F32", "[4,1]", f32, 16},
                                      {"b.weight", "F8_E4M3", "[4,2]", codes, 8},
                                      {"b.weight_scale", "BF16", "[4,1]", bf16, 8},
                                      {"c.weight", "I8", "[4,2]", codes, 8},
                                      {"c.weight_scale", "F16", "[4,1]", f16, 8},
                                      {"d.weight", "F8_E4M3", "[64,32]", codes, sizeof codes},
                                      {"d.weight_scale", "U8", "[64,1]", powers, 64},
                                      {"e.weight", "U8", "[4,8]", codes, 32},
                                      {"e.weight_scale", "F8_E4M3", "[4,1]", e4m3, 4},
                                      {"e.weight_scale_2", "F32", "[]", &one, 4},
                                      {"f.input_scale", "F32", "[4]", f32, 16}}; /* kept: not counted */
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, sizeof tensors / sizeof *tensors, 1);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        fake_gpu_begin(&(fake_gpu_options){.seed = 4});
        CHECK_INT(2 + 2 + 2 + 2 + 2 + 1, stats_of(path, device).nan_scales);
        CHECK_INT(0, stats_of(path, device).bare_weights);
        fake_gpu_end();
    }
}

/* More than are looked at in one go. */
TEST(quantized, scales_that_are_nan_are_counted_among_many) {
    enum { MANY = 9001 };
    static const unsigned nans[] = {0, 1023, 1024, 2047, 2048, 4095, 4096, 8191, 8192, MANY - 1};
    enum { NANS = sizeof nans / sizeof *nans };
    static unsigned char codes[MANY * 32], powers[MANY];
    static uint32_t f32[MANY];
    static uint16_t bf16[MANY];
    for (unsigned i = 0; i < MANY; i++) f32[i] = 0xFF800000, bf16[i] = 0x7F80, powers[i] = 0xFE;
    for (unsigned i = 0; i < NANS; i++) f32[nans[i]]++, bf16[nans[i]]++, powers[nans[i]]++;
    const support_tensor tensors[] = {{"a.weight", "F8_E4M3", "[9001,1]", codes, MANY},
                                      {"a.weight_scale", "F32", "[9001,1]", f32, sizeof f32},
                                      {"b.weight", "F8_E4M3", "[9001,1]", codes, MANY},
                                      {"b.weight_scale", "BF16", "[9001,1]", bf16, sizeof bf16},
                                      {"d.weight", "F8_E4M3", "[9001,32]", codes, sizeof codes},
                                      {"d.weight_scale", "U8", "[9001,1]", powers, MANY}};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, sizeof tensors / sizeof *tensors, 1);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        fake_gpu_begin(&(fake_gpu_options){.seed = 4});
        CHECK_INT(3 * NANS, stats_of(path, device).nan_scales);
        fake_gpu_end();
    }
}

TEST(quantized, weights_without_a_scale_are_counted) {
    static const unsigned char codes[16];
    const support_tensor tensors[] = {{"a.weight", "F8_E4M3", "[4,4]", codes, 16},
                                      {"b.weight", "F8_E5M2", "[4,4]", codes, 16},
                                      {"norm", "F32", "[4]", codes, 16}};
    support_checkpoint(test_path("model.safetensors"), NULL, tensors, 3, 0);
    CHECK_INT(2, stats_of(test_path("model.safetensors"), FST_DEVICE_CPU).bare_weights);
    CHECK_INT(0, stats_of(test_path("model.safetensors"), FST_DEVICE_CPU).nan_scales);
}

/* ---- What chunks cut ---- */

/* The CPU's kernels on the whole matrix: chunk by chunk must give the same. */
static void *whole(const fst_scaled_args *like, uint64_t count, size_t size) {
    fst_scaled_args args = *like;
    args.dst = calloc(count, size);
    args.count = count;
    CHECK_INT(0, fst_kernels_cpu()->scaled(NULL, &args));
    return args.dst;
}

enum { ROWS = 700, COLS = 1000, EXPERTS = 3 };

static void load_large(int device, const char *companion_first) {
    static unsigned char codes[EXPERTS * ROWS * COLS];
    static float scales[EXPERTS * 6 * 8], plain[5000];
    static uint16_t rows[ROWS];
    support_random(codes, sizeof codes, 7);
    for (size_t i = 0; i < sizeof codes; i++) codes[i] &= 0xF7; /* no NaN */
    for (size_t i = 0; i < EXPERTS * 6 * 8; i++) scales[i] = 0.001f * (float)(i % 37 + 1);
    for (size_t i = 0; i < ROWS; i++) rows[i] = (uint16_t)(0x3C00 + i);
    for (size_t i = 0; i < 5000; i++) plain[i] = (float)i;
    support_tensor all[] = {{"a.weight", "F8_E4M3", "[700,1000]", codes, ROWS * COLS},
                            {"plain", "F32", "[5000]", plain, sizeof plain},
                            {"a.weight_scale", "BF16", "[700,1]", rows, sizeof rows},
                            {"e.up_proj", "F8_E4M3", "[3,700,1000]", codes, sizeof codes},
                            {"e.up_proj_scale_inv", "F32", "[3,6,8]", scales, sizeof scales}};
    support_tensor swapped[] = {all[4], all[2], all[1], all[3], all[0]};
    const char *path = test_path("large.safetensors");
    support_checkpoint(path, NULL, *companion_first ? swapped : all, 5, 3);
    fst_options options = options_for(device, FST_BF16);
    fst_model *model;
    fst_error error;
    if (fst_load(support_list(path), &options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK_INT(3, fst_model_count(model));
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_find(model, "a.weight", &tensor));
    fst_scaled_args args = {.src = codes,
                            .scales = rows,
                            .scales_count = ROWS,
                            .rows = ROWS,
                            .cols = COLS,
                            .src_dtype = FST_F8_E4M3,
                            .dst_dtype = FST_BF16,
                            .scale_dtype = FST_BF16,
                            .kind = FST_SCALE_ROW};
    void *want = whole(&args, ROWS * COLS, 2);
    CHECK_BYTES(want, tensor.data, ROWS * COLS * 2);
    free(want);
    CHECK_INT(FST_OK, fst_model_find(model, "e.up_proj", &tensor));
    CHECK_INT(3, tensor.ndim);
    for (size_t e = 0; e < EXPERTS; e++) {
        args = (fst_scaled_args){.src = codes + e * ROWS * COLS,
                                 .scales = scales + e * 48,
                                 .scales_count = 48,
                                 .rows = ROWS,
                                 .cols = COLS,
                                 .src_dtype = FST_F8_E4M3,
                                 .dst_dtype = FST_BF16,
                                 .scale_dtype = FST_F32,
                                 .kind = FST_SCALE_BLOCK,
                                 .block_rows = 128,
                                 .block_cols = 128};
        want = whole(&args, ROWS * COLS, 2);
        CHECK_BYTES(want, (unsigned char *)tensor.data + e * ROWS * COLS * 2, ROWS * COLS * 2);
        free(want);
    }
    CHECK_INT(FST_E_NOT_FOUND, fst_model_find(model, "a.weight_scale", &tensor));
    fst_model_free(model);
}

TEST(quantized, chunks_cut_rows_and_blocks_on_the_cpu) { load_large(FST_DEVICE_CPU, ""); }
TEST(quantized, companions_first_in_the_file) { load_large(FST_DEVICE_CPU, "y"); }
TEST(quantized, chunks_cut_rows_and_blocks_on_a_late_gpu) {
    for (uint64_t seed = 1; seed < 12; seed++) {
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        load_large(FST_DEVICE_GPU(0), seed % 2 ? "" : "y");
        fake_gpu_end();
    }
}

/* Many small weights in many batches, in two files, companions in the other one. */
static const char *const *many_weights(unsigned count) {
    static char names[64][2][32], paths[2][256];
    static const char *files[3];
    static unsigned char codes[64][96];
    static float scales[64];
    support_tensor tensors[2][64];
    for (unsigned i = 0; i < count; i++) {
        sprintf(names[i][0], "m%u.weight", i);
        sprintf(names[i][1], "m%u.weight_scale", i);
        memset(codes[i], 0x38, sizeof codes[i]); /* 1 */
        scales[i] = (float)(i + 1);
        tensors[0][i] = (support_tensor){names[i][0], "F8_E4M3", "[8,12]", codes[i], 96};
        tensors[1][i] = (support_tensor){names[i][1], "F32", "[1]", &scales[i], 4};
    }
    for (int f = 0; f < 2; f++) {
        snprintf(paths[f], sizeof paths[f], "%s", test_path(f ? "scales.safetensors" : "codes.safetensors"));
        support_checkpoint(paths[f], NULL, tensors[f], count, 0);
        files[f] = paths[f];
    }
    return files;
}

static void check_many(const fst_tensor *tensor) {
    unsigned i;
    CHECK_INT(1, sscanf(tensor->name, "m%u.weight", &i));
    CHECK_INT(96 * 4, tensor->nbytes);
    for (int k = 0; k < 96; k++) CHECK(((const float *)tensor->data)[k] == (float)(i + 1));
}

/* Of companions: one weight's in a batch, some, or all. */
static const uint64_t batches[] = {1, 12, 0};

TEST(quantized, many_weights_with_companions_in_another_file) {
    const char *const *files = many_weights(64);
    for (uint64_t seed = 0; seed < 24; seed++) {
        fst_options options = options_for(seed % 4 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, FST_F32);
        fst_model *model;
        fst_error error;
        fst_batch_bytes = batches[seed % 3];
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        CHECK_INT(FST_OK, fst_load(files, &options, &model, &error));
        fst_batch_bytes = 0;
        CHECK_INT(64, fst_model_count(model));
        for (size_t i = 0; i < 64; i++) {
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_model_at(model, i, &tensor));
            check_many(&tensor);
        }
        fst_model_free(model);
        fake_gpu_end();
    }
}

/* The scales of a weight come before the weight before it: nothing waits for them. */
TEST(quantized, companions_come_a_batch_ahead) {
    enum { WEIGHTS = 6, CODES = 96, SCALE = 4 };
    const char *const *files = many_weights(WEIGHTS);
    fst_options options = options_for(FST_DEVICE_CPU, FST_F32);
    fst_trace_record records[4 * WEIGHTS];
    fst_trace trace = {.records = records, .room = 4 * WEIGHTS};
    fst_model *model;
    options.threads = 1; /* reads in the order of the plan */
    fst_batch_bytes = 1;
    fst_pipeline_trace = &trace;
    CHECK_INT(FST_OK, fst_load(files, &options, &model, NULL));
    fst_pipeline_trace = NULL;
    fst_batch_bytes = 0;
    fst_model_free(model);
    CHECK_INT(2 * WEIGHTS, trace.count);
    CHECK_INT(SCALE, records[0].nbytes);
    for (size_t i = 1; i < 2 * WEIGHTS; i++)
        CHECK_INT(i % 2 && i < 2 * WEIGHTS - 1 ? SCALE : CODES, records[i].nbytes);
}

/* Each companion lies behind its weight; a batch's are one chunk, whatever is between them. */
TEST(quantized, companions_beside_their_weights_share_chunks) {
    enum { WEIGHTS = 6, HIGH = 256, CODES = HIGH * 1024 };
    static unsigned char codes[CODES];
    static float scales[WEIGHTS][HIGH];
    char names[WEIGHTS][2][32];
    const char *path = test_path("beside.safetensors"), *files[] = {path, NULL};
    support_tensor tensors[2 * WEIGHTS];
    memset(codes, 0x38, sizeof codes); /* 1 */
    for (unsigned i = 0; i < WEIGHTS; i++) {
        sprintf(names[i][0], "m%u.weight", i);
        sprintf(names[i][1], "m%u.weight_scale", i);
        for (unsigned row = 0; row < HIGH; row++) scales[i][row] = (float)(HIGH * i + row);
        tensors[2 * i] = (support_tensor){names[i][0], "F8_E4M3", "[256,1024]", codes, CODES};
        tensors[2 * i + 1] = (support_tensor){names[i][1], "F32", "[256,1]", scales[i], sizeof scales[i]};
    }
    support_checkpoint(path, NULL, tensors, 2 * WEIGHTS, 0);
    for (uint64_t seed = 0; seed < 6; seed++) {
        fst_options options = options_for(seed % 3 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, FST_F32);
        fst_stats stats = {.size = sizeof stats};
        fst_model *model;
        options.slot_bytes = CODES;
        fst_batch_bytes = seed % 2 ? 2 * sizeof scales[0] : 0;
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        CHECK_INT(FST_OK, fst_load(files, &options, &model, NULL));
        CHECK_INT(FST_OK, fst_model_stats(model, &stats));
        CHECK_INT(WEIGHTS + (fst_batch_bytes ? WEIGHTS / 2 : 1), stats.chunks);
        fst_batch_bytes = 0;
        for (size_t i = 0; i < WEIGHTS; i++) {
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_model_at(model, i, &tensor));
            for (unsigned row = 0; row < HIGH; row++)
                CHECK(((const float *)tensor.data)[row * 1024 + row] == (float)(HIGH * i + row));
        }
        fst_model_free(model);
        fake_gpu_end();
    }
}

TEST(quantized, one_by_one) {
    const char *const *files = many_weights(40);
    for (uint64_t seed = 0; seed < 12; seed++) {
        fst_options options = options_for(FST_DEVICE_GPU(0), FST_F32);
        fst_stream *stream;
        fst_error error;
        fst_tensor tensor;
        unsigned seen = 0;
        options.flags = seed % 2 ? FST_AS_READY : 0;
        fst_batch_bytes = batches[seed % 3];
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        CHECK_INT(FST_OK, fst_stream_open(files, &options, &stream, &error));
        fst_batch_bytes = 0;
        for (;; seen++) {
            CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, NULL, &error));
            if (!tensor.name) break;
            check_many(&tensor);
        }
        CHECK_INT(40, seen);
        fst_stream_close(stream);
        fake_gpu_end();
    }
}

static int keep_one(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    (void)arg;
    if (strstr(tensor->name, "m1.")) rule->cast = FST_NATIVE;
    return 0;
}

TEST(quantized, a_rule_keeps_one_as_stored_with_its_scale) {
    const char *const *files = many_weights(3);
    fst_options options = options_for(FST_DEVICE_CPU, FST_F32);
    fst_model *model;
    fst_tensor tensor;
    options.rule = keep_one;
    CHECK_INT(FST_OK, fst_load(files, &options, &model, NULL));
    CHECK_INT(4, fst_model_count(model));
    CHECK_INT(FST_OK, fst_model_find(model, "m1.weight", &tensor));
    CHECK_INT(FST_F8_E4M3, tensor.dtype);
    CHECK_INT(FST_OK, fst_model_find(model, "m1.weight_scale", &tensor));
    CHECK_INT(FST_F32, tensor.dtype);
    CHECK_INT(FST_OK, fst_model_find(model, "m2.weight", &tensor));
    check_many(&tensor);
    fst_model_free(model);
}

TEST(quantized, as_stored_nothing_is_consumed) {
    const char *const *files = many_weights(3);
    fst_options options = options_for(FST_DEVICE_CPU, FST_NATIVE);
    fst_model *model;
    CHECK_INT(FST_OK, fst_load(files, &options, &model, NULL));
    CHECK_INT(6, fst_model_count(model));
    fst_model_free(model);
}

/* ---- What goes wrong ---- */

TEST(quantized, every_device_call_may_fail) {
    const char *const *files = many_weights(20);
    fst_options options = options_for(FST_DEVICE_GPU(0), FST_BF16);
    for (int at = 1;; at++) {
        fst_model *model;
        fst_error error;
        fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)at, .fail_at = at});
        fst_status status = fst_load(files, &options, &model, &error);
        int reached = fake_gpu_calls() >= at;
        if (reached) CHECK(status == FST_E_DEVICE || status == FST_E_DEVICE_MEMORY);
        else CHECK_INT(FST_OK, status);
        fst_model_free(model);
        fake_gpu_end();
        if (!reached) break;
    }
}

TEST(quantized, targets_that_there_are_not) {
    const char *const *files = many_weights(3);
    static const fst_dtype targets[] = {FST_F64, FST_F8_E4M3, FST_F8_E5M2FNUZ};
    for (int i = 0; i < 3; i++) {
        fst_options options = options_for(FST_DEVICE_CPU, targets[i]);
        fst_model *model;
        fst_error error;
        CHECK_INT(FST_E_UNSUPPORTED, fst_load(files, &options, &model, &error));
        CHECK(strstr(error.text, "m0.weight") && strstr(error.text, fst_dtype_name(targets[i])));
    }
}

TEST(quantized, a_weight_that_takes_the_name_of_another_tensor) {
    static const unsigned char bytes[64];
    support_tensor tensors[] = {{"m.weight_packed", "U8", "[2,16]", bytes, 32},
                                {"m.weight_scale", "U8", "[2,1]", bytes, 2},
                                {"m.weight", "F32", "[1]", bytes, 4}};
    const char *path = test_path("m.safetensors");
    fst_options options = options_for(FST_DEVICE_CPU, FST_BF16);
    fst_model *model;
    fst_error error;
    support_checkpoint(path, NULL, tensors, 3, 0);
    CHECK_INT(FST_E_DUPLICATE, fst_load(support_list(path), &options, &model, &error));
    CHECK(strstr(error.text, "m.weight"));
}
