// Transposes of matrices, with or without a cast, by tiles in shared memory.
#include "divide.h"
#include "launch.h"
#include "range.h"

namespace {

// A tile is 128 bytes of a row of the source wide (64 from 1 to 8 bytes) and 128 bytes of a row of the destination
// high. A thread loads 16 bytes of as many source rows as fill a word of the destination and puts words of one column
// each into shared memory; then it stores 16 bytes of a destination row. Elements are cast on the way in, or, where
// their size stays, on the way out. Columns lie one after the other, 32 words each, in groups of 4 words; the groups of
// a column change places by the number of the vector that it was loaded in, so that the threads of a warp touch all 32
// banks both ways.
template <int Src, int Dst> struct Transpose {
    static constexpr unsigned src_size = bits_of<Src>::value / 8, dst_size = bits_of<Dst>::value / 8;
    static constexpr unsigned width =
        src_size == 1 && dst_size == 8 ? 8 : 16 / src_size; // columns of a vector
    static constexpr unsigned tile_cols = 8 * width, tile_rows = 128 / dst_size;
    static constexpr unsigned each = dst_size < 4 ? 4 / dst_size : 1; // rows in a word
    static constexpr unsigned words =
        dst_size < 4 ? 1 : dst_size / 4;                // words of a column that a thread loads
    static constexpr unsigned bytes = width * src_size; // that a thread loads of a row
    static constexpr unsigned loads = 8 * 32 / words;   // vectors (of `each` rows) in a tile
    static constexpr unsigned threads = by_element ? 1 : loads;
    static constexpr int blocks_resident = 6;
    static constexpr bool late = src_size == dst_size; // cast on the way out: fewer elements at a time
    static constexpr int Held = late ? Src : Dst;      // what shared memory holds

    struct Shared {
        alignas(16) uint32_t word[by_element ? 1 : tile_cols * 32];
    };

    uint64_t src, dst, rows, cols, src_stride, dst_stride, src_batch, dst_batch; // strides in bytes
    uint64_t limit, readable_end, batches;
    Divisor tiles, tiles_across; // of a matrix; of a row of tiles
    bool aligned;                // all rows of the source
    unsigned unit;               // what all rows of the destination are aligned to, at most 16

    FST_INLINE uint64_t blocks() const { return batches * tiles.value; }

    struct Tile {
        const uint8_t *src; // of the matrix
        uint8_t *dst;
        uint64_t row, col;
    };
    FST_INLINE Tile tile(uint64_t block) const {
        const uint64_t batch = tiles.divide(block), i = block - batch * tiles.value;
        const uint64_t down = tiles_across.divide(i), across = i - down * tiles_across.value;
        return {global<const uint8_t>(src + batch * src_batch), global<uint8_t>(dst + batch * dst_batch),
                down * tile_rows, across * tile_cols};
    }

#ifdef FST_BY_ELEMENT
    FST_INLINE void operator()(uint64_t block, unsigned) const {
        const Tile t = tile(block);
        const uint64_t row_end = t.row + tile_rows < rows ? t.row + tile_rows : rows;
        const uint64_t col_end = t.col + tile_cols < cols ? t.col + tile_cols : cols;
        for (uint64_t c = t.col; c < col_end; c++) {
            const uint8_t *__restrict from = t.src + c * src_size;
            uint8_t *__restrict to = t.dst + c * dst_stride;
            for (uint64_t r = t.row; r < row_end; r++)
                store(to, r, load_element<src_size>(from + r * src_stride));
        }
    }
#else
    FST_INLINE void before(uint64_t block, unsigned thread, Shared &shared) const {
        const Tile t = tile(block);
        const unsigned across = thread % 8, group = thread / 8; // which vector of a row, which rows
        const uint64_t col = t.col + across * width, row = t.row + group * each;
        if (col >= cols || row >= rows) return;
        Vector<bytes> in[each];
        if (aligned && cols - col >= width) load_aligned_rows(t, row, col, in);
        else load_rows(t, row, col, in);
        Vector<width * dst_size> line[each];
        FST_UNROLLED
        for (unsigned i = 0; i < each; i++) line[i] = convert_vector<Src, Held, width>(in[i], limit);
        // Columns of one vector have their groups in the same order.
        const unsigned first = place(across * width, group * words / 4) + group * words % 4;
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++) {
            const unsigned at = first + i * 32;
            if constexpr (dst_size == 8) {
                *reinterpret_cast<uint2 *>(&shared.word[at]) =
                    make_uint2(line[0].word[2 * i], line[0].word[2 * i + 1]);
            } else {
                shared.word[at] = column_word(line, i);
            }
        }
    }

