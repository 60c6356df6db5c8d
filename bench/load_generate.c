/* A checkpoint to measure with: Llama-8B's shapes, repeated or cut, and small tensors. */
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "bench.h"
#include "load.h"

#define SMALL 4096u /* bytes of a small tensor */

typedef struct tensor {
    char name[64];
    uint64_t rows, cols; /* cols 0: one dimension */
    uint64_t nbytes;
} tensor;

typedef struct list {
    tensor *tensors;
    size_t count, room;
    uint64_t bytes;
    fst_dtype dtype;
} list;

static void add(list *l, const char *name, uint64_t rows, uint64_t cols) {
    uint64_t nbytes = rows * (cols ? cols : 1) * fst_dtype_bits(l->dtype) / 8;
    if (l->count == l->room) {
        l->room = l->room ? 2 * l->room : 1024;
        l->tensors = realloc(l->tensors, l->room * sizeof *l->tensors);
        if (!l->tensors) bench_die("out of memory");
    }
    tensor *t = &l->tensors[l->count++];
    *t = (tensor){.rows = rows, .cols = cols, .nbytes = nbytes};
    snprintf(t->name, sizeof t->name, "%s", name);
    l->bytes += nbytes;
}

/* Up to so many bytes: the last tensors are left out, or have fewer rows. */
static void add_up_to(list *l, uint64_t most, const char *name, uint64_t rows, uint64_t cols) {
    uint64_t row_bits = (cols ? cols : 1) * fst_dtype_bits(l->dtype);
    uint64_t room = (most - l->bytes) * 8 / row_bits / 8 * 8; /* whole bytes, also of 4 and 6 bits */
    if (room) add(l, name, room < rows ? room : rows, cols);
}

/* ---- Llama-8B ------------------------------------------------------------------------------------- */

static void add_layer(list *l, uint64_t most, unsigned layer, uint64_t width) {
    static const struct {
        const char *name;
        unsigned rows, cols; /* in 128ths of the width; cols 0: one dimension */
    } parts[] = {
        {"input_layernorm", 128, 0},   {"self_attn.q_proj", 128, 128}, {"self_attn.k_proj", 32, 128},
        {"self_attn.v_proj", 32, 128}, {"self_attn.o_proj", 128, 128}, {"post_attention_layernorm", 128, 0},
        {"mlp.gate_proj", 448, 128},   {"mlp.up_proj", 448, 128},      {"mlp.down_proj", 128, 448}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char name[64];
        snprintf(name, sizeof name, "model.layers.%u.%s.weight", layer, parts[i].name);
        add_up_to(l, most, name, width * parts[i].rows / 128, width * parts[i].cols / 128);
    }
}

static uint64_t layer_bytes(const list *l, uint64_t width) {
    list probe = {.dtype = l->dtype};
    add_layer(&probe, (uint64_t)1 << 60, 0, width);
    free(probe.tensors);
    return probe.bytes;
}

static void add_llama(list *l, uint64_t bytes) {
    uint64_t width = 4096, vocabulary = 128256, most = bytes;
    while (width > 128 && 2 * layer_bytes(l, width) > bytes) width /= 2;
    uint64_t ends = vocabulary * width * fst_dtype_bits(l->dtype) / 8; /* of each of the two */
    int with_ends = 2 * ends + 2 * layer_bytes(l, width) <= bytes;
    if (with_ends) {
        add(l, "model.embed_tokens.weight", vocabulary, width);
        most -= ends;
    }
    for (unsigned layer = 0; l->bytes + layer_bytes(l, width) / 64 < most; layer++)
        add_layer(l, most, layer, width);
    if (with_ends) add(l, "lm_head.weight", vocabulary, width);
}

/* ---- Headers ---------------------------------------------------------------------------------------- */

typedef struct generated {
    fst_dtype dtype;
    char **headers; /* of each file, its length in front */
    size_t *headers_bytes;
    uint64_t *sizes;
    char **paths;
    size_t count;
} generated;

static void make_header(generated *g, size_t file, const tensor *tensors, size_t count) {
    char *text = NULL;
    size_t length = 0;
    uint64_t at = 0;
    FILE *out = open_memstream(&text, &length);
    if (!out) bench_die("out of memory");
    fwrite("\0\0\0\0\0\0\0\0{\"__metadata__\":{\"format\":\"pt\"}", 1, 8 + 31, out);
    for (size_t i = 0; i < count; i++) {
        const tensor *t = &tensors[i];
        fprintf(out, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%llu", t->name, fst_dtype_name(g->dtype),
                (unsigned long long)t->rows);
        if (t->cols) fprintf(out, ",%llu", (unsigned long long)t->cols);
        fprintf(out, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                (unsigned long long)(at + t->nbytes));
        at += t->nbytes;
    }
    fputc('}', out);
    while (ftell(out) % 8) fputc(' ', out);
    if (fclose(out)) bench_die("out of memory");
    for (unsigned i = 0; i < 8; i++) text[i] = (char)((length - 8) >> 8 * i);
    g->headers[file] = text;
    g->headers_bytes[file] = length;
    g->sizes[file] = length + at;
}

