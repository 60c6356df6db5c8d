/* Loads that compute scales: against the recipe of DESIGN.md, 'Quantize on load', written here anew. On the CPU device and
 * on the fake GPU that runs late. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <dlpack/dlpack.h>

#include "harness.h"
#include "model.h"
#include "support.h"

/* ---- The recipe ------------------------------------------------------------------------------------ */

typedef struct target {
    fst_dtype dtype;
    int exponent_bits, mantissa_bits, bias;
    float most;            /* M */
    unsigned largest, nan; /* codes */
} target;

static const target targets[] = {{FST_F8_E4M3, 4, 3, 7, 448, 0x7E, 0x7F},
                                 {FST_F8_E5M2, 5, 2, 15, 57344, 0x7B, 0x7E},
                                 {FST_F8_E4M3FNUZ, 4, 3, 8, 224, 0x7F, 0x80}};

static double value_of(const target *t, unsigned code) {
    unsigned exponent = code >> t->mantissa_bits, mantissa = code & ((1u << t->mantissa_bits) - 1);
    double fraction = (double)mantissa / (1 << t->mantissa_bits);
    return exponent ? ldexp(1 + fraction, (int)exponent - t->bias) : ldexp(fraction, 1 - t->bias);
}

/* The nearest code, the even one of two, at most the largest. */
static unsigned code_of(const target *t, float x) {
    int fnuz = t->dtype == FST_F8_E4M3FNUZ;
    unsigned sign = signbit(x) ? 0x80 : 0, low = 0, high = t->largest;
    double a = fabs((double)x);
    if (isnan(x)) return fnuz ? t->nan : t->nan | sign;
    while (low < high) { /* the last that is not above a */
        unsigned middle = (low + high + 1) / 2;
        if (value_of(t, middle) <= a) low = middle;
        else high = middle - 1;
    }
    if (low < t->largest) {
        double below = a - value_of(t, low), above = value_of(t, low + 1) - a;
        if (above < below || (above == below && low % 2)) low++;
    }
    return low || !fnuz ? low | sign : 0;
}

static float scale_of(const target *t, float amax) {
    if (isnan(amax)) return amax;
    float s = amax / t->most;
    return s == 0 ? 1 : s;
}

/* ---- Weights ----------------------------------------------------------------------------------------- */

typedef struct weight {
    const char *name;
    fst_dtype dtype;
    uint64_t stack, rows, cols; /* stack 0: a matrix alone */
    void *bytes;                /* as stored */
    float *values;
} weight;

static uint64_t count_of(const weight *w) { return (w->stack ? w->stack : 1) * w->rows * w->cols; }

static float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float float_of_half(uint16_t half) {
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    double a = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                              : ldexp(mantissa, -24);
    return (float)(half & 0x8000 ? -a : a);
}

static size_t size_of(fst_dtype dtype) { return fst_dtype_bits(dtype) / 8; }

/* Its value, and the largest finite one of the type where it is Inf. */
static float stored_value(const weight *w, uint64_t i) {
    const unsigned char *at = (const unsigned char *)w->bytes + i * size_of(w->dtype);
    double x;
    uint32_t word = 0;
    memcpy(&word, at, size_of(w->dtype) < 4 ? size_of(w->dtype) : 4);
    if (w->dtype == FST_F16) return float_of_half((uint16_t)word);
    if (w->dtype == FST_BF16) return float_of_bits(word << 16);
    if (w->dtype == FST_F32) return float_of_bits(word);
    memcpy(&x, at, 8);
    return (float)x;
}

static float largest_of(fst_dtype dtype) {
    return dtype == FST_F16    ? 65504
           : dtype == FST_BF16 ? float_of_bits(0x7F7F0000)
                               : float_of_bits(0x7F7FFFFF);
}

/* Random values of very different sizes, by row; some are 0. */
static void fill(weight *w, uint64_t seed) {
    uint64_t count = count_of(w);
    uint16_t *random = malloc(count * 2 + 2);
    w->bytes = calloc(count + 1, 8);
    w->values = calloc(count + 1, sizeof *w->values);
    support_random(random, count * 2, seed);
    for (uint64_t i = 0; i < count; i++) {
        double x = ldexp(random[i] % 256, random[i] / 256 % 8 - 16 + (int)(i / (w->cols + 1) % 5) * 3) *
                   (random[i] % 2 ? -1 : 1) * (i % 97 == 5 ? 0 : 1);
        float f = (float)x;
        uint32_t bits;
        memcpy(&bits, &f, 4);
        if (w->dtype == FST_BF16) ((uint16_t *)w->bytes)[i] = (uint16_t)(bits >> 16); /* 8 bits: exact */
        if (w->dtype == FST_F32) ((float *)w->bytes)[i] = f + f / 3;
        if (w->dtype == FST_F64) ((double *)w->bytes)[i] = x + x / 3;
        /* The exponent of F16 is 5 bits wide: any pattern but those of Inf and NaN. */
        if (w->dtype == FST_F16) ((uint16_t *)w->bytes)[i] = random[i] & 0xBBFF;
        w->values[i] = stored_value(w, i);
    }
    free(random);
}

static void release(weight *weights, size_t count) {
    for (size_t i = 0; i < count; i++) {
        free(weights[i].bytes);
        free(weights[i].values);
    }
}

/* A checkpoint of these. Data does not start where anything is aligned. */
static const char *write_weights(const weight *weights, size_t count) {
    support_tensor tensors[16];
    char shapes[16][64];
    for (size_t i = 0; i < count; i++) {
        const weight *w = &weights[i];
        if (w->stack) sprintf(shapes[i], "[%d,%d,%d]", (int)w->stack, (int)w->rows, (int)w->cols);
        else sprintf(shapes[i], "[%d,%d]", (int)w->rows, (int)w->cols);
        tensors[i] = (support_tensor){w->name, fst_dtype_name(w->dtype), shapes[i], w->bytes,
                                      count_of(w) * size_of(w->dtype)};
    }
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, count, 1);
    return path;
}

/* ---- Results ------------------------------------------------------------------------------------------ */

static uint64_t units(uint64_t size, uint64_t unit) { return (size + unit - 1) / unit; }

static const target *target_of(fst_dtype dtype) {
    for (size_t i = 0; i < 3; i++)
        if (targets[i].dtype == dtype) return &targets[i];
    test_fail(__FILE__, __LINE__, "no target");
}

