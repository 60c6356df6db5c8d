/* Launches, and their time. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "convert.h"
#include "fst.h"
#include "os.h"

enum { WARM_UP = 3, MAX_LAUNCHES = 64 };
static const double least_ms = 0.1; /* between two events: shorter work is launched several times */

static unsigned bits_of(int dtype) { return fst_dtype_bits((fst_dtype)dtype); }

/* The begin of part `part`, in whole units but for the last end. */
static uint64_t cut(uint64_t total, unsigned part, unsigned parts, uint64_t unit) {
    if (part == parts) return total;
    return total / unit * part / parts * unit;
}

typedef struct part_of {
    const convert_case *c;
    const convert_set *set;
    unsigned part, parts;
} part_of;

static uint64_t from(const part_of *p, uint64_t total, uint64_t unit) {
    return cut(total, p->part, p->parts, unit);
}
static uint64_t to(const part_of *p, uint64_t total, uint64_t unit) {
    return cut(total, p->part + 1, p->parts, unit);
}
static const unsigned char *src_at(const part_of *p, uint64_t i) {
    return p->set->src + i * bits_of(p->c->spec.src) / 8;
}
static unsigned char *dst_at(const part_of *p, uint64_t i) {
    return p->set->dst + i * bits_of(p->c->spec.dst) / 8;
}

static int launch_cast(const fst_kernels *k, fst_queue stream, const part_of *p) {
    const convert_spec *s = &p->c->spec;
    const uint64_t begin = from(p, p->c->cols, 64), count = to(p, p->c->cols, 64) - begin;
    const fst_cast_args cast = {src_at(p, begin), dst_at(p, begin), count, s->src, s->dst, s->flags};
    const fst_fnuz_args fnuz = {src_at(p, begin), dst_at(p, begin), count, s->src, p->set->nans};
    return s->keep_bits ? k->fnuz(stream, &fnuz) : k->cast(stream, &cast);
}

static int kind_of(convert_kernel kernel) {
    switch (kernel) {
    case CONVERT_SCALE_TENSOR: return FST_SCALE_TENSOR;
    case CONVERT_SCALE_BLOCK:
    case CONVERT_FP8_COLUMN:
    case CONVERT_FP8_BLOCK: return FST_SCALE_BLOCK;
    case CONVERT_SCALE_GROUP:
    case CONVERT_MXFP4:
    case CONVERT_NVFP4: return FST_SCALE_GROUP;
    default: return FST_SCALE_ROW;
    }
}

static int launch_scaled(const fst_kernels *k, fst_queue stream, const part_of *p) {
    const convert_case *c = p->c;
    const uint64_t begin = from(p, c->rows * c->cols, 64);
    fst_scaled_args args = {.src = src_at(p, begin),
                            .dst = dst_at(p, begin),
                            .scales = p->set->scales,
                            .scales_count = c->scales,
                            .rows = c->rows,
                            .cols = c->cols,
                            .first = begin,
                            .count = to(p, c->rows * c->cols, 64) - begin,
                            .src_dtype = c->spec.src,
                            .dst_dtype = c->spec.dst,
                            .scale_dtype = c->spec.scale,
                            .kind = kind_of(c->spec.kernel),
                            .block_rows = CONVERT_BLOCK,
                            .block_cols = c->spec.group ? c->spec.group : CONVERT_BLOCK,
                            .flags = c->spec.flags};
    if (c->spec.kernel == CONVERT_FP8_COLUMN) args.block_rows = c->rows, args.block_cols = 1;
    if (c->spec.kernel == CONVERT_NVFP4) args.global_scale = p->set->nans;
    return k->scaled(stream, &args);
}

