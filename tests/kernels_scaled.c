/* Scaled conversions: the formats' published vectors, every code under many scales, ranges, bad input. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"
#include "kernels_rig.h"

static const int sources[] = {FST_T_F8_E4M3,     FST_T_F8_E5M2, FST_T_F8_E4M3FNUZ,
                              FST_T_F8_E5M2FNUZ, FST_T_I8,      FST_T_F4};
static const int targets[] = {FST_T_F32, FST_T_F16, FST_T_BF16};
static const int scale_types[] = {FST_T_F32, FST_T_F16, FST_T_BF16, FST_T_F8_E8M0};
enum { source_count = 6, target_count = 3, scale_type_count = 4 };

static size_t bytes_of(int dtype, uint64_t count) { return (size_t)((count * fst_type_bits(dtype) + 7) / 8); }

static uint32_t code_at(int dtype, const void *codes, uint64_t i) {
    const uint8_t *bytes = codes;
    uint32_t code = 0;
    if (fst_type_bits(dtype) == 4) return bytes[i / 2] >> (i % 2 * 4) & 15;
    memcpy(&code, bytes + i * fst_type_bits(dtype) / 8, fst_type_bits(dtype) / 8);
    return code;
}

/* By definition: one product, exact in double, rounded to F32, then once more to the target. */
static uint32_t product(int src, uint32_t code, int scale_type, uint32_t scale, int dst) {
    const double a = rig_value(src, code), b = rig_value(scale_type, scale), exact = a * b;
    if (isnan(exact))
        return rig_code(dst, copysign(NAN, (signbit(a) != 0) != (signbit(b) != 0) ? -1.0 : 1.0), 0);
    return rig_code(dst, (float)exact, 0);
}

static uint64_t groups(uint64_t n, uint64_t size) { return n / size + (n % size != 0); }

static uint64_t scale_at(const fst_scaled_args *args, uint64_t i) {
    const uint64_t row = i / args->cols, col = i % args->cols;
    switch (args->kind) {
    case FST_SCALE_TENSOR: return 0;
    case FST_SCALE_ROW: return row;
    case FST_SCALE_GROUP: return row * groups(args->cols, args->block_cols) + col / args->block_cols;
    default: return row / args->block_rows * groups(args->cols, args->block_cols) + col / args->block_cols;
    }
}

static uint64_t scales_for(const fst_scaled_args *args) {
    switch (args->kind) {
    case FST_SCALE_TENSOR: return 1;
    case FST_SCALE_ROW: return args->rows;
    case FST_SCALE_GROUP: return args->rows * groups(args->cols, args->block_cols);
    default: return groups(args->rows, args->block_rows) * groups(args->cols, args->block_cols);
    }
}

/* Runs args (pointers aside) on codes of its range and the scales of the whole, from src_skew bytes to
 * dst_skew bytes beyond an aligned place. Fails when anything but the result changes. The result, valid until
 * the next call. */
static const uint8_t *run_scaled(test_rig *rig, fst_scaled_args args, const void *codes, size_t src_skew,
                                 const void *scales, size_t dst_skew) {
    const size_t src_bytes = bytes_of(args.src_dtype, args.count),
                 bytes = bytes_of(args.dst_dtype, args.count);
    const size_t begin = RIG_GUARD + dst_skew, end = begin + bytes + RIG_GUARD;
    uint8_t *const device_scales = rig->src + rig->capacity / 2;
    CHECK(src_skew + src_bytes <= rig->capacity / 2 && end <= rig->capacity);
    CHECK(bytes_of(args.scale_dtype, args.scales_count) <= rig->capacity / 2);
    memset(rig->host, 0xA5, end);
    rig_upload(rig, rig->dst, rig->host, end);
    rig_upload(rig, rig->src + src_skew, codes, src_bytes);
    rig_upload(rig, device_scales, scales, bytes_of(args.scale_dtype, args.scales_count));
    args.src = rig->src + src_skew;
    args.dst = rig->dst + begin;
    args.scales = device_scales;
    if (args.global_scale) { /* behind the scales */
        uint8_t *device_global = rig->src + rig->capacity - 16;
        CHECK(bytes_of(args.scale_dtype, args.scales_count) <= rig->capacity / 2 - 16);
        rig_upload(rig, device_global, args.global_scale, 4);
        args.global_scale = device_global;
    }
    CHECK_INT(0, rig->gpu.kernels->scaled(rig->stream, &args));
    rig_download(rig, end);
    for (size_t i = 0; i < end; i++)
        if ((i < begin || i >= begin + bytes) && rig->host[i] != 0xA5)
            test_fail(__FILE__, __LINE__, "%s: %s to %s: byte %td is changed", rig->gpu.kernels->target,
                      rig_dtype_name(args.src_dtype), rig_dtype_name(args.dst_dtype), (ptrdiff_t)(i - begin));
    return rig->host + begin;
}

/* ---- Published vectors (the formats' references computed these) ---- */

static void check_vector(const fst_scaled_args *args, const void *codes, const void *scales,
                         const void *want) {
    test_rig rig;
    EACH_RIG(&rig, 1 << 16)
    for (size_t skew = 0; skew < 16; skew += bytes_of(args->dst_dtype, 1))
        CHECK_BYTES(want, run_scaled(&rig, *args, codes, 15 - skew, scales, skew),
                    bytes_of(args->dst_dtype, args->count));
}

static void check_vectors(fst_scaled_args args, const void *codes, const void *scales, const void *f32,
                          const void *bf16, const void *f16) {
    const void *const want[] = {f32, f16, bf16};
    args.count = args.rows * args.cols;
    for (int t = 0; t < target_count; t++) {
        args.dst_dtype = targets[t];
        if (want[t]) check_vector(&args, codes, scales, want[t]);
    }
}

