// bitsandbytes' 4 bits: codes of a table, times a scale for each run of elements, whatever rows it crosses.
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "nvidia.h"
#include "product.h"
#include "values.h"

namespace {

template <int Dst> struct Bnb4 {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned dst_size = Dst == FST_T_F32 ? 4 : 2;
    static constexpr uint32_t width = by_element ? 1u << 16 : 16 / dst_size;

    uint64_t src, dst, map, absmax, nested, nested_map;
    uint64_t first, first_cell; // the first element, from its run's own on, and that run, from its nested scale's own on
    uint32_t count;
    Divisor block, nested_block;
    Divisor31 block31, nested_block31;
    uint32_t offset;
    unsigned fp4;   // which table, where there is no map
    bool vectors;   // there are any: codes begin with a byte, runs are no shorter than they, and counted in 31 bits
    bool aligned;   // all vectors of codes

    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(dst / dst_size % width);
    }
    FST_INLINE uint64_t blocks() const {
        return ((count + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t where, unsigned thread) const {
        const uint32_t position = (static_cast<uint32_t>(where) * threads + thread) * width, before = skew();
        if (position >= count + before) return;
        const uint32_t begin = position > before ? position - before : 0;
        const uint32_t end = position + width - before < count ? position + width - before : count;
#ifndef FST_BY_ELEMENT
        if (vectors && end - begin == width && vector(begin)) return;
#endif
        elements(begin, end);
    }

  private:
    FST_INLINE uint32_t scale_of(uint64_t cell) const {
        if (!nested) return global<const uint32_t>(absmax)[cell];
        const uint32_t value = global<const uint32_t>(nested_map)[global<const uint8_t>(absmax)[cell]];
        const uint32_t by = global<const uint32_t>(nested)[nested_block.divide(first_cell + cell)];
        return add_rounded(multiply(value, by), offset);
    }

    FST_INLINE uint32_t value(uint32_t code) const { return value_of(map, fp4, code); }

    FST_INLINE typename word_of<dst_size>::type result(uint32_t code, uint32_t scale) const {
        return static_cast<typename word_of<dst_size>::type>(encode<Dst>(multiply(value(code), scale)));
    }

    FST_INLINE void elements(uint64_t begin, uint64_t end) const {
        const uint8_t *__restrict from = global<const uint8_t>(src);
        typename word_of<dst_size>::type *__restrict to = global<typename word_of<dst_size>::type>(dst);
        while (begin < end) {
            const uint64_t cell = block.divide(first + begin), stop = (cell + 1) * block.value - first;
            const uint64_t until = stop < end ? stop : end;
            const uint32_t scale = scale_of(cell);
#ifdef FST_BY_ELEMENT
            typename word_of<dst_size>::type table[16]; // of the run's results
            for (unsigned c = 0; c < 16; c++) table[c] = result(c, scale);
            for (uint64_t i = begin; i < until; i++) to[i] = table[from[i / 2] >> (4 - i % 2 * 4) & 15];
#else
            FST_ROLLED
            for (uint64_t i = begin; i < until; i++)
                to[i] = result(from[i / 2] >> (4 - i % 2 * 4) & 15, scale);
#endif
            begin = until;
        }
    }

#ifndef FST_BY_ELEMENT
    // Under one scale or two. False, with nothing done, where the codes cannot be loaded; on NVIDIA also where there is a NaN.
    FST_INLINE bool vector(uint32_t begin) const {
        const uint8_t *from = global<const uint8_t>(src);
        Vector<width / 2> in;
        if (aligned) in = load_aligned<width / 2>(from + begin / 2);
        else if (!load_vector(from + begin / 2, from, from + (count + 1) / 2, &in)) return false;
        const uint32_t at = static_cast<uint32_t>(first) + begin, cell = block31.divide(at);
        const uint32_t left = (cell + 1) * block31.value - at;
        Vector<16> out = {};
        if (!(left < width ? products(in.word[0], cell, cell + 1, left, &out)
                           : products(in.word[0], cell, cell, width, &out)))
            return false;
        store_aligned(global<uint8_t>(dst) + static_cast<uint64_t>(begin) * dst_size, out);
        return true;
    }

    // The first `split` codes under one scale, the others under another.
    FST_INLINE bool products(uint32_t codes, uint32_t cell, uint32_t cell2, uint32_t split, Vector<16> *out) const {
#if FST_PACKED
        const float by = number_of(cell), by2 = split == width ? by : number_of(cell2);
        uint32_t x[width];
        bool has_nan = false;
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++) {
            const float factor = fst_float_of_bits32(value(codes >> (4 * (i ^ 1)) & 15));
            const float product = factor * (i < split ? by : by2);
            x[i] = fst_bits_of_float32(product);
            has_nan |= product != product;
        }
        narrow_numbers<Dst>(x, out->word);
        return !has_nan;
#else
        const uint32_t scale = scale_of(cell), scale2 = split == width ? scale : scale_of(cell2);
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            put<dst_size>(out, i, result(codes >> (4 * (i ^ 1)) & 15, i < split ? scale : scale2));
        return true;
#endif
    }
#if FST_PACKED
    // The scale of a run, or some NaN.
    FST_INLINE float number_of(uint32_t cell) const {
        if (!nested) return global<const float>(absmax)[cell];
        const float number = global<const float>(nested_map)[global<const uint8_t>(absmax)[cell]];
        const uint32_t at = nested_block31.divide(static_cast<uint32_t>(first_cell) + cell);
        return number * global<const float>(nested)[at] + fst_float_of_bits32(offset);
    }
#endif
#endif
};

// In pieces whose elements are counted in 31 bits.
template <int Dst> int run_bnb4(fst_queue stream, const fst_bnb4_args *args) {
    using Body = Bnb4<Dst>;
    const uint64_t nested_block = args->nested ? args->nested_block : 1;
    const bool small = args->block < limit31 && nested_block < limit31;
    int code = FST_K_OK;
    for (uint64_t done = 0; done < args->count && code == FST_K_OK; done += fst_launch31) {
        const uint64_t first = args->first + done, cell = first / args->block, above = cell / nested_block;
        Body body = {reinterpret_cast<uint64_t>(args->src) + done / 2,
                     reinterpret_cast<uint64_t>(args->dst) + done * Body::dst_size,
                     reinterpret_cast<uint64_t>(args->map),
                     reinterpret_cast<uint64_t>(args->absmax) + cell * (args->nested ? 1 : 4),
                     args->nested ? reinterpret_cast<uint64_t>(args->nested) + above * 4 : 0,
                     reinterpret_cast<uint64_t>(args->nested_map),
                     first % args->block,
                     cell % nested_block,
                     static_cast<uint32_t>(args->count - done < fst_launch31 ? args->count - done : fst_launch31),
                     divisor(args->block),
                     divisor(nested_block),
                     divisor31(small ? args->block : 1),
                     divisor31(small ? nested_block : 1),
                     fst_bits_of_float32(args->offset),
                     args->fp4 != 0,
                     false,
                     false};
        body.vectors = small && args->block >= body.width && body.skew() % 2 == 0;
        body.aligned = (body.src - body.skew() / 2) % (body.width / 2) == 0;
        code = launch(stream, body, body.blocks());
    }
    return code;
}

} // namespace

