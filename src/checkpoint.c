/* The files beside the weights: which are copied, and how config.json changes. */
#include "checkpoint.h"

#include <errno.h>
#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>
#include <yyjson.h>

#include "configs.h"
#include "os.h"
#include "quantize.h"

#define MOST_FOLDERS 16u /* one in another */
#define COPY_BYTES ((size_t)1 << 20)

static fst_status no_memory(fst_error *error) {
    return fst_fail(error, FST_E_MEMORY, ENOMEM, NULL, "out of memory");
}

static fst_status io_failed(const char *path, int code, const char *what, fst_error *error) {
    fst_where where = {path, -1, -1};
    return fst_fail(error, FST_E_IO, -code, &where, "cannot %s: %s", what, strerror(-code));
}

char *fst_join(const char *directory, const char *name) {
    size_t head = strlen(directory), tail = strlen(name);
    char *path = malloc(head + tail + 2);
    if (!path) return NULL;
    memcpy(path, directory, head);
    path[head] = '/';
    memcpy(path + head + 1, name, tail + 1);
    return path;
}

/* ---- Which files ------------------------------------------------------------------------------------ */

static int matches(const char *name, const char *const *patterns) {
    for (; *patterns; patterns++)
        if (fnmatch(*patterns, name, 0) == 0) return 1;
    return 0;
}

/* Weights in this format and in others, and what is written anew. */
static int is_replaced(const char *name) {
    static const char *const patterns[] = {"*.safetensors",       "*.safetensors.index.json",
                                           "pytorch_model*.bin",  "pytorch_model*.bin.index.json",
                                           "model*.bin",          "consolidated*.pt",
                                           "consolidated*.pth",   "tf_model*.h5",
                                           "flax_model*.msgpack", "*.gguf",
                                           "config.json",         NULL};
    return matches(name, patterns);
}

/* What says how the weights are quantized, apart from config.json. */
static int is_quantization(const char *name) {
    static const char *const patterns[] = {"hf_quant_config.json", "quantize_config.json", NULL};
    return matches(name, patterns);
}

/* Folders that hold the same weights once more, as their authors store them. */
static int is_twin(const char *folder) { return !strcmp(folder, "original") || !strcmp(folder, "metal"); }

static int is_weight_of_twin(const char *name) {
    static const char *const patterns[] = {
        "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", NULL};
    return matches(name, patterns);
}

typedef struct search {
    const char *directory;
    int as_stored; /* weights are not converted */
    fst_extras *found;
    size_t room;
    fst_error *error;
} search;

static fst_status add(search *s, const char *name) {
    fst_extras *found = s->found;
    if (found->count == s->room) {
        size_t room = 2 * s->room + 32;
        char **larger = realloc(found->names, room * sizeof *larger);
        if (!larger) return no_memory(s->error);
        found->names = larger;
        s->room = room;
    }
    char *copy = strdup(name);
    if (!copy) return no_memory(s->error);
    found->names[found->count++] = copy;
    return FST_OK;
}

static fst_status walk(search *s, const char *folder, unsigned depth);

/* `relative` is the name from the directory on, `name` its last part. */
static fst_status consider(search *s, const char *folder, const char *relative, const char *name,
                           unsigned depth) {
    int top = !*folder;
    if (name[0] == '.' || (top && is_replaced(name)) || (top && !s->as_stored && is_quantization(name)) ||
        (is_twin(folder) && is_weight_of_twin(name)))
        return FST_OK;
    char *path = fst_join(s->directory, relative);
    if (!path) return no_memory(s->error);
    fst_where where = {path, -1, -1};
    fst_file_type type = FST_FILE_OTHER;
    fst_status status = FST_OK;
    int code = fst_os_calls.stat_type(path, &type);
    if (code) status = io_failed(path, code, "look at it", s->error);
    else if (type == FST_FILE_DIRECTORY) status = walk(s, relative, depth + 1);
    else if (type == FST_FILE_REGULAR) status = add(s, relative);
    else status = fst_fail(s->error, FST_E_FILE_TYPE, 0, &where, "neither a file nor a directory");
    free(path);
    return status;
}

static fst_status walk(search *s, const char *folder, unsigned depth) {
    char *path = *folder ? fst_join(s->directory, folder) : strdup(s->directory), **names = NULL;
    if (!path) return no_memory(s->error);
    fst_where where = {path, -1, -1};
    fst_status status = FST_OK;
    if (depth > MOST_FOLDERS)
        status = fst_fail(s->error, FST_E_FILE_TYPE, 0, &where, "more than %u folders one in another",
                          MOST_FOLDERS);
    int code = status ? 0 : fst_os_calls.list(path, &names);
    if (code) status = io_failed(path, code, "list it", s->error);
    for (char **name = names; name && *name && !status; name++) {
        char *relative = *folder ? fst_join(folder, *name) : strdup(*name);
        status = relative ? consider(s, folder, relative, *name, depth) : no_memory(s->error);
        free(relative);
    }
    free(names);
    free(path);
    return status;
}

