/* I8 with zero points and over 127, F8 divided by their scales: published vectors, the definition, bad input. */
#include <math.h>
#include <string.h>

#include "harness.h"
#include "kernels_rig.h"

enum { CAPACITY = 1 << 17, SCALES = 1 << 15, ZEROS = 1 << 16, MOST = 8192 };

static const int targets[] = {FST_T_F32, FST_T_F16, FST_T_BF16};
static const int floats[] = {FST_T_F8_E4M3, FST_T_F8_E5M2, FST_T_F8_E4M3FNUZ, FST_T_F8_E5M2FNUZ};

static const uint8_t *run_affine(test_rig *rig, fst_scaled_args args, const uint8_t *codes, size_t src_skew,
                                 const void *scales, const int8_t *zeros, size_t dst_skew) {
    const size_t bytes = args.count * fst_type_bits(args.dst_dtype) / 8, begin = RIG_GUARD + dst_skew;
    const size_t end = begin + bytes + RIG_GUARD;
    memset(rig->host, 0xA5, end);
    rig_upload(rig, rig->dst, rig->host, end);
    rig_upload(rig, rig->src + src_skew, codes, args.count);
    rig_upload(rig, rig->src + SCALES, scales, args.scales_count * fst_type_bits(args.scale_dtype) / 8);
    args.src = rig->src + src_skew;
    args.dst = rig->dst + begin;
    args.scales = rig->src + SCALES;
    if (zeros) {
        rig_upload(rig, rig->src + ZEROS, zeros, args.scales_count);
        args.zeros = rig->src + ZEROS;
    }
    CHECK_INT(0, rig->gpu.kernels->scaled(rig->stream, &args));
    rig_download(rig, end);
    for (size_t i = 0; i < end; i++)
        if ((i < begin || i >= begin + bytes) && rig->host[i] != 0xA5)
            test_fail(__FILE__, __LINE__, "%s: byte %td is changed", rig->gpu.kernels->target,
                      (ptrdiff_t)(i - begin));
    return rig->host + begin;
}

static void check_published(fst_scaled_args args, const uint8_t *codes, const void *scales,
                            const int8_t *zeros, const void *f32, const void *f16, const void *bf16) {
    const void *const want[] = {f32, f16, bf16};
    test_rig rig;
    args.count = args.rows * args.cols;
    EACH_RIG(&rig, CAPACITY)
    for (int t = 0; t < 3; t++) {
        args.dst_dtype = targets[t];
        const size_t size = fst_type_bits(args.dst_dtype) / 8;
        for (size_t skew = 0; want[t] && skew < 16; skew += size)
            CHECK_BYTES(want[t], run_affine(&rig, args, codes, 15 - skew, scales, zeros, skew),
                        args.count * size);
    }
}

TEST(kernels_affine, zero_points_as_published) {
    static const uint8_t codes[] = {0x80, 0x7F, 0x00, 0x05};
    static const int8_t zeros[] = {3, 3, 3, -128};
    static const uint16_t scales[] = {0x3C23, 0x3C23, 0x3C23, 0x3C23},
                          bf16[] = {0xBFA7, 0x3F9E, 0xBCF4, 0x3FA9};
    static const uint32_t f32[] = {0xBFA6D200, 0x3F9DE800, 0xBCF48000, 0x3FA95E00};
    check_published((fst_scaled_args){.rows = 4,
                                      .cols = 1,
                                      .scales_count = 4,
                                      .src_dtype = FST_T_I8,
                                      .scale_dtype = FST_T_BF16,
                                      .kind = FST_SCALE_ROW},
                    codes, scales, zeros, f32, NULL, bf16);
}

TEST(kernels_affine, over_127_as_published) {
    static const uint8_t codes[] = {127, 129, 1, 192};
    static const uint32_t scales[] = {0x3F4CCCCD}, f32[] = {0x3F4CCCCD, 0xBF4CCCCD, 0x3BCE69A0, 0xBECE69A0};
    static const uint16_t bf16[] = {0x3F4D, 0xBF4D, 0x3BCE, 0xBECE}, f16[] = {0x3A66, 0xBA66, 0x1E73, 0xB673};
    check_published((fst_scaled_args){.rows = 1,
                                      .cols = 4,
                                      .scales_count = 1,
                                      .src_dtype = FST_T_I8,
                                      .scale_dtype = FST_T_F32,
                                      .kind = FST_SCALE_ROW,
                                      .flags = FST_K_OVER_127},
                    codes, scales, NULL, f32, f16, bf16);
}

static double rounded(double exact) { return isnan(exact) ? exact : (double)(float)exact; }

/* By definition. A quotient of two F32 is rounded to double and then to F32: as if at once, as 53 >= 2 x 24 + 2. */
static uint32_t expected(const fst_scaled_args *args, uint8_t code, uint32_t scale_code, int zero) {
    const double scale = rig_value(args->scale_dtype, scale_code);
    const double a =
        args->src_dtype == FST_T_I8 ? (double)((int8_t)code - zero) : rig_value(args->src_dtype, code);
    double x = rounded(args->flags & FST_K_DIVIDE ? a / scale : a * scale);
    if (args->flags & FST_K_OVER_127) x = rounded(x * (double)fst_float_of_bits32(0x3C010204));
    if (isnan(x)) x = copysign(NAN, !signbit(a) != !signbit(scale) ? -1.0 : 1.0);
    return rig_code(args->dst_dtype, x, 0);
}

static uint64_t cells(uint64_t n, uint64_t size) { return (n + size - 1) / size; }

