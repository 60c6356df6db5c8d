/* Everything of the kernels but values: copies, batches, what is read and written, wrong arguments. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"
#include "kernels_rig.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define POISON(memory, size) ASAN_POISON_MEMORY_REGION(memory, size)
#define UNPOISON(memory, size) ASAN_UNPOISON_MEMORY_REGION(memory, size)
#else
#define POISON(memory, size) ((void)(memory), (void)(size))
#define UNPOISON(memory, size) ((void)(memory), (void)(size))
#endif

static void fill(uint8_t *bytes, size_t size) {
    uint32_t state = 12345;
    for (size_t i = 0; i < size; i++) {
        state = state * 1664525u + 1013904223u;
        bytes[i] = (uint8_t)(state >> 24);
    }
}

/* ---- Copies ---- */

TEST(kernels_copy, every_dtype_from_every_alignment) {
    enum { size = 8192 };
    static uint8_t bytes[size];
    static const size_t counts[] = {0, 8, 16, 24, 40, 64, 200, 1000};
    test_rig rig;
    fill(bytes, size);
    EACH_CAST_RIG(&rig, 8 * size) for (int dtype = 1; dtype < FST_DTYPE_COUNT; dtype++) {
        const unsigned bits = fst_type_bits(dtype);
        for (size_t src_skew = 0; src_skew < 16; src_skew++) {
            rig_upload(&rig, rig.src + src_skew, bytes, size);
            rig_queue(&rig);
            for (size_t dst_skew = 0; dst_skew < 16; dst_skew += bits < 8 ? 1 : bits / 8)
                for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
                    rig_queue_cast(&rig, dtype, dtype, 0, src_skew, dst_skew, counts[c]);
            rig_expect_queued(&rig, bytes);
        }
    }
}

TEST(kernels_copy, bytes_of_every_count) {
    static uint8_t bytes[200];
    test_rig rig;
    fill(bytes, sizeof bytes);
    EACH_CAST_RIG(&rig, 512 << 10) for (size_t src_skew = 0; src_skew < 16; src_skew++) {
        rig_upload(&rig, rig.src + src_skew, bytes, sizeof bytes);
        rig_queue(&rig);
        for (size_t dst_skew = 0; dst_skew < 16; dst_skew++)
            for (size_t count = 0; count < 100; count++)
                rig_queue_cast(&rig, FST_T_U8, FST_T_U8, 0, src_skew, dst_skew, count);
        rig_expect_queued(&rig, bytes);
    }
}

TEST(kernels_copy, float_codes_are_kept_as_they_are) {
    /* A signalling NaN of each kind, and NaNs with payloads. */
    static const uint64_t codes[] = {0x7FF0000000000001, 0xFFF8000000000123};
    test_rig rig;
    EACH_CAST_RIG(&rig, 4096) {
        rig_upload(&rig, rig.src, codes, sizeof codes);
        for (int i = 0; i < RIG_FLOATS; i++)
            CHECK_BYTES(codes,
                        rig_cast(&rig, rig_floats[i], rig_floats[i], 0, 0, 0,
                                 sizeof codes * 8 / fst_type_bits(rig_floats[i])),
                        sizeof codes);
    }
}

/* ---- Values that the tables do not hold ---- */

TEST(kernels_value, nothing_of_the_callers_fpu_state_shows) {
    /* Round up, flush subnormals, read them as zero: F32 subnormals to BF16, ties to E4M3. */
    static const uint32_t in[] = {0x00000001, 0x00018000, 0x80018000, 0x3A800000, 0x3F880000, 0xBF980000};
    static const uint16_t bf16[] = {0x0000, 0x0002, 0x8002, 0x3A80, 0x3F88, 0xBF98};
    static const uint8_t e4m3[] = {0x00, 0x00, 0x80, 0x00, 0x38, 0xBA};
    test_rig rig;
    EACH_CAST_RIG(&rig, 4096) {
        const unsigned saved = __builtin_ia32_stmxcsr();
        rig_upload(&rig, rig.src, in, sizeof in);
        __builtin_ia32_ldmxcsr(saved | 0x8040 | 0x4000);
        const unsigned set = __builtin_ia32_stmxcsr();
        CHECK_BYTES(bf16, rig_cast(&rig, FST_T_F32, FST_T_BF16, 0, 0, 0, 6), sizeof bf16);
        CHECK_BYTES(e4m3, rig_cast(&rig, FST_T_F32, FST_T_F8_E4M3, 0, 0, 0, 6), sizeof e4m3);
        const unsigned after = __builtin_ia32_stmxcsr();
        __builtin_ia32_ldmxcsr(saved);
        CHECK_INT(set, after);
    }
}

