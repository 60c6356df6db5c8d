/* fst_convert_directory: a checkpoint directory of a checkpoint directory. What comes out, and into which file, is known from the
 * headers; then a stream brings results in their order, and convert_writer.c writes them. */
#include "convert.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"
#include "loading.h"
#include "os.h"
#include "pool.h"
#include "quantize.h"

#define USUAL_SHARD ((uint64_t)5000000000)
#define USUAL_MEMORY ((uint64_t)256 << 20)
#define MORE_MEMORY ((uint64_t)64 << 20) /* beyond the largest tensor */
#define BLOCK_BYTES ((uint64_t)64 << 20)
#define TICK_SECONDS 0.05
#define CHECK_BYTES ((size_t)4 << 20)
#define INDEX_NAME "model.safetensors.index.json"

static fst_status io_failed(const fst_convert_job *c, const char *path, int code, const char *what) {
    fst_where where = {path, -1, -1};
    return fst_fail(c->error, FST_E_IO, -code, &where, "cannot %s: %s", what, strerror(-code));
}

static fst_status refuse(const fst_convert_job *c, const char *path, const char *text) {
    fst_where where = {path, -1, -1};
    return fst_fail(c->error, FST_E_ARG, 0, &where, "%s", text);
}

/* ---- Progress --------------------------------------------------------------------------------------- */

static fst_status tell(fst_convert_job *c, int last) {
    const fst_options *o = &c->options;
    double now = fst_os_now(), seconds = now - c->started;
    if (o->cancel && __atomic_load_n(o->cancel, __ATOMIC_RELAXED))
        return fst_fail(c->error, FST_E_CANCELLED, 0, NULL, "cancelled");
    if (!o->progress || (!last && now - c->told < TICK_SECONDS)) return FST_OK;
    uint64_t done = __atomic_load_n(&c->bytes_done, __ATOMIC_RELAXED);
    fst_progress progress = {done, c->bytes_total, seconds, seconds > 0 ? (double)done / seconds : 0};
    c->told = now;
    return o->progress(o->progress_arg, &progress)
               ? fst_fail(c->error, FST_E_CANCELLED, 0, NULL, "cancelled by the progress callback")
               : FST_OK;
}

/* Of the stream: what it has read says less than what is written. */
static int stream_tells(void *arg, const fst_progress *progress) {
    (void)progress;
    return tell(arg, 0) != FST_OK;
}

/* ---- What comes out ---------------------------------------------------------------------------------- */

/* Adds what becomes of tensor `source` to the list, whose first element counts the others. What belongs to a quantized
 * weight is read with all of it, also where it is kept: alone it would be a companion of nothing. */
static void add_needs(const fst_scheme *scheme, uint32_t source, uint32_t *needs) {
    uint32_t owner = scheme ? scheme->owner[source] : FST_NO_TENSOR;
    const fst_quantized *weight = owner != FST_NO_TENSOR ? &scheme->weights[owner] : NULL;
    needs[++needs[0]] = weight ? weight->codes : source;
    for (size_t k = 0; weight && k < weight->companions_count; k++)
        needs[++needs[0]] = (uint32_t)weight->list[k];
}

/* Which sources a result is made of. Computed scales come behind their weight. */
static fst_status note_needs(fst_convert_job *c, const fst_loading *l) {
    const fst_plan_tensor *tensors = l->plan.tensors;
    c->sources = l->plan.stored_count;
    c->needs = calloc(c->model->count + 1, sizeof *c->needs);
    c->skip = calloc(c->sources + 1, 1);
    if (!c->needs || !c->skip) return fst_no_memory(c->error);
    for (size_t i = 0; i < c->model->count; i++) {
        uint32_t planned = c->model->tensors[i].planned, parts = 1;
        int fused = tensors[planned].into != NULL;
        if (planned >= c->sources && !fused) planned = c->model->tensors[i - 1].planned;
        if (fused) planned = tensors[planned].next_part;
        for (uint32_t k = planned; fused && tensors[k].next_part != FST_NO_TENSOR; k = tensors[k].next_part)
            parts++;
        uint32_t *needs = c->needs[i] = calloc(1 + parts * (1 + (size_t)FST_COMPANIONS), sizeof *needs);
        if (!needs) return fst_no_memory(c->error);
        for (; parts; parts--, planned = tensors[planned].next_part)
            add_needs(c->model->scheme, planned, needs);
    }
    return FST_OK;
}

