/* Recognition of quantized checkpoints: by names, dtypes, shapes and config.json. quant-formats: docs/quantized.md. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "model.h"
#include "scheme.h"
#include "support.h"

enum { MOST = 24 };

typedef struct spec {
    const char *name, *dtype, *shape;
} spec;

static uint64_t bytes_of(const spec *t) {
    uint64_t bits = fst_dtype_bits(fst_dtype_from_name(t->dtype)), count = 1;
    for (const char *at = t->shape + 1; *at && *at != ']'; at += strcspn(at, ",]"), at += *at == ',')
        count *= strtoull(at, NULL, 10);
    return count * bits / 8;
}

/* A checkpoint of zeros with these tensors, in a directory of the case's. */
static const char *write_file(const char *name, const spec *tensors, size_t count) {
    static unsigned char zeros[1 << 20];
    support_tensor list[MOST];
    const char *path = test_path(name);
    for (size_t i = 0; i < count; i++) {
        list[i] = (support_tensor){tensors[i].name, tensors[i].dtype, tensors[i].shape, zeros,
                                   bytes_of(&tensors[i])};
        if (list[i].nbytes > sizeof zeros) test_fail(__FILE__, __LINE__, "%s is too large", tensors[i].name);
    }
    support_checkpoint(path, NULL, list, count, 0);
    return path;
}

static fst_model *open_it(const spec *tensors, size_t count, const char *config) {
    const char *files[] = {write_file("model.safetensors", tensors, count), NULL};
    fst_model *model;
    fst_error error;
    if (config) support_write(test_path("config.json"), config, strlen(config));
    else remove(test_path("config.json"));
    CHECK_INT(FST_OK, fst_open(files, NULL, &model, &error));
    return model;
}

#define SPECS(...) (const spec[]){__VA_ARGS__}, sizeof((const spec[]){__VA_ARGS__}) / sizeof(spec)

/* The tensor `codes` holds a weight `name` in this format, and its companions are these (joined by blanks). */
static void check_weight(const fst_model *model, const char *codes, const char *format, const char *name,
                         const char *companions) {
    fst_quantization q;
    char list[400] = "";
    const fst_error *wrong = fst_model_quantization_error(model);
    if (wrong) test_fail(__FILE__, __LINE__, "%s", wrong->text);
    CHECK_INT(FST_OK, fst_model_quantization(model, fst_model_index(model, codes), &q));
    for (size_t i = 0; i < q.companions_count; i++) {
        fst_tensor tensor;
        CHECK_INT(FST_OK, fst_model_at(model, q.companions[i], &tensor));
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? " " : "", tensor.name);
    }
    CHECK_STR(format, q.format);
    CHECK_STR(name, q.name);
    CHECK_STR(companions, list);
}

static const fst_quantized *weight_of(const fst_model *model, const char *codes) {
    return &model->scheme->weights[model->scheme->owner[fst_model_index(model, codes)]];
}

static void check_matrix(const fst_quantized *w, uint64_t stack, uint64_t rows, uint64_t cols,
                         uint64_t block_rows, uint64_t block_cols) {
    CHECK_INT(stack, w->stack);
    CHECK_INT(rows, w->rows);
    CHECK_INT(cols, w->cols);
    CHECK_INT(block_rows, w->block_rows);
    CHECK_INT(block_cols, w->block_cols);
}

/* Opens, and expects the model's quantization to be refused with this status and these words. */
static void check_refused(const spec *tensors, size_t count, const char *config, fst_status status,
                          const char *words) {
    fst_model *model = open_it(tensors, count, config);
    const fst_error *wrong = fst_model_quantization_error(model);
    if (!wrong) test_fail(__FILE__, __LINE__, "nothing is wrong, want \"%s\"", words);
    if (wrong->status != status || !strstr(wrong->text, words))
        test_fail(__FILE__, __LINE__, "want %s \"%s\", got %s \"%s\"", fst_status_name(status), words,
                  fst_status_name(wrong->status), wrong->text);
    /* As stored it loads nevertheless, and with a cast it is refused before any data is read. */
    const char *files[] = {test_path("model.safetensors"), NULL};
    fst_options options = FST_OPTIONS_INIT;
    fst_model *loaded;
    fst_error error;
    options.device = FST_DEVICE_CPU;
    CHECK_INT(FST_OK, fst_load(files, &options, &loaded, &error));
    fst_model_free(loaded);
    options.cast = FST_BF16;
    CHECK_INT(status, fst_load(files, &options, &loaded, &error));
    CHECK_STR(wrong->text, error.text);
    fst_model_free(model);
}

/* ---- 8-bit floats ---- */

