#include "pipeline.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dtype.h"
#include "engine.h"
#include "os.h"
#include "ring.h"

#define PAGE 4096u
#define PROGRESS_SECONDS 0.05
#define CANCEL_SECONDS 0.01
#define NEXT_SECONDS 0.002 /* a consumer looks so often whether all the others wait for it */
#define DIRECT_LAUNCHES 2u /* so many CONVERT pieces in a chunk are launched one by one, more as a batch */
#define AHEAD_BYTES ((uint64_t)64 << 20) /* of files, that the kernel is asked to read before they are read */

fst_trace *fst_pipeline_trace;

/* ---- Memory that the consumer holds ----------------------------------------------------------- */

fst_budget *fst_budget_new(uint64_t limit) {
    fst_budget *budget = calloc(1, sizeof *budget);
    if (!budget) return NULL;
    atomic_init(&budget->references, 1);
    pthread_mutex_init(&budget->lock, NULL);
    pthread_cond_init(&budget->given, NULL);
    budget->limit = limit;
    return budget;
}

int fst_budget_take(fst_budget *budget, uint64_t nbytes) {
    double start = fst_os_now();
    pthread_mutex_lock(&budget->lock);
    budget->wanted = nbytes;
    while (!budget->stopped && budget->held + nbytes > budget->limit)
        pthread_cond_wait(&budget->given, &budget->lock);
    budget->wanted = 0;
    budget->waited += fst_os_now() - start;
    int taken = !budget->stopped;
    if (taken) budget->held += nbytes;
    if (budget->held > budget->peak) budget->peak = budget->held;
    pthread_mutex_unlock(&budget->lock);
    return taken;
}

void fst_budget_give(fst_budget *budget, uint64_t nbytes) {
    pthread_mutex_lock(&budget->lock);
    budget->held -= nbytes;
    pthread_cond_broadcast(&budget->given);
    pthread_mutex_unlock(&budget->lock);
}

void fst_budget_stop(fst_budget *budget) {
    pthread_mutex_lock(&budget->lock);
    budget->stopped = 1;
    pthread_cond_broadcast(&budget->given);
    pthread_mutex_unlock(&budget->lock);
}

int fst_budget_is_waited_for(fst_budget *budget) {
    pthread_mutex_lock(&budget->lock);
    /* Who waited for what fits by now has only not woken up yet. */
    int waited = budget->wanted && budget->held + budget->wanted > budget->limit;
    pthread_mutex_unlock(&budget->lock);
    return waited;
}

fst_budget *fst_budget_hold(fst_budget *budget) {
    if (budget) atomic_fetch_add_explicit(&budget->references, 1, memory_order_relaxed);
    return budget;
}

void fst_budget_drop(fst_budget *budget) {
    if (!budget || atomic_fetch_sub_explicit(&budget->references, 1, memory_order_acq_rel) != 1) return;
    pthread_mutex_destroy(&budget->lock);
    pthread_cond_destroy(&budget->given);
    free(budget);
}

/* ---- Failing ----------------------------------------------------------------------------------- */

/* The first failure of a job counts; it stops all the others. */
static void fail_with(fst_engine *engine, const fst_load_job *job, const fst_error *why) {
    pthread_mutex_lock(&engine->lock);
    if (engine->first.status == FST_OK) engine->first = *why;
    atomic_store(&engine->stop, 1);
    pthread_cond_broadcast(&engine->done);
    pthread_cond_broadcast(&engine->allocated);
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

/* All memory that the chunk's results and conversions need. 0 when the job was stopped. */
static int prepare_memory(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk) {
    if (!worker_needs_block(w, job, chunk->block)) return 0;
    if (chunk->batch == FST_NO_BATCH) return 1;
    return chunk->companions ? need_companion_memory(w, job, chunk->batch)
                             : wait_for_companions(w, job, chunk->batch);
}

/* ---- Conversions ------------------------------------------------------------------------------- */

/* What converts a piece that lies at `src`. */
static fst_cast_args cast_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    unsigned char *result = tensor->memory;
    if (tensor->batch != FST_NO_BATCH)
        result = (unsigned char *)job->batches[tensor->batch].memory + tensor->block_offset;
    else if (!result)
        result = (unsigned char *)atomic_load(&job->blocks[tensor->block]) + tensor->block_offset;
    return (fst_cast_args){
        .src = src,
        .dst = result + piece->dst_offset,
        .count = piece->count,
        .src_dtype = (int)job->headers[tensor->file].tensors[tensor->entry].dtype,
        .dst_dtype = (int)tensor->dtype,
        .flags = job->flags & FST_NON_SATURATING ? FST_K_NON_SATURATING : 0,
    };
}