fst_status fst_extras_find(const char *directory, int as_stored, fst_extras *out, fst_error *error) {
    search s = {.directory = directory, .as_stored = as_stored, .found = out, .error = error};
    memset(out, 0, sizeof *out);
    return walk(&s, "", 0);
}

void fst_extras_free(fst_extras *extras) {
    for (size_t i = 0; i < extras->count; i++) free(extras->names[i]);
    free(extras->names);
    memset(extras, 0, sizeof *extras);
}

/* ---- Copying ---------------------------------------------------------------------------------------- */

static fst_status make_folders(const char *output, const char *name, fst_error *error) {
    char *path = fst_join(output, name);
    if (!path) return no_memory(error);
    fst_status status = FST_OK;
    for (char *slash = path + strlen(output) + 1; !status && (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        int code = fst_os_calls.make_directory(path);
        if (code && code != -EEXIST) status = io_failed(path, code, "make this folder", error);
        *slash = '/';
    }
    free(path);
    return status;
}

static fst_status copy_data(int from, int to, const char *source, const char *target, char *buffer,
                            const volatile int *cancel, fst_error *error) {
    for (uint64_t offset = 0;;) {
        if (cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED))
            return fst_fail(error, FST_E_CANCELLED, 0, NULL, "cancelled while files were copied");
        ssize_t got = fst_os_read_all(from, buffer, COPY_BYTES, offset);
        if (got < 0) return io_failed(source, (int)got, "read it", error);
        int code = got ? fst_os_write_all(to, buffer, (size_t)got, offset) : 0;
        if (code) return io_failed(target, code, "write", error);
        offset += (uint64_t)got;
        if ((size_t)got < COPY_BYTES) return FST_OK;
    }
}

static fst_status copy_file(const char *source, const char *target, const char *partial,
                            const volatile int *cancel, fst_error *error) {
    char *buffer = malloc(COPY_BYTES);
    if (!buffer) return no_memory(error);
    int from = fst_os_calls.open_read(source), to = from < 0 ? -1 : fst_os_calls.create(partial);
    fst_status status = from < 0 ? io_failed(source, from, "open it", error)
                        : to < 0 ? io_failed(partial, to, "make a file of this name", error)
                                 : copy_data(from, to, source, target, buffer, cancel, error);
    int code = status ? 0 : fst_os_calls.fsync(to);
    if (from >= 0) fst_os_calls.close(from);
    int closed = to >= 0 ? fst_os_calls.close(to) : 0;
    if (!status && !code) code = closed;
    if (!status && !code) code = fst_os_calls.rename(partial, target);
    if (code) status = io_failed(target, code, "finish this file", error);
    free(buffer);
    return status;
}

fst_status fst_extras_copy(const char *directory, const char *output, const char *name, const char *partial,
                           const volatile int *cancel, fst_error *error) {
    char *source = fst_join(directory, name), *target = fst_join(output, name);
    fst_status status = source && target ? make_folders(output, name, error) : no_memory(error);
    if (!status) status = copy_file(source, target, partial, cancel, error);
    free(source);
    free(target);
    return status;
}

/* ---- Memory of JSON ---------------------------------------------------------------------------------- */

/* What is added to a document when memory ran out is simply not there: so it is noted. `context` is an int. */
static void *json_malloc(void *context, size_t size) {
    void *memory = malloc(size);
    if (!memory) *(int *)context = 1;
    return memory;
}

static void *json_realloc(void *context, void *memory, size_t old_size, size_t size) {
    (void)old_size;
    void *larger = realloc(memory, size);
    if (!larger) *(int *)context = 1;
    return larger;
}

static void json_free(void *context, void *memory) {
    (void)context;
    free(memory);
}

/* ---- config.json ------------------------------------------------------------------------------------- */

/* What torch calls it; NULL: nothing that a config would say. */
static const char *torch_name(fst_dtype dtype) {
    switch (dtype) {
    case FST_F64: return "float64";
    case FST_F32: return "float32";
    case FST_F16: return "float16";
    case FST_BF16: return "bfloat16";
    case FST_F8_E4M3: return "float8_e4m3fn";
    case FST_F8_E5M2: return "float8_e5m2";
    case FST_F8_E4M3FNUZ: return "float8_e4m3fnuz";
    case FST_F8_E5M2FNUZ: return "float8_e5m2fnuz";
    default: return NULL;
    }
}

