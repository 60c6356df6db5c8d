/* The journal of a conversion, and the hashes in it. */
#include "journal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <yyjson.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "os.h"

#define JOURNAL_MAX ((uint64_t)256 << 20)

static fst_status no_memory(fst_error *error) {
    return fst_fail(error, FST_E_MEMORY, ENOMEM, NULL, "out of memory");
}

static fst_status io_failed(const char *path, int code, const char *what, fst_error *error) {
    fst_where where = {path, -1, -1};
    return fst_fail(error, FST_E_IO, -code, &where, "cannot %s: %s", what, strerror(-code));
}

/* ---- Hashes ---------------------------------------------------------------------------------- */

struct fst_hash {
    XXH3_state_t *state;
};

fst_hash *fst_hash_new(void) {
    fst_hash *hash = malloc(sizeof *hash);
    if (hash && !(hash->state = XXH3_createState())) {
        free(hash);
        hash = NULL;
    }
    return hash;
}

void fst_hash_begin(fst_hash *hash) { XXH3_64bits_reset(hash->state); }

void fst_hash_add(fst_hash *hash, const void *data, size_t size) {
    XXH3_64bits_update(hash->state, data, size);
}

uint64_t fst_hash_end(const fst_hash *hash) { return XXH3_64bits_digest(hash->state); }

void fst_hash_free(fst_hash *hash) {
    if (!hash) return;
    XXH3_freeState(hash->state);
    free(hash);
}

/* ---- Reading --------------------------------------------------------------------------------- */

static fst_status read_all(const char *path, char **data, size_t *size, fst_error *error) {
    int fd = fst_os_calls.open_read(path);
    *data = NULL;
    if (fd == -ENOENT) return FST_OK;
    if (fd < 0) return io_failed(path, fd, "open it", error);
    fst_file_id id;
    fst_file_type type;
    fst_status status = FST_OK;
    int code = fst_os_calls.identify(fd, &id, &type);
    if (code < 0) {
        status = io_failed(path, code, "look at it", error);
    } else if (type == FST_FILE_REGULAR && id.size <= JOURNAL_MAX) {
        *data = malloc((size_t)id.size + 1);
        ssize_t got = *data ? fst_os_read_all(fd, *data, (size_t)id.size, 0) : 0;
        if (!*data) status = no_memory(error);
        else if (got < 0) status = io_failed(path, (int)got, "read it", error);
        else (*data)[ *size = (size_t)got] = 0;
    }
    fst_os_calls.close(fd);
    return status;
}

/* A name that leads nowhere but into the directory: what is listed may be removed. */
static int is_inside(const char *name) {
    if (!*name || *name == '/') return 0;
    for (const char *part = name; part; part = strchr(part, '/')) {
        part += *part == '/';
        if (!strncmp(part, "..", 2) && (!part[2] || part[2] == '/')) return 0;
    }
    return 1;
}

/* One line that is a file; *good: it is. */
static fst_status read_line(const char *line, size_t length, fst_journal_file *out, int *good,
                            fst_error *error) {
    yyjson_read_err why = {0};
    yyjson_doc *doc =
        yyjson_read_opts((char *)(uintptr_t)line, length, YYJSON_READ_ALLOW_INVALID_UNICODE, NULL, &why);
    yyjson_val *root = yyjson_doc_get_root(doc);
    yyjson_val *name = yyjson_obj_get(root, "name"), *size = yyjson_obj_get(root, "size");
    const char *hash = yyjson_get_str(yyjson_obj_get(root, "xxh3"));
    *good = yyjson_is_str(name) && yyjson_get_len(name) == strlen(yyjson_get_str(name)) &&
            is_inside(yyjson_get_str(name));
    fst_status status = !doc && why.code == YYJSON_READ_ERROR_MEMORY_ALLOCATION ? no_memory(error) : FST_OK;
    if (*good && !(out->name = strdup(yyjson_get_str(name)))) status = no_memory(error);
    out->done = hash && yyjson_is_uint(size);
    if (out->done) {
        out->size = yyjson_get_uint(size);
        out->hash = strtoull(hash, NULL, 16);
    }
    yyjson_doc_free(doc);
    return status;
}

