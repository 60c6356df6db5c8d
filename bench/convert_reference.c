/* The data of the cases, and what must come out: one plain loop over scalars, in C at the base level. None of
 * the kernels' code but numeric.h, and for the narrow types not even that. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "convert.h"
#include "numeric.h"

enum { PRIME = 2097143, PERIOD = 8 * PRIME, TAIL = 16 };

/* Those up to INPUT_TAME_BITS are the same for every dtype. */
typedef enum input_kind { INPUT_BITS, INPUT_TAME_BITS, INPUT_NUMBERS, INPUT_FINITE } input_kind;

struct convert_data {
    input_kind input;
    int dtype;            /* of the numbers */
    unsigned char *bytes; /* PERIOD, and the first of them again */
};

static uint64_t mix(uint64_t x) { /* splitmix64 */
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static input_kind input_of(const convert_spec *spec) {
    if (!convert_is_quantize(spec->kernel)) return spec->keep_bits ? INPUT_TAME_BITS : INPUT_BITS;
    return spec->kernel == CONVERT_QUANTIZE_TENSOR ? INPUT_FINITE : INPUT_NUMBERS;
}

/* Numbers as weights are, four orders of magnitude of them; seldom zero, subnormal, NaN or Inf. */
static uint32_t number(uint64_t index, input_kind input) {
    const uint64_t h = mix(index);
    const uint32_t sign = (uint32_t)(h >> 32) & 0x80000000;
    const uint64_t seldom = h >> 40 & 0xFFFFF;
    if (seldom < 64) return sign;
    if (seldom < 128) return sign | 0x00012345;
    if (input == INPUT_NUMBERS && seldom == 200) return sign | 0x7F800000;
    if (input == INPUT_NUMBERS && seldom == 201) return sign | 0x7FC00000;
    return sign | (uint32_t)((127 - 10 + (h & 7)) << 23) | ((uint32_t)(h >> 8) & 0x7FFFFF);
}

static uint64_t encode(uint32_t bits, int dtype) {
    const fst_float from = fst_float_of(FST_T_F32), to = fst_float_of(dtype);
    return dtype == FST_T_F32 ? bits : fst_convert(bits, from, to, fst_limit(from, to, 1));
}

convert_data *convert_data_new(const convert_spec *spec) {
    convert_data *data = malloc(sizeof *data);
    if (!data || !(data->bytes = malloc(PERIOD + TAIL))) bench_die("out of memory");
    data->input = input_of(spec);
    data->dtype = spec->src;
    const int bits = data->input <= INPUT_TAME_BITS;
    const size_t size = bits ? 8 : fst_type_bits(spec->src) / 8;
    for (size_t i = 0; i < PERIOD / size; i++) {
        const uint64_t code = bits ? mix(i) : encode(number(i, data->input), spec->src);
        memcpy(data->bytes + i * size, &code, size);
    }
    /* Real weights have no NaN, and what counts them is not what is timed: few are enough to see that it counts. */
    for (size_t i = 0; data->input == INPUT_TAME_BITS && i < PERIOD; i++)
        if ((data->bytes[i] & 0x7F) >= 0x7C && i % 1048573 != 12345) data->bytes[i] &= 0xBF;
    memcpy(data->bytes + PERIOD, data->bytes, TAIL);
    return data;
}

void convert_data_free(convert_data *data) {
    if (data) free(data->bytes);
    free(data);
}

int convert_data_fits(const convert_data *data, const convert_spec *spec) {
    const input_kind wanted = input_of(spec);
    return data->input == wanted && (wanted <= INPUT_TAME_BITS || data->dtype == spec->src);
}

const unsigned char *convert_data_bytes(const convert_data *data, size_t *size) {
    *size = PERIOD;
    return data->bytes;
}

/* ---- Scales ---- */

uint32_t convert_scale(int dtype, uint64_t index) {
    static const uint32_t special[] = {0, 0x80000000, 0x7F800000, 0xFFC00000, 0x00012345, 0x7F7FFFFF};
    const uint64_t h = mix(~index);
    const int is_special = index % 509 == 508;
    if (dtype == FST_T_U8) return (uint32_t)(h & 0xFF); /* a code */
    if (dtype == FST_T_F8_E8M0) return is_special ? (h & 1 ? 0xFF : 0) : (uint32_t)(127 - 10 + (h & 15));
    const uint32_t sign = h >> 61 ? 0 : 0x80000000;
    const uint32_t bits = sign | (uint32_t)((127 - 10 + (h & 15)) << 23) | ((uint32_t)(h >> 8) & 0x7FFFFF);
    return (uint32_t)encode(is_special ? special[h % 6] : bits, dtype);
}

uint32_t convert_zero_word(uint64_t index) { return (uint32_t)mix(index + 77); }

/* A zero point of int8. */
static int8_t zero_byte(uint64_t index) { return (int8_t)convert_zero_word(index); }

/* Scales of scales, and what their codes mean. Of both signs, as no library would have them. */
static uint32_t nested_scale(uint64_t index) { return convert_scale(FST_T_F32, index + 1000); }
static uint32_t nested_value(uint64_t index) { return convert_scale(FST_T_F32, index + 2000); }
const float convert_offset = 0.045021437f;
const uint32_t convert_global = 0x3983126F;

const uint32_t convert_nf4[16] = {0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F,
                                  0xBDBA7871, 0x00000000, 0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A,
                                  0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000};

static void put_word(unsigned char *to, uint64_t i, uint32_t word) { memcpy(to + i * 4, &word, 4); }

void convert_companions(const convert_case *c, unsigned char *bytes) {
    const size_t size = fst_type_bits(c->spec.scale) / 8;
    unsigned char *second = bytes + c->second_at, *third = bytes + c->third_at;
    for (uint64_t i = 0; i < c->scales; i++) {
        const uint32_t code = convert_scale(c->spec.scale, i);
        memcpy(bytes + i * size, &code, size);
    }
    for (uint64_t i = 0; c->spec.kernel == CONVERT_INT8_ZEROS && i < c->scales; i++)
        second[i] = (unsigned char)zero_byte(i);
    for (uint64_t i = 0; c->spec.zeros && i < convert_packed_zeros_size(c) / 4; i++)
        put_word(second, i, convert_zero_word(i));
    for (uint64_t i = 0; c->spec.nested && i * CONVERT_NESTED < c->scales; i++)
        put_word(second, i, nested_scale(i));
    for (uint64_t i = 0; c->spec.nested && i < 256; i++) put_word(third, i, nested_value(i));
    for (uint64_t i = 0; c->spec.act_order && i < c->cols; i++) put_word(third, i, convert_group(c, i));
}

/* ---- The reference ---- */

typedef struct narrow_float {
    unsigned bits, mantissa;
    int bias;
} narrow_float;

/* By the definition in the OCP MX specification. */
static narrow_float narrow_of(int dtype) {
    switch (dtype) {
    case FST_T_F4: return (narrow_float){4, 1, 1};
    case FST_T_F6_E2M3: return (narrow_float){6, 3, 1};
    case FST_T_F6_E3M2: return (narrow_float){6, 2, 3};
    default: return (narrow_float){0, 0, 0};
    }
}

static float power_of_two(int exponent) {
    float value = 1;
    for (; exponent > 0; exponent--) value *= 2;
    for (; exponent < 0; exponent++) value /= 2;
    return value;
}

static uint32_t decode_narrow(uint32_t code, narrow_float type) {
    const uint32_t mantissa = code & ((1u << type.mantissa) - 1);
    const uint32_t exponent = code >> type.mantissa & ((1u << (type.bits - 1 - type.mantissa)) - 1);
    const float significand = (float)(exponent ? mantissa + (1u << type.mantissa) : mantissa);
    const float value =
        significand * power_of_two((int)(exponent ? exponent : 1) - type.bias - (int)type.mantissa);
    return fst_bits_of_float32(value) | (code >> (type.bits - 1) ? 0x80000000 : 0);
}

/* A code of at most 32 bits as an F32. */
static uint32_t decode(uint32_t code, int dtype) {
    if (dtype == FST_T_F32) return code;
    if (dtype == FST_T_I8) return fst_bits_of_float32((float)(int8_t)code);
    if (dtype == FST_T_F8_E8M0) return code == 255 ? 0x7FC00000 : code == 0 ? 0x00400000 : code << 23;
    if (narrow_of(dtype).bits) return decode_narrow(code, narrow_of(dtype));
    return fst_decode32(code, fst_float_of(dtype));
}

struct convert_reference {
    convert_case c;
    const unsigned char *bytes; /* of the data */
    unsigned src_bits, dst_size;
    fst_float from, to;
    uint64_t limit;
    int by_f32;        /* a narrow source: decoded here, then cast from F32 */
    uint64_t computed; /* 1 + the band of blocks or row whose scales are in `scales`; 0: none */
    uint32_t *scales;
};

convert_reference *convert_reference_new(const convert_case *c, const convert_data *data) {
    convert_reference *r = calloc(1, sizeof *r);
    if (!r || !(r->scales = calloc(c->cols / CONVERT_BLOCK + 1, sizeof *r->scales)))
        bench_die("out of memory");
    r->c = *c;
    r->bytes = data->bytes;
    r->src_bits = fst_type_bits(c->spec.src);
    r->dst_size = fst_type_bits(c->spec.dst) / 8;
    r->from = fst_float_of(c->spec.src);
    r->to = fst_float_of(c->spec.dst);
    r->by_f32 = !r->from.bits || narrow_of(c->spec.src).bits || c->spec.src == FST_T_F8_E8M0;
    if (r->by_f32) r->from = fst_float_of(FST_T_F32);
    if (r->to.bits) r->limit = fst_limit(r->from, r->to, !(c->spec.flags & FST_K_NON_SATURATING));
    return r;
}

void convert_reference_free(convert_reference *r) {
    if (r) free(r->scales);
    free(r);
}

static uint64_t source_code(const convert_reference *r, uint64_t index) {
    const uint64_t bit = index * r->src_bits;
    const unsigned char *from = r->bytes + (r->c.spec.misaligned + bit / 8) % PERIOD;
    uint64_t code;
    if (r->src_bits == 64) {
        memcpy(&code, from, sizeof code);
        return code;
    }
    code = (uint64_t)from[0] | (uint64_t)from[1] << 8 | (uint64_t)from[2] << 16 | (uint64_t)from[3] << 24;
    return code >> bit % 8 & (((uint64_t)1 << r->src_bits) - 1);
}

static uint64_t cast(const convert_reference *r, uint64_t code) {
    if (r->c.spec.keep_bits) return code == 0x80 ? 0 : code;
    if (r->c.spec.src == r->c.spec.dst) return code;
    if (!r->by_f32) return fst_convert(code, r->from, r->to, r->limit);
    const uint32_t bits = decode((uint32_t)code, r->c.spec.src);
    return r->c.spec.dst == FST_T_F32 ? bits : fst_convert(bits, r->from, r->to, r->limit);
}

/* ---- Scaled ---- */

static uint64_t scale_index(const convert_case *c, uint64_t row, uint64_t col) {
    const uint64_t groups = c->spec.group ? (c->cols + c->spec.group - 1) / c->spec.group : 0;
    switch (c->spec.kernel) {
    case CONVERT_SCALE_ROW:
    case CONVERT_BNB_INT8:
    case CONVERT_INT8_ZEROS:
    case CONVERT_QUANTIZE_ROW: return row;
    case CONVERT_BNB_NF4: return (row * c->cols + col) / c->spec.group;
    case CONVERT_MXFP4:
    case CONVERT_NVFP4:
    case CONVERT_SCALE_GROUP: return row * groups + col / c->spec.group;
    case CONVERT_FP8_COLUMN: return col;
    case CONVERT_FP8_BLOCK:
    case CONVERT_SCALE_BLOCK:
    case CONVERT_QUANTIZE_BLOCK:
        return row / CONVERT_BLOCK * ((c->cols + CONVERT_BLOCK - 1) / CONVERT_BLOCK) + col / CONVERT_BLOCK;
    default: return 0;
    }
}

/* The scale with an index, as an F32. */
static uint32_t scale_bits(const convert_spec *spec, uint64_t index) {
    const uint32_t code = convert_scale(spec->scale, index);
    if (spec->nested) {
        const volatile float product = fst_float_of_bits32(nested_value(code)) *
                                       fst_float_of_bits32(nested_scale(index / CONVERT_NESTED));
        return fst_bits_of_float32(product + convert_offset); /* two roundings */
    }
    const uint32_t scale = decode(code, spec->scale);
    if (spec->kernel != CONVERT_NVFP4) return scale;
    const float a = fst_float_of_bits32(scale), b = fst_float_of_bits32(convert_global);
    return fst_bits_of_float32(spec->flags & FST_K_DIVIDE ? a / b : a * b);
}

/* Two roundings: the product is an F32 first. */
static uint64_t product_of(const convert_reference *r, uint32_t a, uint32_t b) {
    const float product = fst_float_of_bits32(a) * fst_float_of_bits32(b);
    uint32_t bits = fst_bits_of_float32(product);
    if (r->c.spec.kernel == CONVERT_BNB_INT8) /* by RN32(1 / 127) */
        bits = fst_bits_of_float32(product * fst_float_of_bits32(0x3C010204));
    if (product != product) bits = ((a ^ b) & 0x80000000) | 0x7FC00000;
    return encode(bits, r->c.spec.dst);
}

static uint64_t scaled(const convert_reference *r, uint64_t code, uint64_t index) {
    uint32_t a = decode((uint32_t)code, r->c.spec.src);
    if (r->c.spec.kernel == CONVERT_BNB_NF4) a = convert_nf4[code];
    if (r->c.spec.kernel == CONVERT_INT8_ZEROS)
        a = fst_bits_of_float32((float)((int8_t)code - zero_byte(index)));
    return product_of(r, a, scale_bits(&r->c.spec, index));
}

static uint32_t packed_word(const void *of, uint64_t index) { return (uint32_t)source_code(of, index); }

static uint64_t packed(const convert_reference *r, uint64_t row, uint64_t col) {
    const int32_t difference = convert_packed_code(&r->c, row, col, packed_word, r);
    const uint64_t index = convert_packed_scale(&r->c, row, col);
    return product_of(r, fst_bits_of_float32((float)difference), scale_bits(&r->c.spec, index));
}

/* ---- Quantize ---- */

/* As F32 bits, whose order is that of the magnitudes; NaN is above all. */
static uint32_t amax_of(const convert_reference *r, uint32_t amax, uint64_t begin, uint64_t end) {
    const uint32_t largest = decode((uint32_t)fst_float_of(r->c.spec.src).finite, r->c.spec.src);
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t bits = decode((uint32_t)source_code(r, i), r->c.spec.src) & 0x7FFFFFFF;
        const uint32_t a = bits == 0x7F800000 ? largest : bits;
        amax = a > amax ? a : amax;
    }
    return amax;
}

