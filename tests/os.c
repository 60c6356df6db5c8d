#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness.h"
#include "support.h"

/* ---- A pread and a pwrite that go by a script ------------------------------------------------ */

static const char source[] = "0123456789";
static char sink[16];
static const ssize_t *script; /* what each call returns; a positive number is the most that it moves */
static int calls;

static ssize_t scripted_pread(int fd, void *buffer, size_t size, uint64_t offset) {
    (void)fd;
    ssize_t most = script[calls++];
    if (most <= 0) return most;
    if ((size_t)most < size) size = (size_t)most;
    if (size > sizeof source - 1 - offset) size = sizeof source - 1 - offset;
    memcpy(buffer, source + offset, size);
    return (ssize_t)size;
}

static ssize_t scripted_pwrite(int fd, const void *buffer, size_t size, uint64_t offset) {
    (void)fd;
    ssize_t most = script[calls++];
    if (most <= 0) return most;
    if ((size_t)most < size) size = (size_t)most;
    memcpy(sink + offset, buffer, size);
    return (ssize_t)size;
}

static ssize_t read_by(const ssize_t *results, void *buffer, size_t size, uint64_t offset) {
    fst_os before = fst_os_calls;
    fst_os_calls.pread = scripted_pread;
    script = results;
    calls = 0;
    ssize_t got = fst_os_read_all(-1, buffer, size, offset);
    fst_os_calls = before;
    return got;
}

static int write_by(const ssize_t *results, const void *buffer, size_t size, uint64_t offset) {
    fst_os before = fst_os_calls;
    fst_os_calls.pwrite = scripted_pwrite;
    script = results;
    calls = 0;
    memset(sink, 0, sizeof sink);
    int rc = fst_os_write_all(-1, buffer, size, offset);
    fst_os_calls = before;
    return rc;
}

TEST(os, read_all_retries_interrupted_reads) {
    char buffer[10];
    CHECK_INT(10, read_by((ssize_t[]){-EINTR, -EINTR, 99}, buffer, 10, 0));
    CHECK_BYTES(source, buffer, 10);
    CHECK_INT(3, calls);
}

TEST(os, read_all_joins_short_reads) {
    char buffer[8];
    CHECK_INT(8, read_by((ssize_t[]){1, 3, -EINTR, 2, 99}, buffer, 8, 1));
    CHECK_BYTES(source + 1, buffer, 8);
}

TEST(os, read_all_ends_at_the_end_of_the_file) {
    char buffer[10];
    CHECK_INT(4, read_by((ssize_t[]){4, 0}, buffer, 10, 0));
    CHECK_INT(2, calls);
}

TEST(os, read_all_reports_an_error_after_some_bytes) {
    char buffer[10];
    CHECK_INT(-EIO, read_by((ssize_t[]){4, -EIO}, buffer, 10, 0));
}

TEST(os, read_all_of_nothing_makes_no_call) {
    CHECK_INT(0, read_by(NULL, NULL, 0, 0));
    CHECK_INT(0, calls);
}

TEST(os, write_all_retries_interrupted_writes) {
    CHECK_INT(0, write_by((ssize_t[]){-EINTR, 99}, source, 10, 2));
    CHECK_BYTES(source, sink + 2, 10);
}

TEST(os, write_all_joins_short_writes) {
    CHECK_INT(0, write_by((ssize_t[]){1, 2, -EINTR, 3, 99}, source, 10, 0));
    CHECK_BYTES(source, sink, 10);
    CHECK_INT(5, calls);
}

TEST(os, write_all_reports_a_full_disk) {
    CHECK_INT(-ENOSPC, write_by((ssize_t[]){5, -ENOSPC}, source, 10, 0));
}

TEST(os, write_all_does_not_spin_on_a_write_of_nothing) {
    CHECK_INT(-EIO, write_by((ssize_t[]){5, 0}, source, 10, 0));
}

/* ---- Files ----------------------------------------------------------------------------------- */

TEST(os, open_read_of_a_missing_file) { CHECK_INT(-ENOENT, fst_os_calls.open_read(test_path("missing"))); }

TEST(os, open_read_does_not_wait_for_a_writer_of_a_fifo) {
    const char *path = test_path("fifo");
    CHECK_INT(0, mkfifo(path, 0600));
    int fd = fst_os_calls.open_read(path);
    CHECK(fd >= 0);
    fst_file_id id;
    fst_file_type type;
    CHECK_INT(0, fst_os_calls.identify(fd, &id, &type));
    CHECK_INT(FST_FILE_OTHER, type);
    CHECK_INT(0, fst_os_calls.close(fd));
}