static fst_status read_lines(char *data, size_t size, fst_journal *out, fst_error *error) {
    size_t lines = 0;
    for (size_t i = 0; i < size; i++) lines += data[i] == '\n';
    char *at = memchr(data, '\n', size), *end = data + size;
    if (!at) return FST_OK;
    out->files = calloc(lines, sizeof *out->files);
    out->head_length = (size_t)(at - data);
    out->head = malloc(out->head_length + 1);
    if (!out->files || !out->head) return no_memory(error);
    memcpy(out->head, data, out->head_length);
    out->head[out->head_length] = 0;
    int good = 1;
    for (char *next; ++at < end; at = next) {
        next = memchr(at, '\n', (size_t)(end - at));
        if (!next) break;
        fst_status status = read_line(at, (size_t)(next - at), &out->files[out->count], &good, error);
        if (status) return status;
        if (!good) break;
        out->count++;
    }
    return FST_OK;
}

fst_status fst_journal_read(const char *path, fst_journal *out, fst_error *error) {
    char *data;
    size_t size = 0;
    memset(out, 0, sizeof *out);
    fst_status status = read_all(path, &data, &size, error);
    if (!status && data) status = read_lines(data, size, out, error);
    free(data);
    return status;
}

void fst_journal_free(fst_journal *journal) {
    for (size_t i = 0; i < journal->count; i++) free(journal->files[i].name);
    free(journal->files);
    free(journal->head);
    memset(journal, 0, sizeof *journal);
}

/* ---- Writing --------------------------------------------------------------------------------- */

fst_status fst_replace_file(const char *path, const char *partial, const fst_text *text, fst_error *error) {
    if (text->failed) return no_memory(error);
    int fd = fst_os_calls.create(partial);
    if (fd < 0) return io_failed(partial, fd, "make a file of this name", error);
    int code = fst_os_write_all(fd, text->data, text->used, 0);
    if (!code) code = fst_os_calls.fsync(fd);
    int closed = fst_os_calls.close(fd);
    if (!code) code = closed;
    if (!code) code = fst_os_calls.rename(partial, path);
    return code ? io_failed(path, code, "write it", error) : FST_OK;
}

fst_status fst_journal_write(const char *path, const char *partial, const fst_journal *journal,
                             fst_error *error) {
    fst_text text = {0};
    fst_put(&text, journal->head, journal->head_length);
    fst_put(&text, "\n", 1);
    for (size_t i = 0; i < journal->count; i++) {
        const fst_journal_file *file = &journal->files[i];
        fst_put_format(&text, "{\"name\":");
        fst_put_string(&text, file->name, strlen(file->name));
        if (file->done)
            fst_put_format(&text, ",\"size\":%" PRIu64 ",\"xxh3\":\"%016" PRIx64 "\"", file->size,
                           file->hash);
        fst_put_format(&text, "}\n");
    }
    fst_status status = fst_replace_file(path, partial, &text, error);
    free(text.data);
    return status;
}

fst_status fst_put_identity(fst_text *text, const char *path, fst_error *error) {
    int fd = fst_os_calls.open_read(path);
    if (fd == -ENOENT || fd == -ENOTDIR) return FST_OK;
    if (fd < 0) return io_failed(path, fd, "open it", error);
    fst_file_id id;
    fst_file_type type;
    int code = fst_os_calls.identify(fd, &id, &type);
    fst_os_calls.close(fd);
    if (code < 0) return io_failed(path, code, "look at it", error);
    fst_put_format(text, "{\"path\":");
    fst_put_string(text, path, strlen(path));
    fst_put_format(text, ",\"size\":%" PRIu64 ",\"mtime_ns\":%" PRId64 ",\"ctime_ns\":%" PRId64 "}", id.size,
                   id.mtime_ns, id.ctime_ns);
    return FST_OK;
}
