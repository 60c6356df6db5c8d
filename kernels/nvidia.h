// Casts of four elements at a time by NVIDIA's packed instructions (sm_80; to 8 bits sm_89): the values of numeric.h,
// tested against the same tables. On other devices no pair has them.
//
// 8-bit codes become pairs of F16 or BF16 by moving their bits and one exact multiplication by a power of two, which
// also normalises subnormals. 8-bit results come from the conversion to OCP fp8, for FNUZ twice: a code of FNUZ means
// half of what it means in OCP, so that the code of 2x is right while it is small, and the code of x, its exponent
// raised by one, while it is large. Instructions make NaN some code without a sign; so NaN, what overflows, and signs
// are put in by masks: a carry into the top bit of a lane says which lanes, a permutation makes a mask of it.
#ifndef FST_NVIDIA_H
#define FST_NVIDIA_H

#include "pack.h"

#if defined(__CUDA_ARCH__)
#define FST_PACKED (__CUDA_ARCH__ / 10)
#elif defined(FST_NVIDIA_SHAPE)
#define FST_PACKED 90
#else
#define FST_PACKED 0
#endif

namespace {

FST_FN constexpr bool is_byte_float(int type) {
    return type == FST_T_F8_E4M3 || type == FST_T_F8_E5M2 || type == FST_T_F8_E4M3FNUZ ||
           type == FST_T_F8_E5M2FNUZ;
}
FST_FN constexpr bool is_half_float(int type) { return type == FST_T_F16 || type == FST_T_BF16; }
FST_FN constexpr bool is_part_byte(int type) {
    return type == FST_T_F4 || type == FST_T_F6_E2M3 || type == FST_T_F6_E3M2;
}

FST_FN constexpr bool bits_below_16(int type) {
    return is_byte_float(type) || is_part_byte(type) || type == FST_T_F8_E8M0;
}

// True when cast4 exists for a pair on this device.
FST_FN constexpr bool has_cast4(int src, int dst) {
    if (src == dst || FST_PACKED < 80 || (is_byte_float(dst) && FST_PACKED < 89)) return false;
    const bool from = bits_below_16(src) || is_half_float(src) || src == FST_T_F32;
    return from && (is_byte_float(dst) || is_half_float(dst) || dst == FST_T_F32);
}

#if FST_PACKED

#ifdef FST_NVIDIA_SHAPE
} // namespace
#include "nvidia_shape.h" // the instructions as functions, for tests on a CPU
namespace {
#else

// Each byte of the result is one of the eight of a and b, or (8 added to its number) 00 or FF by that one's top bit.
FST_FN uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}
FST_FN uint32_t multiply_bf16x2(uint32_t a, uint32_t b) { // less -0: exact, and sm_80 has no other
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
FST_FN uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
FST_FN uint32_t bf16x2_of_f32(uint32_t low, uint32_t high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
        : "=r"(d)
        : "f"(fst_float_of_bits32(high)), "f"(fst_float_of_bits32(low)));
    return d;
}
FST_FN uint32_t f16x2_of_f32(uint32_t low, uint32_t high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;"
        : "=r"(d)
        : "f"(fst_float_of_bits32(high)), "f"(fst_float_of_bits32(low)));
    return d;
}
FST_FN void f32_of_f16x2(uint32_t pair, uint32_t *low, uint32_t *high) {
    float a, b;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(a), "=f"(b)
        : "r"(pair));
    *low = fst_bits_of_float32(a), *high = fst_bits_of_float32(b);
}
// Two codes in the low half of the result; finite overflow and Inf saturate.
#if FST_PACKED >= 89
template <bool e5m2> FST_FN uint32_t fp8x2_of_f32(uint32_t low, uint32_t high) {
    uint16_t d;
    const float a = fst_float_of_bits32(high), b = fst_float_of_bits32(low);
    if constexpr (e5m2) asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(d) : "f"(a), "f"(b));
    else asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(a), "f"(b));
    return d;
}
FST_FN uint32_t f16x2_of_e4m3x2(uint32_t codes) {
    uint32_t d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(d) : "r"(codes));
    return d;
}
template <bool e5m2> FST_FN uint32_t fp8x2_of_f16x2(uint32_t pair) {
    uint16_t d;
    if constexpr (e5m2) asm("cvt.rn.satfinite.e5m2x2.f16x2 %0, %1;" : "=h"(d) : "r"(pair));
    else asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(d) : "r"(pair));
    return d;
}
#endif
#endif

