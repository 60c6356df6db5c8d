// How packed integers lie in words, and what is asked of the arguments of `packed`.
#ifndef FST_PACKING_H
#define FST_PACKING_H

#include "pack.h"

namespace {

constexpr uint32_t base = 0x4B400000; // 1.5 x 2^23: F32 bits in which small integers are added exactly

// A code less a zero point that is on `base`, as F32 bits.
FST_FN uint32_t difference(uint32_t code, uint32_t zero) {
    return fst_bits_of_float32(fst_float_of_bits32(base | code) - fst_float_of_bits32(zero));
}

// AWQ's order of eight codes in a word.
FST_FN unsigned awq_shift(unsigned i) { return i / 2 * 4 + i % 2 * 16; }

inline uint64_t ceil_of(uint64_t n, uint64_t by) { return n / by + (n % by != 0); }

// Words of `count` codes one after the other.
inline uint64_t words_of(uint64_t count, unsigned bits, bool padded) {
    return padded ? ceil_of(count, 32 / bits) : count / 32 * bits + ceil_of(count % 32 * bits, 32);
}

// Words (bytes, of pairs) of a row of them, and how many such rows must not be parted. False: it does not fit.
inline bool shape_of(const fst_packed_args *a, uint64_t *all, uint64_t *width, uint64_t *unit) {
    const bool straddles = 32 % a->bits != 0 && !(a->flags & FST_K_PADDED);
    uint64_t high = a->rows;
    *unit = 1;
    switch (a->layout) {
    case FST_PACKED_ROW:
        *width = words_of(a->cols, a->bits, a->flags & FST_K_PADDED);
        if (straddles) *unit = a->bits;
        break;
    case FST_PACKED_PAIRS:
        *width = a->cols, high = a->rows / 2;
        if (a->rows % 2) return false;
        break;
    case FST_PACKED_TRANSPOSED: *width = ceil_of(a->rows, 8), high = a->cols; break;
    default:
        *width = a->rows, high = a->cols / 32 * a->bits + a->cols % 32 * a->bits / 32;
        if (a->cols * a->bits % 32) return false;
        if (straddles) *unit = a->rows * a->bits;
    }
    return !__builtin_mul_overflow(*width, high, all);
}

// Added to zero points; where there are none, the only one.
inline int32_t fixed_zero(const fst_packed_args *a) {
    const bool packed = a->zeros_kind != FST_ZEROS_NONE && a->zeros_kind != FST_ZEROS_BYTES;
    if (packed) return a->flags & FST_K_ZERO_PLUS_ONE ? 1 : 0;
    return a->flags & (FST_K_OFFSET | FST_K_SIGNED) ? 1 << (a->bits - 1) : 0;
}

// Added to their words.
inline uint32_t zero_carry(const fst_packed_args *a) {
    const bool packed = a->zeros_kind != FST_ZEROS_NONE && a->zeros_kind != FST_ZEROS_BYTES;
    return packed && (a->flags & FST_K_ZERO_CARRY) ? 0xFFFFFFFF / ((1u << a->bits) - 1) : 0;
}

// Flips in each code: two's complement.
inline uint32_t sign_flip(const fst_packed_args *a) {
    return a->flags & FST_K_SIGNED ? 1u << (a->bits - 1) : 0;
}

// Of scales, zero points and pointers. There is work to do.
inline int check_packed(const fst_packed_args *args) {
    const int scale = args->scale_dtype;
    if (scale != FST_T_F32 && scale != FST_T_F16 && scale != FST_T_BF16) return FST_K_SCALE;
    if (args->group == 0 || args->groups_count == 0 ||
        (!args->groups && ceil_of(args->cols, args->group) > args->groups_count))
        return FST_K_SCALE;
    if (!args->src || !args->dst || !args->scales || (args->zeros_kind != FST_ZEROS_NONE && !args->zeros))
        return FST_K_NULL;
    const unsigned dst_size = fst_type_bits(args->dst_dtype) / 8, scale_size = fst_type_bits(scale) / 8;
    const uint64_t zero_mask = args->zeros_kind == FST_ZEROS_BYTES ? 0 : 3;
    if (reinterpret_cast<uint64_t>(args->dst) % dst_size ||
        reinterpret_cast<uint64_t>(args->scales) % scale_size ||
        (reinterpret_cast<uint64_t>(args->zeros) & zero_mask) || reinterpret_cast<uint64_t>(args->groups) % 4)
        return FST_K_ALIGN;
    return FST_K_OK;
}

} // namespace
#endif
