/* fst_load and fst_open; what streams share with them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loading.h"
#include "quantize.h"
#include "shard.h"

#define GPU_PLACE ((uint64_t)256 << 10) /* copies smaller than this cost more than their bytes do */
#define CPU_PLACE ((uint64_t)64 << 10)  /* likewise for reads */
#define HOST_RANKS 8u                   /* of one host, usually, at most */
#define GPU_SEGMENT 1024u               /* reads of less cost more than twice as many bytes on the link do */
#define CPU_SEGMENT 8192u               /* likewise than twice as many bytes from memory: docs/measuring.md */

/* So large that there are few, so small that the first is there soon. */
uint64_t fst_block_bytes = (uint64_t)256 << 20;
uint64_t fst_window_bytes;
uint64_t fst_batch_bytes;

/* ---- Options ----------------------------------------------------------------------------------- */

static fst_status refuse(fst_error *error, const char *text) {
    return fst_fail(error, FST_E_ARG, 0, NULL, "%s", text);
}

static fst_status copy_options(const fst_options *given, fst_options *options, fst_error *error) {
    if (given->size < sizeof given->size)
        return refuse(error, "fst_options.size is not set: begin with FST_OPTIONS_INIT");
    /* A caller built against a newer header may use options that this library does not have. */
    for (size_t i = sizeof *options; i < given->size; i++)
        if (((const unsigned char *)given)[i])
            return refuse(error, "the options are of a newer version of fst");
    memcpy(options, given, given->size < sizeof *options ? given->size : sizeof *options);
    return FST_OK;
}

static fst_status check_options(const fst_options *options, fst_error *error) {
    const unsigned known = FST_NON_SATURATING | FST_AS_READY | FST_STRICT_SHARDS | FST_ABORT_COMM;
    if ((int)options->cast < 0 || options->cast >= FST_DTYPE_COUNT)
        return fst_fail(error, FST_E_ARG, 0, NULL, "%d is no dtype to cast to", (int)options->cast);
    if (options->device < 0)
        return fst_fail(error, FST_E_ARG, 0, NULL, "device %d: want FST_DEVICE_AUTO, _CPU or _GPU(n)",
                        options->device);
    if (options->flags & ~known)
        return fst_fail(error, FST_E_ARG, 0, NULL, "unknown flags %#x", options->flags & ~known);
    if (options->slot_bytes && (options->slot_bytes < 64u << 10 || options->slot_bytes > 64u << 20))
        return fst_fail(error, FST_E_ARG, 0, NULL, "slots of %zu bytes: want 64 KiB to 64 MiB",
                        options->slot_bytes);
    if ((unsigned)options->reader > FST_READER_URING)
        return fst_fail(error, FST_E_ARG, 0, NULL, "%d is no way to read", (int)options->reader);
    if ((unsigned)options->cache > FST_CACHE_AVOID)
        return fst_fail(error, FST_E_ARG, 0, NULL, "%d is no way to use the cache", (int)options->cache);
    if ((unsigned)options->scale > FST_QUANTIZE_BLOCK)
        return fst_fail(error, FST_E_ARG, 0, NULL, "%d is no kind of scales", (int)options->scale);
    if (options->scale && !fst_quantize_has(options->cast))
        return fst_fail(error, FST_E_ARG, 0, NULL,
                        "scales are computed for F8_E4M3, F8_E5M2 and F8_E4M3FNUZ, not for %s",
                        fst_dtype_name(options->cast));
    if (options->allocator && (!options->allocator->allocate || !options->allocator->release))
        return refuse(error, "the allocator lacks a function");
    return fst_shards_check(options, error);
}

/* Bytes that this process has caused to be read from storage so far; UINT64_MAX: the system does not tell. */
static uint64_t bytes_from_storage(void) {
    char text[512];
    unsigned long long bytes;
    if (fst_os_calls.read_text("/proc/self/io", text, sizeof text) <= 0) return UINT64_MAX;
    const char *line = strstr(text, "\nread_bytes: ");
    return line && sscanf(line, "\nread_bytes: %llu", &bytes) == 1 ? bytes : UINT64_MAX;
}