TEST(os, open_read_does_not_leak_into_children) {
    const char *path = test_path("file");
    support_write(path, "x", 1);
    int fd = fst_os_calls.open_read(path);
    CHECK(fd >= 0);
    CHECK_INT(FD_CLOEXEC, fcntl(fd, F_GETFD) & FD_CLOEXEC);
    CHECK_INT(0, fst_os_calls.close(fd));
}

TEST(os, calls_on_a_closed_descriptor_fail) {
    fst_file_id id;
    fst_file_type type;
    char byte;
    CHECK_INT(-EBADF, fst_os_calls.close(-1));
    CHECK_INT(-EBADF, fst_os_calls.identify(-1, &id, &type));
    CHECK_INT(-EBADF, fst_os_calls.pread(-1, &byte, 1, 0));
    CHECK_INT(-EBADF, fst_os_calls.pwrite(-1, &byte, 1, 0));
    CHECK_INT(-EBADF, fst_os_calls.fsync(-1));
}

TEST(os, identify_tells_a_file_from_itself_after_a_change) {
    const char *path = test_path("file");
    support_write(path, "ab", 2);
    int fd = fst_os_calls.open_read(path);
    CHECK(fd >= 0);
    fst_file_id before, same, after;
    fst_file_type type;
    CHECK_INT(0, fst_os_calls.identify(fd, &before, &type));
    CHECK_INT(0, fst_os_calls.identify(fd, &same, &type));
    struct timespec times[2] = {{1, 0}, {1, 5}};
    CHECK_INT(0, futimens(fd, times));
    CHECK_INT(0, fst_os_calls.identify(fd, &after, &type));
    close(fd);
    CHECK_INT(FST_FILE_REGULAR, type);
    CHECK_INT(2, before.size);
    CHECK_BYTES(&before, &same, sizeof before);
    CHECK_INT(1000000005, after.mtime_ns);
    CHECK(before.mtime_ns != after.mtime_ns);
}

TEST(os, stat_type_follows_links) {
    fst_file_type type;
    CHECK_INT(0, symlink(test_directory(), test_path("link")));
    CHECK_INT(0, fst_os_calls.stat_type(test_path("link"), &type));
    CHECK_INT(FST_FILE_DIRECTORY, type);
    CHECK_INT(0, symlink("nowhere", test_path("dangling")));
    CHECK_INT(-ENOENT, fst_os_calls.stat_type(test_path("dangling"), &type));
    CHECK_INT(0, fst_os_calls.stat_type("/dev/null", &type));
    CHECK_INT(FST_FILE_OTHER, type);
}

TEST(os, list_is_sorted_by_bytes) {
    static const char *const names[] = {"b", "a", "B", "\xC3\xBC", "a.b", ".hidden"};
    static const char *const sorted[] = {".hidden", "B", "a", "a.b", "b", "\xC3\xBC"};
    for (size_t i = 0; i < 6; i++) support_write(test_path(names[i]), "", 0);
    char **list;
    CHECK_INT(0, fst_os_calls.list(test_directory(), &list));
    for (size_t i = 0; i < 6; i++) CHECK_STR(sorted[i], list[i]);
    CHECK(!list[6]);
    free(list);
}

TEST(os, list_of_many_names) {
    char name[128];
    for (int i = 0; i < 500; i++) {
        sprintf(name, "%03d-a-name-that-is-long-enough-to-make-the-buffer-grow-more-than-once", i);
        support_write(test_path(name), "", 0);
    }
    char **list;
    CHECK_INT(0, fst_os_calls.list(test_directory(), &list));
    size_t count = 0;
    for (; list[count]; count++) CHECK_INT((long long)count, atoi(list[count]));
    CHECK_INT(500, count);
    free(list);
}

TEST(os, list_of_an_empty_directory) {
    char **list;
    CHECK_INT(0, fst_os_calls.list(test_directory(), &list));
    CHECK(!list[0]);
    free(list);
}

TEST(os, list_of_what_is_no_directory) {
    char **list;
    support_write(test_path("file"), "", 0);
    CHECK_INT(-ENOTDIR, fst_os_calls.list(test_path("file"), &list));
    CHECK_INT(-ENOENT, fst_os_calls.list(test_path("missing"), &list));
}

/* ---- Replacing a file ------------------------------------------------------------------------ */

TEST(os, temporary_lies_beside_the_file_and_follows_the_umask) {
    char name[PATH_MAX];
    mode_t old = umask(027);
    int fd = fst_os_calls.create_temporary(test_path("out.safetensors"), name, sizeof name);
    umask(old);
    CHECK(fd >= 0);
    struct stat st;
    CHECK_INT(0, fstat(fd, &st));
    close(fd);
    CHECK_INT(0640, st.st_mode & 0777);
    const char *start = test_path(".out.safetensors.fst-");
    CHECK_INT(0, strncmp(start, name, strlen(start)));
    CHECK_INT(strlen(start) + 6, strlen(name));
}

