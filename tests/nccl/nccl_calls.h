/* What fst calls of NCCL and RCCL, as nccl.h declares it: for the libraries here that are called like them. */
#ifndef FST_TESTS_NCCL_CALLS_H
#define FST_TESTS_NCCL_CALLS_H

#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

typedef enum { ncclSuccess, ncclSystemError = 2, ncclInvalidUsage = 5, ncclRemoteError } ncclResult_t;
typedef enum { ncclInt8 } ncclDataType_t;
typedef struct ncclComm *ncclComm_t;
typedef struct stream *cudaStream_t;

EXPORT ncclResult_t ncclAllGather(const void *sendbuff, void *recvbuff, size_t sendcount,
                                  ncclDataType_t datatype, ncclComm_t comm, cudaStream_t stream);
EXPORT ncclResult_t ncclCommCount(const ncclComm_t comm, int *count);
EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank);
EXPORT ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device);
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError);
EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm);
EXPORT const char *ncclGetErrorString(ncclResult_t result);
EXPORT const char *ncclGetLastError(ncclComm_t comm);

#endif
