// A contiguous range of elements, cast or copied, cut into slots: what casts, batches and rows are made of.
#ifndef FST_RANGE_H
#define FST_RANGE_H

#include "nvidia.h"
#include "x86.h"

namespace {

constexpr int bytes_type = FST_T_U8; // stands for both types of a copy

// Bits of an element.
template <int type> struct bits_of;
#define X(name, bits, ...) \
    template <> struct bits_of<FST_T_##name> { static constexpr unsigned value = bits; };
FST_DTYPE_LIST(X)
#undef X

// Bytes of codes that fill whole bytes.
template <unsigned bits> FST_FN uint64_t bytes_of(uint64_t count) {
    return bits % 8 ? count / 8 * bits + count % 8 * bits / 8 : count * (bits / 8);
}

// fst_casts for types that differ, where templates are chosen.
FST_FN constexpr bool is_cast(int src, int dst) {
    const bool narrow = is_part_byte(src) || src == FST_T_F8_E8M0;
    return src != dst && (!narrow || is_half_float(dst) || dst == FST_T_F32);
}

template <int Src, int Dst> FST_FN uint64_t convert(uint64_t code, uint64_t limit) {
    if constexpr (Src == Dst) return code;
    else return fst_convert(code, fst_float_of(Src), fst_float_of(Dst), limit);
}

template <int Src, int Dst> uint64_t limit_of(unsigned flags) {
    if constexpr (Src == Dst) return 0;
    else return fst_limit(fst_float_of(Src), fst_float_of(Dst), !(flags & FST_K_NON_SATURATING));
}

#ifndef FST_BY_ELEMENT
#if FST_PACKED
// Four codes of a vector, from the i-th on, one after the other in words.
template <unsigned bits, unsigned bytes>
FST_FN void get_four(const Vector<bytes> &v, unsigned i, uint32_t *out) {
    const unsigned at = i * bits / 32, shift = i * bits % 32;
    FST_UNROLLED
    for (unsigned k = 0; k < (bits + 7) / 8; k++) out[k] = v.word[at + k] >> shift;
    if constexpr (bits == 6)
        if (shift > 8) out[0] |= v.word[(at + 1) % Vector<bytes>::words] << (32 - shift);
}
#endif

template <int Src, int Dst, unsigned width>
FST_FN Vector<width * bits_of<Dst>::value / 8> convert_vector(
    const Vector<width * bits_of<Src>::value / 8> &in, uint64_t limit) {
    constexpr unsigned src_bits = bits_of<Src>::value, dst_bits = bits_of<Dst>::value;
    Vector<width *dst_bits / 8> out = {};
    if constexpr (Src == Dst) {
        out = in;
#if FST_PACKED
    } else if constexpr (has_cast4(Src, Dst) && width % 4 == 0) {
        const bool saturate = limit == fst_limit(fst_float_of(Src), fst_float_of(Dst), 1);
        FST_UNROLLED
        for (unsigned i = 0; i < width; i += 4) {
            uint32_t codes[4];
            get_four<src_bits>(in, i, codes);
            cast4<Src, Dst>(codes, &out.word[i * dst_bits / 32], saturate);
        }
#endif
    } else {
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            put<dst_bits / 8>(&out, i, convert<Src, Dst>(get_code<src_bits>(in, i), limit));
    }
    return out;
}
#endif

// Slots start where the destination is aligned to a whole vector: 16 bytes on the wider side, so that neighbouring
// threads touch neighbouring 16 bytes there.
template <int Src, int Dst> struct Range {
    static constexpr unsigned src_bits = bits_of<Src>::value, dst_size = bits_of<Dst>::value / 8;
    static constexpr unsigned wider = src_bits / 8 > dst_size ? src_bits / 8 : dst_size;
    static constexpr uint64_t width = by_element ? 1u << 20 : 16 / wider;

    const uint8_t *src;
    uint8_t *dst;
    uint64_t count;
    uint64_t limit;
    const uint8_t *readable, *readable_end; // nothing outside is read

    // Elements of the first slot that lie before dst.
    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(reinterpret_cast<uintptr_t>(dst) / dst_size % width);
    }
    FST_INLINE uint64_t slots() const { return count / width + (count % width + skew() + width - 1) / width; }

