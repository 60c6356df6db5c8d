/* Packed integers: matrices of all layouts, packed here as the formats' specification has it, in whatever ranges they are
 * cut; bad input. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "kernels_rig.h"

static const int targets[] = {FST_T_F32, FST_T_F16, FST_T_BF16};
static const int scale_types[] = {FST_T_F16, FST_T_BF16, FST_T_F32};

enum { CAPACITY = 1 << 21, PART = CAPACITY / 4, ROOM = 1 << 18 };

/* A matrix, and what is made of it. */
typedef struct matrix {
    fst_packed_args args;
    uint32_t codes[ROOM], scales[ROOM / 4], zeros[ROOM / 4]; /* words; of scales: as many codes */
    int32_t groups[1 << 14];
    double value[ROOM]; /* code less zero point */
    uint32_t scale[ROOM];
    uint64_t word[ROOM]; /* that an element's code begins in */
    uint64_t words, zero_bytes;
} matrix;

static uint64_t ceil_of(uint64_t n, uint64_t by) { return (n + by - 1) / by; }

static uint64_t words_for(uint64_t count, unsigned bits, int padded) {
    return padded ? ceil_of(count, 32 / bits) : ceil_of(count * bits, 32);
}

/* Element i of a run of words that are `step` apart. */
static void pack(uint32_t *words, uint64_t step, uint64_t i, unsigned bits, int padded, uint32_t code) {
    const uint64_t bit = padded ? i / (32 / bits) * 32 + i % (32 / bits) * bits : i * bits;
    words[bit / 32 * step] |= code << bit % 32;
    if (bit % 32 + bits > 32) words[(bit / 32 + 1) * step] |= code >> (32 - bit % 32);
}

/* AWQ: nibble i of a word holds column order[i]. */
static void pack_awq(uint32_t *word, unsigned column, uint32_t code) {
    static const unsigned order[] = {0, 2, 4, 6, 1, 3, 5, 7};
    for (unsigned i = 0; i < 8; i++)
        if (order[i] == column) *word |= code << 4 * i;
}

static void pack_code(matrix *m, uint64_t row, uint64_t col, uint32_t code) {
    const fst_packed_args *a = &m->args;
    const int padded = (a->flags & FST_K_PADDED) != 0;
    const uint64_t at = row * a->cols + col;
    const uint64_t unit = padded ? col / (32 / a->bits) : col * a->bits / 32;
    switch (a->layout) {
    case FST_PACKED_ROW: {
        const uint64_t width = words_for(a->cols, a->bits, padded);
        m->word[at] = row * width + unit;
        pack(m->codes + row * width, 1, col, a->bits, padded, code);
        break;
    }
    case FST_PACKED_COLUMN:
        m->word[at] = unit * a->rows + row;
        pack(m->codes + row, a->rows, col, a->bits, 0, code);
        break;
    case FST_PACKED_PAIRS:
        m->word[at] = row / 2 * a->cols + col;
        ((uint8_t *)m->codes)[m->word[at]] |= (uint8_t)(code << row % 2 * 4);
        break;
    default:
        m->word[at] = col * ceil_of(a->rows, 8) + row / 8;
        if (a->flags & FST_K_AWQ_ORDER) pack_awq(&m->codes[m->word[at]], row % 8, code);
        else pack(&m->codes[m->word[at]], 1, row % 8, 4, 0, code);
    }
}

static void pack_zero(matrix *m, uint64_t row, uint64_t j, uint32_t code) {
    const fst_packed_args *a = &m->args;
    const int padded = (a->flags & FST_K_PADDED) != 0;
    const uint64_t across = words_for(a->rows, a->bits, padded), g = a->groups_count;
    switch (a->zeros_kind) {
    case FST_ZEROS_BYTES: ((uint8_t *)m->zeros)[row * g + j] = (uint8_t)code; break;
    case FST_ZEROS_COLUMNS: pack(m->zeros + j, g, row, a->bits, padded, code); break;
    case FST_ZEROS_GROUPS:
        pack(m->zeros + row * words_for(g, a->bits, padded), 1, j, a->bits, padded, code);
        break;
    default:
        if (a->flags & FST_K_AWQ_ORDER) pack_awq(&m->zeros[j * across + row / 8], row % 8, code);
        else pack(m->zeros + j * across, 1, row, a->bits, padded, code);
    }
}

