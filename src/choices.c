/* What is wanted of each tensor: the options' rules for shards, then the caller's own rule. */
#include <stdlib.h>
#include <string.h>

#include "loading.h"
#include "quantize.h"
#include "shard.h"

/* ---- Rules for shards ------------------------------------------------------------------------------ */

/* Rules may speak of a tensor by its name or by that of the weight whose codes it holds, and a companion of a weight goes where
 * that goes. All this is known by names: the scheme is found later, of what is left. */
typedef struct namer {
    fst_loading *l;
    char *buffers[2];
} namer;

static fst_string join(char *buffer, const char *name, const fst_scheme_name *made) {
    size_t size = strlen(made->suffix);
    memcpy(buffer, name, made->length);
    memcpy(buffer + made->length, made->suffix, size);
    return (fst_string){buffer, made->length + size};
}

static fst_string name_of(const fst_entry *entry) { return (fst_string){entry->name, entry->name_length}; }

/* The name of the weight that an entry holds the codes of; 0: none, or the same. */
static int weight_name(const fst_entry *entry, char *buffer, fst_string *out) {
    fst_scheme_name made;
    if (!fst_scheme_may_be_codes(entry->dtype) ||
        !fst_scheme_weight_name(entry->name, entry->name_length, &made))
        return 0;
    *out = join(buffer, entry->name, &made);
    return 1;
}

/* A table of names before anything is left out. Of two tensors with one name the first: that is an error only if both stay. */
static fst_status index_names(fst_loading *l) {
    fst_model *model = l->model;
    if (model->names) return FST_OK;
    if (fst_loading_empty_names(l)) return l->error->status;
    for (size_t i = 0; i < model->count; i++) {
        const fst_model_tensor *tensor = &model->tensors[i];
        size_t at = fst_model_slot(model, tensor->hash, tensor->entry->name, tensor->entry->name_length);
        if (!model->names[at].index)
            model->names[at] = (fst_model_name){(uint32_t)(i + 1), (uint32_t)(tensor->hash >> 32)};
    }
    return FST_OK;
}

/* The tensor that holds the codes which this one belongs to, or FST_NO_TENSOR. There is a table of names. */
static uint32_t find_owner(const namer *n, const fst_entry *entry) {
    const fst_model *model = n->l->model;
    fst_scheme_name made;
    int takes_any;
    for (size_t k = 0; fst_scheme_owner_name(entry->name, entry->name_length, k, &made, &takes_any); k++) {
        fst_string name = join(n->buffers[0], entry->name, &made);
        uint64_t hash = fst_model_hash(model, name.data, name.length);
        uint32_t found = model->names[fst_model_slot(model, hash, name.data, name.length)].index;
        if (found && (takes_any || fst_scheme_may_be_codes(model->tensors[found - 1].entry->dtype)))
            return found - 1;
    }
    return FST_NO_TENSOR;
}

/* A companion is cut as its weight is, by whoever cuts that: not on its own. */
static fst_status find_cut(const namer *n, fst_shards *shards, const fst_entry *entry,
                           fst_shard_choice *cut) {
    fst_string names[4] = {name_of(entry)};
    size_t count = 1;
    count += (size_t)weight_name(entry, n->buffers[1], &names[count]);
    *cut = fst_shards_find(shards, names, count);
    if (cut->dim == FST_REPLICATE && !fst_shards_skip(shards)) return FST_OK;
    fst_status status = index_names(n->l);
    uint32_t found = status ? FST_NO_TENSOR : find_owner(n, entry);
    if (found == FST_NO_TENSOR) return status;
    const fst_entry *owner = n->l->model->tensors[found].entry;
    names[count++] = name_of(owner);
    count += (size_t)weight_name(owner, n->buffers[0], &names[count]);
    *cut = fst_shards_find(shards, names, count);
    cut->dim = FST_REPLICATE;
    cut->unit = 1;
    return FST_OK;
}

static fst_status count_unused(fst_loading *l, const fst_shards *shards) {
    const char *first;
    l->model->stats.shards_unused = fst_shards_unused(shards, &first);
    if (!first || !(l->options.flags & FST_STRICT_SHARDS)) return FST_OK;
    return fst_fail(l->error, FST_E_NOT_FOUND, 0, NULL, "the shard rule \"%.300s\" matches no tensor", first);
}

