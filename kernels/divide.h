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

} // namespace
#endif
