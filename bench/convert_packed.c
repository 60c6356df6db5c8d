/* Packed integers as their formats define them: where a code lies, what its zero point and scale are. Plain scalars,
 * one element at a time; nothing of the kernels' code. */
#include "convert.h"

/* Bits [bit, bit + bits) of the stream that words first, first + step, ... are. */
static uint32_t bits_at(convert_word *word, const void *of, uint64_t first, uint64_t step, uint64_t bit,
                        unsigned bits) {
    uint32_t code = 0;
    for (unsigned i = 0; i < bits; i++, bit++)
        code |= (word(of, first + bit / 32 * step) >> bit % 32 & 1) << i;
    return code;
}

/* The bit that code k of a stream begins at; padded, a word has as many codes as fit whole. */
static uint64_t bit_of(const convert_case *c, uint64_t k) {
    const uint64_t bits = c->spec.bits, each = 32 / bits;
    return c->spec.padded ? k / each * 32 + k % each * bits : k * bits;
}

/* AWQ: column 8 w + j is at this shift of word w. */
static unsigned awq_shift(uint64_t j) {
    static const unsigned char place[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    return 4u * place[j % 8];
}

static int32_t two_complement(uint32_t code) { return code & 8 ? (int32_t)code - 16 : (int32_t)code; }

static uint64_t groups_of(const convert_case *c) { return c->cols / c->spec.group; }

/* Words of a row of `count` codes. */
static uint64_t words_of(const convert_case *c, uint64_t count) {
    return (bit_of(c, count - 1) + c->spec.bits + 31) / 32;
}

uint64_t convert_packed_size(const convert_case *c) {
    switch (c->spec.kernel) {
    case CONVERT_GPTQ: return words_of(c, c->cols) * c->rows * 4;
    case CONVERT_AWQ:
    case CONVERT_INT4_QUARK: return c->cols * (c->rows / 8) * 4;
    case CONVERT_PACKED: return c->rows * words_of(c, c->cols) * 4;
    default: return c->rows / 2 * c->cols;
    }
}

uint64_t convert_packed_unit(const convert_case *c) {
    switch (c->spec.kernel) {
    case CONVERT_GPTQ: return c->rows * c->spec.bits * 4; /* 32 columns */
    case CONVERT_AWQ:
    case CONVERT_INT4_QUARK: return c->rows / 8 * 4;
    case CONVERT_PACKED: return words_of(c, c->cols) * 4;
    default: return c->cols;
    }
}

uint64_t convert_packed_zeros_size(const convert_case *c) {
    return (c->spec.kernel == CONVERT_AWQ || c->spec.kernel == CONVERT_INT4_QUARK ? c->rows / 8
                                                                                  : words_of(c, c->rows)) *
           groups_of(c) * 4;
}

/* Act-order: groups of a permutation of the columns (5003 is a prime). */
uint32_t convert_group(const convert_case *c, uint64_t col) {
    return (uint32_t)((c->spec.act_order ? col * 5003 % c->cols : col) / c->spec.group);
}

static uint32_t zero_word(const void *of, uint64_t index) {
    (void)of;
    return convert_zero_word(index);
}

/* GPTQ's [groups, words], one row a group; compressed-tensors' [words, groups], one column a group. */
static int32_t zero_of(const convert_case *c, uint64_t row, uint64_t group) {
    const uint64_t bit = bit_of(c, row);
    switch (c->spec.kernel) {
    case CONVERT_GPTQ: /* stored less one */
        return 1 + (int32_t)bits_at(zero_word, 0, group * words_of(c, c->rows), 1, bit, c->spec.bits);
    case CONVERT_PACKED: return (int32_t)bits_at(zero_word, 0, group, groups_of(c), bit, c->spec.bits);
    default: return convert_zero_word(group * (c->rows / 8) + row / 8) >> awq_shift(row) & 15;
    }
}

int32_t convert_packed_code(const convert_case *c, uint64_t row, uint64_t col, convert_word *word,
                            const void *of) {
    const unsigned bits = c->spec.bits;
    const int32_t zero = c->spec.zeros ? zero_of(c, row, convert_group(c, col)) : 0;
    uint32_t code;
    switch (c->spec.kernel) {
    case CONVERT_GPTQ: return (int32_t)bits_at(word, of, row, c->rows, bit_of(c, col), bits) - zero;
    case CONVERT_AWQ:
    case CONVERT_INT4_QUARK:
        code = word(of, col * (c->rows / 8) + row / 8) >> awq_shift(row) & 15;
        return c->spec.zeros ? (int32_t)code - zero : two_complement(code);
    case CONVERT_PACKED: /* both are stored plus 2^(bits - 1) */
        code = bits_at(word, of, row * words_of(c, c->cols), 1, bit_of(c, col), bits);
        return (int32_t)code - (c->spec.zeros ? zero : 1 << (bits - 1));
    default: code = word(of, row / 2 * c->cols + col); return two_complement(row % 2 ? code >> 4 : code & 15);
    }
}

uint64_t convert_packed_scale(const convert_case *c, uint64_t row, uint64_t col) {
    const uint64_t group = convert_group(c, col);
    return c->spec.kernel == CONVERT_PACKED || c->spec.kernel == CONVERT_INT4_ROWS
               ? row * groups_of(c) + group
               : group * c->rows + row;
}
