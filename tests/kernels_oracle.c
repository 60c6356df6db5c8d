/* Values: every code of the 8- and 16-bit types, and chosen ones of the wider types, against tables that
 * NumPy and ml_dtypes made (oracle/casts.py), on every copy of the kernels. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"
#include "kernels_rig.h"

/* Without any tables the case is skipped, but not where everything must run. One table that is missing is a failure. */
static FILE *open_table(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file) return file;
    if (access(FST_ORACLE_TABLES "/stamp", F_OK) == 0) test_fail(__FILE__, __LINE__, "there is no %s", path);
    if (getenv("CI")) test_fail(__FILE__, __LINE__, "CI is set, but there are no tables of ml_dtypes");
    test_skip(1, "the tables are not there: the build found no Python with ml_dtypes");
}

static void *read_table(const char *name, size_t *size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", FST_ORACLE_TABLES, name);
    FILE *file = open_table(path);
    CHECK_INT(0, fseek(file, 0, SEEK_END));
    *size = (size_t)ftell(file);
    rewind(file);
    void *data = malloc(*size ? *size : 1);
    CHECK(data && fread(data, 1, *size, file) == *size);
    fclose(file);
    return data;
}

static void compare(test_rig *rig, int src, int dst, unsigned flags, uint64_t count, const uint8_t *in,
                    const uint8_t *want) {
    const size_t size = fst_type_bits(dst) / 8, src_bits = fst_type_bits(src);
    const uint8_t *got = rig_cast(rig, src, dst, flags, 0, 0, count);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t code = 0, wanted = 0, is = 0;
        if (memcmp(want + i * size, got + i * size, size) == 0) continue;
        memcpy(&code, in + i * src_bits / 8, (src_bits + 7) / 8);
        memcpy(&wanted, want + i * size, size);
        memcpy(&is, got + i * size, size);
        test_fail(__FILE__, __LINE__, "%s: %s %llX to %s%s: want %llX, got %llX", rig->gpu.kernels->target,
                  rig_dtype_name(src), (unsigned long long)code, rig_dtype_name(dst),
                  flags ? ", not saturating" : "", (unsigned long long)wanted, (unsigned long long)is);
    }
}

static void check_source(int src) {
    char name[64];
    size_t in_bytes, bytes;
    test_rig rig;
    snprintf(name, sizeof name, "%s.in", rig_dtype_name(src));
    uint8_t *in = read_table(name, &in_bytes);
    const uint64_t count = in_bytes * 8 / fst_type_bits(src);
    CHECK(count >= 256);
    EACH_CAST_RIG(&rig, (size_t)count * 8 + 2 * RIG_GUARD) {
        rig_upload(&rig, rig.src, in, in_bytes);
        for (int i = 0; i < RIG_FLOATS; i++) {
            const int dst = rig_floats[i];
            if (dst == src || !fst_kernels_have(src, dst)) continue;
            for (unsigned flags = 0; flags <= FST_K_NON_SATURATING; flags++) {
                const int saturating = fst_type_bits(dst) == 8 && !flags;
                snprintf(name, sizeof name, "%s-%s-%s.out", rig_dtype_name(src), rig_dtype_name(dst),
                         saturating ? "saturating" : "plain");
                uint8_t *want = read_table(name, &bytes);
                CHECK_INT(count * fst_type_bits(dst) / 8, bytes);
                compare(&rig, src, dst, flags, count, in, want);
                free(want);
            }
        }
    }
    free(in);
}