TEST(kernels_scaled, blocks_ragged_both_ways) {
    static const uint8_t codes[] = {0x38, 0xB8, 0x01, 0x7E, 0xC5, 0x00, 0x80, 0x4A,
                                    0x3F, 0x08, 0xFE, 0x31, 0x77, 0x87, 0x5D};
    static const uint32_t scales[] = {0x3C23D70A, 0x3B03126F, 0x3F9D70A4, 0x38D1B717, 0x40490FDB, 0x3DCCCCCD};
    static const uint32_t f32[] = {0x3C23D70A, 0xBC23D70A, 0x3683126F, 0x3F656042, 0xC07FD70A,
                                   0x00000000, 0x80000000, 0x3C23D70B, 0x3B75C290, 0x3C9D70A4,
                                   0xBD378034, 0x386BEDFA, 0x443C7EDD, 0xBD2FEDE0, 0x40266667};
    static const uint16_t bf16[] = {0x3C24, 0xBC24, 0x3683, 0x3F65, 0xC080, 0x0000, 0x8000, 0x3C24,
                                    0x3B76, 0x3C9D, 0xBD38, 0x386C, 0x443C, 0xBD30, 0x4026};
    static const uint16_t f16[] = {0x211F, 0xA11F, 0x0042, 0x3B2B, 0xC3FF, 0x0000, 0x8000, 0x211F,
                                   0x1BAE, 0x24EC, 0xA9BC, 0x03B0, 0x61E4, 0xA97F, 0x4133};
    check_vectors((fst_scaled_args){.scales_count = 6,
                                    .rows = 3,
                                    .cols = 5,
                                    .src_dtype = FST_T_F8_E4M3,
                                    .scale_dtype = FST_T_F32,
                                    .kind = FST_SCALE_BLOCK,
                                    .block_rows = 2,
                                    .block_cols = 2},
                  codes, scales, f32, bf16, f16);
}

TEST(kernels_scaled, block_with_a_scale_of_e8m0) {
    static const uint8_t codes[] = {0x3A, 0x7E, 0x01, 0xC5}, scale = 0x78;
    static const uint32_t f32[] = {0x3C200000, 0x40600000, 0x37800000, 0xBCD00000};
    static const uint16_t bf16[] = {0x3C20, 0x4060, 0x3780, 0xBCD0};
    check_vectors((fst_scaled_args){.scales_count = 1,
                                    .rows = 1,
                                    .cols = 4,
                                    .src_dtype = FST_T_F8_E4M3,
                                    .scale_dtype = FST_T_F8_E8M0,
                                    .kind = FST_SCALE_BLOCK,
                                    .block_rows = 128,
                                    .block_cols = 128},
                  codes, &scale, f32, bf16, NULL);
}

TEST(kernels_scaled, one_scale_for_the_tensor) {
    static const uint8_t codes[] = {0x38, 0x7E, 0xA3, 0x01};
    static const uint32_t scale = 0x3A83126F, f32[] = {0x3A83126F, 0x3EE56042, 0xB9343959, 0x3603126F};
    static const uint16_t bf16[] = {0x3A83, 0x3EE5, 0xB934, 0x3603}, f16[] = {0x1419, 0x372B, 0x89A2, 0x0021};
    check_vectors((fst_scaled_args){.scales_count = 1,
                                    .rows = 2,
                                    .cols = 2,
                                    .src_dtype = FST_T_F8_E4M3,
                                    .scale_dtype = FST_T_F32,
                                    .kind = FST_SCALE_TENSOR},
                  codes, &scale, f32, bf16, f16);
}

TEST(kernels_scaled, fnuz_with_the_scale_doubled) {
    static const uint8_t codes[] = {0x38, 0x7E, 0xA3, 0x01};
    static const uint32_t scale = 0x3B03126F, f32[] = {0x3A83126F, 0x3EE56042, 0xB9343959, 0x3603126F};
    check_vectors((fst_scaled_args){.scales_count = 1,
                                    .rows = 1,
                                    .cols = 4,
                                    .src_dtype = FST_T_F8_E4M3FNUZ,
                                    .scale_dtype = FST_T_F32,
                                    .kind = FST_SCALE_TENSOR},
                  codes, &scale, f32, NULL, NULL);
}

TEST(kernels_scaled, one_scale_for_a_channel) {
    static const uint8_t codes[] = {0x38, 0x7E, 0xA3, 0x05};
    static const uint16_t scale = 0x3C24, bf16[] = {0x3C24, 0x4090, 0xBAE2, 0x38CD},
                          f16[] = {0x2120, 0x447C, 0x970C, 0x0668};
    static const uint32_t f32[] = {0x3C240000, 0x408F8000, 0xBAE18000, 0x38CD0000};
    check_vectors((fst_scaled_args){.scales_count = 1,
                                    .rows = 1,
                                    .cols = 4,
                                    .src_dtype = FST_T_F8_E4M3,
                                    .scale_dtype = FST_T_BF16,
                                    .kind = FST_SCALE_ROW},
                  codes, &scale, f32, bf16, f16);
}

TEST(kernels_scaled, int8_by_channel) { /* 2^-7 * 1.2734375: products known by hand */
    static const int8_t codes[] = {-128, 127, 0, 5};
    static const uint16_t scale = 0x3C23;
    static const uint32_t f32[] = {0xBFA30000, 0x3FA1BA00, 0x00000000, 0x3D4BC000};
    check_vectors((fst_scaled_args){.scales_count = 1,
                                    .rows = 1,
                                    .cols = 4,
                                    .src_dtype = FST_T_I8,
                                    .scale_dtype = FST_T_BF16,
                                    .kind = FST_SCALE_ROW},
                  codes, &scale, f32, NULL, NULL);
}

TEST(kernels_scaled, mxfp8) {
    static const uint8_t codes[] = {0x7E, 0x38, 0x81, 0xB9}, scale = 0x76;
    static const uint32_t f32[] = {0x3F600000, 0x3B000000, 0xB6800000, 0xBB100000};
    static const uint16_t bf16[] = {0x3F60, 0x3B00, 0xB680, 0xBB10}, f16[] = {0x3B00, 0x1800, 0x8040, 0x9880};
    check_vectors((fst_scaled_args){.scales_count = 1,
                                    .rows = 1,
                                    .cols = 4,
                                    .src_dtype = FST_T_F8_E4M3,
                                    .scale_dtype = FST_T_F8_E8M0,
                                    .kind = FST_SCALE_GROUP,
                                    .block_cols = 32},
                  codes, &scale, f32, bf16, f16);
}

static const uint8_t mxfp4[] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE,
                                0x0F, 0xF0, 0x71, 0x17, 0x88, 0x2A, 0xE5, 0x4D};

