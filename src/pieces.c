#include "pieces.h"

#include "dtype.h"

/* ---- Places ------------------------------------------------------------------------------------ */

/* Where the data of a tensor lies, or of a companion. */
static unsigned char *data_of(const fst_load_job *job, const fst_plan_tensor *tensor) {
    if (tensor->batch != FST_NO_BATCH)
        return (unsigned char *)job->batches[tensor->batch].memory + tensor->block_offset;
    if (tensor->memory) return tensor->memory;
    return (unsigned char *)atomic_load(&job->blocks[tensor->block]) + tensor->block_offset;
}

unsigned char *fst_piece_parked(const fst_load_job *job, uint32_t stripe) {
    return (unsigned char *)job->parking->memory + job->plan->stripes[stripe].offset;
}

fst_cast_args fst_piece_cast_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    int parked = piece->stripe != FST_NO_STRIPE;
    unsigned char *to = parked ? fst_piece_parked(job, piece->stripe) : data_of(job, tensor);
    return (fst_cast_args){
        .src = src,
        .dst = to + piece->dst_offset,
        .count = piece->count,
        .src_dtype = (int)job->headers[tensor->file].tensors[tensor->entry].dtype,
        .dst_dtype = (int)(parked ? tensor->parked : tensor->dtype),
        .flags = job->flags & FST_NON_SATURATING ? FST_K_NON_SATURATING : 0,
    };
}

/* Where a companion of a weight lies on the device. */
static const unsigned char *companion(const fst_load_job *job, const fst_quantized *w, fst_companion which) {
    const fst_plan_tensor *tensor = &job->plan->tensors[w->companions[which]];
    return (const unsigned char *)job->batches[tensor->batch].memory + tensor->block_offset;
}

/* The matrix of a piece, in the stack of all of the tensor. */
static uint64_t matrix_of(const fst_load_job *job, const fst_plan_piece *piece) {
    const fst_cut *cut = fst_plan_cut(job->plan, &job->plan->tensors[piece->tensor]);
    return piece->matrix + (cut ? cut->first_matrix : 0);
}

/* A companion of which only a part is there: where that begins, and how its rows are apart. */
static void companion_box(const fst_load_job *job, const fst_quantized *w, fst_companion which,
                          uint64_t *first, uint64_t *pitch) {
    *first = *pitch = 0;
    if (w->companions[which] == FST_NO_TENSOR) return;
    const fst_cut *cut = fst_plan_cut(job->plan, &job->plan->tensors[w->companions[which]]);
    if (!cut) return;
    *first = cut->row * cut->total_cols + cut->col;
    *pitch = cut->cols;
}

/* The elements of a companion that belong to the piece's matrix, each of which has `nbytes` of them in the file. `from_first`:
 * where they would begin if all were there, for kernels that count so. */
static const unsigned char *companion_of_matrix(const fst_load_job *job, const fst_plan_piece *piece,
                                                fst_companion which, uint64_t nbytes, int from_first) {
    const fst_quantized *w = job->plan->tensors[piece->tensor].weight;
    const fst_plan_tensor *tensor = &job->plan->tensors[w->companions[which]];
    const fst_cut *cut = fst_plan_cut(job->plan, tensor);
    const unsigned char *data = companion(job, w, which);
    if (!cut) return data + matrix_of(job, piece) * nbytes;
    const unsigned size = fst_dtype_bits(cut->local.dtype) / 8;
    uint64_t before = from_first ? (cut->row * cut->total_cols + cut->col) * size : 0;
    uintptr_t at = (uintptr_t)(data + piece->matrix * (cut->rows * cut->cols * size)) - (uintptr_t)before;
    return (const unsigned char *)at;
}

static int is_boxed(const fst_load_job *job, const fst_plan_piece *piece) {
    const fst_cut *cut = fst_plan_cut(job->plan, &job->plan->tensors[piece->tensor]);
    return cut && cut->boxed;
}