fst_status fst_loading_begin(fst_loading *l, const char *const *files, const fst_options *given) {
    fst_status status = files && files[0] ? FST_OK : refuse(l->error, "no files are named");
    l->started = fst_os_now();
    l->storage_before = bytes_from_storage();
    if (!status && given) status = copy_options(given, &l->options, l->error);
    if (!status) status = check_options(&l->options, l->error);
    if (!status && l->options.allocator) l->allocator = *l->options.allocator;
    if (!status && !(l->model = calloc(1, sizeof *l->model))) status = fst_no_memory(l->error);
    return status;
}

/* ---- What a job needs ---------------------------------------------------------------------------- */

/* Called by the pipeline. */
static fst_status allocate_block(void *arg, size_t i, void **memory, fst_error *error) {
    fst_loading *l = arg;
    fst_model *model = l->model;
    double start = fst_os_now(), waited = l->budget ? l->budget->waited : 0;
    fst_status status = fst_block_new(model->gpu, &l->allocator, l->budget, l->plan.blocks[i],
                                      l->plan.bytes_blocks, &model->blocks[i], error);
    if (l->budget) start += l->budget->waited - waited; /* for the consumer */
    l->allocate_seconds += fst_os_now() - start;
    if (status) return status;
    model->blocks_count++;
    *memory = model->blocks[i]->data;
    return FST_OK;
}

/* All blocks before anything is read: when there may not be enough, and when the memory is the caller's. */
static fst_status allocate_first(fst_loading *l) {
    const fst_gpu *gpu = l->model->gpu;
    uint64_t available = fst_gpu_available(gpu);
    /* The host promises more memory than it has. */
    if (gpu->host_access && !l->allocator.allocate && available && l->plan.bytes_blocks > available)
        return fst_fail(l->error, FST_E_MEMORY, 0, NULL,
                        "the tensors take %llu bytes, of which %llu are available",
                        (unsigned long long)l->plan.bytes_blocks, (unsigned long long)available);
    if (!l->allocator.allocate && available / 2 >= l->plan.bytes_blocks + l->plan.parked_bytes) return FST_OK;
    for (size_t i = 0; i < l->plan.blocks_count; i++) {
        void *memory = NULL;
        fst_status status = allocate_block(l, i, &memory, l->error);
        if (status) return status;
        atomic_store(&l->job.blocks[i], memory);
    }
    return FST_OK;
}

static fst_status make_reader(fst_loading *l) {
    const fst_plan *plan = &l->plan;
    const fst_gpu *gpu = l->model->gpu;
    fst_reader_options options = {l->options.reader, l->options.cache,
                                  gpu->host_access ? plan->bytes_blocks : 0};
    fst_range *ranges = l->ranges = malloc((plan->extents_count + 1) * sizeof *ranges);
    size_t count = 0;
    if (!ranges) return fst_no_memory(l->error);
    for (size_t i = 0; i < plan->chunks_count; i++) {
        const fst_plan_chunk *chunk = &plan->chunks[i];
        for (uint32_t k = 0; k < chunk->extents; k++) {
            const fst_plan_extent *extent = &plan->extents[chunk->first_extent + k];
            uint64_t size = (extent->nbytes / extent->segment - 1) * extent->pitch + extent->segment;
            fst_range *last = count ? &ranges[count - 1] : NULL;
            if (last && last->file == chunk->file && last->offset + last->nbytes == extent->offset)
                last->nbytes += size;
            else ranges[count++] = (fst_range){chunk->file, extent->offset, size};
        }
    }
    return fst_reader_new(l->fds, l->ids, (const char *const *)l->model->paths.files, l->model->paths.count,
                          ranges, count, &options, &l->reader, l->error);
}

