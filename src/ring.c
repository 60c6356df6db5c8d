#include "ring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "os.h"

#define PAGE 4096u
#define MAX_FILES 64u /* that are registered at one time */
#define MAX_AGAIN 3u  /* -EAGAIN in a row: pread waits where io_uring does not */
#define MAX_WAITS 3u  /* attempts to wait for what is in flight in a broken ring */

typedef enum state { FREE, IN_FLIGHT, DONE } state;

typedef struct request {
    fst_ring_read read;
    state state;
    int buffer;
    unsigned again; /* times in a row that it was refused */
    size_t done;
    ssize_t result; /* DONE */
} request;

struct fst_ring {
    fst_uring *uring;
    const struct iovec *slots; /* registered ones, a copy behind the requests */
    unsigned slots_count;
    unsigned files_count; /* places of the registered table */
    int files[MAX_FILES]; /* the descriptors in it, -1: none */
    uint64_t load;        /* that they belong to */
    int broken;           /* the negative errno of a failed wait */
    int closed;           /* a submission failed: none any more */
    unsigned depth, busy; /* busy: not FREE */
    request requests[];
};

static const char *refusal(int code) {
    switch (code) {
    case -EPERM: return "io_uring is not permitted (EPERM)";
    case -ENOSYS: return "the kernel has no io_uring (ENOSYS)";
    case -EINVAL: return "the kernel's io_uring is too old (EINVAL)";
    case -ENOMEM: return "no memory for io_uring (ENOMEM)";
    default: return "io_uring cannot be set up";
    }
}

static const char *buffers_refusal(int code) {
    switch (code) {
    case -ENOMEM: return "io_uring without registered buffers: RLIMIT_MEMLOCK is too small (ENOMEM)";
    case -EOPNOTSUPP: return "io_uring without registered buffers: not this kind of memory (EOPNOTSUPP)";
    default: return "io_uring without registered buffers: the kernel refused them";
    }
}

int fst_ring_new(unsigned depth, const struct iovec *slots, unsigned count, fst_ring **out,
                 const char **why) {
    size_t requests = depth * sizeof(request);
    fst_ring *ring = calloc(1, sizeof *ring + requests + count * sizeof *slots);
    int code = ring ? fst_os_calls.uring_open(depth, &ring->uring) : -ENOMEM;
    *out = NULL;
    *why = NULL;
    if (code) {
        *why = refusal(code);
        free(ring);
        return code;
    }
    ring->depth = depth;
    code = count ? fst_os_calls.uring_buffers(ring->uring, slots, count) : 0;
    if (code) {
        *why = buffers_refusal(code);
    } else if (count) {
        ring->slots = memcpy((char *)ring->requests + requests, slots, count * sizeof *slots);
        ring->slots_count = count;
    }
    if (fst_os_calls.uring_files(ring->uring, MAX_FILES) == 0) ring->files_count = MAX_FILES;
    for (unsigned i = 0; i < MAX_FILES; i++) ring->files[i] = -1;
    *out = ring;
    return 0;
}

void fst_ring_free(fst_ring *ring) {
    fst_ring_read read;
    ssize_t result;
    if (!ring) return;
    for (unsigned i = 0; i < MAX_WAITS; i++, ring->broken = 0)
        while (fst_ring_wait(ring, &read, &result) == 0) continue;
    fst_os_calls.uring_close(ring->uring);
    free(ring);
}

unsigned fst_ring_in_flight(const fst_ring *ring) { return ring->busy; }

/* ---- What is registered -------------------------------------------------------------------------- */

static int buffer_of(const fst_ring *ring, const fst_ring_read *read) {
    uintptr_t at = (uintptr_t)read->data;
    for (unsigned i = 0; i < ring->slots_count; i++) {
        uintptr_t start = (uintptr_t)ring->slots[i].iov_base;
        if (at >= start && at - start <= ring->slots[i].iov_len &&
            read->nbytes <= ring->slots[i].iov_len - (at - start))
            return (int)i;
    }
    return -1;
}