/* One matrix, its codes and scales. */
static void check_matrix(const weight *w, const float *values, const target *t, fst_scale kind,
                         const unsigned char *codes, const float *scales) {
    uint64_t tile_rows = kind == FST_QUANTIZE_ROW ? 1 : kind == FST_QUANTIZE_BLOCK ? 128 : w->rows;
    uint64_t tile_cols = kind == FST_QUANTIZE_BLOCK ? 128 : w->cols;
    for (uint64_t top = 0; top < w->rows; top += tile_rows)
        for (uint64_t left = 0; left < w->cols; left += tile_cols) {
            uint64_t bottom = top + tile_rows < w->rows ? top + tile_rows : w->rows;
            uint64_t right = left + tile_cols < w->cols ? left + tile_cols : w->cols;
            float amax = 0;
            for (uint64_t r = top; r < bottom; r++)
                for (uint64_t c = left; c < right; c++) {
                    float a = fabsf(values[r * w->cols + c]);
                    if (isinf(a)) a = largest_of(w->dtype);
                    if (isnan(a) || a > amax) amax = a;
                    if (isnan(amax)) break;
                }
            float s = scale_of(t, amax);
            float got = scales[top / tile_rows * units(w->cols, tile_cols) + left / tile_cols];
            if (memcmp(&s, &got, 4) && !(isnan(s) && isnan(got)))
                test_fail(__FILE__, __LINE__, "%s: scale of %d,%d: want %a, got %a", w->name, (int)top,
                          (int)left, (double)s, (double)got);
            for (uint64_t r = top; r < bottom; r++)
                for (uint64_t c = left; c < right; c++) {
                    float x = values[r * w->cols + c];
                    unsigned want = code_of(t, copysignf(x / s, x));
                    if (codes[r * w->cols + c] != want)
                        test_fail(__FILE__, __LINE__, "%s: %d,%d: want %02X, got %02X", w->name, (int)r,
                                  (int)c, want, codes[r * w->cols + c]);
                }
        }
}

static void check_scale_shape(const weight *w, fst_scale kind, const fst_tensor *scales) {
    uint64_t want[3], ndim = 0;
    if (w->stack) want[ndim++] = w->stack;
    if (w->stack || kind != FST_QUANTIZE_TENSOR) {
        want[ndim++] = kind == FST_QUANTIZE_TENSOR ? 1
                       : kind == FST_QUANTIZE_ROW  ? w->rows
                                                   : units(w->rows, 128);
        want[ndim++] = kind == FST_QUANTIZE_BLOCK ? units(w->cols, 128) : 1;
    }
    uint64_t count = 1;
    for (uint64_t i = 0; i < ndim; i++) count *= want[i];
    CHECK_INT(FST_F32, scales->dtype);
    CHECK_INT(ndim, scales->ndim);
    CHECK(ndim == 0 || memcmp(want, scales->shape, ndim * 8) == 0);
    CHECK_INT(count * 4, scales->nbytes);
}

static void check_weight(const weight *w, fst_dtype dtype, fst_scale kind, const fst_tensor *codes,
                         const fst_tensor *scales) {
    uint64_t each = scales->nbytes / 4 / (w->stack ? w->stack : 1);
    CHECK_INT(dtype, codes->dtype);
    CHECK_INT(w->stack ? 3 : 2, codes->ndim);
    CHECK_INT(count_of(w), codes->nbytes);
    check_scale_shape(w, kind, scales);
    for (uint64_t i = 0; i < (w->stack ? w->stack : 1); i++)
        check_matrix(w, w->values + i * w->rows * w->cols, target_of(dtype), kind,
                     (unsigned char *)codes->data + i * w->rows * w->cols, (float *)scales->data + i * each);
}

static const char *name_of_scales(const char *of, fst_scale kind) {
    static char name[256];
    snprintf(name, sizeof name, "%s%s", of, kind == FST_QUANTIZE_BLOCK ? "_scale_inv" : "_scale");
    return name;
}

static fst_options options_for(int device, fst_dtype cast, fst_scale scale) {
    fst_options options = support_options(device);
    options.cast = cast;
    options.scale = scale;
    return options;
}

static fst_model *load(const char *path, const fst_options *options) {
    fst_model *model;
    fst_error error;
    if (fst_load(support_list(path), options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    return model;
}

/* Weights alone, each followed by its scales. */
static void check_model(const fst_model *model, const weight *weights, size_t count, fst_dtype dtype,
                        fst_scale kind) {
    CHECK_INT(2 * count, fst_model_count(model));
    for (size_t i = 0; i < count; i++) {
        fst_tensor codes, scales;
        CHECK_INT(FST_OK, fst_model_at(model, 2 * i, &codes));
        CHECK_STR(weights[i].name, codes.name);
        CHECK_INT(FST_OK, fst_model_find(model, name_of_scales(weights[i].name, kind), &scales));
        CHECK_INT(2 * i + 1, fst_model_index(model, scales.name));
        check_weight(&weights[i], dtype, kind, &codes, &scales);
    }
}

/* On the CPU device, and on the fake GPU with some seeds. */
static void check_loads(weight *weights, size_t count, fst_dtype dtype, fst_scale kind, int seeds) {
    const char *path = write_weights(weights, count);
    for (int seed = 0; seed <= seeds; seed++) {
        fst_options options = options_for(seed ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, dtype, kind);
        if (seed) fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)seed});
        fst_model *model = load(path, &options);
        check_model(model, weights, count, dtype, kind);
        fst_model_free(model);
        if (seed) fake_gpu_end();
    }
}

/* Slots are 64 KiB: rows of 300 and 2,000 are many to a chunk, those of 40,000 do not fit; bands of 128 rows fit where
 * there are 200 columns. */
static void check_shapes(fst_dtype stored, fst_dtype dtype, fst_scale kind, int seeds) {
    weight weights[] = {{"a.weight", stored, 0, 150, 300, NULL, NULL},
                        {"one_row.weight", stored, 0, 1, 2000, NULL, NULL},
                        {"one_col.weight", stored, 0, 700, 1, NULL, NULL},
                        {"one.weight", stored, 0, 1, 1, NULL, NULL},
                        {"wide.weight", stored, 0, 5, 40000, NULL, NULL},
                        {"x.experts.up_proj", stored, 3, 130, 200, NULL, NULL},
                        {"x.experts.w.weight", stored, 2, 3, 129, NULL, NULL}};
    size_t count = sizeof weights / sizeof *weights;
    for (size_t i = 0; i < count; i++) fill(&weights[i], i + 1);
    check_loads(weights, count, dtype, kind, seeds);
    release(weights, count);
}

TEST(computed, rows_of_every_type_to_every_target) {
    static const fst_dtype stored[] = {FST_F32, FST_F16, FST_BF16, FST_F64};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 3; k++) check_shapes(stored[i], targets[k].dtype, FST_QUANTIZE_ROW, 1);
}

TEST(computed, blocks_of_every_type_to_every_target) {
    static const fst_dtype stored[] = {FST_F32, FST_F16, FST_BF16, FST_F64};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 3; k++) check_shapes(stored[i], targets[k].dtype, FST_QUANTIZE_BLOCK, 1);
}

TEST(computed, one_scale_of_every_type_to_every_target) {
    static const fst_dtype stored[] = {FST_F32, FST_F16, FST_BF16, FST_F64};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 3; k++) check_shapes(stored[i], targets[k].dtype, FST_QUANTIZE_TENSOR, 1);
}

TEST(computed, many_orders_of_a_late_device) {
    for (fst_scale kind = FST_QUANTIZE_TENSOR; kind <= FST_QUANTIZE_BLOCK; kind++)
        check_shapes(FST_BF16, FST_F8_E4M3, kind, 12);
}

