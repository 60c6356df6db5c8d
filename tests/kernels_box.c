/* Parts of quantized matrices: random boxes of all formats equal the same elements of the whole conversion, bit for bit,
 * wherever they come from and go to; what they may not read or write; bad arguments. */
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "kernels_rig.h"

enum {
    CAPACITY = 1 << 21,
    ROOM = 1 << 17,   /* bytes of what is stored, at most; of scales, of zero points */
    SCALES = 1 << 19, /* where these lie on the device */
    ZEROS = 1 << 20,
    GROUPS = 3 << 19,
    MAPS = GROUPS + 4096, /* of bitsandbytes; NVFP4's global scale */
    NESTED_MAP = MAPS + 1024,
    NESTED = NESTED_MAP + 1024,
    ELEMENTS = 1 << 15
};

static const int targets[] = {FST_T_F32, FST_T_F16, FST_T_BF16};

typedef enum family { SCALED, BNB4, PACKED, CAST } family;

/* Scales, or zero points: rows x cols elements of so many bytes. */
typedef struct grid {
    uint64_t rows, cols, size;
    uint8_t bytes[ROOM];
} grid;

typedef struct matrix {
    family family;
    fst_scaled_args scaled;
    fst_bnb4_args bnb4;
    fst_packed_args packed;
    fst_cast_args cast;
    uint64_t rows, cols;
    int target;
    uint64_t row_bits, stored_rows; /* as they are stored */
    uint8_t stored[ROOM];
    grid scales, zeros;
    int32_t groups[1024];
    uint32_t maps[4096 / 4]; /* as on the device, from MAPS on */
    uint32_t want[ELEMENTS]; /* of the whole */
} matrix;

/* Rows and columns of a grid, or stored rows and their bytes, that a part needs: up to the last. */
typedef struct need {
    uint64_t row, row_last, col, col_last;
} need;

static uint64_t ceil_of(uint64_t n, uint64_t by) { return (n + by - 1) / by; }

static void fill(uint64_t *random, void *bytes, size_t size) {
    uint8_t *to = bytes;
    for (size_t i = 0; i < size; i++) to[i] = (uint8_t)rig_random(random);
}

/* Random scales: any bits (NaN among them), or small numbers. */
static void fill_scales(uint64_t *random, void *bytes, uint64_t count, int dtype) {
    const int wild = rig_below(random, 4) == 0;
    fill(random, bytes, count * fst_type_bits(dtype) / 8);
    for (uint64_t i = 0; i < count && !wild; i++) {
        uint32_t *f32 = (uint32_t *)bytes + i;
        uint16_t *f16 = (uint16_t *)bytes + i;
        if (dtype == FST_T_F32) *f32 = (*f32 & 0x80FFFFFF) | 0x3C000000;
        if (dtype == FST_T_F16) *f16 = (*f16 & 0x83FF) | 0x2000;
        if (dtype == FST_T_BF16) *f16 = (*f16 & 0x83FF) | 0x3C00;
        if (dtype == FST_T_F8_E8M0) ((uint8_t *)bytes)[i] = (uint8_t)(120 + i % 13);
    }
}

static uint64_t side(uint64_t *random) {
    static const uint64_t sides[] = {1,  2,  3,  5,  7,  8,  13, 16,  24,  31, 32,
                                     33, 40, 61, 64, 67, 96, 97, 128, 131, 160};
    return sides[rig_below(random, sizeof sides / sizeof *sides)];
}

static void shape(matrix *m, uint64_t *random) {
    m->rows = side(random), m->cols = side(random);
    if (rig_below(random, 8) == 0) m->cols = 521, m->rows = 1 + rig_below(random, 40);
    m->target = targets[rig_below(random, 3)];
}

static unsigned bits_of(const matrix *m) {
    const int src = m->family == CAST ? m->cast.src_dtype : m->scaled.src_dtype;
    return m->family == PACKED ? m->packed.bits : m->family == BNB4 ? 4 : fst_type_bits(src);
}

/* ---- Matrices ---- */

