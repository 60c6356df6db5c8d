/* Kernels under test: every copy of them that this machine can run, and buffers on its device. */
#ifndef FST_TESTS_KERNELS_RIG_H
#define FST_TESTS_KERNELS_RIG_H

#include "gpu.h"
#include "numeric.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define POISON(memory, size) ASAN_POISON_MEMORY_REGION(memory, size)
#define UNPOISON(memory, size) ASAN_UNPOISON_MEMORY_REGION(memory, size)
#else
#define POISON(memory, size) ((void)(memory), (void)(size))
#define UNPOISON(memory, size) ((void)(memory), (void)(size))
#endif

#define RIG_GUARD 64u /* bytes on both sides of a result that must stay as they were */

typedef struct test_rig {
    fst_gpu    gpu;        /* a copy: the CPU's with the kernels of one level, or a GPU's */
    fst_queue stream;
    uint8_t   *src, *dst;  /* `capacity` bytes each, on the device; 256-byte aligned */
    uint8_t   *host;       /* as many for what comes back */
    size_t     capacity;
    int        saved;
    struct rig_place *places; /* of queued casts */
    size_t     places_count, used;
} test_rig;

/* Sanitized, the threads of a GPU's block that the CPU runs take too long for sizes that matter to a real GPU alone. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { RIG_SANITIZED = 1 };
#else
enum { RIG_SANITIZED = 0 };
#endif

/* The i-th: the CPU's levels, the device's shape run on the CPU, and the GPU that FST_TEST_DEVICE names, or
 * the first one when there is any. 0 past the end. rig_close after 1. */
int  rig_open(test_rig *rig, size_t i, size_t capacity, int only_casts);
void rig_close(test_rig *rig);

/* Casts and batches may have code of their own where all other kernels of a level are another level's. */
#define EACH_RIG(rig, capacity) \
    for (size_t rig_i = 0; rig_open(rig, rig_i, capacity, 0); rig_i++, rig_close(rig))
#define EACH_CAST_RIG(rig, capacity) \
    for (size_t rig_i = 0; rig_open(rig, rig_i, capacity, 1); rig_i++, rig_close(rig))

/* Elements of a launch, where indexes have 31 bits and the device's shape runs on the CPU; 0: as on a GPU. What is more
 * comes in several, which otherwise only results of gigabytes show. */
void rig_limit_launches(uint64_t elements);

void rig_upload(test_rig *rig, void *device, const void *host, size_t size);

/* Casts `count` elements at src + src_skew to dst + RIG_GUARD + dst_skew, and checks that nothing around the
 * result changed. The result, valid until the next call. */
const uint8_t *rig_cast(test_rig *rig, int src, int dst, unsigned flags, size_t src_skew, size_t dst_skew,
                        uint64_t count);

/* Many casts with one wait: rig_queue_cast puts each result in a place of its own, so many bytes behind an address that
 * is aligned to 16; rig_expect_queued waits, and checks that each is the beginning of `want` and that nothing else of
 * dst changed. */
void rig_queue(test_rig *rig);
void rig_queue_cast(test_rig *rig, int src, int dst, unsigned flags, size_t src_skew, size_t dst_skew,
                    uint64_t count);
void rig_expect_queued(test_rig *rig, const uint8_t *want);

/* Puts the first `size` bytes of dst into rig->host. */
void rig_download(test_rig *rig, size_t size);

const char *rig_dtype_name(int dtype);

/* A generator of numbers that look random: the same in every run. */
uint64_t rig_random(uint64_t *state);
uint64_t rig_below(uint64_t *state, uint64_t limit);

/* Values and codes by definition, in double, for expectations: the types of 32 bits and less that scaled and
 * quantize know, integers and sub-byte ones included. NaN keeps the sign of its code. */
double rig_value(int dtype, uint32_t code);
/* A double that is an F32 or NaN -> the code, rounded once, ties to even. */
uint32_t rig_code(int dtype, double value, int saturate);
/* The types that are cast: between all of the first RIG_FLOATS; from the others, the narrow ones, to some. */
enum { RIG_FLOATS = 8, RIG_SOURCES = 12 };
extern const int rig_floats[RIG_SOURCES];

#endif