/* The stored form of a random zero point, and in *z what it means. */
static uint32_t random_zero(const fst_packed_args *a, uint64_t *random, double *z) {
    const uint32_t all = (1u << a->bits) - 1, code = (uint32_t)rig_random(random) & all;
    const double half = a->flags & FST_K_OFFSET ? 1u << (a->bits - 1) : 0;
    if (a->zeros_kind == FST_ZEROS_BYTES) {
        *z = (double)code - (1u << (a->bits - 1));
        return code - (1u << (a->bits - 1));
    }
    *z = code - half + (a->flags & FST_K_ZERO_PLUS_ONE ? 1 : 0);
    return code;
}

static double random_value(const fst_packed_args *a, uint64_t *random, uint32_t *code) {
    const uint32_t all = (1u << a->bits) - 1;
    *code = (uint32_t)rig_random(random) & all;
    if (a->flags & FST_K_SIGNED) return *code > all / 2 ? (double)*code - all - 1 : *code;
    return *code - (a->flags & FST_K_OFFSET ? (double)(1u << (a->bits - 1)) : 0);
}

/* Fills a matrix of this kind. Scales are finite, some with signs, unless `wild`. */
static matrix *make(fst_packed_args args, int act_order, int wild, uint64_t seed) {
    matrix *m = calloc(1, sizeof *m);
    fst_packed_args *a = &m->args;
    uint64_t random = seed;
    *a = args;
    const int transposed = a->layout == FST_PACKED_COLUMN || a->layout == FST_PACKED_TRANSPOSED;
    if (!a->groups_count) a->groups_count = ceil_of(a->cols, a->group);
    const uint64_t g = a->groups_count;
    double *zeros = calloc(a->rows * g + 1, sizeof *zeros);
    CHECK(a->rows * a->cols <= ROOM && a->rows * g <= ROOM / 8);
    for (uint64_t i = 0; i < a->cols; i++)
        m->groups[i] = act_order ? (int32_t)rig_below(&random, g) : (int32_t)(i / a->group);
    for (uint64_t i = 0; i < a->rows * g; i++) {
        uint32_t code = (uint32_t)rig_random(&random);
        if (a->scale_dtype == FST_T_F32) code = wild ? code : (code & 0x80FFFFFF) | 0x3C000000;
        else if (!wild) code = (code & 0x83FF) | (a->scale_dtype == FST_T_F16 ? 0x2000 : 0x3C00);
        if (a->scale_dtype == FST_T_F32) m->scales[i] = code;
        else ((uint16_t *)m->scales)[i] = (uint16_t)code;
    }
    for (uint64_t row = 0; row < a->rows && a->zeros_kind != FST_ZEROS_NONE; row++)
        for (uint64_t j = 0; j < g; j++) pack_zero(m, row, j, random_zero(a, &random, &zeros[row * g + j]));
    if (a->flags & FST_K_ZERO_CARRY) /* as GPTQModel writes them */
        for (uint64_t i = 0; i < g * words_for(a->rows, a->bits, 0); i++)
            m->zeros[i] -= a->bits == 2 ? 0x55555555 : a->bits == 4 ? 0x11111111 : 0x01010101;
    for (uint64_t row = 0; row < a->rows; row++)
        for (uint64_t col = 0; col < a->cols; col++) {
            uint32_t code;
            const uint64_t j = (uint64_t)m->groups[col], at = row * a->cols + col;
            const uint64_t s = transposed ? j * a->rows + row : row * g + j;
            m->value[at] = random_value(a, &random, &code) - zeros[row * g + j];
            m->scale[at] = a->scale_dtype == FST_T_F32 ? m->scales[s] : ((uint16_t *)m->scales)[s];
            pack_code(m, row, col, code);
        }
    const uint64_t words[] = {a->rows * words_for(a->cols, a->bits, (a->flags & FST_K_PADDED) != 0),
                              a->rows / 2 * a->cols, a->cols * a->bits / 32 * a->rows,
                              a->cols * ceil_of(a->rows, 8)};
    m->words = words[a->layout];
    a->groups = act_order ? m->groups : NULL;
    free(zeros);
    return m;
}

