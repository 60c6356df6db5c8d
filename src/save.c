/* Writes a model as a .safetensors file. The header is made in memory; the data goes out in the order
 * of the tensors, straight from memory that the CPU can read, otherwise through two pinned buffers:
 * while one is written, the device fills the other. */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"
#include "os.h"

#define DATA_ALIGN 4096u
#define PIECE_BYTES ((size_t)8 << 20) /* what is written in one go, and the size of a buffer */
#define TICK_SECONDS 0.05
#define PATH_TAIL 120

/* ---- Text ------------------------------------------------------------------------------------ */

/* Grows as needed. `failed` once memory ran out: then nothing is added any more. */
typedef struct text_buffer {
    char *data;
    size_t used, room;
    int failed;
} text_buffer;

static void put(text_buffer *text, const char *data, size_t size) {
    if (text->room - text->used < size) {
        size_t room = 2 * text->room + size + 4096;
        char *larger = text->failed ? NULL : realloc(text->data, room);
        if (!larger) {
            text->failed = 1;
            return;
        }
        text->data = larger;
        text->room = room;
    }
    memcpy(text->data + text->used, data, size);
    text->used += size;
}

__attribute__((format(printf, 2, 3))) static void put_format(text_buffer *text, const char *format, ...) {
    char line[128];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    put(text, line, (size_t)length);
}

/* A JSON string. Names and metadata are UTF-8 already; what JSON wants escaped is escaped. */
static void put_string(text_buffer *text, const char *data, size_t length) {
    put(text, "\"", 1);
    size_t start = 0;
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)data[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        put(text, data + start, i - start);
        if (c == '"' || c == '\\') put(text, (char[]){'\\', (char)c}, 2);
        else put_format(text, "\\u%04x", c);
        start = i + 1;
    }
    put(text, data + start, length - start);
    put(text, "\"", 1);
}

/* ---- Metadata -------------------------------------------------------------------------------- */

typedef struct pair {
    const fst_string *key, *value;
    size_t file, order;
} pair;

static int compare_strings(const fst_string *a, const fst_string *b) {
    int order = memcmp(a->data, b->data, a->length < b->length ? a->length : b->length);
    return order ? order : (a->length > b->length) - (a->length < b->length);
}

static int compare_pairs(const void *a, const void *b) {
    const pair *x = a, *y = b;
    int order = compare_strings(x->key, y->key);
    return order ? order : (x->order > y->order) - (x->order < y->order);
}

static int compare_orders(const void *a, const void *b) {
    const pair *x = a, *y = b;
    return (x->order > y->order) - (x->order < y->order);
}

/* All pairs of all files, in their order. NULL when there are none, or no memory. */
static pair *collect_pairs(const fst_model *model, size_t *count, int *any) {
    *count = 0;
    *any = 0;
    for (size_t f = 0; f < model->paths.count; f++) {
        *count += model->headers[f].metadata_count;
        *any |= model->headers[f].has_metadata;
    }
    pair *pairs = *count ? malloc(*count * sizeof *pairs) : NULL;
    if (!pairs) return NULL;
    size_t order = 0;
    for (size_t f = 0; f < model->paths.count; f++)
        for (size_t i = 0; i < model->headers[f].metadata_count; i++, order++) {
            const fst_string *strings = model->headers[f].metadata + 2 * i;
            pairs[order] = (pair){strings, strings + 1, f, order};
        }
    return pairs;
}

/* The end of a path, for a text that has no room for all of it. */
static const char *tail(const char *path) {
    size_t length = strlen(path);
    return length > PATH_TAIL ? path + length - PATH_TAIL : path;
}

/* Drops pairs that an earlier file has already. */
static fst_status merge_pairs(const fst_model *model, pair *pairs, size_t *count, const char *path,
                              fst_error *error) {
    size_t kept = 1;
    qsort(pairs, *count, sizeof *pairs, compare_pairs);
    for (size_t i = 1; i < *count; i++) {
        const pair *last = &pairs[kept - 1];
        if (compare_strings(last->key, pairs[i].key)) {
            pairs[kept++] = pairs[i];
        } else if (compare_strings(last->value, pairs[i].value)) {
            char key[160]; /* may hold NULs */
            fst_escape(key, sizeof key, last->key->data, last->key->length);
            fst_where where = {path, -1, -1};
            return fst_fail(error, FST_E_CONFLICT, 0, &where, "__metadata__ '%s' differs between %s and %s",
                            key, tail(model->paths.files[last->file]),
                            tail(model->paths.files[pairs[i].file]));
        }
    }
    qsort(pairs, kept, sizeof *pairs, compare_orders);
    *count = kept;
    return FST_OK;
}

