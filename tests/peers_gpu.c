/* Ranks that share the reading, on GPUs: NCCL (tests/nccl is in its place) and a device that runs late. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"
#include "nccl/fake_nccl.h"
#include "os.h"
#include "peers.h"
#include "status.h"
#include "support.h"

enum { RANKS = 3, OWN = 1, MOST_ROUNDS = 32, SLOT = 1 + FST_PEERS_WORDS, PART = 5000 };

/* Rank 1 of 3. What the others send is known beforehand. */
static struct {
    fake_nccl comm; /* first */
    uint64_t words[MOST_ROUNDS][SLOT];
    unsigned char parts[RANKS][PART];
    atomic_uint rounds;
    int fail_at; /* the so-manieth gather fails */
    int fail_round, fail_with;
    int states, in_progress, state; /* what the communicator says: so often that it is at it, then this */
    atomic_int gathers, blocks, stuck, aborts; /* a gather does not return; no event comes */
} ring;

static fst_gpu gpu;
static fst_gpu_calls gpu_calls;
static int (*real_query)(const fst_gpu *, fst_event);

static int query(const fst_gpu *which, fst_event event) {
    return ring.stuck ? FST_GPU_NOT_READY : real_query(which, event);
}

/* In the order of the stream, as NCCL does it. */
static int all_gather(fake_nccl *comm, const void *send, void *receive, size_t count, int type,
                      void *stream) {
    unsigned char *to = receive;
    int code = 0;
    if (type != 0 || send != to + OWN * count || comm != &ring.comm) return 4;
    while (ring.blocks && !ring.aborts) usleep(100);
    if (ring.aborts || ++ring.gathers == ring.fail_at) return 6;
    int words = count == SLOT * sizeof(uint64_t);
    unsigned round = ring.rounds;
    uint64_t *others = ring.words[round % MOST_ROUNDS];
    if (words) {
        others[0] = (uint64_t)round << 32 | (uint64_t)(ring.fail_round == (int)round ? ring.fail_with : 0);
        ring.rounds++;
    }
    for (size_t rank = 0; rank < RANKS && !code; rank++)
        if (rank != OWN)
            code = gpu_calls.copy_on_device(&gpu, stream, to + rank * count,
                                            words ? (void *)others : ring.parts[rank], count);
    return code ? 1 : ring.in_progress ? 7 : 0;
}

static int state(fake_nccl *comm) {
    (void)comm;
    return ring.states++ < ring.in_progress ? 7 : ring.state;
}

static void abort_all(fake_nccl *comm) {
    (void)comm;
    ring.aborts++;
    ring.stuck = 0;
}

static void begin_case(const fake_gpu_options *options, const char *library) {
    char path[512], reason[256];
    const fst_gpu *found;
    fst_error error;
    fake_gpu_begin(options);
    CHECK_INT(FST_OK, fst_gpu_find(FST_DEVICE_GPU(0), &found, reason, sizeof reason, &error));
    gpu = *found, gpu_calls = *found->calls, real_query = found->calls->event_query;
    gpu.calls = &gpu_calls;
    gpu_calls.event_query = query;
    memset(&ring, 0, sizeof ring);
    ring.comm = (fake_nccl){RANKS, OWN, 0, state, all_gather, abort_all};
    for (int i = 0; i < RANKS; i++) support_random(ring.parts[i], PART, (uint64_t)i);
    snprintf(path, sizeof path, "%s%s", FST_TEST_NCCL, library);
    if (!dlopen(path, RTLD_NOW | RTLD_LOCAL)) test_fail(__FILE__, __LINE__, "%s", dlerror());
}

static fst_status open_ring(unsigned timeout_ms, int may_abort, fst_peers **out, fst_error *error) {
    fst_peers_options options = {.kind = FST_COMM_NCCL,
                                 .comm = &ring.comm,
                                 .gpu = &gpu,
                                 .rank = OWN,
                                 .ranks = RANKS,
                                 .timeout_ms = timeout_ms,
                                 .may_abort = may_abort};
    ring.rounds = 0;
    return fst_peers_open(&options, out, error);
}

/* A round after which the parts are copied to `result`, all on one stream and without waiting; then what came is
 * waited for. */
static fst_status one_round(fst_peers *peers, fst_queue stream, unsigned char *memory, fst_status mine,
                            unsigned char *result, fst_error *error) {
    int code = gpu_calls.to_device(&gpu, stream, memory + OWN * PART, ring.parts[OWN], PART);
    fst_status status = code ? fst_gpu_fail(error, &gpu, code, "copying")
                             : fst_peers_begin(peers, memory, PART, stream, mine, error);
    if (status == FST_OK && gpu_calls.to_host(&gpu, stream, result, memory, RANKS * PART))
        status = fst_fail(error, FST_E_DEVICE, 719, NULL, "copying");
    return status;
}