/* What a load may do, but a file has no use for. */
static fst_status check_plan(const fst_convert_job *c, const fst_plan *plan) {
    for (size_t i = 0; i < plan->tensors_count; i++) {
        if (plan->tensors[i].memory) return refuse(c, NULL, "a rule names memory for a tensor");
        if (plan->tensors[i].conversion == FST_CONVERT_FNUZ ||
            plan->tensors[i].conversion == FST_CONVERT_DOUBLE)
            return fst_fail(
                c->error, FST_E_UNSUPPORTED, 0, NULL,
                "weights under scales are not written in FNUZ: nothing that loads them takes such files");
    }
    return FST_OK;
}

/* Everything is planned as for a load, and the plan thrown away: a model without data stays. */
static fst_status plan_results(fst_convert_job *c, const fst_options *given) {
    const char *const files[] = {c->directory, NULL};
    fst_loading l = {.error = c->error};
    fst_status status = fst_loading_begin(&l, files, given);
    if (!status && l.options.comm_kind != FST_COMM_NONE)
        status = refuse(c, NULL,
                        "a conversion does not share its reading: each rank writes a directory of its own");
    if (!status) {
        c->options = l.options;
        c->options.size = sizeof c->options;
        status = fst_loading_open(&l, files);
    }
    if (!status) status = fst_loading_prepare(&l, BLOCK_BYTES);
    c->model = l.model;
    if (!status) status = check_plan(c, &l.plan);
    c->pending = l.plan.bytes_pending;
    if (!status) status = note_needs(c, &l);
    if (!status) status = fst_loading_check_files(&l);
    fst_loading_end(&l);
    if (!status && !c->model->count) status = refuse(c, c->directory, "there are no tensors in it");
    return status;
}

/* Scales are written with the codes that others read. */
static fst_status check_scale(const fst_convert_job *c) {
    if (c->options.scale == FST_QUANTIZE_NONE || c->options.cast == FST_F8_E4M3) return FST_OK;
    return fst_fail(c->error, FST_E_UNSUPPORTED, 0, NULL,
                    "checkpoints with scales are written in F8_E4M3: nothing that loads them takes %s",
                    fst_dtype_name(c->options.cast));
}

/* ---- Files of tensors --------------------------------------------------------------------------------- */

static fst_status cut_shards(fst_convert_job *c) {
    const fst_model *model = c->model;
    c->shards = calloc(model->count, sizeof *c->shards);
    c->shard_of = calloc(model->count, sizeof *c->shard_of);
    if (!c->shards || !c->shard_of) return fst_no_memory(c->error);
    for (size_t i = 0; i < model->count; i++) {
        uint64_t nbytes = model->tensors[i].nbytes;
        fst_shard *last = c->shards_count ? &c->shards[c->shards_count - 1] : NULL;
        if (!last || last->nbytes > c->shard_bytes || nbytes > c->shard_bytes - last->nbytes) {
            last = &c->shards[c->shards_count++];
            last->first = i;
        }
        last->count++;
        last->nbytes += nbytes;
        c->shard_of[i] = (uint32_t)(c->shards_count - 1);
    }
    return FST_OK;
}

fst_status fst_shard_header(const fst_convert_job *c, size_t shard, fst_text *out, fst_error *error) {
    const fst_shard *s = &c->shards[shard];
    uint64_t begin = 0;
    fst_put_header_begin(out, &c->metadata);
    for (size_t i = s->first; i < s->first + s->count; i++) {
        fst_put_tensor(out, &c->model->tensors[i], begin);
        begin += c->model->tensors[i].nbytes;
    }
    return fst_put_header_end(out, c->directory, error);
}

/* A hash of all headers: names, dtypes, shapes, and which file they go to. */
static fst_status hash_plan(fst_convert_job *c, uint64_t *out) {
    fst_status status = FST_OK;
    fst_hash *hash = fst_hash_new();
    if (!hash) return fst_no_memory(c->error);
    fst_hash_begin(hash);
    for (size_t i = 0; i < c->shards_count && !status; i++) {
        fst_text header = {0};
        status = fst_shard_header(c, i, &header, c->error);
        if (!status) fst_hash_add(hash, header.data, header.used);
        c->shards[i].header_bytes = header.used;
        c->bytes_total += header.used + c->shards[i].nbytes;
        free(header.data);
    }
    *out = fst_hash_end(hash);
    fst_hash_free(hash);
    return status;
}

