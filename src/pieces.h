/* What converts the pieces of a chunk: their places put into the arguments of kernels (kernels.h), and launched on the stream that
 * the worker sends its chunk on. */
#ifndef FST_PIECES_H
#define FST_PIECES_H

#include "engine.h"

/* A plain cast of the piece that lies at `src` (NULL: not known yet): into the result, or into the stripe that it is parked in. */
fst_cast_args fst_piece_cast_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src);

/* Where a stripe is parked. */
unsigned char *fst_piece_parked(const fst_load_job *job, uint32_t stripe);

/* Converts, dequantizes, cuts or quantizes the piece at `src`, as it is planned. 0 or a kernel's code. */
int fst_piece_launch(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece, const void *src);

/* Makes codes and scales of whole rows, bands or matrices of a tensor, which lie at `src` in `dtype`. */
int fst_piece_quantize(fst_worker *w, const fst_load_job *job, uint32_t tensor, const void *src,
                        fst_dtype dtype, uint32_t matrix, uint64_t first_row, uint64_t rows);

#endif
