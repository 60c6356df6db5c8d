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

/* ---- What goes wrong ---- */

static void check_refused(const support_tensor *tensors, size_t count, const char *config, const char *what) {
    const char *path = test_path("model.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    options.cast = FST_BF16;
    support_checkpoint(path, NULL, tensors, count, 3);
    write_config(config);
    CHECK_INT(FST_E_QUANTIZED, fst_load(support_list(path), &options, &model, &error));
    if (!strstr(error.text, what)) test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK(error.offset >= 0);
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