TEST(kernels_value, no_overflow_of_the_count_beyond_32_bits) {
    /* 2^32 + 37 elements: the source all zero pages but its end, the destination one piece of memory that
     * is mapped again and again. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    test_skip(0, "too slow with a sanitizer");
#endif
    const uint64_t count = (1ull << 32) + 37, piece = 64u << 20;
    const size_t size = (size_t)(((count + piece) / piece) * piece);
    const int fd = memfd_create("dst", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)piece) == 0);
    uint8_t *src =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *dst = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(src != MAP_FAILED && dst != MAP_FAILED);
    for (size_t at = 0; at < size; at += piece)
        CHECK(mmap(dst + at, piece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED);
    src[count - 1] = 0x38; /* 1.0 */
    src[count - 37] = 0xB8;
    const fst_cast_args args = {src, dst, count, FST_T_F8_E4M3, FST_T_F8_E5M2, 0};
    CHECK_INT(0, fst_kernels_cpu()->cast(NULL, &args));
    CHECK_INT(0x3C, dst[count - 1]);
    CHECK_INT(0xBC, dst[count - 37]);
    CHECK_INT(0, dst[count - 36]);
    munmap(src, size);
    munmap(dst, size);
    close(fd);
}

/* ---- What is read ---- */

TEST(kernels_bounds, nothing_outside_the_source_is_read) {
    /* The source touches an inaccessible page, once with its end, once with its start. */
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), most = 150;
    uint8_t *pages = mmap(NULL, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pages != MAP_FAILED && mprotect(pages + page, page, PROT_READ | PROT_WRITE) == 0);
    test_rig rig;
    EACH_CAST_RIG(&rig, 16384) {
        if (!rig.gpu.host_access) continue;
        for (int s = 0; s < RIG_SOURCES; s++)
            for (int d = 0; d < RIG_FLOATS; d++) {
                const size_t src_bits = fst_type_bits(rig_floats[s]),
                             dst_size = fst_type_bits(rig_floats[d]) / 8;
                if (!fst_kernels_have(rig_floats[s], rig_floats[d])) continue;
                for (uint64_t count = 0; count < most; count++)
                    for (size_t skew = 0; skew < 16; skew += dst_size) {
                        if (count * src_bits % 8) continue;
                        const uint8_t *end = pages + 2 * page - count * src_bits / 8;
                        fst_cast_args args = {end, rig.dst + skew, count, rig_floats[s], rig_floats[d], 0};
                        CHECK_INT(0, rig.gpu.kernels->cast(NULL, &args));
                        args.src = pages + page;
                        CHECK_INT(0, rig.gpu.kernels->cast(NULL, &args));
                    }
            }
    }
    munmap(pages, 3 * page);
}

/* Aligned accesses never cross into another page, so a page says nothing about the bytes just outside:
 * AddressSanitizer does, in its build. */
