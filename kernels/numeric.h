/* Conversions between float types, on bits: the one truth. Compiles as C, C++, HIP and CUDA.
 *
 * Every function is inlined and called with constant types, so that what is left of it is a straight line
 * of a dozen instructions with selects, which compilers vectorise.
 *
 * The only float operations are additions of two numbers that give a normal number or zero, rounded to
 * nearest: flushing of subnormals changes nothing. (host.h sees to the rounding mode.) */
#ifndef FST_NUMERIC_H
#define FST_NUMERIC_H

#include <stdint.h>
#include <string.h>

#include "dtype_list.h"
#ifdef __HIPCC__
#include <hip/hip_runtime.h> /* memcpy and __forceinline__ for device code */
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FST_INLINE __host__ __device__ __forceinline__
#else
#define FST_INLINE inline __attribute__((always_inline, unused))
#endif
#define FST_FN static FST_INLINE

/* Before a loop in device code. */
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
#define FST_UNROLLED _Pragma("unroll")
#define FST_ROLLED _Pragma("unroll 1")
#else
#define FST_UNROLLED
#define FST_ROLLED
#endif

/* The values of fst_dtype, for code that does not include fst.h: FST_T_BF16 is FST_BF16. */
enum {
    FST_T_NATIVE,
#define X(name, bits, code) FST_T_##name,
    FST_DTYPE_LIST(X)
#undef X
};

/* The float types that are cast: name, bits, bits of the mantissa, bias; and, sign apart, the codes of the
 * largest finite number, of what lies beyond it (Inf, or NaN where there is no Inf), and of NaN. */
#define FST_FLOAT_LIST(X)                                                                                \
    X(F64, 64, 52, 1023, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0x7FF8000000000000)                     \
    X(F32, 32, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FC00000)                                              \
    X(F16, 16, 10, 15, 0x7BFF, 0x7C00, 0x7E00)                                                           \
    X(BF16, 16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0)                                                          \
    X(F8_E4M3, 8, 3, 7, 0x7E, 0x7F, 0x7F)                                                                \
    X(F8_E5M2, 8, 2, 15, 0x7B, 0x7C, 0x7E)                                                               \
    X(F8_E4M3FNUZ, 8, 3, 8, 0x7F, 0x80, 0x80)                                                            \
    X(F8_E5M2FNUZ, 8, 2, 16, 0x7F, 0x80, 0x80)

/* Narrow types, which are only cast from, to F32, F16 and BF16; without Inf and NaN. (Also F8_E8M0: an exponent
 * alone, FF NaN.) F4 has its first element in the low half of a byte; F6 are a stream of bits, the low ones first. */
#define FST_NARROW_LIST(X)                \
    X(F6_E2M3, 6, 3, 1, 0x1F, 0, 0)       \
    X(F6_E3M2, 6, 2, 3, 0x1F, 0, 0)       \
    X(F4, 4, 1, 1, 0x7, 0, 0)             \
    X(F8_E8M0, 8, 0, 127, 0xFE, 0xFF, 0xFF)

typedef struct fst_float {
    int      bits, mantissa, bias; /* bits is 0: not in the list */
    uint64_t finite, overflow, nan;
} fst_float;

FST_FN fst_float fst_float_of(int dtype) {
    fst_float type = {0, 0, 0, 0, 0, 0};
    switch (dtype) {
#define X(name, bits_, mantissa_, bias_, finite_, overflow_, nan_) \
    case FST_T_##name:                                             \
        type.bits = bits_;                                         \
        type.mantissa = mantissa_;                                 \
        type.bias = bias_;                                         \
        type.finite = finite_;                                     \
        type.overflow = overflow_;                                 \
        type.nan = nan_;                                           \
        break;
        FST_FLOAT_LIST(X)
        FST_NARROW_LIST(X)
#undef X
    default:
        break;
    }
    return type;
}