/* Where a companion of a weight lies on the device. */
static const unsigned char *companion(const fst_load_job *job, const fst_quantized *w, fst_companion which) {
    const fst_plan_tensor *tensor = &job->plan->tensors[w->companions[which]];
    return (const unsigned char *)job->batches[tensor->batch].memory + tensor->block_offset;
}

/* The scales of a matrix count as their kind has it. */
static fst_scaled_args scaled_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_plan_tensor *tensor = &job->plan->tensors[piece->tensor];
    const fst_quantized *w = tensor->weight;
    const fst_plan_tensor *scale = &job->plan->tensors[w->companions[FST_COMPANION_SCALE]];
    fst_cast_args plain = cast_args(job, piece, src);
    int power = scale->dtype == FST_U8 || scale->dtype == FST_F8_E8M0;
    uint64_t groups = (w->cols - 1) / w->block_cols + 1, bands = (w->rows - 1) / w->block_rows + 1;
    fst_scaled_args args = {
        .src = src,
        .dst = plain.dst,
        .scales_count = bands * groups,
        .rows = w->rows,
        .cols = w->cols,
        .first = piece->first,
        .count = piece->count,
        .src_dtype = w->bits == 4 ? FST_F4 : plain.src_dtype,
        .dst_dtype = plain.dst_dtype,
        .scale_dtype = power ? FST_F8_E8M0 : (int)scale->dtype,
        .kind = FST_SCALE_BLOCK,
        .block_rows = w->block_rows,
        .block_cols = w->block_cols,
    };
    if (w->block_rows == 1) args.kind = w->block_cols == w->cols ? FST_SCALE_ROW : FST_SCALE_GROUP;
    if (bands == 1 && groups == 1) args.kind = FST_SCALE_TENSOR;
    uint64_t before = piece->matrix * args.scales_count * fst_dtype_bits((fst_dtype)args.scale_dtype) / 8;
    args.scales = companion(job, w, FST_COMPANION_SCALE) + before;
    if (w->format == FST_FORMAT_NVFP4) {
        const fst_plan_tensor *global = &job->plan->tensors[w->companions[FST_COMPANION_GLOBAL]];
        args.kind = FST_SCALE_GROUP; /* also where there is but one group: its scale is one of groups */
        args.global_scale =
            companion(job, w, FST_COMPANION_GLOBAL) + (global->nbytes > 4 ? piece->matrix * 4 : 0);
        args.flags = w->flags & FST_Q_DIVIDE ? FST_K_DIVIDE : 0;
    }
    return args;
}

static int packing_of(const fst_quantized *w) {
    switch (w->format) {
    case FST_FORMAT_GPTQ: return FST_PACKED_COLUMN;
    case FST_FORMAT_AWQ:
    case FST_FORMAT_INT4_QUARK: return FST_PACKED_TRANSPOSED;
    case FST_FORMAT_INT4_ROWS: return FST_PACKED_PAIRS;
    default: return FST_PACKED_ROW;
    }
}

static int zeros_of(const fst_quantized *w) {
    if (w->companions[FST_COMPANION_ZERO] == FST_NO_TENSOR) return FST_ZEROS_NONE;
    if (w->flags & FST_Q_BYTE_ZEROS) return FST_ZEROS_BYTES;
    if (w->format == FST_FORMAT_PACKED) return FST_ZEROS_COLUMNS;
    return w->format == FST_FORMAT_AWQ_GEMV ? FST_ZEROS_GROUPS : FST_ZEROS_ROWS;
}

