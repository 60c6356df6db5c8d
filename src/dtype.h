/* Facts about dtypes: everything that is a table. */
#ifndef FST_DTYPE_H
#define FST_DTYPE_H

#include "fst.h"

/* The dtype whose name is exactly these bytes, or FST_NATIVE. */
fst_dtype fst_dtype_parse(const char *name, size_t length);

/* DLPack's type code, e.g. 2 for kDLFloat. */
unsigned fst_dtype_dlpack_code(fst_dtype dtype);

/* True for the types that a cast converts: every float but F8_E8M0, which alone is a scale. */
int fst_dtype_is_castable(fst_dtype dtype);

/* Bytes of `count` elements; `count` x bits must fill whole bytes and not overflow. */
uint64_t fst_dtype_bytes(fst_dtype dtype, uint64_t count);

#endif
