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

#define FST_MAX_READS 4u /* of a thread, under way in its io_uring at one time */

/* A slot holds a chunk, which several threads read, strip by strip, and one sends on: it goes from FREE to FILLING to COPYING
 * to FREE. On the CPU device a thread has slots of its own, and reads and converts a chunk alone. */
typedef enum fst_slot_state {
    FST_SLOT_ABSENT, /* not made yet, or not pinned where others are */
    FST_SLOT_FREE,
    FST_SLOT_FILLING,
    FST_SLOT_COPYING
} fst_slot_state;

typedef struct fst_slot {
    unsigned char *bounce;  /* host memory, pinned when the device wants that */
    unsigned char *staging; /* its counterpart on the device */
    fst_queue stream; /* its kernels', behind its copies */
    fst_event copied, converted;
    fst_event started, stopped; /* copies that are timed */
    _Atomic(int) state;  /* an fst_slot_state */
    atomic_uint left;    /* FILLING: strips that are not read yet */
    uint32_t chunk;      /* that is in it */
    double full;         /* since when its chunk is */
    double queued;       /* COPYING: since when */
    unsigned sender;     /* the worker that sent the chunk on */
    int timed;           /* its copies are */
    int kernels_untimed; /* of such: `converted` was not looked at yet */
    int pinned;
} fst_slot;

/* Of a chunk, that one thread reads in one go. */
typedef struct fst_strip {
    uint32_t chunk, index; /* the index-th of its chunk */
    uint64_t offset;       /* in the file */
    uint32_t nbytes;
} fst_strip;

typedef struct fst_worker {
    fst_engine *engine;
    pthread_t thread;
    fst_queue stream;             /* of the slot whose chunk it sends */
    unsigned turn;                /* counts chunks: on the CPU device they take its slots by turns */
    _Atomic uint32_t needs;       /* 1 + the block that it waits for, or allocates; 0: none */
    uint32_t needs_batch;         /* 1 + the batch whose companions it waits for; 0: none; under the lock */
    uint32_t needs_window;        /* 1 + the chunk for whose stripes it waits; 0: none; likewise */
    _Atomic uint32_t needs_slot;  /* 1 + the chunk whose slot it waits for; 0: none */
    fst_ring *ring;               /* io_uring; NULL: none yet */
    int ring_is_refused, ring_is_broken;
    const char *ring_why;         /* what the system refused of it; static text, or NULL */
    struct {
        fst_slot *slot;           /* NULL: nothing is under way here */
        fst_strip strip;
        double begun;
    } reads[FST_MAX_READS];
    unsigned reads_count, full_count;
    fst_slot *full[FST_MAX_READS]; /* slots whose chunks are to be sent on by it */
    int setup_code;                /* what making all this came to: a device error, or */
    const char *setup_what;        /* at what; NULL: nothing went wrong */
    fst_pipeline_stats stats;
} fst_worker;

struct fst_engine {
    const fst_gpu *gpu;
    fst_engine *next; /* in the context's list of idle ones */
    pid_t process;    /* threads do not survive a fork */
    fst_engine_facts facts;
    unsigned threads_count; /* workers whose thread runs */
    unsigned slots_count;
    size_t strip_bytes;
    int node;         /* of the device's memory; -1: any */
    size_t slot_room; /* bytes between the starts of two slots */
    unsigned char *ring;
    size_t ring_bytes;
    void *staging;
    fst_worker *workers;
    fst_slot *slots;
    fst_queue copies;        /* of all slots, one after the other: two at a time are slower together, and either is done later */
    pthread_mutex_t sending; /* who queues there */
    unsigned sent;           /* counts chunks whose copies were queued; under `sending` */

    pthread_mutex_t lock;
    pthread_cond_t wake;      /* workers: a job, or the end */
    pthread_cond_t done;      /* the caller: workers are idle, or a tensor is complete */
    pthread_cond_t allocated; /* workers: one more block is there */
    pthread_cond_t moved;     /* workers: something became of a slot */
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
    atomic_uint_fast64_t next_strip; /* its chunk x 2^32 + which of that one's it is */
    uint64_t ahead;                  /* likewise: the next that nobody looked at; who holds `looking` */
    atomic_flag looking;             /* somebody looks at what comes later */
    _Atomic int64_t advised;         /* bytes that the kernel reads, and nobody has begun to read */
    atomic_uint next_slot;           /* the chunk that gets the next slot */
    atomic_flag giving;              /* somebody gives it one */
    atomic_uint inside;              /* workers that may still queue something */
    atomic_int stop; /* nothing new is begun */
    atomic_uint_fast64_t bytes_done;
};

/* What each worker does with a job: pipeline.c. */
void fst_engine_work(fst_worker *worker, const fst_load_job *job);

#endif
