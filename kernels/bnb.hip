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
    static constexpr uint64_t width = by_element ? 1u << 16 : 16 / dst_size;

    uint64_t src, dst, map, absmax, nested, nested_map, first, count;
    Divisor block, nested_block;
    uint32_t offset;
    unsigned fp4; // which table, where there is no map
    bool aligned; // all vectors of codes

    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(dst / dst_size % width);
    }
    FST_INLINE uint64_t blocks() const {
        return ((count + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t where, unsigned thread) const {
        const uint64_t position = (where * threads + thread) * width, before = skew();
        if (position >= count + before) return;
        const uint64_t begin = position > before ? position - before : 0;
        const uint64_t end = position + width - before < count ? position + width - before : count;
#ifndef FST_BY_ELEMENT
        if (end - begin == width && vector(begin)) return;
#endif
        elements(begin, end);
    }

  private:
    FST_INLINE uint32_t scale_of(uint64_t cell) const {
        if (!nested) return global<const uint32_t>(absmax)[cell];
        const uint32_t value = global<const uint32_t>(nested_map)[global<const uint8_t>(absmax)[cell]];
        const uint32_t by = global<const uint32_t>(nested)[nested_block.divide(cell)];
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
    // Under one scale or two. False where codes begin half a byte off, or a run is shorter than a vector.
    FST_INLINE bool vector(uint64_t begin) const {
        const uint8_t *from = global<const uint8_t>(src);
        Vector<width / 2> in;
        if (begin % 2 || block.value < width) return false;
        if (aligned) in = load_aligned<width / 2>(from + begin / 2);
        else if (!load_vector(from + begin / 2, from, from + (count + 1) / 2, &in)) return false;
        const uint64_t cell = block.divide(first + begin), left = (cell + 1) * block.value - first - begin;
        const uint32_t scale = scale_of(cell), scale2 = left < width ? scale_of(cell + 1) : scale;
        Vector<16> out = {};
#if FST_PACKED
        uint32_t x[width];
        bool has_nan = false;
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++) {
            const float product = fst_float_of_bits32(value(in.word[0] >> (4 * (i ^ 1)) & 15)) *
                                  fst_float_of_bits32(i < left ? scale : scale2);
            x[i] = fst_bits_of_float32(product);
            has_nan |= product != product;
        }
        if (!has_nan) {
            narrow_numbers<Dst>(x, out.word);
            store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
            return true;
        }
#endif
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            put<dst_size>(&out, i, result(in.word[0] >> (4 * (i ^ 1)) & 15, i < left ? scale : scale2));
        store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
        return true;
    }
#endif
};

template <int Dst> int run_bnb4(fst_queue stream, const fst_bnb4_args *args) {
    Bnb4<Dst> body = {reinterpret_cast<uint64_t>(args->src),
                      reinterpret_cast<uint64_t>(args->dst),
                      reinterpret_cast<uint64_t>(args->map),
                      reinterpret_cast<uint64_t>(args->absmax),
                      reinterpret_cast<uint64_t>(args->nested),
                      reinterpret_cast<uint64_t>(args->nested_map),
                      args->first,
                      args->count,
                      divisor(args->block),
                      divisor(args->nested ? args->nested_block : 1),
                      fst_bits_of_float32(args->offset),
                      args->fp4 != 0,
                      false};
    body.aligned = body.skew() % 2 == 0 && (body.src - body.skew() / 2) % (body.width / 2) == 0;
    return launch(stream, body, body.blocks());
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
