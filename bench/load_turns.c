/* Loads when they are asked for: how bench/ranks.py has several processes load at one time. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "load.h"

static void put_text(const char *key, const char *text) {
    printf(", \"%s\": ", key);
    bench_json_string(stdout, text);
}

static void put_bytes(const char *key, uint64_t value) {
    if (value == LOAD_UNKNOWN) printf(", \"%s\": null", key);
    else printf(", \"%s\": %llu", key, (unsigned long long)value);
}

static void greet(const load_bench *b) {
    char text[512];
    bench_machine(text, sizeof text, b->gpu);
    printf("{\"files\": %zu", b->given.count);
    put_bytes("bytes", b->given.bytes);
    put_text("machine", text);
    bench_commit(text, sizeof text);
    put_text("commit", text);
    put_text("device", b->gpu->label);
    put_text("device_reason", b->reason);
    if (b->comm)
        printf(", \"nccl\": \"%d.%d.%d\"", b->nccl_version / 10000, b->nccl_version / 100 % 100,
               b->nccl_version % 100);
    printf(", \"cases\": [");
    for (size_t i = 0; i < b->count; i++) {
        if (i) printf(", ");
        bench_json_string(stdout, b->cases[i].name);
    }
    printf("]}\n");
}

static void answer(const load_case *c, const load_sample *s) {
    printf("{\"case\": ");
    bench_json_string(stdout, c->name);
    printf(", \"started\": %.6f, \"seconds\": %.6f, \"cpu_seconds\": %.4f", s->started, s->seconds,
           s->cpu_seconds);
    put_bytes("bytes_needed", s->stats.bytes_needed);
    put_bytes("bytes_read", s->stats.bytes_read);
    put_bytes("bytes_out", s->stats.bytes_out);
    put_bytes("asked_bytes", s->asked_bytes);
    put_bytes("disk_bytes", s->disk_bytes);
    put_bytes("chunks", s->stats.chunks);
    put_bytes("launches", s->stats.launches);
    put_bytes("pinned_bytes", s->stats.pinned_bytes);
    printf(", \"threads\": %u, \"slots\": %u, \"slot_bytes\": %zu, \"numa_node\": %d", s->stats.threads,
           s->stats.slots, s->stats.slot_bytes, s->stats.numa_node);
    put_text("limit", s->limit);
    put_text("reader", s->reader);
    printf("}\n");
}

/* Ceilings: of the link, and of reading as the last load did. */
static int measure_ceiling(load_bench *b, const char *name) {
    double rate = 0;
    if (strcmp(name, "h2d") == 0) rate = load_copy_rate(b);
    else if (strcmp(name, "page cache") == 0 && b->threads)
        rate = load_read_rate(b, &b->given, BENCH_INTO_RING);
    else return 0;
    printf("{\"ceiling\": \"%s\", \"gb_per_s\": %.3f}\n", name, rate);
    return 1;
}

static void take_turn(load_bench *b, const char *name) {
    load_case *c = load_find_case(b, name);
    if (!c) bench_die("there is no case %s", name);
    c->count = 0; /* the last one alone is kept */
    load_measure(b, c, NULL);
    const load_sample *s = &c->samples[0];
    b->threads = s->stats.threads;
    b->slots = s->stats.slots;
    b->slot_bytes = s->stats.slot_bytes;
    answer(c, s);
}

void load_turns(load_bench *b) {
    char line[256];
    greet(b);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        char *tab = strchr(line, '\t');
        line[strcspn(line, "\t\n")] = 0;
        b->begins = tab ? strtod(tab + 1, NULL) : 0;
        if (!measure_ceiling(b, line)) take_turn(b, line);
        fflush(stdout);
    }
    b->begins = 0;
}