static fst_status put_metadata(text_buffer *text, const fst_model *model, const char *path,
                               fst_error *error) {
    size_t count;
    int any;
    pair *pairs = collect_pairs(model, &count, &any);
    fst_status status = FST_OK;
    if (count && !pairs) text->failed = 1;
    else if (count) status = merge_pairs(model, pairs, &count, path, error);
    if (!status && any && !text->failed) {
        put_format(text, "\"__metadata__\":{");
        for (size_t i = 0; i < count; i++) {
            if (i) put(text, ",", 1);
            put_string(text, pairs[i].key->data, pairs[i].key->length);
            put(text, ":", 1);
            put_string(text, pairs[i].value->data, pairs[i].value->length);
        }
        put(text, "}", 1);
    }
    free(pairs);
    return status;
}

/* ---- Header ---------------------------------------------------------------------------------- */

static void put_tensor(text_buffer *text, const fst_model_tensor *tensor, uint64_t begin) {
    const fst_entry *entry = tensor->entry;
    put_string(text, entry->name, entry->name_length);
    put_format(text, ":{\"dtype\":\"%s\",\"shape\":[", fst_dtype_name(tensor->dtype));
    for (uint32_t i = 0; i < entry->ndim; i++) put_format(text, "%s%" PRIu64, i ? "," : "", entry->shape[i]);
    put_format(text, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", begin, begin + tensor->nbytes);
}

/* The length, the JSON, and spaces up to where the data starts. *data_bytes is what must follow. */
static fst_status make_header(const fst_model *model, const char *path, text_buffer *text,
                              uint64_t *data_bytes, fst_error *error) {
    put(text, "\0\0\0\0\0\0\0\0{", 9);
    fst_status status = put_metadata(text, model, path, error);
    if (status) return status;
    uint64_t begin = 0;
    for (size_t i = 0; i < model->count; i++) {
        if (text->used > 9) put(text, ",", 1);
        put_tensor(text, &model->tensors[i], begin);
        begin += model->tensors[i].nbytes;
    }
    put(text, "}", 1);
    while (text->used % DATA_ALIGN && !text->failed) put(text, " ", 1);
    *data_bytes = begin;
    fst_where where = {path, -1, -1};
    if (text->failed) return fst_fail(error, FST_E_MEMORY, ENOMEM, &where, "no memory for the header");
    uint64_t length = text->used - 8;
    if (length > FST_HEADER_MAX)
        return fst_fail(error, FST_E_HEADER_SIZE, 0, &where,
                        "the header would take %" PRIu64 " bytes, over 100,000,000", length);
    for (int i = 0; i < 8; i++) text->data[i] = (char)(length >> (8 * i));
    return FST_OK;
}

/* ---- Writing --------------------------------------------------------------------------------- */

typedef struct writer {
    const fst_model *model;
    const char *path;
    fst_save_options options;
    fst_error *error;
    int fd;
    uint64_t offset, total; /* bytes of the file: written, in all */
    double started, told;
} writer;

static fst_status write_failed(const writer *w, const char *what, int code) {
    fst_where where = {w->path, -1, -1};
    return fst_fail(w->error, FST_E_IO, -code, &where, "cannot %s: %s", what, strerror(-code));
}

static fst_status check_cancel(const writer *w) {
    fst_where where = {w->path, -1, -1};
    return w->options.cancel && __atomic_load_n(w->options.cancel, __ATOMIC_RELAXED)
               ? fst_fail(w->error, FST_E_CANCELLED, 0, &where, "cancelled while writing")
               : FST_OK;
}

static fst_status tell(writer *w, int last) {
    fst_status status = check_cancel(w);
    double now = fst_os_now();
    if (status || !w->options.progress || (!last && now - w->told < TICK_SECONDS)) return status;
    w->told = now;
    double seconds = now - w->started;
    fst_progress progress = {w->offset, w->total, seconds, seconds > 0 ? (double)w->offset / seconds : 0};
    fst_where where = {w->path, -1, -1};
    return w->options.progress(w->options.progress_arg, &progress)
               ? fst_fail(w->error, FST_E_CANCELLED, 0, &where, "cancelled while writing")
               : FST_OK;
}

static fst_status write_piece(writer *w, const void *data, size_t size) {
    int rc = fst_os_write_all(w->fd, data, size, w->offset);
    if (rc) return write_failed(w, "write", rc);
    w->offset += size;
    return tell(w, 0);
}

/* Where the next byte of data comes from. */
typedef struct cursor {
    size_t tensor;
    uint64_t offset;
} cursor;

/* Up to `most` bytes of one tensor, and moves on; NULL after the last. */
static const char *next_piece(const fst_model *model, cursor *at, size_t most, size_t *size) {
    for (; at->tensor < model->count; at->tensor++, at->offset = 0) {
        const fst_model_tensor *tensor = &model->tensors[at->tensor];
        uint64_t left = tensor->nbytes - at->offset;
        if (!left) continue;
        *size = left < most ? (size_t)left : most;
        const char *piece = (const char *)tensor->data + at->offset;
        at->offset += *size;
        return piece;
    }
    return NULL;
}

static fst_status write_from_host(writer *w) {
    fst_status status = FST_OK;
    cursor at = {0};
    size_t size = 0;
    for (const char *piece; !status && (piece = next_piece(w->model, &at, PIECE_BYTES, &size));)
        status = write_piece(w, piece, size);
    return status;
}

typedef struct bounce {
    void *memory;
    int pinned;
    fst_event filled;
    size_t used;
} bounce;

static fst_status gpu_failed(const writer *w, int code, const char *what) {
    return fst_gpu_fail(w->error, w->model->gpu, code, what);
}

/* Queues copies of the next bytes into the buffer; `filled` is recorded behind them. */
static fst_status fill(const writer *w, bounce *slot, cursor *at, fst_queue stream) {
    const fst_gpu *gpu = w->model->gpu;
    size_t size = 0;
    slot->used = 0;
    const char *piece;
    while (slot->used < PIECE_BYTES && (piece = next_piece(w->model, at, PIECE_BYTES - slot->used, &size))) {
        int rc = gpu->calls->to_host(gpu, stream, (char *)slot->memory + slot->used, piece, size);
        if (rc) return gpu_failed(w, rc, "copy to the host");
        slot->used += size;
    }
    int rc = gpu->calls->event_record(gpu, slot->filled, stream);
    return rc ? gpu_failed(w, rc, "record an event") : FST_OK;
}

static fst_status write_through(writer *w, bounce slots[2], fst_queue stream) {
    const fst_gpu *gpu = w->model->gpu;
    cursor at = {0};
    fst_status status = fill(w, &slots[0], &at, stream);
    for (unsigned i = 0; !status && slots[i % 2].used; i++) {
        bounce *slot = &slots[i % 2];
        status = fill(w, &slots[(i + 1) % 2], &at, stream);
        int rc = status ? 0 : gpu->calls->event_wait(gpu, slot->filled);
        if (rc) status = gpu_failed(w, rc, "wait for a copy to the host");
        if (!status) status = write_piece(w, slot->memory, slot->used);
    }
    /* Nothing may be on its way into the buffers when they go. */
    int rc = gpu->calls->stream_wait(gpu, stream);
    return !status && rc ? gpu_failed(w, rc, "wait for copies to the host") : status;
}

static fst_status bounce_make(const writer *w, bounce *slot) {
    const fst_gpu *gpu = w->model->gpu;
    fst_where where = {w->path, -1, -1};
    slot->memory = fst_os_calls.map(PIECE_BYTES);
    if (!slot->memory) return fst_fail(w->error, FST_E_MEMORY, ENOMEM, &where, "no memory for a buffer");
    /* Where the system refuses to pin, copies are slower but right. */
    slot->pinned = gpu->calls->pin(gpu, slot->memory, PIECE_BYTES) == 0;
    int rc = gpu->calls->event_new(gpu, 0, &slot->filled);
    return rc ? gpu_failed(w, rc, "make an event") : FST_OK;
}

static void bounce_free(const fst_gpu *gpu, bounce *slot) {
    if (slot->filled) gpu->calls->event_free(gpu, slot->filled);
    if (slot->pinned) gpu->calls->unpin(gpu, slot->memory);
    if (slot->memory) fst_os_calls.unmap(slot->memory, PIECE_BYTES);
}

static fst_status write_from_device(writer *w) {
    const fst_gpu *gpu = w->model->gpu;
    int saved, rc = gpu->calls->enter(gpu, &saved);
    if (rc) return gpu_failed(w, rc, "use the device");
    fst_queue stream = NULL;
    bounce slots[2] = {0};
    rc = gpu->calls->stream_new(gpu, &stream);
    fst_status status = rc ? gpu_failed(w, rc, "make a stream") : FST_OK;
    for (int i = 0; i < 2 && !status; i++) status = bounce_make(w, &slots[i]);
    if (!status) status = write_through(w, slots, stream);
    for (int i = 0; i < 2; i++) bounce_free(gpu, &slots[i]);
    if (!rc) gpu->calls->stream_free(gpu, stream);
    gpu->calls->leave(gpu, saved);
    return status;
}

static fst_status write_file(writer *w, const text_buffer *header) {
    fst_status status = write_piece(w, header->data, header->used);
    if (!status) status = w->model->gpu->host_access ? write_from_host(w) : write_from_device(w);
    if (!status) status = tell(w, 1);
    if (status) return status;
    int rc = fst_os_calls.fsync(w->fd);
    if (rc) return write_failed(w, "sync", rc);
    return check_cancel(w);
}

/* A device or a directory must not be replaced by a file. */
static fst_status check_target(const writer *w) {
    fst_file_type type;
    fst_where where = {w->path, -1, -1};
    if (fst_os_calls.stat_type(w->path, &type) || type == FST_FILE_REGULAR) return FST_OK;
    return fst_fail(w->error, FST_E_FILE_TYPE, 0, &where, "it exists and is not a regular file");
}

static fst_status replace_file(writer *w, const text_buffer *header) {
    char name[PATH_MAX];
    fst_status status = check_target(w);
    if (status) return status;
    w->fd = fst_os_calls.create_temporary(w->path, name, sizeof name);
    if (w->fd < 0) return write_failed(w, "make a file in that directory", w->fd);
    status = write_file(w, header);
    int rc = fst_os_calls.close(w->fd);
    if (!status && rc) status = write_failed(w, "close", rc);
    rc = status ? 0 : fst_os_calls.rename(name, w->path);
    if (rc) status = write_failed(w, "rename the finished file to this name", rc);
    if (status) fst_os_calls.unlink(name);
    return status;
}

static fst_status save(const fst_model *model, const char *path, const fst_save_options *options,
                       fst_error *error) {
    if (!model) return fst_fail(error, FST_E_ARG, 0, NULL, "model is NULL");
    if (!path || !*path) return fst_fail(error, FST_E_ARG, 0, NULL, "path is empty");
    writer w = {.model = model, .path = path, .error = error, .started = fst_os_now()};
    if (options) {
        if (options->size < sizeof options->size)
            return fst_fail(error, FST_E_ARG, 0, NULL, "fst_save_options.size is not set");
        for (size_t i = sizeof *options; i < options->size; i++)
            if (((const unsigned char *)options)[i])
                return fst_fail(error, FST_E_ARG, 0, NULL, "the options are of a newer version of fst");
        memcpy(&w.options, options, options->size < sizeof w.options ? options->size : sizeof w.options);
    }
    fst_where where = {path, -1, -1};
    if (!model->gpu || model->is_streamed)
        return fst_fail(error, FST_E_NO_DATA, 0, &where, "the model was opened, not loaded: no data");
    text_buffer header = {0};
    uint64_t data_bytes = 0;
    fst_status status = make_header(model, path, &header, &data_bytes, error);
    w.total = header.used + data_bytes;
    if (!status) status = replace_file(&w, &header);
    free(header.data);
    return status;
}

fst_status fst_save(const fst_model *model, const char *path, const fst_save_options *options,
                    fst_error *error) {
    fst_error own;
    memset(&own, 0, sizeof own);
    fst_status status = save(model, path, options, &own);
    if (error) *error = own;
    if (status) fst_set_last_error(&own);
    return status;
}
