/* The table, and the same as JSON. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "load.h"

static const char *const ceiling_names[LOAD_CEILINGS] = {"h2d_gb_per_s",    "page_cache_gb_per_s",
                                                         "memory_gb_per_s", "direct_gb_per_s",
                                                         "tmpfs_gb_per_s",  "tmpfs_memory_gb_per_s"};

/* ---- Medians ---------------------------------------------------------------------------------------- */

double load_rate(const load_bench *b, load_ceiling which) {
    load_rates rates = b->ceilings[which]; /* a copy: it is sorted */
    return rates.count ? bench_median(rates.values, rates.count) : 0;
}

/* Of a double at `offset` in the samples. */
static double median_at(const load_case *c, size_t offset) {
    double values[LOAD_MAX_RUNS];
    for (unsigned i = 0; i < c->count; i++)
        memcpy(&values[i], (const char *)&c->samples[i] + offset, sizeof values[i]);
    return c->count ? bench_median(values, c->count) : 0;
}
#define MEDIAN(c, field) median_at(c, offsetof(load_sample, field))

/* Of a number of bytes; LOAD_UNKNOWN when one is. */
static uint64_t median_bytes_at(const load_case *c, size_t offset) {
    double values[LOAD_MAX_RUNS];
    for (unsigned i = 0; i < c->count; i++) {
        uint64_t value;
        memcpy(&value, (const char *)&c->samples[i] + offset, sizeof value);
        if (value == LOAD_UNKNOWN) return value;
        values[i] = (double)value;
    }
    return (uint64_t)bench_median(values, c->count);
}
#define MEDIAN_BYTES(c, field) median_bytes_at(c, offsetof(load_sample, field))

static uint64_t most_at(const load_case *c, size_t offset) {
    uint64_t most = 0;
    for (unsigned i = 0; i < c->count; i++) {
        uint64_t value;
        memcpy(&value, (const char *)&c->samples[i] + offset, sizeof value);
        if (value > most) most = value;
    }
    return most;
}
#define MOST(c, field) most_at(c, offsetof(load_sample, field))

static const load_sample *last(const load_case *c) { return &c->samples[c->count - 1]; }

double load_seconds(const load_case *c) { return MEDIAN(c, seconds); }
double load_gb_per_s(const load_case *c) { return (double)last(c)->stats.bytes_read / load_seconds(c) / 1e9; }

static double needed_gb_per_s(const load_case *c) {
    return (double)last(c)->stats.bytes_needed / load_seconds(c) / 1e9;
}

static uint64_t peak_bytes(const load_case *c) {
    uint64_t most = MOST(c, peak_device_bytes);
    return most > c->watched_bytes ? most : c->watched_bytes;
}

/* NAN: the results were not there all at one time. */
static double beyond_results(const load_case *c) {
    if (c->stream) return NAN;
    return (double)peak_bytes(c) - (double)last(c)->stats.bytes_out;
}

static double cpu_per_gb(const load_case *c) {
    return MEDIAN(c, cpu_seconds) / ((double)last(c)->stats.bytes_read / 1e9);
}

/* ---- Ceilings ----------------------------------------------------------------------------------------- */

static double smaller(double a, double b) { return a == 0 || (b > 0 && b < a) ? b : a; }

/* GB/s; 0: not known. */
static double ceiling_of(const load_bench *b, const load_case *c) {
    int on_host = b->gpu->host_access, is_tmpfs = c->files == &b->tmpfs;
    double link = on_host ? 0 : load_rate(b, LOAD_COPY);
    if (c->state == LOAD_COLD || c->state == LOAD_HALF) {
        double direct = load_rate(b, LOAD_DIRECT);
        return direct == 0 ? 0 : smaller(direct, on_host ? load_rate(b, LOAD_MEMORY) : link);
    }
    double cache = load_rate(b, is_tmpfs ? LOAD_TMPFS : LOAD_CACHE);
    double memory = load_rate(b, is_tmpfs ? LOAD_TMPFS_MEMORY : LOAD_MEMORY);
    return on_host ? memory : smaller(link, cache);
}

