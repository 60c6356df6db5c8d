/* A libnccl.so.2 for bench/test_ranks.py: ranks are processes, "device" memory is the host's, streams do not wait. Parts
 * pass through a file that all map. FST_FAKE_NCCL says what goes wrong: "refuse" (as two ranks on one GPU are), "spoil"
 * (bytes of each large gather), "leave N" or "stop N" (rank 1, in its gather N). */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nccl_calls.h"

#define PIECE ((size_t)1 << 20) /* so much of each rank is in the file at a time */
enum { MOST_RANKS = 8 };

typedef struct {
    char internal[128];
} ncclUniqueId;

struct shared {
    atomic_uint came; /* how often ranks came to where they wait for one another */
    unsigned char parts[MOST_RANKS][PIECE];
};

struct ncclComm {
    struct shared *shared;
    unsigned ranks, rank, met, gathers;
    atomic_int aborted;
};

static struct ncclComm *last; /* held here: one that was aborted is nobody's */

EXPORT ncclResult_t ncclGetVersion(int *version);
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
EXPORT ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank);
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm);

/* The N of "leave N"; 0: something else goes wrong, or nothing. */
static unsigned wrong(const char *what) {
    const char *said = getenv("FST_FAKE_NCCL");
    size_t length = strlen(what);
    if (!said || strncmp(said, what, length)) return 0;
    return said[length] ? (unsigned)atoi(said + length) : 1;
}

/* Where NCCL says it. */
static void say(const char *text) {
    printf("%s\n", text);
    fflush(stdout);
}

static ncclResult_t meet(ncclComm_t comm) {
    unsigned all = ++comm->met * comm->ranks;
    atomic_fetch_add(&comm->shared->came, 1);
    while (atomic_load(&comm->shared->came) < all) {
        if (atomic_load(&comm->aborted)) return ncclRemoteError;
        usleep(20);
    }
    return ncclSuccess;
}

ncclResult_t ncclGetVersion(int *version) {
    *version = 21803;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    const char *folder = getenv("TMPDIR");
    int used = snprintf(id->internal, sizeof id->internal, "%s/fst-nccl-XXXXXX", folder ? folder : "/tmp");
    int fd = used < (int)sizeof id->internal ? mkstemp(id->internal) : -1;
    if (fd < 0 || ftruncate(fd, sizeof(struct shared))) return ncclSystemError;
    close(fd);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank) {
    if (getenv("NCCL_DEBUG")) say("NCCL version 2.18.3");
    if (wrong("refuse") || nranks > MOST_RANKS) return ncclInvalidUsage;
    int fd = open(commId.internal, O_RDWR | O_CLOEXEC);
    last = calloc(1, sizeof *last);
    if (!last || fd < 0) return ncclSystemError;
    last->shared = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (last->shared == MAP_FAILED) return ncclSystemError;
    last->ranks = (unsigned)nranks, last->rank = (unsigned)rank;
    ncclResult_t result = meet(last);
    if (rank == 0) unlink(commId.internal);
    *comm = last;
    return result;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    munmap(comm->shared, sizeof(struct shared));
    free(comm);
    last = NULL;
    return ncclSuccess;
}

ncclResult_t ncclAllGather(const void *sendbuff, void *recvbuff, size_t sendcount, ncclDataType_t datatype,
                           ncclComm_t comm, cudaStream_t stream) {
    const unsigned char *from = sendbuff;
    unsigned char *to = recvbuff;
    (void)stream;
    if (datatype != ncclInt8 || from != to + comm->rank * sendcount) return ncclInvalidUsage;
    comm->gathers++;
    if (comm->rank == 1 && comm->gathers == wrong("leave ")) say("NCCL WARN it leaves"), _exit(3);
    while (comm->rank == 1 && comm->gathers == wrong("stop ")) pause();
    for (size_t at = 0, size; at < sendcount; at += size) {
        size = sendcount - at < PIECE ? sendcount - at : PIECE;
        memcpy(comm->shared->parts[comm->rank], from + at, size);
        ncclResult_t result = meet(comm);
        for (unsigned r = 0; r < comm->ranks && !result; r++)
            memcpy(to + r * sendcount + at, comm->shared->parts[r], size);
        if (!result) result = meet(comm);
        if (result) return result;
    }
    for (size_t at = 0; wrong("spoil") && sendcount >= PIECE && at < sendcount; at += 4096)
        to[(comm->rank + 1) % comm->ranks * sendcount + at] ^= 1;
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
    *count = (int)comm->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    *rank = (int)comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device) {
    (void)comm;
    *device = 0; /* load_fake has no other */
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError) {
    (void)comm;
    *asyncError = ncclSuccess;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    atomic_store(&comm->aborted, 1);
    return ncclSuccess;
}

const char *ncclGetLastError(ncclComm_t comm) {
    (void)comm;
    return wrong("refuse") ? "Duplicate GPU detected" : "";
}

const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclInvalidUsage  ? "invalid usage"
           : result == ncclRemoteError ? "remote process exited"
                                       : "some error";
}
