// Parts of matrices of codes under scales (what scaled.hip, nvfp4.hip, affine.hip and bnb.hip make of whole ones), and of
// narrow floats without any.
#include "box.h"
#include "values.h"

namespace {

// A code of a row; of F4 and F6, the low bits come first.
template <int Src> struct bits_of { static constexpr unsigned value = Src == FST_T_F4 ? 4 : 8; };
template <> struct bits_of<FST_T_F6_E2M3> { static constexpr unsigned value = 6; };
template <> struct bits_of<FST_T_F6_E3M2> { static constexpr unsigned value = 6; };

template <int Src> FST_FN uint32_t row_code(const uint8_t *from, uint64_t bit, uint64_t col) {
    constexpr unsigned bits = bits_of<Src>::value;
    if constexpr (bits == 8) return from[col];
    else return code_of(bit + col * bits, bits, [&](uint64_t i) -> uint32_t { return from[i]; });
}

// Floats without scales. (A type of its own: with no scales as a case of ScaledCodes, CUDA 13.0's compiler does not come
// to an end.)
template <int Src> struct NarrowCodes {
    struct Scale {};

    Source source;

    FST_INLINE Line line(uint64_t row) const { return source.line(row, 0); }
    static FST_INLINE uint32_t code(const uint8_t *from, uint64_t bit, uint64_t col) {
        return row_code<Src>(from, bit, col);
    }
    FST_INLINE uint64_t until(uint64_t, uint64_t) const { return UINT64_MAX; }
    FST_INLINE Scale scale_of(uint64_t, uint64_t) const { return {}; }
    FST_INLINE uint32_t value(uint32_t code, const Scale &) const { return decode<Src>(code); }
};

template <int Src> struct ScaledCodes {
    struct Scale {
        uint32_t scale; // F32 bits
        int32_t zero;
    };

    Source source;
    uint64_t scales, zeros; // 0: none
    Grid scale_grid, zero_grid;
    Divisor block_rows, block_cols;
    int scale_dtype;
    uint32_t factor; // 0: none
    bool divides;    // by the scale

    FST_INLINE Line line(uint64_t row) const { return source.line(row, 0); }

    static FST_INLINE uint32_t code(const uint8_t *from, uint64_t bit, uint64_t col) {
        return row_code<Src>(from, bit, col);
    }
    FST_INLINE uint64_t until(uint64_t, uint64_t col) const {
        return (block_cols.divide(col) + 1) * block_cols.value;
    }

    FST_INLINE Scale scale_of(uint64_t row, uint64_t col) const {
        const uint64_t down = block_rows.divide(row), right = block_cols.divide(col),
                       at = scale_grid.at(down, right);
        return {load_scale(scales, scale_dtype, at),
                Src == FST_T_I8 && zeros ? global<const int8_t>(zeros)[zero_grid.at(down, right)] : 0};
    }

    FST_INLINE uint32_t value(uint32_t code, const Scale &by) const {
        if constexpr (Src == FST_T_I8) {
            const int32_t q = static_cast<int8_t>(code) - by.zero;
            const uint32_t x = multiply(fst_bits_of_float32(static_cast<float>(q)), by.scale);
            return factor ? multiply(x, factor) : x;
        } else {
            const uint32_t x = decode<Src>(code);
            return Src != FST_T_F4 && divides ? divide(x, by.scale) : multiply(x, by.scale);
        }
    }
};

// F4 under scales of E4M3 for groups of a row, and those under one F32 for all. A type of its own, like the above.
struct Nvfp4Codes {
    using Scale = uint32_t; // F32 bits

    Source source;
    uint64_t scales, global_scale;
    Grid scale_grid;
    Divisor group;
    bool divides;

