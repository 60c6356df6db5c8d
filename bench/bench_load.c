/* bench_load: whole loads against their ceilings, in one run.
 *
 *     bench_load [--device auto|cpu|N] [--runs N] [--cast DTYPE]... [--threads N] [--slot BYTES]
 *                [--json FILE] [--no-verify] PATH...
 *
 * Cases: the first load of the process as is; then, alternated, as is and with each --cast, with everything
 * warm (page cache, threads, rings). Device memory is sampled by a thread beside the loads. At the end one
 * more load is compared, byte for byte, with what the CPU device makes of the same files. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"
#include "fst.h"
#include "os.h"

enum { MAX_CASES = 8, MAX_RUNS = 64 };

typedef struct measured {
    char name[64];
    fst_dtype cast;
    double seconds[MAX_RUNS], cpu[MAX_RUNS];
    size_t runs;
    uint64_t bytes_read, bytes_out, peak, pinned;
    double open_seconds[MAX_RUNS], allocate_seconds[MAX_RUNS], wait_seconds[MAX_RUNS];
    char limit[16];
} measured;

typedef struct setup {
    const char *const *paths;
    int device, verify;
    unsigned threads, runs;
    size_t slot_bytes;
    const char *json;
} setup;

/* ---- Device memory, as the driver sees it ---- */

static struct {
    const fst_gpu *gpu;
    atomic_int quit;
    atomic_uint_fast64_t least;
} sampler;

static void *sample(void *unused) {
    struct timespec pause = {0, 1000000};
    int saved;
    sampler.gpu->calls->enter(sampler.gpu, &saved);
    while (!atomic_load(&sampler.quit)) {
        uint64_t available, total;
        if (sampler.gpu->calls->memory(sampler.gpu, &available, &total) == 0 && available < sampler.least)
            atomic_store(&sampler.least, available);
        nanosleep(&pause, NULL);
    }
    return unused;
}

static uint64_t available_memory(const fst_gpu *gpu) {
    uint64_t available = 0, total;
    gpu->calls->memory(gpu, &available, &total);
    return available;
}

/* ---- Loads ---- */

static fst_model *load(const setup *s, int device, fst_dtype cast) {
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model;
    fst_error error;
    options.cast = cast;
    options.device = device;
    options.threads = s->threads;
    options.slot_bytes = s->slot_bytes;
    if (fst_load(s->paths, &options, &model, &error)) bench_die("%s: %s", error.path, error.text);
    return model;
}

static void measure(const setup *s, const fst_gpu *gpu, measured *m, uint64_t base) {
    pthread_t thread;
    fst_stats stats = {.size = sizeof stats};
    sampler.gpu = gpu;
    atomic_store(&sampler.quit, 0);
    atomic_store(&sampler.least, available_memory(gpu));
    if (pthread_create(&thread, NULL, sample, NULL)) bench_die("no thread");
    double cpu = bench_cpu_seconds(), start = fst_os_now();
    fst_model *model = load(s, s->device, m->cast);
    double seconds = fst_os_now() - start;
    m->cpu[m->runs] = bench_cpu_seconds() - cpu;
    m->seconds[m->runs++] = seconds;
    atomic_store(&sampler.quit, 1);
    pthread_join(thread, NULL);
    uint64_t peak = base > sampler.least ? base - sampler.least : 0;
    if (peak > m->peak) m->peak = peak;
    fst_model_stats(model, &stats);
    m->open_seconds[m->runs - 1] = stats.open_seconds;
    m->allocate_seconds[m->runs - 1] = stats.allocate_seconds;
    m->wait_seconds[m->runs - 1] = stats.wait_seconds / stats.threads;
    m->bytes_read = stats.bytes_read;
    m->bytes_out = stats.bytes_out;
    m->pinned = stats.pinned_bytes;
    snprintf(m->limit, sizeof m->limit, "%s", stats.limit);
    if (stats.seconds > seconds || stats.seconds < seconds * 0.98 - 0.0005)
        bench_die("the library says %.6f s, the clock %.6f s", stats.seconds, seconds);
    fst_model_free(model);
}

static int same(const fst_gpu *gpu, fst_queue stream, unsigned char *buffer, size_t room,
                const fst_tensor *there, const fst_tensor *here) {
    for (uint64_t at = 0; at < there->nbytes; at += room) {
        size_t size = there->nbytes - at < room ? (size_t)(there->nbytes - at) : room;
        if (gpu->calls->to_host(gpu, stream, buffer, (unsigned char *)there->data + at, size) ||
            gpu->calls->stream_wait(gpu, stream))
            bench_die("copying a result back failed");
        if (memcmp(buffer, (unsigned char *)here->data + at, size)) return 0;
    }
    return there->nbytes == here->nbytes && there->dtype == here->dtype;
}