static void make_scaled(matrix *m, uint64_t *random) {
    static const int sources[] = {FST_T_F8_E4M3,     FST_T_F8_E5M2, FST_T_F8_E4M3FNUZ,
                                  FST_T_F8_E5M2FNUZ, FST_T_I8,      FST_T_F4};
    static const int scale_types[] = {FST_T_F32, FST_T_F16, FST_T_BF16, FST_T_F8_E8M0};
    fst_scaled_args *a = &m->scaled;
    const int way = (int)rig_below(random, 3);
    a->src_dtype = sources[rig_below(random, 6)];
    a->scale_dtype = scale_types[rig_below(random, 4)];
    a->kind = (int)rig_below(random, 4);
    a->block_rows = side(random), a->block_cols = side(random);
    int zeros = 0, nvfp4 = 0;
    if (a->src_dtype == FST_T_I8) {
        zeros = way == 1;
        a->flags = rig_below(random, 3) ? 0 : FST_K_OVER_127;
    } else if (a->src_dtype == FST_T_F4) {
        nvfp4 = way == 1;
        if (nvfp4) a->flags = rig_below(random, 2) ? FST_K_DIVIDE : 0;
    } else {
        a->flags = way == 1 ? FST_K_DIVIDE : 0;
    }
    if (nvfp4) { /* whole groups, scales of E4M3 */
        a->kind = FST_SCALE_GROUP, a->scale_dtype = FST_T_F8_E4M3;
        a->block_cols = 16, m->cols = ceil_of(m->cols, 16) * 16;
        a->global_scale = m->maps;
        m->maps[0] = 0x3D123456;
    }
    const int group = a->kind == FST_SCALE_GROUP, block = a->kind == FST_SCALE_BLOCK;
    m->scales.rows = a->kind == FST_SCALE_TENSOR ? 1 : block ? ceil_of(m->rows, a->block_rows) : m->rows;
    m->scales.cols = group || block ? ceil_of(m->cols, a->block_cols) : 1;
    m->scales.size = fst_type_bits(a->scale_dtype) / 8;
    a->rows = m->rows, a->cols = m->cols;
    a->scales_count = m->scales.rows * m->scales.cols;
    fill_scales(random, m->scales.bytes, a->scales_count, a->scale_dtype);
    if (zeros) {
        m->zeros.rows = m->scales.rows, m->zeros.cols = m->scales.cols, m->zeros.size = 1;
        fill(random, m->zeros.bytes, a->scales_count);
    }
    a->dst_dtype = m->target;
}

static void make_bnb4(matrix *m, uint64_t *random) {
    static const uint64_t blocks[] = {64, 32, 128, 3, 7, 4096, 1};
    fst_bnb4_args *a = &m->bnb4;
    const int nested = (int)rig_below(random, 2);
    a->elements = m->rows * m->cols;
    a->block = blocks[rig_below(random, 7)], a->nested_block = rig_below(random, 2) ? 256 : 5;
    a->offset = 0.0371f, a->dst_dtype = m->target;
    m->scales.rows = 1, m->scales.cols = ceil_of(a->elements, a->block), m->scales.size = nested ? 1 : 4;
    fill_scales(random, m->maps, 1024, FST_T_F32);
    if (nested) fill(random, m->scales.bytes, m->scales.cols), a->nested = m->maps;
    else fill_scales(random, m->scales.bytes, m->scales.cols, FST_T_F32);
}

static uint64_t words_for(uint64_t count, unsigned bits, int padded) {
    return padded ? ceil_of(count, 32 / bits) : ceil_of(count * bits, 32);
}

static void make_packed_zeros(matrix *m, uint64_t *random) {
    fst_packed_args *a = &m->packed;
    const int padded = (a->flags & FST_K_PADDED) != 0;
    const uint64_t groups = a->groups_count, across = words_for(m->rows, a->bits, padded);
    switch (a->zeros_kind) {
    case FST_ZEROS_NONE: return;
    case FST_ZEROS_BYTES: m->zeros.rows = m->rows, m->zeros.cols = groups; break;
    case FST_ZEROS_ROWS: m->zeros.rows = groups, m->zeros.cols = across; break;
    case FST_ZEROS_COLUMNS: m->zeros.rows = across, m->zeros.cols = groups; break;
    default: m->zeros.rows = m->rows, m->zeros.cols = words_for(groups, a->bits, padded);
    }
    m->zeros.size = a->zeros_kind == FST_ZEROS_BYTES ? 1 : 4;
    fill(random, m->zeros.bytes, m->zeros.rows * m->zeros.cols * m->zeros.size);
}

static void make_packed(matrix *m, uint64_t *random) {
    static const unsigned column_bits[] = {2, 3, 4, 8};
    static const unsigned unsigned_flags[] = {0, FST_K_OFFSET, FST_K_ZERO_PLUS_ONE,
                                              FST_K_OFFSET | FST_K_ZERO_CARRY};
    static const int scale_types[] = {FST_T_F32, FST_T_F16, FST_T_BF16};
    fst_packed_args *a = &m->packed;
    a->layout = (int)rig_below(random, 4);
    a->bits = a->layout == FST_PACKED_ROW      ? 1 + (unsigned)rig_below(random, 8)
              : a->layout == FST_PACKED_COLUMN ? column_bits[rig_below(random, 4)]
                                               : 4;
    if (a->layout == FST_PACKED_PAIRS) m->rows = ceil_of(m->rows, 2) * 2;
    if (a->layout == FST_PACKED_COLUMN) m->cols = ceil_of(m->cols, 32) * 32;
    a->flags = unsigned_flags[rig_below(random, a->bits == 2 || a->bits == 4 || a->bits == 8 ? 4 : 3)];
    a->zeros_kind = (int)rig_below(random, 5);
    if (rig_below(random, 4) == 0) a->flags = FST_K_SIGNED, a->zeros_kind = FST_ZEROS_NONE;
    if (a->layout == FST_PACKED_ROW && rig_below(random, 2)) a->flags |= FST_K_PADDED;
    if (a->layout == FST_PACKED_TRANSPOSED && rig_below(random, 2)) a->flags |= FST_K_AWQ_ORDER;
    a->rows = m->rows, a->cols = m->cols, a->group = side(random);
    a->groups_count = ceil_of(m->cols, a->group) + rig_below(random, 2);
    a->scale_dtype = scale_types[rig_below(random, 3)], a->dst_dtype = m->target;
    if (rig_below(random, 4) == 0) a->groups = m->groups;
    for (uint64_t i = 0; i < m->cols; i++) m->groups[i] = (int32_t)rig_below(random, a->groups_count);
    const int across = a->layout == FST_PACKED_COLUMN || a->layout == FST_PACKED_TRANSPOSED;
    m->scales.rows = across ? a->groups_count : m->rows, m->scales.cols = across ? m->rows : a->groups_count;
    m->scales.size = fst_type_bits(a->scale_dtype) / 8;
    fill_scales(random, m->scales.bytes, m->rows * a->groups_count, a->scale_dtype);
    make_packed_zeros(m, random);
}

