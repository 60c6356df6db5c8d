// Parts of matrices of codes, from a part of what is stored to anywhere: what the kernels of shards are made of.
#ifndef FST_BOX_H
#define FST_BOX_H

#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "pack.h"
#include "product.h"
#include "scales.h"

namespace {

// ---- The body ----

// Codes say what elements are made of; all counts are those of the whole matrix:
//   line(row)             the address of a row's codes, and at which bit they begin
//   code(from, bit, col)  one of them, from that address
//   scale_of(row, col)    a Codes::Scale
//   until(row, col)       the column up to which the row is under the same
//   value(code, scale)    the F32 bits of the product
struct Line {
    uint64_t address, bit;
};

// A block is a tile of elements, one a thread: CUDA 13.0's compiler makes a loop over several once for each case of all that
// is so for a whole launch, and does not come to an end. Threads lie along the axis that is contiguous in the result,
// rows or columns, so that neighbours store side by side; the others are across it, so that one block reads several
// bytes beside each other also where the result is transposed. On the CPU a tile is as high as a line of a transposed
// result is long, and as wide as the first-level cache has such lines.
template <class Codes, int Dst> struct Box {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr uint64_t along = by_element ? 256 : 32, across = by_element ? 32 : threads / along;
    using Word = typename word_of<Dst == FST_T_F32 ? 4 : 2>::type;

    Codes codes;
    uint64_t dst, row_step, col_step, half; // of the result
    uint64_t origin_row, origin_col;
    uint64_t row, col, row_end, col_end;
    Divisor tiles; // along
    uint64_t tiles_across;
    bool down; // along is down the rows

    FST_INLINE uint64_t blocks() const { return tiles.value * tiles_across; }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint64_t y = tiles.divide(block), x = block - y * tiles.value;
#ifdef FST_BY_ELEMENT
        (void)thread;
        const uint64_t top = row + y * across, left = col + x * along;
        const uint64_t bottom = row_end - top < across ? row_end : top + across,
                       right = col_end - left < along ? col_end : left + along;
        for (uint64_t r = top; r < bottom; r++) stretches(r, left, right);
#else
        const uint64_t i = x * along + thread % along, j = y * across + thread / along;
        const uint64_t r = row + (down ? i : j), c = col + (down ? j : i);
        if (r >= row_end || c >= col_end) return;
        const Line line = codes.line(r);
        const uint32_t code = codes.code(global<const uint8_t>(line.address), line.bit, c);
        *place(r, c) = result(code, codes.scale_of(r, c));
#endif
    }

  private:
    FST_INLINE Word *place(uint64_t r, uint64_t c) const {
        const uint64_t i = r - origin_row, at = half ? i / 2 + i % 2 * half : i;
        return global<Word>(dst) + (at * row_step + (c - origin_col) * col_step);
    }

    FST_INLINE Word result(uint32_t code, const typename Codes::Scale &by) const {
        return static_cast<Word>(encode<Dst>(codes.value(code, by)));
    }

#ifdef FST_BY_ELEMENT
    // A part of a row, what is under one scale at a time.
    FST_INLINE void stretches(uint64_t r, uint64_t c, uint64_t stop) const {
        const Line line = codes.line(r);
        while (c < stop) {
            uint64_t until = codes.until(r, c);
            if (until > stop) until = stop;
            stretch(line, place(r, c), c, until, codes.scale_of(r, c));
            c = until;
        }
    }

    FST_INLINE void stretch(const Line &line, Word *__restrict to, uint64_t c, uint64_t until,
                            const typename Codes::Scale &by) const {
        const uint8_t *__restrict from = global<const uint8_t>(line.address);
        const uint64_t bit = line.bit, n = until - c, step = col_step;
        const Codes &all = codes;
        if (step == 1) {
            for (uint64_t i = 0; i < n; i++)
                to[i] = static_cast<Word>(encode<Dst>(all.value(all.code(from, bit, c + i), by)));
        } else {
            for (uint64_t i = 0; i < n; i++)
                to[i * step] = static_cast<Word>(encode<Dst>(all.value(all.code(from, bit, c + i), by)));
        }
    }
#endif
};

// ---- Where codes are ----

// Stored rows: bits from one to the next, and the bits before `address`.
struct Source {
    uint64_t address, step, before;

    // What lies so many bits into a stored row. (The row may begin before `address`, the part does not.)
    FST_INLINE Line line(uint64_t row, uint64_t bit) const {
        const uint64_t at = row * step + bit - before;
        return {address + static_cast<uint64_t>(static_cast<int64_t>(at) >> 3), at & 7};
    }
};

// A code of up to 8 bits, by the bytes that it lies in.
template <class Bytes> FST_FN uint32_t code_of(uint64_t at, unsigned bits, const Bytes &byte) {
    const uint32_t low = byte(at / 8), high = byte((at + bits - 1) / 8);
    return (low | high << 8) >> (at % 8) & ((1u << bits) - 1);
}

// A grid of scales or zero points, of which elements from `first` on are there.
struct Grid {
    uint64_t pitch, first;

    FST_INLINE uint64_t at(uint64_t i, uint64_t j) const { return i * pitch + j - first; }
};

// ---- What is asked of the arguments ----

typedef unsigned __int128 uint128;

inline bool is_target(int dtype) { return dtype == FST_T_F32 || dtype == FST_T_F16 || dtype == FST_T_BF16; }

