/* What a communicator of the tests' NCCL is: a case fills it in. */
#ifndef FST_TESTS_FAKE_NCCL_H
#define FST_TESTS_FAKE_NCCL_H

#include <stddef.h>

typedef struct fake_nccl {
    int ranks, rank, device;
    int (*state)(struct fake_nccl *comm); /* of ncclCommGetAsyncError; NULL: all is well */
    int (*gather)(struct fake_nccl *comm, const void *send, void *receive, size_t count, int type, void *stream);
    void (*abort)(struct fake_nccl *comm);
} fake_nccl;

#endif
