// Codes times scales: the arithmetic of F32 that all devices must agree on to the last bit, NaN included.
#ifndef FST_PRODUCT_H
#define FST_PRODUCT_H

#include "numeric.h"

namespace {

// The product of two F32. A NaN is the one code, with the sign that the product has: the same on every
// device.
FST_FN uint32_t multiply(uint32_t a, uint32_t b) {
    const uint32_t bits = fst_bits_of_float32(fst_float_of_bits32(a) * fst_float_of_bits32(b));
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? ((a ^ b) & 0x80000000) | 0x7FC00000 : bits;
}

// The quotient, likewise.
FST_FN uint32_t divide(uint32_t a, uint32_t b) {
    const uint32_t bits = fst_bits_of_float32(fst_float_of_bits32(a) / fst_float_of_bits32(b));
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? ((a ^ b) & 0x80000000) | 0x7FC00000 : bits;
}

// The sum of a product and something else, likewise, with the sign of the first: no multiply-add.
FST_FN uint32_t add_rounded(uint32_t a, uint32_t b) {
    const uint32_t bits = fst_bits_of_float32(fst_float_of_bits32(a) + fst_float_of_bits32(b));
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? (a & 0x80000000) | 0x7FC00000 : bits;
}

// F32 bits -> the code of F32, F16 or BF16.
template <int Dst> FST_FN uint32_t encode(uint32_t bits) {
    if constexpr (Dst == FST_T_F32) return bits;
    else {
        const int32_t limit = static_cast<int32_t>(fst_limit(fst_float_of(FST_T_F32), fst_float_of(Dst), 0));
        return fst_encode32(bits, fst_float_of(Dst), limit);
    }
}

} // namespace
#endif
