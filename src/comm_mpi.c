/* Parts between ranks by MPI, for the CPU device. A module of its own, so that the library starts where there is
 * no MPI. */
#include "comm.h"

#include <limits.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fst_comm_use {
    MPI_Comm comm;
    MPI_Errhandler handler; /* the communicator's own */
};

_Static_assert(sizeof(MPI_Request) <= sizeof(uintptr_t), "a request does not fit");

/* Marks communicators that a load left out of step. */
static int mark = MPI_KEYVAL_INVALID;

/* What this was compiled for: MPIs have the same names for functions, and other types behind them. */
#if defined(OMPI_MAJOR_VERSION)
#define FAMILY "Open MPI"
#elif defined(MVAPICH2_VERSION)
#define FAMILY "MVAPICH"
#elif defined(I_MPI_VERSION)
#define FAMILY "Intel"
#elif defined(MPICH_VERSION)
#define FAMILY "MPICH"
#else
#define FAMILY ""
#endif

/* Why MPI cannot be called, or NULL. */
static const char *unusable(char *why, size_t size) {
    char version[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length, is_so, level = MPI_THREAD_SINGLE, is_main = 0;
    MPI_Get_library_version(version, &length);
    if (!strstr(version, FAMILY)) {
        snprintf(why, size, "the module is built for %s, the program has %.*s", FAMILY,
                 (int)strcspn(version, "\n,"), version);
        return why;
    }
    MPI_Initialized(&is_so);
    if (!is_so) {
        snprintf(why, size, "it is not initialised (%.*s)", (int)strcspn(version, "\n,"), version);
        return why;
    }
    MPI_Finalized(&is_so);
    if (is_so) return "it is finalised";
    MPI_Query_thread(&level);
    if (level == MPI_THREAD_SINGLE)
        return "it was initialised for programs of one thread: MPI_Init_thread with MPI_THREAD_FUNNELED or more";
    MPI_Is_thread_main(&is_main);
    if (level == MPI_THREAD_FUNNELED && !is_main)
        return "with MPI_THREAD_FUNNELED, loads belong into the thread that initialised it";
    return NULL;
}

static void describe(fst_comm_use *use, int code, char *text, size_t size) {
    char all[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    (void)use;
    if (MPI_Error_string(code, all, &length)) snprintf(all, sizeof all, "error %d", code);
    snprintf(text, size, "%s", all);
}

static fst_status refuse(fst_status status, int code, char *why, size_t size) {
    describe(NULL, code, why, size);
    return status;
}

/* The rest of open, with errors returned. */
static fst_status enter(fst_comm_use *use, unsigned *rank, unsigned *ranks, char *why, size_t size) {
    int code, own, count, between = 0, lost = 0;
    void *value;
    if (mark == MPI_KEYVAL_INVALID) {
        code = MPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, MPI_COMM_NULL_DELETE_FN, &mark, NULL);
        if (code) return refuse(FST_E_ARG, code, why, size);
    }
    code = MPI_Comm_test_inter(use->comm, &between);
    if (!code) code = MPI_Comm_get_attr(use->comm, mark, &value, &lost);
    if (!code) code = MPI_Comm_rank(use->comm, &own);
    if (!code) code = MPI_Comm_size(use->comm, &count);
    if (code) return refuse(FST_E_ARG, code, why, size);
    if (between) {
        snprintf(why, size, "the communicator is one between two groups");
        return FST_E_ARG;
    }
    if (lost) {
        snprintf(why, size,
                 "an earlier load was left by a rank: the communicator is out of step, make another");
        return FST_E_PEER;
    }
    *rank = (unsigned)own, *ranks = (unsigned)count;
    return FST_OK;
}

static fst_status open_comm(void *comm, const fst_gpu *gpu, fst_comm_use **out, unsigned *rank,
                            unsigned *ranks, char *why, size_t size) {
    const char *reason = unusable(why, size);
    (void)gpu;
    *out = NULL;
    if (!reason && *(MPI_Comm *)comm == MPI_COMM_NULL) reason = "the communicator is MPI_COMM_NULL";
    if (reason) {
        if (reason != why) snprintf(why, size, "%s", reason);
        return FST_E_ARG;
    }
    fst_comm_use *use = calloc(1, sizeof *use);
    if (!use) {
        snprintf(why, size, "out of memory");
        return FST_E_MEMORY;
    }
    use->comm = *(MPI_Comm *)comm;
    MPI_Comm_get_errhandler(use->comm, &use->handler);
    MPI_Comm_set_errhandler(use->comm, MPI_ERRORS_RETURN); /* the usual one ends the program */
    fst_status status = enter(use, rank, ranks, why, size);
    if (status == FST_OK) {
        *out = use;
        return FST_OK;
    }
    MPI_Comm_set_errhandler(use->comm, use->handler);
    MPI_Errhandler_free(&use->handler);
    free(use);
    return status;
}

static int gather(fst_comm_use *use, void *memory, size_t nbytes, fst_queue stream,
                  fst_comm_request *request) {
    MPI_Request made = MPI_REQUEST_NULL;
    (void)stream;
    if (nbytes > INT_MAX) return MPI_ERR_COUNT;
    int code =
        MPI_Iallgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, memory, (int)nbytes, MPI_BYTE, use->comm, &made);
    request->handle = 0;
    memcpy(&request->handle, &made, sizeof made);
    return code;
}

static int test(fst_comm_use *use, fst_comm_request *request, int *done) {
    MPI_Request made;
    (void)use;
    memcpy(&made, &request->handle, sizeof made);
    int code = MPI_Test(&made, done, MPI_STATUS_IGNORE);
    memcpy(&request->handle, &made, sizeof made);
    return code;
}

/* One that is lost keeps returning errors: what was begun may still fail, and must not end the program. */
static void leave(fst_comm_use *use, int lost) {
    if (lost) MPI_Comm_set_attr(use->comm, mark, NULL);
    else MPI_Comm_set_errhandler(use->comm, use->handler);
    MPI_Errhandler_free(&use->handler);
}

static void close_comm(fst_comm_use *use) { free(use); }

static const fst_comm_calls calls = {
    .name = "MPI",
    .open = open_comm,
    .gather = gather,
    .test = test,
    .leave = leave,
    .close = close_comm,
    .describe = describe,
};

FST_API const fst_comm_module_table fst_comm_module = {.abi = FST_COMM_ABI, .calls = &calls};
