/* fst_convert_directory: what comes out, what is kept of a run that was ended, and what is left alone. */
#include "fst.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yyjson.h>

#include "harness.h"
#include "os.h"
#include "support.h"

static fst_error error;
static fst_convert_stats stats;
static fst_os usual; /* before a case */

/* ---- Files ------------------------------------------------------------------------------------- */

static const char *path_of(const char *directory, const char *name) {
    static char text[4][1024];
    static int turn;
    char *path = text[turn++ % 4];
    snprintf(path, sizeof *text, "%s/%s", test_path(directory), name);
    return path;
}

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) test_fail(__FILE__, __LINE__, "cannot open %s", path);
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *data = calloc(1, *size + 1);
    CHECK(data && fread(data, 1, *size, file) == *size);
    fclose(file);
    return data;
}

static int is_there(const char *directory, const char *name) {
    return access(path_of(directory, name), F_OK) == 0;
}

static void write_text(const char *directory, const char *name, const char *text) {
    support_write(path_of(directory, name), text, strlen(text));
}

static void join(char out[2048], const char *directory, const char *name) {
    CHECK(snprintf(out, 2048, "%s/%s", directory, name) < 2048);
}

/* A line for each file in a folder: its name, its size, and a sum of its bytes. Links and pipes are not followed. */
static size_t describe(const char *path, const char *name, char *out, size_t room) {
    fst_file_type type;
    size_t used = 0;
    char link[8];
    CHECK_INT(0, fst_os_calls.stat_type(path, &type));
    if (type == FST_FILE_OTHER || readlink(path, link, sizeof link) >= 0) return 0;
    if (type == FST_FILE_REGULAR) {
        size_t size;
        char *data = read_file(path, &size);
        uint64_t sum = 14695981039346656037u;
        for (size_t i = 0; i < size; i++) sum = (sum ^ (unsigned char)data[i]) * 1099511628211u;
        free(data);
        return (size_t)snprintf(out, room, "%s %zu %llx\n", name, size, (unsigned long long)sum);
    }
    char **names, inner[2048], inner_name[2048];
    CHECK_INT(0, fst_os_calls.list(path, &names));
    for (char **at = names; *at; at++) {
        join(inner, path, *at);
        join(inner_name, name, *at);
        used += describe(inner, inner_name, out + used, room - used);
        CHECK(used < room);
    }
    free(names);
    return used;
}

typedef struct snapshot {
    char text[1 << 14];
} snapshot;

static void take_snapshot(const char *directory, snapshot *out) {
    out->text[0] = 0;
    describe(test_path(directory), "", out->text, sizeof out->text);
}

static void remove_tree(const char *path) {
    char **names, inner[2048];
    if (fst_os_calls.list(path, &names)) {
        unlink(path);
        return;
    }
    for (char **at = names; *at; at++) {
        join(inner, path, *at);
        remove_tree(inner);
    }
    free(names);
    rmdir(path);
}

/* ---- The checkpoint ------------------------------------------------------------------------------ */

static const float norms[6] = {0, 1, -2, 0.5f, 65504, 3};
static const unsigned char codes[8] = {0x38, 0x40, 0x38, 0xB8,
                                       0x40, 0x00, 0x01, 0x7E}; /* 1 2 1 -1 / 2 0 2^-9 448 */
static const float scales[2] = {0.5f, 3};
static const uint16_t dense[8] = {0x3F00, 0x3F80, 0x4040, 0xC040, 0x3F80, 0, 0x3BC0, 0x44A8};
static const unsigned char bytes[5] = {1, 2, 3, 4, 5};

#define CONFIG                                                                                                           \
    "{\"model_type\":\"x\",\"eps\":1e-06,\"torch_dtype\":\"float32\",\"quantization_config\":{\"quant_method\":\"fp8\"," \
    "\"weight_block_size\":[2,2]},\"text_config\":{\"dtype\":\"float32\",\"quantization_config\":{},\"size\":4}}"

#define FIRST "model-00001-of-00002.safetensors"
#define SECOND "model-00002-of-00002.safetensors"

/* Two files; the scales of a weight of the first lie in the second. */
static void make_input(void) {
    usual = fst_os_calls;
    static const support_tensor first[] = {{"norm.weight", "F32", "[2,3]", norms, sizeof norms},
                                           {"a.weight", "F8_E4M3", "[2,4]", codes, sizeof codes}};
    static const support_tensor second[] = {{"a.weight_scale_inv", "F32", "[1,2]", scales, sizeof scales},
                                            {"odd \\\"\xC3\xBC\\n.weight", "U8", "[5]", bytes, sizeof bytes},
                                            {"empty", "F32", "[0]", NULL, 0}};
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    CHECK_INT(0, mkdir(path_of("in", "sub"), 0700));
    support_checkpoint(path_of("in", FIRST), "{\"format\":\"pt\",\"part\":\"1\"}", first, 2, 0);
    support_checkpoint(path_of("in", SECOND), "{\"format\":\"pt\",\"part\":\"2\",\"made\":\"now\"}", second,
                       3, 1);
    write_text("in", "model.safetensors.index.json",
               "{\"metadata\":{\"total_size\":1},\"weight_map\":{\"norm.weight\":\"" FIRST
               "\",\"a.weight\":\"" FIRST "\",\"a.weight_scale_inv\":\"" SECOND
               "\",\"odd \\\"\xC3\xBC\\n.weight\":\"" SECOND "\",\"empty\":\"" SECOND "\"}}");
    write_text("in", "config.json", CONFIG);
    write_text("in", "tokenizer.json", "{}");
    write_text("in", "sub/code.py", "pass\n");
    write_text("in", "pytorch_model.bin", "weights");
    write_text("in", ".gitattributes", "x");
}

