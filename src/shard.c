/* Which part of a tensor a rank has, and the rules for names. */
#include "shard.h"

#include <stdlib.h>
#include <string.h>

#include "header.h"
#include "status.h"

#define MOST_RANKS 65536u

void fst_shard_range(uint64_t extent, uint64_t unit, unsigned rank, unsigned ranks, uint64_t *begin,
                     uint64_t *end) {
    uint64_t units, each;
    if (unit == 0) unit = 1;
    if (ranks == 0) ranks = 1;
    units = extent / unit + (extent % unit != 0);
    each = units / ranks + (units % ranks != 0); /* of all but the last ones */
    uint64_t first = rank && each > units / rank ? units : rank * each;
    uint64_t last = each > units - first ? units : first + each;
    *begin = first == units ? extent : first * unit;
    *end = last == units ? extent : last * unit;
    if (rank >= ranks) *begin = *end = extent;
}

/* ---- Rules for the usual models ------------------------------------------------------------------ */

/* docs/shards.md tells what they are. Their globs are objects of their own, so that they are known again in a longer list. */
#define READY_MADE(X)                                                                             \
    /* Towers have other names for some of a block's weights: they stay whole. */                 \
    X(vision, "vision_*", FST_REPLICATE, 0)                                                       \
    X(model_vision, "model.vision_*", FST_REPLICATE, 0)                                           \
    X(visual, "visual.*", FST_REPLICATE, 0)                                                       \
    X(model_visual, "model.visual.*", FST_REPLICATE, 0)                                           \
    X(audio, "audio_*", FST_REPLICATE, 0)                                                         \
    X(model_audio, "model.audio_*", FST_REPLICATE, 0)                                             \
    X(q, "*.q_proj.weight", 0, 0)                                                                 \
    X(k, "*.k_proj.weight", 0, 0)                                                                 \
    X(v, "*.v_proj.weight", 0, 0)                                                                 \
    X(q_bias, "*.q_proj.bias", 0, 0)                                                              \
    X(k_bias, "*.k_proj.bias", 0, 0)                                                              \
    X(v_bias, "*.v_proj.bias", 0, 0)                                                              \
    X(o, "*.o_proj.weight", 1, 0)                                                                 \
    X(gate, "*.gate_proj.weight", 0, 0)                                                           \
    X(up, "*.up_proj.weight", 0, 0)                                                               \
    X(gate_bias, "*.gate_proj.bias", 0, 0)                                                        \
    X(up_bias, "*.up_proj.bias", 0, 0)                                                            \
    X(down, "*.down_proj.weight", 1, 0)                                                           \
    X(embed, "*embed_tokens.weight", 0, 0)                                                        \
    X(head, "*lm_head.weight", 0, 0)                                                              \
    X(head_bias, "*lm_head.bias", 0, 0)                                                           \
    /* DeepSeek */                                                                                \
    X(q_b, "*.q_b_proj.weight", 0, 0)                                                             \
    X(kv_b, "*.kv_b_proj.weight", 0, 0)                                                           \
    X(next_head, "*.shared_head.head.weight", 0, 0)                                               \
    /* gpt-oss: experts are stacked; [experts, out, in] in MXFP4, [experts, in, out] otherwise */ \
    X(sinks, "*.self_attn.sinks", 0, 0)                                                           \
    X(gate_up_blocks, "model.layers.*.mlp.experts.gate_up_proj_blocks", 1, 64)                    \
    X(gate_up, "model.layers.*.mlp.experts.gate_up_proj", 2, 64)                                  \
    X(gate_up_bias, "model.layers.*.mlp.experts.gate_up_proj_bias", 1, 64)                        \
    X(down_blocks, "model.layers.*.mlp.experts.down_proj_blocks", 2, 32)                          \
    X(down_stack, "model.layers.*.mlp.experts.down_proj", 1, 32)                                  \
    /* Mistral's own names, and Mixtral's of experts */                                           \
    X(wq, "*.wq.weight", 0, 0)                                                                    \
    X(wk, "*.wk.weight", 0, 0)                                                                    \
    X(wv, "*.wv.weight", 0, 0)                                                                    \
    X(wo, "*.wo.weight", 1, 0)                                                                    \
    X(w1, "*.w1.weight", 0, 0)                                                                    \
    X(w3, "*.w3.weight", 0, 0)                                                                    \
    X(w2, "*.w2.weight", 1, 0)                                                                    \
    X(wq_b, "*.wq_b.weight", 0, 0)                                                                \
    X(wkv_b, "*.wkv_b.weight", 0, 0)                                                              \
    X(tok_embeddings, "tok_embeddings.weight", 0, 0)                                              \
    X(output, "output.weight", 0, 0)

