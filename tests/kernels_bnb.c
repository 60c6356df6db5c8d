/* bitsandbytes' 4 bits: the published vectors, ranges and blocks of all kinds against the definition, bad input. */
#include <math.h>
#include <string.h>

#include "harness.h"
#include "kernels_rig.h"

enum { MOST = 4096, CAPACITY = 1 << 17, SCALES = 1 << 14, MAPS = 3 << 14, NESTED = 1 << 15 };

static const int targets[] = {FST_T_F32, FST_T_F16, FST_T_BF16};

static const uint32_t nf4[16] = {0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F,
                                 0xBDBA7871, 0x00000000, 0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A,
                                 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000};
static const uint32_t fp4[16] = {0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000, 0x3EAAAAAB, 0x3F000000,
                                 0x3E2AAAAB, 0x3E800000, 0x80000000, 0xBBAAAAAB, 0xBF2AAAAB, 0xBF800000,
                                 0xBEAAAAAB, 0xBF000000, 0xBE2AAAAB, 0xBE800000};

/* What a run has besides its codes, on the host. */
typedef struct run {
    const uint32_t *map;
    const void *absmax;
    const uint32_t *nested, *nested_map; /* or NULL */
    size_t absmax_bytes, nested_bytes;
    int fp4; /* without a map */
} run;

/* Like rig_cast: the result, valid until the next call; what is around it must stay. */
static const uint8_t *run_bnb4(test_rig *rig, fst_bnb4_args args, const run *r, const uint8_t *codes,
                               size_t src_skew, size_t dst_skew) {
    const size_t bytes = args.count * fst_type_bits(args.dst_dtype) / 8, begin = RIG_GUARD + dst_skew;
    const size_t end = begin + bytes + RIG_GUARD;
    memset(rig->host, 0xA5, end);
    rig_upload(rig, rig->dst, rig->host, end);
    rig_upload(rig, rig->src + src_skew, codes, (args.count + 1) / 2);
    rig_upload(rig, rig->src + SCALES, r->absmax, r->absmax_bytes);
    if (r->map) rig_upload(rig, rig->src + MAPS, r->map, 64);
    args.src = rig->src + src_skew;
    args.dst = rig->dst + begin;
    args.absmax = rig->src + SCALES;
    args.map = r->map ? rig->src + MAPS : NULL;
    if (r->nested) {
        rig_upload(rig, rig->src + NESTED, r->nested, r->nested_bytes);
        rig_upload(rig, rig->src + MAPS + 256, r->nested_map, 1024);
        args.nested = rig->src + NESTED;
        args.nested_map = rig->src + MAPS + 256;
    }
    CHECK_INT(0, rig->gpu.kernels->bnb4(rig->stream, &args));
    rig_download(rig, end);
    for (size_t i = 0; i < end; i++)
        if ((i < begin || i >= begin + bytes) && rig->host[i] != 0xA5)
            test_fail(__FILE__, __LINE__, "%s: byte %td is changed", rig->gpu.kernels->target,
                      (ptrdiff_t)(i - begin));
    return rig->host + begin;
}

static float value(uint32_t bits) { return fst_float_of_bits32(bits); }

/* By definition: in double, where a product of two F32 is exact, and a sum of two rounds as if at once. */
static uint32_t expected(const fst_bnb4_args *args, const run *r, const uint8_t *codes, uint64_t i) {
    const uint64_t cell = i / args->block;
    const uint32_t code = codes[i / 2] >> (i % 2 ? 0 : 4) & 15;
    float scale;
    if (r->nested) {
        const double m = (double)value(r->nested_map[((const uint8_t *)r->absmax)[cell]]);
        const float product = (float)(m * (double)value(r->nested[cell / args->nested_block]));
        scale = (float)((double)product + (double)args->offset);
    } else {
        scale = value(((const uint32_t *)r->absmax)[cell]);
    }
    const double product = (double)(float)((double)value(r->map[code]) * (double)scale);
    const int negative = (signbit(value(r->map[code])) != 0) != (signbit(scale) != 0);
    return rig_code(args->dst_dtype, isnan(product) ? copysign(NAN, negative ? -1.0 : 1.0) : product, 0);
}

static void check(const fst_bnb4_args *args, const run *r, const uint8_t *codes, size_t src_skew,
                  size_t dst_skew) {
    test_rig rig;
    EACH_RIG(&rig, CAPACITY) {
        const uint8_t *got = run_bnb4(&rig, *args, r, codes + args->first / 2, src_skew, dst_skew);
        const size_t size = fst_type_bits(args->dst_dtype) / 8;
        for (uint64_t i = 0; i < args->count; i++) {
            uint32_t code = 0;
            memcpy(&code, got + i * size, size);
            if (code != expected(args, r, codes, args->first + i))
                test_fail(__FILE__, __LINE__,
                          "%s to %s, element %llu of [%llu, +%llu), blocks of %llu: %X, want %X",
                          rig.gpu.kernels->target, rig_dtype_name(args->dst_dtype), (unsigned long long)i,
                          (unsigned long long)args->first, (unsigned long long)args->count,
                          (unsigned long long)args->block, code, expected(args, r, codes, args->first + i));
        }
    }
}