static fst_status make_index(const fst_convert_job *c, fst_text *out) {
    uint64_t total = 0;
    for (size_t i = 0; i < c->shards_count; i++) total += c->shards[i].nbytes;
    fst_put_format(out, "{\n  \"metadata\": {\n    \"total_size\": %" PRIu64 "\n  },\n  \"weight_map\": {",
                   total);
    for (size_t i = 0; i < c->model->count; i++) {
        const fst_entry *entry = c->model->tensors[i].entry;
        const char *file = c->journal.files[c->shard_of[i]].name;
        fst_put_format(out, "%s\n    ", i ? "," : "");
        fst_put_string(out, entry->name, entry->name_length);
        fst_put_format(out, ": ");
        fst_put_string(out, file, strlen(file));
    }
    fst_put_format(out, "\n  }\n}\n");
    return out->failed ? fst_no_memory(c->error) : FST_OK;
}

/* ---- The journal --------------------------------------------------------------------------------------- */

/* What is beside the weights and decides what comes of them. */
static fst_status put_configs(const fst_convert_job *c, fst_text *text) {
    static const char *const names[] = {"config.json", "hf_quant_config.json", "quantize_config.json",
                                        INDEX_NAME};
    fst_status status = FST_OK;
    for (size_t i = 0; i < sizeof names / sizeof *names && !status; i++) {
        char *path = fst_join(c->source, names[i]);
        if (!path) return fst_no_memory(c->error);
        fst_put(text, ",", 1);
        size_t before = text->used;
        status = fst_put_identity(text, path, c->error);
        if (text->used == before) fst_put(text, "null", 4);
        free(path);
    }
    return status;
}

/* Which part of the tensors this is. */
static void put_part(const fst_options *o, fst_text *text) {
    if (!o->shards) return;
    fst_put_format(text, ",\"rank\":%u,\"ranks\":%u,\"rules\":[", o->rank, o->ranks);
    for (const fst_shard_rule *rule = o->shards; rule->glob; rule++) {
        fst_put_format(text, "%s", rule == o->shards ? "" : ",");
        fst_put_string(text, rule->glob, strlen(rule->glob));
        fst_put_format(text, ",%" PRId32 ",%" PRIu32, rule->dim, rule->unit);
    }
    fst_put_format(text, "]");
}

/* The journal's first line. Twice the same only when nothing has changed. */
static fst_status make_head(const fst_convert_job *c, uint64_t plan, fst_text *text) {
    const fst_options *o = &c->options;
    fst_put_format(text, "{\"fst\":\"%s\",\"cast\":\"%s\",\"scale\":%d,\"flags\":%u", fst_version(),
                   fst_dtype_name(o->cast), (int)o->scale, o->flags & FST_NON_SATURATING);
    fst_put_format(
        text, ",\"shard_bytes\":%" PRIu64 ",\"plan\":\"%016" PRIx64 "\",\"config\":", c->shard_bytes, plan);
    fst_put_string(text, o->config ? o->config : "", o->config ? strlen(o->config) : 0);
    put_part(o, text);
    fst_put_format(text, ",\"directory\":");
    fst_put_string(text, c->source, strlen(c->source));
    fst_put_format(text, ",\"inputs\":[");
    fst_status status = FST_OK;
    for (size_t i = 0; i < c->model->paths.count && !status; i++) {
        if (i) fst_put(text, ",", 1);
        status = fst_put_identity(text, c->model->paths.files[i], c->error);
    }
    if (!status) status = put_configs(c, text);
    if (!status && o->config && *o->config) {
        fst_put(text, ",", 1);
        status = fst_put_identity(text, o->config, c->error);
    }
    fst_put_format(text, "]}");
    if (!status && text->failed) status = fst_no_memory(c->error);
    return status;
}

static fst_status add_file(fst_convert_job *c, const char *name) {
    fst_journal_file *file = &c->journal.files[c->journal.count];
    if (!(file->name = strdup(name))) return fst_no_memory(c->error);
    c->journal.count++;
    return FST_OK;
}

