#include "reader.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "status.h"

#define SECTOR 4096u                     /* for O_DIRECT: a multiple of what any disk wants */
#define LEAST_STEP ((uint64_t)128 << 10) /* of advice to read: Linux' usual readahead */
#define MOST_STEP ((uint64_t)4 << 20)
#define MINCORE_PAGES 1024u

/* How it is found out whether something is in memory, from the best to none. */
typedef enum method { ALWAYS, CACHESTAT, MINCORE, PROBE, UNKNOWN, METHODS } method;

static const char *const method_names[METHODS] = {"always", "cachestat", "mincore", "probe", "unknown"};

#define NOT_OPENED (-1)
#define REFUSED (-2)

typedef struct file {
    int fd;
    const char *path;
    const fst_file_id *id;
    atomic_int method;
    _Atomic(const char *) why; /* not a better method; NULL: this is the best */
    atomic_int direct, probe;  /* descriptors of our own, NOT_OPENED or REFUSED */
    _Atomic uint64_t step;     /* of advice; 0: not known yet */
    atomic_int advised;        /* the kernel reads nothing ahead but what it is told to */
    atomic_int no_direct;      /* O_DIRECT was refused; `direct` may be in use in other threads still */
    _Atomic(void *) map;       /* for mincore */
} file;

struct fst_reader {
    uint64_t load; /* tells one reader's files from another's in a ring */
    uint64_t seed;
    fst_reader_options options;
    const fst_range *ranges;
    size_t ranges_count, files_count;
    uint64_t page;
    pthread_mutex_t lock;          /* for what is opened once */
    pthread_mutex_t counting;      /* and for what is found out once */
    atomic_int fits;               /* misses in memory: 0 not known yet, 1 yes, 2 no */
    uint64_t missing, room;        /* what that was found out from */
    atomic_uint_fast64_t bytes[3]; /* by fst_how */
    atomic_uint refused;           /* files without O_DIRECT where it was wanted */
    atomic_int ring_used;
    _Atomic(const char *) ring_why;
    file files[];
};

/* ---- A load's files -------------------------------------------------------------------------------- */

static void set_method(file *f, method to, const char *why) {
    atomic_store(&f->why, why);
    atomic_store(&f->method, to);
}

static void choose_method(file *f) {
    fst_file_system system;
    if (fst_os_calls.file_system(f->fd, &system)) system = FST_FS_OTHER;
    if (system == FST_FS_MEMORY) set_method(f, ALWAYS, NULL);
    else if (system == FST_FS_OWN_CACHE) set_method(f, UNKNOWN, "the file system has a cache of its own");
    else if (fst_os_calls.is_owner(f->fd) != 1) set_method(f, PROBE, "another owner's file");
    else if (system == FST_FS_OVERLAY) set_method(f, MINCORE, "overlay file system");
    else set_method(f, CACHESTAT, NULL);
}

fst_status fst_reader_new(const int *fds, const fst_file_id *ids, const char *const *paths, size_t files,
                          const fst_range *ranges, size_t count, const fst_reader_options *options,
                          fst_reader **out, fst_error *error) {
    static atomic_uint_fast64_t loads;
    fst_reader *reader = calloc(1, sizeof *reader + files * sizeof *reader->files);
    *out = reader;
    if (!reader) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    pthread_mutex_init(&reader->lock, NULL);
    pthread_mutex_init(&reader->counting, NULL);
    reader->load = atomic_fetch_add(&loads, 1) + 1;
    reader->seed = (uint64_t)(fst_os_now() * 1e9) + reader->load;
    reader->options = *options;
    reader->ranges = ranges;
    reader->ranges_count = count;
    reader->files_count = files;
    reader->page = (uint64_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < files; i++) {
        file *f = &reader->files[i];
        f->fd = fds[i];
        f->path = paths[i];
        f->id = &ids[i];
        atomic_init(&f->direct, NOT_OPENED);
        atomic_init(&f->probe, NOT_OPENED);
        choose_method(f);
    }
    return FST_OK;
}

