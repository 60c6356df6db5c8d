/* Which part a rank has, globs, lists of rules, and what loads leave out because of them. Ranges are torch.chunk's as PyTorch
 * documents them, globs those of fnmatch(3), names those of public models. */
#include "shard.h"

#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "harness.h"
#include "loading.h"
#include "support.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- Ranges -------------------------------------------------------------------------------------- */

static void check_sizes(uint64_t extent, uint64_t unit, unsigned ranks, const uint64_t *sizes) {
    uint64_t begin, end, at = 0;
    for (unsigned rank = 0; rank < ranks; rank++) {
        fst_shard_range(extent, unit, rank, ranks, &begin, &end);
        CHECK_INT(at, begin);
        at += sizes[rank];
        CHECK_INT(at, end);
    }
    CHECK_INT(extent, at);
}

TEST(shard, ranges_are_those_of_torch_chunk) {
    /* torch.arange(11).chunk(6), of 12 and of 13: the examples of its documentation. 13 make five chunks. */
    check_sizes(11, 1, 6, (const uint64_t[]){2, 2, 2, 2, 2, 1});
    check_sizes(12, 1, 6, (const uint64_t[]){2, 2, 2, 2, 2, 2});
    check_sizes(13, 1, 6, (const uint64_t[]){3, 3, 3, 3, 1, 0});
    check_sizes(10, 1, 4, (const uint64_t[]){3, 3, 3, 1});
    check_sizes(5, 1, 4, (const uint64_t[]){2, 2, 1, 0});
    check_sizes(1, 1, 3, (const uint64_t[]){1, 0, 0});
    check_sizes(0, 1, 3, (const uint64_t[]){0, 0, 0});
    check_sizes(7, 1, 1, (const uint64_t[]){7});
    check_sizes(7, 0, 2, (const uint64_t[]){4, 3});
}

TEST(shard, ranges_in_units_are_those_of_gpt_oss) { /* quant-formats 4.3 */
    check_sizes(2880, 32, 2, (const uint64_t[]){1440, 1440});
    check_sizes(2880, 32, 4, (const uint64_t[]){736, 736, 736, 672});
    check_sizes(2880, 32, 8, (const uint64_t[]){384, 384, 384, 384, 384, 384, 384, 192});
    check_sizes(5760, 64, 4, (const uint64_t[]){1472, 1472, 1472, 1344}); /* twice: gate and up alternate */
    check_sizes(70, 32, 3, (const uint64_t[]){32, 32, 6});
    check_sizes(70, 128, 3, (const uint64_t[]){70, 0, 0});
}

TEST(shard, parts_are_disjoint_and_in_order_and_cover_all) {
    static const uint64_t extents[] = {0,
                                       1,
                                       2,
                                       3,
                                       4,
                                       5,
                                       7,
                                       8,
                                       11,
                                       13,
                                       31,
                                       64,
                                       97,
                                       127,
                                       128,
                                       1009,
                                       2880,
                                       4096,
                                       151936,
                                       1u << 31,
                                       (uint64_t)1 << 62,
                                       UINT64_MAX - 1,
                                       UINT64_MAX};
    static const uint64_t units[] = {1, 2, 3, 7, 32, 64, 128, UINT64_MAX};
    for (size_t e = 0; e < COUNT(extents); e++)
        for (size_t u = 0; u < COUNT(units); u++)
            for (unsigned ranks = 1; ranks <= 9; ranks++) {
                uint64_t at = 0, begin, end, largest = 0;
                for (unsigned rank = 0; rank < ranks; rank++) {
                    fst_shard_range(extents[e], units[u], rank, ranks, &begin, &end);
                    CHECK(begin == at && begin <= end && end <= extents[e]);
                    CHECK(begin == extents[e] || begin % units[u] == 0);
                    if (rank == 0) largest = end - begin;
                    CHECK(end - begin == largest || end == extents[e]); /* only the last ones are smaller */
                    CHECK(end - begin <= largest);
                    at = end;
                }
                CHECK(at == extents[e]);
            }
}

TEST(shard, a_range_of_nobody) {
    uint64_t begin, end;
    fst_shard_range(10, 1, 4, 4, &begin, &end);
    CHECK(begin == 10 && end == 10);
    fst_shard_range(10, 1, 0, 0, &begin, &end);
    CHECK(begin == 0 && end == 10);
}

/* ---- Globs --------------------------------------------------------------------------------------- */

static fst_cut look_up(const fst_shard_rule *rules, const char *first, const char *second) {
    fst_string names[] = {{first, strlen(first)}, {second, second ? strlen(second) : 0}};
    fst_shards *shards = fst_shards_new(rules);
    CHECK(shards);
    fst_cut cut = fst_shards_find(shards, names, second ? 2 : 1);
    fst_shards_free(shards);
    return cut;
}

static int matches(const char *glob, const char *name) {
    const fst_shard_rule rules[] = {{glob, 5, 0}, {NULL, 0, 0}};
    return look_up(rules, name, NULL).dim == 5;
}

