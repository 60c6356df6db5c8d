/* Host memory that comes back and is used again: the pages of a block are there, and need not be filled with zeros by the
 * system, from its second use on. */
#ifndef FST_POOL_H
#define FST_POOL_H

#include <pthread.h>

#include "fst.h"

#define FST_POOL_MOST 64u

typedef struct fst_pool {
    fst_allocator   allocator; /* that takes from it */
    pthread_mutex_t lock;
    uint64_t        most;      /* bytes, with those that are in use */
    uint64_t        used, kept;
    size_t          count;     /* pieces that are kept */
    struct fst_pooled {
        void    *memory;
        uint64_t nbytes;
    } free[FST_POOL_MOST];
} fst_pool;

void fst_pool_begin(fst_pool *pool, uint64_t most);
void fst_pool_end(fst_pool *pool); /* once all memory is back */

#endif
