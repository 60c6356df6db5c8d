/* Results, byte for byte. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"
#include "load.h"
#include "os.h"

#define ROOM ((size_t)16 << 20)

typedef struct verifying {
    const load_bench *b;
    const load_case *c;
    fst_queue queue;
    unsigned char *got, *want;
    int *fds;
    fst_stream *reference; /* after a cast: what the CPU device makes of the files */
    fst_model *whole;      /* of parts: what the files have */
} verifying;

static void wrong(const verifying *v, const char *name, const char *what) {
    bench_die("%s: tensor %s is wrong: %s", v->c->name, name, what);
}

static void fetch(verifying *v, const fst_tensor *tensor, uint64_t at, size_t size) {
    const fst_gpu *gpu = v->b->gpu;
    if (gpu->calls->to_host(gpu, v->queue, v->got, (unsigned char *)tensor->data + at, size) ||
        gpu->calls->stream_wait(gpu, v->queue))
        bench_die("copying a result back failed");
}

static size_t room_for(const fst_tensor *tensor, uint64_t at) {
    return tensor->nbytes - at < ROOM ? (size_t)(tensor->nbytes - at) : ROOM;
}

/* `want` NULL: as the file has it. */
static void check_tensor(verifying *v, const fst_tensor *tensor, const fst_tensor *want) {
    if (want &&
        (strcmp(want->name, tensor->name) || want->dtype != tensor->dtype || want->nbytes != tensor->nbytes))
        wrong(v, tensor->name, "name, dtype or size");
    if (!want && (tensor->dtype != tensor->stored_dtype || tensor->nbytes != tensor->file_nbytes))
        wrong(v, tensor->name, "not as stored");
    for (uint64_t at = 0; at < tensor->nbytes; at += ROOM) {
        size_t size = room_for(tensor, at);
        const unsigned char *expected = want ? (unsigned char *)want->data + at : v->want;
        if (!want &&
            fst_os_read_all(v->fds[tensor->file], v->want, size, tensor->file_offset + at) != (ssize_t)size)
            bench_die("cannot read %s again", v->c->files->paths[tensor->file]);
        fetch(v, tensor, at, size);
        if (memcmp(v->got, expected, size)) wrong(v, tensor->name, "its bytes");
    }
}

/* Bytes [at, at + size) of a part: of the file, or of the whole tensor, that is in memory. */
static void gather(verifying *v, const fst_tensor *whole, const load_slice *slice, uint64_t at, size_t size) {
    for (size_t done = 0, next; done < size; done += next) {
        next = size - done;
        uint64_t from = load_slice_place(slice, at + done, &next);
        if (whole->data) memcpy(v->want + done, (unsigned char *)whole->data + from, next);
        else if (fst_os_read_all(v->fds[whole->file], v->want + done, next, whole->file_offset + from) !=
                 (ssize_t)next)
            bench_die("cannot read %s again", v->c->files->paths[whole->file]);
    }
}

/* `whole` is the tensor that it is a part of: in the file (no data) or as it should be. */
static void check_part(verifying *v, const fst_tensor *tensor, const fst_tensor *whole) {
    load_slice slice;
    if (strcmp(whole->name, tensor->name) || whole->dtype != tensor->dtype || whole->ndim != tensor->ndim)
        wrong(v, tensor->name, "name, dtype or dimensions");
    if (v->b->quantized) load_slice_said(tensor, whole, &slice);
    else load_slice_of(v->b, v->c->part, whole, &slice);
    for (size_t i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] != ((int32_t)i == slice.dim ? slice.end - slice.begin : whole->shape[i]))
            wrong(v, tensor->name, "its shape");
    if (tensor->nbytes != slice.nbytes) wrong(v, tensor->name, "its size");
    for (uint64_t at = 0; at < tensor->nbytes; at += ROOM) {
        size_t size = room_for(tensor, at);
        gather(v, whole, &slice, at, size);
        fetch(v, tensor, at, size);
        if (memcmp(v->got, v->want, size)) wrong(v, tensor->name, "its bytes");
    }
}