TEST(shard, globs) {
    CHECK(matches("*", "") && matches("*", "a.b/c") && matches("**", "x"));
    CHECK(matches("a.b", "a.b") && !matches("a.b", "a.bc") && !matches("a.b", "xa.b") &&
          !matches("a.b", "axb"));
    CHECK(matches("*.weight", "model.layers.0.weight") && !matches("*.weight", "weight"));
    CHECK(matches("model.*", "model.") && !matches("model.*", "model"));
    CHECK(matches("?", "a") && !matches("?", "") && !matches("?", "ab"));
    CHECK(matches("layers.?.q", "layers.7.q") && !matches("layers.?.q", "layers.17.q"));
    CHECK(matches("layers.*.q", "layers.17.mlp.q"));
    CHECK(matches("a*a", "aa") && !matches("a*a", "a"));
    CHECK(matches("*ab*ab", "abab") && matches("*ab*ab", "abxab") && !matches("*ab*ab", "ab"));
    CHECK(matches("*?", "x") && !matches("*?", ""));
    CHECK(matches("*a?c*", "xxaabc.") && !matches("*a?c*", "ac"));
    CHECK(matches("[a]\\{b}", "[a]\\{b}") && !matches("[a]", "a"));        /* nothing else is special */
    CHECK(matches("\xC3\xA4?", "\xC3\xA4x") && matches("??", "\xC3\xA4")); /* bytes, not characters */
}

TEST(shard, globs_with_an_end_longer_than_what_is_compared_at_once) {
    CHECK(matches("*.a_very_long_projection.weight", "0.a_very_long_projection.weight"));
    CHECK(!matches("*.a_very_long_projection.weight", "0.b_very_long_projection.weight"));
    CHECK(matches("*0123456789abcde?", "0123456789abcdef") &&
          !matches("*0123456789abcde?", "0123456789abcde"));
    CHECK(matches("0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef"));
    CHECK(!matches("0123456789abcdef0123456789abcdef", "x123456789abcdef0123456789abcdef"));
}

