/* Engines and the contexts that keep them. */
#include "engine.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define HUGE_PAGE ((size_t)2 << 20)
#define MAX_THREADS 64u
#define MAX_IDLE 2u                  /* engines that a context keeps for the next load */
#define MAX_RING ((size_t)256 << 20) /* bytes of slots, unless more is asked for in so many words */
#define NAP_SLACK 2000ul             /* nanoseconds that a reader's short sleeps may be late */

/* Measured on an H200 with 16 cores (docs/measuring.md): with copies of 16 MiB, one after the other, the link has 0.984 of its
 * rate, with 8 MiB 0.975; and a ring of 64 MiB stays in the last-level cache, one of 96 MiB and more not always. All threads
 * fill one slot after the other, so that few are enough. */
#define GPU_THREADS 14u
#define GPU_SLOT ((size_t)16 << 20)
#define GPU_SLOTS 4u
#define GPU_STRIP ((size_t)512 << 10)
#define LEAST_SLOT ((size_t)2 << 20)
#define MAX_SLOTS 256u
#define CPU_SLOT ((size_t)512 << 10) /* what is read is still in the core's cache when it is converted */
#define CPU_SLOTS_EACH 2u

fst_tuning fst_pipeline_tuning;

struct fst_context {
    pthread_mutex_t lock;
    fst_engine *idle;
};

static struct fst_context process_context = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- What a worker needs, made in its own thread -------------------------------------------------- */

/* Pages are given out at the first touch, from the node that is asked for. */
static void touch(const fst_engine *engine, unsigned char *memory, size_t size) {
    volatile unsigned char *page = memory;
    if (engine->node >= 0) fst_os_calls.bind_memory(memory, size, engine->node);
    for (size_t i = 0; i < size; i += PAGE) page[i] = 0;
}

static int make_stream(const fst_gpu *gpu, fst_slot *s) {
    int code = gpu->calls->stream_new(gpu, &s->stream);
    if (!code) code = gpu->calls->event_new(gpu, 1, &s->started);
    if (!code) code = gpu->calls->event_new(gpu, 1, &s->stopped);
    if (!code) code = gpu->calls->event_new(gpu, 0, &s->copied);
    if (!code) code = gpu->calls->event_new(gpu, 1, &s->converted);
    return code;
}

/* Memory on huge pages that was touched and is then registered takes a quarter of the time of a pinned allocation. A slot
 * that the system does not let us pin is left out, as long as there are others. */