/* What the load must have from storage. */
static double bytes_due(const load_case *c) {
    return c->state == LOAD_HALF ? (double)MEDIAN_BYTES(c, uncached_bytes)
                                 : (double)last(c)->stats.bytes_read;
}

/* NAN: not known. */
static double share_of(const load_bench *b, const load_case *c) {
    double ceiling = ceiling_of(b, c);
    if (ceiling == 0 || (c->state == LOAD_HALF && MEDIAN_BYTES(c, uncached_bytes) == LOAD_UNKNOWN))
        return NAN;
    return bytes_due(c) / (ceiling * 1e9) / load_seconds(c);
}

/* ---- The table ---------------------------------------------------------------------------------------- */

static void print_number(int width, int decimals, double value) {
    if (isnan(value)) printf(" %*s", width, "-");
    else printf(" %*.*f", width, decimals, value);
}

static double mib(uint64_t bytes) { return bytes == LOAD_UNKNOWN ? NAN : (double)bytes / 1048576; }

static void print_case(const load_bench *b, const load_case *c) {
    const load_sample *s = last(c);
    double threads = s->stats.threads ? s->stats.threads : 1;
    printf("%-24s", c->name);
    print_number(9, 4, load_seconds(c));
    print_number(7, 2, load_gb_per_s(c));
    print_number(7, 3, share_of(b, c));
    print_number(8, 1, beyond_results(c) / 1048576);
    print_number(8, 1, mib(MOST(c, host_growth)));
    print_number(8, 1, mib(MEDIAN_BYTES(c, disk_bytes)));
    print_number(8, 1, mib(MEDIAN_BYTES(c, uncached_bytes)));
    print_number(8, 3, cpu_per_gb(c));
    print_number(7, 2, MEDIAN(c, stats.open_seconds) * 1e3);
    print_number(8, 2, MEDIAN(c, stats.allocate_seconds) * 1e3);
    print_number(8, 1, MEDIAN(c, stats.read_seconds) / threads * 1e3);
    print_number(8, 1, MEDIAN(c, stats.wait_seconds) / threads * 1e3);
    print_number(6, 2, MEDIAN(c, stats.slots_busy));
    printf("  %s", s->limit);
    if (c->part != LOAD_WHOLE)
        printf(", needed %.2f GB/s, read %.3f of it", needed_gb_per_s(c),
               (double)s->stats.bytes_read / (double)s->stats.bytes_needed);
    if (c->stream) printf(", first tensor %.2f ms", MEDIAN(c, first_tensor_seconds) * 1e3);
    if (c->state == LOAD_HALF && !isnan(share_of(b, c)))
        printf(", at most %.4f s", 1.1 * bytes_due(c) / (ceiling_of(b, c) * 1e9));
    if (c->state == LOAD_COLD && (double)MEDIAN_BYTES(c, uncached_bytes) < 0.9 * (double)c->files->bytes)
        printf(", was not all cold");
    printf("  (%u)\n", c->count);
}

/* Fastest first. */
static int compare_cases(const void *x, const void *y) {
    double a = load_seconds(x), b = load_seconds(y);
    return (a > b) - (a < b);
}

static void print_readers(const load_bench *b) {
    const char *before = "";
    for (size_t i = 0; i < b->count; i++) {
        if (!b->cases[i].count || strcmp(last(&b->cases[i])->reader, before) == 0) continue;
        before = last(&b->cases[i])->reader;
        printf("%s: %s\n", b->cases[i].name, before);
    }
}

