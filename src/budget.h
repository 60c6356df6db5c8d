/* Memory that the consumer of a stream holds. */
#ifndef FST_BUDGET_H
#define FST_BUDGET_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

/* Bounds the bytes of blocks that are allocated at one time. Blocks give back when they are freed, which may be long
 * after the stream they came from was closed: it is counted. */
typedef struct fst_budget {
    atomic_uint references;
    pthread_mutex_t lock;
    pthread_cond_t given;
    uint64_t held, limit, peak;
    uint64_t wanted; /* by the one that waits; 0: nobody does */
    double waited;   /* seconds */
    int stopped;
} fst_budget;

fst_budget *fst_budget_new(uint64_t limit);
int fst_budget_take(fst_budget *budget, uint64_t nbytes); /* waits, one at a time; 0 when it was stopped */
void fst_budget_give(fst_budget *budget, uint64_t nbytes);
void fst_budget_stop(fst_budget *budget);
int fst_budget_is_waited_for(fst_budget *budget); /* what is wanted does not fit */
fst_budget *fst_budget_hold(fst_budget *budget);
void fst_budget_drop(fst_budget *budget);

#endif