/* Runs words [first, first + count) on the device; the result is in rig->host from `begin` on. */
static void run(test_rig *rig, const matrix *m, uint64_t first, uint64_t count, size_t skew, size_t begin) {
    fst_packed_args args = m->args;
    const size_t unit = args.layout == FST_PACKED_PAIRS ? 1 : 4;
    uint8_t *const base = rig->src;
    CHECK(skew + count * unit + 64 <= PART);
    rig_upload(rig, base + skew, (const uint8_t *)m->codes + first * unit, count * unit);
    rig_upload(rig, base + PART, m->scales, sizeof m->scales);
    rig_upload(rig, base + 2 * PART, m->zeros, sizeof m->zeros);
    rig_upload(rig, base + 3 * PART, m->groups, sizeof m->groups);
    args.src = base + skew, args.dst = rig->dst + begin;
    args.scales = base + PART, args.zeros = base + 2 * PART;
    args.groups = args.groups ? (const int32_t *)(base + 3 * PART) : NULL;
    args.first = first, args.count = count;
    if (rig->gpu.host_access) POISON(base + skew + count * unit, 64);
    CHECK_INT(0, rig->gpu.kernels->packed(rig->stream, &args));
    if (rig->gpu.host_access) UNPOISON(base + skew + count * unit, 64);
}

static uint32_t wanted(const matrix *m, uint64_t at) {
    const double s = rig_value(m->args.scale_dtype, m->scale[at]), exact = m->value[at] * s;
    if (isnan(exact)) {
        const int minus = (signbit(m->value[at]) != 0) != (signbit(s) != 0);
        return rig_code(m->args.dst_dtype, copysign(NAN, minus ? -1.0 : 1.0), 0);
    }
    return rig_code(m->args.dst_dtype, (float)exact, 0);
}

/* Elements of words below `end` are there, others untouched, and so is what is around. */
static void check(test_rig *rig, const matrix *m, uint64_t end, size_t begin) {
    const size_t size = fst_type_bits(m->args.dst_dtype) / 8, count = m->args.rows * m->args.cols;
    rig_download(rig, begin + count * size + RIG_GUARD);
    for (size_t i = 0; i < count; i++) {
        uint32_t got = 0, want = m->word[i] < end ? wanted(m, i) : 0xA5A5A5A5;
        if (size == 2) want &= 0xFFFF;
        memcpy(&got, rig->host + begin + i * size, size);
        if (got != want)
            test_fail(__FILE__, __LINE__, "%s: layout %d, %u bits, %llu x %llu: [%llu, %llu] is %x, want %x",
                      rig->gpu.kernels->target, m->args.layout, m->args.bits,
                      (unsigned long long)m->args.rows, (unsigned long long)m->args.cols,
                      (unsigned long long)(i / m->args.cols), (unsigned long long)(i % m->args.cols), got,
                      want);
    }
    for (size_t i = 0; i < RIG_GUARD; i++)
        CHECK(rig->host[begin - 1 - i] == 0xA5 && rig->host[begin + count * size + i] == 0xA5);
}

static void clear(test_rig *rig, const matrix *m, size_t begin) {
    const size_t all = begin + m->args.rows * m->args.cols * 4 + RIG_GUARD;
    CHECK(all <= rig->capacity);
    memset(rig->host, 0xA5, all);
    rig_upload(rig, rig->dst, rig->host, all);
}

/* From one place where the matrix may be cut to the next. */
static uint64_t cut_of(const matrix *m) {
    const fst_packed_args *a = &m->args;
    if (32 % a->bits == 0 || a->flags & FST_K_PADDED) return 1;
    return a->layout == FST_PACKED_ROW ? words_for(a->cols, a->bits, 0) : a->rows * a->bits;
}

/* In two parts, cut here. Without skew both are aligned. */
static void check_cut(test_rig *rig, const matrix *m, uint64_t cut, size_t skew, size_t begin) {
    clear(rig, m, begin);
    run(rig, m, 0, cut, skew, begin);
    check(rig, m, cut, begin);
    run(rig, m, cut, m->words - cut, skew ? 15 - skew : 0, begin);
    check(rig, m, m->words, begin);
}