/* The journal of this run: nothing is finished. */
static fst_status make_journal(fst_convert_job *c, const fst_extras *extras, uint64_t plan) {
    fst_text head = {0};
    fst_status status = make_head(c, plan, &head);
    c->journal.head = head.data;
    c->journal.head_length = head.used;
    c->journal.files = calloc(c->shards_count + extras->count + 2, sizeof *c->journal.files);
    if (!status && !c->journal.files) status = fst_no_memory(c->error);
    for (size_t i = 0; i < c->shards_count && !status; i++) {
        char name[80];
        snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, c->shards_count);
        status = add_file(c, name);
    }
    for (size_t i = 0; i < extras->count && !status; i++) status = add_file(c, extras->names[i]);
    if (!status) status = add_file(c, INDEX_NAME);
    return status ? status : add_file(c, "config.json");
}

/* ---- The output directory ------------------------------------------------------------------------------- */

static int is_within(const char *path, const char *directory) {
    size_t length = strlen(directory);
    return !strncmp(path, directory, length) &&
           (!path[length] || path[length] == '/' || directory[length - 1] == '/');
}

/* Where the output is or will be. */
static fst_status find_output(const fst_convert_job *c, char out[PATH_MAX]) {
    int code = fst_os_calls.real_path(c->output, out);
    if (!code) return FST_OK;
    if (code != -ENOENT) return io_failed(c, c->output, code, "find out where it is");
    const char *slash = strrchr(c->output, '/');
    char *parent = slash == c->output ? strdup("/")
                   : slash            ? strndup(c->output, (size_t)(slash - c->output))
                                      : strdup(".");
    if (!parent) return fst_no_memory(c->error);
    fst_status status = FST_OK;
    code = fst_os_calls.real_path(parent, out);
    const char *base = slash ? slash + 1 : c->output;
    size_t length = code ? 0 : strlen(out);
    if (code) status = io_failed(c, c->output, code, "make it: the directory that it lies in is not there");
    else if (length + strlen(base) + 2 > PATH_MAX) status = io_failed(c, c->output, -ENAMETOOLONG, "make it");
    else snprintf(out + length, PATH_MAX - length, "%s%s", out[length - 1] == '/' ? "" : "/", base);
    free(parent);
    return status;
}

static char *copy_without_slashes(const char *path) {
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') length--;
    return strndup(path, length);
}

static fst_status make_paths(fst_convert_job *c, const char *directory, const char *output) {
    char real[PATH_MAX];
    fst_file_type type;
    if (!directory || !*directory) return refuse(c, NULL, "no directory is named");
    if (!output || !*output) return refuse(c, NULL, "no output directory is named");
    c->directory = directory;
    int code = fst_os_calls.stat_type(directory, &type);
    if (!code && type != FST_FILE_DIRECTORY) {
        fst_where where = {directory, -1, -1};
        return fst_fail(c->error, FST_E_FILE_TYPE, 0, &where, "not a directory");
    }
    if (!code) code = fst_os_calls.real_path(directory, real);
    if (code) return io_failed(c, directory, code, "open it");
    c->source = strdup(real);
    c->output = copy_without_slashes(output);
    c->state = c->output ? fst_join(c->output, ".fst-convert") : NULL;
    if (!c->source || !c->state) return fst_no_memory(c->error);
    c->journal_path = fst_join(c->state, "journal");
    c->lock_path = fst_join(c->state, "lock");
    c->partial = fst_join(c->state, "file");
    c->shard_partial = fst_join(c->state, "shard");
    if (!c->journal_path || !c->lock_path || !c->partial || !c->shard_partial) return fst_no_memory(c->error);
    fst_status status = find_output(c, real);
    if (!status && (is_within(real, c->source) || is_within(c->source, real)))
        status = refuse(c, output, "the output is the input, or one lies in the other");
    return status;
}

