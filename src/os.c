#include "os.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define HUGE_PAGE ((size_t)2 << 20)

/* ---- Files ----------------------------------------------------------------------------------- */

static int os_open_read(const char *path) {
    /* O_NONBLOCK: opening a FIFO that nobody writes to would otherwise wait for ever. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    return fd < 0 ? -errno : fd;
}

static int os_close(int fd) { return close(fd) ? -errno : 0; }

static fst_file_type type_of(mode_t mode) {
    return S_ISREG(mode) ? FST_FILE_REGULAR : S_ISDIR(mode) ? FST_FILE_DIRECTORY : FST_FILE_OTHER;
}

static int64_t nanoseconds(struct timespec time) { return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec; }

static int os_identify(int fd, fst_file_id *id, fst_file_type *type) {
    struct stat st;
    if (fstat(fd, &st)) return -errno;
    memset(id, 0, sizeof *id);
    id->device = st.st_dev;
    id->inode = st.st_ino;
    id->size = (uint64_t)st.st_size;
    id->links = st.st_nlink;
    id->mtime_ns = nanoseconds(st.st_mtim);
    id->ctime_ns = nanoseconds(st.st_ctim);
    *type = type_of(st.st_mode);
    return 0;
}

static int os_stat_type(const char *path, fst_file_type *type) {
    struct stat st;
    if (stat(path, &st)) return -errno;
    *type = type_of(st.st_mode);
    return 0;
}

static ssize_t os_pread(int fd, void *buffer, size_t size, uint64_t offset) {
    ssize_t got = pread(fd, buffer, size, (off_t)offset);
    return got < 0 ? -errno : got;
}

static ssize_t os_pwrite(int fd, const void *buffer, size_t size, uint64_t offset) {
    ssize_t put = pwrite(fd, buffer, size, (off_t)offset);
    return put < 0 ? -errno : put;
}

static int os_fsync(int fd) { return fsync(fd) ? -errno : 0; }

static int os_unlink(const char *path) { return unlink(path) ? -errno : 0; }

/* ---- Directories ----------------------------------------------------------------------------- */

/* Names one after the other, each with its NUL. */
typedef struct name_buffer {
    char *text;
    size_t used, room, count;
} name_buffer;

static int add_name(name_buffer *names, const char *name) {
    size_t size = strlen(name) + 1;
    if (names->room - names->used < size) {
        size_t room = 2 * names->room + size + 1024;
        char *text = realloc(names->text, room);
        if (!text) return -ENOMEM;
        names->text = text;
        names->room = room;
    }
    memcpy(names->text + names->used, name, size);
    names->used += size;
    names->count++;
    return 0;
}

static int read_names(DIR *directory, name_buffer *names) {
    for (;;) {
        errno = 0;
        const struct dirent *entry = readdir(directory);
        if (!entry) return -errno;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        int rc = add_name(names, entry->d_name);
        if (rc) return rc;
    }
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The sorted list in one block: pointers, a NULL, the names. */
static int pack_names(const name_buffer *names, char ***out) {
    size_t pointers = (names->count + 1) * sizeof(char *);
    char **list = malloc(pointers + names->used);
    if (!list) return -ENOMEM;
    char *text = (char *)list + pointers;
    if (names->used) memcpy(text, names->text, names->used);
    for (size_t i = 0; i < names->count; i++) {
        list[i] = text;
        text += strlen(text) + 1;
    }
    list[names->count] = NULL;
    qsort(list, names->count, sizeof *list, compare_names);
    *out = list;
    return 0;
}

static int os_list(const char *path, char ***out) {
    DIR *directory = opendir(path);
    if (!directory) return -errno;
    name_buffer names = {0};
    int rc = read_names(directory, &names);
    if (!rc) rc = pack_names(&names, out);
    free(names.text);
    closedir(directory);
    return rc;
}

/* ---- Replacing a file ------------------------------------------------------------------------ */

#define TEMPORARY_TRIES 100
#define TEMPORARY_BASE 200 /* bytes of the name that are kept: the whole must stay under NAME_MAX */

static int random_letters(char *out, size_t count) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    unsigned char bytes[16];
    if (getrandom(bytes, count, 0) != (ssize_t)count) return -EIO;
    for (size_t i = 0; i < count; i++) out[i] = letters[bytes[i] % (sizeof letters - 1)];
    out[count] = 0;
    return 0;
}

static size_t directory_length(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash - path) + 1 : 0;
}

