#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness.h"
#include "support.h"

#define PAGE 4096u
#define MIB ((size_t)1 << 20)
#define SLOTS 2u

/* ---- Files that are in memory, or not ---------------------------------------------------------- */

static unsigned char *content; /* of every file here */
#define CONTENT (8 * MIB)

static void make_file(const char *path, size_t size) {
    if (!content) {
        content = malloc(CONTENT);
        CHECK(content);
        support_random(content, CONTENT, 7);
    }
    support_write(path, content, size);
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_INT(0, fsync(fd)); /* dirty pages cannot be dropped */
    close(fd);
}

/* Pages that are in memory, from mincore: not what the reader asks first. */
static size_t resident(const char *path, size_t offset, size_t size) {
    unsigned char pages[CONTENT / PAGE];
    size_t count = 0;
    int fd = open(path, O_RDONLY);
    void *map = mmap(NULL, offset + size, PROT_NONE, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED);
    CHECK_INT(0, mincore((char *)map + offset, size, pages));
    munmap(map, offset + size);
    close(fd);
    for (size_t i = 0; i < (size + PAGE - 1) / PAGE; i++) count += pages[i] & 1;
    return count;
}

/* What the machine has: a container's file system may lack anything. */
static struct {
    int known, cold, counted, direct, cachestat, nowait, uring;
    fst_file_system system;
} machine;

/* 0 where nothing can be driven out of memory (tests on tmpfs). */
static int make_cold(const char *path, size_t offset, size_t size) {
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    for (int i = 0; i < (machine.known && !machine.cold ? 1 : 100);
         i++) { /* a page may be in somebody's batch for a moment */
        posix_fadvise(fd, (off_t)offset, (off_t)size, POSIX_FADV_DONTNEED);
        if (resident(path, offset, size) == 0) break;
        usleep(1000);
    }
    close(fd);
    return resident(path, offset, size) == 0;
}

static void make_warm(const char *path, size_t offset, size_t size) {
    char *buffer = malloc(size);
    int fd = open(path, O_RDONLY);
    CHECK(buffer && fd >= 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); /* no readahead */
    CHECK_INT(size, pread(fd, buffer, size, (off_t)offset));
    close(fd);
    free(buffer);
}

/* Bytes that the process has fetched from disks. */
static size_t disk_bytes(void) {
    char text[1024] = "";
    FILE *file = fopen("/proc/self/io", "r");
    if (!file) return 0;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    const char *line = strstr(text, "\nread_bytes:");
    return line ? strtoull(line + 12, NULL, 10) : 0;
}

/* The kernel may drop a page, or bring one in, of its own accord: what is so every time is our doing. */
static char trouble[512];

static void expect(int line, int condition, const char *text, const char *of, long long value) {
    if (!condition && !*trouble)
        snprintf(trouble, sizeof trouble, "line %d: %s of %s (%lld)", line, text, of, value);
}

#define EXPECT(condition, of, value) expect(__LINE__, condition, #condition, of, (long long)(value))
#define IN_THE_END(call)                                             \
    for (int attempt = 1; trouble[0] = 0, call, *trouble; attempt++) \
        if (attempt == 6) test_fail(__FILE__, __LINE__, "%s", trouble)

static void look_at_machine(void) {
    const char *path = test_path("probe");
    if (machine.known) return;
    make_file(path, MIB);
    machine.cold = make_cold(path, 0, MIB);
    size_t before = disk_bytes();
    make_warm(path, 0, MIB);
    machine.counted = machine.cold && disk_bytes() - before >= MIB;
    int fd = open(path, O_RDONLY), direct = open(path, O_RDONLY | O_DIRECT);
    uint64_t pages;
    fst_uring *uring;
    void *page = aligned_alloc(PAGE, PAGE);
    CHECK_INT(0, fst_os_calls.file_system(fd, &machine.system));
    machine.direct = direct >= 0 && pread(direct, page, PAGE, 0) == PAGE;
    machine.cachestat = machine.system == FST_FS_OTHER && fst_os_calls.cachestat(fd, 0, MIB, &pages) == 0 &&
                        pages == MIB / PAGE;
    machine.nowait = fst_os_calls.pread_cached(fd, page, PAGE, 0) == PAGE;
    machine.uring = fst_os_calls.uring_open(2, &uring) == 0;
    if (machine.uring) fst_os_calls.uring_close(uring);
    free(page);
    if (direct >= 0) close(direct);
    close(fd);
    machine.known = 1;
    printf("files here: cold %d, counted %d, O_DIRECT %d, cachestat %d, RWF_NOWAIT %d, io_uring %d\n",
           machine.cold, machine.counted, machine.direct, machine.cachestat, machine.nowait, machine.uring);
}

static fst_how missed(void) { return machine.direct ? FST_HOW_DIRECT : FST_HOW_BUFFERED; }

/* ---- Readers ----------------------------------------------------------------------------------- */

typedef struct rig {
    const char *path;
    int fd;
    fst_file_id id;
    fst_reader *reader;
    fst_ring *ring;
    unsigned char *memory, *slots[SLOTS];
    size_t room;
} rig;

static const fst_reader_options by_default = {0, 0, 0};

static void open_fd(rig *r, int fd, const char *path, const fst_reader_options *options,
                    const fst_range *ranges, size_t count) {
    fst_file_type type;
    fst_error error;
    r->path = path;
    r->fd = fd;
    CHECK(r->fd >= 0);
    CHECK_INT(0, fst_os_calls.identify(r->fd, &r->id, &type));
    CHECK_INT(FST_OK,
              fst_reader_new(&r->fd, &r->id, &r->path, 1, ranges, count, options, &r->reader, &error));
}

static void open_rig(rig *r, const char *path, const fst_reader_options *options) {
    look_at_machine();
    *r = (rig){0};
    open_fd(r, open(path, O_RDONLY | O_CLOEXEC), path, options, NULL, 0);
}

static void make_slots(rig *r, size_t nbytes) {
    r->room = nbytes + 2 * PAGE;
    r->memory = aligned_alloc(PAGE, (SLOTS * r->room + SLOTS * PAGE) / PAGE * PAGE);
    CHECK(r->memory);
    for (unsigned i = 0; i < SLOTS; i++) r->slots[i] = r->memory + i * ((r->room + PAGE) / PAGE * PAGE);
}

static const char *make_ring(rig *r) {
    struct iovec slots[SLOTS];
    const char *why;
    for (unsigned i = 0; i < SLOTS; i++) slots[i] = (struct iovec){r->slots[i], r->room};
    fst_ring_new(SLOTS, slots, SLOTS, &r->ring, &why);
    return why;
}

static void close_rig(rig *r) {
    if (r->ring) fst_ring_forget(r->ring);
    fst_ring_free(r->ring);
    fst_reader_free(r->reader);
    if (r->fd >= 0) close(r->fd);
    free(r->memory);
}

static fst_reader_facts facts_of(const rig *r) {
    fst_reader_facts facts;
    fst_reader_describe(r->reader, &facts);
    return facts;
}

/* What came of a whole file. */
typedef struct outcome {
    unsigned chunks[3]; /* by fst_how */
    ssize_t error;      /* the first, or 0 */
    int wrong;          /* bytes that are not the file's */
} outcome;

