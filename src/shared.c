/* Units of files that ranks read for one another. */
#include "shared.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "os.h"

#define WAIT_SECONDS 0.001 /* who waits for units has other things to see to so often */
enum { AHEAD = 4 };        /* own units that storage is at, the one that is read with them */

size_t fst_shared_unit = (size_t)4 << 20, fst_shared_part = (size_t)512 << 10;

static size_t unit_bytes(unsigned ranks, size_t chunk_bytes) {
    size_t least = (chunk_bytes / ranks + 4096) / 4096 * 4096;
    return least > fst_shared_unit ? least : fst_shared_unit;
}

uint64_t fst_shared_span(unsigned ranks, size_t chunk_bytes) {
    return (uint64_t)ranks * unit_bytes(ranks, chunk_bytes);
}

typedef struct unit {
    uint32_t file, index; /* bytes [index, index + 1) x fst_shared_unit of the file */
} unit;

/* A unit that is read, part by part, by whoever has the time. Under the lock. */
typedef struct reading {
    unsigned char *to;
    uint32_t file;
    fst_how how;
    uint64_t offset;
    size_t nbytes;
    size_t next, parts, done;
    size_t failed; /* the first part that did not come whole; SIZE_MAX: none, and */
    ssize_t got;   /* what came of it */
} reading;

struct fst_shared {
    fst_peers *peers;
    const fst_gpu *gpu;
    const fst_plan *plan;
    const fst_header *headers;
    const char *const *paths;
    fst_reader *reader;
    size_t files, size; /* of a unit */
    unsigned rank, ranks;
    uint64_t *first; /* unit of each file, and one behind the last */
    unsigned char *
        map; /* bits of units that are needed: of each rank, and in the end of all, in the first one's place */
    size_t map_bytes;
    unit *units;        /* those, in order */
    uint32_t *position; /* of each unit in that list */
    uint64_t count, rounds;
    uint32_t *chunks_left; /* of each round: own chunks that are not done with it */
    unsigned char *ring;   /* FST_SHARED_ROUNDS x ranks units: on the device, where the rest is on the host */
    unsigned char *own;    /* a GPU: FST_SHARED_ROUNDS own units, pinned if they can be */
    int own_is_pinned;
    fst_how hows[AHEAD]; /* how the next own units are read: looked at once, then storage is at them */
    uint64_t chosen;     /* rounds for which that is known */
    int has_ended;       /* no round is begun any more */
    fst_status failure;  /* what reading a unit came to, and */
    fst_error why;
    fst_status heard; /* of a rank that failed */
    fst_queue stream,
        copies; /* of rounds; of own units to the device. On the first, copies from memory that is not pinned would
                               * have this thread wait for the other ranks, past any time limit */
    fst_event copied; /* the last of them */
    uint64_t begun, bytes_read;
    pthread_mutex_t lock;
    pthread_cond_t came; /* a round; or a unit is to be read, or was */
    uint64_t done;       /* rounds that are there; under the lock, as is chunks_left */
    reading reading;
};

/* ---- Which units ------------------------------------------------------------------------------------ */

static fst_status no_memory(fst_error *error) {
    return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
}

/* The units that a chunk's bytes lie in. */
static void units_of(const fst_shared *s, const fst_plan_chunk *chunk, uint64_t *first, uint64_t *last) {
    const fst_plan_extent *extents = &s->plan->extents[chunk->first_extent],
                          *end = &extents[chunk->extents - 1];
    uint64_t stop = end->offset + (end->nbytes / end->segment - 1) * end->pitch + end->segment;
    *first = s->first[chunk->file] + chunk->offset / s->size;
    *last = s->first[chunk->file] + (stop - 1) / s->size;
}

static fst_status count_units(fst_shared *s, fst_error *error) {
    s->first = malloc((s->files + 1) * sizeof *s->first);
    if (!s->first) return no_memory(error);
    s->first[0] = 0;
    for (size_t i = 0; i < s->files; i++)
        s->first[i + 1] = s->first[i] + (s->headers[i].file_size + s->size - 1) / s->size;
    s->map_bytes = (s->first[s->files] + 7) / 8 + 1;
    s->map = s->first[s->files] < UINT32_MAX ? calloc(s->ranks, s->map_bytes) : NULL;
    return s->map ? FST_OK : no_memory(error);
}

