#include "scheme.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yyjson.h>

#include "model.h"
#include "status.h"

static const char *const format_names[] = {"",
#define X(name, text, ...) text,
                                           FST_FORMAT_LIST(X)
#undef X
};

const char *fst_format_name(fst_format format) {
    return (unsigned)format < FST_FORMAT_COUNT ? format_names[format] : "";
}

int fst_scheme_is_packed(const fst_quantized *w) {
    switch (w->format) {
    case FST_FORMAT_PACKED:
    case FST_FORMAT_GPTQ:
    case FST_FORMAT_AWQ:
    case FST_FORMAT_AWQ_GEMV:
    case FST_FORMAT_INT4_ROWS:
    case FST_FORMAT_INT4_QUARK: return 1;
    default: return 0;
    }
}

/* ---- Configuration ------------------------------------------------------------------------------- */

typedef struct config {
    const char *path; /* of the file that it is from; NULL: there is none */
    char method[48];
    uint64_t block[2]; /* rows, columns; 0: not said */
    unsigned bits;     /* 0: not said, or not the same everywhere */
    uint64_t group;    /* columns; 0: not said, or all of them, or not the same everywhere */
    int inverse, gptqmodel, gptq_v2, in_order;
} config;

static const struct {
    const char *method, *why;
} refused_methods[] = {
    {"torchao", "its tensors are described in their files' metadata"},
    {"hqq", "its parameters are in a dictionary of its own"},
    {"aqlm", "codebooks"},
    {"vptq", "codebooks"},
    {"quip", "codebooks"},
    {"spqr", "codebooks and outliers"},
    {"exl2", "ExLlamaV2's own packing"},
    {"exl3", "ExLlamaV3's own packing"},
    {"eetq", "its weights are arranged for one GPU"},
    {"qqq", "two levels of scales"},
    {"bitnet", "ternary weights"},
    {"higgs", "rotated weights"},
    {"fp_quant", "rotated weights"},
    {"marlin", "its weights are arranged for one kernel"},
    {"bitblas", "its weights are arranged for one kernel"},
};

static fst_status refuse(fst_error *error, const char *path, const char *what, const char *why) {
    fst_where where = {path, -1, -1};
    return fst_fail(error, FST_E_UNSUPPORTED, 0, &where,
                    "%s is not dequantized (%s); load it as stored, without a cast", what, why);
}

static const char *text_of(yyjson_val *object, const char *key) {
    const char *text = yyjson_get_str(yyjson_obj_get(object, key));
    return text ? text : "";
}

static int is_one_of(const char *text, const char *const *words) {
    for (; *words; words++)
        if (strcmp(text, *words) == 0) return 1;
    return 0;
}

/* compressed-tensors: what its groups of layers say. */
static fst_status read_groups(yyjson_val *quantization, config *c, fst_error *error) {
    static const char *const arranged[] = {"sparse-bitmask", "sparse-24-bitmask", "marlin-24", NULL};
    yyjson_val *groups = yyjson_obj_get(quantization, "config_groups"), *key, *group;
    yyjson_val *transforms = yyjson_obj_get(quantization, "transform_config");
    const char *format = text_of(quantization, "format");
    yyjson_obj_iter each;
    int differ = 0;
    if (is_one_of(format, arranged)) return refuse(error, c->path, format, "a sparse or rearranged layout");
    if (yyjson_is_obj(transforms) && yyjson_obj_size(yyjson_obj_get(transforms, "config_groups")))
        return refuse(error, c->path, "transform_config", "the weights are rotated");
    yyjson_obj_iter_init(groups, &each);
    while ((key = yyjson_obj_iter_next(&each))) {
        group = yyjson_obj_iter_get_val(key);
        yyjson_val *weights = yyjson_obj_get(group, "weights"),
                   *block = yyjson_obj_get(weights, "block_structure");
        unsigned bits = (unsigned)yyjson_get_uint(yyjson_obj_get(weights, "num_bits"));
        format = text_of(group, "format");
        if (is_one_of(format, arranged))
            return refuse(error, c->path, format, "a sparse or rearranged layout");
        if (yyjson_arr_size(block) == 2)
            for (size_t i = 0; i < 2; i++) c->block[i] = yyjson_get_uint(yyjson_arr_get(block, i));
        differ |= c->bits && bits && bits != c->bits;
        if (bits) c->bits = bits;
    }
    if (differ) c->bits = 0;
    return FST_OK;
}

static fst_status read_gptq(yyjson_val *quantization, config *c, fst_error *error) {
    const char *format = text_of(quantization, "checkpoint_format");
    static const char *const known[] = {"", "gptq", "gptq_v2", NULL};
    yyjson_val *quantizer = yyjson_obj_get(yyjson_obj_get(quantization, "meta"), "quantizer");
    if (yyjson_is_arr(quantizer)) quantizer = yyjson_arr_get_first(quantizer);
    if (!is_one_of(format, known)) return refuse(error, c->path, format, "a GPTQ layout of its own");
    c->gptq_v2 = strcmp(format, "gptq_v2") == 0;
    c->gptqmodel = yyjson_is_str(quantizer) && strncmp(yyjson_get_str(quantizer), "gptqmodel", 9) == 0;
    return FST_OK;
}

static int is_known_method(const char *method) {
    static const char *const known[] = {"",
                                        "fp8",
                                        "compressed-tensors",
                                        "compressed_tensors",
                                        "modelopt",
                                        "modelopt_fp4",
                                        "modelopt_mixed",
                                        "mxfp4",
                                        "mxfp8",
                                        "nvfp4",
                                        "gptq",
                                        "awq",
                                        "auto-round",
                                        "auto_round",
                                        "bitsandbytes",
                                        "quark",
                                        "fbgemm_fp8",
                                        NULL};
    return is_one_of(method, known);
}

