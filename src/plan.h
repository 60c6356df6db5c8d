/* The plan: tensor table and options in, list of reads, jobs and placements out. Pure: no I/O, no
 * device; everything that a load does is decided here.
 *
 * A file's data is cut into chunks, each at most `chunk_bytes` and read in one go. A chunk holds
 * pieces: parts of tensors, whole elements, in file order and without gaps. A piece goes
 *   - straight to its place (PLACE): nothing to convert and large enough for a copy of its own, or
 *   - through the staging slot and a kernel (CONVERT): casts, and small tensors that are gathered.
 * Neighbouring pieces of one kind form a run: one copy (or, on the CPU, one read).
 *
 * Quantized weights need their companions (scales and so on) on the device before their codes are converted. Tensors are
 * planned in batches: first the chunks with the companions of a batch's weights, wherever these lie, then those of its
 * tensors in file order. Companions have memory of the batch's, and no result.
 *
 * Weights that are quantized under computed scales need what is under one scale at once. Where that fits into a chunk,
 * pieces are whole rows, bands or matrices. Otherwise a tensor is cut into stripes, of as few rows as it takes, and each is
 * parked in device memory until its last piece is there; then one launch makes its codes and scales. Stripes lie in
 * windows, of which there is memory for two: a stripe of the next but one waits until all of a window are done with.
 *
 * Of tensors that are cut (cut.h) only what is wanted is read: a chunk's bytes are then gathered from extents of the file, one
 * after the other. Where results are not as contiguous as what is read, pieces are converted by kernels that know the
 * shapes. Tensors that are fused are parts of one result, which is a tensor of the plan behind all others. */
#ifndef FST_PLAN_H
#define FST_PLAN_H

#include "cut.h"
#include "header.h"
#include "quantize.h"
#include "scheme.h"

typedef struct fst_plan_options {
    fst_dtype cast;         /* of tensors without a choice of their own */
    fst_scale scale;        /* likewise */
    uint64_t  chunk_bytes;  /* of a slot */
    uint64_t  place_bytes;  /* a kept piece of at least so many bytes gets a copy of its own */
    uint64_t  block_bytes;  /* tensors share blocks of about this size; a larger one has its own */
    const fst_scheme *scheme; /* of the tensors that are not skipped; NULL: none is quantized */
    uint64_t  batch_bytes;  /* of companions; a batch has at least one weight's. 0: 16 MiB */
    uint64_t  window_bytes; /* of parked stripes; a window has at least one. 0: 8 chunks */
    unsigned  rank, ranks;  /* 0 of 0: of 1 */
    uint64_t  span_bytes;   /* of a file, that a chunk reaches over at most; 0: any */
    uint64_t  segment_bytes; /* where cut rows are shorter, whole ones may be read; 0: never */
} fst_plan_options;

#define FST_TENSOR_ALIGN 256u
#define FST_NO_BLOCK UINT32_MAX
#define FST_NO_BATCH UINT32_MAX
#define FST_NO_STRIPE UINT32_MAX
#define FST_NO_COUNTER UINT32_MAX

/* What is wanted of one tensor. */
typedef struct fst_choice {
    int       skip;         /* it is left out */
    fst_dtype cast;         /* FST_NATIVE keeps it as stored */
    void     *memory;       /* its result goes there; NULL: into a block */
    uint64_t  memory_bytes; /* how much there is */
    fst_scale scale;        /* computed, where the cast is to a type that has such */
    int32_t   shard_dim;    /* of the result, along which it is cut; FST_REPLICATE: it is not */
    uint32_t  unit;         /* parts begin at multiples of so many */
    uint64_t  begin, end;   /* the part that is wanted; both 0: the rank's */
    uint32_t  layout;       /* FST_TRANSPOSE, FST_DEINTERLEAVE */
    int32_t   into_dim;     /* of `into`, as in fst_rule */
    uint64_t  into_place;
    const char *into;       /* the result that it becomes a part of, a copy of the loading's; NULL: none */
} fst_choice;