static void find_stored(matrix *m) {
    const fst_packed_args *a = &m->packed;
    m->row_bits = m->cols * bits_of(m), m->stored_rows = m->rows;
    if (m->family != PACKED) return;
    if (a->layout == FST_PACKED_ROW)
        m->row_bits = 32 * words_for(m->cols, a->bits, (a->flags & FST_K_PADDED) != 0);
    if (a->layout == FST_PACKED_PAIRS) m->row_bits = 8 * m->cols, m->stored_rows = m->rows / 2;
    if (a->layout == FST_PACKED_COLUMN) m->row_bits = 32 * m->rows, m->stored_rows = m->cols * a->bits / 32;
    if (a->layout == FST_PACKED_TRANSPOSED) m->row_bits = 32 * ceil_of(m->rows, 8), m->stored_rows = m->cols;
}

static matrix *make(family kind, uint64_t *random) {
    static const int narrow[] = {FST_T_F4, FST_T_F6_E2M3, FST_T_F6_E3M2};
    matrix *m = calloc(1, sizeof *m);
    CHECK(m);
    m->family = kind;
    shape(m, random);
    if (kind == SCALED) make_scaled(m, random);
    if (kind == BNB4) make_bnb4(m, random);
    if (kind == PACKED) make_packed(m, random);
    if (kind == CAST) m->cast.src_dtype = narrow[rig_below(random, 3)], m->cast.dst_dtype = m->target;
    find_stored(m);
    CHECK(m->rows * m->cols <= ELEMENTS && m->row_bits * m->stored_rows / 8 + 8 <= ROOM);
    CHECK(m->scales.rows * m->scales.cols * m->scales.size <= ROOM);
    CHECK(m->zeros.rows * m->zeros.cols * m->zeros.size <= ROOM);
    fill(random, m->stored, m->row_bits * m->stored_rows / 8 + 8);
    return m;
}

/* ---- Launching ---- */

/* With pointers to the device. No box: all of it. */
static int launch(const test_rig *rig, const matrix *m, const uint8_t *src, uint8_t *dst,
                  const fst_box *box) {
    const fst_kernels *k = rig->gpu.kernels;
    const uint64_t all = m->rows * m->cols;
    if (m->family == SCALED) {
        fst_scaled_args a = m->scaled;
        a.src = src, a.dst = dst, a.scales = rig->src + SCALES, a.count = all;
        if (m->zeros.size) a.zeros = rig->src + ZEROS;
        if (a.global_scale) a.global_scale = rig->src + MAPS;
        return box ? k->box_scaled(rig->stream, &a, box) : k->scaled(rig->stream, &a);
    }
    if (m->family == BNB4) {
        fst_bnb4_args a = m->bnb4;
        a.src = src, a.dst = dst, a.absmax = rig->src + SCALES, a.map = rig->src + MAPS, a.count = all;
        a.nested_map = rig->src + NESTED_MAP;
        if (a.nested) a.nested = rig->src + NESTED;
        return box ? k->box_bnb4(rig->stream, &a, box) : k->bnb4(rig->stream, &a);
    }
    if (m->family == PACKED) {
        fst_packed_args a = m->packed;
        a.src = src, a.dst = dst, a.scales = rig->src + SCALES, a.zeros = rig->src + ZEROS;
        if (a.groups) a.groups = (const int32_t *)(rig->src + GROUPS);
        a.count = m->stored_rows * m->row_bits / (a.layout == FST_PACKED_PAIRS ? 8 : 32);
        return box ? k->box_packed(rig->stream, &a, box) : k->packed(rig->stream, &a);
    }
    fst_cast_args a = m->cast;
    a.src = src, a.dst = dst, a.count = ceil_of(all, 4) * 4; /* whole bytes */
    return box ? k->box_cast(rig->stream, &a, box) : k->cast(rig->stream, &a);
}

