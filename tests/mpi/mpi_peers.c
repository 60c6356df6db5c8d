/* Ranks that share the reading, over MPI itself: mpirun -n 4 fst_mpi_tests CASE. What fails says so and ends all
 * ranks; what hangs is ended by the alarm. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mpi_check.h"
#include "os.h"
#include "peers.h"

enum { RANKS = 4, ROUNDS = 60, LARGEST = 70000 };
static MPI_Comm comm; /* the case's own */

#define CHECK_ERROR(want_status, want_code, want_text, status, error)                                    \
    CHECK((status) == (want_status) && (error)->code == (want_code) && strstr((error)->text, want_text), \
          "%s, code %d: %s", fst_status_name(status), (error)->code, (error)->text)

static fst_status try_open(unsigned timeout_ms, fst_peers **out, fst_error *error) {
    fst_peers_options options = {
        .kind = FST_COMM_MPI, .comm = &comm, .gpu = fst_gpu_cpu(), .timeout_ms = timeout_ms};
    return fst_peers_open(&options, out, error);
}

static fst_peers *open_peers(unsigned timeout_ms) {
    fst_peers *peers;
    fst_error error;
    fst_status status = try_open(timeout_ms, &peers, &error);
    CHECK(status == FST_OK, "%s", error.text);
    CHECK(fst_peers_rank(peers) == (unsigned)rank && fst_peers_count(peers) == RANKS, "another place");
    return peers;
}

static unsigned char byte_of(unsigned round, unsigned of, size_t i) {
    return (unsigned char)(round * 31 + of * 101 + i * 7 + i / 251);
}

static size_t size_of(unsigned round) {
    static const size_t sizes[] = {1, 8, 4096, 0, LARGEST, 333, 12345};
    return sizes[round % 7];
}

static void fill(unsigned char *buffer, unsigned round) {
    memset(buffer, 0, (size_t)RANKS * LARGEST);
    for (size_t i = 0; i < size_of(round); i++)
        buffer[(size_t)rank * size_of(round) + i] = byte_of(round, (unsigned)rank, i);
}

static void check(const unsigned char *buffer, unsigned round) {
    for (unsigned of = 0; of < RANKS; of++)
        for (size_t i = 0; i < size_of(round); i++)
            CHECK(buffer[of * size_of(round) + i] == byte_of(round, of, i), "round %u, of %u, byte %zu",
                  round, of, i);
}

/* ---- Cases -------------------------------------------------------------------------------------- */

static unsigned char *buffers[FST_PEERS_DEPTH];

/* A load's rounds, in which one rank may fail. How many were begun. */
static unsigned rounds(fst_peers *peers, int failing, unsigned fails_at, fst_status *status,
                       fst_error *error) {
    unsigned round, seen = 0;
    fst_status came;
    for (int i = 0; i < FST_PEERS_DEPTH; i++)
        if (!buffers[i]) buffers[i] = malloc((size_t)RANKS * LARGEST);
    for (round = 0; round < ROUNDS; round++) {
        unsigned char *buffer = buffers[round % FST_PEERS_DEPTH];
        /* Rank 2 looks more often than it must. */
        while (seen + FST_PEERS_DEPTH == round || (rank == 2 && seen < round)) {
            int done = 1;
            came = seen + FST_PEERS_DEPTH == round ? fst_peers_wait(peers, NULL)
                                                   : fst_peers_test(peers, &done, NULL);
            if (!done) break;
            if (came == FST_OK) check(buffers[seen % FST_PEERS_DEPTH], seen);
            seen++;
        }
        fill(buffer, round);
        fst_status mine = rank == failing && round >= fails_at ? FST_E_IO : FST_OK;
        if (fst_peers_begin(peers, buffer, size_of(round), NULL, mine, NULL)) break;
    }
    *status = fst_peers_finish(peers, error);
    for (; *status == FST_OK && seen < ROUNDS; seen++) check(buffers[seen % FST_PEERS_DEPTH], seen);
    return round;
}

static void parts_reach_every_rank(void) {
    uint64_t words[] = {1, 2, 3};
    fst_peers *peers = open_peers(5000);
    fst_status status = fst_peers_agree(peers, FST_OK, words, 3, NULL);
    fst_error error;
    CHECK(status == FST_OK, "%s", fst_status_name(status));
    CHECK(rounds(peers, -1, 0, &status, &error) == ROUNDS, "too few");
    CHECK(status == FST_OK, "%s", error.text);
    fst_peers_close(peers);
}

