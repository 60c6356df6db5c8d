/* GPUs through HIP: AMD's own, or CUDA by way of kernels/cuda/hip. Built as a module with the kernels, and
 * loaded when a device is looked for. */
#include "gpu.h"

#include <hip/hip_runtime.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#ifdef __HIP_PLATFORM_AMD__
#define RUNTIME "hip"
#define DLPACK_TYPE 10 /* kDLROCM */
#else
#define RUNTIME "cuda"
#define DLPACK_TYPE 2 /* kDLCUDA */
#endif

#define SPINS 20u /* looks at an event, some microsecond each, before the first sleep */

const fst_kernels *fst_kernels_gpu(void);

static int enter(const fst_gpu *gpu, int *saved) {
    int code = hipGetDevice(saved);
    if (code || *saved == gpu->index) return code;
    return hipSetDevice(gpu->index);
}

static void leave(const fst_gpu *gpu, int saved) {
    if (saved != gpu->index) (void)hipSetDevice(saved);
}

static const char *describe(int code) { return hipGetErrorString((hipError_t)code); }

static int memory(const fst_gpu *gpu, uint64_t *free_bytes, uint64_t *total_bytes) {
    size_t unused, total;
    (void)gpu;
    int code = hipMemGetInfo(&unused, &total);
    if (code == 0) *free_bytes = unused, *total_bytes = total;
    return code;
}

/* ---- Blocks ----------------------------------------------------------------------------------- */

/* A pool of our own where there are pools, and a stream to allocate on: neither allocating nor freeing waits
 * for work of the caller's. What is freed stays in the pool while somebody holds it, and goes back to the system with the
 * next synchronisation otherwise. Mapping 14 GB takes 20 ms of the driver's locks, beside which copies are queued late. */
static struct pool {
    hipMemPool_t pool;
    hipStream_t stream;
    int tried;
    unsigned holders;
} pools[64];
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;

/* CUDA gives what a pool keeps to any other allocation of the process that would fail without (measured: 60 of 80 GB). Of
 * AMD's runtime that is not known, so there it is kept from nobody. */
static void set_threshold(const struct pool *pool) {
#ifdef __HIP_PLATFORM_AMD__
    (void)pool;
#else
    uint64_t bytes = pool->holders ? UINT64_MAX : 0;
    if (!pool->pool) return;
    (void)hipMemPoolSetAttribute(pool->pool, hipMemPoolAttrReleaseThreshold, &bytes);
    if (!pool->holders) (void)hipMemPoolTrimTo(pool->pool, 0);
#endif
}

/* Leaves the pool NULL where there can be none: then plain allocations do. */
static void make_pool(int index, struct pool *pool) {
    int supported = 0;
    hipMemPoolProps properties;
    pool->tried = 1;
    if (hipDeviceGetAttribute(&supported, hipDeviceAttributeMemoryPoolsSupported, index) || !supported)
        return;
    memset(&properties, 0, sizeof properties);
    properties.allocType = hipMemAllocationTypePinned;
    properties.location.type = hipMemLocationTypeDevice;
    properties.location.id = index;
    if (hipStreamCreateWithFlags(&pool->stream, hipStreamNonBlocking)) return;
    if (hipMemPoolCreate(&pool->pool, &properties)) {
        (void)hipStreamDestroy(pool->stream);
        pool->pool = NULL;
    }
    set_threshold(pool);
}

static uint64_t kept(const fst_gpu *gpu) {
    hipMemPool_t pool = pools[gpu->index].pool;
    uint64_t reserved = 0, used = 0;
    if (!pool || hipMemPoolGetAttribute(pool, hipMemPoolAttrReservedMemCurrent, &reserved) ||
        hipMemPoolGetAttribute(pool, hipMemPoolAttrUsedMemCurrent, &used)) {
        (void)hipGetLastError();
        return 0;
    }
    return reserved > used ? reserved - used : 0;
}

