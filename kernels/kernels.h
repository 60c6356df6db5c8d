/* The kernels' whole interface: plain data in, a status back. Compiled once for each device (HIP,
 * CUDA, and the CPU at three x86-64 levels), each copy behind one table of functions. */
#ifndef FST_KERNELS_H
#define FST_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A hipStream_t or cudaStream_t; NULL on the CPU, where a launch returns when it is done. */
typedef void *fst_queue;

/* 0, a HIP or CUDA error (> 0), or one of these, found before anything is launched. */
enum {
    FST_K_OK = 0,
    FST_K_NO_KERNEL = -1,  /* this pair of types does not exist */
    FST_K_NULL = -2,       /* a null pointer with work to do */
    FST_K_ALIGN = -3,      /* a destination not aligned to its element */
    FST_K_SIZE = -4,       /* a count whose bytes overflow, or a range outside its matrix */
    FST_K_STRIDE = -5,     /* a stride shorter than what it steps over */
    FST_K_SCALE = -6       /* a scale tensor of the wrong size or dtype */
};

enum {
    FST_K_NON_SATURATING = 1u << 0,
    FST_K_DIVIDE = 1u << 1,  /* by the scale of an fst_scaled_args, or by the global one where there is one */
    FST_K_OVER_127 = 1u << 2 /* of an fst_scaled_args: the product is multiplied once more, by RN32(1 / 127) */
};

/* `count` elements, contiguous. `src` may have any byte alignment, `dst` that of its element. They do
 * not overlap. src_dtype == dst_dtype is a copy (the realignment of any dtype, integers included). */
typedef struct fst_cast_args {
    const void *src;
    void       *dst;
    uint64_t    count;
    int         src_dtype;  /* fst_dtype values; kernels know them from dtype_list.h */
    int         dst_dtype;
    unsigned    flags;
} fst_cast_args;

/* One of many small casts of one pair that go in one launch. On a GPU the list is in device memory. */
typedef struct fst_batch_job {
    uint64_t src;        /* address, any alignment */
    uint64_t dst;        /* address, aligned to the element */
    uint64_t count;      /* elements */
    uint64_t first_tile; /* tiles of the jobs before this one: fst_batch_tiles summed up */
} fst_batch_job;

typedef struct fst_batch_args {
    const fst_batch_job *jobs;  /* where the kernel can read it */
    uint32_t jobs_count;
    uint64_t tiles;             /* of all jobs */
    int      src_dtype;
    int      dst_dtype;
    unsigned flags;
} fst_batch_args;

/* Elements that one tile of a batch covers: first_tile counts in ceil(count / FST_BATCH_TILE). */
#define FST_BATCH_TILE 2048u

/* How a matrix is scaled: one scale for all, one a row, one for each `block_cols` elements along a row, one
 * for each block of block_rows x block_cols (the last ones may be ragged). The scale tensor is row-major and has
 * 1 | rows | rows x ceil(cols / block_cols) | ceil(rows / block_rows) x ceil(cols / block_cols) elements. */
typedef enum fst_scale_kind { FST_SCALE_TENSOR, FST_SCALE_ROW, FST_SCALE_GROUP, FST_SCALE_BLOCK } fst_scale_kind;

/* Elements [first, first + count) of a row-major matrix of rows x cols, times their scales:
 * dst = round(RN32(f32(code) x f32(scale))), two roundings, as the formats' references do. A range may begin
 * and end anywhere (F4: at even elements), because the chunks of a file do.
 *
 * F4 may have scales of F8_E4M3 under one global F32 scale (NVFP4): each is RN32(f32(scale) x global), or, with
 * FST_K_DIVIDE, RN32(f32(scale) / global), before it multiplies. Codes of F8 may be divided by their scales
 * (FST_K_DIVIDE); I8 may have zero points, one for each scale, that are subtracted first (exactly), or be scaled as
 * bitsandbytes does: RN32(RN32(code x scale) x RN32(1 / 127)). */