static fst_status make_job(fst_loading *l) {
    fst_model *model = l->model;
    l->job = (fst_load_job){
        .plan = &l->plan,
        .headers = model->headers,
        .paths = (const char *const *)model->paths.files,
        .reader = l->reader,
        .use_ring = l->options.reader == FST_READER_URING,
        .hows = calloc(l->plan.chunks_count * fst_engine_strips(l->engine) + 1, sizeof *l->job.hows),
        .blocks = calloc(l->plan.blocks_count + 1, sizeof *l->job.blocks),
        .batches = calloc(l->plan.batches_count + 1, sizeof *l->job.batches),
        .parking = &l->parking,
        .slots = calloc(l->plan.chunks_count + 1, sizeof *l->job.slots),
        .allocate = allocate_block,
        .allocate_arg = l,
        .budget = l->budget,
        .flags = l->options.flags,
        .progress = l->options.progress,
        .progress_arg = l->options.progress_arg,
        .cancel = l->options.cancel,
        .started = l->started,
        .bytes_total = l->plan.bytes_read,
    };
    l->parking = (fst_parking){
        .stripes = calloc(l->plan.stripes_count + 1, sizeof *l->parking.stripes),
        .windows_done = calloc(l->plan.windows_count + 1, sizeof *l->parking.windows_done),
        .stripes_left = (uint32_t)l->plan.stripes_count,
        .counts = calloc(l->plan.counters_count + 1, sizeof *l->parking.counts),
    };
    model->blocks = calloc(l->plan.blocks_count + 1, sizeof *model->blocks);
    int has_parking = l->parking.stripes && l->parking.windows_done && l->parking.counts;
    return l->job.hows && l->job.blocks && l->job.batches && l->job.slots && model->blocks && has_parking
               ? FST_OK
               : fst_no_memory(l->error);
}

/* Whether a tensor is not in its file as it will be: codes that become a weight, a part, parts that become one. */
static int is_made(const fst_plan_tensor *planned) { return planned->weight || planned->cut != FST_NO_CUT; }

/* Its name and shape; *shapes and *names are moved behind what they need. */
static void make_entry(fst_loading *l, const fst_plan_tensor *planned, fst_model_tensor *tensor,
                       fst_model_made *made, uint64_t **shapes, char **names) {
    fst_model *model = l->model;
    const fst_quantized *w = planned->weight;
    const fst_cut *cut = fst_plan_cut(&l->plan, planned);
    made->entry = *tensor->entry;
    if (w) {
        made->entry.name = w->name;
        made->entry.ndim = w->ndim;
        made->entry.shape = w->shape;
    }
    if (cut) {
        made->entry.ndim = cut->ndim;
        made->entry.shape = *shapes;
        for (uint32_t i = 0; i < cut->ndim; i++) *(*shapes)++ = fst_cut_extent(cut, i);
    }
    if (planned->into) {
        made->entry.name = strcpy(*names, planned->into);
        *names += strlen(planned->into) + 1;
    }
    made->entry.name_length = (uint32_t)strlen(made->entry.name);
    if (made->entry.name == tensor->entry->name) made->entry.name_length = tensor->entry->name_length;
    tensor->entry = &made->entry;
    tensor->hash = fst_model_hash(model, made->entry.name, made->entry.name_length);
    if (!cut || cut->dim == FST_REPLICATE) return;
    tensor->shard_dim = cut->dim;
    tensor->shard_begin = cut->begin;
    tensor->shard_extent = cut->extent;
}

/* Scales that are computed for `weight`, and are no tensor of any file. Writes the name, moves *names behind it. */
static fst_status make_scales(fst_loading *l, const fst_plan_tensor *planned, const fst_model_tensor *weight,
                              fst_model_tensor *tensor, fst_model_made *made, char **names) {
    fst_model *model = l->model;
    const fst_entry *of = weight->entry;
    fst_entry *entry = &made->entry;
    size_t length = fst_quantize_scale_name(of->name, of->name_length, planned->scale, *names);
    *entry = (fst_entry){.name = *names,
                         .name_length = (uint32_t)length,
                         .ndim = of->ndim,
                         .shape = made->shape,
                         .dtype = FST_F32,
                         .begin = l->model->headers[planned->file].tensors[planned->entry].begin};
    entry->end = entry->begin;
    *names += length + 1;
    memcpy(made->shape, of->shape, (of->ndim - 2) * sizeof *made->shape);
    made->shape[of->ndim - 2] = fst_quantize_scale_rows(planned->scale, planned->rows);
    made->shape[of->ndim - 1] = fst_quantize_scale_cols(planned->scale, planned->cols);
    if (of->ndim == 2 && planned->scale == FST_QUANTIZE_TENSOR) entry->ndim = 0;
    *tensor = (fst_model_tensor){.entry = entry,
                                 .file = planned->file,
                                 .dtype = FST_F32,
                                 .nbytes = l->plan.tensors[planned->scales].nbytes,
                                 .planned = planned->scales,
                                 .hash = fst_model_hash(model, entry->name, length)};
    /* The table still has the names of the files' tensors, in the plan's order. */
    size_t taken = model->names[fst_model_slot(model, tensor->hash, entry->name, length)].index;
    if (!taken || l->plan.tensors[taken - 1].result == FST_NO_TENSOR) return FST_OK;
    const fst_model_tensor *other = &model->tensors[taken - 1];
    fst_where where = {fst_file_path(model, other->file), (int)other->file,
                       (int64_t)(model->headers[other->file].data_start + other->entry->begin)};
    return fst_fail(l->error, FST_E_DUPLICATE, 0, &where,
                    "tensor \"%s\" has the name of the scales that are computed for \"%.200s\"", entry->name,
                    of->name);
}