/* What is there is left alone, unless it is ours. `ours`: an earlier run's folder is in it. */
static fst_status look_at_output(fst_convert_job *c, int *exists, int *ours) {
    fst_file_type type;
    char **names = NULL;
    fst_where where = {c->output, -1, -1};
    int code = fst_os_calls.stat_type(c->output, &type), others = 0;
    *exists = !code;
    *ours = 0;
    if (code == -ENOENT) return FST_OK;
    if (!code && type != FST_FILE_DIRECTORY)
        return fst_fail(c->error, FST_E_FILE_TYPE, 0, &where, "it exists and is not a directory");
    if (!code) code = fst_os_calls.list(c->output, &names);
    if (code) return io_failed(c, c->output, code, "look into it");
    for (char **name = names; *name; name++) {
        if (!strcmp(*name, ".fst-convert")) *ours = 1;
        else others = 1;
    }
    free(names);
    if (!others) return FST_OK;
    if (*ours && !fst_os_calls.stat_type(c->journal_path, &type)) return FST_OK;
    if (*ours) { /* ended in its last moment, when all was in place */
        fst_os_calls.unlink(c->lock_path);
        fst_os_calls.remove_directory(c->state);
    }
    return refuse(c, c->output, "it is not empty, and holds no conversion that could go on");
}

static fst_status make_directory(fst_convert_job *c, const char *path) {
    int code = fst_os_calls.make_directory(path);
    return code ? io_failed(c, path, code, "make this directory") : FST_OK;
}

static fst_status lock_output(fst_convert_job *c, int exists, int ours) {
    fst_status status = exists ? FST_OK : make_directory(c, c->output);
    if (!status && !ours) status = make_directory(c, c->state);
    if (status) return status;
    c->lock = fst_os_calls.create(c->lock_path);
    if (c->lock < 0) return io_failed(c, c->lock_path, c->lock, "make a file of this name");
    int code = fst_os_calls.lock(c->lock);
    if (!code) return FST_OK;
    fst_os_calls.close(c->lock);
    c->lock = -1;
    return io_failed(c, c->output, code, "write there: another conversion does");
}

/* Whether the file is what the journal says. */
static fst_status check_file(fst_convert_job *c, const char *path, const fst_journal_file *file, int *good) {
    fst_file_id id;
    fst_file_type type;
    int fd = fst_os_calls.open_read(path);
    *good = 0;
    if (fd < 0) return FST_OK;
    fst_hash *hash = fst_hash_new();
    char *buffer = malloc(CHECK_BYTES);
    fst_status status = hash && buffer ? FST_OK : fst_no_memory(c->error);
    int code = fst_os_calls.identify(fd, &id, &type);
    int same = !code && type == FST_FILE_REGULAR && id.size == file->size;
    if (!status) fst_hash_begin(hash);
    for (uint64_t offset = 0; same && !status && offset < file->size;) {
        ssize_t got = fst_os_read_all(fd, buffer, CHECK_BYTES, offset);
        same = got > 0;
        if (same) fst_hash_add(hash, buffer, (size_t)got);
        if (same) offset += (uint64_t)got;
        if (same) __atomic_fetch_add(&c->bytes_done, (uint64_t)got, __ATOMIC_RELAXED);
        status = tell(c, 0);
    }
    if (!status) *good = same && fst_hash_end(hash) == file->hash;
    fst_hash_free(hash);
    free(buffer);
    fst_os_calls.close(fd);
    return status;
}

/* Files that an earlier run with the same journal has finished and that are as they were then. */
static fst_status keep_shards(fst_convert_job *c, const fst_journal *old) {
    fst_status status = FST_OK;
    for (size_t i = 0; i < c->shards_count && i < old->count && !status; i++) {
        fst_journal_file *file = &c->journal.files[i];
        if (!old->files[i].done || strcmp(old->files[i].name, file->name) != 0) continue;
        uint64_t before = c->bytes_done;
        char *path = fst_join(c->output, file->name);
        if (!path) return fst_no_memory(c->error);
        status = check_file(c, path, &old->files[i], &c->shards[i].kept);
        free(path);
        if (!c->shards[i].kept) {
            c->bytes_done = before;
            continue;
        }
        file->size = old->files[i].size;
        file->hash = old->files[i].hash;
        file->done = 1;
    }
    return status;
}

