/* System calls that fail, are short, or tell of another machine. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>

#include "harness.h"
#include "status.h"
#include "support.h"

static fst_os real;
static struct {
    fake_os_options options;
    pthread_mutex_t lock;
    int calls[FAKE_OS_KINDS];
    int descriptors, mappings, rings;
    int begun;
    unsigned reads;
    uint64_t bytes;
} os = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* 0, or the negative errno that this call has to return. */
static int os_fails(fake_os_kind kind) {
    pthread_mutex_lock(&os.lock);
    int fails = ++os.calls[kind] == os.options.fail_at && kind == os.options.kind;
    pthread_mutex_unlock(&os.lock);
    if (os.options.refuse >> kind & 1) return -os.options.refusal;
    return fails ? -os.options.error : 0;
}

static int os_count(int *which, int by) {
    pthread_mutex_lock(&os.lock);
    *which += by;
    pthread_mutex_unlock(&os.lock);
    return 0;
}

static int os_open(const char *path) {
    int code = os_fails(FAKE_OS_NEEDED), fd = code ? code : real.open_read(path);
    if (fd >= 0) os_count(&os.descriptors, 1);
    return fd;
}

static int os_open_again(int fd, const char *path, int direct) {
    int code = os_fails(direct ? FAKE_OS_OPEN_DIRECT : FAKE_OS_OPEN_PROBE);
    int again = code ? code : real.open_again(fd, path, direct);
    if (again >= 0) os_count(&os.descriptors, 1);
    return again;
}

static int os_close(int fd) {
    os_count(&os.descriptors, -1);
    return real.close(fd);
}

static int os_identify(int fd, fst_file_id *id, fst_file_type *type) {
    int code = os_fails(FAKE_OS_NEEDED);
    if (code) return code;
    code = real.identify(fd, id, type);
    if (os.options.replaced && fcntl(fd, F_GETFL) & O_DIRECT) id->inode++;
    return code;
}

/* How much of a read comes, and what else may come of it. */
static ssize_t shorten(unsigned turn, ssize_t got) {
    if (turn % 3 == 0) return turn % 2 ? -EINTR : -EAGAIN;
    ssize_t most = turn % 5 == 0 ? 4096 : 1 + (ssize_t)(turn * 977u % 4095);
    return got > most ? most : got;
}

static ssize_t os_pread(int fd, void *buffer, size_t size, uint64_t offset) {
    int direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    int code = direct ? os_fails(FAKE_OS_PREAD_DIRECT) : 0;
    if (!code) code = os_fails(FAKE_OS_NEEDED);
    pthread_mutex_lock(&os.lock);
    unsigned turn = ++os.reads;
    void (*hook)(void) =
        os.bytes <= os.options.after && os.bytes + size > os.options.after ? os.options.hook : NULL;
    os.bytes += size;
    if (hook) os.options.hook = NULL;
    pthread_mutex_unlock(&os.lock);
    if (hook) hook();
    if (code) return code;
    if (direct && (offset | size | (uintptr_t)buffer) % 512)
        return -EINVAL; /* some file systems forgive it */
    ssize_t got = real.pread(fd, buffer, size, offset);
    if (!os.options.short_reads) return got;
    got = shorten(turn, got);
    return got == -EAGAIN ? -EINTR : got;
}

static void *os_map(size_t size) {
    void *memory = os_fails(FAKE_OS_NEEDED) ? NULL : real.map(size);
    if (memory) os_count(&os.mappings, 1);
    return memory;
}

static void *os_map_file(int fd, size_t size) {
    void *memory = os_fails(FAKE_OS_MAP_FILE) ? NULL : real.map_file(fd, size);
    if (memory) os_count(&os.mappings, 1);
    return memory;
}

static void os_unmap(void *memory, size_t size) {
    os_count(&os.mappings, -1);
    real.unmap(memory, size);
}

/* ---- What is in memory ----------------------------------------------------------------------------- */

static int os_file_system(int fd, fst_file_system *out) {
    int code = os_fails(FAKE_OS_FILE_SYSTEM);
    if (code || os.options.system == 0) return code ? code : real.file_system(fd, out);
    *out = (fst_file_system)(os.options.system - 1);
    return 0;
}

static int os_direct_alignment(int fd, uint32_t *memory, uint32_t *offset) {
    int code = os_fails(FAKE_OS_ALIGNMENT);
    if (code || !os.options.alignment) return code ? code : real.direct_alignment(fd, memory, offset);
    *memory = *offset = os.options.alignment < 0 ? 0 : (uint32_t)os.options.alignment;
    return 0;
}

static int os_is_owner(int fd) {
    int code = os_fails(FAKE_OS_IS_OWNER);
    return code ? code : os.options.stranger ? 0 : real.is_owner(fd);
}

static int os_cachestat(int fd, uint64_t offset, uint64_t size, uint64_t *pages) {
    int code = os_fails(FAKE_OS_CACHESTAT);
    return code ? code : real.cachestat(fd, offset, size, pages);
}

static int os_mincore(void *memory, size_t size, unsigned char *pages) {
    int code = os_fails(FAKE_OS_MINCORE);
    return code ? code : real.mincore(memory, size, pages);
}

static ssize_t os_pread_cached(int fd, void *buffer, size_t size, uint64_t offset) {
    int code = os_fails(FAKE_OS_PREAD_CACHED);
    return code ? code : real.pread_cached(fd, buffer, size, offset);
}

