/* The ranks of a load that share the reading: what they agree on, and the rounds in which each gives its part to
 * all others.
 *
 *     fst_peers_open(&options, &peers, &error)               first of all: from here on the others hear of a failure
 *     fst_peers_agree(peers, status, words, count, &error)   headers read, plan made, or not
 *     for each round: fst_peers_begin(peers, buffer, nbytes, stream, status, &error)
 *                     fst_peers_test or _wait when the buffer's data is needed
 *     fst_peers_finish(peers, &error)
 *     if (fst_peers_busy(peers)) fst_peers_keep(peers, ...)  what must not be freed yet
 *     fst_peers_close(peers)
 *
 * All ranks make the same calls in the same order, with the same sizes. All calls come from one thread, the one
 * that called fst_load, on a GPU between its `enter` and `leave`.
 *
 * A rank that fails goes on: it passes its failure to the next agree or begin, and nobody waits in vain.
 * Everybody else gets FST_E_PEER with that status as `code`; the rank itself gets its own status back, with
 * *error as it was. Rounds end at the same one everywhere, because begin is what ends them, FST_PEERS_DEPTH
 * rounds behind the failed one: so it may be that a rank has to begin some more without anything to give. After
 * that the communicator can be used again.
 *
 * A rank that does not come within the timeout, or an error of the transport or of its work on the device, is
 * FST_E_PEER with a `code` of 0: the peers are lost, all calls say so at once, the communicator is aborted if it
 * may be. Then that is what the load returns, even if it had failed otherwise before: the caller must hear that
 * the communicator is gone. */
#ifndef FST_PEERS_H
#define FST_PEERS_H

#include "comm.h"

#define FST_PEERS_WORDS 7 /* most words that fst_peers_agree compares */
#define FST_PEERS_DEPTH 8 /* most rounds that are begun and not done; as many on every rank */

typedef struct fst_peers fst_peers;

typedef struct fst_peers_options {
    fst_comm_kind  kind;
    void          *comm;
    const fst_gpu *gpu;
    unsigned       rank, ranks; /* what the caller takes them for; 0 of 0: whatever they are */
    unsigned       timeout_ms;  /* 0: ten minutes */
    int            may_abort;
} fst_peers_options;

/* FST_E_ARG: no communicator that can be used here, or its rank and size are others (then the others hear of
 * it); FST_E_PEER: an earlier load left it out of step; FST_E_MEMORY, FST_E_DEVICE. *out is NULL after a
 * failure. */
fst_status fst_peers_open(const fst_peers_options *options, fst_peers **out, fst_error *error);
unsigned   fst_peers_rank(const fst_peers *peers);
unsigned   fst_peers_count(const fst_peers *peers);

/* Waits until all ranks have said how they fared, and compares `count` words (at most FST_PEERS_WORDS) that must
 * be the same: FST_E_ARG on every rank when they are not. No round may be under way. */
fst_status fst_peers_agree(fst_peers *peers, fst_status mine, const uint64_t *words, unsigned count, fst_error *error);
/* The words of another rank's, of the last fst_peers_agree; those that were not given are 0. */
const uint64_t *fst_peers_words(const fst_peers *peers, unsigned rank);

/* Begins a round: rank r's part, `nbytes` long, is at buffer + r * nbytes; this rank's is there, with `stream`'s
 * work that was queued before, unless `mine` says that it failed. On a GPU the parts come in the order of the
 * stream. At most FST_PEERS_DEPTH rounds are under way (the oldest one is waited for). FST_E_PEER, or a failure
 * of this rank's own: no round was begun, and none will be. */
fst_status fst_peers_begin(fst_peers *peers, void *buffer, size_t nbytes, fst_queue stream, fst_status mine,
                           fst_error *error);
/* The oldest round that is under way: *done is 1 when it is not any more. MPI moves data in these calls alone, so
 * call it often. FST_E_PEER, or a failure of this
 * rank's own: its data is not good. With no round under way: done. */
fst_status fst_peers_test(fst_peers *peers, int *done, fst_error *error);
/* The same, when it is done. */
fst_status fst_peers_wait(fst_peers *peers, fst_error *error);
/* Waits for all rounds that were begun, and says whether any failed. */
fst_status fst_peers_finish(fst_peers *peers, fst_error *error);

/* 1: buffers of rounds that were begun may still be written to, streams may be stuck. Only when the peers are
 * lost. */
int fst_peers_busy(const fst_peers *peers);
/* While busy: `release` is called when nothing is written any more: in a later fst_peers_open of this process
 * (MPI's: of the same thread), or never. When there is no memory to remember it: never. */
void fst_peers_keep(fst_peers *peers, void (*release)(void *arg), void *arg);
/* NULL is allowed. */
void fst_peers_close(fst_peers *peers);

/* Tests put a transport of their own in the place of all others; NULL takes it away. */
void fst_peers_set_fake(const fst_comm_calls *calls);

#endif