static void run_whole(test_rig *rig, matrix *m) {
    const size_t size = fst_type_bits(m->target) / 8, all = m->rows * m->cols;
    rig_upload(rig, rig->src, m->stored, m->row_bits * m->stored_rows / 8 + 8);
    rig_upload(rig, rig->src + SCALES, m->scales.bytes, m->scales.rows * m->scales.cols * m->scales.size);
    rig_upload(rig, rig->src + ZEROS, m->zeros.bytes, m->zeros.rows * m->zeros.cols * m->zeros.size);
    rig_upload(rig, rig->src + GROUPS, m->groups, sizeof m->groups);
    rig_upload(rig, rig->src + MAPS, m->maps, sizeof m->maps);
    rig_upload(rig, rig->src + NESTED, m->maps, sizeof m->maps);
    CHECK_INT(0, launch(rig, m, rig->src, rig->dst, NULL));
    rig_download(rig, all * size);
    memset(m->want, 0, sizeof m->want);
    for (size_t i = 0; i < all; i++) memcpy(&m->want[i], rig->host + i * size, size);
}

/* ---- Parts ---- */

/* The bit that an element of a row of codes begins at. */
static uint64_t bit_of(const matrix *m, uint64_t col) {
    const unsigned bits = bits_of(m);
    const int padded = m->family == PACKED && (m->packed.flags & FST_K_PADDED);
    return padded ? col / (32 / bits) * 32 + col % (32 / bits) * bits : col * bits;
}

/* Stored rows and the bytes of each. */
static need stored_need(const matrix *m, const fst_box *b) {
    const uint64_t row_last = b->row + b->rows - 1, col_last = b->col + b->cols - 1;
    const uint64_t bit = bit_of(m, b->col), bit_last = bit_of(m, col_last) + bits_of(m) - 1;
    const int layout = m->family == PACKED ? m->packed.layout : FST_PACKED_ROW;
    if (layout == FST_PACKED_PAIRS) return (need){b->row / 2, row_last / 2, b->col, col_last};
    if (layout == FST_PACKED_COLUMN) return (need){bit / 32, bit_last / 32, b->row * 4, row_last * 4 + 3};
    if (layout == FST_PACKED_TRANSPOSED)
        return (need){b->col, col_last, b->row / 8 * 4, row_last / 8 * 4 + 3};
    return (need){b->row, row_last, bit / 8, bit_last / 8};
}

static need scales_need(const matrix *m, const fst_box *b) {
    const uint64_t row_last = b->row + b->rows - 1, col_last = b->col + b->cols - 1;
    if (m->family == SCALED) {
        const fst_scaled_args *a = &m->scaled;
        const uint64_t high = a->kind == FST_SCALE_TENSOR  ? m->rows
                              : a->kind == FST_SCALE_BLOCK ? a->block_rows
                                                           : 1;
        const uint64_t wide =
            a->kind == FST_SCALE_TENSOR || a->kind == FST_SCALE_ROW ? m->cols : a->block_cols;
        return (need){b->row / high, row_last / high, b->col / wide, col_last / wide};
    }
    if (m->family == BNB4)
        return (need){0, 0, (b->row * m->cols + b->col) / m->bnb4.block,
                      (row_last * m->cols + col_last) / m->bnb4.block};
    const fst_packed_args *a = &m->packed;
    uint64_t j = b->col / a->group, j_last = col_last / a->group;
    if (a->groups) j = 0, j_last = a->groups_count - 1;
    if (a->layout == FST_PACKED_COLUMN || a->layout == FST_PACKED_TRANSPOSED)
        return (need){j, j_last, b->row, row_last};
    return (need){b->row, row_last, j, j_last};
}

static need zeros_need(const matrix *m, const fst_box *b) {
    need n = scales_need(m, b), words;
    if (m->family != PACKED) return n;
    const fst_packed_args *a = &m->packed;
    const int across = a->layout == FST_PACKED_COLUMN || a->layout == FST_PACKED_TRANSPOSED;
    const need by_row = across ? (need){n.col, n.col_last, n.row, n.row_last} : n; /* rows, groups */
    if (a->zeros_kind == FST_ZEROS_BYTES) return by_row;
    const int groups = a->zeros_kind == FST_ZEROS_GROUPS;
    words.row = bit_of(m, groups ? by_row.col : by_row.row) / 32;
    words.row_last = (bit_of(m, groups ? by_row.col_last : by_row.row_last) + a->bits - 1) / 32;
    if (groups) return (need){by_row.row, by_row.row_last, words.row, words.row_last};
    if (a->zeros_kind == FST_ZEROS_ROWS)
        return (need){by_row.col, by_row.col_last, words.row, words.row_last};
    return (need){words.row, words.row_last, by_row.col, by_row.col_last};
}

/* Puts what is needed of rows of so many bytes there, `pitch` bytes apart, with other bytes between; returns where it ends. */
static size_t put_part(uint8_t *to, const uint8_t *from, uint64_t row_bytes, need n, uint64_t pitch) {
    const size_t each = n.col_last - n.col + 1, end = (n.row_last - n.row) * pitch + each;
    memset(to, 0x5B, end);
    for (uint64_t row = n.row; row <= n.row_last; row++)
        memcpy(to + (row - n.row) * pitch, from + row * row_bytes + n.col, each);
    return end;
}

