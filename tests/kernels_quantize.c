/* Quantization with computed scales: published vectors, any matrix against the definition in double, scales
 * at the ends of the range, NaNs counted, wrong arguments. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "kernels_rig.h"

static const int sources[] = {FST_T_F32, FST_T_F16, FST_T_BF16};
static const int targets[] = {FST_T_F8_E4M3, FST_T_F8_E5M2, FST_T_F8_E4M3FNUZ};
static const fst_scale_kind kinds[] = {FST_SCALE_TENSOR, FST_SCALE_ROW, FST_SCALE_BLOCK};

static size_t size_of(int dtype) { return fst_type_bits(dtype) / 8; }

static uint32_t word_at(const void *words, size_t size, uint64_t i) {
    uint32_t word = 0;
    memcpy(&word, (const uint8_t *)words + i * size, size);
    return word;
}

static uint64_t ceil_div(uint64_t n, uint64_t size) { return n / size + (n % size != 0); }

static uint64_t scales_of(fst_scale_kind kind, uint64_t rows, uint64_t cols) {
    return kind == FST_SCALE_TENSOR ? 1
           : kind == FST_SCALE_ROW  ? rows
                                    : ceil_div(rows, 128) * ceil_div(cols, 128);
}

static uint64_t scale_at(const fst_quantize_args *args, uint64_t i) {
    const uint64_t row = i / args->cols, col = i % args->cols;
    return args->kind == FST_SCALE_TENSOR ? 0
           : args->kind == FST_SCALE_ROW  ? row
                                          : row / 128 * ceil_div(args->cols, 128) + col / 128;
}

/* What a launch left: codes, scales and the number of NaNs (before it: 1000). */
typedef struct outcome {
    const uint8_t *codes;
    const uint32_t *scales;
    uint64_t nans;
} outcome;

/* Codes lie at the start of dst, scales after its middle, the count of NaNs at its end. Everything else must
 * stay. */
static outcome run_quantize(test_rig *rig, fst_quantize_args args, const void *elements, size_t src_skew,
                            size_t dst_skew) {
    const uint64_t count = args.rows * args.cols,
                   scales_size = scales_of(args.kind, args.rows, args.cols) * 4;
    const size_t codes_at = RIG_GUARD + dst_skew, scales_at = rig->capacity / 2,
                 nans_at = rig->capacity - 2 * RIG_GUARD;
    const uint64_t before = 1000;
    outcome out = {rig->host + codes_at, (const uint32_t *)(const void *)(rig->host + scales_at), 0};
    CHECK(src_skew + count * size_of(args.src_dtype) <= rig->capacity);
    CHECK(codes_at + count + RIG_GUARD <= scales_at && scales_at + scales_size + RIG_GUARD <= nans_at);
    memset(rig->host, 0xA5, rig->capacity);
    memcpy(rig->host + nans_at, &before, 8);
    rig_upload(rig, rig->dst, rig->host, rig->capacity);
    if (count) rig_upload(rig, rig->src + src_skew, elements, count * size_of(args.src_dtype));
    args.src = rig->src + src_skew;
    args.dst = rig->dst + codes_at;
    args.scales = (float *)(void *)(rig->dst + scales_at);
    args.nans = (uint64_t *)(void *)(rig->dst + nans_at);
    CHECK_INT(0, rig->gpu.kernels->quantize(rig->stream, &args));
    rig_download(rig, rig->capacity);
    memcpy(&out.nans, rig->host + nans_at, 8);
    const size_t gaps[4][2] = {{0, codes_at},
                               {codes_at + count, scales_at},
                               {scales_at + scales_size, nans_at},
                               {nans_at + 8, rig->capacity}};
    for (int gap = 0; gap < 4; gap++)
        for (size_t i = gaps[gap][0]; i < gaps[gap][1]; i++)
            if (rig->host[i] != 0xA5)
                test_fail(__FILE__, __LINE__, "%s: %s to %s, %zu x %zu, kind %d: byte %zu is changed",
                          rig->gpu.kernels->target, rig_dtype_name(args.src_dtype),
                          rig_dtype_name(args.dst_dtype), (size_t)args.rows, (size_t)args.cols, args.kind, i);
    return out;
}

/* ---- The definition, in double ---- */

static double largest_code(int dst) {
    return dst == FST_T_F8_E4M3 ? 448 : dst == FST_T_F8_E5M2 ? 57344 : 224;
}