    // A destination row is aligned only as its address is. The vectors of a whole tile's are aligned ones nevertheless:
    // the first is made of what the tile has before the first aligned address and behind the last.
    FST_INLINE void after(uint64_t block, unsigned thread, const Shared &shared) const {
        const Tile t = tile(block);
        FST_UNROLLED
        for (unsigned i = thread; i < tile_cols * 8; i += threads) {
            const unsigned column = i / 8, group = i % 8;
            const uint64_t col = t.col + column, row = t.row + group * (16 / dst_size);
            if (col >= cols || row >= rows) continue;
            uint8_t *to = t.dst + col * dst_stride + row * dst_size;
            const unsigned skew = static_cast<unsigned>(reinterpret_cast<uintptr_t>(to) % 16);
            if (unit == 16 && rows - row >= 16 / dst_size) {
                store_aligned(to, out(held(shared, column, group)));
            } else if (rows - t.row >= tile_rows) {
                const unsigned before = skew ? (group + 7) % 8 : group;
                const Vector<16> v = out(
                    shift_pair(held(shared, column, before), held(shared, column, group), (16 - skew) % 16));
                if (group != 0 || skew == 0) store_aligned(to - skew, v);
                else store_around(to - skew, v, skew);
            } else {
                store_loose(to, out(held(shared, column, group)),
                            static_cast<unsigned>(rows - row < 16 / dst_size ? rows - row : 16 / dst_size) *
                                dst_size);
            }
        }
    }
#endif

  private:
    FST_INLINE void store(uint8_t *to, uint64_t i, uint64_t code) const {
        store_element<dst_size>(
            to + i * dst_size, static_cast<typename word_of<dst_size>::type>(convert<Src, Dst>(code, limit)));
    }

#ifndef FST_BY_ELEMENT
    // Where a group of 4 words of a column begins.
    static FST_INLINE unsigned place(unsigned column, unsigned group) {
        return column * 32 + (group ^ column / width % 8) * 4;
    }

    // `width` elements of `each` rows from (row, col) on; what is beyond the matrix is 0.
    FST_INLINE void load_aligned_rows(const Tile &t, uint64_t row, uint64_t col,
                                      Vector<bytes> (&in)[each]) const {
        const uint8_t *from = t.src + row * src_stride + col * src_size;
        FST_UNROLLED
        for (unsigned i = 0; i < each; i++) {
            in[i] = {};
            if (i < rows - row) in[i] = load_aligned<bytes>(from + i * src_stride);
        }
    }
    // All loads are under way before the first is used.
    FST_INLINE void load_rows(const Tile &t, uint64_t row, uint64_t col, Vector<bytes> (&in)[each]) const {
        const uint8_t *from = t.src + row * src_stride + col * src_size;
        const uint8_t *begin = global<const uint8_t>(src), *end = global<const uint8_t>(readable_end);
        if ((rows - row >= each) & (cols - col >= width) & (from >= begin + bytes) &
            (from + (each - 1) * src_stride + 2 * bytes <= end)) {
            FST_UNROLLED
            for (unsigned i = 0; i < each; i++) {
                const uint8_t *at = from + i * src_stride;
                const unsigned skew = static_cast<unsigned>(reinterpret_cast<uintptr_t>(at) % bytes);
                in[i] =
                    shift_pair(load_aligned<bytes>(at - skew), load_aligned<bytes>(at - skew + bytes), skew);
            }
            return;
        }
        FST_UNROLLED
        for (unsigned i = 0; i < each; i++) {
            in[i] = {};
            FST_UNROLLED
            for (unsigned k = 0; k < width; k++)
                if ((i < rows - row) & (k < cols - col))
                    put<src_size>(&in[i], k, load_element<src_size>(from + i * src_stride + k * src_size));
        }
    }