TEST(os, temporary_names_differ) {
    char one[PATH_MAX], two[PATH_MAX];
    int first = fst_os_calls.create_temporary(test_path("out"), one, sizeof one);
    int second = fst_os_calls.create_temporary(test_path("out"), two, sizeof two);
    CHECK(first >= 0 && second >= 0);
    close(first);
    close(second);
    CHECK(strcmp(one, two));
}

TEST(os, temporary_of_the_longest_name) {
    char base[NAME_MAX + 1], name[PATH_MAX];
    memset(base, 'x', NAME_MAX);
    base[NAME_MAX] = 0;
    int fd = fst_os_calls.create_temporary(test_path(base), name, sizeof name);
    CHECK(fd >= 0);
    close(fd);
    CHECK_INT(0, fst_os_calls.rename(name, test_path(base)));
}

TEST(os, temporary_that_cannot_be) {
    char name[PATH_MAX];
    CHECK_INT(-ENOENT, fst_os_calls.create_temporary(test_path("missing/out"), name, sizeof name));
    CHECK_INT(-EISDIR, fst_os_calls.create_temporary(test_path("out/"), name, sizeof name));
    CHECK_INT(-ENAMETOOLONG, fst_os_calls.create_temporary(test_path("out"), name, 8));
}

TEST(os, rename_replaces) {
    support_write(test_path("new"), "new", 3);
    support_write(test_path("old"), "old!", 4);
    CHECK_INT(0, fst_os_calls.rename(test_path("new"), test_path("old")));
    char text[8] = {0};
    int fd = fst_os_calls.open_read(test_path("old"));
    CHECK(fd >= 0);
    CHECK_INT(3, fst_os_read_all(fd, text, sizeof text, 0));
    close(fd);
    CHECK_STR("new", text);
    CHECK_INT(-1, access(test_path("new"), F_OK));
}

TEST(os, rename_and_unlink_of_a_missing_file) {
    CHECK_INT(-ENOENT, fst_os_calls.rename(test_path("missing"), test_path("out")));
    CHECK_INT(-ENOENT, fst_os_calls.unlink(test_path("missing")));
}

/* ---- Memory and the machine ------------------------------------------------------------------ */

static int is_mapped(const char *page) {
    unsigned char resident;
    return !mincore((void *)(uintptr_t)page, 1, &resident);
}

TEST(os, map_gives_zeroed_memory_and_takes_it_back) {
    static const size_t sizes[] = {1, 4096, 4097, (2 << 20) - 1, 2 << 20, (6 << 20) + 5};
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *memory = fst_os_calls.map(sizes[i]);
        CHECK(memory);
        CHECK_INT(0, (uintptr_t)memory % page);
        CHECK_INT(0, memory[0] | memory[sizes[i] - 1]);
        memset(memory, 1, (sizes[i] + page - 1) / page * page);
        fst_os_calls.unmap(memory, sizes[i]);
        CHECK(!is_mapped(memory));
        CHECK(!is_mapped(memory + (sizes[i] - 1) / page * page));
    }
}

TEST(os, map_of_a_huge_page_starts_at_one) {
    for (int i = 0; i < 8; i++) {
        char *memory = fst_os_calls.map((size_t)(2 + i) << 20);
        CHECK(memory);
        CHECK_INT(0, (uintptr_t)memory % (2 << 20));
        fst_os_calls.unmap(memory, (size_t)(2 + i) << 20);
    }
}

TEST(os, map_of_too_much_or_nothing) {
    CHECK(!fst_os_calls.map(SIZE_MAX));
    CHECK(!fst_os_calls.map(SIZE_MAX - (4 << 20)));
    CHECK(!fst_os_calls.map((size_t)1 << 60));
    CHECK(!fst_os_calls.map(0));
}

TEST(os, clock_goes_forward) {
    double before = fst_os_now();
    for (int i = 0; i < 1000; i++) {
        double now = fst_os_now();
        CHECK(now >= before);
        before = now;
    }
}

TEST(os, cpus_are_those_that_the_thread_may_use) {
    cpu_set_t all, one;
    CHECK_INT(0, sched_getaffinity(0, sizeof all, &all));
    CHECK_INT(CPU_COUNT(&all), fst_os_cpus());
    int cpu = 0;
    while (!CPU_ISSET(cpu, &all)) cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK_INT(0, sched_setaffinity(0, sizeof one, &one));
    unsigned cpus = fst_os_cpus();
    CHECK_INT(0, sched_setaffinity(0, sizeof all, &all));
    CHECK_INT(1, cpus);
}
