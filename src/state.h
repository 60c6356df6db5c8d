/* What small companions say of a weight that names, dtypes and shapes do not: read before planning. */
#ifndef FST_STATE_H
#define FST_STATE_H

#include "scheme.h"

/* Which companion must be read before the weight can be planned; FST_NO_TENSOR: none. */
uint32_t fst_state_tensor(const fst_quantized *weight);

/* Completes the weight by the bytes of that companion. FST_E_JSON, FST_E_QUANTIZED: it does not fit what is there;
 * FST_E_UNSUPPORTED, FST_E_MEMORY. */
fst_status fst_state_apply(const fst_model *model, fst_quantized *weight, const unsigned char *bytes, fst_error *error);

#endif