    // The i-th elements of `each` rows, as a word.
    static FST_INLINE uint32_t column_word(const Vector<width * dst_size> (&line)[each], unsigned i) {
#if FST_PACKED
        const unsigned at = i * dst_size / 4;
        if constexpr (each == 2) return permute(line[0].word[at], line[1].word[at], i % 2 ? 0x7632 : 0x5410);
        if constexpr (each == 4) {
            const uint32_t pick = i % 4 < 2 ? 0x5140 : 0x7362; // two elements of either row, in turns
            return permute(permute(line[0].word[at], line[1].word[at], pick),
                           permute(line[2].word[at], line[3].word[at], pick), i % 2 ? 0x7632 : 0x5410);
        }
#endif
        uint32_t word = 0;
        FST_UNROLLED
        for (unsigned k = 0; k < each; k++)
            word |= static_cast<uint32_t>(get<dst_size>(line[k], i)) << (k * 8 * dst_size % 32);
        return word;
    }

    static FST_INLINE Vector<16> held(const Shared &shared, unsigned column, unsigned group) {
        const uint4 *words4 = reinterpret_cast<const uint4 *>(&shared.word[place(column, group)]);
        return {{words4->x, words4->y, words4->z, words4->w}};
    }
    FST_INLINE Vector<16> out(const Vector<16> &held) const {
        return convert_vector<Held, Dst, 16 / dst_size>(held, limit);
    }

    // The bytes from `skew` on to where they belong in the vector at `to`; those before, to the vector behind the tile's
    // other seven.
    FST_INLINE void store_around(uint8_t *to, const Vector<16> &v, unsigned skew) const {
        if (unit == 8) return store_units<8>(to, v, skew);
        if constexpr (dst_size <= 4)
            if (unit == 4) return store_units<4>(to, v, skew);
        if constexpr (dst_size <= 2)
            if (unit == 2) return store_units<2>(to, v, skew);
        if constexpr (dst_size == 1) store_units<1>(to, v, skew);
    }
    template <unsigned size>
    static FST_INLINE void store_units(uint8_t *to, const Vector<16> &v, unsigned skew) {
        FST_UNROLLED
        for (unsigned at = 0; at < 16; at += size) store_piece<size>(at < skew ? to + 128 : to, v, at);
    }

    // The first n bytes of a vector.
    static FST_INLINE void store_loose(uint8_t *to, const Vector<16> &v, unsigned n) {
        FST_UNROLLED
        for (unsigned at = 0; at < 16; at += dst_size)
            if (at < n) store_piece<dst_size>(to, v, at);
    }
#endif
};

typedef int transpose_fn(fst_queue, const fst_transpose_args *, uint64_t src_bytes);

template <int Src, int Dst>
int transpose(fst_queue stream, const fst_transpose_args *args, uint64_t src_bytes) {
    using Body = Transpose<Src, Dst>;
    const uint64_t src = reinterpret_cast<uint64_t>(args->src);
    const uint64_t across = (args->cols - 1) / Body::tile_cols + 1,
                   down = (args->rows - 1) / Body::tile_rows + 1;
    const uint64_t dst = reinterpret_cast<uint64_t>(args->dst);
    const uint64_t src_stride = args->src_stride * Body::src_size,
                   src_batch = args->src_batch_stride * Body::src_size;
    const uint64_t dst_stride = args->dst_stride * Body::dst_size,
                   dst_batch = args->dst_batch_stride * Body::dst_size;
    const uint64_t bits = dst | dst_stride | dst_batch | 16; // the lowest
    const Body body = {src,
                       dst,
                       args->rows,
                       args->cols,
                       src_stride,
                       dst_stride,
                       src_batch,
                       dst_batch,
                       limit_of<Src, Dst>(args->flags),
                       src + src_bytes,
                       args->batch,
                       divisor(across * down),
                       divisor(across),
                       (src | src_stride | src_batch) % 16 == 0,
                       static_cast<unsigned>(bits & (0 - bits))};
#ifdef FST_BY_ELEMENT
    return launch(stream, body, body.blocks());
#else
    return launch_phases(stream, body, body.blocks());
#endif
}

