/* Runs a plan: reader threads fill bounce slots, each with its own stream on which the copy and the
 * kernels of a chunk follow one another, so that reads, copies and kernels of different chunks overlap.
 *
 * An engine is the threads, slots and streams for one device. It is kept after a load for the next. */
#ifndef FST_PIPELINE_H
#define FST_PIPELINE_H

#include "gpu.h"
#include "os.h"
#include "plan.h"

typedef struct fst_engine fst_engine;

typedef struct fst_engine_config {
    unsigned threads;     /* 0: as suits the device */
    size_t   slot_bytes;  /* 0: likewise */
} fst_engine_config;

typedef struct fst_engine_facts {
    unsigned threads, slots;
    size_t   slot_bytes;
    uint64_t pinned_bytes, staging_bytes;
} fst_engine_facts;

/* An idle engine of this shape, or a new one; nobody else uses it until it is put back. `place_bytes`
 * and chunk size for the plan follow from the facts. */
fst_status fst_engine_take(const fst_gpu *gpu, const fst_engine_config *config, fst_engine **out,
                           fst_engine_facts *facts, fst_error *error);
void       fst_engine_put(fst_engine *engine);
void       fst_engine_describe(const fst_engine *engine, fst_engine_facts *facts); /* as it is now */
void       fst_engines_release(void); /* frees all idle ones */

typedef struct fst_load_job {
    const fst_plan    *plan;
    const fst_header  *headers;
    const int         *fds;        /* of each file */
    const char *const *paths;
    void             **blocks;     /* device memory of each block; those from blocks_ready on come later */
    size_t             blocks_ready;
    /* Allocates block i into blocks[i], in the caller's thread, while others read: mapping memory takes time. */
    fst_status       (*allocate)(void *arg, size_t i, fst_error *error);
    void              *allocate_arg;
    unsigned           flags;      /* FST_NON_SATURATING */
    fst_progress_fn    progress;
    void              *progress_arg;
    const volatile int *cancel;
    double             started;    /* fst_os_now() at the entry of fst_load */
    uint64_t           bytes_total;
} fst_load_job;

typedef struct fst_pipeline_stats {
    uint64_t chunks, launches, bytes_read;
    double   read_seconds, wait_seconds, kernel_seconds;
    double   copy_ms, launch_ms;   /* on the device, sampled */
} fst_pipeline_stats;

/* Returns when all is in place, or after the first failure, with every thread idle and every stream
 * empty. The blocks stay the caller's. */
fst_status fst_pipeline_run(fst_engine *engine, const fst_load_job *job, fst_pipeline_stats *stats,
                            fst_error *error);

#endif