/* ---- Data ------------------------------------------------------------------------------------------- */

/* Finite numbers that no common target overflows or flushes: the exponent's highest bits are set so. */
static void mask_of(fst_dtype dtype, uint64_t *keep, uint64_t *set) {
    *keep = UINT64_MAX;
    *set = 0;
    switch (dtype) {
    case FST_F64: *keep = ~0x4000000000000000u, *set = 0x3f00000000000000u; break;
    case FST_F32:
    case FST_C64: *keep = ~0x4000000040000000u, *set = 0x3800000038000000u; break;
    case FST_BF16: *keep = ~0x4000400040004000u, *set = 0x3800380038003800u; break;
    case FST_F16: *keep = ~0x4000400040004000u; break;
    case FST_F8_E4M3:
    case FST_F8_E5M2: *keep = ~0x4040404040404040u; break;
    case FST_F8_E4M3FNUZ: /* 80 is not a number */
    case FST_F8_E5M2FNUZ: *keep = ~0x4040404040404040u, *set = 0x0101010101010101u; break;
    case FST_F8_E8M0: *keep = ~0x8080808080808080u; break;
    case FST_BOOL: *keep = 0x0101010101010101u; break;
    default: break;
    }
}

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static void fill_random(const void *arg, size_t file, uint64_t offset, size_t size, unsigned char *out) {
    const generated *g = arg;
    uint64_t keep, set, seed = mix(file + 1);
    mask_of(g->dtype, &keep, &set);
    for (size_t at = 0; at < size; at += 8) { /* headers and pieces are multiples of eight bytes */
        uint64_t word = (mix(seed + (offset + at) * 0x9e3779b97f4a7c15u) & keep) | set;
        memcpy(out + at, &word, size - at < 8 ? size - at : 8);
    }
    if (offset >= g->headers_bytes[file]) return;
    size_t header = g->headers_bytes[file] - (size_t)offset;
    memcpy(out, g->headers[file] + offset, header < size ? header : size);
}

/* ---- The checkpoint ---------------------------------------------------------------------------------- */

static int is_ours(const generated *g, const char *directory, const char *name) {
    size_t skip = strlen(directory) + 1;
    for (size_t i = 0; i < g->count; i++)
        if (strcmp(g->paths[i] + skip, name) == 0) return 1;
    return 0;
}

/* What is there already would be measured along, and is not ours to remove. */
static void check_directory(const generated *g, const char *directory) {
    if (mkdir(directory, 0755) && errno != EEXIST) bench_die("cannot make %s", directory);
    DIR *dir = opendir(directory);
    if (!dir) bench_die("cannot list %s", directory);
    for (struct dirent *entry; (entry = readdir(dir));)
        if (strstr(entry->d_name, ".safetensors") && !is_ours(g, directory, entry->d_name))
            bench_die("%s has another checkpoint in it: %s", directory, entry->d_name);
    closedir(dir);
}

/* Whole tensors, so that the files are of about one size. */
static void split(generated *g, const list *l) {
    size_t from = 0;
    uint64_t before = 0;
    for (size_t file = 0; file < g->count; file++) {
        size_t to = from;
        uint64_t end = l->bytes / g->count * (file + 1);
        while (to < l->count && (file + 1 == g->count || before + l->tensors[to].nbytes / 2 < end))
            before += l->tensors[to++].nbytes;
        make_header(g, file, l->tensors + from, to - from);
        from = to;
    }
}

void load_generate(const load_options *o) {
    generated g = {.dtype = o->dtype ? o->dtype : FST_BF16};
    list l = {.dtype = g.dtype};
    g.count = o->files ? o->files : o->small ? 163 : 4;
    if (o->generate_bytes) add_llama(&l, o->generate_bytes);
    for (unsigned i = 0; i < o->small; i++) {
        char name[64];
        snprintf(name, sizeof name, "small.%07u.weight", i);
        add(&l, name, SMALL * 8 / fst_dtype_bits(g.dtype) / 4 * 4, 0);
    }
    g.headers = calloc(g.count, sizeof *g.headers);
    g.headers_bytes = calloc(g.count, sizeof *g.headers_bytes);
    g.sizes = calloc(g.count, sizeof *g.sizes);
    g.paths = calloc(g.count, sizeof *g.paths);
    if (!g.headers || !g.headers_bytes || !g.sizes || !g.paths) bench_die("out of memory");
    for (size_t i = 0; i < g.count; i++)
        if (asprintf(&g.paths[i], "%s/model-%05zu-of-%05zu.safetensors", o->generate, i + 1, g.count) < 0)
            bench_die("out of memory");
    check_directory(&g, o->generate);
    split(&g, &l);
    load_write_files(g.paths, g.sizes, g.count, fill_random, &g);
    printf("%s: %zu tensors, %.3f GB in %zu files\n", o->generate, l.count, (double)l.bytes / 1e9, g.count);
    for (size_t i = 0; i < g.count; i++) {
        free(g.headers[i]);
        free(g.paths[i]);
    }
    free(g.headers);
    free(g.headers_bytes);
    free(g.sizes);
    free(g.paths);
    free(l.tensors);
}