/* What is besides the scales: see convert_companions. */
static int launch_integers(const fst_kernels *k, fst_queue stream, const part_of *p) {
    const convert_case *c = p->c;
    const uint64_t all = c->rows * c->cols, begin = from(p, all, 64), count = to(p, all, 64) - begin;
    fst_bnb4_args bnb4 = {.src = src_at(p, begin),
                          .dst = dst_at(p, begin),
                          .map = p->set->nans,
                          .absmax = p->set->scales,
                          .dst_dtype = c->spec.dst,
                          .elements = all,
                          .first = begin,
                          .count = count,
                          .block = c->spec.group};
    fst_scaled_args scaled = {.src = src_at(p, begin),
                              .dst = dst_at(p, begin),
                              .scales = p->set->scales,
                              .scales_count = c->scales,
                              .rows = c->rows,
                              .cols = c->cols,
                              .first = begin,
                              .count = count,
                              .src_dtype = c->spec.src,
                              .dst_dtype = c->spec.dst,
                              .scale_dtype = c->spec.scale,
                              .kind = FST_SCALE_ROW};
    if (c->spec.nested) {
        bnb4.nested = p->set->scales + c->second_at;
        bnb4.nested_map = p->set->scales + c->third_at;
        bnb4.nested_block = CONVERT_NESTED;
        bnb4.offset = convert_offset;
    }
    if (c->spec.kernel == CONVERT_BNB_NF4) return k->bnb4(stream, &bnb4);
    if (c->spec.kernel == CONVERT_BNB_INT8) scaled.flags = FST_K_OVER_127;
    else scaled.zeros = p->set->scales + c->second_at;
    return k->scaled(stream, &scaled);
}

static int launch_packed(const fst_kernels *k, fst_queue stream, const part_of *p) {
    static const struct {
        int layout, zeros;
        unsigned flags;
    } formats[] = {{FST_PACKED_COLUMN, FST_ZEROS_ROWS, FST_K_ZERO_PLUS_ONE},
                   {FST_PACKED_TRANSPOSED, FST_ZEROS_ROWS, FST_K_AWQ_ORDER},
                   {FST_PACKED_ROW, FST_ZEROS_COLUMNS, FST_K_OFFSET},
                   {FST_PACKED_PAIRS, FST_ZEROS_NONE, FST_K_SIGNED},
                   {FST_PACKED_TRANSPOSED, FST_ZEROS_ROWS, FST_K_AWQ_ORDER}};
    const convert_case *c = p->c;
    const unsigned i = (unsigned)(c->spec.kernel - CONVERT_GPTQ);
    const uint64_t unit = convert_packed_unit(c), word = bits_of(c->spec.src) / 8;
    const uint64_t begin = from(p, c->src_size, unit), end = to(p, c->src_size, unit);
    fst_packed_args args = {.src = p->set->src + begin,
                            .dst = p->set->dst,
                            .scales = p->set->scales,
                            .rows = c->rows,
                            .cols = c->cols,
                            .first = begin / word,
                            .count = (end - begin) / word,
                            .group = c->spec.group,
                            .groups_count = c->cols / c->spec.group,
                            .bits = c->spec.bits,
                            .dst_dtype = c->spec.dst,
                            .scale_dtype = c->spec.scale,
                            .layout = formats[i].layout,
                            .flags = formats[i].flags};
    if (c->spec.zeros) {
        args.zeros = p->set->scales + c->second_at;
        args.zeros_kind = formats[i].zeros;
    } else if (c->spec.kernel == CONVERT_INT4_QUARK) args.flags |= FST_K_SIGNED;
    if (c->spec.act_order) args.groups = (const int32_t *)(const void *)(p->set->scales + c->third_at);
    if (c->spec.padded) args.flags |= FST_K_PADDED;
    return k->packed(stream, &args);
}

/* One scale for all cannot be cut: the first part does it alone. */
static int launch_quantize(const fst_kernels *k, fst_queue stream, const part_of *p) {
    const convert_case *c = p->c;
    const uint64_t unit = c->spec.kernel == CONVERT_QUANTIZE_BLOCK ? CONVERT_BLOCK : 1;
    const int whole = c->spec.kernel == CONVERT_QUANTIZE_TENSOR;
    const uint64_t begin = whole ? 0 : from(p, c->rows, unit), end = whole ? c->rows : to(p, c->rows, unit);
    const uint64_t across = (c->cols + CONVERT_BLOCK - 1) / CONVERT_BLOCK;
    fst_quantize_args args = {.src = src_at(p, begin * c->cols),
                              .dst = dst_at(p, begin * c->cols),
                              .scales = (float *)(void *)p->set->scales,
                              .nans = p->set->nans,
                              .rows = end - begin,
                              .cols = c->cols,
                              .src_dtype = c->spec.src,
                              .dst_dtype = c->spec.dst};
    args.kind = whole ? FST_SCALE_TENSOR : unit == 1 ? FST_SCALE_ROW : FST_SCALE_BLOCK;
    args.scales += unit == 1 ? begin : begin / CONVERT_BLOCK * across;
    if ((whole && p->part) || begin == end) return 0;
    return k->quantize(stream, &args);
}

