/* Seam 3: what brings data to other ranks, behind a table of functions. comm_mpi.c is a module loaded at run time,
 * comm_nccl.c finds NCCL or RCCL in the process; tests bring a fake. peers.h is what a load uses.
 *
 * Calls return 0 or the transport's error code (> 0; text from `describe`). */
#ifndef FST_COMM_H
#define FST_COMM_H

#include "gpu.h"

#define FST_COMM_ABI 1

/* A communicator that is used, and a gather that was begun, as the transport sees them. */
typedef struct fst_comm_use fst_comm_use;
typedef struct fst_comm_request {
    uintptr_t handle;
} fst_comm_request;

typedef struct fst_comm_calls {
    const char *name; /* "MPI" */
    /* 1: gathers are of device memory, in the order of a stream, which alone tells when they are done; and to
     * begin one may take until the other ranks come. 0: of host memory, `test` tells, nothing waits, and all
     * calls come from one thread. */
    int on_device;
    /* Takes a communicator into use and finds its rank and size. FST_E_ARG when it cannot be used for a load
     * onto `gpu`, FST_E_PEER when an earlier load has left it out of step: `why` says it. */
    fst_status (*open)(void *comm, const fst_gpu *gpu, fst_comm_use **out, unsigned *rank, unsigned *ranks, char *why,
                       size_t why_size);
    /* In place: part r of `nbytes` is at memory + r * nbytes; the own one is there, the others come. */
    int (*gather)(fst_comm_use *use, void *memory, size_t nbytes, fst_queue stream, fst_comm_request *request);
    /* Whether it is done; on the device: whether the communicator is sound, *done stays as it is. */
    int (*test)(fst_comm_use *use, fst_comm_request *request, int *done);
    /* Ends what was begun, also in another thread that waits, and the communicator. NULL: there is no such
     * thing. */
    int (*abort)(fst_comm_use *use);
    /* The communicator is the caller's again; `lost`: out of step. `use` stays good for tests of what was begun. */
    void (*leave)(fst_comm_use *use, int lost);
    void (*close)(fst_comm_use *use);
    void (*describe)(fst_comm_use *use, int code, char *text, size_t size);
} fst_comm_calls;

/* What the module for MPI exports as `fst_comm_module`. */
typedef struct fst_comm_module_table {
    int abi; /* FST_COMM_ABI */
    const fst_comm_calls *calls;
} fst_comm_module_table;

extern const fst_comm_module_table fst_comm_module;

extern const fst_comm_calls fst_comm_nccl;

#endif
