#include "kernels_rig.h"

#include <stdlib.h>
#include <string.h>

#include "harness.h"

const fst_kernels *fst_kernels_v1(void); /* the device's shape, see tests/oracle/CMakeLists.txt */

const int rig_floats[8] = {
#define X(name, ...) FST_T_##name,
    FST_FLOAT_LIST(X)
#undef X
};

const char *rig_dtype_name(int dtype) { return fst_dtype_name((fst_dtype)dtype); }

/* The GPU to test, once for the process. NULL when there is none and none is asked for. */
static const fst_gpu *find_gpu(void) {
    static const fst_gpu *gpu;
    static int done;
    if (!done) {
        const char *asked = getenv("FST_TEST_DEVICE");
        fst_error error;
        char why[512];
        fst_status status = fst_gpu_find(FST_DEVICE_GPU(asked ? atoi(asked) : 0), &gpu, why, sizeof why, &error);
        if (status != FST_OK) gpu = NULL;
        if (status != FST_OK && asked) test_fail(__FILE__, __LINE__, "FST_TEST_DEVICE: %s", error.text);
        done = 1;
    }
    return gpu;
}

static int choose(fst_gpu *gpu, size_t i) {
    *gpu = *fst_gpu_cpu();
    for (int level = 2; level <= 4; level++) {
        const fst_kernels *kernels = fst_kernels_cpu_level(level);
        if (kernels && i-- == 0) {
            gpu->kernels = kernels;
            return 1;
        }
    }
    if (i-- == 0) {
        gpu->kernels = fst_kernels_v1();
        return 1;
    }
    if (i != 0 || !find_gpu()) return 0;
    *gpu = *find_gpu();
    return 1;
}

int rig_open(test_rig *rig, size_t i, size_t capacity) {
    void *src, *dst;
    if (!choose(&rig->gpu, i)) return 0;
    const fst_gpu_calls *calls = rig->gpu.calls;
    rig->capacity = capacity;
    rig->host = malloc(capacity);
    CHECK(rig->host);
    CHECK_INT(0, calls->enter(&rig->gpu, &rig->saved));
    CHECK_INT(0, calls->stream_new(&rig->gpu, &rig->stream));
    CHECK_INT(0, calls->alloc_block(&rig->gpu, capacity, &src));
    CHECK_INT(0, calls->alloc_block(&rig->gpu, capacity, &dst));
    rig->src = src;
    rig->dst = dst;
    return 1;
}

void rig_close(test_rig *rig) {
    const fst_gpu_calls *calls = rig->gpu.calls;
    calls->free_block(&rig->gpu, rig->src, rig->capacity);
    calls->free_block(&rig->gpu, rig->dst, rig->capacity);
    calls->stream_free(&rig->gpu, rig->stream);
    calls->leave(&rig->gpu, rig->saved);
    free(rig->host);
}

void rig_upload(test_rig *rig, void *device, const void *host, size_t size) {
    CHECK_INT(0, rig->gpu.calls->to_device(&rig->gpu, rig->stream, device, host, size));
    CHECK_INT(0, rig->gpu.calls->stream_wait(&rig->gpu, rig->stream));
}

void rig_download(test_rig *rig, size_t size) {
    CHECK(size <= rig->capacity);
    CHECK_INT(0, rig->gpu.calls->to_host(&rig->gpu, rig->stream, rig->host, rig->dst, size));
    CHECK_INT(0, rig->gpu.calls->stream_wait(&rig->gpu, rig->stream));
}

const uint8_t *rig_cast(test_rig *rig, int src, int dst, unsigned flags, size_t src_skew, size_t dst_skew,
                        uint64_t count) {
    const size_t bytes = (size_t)count * fst_type_bits(dst) / 8, begin = RIG_GUARD + dst_skew;
    const size_t end = begin + bytes + RIG_GUARD;
    CHECK(end <= rig->capacity);
    memset(rig->host, 0xA5, end);
    rig_upload(rig, rig->dst, rig->host, end);
    const fst_cast_args args = {rig->src + src_skew, rig->dst + begin, count, src, dst, flags};
    CHECK_INT(0, rig->gpu.kernels->cast(rig->stream, &args));
    rig_download(rig, end);
    for (size_t i = 0; i < end; i++)
        if ((i < begin || i >= begin + bytes) && rig->host[i] != 0xA5)
            test_fail(__FILE__, __LINE__, "%s: %s to %s, %zu elements from +%zu to +%zu: byte %td is changed",
                      rig->gpu.kernels->target, rig_dtype_name(src), rig_dtype_name(dst), (size_t)count, src_skew,
                      dst_skew, (ptrdiff_t)(i - begin));
    return rig->host + begin;
}
