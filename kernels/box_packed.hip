// Parts of matrices of packed integers: what packed.hip makes of whole ones.
#include "box.h"
#include "packing.h"

namespace {

// Where a code begins in its run of words, in bits. Padded, each word has `gap` bits at its end.
struct Places {
    Divisor in_word; // codes
    unsigned bits, gap;

    FST_INLINE uint64_t at(uint64_t i) const { return i * bits + (gap ? in_word.divide(i) * gap : 0); }
};

template <int Layout> struct PackedCodes {
    struct Scale {
        uint32_t scale, zero; // F32 bits; the zero point's on `base`
    };

    Source source;
    uint64_t scales, zeros, groups;
    Grid scale_grid, zero_grid;
    Divisor group;
    Places places;       // of codes and of zero points
    int32_t fixed;       // added to zero points; where there are none, the only one
    uint32_t zero_carry; // added to their words
    uint32_t flip;       // of each code: two's complement
    int scale_dtype, zeros_kind;
    unsigned bits;
    bool awq_order;

    // The address of the row's codes and, of those that lie across columns, their place in each stored row.
    FST_INLINE Line line(uint64_t row) const {
        if (Layout == FST_PACKED_ROW) return source.line(row, 0);
        if (Layout == FST_PACKED_COLUMN) return source.line(0, row * 32);
        if (Layout == FST_PACKED_PAIRS) return {source.line(row / 2, 0).address, row % 2 * 4};
        const unsigned i = static_cast<unsigned>(row % 8), shift = awq_order ? awq_shift(i) : 4 * i;
        return {source.line(0, row / 8 * 32 + shift / 8 * 8).address, shift % 8};
    }

    FST_INLINE uint32_t code(const uint8_t *from, uint64_t bit, uint64_t col) const {
        if (Layout == FST_PACKED_PAIRS) return from[col] >> bit & 15;
        if (Layout == FST_PACKED_TRANSPOSED) return from[col * (source.step / 8)] >> bit & 15;
        if (Layout == FST_PACKED_ROW)
            return code_of(places.at(col), bits, [&](uint64_t i) -> uint32_t { return from[i]; });
        return code_of(col * bits, bits,
                       [&](uint64_t i) -> uint32_t { return from[i / 4 * (source.step / 8) + i % 4]; });
    }

    FST_INLINE uint64_t until(uint64_t, uint64_t col) const {
        return groups ? col + 1 : (group.divide(col) + 1) * group.value;
    }

    FST_INLINE Scale scale_of(uint64_t row, uint64_t col) const {
        constexpr bool across = Layout == FST_PACKED_COLUMN || Layout == FST_PACKED_TRANSPOSED;
        const uint64_t j = groups ? global<const uint32_t>(groups)[col] : group.divide(col);
        return {load_scale(scales, scale_dtype, across ? scale_grid.at(j, row) : scale_grid.at(row, j)),
                base + static_cast<uint32_t>(zero_of(row, j))};
    }

    FST_INLINE uint32_t value(uint32_t code, const Scale &by) const {
        return multiply(difference(code ^ flip, by.zero), by.scale);
    }

  private:
    FST_INLINE int32_t zero_of(uint64_t row, uint64_t j) const {
        if (zeros_kind == FST_ZEROS_NONE) return fixed;
        if (zeros_kind == FST_ZEROS_BYTES) return fixed + global<const int8_t>(zeros)[zero_grid.at(row, j)];
        const uint64_t bit = places.at(zeros_kind == FST_ZEROS_GROUPS ? j : row);
        unsigned shift = static_cast<unsigned>(bit % 32);
        const uint32_t word = zero_word(row, j, bit / 32) + zero_carry;
        if (awq_order && bits == 4) shift = awq_shift(shift / 4);
        uint32_t code = word >> shift;
        if (shift + bits > 32) code |= zero_word(row, j, bit / 32 + 1) << (32 - shift);
        return static_cast<int32_t>(code & ((1u << bits) - 1)) + fixed;
    }
    FST_INLINE uint32_t zero_word(uint64_t row, uint64_t j, uint64_t word) const {
        const uint64_t at = zeros_kind == FST_ZEROS_ROWS      ? zero_grid.at(j, word)
                            : zeros_kind == FST_ZEROS_COLUMNS ? zero_grid.at(word, j)
                                                              : zero_grid.at(row, word);
        return global<const uint32_t>(zeros)[at];
    }
};

// Rows and columns that a box needs of a grid.
struct Span {
    uint64_t first, last;
};

// What of the words a box needs.
Stored words_stored(const fst_packed_args *a, const fst_box *box, const Places &places, uint64_t width) {
    const uint64_t row_end = box->row + box->rows, col_end = box->col + box->cols;
    if (a->layout == FST_PACKED_ROW) {
        const uint64_t first = places.at(box->col), end = places.at(col_end - 1) + a->bits;
        return {width * 32, box->row, row_end, first, (end + 7) / 8 - first / 8};
    }
    if (a->layout == FST_PACKED_PAIRS)
        return {width * 8, box->row / 2, (row_end + 1) / 2, box->col * 8, box->cols};
    if (a->layout == FST_PACKED_COLUMN) {
        const uint64_t first = box->col * a->bits, end = col_end * a->bits;
        return {width * 32, first / 32, (end + 31) / 32, box->row * 32 + first % 32 / 8 * 8, box->rows * 4};
    }
    unsigned least = 32; // of the first word: the byte that is needed first
    for (uint64_t row = box->row; row < row_end && row / 8 == box->row / 8; row++) {
        const unsigned i = static_cast<unsigned>(row % 8),
                       shift = a->flags & FST_K_AWQ_ORDER ? awq_shift(i) : 4 * i;
        if (shift < least) least = shift;
    }
    return {width * 32, box->col, col_end, box->row / 8 * 32 + least / 8 * 8,
            ((row_end + 7) / 8 - box->row / 8) * 4};
}

// Scales, and zero points, of the rows and groups of a box. Which groups there are in g_idx, only the device knows.
template <int Layout>
int find_grids(const fst_packed_args *a, const fst_box *box, PackedCodes<Layout> *codes) {
    constexpr bool across = Layout == FST_PACKED_COLUMN || Layout == FST_PACKED_TRANSPOSED;
    const uint64_t groups = a->groups_count;
    const Span rows = {box->row, box->row + box->rows - 1},
               j = {a->groups ? groups - 1 : box->col / a->group,
                    a->groups ? groups - 1 : (box->col + box->cols - 1) / a->group};
    const Span words = {codes->places.at(rows.first) / 32, (codes->places.at(rows.last) + a->bits - 1) / 32};
    const Span group_words = {codes->places.at(j.first) / 32, (codes->places.at(j.last) + a->bits - 1) / 32};
    const bool padded = a->flags & FST_K_PADDED;
    const auto grid = [](uint64_t width, uint64_t first, uint64_t pitch, Span i, Span k, Grid *out) {
        return find_grid(width, first, pitch, i.first, i.last, k.first, k.last, out);
    };
    const int code = across ? grid(a->rows, box->scales_first, box->scales_pitch, j, rows, &codes->scale_grid)
                            : grid(groups, box->scales_first, box->scales_pitch, rows, j, &codes->scale_grid);
    if (code) return code;
    const uint64_t first = box->zeros_first, pitch = box->zeros_pitch;
    switch (a->zeros_kind) {
    case FST_ZEROS_NONE: return FST_K_OK;
    case FST_ZEROS_BYTES: return grid(groups, first, pitch, rows, j, &codes->zero_grid);
    case FST_ZEROS_ROWS:
        return grid(words_of(a->rows, a->bits, padded), first, pitch, j, words, &codes->zero_grid);
    case FST_ZEROS_COLUMNS: return grid(groups, first, pitch, words, j, &codes->zero_grid);
    case FST_ZEROS_GROUPS:
        return grid(words_of(groups, a->bits, padded), first, pitch, rows, group_words, &codes->zero_grid);
    default: return FST_K_SCALE;
    }
}

template <int Layout>
int run_packed(fst_queue stream, const fst_packed_args *a, const fst_box *box, uint64_t width) {
    PackedCodes<Layout> codes = {};
    const bool padded = a->flags & FST_K_PADDED;
    codes.places = {divisor(32 / a->bits), a->bits, padded ? 32 % a->bits : 0};
    int code = find_source(a->src, box, words_stored(a, box, codes.places, width), &codes.source);
    if (code == FST_K_OK) code = find_grids(a, box, &codes);
    if (code) return code;
    codes.scales = reinterpret_cast<uint64_t>(a->scales);
    codes.zeros = reinterpret_cast<uint64_t>(a->zeros);
    codes.groups = reinterpret_cast<uint64_t>(a->groups);
    codes.group = divisor(a->group);
    codes.fixed = fixed_zero(a), codes.zero_carry = zero_carry(a), codes.flip = sign_flip(a);
    codes.scale_dtype = a->scale_dtype, codes.zeros_kind = a->zeros_kind;
    codes.bits = a->bits, codes.awq_order = a->flags & FST_K_AWQ_ORDER;
    return run_to(stream, codes, a->dst_dtype, a->dst, box);
}

typedef int packed_fn(fst_queue, const fst_packed_args *, const fst_box *, uint64_t);

packed_fn *find(const fst_packed_args *a) {
    const unsigned bits = a->bits;
    if (!is_target(a->dst_dtype)) return nullptr;
    switch (a->layout) {
    case FST_PACKED_ROW: return bits - 1 < 8 ? run_packed<FST_PACKED_ROW> : nullptr;
    case FST_PACKED_PAIRS: return bits == 4 ? run_packed<FST_PACKED_PAIRS> : nullptr;
    case FST_PACKED_COLUMN:
        return bits == 2 || bits == 3 || bits == 4 || bits == 8 ? run_packed<FST_PACKED_COLUMN> : nullptr;
    case FST_PACKED_TRANSPOSED: return bits == 4 ? run_packed<FST_PACKED_TRANSPOSED> : nullptr;
    default: return nullptr;
    }
}

} // namespace

extern "C" int FST_SYMBOL(fst_box_packed)(fst_queue stream, const fst_packed_args *args, const fst_box *box) {
    packed_fn *const launcher = find(args);
    uint64_t elements, all = 0, width = 0, unit = 1;
    if (!launcher) return FST_K_NO_KERNEL;
    if (__builtin_mul_overflow(args->rows, args->cols, &elements) || elements > UINT64_MAX / 16 ||
        !is_inside(box, args->rows, args->cols))
        return FST_K_SIZE;
    if (!box->rows || !box->cols) return FST_K_OK;
    if (!shape_of(args, &all, &width, &unit)) return FST_K_SIZE;
    const int code = check_packed(args);
    return code ? code : launcher(stream, args, box, width);
}
