/* What several test files need: checkpoints to load, devices and system calls that misbehave, counts. */
#ifndef FST_TESTS_SUPPORT_H
#define FST_TESTS_SUPPORT_H

#include "fst.h"
#include "gpu.h"
#include "os.h"

/* ---- Files ---- */

void support_write(const char *path, const void *data, size_t size);

typedef struct support_tensor {
    const char *name, *dtype, *shape; /* shape as JSON: "[2,3]" */
    const void *data;
    size_t      nbytes;
} support_tensor;

/* A checkpoint with these tensors in this order. The header is padded with `padding` spaces, so that data
 * starts where a test wants it. `metadata` is JSON or NULL. Returns where the data starts. */
size_t support_checkpoint(const char *path, const char *metadata, const support_tensor *tensors, size_t count,
                          size_t padding);

/* `count` bytes that look random, by seed. */
void support_random(void *data, size_t count, uint64_t seed);

/* Folders of FST_TEST_DATA: checkpoints that formats' own libraries wrote, and what these make of them. */
#define SUPPORT_LIBRARIES 35
extern const char *const support_libraries[SUPPORT_LIBRARIES];

/* ---- Loads ---- */

/* A file list of one, valid until the next call. */
const char *const *support_list(const char *path);

/* Some threads with small slots, so that small files are many chunks. */
fst_options support_options(int device);

/* ---- What is held ---- */

unsigned support_open_descriptors(void);
unsigned support_threads(void);

/* ---- A device that runs late ---- */

/* GPU 0 of the tests: device memory is host memory, but streams are queues that run when somebody waits
 * for them, or a bit, out of order with one another, by `seed`. What the pipeline does not wait for has
 * not happened. It takes the place of GPU 0 until fake_gpu_end. */
typedef struct fake_gpu_options {
    uint64_t seed;
    int      fail_at;       /* the so-manieth call that can fail does, from 1; 0: none */
    int      refuse_to_pin;
    int      pins_at_most; /* more are refused; 0: none are */
    uint64_t memory;        /* device memory in all; 0: no limit */
} fake_gpu_options;

void fake_gpu_begin(const fake_gpu_options *options);
/* Takes it away; fails the case when anything is still held on it. */
void fake_gpu_end(void);
int  fake_gpu_calls(void);       /* that could fail, so far */
uint64_t fake_gpu_peak(void);    /* most device memory at one time */
int  fake_gpu_blocks(void);      /* blocks that are allocated now */
uint64_t fake_gpu_kept(void);    /* freed and not yet given back */
int  fake_gpu_pins(void);        /* pieces of memory that are pinned now */

/* ---- System calls that fail (fake_os.c) ---- */

typedef enum fake_os_kind {
    FAKE_OS_NEEDED, /* a load fails without them: open_read, identify, pread, map */
    FAKE_OS_OPEN_DIRECT,
    FAKE_OS_OPEN_PROBE,
    FAKE_OS_PREAD_DIRECT, /* on a descriptor of O_DIRECT; they count as needed, too */
    FAKE_OS_FILE_SYSTEM,
    FAKE_OS_ALIGNMENT,
    FAKE_OS_IS_OWNER,
    FAKE_OS_CACHESTAT,
    FAKE_OS_MAP_FILE,
    FAKE_OS_MINCORE,
    FAKE_OS_PREAD_CACHED,
    FAKE_OS_ADVISE,
    FAKE_OS_MEMORY,
    FAKE_OS_READ_TEXT,
    FAKE_OS_SET_AFFINITY,
    FAKE_OS_BIND_MEMORY,
    FAKE_OS_URING_OPEN,
    FAKE_OS_URING_BUFFERS,
    FAKE_OS_URING_FILES,
    FAKE_OS_URING_FILE,
    FAKE_OS_URING_READ,
    FAKE_OS_URING_WAIT,
    FAKE_OS_URING_RESULT, /* what the kernel says of a read that was waited for */
    FAKE_OS_KINDS
} fake_os_kind;

typedef struct fake_os_options {
    int  fail_at;        /* the so-manieth call of this kind fails, from 1; 0: none */
    fake_os_kind kind;
    int  error;          /* with this errno (as a positive number) */
    unsigned refuse;     /* kinds, as bits 1u << kind, of which every call fails... */
    int  refusal;        /* ...with this errno */
    int  short_reads;    /* reads return at most 1 to 4096 bytes, and every third is -EINTR */
    uint64_t after;      /* bytes read before `hook` is called, once, in a reader's thread */
    void (*hook)(void);
    int  system;         /* files lie on this fst_file_system + 1; 0: where they do */
    int  stranger;       /* files are another owner's */
    int  replaced;       /* a file opened for O_DIRECT is not the same any more */
    int  no_readahead;   /* the advice that something will be needed fails */
    int  alignment;      /* for O_DIRECT; -1: there is none; 0: as it is */
    uint64_t memory;     /* that is available; 0: as it is */
    const char *const *texts; /* path, contents, path, ..., NULL: all that /proc and /sys have */
} fake_os_options;

void fake_os_begin(const fake_os_options *options);
/* The real calls again; fails the case when a descriptor, a mapping or a ring is still held. */
void fake_os_end(void);
int  fake_os_calls(void);                     /* of FAKE_OS_NEEDED, so far */
int  fake_os_calls_of(fake_os_kind kind);

#endif