void load_print(load_bench *b) {
    if (b->o.tune) qsort(b->cases, b->count, sizeof *b->cases, compare_cases);
    printf("%s (%s), %s: %u threads, %u slots of %zu KiB; %zu files, %.3f GB\n", b->gpu->label, b->gpu->name,
           b->reason, b->threads, b->slots, b->slot_bytes / 1024, b->given.count,
           (double)b->given.bytes / 1e9);
    printf("ceilings:");
    for (unsigned i = 0; i < LOAD_CEILINGS; i++)
        if (b->ceilings[i].count) printf(" %s %.2f", ceiling_names[i], load_rate(b, i));
    printf("%s%s\n%-24s %9s %7s %7s %8s %8s %8s %8s %8s %7s %8s %8s %8s %6s\n",
           b->cold_by ? "; cold by " : "", b->cold_by ? b->cold_by : "", "", "", "", "of the", "device",
           "host", "disk", "not in", "CPU s", "open", "allocate", "read", "wait", "slots");
    printf("%-24s %9s %7s %7s %8s %8s %8s %8s %8s %7s %8s %8s %8s %6s  limit (loads)\n", "case", "seconds",
           "GB/s", "ceiling", "+MiB", "+MiB", "MiB", "mem. MiB", "a GB", "ms", "ms", "ms", "ms", "busy");
    for (size_t i = 0; i < b->count; i++)
        if (b->cases[i].count) print_case(b, &b->cases[i]);
    print_readers(b);
}

/* ---- JSON --------------------------------------------------------------------------------------------- */

static void put_text(FILE *file, const char *key, const char *text) {
    fprintf(file, ", \"%s\": ", key);
    bench_json_string(file, text);
}

static void put_number(FILE *file, const char *key, int decimals, double value) {
    if (isfinite(value)) fprintf(file, ", \"%s\": %.*f", key, decimals, value);
    else fprintf(file, ", \"%s\": null", key);
}

static void put_bytes(FILE *file, const char *key, uint64_t value) {
    if (value == LOAD_UNKNOWN) fprintf(file, ", \"%s\": null", key);
    else fprintf(file, ", \"%s\": %llu", key, (unsigned long long)value);
}

static void json_stages(FILE *file, const load_case *c) {
    const fst_stats *s = &last(c)->stats;
    put_number(file, "open_seconds", 6, MEDIAN(c, stats.open_seconds));
    put_number(file, "allocate_seconds", 6, MEDIAN(c, stats.allocate_seconds));
    put_number(file, "read_seconds", 6, MEDIAN(c, stats.read_seconds) / s->threads);
    put_number(file, "wait_seconds", 6, MEDIAN(c, stats.wait_seconds) / s->threads);
    put_number(file, "kernel_seconds", 6, MEDIAN(c, stats.kernel_seconds) / s->threads);
    put_number(file, "consumer_seconds", 6, MEDIAN(c, stats.consumer_seconds) / s->threads);
    put_number(file, "copy_seconds", 6, MEDIAN(c, stats.copy_seconds));
    put_number(file, "convert_seconds", 6, MEDIAN(c, stats.convert_seconds));
    put_number(file, "slots_busy", 4, MEDIAN(c, stats.slots_busy));
    put_bytes(file, "bytes_cached", s->bytes_cached);
    put_bytes(file, "bytes_buffered", s->bytes_buffered);
    put_bytes(file, "bytes_direct", s->bytes_direct);
    put_bytes(file, "chunks", s->chunks);
    put_bytes(file, "launches", s->launches);
    fprintf(
        file,
        ", \"threads\": %u, \"slots\": %u, \"slot_bytes\": %zu, \"slots_unpinned\": %u, \"numa_node\": %d",
        s->threads, s->slots, s->slot_bytes, s->slots_unpinned, s->numa_node);
    put_text(file, "limit", last(c)->limit);
    put_text(file, "reader", last(c)->reader);
}