TEST(scheme, fp8_blocks_of_deepseek) {
    fst_model *model =
        open_it(SPECS({"m.weight", "F8_E4M3", "[300,200]"}, {"m.weight_scale_inv", "F32", "[3,2]"},
                      {"norm.weight", "BF16", "[200]"}),
                "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}");
    check_weight(model, "m.weight", "fp8-block", "m.weight", "m.weight_scale_inv");
    check_matrix(weight_of(model, "m.weight"), 1, 300, 200, 128, 128);
    CHECK_STR("fp8", model->scheme->method);
    fst_quantization q;
    CHECK_INT(FST_E_NOT_FOUND, fst_model_quantization(model, fst_model_index(model, "norm.weight"), &q));
    CHECK_INT(FST_E_NOT_FOUND,
              fst_model_quantization(model, fst_model_index(model, "m.weight_scale_inv"), &q));
    fst_model_free(model);
}

TEST(scheme, fp8_blocks_of_another_size) {
    fst_model *model =
        open_it(SPECS({"m.weight", "F8_E4M3", "[3,5]"}, {"m.weight_scale_inv", "BF16", "[2,3]"}),
                "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[2,2]}}");
    check_weight(model, "m.weight", "fp8-block", "m.weight", "m.weight_scale_inv");
    check_matrix(weight_of(model, "m.weight"), 1, 3, 5, 2, 2);
    CHECK_INT(0, weight_of(model, "m.weight")->flags & FST_Q_DIVIDE);
    fst_model_free(model);
}

TEST(scheme, fp8_inverse_scales_divide) {
    fst_model *model = open_it(
        SPECS({"m.weight", "F8_E4M3", "[4,4]"}, {"m.weight_scale_inv", "F32", "[]"}),
        "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_scale_semantics\":\"inverse\"}}");
    check_weight(model, "m.weight", "fp8-tensor", "m.weight", "m.weight_scale_inv");
    CHECK_INT(FST_Q_DIVIDE, weight_of(model, "m.weight")->flags & FST_Q_DIVIDE);
    fst_model_free(model);
}

TEST(scheme, fp8_with_scales_of_every_shape) {
    static const struct {
        const char *weight, *scale, *dtype, *format;
        uint64_t block_rows, block_cols;
    } cases[] = {
        {"[6,64]", "[]", "F32", "fp8-tensor", 6, 64},
        {"[6,64]", "[1]", "BF16", "fp8-tensor", 6, 64},
        {"[6,64]", "[6]", "F32", "fp8-row", 1, 64},
        {"[6,64]", "[6,1]", "BF16", "fp8-row", 1, 64},
        {"[6,64]", "[1,1,1,1]", "F32", "fp8-tensor", 6, 64},
        {"[300,256]", "[3,1,2,1]", "F32", "fp8-block", 128, 128},
        {"[6,64]", "[6,2]", "U8", "mxfp8", 1, 32},
        {"[6,64]", "[6,2]", "F8_E8M0", "mxfp8", 1, 32},
        {"[6,64]", "[6,4]", "F16", "fp8-group", 1, 16},
        {"[1,64]", "[1]", "F32", "fp8-tensor", 1, 64},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const spec tensors[] = {{"m.weight", "F8_E4M3", cases[i].weight},
                                {"m.weight_scale", cases[i].dtype, cases[i].scale},
                                {"m.input_scale", "F32", "[]"}};
        fst_model *model = open_it(tensors, 3, NULL);
        check_weight(model, "m.weight", cases[i].format, "m.weight", "m.weight_scale");
        const fst_quantized *w = weight_of(model, "m.weight");
        CHECK_INT(cases[i].block_rows, w->block_rows);
        CHECK_INT(cases[i].block_cols, w->block_cols);
        CHECK_INT(FST_ROLE_KEPT, model->scheme->roles[fst_model_index(model, "m.input_scale")]);
        fst_model_free(model);
    }
}

TEST(scheme, fp8_experts_in_a_stack) {
    fst_model *model = open_it(
        SPECS({"e.gate_up_proj", "F8_E4M3", "[2,256,130]"}, {"e.gate_up_proj_scale_inv", "F32", "[2,2,2]"},
              {"e.down_proj", "F8_E4M3", "[2,130,256]"}, {"e.down_proj_scale", "F32", "[2,130,1]"},
              {"f.gate_up_proj", "F8_E4M3", "[2,16,32]"}, {"f.gate_up_proj_scale", "F32", "[2,1,32]"},
              {"f.down_proj", "F8_E4M3", "[2,16,32]"}, {"f.down_proj_scale_inv", "F32", "[2,1,1]"}),
        NULL);
    check_weight(model, "e.gate_up_proj", "fp8-block", "e.gate_up_proj", "e.gate_up_proj_scale_inv");
    check_matrix(weight_of(model, "e.gate_up_proj"), 2, 256, 130, 128, 128);
    check_weight(model, "e.down_proj", "fp8-row", "e.down_proj", "e.down_proj_scale");
    check_weight(model, "f.gate_up_proj", "fp8-column", "f.gate_up_proj", "f.gate_up_proj_scale");
    check_weight(model, "f.down_proj", "fp8-tensor", "f.down_proj", "f.down_proj_scale_inv");
    fst_model_free(model);
}