static double largest_value(int src) {
    return src == FST_T_F32 ? FLT_MAX : src == FST_T_F16 ? 65504 : rig_value(FST_T_BF16, 0x7F7F);
}

/* M has 3 bits: a quotient by it is never so near a tie that rounding to double first would matter. Of two
 * F32 the quotient in double rounds to the same F32 as the exact one, where that is normal; subnormal ones
 * give code 0. */
static double scale_by_definition(double amax, int dst) {
    const float scale = (float)(amax / largest_code(dst));
    return isnan(amax) ? NAN : scale == 0 ? 1 : scale;
}

static uint32_t code_by_definition(double x, double scale, int dst) {
    const double quotient = isnan(scale) ? NAN : (float)(x / scale);
    return rig_code(dst, copysign(quotient, x), 1);
}

static void check_outcome(const test_rig *rig, const fst_quantize_args *args, const void *elements,
                          outcome got) {
    const uint64_t count = args->rows * args->cols, scales = scales_of(args->kind, args->rows, args->cols);
    double *const amax = calloc(scales + 1, sizeof *amax);
    uint64_t nans = 1000;
    CHECK(amax);
    for (uint64_t i = 0; i < count; i++) {
        double *const to = &amax[scale_at(args, i)];
        const double x = fabs(rig_value(args->src_dtype, word_at(elements, size_of(args->src_dtype), i)));
        nans += isnan(x) ? 1 : 0;
        if (isnan(x) || isnan(*to)) *to = NAN;
        else *to = fmax(*to, isinf(x) ? largest_value(args->src_dtype) : x);
    }
    for (uint64_t i = 0; i < scales; i++) {
        const uint32_t want = rig_code(FST_T_F32, scale_by_definition(amax[i], args->dst_dtype), 0);
        if (want != got.scales[i])
            test_fail(__FILE__, __LINE__, "%s: %s to %s, %zu x %zu, kind %d: scale %zu: want %08X, got %08X",
                      rig->gpu.kernels->target, rig_dtype_name(args->src_dtype),
                      rig_dtype_name(args->dst_dtype), (size_t)args->rows, (size_t)args->cols, args->kind,
                      (size_t)i, want, got.scales[i]);
    }
    for (uint64_t i = 0; i < count; i++) {
        const uint32_t code = word_at(elements, size_of(args->src_dtype), i);
        const double scale = scale_by_definition(amax[scale_at(args, i)], args->dst_dtype);
        const uint32_t want = code_by_definition(rig_value(args->src_dtype, code), scale, args->dst_dtype);
        if (want != got.codes[i])
            test_fail(__FILE__, __LINE__,
                      "%s: %s %08X to %s, %zu x %zu, kind %d, element %zu, scale %08X: want %02X, got %02X",
                      rig->gpu.kernels->target, rig_dtype_name(args->src_dtype), code,
                      rig_dtype_name(args->dst_dtype), (size_t)args->rows, (size_t)args->cols, args->kind,
                      (size_t)i, rig_code(FST_T_F32, scale, 0), want, got.codes[i]);
    }
    CHECK_INT(nans, got.nans);
    free(amax);
}

/* Every target and kind, on elements of one type. */
static void check_matrix(test_rig *rig, int src, uint64_t rows, uint64_t cols, const void *elements,
                         size_t src_skew, size_t dst_skew) {
    for (int t = 0; t < 3; t++)
        for (int k = 0; k < 3; k++) {
            const fst_quantize_args args = {
                .rows = rows, .cols = cols, .src_dtype = src, .dst_dtype = targets[t], .kind = kinds[k]};
            check_outcome(rig, &args, elements, run_quantize(rig, args, elements, src_skew, dst_skew));
        }
}

/* ---- Published vectors ---- */

static const uint32_t six[] = {0x3F800000, 0xC0200000, 0x3DCCCCCD, 0x00000000, 0x40490FDB, 0xBA83126F};
static const uint8_t six_codes[] = {0x71, 0xFB, 0x56, 0x00, 0x7E, 0xA1};

