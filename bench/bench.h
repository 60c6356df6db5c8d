/* What the benchmarks share: medians, the machine's description, ceilings, results as JSON. */
#ifndef FST_BENCH_H
#define FST_BENCH_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "gpu.h"

__attribute__((noreturn, format(printf, 1, 2))) void bench_die(const char *format, ...);

double bench_median(double *values, size_t count); /* sorts them */

/* User and system time of the process, in seconds. */
double bench_cpu_seconds(void);

/* "16 x Intel(R) Xeon(R) ..., NVIDIA H100 80GB HBM3": for the JSON. */
void bench_machine(char *text, size_t size, const fst_gpu *gpu);

/* Writes `text` as a JSON string. */
void bench_json_string(FILE *file, const char *text);

/* The commit that was measured: FST_COMMIT, or what git says, or "unknown". */
void bench_commit(char *text, size_t size);
void bench_date(char *text, size_t size);

/* A ring of pinned host memory, huge pages when there are any. */
void *bench_pinned(const fst_gpu *gpu, size_t size);
void  bench_pinned_free(const fst_gpu *gpu, void *memory, size_t size);

/* GB/s of the best of 2, 4, 8, 16 MB pieces x 1, 2, 4 streams from pinned memory, over `bytes`. On the CPU
 * device: of a memcpy by `threads` threads. */
double bench_copy_ceiling(const fst_gpu *gpu, uint64_t bytes);

/* Where bench_read_rate reads to. */
typedef enum bench_read {
    BENCH_INTO_RING,   /* `slots` slots of a thread, over and over */
    BENCH_PAST_CACHE,  /* the same with O_DIRECT */
    BENCH_INTO_MEMORY  /* memory of the files' size that nobody touched before */
} bench_read;

/* GB/s of pread of all of the files (a list that ends in NULL) by `threads` threads, `slot_bytes` at a time. 0 when a
 * file has no O_DIRECT. */
double bench_read_rate(const char *const *files, unsigned threads, unsigned slots, size_t slot_bytes,
                       bench_read where);

#endif