static void check_all(fst_packed_args args, int act_order, int wild, uint64_t seed) {
    matrix *m = make(args, act_order, wild, seed);
    uint64_t random = seed ^ 77;
    test_rig rig;
    EACH_RIG(&rig, CAPACITY) {
        for (int i = 0; i < 3; i++) {
            m->args.dst_dtype = targets[i];
            const uint64_t cut = cut_of(m) * rig_below(&random, m->words / cut_of(m) + 1);
            const size_t size = targets[i] == FST_T_F32 ? 4 : 2;
            check_cut(&rig, m, cut, rig_below(&random, 16),
                      256 + (rig_below(&random, 2) ? size * rig_below(&random, 8) : 0));
        }
    }
    free(m);
}

/* The same, aligned as GPUs like it. */
static void check_aligned(fst_packed_args args, int wild, uint64_t seed) {
    matrix *m = make(args, 0, wild, seed);
    uint64_t random = seed ^ 78;
    test_rig rig;
    EACH_RIG(&rig, CAPACITY) {
        for (int i = 0; i < 3; i++) {
            m->args.dst_dtype = targets[i];
            check_cut(&rig, m, cut_of(m) * rig_below(&random, m->words / cut_of(m) + 1), 0, 256);
        }
    }
    free(m);
}

static fst_packed_args args_of(int layout, unsigned bits, uint64_t rows, uint64_t cols, uint64_t group,
                               int zeros, unsigned flags) {
    return (fst_packed_args){.layout = layout,
                             .bits = bits,
                             .rows = rows,
                             .cols = cols,
                             .group = group,
                             .zeros_kind = zeros,
                             .flags = flags,
                             .scale_dtype = FST_T_F16};
}

/* ---- Layouts ---- */

TEST(kernels_packed, rows_of_all_widths) {
    static const int zeros[] = {FST_ZEROS_NONE, FST_ZEROS_COLUMNS, FST_ZEROS_BYTES};
    for (unsigned bits = 1; bits <= 8; bits++)
        for (int way = 0; way < 4; way++) {
            fst_packed_args a = args_of(FST_PACKED_ROW, bits, 5, 96, 24, zeros[way % 3],
                                        FST_K_OFFSET | (way == 3 ? FST_K_PADDED : 0));
            if (way == 3) a.zeros_kind = FST_ZEROS_COLUMNS, a.rows = 37;
            a.scale_dtype = scale_types[way % 3];
            check_all(a, 0, 0, bits * 10 + (unsigned)way);
            a.rows = 13, a.cols = 119, a.group = 17; /* nothing is aligned */
            check_all(a, way & 1, way == 0, bits * 10 + (unsigned)way);
        }
}

TEST(kernels_packed, aligned_rows_of_all_widths) {
    static const int zeros[] = {FST_ZEROS_NONE, FST_ZEROS_COLUMNS, FST_ZEROS_BYTES, FST_ZEROS_GROUPS};
    for (unsigned bits = 1; bits <= 8; bits++)
        for (int way = 0; way < 4; way++) {
            fst_packed_args a = args_of(FST_PACKED_ROW, bits, 37, 480, 40, zeros[way], FST_K_OFFSET);
            a.scale_dtype = scale_types[(bits + (unsigned)way) % 3];
            check_aligned(a, way == 1, 1000 + bits * 10 + (unsigned)way);
            if (32 % bits == 0) continue;
            a.flags |= FST_K_PADDED, a.group = 480;
            check_aligned(a, 0, 2000 + bits * 10 + (unsigned)way);
        }
}

TEST(kernels_packed, gptq) {
    static const unsigned widths[] = {2, 3, 4, 8}, ways[] = {0, FST_K_ZERO_PLUS_ONE, FST_K_ZERO_CARRY};
    for (int w = 0; w < 4; w++)
        for (int way = 0; way < 3; way++) {
            if (widths[w] == 3 && way == 2) continue;
            fst_packed_args a = args_of(FST_PACKED_COLUMN, widths[w], 96, 288, 32, FST_ZEROS_ROWS, ways[way]);
            a.scale_dtype = scale_types[way];
            check_all(a, 0, 0, 100 + (unsigned)(w * 3 + way));
            check_all(a, 1, 0, 200 + (unsigned)(w * 3 + way));
            a.rows = 67, a.cols = 160, a.group = 53; /* the last group is a short one */
            check_all(a, 0, way == 1, 300 + (unsigned)(w * 3 + way));
        }
}