/* Of every tensor of the model; the caller frees. */
static fst_status find_cuts(const namer *n, fst_shard_choice **out) {
    const fst_model *model = n->l->model;
    fst_shards *shards = fst_shards_new(n->l->options.shards);
    fst_shard_choice *cuts = *out = calloc(model->count + 1, sizeof *cuts);
    fst_status status = shards && cuts ? FST_OK : fst_no_memory(n->l->error);
    for (size_t i = 0; i < model->count && !status; i++)
        status = find_cut(n, shards, model->tensors[i].entry, &cuts[i]);
    if (!status) status = count_unused(n->l, shards);
    fst_shards_free(shards);
    return status;
}

/* ---- The caller's rule ----------------------------------------------------------------------------- */

/* What is wrong with the part that it asks for, or NULL. */
static const char *wrong_part(const fst_rule *rule) {
    if (rule->shard_dim < FST_REPLICATE || rule->shard_dim >= FST_MAX_DIMS)
        return "the rule's shard_dim is no dimension, from 0 to 63, nor FST_REPLICATE";
    if (rule->shard_begin > rule->shard_end) return "the rule's part ends before it begins";
    if (rule->shard_end && rule->shard_dim == FST_REPLICATE) return "the rule's part has no dimension";
    if (rule->layout & ~(uint32_t)(FST_TRANSPOSE | FST_DEINTERLEAVE))
        return "the rule's layout has unknown bits";
    if (rule->into && !*rule->into) return "the rule's name of a result to become a part of is empty";
    if (rule->into && (rule->into_dim < -1 || rule->into_dim >= FST_MAX_DIMS))
        return "the rule's into_dim is no dimension, from 0 to 63, nor -1";
    return NULL;
}

static fst_status take_part(const fst_rule *rule, fst_choice *choice, fst_error *error) {
    if (rule->shard_dim != choice->shard_dim) choice->unit = 1; /* it was another dimension's */
    choice->shard_dim = rule->shard_dim;
    choice->begin = rule->shard_begin;
    choice->end = rule->shard_end;
    choice->layout = rule->layout;
    choice->into_dim = rule->into_dim;
    choice->into_place = rule->into_place;
    if (rule->into && !(choice->into = strdup(rule->into))) return fst_no_memory(error);
    return FST_OK;
}

static fst_status ask_rule(fst_loading *l, const fst_model_tensor *tensor, fst_choice *choice) {
    const fst_options *options = &l->options;
    fst_where where = {fst_file_path(l->model, tensor->file), (int)tensor->file,
                       (int64_t)(l->model->headers[tensor->file].data_start + tensor->entry->begin)};
    fst_rule rule = {.skip = choice->skip,
                     .cast = choice->cast,
                     .scale = choice->scale,
                     .shard_dim = choice->shard_dim,
                     .into_dim = choice->into_dim};
    fst_tensor described;
    fst_describe_tensor(l->model, tensor, &described);
    if (options->rule(options->rule_arg, &described, &rule))
        return fst_fail(l->error, FST_E_CANCELLED, 0, &where, "tensor \"%s\": the rule ended the load",
                        described.name);
    if ((int)rule.cast < 0 || rule.cast >= FST_DTYPE_COUNT)
        return fst_fail(l->error, FST_E_ARG, 0, &where, "tensor \"%s\": the rule's %d is no dtype to cast to",
                        described.name, (int)rule.cast);
    if ((unsigned)rule.scale > FST_QUANTIZE_BLOCK)
        return fst_fail(l->error, FST_E_ARG, 0, &where, "tensor \"%s\": the rule's %d is no kind of scales",
                        described.name, (int)rule.scale);
    const char *wrong = wrong_part(&rule);
    if (wrong) return fst_fail(l->error, FST_E_ARG, 0, &where, "tensor \"%s\": %s", described.name, wrong);
    choice->skip = rule.skip != 0;
    choice->cast = rule.cast;
    choice->memory = rule.memory;
    choice->memory_bytes = rule.memory_bytes;
    choice->scale = rule.scale;
    return take_part(&rule, choice, l->error);
}

