/* Opens the files of a load: paths, headers, indexes, and the list of the tensors that count. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "configs.h"
#include "loading.h"
#include "os.h"
#include "quantize.h"
#include "state.h"

#define FILES_EACH 4u /* so many are opened sooner than a thread is started */
#define MOST_OPENERS 16u
#define AHEAD 16u /* names */

static fst_status file_fail(fst_loading *l, size_t file, int code, const char *what, fst_error *error) {
    fst_where where = {fst_file_path(l->model, file), (int)file, -1};
    return fst_fail(error, FST_E_IO, -code, &where, "%s: %s", what, strerror(-code));
}

/* Hashed where headers are read, by several threads. */
static fst_status hash_names(fst_loading *l, size_t file, fst_error *error) {
    const fst_header *header = &l->model->headers[file];
    uint64_t *hashes = l->hashes[file] = malloc((header->count + 1) * sizeof *hashes);
    if (!hashes) return fst_no_memory(error);
    for (size_t i = 0; i < header->count; i++)
        hashes[i] = fst_model_hash(l->model, header->tensors[i].name, header->tensors[i].name_length);
    return FST_OK;
}

static fst_status read_header(fst_loading *l, size_t file, fst_error *error) {
    const char *path = fst_file_path(l->model, file);
    uint64_t size = l->ids[file].size, length;
    unsigned char first[8];
    ssize_t got = fst_os_read_all(l->fds[file], first, size < 8 ? (size_t)size : 8, 0);
    if (got < 0) return file_fail(l, file, (int)got, "reading its header", error);
    fst_status status =
        fst_header_length(first, (uint64_t)got < 8 ? (uint64_t)got : size, path, (int)file, &length, error);
    if (status) return status;
    char *json = malloc((size_t)length + 8);
    if (!json) return fst_no_memory(error);
    got = fst_os_read_all(l->fds[file], json, (size_t)length, 8);
    if (got < 0) {
        status = file_fail(l, file, (int)got, "reading its header", error);
    } else if ((uint64_t)got < length) {
        fst_where where = {path, (int)file, 8 + got};
        status = fst_fail(error, FST_E_CHANGED, 0, &where,
                          "the file ends here, inside its header: it was cut short while it was read");
    } else {
        memset(json + length, 0, 8);
        status =
            fst_header_parse(json, (size_t)length, size, path, (int)file, &l->model->headers[file], error);
    }
    free(json);
    return status ? status : hash_names(l, file, error);
}

static fst_status open_file(fst_loading *l, size_t file, fst_error *error) {
    fst_where where = {fst_file_path(l->model, file), (int)file, -1};
    fst_file_type type;
    int fd = fst_os_calls.open_read(where.path);
    if (fd < 0) return file_fail(l, file, fd, "opening it", error);
    l->fds[file] = fd;
    /* Only what is asked for: readahead behind a header would read data that may come past the cache a second time. */
    fst_os_calls.advise(fd, 0, 0, FST_ADVICE_RANDOM);
    int code = fst_os_calls.identify(fd, &l->ids[file], &type);
    if (code < 0) return file_fail(l, file, code, "looking at it", error);
    if (type != FST_FILE_REGULAR) return fst_fail(error, FST_E_FILE_TYPE, 0, &where, "not a regular file");
    return read_header(l, file, error);
}

/* Files that are opened by several threads at once. The error of the first file that has one is the load's, as if they
 * were opened in their order. */
typedef struct opening {
    fst_loading *l;
    atomic_size_t next;
    pthread_mutex_t lock;
    atomic_size_t failed; /* the first file that did */
    fst_error error;
} opening;

static void *open_some(void *arg) {
    opening *o = arg;
    for (;;) {
        size_t i = atomic_fetch_add(&o->next, 1);
        fst_error error = {.file = -1, .offset = -1};
        if (i >= o->l->model->paths.count || i > atomic_load(&o->failed)) return NULL;
        if (open_file(o->l, i, &error) == FST_OK) continue;
        pthread_mutex_lock(&o->lock);
        if (i < atomic_load(&o->failed)) {
            atomic_store(&o->failed, i);
            o->error = error;
        }
        pthread_mutex_unlock(&o->lock);
    }
}

