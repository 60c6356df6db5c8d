/* What is measured: kernels x pairs x shapes, and how big each is for so many bytes of traffic. */
#include <stdio.h>
#include <string.h>

#include "bench.h"
#include "convert.h"
#include "fst.h"

enum { MODEL_COLS = 4096, RAGGED_COLS = 7100, BATCH_TENSOR = 4096 /* bytes */ };

static const int floats[] = {FST_F64,     FST_F32,     FST_F16,         FST_BF16,
                             FST_F8_E4M3, FST_F8_E5M2, FST_F8_E4M3FNUZ, FST_F8_E5M2FNUZ};
static const int narrow[] = {FST_F8_E8M0, FST_F6_E2M3, FST_F6_E3M2, FST_F4};
static const int wide[] = {FST_F32, FST_F16, FST_BF16};

typedef struct list {
    convert_spec *specs;
    size_t count;
} list;

const char *convert_kernel_name(convert_kernel kernel) {
    static const char *const names[CONVERT_KERNELS] = {"cast",
                                                       "scale_tensor",
                                                       "scale_row",
                                                       "scale_group",
                                                       "scale_block",
                                                       "quantize_tensor",
                                                       "quantize_row",
                                                       "quantize_block",
                                                       "realign",
                                                       "slice",
                                                       "pack",
                                                       "transpose",
                                                       "deinterleave",
                                                       "batch",
                                                       "dequant_bnb_nf4",
                                                       "dequant_bnb_int8",
                                                       "dequant_int8",
                                                       "dequant_fp8_block",
                                                       "dequant_fp8_column",
                                                       "dequant_mxfp4",
                                                       "dequant_nvfp4",
                                                       "dequant_gptq",
                                                       "dequant_awq",
                                                       "dequant_packed",
                                                       "dequant_int4_rows",
                                                       "dequant_int4_quark"};
    return names[kernel];
}

int convert_is_scale(convert_kernel kernel) {
    return (kernel >= CONVERT_SCALE_TENSOR && kernel <= CONVERT_SCALE_BLOCK) || kernel >= CONVERT_BNB_NF4;
}

int convert_is_quantize(convert_kernel kernel) {
    return kernel >= CONVERT_QUANTIZE_TENSOR && kernel <= CONVERT_QUANTIZE_BLOCK;
}

int convert_is_packed(convert_kernel kernel) { return kernel >= CONVERT_GPTQ; }

void convert_name(const convert_spec *spec, char *text, size_t size) {
    snprintf(text, size, "%s %s->%s%s%s", convert_kernel_name(spec->kernel),
             fst_dtype_name((fst_dtype)spec->src), fst_dtype_name((fst_dtype)spec->dst),
             *spec->variant ? " " : "", spec->variant);
}

static convert_spec *add(list *l, convert_kernel kernel, int src, int dst) {
    if (l->count == CONVERT_ROOM) bench_die("more cases than room");
    convert_spec *spec = &l->specs[l->count++];
    *spec = (convert_spec){.kernel = kernel, .src = src, .dst = dst, .row = MODEL_COLS};
    return spec;
}

static void add_casts(list *l) {
    static const struct {
        int src, dst;
        unsigned misaligned;
    } shifted[] = {{FST_BF16, FST_F16, 1}, {FST_F8_E4M3, FST_BF16, 1}, {FST_F32, FST_BF16, 2}};
    static const int fp8[][2] = {{FST_F32, FST_F8_E4M3}, {FST_BF16, FST_F8_E4M3}, {FST_BF16, FST_F8_E5M2}};
    static const int fnuz[][2] = {{FST_F8_E4M3, FST_F8_E4M3FNUZ}, {FST_F8_E5M2, FST_F8_E5M2FNUZ}};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        for (size_t j = 0; j < sizeof floats / sizeof *floats; j++)
            if (i != j) add(l, CONVERT_CAST, floats[i], floats[j]);
    for (size_t i = 0; i < sizeof narrow / sizeof *narrow; i++)
        for (size_t j = 0; j < sizeof wide / sizeof *wide; j++) add(l, CONVERT_CAST, narrow[i], wide[j]);
    for (size_t i = 0; i < sizeof shifted / sizeof *shifted; i++) {
        convert_spec *spec = add(l, CONVERT_CAST, shifted[i].src, shifted[i].dst);
        spec->misaligned = shifted[i].misaligned;
        snprintf(spec->variant, sizeof spec->variant, "from byte %u", spec->misaligned);
    }
    for (size_t i = 0; i < sizeof fp8 / sizeof *fp8; i++) {
        convert_spec *spec = add(l, CONVERT_CAST, fp8[i][0], fp8[i][1]);
        spec->flags = FST_K_NON_SATURATING;
        snprintf(spec->variant, sizeof spec->variant, "non-saturating");
    }
    for (size_t i = 0; i < sizeof fnuz / sizeof *fnuz; i++) {
        convert_spec *spec = add(l, CONVERT_CAST, fnuz[i][0], fnuz[i][1]);
        spec->keep_bits = 1;
        snprintf(spec->variant, sizeof spec->variant, "bits kept");
    }
}

