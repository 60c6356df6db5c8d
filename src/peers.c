/* Ranks that share the reading: rounds of parts, each with a word on how every rank fared. */
#include "peers.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "modules.h"
#include "os.h"
#include "status.h"

#define TIMEOUT_MS 600000u
#define AFTER_ABORT 5.0 /* seconds for what was aborted to end: a device that takes longer is broken */
#define SLOT \
    (1 + FST_PEERS_WORDS) /* words of a rank in a round: how it fared, and those of fst_peers_agree */

typedef struct round {
    void *buffer; /* NULL: words alone */
    size_t nbytes;
    fst_queue stream;
    uint64_t *words; /* SLOT of each rank, on the host, and on the device */
    unsigned char *device_words;
    fst_comm_request requests[2];
    int pending[2];
    fst_event event;
    int recorded;
    int code; /* why it could not be begun: the transport's, or the device's when `what` says what was tried */
    const char *what;
} round;

struct fst_peers {
    const fst_comm_calls *calls;
    fst_comm_use *use;
    const fst_gpu *gpu;
    unsigned rank, ranks, timeout_ms;
    int may_abort;
    uint64_t *words, *agreed;
    size_t words_bytes;
    void *device_words;
    int pinned;
    fst_queue stream;
    round rounds[FST_PEERS_DEPTH];
    uint64_t begun, done;
    double since; /* when the oldest round was first found not to be done; 0: not yet */

    fst_status failure; /* the first round that a rank failed in: what is said here, */
    fst_error failed;   /* why, unless it is this rank itself */
    uint64_t failed_at; /* and which it was */
    int lost;
    fst_error why_lost;

    /* To begin a gather on the device may take for ever, so that is done by a thread that can be left behind. */
    int started;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    round *job; /* the thread is at it */
    int stop;

    struct kept {
        void (*release)(void *arg);
        void *arg;
        struct kept *next;
    } * kept;
    fst_peers *next;
};

static const fst_comm_calls *fake;
/* Those that were closed while rounds were under way: memory that is written to must not be freed. */
static fst_peers *left_behind;
static pthread_mutex_t left_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- Transports ------------------------------------------------------------------------------- */

static const fst_comm_calls *mpi;
static char no_mpi[512];

static void find_mpi(void) {
    void *module = fst_module_open("mpi", no_mpi, sizeof no_mpi);
    const fst_comm_module_table *table = module ? dlsym(module, "fst_comm_module") : NULL;
    if (table && table->abi == FST_COMM_ABI) mpi = table->calls;
    else if (module) snprintf(no_mpi, sizeof no_mpi, "its module is of another version of fst");
}

static fst_status find_calls(const fst_peers_options *o, const fst_comm_calls **out, fst_error *error) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (o->kind != FST_COMM_NCCL && o->kind != FST_COMM_MPI)
        return fst_fail(error, FST_E_ARG, 0, NULL, "comm_kind %d: want FST_COMM_NCCL or _MPI", (int)o->kind);
    if (!o->comm) return fst_fail(error, FST_E_ARG, 0, NULL, "comm_kind is set, comm is NULL");
    if ((*out = fake)) return FST_OK;
    if (o->kind == FST_COMM_NCCL) {
        if (o->gpu->host_access)
            return fst_fail(error, FST_E_ARG, 0, NULL, "NCCL's communicators are for GPUs, this is the CPU");
        *out = &fst_comm_nccl;
        return FST_OK;
    }
    if (!o->gpu->host_access)
        return fst_fail(error, FST_E_ARG, 0, NULL, "MPI's communicators are for the CPU, this is %s",
                        o->gpu->label);
    pthread_once(&once, find_mpi);
    *out = mpi;
    return mpi ? FST_OK : fst_fail(error, FST_E_ARG, 0, NULL, "MPI: %s", no_mpi);
}

void fst_peers_set_fake(const fst_comm_calls *calls) { fake = calls; }

/* ---- Being lost ------------------------------------------------------------------------------- */

static fst_status lost(const fst_peers *p, fst_error *error) {
    if (error) *error = p->why_lost;
    return p->why_lost.status;
}

static int helper_busy(fst_peers *p) {
    pthread_mutex_lock(&p->lock);
    int busy = p->job != NULL;
    pthread_mutex_unlock(&p->lock);
    return busy;
}

/* Whether a round that is under way writes to no memory any more, as far as anybody can tell. */
static int round_over(fst_peers *p, round *r) {
    if (p->calls->on_device)
        return !r->recorded || p->gpu->calls->event_query(p->gpu, r->event) != FST_GPU_NOT_READY;
    for (int i = 0; i < 2; i++) {
        int done = 0;
        if (r->pending[i] && (p->calls->test(p->use, &r->requests[i], &done) || done)) r->pending[i] = 0;
    }
    return !r->pending[0] && !r->pending[1];
}

