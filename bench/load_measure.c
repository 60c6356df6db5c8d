/* One load, with everything around it that is not the library's own word. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"
#include "load.h"
#include "os.h"

#define MIB ((uint64_t)1 << 20)

void load_doubt(load_bench *b, const char *format, ...) {
    va_list args;
    if (b->doubts_count == LOAD_MAX_DOUBTS) return;
    va_start(args, format);
    vsnprintf(b->doubts[b->doubts_count++], sizeof *b->doubts, format, args);
    va_end(args);
}

/* ---- Device memory, as the driver sees it ---- */

static struct {
    const fst_gpu *gpu;
    atomic_int quit;
    atomic_uint_fast64_t least;
    double cpu_seconds; /* of the sampler itself */
} sampler;

static void *sample_memory(void *unused) {
    struct timespec pause = {0, 5000000}, used;
    int saved;
    sampler.gpu->calls->enter(sampler.gpu, &saved);
    while (!atomic_load(&sampler.quit)) {
        uint64_t available = fst_gpu_available(sampler.gpu);
        if (available && available < sampler.least) atomic_store(&sampler.least, available);
        nanosleep(&pause, NULL);
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    sampler.cpu_seconds = (double)used.tv_sec + (double)used.tv_nsec / 1e9;
    return unused;
}

static void start_sampling(const fst_gpu *gpu, int all_along, pthread_t *thread) {
    sampler.gpu = gpu;
    sampler.cpu_seconds = 0;
    atomic_store(&sampler.quit, 0);
    if (gpu->host_access) return; /* there it is the resident memory */
    atomic_store(&sampler.least, fst_gpu_available(gpu));
    if (all_along && pthread_create(thread, NULL, sample_memory, NULL)) bench_die("no thread");
}

/* With a last look, while the results are there. */
static void end_sampling(const fst_gpu *gpu, int all_along, pthread_t thread) {
    atomic_store(&sampler.quit, 1);
    if (gpu->host_access) return;
    uint64_t available = fst_gpu_available(gpu);
    if (all_along) pthread_join(thread, NULL);
    if (available < sampler.least) atomic_store(&sampler.least, available);
}

/* ---- The process, as the kernel sees it ---- */

/* The number behind `key` in a file of /proc; LOAD_UNKNOWN. */
static uint64_t read_number(const char *path, const char *key) {
    char line[256];
    uint64_t value = LOAD_UNKNOWN;
    FILE *file = fopen(path, "re");
    if (!file) return value;
    while (fgets(line, sizeof line, file))
        if (strncmp(line, key, strlen(key)) == 0) value = strtoull(line + strlen(key), NULL, 10);
    fclose(file);
    return value;
}

static uint64_t disk_bytes(void) { return read_number("/proc/self/io", "read_bytes:"); }
static uint64_t asked_bytes(void) { return read_number("/proc/self/io", "rchar:"); }
static uint64_t most_resident(void) { return read_number("/proc/self/status", "VmHWM:") * 1024; }

/* Lets VmHWM begin anew; what it is then. */
static uint64_t reset_most_resident(void) {
    int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (write(fd, "5", 1) != 1) errno = 0; /* the highest of all loads, then */
        close(fd);
    }
    return most_resident();
}

/* ---- Loads ---- */

/* By as many threads as the library has, as much at a time, and into as large a ring. */
double load_copy_rate(const load_bench *b) {
    uint64_t bytes = b->gpu->host_access || b->given.bytes < 64 * MIB ? 64 * MIB : b->given.bytes;
    return bench_copy_ceiling(b->gpu, bytes < 2048 * MIB ? bytes : 2048 * MIB);
}

double load_read_rate(const load_bench *b, const load_files *files, bench_read where) {
    size_t piece = b->gpu->host_access || b->slot_bytes < LOAD_STRIP ? b->slot_bytes : LOAD_STRIP;
    size_t each = b->slots * b->slot_bytes / piece / b->threads;
    return bench_read_rate((const char *const *)files->paths, b->threads, (unsigned)(each ? each : 1), piece,
                           where);
}