static int os_create_temporary(const char *path, char *name, size_t size) {
    size_t directory = directory_length(path);
    const char *base = path + directory;
    if (!*base) return -EISDIR;
    for (int i = 0; i < TEMPORARY_TRIES; i++) {
        char letters[7];
        int rc = random_letters(letters, 6);
        if (rc) return rc;
        int length =
            snprintf(name, size, "%.*s.%.*s.fst-%s", (int)directory, path, TEMPORARY_BASE, base, letters);
        if (length < 0 || (size_t)length >= size) return -ENAMETOOLONG;
        /* Not mkstemp: it makes files that only their owner may read. The umask decides. */
        int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0) return fd;
        if (errno != EEXIST) return -errno;
    }
    return -EEXIST;
}

/* Makes a rename durable. Not every file system can sync a directory, and one that may be written to
 * need not be readable: neither is a failure. */
static int sync_directory_of(const char *path) {
    size_t length = directory_length(path);
    char *directory = length ? strndup(path, length) : strdup(".");
    if (!directory) return -ENOMEM;
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 ? -errno : 0;
    free(directory);
    if (fd < 0) return rc == -EACCES ? 0 : rc;
    if (fsync(fd)) rc = errno == EINVAL || errno == ENOTSUP ? 0 : -errno;
    close(fd);
    return rc;
}

static int os_rename(const char *from, const char *to) {
    if (rename(from, to)) return -errno;
    return sync_directory_of(to);
}

/* ---- Memory ---------------------------------------------------------------------------------- */

static size_t whole_pages(size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return size > SIZE_MAX - page ? 0 : (size + page - 1) / page * page;
}

static void *map_pages(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

/* Huge pages start at multiples of their size: map more, and give back both ends. */
static void *map_aligned(size_t size) {
    if (size > SIZE_MAX - HUGE_PAGE) return NULL;
    char *memory = map_pages(size + HUGE_PAGE);
    if (!memory) return NULL;
    size_t head = (HUGE_PAGE - (uintptr_t)memory % HUGE_PAGE) % HUGE_PAGE;
    if (head) munmap(memory, head);
    if (HUGE_PAGE - head) munmap(memory + head + size, HUGE_PAGE - head);
    madvise(memory + head, size, MADV_HUGEPAGE); /* advice only: small pages do too */
    return memory + head;
}

static void *os_map(size_t size) {
    size_t rounded = whole_pages(size);
    if (!rounded) return NULL;
    return rounded < HUGE_PAGE ? map_pages(rounded) : map_aligned(rounded);
}

static void os_unmap(void *memory, size_t size) {
    if (memory) munmap(memory, whole_pages(size));
}

fst_os fst_os_calls = {
    .open_read = os_open_read,
    .close = os_close,
    .identify = os_identify,
    .pread = os_pread,
    .list = os_list,
    .stat_type = os_stat_type,
    .create_temporary = os_create_temporary,
    .pwrite = os_pwrite,
    .fsync = os_fsync,
    .rename = os_rename,
    .unlink = os_unlink,
    .map = os_map,
    .unmap = os_unmap,
};

/* ---- On top of the table --------------------------------------------------------------------- */

ssize_t fst_os_read_all(int fd, void *buffer, size_t size, uint64_t offset) {
    size_t done = 0;
    while (done < size) {
        ssize_t got = fst_os_calls.pread(fd, (char *)buffer + done, size - done, offset + done);
        if (got == -EINTR) continue;
        if (got < 0) return got;
        if (got == 0) break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

int fst_os_write_all(int fd, const void *buffer, size_t size, uint64_t offset) {
    size_t done = 0;
    while (done < size) {
        ssize_t put = fst_os_calls.pwrite(fd, (const char *)buffer + done, size - done, offset + done);
        if (put == -EINTR) continue;
        if (put < 0) return (int)put;
        if (put == 0) return -EIO; /* would go on for ever */
        done += (size_t)put;
    }
    return 0;
}

double fst_os_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

unsigned fst_os_cpus(void) {
    /* The kernel refuses a set smaller than its own: cpu_set_t ends at 1024. */
    for (size_t cpus = CPU_SETSIZE; cpus <= (size_t)1 << 20; cpus *= 2) {
        cpu_set_t *set = CPU_ALLOC(cpus);
        if (!set) break;
        size_t size = CPU_ALLOC_SIZE(cpus);
        int rc = sched_getaffinity(0, size, set);
        unsigned count = rc ? 0 : (unsigned)CPU_COUNT_S(size, set);
        CPU_FREE(set);
        if (!rc) return count ? count : 1;
    }
    return 1;
}
