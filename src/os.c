#include "os.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <liburing.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <linux/mempolicy.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define HUGE_PAGE ((size_t)2 << 20)

/* ---- Files ----------------------------------------------------------------------------------- */

static int os_open_read(const char *path) {
    /* O_NONBLOCK: opening a FIFO that nobody writes to would otherwise wait for ever. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) return -errno;
    fcntl(fd, F_SETFL, 0); /* older kernels' io_uring would not wait for a disk */
    return fd;
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
    char directory[PATH_MAX] =
        "."; /* on the stack: the file is in place by now, and must not fail for memory */
    if (length >= sizeof directory) return -ENAMETOOLONG;
    if (length) memcpy(directory, path, length), directory[length] = 0;
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 ? -errno : 0;
    if (fd < 0) return rc == -EACCES ? 0 : rc;
    if (fsync(fd)) rc = errno == EINVAL || errno == ENOTSUP ? 0 : -errno;
    close(fd);
    return rc;
}

static int os_rename(const char *from, const char *to) {
    if (rename(from, to)) return -errno;
    return sync_directory_of(to);
}

/* ---- Directories that are written ------------------------------------------------------------- */

static int os_create(const char *path) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666);
    return fd < 0 ? -errno : fd;
}

static int os_make_directory(const char *path) {
    if (mkdir(path, 0777)) return -errno;
    return sync_directory_of(path);
}

static int os_remove_directory(const char *path) { return rmdir(path) ? -errno : 0; }

static int os_real_path(const char *path, char *out) { return realpath(path, out) ? 0 : -errno; }

static int os_lock(int fd) { return flock(fd, LOCK_EX | LOCK_NB) ? -errno : 0; }

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

/* malloc maps what is large, with 16 bytes of its own before it; the kernel puts a mapping of whole huge pages at one. */
void *fst_os_array(size_t size) {
    if (size < HUGE_PAGE || size > SIZE_MAX - 2 * HUGE_PAGE) return malloc(size);
    size_t rounded = (size + 32 + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE - 32;
    char *memory = malloc(rounded);
    size_t before = (uintptr_t)memory % (size_t)sysconf(_SC_PAGESIZE);
    if (memory) madvise(memory - before, rounded + before, MADV_HUGEPAGE); /* advice only */
    return memory;
}

static void os_keep_from_children(void *memory, size_t size) {
    (void)madvise(memory, whole_pages(size), MADV_DONTFORK);
}

static void os_unmap(void *memory, size_t size) {
    if (memory) munmap(memory, whole_pages(size));
}

/* ---- What is in memory, and reading past it ------------------------------------------------------ */

#define ZFS_MAGIC 0x2fc12fc1
#ifndef SYS_cachestat
#define SYS_cachestat 451 /* on every architecture */
#endif

static int os_open_again(int fd, const char *path, int direct) {
    char link[32];
    int flags = O_RDONLY | O_CLOEXEC | O_NOCTTY | (direct ? O_DIRECT : 0);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = open(link, flags);
    if (again < 0 && errno == ENOENT) { /* no /proc; what the path is now may well be a FIFO */
        again = open(path, flags | O_NONBLOCK);
        if (again >= 0) fcntl(again, F_SETFL, direct ? O_DIRECT : 0);
    }
    return again < 0 ? -errno : again;
}

static int os_file_system(int fd, fst_file_system *out) {
    struct statfs st;
    if (fstatfs(fd, &st)) return -errno;
    switch ((unsigned long)st.f_type) {
    case TMPFS_MAGIC:
    case RAMFS_MAGIC:
    case HUGETLBFS_MAGIC: *out = FST_FS_MEMORY; break;
    case OVERLAYFS_SUPER_MAGIC: *out = FST_FS_OVERLAY; break;
    case ZFS_MAGIC: *out = FST_FS_OWN_CACHE; break;
    default: *out = FST_FS_OTHER;
    }
    return 0;
}

static int os_direct_alignment(int fd, uint32_t *memory, uint32_t *offset) {
#ifdef STATX_DIOALIGN
    struct statx st;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st)) return -errno;
    if (!(st.stx_mask & STATX_DIOALIGN)) return -ENOSYS;
    *memory = st.stx_dio_mem_align;
    *offset = st.stx_dio_offset_align;
    return 0;
#else
    (void)fd, (void)memory, (void)offset;
    return -ENOSYS;
#endif
}

#define NOBODY 65534 /* owners that a user namespace has no number for */

/* To everybody else mincore says that all is in memory, and cachestat nothing. */
static int os_is_owner(int fd) {
    struct stat st;
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};
    if (fstat(fd, &st)) return -errno;
    if (st.st_uid == geteuid()) return 1;
    if (st.st_uid == NOBODY || st.st_gid == NOBODY) return 0;
    if (syscall(SYS_capget, &head, data)) return 0;
    return (data[CAP_TO_INDEX(CAP_FOWNER)].effective & CAP_TO_MASK(CAP_FOWNER)) != 0;
}

