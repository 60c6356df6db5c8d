/* bench_load with a GPU 0 that is made of host memory, which copies as a GPU would have it: for test_load.py. FST_FAKE
 * says what goes wrong with it:
 *
 *     copy    the first byte of each copy to it
 *     cast    the last byte that each kernel makes of another dtype
 *     memory  more than it was given is lost
 *     fourth  the fourth load's memory is refused */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "fst.h"
#include "load.h"

#define TOTAL ((uint64_t)16 << 30)

static int wrong_copies, wrong_casts, wrong_scales, leaks, refuses;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t used;

static void use(uint64_t bytes, int sign) {
    pthread_mutex_lock(&lock);
    used = sign > 0 ? used + bytes : used - bytes;
    pthread_mutex_unlock(&lock);
}

static int memory(const fst_gpu *gpu, uint64_t *free_bytes, uint64_t *total_bytes) {
    (void)gpu;
    pthread_mutex_lock(&lock);
    *free_bytes = TOTAL - used;
    pthread_mutex_unlock(&lock);
    *total_bytes = TOTAL;
    return 0;
}

static int alloc_block(const fst_gpu *gpu, uint64_t size, void **out) {
    static int results; /* of loads: what is not the ceilings' or the staging ring */
    if (refuses && size < 20 << 20 && ++results > 3) return FST_GPU_OUT_OF_MEMORY;
    int code = fst_gpu_cpu()->calls->alloc_block(gpu, size, out);
    if (!code) use(size, 1);
    return code;
}

static void free_block(const fst_gpu *gpu, void *block, uint64_t size) {
    fst_gpu_cpu()->calls->free_block(gpu, block, size);
    if (leaks) use(3 * size, 1);
    else use(size, -1);
}

static int to_device(const fst_gpu *gpu, fst_queue stream, void *device, const void *host, size_t size) {
    int code = fst_gpu_cpu()->calls->to_device(gpu, stream, device, host, size);
    if (wrong_copies) *(unsigned char *)device ^= 1;
    return code;
}

static uint64_t bytes_of(uint64_t count, int dtype) { return count * fst_dtype_bits((fst_dtype)dtype) / 8; }

static int cast(fst_queue stream, const fst_cast_args *a) {
    int code = fst_kernels_cpu()->cast(stream, a);
    if (wrong_casts && a->src_dtype != a->dst_dtype)
        ((unsigned char *)a->dst)[bytes_of(a->count, a->dst_dtype) - 1] ^= 1;
    return code;
}

static int batch(fst_queue stream, const fst_batch_args *a) {
    const fst_batch_job *last = &a->jobs[a->jobs_count - 1];
    unsigned char *made = (unsigned char *)(uintptr_t)last->dst;
    int code = fst_kernels_cpu()->batch(stream, a);
    if (wrong_casts && a->src_dtype != a->dst_dtype) made[bytes_of(last->count, a->dst_dtype) - 1] ^= 1;
    return code;
}

static int quantize(fst_queue stream, const fst_quantize_args *a) {
    int code = fst_kernels_cpu()->quantize(stream, a);
    if (wrong_scales) a->scales[0] *= 2;
    return code;
}

int main(int argc, char **argv) {
    static fst_gpu gpu;
    static fst_gpu_calls calls;
    static fst_kernels kernels;
    const char *what = getenv("FST_FAKE");
    wrong_copies = what && strcmp(what, "copy") == 0;
    wrong_casts = what && strcmp(what, "cast") == 0;
    wrong_scales = what && strcmp(what, "scale") == 0;
    refuses = what && strcmp(what, "fourth") == 0;
    leaks = what && strcmp(what, "memory") == 0;
    gpu = *fst_gpu_cpu();
    calls = *gpu.calls;
    kernels = *gpu.kernels;
    calls.memory = memory;
    calls.alloc_block = alloc_block;
    calls.free_block = free_block;
    calls.to_device = to_device;
    kernels.cast = cast;
    kernels.batch = batch;
    kernels.quantize = quantize;
    gpu.calls = &calls;
    gpu.kernels = &kernels;
    gpu.host_access = 0;
    snprintf(gpu.label, sizeof gpu.label, "fake:0");
    fst_gpu_set_fake(&gpu);
    return load_main(argc, argv);
}
