/* Ranks that share the reading: what they agree on, rounds of parts, ranks that fail, are late or never come.
 * Over MPI itself: tests/mpi. */
#include "peers.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fake_comm.h"
#include "harness.h"
#include "os.h"
#include "support.h"

enum { RANKS = 3 };

static fst_peers_options options_of(fake_comm *comm, unsigned rank) {
    return (fst_peers_options){
        .kind = FST_COMM_MPI, .comm = fake_comm_rank(comm, rank), .gpu = fst_gpu_cpu(), .timeout_ms = 5000};
}

static fst_peers *open_rank(fake_comm *comm, unsigned rank, unsigned timeout_ms) {
    fst_peers_options options = options_of(comm, rank);
    fst_peers *peers;
    fst_error error;
    options.timeout_ms = timeout_ms;
    if (fst_peers_open(&options, &peers, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK_INT(rank, fst_peers_rank(peers));
    return peers;
}

/* A function of a rank, in a thread for each. */
typedef struct rank_run {
    fake_comm *comm;
    unsigned rank;
    void (*run)(struct rank_run *);
    fst_status mine; /* what goes in, and */
    uint64_t word;
    fst_status status; /* what comes out */
    fst_error error;
    unsigned begun;
} rank_run;

static void *rank_main(void *arg) {
    rank_run *r = arg;
    r->run(r);
    return NULL;
}

static void run_ranks(rank_run *runs, fake_comm *comm, void (*run)(rank_run *)) {
    pthread_t threads[RANKS];
    for (unsigned rank = 0; rank < RANKS; rank++) {
        runs[rank].comm = comm, runs[rank].rank = rank, runs[rank].run = run;
        CHECK_INT(0, pthread_create(&threads[rank], NULL, rank_main, &runs[rank]));
    }
    for (unsigned rank = 0; rank < RANKS; rank++) pthread_join(threads[rank], NULL);
}

static unsigned char byte_of(unsigned round, unsigned rank, size_t i) {
    return (unsigned char)(round * 31 + rank * 101 + i * 7 + i / 251);
}

/* ---- Agreeing ---------------------------------------------------------------------------------- */

static void agree(rank_run *r) {
    fst_peers *peers = NULL;
    fst_peers_options options = options_of(r->comm, r->rank);
    uint64_t words[2] = {r->word, 77};
    strcpy(r->error.text, "untouched");
    r->status = fst_peers_open(&options, &peers, &r->error);
    if (r->status == FST_OK) r->status = fst_peers_agree(peers, r->mine, words, 2, &r->error);
    fst_peers_close(peers);
}

TEST(peers, ranks_that_plan_the_same_agree) {
    fake_comm *comm = fake_comm_new(RANKS, &(fake_comm_options){.late = 3});
    rank_run runs[RANKS] = {{.word = 5}, {.word = 5}, {.word = 5}};
    run_ranks(runs, comm, agree);
    for (int i = 0; i < RANKS; i++) CHECK_INT(FST_OK, runs[i].status);
    fake_comm_free(comm);
}

TEST(peers, a_rank_that_plans_otherwise_is_named_on_every_rank) {
    fake_comm *comm = fake_comm_new(RANKS, NULL);
    rank_run runs[RANKS] = {{.word = 5}, {.word = 5}, {.word = 6}};
    run_ranks(runs, comm, agree);
    for (int i = 0; i < RANKS; i++) {
        CHECK_INT(FST_E_ARG, runs[i].status);
        CHECK(strstr(runs[i].error.text, "rank 2 of 3") != NULL);
    }
    fake_comm_free(comm);
}

TEST(peers, a_rank_that_failed_says_so_and_nobody_waits) {
    fake_comm *comm = fake_comm_new(RANKS, NULL);
    rank_run runs[RANKS] = {{.word = 5}, {.word = 0, .mine = FST_E_IO}, {.word = 5}};
    run_ranks(runs, comm, agree);
    CHECK_INT(FST_E_IO, runs[1].status); /* its own error stays */
    CHECK_STR("untouched", runs[1].error.text);
    for (int i = 0; i < RANKS; i += 2) {
        CHECK_INT(FST_E_PEER, runs[i].status);
        CHECK_INT(FST_E_IO, runs[i].error.code);
        CHECK_STR("rank 1 of 3 failed: FST_E_IO", runs[i].error.text);
    }
    for (int i = 0; i < RANKS; i++) runs[i] = (rank_run){.word = 9}; /* the communicator is in step */
    run_ranks(runs, comm, agree);
    for (int i = 0; i < RANKS; i++) CHECK_INT(FST_OK, runs[i].status);
    fake_comm_free(comm);
}

static void open_as_another(rank_run *r) {
    fst_peers_options options = options_of(r->comm, r->rank);
    fst_peers *peers = NULL;
    options.rank = r->rank, options.ranks = r->rank == 1 ? 4 : RANKS;
    r->status = fst_peers_open(&options, &peers, &r->error);
    if (r->status == FST_OK) r->status = fst_peers_agree(peers, FST_OK, NULL, 0, &r->error);
    else CHECK(peers == NULL);
    fst_peers_close(peers);
}

TEST(peers, options_that_disagree_with_the_communicator) {
    fake_comm *comm = fake_comm_new(RANKS, NULL);
    rank_run runs[RANKS] = {{0}};
    run_ranks(runs, comm, open_as_another);
    CHECK_INT(FST_E_ARG, runs[1].status);
    CHECK_STR("rank 1 of 4 in the options, 1 of 3 in the communicator", runs[1].error.text);
    for (int i = 0; i < RANKS; i += 2) {
        CHECK_INT(FST_E_PEER, runs[i].status);
        CHECK_INT(FST_E_ARG, runs[i].error.code);
    }
    fake_comm_free(comm);
}

/* ---- Rounds ------------------------------------------------------------------------------------ */

enum { ROUNDS = 40, FAILS_AT = 6 };
static const size_t sizes[] = {1, 7, 64, 4095, 30000, 0, 100};
static size_t size_of(unsigned round) { return sizes[round % (sizeof sizes / sizeof *sizes)]; }

static void check_round(const unsigned char *buffer, unsigned round) {
    size_t nbytes = size_of(round);
    for (unsigned rank = 0; rank < RANKS; rank++)
        for (size_t i = 0; i < nbytes; i++)
            if (buffer[rank * nbytes + i] != byte_of(round, rank, i)) {
                test_note(__FILE__, __LINE__, "round %u, rank %u, byte %zu", round, rank, i);
                return;
            }
}

/* As a load does: a ring of buffers, each of which is looked at before it is used again. */
static void run_rounds(rank_run *r) {
    unsigned char *buffer[FST_PEERS_DEPTH];
    unsigned seen = 0;
    fst_peers *peers = open_rank(r->comm, r->rank, 5000);
    strcpy(r->error.text, "untouched");
    for (int i = 0; i < FST_PEERS_DEPTH; i++) buffer[i] = malloc(RANKS * 30000);
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned char *memory = buffer[round % FST_PEERS_DEPTH];
        /* Rank 1 looks more often than it must. */
        int done = seen + FST_PEERS_DEPTH == round || (r->rank == 1 && seen < round);
        while (done) {
            fst_status status = seen + FST_PEERS_DEPTH == round ? fst_peers_wait(peers, NULL)
                                                                : fst_peers_test(peers, &done, NULL);
            if (done && !status) check_round(buffer[seen % FST_PEERS_DEPTH], seen);
            seen += done != 0;
            if (seen == round || r->rank != 1) done = 0;
        }
        memset(memory, 0, RANKS * 30000);
        for (size_t i = 0; i < size_of(round); i++)
            memory[r->rank * size_of(round) + i] = byte_of(round, r->rank, i);
        fst_status mine = round >= FAILS_AT ? r->mine : FST_OK;
        if (fst_peers_begin(peers, memory, size_of(round), NULL, mine, NULL)) break;
        r->begun++;
    }
    r->status = fst_peers_finish(peers, &r->error);
    for (; r->status == FST_OK && seen < ROUNDS; seen++) check_round(buffer[seen % FST_PEERS_DEPTH], seen);
    fst_peers_close(peers);
    for (int i = 0; i < FST_PEERS_DEPTH; i++) free(buffer[i]);
}

TEST(peers, every_part_reaches_every_rank) {
    for (unsigned late = 0; late < 4; late += 3) {
        fake_comm *comm = fake_comm_new(RANKS, &(fake_comm_options){.late = late});
        rank_run runs[RANKS] = {{0}};
        run_ranks(runs, comm, run_rounds);
        for (int i = 0; i < RANKS; i++) {
            CHECK_INT(FST_OK, runs[i].status);
            CHECK_INT(ROUNDS, runs[i].begun);
        }
        fake_comm_free(comm);
    }
}

/* Each rank sees it at another time; none may begin a round that another does not. */
TEST(peers, rounds_end_at_the_same_one_everywhere_after_a_failure) {
    for (unsigned late = 0; late < 4; late += 3) {
        fake_comm *comm = fake_comm_new(RANKS, &(fake_comm_options){.late = late});
        rank_run runs[RANKS] = {{0}, {0}, {.mine = FST_E_CHANGED}};
        run_ranks(runs, comm, run_rounds);
        CHECK_INT(FST_E_CHANGED, runs[2].status);
        CHECK_STR("untouched", runs[2].error.text);
        for (int i = 0; i < RANKS; i++) {
            CHECK_INT(FAILS_AT + FST_PEERS_DEPTH, runs[i].begun);
            CHECK_INT(fake_comm_gathers(comm, 0), fake_comm_gathers(comm, (unsigned)i));
            if (i == 2) continue;
            CHECK_INT(FST_E_PEER, runs[i].status);
            CHECK_INT(FST_E_CHANGED, runs[i].error.code);
            CHECK_STR("rank 2 of 3 failed: FST_E_CHANGED", runs[i].error.text);
        }
        for (int i = 0; i < RANKS; i++) runs[i] = (rank_run){0};
        run_ranks(runs, comm, agree);
        for (int i = 0; i < RANKS; i++) CHECK_INT(FST_OK, runs[i].status);
        fake_comm_free(comm);
    }
}

TEST(peers, an_error_of_the_transport_is_lost_for_good) {
    fake_comm *comm = fake_comm_new(2, &(fake_comm_options){.fail_rank = 0, .fail_at = 2});
    fst_peers *peers = open_rank(comm, 0, 5000);
    unsigned char memory[2] = {0};
    uint64_t words[16] = {0};
    fst_error error;
    CHECK_INT(FST_E_PEER, fst_peers_begin(peers, memory, 1, NULL, FST_OK, &error));
    CHECK_STR("rank 0 of 2: FAKE: made to fail", error.text);
    CHECK_INT(0, error.code);
    CHECK_INT(FST_E_PEER, fst_peers_begin(peers, memory, 1, NULL, FST_OK, &error));
    CHECK_INT(FST_E_PEER, fst_peers_agree(peers, FST_E_IO, NULL, 0, &error));
    CHECK_INT(FST_E_PEER, fst_peers_finish(peers, &error));
    CHECK_STR("rank 0 of 2: FAKE: made to fail", error.text);
    CHECK(fst_peers_busy(peers)); /* the words of the round were sent */
    fst_peers_close(peers);
    CHECK_INT(1, fake_comm_gathers(comm, 0));
    fst_comm_request request; /* the other rank comes to it */
    CHECK_INT(0, fake_comm_calls->gather(fake_comm_rank(comm, 1), words, sizeof words / 2, NULL, &request));
    fst_peers_options options = options_of(comm, 0);
    CHECK_INT(FST_E_PEER, fst_peers_open(&options, &peers, &error));
    CHECK_STR("FAKE: out of step", error.text);
    CHECK(peers == NULL);
    fake_comm_free(comm);
}

/* ---- Ranks that do not come --------------------------------------------------------------------- */

static int released;
static void release(void *arg) { released += *(int *)arg; }

TEST(peers, a_rank_that_does_not_come_is_not_waited_for) {
    fake_comm *comm = fake_comm_new(2, NULL);
    fst_peers *peers = open_rank(comm, 0, 60);
    unsigned char memory[20] = {0};
    int done, one = 1;
    fst_error error;
    released = 0;
    CHECK_INT(FST_OK, fst_peers_begin(peers, memory, 10, NULL, FST_OK, &error));
    CHECK_INT(FST_OK, fst_peers_test(peers, &done, &error));
    CHECK_INT(0, done);
    double from = fst_os_now();
    CHECK_INT(FST_E_PEER, fst_peers_wait(peers, &error));
    CHECK(fst_os_now() - from > 0.05 && fst_os_now() - from < 10);
    CHECK_STR("rank 0 of 2 waited 60 ms for the others' data, round 0: a rank did not come, or went away",
              error.text);
    CHECK_INT(0, error.code);
    CHECK_INT(FST_E_PEER, fst_peers_test(peers, &done, &error));
    CHECK_INT(FST_E_PEER, fst_peers_agree(peers, FST_OK, NULL, 0, &error));
    /* Its memory waits for the rank, however late that comes. */
    CHECK(fst_peers_busy(peers));
    fst_peers_keep(peers, release, &one);
    fst_peers_keep(peers, release, &one);
    fst_peers_close(peers);
    peers = open_rank(comm, 1, 60);
    CHECK_INT(0, released);
    CHECK_INT(FST_OK, fst_peers_begin(peers, memory, 10, NULL, FST_OK, &error));
    CHECK_INT(FST_OK, fst_peers_finish(peers, &error));
    fst_peers_close(peers);
    peers = open_rank(comm, 1, 60);
    CHECK_INT(2, released);
    fst_peers_close(peers);
    fake_comm_free(comm);
}

TEST(peers, agreeing_does_not_wait_for_ever_either) {
    fake_comm *comm = fake_comm_new(2, NULL);
    fst_peers *peers = open_rank(comm, 1, 30);
    fst_error error;
    CHECK_INT(FST_E_PEER, fst_peers_agree(peers, FST_OK, NULL, 0, &error));
    CHECK_STR("rank 1 of 2 waited 30 ms for the others' plans, round 0: a rank did not come, or went away",
              error.text);
    fst_peers_close(peers);
    peers = open_rank(comm, 0, 30); /* too late for that one */
    CHECK_INT(FST_OK, fst_peers_agree(peers, FST_OK, NULL, 0, &error));
    fst_peers_close(peers);
    fst_peers_close(open_rank(comm, 0, 30));
    fake_comm_free(comm);
}

/* The other rank is a round further: nothing that it says is meant for this one. */
TEST(peers, a_communicator_out_of_step_is_noticed) {
    fake_comm *comm = fake_comm_new(2, NULL);
    fst_peers *one = open_rank(comm, 0, 1000), *two = open_rank(comm, 1, 1000);
    fst_comm_request request;
    uint64_t words[16] = {0};
    unsigned char memory[2] = {0};
    fst_error error;
    words[8] = 1ull << 32;
    /* Somebody else's gather of the same size, on the same communicator. */
    CHECK_INT(0, fake_comm_calls->gather(fake_comm_rank(comm, 1), words, 64, NULL, &request));
    CHECK_INT(FST_OK, fst_peers_begin(one, memory, 0, NULL, FST_OK, &error));
    CHECK_INT(FST_E_PEER, fst_peers_wait(one, &error));
    CHECK_STR("rank 1 of 2 is not in round 0 as rank 0 is: something else uses the communicator", error.text);
    CHECK_INT(0, error.code);
    fst_peers_close(one);
    fst_peers_close(two);
    fake_comm_free(comm);
}

/* ---- What cannot be opened ----------------------------------------------------------------------- */

static void check_refused(const fst_peers_options *options, const char *text) {
    fst_peers *peers = (fst_peers *)&released;
    fst_error error;
    CHECK_INT(FST_E_ARG, fst_peers_open(options, &peers, &error));
    CHECK(peers == NULL);
    CHECK_STR(text, error.text);
}

TEST(peers, communicators_that_are_none) {
    int comm;
    fst_peers_options options = {.kind = FST_COMM_MPI, .gpu = fst_gpu_cpu()};
    fst_gpu gpu = {.label = "fake:0", .dlpack_type = 2};
    check_refused(&options, "comm_kind is set, comm is NULL");
    options.kind = FST_COMM_NONE;
    fst_peers *peers = (fst_peers *)&released;
    CHECK_INT(FST_OK, fst_peers_open(&options, &peers, NULL));
    CHECK(peers == NULL); /* nothing is wrong with that: each for itself */
    options.comm = &comm, options.kind = FST_COMM_NONE;
    check_refused(&options, "comm_kind 0: want FST_COMM_NCCL or _MPI");
    options.kind = (fst_comm_kind)3;
    check_refused(&options, "comm_kind 3: want FST_COMM_NCCL or _MPI");
    options.kind = FST_COMM_NCCL;
    check_refused(&options, "NCCL's communicators are for GPUs, this is the CPU");
    options.kind = FST_COMM_MPI, options.gpu = &gpu;
    check_refused(&options, "MPI's communicators are for the CPU, this is fake:0");
}

TEST(peers, memory_that_runs_out) {
    fake_comm *comm = fake_comm_new(2, NULL);
    fst_peers_options options = options_of(comm, 0);
    fst_peers *peers;
    fst_error error;
    fake_os_begin(&(fake_os_options){.fail_at = 1, .kind = FAKE_OS_NEEDED, .error = 12});
    CHECK_INT(FST_E_MEMORY, fst_peers_open(&options, &peers, &error));
    CHECK(peers == NULL);
    fake_os_end();
    CHECK_INT(0, fake_comm_gathers(comm, 0));
    fake_comm_free(comm);
}
