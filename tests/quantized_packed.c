/* Loads that dequantize packed integers: the vectors of the formats' specification, on the CPU device and on the fake GPU,
 * and what is wrong with checkpoints. */
#include <stdio.h>
#include <string.h>

#include "harness.h"
#include "support.h"

static const uint16_t scales[8] = {0x2666, 0x1C00, 0x3C00, 0x2E66, 0x211F, 0x3555, 0x2A3D, 0x0400};
static const uint32_t gptq_words[8] = {0x52FC9630, 0xA741EB85, 0xFC9630DA, 0x41EB852F,
                                       0x9630DA74, 0xEB852FC9, 0x30DA741E, 0x852FC963};
static const uint32_t gptq_zeros = 0x28FEF067;

static void write_config(const char *text) {
    remove(test_path("config.json"));
    if (text) support_write(test_path("config.json"), text, strlen(text));
}

/* Row `row` of m.weight at these columns. */
typedef struct place {
    unsigned row, col;
    uint32_t f32, bf16, f16;
} place;

static void check_loads(const support_tensor *tensors, size_t count, const char *config, unsigned cols,
                        const place *places, size_t places_count) {
    static const fst_dtype targets[] = {FST_F32, FST_BF16, FST_F16};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, count, 3);
    write_config(config);
    for (int i = 0; i < 6; i++) {
        fst_options options = support_options(i < 3 ? FST_DEVICE_CPU : FST_DEVICE_GPU(0));
        fst_model *model;
        fst_tensor tensor;
        fst_error error;
        options.cast = targets[i % 3];
        fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)i + 1});
        if (fst_load(support_list(path), &options, &model, &error))
            test_fail(__FILE__, __LINE__, "%s", error.text);
        CHECK_INT(1, fst_model_count(model));
        CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &tensor));
        CHECK_INT(2, tensor.ndim);
        CHECK_INT(cols, tensor.shape[1]);
        for (size_t k = 0; k < places_count; k++) {
            const place *p = &places[k];
            const uint32_t want[] = {p->f32, p->bf16, p->f16};
            uint32_t got = 0;
            size_t size = i % 3 ? 2 : 4;
            memcpy(&got, (const char *)tensor.data + (p->row * cols + p->col) * size, size);
            CHECK_INT(want[i % 3], got);
        }
        fst_model_free(model);
        fake_gpu_end();
    }
}

static const place gptq_places[] = {{0, 0, 0xBE4CC000, 0xBE4D, 0xB266}, {1, 0, 0xBC000000, 0xBC00, 0xA000},
                                    {2, 0, 0x41100000, 0x4110, 0x4880}, {3, 0, 0xBDCCC000, 0xBDCD, 0xAE66},
                                    {4, 0, 0xBDE15400, 0xBDE1, 0xAF0B}, {5, 0, 0xC0154C00, 0xC015, 0xC0AA},
                                    {6, 0, 0x3E798800, 0x3E7A, 0x33CC}, {7, 0, 0x00000000, 0x0000, 0x0000},
                                    {0, 1, 0xBDFFF000, 0xBE00, 0xB000}, {3, 1, 0xBFB32800, 0xBFB3, 0xBD99},
                                    {5, 1, 0xBFAAA000, 0xBFAB, 0xBD55}, {7, 1, 0x39400000, 0x3940, 0x0A00},
                                    {0, 7, 0xBD999000, 0xBD9A, 0xACCC}, {2, 7, 0x41600000, 0x4160, 0x4B00},
                                    {6, 7, 0xBE95B800, 0xBE96, 0xB4AE}, {7, 7, 0x39A00000, 0x39A0, 0x0D00}};