/* Uploads `size` bytes, with memory around that must not be read. */
static void upload_part(test_rig *rig, size_t at, const uint8_t *bytes, size_t size) {
    rig_upload(rig, rig->src + at, bytes, size);
    if (!rig->gpu.host_access) return;
    POISON(rig->src + at - 64, 64);
    POISON(rig->src + at + size, 64);
}
static void allow(test_rig *rig) {
    if (rig->gpu.host_access) UNPOISON(rig->src, rig->capacity);
}

static uint8_t part[4 * ROOM];

static void place_grid(test_rig *rig, const grid *g, need n, size_t at, uint64_t *first, uint64_t *pitch,
                       uint64_t *random) {
    const uint64_t s = g->size;
    if (rig_below(random, 3) == 0) { /* all of them, or from the first that is needed on */
        *first = rig_below(random, 2) ? n.row * g->cols + n.col : 0, *pitch = 0;
        const uint64_t end = n.row_last * g->cols + n.col_last + 1;
        upload_part(rig, at, g->bytes + *first * s, (end - *first) * s);
        return;
    }
    *pitch = n.col_last - n.col + 1 + rig_below(random, 3), *first = n.row * g->cols + n.col;
    n.col *= s, n.col_last = n.col_last * s + s - 1;
    upload_part(rig, at, part, put_part(part, g->bytes, g->cols * s, n, *pitch * s));
}

/* Where the codes of the part are; returns the place on the device. */
static size_t place_codes(test_rig *rig, const matrix *m, fst_box *b, uint64_t *random) {
    const need n = stored_need(m, b);
    const size_t skew = 64 + rig_below(random, 16);
    if (m->row_bits % 8 || rig_below(random, 3) == 0) {         /* as they follow one another */
        const uint64_t bits = m->row_bits % 8 ? bits_of(m) : 0; /* no layout of words */
        const uint64_t first =
            bits ? (b->row * m->cols + b->col) * bits / 8 : n.row * (m->row_bits / 8) + n.col;
        const uint64_t last = bits ? ((n.row_last * m->cols + b->col + b->cols) * bits - 1) / 8
                                   : n.row_last * (m->row_bits / 8) + n.col_last;
        b->src_byte = first - rig_below(random, first < 9 ? first + 1 : 9);
        upload_part(rig, skew, m->stored + b->src_byte, last + 1 - b->src_byte);
        return skew;
    }
    need more = n; /* some more in front */
    if (rig_below(random, 2))
        more.col -= rig_below(random, n.col + 1), more.row -= rig_below(random, n.row + 1);
    b->src_row = more.row, b->src_byte = more.col;
    b->src_pitch = more.col_last - more.col + 1 + rig_below(random, 9);
    upload_part(rig, skew, part, put_part(part, m->stored, m->row_bits / 8, more, b->src_pitch));
    return skew;
}

/* Where the result goes: rows, a wider result, every second row apart, transposed, steps in both directions. Returns how
 * many elements it covers. */
static uint64_t place_result(fst_box *b, uint64_t *random) {
    b->origin_row = b->row - rig_below(random, b->row + 1),
    b->origin_col = b->col - rig_below(random, b->col + 1);
    if (rig_below(random, 2)) b->origin_row = b->row, b->origin_col = b->col;
    const uint64_t rows = b->row + b->rows - b->origin_row, cols = b->col + b->cols - b->origin_col;
    if (rig_below(random, 3) == 0) b->dst_half = ceil_of(rows, 2) + rig_below(random, 3);
    const uint64_t high = b->dst_half ? 2 * b->dst_half : rows, step = 1 + rig_below(random, 8) / 6;
    const uint64_t gap = rig_below(random, 3) ? 0 : rig_below(random, 9);
    if (rig_below(random, 2)) b->dst_col = step, b->dst_row = cols * step + gap;
    else b->dst_row = step, b->dst_col = high * step + gap;
    return (high - 1) * b->dst_row + (cols - 1) * b->dst_col + 1;
}

static uint64_t place_of(const fst_box *b, uint64_t row, uint64_t col) {
    const uint64_t i = row - b->origin_row, at = b->dst_half ? i / 2 + i % 2 * b->dst_half : i;
    return at * b->dst_row + (col - b->origin_col) * b->dst_col;
}

static void fail_at(const test_rig *rig, const matrix *m, const fst_box *b, size_t byte, size_t begin) {
    static const char *const names[] = {"scaled", "bnb4", "packed", "cast"};
    test_fail(
        __FILE__, __LINE__,
        "%s: %s to %s, bits %u, layout %d, %llu x %llu: box of %llu x %llu at (%llu, %llu), steps %llu, %llu, half "
        "%llu: byte %td is %02X",
        rig->gpu.kernels->target, names[m->family], rig_dtype_name(m->target), bits_of(m), m->packed.layout,
        (unsigned long long)m->rows, (unsigned long long)m->cols, (unsigned long long)b->rows,
        (unsigned long long)b->cols, (unsigned long long)b->row, (unsigned long long)b->col,
        (unsigned long long)b->dst_row, (unsigned long long)b->dst_col, (unsigned long long)b->dst_half,
        (ptrdiff_t)byte - (ptrdiff_t)begin, rig->host[byte]);
}