static int os_cachestat(int fd, uint64_t offset, uint64_t size, uint64_t *pages) {
    struct {
        uint64_t offset, size;
    } range = {offset, size};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } counts = {0};
    if (syscall(SYS_cachestat, fd, &range, &counts, 0)) return -errno;
    *pages = counts.cached;
    return 0;
}

static void *os_map_file(int fd, size_t size) {
    void *memory = size ? mmap(NULL, size, PROT_NONE, MAP_SHARED, fd, 0) : MAP_FAILED;
    return memory == MAP_FAILED ? NULL : memory;
}

static int os_mincore(void *memory, size_t size, unsigned char *pages) {
    return mincore(memory, size, pages) ? -errno : 0;
}

static ssize_t os_pread_cached(int fd, void *buffer, size_t size, uint64_t offset) {
    struct iovec part = {buffer, size};
    ssize_t got = preadv2(fd, &part, 1, (off_t)offset, RWF_NOWAIT);
    return got < 0 ? -errno : got;
}

static int os_advise(int fd, uint64_t offset, uint64_t size, fst_advice advice) {
    int what = advice == FST_ADVICE_WILLNEED ? POSIX_FADV_WILLNEED
               : advice == FST_ADVICE_RANDOM ? POSIX_FADV_RANDOM
                                             : POSIX_FADV_DONTNEED;
    return -posix_fadvise(fd, (off_t)offset, (off_t)size, what);
}

/* ---- The machine --------------------------------------------------------------------------------- */

static ssize_t os_read_text(const char *path, char *out, size_t size) {
    size_t length = 0;
    ssize_t got = 1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -errno;
    while (got > 0 && length < size - 1) {
        got = read(fd, out + length, size - 1 - length);
        if (got < 0 && errno == EINTR) got = 1;
        else if (got > 0) length += (size_t)got;
    }
    int code = got < 0 ? -errno : 0;
    close(fd);
    out[length] = 0;
    return code ? code : (ssize_t)length;
}

static uint64_t os_memory_available(void) {
    static const char key[] = "\nMemAvailable:";
    char text[1024];
    if (fst_os_calls.read_text("/proc/meminfo", text, sizeof text) < 0) return 0;
    const char *line = strstr(text, key);
    return line ? strtoull(line + sizeof key - 1, NULL, 10) * 1024 : 0;
}

static int os_pci_node(const char *address) {
    char path[96] = "/sys/bus/pci/devices/", text[32];
    size_t at = strlen(path), length = strlen(address);
    if (length == 0 || length > 32) return -1;
    for (size_t i = 0; i < length; i++) { /* drivers write the same address with capitals */
        char c = address[i];
        if (c >= 'A' && c <= 'F') c = (char)(c - 'A' + 'a');
        if (!strchr("0123456789abcdef:.", c)) return -1;
        path[at + i] = c;
    }
    strcpy(path + at + length, "/numa_node");
    if (fst_os_calls.read_text(path, text, sizeof text) <= 0) return -1;
    char *end;
    long node = strtol(text, &end, 10);
    return end == text || node < 0 || node > 1023 ? -1 : (int)node;
}

static int cpu_number(const char **at, unsigned long *out) {
    char *end;
    if (**at < '0' || **at > '9') return 0;
    *out = strtoul(*at, &end, 10);
    *at = end;
    return *out < FST_MAX_CPUS;
}

int fst_os_cpu_list(const char *text, fst_cpus *out) {
    const size_t word = 8 * sizeof *out->bits;
    memset(out, 0, sizeof *out);
    if (*text == '\n' || !*text) return 0; /* a node with memory alone */
    for (;; text++) {
        unsigned long first, last;
        if (!cpu_number(&text, &first)) return -EINVAL;
        last = first;
        if (*text == '-' && (text++, !cpu_number(&text, &last) || last < first)) return -EINVAL;
        for (; first <= last; first++) out->bits[first / word] |= 1ul << first % word;
        if (*text != ',') return *text == '\n' || !*text ? 0 : -EINVAL;
    }
}

static int os_get_affinity(fst_cpus *out) {
    memset(out, 0, sizeof *out); /* the kernel writes as much as it has */
    return syscall(SYS_sched_getaffinity, 0, sizeof out->bits, out->bits) < 0 ? -errno : 0;
}

static int os_set_affinity(const fst_cpus *cpus) {
    return syscall(SYS_sched_setaffinity, 0, sizeof cpus->bits, cpus->bits) ? -errno : 0;
}

static int os_run_on_node(int node) {
    fst_cpus mine, its;
    char path[64], text[4096];
    unsigned long any = 0;
    snprintf(path, sizeof path, "/sys/devices/system/node/node%d/cpulist", node);
    ssize_t got = fst_os_calls.read_text(path, text, sizeof text);
    int code = got < 0 ? (int)got : fst_os_cpu_list(text, &its);
    if (!code) code = fst_os_calls.get_affinity(&mine);
    if (code) return code;
    for (size_t i = 0; i < sizeof mine.bits / sizeof *mine.bits; i++) any |= its.bits[i] &= mine.bits[i];
    if (!any) return -ENOENT;
    return memcmp(&its, &mine, sizeof mine) ? fst_os_calls.set_affinity(&its) : 0;
}