/* A number that looks random. */
static uint32_t next(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

TEST(shard, globs_are_those_of_fnmatch) {
    static const char of_globs[] = "ab.**?", of_names[] = "ab.";
    uint64_t state = 1;
    int both[2] = {0, 0};
    for (int i = 0; i < 100000; i++) {
        char glob[12] = {0}, name[24] = {0};
        size_t length = 1 + next(&state) % 9, size = next(&state) % 12;
        for (size_t k = 0; k < length; k++) glob[k] = of_globs[next(&state) % 6];
        for (size_t k = 0; k < size; k++) name[k] = of_names[next(&state) % 3];
        int want = fnmatch(glob, name, FNM_NOESCAPE) == 0;
        if (matches(glob, name) != want)
            test_fail(__FILE__, __LINE__, "\"%s\" and \"%s\": want %d", glob, name, want);
        both[want]++;
    }
    CHECK(both[0] > 10000 && both[1] > 10000);
}

TEST(shard, globs_that_take_back_nothing) { /* trying all ways would take longer than anybody waits */
    enum { STARS = 200, LENGTH = 20000 };
    char glob[2 * STARS + 8] = {0}, *name = calloc(LENGTH + 1, 1);
    CHECK(name);
    memset(name, 'a', LENGTH);
    for (int i = 0; i < STARS; i++) memcpy(glob + 2 * i, "*a", 2);
    CHECK(matches(glob, name));
    strcpy(glob + 2L * STARS, "*b*");
    CHECK(!matches(glob, name));
    strcpy(glob + 2L * STARS, "?b?");
    CHECK(!matches(glob, name));
    free(name);
}

/* ---- Lists --------------------------------------------------------------------------------------- */

TEST(shard, the_first_rule_that_matches_counts) {
    const fst_shard_rule rules[] = {
        {"*.q.weight", 0, 0}, {"*.weight", 1, 8}, {"*", FST_REPLICATE, 0}, {NULL, 0, 0}};
    fst_cut cut = look_up(rules, "0.q.weight", NULL);
    CHECK(cut.dim == 0 && cut.unit == 1 && !cut.skip);
    cut = look_up(rules, "0.k.weight", NULL);
    CHECK(cut.dim == 1 && cut.unit == 8);
    cut = look_up(rules, "0.k.bias", NULL);
    CHECK(cut.dim == FST_REPLICATE && cut.unit == 1);
}

TEST(shard, skip_and_only_count_in_any_place) {
    const fst_shard_rule rules[] = {
        {"a.*", 0, 0}, {"*", 1, 0}, {"*.1.*", FST_SKIP, 0}, {"a.*", FST_ONLY, 0}, {NULL, 0, 0}};
    CHECK(!look_up(rules, "a.0.w", NULL).skip);
    CHECK_INT(0, look_up(rules, "a.0.w", NULL).dim);
    CHECK(look_up(rules, "a.1.w", NULL).skip);
    CHECK(look_up(rules, "b.0.w", NULL).skip);
}

TEST(shard, a_second_name_matches_as_well) {
    const fst_shard_rule rules[] = {{"*.qweight", 1, 0},       {"*.o.weight", 0, 0},
                                    {"*", FST_REPLICATE, 0},   {"s.weight", FST_SKIP, 0},
                                    {"*.weight", FST_ONLY, 0}, {NULL, 0, 0}};
    CHECK_INT(1, look_up(rules, "0.o.qweight", "0.o.weight").dim);
    CHECK_INT(0, look_up(rules, "0.o.packed", "0.o.weight").dim);
    CHECK(look_up(rules, "s.qweight", "s.weight").skip);
    CHECK(!look_up(rules, "0.qweight", "0.weight").skip);
    CHECK(look_up(rules, "0.qweight", NULL).skip);
}

TEST(shard, rules_that_match_nothing_are_counted) {
    const fst_shard_rule rules[] = {{"*.weight", 0, 0}, {"a.weight", 1, 0},   {"b.weight", 1, 0},
                                    {"c", FST_SKIP, 0}, {"a.*", FST_ONLY, 0}, {NULL, 0, 0}};
    const char *first;
    fst_shards *shards = fst_shards_new(rules);
    CHECK(shards);
    CHECK_INT(5, fst_shards_unused(shards, &first));
    CHECK_STR("*.weight", first);
    fst_shards_find(shards, &(fst_string){"a.weight", 8},
                    1); /* the second one, too, though it does not count */
    CHECK_INT(2, fst_shards_unused(shards, &first));
    CHECK_STR("b.weight", first);
    fst_shards_find(shards, &(fst_string){"b.weight", 8}, 1);
    fst_shards_find(shards, &(fst_string){"c", 1}, 1);
    CHECK_INT(0, fst_shards_unused(shards, &first));
    CHECK(!first);
    fst_shards_free(shards);
}

static fst_status check_list(const fst_shard_rule *rules, fst_error *error) {
    fst_options options = FST_OPTIONS_INIT;
    options.shards = rules;
    return fst_shards_check(&options, error);
}

static void refused(fst_shard_rule first, fst_shard_rule second, const char *text) {
    const fst_shard_rule rules[] = {first, {"between", 0, 0}, second, {NULL, 0, 0}};
    fst_error error;
    CHECK_INT(FST_E_ARG, check_list(rules, &error));
    CHECK(strstr(error.text, text));
}

static void taken(fst_shard_rule first, fst_shard_rule second) {
    const fst_shard_rule rules[] = {first, {"between", 0, 0}, second, {NULL, 0, 0}};
    fst_error error;
    if (check_list(rules, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
}

TEST(shard, rules_that_contradict) {
    const char *why = "\"a.*\" contradict";
    refused((fst_shard_rule){"a.*", 0, 0}, (fst_shard_rule){"a.*", 1, 0}, why);
    refused((fst_shard_rule){"a.*", 0, 0}, (fst_shard_rule){"a.*", FST_REPLICATE, 0}, why);
    refused((fst_shard_rule){"a.*", 0, 0}, (fst_shard_rule){"a.*", 0, 32}, why);
    refused((fst_shard_rule){"a.*", FST_SKIP, 0}, (fst_shard_rule){"a.*", FST_ONLY, 0}, why);
    taken((fst_shard_rule){"a.*", 0, 0}, (fst_shard_rule){"a.*", 0, 1});
    taken((fst_shard_rule){"a.*", FST_SKIP, 0}, (fst_shard_rule){"a.*", FST_SKIP, 9});
    taken((fst_shard_rule){"a.*", FST_REPLICATE, 0}, (fst_shard_rule){"a.*", FST_REPLICATE, 2});
    taken((fst_shard_rule){"a.*", 1, 0}, (fst_shard_rule){"a.*", FST_ONLY, 0});
    taken((fst_shard_rule){"a.*", 1, 0}, (fst_shard_rule){"a.?", 0, 0});
}

TEST(shard, rules_that_say_nothing) {
    refused((fst_shard_rule){"x", 0, 0}, (fst_shard_rule){"", 0, 0}, "rule 2: its glob is empty");
    refused((fst_shard_rule){"x", 64, 0}, (fst_shard_rule){"y", 0, 0}, "\"x\": 64 is no dimension");
    refused((fst_shard_rule){"x", -4, 0}, (fst_shard_rule){"y", 0, 0}, "\"x\": -4 is no dimension");
    taken((fst_shard_rule){"x", 63, 0}, (fst_shard_rule){"y", FST_ONLY, 0});
    fst_error error;
    CHECK_INT(FST_OK, check_list(&(fst_shard_rule){NULL, 0, 0}, &error));
}

TEST(shard, options_that_are_wrong) {
    static const struct {
        unsigned rank, ranks;
        fst_status status;
    } cases[] = {{0, 0, FST_OK},         {1, 0, FST_E_ARG},     {0, 1, FST_OK},
                 {1, 1, FST_E_ARG},      {7, 8, FST_OK},        {8, 8, FST_E_ARG},
                 {65535, 65536, FST_OK}, {0, 65537, FST_E_ARG}, {9, 2, FST_E_ARG}};
    const char *const *files = support_list("/nowhere");
    fst_model *model;
    for (size_t i = 0; i < COUNT(cases); i++) {
        fst_options options = FST_OPTIONS_INIT;
        options.rank = cases[i].rank, options.ranks = cases[i].ranks;
        fst_status want = cases[i].status ? cases[i].status : FST_E_IO; /* before the file is looked for */
        CHECK_INT(want, fst_load(files, &options, &model, NULL));
        CHECK_INT(want, fst_open(files, &options, &model, NULL));
    }
    fst_options options = FST_OPTIONS_INIT;
    options.read = (fst_read_mode)2;
    CHECK_INT(FST_E_ARG, fst_load(files, &options, &model, NULL));
    options.read = (fst_read_mode)-1;
    CHECK_INT(FST_E_ARG, fst_load(files, &options, &model, NULL));
    options.read = FST_READ_EXACT;
    CHECK_INT(FST_E_IO, fst_load(files, &options, &model, NULL));
}

/* ---- The ready-made list ------------------------------------------------------------------------- */

TEST(shard, the_ready_made_rules_know_the_usual_models) {
    static const struct {
        const char *name, *second;
        int dim;
        unsigned unit;
    } cases[] = {
        {"model.embed_tokens.weight", NULL, 0, 1}, /* Llama, Qwen, Mistral, Gemma */
        {"lm_head.weight", NULL, 0, 1},
        {"model.layers.11.self_attn.q_proj.weight", NULL, 0, 1},
        {"model.layers.0.self_attn.k_proj.bias", NULL, 0, 1},
        {"model.layers.0.self_attn.v_proj.qweight", "model.layers.0.self_attn.v_proj.weight", 0, 1},
        {"model.layers.0.self_attn.o_proj.weight", NULL, 1, 1},
        {"model.layers.0.self_attn.o_proj.bias", NULL, -1, 1},
        {"model.layers.0.self_attn.q_norm.weight", NULL, -1, 1},
        {"model.layers.0.mlp.gate_proj.weight", NULL, 0, 1},
        {"model.layers.0.mlp.up_proj.weight", NULL, 0, 1},
        {"model.layers.0.mlp.down_proj.weight", NULL, 1, 1},
        {"model.layers.0.input_layernorm.weight", NULL, -1, 1},
        {"model.norm.weight", NULL, -1, 1},
        {"model.layers.0.mlp.gate.weight", NULL, -1, 1}, /* routers */
        {"model.layers.0.block_sparse_moe.gate.weight", NULL, -1, 1},
        {"model.layers.0.mlp.shared_expert_gate.weight", NULL, -1, 1},
        {"model.layers.0.mlp.experts.127.gate_proj.weight", NULL, 0, 1}, /* Qwen */
        {"model.layers.0.mlp.experts.127.down_proj.weight", NULL, 1, 1},
        {"model.layers.0.mlp.shared_expert.up_proj.weight", NULL, 0, 1},
        {"model.layers.0.block_sparse_moe.experts.7.w1.weight", NULL, 0, 1}, /* Mixtral */
        {"model.layers.0.block_sparse_moe.experts.7.w2.weight", NULL, 1, 1},
        {"model.layers.0.block_sparse_moe.experts.7.w3.weight", NULL, 0, 1},
        {"tok_embeddings.weight", NULL, 0, 1}, /* Mistral's own */
        {"output.weight", NULL, 0, 1},
        {"layers.0.attention.wq.weight", NULL, 0, 1},
        {"layers.0.attention.wo.weight", NULL, 1, 1},
        {"layers.0.feed_forward.w2.weight", NULL, 1, 1},
        {"layers.0.attention_norm.weight", NULL, -1, 1},
        {"model.layers.3.self_attn.q_a_proj.weight", NULL, -1, 1}, /* DeepSeek */
        {"model.layers.3.self_attn.q_b_proj.weight", NULL, 0, 1},
        {"model.layers.3.self_attn.kv_a_proj_with_mqa.weight", NULL, -1, 1},
        {"model.layers.3.self_attn.kv_b_proj.weight", NULL, 0, 1},
        {"model.layers.3.mlp.shared_experts.down_proj.weight", NULL, 1, 1},
        {"model.layers.3.mlp.gate.e_score_correction_bias", NULL, -1, 1},
        {"model.layers.0.self_attn.sinks", NULL, 0, 1}, /* gpt-oss */
        {"model.layers.0.mlp.router.weight", NULL, -1, 1},
        {"model.layers.0.mlp.experts.gate_up_proj_blocks", "model.layers.0.mlp.experts.gate_up_proj", 1, 64},
        {"model.layers.0.mlp.experts.down_proj_blocks", "model.layers.0.mlp.experts.down_proj", 2, 32},
        {"model.layers.0.mlp.experts.gate_up_proj_bias", NULL, 1, 64},
        {"model.layers.0.mlp.experts.down_proj_bias", NULL, -1, 1},
        {"model.layers.0.mlp.experts.gate_up_proj", NULL, 2, 64}, /* not quantized: [experts, in, out] */
        {"model.layers.0.mlp.experts.down_proj", NULL, 1, 32},
        {"language_model.model.layers.0.self_attn.q_proj.weight", NULL, 0, 1}, /* with a tower beside it */
        {"vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", NULL, -1, 1},
        {"model.visual.blocks.0.mlp.gate_proj.weight", NULL, -1, 1},
        {"vision_encoder.transformer.layers.0.attention.wq.weight", NULL, -1, 1},
        {"model.language_model.layers.0.mlp.experts.gate_up_proj", NULL, -1, 1}, /* halves, not pairs */
        {"model.layers.0.self_attn.qkv_proj.weight", NULL, -1, 1},               /* three in one: Phi */
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        fst_cut cut = look_up(fst_shard_rules(), cases[i].name, cases[i].second);
        if (cut.dim != cases[i].dim || cut.unit != cases[i].unit || cut.skip)
            test_fail(__FILE__, __LINE__, "%s: %d in units of %u", cases[i].name, cut.dim, cut.unit);
    }
}

/* A copy of the ready-made list behind `own`; free it. */
static fst_shard_rule *behind(fst_shard_rule own) {
    size_t count = 0;
    while (fst_shard_rules()[count].glob) count++;
    fst_shard_rule *rules = malloc((count + 2) * sizeof *rules);
    CHECK(rules);
    rules[0] = own;
    memcpy(rules + 1, fst_shard_rules(), (count + 1) * sizeof *rules);
    return rules;
}

TEST(shard, ready_made_rules_may_be_overruled_and_unused) {
    const char *first;
    fst_error error;
    fst_shard_rule *rules = behind((fst_shard_rule){"*.o_proj.weight", FST_REPLICATE, 0});
    CHECK_INT(FST_OK, check_list(rules, &error));
    CHECK_INT(FST_REPLICATE, look_up(rules, "0.o_proj.weight", NULL).dim);
    fst_shards *shards = fst_shards_new(rules);
    CHECK(shards);
    CHECK_INT(1, fst_shards_unused(shards, &first));
    CHECK_STR("*.o_proj.weight", first);
    fst_shards_free(shards);
    free(rules);
}

/* ---- Loads --------------------------------------------------------------------------------------- */

static fst_stats stats;

/* The names of a load's tensors, in order, with spaces between; "FST_E_..." when it fails. */
static const char *load_names(const char *path, const fst_options *options) {
    static char names[1000];
    fst_model *model;
    fst_error error;
    fst_status status = fst_load(support_list(path), options, &model, &error);
    *names = 0;
    if (status) return strcat(strcpy(names, fst_status_name(status)), "");
    stats = (fst_stats){.size = sizeof stats};
    CHECK_INT(FST_OK, fst_model_stats(model, &stats));
    for (size_t i = 0; i < fst_model_count(model); i++) {
        fst_tensor tensor;
        CHECK_INT(FST_OK, fst_model_at(model, i, &tensor));
        CHECK(strlen(names) + strlen(tensor.name) + 2 < sizeof names);
        strcat(strcat(names, i ? " " : ""), tensor.name);
    }
    fst_model_free(model);
    return names;
}

static const char *load_with(const char *path, fst_dtype cast, const fst_shard_rule *rules) {
    fst_options options = support_options(FST_DEVICE_CPU);
    options.cast = cast;
    options.shards = rules;
    return load_names(path, &options);
}

#define RULES(...) ((const fst_shard_rule[]){__VA_ARGS__, {NULL, 0, 0}})
#define SKIP(glob) \
    { glob, FST_SKIP, 0 }
#define ONLY(glob) \
    { glob, FST_ONLY, 0 }

static const unsigned char zeros[4096];

/* Two weights of 8-bit floats in one file, their scales in the other, as an index has them. */
static void write_fp8(void) {
    const support_tensor first[] = {{"x.a.weight", "F8_E4M3", "[4,4]", zeros, 16},
                                    {"x.b.weight", "F8_E4M3", "[4,4]", zeros, 16}},
                         second[] = {{"norm.weight", "F32", "[4]", zeros, 16},
                                     {"x.a.weight_scale_inv", "F32", "[1,1]", zeros, 4},
                                     {"x.b.weight_scale_inv", "F32", "[1,1]", zeros, 4}};
    support_checkpoint(test_path("1.safetensors"), NULL, first, 2, 0);
    support_checkpoint(test_path("2.safetensors"), NULL, second, 3, 0);
}

TEST(shard, a_load_leaves_out_a_weight_with_its_scales) {
    write_fp8();
    const char *path = test_directory();
    CHECK_STR("x.b.weight norm.weight", load_with(path, FST_BF16, RULES(SKIP("*.a.weight"))));
    CHECK_INT(2, stats.tensors_ignored);
    CHECK_INT(0, stats.shards_unused);
    CHECK_STR("x.a.weight", load_with(path, FST_BF16, RULES(ONLY("*.a.weight"))));
    CHECK_STR("x.a.weight x.a.weight_scale_inv", load_with(path, FST_NATIVE, RULES(ONLY("*.a.weight"))));
    CHECK_STR("x.b.weight norm.weight x.b.weight_scale_inv",
              load_with(path, FST_NATIVE, RULES(SKIP("*.a.weight"))));
    CHECK_STR("norm.weight", load_with(path, FST_BF16, RULES(SKIP("x.*"))));
    CHECK_STR("", load_with(path, FST_BF16, RULES(ONLY("none.*"))));
    CHECK_INT(1, stats.shards_unused);
    CHECK_STR("x.a.weight x.b.weight norm.weight", load_with(path, FST_BF16, RULES({"none", 0, 0})));
    /* A scale that is left out by its own name is missed, as it would be if the files had none. */
    CHECK_STR("x.a.weight x.b.weight norm.weight x.b.weight_scale_inv",
              load_with(path, FST_NATIVE, RULES(SKIP("*.a.weight_scale_inv"))));
}

TEST(shard, companions_are_known_by_their_names) {
    static const struct {
        const char *codes, *dtype, *companions[6];
        const char *weight;
    } cases[] = {
        {"x.weight", "F8_E4M3", {"x.weight_scale"}, "x.weight"},
        {"x.weight", "F8_E4M3", {"x.scale"}, "x.weight"},
        {"x.weight", "I8", {"x.weight_scale", "x.weight_zero_point"}, "x.weight"},
        {"x.weight", "U8", {"x.weight_scale", "x.weight_scale_2"}, "x.weight"},
        {"x.weight_packed", "U8", {"x.weight_scale", "x.weight_global_scale"}, "x.weight"},
        {"x.weight_packed",
         "I32",
         {"x.weight_scale", "x.weight_shape", "x.weight_zero_point", "x.weight_g_idx"},
         "x.weight"},
        {"x.qweight", "I32", {"x.qzeros", "x.scales", "x.g_idx"}, "x.weight"},
        {"x.up_blocks", "U8", {"x.up_scales"}, "x.up"},
        {"x.up.blocks", "U8", {"x.up.scales"}, "x.up"},
        {"x.up", "F8_E4M3", {"x.up_scale"}, "x.up"},
        {"x.up", "F8_E4M3", {"x.up_scale_inv"}, "x.up"},
        {"x.up", "F8_E4M3", {"x.up_scales_inv"}, "x.up"},
        {"x.weight", "I8", {"x.SCB", "x.weight_format"}, "x.weight"},
        {"x.weight",
         "BF16",
         {"x.weight.absmax", "x.weight.quant_map", "x.weight.nested_absmax", "x.weight.nested_quant_map",
          "x.weight.quant_state.bitsandbytes__nf4"},
         "x.weight"},
        {"x.weight", "U8", {"x.weight.absmax", "x.weight.quant_state.bitsandbytes__fp4"}, "x.weight"},
    };
    const char *path = test_path("model.safetensors");
    for (size_t i = 0; i < COUNT(cases); i++) {
        char all[500] = "";
        support_tensor tensors[8] = {{"other", "U8", "[1]", zeros, 1}};
        size_t count = 1, bytes = fst_dtype_bits(fst_dtype_from_name(cases[i].dtype)) / 8;
        for (size_t k = 0; k < 6 && cases[i].companions[k]; k++) {
            tensors[count++] = (support_tensor){cases[i].companions[k], "F32", "[1]", zeros, 4};
            strcat(strcat(all, cases[i].companions[k]), " ");
        }
        tensors[count++] = (support_tensor){cases[i].codes, cases[i].dtype, "[1]", zeros, bytes};
        strcat(all, cases[i].codes);
        support_checkpoint(path, NULL, tensors, count, 0);
        const char *by_codes = load_with(path, FST_NATIVE, RULES(SKIP(cases[i].codes)));
        if (strcmp("other", by_codes) != 0) test_fail(__FILE__, __LINE__, "case %zu: %s", i, by_codes);
        const char *by_weight = load_with(path, FST_NATIVE, RULES(ONLY(cases[i].weight)));
        if (strcmp(all, by_weight) != 0) test_fail(__FILE__, __LINE__, "case %zu: %s", i, by_weight);
    }
}

TEST(shard, what_only_looks_like_a_companion_is_none) {
    const support_tensor tensors[] = {{"x.weight", "F32", "[1]", zeros, 4},
                                      {"x.scale", "F32", "[1]", zeros, 4},
                                      {"y_scale", "F32", "[1]", zeros, 4},
                                      {"z_blocks", "F32", "[1]", zeros, 4},
                                      {"z_scales", "F32", "[1]", zeros, 4}};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 5, 0);
    CHECK_STR("x.scale y_scale z_blocks z_scales", load_with(path, FST_NATIVE, RULES(SKIP("x.weight"))));
    CHECK_STR("x.weight x.scale y_scale z_scales", load_with(path, FST_NATIVE, RULES(SKIP("z_blocks"))));
    CHECK_STR("", load_with(path, FST_NATIVE, RULES(ONLY("z"))));
}

TEST(shard, strict_rules_must_match) {
    write_fp8();
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    options.shards = RULES(SKIP("x.*"), {"nothing\n.*", 0, 0}, ONLY("nobody"));
    options.flags = FST_STRICT_SHARDS;
    CHECK_INT(FST_E_NOT_FOUND, fst_load(support_list(test_directory()), &options, &model, &error));
    CHECK(strstr(error.text, "\"nothing\\n.*\" matches no tensor"));
    fst_shard_rule *rules = behind((fst_shard_rule){"norm.*", FST_SKIP, 0});
    options.shards = rules;
    CHECK_STR("x.a.weight x.b.weight x.a.weight_scale_inv x.b.weight_scale_inv",
              load_names(test_directory(), &options));
    CHECK_INT(0, stats.shards_unused);
    free(rules);
}

TEST(shard, of_a_name_in_two_files_both_may_be_left_out) {
    const support_tensor tensor = {"x", "U8", "[1]", zeros, 1};
    support_checkpoint(test_path("1.safetensors"), NULL, &tensor, 1, 0);
    support_checkpoint(test_path("2.safetensors"), NULL, &tensor, 1, 0);
    CHECK_STR("FST_E_DUPLICATE", load_with(test_directory(), FST_NATIVE, RULES(SKIP("y"))));
    CHECK_STR("", load_with(test_directory(), FST_NATIVE, RULES(SKIP("x"))));
}

TEST(shard, an_open_shows_everything) {
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model;
    write_fp8();
    options.shards = RULES(SKIP("*"));
    options.flags = FST_STRICT_SHARDS;
    CHECK_INT(FST_OK, fst_open(support_list(test_directory()), &options, &model, NULL));
    CHECK_INT(5, fst_model_count(model));
    fst_model_free(model);
}

TEST(shard, a_stream_leaves_out_the_same) {
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_stream *stream;
    fst_tensor tensor;
    write_fp8();
    options.cast = FST_F32;
    options.shards = RULES(SKIP("*.a.weight"));
    CHECK_INT(FST_OK, fst_stream_open(support_list(test_directory()), &options, &stream, NULL));
    CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, NULL, NULL));
    CHECK_STR("x.b.weight", tensor.name);
    CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, NULL, NULL));
    CHECK_STR("norm.weight", tensor.name);
    CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, NULL, NULL));
    CHECK(!tensor.name);
    fst_stream_close(stream);
}

