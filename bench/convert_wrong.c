/* bench_convert on a device that gets every result wrong: in the last byte, or not at all, or by a byte too
 * many. For test_convert.py: such a result must be found.
 *
 *     convert_wrong last|nothing|beyond [options of bench_convert] */
#include <stdio.h>
#include <string.h>

#include "bench.h"
#include "convert.h"
#include "fst.h"

static enum { LAST, NOTHING, BEYOND } way;

/* Spoils the result of `size` bytes that a kernel made at `dst`. */
static int spoil(int code, void *dst, uint64_t size) {
    unsigned char *bytes = dst;
    if (way == LAST) bytes[size - 1] ^= 1;
    if (way == BEYOND) bytes[size] ^= 1;
    return code;
}

static uint64_t bytes_of(uint64_t count, int dtype) { return count * fst_dtype_bits((fst_dtype)dtype) / 8; }

static int cast(fst_queue stream, const fst_cast_args *a) {
    if (way == NOTHING) return 0;
    return spoil(fst_kernels_cpu()->cast(stream, a), a->dst, bytes_of(a->count, a->dst_dtype));
}

static int batch(fst_queue stream, const fst_batch_args *a) {
    if (way == NOTHING) return 0;
    const fst_batch_job *last = &a->jobs[a->jobs_count - 1];
    void *dst = (void *)(uintptr_t)last->dst;
    return spoil(fst_kernels_cpu()->batch(stream, a), dst, bytes_of(last->count, a->dst_dtype));
}

static int bnb4(fst_queue stream, const fst_bnb4_args *a) {
    if (way == NOTHING) return 0;
    return spoil(fst_kernels_cpu()->bnb4(stream, a), a->dst, bytes_of(a->count, a->dst_dtype));
}

static int scaled(fst_queue stream, const fst_scaled_args *a) {
    if (way == NOTHING) return 0;
    return spoil(fst_kernels_cpu()->scaled(stream, a), a->dst, bytes_of(a->count, a->dst_dtype));
}

static int quantize(fst_queue stream, const fst_quantize_args *a) {
    if (way == NOTHING) return 0;
    return spoil(fst_kernels_cpu()->quantize(stream, a), a->dst, a->rows * a->cols);
}

static int rows(fst_queue stream, const fst_rows_args *a) {
    if (way == NOTHING) return 0;
    uint64_t last = 0;
    for (uint32_t i = 0; i < a->ndim; i++) last += (a->extent[i] - 1) * a->dst_stride[i];
    return spoil(fst_kernels_cpu()->rows(stream, a), a->dst, bytes_of(last + a->cols, a->dst_dtype));
}

static int transpose(fst_queue stream, const fst_transpose_args *a) {
    if (way == NOTHING) return 0;
    const uint64_t elements = (a->cols - 1) * a->dst_stride + a->rows;
    return spoil(fst_kernels_cpu()->transpose(stream, a), a->dst, bytes_of(elements, a->dst_dtype));
}

static int fnuz(fst_queue stream, const fst_fnuz_args *a) {
    if (way == NOTHING) return 0;
    return spoil(fst_kernels_cpu()->fnuz(stream, a), a->dst, a->count);
}

static int packed(fst_queue stream, const fst_packed_args *a) {
    if (way == NOTHING) return 0;
    return spoil(fst_kernels_cpu()->packed(stream, a), a->dst, bytes_of(a->rows * a->cols, a->dst_dtype));
}

int main(int argc, char **argv) {
    static const fst_kernels kernels = {.cast = cast,
                                        .batch = batch,
                                        .scaled = scaled,
                                        .quantize = quantize,
                                        .rows = rows,
                                        .transpose = transpose,
                                        .fnuz = fnuz,
                                        .bnb4 = bnb4,
                                        .packed = packed,
                                        .target = "wrong"};
    static const char *const ways[] = {"last", "nothing", "beyond"};
    static fst_gpu gpu;
    for (unsigned i = 0; i < 3 && argc > 1; i++)
        if (strcmp(argv[1], ways[i]) == 0) way = i;
    gpu = *fst_gpu_cpu();
    gpu.kernels = &kernels;
    fst_gpu_set_fake(&gpu); /* in the place of GPU 0 */
    return convert_main(argc - 1, argv + 1);
}