static fst_status read_quantization(yyjson_val *quantization, config *c, fst_error *error) {
    yyjson_val *block = yyjson_obj_get(quantization, "weight_block_size"), *bits;
    const char *method = text_of(quantization, "quant_method");
    snprintf(c->method, sizeof c->method, "%s", method);
    for (size_t i = 0; i < sizeof refused_methods / sizeof *refused_methods; i++)
        if (strcmp(method, refused_methods[i].method) == 0)
            return refuse(error, c->path, method, refused_methods[i].why);
    if (strcmp(text_of(quantization, "quant_algo"), "NVFP4_SVD") == 0)
        return refuse(error, c->path, "NVFP4_SVD", "a part of the weights is in factors beside them");
    if (!is_known_method(method)) {
        fst_where where = {c->path, -1, -1};
        return fst_fail(error, FST_E_UNSUPPORTED, 0, &where,
                        "\"%s\" is no quant_method that is known here; load it as stored, without a cast",
                        method);
    }
    if (yyjson_arr_size(block) == 2)
        for (size_t i = 0; i < 2; i++) c->block[i] = yyjson_get_uint(yyjson_arr_get(block, i));
    bits = yyjson_obj_get(quantization, "bits");
    if (!bits) bits = yyjson_obj_get(quantization, "w_bit");
    c->bits = (unsigned)yyjson_get_uint(bits);
    bits = yyjson_obj_get(quantization, "group_size");
    if (!bits) bits = yyjson_obj_get(quantization, "q_group_size");
    c->group = yyjson_get_uint(bits); /* 0 when it is -1 */
    if (yyjson_obj_size(yyjson_obj_get(quantization, "dynamic"))) c->bits = 0, c->group = 0;
    c->in_order = strcmp(text_of(yyjson_obj_get(quantization, "export"), "pack_method"), "order") == 0;
    c->inverse = strcmp(text_of(quantization, "weight_scale_semantics"), "inverse") == 0;
    if (strcmp(method, "awq") == 0 && strcmp(text_of(quantization, "version"), "gemv_fast") == 0)
        return refuse(error, c->path, "AWQ's GEMV_FAST", "interleaved words and scaled zero points");
    fst_status status = read_groups(quantization, c, error);
    if (!status && (strcmp(method, "gptq") == 0 || strcmp(method, "auto-round") == 0 || !*method))
        status = read_gptq(quantization, c, error);
    return status;
}

/* The object of a file that speaks of quantization; NULL: none. */
static yyjson_val *quantization_in(yyjson_val *root, int which) {
    yyjson_val *found = NULL;
    if (which == FST_CONFIG_GPTQ) return root;
    if (which == FST_CONFIG_MODELOPT) return yyjson_obj_get(root, "quantization");
    found = yyjson_obj_get(root, "quantization_config");
    if (!found) found = yyjson_obj_get(root, "compression_config");
    if (!found) /* models of several parts have it in the text model's */
        found = yyjson_obj_get(yyjson_obj_get(root, "text_config"), "quantization_config");
    return found;
}

static fst_status read_config(const fst_config_text *from, int which, config *c, fst_error *error) {
    yyjson_read_err wrong = {0};
    if (!from->text || c->path) return FST_OK;
    yyjson_doc *doc =
        yyjson_read_opts((char *)from->text, from->length, YYJSON_READ_ALLOW_INF_AND_NAN, NULL, &wrong);
    if (!doc) {
        fst_where where = {from->path, -1, (int64_t)wrong.pos};
        return wrong.code == YYJSON_READ_ERROR_MEMORY_ALLOCATION
                   ? fst_fail(error, FST_E_MEMORY, 0, &where, "out of memory")
                   : fst_fail(error, FST_E_JSON, 0, &where, "not JSON: %s", wrong.msg);
    }
    yyjson_val *quantization = quantization_in(yyjson_doc_get_root(doc), which);
    fst_status status = FST_OK;
    if (yyjson_is_obj(quantization)) {
        c->path = from->path;
        status = read_quantization(quantization, c, error);
        if (which == FST_CONFIG_GPTQ && !*c->method && c->bits) strcpy(c->method, "gptq");
        if (which == FST_CONFIG_MODELOPT && !*c->method) strcpy(c->method, "modelopt");
    }
    yyjson_doc_free(doc);
    return status;
}

/* ---- Finding --------------------------------------------------------------------------------------- */

typedef struct finder {
    const fst_model *model;
    config config;
    fst_scheme *out;
    fst_error *error;
    size_t room;
    char *buffer; /* for names */
    size_t buffer_room;
} finder;

static const fst_entry *entry_of(const finder *f, uint32_t tensor) { return f->model->tensors[tensor].entry; }

static fst_status no_memory(finder *f) { return fst_fail(f->error, FST_E_MEMORY, 0, NULL, "out of memory"); }

__attribute__((format(printf, 4, 5))) static fst_status wrong(finder *f, fst_status status, uint32_t tensor,
                                                              const char *format, ...) {
    const fst_model_tensor *t = &f->model->tensors[tensor];
    fst_where where = {f->model->paths.files[t->file], (int)t->file,
                       (int64_t)(f->model->headers[t->file].data_start + t->entry->begin)};
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return fst_fail(f->error, status, 0, &where, "tensor \"%s\": %s", t->entry->name, text);
}

/* The tensor that is named like the first `length` bytes of `prefix`, and then `suffix`. */
static uint32_t find(finder *f, const char *prefix, size_t length, const char *suffix) {
    size_t all = length + strlen(suffix);
    if (all >= f->buffer_room) return FST_NO_TENSOR; /* longer than any name */
    memcpy(f->buffer, prefix, length);
    strcpy(f->buffer + length, suffix);
    uint64_t hash = fst_model_hash(f->model, f->buffer, all);
    uint32_t found = f->model->names[fst_model_slot(f->model, hash, f->buffer, all)].index;
    return found ? found - 1 : FST_NO_TENSOR;
}

/* Whether a name ends in this; *length is then what comes before. */
static int ends_in(const fst_entry *entry, const char *suffix, size_t *length) {
    size_t size = strlen(suffix);
    if (entry->name_length < size || memcmp(entry->name + entry->name_length - size, suffix, size)) return 0;
    *length = entry->name_length - size;
    return 1;
}

/* ---- Shapes ---------------------------------------------------------------------------------------- */

static uint64_t elements_of(const fst_entry *entry) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < entry->ndim; i++) count *= entry->shape[i]; /* the header checked that it fits */
    return count;
}

static int is_fp8(fst_dtype dtype) {
    return dtype == FST_F8_E4M3 || dtype == FST_F8_E5M2 || dtype == FST_F8_E4M3FNUZ ||
           dtype == FST_F8_E5M2FNUZ;
}
static int is_e8m0(fst_dtype dtype) { return dtype == FST_F8_E8M0 || dtype == FST_U8; }
static int is_scale(fst_dtype dtype) { return dtype == FST_F32 || dtype == FST_BF16 || dtype == FST_F16; }

static uint64_t blocks(uint64_t size, uint64_t block) { return size / block + (size % block != 0); }

/* Whether an entry's shape is [stack..., dims...], `count` of these; the stack's extents are those of `of`, that has
 * `of_dims` dimensions behind them. */
static int has_shape(const fst_entry *entry, const fst_entry *of, uint32_t of_dims, const uint64_t *dims,
                     uint32_t count) {
    uint32_t lead = of->ndim - of_dims;
    if (entry->ndim != lead + count) return 0;
    for (uint32_t i = 0; i < lead; i++)
        if (entry->shape[i] != of->shape[i]) return 0;
    for (uint32_t i = 0; i < count; i++)
        if (entry->shape[lead + i] != dims[i]) return 0;
    return 1;
}

