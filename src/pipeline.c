#include "pipeline.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dtype.h"
#include "engine.h"
#include "pieces.h"
#include "os.h"
#include "ring.h"

#define PAGE 4096u
#define PROGRESS_SECONDS 0.05
#define CANCEL_SECONDS 0.01
#define WINDOW_SECONDS 0.0005 /* likewise for windows */
#define SLOT_SECONDS 0.005    /* a worker that waits for a slot looks so often, */
#define SLOT_SPINS 20u        /* after so many looks without a pause, */
#define SLOT_NAPS 100u        /* and so many in all */
#define RING_SLOTS 64u        /* that are registered with an io_uring */
#define NEXT_SECONDS 0.002    /* a consumer looks so often whether all the others wait for it */
#define TIMED_EACH 7u /* the copies of so many chunks are timed once: a timed event costs the link 2 us */
#define DIRECT_LAUNCHES 2u /* so many CONVERT pieces in a chunk are launched one by one, more as a batch */
#define AHEAD_BYTES ((int64_t)64 << 20) /* of files, that the kernel is asked to read before they are read, */
#define ADVICE_BYTES (4u << 20)         /* as many at a time; */
#define LOOK_BYTES ((size_t)512 << 20)  /* looked for not further ahead than this, */
#define LOOKS 16u                       /* and so many strips in a row */

fst_trace *fst_pipeline_trace;

/* ---- Failing ----------------------------------------------------------------------------------- */

/* The first failure of a job counts; it stops all the others. */
static void fail_with(fst_engine *engine, const fst_load_job *job, const fst_error *why) {
    pthread_mutex_lock(&engine->lock);
    if (engine->first.status == FST_OK) engine->first = *why;
    atomic_store(&engine->stop, 1);
    pthread_cond_broadcast(&engine->done);
    pthread_cond_broadcast(&engine->allocated);
    pthread_cond_broadcast(&engine->moved);
    pthread_mutex_unlock(&engine->lock);
    if (job->budget) fst_budget_stop(job->budget);
}

static void fail_device(fst_worker *w, const fst_load_job *job, int code, const char *what) {
    fst_error error = {.file = -1, .offset = -1};
    fst_gpu_fail(&error, w->engine->gpu, code, what);
    fail_with(w->engine, job, &error);
}

static const char *piece_name(const fst_load_job *job, const fst_plan_piece *piece) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    return job->headers[tensor->file].tensors[tensor->entry].name;
}

/* What a read of `wanted` bytes came to; a failure names the tensor that `piece` is of. */
static int check_read(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, uint32_t piece,
                      uint64_t offset, size_t wanted, ssize_t got) {
    fst_error error = {.file = -1, .offset = -1};
    if (got == (ssize_t)wanted) {
        w->stats.bytes_read += wanted;
        return 1;
    }
    const char *name = piece_name(job, &job->plan->pieces[piece]);
    fst_where where = {job->paths[chunk->file], (int)chunk->file, (int64_t)offset};
    if (got < 0) {
        fst_fail(&error, FST_E_IO, (int)-got, &where, "reading tensor \"%s\": %s", name, strerror((int)-got));
    } else {
        where.offset += got;
        fst_fail(&error, FST_E_CHANGED, 0, &where,
                 "the file ends here, inside tensor \"%s\": it was cut short during the load", name);
    }
    fail_with(w->engine, job, &error);
    return 0;
}

/* The piece that byte `at` of a chunk is in: failures name its tensor. */
static uint32_t piece_at(const fst_load_job *job, const fst_plan_chunk *chunk, uint64_t at) {
    const fst_plan_run *first = &job->plan->runs[chunk->first_run], *last = first + chunk->runs - 1;
    uint32_t low = first->first_piece, end = last->first_piece + last->pieces;
    while (end - low > 1) {
        uint32_t middle = low + (end - low) / 2;
        if (job->plan->pieces[middle].chunk_offset <= at) low = middle;
        else end = middle;
    }
    return low;
}

/* ---- Chunks that are gathered from many places of a file ---------------------------------------------- */

/* The extent that byte `at` of a chunk is in. */
static const fst_plan_extent *extent_at(const fst_load_job *job, const fst_plan_chunk *chunk, uint64_t at) {
    const fst_plan_extent *extents = &job->plan->extents[chunk->first_extent];
    uint32_t low = 0, end = chunk->extents;
    while (end - low > 1) {
        uint32_t middle = low + (end - low) / 2;
        if (extents[middle].chunk_offset <= at) low = middle;
        else end = middle;
    }
    return &extents[low];
}

/* Where byte `at` of a chunk lies in the file. */
static uint64_t place_in_file(const fst_load_job *job, const fst_plan_chunk *chunk, uint64_t at) {
    const fst_plan_extent *extent = extent_at(job, chunk, at);
    uint64_t in = at - extent->chunk_offset;
    return extent->offset + in / extent->segment * extent->pitch + in % extent->segment;
}

/* Some bytes of an extent, from `at` of the chunk on: whole segments, or a part of one. How many. */
static uint32_t some_segments(const fst_load_job *job, const fst_plan_chunk *chunk, uint64_t at, uint64_t end,
                              fst_segments *out) {
    const fst_plan_extent *extent = extent_at(job, chunk, at);
    uint64_t in = (at - extent->chunk_offset) % extent->segment, left = end - at;
    if (left > extent->chunk_offset + extent->nbytes - at) left = extent->chunk_offset + extent->nbytes - at;
    *out = (fst_segments){place_in_file(job, chunk, at), extent->pitch, 1, 0};
    if (in == 0 && left >= extent->segment) {
        out->count = left / extent->segment;
        out->nbytes = extent->segment;
    } else {
        out->nbytes = left < extent->segment - in ? left : extent->segment - in;
    }
    return (uint32_t)(out->count * out->nbytes);
}

/* Segments out of units that are in the host's memory. */
static void copy_units(const fst_load_job *job, const fst_plan_chunk *chunk, const fst_segments *segments,
                       unsigned char *to) {
    for (uint64_t i = 0; i < segments->count; i++)
        for (uint64_t done = 0, some; done < segments->nbytes; done += some, to += some) {
            some = segments->nbytes - done;
            const unsigned char *from = fst_shared_bytes(
                job->shared, chunk->file, segments->offset + i * segments->pitch + done, &some);
            memcpy(to, from, some);
        }
}

/* Bytes [at, at + nbytes) of a chunk, wherever they lie in its file. 0 after a failure. */
static int read_chunk(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, uint64_t at,
                      uint64_t nbytes, unsigned char *to, fst_how *how) {
    uint64_t end = at + nbytes;
    while (at < end) {
        fst_segments segments;
        uint32_t wanted = some_segments(job, chunk, at, end, &segments);
        if (fst_shared_has(job->shared, chunk)) {
            copy_units(job, chunk, &segments, to);
            at += wanted;
            to += wanted;
            continue;
        }
        ssize_t got = fst_reader_gather(job->reader, how, chunk->file, to, &segments);
        uint64_t stop = got > 0 && got < (ssize_t)wanted ? (uint64_t)got : 0; /* where the file ends */
        if (!check_read(w, job, chunk, piece_at(job, chunk, at), place_in_file(job, chunk, at + stop) - stop,
                        wanted, got))
            return 0;
        at += wanted;
        to += wanted;
    }
    return 1;
}

/* The part of the file that bytes [at, at + nbytes) of a chunk lie in. */
static void span_of(const fst_load_job *job, const fst_plan_chunk *chunk, uint64_t at, uint64_t nbytes,
                    uint64_t *offset, uint64_t *size) {
    *offset = place_in_file(job, chunk, at);
    *size = place_in_file(job, chunk, at + nbytes - 1) + 1 - *offset;
}

/* ---- Waiting ----------------------------------------------------------------------------------- */

/* Waits on a condition, but not for long. The lock is held. */
static void wait_for(fst_engine *engine, pthread_cond_t *condition, double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)(seconds * 1e9);
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_cond_timedwait(condition, &engine->lock, &until);
}

/* ---- Blocks ------------------------------------------------------------------------------------ */

/* The next block, in order. The lock is held, but not while the device works. */
static void allocate_next(fst_engine *engine, const fst_load_job *job) {
    size_t i = engine->next_block;
    void *memory = NULL;
    fst_error why = {.file = -1, .offset = -1};
    engine->allocating = 1;
    pthread_mutex_unlock(&engine->lock);
    fst_status status = FST_OK;
    if (!atomic_load(&job->blocks[i])) {
        status = job->allocate(job->allocate_arg, i, &memory, &why);
        if (status) fail_with(engine, job, &why);
        else atomic_store(&job->blocks[i], memory);
    }
    pthread_mutex_lock(&engine->lock);
    engine->allocating = 0;
    if (!status) engine->next_block++;
    pthread_cond_broadcast(&engine->allocated);
}

/* Waits for a block; allocates it, and those before it, if nobody else does. 0 when the job was stopped. */
static int need_block(fst_engine *engine, const fst_load_job *job, uint32_t block) {
    if (block == FST_NO_BLOCK || atomic_load(&job->blocks[block])) return !atomic_load(&engine->stop);
    pthread_mutex_lock(&engine->lock);
    while (!atomic_load(&job->blocks[block]) && !atomic_load(&engine->stop)) {
        if (engine->allocating) pthread_cond_wait(&engine->allocated, &engine->lock);
        else allocate_next(engine, job);
    }
    pthread_mutex_unlock(&engine->lock);
    return !atomic_load(&engine->stop);
}

static int worker_needs_block(fst_worker *w, const fst_load_job *job, uint32_t block) {
    double start = fst_os_now();
    atomic_store(&w->needs, block + 1); /* 0 when it needs none */
    int there = need_block(w->engine, job, block);
    atomic_store(&w->needs, 0);
    w->stats.held_seconds += fst_os_now() - start;
    return there;
}