static void check_chunk(outcome *all, fst_how how, ssize_t got, const unsigned char *slot, uint64_t offset,
                        size_t nbytes) {
    all->chunks[how]++;
    if (got < 0 && !all->error) all->error = got;
    if (got >= 0 && ((size_t)got != nbytes || memcmp(slot + offset % PAGE, content + offset, nbytes) != 0))
        all->wrong = 1;
}

static outcome read_plainly(rig *r, size_t chunk, size_t from, size_t to) {
    outcome all = {0};
    for (size_t at = from; at < to; at += chunk) {
        size_t nbytes = to - at < chunk ? to - at : chunk;
        fst_how how = fst_reader_choose(r->reader, 0, at, nbytes);
        memset(r->slots[0], 0xEE, r->room);
        ssize_t got = fst_reader_read(r->reader, &how, 0, r->slots[0], at, nbytes);
        check_chunk(&all, how, got, r->slots[0], at, nbytes);
    }
    return all;
}

/* Two at a time. */
static outcome read_by_ring(rig *r, size_t chunk, size_t from, size_t to) {
    outcome all = {0};
    size_t offsets[SLOTS], sizes[SLOTS] = {0}, at = from;
    while (at < to || fst_ring_in_flight(r->ring)) {
        fst_how how;
        if (at < to && fst_ring_in_flight(r->ring) < SLOTS) {
            unsigned slot = sizes[0] ? 1 : 0;
            offsets[slot] = at;
            sizes[slot] = to - at < chunk ? to - at : chunk;
            memset(r->slots[slot], 0xEE, r->room);
            how = fst_reader_choose(r->reader, 0, at, sizes[slot]);
            if (fst_reader_submit(r->reader, r->ring, slot, how, 0, r->slots[slot], at, sizes[slot]))
                all.wrong = 1;
            at += sizes[slot];
            continue;
        }
        uint64_t slot = SLOTS;
        ssize_t got;
        int code = fst_reader_wait(r->reader, r->ring, &slot, &got, &how);
        if (code) {
            all.error = code;
            break;
        }
        check_chunk(&all, how, got, r->slots[slot], offsets[slot], sizes[slot]);
        sizes[slot] = 0;
    }
    return all;
}

static outcome read_file(rig *r, size_t chunk, size_t from, size_t to) {
    return r->ring ? read_by_ring(r, chunk, from, to) : read_plainly(r, chunk, from, to);
}

/* ---- What is in memory ------------------------------------------------------------------------- */

TEST(reader, a_file_of_tmpfs_is_in_memory_whatever_is_asked) {
    look_at_machine();
    for (int cache = 0; cache <= FST_CACHE_AVOID; cache++) {
        rig r = {0};
        int fd = memfd_create("fst", MFD_CLOEXEC);
        CHECK(fd >= 0);
        make_file(test_path("content"), MIB);
        CHECK_INT(MIB, write(fd, content, MIB));
        fake_os_begin(&(fake_os_options){.memory = 1});
        open_fd(&r, fd, "memfd", &(fst_reader_options){.reader = FST_READER_DIRECT, .cache = cache}, NULL, 0);
        make_slots(&r, MIB / 4);
        outcome all = read_plainly(&r, MIB / 4, 0, MIB);
        fst_reader_facts facts = facts_of(&r);
        int asked = fake_os_calls_of(FAKE_OS_CACHESTAT) + fake_os_calls_of(FAKE_OS_MEMORY);
        close_rig(&r);
        fake_os_end();
        CHECK_INT(4, all.chunks[FST_HOW_CACHED]);
        CHECK(!all.error && !all.wrong);
        CHECK_INT(MIB, facts.cached);
        CHECK_STR("always", facts.residency);
        CHECK_INT(0, asked);
    }
}

typedef struct way {
    const char *residency; /* how the facts name it */
    fake_os_options fake;
} way;

/* All ways to find out, whatever the file system of the tests is. */
static const way ways[] = {
    {"cachestat", {0}},
    {"mincore", {.refuse = 1u << FAKE_OS_CACHESTAT, .refusal = ENOSYS}},
    {"probe", {.stranger = 1}},
    {"unknown", {.stranger = 1, .refuse = 1u << FAKE_OS_PREAD_CACHED, .refusal = EOPNOTSUPP}},
};
#define WAYS (sizeof ways / sizeof *ways)

/* The method that this machine has for it. */
static const char *method_here(const char *want) {
    if (machine.system == FST_FS_MEMORY) return "always";
    if (machine.system == FST_FS_OWN_CACHE) return "unknown";
    if (!strcmp(want, "cachestat") && !machine.cachestat) return "mincore";
    return !strcmp(want, "probe") && !machine.nowait ? "unknown" : want;
}

static void check_residency(const char *want, const fst_reader_facts *facts) {
    want = method_here(want);
    if (strncmp(facts->residency, want, strlen(want)) != 0)
        test_fail(__FILE__, __LINE__, "want %s, got %s", want, facts->residency);
}

/* Cold, then warm, in chunks that end nowhere in particular: each byte comes from the disk once. */
static void read_twice(const way *w, int ring, const fst_reader_options *options) {
    const char *path = test_path("file");
    const size_t size = 4 * MIB + 777, chunk = MIB / 2 + 13;
    int avoid = options->cache == FST_CACHE_AVOID;
    make_file(path, size);
    int cold = make_cold(path, 0, size);
    size_t limits[2][2] = {{size - size / 10, size + size / 50}, {0, size / 100}};
    if (avoid) memcpy(limits[1], limits[0], sizeof limits[0]);
    for (int turn = 0; turn < 2; turn++) {
        rig r;
        fake_os_begin(&w->fake);
        open_rig(&r, path, options);
        make_slots(&r, chunk);
        if (ring) make_ring(&r);
        size_t before = disk_bytes();
        outcome all = read_file(&r, chunk, 0, size);
        size_t fetched = disk_bytes() - before;
        fst_reader_facts facts = facts_of(&r);
        close_rig(&r);
        fake_os_end();
        CHECK(!all.error && !all.wrong);
        CHECK_INT(size, facts.cached + facts.buffered + facts.direct);
        check_residency(w->residency, &facts);
        if (ring && machine.uring) CHECK(strstr(facts.reader, "io_uring") != NULL);
        if (!cold) continue;
        char of[64];
        snprintf(of, sizeof of, "%s, ring %d, cache %d, turn %d", w->residency, ring, options->cache, turn);
        if (avoid && machine.direct) EXPECT(facts.direct == size, of, facts.direct);
        if (!avoid) CHECK_INT(0, facts.direct);
        /* the last chunk lies on another's page */
        if (!avoid && turn == 0) EXPECT(facts.buffered >= size - PAGE, of, facts.buffered);
        if (!avoid && turn == 1 && strcmp(method_here(w->residency), "unknown"))
            EXPECT(facts.cached == size, of, facts.cached);
        if (machine.counted) EXPECT(fetched >= limits[turn][0] && fetched <= limits[turn][1], of, fetched);
        size_t stays = resident(path, 0, size);
        if (avoid && machine.direct) EXPECT(stays == 0, of, stays);
        if (!avoid) EXPECT(stays == (size + PAGE - 1) / PAGE, of, stays);
    }
}