static void print_shape(char *out, size_t size, const fst_entry *entry) {
    size_t used = (size_t)snprintf(out, size, "%s [", fst_dtype_name(entry->dtype));
    for (uint32_t i = 0; i < entry->ndim && used < size; i++)
        used += (size_t)snprintf(out + used, size - used, "%s%llu", i ? ", " : "",
                                 (unsigned long long)entry->shape[i]);
    if (used < size) snprintf(out + used, size - used, "]");
}

/* A companion whose dtype or shape is none that the format has. */
static fst_status misfit(finder *f, uint32_t codes, uint32_t companion, const char *wanted) {
    char shape[2][120];
    print_shape(shape[0], sizeof shape[0], entry_of(f, codes));
    print_shape(shape[1], sizeof shape[1], entry_of(f, companion));
    return wrong(f, FST_E_QUANTIZED, companion, "%s does not belong to \"%.120s\" (%s): want %s", shape[1],
                 entry_of(f, codes)->name, shape[0], wanted);
}

/* ---- Weights --------------------------------------------------------------------------------------- */

/* A new weight. Its name is the first `length` bytes of `name` and then `suffix`; the last two dimensions of the codes
 * are rows x cols, with so many codes in an element of the last. */
static fst_status add(finder *f, fst_format format, uint32_t codes, size_t length, const char *suffix,
                      fst_quantized **out) {
    fst_scheme *scheme = f->out;
    const fst_entry *entry = entry_of(f, codes);
    if (scheme->count == f->room) {
        size_t room = f->room ? 2 * f->room : 64;
        fst_quantized *more = realloc(scheme->weights, room * sizeof *more);
        if (!more) return no_memory(f);
        scheme->weights = more;
        f->room = room;
    }
    fst_quantized *w = &scheme->weights[scheme->count];
    *w = (fst_quantized){.format = format, .codes = codes, .bits = 8, .stack = 1};
    for (int i = 0; i < FST_COMPANIONS; i++) w->companions[i] = FST_NO_TENSOR;
    w->name = malloc(length + strlen(suffix) + 1);
    if (!w->name) return no_memory(f);
    memcpy(w->name, entry->name, length);
    strcpy(w->name + length, suffix);
    scheme->roles[codes] = FST_ROLE_CODES;
    scheme->owner[codes] = (uint32_t)scheme->count++;
    *out = w;
    return FST_OK;
}

/* The weight's shape: the codes' leading dimensions, then rows x cols. */
static fst_status set_shape(finder *f, fst_quantized *w, uint32_t trailing, uint64_t rows, uint64_t cols) {
    const fst_entry *entry = entry_of(f, w->codes);
    uint32_t lead = entry->ndim - trailing;
    if (lead + 2 > sizeof w->shape / sizeof *w->shape)
        return wrong(f, FST_E_QUANTIZED, w->codes, "%u dimensions are too many for %s", entry->ndim,
                     fst_format_name(w->format));
    for (uint32_t i = 0; i < lead; i++) w->shape[i] = entry->shape[i], w->stack *= entry->shape[i];
    w->shape[lead] = w->rows = rows;
    w->shape[lead + 1] = w->cols = cols;
    w->ndim = lead + 2;
    return FST_OK;
}

static fst_status claim(finder *f, fst_quantized *w, fst_companion what, uint32_t tensor) {
    fst_scheme *scheme = f->out;
    if (tensor == FST_NO_TENSOR) return FST_OK;
    if (scheme->roles[tensor] != FST_ROLE_PLAIN)
        return wrong(f, FST_E_QUANTIZED, tensor, "it would belong to two weights, one of them \"%.200s\"",
                     w->name);
    w->companions[what] = tensor;
    w->list[w->companions_count++] = tensor;
    scheme->roles[tensor] = FST_ROLE_COMPANION;
    scheme->owner[tensor] = (uint32_t)(w - scheme->weights);
    return FST_OK;
}

static fst_status missing(finder *f, uint32_t codes, const char *what) {
    return wrong(f, FST_E_QUANTIZED, codes, "its %s is missing", what);
}

static fst_status contradicts(finder *f, uint32_t codes, const char *found) {
    return wrong(f, FST_E_QUANTIZED, codes, "by its shape it is %s, but the configuration says \"%s\"", found,
                 f->config.method);
}

/* Whether the configuration names one of these methods, which have other weights than what was found. */
static int says_one_of(const finder *f, const char *const *methods) {
    for (; *methods; methods++)
        if (strcmp(f->config.method, *methods) == 0) return 1;
    return 0;
}

static const char *const packed_methods[] = {"gptq", "awq", NULL};
static const char *const float_methods[] = {
    "fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes", "compressed-tensors", "modelopt", NULL};

/* ---- 8-bit floats and integers ---------------------------------------------------------------------- */

