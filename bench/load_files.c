/* Files: which they are, copies, what of them is in memory. */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench.h"
#include "load.h"
#include "os.h"

#define MIB ((uint64_t)1 << 20)
#define PIECE (8 * MIB)    /* written at a time */
#define PART (64 * MIB)    /* of which every second is dropped */
#define WINDOW (256 * MIB) /* looked at by one mincore */
#define PAGE 4096u

static void *need(void *memory) {
    if (!memory) bench_die("out of memory");
    return memory;
}

static int open_file(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) bench_die("cannot open %s", path);
    return fd;
}

static int is_in_memory(const char *path) {
    fst_file_system kind = FST_FS_OTHER;
    int fd = open_file(path);
    fst_os_calls.file_system(fd, &kind);
    close(fd);
    return kind == FST_FS_MEMORY;
}

/* `paths` becomes the list's own. */
static void describe(load_files *out, char **paths, size_t count) {
    out->paths = paths;
    out->count = count;
    out->sizes = need(calloc(count + 1, sizeof *out->sizes));
    out->in_memory = 1;
    for (size_t i = 0; i < count; i++) {
        struct stat st;
        if (stat(paths[i], &st)) bench_die("cannot find %s", paths[i]);
        out->sizes[i] = (uint64_t)st.st_size;
        out->bytes += out->sizes[i];
        out->in_memory = out->in_memory && is_in_memory(paths[i]);
    }
}

void load_find_files(const char *const *given, load_files *out) {
    fst_model *model;
    fst_error error;
    if (fst_open(given, NULL, &model, &error)) bench_die("%s: %s", error.path, error.text);
    size_t count = fst_model_file_count(model);
    char **paths = need(calloc(count + 1, sizeof *paths));
    for (size_t i = 0; i < count; i++) paths[i] = need(strdup(fst_model_file_path(model, i)));
    fst_model_free(model);
    *out = (load_files){.given = given};
    describe(out, paths, count);
}

/* ---- Writing ------------------------------------------------------------------------------------- */

typedef struct writing {
    char *const *paths;
    const uint64_t *sizes;
    int *fds;
    uint64_t *first; /* pieces before each file */
    size_t count;
    load_fill *fill;
    const void *arg;
    atomic_uint_fast64_t next;
    atomic_int failed;
} writing;

static void *write_pieces(void *arg) {
    writing *w = arg;
    unsigned char *buffer = need(malloc(PIECE));
    size_t file = 0;
    for (;;) {
        uint64_t i = atomic_fetch_add(&w->next, 1);
        if (i >= w->first[w->count]) break;
        while (i >= w->first[file + 1]) file++;
        uint64_t offset = (i - w->first[file]) * PIECE, left = w->sizes[file] - offset;
        size_t size = left < PIECE ? (size_t)left : PIECE;
        w->fill(w->arg, file, offset, size, buffer);
        if (fst_os_write_all(w->fds[file], buffer, size, offset)) atomic_store(&w->failed, 1);
    }
    free(buffer);
    return NULL;
}

void load_write_files(char *const *paths, const uint64_t *sizes, size_t count, load_fill *fill,
                      const void *arg) {
    writing w = {.paths = paths, .sizes = sizes, .count = count, .fill = fill, .arg = arg};
    unsigned threads = fst_os_cpus();
    pthread_t *ids = need(calloc(threads, sizeof *ids));
    w.fds = need(calloc(count + 1, sizeof *w.fds));
    w.first = need(calloc(count + 1, sizeof *w.first));
    for (size_t i = 0; i < count; i++) {
        w.fds[i] = open(paths[i], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        if (w.fds[i] < 0) bench_die("cannot write %s", paths[i]);
        w.first[i + 1] = w.first[i] + (sizes[i] + PIECE - 1) / PIECE;
    }
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, write_pieces, &w)) bench_die("no thread");
    for (unsigned i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    for (size_t i = 0; i < count; i++)
        if (fsync(w.fds[i]) | close(w.fds[i])) w.failed = 1;
    if (w.failed) bench_die("cannot write all of %s", count ? paths[0] : "nothing");
    free(ids);
    free(w.fds);
    free(w.first);
}

/* ---- Copies -------------------------------------------------------------------------------------- */

static struct {
    const load_files *files;
    char directory[4096];
} copies;

static void remove_copies(void) {
    for (size_t i = 0; copies.files && i < copies.files->count; i++) unlink(copies.files->paths[i]);
    rmdir(copies.directory);
}

