#include "pipeline.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "dtype.h"

#define PAGE 4096u
#define SLOTS_PER_THREAD 2u
#define MAX_THREADS 64u
#define MAX_IDLE 2u                  /* engines kept for the next load */
#define MAX_RING ((size_t)256 << 20) /* bytes of slots, unless more is asked for in so many words */
#define MIN_SLOT ((size_t)64 << 10)
#define PROGRESS_SECONDS 0.05
#define DIRECT_LAUNCHES 2u /* so many CONVERT pieces in a chunk are launched one by one, more as a batch */

/* Measured on an H100 with 16 cores: 12 threads with two slots of 4 MiB reach the link's limit, and the
 * ring stays in the last-level cache; 8 MiB slots lose a third (docs/measuring.md). */
#define GPU_THREADS 12u
#define GPU_SLOT ((size_t)4 << 20)
#define CPU_SLOT ((size_t)512 << 10) /* what is read is still in the core's cache when it is converted */

typedef struct slot {
    unsigned char *bounce;  /* host memory, pinned when the device wants that */
    unsigned char *staging; /* its counterpart on the device */
    fst_event started, copied, converted;
    int busy;        /* its copies were queued and not waited for */
    uint64_t nbytes; /* of the chunk in it */
} slot;

typedef struct worker {
    fst_engine *engine;
    pthread_t thread;
    fst_queue stream;
    slot slots[SLOTS_PER_THREAD];
    fst_pipeline_stats stats;
} worker;

struct fst_engine {
    const fst_gpu *gpu;
    fst_engine *next;       /* in the list of idle ones */
    pid_t process;          /* threads do not survive a fork */
    unsigned threads_count; /* workers whose thread runs */
    fst_engine_facts facts;
    size_t slot_room; /* bytes between the starts of two slots */
    unsigned char *ring;
    size_t ring_bytes;
    int pinned;
    void *staging;
    worker *workers;

    pthread_mutex_t lock;
    pthread_cond_t wake;        /* workers: a job, or the end */
    pthread_cond_t done;        /* the caller: all workers are idle */
    pthread_cond_t allocated;   /* workers: one more block is there, or none will come */
    atomic_size_t blocks_ready; /* of the job's blocks */
    int quit;
    unsigned generation; /* counts jobs */
    unsigned running;    /* workers at the job, or, at first, at touching their slots */
    const fst_load_job *job;
    fst_error *error; /* of the job; written by the first who fails */

    atomic_size_t next_chunk;
    atomic_int stop; /* nothing new is begun */
    atomic_uint_fast64_t bytes_done;
};

/* ---- One chunk ------------------------------------------------------------------------------- */

/* The first failure of a job counts; it stops all the others. */
static fst_error *claim_error(fst_engine *engine) {
    if (atomic_exchange(&engine->stop, 1)) return NULL;
    pthread_mutex_lock(&engine->lock);
    pthread_cond_broadcast(&engine->allocated);
    pthread_mutex_unlock(&engine->lock);
    return engine->error;
}

static void fail_device(fst_engine *engine, int code, const char *what) {
    fst_error *error = claim_error(engine);
    if (error) fst_gpu_fail(error, engine->gpu, code, what);
}

static const char *piece_name(const fst_load_job *job, const fst_plan_piece *piece) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    return job->headers[tensor->file].tensors[tensor->entry].name;
}

