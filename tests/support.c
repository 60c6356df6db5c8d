#include "support.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"
#include "status.h"

/* ---- Files ---- */

void support_write(const char *path, const void *data, size_t size) {
    FILE *file = fopen(path, "wb");
    int good = file && fwrite(data, 1, size, file) == size;
    if (!file || fclose(file) || !good) test_fail(__FILE__, __LINE__, "cannot write %s", path);
}

size_t support_checkpoint(const char *path, const char *metadata, const support_tensor *tensors, size_t count,
                          size_t padding) {
    size_t room = 256 + padding + (metadata ? strlen(metadata) : 0), at = 8, offset = 0;
    for (size_t i = 0; i < count; i++) room += strlen(tensors[i].name) + strlen(tensors[i].shape) + 128;
    size_t total = room;
    for (size_t i = 0; i < count; i++) total += tensors[i].nbytes;
    char *bytes = malloc(total);
    if (!bytes) test_fail(__FILE__, __LINE__, "out of memory");
    at += (size_t)sprintf(bytes + at, "{");
    if (metadata) at += (size_t)sprintf(bytes + at, "\"__metadata__\":%s%s", metadata, count ? "," : "");
    for (size_t i = 0; i < count; i++) {
        at += (size_t)sprintf(
            bytes + at, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", i ? "," : "",
            tensors[i].name, tensors[i].dtype, tensors[i].shape, offset, offset + tensors[i].nbytes);
        offset += tensors[i].nbytes;
    }
    at += (size_t)sprintf(bytes + at, "}");
    memset(bytes + at, ' ', padding);
    at += padding;
    for (int i = 0; i < 8; i++) bytes[i] = (char)((at - 8) >> (8 * i));
    size_t start = at;
    for (size_t i = 0; i < count; i++) {
        if (tensors[i].nbytes) memcpy(bytes + at, tensors[i].data, tensors[i].nbytes);
        at += tensors[i].nbytes;
    }
    support_write(path, bytes, at);
    free(bytes);
    return start;
}

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

void support_random(void *data, size_t count, uint64_t seed) {
    unsigned char *bytes = data;
    for (size_t i = 0; i < count; i++) bytes[i] = (unsigned char)next_random(&seed);
}

const char *const support_libraries[SUPPORT_LIBRARIES] = {
    "bnb-fp4",
    "bnb-fp4-nested",
    "bnb-int8",
    "bnb-nf4",
    "bnb-nf4-bf16",
    "bnb-nf4-nested",
    "ct-fp8-block",
    "ct-fp8-channel",
    "ct-fp8-tensor",
    "ct-int8-channel",
    "ct-int8-zeros",
    "ct-mxfp4",
    "ct-mxfp8",
    "ct-nvfp4",
    "gptqmodel-fp8-block",
    "gptqmodel-fp8-row",
    "gptqmodel-fp8-tensor",
    "hf-fp4-experts",
    "hf-fp8-block",
    "hf-fp8-e8m0",
    "hf-mxfp4",
    "modelopt-mxfp8",
    "modelopt-nvfp4",
    "quark-mxfp4",
    "awq",
    "ct-packed-3",
    "ct-packed-4",
    "ct-packed-4-zeros",
    "ct-packed-8",
    "gptq-2",
    "gptq-3",
    "gptq-4",
    "gptq-4-order",
    "gptq-8",
    "quark-int4",
};

/* ---- Loads ---- */

const char *const *support_list(const char *path) {
    static const char *files[2];
    files[0] = path;
    return files;
}

fst_options support_options(int device) {
    fst_options options = FST_OPTIONS_INIT;
    options.device = device;
    options.threads = 3;
    options.slot_bytes = 64 << 10;
    return options;
}

/* ---- What is held ---- */

static unsigned count_entries(const char *path) {
    DIR *directory = opendir(path);
    unsigned count = 0;
    if (!directory) test_fail(__FILE__, __LINE__, "cannot list %s", path);
    for (struct dirent *entry; (entry = readdir(directory));) count += entry->d_name[0] != '.';
    closedir(directory);
    return count;
}

unsigned support_open_descriptors(void) { return count_entries("/proc/self/fd"); }

static void *nothing(void *arg) { return arg; }

/* ThreadSanitizer starts a thread of its own with the first of a program: that one is not to be counted later. */
unsigned support_threads(void) {
    pthread_t thread;
    unsigned before;
    if (pthread_create(&thread, NULL, nothing, NULL)) test_fail(__FILE__, __LINE__, "no thread");
    pthread_join(thread, NULL);
    do { /* a joined thread may be listed for a moment still */
        before = count_entries("/proc/self/task");
        usleep(2000);
    } while (count_entries("/proc/self/task") != before);
    return before;
}