#define DIMS(...) \
    (const uint64_t[]){__VA_ARGS__}, (uint32_t)(sizeof((uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t))

/* [a, 1, b, 1] is [a, b]: ModelOpt's blocks. */
static int is_spread(const fst_entry *scale, uint64_t rows, uint64_t cols) {
    return scale->ndim == 4 && scale->shape[0] == rows && scale->shape[1] == 1 && scale->shape[2] == cols &&
           scale->shape[3] == 1;
}

/* What a scale of this shape is for, by the spec's table: the format, and w's blocks. */
static fst_format scale_kind(const finder *f, fst_quantized *w, const fst_entry *codes,
                             const fst_entry *scale) {
    uint64_t r = w->rows, c = w->cols;
    uint64_t bn = f->config.block[0] ? f->config.block[0] : 128,
             bk = f->config.block[1] ? f->config.block[1] : 128;
    uint64_t block_rows = blocks(r, bn), block_cols = blocks(c, bk),
             last = scale->ndim ? scale->shape[scale->ndim - 1] : 1;
    w->block_rows = 1, w->block_cols = c;
    if (is_e8m0(scale->dtype) && c % 32 == 0 && has_shape(scale, codes, 2, DIMS(r, c / 32))) {
        w->block_cols = 32;
        return FST_FORMAT_MXFP8;
    }
    if (elements_of(scale) == 1 && w->stack == 1) {
        w->block_rows = r;
        return FST_FORMAT_FP8_TENSOR;
    }
    if (has_shape(scale, codes, 2, DIMS(r, 1))) return FST_FORMAT_FP8_ROW;
    if (codes->ndim > 2 && (has_shape(scale, codes, 2, NULL, 0) || has_shape(scale, codes, 2, DIMS(1, 1)))) {
        w->block_rows = r;
        return FST_FORMAT_FP8_TENSOR;
    }
    /* A vector for each row; with stacked square matrices it might be for each column. */
    if (has_shape(scale, codes, 2, DIMS(r)) && (codes->ndim == 2 || r != c)) return FST_FORMAT_FP8_ROW;
    if (codes->ndim > 2 &&
        (has_shape(scale, codes, 2, DIMS(1, c)) || (r != c && has_shape(scale, codes, 2, DIMS(c))))) {
        w->block_rows = r, w->block_cols = 1;
        return FST_FORMAT_FP8_COLUMN;
    }
    if (has_shape(scale, codes, 2, DIMS(block_rows, block_cols)) ||
        (codes->ndim == 2 && is_spread(scale, block_rows, block_cols))) {
        w->block_rows = bn, w->block_cols = bk;
        return FST_FORMAT_FP8_BLOCK;
    }
    if (last && c % last == 0 && has_shape(scale, codes, 2, DIMS(r, last))) {
        w->block_cols = c / last;
        return FST_FORMAT_FP8_GROUP;
    }
    return FST_FORMAT_NONE;
}

/* Codes of 8 bits, one an element, with a scale. `suffix` is what the name of the weight ends in behind `length` bytes. */
static fst_status add_bytes(finder *f, uint32_t codes, size_t length, const char *suffix, uint32_t scale,
                            uint32_t zero) {
    const fst_entry *entry = entry_of(f, codes), *s = entry_of(f, scale);
    fst_quantized *w;
    fst_status status = add(f, FST_FORMAT_FP8_TENSOR, codes, length, suffix, &w);
    if (!status && entry->ndim < 2)
        status = wrong(f, FST_E_QUANTIZED, codes, "it has a scale, but is no matrix");
    if (!status) status = set_shape(f, w, 2, entry->shape[entry->ndim - 2], entry->shape[entry->ndim - 1]);
    if (status) return status;
    fst_format kind = scale_kind(f, w, entry, s);
    int integer = entry->dtype == FST_I8;
    if (!integer && says_one_of(f, packed_methods)) return contradicts(f, codes, "an 8-bit float's");
    int powers = is_e8m0(s->dtype) && (s->dtype == FST_F8_E8M0 || kind == FST_FORMAT_MXFP8);
    if (kind == FST_FORMAT_NONE || (!is_scale(s->dtype) && !powers) || (integer && powers))
        return misfit(f, codes, scale, "a float scale: one, one a row, or one a block or group");
    if (integer && kind == FST_FORMAT_FP8_BLOCK) return misfit(f, codes, scale, "one scale, or one a row");
    w->format = integer ? FST_FORMAT_INT8 : kind;
    if (f->config.inverse && !integer) w->flags |= FST_Q_DIVIDE;
    if (zero != FST_NO_TENSOR) {
        const fst_entry *z = entry_of(f, zero);
        if (!integer || z->dtype != FST_I8 || elements_of(z) != elements_of(s))
            return misfit(f, codes, zero, "I8, as many as there are scales, for I8 codes");
        w->flags |= FST_Q_BYTE_ZEROS;
    }
    status = claim(f, w, FST_COMPANION_SCALE, scale);
    return status ? status : claim(f, w, FST_COMPANION_ZERO, zero);
}

/* ---- 4-bit floats ------------------------------------------------------------------------------------ */

/* Two codes in a byte: [.., rows, cols / 2], a scale for `group` columns. */
static fst_status add_fp4(finder *f, fst_format format, uint32_t codes, size_t length, uint32_t scale,
                          uint32_t global, unsigned flags) {
    const fst_entry *entry = entry_of(f, codes), *s = entry_of(f, scale);
    uint64_t group = format == FST_FORMAT_NVFP4 ? 16 : 32;
    fst_quantized *w;
    fst_status status = add(f, format, codes, length, ".weight", &w);
    if (!status && entry->ndim < 2)
        status = wrong(f, FST_E_QUANTIZED, codes, "it has a scale, but is no matrix");
    if (!status)
        status = set_shape(f, w, 2, entry->shape[entry->ndim - 2], 2 * entry->shape[entry->ndim - 1]);
    if (status) return status;
    int right = format == FST_FORMAT_NVFP4 ? s->dtype == FST_F8_E4M3 : is_e8m0(s->dtype);
    if (!right || w->cols % group || !has_shape(s, entry, 2, DIMS(w->rows, w->cols / group)))
        return misfit(f, codes, scale,
                      format == FST_FORMAT_NVFP4 ? "F8_E4M3, one for 16 columns"
                                                 : "U8 or F8_E8M0, one for 32 columns");
    if (format == FST_FORMAT_NVFP4) {
        if (global == FST_NO_TENSOR) return missing(f, codes, "global scale");
        const fst_entry *g = entry_of(f, global);
        if (g->dtype != FST_F32 || (elements_of(g) != 1 && elements_of(g) != w->stack))
            return misfit(f, codes, global, "F32, one");
    }
    w->bits = 4, w->flags = flags;
    w->block_rows = 1, w->block_cols = group;
    status = claim(f, w, FST_COMPANION_SCALE, scale);
    return status ? status : claim(f, w, FST_COMPANION_GLOBAL, global);
}

/* gpt-oss: X_blocks [E, rows, cols / 32, 16] and X_scales [E, rows, cols / 32] are X. */
static fst_status find_blocks(finder *f, uint32_t codes, size_t length, const char *scales) {
    const fst_entry *entry = entry_of(f, codes);
    uint32_t scale = find(f, entry->name, length, scales);
    fst_quantized *w;
    if (scale == FST_NO_TENSOR || entry->dtype != FST_U8) return FST_OK;
    if (entry->ndim < 3 || entry->shape[entry->ndim - 1] != 16)
        return wrong(f, FST_E_QUANTIZED, codes, "want U8 [.., rows, blocks, 16] beside its scales");
    if (says_one_of(f, packed_methods)) return contradicts(f, codes, "MXFP4's");
    uint64_t rows = entry->shape[entry->ndim - 3], groups = entry->shape[entry->ndim - 2];
    fst_status status = add(f, FST_FORMAT_MXFP4, codes, length, "", &w);
    if (!status) status = set_shape(f, w, 3, rows, groups * 32);
    if (status) return status;
    if (!is_e8m0(entry_of(f, scale)->dtype) || !has_shape(entry_of(f, scale), entry, 3, DIMS(rows, groups)))
        return misfit(f, codes, scale, "U8, one for 16 bytes");
    w->bits = 4, w->block_rows = 1, w->block_cols = 32;
    return claim(f, w, FST_COMPANION_SCALE, scale);
}

/* ---- Packed integers --------------------------------------------------------------------------------- */

static fst_status add_packed(finder *f, uint32_t codes, size_t length) {
    const fst_entry *entry = entry_of(f, codes);
    uint32_t shape = find(f, entry->name, length, ".weight_shape");
    uint32_t scale = find(f, entry->name, length, ".weight_scale");
    fst_quantized *w;
    fst_status status = add(f, FST_FORMAT_PACKED, codes, length, ".weight", &w);
    if (status) return status;
    if (shape == FST_NO_TENSOR) return missing(f, codes, "weight_shape");
    if (scale == FST_NO_TENSOR) return missing(f, codes, "weight_scale");
    const fst_entry *s = entry_of(f, scale), *extents = entry_of(f, shape);
    if (entry->ndim < 2) return wrong(f, FST_E_QUANTIZED, codes, "it is packed, but no matrix");
    if ((extents->dtype != FST_I64 && extents->dtype != FST_I32) || extents->ndim != 1 ||
        extents->shape[0] != entry->ndim)
        return misfit(f, codes, shape, "I64, an extent a dimension");
    if (!is_scale(s->dtype) || s->ndim != entry->ndim ||
        s->shape[s->ndim - 2] != entry->shape[entry->ndim - 2])
        return misfit(f, codes, scale, "floats, [rows, groups]");
    w->bits = f->config.bits; /* and cols: to be read from weight_shape */
    w->flags = FST_Q_OFFSET;
    w->rows = entry->shape[entry->ndim - 2];
    w->block_rows = 1;
    w->has_state = 1;
    status = claim(f, w, FST_COMPANION_SHAPE, shape);
    if (!status) status = claim(f, w, FST_COMPANION_SCALE, scale);
    if (!status) status = claim(f, w, FST_COMPANION_ZERO, find(f, entry->name, length, ".weight_zero_point"));
    return status ? status : claim(f, w, FST_COMPANION_GROUPS, find(f, entry->name, length, ".weight_g_idx"));
}

/* The configuration's group, where it has one: that of GEMV is known by nothing else. */
static fst_status set_group(finder *f, fst_quantized *w, uint32_t codes, uint64_t count, int is_gemv) {
    uint64_t group = f->config.group;
    if (is_gemv && (group == 0 || w->cols % group || w->cols / group > count))
        return wrong(
            f, FST_E_QUANTIZED, codes,
            "the configuration's group_size is %llu: want one that divides %llu columns into at most "
            "%llu groups",
            (unsigned long long)group, (unsigned long long)w->cols, (unsigned long long)count);
    if (!is_gemv && group && blocks(w->cols, group) != count)
        return wrong(
            f, FST_E_QUANTIZED, codes,
            "it has %llu groups, but the configuration's group_size of %llu makes %llu of %llu columns",
            (unsigned long long)count, (unsigned long long)group, (unsigned long long)blocks(w->cols, group),
            (unsigned long long)w->cols);
    if (group) w->block_cols = group;
    return FST_OK;
}

/* X.qweight, X.qzeros, X.scales: GPTQ's or AWQ's, by their shapes. */
static fst_status add_qweight(finder *f, uint32_t codes, size_t length) {
    const fst_entry *q = entry_of(f, codes);
    uint32_t zero = find(f, q->name, length, ".qzeros"), scale = find(f, q->name, length, ".scales");
    uint32_t groups = find(f, q->name, length, ".g_idx");
    fst_quantized *w;
    if (zero == FST_NO_TENSOR) return missing(f, codes, "qzeros");
    if (scale == FST_NO_TENSOR) return missing(f, codes, "scales");
    const fst_entry *z = entry_of(f, zero), *s = entry_of(f, scale);
    if (q->dtype != FST_I32 || q->ndim != 2)
        return wrong(f, FST_E_UNSUPPORTED, codes, "want I32 [rows, columns] of packed codes");
    if (z->dtype != FST_I32 || z->ndim != 2) return misfit(f, codes, zero, "I32 of two dimensions");
    if (!is_scale(s->dtype) || s->ndim != 2) return misfit(f, codes, scale, "floats of two dimensions");
    uint64_t out = s->shape[1], g = s->shape[0];
    int is_awq =
        out == 8 * q->shape[1] && z->shape[1] == q->shape[1] && z->shape[0] == g && groups == FST_NO_TENSOR;
    int is_gemv =
        !is_awq && s->shape[0] == q->shape[0] && z->shape[0] == q->shape[0] && s->shape[1] == 8 * z->shape[1];
    int is_gptq = out == q->shape[1] && z->shape[0] == g;
    const char *method = f->config.method;
    if (says_one_of(f, float_methods)) return contradicts(f, codes, is_gptq ? "GPTQ's" : "AWQ's");
    if (is_gptq && strcmp(method, "awq") == 0) return contradicts(f, codes, "GPTQ's");
    if ((is_awq || is_gemv) && !is_gptq && strcmp(method, "gptq") == 0) return contradicts(f, codes, "AWQ's");
    if (is_gemv && strcmp(method, "awq") != 0) is_gemv = 0;
    if (!is_awq && !is_gemv && !is_gptq)
        return misfit(f, codes, scale, "[groups, columns], with qzeros of as many groups");
    fst_format format = is_gptq ? FST_FORMAT_GPTQ : is_awq ? FST_FORMAT_AWQ : FST_FORMAT_AWQ_GEMV;
    fst_status status = add(f, format, codes, length, ".weight", &w);
    if (status) return status;
    w->bits = 4;
    if (is_gptq) {
        w->bits = out && z->shape[1] * 32 % out == 0 ? (unsigned)(z->shape[1] * 32 / out) : 0;
        if (w->bits >= 5 && w->bits <= 7)
            return wrong(
                f, FST_E_UNSUPPORTED, codes,
                "GPTQ of %u bits is not dequantized (planes of bits); load it as stored, without a cast",
                w->bits);
        if (w->bits != 2 && w->bits != 3 && w->bits != 4 && w->bits != 8)
            return misfit(f, codes, zero, "2, 3, 4 or 8 bits a column");
        if (f->config.bits && f->config.bits != w->bits)
            return wrong(f, FST_E_QUANTIZED, codes, "its shape is that of %u bits, the configuration says %u",
                         w->bits, f->config.bits);
        w->flags = f->config.gptq_v2 ? 0 : FST_Q_ZERO_PLUS_ONE | (f->config.gptqmodel ? FST_Q_CARRY : 0);
    } else {
        if (f->config.bits && f->config.bits != 4)
            return wrong(f, FST_E_QUANTIZED, codes, "it is AWQ's of 4 bits, the configuration says %u",
                         f->config.bits);
        w->flags = is_awq ? FST_Q_AWQ_ORDER : 0;
    }
    uint64_t in = is_gptq ? q->shape[0] * 32 / w->bits : is_awq ? q->shape[0] : q->shape[1] * 8;
    status = set_shape(f, w, 2, is_gemv ? q->shape[0] : out, in);
    if (status) return status;
    uint64_t count = is_gemv ? s->shape[1] : g; /* GEMV pads them: what is behind in / group is not used */
    if (count == 0 || (!is_gemv && groups == FST_NO_TENSOR && in % count))
        return misfit(f, codes, scale, "a number of groups that divides the rows");
    w->block_rows = 1;
    w->block_cols = blocks(in, count);
    status = set_group(f, w, codes, count, is_gemv);
    if (status) return status;
    if (groups != FST_NO_TENSOR &&
        (entry_of(f, groups)->dtype != FST_I32 || !has_shape(entry_of(f, groups), q, 2, DIMS(in))))
        return misfit(f, codes, groups, "I32, one for each row");
    status = claim(f, w, FST_COMPANION_ZERO, zero);
    if (!status) status = claim(f, w, FST_COMPANION_SCALE, scale);
    return status ? status : claim(f, w, FST_COMPANION_GROUPS, groups);
}

/* ModelOpt: U8 [rows / 2, cols], two rows in a byte; scales [rows, cols / group]. */
static fst_status add_int4_rows(finder *f, uint32_t codes, size_t length, uint32_t scale) {
    const fst_entry *entry = entry_of(f, codes), *s = entry_of(f, scale);
    uint64_t rows = 2 * entry->shape[entry->ndim - 2], cols = entry->shape[entry->ndim - 1];
    uint64_t groups = s->ndim ? s->shape[s->ndim - 1] : 0;
    fst_quantized *w;
    fst_status status = add(f, FST_FORMAT_INT4_ROWS, codes, length, ".weight", &w);
    if (!status) status = set_shape(f, w, 2, rows, cols);
    if (status) return status;
    if (!is_scale(s->dtype) || groups == 0 || cols % groups || !has_shape(s, entry, 2, DIMS(rows, groups)))
        return misfit(f, codes, scale, "floats, [2 x rows, groups that divide the columns]");
    w->bits = 4, w->flags = FST_Q_SIGNED;
    w->block_rows = 1, w->block_cols = cols / groups;
    return claim(f, w, FST_COMPANION_SCALE, scale);
}

/* Quark: I32 [in, out / 8], scales [in / group, out]; zero points packed like the codes. */
static fst_status add_int4_quark(finder *f, uint32_t codes, size_t length, uint32_t scale) {
    const fst_entry *entry = entry_of(f, codes), *s = entry_of(f, scale);
    uint32_t zero = find(f, entry->name, length, ".weight_zero_point");
    fst_quantized *w;
    fst_status status = add(f, FST_FORMAT_INT4_QUARK, codes, length, ".weight", &w);
    if (status) return status;
    if (entry->ndim != 2 || !is_scale(s->dtype) || s->ndim != 2 || s->shape[0] == 0 ||
        entry->shape[0] % s->shape[0] || blocks(s->shape[1], 8) != entry->shape[1])
        return misfit(f, codes, scale, "floats, [groups that divide the rows, 8 x columns]");
    status = set_shape(f, w, 2, s->shape[1], entry->shape[0]);
    w->bits = 4, w->flags = zero == FST_NO_TENSOR ? FST_Q_SIGNED : 0;
    if (!f->config.in_order) w->flags |= FST_Q_AWQ_ORDER;
    w->block_rows = 1, w->block_cols = entry->shape[0] / s->shape[0];
    if (zero != FST_NO_TENSOR &&
        (entry_of(f, zero)->dtype != FST_I32 ||
         !has_shape(entry_of(f, zero), entry, 2, DIMS(s->shape[0], entry->shape[1]))))
        return misfit(f, codes, zero, "I32, packed like the codes, a row for each of the scales");
    if (!status) status = claim(f, w, FST_COMPANION_SCALE, scale);
    return status ? status : claim(f, w, FST_COMPANION_ZERO, zero);
}

/* ---- bitsandbytes -------------------------------------------------------------------------------------- */

/* Found by the state: the codes may be stored as a float type. `length`: of the weight's name. */
static fst_status add_bnb4(finder *f, uint32_t state, size_t length, fst_format format) {
    uint32_t codes = find(f, entry_of(f, state)->name, length, "");
    if (codes == FST_NO_TENSOR)
        return wrong(f, FST_E_QUANTIZED, state, "the weight that it belongs to is missing");
    const fst_entry *entry = entry_of(f, codes);
    uint32_t scale = find(f, entry->name, length, ".absmax"),
             nested = find(f, entry->name, length, ".nested_absmax");
    uint32_t nested_map = find(f, entry->name, length, ".nested_quant_map"),
             map = find(f, entry->name, length, ".quant_map");
    fst_quantized *w;
    fst_status status = add(f, format, codes, length, "", &w);
    if (status) return status;
    if (scale == FST_NO_TENSOR) return missing(f, codes, "absmax");
    int is_nested = entry_of(f, scale)->dtype == FST_U8;
    /* Without one, bitsandbytes' own values (kernels/bnb.hip) count. */
    if (map != FST_NO_TENSOR && (entry_of(f, map)->dtype != FST_F32 || elements_of(entry_of(f, map)) != 16))
        return misfit(f, codes, map, "F32, 16 of them");
    if (!is_nested && entry_of(f, scale)->dtype != FST_F32)
        return misfit(f, codes, scale, "F32, or U8 when nested");
    if (is_nested && (nested == FST_NO_TENSOR || nested_map == FST_NO_TENSOR))
        return missing(f, codes, nested == FST_NO_TENSOR ? "nested_absmax" : "nested_quant_map");
    if (is_nested && (entry_of(f, nested)->dtype != FST_F32 || entry_of(f, nested_map)->dtype != FST_F32 ||
                      elements_of(entry_of(f, nested_map)) != 256))
        return misfit(f, codes, nested, "F32, with a map of 256");
    w->bits = 4, w->has_state = 1;
    status = claim(f, w, FST_COMPANION_STATE, state);
    if (!status) status = claim(f, w, FST_COMPANION_SCALE, scale);
    if (!status) status = claim(f, w, FST_COMPANION_MAP, map);
    if (!status && is_nested) status = claim(f, w, FST_COMPANION_NESTED, nested);
    return status || !is_nested ? status : claim(f, w, FST_COMPANION_NESTED_MAP, nested_map);
}

static fst_status add_bnb8(finder *f, uint32_t codes, size_t length, uint32_t scale) {
    const fst_entry *entry = entry_of(f, codes);
    uint32_t layout = find(f, entry->name, length, ".weight_format");
    fst_quantized *w;
    fst_status status = add(f, FST_FORMAT_BNB_INT8, codes, length, ".weight", &w);
    if (status) return status;
    if (entry->dtype != FST_I8 || entry->ndim != 2)
        return wrong(f, FST_E_QUANTIZED, codes, "want I8 [rows, columns] beside its SCB");
    status = set_shape(f, w, 2, entry->shape[0], entry->shape[1]);
    if (status) return status;
    if (entry_of(f, scale)->dtype != FST_F32 || elements_of(entry_of(f, scale)) != w->rows)
        return misfit(f, codes, scale, "F32, one a row");
    w->block_rows = 1, w->block_cols = w->cols;
    status = claim(f, w, FST_COMPANION_SCALE, scale);
    return status ? status : claim(f, w, FST_COMPANION_STATE, layout);
}

/* ---- One tensor ---------------------------------------------------------------------------------------- */

/* Or the state of bitsandbytes' codes. */
static int may_be_codes(fst_dtype dtype) {
    return dtype == FST_U8 || dtype == FST_I8 || dtype == FST_I32 || is_fp8(dtype);
}

/* Its quantized weight, if it holds the codes of one. */
static fst_status look_at(finder *f, uint32_t i) {
    const fst_entry *entry = entry_of(f, i);
    const char *name = entry->name;
    size_t length, all = entry->name_length;
    uint32_t scale, other;
    if (!may_be_codes(entry->dtype)) return FST_OK;
    if (ends_in(entry, ".qweight", &length)) return add_qweight(f, i, length);
    if (ends_in(entry, ".weight_packed", &length)) {
        if (entry->dtype == FST_I32) return add_packed(f, i, length);
        scale = find(f, name, length, ".weight_scale"), other = find(f, name, length, ".weight_global_scale");
        if (scale == FST_NO_TENSOR) return missing(f, i, "weight_scale");
        return add_fp4(f, other == FST_NO_TENSOR ? FST_FORMAT_MXFP4 : FST_FORMAT_NVFP4, i, length, scale,
                       other, other == FST_NO_TENSOR ? 0 : FST_Q_DIVIDE);
    }
    if (ends_in(entry, "_blocks", &length)) return find_blocks(f, i, length, "_scales");
    if (ends_in(entry, ".blocks", &length)) return find_blocks(f, i, length, ".scales");
    if (ends_in(entry, ".quant_state.bitsandbytes__nf4", &length))
        return add_bnb4(f, i, length, FST_FORMAT_BNB_NF4);
    if (ends_in(entry, ".quant_state.bitsandbytes__fp4", &length))
        return add_bnb4(f, i, length, FST_FORMAT_BNB_FP4);
    if (is_fp8(entry->dtype)) { /* stacked experts have no ".weight" */
        static const char *const suffixes[] = {"_scale_inv", "_scales_inv", "_scale"};
        for (int k = 0; k < 3; k++)
            if (!ends_in(entry, ".weight", &length) &&
                (scale = find(f, name, all, suffixes[k])) != FST_NO_TENSOR)
                return add_bytes(f, i, all, "", scale, FST_NO_TENSOR);
    }
    if (!ends_in(entry, ".weight", &length)) return FST_OK;
    if ((scale = find(f, name, length, ".SCB")) != FST_NO_TENSOR) return add_bnb8(f, i, length, scale);
    scale = find(f, name, length, ".weight_scale_inv");
    if (scale == FST_NO_TENSOR) scale = find(f, name, length, ".weight_scale");
    if (scale == FST_NO_TENSOR && (is_fp8(entry->dtype) || entry->dtype == FST_I8))
        scale = find(f, name, length, ".scale");
    if (scale == FST_NO_TENSOR) {
        f->out->bare += is_fp8(entry->dtype);
        return FST_OK;
    }
    const fst_entry *s = entry_of(f, scale);
    if (is_fp8(entry->dtype)) return add_bytes(f, i, length, ".weight", scale, FST_NO_TENSOR);
    if (entry->dtype == FST_I8 && is_e8m0(s->dtype))
        return add_fp4(f, FST_FORMAT_MXFP4, i, length, scale, FST_NO_TENSOR, 0);
    if (entry->dtype == FST_I8)
        return add_bytes(f, i, length, ".weight", scale, find(f, name, length, ".weight_zero_point"));
    if (entry->dtype == FST_I32) return add_int4_quark(f, i, length, scale);
    if (entry->dtype != FST_U8)
        return wrong(f, FST_E_QUANTIZED, i, "it has a scale, but is %s", fst_dtype_name(entry->dtype));
    if (entry->ndim < 2) return wrong(f, FST_E_QUANTIZED, i, "it has a scale, but is no matrix");
    if (s->dtype == FST_F8_E4M3)
        return add_fp4(f, FST_FORMAT_NVFP4, i, length, scale, find(f, name, length, ".weight_scale_2"), 0);
    if (is_e8m0(s->dtype) && s->ndim == entry->ndim &&
        s->shape[s->ndim - 1] * 24 == entry->shape[entry->ndim - 1])
        return wrong(f, FST_E_UNSUPPORTED, i,
                     "MXFP6 is not dequantized: the order of its bits is not documented");
    if (is_e8m0(s->dtype)) return add_fp4(f, FST_FORMAT_MXFP4, i, length, scale, FST_NO_TENSOR, 0);
    return add_int4_rows(f, i, length, scale);
}

/* ---- Names alone --------------------------------------------------------------------------------------- */

/* What names of companions end in, and their codes' instead. */
static const struct {
    const char *companion, *codes;
    int takes_any; /* codes of any dtype */
} owner_names[] = {
    {".weight_scale_inv", ".weight", 0},
    {".weight_scale", ".weight", 0},
    {".weight_scale", ".weight_packed", 0},
    {".weight_scale_2", ".weight", 0},
    {".weight_global_scale", ".weight_packed", 0},
    {".weight_zero_point", ".weight", 0},
    {".weight_zero_point", ".weight_packed", 0},
    {".weight_shape", ".weight_packed", 0},
    {".weight_g_idx", ".weight_packed", 0},
    {".scale", ".weight", 0},
    {".SCB", ".weight", 0},
    {".weight_format", ".weight", 0},
    {".qzeros", ".qweight", 0},
    {".scales", ".qweight", 0},
    {".g_idx", ".qweight", 0},
    {".scales", ".blocks", 0},
    {"_scales", "_blocks", 0},
    {"_scale_inv", "", 0},
    {"_scales_inv", "", 0},
    {"_scale", "", 0},
    {".absmax", "", 1},
    {".quant_map", "", 1},
    {".nested_absmax", "", 1},
    {".nested_quant_map", "", 1},
    {".quant_state.bitsandbytes__nf4", "", 1},
    {".quant_state.bitsandbytes__fp4", "", 1},
};

static int name_ends_in(const char *name, size_t length, const char *suffix) {
    size_t size = strlen(suffix);
    return length >= size && !memcmp(name + length - size, suffix, size);
}

/* No companion's name does, and most others do. */
static int is_weight_or_bias(const char *name, size_t length) {
    return name_ends_in(name, length, ".weight") || name_ends_in(name, length, ".bias");
}

int fst_scheme_owner_name(const char *name, size_t length, size_t k, fst_scheme_name *out, int *takes_any) {
    if (is_weight_or_bias(name, length)) return 0;
    for (size_t i = 0; i < sizeof owner_names / sizeof *owner_names; i++) {
        if (!name_ends_in(name, length, owner_names[i].companion) || k--) continue;
        out->length = length - strlen(owner_names[i].companion);
        out->suffix = owner_names[i].codes;
        *takes_any = owner_names[i].takes_any;
        return 1;
    }
    return 0;
}

int fst_scheme_may_be_codes(fst_dtype dtype) { return may_be_codes(dtype); }

int fst_scheme_weight_name(const char *name, size_t length, fst_scheme_name *out) {
    static const char *const suffixes[][2] = {
        {".qweight", ".weight"}, {".weight_packed", ".weight"}, {"_blocks", ""}, {".blocks", ""}};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        if (!name_ends_in(name, length, suffixes[i][0])) continue;
        *out = (fst_scheme_name){length - strlen(suffixes[i][0]), suffixes[i][1]};
        return 1;
    }
    return 0;
}