static void check_mxfp4(uint8_t scale, const uint16_t *bf16, uint64_t count) {
    const fst_scaled_args args = {.scales_count = 1,
                                  .rows = 1,
                                  .cols = 32,
                                  .count = count,
                                  .src_dtype = FST_T_F4,
                                  .dst_dtype = FST_T_BF16,
                                  .scale_dtype = FST_T_F8_E8M0,
                                  .kind = FST_SCALE_GROUP,
                                  .block_cols = 32};
    check_vector(&args, mxfp4, &scale, bf16);
}

TEST(kernels_scaled, mxfp4) {
    static const uint16_t small[] = {0x0000, 0x3C80, 0x3D00, 0x3D40, 0x3D80, 0x3DC0, 0x3E00, 0x3E40,
                                     0x8000, 0xBC80, 0xBD00, 0xBD40, 0xBD80, 0xBDC0, 0xBE00, 0xBE40,
                                     0xBE40, 0x0000, 0x0000, 0xBE40, 0x3C80, 0x3E40, 0x3E40, 0x3C80,
                                     0x8000, 0x8000, 0xBD00, 0x3D00, 0x3DC0, 0xBE00, 0xBDC0, 0x3D80};
    static const uint16_t one[] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                   0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0,
                                   0xC0C0, 0x0000, 0x0000, 0xC0C0, 0x3F00, 0x40C0, 0x40C0, 0x3F00,
                                   0x8000, 0x8000, 0xBF80, 0x3F80, 0x4040, 0xC080, 0xC040, 0x4000};
    check_mxfp4(0x7A, small, 32);
    check_mxfp4(0x7F, one, 32);
}

TEST(kernels_scaled, mxfp4_under_the_smallest_scale_keeps_subnormals) {
    static const uint16_t bf16[] = {0x0000, 0x0020, 0x0040, 0x0060, 0x0080, 0x00C0, 0x0100, 0x0140};
    check_mxfp4(0x00, bf16, 8);
}

TEST(kernels_scaled, mxfp4_under_the_largest_scale_overflows) {
    static const uint16_t bf16[] = {0x0000, 0x7E80, 0x7F00, 0x7F40, 0x7F80, 0x7F80, 0x7F80, 0x7F80};
    check_mxfp4(0xFE, bf16, 8);
}

TEST(kernels_scaled, mxfp4_under_a_nan) {
    uint16_t bf16[32];
    for (int i = 0; i < 32; i++) bf16[i] = mxfp4[i / 2] >> (i % 2 * 4) & 8 ? 0xFFC0 : 0x7FC0;
    check_mxfp4(0xFF, bf16, 32);
}

/* quant-formats 3.6 and 5.5. Code 8 gives -0, as in compressed-tensors; ModelOpt's table has 0 there. */
static void check_nvfp4(uint32_t global, unsigned flags, const uint32_t *f32, const uint16_t *bf16,
                        const uint16_t *f16) {
    static const uint8_t codes[] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE}, scale = 0x73;
    fst_scaled_args args = {.rows = 1,
                            .cols = 16,
                            .count = 16,
                            .src_dtype = FST_T_F4,
                            .scale_dtype = FST_T_F8_E4M3,
                            .scales_count = 1,
                            .kind = FST_SCALE_GROUP,
                            .block_rows = 1,
                            .block_cols = 16,
                            .global_scale = &global,
                            .flags = flags};
    uint32_t all32[16];
    uint16_t allb[16], allh[16];
    for (int i = 0; i < 16; i++) { /* the second half is the first, negative */
        all32[i] = f32[i % 8] | (i < 8 ? 0 : 0x80000000);
        allb[i] = bf16[i % 8] | (i < 8 ? 0 : 0x8000);
        allh[i] = f16[i % 8] | (i < 8 ? 0 : 0x8000);
    }
    check_vectors(args, codes, &scale, all32, allb, allh);
}

TEST(kernels_scaled, nvfp4_divided_by_its_global_scale) {
    check_nvfp4(0x457A0000, FST_K_DIVIDE,
                (const uint32_t[]){0, 0x3CB43958, 0x3D343958, 0x3D872B02, 0x3DB43958, 0x3E072B02, 0x3E343958,
                                   0x3E872B02},
                (const uint16_t[]){0, 0x3CB4, 0x3D34, 0x3D87, 0x3DB4, 0x3E07, 0x3E34, 0x3E87},
                (const uint16_t[]){0, 0x25A2, 0x29A2, 0x2C39, 0x2DA2, 0x3039, 0x31A2, 0x3439});
}

TEST(kernels_scaled, nvfp4_times_its_global_scale) {
    check_nvfp4(0x3983126F, 0,
                (const uint32_t[]){0, 0x3CB43959, 0x3D343959, 0x3D872B03, 0x3DB43959, 0x3E072B03, 0x3E343959,
                                   0x3E872B03},
                (const uint16_t[]){0, 0x3CB4, 0x3D34, 0x3D87, 0x3DB4, 0x3E07, 0x3E34, 0x3E87},
                (const uint16_t[]){0, 0x25A2, 0x29A2, 0x2C39, 0x2DA2, 0x3039, 0x31A2, 0x3439});
}