/* Reads `size` bytes of the chunk's file; a failure names the tensor that `piece` is of. */
static int read_part(worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, uint32_t piece,
                     void *buffer, size_t size, uint64_t offset) {
    double start = fst_os_now();
    ssize_t got = fst_os_read_all(job->fds[chunk->file], buffer, size, offset);
    w->stats.read_seconds += fst_os_now() - start;
    if (got == (ssize_t)size) {
        w->stats.bytes_read += size;
        return 1;
    }
    fst_error *error = claim_error(w->engine);
    if (!error) return 0;
    const char *name = piece_name(job, &job->plan->pieces[piece]);
    if (got < 0) {
        fst_where where = {job->paths[chunk->file], (int)chunk->file, (int64_t)offset};
        fst_fail(error, FST_E_IO, (int)-got, &where, "reading tensor \"%s\": %s", name, strerror((int)-got));
    } else {
        fst_where where = {job->paths[chunk->file], (int)chunk->file, (int64_t)(offset + (uint64_t)got)};
        fst_fail(error, FST_E_CHANGED, 0, &where,
                 "the file ends here, inside tensor \"%s\": it was cut short during the load", name);
    }
    return 0;
}

/* What converts a piece that lies at `src`. */
static fst_cast_args cast_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    return (fst_cast_args){
        .src = src,
        .dst = (unsigned char *)job->blocks[tensor->block] + tensor->block_offset + piece->dst_offset,
        .count = piece->count,
        .src_dtype = (int)job->headers[tensor->file].tensors[tensor->entry].dtype,
        .dst_dtype = (int)tensor->dtype,
        .flags = job->flags & FST_NON_SATURATING ? FST_K_NON_SATURATING : 0,
    };
}

static int launch_one(worker *w, const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    fst_cast_args args = cast_args(job, piece, src);
    w->stats.launches++;
    return w->engine->gpu->kernels->cast(w->stream, &args);
}

/* The CPU device: what is kept is read into place, what is converted comes through the slot. */
static int load_chunk_on_host(worker *w, const fst_load_job *job, const fst_plan_chunk *chunk) {
    const fst_plan *plan = job->plan;
    for (uint32_t r = 0; r < chunk->runs; r++) {
        const fst_plan_run *run = &plan->runs[chunk->first_run + r];
        const fst_plan_piece *pieces = &plan->pieces[run->first_piece];
        uint64_t offset = chunk->offset + run->chunk_offset;
        if (run->kind == FST_RUN_PLACE) {
            fst_cast_args args = cast_args(job, pieces, NULL);
            if (!read_part(w, job, chunk, run->first_piece, args.dst, run->nbytes, offset)) return 0;
            continue;
        }
        unsigned char *buffer = w->slots[0].bounce + offset % PAGE;
        if (!read_part(w, job, chunk, run->first_piece, buffer, run->nbytes, offset)) return 0;
        double start = fst_os_now();
        for (uint32_t i = 0; i < run->pieces; i++) {
            int code = launch_one(w, job, &pieces[i], buffer + (pieces[i].chunk_offset - run->chunk_offset));
            if (code) {
                fail_device(w->engine, code, "a cast");
                return 0;
            }
        }
        w->stats.kernel_seconds += fst_os_now() - start;
    }
    atomic_fetch_add(&w->engine->bytes_done, chunk->nbytes);
    return 1;
}

/* Waits until the copies out of a slot are done. 0, or a device error. */
static int drain_slot(worker *w, slot *s) {
    const fst_gpu *gpu = w->engine->gpu;
    if (!s->busy) return 0;
    double start = fst_os_now();
    int code = gpu->calls->event_wait(gpu, s->copied);
    w->stats.wait_seconds += fst_os_now() - start;
    s->busy = 0;
    if (code) return code;
    atomic_fetch_add(&w->engine->bytes_done, s->nbytes);
    float copy = gpu->calls->event_elapsed(gpu, s->started, s->copied);
    float convert = gpu->calls->event_elapsed(gpu, s->copied, s->converted);
    if (copy > 0) w->stats.copy_ms += (double)copy;
    if (convert > 0) w->stats.launch_ms += (double)convert;
    return 0;
}

/* The jobs of one pair of dtypes among a chunk's CONVERT pieces. */
typedef struct job_list {
    int src_dtype, dst_dtype;
    uint32_t count;
    uint64_t tiles;
} job_list;