static int launch_rows(const fst_kernels *k, fst_queue stream, const part_of *p) {
    const convert_case *c = p->c;
    const int apart = c->spec.kernel == CONVERT_DEINTERLEAVE;
    const uint64_t rows = apart ? c->rows / 2 : c->rows;
    const uint64_t begin = from(p, rows, 1), count = to(p, rows, 1) - begin;
    fst_rows_args args = {.cols = c->cols,
                          .ndim = 1,
                          .extent = {count},
                          .src_stride = {c->src_stride},
                          .dst_stride = {c->dst_stride},
                          .src_dtype = c->spec.src,
                          .dst_dtype = c->spec.dst};
    if (apart) {
        args.ndim = 2;
        args.extent[0] = 2, args.extent[1] = count;
        args.src_stride[0] = c->cols, args.src_stride[1] = 2 * c->cols;
        args.dst_stride[0] = rows * c->cols, args.dst_stride[1] = c->cols;
    }
    args.src = src_at(p, begin * (apart ? 2 * c->cols : c->src_stride));
    args.dst = dst_at(p, begin * c->dst_stride);
    return k->rows(stream, &args);
}

/* Cut along the columns of the source, which are the rows of the result. */
static int launch_transpose(const fst_kernels *k, fst_queue stream, const part_of *p) {
    const convert_case *c = p->c;
    const uint64_t begin = from(p, c->rows, 64), count = to(p, c->rows, 64) - begin;
    fst_transpose_args args = {.src = src_at(p, begin),
                               .dst = dst_at(p, begin * c->dst_stride),
                               .batch = 1,
                               .rows = c->cols,
                               .cols = count,
                               .src_stride = c->src_stride,
                               .dst_stride = c->dst_stride,
                               .src_dtype = c->spec.src,
                               .dst_dtype = c->spec.dst};
    args.src_batch_stride = c->cols * c->src_stride;
    args.dst_batch_stride = c->rows * c->dst_stride;
    return k->transpose(stream, &args);
}

static uint64_t tiles_of(const convert_case *c) { return (c->cols + FST_BATCH_TILE - 1) / FST_BATCH_TILE; }

void convert_jobs(const convert_case *c, const convert_set *set, unsigned parts, fst_batch_job *jobs) {
    for (unsigned part = 0; part < parts; part++) {
        const part_of p = {c, set, part, parts};
        const uint64_t begin = from(&p, c->jobs, 1), end = to(&p, c->jobs, 1);
        for (uint64_t i = begin; i < end; i++)
            jobs[i] = (fst_batch_job){(uint64_t)(uintptr_t)src_at(&p, i * c->cols),
                                      (uint64_t)(uintptr_t)dst_at(&p, i * c->cols), c->cols,
                                      (i - begin) * tiles_of(c)};
    }
}

static int launch_batch(const fst_kernels *k, fst_queue stream, const part_of *p) {
    const convert_case *c = p->c;
    const uint64_t begin = from(p, c->jobs, 1), count = to(p, c->jobs, 1) - begin;
    const fst_batch_args args = {.jobs = p->set->jobs + begin,
                                 .jobs_count = (uint32_t)count,
                                 .tiles = count * tiles_of(c),
                                 .src_dtype = c->spec.src,
                                 .dst_dtype = c->spec.dst,
                                 .flags = c->spec.flags};
    return k->batch(stream, &args);
}

