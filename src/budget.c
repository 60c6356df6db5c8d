#include "budget.h"

#include <stdlib.h>

#include "os.h"

fst_budget *fst_budget_new(uint64_t limit) {
    fst_budget *budget = calloc(1, sizeof *budget);
    if (!budget) return NULL;
    atomic_init(&budget->references, 1);
    pthread_mutex_init(&budget->lock, NULL);
    pthread_cond_init(&budget->given, NULL);
    budget->limit = limit;
    return budget;
}

int fst_budget_take(fst_budget *budget, uint64_t nbytes) {
    double start = fst_os_now();
    pthread_mutex_lock(&budget->lock);
    budget->wanted = nbytes;
    while (!budget->stopped && budget->held + nbytes > budget->limit)
        pthread_cond_wait(&budget->given, &budget->lock);
    budget->wanted = 0;
    budget->waited += fst_os_now() - start;
    int taken = !budget->stopped;
    if (taken) budget->held += nbytes;
    if (budget->held > budget->peak) budget->peak = budget->held;
    pthread_mutex_unlock(&budget->lock);
    return taken;
}

void fst_budget_give(fst_budget *budget, uint64_t nbytes) {
    pthread_mutex_lock(&budget->lock);
    budget->held -= nbytes;
    pthread_cond_broadcast(&budget->given);
    pthread_mutex_unlock(&budget->lock);
}

void fst_budget_stop(fst_budget *budget) {
    pthread_mutex_lock(&budget->lock);
    budget->stopped = 1;
    pthread_cond_broadcast(&budget->given);
    pthread_mutex_unlock(&budget->lock);
}

int fst_budget_is_waited_for(fst_budget *budget) {
    pthread_mutex_lock(&budget->lock);
    /* Who waited for what fits by now has only not woken up yet. */
    int waited = budget->wanted && budget->held + budget->wanted > budget->limit;
    pthread_mutex_unlock(&budget->lock);
    return waited;
}

fst_budget *fst_budget_hold(fst_budget *budget) {
    if (budget) atomic_fetch_add_explicit(&budget->references, 1, memory_order_relaxed);
    return budget;
}

void fst_budget_drop(fst_budget *budget) {
    if (!budget || atomic_fetch_sub_explicit(&budget->references, 1, memory_order_acq_rel) != 1) return;
    pthread_mutex_destroy(&budget->lock);
    pthread_cond_destroy(&budget->given);
    free(budget);
}
