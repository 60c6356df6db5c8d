/* What a load with computed scales makes of each tensor, by its name, dtype and shape: which become codes and scales,
 * and what the scales are. docs/quantized.md has the rules. */
#ifndef FST_QUANTIZE_H
#define FST_QUANTIZE_H

#include "header.h"
#include "scheme.h"

#define FST_QUANTIZE_TILE 128u /* rows and columns under one scale of FST_QUANTIZE_BLOCK */

/* Whether there are computed scales for codes of this type. */
int fst_quantize_has(fst_dtype target);

/* What a tensor is for without a rule: the options' cast and scale, or FST_NATIVE and none where it stays as stored. */
void fst_quantize_defaults(const fst_entry *entry, fst_dtype *cast, fst_scale *scale);

/* Matrices of rows x cols. 0: it is none, nor a stack of them, or has no elements. */
int fst_quantize_shape(const fst_entry *entry, uint64_t *stack, uint64_t *rows, uint64_t *cols);

/* The scales of one matrix. */
uint64_t fst_quantize_scale_rows(fst_scale scale, uint64_t rows);
uint64_t fst_quantize_scale_cols(fst_scale scale, uint64_t cols);

/* How the scales that a weight of a checkpoint has are counted; FST_QUANTIZE_NONE: like none of ours. */
fst_scale fst_quantize_kind_of(const fst_quantized *weight);

/* The name of the scales of a weight, X.weight_scale or, without ".weight", X_scale: writes it to `out` when that is not NULL; returns its length. */
size_t fst_quantize_scale_name(const char *weight, size_t length, fst_scale scale, char *out);

/* Whether a scale that is kept, by its name, is one of 8-bit codes: of activations or of the KV cache. */
int fst_quantize_scales_codes(const fst_entry *entry);

/* Times two, `count` of them, as FNUZ codes need their scales; a U8 is an E8M0. NaN and Inf stay. 0: one is too large. */
int fst_quantize_double(fst_dtype dtype, void *scales, uint64_t count);

#endif