/* Every scale, every code, several global ones, by definition: two products, or a quotient and a product, each rounded. */
TEST(kernels_scaled, nvfp4_under_every_scale) {
    static const uint32_t globals[] = {0x3F800000, 0x3983126F, 0x457A0000, 0x00400000, 0x7F000000,
                                       0x7F800000, 0x7FC00000, 0xBF000000, 0};
    enum { COUNT = 256 * 16 };
    uint8_t codes[COUNT / 2], scales[256];
    for (size_t i = 0; i < COUNT; i += 2) codes[i / 2] = (uint8_t)(i % 16 | (i + 1) % 16 << 4);
    for (size_t i = 0; i < 256; i++) scales[i] = (uint8_t)i;
    test_rig rig;
    EACH_RIG(&rig, 1 << 16) {
        for (size_t k = 0; k < sizeof globals / sizeof *globals * 2 * target_count; k++) {
            const uint32_t global = globals[k / 6];
            fst_scaled_args args = {.rows = 16,
                                    .cols = 256,
                                    .count = COUNT,
                                    .src_dtype = FST_T_F4,
                                    .dst_dtype = targets[k % 3],
                                    .scale_dtype = FST_T_F8_E4M3,
                                    .scales_count = 256,
                                    .kind = FST_SCALE_GROUP,
                                    .block_rows = 1,
                                    .block_cols = 16,
                                    .global_scale = &global,
                                    .flags = k / 3 % 2 ? FST_K_DIVIDE : 0};
            const uint8_t *got = run_scaled(&rig, args, codes, 0, scales, 0);
            for (uint64_t i = 0; i < COUNT; i++) {
                const double s = rig_value(FST_T_F8_E4M3, scales[i / 16]), g = rig_value(FST_T_F32, global);
                const float scale = args.flags ? (float)s / (float)g : (float)s * (float)g;
                const double x = rig_value(FST_T_F4, i % 16), exact = x * scale;
                uint32_t code = 0;
                memcpy(&code, got + i * fst_type_bits(args.dst_dtype) / 8, fst_type_bits(args.dst_dtype) / 8);
                const int minus = (signbit(x) != 0) ^ (signbit(s) != 0) ^ (signbit(g) != 0);
                const double want = isnan(exact) ? copysign(NAN, minus ? -1.0 : 1.0) : (double)(float)exact;
                if (rig_code(args.dst_dtype, want, 0) != code) {
                    test_fail(__FILE__, __LINE__, "%s: code %u, scale %02X, global %08X%s: %X",
                              rig.gpu.kernels->target, (unsigned)(i % 16), scales[i / 16], global,
                              args.flags ? " (divides)" : "", code);
                }
            }
        }
    }
}

/* Ranges that begin and end inside groups, at every alignment: pieces give the bytes of the whole. Groups are some vectors
 * long, or less than one, or end inside of one. */
TEST(kernels_scaled, nvfp4_in_any_range) {
    enum { ROWS = 5, COLS = 96, COUNT = ROWS * COLS };
    static const uint32_t global = 0x3C23D70A;
    static const unsigned groups[] = {16, 2, 6, 12, 32};
    uint8_t codes[COUNT / 2], scales[COUNT / 2], whole[COUNT * 4];
    uint64_t random = 11;
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)rig_random(&random);
    for (size_t i = 0; i < sizeof scales; i++) scales[i] = (uint8_t)(rig_random(&random) & 0x7B);
    test_rig rig;
    EACH_RIG(&rig, 1 << 14) {
        for (int n = 0; n < 5 * target_count; n++) {
            const int t = n % target_count;
            const unsigned group = groups[n / target_count];
            const size_t size = fst_type_bits(targets[t]) / 8;
            fst_scaled_args args = {.rows = ROWS,
                                    .cols = COLS,
                                    .count = COUNT,
                                    .src_dtype = FST_T_F4,
                                    .dst_dtype = targets[t],
                                    .scale_dtype = FST_T_F8_E4M3,
                                    .scales_count = COUNT / group,
                                    .kind = FST_SCALE_GROUP,
                                    .block_rows = 1,
                                    .block_cols = group,
                                    .global_scale = &global};
            memcpy(whole, run_scaled(&rig, args, codes, 0, scales, 0), COUNT * size);
            for (int k = 0; k < 60; k++) {
                args.first = rig_below(&random, COUNT / 2) * 2;
                args.count = rig_below(&random, (COUNT - args.first) / 2 + 1) * 2;
                rig_limit_launches(k % 4 ? 0 : 64);
                const uint8_t *got = run_scaled(&rig, args, codes + args.first / 2, rig_below(&random, 17),
                                                scales, rig_below(&random, 9) * size);
                rig_limit_launches(0);
                CHECK_BYTES(whole + args.first * size, got, args.count * size);
            }
        }
    }
}

TEST(kernels_scaled, nvfp4_that_is_wrong) {
    static const float one = 1;
    uint8_t codes[32], scales[4], out[256];
    const fst_scaled_args good = {.src = codes,
                                  .dst = out,
                                  .scales = scales,
                                  .rows = 2,
                                  .cols = 32,
                                  .count = 64,
                                  .src_dtype = FST_T_F4,
                                  .dst_dtype = FST_T_F32,
                                  .scale_dtype = FST_T_F8_E4M3,
                                  .scales_count = 4,
                                  .kind = FST_SCALE_GROUP,
                                  .block_rows = 1,
                                  .block_cols = 16,
                                  .global_scale = &one};
    int (*const run)(fst_queue, const fst_scaled_args *) = fst_kernels_cpu()->scaled;
    memset(codes, 0, sizeof codes);
    memset(scales, 0, sizeof scales);
    fst_scaled_args bad = good;
    CHECK_INT(FST_K_OK, run(NULL, &good));
#define WRONG(field, value, status) \
    bad = good, bad.field = value;  \
    CHECK_INT(status, run(NULL, &bad))
    WRONG(src_dtype, FST_T_F8_E4M3, FST_K_NO_KERNEL);
    WRONG(kind, FST_SCALE_ROW, FST_K_NO_KERNEL);
    WRONG(dst_dtype, FST_T_F64, FST_K_NO_KERNEL);
    WRONG(scale_dtype, FST_T_F32, FST_K_SCALE);
    WRONG(block_cols, 0, FST_K_SCALE);
    WRONG(block_cols, 24, FST_K_SCALE);
    WRONG(scales_count, 3, FST_K_SCALE);
    WRONG(first, 1, FST_K_SIZE);
    WRONG(count, 66, FST_K_SIZE);
    WRONG(rows, UINT64_MAX, FST_K_SIZE);
    WRONG(src, NULL, FST_K_NULL);
    WRONG(scales, NULL, FST_K_NULL);
    WRONG(dst, out + 1, FST_K_ALIGN);
    WRONG(global_scale, (const char *)&one + 1, FST_K_ALIGN);
#undef WRONG
}

TEST(kernels_scaled, rounds_twice_as_the_references_do) {
    static const uint8_t code = 0x43;
    static const uint32_t scale = 0x3BE68BA3;
    static const uint16_t bf16 = 0x3C9E; /* the exact product, rounded once, would be 3C9F */
    check_vectors((fst_scaled_args){.scales_count = 1,
                                    .rows = 1,
                                    .cols = 1,
                                    .src_dtype = FST_T_F8_E4M3,
                                    .scale_dtype = FST_T_F32,
                                    .kind = FST_SCALE_TENSOR},
                  &code, &scale, NULL, &bf16, NULL);
}