static uint32_t scale_of(const convert_reference *r, uint32_t amax) {
    const float most = r->c.spec.dst == FST_T_F8_E4M3   ? 448.0f
                       : r->c.spec.dst == FST_T_F8_E5M2 ? 57344.0f
                                                        : 224.0f;
    if (amax > 0x7F800000) return 0x7FC00000;
    return amax == 0 ? 0x3F800000 : fst_bits_of_float32(fst_float_of_bits32(amax) / most);
}

/* Computes the scales of what `row` lies in: all, the row, its band of blocks. */
static void compute_scales(convert_reference *r, uint64_t row) {
    const convert_case *c = &r->c;
    const uint64_t elements = c->rows * c->cols, period = PERIOD * 8 / r->src_bits;
    if (c->spec.kernel == CONVERT_QUANTIZE_TENSOR) {
        if (!r->computed) r->scales[0] = scale_of(r, amax_of(r, 0, 0, elements < period ? elements : period));
        r->computed = 1;
    } else if (c->spec.kernel == CONVERT_QUANTIZE_ROW) {
        if (r->computed != row + 1)
            r->scales[0] = scale_of(r, amax_of(r, 0, row * c->cols, (row + 1) * c->cols));
        r->computed = row + 1;
    } else if (r->computed != row / CONVERT_BLOCK + 1) {
        const uint64_t top = row / CONVERT_BLOCK * CONVERT_BLOCK;
        const uint64_t bottom = top + CONVERT_BLOCK < c->rows ? top + CONVERT_BLOCK : c->rows;
        for (uint64_t left = 0; left < c->cols; left += CONVERT_BLOCK) {
            const uint64_t width = c->cols - left < CONVERT_BLOCK ? c->cols - left : CONVERT_BLOCK;
            uint32_t amax = 0;
            for (uint64_t y = top; y < bottom; y++)
                amax = amax_of(r, amax, y * c->cols + left, y * c->cols + left + width);
            r->scales[left / CONVERT_BLOCK] = scale_of(r, amax);
        }
        r->computed = row / CONVERT_BLOCK + 1;
    }
}