typedef struct fst_scaled_args {
    const void *src;         /* of element `first`; any byte alignment */
    void       *dst;         /* of element `first`; aligned to its element */
    const void *scales;      /* of the whole matrix, aligned to its element. NaN and Inf: as arithmetic says */
    uint64_t    scales_count;
    uint64_t    rows, cols;
    uint64_t    first, count;
    int         src_dtype;   /* F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, I8, F4 (the low half first) */
    int         dst_dtype;   /* F32, F16, BF16 */
    int         scale_dtype; /* F32, F16, BF16, F8_E8M0; F8_E4M3 with a global scale */
    int         kind;        /* an fst_scale_kind */
    uint64_t    block_rows, block_cols;
    const void *global_scale; /* one F32, or NULL */
    unsigned    flags;       /* FST_K_DIVIDE, FST_K_OVER_127 */
    const void *zeros;       /* I8, as many as there are scales; or NULL */
} fst_scaled_args;

/* bitsandbytes' 4 bits: elements [first, first + count) of a flat run of `elements`, two in a byte, the high half
 * first: dst = round(RN32(map[code] x A[i / block])). A[b] is absmax[b], F32, or, with `nested`, whose codes are U8,
 * RN32(RN32(nested_map[absmax[b]] x nested[b / nested_block]) + offset). `first` is even, and so is `count` but at the
 * end. */
typedef struct fst_bnb4_args {
    const void *src;         /* of element `first`; any byte alignment */
    void       *dst;         /* of element `first`; aligned to its element */
    const void *map;         /* 16 F32; NULL: bitsandbytes' own */
    const void *absmax;      /* of the whole run */
    const void *nested;      /* F32, or NULL */
    const void *nested_map;  /* 256 F32 */
    float       offset;
    int         dst_dtype;   /* F32, F16, BF16 */
    uint64_t    elements, first, count;
    uint64_t    block, nested_block;
    int         fp4;         /* without a map: FP4's values, not NF4's */
} fst_bnb4_args;

/* How packed integers lie, and the zero points of scales. */
typedef enum fst_packing {
    FST_PACKED_ROW,        /* along a row: [rows, words] */
    FST_PACKED_PAIRS,      /* bytes [rows / 2, cols], the low half is the first row's */
    FST_PACKED_COLUMN,     /* [words, rows], along cols: GPTQ */
    FST_PACKED_TRANSPOSED  /* [cols, words], eight rows in a word: AWQ, Quark */
} fst_packing;
typedef enum fst_zeros_kind {
    FST_ZEROS_NONE,
    FST_ZEROS_BYTES,       /* I8 [rows, groups], of codes less 2^(bits - 1) */
    FST_ZEROS_ROWS,        /* packed along rows: [groups, words] */
    FST_ZEROS_COLUMNS,     /* the same, [words, groups] */
    FST_ZEROS_GROUPS       /* packed along groups: [rows, words] */
} fst_zeros_kind;
enum {
    FST_K_PADDED = 1u << 2,        /* no code in two words: 32 / bits of them in a word */
    FST_K_AWQ_ORDER = 1u << 3,     /* the eight codes of a word, and zero points, are at bits 0 16 4 20 8 24 12 28 */
    FST_K_OFFSET = 1u << 4,        /* codes are stored plus 2^(bits - 1); packed zero points, too */
    FST_K_SIGNED = 1u << 5,        /* codes are two's complement; no zero points */
    FST_K_ZERO_PLUS_ONE = 1u << 6, /* zero points are stored less one */
    FST_K_ZERO_CARRY = 1u << 7     /* likewise, less one in every code of a word, with borrows from one to the next */
};

/* Words [first, first + count) of a matrix of packed integers (bytes of FST_PACKED_PAIRS) to their places in the result,
 * which is [rows, cols] in every layout: dst = round(RN32(f32(code - zero) x f32(scale))). A code that lies in two words
 * comes with both: then a range begins and ends at a row's start, or bits x n words behind it (FST_PACKED_ROW), or at
 * whole `bits` rows of words (FST_PACKED_COLUMN). Scales are [groups, rows] in the last two layouts, else [rows, groups]. */
