/* Every code of a source type, also all 2^32 of F32, through every copy of the kernels that this machine runs:
 *
 *     casts.py stream F32 BF16 plain | fst_exhaustive F32 BF16 plain
 *
 * reads the codes that must come out and compares. Exit 0 when all are equal. scripts/soak runs it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu.h"
#include "numeric.h"

enum { chunk = 1 << 22, most_devices = 8 };

typedef struct target {
    fst_gpu gpu;
    fst_queue stream;
    void *src, *dst;
} target;

static int open_device(target *device) {
    const fst_gpu_calls *calls = device->gpu.calls;
    int saved;
    return !calls->enter(&device->gpu, &saved) && !calls->stream_new(&device->gpu, &device->stream) &&
           !calls->alloc_block(&device->gpu, chunk * 4ull, &device->src) &&
           !calls->alloc_block(&device->gpu, chunk * 8ull, &device->dst);
}

static size_t find_devices(target *devices) {
    const char *asked = getenv("FST_TEST_DEVICE");
    size_t count = 0;
    for (int level = 2; level <= 4; level++) {
        if (!fst_kernels_cpu_level(level)) continue;
        devices[count].gpu = *fst_gpu_cpu();
        devices[count++].gpu.kernels = fst_kernels_cpu_level(level);
    }
    if (asked) {
        const fst_gpu *gpu;
        fst_error error;
        char why[512];
        if (fst_gpu_find(FST_DEVICE_GPU(atoi(asked)), &gpu, why, sizeof why, &error) != FST_OK) {
            fprintf(stderr, "fst_exhaustive: %s\n", error.text);
            return 0;
        }
        devices[count++].gpu = *gpu;
    }
    for (size_t i = 0; i < count; i++)
        if (!open_device(&devices[i])) return 0;
    return count;
}

static int run(const target *device, const fst_cast_args *cast, const void *in, size_t in_bytes, void *out,
               size_t out_bytes) {
    const fst_gpu_calls *calls = device->gpu.calls;
    fst_cast_args args = *cast;
    args.src = device->src;
    args.dst = device->dst;
    return !calls->to_device(&device->gpu, device->stream, device->src, in, in_bytes) &&
           !device->gpu.kernels->cast(device->stream, &args) &&
           !calls->to_host(&device->gpu, device->stream, out, device->dst, out_bytes) &&
           !calls->stream_wait(&device->gpu, device->stream);
}

static uint64_t first_difference(const unsigned char *a, const unsigned char *b, size_t bytes) {
    size_t i = memcmp(a, b, bytes) ? 0 : bytes;
    while (i < bytes && a[i] == b[i]) i++;
    return i;
}

int main(int argc, char **argv) {
    static target devices[most_devices];
    const int src = argc == 4 ? (int)fst_dtype_from_name(argv[1]) : 0;
    const int dst = argc == 4 ? (int)fst_dtype_from_name(argv[2]) : 0;
    const unsigned src_bits = fst_type_bits(src), dst_size = fst_type_bits(dst) / 8;
    if (!src || !dst || src_bits > 32 || src_bits < 8) {
        fprintf(stderr, "usage: fst_exhaustive SRC DST saturating|plain < CODES\n");
        return 2;
    }
    const uint64_t codes = 1ull << src_bits, each = codes < chunk ? codes : chunk;
    const size_t count = find_devices(devices);
    unsigned char *in = malloc(each * 4), *want = malloc(each * 8), *got = malloc(each * 8);
    if (!count || !in || !want || !got) return 1;
    for (uint64_t first = 0; first < codes; first += each) {
        const fst_cast_args args = {NULL, NULL, each,
                                    src,  dst,  strcmp(argv[3], "plain") ? 0 : FST_K_NON_SATURATING};
        for (uint64_t i = 0; i < each; i++) {
            const uint32_t code = (uint32_t)(first + i);
            memcpy(in + i * (src_bits / 8), &code, src_bits / 8);
        }
        if (fread(want, dst_size, each, stdin) != each) {
            fprintf(stderr, "fst_exhaustive: the stream ends too early\n");
            return 1;
        }
        for (size_t d = 0; d < count; d++) {
            if (!run(&devices[d], &args, in, each * (src_bits / 8), got, each * dst_size)) {
                fprintf(stderr, "fst_exhaustive: %s fails\n", devices[d].gpu.kernels->target);
                return 1;
            }
            const uint64_t at = first_difference(want, got, each * dst_size) / dst_size;
            if (at < each) {
                fprintf(stderr, "fst_exhaustive: %s: %s %llX to %s is wrong\n",
                        devices[d].gpu.kernels->target, argv[1], (unsigned long long)(first + at), argv[2]);
                return 1;
            }
        }
    }
    printf("%s to %s, %s: all %llu codes equal on %zu devices\n", argv[1], argv[2], argv[3],
           (unsigned long long)codes, count);
    return 0;
}
