/* Loads whose ranks share the reading, over MPI itself: mpirun -n 4 fst_mpi_load CASE DIRECTORY. What fails says so and ends
 * all ranks; what hangs is ended by the alarm. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fst.h"
#include "mpi_check.h"
#include "shared.h"

enum { RANKS = 4, ROWS = 700, COLS = 900 };
static MPI_Comm comm;
static char path[4096];

/* Two matrices of U16 that count up: one is cut by rows, one by columns. */
static void write_file(void) {
    char header[512];
    size_t bytes = (size_t)ROWS * COLS * 2;
    int length = snprintf(
        header, sizeof header,
        "{\"rows\":{\"dtype\":\"U16\",\"shape\":[%d,%d],\"data_offsets\":[0,%zu]},\"cols\":{\"dtype\":\"U16\","
        "\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}}",
        ROWS, COLS, bytes, ROWS, COLS, bytes, 2 * bytes);
    uint64_t size = (uint64_t)length;
    FILE *file = fopen(path, "wb");
    CHECK(file, "%s", path);
    fwrite(&size, 8, 1, file);
    fwrite(header, 1, (size_t)length, file);
    for (int tensor = 0; tensor < 2; tensor++)
        for (unsigned i = 0; i < ROWS * COLS; i++) {
            uint16_t value = (uint16_t)(i * 7 + (unsigned)tensor);
            fwrite(&value, 2, 1, file);
        }
    CHECK(fclose(file) == 0, "writing");
}

static fst_status load(unsigned timeout_ms, fst_model **model, fst_stats *stats, fst_error *error) {
    static const fst_shard_rule rules[] = {{"rows", 0, 1}, {"cols", 1, 1}, {NULL, 0, 0}};
    const char *files[] = {path, NULL};
    fst_options options = FST_OPTIONS_INIT;
    options.device = FST_DEVICE_CPU;
    options.threads = 2;
    options.slot_bytes = 64 << 10;
    options.shards = rules;
    options.comm_kind = FST_COMM_MPI;
    options.comm = &comm;
    options.timeout_ms = timeout_ms;
    fst_status status = fst_load(files, &options, model, error);
    if (!status) fst_model_stats(*model, stats);
    return status;
}

static void every_rank_gets_its_part(void) {
    fst_model *model;
    fst_error error;
    fst_stats stats = {.size = sizeof stats};
    uint64_t mine, all = 0, begin, end;
    CHECK(load(10000, &model, &stats, &error) == FST_OK, "%s", error.text);
    for (int tensor = 0; tensor < 2; tensor++) {
        fst_tensor t;
        CHECK(fst_model_find(model, tensor ? "cols" : "rows", &t) == FST_OK, "no tensor");
        fst_shard_range(tensor ? COLS : ROWS, 1, (unsigned)rank, RANKS, &begin, &end);
        CHECK(t.shape[tensor] == end - begin, "%llu", (unsigned long long)t.shape[tensor]);
        const uint16_t *data = t.data;
        for (uint64_t r = 0; r < t.shape[0]; r++)
            for (uint64_t c = 0; c < t.shape[1]; c++) {
                uint64_t i = tensor ? r * COLS + c + begin : (r + begin) * COLS + c;
                CHECK(data[r * t.shape[1] + c] == (uint16_t)(i * 7 + (uint64_t)tensor),
                      "tensor %d, %llu, %llu", tensor, (unsigned long long)r, (unsigned long long)c);
            }
    }
    mine = stats.bytes_read;
    MPI_Allreduce(&mine, &all, 1, MPI_UINT64_T, MPI_SUM, comm);
    /* The file once, and its header for each. */
    CHECK(all < (uint64_t)4 * ROWS * COLS + RANKS * 4096, "%llu bytes were read", (unsigned long long)all);
    fst_model_free(model);
}

/* The last rank does not load. */
static void a_rank_that_returns_early(void) {
    fst_model *model;
    fst_error error;
    fst_stats stats = {.size = sizeof stats};
    if (rank == RANKS - 1) return;
    CHECK(load(500, &model, &stats, &error) == FST_E_PEER, "no error");
    CHECK(error.code == 0 && model == NULL, "%s", error.text);
}

static void a_rank_that_sleeps(void) {
    fst_model *model = NULL;
    fst_error error;
    fst_stats stats = {.size = sizeof stats};
    if (rank == 1) sleep(2);
    CHECK(load(500, &model, &stats, &error) == FST_E_PEER, "no error");
    CHECK(model == NULL, "a model");
}

int main(int argc, char **argv) {
    int level;
    alarm(25);
    if (argc != 3) return 2;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_dup(MPI_COMM_WORLD, &comm);
    snprintf(path, sizeof path, "%s/fst-mpi-load-%s.safetensors", argv[2], argv[1]);
    if (rank == 0) write_file();
    MPI_Barrier(comm);
    fst_shared_unit = 16 << 10;
    if (strcmp(argv[1], "every_rank_gets_its_part") == 0) every_rank_gets_its_part();
    else if (strcmp(argv[1], "a_rank_that_returns_early") == 0) a_rank_that_returns_early();
    else a_rank_that_sleeps();
    fst_release_cached();
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) remove(path);
    MPI_Finalize();
    return 0;
}