/* ---- Companions of quantized weights --------------------------------------------------------------- */

/* Memory for a batch's companions, from the first chunk that brings some. The lock is held all the while: it is done
 * once a batch, and all of its chunks need it. */
static int need_companion_memory(fst_worker *w, const fst_load_job *job, uint32_t batch) {
    fst_engine *engine = w->engine;
    const fst_plan_batch *planned = &job->plan->batches[batch];
    fst_batch_state *state = &job->batches[batch];
    int code = 0;
    pthread_mutex_lock(&engine->lock);
    if (!state->memory) {
        uint64_t size = planned->nbytes ? planned->nbytes : 1;
        code = engine->gpu->calls->alloc_block(engine->gpu, size, &state->memory);
        if (!code) {
            state->companions_left = planned->companion_chunks;
            state->weights_left = planned->weight_chunks;
            engine->companion_bytes += size;
            if (engine->companion_bytes > engine->companion_peak)
                engine->companion_peak = engine->companion_bytes;
        }
    }
    pthread_mutex_unlock(&engine->lock);
    if (code) fail_device(w, job, code, "allocating memory for the scales of quantized weights");
    return code == 0;
}

static void free_companions(fst_engine *engine, const fst_load_job *job, uint32_t batch) {
    fst_batch_state *state = &job->batches[batch];
    uint64_t size = job->plan->batches[batch].nbytes ? job->plan->batches[batch].nbytes : 1;
    if (!state->memory) return;
    engine->gpu->calls->free_block(engine->gpu, state->memory, size);
    engine->companion_bytes -= size;
    state->memory = NULL;
}

/* Which code is the last that is no NaN, without its sign, and how many bytes a code has; 0: a type without NaN. */
static uint32_t last_number(fst_dtype dtype, unsigned *size) {
    *size = fst_dtype_bits(dtype) / 8;
    switch (dtype) {
    case FST_F32: return 0x7F800000;
    case FST_F16: return 0x7C00;
    case FST_BF16: return 0x7F80;
    case FST_F8_E4M3: return 0x7E;
    case FST_F8_E8M0: return 0xFE;
    default: return 0;
    }
}

/* How many of some codes are above the last number, their sign (what the mask lacks) aside; or whether any is, which takes the
 * compiler's vectors, and nearly always none is. */
#define NAN_COUNTERS(bits)                                                                            \
    static int any_above_##bits(const unsigned char *codes, size_t count, uint##bits##_t mask,        \
                                uint##bits##_t last) {                                                \
        uint##bits##_t any = 0, code;                                                                 \
        for (size_t i = 0; i < count; i++) {                                                          \
            memcpy(&code, codes + i * sizeof code, sizeof code);                                      \
            any |= (uint##bits##_t) - ((uint##bits##_t)(code & mask) > last);                         \
        }                                                                                             \
        return any != 0;                                                                              \
    }                                                                                                 \
    static uint64_t count_above_##bits(const unsigned char *codes, size_t count, uint##bits##_t mask, \
                                       uint##bits##_t last) {                                         \
        uint64_t found = 0;                                                                           \
        uint##bits##_t code;                                                                          \
        for (size_t i = 0; i < count; i++) {                                                          \
            memcpy(&code, codes + i * sizeof code, sizeof code);                                      \
            found += (uint##bits##_t)(code & mask) > last;                                            \
        }                                                                                             \
        return found;                                                                                 \
    }
NAN_COUNTERS(8)
NAN_COUNTERS(16)
NAN_COUNTERS(32)

#define NAN_BLOCK 4096u /* bytes that are looked at at once */

static uint64_t count_nans(const unsigned char *codes, uint64_t nbytes, fst_dtype dtype) {
    unsigned size;
    const uint32_t last = last_number(dtype, &size);
    const uint8_t mask = dtype == FST_F8_E8M0 ? 0xFF : 0x7F;
    uint64_t found = 0;
    for (uint64_t at = 0, left; last && at < nbytes; at += NAN_BLOCK) {
        const unsigned char *block = codes + at;
        left = nbytes - at < NAN_BLOCK ? nbytes - at : NAN_BLOCK;
        if (size == 1 && any_above_8(block, left, mask, (uint8_t)last))
            found += count_above_8(block, left, mask, (uint8_t)last);
        else if (size == 2 && any_above_16(block, left / 2, 0x7FFF, (uint16_t)last))
            found += count_above_16(block, left / 2, 0x7FFF, (uint16_t)last);
        else if (size == 4 && any_above_32(block, left / 4, 0x7FFFFFFF, last))
            found += count_above_32(block, left / 4, 0x7FFFFFFF, last);
    }
    return found;
}

/* A chunk of companions came: NaN among the scales in it are counted, where they lie in the host's memory. `read`: the
 * chunk in its slot; NULL: all went to its place on the host. */
static void count_nan_scales(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk,
                             const unsigned char *read) {
    for (uint32_t r = 0; r < chunk->runs; r++) {
        const fst_plan_run *run = &job->plan->runs[chunk->first_run + r];
        for (uint32_t i = 0; i < run->pieces; i++) {
            const fst_plan_piece *piece = &job->plan->pieces[run->first_piece + i];
            const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
            const unsigned char *place = job->batches[chunk->batch].memory;
            if (tensor->scale_codes == FST_NATIVE) continue;
            place = read ? read + piece->chunk_offset : place + tensor->block_offset + piece->dst_offset;
            w->stats.nan_scales += count_nans(place, piece->nbytes, tensor->scale_codes);
        }
    }
}

/* A chunk of companions is on the device. */
static void companions_came(fst_engine *engine, const fst_load_job *job, uint32_t batch) {
    pthread_mutex_lock(&engine->lock);
    if (--job->batches[batch].companions_left == 0) pthread_cond_broadcast(&engine->allocated);
    pthread_mutex_unlock(&engine->lock);
}

/* A chunk of codes was converted. */
static void companions_were_used(fst_engine *engine, const fst_load_job *job, uint32_t batch) {
    pthread_mutex_lock(&engine->lock);
    /* After a failure a kernel may be queued that no event comes behind: they go when all streams are empty. */
    if (--job->batches[batch].weights_left == 0 && !atomic_load(&engine->stop))
        free_companions(engine, job, batch);
    pthread_mutex_unlock(&engine->lock);
}

/* The lock is held. */
static int lacks_companions(const fst_load_job *job, uint32_t batch) {
    return !job->batches[batch].memory || job->batches[batch].companions_left;
}

static int wait_for_companions(fst_worker *w, const fst_load_job *job, uint32_t batch) {
    fst_engine *engine = w->engine;
    pthread_mutex_lock(&engine->lock);
    w->needs_batch = batch + 1;
    while (lacks_companions(job, batch) && !atomic_load(&engine->stop))
        pthread_cond_wait(&engine->allocated, &engine->lock);
    w->needs_batch = 0;
    pthread_mutex_unlock(&engine->lock);
    return !atomic_load(&engine->stop);
}

/* ---- Stripes that wait for the rest of them ---------------------------------------------------------- */

static int drain_copies(fst_worker *w, const fst_load_job *job);

/* Memory for windows and counters, before anything is read. */
static fst_status make_parking(fst_engine *engine, const fst_load_job *job, fst_error *error) {
    const fst_gpu *gpu = engine->gpu;
    const fst_plan *plan = job->plan;
    fst_parking *parking = job->parking;
    void *counters = NULL;
    int code = 0;
    if (plan->counters_count)
        code = gpu->calls->alloc_block(gpu, plan->counters_count * sizeof *parking->counters, &counters);
    if (code) return fst_gpu_fail(error, gpu, code, "allocating counters for quantized weights");
    parking->counters = counters;
    if (plan->parked_bytes) code = gpu->calls->alloc_block(gpu, plan->parked_bytes, &parking->memory);
    if (!code) return FST_OK;
    parking->memory = NULL;
    return fst_gpu_fail(error, gpu, code, "allocating memory for weights that wait for their scales");
}

static void free_parked(fst_engine *engine, const fst_load_job *job) {
    if (job->parking->memory)
        engine->gpu->calls->free_block(engine->gpu, job->parking->memory, job->plan->parked_bytes);
    job->parking->memory = NULL;
}

static void free_parking(fst_engine *engine, const fst_load_job *job) {
    fst_parking *parking = job->parking;
    free_parked(engine, job);
    if (parking->counters)
        engine->gpu->calls->free_block(engine->gpu, parking->counters,
                                       job->plan->counters_count * sizeof *parking->counters);
    parking->counters = NULL;
}

/* Counters are zero before anything is queued that counts. Who comes first does it, and others wait for that. */
static int need_counters(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    const fst_gpu *gpu = engine->gpu;
    fst_parking *parking = job->parking;
    int code = 0;
    if (!parking->counters) return 1;
    pthread_mutex_lock(&engine->lock);
    if (!parking->counters_are_set) {
        size_t size = job->plan->counters_count * sizeof *parking->counts;
        code = gpu->calls->to_device(gpu, w->stream, parking->counters, parking->counts, size);
        if (!code) code = gpu->calls->stream_wait(gpu, w->stream);
        parking->counters_are_set = !code;
    }
    pthread_mutex_unlock(&engine->lock);
    if (code) fail_device(w, job, code, "setting counters");
    return code == 0;
}

/* What was counted, once all streams are empty: NaNs of quantized weights in *nans. Codes that FNUZ does not have are an
 * error. */