/* ---- The vectors of quant-formats 12.2 ------------------------------------------------------------------ */

TEST(computed, the_vectors_of_the_specification) {
    static const uint32_t x[] = {0x3F800000, 0xC0200000, 0x3DCCCCCD, 0, 0x40490FDB, 0xBA83126F};
    static const unsigned char codes[] = {0x71, 0xFB, 0x56, 0x00, 0x7E, 0xA1};
    static const uint32_t scales[] = {0x3BE5C8FA, 0, 0x3C65C8FA};
    const support_tensor tensors[] = {{"m.weight", "F32", "[1,6]", x, sizeof x}};
    support_checkpoint(test_path("model.safetensors"), NULL, tensors, 1, 0);
    for (int way = 0; way < 18; way++) {
        const target *t = &targets[way % 3];
        if (t->dtype == FST_F8_E5M2) continue;
        fst_options options =
            options_for(way / 9 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, t->dtype, (fst_scale)(way / 3 % 3 + 1));
        fst_tensor tensor;
        fake_gpu_begin(&(fake_gpu_options){.seed = 1});
        fst_model *model = load(test_path("model.safetensors"), &options);
        CHECK_INT(FST_OK, fst_model_at(model, 0, &tensor));
        CHECK_BYTES(codes, tensor.data, 6);
        CHECK_INT(FST_F32, tensor.stored_dtype);
        CHECK_INT(FST_OK, fst_model_at(model, 1, &tensor));
        CHECK_BYTES(&scales[way % 3], tensor.data, 4);
        CHECK_INT(0, tensor.file_nbytes);
        fst_model_free(model);
        fake_gpu_end();
    }
}

/* ---- What waits ------------------------------------------------------------------------------------------ */

static fst_reader_kind readers[] = {FST_READER_THREADS, FST_READER_DIRECT, FST_READER_URING};

/* Windows of one stripe: whoever comes early waits, whatever is under way. */
TEST(computed, windows_as_small_as_they_get) {
    weight weights[] = {{"a.weight", FST_F32, 0, 100, 3000, NULL, NULL},
                        {"b.weight", FST_F64, 0, 40, 300, NULL, NULL},
                        {"c.weight", FST_BF16, 0, 4, 50000, NULL, NULL},
                        {"d.weight", FST_F16, 0, 500, 400, NULL, NULL},
                        {"e.weight", FST_F64, 0, 1, 10, NULL, NULL}};
    for (size_t i = 0; i < 5; i++) fill(&weights[i], i + 11);
    const char *path = write_weights(weights, 5);
    fst_window_bytes = 1;
    for (uint64_t seed = 1; seed <= 36; seed++) {
        fst_scale kind = (fst_scale)(seed % 3 + 1);
        fst_options options = options_for(seed % 4 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, FST_F8_E4M3, kind);
        options.threads = (unsigned)(seed / 12) * 3 + 1;
        options.reader = readers[seed / 3 % 3];
        options.cache = FST_CACHE_AVOID;
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        fst_model *model = load(path, &options);
        check_model(model, weights, 5, FST_F8_E4M3, kind);
        fst_model_free(model);
        fake_gpu_end();
    }
    fst_window_bytes = 0;
    release(weights, 5);
}

/* Final tensors, the ring, and the two largest that wait. */
TEST(computed, memory_is_for_two_that_wait) {
    weight weights[] = {{"a.weight", FST_F32, 0, 300, 1000, NULL, NULL},
                        {"b.weight", FST_F32, 0, 299, 1000, NULL, NULL},
                        {"c.weight", FST_F32, 0, 290, 1000, NULL, NULL},
                        {"d.weight", FST_F32, 0, 300, 1000, NULL, NULL}};
    for (size_t i = 0; i < 4; i++) fill(&weights[i], i);
    const char *path = write_weights(weights, 4);
    fst_options options = options_for(FST_DEVICE_GPU(0), FST_F8_E4M3, FST_QUANTIZE_TENSOR);
    fst_stats stats = {.size = sizeof stats};
    fst_window_bytes = 1;
    fake_gpu_begin(&(fake_gpu_options){.seed = 4});
    fst_model *model = load(path, &options);
    fst_model_stats(model, &stats);
    CHECK_INT(stats.peak_device_bytes, fake_gpu_peak());
    uint64_t ring = stats.slots * (stats.slot_bytes * 9 / 8 + 8192);
    CHECK(fake_gpu_peak() <= stats.bytes_out + 4096 + ring + 2 * 300 * 1000 * 4 + 256);
    CHECK_INT(0, stats.nans);
    fst_release_cached();
    CHECK_INT(1, fake_gpu_blocks());
    fst_model_free(model);
    fake_gpu_end();
    fst_window_bytes = 0;
    release(weights, 4);
}

/* ---- What is left alone ------------------------------------------------------------------------------------ */

typedef struct named {
    const char *name, *shape;
    size_t count;
    int is_quantized;
} named;

static const named names[] = {{"model.embed_tokens.weight", "[4,6]", 24, 0},
                              {"transformer.wte.weight", "[4,6]", 24, 0},
                              {"layers.0.q_proj.weight", "[4,6]", 24, 1},
                              {"layers.0.q_proj.bias", "[6]", 6, 0},
                              {"layers.0.norm.weight", "[6]", 6, 0},
                              {"layers.0.mlp.gate.weight", "[4,6]", 24, 0},
                              {"layers.0.mlp.gate_proj.weight", "[4,6]", 24, 1},
                              {"layers.0.mlp.shared_expert_gate.weight", "[4,6]", 24, 0},
                              {"layers.0.mlp.router.weight", "[4,6]", 24, 0},
                              {"layers.0.mlp.experts.up_proj", "[2,3,4]", 24, 1},
                              {"layers.0.mlp.experts.up_proj_bias", "[4,6]", 24, 0},
                              {"layers.0.mlp.experts.3.w1.weight", "[4,6]", 24, 1},
                              {"layers.0.conv1d.weight", "[4,1,6]", 24, 0},
                              {"layers.0.conv2d.weight", "[1,4,1,6]", 24, 0},
                              {"layers.0.none.weight", "[0,6]", 0, 0},
                              {"one.weight", "[]", 1, 0},
                              {"lm_head.weight", "[4,6]", 24, 0},
                              {"output.weight", "[4,6]", 24, 0}};
enum { NAMES = sizeof names / sizeof *names };

static const char *write_names(void) {
    static uint16_t ones[24];
    support_tensor tensors[NAMES + 1];
    for (int i = 0; i < 24; i++) ones[i] = 0x3F80;
    for (int i = 0; i < NAMES; i++)
        tensors[i] = (support_tensor){names[i].name, "BF16", names[i].shape, ones, names[i].count * 2};
    tensors[NAMES] = (support_tensor){"positions", "I64", "[2]", ones, 16};
    support_checkpoint(test_path("names.safetensors"), NULL, tensors, NAMES + 1, 0);
    return test_path("names.safetensors");
}

