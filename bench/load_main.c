/* The program: which cases, in what order, against which ceilings. */
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"
#include "load.h"
#include "os.h"

#define MIB ((size_t)1 << 20)
enum { TUNE_KEPT = 8 }; /* the fastest of a sweep, that are measured as often as other cases */

extern char **environ;

/* ---- Cases ---------------------------------------------------------------------------------------- */

static load_case *add_case(load_bench *b, const char *name, const load_case *like) {
    if (b->count == LOAD_MAX_CASES) bench_die("too many cases");
    load_case *c = &b->cases[b->count++];
    *c = *like;
    snprintf(c->name, sizeof c->name, "%s", name);
    if (!c->files) c->files = &b->given;
    if (!c->threads) c->threads = b->o.threads;
    if (!c->slots) c->slots = b->o.slots;
    if (!c->slot_bytes) c->slot_bytes = b->o.slot_bytes;
    c->samples = calloc(LOAD_MAX_RUNS, sizeof *c->samples);
    if (!c->samples) bench_die("out of memory");
    return c;
}

static void add_casts(load_bench *b, const char *where, const load_files *files) {
    char name[64];
    snprintf(name, sizeof name, "%s as is", where);
    add_case(b, name, &(load_case){.files = files, .state = LOAD_WARM});
    for (size_t i = 0; i < b->o.casts_count; i++) {
        fst_scale scale = b->o.scales[i];
        snprintf(name, sizeof name, "%s to %s%s%s", where, fst_dtype_name(b->o.casts[i]), scale ? " " : "",
                 load_scale_name(scale));
        add_case(b, name,
                 &(load_case){.files = files, .state = LOAD_WARM, .cast = b->o.casts[i], .scale = scale});
    }
}

/* This rank's part: as is and with each cast, asked for in each way. */
static void add_part(load_bench *b, const char *where, load_case like) {
    static const char *const ways[] = {"auto", "exact"};
    const char *what = like.part == LOAD_ROWS ? "rows" : b->o.tp ? "tp" : "rank";
    char name[64];
    for (like.read = FST_READ_EXACT;; like.read = FST_READ_AUTO) {
        for (size_t i = 0; b->o.reads[like.read] && i <= b->o.casts_count; i++) {
            like.cast = i ? b->o.casts[i - 1] : FST_NATIVE;
            snprintf(name, sizeof name, "%s %s %s%s%s", where, what, ways[like.read], i ? " to " : "",
                     i ? fst_dtype_name(like.cast) : "");
            add_case(b, name, &like);
        }
        if (like.read == FST_READ_AUTO) break;
    }
    like.shared = b->o.nccl != NULL;
    for (size_t i = 0; like.shared && i <= b->o.casts_count; i++) {
        like.cast = i ? b->o.casts[i - 1] : FST_NATIVE;
        snprintf(name, sizeof name, "%s %s shared%s%s", where, what, i ? " to " : "",
                 i ? fst_dtype_name(like.cast) : "");
        add_case(b, name, &like);
    }
}

static void add_parts(load_bench *b, const char *where, const load_files *files, load_state state) {
    if (!b->o.ranks) return;
    add_part(b, where, (load_case){.files = files, .state = state, .part = LOAD_PART});
    if (b->o.rows) add_part(b, where, (load_case){.files = files, .state = state, .part = LOAD_ROWS});
}

static void add_cold(load_bench *b) {
    add_case(b, "cold", &(load_case){.state = LOAD_COLD});
    add_case(b, "after cold", &(load_case){.state = LOAD_AFTER_COLD}); /* at once */
    add_case(b, "half cached", &(load_case){.state = LOAD_HALF});
    add_case(b, "cold direct", &(load_case){.state = LOAD_COLD, .reader = FST_READER_DIRECT});
    add_case(b, "cold uring", &(load_case){.state = LOAD_COLD, .reader = FST_READER_URING});
    add_case(b, "cold uring direct",
             &(load_case){.state = LOAD_COLD, .reader = FST_READER_URING, .cache = FST_CACHE_AVOID});
}