static fst_status read_counters(fst_engine *engine, const fst_load_job *job, uint64_t *nans,
                                fst_error *error) {
    const fst_gpu *gpu = engine->gpu;
    const fst_plan *plan = job->plan;
    fst_parking *parking = job->parking;
    if (!parking->counters_are_set) return FST_OK;
    fst_queue stream = engine->slots[0].stream;
    int code = gpu->calls->to_host(gpu, stream, parking->counts, parking->counters,
                                   plan->counters_count * sizeof *parking->counts);
    if (!code) code = gpu->calls->stream_wait(gpu, stream);
    if (code) return fst_gpu_fail(error, gpu, code, "reading counters");
    for (size_t i = 0; i < plan->stored_count; i++) {
        const fst_plan_tensor *tensor = &plan->tensors[i];
        if (tensor->counter == FST_NO_COUNTER || !parking->counts[tensor->counter]) continue;
        if (tensor->conversion == FST_CONVERT_QUANTIZE) {
            *nans += parking->counts[tensor->counter];
            continue;
        }
        const fst_entry *entry = &job->headers[tensor->file].tensors[tensor->entry];
        fst_where where = {job->paths[tensor->file], (int)tensor->file,
                           (int64_t)(job->headers[tensor->file].data_start + entry->begin)};
        return fst_fail(error, FST_E_QUANTIZED, 0, &where,
                        "tensor \"%s\": %llu of its codes are no finite numbers, which %s cannot say",
                        entry->name, (unsigned long long)parking->counts[tensor->counter],
                        fst_dtype_name(tensor->dtype));
    }
    return FST_OK;
}

/* Whether nothing is left in the windows that a chunk's stripes go into. The lock is held. */
static int windows_are_free(const fst_load_job *job, const fst_plan_chunk *chunk) {
    const fst_plan *plan = job->plan;
    uint32_t first = plan->stripes[chunk->first_stripe].window;
    uint32_t last = plan->stripes[chunk->first_stripe + chunk->stripes - 1].window;
    for (uint32_t i = first; i <= last; i++)
        if (i >= 2 && job->parking->windows_done[i - 2] < plan->windows[i - 2]) return 0;
    return 1;
}

/* The parts that are waited for are in slots that nobody may need: whoever waits sees to them. */
static int wait_for_windows(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk) {
    fst_engine *engine = w->engine;
    int are_free = 0;
    while (!are_free && !atomic_load(&engine->stop)) {
        if (!drain_copies(w, job)) return 0;
        pthread_mutex_lock(&engine->lock);
        are_free = windows_are_free(job, chunk);
        w->needs_window = are_free ? 0 : (uint32_t)(chunk - job->plan->chunks) + 1;
        if (!are_free && !atomic_load(&engine->stop)) wait_for(engine, &engine->allocated, WINDOW_SECONDS);
        w->needs_window = 0;
        pthread_mutex_unlock(&engine->lock);
    }
    return !atomic_load(&engine->stop);
}

/* The stripes that a chunk was the last of are converted: their places are free. */
static void leave_windows(fst_engine *engine, const fst_load_job *job, uint32_t index) {
    const fst_plan_chunk *chunk = &job->plan->chunks[index];
    fst_parking *parking = job->parking;
    if (!chunk->stripes) return;
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = chunk->first_stripe; i < chunk->first_stripe + chunk->stripes; i++) {
        if (atomic_load(&parking->stripes[i].finisher) != index + 1) continue;
        parking->windows_done[job->plan->stripes[i].window]++;
        parking->stripes_left--;
    }
    /* As with companions: after a failure, once all streams are empty. */
    if (parking->stripes_left == 0 && !atomic_load(&engine->stop)) free_parked(engine, job);
    pthread_cond_broadcast(&engine->allocated);
    pthread_mutex_unlock(&engine->lock);
}

/* Whether no memory has to be waited for, or allocated. */
static int memory_is_there(fst_engine *engine, const fst_load_job *job, const fst_plan_chunk *chunk) {
    int waits_for_companions = chunk->batch != FST_NO_BATCH && !chunk->companions;
    if (chunk->block != FST_NO_BLOCK && !atomic_load(&job->blocks[chunk->block])) return 0;
    if (!waits_for_companions && !chunk->stripes) return 1;
    pthread_mutex_lock(&engine->lock);
    int there = (!waits_for_companions || !lacks_companions(job, chunk->batch)) &&
                (!chunk->stripes || windows_are_free(job, chunk));
    pthread_mutex_unlock(&engine->lock);
    return there;
}

/* All memory that the chunk's results and conversions need. 0 when the job was stopped. */
static int prepare_memory(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk) {
    if (!worker_needs_block(w, job, chunk->block) || !need_counters(w, job)) return 0;
    if (chunk->batch != FST_NO_BATCH && !(chunk->companions ? need_companion_memory(w, job, chunk->batch)
                                                            : wait_for_companions(w, job, chunk->batch)))
        return 0;
    return !chunk->stripes || wait_for_windows(w, job, chunk);
}

/* ---- Stripes that are whole --------------------------------------------------------------------------- */

/* Stripes whose last part a chunk brought are converted: behind the work of all their chunks. *finished: some were. */
static int finish_stripes(fst_worker *w, const fst_load_job *job, uint32_t index, int *finished) {
    const fst_gpu *gpu = w->engine->gpu;
    const fst_plan_chunk *chunk = &job->plan->chunks[index];
    int code = 0;
    *finished = 0;
    for (uint32_t i = chunk->first_stripe; i < chunk->first_stripe + chunk->stripes && !code; i++) {
        const fst_plan_stripe *stripe = &job->plan->stripes[i];
        const fst_plan_tensor *tensor = &job->plan->tensors[stripe->tensor];
        if (atomic_fetch_add(&job->parking->stripes[i].done, 1) + 1 != stripe->chunks) continue;
        for (uint32_t k = stripe->first_chunk; k < stripe->first_chunk + stripe->chunks && !code; k++) {
            if (gpu->host_access) break;
            const fst_slot *other = &w->engine->slots[atomic_load(&job->slots[k]) - 1u];
            /* As in await_tensor, the slot may hold a later chunk by now. */
            if (other->stream != w->stream)
                code = gpu->calls->stream_follow(gpu, w->stream, other->converted);
        }
        if (!code)
            code = fst_piece_quantize(w, job, stripe->tensor, fst_piece_parked(job, i), tensor->parked,
                                      stripe->matrix, stripe->first_row, stripe->rows);
        w->stats.launches++;
        atomic_store(&job->parking->stripes[i].finisher, index + 1);
        *finished = 1;
    }
    return code;
}

/* ---- Scales of FNUZ codes --------------------------------------------------------------------------- */

/* Doubles what is to be, among the pieces of a run whose bytes are at `data`. */
static int double_run(fst_worker *w, const fst_load_job *job, const fst_plan_run *run, unsigned char *data) {
    for (uint32_t i = 0; job->plan->doubles && i < run->pieces; i++) {
        const fst_plan_piece *piece = &job->plan->pieces[run->first_piece + i];
        const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
        if (tensor->conversion != FST_CONVERT_DOUBLE ||
            fst_quantize_double(tensor->dtype, data + (piece->chunk_offset - run->chunk_offset),
                                piece->count))
            continue;
        const fst_entry *entry = &job->headers[tensor->file].tensors[tensor->entry];
        fst_where where = {job->paths[tensor->file], (int)tensor->file,
                           (int64_t)(job->headers[tensor->file].data_start + entry->begin)};
        fst_error error = {.file = -1, .offset = -1};
        fst_fail(&error, FST_E_QUANTIZED, 0, &where,
                 "tensor \"%s\": a scale is too large to be doubled, as FNUZ codes need it", entry->name);
        fail_with(w->engine, job, &error);
        return 0;
    }
    return 1;
}

static int double_chunk(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk,
                        unsigned char *data) {
    for (uint32_t r = 0; r < chunk->runs; r++) {
        const fst_plan_run *run = &job->plan->runs[chunk->first_run + r];
        if (!double_run(w, job, run, data + run->chunk_offset)) return 0;
    }
    return 1;
}

/* The jobs of one pair of dtypes among a chunk's CONVERT pieces. */
typedef struct job_list {
    int src_dtype, dst_dtype;
    uint32_t count;
    uint64_t tiles;
} job_list;

/* Of dtypes, in a chunk that becomes one batch a pair. One with more is launched piece by piece. */
#define MAX_PAIRS 64u

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