template <int Src, int Dst> transpose_fn *launcher() {
    if constexpr (is_cast(Src, Dst)) return transpose<Src, Dst>;
    else return nullptr;
}

template <int Src> transpose_fn *find_to(int dst) {
    switch (dst) {
#define X(name, ...) \
    case FST_T_##name: return launcher<Src, FST_T_##name>();
        FST_FLOAT_LIST(X)
#undef X
    default: return nullptr;
    }
}

transpose_fn *find(int src, int dst) {
    if (src == dst) {
        switch (fst_type_bits(src)) {
        case 8: return transpose<FST_T_U8, FST_T_U8>;
        case 16: return transpose<FST_T_U16, FST_T_U16>;
        case 32: return transpose<FST_T_U32, FST_T_U32>;
        case 64: return transpose<FST_T_U64, FST_T_U64>;
        default: return nullptr;
        }
    }
    switch (src) {
#define X(name, ...) \
    case FST_T_##name: return find_to<FST_T_##name>(dst);
        FST_FLOAT_LIST(X)
#undef X
    default: return nullptr;
    }
}

// Bytes of `batch` matrices of rows x cols; false when they go beyond the address space.
bool span(uint64_t address, unsigned size, uint64_t batch, uint64_t batch_stride, uint64_t rows,
          uint64_t stride, uint64_t cols, uint64_t *bytes) {
    uint64_t skipped, elements, end;
    return !__builtin_mul_overflow(rows - 1, stride, &elements) &&
           !__builtin_add_overflow(elements, cols, &elements) &&
           !__builtin_mul_overflow(batch - 1, batch_stride, &skipped) &&
           !__builtin_add_overflow(elements, skipped, &elements) &&
           !__builtin_mul_overflow(elements, static_cast<uint64_t>(size), bytes) &&
           !__builtin_add_overflow(address, *bytes, &end);
}

// False when a row, or a matrix, is longer than the step over it. A step that is never made may be anything.
bool are_apart(uint64_t batch, uint64_t batch_stride, uint64_t rows, uint64_t stride, uint64_t cols) {
    uint64_t matrix;
    if (rows > 1 && stride < cols) return false;
    return batch == 1 || (!__builtin_mul_overflow(rows - 1, stride, &matrix) &&
                          !__builtin_add_overflow(matrix, cols, &matrix) && batch_stride >= matrix);
}

} // namespace

extern "C" int FST_SYMBOL(fst_transpose)(fst_queue stream, const fst_transpose_args *args) {
    transpose_fn *const run_transpose = find(args->src_dtype, args->dst_dtype);
    const fst_transpose_args &a = *args;
    if (!run_transpose) return FST_K_NO_KERNEL;
    if (a.batch == 0 || a.rows == 0 || a.cols == 0) return FST_K_OK;
    const unsigned src_size = fst_type_bits(a.src_dtype) / 8, dst_size = fst_type_bits(a.dst_dtype) / 8;
    const uint64_t src = reinterpret_cast<uint64_t>(a.src), dst = reinterpret_cast<uint64_t>(a.dst);
    uint64_t src_bytes = 0, dst_bytes = 0;
    if (!span(src, src_size, a.batch, a.src_batch_stride, a.rows, a.src_stride, a.cols, &src_bytes) ||
        !span(dst, dst_size, a.batch, a.dst_batch_stride, a.cols, a.dst_stride, a.rows, &dst_bytes))
        return FST_K_SIZE;
    if (!are_apart(a.batch, a.src_batch_stride, a.rows, a.src_stride, a.cols) ||
        !are_apart(a.batch, a.dst_batch_stride, a.cols, a.dst_stride, a.rows))
        return FST_K_STRIDE;
    if (!src || !dst) return FST_K_NULL;
    if (dst % dst_size) return FST_K_ALIGN;
    return run_transpose(stream, args, src_bytes);
}