int convert_launch(const fst_gpu *gpu, fst_queue stream, const convert_case *c, const convert_set *set,
                   unsigned part, unsigned parts) {
    const part_of p = {c, set, part, parts};
    switch (c->spec.kernel) {
    case CONVERT_CAST:
    case CONVERT_REALIGN: return launch_cast(gpu->kernels, stream, &p);
    case CONVERT_SCALE_TENSOR:
    case CONVERT_SCALE_ROW:
    case CONVERT_SCALE_GROUP:
    case CONVERT_FP8_BLOCK:
    case CONVERT_FP8_COLUMN:
    case CONVERT_MXFP4:
    case CONVERT_NVFP4:
    case CONVERT_SCALE_BLOCK: return launch_scaled(gpu->kernels, stream, &p);
    case CONVERT_BNB_NF4:
    case CONVERT_BNB_INT8:
    case CONVERT_INT8_ZEROS: return launch_integers(gpu->kernels, stream, &p);
    case CONVERT_GPTQ:
    case CONVERT_AWQ:
    case CONVERT_PACKED:
    case CONVERT_INT4_ROWS:
    case CONVERT_INT4_QUARK: return launch_packed(gpu->kernels, stream, &p);
    case CONVERT_QUANTIZE_TENSOR:
    case CONVERT_QUANTIZE_ROW:
    case CONVERT_QUANTIZE_BLOCK: return launch_quantize(gpu->kernels, stream, &p);
    case CONVERT_SLICE:
    case CONVERT_PACK:
    case CONVERT_DEINTERLEAVE: return launch_rows(gpu->kernels, stream, &p);
    case CONVERT_TRANSPOSE: return launch_transpose(gpu->kernels, stream, &p);
    case CONVERT_BATCH: return launch_batch(gpu->kernels, stream, &p);
    case CONVERT_KERNELS: break;
    }
    return FST_K_NO_KERNEL;
}

/* A copy that reads half of the kernel's traffic and writes the other half. */
static int launch_copy(const fst_gpu *gpu, fst_queue stream, const convert_case *c, const convert_set *set,
                       unsigned part, unsigned parts) {
    const uint64_t size = (c->bytes_read + c->bytes_written) / 2;
    const uint64_t begin = cut(size, part, parts, 4096), end = cut(size, part + 1, parts, 4096);
    return gpu->calls->copy_on_device(gpu, stream, set->dst + begin, set->src - c->spec.misaligned + begin,
                                      (size_t)(end - begin));
}

typedef int launcher(const fst_gpu *, fst_queue, const convert_case *, const convert_set *, unsigned part,
                     unsigned parts);

/* ---- On the CPU: one part a thread, wall clock ---- */

typedef struct crew {
    const convert_timer *t;
    const convert_case *c;
    const convert_set *set;
    launcher *what; /* NULL: go home */
    pthread_barrier_t barrier;
    int codes[CONVERT_MAX_PARTS];
} crew;

typedef struct worker {
    pthread_t thread;
    crew *crew;
    unsigned part;
} worker;

static void work(crew *w, unsigned part) {
    w->codes[part] = w->what(w->t->gpu, w->t->stream, w->c, w->set, part, w->t->threads);
}

static void *run_worker(void *arg) {
    worker *me = arg;
    for (;;) {
        pthread_barrier_wait(&me->crew->barrier);
        if (!me->crew->what) return NULL;
        work(me->crew, me->part);
        pthread_barrier_wait(&me->crew->barrier);
    }
}

static void begin_crew(crew *w, worker *workers) {
    if (pthread_barrier_init(&w->barrier, NULL, w->t->threads)) bench_die("no barrier");
    for (unsigned i = 1; i < w->t->threads; i++) {
        workers[i] = (worker){.crew = w, .part = i};
        if (pthread_create(&workers[i].thread, NULL, run_worker, &workers[i])) bench_die("no thread");
    }
}

static void end_crew(crew *w, worker *workers) {
    w->what = NULL;
    pthread_barrier_wait(&w->barrier);
    for (unsigned i = 1; i < w->t->threads; i++) pthread_join(workers[i].thread, NULL);
    pthread_barrier_destroy(&w->barrier);
}

/* Milliseconds. The barriers are inside: about 10 us. */
static double run_crew(crew *w, launcher *what, const convert_set *set, int *code) {
    w->what = what;
    w->set = set;
    const double start = fst_os_now();
    if (w->t->threads > 1) pthread_barrier_wait(&w->barrier);
    work(w, 0);
    if (w->t->threads > 1) pthread_barrier_wait(&w->barrier);
    const double ms = (fst_os_now() - start) * 1e3;
    for (unsigned i = 0; i < w->t->threads && *code == 0; i++) *code = w->codes[i];
    return ms;
}

static int time_on_cpu(const convert_timer *t, const convert_case *c, const convert_set *sets, unsigned count,
                       double *ms, double *copy_ms) {
    crew w = {.t = t, .c = c};
    worker workers[CONVERT_MAX_PARTS];
    int code = 0;
    begin_crew(&w, workers);
    for (unsigned run = 0; run < t->runs + 1 && code == 0; run++) { /* the first one warms up */
        const unsigned at = run ? run - 1 : 0;
        copy_ms[at] = run_crew(&w, launch_copy, &sets[run % count], &code);
        ms[at] = run_crew(&w, convert_launch, &sets[run % count], &code);
    }
    end_crew(&w, workers);
    return code;
}