#define MAX_PAIRS 64u /* kept dtypes and casts to one target: at most twice the dtypes there are */

/* The next of a chunk's CONVERT pieces, UINT32_MAX behind the last. *run and *i start as 0. */
static uint32_t next_convert_piece(const fst_plan *plan, const fst_plan_chunk *chunk, uint32_t *run,
                                   uint32_t *i) {
    while (*run < chunk->runs) {
        const fst_plan_run *r = &plan->runs[chunk->first_run + *run];
        if (r->kind == FST_RUN_CONVERT && *i < r->pieces) return r->first_piece + (*i)++;
        ++*run;
        *i = 0;
    }
    return UINT32_MAX;
}

/* Writes the chunk's job list, grouped by pair, to `jobs`: addresses are those on the device. */
static uint32_t make_jobs(const fst_load_job *job, const fst_plan_chunk *chunk, const unsigned char *staged,
                          fst_batch_job *jobs, job_list lists[MAX_PAIRS]) {
    uint32_t lists_count = 0, starts[MAX_PAIRS], start = 0;
    for (int pass = 0; pass < 2; pass++) {
        uint32_t run = 0, i = 0, piece;
        while ((piece = next_convert_piece(job->plan, chunk, &run, &i)) != UINT32_MAX) {
            const fst_plan_piece *p = &job->plan->pieces[piece];
            fst_cast_args args = cast_args(job, p, staged + p->chunk_offset);
            uint32_t k = 0;
            while (k < lists_count &&
                   (lists[k].src_dtype != args.src_dtype || lists[k].dst_dtype != args.dst_dtype))
                k++;
            if (k == lists_count) lists[lists_count++] = (job_list){args.src_dtype, args.dst_dtype, 0, 0};
            if (pass == 1) {
                jobs[starts[k] + lists[k].count] = (fst_batch_job){
                    (uint64_t)(uintptr_t)args.src, (uint64_t)(uintptr_t)args.dst, args.count, lists[k].tiles};
                lists[k].tiles += (args.count + FST_BATCH_TILE - 1) / FST_BATCH_TILE;
            }
            lists[k].count++;
        }
        if (pass == 1) break;
        for (uint32_t k = 0; k < lists_count; k++) { /* the second pass counts again, now from places */
            starts[k] = start;
            start += lists[k].count;
            lists[k].count = 0;
        }
    }
    return lists_count;
}

static int convert_batched(worker *w, const fst_load_job *job, const job_list *lists, uint32_t lists_count,
                           const fst_batch_job *staged_jobs) {
    for (uint32_t k = 0; k < lists_count; k++) {
        fst_batch_args args = {
            .jobs = staged_jobs,
            .jobs_count = lists[k].count,
            .tiles = lists[k].tiles,
            .src_dtype = lists[k].src_dtype,
            .dst_dtype = lists[k].dst_dtype,
            .flags = job->flags & FST_NON_SATURATING ? FST_K_NON_SATURATING : 0,
        };
        int code = w->engine->gpu->kernels->batch(w->stream, &args);
        if (code) return code;
        w->stats.launches++;
        staged_jobs += lists[k].count;
    }
    return 0;
}