static uint64_t quantized(convert_reference *r, uint64_t code, uint64_t row, uint64_t col) {
    compute_scales(r, row);
    const uint32_t scale = r->scales[r->c.spec.kernel == CONVERT_QUANTIZE_BLOCK ? col / CONVERT_BLOCK : 0];
    const uint32_t bits = decode((uint32_t)code, r->c.spec.src);
    const uint32_t quotient = fst_bits_of_float32(fst_float_of_bits32(bits) / fst_float_of_bits32(scale));
    return encode((quotient & 0x7FFFFFFF) | (bits & 0x80000000), r->c.spec.dst);
}

uint32_t convert_expect_scale(convert_reference *r, uint64_t index) {
    const uint64_t across = (r->c.cols + CONVERT_BLOCK - 1) / CONVERT_BLOCK;
    const int blocks = r->c.spec.kernel == CONVERT_QUANTIZE_BLOCK;
    compute_scales(r, blocks ? index / across * CONVERT_BLOCK : index);
    return r->scales[blocks ? index % across : 0];
}

/* NaNs; with the bits kept Inf as well, which would also turn into a number. */
static uint64_t count_nans(const convert_reference *r, uint64_t begin, uint64_t end) {
    const uint32_t most = r->c.spec.keep_bits ? 0x7F7FFFFF : 0x7F800000;
    uint64_t found = 0;
    for (uint64_t i = begin; i < end; i++)
        found += (decode((uint32_t)source_code(r, i), r->c.spec.src) & 0x7FFFFFFF) > most;
    return found;
}