static void check_box(test_rig *rig, const matrix *m, uint64_t *random) {
    static uint8_t canvas[CAPACITY];
    const size_t size = fst_type_bits(m->target) / 8;
    fst_box b = {.matrix_cols = m->cols};
    b.row = rig_below(random, m->rows), b.rows = 1 + rig_below(random, m->rows - b.row);
    b.col = rig_below(random, m->cols), b.cols = 1 + rig_below(random, m->cols - b.col);
    if (rig_below(random, 6) == 0) b.row = 0, b.rows = m->rows;
    if (rig_below(random, 6) == 0) b.col = 0, b.cols = m->cols;
    const uint64_t covered = place_result(&b, random);
    const size_t begin = RIG_GUARD + size * rig_below(random, 16 / size),
                 end = begin + covered * size + RIG_GUARD;
    CHECK(end <= sizeof canvas);
    memset(canvas, 0xA5, end);
    rig_upload(rig, rig->dst, canvas, end);
    for (uint64_t row = b.row; row < b.row + b.rows; row++)
        for (uint64_t col = b.col; col < b.col + b.cols; col++)
            memcpy(canvas + begin + place_of(&b, row, col) * size, &m->want[row * m->cols + col], size);
    const size_t skew = place_codes(rig, m, &b, random);
    if (m->scales.size)
        place_grid(rig, &m->scales, scales_need(m, &b), SCALES, &b.scales_first, &b.scales_pitch, random);
    if (m->zeros.size)
        place_grid(rig, &m->zeros, zeros_need(m, &b), ZEROS, &b.zeros_first, &b.zeros_pitch, random);
    CHECK_INT(0, launch(rig, m, rig->src + skew, rig->dst + begin, &b));
    allow(rig);
    rig_download(rig, end);
    for (size_t i = 0; memcmp(canvas, rig->host, end) != 0 && i < end; i++)
        if (canvas[i] != rig->host[i]) fail_at(rig, m, &b, i, begin);
}

static void check_family(family kind, int matrices) {
    test_rig rig;
    EACH_RIG(&rig, CAPACITY) {
        uint64_t random = 1000 + kind;
        for (int i = 0; i < matrices; i++) {
            matrix *m = make(kind, &random);
            run_whole(&rig, m);
            for (int k = 0; k < 6; k++) check_box(&rig, m, &random);
            free(m);
        }
    }
}

TEST(kernels_box, scaled) { check_family(SCALED, 500); }
TEST(kernels_box, bnb4) { check_family(BNB4, 150); }
TEST(kernels_box, packed) { check_family(PACKED, 800); }
TEST(kernels_box, cast) { check_family(CAST, 150); }

/* ---- What goes wrong ---- */

static uint16_t memory[1 << 14];
static uint32_t words[1 << 12];

/* Rows 2 to 7 and columns 3 to 40 of 8 x 64. */
static const fst_box good = {.row = 2,
                             .col = 3,
                             .rows = 6,
                             .cols = 38,
                             .src_row = 2,
                             .src_byte = 3,
                             .src_pitch = 64,
                             .origin_row = 2,
                             .origin_col = 3,
                             .dst_row = 38,
                             .dst_col = 1,
                             .matrix_cols = 64};

static const fst_scaled_args good_scaled = {.src = words,
                                            .dst = memory,
                                            .scales = words,
                                            .scales_count = 4,
                                            .rows = 8,
                                            .cols = 64,
                                            .src_dtype = FST_T_F8_E4M3,
                                            .dst_dtype = FST_T_BF16,
                                            .scale_dtype = FST_T_F32,
                                            .kind = FST_SCALE_BLOCK,
                                            .block_rows = 4,
                                            .block_cols = 32};

static int run_box(const fst_box *box) { return fst_kernels_cpu()->box_scaled(NULL, &good_scaled, box); }
static int run_args(const fst_scaled_args *args) { return fst_kernels_cpu()->box_scaled(NULL, args, &good); }

TEST(kernels_box, wrong_places_of_the_part) {
    fst_box b = good;
    CHECK_INT(0, run_box(&b));
    b.rows = 7;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.cols = 62;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.row = UINT64_MAX, b.rows = 2;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.origin_row = 3;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.origin_col = 4;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.rows = 0, b.src_pitch = 1;
    CHECK_INT(0, run_box(&b));
    b = good, b.cols = 0, b.dst_col = 0;
    CHECK_INT(0, run_box(&b));
}