static unsigned char results[FST_PEERS_DEPTH + 3][RANKS * PART];

/* Agrees, then some rounds in one buffer: only the stream keeps them apart. */
static fst_status whole_load(int may_abort, int rounds, fst_error *error) {
    fst_peers *peers = NULL;
    fst_queue stream = NULL;
    void *memory = NULL;
    fst_status status = open_ring(5000, may_abort, &peers, error);
    if (status) return status;
    status = fst_peers_agree(peers, FST_OK, NULL, 0, error);
    int code = status ? 0 : gpu_calls.stream_new(&gpu, &stream);
    if (!status && !code) code = gpu_calls.alloc_block(&gpu, RANKS * PART, &memory);
    if (code) status = fst_gpu_fail(error, &gpu, code, "preparing");
    for (int i = 0; i < rounds && !status; i++)
        status = one_round(peers, stream, memory, FST_OK, results[i], error);
    fst_status end = fst_peers_finish(peers, status ? NULL : error);
    if (stream && gpu_calls.stream_wait(&gpu, stream) && !status && !end)
        end = fst_gpu_fail(error, &gpu, 719, "waiting");
    fst_peers_close(peers);
    if (memory) gpu_calls.free_block(&gpu, memory, RANKS * PART);
    if (stream) gpu_calls.stream_free(&gpu, stream);
    return status ? status : end;
}

TEST(peers_gpu, parts_come_in_the_order_of_the_stream) {
    for (uint64_t seed = 1; seed <= 5; seed++) {
        fst_error error;
        begin_case(&(fake_gpu_options){.seed = seed}, "libnccl.so.2");
        memset(results, 0, sizeof results);
        ring.in_progress = seed == 5 ? 3 : 0; /* a communicator that does not block */
        CHECK_INT(FST_OK, whole_load(0, FST_PEERS_DEPTH + 3, &error));
        for (int i = 0; i < FST_PEERS_DEPTH + 3; i++) CHECK_BYTES(ring.parts, results[i], RANKS * PART);
        CHECK_INT(0, ring.aborts);
        fake_gpu_end();
    }
}

TEST(peers_gpu, a_rank_that_failed_is_named) {
    fst_error error;
    begin_case(&(fake_gpu_options){.seed = 3}, "libnccl.so.2");
    ring.fail_round = 2, ring.fail_with = FST_E_CANCELLED;
    CHECK_INT(FST_E_PEER, whole_load(1, 9, &error));
    CHECK_INT(FST_E_CANCELLED, error.code);
    CHECK_STR("rank 0 of 3 failed: FST_E_CANCELLED", error.text);
    CHECK_INT(0, ring.aborts); /* nothing is wrong with the communicator */
    CHECK_INT(10, ring.rounds);
    fake_gpu_end();
}

TEST(peers_gpu, every_call_of_the_device_can_fail) {
    int at = 0;
    fst_status status;
    do { /* until there are not so many calls */
        fst_error error = {0};
        begin_case(&(fake_gpu_options){.seed = 7, .fail_at = ++at}, "libnccl.so.2");
        status = whole_load(1, 3, &error);
        CHECK_INT(status, error.status);
        if (status) CHECK(status == FST_E_DEVICE || status == FST_E_DEVICE_MEMORY || status == FST_E_PEER);
        if (status == FST_E_PEER) CHECK_INT(0, error.code);
        if (status == FST_E_PEER)
            CHECK(strstr(error.text, "rank 1 of 3: queueing") || strstr(error.text, "NCCL") ||
                  strstr(error.text, "recording") || strstr(error.text, "current"));
        fake_gpu_end();
    } while (status);
    CHECK(at > 40);
}

TEST(peers_gpu, every_gather_can_fail) {
    for (int at = 1; at <= 5; at++) {
        fst_error error;
        begin_case(&(fake_gpu_options){.seed = 7}, "libnccl.so.2");
        ring.fail_at = at;
        CHECK_INT(FST_E_PEER, whole_load(1, 2, &error));
        CHECK_STR("rank 1 of 3: NCCL: remote process exited or there was a network error: connection closed",
                  error.text);
        CHECK_INT(0, error.code);
        CHECK_INT(1, ring.aborts);
        fake_gpu_end();
    }
}

