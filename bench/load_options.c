/* The command line. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "load.h"
#include "model.h"
#include "quantize.h"

static const char usage[] =
    "usage: bench_load [options] PATH...\n"
    "       bench_load [options] --generate DIR BYTES [--dtype DTYPE] [--files N] [--small N]\n"
    "  what to load on:  --device auto|cpu|N  --threads N  --slot BYTES  --slots N  --block BYTES\n"
    "  what to measure:  --runs N (7)  --first N (1)  --cast DTYPE[:tensor|row|block]...  --stream  --tmpfs DIR\n"
    "                    --cold  --cold-runs N (5)  --advise  --tune  --seconds N  --no-verify\n"
    "  parts of it:      --tp R/N  --rank R/N  --shard GLOB=DIM[/UNIT]|GLOB=replicate...  --rows  --read auto|exact...\n"
    "                    --turns  --nccl FILE  --nccl-library PATH  --timeout SECONDS (60)\n"
    "  what comes out:   --json FILE  --timeline FILE.svg  --timeline-of CASE\n";

static int parse_bytes(const char *text, uint64_t *out) {
    char *end;
    if (*text < '0' || *text > '9') return 0;
    *out = strtoull(text, &end, 10);
    const char *units = "KMG", *unit = *end ? strchr(units, *end) : NULL;
    if (unit) {
        *out <<= 10 * (unit - units + 1);
        end++;
    }
    return *end == 0 && *out < (uint64_t)1 << 48;
}

static int parse_count(const char *text, unsigned most, unsigned *out) {
    uint64_t value;
    if (!parse_bytes(text, &value) || value == 0 || value > most) return 0;
    *out = (unsigned)value;
    return 1;
}

static int parse_device(const char *text, int *out) {
    char *end;
    if (strcmp(text, "auto") == 0) *out = FST_DEVICE_AUTO;
    else if (strcmp(text, "cpu") == 0) *out = FST_DEVICE_CPU;
    else {
        long index = strtol(text, &end, 10);
        if (*text < '0' || *text > '9' || *end || index > 255) return 0;
        *out = FST_DEVICE_GPU((int)index);
    }
    return 1;
}

static int parse_slot(const char *text, size_t *out) {
    uint64_t value;
    if (!parse_bytes(text, &value) || value < 64u << 10 || value > 64u << 20) return 0;
    *out = (size_t)value;
    return 1;
}

static int parse_dtype(const char *text, fst_dtype *out) {
    return (*out = fst_dtype_from_name(text)) != FST_NATIVE;
}

const char *load_scale_name(fst_scale scale) {
    static const char *const names[] = {"", "tensor", "row", "block"};
    return names[scale];
}

/* DTYPE or DTYPE:SCALE. */
static int parse_cast(const char *text, load_options *o) {
    const char *colon = strchr(text, ':');
    size_t length = colon ? (size_t)(colon - text) : strlen(text);
    char dtype[32];
    int scale = FST_QUANTIZE_NONE;
    if (o->casts_count == LOAD_MAX_CASTS || length >= sizeof dtype) return 0;
    memcpy(dtype, text, length);
    dtype[length] = 0;
    while (colon && ++scale <= FST_QUANTIZE_BLOCK)
        if (strcmp(colon + 1, load_scale_name((fst_scale)scale)) == 0) break;
    if (scale > FST_QUANTIZE_BLOCK || !parse_dtype(dtype, &o->casts[o->casts_count])) return 0;
    if (scale && !fst_quantize_has(o->casts[o->casts_count])) return 0;
    o->scales[o->casts_count++] = (fst_scale)scale;
    return 1;
}

static int parse_seconds(const char *text, double *out) {
    char *end;
    *out = strtod(text, &end);
    return end != text && *end == 0 && *out > 0 && *out < 1e6;
}

