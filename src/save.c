/* Writes a model as a .safetensors file. The header is made in memory; the data goes out in the order
 * of the tensors. */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "os.h"
#include "output.h"

#define PIECE_BYTES ((size_t)8 << 20) /* what is written in one go */
#define TICK_SECONDS 0.05

/* The length, the JSON, and spaces up to where the data starts. *data_bytes is what must follow. */
static fst_status make_header(const fst_model *model, const char *path, fst_text *text, uint64_t *data_bytes,
                              fst_error *error) {
    fst_text metadata = {0};
    fst_status status = fst_merge_metadata(model, path, 0, &metadata, error);
    uint64_t begin = 0;
    if (!status) fst_put_header_begin(text, &metadata);
    free(metadata.data);
    if (status) return status;
    for (size_t i = 0; i < model->count; i++) {
        fst_put_tensor(text, &model->tensors[i], begin);
        begin += model->tensors[i].nbytes;
    }
    *data_bytes = begin;
    return fst_put_header_end(text, path, error);
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

static fst_status take(void *arg, const void *data, size_t size) { return write_piece(arg, data, size); }

static fst_status write_data(writer *w) {
    const fst_model *model = w->model;
    fst_sink sink = {.gpu = model->gpu,
                     .piece_bytes = PIECE_BYTES,
                     .take = take,
                     .arg = w,
                     .path = w->path,
                     .error = w->error};
    fst_status status = fst_sink_open(&sink);
    for (size_t i = 0; i < model->count && !status; i++)
        status = fst_sink_put(&sink, model->tensors[i].data, model->tensors[i].nbytes);
    if (!status) status = fst_sink_flush(&sink);
    /* A copy that went wrong may be known only now. */
    if (!status) status = fst_sink_settle(&sink);
    fst_sink_close(&sink);
    return status;
}

static fst_status write_file(writer *w, const fst_text *header) {
    fst_status status = write_piece(w, header->data, header->used);
    if (!status) status = write_data(w);
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

static fst_status replace_file(writer *w, const fst_text *header) {
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
    fst_text header = {0};
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
