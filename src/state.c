/* bitsandbytes: the JSON beside 4-bit codes, the layout of 8-bit ones. */
#include "state.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <yyjson.h>

#include "model.h"
#include "status.h"

#define MOST_BLOCK ((uint64_t)1 << 30)

typedef struct state {
    const fst_model *model;
    fst_quantized *weight;
    uint32_t tensor; /* that says it */
    fst_error *error;
} state;

static const fst_entry *entry_of(const state *s, uint32_t tensor) { return s->model->tensors[tensor].entry; }

__attribute__((format(printf, 3, 4))) static fst_status wrong(const state *s, fst_status status,
                                                              const char *format, ...) {
    const fst_model_tensor *t = &s->model->tensors[s->tensor];
    fst_where where = {s->model->paths.files[t->file], (int)t->file,
                       (int64_t)(s->model->headers[t->file].data_start + t->entry->begin)};
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return fst_fail(s->error, status, 0, &where, "tensor \"%s\": %s", t->entry->name, text);
}

static uint64_t blocks(uint64_t size, uint64_t block) { return size / block + (size % block != 0); }

static uint64_t elements(const fst_entry *entry) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < entry->ndim; i++) count *= entry->shape[i]; /* the header checked that it fits */
    return count;
}

/* A companion has so many elements. */
static fst_status check_count(const state *s, fst_companion which, uint64_t count, const char *what) {
    uint64_t found = elements(entry_of(s, s->weight->companions[which]));
    if (found == count) return FST_OK;
    return wrong(s, FST_E_QUANTIZED, "by its shape and block size there are %llu %s, but \"%.200s\" has %llu",
                 (unsigned long long)count, what, entry_of(s, s->weight->companions[which])->name,
                 (unsigned long long)found);
}

static fst_status read_block(const state *s, yyjson_val *root, const char *key, uint64_t *out) {
    yyjson_val *value = yyjson_obj_get(root, key);
    *out = yyjson_get_uint(value);
    if (yyjson_is_uint(value) && *out > 0 && *out <= MOST_BLOCK) return FST_OK;
    return wrong(s, FST_E_QUANTIZED, "its \"%s\" is missing, or no number of elements", key);
}

/* The shape of the weight, and how many elements that are. */
static fst_status read_shape(const state *s, yyjson_val *root, uint64_t *count) {
    fst_quantized *w = s->weight;
    yyjson_val *shape = yyjson_obj_get(root, "shape");
    size_t dims = yyjson_arr_size(shape);
    if (dims == 0 || dims > sizeof w->shape / sizeof *w->shape)
        return wrong(s, FST_E_QUANTIZED, "its \"shape\" is missing, or none");
    *count = 1;
    for (size_t i = 0; i < dims; i++) {
        yyjson_val *extent = yyjson_arr_get(shape, i);
        w->shape[i] = yyjson_get_uint(extent);
        if (!yyjson_is_uint(extent) || __builtin_mul_overflow(*count, w->shape[i], count) ||
            *count > UINT64_MAX / 64)
            return wrong(s, FST_E_QUANTIZED, "its \"shape\" is none");
    }
    w->ndim = (uint32_t)dims;
    w->cols = w->shape[dims - 1];
    w->rows = w->cols ? *count / w->cols : 0;
    const fst_entry *codes = entry_of(s, w->codes);
    if (codes->end - codes->begin != blocks(*count, 2))
        return wrong(s, FST_E_QUANTIZED, "a weight of its shape has %llu bytes of codes, \"%.200s\" has %llu",
                     (unsigned long long)blocks(*count, 2), codes->name,
                     (unsigned long long)(codes->end - codes->begin));
    return FST_OK;
}

static fst_status read_nested(const state *s, yyjson_val *root, uint64_t scales) {
    fst_quantized *w = s->weight;
    yyjson_val *offset = yyjson_obj_get(root, "nested_offset");
    fst_status status = read_block(s, root, "nested_blocksize", &w->nested_block);
    if (status) return status;
    if (!yyjson_is_num(offset))
        return wrong(s, FST_E_QUANTIZED, "its \"nested_offset\" is missing, or no number");
    w->nested_offset = (float)yyjson_get_num(offset);
    return check_count(s, FST_COMPANION_NESTED, blocks(scales, w->nested_block), "scales of scales");
}

static fst_status read_object(const state *s, yyjson_val *root) {
    fst_quantized *w = s->weight;
    const char *type = yyjson_get_str(yyjson_obj_get(root, "quant_type"));
    const char *wanted = w->format == FST_FORMAT_BNB_NF4 ? "nf4" : "fp4";
    uint64_t count = 0, scales;
    if (!yyjson_is_obj(root)) return wrong(s, FST_E_QUANTIZED, "it is JSON, but no object");
    if (type && strcmp(type, wanted) != 0)
        return wrong(s, FST_E_QUANTIZED, "its \"quant_type\" is \"%.20s\", its name says %s", type, wanted);
    fst_status status = read_block(s, root, "blocksize", &w->block_cols);
    if (!status) status = read_shape(s, root, &count);
    if (status) return status;
    w->block_rows = 1;
    scales = blocks(count, w->block_cols);
    status = check_count(s, FST_COMPANION_SCALE, scales, "scales");
    return status || w->companions[FST_COMPANION_NESTED] == FST_NO_TENSOR ? status
                                                                          : read_nested(s, root, scales);
}

static fst_status read_bnb4(const state *s, const unsigned char *bytes) {
    const fst_entry *entry = entry_of(s, s->tensor);
    yyjson_read_err bad = {0};
    yyjson_doc *doc = yyjson_read_opts((char *)(uintptr_t)bytes, (size_t)(entry->end - entry->begin),
                                       YYJSON_READ_NOFLAG, NULL, &bad);
    if (!doc) {
        int memory = bad.code == YYJSON_READ_ERROR_MEMORY_ALLOCATION;
        return memory ? wrong(s, FST_E_MEMORY, "out of memory")
                      : wrong(s, FST_E_JSON, "not JSON: %s", bad.msg);
    }
    fst_status status = read_object(s, yyjson_doc_get_root(doc));
    yyjson_doc_free(doc);
    return status;
}

static fst_status read_bnb8(const state *s, const unsigned char *bytes) {
    const fst_entry *entry = entry_of(s, s->tensor);
    if (entry->dtype != FST_U8 || entry->end - entry->begin != 1)
        return wrong(s, FST_E_QUANTIZED, "want one byte, U8");
    if (bytes[0] == 0) return FST_OK;
    return wrong(s, FST_E_UNSUPPORTED,
                 "layout %u (col32, turing or ampere) is not dequantized, only rows are", bytes[0]);
}

uint32_t fst_state_tensor(const fst_quantized *weight) { return weight->companions[FST_COMPANION_STATE]; }

fst_status fst_state_apply(const fst_model *model, fst_quantized *weight, const unsigned char *bytes,
                           fst_error *error) {
    const state s = {model, weight, fst_state_tensor(weight), error};
    return weight->format == FST_FORMAT_BNB_INT8 ? read_bnb8(&s, bytes) : read_bnb4(&s, bytes);
}
