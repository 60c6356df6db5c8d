/* A communicator among processes of bench_load, for loads whose ranks share the reading: of NCCL, or AMD's RCCL, which
 * is loaded here. */
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"
#include "load.h"
#include "os.h"

#define DLPACK_ROCM 10

/* As in nccl.h: ncclComm_t is a pointer, results are an enum. */
typedef struct nccl_id {
    char internal[128];
} nccl_id;

static struct {
    int (*get_version)(int *out);
    int (*get_id)(nccl_id *out);
    int (*init)(void **comm, int ranks, nccl_id id, int rank);
    int (*destroy)(void *comm);
    const char *(*error_string)(int code);
    const char *(*last_error)(void *comm);
} nccl;

static void find(void *library, const char *name, void *function, size_t size) {
    void *address = dlsym(library, name);
    if (!address) bench_die("NCCL: it has no %s", name);
    memcpy(function, &address, size);
}

#define FIND(library, name, field) find(library, name, &(field), sizeof(field))

static void find_library(const load_bench *b) {
    const char *name = b->o.nccl_library;
    if (!name) name = getenv("FST_NCCL");
    if (!name || !*name) name = b->gpu->dlpack_type == DLPACK_ROCM ? "librccl.so.1" : "libnccl.so.2";
    void *library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
    if (!library) bench_die("NCCL: %s", dlerror());
    FIND(library, "ncclGetVersion", nccl.get_version);
    FIND(library, "ncclGetUniqueId", nccl.get_id);
    FIND(library, "ncclCommInitRank", nccl.init);
    FIND(library, "ncclCommDestroy", nccl.destroy);
    FIND(library, "ncclGetErrorString", nccl.error_string);
    FIND(library, "ncclGetLastError", nccl.last_error);
}

static void check(int code, const char *what) {
    if (!code) return;
    const char *last = nccl.last_error(NULL);
    bench_die("NCCL: %s: %s%s%s", what, nccl.error_string(code), last && *last ? ": " : "", last ? last : "");
}

/* The others see all of it or nothing. */
static void write_id(const char *path, const nccl_id *id) {
    char part[4096];
    snprintf(part, sizeof part, "%s.part", path);
    FILE *file = fopen(part, "wbe");
    if (!file) bench_die("cannot write %s", part);
    size_t wrote = fwrite(id, 1, sizeof *id, file);
    if (fclose(file) || wrote != sizeof *id || rename(part, path)) bench_die("cannot write %s", path);
}

/* Waits for rank 0's; the alarm ends that. */
static void read_id(const char *path, nccl_id *id) {
    int fd;
    while ((fd = open(path, O_RDONLY | O_CLOEXEC)) < 0) usleep(2000);
    if (read(fd, id, sizeof *id) != (ssize_t)sizeof *id) bench_die("%s is not rank 0's", path);
    close(fd);
}

/* Neither meeting the others nor parting from them can be given up in another way. */
static void give_up(int signal) {
    static const char text[] = "bench: NCCL: not all ranks came in time\n";
    (void)signal;
    ssize_t wrote = write(STDERR_FILENO, text, sizeof text - 1);
    (void)wrote; /* nobody is left to tell */
    _exit(1);
}

void load_join(load_bench *b) {
    nccl_id id = {{0}};
    if (b->gpu->host_access) bench_die("NCCL: its communicators are for GPUs, this is the CPU");
    find_library(b);
    signal(SIGALRM, give_up);
    alarm(b->o.timeout);
    check(nccl.get_version(&b->nccl_version), "its version");
    if (b->o.rank == 0) {
        check(nccl.get_id(&id), "naming a communicator");
        write_id(b->o.nccl, &id);
    } else read_id(b->o.nccl, &id);
    check(nccl.init(&b->comm, (int)b->o.ranks, id, (int)b->o.rank), "meeting the other ranks");
    alarm(0);
}

void load_part_company(load_bench *b) {
    alarm(b->o.timeout);
    check(nccl.destroy(b->comm), "parting from the other ranks");
    alarm(0);
}