static int first_cpu(void) {
    fst_cpus mine;
    const size_t word = 8 * sizeof *mine.bits;
    if (fst_os_calls.get_affinity(&mine)) return 0;
    for (size_t i = 0; i < FST_MAX_CPUS; i++)
        if (mine.bits[i / word] >> i % word & 1) return (int)i;
    return 0;
}

static size_t os_cache_bytes(void) {
    int cpu = first_cpu(), last = 0;
    size_t bytes = 0;
    for (int i = 0; i < 16; i++) {
        char path[96], text[32], *unit;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cache/index%d/level", cpu, i);
        if (fst_os_calls.read_text(path, text, sizeof text) <= 0) break;
        int level = atoi(text);
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cache/index%d/size", cpu, i);
        if (level <= last || fst_os_calls.read_text(path, text, sizeof text) <= 0) continue;
        last = level;
        bytes = strtoull(text, &unit, 10);
        bytes <<= *unit == 'K' ? 10 : *unit == 'M' ? 20 : 0;
    }
    return bytes;
}

/* By the system call: libnuma's own functions may print, and need the library. Preferred, not bound: a full node is no
 * reason to be killed. */
static int os_bind_memory(void *memory, size_t size, int node) {
    unsigned long nodes[1024 / (8 * sizeof(long))] = {0};
    const size_t word = 8 * sizeof *nodes;
    if (node < 0 || (size_t)node >= sizeof nodes * 8 - 1) return -EINVAL;
    nodes[(size_t)node / word] = 1ul << (size_t)node % word;
    return syscall(SYS_mbind, memory, size, MPOL_PREFERRED, nodes, sizeof nodes * 8, 0) ? -errno : 0;
}

/* ---- io_uring ------------------------------------------------------------------------------------ */

static int os_uring_open(unsigned depth, fst_uring **out) {
    fst_uring *uring = calloc(1, sizeof *uring);
    if (!uring) return -ENOMEM;
    int code = io_uring_queue_init(depth, uring, 0);
    if (code) free(uring);
    else *out = uring;
    return code;
}

static void os_uring_close(fst_uring *uring) {
    io_uring_queue_exit(uring);
    free(uring);
}

static int os_uring_buffers(fst_uring *uring, const struct iovec *buffers, unsigned count) {
    return io_uring_register_buffers(uring, buffers, count);
}

static int os_uring_files(fst_uring *uring, unsigned count) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur < count)
        return -EMFILE; /* liburing would raise it */
    int *none = malloc(count * sizeof *none);
    if (!none) return -ENOMEM;
    for (unsigned i = 0; i < count; i++) none[i] = -1;
    int code = io_uring_register_files(uring, none, count);
    free(none);
    return code;
}

static int os_uring_file(fst_uring *uring, unsigned place, int fd) {
    int code = io_uring_register_files_update(uring, place, &fd, 1);
    return code < 0 ? code : 0;
}

static int os_uring_read(fst_uring *uring, const fst_uring_read *read) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(uring);
    if (!sqe) return -EBUSY;
    unsigned size = (unsigned)read->nbytes;
    if (read->buffer >= 0)
        io_uring_prep_read_fixed(sqe, read->fd, read->data, size, read->offset, read->buffer);
    else io_uring_prep_read(sqe, read->fd, read->data, size, read->offset);
    if (read->fixed) io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    sqe->user_data = read->tag;
    int code = io_uring_submit(uring);
    return code < 0 ? code : code == 1 ? 0 : -EAGAIN;
}

static int os_uring_wait(fst_uring *uring, uint64_t *tag, int *result) {
    struct io_uring_cqe *cqe;
    int code = io_uring_wait_cqe(uring, &cqe);
    if (code) return code;
    *tag = cqe->user_data;
    *result = cqe->res;
    io_uring_cqe_seen(uring, cqe);
    return 0;
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
    .create = os_create,
    .make_directory = os_make_directory,
    .remove_directory = os_remove_directory,
    .real_path = os_real_path,
    .lock = os_lock,
    .map = os_map,
    .unmap = os_unmap,
    .keep_from_children = os_keep_from_children,
    .open_again = os_open_again,
    .file_system = os_file_system,
    .direct_alignment = os_direct_alignment,
    .is_owner = os_is_owner,
    .cachestat = os_cachestat,
    .map_file = os_map_file,
    .mincore = os_mincore,
    .pread_cached = os_pread_cached,
    .advise = os_advise,
    .read_text = os_read_text,
    .memory_available = os_memory_available,
    .pci_node = os_pci_node,
    .cache_bytes = os_cache_bytes,
    .get_affinity = os_get_affinity,
    .set_affinity = os_set_affinity,
    .run_on_node = os_run_on_node,
    .bind_memory = os_bind_memory,
    .uring_open = os_uring_open,
    .uring_close = os_uring_close,
    .uring_buffers = os_uring_buffers,
    .uring_files = os_uring_files,
    .uring_file = os_uring_file,
    .uring_read = os_uring_read,
    .uring_wait = os_uring_wait,
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
