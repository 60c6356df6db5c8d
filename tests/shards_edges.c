/* Loads of parts that are easily forgotten: empty ones, and those that several rules meet in. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "fake_comm.h"
#include "harness.h"
#include "shared.h"
#include "support.h"

typedef struct wanted {
    int32_t dim, into_dim;
    uint64_t begin, end;
    const char *into;
    void *scales; /* memory of theirs */
    uint64_t scales_bytes;
} wanted;

static int rule(void *arg, const fst_tensor *tensor, fst_rule *out) {
    const wanted *w = arg;
    if (strstr(tensor->name, "scale")) {
        out->memory = w->scales;
        out->memory_bytes = w->scales_bytes;
        return 0;
    }
    out->shard_dim = w->dim;
    out->shard_begin = w->begin;
    out->shard_end = w->end;
    out->into = w->into;
    out->into_dim = w->into_dim;
    return 0;
}

static fst_model *load_part(const char *path, fst_options *options, wanted *w) {
    fst_model *model;
    fst_error error;
    options->rule = w ? rule : NULL;
    options->rule_arg = w;
    if (fst_load(support_list(path), options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    return model;
}

static void write_config(const char *text) { support_write(test_path("config.json"), text, strlen(text)); }

static const char fp8_config[] =
    "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}";

/* Borders within bytes, of a tensor with more than one matrix, in a result that has others between its rows. */
TEST(shards_edges, parts_of_half_bytes_side_by_side) {
    unsigned char data[2][24];
    support_tensor tensors[] = {{"a", "F4", "[2,4,6]", data[0], 24}, {"b", "F4", "[2,4,6]", data[1], 24}};
    const char *path = test_path("model.safetensors");
    support_random(data, sizeof data, 3);
    support_checkpoint(path, NULL, tensors, 2, 0);
    fst_options options = support_options(FST_DEVICE_CPU);
    options.cast = FST_F32;
    fst_model *whole = load_part(path, &options, NULL);
    for (int32_t into_dim = 1; into_dim < 3; into_dim++) {
        wanted w = {.dim = 2, .begin = 1, .end = 4, .into = "both", .into_dim = into_dim};
        fst_model *model;
        fst_tensor got, all;
        options.rule = rule;
        options.rule_arg = &w;
        CHECK_INT(into_dim == 1 ? FST_E_UNSUPPORTED : FST_OK,
                  fst_load(support_list(path), &options, &model, NULL));
        if (into_dim == 1) continue;
        CHECK_INT(FST_OK, fst_model_find(model, "both", &got));
        for (unsigned t = 0; t < 2; t++)
            for (unsigned i = 0; i < 2 * 4 * 3; i++) {
                CHECK_INT(FST_OK, fst_model_find(whole, t ? "b" : "a", &all));
                CHECK_BYTES((float *)all.data + i / 3 * 6 + i % 3 + 1,
                            (float *)got.data + i / 3 * 6 + t * 3 + i % 3, 4);
            }
        fst_model_free(model);
    }
    fst_model_free(whole);
}

TEST(shards_edges, an_empty_part_of_what_gets_other_scales) {
    static unsigned char codes[3 * 128], scale[4] = {0, 0, 0x80, 0x3f};
    support_tensor tensors[] = {{"m.weight", "F8_E4M3", "[3,128]", codes, sizeof codes},
                                {"m.weight_scale_inv", "F32", "[1,1]", scale, 4}};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 2, 0);
    write_config(fp8_config);
    fst_options options = support_options(FST_DEVICE_CPU);
    options.cast = FST_F8_E4M3;
    options.scale = FST_QUANTIZE_ROW;
    wanted w = {.dim = 0, .begin = 3, .end = 3};
    fst_model *model = load_part(path, &options, &w);
    fst_tensor got;
    CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &got));
    CHECK_INT(0, got.nbytes);
    CHECK_INT(FST_F8_E4M3, got.dtype);
    fst_model_free(model);
}

