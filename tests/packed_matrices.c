/* Loads of whole matrices of packed integers: made here of codes, zero points and scales, and packed as the formats'
 * specification has it, so that what must come out is known without unpacking anything. Large ones are cut by chunks at
 * all kinds of places; on the CPU device and on the fake GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "support.h"

typedef enum layout { GPTQ, AWQ, GEMV, PACKED, PAIRS, QUARK } layout;

typedef struct matrix {
    layout layout;
    unsigned bits, rows, cols, group;
    int zeros;      /* PACKED, QUARK: with zero points; 2: unpacked I8, without an offset */
    int padded;     /* PACKED: no code in two words */
    int order;      /* g_idx of groups in another order; -1: one that is not filled in */
    unsigned stack; /* PACKED, PAIRS: so many, 0: no stack */
    const char *config;
} matrix;

/* What the matrices are packed from, and into. */
typedef struct made {
    const matrix *m;
    unsigned groups, stack;
    unsigned char *code,
        *zero;       /* of each element, of each scale: [stack, rows, cols], [stack, rows, groups] */
    uint16_t *scale; /* F16, of PACKED and PAIRS BF16 */
    uint32_t *codes, *zeros;
    unsigned char *zero_bytes;
    uint16_t *scales;
    int32_t *order;
    int64_t shape[3];
    char text[8][32];
} made;

/* ---- Packing ---- */

/* Code k of a run of words that are `step` apart. */
static void put(uint32_t *words, size_t step, unsigned bits, size_t k, int padded, uint32_t code) {
    size_t at = padded ? k / (32 / bits) * 32 + k % (32 / bits) * bits : k * bits;
    for (unsigned i = 0; i < bits; i++, at++) words[at / 32 * step] |= (code >> i & 1) << at % 32;
}

