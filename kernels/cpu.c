/* The CPU's kernels: which copy this processor runs, and which pairs there are. */
#include "kernels.h"
#include "numeric.h"

const fst_kernels *fst_kernels_v2(void);
const fst_kernels *fst_kernels_v3(void);
const fst_kernels *fst_kernels_v4(void);

int fst_kernels_have(int src_dtype, int dst_dtype) {
    if (src_dtype == dst_dtype) return fst_type_bits(src_dtype) != 0;
    return fst_float_of(src_dtype).bits && fst_float_of(dst_dtype).bits;
}

const fst_kernels *fst_kernels_cpu_level(int level) {
    __builtin_cpu_init();
    switch (level) {
    case 2:
        return __builtin_cpu_supports("x86-64-v2") ? fst_kernels_v2() : NULL;
    case 3:
        return __builtin_cpu_supports("x86-64-v3") ? fst_kernels_v3() : NULL;
    case 4:
        return __builtin_cpu_supports("x86-64-v4") ? fst_kernels_v4() : NULL;
    default:
        return NULL;
    }
}

const fst_kernels *fst_kernels_cpu(void) {
    for (int level = 4; level > 2; level--) {
        const fst_kernels *kernels = fst_kernels_cpu_level(level);
        if (kernels) return kernels;
    }
    return fst_kernels_v2();
}