/* The words of the vector are rows of [n]; qweight is [1, 8]: all of a column's codes in one word. */
TEST(quantized_packed, gptq_with_zero_points_of_version_one) {
    uint32_t q[8] = {0};
    for (unsigned k = 0; k < 8; k++)
        for (unsigned n = 0; n < 8; n++) q[n] |= ((3 * k + 5 * n) & 15) << 4 * k;
    CHECK_BYTES(gptq_words, q, sizeof q);
    const support_tensor tensors[] = {{"m.qweight", "I32", "[1,8]", gptq_words, 32},
                                      {"m.qzeros", "I32", "[1,1]", &gptq_zeros, 4},
                                      {"m.scales", "F16", "[1,8]", scales, 16}};
    check_loads(tensors, 3, NULL, 8, gptq_places, 16);
}

/* Column 3's stored zero point is all ones: with a carry 0, and so in version two; 15 x 1638/16384 by hand. */
TEST(quantized_packed, gptq_with_other_zero_points) {
    static const uint32_t zeros[2] = {0x28FEF067, 0x390F0178};
    static const char *const configs[2] = {
        "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"meta\":{\"quantizer\":\"gptqmodel:4.0\"}}}",
        "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":\"gptq_v2\"}}"};
    for (int i = 0; i < 2; i++) {
        const support_tensor tensors[] = {{"m.qweight", "I32", "[1,8]", gptq_words, 32},
                                          {"m.qzeros", "I32", "[1,1]", &zeros[i], 4},
                                          {"m.scales", "F16", "[1,8]", scales, 16}};
        static const place places[] = {{0, 0, 0xBE4CC000, 0xBE4D, 0xB266},
                                       {3, 0, 0x3FBFF400, 0x3FC0, 0x3E00}};
        check_loads(tensors, 3, configs[i], 8, places, 2);
    }
}

TEST(quantized_packed, gptq_with_groups_in_another_order) {
    static const uint16_t two[16] = {0x3C00, 0x3C00, 0x3C00, 0x3C00, 0x3C00, 0x3C00, 0x3C00, 0x3C00,
                                     0x4000, 0x4000, 0x4000, 0x4000, 0x4000, 0x4000, 0x4000, 0x4000};
    static const uint32_t zeros[2] = {0x77777777, 0x77777777}, words[8] = {0x99999999}; /* 9 - 8 = 1 */
    static const int32_t groups[8] = {1, 0, 0, 1, 1, 0, 1, 0};
    const support_tensor tensors[] = {{"m.qweight", "I32", "[1,8]", words, 32},
                                      {"m.qzeros", "I32", "[2,1]", zeros, 8},
                                      {"m.scales", "F16", "[2,8]", two, 32},
                                      {"m.g_idx", "I32", "[8]", groups, 32}};
    place places[8];
    for (unsigned k = 0; k < 8; k++)
        places[k] =
            groups[k] ? (place){0, k, 0x40000000, 0x4000, 0x4000} : (place){0, k, 0x3F800000, 0x3F80, 0x3C00};
    check_loads(tensors, 4, NULL, 8, places, 8);
}

TEST(quantized_packed, awq) {
    static const uint32_t q = 0x86427531, z = 0x2F981078;
    const support_tensor tensors[] = {{"m.qweight", "I32", "[1,1]", &q, 4},
                                      {"m.qzeros", "I32", "[1,1]", &z, 4},
                                      {"m.scales", "F16", "[1,8]", scales, 16}};
    static const place places[] = {{0, 0, 0xBE332800, 0xBE33, 0xB199}, {1, 0, 0xBCC00000, 0xBCC0, 0xA600},
                                   {2, 0, 0xC0800000, 0xC080, 0xC400}, {3, 0, 0xBEFFF000, 0xBF00, 0xB800},
                                   {4, 0, 0x3D4CD800, 0x3D4D, 0x2A67}, {5, 0, 0xC03FF400, 0xC040, 0xC200},
                                   {6, 0, 0x3E95B800, 0x3E96, 0x34AE}, {7, 0, 0x39C00000, 0x39C0, 0x0E00}};
    check_loads(tensors, 3, "{\"quantization_config\":{\"quant_method\":\"awq\",\"bits\":4}}", 1, places, 8);
}

static const char *const four_bits =
    "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":"
    "{\"group_0\":{\"weights\":{\"num_bits\":4}}}}}";