/* Places for the names and shapes that no file has. */
static fst_status make_room(fst_loading *l, size_t *count) {
    fst_model *model = l->model;
    size_t names = 0, made = 0, dims = 0;
    const fst_scheme *scheme = model->scheme;
    *count = 0;
    if (!l->plan.cuts_count && !l->plan.counters_count && !(scheme && scheme->count)) return FST_OK;
    for (size_t i = 0; i < l->plan.tensors_count; i++) {
        const fst_plan_tensor *planned = &l->plan.tensors[i];
        const fst_cut *cut = fst_plan_cut(&l->plan, planned);
        if (planned->result == FST_NO_TENSOR) continue;
        ++*count;
        if (i >= l->plan.stored_count && !planned->into) continue; /* scales: with their weight */
        if (is_made(planned)) made++;
        if (cut) dims += cut->ndim;
        if (planned->into) names += strlen(planned->into) + 1;
        if (planned->scales == FST_NO_TENSOR) continue;
        const fst_entry *entry = model->tensors[i].entry;
        size_t length = planned->weight ? strlen(planned->weight->name) : entry->name_length;
        names += fst_quantize_scale_name(entry->name, length, planned->scale, NULL) + 1;
        made++;
    }
    if (made == 0) return FST_OK;
    model->made = calloc(made, sizeof *model->made);
    model->made_names = malloc(names + 1);
    model->made_shapes = malloc((dims + 1) * sizeof *model->made_shapes);
    return model->made && model->made_names && model->made_shapes ? FST_OK : fst_no_memory(l->error);
}

/* The tensor of the plan that becomes a result where tensor `i` of the files is: itself, or what it is the last part of;
 * FST_NO_TENSOR: none. */
static uint32_t result_at(const fst_plan *plan, uint32_t i) {
    const fst_plan_tensor *planned = &plan->tensors[i];
    if (planned->fused == FST_NO_TENSOR) return planned->result == FST_NO_TENSOR ? FST_NO_TENSOR : i;
    return plan->tensors[planned->fused].last_part == i ? planned->fused : FST_NO_TENSOR;
}

/* Where nothing is made, every tensor stays the one that it is, but for its type. */
static fst_status keep_tensors(fst_loading *l) {
    for (size_t i = 0; l->choices && i < l->model->count; i++) {
        l->model->tensors[i].dtype = l->plan.tensors[i].dtype;
        l->model->tensors[i].nbytes = l->plan.tensors[i].nbytes;
    }
    return FST_OK;
}

/* What each tensor will be: its place is known once its block is there. Companions of dequantized weights are gone,
 * computed scales follow their weights, what is fused comes where its last part is. */
static fst_status describe_results(fst_loading *l) {
    fst_model *model = l->model;
    size_t count = 0;
    fst_status status = make_room(l, &count);
    if (status) return status;
    if (!model->made) return keep_tensors(l);
    fst_model_tensor *results = malloc((count + 1) * sizeof *results), *tensor = results;
    if (!results) return fst_no_memory(l->error);
    fst_model_made *made = model->made;
    char *names = model->made_names;
    uint64_t *shapes = model->made_shapes;
    for (uint32_t i = 0; i < l->plan.stored_count && !status; i++) {
        uint32_t which = result_at(&l->plan, i);
        if (which == FST_NO_TENSOR) continue;
        const fst_plan_tensor *planned = &l->plan.tensors[which];
        *tensor = model->tensors[planned->into ? planned->next_part : i];
        tensor->dtype = planned->dtype;
        tensor->nbytes = planned->nbytes;
        tensor->planned = which;
        if (is_made(planned)) make_entry(l, planned, tensor, made++, &shapes, &names);
        tensor++;
        if (planned->scales == FST_NO_TENSOR) continue;
        status = make_scales(l, planned, tensor - 1, tensor, made++, &names);
        tensor++;
    }
    if (status) {
        free(results);
        return status;
    }
    free(model->tensors);
    model->tensors = results;
    model->count = count;
    return fst_loading_fill_names(l);
}