void fst_reader_free(fst_reader *reader) {
    if (!reader) return;
    for (size_t i = 0; i < reader->files_count; i++) {
        file *f = &reader->files[i];
        void *map = atomic_load(&f->map);
        if (atomic_load(&f->direct) >= 0) fst_os_calls.close(atomic_load(&f->direct));
        if (atomic_load(&f->probe) >= 0) fst_os_calls.close(atomic_load(&f->probe));
        if (map) fst_os_calls.unmap(map, (size_t)f->id->size);
    }
    pthread_mutex_destroy(&reader->lock);
    pthread_mutex_destroy(&reader->counting);
    free(reader);
}

/* A descriptor of our own of the same file. */
static int open_again(const file *f, int direct) {
    fst_file_id id;
    fst_file_type type;
    int fd = fst_os_calls.open_again(f->fd, f->path, direct);
    if (fd < 0) return REFUSED;
    if (!fst_os_calls.identify(fd, &id, &type) && id.device == f->id->device && id.inode == f->id->inode)
        return fd;
    fst_os_calls.close(fd);
    return REFUSED;
}

static int can_be_direct(const file *f) {
    uint32_t memory = 0, offset = 0;
    if (fst_os_calls.direct_alignment(f->fd, &memory, &offset)) return 1; /* not known: it will be tried */
    return memory && offset && SECTOR % memory == 0 && SECTOR % offset == 0;
}

/* From now on the file is read buffered. */
static void refuse_direct(fst_reader *reader, file *f) {
    if (!atomic_exchange(&f->no_direct, 1)) atomic_fetch_add(&reader->refused, 1);
}

/* The descriptor for O_DIRECT, or a negative number. */
static int direct_of(fst_reader *reader, file *f) {
    if (atomic_load(&f->no_direct)) return REFUSED;
    int fd = atomic_load(&f->direct);
    if (fd != NOT_OPENED) return fd;
    pthread_mutex_lock(&reader->lock);
    fd = atomic_load(&f->direct);
    if (fd == NOT_OPENED) {
        fd = can_be_direct(f) ? open_again(f, 1) : REFUSED;
        atomic_store(&f->direct, fd);
        if (fd < 0) refuse_direct(reader, f);
    }
    pthread_mutex_unlock(&reader->lock);
    return fd;
}

/* A missed probe on the load's own descriptor would start readahead. */
static int probe_of(fst_reader *reader, file *f) {
    int fd = atomic_load(&f->probe);
    if (fd != NOT_OPENED) return fd;
    pthread_mutex_lock(&reader->lock);
    fd = atomic_load(&f->probe);
    if (fd == NOT_OPENED) {
        fd = open_again(f, 0);
        if (fd >= 0 && fst_os_calls.advise(fd, 0, 0, FST_ADVICE_RANDOM)) {
            fst_os_calls.close(fd);
            fd = REFUSED;
        }
        atomic_store(&f->probe, fd);
    }
    pthread_mutex_unlock(&reader->lock);
    return fd;
}

static unsigned char *map_of(fst_reader *reader, file *f) {
    void *map = atomic_load(&f->map);
    if (map || f->id->size > SIZE_MAX) return map;
    pthread_mutex_lock(&reader->lock);
    map = atomic_load(&f->map);
    if (!map && atomic_load(&f->method) == MINCORE) {
        map = fst_os_calls.map_file(f->fd, (size_t)f->id->size);
        atomic_store(&f->map, map);
        if (!map) set_method(f, PROBE, "the file cannot be mapped");
    }
    pthread_mutex_unlock(&reader->lock);
    return map;
}

/* ---- What is in memory ----------------------------------------------------------------------------- */

/* Each asks for whole pages that the file had when it was opened, and gives how many of them are missing, or a negative
 * errno. */