TEST(computed, names_and_shapes_that_stay_as_stored) {
    const char *path = write_names();
    for (fst_scale kind = FST_QUANTIZE_TENSOR; kind <= FST_QUANTIZE_BLOCK; kind++) {
        fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E5M2, kind);
        fst_model *model = load(path, &options);
        CHECK_INT(NAMES + 1 + 4, fst_model_count(model));
        for (int i = 0; i < NAMES; i++) {
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_model_find(model, names[i].name, &tensor));
            if (tensor.dtype != (names[i].is_quantized ? FST_F8_E5M2 : FST_BF16))
                test_fail(__FILE__, __LINE__, "%s is %s", names[i].name, fst_dtype_name(tensor.dtype));
            fst_status there = fst_model_find(model, name_of_scales(names[i].name, kind), &tensor);
            CHECK_INT(names[i].is_quantized ? FST_OK : FST_E_NOT_FOUND, there);
        }
        fst_model_free(model);
    }
}

static int some_rule(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    int *seen = arg;
    for (int i = 0; i < NAMES; i++)
        if (strcmp(names[i].name, tensor->name) == 0) {
            int asked = names[i].is_quantized;
            CHECK_INT(asked ? FST_F8_E4M3 : FST_NATIVE, rule->cast);
            CHECK_INT(asked ? FST_QUANTIZE_ROW : FST_QUANTIZE_NONE, rule->scale);
            ++*seen;
        }
    if (strstr(tensor->name, "lm_head")) rule->cast = FST_F8_E4M3, rule->scale = FST_QUANTIZE_TENSOR;
    if (strstr(tensor->name, "norm")) rule->cast = FST_F32;
    if (strstr(tensor->name, "q_proj.weight")) rule->cast = FST_NATIVE;
    if (strstr(tensor->name, "gate_proj")) rule->cast = FST_F16;
    if (strstr(tensor->name, "w1")) rule->scale = FST_QUANTIZE_NONE;
    return 0;
}

TEST(computed, a_rule_says_otherwise) {
    fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E4M3, FST_QUANTIZE_ROW);
    int seen = 0;
    fst_tensor tensor;
    options.rule = some_rule;
    options.rule_arg = &seen;
    fst_model *model = load(write_names(), &options);
    static const struct {
        const char *name;
        fst_dtype dtype;
        size_t dims_of_scale; /* 9: there is none */
    } want[] = {{"lm_head.weight", FST_F8_E4M3, 0},
                {"layers.0.norm.weight", FST_F32, 9},
                {"layers.0.q_proj.weight", FST_BF16, 9},
                {"layers.0.mlp.gate_proj.weight", FST_F16, 9},
                {"layers.0.mlp.experts.3.w1.weight", FST_F8_E4M3, 9},
                {"layers.0.mlp.experts.up_proj", FST_F8_E4M3, 3}};
    CHECK_INT(NAMES, seen);
    for (int i = 0; i < 6; i++) {
        CHECK_INT(FST_OK, fst_model_find(model, want[i].name, &tensor));
        CHECK_INT(want[i].dtype, tensor.dtype);
        fst_status there = fst_model_find(model, name_of_scales(want[i].name, FST_QUANTIZE_ROW), &tensor);
        CHECK_INT(want[i].dims_of_scale == 9 ? FST_E_NOT_FOUND : FST_OK, there);
        if (!there) CHECK_INT(want[i].dims_of_scale, tensor.ndim);
    }
    fst_model_free(model);
}

static int quantize_norms(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    if (strstr(tensor->name, arg)) rule->cast = FST_F8_E4M3, rule->scale = FST_QUANTIZE_ROW;
    return 0;
}

static int unknown_scale(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    (void)arg, (void)tensor;
    rule->scale = (fst_scale)9;
    return 0;
}

static void expect(fst_status status, const char *path, const fst_options *options, const char *text) {
    fst_model *model;
    fst_error error;
    CHECK_INT(status, fst_load(support_list(path), options, &model, &error));
    if (!strstr(error.text, text)) test_fail(__FILE__, __LINE__, "\"%s\" does not say %s", error.text, text);
    CHECK(!model);
}

TEST(computed, what_is_asked_for_and_cannot_be) {
    const char *path = write_names();
    fst_options options = options_for(FST_DEVICE_CPU, FST_BF16, FST_QUANTIZE_ROW);
    expect(FST_E_ARG, path, &options, "BF16");
    options.cast = FST_NATIVE;
    expect(FST_E_ARG, path, &options, "NATIVE");
    options.cast = FST_F8_E5M2FNUZ;
    expect(FST_E_ARG, path, &options, "F8_E5M2FNUZ");
    options = options_for(FST_DEVICE_CPU, FST_F8_E4M3, (fst_scale)4);
    expect(FST_E_ARG, path, &options, "4");
    options = options_for(FST_DEVICE_CPU, FST_F8_E4M3, FST_QUANTIZE_NONE);
    options.rule = quantize_norms;
    options.rule_arg = "norm";
    expect(FST_E_ARG, path, &options, "layers.0.norm.weight");
    options.rule_arg = "conv2d";
    expect(FST_E_ARG, path, &options, "layers.0.conv2d.weight");
    options.rule = unknown_scale;
    expect(FST_E_ARG, path, &options, "9");
}

TEST(computed, scales_that_take_the_name_of_another_tensor) {
    static const float x[4] = {1, 2, 3, 4};
    const support_tensor tensors[] = {{"m.weight", "F32", "[2,2]", x, 16},
                                      {"m.weight_scale", "I32", "[1]", x, 4}};
    const char *path = test_path("m.safetensors");
    support_checkpoint(path, NULL, tensors, 2, 0);
    fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E4M3, FST_QUANTIZE_ROW);
    expect(FST_E_DUPLICATE, path, &options, "m.weight_scale");
    expect(FST_E_DUPLICATE, path, &options, "\"m.weight\"");
    options.scale = FST_QUANTIZE_BLOCK;
    fst_model_free(load(path, &options));
}

typedef struct place {
    unsigned char *memory;
    uint64_t nbytes;
} place;

static int into_place(void *arg, const fst_tensor *tensor, fst_rule *rule) {
    const place *p = arg;
    if (strcmp(tensor->name, "m.weight") == 0) rule->memory = p->memory, rule->memory_bytes = p->nbytes;
    return 0;
}

