/* An io_uring for one reader thread. It is kept for as long as the thread, and never fails a load: where the kernel
 * refuses a submission, the read is done by pread. */
#ifndef FST_RING_H
#define FST_RING_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef struct fst_ring fst_ring;

typedef struct fst_ring_read {
    uint64_t tag;    /* the caller's */
    uint64_t load;   /* another than before: the ring first forgets the files of that one */
    unsigned file;   /* which of the load's: its descriptor is registered under this number... */
    int      direct; /* ...and one for O_DIRECT: offset, data and nbytes are whole pages */
    int      fd;
    void    *data;
    size_t   nbytes;
    uint64_t offset;
    size_t   skip, wanted; /* the caller's: bytes [skip, skip + wanted) are what it is about */
    unsigned note;         /* likewise */
} fst_ring_read;

/* `depth`: reads in flight at one time. `slots` lie where most of the data goes: they are registered, if the kernel
 * agrees. 0; or a negative errno, and *out is NULL. *why is what was refused (static text), or NULL. */
int fst_ring_new(unsigned depth, const struct iovec *slots, unsigned count, fst_ring **out, const char **why);
/* Waits for what is in flight. NULL is allowed. */
void fst_ring_free(fst_ring *ring);

/* Begins a read; what cannot be submitted is read at once. Always accepted while fewer than `depth` are in flight, else -EBUSY. */
int fst_ring_submit(fst_ring *ring, const fst_ring_read *read);
/* Waits for the next to be done. Short ones were continued, interrupted ones repeated: *result is `nbytes`, less at
 * the end of the file, or a negative errno. With `direct` it is also less behind a short read that ended inside a
 * page. -ENOENT when nothing is in flight; another negative errno when the ring is broken: what was in flight may be
 * so for ever, and the ring is good for nothing but fst_ring_free. */
int fst_ring_wait(fst_ring *ring, fst_ring_read *read, ssize_t *result);
unsigned fst_ring_in_flight(const fst_ring *ring);

/* Lets go of the load's files, which would otherwise stay open. Nothing may be in flight. */
void fst_ring_forget(fst_ring *ring);

#endif
