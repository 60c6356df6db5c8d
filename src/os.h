/* Seam 1: every system call on files, behind a table of functions, so that tests can make the Nth one
 * fail, return short, or change the file. Results are as the calls': >= 0, or a negative errno. */
#ifndef FST_OS_H
#define FST_OS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef struct fst_file_id { /* what must be the same after a load as before it */
    uint64_t device, inode, size, links;
    int64_t  mtime_ns, ctime_ns;
} fst_file_id;

typedef enum fst_file_type { FST_FILE_REGULAR, FST_FILE_DIRECTORY, FST_FILE_OTHER } fst_file_type;

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
    /* Memory by the page; `size` is rounded up. NULL when there is none. Asks for huge pages. */
    void *(*map)(size_t size);
    void (*unmap)(void *memory, size_t size);
} fst_os;

/* The table in use. Tests replace its entries, in one thread, between loads. */
extern fst_os fst_os_calls;

/* Reads all of [offset, offset + size): retries -EINTR and short reads. The bytes read, fewer than
 * `size` only at the end of the file, or a negative errno. */
ssize_t fst_os_read_all(int fd, void *buffer, size_t size, uint64_t offset);

/* Writes all; 0 or a negative errno. */
int fst_os_write_all(int fd, const void *buffer, size_t size, uint64_t offset);

/* Seconds of a clock that only goes forward. */
double fst_os_now(void);

/* CPUs that the calling thread may run on. */
unsigned fst_os_cpus(void);

#endif