static int64_t missing_by_cachestat(const file *f, uint64_t start, uint64_t end, uint64_t page) {
    uint64_t cached = 0, pages = (end - start + page - 1) / page;
    int code = fst_os_calls.cachestat(f->fd, start, end - start, &cached);
    return code < 0 ? code : (int64_t)(cached < pages ? pages - cached : 0);
}

static int64_t missing_by_mincore(fst_reader *reader, file *f, uint64_t start, uint64_t end) {
    unsigned char pages[MINCORE_PAGES], *map = map_of(reader, f);
    uint64_t step = reader->page * MINCORE_PAGES;
    int64_t missing = 0;
    if (!map) return -ENOMEM;
    for (; start < end; start += step) {
        uint64_t size = end - start < step ? end - start : step;
        int code = fst_os_calls.mincore(map + start, (size_t)size, pages);
        if (code < 0) return code;
        for (uint64_t i = 0; i < (size + reader->page - 1) / reader->page; i++) missing += !(pages[i] & 1);
    }
    return missing;
}

/* Where a chunk is probed: not on pages that it shares with its neighbours, and never twice at one place. A probe that
 * misses brings its piece in, and so the next load would take the chunk for cached. */
static uint64_t probe_at(const fst_reader *reader, uint64_t start, uint64_t end, unsigned turn) {
    uint64_t z = (start + reader->seed + turn) * 0x9E3779B97F4A7C15u;
    if (end - start > 3 * SECTOR) {
        start += SECTOR;
        end -= SECTOR;
    }
    return start + (z ^ z >> 32) % ((end - start + SECTOR - 1) / SECTOR) * SECTOR;
}

#define PROBES 2u /* all must hit: a fast disk may bring a piece in while it is asked for */

/* From single pieces to all. */
static int64_t missing_by_probe(fst_reader *reader, file *f, uint64_t start, uint64_t end) {
    unsigned char piece[SECTOR];
    int fd = probe_of(reader, f);
    if (fd < 0) return -EBADF;
    for (unsigned i = 0; i < PROBES; i++) {
        ssize_t got = fst_os_calls.pread_cached(fd, piece, sizeof piece, probe_at(reader, start, end, i));
        if (got == -EAGAIN) return (int64_t)((end - start + reader->page - 1) / reader->page);
        if (got < 0) return got;
    }
    return 0;
}

/* What a chunk has of the file, from the start of its first page. 0: nothing. */
static int clip(const fst_reader *reader, const file *f, uint64_t offset, uint64_t nbytes, uint64_t *start,
                uint64_t *end) {
    *start = offset / reader->page * reader->page;
    *end = offset + nbytes < f->id->size ? offset + nbytes : f->id->size;
    return *start < *end;
}

/* The bytes of [offset, offset + nbytes), in whole pages, that are not in memory. -1: not known. A method that fails
 * gives way to the next for good. */
static int64_t missing_bytes(fst_reader *reader, file *f, uint64_t offset, uint64_t nbytes) {
    uint64_t start, end;
    if (!clip(reader, f, offset, nbytes, &start, &end)) return 0;
    for (;;) {
        int64_t missing;
        switch (atomic_load(&f->method)) {
        case ALWAYS: return 0;
        case CACHESTAT:
            missing = missing_by_cachestat(f, start, end, reader->page);
            if (missing < 0)
                set_method(f, MINCORE, missing == -ENOSYS ? "no cachestat" : "cachestat is refused");
            break;
        case MINCORE:
            missing = missing_by_mincore(reader, f, start, end);
            if (missing < 0) set_method(f, PROBE, "no mincore");
            break;
        case PROBE:
            missing = missing_by_probe(reader, f, start, end);
            if (missing < 0) set_method(f, UNKNOWN, "the file system cannot tell");
            break;
        default: return -1;
        }
        if (missing >= 0) return missing * (int64_t)reader->page;
    }
}

