/* Companions of quantized weights whose bytes must be known before a load is planned: the shape of what is packed, and
 * the groups of columns (g_idx), which kernels believe. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loading.h"

static const fst_model_tensor *tensor_of(const fst_loading *l, uint32_t index) {
    return &l->model->tensors[index];
}

/* A mistake `at` bytes behind the start of a companion. */
__attribute__((format(printf, 5, 6))) static fst_status wrong(const fst_loading *l, fst_error *error,
                                                              uint32_t tensor, uint64_t at,
                                                              const char *format, ...) {
    const fst_model_tensor *t = tensor_of(l, tensor);
    fst_where where = {fst_file_path(l->model, t->file), (int)t->file,
                       (int64_t)(l->model->headers[t->file].data_start + t->entry->begin + at)};
    char text[300];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return fst_fail(error, FST_E_QUANTIZED, 0, &where, "tensor \"%s\": %s", t->entry->name, text);
}

static fst_status read_bytes(const fst_loading *l, fst_error *error, uint32_t tensor, void *out) {
    const fst_model_tensor *t = tensor_of(l, tensor);
    uint64_t offset = l->model->headers[t->file].data_start + t->entry->begin;
    fst_where where = {fst_file_path(l->model, t->file), (int)t->file, (int64_t)offset};
    ssize_t got = fst_os_read_all(l->fds[t->file], out, t->nbytes, offset);
    if (got < 0)
        return fst_fail(error, FST_E_IO, (int)-got, &where, "reading tensor \"%s\": %s", t->entry->name,
                        strerror((int)-got));
    if ((uint64_t)got < t->nbytes) {
        where.offset += got;
        return fst_fail(error, FST_E_CHANGED, 0, &where, "the file ends here, inside tensor \"%s\"",
                        t->entry->name);
    }
    return FST_OK;
}

/* ---- weight_shape ---------------------------------------------------------------------------------- */

static uint64_t ceil_of(uint64_t n, uint64_t by) { return n / by + (n % by != 0); }

/* Words of so many codes, as a stream of bits, and where no word has a part of a code. */
static uint64_t dense_words(uint64_t count, unsigned bits) {
    return count / 32 * bits + ceil_of(count % 32 * bits, 32);
}
static uint64_t padded_words(uint64_t count, unsigned bits) { return ceil_of(count, 32 / bits); }

/* The width that makes so many words of so many columns; 0: none, or several. */
static unsigned find_bits(uint64_t cols, uint64_t words) {
    unsigned found = 0;
    for (unsigned bits = 1; bits <= 8; bits++) {
        if (dense_words(cols, bits) != words && padded_words(cols, bits) != words) continue;
        if (found) return 0;
        found = bits;
    }
    return found;
}

static fst_status set_packing(const fst_loading *l, fst_error *error, fst_quantized *w, uint64_t words) {
    uint32_t shape = w->companions[FST_COMPANION_SHAPE];
    unsigned bits = w->bits ? w->bits : find_bits(w->cols, words);
    if (bits < 1 || bits > 8)
        return wrong(l, error, w->codes, 0,
                     "how many bits its codes have is not said: %llu words for %llu columns",
                     (unsigned long long)words, (unsigned long long)w->cols);
    int dense = dense_words(w->cols, bits) == words, padded = padded_words(w->cols, bits) == words;
    if (!dense && !padded)
        return wrong(l, error, shape, 0,
                     "it says %llu columns, but \"%.100s\" has %llu words a row, of %u bits",
                     (unsigned long long)w->cols, tensor_of(l, w->codes)->entry->name,
                     (unsigned long long)words, bits);
    if (32 % bits && dense && padded && w->cols > 32 / bits)
        return wrong(l, error, w->codes, 0,
                     "%llu columns of %u bits are as many words in both of the layouts that there are",
                     (unsigned long long)w->cols, bits);
    w->bits = bits;
    if (32 % bits && !dense) w->flags |= FST_Q_PADDED;
    return FST_OK;
}