/* ---- Every code under many scales ---- */

/* Zeros, subnormals, ends of the range, Inf and NaN with either sign and with payloads; then anything. */
static uint32_t a_scale(int dtype, uint64_t *random, unsigned i) {
    static const uint32_t f32[] = {0,          0x80000000, 1,          0x80000001, 0x007FFFFF, 0x00800000,
                                   0x00800001, 0x3F800000, 0xBF800000, 0x3F7FFFFF, 0x7F7FFFFF, 0xFF7FFFFF,
                                   0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FC00000, 0xFFC00000,
                                   0x7FFFFFFF, 0xFFFFFFFF, 0x33800000, 0x477FE000, 0x477FF000};
    static const uint32_t f16[] = {0,      0x8000, 1,      0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF,
                                   0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0xFC01, 0x7E00, 0xFE00, 0x7FFF, 0xFFFF};
    if (dtype == FST_T_F32) return i < sizeof f32 / 4 ? f32[i] : (uint32_t)rig_random(random);
    if (dtype == FST_T_BF16) return i < sizeof f32 / 4 ? f32[i] >> 16 : (uint32_t)rig_below(random, 1 << 16);
    if (dtype == FST_T_F16) return i < sizeof f16 / 4 ? f16[i] : (uint32_t)rig_below(random, 1 << 16);
    return i & 255;
}

static void put_scale(uint8_t *scales, int dtype, uint64_t i, uint32_t code) {
    const size_t size = bytes_of(dtype, 1);
    memcpy(scales + i * size, &code, size);
}

/* Compares a result with what the definition says; args is of the run. */
static void check_values(const test_rig *rig, const fst_scaled_args *args, const uint8_t *codes,
                         const uint8_t *scales, const uint8_t *got) {
    for (uint64_t i = 0; i < args->count; i++) {
        const uint32_t code = code_at(args->src_dtype, codes, i);
        const uint32_t scale = code_at(args->scale_dtype, scales, scale_at(args, args->first + i));
        const uint32_t want = product(args->src_dtype, code, args->scale_dtype, scale, args->dst_dtype);
        if (want != code_at(args->dst_dtype, got, i))
            test_fail(__FILE__, __LINE__,
                      "%s: element %llu: %s %02X x %s %08X to %s: want %08X, got %08X (kind %d, %llu x %llu)",
                      rig->gpu.kernels->target, (unsigned long long)(args->first + i),
                      rig_dtype_name(args->src_dtype), code, rig_dtype_name(args->scale_dtype), scale,
                      rig_dtype_name(args->dst_dtype), want, code_at(args->dst_dtype, got, i), args->kind,
                      (unsigned long long)args->rows, (unsigned long long)args->cols);
    }
}

static void check_every_code(int src) {
    enum { rows = 256 };
    uint8_t codes[rows * 256], scales[rows * 4];
    const uint64_t cols = 1u << fst_type_bits(src);
    for (size_t i = 0; i < sizeof codes; i++)
        codes[i] = (uint8_t)(cols == 16 ? i % 8 * 2 | (i % 8 * 2 + 1) << 4 : i);
    test_rig rig;
    EACH_RIG(&rig, 1 << 19)
    for (int t = 0; t < target_count; t++)
        for (int s = 0; s < scale_type_count; s++) {
            uint64_t random = 7;
            for (unsigned i = 0; i < rows; i++)
                put_scale(scales, scale_types[s], i, a_scale(scale_types[s], &random, i));
            const fst_scaled_args args = {.scales_count = rows,
                                          .rows = rows,
                                          .cols = cols,
                                          .count = rows * cols,
                                          .src_dtype = src,
                                          .dst_dtype = targets[t],
                                          .scale_dtype = scale_types[s],
                                          .kind = FST_SCALE_ROW};
            check_values(&rig, &args, codes, scales, run_scaled(&rig, args, codes, 0, scales, 0));
        }
}

TEST(kernels_scaled, every_e4m3_under_many_scales) { check_every_code(FST_T_F8_E4M3); }
TEST(kernels_scaled, every_e5m2_under_many_scales) { check_every_code(FST_T_F8_E5M2); }
TEST(kernels_scaled, every_e4m3fnuz_under_many_scales) { check_every_code(FST_T_F8_E4M3FNUZ); }
TEST(kernels_scaled, every_e5m2fnuz_under_many_scales) { check_every_code(FST_T_F8_E5M2FNUZ); }
TEST(kernels_scaled, every_int8_under_many_scales) { check_every_code(FST_T_I8); }
TEST(kernels_scaled, every_f4_under_many_scales) { check_every_code(FST_T_F4); }

/* ---- Any matrix, any blocks, any range, any alignment ---- */

enum { most_elements = 6000 };

static uint64_t a_length(uint64_t *random) {
    static const uint64_t lengths[] = {1,  2,  3,  5,  7,  8,   13,  15,  16, 17,
                                       31, 32, 33, 61, 64, 127, 128, 129, 251};
    return lengths[rig_below(random, sizeof lengths / sizeof *lengths)];
}

static fst_scaled_args a_matrix(uint64_t *random) {
    fst_scaled_args args = {.rows = a_length(random),
                            .cols = a_length(random),
                            .kind = (fst_scale_kind)rig_below(random, 4),
                            .block_rows = a_length(random),
                            .block_cols = a_length(random)};
    args.src_dtype = sources[rig_below(random, source_count)];
    args.dst_dtype = targets[rig_below(random, target_count)];
    args.scale_dtype = scale_types[rig_below(random, scale_type_count)];
    while (args.rows * args.cols > most_elements) args.rows = args.rows / 2;
    const uint64_t all = args.rows * args.cols, f4 = args.src_dtype == FST_T_F4;
    args.scales_count = scales_for(&args);
    args.first = rig_below(random, 3) ? rig_below(random, all) : 0;
    if (f4) args.first &= ~1ull;
    args.count = rig_below(random, 3) ? rig_below(random, all - args.first + 1) : all - args.first;
    if (f4 && args.first + args.count != all) args.count &= ~1ull;
    return args;
}

