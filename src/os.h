/* Seam 1: every system call, behind a table of functions, so that tests can make the Nth one fail,
 * return short, change the file, or describe another machine. Results are as the calls': >= 0, or a
 * negative errno. */
#ifndef FST_OS_H
#define FST_OS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct iovec;

typedef struct fst_file_id { /* what must be the same after a load as before it */
    uint64_t device, inode, size, links;
    int64_t  mtime_ns, ctime_ns;
} fst_file_id;

typedef enum fst_file_type { FST_FILE_REGULAR, FST_FILE_DIRECTORY, FST_FILE_OTHER } fst_file_type;

typedef enum fst_file_system {
    FST_FS_OTHER,
    FST_FS_MEMORY,   /* tmpfs, ramfs, hugetlbfs: always in memory */
    FST_FS_OVERLAY,  /* its files have their pages in the file system below */
    FST_FS_OWN_CACHE /* ZFS: the page cache says nothing */
} fst_file_system;

typedef enum fst_advice { FST_ADVICE_WILLNEED, FST_ADVICE_RANDOM, FST_ADVICE_DONTNEED } fst_advice;

#define FST_MAX_CPUS 8192
typedef struct fst_cpus { /* a set of CPUs */
    unsigned long bits[FST_MAX_CPUS / (8 * sizeof(long))];
} fst_cpus;

typedef struct io_uring fst_uring;

typedef struct fst_uring_read {
    uint64_t tag;
    int      fd;     /* a descriptor, or its place in the registered table when `fixed` */
    int      fixed;
    int      buffer; /* which registered one `data` lies in; -1: none */
    void    *data;
    size_t   nbytes;
    uint64_t offset;
} fst_uring_read;

