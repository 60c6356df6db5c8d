/* An engine: the threads, bounce slots, staging slots and streams for one device. It is kept after a load for the next.
 * A context keeps engines. */
#ifndef FST_ENGINE_H
#define FST_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>

#include "gpu.h"
#include "os.h"
#include "pipeline.h"
#include "ring.h"

#define FST_MAX_SLOTS 8u /* of a thread */

typedef enum fst_slot_state { FST_SLOT_FREE, FST_SLOT_READING, FST_SLOT_COPYING } fst_slot_state;

typedef struct fst_slot {
    unsigned char *bounce;  /* host memory, pinned when the device wants that */
    unsigned char *staging; /* its counterpart on the device */
    fst_event started, copied, converted;
    fst_slot_state state;
    uint32_t chunk;      /* that is in it */
    int finished;        /* READING: the ring has said how it went */
    ssize_t got;         /* and this is how */
    double queued;       /* COPYING: since when */
    size_t trace;        /* 1 + the number of its record; 0: none */
    int kernels_untimed; /* `converted` was not looked at yet */
} fst_slot;

typedef struct fst_worker {
    fst_engine *engine;
    pthread_t thread;
    fst_queue stream;
    unsigned slots_count; /* in use */
    fst_slot slots[FST_MAX_SLOTS];
    _Atomic uint32_t needs; /* 1 + the block that it waits for, or allocates; 0: none */
    uint32_t needs_batch;   /* 1 + the batch whose companions it waits for; 0: none; under the lock */
    uint32_t needs_window;  /* 1 + the chunk for whose stripes it waits; 0: none; likewise */
    fst_ring *ring;         /* io_uring; NULL: none yet */
    int ring_is_refused, ring_is_broken;
    const char *ring_why;   /* what the system refused of it; static text, or NULL */
    void *pinned;           /* the part of the ring that was, or NULL */
    int setup_code;         /* what making all this came to: a device error, or */
    const char *setup_what; /* at what; NULL: nothing went wrong */
    fst_pipeline_stats stats;
} fst_worker;

struct fst_engine {
    const fst_gpu *gpu;
    fst_engine *next; /* in the context's list of idle ones */
    pid_t process;    /* threads do not survive a fork */
    fst_engine_facts facts;
    unsigned threads_count; /* workers whose thread runs */
    unsigned slots_each;
    int node;           /* of the device's memory; -1: any */
    size_t slot_room;   /* bytes between the starts of two slots */
    size_t worker_room; /* and of two workers' parts of the ring */
    unsigned char *ring;
    size_t ring_bytes;
    void *staging;
    fst_worker *workers;

    pthread_mutex_t lock;
    pthread_cond_t wake;      /* workers: a job, or the end */
    pthread_cond_t done;      /* the caller: workers are idle, or a tensor is complete */
    pthread_cond_t allocated; /* workers: one more block is there */
    int quit;
    unsigned generation; /* counts jobs */
    unsigned settled;    /* workers that are set up */
    unsigned running;    /* workers at the job */
    const fst_load_job *job;
    fst_error first; /* what the job failed with; written by the first who fails */
    double reported; /* when the caller was last told of progress */

    size_t next_block;                        /* of the job's, to be allocated */
    int allocating;                           /* somebody does */
    uint64_t companion_bytes, companion_peak; /* memory of batches */
    atomic_size_t next_chunk;
    atomic_int stop; /* nothing new is begun */
    atomic_uint_fast64_t bytes_done;
};

/* What each worker does with a job: pipeline.c. */
void fst_engine_work(fst_worker *worker, const fst_load_job *job);

#endif
