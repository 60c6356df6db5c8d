/* Runs a plan: reader threads together fill one bounce slot after the other; copies follow one another on one stream, and
 * each slot has a stream for its kernels behind them, so that reads, copies and kernels overlap. engine.c has the threads and
 * what they need, pipeline.c what they do. */
#ifndef FST_PIPELINE_H
#define FST_PIPELINE_H

#include <pthread.h>
#include <stdatomic.h>

#include "budget.h"
#include "gpu.h"
#include "plan.h"
#include "reader.h"
#include "shared.h"

typedef struct fst_engine fst_engine;

typedef struct fst_engine_config {
    unsigned threads;      /* 0: as suits the device */
    size_t   slot_bytes;   /* 0: likewise */
    unsigned sharers;      /* ranks on this host, whose rings share its caches; 0: 1 */
    uint64_t largest_file; /* its bytes: a GPU's slots need not be larger; 0: not known */
    int      shares;       /* ranks read for one another, in device memory for as many units as there are slots */
} fst_engine_config;

typedef struct fst_engine_facts {
    unsigned threads, slots;
    size_t   slot_bytes;
    uint64_t pinned_bytes, staging_bytes;
    unsigned unpinned; /* slots that could not be pinned */
    int      node;     /* of the ring's memory and the threads; -1: any */
} fst_engine_facts;

/* An idle engine of this shape, or a new one; nobody else uses it until it is put back. `context` NULL is the
 * process's own. Chunk size and `place_bytes` for the plan follow from the facts. */
fst_status fst_engine_take(fst_context *context, const fst_gpu *gpu, const fst_engine_config *config,
                           fst_engine **out, fst_engine_facts *facts, fst_error *error);
void       fst_engine_put(fst_context *context, fst_engine *engine);
void       fst_engine_describe(const fst_engine *engine, fst_engine_facts *facts); /* as it is now */
/* The most strips that a chunk has. */
size_t     fst_engine_strips(const fst_engine *engine);

/* ---- Jobs ------------------------------------------------------------------------------------- */

/* Which tensors are complete, for a consumer that takes them one by one. */
typedef struct fst_tracking {
    atomic_uint *left;    /* of each tensor: chunks whose work is not queued yet */
    uint32_t    *ready;   /* tensors in the order in which they became complete; under the engine's lock */
    size_t       ready_count;
} fst_tracking;

/* The companions of a batch while the job runs; under the engine's lock. */
typedef struct fst_batch_state {
    void    *memory;          /* on the device; NULL: not yet, or no more */
    uint32_t companions_left; /* chunks that are not on the device yet */
    uint32_t weights_left;    /* chunks that still need them */
} fst_batch_state;

/* Stripes that wait in device memory until all of them is there, and counts of what is not a number. All zero at first
 * but `stripes_left`. */
typedef struct fst_stripe_state {
    atomic_uint done;     /* chunks whose part of it is queued */
    atomic_uint finisher; /* 1 + the chunk behind which its conversion was queued; 0: it was not */
} fst_stripe_state;
typedef struct fst_parking {
    void             *memory;       /* on the device; NULL: not yet, or no more */
    fst_stripe_state *stripes;      /* of the plan's */
    uint32_t         *windows_done; /* stripes of each that are done with; under the engine's lock, as is */
    uint32_t          stripes_left; /* how many there are that are not */
    uint64_t         *counters;     /* on the device */
    int               counters_are_set;
    uint64_t         *counts;       /* on the host: what they came to */
} fst_parking;

typedef struct fst_load_job {
    const fst_plan    *plan;
    const fst_header  *headers;
    const char *const *paths;
    fst_reader        *reader;
    fst_shared        *shared;     /* NULL: this rank reads for itself */
    int                use_ring;   /* io_uring for what is not cached */
    atomic_uchar      *hows;       /* of each strip (fst_engine_strips), at first 0: the pipeline's */
    _Atomic(void *)   *blocks;     /* device memory of each block; NULL: not allocated yet */
    fst_batch_state   *batches;    /* of the plan's; all zero at first */
    fst_parking       *parking;
    atomic_ushort     *slots;      /* of each chunk: 1 + the slot that it comes in; 0: it has none yet */
    /* Allocates block i and returns its memory. One call at a time, in order, from any thread; it may wait. */
    fst_status       (*allocate)(void *arg, size_t i, void **memory, fst_error *error);
    void              *allocate_arg;
    fst_budget        *budget;     /* that `allocate` waits for, or NULL */
    fst_tracking      *tracking;   /* NULL: nobody waits for single tensors */
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
    uint64_t nan_scales;           /* among the companions */
    uint64_t companion_bytes;      /* device memory of companions at its most */
    uint64_t parked_bytes;         /* and of what waits for its scales */
    uint64_t nans;                 /* that were quantized */
    double   held_seconds;         /* for blocks, most of it for a consumer that holds memory */
    double   slot_seconds;         /* of slots whose copies were queued and not known to be done */
    double   copy_ms, launch_ms;   /* on the device, by a sample that it timed */
    uint64_t sent_bytes, timed_bytes; /* that were copied to it */
} fst_pipeline_stats;

/* Returns when all is in place, or after the first failure, with every thread idle and every stream empty. The blocks
 * stay the caller's. */
fst_status fst_pipeline_run(fst_engine *engine, const fst_load_job *job, fst_pipeline_stats *stats,
                            fst_error *error);

/* The same in steps. After a begin that succeeded there must be one end. */
fst_status fst_pipeline_begin(fst_engine *engine, const fst_load_job *job, fst_error *error);
/* Waits for a tensor: this one, or, when `which` is FST_ANY_TENSOR, the next in the order of completion after `seen`
 * others. *which is then the tensor, its data ready, or, with `stream`, ready for work queued there from now on.
 * FST_E_AGAIN: it cannot come before memory of the budget is given back. */
#define FST_ANY_TENSOR UINT32_MAX
fst_status fst_pipeline_next(fst_engine *engine, const fst_load_job *job, size_t seen, uint32_t *which,
                             fst_queue stream, fst_error *error);
/* `abandon`: what is not done is left. */
fst_status fst_pipeline_end(fst_engine *engine, const fst_load_job *job, int abandon, fst_pipeline_stats *stats,
                            fst_error *error);

/* ---- For benchmarks and tests ----------------------------------------------------------------- */

/* What suits the machine; 0: the default. */
typedef struct fst_tuning {
    unsigned slots;       /* of a GPU's engine */
    size_t   strip_bytes; /* that a thread reads in one go, on a GPU; a multiple of 4,096 */
} fst_tuning;
extern fst_tuning fst_pipeline_tuning;

/* When not NULL, each read and each copy leaves a record: seconds of fst_os_now. */
typedef enum fst_trace_kind { FST_TRACE_READ, FST_TRACE_COPY } fst_trace_kind;
typedef struct fst_trace_record {
    fst_trace_kind kind;
    unsigned worker, slot; /* COPY: the one that sent it */
    uint32_t chunk, nbytes;
    fst_how  how;          /* READ */
    double   full;         /* COPY: since when all of the chunk was read */
    double   begin, end;   /* READ: on the CPU device conversions included. COPY: since it was queued, until that was
                              known to be done */
} fst_trace_record;
typedef struct fst_trace {
    fst_trace_record *records;
    size_t            room;
    atomic_size_t     count; /* may go beyond room: what is beyond was not kept */
} fst_trace;
extern fst_trace *fst_pipeline_trace;

#endif
