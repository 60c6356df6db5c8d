/* Loads that compute scales: against the recipe of DESIGN.md, 'Quantize on load', written here anew. On the CPU device and
 * on the fake GPU that runs late. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
