// Elements in and out of memory: one at a time at any alignment, or a vector of up to 16 bytes.
#ifndef FST_PACK_H
#define FST_PACK_H

#include <stdint.h>
#include <string.h>

#include "numeric.h"

namespace {

template <unsigned bytes> struct word_of;
template <> struct word_of<1> { using type = uint8_t; };
template <> struct word_of<2> { using type = uint16_t; };
template <> struct word_of<4> { using type = uint32_t; };
template <> struct word_of<8> { using type = uint64_t; };

// One element of `bytes` bytes at any address.
template <unsigned bytes> FST_FN typename word_of<bytes>::type load_element(const uint8_t *from) {
    typename word_of<bytes>::type word;
    memcpy(&word, from, bytes);
    return word;
}

template <unsigned bytes> FST_FN void store_element(uint8_t *to, typename word_of<bytes>::type word) {
    *reinterpret_cast<typename word_of<bytes>::type *>(to) = word;
}

// One code of `bits` bits out of a run of codes that starts at `from`. Those of 4 and 6 bits: fst_float_of's list.
template <unsigned bits> FST_FN uint64_t load_code(const uint8_t *from, uint64_t i) {
    if constexpr (bits == 4) {
        return from[i / 2] >> (i % 2 * 4) & 15;
    } else if constexpr (bits == 6) {
        const uint8_t *group = from + i / 4 * 3; // 4 codes
        return (group[0] | group[1] << 8 | group[2] << 16) >> (i % 4 * 6) & 63;
    } else {
        return load_element<bits / 8>(from + i * (bits / 8));
    }
}

// An address as a pointer. Compilers must be told that it is global memory, or they make flat (generic) accesses.
template <class T> FST_FN T *global(uint64_t address) {
#if defined(__HIP_DEVICE_COMPILE__)
    return (T *)(T __attribute__((address_space(1))) *)address;
#elif defined(__CUDA_ARCH__)
    return static_cast<T *>(__cvta_global_to_generic(address));
#else
    return reinterpret_cast<T *>(address);
#endif
}

#ifndef FST_BY_ELEMENT

// Tells that part of the memory there will be written, and what is beside it stays. (NVIDIA's L2 then reads it while other
// work goes on, and not when it must make room.)
FST_FN void expect_part(const uint8_t *at) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
#else
    (void)at;
#endif
}

// A vector as 32-bit words, in the order of memory. Fewer than 4 bytes are the low part of a word; what is above
// them may be anything.
template <unsigned bytes> struct Vector {
    static constexpr unsigned words = (bytes + 3) / 4;
    uint32_t word[words];
};

template <unsigned bytes> FST_FN Vector<bytes> load_aligned(const uint8_t *from) {
    Vector<bytes> v;
    if constexpr (bytes == 16) {
        const uint4 q = *reinterpret_cast<const uint4 *>(from);
        v.word[0] = q.x, v.word[1] = q.y, v.word[2] = q.z, v.word[3] = q.w;
    } else if constexpr (bytes == 8) {
        const uint2 q = *reinterpret_cast<const uint2 *>(from);
        v.word[0] = q.x, v.word[1] = q.y;
    } else {
        v.word[0] = *reinterpret_cast<const typename word_of<bytes>::type *>(from);
    }
    return v;
}

template <unsigned bytes> FST_FN void store_aligned(uint8_t *to, const Vector<bytes> &v) {
    if constexpr (bytes == 16) {
        *reinterpret_cast<uint4 *>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
    } else if constexpr (bytes == 8) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(v.word[0], v.word[1]);
    } else {
        *reinterpret_cast<typename word_of<bytes>::type *>(to) =
            static_cast<typename word_of<bytes>::type>(v.word[0]);
    }
}

// The 4 bytes that start `skip` (0 to 3) bytes into low:high.
FST_FN uint32_t funnel(uint32_t low, uint32_t high, unsigned skip) {
#ifdef __HIP_DEVICE_COMPILE__
    return __builtin_amdgcn_alignbyte(high, low, skip);
#else
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (8 * skip));
#endif
}

// 3 or 6 bytes, out of the aligned words that they lie in. False, with nothing read, when these are not inside
// [begin, end).
template <unsigned bytes>
FST_FN bool load_words(const uint8_t *from, const uint8_t *begin, const uint8_t *end, Vector<bytes> *out) {
    const unsigned skip = static_cast<unsigned>(reinterpret_cast<uintptr_t>(from) % 4),
                   words = (skip + bytes + 3) / 4;
    const uint8_t *low = from - skip;
    if (low < begin || low + 4 * words > end) return false;
    const uint32_t a = load_aligned<4>(low).word[0];
    const uint32_t b = words > 1 ? load_aligned<4>(low + 4).word[0] : 0;
    out->word[0] = funnel(a, b, skip);
    if constexpr (bytes == 6)
        out->word[1] = funnel(b, words > 2 ? load_aligned<4>(low + 8).word[0] : 0, skip);
    return true;
}

// The 2^n bytes that start `skew` bytes into two neighbouring vectors.
template <unsigned bytes>
FST_FN Vector<bytes> shift_pair(const Vector<bytes> &a, const Vector<bytes> &b, unsigned skew) {
    Vector<bytes> out;
    if constexpr (bytes < 4) {
        out.word[0] = (a.word[0] | b.word[0] << (8 * bytes)) >> (8 * skew);
    } else {
        constexpr unsigned n = Vector<bytes>::words;
        uint32_t all[2 * n];
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) all[i] = a.word[i], all[n + i] = b.word[i];
        // Whole words first, by selects: an index known only at run time would put the array into memory.
        FST_UNROLLED
        for (unsigned step = n / 2; step > 0; step /= 2) FST_UNROLLED
        for (unsigned i = 0; i + step < 2 * n; i++) all[i] = skew & 4 * step ? all[i + step] : all[i];
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) out.word[i] = funnel(all[i], all[i + 1], skew % 4);
    }
    return out;
}