typedef enum fst_conversion {
    FST_CONVERT_CAST,     /* or none; a weight with companions through them */
    FST_CONVERT_QUANTIZE, /* to codes under computed scales */
    FST_CONVERT_FNUZ,     /* codes of an OCP type to FNUZ, bits kept */
    FST_CONVERT_DOUBLE    /* kept, but times two: what scales such codes */
} fst_conversion;

typedef struct fst_plan_tensor {
    uint32_t  file, entry;  /* in headers[file].tensors */
    uint64_t  nbytes;       /* of the result */
    fst_dtype dtype : 8;    /* of the result */
    fst_conversion conversion : 8;
    fst_scale scale : 8;    /* QUANTIZE: how scales are counted */
    fst_dtype parked : 8;   /* QUANTIZE: what it is parked as; FST_NATIVE: it is not */
    fst_dtype scale_codes : 8;   /* of a companion that holds scales: what their codes mean; otherwise FST_NATIVE */
    uint32_t  block;        /* FST_NO_BLOCK when it has memory of its own */
    uint32_t  batch;        /* of a companion, whose memory is there at block_offset; otherwise FST_NO_BATCH */
    uint64_t  block_offset; /* a multiple of FST_TENSOR_ALIGN */
    void     *memory;
    const fst_quantized *weight;   /* that it holds the codes of and that is dequantized; or NULL */
    uint32_t  pieces;
    uint32_t  result;       /* the model's tensor that it becomes; FST_NO_TENSOR: a companion, which becomes none */
    uint32_t  first_chunk, chunks; /* that its bytes come in: neighbours */
    uint32_t  scales;       /* QUANTIZE: the tensor of its scales, one of those behind the given ones */
    uint32_t  counter;      /* QUANTIZE, FNUZ: of what is not a number; otherwise FST_NO_COUNTER */
    uint32_t  cut;          /* in `cuts`; FST_NO_CUT: all of it comes, as it is */
    uint32_t  fused;        /* the tensor that it is a part of, or FST_NO_TENSOR */
    uint32_t  next_part;    /* of the same; of one that is fused: the first */
    uint32_t  last_part;    /* of one that is fused: which comes last */
    const char *into;       /* likewise: its name; the choices' */
    uint64_t  rows, cols;   /* QUANTIZE: of a matrix */
    uint64_t  stripe_rows;  /* of a parked one: so many at a time */
} fst_plan_tensor;          /* two lines of a cache: a checkpoint may have a hundred thousand */

typedef struct fst_plan_piece {
    uint32_t tensor;
    uint32_t chunk_offset;  /* where in the chunk */
    uint32_t nbytes;        /* as stored: whole elements, at most a chunk */
    uint64_t dst_offset;    /* bytes from the start of the result's data, or of the stripe's */
    uint64_t count;         /* elements */
    uint64_t first;         /* of codes, and of what becomes such: the first element's place in its matrix, */
    uint32_t matrix;        /* one of the stack; of packed integers first and count are words, or bytes of INT4_ROWS, and
                             * dst_offset is the matrix' start */
    uint32_t stripe;        /* that it is parked in, or FST_NO_STRIPE */
} fst_plan_piece;           /* of what is boxed (cut.h), `first` is the byte of what is read of `matrix` and dst_offset 0;
                             * of what is shaped, `first` is the element of the part, and dst_offset 0 */

/* Rows of one matrix. */
typedef struct fst_plan_stripe {
    uint32_t tensor, matrix;
    uint64_t first_row, rows;
    uint64_t offset;        /* in the memory of all windows */
    uint32_t window;
    uint32_t first_chunk, chunks; /* that bring it: neighbours, each with one piece of it */
} fst_plan_stripe;

typedef enum fst_run_kind { FST_RUN_PLACE, FST_RUN_CONVERT } fst_run_kind;

typedef struct fst_plan_run {
    fst_run_kind kind;
    uint32_t first_piece, pieces; /* PLACE: exactly one piece */
    uint32_t chunk_offset, nbytes;
} fst_plan_run;