/* What stays quantized and has no elements. */
TEST(shards_edges, parts_of_quantized_weights_without_elements) {
    static unsigned char scale[4] = {0, 0, 0x80, 0x3f};
    static const char *const shapes[] = {"[0,4]", "[4,0]"};
    const char *path = test_path("model.safetensors");
    write_config("{\"quantization_config\":{\"quant_method\":\"fp8\"}}");
    for (int i = 0; i < 2; i++)
        for (int whole = 0; whole < 2; whole++) {
            support_tensor tensors[] = {{"m.weight", "F8_E4M3", shapes[i], scale, 0},
                                        {"m.weight_scale", "F32", "[]", scale, 4}};
            fst_options options = support_options(FST_DEVICE_CPU);
            fst_model *model;
            fst_error error;
            wanted w = {.dim = 1 - i, .begin = 1, .end = 3};
            support_checkpoint(path, NULL, tensors, 2, 0);
            options.cast = whole ? FST_BF16 : FST_NATIVE;
            options.rule = rule;
            options.rule_arg = &w;
            fst_status status = fst_load(support_list(path), &options, &model, &error);
            if (status && status != FST_E_UNSUPPORTED) test_fail(__FILE__, __LINE__, "%s", error.text);
            fst_model_free(model);
        }
}

TEST(shards_edges, parts_of_stacks_of_no_matrices) {
    static unsigned char none[1];
    support_tensor tensors[] = {{"x.experts.gate_up_proj_blocks", "U8", "[0,4,1,16]", none, 0},
                                {"x.experts.gate_up_proj_scales", "U8", "[0,4,1]", none, 0}};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 2, 0);
    write_config("{\"quantization_config\":{\"quant_method\":\"mxfp4\"}}");
    for (int kept = 0; kept < 2; kept++) {
        fst_options options = support_options(FST_DEVICE_CPU);
        fst_shard_rule rules[] = {{"*gate_up_proj_blocks", 1, 1}, {NULL, 0, 0}};
        fst_model *model;
        fst_error error;
        options.cast = kept ? FST_NATIVE : FST_BF16;
        options.shards = rules;
        options.ranks = 2;
        fst_status status = fst_load(support_list(path), &options, &model, &error);
        if (status != (kept ? FST_E_UNSUPPORTED : FST_OK)) test_fail(__FILE__, __LINE__, "%s", error.text);
        fst_model_free(model);
    }
}

/* Scales that go along with a part of what stays quantized need no more memory than theirs. */
TEST(shards_edges, memory_for_the_scales_of_a_part) {
    static unsigned char codes[256 * 128];
    static float scales[2] = {1, 2};
    float memory[2] = {0, 0};
    support_tensor tensors[] = {{"m.weight", "F8_E4M3", "[256,128]", codes, sizeof codes},
                                {"m.weight_scale_inv", "F32", "[2,1]", scales, 8}};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 2, 0);
    write_config(fp8_config);
    fst_options options = support_options(FST_DEVICE_CPU);
    wanted w = {.dim = 0, .begin = 128, .end = 256, .scales = memory, .scales_bytes = 4};
    fst_model *model = load_part(path, &options, &w);
    CHECK(memory[0] == 2 && memory[1] == 0);
    fst_model_free(model);
    w.scales_bytes = 3;
    options.rule = rule;
    CHECK_INT(FST_E_ARG, fst_load(support_list(path), &options, &model, NULL));
}

/* ---- Codes in two words, in chunks that reach over no more than a round ---- */

typedef struct rank_load {
    fst_options options;
    fst_model *model;
    fst_status status;
    fst_error error;
    const char *path;
} rank_load;

static void *load_main(void *arg) {
    rank_load *r = arg;
    const char *files[] = {r->path, NULL};
    r->status = fst_load(files, &r->options, &r->model, &r->error);
    return NULL;
}

enum { IN = 1280, OUT = 1088, GROUPS = 10 };

