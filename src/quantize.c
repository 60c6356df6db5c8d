#include "quantize.h"

#include <string.h>

#include "dtype.h"

int fst_quantize_has(fst_dtype target) {
    return target == FST_F8_E4M3 || target == FST_F8_E5M2 || target == FST_F8_E4M3FNUZ;
}

/* ---- Names ----------------------------------------------------------------------------------------- */

static int has_suffix(const char *name, size_t length, const char *suffix) {
    size_t size = strlen(suffix);
    return length >= size && memcmp(name + length - size, suffix, size) == 0;
}

static int contains(const char *text, size_t length, const char *word) {
    size_t size = strlen(word);
    for (size_t i = 0; i + size <= length; i++)
        if (memcmp(text + i, word, size) == 0) return 1;
    return 0;
}

static int is_word(const char *text, size_t length, const char *word) {
    return strlen(word) == length && memcmp(text, word, length) == 0;
}

/* A part of a name, between dots. */
static int is_left_alone(const char *part, size_t length) {
    static const char *const words[] = {"wte", "wpe", "lm_head", "gate", "router"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (is_word(part, length, words[i])) return 1;
    return contains(part, length, "embed") || has_suffix(part, length, "_gate");
}

static int is_of_experts(const char *part, size_t length) {
    return contains(part, length, "expert") || contains(part, length, "moe");
}

/* Whether a part of the name is such. */
static int any_part(const fst_entry *entry, int (*is_such)(const char *, size_t)) {
    const char *part = entry->name, *end = entry->name + entry->name_length;
    while (part < end) {
        const char *dot = memchr(part, '.', (size_t)(end - part));
        if (!dot) dot = end;
        if (is_such(part, (size_t)(dot - part))) return 1;
        part = dot + 1;
    }
    return 0;
}

/* A float tensor that is a weight of a linear layer, or a stack of such. */
static int is_weight(const fst_entry *entry) {
    const char *name = entry->name;
    size_t length = entry->name_length;
    uint64_t stack, rows, cols;
    int named = has_suffix(name, length, ".weight") || is_word(name, length, "weight");
    if (!fst_quantize_shape(entry, &stack, &rows, &cols)) return 0;
    if (entry->ndim == 2) return named;
    return entry->ndim == 3 && any_part(entry, is_of_experts) && !has_suffix(name, length, "bias");
}

/* Codes of a quantized weight are of these types, too. */
static int may_be_codes(fst_dtype dtype) {
    return fst_dtype_bits(dtype) <= 8 || !fst_dtype_is_castable(dtype);
}

void fst_quantize_defaults(const fst_entry *entry, fst_dtype *cast, fst_scale *scale) {
    if (*scale == FST_QUANTIZE_NONE) return;
    int is_output = is_word(entry->name, entry->name_length, "output.weight");
    if (!is_output && !any_part(entry, is_left_alone) && (may_be_codes(entry->dtype) || is_weight(entry)))
        return;
    *cast = FST_NATIVE;
    *scale = FST_QUANTIZE_NONE;
}

size_t fst_quantize_scale_name(const char *weight, size_t length, fst_scale scale, char *out) {
    const char *suffix = scale == FST_QUANTIZE_BLOCK ? "_scale_inv" : "_scale";
    if (out) {
        memcpy(out, weight, length);
        strcpy(out + length, suffix);
    }
    return length + strlen(suffix);
}

int fst_quantize_scales_codes(const fst_entry *entry) {
    static const char *const suffixes[] = {".input_scale", ".activation_scale", ".output_scale",
                                           ".q_scale",     ".k_scale",          ".v_scale",
                                           ".kv_scale",    ".prob_scale"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
        if (has_suffix(entry->name, entry->name_length, suffixes[i])) return 1;
    return 0;
}

/* ---- Shapes ---------------------------------------------------------------------------------------- */

int fst_quantize_shape(const fst_entry *entry, uint64_t *stack, uint64_t *rows, uint64_t *cols) {
    if (entry->ndim != 2 && entry->ndim != 3) return 0;
    *stack = entry->ndim == 3 ? entry->shape[0] : 1;
    *rows = entry->shape[entry->ndim - 2];
    *cols = entry->shape[entry->ndim - 1];
    return *stack && *rows && *cols;
}

static uint64_t tiles(uint64_t size) { return size / FST_QUANTIZE_TILE + (size % FST_QUANTIZE_TILE != 0); }

uint64_t fst_quantize_scale_rows(fst_scale scale, uint64_t rows) {
    return scale == FST_QUANTIZE_TENSOR ? 1 : scale == FST_QUANTIZE_ROW ? rows : tiles(rows);
}

uint64_t fst_quantize_scale_cols(fst_scale scale, uint64_t cols) {
    return scale == FST_QUANTIZE_BLOCK ? tiles(cols) : 1;
}

fst_scale fst_quantize_kind_of(const fst_quantized *w) {
    if (w->flags & FST_Q_DIVIDE) return FST_QUANTIZE_NONE;
    if (w->format == FST_FORMAT_FP8_TENSOR) return FST_QUANTIZE_TENSOR;
    if (w->format == FST_FORMAT_FP8_ROW) return FST_QUANTIZE_ROW;
    if (w->format == FST_FORMAT_FP8_BLOCK && w->block_rows == FST_QUANTIZE_TILE &&
        w->block_cols == FST_QUANTIZE_TILE)
        return FST_QUANTIZE_BLOCK;
    return FST_QUANTIZE_NONE;
}

/* ---- Doubling ---------------------------------------------------------------------------------------- */

/* A float of `size` bytes with `mantissa` bits of it, in the low end of *word. */
static int double_float(uint64_t *word, unsigned size, unsigned mantissa) {
    const uint64_t sign = (uint64_t)1 << (8 * size - 1), one = (uint64_t)1 << mantissa;
    const uint64_t infinity = (sign - 1) & ~(one - 1);
    uint64_t magnitude = *word & (sign - 1);
    if (magnitude >= infinity) return 1;
    magnitude =
        magnitude < one ? magnitude << 1 : magnitude + one; /* a subnormal's top bit becomes its exponent */
    *word = (*word & sign) | magnitude;
    return magnitude < infinity;
}

int fst_quantize_double(fst_dtype dtype, void *scales, uint64_t count) {
    unsigned char *at = scales;
    unsigned size = fst_dtype_bits(dtype) / 8;
    unsigned mantissa = dtype == FST_F64 ? 52 : dtype == FST_F32 ? 23 : dtype == FST_BF16 ? 7 : 10;
    int power = dtype == FST_F8_E8M0 || dtype == FST_U8, fits = 1;
    for (uint64_t i = 0; i < count; i++, at += size) {
        uint64_t word = 0;
        memcpy(&word, at, size);
        if (!power) fits &= double_float(&word, size, mantissa);
        else if (word == 254) fits = 0;
        else word += word < 254;
        memcpy(at, &word, size);
    }
    return fits;
}
