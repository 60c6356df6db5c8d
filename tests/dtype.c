/* Facts about dtypes, against the reference's list and dlpack.h. */
#include "dtype.h"

#include <dlpack/dlpack.h>
#include <string.h>

#include "harness.h"

/* As in safetensors 0.8 and dlpack.h. */
static const struct known {
    fst_dtype dtype;
    const char *name;
    unsigned bits, code;
} known[] = {
    {FST_BOOL, "BOOL", 8, kDLBool},
    {FST_F4, "F4", 4, kDLFloat4_e2m1fn},
    {FST_F6_E2M3, "F6_E2M3", 6, kDLFloat6_e2m3fn},
    {FST_F6_E3M2, "F6_E3M2", 6, kDLFloat6_e3m2fn},
    {FST_U8, "U8", 8, kDLUInt},
    {FST_I8, "I8", 8, kDLInt},
    {FST_F8_E5M2, "F8_E5M2", 8, kDLFloat8_e5m2},
    {FST_F8_E4M3, "F8_E4M3", 8, kDLFloat8_e4m3fn},
    {FST_F8_E8M0, "F8_E8M0", 8, kDLFloat8_e8m0fnu},
    {FST_F8_E4M3FNUZ, "F8_E4M3FNUZ", 8, kDLFloat8_e4m3fnuz},
    {FST_F8_E5M2FNUZ, "F8_E5M2FNUZ", 8, kDLFloat8_e5m2fnuz},
    {FST_I16, "I16", 16, kDLInt},
    {FST_U16, "U16", 16, kDLUInt},
    {FST_F16, "F16", 16, kDLFloat},
    {FST_BF16, "BF16", 16, kDLBfloat},
    {FST_I32, "I32", 32, kDLInt},
    {FST_U32, "U32", 32, kDLUInt},
    {FST_F32, "F32", 32, kDLFloat},
    {FST_C64, "C64", 64, kDLComplex},
    {FST_F64, "F64", 64, kDLFloat},
    {FST_I64, "I64", 64, kDLInt},
    {FST_U64, "U64", 64, kDLUInt},
};
enum { KNOWN = sizeof known / sizeof *known };

static const fst_dtype outside[] = {(fst_dtype)-1, FST_DTYPE_COUNT, (fst_dtype)1000};
enum { OUTSIDE = sizeof outside / sizeof *outside };

static int is_kept(fst_dtype dtype) {
    static const fst_dtype kept[] = {FST_BOOL, FST_U8,  FST_I8,  FST_I16, FST_U16,    FST_I32,
                                     FST_U32,  FST_I64, FST_U64, FST_C64, FST_F8_E8M0};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        if (kept[i] == dtype) return 1;
    }
    return 0;
}

TEST(dtype, list_is_the_references) {
    CHECK_INT(FST_DTYPE_COUNT - 1, KNOWN);
    for (int i = 0; i < KNOWN; i++) CHECK_INT(i + 1, known[i].dtype);
}

TEST(dtype, name) {
    for (int i = 0; i < KNOWN; i++) CHECK_STR(known[i].name, fst_dtype_name(known[i].dtype));
}

TEST(dtype, name_of_native) { CHECK_STR("NATIVE", fst_dtype_name(FST_NATIVE)); }

TEST(dtype, name_outside_the_list) {
    for (int i = 0; i < OUTSIDE; i++) CHECK(fst_dtype_name(outside[i]) == NULL);
}

TEST(dtype, bits) {
    for (int i = 0; i < KNOWN; i++) CHECK_INT(known[i].bits, fst_dtype_bits(known[i].dtype));
}

TEST(dtype, bits_outside_the_list) {
    CHECK_INT(0, fst_dtype_bits(FST_NATIVE));
    for (int i = 0; i < OUTSIDE; i++) CHECK_INT(0, fst_dtype_bits(outside[i]));
}

TEST(dtype, dlpack_code) {
    for (int i = 0; i < KNOWN; i++) CHECK_INT(known[i].code, fst_dtype_dlpack_code(known[i].dtype));
}

TEST(dtype, from_name_in_any_case) {
    for (int i = 0; i < KNOWN; i++) CHECK_INT(known[i].dtype, fst_dtype_from_name(known[i].name));
    CHECK_INT(FST_BF16, fst_dtype_from_name("bf16"));
    CHECK_INT(FST_F8_E4M3, fst_dtype_from_name("f8_E4m3"));
}

TEST(dtype, from_name_unknown) {
    static const char *const unknown[] = {"",      "BF",      "BF160",  "BF16 ",
                                          " BF16", "float16", "NATIVE", "F8_E4M3FN"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        CHECK_INT(FST_NATIVE, fst_dtype_from_name(unknown[i]));
    }
}