/* Whether of rows or of columns, a square does not tell. */
TEST(scheme, a_vector_of_scales_beside_square_experts) {
    check_refused(SPECS({"e.up_proj", "F8_E4M3", "[2,16,16]"}, {"e.up_proj_scale", "F32", "[2,16]"}), NULL,
                  FST_E_QUANTIZED, "does not belong");
}

TEST(scheme, deepseek_v4_names) {
    fst_model *model =
        open_it(SPECS({"a.weight", "F8_E4M3", "[256,128]"}, {"a.scale", "F8_E8M0", "[2,1]"},
                      {"w1.weight", "I8", "[4,32]"}, {"w1.scale", "F8_E8M0", "[4,2]"}),
                "{\"quantization_config\":{\"quant_method\":\"fp8\",\"scale_fmt\":\"ue8m0\"}}");
    check_weight(model, "a.weight", "fp8-block", "a.weight", "a.scale");
    check_weight(model, "w1.weight", "mxfp4", "w1.weight", "w1.scale");
    check_matrix(weight_of(model, "w1.weight"), 1, 4, 64, 1, 32);
    fst_model_free(model);
}

TEST(scheme, fp8_without_a_scale_is_a_plain_float) {
    fst_model *model = open_it(SPECS({"m.weight", "F8_E4M3", "[4,4]"}), NULL);
    CHECK_INT(0, model->scheme->count);
    CHECK_INT(1, model->scheme->bare);
    CHECK(!fst_model_quantization_error(model));
    fst_model_free(model);
}

/* ---- Other formats ---- */

TEST(scheme, int8) {
    fst_model *model = open_it(SPECS({"a.weight", "I8", "[4,8]"}, {"a.weight_scale", "BF16", "[4,1]"},
                                     {"a.weight_zero_point", "I8", "[4,1]"}, {"b.weight", "I8", "[4,8]"},
                                     {"b.weight_scale", "F32", "[4]"}, {"c.weight", "I8", "[4,8]"},
                                     {"c.SCB", "F32", "[4]"}, {"c.weight_format", "U8", "[]"}),
                               NULL);
    check_weight(model, "a.weight", "int8", "a.weight", "a.weight_scale a.weight_zero_point");
    check_weight(model, "b.weight", "int8", "b.weight", "b.weight_scale");
    check_weight(model, "c.weight", "bnb-int8", "c.weight", "c.SCB c.weight_format");
    fst_model_free(model);
}

TEST(scheme, mxfp4_and_nvfp4) {
    fst_model *model =
        open_it(SPECS({"e.up_blocks", "U8", "[2,6,3,16]"}, {"e.up_scales", "U8", "[2,6,3]"},
                      {"e.up_bias", "BF16", "[2,6]"}, {"b.mlp1_weight.blocks", "U8", "[2,6,3,16]"},
                      {"b.mlp1_weight.scales", "U8", "[2,6,3]"}, {"q.weight", "U8", "[4,32]"},
                      {"q.weight_scale", "U8", "[4,2]"}, {"c.weight_packed", "U8", "[4,32]"},
                      {"c.weight_scale", "U8", "[4,2]"}, {"n.weight", "U8", "[4,32]"},
                      {"n.weight_scale", "F8_E4M3", "[4,4]"}, {"n.weight_scale_2", "F32", "[]"},
                      {"n.input_scale", "F32", "[]"}, {"p.weight_packed", "U8", "[4,32]"},
                      {"p.weight_scale", "F8_E4M3", "[4,4]"}, {"p.weight_global_scale", "F32", "[1]"},
                      {"p.input_global_scale", "F32", "[1]"}),
                NULL);
    check_weight(model, "e.up_blocks", "mxfp4", "e.up", "e.up_scales");
    check_matrix(weight_of(model, "e.up_blocks"), 2, 6, 96, 1, 32);
    check_weight(model, "b.mlp1_weight.blocks", "mxfp4", "b.mlp1_weight", "b.mlp1_weight.scales");
    check_weight(model, "q.weight", "mxfp4", "q.weight", "q.weight_scale");
    check_weight(model, "c.weight_packed", "mxfp4", "c.weight", "c.weight_scale");
    check_weight(model, "n.weight", "nvfp4", "n.weight", "n.weight_scale n.weight_scale_2");
    check_weight(model, "p.weight_packed", "nvfp4", "p.weight", "p.weight_scale p.weight_global_scale");
    CHECK_INT(0, weight_of(model, "n.weight")->flags & FST_Q_DIVIDE);
    CHECK_INT(FST_Q_DIVIDE, weight_of(model, "p.weight_packed")->flags & FST_Q_DIVIDE);
    CHECK_INT(FST_ROLE_KEPT, model->scheme->roles[fst_model_index(model, "p.input_global_scale")]);
    CHECK_INT(FST_ROLE_PLAIN, model->scheme->roles[fst_model_index(model, "e.up_bias")]);
    fst_model_free(model);
}