/* The scales of a matrix count as their kind has it. */
static fst_scaled_args scaled_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    const fst_quantized *w = tensor->weight;
    const fst_plan_tensor *scale = &job->plan->tensors[w->companions[FST_COMPANION_SCALE]];
    fst_cast_args plain = fst_piece_cast_args(job, piece, src);
    int power = scale->dtype == FST_U8 || scale->dtype == FST_F8_E8M0;
    uint64_t groups = (w->cols - 1) / w->block_cols + 1, bands = (w->rows - 1) / w->block_rows + 1;
    fst_scaled_args args = {
        .src = src,
        .dst = plain.dst,
        .scales_count = bands * groups,
        .rows = w->rows,
        .cols = w->cols,
        .first = piece->first,
        .count = piece->count,
        .src_dtype = w->bits == 4 ? FST_F4 : plain.src_dtype,
        .dst_dtype = plain.dst_dtype,
        .scale_dtype = power ? FST_F8_E8M0 : (int)scale->dtype,
        .kind = FST_SCALE_BLOCK,
        .block_rows = w->block_rows,
        .block_cols = w->block_cols,
    };
    if (w->block_rows == 1) args.kind = w->block_cols == w->cols ? FST_SCALE_ROW : FST_SCALE_GROUP;
    if (bands == 1 && groups == 1) args.kind = FST_SCALE_TENSOR;
    args.scales = companion_of_matrix(job, piece, FST_COMPANION_SCALE,
                                      args.scales_count * fst_dtype_bits((fst_dtype)args.scale_dtype) / 8,
                                      !is_boxed(job, piece));
    if (w->format == FST_FORMAT_NVFP4) {
        const fst_plan_tensor *global = &job->plan->tensors[w->companions[FST_COMPANION_GLOBAL]];
        args.kind = FST_SCALE_GROUP; /* also where there is but one group: its scale is one of groups */
        args.global_scale =
            companion(job, w, FST_COMPANION_GLOBAL) + (global->nbytes > 4 ? matrix_of(job, piece) * 4 : 0);
    }
    if (w->flags & FST_Q_BYTE_ZEROS)
        args.zeros =
            companion_of_matrix(job, piece, FST_COMPANION_ZERO, args.scales_count, !is_boxed(job, piece));
    args.flags = w->flags & FST_Q_DIVIDE ? FST_K_DIVIDE : 0;
    if (w->format == FST_FORMAT_BNB_INT8) args.flags |= FST_K_OVER_127;
    return args;
}

/* Makes codes and scales of whole rows, bands or matrices at `src`. */
int fst_piece_quantize(fst_worker *w, const fst_load_job *job, uint32_t index, const void *src,
                        fst_dtype dtype, uint32_t matrix, uint64_t first_row, uint64_t rows) {
    static const int kinds[] = {[FST_QUANTIZE_TENSOR] = FST_SCALE_TENSOR,
                                [FST_QUANTIZE_ROW] = FST_SCALE_ROW,
                                [FST_QUANTIZE_BLOCK] = FST_SCALE_BLOCK};
    const fst_plan_tensor *tensor = &job->plan->tensors[index];
    uint64_t rows_of_scales = fst_quantize_scale_rows(tensor->scale, tensor->rows);
    uint64_t before = tensor->scale == FST_QUANTIZE_ROW     ? first_row
                      : tensor->scale == FST_QUANTIZE_BLOCK ? first_row / FST_QUANTIZE_TILE
                                                            : 0;
    float *scales = (float *)(void *)data_of(job, &job->plan->tensors[tensor->scales]);
    fst_quantize_args args = {
        .src = src,
        .dst = data_of(job, tensor) + (matrix * tensor->rows + first_row) * tensor->cols,
        .scales = scales +
                  (matrix * rows_of_scales + before) * fst_quantize_scale_cols(tensor->scale, tensor->cols),
        .nans = job->parking->counters + tensor->counter,
        .rows = rows,
        .cols = tensor->cols,
        .src_dtype = (int)dtype,
        .dst_dtype = (int)tensor->dtype,
        .kind = kinds[tensor->scale],
    };
    return w->engine->gpu->kernels->quantize(w->stream, &args);
}

static int launch_alone(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece, const void *src,
                        const fst_cast_args *plain) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    if (tensor->conversion == FST_CONVERT_QUANTIZE)
        return fst_piece_quantize(w, job, piece->tensor, src, (fst_dtype)plain->src_dtype, piece->matrix,
                                   piece->first / tensor->cols, piece->count / tensor->cols);
    fst_fnuz_args args = {plain->src, plain->dst, plain->count, plain->src_dtype,
                          job->parking->counters + tensor->counter};
    return w->engine->gpu->kernels->fnuz(w->stream, &args);
}