TEST(kernels_box, wrong_places_of_the_codes) {
    fst_box b = good;
    b.src_byte = 4; /* it begins before them */
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.src_row = 3;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.src_row = 1, b.src_byte = 67; /* the same place */
    CHECK_INT(0, run_box(&b));
    b = good, b.src_pitch = 0, b.src_byte = 131;
    CHECK_INT(0, run_box(&b));
    b = good, b.src_pitch = 0, b.src_byte = 132;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.src_pitch = 37;
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    b = good, b.src_pitch = 38;
    CHECK_INT(0, run_box(&b));
    b = good, b.src_pitch = UINT64_MAX;
    CHECK_INT(FST_K_SIZE, run_box(&b));
}

TEST(kernels_box, wrong_steps_of_the_result) {
    fst_box b = good;
    b.dst_row = 37;
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    b = good, b.dst_row = 0;
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    b = good, b.dst_col = 0;
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    b = good, b.dst_row = 1, b.dst_col = 5;
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    b = good, b.dst_row = 1, b.dst_col = 6;
    CHECK_INT(0, run_box(&b));
    b = good, b.dst_half = 2; /* of six rows */
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    b = good, b.dst_half = 3;
    CHECK_INT(0, run_box(&b));
    b = good, b.dst_half = 4, b.dst_row = 1, b.dst_col = 6; /* rows 0 to 2 and 4 to 6 */
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    b = good, b.dst_half = UINT64_MAX;
    CHECK_INT(FST_K_SIZE, run_box(&b));
    b = good, b.dst_row = UINT64_MAX;
    CHECK_INT(FST_K_SIZE, run_box(&b));
}

TEST(kernels_box, wrong_places_of_scales) {
    fst_box b = good;
    b.scales_first = 1; /* the first that is needed is 0 */
    CHECK_INT(FST_K_SCALE, run_box(&b));
    b = good, b.row = 4, b.rows = 4, b.scales_first = 2, b.scales_pitch = 1;
    CHECK_INT(0, run_box(&b));
    b = good, b.scales_pitch = 1; /* two of each row are needed */
    CHECK_INT(FST_K_STRIDE, run_box(&b));
    fst_scaled_args a = good_scaled;
    a.src_dtype = FST_T_I8, a.zeros = words, b = good, b.zeros_first = 1;
    CHECK_INT(FST_K_SCALE, fst_kernels_cpu()->box_scaled(NULL, &a, &b));
}

TEST(kernels_box, wrong_arguments_of_scaled) {
    fst_scaled_args a = good_scaled;
    a.src_dtype = FST_T_F16;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good_scaled, a.dst_dtype = FST_T_F64;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good_scaled, a.flags = FST_K_OVER_127;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good_scaled, a.src_dtype = FST_T_I8, a.flags = FST_K_DIVIDE;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good_scaled, a.global_scale = words;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good_scaled, a.kind = 4;
    CHECK_INT(FST_K_NO_KERNEL, run_args(&a));
    a = good_scaled, a.rows = UINT64_MAX / 8;
    CHECK_INT(FST_K_SIZE, run_args(&a));
    a = good_scaled, a.scales_count = 3;
    CHECK_INT(FST_K_SCALE, run_args(&a));
    a = good_scaled, a.scale_dtype = FST_T_I8;
    CHECK_INT(FST_K_SCALE, run_args(&a));
    a = good_scaled, a.src = NULL;
    CHECK_INT(FST_K_NULL, run_args(&a));
    a = good_scaled, a.dst = (char *)memory + 1;
    CHECK_INT(FST_K_ALIGN, run_args(&a));
    a = good_scaled, a.scales = (char *)words + 2;
    CHECK_INT(FST_K_ALIGN, run_args(&a));
    a = good_scaled, a.src_dtype = FST_T_F4, a.cols = 41, a.block_cols = 41,
    a.scales_count = 2; /* half bytes */
    CHECK_INT(FST_K_STRIDE, run_args(&a));
}

TEST(kernels_box, wrong_arguments_of_bnb4) {
    const fst_bnb4_args right = {.src = words,
                                 .dst = memory,
                                 .map = words,
                                 .absmax = words,
                                 .dst_dtype = FST_T_BF16,
                                 .elements = 512,
                                 .block = 64};
    int (*const run)(fst_queue, const fst_bnb4_args *, const fst_box *) = fst_kernels_cpu()->box_bnb4;
    fst_box b = good;
    fst_bnb4_args a = right;
    b.src_byte = 1;
    CHECK_INT(0, run(NULL, &a, &b));
    a.elements = 511;
    CHECK_INT(FST_K_SIZE, run(NULL, &a, &b));
    a.elements = 448;
    CHECK_INT(FST_K_SIZE, run(NULL, &a, &b));
    a = right, a.dst_dtype = FST_T_F64;
    CHECK_INT(FST_K_NO_KERNEL, run(NULL, &a, &b));
    a = right, a.block = 0;
    CHECK_INT(FST_K_SCALE, run(NULL, &a, &b));
    a = right, a.absmax = NULL;
    CHECK_INT(FST_K_NULL, run(NULL, &a, &b));
    a = right, a.nested = words, a.nested_block = 256;
    CHECK_INT(FST_K_NULL, run(NULL, &a, &b));
    a = right, a.absmax = (char *)words + 1;
    CHECK_INT(FST_K_ALIGN, run(NULL, &a, &b));
    a = right, a.dst = (char *)memory + 1;
    CHECK_INT(FST_K_ALIGN, run(NULL, &a, &b));
    b.scales_first = 3; /* element 131 is under 2 */
    CHECK_INT(FST_K_SCALE, run(NULL, &right, &b));
    b.scales_first = 0, b.matrix_cols = 0;
    CHECK_INT(FST_K_SIZE, run(NULL, &right, &b));
}