static void mark_units(fst_shared *s) {
    unsigned char *mine = s->map + s->rank * s->map_bytes;
    for (size_t i = 0; i < s->plan->chunks_count; i++) {
        uint64_t first, last;
        if (s->plan->chunks[i].companions) continue;
        units_of(s, &s->plan->chunks[i], &first, &last);
        for (uint64_t u = first; u <= last; u++) mine[u / 8] |= (unsigned char)(1u << u % 8);
    }
}

/* The maps of all ranks, on the device if that is where rounds are. */
static fst_status gather_maps(fst_shared *s, fst_status mine, fst_error *error) {
    const fst_gpu *gpu = s->gpu;
    size_t all = s->ranks * s->map_bytes;
    void *device = NULL;
    int code = 0;
    if (!gpu->host_access) {
        code = gpu->calls->alloc_block(gpu, all, &device);
        if (!code)
            code = gpu->calls->to_device(gpu, s->stream, (char *)device + s->rank * s->map_bytes,
                                         s->map + s->rank * s->map_bytes, s->map_bytes);
        if (code && !mine) mine = fst_gpu_fail(error, gpu, code, "telling other ranks what is needed");
        if (!device) return mine;
    }
    fst_status status =
        fst_peers_begin(s->peers, device ? device : s->map, s->map_bytes, s->stream, mine, error);
    if (!status) status = fst_peers_finish(s->peers, error);
    if (device && !fst_peers_busy(s->peers)) {
        if (!status) code = gpu->calls->to_host(gpu, s->stream, s->map, device, all);
        if (!status && !code) code = gpu->calls->stream_wait(gpu, s->stream);
        if (!status && code) status = fst_gpu_fail(error, gpu, code, "hearing what other ranks need");
        gpu->calls->free_block(gpu, device, all);
    }
    return status;
}

static int is_needed(const fst_shared *s, uint64_t u) {
    for (unsigned r = 0; r < s->ranks; r++)
        if (s->map[r * s->map_bytes + u / 8] >> u % 8 & 1) return 1;
    return 0;
}

static fst_status list_units(fst_shared *s, fst_error *error) {
    const uint64_t all = s->first[s->files];
    s->units = malloc((all + 1) * sizeof *s->units);
    s->position = malloc((all + 1) * sizeof *s->position);
    if (!s->units || !s->position) return no_memory(error);
    for (uint32_t f = 0; f < s->files; f++)
        for (uint64_t u = s->first[f]; u < s->first[f + 1]; u++) {
            s->position[u] = (uint32_t)s->count;
            if (is_needed(s, u)) s->units[s->count++] = (unit){f, (uint32_t)(u - s->first[f])};
        }
    s->rounds = (s->count + s->ranks - 1) / s->ranks;
    s->chunks_left = calloc(s->rounds + 1, sizeof *s->chunks_left);
    if (!s->chunks_left) return no_memory(error);
    for (size_t i = 0; i < s->plan->chunks_count; i++) {
        uint64_t first, last;
        if (s->plan->chunks[i].companions) continue;
        units_of(s, &s->plan->chunks[i], &first, &last);
        for (uint64_t r = s->position[first] / s->ranks; r <= s->position[last] / s->ranks; r++)
            s->chunks_left[r]++;
    }
    return FST_OK;
}

/* ---- Memory --------------------------------------------------------------------------------------------- */

static uint64_t ring_bytes(const fst_shared *s) { return (uint64_t)FST_SHARED_ROUNDS * s->ranks * s->size; }

static fst_status make_ring(fst_shared *s, fst_error *error) {
    const fst_gpu *gpu = s->gpu;
    void *memory = NULL;
    if (gpu->host_access) {
        s->ring = fst_os_calls.map(ring_bytes(s));
        return s->ring ? FST_OK : no_memory(error);
    }
    int code = gpu->calls->alloc_block(gpu, ring_bytes(s), &memory);
    if (code) return fst_gpu_fail(error, gpu, code, "allocating memory for what ranks read for one another");
    s->ring = memory;
    s->own = fst_os_calls.map(FST_SHARED_ROUNDS * s->size);
    if (!s->own) return no_memory(error);
    s->own_is_pinned = gpu->calls->pin(gpu, s->own, FST_SHARED_ROUNDS * s->size) == 0;
    return FST_OK;
}