TEST(scheme, packed_integers) {
    fst_model *model = open_it(
        SPECS({"a.weight_packed", "I32", "[8,16]"}, {"a.weight_shape", "I64", "[2]"},
              {"a.weight_scale", "BF16", "[8,4]"}, {"a.weight_zero_point", "I32", "[1,4]"},
              {"a.weight_g_idx", "I32", "[128]"}),
        "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":"
        "{\"group_0\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"int\",\"group_size\":32}}}}}");
    check_weight(model, "a.weight_packed", "int-packed", "a.weight",
                 "a.weight_shape a.weight_scale a.weight_zero_point a.weight_g_idx");
    CHECK_INT(4, weight_of(model, "a.weight_packed")->bits);
    CHECK_INT(1, weight_of(model, "a.weight_packed")->has_state);
    fst_model_free(model);
}

TEST(scheme, gptq_of_all_widths) {
    static const struct {
        const char *qweight, *qzeros;
        unsigned bits;
    } cases[] = {
        {"[8,64]", "[2,4]", 2}, {"[12,64]", "[2,6]", 3}, {"[16,64]", "[2,8]", 4}, {"[32,64]", "[2,16]", 8}};
    for (size_t i = 0; i < 4; i++) {
        const spec tensors[] = {{"m.qweight", "I32", cases[i].qweight},
                                {"m.qzeros", "I32", cases[i].qzeros},
                                {"m.scales", "F16", "[2,64]"},
                                {"m.g_idx", "I32", "[128]"}};
        fst_model *model = open_it(tensors, 4, NULL);
        check_weight(model, "m.qweight", "gptq", "m.weight", "m.qzeros m.scales m.g_idx");
        CHECK_INT(cases[i].bits, weight_of(model, "m.qweight")->bits);
        check_matrix(weight_of(model, "m.qweight"), 1, 64, 128, 1, 64);
        CHECK_INT(FST_Q_ZERO_PLUS_ONE, weight_of(model, "m.qweight")->flags);
        fst_model_free(model);
    }
}

TEST(scheme, gptq_versions_of_zero_points) {
    static const struct {
        const char *config;
        unsigned flags;
    } cases[] = {
        {"{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":\"gptq_v2\"}}",
         0},
        {"{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":\"gptq\"}}",
         FST_Q_ZERO_PLUS_ONE},
        {"{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"meta\":{\"quantizer\":[\"gptqmodel:2.0\"]}}}",
         FST_Q_ZERO_PLUS_ONE | FST_Q_CARRY},
    };
    for (size_t i = 0; i < 3; i++) {
        fst_model *model = open_it(SPECS({"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[1,8]"},
                                         {"m.scales", "F16", "[1,64]"}),
                                   cases[i].config);
        check_weight(model, "m.qweight", "gptq", "m.weight", "m.qzeros m.scales");
        CHECK_INT(cases[i].flags, weight_of(model, "m.qweight")->flags);
        fst_model_free(model);
    }
}

TEST(scheme, gptq_by_its_own_file) {
    const char *text = "{\"bits\":4,\"group_size\":64,\"desc_act\":false}";
    support_write(test_path("quantize_config.json"), text, strlen(text));
    fst_model *model = open_it(
        SPECS({"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[2,8]"}, {"m.scales", "F16", "[2,64]"}),
        "{\"model_type\":\"llama\"}");
    check_weight(model, "m.qweight", "gptq", "m.weight", "m.qzeros m.scales");
    CHECK_STR("gptq", model->scheme->method);
    fst_model_free(model);
}

TEST(scheme, awq_is_told_from_gptq_by_its_shape) {
    fst_model *model = open_it(
        SPECS({"m.qweight", "I32", "[128,8]"}, {"m.qzeros", "I32", "[2,8]"}, {"m.scales", "F16", "[2,64]"}),
        NULL);
    check_weight(model, "m.qweight", "awq", "m.weight", "m.qzeros m.scales");
    check_matrix(weight_of(model, "m.qweight"), 1, 64, 128, 1, 64);
    fst_model_free(model);
}