/* ---- What becomes of what is not ------------------------------------------------------------------- */

static fst_range range_at(const fst_reader *reader, size_t i) {
    if (reader->ranges_count) return reader->ranges[i];
    return (fst_range){(uint32_t)i, 0, reader->files[i].id->size};
}

/* Bytes of the load that are not in memory, all of those where only single pieces can be asked for; or some number above
 * `enough`. */
static uint64_t count_missing(fst_reader *reader, uint64_t enough) {
    size_t count = reader->ranges_count ? reader->ranges_count : reader->files_count;
    uint64_t total = 0, missing = 0;
    for (size_t i = 0; i < count; i++) total += range_at(reader, i).nbytes;
    if (total <= enough) return total;
    for (size_t i = 0; i < count && missing <= enough; i++) {
        fst_range range = range_at(reader, i);
        file *f = &reader->files[range.file];
        int counts = atomic_load(&f->method) <= MINCORE;
        int64_t bytes = counts ? missing_bytes(reader, f, range.offset, range.nbytes) : -1;
        missing += bytes < 0 ? range.nbytes : (uint64_t)bytes;
    }
    return missing;
}

static int count_misses(fst_reader *reader) {
    uint64_t memory = fst_os_calls.memory_available(), taken = reader->options.host_bytes;
    reader->room = !memory ? UINT64_MAX : memory > taken ? (memory - taken) / 2 : 0;
    reader->missing = count_missing(reader, reader->room);
    return reader->missing <= reader->room ? 1 : 2;
}

/* Found out at the first miss: a load from memory has no need to know. */
static int misses_fit(fst_reader *reader) {
    int fits = atomic_load(&reader->fits);
    if (fits) return fits == 1;
    pthread_mutex_lock(&reader->counting);
    fits = atomic_load(&reader->fits);
    if (!fits) atomic_store(&reader->fits, fits = count_misses(reader));
    pthread_mutex_unlock(&reader->counting);
    return fits == 1;
}

fst_how fst_reader_choose(fst_reader *reader, size_t which, uint64_t offset, size_t nbytes) {
    file *f = &reader->files[which];
    int64_t missing = missing_bytes(reader, f, offset, nbytes);
    int wanted = reader->options.reader == FST_READER_DIRECT || reader->options.cache == FST_CACHE_AVOID;
    if (missing == 0) return FST_HOW_CACHED;
    /* A few pages that are missing are no reason to read all the others again. */
    if (!wanted && (missing < 0 || reader->options.cache == FST_CACHE_KEEP || misses_fit(reader) ||
                    (uint64_t)missing < nbytes / 2))
        return FST_HOW_BUFFERED;
    return direct_of(reader, f) >= 0 ? FST_HOW_DIRECT : FST_HOW_BUFFERED;
}

/* Bytes that the kernel begins to read at one word: it cuts longer advice to the device's readahead. */
static uint64_t advice_step(file *f) {
    static const char *const places[] = {"/sys/class/bdi/%u:%u/read_ahead_kb",
                                         "/sys/dev/block/%u:%u/../queue/read_ahead_kb"}; /* of a partition */
    uint64_t step = atomic_load(&f->step);
    for (size_t i = 0; !step && i < sizeof places / sizeof *places; i++) {
        char path[96], text[32];
        snprintf(path, sizeof path, places[i], major(f->id->device), minor(f->id->device));
        if (fst_os_calls.read_text(path, text, sizeof text) > 0) step = strtoull(text, NULL, 10) << 10;
    }
    if (step < LEAST_STEP) step = LEAST_STEP;
    if (step > MOST_STEP) step = MOST_STEP;
    atomic_store(&f->step, step);
    return step;
}

