#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"
#include "support.h"

#define PAGE 4096u
#define DEPTH 4u
#define SIZE (64 * PAGE + 100)

/* ---- A ring, slots and a file ------------------------------------------------------------------ */

typedef struct rig {
    fst_ring *ring;
    const char *why;
    int code, fd;
    unsigned char *memory, *content;
    struct iovec slots[DEPTH];
} rig;

#define SLOT (16 * PAGE)

static void open_ring(rig *r, const fake_os_options *fake) {
    const char *path = test_path("file");
    *r = (rig){.content = malloc(SIZE), .memory = aligned_alloc(PAGE, DEPTH * SLOT)};
    CHECK(r->content && r->memory);
    memset(r->memory, 0xEE, DEPTH * SLOT);
    support_random(r->content, SIZE, 3);
    support_write(path, r->content, SIZE);
    r->fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(r->fd >= 0);
    for (unsigned i = 0; i < DEPTH; i++) r->slots[i] = (struct iovec){r->memory + i * SLOT, SLOT};
    fake_os_begin(fake);
    r->code = fst_ring_new(DEPTH, r->slots, DEPTH, &r->ring, &r->why);
}

static void close_ring(rig *r) {
    fst_ring_free(r->ring);
    fake_os_end();
    close(r->fd);
    free(r->memory);
    free(r->content);
}

static void need_uring(void) {
    fst_uring *uring;
    if (fst_os_calls.uring_open(2, &uring)) test_skip(0, "no io_uring here");
    fst_os_calls.uring_close(uring);
}

static fst_ring_read read_of(const rig *r, unsigned slot, size_t nbytes, uint64_t offset) {
    return (fst_ring_read){.tag = 100 + slot,
                           .load = 1,
                           .fd = r->fd,
                           .data = r->slots[slot].iov_base,
                           .nbytes = nbytes,
                           .offset = offset};
}

static void check_read(rig *r, unsigned slot, size_t nbytes, uint64_t offset) {
    fst_ring_read read = read_of(r, slot, nbytes, offset), done;
    ssize_t result;
    size_t left = offset < SIZE ? SIZE - offset : 0, want = nbytes < left ? nbytes : left;
    CHECK_INT(0, fst_ring_submit(r->ring, &read));
    CHECK_INT(1, fst_ring_in_flight(r->ring));
    CHECK_INT(0, fst_ring_wait(r->ring, &done, &result));
    CHECK_INT(0, fst_ring_in_flight(r->ring));
    CHECK_INT(want, result);
    CHECK_INT(100 + slot, done.tag);
    CHECK_BYTES(r->content + offset, r->slots[slot].iov_base, want);
}

/* ---- Setting up -------------------------------------------------------------------------------- */

TEST(ring, reads_into_registered_slots) {
    rig r;
    need_uring();
    open_ring(&r, &(fake_os_options){0});
    CHECK_INT(0, r.code);
    for (unsigned i = 0; i < DEPTH; i++) check_read(&r, i, SLOT - i, 1000 * i);
    check_read(&r, 0, 1, SIZE - 1);
    check_read(&r, 0, 1000, SIZE - 1);
    check_read(&r, 0, 1000, SIZE + 5);
    check_read(&r, 0, 0, 0);
    int placed = fake_os_calls_of(FAKE_OS_URING_FILE);
    close_ring(&r);
    CHECK_INT(1, placed); /* the file was registered, once */
}