static void verify(const setup *s, const fst_gpu *gpu, const measured *m) {
    size_t room = (size_t)64 << 20;
    unsigned char *buffer = bench_pinned(gpu, room);
    fst_model *there = load(s, s->device, m->cast), *here = load(s, FST_DEVICE_CPU, m->cast);
    fst_queue stream;
    if (gpu->calls->stream_new(gpu, &stream)) bench_die("no stream");
    for (size_t i = 0; i < fst_model_count(there); i++) {
        fst_tensor a, b;
        fst_model_at(there, i, &a);
        fst_model_at(here, i, &b);
        if (!same(gpu, stream, buffer, room, &a, &b))
            bench_die("case %s: tensor %s is wrong", m->name, a.name);
    }
    gpu->calls->stream_free(gpu, stream);
    fst_model_free(there);
    fst_model_free(here);
    bench_pinned_free(gpu, buffer, room);
}

/* ---- Reports ---- */

static void write_json(const setup *s, const fst_gpu *gpu, const measured *cases, size_t count, double copy,
                       double read) {
    char machine[512], commit[64], date[32];
    FILE *file = fopen(s->json, "w");
    if (!file) bench_die("cannot write %s", s->json);
    bench_machine(machine, sizeof machine, gpu);
    bench_commit(commit, sizeof commit);
    bench_date(date, sizeof date);
    fprintf(file, "{\n  \"machine\": ");
    bench_json_string(file, machine);
    fprintf(file, ",\n  \"device\": \"%s\",\n  \"date\": \"%s\",\n  \"commit\": \"%s\",\n", gpu->label, date,
            commit);
    fprintf(file, "  \"ceilings\": {\"h2d_gb_per_s\": %.2f, \"page_cache_gb_per_s\": %.2f},\n  \"runs\": [",
            copy, read);
    for (size_t i = 0; i < count; i++) {
        measured m = cases[i];
        double seconds = bench_median(m.seconds, m.runs), cpu = bench_median(m.cpu, m.runs);
        double rate = (double)m.bytes_read / seconds / 1e9, ceiling = copy < read ? copy : read;
        fprintf(
            file,
            "%s\n    {\"case\": \"%s\", \"seconds\": %.6f, \"gb_per_s\": %.2f, \"share_of_ceiling\": %.3f, "
            "\"peak_device_bytes\": %llu, \"pinned_bytes\": %llu, \"cpu_seconds\": %.3f, "
            "\"bytes_read\": %llu, \"bytes_out\": %llu, \"open_seconds\": %.6f, "
            "\"allocate_seconds\": %.6f, \"wait_seconds\": %.6f, \"limit\": \"%s\", \"measured\": %zu}",
            i ? "," : "", m.name, seconds, rate, rate / ceiling, (unsigned long long)m.peak,
            (unsigned long long)m.pinned, cpu, (unsigned long long)m.bytes_read,
            (unsigned long long)m.bytes_out, bench_median(m.open_seconds, m.runs),
            bench_median(m.allocate_seconds, m.runs), bench_median(m.wait_seconds, m.runs), m.limit, m.runs);
    }
    fprintf(file, "\n  ]\n}\n");
    if (fclose(file)) bench_die("cannot write %s", s->json);
}

static void print(const measured *cases, size_t count, double copy, double read) {
    printf("ceilings: host to device %.1f GB/s, page cache %.1f GB/s\n", copy, read);
    printf("%-20s %9s %7s %8s %11s %11s %9s %8s %9s %8s  %s\n", "case", "seconds", "GB/s", "ceiling",
           "device MiB", "result MiB", "CPU s/GB", "open ms", "alloc ms", "wait ms", "limit");
    for (size_t i = 0; i < count; i++) {
        measured m = cases[i];
        double seconds = bench_median(m.seconds, m.runs), rate = (double)m.bytes_read / seconds / 1e9;
        printf("%-20s %9.4f %7.2f %8.3f %11.1f %11.1f %9.3f %8.2f %9.2f %8.1f  %s\n", m.name, seconds, rate,
               rate / (copy < read ? copy : read), (double)m.peak / 1048576, (double)m.bytes_out / 1048576,
               bench_median(m.cpu, m.runs) / ((double)m.bytes_read / 1e9),
               bench_median(m.open_seconds, m.runs) * 1e3, bench_median(m.allocate_seconds, m.runs) * 1e3,
               bench_median(m.wait_seconds, m.runs) * 1e3, m.limit);
    }
}

