// 8-bit codes times a scale for each column: as many scales as codes in a row, one beside the other like these.
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "nvidia.h"
#include "product.h"
#include "scales.h"

namespace {

// Rows may end inside of a vector.
template <int Src, int Dst> struct Columns {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned dst_size = Dst == FST_T_F32 ? 4 : 2;
    static constexpr uint64_t width = by_element ? 1u << 16 : 16 / dst_size;

    uint64_t src, dst, scales, count, first_col;
    Divisor cols;
    int scale_dtype;

    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(dst / dst_size % width);
    }
    FST_INLINE uint64_t blocks() const {
        return ((count + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint64_t position = (block * threads + thread) * width, before = skew();
        if (position >= count + before) return;
        const uint64_t begin = position > before ? position - before : 0, at = first_col + begin;
        const uint64_t end = position + width - before < count ? position + width - before : count;
        range(begin, end, at - cols.divide(at) * cols.value);
    }

    // At most a vector, which begins in this column.
    FST_INLINE void range(uint64_t begin, uint64_t end, uint64_t col) const {
        const uint8_t *__restrict from = global<const uint8_t>(src);
        typename word_of<dst_size>::type *__restrict to = global<typename word_of<dst_size>::type>(dst);
#ifndef FST_BY_ELEMENT
        Vector<width> in;
        if (end - begin == width && cols.value >= width && load_vector(from + begin, from, from + count, &in)) {
            uint32_t by[width];
            load_scales(col, by);
            return vector(begin, in, by);
        }
#endif
        while (begin < end) { // what there is of a row
            const uint64_t left = cols.value - col, stop = begin + left < end ? begin + left : end;
            FST_ROLLED
            for (; begin < stop; begin++, col++) to[begin] = result(from[begin], load_scale(scales, scale_dtype, col));
            col = 0;
        }
    }

#ifndef FST_BY_ELEMENT
    // Those of columns from `col` on, and from the first again.
    FST_INLINE void load_scales(uint64_t col, uint32_t (&by)[width]) const {
        const uint8_t *from = global<const uint8_t>(scales) + col * 4;
        if (scale_dtype == FST_T_F32 && col + width <= cols.value && reinterpret_cast<uint64_t>(from) % 16 == 0) {
            FST_UNROLLED
            for (unsigned i = 0; i < width; i += 4) {
                const Vector<16> four = load_aligned<16>(from + i * 4);
                by[i] = four.word[0], by[i + 1] = four.word[1], by[i + 2] = four.word[2], by[i + 3] = four.word[3];
            }
            return;
        }
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            by[i] = load_scale(scales, scale_dtype, col + i < cols.value ? col + i : col + i - cols.value);
    }

    FST_INLINE void vector(uint64_t begin, const Vector<width> &in, const uint32_t (&by)[width]) const {
#if FST_PACKED
        if (are_plain(by)) return plain_vector(begin, in, by);
#endif
        Vector<16> out = {};
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            put<dst_size>(&out, i, result(static_cast<uint32_t>(get<1>(in, i)), by[i]));
        store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
    }
#if FST_PACKED
    static FST_INLINE bool are_plain(const uint32_t (&by)[width]) {
        bool plain = true;
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++) plain &= is_plain<Src>(by[i]);
        return plain;
    }

    FST_INLINE void plain_vector(uint64_t begin, const Vector<width> &in, const uint32_t (&by)[width]) const {
        Vector<16> out = {};
        FST_UNROLLED
        for (unsigned i = 0; i < width; i += 4)
            scale4<Src, Dst>(in.word[i / 4], &by[i], &out.word[i * dst_size / 4]);
        store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
    }
#endif
#endif

  private:
    static FST_INLINE typename word_of<dst_size>::type result(uint32_t code, uint32_t scale) {
        return static_cast<typename word_of<dst_size>::type>(encode<Dst>(multiply(decode<Src>(code), scale)));
    }
};

#ifndef FST_BY_ELEMENT
// The same on NVIDIA, where rows are whole vectors, aligned on both sides: a thread makes one of each of several rows,
// under the same scales. (Loaded for each vector, scales are more than what comes from memory: L2 cannot give so much.)
template <int Src, int Dst> struct ColumnRows {
    using All = Columns<Src, Dst>;
    static constexpr unsigned threads = 256, rows = 4;
    static constexpr uint64_t width = All::width;

    All all;
    Divisor31 across; // vectors of a row
    uint32_t vectors; // of the first of each `rows` rows: one a thread

    FST_INLINE uint64_t blocks() const { return (vectors + threads - 1) / threads; }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint32_t i = static_cast<uint32_t>(block) * threads + thread;
        if (i >= vectors) return;
        const uint32_t down = across.divide(i), col = (i - down * across.value) * static_cast<uint32_t>(width);
        const uint64_t pitch = all.cols.value, at = down * (rows * pitch) + col, end = all.first_col + all.count;
#if FST_PACKED
        if (at >= all.first_col && at + (rows - 1) * pitch + width <= end) {
            const uint64_t begin = at - all.first_col;
            Vector<width> in[rows];
            FST_UNROLLED
            for (unsigned k = 0; k < rows; k++)
                in[k] = load_aligned<width>(global<const uint8_t>(all.src) + begin + k * pitch);
            uint32_t by[width];
            all.load_scales(col, by);
            if (All::are_plain(by)) {
                FST_UNROLLED
                for (unsigned k = 0; k < rows; k++) all.plain_vector(begin + k * pitch, in[k], by);
                return;
            }
        }
#endif
        FST_ROLLED
        for (unsigned k = 0; k < rows; k++) { // what there is of them
            const uint64_t low = at + k * pitch, from = low > all.first_col ? low : all.first_col;
            const uint64_t to = low + width < end ? low + width : end;
            if (from < to) all.range(from - all.first_col, to - all.first_col, col + (from - low));
        }
    }
};
#endif

