// Division of 64-bit indexes by a number that is the same for a whole launch: a multiplication and a shift.
// The method is that of Granlund and Montgomery, "Division by Invariant Integers using Multiplication"
// (1994).
#ifndef FST_DIVIDE_H
#define FST_DIVIDE_H

#include <stdint.h>

#include "numeric.h"

namespace {

FST_FN uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

struct Divisor {
    uint64_t value, magic;
    uint32_t shift; // of a power of two, magic 0; otherwise ceil(log2(value)) - 1

    FST_INLINE uint64_t divide(uint64_t n) const {
        if (magic == 0) return n >> shift;
        const uint64_t high = multiply_high(magic, n);
        return ((n - high) / 2 + high) >> shift;
    }
};

// `value` is not 0.
inline Divisor divisor(uint64_t value) {
    Divisor d = {value, 0, 63u - static_cast<unsigned>(__builtin_clzll(value))};
    if (value & (value - 1)) // floor(2^64 (2^(shift + 1) - value) / value) + 1
        d.magic = static_cast<uint64_t>(((static_cast<unsigned __int128>(2) << d.shift) - value) *
                                        (static_cast<unsigned __int128>(1) << 64) / value) +
                  1;
    return d;
}

// The same of numbers below 2^31, in 32 bits. (Exact: the magic number is less than 2^l / d too large, relatively less
// than 2^-31, where 2^l is the power of two that d does not exceed.)
struct Divisor31 {
    uint32_t value, magic, shift;

    FST_INLINE uint32_t divide(uint32_t n) const {
#ifdef __CUDA_ARCH__
        return __umulhi(n * 2, magic) >> shift;
#else
        return static_cast<uint32_t>(static_cast<uint64_t>(n * 2) * magic >> 32) >> shift;
#endif
    }
};

// `value` is neither 0 nor above 2^31.
inline Divisor31 divisor31(uint64_t value) {
    const uint32_t shift = value == 1 ? 0 : 64 - static_cast<unsigned>(__builtin_clzll(value - 1));
    return {static_cast<uint32_t>(value),
            static_cast<uint32_t>(((static_cast<uint64_t>(1) << (31 + shift)) + value - 1) / value), shift};
}

// What indexes of 31 bits are for: rows, columns and groups below the limit, and elements of a launch. Where there are more
// of these, there are more launches.
constexpr uint64_t limit31 = 1u << 29;

} // namespace

#ifdef FST_DEVICE_SHAPE
extern "C" uint64_t fst_launch31; // tests make it small
#else
namespace {
constexpr uint64_t fst_launch31 = limit31;
}
#endif
#endif