/* ---- A device that runs late ---- */

typedef enum op_kind {
    OP_COPY,
    OP_CAST,
    OP_BATCH,
    OP_SCALED,
    OP_QUANTIZE,
    OP_ROWS,
    OP_TRANSPOSE,
    OP_FNUZ,
    OP_BNB4,
    OP_PACKED,
    OP_BOX_SCALED,
    OP_BOX_BNB4,
    OP_BOX_PACKED,
    OP_BOX_CAST,
    OP_EVENT,
    OP_FOLLOW
} op_kind;

typedef struct op {
    op_kind kind;
    struct op *next;
    void *dst;
    const void *src;
    size_t size;
    fst_cast_args cast;
    fst_batch_args batch;
    fst_scaled_args scaled;
    fst_quantize_args quantize;
    fst_rows_args rows;
    fst_transpose_args transpose;
    fst_fnuz_args fnuz;
    fst_bnb4_args bnb4;
    fst_packed_args packed;
    fst_box box;
    struct event *event;
    struct stream *of; /* FOLLOW: what of it must have run */
    long at;
} op;

typedef struct stream {
    struct stream *next;
    op *first, **last;
    long queued, run; /* operations so far */
} stream;

typedef struct event {
    stream *stream;
    long at; /* how many operations of the stream must have run */
} event;

static struct {
    fake_gpu_options options;
    pthread_mutex_t lock;
    uint64_t random;
    int calls, blocks, streams, events, pins;
    uint64_t used, peak, kept;
    int holders;
    stream *list;
} fake = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* 1 when this call is the one that has to fail. The lock is held. */
static int must_fail(void) { return ++fake.calls == fake.options.fail_at; }

static void run_one(stream *s) {
    op *o = s->first;
    if (!o) return;
    s->first = o->next;
    if (!s->first) s->last = &s->first;
    s->run++;
    if (o->kind == OP_COPY) memcpy(o->dst, o->src, o->size);
    if (o->kind == OP_CAST) fst_kernels_cpu()->cast(NULL, &o->cast);
    if (o->kind == OP_BATCH) fst_kernels_cpu()->batch(NULL, &o->batch);
    if (o->kind == OP_SCALED) fst_kernels_cpu()->scaled(NULL, &o->scaled);
    if (o->kind == OP_QUANTIZE) fst_kernels_cpu()->quantize(NULL, &o->quantize);
    if (o->kind == OP_ROWS && fst_kernels_cpu()->rows(NULL, &o->rows)) test_note(__FILE__, __LINE__, "rows");
    if (o->kind == OP_TRANSPOSE && fst_kernels_cpu()->transpose(NULL, &o->transpose))
        test_note(__FILE__, __LINE__, "transpose");
    if (o->kind == OP_FNUZ) fst_kernels_cpu()->fnuz(NULL, &o->fnuz);
    if (o->kind == OP_BNB4) fst_kernels_cpu()->bnb4(NULL, &o->bnb4);
    if (o->kind == OP_PACKED) fst_kernels_cpu()->packed(NULL, &o->packed);
    if (o->kind == OP_BOX_SCALED && fst_kernels_cpu()->box_scaled(NULL, &o->scaled, &o->box))
        test_note(__FILE__, __LINE__, "box_scaled");
    if (o->kind == OP_BOX_BNB4 && fst_kernels_cpu()->box_bnb4(NULL, &o->bnb4, &o->box))
        test_note(__FILE__, __LINE__, "box_bnb4");
    if (o->kind == OP_BOX_PACKED && fst_kernels_cpu()->box_packed(NULL, &o->packed, &o->box))
        test_note(__FILE__, __LINE__, "box_packed");
    if (o->kind == OP_BOX_CAST && fst_kernels_cpu()->box_cast(NULL, &o->cast, &o->box))
        test_note(__FILE__, __LINE__, "box_cast");
    if (o->kind == OP_FOLLOW)
        while (o->of && o->of->run < o->at) run_one(o->of);
    free(o);
}

/* Some of the work of some streams happens at any time. */
static void run_some(void) {
    for (stream *s = fake.list; s; s = s->next)
        for (uint64_t n = next_random(&fake.random) % 4; n > 0 && next_random(&fake.random) % 3 == 0; n--)
            run_one(s);
}