static const fst_shard_rule *rules; /* of all conversions from then on, for this rank of two */
static unsigned rank;

static fst_options options_for(fst_dtype cast) {
    fst_options options = support_options(FST_DEVICE_CPU);
    options.cast = cast;
    options.shards = rules;
    options.rank = rules ? rank : 0;
    options.ranks = rules ? 2 : 0;
    return options;
}

/* Tests need not wait for a disk. */
static int quick_fsync(int fd) {
    (void)fd;
    return 0;
}
static int quick_rename(const char *from, const char *to) { return rename(from, to) ? -errno : 0; }
static int quick_directory(const char *path) { return mkdir(path, 0777) ? -errno : 0; }

static void be_quick(void) {
    fst_os_calls.fsync = quick_fsync;
    fst_os_calls.rename = quick_rename;
    fst_os_calls.make_directory = quick_directory;
}

static fst_status convert_with(const fst_options *options, uint64_t shard_bytes) {
    fst_convert_options more = {sizeof more, shard_bytes};
    stats = (fst_convert_stats){.size = sizeof stats};
    fst_os before = fst_os_calls;
    int is_faked = fst_os_calls.fsync != usual.fsync;
    if (!is_faked) be_quick();
    fst_status status =
        fst_convert_directory(test_path("in"), test_path("out"), options, &more, &stats, &error);
    if (!is_faked) fst_os_calls = before;
    return status;
}

static fst_status convert(fst_dtype cast, uint64_t shard_bytes) {
    fst_options options = options_for(cast);
    return convert_with(&options, shard_bytes);
}

static void check_converts(fst_dtype cast, uint64_t shard_bytes) {
    if (convert(cast, shard_bytes)) test_fail(__FILE__, __LINE__, "%s: %s", error.path, error.text);
}

/* ---- What comes out ------------------------------------------------------------------------------- */