/* ---- On a GPU: everything is queued, with events between; the host waits at the end ---- */

static int queue(const convert_timer *t, const convert_case *c, const convert_set *sets, unsigned count,
                 launcher *what, unsigned launches, unsigned *turn) {
    int code = 0;
    for (unsigned i = 0; i < launches && code == 0; i++)
        code = what(t->gpu, t->stream, c, &sets[(*turn)++ % count], 0, 1);
    return code;
}

static int time_turns(const convert_timer *t, const convert_case *c, const convert_set *sets, unsigned count,
                      unsigned runs, unsigned launches, fst_event *events, double *ms, double *copy_ms) {
    const fst_gpu_calls *calls = t->gpu->calls;
    unsigned copied = 0, converted = 0;
    int code = queue(t, c, sets, count, launch_copy, 1, &copied); /* so that the queue never runs dry */
    if (!code) code = calls->event_record(t->gpu, events[0], t->stream);
    for (unsigned run = 0; run < runs && !code; run++) {
        code = queue(t, c, sets, count, launch_copy, launches, &copied);
        if (!code) code = calls->event_record(t->gpu, events[2 * run + 1], t->stream);
        if (!code) code = queue(t, c, sets, count, convert_launch, launches, &converted);
        if (!code) code = calls->event_record(t->gpu, events[2 * run + 2], t->stream);
    }
    if (!code) code = calls->stream_wait(t->gpu, t->stream);
    for (unsigned run = 0; run < runs && !code; run++) {
        copy_ms[run] = (double)calls->event_elapsed(t->gpu, events[2 * run], events[2 * run + 1]) / launches;
        ms[run] = (double)calls->event_elapsed(t->gpu, events[2 * run + 1], events[2 * run + 2]) / launches;
        if (copy_ms[run] <= 0 || ms[run] <= 0) bench_die("%s does not tell times", t->gpu->label);
    }
    return code;
}

static int time_on_gpu(const convert_timer *t, const convert_case *c, const convert_set *sets, unsigned count,
                       double *ms, double *copy_ms, unsigned *launches) {
    const unsigned most = t->runs > WARM_UP ? t->runs : WARM_UP;
    fst_event *events = calloc(2 * most + 1, sizeof *events);
    if (!events) bench_die("out of memory");
    for (unsigned i = 0; i < 2 * most + 1; i++)
        if (t->gpu->calls->event_new(t->gpu, 1, &events[i])) bench_die("no event");
    int code = time_turns(t, c, sets, count, WARM_UP, 1, events, ms, copy_ms);
    if (!code) {
        const double one = copy_ms[WARM_UP - 1];
        *launches = one >= least_ms ? 1 : (unsigned)(least_ms / one) + 1;
        if (*launches > MAX_LAUNCHES) *launches = MAX_LAUNCHES;
        code = time_turns(t, c, sets, count, t->runs, *launches, events, ms, copy_ms);
    }
    for (unsigned i = 0; i < 2 * most + 1; i++) t->gpu->calls->event_free(t->gpu, events[i]);
    free(events);
    return code;
}

int convert_time(const convert_timer *t, const convert_case *c, const convert_set *sets, unsigned count,
                 convert_result *result) {
    const unsigned room = t->runs > WARM_UP ? t->runs : WARM_UP;
    double *ms = calloc(room, sizeof *ms), *copy_ms = calloc(room, sizeof *copy_ms);
    if (!ms || !copy_ms) bench_die("out of memory");
    result->launches = 1;
    const int code = t->gpu->host_access ? time_on_cpu(t, c, sets, count, ms, copy_ms)
                                         : time_on_gpu(t, c, sets, count, ms, copy_ms, &result->launches);
    if (code == 0) {
        result->ms = bench_median(ms, t->runs);
        result->copy_ms = bench_median(copy_ms, t->runs);
    }
    free(ms);
    free(copy_ms);
    return code;
}

int convert_once(const convert_timer *t, const convert_case *c, const convert_set *set) {
    int code = 0;
    for (unsigned part = 0; part < t->threads && code == 0; part++)
        code = convert_launch(t->gpu, t->stream, c, set, part, t->threads);
    const int waited = t->gpu->calls->stream_wait(t->gpu, t->stream);
    return code ? code : waited;
}
