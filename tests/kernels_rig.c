#include "kernels_rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

/* The shape of AMD's and NVIDIA's kernels, see tests/oracle/CMakeLists.txt. */
const fst_kernels *fst_kernels_v1(void);
const fst_kernels *fst_kernels_v0(void);

#define LAUNCH_31 (1u << 29) /* kernels/divide.h */
extern uint64_t fst_launch31;
uint64_t fst_launch31 = LAUNCH_31;
void rig_limit_launches(uint64_t elements) { fst_launch31 = elements ? elements : LAUNCH_31; }

#define X(name, ...) FST_T_##name,
const int rig_floats[RIG_SOURCES] = {FST_FLOAT_LIST(X) FST_NARROW_LIST(X)};
#undef X

const char *rig_dtype_name(int dtype) { return fst_dtype_name((fst_dtype)dtype); }

/* The GPU to test, once for the process. NULL when there is none and none is asked for. */
static const fst_gpu *find_gpu(void) {
    static const fst_gpu *gpu;
    static int done;
    if (!done) {
        const char *asked = getenv("FST_TEST_DEVICE");
        fst_error error;
        char why[512];
        fst_status status =
            fst_gpu_find(FST_DEVICE_GPU(asked ? atoi(asked) : 0), &gpu, why, sizeof why, &error);
        if (status != FST_OK) gpu = NULL;
        if (status != FST_OK && asked) test_fail(__FILE__, __LINE__, "FST_TEST_DEVICE: %s", error.text);
        done = 1;
    }
    return gpu;
}

/* Where bodies are compiled once (FST_CPU_KERNELS), levels 3 and 4 have their own casts alone. */
static int has_own(const fst_kernels *kernels, int only_casts) {
    return only_casts || kernels == fst_kernels_cpu_level(2) ||
           kernels->rows != fst_kernels_cpu_level(2)->rows;
}

static int choose(fst_gpu *gpu, size_t i, int only_casts) {
    *gpu = *fst_gpu_cpu();
    for (int level = 2; level <= 4; level++) {
        const fst_kernels *kernels = fst_kernels_cpu_level(level);
        if (kernels && has_own(kernels, only_casts) && i-- == 0) {
            gpu->kernels = kernels;
            return 1;
        }
    }
    if (i < 2) {
        gpu->kernels = i == 0 ? fst_kernels_v1() : fst_kernels_v0();
        return 1;
    }
    i -= 2;
    if (i != 0 || !find_gpu()) return 0;
    *gpu = *find_gpu();
    return 1;
}

int rig_open(test_rig *rig, size_t i, size_t capacity, int only_casts) {
    void *src, *dst;
    if (!choose(&rig->gpu, i, only_casts)) return 0;
    const fst_gpu_calls *calls = rig->gpu.calls;
    rig->capacity = capacity;
    rig->host = malloc(capacity);
    CHECK(rig->host);
    CHECK_INT(0, calls->enter(&rig->gpu, &rig->saved));
    CHECK_INT(0, calls->stream_new(&rig->gpu, &rig->stream));
    CHECK_INT(0, calls->alloc_block(&rig->gpu, capacity, &src));
    CHECK_INT(0, calls->alloc_block(&rig->gpu, capacity, &dst));
    rig->src = src;
    rig->dst = dst;
    return 1;
}

void rig_close(test_rig *rig) {
    const fst_gpu_calls *calls = rig->gpu.calls;
    calls->free_block(&rig->gpu, rig->src, rig->capacity);
    calls->free_block(&rig->gpu, rig->dst, rig->capacity);
    calls->stream_free(&rig->gpu, rig->stream);
    calls->leave(&rig->gpu, rig->saved);
    free(rig->host);
}

void rig_upload(test_rig *rig, void *device, const void *host, size_t size) {
    CHECK_INT(0, rig->gpu.calls->to_device(&rig->gpu, rig->stream, device, host, size));
    CHECK_INT(0, rig->gpu.calls->stream_wait(&rig->gpu, rig->stream));
}