TEST(kernels_scaled, any_range_of_any_matrix) {
    static uint8_t codes[most_elements], scales[most_elements * 4];
    test_rig rig;
    EACH_RIG(&rig, 1 << 17) {
        uint64_t random = 11;
        const int trials = rig.gpu.host_access ? 4000 : 1000;
        for (int trial = 0; trial < trials; trial++) {
            const fst_scaled_args args = a_matrix(&random);
            const size_t size = bytes_of(args.dst_dtype, 1);
            for (size_t i = 0; i < bytes_of(args.src_dtype, args.count); i++)
                codes[i] = (uint8_t)rig_random(&random);
            for (uint64_t i = 0; i < args.scales_count; i++)
                put_scale(scales, args.scale_dtype, i,
                          a_scale(args.scale_dtype, &random, (unsigned)rig_below(&random, 256)));
            rig_limit_launches(trial % 4 ? 0 : 64);
            const uint8_t *got = run_scaled(&rig, args, codes, rig_below(&random, 17), scales,
                                            rig_below(&random, 16 / size) * size);
            rig_limit_launches(0);
            check_values(&rig, &args, codes, scales, got);
        }
    }
}

/* A scale for each column: as many as there are codes in a row. */
TEST(kernels_scaled, columns) {
    static const uint64_t lengths[] = {2, 3, 7, 8, 9, 15, 16, 17, 24, 64, 67, 251};
    static uint8_t codes[most_elements], scales[most_elements * 4];
    test_rig rig;
    EACH_RIG(&rig, 1 << 17) {
        uint64_t random = 12;
        for (int trial = 0; trial < 1500; trial++) {
            fst_scaled_args args = a_matrix(&random);
            args.kind = FST_SCALE_BLOCK;
            args.rows = rig_below(&random, 20) + 1;
            args.cols = lengths[rig_below(&random, sizeof lengths / sizeof *lengths)];
            args.block_cols = 1;
            args.block_rows = args.rows + rig_below(&random, 2);
            args.scales_count = scales_for(&args);
            args.first = trial % 2 ? rig_below(&random, args.rows * args.cols) & ~1ull : 0;
            args.count = args.rows * args.cols - args.first;
            const size_t size = bytes_of(args.dst_dtype, 1);
            for (size_t i = 0; i < bytes_of(args.src_dtype, args.count); i++)
                codes[i] = (uint8_t)rig_random(&random);
            for (uint64_t i = 0; i < args.scales_count; i++)
                put_scale(
                    scales, args.scale_dtype, i,
                    a_scale(args.scale_dtype, &random, (unsigned)rig_below(&random, trial % 3 ? 9999 : 64)));
            const size_t src_skew = trial % 4 ? rig_below(&random, 17) : 0;
            const uint8_t *got = run_scaled(&rig, args, codes, src_skew, scales,
                                            trial % 4 ? rig_below(&random, 16 / size) * size : 0);
            check_values(&rig, &args, codes, scales, got);
        }
    }
}

/* Every alignment of both sides under every kind, of a matrix whose rows, groups and blocks are no multiples
 * of a vector. */
TEST(kernels_scaled, every_alignment) {
    static uint8_t codes[19 * 67], scales[19 * 67 * 4];
    uint64_t random = 3;
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)rig_random(&random);
    for (uint64_t i = 0; i < 19 * 67; i++)
        put_scale(scales, FST_T_F32, i, a_scale(FST_T_F32, &random, (unsigned)i + 20));
    test_rig rig;
    EACH_RIG(&rig, 1 << 16)
    for (int s = 0; s < source_count; s++)
        for (int t = 0; t < target_count; t++)
            for (int kind = 0; kind < 4; kind++) {
                fst_scaled_args args = {.rows = 19,
                                        .cols = 67,
                                        .count = 19 * 67,
                                        .src_dtype = sources[s],
                                        .dst_dtype = targets[t],
                                        .scale_dtype = FST_T_F32,
                                        .kind = (fst_scale_kind)kind,
                                        .block_rows = 5,
                                        .block_cols = 29};
                args.scales_count = scales_for(&args);
                for (size_t src_skew = 0; src_skew < 16; src_skew++) {
                    const size_t size = bytes_of(targets[t], 1), dst_skew = src_skew * 7 / size * size % 16;
                    check_values(&rig, &args, codes, scales,
                                 run_scaled(&rig, args, codes, src_skew, scales, dst_skew));
                }
            }
}

TEST(kernels_scaled, pieces_give_the_bytes_of_the_whole) {
    enum { rows = 300, cols = 1000, all = rows * cols };
    static uint8_t codes[all], scales[3 * 8 * 4], whole[all * 2];
    uint64_t random = 5;
    for (size_t i = 0; i < all; i++) codes[i] = (uint8_t)rig_random(&random);
    for (uint64_t i = 0; i < 3 * 8; i++)
        put_scale(scales, FST_T_F32, i, 0x3C000000 + (uint32_t)rig_below(&random, 1 << 26));
    test_rig rig;
    EACH_RIG(&rig, 1 << 21) {
        fst_scaled_args args = {.scales_count = 24,
                                .rows = rows,
                                .cols = cols,
                                .count = all,
                                .src_dtype = FST_T_F8_E4M3,
                                .dst_dtype = FST_T_BF16,
                                .scale_dtype = FST_T_F32,
                                .kind = FST_SCALE_BLOCK,
                                .block_rows = 128,
                                .block_cols = 128};
        memcpy(whole, run_scaled(&rig, args, codes, 0, scales, 0), sizeof whole);
        check_values(&rig, &args, codes, scales, whole);
        for (uint64_t first = 0; first < all; first += args.count) {
            args.first = first;
            args.count = 1 + rig_below(&random, 20000);
            if (args.count > all - first) args.count = all - first;
            CHECK_BYTES(whole + first * 2,
                        run_scaled(&rig, args, codes + first, first % 16, scales, first % 8 * 2),
                        args.count * 2);
        }
    }
}

/* ---- Beyond 32 bits: small ranges of huge matrices ---- */

static void check_huge(fst_scaled_args args, uint64_t first) {
    enum { count = 300 };
    uint8_t codes[count];
    uint64_t random = first;
    args.first = first;
    args.count = count;
    args.scales_count = scales_for(&args);
    CHECK(args.scales_count <= 1 << 18);
    uint8_t *const scales = malloc(args.scales_count * 4);
    CHECK(scales);
    for (size_t i = 0; i < count; i++) codes[i] = (uint8_t)rig_random(&random);
    for (uint64_t i = 0; i < args.scales_count; i++)
        put_scale(scales, FST_T_F32, i, 0x3F800000 + (uint32_t)i * 16);
    test_rig rig;
    EACH_RIG(&rig, 1 << 21)
    check_values(&rig, &args, codes, scales, run_scaled(&rig, args, codes, 3, scales, 4));
    free(scales);
}

