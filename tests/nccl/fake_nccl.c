/* Libraries that are called like NCCL and RCCL, with those of their functions that fst calls, as nccl.h declares
 * them: what happens in them is up to the case. */
#include "fake_nccl.h"
#include "nccl_calls.h"

static fake_nccl *of(ncclComm_t comm) { return (fake_nccl *)(void *)comm; }

ncclResult_t ncclAllGather(const void *sendbuff, void *recvbuff, size_t sendcount, ncclDataType_t datatype,
                           ncclComm_t comm, cudaStream_t stream) {
    return (ncclResult_t)of(comm)->gather(of(comm), sendbuff, recvbuff, sendcount, (int)datatype, stream);
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
    *count = of(comm)->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    *rank = of(comm)->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device) {
    *device = of(comm)->device;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError) {
    *asyncError = (ncclResult_t)(of(comm)->state ? of(comm)->state(of(comm)) : 0);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    of(comm)->abort(of(comm));
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
    return result == 6 ? "remote process exited or there was a network error" : "some error";
}

const char *ncclGetLastError(ncclComm_t comm) { return comm ? "of a communicator" : "connection closed"; }