#define X(name, text, ...) static const char glob_##name[] = text;
READY_MADE(X)
#undef X

static const fst_shard_rule ready_made[] = {
#define X(name, text, ...) {glob_##name, __VA_ARGS__},
    READY_MADE(X)
#undef X
        {NULL, 0, 0}};

const fst_shard_rule *fst_shard_rules(void) { return ready_made; }

static int is_ready_made(const fst_shard_rule *rule) {
    for (const fst_shard_rule *other = ready_made; other->glob; other++)
        if (rule->glob == other->glob && rule->dim == other->dim && rule->unit == other->unit) return 1;
    return 0;
}

/* ---- Globs --------------------------------------------------------------------------------------- */

/* What is known of a name before it is compared, or of the names that a glob matches: most names are told from most globs by
 * it. The last bytes but eight come first, as they differ most; then the last and the first ones. */
enum { BEFORE_LAST, LAST, FIRST, WORDS };
typedef struct edges {
    uint64_t words[WORDS];
} edges;
typedef struct pairs { /* of neighbouring bytes, hashed: a set */
    uint64_t bits[4];
} pairs;

typedef struct glob {
    const char *text;
    size_t length;
    size_t head, end; /* bytes before the first star, and behind the last one; without a star, all of them */
    size_t least;     /* bytes of the shortest name that matches */
} glob;

/* Same bytes, or any where the pattern has a question mark. */
static int fits(const char *pattern, const char *name, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (pattern[i] != name[i] && pattern[i] != '?') return 0;
    return 1;
}

/* Where a part between stars first fits, or NULL. */
static const char *find_part(const char *part, size_t size, const char *name, size_t length) {
    if (size > length) return NULL;
    if (!memchr(part, '?', size)) return memmem(name, length, part, size);
    for (const char *last = name + (length - size); name <= last; name++)
        if (fits(part, name, size)) return name;
    return NULL;
}

/* Each part between stars is taken where it first fits: nothing is ever taken back. */
static int matches(const glob *g, const char *name, size_t length) {
    if (length < g->least || !fits(g->text, name, g->head)) return 0;
    if (g->head == g->length) return length == g->length;
    const char *end = name + length - g->end, *part = g->text + g->head + 1;
    if (!fits(g->text + g->length - g->end, end, g->end)) return 0;
    for (name += g->head; part < g->text + g->length - g->end;) {
        size_t size = strcspn(part, "*");
        name = find_part(part, size, name, (size_t)(end - name));
        if (!name) return 0;
        name += size;
        part += size + 1;
    }
    return 1;
}

static glob make_glob(const char *text) {
    const char *first = strchr(text, '*'), *last = strrchr(text, '*');
    glob g = {.text = text, .length = strlen(text)};
    g.head = first ? (size_t)(first - text) : g.length;
    g.end = last ? g.length - (size_t)(last + 1 - text) : g.length;
    for (size_t i = 0; i < g.length; i++) g.least += text[i] != '*';
    return g;
}

static edges edges_of(const char *head, size_t head_size, const char *end, size_t end_size) {
    edges e = {{0}};
    char *bytes = (char *)e.words;
    if (head_size >= 8) memcpy(bytes + 8 * (size_t)FIRST, head, 8);
    else memcpy(bytes + 8 * (size_t)FIRST, head, head_size);
    if (end_size >= 16) memcpy(bytes, end + (end_size - 16), 16);
    else memcpy(bytes + 16 - end_size, end, end_size);
    return e;
}

/* What every name that matches has at its edges, and where: elsewhere, `mask` is 0. No glob and no name has a NUL. */
static void glob_edges(const glob *g, edges *wanted, edges *mask) {
    *wanted = edges_of(g->text, g->head, g->text + g->length - g->end, g->end);
    for (size_t i = 0; i < sizeof *wanted; i++) {
        char *byte = (char *)wanted->words + i;
        if (*byte == '?') *byte = 0;
        ((unsigned char *)mask->words)[i] = *byte ? 0xFF : 0;
    }
}

static void add_pair(pairs *set, char first, char second) {
    unsigned hash = ((unsigned char)first * 37u + (unsigned char)second) & 255;
    set->bits[hash / 64] |= (uint64_t)1 << hash % 64;
}

static pairs pairs_of(const char *name, size_t length) {
    pairs set = {{0}};
    for (size_t i = 1; i < length; i++) add_pair(&set, name[i - 1], name[i]);
    return set;
}