TEST(scheme, int4_of_modelopt_and_quark) {
    fst_model *model =
        open_it(SPECS({"a.weight", "U8", "[4,256]"}, {"a.weight_scale", "BF16", "[8,2]"},
                      {"a.pre_quant_scale", "BF16", "[256]"}, {"b.weight", "I32", "[128,4]"},
                      {"b.weight_scale", "F16", "[4,30]"}, {"b.weight_zero_point", "I32", "[4,4]"}),
                NULL);
    check_weight(model, "a.weight", "int4-rows", "a.weight", "a.weight_scale");
    check_matrix(weight_of(model, "a.weight"), 1, 8, 256, 1, 128);
    check_weight(model, "b.weight", "int4-quark", "b.weight", "b.weight_scale b.weight_zero_point");
    check_matrix(weight_of(model, "b.weight"), 1, 30, 128, 1, 32);
    fst_model_free(model);
}

TEST(scheme, bitsandbytes) {
    fst_model *model = open_it(
        SPECS({"a.weight", "U8", "[128,1]"}, {"a.weight.absmax", "F32", "[4]"},
              {"a.weight.quant_map", "F32", "[16]"}, {"a.weight.quant_state.bitsandbytes__nf4", "U8", "[80]"},
              {"b.weight", "BF16", "[64,1]"}, {"b.weight.absmax", "U8", "[4]"},
              {"b.weight.quant_map", "F32", "[16]"}, {"b.weight.nested_absmax", "F32", "[1]"},
              {"b.weight.nested_quant_map", "F32", "[256]"},
              {"b.weight.quant_state.bitsandbytes__fp4", "U8", "[80]"}),
        NULL);
    check_weight(model, "a.weight", "bnb-nf4", "a.weight",
                 "a.weight.quant_state.bitsandbytes__nf4 a.weight.absmax a.weight.quant_map");
    check_weight(
        model, "b.weight", "bnb-fp4", "b.weight",
        "b.weight.quant_state.bitsandbytes__fp4 b.weight.absmax b.weight.quant_map b.weight.nested_absmax "
        "b.weight.nested_quant_map");
    fst_model_free(model);
}

TEST(scheme, companions_in_another_file) {
    const char *files[] = {write_file("z.safetensors", SPECS({"m.weight", "F8_E4M3", "[4,4]"})),
                           write_file("a.safetensors", SPECS({"m.weight_scale", "F32", "[]"})), NULL};
    fst_model *model;
    CHECK_INT(FST_OK, fst_open(files, NULL, &model, NULL));
    check_weight(model, "m.weight", "fp8-tensor", "m.weight", "m.weight_scale");
    fst_model_free(model);
}

TEST(scheme, config_that_is_named_and_none) {
    const spec tensors[] = {
        {"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[1,8]"}, {"m.scales", "F16", "[1,64]"}};
    const char *awq = "{\"quantization_config\":{\"quant_method\":\"awq\"}}";
    const char *v2 =
        "{\"quantization_config\":{\"quant_method\":\"gptq\",\"checkpoint_format\":\"gptq_v2\"}}";
    const char *files[] = {write_file("m.safetensors", tensors, 3), NULL};
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model;
    support_write(test_path("config.json"), awq, strlen(awq));
    support_write(test_path("other.json"), v2, strlen(v2));
    CHECK_INT(FST_OK, fst_open(files, NULL, &model, NULL));
    CHECK_INT(FST_E_QUANTIZED, fst_model_quantization_error(model)->status);
    fst_model_free(model);
    options.config = test_path("other.json");
    CHECK_INT(FST_OK, fst_open(files, &options, &model, NULL));
    check_weight(model, "m.qweight", "gptq", "m.weight", "m.qzeros m.scales");
    CHECK_INT(0, weight_of(model, "m.qweight")->flags);
    fst_model_free(model);
    options.config = "";
    CHECK_INT(FST_OK, fst_open(files, &options, &model, NULL));
    check_weight(model, "m.qweight", "gptq", "m.weight", "m.qzeros m.scales");
    CHECK_STR("", model->scheme->method);
    fst_model_free(model);
    options.config = test_path("missing.json");
    CHECK_INT(FST_OK, fst_open(files, &options, &model, NULL));
    CHECK_INT(FST_E_IO, fst_model_quantization_error(model)->status);
    CHECK(strstr(fst_model_quantization_error(model)->path, "missing.json"));
    fst_model_free(model);
}

/* ---- What goes wrong ---- */

TEST(scheme, scales_of_activations_are_kept_in_a_cast) {
    const char *files[] = {
        write_file("m.safetensors", SPECS({"a.k_scale", "F32", "[]"}, {"a.weight", "F32", "[4]"},
                                          {"a.input_scale", "F32", "[1]"})),
        NULL};
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model;
    fst_tensor tensor;
    options.device = FST_DEVICE_CPU;
    options.cast = FST_BF16;
    CHECK_INT(FST_OK, fst_load(files, &options, &model, NULL));
    CHECK_INT(FST_OK, fst_model_find(model, "a.k_scale", &tensor));
    CHECK_INT(FST_F32, tensor.dtype);
    CHECK_INT(FST_OK, fst_model_find(model, "a.input_scale", &tensor));
    CHECK_INT(FST_F32, tensor.dtype);
    CHECK_INT(FST_OK, fst_model_find(model, "a.weight", &tensor));
    CHECK_INT(FST_BF16, tensor.dtype);
    fst_model_free(model);
}