static fst_status find_device(fst_loading *l) {
    return fst_gpu_find(l->options.device, &l->model->gpu, l->model->device_reason,
                        sizeof l->model->device_reason, l->error);
}

/* Before files are opened: from here on other ranks hear of a failure. */
static fst_status meet_peers(fst_loading *l) {
    fst_options *options = &l->options;
    fst_status status = options->comm_kind == FST_COMM_NONE ? FST_OK : find_device(l);
    if (status || options->comm_kind == FST_COMM_NONE) return status;
    const fst_gpu *gpu = l->model->gpu;
    fst_peers_options wanted = {.kind = options->comm_kind,
                                .comm = options->comm,
                                .gpu = gpu,
                                .rank = options->rank,
                                .ranks = options->ranks,
                                .timeout_ms = options->timeout_ms,
                                .may_abort = (options->flags & FST_ABORT_COMM) != 0};
    int saved, code = gpu->calls->enter(gpu, &saved);
    if (code) return fst_gpu_fail(l->error, gpu, code, "choosing the device");
    status = fst_peers_open(&wanted, &l->peers, l->error);
    gpu->calls->leave(gpu, saved);
    if (status || !l->peers) return status;
    options->rank = fst_peers_rank(l->peers);
    options->ranks = fst_peers_count(l->peers);
    return FST_OK;
}

/* What ranks read for one another; collective, so `mine` is how this one fared. */
static fst_status share_reading(fst_loading *l, fst_status mine) {
    fst_model *model = l->model;
    if (!l->peers) return mine;
    for (size_t i = 0; i < l->plan.stored_count && !mine && !model->gpu->host_access; i++)
        if (l->plan.tensors[i].conversion == FST_CONVERT_DOUBLE)
            mine = fst_fail(l->error, FST_E_UNSUPPORTED, 0, NULL,
                            "scales are not doubled for FNUZ where ranks share the reading for GPUs");
    int saved, code = model->gpu->calls->enter(model->gpu, &saved);
    if (code && !mine) mine = fst_gpu_fail(l->error, model->gpu, code, "choosing the device");
    fst_status status = fst_shared_new(l->peers, model->gpu, l->facts.slot_bytes, &l->plan, model->headers,
                                       (const char *const *)model->paths.files, model->paths.count, l->reader,
                                       mine, &l->shared, l->error);
    if (!code) model->gpu->calls->leave(model->gpu, saved);
    l->job.shared = l->shared;
    return status;
}

static fst_status prepare(fst_loading *l, uint64_t block_bytes) {
    fst_model *model = l->model;
    fst_engine_config config = {.threads = l->options.threads, .slot_bytes = l->options.slot_bytes};
    fst_status status = find_device(l);
    for (size_t i = 0; i < model->paths.count; i++)
        if (l->ids[i].size > config.largest_file) config.largest_file = l->ids[i].size;
    config.shares = l->peers != NULL;
    config.sharers = l->options.ranks < HOST_RANKS ? l->options.ranks : HOST_RANKS;
    double before = fst_os_now();
    if (!status)
        status = fst_engine_take(l->options.context, model->gpu, &config, &l->engine, &l->facts, l->error);
    l->allocate_seconds = fst_os_now() - before;
    if (status) return status;
    fst_plan_options plan_options = {.cast = l->options.cast,
                                     .scale = l->options.scale,
                                     .chunk_bytes = l->facts.slot_bytes,
                                     .place_bytes = model->gpu->host_access ? CPU_PLACE : GPU_PLACE,
                                     .block_bytes = block_bytes,
                                     .scheme = model->scheme,
                                     .window_bytes = fst_window_bytes,
                                     .batch_bytes = fst_batch_bytes,
                                     .rank = l->options.rank,
                                     .ranks = l->options.ranks};
    if (l->peers) plan_options.span_bytes = fst_shared_span(l->options.ranks, l->facts.slot_bytes);
    if (l->options.read == FST_READ_AUTO && !l->peers)
        plan_options.segment_bytes = model->gpu->host_access ? CPU_SEGMENT : GPU_SEGMENT;
    status = fst_plan_make(model->headers, (const char *const *)model->paths.files, model->paths.count,
                           l->choices, &plan_options, &l->plan, l->error);
    if (!status) status = make_reader(l);
    if (!status) status = make_job(l);
    if (!status) status = describe_results(l);
    return status;
}