TEST(kernels_bounds, no_byte_outside_the_source_is_read) {
    test_rig rig;
    EACH_CAST_RIG(&rig, 4096) {
        if (!rig.gpu.host_access) continue;
        for (int s = 0; s < RIG_SOURCES; s++)
            for (int d = 0; d < RIG_FLOATS; d++) {
                const size_t src_bits = fst_type_bits(rig_floats[s]);
                if (!fst_kernels_have(rig_floats[s], rig_floats[d])) continue;
                for (uint64_t count = 1; count < 70; count += 3)
                    for (size_t skew = 0; skew < 16; skew++) {
                        if (count * src_bits % 8) continue;
                        const size_t size = skew + (size_t)count * src_bits / 8;
                        uint8_t *memory = calloc(1, size);
                        CHECK(memory);
                        POISON(memory, skew);
                        const fst_cast_args args = {memory + skew, rig.dst,       count,
                                                    rig_floats[s], rig_floats[d], 0};
                        CHECK_INT(0, rig.gpu.kernels->cast(NULL, &args));
                        UNPOISON(memory, skew);
                        free(memory);
                    }
            }
    }
}

/* ---- Batches ---- */

enum { most_jobs = 64 };

/* Runs jobs of these counts over F16 -> F32 (or F16 -> F16) and compares with casts of one job each. */
static void check_batch(const uint64_t *counts, uint32_t jobs, int dst_dtype, size_t src_skew,
                        size_t dst_skew) {
    const size_t size = fst_type_bits(dst_dtype) / 8;
    static uint8_t in[1 << 18];
    test_rig rig;
    fill(in, sizeof in);
    EACH_CAST_RIG(&rig, 1 << 20) {
        fst_batch_job list[most_jobs];
        void *device_list = NULL;
        uint64_t tiles = 0, src_at = src_skew, dst_at = RIG_GUARD + dst_skew;
        rig_upload(&rig, rig.src, in, sizeof in);
        for (uint32_t i = 0; i < jobs; i++) {
            list[i] =
                (fst_batch_job){(uintptr_t)rig.src + src_at, (uintptr_t)rig.dst + dst_at, counts[i], tiles};
            tiles += (counts[i] + FST_BATCH_TILE - 1) / FST_BATCH_TILE;
            src_at += counts[i] * 2 + i % 3; /* any alignment */
            dst_at += (counts[i] + i % 5) * size + 2 * RIG_GUARD / size * size;
            CHECK(src_at <= sizeof in && dst_at + RIG_GUARD <= rig.capacity);
        }
        uint8_t *want = malloc(rig.capacity);
        CHECK(want);
        memset(want, 0x5A, rig.capacity);
        for (uint32_t i = 0; i < jobs; i++) {
            const size_t from = (size_t)(list[i].src - (uintptr_t)rig.src);
            const fst_cast_args args = {
                in + from, want + (list[i].dst - (uintptr_t)rig.dst), list[i].count, FST_T_F16, dst_dtype, 0};
            CHECK_INT(0, fst_kernels_cpu()->cast(NULL, &args));
        }
        memset(rig.host, 0x5A, rig.capacity);
        rig_upload(&rig, rig.dst, rig.host, rig.capacity);
        CHECK_INT(0, rig.gpu.calls->alloc_block(&rig.gpu, sizeof list, &device_list));
        rig_upload(&rig, device_list, list, jobs * sizeof *list);
        const fst_batch_args args = {device_list, jobs, tiles, FST_T_F16, dst_dtype, 0};
        CHECK_INT(0, rig.gpu.kernels->batch(rig.stream, &args));
        rig_download(&rig, rig.capacity);
        CHECK_BYTES(want, rig.host, rig.capacity);
        rig.gpu.calls->free_block(&rig.gpu, device_list, sizeof list);
        free(want);
    }
}

TEST(kernels_batch, one_job) {
    const uint64_t count = 77;
    check_batch(&count, 1, FST_T_F32, 0, 0);
}

TEST(kernels_batch, jobs_of_many_tiles) {
    const uint64_t counts[] = {FST_BATCH_TILE - 1, FST_BATCH_TILE, FST_BATCH_TILE + 1, 5 * FST_BATCH_TILE + 3,
                               1};
    for (size_t skew = 0; skew < 16; skew += 4) check_batch(counts, 5, FST_T_F32, skew + 1, skew);
}

