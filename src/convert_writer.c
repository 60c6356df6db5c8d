/* The thread that writes a conversion's files, one after the other, while the next tensors are converted. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checkpoint.h"
#include "convert.h"
#include "os.h"

#define PIECE_BYTES ((size_t)1 << 20) /* hashed and written while it is in the cache */
#define WAIT_NS 20000000

/* ---- One file ------------------------------------------------------------------------------------- */

static fst_status failed(const char *path, int code, const char *what, fst_error *error) {
    fst_where where = {path, -1, -1};
    return fst_fail(error, FST_E_IO, -code, &where, "cannot %s: %s", what, strerror(-code));
}

/* A piece of the file; it takes all of them, in order. */
static fst_status take(void *arg, const void *data, size_t size) {
    fst_convert_job *c = arg;
    fst_shard_writer *w = &c->writer;
    const volatile int *cancel = c->options.cancel;
    if (cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED))
        return fst_fail(&w->error, FST_E_CANCELLED, 0, NULL, "cancelled while writing");
    double start = fst_os_now();
    fst_hash_add(w->hash, data, size);
    int code = fst_os_write_all(w->fd, data, size, w->offset);
    w->write_seconds += fst_os_now() - start;
    if (code) return failed(c->journal.files[w->shard].name, code, "write", &w->error);
    w->offset += size;
    __atomic_fetch_add(&c->bytes_done, size, __ATOMIC_RELAXED);
    return FST_OK;
}

static fst_status begin_shard(fst_convert_job *c, size_t shard) {
    fst_shard_writer *w = &c->writer;
    fst_text header = {0};
    fst_status status = fst_shard_header(c, shard, &header, &w->error);
    w->shard = shard;
    w->offset = 0;
    if (!status && (w->fd = fst_os_calls.create(c->shard_partial)) < 0)
        status = failed(c->shard_partial, w->fd, "make a file of this name", &w->error);
    fst_hash_begin(w->hash);
    if (!status) status = take(c, header.data, header.used);
    free(header.data);
    return status;
}

/* The file gets its name once it is on the storage, and is in the journal from then on. */
static fst_status end_shard(fst_convert_job *c) {
    fst_shard_writer *w = &c->writer;
    fst_journal_file *file = &c->journal.files[w->shard];
    fst_status status = fst_sink_flush(&w->sink);
    if (status) return status;
    double start = fst_os_now();
    char *path = fst_join(c->output, file->name);
    if (!path) return fst_fail(&w->error, FST_E_MEMORY, ENOMEM, NULL, "out of memory");
    int code = fst_os_calls.fsync(w->fd);
    int closed = fst_os_calls.close(w->fd);
    w->fd = -1;
    if (!code) code = closed;
    if (!code) code = fst_os_calls.rename(c->shard_partial, path);
    if (code) status = failed(path, code, "finish this file", &w->error);
    free(path);
    if (status) return status;
    file->size = w->offset;
    file->hash = fst_hash_end(w->hash);
    file->done = 1;
    status = fst_journal_write(c->journal_path, c->partial, &c->journal, &w->error);
    w->sync_seconds += fst_os_now() - start;
    return status;
}

static fst_status write_result(fst_convert_job *c, const fst_written *item) {
    fst_shard_writer *w = &c->writer;
    size_t shard = c->shard_of[item->result];
    const fst_shard *its = &c->shards[shard];
    fst_status status = item->result == its->first ? begin_shard(c, shard) : FST_OK;
    if (!status) status = fst_sink_put(&w->sink, item->data, c->model->tensors[item->result].nbytes);
    if (!status) status = fst_sink_settle(&w->sink);
    if (!status && item->result + 1 == its->first + its->count) status = end_shard(c);
    return status;
}

/* ---- The thread ----------------------------------------------------------------------------------- */

/* The next result, or 0: there are no more. *write: it is to be written, and not only let go. */
static int next_item(fst_shard_writer *w, fst_written *item, int *write) {
    pthread_mutex_lock(&w->lock);
    while (w->put == w->taken && !w->ended) pthread_cond_wait(&w->changed, &w->lock);
    int more = w->put != w->taken;
    if (more) *item = w->queue[w->taken++ % FST_WRITER_QUEUE];
    *write = !w->failed && !w->abandoned;
    pthread_mutex_unlock(&w->lock);
    return more;
}

static void *run(void *arg) {
    fst_convert_job *c = arg;
    fst_shard_writer *w = &c->writer;
    fst_written item = {0};
    int write;
    fst_status status = fst_sink_open(&w->sink);
    while (next_item(w, &item, &write)) {
        if (!status && write) status = write_result(c, &item);
        fst_block_drop(item.block);
        pthread_mutex_lock(&w->lock);
        w->done++;
        w->failed |= status != FST_OK;
        pthread_cond_broadcast(&w->changed);
        pthread_mutex_unlock(&w->lock);
    }
    fst_sink_close(&w->sink);
    if (w->fd >= 0) {
        fst_os_calls.close(w->fd);
        fst_os_calls.unlink(c->shard_partial);
    }
    return NULL;
}

static void make_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

fst_status fst_writer_begin(fst_convert_job *c) {
    fst_shard_writer *w = &c->writer;
    sigset_t all, before;
    w->error = (fst_error){.file = -1, .offset = -1};
    w->fd = -1;
    w->sink = (fst_sink){.gpu = c->model->gpu,
                         .piece_bytes = PIECE_BYTES,
                         .take = take,
                         .arg = c,
                         .path = c->output,
                         .error = &w->error};
    w->hash = fst_hash_new();
    if (!w->hash) return fst_fail(c->error, FST_E_MEMORY, ENOMEM, NULL, "out of memory");
    pthread_mutex_init(&w->lock, NULL);
    make_condition(&w->changed);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = pthread_create(&w->thread, NULL, run, c);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!code) return FST_OK;
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->changed);
    fst_hash_free(w->hash);
    return fst_fail(c->error, FST_E_MEMORY, code, NULL, "no thread to write with: %s", strerror(code));
}

int fst_writer_put(fst_shard_writer *w, size_t result, fst_block *block, const void *data) {
    pthread_mutex_lock(&w->lock);
    int room = w->put - w->done < FST_WRITER_QUEUE;
    if (room) w->queue[w->put++ % FST_WRITER_QUEUE] = (fst_written){result, data, block};
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    return room;
}

size_t fst_writer_wait(fst_shard_writer *w, size_t done) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += WAIT_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&w->lock);
    if (w->done <= done && w->put != w->done) pthread_cond_timedwait(&w->changed, &w->lock, &until);
    size_t now = w->failed ? SIZE_MAX : w->done;
    pthread_mutex_unlock(&w->lock);
    return now;
}

int fst_writer_failed(fst_shard_writer *w) {
    pthread_mutex_lock(&w->lock);
    int failed_before = w->failed;
    pthread_mutex_unlock(&w->lock);
    return failed_before;
}

int fst_writer_is_idle(fst_shard_writer *w) {
    pthread_mutex_lock(&w->lock);
    int idle = w->failed || w->put == w->done;
    pthread_mutex_unlock(&w->lock);
    return idle;
}

fst_status fst_writer_end(fst_convert_job *c, int abandon) {
    fst_shard_writer *w = &c->writer;
    pthread_mutex_lock(&w->lock);
    w->ended = 1;
    w->abandoned = abandon;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->changed);
    fst_hash_free(w->hash);
    if (!abandon && w->error.status) *c->error = w->error;
    return w->error.status;
}