static const char *write_gptq3(void) {
    static unsigned char codes[IN / 32 * 3 * OUT * 4], zeros[GROUPS * OUT / 32 * 3 * 4];
    static uint16_t scales[GROUPS * OUT];
    support_tensor tensors[] = {{"m.qweight", "I32", "[120,1088]", codes, sizeof codes},
                                {"m.qzeros", "I32", "[10,102]", zeros, sizeof zeros},
                                {"m.scales", "F16", "[10,1088]", scales, sizeof scales}};
    const char *path = test_path("model.safetensors");
    support_random(codes, sizeof codes, 1);
    support_random(zeros, sizeof zeros, 2);
    for (int i = 0; i < GROUPS * OUT; i++) scales[i] = (uint16_t)(0x3C00 + i % 512);
    support_checkpoint(path, NULL, tensors, 3, 0);
    write_config("{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":3,\"group_size\":128,"
                 "\"desc_act\":false,\"sym\":false}}");
    return path;
}

TEST(shards_edges, codes_in_two_words_where_ranks_share_the_reading) {
    static const fst_shard_rule rules[] = {{"m.weight", 0, 1}, {NULL, 0, 0}};
    const char *path = write_gptq3();
    rank_load loads[2] = {0};
    fst_model *alone[2];
    pthread_t threads[2];
    size_t usual = fst_shared_unit;
    fst_shared_unit = 4096;
    fake_comm *comm = fake_comm_new(2, &(fake_comm_options){.late = 0});
    for (unsigned r = 0; r < 2; r++) {
        loads[r].path = path;
        loads[r].options = support_options(FST_DEVICE_CPU);
        loads[r].options.cast = FST_F32;
        loads[r].options.slot_bytes = 65536;
        loads[r].options.shards = rules;
        loads[r].options.rank = r;
        loads[r].options.ranks = 2;
        CHECK_INT(FST_OK, fst_load(support_list(path), &loads[r].options, &alone[r], NULL));
    }
    for (unsigned r = 0; r < 2; r++) {
        loads[r].options.comm_kind = FST_COMM_MPI;
        loads[r].options.comm = fake_comm_rank(comm, r);
        loads[r].options.timeout_ms = 20000;
        CHECK_INT(0, pthread_create(&threads[r], NULL, load_main, &loads[r]));
    }
    for (unsigned r = 0; r < 2; r++) pthread_join(threads[r], NULL);
    for (unsigned r = 0; r < 2; r++) {
        fst_tensor want, got;
        if (loads[r].status) test_fail(__FILE__, __LINE__, "%s", loads[r].error.text);
        CHECK_INT(FST_OK, fst_model_find(alone[r], "m.weight", &want));
        CHECK_INT(FST_OK, fst_model_find(loads[r].model, "m.weight", &got));
        CHECK_INT(want.nbytes, got.nbytes);
        CHECK_BYTES(want.data, got.data, want.nbytes);
        fst_model_free(alone[r]);
        fst_model_free(loads[r].model);
    }
    fake_comm_free(comm);
    fst_shared_unit = usual;
}

/* Parked as F32 by kernels that count in all of the matrix. */
TEST(shards_edges, scales_computed_for_a_part_of_packed_codes) {
    const char *path = write_gptq3();
    fst_options options = support_options(FST_DEVICE_CPU);
    options.cast = FST_F8_E4M3;
    options.scale = FST_QUANTIZE_ROW;
    fst_model *whole = load_part(path, &options, NULL);
    for (uint64_t begin = 0; begin < 400; begin += 133) {
        wanted w = {.dim = 0, .begin = begin, .end = begin + 300};
        fst_model *part = load_part(path, &options, &w);
        fst_tensor want, got;
        CHECK_INT(FST_OK, fst_model_find(whole, "m.weight", &want));
        CHECK_INT(FST_OK, fst_model_find(part, "m.weight", &got));
        CHECK_INT(300 * IN, got.nbytes);
        CHECK_BYTES((unsigned char *)want.data + begin * IN, got.data, got.nbytes);
        CHECK_INT(FST_OK, fst_model_find(whole, "m.weight_scale", &want));
        CHECK_INT(FST_OK, fst_model_find(part, "m.weight_scale", &got));
        CHECK_BYTES((unsigned char *)want.data + begin * 4, got.data, 300 * 4);
        fst_model_free(part);
    }
    fst_model_free(whole);
}
