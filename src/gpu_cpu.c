/* The CPU as a device: blocks are host memory, kernels run in the thread that launches them. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "gpu.h"
#include "os.h"

static int enter(const fst_gpu *gpu, int *saved) {
    (void)gpu;
    *saved = 0;
    return 0;
}

static void leave(const fst_gpu *gpu, int saved) {
    (void)gpu;
    (void)saved;
}

static const char *describe(int code) { return code == FST_GPU_OUT_OF_MEMORY ? "out of memory" : "error"; }

static int memory(const fst_gpu *gpu, uint64_t *free_bytes, uint64_t *total_bytes) {
    FILE *file = fopen("/proc/meminfo", "re");
    char line[128];
    (void)gpu;
    *free_bytes = *total_bytes = UINT64_MAX;
    if (!file) return 0;
    while (fgets(line, sizeof line, file)) {
        unsigned long long kib;
        if (sscanf(line, "MemTotal: %llu kB", &kib) == 1) *total_bytes = kib * 1024;
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) *free_bytes = kib * 1024;
        if (sscanf(line, "SwapFree: %llu kB", &kib) == 1 && *free_bytes != UINT64_MAX)
            *free_bytes += kib * 1024;
    }
    fclose(file);
    return 0;
}

static int alloc_block(const fst_gpu *gpu, uint64_t size, void **out) {
    (void)gpu;
    *out = size <= SIZE_MAX ? fst_os_calls.map((size_t)size) : NULL;
    return *out ? 0 : FST_GPU_OUT_OF_MEMORY;
}

static void free_block(const fst_gpu *gpu, void *block, uint64_t size) {
    (void)gpu;
    fst_os_calls.unmap(block, (size_t)size);
}

static void free_behind(const fst_gpu *gpu, fst_queue stream, void *block, uint64_t size) {
    (void)stream;
    free_block(gpu, block, size);
}

/* The host's memory goes back at once. */
static void hold(const fst_gpu *gpu) { (void)gpu; }
static uint64_t kept(const fst_gpu *gpu) {
    (void)gpu;
    return 0;
}

/* Nothing is pinned and nothing is asynchronous: one handle stands for every stream and event. */
static char handle;

static int pin(const fst_gpu *gpu, void *host, size_t size) {
    (void)gpu, (void)host, (void)size;
    return 0;
}

static void unpin(const fst_gpu *gpu, void *host) { (void)gpu, (void)host; }

static int handle_new(const fst_gpu *gpu, void **out) {
    (void)gpu;
    *out = &handle;
    return 0;
}

static int event_new(const fst_gpu *gpu, int timed, fst_event *out) {
    (void)timed;
    return handle_new(gpu, out);
}

static void handle_free(const fst_gpu *gpu, void *which) { (void)gpu, (void)which; }

static int wait(const fst_gpu *gpu, void *which) {
    (void)gpu, (void)which;
    return 0;
}

static int event_record(const fst_gpu *gpu, fst_event event, fst_queue stream) {
    (void)gpu, (void)event, (void)stream;
    return 0;
}

static int stream_follow(const fst_gpu *gpu, fst_queue stream, fst_event event) {
    (void)gpu, (void)stream, (void)event;
    return 0;
}

static float event_elapsed(const fst_gpu *gpu, fst_event from, fst_event to) {
    (void)gpu, (void)from, (void)to;
    return -1;
}

static int copy(const fst_gpu *gpu, fst_queue stream, void *dst, const void *src, size_t size) {
    (void)gpu, (void)stream;
    memcpy(dst, src, size);
    return 0;
}

static const fst_gpu_calls calls = {
    .enter = enter,
    .leave = leave,
    .describe = describe,
    .memory = memory,
    .alloc_block = alloc_block,
    .free_block = free_block,
    .free_behind = free_behind,
    .hold = hold,
    .let_go = hold,
    .kept = kept,
    .pin = pin,
    .unpin = unpin,
    .stream_new = handle_new,
    .stream_free = handle_free,
    .stream_wait = wait,
    .event_new = event_new,
    .event_free = handle_free,
    .event_record = event_record,
    .event_wait = wait,
    .event_query = wait,
    .stream_follow = stream_follow,
    .event_elapsed = event_elapsed,
    .to_device = copy,
    .to_host = copy,
    .copy_on_device = copy,
};

static fst_gpu cpu = {.calls = &calls, .dlpack_type = 1, .host_access = 1, .label = "cpu", .name = "CPU"};

/* The processor's name, as /proc/cpuinfo has it on x86. */
static void read_name(char *name, size_t size) {
    FILE *file = fopen("/proc/cpuinfo", "re");
    char line[256];
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon) continue;
        snprintf(name, size, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    fclose(file);
}

static void init(void) {
    cpu.kernels = fst_kernels_cpu();
    read_name(cpu.name, sizeof cpu.name);
}

const fst_gpu *fst_gpu_cpu(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, init);
    return &cpu;
}
