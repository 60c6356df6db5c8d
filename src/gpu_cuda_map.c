#include "gpu_cuda_map.h"

#include <cuda.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LOOKS 100u         /* at an event, some microsecond each, before a thread waits for it */
#define SHORTAGE_SECONDS 2 /* longest wait for blocks that are on their way back */

/* The driver's calls, by name: the module is not linked with libcuda, which machines without a GPU lack. */
static struct driver {
    CUresult (*granularity)(size_t *, const CUmemAllocationProp *, CUmemAllocationGranularity_flags);
    CUresult (*reserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
    CUresult (*release_range)(CUdeviceptr, size_t);
    CUresult (*create)(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *,
                       unsigned long long);
    CUresult (*release)(CUmemGenericAllocationHandle);
    CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
    CUresult (*unmap)(CUdeviceptr, size_t);
    CUresult (*allow)(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t);
    CUresult (*attribute)(int *, CUdevice_attribute, CUdevice);
    int missing;
} driver;

static void find_call(const char *name, void *out) {
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    void *call = NULL;
#if CUDART_VERSION >= 12050
    cudaError_t code = cudaGetDriverEntryPointByVersion(name, &call, 10020, cudaEnableDefault, &found);
#else
    cudaError_t code = cudaGetDriverEntryPoint(name, &call, cudaEnableDefault, &found);
#endif
    if (code || found != cudaDriverEntryPointSuccess || !call) driver.missing = 1;
    if (code) (void)cudaGetLastError();
    memcpy(out, &call, sizeof call);
}

static void find_driver(void) {
    find_call("cuMemGetAllocationGranularity", &driver.granularity);
    find_call("cuMemAddressReserve", &driver.reserve);
    find_call("cuMemAddressFree", &driver.release_range);
    find_call("cuMemCreate", &driver.create);
    find_call("cuMemRelease", &driver.release);
    find_call("cuMemMap", &driver.map);
    find_call("cuMemUnmap", &driver.unmap);
    find_call("cuMemSetAccess", &driver.allow);
    find_call("cuDeviceGetAttribute", &driver.attribute);
}

static CUmemAllocationProp properties_of(int device) {
    CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED};
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    return properties;
}

/* In whole units of the device's; 0 where it cannot map. */
static uint64_t whole(int device, uint64_t size) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    CUmemAllocationProp properties = properties_of(device);
    size_t unit = 0;
    int can = 0;
    pthread_once(&once, find_driver);
    if (driver.missing ||
        driver.attribute(&can, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) || !can ||
        driver.granularity(&unit, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) || !unit ||
        size > UINT64_MAX - unit)
        return 0;
    return (size + unit - 1) / unit * unit;
}

/* ---- Mapping ------------------------------------------------------------------------------------- */

typedef struct block {
    struct block *next;
    CUdeviceptr at;
    uint64_t bytes;
    int device;
    cudaEvent_t unused; /* when it is, once it was given back */
} block;

static void unmap(block *b) {
    if (b->unused) (void)cudaEventDestroy(b->unused);
    (void)driver.unmap(b->at, b->bytes);
    (void)driver.release_range(b->at, b->bytes);
    free(b);
}

static int map(block *b) {
    const CUmemAllocationProp properties = properties_of(b->device);
    const CUmemAccessDesc access = {properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle memory;
    CUresult code = driver.reserve(&b->at, b->bytes, 0, 0, 0);
    if (code) return (int)code;
    code = driver.create(&memory, b->bytes, &properties, 0);
    if (!code) {
        code = driver.map(b->at, b->bytes, 0, memory, 0);
        (void)driver.release(memory); /* what is mapped stays */
        if (!code && (code = driver.allow(b->at, b->bytes, &access, 1))) (void)driver.unmap(b->at, b->bytes);
    }
    if (code) (void)driver.release_range(b->at, b->bytes);
    return (int)code;
}

/* ---- Blocks -------------------------------------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t reaped = PTHREAD_COND_INITIALIZER;
static block *live, *dying;
static int reaping; /* a thread waits for what is dying */

static void *reap(void *unused) {
    pthread_mutex_lock(&lock);
    while (dying) {
        block *b = dying;
        dying = b->next;
        pthread_mutex_unlock(&lock);
        (void)cudaSetDevice(b->device);
        (void)cudaEventSynchronize(b->unused);
        unmap(b);
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&reaped);
    }
    reaping = 0;
    pthread_cond_broadcast(&reaped);
    pthread_mutex_unlock(&lock);
    return unused;
}

/* The lock is held. */
static int start_reaping(void) {
    sigset_t all, before;
    pthread_t thread;
    if (reaping) return 1;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    reaping = pthread_create(&thread, NULL, reap, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (reaping) pthread_detach(thread);
    return reaping;
}

/* Whether a block came back while it waited. */
static int await_reaped(void) {
    struct timespec until;
    int code = 0;
    pthread_mutex_lock(&lock);
    int any = reaping;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += SHORTAGE_SECONDS;
    while (reaping && !code) code = pthread_cond_timedwait(&reaped, &lock, &until);
    pthread_mutex_unlock(&lock);
    return any;
}

int fst_map_block(int device, uint64_t size, void **out) {
    block *b = calloc(1, sizeof *b);
    *out = NULL;
    if (!b) return cudaErrorMemoryAllocation;
    b->device = device;
    b->bytes = whole(device, size);
    int code = b->bytes ? map(b) : CUDA_ERROR_NOT_SUPPORTED;
    if (code == CUDA_ERROR_OUT_OF_MEMORY && await_reaped()) code = map(b);
    if (code) {
        free(b);
        return code == CUDA_ERROR_OUT_OF_MEMORY ? cudaErrorMemoryAllocation : cudaErrorNotSupported;
    }
    *out = (void *)(uintptr_t)b->at;
    pthread_mutex_lock(&lock);
    b->next = live;
    live = b;
    pthread_mutex_unlock(&lock);
    return 0;
}

static block *take(void *at) {
    block *found = NULL;
    pthread_mutex_lock(&lock);
    for (block **b = &live; *b && !found; b = &(*b)->next)
        if ((*b)->at == (CUdeviceptr)(uintptr_t)at) {
            found = *b;
            *b = found->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

/* Looks at the event for a moment: mostly nothing is under way. */
static int is_unused(const block *b) {
    cudaError_t code = cudaErrorNotReady;
    for (unsigned i = 0; i < LOOKS && code == cudaErrorNotReady; i++) code = cudaEventQuery(b->unused);
    if (code) (void)cudaGetLastError();
    return code != cudaErrorNotReady;
}

int fst_unmap_behind(void *at, cudaStream_t stream) {
    block *b = take(at);
    if (!b) return 0;
    if (cudaEventCreateWithFlags(&b->unused, cudaEventDisableTiming | cudaEventBlockingSync))
        b->unused = NULL;
    if (!b->unused || cudaEventRecord(b->unused, stream)) {
        (void)cudaGetLastError();
        (void)cudaStreamSynchronize(stream);
    } else if (!is_unused(b)) {
        pthread_mutex_lock(&lock);
        int left = start_reaping();
        if (left) b->next = dying, dying = b;
        pthread_mutex_unlock(&lock);
        if (left) return 1;
        (void)cudaEventSynchronize(b->unused);
    }
    unmap(b);
    return 1;
}
