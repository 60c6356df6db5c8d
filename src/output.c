/* Text, headers of .safetensors files, and the way of data from a device to the host. */
#include "output.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "os.h"

#define PATH_TAIL 120

/* ---- Text ------------------------------------------------------------------------------------ */

void fst_put(fst_text *text, const char *data, size_t size) {
    if (size == 0) return;
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

void fst_put_format(fst_text *text, const char *format, ...) {
    char line[128];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    fst_put(text, line, (size_t)length);
}

void fst_put_string(fst_text *text, const char *data, size_t length) {
    fst_put(text, "\"", 1);
    size_t start = 0;
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)data[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        fst_put(text, data + start, i - start);
        if (c == '"' || c == '\\') fst_put(text, (char[]){'\\', (char)c}, 2);
        else fst_put_format(text, "\\u%04x", c);
        start = i + 1;
    }
    fst_put(text, data + start, length - start);
    fst_put(text, "\"", 1);
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

static fst_status conflict(const fst_model *model, const pair *a, const pair *b, const char *path,
                           fst_error *error) {
    char key[160]; /* may hold NULs */
    fst_escape(key, sizeof key, a->key->data, a->key->length);
    fst_where where = {path, -1, -1};
    return fst_fail(error, FST_E_CONFLICT, 0, &where, "__metadata__ '%s' differs between %s and %s", key,
                    tail(model->paths.files[a->file]), tail(model->paths.files[b->file]));
}

/* Drops pairs that an earlier file has already; those of a key with two values are a conflict, or dropped, too. */
static fst_status merge_pairs(const fst_model *model, pair *pairs, size_t *count, int drops, const char *path,
                              fst_error *error) {
    size_t kept = 0;
    qsort(pairs, *count, sizeof *pairs, compare_pairs);
    for (size_t i = 0, next; i < *count; i = next) {
        int differs = 0;
        for (next = i + 1; next < *count && !compare_strings(pairs[i].key, pairs[next].key); next++) {
            if (!compare_strings(pairs[i].value, pairs[next].value)) continue;
            if (!drops) return conflict(model, &pairs[i], &pairs[next], path, error);
            differs = 1;
        }
        if (!differs) pairs[kept++] = pairs[i];
    }
    qsort(pairs, kept, sizeof *pairs, compare_orders);
    *count = kept;
    return FST_OK;
}

static int is_format(const pair *p) { return p->key->length == 6 && !memcmp(p->key->data, "format", 6); }

static void put_pairs(fst_text *text, const pair *pairs, size_t count, int for_torch) {
    int has_format = 0;
    fst_put_format(text, "\"__metadata__\":{");
    for (size_t i = 0; i < count; i++) {
        if (i) fst_put(text, ",", 1);
        fst_put_string(text, pairs[i].key->data, pairs[i].key->length);
        fst_put(text, ":", 1);
        fst_put_string(text, pairs[i].value->data, pairs[i].value->length);
        has_format |= is_format(&pairs[i]);
    }
    if (for_torch && !has_format) fst_put_format(text, "%s\"format\":\"pt\"", count ? "," : "");
    fst_put(text, "}", 1);
}

fst_status fst_merge_metadata(const fst_model *model, const char *path, int for_torch, fst_text *out,
                              fst_error *error) {
    size_t count;
    int any;
    pair *pairs = collect_pairs(model, &count, &any);
    fst_status status = FST_OK;
    if (count && !pairs) out->failed = 1;
    else if (count) status = merge_pairs(model, pairs, &count, for_torch, path, error);
    if (!status && (any || for_torch) && !out->failed) put_pairs(out, pairs, count, for_torch);
    free(pairs);
    return status;
}

/* ---- Headers --------------------------------------------------------------------------------- */

#define HEADER_BEGIN 9 /* the length, and a brace */

void fst_put_header_begin(fst_text *text, const fst_text *metadata) {
    text->failed |= metadata->failed;
    fst_put(text, "\0\0\0\0\0\0\0\0{", HEADER_BEGIN);
    if (metadata->used) fst_put(text, metadata->data, metadata->used);
}

void fst_put_tensor(fst_text *text, const fst_model_tensor *tensor, uint64_t begin) {
    const fst_entry *entry = tensor->entry;
    if (text->used > HEADER_BEGIN) fst_put(text, ",", 1);
    fst_put_string(text, entry->name, entry->name_length);
    fst_put_format(text, ":{\"dtype\":\"%s\",\"shape\":[", fst_dtype_name(tensor->dtype));
    for (uint32_t i = 0; i < entry->ndim; i++)
        fst_put_format(text, "%s%" PRIu64, i ? "," : "", entry->shape[i]);
    fst_put_format(text, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", begin, begin + tensor->nbytes);
}

fst_status fst_put_header_end(fst_text *text, const char *path, fst_error *error) {
    fst_put(text, "}", 1);
    while (text->used % FST_DATA_ALIGN && !text->failed) fst_put(text, " ", 1);
    fst_where where = {path, -1, -1};
    if (text->failed) return fst_fail(error, FST_E_MEMORY, ENOMEM, &where, "no memory for the header");
    uint64_t length = text->used - 8;
    if (length > FST_HEADER_MAX)
        return fst_fail(error, FST_E_HEADER_SIZE, 0, &where,
                        "the header would take %" PRIu64 " bytes, over 100,000,000", length);
    for (int i = 0; i < 8; i++) text->data[i] = (char)(length >> (8 * i));
    return FST_OK;
}

/* ---- Data ------------------------------------------------------------------------------------ */

static fst_status gpu_failed(const fst_sink *sink, int code, const char *what) {
    return fst_gpu_fail(sink->error, sink->gpu, code, what);
}

static fst_status slot_make(const fst_sink *sink, fst_sink_slot *slot) {
    const fst_gpu *gpu = sink->gpu;
    fst_where where = {sink->path, -1, -1};
    slot->memory = fst_os_calls.map(FST_SINK_BUFFER);
    if (!slot->memory) return fst_fail(sink->error, FST_E_MEMORY, ENOMEM, &where, "no memory for a buffer");
    /* Where the system refuses to pin, copies are slower but right. */
    slot->pinned = gpu->calls->pin(gpu, slot->memory, FST_SINK_BUFFER) == 0;
    int rc = gpu->calls->event_new(gpu, 0, &slot->filled);
    return rc ? gpu_failed(sink, rc, "make an event") : FST_OK;
}

static void slot_free(const fst_gpu *gpu, fst_sink_slot *slot) {
    if (slot->filled) gpu->calls->event_free(gpu, slot->filled);
    if (slot->pinned) gpu->calls->unpin(gpu, slot->memory);
    if (slot->memory) fst_os_calls.unmap(slot->memory, FST_SINK_BUFFER);
}

fst_status fst_sink_open(fst_sink *sink) {
    const fst_gpu *gpu = sink->gpu;
    if (gpu->host_access) return FST_OK;
    int rc = gpu->calls->enter(gpu, &sink->saved);
    if (rc) return gpu_failed(sink, rc, "use the device");
    sink->entered = 1;
    rc = gpu->calls->stream_new(gpu, &sink->stream);
    if (rc) {
        sink->stream = NULL;
        return gpu_failed(sink, rc, "make a stream");
    }
    fst_status status = FST_OK;
    for (int i = 0; i < 2 && !status; i++) status = slot_make(sink, &sink->slots[i]);
    return status;
}

static fst_status put_from_host(fst_sink *sink, const char *data, uint64_t nbytes) {
    fst_status status = FST_OK;
    while (nbytes && !status) {
        size_t size = nbytes < sink->piece_bytes ? (size_t)nbytes : sink->piece_bytes;
        status = sink->take(sink->arg, data, size);
        data += size;
        nbytes -= size;
    }
    return status;
}

/* Hands on what is in a slot, if anything. */
static fst_status drain(fst_sink *sink, fst_sink_slot *slot) {
    const fst_gpu *gpu = sink->gpu;
    if (!slot->used) return FST_OK;
    int rc = gpu->calls->event_wait(gpu, slot->filled);
    if (rc) return gpu_failed(sink, rc, "wait for a copy to the host");
    fst_status status = put_from_host(sink, slot->memory, slot->used);
    slot->used = 0;
    return status;
}

static fst_status record(fst_sink *sink, fst_sink_slot *slot) {
    int rc = sink->gpu->calls->event_record(sink->gpu, slot->filled, sink->stream);
    return rc ? gpu_failed(sink, rc, "record an event") : FST_OK;
}

/* The current slot is full: it is filled behind everybody's back, while the other one is handed on. */
static fst_status next_slot(fst_sink *sink) {
    fst_status status = record(sink, &sink->slots[sink->current]);
    sink->current = !sink->current;
    return status ? status : drain(sink, &sink->slots[sink->current]);
}

fst_status fst_sink_put(fst_sink *sink, const void *data, uint64_t nbytes) {
    const fst_gpu *gpu = sink->gpu;
    const char *from = data;
    if (gpu->host_access) return put_from_host(sink, from, nbytes);
    while (nbytes) {
        fst_sink_slot *slot = &sink->slots[sink->current];
        size_t room = FST_SINK_BUFFER - slot->used, size = nbytes < room ? (size_t)nbytes : room;
        sink->busy = 1;
        int rc = gpu->calls->to_host(gpu, sink->stream, (char *)slot->memory + slot->used, from, size);
        if (rc) return gpu_failed(sink, rc, "copy to the host");
        slot->used += size;
        from += size;
        nbytes -= size;
        fst_status status = slot->used == FST_SINK_BUFFER ? next_slot(sink) : FST_OK;
        if (status) return status;
    }
    return FST_OK;
}

fst_status fst_sink_settle(fst_sink *sink) {
    if (sink->gpu->host_access) return FST_OK;
    int rc = sink->gpu->calls->stream_wait(sink->gpu, sink->stream);
    sink->busy = 0;
    return rc ? gpu_failed(sink, rc, "wait for copies to the host") : FST_OK;
}

fst_status fst_sink_flush(fst_sink *sink) {
    if (sink->gpu->host_access) return FST_OK;
    fst_sink_slot *last = &sink->slots[sink->current];
    fst_status status = last->used ? record(sink, last) : FST_OK;
    if (!status) status = drain(sink, &sink->slots[!sink->current]);
    return status ? status : drain(sink, last);
}

void fst_sink_close(fst_sink *sink) {
    const fst_gpu *gpu = sink->gpu;
    if (!sink->entered) return;
    if (sink->busy) gpu->calls->stream_wait(gpu, sink->stream);
    for (int i = 0; i < 2; i++) slot_free(gpu, &sink->slots[i]);
    if (sink->stream) gpu->calls->stream_free(gpu, sink->stream);
    gpu->calls->leave(gpu, sink->saved);
    sink->entered = 0;
}