static fst_model *load_output(void) {
    fst_options options = options_for(FST_NATIVE);
    fst_model *model;
    if (fst_load(support_list(test_path("out")), &options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s: %s", error.path, error.text);
    return model;
}

static void check_tensor(const fst_model *model, const char *name, fst_dtype dtype, const void *data,
                         size_t nbytes) {
    fst_tensor tensor;
    CHECK_INT(FST_OK, fst_model_find(model, name, &tensor));
    CHECK_INT(dtype, tensor.dtype);
    CHECK_INT(nbytes, tensor.nbytes);
    CHECK_BYTES(data, tensor.data, nbytes);
}

static void check_output(void) {
    static const uint16_t bf16[6] = {0, 0x3F80, 0xC000, 0x3F00, 0x4780, 0x4040};
    fst_model *model = load_output();
    CHECK_INT(4, fst_model_count(model));
    check_tensor(model, "norm.weight", FST_BF16, bf16, sizeof bf16);
    check_tensor(model, "a.weight", FST_BF16, dense, sizeof dense);
    check_tensor(model, "odd \"\xC3\xBC\n.weight", FST_U8, bytes, sizeof bytes);
    check_tensor(model, "empty", FST_BF16, NULL, 0);
    fst_model_free(model);
}

TEST(convert, a_dense_checkpoint_comes_out) {
    make_input();
    check_converts(FST_BF16, 0);
    check_output();
    CHECK_INT(4, stats.tensors);
    CHECK_INT(12 + 16 + 5, stats.bytes_out);
    CHECK_INT(1, stats.shards);
    CHECK_INT(0, stats.shards_kept);
    CHECK_INT(2, stats.files_copied);
    CHECK_STR("cpu", stats.device);
    CHECK(!is_there("out", ".fst-convert"));
}

TEST(convert, other_files_are_copied_but_weights_and_hidden_ones) {
    make_input();
    check_converts(FST_BF16, 0);
    size_t size;
    char *text = read_file(path_of("out", "sub/code.py"), &size);
    CHECK_STR("pass\n", text);
    free(text);
    CHECK(is_there("out", "tokenizer.json"));
    CHECK(!is_there("out", "pytorch_model.bin"));
    CHECK(!is_there("out", ".gitattributes"));
}

TEST(convert, config_says_what_is_there_now) {
    make_input();
    check_converts(FST_BF16, 0);
    size_t size;
    char *text = read_file(path_of("out", "config.json"), &size);
    CHECK_STR(
        "{\n  \"model_type\": \"x\",\n  \"eps\": 1e-06,\n  \"torch_dtype\": \"bfloat16\",\n  \"text_config\": {\n"
        "    \"dtype\": \"bfloat16\",\n    \"size\": 4\n  }\n}\n",
        text);
    free(text);
}

TEST(convert, what_is_odd_about_weights_is_counted) {
    static const unsigned char ones[4] = {0x38, 0x38, 0x38, 0x38};
    static const uint32_t nan = 0x7FC00000;
    const support_tensor tensors[] = {{"a.weight", "F8_E4M3", "[2,2]", ones, 4},
                                      {"a.weight_scale", "F32", "[]", &nan, 4},
                                      {"b.weight", "F8_E4M3", "[2,2]", ones, 4}};
    CHECK_INT(0, mkdir(test_path("in"), 0777));
    support_checkpoint(path_of("in", "model.safetensors"), NULL, tensors, 3, 0);
    write_text("in", "config.json", "{}");
    check_converts(FST_BF16, 0);
    CHECK_INT(1, stats.nan_scales);
    CHECK_INT(1, stats.bare_weights);
}

/* Python writes Infinity, which is no JSON. */
TEST(convert, config_without_a_dtype_gets_one) {
    make_input();
    write_text(
        "in", "config.json",
        "{\"limit\":[0.0,Infinity],\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[2,2]}}");
    check_converts(FST_F16, 0);
    size_t size;
    char *text = read_file(path_of("out", "config.json"), &size);
    CHECK_STR("{\n  \"limit\": [\n    0.0,\n    Infinity\n  ],\n  \"torch_dtype\": \"float16\"\n}\n", text);
    free(text);
}

TEST(convert, nothing_but_files_without_a_cast) {
    make_input();
    write_text("in", "hf_quant_config.json", "{}");
    check_converts(FST_NATIVE, 0);
    fst_model *model = load_output();
    CHECK_INT(5, fst_model_count(model));
    check_tensor(model, "a.weight", FST_F8_E4M3, codes, sizeof codes);
    check_tensor(model, "a.weight_scale_inv", FST_F32, scales, sizeof scales);
    fst_model_free(model);
    size_t size;
    char *text = read_file(path_of("out", "config.json"), &size);
    CHECK_STR(CONFIG, text);
    free(text);
    CHECK(is_there("out", "hf_quant_config.json"));
}

TEST(convert, quantization_files_do_not_come_along) {
    make_input();
    write_text("in", "hf_quant_config.json", "{}");
    write_text("in", "quantize_config.json", "{}");
    check_converts(FST_BF16, 0);
    CHECK(!is_there("out", "hf_quant_config.json"));
    CHECK(!is_there("out", "quantize_config.json"));
}

/* Metadata: what all files agree on. */
TEST(convert, metadata_that_differs_is_left_out) {
    make_input();
    check_converts(FST_BF16, 1);
    fst_model *model = load_output();
    fst_string key, value;
    CHECK_INT(4, fst_model_file_count(model));
    for (size_t i = 0; i < 4; i++) {
        CHECK_INT(2, fst_model_metadata_count(model, i));
        CHECK_INT(FST_OK, fst_model_metadata_at(model, i, 0, &key, &value));
        CHECK_STR("format", key.data);
        CHECK_STR("pt", value.data);
        CHECK_INT(FST_OK, fst_model_metadata_at(model, i, 1, &key, &value));
        CHECK_STR("made", key.data);
    }
    fst_model_free(model);
}

TEST(convert, metadata_names_a_format_always) {
    static const support_tensor tensors[] = {{"x", "U8", "[5]", bytes, sizeof bytes}};
    usual = fst_os_calls;
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    support_checkpoint(path_of("in", "a.safetensors"), NULL, tensors, 1, 0);
    check_converts(FST_BF16, 0);
    fst_model *model = load_output();
    fst_string key, value;
    CHECK_INT(FST_OK, fst_model_metadata_at(model, 0, 0, &key, &value));
    CHECK_STR("format", key.data);
    fst_model_free(model);
    CHECK(!is_there("out", "config.json")); /* there was none */
}

/* ---- Computed scales -------------------------------------------------------------------------------- */

static char *output_config(void) {
    size_t size;
    return read_file(path_of("out", "config.json"), &size);
}

/* Two weights, one of them an embedding, which stays. Converted with these scales; config.json of the output. */
static yyjson_doc *convert_with_scales(fst_scale scale, fst_dtype cast, fst_status want) {
    static const float matrix[6] = {448, 1, -2, 0.5F, 4, 3};
    static const support_tensor tensors[] = {{"a.weight", "F32", "[2,3]", matrix, sizeof matrix},
                                             {"embed.weight", "F32", "[2,3]", norms, sizeof norms},
                                             {"a.bias", "F32", "[2]", norms, 8}};
    usual = fst_os_calls;
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    support_checkpoint(path_of("in", "model.safetensors"), NULL, tensors, 3, 0);
    write_text("in", "config.json", "{\"torch_dtype\":\"float32\"}");
    fst_options options = options_for(cast);
    options.scale = scale;
    CHECK_INT(want, convert_with(&options, 6));
    if (want) return NULL;
    char *text = output_config();
    yyjson_doc *doc = yyjson_read(text, strlen(text), 0);
    free(text);
    CHECK(doc);
    CHECK_STR("float32", yyjson_get_str(yyjson_doc_ptr_get(doc, "/torch_dtype")));
    return doc;
}

static void check_text(yyjson_doc *doc, const char *pointer, const char *want) {
    const char *got = yyjson_get_str(yyjson_doc_ptr_get(doc, pointer));
    CHECK_STR(want, got ? got : "(nothing)");
}

/* The codes of 448 and 1 under a scale of 1. */
static void check_scaled(const char *scales_name, size_t nbytes) {
    static const unsigned char head[2] = {0x7E, 0x38};
    fst_model *model = load_output();
    fst_tensor tensor;
    CHECK_INT(4, fst_model_count(model));
    CHECK_INT(FST_OK, fst_model_find(model, "a.weight", &tensor));
    CHECK_INT(FST_F8_E4M3, tensor.dtype);
    CHECK_BYTES(head, tensor.data, 2);
    CHECK_INT(FST_OK, fst_model_find(model, scales_name, &tensor));
    CHECK_INT(FST_F32, tensor.dtype);
    CHECK_INT(nbytes, tensor.nbytes);
    CHECK(*(const float *)tensor.data == 1);
    check_tensor(model, "embed.weight", FST_F32, norms, sizeof norms);
    fst_model_free(model);
    /* And it loads as what it was. */
    fst_options options = options_for(FST_F32);
    CHECK_INT(FST_OK, fst_load(support_list(test_path("out")), &options, &model, &error));
    CHECK_INT(3, fst_model_count(model));
    CHECK_INT(FST_OK, fst_model_find(model, "a.weight", &tensor));
    CHECK(((const float *)tensor.data)[0] == 448 && ((const float *)tensor.data)[2] == -2);
    fst_model_free(model);
}

TEST(convert, block_scales_are_said_as_deepseek_does) {
    yyjson_doc *doc = convert_with_scales(FST_QUANTIZE_BLOCK, FST_F8_E4M3, FST_OK);
    check_text(doc, "/quantization_config/quant_method", "fp8");
    check_text(doc, "/quantization_config/fmt", "e4m3");
    check_text(doc, "/quantization_config/activation_scheme", "dynamic");
    CHECK_INT(128, yyjson_get_uint(yyjson_doc_ptr_get(doc, "/quantization_config/weight_block_size/0")));
    CHECK_INT(128, yyjson_get_uint(yyjson_doc_ptr_get(doc, "/quantization_config/weight_block_size/1")));
    check_text(doc, "/quantization_config/modules_to_not_convert/0", "embed");
    CHECK(!yyjson_doc_ptr_get(doc, "/quantization_config/modules_to_not_convert/1"));
    yyjson_doc_free(doc);
    check_scaled("a.weight_scale_inv", 4);
}

TEST(convert, tensor_scales_are_said_as_fp8) {
    yyjson_doc *doc = convert_with_scales(FST_QUANTIZE_TENSOR, FST_F8_E4M3, FST_OK);
    check_text(doc, "/quantization_config/quant_method", "fp8");
    CHECK(!yyjson_doc_ptr_get(doc, "/quantization_config/weight_block_size"));
    yyjson_doc_free(doc);
    check_scaled("a.weight_scale", 4);
}

TEST(convert, row_scales_are_said_as_compressed_tensors) {
    yyjson_doc *doc = convert_with_scales(FST_QUANTIZE_ROW, FST_F8_E4M3, FST_OK);
    check_text(doc, "/quantization_config/quant_method", "compressed-tensors");
    check_text(doc, "/quantization_config/format", "float-quantized");
    check_text(doc, "/quantization_config/config_groups/group_0/targets/0", "Linear");
    check_text(doc, "/quantization_config/config_groups/group_0/weights/strategy", "channel");
    check_text(doc, "/quantization_config/config_groups/group_0/input_activations/strategy", "token");
    CHECK_INT(8, yyjson_get_uint(
                     yyjson_doc_ptr_get(doc, "/quantization_config/config_groups/group_0/weights/num_bits")));
    check_text(doc, "/quantization_config/ignore/0", "embed");
    yyjson_doc_free(doc);
    check_scaled("a.weight_scale", 8);
}

TEST(convert, scales_of_types_that_nobody_loads_are_refused) {
    convert_with_scales(FST_QUANTIZE_ROW, FST_F8_E4M3FNUZ, FST_E_UNSUPPORTED);
    CHECK(!is_there("out", "."));
    remove_tree(test_path("in"));
    convert_with_scales(FST_QUANTIZE_BLOCK, FST_F8_E5M2, FST_E_UNSUPPORTED);
    CHECK(!is_there("out", "."));
}

TEST(convert, codes_under_scales_do_not_become_fnuz) {
    make_input();
    CHECK_INT(FST_E_UNSUPPORTED, convert(FST_F8_E4M3FNUZ, 0));
    CHECK(!is_there("out", "."));
}

/* ---- Shards --------------------------------------------------------------------------------------- */

/* Results of 12, 16, 5 and 0 bytes. */
static void check_shards(uint64_t shard_bytes, uint64_t want) {
    check_converts(FST_BF16, shard_bytes);
    check_output();
    CHECK_INT(want, stats.shards);
    remove_tree(test_path("out"));
}

TEST(convert, shards_are_cut_before_they_are_too_large) {
    make_input();
    check_shards(33, 1);
    check_shards(32, 2);
    check_shards(28, 2); /* 12 + 16 | 5 */
    check_shards(27, 2); /* 12 | 16 + 5 */
    check_shards(21, 2);
    check_shards(20, 3);
    check_shards(15, 3); /* the one of 16 is alone */
}

TEST(convert, index_tells_where_tensors_are) {
    make_input();
    check_converts(FST_BF16, 27);
    size_t size;
    char *text = read_file(path_of("out", "model.safetensors.index.json"), &size);
    yyjson_doc *doc = yyjson_read(text, size, 0);
    CHECK_INT(33, yyjson_get_uint(yyjson_doc_ptr_get(doc, "/metadata/total_size")));
    CHECK_STR(FIRST, yyjson_get_str(yyjson_doc_ptr_get(doc, "/weight_map/norm.weight")));
    CHECK_STR(SECOND, yyjson_get_str(yyjson_doc_ptr_get(doc, "/weight_map/a.weight")));
    CHECK_STR(SECOND, yyjson_get_str(yyjson_doc_ptr_get(doc, "/weight_map/odd \"\xC3\xBC\n.weight")));
    CHECK_INT(4, yyjson_obj_size(yyjson_doc_ptr_get(doc, "/weight_map")));
    yyjson_doc_free(doc);
    free(text);
}

/* Tensors larger than the memory for results would be refused: the bound follows the largest one. */
TEST(convert, little_memory_is_enough) {
    make_input();
    fst_options options = options_for(FST_BF16);
    options.memory_bytes = 512;
    CHECK_INT(FST_OK, convert_with(&options, 13));
    check_output();
}

/* Memory of a result goes back before the file is written out of the buffers: what is copied late would be lost. */
static void check_gpu_writes_the_same(uint64_t shard_bytes, uint64_t memory_bytes) {
    static snapshot cpu, gpu;
    check_converts(FST_BF16, shard_bytes);
    take_snapshot("out", &cpu);
    for (uint64_t seed = 1; seed <= 5; seed++) {
        remove_tree(test_path("out"));
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        fst_options options = options_for(FST_BF16);
        options.device = FST_DEVICE_GPU(0);
        options.memory_bytes = memory_bytes;
        fst_status status = convert_with(&options, shard_bytes);
        fst_release_cached();
        fake_gpu_end();
        CHECK_INT(FST_OK, status);
        take_snapshot("out", &gpu);
        CHECK_STR(cpu.text, gpu.text);
    }
    remove_tree(test_path("out"));
}

TEST(convert, a_gpu_writes_the_same) {
    make_input();
    check_gpu_writes_the_same(13, 0);
    check_gpu_writes_the_same(0, 256);
}

/* Tensors of several buffers' size, and small ones between them. */
TEST(convert, a_gpu_writes_large_tensors_through_its_buffers) {
    enum { LARGE = 9 << 20, MORE = (17 << 20) + 2 };
    unsigned char *data = malloc(MORE);
    CHECK(data);
    support_random(data, MORE, 3);
    support_tensor tensors[] = {{"a", "U8", "[9437184]", data, LARGE},
                                {"b", "I16", "[8912897]", data, MORE},
                                {"c", "U8", "[3]", data, 3}};
    usual = fst_os_calls;
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    support_checkpoint(path_of("in", "a.safetensors"), NULL, tensors, 3, 0);
    free(data);
    check_gpu_writes_the_same(0, 18 << 20);
}

/* ---- What is refused -------------------------------------------------------------------------------- */

static void check_refused(fst_status want, fst_dtype cast) {
    static snapshot before, after;
    take_snapshot("in", &before);
    CHECK_INT(want, convert(cast, 0));
    CHECK(!is_there("out", "."));
    take_snapshot("in", &after);
    CHECK_STR(before.text, after.text);
}

TEST(convert, a_format_that_is_not_dequantized_is_refused_first) {
    make_input();
    write_text("in", "config.json", "{\"quantization_config\":{\"quant_method\":\"aqlm\"}}");
    check_refused(FST_E_UNSUPPORTED, FST_BF16);
}

TEST(convert, a_missing_companion_is_refused_first) {
    make_input();
    static const support_tensor second[] = {{"a.weight_scale_inv", "F32", "[2,3]", norms, 24}};
    support_checkpoint(path_of("in", SECOND), NULL, second, 1, 0);
    unlink(path_of("in", "model.safetensors.index.json"));
    check_refused(FST_E_QUANTIZED, FST_BF16);
}

TEST(convert, a_directory_without_weights_is_refused) {
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    check_refused(FST_E_IO, FST_BF16);
}

TEST(convert, no_tensors_are_refused) {
    usual = fst_os_calls;
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    support_checkpoint(path_of("in", "a.safetensors"), NULL, NULL, 0, 0);
    check_refused(FST_E_ARG, FST_BF16);
}

TEST(convert, a_config_that_is_not_json_is_refused_first) {
    make_input();
    write_text("in", "config.json", "{");
    check_refused(FST_E_JSON, FST_BF16);
}

TEST(convert, a_fifo_in_the_directory_is_refused_first) {
    make_input();
    CHECK_INT(0, mkfifo(path_of("in", "sub/pipe"), 0600));
    check_refused(FST_E_FILE_TYPE, FST_BF16);
}

TEST(convert, a_link_that_leads_back_is_refused_first) {
    make_input();
    CHECK_INT(0, symlink("..", path_of("in", "sub/back")));
    check_refused(FST_E_FILE_TYPE, FST_BF16);
}

TEST(convert, a_file_is_no_directory) {
    make_input();
    char file[1024];
    snprintf(file, sizeof file, "%s", path_of("in", FIRST));
    CHECK_INT(FST_E_FILE_TYPE, fst_convert_directory(file, test_path("out"), NULL, NULL, NULL, &error));
    CHECK_INT(FST_E_IO, fst_convert_directory(test_path("no"), test_path("out"), NULL, NULL, NULL, &error));
    write_text(".", "file", "x");
    CHECK_INT(FST_E_FILE_TYPE,
              fst_convert_directory(test_path("in"), test_path("file"), NULL, NULL, NULL, &error));
    CHECK_INT(FST_E_IO,
              fst_convert_directory(test_path("in"), test_path("no/out"), NULL, NULL, NULL, &error));
}

TEST(convert, wrong_arguments) {
    make_input();
    fst_convert_options more = {0};
    fst_convert_stats small = {0};
    CHECK_INT(FST_E_ARG, fst_convert_directory(NULL, test_path("out"), NULL, NULL, NULL, NULL));
    CHECK_INT(FST_E_ARG, fst_convert_directory(test_path("in"), "", NULL, NULL, NULL, NULL));
    CHECK_INT(FST_E_ARG, fst_convert_directory(test_path("in"), test_path("out"), NULL, &more, NULL, NULL));
    CHECK_INT(FST_E_ARG, fst_convert_directory(test_path("in"), test_path("out"), NULL, NULL, &small, NULL));
    CHECK(!is_there("out", "."));
}

TEST(convert, the_input_is_no_output) {
    make_input();
    static snapshot before, after;
    take_snapshot("in", &before);
    CHECK_INT(0, symlink("in", test_path("link")));
    const char *const outputs[] = {test_path("in"),     test_path("link"),   test_path("in/"),
                                   test_path("in/sub"), test_path("in/new"), test_directory()};
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        CHECK_INT(FST_E_ARG, fst_convert_directory(test_path("in"), outputs[i], NULL, NULL, NULL, &error));
        CHECK(strstr(error.text, "input"));
    }
    take_snapshot("in", &after);
    CHECK_STR(before.text, after.text);
}

TEST(convert, a_directory_with_other_files_is_left_alone) {
    make_input();
    CHECK_INT(0, mkdir(test_path("out"), 0700));
    write_text("out", "mine", "x");
    static snapshot before, after;
    take_snapshot("out", &before);
    CHECK_INT(FST_E_ARG, convert(FST_BF16, 0));
    take_snapshot("out", &after);
    CHECK_STR(before.text, after.text);
}

TEST(convert, an_empty_directory_is_filled) {
    make_input();
    CHECK_INT(0, mkdir(test_path("out"), 0700));
    check_converts(FST_BF16, 0);
    CHECK_INT(FST_E_ARG, convert(FST_BF16, 0)); /* and then it is full */
    check_output();
}

TEST(convert, options_of_a_load_are_checked) {
    make_input();
    fst_options options = options_for(FST_NATIVE);
    options.reader = (fst_reader_kind)99;
    CHECK_INT(FST_E_ARG, convert_with(&options, 0));
    options = options_for(FST_BF16);
    options.memory_bytes = 1; /* no tensor fits */
    CHECK_INT(FST_E_ARG, convert_with(&options, 0));
}

/* ---- Rules ------------------------------------------------------------------------------------------ */

static int skip_norms(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    rule->skip = strcmp(tensor->name, "norm.weight") == 0;
    rule->memory = strcmp(tensor->name, "a.weight") == 0 ? arg : NULL;
    rule->memory_bytes = rule->memory ? 16 : 0;
    return 0;
}

TEST(convert, a_rule_is_followed_but_for_memory) {
    static uint16_t memory[8];
    make_input();
    fst_options options = options_for(FST_BF16);
    options.rule = skip_norms;
    CHECK_INT(FST_OK, convert_with(&options, 13));
    CHECK_INT(3, stats.tensors);
    fst_model *model = load_output();
    check_tensor(model, "a.weight", FST_BF16, dense, sizeof dense);
    CHECK_INT(3, fst_model_count(model));
    fst_model_free(model);
    options.rule_arg = memory;
    remove_tree(test_path("out"));
    CHECK_INT(FST_E_ARG, convert_with(&options, 13));
    CHECK(!is_there("out", "."));
}

/* ---- Going on ---------------------------------------------------------------------------------------- */

/* Calls that write, counted; the so-manieth fails, or it and all after it, as if the process were gone. */
static fst_os real;
static int calls, fail_at, dead;

static int call_fails(void) {
    int now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    return fail_at && (now == fail_at || (dead && now > fail_at)) ? -ENOSPC : 0;
}
static ssize_t failing_pwrite(int fd, const void *data, size_t size, uint64_t offset) {
    int code = call_fails();
    return code ? code : real.pwrite(fd, data, size, offset);
}
static int failing_fsync(int fd) {
    int code = call_fails();
    return code ? code : real.fsync(fd);
}
static int failing_create(const char *path) {
    int code = call_fails();
    return code ? code : real.create(path);
}
static int failing_rename(const char *from, const char *to) {
    int code = call_fails();
    return code ? code : real.rename(from, to);
}
static int failing_directory(const char *path) {
    int code = call_fails();
    return code ? code : real.make_directory(path);
}
static int failing_unlink(const char *path) {
    int code = dead ? call_fails() : 0;
    return code ? code : real.unlink(path);
}
static int failing_rmdir(const char *path) {
    int code = dead ? call_fails() : 0;
    return code ? code : real.remove_directory(path);
}

static fst_status convert_failing(int at, int dies, uint64_t shard_bytes) {
    fst_os before = fst_os_calls;
    be_quick();
    real = fst_os_calls;
    calls = 0;
    fail_at = at;
    dead = dies;
    fst_os_calls.pwrite = failing_pwrite;
    fst_os_calls.fsync = failing_fsync;
    fst_os_calls.create = failing_create;
    fst_os_calls.rename = failing_rename;
    fst_os_calls.make_directory = failing_directory;
    fst_os_calls.unlink = failing_unlink;
    fst_os_calls.remove_directory = failing_rmdir;
    fst_status status = convert(FST_BF16, shard_bytes);
    fst_os_calls = before;
    return status;
}

/* Each file under a final name is one of the whole result. */
static void check_no_half_file(const snapshot *whole) {
    static snapshot now;
    if (!is_there("out", ".")) return;
    take_snapshot("out", &now);
    for (char *line = strtok(now.text, "\n"); line; line = strtok(NULL, "\n"))
        if (strncmp(line, "/.fst-convert/", 14) != 0 && !strstr(whole->text, line))
            test_fail(__FILE__, __LINE__, "half a file: %s", line);
}

static void check_every_end(int dies) {
    static snapshot whole, input, now;
    make_input();
    take_snapshot("in", &input);
    CHECK_INT(FST_OK, convert_failing(0, dies, 13));
    int total = calls;
    CHECK(total > 30);
    take_snapshot("out", &whole);
    uint64_t kept = 0;
    for (int at = 1; at <= total; at++) {
        remove_tree(test_path("out"));
        fst_status status = convert_failing(at, dies, 13);
        if (status) CHECK_INT(FST_E_IO, status);
        if (status) CHECK_INT(ENOSPC, error.code);
        check_no_half_file(&whole);
        if (status) check_converts(FST_BF16, 13);
        else remove_tree(path_of("out", ".fst-convert")); /* it died cleaning up */
        kept += stats.shards_kept;
        take_snapshot("out", &now);
        CHECK_STR(whole.text, now.text);
    }
    CHECK(kept > 10);
    take_snapshot("in", &now);
    CHECK_STR(input.text, now.text);
}

TEST(convert, a_full_disk_at_any_call_leaves_whole_files) { check_every_end(0); }
TEST(convert, a_run_that_dies_at_any_call_is_gone_on_with) { check_every_end(1); }

/* A run that ends when two of three files are finished. */
static void leave_two_files(void) {
    for (int at = 1; at < 200; at++) {
        remove_tree(test_path("out"));
        CHECK_INT(FST_E_IO, convert_failing(at, 1, 13));
        if (!is_there("out", ".fst-convert/journal")) continue;
        size_t size;
        int done = 0;
        char *text = read_file(path_of("out", ".fst-convert/journal"), &size);
        for (char *found = text; (found = strstr(found, "xxh3")); found++) done++;
        free(text);
        if (done == 2) return;
    }
    test_fail(__FILE__, __LINE__, "never two files");
}

TEST(convert, finished_files_are_kept) {
    make_input();
    leave_two_files();
    check_converts(FST_BF16, 13);
    CHECK_INT(3, stats.shards);
    CHECK_INT(2, stats.shards_kept);
    check_output();
}

TEST(convert, a_finished_file_that_is_not_as_it_was_is_made_again) {
    make_input();
    leave_two_files();
    int fd = open(path_of("out", "model-00002-of-00003.safetensors"), O_WRONLY);
    CHECK_INT(1, pwrite(fd, "!", 1, 4096));
    close(fd);
    check_converts(FST_BF16, 13);
    CHECK_INT(1, stats.shards_kept);
    check_output();
}

TEST(convert, other_options_start_over) {
    make_input();
    leave_two_files();
    check_converts(FST_F16, 13);
    CHECK_INT(0, stats.shards_kept);
    leave_two_files();
    check_converts(FST_BF16, 0);
    CHECK_INT(0, stats.shards_kept);
    CHECK_INT(1, stats.shards);
    CHECK(!is_there("out", "model-00001-of-00003.safetensors"));
    check_output();
}

TEST(convert, another_part_starts_over) {
    static const fst_shard_rule whole[] = {{"*", FST_REPLICATE, 0}, {NULL, 0, 0}},
                                same[] = {{"?*", FST_REPLICATE, 0}, {NULL, 0, 0}};
    make_input();
    leave_two_files();
    rules = whole, rank = 0;
    check_converts(FST_BF16, 13);
    int kept[3] = {(int)stats.shards_kept};
    leave_two_files();
    rank = 1;
    check_converts(FST_BF16, 13);
    kept[1] = (int)stats.shards_kept;
    leave_two_files();
    rules = same;
    check_converts(FST_BF16, 13);
    kept[2] = (int)stats.shards_kept;
    leave_two_files();
    check_converts(FST_BF16, 13);
    rules = NULL;
    CHECK_INT(2, stats.shards_kept);
    for (int i = 0; i < 3; i++) CHECK_INT(0, kept[i]);
}

TEST(convert, a_touched_input_starts_over) {
    static const char *const names[] = {FIRST, SECOND, "config.json", "model.safetensors.index.json"};
    make_input();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        leave_two_files();
        struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = 1000 + (time_t)i}};
        CHECK_INT(0, utimensat(AT_FDCWD, path_of("in", names[i]), times, 0));
        check_converts(FST_BF16, 13);
        CHECK_INT(0, stats.shards_kept);
        check_output();
    }
}

