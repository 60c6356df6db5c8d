#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "os.h"

#define MB 1000000u
#define MIB ((size_t)1 << 20)

void bench_die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "bench: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *values, size_t count) {
    qsort(values, count, sizeof *values, compare);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

double bench_cpu_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

void bench_machine(char *text, size_t size, const fst_gpu *gpu) {
    const fst_gpu *cpu = fst_gpu_cpu();
    snprintf(text, size, "%u x %s%s%s", fst_os_cpus(), cpu->name, gpu->host_access ? "" : ", ",
             gpu->host_access ? "" : gpu->name);
}

void bench_json_string(FILE *file, const char *text) {
    fputc('"', file);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fputc('\\', file);
        if ((unsigned char)*text >= ' ') fputc(*text, file);
    }
    fputc('"', file);
}

void bench_commit(char *text, size_t size) {
    const char *given = getenv("FST_COMMIT");
    snprintf(text, size, "%s", given ? given : "unknown");
    if (given) return;
    FILE *git = popen("git rev-parse --short=12 HEAD 2>/dev/null", "r");
    if (!git) return;
    if (fgets(text, (int)size, git)) text[strcspn(text, "\n")] = 0;
    else snprintf(text, size, "unknown");
    pclose(git);
}

void bench_date(char *text, size_t size) {
    time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(text, size, "%Y-%m-%dT%H:%M:%SZ", &utc);
}

void *bench_pinned(const fst_gpu *gpu, size_t size) {
    unsigned char *memory = fst_os_calls.map(size);
    if (!memory) bench_die("no memory for %zu bytes", size);
    memset(memory, 1, size);
    int code = gpu->calls->pin(gpu, memory, size);
    if (code) bench_die("cannot pin %zu bytes: %s", size, gpu->calls->describe(code));
    return memory;
}

void bench_pinned_free(const fst_gpu *gpu, void *memory, size_t size) {
    gpu->calls->unpin(gpu, memory);
    fst_os_calls.unmap(memory, size);
}

static double copy_rate(const fst_gpu *gpu, unsigned char *device, const unsigned char *host, size_t room,
                        size_t piece, unsigned streams_count, uint64_t bytes) {
    fst_queue streams[4];
    for (unsigned i = 0; i < streams_count; i++)
        if (gpu->calls->stream_new(gpu, &streams[i])) bench_die("no stream");
    double start = fst_os_now();
    uint64_t done = 0;
    for (unsigned turn = 0; done < bytes; turn++, done += piece) {
        size_t at = (size_t)(done % (room / piece * piece));
        if (gpu->calls->to_device(gpu, streams[turn % streams_count], device + at, host + at, piece))
            bench_die("a copy failed");
    }
    for (unsigned i = 0; i < streams_count; i++) gpu->calls->stream_wait(gpu, streams[i]);
    double seconds = fst_os_now() - start;
    for (unsigned i = 0; i < streams_count; i++) gpu->calls->stream_free(gpu, streams[i]);
    return (double)done / seconds / 1e9;
}

double bench_copy_ceiling(const fst_gpu *gpu, uint64_t bytes) {
    static const unsigned pieces[] = {2, 4, 8, 16}, streams[] = {1, 2, 4};
    size_t room = 64 * MIB;
    void *host = bench_pinned(gpu, room), *device;
    double best = 0;
    if (gpu->calls->alloc_block(gpu, room, &device)) bench_die("no device memory");
    copy_rate(gpu, device, host, room, 4 * MIB, 2, room); /* warm up */
    for (unsigned p = 0; p < 4; p++)
        for (unsigned s = 0; s < 3; s++) {
            double rate = copy_rate(gpu, device, host, room, pieces[p] * (size_t)MB, streams[s], bytes);
            if (rate > best) best = rate;
        }
    gpu->calls->free_block(gpu, device, room);
    bench_pinned_free(gpu, host, room);
    return best;
}

/* ---- Reading alone ---- */

typedef struct reading {
    int *fds;
    uint64_t *first; /* chunks before each file */
    size_t count, chunk;
    unsigned slots;
    bench_read where;
    unsigned char *memory;
    atomic_uint_fast64_t next, bytes;
    atomic_int failed;
} reading;