static void check_stored_part(verifying *v, const fst_tensor *tensor) {
    fst_tensor whole;
    if (fst_model_find(v->whole, tensor->name, &whole)) wrong(v, tensor->name, "no file has it");
    check_part(v, tensor, &whole);
}

static void check_next(verifying *v, const fst_tensor *tensor) {
    fst_tensor want;
    fst_error error;
    if (v->reference && fst_stream_next(v->reference, &want, NULL, &error))
        bench_die("%s: %s", error.path, error.text);
    if (v->c->part == LOAD_WHOLE) check_tensor(v, tensor, v->reference ? &want : NULL);
    else if (v->reference) check_part(v, tensor, &want);
    else check_stored_part(v, tensor);
}

static void check_model(verifying *v, const fst_options *options) {
    fst_model *model;
    fst_error error;
    if (fst_load(v->c->files->given, options, &model, &error)) bench_die("%s: %s", error.path, error.text);
    for (size_t i = 0; i < fst_model_count(model); i++) {
        fst_tensor tensor;
        fst_model_at(model, i, &tensor);
        check_next(v, &tensor);
    }
    if (v->whole && !v->reference && fst_model_count(model) != fst_model_count(v->whole))
        bench_die("%s: %zu tensors came, the files have %zu", v->c->name, fst_model_count(model),
                  fst_model_count(v->whole));
    fst_model_free(model);
}

static void open_whole(verifying *v) {
    fst_error error;
    if (fst_open(v->c->files->given, NULL, &v->whole, &error)) bench_die("%s: %s", error.path, error.text);
}

static void check_stream(verifying *v, const fst_options *options) {
    fst_stream *stream;
    fst_error error;
    fst_tensor tensor = {.name = ""};
    size_t count = 0;
    if (fst_stream_open(v->c->files->given, options, &stream, &error))
        bench_die("%s: %s", error.path, error.text);
    for (;; count++) {
        if (fst_stream_next(stream, &tensor, NULL, &error)) bench_die("%s: %s", error.path, error.text);
        if (!tensor.name) break;
        check_next(v, &tensor);
    }
    if (count != fst_model_count(fst_stream_model(stream)))
        bench_die("%s: only %zu tensors came", v->c->name, count);
    fst_stream_close(stream);
}

/* In one thread and smaller pieces: when the CPU is the device under test, at least they are cut elsewhere. */
static void open_reference(verifying *v) {
    fst_options options = FST_OPTIONS_INIT;
    fst_error error;
    options.device = FST_DEVICE_CPU;
    options.cast = v->c->cast;
    options.scale = v->c->scale;
    if (v->b->gpu->host_access) options.threads = 1, options.slot_bytes = 192u << 10;
    if (fst_stream_open(v->c->files->given, &options, &v->reference, &error))
        bench_die("%s: %s", error.path, error.text);
}

void load_verify(load_bench *b, const load_case *c) {
    const fst_gpu *gpu = b->gpu;
    verifying v = {.b = b, .c = c, .got = bench_pinned(gpu, ROOM), .want = malloc(ROOM)};
    fst_options options;
    v.fds = calloc(c->files->count + 1, sizeof *v.fds);
    if (!v.fds || !v.want) bench_die("out of memory");
    for (size_t i = 0; i < c->files->count; i++)
        if ((v.fds[i] = open(c->files->paths[i], O_RDONLY | O_CLOEXEC)) < 0)
            bench_die("cannot open %s", c->files->paths[i]);
    if (gpu->calls->stream_new(gpu, &v.queue)) bench_die("no stream");
    load_prepare(b, c);
    load_set_options(b, c, &options);
    if (c->part != LOAD_WHOLE) open_whole(&v);
    if (c->cast != FST_NATIVE) open_reference(&v);
    if (c->stream) check_stream(&v, &options);
    else check_model(&v, &options);
    fst_stream_close(v.reference);
    fst_model_free(v.whole);
    gpu->calls->stream_free(gpu, v.queue);
    bench_pinned_free(gpu, v.got, ROOM);
    free(v.want);
    for (size_t i = 0; i < c->files->count; i++) close(v.fds[i]);
    free(v.fds);
}