// ---- Lanes ----

FST_FN uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) { return (mask & yes) | (~mask & no); }
FST_FN constexpr uint32_t twice(uint32_t lane) { return lane << 16 | lane; }
FST_FN constexpr uint32_t four(uint32_t lane) { return twice(lane << 8 | lane); }

// The least code of T, without sign, that is NaN; and what added to it reaches the top bit of its lane.
template <int T> FST_FN constexpr uint32_t to_nan() {
    return T == FST_T_F32 ? 0x007FFFFF : T == FST_T_F16 ? 0x03FF : 0x007F;
}

// The same for the least code of T that overflows when it is cast to Dst: half a step beyond the largest finite
// number, or what follows it when that tie goes down to an even code.
template <int T, int Dst> FST_FN uint32_t to_overflow() {
    const fst_float from = fst_float_of(T), to = fst_float_of(Dst);
    const int shift = from.mantissa - to.mantissa;
    const uint32_t tie = static_cast<uint32_t>((to.finite << shift) + (1ull << (shift - 1))) +
                         (static_cast<uint32_t>(from.bias - to.bias) << from.mantissa);
    return (1u << (from.bits - 1)) - (to.finite & 1 ? tie : tie + 1);
}

// ---- From 8 bits ----

// The top bit of each byte says that this is NaN (the other bits nothing).
template <int Src> FST_FN uint32_t nan_bytes(uint32_t codes) {
    const uint32_t a = codes & four(0x7F);
    if (fst_is_fnuz(fst_float_of(Src))) return ~(a + four(0x7F)) & codes;
    if (Src == FST_T_F8_E8M0) return (a + four(1)) & codes;
    return a + (Src == FST_T_F8_E4M3 ? four(1) : four(3));
}

// Two of four codes, each at the top of a byte, to a pair of T (F16 or BF16), without sign and NaN. (E5M2FNUZ goes
// beyond F16's exponents on the way: to BF16 alone.)
template <int Src, int T> FST_FN uint32_t widen(uint32_t codes, unsigned pair) {
    const fst_float from = fst_float_of(Src), to = fst_float_of(T);
    const int exponent = from.bits - 1 - from.mantissa, shift = 15 - exponent - to.mantissa;
    const uint32_t x = permute(codes, 0, pair ? 0x3424 : 0x1404);
    const uint32_t lane = ((1u << (exponent + from.mantissa)) - 1) << (to.mantissa - from.mantissa);
    uint32_t y = x >> shift & twice(lane);
    if (T == FST_T_BF16) y = multiply_bf16x2(y, twice(static_cast<uint32_t>(254 - from.bias) << 7));
    else if (from.bias != 15) y = multiply_f16x2(y, twice(static_cast<uint32_t>(30 - from.bias) << 10));
    return y;
}

// E8M0 to BF16. Its least number is a subnormal of one bit, and so is what makes a NaN of Inf.
FST_FN uint32_t decode_exponents(uint32_t codes, unsigned pair) {
    const uint32_t zeros = ~(((codes & four(0x7F)) + four(0x7F)) | codes);
    const uint32_t ends = permute(zeros | nan_bytes<FST_T_F8_E8M0>(codes), 0, pair ? 0xBBAA : 0x9988);
    return (permute(codes, 0, pair ? 0x3424 : 0x1404) >> 1 & twice(0x7F80)) | (ends & twice(0x0040));
}