static unsigned awq_shift(unsigned j) {
    static const unsigned shifts[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    return shifts[j % 8];
}

static size_t words_of(const matrix *m, size_t count) {
    return m->padded ? (count + 32 / m->bits - 1) / (32 / m->bits) : (count * m->bits + 31) / 32;
}

static void pack_code(const made *w, unsigned e, unsigned row, unsigned col, uint32_t code) {
    const matrix *m = w->m;
    const size_t across = (m->rows + 7) / 8;
    switch (m->layout) {
    case GPTQ: put(w->codes + row, m->rows, m->bits, col, 0, code); break;
    case AWQ: w->codes[col * across + row / 8] |= code << awq_shift(row); break;
    case GEMV: put(w->codes + (size_t)row * (m->cols / 8), 1, 4, col, 0, code); break;
    case PACKED:
        put(w->codes + ((size_t)e * m->rows + row) * words_of(m, m->cols), 1, m->bits, col, m->padded, code);
        break;
    case PAIRS: /* two's complement */
        ((unsigned char *)w->codes)[((size_t)e * m->rows / 2 + row / 2) * m->cols + col] |=
            (unsigned char)((code ^ 8) << row % 2 * 4);
        break;
    case QUARK: w->codes[col * across + row / 8] |= (m->zeros ? code : code ^ 8) << awq_shift(row); break;
    }
}

static void pack_zero(const made *w, unsigned e, unsigned row, unsigned j, uint32_t zero) {
    const matrix *m = w->m;
    const size_t across = (m->rows + 7) / 8;
    switch (m->layout) {
    case GPTQ: put(w->zeros + j * words_of(m, m->rows), 1, m->bits, row, 0, zero - 1); break;
    case AWQ:
    case QUARK: w->zeros[j * across + row / 8] |= zero << awq_shift(row); break;
    case GEMV: put(w->zeros + (size_t)row * ((w->groups + 7) / 8), 1, 4, j, 0, zero); break;
    case PACKED:
        put(w->zeros + e * words_of(m, m->rows) * w->groups + j, w->groups, m->bits, row, m->padded, zero);
        w->zero_bytes[(e * m->rows + row) * w->groups + j] = (unsigned char)(zero - (1u << (m->bits - 1)));
        break;
    case PAIRS: break;
    }
}

static size_t scale_at(const made *w, unsigned e, unsigned row, unsigned j) {
    const matrix *m = w->m;
    if (m->layout == GEMV) return (size_t)row * ((w->groups + 7) / 8 * 8) + j;
    if (m->layout == PACKED || m->layout == PAIRS) return ((size_t)e * m->rows + row) * w->groups + j;
    return (size_t)j * m->rows + row;
}

static int has_zeros(const matrix *m) {
    return m->layout == GPTQ || m->layout == AWQ || m->layout == GEMV || m->zeros;
}

static made *make(const matrix *m, uint64_t seed) {
    made *w = calloc(1, sizeof *w);
    w->m = m, w->stack = m->stack ? m->stack : 1, w->groups = m->cols / m->group;
    const size_t all = (size_t)w->stack * m->rows * m->cols, scales = (size_t)w->stack * m->rows * w->groups;
    w->code = malloc(all), w->zero = malloc(scales), w->scale = malloc(2 * scales);
    w->codes = calloc(all / 2 + 64, 4), w->zeros = calloc(scales + 64, 4);
    w->zero_bytes = calloc(scales, 1), w->scales = calloc(8 * scales, 2), w->order = malloc(4 * m->cols);
    support_random(w->code, all, seed);
    support_random(w->zero, scales, seed + 1);
    support_random(w->scale, 2 * scales, seed + 2);
    for (unsigned e = 0; e < w->stack; e++)
        for (unsigned row = 0; row < m->rows; row++) {
            for (unsigned col = 0; col < m->cols; col++) {
                unsigned char *code = &w->code[((size_t)e * m->rows + row) * m->cols + col];
                pack_code(w, e, row, col, *code &= (unsigned char)((1u << m->bits) - 1));
            }
            for (unsigned j = 0; j < w->groups; j++) {
                const size_t i = ((size_t)e * m->rows + row) * w->groups + j;
                w->zero[i] &= (unsigned char)((1u << m->bits) - 1);
                if (m->layout == GPTQ && w->zero[i] == 0) w->zero[i] = 1; /* what is less one fits */
                pack_zero(w, e, row, j, w->zero[i]);
                w->scale[i] = (uint16_t)((w->scale[i] & 0x83FF) | 0x3800); /* 0.5 to 1, or 2^-15 to 2^-7 */
                w->scales[scale_at(w, e, row, j)] = w->scale[i];
            }
        }
    for (unsigned col = 0; col < m->cols; col++)
        w->order[col] = m->order < 0 ? -1 : (int32_t)(col * 29 % m->cols / m->group);
    return w;
}

static void made_free(made *w) {
    void *const all[] = {w->code,       w->zero,   w->scale, w->codes, w->zeros,
                         w->zero_bytes, w->scales, w->order, w};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* ---- Files ---- */

static const char *shape_of(char *text, const matrix *m, size_t a, size_t b) {
    if (m->stack) sprintf(text, "[%u,%zu,%zu]", m->stack, a, b);
    else sprintf(text, "[%zu,%zu]", a, b);
    return text;
}

static support_tensor tensor(const char *name, const char *dtype, const char *shape, const void *data,
                             size_t n) {
    return (support_tensor){name, dtype, shape, data, n};
}

/* The checkpoint's tensors; a plain one first, so that the others begin anywhere. */
static size_t tensors_of(made *w, support_tensor out[8]) {
    static const unsigned char plain[1111] = {0};
    const matrix *m = w->m;
    const size_t rows = m->rows, cols = m->cols, groups = w->groups, across = (rows + 7) / 8;
    char(*text)[32] = w->text;
    size_t n = 0;
    out[n++] = tensor("plain", "U8", "[1111]", plain, sizeof plain);
    if (m->layout == PACKED) {
        const size_t words = words_of(m, cols), zero_words = words_of(m, rows);
        const unsigned dims = m->stack ? 3 : 2;
        w->shape[0] = m->stack, w->shape[dims - 2] = (int64_t)rows, w->shape[dims - 1] = (int64_t)cols;
        out[n++] = tensor("m.weight_packed", "I32", shape_of(text[0], m, rows, words), w->codes,
                          w->stack * rows * words * 4);
        out[n++] = tensor("m.weight_shape", "I64", m->stack ? "[3]" : "[2]", w->shape, 8 * dims);
        out[n++] = tensor("m.weight_scale", "BF16", shape_of(text[1], m, rows, groups), w->scales,
                          w->stack * rows * groups * 2);
        if (m->zeros == 1)
            out[n++] = tensor("m.weight_zero_point", "I32", shape_of(text[2], m, zero_words, groups),
                              w->zeros, w->stack * zero_words * groups * 4);
        if (m->zeros == 2)
            out[n++] = tensor("m.weight_zero_point", "I8", shape_of(text[2], m, rows, groups), w->zero_bytes,
                              w->stack * rows * groups);
        sprintf(text[3], "[%zu]", cols);
        if (m->order) out[n++] = tensor("m.weight_g_idx", "I32", text[3], w->order, cols * 4);
        return n;
    }
    if (m->layout == PAIRS) {
        out[n++] = tensor("m.weight", "U8", shape_of(text[0], m, rows / 2, cols), w->codes,
                          w->stack * rows / 2 * cols);
        out[n++] = tensor("m.weight_scale", "BF16", shape_of(text[1], m, rows, groups), w->scales,
                          w->stack * rows * groups * 2);
        return n;
    }
    const size_t zero_words = (groups + 7) / 8;
    const size_t high = m->layout == GPTQ ? words_of(m, cols) : m->layout == GEMV ? rows : cols;
    const size_t wide = m->layout == GPTQ ? rows : m->layout == GEMV ? cols / 8 : across;
    const size_t z[2] = {m->layout == GEMV ? rows : groups, m->layout == GPTQ   ? words_of(m, rows)
                                                            : m->layout == GEMV ? zero_words
                                                                                : across};
    const size_t s[2] = {z[0], m->layout == GEMV ? 8 * zero_words : rows};
    const int quark = m->layout == QUARK;
    out[n++] = tensor(quark ? "m.weight" : "m.qweight", "I32", shape_of(text[0], m, high, wide), w->codes,
                      high * wide * 4);
    out[n++] = tensor(quark ? "m.weight_scale" : "m.scales", "F16", shape_of(text[1], m, s[0], s[1]),
                      w->scales, s[0] * s[1] * 2);
    if (has_zeros(m))
        out[n++] = tensor(quark ? "m.weight_zero_point" : "m.qzeros", "I32", shape_of(text[2], m, z[0], z[1]),
                          w->zeros, z[0] * z[1] * 4);
    sprintf(text[3], "[%zu]", cols);
    if (m->order) out[n++] = tensor("m.g_idx", "I32", text[3], w->order, cols * 4);
    return n;
}

static void write_files(made *w, size_t padding) {
    support_tensor tensors[8];
    const size_t count = tensors_of(w, tensors);
    support_checkpoint(test_path("model.safetensors"), NULL, tensors, count, padding);
    remove(test_path("config.json"));
    if (w->m->config) support_write(test_path("config.json"), w->m->config, strlen(w->m->config));
}

/* ---- What must come out ---- */

/* (code - zero) x scale is exact in F32. */
static float value(const made *w, size_t row, unsigned col) {
    const matrix *m = w->m;
    const unsigned j = m->order > 0 ? (unsigned)w->order[col] : col / m->group;
    const size_t i = row * w->groups + j;
    const int zero = has_zeros(m) ? w->zero[i] : 1 << (m->bits - 1);
    const uint16_t bits = w->scale[i];
    const int is_bf16 = m->layout == PACKED || m->layout == PAIRS;
    const uint32_t wide =
        is_bf16 ? (uint32_t)bits << 16 : (bits & 0x8000u) << 16 | ((bits & 0x7FFFu) + 0x1C000) << 13;
    float scale;
    memcpy(&scale, &wide, 4);
    return (float)(w->code[row * m->cols + col] - zero) * scale;
}

static uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static void check_result(const made *w, const fst_tensor *t, const char *where) {
    const matrix *m = w->m;
    CHECK_INT(m->stack ? 3 : 2, t->ndim);
    CHECK_INT(m->rows, t->shape[t->ndim - 2]);
    CHECK_INT(m->cols, t->shape[t->ndim - 1]);
    for (size_t row = 0; row < w->stack * m->rows; row++)
        for (unsigned col = 0; col < m->cols; col++) {
            const float want = value(w, row, col);
            const size_t i = row * m->cols + col;
            const int same = t->dtype == FST_F32 ? ((const float *)t->data)[i] == want
                                                 : ((const uint16_t *)t->data)[i] == bf16_of(want);
            if (!same)
                test_fail(__FILE__, __LINE__, "%s: row %zu, column %u, should be %g", where, row, col,
                          (double)want);
        }
}

static void load_one(const made *w, int device, fst_dtype cast, size_t slot) {
    fst_options options = support_options(device);
    fst_model *model;
    fst_tensor t;
    fst_error error;
    char where[64];
    sprintf(where, "device %d, %s, slots of %zu", device, fst_dtype_name(cast), slot);
    options.cast = cast;
    options.slot_bytes = slot;
    if (fst_load(support_list(test_path("model.safetensors")), &options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK_INT(2, fst_model_count(model));
    CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &t));
    check_result(w, &t, where);
    fst_model_free(model);
}

static void check_matrix(const matrix *m) {
    static const size_t slots[] = {64 << 10, 76 << 10, 0};
    made *w = make(m, 31 * (uint64_t)m->layout + m->bits);
    for (unsigned i = 0; i < 3; i++) {
        const fst_dtype cast = i % 2 ? FST_F32 : FST_BF16;
        write_files(w, 3 * i);
        load_one(w, FST_DEVICE_CPU, cast, slots[i]);
        fake_gpu_begin(&(fake_gpu_options){.seed = i + 1});
        load_one(w, FST_DEVICE_GPU(0), cast, slots[i]);
        fake_gpu_end();
    }
    made_free(w);
}

#define QUANT(method, more) "{\"quantization_config\":{\"quant_method\":\"" method "\"" more "}}"
#define BITS(b) QUANT("compressed-tensors", ",\"config_groups\":{\"g\":{\"weights\":{\"num_bits\":" b "}}}")

/* ---- What chunks cut: 64 KiB and more of codes several times over, sides that no tile has ---- */

TEST(packed_matrices, gptq) {
    check_matrix(&(matrix){GPTQ, .bits = 4, .rows = 520, .cols = 1056, .group = 96});
    check_matrix(&(matrix){GPTQ, .bits = 2, .rows = 1040, .cols = 1056, .group = 96});
    check_matrix(&(matrix){GPTQ, .bits = 8, .rows = 260, .cols = 1056, .group = 96});
}

TEST(packed_matrices, gptq_of_three_bits) {
    check_matrix(&(matrix){GPTQ, .bits = 3, .rows = 544, .cols = 1056, .group = 32});
}

TEST(packed_matrices, gptq_with_groups_in_another_order) {
    check_matrix(&(matrix){GPTQ, .bits = 4, .rows = 520, .cols = 1056, .group = 96, .order = 1});
    check_matrix(&(matrix){GPTQ, .bits = 3, .rows = 544, .cols = 1056, .group = 96, .order = 1});
}

TEST(packed_matrices, awq) {
    check_matrix(&(matrix){AWQ, .bits = 4, .rows = 520, .cols = 1050, .group = 50});
    check_matrix(&(matrix){AWQ, .bits = 4, .rows = 40, .cols = 9000, .group = 100});
}

/* Zero points and scales have room for a multiple of eight groups: 11 need 16, whose last five are not used. */
TEST(packed_matrices, awq_gemv) {
    check_matrix(&(matrix){GEMV, .bits = 4, .rows = 301, .cols = 1408, .group = 128,
                           .config = QUANT("awq", ",\"version\":\"gemv\",\"group_size\":128,\"bits\":4")});
}

TEST(packed_matrices, rows_of_four_bits) {
    check_matrix(&(matrix){PACKED, .bits = 4, .rows = 301, .cols = 1059, .group = 353, .config = BITS("4")});
    check_matrix(&(matrix){PACKED, .bits = 4, .rows = 300, .cols = 1056, .group = 32, .zeros = 1,
                           .config = BITS("4")});
    check_matrix(&(matrix){PACKED, .bits = 4, .rows = 301, .cols = 1056, .group = 32, .zeros = 2,
                           .config = BITS("4")});
}

/* Where codes lie in two words, and where words have bits that are no code's. */
TEST(packed_matrices, rows_of_all_widths) {
    static const char *const configs[] = {BITS("1"), BITS("2"), BITS("3"), BITS("4"),
                                          BITS("5"), BITS("6"), BITS("7"), BITS("8")};
    for (unsigned bits = 1; bits <= 8; bits++)
        for (int padded = 0; padded < (32 % bits ? 2 : 1); padded++)
            check_matrix(&(matrix){PACKED, .bits = bits, .rows = 260, .cols = 700, .group = 100,
                                   .zeros = (int)bits % 3, .padded = padded, .config = configs[bits - 1]});
}

/* How many bits there are is told by the words and columns, where that leaves no doubt. */
TEST(packed_matrices, widths_that_no_configuration_tells) {
    check_matrix(&(matrix){PACKED, .bits = 2, .rows = 16, .cols = 640, .group = 64});
    check_matrix(&(matrix){PACKED, .bits = 3, .rows = 16, .cols = 640, .group = 64, .padded = 1});
}

TEST(packed_matrices, rows_with_groups_in_another_order) {
    check_matrix(&(matrix){PACKED, .bits = 4, .rows = 300, .cols = 1056, .group = 32, .zeros = 1, .order = 1,
                           .config = BITS("4")});
}

/* A g_idx of -1 counts for nothing: groups are in their order. */
TEST(packed_matrices, groups_that_are_not_filled_in) {
    check_matrix(&(matrix){PACKED, .bits = 4, .rows = 20, .cols = 1056, .group = 32, .order = -1,
                           .config = BITS("4")});
}

TEST(packed_matrices, stacks_of_rows) {
    check_matrix(&(matrix){PACKED, .bits = 4, .rows = 100, .cols = 1056, .group = 32, .zeros = 1, .stack = 5,
                           .config = BITS("4")});
    check_matrix(&(matrix){PACKED, .bits = 3, .rows = 101, .cols = 1059, .group = 353, .stack = 5,
                           .config = BITS("3")});
    check_matrix(&(matrix){PACKED, .bits = 8, .rows = 33, .cols = 1056, .group = 32, .zeros = 2, .stack = 5,
                           .config = BITS("8")});
}

TEST(packed_matrices, two_rows_in_a_byte) {
    check_matrix(&(matrix){PAIRS, .bits = 4, .rows = 302, .cols = 1059, .group = 353});
    check_matrix(&(matrix){PAIRS, .bits = 4, .rows = 102, .cols = 1056, .group = 32, .stack = 4});
}

TEST(packed_matrices, quark) {
    check_matrix(
        &(matrix){QUARK, .bits = 4, .rows = 515, .cols = 1050, .group = 50, .config = QUANT("quark", "")});
    check_matrix(&(matrix){QUARK, .bits = 4, .rows = 520, .cols = 1050, .group = 50, .zeros = 1,
                           .config = QUANT("quark", "")});
}

/* ---- Slots that are too small for what lies in two words ---- */

static void check_slots(const matrix *m, size_t needed, size_t enough) {
    made *w = make(m, 5);
    fst_options options = support_options(FST_DEVICE_CPU);
    fst_model *model;
    fst_error error;
    char text[128];
    write_files(w, 1);
    options.cast = FST_BF16;
    CHECK_INT(FST_E_UNSUPPORTED,
              fst_load(support_list(test_path("model.safetensors")), &options, &model, &error));
    sprintf(text, "codes of 3 bits lie in two words; that needs slot_bytes of at least %zu", needed);
    if (!strstr(error.text, text)) test_fail(__FILE__, __LINE__, "%s", error.text);
    load_one(w, FST_DEVICE_CPU, FST_BF16, enough);
    made_free(w);
}

TEST(packed_matrices, three_bits_need_slots_for_a_row) {
    check_slots(&(matrix){GPTQ, .bits = 3, .rows = 5632, .cols = 64, .group = 32}, 3 * 5632 * 4, 68 << 10);
    check_slots(&(matrix){PACKED, .bits = 3, .rows = 2, .cols = 180000, .group = 1000, .config = BITS("3")},
                67500, 68 << 10);
    /* Padded, a row may be cut. */
    made *w = make(&(matrix){PACKED, .bits = 3, .rows = 2, .cols = 180000, .group = 1000, .padded = 1,
                             .config = BITS("3")},
                   5);
    write_files(w, 1);
    load_one(w, FST_DEVICE_CPU, FST_BF16, 64 << 10);
    made_free(w);
}