/* The file's place in the table, put there at its first read; -1: none. */
static int place_of(fst_ring *ring, const fst_ring_read *read) {
    if (ring->files_count == 0) return -1;
    unsigned place = (2 * read->file + (read->direct != 0)) % ring->files_count;
    if (ring->files[place] == read->fd) return (int)place;
    if (fst_os_calls.uring_file(ring->uring, place, read->fd)) {
        ring->files_count = 0; /* what is in the table stays there till the ring forgets */
        return -1;
    }
    ring->files[place] = read->fd;
    return (int)place;
}

void fst_ring_forget(fst_ring *ring) {
    for (unsigned i = 0; i < MAX_FILES; i++) {
        if (ring->files[i] >= 0 && fst_os_calls.uring_file(ring->uring, i, -1)) ring->closed = 1;
        ring->files[i] = -1;
    }
}

/* ---- Reads --------------------------------------------------------------------------------------- */

static void finish(request *r, ssize_t result) {
    r->state = DONE;
    r->result = result;
}

/* What is left, without the ring. */
static void read_here(request *r) {
    const fst_ring_read *read = &r->read;
    while (r->done < read->nbytes) {
        ssize_t got = fst_os_calls.pread(read->fd, (char *)read->data + r->done, read->nbytes - r->done,
                                         read->offset + r->done);
        if (got == -EINTR) continue;
        if (got < 0) {
            finish(r, got);
            return;
        }
        r->done += (size_t)got;
        if (got == 0 || (read->direct && r->done % PAGE)) break;
    }
    finish(r, (ssize_t)r->done);
}

static void submit(fst_ring *ring, request *r) {
    int place = ring->closed ? -1 : place_of(ring, &r->read);
    fst_uring_read read = {
        .tag = (uint64_t)(r - ring->requests),
        .fd = place < 0 ? r->read.fd : place,
        .fixed = place >= 0,
        .buffer = r->buffer,
        .data = (char *)r->read.data + r->done,
        .nbytes = r->read.nbytes - r->done,
        .offset = r->read.offset + r->done,
    };
    r->state = IN_FLIGHT;
    if (!ring->closed && fst_os_calls.uring_read(ring->uring, &read)) ring->closed = 1;
    if (ring->closed) read_here(r);
}

int fst_ring_submit(fst_ring *ring, const fst_ring_read *read) {
    request *r = ring->requests;
    if (ring->busy == ring->depth) return -EBUSY;
    if (ring->load != read->load) fst_ring_forget(ring);
    ring->load = read->load;
    while (r->state != FREE) r++;
    *r = (request){.read = *read, .buffer = buffer_of(ring, read)};
    ring->busy++;
    submit(ring, r);
    return 0;
}

/* What the kernel said of a request: it is done, or goes on. */
static void take(fst_ring *ring, request *r, int result) {
    if (result == -EINTR || result == -EAGAIN) {
        if (++r->again < MAX_AGAIN) submit(ring, r);
        else read_here(r);
        return;
    }
    if (result < 0) {
        finish(r, result);
        return;
    }
    r->again = 0;
    r->done += (size_t)result;
    int ended = result == 0 || r->done >= r->read.nbytes;
    if (ended || (r->read.direct && r->done % PAGE)) finish(r, (ssize_t)r->done);
    else submit(ring, r);
}

static request *find_done(fst_ring *ring) {
    for (unsigned i = 0; i < ring->depth; i++)
        if (ring->requests[i].state == DONE) return &ring->requests[i];
    return NULL;
}

int fst_ring_wait(fst_ring *ring, fst_ring_read *read, ssize_t *result) {
    request *r;
    if (ring->busy == 0) return -ENOENT;
    while (!(r = find_done(ring))) {
        uint64_t tag;
        int got, code = ring->broken ? ring->broken : fst_os_calls.uring_wait(ring->uring, &tag, &got);
        if (code == -EINTR) continue;
        if (code) return ring->broken = code;
        if (tag < ring->depth && ring->requests[tag].state == IN_FLIGHT)
            take(ring, &ring->requests[tag], got);
    }
    *read = r->read;
    *result = r->result;
    r->state = FREE;
    ring->busy--;
    return 0;
}