static void check_six(int dst, uint32_t scale) {
    test_rig rig;
    EACH_RIG(&rig, 4096) for (int k = 0; k < 3; k++) {
        const outcome got = run_quantize(
            &rig,
            (fst_quantize_args){
                .rows = 1, .cols = 6, .src_dtype = FST_T_F32, .dst_dtype = dst, .kind = kinds[k]},
            six, 0, 0);
        CHECK_INT(scale, got.scales[0]);
        CHECK_BYTES(six_codes, got.codes, 6);
        CHECK_INT(1000, got.nans);
    }
}

TEST(kernels_quantize, six_numbers_to_e4m3) { check_six(FST_T_F8_E4M3, 0x3BE5C8FA); }
TEST(kernels_quantize, six_numbers_to_fnuz_twice_the_scale) { check_six(FST_T_F8_E4M3FNUZ, 0x3C65C8FA); }

TEST(kernels_quantize, divides_instead_of_multiplying_by_the_reciprocal) {
    static const uint32_t in[] = {0x3D040D44, 0x4093E5E5}; /* x * (1 / s) is a tie and would give 44 */
    test_rig rig;
    EACH_RIG(&rig, 4096) for (int k = 0; k < 3; k++) {
        const outcome got = run_quantize(
            &rig,
            (fst_quantize_args){
                .rows = 1, .cols = 2, .src_dtype = FST_T_F32, .dst_dtype = FST_T_F8_E4M3, .kind = kinds[k]},
            in, 0, 0);
        CHECK_INT(0x3C2906BD, got.scales[0]);
        CHECK_INT(0x45, got.codes[0]);
        CHECK_INT(0x7E, got.codes[1]);
    }
}

/* ---- Any matrix ---- */

/* Numbers about 1, or of any exponent, or any pattern; few of them Inf, NaN, 0, subnormal. */
static void fill(void *elements, int src, uint64_t count, uint64_t *random) {
    const size_t size = size_of(src);
    const unsigned style = (unsigned)rig_below(random, 4), rare = style == 3 ? 40 : 100000;
    for (uint64_t i = 0; i < count; i++) {
        double value = ldexp((double)(int64_t)rig_random(random), -62);
        if (style == 1) value = ldexp(value, (int)rig_below(random, 40) - 30);
        uint32_t code = rig_code(src, (float)value, 0);
        if (rig_below(random, rare) == 0) code = (uint32_t)rig_random(random);
        if (style == 2)
            code &= 0x80000000u >> (32 - 8 * size) | ((1u << (src == FST_T_F16   ? 10
                                                              : src == FST_T_F32 ? 23
                                                                                 : 7)) -
                                                      1);
        memcpy((uint8_t *)elements + i * size, &code, size);
    }
}

static void check_shapes(int src) {
    static const uint64_t shapes[][2] = {{1, 1},     {1, 15},    {1, 16},    {1, 17},    {7, 3},    {13, 1},
                                         {5, 31},    {3, 127},   {2, 128},   {2, 129},   {128, 2},  {129, 5},
                                         {127, 127}, {128, 128}, {129, 129}, {130, 257}, {1, 4095}, {2, 4097},
                                         {3, 8192},  {1, 20011}, {257, 64},  {300, 131}, {1009, 17}};
    static uint8_t elements[131072 * 4];
    test_rig rig;
    EACH_RIG(&rig, 1 << 18) for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        uint64_t random = i + 1;
        for (int style = 0; style < 4; style++) {
            fill(elements, src, shapes[i][0] * shapes[i][1], &random);
            check_matrix(&rig, src, shapes[i][0], shapes[i][1], elements, rig_below(&random, 16),
                         rig_below(&random, 16));
        }
    }
}

TEST(kernels_quantize, shapes_of_f32) { check_shapes(FST_T_F32); }
TEST(kernels_quantize, shapes_of_f16) { check_shapes(FST_T_F16); }
TEST(kernels_quantize, shapes_of_bf16) { check_shapes(FST_T_BF16); }

TEST(kernels_quantize, every_alignment) {
    static uint8_t elements[5 * 67 * 4];
    test_rig rig;
    EACH_RIG(&rig, 1 << 14)
    for (int s = 0; s < 3; s++)
        for (size_t src_skew = 0; src_skew < 16; src_skew++)
            for (size_t dst_skew = 0; dst_skew < 16; dst_skew += rig.gpu.host_access ? 1 : 5) {
                uint64_t random = src_skew * 16 + dst_skew;
                fill(elements, sources[s], 5 * 67, &random);
                check_matrix(&rig, sources[s], 5, 67, elements, src_skew, dst_skew);
            }
}