/* ---- The rest ------------------------------------------------------------------------------------------- */

static int ends_in_one_of(const fst_entry *entry, const char *const *suffixes) {
    size_t length;
    for (; *suffixes; suffixes++)
        if (ends_in(entry, *suffixes, &length)) return 1;
    return 0;
}

/* Codes that no format took: in a checkpoint that is quantized, what they would be read with is missing. */
static fst_status look_at_codes(finder *f, uint32_t i) {
    const fst_entry *entry = entry_of(f, i);
    size_t length;
    if (entry->dtype != FST_U8 && entry->dtype != FST_I8 && entry->dtype != FST_I32) return FST_OK;
    if (ends_in(entry, ".weight", &length) && entry->ndim >= 2)
        return missing(f, i, entry->dtype == FST_U8 ? "weight_scale (or its quant_state)" : "weight_scale");
    if (entry->dtype == FST_U8 && entry->ndim >= 3 && entry->shape[entry->ndim - 1] == 16 &&
        (ends_in(entry, "_blocks", &length) || ends_in(entry, ".blocks", &length)))
        return missing(f, i, "scales");
    return FST_OK;
}

/* What no weight took: scales of activations and of the KV cache are kept; a weight's companion without a weight is a
 * mistake, as are codes without scales (of 8-bit floats they are counted). */