// The same with sign, Inf and NaN.
template <int Src, int T> FST_FN uint32_t decode_pair(uint32_t codes, uint32_t nans, unsigned pair) {
    const fst_float to = fst_float_of(T);
    const uint32_t selector = pair ? 0xBBAA : 0x9988, x = permute(codes, 0, pair ? 0x3424 : 0x1404);
    if constexpr (Src == FST_T_F8_E8M0) return decode_exponents(codes, pair);
    uint32_t y;
    if constexpr (Src == FST_T_F8_E5M2FNUZ && T == FST_T_F16) {
        const uint32_t wide = widen<Src, FST_T_BF16>(codes, pair);
        y = f16x2_of_f32(wide << 16, wide & 0xFFFF0000);
    } else {
        y = widen<Src, T>(codes, pair);
    }
    if (Src == FST_T_F8_E5M2 && T == FST_T_BF16)
        y |= permute((codes & four(0x7F)) + four(4), 0, selector) & twice(static_cast<uint32_t>(to.overflow));
    if (!is_part_byte(Src)) y = choose(permute(nans, 0, selector), twice(static_cast<uint32_t>(to.nan)), y);
    return y | (x & 0x80008000);
}

// ---- To 8 bits ----

// What becomes of four elements, as bytes: the code of x and of 2x in OCP fp8, lanes that overflow (when not
// saturating) and that are NaN, and signs in the top bits.
template <int Dst>
FST_FN uint32_t finish(uint32_t code, uint32_t code2, uint32_t overflow, uint32_t nan, uint32_t signs) {
    if constexpr (Dst == FST_T_F8_E4M3) return ((code | overflow) & four(0x7F)) | (signs & four(0x80));
    if constexpr (Dst == FST_T_F8_E5M2) {
        code = choose(nan, four(0x7E), choose(overflow, four(0x7C), code));
        return (code & four(0x7F)) | (signs & four(0x80));
    }
    uint32_t large = (code & four(0x7F)) + (Dst == FST_T_F8_E4M3FNUZ ? four(8) : four(4));
    if (Dst == FST_T_F8_E4M3FNUZ) large |= permute(large, 0, 0xBA98); // OCP has numbers beyond 240
    const uint32_t a = choose(permute(code2 << 1, 0, 0xBA98), large, code2) & four(0x7F);
    return choose(overflow, four(0x80), a | (signs & (a + four(0x7F)) & four(0x80)));
}

template <int Dst> constexpr bool as_e5m2 = Dst == FST_T_F8_E5M2 || Dst == FST_T_F8_E5M2FNUZ;

// Four F32.
template <int Dst>
FST_FN uint32_t encode_f32(const uint32_t *x, uint32_t overflow, uint32_t nan, uint32_t signs) {
    constexpr bool e5m2 = as_e5m2<Dst>;
    uint32_t code = fp8x2_of_f32<e5m2>(x[0], x[1]) | fp8x2_of_f32<e5m2>(x[2], x[3]) << 16, code2 = 0;
    if (fst_is_fnuz(fst_float_of(Dst))) {
        uint32_t y[4];
        FST_UNROLLED
        for (unsigned i = 0; i < 4; i++) y[i] = fst_bits_of_float32(fst_float_of_bits32(x[i]) * 2);
        code2 = fp8x2_of_f32<e5m2>(y[0], y[1]) | fp8x2_of_f32<e5m2>(y[2], y[3]) << 16;
    }
    return finish<Dst>(code, code2, overflow, nan, signs);
}

// Two pairs of F16.
template <int Dst>
FST_FN uint32_t encode_f16(const uint32_t *x, uint32_t overflow, uint32_t nan, uint32_t signs) {
    constexpr bool e5m2 = as_e5m2<Dst>;
    uint32_t code = fp8x2_of_f16x2<e5m2>(x[0]) | fp8x2_of_f16x2<e5m2>(x[1]) << 16, code2 = 0;
    if (fst_is_fnuz(fst_float_of(Dst)))
        code2 = fp8x2_of_f16x2<e5m2>(multiply_f16x2(x[0], twice(0x4000))) |
                fp8x2_of_f16x2<e5m2>(multiply_f16x2(x[1], twice(0x4000))) << 16;
    return finish<Dst>(code, code2, overflow, nan, signs);
}