/* Bytes of a file that are one behind the other in a chunk: segments of as many bytes, at a distance in the file. */
typedef struct fst_plan_extent {
    uint64_t offset;        /* of the first, in the file */
    uint64_t pitch;         /* from one to the next */
    uint32_t segment;       /* bytes of each */
    uint32_t chunk_offset, nbytes;
} fst_plan_extent;

typedef struct fst_plan_chunk {
    uint32_t file;
    uint64_t offset;        /* in the file, from its start, of the first byte */
    uint32_t nbytes;
    uint32_t first_extent, extents;
    int      gathered;      /* its bytes are not one behind the other in the file */
    uint32_t first_run, runs;
    uint32_t jobs_bytes;    /* room for the batch jobs of its CONVERT runs, 0 when there are none */
    uint32_t batch;         /* that it brings companions of, or whose companions it needs; or FST_NO_BATCH */
    int      companions;    /* the former */
    uint32_t block;         /* that all of its results without memory of their own lie in, or FST_NO_BLOCK */
    uint32_t first_stripe, stripes; /* that it brings parts of; of one window and the next at most */
} fst_plan_chunk;

typedef struct fst_plan_batch {
    uint64_t nbytes;            /* of its companions' memory */
    uint32_t companion_chunks;  /* that must be on the device */
    uint32_t weight_chunks;     /* before these are converted */
} fst_plan_batch;

typedef struct fst_plan {
    size_t tensors_count, pieces_count, runs_count, chunks_count, blocks_count, batches_count;
    fst_plan_tensor *tensors;  /* as given: file by file, entry by entry, but those left out; then computed scales, and what is fused */
    size_t stored_count;       /* of them, without the scales and what is fused */
    fst_plan_piece  *pieces;
    fst_plan_run    *runs;
    fst_plan_chunk  *chunks;   /* by file, then offset: the order of reading */
    uint64_t        *blocks;   /* sizes */
    uint64_t bytes_read;       /* of all chunks */
    uint64_t bytes_out;        /* of all results, without padding */
    uint64_t bytes_blocks;
    uint64_t ignored;          /* tensors left out */
    fst_plan_batch *batches;
    int      converts;         /* there is a run of kind CONVERT */
    int      doubles;          /* there are tensors of conversion DOUBLE */
    size_t   stripes_count, windows_count;
    fst_plan_stripe *stripes;  /* in the order of chunks */
    uint32_t *windows;         /* stripes of each */
    uint64_t parked_bytes;     /* memory for two windows, or for the only one */
    uint32_t counters_count;
    size_t extents_count, cuts_count;
    fst_plan_extent *extents;
    fst_cut  *cuts;
    uint64_t bytes_needed;     /* of bytes_read, without what comes along */
    uint64_t bytes_pending;    /* the most of blocks between the first of a fused tensor and the one when it is complete */
} fst_plan;

/* NULL: it is whole, and as in the file. */
static inline const fst_cut *fst_plan_cut(const fst_plan *plan, const fst_plan_tensor *tensor) {
    return tensor->cut == FST_NO_CUT ? NULL : &plan->cuts[tensor->cut];
}

/* Whether pieces are launched one by one, however many a chunk has. */
static inline int fst_plan_is_alone(const fst_plan *plan, const fst_plan_tensor *tensor) {
    const fst_cut *cut = fst_plan_cut(plan, tensor);
    return tensor->weight || tensor->conversion == FST_CONVERT_FNUZ || (cut && (cut->boxed || cut->shaped)) ||
           (tensor->conversion == FST_CONVERT_QUANTIZE && !tensor->parked);
}

/* `choices`, when not NULL, has one for each tensor, file by file.
 * FST_E_NO_CAST, FST_E_UNSUPPORTED, FST_E_MEMORY, FST_E_ARG (a chunk that holds no element, memory that is too small or
 * not aligned, scales of what is no matrix, a dimension or a range that is not there, parts that do not fit together). */
fst_status fst_plan_make(const fst_header *headers, const char *const *paths, size_t files,
                         const fst_choice *choices, const fst_plan_options *options, fst_plan *out,
                         fst_error *error);
void       fst_plan_free(fst_plan *plan);

#endif