/* Everything that a run with another journal had finished. */
static fst_status remove_old(fst_convert_job *c, const fst_journal *old) {
    for (size_t i = 0; i < old->count; i++) {
        char *path = fst_join(c->output, old->files[i].name);
        if (!path) return fst_no_memory(c->error);
        int code = fst_os_calls.unlink(path);
        fst_status status =
            code && code != -ENOENT && code != -ENOTDIR ? io_failed(c, path, code, "remove it") : FST_OK;
        free(path);
        if (status) return status;
    }
    return FST_OK;
}

/* Goes on where an earlier run ended, or begins anew. */
static fst_status take_up(fst_convert_job *c) {
    fst_journal old;
    fst_status status = fst_journal_read(c->journal_path, &old, c->error);
    if (!status && old.head) {
        int same =
            old.head_length == c->journal.head_length && !memcmp(old.head, c->journal.head, old.head_length);
        status = same ? keep_shards(c, &old) : remove_old(c, &old);
    }
    fst_journal_free(&old);
    if (!status) status = fst_journal_write(c->journal_path, c->partial, &c->journal, c->error);
    return status;
}

/* ---- Tensors ----------------------------------------------------------------------------------------- */

/* Sources that nothing is made of any more. 0: all are. */
static int choose_sources(fst_convert_job *c) {
    int any = 0;
    memset(c->skip, 1, c->sources);
    for (size_t i = 0; i < c->model->count; i++) {
        if (c->shards[c->shard_of[i]].kept) continue;
        for (uint32_t k = 1; k <= c->needs[i][0]; k++) c->skip[c->needs[i][k]] = 0;
        any = 1;
    }
    return any;
}

/* Which result this is: they come in order. */
static fst_status match(const fst_convert_job *c, const fst_tensor *tensor, size_t *next) {
    const fst_model *model = c->model;
    size_t i = fst_model_index(model, tensor->name);
    if (i == SIZE_MAX || i < *next || model->tensors[i].dtype != tensor->dtype ||
        model->tensors[i].nbytes != tensor->nbytes)
        return fst_fail(c->error, FST_E_CHANGED, 0, NULL,
                        "tensor \"%s\" is not what it was when the conversion began", tensor->name);
    *next = i + 1;
    return FST_OK;
}

/* Gives a result to the writer. */
static fst_status hand_over(fst_convert_job *c, size_t result, fst_block *block, const void *data) {
    fst_status status = FST_OK;
    if (c->shards[c->shard_of[result]].kept) {
        fst_block_drop(block); /* it came with another one that is made of the same */
        return FST_OK;
    }
    for (size_t done = 0; !status && !fst_writer_put(&c->writer, result, block, data);) {
        done = fst_writer_wait(&c->writer, done);
        status = tell(c, 0);
    }
    if (status) fst_block_drop(block);
    return status;
}

/* Takes tensors until the last one, or until the writer fails. */
static fst_status pump(fst_convert_job *c, fst_stream *stream, size_t *count) {
    size_t next = 0, done = 0;
    for (*count = 0;;) {
        fst_tensor tensor;
        fst_block *block;
        fst_status status = fst_stream_take(stream, &tensor, &block, c->error);
        if (status == FST_E_AGAIN) {
            done = fst_writer_wait(&c->writer, done);
            if (done == SIZE_MAX) return FST_OK;
            status = tell(c, 0);
        } else if (!status && tensor.name) {
            status = match(c, &tensor, &next);
            if (status) fst_block_drop(block);
            else status = hand_over(c, next - 1, block, tensor.data);
            ++*count;
            if (!status && fst_writer_failed(&c->writer)) return FST_OK;
        } else if (!status) {
            return FST_OK;
        }
        if (status) return status;
    }
}

/* Until all is written. */
static fst_status wait_for_writer(fst_convert_job *c) {
    fst_status status = FST_OK;
    for (size_t done = 0; !status && !fst_writer_is_idle(&c->writer);) {
        done = fst_writer_wait(&c->writer, done);
        status = tell(c, 0);
    }
    return status;
}

static uint64_t memory_bound(const fst_convert_job *c) {
    uint64_t largest = c->pending;
    for (size_t i = 0; i < c->model->count; i++)
        if (c->model->tensors[i].nbytes > largest) largest = c->model->tensors[i].nbytes;
    return largest + MORE_MEMORY > USUAL_MEMORY ? largest + MORE_MEMORY : USUAL_MEMORY;
}