TEST(scheme, companions_that_are_missing) {
    check_refused(SPECS({"m.qweight", "I32", "[16,64]"}, {"m.scales", "F16", "[1,64]"}), NULL,
                  FST_E_QUANTIZED, "qzeros is missing");
    check_refused(SPECS({"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[1,8]"}), NULL, FST_E_QUANTIZED,
                  "scales is missing");
    check_refused(SPECS({"m.weight_packed", "I32", "[8,16]"}, {"m.weight_scale", "BF16", "[8,4]"}), NULL,
                  FST_E_QUANTIZED, "weight_shape is missing");
    check_refused(SPECS({"m.weight_packed", "U8", "[8,16]"}), NULL, FST_E_QUANTIZED,
                  "weight_scale is missing");
    check_refused(SPECS({"m.weight", "U8", "[4,32]"}, {"m.weight_scale", "F8_E4M3", "[4,4]"}), NULL,
                  FST_E_QUANTIZED, "global scale is missing");
    check_refused(SPECS({"m.weight", "U8", "[4]"}, {"m.weight.quant_state.bitsandbytes__nf4", "U8", "[9]"}),
                  NULL, FST_E_QUANTIZED, "absmax is missing");
    check_refused(SPECS({"m.weight", "U8", "[4]"}, {"m.weight.absmax", "U8", "[1]"},
                        {"m.weight.quant_map", "F32", "[16]"}, {"m.weight.nested_absmax", "F32", "[1]"},
                        {"m.weight.quant_state.bitsandbytes__nf4", "U8", "[9]"}),
                  NULL, FST_E_QUANTIZED, "nested_quant_map is missing");
    check_refused(SPECS({"m.weight.quant_state.bitsandbytes__nf4", "U8", "[9]"}), NULL, FST_E_QUANTIZED,
                  "missing");
    check_refused(SPECS({"a.weight", "F8_E4M3", "[4,4]"}, {"a.weight_scale", "F32", "[]"},
                        {"m.weight_scale", "F32", "[]"}),
                  NULL, FST_E_QUANTIZED, "missing, or does not take it");
}

/* What says that a checkpoint is quantized: another weight, or the configuration. */
TEST(scheme, codes_whose_companions_are_all_missing) {
#define ANOTHER {"a.weight", "F8_E4M3", "[4,4]"}, {"a.weight_scale", "F32", "[]"}
    check_refused(SPECS(ANOTHER, {"m_blocks", "U8", "[2,6,3,16]"}), NULL, FST_E_QUANTIZED,
                  "scales is missing");
    check_refused(SPECS(ANOTHER, {"m.blocks", "U8", "[6,3,16]"}), NULL, FST_E_QUANTIZED, "scales is missing");
    check_refused(SPECS(ANOTHER, {"m_scales", "U8", "[2,6,3]"}), NULL, FST_E_QUANTIZED, "does not take it");
    check_refused(SPECS(ANOTHER, {"m.scales", "U8", "[6,3]"}), NULL, FST_E_QUANTIZED, "does not take it");
    check_refused(SPECS(ANOTHER, {"m.weight", "I8", "[4,4]"}), NULL, FST_E_QUANTIZED,
                  "weight_scale is missing");
    check_refused(SPECS(ANOTHER, {"m.weight", "U8", "[4,16]"}, {"m.weight_scale_2", "F32", "[]"}), NULL,
                  FST_E_QUANTIZED, "is missing");
    check_refused(SPECS(ANOTHER, {"m.weight", "I32", "[4,4]"}), NULL, FST_E_QUANTIZED,
                  "weight_scale is missing");
    check_refused(SPECS(ANOTHER, {"m.weight_format", "U8", "[]"}), NULL, FST_E_QUANTIZED, "does not take it");
    check_refused(SPECS(ANOTHER, {"m.g_idx", "I32", "[4]"}), NULL, FST_E_QUANTIZED, "does not take it");
    check_refused(SPECS({"m_blocks", "U8", "[2,6,3,16]"}),
                  "{\"quantization_config\":{\"quant_method\":\"mxfp4\"}}", FST_E_QUANTIZED,
                  "scales is missing");
#undef ANOTHER
}