TEST(kernels_quantize, rows_longer_than_a_block_keeps) {
    enum { cols = 300001 };
    float *const elements = malloc(cols * sizeof *elements);
    uint64_t random = 1;
    CHECK(elements);
    fill(elements, FST_T_F32, cols, &random);
    elements[cols - 2] = 77;
    test_rig rig;
    EACH_RIG(&rig, 1 << 21) check_matrix(&rig, FST_T_F32, 1, cols, elements, 4, 1);
    free(elements);
}

TEST(kernels_quantize, more_than_65536_rows) {
    enum { rows = RIG_SANITIZED ? 701 : 70001, cols = 3 };
    uint16_t *const elements = malloc(rows * cols * sizeof *elements);
    uint64_t random = 1;
    CHECK(elements);
    fill(elements, FST_T_BF16, rows * cols, &random);
    test_rig rig;
    EACH_RIG(&rig, 1 << 20) check_matrix(&rig, FST_T_BF16, rows, cols, elements, 2, 0);
    free(elements);
}

/* Each element alone in its row with one that makes the scale: ties of every code, and their neighbours. */
static void check_ties(int dst) {
    enum { cols = 2 + 3 * 127 };
    static float in[64][cols];
    uint64_t random = 9;
    for (int row = 0; row < 64; row++) {
        const double amax = row == 0 ? largest_code(dst)
                                     : ldexp(1 + (double)rig_below(&random, 1 << 23) * 0x1p-23,
                                             (int)rig_below(&random, 60) - 30);
        const double scale = scale_by_definition((float)amax, dst);
        int at = 0;
        in[row][at++] = (float)amax;
        in[row][at++] = -0.0f;
        for (uint32_t code = 0; code < 127; code++) {
            const double a = rig_value(dst, code), b = rig_value(dst, code + 1);
            const float tie = (float)((isfinite(a) && isfinite(b) ? (a + b) / 2 : 1) * scale);
            in[row][at++] = fminf(tie, (float)amax) * (code % 2 ? -1.0f : 1.0f);
            in[row][at++] = fminf(nextafterf(tie, INFINITY), (float)amax);
            in[row][at++] = nextafterf(tie, 0);
        }
    }
    test_rig rig;
    EACH_RIG(&rig, 1 << 18) check_matrix(&rig, FST_T_F32, 64, cols, in, 0, 0);
}

TEST(kernels_quantize, ties_of_e4m3) { check_ties(FST_T_F8_E4M3); }
TEST(kernels_quantize, ties_of_e5m2) { check_ties(FST_T_F8_E5M2); }
TEST(kernels_quantize, ties_of_fnuz) { check_ties(FST_T_F8_E4M3FNUZ); }

/* The GPU divides by a reciprocal and a correction. The same by fmaf, near what rounding to a code hinges on:
 * numbers of 5 significant bits. (For every mantissa of the scale, 1.2e9 pairs, it was done once: none
 * differs.) */
TEST(kernels_quantize, correction_of_the_quotient_is_a_division) {
    for (uint32_t s = 0; s < 1u << 23; s += 61)
        for (int m = 16; m < 32; m++)
            for (int step = -2; step <= 2; step++) {
                const float scale = 1 + (float)s * 0x1p-23f, tie = (float)m / 16 * scale,
                            reciprocal = 1 / scale;
                uint32_t bits;
                float x;
                memcpy(&bits, &tie, 4);
                bits += (uint32_t)step;
                memcpy(&x, &bits, 4);
                const float q = x * reciprocal, better = fmaf(fmaf(-q, scale, x), reciprocal, q);
                if (better != x / scale)
                    test_fail(__FILE__, __LINE__, "%a / %a: %a, not %a", (double)x, (double)scale,
                              (double)better, (double)(x / scale));
            }
}

/* ---- Special values ---- */

static void check_row(int src, const void *elements, uint64_t cols, uint32_t want_scale,
                      const uint8_t *want_codes, uint64_t nans) {
    test_rig rig;
    EACH_RIG(&rig, 4096) for (int k = 0; k < 3; k++) {
        const outcome got = run_quantize(
            &rig,
            (fst_quantize_args){
                .rows = 1, .cols = cols, .src_dtype = src, .dst_dtype = FST_T_F8_E4M3, .kind = kinds[k]},
            elements, 0, 0);
        CHECK_INT(want_scale, got.scales[0]);
        CHECK_BYTES(want_codes, got.codes, cols);
        CHECK_INT(1000 + nans, got.nans);
    }
}