TEST(ring, what_the_kernel_refuses_is_said) {
    static const struct {
        int code;
        const char *why;
    } cases[] = {{EPERM, "io_uring is not permitted (EPERM)"},
                 {ENOSYS, "the kernel has no io_uring (ENOSYS)"},
                 {EINVAL, "the kernel's io_uring is too old (EINVAL)"},
                 {ENOMEM, "no memory for io_uring (ENOMEM)"},
                 {EMFILE, "io_uring cannot be set up"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rig r;
        open_ring(&r, &(fake_os_options){.refuse = 1u << FAKE_OS_URING_OPEN, .refusal = cases[i].code});
        int code = r.code, there = r.ring != NULL;
        const char *why = r.why;
        close_ring(&r);
        CHECK_INT(-cases[i].code, code);
        CHECK_INT(0, there);
        CHECK_STR(cases[i].why, why);
    }
}

TEST(ring, does_without_registered_buffers) {
    static const int codes[] = {ENOMEM, EOPNOTSUPP, EINVAL};
    need_uring();
    for (size_t i = 0; i < 3; i++) {
        rig r;
        open_ring(&r, &(fake_os_options){.refuse = 1u << FAKE_OS_URING_BUFFERS, .refusal = codes[i]});
        CHECK_INT(0, r.code);
        CHECK(strstr(r.why, "without registered buffers") != NULL);
        check_read(&r, 1, SLOT, 77);
        close_ring(&r);
    }
}

TEST(ring, does_without_registered_files) {
    static const fake_os_kind kinds[] = {FAKE_OS_URING_FILES, FAKE_OS_URING_FILE};
    need_uring();
    for (size_t i = 0; i < 2; i++) {
        rig r;
        open_ring(&r, &(fake_os_options){.refuse = 1u << kinds[i], .refusal = EMFILE});
        CHECK_INT(0, r.code);
        CHECK(!r.why);
        check_read(&r, 1, SLOT, 77);
        check_read(&r, 1, SLOT, 78);
        int asked = fake_os_calls_of(kinds[i]);
        close_ring(&r);
        CHECK_INT(1, asked);
    }
}

TEST(ring, memory_that_is_not_a_slot) {
    rig r;
    unsigned char other[1000];
    need_uring();
    open_ring(&r, &(fake_os_options){0});
    r.slots[0].iov_base = other; /* not in the ring's own list */
    check_read(&r, 0, sizeof other, 5);
    r.slots[0].iov_base = r.memory + SLOT / 2; /* half in one, half in the next */
    check_read(&r, 0, SLOT, 5);
    close_ring(&r);
}

TEST(ring, without_slots) {
    rig r;
    fst_ring *ring;
    need_uring();
    open_ring(&r, &(fake_os_options){0});
    CHECK_INT(0, fst_ring_new(1, NULL, 0, &ring, &r.why));
    CHECK(!r.why);
    fst_ring *first = r.ring;
    r.ring = ring;
    check_read(&r, 2, 500, 5);
    fst_ring_free(first);
    close_ring(&r);
}

/* ---- Reads ------------------------------------------------------------------------------------- */

TEST(ring, takes_as_many_as_it_is_deep) {
    rig r;
    unsigned seen = 0;
    fst_ring_read read, done;
    ssize_t result;
    need_uring();
    open_ring(&r, &(fake_os_options){0});
    CHECK_INT(-ENOENT, fst_ring_wait(r.ring, &done, &result));
    for (unsigned i = 0; i < DEPTH; i++) {
        read = read_of(&r, i, PAGE, i * PAGE);
        CHECK_INT(0, fst_ring_submit(r.ring, &read));
    }
    CHECK_INT(-EBUSY, fst_ring_submit(r.ring, &read));
    for (unsigned i = 0; i < DEPTH; i++) {
        CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
        CHECK_INT(PAGE, result);
        CHECK_BYTES(r.content + (done.tag - 100) * PAGE, done.data, PAGE);
        seen |= 1u << (done.tag - 100);
    }
    CHECK_INT(15, seen);
    CHECK_INT(-ENOENT, fst_ring_wait(r.ring, &done, &result));
    close_ring(&r);
}

TEST(ring, continues_short_reads_and_repeats_interrupted_ones) {
    rig r;
    need_uring();
    open_ring(&r, &(fake_os_options){.short_reads = 1});
    for (unsigned i = 0; i < 50; i++) check_read(&r, i % DEPTH, SLOT - i, 1000 * i);
    close_ring(&r);
}

/* io_uring may say so for ever where pread waits. */
TEST(ring, a_read_that_is_refused_again_and_again_is_done_by_pread) {
    static const int codes[] = {EAGAIN, EINTR};
    need_uring();
    for (size_t i = 0; i < 2; i++) {
        rig r;
        open_ring(&r, &(fake_os_options){.refuse = 1u << FAKE_OS_URING_RESULT, .refusal = codes[i]});
        check_read(&r, 0, SLOT, 12345);
        int reads = fake_os_calls_of(FAKE_OS_URING_READ), plain = fake_os_calls();
        close_ring(&r);
        CHECK_INT(3, reads);
        CHECK_INT(1, plain);
    }
}

TEST(ring, an_error_is_the_result) {
    rig r;
    ssize_t result;
    need_uring();
    open_ring(&r, &(fake_os_options){.kind = FAKE_OS_URING_RESULT, .fail_at = 1, .error = EIO});
    fst_ring_read read = read_of(&r, 0, PAGE, 0), done;
    CHECK_INT(0, fst_ring_submit(r.ring, &read));
    CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
    CHECK_INT(-EIO, result);
    check_read(&r, 0, PAGE, 0); /* and the ring goes on */
    close_ring(&r);
}

TEST(ring, a_real_error_of_the_kernel) {
    rig r;
    ssize_t result;
    need_uring();
    open_ring(&r, &(fake_os_options){0});
    fst_ring_read read = read_of(&r, 0, PAGE, 0), done;
    read.fd = open("/", O_RDONLY | O_CLOEXEC);
    CHECK_INT(0, fst_ring_submit(r.ring, &read));
    close(read.fd);
    CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
    CHECK_INT(-EISDIR, result);
    close_ring(&r);
}

/* What was handed over may be under way or not: nothing is submitted any more. */
TEST(ring, a_submission_that_fails_is_a_pread) {
    rig r;
    need_uring();
    open_ring(&r, &(fake_os_options){.kind = FAKE_OS_URING_READ, .fail_at = 2, .error = EAGAIN});
    for (unsigned i = 0; i < 5; i++) check_read(&r, i % DEPTH, SLOT, 100 * i);
    int submitted = fake_os_calls_of(FAKE_OS_URING_READ), plain = fake_os_calls();
    close_ring(&r);
    CHECK_INT(2, submitted);
    CHECK_INT(4, plain);
}

TEST(ring, a_submission_that_fails_where_pread_fails_too) {
    rig r;
    ssize_t result;
    need_uring();
    open_ring(&r,
              &(fake_os_options){.refuse = 1u << FAKE_OS_URING_READ | 1u << FAKE_OS_NEEDED, .refusal = EIO});
    fst_ring_read read = read_of(&r, 0, PAGE, 0), done;
    CHECK_INT(0, fst_ring_submit(r.ring, &read));
    CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
    CHECK_INT(-EIO, result);
    close_ring(&r);
}

TEST(ring, waiting_that_is_interrupted_goes_on) {
    rig r;
    need_uring();
    open_ring(&r, &(fake_os_options){.kind = FAKE_OS_URING_WAIT, .fail_at = 1, .error = EINTR});
    check_read(&r, 0, PAGE, 5);
    close_ring(&r);
}

TEST(ring, a_direct_read_that_ends_inside_a_page_is_the_callers) {
    rig r;
    ssize_t result;
    need_uring();
    open_ring(&r, &(fake_os_options){0});
    fst_ring_read read = read_of(&r, 0, 2 * PAGE, 63 * PAGE), done;
    read.direct = 1; /* the descriptor need not be: what counts is where it ended */
    CHECK_INT(0, fst_ring_submit(r.ring, &read));
    CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
    int reads = fake_os_calls_of(FAKE_OS_URING_READ);
    close_ring(&r);
    CHECK_INT(PAGE + 100, result);
    CHECK_INT(1, reads);
}

/* ---- What is under way, and what is held ------------------------------------------------------- */

static struct {
    int fd;
    atomic_int written;
} later;

static void *write_later(void *arg) {
    usleep(50000);
    atomic_store(&later.written, 1);
    if (write(later.fd, "late", 4) != 4) test_note(__FILE__, __LINE__, "cannot write");
    return arg;
}

/* Frees a ring while a read waits for a pipe, after a wait that failed when `broken`. */
static void free_early(int broken) {
    rig r;
    int ends[2];
    pthread_t thread;
    ssize_t result;
    need_uring();
    open_ring(&r, &(fake_os_options){.kind = FAKE_OS_URING_WAIT, .fail_at = broken, .error = EIO});
    CHECK_INT(0, pipe2(ends, O_CLOEXEC));
    fst_ring_read read = read_of(&r, 0, 4, 0), done;
    read.fd = ends[0];
    CHECK_INT(0, fst_ring_submit(r.ring, &read));
    later.fd = ends[1];
    atomic_store(&later.written, 0);
    CHECK_INT(0, pthread_create(&thread, NULL, write_later, NULL));
    for (int i = 0; broken && i < 2; i++) CHECK_INT(-EIO, fst_ring_wait(r.ring, &done, &result));
    fst_ring_free(r.ring);
    r.ring = NULL;
    int written = atomic_load(&later.written), arrived = memcmp(r.memory, "late", 4) == 0;
    pthread_join(thread, NULL);
    close(ends[0]);
    close(ends[1]);
    close_ring(&r);
    CHECK(written && arrived);
}

TEST(ring, free_waits_for_what_is_under_way) { free_early(0); }

/* Waiting failed: the slot may be written to still. So it is tried again before the ring goes. */
TEST(ring, a_ring_that_broke_is_waited_for_again) { free_early(1); }

/* A pipe says whether anybody still holds its other end. */
static int is_held(int writing_end) {
    for (int i = 0; i < 1000; i++) { /* the kernel lets go a moment later */
        if (write(writing_end, "x", 1) < 0) return 0;
        usleep(1000);
    }
    return 1;
}

TEST(ring, forget_lets_go_of_files) {
    rig r;
    int ends[2];
    ssize_t result;
    need_uring();
    void (*before)(int) = signal(SIGPIPE, SIG_IGN);
    for (int how = 0; how < 3; how++) {
        open_ring(&r, &(fake_os_options){0});
        CHECK_INT(0, pipe2(ends, O_CLOEXEC));
        CHECK_INT(4, write(ends[1], "data", 4));
        fst_ring_read read = read_of(&r, 0, 4, 0), done;
        read.fd = ends[0];
        CHECK_INT(0, fst_ring_submit(r.ring, &read));
        CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
        CHECK_INT(4, result);
        CHECK_BYTES("data", r.memory, 4);
        close(ends[0]);
        CHECK_INT(1, write(ends[1], "x", 1)); /* the ring does hold it: this test can fail */
        if (how == 0) fst_ring_forget(r.ring);
        if (how == 1) { /* the next load has other files */
            read = read_of(&r, 0, PAGE, 0);
            read.load = 2;
            CHECK_INT(0, fst_ring_submit(r.ring, &read));
            CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
            CHECK_BYTES(r.content, r.memory, PAGE);
        }
        if (how == 2) {
            fst_ring_free(r.ring);
            r.ring = NULL;
        }
        int held = is_held(ends[1]);
        close(ends[1]);
        close_ring(&r);
        CHECK_INT(0, held);
    }
    signal(SIGPIPE, before);
}

/* More files than places: each goes where another was. */
TEST(ring, many_files_share_the_places) {
    rig r;
    char name[16];
    int fds[100];
    need_uring();
    open_ring(&r, &(fake_os_options){0});
    for (int i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "f%d", i);
        support_write(test_path(name), r.content + i, 1000);
        fds[i] = open(test_path(name), O_RDONLY | O_CLOEXEC);
        CHECK(fds[i] >= 0);
    }
    for (int turn = 0; turn < 300; turn++) {
        int i = turn * 37 % 100;
        ssize_t result;
        fst_ring_read read = read_of(&r, (unsigned)turn % DEPTH, 1000, 0), done;
        read.fd = fds[i];
        read.file = (unsigned)i;
        CHECK_INT(0, fst_ring_submit(r.ring, &read));
        CHECK_INT(0, fst_ring_wait(r.ring, &done, &result));
        CHECK_INT(1000, result);
        CHECK_BYTES(r.content + i, done.data, 1000);
    }
    fst_ring_forget(r.ring);
    for (int i = 0; i < 100; i++) close(fds[i]);
    close_ring(&r);
}