static unsigned packed_flags(const fst_quantized *w) {
    static const unsigned flags[][2] = {{FST_Q_PADDED, FST_K_PADDED},
                                        {FST_Q_AWQ_ORDER, FST_K_AWQ_ORDER},
                                        {FST_Q_OFFSET, FST_K_OFFSET},
                                        {FST_Q_SIGNED, FST_K_SIGNED},
                                        {FST_Q_ZERO_PLUS_ONE, FST_K_ZERO_PLUS_ONE}};
    unsigned all = 0;
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (w->flags & flags[i][0]) all |= flags[i][1];
    /* Whole words are only counted up where codes fill them. */
    if ((w->flags & FST_Q_CARRY) && 32 % w->bits == 0) all ^= FST_K_ZERO_PLUS_ONE | FST_K_ZERO_CARRY;
    return all;
}

/* The bytes of a companion that has as much for each matrix of the stack. */
static const unsigned char *part_of(const fst_load_job *job, const fst_plan_piece *piece,
                                    fst_companion which) {
    const fst_quantized *w = job->plan->tensors[piece->tensor].weight;
    if (w->companions[which] == FST_NO_TENSOR) return NULL;
    uint64_t nbytes = job->plan->tensors[w->companions[which]].nbytes;
    return companion(job, w, which) + piece->matrix * (nbytes / w->stack);
}

static fst_packed_args packed_args(const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_quantized *w = job->plan->tensors[piece->tensor].weight;
    const fst_plan_tensor *scale = &job->plan->tensors[w->companions[FST_COMPANION_SCALE]];
    fst_cast_args plain = cast_args(job, piece, src);
    uint64_t scales = scale->nbytes / (fst_dtype_bits(scale->dtype) / 8);
    return (fst_packed_args){
        .src = src,
        .dst = plain.dst,
        .scales = part_of(job, piece, FST_COMPANION_SCALE),
        .zeros = part_of(job, piece, FST_COMPANION_ZERO),
        .groups =
            w->flags & FST_Q_PLAIN_GROUPS ? NULL : (const void *)part_of(job, piece, FST_COMPANION_GROUPS),
        .rows = w->rows,
        .cols = w->cols,
        .first = piece->first,
        .count = piece->count,
        .group = w->block_cols,
        .groups_count = scales / w->stack / w->rows,
        .bits = w->bits,
        .dst_dtype = plain.dst_dtype,
        .scale_dtype = (int)scale->dtype,
        .layout = packing_of(w),
        .zeros_kind = zeros_of(w),
        .flags = packed_flags(w),
    };
}

static int launch_packed(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece,
                         const void *src) {
    fst_packed_args args = packed_args(job, piece, src);
    return w->engine->gpu->kernels->packed(w->stream, &args);
}