static int make_slot(fst_engine *engine, fst_slot *s) {
    const fst_gpu *gpu = engine->gpu;
    touch(engine, s->bounce, engine->slot_room);
    int code = make_stream(gpu, s);
    if (code || gpu->host_access) return code;
    s->pinned = gpu->calls->pin(gpu, s->bounce, engine->slot_room) == 0;
    pthread_mutex_lock(&engine->lock);
    if (s->pinned) {
        engine->facts.pinned_bytes += engine->slot_room;
        atomic_store(&s->state, FST_SLOT_FREE);
        pthread_cond_broadcast(&engine->moved);
    } else {
        engine->facts.unpinned++;
    }
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

static void set_up(fst_worker *w) {
    fst_engine *engine = w->engine;
    unsigned number = (unsigned)(w - engine->workers);
    int saved;
    if (engine->node >= 0) fst_os_calls.run_on_node(engine->node);
    prctl(PR_SET_TIMERSLACK, NAP_SLACK);
    w->setup_code = engine->gpu->calls->enter(engine->gpu, &saved);
    w->setup_what = w->setup_code ? "choosing the device" : NULL;
    for (unsigned i = number; i < engine->slots_count && !w->setup_code; i += engine->facts.threads) {
        w->setup_code = make_slot(engine, &engine->slots[i]);
        if (w->setup_code) w->setup_what = "making streams and events";
    }
}

/* All workers have what they need. Without any slot that is pinned, copies from pageable memory are slower but right.
 * The lock is held. */
static void settle_slots(fst_engine *engine) {
    int any = engine->facts.pinned_bytes > 0;
    for (unsigned i = 0; i < engine->slots_count; i++) {
        if (engine->slots[i].pinned) continue; /* in use since then */
        if (any) engine->facts.slots--;
        else if (engine->slots[i].converted)
            atomic_store(&engine->slots[i].state, FST_SLOT_FREE); /* made whole */
    }
    pthread_cond_broadcast(&engine->moved);
}

static void *worker_main(void *arg) {
    fst_worker *w = arg;
    fst_engine *engine = w->engine;
    unsigned seen = 0;
    set_up(w);
    pthread_mutex_lock(&engine->lock);
    if (++engine->settled == engine->facts.threads && !engine->gpu->host_access) settle_slots(engine);
    pthread_cond_broadcast(&engine->done);
    for (;;) {
        while (!engine->quit && engine->generation == seen) pthread_cond_wait(&engine->wake, &engine->lock);
        if (engine->quit) break;
        seen = engine->generation;
        const fst_load_job *job = engine->job;
        pthread_mutex_unlock(&engine->lock);
        fst_engine_work(w, job);
        pthread_mutex_lock(&engine->lock);
        engine->running--;
        pthread_cond_broadcast(&engine->done);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- Engines ------------------------------------------------------------------------------------- */

static void free_slot(const fst_gpu *gpu, fst_slot *s) {
    if (s->started) gpu->calls->event_free(gpu, s->started);
    if (s->stopped) gpu->calls->event_free(gpu, s->stopped);
    if (s->copied) gpu->calls->event_free(gpu, s->copied);
    if (s->converted) gpu->calls->event_free(gpu, s->converted);
    if (s->stream) gpu->calls->stream_free(gpu, s->stream);
    if (s->pinned) gpu->calls->unpin(gpu, s->bounce);
}

static void engine_free(fst_engine *engine) {
    const fst_gpu *gpu = engine->gpu;
    int saved, entered = gpu->calls->enter(gpu, &saved) == 0;
    pthread_mutex_lock(&engine->lock);
    engine->quit = 1;
    pthread_cond_broadcast(&engine->wake);
    pthread_mutex_unlock(&engine->lock);
    for (unsigned i = 0; i < engine->threads_count; i++) pthread_join(engine->workers[i].thread, NULL);
    for (unsigned i = 0; i < engine->threads_count; i++) fst_ring_free(engine->workers[i].ring);
    for (unsigned i = 0; engine->slots && i < engine->slots_count; i++) free_slot(gpu, &engine->slots[i]);
    if (engine->copies) gpu->calls->stream_free(gpu, engine->copies);
    if (engine->staging) gpu->calls->free_block(gpu, engine->staging, engine->facts.staging_bytes);
    if (engine->ring) fst_os_calls.unmap(engine->ring, engine->ring_bytes);
    if (entered) gpu->calls->leave(gpu, saved);
    gpu->calls->let_go(gpu);
    free(engine->workers);
    free(engine->slots);
    pthread_mutex_destroy(&engine->lock);
    pthread_mutex_destroy(&engine->sending);
    pthread_cond_destroy(&engine->wake);
    pthread_cond_destroy(&engine->done);
    pthread_cond_destroy(&engine->allocated);
    pthread_cond_destroy(&engine->moved);
    free(engine);
}

/* Readers take no signals: those are the program's. They set up what they need while the caller goes on. */
static fst_status start_threads(fst_engine *engine, fst_error *error) {
    sigset_t all, before;
    int code = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (engine->threads_count < engine->facts.threads && code == 0) {
        fst_worker *w = &engine->workers[engine->threads_count];
        w->engine = engine;
        code = pthread_create(&w->thread, NULL, worker_main, w);
        if (code == 0) engine->threads_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code ? fst_fail(error, FST_E_MEMORY, code, NULL, "starting a reader thread: %s", strerror(code))
                : FST_OK;
}

static size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

/* What an engine for this device should be like. */
typedef struct shape {
    unsigned threads, slots;
    size_t slot_bytes, strip_bytes;
} shape;

/* For waits that end by the clock: one that nobody sets. */
static void init_clocked(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

static fst_status engine_new(const fst_gpu *gpu, const shape *wanted, fst_engine **out, fst_error *error) {
    fst_engine *engine = calloc(1, sizeof *engine);
    *out = NULL;
    if (!engine) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->sending, NULL);
    init_clocked(&engine->done);
    pthread_cond_init(&engine->allocated, NULL);
    init_clocked(&engine->moved);
    pthread_cond_init(&engine->wake, NULL);
    engine->gpu = gpu;
    gpu->calls->hold(gpu);
    atomic_flag_clear(&engine->giving);
    atomic_flag_clear(&engine->looking);
    engine->process = getpid();
    engine->node = gpu->pci[0] ? fst_os_calls.pci_node(gpu->pci) : -1;
    engine->slots_count = wanted->slots;
    engine->strip_bytes = wanted->strip_bytes;
    engine->facts = (fst_engine_facts){.threads = wanted->threads,
                                       .slots = wanted->slots,
                                       .slot_bytes = wanted->slot_bytes,
                                       .node = engine->node};
    /* A page before and behind the chunk, because it keeps the file's alignment, and its jobs. */
    engine->slot_room = round_up(wanted->slot_bytes + wanted->slot_bytes / 8 + 2 * PAGE, PAGE);
    if (engine->slot_room > HUGE_PAGE) engine->slot_room = round_up(engine->slot_room, HUGE_PAGE);
    engine->ring_bytes = engine->slot_room * wanted->slots;
    engine->workers = calloc(wanted->threads, sizeof *engine->workers);
    engine->slots = calloc(wanted->slots, sizeof *engine->slots);
    engine->ring = fst_os_calls.map(engine->ring_bytes);
    if (engine->ring) fst_os_calls.keep_from_children(engine->ring, engine->ring_bytes);
    fst_status status = FST_OK;
    if (!engine->workers || !engine->slots || !engine->ring)
        status = fst_fail(error, FST_E_MEMORY, 0, NULL, "no memory for a bounce ring of %zu bytes",
                          engine->ring_bytes);
    for (unsigned i = 0; !status && i < wanted->slots; i++) {
        engine->slots[i].bounce = engine->ring + engine->slot_room * i;
        if (gpu->host_access) atomic_init(&engine->slots[i].state, FST_SLOT_FREE);
    }
    if (!status && !gpu->host_access) {
        int code = gpu->calls->stream_new(gpu, &engine->copies);
        if (code) status = fst_gpu_fail(error, gpu, code, "making a stream for copies");
    }
    if (!status) status = start_threads(engine, error);
    if (status) {
        engine_free(engine);
        return status;
    }
    *out = engine;
    return FST_OK;
}

/* The ring should stay in the last-level cache, where the device reads what was just written; a processor of several such
 * caches has them small. */
static size_t gpu_slot_bytes(unsigned sharers) {
    size_t cache = fst_os_calls.cache_bytes() / 8 * 7 / (sharers ? sharers : 1), size = GPU_SLOT;
    while (cache && size > LEAST_SLOT && GPU_SLOTS * size > cache) size /= 2;
    return size;
}

/* No chunk is larger than a file: where all of them are small, a ring of as many bytes has more slots, of which more are under
 * way. */
static void suit_files(shape *s, uint64_t largest_file) {
    size_t ring = s->slot_bytes * GPU_SLOTS;
    while (largest_file && s->slot_bytes > LEAST_SLOT && s->slot_bytes / 2 >= largest_file)
        s->slot_bytes /= 2;
    s->slots = (unsigned)(ring / s->slot_bytes);
}

/* Room for all threads to read while others' strips are copied, in not too large a ring. */
static unsigned gpu_slots(const shape *s) {
    size_t reading = s->threads * (s->strip_bytes < s->slot_bytes ? s->strip_bytes : s->slot_bytes);
    size_t slots = reading * 5 / 2 / s->slot_bytes + 1, most = MAX_RING / s->slot_bytes;
    if (slots < s->slots) slots = s->slots;
    if (slots > most) slots = most;
    if (fst_pipeline_tuning.slots) slots = fst_pipeline_tuning.slots;
    return (unsigned)(slots < 2 ? 2 : slots > MAX_SLOTS ? MAX_SLOTS : slots);
}

static shape choose_shape(const fst_gpu *gpu, const fst_engine_config *config) {
    unsigned cpus = fst_os_cpus();
    shape s = {config->threads, GPU_SLOTS, config->slot_bytes, fst_pipeline_tuning.strip_bytes};
    if (s.threads == 0) s.threads = gpu->host_access || cpus < GPU_THREADS ? cpus : GPU_THREADS;
    if (s.threads > MAX_THREADS) s.threads = MAX_THREADS;
    if (s.slot_bytes == 0 && gpu->host_access) s.slot_bytes = CPU_SLOT;
    if (s.slot_bytes == 0) {
        s.slot_bytes = gpu_slot_bytes(config->sharers);
        if (config->shares && s.slot_bytes > GPU_SLOT / 2) s.slot_bytes = GPU_SLOT / 2;
        suit_files(&s, config->largest_file);
    }
    s.slot_bytes = round_up(s.slot_bytes, PAGE);
    if (s.strip_bytes == 0) s.strip_bytes = GPU_STRIP;
    if (gpu->host_access) s.strip_bytes = s.slot_bytes + PAGE; /* a chunk is one, wherever it begins */
    s.slots = gpu->host_access ? CPU_SLOTS_EACH * s.threads : gpu_slots(&s);
    return s;
}

size_t fst_engine_strips(const fst_engine *engine) {
    return (engine->facts.slot_bytes + PAGE + engine->strip_bytes - 1) / engine->strip_bytes;
}

/* ---- Contexts -------------------------------------------------------------------------------------- */

static fst_context *context_of(fst_context *given) { return given ? given : &process_context; }

/* The idle engine of this shape, out of the list. Engines of before a fork have no threads here: dropped. */
static fst_engine *take_idle(fst_context *context, const fst_gpu *gpu, const shape *wanted) {
    fst_engine *found = NULL;
    pthread_mutex_lock(&context->lock);
    for (fst_engine **at = &context->idle; *at && !found;) {
        fst_engine *engine = *at;
        int fits = engine->gpu == gpu && engine->facts.threads == wanted->threads &&
                   engine->slots_count == wanted->slots && engine->strip_bytes == wanted->strip_bytes &&
                   engine->facts.slot_bytes == wanted->slot_bytes;
        if (engine->process == getpid() && fits) found = engine;
        if (engine->process != getpid() || fits) *at = engine->next;
        else at = &engine->next;
    }
    pthread_mutex_unlock(&context->lock);
    return found;
}

fst_status fst_engine_take(fst_context *context, const fst_gpu *gpu, const fst_engine_config *config,
                           fst_engine **out, fst_engine_facts *facts, fst_error *error) {
    shape wanted = choose_shape(gpu, config);
    fst_status status = FST_OK;
    *out = take_idle(context_of(context), gpu, &wanted);
    if (!*out) {
        int saved, code = gpu->calls->enter(gpu, &saved);
        if (code) return fst_gpu_fail(error, gpu, code, "choosing the device");
        status = engine_new(gpu, &wanted, out, error);
        gpu->calls->leave(gpu, saved);
    }
    if (!status) fst_engine_describe(*out, facts);
    return status;
}

void fst_engine_describe(const fst_engine *engine, fst_engine_facts *facts) {
    pthread_mutex_t *lock = (pthread_mutex_t *)&engine->lock;
    pthread_mutex_lock(lock); /* workers may be at their set-up still */
    *facts = engine->facts;
    pthread_mutex_unlock(lock);
}

static void free_list(fst_engine *list) {
    while (list) {
        fst_engine *engine = list;
        list = engine->next;
        if (engine->process == getpid()) engine_free(engine);
    }
}

/* Whether all workers have what they need. */
static int is_sound(fst_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    while (engine->settled < engine->threads_count) pthread_cond_wait(&engine->done, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
    for (unsigned i = 0; i < engine->threads_count; i++)
        if (engine->workers[i].setup_what) return 0;
    return 1;
}

void fst_engine_put(fst_context *given, fst_engine *engine) {
    fst_context *context = context_of(given);
    fst_engine *dropped = NULL;
    unsigned count = 0;
    if (!is_sound(engine)) {
        engine_free(engine);
        return;
    }
    pthread_mutex_lock(&context->lock);
    engine->next = context->idle;
    context->idle = engine;
    for (fst_engine **at = &context->idle; *at; at = &(*at)->next)
        if (++count == MAX_IDLE) { /* the oldest go: their rings hold memory that others could use */
            dropped = (*at)->next;
            (*at)->next = NULL;
            break;
        }
    pthread_mutex_unlock(&context->lock);
    free_list(dropped);
}

void fst_context_release(fst_context *given) {
    fst_context *context = context_of(given);
    pthread_mutex_lock(&context->lock);
    fst_engine *list = context->idle;
    context->idle = NULL;
    pthread_mutex_unlock(&context->lock);
    free_list(list);
}

fst_context *fst_context_new(void) {
    fst_context *context = calloc(1, sizeof *context);
    if (context) {
        pthread_mutex_init(&context->lock, NULL);
        return context;
    }
    fst_error error;
    fst_fail(&error, FST_E_MEMORY, 0, NULL, "out of memory");
    fst_set_last_error(&error);
    return NULL;
}

void fst_context_free(fst_context *context) {
    if (!context) return;
    fst_context_release(context);
    pthread_mutex_destroy(&context->lock);
    free(context);
}