TEST(shard, a_converted_directory_lacks_what_is_left_out) {
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_convert_stats facts = {.size = sizeof facts};
    fst_error error;
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    const support_tensor tensors[] = {{"x.weight", "F8_E4M3", "[4,4]", zeros, 16},
                                      {"x.weight_scale_inv", "F32", "[1,1]", zeros, 4},
                                      {"y.weight", "F32", "[4,4]", zeros, 64}};
    support_checkpoint(test_path("in/a.safetensors"), NULL, tensors, 3, 0);
    options.cast = FST_BF16;
    options.shards = RULES(SKIP("x.weight"), SKIP("none"));
    if (fst_convert_directory(test_path("in"), test_path("out"), &options, NULL, &facts, &error))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK_INT(1, facts.tensors);
    CHECK_INT(1, facts.shards_unused);
    CHECK_STR("y.weight", load_with(test_path("out"), FST_NATIVE, NULL));
}

/* ---- What the caller's rule sees and says -------------------------------------------------------- */

typedef struct talk {
    const char *name; /* of the tensor that it is about */
    fst_rule seen, said;
} talk;

static int take_over(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    talk *t = arg;
    if (strcmp(t->name, tensor->name) != 0) return 0;
    t->seen = *rule;
    t->said.cast = rule->cast;
    *rule = t->said;
    return 0;
}