static void json_case(FILE *file, const load_bench *b, const load_case *c) {
    const load_sample *s = last(c);
    fprintf(file, "{\"case\": ");
    bench_json_string(file, c->name);
    put_number(file, "seconds", 6, load_seconds(c));
    put_number(file, "gb_per_s", 3, load_gb_per_s(c));
    put_number(file, "share_of_ceiling", 4, share_of(b, c));
    put_number(file, "ceiling_gb_per_s", 3, ceiling_of(b, c) > 0 ? ceiling_of(b, c) : NAN);
    put_bytes(file, "peak_device_bytes", peak_bytes(c));
    put_number(file, "peak_beyond_results", 0, beyond_results(c));
    put_bytes(file, "pinned_bytes", s->stats.pinned_bytes);
    put_number(file, "cpu_seconds", 4, MEDIAN(c, cpu_seconds));
    put_number(file, "cpu_seconds_per_gb", 4, cpu_per_gb(c));
    put_bytes(file, "host_growth_bytes", MOST(c, host_growth));
    put_bytes(file, "disk_bytes", MEDIAN_BYTES(c, disk_bytes));
    put_bytes(file, "uncached_bytes", MEDIAN_BYTES(c, uncached_bytes));
    if (c->state == LOAD_HALF && !isnan(share_of(b, c)))
        put_number(file, "limit_seconds", 6, 1.1 * bytes_due(c) / (ceiling_of(b, c) * 1e9));
    if (c->stream) put_number(file, "first_tensor_seconds", 6, MEDIAN(c, first_tensor_seconds));
    put_bytes(file, "bytes_read", s->stats.bytes_read);
    put_bytes(file, "bytes_needed", s->stats.bytes_needed);
    if (c->part != LOAD_WHOLE) {
        put_bytes(file, "asked_bytes", MEDIAN_BYTES(c, asked_bytes));
        put_number(file, "needed_gb_per_s", 3, needed_gb_per_s(c));
        fprintf(file, ", \"rank\": %u, \"ranks\": %u", b->o.rank, b->o.ranks);
    }
    put_bytes(file, "bytes_out", s->stats.bytes_out);
    json_stages(file, c);
    fprintf(file, ", \"measured\": %u, \"all_seconds\": [", c->count);
    for (unsigned i = 0; i < c->count; i++) fprintf(file, "%s%.6f", i ? ", " : "", c->samples[i].seconds);
    fprintf(file, "]}");
}

void load_json(const load_bench *b) {
    char machine[512], commit[64], date[32];
    FILE *file = fopen(b->o.json, "w");
    if (!file) bench_die("cannot write %s", b->o.json);
    bench_machine(machine, sizeof machine, b->gpu);
    bench_commit(commit, sizeof commit);
    bench_date(date, sizeof date);
    fprintf(file, "{\n  \"machine\": ");
    bench_json_string(file, machine);
    fprintf(file, ",\n  \"device\": \"%s\",\n  \"date\": \"%s\",\n  \"commit\": ", b->gpu->label, date);
    bench_json_string(file, commit);
    fprintf(file, ",\n  \"files\": %zu", b->given.count);
    put_bytes(file, "bytes", b->given.bytes);
    put_text(file, "cold_by", b->cold_by ? b->cold_by : "");
    put_text(file, "device_reason", b->reason);
    fprintf(file, ",\n  \"ceilings\": {");
    for (unsigned i = 0; i < LOAD_CEILINGS; i++) {
        fprintf(file, "%s\"%s\": ", i ? ", " : "", ceiling_names[i]);
        if (load_rate(b, i) > 0) fprintf(file, "%.3f", load_rate(b, i));
        else fprintf(file, "null");
    }
    fprintf(file, "},\n  \"doubts\": [");
    for (unsigned i = 0; i < b->doubts_count; i++) {
        if (i) fputs(", ", file);
        bench_json_string(file, b->doubts[i]);
    }
    fprintf(file, "],\n  \"runs\": [");
    int some = 0;
    for (size_t i = 0; i < b->count; i++) {
        if (!b->cases[i].count) continue;
        fprintf(file, "%s\n    ", some++ ? "," : "");
        json_case(file, b, &b->cases[i]);
    }
    fprintf(file, "\n  ]\n}\n");
    if (fclose(file)) bench_die("cannot write %s", b->o.json);
}