/* Writes the chunk's job list, grouped by pair, to `jobs`: addresses are those on the device. 0 pairs: too many. */
static uint32_t make_jobs(const fst_load_job *job, const fst_plan_chunk *chunk, const unsigned char *staged,
                          fst_batch_job *jobs, job_list lists[MAX_PAIRS]) {
    uint32_t lists_count = 0, starts[MAX_PAIRS], start = 0;
    for (int pass = 0; pass < 2; pass++) {
        uint32_t run = 0, i = 0, piece;
        while ((piece = next_convert_piece(job->plan, chunk, &run, &i)) != UINT32_MAX) {
            const fst_plan_piece *p = &job->plan->pieces[piece];
            if (fst_plan_is_alone(job->plan, &job->plan->tensors[p->tensor])) continue; /* by themselves */
            fst_cast_args args = fst_piece_cast_args(job, p, staged + p->chunk_offset);
            uint32_t k = 0;
            while (k < lists_count &&
                   (lists[k].src_dtype != args.src_dtype || lists[k].dst_dtype != args.dst_dtype))
                k++;
            if (k == MAX_PAIRS) return 0;
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

static int convert_batched(fst_worker *w, const fst_load_job *job, const job_list *lists,
                           uint32_t lists_count, const fst_batch_job *staged_jobs) {
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

/* ---- Tensors that are complete ------------------------------------------------------------------ */

/* The work of a chunk was queued in a slot, or, on the CPU device, is done. */
static void track_chunk(fst_engine *engine, const fst_load_job *job, uint32_t index) {
    fst_tracking *tracking = job->tracking;
    const fst_plan_chunk *chunk = &job->plan->chunks[index];
    const fst_plan_run *last = &job->plan->runs[chunk->first_run + chunk->runs - 1];
    uint32_t first = job->plan->runs[chunk->first_run].first_piece, end = last->first_piece + last->pieces;
    unsigned completed = 0;
    if (!tracking) return;
    for (uint32_t i = first; i < end; i++) {
        const fst_plan_tensor *of = &job->plan->tensors[job->plan->pieces[i].tensor];
        uint32_t tensor = of->fused == FST_NO_TENSOR ? job->plan->pieces[i].tensor : of->fused,
                 scales = of->scales;
        if (atomic_fetch_sub(&tracking->left[tensor], 1) != 1) continue;
        pthread_mutex_lock(&engine->lock);
        tracking->ready[tracking->ready_count++] = tensor;
        if (scales != FST_NO_TENSOR) {
            atomic_store(&tracking->left[scales], 0);
            tracking->ready[tracking->ready_count++] = scales;
        }
        pthread_mutex_unlock(&engine->lock);
        completed++;
    }
    if (!completed) return;
    pthread_mutex_lock(&engine->lock);
    pthread_cond_broadcast(&engine->done);
    pthread_mutex_unlock(&engine->lock);
}

/* ---- One chunk on a GPU ------------------------------------------------------------------------- */

/* The kernels of the chunk before in this slot are done with its staging memory, where the next copy goes, which is queued on
 * another stream. Long ago, as a rule: since then the slot was filled. How long they took is known now. */
static int finish_kernels(fst_worker *w, fst_slot *s) {
    const fst_gpu *gpu = w->engine->gpu;
    int code = gpu->calls->event_wait(gpu, s->converted);
    float convert =
        code || !s->kernels_untimed ? -1 : gpu->calls->event_elapsed(gpu, s->stopped, s->converted);
    if (convert > 0) w->stats.launch_ms += (double)convert;
    s->kernels_untimed = 0;
    return code;
}

/* Bytes of a run from units on the device to where they go. As rows of bytes where there are several segments in a unit. */
static int copy_run_from_units(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk,
                               const fst_plan_run *run, unsigned char *to) {
    const fst_gpu *gpu = w->engine->gpu;
    uint64_t at = run->chunk_offset, end = at + run->nbytes;
    int code = 0;
    while (at < end && !code) {
        fst_segments segments;
        some_segments(job, chunk, at, end, &segments);
        uint64_t some = segments.nbytes, span = (segments.count - 1) * segments.pitch + segments.nbytes,
                 rows = 1;
        const unsigned char *from = fst_shared_bytes(job->shared, chunk->file, segments.offset, &some);
        if (some == segments.nbytes && segments.count > 1) { /* as many as end in this unit */
            fst_shared_bytes(job->shared, chunk->file, segments.offset, &span);
            rows = span < segments.nbytes ? 1 : (span - segments.nbytes) / segments.pitch + 1;
        }
        if (rows > 1) {
            fst_rows_args args = {.src = from,
                                  .dst = to,
                                  .cols = segments.nbytes,
                                  .ndim = 1,
                                  .extent = {rows},
                                  .src_stride = {segments.pitch},
                                  .dst_stride = {segments.nbytes},
                                  .src_dtype = FST_U8,
                                  .dst_dtype = FST_U8};
            w->stats.launches++;
            code = gpu->kernels->rows(w->stream, &args);
        } else {
            code = gpu->calls->copy_on_device(gpu, w->stream, to, from, some);
        }
        at += rows * some;
        to += rows * some;
    }
    return code;
}

/* Queues the copies of a chunk that was read into the slot, and, where there are any, of the jobs for its kernels. What others
 * read is on the device already: its copies are the slot's own. */
static int queue_copies(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, fst_slot *s,
                        size_t jobs_at, size_t jobs_bytes) {
    fst_engine *engine = w->engine;
    const fst_gpu *gpu = engine->gpu;
    const fst_plan *plan = job->plan;
    int shared = fst_shared_has(job->shared, chunk);
    fst_queue queue = shared ? w->stream : engine->copies;
    size_t shift = chunk->offset % PAGE;
    unsigned char *bounce = s->bounce + shift, *staged = s->staging ? s->staging + shift : NULL;
    pthread_mutex_lock(&engine->sending);
    s->timed = engine->sent++ % TIMED_EACH == 0;
    int code = s->timed ? gpu->calls->event_record(gpu, s->started, queue) : 0;
    for (uint32_t r = 0; r < chunk->runs && !code; r++) {
        const fst_plan_run *run = &plan->runs[chunk->first_run + r];
        size_t nbytes = run->nbytes;
        void *to;
        if (run->kind == FST_RUN_PLACE) {
            to = fst_piece_cast_args(job, &plan->pieces[run->first_piece], NULL).dst;
        } else {
            to = staged + run->chunk_offset;
            if (jobs_bytes && !shared && run->chunk_offset + run->nbytes == chunk->nbytes) {
                nbytes = jobs_at + jobs_bytes - run->chunk_offset; /* the list goes along with the last run */
                jobs_bytes = 0;
            }
        }
        code = shared ? copy_run_from_units(w, job, chunk, run, to)
                      : gpu->calls->to_device(gpu, queue, to, bounce + run->chunk_offset, nbytes);
    }
    if (jobs_bytes && !code)
        code = gpu->calls->to_device(gpu, queue, staged + jobs_at, bounce + jobs_at, jobs_bytes);
    if (!code && s->timed) code = gpu->calls->event_record(gpu, s->stopped, queue);
    if (!code) code = gpu->calls->event_record(gpu, s->copied, queue);
    pthread_mutex_unlock(&engine->sending);
    w->stats.sent_bytes += chunk->nbytes;
    if (!code && !shared) code = gpu->calls->stream_follow(gpu, w->stream, s->copied);
    return code;
}

/* Queues the copies and kernels of a chunk. 0 or a code; *what says of what. */
static int queue_chunk(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, fst_slot *s,
                       const char **what) {
    const fst_gpu *gpu = w->engine->gpu;
    const fst_plan *plan = job->plan;
    size_t shift = chunk->offset % PAGE; /* the slot keeps the file's alignment to pages */
    unsigned char *bounce = s->bounce + shift, *staged = s->staging ? s->staging + shift : NULL;
    size_t jobs_at = ((shift + chunk->nbytes + 63) & ~(size_t)63) - shift; /* behind the data */
    uint32_t convert_pieces = chunk->jobs_bytes / sizeof(fst_batch_job), lists_count = 0;
    job_list lists[MAX_PAIRS];
    *what = "kernels before a copy to the device";
    int code = finish_kernels(w, s);
    if (code) return code;
    *what = "a copy to the device";
    if (convert_pieces > DIRECT_LAUNCHES)
        lists_count = make_jobs(job, chunk, staged, (fst_batch_job *)(void *)(bounce + jobs_at), lists);
    code = queue_copies(w, job, chunk, s, jobs_at, lists_count ? chunk->jobs_bytes : 0);
    if (code) return code;
    *what = "a kernel's launch";
    if (lists_count)
        code = convert_batched(w, job, lists, lists_count,
                               (const fst_batch_job *)(const void *)(staged + jobs_at));
    uint32_t run = 0, i = 0, piece;
    while (!code && (piece = next_convert_piece(plan, chunk, &run, &i)) != UINT32_MAX)
        if (!lists_count || fst_plan_is_alone(plan, &plan->tensors[plan->pieces[piece].tensor]))
            code = fst_piece_launch(w, job, &plan->pieces[piece], staged + plan->pieces[piece].chunk_offset);
    if (!code) code = gpu->calls->event_record(gpu, s->converted, w->stream);
    return code;
}

/* ---- One chunk on the CPU device ----------------------------------------------------------------- */

static int convert_run_on_host(fst_worker *w, const fst_load_job *job, const fst_plan_run *run,
                               const unsigned char *data) {
    const fst_plan_piece *pieces = &job->plan->pieces[run->first_piece];
    double start = fst_os_now();
    for (uint32_t i = 0; i < run->pieces; i++) {
        int code = fst_piece_launch(w, job, &pieces[i], data + (pieces[i].chunk_offset - run->chunk_offset));
        if (code) {
            fail_device(w, job, code, "a cast");
            return 0;
        }
    }
    w->stats.kernel_seconds += fst_os_now() - start;
    return 1;
}

/* What was read into the slot goes to its places. */
static int place_chunk_on_host(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk,
                               const fst_slot *s) {
    const unsigned char *data = s->bounce + chunk->offset % PAGE;
    for (uint32_t r = 0; r < chunk->runs; r++) {
        const fst_plan_run *run = &job->plan->runs[chunk->first_run + r];
        const unsigned char *from = data + run->chunk_offset;
        if (run->kind == FST_RUN_PLACE)
            memcpy(fst_piece_cast_args(job, &job->plan->pieces[run->first_piece], NULL).dst, from,
                   run->nbytes);
        else if (!convert_run_on_host(w, job, run, from)) return 0;
    }
    return 1;
}

/* What is kept is read into place, what is converted comes through the slot. */
static int load_chunk_on_host(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk,
                              const fst_slot *s, fst_how how) {
    for (uint32_t r = 0; r < chunk->runs; r++) {
        const fst_plan_run *run = &job->plan->runs[chunk->first_run + r];
        unsigned char *to = s->bounce + (chunk->offset + run->chunk_offset) % PAGE;
        if (run->kind == FST_RUN_PLACE)
            to = fst_piece_cast_args(job, &job->plan->pieces[run->first_piece], NULL).dst;
        double start = fst_os_now();
        int right = read_chunk(w, job, chunk, run->chunk_offset, run->nbytes, to, &how);
        w->stats.read_seconds += fst_os_now() - start;
        if (!right) return 0;
        if (!double_run(w, job, run, to)) return 0;
        if (run->kind == FST_RUN_CONVERT && !convert_run_on_host(w, job, run, to)) return 0;
    }
    return 1;
}

/* ---- Traces ---------------------------------------------------------------------------------------- */

static void trace(const fst_trace_record *record) {
    fst_trace *all = fst_pipeline_trace;
    size_t at = all ? atomic_fetch_add(&all->count, 1) : 0;
    if (all && at < all->room) all->records[at] = *record;
}

static unsigned worker_number(const fst_worker *w) { return (unsigned)(w - w->engine->workers); }

static void trace_read(const fst_worker *w, const fst_strip *strip, fst_how how, double begin) {
    if (!fst_pipeline_trace) return;
    trace(&(fst_trace_record){.kind = FST_TRACE_READ,
                              .worker = worker_number(w),
                              .chunk = strip->chunk,
                              .nbytes = strip->nbytes,
                              .how = how,
                              .begin = begin,
                              .end = fst_os_now()});
}

static void trace_copy(const fst_engine *engine, const fst_load_job *job, const fst_slot *s, double end) {
    if (!fst_pipeline_trace) return;
    trace(&(fst_trace_record){.kind = FST_TRACE_COPY,
                              .worker = s->sender,
                              .slot = (unsigned)(s - engine->slots),
                              .chunk = s->chunk,
                              .nbytes = job->plan->chunks[s->chunk].nbytes,
                              .full = s->full,
                              .begin = s->queued,
                              .end = end});
}

/* ---- Slots --------------------------------------------------------------------------------------- */

/* Something became of a slot. */
static void announce(fst_engine *engine) {
    if (engine->gpu->host_access) return; /* nobody waits for another's slot */
    pthread_mutex_lock(&engine->lock);
    pthread_cond_broadcast(&engine->moved);
    pthread_mutex_unlock(&engine->lock);
}

/* A chunk's work is queued; there is more to do where it was the last of a stripe. */
static int finish_chunk(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_gpu *gpu = w->engine->gpu;
    int finished = 0, code = 0;
    double start = fst_os_now();
    if (job->plan->chunks[s->chunk].stripes) code = finish_stripes(w, job, s->chunk, &finished);
    if (gpu->host_access) w->stats.kernel_seconds += fst_os_now() - start;
    else if (!code && finished) code = gpu->calls->event_record(gpu, s->converted, w->stream);
    if (code) fail_device(w, job, code, "a kernel's launch");
    return code == 0;
}

static void set_state(fst_engine *engine, fst_slot *s, fst_slot_state state) {
    atomic_store(&s->state, (int)state);
    announce(engine);
}

static void chunk_is_done(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_plan_chunk *chunk = &job->plan->chunks[s->chunk];
    if (chunk->batch != FST_NO_BATCH && !chunk->companions)
        companions_were_used(w->engine, job, chunk->batch);
    leave_windows(w->engine, job, s->chunk);
    if (fst_shared_has(job->shared, chunk)) fst_shared_release(job->shared, chunk);
    atomic_fetch_add(&w->engine->bytes_done, chunk->nbytes);
    set_state(w->engine, s, FST_SLOT_FREE);
}

/* What is converted with companions, or was parked, needs them until then. */
static int needs_conversion(const fst_load_job *job, const fst_slot *s) {
    const fst_plan_chunk *chunk = &job->plan->chunks[s->chunk];
    return chunk->batch != FST_NO_BATCH || chunk->stripes;
}

/* Or failed, which finish_copies finds out. */
static int copies_are_done(const fst_gpu *gpu, const fst_load_job *job, const fst_slot *s) {
    fst_event event = needs_conversion(job, s) ? s->converted : s->copied;
    return gpu->calls->event_query(gpu, event) != FST_GPU_NOT_READY;
}

/* Waits until the copies out of a slot are done. */
static int finish_copies(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_gpu *gpu = w->engine->gpu;
    int uses = needs_conversion(job, s);
    int code = gpu->calls->event_wait(gpu, uses ? s->converted : s->copied);
    double now = fst_os_now();
    w->stats.slot_seconds += now - s->queued;
    if (code) {
        atomic_store(&s->state, FST_SLOT_FREE);
        fail_device(w, job, code, "waiting for a copy");
        return 0;
    }
    float copy = s->timed ? gpu->calls->event_elapsed(gpu, s->started, s->stopped) : -1;
    s->kernels_untimed = copy >= 0;
    if (copy >= 0) {
        w->stats.copy_ms += (double)copy;
        w->stats.timed_bytes += job->plan->chunks[s->chunk].nbytes;
    }
    trace_copy(w->engine, job, s, now);
    chunk_is_done(w, job, s);
    return 1;
}

/* A chunk's bytes are in its slot: on they go. */
static int send_chunk(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_plan_chunk *chunk = &job->plan->chunks[s->chunk];
    uint32_t index = s->chunk; /* once it is being copied, the slot may become another's */
    const char *what = "";
    w->stats.chunks++;
    s->sender = worker_number(w);
    w->stream = s->stream;
    if (!prepare_memory(w, job, chunk) || !double_chunk(w, job, chunk, s->bounce + chunk->offset % PAGE))
        return 0;
    if (w->engine->gpu->host_access) {
        if (!place_chunk_on_host(w, job, chunk, s) || !finish_chunk(w, job, s)) return 0;
        if (chunk->companions) count_nan_scales(w, job, chunk, NULL);
        chunk_is_done(w, job, s);
    } else {
        s->queued = fst_os_now();
        int code = queue_chunk(w, job, chunk, s, &what);
        if (code) { /* a part of it may be under way: the end of the job waits for all streams */
            fail_device(w, job, code, what);
            return 0;
        }
        if (!finish_chunk(w, job, s)) return 0;
        if (chunk->companions) count_nan_scales(w, job, chunk, s->bounce + chunk->offset % PAGE);
        /* Companions are there when this worker says so. Other chunks are waited for by who needs their slot. */
        if (!chunk->companions) set_state(w->engine, s, FST_SLOT_COPYING);
        else if (!finish_copies(w, job, s)) return 0;
    }
    if (chunk->companions) companions_came(w->engine, job, chunk->batch);
    track_chunk(w->engine, job, index);
    return 1;
}

/* Strips are cut at whole pages, so that each can be read with O_DIRECT: neighbours share none. */
static unsigned strips_of(const fst_engine *engine, const fst_load_job *job, const fst_plan_chunk *chunk) {
    if (fst_shared_has(job->shared, chunk)) return 1;
    return (unsigned)((chunk->offset % PAGE + chunk->nbytes + engine->strip_bytes - 1) / engine->strip_bytes);
}

/* ---- Who gets a slot ------------------------------------------------------------------------------- */

/* Whether a slot is in this state. */
static int any_slot(const fst_engine *engine, fst_slot_state state) {
    for (unsigned i = 0; i < engine->slots_count; i++)
        if (atomic_load(&engine->slots[i].state) == (int)state) return 1;
    return 0;
}

/* The slot that was first to be copied of those that are. Who holds `giving` may ask, or who is the last at the job. */
static fst_slot *oldest_copying(fst_engine *engine) {
    fst_slot *oldest = NULL;
    for (unsigned i = 0; i < engine->slots_count; i++) {
        fst_slot *s = &engine->slots[i];
        if (atomic_load(&s->state) == FST_SLOT_COPYING && (!oldest || s->chunk < oldest->chunk)) oldest = s;
    }
    return oldest;
}

/* Slots whose copies are done become free. */
static int drain_copies(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    fst_slot *s;
    int right = 1;
    if (atomic_flag_test_and_set(&engine->giving)) return 1;
    while (right && (s = oldest_copying(engine)) && copies_are_done(engine->gpu, job, s))
        right = finish_copies(w, job, s);
    atomic_flag_clear(&engine->giving);
    return right;
}

/* Waits for something to become of a slot: at first not at all, then a moment, then until somebody says so, or for a
 * while. */
static void await_slots(fst_worker *w, const fst_load_job *job, uint32_t chunk, unsigned look) {
    const struct timespec nap = {0, 20000};
    fst_engine *engine = w->engine;
    if (look < SLOT_SPINS) return;
    atomic_store(&w->needs_slot, chunk + 1);
    if (look < SLOT_NAPS || any_slot(engine, FST_SLOT_COPYING)) { /* nobody says that a copy is done */
        nanosleep(&nap, NULL);
    } else {
        pthread_mutex_lock(&engine->lock);
        if (!atomic_load(&job->slots[chunk]) && !atomic_load(&engine->stop))
            wait_for(engine, &engine->moved, SLOT_SECONDS);
        pthread_mutex_unlock(&engine->lock);
    }
    atomic_store(&w->needs_slot, 0);
}

/* A slot for another chunk, if there is one: if not a free one, then the oldest whose copies are done. */
static fst_slot *find_slot(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    const fst_gpu *gpu = engine->gpu;
    for (unsigned i = 0; i < engine->slots_count; i++)
        if (atomic_load(&engine->slots[i].state) == FST_SLOT_FREE) return &engine->slots[i];
    fst_slot *s = oldest_copying(engine);
    if (!s) return NULL;
    return copies_are_done(gpu, job, s) && finish_copies(w, job, s) ? s : NULL;
}

/* Gives the next chunk a slot, if it is not behind the one that the worker waits for. Whoever waits does it, so that nobody
 * has to wake up for others to go on. Chunks get slots in order: none waits for a later one, whatever that waits for. */
static void give_slot(fst_worker *w, const fst_load_job *job, uint32_t waits_for) {
    fst_engine *engine = w->engine;
    if (atomic_flag_test_and_set(&engine->giving)) return;
    uint32_t chunk = atomic_load(&engine->next_slot);
    fst_slot *s = chunk <= waits_for ? find_slot(w, job) : NULL;
    if (s) {
        s->chunk = chunk;
        atomic_store(&s->left, strips_of(engine, job, &job->plan->chunks[chunk]));
        atomic_store(&s->state, FST_SLOT_FILLING);
        atomic_store(&job->slots[chunk], (unsigned short)(1 + (s - engine->slots)));
        atomic_store(&engine->next_slot, chunk + 1);
    }
    atomic_flag_clear(&engine->giving);
    if (s) announce(engine);
}

static int finish_read(fst_worker *w, const fst_load_job *job);

static int send_full(fst_worker *w, const fst_load_job *job);

/* Others may wait for what this worker reads. */
static int finish_one(fst_worker *w, const fst_load_job *job) {
    return finish_read(w, job) && send_full(w, job);
}

/* The slot of a chunk. NULL: the job was stopped. */
static fst_slot *shared_slot(fst_worker *w, const fst_load_job *job, uint32_t chunk) {
    fst_engine *engine = w->engine;
    double start = fst_os_now(), busy = 0;
    fst_slot *found = NULL;
    for (unsigned look = 0; !atomic_load(&engine->stop); look++) {
        unsigned number = atomic_load(&job->slots[chunk]);
        if (number) {
            found = &engine->slots[number - 1];
            break;
        }
        give_slot(w, job, chunk);
        if (atomic_load(&job->slots[chunk])) continue;
        if (w->reads_count) {
            double begun = fst_os_now();
            if (!finish_one(w, job)) break;
            busy += fst_os_now() - begun;
        } else {
            await_slots(w, job, chunk, look);
        }
    }
    w->stats.wait_seconds += fst_os_now() - start - busy;
    return found;
}

/* On the CPU device: the worker's own next one. */
static fst_slot *own_slot(fst_worker *w, const fst_load_job *job, const fst_strip *strip) {
    fst_engine *engine = w->engine;
    unsigned each = engine->slots_count / engine->facts.threads;
    fst_slot *s = &engine->slots[worker_number(w) + w->turn++ % each * engine->facts.threads];
    while (atomic_load(&s->state) != FST_SLOT_FREE)
        if (!finish_one(w, job)) return NULL;
    s->chunk = strip->chunk;
    atomic_store(&s->left, 1);
    atomic_store(&s->state, FST_SLOT_FILLING);
    return s;
}

/* ---- Strips ------------------------------------------------------------------------------------------ */

static fst_strip strip_at(const fst_engine *engine, const fst_load_job *job, uint32_t index, unsigned k) {
    const fst_plan_chunk *chunk = &job->plan->chunks[index];
    uint64_t base = chunk->offset - chunk->offset % PAGE, end = chunk->offset + chunk->nbytes;
    uint64_t from = base + k * (uint64_t)engine->strip_bytes, to = from + engine->strip_bytes;
    if (k == 0) from = chunk->offset;
    if (to > end || fst_shared_has(job->shared, chunk)) to = end;
    return (fst_strip){index, k, from, (uint32_t)(to - from)};
}

/* The next that nobody reads yet, all over the load in order. 0: there is none. */
static int take_strip(fst_engine *engine, const fst_load_job *job, fst_strip *out) {
    uint64_t at = atomic_load(&engine->next_strip), next;
    uint32_t chunk, k;
    do {
        chunk = (uint32_t)(at >> 32);
        k = (uint32_t)at;
        if (chunk >= job->plan->chunks_count) return 0;
        int last = k + 1 == strips_of(engine, job, &job->plan->chunks[chunk]);
        next = last ? (uint64_t)(chunk + 1) << 32 : at + 1;
    } while (!atomic_compare_exchange_weak(&engine->next_strip, &at, next));
    *out = strip_at(engine, job, chunk, k);
    return 1;
}

/* How a strip will be read: 1 + its fst_how once somebody decided, be it ahead of time; ADVISED: the kernel reads it already;
 * DECIDING: who looks ahead is about to know. */
#define ADVISED 128u
#define DECIDING 255u

static atomic_uchar *how_of(const fst_engine *engine, const fst_load_job *job, const fst_strip *strip) {
    return &job->hows[strip->chunk * fst_engine_strips(engine) + strip->index];
}

static fst_how look_at(const fst_load_job *job, const fst_strip *strip) {
    const fst_plan_chunk *chunk = &job->plan->chunks[strip->chunk];
    uint64_t offset, nbytes;
    span_of(job, chunk, strip->offset - chunk->offset, strip->nbytes, &offset, &nbytes);
    fst_how how = fst_reader_choose(job->reader, chunk->file, offset, nbytes);
    return chunk->gathered && how == FST_HOW_DIRECT ? FST_HOW_BUFFERED
                                                    : how; /* sectors have other things, too */
}

/* How to read the strip, which is begun now. */
static fst_how choose(fst_engine *engine, const fst_load_job *job, const fst_strip *strip) {
    atomic_uchar *known = how_of(engine, job, strip);
    unsigned char decided = atomic_load(known);
    if (decided == 0 || decided == DECIDING) {
        unsigned char mine = (unsigned char)(1 + look_at(job, strip));
        decided = atomic_exchange(known, mine);
        if (decided == 0 || decided == DECIDING) decided = mine;
    }
    if (decided & ADVISED) atomic_fetch_sub(&engine->advised, strip->nbytes);
    return (fst_how)((decided & ~ADVISED) - 1);
}

/* Has the kernel read parts of a file in the background. */
static void advise(const fst_load_job *job, const fst_strip *strip, uint32_t nbytes) {
    const fst_plan_chunk *chunk = &job->plan->chunks[strip->chunk];
    uint64_t at = strip->offset - chunk->offset, end = at + nbytes;
    if (!chunk->gathered) fst_reader_advise(job->reader, chunk->file, strip->offset, nbytes);
    while (chunk->gathered && at < end) {
        fst_segments segments;
        at += some_segments(job, chunk, at, end, &segments);
        fst_reader_advise(job->reader, chunk->file, segments.offset,
                          (segments.count - 1) * segments.pitch + segments.nbytes);
    }
}

/* The strip that nobody looked at yet and that comes next, not too far ahead. 0: there is none. */
static int next_ahead(fst_engine *engine, const fst_load_job *job, fst_strip *out) {
    const fst_plan *plan = job->plan;
    uint64_t reading = atomic_load(&engine->next_strip);
    if (engine->ahead < reading) engine->ahead = reading;
    uint32_t chunk = (uint32_t)(engine->ahead >> 32), k = (uint32_t)engine->ahead;
    while (chunk < plan->chunks_count && fst_shared_has(job->shared, &plan->chunks[chunk])) chunk++, k = 0;
    if (chunk >= plan->chunks_count ||
        chunk - (uint32_t)(reading >> 32) > LOOK_BYTES / engine->facts.slot_bytes)
        return 0;
    *out = strip_at(engine, job, chunk, k);
    int last = k + 1 == strips_of(engine, job, &plan->chunks[chunk]);
    engine->ahead = last ? (uint64_t)(chunk + 1) << 32 : (uint64_t)chunk << 32 | (k + 1);
    return 1;
}

/* Decides about strips that come later, and has those read that are not in memory, so that storage is busy, also while what
 * is in memory is copied. One worker at a time: several at once only wait for the locks of the same file. */
static void look_ahead(fst_engine *engine, const fst_load_job *job) {
    fst_strip strip, run = {.nbytes = 0};
    if (atomic_flag_test_and_set(&engine->looking)) return;
    for (unsigned looks = 0; looks < LOOKS && atomic_load(&engine->advised) < AHEAD_BYTES; looks++) {
        unsigned char expected = 0;
        if (!next_ahead(engine, job, &strip)) break;
        atomic_uchar *known = how_of(engine, job, &strip);
        if (!atomic_compare_exchange_strong(known, &expected, DECIDING)) continue;
        fst_how how = look_at(job, &strip);
        unsigned char decided = (unsigned char)(1 + how);
        expected = DECIDING;
        if (how != FST_HOW_BUFFERED) {
            atomic_compare_exchange_strong(known, &expected, decided);
            continue;
        }
        const fst_plan_chunk *chunks = job->plan->chunks;
        int follows = run.nbytes && !chunks[run.chunk].gathered && !chunks[strip.chunk].gathered &&
                      chunks[run.chunk].file == chunks[strip.chunk].file &&
                      run.offset + run.nbytes == strip.offset && run.nbytes < ADVICE_BYTES;
        if (follows) {
            run.nbytes += strip.nbytes;
        } else {
            if (run.nbytes) advise(job, &run, run.nbytes);
            run = strip;
        }
        atomic_fetch_add(&engine->advised, strip.nbytes);
        if (!atomic_compare_exchange_strong(known, &expected, (unsigned char)(decided | ADVISED)))
            atomic_fetch_sub(&engine->advised, strip.nbytes); /* somebody reads it already */
    }
    if (run.nbytes) advise(job, &run, run.nbytes);
    atomic_flag_clear(&engine->looking);
}

/* Sends on what is full: first what need not wait for memory, which others may wait for; and before this worker waits,
 * it finishes what it reads. */
static int send_full(fst_worker *w, const fst_load_job *job) {
    while (w->full_count) {
        unsigned best = 0;
        int ready = 0;
        for (unsigned i = 0; i < w->full_count; i++) {
            int there = memory_is_there(w->engine, job, &job->plan->chunks[w->full[i]->chunk]);
            if (there > ready || (there == ready && w->full[i]->chunk < w->full[best]->chunk))
                best = i, ready = there;
        }
        if (!ready && w->reads_count) {
            if (!finish_read(w, job)) return 0;
            continue;
        }
        fst_slot *s = w->full[best];
        w->full[best] = w->full[--w->full_count];
        if (!send_chunk(w, job, s)) return 0;
    }
    return 1;
}

/* Who reads a chunk's last strip sends it on. */
static void strip_is_there(fst_worker *w, fst_slot *s) {
    if (atomic_fetch_sub(&s->left, 1) != 1) return;
    s->full = fst_os_now();
    w->full[w->full_count++] = s;
}

/* A strip was read. */
static int strip_came(fst_worker *w, const fst_load_job *job, fst_slot *s, const fst_strip *strip,
                      ssize_t got) {
    const fst_plan_chunk *chunk = &job->plan->chunks[strip->chunk];
    uint32_t piece = piece_at(job, chunk, strip->offset - chunk->offset);
    if (!check_read(w, job, chunk, piece, strip->offset, strip->nbytes, got)) return 0;
    strip_is_there(w, s);
    return 1;
}

/* A ring that broke may write to its slots for ever: what it had is lost, and so is the load. */
static void lose_ring(fst_worker *w, const fst_load_job *job, int code) {
    for (unsigned i = 0; i < FST_MAX_READS; i++) {
        if (!w->reads[i].slot) continue;
        strip_came(w, job, w->reads[i].slot, &w->reads[i].strip, code);
        w->reads[i].slot = NULL;
    }
    w->reads_count = 0;
    w->ring_is_broken = 1;
}

/* Waits until the io_uring has read another strip. 0 after a failure, of anybody. */
static int finish_read(fst_worker *w, const fst_load_job *job) {
    double start = fst_os_now();
    uint64_t tag = 0;
    ssize_t got = 0;
    fst_how how;
    int code = fst_reader_wait(job->reader, w->ring, &tag, &got, &how);
    w->stats.read_seconds += fst_os_now() - start;
    if (code < 0) {
        lose_ring(w, job, code);
        return 0;
    }
    fst_slot *s = w->reads[tag].slot;
    fst_strip strip = w->reads[tag].strip;
    w->reads[tag].slot = NULL;
    w->reads_count--;
    trace_read(w, &strip, how, w->reads[tag].begun);
    if (atomic_load(&w->engine->stop)) return 0;
    return strip_came(w, job, s, &strip, got);
}

/* The ring of a worker, made by the first strip that wants one. */
static int prepare_ring(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    struct iovec slots[RING_SLOTS];
    unsigned count = 0, own = engine->gpu->host_access ? engine->facts.threads : 1;
    if (!job->use_ring) return 0;
    if (w->ring_why) fst_reader_note_ring(job->reader, w->ring_why); /* of an earlier load, too */
    if (w->ring || w->ring_is_refused) return !w->ring_is_refused;
    for (unsigned i = own > 1 ? worker_number(w) : 0; i < engine->slots_count && count < RING_SLOTS; i += own)
        slots[count++] = (struct iovec){engine->slots[i].bounce, engine->slot_room};
    w->ring_is_refused = fst_ring_new(FST_MAX_READS, slots, count, &w->ring, &w->ring_why) != 0;
    if (w->ring_why) fst_reader_note_ring(job->reader, w->ring_why);
    return !w->ring_is_refused;
}

/* A strip's place in its slot: as fst_reader_read wants it. */
static unsigned char *place_in_slot(const fst_load_job *job, const fst_slot *s, const fst_strip *strip) {
    const fst_plan_chunk *chunk = &job->plan->chunks[strip->chunk];
    return s->bounce + (strip->offset / PAGE - chunk->offset / PAGE) * PAGE;
}

static int submit_strip(fst_worker *w, const fst_load_job *job, fst_slot *s, const fst_strip *strip,
                        fst_how how) {
    unsigned tag = 0;
    while (w->reads[tag].slot) tag++;
    if (fst_reader_submit(job->reader, w->ring, tag, how, job->plan->chunks[strip->chunk].file,
                          place_in_slot(job, s, strip), strip->offset, strip->nbytes))
        return 0;
    w->reads[tag].slot = s;
    w->reads[tag].strip = *strip;
    w->reads[tag].begun = fst_os_now();
    w->reads_count++;
    return 1;
}

/* Units give their place to others when the chunks that they went into are done with: whoever waits sees to that. */
static int await_units(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk) {
    int there = 0;
    while (!there && !atomic_load(&w->engine->stop)) {
        if (!w->engine->gpu->host_access && !drain_copies(w, job)) return 0;
        there = !fst_shared_help(job->shared) && fst_shared_await(job->shared, chunk);
    }
    return there && !atomic_load(&w->engine->stop);
}

/* Reads a strip into its slot, or begins to. */
static int begin_strip(fst_worker *w, const fst_load_job *job, fst_slot *s, const fst_strip *strip) {
    fst_engine *engine = w->engine;
    const fst_plan_chunk *chunk = &job->plan->chunks[strip->chunk];
    const int shared = fst_shared_has(job->shared, chunk);
    if (!shared) look_ahead(engine, job);
    fst_how how = shared ? FST_HOW_CACHED : choose(engine, job, strip);
    double start = fst_os_now();
    if (shared) {
        while (w->reads_count) /* others may wait for these */
            if (!finish_one(w, job)) return 0;
        int there = await_units(w, job, chunk);
        w->stats.read_seconds += fst_os_now() - start;
        if (there && !engine->gpu->host_access) strip_is_there(w, s);
        if (!there || !engine->gpu->host_access) return there;
    }
    if (how != FST_HOW_CACHED && !chunk->gathered && prepare_ring(w, job) &&
        submit_strip(w, job, s, strip, how))
        return 1;
    if (engine->gpu->host_access && how != FST_HOW_DIRECT) {
        while (w->reads_count) /* what is earlier in the file may be waited for by what this one waits for */
            if (!finish_one(w, job)) return 0;
        w->stats.chunks++;
        w->stream = s->stream;
        if (!prepare_memory(w, job, chunk) || !load_chunk_on_host(w, job, chunk, s, how) ||
            !finish_chunk(w, job, s))
            return 0;
        trace_read(w, strip, how, start);
        if (chunk->companions) count_nan_scales(w, job, chunk, NULL);
        chunk_is_done(w, job, s);
        if (chunk->companions) companions_came(engine, job, chunk->batch);
        track_chunk(engine, job, strip->chunk);
        return 1;
    }
    if (chunk->gathered) {
        uint64_t at = strip->offset - chunk->offset;
        int right = read_chunk(w, job, chunk, at, strip->nbytes, s->bounce + chunk->offset % PAGE + at, &how);
        w->stats.read_seconds += fst_os_now() - start;
        trace_read(w, strip, how, start);
        if (right) strip_is_there(w, s);
        return right;
    }
    ssize_t got = fst_reader_read(job->reader, &how, chunk->file, place_in_slot(job, s, strip), strip->offset,
                                  strip->nbytes);
    w->stats.read_seconds += fst_os_now() - start;
    trace_read(w, strip, how, start);
    return strip_came(w, job, s, strip, got);
}

/* ---- A worker ------------------------------------------------------------------------------------ */

static int is_cancelled(const fst_load_job *job) {
    return job->cancel && __atomic_load_n(job->cancel, __ATOMIC_RELAXED);
}

static void cancel(fst_engine *engine, const fst_load_job *job) {
    fst_error error = {.file = -1, .offset = -1};
    fst_fail(&error, FST_E_CANCELLED, 0, NULL, "the load was cancelled");
    fail_with(engine, job, &error);
}

/* One strip more. 0: there is none, or the job was stopped. */
static int work_on(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    fst_strip strip;
    if (is_cancelled(job)) cancel(engine, job);
    if (atomic_load(&engine->stop)) return 0;
    if (w->reads_count == FST_MAX_READS && !finish_read(w, job)) return 0;
    if (!send_full(w, job) || !take_strip(engine, job, &strip)) return 0;
    fst_slot *s = engine->gpu->host_access ? own_slot(w, job, &strip) : shared_slot(w, job, strip.chunk);
    return s && begin_strip(w, job, s, &strip) && send_full(w, job);
}

/* Also after a failure: nothing may be under way when the blocks are freed. The last worker does it. */
static void settle(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    const fst_gpu *gpu = engine->gpu;
    fst_slot *next;
    double start = fst_os_now();
    while ((next = oldest_copying(engine))) finish_copies(w, job, next);
    for (unsigned i = 0; i < engine->slots_count; i++) {
        fst_slot *s = &engine->slots[i];
        if (atomic_load(&s->state) == FST_SLOT_FILLING)
            atomic_store(&s->state, FST_SLOT_FREE);      /* of a job that failed */
        if (gpu->host_access || !s->converted) continue; /* not made whole */
        w->stream = s->stream;
        int code = gpu->calls->stream_wait(gpu, s->stream);
        if (!code) code = finish_kernels(w, s);
        s->kernels_untimed = 0;
        if (code) fail_device(w, job, code, "waiting for the device");
    }
    int code = engine->copies ? gpu->calls->stream_wait(gpu, engine->copies) : 0;
    if (code) fail_device(w, job, code, "waiting for copies");
    w->stats.wait_seconds += fst_os_now() - start;
}

void fst_engine_work(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    memset(&w->stats, 0, sizeof w->stats);
    w->turn = w->full_count = 0;
    if (w->setup_what) fail_device(w, job, w->setup_code, w->setup_what);
    else
        while (work_on(w, job)) continue;
    while (w->reads_count) finish_one(w, job); /* after the last strip, or a failure */
    if (atomic_fetch_sub(&engine->inside, 1) == 1) settle(w, job);
    if (w->ring) fst_ring_forget(w->ring);
    if (w->ring_is_broken) {
        fst_ring_free(w->ring);
        w->ring = NULL;
        w->ring_is_broken = 0;
        /* Slots may be written to still: the engine is not used again. */
        w->setup_what = "reading through io_uring";
    }
}

/* ---- A load -------------------------------------------------------------------------------------- */

/* The staging slots, made by the first load that converts anything. */
static fst_status make_staging(fst_engine *engine, const fst_plan *plan, fst_error *error) {
    const fst_gpu *gpu = engine->gpu;
    if (gpu->host_access || engine->staging || !plan->converts) return FST_OK;
    uint64_t size = (uint64_t)engine->slot_room * engine->slots_count;
    int code = gpu->calls->alloc_block(gpu, size, &engine->staging);
    if (code) {
        engine->staging = NULL;
        return fst_gpu_fail(error, gpu, code, "allocating the staging ring");
    }
    for (unsigned i = 0; i < engine->slots_count; i++)
        engine->slots[i].staging = (unsigned char *)engine->staging + engine->slot_room * i;
    pthread_mutex_lock(&engine->lock);
    engine->facts.staging_bytes = size;
    pthread_mutex_unlock(&engine->lock);
    return FST_OK;
}

static void report_progress(fst_engine *engine, const fst_load_job *job) {
    double seconds = fst_os_now() - job->started;
    uint64_t done = atomic_load(&engine->bytes_done);
    fst_progress progress = {done, job->bytes_total, seconds, seconds > 0 ? (double)done / seconds : 0};
    engine->reported = fst_os_now();
    if (job->progress(job->progress_arg, &progress)) cancel(engine, job);
}

/* What this rank reads for others, too. 1: that is done. */
static int share(fst_engine *engine, const fst_load_job *job) {
    fst_error error = {.file = -1, .offset = -1};
    int done = 1;
    if (!job->shared) return 1;
    pthread_mutex_lock(&engine->lock);
    fst_status mine = engine->first.status;
    pthread_mutex_unlock(&engine->lock);
    fst_status status = fst_shared_step(job->shared, mine, &done, &error);
    if (!status) return done;
    /* A communicator that is lost is what the caller must hear of. */
    pthread_mutex_lock(&engine->lock);
    if (status == FST_E_PEER && error.code == 0) engine->first.status = FST_OK;
    pthread_mutex_unlock(&engine->lock);
    if (status != mine) fail_with(engine, job, &error);
    return done;
}

/* Reports progress and looks for a cancel, until all workers are idle. */
static void attend(fst_engine *engine, const fst_load_job *job) {
    int finished = 0;
    while (!finished) {
        int shared = share(engine, job);
        pthread_mutex_lock(&engine->lock);
        if (engine->running && shared)
            wait_for(engine, &engine->done, job->cancel ? CANCEL_SECONDS : PROGRESS_SECONDS);
        finished = engine->running == 0 && shared;
        pthread_mutex_unlock(&engine->lock);
        if (is_cancelled(job)) cancel(engine, job);
        if (!job->progress || atomic_load(&engine->stop)) continue;
        if (finished || fst_os_now() - engine->reported >= PROGRESS_SECONDS) report_progress(engine, job);
    }
}

static void sum_stats(const fst_engine *engine, fst_pipeline_stats *out) {
    memset(out, 0, sizeof *out);
    for (unsigned i = 0; i < engine->threads_count; i++) {
        const fst_pipeline_stats *s = &engine->workers[i].stats;
        out->chunks += s->chunks;
        out->launches += s->launches;
        out->bytes_read += s->bytes_read;
        out->nan_scales += s->nan_scales;
        out->read_seconds += s->read_seconds;
        out->wait_seconds += s->wait_seconds;
        out->kernel_seconds += s->kernel_seconds;
        out->held_seconds += s->held_seconds;
        out->slot_seconds += s->slot_seconds;
        out->copy_ms += s->copy_ms;
        out->launch_ms += s->launch_ms;
        out->sent_bytes += s->sent_bytes;
        out->timed_bytes += s->timed_bytes;
    }
    if (!out->timed_bytes) return;
    out->copy_ms *= (double)out->sent_bytes / (double)out->timed_bytes;
    out->launch_ms *= (double)out->sent_bytes / (double)out->timed_bytes;
}

fst_status fst_pipeline_begin(fst_engine *engine, const fst_load_job *job, fst_error *error) {
    fst_status status = make_staging(engine, job->plan, error);
    if (!status) status = make_parking(engine, job, error);
    if (status) {
        free_parking(engine, job);
        return status;
    }
    atomic_store(&engine->next_strip, 0);
    atomic_store(&engine->advised, 0);
    engine->ahead = 0;
    atomic_store(&engine->next_slot, 0);
    atomic_store(&engine->inside, engine->threads_count);
    atomic_store(&engine->stop, 0);
    atomic_store(&engine->bytes_done, 0);
    engine->reported = 0;
    engine->sent = 0;
    pthread_mutex_lock(&engine->lock);
    engine->first = (fst_error){.status = FST_OK, .file = -1, .offset = -1};
    engine->job = job;
    engine->next_block = 0;
    engine->companion_bytes = engine->companion_peak = 0;
    engine->running = engine->threads_count;
    engine->generation++;
    pthread_cond_broadcast(&engine->wake);
    pthread_mutex_unlock(&engine->lock);
    return FST_OK;
}

fst_status fst_pipeline_end(fst_engine *engine, const fst_load_job *job, int abandon,
                            fst_pipeline_stats *stats, fst_error *error) {
    if (abandon) cancel(engine, job);
    attend(engine, job);
    for (uint32_t i = 0; i < job->plan->batches_count; i++)
        free_companions(engine, job, i); /* after a failure */
    engine->job = NULL;
    sum_stats(engine, stats);
    stats->companion_bytes = engine->companion_peak;
    stats->parked_bytes = job->plan->parked_bytes + job->plan->counters_count * sizeof(uint64_t);
    if (!engine->first.status) read_counters(engine, job, &stats->nans, &engine->first);
    free_parking(engine, job);
    if (engine->first.status && error) *error = engine->first;
    return engine->first.status;
}

fst_status fst_pipeline_run(fst_engine *engine, const fst_load_job *job, fst_pipeline_stats *stats,
                            fst_error *error) {
    memset(stats, 0, sizeof *stats);
    fst_status status = fst_pipeline_begin(engine, job, error);
    if (status) return status;
    /* In the caller's thread, while others read: mapping memory takes time. */
    uint32_t i = 0;
    while (i < job->plan->blocks_count && need_block(engine, job, i)) i++;
    return fst_pipeline_end(engine, job, 0, stats, error);
}

/* ---- Tensor by tensor ---------------------------------------------------------------------------- */

/* Whether nobody goes on before the consumer gives memory back. Who has not woken up yet, but has a block by now, will.
 * The lock is held. */
static int waits_for_consumer(fst_engine *engine, const fst_load_job *job) {
    unsigned held_up = 0;
    if (!job->budget || !engine->running) return 0;
    int copying = any_slot(engine, FST_SLOT_COPYING), are_free = any_slot(engine, FST_SLOT_FREE);
    for (unsigned i = 0; i < engine->threads_count; i++) {
        const fst_worker *w = &engine->workers[i];
        uint32_t needs = atomic_load(&w->needs), slot = atomic_load(&w->needs_slot);
        /* Companions that do not come lie in a slot whose worker waits for a block. */
        held_up +=
            (needs && !atomic_load(&job->blocks[needs - 1])) ||
            (slot && !atomic_load(&job->slots[slot - 1]) && !copying && !are_free) ||
            (w->needs_batch && lacks_companions(job, w->needs_batch - 1)) ||
            (w->needs_window && !copying && !windows_are_free(job, &job->plan->chunks[w->needs_window - 1]));
    }
    return held_up == engine->running && fst_budget_is_waited_for(job->budget);
}

static int is_complete(const fst_load_job *job, uint32_t tensor) {
    return atomic_load(&job->tracking->left[tensor]) == 0;
}

/* What was queued for a tensor is waited for, here or on the caller's stream; if it is fused, for its parts. */
static int await_tensor(fst_engine *engine, const fst_load_job *job, uint32_t index, fst_queue stream) {
    const fst_plan_tensor *tensor = &job->plan->tensors[index];
    const fst_gpu *gpu = engine->gpu;
    int code = 0, fused = tensor->fused == FST_NO_TENSOR && tensor->cut != FST_NO_CUT &&
                          index >= job->plan->stored_count;
    if (gpu->host_access) return 0;
    for (uint32_t i = tensor->next_part; fused && i != FST_NO_TENSOR && !code;
         i = job->plan->tensors[i].next_part)
        code = await_tensor(engine, job, i, stream);
    for (uint32_t i = 0; i < tensor->chunks && !code; i++) {
        unsigned number = atomic_load(&job->slots[tensor->first_chunk + i]) - 1u;
        fst_slot *s = &engine->slots[number];
        /* The slot may hold a later chunk by now: on the same stream, and so its event comes later still. */
        code = stream ? gpu->calls->stream_follow(gpu, stream, s->converted)
                      : gpu->calls->event_wait(gpu, s->converted);
    }
    return code;
}

fst_status fst_pipeline_next(fst_engine *engine, const fst_load_job *job, size_t seen, uint32_t *which,
                             fst_queue stream, fst_error *error) {
    fst_tracking *tracking = job->tracking;
    fst_status status = FST_OK;
    int held = 0, any = *which == FST_ANY_TENSOR;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        if (engine->first.status) {
            *error = engine->first;
            status = error->status;
            break;
        }
        int due = job->progress && fst_os_now() - engine->reported >= PROGRESS_SECONDS;
        if (due || is_cancelled(job)) {
            pthread_mutex_unlock(&engine->lock);
            if (due) report_progress(engine, job);
            else cancel(engine, job);
            pthread_mutex_lock(&engine->lock);
            continue;
        }
        if (any ? tracking->ready_count > seen : is_complete(job, *which)) break;
        /* Twice, as the last of them may just be on its way. */
        held = waits_for_consumer(engine, job) ? held + 1 : 0;
        if (held == 2) {
            status = fst_fail(error, FST_E_AGAIN, 0, NULL,
                              "all of the stream's memory is held by tensors that were taken: release some");
            break;
        }
        wait_for(engine, &engine->done, NEXT_SECONDS);
    }
    if (!status && any) *which = tracking->ready[seen];
    pthread_mutex_unlock(&engine->lock);
    if (status) return status;
    int code = await_tensor(engine, job, *which, stream);
    return code ? fst_gpu_fail(error, engine->gpu, code, "waiting for a tensor") : FST_OK;
}
