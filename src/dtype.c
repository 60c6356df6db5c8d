/* Facts about dtypes, all from one list. */
#include "dtype.h"

#include <string.h>
#include <strings.h>

#include "dtype_list.h"
#include "kernels.h"

typedef struct dtype_facts {
    const char *name;
    unsigned char length; /* of the name */
    unsigned char bits;
    unsigned char dlpack_code;
} dtype_facts;

#define FACTS(name, bits, code) {#name, sizeof #name - 1, bits, code},
static const dtype_facts facts[FST_DTYPE_COUNT] = {{"NATIVE", 6, 0, 0}, FST_DTYPE_LIST(FACTS)};

/* The list and the enum of fst.h are in one order. */
#define ORDER(name, bits, code) ORDER_##name,
enum { ORDER_NATIVE, FST_DTYPE_LIST(ORDER) ORDER_COUNT };
#define SAME(name, bits, code) \
    _Static_assert((int)FST_##name == (int)ORDER_##name, "dtype_list.h and fst.h differ at " #name);
FST_DTYPE_LIST(SAME)
_Static_assert((int)FST_DTYPE_COUNT == (int)ORDER_COUNT, "dtype_list.h and fst.h differ in length");

static int is_stored(fst_dtype dtype) { return dtype > FST_NATIVE && dtype < FST_DTYPE_COUNT; }

const char *fst_dtype_name(fst_dtype dtype) {
    return dtype == FST_NATIVE || is_stored(dtype) ? facts[dtype].name : NULL;
}

unsigned fst_dtype_bits(fst_dtype dtype) { return is_stored(dtype) ? facts[dtype].bits : 0; }

fst_dtype fst_dtype_from_name(const char *name) {
    if (!name) return FST_NATIVE;
    for (int i = FST_NATIVE + 1; i < FST_DTYPE_COUNT; i++) {
        if (strcasecmp(name, facts[i].name) == 0) return (fst_dtype)i;
    }
    return FST_NATIVE;
}

fst_dtype fst_dtype_parse(const char *name, size_t length) {
    for (int i = FST_NATIVE + 1; i < FST_DTYPE_COUNT; i++) {
        if (facts[i].length == length && memcmp(name, facts[i].name, length) == 0) return (fst_dtype)i;
    }
    return FST_NATIVE;
}

unsigned fst_dtype_dlpack_code(fst_dtype dtype) { return is_stored(dtype) ? facts[dtype].dlpack_code : 0; }

int fst_dtype_is_castable(fst_dtype dtype) {
    switch (dtype) {
    case FST_F4:
    case FST_F6_E2M3:
    case FST_F6_E3M2:
    case FST_F8_E5M2:
    case FST_F8_E4M3:
    case FST_F8_E4M3FNUZ:
    case FST_F8_E5M2FNUZ:
    case FST_F16:
    case FST_BF16:
    case FST_F32:
    case FST_F64: return 1;
    default: return 0;
    }
}

int fst_dtype_can_cast(fst_dtype from, fst_dtype to) {
    if (!is_stored(from)) return 0;
    if (to == FST_NATIVE || to == from) return 1;
    return fst_dtype_is_castable(from) && fst_dtype_is_castable(to) && fst_kernels_have(from, to);
}

uint64_t fst_dtype_bytes(fst_dtype dtype, uint64_t count) {
    unsigned bits = fst_dtype_bits(dtype);
    return bits % 8 == 0 ? count * (bits / 8) : count * bits / 8;
}