static const uint32_t packed_words[4] = {0x76543210, 0xFEDCBA98, 0x89ABCDEF, 0x01234567};
static const uint32_t packed_zeros[2] = {0x90, 0xF8};
static const uint16_t packed_scales[4] = {0x3C23, 0x3CF6, 0x3D4D, 0x3B83};

TEST(quantized_packed, pack_quantized_with_zero_points) {
    static const int64_t shape[2] = {2, 16};
    const support_tensor tensors[] = {{"m.weight_packed", "I32", "[2,2]", packed_words, 16},
                                      {"m.weight_shape", "I64", "[2]", shape, 16},
                                      {"m.weight_scale", "BF16", "[2,2]", packed_scales, 8},
                                      {"m.weight_zero_point", "I32", "[1,2]", packed_zeros, 8}};
    static const place places[] = {{0, 0, 0x00000000, 0x0000, 0x0000},  {0, 1, 0x3C230000, 0x3C23, 0x2118},
                                   {0, 7, 0x3D8EA000, 0x3D8F, 0x2C75},  {0, 8, 0x00000000, 0x0000, 0x0000},
                                   {0, 15, 0x3E574000, 0x3E57, 0x32BA}, {1, 0, 0x3E99C000, 0x3E9A, 0x34CE},
                                   {1, 1, 0x3E802000, 0x3E80, 0x3401},  {1, 7, 0xBD4D0000, 0xBD4D, 0xAA68},
                                   {1, 8, 0xBD030000, 0xBD03, 0xA818},  {1, 15, 0xBD75A000, 0xBD76, 0xABAD}};
    check_loads(tensors, 4, four_bits, 16, places, 10);
}

/* Byte 7A: -6 in the first row, 7 in the second. */
TEST(quantized_packed, two_rows_in_a_byte) {
    static const uint8_t codes[2] = {0x7A, 0x7A};
    static const uint16_t ones[2] = {0x3C00, 0x3C00};
    const support_tensor tensors[] = {{"m.weight", "U8", "[1,2]", codes, 2},
                                      {"m.weight_scale", "F16", "[2,1]", ones, 4}};
    static const place places[] = {{0, 0, 0xC0C00000, 0xC0C0, 0xC600}, {1, 1, 0x40E00000, 0x40E0, 0x4700}};
    check_loads(tensors, 2, NULL, 2, places, 2);
}

/* ---- Codes of other widths: the specification's words, scales of 1 ---- */