static fst_status look_at_rest(finder *f, uint32_t i) {
    static const char *const kept[] = {".input_scale",      ".activation_scale",  ".k_scale",
                                       ".v_scale",          ".q_scale",           ".kv_scale",
                                       ".prob_scale",       ".output_scale",      ".input_global_scale",
                                       ".input_scale_2",    ".pre_quant_scale",   ".weight_scale_2",
                                       ".input_zero_point", ".output_zero_point", NULL};
    static const char *const lost[] = {".weight_scale",
                                       ".weight_scale_inv",
                                       ".weight_zero_point",
                                       ".weight_global_scale",
                                       ".weight_shape",
                                       ".weight_g_idx",
                                       ".weight_format",
                                       ".qzeros",
                                       ".g_idx",
                                       ".SCB",
                                       ".weight.absmax",
                                       ".weight.quant_map",
                                       ".weight.nested_absmax",
                                       ".weight.nested_quant_map",
                                       NULL};
    static const char *const lost_powers[] = {"_scales", ".scales", NULL}; /* of MXFP4's blocks */
    const fst_entry *entry = entry_of(f, i);
    int quantized = f->out->count || *f->config.method; /* otherwise a name alone means little */
    if (f->out->roles[i] != FST_ROLE_PLAIN) return FST_OK;
    fst_status status = quantized ? look_at_codes(f, i) : FST_OK;
    if (status || is_weight_or_bias(entry->name, entry->name_length)) return status;
    if (ends_in_one_of(entry, kept)) f->out->roles[i] = FST_ROLE_KEPT;
    else if (quantized &&
             (ends_in_one_of(entry, lost) || (is_e8m0(entry->dtype) && ends_in_one_of(entry, lost_powers))))
        return wrong(f, FST_E_QUANTIZED, i, "the weight that it belongs to is missing, or does not take it");
    return FST_OK;
}