/* Rings between what keeps a link busy and what a last-level cache holds. */
static void add_tuning(load_bench *b) {
    static const unsigned all[] = {8, 10, 12, 14, 16}, slots[] = {3, 4, 5, 6, 8};
    unsigned cpus = fst_os_cpus(), few[] = {(cpus + 1) / 2, cpus};
    const unsigned *threads = cpus < 8 ? few : all;
    size_t count = cpus < 8 ? 2 : sizeof all / sizeof *all;
    for (size_t i = 0; i < count && threads[i] <= cpus; i++)
        for (size_t slot = 4 * MIB; slot <= 16 * MIB; slot *= 2)
            for (size_t k = 0; k < sizeof slots / sizeof *slots; k++) {
                char name[64];
                size_t ring = slot * slots[k];
                if (ring < 24 * MIB || ring > 96 * MIB || (i && threads[i] == threads[i - 1])) continue;
                snprintf(name, sizeof name, "%u threads, %u x %zu MiB", threads[i], slots[k], slot / MIB);
                add_case(b, name,
                         &(load_case){.state = LOAD_WARM,
                                      .is_tuning = 1,
                                      .threads = threads[i],
                                      .slots = slots[k],
                                      .slot_bytes = slot});
            }
}

static void add_cases(load_bench *b) {
    add_case(b, "first as is", &(load_case){.state = LOAD_FIRST});
    if (b->o.tune) {
        add_tuning(b);
        return;
    }
    add_casts(b, "warm", &b->given);
    add_parts(b, "warm", &b->given, LOAD_WARM);
    if (b->o.stream) {
        add_case(b, "warm stream", &(load_case){.state = LOAD_WARM, .stream = 1});
        add_case(b, "warm stream as ready",
                 &(load_case){.state = LOAD_WARM, .stream = 1, .flags = FST_AS_READY});
    }
    if (b->o.tmpfs) add_casts(b, "tmpfs", &b->tmpfs);
    if (b->o.tmpfs) add_parts(b, "tmpfs", &b->tmpfs, LOAD_WARM);
    if (b->o.cold && !b->given.in_memory) {
        add_cold(b);
        add_parts(b, "cold", &b->given, LOAD_COLD);
    }
}

load_case *load_find_case(load_bench *b, const char *name) {
    for (size_t i = 0; i < b->count; i++)
        if (strcmp(b->cases[i].name, name) == 0) return &b->cases[i];
    return NULL;
}

/* ---- Rounds ------------------------------------------------------------------------------------------ */

static void add_rate(load_bench *b, load_ceiling which, double rate) {
    load_rates *rates = &b->ceilings[which];
    if (rate > 0 && rates->count < LOAD_MAX_RUNS) rates->values[rates->count++] = rate;
}

static void measure_reading(load_bench *b, const load_files *files, load_ceiling which, bench_read where) {
    add_rate(b, which, load_read_rate(b, files, where));
}

static void measure_ceilings(load_bench *b, int is_cold) {
    int on_host = b->gpu->host_access;
    add_rate(b, LOAD_COPY, load_copy_rate(b));
    if (is_cold) measure_reading(b, &b->given, LOAD_DIRECT, BENCH_PAST_CACHE);
    if (is_cold) return;
    measure_reading(b, &b->given, LOAD_CACHE, BENCH_INTO_RING);
    if (on_host) measure_reading(b, &b->given, LOAD_MEMORY, BENCH_INTO_MEMORY);
    if (b->o.tmpfs) measure_reading(b, &b->tmpfs, LOAD_TMPFS, BENCH_INTO_RING);
    if (b->o.tmpfs && on_host) measure_reading(b, &b->tmpfs, LOAD_TMPFS_MEMORY, BENCH_INTO_MEMORY);
}

/* Whether there is time for something that takes so long. */
static int has_time(const load_bench *b, double seconds) {
    return b->o.seconds == 0 || fst_os_now() - b->started + seconds < b->o.seconds;
}

/* Each warm case once with an eye on the device's memory all along. It takes the driver's locks, which copies want, so the
 * time does not count. */
static void watch_memory(load_bench *b) {
    b->watches = 1;
    for (size_t i = 0; i < b->count; i++) {
        load_case *c = &b->cases[i];
        if (c->state == LOAD_FIRST || c->state >= LOAD_COLD) continue;
        load_measure(b, c, NULL);
        c->watched_bytes = c->samples[--c->count].peak_device_bytes;
    }
    b->watches = 0;
}

static void run_rounds(load_bench *b, unsigned runs, int is_cold) {
    double longest = 0;
    if (!is_cold && !b->gpu->host_access) watch_memory(b);
    for (unsigned run = 0; run < runs && (run == 0 || has_time(b, longest)); run++) {
        double start = fst_os_now();
        measure_ceilings(b, is_cold);
        for (size_t i = 0; i < b->count; i++) {
            load_case *c = &b->cases[i];
            if (c->state != LOAD_FIRST && (c->state >= LOAD_COLD) == is_cold) load_measure(b, c, NULL);
        }
        if (fst_os_now() - start > longest) longest = fst_os_now() - start;
    }
}