void rig_download(test_rig *rig, size_t size) {
    CHECK(size <= rig->capacity);
    CHECK_INT(0, rig->gpu.calls->to_host(&rig->gpu, rig->stream, rig->host, rig->dst, size));
    CHECK_INT(0, rig->gpu.calls->stream_wait(&rig->gpu, rig->stream));
}

const uint8_t *rig_cast(test_rig *rig, int src, int dst, unsigned flags, size_t src_skew, size_t dst_skew,
                        uint64_t count) {
    const size_t bytes = (size_t)count * fst_type_bits(dst) / 8, begin = RIG_GUARD + dst_skew;
    const size_t end = begin + bytes + RIG_GUARD;
    CHECK(end <= rig->capacity);
    memset(rig->host, 0xA5, end);
    rig_upload(rig, rig->dst, rig->host, end);
    const fst_cast_args args = {rig->src + src_skew, rig->dst + begin, count, src, dst, flags};
    CHECK_INT(0, rig->gpu.kernels->cast(rig->stream, &args));
    rig_download(rig, end);
    for (size_t i = 0; i < end; i++)
        if ((i < begin || i >= begin + bytes) && rig->host[i] != 0xA5)
            test_fail(__FILE__, __LINE__, "%s: %s to %s, %zu elements from +%zu to +%zu: byte %td is changed",
                      rig->gpu.kernels->target, rig_dtype_name(src), rig_dtype_name(dst), (size_t)count,
                      src_skew, dst_skew, (ptrdiff_t)(i - begin));
    return rig->host + begin;
}

/* Where a queued cast puts its result, and which one it is. */
struct rig_place {
    size_t begin, size;
    fst_cast_args args;
};
enum { RIG_PLACES = 2048 };

void rig_queue(test_rig *rig) {
    memset(rig->host, 0xA5, rig->capacity);
    rig_upload(rig, rig->dst, rig->host, rig->capacity);
    rig->places = malloc(RIG_PLACES * sizeof *rig->places);
    CHECK(rig->places);
    rig->places_count = rig->used = 0;
}

void rig_queue_cast(test_rig *rig, int src, int dst, unsigned flags, size_t src_skew, size_t dst_skew,
                    uint64_t count) {
    const size_t size = (size_t)count * fst_type_bits(dst) / 8;
    const size_t begin = (rig->used + 15) / 16 * 16 + RIG_GUARD + dst_skew;
    CHECK(rig->places_count < RIG_PLACES && begin + size + RIG_GUARD <= rig->capacity);
    const fst_cast_args args = {rig->src + src_skew, rig->dst + begin, count, src, dst, flags};
    CHECK_INT(0, rig->gpu.kernels->cast(rig->stream, &args));
    rig->places[rig->places_count++] = (struct rig_place){begin, size, args};
    rig->used = begin + size;
}

static void fail_at(const test_rig *rig, const struct rig_place *place, size_t byte) {
    const fst_cast_args *a = &place->args;
    test_fail(__FILE__, __LINE__, "%s: %s to %s, %zu elements from +%zu to +%zu: byte %td is %02X",
              rig->gpu.kernels->target, rig_dtype_name(a->src_dtype), rig_dtype_name(a->dst_dtype),
              (size_t)a->count, (size_t)((uintptr_t)a->src % 16), (size_t)((uintptr_t)a->dst % 16),
              (ptrdiff_t)byte - (ptrdiff_t)place->begin, rig->host[byte]);
}