typedef struct reader {
    pthread_t thread;
    reading *what;
    unsigned number;
} reader;

/* No second call behind a short one: with O_DIRECT that is the end of the file. */
static ssize_t read_once(int fd, void *buffer, size_t size, uint64_t offset) {
    ssize_t got;
    do got = pread(fd, buffer, size, (off_t)offset);
    while (got < 0 && errno == EINTR);
    return got;
}

static void *read_chunks(void *arg) {
    reader *r = arg;
    reading *w = r->what;
    size_t file = 0;
    for (unsigned turn = 0;; turn++) {
        uint64_t i = atomic_fetch_add(&w->next, 1);
        if (i >= w->first[w->count]) return NULL;
        while (i >= w->first[file + 1]) file++;
        size_t place = w->where == BENCH_INTO_MEMORY ? (size_t)i : r->number * w->slots + turn % w->slots;
        uint64_t offset = (i - w->first[file]) * w->chunk;
        ssize_t got = w->where == BENCH_PAST_CACHE
                          ? read_once(w->fds[file], w->memory + w->chunk * place, w->chunk, offset)
                          : fst_os_read_all(w->fds[file], w->memory + w->chunk * place, w->chunk, offset);
        if (got < 0) atomic_store(&w->failed, 1);
        else atomic_fetch_add(&w->bytes, (uint64_t)got);
    }
}

/* 0: a file has no O_DIRECT. */
static int open_all(reading *w, const char *const *files) {
    for (size_t i = 0; i < w->count; i++) {
        struct stat st;
        w->fds[i] = open(files[i], O_RDONLY | O_CLOEXEC | (w->where == BENCH_PAST_CACHE ? O_DIRECT : 0));
        if (w->fds[i] < 0 && w->where == BENCH_PAST_CACHE && errno == EINVAL) return 0;
        if (w->fds[i] < 0 || fstat(w->fds[i], &st)) bench_die("cannot open %s", files[i]);
        w->first[i + 1] = w->first[i] + ((uint64_t)st.st_size + w->chunk - 1) / w->chunk;
    }
    return 1;
}

static double read_all(reading *w, unsigned threads) {
    reader *readers = calloc(threads, sizeof *readers);
    size_t places = w->where == BENCH_INTO_MEMORY ? (size_t)w->first[w->count] : (size_t)threads * w->slots;
    w->memory = fst_os_calls.map(w->chunk * places);
    if (!readers || !w->memory) bench_die("no memory for %zu bytes", w->chunk * places);
    if (w->where != BENCH_INTO_MEMORY) memset(w->memory, 1, w->chunk * places);
    double start = fst_os_now();
    for (unsigned i = 0; i < threads; i++) {
        readers[i].what = w;
        readers[i].number = i;
        if (pthread_create(&readers[i].thread, NULL, read_chunks, &readers[i])) bench_die("no thread");
    }
    for (unsigned i = 0; i < threads; i++) pthread_join(readers[i].thread, NULL);
    double seconds = fst_os_now() - start;
    fst_os_calls.unmap(w->memory, w->chunk * places);
    free(readers);
    return seconds;
}

double bench_read_rate(const char *const *files, unsigned threads, unsigned slots, size_t slot_bytes,
                       bench_read where) {
    reading w = {.chunk = slot_bytes, .slots = slots, .where = where};
    while (files[w.count]) w.count++;
    w.fds = calloc(w.count + 1, sizeof *w.fds);
    w.first = calloc(w.count + 1, sizeof *w.first);
    if (!w.fds || !w.first) bench_die("out of memory");
    memset(w.fds, -1, w.count * sizeof *w.fds);
    int opened = open_all(&w, files);
    double seconds = opened ? read_all(&w, threads) : 1;
    for (size_t i = 0; i < w.count; i++)
        if (w.fds[i] >= 0) close(w.fds[i]);
    free(w.fds);
    free(w.first);
    if (w.failed && where == BENCH_PAST_CACHE) return 0;
    if (w.failed) bench_die("a read failed");
    return (double)w.bytes / seconds / 1e9;
}