TEST(computed, into_memory_of_the_callers) {
    weight weights[] = {{"a.weight", FST_F32, 0, 30, 7, NULL, NULL},
                        {"m.weight", FST_F32, 0, 300, 70, NULL, NULL}};
    static unsigned char memory[300 * 70 + 2];
    for (size_t i = 0; i < 2; i++) fill(&weights[i], i + 3);
    const char *path = write_weights(weights, 2);
    place mine = {memory + 1, 300 * 70};
    for (int way = 0; way < 6; way++) {
        fst_scale kind = (fst_scale)(way / 2 + 1);
        fst_options options = options_for(way % 2 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, FST_F8_E4M3, kind);
        options.rule = into_place;
        options.rule_arg = &mine;
        memset(memory, 0xEE, sizeof memory);
        fake_gpu_begin(&(fake_gpu_options){.seed = 3});
        fst_model *model = load(path, &options);
        fst_tensor tensor;
        check_model(model, weights, 2, FST_F8_E4M3, kind);
        CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &tensor));
        CHECK(tensor.data == memory + 1 && memory[0] == 0xEE && memory[300 * 70 + 1] == 0xEE);
        fst_model_free(model);
        fake_gpu_end();
    }
    mine.nbytes--;
    fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E4M3, FST_QUANTIZE_ROW);
    options.rule = into_place;
    options.rule_arg = &mine;
    expect(FST_E_ARG, path, &options, "m.weight");
    release(weights, 2);
}

/* ---- What is not a number ----------------------------------------------------------------------------------- */

TEST(computed, nans_are_codes_and_are_counted) {
    weight weights[] = {{"a.weight", FST_F32, 0, 100, 900, NULL, NULL},
                        {"b.weight", FST_BF16, 0, 20, 30, NULL, NULL}};
    static const uint64_t at[] = {0, 899, 5000, 5001, 89999};
    for (size_t i = 0; i < 2; i++) fill(&weights[i], i);
    for (int i = 0; i < 5; i++) ((uint32_t *)weights[0].bytes)[at[i]] = i % 2 ? 0xFFC00001 : 0x7F800001;
    ((uint32_t *)weights[0].bytes)[700] = 0x7F800000;   /* Inf beside a NaN */
    ((uint32_t *)weights[0].bytes)[20000] = 0xFF800000; /* alone in its row */
    ((uint16_t *)weights[1].bytes)[77] = 0x7FFF;
    for (size_t k = 0; k < 2; k++)
        for (uint64_t i = 0; i < count_of(&weights[k]); i++)
            weights[k].values[i] = stored_value(&weights[k], i);
    const char *path = write_weights(weights, 2);
    for (int way = 0; way < 18; way++) {
        fst_scale kind = (fst_scale)(way % 3 + 1);
        fst_dtype dtype = targets[way / 3 % 3].dtype;
        fst_options options = options_for(way / 9 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, dtype, kind);
        fst_stats stats = {.size = sizeof stats};
        fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)way});
        fst_model *model = load(path, &options);
        fst_model_stats(model, &stats);
        CHECK_INT(6, stats.nans);
        for (size_t i = 0; i < 2; i++) {
            fst_tensor codes;
            CHECK_INT(FST_OK, fst_model_find(model, weights[i].name, &codes));
            for (uint64_t k = 0; k < count_of(&weights[i]); k++) {
                unsigned code = ((unsigned char *)codes.data)[k];
                if (isnan(weights[i].values[k]))
                    CHECK_INT(code_of(target_of(dtype), weights[i].values[k]), code);
            }
        }
        if (kind == FST_QUANTIZE_ROW) check_model(model, weights, 2, dtype, kind);
        fst_model_free(model);
        fake_gpu_end();
    }
    release(weights, 2);
}

/* ---- One by one --------------------------------------------------------------------------------------------- */