    FST_INLINE Line line(uint64_t row) const { return source.line(row, 0); }
    static FST_INLINE uint32_t code(const uint8_t *from, uint64_t bit, uint64_t col) {
        return row_code<FST_T_F4>(from, bit, col);
    }
    FST_INLINE uint64_t until(uint64_t, uint64_t col) const { return (group.divide(col) + 1) * group.value; }
    FST_INLINE Scale scale_of(uint64_t row, uint64_t col) const {
        const uint64_t at = scale_grid.at(row, group.divide(col));
        const uint32_t scale = fst_decode32(global<const uint8_t>(scales)[at], fst_float_of(FST_T_F8_E4M3));
        const uint32_t all = global<const uint32_t>(global_scale)[0];
        return divides ? divide(scale, all) : multiply(scale, all);
    }
    FST_INLINE uint32_t value(uint32_t code, Scale by) const { return multiply(decode<FST_T_F4>(code), by); }
};

// The part of a matrix of such rows that a box needs.
Stored rows_stored(const fst_box *box, uint64_t cols, unsigned bits) {
    const uint64_t first = box->col * bits, end = (box->col + box->cols) * bits;
    return {cols * bits, box->row, box->row + box->rows, first, (end + 7) / 8 - first / 8};
}

// ---- Scaled ----

// Which ways to scale there are: scaled.hip, nvfp4.hip and affine.hip.
bool has_way(const fst_scaled_args *args) {
    const bool divides = args->flags & FST_K_DIVIDE, over = args->flags & FST_K_OVER_127;
    if (args->global_scale) return args->src_dtype == FST_T_F4 && args->kind == FST_SCALE_GROUP;
    if (args->src_dtype == FST_T_I8) return !divides;
    return !args->zeros && !over && !(divides && args->src_dtype == FST_T_F4);
}

// As nvfp4.hip has it: a row is whole groups.
int check_nvfp4(const fst_scaled_args *args) {
    const uint64_t block = args->block_cols;
    if (args->scale_dtype != FST_T_F8_E4M3 || block == 0 || args->cols % block ||
        args->scales_count != args->rows * args->cols / block)
        return FST_K_SCALE;
    if (args->count == 0) return FST_K_OK;
    if (!args->src || !args->dst || !args->scales) return FST_K_NULL;
    return reinterpret_cast<uint64_t>(args->global_scale) % 4 ? FST_K_ALIGN : FST_K_OK;
}

// Of the whole matrix, but for what a part has none of.
int check_whole(const fst_scaled_args *args, const fst_box *box, uint64_t *block_rows, uint64_t *block_cols) {
    fst_scaled_args whole = *args;
    uint64_t elements;
    if (__builtin_mul_overflow(args->rows, args->cols, &elements) || elements > UINT64_MAX / 16 ||
        !is_inside(box, args->rows, args->cols))
        return FST_K_SIZE;
    whole.first = 0, whole.count = box->rows && box->cols ? elements : 0;
    if (!args->global_scale) return check_scaled(&whole, block_rows, block_cols);
    *block_rows = 1, *block_cols = args->block_cols;
    return check_nvfp4(&whole);
}

// The part's codes and scales, where they are.
template <class Codes>
int find_parts(const fst_scaled_args *args, const fst_box *box, uint64_t block_rows, uint64_t block_cols,
               Codes *codes, Grid *zeros) {
    const uint64_t width = blocks_of(args->cols, block_cols);
    const uint64_t i = box->row / block_rows, i_last = (box->row + box->rows - 1) / block_rows,
                   j = box->col / block_cols, j_last = (box->col + box->cols - 1) / block_cols;
    const unsigned bits = args->src_dtype == FST_T_F4 ? 4 : 8;
    int code = find_source(args->src, box, rows_stored(box, args->cols, bits), &codes->source);
    if (code == FST_K_OK)
        code =
            find_grid(width, box->scales_first, box->scales_pitch, i, i_last, j, j_last, &codes->scale_grid);
    if (code == FST_K_OK && args->zeros)
        code = find_grid(width, box->zeros_first, box->zeros_pitch, i, i_last, j, j_last, zeros);
    return code;
}

template <int Src>
int run_scaled(fst_queue stream, const fst_scaled_args *args, const fst_box *box, uint64_t block_rows,
               uint64_t block_cols) {
    ScaledCodes<Src> codes = {};
    const int code = find_parts(args, box, block_rows, block_cols, &codes, &codes.zero_grid);
    if (code) return code;
    codes.scales = reinterpret_cast<uint64_t>(args->scales);
    codes.zeros = reinterpret_cast<uint64_t>(args->zeros);
    codes.block_rows = divisor(block_rows), codes.block_cols = divisor(block_cols);
    codes.scale_dtype = args->scale_dtype;
    codes.factor = args->flags & FST_K_OVER_127 ? over_127 : 0;
    codes.divides = args->flags & FST_K_DIVIDE;
    return run_to(stream, codes, args->dst_dtype, args->dst, box);
}

int run_nvfp4(fst_queue stream, const fst_scaled_args *args, const fst_box *box) {
    Nvfp4Codes codes = {};
    Grid none;
    fst_scaled_args plain = *args;
    plain.zeros = nullptr;
    const int code = find_parts(&plain, box, 1, args->block_cols, &codes, &none);
    if (code) return code;
    codes.scales = reinterpret_cast<uint64_t>(args->scales);
    codes.global_scale = reinterpret_cast<uint64_t>(args->global_scale);
    codes.group = divisor(args->block_cols);
    codes.divides = args->flags & FST_K_DIVIDE;
    return run_to(stream, codes, args->dst_dtype, args->dst, box);
}

typedef int scaled_fn(fst_queue, const fst_scaled_args *, const fst_box *, uint64_t, uint64_t);

scaled_fn *find_scaled(int src) {
    switch (src) {
    case FST_T_F8_E4M3: return run_scaled<FST_T_F8_E4M3>;
    case FST_T_F8_E5M2: return run_scaled<FST_T_F8_E5M2>;
    case FST_T_F8_E4M3FNUZ: return run_scaled<FST_T_F8_E4M3FNUZ>;
    case FST_T_F8_E5M2FNUZ: return run_scaled<FST_T_F8_E5M2FNUZ>;
    case FST_T_I8: return run_scaled<FST_T_I8>;
    case FST_T_F4: return run_scaled<FST_T_F4>;
    default: return nullptr;
    }
}

// ---- Narrow floats ----

template <int Src> int run_cast(fst_queue stream, const fst_cast_args *args, const fst_box *box) {
    NarrowCodes<Src> codes = {};
    const Stored stored = rows_stored(box, box->matrix_cols, bits_of<Src>::value);
    const int code = find_source(args->src, box, stored, &codes.source);
    if (code) return code;
    return run_to(stream, codes, args->dst_dtype, args->dst, box);
}

typedef int cast_fn(fst_queue, const fst_cast_args *, const fst_box *);

cast_fn *find_cast(int src) {
    switch (src) {
    case FST_T_F4: return run_cast<FST_T_F4>;
    case FST_T_F6_E2M3: return run_cast<FST_T_F6_E2M3>;
    case FST_T_F6_E3M2: return run_cast<FST_T_F6_E3M2>;
    default: return nullptr;
    }
}

// ---- bitsandbytes' 4 bits: the high half of a byte first, scales for runs that go on from row to row ----

struct Bnb4Codes {
    using Scale = uint32_t; // F32 bits