/* bitsandbytes' 4 bits. */
static fst_bnb4_args bnb4_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_quantized *w = job->plan->tensors[piece->tensor].weight;
    const int nested = w->companions[FST_COMPANION_NESTED] != FST_NO_TENSOR;
    const int mapped = w->companions[FST_COMPANION_MAP] != FST_NO_TENSOR;
    fst_cast_args plain = fst_piece_cast_args(job, piece, src);
    return (fst_bnb4_args){
        .src = src,
        .dst = plain.dst,
        .map = mapped ? companion(job, w, FST_COMPANION_MAP) : NULL,
        .fp4 = w->format == FST_FORMAT_BNB_FP4,
        .absmax = companion(job, w, FST_COMPANION_SCALE),
        .nested = nested ? companion(job, w, FST_COMPANION_NESTED) : NULL,
        .nested_map = nested ? companion(job, w, FST_COMPANION_NESTED_MAP) : NULL,
        .offset = w->nested_offset,
        .dst_dtype = plain.dst_dtype,
        .elements = w->rows * w->cols,
        .first = piece->first,
        .count = piece->count,
        .block = w->block_cols,
        .nested_block = w->nested_block,
    };
}

static int packing_of(const fst_quantized *w) {
    switch (w->format) {
    case FST_FORMAT_GPTQ: return FST_PACKED_COLUMN;
    case FST_FORMAT_AWQ:
    case FST_FORMAT_INT4_QUARK: return FST_PACKED_TRANSPOSED;
    case FST_FORMAT_INT4_ROWS: return FST_PACKED_PAIRS;
    default: return FST_PACKED_ROW;
    }
}

static int zeros_of(const fst_quantized *w) {
    if (w->companions[FST_COMPANION_ZERO] == FST_NO_TENSOR) return FST_ZEROS_NONE;
    if (w->flags & FST_Q_BYTE_ZEROS) return FST_ZEROS_BYTES;
    if (w->format == FST_FORMAT_PACKED) return FST_ZEROS_COLUMNS;
    return w->format == FST_FORMAT_AWQ_GEMV ? FST_ZEROS_GROUPS : FST_ZEROS_ROWS;
}

static unsigned packed_flags(const fst_quantized *w) {
    static const unsigned flags[][2] = {{FST_Q_PADDED, FST_K_PADDED},
                                        {FST_Q_AWQ_ORDER, FST_K_AWQ_ORDER},
                                        {FST_Q_OFFSET, FST_K_OFFSET},
                                        {FST_Q_SIGNED, FST_K_SIGNED},
                                        {FST_Q_ZERO_PLUS_ONE, FST_K_ZERO_PLUS_ONE}};
    unsigned all = 0;
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (w->flags & flags[i][0]) all |= flags[i][1];
    /* Whole words are only counted up where codes fill them. */
    if ((w->flags & FST_Q_CARRY) && 32 % w->bits == 0) all ^= FST_K_ZERO_PLUS_ONE | FST_K_ZERO_CARRY;
    return all;
}

/* Of a tensor, in its file. */
static uint64_t stored_bytes(const fst_load_job *job, uint32_t index) {
    const fst_plan_tensor *tensor = &job->plan->tensors[index];
    const fst_entry *entry = &job->headers[tensor->file].tensors[tensor->entry];
    return entry->end - entry->begin;
}

/* The bytes of a companion that has as much for each matrix of the stack. */
static const unsigned char *part_of(const fst_load_job *job, const fst_plan_piece *piece,
                                    fst_companion which) {
    const fst_quantized *w = job->plan->tensors[piece->tensor].weight;
    if (w->companions[which] == FST_NO_TENSOR) return NULL;
    return companion_of_matrix(job, piece, which, stored_bytes(job, w->companions[which]) / w->stack,
                               !is_boxed(job, piece));
}