// Lanes of two pairs of T that are at least 2^15 less `add`, as bytes.
FST_FN uint32_t above16(const uint32_t *in, uint32_t add) {
    return permute((in[0] & 0x7FFF7FFF) + twice(add), (in[1] & 0x7FFF7FFF) + twice(add), 0xFDB9);
}

FST_FN uint32_t above32(const uint32_t *in, uint32_t add) {
    uint32_t v[4];
    FST_UNROLLED
    for (unsigned i = 0; i < 4; i++) v[i] = (in[i] & 0x7FFFFFFF) + add;
    return permute(permute(v[0], v[1], 0x0073), permute(v[2], v[3], 0x0073), 0xDC98);
}

// From F32, or two pairs of F16 or BF16.
template <int Src, int Dst> FST_FN uint32_t to_bytes(const uint32_t *in, bool saturate) {
    const uint32_t none = Dst == FST_T_F8_E5M2 ? 0 : to_nan<Src>(); // NaN is what overflow is, but in E5M2
    const uint32_t add = saturate ? none : to_overflow<Src, Dst>();
    if constexpr (Src == FST_T_F32) {
        const uint32_t signs = permute(permute(in[0], in[1], 0x0073), permute(in[2], in[3], 0x0073), 0x5410);
        return encode_f32<Dst>(in, above32(in, add), above32(in, to_nan<Src>()), signs);
    } else {
        const uint32_t signs = permute(in[0], in[1], 0x7531);
        const uint32_t overflow = above16(in, add), nan = above16(in, to_nan<Src>());
        if constexpr (Src == FST_T_F16) return encode_f16<Dst>(in, overflow, nan, signs);
        const uint32_t x[4] = {in[0] << 16, in[0] & 0xFFFF0000, in[1] << 16, in[1] & 0xFFFF0000};
        return encode_f32<Dst>(x, overflow, nan, signs);
    }
}

// ---- From 8 bits to 8 bits ----

// OCP to FNUZ of the same layout: the exponent grows by one, a subnormal doubles.
template <int Src> FST_FN uint32_t to_fnuz(uint32_t codes, bool saturate) {
    constexpr uint32_t one = 1u << (Src == FST_T_F8_E4M3 ? 3 : 2); // of the exponent
    const uint32_t a = codes & four(0x7F), normal = permute(a + four(0x80 - one), 0, 0xBA98);
    const uint32_t sum = a + choose(normal, four(one), a);
    const uint32_t b = (sum | permute(sum, 0, 0xBA98)) & four(0x7F);
    const uint32_t nan = a + (saturate ? four(Src == FST_T_F8_E4M3 ? 1 : 3) : four(one));
    return choose(permute(nan, 0, 0xBA98), four(0x80), b | (codes & (b + four(0x7F)) & four(0x80)));
}

// FNUZ to OCP of the same layout: the exponent falls by one; what becomes subnormal is halved, to even.
template <int Src> FST_FN uint32_t from_fnuz(uint32_t codes) {
    constexpr uint32_t one = 1u << (Src == FST_T_F8_E4M3FNUZ ? 3 : 2);
    const uint32_t a = codes & four(0x7F), half = a >> 1 & four(0x3F);
    const uint32_t normal = permute(a + four(0x80 - 2 * one), 0, 0xBA98);
    const uint32_t b = choose(normal, a, half + (a & half & four(1))) - (normal & four(one));
    const uint32_t nan = four(Src == FST_T_F8_E4M3FNUZ ? 0xFF : 0xFE);
    return choose(permute(nan_bytes<Src>(codes), 0, 0xBA98), nan, b | (codes & four(0x80)));
}