static const float one_each[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                   1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/* A whole number of less than 2^8 in all three types. */
static place number(unsigned row, unsigned col, int x) {
    const float value = (float)x;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t half = x ? (bits >> 16 & 0x8000) | (((bits & 0x7FFFFFFF) - 0x38000000) >> 13) : 0;
    return (place){row, col, bits, bits >> 16, half};
}

TEST(quantized_packed, gptq_of_two_bits) {
    static uint32_t words[16], zeros = 0; /* stored less one */
    place places[256];
    for (unsigned i = 0; i < 16; i++) words[i] = 0xB1B1B1B1;
    for (unsigned i = 0; i < 256; i++) places[i] = number(i / 16, i % 16, (int)((7 * (i % 16) + 1) & 3) - 1);
    const support_tensor tensors[] = {{"m.qweight", "I32", "[1,16]", words, 64},
                                      {"m.qzeros", "I32", "[1,1]", &zeros, 4},
                                      {"m.scales", "F32", "[1,16]", one_each, 64}};
    check_loads(tensors, 3, NULL, 16, places, 256);
}

TEST(quantized_packed, gptq_of_three_bits) {
    static const uint32_t rows[3] = {0x43C67543, 0x7543C675, 0xC67543C6}, zeros[3] = {0};
    static uint32_t words[96];
    place places[64];
    for (unsigned i = 0; i < 96; i++) words[i] = rows[i / 32];
    for (unsigned i = 0; i < 64; i++)
        places[i] = number(i / 32 * 31, i % 32, (int)((5 * (i % 32) + 3) & 7) - 1);
    const support_tensor tensors[] = {{"m.qweight", "I32", "[3,32]", words, sizeof words},
                                      {"m.qzeros", "I32", "[1,3]", zeros, 12},
                                      {"m.scales", "F32", "[1,32]", one_each, 128}};
    check_loads(tensors, 3, NULL, 32, places, 64);
}

TEST(quantized_packed, gptq_of_eight_bits) {
    static const uint32_t words[4] = {0x7F80FE12, 0x7F80FE12, 0x7F80FE12, 0x7F80FE12}, zeros = 0x7F7F7F7F;
    const support_tensor tensors[] = {{"m.qweight", "I32", "[1,4]", words, 16},
                                      {"m.qzeros", "I32", "[1,1]", &zeros, 4},
                                      {"m.scales", "F32", "[1,4]", one_each, 16}};
    const place places[] = {number(0, 0, 0x12 - 128), number(1, 1, 0xFE - 128), number(2, 2, 0),
                            number(3, 3, -1)};
    check_loads(tensors, 3, NULL, 4, places, 4);
}

/* All ones are stored: 2^bits, where one is added to each; 0, 1, 1, ... where one is added to all with carries; as they
 * are in version two. Codes are 0. */
TEST(quantized_packed, gptq_with_zero_points_of_all_ones) {
    static const uint32_t words[8] = {0}, zeros = 0xFFFFFFFF;
    static const char *const configs[3] = {
        NULL,
        "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"meta\":{\"quantizer\":[\"gptqmodel:4.0\"]}}}",
        "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":\"gptq_v2\"}}"};
    static const int zero[3][2] = {{16, 16}, {0, 1}, {15, 15}};
    const support_tensor tensors[] = {{"m.qweight", "I32", "[1,8]", words, 32},
                                      {"m.qzeros", "I32", "[1,1]", &zeros, 4},
                                      {"m.scales", "F32", "[1,8]", one_each, 32}};
    for (int i = 0; i < 3; i++) {
        place places[8];
        for (unsigned row = 0; row < 8; row++) places[row] = number(row, row, -zero[i][row > 0]);
        check_loads(tensors, 3, configs[i], 8, places, 8);
    }
}

/* One row of `cols`, a scale. `bits` are the configuration's. */
static void check_row(unsigned bits, unsigned cols, const uint32_t *words, unsigned words_count,
                      const int *wanted, unsigned count) {
    const int64_t shape[2] = {1, cols};
    char config[256], dims[32];
    place places[16];
    snprintf(
        config, sizeof config,
        "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
        "\"config_groups\":{\"g\":{\"weights\":{\"num_bits\":%u}}}}}",
        bits);
    snprintf(dims, sizeof dims, "[1,%u]", words_count);
    const support_tensor tensors[] = {{"m.weight_packed", "I32", dims, words, words_count * 4},
                                      {"m.weight_shape", "I64", "[2]", shape, 16},
                                      {"m.weight_scale", "F32", "[1,1]", one_each, 4}};
    for (unsigned i = 0; i < count; i++) places[i] = number(0, i, wanted[i]);
    check_loads(tensors, 3, config, cols, places, count);
}

/* 64 columns: of 12 no one can tell which layout it is. */
TEST(quantized_packed, pack_quantized_of_three_bits_in_both_layouts) {
    static const uint32_t dense[6] = {0x78FAC688, 0x0000000C}, padded[7] = {0x38FAC688, 0x00000031};
    static const int wanted[13] = {-4, -3, -2, -1, 0, 1, 2, 3, -4, 3, -3, 2, -4};
    check_row(3, 64, dense, 6, wanted, 13);
    check_row(3, 64, padded, 7, wanted, 13);
}

TEST(quantized_packed, pack_quantized_of_two_and_eight_bits) {
    static const uint32_t two = 0xB1B1B1B1, eight = 0x7F80FE12;
    check_row(2, 16, &two, 1, (const int[]){-1, -2, 1, 0, -1, -2, 1, 0}, 8);
    check_row(8, 4, &eight, 1, (const int[]){0x12 - 128, 0xFE - 128, 0, -1}, 4);
}

/* Natural order of a row, one group of 16; zero points and scales have room for eight groups. */
TEST(quantized_packed, awq_gemv) {
    static const uint32_t q[4] = {0x87654321, 0, 0x0FEDCBA9, 0xFFFFFFFF}, z[2] = {8, 3};
    static const uint16_t one_and_two[16] = {0x3C00, 0, 0, 0, 0, 0, 0, 0, 0x4000};
    const support_tensor tensors[] = {{"m.qweight", "I32", "[2,2]", q, 16},
                                      {"m.qzeros", "I32", "[2,1]", z, 8},
                                      {"m.scales", "F16", "[2,8]", one_and_two, 32}};
    const place places[] = {number(0, 0, -7),  number(0, 1, -6), number(0, 7, 0),  number(0, 8, -8),
                            number(1, 15, 24), number(1, 0, 12), number(1, 6, 24), number(1, 7, -6)};
    check_loads(tensors, 3,
                "{\"quantization_config\":{\"quant_method\":\"awq\",\"version\":\"gemv\",\"bits\":4,"
                "\"group_size\":16}}",
                16, places, 8);
}

/* [in, out / 8], in AWQ's order or their own, signed or with zero points that are not. */
TEST(quantized_packed, quark) {
    static const uint32_t q = 0x86427531, natural = 0x87654321, z = 0x2F981078;
    static const int codes[8] = {1, 2, 3, 4, 5, 6, 7, 8}, zeros[8] = {8, 8, 7, 9, 0, 15, 1, 2};
    for (int i = 0; i < 4; i++) {
        const int in_order = i % 2, has_zeros = i / 2;
        const uint32_t natural_zeros = 0x21F09788;
        const support_tensor tensors[] = {
            {"m.weight", "I32", "[1,1]", in_order ? &natural : &q, 4},
            {"m.weight_scale", "F32", "[1,8]", one_each, 32},
            {"m.weight_zero_point", "I32", "[1,1]", in_order ? &natural_zeros : &z, 4}};
        place places[8];
        for (unsigned k = 0; k < 8; k++)
            places[k] = number(k, 0, has_zeros ? codes[k] - zeros[k] : codes[k] == 8 ? -8 : codes[k]);
        check_loads(tensors, 2 + (size_t)has_zeros,
                    in_order
                        ? "{\"quantization_config\":{\"quant_method\":\"quark\",\"export\":{\"pack_method\":"
                          "\"order\"}}}"
                        : "{\"quantization_config\":{\"quant_method\":\"quark\",\"export\":{\"pack_method\":"
                          "\"reorder\"}}}",
                    1, places, 8);
    }
}

/* ---- What goes wrong ---- */

static void check_status(fst_status status, const support_tensor *tensors, size_t count, const char *config,
                         const char *what) {
    const char *path = test_path("model.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    options.cast = FST_BF16;
    support_checkpoint(path, NULL, tensors, count, 3);
    write_config(config);
    CHECK_INT(status, fst_load(support_list(path), &options, &model, &error));
    if (!strstr(error.text, what)) test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK(error.offset >= 0);
}

static void check_refused(const support_tensor *tensors, size_t count, const char *config, const char *what) {
    check_status(FST_E_QUANTIZED, tensors, count, config, what);
}

TEST(quantized_packed, a_group_that_there_is_not) {
    static const int32_t bad[2][8] = {{0, 0, 0, 1, 0, 0, 0, 0}, {0, 0, -1, 0, 0, 0, 0, 0}};
    for (int i = 0; i < 2; i++) {
        const support_tensor tensors[] = {{"m.qweight", "I32", "[1,8]", gptq_words, 32},
                                          {"m.qzeros", "I32", "[1,1]", &gptq_zeros, 4},
                                          {"m.scales", "F16", "[1,8]", scales, 16},
                                          {"m.g_idx", "I32", "[8]", bad[i], 32}};
        check_refused(tensors, 4, NULL,
                      i ? "m.g_idx\": column 2 is in group -1" : "m.g_idx\": column 3 is in group 1");
    }
}

TEST(quantized_packed, shapes_that_contradict) {
    static const int64_t shapes[3][2] = {{3, 16}, {2, 24}, {2, -1}};
    for (int i = 0; i < 3; i++) {
        const support_tensor tensors[] = {{"m.weight_packed", "I32", "[2,2]", packed_words, 16},
                                          {"m.weight_shape", "I64", "[2]", shapes[i], 16},
                                          {"m.weight_scale", "BF16", "[2,2]", packed_scales, 8}};
        check_refused(tensors, 3, four_bits, "m.weight_shape");
    }
}

TEST(quantized_packed, groups_that_do_not_divide) {
    static const int64_t shape[2] = {2, 15};
    const support_tensor tensors[] = {{"m.weight_packed", "I32", "[2,2]", packed_words, 16},
                                      {"m.weight_shape", "I64", "[2]", shape, 16},
                                      {"m.weight_scale", "BF16", "[2,2]", packed_scales, 8}};
    check_refused(tensors, 3, four_bits, "2 groups do not divide 15 columns");
}

TEST(quantized_packed, zero_points_of_another_shape) {
    static const int64_t shape[2] = {2, 16};
    const support_tensor tensors[] = {{"m.weight_packed", "I32", "[2,2]", packed_words, 16},
                                      {"m.weight_shape", "I64", "[2]", shape, 16},
                                      {"m.weight_scale", "BF16", "[2,2]", packed_scales, 8},
                                      {"m.weight_zero_point", "I32", "[2,1]", packed_zeros, 8}};
    check_refused(tensors, 4, four_bits, "m.weight_zero_point");
}

TEST(quantized_packed, a_group_size_that_contradicts) {
    const support_tensor tensors[] = {{"m.qweight", "I32", "[1,8]", gptq_words, 32},
                                      {"m.qzeros", "I32", "[1,1]", &gptq_zeros, 4},
                                      {"m.scales", "F16", "[1,8]", scales, 16}};
    check_refused(tensors, 3,
                  "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":4}}",
                  "group_size of 4");
}

