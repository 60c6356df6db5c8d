#include "fake_comm.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

enum { MOST_RANKS = 8, MOST_GATHERS = 4096 };

typedef struct gather {
    size_t nbytes;
    unsigned char *parts; /* of all ranks, as they were when it was begun */
    void *memory[MOST_RANKS];
    unsigned begun, tests[MOST_RANKS];
} gather;

struct fst_comm_use {
    fake_comm *comm;
    unsigned rank, gathers;
    int used, lost;
};

struct fake_comm {
    fake_comm_options options;
    pthread_mutex_t lock;
    unsigned ranks;
    fst_comm_use uses[MOST_RANKS];
    gather gathers[MOST_GATHERS];
};

enum { FAILED = 7, OTHER_SIZE = 8 };

static fst_status fake_open(void *comm, const fst_gpu *gpu, fst_comm_use **out, unsigned *rank,
                            unsigned *ranks, char *why, size_t size) {
    fst_comm_use *use = comm;
    (void)gpu;
    *out = NULL;
    if (use->lost) {
        snprintf(why, size, "out of step");
        return FST_E_PEER;
    }
    use->used++;
    *rank = use->rank, *ranks = use->comm->ranks;
    *out = use;
    return FST_OK;
}

static int fake_gather(fst_comm_use *use, void *memory, size_t nbytes, fst_queue stream,
                       fst_comm_request *request) {
    fake_comm *comm = use->comm;
    int code = 0;
    (void)stream;
    pthread_mutex_lock(&comm->lock);
    gather *g = &comm->gathers[use->gathers];
    if (!g->parts) {
        g->nbytes = nbytes;
        g->parts = malloc(comm->ranks * nbytes + 1);
    }
    if (use->rank == comm->options.fail_rank && use->gathers + 1 == comm->options.fail_at) code = FAILED;
    else if (g->nbytes != nbytes) code = OTHER_SIZE;
    if (!code) {
        memcpy(g->parts + use->rank * nbytes, (unsigned char *)memory + use->rank * nbytes, nbytes);
        g->memory[use->rank] = memory;
        g->begun++;
        request->handle = use->gathers++;
    }
    pthread_mutex_unlock(&comm->lock);
    return code;
}

static int fake_test(fst_comm_use *use, fst_comm_request *request, int *done) {
    fake_comm *comm = use->comm;
    pthread_mutex_lock(&comm->lock);
    gather *g = &comm->gathers[request->handle];
    *done = g->begun == comm->ranks && g->tests[use->rank]++ >= comm->options.late;
    if (*done) memcpy(g->memory[use->rank], g->parts, comm->ranks * g->nbytes);
    pthread_mutex_unlock(&comm->lock);
    return 0;
}

static void fake_leave(fst_comm_use *use, int lost) { use->lost = lost; }
static void fake_close(fst_comm_use *use) { use->used--; }

static void fake_describe(fst_comm_use *use, int code, char *text, size_t size) {
    (void)use;
    snprintf(text, size, "%s", code == FAILED ? "made to fail" : "other sizes");
}

static const fst_comm_calls calls = {
    .name = "FAKE",
    .open = fake_open,
    .gather = fake_gather,
    .test = fake_test,
    .leave = fake_leave,
    .close = fake_close,
    .describe = fake_describe,
};

const fst_comm_calls *const fake_comm_calls = &calls;

fake_comm *fake_comm_new(unsigned ranks, const fake_comm_options *options) {
    fake_comm *comm = calloc(1, sizeof *comm);
    if (!comm || ranks > MOST_RANKS) test_fail(__FILE__, __LINE__, "no communicator");
    if (options) comm->options = *options;
    comm->ranks = ranks;
    pthread_mutex_init(&comm->lock, NULL);
    for (unsigned rank = 0; rank < ranks; rank++)
        comm->uses[rank] = (fst_comm_use){.comm = comm, .rank = rank};
    fst_peers_set_fake(&calls);
    return comm;
}

void fake_comm_free(fake_comm *comm) {
    int used = 0;
    fst_peers_set_fake(NULL);
    for (unsigned rank = 0; rank < comm->ranks; rank++) used += comm->uses[rank].used;
    for (int i = 0; i < MOST_GATHERS; i++) free(comm->gathers[i].parts);
    pthread_mutex_destroy(&comm->lock);
    free(comm);
    if (used) test_fail(__FILE__, __LINE__, "%d ranks have the communicator in use", used);
}

void *fake_comm_rank(fake_comm *comm, unsigned rank) { return &comm->uses[rank]; }
unsigned fake_comm_gathers(const fake_comm *comm, unsigned rank) { return comm->uses[rank].gathers; }