TEST(kernels_batch, copies) {
    const uint64_t counts[] = {
        FST_BATCH_TILE - 1, FST_BATCH_TILE, FST_BATCH_TILE + 1, 3 * FST_BATCH_TILE, 2, 1};
    for (size_t skew = 0; skew < 16; skew += 2) check_batch(counts, 6, FST_T_F16, 15 - skew, skew);
}

TEST(kernels_batch, empty_jobs_first_between_and_last) {
    const uint64_t counts[] = {0, 0, 5, 0, FST_BATCH_TILE, 0, 0, 9, 0};
    check_batch(counts, 9, FST_T_F32, 0, 4);
}

TEST(kernels_batch, many_jobs) {
    uint64_t counts[most_jobs];
    for (int i = 0; i < most_jobs; i++) counts[i] = (uint64_t)(i * i * 37 % 1000);
    check_batch(counts, most_jobs, FST_T_F32, 3, 8);
}

TEST(kernels_batch, no_jobs) {
    const fst_batch_args args = {NULL, 0, 0, FST_T_F16, FST_T_F32, 0};
    test_rig rig;
    EACH_CAST_RIG(&rig, 4096) CHECK_INT(0, rig.gpu.kernels->batch(rig.stream, &args));
}

TEST(kernels_batch, no_list) {
    const fst_batch_args args = {NULL, 1, 1, FST_T_F16, FST_T_F32, 0};
    test_rig rig;
    EACH_CAST_RIG(&rig, 4096) CHECK_INT(FST_K_NULL, rig.gpu.kernels->batch(rig.stream, &args));
}

TEST(kernels_batch, no_such_pair) {
    const fst_batch_args args = {NULL, 1, 1, FST_T_I32, FST_T_F32, 0};
    test_rig rig;
    EACH_CAST_RIG(&rig, 4096) CHECK_INT(FST_K_NO_KERNEL, rig.gpu.kernels->batch(rig.stream, &args));
}

/* ---- Wrong arguments of cast: a status, and nothing is written ---- */

static void check_refused(int want, size_t src_skew, size_t dst_skew, int nulls, uint64_t count, int src,
                          int dst) {
    test_rig rig;
    EACH_CAST_RIG(&rig, 4096) {
        memset(rig.host, 0xA5, 4096);
        rig_upload(&rig, rig.dst, rig.host, 4096);
        const fst_cast_args args = {
            nulls & 1 ? NULL : rig.src + src_skew, nulls & 2 ? NULL : rig.dst + dst_skew, count, src, dst, 0};
        CHECK_INT(want, rig.gpu.kernels->cast(rig.stream, &args));
        rig_download(&rig, 4096);
        for (size_t i = 0; i < 4096; i++) CHECK_INT(0xA5, rig.host[i]);
    }
}