TEST(convert, a_journal_of_another_directory_starts_over) {
    make_input();
    leave_two_files();
    CHECK_INT(0, rename(test_path("in"), test_path("moved")));
    fst_options options = options_for(FST_BF16);
    fst_convert_options more = {sizeof more, 13};
    stats = (fst_convert_stats){.size = sizeof stats};
    CHECK_INT(FST_OK,
              fst_convert_directory(test_path("moved"), test_path("out"), &options, &more, &stats, &error));
    CHECK_INT(0, stats.shards_kept);
}

TEST(convert, a_broken_journal_starts_over) {
    make_input();
    leave_two_files();
    write_text("out", ".fst-convert/journal",
               "{\"fst\":\n{\"name\":\"../in/config.json\"}\n{\"name\":\"/x\"}\n");
    check_converts(FST_BF16, 13);
    CHECK_INT(0, stats.shards_kept);
    CHECK(is_there("in", "config.json"));
    check_output();
}

TEST(convert, two_at_a_time_are_refused) {
    make_input();
    leave_two_files();
    int fd = fst_os_calls.create(path_of("out", ".fst-convert/lock"));
    CHECK_INT(0, fst_os_calls.lock(fd));
    write_text("out", ".fst-convert/file", "the other's");
    CHECK_INT(FST_E_IO, convert(FST_BF16, 13));
    CHECK(strstr(error.text, "another conversion"));
    CHECK(is_there("out", ".fst-convert/file"));
    fst_os_calls.close(fd);
    check_converts(FST_BF16, 13);
    CHECK_INT(2, stats.shards_kept);
}