/* The communicator has its own way with errors afterwards, and can be used again, after a failure too. */
static void a_rank_that_cannot_read(void) {
    MPI_Errhandler handler;
    fst_status status;
    fst_error error;
    for (int turn = 0; turn < 2; turn++) {
        fst_peers *peers = open_peers(5000);
        CHECK(rounds(peers, turn, 5, &status, &error) == 5 + FST_PEERS_DEPTH, "another number of rounds");
        if (rank == turn) CHECK(status == FST_E_IO, "%s", fst_status_name(status));
        else
            CHECK_ERROR(FST_E_PEER, FST_E_IO, turn ? "rank 1 of 4 failed" : "rank 0 of 4 failed", status,
                        &error);
        CHECK(!fst_peers_busy(peers), "busy");
        fst_peers_close(peers);
        MPI_Comm_get_errhandler(comm, &handler);
        CHECK(handler == MPI_ERRORS_ARE_FATAL, "another error handler");
        MPI_Errhandler_free(&handler);
    }
    parts_reach_every_rank();
}

static void a_rank_that_cannot_plan(void) {
    fst_peers *peers = open_peers(5000);
    uint64_t hash = 99;
    fst_error error;
    fst_status status = fst_peers_agree(peers, rank == 2 ? FST_E_JSON : FST_OK, &hash, rank != 2, &error);
    if (rank == 2) CHECK(status == FST_E_JSON, "%s", fst_status_name(status));
    else CHECK_ERROR(FST_E_PEER, FST_E_JSON, "rank 2 of 4 failed: FST_E_JSON", status, &error);
    fst_peers_close(peers);
    parts_reach_every_rank();
}

static void a_rank_that_plans_otherwise(void) {
    fst_peers *peers = open_peers(5000);
    uint64_t hash = 99 + (rank == 3);
    fst_error error;
    fst_status status = fst_peers_agree(peers, FST_OK, &hash, 1, &error);
    CHECK_ERROR(FST_E_ARG, 0, "rank 3 of 4 has other files or options", status, &error);
    for (unsigned of = 0; of < RANKS; of++)
        CHECK(fst_peers_words(peers, of)[0] == 99 + (of == 3), "words of rank %u", of);
    fst_peers_close(peers);
    parts_reach_every_rank();
}

static void another_size_in_the_options(void) {
    fst_peers_options options = {
        .kind = FST_COMM_MPI, .comm = &comm, .gpu = fst_gpu_cpu(), .timeout_ms = 5000};
    fst_peers *peers;
    fst_error error;
    options.rank = (unsigned)rank, options.ranks = rank == 0 ? 8 : RANKS;
    fst_status status = fst_peers_open(&options, &peers, &error);
    if (rank == 0) CHECK_ERROR(FST_E_ARG, 0, "rank 0 of 8 in the options, 0 of 4", status, &error);
    else CHECK(status == FST_OK, "%s", error.text);
    if (rank) status = fst_peers_agree(peers, FST_OK, NULL, 0, &error);
    if (rank) CHECK_ERROR(FST_E_PEER, FST_E_ARG, "rank 0 of 4 failed: FST_E_ARG", status, &error);
    fst_peers_close(peers);
    parts_reach_every_rank();
}

static void a_rank_that_sleeps(void) {
    fst_peers *peers = open_peers(5000);
    fst_status status;
    fst_error error;
    if (rank == 1) usleep(300000); /* not too long */
    CHECK(rounds(peers, -1, 0, &status, &error) == ROUNDS && status == FST_OK, "%s", error.text);
    fst_peers_close(peers);
}

static void count(void *arg) { ++*(int *)arg; }