/* Queues the copies and kernels of a chunk that was read into the slot. 0 or a code; *what says of what. */
static int queue_chunk(worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, slot *s,
                       const char **what) {
    const fst_gpu *gpu = w->engine->gpu;
    const fst_plan *plan = job->plan;
    size_t shift = chunk->offset % PAGE; /* the slot keeps the file's alignment to pages */
    unsigned char *bounce = s->bounce + shift, *staged = s->staging ? s->staging + shift : NULL;
    size_t jobs_at = ((shift + chunk->nbytes + 63) & ~(size_t)63) - shift; /* behind the data */
    uint32_t convert_pieces = chunk->jobs_bytes / sizeof(fst_batch_job), lists_count = 0;
    job_list lists[MAX_PAIRS];
    size_t jobs_bytes = 0;
    int code = gpu->calls->event_record(gpu, s->started, w->stream);
    *what = "a copy to the device";
    if (convert_pieces > DIRECT_LAUNCHES) {
        lists_count = make_jobs(job, chunk, staged, (fst_batch_job *)(void *)(bounce + jobs_at), lists);
        jobs_bytes = chunk->jobs_bytes;
    }
    for (uint32_t r = 0; r < chunk->runs && !code; r++) {
        const fst_plan_run *run = &plan->runs[chunk->first_run + r];
        size_t nbytes = run->nbytes;
        void *to;
        if (run->kind == FST_RUN_PLACE) {
            to = cast_args(job, &plan->pieces[run->first_piece], NULL).dst;
        } else {
            to = staged + run->chunk_offset;
            if (jobs_bytes && run->chunk_offset + run->nbytes == chunk->nbytes) {
                nbytes = jobs_at + jobs_bytes - run->chunk_offset; /* the list goes along with the last run */
                jobs_bytes = 0;
            }
        }
        code = gpu->calls->to_device(gpu, w->stream, to, bounce + run->chunk_offset, nbytes);
    }
    if (jobs_bytes && !code)
        code = gpu->calls->to_device(gpu, w->stream, staged + jobs_at, bounce + jobs_at, jobs_bytes);
    if (!code) code = gpu->calls->event_record(gpu, s->copied, w->stream);
    if (code) return code;
    *what = "a kernel's launch";
    if (lists_count) {
        code = convert_batched(w, job, lists, lists_count,
                               (const fst_batch_job *)(const void *)(staged + jobs_at));
    } else {
        uint32_t run = 0, i = 0, piece;
        while (!code && (piece = next_convert_piece(plan, chunk, &run, &i)) != UINT32_MAX)
            code = launch_one(w, job, &plan->pieces[piece], staged + plan->pieces[piece].chunk_offset);
    }
    if (!code) code = gpu->calls->event_record(gpu, s->converted, w->stream);
    return code;
}

static int load_chunk_on_device(worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, slot *s) {
    const char *what = "waiting for a copy";
    int code = drain_slot(w, s);
    if (!code) {
        uint32_t first = job->plan->runs[chunk->first_run].first_piece;
        if (atomic_load(&w->engine->stop)) return 0;
        if (!read_part(w, job, chunk, first, s->bounce + chunk->offset % PAGE, chunk->nbytes, chunk->offset))
            return 0;
        s->busy = 1;
        s->nbytes = chunk->nbytes;
        code = queue_chunk(w, job, chunk, s, &what);
    }
    if (code) fail_device(w->engine, code, what);
    return code == 0;
}

/* Waits until the blocks of a chunk's tensors are there. Tensors are in the order of their blocks, and so the last
 * one tells. 0 when the job was stopped. */