static void release(void *arg) {
    fst_shared *s = arg;
    const fst_gpu *gpu = s->gpu;
    if (s->ring && gpu->host_access) fst_os_calls.unmap(s->ring, ring_bytes(s));
    else if (s->ring) gpu->calls->free_block(gpu, s->ring, ring_bytes(s));
    if (s->own_is_pinned) gpu->calls->unpin(gpu, s->own);
    if (s->own) fst_os_calls.unmap(s->own, FST_SHARED_ROUNDS * s->size);
    if (s->copied) gpu->calls->event_free(gpu, s->copied);
    if (s->copies) gpu->calls->stream_free(gpu, s->copies);
    if (s->stream) gpu->calls->stream_free(gpu, s->stream);
    free(s->map); /* the others' maps come into it */
    free(s);
}

void fst_shared_free(fst_shared *s) {
    if (!s) return;
    free(s->first);
    free(s->units);
    free(s->position);
    free(s->chunks_left);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->came);
    if (fst_peers_busy(s->peers)) fst_peers_keep(s->peers, release, s);
    else release(s);
}

/* FNV-1a of 64-bit words and of names. */
static uint64_t hash_word(uint64_t hash, uint64_t word) { return (hash ^ word) * 1099511628211u; }

/* What a file says of itself: ranks that see other files find out. */
static uint64_t hash_header(const fst_header *header, uint64_t hash) {
    hash = hash_word(hash_word(hash, header->file_size), header->data_start);
    for (size_t i = 0; i < header->count; i++) {
        const fst_entry *entry = &header->tensors[i];
        hash = hash_word(hash_word(hash, entry->end), (uint64_t)entry->dtype);
        for (uint32_t k = 0; k < entry->name_length; k++)
            hash = hash_word(hash, (unsigned char)entry->name[k]);
    }
    return hash;
}

fst_status fst_shared_new(fst_peers *peers, const fst_gpu *gpu, size_t chunk_bytes, const fst_plan *plan,
                          const fst_header *headers, const char *const *paths, size_t files,
                          fst_reader *reader, fst_status mine, fst_shared **out, fst_error *error) {
    fst_shared *s = calloc(1, sizeof *s);
    pthread_condattr_t attributes;
    *out = NULL;
    if (!s) return fst_peers_agree(peers, mine ? mine : no_memory(error), NULL, 0, error);
    *s = (fst_shared){.peers = peers,
                      .gpu = gpu,
                      .plan = plan,
                      .headers = headers,
                      .paths = paths,
                      .reader = reader,
                      .files = files,
                      .size = unit_bytes(fst_peers_count(peers), chunk_bytes),
                      .rank = fst_peers_rank(peers),
                      .ranks = fst_peers_count(peers)};
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&s->came, &attributes);
    pthread_condattr_destroy(&attributes);
    if (!mine) mine = count_units(s, error);
    if (!mine && !gpu->host_access) {
        int code = gpu->calls->stream_new(gpu, &s->stream);
        if (!code) code = gpu->calls->stream_new(gpu, &s->copies);
        if (!code) code = gpu->calls->event_new(gpu, 0, &s->copied);
        if (code) mine = fst_gpu_fail(error, gpu, code, "making a stream for other ranks");
    }
    if (!mine) mine = make_ring(s, error);
    /* All that decides on the rounds must be the same. */
    uint64_t words[3] = {s->size, 0, 1469598103934665603u};
    if (!mine) words[1] = s->first[files];
    for (size_t i = 0; !mine && i < files; i++) words[2] = hash_header(&headers[i], words[2]);
    fst_status status = fst_peers_agree(peers, mine, words, 3, error);
    if (!status) mark_units(s);
    if (!status) status = gather_maps(s, FST_OK, error);
    if (!status) status = fst_peers_agree(peers, list_units(s, error), NULL, 0, error);
    if (status) {
        fst_shared_free(s);
        return status;
    }
    *out = s;
    return FST_OK;
}

/* ---- Rounds ------------------------------------------------------------------------------------------------ */

static unsigned char *round_at(const fst_shared *s, uint64_t round) {
    return s->ring + round % FST_SHARED_ROUNDS * s->ranks * s->size;
}

static size_t bytes_of(const fst_shared *s, const unit *u) {
    uint64_t left = s->headers[u->file].file_size - (uint64_t)u->index * s->size;
    return left < s->size ? (size_t)left : s->size;
}