static int enqueue(fst_queue to, const op *what) {
    stream *s = to;
    pthread_mutex_lock(&fake.lock);
    int fails = must_fail();
    op *o = fails ? NULL : malloc(sizeof *o);
    if (o) {
        *o = *what;
        o->next = NULL;
        *s->last = o;
        s->last = &o->next;
        s->queued++;
        if (o->kind == OP_EVENT) o->event->stream = s, o->event->at = s->queued;
        if (o->kind == OP_FOLLOW) o->of = o->event->stream, o->at = o->event->at;
        run_some();
    }
    pthread_mutex_unlock(&fake.lock);
    return o ? 0 : 719;
}

static int fake_enter(const fst_gpu *gpu, int *saved) {
    (void)gpu;
    *saved = 0;
    pthread_mutex_lock(&fake.lock);
    int fails = must_fail();
    pthread_mutex_unlock(&fake.lock);
    return fails ? 719 : 0;
}
static void fake_leave(const fst_gpu *gpu, int saved) { (void)gpu, (void)saved; }
static const char *fake_describe(int code) { return code == 719 ? "made to fail" : "error"; }

static int fake_memory(const fst_gpu *gpu, uint64_t *unused, uint64_t *total) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    *total = fake.options.memory ? fake.options.memory : (uint64_t)1 << 40;
    *unused = *total - fake.used - fake.kept;
    pthread_mutex_unlock(&fake.lock);
    return 0;
}

#define POISONED ((size_t)16 << 20) /* bytes of a block, so that a large one takes no time */

static int fake_alloc(const fst_gpu *gpu, uint64_t size, void **out) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    int refuse = must_fail() || (fake.options.memory && fake.used + size > fake.options.memory);
    *out = refuse ? NULL : aligned_alloc(256, (size_t)(size + 255) / 256 * 256);
    if (*out) {
        memset(*out, 0xA5, size < POISONED ? (size_t)size : POISONED);
        fake.blocks++;
        fake.used += size;
        fake.kept -= fake.kept < size ? fake.kept : size;
        if (fake.used > fake.peak) fake.peak = fake.used;
    }
    pthread_mutex_unlock(&fake.lock);
    return *out ? 0 : FST_GPU_OUT_OF_MEMORY;
}

static void fake_free(const fst_gpu *gpu, void *block, uint64_t size) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    free(block);
    fake.blocks--;
    fake.used -= size;
    if (fake.holders) fake.kept += size;
    pthread_mutex_unlock(&fake.lock);
}

/* In the stream's order: what it was told before happens first. */
static void fake_free_behind(const fst_gpu *gpu, fst_queue which, void *block, uint64_t size) {
    stream *s = which;
    pthread_mutex_lock(&fake.lock);
    while (s->first) run_one(s);
    pthread_mutex_unlock(&fake.lock);
    fake_free(gpu, block, size);
}

static void fake_hold(const fst_gpu *gpu) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    fake.holders++;
    pthread_mutex_unlock(&fake.lock);
}

static void fake_let_go(const fst_gpu *gpu) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    if (--fake.holders == 0) fake.kept = 0;
    pthread_mutex_unlock(&fake.lock);
}

static uint64_t fake_kept(const fst_gpu *gpu) {
    (void)gpu;
    return fake_gpu_kept();
}

static int fake_pin(const fst_gpu *gpu, void *memory, size_t size) {
    (void)gpu, (void)memory, (void)size;
    pthread_mutex_lock(&fake.lock);
    int refused =
        fake.options.refuse_to_pin || (fake.options.pins_at_most && fake.pins >= fake.options.pins_at_most);
    fake.pins += !refused;
    pthread_mutex_unlock(&fake.lock);
    return refused;
}

static void fake_unpin(const fst_gpu *gpu, void *memory) {
    (void)gpu, (void)memory;
    pthread_mutex_lock(&fake.lock);
    fake.pins--;
    pthread_mutex_unlock(&fake.lock);
}

static int fake_stream_new(const fst_gpu *gpu, fst_queue *out) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    stream *s = must_fail() ? NULL : calloc(1, sizeof *s);
    if (s) {
        s->last = &s->first;
        s->next = fake.list;
        fake.list = s;
        fake.streams++;
    }
    *out = s;
    pthread_mutex_unlock(&fake.lock);
    return s ? 0 : 719;
}