static void check_published(const run *r, const uint8_t *codes, uint64_t count, int dst, const void *want) {
    const fst_bnb4_args args = {
        .dst_dtype = dst, .elements = count, .count = count, .block = 64, .fp4 = r->fp4};
    const size_t size = fst_type_bits(dst) / 8;
    test_rig rig;
    EACH_RIG(&rig, CAPACITY)
    for (size_t skew = 0; skew < 16; skew += size)
        CHECK_BYTES(want, run_bnb4(&rig, args, r, codes, 15 - skew, skew), count * size);
}

TEST(kernels_bnb, nf4_as_published) {
    static const uint8_t codes[] = {0x0F, 0x7A, 0xE1, 0x58};
    static const uint32_t absmax[] = {0x3D4CCCCD};
    static const uint32_t f32[] = {0xBD4CCCCD, 0x3D4CCCCD, 0x00000000, 0x3C499D7E,
                                   0x3D140FC3, 0xBD0E948E, 0xBC175DCC, 0x3B826266};
    static const uint16_t bf16[] = {0xBD4D, 0x3D4D, 0x0000, 0x3C4A, 0x3D14, 0xBD0F, 0xBC17, 0x3B82};
    static const uint16_t f16[] = {0xAA66, 0x2A66, 0x0000, 0x224D, 0x28A0, 0xA875, 0xA0BB, 0x1C13};
    const run r = {nf4, absmax, NULL, NULL, 4, 0, 0};
    check_published(&r, codes, 8, FST_T_F32, f32);
    check_published(&r, codes, 8, FST_T_BF16, bf16);
    check_published(&r, codes, 8, FST_T_F16, f16);
}

TEST(kernels_bnb, fp4_as_published) {
    static const uint8_t codes[] = {0x3B, 0x1A};
    static const uint32_t absmax[] = {0x3D4CCCCD}, f32[] = {0x3D4CCCCD, 0xBD4CCCCD, 0x39888889, 0xBD088889};
    static const uint16_t bf16[] = {0x3D4D, 0xBD4D, 0x3989, 0xBD09};
    const run r = {fp4, absmax, NULL, NULL, 4, 0, 0};
    check_published(&r, codes, 4, FST_T_F32, f32);
    check_published(&r, codes, 4, FST_T_BF16, bf16);
}

/* All codes, under 1: the values themselves. Code 8 of FP4 is 0, as in the maps that bitsandbytes writes. */
TEST(kernels_bnb, values_of_its_own_without_a_map) {
    static const uint8_t codes[] = {0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF};
    static const uint32_t one[] = {0x3F800000};
    uint32_t want[16];
    for (int kind = 0; kind < 2; kind++) {
        const run r = {NULL, one, NULL, NULL, 4, 0, kind};
        memcpy(want, kind ? fp4 : nf4, sizeof want);
        if (kind) want[8] = 0;
        check_published(&r, codes, 16, FST_T_F32, want);
    }
}

/* A NaN or Inf in a map, and scales that make NaN of its 0. */
TEST(kernels_bnb, maps_and_scales_that_are_no_numbers) {
    static const uint32_t scales[][1] = {{0x3F800000}, {0xBF800000}, {0x7F800000}, {0xFFC00001}, {0}};
    uint32_t map[16];
    uint8_t codes[64];
    memcpy(map, nf4, sizeof map);
    map[3] = 0xFF800000, map[12] = 0x7FA00000;
    for (unsigned i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)(i * 37 + 11);
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
        const run r = {map, scales[i], NULL, NULL, 4, 0, 0};
        for (unsigned t = 0; t < 3; t++) {
            const fst_bnb4_args args = {.dst_dtype = targets[t], .elements = 128, .count = 128, .block = 128};
            check(&args, &r, codes, 0, 0);
        }
    }
}

/* A fused multiply-add would give ...DC13. */
TEST(kernels_bnb, nested_scales_are_rounded_twice) {
    static uint32_t nested_map[256];
    static const uint8_t codes[] = {0xFF}, absmax[] = {77};
    static const uint32_t nested[] = {0x3CA61761}, f32[] = {0x3D48DC12, 0x3D48DC12};
    const run r = {nf4, absmax, nested, nested_map, 1, 4, 0};
    const fst_bnb4_args args = {.dst_dtype = FST_T_F32,
                                .elements = 2,
                                .count = 2,
                                .block = 64,
                                .nested_block = 256,
                                .offset = value(0x3D386754)};
    test_rig rig;
    nested_map[77] = 0x3E4AE985;
    EACH_RIG(&rig, CAPACITY) CHECK_BYTES(f32, run_bnb4(&rig, args, &r, codes, 0, 0), 8);
}

