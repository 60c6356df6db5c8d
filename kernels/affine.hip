// What scaled.hip does not do with 8-bit codes: integers with zero points, integers over 127 (bitsandbytes), floats that
// are divided by their scales. A file of its own, as nvfp4.hip is.
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "nvidia.h"
#include "product.h"
#include "scales.h"

namespace {

template <int Src, int Dst> struct Affine {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned dst_size = Dst == FST_T_F32 ? 4 : 2;
    static constexpr uint64_t width = by_element ? 1u << 16 : 16 / dst_size;

    uint64_t src, dst, scales, zeros, first, count;
    Divisor cols, block_rows, block_cols;
    uint64_t grid_cols;
    int scale_dtype;
    uint32_t factor; // 0: none

    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(dst / dst_size % width);
    }
    FST_INLINE uint64_t blocks() const {
        return ((count + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint64_t position = (block * threads + thread) * width, before = skew();
        if (position >= count + before) return;
        uint64_t begin = position > before ? position - before : 0;
        const uint64_t end = position + width - before < count ? position + width - before : count;
        uint64_t row = cols.divide(first + begin), col = first + begin - row * cols.value;
        while (begin < end) { // stretches under one scale: almost always one
            const uint64_t across = grid_cols == 1 ? 0 : block_cols.divide(col);
            const uint64_t stop = (across + 1) * block_cols.value;
            uint64_t n = (stop < cols.value ? stop : cols.value) - col;
            if (n > end - begin) n = end - begin;
            under(begin, n, block_rows.divide(row) * grid_cols + across);
            begin += n, col += n;
            if (col == cols.value) row++, col = 0;
        }
    }

  private:
    struct Cell {
        uint32_t scale;
        int32_t zero;
    };

    FST_INLINE typename word_of<dst_size>::type result(uint32_t code, const Cell &cell) const {
        uint32_t bits;
        if constexpr (Src == FST_T_I8) {
            const int32_t q = static_cast<int8_t>(code) - cell.zero;
            bits = multiply(fst_bits_of_float32(static_cast<float>(q)), cell.scale);
            if (factor) bits = multiply(bits, factor);
        } else {
            bits = divide(decode<Src>(code), cell.scale);
        }
        return static_cast<typename word_of<dst_size>::type>(encode<Dst>(bits));
    }

#ifndef FST_BY_ELEMENT
    FST_INLINE void results(const Vector<width> &in, const Cell &cell, Vector<16> *out) const {
#if FST_PACKED
        if (Src == FST_T_I8 && (cell.scale & 0x7F800000) != 0x7F800000) { // of finite scales there is no NaN
            uint32_t x[width];
            FST_UNROLLED
            for (unsigned i = 0; i < width; i++) { // 2^23 + 128 + the code, as F32 bits, less what is not the difference
                const uint32_t biased = permute(in.word[i / 4] ^ four(0x80), 0x4B000000, 0x7440 + i % 4);
                const float difference = fst_float_of_bits32(biased) - static_cast<float>(8388736 + cell.zero);
                x[i] = fst_bits_of_float32(difference * fst_float_of_bits32(cell.scale));
            }
            FST_UNROLLED
            for (unsigned i = 0; i < width; i++)
                if (factor) x[i] = fst_bits_of_float32(fst_float_of_bits32(x[i]) * fst_float_of_bits32(factor));
            return narrow_numbers<Dst>(x, out->word);
        }
#endif
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            put<dst_size>(out, i, result(static_cast<uint32_t>(get<1>(in, i)), cell));
    }
#endif

    FST_INLINE void under(uint64_t begin, uint64_t n, uint64_t index) const {
        const Cell cell = {load_scale(scales, scale_dtype, index),
                           Src == FST_T_I8 && zeros ? global<const int8_t>(zeros)[index] : 0};
        const uint8_t *__restrict from = global<const uint8_t>(src) + begin;
        typename word_of<dst_size>::type *__restrict to =
            global<typename word_of<dst_size>::type>(dst) + begin;
#ifndef FST_BY_ELEMENT
        Vector<width> in;
        const uint8_t *all = global<const uint8_t>(src);
        if (n == width && load_vector(from, all, all + count, &in)) {
            Vector<16> out = {};
            results(in, cell, &out);
            store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
            return;
        }
#endif
        FST_ROLLED
        for (uint64_t i = 0; i < n; i++) to[i] = result(from[i], cell);
    }
};

template <int Src, int Dst>
int run_affine(fst_queue stream, const fst_scaled_args *args, uint64_t block_rows, uint64_t block_cols) {
    const Affine<Src, Dst> body = {reinterpret_cast<uint64_t>(args->src),
                                   reinterpret_cast<uint64_t>(args->dst),
                                   reinterpret_cast<uint64_t>(args->scales),
                                   reinterpret_cast<uint64_t>(args->zeros),
                                   args->first,
                                   args->count,
                                   divisor(args->cols),
                                   divisor(block_rows),
                                   divisor(block_cols),
                                   (args->cols - 1) / block_cols + 1,
                                   args->scale_dtype,
                                   args->flags & FST_K_OVER_127 ? over_127 : 0};
    return launch(stream, body, body.blocks());
}

typedef int affine_fn(fst_queue, const fst_scaled_args *, uint64_t, uint64_t);

template <int Src> affine_fn *find_to(int dst) {
    switch (dst) {
    case FST_T_F32: return run_affine<Src, FST_T_F32>;
    case FST_T_F16: return run_affine<Src, FST_T_F16>;
    case FST_T_BF16: return run_affine<Src, FST_T_BF16>;
    default: return nullptr;
    }
}

affine_fn *find(const fst_scaled_args *args) {
    const bool divides = args->flags & FST_K_DIVIDE;
    if (divides == (args->src_dtype == FST_T_I8)) return nullptr;
    if (divides && (args->zeros || args->flags & FST_K_OVER_127)) return nullptr;
    switch (args->src_dtype) {
    case FST_T_F8_E4M3: return find_to<FST_T_F8_E4M3>(args->dst_dtype);
    case FST_T_F8_E5M2: return find_to<FST_T_F8_E5M2>(args->dst_dtype);
    case FST_T_F8_E4M3FNUZ: return find_to<FST_T_F8_E4M3FNUZ>(args->dst_dtype);
    case FST_T_F8_E5M2FNUZ: return find_to<FST_T_F8_E5M2FNUZ>(args->dst_dtype);
    case FST_T_I8: return find_to<FST_T_I8>(args->dst_dtype);
    default: return nullptr;
    }
}

} // namespace

extern "C" int FST_SYMBOL(fst_affine)(fst_queue stream, const fst_scaled_args *args);
extern "C" int FST_SYMBOL(fst_affine)(fst_queue stream, const fst_scaled_args *args) {
    affine_fn *const launcher = find(args);
    uint64_t block_rows = 0, block_cols = 0;
    const int code = launcher ? check_scaled(args, &block_rows, &block_cols) : FST_K_NO_KERNEL;
    return code || args->count == 0 ? code : launcher(stream, args, block_rows, block_cols);
}
