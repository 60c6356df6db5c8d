/* The kernels' whole interface: plain data in, a status back. Compiled once for each device (HIP,
 * CUDA, and the CPU at three x86-64 levels), each copy behind one table of functions. */
#ifndef FST_KERNELS_H
#define FST_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A hipStream_t or cudaStream_t; NULL on the CPU, where a launch returns when it is done. */
typedef void *fst_stream;

/* 0, a HIP or CUDA error (> 0), or one of these, found before anything is launched. */
enum {
    FST_K_OK = 0,
    FST_K_NO_KERNEL = -1,  /* this pair of types does not exist */
    FST_K_NULL = -2,       /* a null pointer with work to do */
    FST_K_ALIGN = -3,      /* a destination not aligned to its element */
    FST_K_SIZE = -4        /* a count whose bytes overflow */
};

enum { FST_K_NON_SATURATING = 1u << 0 };

/* `count` elements, contiguous. `src` may have any byte alignment, `dst` that of its element. They do
 * not overlap. src_dtype == dst_dtype is a copy (the realignment of any dtype, integers included). */
typedef struct fst_cast_args {
    const void *src;
    void       *dst;
    uint64_t    count;
    int         src_dtype;  /* fst_dtype values; kernels know them from dtype_list.h */
    int         dst_dtype;
    unsigned    flags;
} fst_cast_args;

/* One of many small casts of one pair that go in one launch. On a GPU the list is in device memory. */
typedef struct fst_batch_job {
    uint64_t src;        /* address, any alignment */
    uint64_t dst;        /* address, aligned to the element */
    uint64_t count;      /* elements */
    uint64_t first_tile; /* tiles of the jobs before this one: fst_batch_tiles summed up */
} fst_batch_job;

typedef struct fst_batch_args {
    const fst_batch_job *jobs;  /* where the kernel can read it */
    uint32_t jobs_count;
    uint64_t tiles;             /* of all jobs */
    int      src_dtype;
    int      dst_dtype;
    unsigned flags;
} fst_batch_args;

/* Elements that one tile of a batch covers: first_tile counts in ceil(count / FST_BATCH_TILE). */
#define FST_BATCH_TILE 2048u

typedef struct fst_kernels {
    int (*cast)(fst_stream stream, const fst_cast_args *args);
    int (*batch)(fst_stream stream, const fst_batch_args *args);
    const char *target; /* "x86-64-v3", "hip", "cuda" */
} fst_kernels;

/* 1 when cast and batch exist for this pair: every ordered pair of the float types that have kernels,
 * and X -> X for every dtype. One rule for plan and kernels (numeric.h). */
int fst_kernels_have(int src_dtype, int dst_dtype);

/* The CPU's table, chosen once by what the processor has. */
const fst_kernels *fst_kernels_cpu(void);

/* The same for one level of x86-64 (2, 3, 4); NULL when the processor, or this build, lacks it. */
const fst_kernels *fst_kernels_cpu_level(int level);

/* The GPU's table: in the GPU module alone. */
const fst_kernels *fst_kernels_gpu(void);

#ifdef __cplusplus
}
#endif
#endif