fst_status fst_loading_prepare(fst_loading *l, uint64_t block_bytes) {
    fst_status status = prepare(l, block_bytes);
    l->model->stats.open_seconds = fst_os_now() - l->started - l->allocate_seconds;
    return status;
}

void fst_loading_end(fst_loading *l) {
    if (l->peers) { /* streams and blocks are the device's */
        int saved, code = l->model->gpu->calls->enter(l->model->gpu, &saved);
        fst_shared_free(l->shared);
        fst_peers_close(l->peers);
        if (!code) l->model->gpu->calls->leave(l->model->gpu, saved);
    }
    l->peers = NULL;
    l->shared = NULL;
    fst_reader_free(l->reader);
    free(l->ranges);
    if (l->engine) fst_engine_put(l->options.context, l->engine);
    if (l->model) fst_loading_close(l);
    fst_plan_free(&l->plan);
    fst_budget_drop(l->budget);
    free((void *)l->job.hows);
    free((void *)l->job.blocks);
    free(l->job.batches);
    free((void *)l->job.slots);
    free(l->parking.stripes);
    free(l->parking.windows_done);
    free(l->parking.counts);
    l->engine = NULL;
    l->reader = NULL;
    l->budget = NULL;
}

/* ---- Statistics ----------------------------------------------------------------------------------- */

static const char *what_limited(const fst_gpu *gpu, const fst_stats *stats,
                                const fst_pipeline_stats *pipeline) {
    double spread = stats->threads ? 1.0 / stats->threads : 1;
    double waited = pipeline->wait_seconds * spread, read = pipeline->read_seconds * spread;
    double kernels = pipeline->kernel_seconds * spread, held = stats->consumer_seconds * spread;
    if (held > waited + read + kernels) return "consumer";
    if (stats->allocate_seconds > waited + read + kernels) return "allocation";
    if (gpu->host_access) return kernels > read ? "kernel" : "read";
    if (read >= waited) return "read";
    return pipeline->launch_ms > pipeline->copy_ms ? "kernel" : "copy";
}

static void describe_reading(fst_loading *l) {
    fst_stats *stats = &l->model->stats;
    fst_reader_facts facts;
    fst_reader_describe(l->reader, &facts);
    stats->bytes_cached = facts.cached;
    stats->bytes_buffered = facts.buffered;
    stats->bytes_direct = facts.direct;
    snprintf(l->model->reader, sizeof l->model->reader, "%s; residency: %s", facts.reader, facts.residency);
    stats->reader = l->model->reader;
}