static void fake_stream_free(const fst_gpu *gpu, fst_queue which) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    for (stream **at = &fake.list; *at; at = &(*at)->next)
        if (*at == which) {
            stream *s = which;
            *at = s->next;
            while (s->first) run_one(s);
            for (stream *other = fake.list; other; other = other->next) /* all of it has run */
                for (op *o = other->first; o; o = o->next)
                    if (o->of == s) o->of = NULL;
            free(s);
            fake.streams--;
            break;
        }
    pthread_mutex_unlock(&fake.lock);
}

static int fake_stream_wait(const fst_gpu *gpu, fst_queue which) {
    stream *s = which;
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    int fails = must_fail();
    while (s->first) run_one(s);
    pthread_mutex_unlock(&fake.lock);
    return fails ? 719 : 0;
}

static int fake_event_new(const fst_gpu *gpu, int timed, fst_event *out) {
    (void)gpu, (void)timed;
    pthread_mutex_lock(&fake.lock);
    *out = must_fail() ? NULL : calloc(1, sizeof(event));
    if (*out) fake.events++;
    pthread_mutex_unlock(&fake.lock);
    return *out ? 0 : 719;
}

static void fake_event_free(const fst_gpu *gpu, fst_event which) {
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    fake.events--;
    free(which);
    pthread_mutex_unlock(&fake.lock);
}

static int fake_event_record(const fst_gpu *gpu, fst_event which, fst_queue to) {
    op o = {.kind = OP_EVENT, .event = which};
    (void)gpu;
    return enqueue(to, &o);
}

static int fake_event_wait(const fst_gpu *gpu, fst_event which) {
    event *e = which;
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    int fails = must_fail();
    while (e->stream && e->stream->run < e->at) run_one(e->stream);
    pthread_mutex_unlock(&fake.lock);
    return fails ? 719 : 0;
}

/* Asking again and again comes to an end. */
static int fake_event_query(const fst_gpu *gpu, fst_event which) {
    event *e = which;
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    run_some();
    int done = !e->stream || e->stream->run >= e->at;
    pthread_mutex_unlock(&fake.lock);
    return done ? 0 : FST_GPU_NOT_READY;
}

static int fake_follow(const fst_gpu *gpu, fst_queue which, fst_event of) {
    op o = {.kind = OP_FOLLOW, .event = of};
    (void)gpu;
    return enqueue(which, &o);
}

/* A millisecond for everything that is done. */
static float fake_elapsed(const fst_gpu *gpu, fst_event from, fst_event to) {
    event *ends[] = {from, to};
    int done = 1;
    (void)gpu;
    pthread_mutex_lock(&fake.lock);
    for (int i = 0; i < 2; i++) done &= ends[i]->stream && ends[i]->stream->run >= ends[i]->at;
    pthread_mutex_unlock(&fake.lock);
    return done ? 1 : -1;
}

static int fake_copy(const fst_gpu *gpu, fst_queue to, void *dst, const void *src, size_t size) {
    op o = {.kind = OP_COPY, .dst = dst, .src = src, .size = size};
    (void)gpu;
    return enqueue(to, &o);
}

static int fake_cast(fst_queue to, const fst_cast_args *args) {
    op o = {.kind = OP_CAST, .cast = *args};
    return fst_kernels_have(args->src_dtype, args->dst_dtype) ? enqueue(to, &o) : FST_K_NO_KERNEL;
}

static int fake_batch(fst_queue to, const fst_batch_args *args) {
    op o = {.kind = OP_BATCH, .batch = *args};
    return fst_kernels_have(args->src_dtype, args->dst_dtype) ? enqueue(to, &o) : FST_K_NO_KERNEL;
}

static int fake_scaled(fst_queue to, const fst_scaled_args *args) {
    op o = {.kind = OP_SCALED, .scaled = *args};
    return enqueue(to, &o);
}

static int fake_quantize(fst_queue to, const fst_quantize_args *args) {
    op o = {.kind = OP_QUANTIZE, .quantize = *args};
    return enqueue(to, &o);
}

static int fake_rows(fst_queue to, const fst_rows_args *args) {
    op o = {.kind = OP_ROWS, .rows = *args};
    return enqueue(to, &o);
}

static int fake_transpose(fst_queue to, const fst_transpose_args *args) {
    op o = {.kind = OP_TRANSPOSE, .transpose = *args};
    return enqueue(to, &o);
}

static int fake_fnuz(fst_queue to, const fst_fnuz_args *args) {
    op o = {.kind = OP_FNUZ, .fnuz = *args};
    return enqueue(to, &o);
}