/* Threads and rings of this shape are made by a load that does not count. */
static void measure_shape(load_bench *b, load_case *c, unsigned times) {
    fst_release_cached();
    load_measure(b, c, NULL);
    c->count--;
    for (unsigned i = 0; i < times; i++) load_measure(b, c, NULL);
}

static int by_seconds(const void *x, const void *y) {
    const load_case *a = *(load_case *const *)x, *b = *(load_case *const *)y;
    double one = load_seconds(a), other = load_seconds(b);
    return (one > other) - (one < other);
}

/* Every shape twice, then the fastest ones in turns. */
static void sweep(load_bench *b, unsigned runs) {
    load_case *sorted[LOAD_MAX_CASES];
    size_t count = 0;
    double longest = 0;
    for (size_t i = 0; i < b->count; i++) {
        double start = fst_os_now();
        if (!b->cases[i].is_tuning || !has_time(b, longest)) continue;
        if (count % 12 == 0) measure_ceilings(b, 0);
        measure_shape(b, &b->cases[i], 2);
        sorted[count++] = &b->cases[i];
        if (fst_os_now() - start > longest) longest = fst_os_now() - start;
    }
    qsort(sorted, count, sizeof *sorted, by_seconds);
    if (count > TUNE_KEPT) count = TUNE_KEPT;
    for (unsigned run = 0; run < runs && has_time(b, longest * (double)(count + 1)); run++) {
        measure_ceilings(b, 0);
        for (size_t i = 0; i < count; i++)
            if (sorted[i]->count < LOAD_MAX_RUNS) measure_shape(b, sorted[i], 1);
    }
    fst_release_cached();
}

/* ---- First loads -------------------------------------------------------------------------------------- */

/* Another process does its first load and tells what came of it. */
static void measure_in_child(load_bench *b, load_case *c) {
    char number[16];
    char **argv = calloc((size_t)b->argc + 3, sizeof *argv);
    int ends[2], status;
    pid_t child;
    if (!argv || pipe(ends)) bench_die("no pipe");
    memcpy(argv, b->argv, (size_t)b->argc * sizeof *argv);
    snprintf(number, sizeof number, "%d", ends[1]);
    argv[b->argc] = "--child";
    argv[b->argc + 1] = number;
    if (posix_spawn(&child, "/proc/self/exe", NULL, NULL, argv, environ))
        bench_die("cannot start another process");
    close(ends[1]);
    ssize_t got = read(ends[0], &c->samples[c->count], sizeof *c->samples);
    close(ends[0]);
    free(argv);
    if (waitpid(child, &status, 0) != child || status != 0 || got != (ssize_t)sizeof *c->samples)
        bench_die("the first load of another process failed");
    load_check(b, c, &c->samples[c->count++]);
}

static int be_child(load_bench *b) {
    load_case *c = load_find_case(b, "first as is");
    load_measure(b, c, NULL);
    return write(b->o.child, c->samples, sizeof *c->samples) == (ssize_t)sizeof *c->samples ? 0 : 1;
}

static void measure_first(load_bench *b) {
    load_case *c = load_find_case(b, "first as is");
    for (unsigned i = 1; i < b->o.first; i++) measure_in_child(b, c);
    load_measure(b, c, NULL);
    const fst_stats *s = &c->samples[c->count - 1].stats;
    b->threads = s->threads;
    b->slots = s->slots;
    b->slot_bytes = s->slot_bytes;
}

/* ---- The whole ------------------------------------------------------------------------------------------ */

static void draw(load_bench *b) {
    char title[512];
    load_case *c = load_find_case(b, b->o.timeline_of);
    for (size_t i = b->count; i-- && b->o.tune;) /* the fastest: they are sorted */
        if (b->cases[i].is_tuning && b->cases[i].count) c = &b->cases[i];
    if (!c) return;
    size_t room = c->samples[0].stats.chunks * 64 + 1024; /* strips and copies */
    fst_trace trace = {.records = calloc(room, sizeof *trace.records), .room = room};
    if (!trace.records) bench_die("out of memory");
    load_case one = *c;
    one.samples = calloc(1, sizeof *one.samples);
    if (!one.samples) bench_die("out of memory");
    one.count = 0;
    if (c->state == LOAD_FIRST) fst_release_cached();
    load_measure(b, &one, &trace);
    snprintf(title, sizeof title, "%s: %.2f GB in %.1f ms on %s (%s), %u threads, %u slots of %zu KiB",
             c->name, (double)one.samples->stats.bytes_read / 1e9, one.samples->seconds * 1e3, b->gpu->name,
             b->gpu->label, one.samples->stats.threads, one.samples->stats.slots,
             one.samples->stats.slot_bytes / 1024);
    load_timeline(b->o.timeline, title, one.samples, &trace,
                  b->gpu->host_access ? 0 : load_rate(b, LOAD_COPY));
    free(trace.records);
    free(one.samples);
}