static int os_advise(int fd, uint64_t offset, uint64_t size, fst_advice advice) {
    int code = os_fails(FAKE_OS_ADVISE);
    if (!code && os.options.no_readahead && advice == FST_ADVICE_WILLNEED) code = -EINVAL;
    return code ? code : real.advise(fd, offset, size, advice);
}

static uint64_t os_memory_available(void) {
    if (os_fails(FAKE_OS_MEMORY)) return 0;
    return os.options.memory ? os.options.memory : real.memory_available();
}

static ssize_t os_read_text(const char *path, char *out, size_t size) {
    int code = os_fails(FAKE_OS_READ_TEXT);
    if (code || !os.options.texts) return code ? code : real.read_text(path, out, size);
    for (const char *const *at = os.options.texts; *at; at += 2) {
        if (strcmp(at[0], path) != 0) continue;
        size_t length = strlen(at[1]) < size ? strlen(at[1]) : size - 1;
        memcpy(out, at[1], length);
        out[length] = 0;
        return (ssize_t)length;
    }
    return -ENOENT;
}

static int os_set_affinity(const fst_cpus *cpus) {
    int code = os_fails(FAKE_OS_SET_AFFINITY);
    return code ? code : real.set_affinity(cpus);
}

static int os_bind_memory(void *memory, size_t size, int node) {
    int code = os_fails(FAKE_OS_BIND_MEMORY);
    return code ? code : real.bind_memory(memory, size, node);
}

/* ---- io_uring -------------------------------------------------------------------------------------- */

static int os_uring_open(unsigned depth, fst_uring **out) {
    int code = os_fails(FAKE_OS_URING_OPEN);
    if (!code) code = real.uring_open(depth, out);
    return code ? code : os_count(&os.rings, 1);
}

static void os_uring_close(fst_uring *uring) {
    os_count(&os.rings, -1);
    real.uring_close(uring);
}

static int os_uring_buffers(fst_uring *uring, const struct iovec *buffers, unsigned count) {
    int code = os_fails(FAKE_OS_URING_BUFFERS);
    return code ? code : real.uring_buffers(uring, buffers, count);
}

static int os_uring_files(fst_uring *uring, unsigned count) {
    int code = os_fails(FAKE_OS_URING_FILES);
    return code ? code : real.uring_files(uring, count);
}

static int os_uring_file(fst_uring *uring, unsigned place, int fd) {
    int code = os_fails(FAKE_OS_URING_FILE);
    return code ? code : real.uring_file(uring, place, fd);
}

static int os_uring_read(fst_uring *uring, const fst_uring_read *read) {
    int code = os_fails(FAKE_OS_URING_READ);
    return code ? code : real.uring_read(uring, read);
}

static int os_uring_wait(fst_uring *uring, uint64_t *tag, int *result) {
    int code = os_fails(FAKE_OS_URING_WAIT);
    if (!code) code = real.uring_wait(uring, tag, result);
    if (code) return code;
    int failed = os_fails(FAKE_OS_URING_RESULT);
    if (failed) *result = failed;
    pthread_mutex_lock(&os.lock);
    unsigned turn = ++os.reads;
    pthread_mutex_unlock(&os.lock);
    if (!failed && os.options.short_reads) *result = (int)shorten(turn, *result);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------- */

void fake_os_begin(const fake_os_options *options) {
    fst_release_cached();
    if (os.begun) fst_os_calls = real; /* a case that failed never ended it */
    os.begun = 1;
    real = fst_os_calls;
    os.options = *options;
    memset(os.calls, 0, sizeof os.calls);
    os.descriptors = os.mappings = os.rings = 0;
    os.reads = 0;
    os.bytes = 0;
    fst_os_calls.open_read = os_open;
    fst_os_calls.close = os_close;
    fst_os_calls.identify = os_identify;
    fst_os_calls.pread = os_pread;
    fst_os_calls.map = os_map;
    fst_os_calls.unmap = os_unmap;
    fst_os_calls.open_again = os_open_again;
    fst_os_calls.file_system = os_file_system;
    fst_os_calls.direct_alignment = os_direct_alignment;
    fst_os_calls.is_owner = os_is_owner;
    fst_os_calls.cachestat = os_cachestat;
    fst_os_calls.map_file = os_map_file;
    fst_os_calls.mincore = os_mincore;
    fst_os_calls.pread_cached = os_pread_cached;
    fst_os_calls.advise = os_advise;
    fst_os_calls.memory_available = os_memory_available;
    fst_os_calls.read_text = os_read_text;
    fst_os_calls.set_affinity = os_set_affinity;
    fst_os_calls.bind_memory = os_bind_memory;
    fst_os_calls.uring_open = os_uring_open;
    fst_os_calls.uring_close = os_uring_close;
    fst_os_calls.uring_buffers = os_uring_buffers;
    fst_os_calls.uring_files = os_uring_files;
    fst_os_calls.uring_file = os_uring_file;
    fst_os_calls.uring_read = os_uring_read;
    fst_os_calls.uring_wait = os_uring_wait;
}

void fake_os_end(void) {
    fst_release_cached();
    fst_os_calls = real;
    os.begun = 0;
    if (os.descriptors || os.mappings || os.rings)
        test_fail(__FILE__, __LINE__, "still held: %d descriptors, %d mappings, %d rings", os.descriptors,
                  os.mappings, os.rings);
}

int fake_os_calls(void) { return os.calls[FAKE_OS_NEEDED]; }
int fake_os_calls_of(fake_os_kind kind) { return os.calls[kind]; }