typedef struct fst_packed_args {
    const void *src;          /* of word `first`; any byte alignment */
    void       *dst;          /* of the whole result; aligned to its element */
    const void *scales;       /* F32, F16, BF16; aligned to its element */
    const void *zeros;        /* aligned to words (FST_ZEROS_BYTES: to bytes) */
    const int32_t *groups;    /* of each column, below groups_count; NULL: col / group */
    uint64_t    rows, cols;
    uint64_t    first, count;
    uint64_t    group, groups_count; /* there may be more groups than cols / group: they are stepped over */
    unsigned    bits;         /* 1 to 8; FST_PACKED_COLUMN 2, 3, 4, 8; FST_PACKED_PAIRS and _TRANSPOSED 4 */
    int         dst_dtype;    /* F32, F16, BF16 */
    int         scale_dtype;
    int         layout;       /* an fst_packing */
    int         zeros_kind;   /* an fst_zeros_kind */
    unsigned    flags;
} fst_packed_args;

/* F32, F16 or BF16 -> F8_E4M3 (M = 448), F8_E4M3FNUZ (224) or F8_E5M2 (57344) with computed scales:
 * s = RN32(amax / M), 1 where amax is 0 or so small that s would be; code = encode(RN32(x / s)), saturating. Inf
 * enters amax as the largest finite value of its type; a NaN makes amax, the scale and all codes under it NaN.
 * Scales are as FST_SCALE_TENSOR, _ROW or _BLOCK (128 x 128) count them, all written also where there are no elements. */
typedef struct fst_quantize_args {
    const void *src;         /* rows x cols, contiguous; any byte alignment */
    void       *dst;
    float      *scales;
    uint64_t   *nans;        /* NULL, or raised by the number of NaNs in src */
    uint64_t    rows, cols;
    int         src_dtype, dst_dtype;
    int         kind;        /* an fst_scale_kind */
} fst_quantize_args;

/* Rows of `cols` elements from anywhere to anywhere, with or without a cast on the way: slices of any box (the
 * result contiguous), packing into a wider result (the source contiguous), every second row apart (extents 2 and
 * rows / 2). Strides in elements, of the outer dimensions; their order is all the same, an extent of 1 leaves its stride
 * without meaning. Each is at least cols; one of the destination at least what the dimensions of smaller strides
 * cover, so that nothing is written twice. Gaps between rows of the source may be read, those of the destination are
 * not written. Sub-byte types are copied where rows and strides fill whole bytes. */
#define FST_ROWS_DIMS 7
typedef struct fst_rows_args {
    const void *src;         /* any byte alignment */
    void       *dst;
    uint64_t    cols;        /* contiguous elements of a row, on both sides */
    uint32_t    ndim;        /* outer dimensions */
    uint64_t    extent[FST_ROWS_DIMS], src_stride[FST_ROWS_DIMS], dst_stride[FST_ROWS_DIMS];
    int         src_dtype, dst_dtype;
    unsigned    flags;
} fst_rows_args;

/* dst[b][c][r] = src[b][r][c], with or without a cast on the way. */
typedef struct fst_transpose_args {
    const void *src;
    void       *dst;
    uint64_t    batch, rows, cols;      /* of the source */
    uint64_t    src_stride, dst_stride; /* elements from a row to the next: at least cols, at least rows */
    uint64_t    src_batch_stride, dst_batch_stride;
    int         src_dtype, dst_dtype;
    unsigned    flags;
} fst_transpose_args;

/* OCP fp8 to FNUZ as MI300 needs it: the bits stay, but 80 becomes 00. Every value is then half of what it was,
 * and the caller doubles the scale. NaN and Inf would turn into numbers: *nans counts them, to be refused. */
typedef struct fst_fnuz_args {
    const void *src;
    void       *dst;
    uint64_t    count;
    int         src_dtype;   /* F8_E4M3, F8_E5M2 */
    uint64_t   *nans;
} fst_fnuz_args;

