/* Models: opening, loading, access, ownership. */
#include "model.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "dtype.h"
#include "os.h"
#include "pipeline.h"
#include "plan.h"

#define GPU_PLACE ((uint64_t)256 << 10) /* copies smaller than this cost more than their bytes do */
#define CPU_PLACE ((uint64_t)64 << 10)  /* likewise for reads */

/* So large that there are few, so small that the first is there soon. */
uint64_t fst_block_bytes = (uint64_t)256 << 20;

/* ---- Blocks ---------------------------------------------------------------------------------- */

void fst_block_hold(fst_block *block) {
    atomic_fetch_add_explicit(&block->references, 1, memory_order_relaxed);
}

void fst_block_drop(fst_block *block) {
    if (!block || atomic_fetch_sub_explicit(&block->references, 1, memory_order_acq_rel) != 1) return;
    block->gpu->calls->free_block(block->gpu, block->data, block->nbytes);
    free(block);
}

static fst_status block_new(const fst_gpu *gpu, uint64_t nbytes, fst_block **out, fst_error *error) {
    fst_block *block = calloc(1, sizeof *block);
    if (!block) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    int code = gpu->calls->alloc_block(gpu, nbytes, &block->data);
    if (code) {
        free(block);
        char what[64];
        snprintf(what, sizeof what, "allocating %llu bytes for tensors", (unsigned long long)nbytes);
        return fst_gpu_fail(error, gpu, code, what);
    }
    atomic_init(&block->references, 1);
    block->gpu = gpu;
    block->nbytes = nbytes;
    *out = block;
    return FST_OK;
}

/* ---- Opening --------------------------------------------------------------------------------- */

/* What a load needs besides the model, all of it gone when the call returns. */
typedef struct loading {
    fst_model *model;
    fst_error *error;
    int *fds; /* -1: not open */
    fst_file_id *ids;
    unsigned char *skip; /* of each tensor of each file: left out */
    size_t total;        /* tensors in all headers */
    uint64_t header_bytes;
} loading;

static fst_status no_memory(fst_error *error) {
    return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
}

static const char *file_path(const fst_model *model, size_t file) { return model->paths.files[file]; }

static fst_status file_fail(loading *l, size_t file, int code, const char *what) {
    fst_where where = {file_path(l->model, file), (int)file, -1};
    return fst_fail(l->error, FST_E_IO, -code, &where, "%s: %s", what, strerror(-code));
}

static fst_status read_header(loading *l, size_t file) {
    const char *path = file_path(l->model, file);
    uint64_t size = l->ids[file].size, length;
    unsigned char first[8];
    ssize_t got = fst_os_read_all(l->fds[file], first, size < 8 ? (size_t)size : 8, 0);
    if (got < 0) return file_fail(l, file, (int)got, "reading its header");
    fst_status status = fst_header_length(first, (uint64_t)got < 8 ? (uint64_t)got : size, path, (int)file,
                                          &length, l->error);
    if (status) return status;
    char *json = malloc((size_t)length + 8);
    if (!json) return no_memory(l->error);
    got = fst_os_read_all(l->fds[file], json, (size_t)length, 8);
    if (got < 0) {
        status = file_fail(l, file, (int)got, "reading its header");
    } else if ((uint64_t)got < length) {
        fst_where where = {path, (int)file, 8 + got};
        status = fst_fail(l->error, FST_E_CHANGED, 0, &where,
                          "the file ends here, inside its header: it was cut short while it was read");
    } else {
        memset(json + length, 0, 8);
        l->header_bytes += 8 + length;
        status =
            fst_header_parse(json, (size_t)length, size, path, (int)file, &l->model->headers[file], l->error);
    }
    free(json);
    return status;
}

static fst_status open_file(loading *l, size_t file) {
    fst_where where = {file_path(l->model, file), (int)file, -1};
    fst_file_type type;
    int fd = fst_os_calls.open_read(where.path);
    if (fd < 0) return file_fail(l, file, fd, "opening it");
    l->fds[file] = fd;
    int code = fst_os_calls.identify(fd, &l->ids[file], &type);
    if (code < 0) return file_fail(l, file, code, "looking at it");
    if (type != FST_FILE_REGULAR) return fst_fail(l->error, FST_E_FILE_TYPE, 0, &where, "not a regular file");
    return read_header(l, file);
}