static int all_over(fst_peers *p) {
    if (helper_busy(p)) return 0;
    for (; p->done < p->begun; p->done++)
        if (!round_over(p, &p->rounds[p->done % FST_PEERS_DEPTH])) return 0;
    return 1;
}

static void nap(unsigned turn) {
    const struct timespec brief = {0, 50000}, longer = {0, 1000000};
    if (turn < 50) sched_yield();
    else nanosleep(turn < 500 ? &brief : &longer, NULL);
}

/* p->why_lost is filled in. Never again anything but that. */
static fst_status lose(fst_peers *p, fst_error *error) {
    p->lost = 1;
    if (p->may_abort && p->calls->abort) {
        double from = fst_os_now();
        (void)p->calls->abort(p->use);
        for (unsigned turn = 0; !all_over(p) && fst_os_now() - from < AFTER_ABORT; turn++) nap(turn);
    }
    return lost(p, error);
}

static fst_status lose_timeout(fst_peers *p, const round *r, uint64_t number, fst_error *error) {
    fst_fail(&p->why_lost, FST_E_PEER, 0, NULL,
             "rank %u of %u waited %u ms for the others' %s, round %llu: %s", p->rank, p->ranks,
             p->timeout_ms, r->buffer ? "data" : "plans", (unsigned long long)number,
             "a rank did not come, or went away");
    return lose(p, error);
}

static fst_status lose_code(fst_peers *p, int code, const char *what, fst_error *error) {
    char text[512];
    if (what) {
        fst_error why;
        fst_gpu_fail(&why, p->gpu, code, what);
        snprintf(text, sizeof text, "%s", why.text);
    } else {
        int used = snprintf(text, sizeof text, "%s: ", p->calls->name);
        p->calls->describe(p->use, code, text + used, sizeof text - (size_t)used);
    }
    fst_fail(&p->why_lost, FST_E_PEER, 0, NULL, "rank %u of %u: %s", p->rank, p->ranks, text);
    return lose(p, error);
}

/* ---- Beginning a round ------------------------------------------------------------------------ */

static int gather(fst_peers *p, round *r, int which, void *memory, size_t nbytes) {
    int code = p->calls->gather(p->use, memory, nbytes, r->stream, &r->requests[which]);
    r->pending[which] = code == 0;
    return code;
}

static void start_on_host(fst_peers *p, round *r) {
    r->code = gather(p, r, 1, r->words, SLOT * sizeof(uint64_t));
    if (!r->code && r->nbytes) r->code = gather(p, r, 0, r->buffer, r->nbytes);
}

/* Words come back to the host on the same stream, so that one event tells of everything. */
static void start_on_device(fst_peers *p, round *r) {
    const fst_gpu_calls *gpu = p->gpu->calls;
    size_t own = SLOT * sizeof(uint64_t), at = p->rank * own;
    r->what = "queueing a word to other ranks";
    r->code = gpu->to_device(p->gpu, r->stream, r->device_words + at, (unsigned char *)r->words + at, own);
    if (!r->code) {
        r->what = NULL;
        r->code = gather(p, r, 1, r->device_words, own);
        if (!r->code && r->nbytes) r->code = gather(p, r, 0, r->buffer, r->nbytes);
    }
    if (!r->code) {
        r->what = "queueing a word from other ranks";
        r->code = gpu->to_host(p->gpu, r->stream, r->words, r->device_words, p->ranks * own);
    }
    int code =
        gpu->event_record(p->gpu, r->event, r->stream); /* also behind what was begun of a failed one */
    r->recorded = code == 0;
    if (code && !r->code) r->code = code, r->what = "recording an event";
}

static void *helper(void *arg) {
    fst_peers *p = arg;
    int saved, code = p->gpu->calls->enter(p->gpu, &saved);
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->job && !p->stop) pthread_cond_wait(&p->changed, &p->lock);
        if (!p->job) break;
        round *r = p->job;
        pthread_mutex_unlock(&p->lock);
        if (code) r->code = code, r->what = "making the device current";
        else start_on_device(p, r);
        pthread_mutex_lock(&p->lock);
        p->job = NULL;
        pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->lock);
    if (code == 0) p->gpu->calls->leave(p->gpu, saved);
    return NULL;
}