static int launch_one(fst_worker *w, const fst_load_job *job, const fst_plan_piece *piece, const void *src) {
    const fst_kernels *kernels = w->engine->gpu->kernels;
    w->stats.launches++;
    const fst_quantized *weight = job->plan->tensors[piece->tensor].weight;
    if (weight && fst_scheme_is_packed(weight)) return launch_packed(w, job, piece, src);
    if (weight) {
        fst_scaled_args args = scaled_args(job, piece, src);
        return kernels->scaled(w->stream, &args);
    }
    fst_cast_args args = cast_args(job, piece, src);
    return kernels->cast(w->stream, &args);
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
            if (job->plan->tensors[p->tensor].weight) continue; /* by themselves */
            fst_cast_args args = cast_args(job, p, staged + p->chunk_offset);
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
static void track_chunk(fst_worker *w, const fst_load_job *job, uint32_t index, unsigned slot) {
    fst_engine *engine = w->engine;
    fst_tracking *tracking = job->tracking;
    const fst_plan_chunk *chunk = &job->plan->chunks[index];
    const fst_plan_run *last = &job->plan->runs[chunk->first_run + chunk->runs - 1];
    uint32_t first = job->plan->runs[chunk->first_run].first_piece, end = last->first_piece + last->pieces;
    unsigned worker = (unsigned)(w - engine->workers), completed = 0;
    if (!tracking) return;
    atomic_store(&tracking->slots[index], 1 + worker * FST_MAX_SLOTS + slot);
    for (uint32_t i = first; i < end; i++) {
        uint32_t tensor = job->plan->pieces[i].tensor;
        if (atomic_fetch_sub(&tracking->left[tensor], 1) != 1) continue;
        pthread_mutex_lock(&engine->lock);
        tracking->ready[tracking->ready_count++] = tensor;
        pthread_mutex_unlock(&engine->lock);
        completed++;
    }
    if (!completed) return;
    pthread_mutex_lock(&engine->lock);
    pthread_cond_broadcast(&engine->done);
    pthread_mutex_unlock(&engine->lock);
}

/* ---- One chunk on a GPU ------------------------------------------------------------------------- */

/* How long the kernels of the chunk before took, that need not have been done when its copy was. What is queued next
 * comes behind them on the same stream: waiting for them here holds up nothing. */
static int time_kernels(fst_worker *w, fst_slot *s) {
    const fst_gpu *gpu = w->engine->gpu;
    if (!s->kernels_untimed) return 0;
    s->kernels_untimed = 0;
    int code = gpu->calls->event_wait(gpu, s->converted);
    float convert = code ? -1 : gpu->calls->event_elapsed(gpu, s->copied, s->converted);
    if (convert > 0) w->stats.launch_ms += (double)convert;
    return code;
}

/* Queues the copies and kernels of a chunk that was read into the slot. 0 or a code; *what says of what. */
static int queue_chunk(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk, fst_slot *s,
                       const char **what) {
    const fst_gpu *gpu = w->engine->gpu;
    const fst_plan *plan = job->plan;
    size_t shift = chunk->offset % PAGE; /* the slot keeps the file's alignment to pages */
    unsigned char *bounce = s->bounce + shift, *staged = s->staging ? s->staging + shift : NULL;
    size_t jobs_at = ((shift + chunk->nbytes + 63) & ~(size_t)63) - shift; /* behind the data */
    uint32_t convert_pieces = chunk->jobs_bytes / sizeof(fst_batch_job), lists_count = 0;
    job_list lists[MAX_PAIRS];
    size_t jobs_bytes = 0;
    int code = time_kernels(w, s);
    if (!code && s->started) code = gpu->calls->event_record(gpu, s->started, w->stream);
    *what = "a copy to the device";
    if (convert_pieces > DIRECT_LAUNCHES) {
        lists_count = make_jobs(job, chunk, staged, (fst_batch_job *)(void *)(bounce + jobs_at), lists);
        jobs_bytes = lists_count ? chunk->jobs_bytes : 0;
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
    if (lists_count)
        code = convert_batched(w, job, lists, lists_count,
                               (const fst_batch_job *)(const void *)(staged + jobs_at));
    uint32_t run = 0, i = 0, piece;
    while (!code && (piece = next_convert_piece(plan, chunk, &run, &i)) != UINT32_MAX)
        if (!lists_count || plan->tensors[plan->pieces[piece].tensor].weight)
            code = launch_one(w, job, &plan->pieces[piece], staged + plan->pieces[piece].chunk_offset);
    if (!code) code = gpu->calls->event_record(gpu, s->converted, w->stream);
    return code;
}

/* ---- One chunk on the CPU device ----------------------------------------------------------------- */

static int convert_run_on_host(fst_worker *w, const fst_load_job *job, const fst_plan_run *run,
                               const unsigned char *data) {
    const fst_plan_piece *pieces = &job->plan->pieces[run->first_piece];
    double start = fst_os_now();
    for (uint32_t i = 0; i < run->pieces; i++) {
        int code = launch_one(w, job, &pieces[i], data + (pieces[i].chunk_offset - run->chunk_offset));
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
            memcpy(cast_args(job, &job->plan->pieces[run->first_piece], NULL).dst, from, run->nbytes);
        else if (!convert_run_on_host(w, job, run, from)) return 0;
    }
    return 1;
}

/* What is kept is read into place, what is converted comes through the slot. */
static int load_chunk_on_host(fst_worker *w, const fst_load_job *job, const fst_plan_chunk *chunk,
                              const fst_slot *s, fst_how how) {
    for (uint32_t r = 0; r < chunk->runs; r++) {
        const fst_plan_run *run = &job->plan->runs[chunk->first_run + r];
        uint64_t offset = chunk->offset + run->chunk_offset;
        unsigned char *to = s->bounce + offset % PAGE;
        if (run->kind == FST_RUN_PLACE) to = cast_args(job, &job->plan->pieces[run->first_piece], NULL).dst;
        double start = fst_os_now();
        ssize_t got = fst_reader_read_to(job->reader, &how, chunk->file, to, offset, run->nbytes);
        w->stats.read_seconds += fst_os_now() - start;
        if (!check_read(w, job, chunk, run->first_piece, offset, run->nbytes, got)) return 0;
        if (run->kind == FST_RUN_CONVERT && !convert_run_on_host(w, job, run, to)) return 0;
    }
    return 1;
}

/* ---- Slots --------------------------------------------------------------------------------------- */

static unsigned slot_number(const fst_worker *w, const fst_slot *s) { return (unsigned)(s - w->slots); }

static fst_trace_record *trace_record(const fst_slot *s) {
    fst_trace *trace = fst_pipeline_trace;
    size_t at = trace && s->trace ? s->trace - 1 : SIZE_MAX;
    return trace && at < trace->room ? &trace->records[at] : NULL;
}

static void trace_begin(const fst_worker *w, fst_slot *s, uint32_t chunk, uint32_t nbytes, fst_how how) {
    fst_trace *trace = fst_pipeline_trace;
    s->trace = trace ? atomic_fetch_add(&trace->count, 1) + 1 : 0;
    fst_trace_record *record = trace_record(s);
    if (record)
        *record = (fst_trace_record){.worker = (unsigned)(w - w->engine->workers),
                                     .slot = slot_number(w, s),
                                     .chunk = chunk,
                                     .nbytes = nbytes,
                                     .how = how,
                                     .read_begin = fst_os_now()};
}

static void chunk_is_done(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_plan_chunk *chunk = &job->plan->chunks[s->chunk];
    fst_trace_record *record = trace_record(s);
    if (chunk->batch != FST_NO_BATCH && !chunk->companions)
        companions_were_used(w->engine, job, chunk->batch);
    atomic_fetch_add(&w->engine->bytes_done, job->plan->chunks[s->chunk].nbytes);
    if (record) record->done = fst_os_now();
    s->state = FST_SLOT_FREE;
}

/* Waits until the copies out of a slot are done. */
static int drain_slot(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_gpu *gpu = w->engine->gpu;
    if (s->state != FST_SLOT_COPYING) return 1;
    double start = fst_os_now();
    /* What is converted with companions needs them until then. */
    int uses = job->plan->chunks[s->chunk].batch != FST_NO_BATCH, timed = s->started != NULL;
    int code = gpu->calls->event_wait(gpu, uses ? s->converted : s->copied);
    double now = fst_os_now();
    w->stats.wait_seconds += now - start;
    w->stats.slot_seconds += now - s->queued;
    if (code) {
        s->state = FST_SLOT_FREE;
        fail_device(w, job, code, "waiting for a copy");
        return 0;
    }
    float copy = timed ? gpu->calls->event_elapsed(gpu, s->started, s->copied) : -1;
    if (copy >= 0) w->stats.timed++, w->stats.copy_ms += (double)copy;
    s->kernels_untimed = copy >= 0;
    chunk_is_done(w, job, s);
    return 1;
}

/* A chunk's bytes are in its slot: on they go. */
static int send_chunk(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_plan_chunk *chunk = &job->plan->chunks[s->chunk];
    fst_trace_record *record = trace_record(s);
    const char *what = "";
    if (record) record->read_end = fst_os_now();
    s->state = FST_SLOT_FREE;
    if (!prepare_memory(w, job, chunk)) return 0;
    if (w->engine->gpu->host_access) {
        if (!place_chunk_on_host(w, job, chunk, s)) return 0;
        chunk_is_done(w, job, s);
    } else {
        s->state = FST_SLOT_COPYING; /* also when only a part of it gets queued */
        s->queued = fst_os_now();
        if (record) record->queued = s->queued;
        int code = queue_chunk(w, job, chunk, s, &what);
        if (code) {
            fail_device(w, job, code, what);
            return 0;
        }
        if (chunk->companions && !drain_slot(w, job, s)) return 0;
    }
    if (chunk->companions) companions_came(w->engine, job, chunk->batch);
    track_chunk(w, job, s->chunk, slot_number(w, s));
    return 1;
}

/* A ring that broke may write to its slots for ever: what it had is lost, and so is the load. */
static void lose_ring(fst_worker *w, int code) {
    for (unsigned k = 0; k < w->slots_count; k++)
        if (w->slots[k].state == FST_SLOT_READING && !w->slots[k].finished)
            w->slots[k].finished = 1, w->slots[k].got = code;
    w->ring_is_broken = 1;
}

/* Waits until the io_uring has read a slot's chunk, and sends it on. */
static int finish_reading(fst_worker *w, const fst_load_job *job, fst_slot *s) {
    const fst_plan_chunk *chunk = &job->plan->chunks[s->chunk];
    double start = fst_os_now();
    if (s->state != FST_SLOT_READING) return 1;
    while (!s->finished) {
        uint64_t tag = 0;
        ssize_t got = 0;
        fst_how how;
        int code = fst_reader_wait(job->reader, w->ring, &tag, &got, &how);
        if (code < 0) lose_ring(w, code);
        else w->slots[tag].finished = 1, w->slots[tag].got = got;
    }
    w->stats.read_seconds += fst_os_now() - start;
    s->state = FST_SLOT_FREE;
    if (atomic_load(&w->engine->stop)) return 0;
    if (!check_read(w, job, chunk, job->plan->runs[chunk->first_run].first_piece, chunk->offset,
                    chunk->nbytes, s->got))
        return 0;
    return send_chunk(w, job, s);
}

/* Those that come before the `turn`-th in the order of the file, so that nothing that waits for memory holds back a
 * chunk that needs none. */
static int finish_older(fst_worker *w, const fst_load_job *job, unsigned turn) {
    for (unsigned i = 1; i < w->slots_count; i++)
        if (!finish_reading(w, job, &w->slots[(turn + i) % w->slots_count])) return 0;
    return 1;
}

/* How a chunk will be read: 1 + its fst_how once somebody decided, be it for later; DECIDING in between. */
#define DECIDING 255u

static fst_how choose(const fst_load_job *job, size_t index) {
    const fst_plan_chunk *chunk = &job->plan->chunks[index];
    unsigned char decided = atomic_load(&job->hows[index]);
    if (decided && decided != DECIDING) return (fst_how)(decided - 1);
    fst_how how = fst_reader_choose(job->reader, chunk->file, chunk->offset, chunk->nbytes);
    atomic_store(&job->hows[index], (unsigned char)(1 + how));
    return how;
}

static void read_ahead(const fst_load_job *job, size_t index) {
    const fst_plan *plan = job->plan;
    const fst_plan_chunk *from = &plan->chunks[index];
    size_t ahead = index + 1;
    unsigned char undecided = 0;
    while (ahead < plan->chunks_count && plan->chunks[ahead].file == from->file &&
           plan->chunks[ahead].offset - from->offset < AHEAD_BYTES)
        ahead++;
    if (ahead == plan->chunks_count ||
        !atomic_compare_exchange_strong(&job->hows[ahead], &undecided, DECIDING))
        return;
    const fst_plan_chunk *chunk = &plan->chunks[ahead];
    fst_how how = fst_reader_ahead(job->reader, chunk->file, chunk->offset, chunk->nbytes);
    atomic_store(&job->hows[ahead], (unsigned char)(1 + how));
}

/* The ring of a worker, made by the first chunk that wants one. */
static int prepare_ring(fst_worker *w, const fst_load_job *job) {
    struct iovec slots[FST_MAX_SLOTS];
    if (!job->use_ring) return 0;
    if (w->ring_why) fst_reader_note_ring(job->reader, w->ring_why); /* of an earlier load, too */
    if (w->ring || w->ring_is_refused) return !w->ring_is_refused;
    for (unsigned k = 0; k < w->slots_count; k++)
        slots[k] = (struct iovec){w->slots[k].bounce, w->engine->slot_room};
    w->ring_is_refused = fst_ring_new(w->slots_count, slots, w->slots_count, &w->ring, &w->ring_why) != 0;
    if (w->ring_why) fst_reader_note_ring(job->reader, w->ring_why);
    return !w->ring_is_refused;
}

/* Reads a chunk into a free slot, or begins to. */
static int begin_chunk(fst_worker *w, const fst_load_job *job, unsigned turn, size_t index) {
    const fst_plan_chunk *chunk = &job->plan->chunks[index];
    fst_slot *s = &w->slots[turn % w->slots_count];
    fst_how how = choose(job, index);
    uint32_t first = job->plan->runs[chunk->first_run].first_piece;
    s->chunk = (uint32_t)index;
    w->stats.chunks++;
    trace_begin(w, s, s->chunk, chunk->nbytes, how);
    if (how == FST_HOW_BUFFERED) read_ahead(job, index);
    if (how != FST_HOW_CACHED && prepare_ring(w, job) &&
        fst_reader_submit(job->reader, w->ring, slot_number(w, s), how, chunk->file, s->bounce, chunk->offset,
                          chunk->nbytes) == 0) {
        s->finished = 0;
        s->state = FST_SLOT_READING;
        return 1;
    }
    if (!finish_older(w, job, turn)) return 0;
    if (w->engine->gpu->host_access && how != FST_HOW_DIRECT) {
        if (!prepare_memory(w, job, chunk) || !load_chunk_on_host(w, job, chunk, s, how)) return 0;
        chunk_is_done(w, job, s);
        if (chunk->companions) companions_came(w->engine, job, chunk->batch);
        track_chunk(w, job, s->chunk, slot_number(w, s));
        return 1;
    }
    double start = fst_os_now();
    ssize_t got = fst_reader_read(job->reader, &how, chunk->file, s->bounce, chunk->offset, chunk->nbytes);
    w->stats.read_seconds += fst_os_now() - start;
    return check_read(w, job, chunk, first, chunk->offset, chunk->nbytes, got) && send_chunk(w, job, s);
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

/* Also after a failure: nothing may be under way when the blocks are freed. */
static void settle(fst_worker *w, const fst_load_job *job, unsigned turn) {
    const fst_gpu *gpu = w->engine->gpu;
    for (unsigned i = 0; i < w->slots_count; i++)
        finish_reading(w, job, &w->slots[(turn + i) % w->slots_count]);
    for (unsigned i = 0; i < w->slots_count; i++) drain_slot(w, job, &w->slots[(turn + i) % w->slots_count]);
    if (gpu->host_access) return;
    double start = fst_os_now();
    int code = gpu->calls->stream_wait(gpu, w->stream);
    w->stats.wait_seconds += fst_os_now() - start;
    for (unsigned i = 0; i < w->slots_count && !code; i++) code = time_kernels(w, &w->slots[i]);
    if (code) fail_device(w, job, code, "waiting for the device");
}

void fst_engine_work(fst_worker *w, const fst_load_job *job) {
    fst_engine *engine = w->engine;
    size_t number = (size_t)(w - engine->workers);
    unsigned turn = 0;
    memset(&w->stats, 0, sizeof w->stats);
    if (w->setup_what) {
        fail_device(w, job, w->setup_code, w->setup_what);
        return;
    }
    for (unsigned k = 0; k < w->slots_count; k++) {
        fst_slot *s = &w->slots[k];
        s->kernels_untimed = 0; /* of a job that failed */
        if (engine->staging)
            s->staging =
                (unsigned char *)engine->staging + engine->slot_room * (number * engine->slots_each + k);
    }
    for (;; turn++) {
        fst_slot *s = &w->slots[turn % w->slots_count];
        if (is_cancelled(job)) cancel(engine, job);
        if (atomic_load(&engine->stop) || !finish_reading(w, job, s) || !drain_slot(w, job, s)) break;
        size_t i = atomic_fetch_add(&engine->next_chunk, 1);
        if (i >= job->plan->chunks_count || !begin_chunk(w, job, turn, i)) break;
    }
    settle(w, job, turn);
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
    uint64_t size = (uint64_t)engine->slot_room * engine->slots_each * engine->threads_count;
    int code = gpu->calls->alloc_block(gpu, size, &engine->staging);
    if (code) {
        engine->staging = NULL;
        return fst_gpu_fail(error, gpu, code, "allocating the staging ring");
    }
    pthread_mutex_lock(&engine->lock);
    engine->facts.staging_bytes = size;
    pthread_mutex_unlock(&engine->lock);
    return FST_OK;
}

static void add_seconds(struct timespec *time, double seconds) {
    time->tv_nsec += (long)(seconds * 1e9);
    if (time->tv_nsec >= 1000000000) time->tv_sec++, time->tv_nsec -= 1000000000;
}

/* Waits on `done`, but not for long. The lock is held. */
static void wait_a_bit(fst_engine *engine, double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    add_seconds(&until, seconds);
    pthread_cond_timedwait(&engine->done, &engine->lock, &until);
}

static void report_progress(fst_engine *engine, const fst_load_job *job) {
    double seconds = fst_os_now() - job->started;
    uint64_t done = atomic_load(&engine->bytes_done);
    fst_progress progress = {done, job->bytes_total, seconds, seconds > 0 ? (double)done / seconds : 0};
    engine->reported = fst_os_now();
    if (job->progress(job->progress_arg, &progress)) cancel(engine, job);
}

/* Reports progress and looks for a cancel, until all workers are idle. */
static void attend(fst_engine *engine, const fst_load_job *job) {
    int finished = 0;
    while (!finished) {
        pthread_mutex_lock(&engine->lock);
        if (engine->running) wait_a_bit(engine, job->cancel ? CANCEL_SECONDS : PROGRESS_SECONDS);
        finished = engine->running == 0;
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
        out->read_seconds += s->read_seconds;
        out->wait_seconds += s->wait_seconds;
        out->kernel_seconds += s->kernel_seconds;
        out->held_seconds += s->held_seconds;
        out->slot_seconds += s->slot_seconds;
        out->copy_ms += s->copy_ms;
        out->launch_ms += s->launch_ms;
        out->timed += s->timed;
    }
}

fst_status fst_pipeline_begin(fst_engine *engine, const fst_load_job *job, fst_error *error) {
    fst_status status = make_staging(engine, job->plan, error);
    if (status) return status;
    atomic_store(&engine->next_chunk, 0);
    atomic_store(&engine->stop, 0);
    atomic_store(&engine->bytes_done, 0);
    engine->reported = 0;
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
    for (unsigned i = 0; i < engine->threads_count; i++) {
        const fst_worker *w = &engine->workers[i];
        uint32_t needs = atomic_load(&w->needs);
        /* Companions that do not come lie in a slot of a worker that waits for a block. */
        held_up += (needs && !atomic_load(&job->blocks[needs - 1])) ||
                   (w->needs_batch && lacks_companions(job, w->needs_batch - 1));
    }
    return held_up == engine->running && fst_budget_is_waited_for(job->budget);
}

static int is_complete(const fst_load_job *job, uint32_t tensor) {
    return atomic_load(&job->tracking->left[tensor]) == 0;
}

/* What was queued for a tensor is waited for, here or on the caller's stream. */
static int await_tensor(fst_engine *engine, const fst_load_job *job, uint32_t index, fst_queue stream) {
    const fst_plan_tensor *tensor = &job->plan->tensors[index];
    const fst_gpu *gpu = engine->gpu;
    int code = 0;
    if (gpu->host_access) return 0;
    for (uint32_t i = 0; i < tensor->chunks && !code; i++) {
        unsigned number = atomic_load(&job->tracking->slots[tensor->first_chunk + i]) - 1;
        fst_slot *s = &engine->workers[number / FST_MAX_SLOTS].slots[number % FST_MAX_SLOTS];
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
        wait_a_bit(engine, NEXT_SECONDS);
    }
    if (!status && any) *which = tracking->ready[seen];
    pthread_mutex_unlock(&engine->lock);
    if (status) return status;
    int code = await_tensor(engine, job, *which, stream);
    return code ? fst_gpu_fail(error, engine->gpu, code, "waiting for a tensor") : FST_OK;
}