/* Bits of an element of any dtype; 0 for a value outside the list. */
FST_FN unsigned fst_type_bits(int dtype) {
    switch (dtype) {
#define X(name, bits, code) \
    case FST_T_##name:      \
        return bits;
        FST_DTYPE_LIST(X)
#undef X
    default:
        return 0;
    }
}

FST_FN int fst_is_narrow(int dtype) {
    return dtype == FST_T_F4 || dtype == FST_T_F6_E2M3 || dtype == FST_T_F6_E3M2 || dtype == FST_T_F8_E8M0;
}

/* Which pairs cast and batch have: the rule for plan and kernels. */
FST_FN int fst_casts(int src, int dst) {
    if (src == dst) return fst_type_bits(src) != 0;
    if (fst_is_narrow(src)) return dst == FST_T_F32 || dst == FST_T_F16 || dst == FST_T_BF16;
    return fst_float_of(src).bits && fst_float_of(dst).bits && !fst_is_narrow(dst);
}

FST_FN float fst_float_of_bits32(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

FST_FN uint32_t fst_bits_of_float32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

FST_FN double fst_float_of_bits64(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

FST_FN uint64_t fst_bits_of_float64(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* NaN is the sign bit with nothing else, and there is no -0. */
FST_FN int fst_is_fnuz(fst_float type) {
    return type.nan == (uint64_t)1 << (type.bits - 1);
}

/* A code of at most 16 bits -> the F32 of that value, exactly; NaN -> 7FC00000 with its sign. */
FST_FN uint32_t fst_decode32(uint32_t code, fst_float from) {
    if (from.mantissa == 0) return code == 0 ? 0x00400000 : code == from.nan ? 0x7FC00000 : code << 23; /* E8M0 */
    const int      shift = 23 - from.mantissa;
    const int32_t  rebias = (127 - from.bias) << 23;
    const uint32_t sign_bit = 1u << (from.bits - 1);
    const int32_t  a = (int32_t)(code & (sign_bit - 1));
    int32_t        bits = (a << shift) + rebias;
    if (rebias) {
        /* 1.m less 1, both on the exponent of the subnormals: 0.m */
        const int32_t one = rebias + (1 << 23);
        const float   tiny = fst_float_of_bits32((uint32_t)((a << shift) + one)) - fst_float_of_bits32((uint32_t)one);
        bits = a < 1 << from.mantissa ? (int32_t)fst_bits_of_float32(tiny) : bits;
    }
    if (fst_is_fnuz(from)) {
        bits = code == from.nan ? 0x7FC00000 : bits;
    } else {
        bits = a > (int32_t)from.finite ? 0x7FC00000 : bits;
        if (from.overflow != from.nan) bits = a == (int32_t)from.overflow ? 0x7F800000 : bits;
    }
    return (uint32_t)bits | (code & sign_bit) << (32 - from.bits);
}

/* A code of at most 32 bits -> the F64 of that value, in the same way. */
FST_FN uint64_t fst_decode64(uint64_t code, fst_float from) {
    const int      shift = 52 - from.mantissa;
    const int64_t  rebias = (int64_t)(1023 - from.bias) << 52;
    const int64_t  one = rebias + ((int64_t)1 << 52);
    const uint64_t sign_bit = (uint64_t)1 << (from.bits - 1);
    const int64_t  a = (int64_t)(code & (sign_bit - 1));
    const double   tiny = fst_float_of_bits64((uint64_t)((a << shift) + one)) - fst_float_of_bits64((uint64_t)one);
    int64_t        bits = (a << shift) + rebias;
    bits = a < (int64_t)1 << from.mantissa ? (int64_t)fst_bits_of_float64(tiny) : bits;
    if (fst_is_fnuz(from)) {
        bits = code == from.nan ? 0x7FF8000000000000 : bits;
    } else {
        bits = a > (int64_t)from.finite ? 0x7FF8000000000000 : bits;
        if (from.overflow != from.nan) bits = a == (int64_t)from.overflow ? 0x7FF0000000000000 : bits;
    }
    return (uint64_t)bits | (code & sign_bit) << (64 - from.bits);
}

/* Numbers beyond the largest finite one are first cut down to a limit: that one itself, or, when not
 * saturating, the number that would come next, whose code is in every type that of Inf (or of NaN where there
 * is no Inf). Only 8-bit types saturate. The limit is made once, outside a loop: the bits of an F64 when
 * either side has 64 bits, otherwise of an F32. */
FST_FN uint64_t fst_limit(fst_float from, fst_float to, int saturate) {
    const uint64_t code = saturate && to.bits == 8 ? to.finite : to.overflow;
    if (from.bits == 64 || to.bits == 64) return (code << (52 - to.mantissa)) + ((uint64_t)(1023 - to.bias) << 52);
    return (code << (23 - to.mantissa)) + ((uint64_t)(127 - to.bias) << 23);
}

/* F32 -> a code of at most 16 bits, rounded to nearest, ties to even. */
FST_FN uint32_t fst_encode32(uint32_t bits, fst_float to, int32_t limit) {
    const int      shift = 23 - to.mantissa;
    const uint32_t sign_bit = 1u << (to.bits - 1);
    const uint32_t sign = bits >> (32 - to.bits) & sign_bit;
    const int32_t  all = (int32_t)(bits & 0x7FFFFFFF), a = all < limit ? all : limit;
    int32_t        code = ((a + ((1 << (shift - 1)) - 1) + (a >> shift & 1)) >> shift) - ((127 - to.bias) << to.mantissa);
    if (to.bias != 127) {
        /* Added to a number whose last bit is the smallest subnormal, the FPU rounds there. */
        const int32_t least_normal = (128 - to.bias) << 23;
        const int32_t magic = least_normal + (shift << 23);
        const float   sum = fst_float_of_bits32((uint32_t)a) + fst_float_of_bits32((uint32_t)magic);
        code = a < least_normal ? (int32_t)fst_bits_of_float32(sum) - magic : code;
    }
    code = all > 0x7F800000 ? (int32_t)to.nan : code;
    if (fst_is_fnuz(to)) return code ? (uint32_t)code | sign : 0;
    return (uint32_t)code | sign;
}

/* F64 -> a code of at most 32 bits, rounded once. */
FST_FN uint64_t fst_encode64(uint64_t bits, fst_float to, int64_t limit) {
    const int      shift = 52 - to.mantissa;
    const uint64_t sign_bit = (uint64_t)1 << (to.bits - 1);
    const uint64_t sign = bits >> (64 - to.bits) & sign_bit;
    const int64_t  all = (int64_t)(bits & 0x7FFFFFFFFFFFFFFF), a = all < limit ? all : limit;
    const int64_t  half = ((int64_t)1 << (shift - 1)) - 1 + (a >> shift & 1);
    const int64_t  least_normal = (int64_t)(1024 - to.bias) << 52;
    const int64_t  magic = least_normal + ((int64_t)shift << 52);
    const double   sum = fst_float_of_bits64((uint64_t)a) + fst_float_of_bits64((uint64_t)magic);
    int64_t        code = ((a + half) >> shift) - ((int64_t)(1023 - to.bias) << to.mantissa);
    code = a < least_normal ? (int64_t)fst_bits_of_float64(sum) - magic : code;
    code = all > 0x7FF0000000000000 ? (int64_t)to.nan : code;
    if (fst_is_fnuz(to)) return code ? (uint64_t)code | sign : 0;
    return (uint64_t)code | sign;
}

/* One element. `limit` is fst_limit of the same types, which differ: equal ones are copied. */
FST_FN uint64_t fst_convert(uint64_t code, fst_float from, fst_float to, uint64_t limit) {
    if (from.bits == 64) return fst_encode64(code, to, (int64_t)limit);
    if (to.bits == 64) return fst_decode64(code, from);
    const uint32_t f32 = from.bits == 32 ? (uint32_t)code : fst_decode32((uint32_t)code, from);
    return to.bits == 32 ? f32 : fst_encode32(f32, to, (int32_t)limit);
}

#endif