    FST_INLINE void slot(uint64_t index) const {
        const uint64_t before = skew(), position = index * width;
        const uint64_t begin = position > before ? position - before : 0;
        const uint64_t rest = position + width - before;
        const uint64_t end = rest < count ? rest : count;
#ifndef FST_BY_ELEMENT
        if (end - begin == width && vector(begin)) return;
#endif
        elements(begin, end);
    }

    // The same where much may be read around the range, as in a row of a matrix: what is ragged is converted with
    // what is beside it, and stored in pieces.
    FST_INLINE void slot_of_many(uint64_t index) const {
#ifndef FST_BY_ELEMENT
        const uint64_t before = skew(), position = index * width;
        if (src_bits % 8 == 0) {
            Vector<width * src_bits / 8> in;
            const int64_t first = static_cast<int64_t>(position) - static_cast<int64_t>(before);
            const uint8_t *from = src + first * static_cast<int>(src_bits / 8);
            uint8_t *to = dst + first * static_cast<int>(dst_size);
            const uint64_t rest = count + before - position;
            const unsigned begin = position < before ? static_cast<unsigned>(before - position) : 0;
            const unsigned end = static_cast<unsigned>(rest < width ? rest : width);
            if (end - begin != width) expect_part(to + begin * dst_size);
            if (from < readable || from + sizeof in > readable_end ||
                !load_vector(from, readable, readable_end, &in))
                return slot(index);
            const Vector<width *dst_size> out = convert_vector<Src, Dst, width>(in, limit);
            if (end - begin == width) store_aligned(to, out);
            else store_part<dst_size>(to, out, begin * dst_size, end * dst_size);
            return;
        }
#endif
        slot(index);
    }

    // By vectors, only the ragged ends; by element (on the CPU) everything: this is the loop that is vectorised.
    FST_INLINE void elements(uint64_t begin, uint64_t end) const {
        const uint8_t *__restrict from = src;
        uint8_t *__restrict to = dst;
        if constexpr (by_element && Src == Dst) {
            memcpy(to + begin, from + begin, end - begin);
        } else if constexpr (by_element && src_bits < 8) {
            groups(begin, end);
        } else {
            if constexpr (by_element && src_bits >= 8)
                begin +=
                    cast_vectors<Src, Dst>(from + begin * (src_bits / 8), to + begin * dst_size, end - begin);
            FST_ROLLED
            for (uint64_t i = begin; i < end; i++) store(to, i, load_code<src_bits>(from, i));
        }
    }

  private:
    FST_INLINE void store(uint8_t *to, uint64_t i, uint64_t code) const {
        store_element<dst_size>(
            to + i * dst_size, static_cast<typename word_of<dst_size>::type>(convert<Src, Dst>(code, limit)));
    }

    // Codes that fill whole bytes together.
    FST_INLINE void groups(uint64_t begin, uint64_t end) const {
        constexpr unsigned each = src_bits == 4 ? 2 : 4, bytes = each * src_bits / 8;
        const uint8_t *__restrict from = src + begin / each * bytes;
        uint8_t *__restrict to = dst + begin * dst_size;
        for (uint64_t i = 0; i < (end - begin) / each; i++)
            for (unsigned k = 0; k < each; k++)
                store(to, i * each + k, load_code<src_bits>(from + i * bytes, k));
    }

#ifndef FST_BY_ELEMENT
    FST_INLINE bool vector(uint64_t begin) const {
        Vector<width * src_bits / 8> in;
        if (src_bits < 8 && begin * src_bits % 8)
            return false; // the destination is not aligned as its source is
        if (!load_vector(src + begin * src_bits / 8, readable, readable_end, &in)) return false;
        store_aligned(dst + begin * dst_size, convert_vector<Src, Dst, width>(in, limit));
        return true;
    }
#endif
};

} // namespace
#endif