static int alloc_block(const fst_gpu *gpu, uint64_t size, void **out) {
    struct pool *pool = &pools[gpu->index];
    *out = NULL;
    pthread_mutex_lock(&pools_lock);
    if (!pool->tried) make_pool(gpu->index, pool);
    pthread_mutex_unlock(&pools_lock);
    int code =
        pool->pool ? hipMallocFromPoolAsync(out, size, pool->pool, pool->stream) : hipMalloc(out, size);
    if (code == hipErrorOutOfMemory && pool->pool && kept(gpu)) { /* in pieces of other sizes */
        (void)hipGetLastError();
        (void)hipMemPoolTrimTo(pool->pool, 0);
        code = hipMallocFromPoolAsync(out, size, pool->pool, pool->stream);
    }
    if (!code && pool->pool)
        code = hipStreamSynchronize(pool->stream); /* there for every stream from here on */
    if (code) {
        if (*out) (void)hipFreeAsync(*out, pool->stream);
        *out = NULL;
        (void)hipGetLastError(); /* leave no error behind for the caller's own checks */
    }
    return code;
}

static void free_behind(const fst_gpu *gpu, fst_queue stream, void *block, uint64_t size) {
    int saved;
    (void)size;
    if (enter(gpu, &saved)) return;
    if (pools[gpu->index].pool) (void)hipFreeAsync(block, (hipStream_t)stream);
    else (void)hipFree(block);
    leave(gpu, saved);
}

static void free_block(const fst_gpu *gpu, void *block, uint64_t size) {
    free_behind(gpu, NULL, block, size);
}

static void hold(const fst_gpu *gpu) {
    struct pool *pool = &pools[gpu->index];
    pthread_mutex_lock(&pools_lock);
    if (pool->holders++ == 0) set_threshold(pool);
    pthread_mutex_unlock(&pools_lock);
}

static void let_go(const fst_gpu *gpu) {
    struct pool *pool = &pools[gpu->index];
    pthread_mutex_lock(&pools_lock);
    if (--pool->holders == 0) set_threshold(pool);
    pthread_mutex_unlock(&pools_lock);
}

/* ---- Streams, events, copies -------------------------------------------------------------------- */

static int pin(const fst_gpu *gpu, void *host, size_t size) {
    (void)gpu;
    int code = hipHostRegister(host, size, hipHostRegisterPortable);
    if (code) (void)hipGetLastError();
    return code;
}

static void unpin(const fst_gpu *gpu, void *host) {
    (void)gpu;
    (void)hipHostUnregister(host);
}

static int stream_new(const fst_gpu *gpu, fst_queue *out) {
    (void)gpu;
    return hipStreamCreateWithFlags((hipStream_t *)out, hipStreamNonBlocking);
}

static void stream_free(const fst_gpu *gpu, fst_queue stream) {
    (void)gpu;
    (void)hipStreamDestroy((hipStream_t)stream);
}

static int stream_wait(const fst_gpu *gpu, fst_queue stream) {
    (void)gpu;
    return hipStreamSynchronize((hipStream_t)stream);
}

static int event_new(const fst_gpu *gpu, int timed, fst_event *out) {
    (void)gpu;
    return hipEventCreateWithFlags((hipEvent_t *)out, timed ? hipEventDefault : hipEventDisableTiming);
}

static void event_free(const fst_gpu *gpu, fst_event event) {
    (void)gpu;
    (void)hipEventDestroy((hipEvent_t)event);
}

static int event_record(const fst_gpu *gpu, fst_event event, fst_queue stream) {
    (void)gpu;
    return hipEventRecord((hipEvent_t)event, (hipStream_t)stream);
}

/* Looks again and again, at first at once, then after short sleeps: being woken by the device's interrupt takes longer
 * than most copies do, and a dozen threads that only spin would take the cores from one another. */
static int event_wait(const fst_gpu *gpu, fst_event event) {
    const struct timespec nap = {0, 20000};
    int code;
    (void)gpu;
    for (unsigned turn = 0; (code = hipEventQuery((hipEvent_t)event)) == hipErrorNotReady; turn++) {
        (void)hipGetLastError(); /* 'not ready' is no error of the caller's */
        if (turn >= SPINS) nanosleep(&nap, NULL);
    }
    return code;
}

static int event_query(const fst_gpu *gpu, fst_event event) {
    (void)gpu;
    int code = hipEventQuery((hipEvent_t)event);
    if (code != hipErrorNotReady) return code;
    (void)hipGetLastError();
    return FST_GPU_NOT_READY;
}

static int stream_follow(const fst_gpu *gpu, fst_queue stream, fst_event event) {
    (void)gpu;
    return hipStreamWaitEvent((hipStream_t)stream, (hipEvent_t)event, 0);
}