/* What will be read must be under way before. */
static fst_how choose(fst_shared *s, uint64_t round) {
    for (; s->chosen < round + AHEAD && s->chosen * s->ranks + s->rank < s->count; s->chosen++) {
        const unit *u = &s->units[s->chosen * s->ranks + s->rank];
        s->hows[s->chosen % AHEAD] =
            fst_reader_ahead(s->reader, u->file, (uint64_t)u->index * s->size, bytes_of(s, u));
    }
    return s->hows[round % AHEAD];
}

/* Reads one part of the unit that is read, if one is left. */
int fst_shared_help(fst_shared *s) {
    pthread_mutex_lock(&s->lock);
    reading r = s->reading;
    if (r.next < r.parts) s->reading.next++;
    pthread_mutex_unlock(&s->lock);
    if (r.next >= r.parts) return 0;
    size_t at = r.next * fst_shared_part, left = r.nbytes - at,
           nbytes = left < fst_shared_part ? left : fst_shared_part;
    ssize_t got = fst_reader_read(s->reader, &r.how, r.file, r.to + at, r.offset + at, nbytes);
    pthread_mutex_lock(&s->lock);
    if (got != (ssize_t)nbytes && r.next < s->reading.failed) {
        s->reading.failed = r.next;
        s->reading.got = got;
    }
    if (++s->reading.done == r.parts) pthread_cond_broadcast(&s->came);
    pthread_mutex_unlock(&s->lock);
    return 1;
}

/* Reads a unit, with the help of the threads that wait for it or others. The bytes that came, as if by one read. */
static ssize_t read_parts(fst_shared *s, const unit *u, fst_how how, unsigned char *to) {
    size_t nbytes = bytes_of(s, u), parts = (nbytes + fst_shared_part - 1) / fst_shared_part;
    pthread_mutex_lock(&s->lock);
    s->reading = (reading){.to = to,
                           .file = u->file,
                           .how = how,
                           .offset = (uint64_t)u->index * s->size,
                           .nbytes = nbytes,
                           .parts = parts,
                           .failed = SIZE_MAX};
    if (parts > 1) pthread_cond_broadcast(&s->came);
    pthread_mutex_unlock(&s->lock);
    while (fst_shared_help(s)) continue;
    pthread_mutex_lock(&s->lock);
    while (s->reading.done < parts) pthread_cond_wait(&s->came, &s->lock);
    reading r = s->reading;
    pthread_mutex_unlock(&s->lock);
    if (r.failed == SIZE_MAX) return (ssize_t)nbytes;
    return r.got < 0 ? r.got : (ssize_t)(r.failed * fst_shared_part) + r.got;
}

/* This rank's unit of a round is on its way to its place. */
static fst_status read_unit(fst_shared *s, uint64_t round, fst_error *error) {
    const fst_gpu *gpu = s->gpu;
    uint64_t which = round * s->ranks + s->rank;
    unsigned char *place = round_at(s, round) + s->rank * s->size;
    if (which >= s->count) return FST_OK; /* nothing is left: what is there is nobody's */
    const unit *u = &s->units[which];
    size_t nbytes = bytes_of(s, u);
    unsigned char *to = gpu->host_access ? place : s->own + round % FST_SHARED_ROUNDS * s->size;
    ssize_t got = read_parts(s, u, choose(s, round), to);
    fst_where where = {s->paths[u->file], (int)u->file, (int64_t)((uint64_t)u->index * s->size)};
    if (got < 0)
        return fst_fail(error, FST_E_IO, (int)-got, &where, "reading for all ranks: %s", strerror((int)-got));
    where.offset += got;
    if ((size_t)got < nbytes)
        return fst_fail(error, FST_E_CHANGED, 0, &where,
                        "the file ends here: it was cut short during the load");
    s->bytes_read += nbytes;
    if (gpu->host_access) return FST_OK;
    int code = gpu->calls->to_device(gpu, s->copies, place, to, nbytes);
    if (!code) code = gpu->calls->event_record(gpu, s->copied, s->copies);
    if (!code) code = gpu->calls->stream_follow(gpu, s->stream, s->copied);
    return code ? fst_gpu_fail(error, gpu, code, "a copy to the device") : FST_OK;
}