// What added to a code of Src, without sign, reaches 80 when it overflows in Dst: from the next power of two on,
// as codes of 2 and 3 bits of mantissa have nothing between.
template <int Src, int Dst> FST_FN uint32_t to_overflow8() {
    const fst_float from = fst_float_of(Src), to = fst_float_of(Dst);
    const int exponent = static_cast<int>(to.finite >> to.mantissa) - to.bias + 1;
    const uint32_t code = static_cast<uint32_t>(exponent + from.bias) << from.mantissa;
    return code < 0x80 ? 0x80 - code : 0;
}

template <int Src, int Dst> FST_FN uint32_t byte_to_byte(uint32_t codes, bool saturate) {
    if constexpr ((Src == FST_T_F8_E4M3 && Dst == FST_T_F8_E4M3FNUZ) ||
                  (Src == FST_T_F8_E5M2 && Dst == FST_T_F8_E5M2FNUZ))
        return to_fnuz<Src>(codes, saturate);
    if constexpr ((Src == FST_T_F8_E4M3FNUZ && Dst == FST_T_F8_E4M3) ||
                  (Src == FST_T_F8_E5M2FNUZ && Dst == FST_T_F8_E5M2))
        return from_fnuz<Src>(codes);

    const uint32_t add = saturate ? 0 : four(to_overflow8<Src, Dst>()), a = codes & four(0x7F);
    const uint32_t nan = permute(nan_bytes<Src>(codes) | (a + add), 0, 0xBA98);
    if constexpr (Src == FST_T_F8_E5M2FNUZ) {
        const uint32_t low = widen<Src, FST_T_BF16>(codes, 0), high = widen<Src, FST_T_BF16>(codes, 1);
        const uint32_t x[4] = {low << 16, low & 0xFFFF0000, high << 16, high & 0xFFFF0000};
        return encode_f32<Dst>(x, nan, nan, codes);
    } else {
        uint32_t x[2] = {widen<Src, FST_T_F16>(codes, 0), widen<Src, FST_T_F16>(codes, 1)};
        if (Src == FST_T_F8_E4M3) x[0] = f16x2_of_e4m3x2(codes), x[1] = f16x2_of_e4m3x2(codes >> 16);
        if (Dst != FST_T_F8_E5M2FNUZ) return encode_f16<Dst>(x, nan, nan, codes);
        // No number of 3 bits of mantissa is subnormal in E5M2.
        const uint32_t b = (fp8x2_of_f16x2<true>(x[0]) | fp8x2_of_f16x2<true>(x[1]) << 16) & four(0x7F);
        const uint32_t some = (b + four(0x7F)) & four(0x80);
        return choose(nan, four(0x80), (b + (some >> 5)) | (some & codes));
    }
}

// ---- Between 16 and 32 bits ----

template <int Src> FST_FN void widen16(uint32_t pair, uint32_t *low, uint32_t *high) {
    if (Src == FST_T_F16) f32_of_f16x2(pair, low, high);
    else *low = pair << 16, *high = pair & 0xFFFF0000;
}

template <int Dst> FST_FN uint32_t narrow16(uint32_t low, uint32_t high) {
    return Dst == FST_T_F16 ? f16x2_of_f32(low, high) : bf16x2_of_f32(low, high);
}

// F32 that are no NaN, to F32 or 16 bits.
template <int Dst, unsigned n> FST_FN void narrow_numbers(const uint32_t (&in)[n], uint32_t *out) {
    if constexpr (Dst == FST_T_F32) {
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) out[i] = in[i];
    } else {
        FST_UNROLLED
        for (unsigned i = 0; i < n / 2; i++) out[i] = narrow16<Dst>(in[2 * i], in[2 * i + 1]);
    }
}

template <int Src, int Dst> FST_FN uint32_t half_to_half(uint32_t in) {
    uint32_t low, high;
    widen16<Src>(in, &low, &high);
    const uint32_t nan = (in & 0x80008000) | twice(static_cast<uint32_t>(fst_float_of(Dst).nan));
    return choose(permute((in & 0x7FFF7FFF) + twice(to_nan<Src>()), 0, 0xBB99), nan,
                  narrow16<Dst>(low, high));
}