extern "C" int FST_SYMBOL(fst_bnb4)(fst_queue stream, const fst_bnb4_args *args) {
    uint64_t end;
    if (args->dst_dtype != FST_T_F32 && args->dst_dtype != FST_T_F16 && args->dst_dtype != FST_T_BF16)
        return FST_K_NO_KERNEL;
    if (args->elements > UINT64_MAX / 16 || __builtin_add_overflow(args->first, args->count, &end) ||
        end > args->elements || args->first % 2 || (args->count % 2 && end != args->elements))
        return FST_K_SIZE;
    if (args->block == 0 || (args->nested && args->nested_block == 0)) return FST_K_SCALE;
    if (args->count == 0) return FST_K_OK;
    if (!args->src || !args->dst || !args->absmax || (args->nested && !args->nested_map))
        return FST_K_NULL;
    const uint64_t words = reinterpret_cast<uint64_t>(args->map) | reinterpret_cast<uint64_t>(args->nested) |
                           reinterpret_cast<uint64_t>(args->nested_map) |
                           (args->nested ? 0 : reinterpret_cast<uint64_t>(args->absmax));
    if (reinterpret_cast<uint64_t>(args->dst) % (args->dst_dtype == FST_T_F32 ? 4 : 2) || words % 4)
        return FST_K_ALIGN;
    if (args->dst_dtype == FST_T_F32) return run_bnb4<FST_T_F32>(stream, args);
    if (args->dst_dtype == FST_T_F16) return run_bnb4<FST_T_F16>(stream, args);
    return run_bnb4<FST_T_BF16>(stream, args);
}