/* The caller's thread, and some more when there are many files; fewer will do when no more are to be had. */
static fst_status open_files(fst_loading *l) {
    opening o = {.l = l, .failed = SIZE_MAX, .lock = PTHREAD_MUTEX_INITIALIZER};
    size_t wanted = l->model->paths.count / FILES_EACH, cpus = fst_os_cpus(), started = 0;
    pthread_t threads[MOST_OPENERS];
    sigset_t all, before;
    if (wanted > cpus) wanted = cpus;
    if (wanted > MOST_OPENERS) wanted = MOST_OPENERS;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started + 1 < wanted && pthread_create(&threads[started], NULL, open_some, &o) == 0) started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    open_some(&o);
    for (size_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&o.lock);
    if (o.failed == SIZE_MAX) return FST_OK;
    *l->error = o.error;
    return o.error.status;
}

/* An index decides which tensors of its files count: what it does not list is left out, what it lists and
 * its file lacks is an error. */
static int compare_listed(const void *a, const void *b) {
    const struct fst_listed *x = a, *y = b;
    size_t length = x->length < y->length ? x->length : y->length;
    int order = memcmp(x->name, y->name, length);
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

/* Most loads ask for nothing that a choice would have to say of each tensor: there are none then. */
static fst_status make_choices(fst_loading *l) {
    size_t size = (l->total + 1) * sizeof *l->choices;
    if (l->choices) return FST_OK;
    if (!(l->choices = fst_os_array(size))) return fst_no_memory(l->error);
    memset(l->choices, 0, size);
    return FST_OK;
}

static fst_status apply_index(fst_loading *l) {
    fst_model *model = l->model;
    const fst_paths *paths = &model->paths;
    fst_status status = FST_OK;
    const struct fst_listed *next = paths->listed, *end = next + paths->listed_count;
    size_t at = 0;
    unsigned char *found;
    if (paths->listed_count == 0) return FST_OK;
    found = calloc(paths->listed_count, 1);
    if (!found) return fst_no_memory(l->error);
    for (size_t file = 0; file < paths->count && !status; file++) {
        const fst_header *header = &model->headers[file];
        for (size_t i = 0; i < header->count && !status; i++, at++) {
            if (!paths->indexed[file]) continue;
            struct fst_listed key = {header->tensors[i].name, header->tensors[i].name_length, 0};
            /* Most headers have names in the order of the index. */
            const struct fst_listed *listed = next;
            if (next == end || compare_listed(&key, next))
                listed = bsearch(&key, paths->listed, paths->listed_count, sizeof key, compare_listed);
            if (listed) next = listed + 1;
            if (listed && listed->file == file) {
                found[listed - paths->listed] = 1;
                continue;
            }
            status = make_choices(l);
            if (!status) l->choices[at].skip = 1;
        }
    }
    for (size_t i = 0; i < paths->listed_count && !status; i++) {
        const struct fst_listed *listed = &paths->listed[i];
        if (found[i]) continue;
        fst_where where = {fst_file_path(model, listed->file), (int)listed->file, -1};
        status = fst_fail(l->error, FST_E_INDEX, 0, &where,
                          "the index says that tensor \"%s\" is in this file, but it is not", listed->name);
    }
    free(found);
    return status;
}

fst_status fst_loading_empty_names(fst_loading *l) {
    fst_model *model = l->model;
    free(model->names);
    model->names_size = 16;
    while (model->names_size < model->count * 2) model->names_size *= 2;
    model->names = fst_os_array(model->names_size * sizeof *model->names);
    if (!model->names) return fst_no_memory(l->error);
    memset(model->names, 0, model->names_size * sizeof *model->names);
    return FST_OK;
}

fst_status fst_loading_fill_names(fst_loading *l) {
    fst_model *model = l->model;
    if (fst_loading_empty_names(l)) return l->error->status;
    for (size_t i = 0; i < model->count; i++) {
        /* Slots are anywhere: they are fetched before they are wanted. */
        if (model->count - i > AHEAD)
            __builtin_prefetch(&model->names[model->tensors[i + AHEAD].hash & (model->names_size - 1)], 1);
        const fst_model_tensor *tensor = &model->tensors[i];
        size_t at = fst_model_slot(model, tensor->hash, tensor->entry->name, tensor->entry->name_length);
        if (model->names[at].index) {
            const fst_model_tensor *other = &model->tensors[model->names[at].index - 1];
            fst_where where = {fst_file_path(model, tensor->file), (int)tensor->file,
                               (int64_t)(model->headers[tensor->file].data_start + tensor->entry->begin)};
            return fst_fail(l->error, FST_E_DUPLICATE, 0, &where,
                            "tensor \"%s\" is also in %s; load the files one by one, or by their index",
                            tensor->entry->name, fst_file_path(model, other->file));
        }
        model->names[at] = (fst_model_name){(uint32_t)(i + 1), (uint32_t)(tensor->hash >> 32)};
    }
    return FST_OK;
}

/* The tensors that count, in the order of files and offsets; without data yet. */
static fst_status list_tensors(fst_loading *l) {
    fst_model *model = l->model;
    size_t at = 0;
    if (l->total >= UINT32_MAX) return fst_no_memory(l->error);
    model->tensors = fst_os_array((l->total + 1) * sizeof *model->tensors);
    if (!model->tensors) return fst_no_memory(l->error);
    for (size_t file = 0; file < model->paths.count; file++) {
        const fst_header *header = &model->headers[file];
        for (size_t i = 0; i < header->count; i++, at++) {
            const fst_entry *entry = &header->tensors[i];
            if (l->choices && l->choices[at].skip) continue;
            model->tensors[model->count] = (fst_model_tensor){.entry = entry,
                                                              .file = (uint32_t)file,
                                                              .dtype = entry->dtype,
                                                              .nbytes = entry->end - entry->begin,
                                                              .planned = (uint32_t)model->count,
                                                              .hash = l->hashes[file][i]};
            model->count++;
        }
    }
    fst_status status = fst_loading_choose(l);
    model->stats.tensors_ignored = l->total - model->count;
    return status ? status : fst_loading_fill_names(l);
}

/* What of small companions must be known before planning. */
#define MOST_SMALL ((uint64_t)64 << 20)

fst_status fst_loading_read_tensor(fst_loading *l, uint32_t tensor, unsigned char **out, fst_error *error) {
    const fst_model_tensor *t = &l->model->tensors[tensor];
    const fst_entry *entry = t->entry;
    uint64_t start = l->model->headers[t->file].data_start + entry->begin, size = entry->end - entry->begin;
    fst_where where = {fst_file_path(l->model, t->file), (int)t->file, (int64_t)start};
    *out = NULL;
    if (size > MOST_SMALL)
        return fst_fail(error, FST_E_QUANTIZED, 0, &where,
                        "tensor \"%s\": %llu bytes are too many to describe a weight", entry->name,
                        (unsigned long long)size);
    unsigned char *bytes = malloc((size_t)size + 1);
    if (!bytes) return fst_no_memory(error);
    bytes[size] = 0;
    ssize_t got = fst_os_read_all(l->fds[t->file], bytes, (size_t)size, start);
    if (got == (ssize_t)size) {
        *out = bytes;
        return FST_OK;
    }
    free(bytes);
    if (got < 0)
        return fst_fail(error, FST_E_IO, (int)-got, &where, "reading tensor \"%s\": %s", entry->name,
                        strerror((int)-got));
    where.offset += got;
    return fst_fail(error, FST_E_CHANGED, 0, &where,
                    "the file ends here, inside tensor \"%s\": it was cut short during the load",
                    entry->name);
}

/* How the model is quantized. */
static fst_status find_scheme(fst_loading *l, fst_error *error) {
    fst_model *model = l->model;
    fst_configs configs;
    fst_status status = fst_configs_read(model->paths.files[0], l->options.config, &configs, error);
    model->scheme = calloc(1, sizeof *model->scheme);
    if (!status && !model->scheme) status = fst_no_memory(error);
    if (!status) status = fst_scheme_find(model, configs.texts, model->scheme, error);
    fst_configs_free(&configs);
    return status ? status : fst_loading_read_companions(l, error);
}

/* What companions must say before the weights that become something else can be planned. */
static fst_status read_states(fst_loading *l) {
    fst_scheme *scheme = l->model->scheme;
    uint32_t tensor = 0;
    for (size_t i = 0; i < l->total; i++) {
        if (l->choices[i].skip) continue;
        uint32_t index = tensor++;
        if (scheme->roles[index] != FST_ROLE_CODES || l->choices[i].cast == FST_NATIVE) continue;
        fst_quantized *weight = &scheme->weights[scheme->owner[index]];
        unsigned char *bytes;
        if (fst_state_tensor(weight) == FST_NO_TENSOR) continue;
        fst_status status = fst_loading_read_tensor(l, fst_state_tensor(weight), &bytes, l->error);
        if (!status) status = fst_state_apply(l->model, weight, bytes, l->error);
        free(bytes);
        if (status) return status;
    }
    return FST_OK;
}

/* Scales of activations are kept in a cast. */
static void apply_scheme(fst_loading *l) {
    const fst_scheme *scheme = l->model->scheme;
    size_t tensor = 0;
    for (size_t i = 0; i < l->total; i++) {
        if (l->choices[i].skip) continue;
        if (scheme->roles[tensor++] == FST_ROLE_KEPT) l->choices[i].cast = FST_NATIVE;
    }
}

/* A load as stored needs to know nothing of it, unless it cuts; an open fails for nothing that is wrong with it. */
static fst_status understand(fst_loading *l) {
    fst_model *model = l->model;
    model->quantization_error.file = -1;
    if (l->opens_only) {
        fst_status status = find_scheme(l, &model->quantization_error);
        if (status != FST_E_MEMORY) return FST_OK;
        *l->error = model->quantization_error;
        return status;
    }
    if (l->options.cast == FST_NATIVE && !l->options.rule && !fst_loading_is_cut(l)) return FST_OK;
    fst_status status = find_scheme(l, l->error);
    if (status) return status;
    model->stats.bare_weights = model->scheme->bare;
    apply_scheme(l);
    return read_states(l);
}

fst_status fst_loading_open(fst_loading *l, const char *const *files) {
    fst_model *model = l->model;
    fst_status status = fst_paths_resolve(files, &model->paths, l->error);
    if (status) return status;
    size_t count = model->paths.count;
    model->headers = calloc(count + 1, sizeof *model->headers);
    l->fds = malloc((count + 1) * sizeof *l->fds);
    l->ids = calloc(count + 1, sizeof *l->ids);
    for (size_t i = 0; l->fds && i < count; i++) l->fds[i] = -1;
    l->hashes = calloc(count + 1, sizeof *l->hashes);
    if (!model->headers || !l->fds || !l->ids || !l->hashes) return fst_no_memory(l->error);
    if (getrandom(model->hash_key, sizeof model->hash_key, GRND_NONBLOCK) < 0)
        model->hash_key[0] =
            (uint64_t)(uintptr_t)model ^ (uint64_t)(fst_os_now() * 1e9); /* early in the boot */
    status = open_files(l);
    if (status) return status;
    for (size_t i = 0; i < count; i++) {
        l->total += model->headers[i].count;
        l->header_bytes += model->headers[i].data_start;
    }
    const fst_options *options = &l->options;
    if (options->cast != FST_NATIVE || options->rule || options->shards || l->unwanted)
        status = make_choices(l);
    if (!status) status = apply_index(l);
    if (!status) status = list_tensors(l);
    return status ? status : understand(l);
}

fst_status fst_loading_check_files(fst_loading *l) {
    for (size_t i = 0; i < l->model->paths.count; i++) {
        fst_where where = {fst_file_path(l->model, i), (int)i, -1};
        fst_file_id now;
        fst_file_type type;
        int code = fst_os_calls.identify(l->fds[i], &now, &type);
        if (code < 0) return file_fail(l, i, code, "looking at it again", l->error);
        const fst_file_id *was = &l->ids[i];
        /* An unlink, or a rename over the path, moves ctime along with the count of links: what was read is
         * still the file that was opened. ctime alone tells of a write whose mtime was set back. */
        int written = now.size != was->size || now.mtime_ns != was->mtime_ns ||
                      (now.ctime_ns != was->ctime_ns && now.links == was->links);
        if (written || now.inode != was->inode || now.device != was->device)
            return fst_fail(l->error, FST_E_CHANGED, 0, &where,
                            "the file changed while it was loaded; load it again");
    }
    return FST_OK;
}

void fst_loading_close(fst_loading *l) {
    for (size_t i = 0; l->fds && i < l->model->paths.count; i++)
        if (l->fds[i] >= 0) fst_os_calls.close(l->fds[i]);
    for (size_t i = 0; l->hashes && i < l->model->paths.count; i++) free(l->hashes[i]);
    free(l->hashes);
    free(l->fds);
    free(l->ids);
    for (size_t i = 0; l->choices && l->options.rule && i < l->total; i++) free((void *)l->choices[i].into);
    free(l->choices);
    l->fds = NULL;
    l->hashes = NULL;
}
