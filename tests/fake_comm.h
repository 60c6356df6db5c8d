/* A communicator whose ranks are in this process: in threads of their own, or in one that takes turns. In the
 * place of MPI's and NCCL's after fake_comm_new; `fake_comm_rank` is what goes into the options as `comm`. */
#ifndef FST_TESTS_FAKE_COMM_H
#define FST_TESTS_FAKE_COMM_H

#include "peers.h"

typedef struct fake_comm fake_comm;

typedef struct fake_comm_options {
    unsigned fail_rank, fail_at; /* that rank's so-manieth gather fails, from 1; 0: none does */
    unsigned late;               /* so many tests say 'not yet' before the first that says 'done' */
} fake_comm_options;

fake_comm *fake_comm_new(unsigned ranks, const fake_comm_options *options);
/* Takes it away; fails the case when a rank has it in use still. */
void  fake_comm_free(fake_comm *comm);
void *fake_comm_rank(fake_comm *comm, unsigned rank);
extern const fst_comm_calls *const fake_comm_calls; /* of all of them */
/* Gathers that a rank has begun. */
unsigned fake_comm_gathers(const fake_comm *comm, unsigned rank);

#endif
