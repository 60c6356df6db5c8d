/* Reads a load's files: each chunk in the way that suits it. What is in memory is copied from there; what is not is read
 * through the page cache, where the next load finds it, or past it, when there is no room for it.
 *
 * For each chunk: fst_reader_choose (or fst_reader_ahead, some chunks earlier), then a read. Any thread, any order. */
#ifndef FST_READER_H
#define FST_READER_H

#include "fst.h"
#include "os.h"
#include "ring.h"

typedef enum fst_how {
    FST_HOW_CACHED,   /* all of it is in memory: pread copies it */
    FST_HOW_BUFFERED, /* pread with deep readahead: it stays in memory */
    FST_HOW_DIRECT    /* O_DIRECT */
} fst_how;

typedef struct fst_reader_options {
    fst_reader_kind reader;
    fst_cache       cache;
    uint64_t host_bytes; /* memory that the load itself will take, so that it is no room for files */
} fst_reader_options;

typedef struct fst_range {
    uint32_t file;
    uint64_t offset, nbytes;
} fst_range;

typedef struct fst_reader fst_reader;

/* `fds`, `ids` and `paths` of `files` files, and the `count` parts of them that will be read (none: all of them), stay
 * the caller's and must stay valid. FST_E_MEMORY. */
fst_status fst_reader_new(const int *fds, const fst_file_id *ids, const char *const *paths, size_t files,
                          const fst_range *ranges, size_t count, const fst_reader_options *options,
                          fst_reader **out, fst_error *error);
/* NULL is allowed. Rings that read for it must have forgotten its files (fst_ring_forget). */
void fst_reader_free(fst_reader *reader);

/* Looks whether the chunk is in memory, and decides. */
fst_how fst_reader_choose(fst_reader *reader, size_t file, uint64_t offset, size_t nbytes);
/* Decides, too, and begins to read what will be read buffered: for a chunk that comes later. It is not to be chosen
 * again then: it would look as if it had been in memory all along. */
fst_how fst_reader_ahead(fst_reader *reader, size_t file, uint64_t offset, size_t nbytes);

/* The kernel begins to read what was to be read buffered. */
void fst_reader_advise(fst_reader *reader, size_t file, uint64_t offset, uint64_t nbytes);

/* Reads [offset, offset + nbytes). Byte `offset` lands at slot + offset % 4096; `slot` is aligned to 4096 and has room
 * for nbytes + 2 * 4096. A file system that refuses O_DIRECT is read buffered from then on, and *how says so. The bytes
 * read, fewer than nbytes only at the end of the file, or a negative errno. */
ssize_t fst_reader_read(fst_reader *reader, fst_how *how, size_t file, void *slot, uint64_t offset,
                        size_t nbytes);
/* Pieces of a file, perhaps at a distance from one another: one after the other to any address. As fst_reader_read, of all of their
 * bytes, but never with O_DIRECT: *how becomes FST_HOW_BUFFERED. */
typedef struct fst_segments {
    uint64_t offset, pitch, count;
    size_t   nbytes; /* of each */
} fst_segments;
ssize_t fst_reader_gather(fst_reader *reader, fst_how *how, size_t file, void *out,
                          const fst_segments *segments);

/* fst_reader_read through a ring, in two steps. -EBUSY when the ring is full. */
int fst_reader_submit(fst_reader *reader, fst_ring *ring, uint64_t tag, fst_how how, size_t file, void *slot,
                      uint64_t offset, size_t nbytes);
/* The next that is done: its tag, what fst_reader_read would have returned, and how it was read. 0, or as
 * fst_ring_wait. */
int fst_reader_wait(fst_reader *reader, fst_ring *ring, uint64_t *tag, ssize_t *result, fst_how *how);
/* Why a ring that was asked for is not there, or is without registered buffers: for the facts. Static text. */
void fst_reader_note_ring(fst_reader *reader, const char *why);

typedef struct fst_reader_facts {
    uint64_t cached, buffered, direct; /* bytes that were read */
    char     residency[192]; /* "cachestat"; "mincore (overlay), always (tmpfs)" */
    char     reader[256];    /* "threads: 13.5 GB are missing, 20.1 GB fit: buffered" */
} fst_reader_facts;
void fst_reader_describe(const fst_reader *reader, fst_reader_facts *out);

#endif