/* A part of a matrix of codes, [row, row + rows) x [col, col + cols) of the whole one, which other arguments describe (their
 * `src` and `dst` as below, `first` and `count` without meaning; of fst_bnb4_args and fst_cast_args, matrix_cols says how
 * long a whole row is), for shards: everything is counted in the whole matrix, so that a border may cut blocks, groups
 * and words.
 *
 * Codes are stored in rows: of the matrix (FST_PACKED_ROW and what is not packed), of pairs of rows (FST_PACKED_PAIRS), of
 * words across its columns (FST_PACKED_COLUMN), of its columns (FST_PACKED_TRANSPOSED). `src` is byte src_byte of stored
 * row src_row, other rows are src_pitch bytes apart. src_pitch 0: it is byte src_byte of all that is stored (of all kinds;
 * the only way where rows do not fill bytes, as they need not in bitsandbytes' 4 bits, F4 and F6). All bytes that hold
 * codes of the part are there, no others are touched. The part may begin behind `src`, not before it.
 *
 * dst is the result's first element, which element (origin_row, origin_col) becomes; others lie dst_row and dst_col
 * elements apart: any steps that put no two elements of the part in one place, the larger one beyond all that the smaller
 * one covers. With dst_half, row 2 i + k of the result goes to row i + k x dst_half, and i is below dst_half.
 *
 * `scales` begins with element scales_first of all scales, and its rows are scales_pitch elements apart (0: as far as those
 * of all scales); `zeros` likewise, in words or bytes; of `absmax` scales_first alone. Counts are those of all scales.
 * Pointers are aligned as the arguments have it. g_idx, maps and nested scales are whole. */
typedef struct fst_box {
    uint64_t row, col, rows, cols;
    uint64_t src_row, src_byte, src_pitch;
    uint64_t origin_row, origin_col, dst_row, dst_col, dst_half;
    uint64_t scales_first, scales_pitch;
    uint64_t zeros_first, zeros_pitch;
    uint64_t matrix_cols; /* for box_bnb4, box_cast */
} fst_box;

typedef struct fst_kernels {
    int (*cast)(fst_queue stream, const fst_cast_args *args);
    int (*batch)(fst_queue stream, const fst_batch_args *args);
    int (*scaled)(fst_queue stream, const fst_scaled_args *args);
    int (*quantize)(fst_queue stream, const fst_quantize_args *args);
    int (*rows)(fst_queue stream, const fst_rows_args *args);
    int (*transpose)(fst_queue stream, const fst_transpose_args *args);
    int (*fnuz)(fst_queue stream, const fst_fnuz_args *args);
    int (*bnb4)(fst_queue stream, const fst_bnb4_args *args);
    int (*packed)(fst_queue stream, const fst_packed_args *args);
    /* What the same without box_ make of the part, bit for bit. box_cast: F4 and F6 to F32, F16, BF16. */
    int (*box_scaled)(fst_queue stream, const fst_scaled_args *args, const fst_box *box);
    int (*box_bnb4)(fst_queue stream, const fst_bnb4_args *args, const fst_box *box);
    int (*box_packed)(fst_queue stream, const fst_packed_args *args, const fst_box *box);
    int (*box_cast)(fst_queue stream, const fst_cast_args *args, const fst_box *box);
    const char *target; /* "x86-64-v3", "hip", "cuda" */
} fst_kernels;

/* 1 when cast and batch exist for this pair: every ordered pair of F64, F32, F16, BF16 and the four F8 with a mantissa;
 * F8_E8M0, F6 and F4 to F32, F16 and BF16; X -> X for every dtype. One rule for plan and kernels (numeric.h). rows and
 * transpose have the same pairs but for the last two kinds: no narrow source; a transpose needs whole bytes. */
int fst_kernels_have(int src_dtype, int dst_dtype);

/* The CPU's table, chosen once by what the processor has. */
const fst_kernels *fst_kernels_cpu(void);

/* The same for one level of x86-64 (2, 3, 4); NULL when the processor, or this build, lacks it. */
const fst_kernels *fst_kernels_cpu_level(int level);

/* The GPU's table: in the GPU module alone. */
const fst_kernels *fst_kernels_gpu(void);

#ifdef __cplusplus
}
#endif
#endif