/* GPTQModel writes those in planes of bits. As stored they load. */
TEST(quantized_packed, gptq_of_five_six_and_seven_bits) {
    static const uint32_t words[7 * 32], zeros[7] = {0};
    for (unsigned bits = 5; bits <= 7; bits++) {
        char shape[2][32], text[64];
        fst_model *model = NULL;
        fst_error error;
        fst_options options = support_options(FST_DEVICE_CPU);
        snprintf(shape[0], sizeof shape[0], "[%u,32]", bits);
        snprintf(shape[1], sizeof shape[1], "[1,%u]", bits);
        const support_tensor tensors[] = {{"m.qweight", "I32", shape[0], words, bits * 128},
                                          {"m.qzeros", "I32", shape[1], zeros, bits * 4},
                                          {"m.scales", "F32", "[1,32]", one_each, 128}};
        snprintf(text, sizeof text, "m.qweight\": GPTQ of %u bits is not dequantized", bits);
        check_status(FST_E_UNSUPPORTED, tensors, 3, NULL, text);
        CHECK_INT(FST_OK, fst_load(support_list(test_path("model.safetensors")), &options, &model, &error));
        CHECK_INT(3, fst_model_count(model));
        fst_model_free(model);
    }
}

/* 12 columns of 3 bits are two words in both layouts. */
TEST(quantized_packed, columns_too_few_to_tell_the_layout) {
    static const int64_t shape[2] = {1, 12};
    static const uint32_t words[2] = {0x78FAC688, 0x0000000C};
    const support_tensor tensors[] = {{"m.weight_packed", "I32", "[1,2]", words, 8},
                                      {"m.weight_shape", "I64", "[2]", shape, 16},
                                      {"m.weight_scale", "F32", "[1,1]", one_each, 4}};
    check_refused(
        tensors, 3,
        "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"config_groups\":{\"g\":"
        "{\"weights\":{\"num_bits\":3}}}}}",
        "12 columns of 3 bits are as many words in both of the layouts");
}