    Source source;
    uint64_t map, absmax, nested, nested_map;
    unsigned fp4; // which values, where there is no map
    uint64_t cols, absmax_first;
    Divisor block, nested_block;
    uint32_t offset;

    FST_INLINE Line line(uint64_t row) const { return source.line(row, 0); }
    static FST_INLINE uint32_t code(const uint8_t *from, uint64_t bit, uint64_t col) {
        const uint64_t at = bit + col * 4;
        return from[at / 8] >> (~at & 4) & 15;
    }
    FST_INLINE uint64_t until(uint64_t row, uint64_t col) const {
        return (block.divide(row * cols + col) + 1) * block.value - row * cols;
    }
    FST_INLINE Scale scale_of(uint64_t row, uint64_t col) const {
        const uint64_t cell = block.divide(row * cols + col), at = cell - absmax_first;
        if (!nested) return global<const uint32_t>(absmax)[at];
        const uint32_t from_map = global<const uint32_t>(nested_map)[global<const uint8_t>(absmax)[at]];
        return add_rounded(multiply(from_map, global<const uint32_t>(nested)[nested_block.divide(cell)]),
                           offset);
    }
    FST_INLINE uint32_t value(uint32_t code, Scale by) const {
        return multiply(value_of(map, fp4, code), by);
    }
};

// Whether a launch makes sense, as bnb.hip has it: FST_K_OK, also where there is nothing to do.
int check_bnb4(const fst_bnb4_args *args, const fst_box *box) {
    if (!is_target(args->dst_dtype)) return FST_K_NO_KERNEL;
    const bool none = !box->rows || !box->cols;
    if (args->elements > UINT64_MAX / 16 || (!none && !box->matrix_cols)) return FST_K_SIZE;
    if (!none && (args->elements % box->matrix_cols ||
                  !is_inside(box, args->elements / box->matrix_cols, box->matrix_cols)))
        return FST_K_SIZE;
    if (args->block == 0 || (args->nested && args->nested_block == 0)) return FST_K_SCALE;
    if (none) return FST_K_OK;
    if (!args->src || !args->dst || !args->absmax || (args->nested && !args->nested_map))
        return FST_K_NULL;
    const uint64_t words = reinterpret_cast<uint64_t>(args->map) | reinterpret_cast<uint64_t>(args->nested) |
                           reinterpret_cast<uint64_t>(args->nested_map) |
                           (args->nested ? 0 : reinterpret_cast<uint64_t>(args->absmax));
    return words % 4 ? FST_K_ALIGN : FST_K_OK;
}

int run_bnb4(fst_queue stream, const fst_bnb4_args *args, const fst_box *box) {
    Bnb4Codes codes = {};
    const int code = find_source(args->src, box, rows_stored(box, box->matrix_cols, 4), &codes.source);
    if (code) return code;
    if ((box->row * box->matrix_cols + box->col) / args->block < box->scales_first) return FST_K_SCALE;
    codes.map = reinterpret_cast<uint64_t>(args->map), codes.fp4 = args->fp4 != 0;
    codes.absmax = reinterpret_cast<uint64_t>(args->absmax);
    codes.nested = reinterpret_cast<uint64_t>(args->nested);
    codes.nested_map = reinterpret_cast<uint64_t>(args->nested_map);
    codes.cols = box->matrix_cols, codes.absmax_first = box->scales_first;
    codes.block = divisor(args->block), codes.nested_block = divisor(args->nested ? args->nested_block : 1);
    codes.offset = fst_bits_of_float32(args->offset);
    return run_to(stream, codes, args->dst_dtype, args->dst, box);
}

} // namespace