static fst_status open_stream(fst_convert_job *c, const fst_allocator *allocator, fst_stream **out) {
    const char *const files[] = {c->directory, NULL};
    fst_options options = c->options;
    options.flags &= ~(unsigned)FST_AS_READY;
    options.stream = NULL;
    options.progress = stream_tells;
    options.progress_arg = c;
    if (!options.memory_bytes) options.memory_bytes = memory_bound(c);
    if (!options.allocator && c->model->gpu->host_access) options.allocator = allocator;
    return fst_stream_open_some(files, &options, c->skip, out, c->error);
}

static void add_stats(fst_convert_job *c, const fst_stream *stream, fst_convert_stats *stats) {
    fst_stats load = {.size = sizeof load};
    if (fst_model_stats(fst_stream_model(stream), &load)) return;
    stats->bytes_read = load.bytes_read;
    stats->peak_bytes = load.peak_device_bytes + load.pinned_bytes;
    stats->nans = load.nans;
    stats->nan_scales = load.nan_scales;
    stats->bare_weights = load.bare_weights;
    stats->bytes_needed = load.bytes_needed;
    stats->bytes_storage = load.bytes_storage;
    stats->write_seconds = c->writer.write_seconds;
    stats->sync_seconds = c->writer.sync_seconds;
}

static fst_status write_tensors(fst_convert_job *c, fst_convert_stats *stats) {
    fst_pool pool;
    fst_stream *stream = NULL;
    size_t count = 0;
    if (!choose_sources(c)) return FST_OK;
    fst_pool_begin(&pool, c->options.memory_bytes ? c->options.memory_bytes : memory_bound(c));
    fst_status status = fst_writer_begin(c);
    int begun = !status;
    if (!status) status = open_stream(c, &pool.allocator, &stream);
    if (!status) status = pump(c, stream, &count);
    if (!status) status = wait_for_writer(c);
    if (begun) {
        fst_status wrote = fst_writer_end(c, status != FST_OK);
        if (!status) status = wrote;
    }
    if (!status) add_stats(c, stream, stats);
    fst_stream_close(stream);
    fst_pool_end(&pool);
    return status;
}

/* ---- The whole --------------------------------------------------------------------------------------- */

/* The inputs are what they were when the journal was begun. */
static fst_status check_inputs(const fst_convert_job *c, uint64_t plan) {
    fst_text head = {0};
    fst_status status = make_head(c, plan, &head);
    if (!status && (head.used != c->journal.head_length || memcmp(head.data, c->journal.head, head.used)))
        status = fst_fail(c->error, FST_E_CHANGED, 0, NULL,
                          "a file of %s changed while it was converted; convert it again", c->directory);
    free(head.data);
    return status;
}

static fst_status write_small(fst_convert_job *c, const char *name, const fst_text *text) {
    char *path = fst_join(c->output, name);
    if (!path) return fst_no_memory(c->error);
    fst_status status = fst_replace_file(path, c->partial, text, c->error);
    free(path);
    return status;
}

/* What a loader looks at first comes last. */
static fst_status write_others(fst_convert_job *c, const fst_extras *extras, const fst_text *config) {
    fst_status status = FST_OK;
    fst_text index = {0};
    for (size_t i = 0; i < extras->count && !status; i++)
        status = fst_extras_copy(c->directory, c->output, extras->names[i], c->partial, c->options.cancel,
                                 c->error);
    if (!status) status = make_index(c, &index);
    if (!status) status = write_small(c, INDEX_NAME, &index);
    if (!status && config->used) status = write_small(c, "config.json", config);
    free(index.data);
    return status;
}

/* All is in place: nothing of ours stays behind. */
static void clean_up(fst_convert_job *c) {
    fst_os_calls.unlink(c->partial);
    fst_os_calls.unlink(c->shard_partial);
    fst_os_calls.unlink(c->lock_path);
    fst_os_calls.unlink(c->journal_path);
    fst_os_calls.remove_directory(c->state);
}

static void fill_stats(const fst_convert_job *c, const fst_extras *extras, fst_convert_stats *stats) {
    stats->tensors = c->model->count;
    stats->shards = c->shards_count;
    stats->files_copied = extras->count;
    for (size_t i = 0; i < c->shards_count; i++) {
        stats->bytes_out += c->shards[i].nbytes;
        stats->shards_kept += c->shards[i].kept != 0;
    }
    stats->shards_unused = c->model->stats.shards_unused;
    stats->device = c->model->gpu->label;
    stats->device_name = c->model->gpu->name;
    stats->seconds = fst_os_now() - c->started;
}