/* R/N. */
static int parse_rank(const char *text, load_options *o) {
    unsigned rank, ranks;
    int length = 0;
    if (o->ranks || sscanf(text, "%5u/%5u%n", &rank, &ranks, &length) != 2 || text[length]) return 0;
    if (strchr("+- ", *text) || rank >= ranks) return 0;
    o->rank = rank, o->ranks = ranks;
    return 1;
}

/* GLOB=DIM[/UNIT] or GLOB=replicate, as `fst load` has it. */
static int parse_shard(const char *text, load_options *o) {
    const char *equals = strrchr(text, '=');
    fst_shard_rule rule = {NULL, FST_REPLICATE, 0};
    unsigned dim = 0;
    int length = 0;
    if (!equals || equals == text || o->shards_count == LOAD_MAX_SHARDS) return 0;
    if (strcmp(equals + 1, "replicate") != 0) {
        if (equals[1] < '0' || equals[1] > '9' || sscanf(equals + 1, "%2u%n", &dim, &length) != 1) return 0;
        const char *unit = equals + 1 + length;
        if (*unit == '/' && !parse_count(unit + 1, 1u << 30, &rule.unit)) return 0;
        if (*unit && *unit != '/') return 0;
        rule.dim = (int32_t)dim;
    }
    rule.glob = strndup(text, (size_t)(equals - text));
    if (!rule.glob) bench_die("out of memory");
    o->shards[o->shards_count++] = rule;
    return 1;
}

static int parse_read(const char *text, load_options *o) {
    if (strcmp(text, "auto") == 0) return o->reads[FST_READ_AUTO] = 1;
    if (strcmp(text, "exact") == 0) return o->reads[FST_READ_EXACT] = 1;
    return 0;
}

static int parse_flag(load_options *o, const char *name) {
    if (strcmp(name, "--no-verify") == 0) o->verify = 0;
    else if (strcmp(name, "--cold") == 0) o->cold = 1;
    else if (strcmp(name, "--advise") == 0) o->advise = 1;
    else if (strcmp(name, "--stream") == 0) o->stream = 1;
    else if (strcmp(name, "--tune") == 0) o->tune = 1;
    else if (strcmp(name, "--rows") == 0) o->rows = 1;
    else if (strcmp(name, "--turns") == 0) o->turns = 1;
    else return 0;
    return 1;
}

static int parse_value(load_options *o, const char *name, const char *value) {
    unsigned child;
    if (strcmp(name, "--device") == 0) return parse_device(value, &o->device);
    if (strcmp(name, "--runs") == 0) return parse_count(value, LOAD_MAX_RUNS, &o->runs);
    if (strcmp(name, "--cold-runs") == 0) return parse_count(value, LOAD_MAX_RUNS, &o->cold_runs);
    if (strcmp(name, "--first") == 0) return parse_count(value, LOAD_MAX_RUNS, &o->first);
    if (strcmp(name, "--threads") == 0) return parse_count(value, 64, &o->threads);
    if (strcmp(name, "--slots") == 0) return parse_count(value, 256, &o->slots);
    if (strcmp(name, "--slot") == 0) return parse_slot(value, &o->slot_bytes);
    if (strcmp(name, "--block") == 0)
        return parse_bytes(value, &fst_block_bytes) && fst_block_bytes >= 1u << 20;
    if (strcmp(name, "--seconds") == 0) return parse_seconds(value, &o->seconds);
    if (strcmp(name, "--cast") == 0) return parse_cast(value, o);
    if (strcmp(name, "--rank") == 0) return parse_rank(value, o);
    if (strcmp(name, "--tp") == 0) return (o->tp = parse_rank(value, o));
    if (strcmp(name, "--shard") == 0) return parse_shard(value, o);
    if (strcmp(name, "--read") == 0) return parse_read(value, o);
    if (strcmp(name, "--dtype") == 0) return parse_dtype(value, &o->dtype);
    if (strcmp(name, "--timeout") == 0) return parse_count(value, 3600, &o->timeout);
    if (strcmp(name, "--files") == 0) return parse_count(value, 9999, &o->files);
    if (strcmp(name, "--small") == 0) return parse_count(value, 10000000, &o->small);
    if (strcmp(name, "--child") == 0)
        return parse_count(value, 1u << 20, &child) && ((o->child = (int)child), 1);
    const char **text = strcmp(name, "--json") == 0           ? &o->json
                        : strcmp(name, "--timeline") == 0     ? &o->timeline
                        : strcmp(name, "--timeline-of") == 0  ? &o->timeline_of
                        : strcmp(name, "--tmpfs") == 0        ? &o->tmpfs
                        : strcmp(name, "--nccl") == 0         ? &o->nccl
                        : strcmp(name, "--nccl-library") == 0 ? &o->nccl_library
                                                              : NULL;
    if (!text || !*value) return 0;
    *text = value;
    return 1;
}