static void wait_until(double when) {
    struct timespec at = {.tv_sec = (time_t)when, .tv_nsec = (long)((when - (double)(time_t)when) * 1e9)};
    while (when > 0 && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
        ;
}

void load_prepare(load_bench *b, const load_case *c) {
    switch (c->state) {
    case LOAD_COLD: b->cold_by = load_drop(c->files, b->o.advise); break;
    case LOAD_HALF:
        load_read_rate(b, c->files, BENCH_INTO_RING);
        load_drop_half(c->files);
        break;
    default: break;
    }
}

void load_set_options(const load_bench *b, const load_case *c, fst_options *options) {
    *options = (fst_options)FST_OPTIONS_INIT;
    options->cast = c->cast;
    options->scale = c->scale;
    options->device = b->o.device;
    options->threads = c->threads;
    options->slot_bytes = c->slot_bytes;
    options->reader = c->reader;
    options->flags = c->flags;
    options->cache = c->cache;
    if (c->part != LOAD_WHOLE) {
        options->rank = b->o.rank;
        options->ranks = b->o.ranks;
        options->shards = b->rules[c->part];
        options->read = c->read;
    }
    if (c->shared) {
        options->comm_kind = FST_COMM_NCCL;
        options->comm = b->comm;
        options->timeout_ms = b->o.timeout * 1000;
        options->flags |= FST_ABORT_COMM; /* a load that fails is this process's last */
    }
    fst_pipeline_tuning.slots = c->slots;
}

static void take_stats(load_sample *s, const fst_model *model) {
    s->stats = (fst_stats){.size = sizeof s->stats};
    fst_model_stats(model, &s->stats);
    snprintf(s->limit, sizeof s->limit, "%s", s->stats.limit ? s->stats.limit : "");
    snprintf(s->reader, sizeof s->reader, "%s", s->stats.reader ? s->stats.reader : "");
    s->stats.device = s->stats.device_name = s->stats.device_reason = s->stats.limit = s->stats.reader = NULL;
}

static void run_stream(const load_case *c, const fst_options *options, load_sample *s, fst_stream **out) {
    fst_error error;
    fst_tensor tensor;
    double start = s->started = fst_os_now();
    if (fst_stream_open(c->files->given, options, out, &error)) bench_die("%s: %s", error.path, error.text);
    do {
        if (fst_stream_next(*out, &tensor, NULL, &error)) bench_die("%s: %s", error.path, error.text);
        if (s->first_tensor_seconds == 0) s->first_tensor_seconds = fst_os_now() - start;
    } while (tensor.name);
    s->seconds = fst_os_now() - start;
}

static void run_load(const load_case *c, const fst_options *options, load_sample *s, fst_model **out) {
    fst_error error;
    double start = s->started = fst_os_now();
    if (fst_load(c->files->given, options, out, &error))
        bench_die("%s%s%s", error.path, *error.path ? ": " : "", error.text);
    s->seconds = fst_os_now() - start;
}

/* Within 2 %, and what a clock's grain or a pool's is. */
static int agrees(double said, double measured, double grain) {
    return said <= measured * 1.02 + grain && said >= measured * 0.98 - grain;
}

/* What a part has, the headers tell; what was asked for, the kernel. It counts what cannot be had without waiting as
 * well, and not what io_uring reads. What ranks read for one another, only all of them together can tell. */
static void check_part(load_bench *b, const load_case *c, const load_sample *s) {
    const fst_stats *said = &s->stats;
    double most = c->read == FST_READ_EXACT ? 1.02 : 2;
    if (b->needed[c->part] && said->bytes_needed != b->needed[c->part])
        load_doubt(b, "%s: the library needs %llu bytes, the headers say %llu", c->name,
                   (unsigned long long)said->bytes_needed, (unsigned long long)b->needed[c->part]);
    if (c->shared) return;
    if ((double)(said->bytes_read - b->header_bytes) > most * (double)said->bytes_needed)
        load_doubt(b, "%s: the library read %llu bytes, headers aside, for %llu that it needs", c->name,
                   (unsigned long long)(said->bytes_read - b->header_bytes),
                   (unsigned long long)said->bytes_needed);
    if (s->asked_bytes != LOAD_UNKNOWN && c->state == LOAD_WARM &&
        !agrees((double)said->bytes_read, (double)s->asked_bytes, (double)MIB))
        load_doubt(b, "%s: the library says that it read %llu bytes, the process %llu", c->name,
                   (unsigned long long)said->bytes_read, (unsigned long long)s->asked_bytes);
}

void load_check(load_bench *b, const load_case *c, const load_sample *s) {
    const fst_stats *said = &s->stats;
    int is_alone = !b->o.turns; /* where ranks share CPUs, a thread may wait for one on its way out */
    if (said->seconds > s->seconds || (is_alone && !c->stream && !agrees(said->seconds, s->seconds, 0.0005)))
        load_doubt(b, "%s: the library says %.6f s, the clock %.6f s", c->name, said->seconds, s->seconds);
    if (c->part != LOAD_WHOLE) check_part(b, c, s);
    else if (!said->tensors_ignored && !agrees((double)said->bytes_read, (double)c->files->bytes, 4096))
        load_doubt(b, "%s: the library read %llu bytes, the files have %llu", c->name,
                   (unsigned long long)said->bytes_read, (unsigned long long)c->files->bytes);
    if (s->disk_bytes != LOAD_UNKNOWN && said->bytes_direct * 0.98 > (double)s->disk_bytes)
        load_doubt(b, "%s: the library read %llu bytes with O_DIRECT, the process had %llu from storage",
                   c->name, (unsigned long long)said->bytes_direct, (unsigned long long)s->disk_bytes);
    if (!b->gpu->host_access && !c->stream && is_alone &&
        !agrees((double)said->peak_device_bytes, (double)s->peak_device_bytes, (double)(64 * MIB)))
        load_doubt(b, "%s: the library used %llu bytes of the device, the driver saw %llu", c->name,
                   (unsigned long long)said->peak_device_bytes, (unsigned long long)s->peak_device_bytes);
}

void load_measure(load_bench *b, load_case *c, fst_trace *trace) {
    load_sample *s = &c->samples[c->count];
    fst_options options;
    fst_model *model = NULL;
    fst_stream *stream = NULL;
    pthread_t thread = 0;
    int all_along = b->watches || c->state >= LOAD_COLD; /* storage is slow enough not to mind */
    *s = (load_sample){.uncached_bytes = LOAD_UNKNOWN};
    load_prepare(b, c);
    if (c->state >= LOAD_COLD) s->uncached_bytes = load_uncached(c->files);
    load_set_options(b, c, &options);
    uint64_t resident = reset_most_resident(), read_before = disk_bytes(), asked_before = asked_bytes();
    start_sampling(b->gpu, all_along, &thread);
    wait_until(b->begins);
    double cpu = bench_cpu_seconds();
    fst_pipeline_trace = trace;
    if (c->stream) run_stream(c, &options, s, &stream);
    else run_load(c, &options, s, &model);
    fst_pipeline_trace = NULL;
    s->cpu_seconds = bench_cpu_seconds() - cpu;
    end_sampling(b->gpu, all_along, thread);
    if (s->cpu_seconds > sampler.cpu_seconds) s->cpu_seconds -= sampler.cpu_seconds;
    uint64_t read_after = disk_bytes(), asked_after = asked_bytes(), most = most_resident();
    s->disk_bytes = read_after == LOAD_UNKNOWN ? LOAD_UNKNOWN : read_after - read_before;
    s->asked_bytes = asked_after == LOAD_UNKNOWN ? LOAD_UNKNOWN : asked_after - asked_before;
    s->host_growth = most > resident ? most - resident : 0;
    s->peak_device_bytes = b->available > sampler.least ? b->available - sampler.least : 0;
    if (b->gpu->host_access) s->peak_device_bytes = s->host_growth;
    take_stats(s, stream ? fst_stream_model(stream) : model);
    load_check(b, c, s);
    c->count++;
    fst_stream_close(stream);
    fst_model_free(model);
}