TEST(kernels_packed, aligned_gptq) {
    static const unsigned widths[] = {2, 3, 4, 8}, ways[] = {0, FST_K_ZERO_PLUS_ONE, FST_K_ZERO_CARRY};
    static const uint64_t groups[] = {32, 64, 128, 768, 24, 800};
    for (int w = 0; w < 4; w++)
        for (int i = 0; i < 6; i++) {
            fst_packed_args a = args_of(FST_PACKED_COLUMN, widths[w], i == 3 ? 144 : 128, i == 5 ? 800 : 768,
                                        groups[i], FST_ZEROS_ROWS, widths[w] == 3 ? 0 : ways[i % 3]);
            a.scale_dtype = scale_types[i % 3];
            check_aligned(a, i == 1, 1100 + (unsigned)(w * 6 + i));
        }
}

TEST(kernels_packed, awq_and_quark) {
    static const struct {
        int zeros;
        unsigned flags;
    } ways[] = {{FST_ZEROS_ROWS, FST_K_AWQ_ORDER},
                {FST_ZEROS_ROWS, 0},
                {FST_ZEROS_NONE, FST_K_SIGNED | FST_K_AWQ_ORDER},
                {FST_ZEROS_NONE, FST_K_SIGNED}};
    for (unsigned i = 0; i < 4; i++) {
        fst_packed_args a = args_of(FST_PACKED_TRANSPOSED, 4, 136, 264, 8, ways[i].zeros, ways[i].flags);
        check_all(a, 0, 0, 400 + i);
        a.rows = 67, a.cols = 101, a.group = 101, a.scale_dtype = scale_types[i % 3];
        check_all(a, 0, i == 0, 500 + i);
    }
}

TEST(kernels_packed, aligned_awq_and_quark) {
    static const uint64_t groups[] = {32, 64, 128, 384, 24};
    for (unsigned i = 0; i < 10; i++) {
        const int quark = i % 2;
        fst_packed_args a = args_of(FST_PACKED_TRANSPOSED, 4, i < 5 ? 256 : 296, 384, groups[i % 5],
                                    quark ? FST_ZEROS_NONE : FST_ZEROS_ROWS, i % 3 ? FST_K_AWQ_ORDER : 0);
        if (quark) a.flags |= FST_K_SIGNED;
        a.scale_dtype = scale_types[i % 3];
        check_aligned(a, i == 2, 1200 + i);
    }
}

TEST(kernels_packed, awq_gemv_with_more_groups_than_are_used) {
    fst_packed_args a = args_of(FST_PACKED_ROW, 4, 19, 64, 16, FST_ZEROS_GROUPS, 0);
    a.groups_count = 32;
    check_all(a, 0, 0, 600);
}

TEST(kernels_packed, two_rows_in_a_byte) {
    fst_packed_args a = args_of(FST_PACKED_PAIRS, 4, 6, 64, 16, FST_ZEROS_NONE, FST_K_SIGNED);
    check_all(a, 0, 0, 700);
    a.rows = 34, a.cols = 77, a.group = 7, a.scale_dtype = FST_T_BF16;
    check_all(a, 0, 1, 701);
}

/* ---- Cuts ---- */

static void check_cuts(fst_packed_args args) {
    matrix *m = make(args, 0, 0, 800);
    test_rig rig;
    EACH_RIG(&rig, CAPACITY)
    for (uint64_t cut = 0; cut <= m->words; cut += cut_of(m)) {
        m->args.dst_dtype = targets[cut % 3];
        check_cut(&rig, m, cut, cut % 16, 256);
    }
    free(m);
}

