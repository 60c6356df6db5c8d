/* Parts of tensors: bytes of a file, elements of a result. */
#include "cut.h"

#include <stdlib.h>
#include <string.h>

#include "dtype.h"

static fst_status no_memory(fst_error *error) {
    return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory while planning");
}

static uint64_t product(const uint64_t *shape, uint32_t begin, uint32_t end) {
    uint64_t all = 1;
    for (uint32_t i = begin; i < end; i++) all *= shape[i];
    return all;
}

static uint64_t ceil_of(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

/* The part's shape, and whether there is such a part. */
static fst_status set_shape(fst_cut *cut, const char *name, uint32_t ndim, const uint64_t *shape, int32_t dim,
                            uint64_t begin, uint64_t end, uint32_t layout, const fst_where *where,
                            fst_error *error) {
    memset(cut, 0, sizeof *cut);
    if (dim >= 0 && (uint32_t)dim >= ndim)
        return fst_fail(error, FST_E_ARG, 0, where, "tensor \"%s\" has %u dimensions: it is not cut along %d",
                        name, ndim, (int)dim);
    if (dim >= 0 && (begin > end || end > shape[dim]))
        return fst_fail(error, FST_E_ARG, 0, where,
                        "tensor \"%s\": %llu to %llu is no part of dimension %d, which has %llu", name,
                        (unsigned long long)begin, (unsigned long long)end, (int)dim,
                        (unsigned long long)shape[dim]);
    if ((layout & FST_TRANSPOSE && ndim < 2) || (layout & FST_DEINTERLEAVE && ndim < 1))
        return fst_fail(error, FST_E_ARG, 0, where, "tensor \"%s\" has %u dimensions: %s", name, ndim,
                        layout & FST_TRANSPOSE ? "it cannot be transposed" : "nothing in it alternates");
    if (!(cut->shape = malloc((ndim + 1) * sizeof *cut->shape))) return no_memory(error);
    memcpy(cut->shape, shape, ndim * sizeof *shape);
    cut->ndim = ndim;
    cut->layout = layout;
    cut->dim = dim >= 0 ? dim : FST_REPLICATE;
    if (dim < 0) return FST_OK;
    cut->begin = begin;
    cut->end = end;
    cut->extent = shape[dim];
    cut->shape[dim] = end - begin;
    return FST_OK;
}

/* Where elements go when nothing else shares the result. */
static void set_steps(fst_cut *cut) {
    int transposed = (cut->layout & FST_TRANSPOSE) != 0;
    cut->dst_matrix = cut->rows * cut->cols;
    cut->dst_row = transposed ? 1 : cut->cols;
    cut->dst_col = transposed ? cut->rows : 1;
    cut->dst_half = cut->layout & FST_DEINTERLEAVE ? cut->rows - cut->rows / 2 : 0;
    cut->shaped = cut->layout != 0;
}

/* ---- Plain tensors -------------------------------------------------------------------------------- */

/* Rows that are cut, with borders at whole bytes. */
static void set_segments(fst_cut *cut, unsigned bits, uint64_t segment_bytes) {
    cut->start = cut->col * bits / 8;
    cut->segment = cut->cols * bits / 8;
    cut->pitch = cut->total_cols * bits / 8;
    cut->nbytes = cut->needed = cut->total_rows * cut->segment;
    if (cut->segment == cut->pitch || cut->total_rows == 1) cut->segment = cut->nbytes;
    int short_rows =
        bits >= 8 && cut->total_rows > 1 && cut->segment < segment_bytes && cut->pitch <= 2 * cut->segment;
    if (!short_rows || cut->shaped || cut->segment == cut->nbytes) return;
    cut->boxed = cut->whole_rows = 1;
    cut->storage = FST_STORED_ROWS;
    cut->stored_rows = cut->total_rows;
    cut->row_bytes = cut->pitch;
    cut->row_step = 1;
    cut->start = 0;
    cut->nbytes = cut->segment = cut->total_rows * cut->pitch;
}

/* Rows whose borders lie within bytes, of what has two dimensions, or counts as if it had. */
static void set_flat(fst_cut *cut, unsigned bits, uint32_t ndim, const uint64_t *shape) {
    if (ndim == 2) {
        cut->total_rows = shape[0], cut->total_cols = shape[1];
        cut->rows = cut->shape[0], cut->cols = cut->shape[1];
        cut->row = cut->dim == 0 ? cut->begin : 0;
        cut->col = cut->dim == 1 ? cut->begin : 0;
    }
    uint64_t first = cut->row * cut->total_cols + cut->col;
    uint64_t last = (cut->row + cut->rows - 1) * cut->total_cols + cut->col + cut->cols;
    uint64_t unit = bits % 4 == 0 ? 1 : 3; /* bytes that are whole elements */
    cut->boxed = 1;
    cut->storage = FST_STORED_FLAT;
    cut->start = cut->stored_byte = first * bits / 8 / unit * unit;
    cut->nbytes = cut->segment = ceil_of(last * bits, 8) - cut->start;
    cut->needed = ceil_of(cut->rows * cut->cols * bits, 8);
    cut->stored_rows = 1;
    cut->row_bytes = cut->nbytes;
    cut->row_step = 1;
}

fst_status fst_cut_plain(const fst_entry *entry, int32_t dim, uint64_t begin, uint64_t end, uint32_t layout,
                         int converts, uint64_t segment_bytes, const fst_where *where, fst_cut *cut,
                         fst_error *error) {
    const unsigned bits = fst_dtype_bits(entry->dtype);
    const uint64_t *shape = entry->shape;
    const uint32_t n = entry->ndim, d = dim >= 0 ? (uint32_t)dim : 0;
    fst_status status = set_shape(cut, entry->name, n, shape, dim, begin, end, layout, where, error);
    if (status) return status;
    cut->local = *entry;
    cut->local.shape = cut->shape;
    cut->shaped = layout != 0;
    /* How it is read: rows that begin at the cut. */
    cut->total_rows = product(shape, 0, d);
    cut->total_cols = product(shape, d, n);
    cut->matrices = 1;
    cut->rows = cut->total_rows;
    cut->cols = product(cut->shape, d, n);
    cut->col = cut->begin * (n ? product(shape, d + 1, n) : 1);
    uint64_t between = cut->total_rows > 1 ? cut->total_cols : 0; /* rows */
    int in_bytes = (between * bits % 8 || cut->col * bits % 8 || cut->cols * bits % 8);
    if (cut->rows * cut->cols == 0) in_bytes = 0;
    else if (in_bytes || (bits < 8 && layout)) set_flat(cut, bits, n, shape);
    else set_segments(cut, bits, segment_bytes);
    cut->local.begin = entry->begin + cut->start;
    cut->local.end = cut->local.begin + cut->nbytes;
    if (cut->boxed && !cut->whole_rows && (!converts || (layout && n != 2))) {
        fst_cut_free(cut);
        return fst_fail(
            error, FST_E_UNSUPPORTED, 0, where, "tensor \"%s\" has elements of %u bits: %s", entry->name,
            bits, in_bytes ? "the part would not begin and end at whole bytes" : "they stay where they are");
    }
    if (!cut->boxed) { /* how it is written: as matrices */
        const uint32_t two = n < 2 ? n : 2;
        cut->matrices = product(cut->shape, 0, n - two);
        cut->rows = n ? cut->shape[n - two] : 1;
        cut->cols = n < 2 ? 1 : cut->shape[n - 1];
    }
    set_steps(cut);
    return FST_OK;
}

/* ---- Quantized weights ------------------------------------------------------------------------------ */

static fst_storage storage_of(const fst_quantized *w) {
    switch (w->format) {
    case FST_FORMAT_GPTQ: return FST_STORED_COLUMNS;
    case FST_FORMAT_AWQ:
    case FST_FORMAT_INT4_QUARK: return FST_STORED_TRANSPOSED;
    case FST_FORMAT_INT4_ROWS: return FST_STORED_PAIRS;
    case FST_FORMAT_BNB_NF4:
    case FST_FORMAT_BNB_FP4: return FST_STORED_FLAT;
    default: return FST_STORED_ROWS;
    }
}

/* Bytes that codes are packed into. */
static uint64_t unit_of(const fst_quantized *w) {
    return fst_scheme_is_packed(w) && w->format != FST_FORMAT_INT4_ROWS ? 4 : 1;
}

static int in_two_words(const fst_quantized *w) {
    return unit_of(w) == 4 && 32 % w->bits && !(w->flags & FST_Q_PADDED);
}

/* Units that codes [begin, end) along them lie in. */
static void units_of(const fst_quantized *w, uint64_t begin, uint64_t end, uint64_t *first, uint64_t *last) {
    uint64_t unit = unit_of(w) * 8, each = unit / w->bits; /* codes that are whole in one */
    if (w->flags & FST_Q_PADDED || unit % w->bits == 0) {
        *first = begin / each;
        *last = ceil_of(end, each);
    } else { /* so many units hold a whole number of codes, so that no code lies in what comes before */
        *first = begin / unit * w->bits;
        *last = ceil_of(end * w->bits, unit);
    }
}

/* The bytes of each matrix, of which there are `matrix`. */
static void set_storage(const fst_quantized *w, fst_cut *cut, uint64_t matrix) {
    const uint64_t r0 = cut->row, r1 = cut->row + cut->rows, c0 = cut->col, c1 = cut->col + cut->cols;
    const int all_rows = cut->rows == cut->total_rows, all_cols = cut->cols == cut->total_cols;
    uint64_t pitch, first = 0, last, unit = unit_of(w), byte = 0, end;
    cut->row_step = 1;
    switch (cut->storage) {
    case FST_STORED_PAIRS:
        pitch = cut->total_cols;
        first = r0 / 2, last = ceil_of(r1, 2);
        byte = c0, end = c1;
        break;
    case FST_STORED_COLUMNS:
        pitch = cut->total_rows * 4;
        units_of(w, c0, c1, &first, &last);
        if (in_two_words(w)) cut->row_step = w->bits, last = ceil_of(last, w->bits) * w->bits;
        if (last > matrix / pitch || all_cols) last = matrix / pitch;
        byte = r0 * 4, end = r1 * 4;
        break;
    case FST_STORED_TRANSPOSED:
        pitch = matrix / cut->total_cols;
        first = c0, last = c1;
        byte = r0 / 8 * 4, end = ceil_of(r1, 8) * 4;
        break;
    default:
        pitch = matrix / cut->total_rows;
        first = r0, last = r1;
        units_of(w, c0, c1, &byte, &end);
        byte *= unit, end *= unit;
        break;
    }
    /* Rows may end in what is no code. */
    int whole = cut->storage == FST_STORED_ROWS || cut->storage == FST_STORED_PAIRS ? all_cols : all_rows;
    if (whole) byte = 0, end = pitch;
    cut->stored_row = first;
    cut->stored_rows = last - first;
    cut->stored_byte = byte;
    cut->row_bytes = end - byte;
    cut->start = cut->first_matrix * matrix + first * pitch + byte;
    cut->nbytes = cut->needed = cut->matrices * cut->stored_rows * cut->row_bytes;
    cut->segment = whole ? cut->stored_rows * pitch : cut->row_bytes;
    cut->pitch = whole ? matrix : pitch;
    if (whole && cut->stored_rows * pitch == matrix) cut->segment = cut->nbytes;
}

static fst_status set_matrices(const fst_quantized *w, const fst_where *where, fst_cut *cut,
                               fst_error *error) {
    const uint32_t n = w->ndim, d = cut->dim >= 0 ? (uint32_t)cut->dim : 0;
    cut->matrices = w->stack;
    cut->rows = cut->total_rows = w->rows;
    cut->cols = cut->total_cols = w->cols;
    if (cut->dim < 0) return FST_OK;
    if (d + 1 == n) {
        cut->col = cut->begin, cut->cols = cut->end - cut->begin;
    } else if (d + 2 == n) {
        cut->row = cut->begin, cut->rows = cut->end - cut->begin;
    } else if (product(w->shape, 0, d) == 1) {
        uint64_t inner = product(w->shape, d + 1, n - 2);
        cut->first_matrix = cut->begin * inner;
        cut->matrices = (cut->end - cut->begin) * inner;
    } else {
        return fst_fail(
            error, FST_E_UNSUPPORTED, 0, where,
            "tensor \"%s\" is quantized: of its dimensions before the last two, only the first is cut",
            w->name);
    }
    return FST_OK;
}

void fst_cut_box(const fst_quantized *w, fst_cut *cut) {
    uint64_t matrix = (cut->local.end - cut->local.begin) / (w->stack ? w->stack : 1);
    cut->boxed = 1;
    if (cut->nbytes == 0 && cut->matrices * cut->rows * cut->cols == 0) return;
    cut->storage = storage_of(w);
    /* Rows of half bytes, if they begin at whole ones, are as good as any. */
    if (cut->storage == FST_STORED_FLAT && cut->total_cols % 2 == 0 && w->stack == 1)
        cut->storage = FST_STORED_ROWS;
    if (cut->storage == FST_STORED_FLAT) set_flat(cut, 4, 0, NULL);
    else set_storage(w, cut, matrix);
}

fst_status fst_cut_weight(const fst_quantized *w, const fst_entry *entry, int32_t dim, uint64_t begin,
                          uint64_t end, uint32_t layout, const fst_where *where, fst_cut *cut,
                          fst_error *error) {
    fst_status status = set_shape(cut, w->name, w->ndim, w->shape, dim, begin, end, layout, where, error);
    if (!status) status = set_matrices(w, where, cut, error);
    if (status) {
        fst_cut_free(cut);
        return status;
    }
    if (w->stack != 1 && storage_of(w) == FST_STORED_FLAT) {
        fst_cut_free(cut);
        return fst_fail(error, FST_E_UNSUPPORTED, 0, where,
                        "tensor \"%s\" (%s) has more than one matrix: it is not cut", w->name,
                        fst_format_name(w->format));
    }
    cut->local = *entry; /* all of it: fst_cut_box takes its size from there */
    set_steps(cut);
    if (cut->matrices * cut->rows * cut->cols == 0) {
        cut->local.end = cut->local.begin;
        return FST_OK;
    }
    fst_cut_box(w, cut);
    /* Kernels for whole rows are faster. */
    int in_rows = cut->storage == FST_STORED_ROWS && cut->cols == cut->total_cols;
    uint64_t odd = (cut->row * cut->total_cols | cut->rows * cut->total_cols) % 2;
    if (w->bits == 4 && odd) in_rows = 0;
    if (in_rows && !cut->shaped) cut->boxed = 0;
    return FST_OK;
}

/* ---- Companions ------------------------------------------------------------------------------------- */

/* What of a companion belongs to a part: as a stack of matrices of elements. */
typedef struct share {
    uint64_t rows, cols; /* of each */
    uint64_t row, row_end, col, col_end;
    int exact; /* nothing else belongs to it */
} share;

/* Codes [begin, end) as units of so many, or of packed ones as words. */
static int round_out(uint64_t unit, uint64_t begin, uint64_t end, uint64_t extent, uint64_t *first,
                     uint64_t *last) {
    *first = begin / unit;
    *last = ceil_of(end, unit);
    return begin % unit == 0 && (end % unit == 0 || end == extent);
}

static int words_exactly(const fst_quantized *w, uint64_t begin, uint64_t end, uint64_t extent,
                         uint64_t *first, uint64_t *last) {
    uint64_t each = w->flags & FST_Q_PADDED || 32 % w->bits == 0 ? 32 / w->bits : 32;
    units_of(w, begin, end, first, last);
    return begin % each == 0 && (end % each == 0 || end == extent);
}

/* Rows and columns of scales, and of zero points that are one for each. */
static void share_of_scales(const fst_quantized *w, const fst_cut *part, uint64_t count, share *s) {
    const fst_storage storage = storage_of(w);
    const int transposed = storage == FST_STORED_COLUMNS || storage == FST_STORED_TRANSPOSED;
    const int any_group = w->companions[FST_COMPANION_GROUPS] != FST_NO_TENSOR;
    const uint64_t high = w->block_rows ? w->block_rows : w->rows,
                   wide = w->block_cols ? w->block_cols : w->cols;
    uint64_t down, down_end, across, across_end;
    int exact = round_out(high < w->rows ? high : w->rows, part->row, part->row + part->rows, w->rows, &down,
                          &down_end);
    uint64_t bands = ceil_of(w->rows, high), groups = count / bands;
    if (high >= w->rows) down = 0, down_end = 1, exact = 1; /* they are all rows' */
    if (any_group || wide >= w->cols) across = 0, across_end = groups;
    else exact &= round_out(wide, part->col, part->col + part->cols, w->cols, &across, &across_end);
    *s = (share){bands, groups, down, down_end, across, across_end, exact};
    if (!transposed) return;
    *s = (share){groups, bands, across, across_end, down, down_end, exact};
}

static int find_share(const fst_quantized *w, fst_companion which, const fst_cut *part, uint64_t count,
                      share *s) {
    if (storage_of(w) == FST_STORED_FLAT || count == 0) return 0;
    if (which == FST_COMPANION_SCALE || (which == FST_COMPANION_ZERO && w->flags & FST_Q_BYTE_ZEROS)) {
        share_of_scales(w, part, count, s);
        return 1;
    }
    if (which == FST_COMPANION_GROUPS && count == w->cols) {
        *s = (share){w->cols, 1, part->col, part->col + part->cols, 0, 1, 1};
        return 1;
    }
    if (which != FST_COMPANION_ZERO) return 0;
    /* Packed, in words along rows or along groups. */
    uint64_t first, last;
    int any_group = w->companions[FST_COMPANION_GROUPS] != FST_NO_TENSOR;
    if (w->format == FST_FORMAT_AWQ_GEMV) {
        *s = (share){w->rows,
                     count / w->rows,
                     part->row,
                     part->row + part->rows,
                     0,
                     count / w->rows,
                     part->cols == part->total_cols};
        return 1;
    }
    int exact = words_exactly(w, part->row, part->row + part->rows, w->rows, &first, &last);
    uint64_t words, all;
    words_exactly(w, 0, w->rows, w->rows, &all, &words);
    uint64_t groups = count / words, group = 0, group_end = groups;
    if (!any_group && w->block_cols < w->cols)
        exact &= round_out(w->block_cols, part->col, part->col + part->cols, w->cols, &group, &group_end);
    if (w->format == FST_FORMAT_PACKED) *s = (share){words, groups, first, last, group, group_end, exact};
    else *s = (share){groups, words, group, group_end, first, last, exact};
    return 1;
}

static uint64_t elements_of(const fst_entry *entry) { return product(entry->shape, 0, entry->ndim); }

int fst_cut_companion(const fst_quantized *w, fst_companion which, const fst_cut *part,
                      const fst_entry *entry, uint64_t most, fst_cut *cut) {
    const uint64_t size = fst_dtype_bits(entry->dtype) / 8, all = elements_of(entry);
    share s;
    memset(cut, 0, sizeof *cut);
    if (part->matrices * part->rows * part->cols == 0) return 0; /* there may be no matrix */
    if (which == FST_COMPANION_GROUPS || all % w->stack || !find_share(w, which, part, all / w->stack, &s) ||
        s.rows * s.cols * w->stack != all)
        return 0;
    uint64_t matrix = s.rows * s.cols * size, wide = s.col_end - s.col, high = s.row_end - s.row;
    if (wide == s.cols && high == s.rows && part->matrices == w->stack) return 0;
    if (wide < s.cols && all * size <= most) return 0;
    if (wide < s.cols && high < s.rows) return 0; /* both at a time: rare, and small */
    cut->dim = FST_REPLICATE;
    cut->local = *entry;
    cut->matrices = part->matrices;
    cut->first_matrix = part->first_matrix;
    cut->row = s.row, cut->rows = high;
    cut->col = s.col, cut->cols = wide;
    cut->total_rows = s.rows, cut->total_cols = s.cols;
    cut->start = part->first_matrix * matrix + (s.row * s.cols + s.col) * size;
    cut->nbytes = cut->needed = part->matrices * high * wide * size;
    cut->segment = wide < s.cols ? wide * size : high * s.cols * size;
    cut->pitch = wide < s.cols ? s.cols * size : matrix;
    if (wide == s.cols && high == s.rows) cut->segment = cut->nbytes;
    return 1;
}

/* The dimension whose extent is that of rows, or of columns, of a stack of matrices; -1: none. `before` elements of dimensions
 * come before it, and its extent is `extent`, or several columns at a time (*unit). */
static int32_t find_dim(const fst_entry *entry, uint64_t before, uint64_t extent, uint64_t *unit) {
    for (uint32_t i = 0; i < entry->ndim; i++) {
        if (product(entry->shape, 0, i) != before || entry->shape[i] == 0) continue;
        if (entry->shape[i] == 1 && i + 1 < entry->ndim && extent > 1) continue;
        uint64_t rest = product(entry->shape, i, entry->ndim);
        if (entry->shape[i] != extent && rest != extent) continue;
        *unit = entry->shape[i] == extent ? 1 : extent / entry->shape[i];
        return (int32_t)i;
    }
    return -1;
}

const char *fst_cut_kept(const fst_quantized *w, unsigned which, const fst_cut *part, const fst_entry *entry,
                         int32_t *dim, uint64_t *begin, uint64_t *end) {
    static const char *const unaligned = "its border cuts a block, a group or a word";
    static const char *const unknown = "it cannot be cut and stay quantized";
    const int all_rows = part->rows == part->total_rows, all_cols = part->cols == part->total_cols;
    const uint64_t all = elements_of(entry);
    uint64_t unit, extent, first, last, rows_before;
    *dim = FST_REPLICATE;
    *begin = *end = 0;
    if (w->stack * w->rows * w->cols == 0) return "it has no elements";
    if (part->matrices != w->stack) {
        uint64_t each = all / w->stack;
        if (all % w->stack || all == 1 || each * w->stack != all) return NULL; /* one for all */
        *dim = find_dim(entry, 1, w->shape[part->dim], &unit);
        *begin = part->begin, *end = part->end;
        return *dim < 0 || unit != 1 ? unknown : NULL;
    }
    if (all_rows && all_cols) return NULL;
    if (which == FST_COMPANION_SHAPE || which == FST_COMPANION_STATE || storage_of(w) == FST_STORED_FLAT)
        return unknown;
    share s;
    if (which == FST_COMPANIONS) {
        const fst_storage storage = storage_of(w);
        uint64_t matrix = (entry->end - entry->begin) / w->stack, wide = fst_dtype_bits(entry->dtype) / 8;
        fst_cut stored = *part;
        stored.storage = storage;
        set_storage(w, &stored, matrix);
        int swapped = storage == FST_STORED_COLUMNS || storage == FST_STORED_TRANSPOSED;
        uint64_t pitch = storage == FST_STORED_PAIRS     ? w->cols
                         : storage == FST_STORED_COLUMNS ? w->rows * 4
                                                         : matrix / (swapped ? w->cols : w->rows);
        s = (share){matrix / pitch,
                    pitch / wide,
                    stored.stored_row,
                    stored.stored_row + stored.stored_rows,
                    stored.stored_byte / wide,
                    ceil_of(stored.stored_byte + stored.row_bytes, wide),
                    1};
        uint64_t codes = storage == FST_STORED_TRANSPOSED ? 8 : storage == FST_STORED_PAIRS ? 2 : 0;
        if (codes)
            s.exact = all_rows || round_out(codes, part->row, part->row + part->rows, w->rows, &first, &last);
        else if (storage == FST_STORED_COLUMNS || fst_scheme_is_packed(w))
            s.exact = all_cols || words_exactly(w, part->col, part->col + part->cols, w->cols, &first, &last);
        else if (w->bits == 4)
            s.exact = all_cols || round_out(2, part->col, part->col + part->cols, w->cols, &first, &last);
    } else if (all % w->stack || !find_share(w, (fst_companion)which, part, all / w->stack, &s) ||
               s.rows * s.cols * w->stack != all) {
        return which == FST_COMPANION_GLOBAL || which == FST_COMPANION_MAP || all == 1 ? NULL : unknown;
    }
    if (!s.exact) return unaligned;
    int rows = s.row != 0 || s.row_end != s.rows, cols = s.col != 0 || s.col_end != s.cols;
    if (!rows && !cols) return NULL;
    if (rows && cols) return unknown;
    extent = rows ? s.rows : s.cols;
    rows_before = w->stack * (rows ? 1 : s.rows);
    *dim = find_dim(entry, rows_before, extent, &unit);
    if (*dim < 0) return unknown;
    *begin = rows ? s.row : s.col;
    *end = rows ? s.row_end : s.col_end;
    if (*begin % unit || *end % unit) return unaligned;
    *begin /= unit, *end /= unit;
    return NULL;
}

void fst_cut_free(fst_cut *cut) {
    free(cut->shape);
    cut->shape = NULL;
}

/* ---- Results ------------------------------------------------------------------------------------------ */

uint64_t fst_cut_extent(const fst_cut *cut, uint32_t dim) {
    const uint32_t n = cut->ndim;
    if (cut->layout & FST_TRANSPOSE && dim + 2 >= n) dim = dim + 1 == n ? n - 2 : n - 1;
    return cut->shape[dim];
}

int fst_cut_widen(fst_cut *cut, uint32_t dim, uint64_t extent) {
    const uint32_t n = cut->ndim;
    int transposed = (cut->layout & FST_TRANSPOSE) != 0;
    if (n < 2 || dim + 2 < n) return 0;
    if (dim + 2 == n) {
        cut->dst_matrix = extent * (transposed ? cut->rows : cut->cols);
    } else {
        cut->dst_matrix = extent * (transposed ? cut->cols : cut->rows);
        if (transposed) cut->dst_col = extent;
        else cut->dst_row = extent;
    }
    cut->shaped = 1;
    return 1;
}

/* ---- Areas ---------------------------------------------------------------------------------------------- */

unsigned fst_cut_split(uint64_t first, uint64_t count, uint64_t cols, fst_cut_area areas[3]) {
    unsigned found = 0;
    uint64_t row = first / cols, col = first % cols;
    if (count && col) {
        uint64_t n = cols - col < count ? cols - col : count;
        areas[found++] = (fst_cut_area){row++, col, 1, n};
        count -= n;
    }
    if (count >= cols) {
        areas[found++] = (fst_cut_area){row, 0, count / cols, cols};
        row += count / cols;
        count %= cols;
    }
    if (count) areas[found++] = (fst_cut_area){row, 0, 1, count};
    return found;
}

/* What of an area is in the part. 0: nothing. */
static int clip(const fst_cut *cut, fst_cut_area *a) {
    uint64_t row = a->row > cut->row ? a->row : cut->row, col = a->col > cut->col ? a->col : cut->col;
    uint64_t row_end = a->row + a->rows, col_end = a->col + a->cols;
    if (row_end > cut->row + cut->rows) row_end = cut->row + cut->rows;
    if (col_end > cut->col + cut->cols) col_end = cut->col + cut->cols;
    if (row >= row_end || col >= col_end) return 0;
    *a = (fst_cut_area){row, col, row_end - row, col_end - col};
    return 1;
}

unsigned fst_cut_areas(const fst_cut *cut, unsigned bits, int padded, uint64_t at, uint64_t nbytes,
                       fst_cut_area areas[3], uint64_t *src_row, uint64_t *src_byte) {
    uint64_t row = cut->stored_row + at / cut->row_bytes, byte = cut->stored_byte + at % cut->row_bytes;
    uint64_t rows = nbytes / cut->row_bytes, wide = cut->row_bytes;
    unsigned found = 1, kept = 0;
    if (rows == 0) rows = 1, wide = nbytes; /* a part of one */
    *src_row = row;
    *src_byte = byte;
    switch (cut->storage) {
    case FST_STORED_FLAT: {
        uint64_t first = ceil_of(byte * 8, bits), end = (byte + nbytes) * 8 / bits;
        found = fst_cut_split(first, end - first, cut->total_cols, areas);
        *src_row = 0;
        break;
    }
    case FST_STORED_PAIRS: areas[0] = (fst_cut_area){row * 2, byte, rows * 2, wide}; break;
    case FST_STORED_COLUMNS: {
        uint64_t first = padded ? row * (32 / bits) : row * 32 / bits;
        uint64_t end = padded ? (row + rows) * (32 / bits) : (row + rows) * 32 / bits;
        areas[0] = (fst_cut_area){byte / 4, first, wide / 4, end - first};
        break;
    }
    case FST_STORED_TRANSPOSED: areas[0] = (fst_cut_area){byte * 2, row, wide * 2, rows}; break;
    default: {
        uint64_t first = padded ? byte / 4 * (32 / bits) : ceil_of(byte * 8, bits);
        uint64_t end = padded ? (byte + wide) / 4 * (32 / bits) : (byte + wide) * 8 / bits;
        areas[0] = (fst_cut_area){row, first, rows, end - first};
        break;
    }
    }
    for (unsigned i = 0; i < found; i++)
        if (clip(cut, &areas[i])) areas[kept++] = areas[i];
    return kept;
}