typedef struct fst_os {
    /* Read-only, close-on-exec, never blocking on a FIFO. A descriptor. */
    int (*open_read)(const char *path);
    int (*close)(int fd);
    int (*identify)(int fd, fst_file_id *id, fst_file_type *type);
    /* One system call: may be short, may be -EINTR. 0 is the end of the file. */
    ssize_t (*pread)(int fd, void *buffer, size_t size, uint64_t offset);
    /* The names in a directory, sorted, NULL-terminated, in one malloc'ed block. */
    int (*list)(const char *path, char ***names);
    /* What path is, links followed. */
    int (*stat_type)(const char *path, fst_file_type *type);
    /* A new file beside `path` for writing, under a temporary name that is put into `name`. */
    int (*create_temporary)(const char *path, char *name, size_t size);
    ssize_t (*pwrite)(int fd, const void *buffer, size_t size, uint64_t offset);
    int (*fsync)(int fd);
    int (*rename)(const char *from, const char *to);  /* and syncs the directory */
    int (*unlink)(const char *path);
    /* A file for writing: a new one, or the one of this name, emptied. Links are not followed. */
    int (*create)(const char *path);
    int (*make_directory)(const char *path);
    int (*remove_directory)(const char *path);
    /* Where a path leads to, all links followed, into PATH_MAX bytes. */
    int (*real_path)(const char *path, char *out);
    /* Nobody else's until it is closed; -EWOULDBLOCK when it is already. */
    int (*lock)(int fd);
    /* Memory by the page; `size` is rounded up. NULL when there is none. Asks for huge pages. */
    void *(*map)(size_t size);
    void (*unmap)(void *memory, size_t size);
    /* A child of a fork does not get these pages: they stay where a device finds them. */
    void (*keep_from_children)(void *memory, size_t size);

    /* Another descriptor, with a position, flags and readahead of its own, of the file that `fd` is open on: by
     * /proc/self/fd, else by path, which may have become another file. `direct`: O_DIRECT. */
    int (*open_again)(int fd, const char *path, int direct);
    int (*file_system)(int fd, fst_file_system *out);
    /* Alignment of address and offset for O_DIRECT; 0 and 0 where the file has no O_DIRECT. -ENOSYS when the kernel
     * does not know. */
    int (*direct_alignment)(int fd, uint32_t *memory, uint32_t *offset);
    /* 1 when the kernel tells the caller what of this file is in memory: its owner, or CAP_FOWNER. 0 otherwise. */
    int (*is_owner)(int fd);
    /* Pages of [offset, offset + size) that are in the page cache. */
    int (*cachestat)(int fd, uint64_t offset, uint64_t size, uint64_t *pages);
    /* A file's first `size` bytes, for mincore alone: to touch them is a SIGBUS when the file is cut short. NULL when
     * there is no room. `unmap` takes it back. */
    void *(*map_file)(int fd, size_t size);
    /* A byte for each page; its lowest bit says whether the page is in memory. */
    int (*mincore)(void *memory, size_t size, unsigned char *pages);
    /* pread of what is in memory: -EAGAIN when that is nothing. */
    ssize_t (*pread_cached)(int fd, void *buffer, size_t size, uint64_t offset);
    int (*advise)(int fd, uint64_t offset, uint64_t size, fst_advice advice);

    /* A small file of /proc or /sys as a string, cut to `size` - 1 bytes. Its length. */
    ssize_t (*read_text)(const char *path, char *out, size_t size);
    /* Bytes that programs can have without swapping; 0 when not known. */
    uint64_t (*memory_available)(void);
    /* The NUMA node of a PCI device ("0000:17:00.0"); -1: any. */
    int (*pci_node)(const char *address);
    /* Bytes of the last-level cache of the first CPU that the thread may run on; 0 when not known. */
    size_t (*cache_bytes)(void);
    /* The calling thread's. */
    int (*get_affinity)(fst_cpus *out);
    int (*set_affinity)(const fst_cpus *cpus);
    /* Keeps the calling thread on those of its CPUs that are a node's. -ENOENT when there are none: nothing changes. */
    int (*run_on_node)(int node);
    /* Untouched pages of [memory, memory + size) come from that node as long as it has any. */
    int (*bind_memory)(void *memory, size_t size, int node);

    /* io_uring. One thread at a time may use one. */
    int (*uring_open)(unsigned depth, fst_uring **out);
    void (*uring_close)(fst_uring *uring); /* nothing may be in flight */
    int (*uring_buffers)(fst_uring *uring, const struct iovec *buffers, unsigned count);
    int (*uring_files)(fst_uring *uring, unsigned count); /* a table with so many places, all empty */
    int (*uring_file)(fst_uring *uring, unsigned place, int fd); /* puts one there; -1 takes it away */
    /* Queues and submits one read. After a failure it may be under way or not: the ring can only be waited for. */
    int (*uring_read)(fst_uring *uring, const fst_uring_read *read);
    /* Waits for one. 0, with *result as pread's. */
    int (*uring_wait)(fst_uring *uring, uint64_t *tag, int *result);
} fst_os;

/* The table in use. Tests replace its entries, in one thread, between loads. */
extern fst_os fst_os_calls;

/* Reads all of [offset, offset + size): retries -EINTR and short reads. The bytes read, fewer than
 * `size` only at the end of the file, or a negative errno. */
ssize_t fst_os_read_all(int fd, void *buffer, size_t size, uint64_t offset);

/* Writes all; 0 or a negative errno. */
int fst_os_write_all(int fd, const void *buffer, size_t size, uint64_t offset);

/* malloc for arrays that may be large: those ask for huge pages, as each page costs a fault when it is first touched. What
 * free() takes. */
void *fst_os_array(size_t size);

/* Seconds of a clock that only goes forward. */
double fst_os_now(void);

/* CPUs that the calling thread may run on. */
unsigned fst_os_cpus(void);

/* The set that a list of sysfs ("0-3,8") names. 0, or -EINVAL for what is no list. */
int fst_os_cpu_list(const char *text, fst_cpus *out);

#endif