static int has_room(fst_shared *s) {
    int room = 1;
    if (s->begun < FST_SHARED_ROUNDS) return 1;
    pthread_mutex_lock(&s->lock);
    room = s->done > s->begun - FST_SHARED_ROUNDS && s->chunks_left[s->begun - FST_SHARED_ROUNDS] == 0;
    pthread_mutex_unlock(&s->lock);
    return room;
}

/* Begins the next round, or takes part in its failure. */
static fst_status begin_round(fst_shared *s, fst_status mine, fst_error *error) {
    if (s->heard) mine = FST_OK; /* of a failure that all know */
    else if (!mine && !s->failure) s->failure = read_unit(s, s->begun, &s->why);
    fst_status own = mine ? mine : s->failure;
    fst_status status = fst_peers_begin(s->peers, round_at(s, s->begun), s->size, s->stream, own, error);
    if (!status) s->begun++;
    if (status && status == s->failure) *error = s->why;
    return status;
}

/* Looks whether the oldest round is there. A failure in it is everybody's, but rounds go on to the one that ends them all. */
static fst_status look_at_round(fst_shared *s, int *came, fst_error *error) {
    fst_status status = fst_peers_test(s->peers, came, error);
    if (!status && !*came) return FST_OK;
    pthread_mutex_lock(&s->lock);
    s->done++;
    pthread_cond_broadcast(&s->came);
    pthread_mutex_unlock(&s->lock);
    if (status && status == s->failure) *error = s->why;
    return status;
}

fst_status fst_shared_step(fst_shared *s, fst_status mine, int *done, fst_error *error) {
    fst_status status = FST_OK;
    int came = 0, began = 0, ends = mine || s->failure || s->heard;
    *done = 1;
    if (s->has_ended || s->done == s->rounds) return FST_OK;
    if (s->begun < s->rounds && (ends ? s->begun - s->done < FST_SHARED_ROUNDS : has_room(s))) {
        status = begin_round(s, mine, error);
        if (status) { /* that was all */
            s->has_ended = 1;
            if (!fst_peers_busy(s->peers)) fst_peers_finish(s->peers, &s->why);
            return s->heard ? FST_OK : status;
        }
        began = 1;
    }
    if (s->done < s->begun) status = look_at_round(s, &came, error);
    if (status && status != mine) {
        fst_status before = s->heard;
        s->heard = status;
        if (fst_peers_busy(s->peers) || (status == FST_E_PEER && error->code == 0)) s->has_ended = 1;
        if (before) status = FST_OK; /* that was said */
    }
    *done = s->has_ended || s->done == s->rounds;
    if (!*done && !came && !began) nanosleep(&(struct timespec){0, 20000}, NULL);
    return status == mine ? FST_OK : status;
}

uint64_t fst_shared_read(const fst_shared *s) { return s ? s->bytes_read : 0; }

unsigned fst_shared_unpinned(const fst_shared *s) {
    return s && s->own && !s->own_is_pinned ? FST_SHARED_ROUNDS : 0;
}

/* ---- Chunks ---------------------------------------------------------------------------------------------- */

int fst_shared_await(fst_shared *s, const fst_plan_chunk *chunk) {
    uint64_t first, last;
    units_of(s, chunk, &first, &last);
    uint64_t round = s->position[last] / s->ranks;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)(WAIT_SECONDS * 1e9);
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&s->lock);
    if (s->done <= round && s->reading.next >= s->reading.parts)
        pthread_cond_timedwait(&s->came, &s->lock, &until);
    int there = s->done > round;
    pthread_mutex_unlock(&s->lock);
    return there;
}

const unsigned char *fst_shared_bytes(const fst_shared *s, uint32_t file, uint64_t offset, uint64_t *nbytes) {
    uint64_t in = offset % s->size, position = s->position[s->first[file] + offset / s->size];
    if (*nbytes > s->size - in) *nbytes = s->size - in;
    return round_at(s, position / s->ranks) + position % s->ranks * s->size + in;
}

void fst_shared_release(fst_shared *s, const fst_plan_chunk *chunk) {
    uint64_t first, last;
    units_of(s, chunk, &first, &last);
    pthread_mutex_lock(&s->lock);
    for (uint64_t r = s->position[first] / s->ranks; r <= s->position[last] / s->ranks; r++)
        s->chunks_left[r]--;
    pthread_mutex_unlock(&s->lock);
}