static void check(fst_scaled_args args, const uint8_t *codes, const uint32_t *scales, const int8_t *zeros,
                  size_t src_skew, size_t dst_skew) {
    const size_t size = fst_type_bits(args.dst_dtype) / 8;
    test_rig rig;
    EACH_RIG(&rig, CAPACITY) {
        const uint8_t *got = run_affine(&rig, args, codes + args.first, src_skew, scales, zeros, dst_skew);
        for (uint64_t i = 0; i < args.count; i++) {
            const uint64_t at = args.first + i, row = at / args.cols, col = at % args.cols;
            const uint64_t cell =
                row / args.block_rows * cells(args.cols, args.block_cols) + col / args.block_cols;
            const uint32_t want = expected(&args, codes[at], scales[cell], zeros ? zeros[cell] : 0);
            uint32_t code = 0;
            memcpy(&code, got + i * size, size);
            if (code != want)
                test_fail(__FILE__, __LINE__, "%s, %s to %s, element %llu, code %X by %X: %X, want %X",
                          rig.gpu.kernels->target, rig_dtype_name(args.src_dtype),
                          rig_dtype_name(args.dst_dtype), (unsigned long long)at, codes[at], scales[cell],
                          code, want);
        }
    }
}

/* Rows x cols under blocks of all shapes: one, a row, a column, a group, a block with ragged ends. */
static void check_random(unsigned seed) {
    static const uint64_t shapes[][4] = {{16, 512, 16, 512}, {37, 129, 1, 129}, {9, 264, 9, 1},
                                         {16, 512, 1, 128},  {40, 100, 16, 24}, {100, 3, 1, 3}};
    static uint8_t codes[MOST];
    static uint32_t scales[MOST];
    static int8_t zeros[MOST];
    uint64_t state = seed;
    const uint64_t *shape = shapes[seed % 6];
    fst_scaled_args args = {.rows = shape[0], .cols = shape[1], .kind = FST_SCALE_BLOCK};
    args.block_rows = shape[2], args.block_cols = shape[3];
    args.scales_count = cells(args.rows, args.block_rows) * cells(args.cols, args.block_cols);
    args.scale_dtype = FST_T_F32;
    args.dst_dtype = targets[seed / 6 % 3];
    args.src_dtype = seed % 2 ? FST_T_I8 : floats[seed / 2 % 4];
    args.flags = seed % 2 == 0 ? FST_K_DIVIDE : seed % 4 == 1 ? FST_K_OVER_127 : 0; /* 3: with zero points */
    for (size_t i = 0; i < MOST; i++) {
        codes[i] = (uint8_t)rig_random(&state);
        scales[i] =
            (uint32_t)(rig_below(&state, 2) << 31) | (0x38000000 + (uint32_t)rig_below(&state, 0x0F000000));
        zeros[i] = (int8_t)rig_random(&state);
    }
    if (seed % 5 == 0) scales[0] = 0x7FC00000, scales[1] = 0, scales[2] = 0x80000000, scales[3] = 0x7F800000;
    const uint64_t elements = args.rows * args.cols;
    const size_t align = fst_type_bits(args.dst_dtype) / 8;
    args.first = rig_below(&state, elements);
    args.count = rig_below(&state, elements - args.first + 1);
    check(args, codes, scales, seed % 4 == 3 ? zeros : NULL, rig_below(&state, 16),
          rig_below(&state, 16 / align) * align);
}

TEST(kernels_affine, blocks_ranges_and_alignments) {
    for (unsigned seed = 0; seed < 144; seed++) check_random(seed);
}

TEST(kernels_affine, what_does_not_exist) {
    test_rig rig;
    EACH_RIG(&rig, 1 << 12) {
        int (*const scaled)(fst_queue, const fst_scaled_args *) = rig.gpu.kernels->scaled;
        const fst_scaled_args good = {.src = rig.src,
                                      .dst = rig.dst,
                                      .scales = rig.src + 1024,
                                      .scales_count = 4,
                                      .rows = 4,
                                      .cols = 4,
                                      .count = 16,
                                      .src_dtype = FST_T_F8_E4M3,
                                      .dst_dtype = FST_T_BF16,
                                      .scale_dtype = FST_T_F32,
                                      .kind = FST_SCALE_ROW,
                                      .flags = FST_K_DIVIDE};
        fst_scaled_args args = good;
        args.src_dtype = FST_T_I8; /* integers are not divided */
        CHECK_INT(FST_K_NO_KERNEL, scaled(rig.stream, &args));
        args = good;
        args.src_dtype = FST_T_F4;
        CHECK_INT(FST_K_NO_KERNEL, scaled(rig.stream, &args));
        args = good;
        args.zeros = rig.src;
        CHECK_INT(FST_K_NO_KERNEL, scaled(rig.stream, &args));
        args = good;
        args.flags = FST_K_OVER_127; /* floats are not over 127 */
        CHECK_INT(FST_K_NO_KERNEL, scaled(rig.stream, &args));
        args = good;
        args.dst_dtype = FST_T_F8_E4M3;
        CHECK_INT(FST_K_NO_KERNEL, scaled(rig.stream, &args));
        args = good;
        args.scales_count = 5;
        CHECK_INT(FST_K_SCALE, scaled(rig.stream, &args));
        args = good;
        args.count = 17;
        CHECK_INT(FST_K_SIZE, scaled(rig.stream, &args));
        args = good;
        args.scales = NULL;
        CHECK_INT(FST_K_NULL, scaled(rig.stream, &args));
        args = good;
        args.scales = rig.src + 2;
        CHECK_INT(FST_K_ALIGN, scaled(rig.stream, &args));
    }
}