TEST(kernels_box, wrong_arguments_of_packed) {
    const fst_packed_args right = {.src = words,
                                   .dst = memory,
                                   .scales = words,
                                   .zeros = words,
                                   .rows = 8,
                                   .cols = 64,
                                   .group = 32,
                                   .groups_count = 2,
                                   .bits = 3,
                                   .dst_dtype = FST_T_BF16,
                                   .scale_dtype = FST_T_F16,
                                   .layout = FST_PACKED_COLUMN,
                                   .zeros_kind = FST_ZEROS_ROWS};
    int (*const run)(fst_queue, const fst_packed_args *, const fst_box *) = fst_kernels_cpu()->box_packed;
    fst_box b = good;
    fst_packed_args a = right;
    b.src_row = 0, b.src_byte = 8, b.src_pitch = 24; /* six words of a row of eight */
    CHECK_INT(0, run(NULL, &a, &b));
    b.src_pitch = 23;
    CHECK_INT(FST_K_STRIDE, run(NULL, &a, &b));
    b.src_pitch = 24, b.src_byte = 10; /* column 3 is in the word's second byte */
    CHECK_INT(FST_K_SIZE, run(NULL, &a, &b));
    b.src_byte = 8, b.zeros_first = 1;
    CHECK_INT(FST_K_SCALE, run(NULL, &a, &b));
    b.zeros_first = 0, b.scales_first = 3; /* row 2 of group 0 is element 2 */
    CHECK_INT(FST_K_SCALE, run(NULL, &a, &b));
    b.scales_first = 2, b.scales_pitch = 5;
    CHECK_INT(FST_K_STRIDE, run(NULL, &a, &b));
    b.scales_pitch = 6;
    CHECK_INT(0, run(NULL, &a, &b));
    a.bits = 5;
    CHECK_INT(FST_K_NO_KERNEL, run(NULL, &a, &b));
    a.layout = FST_PACKED_ROW, a.bits = 0;
    CHECK_INT(FST_K_NO_KERNEL, run(NULL, &a, &b));
    a = right, a.layout = 4;
    CHECK_INT(FST_K_NO_KERNEL, run(NULL, &a, &b));
    a = right, a.cols = 65;
    CHECK_INT(FST_K_SIZE, run(NULL, &a, &b));
    a = right, a.groups_count = 1;
    CHECK_INT(FST_K_SCALE, run(NULL, &a, &b));
    a = right, a.zeros_kind = 5;
    CHECK_INT(FST_K_SCALE, run(NULL, &a, &b));
    a = right, a.zeros = NULL;
    CHECK_INT(FST_K_NULL, run(NULL, &a, &b));
    a = right, a.zeros = (char *)words + 2;
    CHECK_INT(FST_K_ALIGN, run(NULL, &a, &b));
}

TEST(kernels_box, wrong_arguments_of_cast) {
    const fst_cast_args right = {
        .src = words, .dst = memory, .src_dtype = FST_T_F6_E2M3, .dst_dtype = FST_T_BF16};
    int (*const run)(fst_queue, const fst_cast_args *, const fst_box *) = fst_kernels_cpu()->box_cast;
    fst_box b = good;
    fst_cast_args a = right;
    b.src_byte = 2;
    CHECK_INT(0, run(NULL, &a, &b));
    b.matrix_cols = 61; /* rows do not fill bytes */
    CHECK_INT(FST_K_STRIDE, run(NULL, &a, &b));
    b.src_pitch = 0;
    CHECK_INT(0, run(NULL, &a, &b));
    b.matrix_cols = 40;
    CHECK_INT(FST_K_SIZE, run(NULL, &a, &b));
    b = good, b.row = UINT64_MAX;
    CHECK_INT(FST_K_SIZE, run(NULL, &a, &b));
    b = good, b.src_byte = 2, a.src_dtype = FST_T_F8_E4M3;
    CHECK_INT(FST_K_NO_KERNEL, run(NULL, &a, &b));
    a = right, a.dst_dtype = FST_T_F64;
    CHECK_INT(FST_K_NO_KERNEL, run(NULL, &a, &b));
    a = right, a.dst = NULL;
    CHECK_INT(FST_K_NULL, run(NULL, &a, &b));
    a = right, a.dst = (char *)memory + 1;
    CHECK_INT(FST_K_ALIGN, run(NULL, &a, &b));
}
