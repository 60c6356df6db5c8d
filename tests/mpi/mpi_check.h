/* What fails says so, and ends all ranks. */
#ifndef FST_TESTS_MPI_CHECK_H
#define FST_TESTS_MPI_CHECK_H

#include <mpi.h>
#include <stdio.h>

static int rank;

#define CHECK(condition, ...)                                                              \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: rank %d: %s: ", __FILE__, __LINE__, rank, #condition); \
            fprintf(stderr, __VA_ARGS__);                                                  \
            fputc('\n', stderr);                                                           \
            MPI_Abort(MPI_COMM_WORLD, 1);                                                  \
        }                                                                                  \
    } while (0)

#endif