/* ---- While it runs ------------------------------------------------------------------------------------ */

static int changing_fsync(int fd) {
    struct timespec times[2] = {{.tv_sec = 77}, {.tv_sec = 77}};
    utimensat(AT_FDCWD, path_of("in", "config.json"), times, 0);
    return real.fsync(fd);
}

TEST(convert, an_input_that_changes_meanwhile_is_told) {
    make_input();
    real = fst_os_calls;
    fst_os_calls.fsync = changing_fsync;
    fst_status status = convert(FST_BF16, 13);
    fst_os_calls = real;
    CHECK_INT(FST_E_CHANGED, status);
    CHECK(!is_there("out", "config.json"));
    CHECK(!is_there("out", "model.safetensors.index.json"));
    check_converts(FST_BF16, 13);
    CHECK_INT(0, stats.shards_kept);
}

typedef struct watch {
    uint64_t done, total;
    int calls, stop_at, backwards;
} watch;

static int watch_progress(void *arg, const fst_progress *now) {
    watch *w = arg;
    w->backwards |= now->bytes_done < w->done || now->bytes_done > now->bytes_total;
    w->done = now->bytes_done;
    w->total = now->bytes_total;
    return ++w->calls == w->stop_at;
}

TEST(convert, progress_ends_with_all_bytes) {
    make_input();
    watch w = {0};
    fst_options options = options_for(FST_BF16);
    options.progress = watch_progress;
    options.progress_arg = &w;
    CHECK_INT(FST_OK, convert_with(&options, 13));
    CHECK(w.calls > 0);
    CHECK_INT(0, w.backwards);
    CHECK_INT(3 * 4096 + 33, w.done);
    CHECK_INT(w.total, w.done);
}

TEST(convert, progress_cancels) {
    make_input();
    watch w = {.stop_at = 1};
    fst_options options = options_for(FST_BF16);
    options.progress = watch_progress;
    options.progress_arg = &w;
    CHECK_INT(FST_E_CANCELLED, convert_with(&options, 13));
    CHECK(!is_there("out", "config.json"));
    check_converts(FST_BF16, 13);
    check_output();
}

TEST(convert, a_flag_cancels) {
    make_input();
    volatile int cancel = 1;
    fst_options options = options_for(FST_BF16);
    options.cancel = &cancel;
    CHECK_INT(FST_E_CANCELLED, convert_with(&options, 13));
    CHECK(!is_there("out", FIRST));
    check_converts(FST_BF16, 13);
    check_output();
}

TEST(convert, nothing_is_held_afterwards) {
    make_input();
    check_converts(FST_BF16, 13);
    fst_release_cached();
    unsigned descriptors = support_open_descriptors(), threads = support_threads();
    for (int at = 1; at < 60; at += 7) {
        remove_tree(test_path("out"));
        convert_failing(at, 1, 13);
    }
    fst_release_cached();
    CHECK_INT(descriptors, support_open_descriptors());
    CHECK_INT(threads, support_threads());
}