static void check_stream(const char *path, const fst_options *options, const weight *weights, size_t count) {
    fst_stream *stream;
    fst_error error;
    fst_tensor tensor;
    unsigned char *codes[16] = {0};
    float *scales[16] = {0};
    fst_tensor kept[16][2];
    size_t seen = 0;
    if (fst_stream_open(support_list(path), options, &stream, &error))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    for (;; seen++) {
        if (fst_stream_next(stream, &tensor, NULL, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
        if (!tensor.name) break;
        for (size_t i = 0; i < count; i++) {
            int is_codes = strcmp(tensor.name, weights[i].name) == 0;
            int is_scales = strcmp(tensor.name, name_of_scales(weights[i].name, options->scale)) == 0;
            if (!is_codes && !is_scales) continue;
            void *copy = malloc(tensor.nbytes);
            memcpy(copy, tensor.data, tensor.nbytes);
            if (is_codes) codes[i] = copy;
            else scales[i] = copy;
            kept[i][is_scales] = tensor;
            kept[i][is_scales].data = copy;
            if (!(options->flags & FST_AS_READY)) CHECK_INT(2 * i + (size_t)is_scales, seen);
        }
    }
    CHECK_INT(2 * count, seen);
    for (size_t i = 0; i < count; i++) {
        CHECK(codes[i] && scales[i]);
        check_weight(&weights[i], options->cast, options->scale, &kept[i][0], &kept[i][1]);
        free(codes[i]);
        free(scales[i]);
    }
    fst_stream_close(stream);
}

TEST(computed, tensor_by_tensor) {
    weight weights[] = {
        {"a.weight", FST_F32, 0, 70, 300, NULL, NULL},   {"b.weight", FST_F32, 0, 100, 1000, NULL, NULL},
        {"c.weight", FST_BF16, 0, 300, 400, NULL, NULL}, {"d.weight", FST_F64, 0, 90, 1000, NULL, NULL},
        {"e.weight", FST_F16, 0, 10, 9000, NULL, NULL},  {"f.weight", FST_F32, 0, 1, 1, NULL, NULL}};
    for (size_t i = 0; i < 6; i++) fill(&weights[i], i + 21);
    const char *path = write_weights(weights, 6);
    fst_window_bytes = 1;
    for (uint64_t seed = 0; seed < 36; seed++) {
        fst_options options = options_for(seed % 5 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, FST_F8_E4M3,
                                          (fst_scale)(seed % 3 + 1));
        options.flags = seed / 3 % 2 ? FST_AS_READY : 0;
        options.reader = readers[seed / 6 % 3];
        options.cache = FST_CACHE_AVOID;
        options.memory_bytes = seed / 18 ? 130000 : 0;
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        check_stream(path, &options, weights, 6);
        fake_gpu_end();
    }
    fst_window_bytes = 0;
    release(weights, 6);
}

static struct DLManagedTensorVersioned *held[16];

/* Keeps a handle; with NULL gives all of them back. */
static void hold_or_release(struct DLManagedTensorVersioned *handle) {
    static size_t count;
    if (handle) held[count++] = handle;
    for (; !handle && count; count--) held[count - 1]->deleter(held[count - 1]);
}

/* Handles that hold all the memory: it is said, whoever waits for what, and goes on when they are given back. */
TEST(computed, tensors_that_are_held_while_others_wait) {
    weight weights[8];
    static char all[8][16];
    for (size_t i = 0; i < 8; i++) {
        sprintf(all[i], "w%d.weight", (int)i);
        weights[i] = (weight){all[i], FST_F32, 0, 60, 1000, NULL, NULL};
        fill(&weights[i], i);
    }
    const char *path = write_weights(weights, 8);
    fst_window_bytes = 1;
    for (uint64_t seed = 1; seed < 9; seed++) {
        fst_options options = options_for(FST_DEVICE_GPU(0), FST_F8_E4M3, FST_QUANTIZE_TENSOR);
        struct DLManagedTensorVersioned *handle;
        fst_stream *stream;
        fst_error error;
        fst_tensor tensor;
        fst_status status;
        size_t taken = 0, again = 0;
        options.memory_bytes = 125000;
        fake_gpu_begin(&(fake_gpu_options){.seed = seed});
        CHECK_INT(FST_OK, fst_stream_open(support_list(path), &options, &stream, &error));
        for (;; taken++) {
            while ((status = fst_stream_next(stream, &tensor, &handle, &error)) == FST_E_AGAIN) {
                CHECK(again++ < 100);
                hold_or_release(NULL);
            }
            CHECK_INT(FST_OK, status);
            if (!tensor.name) break;
            hold_or_release(handle);
        }
        CHECK_INT(16, taken);
        CHECK(again > 0);
        hold_or_release(NULL);
        fst_stream_close(stream);
        fake_gpu_end();
    }
    fst_window_bytes = 0;
    release(weights, 8);
}

/* ---- Quantized weights under other scales --------------------------------------------------------------------- */

static float float_of_e4m3(unsigned code) {
    double a = value_of(&targets[0], code & 0x7F);
    return (float)(code & 0x80 ? -a : a);
}

enum { Q_ROWS = 300, Q_COLS = 640 };

/* What F32 values there are in codes and scales, and a checkpoint of them. `way`: blocks, rows, one scale, int8, mxfp4. */
static const char *write_quantized(int way, weight *w) {
    static unsigned char codes[Q_ROWS * Q_COLS], powers[Q_ROWS * Q_COLS / 32];
    static float scales[Q_ROWS];
    static const float nibbles[] = {0, 0.5F, 1, 1.5F, 2, 3, 4, 6};
    static const char *const shapes[] = {"[3,5]", "[300,1]", "[1]", "[300,1]"};
    size_t count = way == 0 ? 15 : way == 2 ? 1 : Q_ROWS;
    support_random(codes, sizeof codes, 5);
    for (size_t i = 0; i < Q_ROWS; i++) scales[i] = 0.01F * (float)(i * 7 % 31 + 1);
    for (size_t i = 0; i < sizeof powers; i++) powers[i] = (unsigned char)(120 + i % 9);
    for (size_t i = 0; i < sizeof codes && way < 3; i++) codes[i] &= 0xF7; /* no NaN */
    *w = (weight){"m.weight", FST_F32, 0, Q_ROWS, Q_COLS, NULL, NULL};
    w->values = malloc(sizeof codes * sizeof *w->values);
    for (size_t i = 0; i < sizeof codes; i++) {
        size_t row = i / Q_COLS, col = i % Q_COLS;
        float s = way == 0 ? scales[row / 128 * 5 + col / 128] : way == 2 ? scales[0] : scales[row];
        unsigned nibble = codes[i / 2] >> (i % 2 * 4) & 15;
        w->values[i] = (way < 3 ? float_of_e4m3(codes[i]) : (float)(signed char)codes[i]) * s;
        if (way == 4)
            w->values[i] = ldexpf(nibbles[nibble & 7] * (nibble & 8 ? -1 : 1), powers[i / 32] - 127);
    }
    const support_tensor bytes[] = {
        {way == 0 ? "m.weight_scale_inv" : "m.weight_scale", "F32", shapes[way % 4], scales, count * 4},
        {"m.weight", way == 3 ? "I8" : "F8_E4M3", "[300,640]", codes, sizeof codes}};
    const support_tensor packed[] = {{"m.weight_packed", "U8", "[300,320]", codes, sizeof codes / 2},
                                     {"m.weight_scale", "U8", "[300,20]", powers, sizeof powers}};
    support_checkpoint(test_path("model.safetensors"), NULL, way == 4 ? packed : bytes, 2, 1);
    return test_path("model.safetensors");
}

TEST(computed, quantized_weights_are_quantized_anew) {
    static const fst_scale same[] = {FST_QUANTIZE_BLOCK, FST_QUANTIZE_ROW, FST_QUANTIZE_TENSOR,
                                     FST_QUANTIZE_NONE, FST_QUANTIZE_NONE};
    for (int way = 0; way < 5; way++)
        for (int k = 0; k < 18; k++) {
            weight w;
            const char *path = write_quantized(way, &w);
            fst_scale kind = (fst_scale)(k % 3 + 1);
            const target *t = &targets[k / 3 % 3];
            fst_options options = options_for(k / 9 ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU, t->dtype, kind);
            if (kind == same[way] && t->dtype != FST_F8_E5M2) { /* kept: other cases look at that */
                release(&w, 1);
                continue;
            }
            fst_window_bytes = k % 2;
            fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)k});
            fst_model *model = load(path, &options);
            check_model(model, &w, 1, t->dtype, kind);
            fst_model_free(model);
            fake_gpu_end();
            release(&w, 1);
        }
    fst_window_bytes = 0;
}

TEST(computed, what_is_so_already_is_kept) {
    static const fst_scale same[] = {FST_QUANTIZE_BLOCK, FST_QUANTIZE_ROW, FST_QUANTIZE_TENSOR};
    for (int way = 0; way < 3; way++) {
        weight w;
        const char *path = write_quantized(way, &w);
        fst_options stored = options_for(FST_DEVICE_CPU, FST_NATIVE, FST_QUANTIZE_NONE);
        fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E4M3, same[way]);
        fst_model *want = load(path, &stored), *got = load(path, &options);
        CHECK_INT(2, fst_model_count(got));
        for (size_t i = 0; i < 2; i++) {
            fst_tensor a, b;
            fst_model_at(want, i, &a);
            fst_model_at(got, i, &b);
            CHECK_STR(a.name, b.name);
            CHECK_INT(a.dtype, b.dtype);
            CHECK_INT(a.nbytes, b.nbytes);
            CHECK_BYTES(a.data, b.data, a.nbytes);
        }
        fst_model_free(want);
        fst_model_free(got);
        release(&w, 1);
    }
}

TEST(computed, without_a_kind_of_scales_fp8_stays_refused) {
    weight w;
    const char *path = write_quantized(0, &w);
    fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E4M3, FST_QUANTIZE_NONE);
    expect(FST_E_UNSUPPORTED, path, &options, "m.weight");
    release(&w, 1);
}

/* ---- OCP to FNUZ: quant-formats 9.3 --------------------------------------------------------------------------- */

static const unsigned char ocp[] = {0x00, 0x80, 0x01, 0x38, 0xB8, 0x7E, 0xFE, 0xA3};
static const unsigned char fnuz[] = {0x00, 0x00, 0x01, 0x38, 0xB8, 0x7E, 0xFE, 0xA3};

