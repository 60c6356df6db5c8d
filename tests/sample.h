/* Checkpoints of many tensors whose results are known: what is stored is random, what a load makes of it comes from one
 * call of the CPU's kernel for each tensor, without slots, chunks or threads. One sample at a time. */
#ifndef FST_TESTS_SAMPLE_H
#define FST_TESTS_SAMPLE_H

#include "fst.h"

#define SAMPLE_MAX 1200

void   sample_begin(uint64_t seed);                    /* the one before is forgotten */
/* Appends "t.N" and returns N. `count` elements must fill bytes. */
size_t sample_add(fst_dtype dtype, uint64_t count);
void   sample_shape(size_t index, const char *shape);  /* in place of [count]: JSON, static */
size_t sample_count(void);
/* Tensors [first, end) as a file. Returns where its data starts. */
size_t sample_write(const char *path, size_t first, size_t end, size_t padding);

uint64_t  sample_stored_bytes(size_t index);
fst_dtype sample_result_dtype(size_t index, fst_dtype cast);
uint64_t  sample_result_bytes(size_t index, fst_dtype cast);

/* Its index, from its name. */
size_t sample_index(const fst_tensor *tensor);
/* NULL, or what of the tensor is not as it should be (static text). Any thread. */
const char *sample_compare(const fst_tensor *tensor, fst_dtype cast);
/* All tensors of a model, as a case's check. */
void   sample_check(const fst_model *model, fst_dtype cast);

#endif