// Whether it lies in a matrix of so many rows and columns, and begins no earlier than the result.
inline bool is_inside(const fst_box *box, uint64_t rows, uint64_t cols) {
    return box->row <= rows && box->rows <= rows - box->row && box->col <= cols &&
           box->cols <= cols - box->col && box->row >= box->origin_row && box->col >= box->origin_col;
}

// What a part needs of what is stored: rows, the first bit of the first, and the bytes of each.
struct Stored {
    uint64_t row_bits;
    uint64_t row, end, first_bit, bytes;
};

inline int find_source(const void *src, const fst_box *box, const Stored &s, Source *out) {
    const bool flat = box->src_pitch == 0;
    if (!flat && (s.row_bits % 8 || (s.end - s.row > 1 && box->src_pitch < s.bytes))) return FST_K_STRIDE;
    const uint128 step = flat ? s.row_bits : static_cast<uint128>(box->src_pitch) * 8,
                  before = (flat ? 0 : step * box->src_row) + static_cast<uint128>(box->src_byte) * 8,
                  first = step * s.row + s.first_bit;
    if (before > INT64_MAX || step * s.end > INT64_MAX || first / 8 < before / 8) return FST_K_SIZE;
    *out = {reinterpret_cast<uint64_t>(src), static_cast<uint64_t>(step), static_cast<uint64_t>(before)};
    return FST_K_OK;
}

// `width` is that of all of the grid; [i, i_last] x [j, j_last] is what the part needs.
inline int find_grid(uint64_t width, uint64_t first, uint64_t pitch, uint64_t i, uint64_t i_last, uint64_t j,
                     uint64_t j_last, Grid *out) {
    if (!pitch) pitch = width;
    if (i_last > i && pitch <= j_last - j) return FST_K_STRIDE;
    const uint128 before = static_cast<uint128>(first / width) * pitch + first % width;
    if (static_cast<uint128>(i) * pitch + j < before ||
        static_cast<uint128>(i_last) * pitch + j_last > INT64_MAX)
        return FST_K_SCALE;
    *out = {pitch, static_cast<uint64_t>(before)};
    return FST_K_OK;
}

// Places of rows in the result: [*low, *high].
inline void rows_of(const fst_box *box, uint64_t *low, uint64_t *high) {
    const uint64_t first = box->row - box->origin_row, last = first + box->rows - 1;
    *low = first, *high = last;
    if (!box->dst_half) return;
    // Even rows come before odd ones.
    *low = first % 2 == 0 || last > first ? (first + 1) / 2 : first / 2 + box->dst_half;
    *high = last % 2 || last > first ? (last - 1) / 2 + box->dst_half : last / 2;
}

inline int check_target(const fst_box *box, const void *dst, unsigned size) {
    if (reinterpret_cast<uint64_t>(dst) % size) return FST_K_ALIGN;
    if (box->dst_half > INT64_MAX) return FST_K_SIZE;
    if (box->dst_half && (box->row - box->origin_row + box->rows - 1) / 2 >= box->dst_half)
        return FST_K_STRIDE;
    uint64_t low, high;
    rows_of(box, &low, &high);
    const uint64_t rows = high - low, cols = box->cols - 1; // steps from the first to the last
    const uint128 covered_down = static_cast<uint128>(rows) * box->dst_row,
                  covered_across = static_cast<uint128>(cols) * box->dst_col;
    if ((rows && !box->dst_row) || (cols && !box->dst_col)) return FST_K_STRIDE;
    if (rows && cols &&
        (box->dst_row < box->dst_col ? covered_down >= box->dst_col : covered_across >= box->dst_row))
        return FST_K_STRIDE;
    if (static_cast<uint128>(high) * box->dst_row +
            static_cast<uint128>(box->col - box->origin_col + cols) * box->dst_col >
        INT64_MAX / size)
        return FST_K_SIZE;
    return FST_K_OK;
}

// ---- Launching ----

template <class Codes, int Dst>
int run_box(fst_queue stream, const Codes &codes, void *dst, const fst_box *box) {
    using Body = Box<Codes, Dst>;
    Body body = {};
    body.codes = codes;
    body.dst = reinterpret_cast<uint64_t>(dst);
    body.row_step = box->dst_row, body.col_step = box->dst_col, body.half = box->dst_half;
    body.origin_row = box->origin_row, body.origin_col = box->origin_col;
    body.row = box->row, body.col = box->col;
    body.row_end = box->row + box->rows, body.col_end = box->col + box->cols;
    body.down = !by_element && box->rows > 1 && (box->cols == 1 || box->dst_row < box->dst_col);
    const uint64_t side = body.down ? box->rows : box->cols, other = body.down ? box->cols : box->rows;
    body.tiles = divisor(blocks_of(side, Body::along));
    body.tiles_across = blocks_of(other, Body::across);
    return launch(stream, body, body.blocks());
}

// To one of the three targets; the part is not empty.
template <class Codes>
int run_to(fst_queue stream, const Codes &codes, int dst_dtype, void *dst, const fst_box *box) {
    const int code = check_target(box, dst, fst_type_bits(dst_dtype) / 8);
    if (code) return code;
    if (dst_dtype == FST_T_F32) return run_box<Codes, FST_T_F32>(stream, codes, dst, box);
    if (dst_dtype == FST_T_F16) return run_box<Codes, FST_T_F16>(stream, codes, dst, box);
    return run_box<Codes, FST_T_BF16>(stream, codes, dst, box);
}

} // namespace
#endif
