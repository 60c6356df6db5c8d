/* The CPU's kernels: which copy this processor runs, and which pairs there are. */
#include "kernels.h"
#include "numeric.h"

const fst_kernels *fst_kernels_v2(void);
const fst_kernels *fst_kernels_v3(void);
const fst_kernels *fst_kernels_v4(void);

int fst_kernels_have(int src_dtype, int dst_dtype) { return fst_casts(src_dtype, dst_dtype); }

/* By features: not every compiler knows the levels by name. Processors with these have the rest too. */
static int has_level(int level) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return 0;
    if (level == 2) return 1;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi") ||
        !__builtin_cpu_supports("bmi2"))
        return 0;
    if (level == 3) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

const fst_kernels *fst_kernels_cpu_level(int level) {
    if (level < 2 || level > 4 || !has_level(level)) return NULL;
    return level == 2 ? fst_kernels_v2() : level == 3 ? fst_kernels_v3() : fst_kernels_v4();
}

const fst_kernels *fst_kernels_cpu(void) {
    for (int level = 4; level > 2; level--) {
        const fst_kernels *kernels = fst_kernels_cpu_level(level);
        if (kernels) return kernels;
    }
    return fst_kernels_v2();
}