static void verify(load_bench *b) {
    size_t count = 0;
    for (size_t i = 0; i < b->count; i++) {
        const load_case *c = &b->cases[i];
        if (!c->count || c->state == LOAD_FIRST || (c->is_tuning && count))
            continue; /* of a sweep, the fastest */
        load_verify(b, c);
        count++;
        if (b->o.turns) printf("%s: right\n", c->name); /* who waits for it sees that it goes on */
        fflush(stdout);
    }
    printf("results of %zu cases are right, byte for byte\n", count);
}

static void find_device(load_bench *b) {
    fst_error error;
    int saved;
    const char *must = getenv("FST_TEST_DEVICE");
    if (fst_gpu_find(b->o.device, &b->gpu, b->reason, sizeof b->reason, &error)) bench_die("%s", error.text);
    if (must && *must && (b->gpu->host_access || b->gpu->index != atoi(must)))
        bench_die("the device is %s, but FST_TEST_DEVICE is %s", b->gpu->label, must);
    if (b->gpu->calls->enter(b->gpu, &saved)) bench_die("cannot use %s", b->gpu->label);
    b->available = fst_gpu_available(b->gpu);
}

static void measure_rest(load_bench *b) {
    if (b->o.tune) {
        sweep(b, b->o.runs);
        return;
    }
    run_rounds(b, b->o.runs, 0);
    if (b->o.cold && b->given.in_memory) printf("the files are in memory: no cold loads\n");
    else if (b->o.cold) run_rounds(b, b->o.cold_runs, 1);
}

/* Also when something fails in the middle: time on a machine is dear. */
static load_bench *unreported;

static void report(void) {
    load_bench *b = unreported;
    unreported = NULL;
    if (!b) return;
    load_print(b);
    if (b->o.json) load_json(b);
    fflush(stdout);
}

static void check_place(const char *path) {
    FILE *file = path ? fopen(path, "a") : NULL;
    if (path && !file) bench_die("cannot write %s", path);
    if (file) fclose(file);
}

static int tell_doubts(const load_bench *b) {
    for (unsigned i = 0; i < b->doubts_count; i++) fprintf(stderr, "bench_load: doubt: %s\n", b->doubts[i]);
    return b->doubts_count ? 1 : 0;
}

int load_main(int argc, char **argv) {
    static load_bench b;
    b.argc = argc;
    b.argv = argv;
    if (!load_parse(argc, argv, &b.o)) return 2;
    int is_child = b.o.child >= 0;
    if (b.o.generate && !is_child) load_generate(&b.o);
    load_find_files(b.o.paths, &b.given);
    if (b.o.tmpfs && !is_child) load_copy_files(&b.given, b.o.tmpfs, &b.tmpfs);
    add_cases(&b);
    load_find_parts(&b);
    if (b.o.timeline && !b.o.tune && !load_find_case(&b, b.o.timeline_of)) {
        fprintf(stderr, "bench_load: --timeline-of: there is no case %s\n", b.o.timeline_of);
        return 2;
    }
    if (!is_child) check_place(b.o.json);
    if (!is_child) check_place(b.o.timeline);
    find_device(&b);
    b.started = fst_os_now();
    if (b.o.turns) {
        if (b.o.nccl) load_join(&b);
        load_turns(&b);
        if (b.o.verify) verify(&b);
        if (b.comm) load_part_company(&b);
        return tell_doubts(&b);
    }
    bench_read_rate((const char *const *)b.given.paths, fst_os_cpus(), 1, MIB,
                    BENCH_INTO_RING); /* warm files */
    if (is_child) return be_child(&b);
    measure_first(&b);
    unreported = &b;
    atexit(report);
    measure_rest(&b);
    report();
    if (b.o.timeline) draw(&b);
    if (b.o.verify) verify(&b);
    return tell_doubts(&b);
}
