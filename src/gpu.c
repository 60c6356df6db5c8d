/* Finds the device that a load runs on: modules, GPUs, and why not. */
#include "gpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "modules.h"
#include "status.h"

#define RUNTIMES 2
#define MAX_GPUS 64

/* What was found out about a runtime's module. Asked once for the process: modules stay loaded, because
 * results may outlive everything else, and a GPU that fails is not tried again, unless it was only full. */
static struct runtime {
    const char *name;
    const fst_gpu_module *module;
    int count;
    char why[512];               /* why there are none */
    char gpu_why[MAX_GPUS][256]; /* why that one does not work; "" when it does or was not tried */
    int gpu_failed[MAX_GPUS];    /* not to be tried again */
    fst_gpu *gpus[MAX_GPUS];     /* those that work */
} runtimes[RUNTIMES] = {{.name = "hip"}, {.name = "cuda"}};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t searched = PTHREAD_ONCE_INIT;
static const fst_gpu *fake;

static void search_runtime(struct runtime *runtime) {
    void *module = fst_module_open(runtime->name, runtime->why, sizeof runtime->why);
    if (!module) return;
    runtime->module = dlsym(module, "fst_module");
    if (!runtime->module || runtime->module->abi != FST_GPU_ABI) {
        snprintf(runtime->why, sizeof runtime->why, "its module is of another version of fst");
        runtime->module = NULL;
        return;
    }
    int count = runtime->module->count();
    if (count > 0) {
        runtime->count = count < MAX_GPUS ? count : MAX_GPUS;
        runtime->why[0] = 0;
    } else {
        snprintf(runtime->why, sizeof runtime->why, "%s",
                 count < 0 ? runtime->module->describe(-count) : "it finds no GPU");
    }
}

static void search(void) {
    for (int i = 0; i < RUNTIMES; i++) search_runtime(&runtimes[i]);
}

/* GPU `index` of a runtime, opened and tested; NULL when it does not work. */
static const fst_gpu *use(struct runtime *runtime, int index) {
    if (runtime->gpus[index] || runtime->gpu_failed[index]) return runtime->gpus[index];
    fst_gpu *gpu = calloc(1, sizeof *gpu);
    if (!gpu) return NULL;
    int code = runtime->module->open(index, gpu);
    if (code == 0) {
        runtime->gpus[index] = gpu;
        return gpu;
    }
    snprintf(runtime->gpu_why[index], sizeof runtime->gpu_why[index], "%s:%d does not work: %s",
             runtime->name, index, runtime->module->describe(code));
    runtime->gpu_failed[index] = code != FST_GPU_OUT_OF_MEMORY; /* full now is no word on the next load */
    free(gpu);
    return NULL;
}

static void say(char *text, size_t size, const char *format, ...) {
    size_t used = strlen(text);
    va_list args;
    if (used && used + 2 < size) used += (size_t)snprintf(text + used, size - used, "; ");
    if (used >= size) return;
    va_start(args, format);
    vsnprintf(text + used, size - used, format, args);
    va_end(args);
}

/* The first that works of GPUs first..last of every runtime. Appends to `reason` what does not. */
static const fst_gpu *find_gpu(int first, int last, char *reason, size_t size) {
    for (int i = 0; i < RUNTIMES; i++) {
        struct runtime *runtime = &runtimes[i];
        if (runtime->count == 0) say(reason, size, "%s: %s", runtime->name, runtime->why);
        for (int index = first; index <= last && index < runtime->count; index++) {
            const fst_gpu *gpu = use(runtime, index);
            if (gpu) return gpu;
            say(reason, size, "%s", runtime->gpu_why[index]);
        }
        if (runtime->count && first >= runtime->count)
            say(reason, size, "%s has GPUs 0 to %d", runtime->name, runtime->count - 1);
    }
    return NULL;
}

fst_status fst_gpu_find(int device, const fst_gpu **out, char *reason, size_t size, fst_error *error) {
    char tried[256] = "";
    const fst_gpu *gpu;
    *out = NULL;
    if (device < 0)
        return fst_fail(error, FST_E_ARG, 0, NULL, "device %d: want FST_DEVICE_AUTO, _CPU or _GPU(n)",
                        device);
    if (device == FST_DEVICE_CPU) {
        snprintf(reason, size, "asked for");
        *out = fst_gpu_cpu();
        return FST_OK;
    }
    pthread_mutex_lock(&lock);
    if (fake && device <= FST_DEVICE_GPU(0)) {
        gpu = fake;
    } else {
        pthread_once(&searched, search);
        int n = device - FST_DEVICE_GPU(0);
        gpu = device == FST_DEVICE_AUTO ? find_gpu(0, MAX_GPUS - 1, tried, sizeof tried)
                                        : find_gpu(n, n, tried, sizeof tried);
    }
    pthread_mutex_unlock(&lock);
    if (gpu) {
        snprintf(reason, size, "%s%s%s", device == FST_DEVICE_AUTO ? "the first GPU that works" : "asked for",
                 *tried ? "; " : "", tried);
    } else if (device == FST_DEVICE_AUTO) {
        gpu = fst_gpu_cpu();
        snprintf(reason, size, "no GPU works (%s)", tried);
    } else {
        return fst_fail(error, FST_E_NO_DEVICE, 0, NULL, "no GPU %d (%s)", device - FST_DEVICE_GPU(0), tried);
    }
    *out = gpu;
    return FST_OK;
}

void fst_gpu_set_fake(const fst_gpu *gpu) {
    pthread_mutex_lock(&lock);
    fake = gpu;
    pthread_mutex_unlock(&lock);
}

uint64_t fst_gpu_available(const fst_gpu *gpu) {
    uint64_t unused = 0, total = 0;
    if (gpu->calls->memory(gpu, &unused, &total)) return 0;
    uint64_t kept = gpu->calls->kept(gpu);
    return unused <= UINT64_MAX - kept ? unused + kept : UINT64_MAX;
}

fst_status fst_gpu_fail(fst_error *error, const fst_gpu *gpu, int code, const char *what) {
    if (code == FST_GPU_OUT_OF_MEMORY)
        return fst_fail(error, gpu->host_access ? FST_E_MEMORY : FST_E_DEVICE_MEMORY, code, NULL,
                        "%s: out of memory on %s", what, gpu->label);
    if (code < 0)
        return fst_fail(error, FST_E_DEVICE, code, NULL, "%s: refused by the kernel (%d)", what, code);
    return fst_fail(error, FST_E_DEVICE, code, NULL, "%s failed on %s: %s", what, gpu->label,
                    gpu->calls->describe(code));
}