static fst_status open_with(talk *t, const fst_shard_rule *rules, fst_loading *l, fst_error *error) {
    fst_options options = support_options(FST_DEVICE_CPU);
    options.rule = t ? take_over : NULL;
    options.rule_arg = t;
    options.shards = rules;
    options.ranks = 2;
    *l = (fst_loading){.error = error};
    const char *const *files = support_list(test_directory());
    fst_status status = fst_loading_begin(l, files, &options);
    return status ? status : fst_loading_open(l, files);
}

static void close_again(fst_loading *l) {
    fst_loading_end(l);
    fst_model_free(l->model);
}

TEST(shard, choices_without_a_rule) {
    fst_loading l;
    fst_error error;
    write_fp8();
    CHECK_INT(FST_OK, open_with(NULL, RULES({"*.b.*", 1, 32}, {"norm.*", 0, 0}), &l, &error));
    const struct {
        int dim;
        unsigned unit;
    } want[] = {{-1, 1}, {1, 32}, {0, 1}, {-1, 1}, {-1, 1}}; /* a scale is cut with its weight */
    for (size_t i = 0; i < 5; i++) {
        CHECK_INT(want[i].dim, l.choices[i].shard_dim);
        CHECK_INT(want[i].unit, l.choices[i].unit);
        CHECK(l.choices[i].into_dim == -1 && !l.choices[i].into && !l.choices[i].begin && !l.choices[i].end);
    }
    CHECK(l.model->scheme); /* whoever cuts must know what belongs together, also as stored */
    close_again(&l);
    CHECK_INT(FST_OK, open_with(NULL, RULES({"nothing", 1, 32}), &l, &error));
    CHECK(!l.model->scheme);
    for (size_t i = 0; i < 5; i++) CHECK_INT(FST_REPLICATE, l.choices[i].shard_dim);
    close_again(&l);
}