static int ends_in(const char *text, const char *end) {
    size_t size = strlen(text), tail = strlen(end);
    return size >= tail && !strcmp(text + size - tail, end);
}

/* 1 when there was one. */
static int set_dtype(yyjson_mut_doc *doc, yyjson_mut_val *object, const char *name) {
    static const char *const keys[] = {"torch_dtype", "dtype"};
    int found = 0;
    for (int i = 0; i < 2; i++) {
        yyjson_mut_val *value = yyjson_mut_obj_get(object, keys[i]);
        if (!value || yyjson_mut_is_null(value)) continue;
        found = 1;
        if (name) yyjson_mut_obj_replace(object, yyjson_mut_str(doc, keys[i]), yyjson_mut_str(doc, name));
    }
    return found;
}

/* The model's configuration, and those of its parts (text_config, vision_config, ...). 1 when it names a dtype. */
static int convert_object(yyjson_mut_doc *doc, yyjson_mut_val *object, const char *dtype) {
    yyjson_mut_obj_remove_key(object, "quantization_config");
    yyjson_mut_obj_remove_key(object, "compression_config");
    int has_dtype = set_dtype(doc, object, dtype);
    yyjson_mut_obj_iter iter = yyjson_mut_obj_iter_with(object);
    for (yyjson_mut_val *key; (key = yyjson_mut_obj_iter_next(&iter));) {
        yyjson_mut_val *value = yyjson_mut_obj_iter_get_val(key);
        if (yyjson_mut_is_obj(value) && ends_in(yyjson_mut_get_str(key), "_config"))
            convert_object(doc, value, dtype);
    }
    return has_dtype;
}

/* ---- quantization_config ------------------------------------------------------------------------------ */

/* Names of the modules whose weights are matrices, but not codes. */
static yyjson_mut_val *list_dense(yyjson_mut_doc *doc, const fst_model *model, fst_dtype codes) {
    yyjson_mut_val *list = yyjson_mut_arr(doc);
    for (size_t i = 0; i < model->count; i++) {
        const fst_model_tensor *tensor = &model->tensors[i];
        const char *name = tensor->entry->name;
        size_t length = tensor->entry->name_length, suffix = strlen(".weight");
        if (tensor->dtype == codes || tensor->entry->ndim < 2 || length <= suffix ||
            !ends_in(name, ".weight"))
            continue;
        yyjson_mut_arr_add_strncpy(doc, list, name, length - suffix);
    }
    return list;
}

static void fill_fp8(yyjson_mut_doc *doc, yyjson_mut_val *config, fst_scale scale, yyjson_mut_val *dense) {
    yyjson_mut_obj_add_str(doc, config, "quant_method", "fp8");
    yyjson_mut_obj_add_str(doc, config, "fmt", "e4m3");
    yyjson_mut_obj_add_str(doc, config, "activation_scheme", "dynamic");
    if (scale == FST_QUANTIZE_BLOCK) {
        yyjson_mut_val *block = yyjson_mut_obj_add_arr(doc, config, "weight_block_size");
        for (int i = 0; block && i < 2; i++) yyjson_mut_arr_add_uint(doc, block, FST_QUANTIZE_TILE);
    }
    yyjson_mut_obj_add_val(doc, config, "modules_to_not_convert", dense);
}

static void fill_side(yyjson_mut_doc *doc, yyjson_mut_val *group, const char *which, const char *strategy,
                      int dynamic) {
    yyjson_mut_val *side = yyjson_mut_obj_add_obj(doc, group, which);
    if (!side) return;
    yyjson_mut_obj_add_uint(doc, side, "num_bits", 8);
    yyjson_mut_obj_add_str(doc, side, "type", "float");
    yyjson_mut_obj_add_bool(doc, side, "symmetric", 1);
    yyjson_mut_obj_add_str(doc, side, "strategy", strategy);
    yyjson_mut_obj_add_bool(doc, side, "dynamic", dynamic);
}