TEST(peers_gpu, a_communicator_that_fails_by_itself) {
    fst_error error;
    begin_case(&(fake_gpu_options){.seed = 7}, "libnccl.so.2");
    ring.stuck = 1;
    ring.state = 6;
    CHECK_INT(FST_E_PEER, whole_load(1, 2, &error));
    CHECK_STR("rank 1 of 3: NCCL: remote process exited or there was a network error: connection closed",
              error.text);
    CHECK_INT(1, ring.aborts);
    fake_gpu_end();
}

static void count(void *arg) { ++*(int *)arg; }

/* What may still be written to, and streams that may be stuck, are kept until the ranks came after all. */
static void check_left_behind(fst_peers *peers) {
    fst_error error;
    int released = 0;
    CHECK(fst_peers_busy(peers));
    fst_peers_keep(peers, count, &released);
    fst_peers_close(peers);
    CHECK_INT(FST_OK, open_ring(1000, 0, &peers, &error));
    CHECK_INT(0, released);
    fst_peers_close(peers);
    ring.blocks = 0;
    ring.stuck = 0;
    for (int turn = 0; turn < 1000 && !released; turn++) { /* a device that runs late */
        usleep(1000);
        CHECK_INT(FST_OK, open_ring(1000, 0, &peers, &error));
        fst_peers_close(peers);
    }
    CHECK_INT(1, released);
    CHECK_INT(0, ring.aborts);
    fake_gpu_end();
}

TEST(peers_gpu, ranks_that_do_not_come_and_no_leave_to_abort) {
    fst_peers *peers;
    fst_error error;
    begin_case(&(fake_gpu_options){.seed = 9}, "libnccl.so.2");
    CHECK_INT(FST_OK, open_ring(50, 0, &peers, &error));
    ring.stuck = 1;
    CHECK_INT(FST_E_PEER, fst_peers_agree(peers, FST_OK, NULL, 0, &error));
    CHECK_STR("rank 1 of 3 waited 50 ms for the others' plans, round 0: a rank did not come, or went away",
              error.text);
    check_left_behind(peers);
}

TEST(peers_gpu, a_gather_that_does_not_even_return) {
    fst_peers *peers;
    fst_error error;
    begin_case(&(fake_gpu_options){.seed = 9}, "libnccl.so.2");
    CHECK_INT(FST_OK, open_ring(50, 0, &peers, &error));
    ring.blocks = 1;
    double from = fst_os_now();
    CHECK_INT(FST_E_PEER, fst_peers_agree(peers, FST_OK, NULL, 0, &error));
    CHECK(fst_os_now() - from < 10);
    check_left_behind(peers);
}

TEST(peers_gpu, aborting_frees_everything) {
    for (int how = 0; how < 3; how++) {
        fst_peers *peers;
        fst_error error;
        begin_case(&(fake_gpu_options){.seed = 9}, "libnccl.so.2");
        CHECK_INT(FST_OK, open_ring(50, 1, &peers, &error));
        if (how == 0) ring.stuck = 1;
        if (how == 1) ring.blocks = 1;
        if (how == 2)
            ring.in_progress = 1 << 30; /* a communicator that does not block, and is at it for ever */
        CHECK_INT(FST_E_PEER, fst_peers_agree(peers, FST_OK, NULL, 0, &error));
        CHECK_INT(1, ring.aborts);
        CHECK_INT(FST_E_PEER, fst_peers_finish(peers, &error));
        CHECK(!fst_peers_busy(peers));
        fst_peers_close(peers);
        CHECK_INT(1, ring.aborts);
        fake_gpu_end();
    }
}

TEST(peers_gpu, a_communicator_of_another_gpu) {
    fst_peers *peers;
    fst_error error;
    begin_case(&(fake_gpu_options){.seed = 9}, "libnccl.so.2");
    ring.comm.device = 5;
    CHECK_INT(FST_E_ARG, open_ring(50, 0, &peers, &error));
    CHECK_STR("NCCL: the communicator is for GPU 5, the load for fake:0", error.text);
    CHECK(peers == NULL);
    fake_gpu_end();
}

TEST(peers_gpu, the_library_is_looked_for_in_the_process) {
    fst_peers *peers;
    fst_error error;
    begin_case(&(fake_gpu_options){.seed = 9}, "libnccl.so.2");
    gpu.dlpack_type = 10; /* AMD */
    CHECK_INT(FST_E_ARG, open_ring(50, 0, &peers, &error));
    CHECK_STR("NCCL: there is no librccl.so.1 in this process that could have made the communicator",
              error.text);
    fake_gpu_end();
    begin_case(&(fake_gpu_options){.seed = 9}, "librccl.so.1");
    gpu.dlpack_type = 10;
    CHECK_INT(FST_OK, open_ring(50, 0, &peers, &error));
    fst_peers_close(peers);
    fake_gpu_end();
}