/* The others time out. What MPI may still write to is kept until the rank comes after all. */
static void sleep_or_leave(int agreed) {
    static unsigned char late[RANKS * 1000];
    fst_peers *peers = open_peers(agreed ? 800 : 200); /* not so little that those who come are late */
    int released = 0;
    fst_error error;
    fst_status status = agreed ? fst_peers_agree(peers, FST_OK, NULL, 0, &error) : FST_OK;
    CHECK(status == FST_OK, "%s", error.text);
    if (rank != 3) {
        double from = fst_os_now();
        status = agreed ? fst_peers_begin(peers, late, 1000, NULL, FST_OK, &error) : FST_OK;
        CHECK(status == FST_OK, "%s", error.text);
        status = agreed ? fst_peers_wait(peers, &error) : fst_peers_agree(peers, FST_OK, NULL, 0, &error);
        CHECK_ERROR(FST_E_PEER, 0,
                    agreed ? "of 4 waited 800 ms for the others' data"
                           : "of 4 waited 200 ms for the others' plans",
                    status, &error);
        CHECK(fst_os_now() - from < 10, "%.2f s", fst_os_now() - from);
        CHECK(fst_peers_busy(peers), "not busy");
        fst_peers_keep(peers, count, &released);
        fst_peers_close(peers);
        status = try_open(200, &peers, &error);
        CHECK_ERROR(FST_E_PEER, 0, "out of step", status, &error);
        CHECK(released == 0, "memory was freed that MPI writes to");
        MPI_Barrier(MPI_COMM_WORLD);
    } else {
        MPI_Barrier(MPI_COMM_WORLD); /* it is elsewhere until the others have gone */
        status = agreed ? fst_peers_begin(peers, late, 1000, NULL, FST_OK, &error) : FST_OK;
        CHECK(status == FST_OK, "%s", error.text);
        status = agreed ? fst_peers_finish(peers, &error) : fst_peers_agree(peers, FST_OK, NULL, 0, &error);
        CHECK(status == FST_OK || status == FST_E_PEER, "%s", fst_status_name(status));
        fst_peers_close(peers);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    for (int turn = 0; turn < 200 && rank != 3 && !released; turn++) {
        if (try_open(200, &peers, &error) == FST_OK) fst_peers_close(peers);
        usleep(1000);
    }
    CHECK(released == (rank != 3), "released %d times", released);
    MPI_Comm_dup(MPI_COMM_WORLD, &comm); /* the old one is left as it is: nobody may use it */
    parts_reach_every_rank();
}

static void a_rank_that_sleeps_too_long(void) { sleep_or_leave(1); }
static void a_rank_that_never_began(void) { sleep_or_leave(0); }

/* It believes to be done, while the others are at a round. Its next load is not taken for that round. */
static void a_rank_that_returns_early(void) {
    fst_peers *peers = open_peers(800);
    fst_error error;
    fst_status status = fst_peers_agree(peers, FST_OK, NULL, 0, &error);
    CHECK(status == FST_OK, "%s", error.text);
    if (rank != 3) {
        status = fst_peers_begin(peers, &rank, 0, NULL, FST_OK, &error);
        CHECK(status == FST_OK, "%s", error.text);
        status = fst_peers_finish(peers, &error);
        CHECK_ERROR(FST_E_PEER, 0, "of 4 waited 800 ms for the others' data, round 1", status, &error);
    }
    fst_peers_close(peers);
    MPI_Barrier(MPI_COMM_WORLD);
    status = try_open(800, &peers, &error);
    if (rank != 3) {
        CHECK_ERROR(FST_E_PEER, 0, "out of step", status, &error);
        return;
    }
    CHECK(status == FST_OK, "%s", error.text);
    status = fst_peers_agree(peers, FST_OK, NULL, 0, &error);
    CHECK_ERROR(FST_E_PEER, 0, "something else uses the communicator", status, &error);
    fst_peers_close(peers);
}

/* ---- Without MPI, or with too little of it ------------------------------------------------------ */

static void expect_refusal(const char *text) {
    fst_peers *peers;
    fst_error error;
    fst_status status = try_open(100, &peers, &error);
    if (status == FST_E_ARG && strstr(error.text, text) && !peers) return;
    fprintf(stderr, "want \"%s\", got %s: %s\n", text, fst_status_name(status), error.text);
    exit(1);
}

static int not_initialised_or_finalised(void) {
    comm = MPI_COMM_WORLD;
    expect_refusal("MPI: it is not initialised");
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &(int){0});
    comm = MPI_COMM_NULL;
    expect_refusal("MPI: the communicator is MPI_COMM_NULL");
    MPI_Finalize();
    expect_refusal("MPI: it is finalised");
    return 0;
}

static int one_thread_alone(void) {
    int level;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_SINGLE, &level);
    comm = MPI_COMM_WORLD;
    if (level == MPI_THREAD_SINGLE) expect_refusal("MPI_Init_thread with MPI_THREAD_FUNNELED");
    MPI_Finalize();
    return 0;
}

#define CASE(name) \
    { #name, name }
static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    CASE(parts_reach_every_rank),      CASE(a_rank_that_cannot_read),   CASE(a_rank_that_cannot_plan),
    CASE(a_rank_that_plans_otherwise), CASE(a_rank_that_sleeps),        CASE(another_size_in_the_options),
    CASE(a_rank_that_sleeps_too_long), CASE(a_rank_that_returns_early), CASE(a_rank_that_never_began),
};

int main(int argc, char **argv) {
    int ranks, level, found = 0;
    alarm(20);
    if (argc != 2) return 2;
    if (strcmp(argv[1], "not_initialised_or_finalised") == 0) return not_initialised_or_finalised();
    if (strcmp(argv[1], "one_thread_alone") == 0) return one_thread_alone();
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    CHECK(ranks == RANKS, "%d ranks", ranks);
    MPI_Comm_dup(MPI_COMM_WORLD, &comm);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (strcmp(argv[1], cases[i].name) == 0) cases[i].run(), found = 1;
    CHECK(found, "no case %s", argv[1]);
    for (int i = 0; i < FST_PEERS_DEPTH; i++) free(buffers[i]);
    MPI_Barrier(MPI_COMM_WORLD);
    MPI_Finalize();
    return 0;
}