static int fake_bnb4(fst_queue to, const fst_bnb4_args *args) {
    op o = {.kind = OP_BNB4, .bnb4 = *args};
    return enqueue(to, &o);
}

static int fake_packed(fst_queue to, const fst_packed_args *args) {
    op o = {.kind = OP_PACKED, .packed = *args};
    return enqueue(to, &o);
}

static int fake_box_scaled(fst_queue to, const fst_scaled_args *args, const fst_box *box) {
    op o = {.kind = OP_BOX_SCALED, .scaled = *args, .box = *box};
    return enqueue(to, &o);
}

static int fake_box_bnb4(fst_queue to, const fst_bnb4_args *args, const fst_box *box) {
    op o = {.kind = OP_BOX_BNB4, .bnb4 = *args, .box = *box};
    return enqueue(to, &o);
}

static int fake_box_packed(fst_queue to, const fst_packed_args *args, const fst_box *box) {
    op o = {.kind = OP_BOX_PACKED, .packed = *args, .box = *box};
    return enqueue(to, &o);
}

static int fake_box_cast(fst_queue to, const fst_cast_args *args, const fst_box *box) {
    op o = {.kind = OP_BOX_CAST, .cast = *args, .box = *box};
    return enqueue(to, &o);
}

void fake_gpu_begin(const fake_gpu_options *options) {
    static const fst_gpu_calls calls = {
        .enter = fake_enter,
        .leave = fake_leave,
        .describe = fake_describe,
        .memory = fake_memory,
        .alloc_block = fake_alloc,
        .free_block = fake_free,
        .free_behind = fake_free_behind,
        .hold = fake_hold,
        .let_go = fake_let_go,
        .kept = fake_kept,
        .pin = fake_pin,
        .unpin = fake_unpin,
        .stream_new = fake_stream_new,
        .stream_free = fake_stream_free,
        .stream_wait = fake_stream_wait,
        .event_new = fake_event_new,
        .event_free = fake_event_free,
        .event_record = fake_event_record,
        .event_wait = fake_event_wait,
        .event_query = fake_event_query,
        .stream_follow = fake_follow,
        .event_elapsed = fake_elapsed,
        .to_device = fake_copy,
        .to_host = fake_copy,
        .copy_on_device = fake_copy,
    };
    static const fst_kernels kernels = {.cast = fake_cast,
                                        .batch = fake_batch,
                                        .scaled = fake_scaled,
                                        .quantize = fake_quantize,
                                        .rows = fake_rows,
                                        .transpose = fake_transpose,
                                        .fnuz = fake_fnuz,
                                        .bnb4 = fake_bnb4,
                                        .packed = fake_packed,
                                        .box_scaled = fake_box_scaled,
                                        .box_bnb4 = fake_box_bnb4,
                                        .box_packed = fake_box_packed,
                                        .box_cast = fake_box_cast,
                                        .target = "fake"};
    static const fst_gpu gpu = {.calls = &calls,
                                .kernels = &kernels,
                                .dlpack_type = 2,
                                .label = "fake:0",
                                .name = "a device of the tests"};
    fst_release_cached();
    fake.options = *options;
    fake.random = options->seed;
    fake.calls = 0;
    fake.peak = fake.used;
    fst_gpu_set_fake(&gpu);
}

void fake_gpu_end(void) {
    fst_release_cached();
    fst_gpu_set_fake(NULL);
    fake.options = (fake_gpu_options){0};
    if (fake.blocks || fake.streams || fake.events || fake.pins || fake.holders)
        test_fail(__FILE__, __LINE__, "still held: %d blocks, %d streams, %d events, %d pinned ranges, by %d",
                  fake.blocks, fake.streams, fake.events, fake.pins, fake.holders);
}

static int look(const int *at) {
    pthread_mutex_lock(&fake.lock);
    int value = *at;
    pthread_mutex_unlock(&fake.lock);
    return value;
}

int fake_gpu_calls(void) { return look(&fake.calls); }
int fake_gpu_blocks(void) { return look(&fake.blocks); }

uint64_t fake_gpu_kept(void) {
    pthread_mutex_lock(&fake.lock);
    uint64_t kept = fake.kept;
    pthread_mutex_unlock(&fake.lock);
    return kept;
}
int fake_gpu_pins(void) { return look(&fake.pins); }

uint64_t fake_gpu_peak(void) {
    pthread_mutex_lock(&fake.lock);
    uint64_t peak = fake.peak;
    pthread_mutex_unlock(&fake.lock);
    return peak;
}