static fst_scaled_args huge(fst_scale_kind kind, uint64_t rows, uint64_t cols, uint64_t block_rows,
                            uint64_t block_cols) {
    return (fst_scaled_args){.rows = rows,
                             .cols = cols,
                             .src_dtype = FST_T_F8_E4M3,
                             .dst_dtype = FST_T_F32,
                             .scale_dtype = FST_T_F32,
                             .kind = kind,
                             .block_rows = block_rows,
                             .block_cols = block_cols};
}

TEST(kernels_scaled, range_beyond_2_32_elements) {
    check_huge(huge(FST_SCALE_ROW, 200000, 100003, 0, 0), 100003ull * 199990 - 100);
    check_huge(huge(FST_SCALE_BLOCK, 1 << 16, 1 << 17, 128, 1 << 10), (1ull << 32) - 7);
}

TEST(kernels_scaled, rows_longer_than_2_32) {
    check_huge(huge(FST_SCALE_ROW, 70000, (1ull << 33) + 5, 0, 0), ((1ull << 33) + 5) * 66000 - 150);
    check_huge(huge(FST_SCALE_GROUP, 100, (1ull << 33) + 5, 0, (1ull << 32) + 3),
               ((1ull << 33) + 5) * 99 + (1ull << 32) - 100);
    check_huge(huge(FST_SCALE_BLOCK, 1000, (1ull << 33) + 5, 3, (1ull << 32) + 3),
               ((1ull << 33) + 5) * 999 - 1);
    check_huge(huge(FST_SCALE_BLOCK, 7, (1ull << 56) + 1, UINT64_MAX, UINT64_MAX),
               ((1ull << 56) + 1) * 6 - 10);
}

TEST(kernels_scaled, more_rows_than_2_32) {
    check_huge(huge(FST_SCALE_BLOCK, (1ull << 35) + 1, 3, 1ull << 20, 2), ((1ull << 34) + 12345) * 3 + 1);
    check_huge(huge(FST_SCALE_TENSOR, (1ull << 58), 1, 0, 0), (1ull << 57) + 1);
}

/* ---- What is read (AddressSanitizer watches the ends, page faults what is far off) ---- */

TEST(kernels_scaled, no_byte_outside_codes_and_scales_is_read) {
    test_rig rig;
    EACH_RIG(&rig, 1 << 16) {
        if (!rig.gpu.host_access) continue;
        for (int s = 0; s < source_count; s++)
            for (int t = 0; t < target_count; t++)
                for (uint64_t cols = 2; cols < 100; cols += 3)
                    for (size_t skew = 0; skew < 16; skew += 3) {
                        fst_scaled_args args = {.rows = 3,
                                                .cols = cols,
                                                .count = 3 * cols,
                                                .src_dtype = sources[s],
                                                .dst_dtype = targets[t],
                                                .scale_dtype = FST_T_F8_E8M0,
                                                .kind = FST_SCALE_GROUP,
                                                .block_cols = 7};
                        args.scales_count = scales_for(&args);
                        const size_t size = skew + bytes_of(sources[s], args.count);
                        uint8_t *memory = calloc(1, size), *scales = calloc(1, args.scales_count);
                        CHECK(memory && scales);
                        POISON(memory, skew);
                        args.src = memory + skew;
                        args.dst = rig.dst;
                        args.scales = scales;
                        CHECK_INT(0, rig.gpu.kernels->scaled(NULL, &args));
                        UNPOISON(memory, skew);
                        free(memory);
                        free(scales);
                    }
    }
}

TEST(kernels_scaled, nothing_of_the_callers_fpu_state_shows) {
    /* Round up, flush subnormals, read them as zero. */
    static const uint8_t codes[] = {0x38, 0x43, 0x01, 0x3C};
    static const uint32_t scale = 0x3BE68BA3, tiny = 0x00000003;
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        fst_scaled_args args = {.scales_count = 1,
                                .rows = 1,
                                .cols = 4,
                                .count = 4,
                                .src_dtype = FST_T_F8_E4M3,
                                .dst_dtype = FST_T_F32,
                                .scale_dtype = FST_T_F32,
                                .kind = FST_SCALE_TENSOR};
        const unsigned saved = __builtin_ia32_stmxcsr();
        uint8_t got[2][16];
        __builtin_ia32_ldmxcsr(saved | 0x8040 | 0x4000);
        memcpy(got[0], run_scaled(&rig, args, codes, 0, &scale, 0), 16);
        memcpy(got[1], run_scaled(&rig, args, codes, 0, &tiny, 0), 16);
        __builtin_ia32_ldmxcsr(saved);
        check_values(&rig, &args, codes, (const uint8_t *)&scale, got[0]);
        check_values(&rig, &args, codes, (const uint8_t *)&tiny, got[1]);
    }
}

/* ---- Wrong arguments: a status, and nothing is written ---- */

static fst_scaled_args good(fst_scale_kind kind) {
    fst_scaled_args args = {.rows = 4,
                            .cols = 6,
                            .count = 24,
                            .src_dtype = FST_T_F8_E4M3,
                            .dst_dtype = FST_T_BF16,
                            .scale_dtype = FST_T_F32,
                            .kind = kind,
                            .block_rows = 3,
                            .block_cols = 4};
    args.scales_count = scales_for(&args);
    return args;
}

enum { no_src = 1, no_dst = 2, no_scales = 4, odd_dst = 8, odd_scales = 16 };

static void check_status(int want, fst_scaled_args args, unsigned faults) {
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        memset(rig.host, 0xA5, 4096);
        rig_upload(&rig, rig.dst, rig.host, 4096);
        args.src = faults & no_src ? NULL : rig.src;
        args.dst = faults & no_dst ? NULL : rig.dst + (faults & odd_dst ? 1 : 0);
        args.scales = faults & no_scales
                          ? NULL
                          : rig.src + 2048 + (faults & odd_scales ? fst_type_bits(args.scale_dtype) / 16 : 0);
        CHECK_INT(want, rig.gpu.kernels->scaled(rig.stream, &args));
        rig_download(&rig, 4096);
        for (size_t i = 0; i < 4096; i++) CHECK_INT(0xA5, rig.host[i]);
    }
}