TEST(shard, the_callers_rule_begins_with_what_the_list_says) {
    fst_loading l;
    fst_error error;
    char into[] = "together";
    write_fp8();
    talk t = {"x.b.weight",
              {0},
              {.shard_dim = 1,
               .shard_begin = 2,
               .shard_end = 3,
               .layout = FST_TRANSPOSE,
               .into = into,
               .into_dim = 0,
               .into_place = 7}};
    CHECK_INT(FST_OK, open_with(&t, RULES({"*.b.weight", 0, 32}), &l, &error));
    CHECK(t.seen.shard_dim == 0 && t.seen.into_dim == -1 && !t.seen.into && !t.seen.skip);
    CHECK(t.seen.shard_begin == 0 && t.seen.shard_end == 0 && t.seen.layout == 0);
    memset(into, 'x', 8); /* it was copied */
    const fst_choice *choice = &l.choices[1];
    CHECK(choice->shard_dim == 1 && choice->begin == 2 && choice->end == 3 &&
          choice->layout == FST_TRANSPOSE);
    CHECK_INT(1, choice->unit); /* 32 were for another dimension */
    CHECK(choice->into_dim == 0 && choice->into_place == 7);
    CHECK_STR("together", choice->into);
    close_again(&l);
    t = (talk){"norm.weight", {0}, {.shard_dim = FST_REPLICATE, .into_dim = -1}};
    CHECK_INT(FST_OK, open_with(&t, RULES(SKIP("norm.*"), {"*.b.weight", 0, 32}), &l, &error));
    CHECK_INT(1, t.seen.skip); /* and it may say no */
    CHECK_INT(5, l.model->count);
    CHECK_INT(32, l.choices[1].unit);
    close_again(&l);
}

