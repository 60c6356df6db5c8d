/* Parts of tensors: which rules there are, and, apart from the library, what they come to. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "load.h"

/* ---- Rules ------------------------------------------------------------------------------------------ */

/* Those of --rows are in front: what the ready-made ones cut along columns is cut along rows. */
static const fst_shard_rule rows[] = {
    {"*.o_proj.weight", 0, 0}, {"*.down_proj.weight", 0, 0}, {"*.wo.weight", 0, 0}, {"*.w2.weight", 0, 0}};

static const fst_shard_rule *make_rules(const load_options *o, load_part part) {
    static const fst_shard_rule none = {NULL, 0, 0};
    const fst_shard_rule *more = o->tp ? fst_shard_rules() : &none;
    size_t count = 0, first = part == LOAD_ROWS ? sizeof rows / sizeof *rows : 0;
    while (more[count].glob) count++;
    fst_shard_rule *rules = calloc(first + o->shards_count + count + 1, sizeof *rules);
    if (!rules) bench_die("out of memory");
    if (first) memcpy(rules, rows, sizeof rows);
    memcpy(rules + first, o->shards, o->shards_count * sizeof *rules);
    memcpy(rules + first + o->shards_count, more, (count + 1) * sizeof *rules);
    return rules;
}

void load_find_parts(load_bench *b) {
    fst_model *model;
    fst_error error;
    if (!b->o.ranks) return;
    if (fst_open(b->given.given, NULL, &model, &error)) bench_die("%s: %s", error.path, error.text);
    b->header_bytes = b->given.bytes;
    for (load_part part = LOAD_PART; part < LOAD_PARTS; part++) b->rules[part] = make_rules(&b->o, part);
    for (size_t i = 0; i < fst_model_count(model); i++) {
        fst_tensor tensor;
        fst_quantization quantization;
        load_slice slice;
        fst_model_at(model, i, &tensor);
        b->header_bytes -= tensor.nbytes;
        if (fst_model_quantization(model, i, &quantization) == FST_OK) b->quantized = 1;
        for (load_part part = LOAD_PART; part < LOAD_PARTS; part++) {
            load_slice_of(b, part, &tensor, &slice);
            b->needed[part] += slice.nbytes;
        }
    }
    if (b->quantized) memset(b->needed, 0, sizeof b->needed); /* companions go with their weights */
    fst_model_free(model);
}

/* ---- Slices ------------------------------------------------------------------------------------------ */

static int matches(const char *glob, const char *name) {
    if (*glob == '*') return matches(glob + 1, name) || (*name && matches(glob, name + 1));
    if (*glob == 0 || *name == 0) return *glob == *name;
    return (*glob == '?' || *glob == *name) && matches(glob + 1, name + 1);
}

static void cut(const fst_tensor *whole, load_slice *s) {
    uint64_t outer = 1, step = whole->nbytes;
    *s = (load_slice){
        .dim = s->dim, .begin = s->begin, .end = s->end, .run = step, .step = step, .nbytes = step};
    if (s->dim == FST_REPLICATE || whole->nbytes == 0) return;
    for (int32_t i = 0; i < s->dim; i++) outer *= whole->shape[i];
    s->step = whole->nbytes / outer;
    uint64_t extent = whole->shape[s->dim];
    if (s->step * outer != whole->nbytes || s->step % extent)
        bench_die("tensor %s is cut within bytes: that cannot be compared", whole->name);
    s->first = s->step / extent * s->begin;
    s->run = s->step / extent * (s->end - s->begin);
    s->nbytes = outer * s->run;
}

void load_slice_of(const load_bench *b, load_part part, const fst_tensor *whole, load_slice *out) {
    const fst_shard_rule *rule = b->rules[part];
    while (rule->glob && !matches(rule->glob, whole->name)) rule++;
    *out = (load_slice){.dim = rule->glob ? rule->dim : FST_REPLICATE};
    if (out->dim >= 0 && (size_t)out->dim >= whole->ndim)
        bench_die("tensor %s has no dimension %d", whole->name, (int)out->dim);
    if (out->dim >= 0) {
        uint64_t unit = rule->unit ? rule->unit : 1, extent = whole->shape[out->dim];
        uint64_t each = ((extent + unit - 1) / unit + b->o.ranks - 1) / b->o.ranks * unit;
        out->begin = each * b->o.rank < extent ? each * b->o.rank : extent;
        out->end = out->begin + each < extent ? out->begin + each : extent;
    }
    cut(whole, out);
}

void load_slice_said(const fst_tensor *part, const fst_tensor *whole, load_slice *out) {
    *out = (load_slice){.dim = part->shard_dim};
    if (out->dim >= 0) {
        out->begin = part->shard_begin;
        out->end = part->shard_begin + part->shape[out->dim];
    }
    cut(whole, out);
}

uint64_t load_slice_place(const load_slice *slice, uint64_t at, size_t *size) {
    uint64_t left = slice->run - at % slice->run;
    if (*size > left) *size = (size_t)left;
    return slice->first + at / slice->run * slice->step + at % slice->run;
}