static fst_status check_zeros(const fst_loading *l, fst_error *error, fst_quantized *w, uint64_t groups) {
    uint32_t zero = w->companions[FST_COMPANION_ZERO];
    if (zero == FST_NO_TENSOR) return FST_OK;
    const fst_entry *z = tensor_of(l, zero)->entry, *codes = tensor_of(l, w->codes)->entry;
    uint64_t rows = w->flags & FST_Q_PADDED ? padded_words(w->rows, w->bits) : dense_words(w->rows, w->bits);
    int bytes = z->dtype == FST_I8, fits = z->ndim == codes->ndim && (bytes || z->dtype == FST_I32);
    for (uint32_t i = 0; fits && i + 2 < z->ndim; i++) fits = z->shape[i] == codes->shape[i];
    if (!fits || z->shape[z->ndim - 1] != groups || z->shape[z->ndim - 2] != (bytes ? w->rows : rows))
        return wrong(l, error, zero, 0,
                     "it does not belong to \"%.100s\": want I32 [%llu, %llu], or I8 [%llu, %llu]",
                     codes->name, (unsigned long long)rows, (unsigned long long)groups,
                     (unsigned long long)w->rows, (unsigned long long)groups);
    if (bytes) w->flags |= FST_Q_BYTE_ZEROS;
    return FST_OK;
}

/* Groups of columns, which the scales count. */
static fst_status set_groups(const fst_loading *l, fst_error *error, fst_quantized *w) {
    uint32_t scale = w->companions[FST_COMPANION_SCALE], index = w->companions[FST_COMPANION_GROUPS];
    const fst_entry *s = tensor_of(l, scale)->entry, *codes = tensor_of(l, w->codes)->entry;
    uint64_t groups = s->shape[s->ndim - 1];
    for (uint32_t i = 0; i + 1 < s->ndim; i++)
        if (s->shape[i] != codes->shape[i])
            return wrong(l, error, scale, 0, "it has not the rows of \"%.100s\"", codes->name);
    if (groups == 0 || w->cols % groups)
        return wrong(l, error, scale, 0, "%llu groups do not divide %llu columns", (unsigned long long)groups,
                     (unsigned long long)w->cols);
    w->block_cols = w->cols / groups;
    if (index != FST_NO_TENSOR) {
        const fst_entry *g = tensor_of(l, index)->entry;
        if (g->dtype != FST_I32 || g->ndim != 1 || g->shape[0] != w->cols || w->stack != 1)
            return wrong(l, error, index, 0, "it does not belong to \"%.100s\": want I32 [%llu]", codes->name,
                         (unsigned long long)w->cols);
    }
    return check_zeros(l, error, w, groups);
}

static fst_status read_shape(const fst_loading *l, fst_error *error, fst_quantized *w) {
    uint32_t shape = w->companions[FST_COMPANION_SHAPE];
    const fst_entry *codes = tensor_of(l, w->codes)->entry;
    unsigned char bytes[8 * 8];
    uint32_t ndim = codes->ndim;
    if (ndim > 8) return wrong(l, error, w->codes, 0, "%u dimensions are too many", ndim);
    fst_status status = read_bytes(l, error, shape, bytes);
    if (status) return status;
    size_t size = tensor_of(l, shape)->entry->dtype == FST_I64 ? 8 : 4;
    w->stack = 1;
    for (uint32_t i = 0; i < ndim; i++) {
        int64_t extent = 0;
        int32_t narrow;
        memcpy(size == 8 ? (void *)&extent : (void *)&narrow, bytes + i * size, size);
        if (size == 4) extent = narrow;
        w->shape[i] = (uint64_t)extent;
        if (extent <= 0 || (i + 1 < ndim && w->shape[i] != codes->shape[i]))
            return wrong(l, error, shape, i * size, "extent %u is %lld, but \"%.100s\" has %llu there", i,
                         (long long)extent, codes->name, (unsigned long long)codes->shape[i]);
        if (i + 2 < ndim) w->stack *= w->shape[i];
    }
    w->ndim = ndim;
    w->rows = w->shape[ndim - 2], w->cols = w->shape[ndim - 1];
    if (w->cols > UINT64_MAX / 1024 / w->rows / w->stack)
        return wrong(l, error, shape, 0, "%llu columns are too many", (unsigned long long)w->cols);
    status = set_packing(l, error, w, codes->shape[ndim - 1]);
    return status ? status : set_groups(l, error, w);
}