static int skip_named(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    if (strcmp(arg, tensor->name) == 0) rule->skip = !rule->skip;
    return 0;
}

TEST(shard, a_weight_that_the_callers_rule_leaves_out_takes_its_scales_along) {
    static const fst_dtype casts[] = {FST_BF16, FST_NATIVE};
    static const char *const want[] = {"x.b.weight norm.weight",
                                       "x.b.weight norm.weight x.b.weight_scale_inv"};
    write_fp8();
    for (size_t i = 0; i < 2; i++) {
        fst_options options = support_options(FST_DEVICE_CPU);
        char name[] = "x.a.weight";
        options.cast = casts[i];
        options.rule = skip_named;
        options.rule_arg = name;
        CHECK_STR(want[i], load_names(test_directory(), &options));
        CHECK_INT(2, stats.tensors_ignored);
    }
}

static void wrong_rule(fst_rule said, const char *text) {
    talk t = {"norm.weight", {0}, said};
    fst_loading l;
    fst_error error;
    CHECK_INT(FST_E_ARG, open_with(&t, NULL, &l, &error));
    CHECK(strstr(error.text, "tensor \"norm.weight\": the rule's") && strstr(error.text, text));
    CHECK_STR(test_path("2.safetensors"), error.path);
    CHECK(error.file == 1 && error.offset > 8);
    close_again(&l);
}

TEST(shard, wrong_words_of_the_callers_rule) {
    write_fp8();
    wrong_rule((fst_rule){.shard_dim = -2}, "shard_dim");
    wrong_rule((fst_rule){.shard_dim = 64}, "shard_dim");
    wrong_rule((fst_rule){.shard_begin = 3, .shard_end = 2}, "ends before it begins");
    wrong_rule((fst_rule){.shard_dim = -1, .shard_end = 2}, "part has no dimension");
    wrong_rule((fst_rule){.layout = 4}, "layout");
    wrong_rule((fst_rule){.into = ""}, "is empty");
    wrong_rule((fst_rule){.into = "a", .into_dim = -2}, "into_dim");
    wrong_rule((fst_rule){.into = "a", .into_dim = 64}, "into_dim");
}
