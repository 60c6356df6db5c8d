#include "pool.h"

#include <string.h>

#include "os.h"

#define GRAIN ((uint64_t)2 << 20) /* sizes are multiples of it: one block's memory does for another */

static uint64_t rounded(uint64_t nbytes) { return (nbytes + GRAIN - 1) / GRAIN * GRAIN; }

/* The lock is held. */
static void forget(fst_pool *pool, size_t i) {
    pool->kept -= pool->free[i].nbytes;
    pool->free[i] = pool->free[--pool->count];
}

/* Makes room for `size` more bytes. The lock is held. */
static void shrink(fst_pool *pool, uint64_t size) {
    while (pool->count && pool->used + pool->kept + size > pool->most) {
        fst_os_calls.unmap(pool->free[0].memory, (size_t)pool->free[0].nbytes);
        forget(pool, 0);
    }
}

static void *allocate(void *arg, uint64_t nbytes, int device) {
    fst_pool *pool = arg;
    uint64_t size = rounded(nbytes ? nbytes : 1);
    void *memory = NULL;
    (void)device;
    pthread_mutex_lock(&pool->lock);
    for (size_t i = 0; i < pool->count && !memory; i++) {
        if (pool->free[i].nbytes != size) continue;
        memory = pool->free[i].memory;
        forget(pool, i);
    }
    if (!memory) {
        shrink(pool, size);
        memory = fst_os_calls.map((size_t)size);
    }
    if (memory) pool->used += size;
    pthread_mutex_unlock(&pool->lock);
    return memory;
}

static void release(void *arg, void *memory, uint64_t nbytes, int device) {
    fst_pool *pool = arg;
    uint64_t size = rounded(nbytes ? nbytes : 1);
    (void)device;
    pthread_mutex_lock(&pool->lock);
    pool->used -= size;
    if (pool->count < FST_POOL_MOST) {
        pool->free[pool->count++] = (struct fst_pooled){memory, size};
        pool->kept += size;
        shrink(pool, 0);
        memory = NULL;
    }
    pthread_mutex_unlock(&pool->lock);
    fst_os_calls.unmap(memory, (size_t)size);
}

void fst_pool_begin(fst_pool *pool, uint64_t most) {
    memset(pool, 0, sizeof *pool);
    pool->allocator = (fst_allocator){allocate, release, pool};
    pool->most = most;
    pthread_mutex_init(&pool->lock, NULL);
}

void fst_pool_end(fst_pool *pool) {
    pool->most = 0;
    shrink(pool, 0);
    pthread_mutex_destroy(&pool->lock);
}