/* ---- g_idx ----------------------------------------------------------------------------------------- */

/* Whether columns are in groups as they follow one another. */
static int are_plain(const int32_t *index, uint64_t cols, uint64_t group_cols, uint64_t groups) {
    uint64_t first = 0, group = 0;
    for (; first < cols && group < groups && group <= INT32_MAX; first += group_cols, group++) {
        uint64_t count = cols - first < group_cols ? cols - first : group_cols;
        uint32_t differ = 0;
        for (uint64_t i = 0; i < count; i++) differ |= (uint32_t)index[first + i] ^ (uint32_t)group;
        if (differ) return 0;
    }
    return first >= cols;
}

static fst_status check_index(const fst_loading *l, fst_error *error, fst_quantized *w,
                              const int32_t *index) {
    const fst_entry *s = tensor_of(l, w->companions[FST_COMPANION_SCALE])->entry;
    uint64_t groups = s->shape[w->format == FST_FORMAT_GPTQ ? 0 : s->ndim - 1];
    if (are_plain(index, w->cols, w->block_cols, groups)) {
        w->flags |= FST_Q_PLAIN_GROUPS;
        return FST_OK;
    }
    for (uint64_t i = 0; w->format == FST_FORMAT_PACKED && i < w->cols; i++)
        if (index[i] == -1) { /* compressed-tensors' word for one that is not filled in */
            w->flags |= FST_Q_PLAIN_GROUPS;
            return FST_OK;
        }
    for (uint64_t i = 0; i < w->cols; i++) {
        if (index[i] < 0 || (uint64_t)index[i] >= groups)
            return wrong(l, error, w->companions[FST_COMPANION_GROUPS], 4 * i,
                         "column %llu is in group %d, of %llu that there are", (unsigned long long)i,
                         (int)index[i], (unsigned long long)groups);
    }
    return FST_OK;
}

/* Memory for one index after the other: each would take new pages, which are slower to come than what is read. */
typedef struct scratch {
    int32_t *index;
    uint64_t nbytes;
} scratch;

static fst_status read_index(const fst_loading *l, fst_error *error, fst_quantized *w, scratch *memory) {
    uint32_t tensor = w->companions[FST_COMPANION_GROUPS];
    uint64_t nbytes = tensor_of(l, tensor)->nbytes;
    if (!memory->index || memory->nbytes < nbytes) {
        free(memory->index);
        *memory = (scratch){malloc(nbytes + 1), nbytes};
        if (!memory->index) return fst_no_memory(error);
    }
    fst_status status = read_bytes(l, error, tensor, memory->index);
    return status ? status : check_index(l, error, w, memory->index);
}

/* A weight that a load keeps as stored needs neither. */
static fst_status read_weight(const fst_loading *l, fst_error *error, fst_quantized *w, fst_dtype cast,
                              scratch *memory) {
    fst_status status = FST_OK;
    if (cast == FST_NATIVE) return FST_OK;
    if (w->format == FST_FORMAT_PACKED) status = read_shape(l, error, w);
    if (status || w->companions[FST_COMPANION_GROUPS] == FST_NO_TENSOR) return status;
    return read_index(l, error, w, memory);
}

fst_status fst_loading_read_companions(fst_loading *l, fst_error *error) {
    const fst_scheme *scheme = l->model->scheme;
    fst_status status = FST_OK;
    scratch memory = {NULL, 0};
    uint32_t tensor = 0;
    if (l->opens_only) return FST_OK; /* headers are all that it reads */
    for (size_t i = 0; i < l->total && !status && scheme->count; i++) {
        if (l->choices[i].skip) continue;
        if (scheme->roles[tensor] == FST_ROLE_CODES)
            status =
                read_weight(l, error, &scheme->weights[scheme->owner[tensor]], l->choices[i].cast, &memory);
        tensor++;
    }
    free(memory.index);
    return status;
}