TEST(kernels_oracle, every_code_of_F8_E4M3) { check_source(FST_T_F8_E4M3); }
TEST(kernels_oracle, every_code_of_F8_E5M2) { check_source(FST_T_F8_E5M2); }
TEST(kernels_oracle, every_code_of_F8_E4M3FNUZ) { check_source(FST_T_F8_E4M3FNUZ); }
TEST(kernels_oracle, every_code_of_F8_E5M2FNUZ) { check_source(FST_T_F8_E5M2FNUZ); }
TEST(kernels_oracle, every_code_of_F16) { check_source(FST_T_F16); }
TEST(kernels_oracle, every_code_of_BF16) { check_source(FST_T_BF16); }
TEST(kernels_oracle, every_code_of_F8_E8M0) { check_source(FST_T_F8_E8M0); }
TEST(kernels_oracle, every_code_of_F6_E2M3) { check_source(FST_T_F6_E2M3); }
TEST(kernels_oracle, every_code_of_F6_E3M2) { check_source(FST_T_F6_E3M2); }
TEST(kernels_oracle, every_code_of_F4) { check_source(FST_T_F4); }
TEST(kernels_oracle, ties_and_neighbours_of_F32) { check_source(FST_T_F32); }
TEST(kernels_oracle, ties_and_neighbours_of_F64) { check_source(FST_T_F64); }

/* Source skew x destination skew x count, against the same tables. */
static void check_alignment(int src) {
    enum { most = 5000, room = 512 << 10 };           /* a place for each skew and count */
    static const uint64_t more[] = {255, 2049, 4999}; /* after 0 to 70 */
    const size_t src_bits = fst_type_bits(src);
    char name[64];
    size_t bytes;
    test_rig rig;
    snprintf(name, sizeof name, "%s.in", rig_dtype_name(src));
    uint8_t *in = read_table(name, &bytes);
    const uint64_t total = bytes * 8 / src_bits < most ? bytes * 8 / src_bits : most;
    EACH_CAST_RIG(&rig, room) {
        for (size_t src_skew = 0; src_skew < 16; src_skew++) {
            rig_upload(&rig, rig.src + src_skew, in, (size_t)total * src_bits / 8);
            for (int i = 0; i < RIG_FLOATS; i++) {
                const int dst = rig_floats[i];
                const size_t size = fst_type_bits(dst) / 8;
                if (dst == src || !fst_kernels_have(src, dst)) continue;
                snprintf(name, sizeof name, "%s-%s-plain.out", rig_dtype_name(src), rig_dtype_name(dst));
                uint8_t *want = read_table(name, &bytes);
                rig_queue(&rig);
                for (size_t dst_skew = 0; dst_skew < 16; dst_skew += size)
                    for (size_t c = 0; c < 74; c++) {
                        const uint64_t count = c <= 70 ? c : more[c - 71];
                        if (count > total || count * src_bits % 8) continue;
                        rig_queue_cast(&rig, src, dst, FST_K_NON_SATURATING, src_skew, dst_skew, count);
                    }
                rig_expect_queued(&rig, want);
                free(want);
            }
        }
    }
    free(in);
}

TEST(kernels_align, from_F8_E4M3) { check_alignment(FST_T_F8_E4M3); }
TEST(kernels_align, from_F8_E5M2) { check_alignment(FST_T_F8_E5M2); }
TEST(kernels_align, from_F8_E4M3FNUZ) { check_alignment(FST_T_F8_E4M3FNUZ); }
TEST(kernels_align, from_F8_E5M2FNUZ) { check_alignment(FST_T_F8_E5M2FNUZ); }
TEST(kernels_align, from_F16) { check_alignment(FST_T_F16); }
TEST(kernels_align, from_BF16) { check_alignment(FST_T_BF16); }
TEST(kernels_align, from_F8_E8M0) { check_alignment(FST_T_F8_E8M0); }
TEST(kernels_align, from_F6_E2M3) { check_alignment(FST_T_F6_E2M3); }
TEST(kernels_align, from_F6_E3M2) { check_alignment(FST_T_F6_E3M2); }
TEST(kernels_align, from_F4) { check_alignment(FST_T_F4); }
TEST(kernels_align, from_F32) { check_alignment(FST_T_F32); }
TEST(kernels_align, from_F64) { check_alignment(FST_T_F64); }