static void fill_compressed(yyjson_mut_doc *doc, yyjson_mut_val *config, yyjson_mut_val *dense) {
    yyjson_mut_obj_add_str(doc, config, "quant_method", "compressed-tensors");
    yyjson_mut_obj_add_str(doc, config, "format", "float-quantized");
    yyjson_mut_obj_add_str(doc, config, "quantization_status", "compressed");
    yyjson_mut_val *groups = yyjson_mut_obj_add_obj(doc, config, "config_groups");
    yyjson_mut_val *group = groups ? yyjson_mut_obj_add_obj(doc, groups, "group_0") : NULL;
    yyjson_mut_val *targets = group ? yyjson_mut_obj_add_arr(doc, group, "targets") : NULL;
    if (!targets) return;
    yyjson_mut_arr_add_str(doc, targets, "Linear");
    fill_side(doc, group, "weights", "channel", 0);
    fill_side(doc, group, "input_activations", "token", 1);
    yyjson_mut_obj_add_null(doc, group, "output_activations");
    yyjson_mut_obj_add_val(doc, config, "ignore", dense);
}

/* 0 when memory ran out. */
static int add_quantization(yyjson_mut_doc *doc, yyjson_mut_val *root, const fst_model *model,
                            const fst_options *options) {
    yyjson_mut_val *config = yyjson_mut_obj_add_obj(doc, root, "quantization_config");
    yyjson_mut_val *dense = list_dense(doc, model, options->cast);
    if (!config || !dense) return 0;
    if (options->scale == FST_QUANTIZE_ROW) fill_compressed(doc, config, dense);
    else fill_fp8(doc, config, options->scale, dense);
    return 1;
}

/* ---- All of it ---------------------------------------------------------------------------------------- */

static fst_status write_config(yyjson_mut_doc *doc, const yyjson_alc *memory, fst_text *out,
                               fst_error *error) {
    size_t length;
    yyjson_write_flag flags = YYJSON_WRITE_PRETTY_TWO_SPACES | YYJSON_WRITE_ALLOW_INF_AND_NAN;
    char *text = yyjson_mut_write_opts(doc, flags, memory, &length, NULL);
    if (!text) return no_memory(error);
    fst_put(out, text, length);
    fst_put(out, "\n", 1);
    free(text);
    return out->failed ? no_memory(error) : FST_OK;
}

static fst_status change_config(const fst_model *model, const fst_config_text *config,
                                const fst_options *options, fst_text *out, fst_error *error) {
    fst_where where = {config->path, -1, -1};
    yyjson_read_err why;
    /* Numbers stay as they are written. */
    yyjson_read_flag flags = YYJSON_READ_NUMBER_AS_RAW | YYJSON_READ_ALLOW_INF_AND_NAN;
    int lacking = 0;
    const yyjson_alc memory = {json_malloc, json_realloc, json_free, &lacking};
    yyjson_doc *doc = yyjson_read_opts((char *)(uintptr_t)config->text, config->length, flags, &memory, &why);
    yyjson_mut_doc *changed = doc ? yyjson_doc_mut_copy(doc, &memory) : NULL;
    yyjson_mut_val *root = yyjson_mut_doc_get_root(changed);
    fst_status status = FST_OK;
    if (lacking) {
        status = no_memory(error);
    } else if (!doc) {
        where.offset = (int64_t)why.pos;
        status = fst_fail(error, FST_E_JSON, 0, &where, "not JSON: %s", why.msg);
    } else if (!changed) {
        status = no_memory(error);
    } else if (!yyjson_mut_is_obj(root)) {
        status = fst_fail(error, FST_E_JSON, 0, &where, "no JSON object");
    } else {
        /* With scales, the dtype is the one that is computed in, and that of the tensors that are left alone. */
        const char *dtype = options->scale ? NULL : torch_name(options->cast);
        int has_dtype = convert_object(changed, root, dtype);
        if (!has_dtype && dtype) yyjson_mut_obj_add_str(changed, root, "torch_dtype", dtype);
        if (options->scale && !add_quantization(changed, root, model, options)) status = no_memory(error);
    }
    if (!status && lacking) status = no_memory(error);
    if (!status) status = write_config(changed, &memory, out, error);
    yyjson_mut_doc_free(changed);
    yyjson_doc_free(doc);
    return status;
}

fst_status fst_convert_config(const fst_model *model, const char *directory, const fst_options *options,
                              fst_text *out, fst_error *error) {
    fst_configs configs = {0};
    char *beside = fst_join(directory, "config.json");
    fst_status status = beside ? fst_configs_read(beside, NULL, &configs, error) : no_memory(error);
    const fst_config_text *config = &configs.texts[FST_CONFIG];
    if (!status && config->text && options->cast == FST_NATIVE) {
        fst_put(out, config->text, config->length);
        if (out->failed) status = no_memory(error);
    } else if (!status && config->text) {
        status = change_config(model, config, options, out, error);
    }
    fst_configs_free(&configs);
    free(beside);
    return status;
}
