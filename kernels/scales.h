// Scales of a matrix: how they are loaded, where that of an element is, and what is asked of the arguments.
#ifndef FST_SCALES_H
#define FST_SCALES_H

#include "pack.h"
#include "product.h"

namespace {

constexpr uint32_t over_127 = 0x3C010204; // RN32(1 / 127)

// Codes of 8, 6 and 4 bits -> F32 bits, exactly.
template <int Src> FST_FN uint32_t decode(uint32_t code) {
    if constexpr (Src == FST_T_I8) return fst_bits_of_float32(static_cast<float>(static_cast<int8_t>(code)));
    else return fst_decode32(code, fst_float_of(Src));
}

// Two choices: of more, NVIDIA's compiler makes a table of jumps.
FST_FN uint32_t load_scale(uint64_t scales, int dtype, uint64_t index) {
    if (dtype == FST_T_F32) return global<const uint32_t>(scales)[index];
    if (dtype == FST_T_F8_E8M0)
        return fst_decode32(global<const uint8_t>(scales)[index], fst_float_of(FST_T_F8_E8M0));
    const uint32_t code = global<const uint16_t>(scales)[index];
    return dtype == FST_T_BF16 ? code << 16 : fst_decode32(code, fst_float_of(FST_T_F16));
}

inline bool is_scale(int dtype) {
    return dtype == FST_T_F32 || dtype == FST_T_F16 || dtype == FST_T_BF16 || dtype == FST_T_F8_E8M0;
}

inline uint64_t blocks_of(uint64_t size, uint64_t block) { return size / block + (size % block != 0); }

// Every kind as blocks of rows x cols. False where there is no such kind.
inline bool find_blocks(const fst_scaled_args *args, uint64_t *rows, uint64_t *cols) {
    *rows = 1, *cols = args->cols;
    switch (args->kind) {
    case FST_SCALE_TENSOR: *rows = args->rows; return true;
    case FST_SCALE_ROW: return true;
    case FST_SCALE_GROUP: *cols = args->block_cols; return true;
    case FST_SCALE_BLOCK: *rows = args->block_rows, *cols = args->block_cols; return true;
    default: return false;
    }
}

// How many scales there must be, also for a matrix without elements.
inline uint64_t scales_of(const fst_scaled_args *args, uint64_t block_rows, uint64_t block_cols) {
    if (args->kind == FST_SCALE_TENSOR) return 1;
    if (args->kind == FST_SCALE_ROW) return args->rows;
    return blocks_of(args->rows, block_rows) * blocks_of(args->cols, block_cols);
}

// Whether a launch makes sense: FST_K_OK, also where there is nothing to do. The blocks are those of find_blocks.
inline int check_scaled(const fst_scaled_args *args, uint64_t *block_rows, uint64_t *block_cols) {
    uint64_t elements, end;
    if (!find_blocks(args, block_rows, block_cols)) return FST_K_NO_KERNEL;
    if (__builtin_mul_overflow(args->rows, args->cols, &elements) || elements > UINT64_MAX / 16 ||
        __builtin_add_overflow(args->first, args->count, &end) || end > elements)
        return FST_K_SIZE;
    if (args->src_dtype == FST_T_F4 && (args->first % 2 || (args->count % 2 && end != elements)))
        return FST_K_SIZE;
    if (!is_scale(args->scale_dtype)) return FST_K_SCALE;
    const bool sized = args->kind == FST_SCALE_GROUP || args->kind == FST_SCALE_BLOCK;
    if (sized && (*block_rows == 0 || *block_cols == 0)) return FST_K_SCALE;
    if (scales_of(args, *block_rows, *block_cols) != args->scales_count) return FST_K_SCALE;
    if (args->count == 0) return FST_K_OK;
    if (!args->src || !args->dst || !args->scales) return FST_K_NULL;
    const unsigned dst_size = fst_type_bits(args->dst_dtype) / 8,
                   scale_size = fst_type_bits(args->scale_dtype) / 8;
    if (reinterpret_cast<uint64_t>(args->dst) % dst_size ||
        reinterpret_cast<uint64_t>(args->scales) % scale_size)
        return FST_K_ALIGN;
    return FST_K_OK;
}

} // namespace
#endif