static convert_spec *add_scaled(list *l, convert_kernel kernel, int src, int dst, int scale, unsigned group) {
    convert_spec *spec = add(l, kernel, src, dst);
    spec->scale = scale;
    spec->group = group;
    int length = snprintf(spec->variant, sizeof spec->variant, "x %s", fst_dtype_name((fst_dtype)scale));
    if (group) snprintf(spec->variant + length, sizeof spec->variant - (size_t)length, " by %u", group);
    return spec;
}

static void add_scales(list *l) {
    static const int codes[] = {FST_F8_E5M2, FST_F8_E4M3FNUZ, FST_F8_E5M2FNUZ, FST_I8};
    static const convert_kernel kinds[] = {CONVERT_SCALE_TENSOR, CONVERT_SCALE_ROW, CONVERT_SCALE_BLOCK};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
            add_scaled(l, kinds[k], FST_F8_E4M3, wide[i], FST_F32, 0);
        for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
            add_scaled(l, kinds[k], codes[i], FST_BF16, FST_F32, 0);
    }
    add_scaled(l, CONVERT_SCALE_TENSOR, FST_F4, FST_BF16, FST_F32, 0);
    add_scaled(l, CONVERT_SCALE_ROW, FST_F8_E4M3, FST_BF16, FST_BF16, 0);
    add_scaled(l, CONVERT_SCALE_ROW, FST_I8, FST_F16, FST_F16, 0);
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        add_scaled(l, CONVERT_SCALE_GROUP, FST_F4, wide[i], FST_F8_E8M0, 32);
    add_scaled(l, CONVERT_SCALE_GROUP, FST_F8_E4M3, FST_BF16, FST_F8_E8M0, 32);
    add_scaled(l, CONVERT_SCALE_GROUP, FST_F8_E5M2, FST_BF16, FST_F8_E8M0, 32);
    add_scaled(l, CONVERT_SCALE_GROUP, FST_F8_E4M3, FST_BF16, FST_F32, 128);
    add_scaled(l, CONVERT_SCALE_GROUP, FST_I8, FST_BF16, FST_BF16, 128);
    add_scaled(l, CONVERT_SCALE_GROUP, FST_F4, FST_BF16, FST_F16, 16);
    add_scaled(l, CONVERT_SCALE_BLOCK, FST_F8_E4M3, FST_BF16, FST_BF16, 0);
    add_scaled(l, CONVERT_SCALE_BLOCK, FST_F8_E4M3, FST_BF16, FST_F8_E8M0, 0);
    convert_spec *spec = add(l, CONVERT_SCALE_BLOCK, FST_F8_E4M3, FST_BF16);
    spec->scale = FST_F32;
    spec->row = RAGGED_COLS;
    snprintf(spec->variant, sizeof spec->variant, "x F32, %u columns", RAGGED_COLS);
}

static void add_integers(list *l) {
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        add_scaled(l, CONVERT_BNB_NF4, FST_F4, wide[i], FST_F32, 64);
    add_scaled(l, CONVERT_BNB_INT8, FST_I8, FST_BF16, FST_F32, 0);
    add_scaled(l, CONVERT_BNB_INT8, FST_I8, FST_F16, FST_F32, 0);
    add_scaled(l, CONVERT_INT8_ZEROS, FST_I8, FST_BF16, FST_BF16, 0);
}