template <int Src, int Dst> int run_columns(fst_queue stream, const fst_scaled_args *args) {
    const Columns<Src, Dst> body = {reinterpret_cast<uint64_t>(args->src),
                                    reinterpret_cast<uint64_t>(args->dst),
                                    reinterpret_cast<uint64_t>(args->scales),
                                    args->count,
                                    args->first % args->cols,
                                    divisor(args->cols),
                                    args->scale_dtype};
#if defined(__CUDACC__) || defined(FST_NVIDIA_SHAPE)
    using Rows = ColumnRows<Src, Dst>;
    const uint64_t width = body.width, across = args->cols / width;
    const uint64_t high = (body.first_col + args->count + Rows::rows * args->cols - 1) / (Rows::rows * args->cols);
    const bool aligned = (args->cols | (body.skew() - body.first_col) | (body.src - body.first_col)) % width == 0;
    if (aligned && args->count / args->cols >= Rows::rows && high <= 0x40000000 / across) {
        const Rows several = {body, divisor31(across), static_cast<uint32_t>(across * high)};
        return launch(stream, several, several.blocks());
    }
#endif
    return launch(stream, body, body.blocks());
}

template <int Src> int run_columns_to(fst_queue stream, const fst_scaled_args *args) {
    switch (args->dst_dtype) {
    case FST_T_F32: return run_columns<Src, FST_T_F32>(stream, args);
    case FST_T_F16: return run_columns<Src, FST_T_F16>(stream, args);
    default: return run_columns<Src, FST_T_BF16>(stream, args);
    }
}

} // namespace

extern "C" int FST_SYMBOL(fst_columns)(fst_queue stream, const fst_scaled_args *args);
extern "C" int FST_SYMBOL(fst_columns)(fst_queue stream, const fst_scaled_args *args) {
    switch (args->src_dtype) {
    case FST_T_F8_E4M3: return run_columns_to<FST_T_F8_E4M3>(stream, args);
    case FST_T_F8_E5M2: return run_columns_to<FST_T_F8_E5M2>(stream, args);
    case FST_T_F8_E4M3FNUZ: return run_columns_to<FST_T_F8_E4M3FNUZ>(stream, args);
    case FST_T_F8_E5M2FNUZ: return run_columns_to<FST_T_F8_E5M2FNUZ>(stream, args);
    default: return run_columns_to<FST_T_I8>(stream, args);
    }
}
