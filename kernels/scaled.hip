// Scaled conversions: 8-bit and 4-bit codes times scales. dst = round(RN32(f32(code) * f32(scale))).
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "nvidia.h"
#include "product.h"
#include "scales.h"

namespace {

template <int Src, int Dst> struct Scaled {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned src_bits = Src == FST_T_F4 ? 4 : 8, dst_size = Dst == FST_T_F32 ? 4 : 2;
    static constexpr uint32_t width = by_element ? 1u << 16 : 16 / dst_size;
#ifndef FST_BY_ELEMENT
    static constexpr unsigned in_bytes = width * src_bits / 8;
#endif

    // Where the first element is: its row and column, and its block's row and that block's own first row.
    struct Place {
        uint64_t row, col, down, top;
    };

    uint64_t src, dst, scales;
    uint32_t count;
    Place first;
    Divisor cols, block_rows, block_cols; // every kind as blocks: a row is 1 x cols, a tensor rows x cols
    Divisor31 cols31, block_rows31, block_cols31;
    uint64_t grid_cols;
    int scale_dtype;
    bool one;       // scale for everything
    bool small;     // rows, columns and elements are counted in 31 bits, from first.top and column 0 on
    bool straddles; // some vectors lie under several scales
    bool aligned;   // all vectors of codes

    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(dst / dst_size % width);
    }
    FST_INLINE uint64_t blocks() const {
        return ((count + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint32_t position = (static_cast<uint32_t>(block) * threads + thread) * width, before = skew();
        if (position >= count + before) return;
        const uint32_t begin = position > before ? position - before : 0;
        const uint32_t end = position + width - before < count ? position + width - before : count;
#ifndef FST_BY_ELEMENT
        // The codes are on their way while the place of their scale is computed.
        Vector<in_bytes> in = {};
        if (end - begin == width && load(begin, &in)) {
            if (one) return under_one(begin, in, 0);
            if (small && !straddles) return under_one(begin, in, spot_of(begin).cell);
            if (small && under_two(begin, in)) return;
        }
#endif
        if (one) return elements(begin, end, load_scale(scales, scale_dtype, 0));
        const uint64_t down = cols.divide(first.col + begin);
        segments(begin, end, first.row + down, first.col + begin - down * cols.value);
    }

  private:
    FST_INLINE uint32_t code(uint64_t i) const {
        const uint8_t *from = global<const uint8_t>(src);
        if constexpr (src_bits == 4) return from[i / 2] >> (i % 2 * 4) & 15;
        else return from[i];
    }

    // The scale at a place, and how many elements of its row are under it from there on.
    FST_INLINE uint32_t scale_at(uint64_t row, uint64_t col, uint64_t *left) const {
        const uint64_t cell = grid_cols == 1 ? 0 : block_cols.divide(col);
        const uint64_t stop = (cell + 1) * block_cols.value;
        *left = (stop < cols.value ? stop : cols.value) - col;
        return load_scale(scales, scale_dtype, block_rows.divide(row) * grid_cols + cell);
    }

#ifndef FST_BY_ELEMENT
    // The scale of an element, and where that is.
    struct Spot {
        uint32_t row, col, down, across; // from first.top, column 0 and the scale there on
        uint64_t cell;
    };
    FST_INLINE Spot spot_of(uint32_t i) const {
        const uint32_t at = static_cast<uint32_t>(first.col) + i;
        const uint32_t rows = cols31.divide(at), col = at - rows * cols31.value;
        const uint32_t row = static_cast<uint32_t>(first.row - first.top) + rows;
        const uint32_t down = block_rows31.divide(row), across = block_cols31.divide(col);
        return {row, col, down, across, (first.down + down) * grid_cols + across};
    }

    FST_INLINE void under_one(uint32_t begin, const Vector<in_bytes> &in, uint64_t cell) const {
        const uint32_t scale = load_scale(scales, scale_dtype, cell);
        vector(begin, in, scale, scale, width);
    }

    // Almost always a vector lies under one scale or two. Lanes of a warp differ in that: one path for both.
    FST_INLINE bool under_two(uint32_t begin, const Vector<in_bytes> &in) const {
        const Spot spot = spot_of(begin);
        const uint32_t stop = (spot.across + 1) * block_cols31.value;
        const bool inside = stop < cols31.value; // what follows is in the same row
        const uint32_t left = (inside ? stop : cols31.value) - spot.col;
        const uint32_t rest = inside ? cols31.value - stop : cols31.value;
        if (left + (rest < block_cols31.value ? rest : block_cols31.value) < width) return false;
        const bool two = left < width;
        // The next row may begin another row of blocks.
        const bool below = spot.row + 1 == (spot.down + 1) * block_rows31.value;
        const uint64_t line = (first.down + spot.down + below) * grid_cols;
        const uint32_t scale = load_scale(scales, scale_dtype, spot.cell);
        const uint32_t scale2 =
            load_scale(scales, scale_dtype, !two ? spot.cell : inside ? spot.cell + 1 : line);
        vector(begin, in, scale, scale2, two ? left : width);
        return true;
    }
#endif

    // Stretch by stretch under one scale.
    FST_INLINE void segments(uint64_t begin, uint64_t end, uint64_t row, uint64_t col) const {
        while (begin < end) {
            uint64_t n;
            const uint32_t scale = scale_at(row, col, &n);
            if (n > end - begin) n = end - begin;
            elements(begin, begin + n, scale);
            begin += n;
            col += n;
            if (col == cols.value) row++, col = 0;
        }
    }

    FST_INLINE void elements(uint64_t begin, uint64_t end, uint32_t scale) const {
        typename word_of<dst_size>::type *__restrict to = global<typename word_of<dst_size>::type>(dst);
        uint64_t i = begin;
#ifdef FST_BY_ELEMENT
        if constexpr (src_bits == 4) { // few codes: under one scale, a table of their results
            const uint8_t *from = global<const uint8_t>(src);
            typename word_of<dst_size>::type table[16];
            for (unsigned c = 0; c < 16; c++) table[c] = result(c, scale);
            if (i % 2) to[i] = table[from[i / 2] >> 4], i++;
            for (; i + 1 < end; i += 2) {
                const uint8_t both = from[i / 2];
                to[i] = table[both & 15];
                to[i + 1] = table[both >> 4];
            }
            if (i < end) to[i] = table[from[i / 2] & 15];
            return;
        }
#endif
        FST_ROLLED
        for (; i < end; i++) to[i] = result(code(i), scale);
    }

    static FST_INLINE typename word_of<dst_size>::type result(uint32_t code, uint32_t scale) {
        return static_cast<typename word_of<dst_size>::type>(encode<Dst>(multiply(decode<Src>(code), scale)));
    }

#ifndef FST_BY_ELEMENT
    FST_INLINE bool load(uint64_t begin, Vector<in_bytes> *in) const {
        const uint8_t *from = global<const uint8_t>(src);
        if (src_bits == 4 && skew() % 2) return false; // half a byte off: not from a file
        if (aligned) {
            *in = load_aligned<in_bytes>(from + begin * src_bits / 8);
            return true;
        }
        return load_vector(from + begin * src_bits / 8, from, from + (static_cast<uint64_t>(count) * src_bits + 7) / 8, in);
    }
    // The first `split` elements under one scale, the others under another.
    FST_INLINE void vector(uint64_t begin, const Vector<in_bytes> &in, uint32_t scale, uint32_t scale2,
                           uint32_t split) const {
        Vector<16> out = {};
#if FST_PACKED
        if (static_cast<int>(is_plain<Src>(scale)) & static_cast<int>(is_plain<Src>(scale2))) {
            FST_UNROLLED
            for (unsigned i = 0; i < width; i += 4) {
                const uint32_t by[4] = {i < split ? scale : scale2, i + 1 < split ? scale : scale2,
                                        i + 2 < split ? scale : scale2, i + 3 < split ? scale : scale2};
                scale4<Src, Dst>(in.word[i * src_bits / 32] >> (i * src_bits % 32), by,
                                 &out.word[i * dst_size / 4]);
            }
            return store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
        }
#endif
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++) {
            const uint32_t word = in.word[i * src_bits / 32] >> (i * src_bits % 32);
            put<dst_size>(&out, i, result(word & ((1u << src_bits) - 1), i < split ? scale : scale2));
        }
        store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
    }
#endif
};

typedef int scaled_fn(fst_queue, const fst_scaled_args *, const Divisor &, const Divisor &);

// In pieces whose elements are counted in 31 bits.
template <int Src, int Dst>
int scaled(fst_queue stream, const fst_scaled_args *args, const Divisor &block_rows,
           const Divisor &block_cols) {
    using Body = Scaled<Src, Dst>;
    const uint64_t cols = args->cols, grid_cols = (cols - 1) / block_cols.value + 1;
    const uint64_t high = block_rows.value < args->rows ? block_rows.value : args->rows,
                   across = block_cols.value < cols ? block_cols.value : cols;
    const bool small = cols < limit31 && high < limit31;
    int code = FST_K_OK;
    for (uint64_t done = 0; done < args->count && code == FST_K_OK; done += fst_launch31) {
        const uint64_t first = args->first + done, row = first / cols, down = row / block_rows.value;
        Body body = {reinterpret_cast<uint64_t>(args->src) + done * Body::src_bits / 8,
                     reinterpret_cast<uint64_t>(args->dst) + done * Body::dst_size,
                     reinterpret_cast<uint64_t>(args->scales),
                     static_cast<uint32_t>(args->count - done < fst_launch31 ? args->count - done : fst_launch31),
                     {row, first % cols, down, down * block_rows.value},
                     divisor(cols),
                     block_rows,
                     block_cols,
                     divisor31(small ? cols : 1),
                     divisor31(small ? high : 1),
                     divisor31(small ? across : 1),
                     grid_cols,
                     args->scale_dtype,
                     args->scales_count == 1,
                     small,
                     false,
                     false};
        const uint64_t step = grid_cols == 1 ? 0 : block_cols.value;
        body.straddles = !body.one && (cols | step | (first - body.skew())) % body.width != 0;
        body.aligned = (body.src - body.skew() * body.src_bits / 8) % (body.width * body.src_bits / 8) == 0;
        code = launch(stream, body, body.blocks());
    }
    return code;
}

template <int Src> scaled_fn *find_to(int dst) {
    switch (dst) {
    case FST_T_F32: return scaled<Src, FST_T_F32>;
    case FST_T_F16: return scaled<Src, FST_T_F16>;
    case FST_T_BF16: return scaled<Src, FST_T_BF16>;
    default: return nullptr;
    }
}

scaled_fn *find(int src, int dst) {
    switch (src) {
    case FST_T_F8_E4M3: return find_to<FST_T_F8_E4M3>(dst);
    case FST_T_F8_E5M2: return find_to<FST_T_F8_E5M2>(dst);
    case FST_T_F8_E4M3FNUZ: return find_to<FST_T_F8_E4M3FNUZ>(dst);
    case FST_T_F8_E5M2FNUZ: return find_to<FST_T_F8_E5M2FNUZ>(dst);
    case FST_T_I8: return find_to<FST_T_I8>(dst);
    case FST_T_F4: return find_to<FST_T_F4>(dst);
    default: return nullptr;
    }
}

} // namespace