/* `scale` and its double as they are stored; beside them scales of activations and of the cache. */
static void check_fnuz(const char *name, const char *dtype, const char *shape, const void *scale,
                       const void *twice, size_t size, fst_scale kind) {
    static const float of_input = 0.75F, of_cache = 3;
    static const uint16_t gates[8] = {0x3F80};
    const support_tensor tensors[] = {
        {"m.weight", "F8_E4M3", "[2,4]", ocp, 8},       {name, dtype, shape, scale, size},
        {"m.input_scale", "F32", "[]", &of_input, 4},   {"attn.k_scale", "F32", "[1]", &of_cache, 4},
        {"attn.v_scale", "F32", "[1]", &of_cache, 4},   {"m.pre_quant_scale", "F32", "[1]", &of_cache, 4},
        {"mlp.gate.weight", "BF16", "[2,4]", gates, 16}};
    const float twice_input = 1.5F, twice_cache = 6;
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 7, 0);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++)
        for (int asked = 0; asked < 2; asked++) {
            fst_options options = options_for(device, FST_F8_E4M3FNUZ, asked ? kind : FST_QUANTIZE_NONE);
            fst_tensor tensor;
            fake_gpu_begin(&(fake_gpu_options){.seed = 9});
            fst_model *model = load(path, &options);
            CHECK_INT(7, fst_model_count(model));
            CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &tensor));
            CHECK_INT(FST_F8_E4M3FNUZ, tensor.dtype);
            CHECK_BYTES(fnuz, tensor.data, 8);
            CHECK_INT(FST_OK, fst_model_find(model, name, &tensor));
            CHECK_INT(fst_dtype_from_name(dtype), tensor.dtype);
            CHECK_BYTES(twice, tensor.data, size);
            CHECK_INT(FST_OK, fst_model_find(model, "m.input_scale", &tensor));
            CHECK_BYTES(&twice_input, tensor.data, 4);
            CHECK_INT(FST_OK, fst_model_find(model, "attn.k_scale", &tensor));
            CHECK_BYTES(&twice_cache, tensor.data, 4);
            CHECK_INT(FST_OK, fst_model_find(model, "attn.v_scale", &tensor));
            CHECK_BYTES(&twice_cache, tensor.data, 4);
            CHECK_INT(FST_OK, fst_model_find(model, "m.pre_quant_scale", &tensor));
            CHECK_BYTES(&of_cache, tensor.data, 4);
            fst_model_free(model);
            fake_gpu_end();
        }
}

TEST(computed, ocp_to_fnuz_keeps_bits_and_doubles_scales) {
    static const uint32_t one = 0x3A83126F, twice = 0x3B03126F, subnormal = 0x00400001,
                          twice_subnormal = 0x00800002;
    static const uint16_t rows[] = {0x3C24, 0x0001}, twice_rows[] = {0x3CA4, 0x0002};
    static const uint16_t half = 0x03FF, twice_half = 0x07FE;
    static const unsigned char power = 0x78, twice_power = 0x79, nan_power = 0xFF;
    check_fnuz("m.weight_scale", "F32", "[]", &one, &twice, 4, FST_QUANTIZE_TENSOR);
    check_fnuz("m.weight_scale", "F32", "[1]", &subnormal, &twice_subnormal, 4, FST_QUANTIZE_TENSOR);
    check_fnuz("m.weight_scale", "BF16", "[2,1]", rows, twice_rows, 4, FST_QUANTIZE_ROW);
    check_fnuz("m.weight_scale_inv", "F8_E8M0", "[1,1]", &power, &twice_power, 1, FST_QUANTIZE_TENSOR);
    check_fnuz("m.weight_scale_inv", "F8_E8M0", "[1,1]", &nan_power, &nan_power, 1, FST_QUANTIZE_TENSOR);
    check_fnuz("m.weight_scale", "F16", "[1]", &half, &twice_half, 2, FST_QUANTIZE_TENSOR);
}

/* Without a kind of scales, as that type has no computed ones. Infinities are refused there, too. */
TEST(computed, e5m2_becomes_fnuz_as_well) {
    static unsigned char codes[] = {0x80, 0x7B, 0x3C, 0x01};
    static const float scale = 0.25F, twice = 0.5F;
    const support_tensor tensors[] = {{"m.weight", "F8_E5M2", "[1,4]", codes, 4},
                                      {"m.weight_scale", "F32", "[1]", &scale, 4}};
    const char *path = test_path("model.safetensors");
    fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E5M2FNUZ, FST_QUANTIZE_NONE);
    fst_tensor tensor;
    codes[0] = 0x80;
    support_checkpoint(path, NULL, tensors, 2, 0);
    fst_model *model = load(path, &options);
    fst_model_at(model, 0, &tensor);
    CHECK_INT(FST_F8_E5M2FNUZ, tensor.dtype);
    CHECK_BYTES("\x00\x7B\x3C\x01", tensor.data, 4);
    fst_model_at(model, 1, &tensor);
    CHECK_BYTES(&twice, tensor.data, 4);
    fst_model_free(model);
    codes[0] = 0x7C;
    support_checkpoint(path, NULL, tensors, 2, 0);
    expect(FST_E_QUANTIZED, path, &options, "1 of its codes");
}

/* The same products, bit for bit: 2.6's vector, decoded as FNUZ. */
TEST(computed, products_under_fnuz_are_those_of_ocp) {
    static const unsigned char codes[] = {0x38, 0x7E, 0xA3, 0x01};
    static const uint32_t scale = 0x3A83126F, want[] = {0x3A83126F, 0x3EE56042, 0xB9343959, 0x3603126F};
    const support_tensor tensors[] = {{"m.weight", "F8_E4M3", "[1,4]", codes, 4},
                                      {"m.weight_scale", "F32", "[1]", &scale, 4}};
    const char *path = test_path("model.safetensors");
    fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E4M3FNUZ, FST_QUANTIZE_NONE);
    fst_tensor weight_tensor, scale_tensor;
    support_checkpoint(path, NULL, tensors, 2, 0);
    fst_model *model = load(path, &options);
    fst_model_at(model, 0, &weight_tensor);
    fst_model_at(model, 1, &scale_tensor);
    for (int i = 0; i < 4; i++) {
        unsigned code = ((unsigned char *)weight_tensor.data)[i];
        float product = (float)(value_of(&targets[2], code & 0x7F) * (code & 0x80 ? -1 : 1)) *
                        *(float *)scale_tensor.data;
        CHECK_BYTES(&want[i], &product, 4);
    }
    fst_model_free(model);
}

static void expect_refused(const void *codes, const char *dtype, const void *scale, size_t size,
                           const char *text) {
    const support_tensor tensors[] = {{"m.weight", "F8_E4M3", "[2,4]", codes, 8},
                                      {"m.weight_scale", dtype, "[1]", scale, size}};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 2, 0);
    for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
        fst_options options = options_for(device, FST_F8_E4M3FNUZ, FST_QUANTIZE_NONE);
        fst_stream *stream;
        fst_tensor tensor = {.name = ""};
        fst_error error;
        fst_status status = FST_OK;
        fake_gpu_begin(&(fake_gpu_options){.seed = 2});
        expect(FST_E_QUANTIZED, path, &options, text);
        CHECK_INT(FST_OK, fst_stream_open(support_list(path), &options, &stream, &error));
        while (!status && tensor.name) status = fst_stream_next(stream, &tensor, NULL, &error);
        CHECK_INT(FST_E_QUANTIZED, status);
        fst_stream_close(stream);
        fake_gpu_end();
    }
}