template <int Src> FST_FN void half_to_float(uint32_t in, uint32_t *out) {
    const uint32_t nans = (in & 0x7FFF7FFF) + twice(to_nan<Src>());
    widen16<Src>(in, &out[0], &out[1]);
    out[0] = choose(permute(nans, 0, 0x9999), (in << 16 & 0x80000000) | 0x7FC00000, out[0]);
    out[1] = choose(permute(nans, 0, 0xBBBB), (in & 0x80000000) | 0x7FC00000, out[1]);
}

template <int Dst> FST_FN uint32_t float_to_half(const uint32_t *in) {
    const uint32_t a = (in[0] & 0x7FFFFFFF) + to_nan<FST_T_F32>(),
                   b = (in[1] & 0x7FFFFFFF) + to_nan<FST_T_F32>();
    const uint32_t nan =
        (permute(in[0], in[1], 0x7632) & 0x80008000) | twice(static_cast<uint32_t>(fst_float_of(Dst).nan));
    return choose(permute(a, b, 0xFFBB), nan, narrow16<Dst>(in[0], in[1]));
}

// ---- All of them ----

// Four codes of 4 or 6 bits, in the low bits of a word: each to the top of a byte.
template <int Src> FST_FN uint32_t spread(uint32_t codes) {
    if (Src == FST_T_F4) return permute(codes << 4 & 0xF0F0, codes & 0xF0F0, 0x5140);
    return (codes << 2 & 0xFC) | (codes << 4 & 0xFC00) | (codes << 6 & 0xFC0000) | (codes << 8 & 0xFC000000);
}

// Four elements, one after the other in words; fewer than 32 bits in the low ones of a word.
template <int Src, int Dst> FST_FN void cast4(const uint32_t *in, uint32_t *out, bool saturate) {
    if constexpr (Src == FST_T_F8_E8M0 && Dst == FST_T_F16) {
        const uint32_t nans = nan_bytes<Src>(in[0]); // they are Inf until they get a second bit
        out[0] = f16x2_of_f32(in[0] << 23 & 0x7F800000, in[0] << 15 & 0x7F800000) |
                 (permute(nans, 0, 0x9988) & twice(0x0200));
        out[1] = f16x2_of_f32(in[0] << 7 & 0x7F800000, in[0] >> 1 & 0x7F800000) |
                 (permute(nans, 0, 0xBBAA) & twice(0x0200));
    } else if constexpr (is_byte_float(Src) && is_byte_float(Dst)) {
        out[0] = byte_to_byte<Src, Dst>(in[0], saturate);
    } else if constexpr (bits_below_16(Src)) {
        constexpr int by = Dst == FST_T_BF16 || Dst == FST_T_F32 ? FST_T_BF16 : FST_T_F16;
        const uint32_t codes = is_part_byte(Src) ? spread<Src>(in[0]) : in[0];
        const uint32_t nans = is_part_byte(Src) ? 0 : nan_bytes<Src>(codes);
        const uint32_t pairs[2] = {decode_pair<Src, by>(codes, nans, 0),
                                   decode_pair<Src, by>(codes, nans, 1)};
        if constexpr (Dst == FST_T_F32) {
            out[0] = pairs[0] << 16, out[1] = pairs[0] & 0xFFFF0000;
            out[2] = pairs[1] << 16, out[3] = pairs[1] & 0xFFFF0000;
        } else {
            out[0] = pairs[0], out[1] = pairs[1];
        }
    } else if constexpr (is_byte_float(Dst)) {
        out[0] = to_bytes<Src, Dst>(in, saturate);
    } else if constexpr (Src == FST_T_F32) {
        out[0] = float_to_half<Dst>(in), out[1] = float_to_half<Dst>(in + 2);
    } else if constexpr (Dst == FST_T_F32) {
        half_to_float<Src>(in[0], out), half_to_float<Src>(in[1], out + 2);
    } else {
        out[0] = half_to_half<Src, Dst>(in[0]), out[1] = half_to_half<Src, Dst>(in[1]);
    }
}