extern "C" int FST_SYMBOL(fst_nvfp4)(fst_queue stream, const fst_scaled_args *args);  // nvfp4.hip
extern "C" int FST_SYMBOL(fst_affine)(fst_queue stream, const fst_scaled_args *args); // affine.hip
// columns.hip; arguments that are right, and not of F4
extern "C" int FST_SYMBOL(fst_columns)(fst_queue stream, const fst_scaled_args *args);

extern "C" int FST_SYMBOL(fst_scaled)(fst_queue stream, const fst_scaled_args *args) {
    if (args->global_scale) return FST_SYMBOL(fst_nvfp4)(stream, args);
    if (args->zeros || args->flags) return FST_SYMBOL(fst_affine)(stream, args);
    scaled_fn *const launcher = find(args->src_dtype, args->dst_dtype);
    uint64_t block_rows = 0, block_cols = 0;
    const int code = launcher ? check_scaled(args, &block_rows, &block_cols) : FST_K_NO_KERNEL;
    if (code || args->count == 0) return code;
    if (args->src_dtype != FST_T_F4 && block_cols == 1 && args->cols > 1 && block_rows >= args->rows)
        return FST_SYMBOL(fst_columns)(stream, args);
    return launcher(stream, args, divisor(block_rows), divisor(block_cols));
}