static int complain(const char *what, const char *value) {
    fprintf(stderr, "bench_load: %s%s%s\n%s", what, *value ? " " : "", value, usage);
    return 0;
}

static int has_scales(const load_options *o) {
    for (size_t i = 0; i < o->casts_count; i++)
        if (o->scales[i]) return 1;
    return 0;
}

static int check_parts(const load_options *o) {
    if (!o->ranks && (o->shards_count || o->rows || o->reads[0] || o->reads[1]))
        return complain("--shard, --rows, --read: only with --rank or --tp", "");
    if (o->rows && !o->tp) return complain("--rows: only with --tp", "");
    if (o->nccl && !(o->ranks && o->turns))
        return complain("--nccl: only with --turns, and --rank or --tp", "");
    if (!o->nccl && o->nccl_library) return complain("--nccl-library: only with --nccl", "");
    if (o->ranks && o->tune) return complain("--tune: not with parts", "");
    if (o->ranks && has_scales(o))
        return complain("scales that are computed: not with parts, of which some have others", "");
    return 1;
}

static int check(const load_options *o, size_t paths) {
    if (o->generate && paths) return complain("--generate or a path, not both", "");
    if (!o->generate && !paths) return complain("no path", "");
    if (!o->generate && (o->files || o->small || o->dtype))
        return complain("--files, --small, --dtype: only with --generate", "");
    if (o->generate && !o->generate_bytes && !o->small)
        return complain("--generate: 0 bytes and no --small", "");
    if (o->tune &&
        (o->cold || o->stream || o->tmpfs || o->casts_count || o->threads || o->slot_bytes || o->slots))
        return complain("--tune goes with --runs, --seconds and outputs alone", "");
    return check_parts(o);
}

int load_parse(int argc, char **argv, load_options *o) {
    size_t count = 0;
    *o = (load_options){.verify = 1, .runs = 7, .cold_runs = 5, .first = 1, .child = -1, .timeout = 60};
    const char *must = getenv("FST_TEST_DEVICE");
    if (must && *must && !parse_device(must, &o->device))
        return complain("FST_TEST_DEVICE is no device:", must);
    o->paths = calloc((size_t)argc + 1, sizeof *o->paths);
    if (!o->paths) bench_die("out of memory");
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (strncmp(name, "--", 2)) {
            o->paths[count++] = name;
        } else if (strcmp(name, "--generate") == 0) {
            if (i + 2 >= argc || !parse_bytes(argv[i + 2], &o->generate_bytes))
                return complain("wrong:", name);
            o->generate = value;
            i += 2;
        } else if (!parse_flag(o, name)) {
            if (i + 1 == argc || !parse_value(o, name, value)) {
                fprintf(stderr, "bench_load: wrong: %s %s\n%s", name, value, usage);
                return 0;
            }
            i++;
        }
    }
    if (!check(o, count)) return 0;
    if (!o->reads[FST_READ_EXACT]) o->reads[FST_READ_AUTO] = 1;
    if (o->generate) o->paths[0] = o->generate;
    if (!o->timeline_of) o->timeline_of = "warm as is";
    return 1;
}