static int wait_for_blocks(fst_engine *engine, const fst_load_job *job, const fst_plan_chunk *chunk) {
    const fst_plan_run *last = &job->plan->runs[chunk->first_run + chunk->runs - 1];
    const fst_plan_piece *piece = &job->plan->pieces[last->first_piece + last->pieces - 1];
    size_t needed = (size_t)job->plan->tensors[piece->tensor].block + 1;
    if (atomic_load(&engine->blocks_ready) >= needed) return 1;
    pthread_mutex_lock(&engine->lock);
    while (atomic_load(&engine->blocks_ready) < needed && !atomic_load(&engine->stop))
        pthread_cond_wait(&engine->allocated, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
    return !atomic_load(&engine->stop);
}

/* ---- Workers --------------------------------------------------------------------------------- */

static void work(worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    const fst_gpu *gpu = engine->gpu;
    for (unsigned turn = 0; !atomic_load(&engine->stop); turn++) {
        size_t i = atomic_fetch_add(&engine->next_chunk, 1);
        if (i >= job->plan->chunks_count) break;
        const fst_plan_chunk *chunk = &job->plan->chunks[i];
        if (!wait_for_blocks(engine, job, chunk)) break;
        w->stats.chunks++;
        if (!(gpu->host_access ? load_chunk_on_host(w, job, chunk)
                               : load_chunk_on_device(w, job, chunk, &w->slots[turn % SLOTS_PER_THREAD])))
            break;
    }
    if (gpu->host_access) return;
    /* Also after a failure: nothing may be under way when the blocks are freed. */
    for (unsigned i = 0; i < SLOTS_PER_THREAD; i++) {
        int code = drain_slot(w, &w->slots[i]);
        if (code) fail_device(engine, code, "waiting for a copy");
    }
    double start = fst_os_now();
    int code = gpu->calls->stream_wait(gpu, w->stream);
    w->stats.wait_seconds += fst_os_now() - start;
    if (code) fail_device(engine, code, "waiting for the device");
}

/* Pages are given out at the first touch: by all threads at once, each for what it will use. */
static void touch_slots(worker *w) {
    const fst_engine *engine = w->engine;
    size_t each = engine->slot_room * (engine->facts.slots / engine->facts.threads);
    volatile unsigned char *mine = engine->ring + each * (size_t)(w - engine->workers);
    for (size_t i = 0; i < each; i += PAGE) mine[i] = 0;
}

static void *worker_main(void *arg) {
    worker *w = arg;
    fst_engine *engine = w->engine;
    unsigned seen = 0;
    int saved;
    int entered = engine->gpu->calls->enter(engine->gpu, &saved);
    touch_slots(w);
    pthread_mutex_lock(&engine->lock);
    if (--engine->running == 0) pthread_cond_signal(&engine->done);
    for (;;) {
        while (!engine->quit && engine->generation == seen) pthread_cond_wait(&engine->wake, &engine->lock);
        if (engine->quit) break;
        seen = engine->generation;
        const fst_load_job *job = engine->job;
        pthread_mutex_unlock(&engine->lock);
        if (entered != 0) fail_device(engine, entered, "choosing the device");
        work(w, job);
        pthread_mutex_lock(&engine->lock);
        if (--engine->running == 0) pthread_cond_signal(&engine->done);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- Engines --------------------------------------------------------------------------------- */

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static fst_engine *idle;

static void free_slot(const fst_gpu *gpu, slot *s) {
    if (s->started) gpu->calls->event_free(gpu, s->started);
    if (s->copied) gpu->calls->event_free(gpu, s->copied);
    if (s->converted) gpu->calls->event_free(gpu, s->converted);
}

static void engine_free(fst_engine *engine) {
    const fst_gpu *gpu = engine->gpu;
    int saved, entered = gpu->calls->enter(gpu, &saved) == 0;
    pthread_mutex_lock(&engine->lock);
    engine->quit = 1;
    pthread_cond_broadcast(&engine->wake);
    pthread_mutex_unlock(&engine->lock);
    for (unsigned i = 0; i < engine->threads_count; i++) pthread_join(engine->workers[i].thread, NULL);
    for (unsigned i = 0; engine->workers && i < engine->facts.threads; i++) {
        worker *w = &engine->workers[i];
        for (unsigned k = 0; k < SLOTS_PER_THREAD; k++) free_slot(gpu, &w->slots[k]);
        if (w->stream) gpu->calls->stream_free(gpu, w->stream);
    }
    if (engine->staging) gpu->calls->free_block(gpu, engine->staging, engine->facts.staging_bytes);
    if (engine->pinned) gpu->calls->unpin(gpu, engine->ring);
    if (engine->ring) fst_os_calls.unmap(engine->ring, engine->ring_bytes);
    if (entered) gpu->calls->leave(gpu, saved);
    free(engine->workers);
    pthread_mutex_destroy(&engine->lock);
    pthread_cond_destroy(&engine->wake);
    pthread_cond_destroy(&engine->done);
    pthread_cond_destroy(&engine->allocated);
    free(engine);
}

/* Waits until all is touched. Memory that was touched on huge pages and is then registered takes a quarter of the time of a pinned
 * allocation. When the system refuses to pin, copies from pageable memory are slower but right. */
static void pin_ring(fst_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    while (engine->running > 0) pthread_cond_wait(&engine->done, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
    if (engine->gpu->host_access) return;
    engine->pinned = engine->gpu->calls->pin(engine->gpu, engine->ring, engine->ring_bytes) == 0;
    engine->facts.pinned_bytes = engine->pinned ? engine->ring_bytes : 0;
}

static fst_status make_stream(const fst_engine *engine, worker *w, fst_error *error) {
    const fst_gpu *gpu = engine->gpu;
    int code = gpu->calls->stream_new(gpu, &w->stream);
    for (unsigned k = 0; k < SLOTS_PER_THREAD && !code; k++) {
        code = gpu->calls->event_new(gpu, &w->slots[k].started);
        if (!code) code = gpu->calls->event_new(gpu, &w->slots[k].copied);
        if (!code) code = gpu->calls->event_new(gpu, &w->slots[k].converted);
    }
    return code ? fst_gpu_fail(error, gpu, code, "making streams and events") : FST_OK;
}

/* Readers take no signals: those are the program's. */
static fst_status start_threads(fst_engine *engine, fst_error *error) {
    sigset_t all, before;
    int code = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    engine->running = engine->facts.threads;
    while (engine->threads_count < engine->facts.threads && code == 0) {
        worker *w = &engine->workers[engine->threads_count];
        code = pthread_create(&w->thread, NULL, worker_main, w);
        if (code == 0) engine->threads_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code ? fst_fail(error, FST_E_MEMORY, code, NULL, "starting a reader thread: %s", strerror(code))
                : FST_OK;
}

static fst_status engine_new(const fst_gpu *gpu, unsigned threads, size_t slot_bytes, fst_engine **out,
                             fst_error *error) {
    unsigned slots = gpu->host_access ? 1 : SLOTS_PER_THREAD;
    fst_engine *engine = calloc(1, sizeof *engine);
    *out = NULL;
    if (!engine) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->done, NULL);
    pthread_cond_init(&engine->wake, NULL);
    pthread_cond_init(&engine->allocated, NULL);
    engine->gpu = gpu;
    engine->process = getpid();
    engine->facts =
        (fst_engine_facts){.threads = threads, .slots = threads * slots, .slot_bytes = slot_bytes};
    /* A page before and behind the chunk, because it keeps the file's alignment, and its jobs. */
    engine->slot_room = slot_bytes + slot_bytes / 8 + 2 * PAGE;
    engine->ring_bytes = engine->slot_room * engine->facts.slots;
    engine->workers = calloc(threads, sizeof *engine->workers);
    engine->ring = fst_os_calls.map(engine->ring_bytes);
    fst_status status = FST_OK;
    if (!engine->workers || !engine->ring)
        status = fst_fail(error, FST_E_MEMORY, 0, NULL, "no memory for a bounce ring of %zu bytes",
                          engine->ring_bytes);
    for (unsigned i = 0; i < threads && !status; i++) {
        worker *w = &engine->workers[i];
        w->engine = engine;
        for (unsigned k = 0; k < slots; k++)
            w->slots[k].bounce = engine->ring + engine->slot_room * (i * slots + k);
    }
    if (!status) status = start_threads(engine, error); /* they touch the ring while streams are made */
    for (unsigned i = 0; i < threads && !status; i++)
        status = make_stream(engine, &engine->workers[i], error);
    if (!status) pin_ring(engine);
    if (status) {
        engine_free(engine);
        return status;
    }
    *out = engine;
    return FST_OK;
}

/* The idle engine of this shape, out of the list. Engines of before a fork have no threads here: dropped. */
static fst_engine *take_idle(const fst_gpu *gpu, unsigned threads, size_t slot_bytes) {
    fst_engine *found = NULL;
    pthread_mutex_lock(&idle_lock);
    for (fst_engine **at = &idle; *at;) {
        fst_engine *engine = *at;
        if (engine->process != getpid()) {
            *at = engine->next;
            continue;
        }
        if (engine->gpu == gpu && engine->facts.threads == threads &&
            engine->facts.slot_bytes == slot_bytes) {
            *at = engine->next;
            found = engine;
            break;
        }
        at = &engine->next;
    }
    pthread_mutex_unlock(&idle_lock);
    return found;
}

fst_status fst_engine_take(const fst_gpu *gpu, const fst_engine_config *config, fst_engine **out,
                           fst_engine_facts *facts, fst_error *error) {
    unsigned cpus = fst_os_cpus(), threads = config->threads;
    size_t slot_bytes = config->slot_bytes;
    fst_status status = FST_OK;
    if (threads == 0) threads = gpu->host_access || cpus < GPU_THREADS ? cpus : GPU_THREADS;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (slot_bytes == 0) {
        size_t most = MAX_RING / SLOTS_PER_THREAD / threads;
        slot_bytes = gpu->host_access ? CPU_SLOT : GPU_SLOT;
        if (slot_bytes > most) slot_bytes = most > MIN_SLOT ? most : MIN_SLOT;
    }
    slot_bytes = (slot_bytes + PAGE - 1) / PAGE * PAGE;
    *out = take_idle(gpu, threads, slot_bytes);
    if (!*out) {
        int saved, code = gpu->calls->enter(gpu, &saved);
        if (code) return fst_gpu_fail(error, gpu, code, "choosing the device");
        status = engine_new(gpu, threads, slot_bytes, out, error);
        gpu->calls->leave(gpu, saved);
    }
    if (!status) *facts = (*out)->facts;
    return status;
}

static void free_list(fst_engine *list) {
    while (list) {
        fst_engine *engine = list;
        list = engine->next;
        if (engine->process == getpid()) engine_free(engine);
    }
}

void fst_engine_describe(const fst_engine *engine, fst_engine_facts *facts) { *facts = engine->facts; }

void fst_engine_put(fst_engine *engine) {
    fst_engine *dropped = NULL;
    unsigned count = 0;
    pthread_mutex_lock(&idle_lock);
    engine->next = idle;
    idle = engine;
    for (fst_engine **at = &idle; *at; at = &(*at)->next)
        if (++count == MAX_IDLE) { /* the oldest go: their rings hold memory that others could use */
            dropped = (*at)->next;
            (*at)->next = NULL;
            break;
        }
    pthread_mutex_unlock(&idle_lock);
    free_list(dropped);
}

void fst_engines_release(void) {
    pthread_mutex_lock(&idle_lock);
    fst_engine *list = idle;
    idle = NULL;
    pthread_mutex_unlock(&idle_lock);
    free_list(list);
}

/* ---- A load ---------------------------------------------------------------------------------- */

/* The staging slots, made by the first load that converts anything. */
static fst_status make_staging(fst_engine *engine, const fst_plan *plan, fst_error *error) {
    const fst_gpu *gpu = engine->gpu;
    if (gpu->host_access || engine->staging || plan->max_jobs_bytes == 0) return FST_OK;
    uint64_t size = (uint64_t)engine->slot_room * engine->facts.slots;
    int code = gpu->calls->alloc_block(gpu, size, &engine->staging);
    if (code) {
        engine->staging = NULL;
        return fst_gpu_fail(error, gpu, code, "allocating the staging ring");
    }
    engine->facts.staging_bytes = size;
    for (unsigned i = 0; i < engine->facts.threads; i++)
        for (unsigned k = 0; k < SLOTS_PER_THREAD; k++)
            engine->workers[i].slots[k].staging =
                (unsigned char *)engine->staging + engine->slot_room * (i * SLOTS_PER_THREAD + k);
    return FST_OK;
}

/* Allocates what is not there yet, while the workers begin with what is. */
static void allocate_blocks(fst_engine *engine, const fst_load_job *job) {
    for (size_t i = job->blocks_ready; i < job->plan->blocks_count && !atomic_load(&engine->stop); i++) {
        fst_error why = {.status = FST_OK};
        fst_status status = job->allocate(job->allocate_arg, i, &why);
        fst_error *error = status ? claim_error(engine) : NULL;
        if (error) *error = why;
        pthread_mutex_lock(&engine->lock);
        if (!status) atomic_store(&engine->blocks_ready, i + 1);
        pthread_cond_broadcast(&engine->allocated);
        pthread_mutex_unlock(&engine->lock);
    }
}

/* Reports progress and looks for a cancel, until all workers are idle. */
static void attend(fst_engine *engine, const fst_load_job *job) {
    int finished = 0;
    pthread_mutex_lock(&engine->lock);
    while (!finished) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += (long)(PROGRESS_SECONDS * 1e9);
        if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
        if (engine->running) pthread_cond_timedwait(&engine->done, &engine->lock, &until);
        finished = engine->running == 0;
        pthread_mutex_unlock(&engine->lock);
        int cancelled = job->cancel && *job->cancel;
        if (job->progress && !atomic_load(&engine->stop)) {
            fst_progress progress = {atomic_load(&engine->bytes_done), job->bytes_total,
                                     fst_os_now() - job->started};
            cancelled |= job->progress(job->progress_arg, &progress) != 0;
        }
        if (cancelled) {
            fst_error *error = claim_error(engine);
            if (error) fst_fail(error, FST_E_CANCELLED, 0, NULL, "the load was cancelled");
        }
        pthread_mutex_lock(&engine->lock);
    }
    pthread_mutex_unlock(&engine->lock);
}

static void sum_stats(const fst_engine *engine, fst_pipeline_stats *out) {
    memset(out, 0, sizeof *out);
    for (unsigned i = 0; i < engine->facts.threads; i++) {
        const fst_pipeline_stats *s = &engine->workers[i].stats;
        out->chunks += s->chunks;
        out->launches += s->launches;
        out->bytes_read += s->bytes_read;
        out->read_seconds += s->read_seconds;
        out->wait_seconds += s->wait_seconds;
        out->kernel_seconds += s->kernel_seconds;
        out->copy_ms += s->copy_ms;
        out->launch_ms += s->launch_ms;
    }
}

fst_status fst_pipeline_run(fst_engine *engine, const fst_load_job *job, fst_pipeline_stats *stats,
                            fst_error *error) {
    fst_error first = {.status = FST_OK};
    fst_status status = make_staging(engine, job->plan, error);
    memset(stats, 0, sizeof *stats);
    if (status) return status;
    atomic_store(&engine->next_chunk, 0);
    atomic_store(&engine->stop, 0);
    atomic_store(&engine->bytes_done, 0);
    atomic_store(&engine->blocks_ready, job->blocks_ready);
    for (unsigned i = 0; i < engine->facts.threads; i++)
        memset(&engine->workers[i].stats, 0, sizeof engine->workers[i].stats);
    pthread_mutex_lock(&engine->lock);
    engine->job = job;
    engine->error = &first;
    engine->running = engine->threads_count;
    engine->generation++;
    pthread_cond_broadcast(&engine->wake);
    pthread_mutex_unlock(&engine->lock);
    allocate_blocks(engine, job);
    attend(engine, job);
    engine->job = NULL;
    sum_stats(engine, stats);
    if (first.status && error) *error = first;
    return first.status;
}