static void fill(uint8_t *codes, uint32_t *absmax, uint8_t *absmax_codes, uint32_t *nested,
                 uint32_t *nested_map) {
    uint64_t state = 11;
    for (size_t i = 0; i < MOST / 2; i++) codes[i] = (uint8_t)rig_random(&state);
    for (size_t i = 0; i < MOST; i++) {
        absmax[i] = 0x38000000 + (uint32_t)rig_below(&state, 0x07000000);
        absmax_codes[i] = (uint8_t)rig_random(&state);
        nested[i] = 0x3A000000 + (uint32_t)rig_below(&state, 0x05000000);
    }
    for (size_t i = 0; i < 256; i++)
        nested_map[i] =
            (uint32_t)(rig_below(&state, 2) << 31) | (0x3C000000 + (uint32_t)rig_below(&state, 0x03800000));
}

TEST(kernels_bnb, ranges_blocks_and_alignments) {
    static uint8_t codes[MOST / 2], absmax_codes[MOST];
    static uint32_t absmax[MOST], nested[MOST], nested_map[256];
    static const uint64_t sizes[] = {64, 32, 4096, 3, 20, 1};
    uint64_t state = 5;
    fill(codes, absmax, absmax_codes, nested, nested_map);
    for (int round = 0; round < 60; round++) {
        fst_bnb4_args args = {.dst_dtype = targets[round % 3], .block = sizes[round / 3 % 6]};
        const run plain = {round % 2 ? nf4 : fp4, absmax, NULL, NULL, sizeof absmax, 0, 0};
        const run both = {plain.map, absmax_codes, nested, nested_map, sizeof absmax_codes, sizeof nested, 0};
        args.elements = 1 + rig_below(&state, MOST - 1);
        args.first = rig_below(&state, args.elements) / 2 * 2;
        args.count = rig_below(&state, args.elements - args.first + 1);
        if (args.first + args.count != args.elements) args.count = args.count / 2 * 2;
        args.nested_block = round % 4 ? 256 : 7;
        args.offset = 0.0371f;
        const size_t align = fst_type_bits(args.dst_dtype) / 8;
        rig_limit_launches(round % 4 == 1 ? 64 : 0);
        check(&args, round % 5 < 2 ? &both : &plain, codes, rig_below(&state, 16),
              rig_below(&state, 16 / align) * align);
        rig_limit_launches(0);
    }
}

TEST(kernels_bnb, bad_arguments) {
    test_rig rig;
    EACH_RIG(&rig, 1 << 12) {
        const fst_bnb4_args good = {.src = rig.src,
                                    .dst = rig.dst,
                                    .map = rig.src + 256,
                                    .absmax = rig.src + 512,
                                    .dst_dtype = FST_T_BF16,
                                    .elements = 64,
                                    .count = 64,
                                    .block = 64};
        int (*const bnb4)(fst_queue, const fst_bnb4_args *) = rig.gpu.kernels->bnb4;
        fst_bnb4_args args;
        args = good;
        args.count = 0;
        CHECK_INT(FST_K_OK, bnb4(rig.stream, &args));
        args = good;
        args.dst_dtype = FST_T_F64;
        CHECK_INT(FST_K_NO_KERNEL, bnb4(rig.stream, &args));
        args = good;
        args.elements = 62;
        CHECK_INT(FST_K_SIZE, bnb4(rig.stream, &args));
        args = good;
        args.first = 1;
        args.count = 2;
        CHECK_INT(FST_K_SIZE, bnb4(rig.stream, &args));
        args = good;
        args.count = 33;
        CHECK_INT(FST_K_SIZE, bnb4(rig.stream, &args));
        args = good;
        args.elements = UINT64_MAX;
        CHECK_INT(FST_K_SIZE, bnb4(rig.stream, &args));
        args = good;
        args.first = UINT64_MAX - 1;
        CHECK_INT(FST_K_SIZE, bnb4(rig.stream, &args));
        args = good;
        args.block = 0;
        CHECK_INT(FST_K_SCALE, bnb4(rig.stream, &args));
        args = good;
        args.nested = good.map;
        CHECK_INT(FST_K_SCALE, bnb4(rig.stream, &args));
        args = good;
        args.absmax = NULL;
        CHECK_INT(FST_K_NULL, bnb4(rig.stream, &args));
        args = good;
        args.nested = good.map;
        args.nested_block = 256;
        CHECK_INT(FST_K_NULL, bnb4(rig.stream, &args));
        args = good;
        args.dst = rig.dst + 1;
        CHECK_INT(FST_K_ALIGN, bnb4(rig.stream, &args));
        args = good;
        args.absmax = rig.src + 2;
        CHECK_INT(FST_K_ALIGN, bnb4(rig.stream, &args));
    }
}
