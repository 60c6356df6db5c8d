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

/* `want` NULL: as the file has it. */
static void check_tensor(verifying *v, const fst_tensor *tensor, const fst_tensor *want) {
    if (want &&
        (strcmp(want->name, tensor->name) || want->dtype != tensor->dtype || want->nbytes != tensor->nbytes))
        wrong(v, tensor->name, "name, dtype or size");
    if (!want && (tensor->dtype != tensor->stored_dtype || tensor->nbytes != tensor->file_nbytes))
        wrong(v, tensor->name, "not as stored");
    for (uint64_t at = 0; at < tensor->nbytes; at += ROOM) {
        size_t size = tensor->nbytes - at < ROOM ? (size_t)(tensor->nbytes - at) : ROOM;
        const unsigned char *expected = want ? (unsigned char *)want->data + at : v->want;
        if (!want &&
            fst_os_read_all(v->fds[tensor->file], v->want, size, tensor->file_offset + at) != (ssize_t)size)
            bench_die("cannot read %s again", v->c->files->paths[tensor->file]);
        fetch(v, tensor, at, size);
        if (memcmp(v->got, expected, size)) wrong(v, tensor->name, "its bytes");
    }
}

static void check_next(verifying *v, const fst_tensor *tensor) {
    fst_tensor want;
    fst_error error;
    if (v->reference && fst_stream_next(v->reference, &want, NULL, &error))
        bench_die("%s: %s", error.path, error.text);
    check_tensor(v, tensor, v->reference ? &want : NULL);
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
    fst_model_free(model);
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
    load_set_options(c, b->o.device, &options);
    if (c->cast != FST_NATIVE) open_reference(&v);
    if (c->stream) check_stream(&v, &options);
    else check_model(&v, &options);
    fst_stream_close(v.reference);
    gpu->calls->stream_free(gpu, v.queue);
    bench_pinned_free(gpu, v.got, ROOM);
    free(v.want);
    for (size_t i = 0; i < c->files->count; i++) close(v.fds[i]);
    free(v.fds);
}