static fst_packed_args packed_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_quantized *w = job->plan->tensors[piece->tensor].weight;
    const fst_plan_tensor *scale = &job->plan->tensors[w->companions[FST_COMPANION_SCALE]];
    fst_cast_args plain = fst_piece_cast_args(job, piece, src);
    const fst_cut *cut = fst_plan_cut(job->plan, &job->plan->tensors[piece->tensor]);
    uint64_t scales =
        stored_bytes(job, w->companions[FST_COMPANION_SCALE]) / (fst_dtype_bits(scale->dtype) / 8);
    /* The kernel counts rows from the matrix' first, which a part need not have. */
    uint64_t before = cut ? cut->row * w->cols * (fst_dtype_bits((fst_dtype)plain.dst_dtype) / 8) : 0;
    return (fst_packed_args){
        .src = src,
        .dst = (void *)((uintptr_t)plain.dst - (uintptr_t)before),
        .scales = part_of(job, piece, FST_COMPANION_SCALE),
        .zeros = part_of(job, piece, FST_COMPANION_ZERO),
        .groups =
            w->flags & FST_Q_PLAIN_GROUPS ? NULL : (const void *)part_of(job, piece, FST_COMPANION_GROUPS),
        .rows = w->rows,
        .cols = w->cols,
        .first = piece->first,
        .count = piece->count,
        .group = w->block_cols,
        .groups_count = scales / w->stack / w->rows,
        .bits = w->bits,
        .dst_dtype = plain.dst_dtype,
        .scale_dtype = (int)scale->dtype,
        .layout = packing_of(w),
        .zeros_kind = zeros_of(w),
        .flags = packed_flags(w),
    };
}

static int launch_packed(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece,
                         const void *src) {
    fst_packed_args args = packed_args(job, piece, src);
    return w->engine->gpu->kernels->packed(w->stream, &args);
}

/* ---- Parts, and results of another shape --------------------------------------------------------------- */

static int is_bnb4(const fst_quantized *weight) {
    return weight && (weight->format == FST_FORMAT_BNB_NF4 || weight->format == FST_FORMAT_BNB_FP4);
}

/* The elements of an area of a piece whose rows were read whole. */
static int launch_rows(fst_worker *w, const fst_cut *cut, const fst_cut_area *area,
                       const fst_cast_args *plain) {
    const unsigned src_size = fst_dtype_bits((fst_dtype)plain->src_dtype) / 8;
    const unsigned dst_size = fst_dtype_bits((fst_dtype)plain->dst_dtype) / 8;
    fst_rows_args args = {
        .src = (const unsigned char *)plain->src + area->col * src_size,
        .dst = (unsigned char *)plain->dst + (area->row - cut->row) * cut->dst_row * dst_size,
        .cols = area->cols,
        .ndim = 1,
        .extent = {area->rows},
        .src_stride = {cut->total_cols},
        .dst_stride = {cut->dst_row},
        .src_dtype = plain->src_dtype,
        .dst_dtype = plain->dst_dtype,
        .flags = plain->flags,
    };
    return w->engine->gpu->kernels->rows(w->stream, &args);
}

/* What kernels count in all of the matrix. */
static int launch_boxed(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece,
                        const void *src) {
    const fst_kernels *kernels = w->engine->gpu->kernels;
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    const fst_cut *cut = fst_plan_cut(job->plan, tensor);
    const fst_quantized *weight = tensor->weight;
    const unsigned bits = weight ? weight->bits : fst_dtype_bits(cut->local.dtype);
    const int parked = piece->stripe != FST_NO_STRIPE, padded = weight && weight->flags & FST_Q_PADDED;
    fst_cut_area areas[3];
    fst_box box = {.src_pitch = cut->storage == FST_STORED_FLAT ? 0 : cut->row_bytes,
                   .origin_row = cut->row,
                   .origin_col = cut->col,
                   .dst_row = parked ? cut->cols : cut->dst_row,
                   .dst_col = parked ? 1 : cut->dst_col,
                   .dst_half = parked ? 0 : cut->dst_half,
                   .matrix_cols = cut->total_cols};
    unsigned count =
        fst_cut_areas(cut, bits, padded, piece->first, piece->nbytes, areas, &box.src_row, &box.src_byte);
    fst_cast_args plain = fst_piece_cast_args(job, piece, src);
    if (weight) {
        companion_box(job, weight, FST_COMPANION_SCALE, &box.scales_first, &box.scales_pitch);
        companion_box(job, weight, FST_COMPANION_ZERO, &box.zeros_first, &box.zeros_pitch);
    }
    if (!parked)
        plain.dst = (unsigned char *)plain.dst +
                    piece->matrix * cut->dst_matrix * fst_dtype_bits((fst_dtype)plain.dst_dtype) / 8;
    int code = 0;
    for (unsigned i = 0; i < count && !code; i++) {
        box.row = areas[i].row, box.rows = areas[i].rows;
        box.col = areas[i].col, box.cols = areas[i].cols;
        w->stats.launches++;
        if (cut->whole_rows) {
            code = launch_rows(w, cut, &areas[i], &plain);
        } else if (!weight) {
            code = kernels->box_cast(w->stream, &plain, &box);
        } else if (is_bnb4(weight)) {
            fst_bnb4_args args = bnb4_args(job, piece, src);
            args.dst = plain.dst;
            code = kernels->box_bnb4(w->stream, &args, &box);
        } else if (fst_scheme_is_packed(weight)) {
            fst_packed_args args = packed_args(job, piece, src);
            args.dst = plain.dst;
            code = kernels->box_packed(w->stream, &args, &box);
        } else {
            fst_scaled_args args = scaled_args(job, piece, src);
            args.dst = plain.dst;
            code = kernels->box_scaled(w->stream, &args, &box);
        }
    }
    return code;
}

