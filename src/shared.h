/* A load whose ranks share the reading: files are cut into units; each rank reads every so-manieth of those that any rank needs,
 * and rounds of peers.h bring them to all. A ring of some rounds is in memory at a time, on the host or, for a GPU, on the
 * device; the chunks of the load's own plan are taken from there. */
#ifndef FST_SHARED_H
#define FST_SHARED_H

#include "peers.h"
#include "plan.h"
#include "reader.h"

#define FST_SHARED_ROUNDS 4u /* in memory */
/* Bytes of a unit, if a round is not less than a chunk then; tests make it small. A multiple of 4096. */
extern size_t fst_shared_unit;
/* Of a unit, that one thread reads at a time; likewise. */
extern size_t fst_shared_part;
/* Bytes of a round: the most that a chunk may span in its file, so that its units are in memory together. */
uint64_t fst_shared_span(unsigned ranks, size_t chunk_bytes);

typedef struct fst_shared fst_shared;

/* Finds out which units are needed, with all other ranks: collective, `mine` says how this rank fared so far. `plan`, whose chunks
 * have at most `chunk_bytes`, is not used after a failure. The peers stay the caller's. */
fst_status fst_shared_new(fst_peers *peers, const fst_gpu *gpu, size_t chunk_bytes, const fst_plan *plan, const fst_header *headers,
                          const char *const *paths, size_t files, fst_reader *reader, fst_status mine, fst_shared **out, fst_error *error);
/* Or, while the peers are busy, leaves what they still may write to to them. NULL is allowed. */
void fst_shared_free(fst_shared *shared);

/* One step of the thread that called: reads and begins a round when there is room for one, looks after those under way.
 * *done: there are no more. `mine`: this rank has failed. FST_E_PEER, or what reading a unit came to, which the others hear
 * of in the next step. */
fst_status fst_shared_step(fst_shared *shared, fst_status mine, int *done, fst_error *error);

/* Bytes that this rank read, for all. */
uint64_t fst_shared_read(const fst_shared *shared);
/* Units that it could not pin. NULL is allowed, here and above. */
unsigned fst_shared_unpinned(const fst_shared *shared);

/* Whether a chunk is taken from units: companions are not, which may lie anywhere. */
static inline int fst_shared_has(const fst_shared *shared, const fst_plan_chunk *chunk) {
    return shared && !chunk->companions;
}
/* Waits for the units of a chunk, but not for long: whether they are there. */
int fst_shared_await(fst_shared *shared, const fst_plan_chunk *chunk);
/* Reads a part of a unit that this rank reads for all. 0: there is none to be read. */
int fst_shared_help(fst_shared *shared);
/* Bytes of a file that are there now, up to the end of a unit at most: where they are, and how many. */
const unsigned char *fst_shared_bytes(const fst_shared *shared, uint32_t file, uint64_t offset, uint64_t *nbytes);
/* Nothing more of the chunk is taken. */
void fst_shared_release(fst_shared *shared, const fst_plan_chunk *chunk);

#endif