/* ---- Both ------------------------------------------------------------------------------------------- */

static fst_status choose(fst_loading *l, const fst_model_tensor *tensor, const fst_shard_choice *cut,
                         fst_choice *choice) {
    *choice = (fst_choice){.skip = cut->skip,
                           .cast = l->options.cast,
                           .scale = l->options.scale,
                           .shard_dim = cut->dim,
                           .unit = cut->unit,
                           .into_dim = -1};
    fst_quantize_defaults(tensor->entry, &choice->cast, &choice->scale);
    return l->options.rule ? ask_rule(l, tensor, choice) : FST_OK;
}

/* Of every tensor of the model; `choices` gets where. */
static fst_status choose_all(const namer *n, fst_choice **choices) {
    static const fst_shard_choice whole = {0, FST_REPLICATE, 1};
    fst_loading *l = n->l;
    fst_shard_choice *cuts = NULL;
    size_t tensor = 0;
    fst_status status = l->options.shards && !l->opens_only ? find_cuts(n, &cuts) : FST_OK;
    for (size_t i = 0; i < l->total && !status; i++) {
        if (l->choices[i].skip) continue; /* by the index */
        choices[tensor] = &l->choices[i];
        status = choose(l, &l->model->tensors[tensor], cuts ? &cuts[tensor] : &whole, choices[tensor]);
        tensor++;
    }
    free(cuts);
    return status;
}

/* A weight that the caller's rule left out takes its companions along. The list's rules have done so. */
static fst_status skip_companions(const namer *n, fst_choice **choices) {
    const fst_model *model = n->l->model;
    size_t skipped = 0;
    for (size_t i = 0; i < model->count; i++) skipped += choices[i]->skip != 0;
    if (!skipped) return FST_OK;
    fst_status status = index_names(n->l);
    for (size_t i = 0; i < model->count && !status; i++) {
        uint32_t owner = choices[i]->skip ? FST_NO_TENSOR : find_owner(n, model->tensors[i].entry);
        if (owner != FST_NO_TENSOR && choices[owner]->skip) choices[i]->skip = 1;
    }
    return status;
}

/* The model's tensors are then those that are not left out. */
static void drop_skipped(fst_loading *l, fst_choice **choices) {
    fst_model *model = l->model;
    const unsigned char *unwanted = l->unwanted;
    size_t kept = 0;
    for (size_t i = 0; i < model->count; i++) {
        if (!choices[i]->skip && unwanted) choices[i]->skip = *unwanted++;
        if (choices[i]->skip) continue;
        model->tensors[kept] = model->tensors[i];
        model->tensors[kept].planned = (uint32_t)kept;
        kept++;
    }
    model->count = kept;
}

fst_status fst_loading_choose(fst_loading *l) {
    const fst_model *model = l->model;
    size_t longest = 0;
    if (!l->choices) return FST_OK;
    for (size_t i = 0; i < model->count; i++)
        if (model->tensors[i].entry->name_length > longest) longest = model->tensors[i].entry->name_length;
    size_t room = longest + 16; /* a suffix is made longer by a few bytes */
    char *buffer = malloc(2 * room);
    fst_choice **choices = malloc((model->count + 1) * sizeof(fst_choice *));
    fst_status status = buffer && choices ? FST_OK : fst_no_memory(l->error);
    namer n = {l, {buffer, buffer ? buffer + room : NULL}};
    if (!status) status = choose_all(&n, choices);
    if (!status && l->options.rule) status = skip_companions(&n, choices);
    if (!status) drop_skipped(l, choices);
    free(buffer);
    free((void *)choices);
    return status;
}

int fst_loading_is_cut(const fst_loading *l) {
    for (size_t i = 0; l->choices && i < l->total; i++) {
        const fst_choice *choice = &l->choices[i];
        if (!choice->skip && choice->shard_dim != FST_REPLICATE && (l->options.ranks > 1 || choice->end))
            return 1;
    }
    return 0;
}
