/* Parts between ranks by NCCL, or AMD's RCCL, which has the same functions. Neither is needed to build this: the
 * caller has a communicator, so the library that made it is in the process. */
#include "comm.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define INT8 0         /* ncclInt8 */
#define IN_PROGRESS 7  /* ncclInProgress: what one that does not block says at first */
#define REMOTE_ERROR 6 /* ncclRemoteError */
#define DLPACK_ROCM 10

/* As in nccl.h: ncclComm_t is a pointer, results and types are enums. */
typedef struct nccl {
    int (*all_gather)(const void *send, void *receive, size_t count, int type, void *comm, void *stream);
    int (*count)(void *comm, int *out);
    int (*user_rank)(void *comm, int *out);
    int (*device)(void *comm, int *out);
    int (*async_error)(void *comm, int *out);
    int (*abort)(void *comm);
    const char *(*error_string)(int code);
    const char *(*last_error)(void *comm); /* NULL: before NCCL 2.13 */
} nccl;

struct fst_comm_use {
    void *comm;
    const nccl *nccl;
    unsigned rank;
    pthread_mutex_t lock; /* of calls that look at the communicator, against its end */
    int aborted;
};

static int find(void *library, const char *name, void *function, size_t size) {
    void *address = dlsym(library, name);
    memcpy(function, &address, size); /* as large as a pointer wherever there is dlsym */
    return address != NULL;
}

#define FIND(from, name, field) find(from, name, &(field), sizeof(field))

static int find_all(void *from, nccl *out) {
    (void)FIND(from, "ncclGetLastError", out->last_error);
    return FIND(from, "ncclAllGather", out->all_gather) && FIND(from, "ncclCommCount", out->count) &&
           FIND(from, "ncclCommUserRank", out->user_rank) && FIND(from, "ncclCommCuDevice", out->device) &&
           FIND(from, "ncclCommGetAsyncError", out->async_error) && FIND(from, "ncclCommAbort", out->abort) &&
           FIND(from, "ncclGetErrorString", out->error_string);
}

/* The library, if it is in the process: another copy could not use the communicator. Once found it stays. */
static const nccl *find_library(int amd) {
    static const char *const names[] = {"libnccl.so.2", "librccl.so.1"};
    static nccl libraries[2];
    static int found[2];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    if (!found[amd]) {
        void *library = dlopen(names[amd], RTLD_NOW | RTLD_NOLOAD);
        /* It may be a part of the program instead. */
        found[amd] = find_all(library ? library : RTLD_DEFAULT, &libraries[amd]);
        if (library && !found[amd]) dlclose(library);
    }
    const nccl *out = found[amd] ? &libraries[amd] : NULL;
    pthread_mutex_unlock(&lock);
    return out;
}

static void describe(fst_comm_use *use, int code, char *text, size_t size) {
    const char *said = use->nccl->error_string(code);
    const char *last = use->nccl->last_error ? use->nccl->last_error(NULL) : NULL; /* of the process */
    if (!last) last = "";
    snprintf(text, size, "%s%s%s", said ? said : "error", *last ? ": " : "", last);
}

static void close_comm(fst_comm_use *use) {
    pthread_mutex_destroy(&use->lock);
    free(use);
}

static fst_status open_comm(void *comm, const fst_gpu *gpu, fst_comm_use **out, unsigned *rank,
                            unsigned *ranks, char *why, size_t size) {
    int amd = gpu->dlpack_type == DLPACK_ROCM, own = 0, count = 0, device = 0;
    const nccl *library = find_library(amd);
    *out = NULL;
    if (!library) {
        snprintf(why, size, "there is no %s in this process that could have made the communicator",
                 amd ? "librccl.so.1" : "libnccl.so.2");
        return FST_E_ARG;
    }
    fst_comm_use *use = calloc(1, sizeof *use);
    if (!use) {
        snprintf(why, size, "out of memory");
        return FST_E_MEMORY;
    }
    use->comm = comm, use->nccl = library;
    pthread_mutex_init(&use->lock, NULL);
    int code = library->count(comm, &count);
    if (!code) code = library->user_rank(comm, &own);
    if (!code) code = library->device(comm, &device);
    if (code) describe(use, code, why, size);
    else if (device != gpu->index)
        snprintf(why, size, "the communicator is for GPU %d, the load for %s", device, gpu->label);
    if (code || device != gpu->index) {
        close_comm(use);
        return FST_E_ARG;
    }
    *rank = use->rank = (unsigned)own, *ranks = (unsigned)count;
    *out = use;
    return FST_OK;
}

/* What happened to the communicator beside all calls. */
static int state(fst_comm_use *use) {
    int code = REMOTE_ERROR, said = 0;
    pthread_mutex_lock(&use->lock);
    if (!use->aborted) code = use->nccl->async_error(use->comm, &said);
    pthread_mutex_unlock(&use->lock);
    return code ? code : said;
}

/* In place is: send from where the own part is received. */
static int gather(fst_comm_use *use, void *memory, size_t nbytes, fst_queue stream,
                  fst_comm_request *request) {
    const struct timespec nap = {0, 20000};
    (void)request;
    int code =
        use->nccl->all_gather((char *)memory + use->rank * nbytes, memory, nbytes, INT8, use->comm, stream);
    while (code == IN_PROGRESS && (code = state(use)) == IN_PROGRESS)
        nanosleep(&nap, NULL); /* what follows must be queued behind it */
    return code;
}

static int test(fst_comm_use *use, fst_comm_request *request, int *done) {
    (void)request, (void)done;
    int code = state(use);
    return code == IN_PROGRESS ? 0 : code;
}

static int abort_comm(fst_comm_use *use) {
    pthread_mutex_lock(&use->lock);
    use->aborted = 1;
    pthread_mutex_unlock(&use->lock);
    return use->nccl->abort(use->comm);
}

static void leave(fst_comm_use *use, int lost) { (void)use, (void)lost; }

const fst_comm_calls fst_comm_nccl = {
    .name = "NCCL",
    .on_device = 1,
    .open = open_comm,
    .gather = gather,
    .test = test,
    .abort = abort_comm,
    .leave = leave,
    .close = close_comm,
    .describe = describe,
};