void fst_loading_fill_stats(fst_loading *l, const fst_pipeline_stats *pipeline) {
    const fst_gpu *gpu = l->model->gpu;
    fst_stats *stats = &l->model->stats;
    fst_engine_describe(l->engine, &l->facts);
    stats->bytes_read = l->header_bytes + pipeline->bytes_read + fst_shared_read(l->shared);
    stats->bytes_out = l->plan.bytes_out;
    stats->bytes_needed = l->plan.bytes_needed;
    uint64_t from_storage = bytes_from_storage();
    int is_known = from_storage != UINT64_MAX && l->storage_before != UINT64_MAX;
    stats->bytes_storage = is_known ? from_storage - l->storage_before : UINT64_MAX;
    stats->nan_scales = pipeline->nan_scales;
    stats->device = gpu->label;
    stats->device_name = gpu->name;
    stats->device_reason = l->model->device_reason;
    stats->peak_device_bytes = (l->budget ? l->budget->peak : l->plan.bytes_blocks) +
                               pipeline->companion_bytes + pipeline->parked_bytes + l->facts.staging_bytes;
    stats->nans = pipeline->nans;
    stats->pinned_bytes = l->facts.pinned_bytes;
    stats->threads = l->facts.threads;
    stats->slots = l->facts.slots;
    stats->slot_bytes = l->facts.slot_bytes;
    stats->slots_unpinned = l->facts.unpinned + fst_shared_unpinned(l->shared);
    stats->numa_node = l->facts.node;
    stats->chunks = pipeline->chunks;
    stats->launches = pipeline->launches;
    stats->read_seconds = pipeline->read_seconds;
    stats->wait_seconds = pipeline->wait_seconds;
    stats->kernel_seconds = pipeline->kernel_seconds;
    stats->copy_seconds = pipeline->copy_ms * 1e-3;
    stats->convert_seconds = pipeline->launch_ms * 1e-3;
    stats->consumer_seconds = l->budget ? pipeline->held_seconds : 0;
    stats->allocate_seconds = l->allocate_seconds;
    stats->seconds = fst_os_now() - l->started;
    if (stats->seconds > 0 && l->facts.slots)
        stats->slots_busy = pipeline->slot_seconds / (stats->seconds * l->facts.slots);
    describe_reading(l);
    stats->limit = what_limited(gpu, stats, pipeline);
}

/* ---- Loading --------------------------------------------------------------------------------------- */

static void place_tensors(fst_loading *l) {
    fst_model *model = l->model;
    for (size_t i = 0; i < model->count; i++) {
        fst_model_tensor *tensor = &model->tensors[i];
        const fst_plan_tensor *planned = &l->plan.tensors[tensor->planned];
        tensor->data = planned->memory;
        if (planned->block == FST_NO_BLOCK) continue;
        tensor->block = model->blocks[planned->block];
        tensor->data = (unsigned char *)tensor->block->data + planned->block_offset;
    }
}

/* After a failure that other ranks may not know of. */
static void leave_peers(fst_loading *l, fst_status mine) {
    fst_error ignored = {.file = -1, .offset = -1};
    int done = l->shared == NULL;
    while (!done) fst_shared_step(l->shared, mine, &done, &ignored);
}

static fst_status run(fst_loading *l) {
    fst_pipeline_stats pipeline;
    const fst_gpu *gpu = l->model->gpu;
    int saved, code = gpu->calls->enter(gpu, &saved);
    if (code) {
        fst_status status = fst_gpu_fail(l->error, gpu, code, "choosing the device");
        leave_peers(l, status);
        return status;
    }
    fst_status status = allocate_first(l);
    if (!status) status = fst_pipeline_run(l->engine, &l->job, &pipeline, l->error);
    if (status) leave_peers(l, status);
    if (!status) status = fst_loading_check_files(l);
    if (!status) {
        place_tensors(l);
        fst_loading_fill_stats(l, &pipeline);
    }
    gpu->calls->leave(gpu, saved);
    return status;
}

static fst_status load_or_open(const char *const *files, const fst_options *given, int with_data,
                               fst_model **out, fst_error *error) {
    fst_error mine = {.status = FST_OK, .file = -1, .offset = -1};
    fst_loading l = {.error = &mine};
    fst_status status =
        out ? fst_loading_begin(&l, files, given) : refuse(&mine, "there is no place for the model");
    if (out) *out = NULL;
    l.opens_only = !with_data;
    if (l.opens_only) l.options.rule = NULL;
    if (!status && with_data) status = meet_peers(&l);
    if (!status) status = fst_loading_open(&l, files);
    if (!status) {
        l.model->stats.bytes_read = l.header_bytes;
        l.model->stats.open_seconds = fst_os_now() - l.started;
        l.model->stats.numa_node = -1;
    }
    if (!status && with_data) status = fst_loading_prepare(&l, fst_block_bytes);
    status = share_reading(&l, status);
    if (!status && with_data) status = run(&l);
    fst_loading_end(&l);
    if (status) {
        fst_model_free(l.model);
        fst_set_last_error(&mine);
        if (error) *error = mine;
        return status;
    }
    l.model->stats.seconds = fst_os_now() - l.started;
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

void fst_release_cached(void) { fst_context_release(NULL); }