/* Everything that can be said before anything is written. */
static fst_status prepare(fst_convert_job *c, fst_extras *extras, fst_text *config, uint64_t *plan) {
    int as_stored = c->options.cast == FST_NATIVE && !c->options.rule;
    fst_status status = check_scale(c);
    if (!status) status = cut_shards(c);
    if (!status) status = fst_merge_metadata(c->model, c->directory, 1, &c->metadata, c->error);
    if (!status) status = hash_plan(c, plan);
    if (!status) status = fst_extras_find(c->directory, as_stored, extras, c->error);
    if (!status) status = fst_convert_config(c->model, c->directory, &c->options, config, c->error);
    return status ? status : make_journal(c, extras, *plan);
}

static fst_status run(fst_convert_job *c, const fst_options *given, fst_convert_stats *stats) {
    fst_extras extras = {0};
    fst_text config = {0};
    uint64_t plan = 0;
    int exists = 0, ours = 0;
    fst_status status = plan_results(c, given);
    if (!status) status = prepare(c, &extras, &config, &plan);
    if (!status) status = look_at_output(c, &exists, &ours);
    if (!status) status = lock_output(c, exists, ours);
    if (!status) status = take_up(c);
    if (!status) status = write_tensors(c, stats);
    if (!status) status = check_inputs(c, plan);
    if (!status) status = write_others(c, &extras, &config);
    if (!status) clean_up(c);
    if (!status) status = tell(c, 1);
    if (!status) fill_stats(c, &extras, stats);
    else if (c->lock >= 0) fst_os_calls.unlink(c->partial);
    fst_extras_free(&extras);
    free(config.data);
    return status;
}

static void free_conversion(fst_convert_job *c) {
    if (c->lock >= 0) fst_os_calls.close(c->lock);
    for (size_t i = 0; c->needs && c->model && i < c->model->count; i++) free(c->needs[i]);
    free(c->needs);
    free(c->skip);
    free(c->shards);
    free(c->shard_of);
    free(c->metadata.data);
    fst_journal_free(&c->journal);
    fst_model_free(c->model);
    free(c->source);
    free(c->output);
    free(c->state);
    free(c->journal_path);
    free(c->lock_path);
    free(c->partial);
    free(c->shard_partial);
}

static fst_status take_options(fst_convert_job *c, const fst_convert_options *given) {
    fst_convert_options options = {0};
    if (given && given->size < sizeof given->size)
        return refuse(c, NULL, "fst_convert_options.size is not set");
    for (size_t i = sizeof options; given && i < given->size; i++)
        if (((const unsigned char *)given)[i])
            return refuse(c, NULL, "the options are of a newer version of fst");
    if (given) memcpy(&options, given, given->size < sizeof options ? given->size : sizeof options);
    c->shard_bytes = options.shard_bytes ? options.shard_bytes : USUAL_SHARD;
    return FST_OK;
}

fst_status fst_convert_directory(const char *directory, const char *output, const fst_options *options,
                                 const fst_convert_options *convert, fst_convert_stats *stats,
                                 fst_error *error) {
    fst_error mine = {.file = -1, .offset = -1};
    fst_convert_stats facts = {.size = sizeof facts};
    fst_convert_job *c = calloc(1, sizeof *c);
    fst_status status = c ? FST_OK : fst_no_memory(&mine);
    if (!status) {
        c->error = &mine;
        c->lock = -1;
        c->started = fst_os_now();
        if (stats && stats->size < sizeof stats->size)
            status = refuse(c, NULL, "fst_convert_stats.size is not set");
        if (!status) status = take_options(c, convert);
        if (!status) status = make_paths(c, directory, output);
        if (!status) status = run(c, options, &facts);
        free_conversion(c);
    }
    free(c);
    if (error) *error = mine;
    if (status) fst_set_last_error(&mine);
    if (!status && stats) {
        facts.size = stats->size;
        memcpy(stats, &facts, facts.size < sizeof facts ? facts.size : sizeof facts);
    }
    return status;
}