TEST(computed, what_fnuz_cannot_say_is_refused) {
    static const unsigned char nans[] = {0, 0x7F, 1, 0xFF, 2, 0x7F, 3, 4}, power = 254;
    static const uint32_t one = 0x3F800000, large = 0x7F000000;
    static const uint16_t half = 0x7800, bfloat = 0x7F00;
    expect_refused(nans, "F32", &one, 4, "3 of its codes");
    expect_refused(nans, "F32", &one, 4, "m.weight");
    expect_refused(ocp, "F32", &large, 4, "m.weight_scale");
    expect_refused(ocp, "F16", &half, 2, "m.weight_scale");
    expect_refused(ocp, "BF16", &bfloat, 2, "m.weight_scale");
    expect_refused(ocp, "F8_E8M0", &power, 1, "m.weight_scale");
}

TEST(computed, inverse_scales_are_not_halved) {
    static const float scale = 2;
    static const char config[] =
        "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_scale_semantics\":\"inverse\"}}";
    const support_tensor tensors[] = {{"m.weight", "F8_E4M3", "[2,4]", ocp, 8},
                                      {"m.weight_scale", "F32", "[1]", &scale, 4}};
    support_checkpoint(test_path("model.safetensors"), NULL, tensors, 2, 0);
    support_write(test_path("config.json"), config, strlen(config));
    fst_options options = options_for(FST_DEVICE_CPU, FST_F8_E4M3FNUZ, FST_QUANTIZE_NONE);
    expect(FST_E_UNSUPPORTED, test_path("model.safetensors"), &options, "m.weight");
}

/* ---- Faults ---------------------------------------------------------------------------------------------------- */

/* All kinds of conversions in one checkpoint: `write_mixed` has parked and direct ones, quantized ones and FNUZ. */
static const char *write_mixed(void) {
    static unsigned char codes[64 * 1500];
    static float plain[40 * 1500], scales[64];
    support_random(codes, sizeof codes, 3);
    for (size_t i = 0; i < sizeof codes; i++) codes[i] &= 0xF7;
    for (size_t i = 0; i < 40 * 1500; i++) plain[i] = (float)(i % 1000) - 500;
    for (size_t i = 0; i < 64; i++) scales[i] = (float)i + 1;
    const support_tensor tensors[] = {{"a.weight", "F32", "[40,1500]", plain, sizeof plain},
                                      {"b.weight", "F8_E4M3", "[64,1500]", codes, sizeof codes},
                                      {"b.weight_scale", "F32", "[64,1]", scales, sizeof scales},
                                      {"c.weight", "F32", "[2,20000]", plain, 160000},
                                      {"d.weight", "F8_E5M2", "[64,1500]", codes, sizeof codes},
                                      {"d.weight_scale", "F32", "[1]", scales, 4},
                                      {"e.bias", "F32", "[1500]", plain, 6000},
                                      {"f.weight", "F32", "[40,15]", plain, 2400}};
    support_checkpoint(test_path("mixed.safetensors"), NULL, tensors, 8, 0);
    return test_path("mixed.safetensors");
}

/* Row scales keep b as FNUZ, quantize the others. */
TEST(computed, every_device_call_may_fail) {
    const char *path = write_mixed();
    fst_window_bytes = 1;
    for (int kind = FST_QUANTIZE_TENSOR; kind <= FST_QUANTIZE_ROW; kind++)
        for (int at = 1;; at++) {
            fst_options options = options_for(FST_DEVICE_GPU(0), FST_F8_E4M3FNUZ, (fst_scale)kind);
            fst_model *model;
            fst_error error;
            fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)at, .fail_at = at});
            fst_status status = fst_load(support_list(path), &options, &model, &error);
            int reached = fake_gpu_calls() >= at;
            if (reached) CHECK(status == FST_E_DEVICE || status == FST_E_DEVICE_MEMORY);
            else CHECK_INT(FST_OK, status);
            fst_model_free(model);
            fake_gpu_end();
            if (!reached) break;
        }
    fst_window_bytes = 0;
}

TEST(computed, every_device_call_of_a_stream_may_fail) {
    const char *path = write_mixed();
    fst_window_bytes = 1;
    for (int at = 1;; at++) {
        fst_options options = options_for(FST_DEVICE_GPU(0), FST_F8_E4M3FNUZ, FST_QUANTIZE_ROW);
        fst_stream *stream;
        fst_error error;
        fst_tensor tensor = {.name = ""};
        options.flags = at % 2 ? FST_AS_READY : 0;
        fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)at, .fail_at = at});
        fst_status status = fst_stream_open(support_list(path), &options, &stream, &error);
        while (!status && tensor.name) status = fst_stream_next(stream, &tensor, NULL, &error);
        int reached = fake_gpu_calls() >= at;
        if (reached) CHECK(status == FST_E_DEVICE || status == FST_E_DEVICE_MEMORY);
        else CHECK_INT(FST_OK, status);
        fst_stream_close(stream);
        fake_gpu_end();
        if (!reached) break;
    }
    fst_window_bytes = 0;
}

static volatile int is_cancelled;
static void set_cancelled(void) { __atomic_store_n(&is_cancelled, 1, __ATOMIC_RELAXED); }

TEST(computed, cancelled_at_any_time) {
    const char *path = write_mixed();
    fst_window_bytes = 1;
    for (uint64_t after = 1; after < 600000; after += 23456)
        for (int kind = FST_QUANTIZE_TENSOR; kind <= FST_QUANTIZE_BLOCK; kind++) {
            fst_options options = options_for(FST_DEVICE_GPU(0), FST_F8_E4M3, (fst_scale)kind);
            fst_model *model;
            fst_error error;
            is_cancelled = 0;
            options.cancel = &is_cancelled;
            fake_os_begin(&(fake_os_options){.after = after, .hook = set_cancelled});
            fake_gpu_begin(&(fake_gpu_options){.seed = after});
            fst_status status = fst_load(support_list(path), &options, &model, &error);
            if (status) CHECK_INT(FST_E_CANCELLED, status);
            fst_model_free(model);
            fake_gpu_end();
            fake_os_end();
        }
    fst_window_bytes = 0;
}

TEST(computed, memory_that_is_short_is_found_before_anything_is_read) {
    const char *path = write_mixed();
    fst_options options = options_for(FST_DEVICE_GPU(0), FST_F8_E4M3, FST_QUANTIZE_TENSOR);
    fst_model *model;
    fst_error error;
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fst_model_free(load(path, &options));
    uint64_t peak = fake_gpu_peak();
    fake_gpu_end();
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .memory = peak - 1});
    CHECK_INT(FST_E_DEVICE_MEMORY, fst_load(support_list(path), &options, &model, &error));
    fake_gpu_end();
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .memory = peak});
    fst_model_free(load(path, &options));
    fake_gpu_end();
}