/* An index decides which tensors of its files count: what it does not list is left out, what it lists and
 * its file lacks is an error. */
static int compare_listed(const void *a, const void *b) {
    const struct fst_listed *x = a, *y = b;
    size_t length = x->length < y->length ? x->length : y->length;
    int order = memcmp(x->name, y->name, length);
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

static fst_status apply_index(loading *l) {
    fst_model *model = l->model;
    const fst_paths *paths = &model->paths;
    unsigned char *skip = l->skip, *found;
    if (paths->listed_count == 0) return FST_OK;
    found = calloc(paths->listed_count, 1);
    if (!found) return no_memory(l->error);
    for (size_t file = 0; file < paths->count; file++) {
        const fst_header *header = &model->headers[file];
        for (size_t i = 0; i < header->count; i++, skip++) {
            if (!paths->indexed[file]) continue;
            struct fst_listed key = {header->tensors[i].name, header->tensors[i].name_length, 0};
            const struct fst_listed *listed =
                bsearch(&key, paths->listed, paths->listed_count, sizeof key, compare_listed);
            *skip = !listed || listed->file != file;
            if (!*skip) found[listed - paths->listed] = 1;
        }
    }
    fst_status status = FST_OK;
    for (size_t i = 0; i < paths->listed_count && !status; i++) {
        const struct fst_listed *listed = &paths->listed[i];
        if (found[i]) continue;
        fst_where where = {file_path(model, listed->file), (int)listed->file, -1};
        status = fst_fail(l->error, FST_E_INDEX, 0, &where,
                          "the index says that tensor \"%s\" is in this file, but it is not", listed->name);
    }
    free(found);
    return status;
}

static uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }

static void sip_round(uint64_t v[4]) {
    v[0] += v[1], v[1] = rotate(v[1], 13) ^ v[0], v[0] = rotate(v[0], 32);
    v[2] += v[3], v[3] = rotate(v[3], 16) ^ v[2];
    v[0] += v[3], v[3] = rotate(v[3], 21) ^ v[0];
    v[2] += v[1], v[1] = rotate(v[1], 17) ^ v[2], v[2] = rotate(v[2], 32);
}

/* SipHash-1-3 (Aumasson and Bernstein) under the model's own random key: names come from files, and a file made to
 * let all its names collide would take hours. */
