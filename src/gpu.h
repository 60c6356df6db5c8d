/* Seam 2: every device call, behind a table of functions. gpu_cpu.c is built in; gpu_hip.c (HIP, or
 * CUDA through kernels/cuda/hip) is a module loaded at run time; tests bring a fake.
 *
 * Calls return 0 or the device's error code (> 0: hipError_t, cudaError_t; text from `describe`) or a
 * FST_K_* (< 0). All may be called from any thread that is between enter and leave. */
#ifndef FST_GPU_H
#define FST_GPU_H

#include "fst.h"
#include "kernels.h"

#define FST_GPU_ABI 7
#define FST_GPU_OUT_OF_MEMORY 2 /* hipErrorOutOfMemory and cudaErrorMemoryAllocation: both are 2 */

#define FST_GPU_NOT_READY (-1)

typedef struct fst_gpu fst_gpu;
typedef void *fst_event;

typedef struct fst_gpu_calls {
    /* Makes the device the thread's current one; *saved is what leave puts back. */
    int (*enter)(const fst_gpu *, int *saved);
    void (*leave)(const fst_gpu *, int saved);
    const char *(*describe)(int code);

    int (*memory)(const fst_gpu *, uint64_t *free_bytes, uint64_t *total_bytes);
    /* Device memory, 256-byte aligned, usable on every stream when the call returns. free_block puts it
     * back in the order of the null stream, without waiting; it needs no enter. */
    int (*alloc_block)(const fst_gpu *, uint64_t size, void **out);
    void (*free_block)(const fst_gpu *, void *block, uint64_t size);
    /* The same in the order of a stream of the caller's. */
    void (*free_behind)(const fst_gpu *, fst_queue stream, void *block, uint64_t size);
    /* From `hold` to `let_go`, of which there may be several, freed memory stays at hand for the next alloc_block: to map it
     * anew takes much longer. `kept` is how many bytes that is now; `memory` does not count them as free. Need no enter. */
    void (*hold)(const fst_gpu *);
    void (*let_go)(const fst_gpu *);
    uint64_t (*kept)(const fst_gpu *);
    /* Makes host memory known to the device for asynchronous copies, and takes that back. */
    int (*pin)(const fst_gpu *, void *memory, size_t size);
    void (*unpin)(const fst_gpu *, void *memory);

    int (*stream_new)(const fst_gpu *, fst_queue *out);
    void (*stream_free)(const fst_gpu *, fst_queue);
    int (*stream_wait)(const fst_gpu *, fst_queue); /* the host waits until all of it is done */
    int (*event_new)(const fst_gpu *, int timed, fst_event *out);
    void (*event_free)(const fst_gpu *, fst_event);
    int (*event_record)(const fst_gpu *, fst_event, fst_queue);
    int (*event_wait)(const fst_gpu *, fst_event); /* the host waits; at once when never recorded */
    int (*event_query)(const fst_gpu *, fst_event); /* 0: it would not wait; FST_GPU_NOT_READY; or a code */
    /* Work that is queued on the stream from now on, the caller's, waits for what the event was last recorded behind. */
    int (*stream_follow)(const fst_gpu *, fst_queue stream, fst_event);
    /* Milliseconds from one recorded event to another, both timed and done; < 0 when not known. */
    float (*event_elapsed)(const fst_gpu *, fst_event from, fst_event to);

    int (*to_device)(const fst_gpu *, fst_queue, void *device, const void *host, size_t size);
    int (*to_host)(const fst_gpu *, fst_queue, void *host, const void *device, size_t size);
    int (*copy_on_device)(const fst_gpu *, fst_queue, void *dst, const void *src, size_t size);
} fst_gpu_calls;

/* One device. Lives as long as the process once found: results may outlive everything else. */
struct fst_gpu {
    const fst_gpu_calls *calls;
    const fst_kernels   *kernels;
    int  dlpack_type;    /* kDLCPU 1, kDLCUDA 2, kDLROCM 10 */
    int  index;          /* as the runtime counts */
    int  host_access;    /* 1: blocks are host memory, kernels return when done, nothing is copied */
    char label[16];      /* "cpu", "hip:0", "cuda:0" */
    char name[128];
    char pci[16];        /* where it is attached, "0000:17:00.0"; "": nowhere */
};

/* What a module exports as `fst_module`. */
typedef struct fst_gpu_module {
    int abi;             /* FST_GPU_ABI */
    const char *runtime; /* "hip" or "cuda" */
    /* Devices there are; a negative error code when the runtime does not work here. */
    int (*count)(void);
    const char *(*describe)(int code);
    /* Fills in *gpu and checks that an allocation, a copy and a kernel work on it. */
    int (*open)(int index, fst_gpu *gpu);
} fst_gpu_module;

extern const fst_gpu_module fst_module;

/* The CPU device. */
const fst_gpu *fst_gpu_cpu(void);

/* The device that the options ask for. `reason` says why this one, and what was wrong with GPUs that
 * were passed over. FST_E_ARG, FST_E_NO_DEVICE. */
fst_status fst_gpu_find(int device, const fst_gpu **out, char *reason, size_t reason_size, fst_error *error);

/* Tests put a device of their own in the place of GPU 0; NULL takes it away. */
void fst_gpu_set_fake(const fst_gpu *gpu);

/* Bytes that alloc_block can give: free ones, and those that are kept. 0 when the device does not tell. Between enter and
 * leave. */
uint64_t fst_gpu_available(const fst_gpu *gpu);

/* A status and text for what a call returned. `what` says what was tried ("copy to the device"). */
fst_status fst_gpu_fail(fst_error *error, const fst_gpu *gpu, int code, const char *what);

#endif