/* What is between stars must be somewhere in a name. */
static pairs glob_pairs(const glob *g) {
    pairs set = {{0}};
    for (size_t i = g->head + 2; i + g->end < g->length; i++)
        if (!strchr("*?", g->text[i - 1]) && !strchr("*?", g->text[i]))
            add_pair(&set, g->text[i - 1], g->text[i]);
    return set;
}

/* ---- Lists --------------------------------------------------------------------------------------- */

static fst_status refuse(fst_error *error, const char *text) {
    return fst_fail(error, FST_E_ARG, 0, NULL, "%s", text);
}

static int compare_globs(const void *a, const void *b) {
    const fst_shard_rule *x = *(const fst_shard_rule *const *)a, *y = *(const fst_shard_rule *const *)b;
    int order = strcmp(x->glob, y->glob);
    return order ? order : (x > y) - (x < y);
}

static int contradict(const fst_shard_rule *x, const fst_shard_rule *y) {
    if (x->dim <= FST_SKIP || y->dim <= FST_SKIP)
        return x->dim != y->dim && x->dim <= FST_SKIP && y->dim <= FST_SKIP;
    return x->dim != y->dim || (x->dim >= 0 && (x->unit ? x->unit : 1) != (y->unit ? y->unit : 1));
}

/* Among rules for the same glob every two of a kind are compared, by comparing each with the last of its kind. */
static fst_status check_pairs(const fst_shard_rule **sorted, size_t count, fst_error *error) {
    const fst_shard_rule *kinds[2] = {NULL, NULL}; /* cut, left out */
    for (size_t i = 0; i < count; i++) {
        const fst_shard_rule *rule = sorted[i], **last = &kinds[rule->dim <= FST_SKIP];
        if (i && strcmp(sorted[i - 1]->glob, rule->glob) != 0) kinds[0] = kinds[1] = NULL;
        if (*last && contradict(*last, rule))
            return fst_fail(error, FST_E_ARG, 0, NULL, "two shard rules for \"%.200s\" contradict",
                            rule->glob);
        *last = rule;
    }
    return FST_OK;
}

/* Those of the ready-made list may say something else than a caller's own, which come first. */
static fst_status check_rules(const fst_shard_rule *rules, fst_error *error) {
    size_t count = 0, own = 0;
    for (; rules[count].glob; count++) {
        const fst_shard_rule *rule = &rules[count];
        if (!*rule->glob)
            return fst_fail(error, FST_E_ARG, 0, NULL, "shard rule %zu: its glob is empty", count);
        if (rule->dim < FST_ONLY || rule->dim >= FST_MAX_DIMS)
            return fst_fail(error, FST_E_ARG, 0, NULL,
                            "shard rule \"%.200s\": %d is no dimension, from 0 to %d", rule->glob,
                            (int)rule->dim, FST_MAX_DIMS - 1);
    }
    const fst_shard_rule **sorted = malloc((count + 1) * sizeof *sorted);
    if (!sorted) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    for (size_t i = 0; i < count; i++)
        if (!is_ready_made(&rules[i])) sorted[own++] = &rules[i];
    qsort(sorted, own, sizeof *sorted, compare_globs);
    fst_status status = check_pairs(sorted, own, error);
    free(sorted);
    return status;
}

fst_status fst_shards_check(const fst_options *options, fst_error *error) {
    if (options->ranks > MOST_RANKS)
        return fst_fail(error, FST_E_ARG, 0, NULL, "%u ranks: want at most %u", options->ranks, MOST_RANKS);
    if (options->rank >= (options->ranks ? options->ranks : 1))
        return fst_fail(error, FST_E_ARG, 0, NULL, "rank %u of %u: ranks count from 0", options->rank,
                        options->ranks);
    if ((unsigned)options->read > FST_READ_EXACT) return refuse(error, "the read mode is none that there is");
    return options->shards ? check_rules(options->shards, error) : FST_OK;
}

struct fst_shards {
    size_t count, cuts; /* rules that leave something out follow those that cut */
    size_t cuts_unused;
    int has_only;
    int has_pairs; /* a glob has some */
    edges *wanted, *mask;
    pairs *pairs;
    glob *globs;
    const fst_shard_rule **rules;
    unsigned char *used; /* it matches something, or need not */
};