TEST(kernels_packed, cut_at_every_word_of_rows) {
    for (unsigned bits = 1; bits <= 8; bits++) {
        check_cuts(args_of(FST_PACKED_ROW, bits, 3, 40, 8, FST_ZEROS_COLUMNS, FST_K_OFFSET));
        check_cuts(args_of(FST_PACKED_ROW, bits, 2, 40, 8, FST_ZEROS_COLUMNS, FST_K_OFFSET | FST_K_PADDED));
    }
}
TEST(kernels_packed, cut_at_every_word_of_columns) {
    static const unsigned widths[] = {2, 3, 4, 8};
    for (int i = 0; i < 4; i++)
        check_cuts(args_of(FST_PACKED_COLUMN, widths[i], 8, 64, 32, FST_ZEROS_ROWS, FST_K_ZERO_PLUS_ONE));
}
TEST(kernels_packed, cut_at_every_word_of_awq) {
    check_cuts(args_of(FST_PACKED_TRANSPOSED, 4, 19, 24, 8, FST_ZEROS_ROWS, FST_K_AWQ_ORDER));
}
TEST(kernels_packed, cut_at_every_byte_of_pairs) {
    check_cuts(args_of(FST_PACKED_PAIRS, 4, 6, 24, 8, FST_ZEROS_NONE, FST_K_SIGNED));
}

/* Codes that straddle words may be cut inside a row, where units of 32 codes meet. */
TEST(kernels_packed, rows_of_three_bits_cut_between_their_units) {
    matrix *m = make(args_of(FST_PACKED_ROW, 3, 3, 96, 32, FST_ZEROS_NONE, FST_K_OFFSET), 0, 0, 900);
    test_rig rig;
    EACH_RIG(&rig, CAPACITY)
    for (uint64_t cut = 0; cut <= m->words; cut += 3) {
        m->args.dst_dtype = FST_T_BF16;
        check_cut(&rig, m, cut, cut % 16, 256);
    }
    free(m);
}

/* ---- What goes wrong ---- */

static int run_args(const fst_packed_args *args) { return fst_kernels_cpu()->packed(NULL, args); }

TEST(kernels_packed, wrong_arguments) {
    static uint16_t memory[1 << 14];
    static uint32_t words[1 << 12];
    fst_packed_args good = args_of(FST_PACKED_COLUMN, 3, 8, 64, 32, FST_ZEROS_ROWS, 0);
    good.src = words, good.dst = memory, good.scales = words, good.zeros = words;
    good.groups_count = 2, good.count = 48, good.dst_dtype = FST_T_F16;
    CHECK_INT(0, run_args(&good));
    fst_packed_args a = good;
    a.bits = 5;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a.layout = FST_PACKED_ROW, a.bits = 9;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a.bits = 0;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good, a.dst_dtype = FST_T_F64;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good, a.layout = 4;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good, a.count = 49;
    CHECK_INT(FST_K_SIZE, run_args(&a));
    a = good, a.first = 8, a.count = 24; /* inside a unit */
    CHECK_INT(FST_K_SIZE, run_args(&a));
    a = good, a.first = UINT64_MAX - 23;
    CHECK_INT(FST_K_SIZE, run_args(&a));
    a = good, a.rows = UINT64_MAX / 8;
    CHECK_INT(FST_K_SIZE, run_args(&a));
    a = good, a.cols = 65; /* no whole words */
    CHECK_INT(FST_K_SIZE, run_args(&a));
    a = good, a.layout = FST_PACKED_PAIRS, a.bits = 4, a.rows = 7, a.zeros_kind = 0;
    CHECK_INT(FST_K_SIZE, run_args(&a));
    a = good, a.group = 0;
    CHECK_INT(FST_K_SCALE, run_args(&a));
    a = good, a.groups_count = 1;
    CHECK_INT(FST_K_SCALE, run_args(&a));
    a = good, a.scale_dtype = FST_T_F8_E8M0;
    CHECK_INT(FST_K_SCALE, run_args(&a));
    a = good, a.zeros = NULL;
    CHECK_INT(FST_K_NULL, run_args(&a));
    a = good, a.src = NULL;
    CHECK_INT(FST_K_NULL, run_args(&a));
    a = good, a.dst = (char *)memory + 1;
    CHECK_INT(FST_K_ALIGN, run_args(&a));
    a = good, a.zeros = (char *)words + 2;
    CHECK_INT(FST_K_ALIGN, run_args(&a));
    a = good, a.count = 0, a.src = NULL;
    CHECK_INT(0, run_args(&a));
}