/* Has the helper begin it. 0: that took too long. */
static int start_by_helper(fst_peers *p, round *r) {
    struct timespec until;
    int late = 0;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += p->timeout_ms / 1000;
    until.tv_nsec += (long)(p->timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&p->lock);
    p->job = r;
    pthread_cond_broadcast(&p->changed);
    while (p->job && !late) late = pthread_cond_timedwait(&p->changed, &p->lock, &until) != 0;
    late = p->job != NULL;
    pthread_mutex_unlock(&p->lock);
    return !late;
}

static fst_status start(fst_peers *p, void *buffer, size_t nbytes, fst_queue stream, fst_status mine,
                        const uint64_t *words, unsigned count, fst_error *error) {
    round *r = &p->rounds[p->begun % FST_PEERS_DEPTH];
    uint64_t *own = r->words + (size_t)p->rank * SLOT;
    memset(r->words, 0, p->ranks * SLOT * sizeof *r->words);
    own[0] = (uint64_t)mine | p->begun << 32;
    if (count) memcpy(own + 1, words, count * sizeof *words);
    r->buffer = buffer, r->nbytes = nbytes, r->stream = stream;
    r->code = r->recorded = r->pending[0] = r->pending[1] = 0;
    r->what = NULL;
    p->begun++;
    if (!p->calls->on_device) start_on_host(p, r);
    else if (!start_by_helper(p, r)) return lose_timeout(p, r, p->begun - 1, error);
    return r->code ? lose_code(p, r->code, r->what, error) : FST_OK;
}

/* ---- Ending one ------------------------------------------------------------------------------- */

/* 0 or what failed; *what as in a round. */
static int look(fst_peers *p, round *r, int *done, const char **what) {
    int code = 0;
    *done = 1, *what = NULL;
    if (p->calls->on_device) {
        code = p->gpu->calls->event_query(p->gpu, r->event);
        if (code && code != FST_GPU_NOT_READY) *what = "passing data between ranks";
        if (code != FST_GPU_NOT_READY) return code;
        *done = 0;
        return p->calls->test(p->use, &r->requests[1], done);
    }
    for (int i = 0; i < 2 && code == 0; i++) {
        int over = 1;
        if (r->pending[i]) code = p->calls->test(p->use, &r->requests[i], &over);
        if (code || over) r->pending[i] = 0;
        *done &= over;
    }
    return code;
}

/* How the ranks fared in a round that is done. */
static fst_status judge(fst_peers *p, const round *r, uint64_t number, fst_error *error) {
    fst_status mine = (fst_status)(r->words[(size_t)p->rank * SLOT] & UINT32_MAX);
    for (unsigned rank = 0; rank < p->ranks; rank++) {
        uint64_t word = r->words[(size_t)rank * SLOT];
        if (word >> 32 == (number & UINT32_MAX) && (word & UINT32_MAX) < FST_STATUS_COUNT) continue;
        fst_fail(&p->why_lost, FST_E_PEER, 0, NULL,
                 "rank %u of %u is not in round %llu as rank %u is: something else uses the communicator",
                 rank, p->ranks, (unsigned long long)number, p->rank);
        return lose(p, error);
    }
    if (mine) return mine;
    for (unsigned rank = 0; rank < p->ranks; rank++) {
        fst_status status = (fst_status)(r->words[(size_t)rank * SLOT] & UINT32_MAX);
        if (status)
            return fst_fail(error, FST_E_PEER, (int)status, NULL, "rank %u of %u failed: %s", rank, p->ranks,
                            fst_status_name(status));
    }
    return FST_OK;
}

fst_status fst_peers_test(fst_peers *p, int *done, fst_error *error) {
    const char *what;
    *done = 1;
    if (p->lost) return lost(p, error);
    if (p->done == p->begun) return FST_OK;
    round *r = &p->rounds[p->done % FST_PEERS_DEPTH];
    int code = look(p, r, done, &what);
    if (code) return lose_code(p, code, what, error);
    if (!*done) {
        double now = fst_os_now();
        if (p->since == 0) p->since = now;
        return (now - p->since) * 1e3 < p->timeout_ms ? FST_OK : lose_timeout(p, r, p->done, error);
    }
    p->since = 0;
    fst_error why = {.file = -1, .offset = -1};
    fst_status status = judge(p, r, p->done, &why);
    if (error && why.status) *error = why;
    if (status && !p->lost && !p->failure) p->failure = status, p->failed = why, p->failed_at = p->done;
    if (!p->lost) p->done++;
    return status;
}

fst_status fst_peers_wait(fst_peers *p, fst_error *error) {
    for (unsigned turn = 0;; turn++) {
        int done;
        fst_status status = fst_peers_test(p, &done, error);
        if (status || done) return status;
        nap(turn);
    }
}