static void read_twice_in_all_ways(const fst_reader_options *options) {
    look_at_machine();
    for (size_t i = 0; i < WAYS; i++)
        for (int ring = 0; ring < 2; ring++) IN_THE_END(read_twice(&ways[i], ring, options));
}

TEST(reader, what_fits_in_memory_is_read_from_disk_once_and_stays) { read_twice_in_all_ways(&by_default); }
TEST(reader, cache_keep_is_read_from_disk_once_and_stays) {
    read_twice_in_all_ways(&(fst_reader_options){.cache = FST_CACHE_KEEP});
}
TEST(reader, cache_avoid_leaves_the_cache_as_it_is) {
    read_twice_in_all_ways(&(fst_reader_options){.cache = FST_CACHE_AVOID});
}

static void read_half_cached(const way *w, int cache) {
    const char *path = test_path("file");
    const size_t size = 4 * MIB, chunk = MIB / 4;
    make_file(path, size);
    int cold = make_cold(path, 0, size);
    for (size_t at = 0; at < size; at += 2 * chunk) make_warm(path, at, chunk);
    rig r;
    fake_os_begin(&w->fake);
    open_rig(&r, path, &(fst_reader_options){.cache = cache});
    make_slots(&r, chunk);
    size_t before = disk_bytes();
    outcome all = read_plainly(&r, chunk, 0, size);
    size_t fetched = disk_bytes() - before;
    fst_reader_facts facts = facts_of(&r);
    close_rig(&r);
    fake_os_end();
    CHECK(!all.error && !all.wrong);
    if (!cold || !strcmp(method_here(w->residency), "unknown")) return;
    uint64_t missed_bytes = cache == FST_CACHE_AVOID && machine.direct ? facts.direct : facts.buffered;
    EXPECT(facts.cached == size / 2, w->residency, facts.cached);
    EXPECT(missed_bytes == size / 2, w->residency, missed_bytes);
    if (machine.counted)
        EXPECT(fetched >= size / 2 && fetched <= size / 2 + size / 100, w->residency, fetched);
    if (cache == FST_CACHE_AVOID && machine.direct)
        EXPECT(resident(path, 0, size) == size / 2 / PAGE, w->residency, resident(path, 0, size));
}

TEST(reader, half_of_the_chunks_in_memory) {
    look_at_machine();
    for (size_t i = 0; i < WAYS - 1; i++)
        for (int cache = 0; cache <= FST_CACHE_AVOID; cache++) IN_THE_END(read_half_cached(&ways[i], cache));
}

/* ---- Which method ------------------------------------------------------------------------------ */

/* The method after a cold chunk was asked for, with these system calls. */
static void ask_method(const char *want, fst_how how, const fake_os_options *fake) {
    const char *path = test_path("file");
    make_file(path, MIB);
    int cold = make_cold(path, 0, MIB);
    rig r;
    look_at_machine();
    fake_os_begin(fake);
    open_rig(&r, path, &(fst_reader_options){.cache = FST_CACHE_AVOID});
    fst_how got = fst_reader_choose(r.reader, 0, 0, MIB);
    fst_reader_facts facts = facts_of(&r);
    close_rig(&r);
    fake_os_end();
    if (!strncmp(want, "probe", 5) && !machine.nowait) want = "unknown (the file system cannot tell)";
    CHECK_STR(want, facts.residency);
    if (cold) EXPECT(got == (how == FST_HOW_DIRECT ? missed() : how), want, got);
}

static void method_after(const char *want, fst_how how, const fake_os_options *fake) {
    IN_THE_END(ask_method(want, how, fake));
}

TEST(reader, a_method_that_fails_gives_way_to_the_next) {
    enum { ORDINARY = FST_FS_OTHER + 1, OVERLAY = FST_FS_OVERLAY + 1, ZFS = FST_FS_OWN_CACHE + 1 };
    const unsigned no_cachestat = 1u << FAKE_OS_CACHESTAT, no_mincore = 1u << FAKE_OS_MINCORE;
    method_after("mincore (no cachestat)", FST_HOW_DIRECT,
                 &(fake_os_options){.system = ORDINARY, .refuse = no_cachestat, .refusal = ENOSYS});
    method_after("mincore (cachestat is refused)", FST_HOW_DIRECT,
                 &(fake_os_options){.system = ORDINARY, .refuse = no_cachestat, .refusal = EPERM});
    method_after("mincore (overlay file system)", FST_HOW_DIRECT, &(fake_os_options){.system = OVERLAY});
    method_after("probe (another owner's file)", FST_HOW_DIRECT,
                 &(fake_os_options){.system = ORDINARY, .stranger = 1});
    method_after("probe (another owner's file)", FST_HOW_DIRECT,
                 &(fake_os_options){.system = OVERLAY, .stranger = 1});
    method_after("probe (no mincore)", FST_HOW_DIRECT,
                 &(fake_os_options){.system = OVERLAY, .refuse = no_mincore, .refusal = ENOMEM});
    method_after(
        "probe (no mincore)", FST_HOW_DIRECT,
        &(fake_os_options){.refuse = no_cachestat | no_mincore, .refusal = ENOSYS, .system = ORDINARY});
    method_after("unknown (the file system has a cache of its own)", FST_HOW_DIRECT,
                 &(fake_os_options){.system = ZFS});
    method_after("always", FST_HOW_CACHED, &(fake_os_options){.system = FST_FS_MEMORY + 1});
}

TEST(reader, without_room_for_a_mapping_there_is_the_probe) {
    method_after("probe (no mincore)", FST_HOW_DIRECT,
                 &(fake_os_options){
                     .system = FST_FS_OVERLAY + 1, .refuse = 1u << FAKE_OS_MAP_FILE, .refusal = ENOMEM});
}