TEST(kernels_quantize, zeros_have_the_scale_1) {
    static const uint32_t in[20] = {0, 0x80000000};
    static const uint8_t codes[20] = {0, 0x80};
    check_row(FST_T_F32, in, 20, 0x3F800000, codes, 0);
}

TEST(kernels_quantize, zeros_of_fnuz_have_no_sign) {
    static const uint32_t in[20] = {0, 0x80000000, 0x80000001};
    static const uint8_t codes[20];
    test_rig rig;
    EACH_RIG(&rig, 4096)
    CHECK_BYTES(codes,
                run_quantize(&rig,
                             (fst_quantize_args){.rows = 1,
                                                 .cols = 20,
                                                 .src_dtype = FST_T_F32,
                                                 .dst_dtype = FST_T_F8_E4M3FNUZ,
                                                 .kind = FST_SCALE_ROW},
                             in, 0, 0)
                    .codes,
                20);
}

/* 223 * 2^-149 / 448 rounds to 0. */
TEST(kernels_quantize, subnormals_too_small_for_a_scale_become_zeros) {
    static const uint32_t in[] = {223, 0x80000000 | 223, 0, 1};
    static const uint8_t codes[] = {0, 0x80, 0, 0};
    check_row(FST_T_F32, in, 4, 0x3F800000, codes, 0);
}

/* 225 / 448 of the smallest subnormal rounds to 1 of it. */
TEST(kernels_quantize, subnormal_scale) {
    static const uint32_t in[] = {225, 0x80000000 | 16, 0, 1};
    static const uint8_t codes[] = {0x76, 0xD8, 0, 0x38};
    check_row(FST_T_F32, in, 4, 1, codes, 0);
}

TEST(kernels_quantize, a_nan_makes_everything_under_its_scale_nan) {
    static const uint32_t in[] = {0x3F800000, 0xBF800000, 0xFFC00001, 0, 0x7F800000, 0xFF800000, 0x7F800001};
    static const uint8_t codes[] = {0x7F, 0xFF, 0xFF, 0x7F, 0x7F, 0xFF, 0x7F};
    check_row(FST_T_F32, in, 7, 0x7FC00000, codes, 2);
}

TEST(kernels_quantize, a_nan_does_not_reach_other_rows) {
    uint16_t in[3 * 20] = {0};
    for (int i = 0; i < 60; i++) in[i] = 0x3C00;
    in[25] = 0x7C01;
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        const outcome got = run_quantize(&rig,
                                         (fst_quantize_args){.rows = 3,
                                                             .cols = 20,
                                                             .src_dtype = FST_T_F16,
                                                             .dst_dtype = FST_T_F8_E4M3,
                                                             .kind = FST_SCALE_ROW},
                                         in, 0, 0);
        CHECK_INT(0x7FC00000, got.scales[1]);
        CHECK_INT(1001, got.nans);
        for (int i = 0; i < 60; i++) CHECK_INT(i / 20 == 1 ? 0x7F : 0x7E, got.codes[i]);
    }
}

TEST(kernels_quantize, inf_counts_as_the_largest_finite_number) {
    static const uint32_t f32[] = {0x7F800000, 0xFF800000, 0x3F800000, 0x7F7FFFFF};
    static const uint16_t f16[] = {0x7C00, 0xFC00, 0x0000, 0x7BFF}, bf16[] = {0x7F80, 0xFF80, 0x3F80, 0x7F7F};
    static const uint8_t codes[] = {0x7E, 0xFE, 0x00, 0x7E};
    check_row(FST_T_F32, f32, 4, 0x7B124924, codes, 0); /* (2^128 - 2^104) / 448, exactly */
    check_row(FST_T_F16, f16, 4, 0x431236DB, codes, 0); /* 65504 / 448 = 146.2142... */
    check_row(FST_T_BF16, bf16, 4, 0x7B11B6DB, codes, 0);
}