static fst_status failure(const fst_peers *p, fst_error *error) {
    if (error && p->failed.status) *error = p->failed;
    return p->failure;
}

fst_status fst_peers_begin(fst_peers *p, void *buffer, size_t nbytes, fst_queue stream, fst_status mine,
                           fst_error *error) {
    if (p->begun - p->done == FST_PEERS_DEPTH && !p->lost) (void)fst_peers_wait(p, NULL);
    if (p->lost) return lost(p, error);
    /* Whoever begins this round has seen that one fail, here as everywhere. */
    if (p->failure && p->begun >= p->failed_at + FST_PEERS_DEPTH) return failure(p, error);
    return start(p, buffer, nbytes, stream, mine, NULL, 0, error);
}

fst_status fst_peers_finish(fst_peers *p, fst_error *error) {
    while (p->done < p->begun && !p->lost) (void)fst_peers_wait(p, NULL);
    return p->lost ? lost(p, error) : failure(p, error);
}

fst_status fst_peers_agree(fst_peers *p, fst_status mine, const uint64_t *words, unsigned count,
                           fst_error *error) {
    const round *r = &p->rounds[p->begun % FST_PEERS_DEPTH];
    if (p->lost) return lost(p, error);
    if (count > FST_PEERS_WORDS || p->begun != p->done)
        return fst_fail(error, FST_E_ARG, 0, NULL, "%u words to agree on, %llu rounds under way", count,
                        (unsigned long long)(p->begun - p->done));
    fst_status status = start(p, NULL, 0, p->stream, mine, words, count, error);
    if (status == FST_OK) status = fst_peers_wait(p, error);
    if (status) return status;
    memcpy(p->agreed, r->words, p->ranks * SLOT * sizeof *r->words);
    for (unsigned rank = 1; rank < p->ranks; rank++) /* the same answer on every rank */
        if (memcmp(fst_peers_words(p, 0), fst_peers_words(p, rank), FST_PEERS_WORDS * sizeof *words) != 0)
            return fst_fail(error, FST_E_ARG, 0, NULL,
                            "rank %u of %u has other files or options than rank 0: it plans another load",
                            rank, p->ranks);
    return FST_OK;
}

const uint64_t *fst_peers_words(const fst_peers *p, unsigned rank) {
    return p->agreed + (size_t)rank * SLOT + 1;
}

unsigned fst_peers_rank(const fst_peers *p) { return p->rank; }
unsigned fst_peers_count(const fst_peers *p) { return p->ranks; }

/* ---- Opening and closing ---------------------------------------------------------------------- */

static void free_device_part(fst_peers *p) {
    const fst_gpu_calls *gpu = p->gpu->calls;
    for (int i = 0; i < FST_PEERS_DEPTH; i++)
        if (p->rounds[i].event) gpu->event_free(p->gpu, p->rounds[i].event);
    if (p->stream) gpu->stream_free(p->gpu, p->stream);
    if (p->device_words) gpu->free_block(p->gpu, p->device_words, p->words_bytes);
    if (p->pinned) gpu->unpin(p->gpu, p->words);
}

static void stop_helper(fst_peers *p) {
    if (!p->started) return;
    pthread_mutex_lock(&p->lock);
    p->stop = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
}

/* Nothing is under way. */
static void destroy(fst_peers *p) {
    stop_helper(p);
    if (p->calls->on_device) free_device_part(p);
    if (p->words) fst_os_calls.unmap(p->words, p->words_bytes);
    free(p->agreed);
    if (p->use) p->calls->close(p->use);
    pthread_cond_destroy(&p->changed);
    pthread_mutex_destroy(&p->lock);
    while (p->kept) {
        struct kept *kept = p->kept;
        p->kept = kept->next;
        kept->release(kept->arg);
        free(kept);
    }
    free(p);
}

/* Frees what was left behind and has ended since then. */
static void sweep(const fst_comm_calls *calls) {
    fst_peers *over = NULL;
    pthread_mutex_lock(&left_lock);
    for (fst_peers **at = &left_behind; *at;) {
        fst_peers *p = *at;
        if (p->calls != calls || !all_over(p)) {
            at = &p->next;
            continue;
        }
        *at = p->next;
        p->next = over;
        over = p;
    }
    pthread_mutex_unlock(&left_lock);
    while (over) {
        fst_peers *p = over;
        over = p->next;
        destroy(p);
    }
}

int fst_peers_busy(const fst_peers *p) { return p->lost && !all_over((fst_peers *)(uintptr_t)p); }