static void read_ahead(file *f, uint64_t offset, uint64_t nbytes) {
    uint64_t step = advice_step(f);
    if (!atomic_load(&f->advised) && !atomic_exchange(&f->advised, 1))
        fst_os_calls.advise(f->fd, 0, 0, FST_ADVICE_RANDOM);
    for (uint64_t end = offset + nbytes; offset < end; offset += step) {
        uint64_t size = end - offset < step ? end - offset : step;
        if (fst_os_calls.advise(f->fd, offset, size, FST_ADVICE_WILLNEED)) break;
    }
}

void fst_reader_advise(fst_reader *reader, size_t which, uint64_t offset, uint64_t nbytes) {
    if (reader->options.cache != FST_CACHE_AVOID) read_ahead(&reader->files[which], offset, nbytes);
}

/* A file system that refused O_DIRECT: what is read buffered then is not to stay, unless it was there before. */
static int is_to_be_dropped(fst_reader *reader, file *f, fst_how how, uint64_t offset, size_t nbytes) {
    if (how != FST_HOW_BUFFERED || reader->options.cache != FST_CACHE_AVOID) return 0;
    int64_t missing = missing_bytes(reader, f, offset, nbytes);
    return missing > 0 &&
           (uint64_t)missing + 2 * reader->page > nbytes; /* chunks share pages with their neighbours */
}

fst_how fst_reader_ahead(fst_reader *reader, size_t which, uint64_t offset, size_t nbytes) {
    fst_how how = fst_reader_choose(reader, which, offset, nbytes);
    if (how == FST_HOW_BUFFERED) fst_reader_advise(reader, which, offset, nbytes);
    return how;
}

/* ---- Reads ----------------------------------------------------------------------------------------- */

static ssize_t count_bytes(fst_reader *reader, fst_how how, ssize_t got) {
    if (got > 0) atomic_fetch_add(&reader->bytes[how], (uint64_t)got);
    return got;
}

static ssize_t read_buffered(fst_reader *reader, fst_how how, file *f, void *out, uint64_t offset,
                             size_t nbytes) {
    int drop = is_to_be_dropped(reader, f, how, offset, nbytes);
    if (how == FST_HOW_BUFFERED) read_ahead(f, offset, nbytes);
    ssize_t got = fst_os_read_all(f->fd, out, nbytes, offset);
    if (drop) fst_os_calls.advise(f->fd, offset, nbytes, FST_ADVICE_DONTNEED);
    return count_bytes(reader, how, got);
}

/* The whole sectors around a chunk. */
static fst_ring_read sectors_around(uint64_t offset, size_t nbytes, void *slot) {
    size_t skip = offset % SECTOR;
    return (fst_ring_read){.direct = 1,
                           .data = slot,
                           .nbytes = (skip + nbytes + SECTOR - 1) / SECTOR * SECTOR,
                           .offset = offset - skip,
                           .skip = skip,
                           .wanted = nbytes};
}

/* What a missed probe brought in was not asked for. */
static void drop_probe(fst_reader *reader, file *f, uint64_t offset, size_t nbytes) {
    uint64_t start, end;
    if (atomic_load(&f->method) != PROBE || !clip(reader, f, offset, nbytes, &start, &end)) return;
    for (unsigned i = 0; i < PROBES; i++)
        fst_os_calls.advise(f->fd, probe_at(reader, start, end, i), SECTOR, FST_ADVICE_DONTNEED);
}

/* O_DIRECT came to `got`: all is there, or the rest is read buffered, which is nothing at the end of the file. */
static ssize_t settle_direct(fst_reader *reader, fst_how *how, file *f, const fst_ring_read *read,
                             ssize_t got) {
    uint64_t offset = read->offset + read->skip;
    unsigned char *out = (unsigned char *)read->data + read->skip;
    if (got == -EINVAL || got == -EOPNOTSUPP) {
        refuse_direct(reader, f);
        *how = FST_HOW_BUFFERED;
        return read_buffered(reader, *how, f, out, offset, read->wanted);
    }
    if (got < 0) return got;
    drop_probe(reader, f, offset, read->wanted);
    size_t done = (size_t)got > read->skip ? (size_t)got - read->skip : 0;
    if (done >= read->wanted) return count_bytes(reader, *how, (ssize_t)read->wanted);
    ssize_t rest = fst_os_read_all(f->fd, out + done, read->wanted - done, offset + done);
    return rest < 0 ? rest : count_bytes(reader, *how, (ssize_t)done + rest);
}