static float event_elapsed(const fst_gpu *gpu, fst_event from, fst_event to) {
    float milliseconds;
    (void)gpu;
    if (hipEventElapsedTime(&milliseconds, (hipEvent_t)from, (hipEvent_t)to) == 0) return milliseconds;
    (void)hipGetLastError(); /* not done yet is no error of the load's */
    return -1;
}

static int to_device(const fst_gpu *gpu, fst_queue stream, void *device, const void *host, size_t size) {
    (void)gpu;
    return hipMemcpyAsync(device, host, size, hipMemcpyHostToDevice, (hipStream_t)stream);
}

static int to_host(const fst_gpu *gpu, fst_queue stream, void *host, const void *device, size_t size) {
    (void)gpu;
    return hipMemcpyAsync(host, device, size, hipMemcpyDeviceToHost, (hipStream_t)stream);
}

static int copy_on_device(const fst_gpu *gpu, fst_queue stream, void *dst, const void *src, size_t size) {
    (void)gpu;
    return hipMemcpyAsync(dst, src, size, hipMemcpyDeviceToDevice, (hipStream_t)stream);
}

static const fst_gpu_calls calls = {
    .enter = enter,
    .leave = leave,
    .describe = describe,
    .memory = memory,
    .alloc_block = alloc_block,
    .free_block = free_block,
    .free_behind = free_behind,
    .hold = hold,
    .let_go = let_go,
    .kept = kept,
    .pin = pin,
    .unpin = unpin,
    .stream_new = stream_new,
    .stream_free = stream_free,
    .stream_wait = stream_wait,
    .event_new = event_new,
    .event_free = event_free,
    .event_record = event_record,
    .event_wait = event_wait,
    .event_query = event_query,
    .stream_follow = stream_follow,
    .event_elapsed = event_elapsed,
    .to_device = to_device,
    .to_host = to_host,
    .copy_on_device = copy_on_device,
};

/* ---- Finding GPUs ------------------------------------------------------------------------------- */

static int count_gpus(void) {
    int count = 0, code = hipGetDeviceCount(&count);
    if (code) (void)hipGetLastError();
    return code ? -code : count;
}

/* One value there, through a kernel and back: a device that is listed need not work, nor hold our code. */
static int try_it(const fst_gpu *gpu) {
    const float one = 1;
    uint16_t result = 0;
    void *block = NULL;
    fst_queue stream = NULL;
    int code = alloc_block(gpu, 512, &block);
    if (!code) code = stream_new(gpu, &stream);
    if (!code) code = to_device(gpu, stream, block, &one, sizeof one);
    if (!code) {
        fst_cast_args args = {block, (unsigned char *)block + 256, 1, FST_F32, FST_BF16, 0};
        code = gpu->kernels->cast(stream, &args);
    }
    if (!code) code = to_host(gpu, stream, &result, (unsigned char *)block + 256, sizeof result);
    if (!code) code = stream_wait(gpu, stream);
    if (!code && result != 0x3F80) code = hipErrorUnknown;
    if (stream) stream_free(gpu, stream);
    if (block) free_block(gpu, block, 512);
    return code;
}

static int open_gpu(int index, fst_gpu *gpu) {
    hipDeviceProp_t properties;
    int saved, code = hipGetDeviceProperties(&properties, index);
    if (code) return code;
    gpu->calls = &calls;
    gpu->kernels = fst_kernels_gpu();
    gpu->dlpack_type = DLPACK_TYPE;
    gpu->index = index;
    snprintf(gpu->label, sizeof gpu->label, RUNTIME ":%d", index);
    snprintf(gpu->name, sizeof gpu->name, "%.127s", properties.name);
    if (hipDeviceGetPCIBusId(gpu->pci, sizeof gpu->pci, index)) gpu->pci[0] = 0;
    code = enter(gpu, &saved);
    if (code) return code;
    code = try_it(gpu);
    leave(gpu, saved);
    if (code) (void)hipGetLastError();
    return code < 0 ? (int)hipErrorUnknown : code;
}

FST_API const fst_gpu_module fst_module = {
    .abi = FST_GPU_ABI, .runtime = RUNTIME, .count = count_gpus, .describe = describe, .open = open_gpu};