void fst_peers_keep(fst_peers *p, void (*release)(void *arg), void *arg) {
    struct kept *kept = malloc(sizeof *kept);
    if (!kept) return;
    *kept = (struct kept){release, arg, p->kept};
    p->kept = kept;
}

void fst_peers_close(fst_peers *p) {
    if (!p) return;
    if (!p->lost) (void)fst_peers_finish(p, NULL);
    p->calls->leave(p->use, p->lost);
    if (all_over(p)) {
        destroy(p);
        return;
    }
    pthread_mutex_lock(&left_lock);
    p->next = left_behind;
    left_behind = p;
    pthread_mutex_unlock(&left_lock);
}

static fst_status open_device_part(fst_peers *p, fst_error *error) {
    const fst_gpu_calls *gpu = p->gpu->calls;
    sigset_t all, before;
    /* Not pinned, a copy to the host would have this thread wait for the other ranks. */
    int code = gpu->pin(p->gpu, p->words, p->words_bytes);
    if (code) return fst_gpu_fail(error, p->gpu, code, "pinning memory for words of other ranks");
    p->pinned = 1;
    code = gpu->alloc_block(p->gpu, p->words_bytes, &p->device_words);
    if (!code) code = gpu->stream_new(p->gpu, &p->stream);
    for (int i = 0; i < FST_PEERS_DEPTH && !code; i++) code = gpu->event_new(p->gpu, 0, &p->rounds[i].event);
    if (code) return fst_gpu_fail(error, p->gpu, code, "preparing to meet other ranks");
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    code = pthread_create(&p->thread, NULL, helper, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code)
        return fst_fail(error, FST_E_MEMORY, code, NULL, "starting a thread to meet other ranks: %s",
                        strerror(code));
    p->started = 1;
    return FST_OK;
}

static fst_status make_words(fst_peers *p, fst_error *error) {
    size_t round_bytes = (size_t)p->ranks * SLOT * sizeof(uint64_t);
    p->words_bytes = FST_PEERS_DEPTH * round_bytes;
    p->words = fst_os_calls.map(p->words_bytes);
    p->agreed = calloc(1, round_bytes);
    if (!p->words || !p->agreed) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    fst_status status = p->calls->on_device ? open_device_part(p, error) : FST_OK;
    for (int i = 0; i < FST_PEERS_DEPTH; i++) {
        p->rounds[i].words = p->words + (size_t)i * p->ranks * SLOT;
        if (p->device_words)
            p->rounds[i].device_words = (unsigned char *)p->device_words + (size_t)i * round_bytes;
    }
    return status;
}

static fst_status open_communicator(fst_peers *p, void *comm, fst_error *error) {
    char why[512] = "";
    fst_status status = p->calls->open(comm, p->gpu, &p->use, &p->rank, &p->ranks, why, sizeof why);
    return status ? fst_fail(error, status, 0, NULL, "%s: %s", p->calls->name, why) : FST_OK;
}

/* The others are told of a wrong rank or size, too: they would wait for nothing. */
static fst_status check_place(fst_peers *p, const fst_peers_options *o, fst_error *error) {
    if ((o->rank == 0 && o->ranks == 0) || (o->rank == p->rank && o->ranks == p->ranks)) return FST_OK;
    (void)fst_peers_agree(p, FST_E_ARG, NULL, 0, NULL);
    if (p->lost) return lost(p, error);
    return fst_fail(error, FST_E_ARG, 0, NULL, "rank %u of %u in the options, %u of %u in the communicator",
                    o->rank, o->ranks, p->rank, p->ranks);
}

fst_status fst_peers_open(const fst_peers_options *o, fst_peers **out, fst_error *error) {
    const fst_comm_calls *calls;
    pthread_condattr_t attributes;
    *out = NULL;
    if (o->kind == FST_COMM_NONE && !o->comm) return FST_OK;
    fst_status status = find_calls(o, &calls, error);
    if (status) return status;
    fst_peers *p = calloc(1, sizeof *p);
    if (!p) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    p->calls = calls, p->gpu = o->gpu, p->may_abort = o->may_abort;
    p->timeout_ms = o->timeout_ms ? o->timeout_ms : TIMEOUT_MS;
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&p->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    status = open_communicator(p, o->comm, error);
    if (status == FST_OK || status == FST_E_PEER) sweep(calls); /* the transport works, in this thread */
    if (status) {
        destroy(p);
        return status;
    }
    status = make_words(p, error);
    if (status == FST_OK) status = check_place(p, o, error);
    if (status) fst_peers_close(p);
    else *out = p;
    return status;
}