static ssize_t read_sectors(int fd, const fst_ring_read *read) {
    size_t done = 0, needed = read->skip + read->wanted;
    while (done < needed) {
        ssize_t got =
            fst_os_calls.pread(fd, (char *)read->data + done, read->nbytes - done, read->offset + done);
        if (got == -EINTR) continue;
        if (got < 0) return got;
        done += (size_t)got;
        if (got == 0 || done % SECTOR) break;
    }
    return (ssize_t)done;
}

ssize_t fst_reader_read(fst_reader *reader, fst_how *how, size_t which, void *slot, uint64_t offset,
                        size_t nbytes) {
    file *f = &reader->files[which];
    int fd = *how == FST_HOW_DIRECT ? direct_of(reader, f) : REFUSED;
    if (*how == FST_HOW_DIRECT && fd < 0) *how = FST_HOW_BUFFERED;
    if (*how != FST_HOW_DIRECT)
        return read_buffered(reader, *how, f, (char *)slot + offset % SECTOR, offset, nbytes);
    fst_ring_read read = sectors_around(offset, nbytes, slot);
    return settle_direct(reader, how, f, &read, read_sectors(fd, &read));
}

ssize_t fst_reader_gather(fst_reader *reader, fst_how *how, size_t which, void *out,
                          const fst_segments *segments) {
    file *f = &reader->files[which];
    uint64_t offset = segments->offset, span = (segments->count - 1) * segments->pitch + segments->nbytes;
    size_t done = 0;
    if (*how == FST_HOW_DIRECT) *how = FST_HOW_BUFFERED;
    int drop = is_to_be_dropped(reader, f, *how, offset, span);
    if (*how == FST_HOW_BUFFERED) read_ahead(f, offset, span);
    for (uint64_t i = 0; i < segments->count; i++, offset += segments->pitch) {
        ssize_t got = fst_os_read_all(f->fd, (char *)out + done, segments->nbytes, offset);
        if (got < 0) return got;
        done += (size_t)got;
        if ((size_t)got < segments->nbytes) break;
    }
    if (drop) fst_os_calls.advise(f->fd, segments->offset, span, FST_ADVICE_DONTNEED);
    return count_bytes(reader, *how, (ssize_t)done);
}

/* ---- Reads through a ring -------------------------------------------------------------------------- */

#define NOTE_DROP 4u /* beside an fst_how */

int fst_reader_submit(fst_reader *reader, fst_ring *ring, uint64_t tag, fst_how how, size_t which, void *slot,
                      uint64_t offset, size_t nbytes) {
    file *f = &reader->files[which];
    int direct = how == FST_HOW_DIRECT ? direct_of(reader, f) : REFUSED;
    fst_ring_read read = sectors_around(offset, nbytes, slot);
    read.fd = direct;
    if (direct < 0) {
        if (how == FST_HOW_DIRECT) how = FST_HOW_BUFFERED;
        read = (fst_ring_read){.fd = f->fd,
                               .data = (char *)slot + offset % SECTOR,
                               .nbytes = nbytes,
                               .offset = offset,
                               .wanted = nbytes};
        if (is_to_be_dropped(reader, f, how, offset, nbytes)) read.note = NOTE_DROP;
        if (how == FST_HOW_BUFFERED) read_ahead(f, offset, nbytes);
    }
    read.tag = tag;
    read.load = reader->load;
    read.file = (unsigned)which;
    read.note |= (unsigned)how;
    if (!atomic_load(&reader->ring_used)) atomic_store(&reader->ring_used, 1);
    return fst_ring_submit(ring, &read);
}