/* In the shapes of models: DeepSeek's 7168 columns, gpt-oss's 2880, Llama's 14336. */
static void add_formats(list *l) {
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        add_scaled(l, CONVERT_FP8_BLOCK, FST_F8_E4M3, wide[i], FST_F32, 0)->row = 7168;
        add_scaled(l, CONVERT_FP8_COLUMN, FST_F8_E4M3, wide[i], FST_F32, 0);
        add_scaled(l, CONVERT_MXFP4, FST_F4, wide[i], FST_F8_E8M0, 32)->row = 2880;
        add_scaled(l, CONVERT_NVFP4, FST_F4, wide[i], FST_F8_E4M3, 16)->row = 7168;
        convert_spec *nested = add_scaled(l, CONVERT_BNB_NF4, FST_F4, wide[i], FST_U8, 64);
        nested->nested = 1;
        strcat(nested->variant, ", nested");
    }
    convert_spec *divided = add_scaled(l, CONVERT_NVFP4, FST_F4, FST_BF16, FST_F8_E4M3, 16);
    divided->row = 7168;
    divided->flags = FST_K_DIVIDE;
    strcat(divided->variant, ", divided");
}

static void add_packed(list *l) {
    static const struct {
        convert_kernel kernel;
        unsigned bits, group;
        int src, dst, scale, zeros, padded, act_order;
    } cases[] = {
        {CONVERT_GPTQ, 4, 128, FST_I32, FST_BF16, FST_F16, 1, 0, 0},
        {CONVERT_GPTQ, 4, 128, FST_I32, FST_F16, FST_F16, 1, 0, 0},
        {CONVERT_GPTQ, 4, 128, FST_I32, FST_F32, FST_F16, 1, 0, 0},
        {CONVERT_GPTQ, 4, 128, FST_I32, FST_BF16, FST_F16, 1, 0, 1},
        {CONVERT_GPTQ, 2, 128, FST_I32, FST_BF16, FST_F16, 1, 0, 0},
        {CONVERT_GPTQ, 3, 128, FST_I32, FST_BF16, FST_F16, 1, 0, 0},
        {CONVERT_GPTQ, 8, 128, FST_I32, FST_BF16, FST_F16, 1, 0, 0},
        {CONVERT_AWQ, 4, 128, FST_I32, FST_BF16, FST_F16, 1, 0, 0},
        {CONVERT_AWQ, 4, 128, FST_I32, FST_F16, FST_F16, 1, 0, 0},
        {CONVERT_AWQ, 4, 128, FST_I32, FST_F32, FST_F16, 1, 0, 0},
        {CONVERT_PACKED, 4, 32, FST_I32, FST_BF16, FST_BF16, 0, 0, 0},
        {CONVERT_PACKED, 4, 128, FST_I32, FST_BF16, FST_BF16, 0, 0, 0},
        {CONVERT_PACKED, 4, 128, FST_I32, FST_F16, FST_BF16, 0, 0, 0},
        {CONVERT_PACKED, 4, 128, FST_I32, FST_F32, FST_BF16, 0, 0, 0},
        {CONVERT_PACKED, 4, 32, FST_I32, FST_BF16, FST_BF16, 1, 0, 0},
        {CONVERT_PACKED, 4, 128, FST_I32, FST_BF16, FST_BF16, 1, 0, 0},
        {CONVERT_PACKED, 4, 128, FST_I32, FST_BF16, FST_BF16, 0, 0, 1},
        {CONVERT_PACKED, 2, 128, FST_I32, FST_BF16, FST_BF16, 0, 0, 0},
        {CONVERT_PACKED, 3, 128, FST_I32, FST_BF16, FST_BF16, 0, 0, 0},
        {CONVERT_PACKED, 3, 128, FST_I32, FST_BF16, FST_BF16, 1, 1, 0},
        {CONVERT_PACKED, 8, 128, FST_I32, FST_BF16, FST_BF16, 0, 0, 0},
        {CONVERT_INT4_ROWS, 4, 128, FST_U8, FST_BF16, FST_BF16, 0, 0, 0},
        {CONVERT_INT4_QUARK, 4, 128, FST_I32, FST_BF16, FST_BF16, 0, 0, 0},
        {CONVERT_INT4_QUARK, 4, 128, FST_I32, FST_BF16, FST_BF16, 1, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        convert_spec *spec = add(l, cases[i].kernel, cases[i].src, cases[i].dst);
        spec->bits = cases[i].bits, spec->group = cases[i].group, spec->scale = cases[i].scale;
        spec->zeros = cases[i].zeros, spec->padded = cases[i].padded, spec->act_order = cases[i].act_order;
        spec->row = 14336;
        const int zeros_vary = spec->kernel == CONVERT_PACKED || spec->kernel == CONVERT_INT4_QUARK;
        snprintf(spec->variant, sizeof spec->variant, "%u bits x %s by %u%s%s%s", spec->bits,
                 fst_dtype_name((fst_dtype)spec->scale), (unsigned)spec->group,
                 zeros_vary && spec->zeros ? ", zeros" : "", spec->padded ? ", padded" : "",
                 spec->act_order ? ", act-order" : "");
    }
}

static void add_quantize(list *l) {
    static const int codes[] = {FST_F8_E4M3, FST_F8_E4M3FNUZ, FST_F8_E5M2};
    static const convert_kernel kinds[] = {CONVERT_QUANTIZE_TENSOR, CONVERT_QUANTIZE_ROW,
                                           CONVERT_QUANTIZE_BLOCK};
    /* By source: cases that share their data side by side. */
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
            for (size_t j = 0; j < sizeof codes / sizeof *codes; j++)
                add(l, kinds[k], wide[i], codes[j])->scale = FST_F32;
    convert_spec *spec = add(l, CONVERT_QUANTIZE_BLOCK, FST_BF16, FST_F8_E4M3);
    spec->scale = FST_F32;
    spec->row = RAGGED_COLS;
    snprintf(spec->variant, sizeof spec->variant, "%u columns", RAGGED_COLS);
}

static void add_realign(list *l) {
    static const struct {
        int type;
        unsigned misaligned;
    } shifts[] = {{FST_U8, 1},  {FST_U8, 7},  {FST_BF16, 1}, {FST_F16, 15}, {FST_F32, 1},
                  {FST_F32, 2}, {FST_F32, 4}, {FST_F64, 1},  {FST_I64, 4}};
    for (size_t i = 0; i < sizeof shifts / sizeof *shifts; i++) {
        convert_spec *spec = add(l, CONVERT_REALIGN, shifts[i].type, shifts[i].type);
        spec->misaligned = shifts[i].misaligned;
        snprintf(spec->variant, sizeof spec->variant, "from byte %u", spec->misaligned);
    }
}

/* Rows of `bytes` of the source, taken from (or put into) rows that are `stride` elements apart. */
static void add_row(list *l, convert_kernel kernel, int src, int dst, uint64_t bytes, uint64_t stride) {
    convert_spec *spec = add(l, kernel, src, dst);
    spec->row = bytes * 8 / fst_dtype_bits((fst_dtype)src);
    spec->wide = stride ? stride : 4 * spec->row;
    snprintf(spec->variant, sizeof spec->variant, "rows of %u B%s", (unsigned)bytes,
             stride % 8 ? ", odd stride" : "");
}

static void add_rows(list *l) {
    static const convert_kernel kinds[] = {CONVERT_SLICE, CONVERT_PACK, CONVERT_DEINTERLEAVE};
    static const int casts[][2] = {
        {FST_BF16, FST_F16}, {FST_F8_E4M3, FST_BF16}, {FST_F32, FST_BF16}, {FST_BF16, FST_F8_E4M3}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        add_row(l, kinds[k], FST_BF16, FST_BF16, 8192, 2 * 8192 / 2);
        add_row(l, kinds[k], FST_BF16, FST_BF16, 512, 0);
        add_row(l, kinds[k], FST_BF16, FST_BF16, 64, 0);
        add_row(l, kinds[k], FST_F8_E4M3, FST_F8_E4M3, 512, 0);
        add_row(l, kinds[k], FST_F32, FST_F32, 512, 0);
        for (size_t i = 0; i < sizeof casts / sizeof *casts; i++)
            add_row(l, kinds[k], casts[i][0], casts[i][1], 512, 0);
        add_row(l, kinds[k], FST_BF16, FST_F16, 64, 0);
    }
    add_row(l, CONVERT_SLICE, FST_BF16, FST_BF16, 512, 1031);
    add_row(l, CONVERT_PACK, FST_BF16, FST_BF16, 512, 1031);
}

static void add_transpose(list *l) {
    static const int pairs[][2] = {{FST_BF16, FST_BF16},    {FST_F8_E4M3, FST_F8_E4M3}, {FST_F32, FST_F32},
                                   {FST_F64, FST_F64},      {FST_BF16, FST_F16},        {FST_F32, FST_BF16},
                                   {FST_F8_E4M3, FST_BF16}, {FST_BF16, FST_F8_E4M3}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        add(l, CONVERT_TRANSPOSE, pairs[i][0], pairs[i][1]);
    convert_spec *spec = add(l, CONVERT_TRANSPOSE, FST_BF16, FST_BF16);
    spec->row = 4099;
    snprintf(spec->variant, sizeof spec->variant, "4099 columns");
}

static void add_batch(list *l) {
    static const int pairs[][2] = {
        {FST_BF16, FST_BF16}, {FST_BF16, FST_F16}, {FST_F32, FST_BF16}, {FST_F8_E4M3, FST_BF16}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        convert_spec *spec = add(l, CONVERT_BATCH, pairs[i][0], pairs[i][1]);
        spec->row = BATCH_TENSOR * 8 / fst_dtype_bits((fst_dtype)pairs[i][0]);
        snprintf(spec->variant, sizeof spec->variant, "tensors of %u B", BATCH_TENSOR);
    }
}

size_t convert_list(convert_spec specs[CONVERT_ROOM]) {
    list l = {specs, 0};
    add_casts(&l);
    add_scales(&l);
    add_integers(&l);
    add_formats(&l);
    add_packed(&l);
    add_realign(&l);
    add_rows(&l);
    add_transpose(&l);
    add_batch(&l);
    add_quantize(&l); /* last: they alone need other data */
    return l.count;
}

/* ---- Sizes ---- */

static uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

static uint64_t count_scales(const convert_case *c) {
    switch (c->spec.kernel) {
    case CONVERT_SCALE_TENSOR:
    case CONVERT_QUANTIZE_TENSOR: return 1;
    case CONVERT_SCALE_ROW:
    case CONVERT_BNB_INT8:
    case CONVERT_INT8_ZEROS:
    case CONVERT_QUANTIZE_ROW: return c->rows;
    case CONVERT_BNB_NF4:
    case CONVERT_MXFP4:
    case CONVERT_NVFP4:
    case CONVERT_GPTQ:
    case CONVERT_AWQ:
    case CONVERT_PACKED:
    case CONVERT_INT4_ROWS:
    case CONVERT_INT4_QUARK:
    case CONVERT_SCALE_GROUP: return c->rows * ceil_div(c->cols, c->spec.group);
    case CONVERT_FP8_COLUMN: return c->cols;
    case CONVERT_FP8_BLOCK:
    case CONVERT_SCALE_BLOCK:
    case CONVERT_QUANTIZE_BLOCK: return ceil_div(c->rows, CONVERT_BLOCK) * ceil_div(c->cols, CONVERT_BLOCK);
    default: return 0;
    }
}

/* Rows and columns of the result for about `elements` of them. */
static void choose_shape(convert_case *c, uint64_t elements) {
    const uint64_t row = c->spec.row;
    switch (c->spec.kernel) {
    case CONVERT_CAST:
    case CONVERT_REALIGN:
        c->rows = 1;
        c->cols = elements < 64 ? 64 : elements / 64 * 64;
        break;
    case CONVERT_DEINTERLEAVE:
        c->rows = elements / row < 2 ? 2 : elements / row / 2 * 2;
        c->cols = row;
        break;
    case CONVERT_TRANSPOSE:
        c->rows = row;
        c->cols = elements < row ? 1 : elements / row;
        /* Weights have sides that are multiples of 128: rows of the result begin aligned. 4,099 columns do not. */
        if (row % 128 == 0 && c->cols > 128) c->cols = c->cols / 128 * 128;
        break;
    case CONVERT_GPTQ: /* zero points fill words */
    case CONVERT_AWQ:
    case CONVERT_PACKED:
    case CONVERT_INT4_ROWS:
    case CONVERT_INT4_QUARK:
        c->rows = elements / row < 32 ? 32 : elements / row / 32 * 32;
        c->cols = row;
        break;
    default: c->rows = elements < row ? 1 : elements / row; c->cols = row;
    }
}

/* What is behind the scales, and how much. Returns the bytes of all that are read, gaps not counted. */
static uint64_t place_companions(convert_case *c) {
    const convert_spec *spec = &c->spec;
    const uint64_t scales = spec->scale ? c->scales * fst_dtype_bits((fst_dtype)spec->scale) / 8 : 0;
    uint64_t second = 0, third = 0;
    if (spec->kernel == CONVERT_INT8_ZEROS) second = c->scales;
    if (spec->zeros) second = convert_packed_zeros_size(c);
    if (spec->act_order) third = c->cols * 4;
    if (spec->nested) {
        second = ceil_div(c->scales, CONVERT_NESTED) * 4;
        third = 256 * 4;
    }
    c->second_at = ceil_div(scales, 16) * 16;
    c->third_at = c->second_at + ceil_div(second, 16) * 16;
    c->companions = c->third_at + third;
    return scales + second + third;
}

convert_case convert_size(const convert_spec *spec, uint64_t bytes) {
    convert_case c = {.spec = *spec, .bytes = bytes};
    const uint64_t src_bits = spec->bits ? spec->bits : fst_dtype_bits((fst_dtype)spec->src);
    const uint64_t dst_bits = fst_dtype_bits((fst_dtype)spec->dst);
    /* Over the source: for amax, and for the codes. */
    const uint64_t passes = spec->kernel == CONVERT_QUANTIZE_TENSOR ? 2 : 1;
    choose_shape(&c, bytes * 8 / (src_bits * passes + dst_bits));
    c.src_stride = spec->kernel == CONVERT_TRANSPOSE ? c.rows : c.cols;
    if (spec->kernel == CONVERT_SLICE) c.src_stride = spec->wide;
    c.dst_stride = spec->kernel == CONVERT_PACK ? spec->wide : c.cols;
    const uint64_t src_rows = spec->kernel == CONVERT_TRANSPOSE ? c.cols : c.rows;
    const uint64_t src_cols = spec->kernel == CONVERT_TRANSPOSE ? c.rows : c.cols;
    c.src_size = (((src_rows - 1) * c.src_stride + src_cols) * src_bits + 7) / 8;
    c.dst_size = ((c.rows - 1) * c.dst_stride + c.cols) * dst_bits / 8;
    if (convert_is_packed(spec->kernel)) c.src_size = convert_packed_size(&c);
    c.scales = count_scales(&c);
    c.jobs = spec->kernel == CONVERT_BATCH ? c.rows : 0;
    const uint64_t scale_bytes = place_companions(&c);
    const uint64_t codes =
        convert_is_packed(spec->kernel) ? c.src_size : (c.rows * c.cols * src_bits + 7) / 8;
    c.bytes_read = codes * passes + (convert_is_scale(spec->kernel) ? scale_bytes : 0);
    c.bytes_written = c.rows * c.cols * dst_bits / 8 + (convert_is_quantize(spec->kernel) ? scale_bytes : 0);
    return c;
}

uint64_t convert_source_index(const convert_case *c, uint64_t row, uint64_t col) {
    const uint64_t half = c->rows / 2;
    switch (c->spec.kernel) {
    case CONVERT_DEINTERLEAVE: return (row % half * 2 + row / half) * c->cols + col;
    case CONVERT_TRANSPOSE: return col * c->src_stride + row;
    default: return row * c->src_stride + col;
    }
}