extern "C" int FST_SYMBOL(fst_box_scaled)(fst_queue stream, const fst_scaled_args *args, const fst_box *box) {
    scaled_fn *const launcher = find_scaled(args->src_dtype);
    uint64_t block_rows = 0, block_cols = 0;
    if (!launcher || !is_target(args->dst_dtype) || !has_way(args)) return FST_K_NO_KERNEL;
    const int code = check_whole(args, box, &block_rows, &block_cols);
    if (code || !box->rows || !box->cols) return code;
    if (args->global_scale) return run_nvfp4(stream, args, box);
    return launcher(stream, args, box, block_rows, block_cols);
}

extern "C" int FST_SYMBOL(fst_box_cast)(fst_queue stream, const fst_cast_args *args, const fst_box *box) {
    cast_fn *const launcher = find_cast(args->src_dtype);
    uint64_t elements, end;
    if (!launcher || !is_target(args->dst_dtype)) return FST_K_NO_KERNEL;
    if (__builtin_add_overflow(box->row, box->rows, &end) || !is_inside(box, end, box->matrix_cols) ||
        __builtin_mul_overflow(end, box->matrix_cols, &elements) || elements > UINT64_MAX / 16)
        return FST_K_SIZE;
    if (!box->rows || !box->cols) return FST_K_OK;
    if (!args->src || !args->dst) return FST_K_NULL;
    return launcher(stream, args, box);
}

extern "C" int FST_SYMBOL(fst_box_bnb4)(fst_queue stream, const fst_bnb4_args *args, const fst_box *box) {
    const int code = check_bnb4(args, box);
    return code || !box->rows || !box->cols ? code : run_bnb4(stream, args, box);
}
