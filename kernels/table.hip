// The table of this target: every launcher that kernels.h knows.
#include "launch.h"

extern "C" {

int FST_SYMBOL(fst_cast)(fst_queue stream, const fst_cast_args *args);
int FST_SYMBOL(fst_batch)(fst_queue stream, const fst_batch_args *args);
int FST_SYMBOL(fst_scaled)(fst_queue stream, const fst_scaled_args *args);
int FST_SYMBOL(fst_quantize)(fst_queue stream, const fst_quantize_args *args);
int FST_SYMBOL(fst_rows)(fst_queue stream, const fst_rows_args *args);
int FST_SYMBOL(fst_transpose)(fst_queue stream, const fst_transpose_args *args);
int FST_SYMBOL(fst_fnuz)(fst_queue stream, const fst_fnuz_args *args);
int FST_SYMBOL(fst_bnb4)(fst_queue stream, const fst_bnb4_args *args);
int FST_SYMBOL(fst_packed)(fst_queue stream, const fst_packed_args *args);
int FST_SYMBOL(fst_box_scaled)(fst_queue stream, const fst_scaled_args *args, const fst_box *box);
int FST_SYMBOL(fst_box_bnb4)(fst_queue stream, const fst_bnb4_args *args, const fst_box *box);
int FST_SYMBOL(fst_box_packed)(fst_queue stream, const fst_packed_args *args, const fst_box *box);
int FST_SYMBOL(fst_box_cast)(fst_queue stream, const fst_cast_args *args, const fst_box *box);

#if !defined(FST_CPU_LEVEL) && defined(__CUDACC__)
#define FST_TARGET "cuda"
#elif !defined(FST_CPU_LEVEL)
#define FST_TARGET "hip"
#elif defined(FST_NVIDIA_SHAPE)
#define FST_TARGET "NVIDIA's shape"
#elif defined(FST_DEVICE_SHAPE)
#define FST_TARGET "AMD's shape"
#elif FST_CPU_LEVEL == 2
#define FST_TARGET "x86-64-v2"
#elif FST_CPU_LEVEL == 3
#define FST_TARGET "x86-64-v3"
#else
#define FST_TARGET "x86-64-v4"
#endif

const fst_kernels *FST_SYMBOL(fst_kernels)(void);
const fst_kernels *FST_SYMBOL(fst_kernels)(void) {
    static const fst_kernels table = {FST_SYMBOL(fst_cast),     FST_SYMBOL(fst_batch),
                                      FST_SYMBOL(fst_scaled),   FST_SYMBOL(fst_quantize),
                                      FST_SYMBOL(fst_rows),     FST_SYMBOL(fst_transpose),
                                      FST_SYMBOL(fst_fnuz),     FST_SYMBOL(fst_bnb4),
                                      FST_SYMBOL(fst_packed),   FST_SYMBOL(fst_box_scaled),
                                      FST_SYMBOL(fst_box_bnb4), FST_SYMBOL(fst_box_packed),
                                      FST_SYMBOL(fst_box_cast), FST_TARGET};
    return &table;
}

} // extern "C"