TEST(kernels_quantize, nans_everywhere_are_all_counted) {
    enum { rows = 200, cols = 333 };
    static uint16_t in[rows * cols];
    for (int i = 0; i < rows * cols; i++) in[i] = i % 2 ? 0x7E00 : 0xFFFF;
    test_rig rig;
    EACH_RIG(&rig, 1 << 18) for (int k = 0; k < 3; k++) {
        const outcome got = run_quantize(&rig,
                                         (fst_quantize_args){.rows = rows,
                                                             .cols = cols,
                                                             .src_dtype = FST_T_F16,
                                                             .dst_dtype = FST_T_F8_E5M2,
                                                             .kind = kinds[k]},
                                         in, 0, 0);
        CHECK_INT(1000 + rows * cols, got.nans);
        for (int i = 0; i < rows * cols; i++) CHECK_INT(i % 2 ? 0x7E : 0xFE, got.codes[i]);
    }
}

TEST(kernels_quantize, nobody_need_count_nans) {
    static const uint32_t in[] = {0x7FC00000, 0x3F800000};
    test_rig rig;
    EACH_RIG(&rig, 4096) for (int k = 0; k < 3; k++) {
        rig_upload(&rig, rig.src, in, sizeof in);
        const fst_quantize_args args = {
            rig.src,       rig.dst, (float *)(void *)(rig.dst + 64), NULL, 1, 2, FST_T_F32,
            FST_T_F8_E4M3, kinds[k]};
        CHECK_INT(0, rig.gpu.kernels->quantize(rig.stream, &args));
        rig_download(&rig, 2);
        CHECK_INT(0x7F, rig.host[0]);
    }
}

TEST(kernels_quantize, nothing_of_the_callers_fpu_state_shows) {
    /* Round up, flush subnormals, read them as zero. */
    static const uint32_t in[] = {225, 0x80000000 | 16, 0x00000001, 0};
    static const uint8_t codes[] = {0x76, 0xD8, 0x38, 0};
    test_rig rig;
    EACH_RIG(&rig, 4096) for (int k = 0; k < 3; k++) {
        const fst_quantize_args args = {
            .rows = 1, .cols = 4, .src_dtype = FST_T_F32, .dst_dtype = FST_T_F8_E4M3, .kind = kinds[k]};
        const unsigned saved = __builtin_ia32_stmxcsr();
        __builtin_ia32_ldmxcsr(saved | 0x8040 | 0x4000);
        const outcome got = run_quantize(&rig, args, in, 0, 0);
        const unsigned after = __builtin_ia32_stmxcsr();
        __builtin_ia32_ldmxcsr(saved);
        CHECK_INT(0x4000, after & 0x6000);
        CHECK_INT(1, got.scales[0]);
        CHECK_BYTES(codes, got.codes, 4);
    }
}

/* ---- What is read: AddressSanitizer watches in its build ---- */

TEST(kernels_quantize, no_byte_outside_the_source_is_read) {
    test_rig rig;
    EACH_RIG(&rig, 1 << 14) {
        if (!rig.gpu.host_access) continue;
        for (int s = 0; s < 3; s++)
            for (int k = 0; k < 3; k++)
                for (uint64_t cols = 1; cols < 60; cols += 2)
                    for (size_t skew = 0; skew < 16; skew++) {
                        const size_t size = skew + 3 * cols * size_of(sources[s]);
                        uint8_t *memory = calloc(1, size);
                        CHECK(memory);
                        POISON(memory, skew);
                        const fst_quantize_args args = {memory + skew,
                                                        rig.dst + skew % 5,
                                                        (float *)(void *)(rig.dst + 8192),
                                                        NULL,
                                                        3,
                                                        cols,
                                                        sources[s],
                                                        FST_T_F8_E4M3,
                                                        kinds[k]};
                        CHECK_INT(0, rig.gpu.kernels->quantize(NULL, &args));
                        UNPOISON(memory, skew);
                        free(memory);
                    }
    }
}

/* ---- Without elements ---- */

static void check_empty(fst_scale_kind kind, uint64_t rows, uint64_t cols) {
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        const outcome got = run_quantize(
            &rig,
            (fst_quantize_args){
                .rows = rows, .cols = cols, .src_dtype = FST_T_F32, .dst_dtype = FST_T_F8_E4M3, .kind = kind},
            NULL, 0, 0);
        for (uint64_t i = 0; i < scales_of(kind, rows, cols); i++) CHECK_INT(0x3F800000, got.scales[i]);
        CHECK_INT(1000, got.nans);
    }
}