static const char *const *all_files(const setup *s) {
    fst_model *model;
    fst_error error;
    if (fst_open(s->paths, NULL, &model, &error)) bench_die("%s: %s", error.path, error.text);
    size_t count = fst_model_file_count(model);
    const char **files = calloc(count + 1, sizeof *files);
    if (!files) bench_die("out of memory");
    for (size_t i = 0; i < count; i++) files[i] = strdup(fst_model_file_path(model, i));
    fst_model_free(model);
    return files;
}

int main(int argc, char **argv) {
    static measured cases[MAX_CASES] = {{.name = "first as is"}, {.name = "warm as is"}};
    size_t count = 2, paths_count = 0;
    setup s = {.runs = 7, .verify = 1};
    const char **paths = calloc((size_t)argc + 1, sizeof *paths);
    if (!paths) bench_die("out of memory");
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--no-verify") == 0) {
            s.verify = 0;
            continue;
        }
        if (strncmp(argv[i], "--", 2)) {
            paths[paths_count++] = argv[i];
            continue;
        }
        i++;
        if (strcmp(argv[i - 1], "--device") == 0)
            s.device = strcmp(value, "auto") == 0  ? FST_DEVICE_AUTO
                       : strcmp(value, "cpu") == 0 ? FST_DEVICE_CPU
                                                   : FST_DEVICE_GPU(atoi(value));
        else if (strcmp(argv[i - 1], "--runs") == 0) s.runs = (unsigned)atoi(value);
        else if (strcmp(argv[i - 1], "--threads") == 0) s.threads = (unsigned)atoi(value);
        else if (strcmp(argv[i - 1], "--slot") == 0) s.slot_bytes = (size_t)atoll(value);
        else if (strcmp(argv[i - 1], "--json") == 0) s.json = value;
        else if (strcmp(argv[i - 1], "--cast") == 0 && count < MAX_CASES && fst_dtype_from_name(value)) {
            cases[count].cast = fst_dtype_from_name(value);
            snprintf(cases[count].name, sizeof cases->name, "warm to %s", fst_dtype_name(cases[count].cast));
            count++;
        } else bench_die("bad argument %s %s", argv[i - 1], value);
    }
    if (!paths_count || s.runs < 1 || s.runs > MAX_RUNS) bench_die("usage: bench_load [options] PATH...");
    s.paths = paths;
    const fst_gpu *gpu;
    char reason[256];
    fst_error error;
    int saved;
    if (fst_gpu_find(s.device, &gpu, reason, sizeof reason, &error)) bench_die("%s", error.text);
    if (gpu->calls->enter(gpu, &saved)) bench_die("cannot use %s", gpu->label);
    const char *const *files = all_files(&s);
    uint64_t base = available_memory(gpu);

    measure(&s, gpu, &cases[0], base);
    double *copies = calloc(s.runs, sizeof *copies), *reads = calloc(s.runs, sizeof *reads);
    fst_stats stats = {.size = sizeof stats};
    fst_model *model = load(&s, s.device, FST_NATIVE);
    fst_model_stats(model, &stats);
    fst_model_free(model);
    if (!copies || !reads) bench_die("out of memory");
    for (unsigned run = 0; run < s.runs; run++) {
        copies[run] = bench_copy_ceiling(gpu, (uint64_t)2 << 30);
        reads[run] = bench_read_ceiling(files, stats.threads, stats.slots / stats.threads, stats.slot_bytes);
        for (size_t i = 1; i < count; i++) measure(&s, gpu, &cases[i], base);
    }
    double copy = bench_median(copies, s.runs), read = bench_median(reads, s.runs);
    printf("%s (%s), %s: %u threads x %u slots of %zu KiB\n", gpu->label, gpu->name, reason, stats.threads,
           stats.slots / stats.threads, stats.slot_bytes / 1024);
    print(cases, count, copy, read);
    if (s.json) write_json(&s, gpu, cases, count, copy, read);
    for (size_t i = 1; i < count && s.verify; i++) verify(&s, gpu, &cases[i]);
    if (s.verify) printf("results are those of the CPU device, byte for byte\n");
    return 0;
}