/* Rows of a part to their places in a result that has others between them, or in another order. `step`: every second one. */
static int launch_area(fst_worker *w, const fst_cut *cut, const fst_cut_area *area, unsigned step,
                       const fst_cast_args *plain) {
    const fst_kernels *kernels = w->engine->gpu->kernels;
    w->stats.launches++;
    if (cut->dst_col == 1) {
        fst_rows_args args = {.src = plain->src,
                              .dst = plain->dst,
                              .cols = area->cols,
                              .ndim = 1,
                              .extent = {area->rows},
                              .src_stride = {step * cut->cols},
                              .dst_stride = {cut->dst_row},
                              .src_dtype = plain->src_dtype,
                              .dst_dtype = plain->dst_dtype,
                              .flags = plain->flags};
        return kernels->rows(w->stream, &args);
    }
    fst_transpose_args args = {.src = plain->src,
                               .dst = plain->dst,
                               .batch = 1,
                               .rows = area->rows,
                               .cols = area->cols,
                               .src_stride = step * cut->cols,
                               .dst_stride = cut->dst_col,
                               .src_dtype = plain->src_dtype,
                               .dst_dtype = plain->dst_dtype,
                               .flags = plain->flags};
    return kernels->transpose(w->stream, &args);
}

static int launch_shaped(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece,
                         const void *src) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    const fst_cut *cut = fst_plan_cut(job->plan, tensor);
    const fst_cast_args plain = fst_piece_cast_args(job, piece, src);
    const uint64_t src_size = fst_dtype_bits((fst_dtype)plain.src_dtype) / 8;
    const uint64_t dst_size = fst_dtype_bits((fst_dtype)plain.dst_dtype) / 8;
    const unsigned step = cut->dst_half ? 2 : 1;
    fst_cut_area areas[3];
    unsigned count = fst_cut_split(piece->first, piece->count, cut->cols, areas);
    int code = 0;
    for (unsigned i = 0; i < count && !code; i++)
        for (unsigned k = 0; k < step && k < areas[i].rows && !code; k++) {
            fst_cut_area area = areas[i];
            area.row += k;
            area.rows = (area.rows - k + step - 1) / step;
            uint64_t row = cut->dst_half ? area.row / 2 + area.row % 2 * cut->dst_half : area.row;
            fst_cast_args args = plain;
            args.src = (const unsigned char *)plain.src +
                       (area.row * cut->cols + area.col - piece->first) * src_size;
            args.dst =
                (unsigned char *)plain.dst +
                (piece->matrix * cut->dst_matrix + row * cut->dst_row + area.col * cut->dst_col) * dst_size;
            code = launch_area(w, cut, &area, step, &args);
        }
    return code;
}

int fst_piece_launch(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_kernels *kernels = w->engine->gpu->kernels;
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    const fst_cut *cut = fst_plan_cut(job->plan, tensor);
    const fst_quantized *weight = tensor->weight;
    if (cut && cut->boxed) return launch_boxed(w, job, piece, src);
    if (cut && cut->shaped) return launch_shaped(w, job, piece, src);
    w->stats.launches++;
    if (is_bnb4(weight)) {
        fst_bnb4_args args = bnb4_args(job, piece, src);
        return kernels->bnb4(w->stream, &args);
    }
    if (weight && fst_scheme_is_packed(weight)) return launch_packed(w, job, piece, src);
    if (weight) {
        fst_scaled_args args = scaled_args(job, piece, src);
        return kernels->scaled(w->stream, &args);
    }
    fst_cast_args args = fst_piece_cast_args(job, piece, src);
    if (fst_plan_is_alone(job->plan, tensor)) return launch_alone(w, job, piece, src, &args);
    return kernels->cast(w->stream, &args);
}