void rig_expect_queued(test_rig *rig, const uint8_t *want) {
    size_t at = 0;
    rig_download(rig, rig->capacity);
    for (size_t i = 0; i < rig->places_count; i++) {
        const struct rig_place *place = &rig->places[i];
        for (; at < place->begin; at++)
            if (rig->host[at] != 0xA5) fail_at(rig, place, at);
        for (; at < place->begin + place->size; at++)
            if (rig->host[at] != want[at - place->begin]) fail_at(rig, place, at);
    }
    for (; at < rig->capacity; at++)
        if (rig->host[at] != 0xA5) fail_at(rig, &rig->places[rig->places_count - 1], at);
    free(rig->places);
    rig->places = NULL;
}

uint64_t rig_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

uint64_t rig_below(uint64_t *state, uint64_t limit) { return rig_random(state) % limit; }

/* Sign apart, the codes of the largest finite number, Inf (0: none), NaN. From the formats' definitions, not from
 * numeric.h. */
typedef struct layout {
    int mantissa, bits, bias;
    uint32_t finite, inf, nan;
} layout;

static layout layout_of(int dtype) {
    switch (dtype) {
    case FST_T_F32: return (layout){23, 32, 127, 0x7F7FFFFF, 0x7F800000, 0x7FC00000};
    case FST_T_F16: return (layout){10, 16, 15, 0x7BFF, 0x7C00, 0x7E00};
    case FST_T_BF16: return (layout){7, 16, 127, 0x7F7F, 0x7F80, 0x7FC0};
    case FST_T_F8_E4M3: return (layout){3, 8, 7, 0x7E, 0, 0x7F};
    case FST_T_F8_E5M2: return (layout){2, 8, 15, 0x7B, 0x7C, 0x7E};
    case FST_T_F8_E4M3FNUZ: return (layout){3, 8, 8, 0x7F, 0, 0x80};
    case FST_T_F8_E5M2FNUZ: return (layout){2, 8, 16, 0x7F, 0, 0x80};
    case FST_T_F4: return (layout){1, 4, 1, 0x7, 0, 0};
    default: test_fail(__FILE__, __LINE__, "%s has no layout", rig_dtype_name(dtype));
    }
}

double rig_value(int dtype, uint32_t code) {
    if (dtype == FST_T_I8) return (int8_t)code;
    if (dtype == FST_T_F8_E8M0) return code == 255 ? NAN : ldexp(1, (int)code - 127);
    const layout of = layout_of(dtype);
    const uint32_t sign_bit = 1u << (of.bits - 1), magnitude = code & (sign_bit - 1);
    const int exponent = (int)(magnitude >> of.mantissa);
    const int fraction = (int)(magnitude & ((1u << of.mantissa) - 1));
    double value = exponent ? ldexp((1 << of.mantissa) + fraction, exponent - of.bias - of.mantissa)
                            : ldexp(fraction, 1 - of.bias - of.mantissa);
    if (of.inf && magnitude == of.inf) value = INFINITY;
    if (of.nan == sign_bit ? code == sign_bit : magnitude > of.finite && magnitude != of.inf) value = NAN;
    return copysign(value, code & sign_bit ? -1.0 : 1.0);
}

uint32_t rig_code(int dtype, double value, int saturate) {
    const layout of = layout_of(dtype);
    const uint32_t sign_bit = 1u << (of.bits - 1), sign = signbit(value) ? sign_bit : 0;
    const int fnuz = of.nan == sign_bit, least = 1 - of.bias;
    uint64_t code;
    if (isnan(value)) {
        return fnuz ? of.nan : of.nan | sign;
    } else if (isinf(value)) {
        code = UINT32_MAX;
    } else {
        const double magnitude = fabs(value);
        const int exponent = magnitude > 0 && ilogb(magnitude) > least ? ilogb(magnitude) : least;
        code = (uint64_t)rint(ldexp(magnitude, of.mantissa - exponent));
        code += (uint64_t)(exponent - least) << of.mantissa;
    }
    if (code > of.finite) code = saturate ? of.finite : of.inf ? of.inf : of.nan;
    if (fnuz && code == 0) return 0;
    return (uint32_t)code | sign;
}