// ---- Times scales ----

// Four codes times scales that make no NaN: it is one of the code's. (16 bits of F4; otherwise a word.)
template <int Src, int Dst> FST_FN void scale4(uint32_t in, const uint32_t *scales, uint32_t *out) {
    const uint32_t codes = Src == FST_T_F4 ? spread<FST_T_F4>(in) : in;
    uint32_t x[4], nans = 0;
    if constexpr (Src == FST_T_I8) {
        const uint32_t biased = codes ^ four(0x80); // 2^23 + 128 + the code, as F32 bits
        FST_UNROLLED
        for (unsigned i = 0; i < 4; i++) {
            const float sum = fst_float_of_bits32(permute(biased, 0x4B000000, 0x7440 + i));
            x[i] = fst_bits_of_float32(sum - 8388736.0f);
        }
    } else { // magnitudes: signs come last
        if (is_byte_float(Src)) nans = nan_bytes<Src>(codes);
        FST_UNROLLED
        for (unsigned pair = 0; pair < 2; pair++) {
            uint32_t y = widen<Src, FST_T_BF16>(codes, pair);
            if (Src == FST_T_F8_E5M2)
                y |= permute((codes & four(0x7F)) + four(4), 0, pair ? 0xBBAA : 0x9988) & twice(0x7F80);
            x[2 * pair] = y << 16, x[2 * pair + 1] = y & 0xFFFF0000;
        }
    }
    FST_UNROLLED
    for (unsigned i = 0; i < 4; i++)
        x[i] = fst_bits_of_float32(fst_float_of_bits32(x[i]) * fst_float_of_bits32(scales[i]));
    if constexpr (Dst == FST_T_F32) {
        FST_UNROLLED
        for (unsigned i = 0; i < 4; i++) {
            if (is_byte_float(Src))
                x[i] = choose(permute(nans, 0, 0x8888 + 0x1111 * i), (scales[i] & 0x80000000) | 0x7FC00000,
                              x[i]);
            out[i] = Src == FST_T_I8 ? x[i] : x[i] ^ (codes << (24 - 8 * i) & 0x80000000);
        }
    } else {
        constexpr uint32_t nan = Dst == FST_T_F16 ? 0x7E00 : 0x7FC0;
        FST_UNROLLED
        for (unsigned pair = 0; pair < 2; pair++) {
            uint32_t y = narrow16<Dst>(x[2 * pair], x[2 * pair + 1]);
            if (is_byte_float(Src)) {
                const uint32_t signs = permute(scales[2 * pair], scales[2 * pair + 1], 0x7632) & 0x80008000;
                y = choose(permute(nans, 0, pair ? 0xBBAA : 0x9988), signs | twice(nan), y);
            }
            out[pair] = Src == FST_T_I8 ? y : y ^ (permute(codes, 0, pair ? 0x3424 : 0x1404) & 0x80008000);
        }
    }
}

// What scale4 takes: finite ones, not 0 where codes may be Inf.
template <int Src> FST_FN bool is_plain(uint32_t scale) {
    const uint32_t a = scale & 0x7FFFFFFF;
    return Src == FST_T_F8_E5M2 ? a - 1 < 0x7F7FFFFF : a < 0x7F800000;
}

// One code of E4M3 to F32: some NaN, where it is one.
FST_FN uint32_t f32_of_e4m3(uint32_t code) {
#if FST_PACKED >= 89
    uint32_t low, high;
    f32_of_f16x2(f16x2_of_e4m3x2(code), &low, &high);
    return low;
#else
    return fst_decode32(code, fst_float_of(FST_T_F8_E4M3));
#endif
}

#endif
} // namespace
#endif