// 2^n bytes, out of the one or two aligned vectors that they lie in.
template <unsigned bytes>
FST_FN bool load_pair(const uint8_t *from, const uint8_t *begin, const uint8_t *end, Vector<bytes> *out) {
    const unsigned skew = static_cast<unsigned>(reinterpret_cast<uintptr_t>(from) % bytes);
    if (skew == 0) {
        *out = load_aligned<bytes>(from);
        return true;
    }
    const uint8_t *low = from - skew;
    if (low < begin || low + 2 * bytes > end) return false;
    *out = shift_pair(load_aligned<bytes>(low), load_aligned<bytes>(low + bytes), skew);
    return true;
}

// The vector at `from`, whatever its alignment. False, with nothing read, when what must be read for it is not
// inside [begin, end).
template <unsigned bytes>
FST_FN bool load_vector(const uint8_t *from, const uint8_t *begin, const uint8_t *end, Vector<bytes> *out) {
    if constexpr (bytes & (bytes - 1)) return load_words(from, begin, end, out);
    else return load_pair(from, begin, end, out);
}

// The i-th element of a vector; i is known when it is compiled.
template <unsigned element, unsigned bytes> FST_FN uint64_t get(const Vector<bytes> &v, unsigned i) {
    if constexpr (element == 8) return static_cast<uint64_t>(v.word[2 * i + 1]) << 32 | v.word[2 * i];
    if constexpr (element == 4) return v.word[i];
    constexpr unsigned each = 4 / (element < 4 ? element : 4);
    return v.word[i / each] >> (i % each * 8 * element) & ((1ull << (8 * element % 64)) - 1);
}

// The i-th code of a vector of codes of `bits` bits.
template <unsigned bits, unsigned bytes> FST_FN uint64_t get_code(const Vector<bytes> &v, unsigned i) {
    if constexpr (bits % 8 == 0) {
        return get<bits / 8>(v, i);
    } else {
        const unsigned at = i * bits / 32, shift = i * bits % 32;
        uint32_t code = v.word[at] >> shift;
        if (shift + bits > 32) code |= v.word[(at + 1) % Vector<bytes>::words] << (32 - shift);
        return code & ((1u << bits) - 1);
    }
}

// Sets the i-th element of a vector that was all zero.
template <unsigned element, unsigned bytes> FST_FN void put(Vector<bytes> *v, unsigned i, uint64_t code) {
    if constexpr (element == 8) {
        v->word[2 * i] = static_cast<uint32_t>(code);
        v->word[2 * i + 1] = static_cast<uint32_t>(code >> 32);
    } else {
        constexpr unsigned each = 4 / element;
        v->word[i / each] |= static_cast<uint32_t>(code) << (i % each * 8 * element);
    }
}

// The bytes from offset `at` on, a multiple of `size`, as a vector of that size.
template <unsigned size, unsigned bytes> FST_FN Vector<size> piece_at(const Vector<bytes> &v, unsigned at) {
    uint64_t eight = v.word[0];
    if constexpr (bytes >= 8) eight |= static_cast<uint64_t>(v.word[1]) << 32;
    if constexpr (bytes == 16) eight = at & 8 ? static_cast<uint64_t>(v.word[3]) << 32 | v.word[2] : eight;
    Vector<size> piece;
    if constexpr (size < 8) eight >>= at % 8 * 8;
    else piece.word[1] = static_cast<uint32_t>(eight >> 32);
    piece.word[0] = static_cast<uint32_t>(eight);
    return piece;
}

template <unsigned size, unsigned bytes>
FST_FN void store_piece(uint8_t *to, const Vector<bytes> &v, unsigned at) {
    store_aligned(to + at, piece_at<size>(v, at));
}

template <unsigned size, unsigned unit, unsigned bytes>
FST_FN void store_head(uint8_t *to, const Vector<bytes> &v, unsigned *at, unsigned end) {
    if constexpr (unit < bytes) {
        if constexpr (size > unit) store_head<size / 2, unit>(to, v, at, end);
        if ((*at & size) && *at + size <= end) store_piece<size>(to, v, *at), *at += size;
    }
}

template <unsigned size, unsigned unit, unsigned bytes>
FST_FN void store_tail(uint8_t *to, const Vector<bytes> &v, unsigned *at, unsigned end) {
    if constexpr (unit < bytes) {
        if (*at + size <= end) store_piece<size>(to, v, *at), *at += size;
        if constexpr (size > unit) store_tail<size / 2, unit>(to, v, at, end);
    }
}

// Bytes [at, end) of a vector, whole elements of `unit` bytes, into the aligned vector at `to`: by ever larger
// pieces, then by ever smaller ones.
template <unsigned unit, unsigned bytes>
FST_FN void store_part(uint8_t *to, const Vector<bytes> &v, unsigned at, unsigned end) {
    store_head<bytes / 2, unit>(to, v, &at, end);
    store_tail<bytes / 2, unit>(to, v, &at, end);
}

#endif
} // namespace
#endif
