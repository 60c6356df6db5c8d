/* Which bytes of a file make a part of a tensor, and where its elements go: for shards, for results that are transposed or
 * de-interleaved, and for those that are parts of another. Pure: no I/O, no device. */
#ifndef FST_CUT_H
#define FST_CUT_H

#include "header.h"
#include "scheme.h"

#define FST_NO_CUT UINT32_MAX

/* How the codes of a matrix lie in rows of bytes: kernels.h, fst_box. */
typedef enum fst_storage {
    FST_STORED_ROWS,       /* a row of the matrix is one */
    FST_STORED_PAIRS,      /* two of them are */
    FST_STORED_COLUMNS,    /* a row has a word of each of the matrix' rows, with codes along its columns */
    FST_STORED_TRANSPOSED, /* a row is a column of the matrix */
    FST_STORED_FLAT        /* there are none: the matrix' rows need not fill bytes */
} fst_storage;

/* A part that one dimension is cut for. */
typedef struct fst_cut {
    int32_t   dim;         /* FST_REPLICATE: all of it */
    uint64_t  begin, end, extent;
    uint32_t  layout;      /* of fst_rule */
    uint32_t  ndim;
    uint64_t *shape;       /* of the part, before `layout` */
    fst_entry local;       /* the tensor of a file that would hold what is read: of plain ones, with this shape */

    /* What is read: segments of the tensor's bytes. */
    uint64_t start, segment, pitch, nbytes, needed;

    /* As a stack of matrices; a tensor without `layout` may be one whose rows begin where it is cut. */
    uint64_t first_matrix, matrices;
    uint64_t row, rows, col, cols;   /* the part of each */
    uint64_t total_rows, total_cols;

    /* Boxed: pieces are rows of bytes that were read, or parts of one, and converted by kernels that count in all of the
     * matrix. */
    int         boxed;
    fst_storage storage;
    uint64_t    stored_row, stored_byte; /* where that begins in a matrix */
    uint64_t    stored_rows, row_bytes;  /* that are read of each */
    uint64_t    row_step;                /* rows are cut apart at multiples of so many */
    int         whole_rows;              /* no row is cut */

    /* Shaped: elements of the result do not follow one another as those of the part do. Steps in elements. */
    int      shaped;
    uint64_t dst_matrix, dst_row, dst_col, dst_half;
} fst_cut;

/* The part [begin, end) of dimension `dim` of a tensor that is no quantized weight (FST_REPLICATE: all). `converts`: it does not
 * stay as stored, so that borders may lie within bytes. Rows of which less than `segment_bytes` are wanted are read whole,
 * if that is not more than twice as much. What `where` says is named in errors.
 * FST_E_ARG: no such dimension, or part of it; FST_E_UNSUPPORTED; FST_E_MEMORY. Free with fst_cut_free. */
fst_status fst_cut_plain(const fst_entry *entry, int32_t dim, uint64_t begin, uint64_t end, uint32_t layout,
                         int converts, uint64_t segment_bytes, const fst_where *where, fst_cut *out,
                         fst_error *error);
/* Of a weight that is dequantized. `entry` has its codes. */
fst_status fst_cut_weight(const fst_quantized *weight, const fst_entry *entry, int32_t dim, uint64_t begin,
                          uint64_t end, uint32_t layout, const fst_where *where, fst_cut *out,
                          fst_error *error);
/* What a part of a weight needs of a companion of its, whose entry this is: rows and columns as in a stack of matrices of
 * elements (words of packed zero points). With `most`, short pieces of rows are not worth it where all of it has no more bytes
 * than that. 0: all of it is read. */
int fst_cut_companion(const fst_quantized *weight, fst_companion which, const fst_cut *part, const fst_entry *entry,
                      uint64_t most, fst_cut *out);
/* For a weight that stays quantized, of which this is a part: dimension and range of the tensor of its codes (FST_COMPANIONS), or
 * of a companion's, that belong to it. *dim is FST_REPLICATE where it is whole. NULL, or why there are none. */
const char *fst_cut_kept(const fst_quantized *weight, unsigned which, const fst_cut *part, const fst_entry *entry,
                         int32_t *dim, uint64_t *begin, uint64_t *end);
void fst_cut_free(fst_cut *cut);

/* The result's extent in dimension `dim`. */
uint64_t fst_cut_extent(const fst_cut *cut, uint32_t dim);

/* The part becomes one of a result in which dimension `dim`, not its first one that is longer than 1, has `extent` in all.
 * 0: that is not possible. */
int fst_cut_widen(fst_cut *cut, uint32_t dim, uint64_t extent);
/* Codes are counted in all of the matrix, be it because of fst_cut_widen. */
void fst_cut_box(const fst_quantized *weight, fst_cut *cut);

/* Where byte `at` of what is read lies behind the tensor's first. */
static inline uint64_t fst_cut_place(const fst_cut *cut, uint64_t at) {
    return cut->start + at / cut->segment * cut->pitch + at % cut->segment;
}

/* A rectangle of elements of a matrix. */
typedef struct fst_cut_area {
    uint64_t row, col, rows, cols;
} fst_cut_area;

/* Elements [first, first + count) of a matrix with rows of `cols`, as rectangles. How many there are, at most 3. */
unsigned fst_cut_split(uint64_t first, uint64_t count, uint64_t cols, fst_cut_area areas[3]);

/* Those of the part, counted in the whole matrix, whose codes lie in bytes [at, at + nbytes) of what is read of one. `bits` of
 * a code. *src_row and *src_byte are as in fst_box. */
unsigned fst_cut_areas(const fst_cut *cut, unsigned bits, int padded, uint64_t at, uint64_t nbytes,
                       fst_cut_area areas[3], uint64_t *src_row, uint64_t *src_byte);

#endif