TEST(reader, a_probe_that_cannot_be_is_no_answer) {
    static const struct {
        fake_os_kind kind;
        int code;
    } cases[] = {{FAKE_OS_OPEN_PROBE, EMFILE},
                 {FAKE_OS_OPEN_PROBE, EACCES},
                 {FAKE_OS_ADVISE, EINVAL},
                 {FAKE_OS_PREAD_CACHED, EOPNOTSUPP},
                 {FAKE_OS_PREAD_CACHED, ENOSYS}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        method_after("unknown (the file system cannot tell)", FST_HOW_DIRECT,
                     &(fake_os_options){.stranger = 1,
                                        .system = FST_FS_OTHER + 1,
                                        .refuse = 1u << cases[i].kind,
                                        .refusal = cases[i].code});
}

TEST(reader, an_unknown_file_system_is_an_ordinary_one) {
    method_after(machine.cachestat ? "cachestat" : "mincore (no cachestat)", FST_HOW_DIRECT,
                 &(fake_os_options){.refuse = 1u << FAKE_OS_FILE_SYSTEM |
                                              (machine.cachestat ? 0 : 1u << FAKE_OS_CACHESTAT),
                                    .refusal = ENOSYS});
}

/* An owner that cannot be found out is another one: mincore would say that all is there. */
TEST(reader, an_unknown_owner_is_another_one) {
    method_after(
        "probe (another owner's file)", FST_HOW_DIRECT,
        &(fake_os_options){.system = FST_FS_OTHER + 1, .refuse = 1u << FAKE_OS_IS_OWNER, .refusal = EIO});
}

TEST(reader, what_is_unknown_is_read_buffered) {
    const char *path = test_path("file");
    rig r;
    make_file(path, MIB);
    make_cold(path, 0, MIB);
    fake_os_begin(&(fake_os_options){.system = FST_FS_OWN_CACHE + 1, .memory = 1});
    open_rig(&r, path, &by_default);
    CHECK_INT(FST_HOW_BUFFERED, fst_reader_choose(r.reader, 0, 0, MIB));
    close_rig(&r);
    fake_os_end();
}

static void read_warm(void) {
    const char *path = test_path("file");
    rig r;
    make_file(path, MIB);
    make_warm(path, 0, MIB);
    fake_os_begin(&(fake_os_options){0});
    open_rig(&r, path, &by_default);
    make_slots(&r, MIB / 4);
    outcome all = read_plainly(&r, MIB / 4, 0, MIB);
    int asked = fake_os_calls_of(FAKE_OS_CACHESTAT), advised = fake_os_calls_of(FAKE_OS_ADVISE),
        memory = fake_os_calls_of(FAKE_OS_MEMORY), direct = fake_os_calls_of(FAKE_OS_OPEN_DIRECT),
        probes = fake_os_calls_of(FAKE_OS_OPEN_PROBE);
    close_rig(&r);
    fake_os_end();
    EXPECT(all.chunks[FST_HOW_CACHED] == 4, "4", all.chunks[FST_HOW_CACHED]);
    if (machine.cachestat) EXPECT(asked == 4, "4", asked);
    EXPECT(advised + memory + direct + probes == 0, "none", advised + memory + direct + probes);
}

TEST(reader, a_warm_load_asks_once_a_chunk_and_for_nothing_else) {
    look_at_machine();
    if (machine.system == FST_FS_OTHER) IN_THE_END(read_warm());
}

/* ---- What becomes of a miss -------------------------------------------------------------------- */

/* What is chosen for the second half of a file whose first half is in memory. */
static fst_how chosen(const fake_os_options *fake, const fst_reader_options *options, const fst_range *ranges,
                      size_t count, fst_reader_facts *facts) {
    const char *path = test_path("file");
    rig r = {0};
    look_at_machine();
    make_file(path, 2 * MIB);
    make_cold(path, 0, 2 * MIB);
    make_warm(path, 0, MIB);
    fake_os_begin(fake);
    open_fd(&r, open(path, O_RDONLY | O_CLOEXEC), path, options, ranges, count);
    fst_how how = fst_reader_choose(r.reader, 0, MIB, MIB);
    *facts = facts_of(&r);
    close_rig(&r);
    fake_os_end();
    return how;
}

static void try_chosen(fst_how want, uint64_t memory, int stranger, const fst_reader_options *options,
                       const fst_range *ranges, size_t count) {
    fst_reader_facts facts;
    fst_how got =
        chosen(&(fake_os_options){.memory = memory, .stranger = stranger}, options, ranges, count, &facts);
    if (!machine.cold || (stranger && !machine.nowait)) return;
    if (want == FST_HOW_DIRECT) want = missed();
    EXPECT(got == want, facts.reader, memory);
}

static void check_chosen(fst_how want, uint64_t memory, int stranger, const fst_reader_options *options,
                         const fst_range *ranges, size_t count) {
    IN_THE_END(try_chosen(want, memory, stranger, options, ranges, count));
}

TEST(reader, misses_go_past_a_cache_that_has_no_room) {
    check_chosen(FST_HOW_BUFFERED, 4 * MIB, 0, &by_default, NULL, 0); /* the whole file fits in half of it */
    check_chosen(FST_HOW_BUFFERED, 4 * MIB - 8, 0, &by_default, NULL, 0); /* what is missing does */
    check_chosen(FST_HOW_BUFFERED, 2 * MIB, 0, &by_default, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 2 * MIB - 8, 0, &by_default, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 1, 0, &by_default, NULL, 0);
}

TEST(reader, what_cannot_be_counted_is_taken_for_missing) {
    check_chosen(FST_HOW_BUFFERED, 4 * MIB, 1, &by_default, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 4 * MIB - 8, 1, &by_default, NULL, 0);
}

TEST(reader, only_what_will_be_read_counts) {
    const fst_range ranges[] = {{0, 0, MIB}, {0, MIB, MIB / 2}};
    check_chosen(FST_HOW_BUFFERED, MIB, 0, &by_default, ranges, 2);
    check_chosen(FST_HOW_DIRECT, MIB - 8, 0, &by_default, ranges, 2);
    check_chosen(FST_HOW_BUFFERED, 3 * MIB, 1, &by_default, ranges, 2);
    check_chosen(FST_HOW_DIRECT, 3 * MIB - 8, 1, &by_default, ranges, 2);
}

TEST(reader, the_loads_own_memory_is_no_room_for_files) {
    check_chosen(FST_HOW_BUFFERED, 8 * MIB, 0, &(fst_reader_options){.host_bytes = 6 * MIB}, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 8 * MIB - 8, 0, &(fst_reader_options){.host_bytes = 6 * MIB}, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 8 * MIB, 0, &(fst_reader_options){.host_bytes = 16 * MIB}, NULL, 0);
}

TEST(reader, options_decide_whatever_the_memory) {
    check_chosen(FST_HOW_BUFFERED, 1, 0, &(fst_reader_options){.cache = FST_CACHE_KEEP}, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 1024 * MIB, 0, &(fst_reader_options){.cache = FST_CACHE_AVOID}, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 1024 * MIB, 0, &(fst_reader_options){.reader = FST_READER_DIRECT}, NULL, 0);
    check_chosen(FST_HOW_BUFFERED, 1024 * MIB, 0, &(fst_reader_options){.reader = FST_READER_URING}, NULL, 0);
    check_chosen(FST_HOW_DIRECT, 1, 0, &(fst_reader_options){.reader = FST_READER_THREADS}, NULL, 0);
}

TEST(reader, memory_that_is_not_known_is_enough) {
    fst_reader_facts facts;
    const fake_os_options fake = {.refuse = 1u << FAKE_OS_MEMORY, .refusal = ENOENT};
    fst_how how = chosen(&fake, &by_default, NULL, 0, &facts);
    if (machine.cold) CHECK_INT(FST_HOW_BUFFERED, how);
    if (machine.cold) CHECK_STR("threads; free memory is not known", facts.reader);
}

/* A chunk with a hole: the kernel reads what is missing. One that is mostly a hole is read anew when there is no room. */
static void choose_partly(size_t warm, uint64_t memory, fst_how want, fake_os_options fake) {
    const char *path = test_path("file");
    rig r;
    fake.memory = memory;
    make_file(path, MIB);
    make_cold(path, 0, MIB);
    make_warm(path, 0, warm);
    fake_os_begin(&fake);
    open_rig(&r, path, &by_default);
    fst_how how = fst_reader_choose(r.reader, 0, 0, MIB);
    close_rig(&r);
    fake_os_end();
    EXPECT(how == (want == FST_HOW_DIRECT ? missed() : want), "a part", warm);
}

TEST(reader, a_chunk_that_is_partly_in_memory) {
    look_at_machine();
    if (!machine.cold) test_skip(0, "nothing can be driven out of memory here");
    for (size_t k = 0; k < 2; k++) { /* cachestat and mincore */
        IN_THE_END(choose_partly(MIB - PAGE, 1, FST_HOW_BUFFERED, ways[k].fake));
        IN_THE_END(choose_partly(PAGE, 1, FST_HOW_DIRECT, ways[k].fake));
        IN_THE_END(choose_partly(PAGE, 1024 * MIB, FST_HOW_BUFFERED, ways[k].fake));
        IN_THE_END(choose_partly(MIB, 1, FST_HOW_CACHED, ways[k].fake));
    }
}

static void choose_ends(void) {
    const char *path = test_path("file");
    static const struct {
        size_t offset, nbytes;
        fst_how how;
    } cases[] = {{PAGE, 2 * PAGE, FST_HOW_CACHED},  {PAGE + 5, 10, FST_HOW_CACHED},
                 {PAGE - 1, 10, FST_HOW_BUFFERED},  {2 * PAGE, PAGE + 1, FST_HOW_BUFFERED},
                 {3 * PAGE - 1, 1, FST_HOW_CACHED}, {MIB, 100, FST_HOW_CACHED},
                 {MIB - 1, 101, FST_HOW_BUFFERED},  {0, 0, FST_HOW_CACHED},
                 {MIB + 100, 0, FST_HOW_CACHED},    {MIB + 50, 1000, FST_HOW_CACHED}};
    rig r;
    make_file(path, MIB + 100);
    make_cold(path, 0, MIB + 100);
    make_warm(path, PAGE, 2 * PAGE);
    make_warm(path, MIB, 100);
    open_rig(&r, path, &(fst_reader_options){.cache = FST_CACHE_KEEP});
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        EXPECT(fst_reader_choose(r.reader, 0, cases[i].offset, cases[i].nbytes) == cases[i].how, "case", i);
    close_rig(&r);
}

TEST(reader, pages_at_the_ends_of_a_chunk_count) {
    look_at_machine();
    if (!machine.cold) test_skip(0, "nothing can be driven out of memory here");
    IN_THE_END(choose_ends());
}

static void look_ahead(int cache) {
    const char *path = test_path("file");
    rig r;
    make_file(path, 8 * MIB);
    make_cold(path, 0, 8 * MIB);
    open_rig(&r, path, &(fst_reader_options){.cache = cache});
    fst_how how = fst_reader_ahead(r.reader, 0, 4 * MIB + 5, 4 * MIB - 10);
    for (int i = 0; cache != FST_CACHE_AVOID && i < 2000 && resident(path, 4 * MIB, 4 * MIB) < MIB / 1024;
         i++)
        usleep(1000);
    close_rig(&r);
    size_t before = resident(path, 0, 4 * MIB), there = resident(path, 4 * MIB, 4 * MIB);
    EXPECT(how == (cache == FST_CACHE_AVOID ? missed() : FST_HOW_BUFFERED), "cache", cache);
    EXPECT(there == (cache == FST_CACHE_AVOID ? 0 : 4 * MIB / PAGE), "cache", there);
    EXPECT(before == 0, "what lies before", before);
}

TEST(reader, ahead_begins_to_read_what_will_be_kept) {
    look_at_machine();
    if (!machine.cold) test_skip(0, "nothing can be driven out of memory here");
    for (int cache = 0; cache <= FST_CACHE_AVOID; cache++) IN_THE_END(look_ahead(cache));
}

static void probe_again_and_again(void) {
    const char *path = test_path("file");
    make_file(path, MIB);
    make_cold(path, 0, MIB);
    for (int i = 0; i < 4; i++) {
        rig r;
        fake_os_begin(&(fake_os_options){.stranger = 1});
        open_rig(&r, path, &by_default);
        fst_how how = fst_reader_choose(r.reader, 0, 0, MIB);
        close_rig(&r);
        fake_os_end();
        EXPECT(how == FST_HOW_BUFFERED, "turn", i);
        usleep(20000); /* what the probe asked the disk for has come */
    }
}

TEST(reader, a_chunk_that_was_only_probed_is_not_in_memory) {
    look_at_machine();
    if (!machine.cold) test_skip(0, "nothing can be driven out of memory here");
    IN_THE_END(probe_again_and_again());
}

static void read_without_advice(void) {
    const char *path = test_path("file");
    rig r;
    make_file(path, 8 * MIB);
    make_cold(path, 0, 8 * MIB);
    fake_os_begin(&(fake_os_options){.no_readahead = 1});
    open_rig(&r, path, &by_default);
    make_slots(&r, MIB);
    outcome all = read_plainly(&r, MIB / 4, 0, MIB / 4);
    close_rig(&r);
    fake_os_end();
    CHECK(!all.error && !all.wrong);
    EXPECT(resident(path, 0, MIB / 4) == MIB / 4 / PAGE, "what was read", 0);
    EXPECT(resident(path, MIB / 4, 7 * MIB) == 0, "what was not", resident(path, MIB / 4, 7 * MIB));
}

TEST(reader, the_kernel_reads_nothing_that_was_not_asked_for) {
    look_at_machine();
    if (!machine.cold) test_skip(0, "nothing can be driven out of memory here");
    IN_THE_END(read_without_advice());
}

/* ---- O_DIRECT ---------------------------------------------------------------------------------- */

/* One read of [offset, offset + nbytes), by the ring if there is one. */
static ssize_t read_one(rig *r, fst_how *how, uint64_t offset, size_t nbytes) {
    uint64_t tag = 0;
    ssize_t got;
    if (!r->ring) return fst_reader_read(r->reader, how, 0, r->slots[0], offset, nbytes);
    CHECK_INT(0, fst_reader_submit(r->reader, r->ring, 0x1234567890, *how, 0, r->slots[0], offset, nbytes));
    CHECK_INT(0, fst_reader_wait(r->reader, r->ring, &tag, &got, how));
    CHECK_INT(0x1234567890, tag);
    return got;
}

static void check_one(rig *r, fst_how how, size_t size, uint64_t offset, size_t nbytes) {
    size_t left = offset < size ? size - offset : 0, want = nbytes < left ? nbytes : left;
    memset(r->slots[0], 0xEE, r->room);
    fst_how used = how;
    ssize_t got = read_one(r, &used, offset, nbytes);
    if (got != (ssize_t)want || (want && memcmp(r->slots[0] + offset % PAGE, content + offset, want) != 0))
        test_fail(__FILE__, __LINE__, "how %d, ring %d: %zu bytes at %llu of %zu: got %zd", how,
                  r->ring != NULL, nbytes, (unsigned long long)offset, size, got);
    CHECK_INT(how == FST_HOW_DIRECT ? missed() : how, used);
    for (size_t i = nbytes + 2 * PAGE; i < r->room; i++) CHECK_INT(0xEE, r->slots[0][i]);
}

TEST(reader, all_borders_of_pages_and_sectors) {
    static const size_t edges[] = {0,          1,        511,  512,      513,       1024,
                                   PAGE - 512, PAGE - 1, PAGE, PAGE + 1, PAGE + 512};
    static const size_t sizes[] = {0,        1,    100,      511,      512,           513,
                                   PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 700};
    const char *path = test_path("file");
    for (size_t f = 0; f < sizeof sizes / sizeof *sizes; f++)
        for (int ring = 0; ring < 2; ring++) {
            size_t size = sizes[f];
            rig r;
            make_file(path, size);
            open_rig(&r, path, &(fst_reader_options){.cache = FST_CACHE_AVOID});
            make_slots(&r, 4 * PAGE);
            if (ring) make_ring(&r);
            for (fst_how how = FST_HOW_CACHED; how <= FST_HOW_DIRECT; how++)
                for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
                    for (size_t k = 0; k < sizeof edges / sizeof *edges; k++) {
                        check_one(&r, how, size, edges[i], edges[k]);
                        check_one(&r, how, size, PAGE + edges[i], PAGE + edges[k]);
                        if (edges[i] <= size)
                            check_one(&r, how, size, edges[i], size - edges[i]); /* to its end */
                        if (edges[k] <= size) check_one(&r, how, size, size - edges[k], edges[k]);
                    }
            close_rig(&r);
        }
}

TEST(reader, a_direct_read_is_one_system_call) {
    static const size_t offsets[] = {0, 1, 4095, 4096, 5000}, sizes[] = {1, 4095, 4096, 4097, 20000};
    const char *path = test_path("file");
    rig r;
    look_at_machine();
    if (!machine.direct) test_skip(0, "no O_DIRECT here");
    make_file(path, 25000);
    fake_os_begin(&(fake_os_options){0});
    open_rig(&r, path, &by_default);
    make_slots(&r, 20000);
    check_one(&r, FST_HOW_DIRECT, 25000, 0, 10); /* opens the file again */
    int calls = fake_os_calls(), direct = fake_os_calls_of(FAKE_OS_PREAD_DIRECT);
    for (int i = 0; i < 25; i++) check_one(&r, FST_HOW_DIRECT, 25000, offsets[i / 5], sizes[i % 5]);
    calls = fake_os_calls() - calls, direct = fake_os_calls_of(FAKE_OS_PREAD_DIRECT) - direct;
    close_rig(&r);
    fake_os_end();
    CHECK_INT(25, direct);
    CHECK_INT(25, calls);
}

TEST(reader, gathered_bytes_go_to_any_address) {
    const char *path = test_path("file");
    unsigned char out[1024];
    rig r;
    make_file(path, 3 * PAGE);
    open_rig(&r, path, &by_default);
    for (size_t shift = 0; shift < 17; shift++)
        for (fst_how how = FST_HOW_CACHED; how <= FST_HOW_DIRECT; how++) {
            fst_how used = how;
            CHECK_INT(777, fst_reader_gather(r.reader, &used, 0, out + shift,
                                             &(fst_segments){4000 + shift, 0, 1, 777}));
            CHECK_BYTES(content + 4000 + shift, out + shift, 777);
            CHECK_INT(how == FST_HOW_DIRECT ? FST_HOW_BUFFERED : how, used);
        }
    fst_how how = FST_HOW_CACHED;
    CHECK_INT(96, fst_reader_gather(r.reader, &how, 0, out, &(fst_segments){3 * PAGE - 96, 0, 1, 777}));
    CHECK_INT(17 * 777 + 96, facts_of(&r).cached);
    CHECK_INT(2 * 17 * 777, facts_of(&r).buffered);
    close_rig(&r);
}

TEST(reader, a_file_cut_short_ends_where_it_ends) {
    const char *path = test_path("file");
    for (int ring = 0; ring < 2; ring++)
        for (fst_how how = FST_HOW_CACHED; how <= FST_HOW_DIRECT; how++) {
            rig r;
            make_file(path, MIB);
            open_rig(&r, path, &(fst_reader_options){.cache = FST_CACHE_AVOID});
            make_slots(&r, MIB);
            if (ring) make_ring(&r);
            CHECK_INT(0, truncate(path, 10 * PAGE + 77));
            fst_how used = how;
            CHECK_INT(9 * PAGE + 72, read_one(&r, &used, PAGE + 5, MIB / 2));
            CHECK_BYTES(content + PAGE + 5, r.slots[0] + 5, 9 * PAGE + 72);
            used = how;
            CHECK_INT(0, read_one(&r, &used, MIB / 2, 1000));
            fst_reader_choose(r.reader, 0, MIB / 2, MIB / 2);
            close_rig(&r);
        }
}

/* ---- O_DIRECT that is refused ------------------------------------------------------------------ */

static void try_refused(const fake_os_options *fake, int at_open, int ring) {
    const char *path = test_path("file");
    rig r;
    look_at_machine();
    make_file(path, MIB);
    make_cold(path, 0, MIB);
    fake_os_begin(fake);
    open_rig(&r, path, &(fst_reader_options){.cache = FST_CACHE_AVOID});
    make_slots(&r, MIB);
    if (ring) make_ring(&r);
    for (int turn = 0; turn < 2; turn++) {
        size_t at = (size_t)turn * MIB / 2;
        fst_how how = fst_reader_choose(r.reader, 0, at, MIB / 2);
        if (machine.cold) EXPECT(how == (at_open || turn ? FST_HOW_BUFFERED : FST_HOW_DIRECT), "turn", turn);
        how = FST_HOW_DIRECT;
        CHECK_INT(MIB / 2, read_one(&r, &how, at, MIB / 2));
        CHECK_INT(FST_HOW_BUFFERED, how);
        CHECK_BYTES(content + at, r.slots[0], MIB / 2);
    }
    fst_reader_facts facts = facts_of(&r);
    close_rig(&r);
    int opened = fake_os_calls_of(FAKE_OS_OPEN_DIRECT);
    fake_os_end();
    CHECK_INT(MIB, facts.buffered);
    CHECK(strstr(facts.reader, "; 1 files without O_DIRECT") != NULL);
    CHECK(opened <= 1);
    size_t stays = resident(path, 0, MIB);
    if (machine.cold) EXPECT(stays == 0, "what was not there before", stays);
}

static void check_refused(const fake_os_options *fake, int at_open, int ring) {
    IN_THE_END(try_refused(fake, at_open, ring));
}

TEST(reader, a_file_system_that_refuses_to_open_for_o_direct) {
    static const int codes[] = {EINVAL, EOPNOTSUPP, EMFILE, EACCES, ENOENT};
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        for (int ring = 0; ring < 2; ring++)
            check_refused(&(fake_os_options){.refuse = 1u << FAKE_OS_OPEN_DIRECT, .refusal = codes[i]}, 1,
                          ring);
}

TEST(reader, a_file_system_that_refuses_to_read_for_o_direct) {
    static const int codes[] = {EINVAL, EOPNOTSUPP};
    look_at_machine();
    if (!machine.direct) test_skip(0, "no O_DIRECT here");
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        check_refused(&(fake_os_options){.refuse = 1u << FAKE_OS_PREAD_DIRECT, .refusal = codes[i]}, 0, 0);
    if (machine.uring)
        check_refused(&(fake_os_options){.kind = FAKE_OS_URING_RESULT, .fail_at = 1, .error = EINVAL}, 0, 1);
}

TEST(reader, alignments_that_a_slot_does_not_have) {
    check_refused(&(fake_os_options){.alignment = -1}, 1, 0); /* statx: no O_DIRECT for this file */
    check_refused(&(fake_os_options){.alignment = 8192}, 1, 0);
    check_refused(&(fake_os_options){.alignment = 520}, 1, 0);
}

TEST(reader, a_kernel_that_does_not_tell_the_alignment) {
    fst_reader_facts facts;
    const fake_os_options fake = {.refuse = 1u << FAKE_OS_ALIGNMENT, .refusal = ENOSYS};
    fst_how how = chosen(&fake, &(fst_reader_options){.cache = FST_CACHE_AVOID}, NULL, 0, &facts);
    if (machine.cold) CHECK_INT(missed(), how);
}

TEST(reader, a_path_that_is_another_file_by_now) { check_refused(&(fake_os_options){.replaced = 1}, 1, 0); }

static void read_refused(void) {
    const char *path = test_path("file");
    rig r;
    make_file(path, MIB);
    make_cold(path, 0, MIB);
    make_warm(path, 0, MIB / 4 + MIB / 8); /* a chunk, and half of one */
    fake_os_begin(&(fake_os_options){.refuse = 1u << FAKE_OS_OPEN_DIRECT, .refusal = EINVAL});
    open_rig(&r, path, &(fst_reader_options){.cache = FST_CACHE_AVOID});
    make_slots(&r, MIB / 4);
    outcome all = read_plainly(&r, MIB / 4, 0, MIB);
    close_rig(&r);
    fake_os_end();
    CHECK(!all.error && !all.wrong);
    EXPECT(resident(path, 0, 3 * MIB / 8) == 3 * MIB / 8 / PAGE, "what was there", 0);
    EXPECT(resident(path, MIB / 2, MIB / 2) == 0, "what was not there", 0);
}

TEST(reader, what_was_in_memory_stays_where_o_direct_is_refused) {
    look_at_machine();
    if (!machine.cold) test_skip(0, "nothing can be driven out of memory here");
    IN_THE_END(read_refused());
}

/* ---- Calls that fail --------------------------------------------------------------------------- */

TEST(reader, short_and_interrupted_reads_are_continued) {
    const char *path = test_path("file");
    const size_t size = 70000;
    for (int ring = 0; ring < 2; ring++)
        for (int cache = FST_CACHE_KEEP; cache <= FST_CACHE_AVOID; cache++) {
            rig r;
            make_file(path, size);
            make_cold(path, 0, size);
            fake_os_begin(&(fake_os_options){.short_reads = 1});
            open_rig(&r, path, &(fst_reader_options){.cache = cache});
            make_slots(&r, 20000);
            if (ring) make_ring(&r);
            outcome all = read_file(&r, 20000, 5, size);
            fst_reader_facts facts = facts_of(&r);
            close_rig(&r);
            fake_os_end();
            CHECK(!all.error && !all.wrong);
            CHECK_INT(size - 5, facts.cached + facts.buffered + facts.direct);
            CHECK(!strstr(facts.reader, "without O_DIRECT") || !machine.direct);
        }
}

/* Whatever fails: either the bytes are right, or it is said; and nothing is held. */
static void fail_each(fake_os_kind kind, int code, int ring, int stranger, const fst_reader_options *options,
                      int *reached) {
    const char *path = test_path("file");
    const size_t size = MIB / 4 + 5, chunk = MIB / 16;
    make_file(path, size);
    for (int at = 1, more = 1; more; at++) {
        rig r = {0};
        fst_file_type type;
        fst_error error;
        make_cold(path, 0, size);
        make_warm(path, chunk, chunk);
        r.fd = open(path, O_RDONLY | O_CLOEXEC);
        r.path = path;
        CHECK_INT(0, fst_os_calls.identify(r.fd, &r.id, &type));
        make_slots(&r, chunk);
        fake_os_begin(&(fake_os_options){.kind = kind, .fail_at = at, .error = code, .stranger = stranger});
        CHECK_INT(FST_OK, fst_reader_new(&r.fd, &r.id, &r.path, 1, NULL, 0, options, &r.reader, &error));
        if (ring) make_ring(&r);
        outcome all = read_file(&r, chunk, 0, size);
        more = fake_os_calls_of(kind) >= at;
        *reached += more;
        close_rig(&r);
        fake_os_end();
        CHECK(!all.wrong);
        int may_fail = kind == FAKE_OS_NEEDED || kind == FAKE_OS_PREAD_DIRECT ||
                       kind == FAKE_OS_URING_RESULT || kind == FAKE_OS_URING_WAIT;
        if (!more || !may_fail || code == EINTR) CHECK_INT(0, all.error);
        if (all.error) CHECK_INT(-code, all.error);
    }
}

TEST(reader, every_system_call_may_fail) {
    static const int codes[] = {EIO, EINVAL, ENOMEM, EINTR};
    look_at_machine();
    int reached[FAKE_OS_KINDS] = {0};
    for (int kind = 0; kind < FAKE_OS_KINDS; kind++)
        for (int ring = 0; ring < 2; ring++)
            for (int cache = 0; cache <= FST_CACHE_AVOID; cache++)
                for (int i = 0; i < (cache == FST_CACHE_AVOID ? 4 : 1); i++)
                    for (int stranger = 0; stranger < 2; stranger++)
                        fail_each((fake_os_kind)kind, codes[i], ring, stranger,
                                  &(fst_reader_options){.cache = cache}, &reached[kind]);
    static const fake_os_kind always[] = {FAKE_OS_NEEDED, FAKE_OS_FILE_SYSTEM, FAKE_OS_IS_OWNER};
    static const fake_os_kind cold[] = {FAKE_OS_ADVISE, FAKE_OS_MEMORY, FAKE_OS_PREAD_CACHED,
                                        FAKE_OS_OPEN_PROBE};
    static const fake_os_kind direct[] = {FAKE_OS_OPEN_DIRECT, FAKE_OS_PREAD_DIRECT, FAKE_OS_ALIGNMENT};
    static const fake_os_kind uring[] = {FAKE_OS_URING_OPEN,  FAKE_OS_URING_BUFFERS, FAKE_OS_URING_FILES,
                                         FAKE_OS_URING_FILE,  FAKE_OS_URING_READ,    FAKE_OS_URING_WAIT,
                                         FAKE_OS_URING_RESULT};
    for (size_t i = 0; i < (machine.system == FST_FS_OTHER ? 3 : 2); i++) CHECK(reached[always[i]] > 0);
    for (size_t i = 0; machine.cold && i < 4; i++) CHECK(reached[cold[i]] > 0);
    for (size_t i = 0; machine.cold && machine.direct && i < 3; i++) CHECK(reached[direct[i]] > 0);
    for (size_t i = 0; machine.uring && i < 7; i++) CHECK(reached[uring[i]] > 0);
}

TEST(reader, an_error_of_the_disk_is_the_answer) {
    const char *path = test_path("file");
    rig r;
    look_at_machine();
    make_file(path, MIB);
    for (fst_how how = FST_HOW_CACHED; how <= FST_HOW_DIRECT; how++) {
        fake_os_begin(&(fake_os_options){.kind = FAKE_OS_NEEDED, .fail_at = 1, .error = EIO});
        r = (rig){.path = path, .fd = open(path, O_RDONLY)};
        struct stat st;
        fst_error error;
        CHECK_INT(0, fstat(r.fd, &st));
        r.id = (fst_file_id){.device = st.st_dev, .inode = st.st_ino, .size = MIB};
        CHECK_INT(FST_OK, fst_reader_new(&r.fd, &r.id, &r.path, 1, NULL, 0, &by_default, &r.reader, &error));
        make_slots(&r, MIB);
        fst_how used = how;
        ssize_t got = fst_reader_read(r.reader, &used, 0, r.slots[0], 0, MIB);
        fst_reader_facts facts = facts_of(&r);
        close_rig(&r);
        fake_os_end();
        if (how != FST_HOW_DIRECT)
            CHECK_INT(-EIO, got); /* there it was the look at the file, and it is read buffered */
        else CHECK_INT(MIB, got);
        CHECK_INT(got < 0 ? 0 : MIB, facts.cached + facts.buffered + facts.direct);
    }
}

/* ---- Rings ------------------------------------------------------------------------------------- */

TEST(reader, a_ring_that_is_not_there_is_said) {
    const char *path = test_path("file");
    rig r;
    make_file(path, MIB);
    open_rig(&r, path, &(fst_reader_options){.reader = FST_READER_URING});
    fst_reader_note_ring(r.reader, "io_uring is not permitted (EPERM)");
    CHECK_STR("threads; io_uring is not permitted (EPERM)", facts_of(&r).reader);
    close_rig(&r);
}

/* A ring that did not forget still holds the last load's files: their numbers mean others now. */
TEST(reader, a_ring_never_reads_the_last_loads_files) {
    const char *one = test_path("one"), *two = test_path("two");
    rig r, next;
    look_at_machine();
    if (!machine.uring) test_skip(0, "no io_uring here");
    make_file(one, MIB);
    support_write(two, content + MIB, MIB);
    open_rig(&r, one, &by_default);
    make_slots(&r, MIB);
    make_ring(&r);
    fst_how how = FST_HOW_CACHED;
    CHECK_INT(MIB, read_one(&r, &how, 0, MIB));
    CHECK_BYTES(content, r.slots[0], MIB);
    fst_reader_free(r.reader);
    close(r.fd);
    open_rig(&next, two, &by_default);
    CHECK_INT(r.fd, next.fd);
    r.fd = -1;
    r.reader = next.reader;
    CHECK_INT(MIB, read_one(&r, &how, 0, MIB));
    CHECK_BYTES(content + MIB, r.slots[0], MIB);
    close_rig(&r);
    close(next.fd);
}

/* ---- Threads ----------------------------------------------------------------------------------- */

typedef struct part {
    rig *shared;
    unsigned number;
    int wrong;
} part;

static void *read_part(void *arg) {
    part *p = arg;
    rig mine = *p->shared;
    mine.ring = NULL;
    make_slots(&mine, 10000);
    if (p->number % 2) make_ring(&mine);
    for (size_t at = p->number * 10000; at < MIB; at += 4 * 10000) {
        size_t end = at + 10000 < MIB ? at + 10000 : MIB;
        outcome all = read_file(&mine, 10000, at, end);
        if (all.error || all.wrong) p->wrong = 1;
    }
    if (mine.ring) fst_ring_forget(mine.ring);
    fst_ring_free(mine.ring);
    free(mine.memory);
    return NULL;
}

TEST(reader, many_threads_share_one) {
    const char *path = test_path("file");
    for (size_t i = 0; i < WAYS; i++)
        for (int cache = 0; cache <= FST_CACHE_AVOID; cache += FST_CACHE_AVOID) {
            part parts[4];
            pthread_t threads[4];
            rig r;
            make_file(path, MIB);
            make_cold(path, 0, MIB);
            fake_os_begin(&ways[i].fake);
            open_rig(&r, path, &(fst_reader_options){.cache = cache});
            for (unsigned k = 0; k < 4; k++) {
                parts[k] = (part){&r, k, 0};
                CHECK_INT(0, pthread_create(&threads[k], NULL, read_part, &parts[k]));
            }
            for (unsigned k = 0; k < 4; k++) pthread_join(threads[k], NULL);
            fst_reader_facts facts = facts_of(&r);
            close_rig(&r);
            fake_os_end();
            for (unsigned k = 0; k < 4; k++) CHECK_INT(0, parts[k].wrong);
            CHECK_INT(MIB, facts.cached + facts.buffered + facts.direct);
            check_residency(ways[i].residency, &facts);
        }
}

/* ---- Facts ------------------------------------------------------------------------------------- */

TEST(reader, facts_tell_of_each_method) {
    const char *path = test_path("file");
    look_at_machine();
    make_file(path, MIB);
    int fds[3] = {open(path, O_RDONLY), memfd_create("fst", 0), memfd_create("fst", 0)};
    const char *paths[3] = {path, "memfd", "memfd"};
    fst_file_id ids[3];
    fst_file_type type;
    fst_reader *reader;
    fst_reader_facts facts;
    fst_error error;
    for (int i = 0; i < 3; i++) CHECK_INT(0, fst_os_calls.identify(fds[i], &ids[i], &type));
    fake_os_begin(&(fake_os_options){.stranger = 1});
    CHECK_INT(FST_OK, fst_reader_new(fds, ids, paths, 3, NULL, 0, &by_default, &reader, &error));
    fst_reader_describe(reader, &facts);
    fst_reader_free(reader);
    fake_os_end();
    for (int i = 0; i < 3; i++) close(fds[i]);
    if (machine.system == FST_FS_OTHER)
        CHECK_STR("always for 2, probe for 1 (another owner's file)", facts.residency);
    CHECK_STR("threads", facts.reader);
}

TEST(reader, facts_say_why) {
    fst_reader_facts facts;
    chosen(&(fake_os_options){.memory = 64 * MIB}, &by_default, NULL, 0, &facts);
    if (!machine.cold) test_skip(0, "nothing can be driven out of memory here");
    CHECK_STR("threads: at most 2.1 MB are missing and fit in half of the free memory, 33.6 MB",
              facts.reader);
    chosen(&(fake_os_options){.memory = 1000000}, &by_default, NULL, 0, &facts);
    CHECK_STR("threads: at least 1.0 MB are missing and do not fit in half of the free memory, 0.5 MB",
              facts.reader);
    chosen(&(fake_os_options){0}, &(fst_reader_options){.reader = FST_READER_DIRECT}, NULL, 0, &facts);
    CHECK_STR("threads as asked", facts.reader);
    chosen(&(fake_os_options){0}, &(fst_reader_options){.cache = FST_CACHE_AVOID}, NULL, 0, &facts);
    CHECK_STR("threads to leave the cache alone", facts.reader);
    chosen(&(fake_os_options){0}, &(fst_reader_options){.cache = FST_CACHE_KEEP}, NULL, 0, &facts);
    CHECK_STR("threads to keep all in the cache", facts.reader);
}