static uint64_t hash_name(const fst_model *model, const char *name, size_t length) {
    uint64_t k0 = model->hash_key[0], k1 = model->hash_key[1], word = 0;
    uint64_t v[4] = {k0 ^ 0x736f6d6570736575u, k1 ^ 0x646f72616e646f6du, k0 ^ 0x6c7967656e657261u,
                     k1 ^ 0x7465646279746573u};
    for (size_t i = 0; i <= length; i++) {
        word |= (uint64_t)(i < length ? (unsigned char)name[i] : length & 0xFF)
                << (i == length ? 56 : 8 * (i % 8));
        if (i % 8 != 7 && i != length) continue;
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
        word = 0;
    }
    v[2] ^= 0xFF;
    for (int i = 0; i < 3; i++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* The slot of the table that has this name, or the free one where it would go. */
static size_t find_slot(const fst_model *model, const char *name, size_t length) {
    size_t at = (size_t)hash_name(model, name, length) & (model->names_size - 1);
    for (; model->names[at]; at = (at + 1) & (model->names_size - 1)) {
        const fst_entry *entry = model->tensors[model->names[at] - 1].entry;
        if (entry->name_length == length && memcmp(entry->name, name, length) == 0) break;
    }
    return at;
}

static fst_status fill_names(loading *l) {
    fst_model *model = l->model;
    if (getrandom(model->hash_key, sizeof model->hash_key, GRND_NONBLOCK) < 0)
        model->hash_key[0] =
            (uint64_t)(uintptr_t)model ^ (uint64_t)(fst_os_now() * 1e9); /* early in the boot */
    model->names_size = 16;
    while (model->names_size < model->count * 2) model->names_size *= 2;
    model->names = calloc(model->names_size, sizeof *model->names);
    if (!model->names) return no_memory(l->error);
    for (size_t i = 0; i < model->count; i++) {
        const fst_model_tensor *tensor = &model->tensors[i];
        size_t at = find_slot(model, tensor->entry->name, tensor->entry->name_length);
        if (model->names[at]) {
            const fst_model_tensor *other = &model->tensors[model->names[at] - 1];
            fst_where where = {file_path(model, tensor->file), (int)tensor->file,
                               (int64_t)(model->headers[tensor->file].data_start + tensor->entry->begin)};
            return fst_fail(l->error, FST_E_DUPLICATE, 0, &where,
                            "tensor \"%s\" is also in %s; load the files one by one, or by their index",
                            tensor->entry->name, file_path(model, other->file));
        }
        model->names[at] = (uint32_t)(i + 1);
    }
    return FST_OK;
}

/* The tensors that count, in the order of files and offsets; without data yet. */
static fst_status list_tensors(loading *l) {
    fst_model *model = l->model;
    const unsigned char *skip = l->skip;
    if (l->total >= UINT32_MAX) return no_memory(l->error);
    model->tensors = calloc(l->total ? l->total : 1, sizeof *model->tensors);
    if (!model->tensors) return no_memory(l->error);
    for (size_t file = 0; file < model->paths.count; file++) {
        const fst_header *header = &model->headers[file];
        for (size_t i = 0; i < header->count; i++) {
            const fst_entry *entry = &header->tensors[i];
            if (*skip++) continue;
            model->tensors[model->count++] = (fst_model_tensor){.entry = entry,
                                                                .file = (uint32_t)file,
                                                                .dtype = entry->dtype,
                                                                .nbytes = entry->end - entry->begin};
        }
    }
    model->stats.tensors_ignored = l->total - model->count;
    return fill_names(l);
}

static fst_status open_all(loading *l, const char *const *files) {
    fst_model *model = l->model;
    fst_status status = fst_paths_resolve(files, &model->paths, l->error);
    if (status) return status;
    size_t count = model->paths.count;
    model->headers = calloc(count + 1, sizeof *model->headers);
    l->fds = malloc((count + 1) * sizeof *l->fds);
    l->ids = calloc(count + 1, sizeof *l->ids);
    for (size_t i = 0; l->fds && i < count; i++) l->fds[i] = -1;
    if (!model->headers || !l->fds || !l->ids) return no_memory(l->error);
    for (size_t i = 0; i < count && !status; i++) {
        status = open_file(l, i);
        l->total += model->headers[i].count;
    }
    if (status) return status;
    l->skip = calloc(l->total + 1, 1);
    if (!l->skip) return no_memory(l->error);
    status = apply_index(l);
    return status ? status : list_tensors(l);
}

static void loading_end(loading *l) {
    for (size_t i = 0; l->fds && i < l->model->paths.count; i++)
        if (l->fds[i] >= 0) fst_os_calls.close(l->fds[i]);
    free(l->fds);
    free(l->ids);
    free(l->skip);
}

/* ---- Loading --------------------------------------------------------------------------------- */

static fst_status check_unchanged(loading *l) {
    for (size_t i = 0; i < l->model->paths.count; i++) {
        fst_where where = {file_path(l->model, i), (int)i, -1};
        fst_file_id now;
        fst_file_type type;
        int code = fst_os_calls.identify(l->fds[i], &now, &type);
        if (code < 0) return file_fail(l, i, code, "looking at it again");
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

/* What the pipeline needs to allocate blocks while it runs. */
typedef struct allocation {
    loading *l;
    const fst_plan *plan;
    void **addresses;
    double seconds;
} allocation;

static fst_status allocate_block(void *arg, size_t i, fst_error *error) {
    allocation *a = arg;
    fst_model *model = a->l->model;
    double start = fst_os_now();
    fst_status status = block_new(model->gpu, a->plan->blocks[i], &model->blocks[i], error);
    a->seconds += fst_os_now() - start;
    if (status) return status;
    model->blocks_count++;
    a->addresses[i] = model->blocks[i]->data;
    return FST_OK;
}

/* Blocks are allocated while the first chunks are read, if there is plenty of memory; otherwise all of them, before
 * anything is read. */
static fst_status allocate_now(allocation *a) {
    const fst_gpu *gpu = a->l->model->gpu;
    uint64_t available = 0, total;
    size_t count = a->plan->blocks_count;
    if (gpu->calls->memory(gpu, &available, &total) == 0 && available / 2 >= a->plan->bytes_blocks &&
        count > 1)
        count = 1;
    for (size_t i = 0; i < count; i++) {
        fst_status status = allocate_block(a, i, a->l->error);
        if (status) return status;
    }
    return FST_OK;
}

static const char *what_limited(const fst_gpu *gpu, const fst_stats *stats,
                                const fst_pipeline_stats *pipeline) {
    double spread = stats->threads ? 1.0 / stats->threads : 1;
    double waited = pipeline->wait_seconds * spread, read = pipeline->read_seconds * spread;
    double kernels = pipeline->kernel_seconds * spread;
    if (stats->allocate_seconds > waited + read + kernels) return "allocation";
    if (gpu->host_access) return kernels > read ? "kernel" : "read";
    if (read >= waited) return "read";
    return pipeline->launch_ms > pipeline->copy_ms ? "kernel" : "copy";
}

static void fill_stats(loading *l, const fst_plan *plan, const fst_engine_facts *facts,
                       const fst_pipeline_stats *pipeline) {
    fst_model *model = l->model;
    fst_stats *stats = &model->stats;
    stats->bytes_read = l->header_bytes + pipeline->bytes_read;
    stats->bytes_out = plan->bytes_out;
    stats->device = model->gpu->label;
    stats->device_name = model->gpu->name;
    stats->device_reason = model->device_reason;
    stats->peak_device_bytes = plan->bytes_blocks + facts->staging_bytes;
    stats->pinned_bytes = facts->pinned_bytes;
    stats->threads = facts->threads;
    stats->slots = facts->slots;
    stats->slot_bytes = facts->slot_bytes;
    stats->chunks = pipeline->chunks;
    stats->launches = pipeline->launches;
    stats->read_seconds = pipeline->read_seconds;
    stats->wait_seconds = pipeline->wait_seconds;
    stats->kernel_seconds = pipeline->kernel_seconds;
    stats->limit = what_limited(model->gpu, stats, pipeline);
}

static fst_status run_plan(loading *l, const fst_options *options, const fst_plan *plan, fst_engine *engine,
                           double started, fst_pipeline_stats *pipeline) {
    fst_model *model = l->model;
    allocation blocks = {l, plan, calloc(plan->blocks_count + 1, sizeof *blocks.addresses), 0};
    model->blocks = calloc(plan->blocks_count + 1, sizeof *model->blocks);
    fst_status status = model->blocks && blocks.addresses ? allocate_now(&blocks) : no_memory(l->error);
    fst_load_job job = {
        .plan = plan,
        .headers = model->headers,
        .fds = l->fds,
        .paths = (const char *const *)model->paths.files,
        .blocks = blocks.addresses,
        .blocks_ready = model->blocks_count,
        .allocate = allocate_block,
        .allocate_arg = &blocks,
        .flags = options->flags,
        .progress = options->progress,
        .progress_arg = options->progress_arg,
        .cancel = options->cancel,
        .started = started,
        .bytes_total = plan->bytes_read,
    };
    if (!status) status = fst_pipeline_run(engine, &job, pipeline, l->error);
    model->stats.allocate_seconds += blocks.seconds;
    free(blocks.addresses);
    return status;
}

static void place_tensors(fst_model *model, const fst_plan *plan) {
    for (size_t i = 0; i < model->count; i++) {
        const fst_plan_tensor *planned = &plan->tensors[i];
        model->tensors[i].dtype = planned->dtype;
        model->tensors[i].nbytes = planned->nbytes;
        model->tensors[i].block = model->blocks[planned->block];
        model->tensors[i].block_offset = planned->block_offset;
    }
}

static fst_status load_data(loading *l, const fst_options *options, double started) {
    fst_model *model = l->model;
    fst_engine_config config = {options->threads, options->slot_bytes};
    fst_engine_facts facts = {0};
    fst_pipeline_stats pipeline = {0};
    fst_engine *engine = NULL;
    fst_plan plan = {0};
    int saved, code = model->gpu->calls->enter(model->gpu, &saved);
    if (code) return fst_gpu_fail(l->error, model->gpu, code, "choosing the device");

    double before = fst_os_now();
    fst_status status = fst_engine_take(model->gpu, &config, &engine, &facts, l->error);
    double engine_seconds = fst_os_now() - before;
    if (!status) {
        fst_plan_options plan_options = {options->cast, facts.slot_bytes,
                                         model->gpu->host_access ? CPU_PLACE : GPU_PLACE, fst_block_bytes};
        status = fst_plan_make(model->headers, (const char *const *)model->paths.files, model->paths.count,
                               l->skip, &plan_options, &plan, l->error);
    }
    model->stats.open_seconds = fst_os_now() - started - engine_seconds;
    model->stats.allocate_seconds = engine_seconds;
    if (!status) status = run_plan(l, options, &plan, engine, started, &pipeline);
    if (!status) status = check_unchanged(l);
    if (!status) {
        place_tensors(model, &plan);
        fst_engine_describe(engine, &facts);
        fill_stats(l, &plan, &facts, &pipeline);
    }
    fst_plan_free(&plan);
    if (engine) fst_engine_put(engine);
    model->gpu->calls->leave(model->gpu, saved);
    return status;
}

static fst_status check_options(const char *const *files, const fst_options *given, fst_options *options,
                                fst_error *error) {
    memset(options, 0, sizeof *options);
    if (!files || !files[0]) return fst_fail(error, FST_E_ARG, 0, NULL, "no files are named");
    if (given) {
        if (given->size < sizeof given->size)
            return fst_fail(error, FST_E_ARG, 0, NULL,
                            "fst_options.size is not set: begin with FST_OPTIONS_INIT");
        /* A caller built against a newer header may use options that this library does not have. */
        for (size_t i = sizeof *options; i < given->size; i++)
            if (((const unsigned char *)given)[i])
                return fst_fail(error, FST_E_ARG, 0, NULL, "the options are of a newer version of fst");
        memcpy(options, given, given->size < sizeof *options ? given->size : sizeof *options);
    }
    if ((int)options->cast < 0 || options->cast >= FST_DTYPE_COUNT)
        return fst_fail(error, FST_E_ARG, 0, NULL, "%d is no dtype to cast to", (int)options->cast);
    if (options->device < 0)
        return fst_fail(error, FST_E_ARG, 0, NULL, "device %d: want FST_DEVICE_AUTO, _CPU or _GPU(n)",
                        options->device);
    if (options->flags & ~(unsigned)FST_NON_SATURATING)
        return fst_fail(error, FST_E_ARG, 0, NULL, "unknown flags %#x", options->flags);
    if (options->slot_bytes && (options->slot_bytes < 64u << 10 || options->slot_bytes > 64u << 20))
        return fst_fail(error, FST_E_ARG, 0, NULL, "slots of %zu bytes: want 64 KiB to 64 MiB",
                        options->slot_bytes);
    return FST_OK;
}

static fst_status load_or_open(const char *const *files, const fst_options *given, int with_data,
                               fst_model **out, fst_error *error) {
    double started = fst_os_now();
    fst_error mine = {.status = FST_OK, .file = -1, .offset = -1};
    fst_options options;
    loading l = {.error = &mine};
    fst_status status = out ? FST_OK : fst_fail(&mine, FST_E_ARG, 0, NULL, "there is no place for the model");
    if (out) *out = NULL;
    if (!status) status = check_options(files, given, &options, &mine);
    if (!status && !(l.model = calloc(1, sizeof *l.model))) status = no_memory(&mine);
    if (!status) {
        status = open_all(&l, files);
        l.model->stats.bytes_read = l.header_bytes;
        l.model->stats.open_seconds = fst_os_now() - started;
        if (!status && with_data) {
            status = fst_gpu_find(options.device, &l.model->gpu, l.model->device_reason,
                                  sizeof l.model->device_reason, &mine);
            if (!status) status = load_data(&l, &options, started);
        }
        loading_end(&l);
    }
    if (status) {
        fst_model_free(l.model);
        fst_set_last_error(&mine);
        if (error) *error = mine;
        return status;
    }
    l.model->stats.seconds = fst_os_now() - started;
    *out = l.model;
    return FST_OK;
}

fst_status fst_load(const char *const *files, const fst_options *options, fst_model **out, fst_error *error) {
    return load_or_open(files, options, 1, out, error);
}

fst_status fst_open(const char *const *files, const fst_options *options, fst_model **out, fst_error *error) {
    return load_or_open(files, options, 0, out, error);
}

fst_model *fst_load_cast(const char *const *files, fst_dtype target) {
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model;
    options.cast = target;
    return fst_load(files, &options, &model, NULL) == FST_OK ? model : NULL;
}

void fst_model_free(fst_model *model) {
    if (!model) return;
    for (size_t i = 0; i < model->blocks_count; i++) fst_block_drop(model->blocks[i]);
    for (size_t i = 0; model->headers && i < model->paths.count; i++) fst_header_free(&model->headers[i]);
    fst_paths_free(&model->paths);
    free(model->headers);
    free(model->tensors);
    free(model->names);
    free(model->blocks);
    free(model);
}

void fst_release_cached(void) { fst_engines_release(); }

/* ---- Access ---------------------------------------------------------------------------------- */

static fst_status fail_access(fst_status status, const char *text, const char *name) {
    fst_error error;
    fst_fail(&error, status, 0, NULL, text, name);
    fst_set_last_error(&error);
    return status;
}

size_t fst_model_count(const fst_model *model) { return model ? model->count : 0; }

fst_status fst_model_at(const fst_model *model, size_t i, fst_tensor *out) {
    if (out) memset(out, 0, sizeof *out);
    if (!model || !out || i >= model->count)
        return fail_access(FST_E_ARG, "%s: no model, no place for the result, or no such index",
                           "fst_model_at");
    const fst_model_tensor *tensor = &model->tensors[i];
    const fst_entry *entry = tensor->entry;
    out->name = entry->name;
    out->dtype = tensor->dtype;
    out->stored_dtype = entry->dtype;
    out->ndim = entry->ndim;
    out->shape = entry->shape;
    out->data = tensor->block ? (unsigned char *)tensor->block->data + tensor->block_offset : NULL;
    out->nbytes = tensor->nbytes;
    out->file = (int)tensor->file;
    out->file_offset = model->headers[tensor->file].data_start + entry->begin;
    out->file_nbytes = entry->end - entry->begin;
    return FST_OK;
}

size_t fst_model_index(const fst_model *model, const char *name) {
    if (!model || !name) return (size_t)-1;
    uint32_t found = model->names[find_slot(model, name, strlen(name))];
    return found ? found - 1 : (size_t)-1;
}

fst_status fst_model_find(const fst_model *model, const char *name, fst_tensor *out) {
    size_t i = fst_model_index(model, name);
    if (out) memset(out, 0, sizeof *out);
    if (!model || !name || !out)
        return fail_access(FST_E_ARG, "%s: no model, no name, or no place for the result", "fst_model_find");
    if (i == (size_t)-1) return fail_access(FST_E_NOT_FOUND, "there is no tensor \"%s\"", name);
    return fst_model_at(model, i, out);
}

size_t fst_model_file_count(const fst_model *model) { return model ? model->paths.count : 0; }

const char *fst_model_file_path(const fst_model *model, size_t file) {
    return model && file < model->paths.count ? model->paths.files[file] : NULL;
}

int fst_model_has_metadata(const fst_model *model, size_t file) {
    return model && file < model->paths.count && model->headers[file].has_metadata;
}

size_t fst_model_metadata_count(const fst_model *model, size_t file) {
    return model && file < model->paths.count ? model->headers[file].metadata_count : 0;
}

fst_status fst_model_metadata_at(const fst_model *model, size_t file, size_t i, fst_string *key,
                                 fst_string *value) {
    if (key) *key = (fst_string){NULL, 0};
    if (value) *value = (fst_string){NULL, 0};
    if (!key || !value || i >= fst_model_metadata_count(model, file))
        return fail_access(FST_E_ARG, "%s: no such file or pair, or no place for it",
                           "fst_model_metadata_at");
    *key = model->headers[file].metadata[2 * i];
    *value = model->headers[file].metadata[2 * i + 1];
    return FST_OK;
}

fst_status fst_model_stats(const fst_model *model, fst_stats *out) {
    if (!model || !out || out->size < sizeof out->size)
        return fail_access(FST_E_ARG, "%s: no model, or the size of the statistics is not set",
                           "fst_model_stats");
    size_t size = out->size;
    size_t known = size < sizeof model->stats ? size : sizeof model->stats;
    memset(out, 0, size);
    memcpy(out, &model->stats, known);
    out->size = size;
    return FST_OK;
}