static void add_rule(fst_shards *s, const fst_shard_rule *rule) {
    size_t i = s->count++;
    s->rules[i] = rule;
    s->globs[i] = make_glob(rule->glob);
    s->used[i] = (unsigned char)is_ready_made(rule);
    s->has_only |= rule->dim == FST_ONLY;
    glob_edges(&s->globs[i], &s->wanted[i], &s->mask[i]);
    s->pairs[i] = glob_pairs(&s->globs[i]);
    for (int k = 0; k < 4; k++) s->has_pairs |= s->pairs[i].bits[k] != 0;
}

fst_shards *fst_shards_new(const fst_shard_rule *rules) {
    size_t count = 0;
    while (rules[count].glob) count++;
    fst_shards *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->wanted = calloc(count + 1, sizeof *s->wanted);
    s->mask = calloc(count + 1, sizeof *s->mask);
    s->pairs = calloc(count + 1, sizeof *s->pairs);
    s->globs = calloc(count + 1, sizeof *s->globs);
    s->rules = calloc(count + 1, sizeof *s->rules);
    s->used = calloc(count + 1, 1);
    if (!s->wanted || !s->mask || !s->pairs || !s->globs || !s->rules || !s->used) {
        fst_shards_free(s);
        return NULL;
    }
    for (size_t i = 0; i < count; i++)
        if (rules[i].dim > FST_SKIP) add_rule(s, &rules[i]);
    s->cuts = s->count;
    for (size_t i = 0; i < s->cuts; i++) s->cuts_unused += !s->used[i];
    for (size_t i = 0; i < count; i++)
        if (rules[i].dim <= FST_SKIP) add_rule(s, &rules[i]);
    return s;
}

void fst_shards_free(fst_shards *s) {
    if (!s) return;
    free(s->wanted);
    free(s->mask);
    free(s->pairs);
    free(s->globs);
    free((void *)s->rules);
    free(s->used);
    free(s);
}

int fst_shards_skip(const fst_shards *s) { return s->cuts < s->count; }

#define MOST_NAMES 4

/* A name with what is known of it. */
typedef struct subject {
    fst_string name;
    edges edges;
    pairs pairs;
} subject;

static int may_match(const fst_shards *s, size_t rule, const subject *of) {
    for (int i = 0; i < WORDS; i++)
        if ((of->edges.words[i] & s->mask[rule].words[i]) != s->wanted[rule].words[i]) return 0;
    for (int i = 0; i < 4; i++)
        if (s->pairs[rule].bits[i] & ~of->pairs.bits[i]) return 0;
    return 1;
}

static int rule_matches(const fst_shards *s, size_t rule, const subject *subjects, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (may_match(s, rule, &subjects[i]) &&
            matches(&s->globs[rule], subjects[i].name.data, subjects[i].name.length))
            return 1;
    return 0;
}

fst_cut fst_shards_find(fst_shards *s, const fst_string *names, size_t count) {
    fst_cut cut = {0, FST_REPLICATE, 1};
    const fst_shard_rule *first = NULL;
    subject subjects[MOST_NAMES];
    int wanted = !s->has_only;
    if (count > MOST_NAMES) count = MOST_NAMES;
    for (size_t i = 0; i < count; i++) {
        subjects[i].name = names[i];
        subjects[i].edges = edges_of(names[i].data, names[i].length, names[i].data, names[i].length);
        subjects[i].pairs = s->has_pairs ? pairs_of(names[i].data, names[i].length) : (pairs){{0}};
    }
    /* After the first one, it is about whether the others match anything. */
    for (size_t i = 0; i < s->cuts && !(first && s->cuts_unused == 0); i++) {
        if ((first && s->used[i]) || !rule_matches(s, i, subjects, count)) continue;
        s->cuts_unused -= !s->used[i];
        s->used[i] = 1;
        if (!first) first = s->rules[i];
    }
    for (size_t i = s->cuts; i < s->count; i++) {
        if (!rule_matches(s, i, subjects, count)) continue;
        s->used[i] = 1;
        if (s->rules[i]->dim == FST_SKIP) cut.skip = 1;
        else wanted = 1;
    }
    cut.skip |= !wanted;
    if (first) cut.dim = first->dim;
    if (first && first->unit) cut.unit = first->unit;
    return cut;
}

uint64_t fst_shards_unused(const fst_shards *s, const char **first) {
    const fst_shard_rule *found = NULL;
    uint64_t count = 0;
    for (size_t i = 0; i < s->count; i++) {
        if (s->used[i]) continue;
        if (!found || s->rules[i] < found) found = s->rules[i];
        count++;
    }
    *first = found ? found->glob : NULL;
    return count;
}