/* Without either, integers are integers. */
TEST(scheme, integers_alone_are_no_codes) {
    fst_model *model = open_it(
        SPECS({"m_blocks", "U8", "[2,6,3,16]"}, {"m.weight", "I8", "[4,4]"}, {"n_scales", "U8", "[4]"}),
        NULL);
    CHECK(!fst_model_quantization_error(model));
    CHECK_INT(0, model->scheme->count);
    fst_model_free(model);
}

TEST(scheme, companions_of_the_wrong_shape_or_dtype) {
    check_refused(SPECS({"m.weight", "F8_E4M3", "[300,200]"}, {"m.weight_scale_inv", "F32", "[2,2]"}), NULL,
                  FST_E_QUANTIZED, "does not belong");
    check_refused(SPECS({"m.weight", "F8_E4M3", "[300,200]"}, {"m.weight_scale_inv", "I32", "[3,2]"}), NULL,
                  FST_E_QUANTIZED, "does not belong");
    check_refused(SPECS({"m.weight", "F8_E4M3", "[300]"}, {"m.weight_scale", "F32", "[300]"}), NULL,
                  FST_E_QUANTIZED, "no matrix");
    check_refused(SPECS({"m.weight", "BF16", "[4,4]"}, {"m.weight_scale", "F32", "[4]"},
                        {"n.weight", "I8", "[4,4]"}, {"n.weight_scale", "F32", "[3]"}),
                  NULL, FST_E_QUANTIZED, "does not belong");
    check_refused(SPECS({"m.weight", "I8", "[4,8]"}, {"m.weight_scale", "F32", "[4]"},
                        {"m.weight_zero_point", "I8", "[3]"}),
                  NULL, FST_E_QUANTIZED, "as many as there are scales");
    check_refused(SPECS({"m_blocks", "U8", "[2,6,3,15]"}, {"m_scales", "U8", "[2,6,3]"}), NULL,
                  FST_E_QUANTIZED, "16]");
    check_refused(SPECS({"m_blocks", "U8", "[2,6,3,16]"}, {"m_scales", "U8", "[2,6,4]"}), NULL,
                  FST_E_QUANTIZED, "does not belong");
    check_refused(
        SPECS({"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[2,8]"}, {"m.scales", "F16", "[1,64]"}),
        NULL, FST_E_QUANTIZED, "does not belong");
    check_refused(
        SPECS({"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[1,18]"}, {"m.scales", "F16", "[1,64]"}),
        NULL, FST_E_QUANTIZED, "bits a column");
    check_refused(
        SPECS({"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[3,8]"}, {"m.scales", "F16", "[3,64]"}),
        NULL, FST_E_QUANTIZED, "divides");
    check_refused(SPECS({"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[1,8]"},
                        {"m.scales", "F16", "[1,64]"}, {"m.g_idx", "I32", "[64]"}),
                  NULL, FST_E_QUANTIZED, "one for each row");
    check_refused(SPECS({"m.weight_packed", "I32", "[8,16]"}, {"m.weight_shape", "I64", "[3]"},
                        {"m.weight_scale", "BF16", "[8,4]"}),
                  NULL, FST_E_QUANTIZED, "extent a dimension");
    check_refused(SPECS({"m.weight_packed", "I32", "[8,16]"}, {"m.weight_shape", "I64", "[2]"},
                        {"m.weight_scale", "BF16", "[7,4]"}),
                  NULL, FST_E_QUANTIZED, "[rows, groups]");
}

TEST(scheme, companions_of_bitsandbytes_of_the_wrong_shape_or_dtype) {
    check_refused(SPECS({"m.weight", "U8", "[4]"}, {"m.weight.absmax", "F16", "[1]"},
                        {"m.weight.quant_map", "F32", "[16]"},
                        {"m.weight.quant_state.bitsandbytes__nf4", "U8", "[9]"}),
                  NULL, FST_E_QUANTIZED, "U8 when nested");
    check_refused(SPECS({"m.weight", "U8", "[4]"}, {"m.weight.absmax", "F32", "[1]"},
                        {"m.weight.quant_map", "F32", "[15]"},
                        {"m.weight.quant_state.bitsandbytes__nf4", "U8", "[9]"}),
                  NULL, FST_E_QUANTIZED, "16 of them");
    check_refused(SPECS({"m.weight", "I8", "[4,8]"}, {"m.SCB", "F32", "[8]"}), NULL, FST_E_QUANTIZED,
                  "one a row");
}