TEST(dtype, from_name_null) { CHECK_INT(FST_NATIVE, fst_dtype_from_name(NULL)); }

TEST(dtype, parse_exact_bytes) {
    for (int i = 0; i < KNOWN; i++) {
        CHECK_INT(known[i].dtype, fst_dtype_parse(known[i].name, strlen(known[i].name)));
    }
    CHECK_INT(FST_F8_E4M3, fst_dtype_parse("F8_E4M3FNUZ", 7)); /* the length decides */
}

TEST(dtype, parse_refuses_what_is_not_exact) {
    CHECK_INT(FST_NATIVE, fst_dtype_parse("bf16", 4));
    CHECK_INT(FST_NATIVE, fst_dtype_parse("BF16", 5)); /* with its NUL */
    CHECK_INT(FST_NATIVE, fst_dtype_parse("BF16", 3));
    CHECK_INT(FST_NATIVE, fst_dtype_parse("", 0));
    CHECK_INT(FST_NATIVE, fst_dtype_parse("NATIVE", 6));
}

TEST(dtype, castable) {
    for (int i = 0; i < KNOWN; i++) {
        CHECK_INT(!is_kept(known[i].dtype), fst_dtype_is_castable(known[i].dtype));
    }
}

TEST(dtype, castable_outside_the_list) {
    CHECK_INT(0, fst_dtype_is_castable(FST_NATIVE));
    for (int i = 0; i < OUTSIDE; i++) CHECK_INT(0, fst_dtype_is_castable(outside[i]));
}

TEST(dtype, can_keep_everything) {
    for (int i = 0; i < KNOWN; i++) {
        CHECK_INT(1, fst_dtype_can_cast(known[i].dtype, FST_NATIVE));
        CHECK_INT(1, fst_dtype_can_cast(known[i].dtype, known[i].dtype));
    }
}

/* docs/kernels.md: among these eight all pairs; the narrow ones only to F32, F16 and BF16. */
static int is_wide(fst_dtype dtype) { return dtype == FST_F32 || dtype == FST_F16 || dtype == FST_BF16; }

static int is_narrow(fst_dtype dtype) {
    return dtype == FST_F4 || dtype == FST_F6_E2M3 || dtype == FST_F6_E3M2;
}

static int is_among_the_eight(fst_dtype dtype) { return !is_kept(dtype) && !is_narrow(dtype); }

TEST(dtype, can_cast_what_the_docs_say) {
    int narrow = 0, others = 0;
    for (int from = 0; from < KNOWN; from++) {
        for (int to = 0; to < KNOWN; to++) {
            fst_dtype a = known[from].dtype, b = known[to].dtype;
            int widens = is_narrow(a) && is_wide(b), among = is_among_the_eight(a) && is_among_the_eight(b);
            CHECK_INT(a == b || widens || among, fst_dtype_can_cast(a, b));
            narrow += widens;
            others += among;
        }
    }
    CHECK_INT(3 * 3, narrow);
    CHECK_INT(8 * 8, others);
}

TEST(dtype, cannot_cast_from_kept_types) {
    for (int i = 0; i < KNOWN; i++) {
        if (is_kept(known[i].dtype)) CHECK_INT(0, fst_dtype_can_cast(known[i].dtype, FST_F32));
    }
}

TEST(dtype, cannot_cast_to_kept_types) {
    for (int i = 0; i < KNOWN; i++) {
        if (is_kept(known[i].dtype)) CHECK_INT(0, fst_dtype_can_cast(FST_F32, known[i].dtype));
    }
}

TEST(dtype, cannot_cast_outside_the_list) {
    CHECK_INT(0, fst_dtype_can_cast(FST_NATIVE, FST_F32));
    CHECK_INT(0, fst_dtype_can_cast(FST_NATIVE, FST_NATIVE));
    for (int i = 0; i < OUTSIDE; i++) {
        CHECK_INT(0, fst_dtype_can_cast(outside[i], FST_F32));
        CHECK_INT(0, fst_dtype_can_cast(FST_F32, outside[i]));
        CHECK_INT(0, fst_dtype_can_cast(outside[i], outside[i]));
    }
}

TEST(dtype, bytes) {
    CHECK_INT(3, fst_dtype_bytes(FST_F6_E2M3, 4));
    CHECK_INT(5, fst_dtype_bytes(FST_F4, 10));
    CHECK_INT(80, fst_dtype_bytes(FST_C64, 10));
    CHECK_INT(0, fst_dtype_bytes(FST_F32, 0));
    CHECK(fst_dtype_bytes(FST_U8, 1ull << 60) == 1ull << 60);
    CHECK(fst_dtype_bytes(FST_U64, 1ull << 60) == 1ull << 63);
}