static fst_status find_all(finder *f) {
    const fst_model *model = f->model;
    size_t longest = 0;
    for (size_t i = 0; i < model->count; i++)
        if (model->tensors[i].entry->name_length > longest) longest = model->tensors[i].entry->name_length;
    f->buffer_room = longest + 1;
    f->buffer = malloc(f->buffer_room);
    f->out->roles = calloc(model->count + 1, sizeof *f->out->roles);
    f->out->owner = malloc((model->count + 1) * sizeof *f->out->owner);
    if (!f->buffer || !f->out->roles || !f->out->owner) return no_memory(f);
    memset(f->out->owner, 0xFF, (model->count + 1) * sizeof *f->out->owner);
    fst_status status = FST_OK;
    for (uint32_t i = 0; i < model->count && !status; i++) status = look_at(f, i);
    for (uint32_t i = 0; i < model->count && !status; i++) status = look_at_rest(f, i);
    return status;
}

fst_status fst_scheme_find(const fst_model *model, const fst_config_text configs[FST_CONFIGS],
                           fst_scheme *out, fst_error *error) {
    finder f = {.model = model, .out = out, .error = error};
    fst_status status = FST_OK;
    memset(out, 0, sizeof *out);
    for (int i = 0; i < FST_CONFIGS && !status; i++) status = read_config(&configs[i], i, &f.config, error);
    if (!status) status = find_all(&f);
    free(f.buffer);
    if (status) fst_scheme_free(out);
    else snprintf(out->method, sizeof out->method, "%s", f.config.method);
    return status;
}

void fst_scheme_free(fst_scheme *scheme) {
    for (size_t i = 0; i < scheme->count; i++) free(scheme->weights[i].name);
    free(scheme->weights);
    free(scheme->roles);
    free(scheme->owner);
    memset(scheme, 0, sizeof *scheme);
}