#define REFUSED(name, want, kind, faults, ...) \
    TEST(kernels_scaled_refuse, name) {        \
        fst_scaled_args args = good(kind);     \
        __VA_ARGS__;                           \
        check_status(want, args, faults);      \
    }

REFUSED(f16_source, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.src_dtype = FST_T_F16)
REFUSED(u8_source, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.src_dtype = FST_T_U8)
REFUSED(native_source, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.src_dtype = FST_T_NATIVE)
REFUSED(source_outside_the_list, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.src_dtype = 1000)
REFUSED(f64_result, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.dst_dtype = FST_T_F64)
REFUSED(fp8_result, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.dst_dtype = FST_T_F8_E4M3)
REFUSED(result_outside_the_list, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.dst_dtype = -1)
REFUSED(unknown_kind, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.kind = (fst_scale_kind)4)
REFUSED(negative_kind, FST_K_NO_KERNEL, FST_SCALE_TENSOR, 0, args.kind = (fst_scale_kind)-1)
REFUSED(source_null, FST_K_NULL, FST_SCALE_ROW, no_src, )
REFUSED(result_null, FST_K_NULL, FST_SCALE_ROW, no_dst, )
REFUSED(scales_null, FST_K_NULL, FST_SCALE_ROW, no_scales, )
REFUSED(result_between_elements, FST_K_ALIGN, FST_SCALE_ROW, odd_dst, )
REFUSED(f32_result_between_elements, FST_K_ALIGN, FST_SCALE_ROW, odd_dst, args.dst_dtype = FST_T_F32)
REFUSED(f32_scales_between_elements, FST_K_ALIGN, FST_SCALE_ROW, odd_scales, )
REFUSED(f16_scales_between_elements, FST_K_ALIGN, FST_SCALE_ROW, odd_scales, args.scale_dtype = FST_T_F16)
REFUSED(elements_overflow, FST_K_SIZE, FST_SCALE_TENSOR, 0, args.rows = 1ull << 32; args.cols = 1ull << 32)
REFUSED(bytes_overflow, FST_K_SIZE, FST_SCALE_TENSOR, 0, args.rows = 1ull << 32; args.cols = 1ull << 29)
REFUSED(range_beyond_the_end, FST_K_SIZE, FST_SCALE_TENSOR, 0, args.first = 1)
REFUSED(range_that_wraps_around, FST_K_SIZE, FST_SCALE_TENSOR, 0, args.first = UINT64_MAX; args.count = 2)
REFUSED(range_of_an_empty_matrix, FST_K_SIZE, FST_SCALE_TENSOR, 0, args.rows = 0; args.count = 1)
REFUSED(f4_from_half_a_byte, FST_K_SIZE, FST_SCALE_TENSOR, 0, args.src_dtype = FST_T_F4; args.first = 1;
        args.count = 4)
REFUSED(f4_to_half_a_byte, FST_K_SIZE, FST_SCALE_TENSOR, 0, args.src_dtype = FST_T_F4; args.count = 5)
REFUSED(i8_scales, FST_K_SCALE, FST_SCALE_TENSOR, 0, args.scale_dtype = FST_T_I8)
REFUSED(e4m3_scales, FST_K_SCALE, FST_SCALE_TENSOR, 0, args.scale_dtype = FST_T_F8_E4M3)
REFUSED(f64_scales, FST_K_SCALE, FST_SCALE_TENSOR, 0, args.scale_dtype = FST_T_F64)
REFUSED(scale_dtype_outside_the_list, FST_K_SCALE, FST_SCALE_TENSOR, 0, args.scale_dtype = -5)
REFUSED(no_scale_for_the_tensor, FST_K_SCALE, FST_SCALE_TENSOR, 0, args.scales_count = 0)
REFUSED(two_scales_for_the_tensor, FST_K_SCALE, FST_SCALE_TENSOR, 0, args.scales_count = 2)
REFUSED(scales_of_columns, FST_K_SCALE, FST_SCALE_ROW, 0, args.scales_count = 6)
REFUSED(one_scale_for_rows, FST_K_SCALE, FST_SCALE_ROW, 0, args.scales_count = 1)
REFUSED(groups_rounded_down, FST_K_SCALE, FST_SCALE_GROUP, 0, args.scales_count = 4)
REFUSED(blocks_rounded_down, FST_K_SCALE, FST_SCALE_BLOCK, 0, args.scales_count = 1)
REFUSED(too_many_block_scales, FST_K_SCALE, FST_SCALE_BLOCK, 0, args.scales_count = 5)
REFUSED(groups_of_nothing, FST_K_SCALE, FST_SCALE_GROUP, 0, args.block_cols = 0)
REFUSED(blocks_without_columns, FST_K_SCALE, FST_SCALE_BLOCK, 0, args.block_cols = 0)
REFUSED(blocks_without_rows, FST_K_SCALE, FST_SCALE_BLOCK, 0, args.block_rows = 0)
REFUSED(scale_of_an_empty_tensor_missing, FST_K_SCALE, FST_SCALE_TENSOR, 0,
        args.rows = args.count = args.scales_count = 0)
REFUSED(scales_of_empty_rows_missing, FST_K_SCALE, FST_SCALE_ROW, 0,
        args.cols = args.count = args.scales_count = 0)

/* Nothing to do is no fault, whatever the pointers. */
REFUSED(not_an_empty_range, 0, FST_SCALE_BLOCK, no_src | no_dst | no_scales, args.count = 0)
REFUSED(not_an_empty_tensor, 0, FST_SCALE_TENSOR, no_src | no_dst | no_scales, args.rows = args.count = 0)
REFUSED(not_empty_rows, 0, FST_SCALE_ROW, no_src | no_dst, args.cols = args.count = 0)
REFUSED(not_groups_of_no_rows, 0, FST_SCALE_GROUP, no_src | no_dst,
        args.rows = args.count = args.scales_count = 0)
REFUSED(not_blocks_of_no_columns, 0, FST_SCALE_BLOCK, no_src | no_dst,
        args.cols = args.count = args.scales_count = 0)