TEST(scheme, names_and_configuration_that_contradict) {
    const spec gptq[] = {
        {"m.qweight", "I32", "[16,64]"}, {"m.qzeros", "I32", "[1,8]"}, {"m.scales", "F16", "[1,64]"}};
    const spec awq[] = {
        {"m.qweight", "I32", "[128,8]"}, {"m.qzeros", "I32", "[2,8]"}, {"m.scales", "F16", "[2,64]"}};
    check_refused(gptq, 3, "{\"quantization_config\":{\"quant_method\":\"awq\"}}", FST_E_QUANTIZED,
                  "GPTQ's, but the configuration says \"awq\"");
    check_refused(awq, 3, "{\"quantization_config\":{\"quant_method\":\"gptq\"}}", FST_E_QUANTIZED,
                  "AWQ's, but the configuration says \"gptq\"");
    check_refused(gptq, 3, "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":3}}",
                  FST_E_QUANTIZED, "4 bits, the configuration says 3");
    check_refused(awq, 3, "{\"quantization_config\":{\"quant_method\":\"awq\",\"bits\":8}}", FST_E_QUANTIZED,
                  "4 bits, the configuration says 8");
    static const char *const others[] = {"fp8", "mxfp4", "bitsandbytes", "compressed-tensors", "modelopt"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        char config[100];
        snprintf(config, sizeof config, "{\"quantization_config\":{\"quant_method\":\"%s\"}}", others[i]);
        check_refused(gptq, 3, config, FST_E_QUANTIZED, "GPTQ's, but the configuration says");
        check_refused(awq, 3, config, FST_E_QUANTIZED, "AWQ's, but the configuration says");
    }
    for (int i = 0; i < 2; i++) {
        const char *config = i ? "{\"quantization_config\":{\"quant_method\":\"awq\"}}"
                               : "{\"quantization_config\":{\"quant_method\":\"gptq\"}}";
        check_refused(SPECS({"m.weight", "F8_E4M3", "[4,4]"}, {"m.weight_scale", "F32", "[]"}), config,
                      FST_E_QUANTIZED, "8-bit float's, but the configuration says");
        check_refused(SPECS({"m_blocks", "U8", "[2,6,3,16]"}, {"m_scales", "U8", "[2,6,3]"}), config,
                      FST_E_QUANTIZED, "MXFP4's, but the configuration says");
    }
}

TEST(scheme, methods_that_are_refused_by_name) {
    static const char *const configs[] = {
        "{\"quantization_config\":{\"quant_method\":\"torchao\"}}",
        "{\"quantization_config\":{\"quant_method\":\"hqq\"}}",
        "{\"quantization_config\":{\"quant_method\":\"aqlm\"}}",
        "{\"quantization_config\":{\"quant_method\":\"exl3\"}}",
        "{\"quantization_config\":{\"quant_method\":\"bitnet\"}}",
        "{\"quantization_config\":{\"quant_method\":\"squeeze\"}}",
        "{\"quantization_config\":{\"quant_method\":\"gptq\",\"checkpoint_format\":\"marlin\"}}",
        "{\"quantization_config\":{\"quant_method\":\"gptq\",\"checkpoint_format\":\"gptq_p\"}}",
        "{\"quantization_config\":{\"quant_method\":\"awq\",\"version\":\"gemv_fast\"}}",
        "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"marlin-24\"}}",
        "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"config_groups\":{\"g\":{\"format\":\"sparse-bitmask\"}}}}",
        "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"transform_config\":{\"config_groups\":{\"a\":{}}}}}",
        "{\"quantization_config\":{\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4_SVD\"}}",
    };
    static const char *const words[] = {
        "torchao",  "hqq",    "aqlm",      "exl3",      "bitnet",         "\"squeeze\" is no quant_method",
        "marlin",   "gptq_p", "GEMV_FAST", "marlin-24", "sparse-bitmask", "rotated",
        "NVFP4_SVD"};
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++)
        check_refused(SPECS({"m.weight", "U8", "[4]"}), configs[i], FST_E_UNSUPPORTED, words[i]);
}

TEST(scheme, six_bits_are_refused_by_name) {
    check_refused(SPECS({"m.weight", "U8", "[4,48]"}, {"m.weight_scale", "U8", "[4,2]"}), NULL,
                  FST_E_UNSUPPORTED, "MXFP6");
}

TEST(scheme, a_configuration_that_is_no_json) {
    check_refused(SPECS({"m.weight", "F32", "[4]"}), "{\"quantization_config\":", FST_E_JSON, "not JSON");
}

TEST(scheme, a_companion_of_two_weights) {
    check_refused(SPECS({"m.weight", "F8_E4M3", "[4,4]"}, {"m.scale", "F32", "[]"}, {"m", "F8_E4M3", "[4,4]"},
                        {"m_scale", "F32", "[]"}, {"q.weight", "U8", "[8]"},
                        {"q.weight.absmax", "F32", "[1]"}, {"q.weight.quant_map", "F32", "[16]"},
                        {"q.weight.quant_state.bitsandbytes__nf4", "U8", "[9]"},
                        {"q.weight.quant_state.bitsandbytes__fp4", "U8", "[9]"}),
                  NULL, FST_E_QUANTIZED, "two weights");
}