TEST(kernels_quantize, an_empty_tensor_has_the_scale_1) {
    check_empty(FST_SCALE_TENSOR, 0, 0);
    check_empty(FST_SCALE_TENSOR, 5, 0);
    check_empty(FST_SCALE_TENSOR, 0, 5);
}

TEST(kernels_quantize, empty_rows_have_the_scale_1) { check_empty(FST_SCALE_ROW, 5, 0); }
TEST(kernels_quantize, no_rows) { check_empty(FST_SCALE_ROW, 0, 5); }
TEST(kernels_quantize, no_blocks) {
    check_empty(FST_SCALE_BLOCK, 0, 5);
    check_empty(FST_SCALE_BLOCK, 5, 0);
}

/* ---- Wrong arguments: a status, and nothing is written ---- */

static const fst_quantize_args good = {
    .rows = 3, .cols = 5, .src_dtype = FST_T_F32, .dst_dtype = FST_T_F8_E4M3, .kind = FST_SCALE_ROW};

enum { no_src = 1, no_dst = 2, no_scales = 4, odd_scales = 8, odd_nans = 16 };

static void check_status(int want, fst_quantize_args args, unsigned faults) {
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        memset(rig.host, 0xA5, 4096);
        rig_upload(&rig, rig.dst, rig.host, 4096);
        args.src = faults & no_src ? NULL : rig.src;
        args.dst = faults & no_dst ? NULL : rig.dst + 3;
        args.scales =
            faults & no_scales ? NULL : (float *)(void *)(rig.dst + 1024 + (faults & odd_scales ? 2 : 0));
        args.nans = (uint64_t *)(void *)(rig.dst + 2048 + (faults & odd_nans ? 4 : 0));
        CHECK_INT(want, rig.gpu.kernels->quantize(rig.stream, &args));
        rig_download(&rig, 4096);
        for (size_t i = 0; i < 4096; i++) CHECK_INT(0xA5, rig.host[i]);
    }
}

#define REFUSED(name, want, faults, ...)  \
    TEST(kernels_quantize_refuse, name) { \
        fst_quantize_args args = good;    \
        __VA_ARGS__;                      \
        check_status(want, args, faults); \
    }

REFUSED(f64_source, FST_K_NO_KERNEL, 0, args.src_dtype = FST_T_F64)
REFUSED(fp8_source, FST_K_NO_KERNEL, 0, args.src_dtype = FST_T_F8_E4M3)
REFUSED(integer_source, FST_K_NO_KERNEL, 0, args.src_dtype = FST_T_I32)
REFUSED(source_outside_the_list, FST_K_NO_KERNEL, 0, args.src_dtype = -1)
REFUSED(e5m2fnuz_result, FST_K_NO_KERNEL, 0, args.dst_dtype = FST_T_F8_E5M2FNUZ)
REFUSED(bf16_result, FST_K_NO_KERNEL, 0, args.dst_dtype = FST_T_BF16)
REFUSED(i8_result, FST_K_NO_KERNEL, 0, args.dst_dtype = FST_T_I8)
REFUSED(result_outside_the_list, FST_K_NO_KERNEL, 0, args.dst_dtype = 1000)
REFUSED(groups, FST_K_NO_KERNEL, 0, args.kind = FST_SCALE_GROUP)
REFUSED(unknown_kind, FST_K_NO_KERNEL, 0, args.kind = (fst_scale_kind)9)
REFUSED(source_null, FST_K_NULL, no_src, )
REFUSED(result_null, FST_K_NULL, no_dst, )
REFUSED(scales_null, FST_K_NULL, no_scales, )
REFUSED(scale_of_an_empty_tensor_null, FST_K_NULL, no_scales, args.kind = FST_SCALE_TENSOR; args.rows = 0)
REFUSED(scales_between_elements, FST_K_ALIGN, odd_scales, )
REFUSED(nans_between_elements, FST_K_ALIGN, odd_nans, )
REFUSED(elements_overflow, FST_K_SIZE, 0, args.rows = 1ull << 33; args.cols = 1ull << 33)
REFUSED(bytes_overflow, FST_K_SIZE, 0, args.rows = 1ull << 31; args.cols = 1ull << 30)
REFUSED(not_blocks_of_nothing, 0, no_src | no_dst | no_scales, args.kind = FST_SCALE_BLOCK; args.cols = 0)
REFUSED(not_no_rows, 0, no_src | no_dst | no_scales, args.rows = 0)