TEST(kernels_refuse, integer_to_float) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_I32, FST_T_F32); }
TEST(kernels_refuse, float_to_integer) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_F32, FST_T_I32); }
TEST(kernels_refuse, integer_to_another) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_I32, FST_T_U32); }
TEST(kernels_refuse, narrow_to_8_bits) {
    check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_F4, FST_T_F8_E4M3);
}
TEST(kernels_refuse, narrow_to_F64) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_F6_E2M3, FST_T_F64); }
TEST(kernels_refuse, narrow_to_narrow) {
    check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_F6_E2M3, FST_T_F6_E3M2);
}
TEST(kernels_refuse, to_narrow) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_F32, FST_T_F4); }
TEST(kernels_refuse, float_to_a_scale) {
    check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_F32, FST_T_F8_E8M0);
}
TEST(kernels_refuse, complex) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_C64, FST_T_F32); }
TEST(kernels_refuse, native) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, FST_T_NATIVE, FST_T_NATIVE); }
TEST(kernels_refuse, dtype_outside_the_list) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, 1000, 1000); }
TEST(kernels_refuse, dtype_below_the_list) { check_refused(FST_K_NO_KERNEL, 0, 0, 0, 4, -1, FST_T_F32); }
TEST(kernels_refuse, source_null) { check_refused(FST_K_NULL, 0, 0, 1, 4, FST_T_F16, FST_T_F32); }
TEST(kernels_refuse, destination_null) { check_refused(FST_K_NULL, 0, 0, 2, 4, FST_T_F16, FST_T_F32); }
TEST(kernels_refuse, nulls_are_fine_with_nothing_to_do) {
    check_refused(0, 0, 0, 3, 0, FST_T_F16, FST_T_F32);
}
TEST(kernels_refuse, destination_between_16_bit_elements) {
    check_refused(FST_K_ALIGN, 0, 1, 0, 4, FST_T_F32, FST_T_BF16);
}
TEST(kernels_refuse, destination_between_32_bit_elements) {
    check_refused(FST_K_ALIGN, 0, 2, 0, 4, FST_T_F16, FST_T_F32);
}
TEST(kernels_refuse, destination_between_64_bit_elements) {
    check_refused(FST_K_ALIGN, 0, 4, 0, 4, FST_T_F16, FST_T_F64);
}
TEST(kernels_refuse, copy_to_between_elements) {
    check_refused(FST_K_ALIGN, 0, 4, 0, 4, FST_T_I64, FST_T_I64);
}
TEST(kernels_refuse, bytes_of_the_source_overflow) {
    check_refused(FST_K_SIZE, 0, 0, 0, 1ull << 61, FST_T_F64, FST_T_F8_E4M3);
}
TEST(kernels_refuse, bytes_of_the_result_overflow) {
    check_refused(FST_K_SIZE, 0, 0, 0, 1ull << 61, FST_T_F8_E4M3, FST_T_F64);
}
TEST(kernels_refuse, end_beyond_the_address_space) {
    check_refused(FST_K_SIZE, 0, 0, 0, UINT64_MAX - 100, FST_T_U8, FST_T_U8);
}
TEST(kernels_refuse, elements_that_do_not_fill_a_byte) {
    check_refused(FST_K_SIZE, 0, 0, 0, 3, FST_T_F4, FST_T_F4);
}
TEST(kernels_refuse, six_bit_elements_that_do_not_fill_bytes) {
    check_refused(FST_K_SIZE, 0, 0, 0, 6, FST_T_F6_E2M3, FST_T_F6_E2M3);
}

TEST(kernels_refuse, cast_of_elements_that_do_not_fill_a_byte) {
    check_refused(FST_K_SIZE, 0, 0, 0, 3, FST_T_F4, FST_T_F32);
}
TEST(kernels_refuse, cast_of_six_bit_elements_that_do_not_fill_bytes) {
    check_refused(FST_K_SIZE, 0, 0, 0, 6, FST_T_F6_E3M2, FST_T_BF16);
}

/* ---- Which pairs there are ---- */

TEST(kernels_have, agrees_with_what_runs) {
    test_rig rig;
    CHECK_INT(FST_BF16, FST_T_BF16);
    CHECK_INT(FST_U64, FST_T_U64);
    EACH_CAST_RIG(&rig, 4096)
    for (int src = -1; src <= FST_DTYPE_COUNT; src++)
        for (int dst = -1; dst <= FST_DTYPE_COUNT; dst++) {
            const fst_cast_args args = {NULL, NULL, 0, src, dst, 0};
            CHECK_INT(fst_kernels_have(src, dst) ? 0 : FST_K_NO_KERNEL,
                      rig.gpu.kernels->cast(rig.stream, &args));
        }
}

TEST(kernels_have, levels_that_do_not_exist) {
    CHECK(!fst_kernels_cpu_level(1));
    CHECK(!fst_kernels_cpu_level(5));
}

TEST(kernels_have, the_best_level_of_this_processor) {
    const fst_kernels *best = NULL;
    for (int level = 2; level <= 4; level++)
        if (fst_kernels_cpu_level(level)) best = fst_kernels_cpu_level(level);
    CHECK(best && best == fst_kernels_cpu());
}