uint64_t convert_expect_nans(const convert_reference *r) {
    const uint64_t elements = r->c.rows * r->c.cols, period = PERIOD * 8 / r->src_bits;
    if (elements <= period) return count_nans(r, 0, elements);
    return count_nans(r, 0, period) * (elements / period) + count_nans(r, 0, elements % period);
}

/* The result's element. */
static uint64_t expected(convert_reference *r, uint64_t row, uint64_t col) {
    const convert_case *c = &r->c;
    const uint64_t high_first = c->spec.kernel == CONVERT_BNB_NF4;
    if (convert_is_packed(c->spec.kernel)) return packed(r, row, col);
    const uint64_t code = source_code(r, convert_source_index(c, row, col) ^ high_first);
    if (convert_is_scale(c->spec.kernel)) return scaled(r, code, scale_index(c, row, col));
    return convert_is_quantize(c->spec.kernel) ? quantized(r, code, row, col) : cast(r, code);
}

void convert_expect(convert_reference *r, uint64_t first, uint64_t count, unsigned char *out) {
    const convert_case *c = &r->c;
    uint64_t row = first / c->dst_stride, col = first % c->dst_stride;
    memset(out, CONVERT_POISON, count * r->dst_size);
    for (uint64_t i = 0; i < count; i++) {
        if (row < c->rows && col < c->cols) {
            const uint64_t code = expected(r, row, col);
            memcpy(out + i * r->dst_size, &code, r->dst_size);
        }
        if (++col == c->dst_stride) row++, col = 0;
    }
}