int fst_reader_wait(fst_reader *reader, fst_ring *ring, uint64_t *tag, ssize_t *result, fst_how *how) {
    fst_ring_read read;
    ssize_t got;
    int code = fst_ring_wait(ring, &read, &got);
    if (code) return code;
    file *f = &reader->files[read.file];
    *tag = read.tag;
    *how = (fst_how)(read.note & ~NOTE_DROP);
    if (read.note & NOTE_DROP) fst_os_calls.advise(f->fd, read.offset, read.nbytes, FST_ADVICE_DONTNEED);
    *result = read.direct ? settle_direct(reader, how, f, &read, got) : count_bytes(reader, *how, got);
    return 0;
}

void fst_reader_note_ring(fst_reader *reader, const char *why) { atomic_store(&reader->ring_why, why); }

/* ---- Facts ----------------------------------------------------------------------------------------- */

__attribute__((format(printf, 3, 4))) static void add_text(char *out, size_t size, const char *format, ...) {
    size_t length = strlen(out);
    va_list args;
    va_start(args, format);
    vsnprintf(out + length, size - length, format, args);
    va_end(args);
}

/* Each method that is in use, why it is not a better one, and for how many files. */
static void describe_residency(const fst_reader *reader, char *out, size_t size) {
    for (int m = 0; m < METHODS; m++) {
        size_t count = 0;
        const char *why = NULL;
        for (size_t i = 0; i < reader->files_count; i++) {
            const file *f = &reader->files[i];
            if (atomic_load(&f->method) != m) continue;
            why = atomic_load(&f->why);
            count++;
        }
        if (!count) continue;
        add_text(out, size, "%s%s", *out ? ", " : "", method_names[m]);
        if (count < reader->files_count) add_text(out, size, " for %zu", count);
        if (why) add_text(out, size, " (%s)", why);
    }
}

static void describe_reader(const fst_reader *reader, char *out, size_t size) {
    int fits = atomic_load(&reader->fits), direct = atomic_load(&reader->bytes[FST_HOW_DIRECT]) > 0;
    unsigned refused = atomic_load(&reader->refused);
    const char *ring_why = atomic_load(&reader->ring_why);
    add_text(out, size, "%s%s", atomic_load(&reader->ring_used) ? "io_uring" : "threads",
             direct ? ", O_DIRECT" : "");
    if (reader->options.reader == FST_READER_DIRECT) add_text(out, size, " as asked");
    else if (reader->options.cache == FST_CACHE_AVOID) add_text(out, size, " to leave the cache alone");
    else if (reader->options.cache == FST_CACHE_KEEP) add_text(out, size, " to keep all in the cache");
    else if (fits && reader->room == UINT64_MAX) add_text(out, size, "; free memory is not known");
    else if (fits)
        add_text(out, size, ": %s %.1f MB are missing and %s in half of the free memory, %.1f MB",
                 fits == 1 ? "at most" : "at least", (double)reader->missing / 1e6,
                 fits == 1 ? "fit" : "do not fit", (double)reader->room / 1e6);
    if (refused) add_text(out, size, "; %u files without O_DIRECT", refused);
    if (ring_why) add_text(out, size, "; %s", ring_why);
}

void fst_reader_describe(const fst_reader *reader, fst_reader_facts *out) {
    *out = (fst_reader_facts){.cached = atomic_load(&reader->bytes[FST_HOW_CACHED]),
                              .buffered = atomic_load(&reader->bytes[FST_HOW_BUFFERED]),
                              .direct = atomic_load(&reader->bytes[FST_HOW_DIRECT])};
    describe_residency(reader, out->residency, sizeof out->residency);
    describe_reader(reader, out->reader, sizeof out->reader);
}