static void remove_copies_and_end(int number) {
    remove_copies(); /* unlink and rmdir alone */
    _exit(128 + number);
}

static void fill_from_file(const void *arg, size_t file, uint64_t offset, size_t size, unsigned char *out) {
    const load_files *from = arg;
    int fd = open_file(from->paths[file]);
    if (fst_os_read_all(fd, out, size, offset) != (ssize_t)size)
        bench_die("cannot read %s", from->paths[file]);
    close(fd);
}

void load_copy_files(const load_files *from, const char *directory, load_files *out) {
    char **paths = need(calloc(from->count + 1, sizeof *paths));
    snprintf(copies.directory, sizeof copies.directory, "%s/bench_load-XXXXXX", directory);
    if (!mkdtemp(copies.directory)) bench_die("cannot make a directory in %s", directory);
    for (size_t i = 0; i < from->count; i++)
        if (asprintf(&paths[i], "%s/%05zu.safetensors", copies.directory, i) < 0) bench_die("out of memory");
    *out = (load_files){.given = (const char *const *)paths, .paths = paths, .count = from->count};
    copies.files = out;
    atexit(remove_copies);
    signal(SIGINT, remove_copies_and_end);
    signal(SIGTERM, remove_copies_and_end);
    load_write_files(paths, from->sizes, from->count, fill_from_file, from);
    describe(out, paths, from->count);
}

/* ---- The page cache -------------------------------------------------------------------------------- */

static void drop_range(int fd, uint64_t offset, uint64_t size) {
    posix_fadvise(fd, (off_t)offset, (off_t)size, POSIX_FADV_DONTNEED);
}

const char *load_drop(const load_files *files, int only_these) {
    int fd = only_these ? -1 : open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC), dropped = 0;
    if (fd >= 0) {
        sync();
        dropped = write(fd, "1\n", 2) == 2;
        close(fd);
    }
    if (dropped) return "drop_caches";
    for (size_t i = 0; i < files->count; i++) {
        fd = open_file(files->paths[i]);
        fdatasync(fd); /* what is dirty stays */
        drop_range(fd, 0, 0);
        close(fd);
    }
    return "fadvise";
}

void load_drop_half(const load_files *files) {
    uint64_t part = files->bytes / 8 / MIB * MIB, start = 0;
    if (part > PART) part = PART;
    if (part < 256 * PAGE) part = 256 * PAGE;
    for (size_t i = 0; i < files->count; start += files->sizes[i++]) {
        int fd = open_file(files->paths[i]);
        uint64_t at = 0; /* parts run on over files: small ones are dropped as a whole */
        while (at < files->sizes[i]) {
            uint64_t size = part - (start + at) % part;
            if (size > files->sizes[i] - at) size = files->sizes[i] - at;
            if ((start + at) / part % 2) drop_range(fd, at, size);
            at += size;
        }
        close(fd);
    }
}

static uint64_t count_missing(int fd, uint64_t size, unsigned char *pages) {
    unsigned char *memory = fst_os_calls.map_file(fd, (size_t)size);
    uint64_t missing = 0;
    if (!memory) return size ? LOAD_UNKNOWN : 0;
    for (uint64_t at = 0; at < size; at += WINDOW) {
        uint64_t length = size - at < WINDOW ? size - at : WINDOW;
        if (fst_os_calls.mincore(memory + at, (size_t)length, pages)) {
            fst_os_calls.unmap(memory, (size_t)size);
            return LOAD_UNKNOWN;
        }
        for (uint64_t i = 0; i < (length + PAGE - 1) / PAGE; i++) missing += pages[i] & 1 ? 0 : PAGE;
    }
    fst_os_calls.unmap(memory, (size_t)size);
    return missing < size ? missing : size;
}

uint64_t load_uncached(const load_files *files) {
    unsigned char *pages = need(malloc(WINDOW / PAGE));
    uint64_t missing = 0;
    for (size_t i = 0; i < files->count && missing != LOAD_UNKNOWN; i++) {
        int fd = open_file(files->paths[i]);
        uint64_t more = fst_os_calls.is_owner(fd) ? count_missing(fd, files->sizes[i], pages) : LOAD_UNKNOWN;
        missing = more == LOAD_UNKNOWN ? more : missing + more;
        close(fd);
    }
    free(pages);
    return missing;
}
