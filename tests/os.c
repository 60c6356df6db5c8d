#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
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

TEST(os, arrays_of_any_size) {
    static const size_t sizes[] = {1, ((size_t)2 << 20) - 1, (size_t)2 << 20, ((size_t)4 << 20) - 8,
                                   ((size_t)5 << 20) + 3};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        unsigned char *array = fst_os_array(sizes[i]);
        CHECK(array);
        memset(array, (int)i + 1, sizes[i]);
        CHECK_INT((int)i + 1, array[sizes[i] - 1]);
        free(array);
    }
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

/* ---- What is in memory, and reading past it ------------------------------------------------------ */

static int open_fresh(const char *name, const void *data, size_t size) {
    support_write(test_path(name), data, size);
    int fd = fst_os_calls.open_read(test_path(name));
    CHECK(fd >= 0);
    return fd;
}

static int is_same(int a, int b) {
    fst_file_id x, y;
    fst_file_type type;
    return !fst_os_calls.identify(a, &x, &type) && !fst_os_calls.identify(b, &y, &type) &&
           x.inode == y.inode && x.device == y.device;
}

TEST(os, open_read_waits_like_any_other_open) { /* io_uring would say -EAGAIN otherwise */
    int fd = open_fresh("file", "x", 1);
    CHECK_INT(0, fcntl(fd, F_GETFL) & O_NONBLOCK);
    close(fd);
}

TEST(os, open_again_finds_the_file_behind_the_descriptor) {
    int fd = open_fresh("file", "old", 3);
    CHECK_INT(0, unlink(test_path("file")));
    support_write(test_path("file"), "new!", 4);
    int again = fst_os_calls.open_again(fd, test_path("file"), 0);
    CHECK(again >= 0 && again != fd);
    CHECK(is_same(fd, again));
    CHECK_INT(FD_CLOEXEC, fcntl(again, F_GETFD) & FD_CLOEXEC);
    CHECK_INT(0, fcntl(again, F_GETFL) & (O_DIRECT | O_NONBLOCK));
    close(again);
    close(fd);
    CHECK_INT(-EBADF, fst_os_calls.pread(fd, &again, 1, 0));
}

TEST(os, open_again_without_proc_goes_by_the_path) {
    support_write(test_path("file"), "x", 1);
    CHECK_INT(-ENOENT, fst_os_calls.open_again(987654, test_path("missing"), 0));
    int fd = fst_os_calls.open_again(987654, test_path("file"), 0);
    CHECK(fd >= 0);
    CHECK_INT(0, fcntl(fd, F_GETFL) & (O_DIRECT | O_NONBLOCK));
    close(fd);
    CHECK_INT(0, mkfifo(test_path("fifo"), 0600));
    fd = fst_os_calls.open_again(987654, test_path("fifo"), 0); /* must not wait for a writer */
    CHECK(fd >= 0);
    close(fd);
}

TEST(os, open_again_for_o_direct) {
    static _Alignas(4096) char page[4096];
    int fd = open_fresh("file", source, 10), again = fst_os_calls.open_again(fd, test_path("file"), 1);
    uint32_t memory = 1, offset = 1;
    int code = fst_os_calls.direct_alignment(fd, &memory, &offset);
    CHECK(code == 0 || code == -ENOSYS);
    if (again >= 0) {
        CHECK_INT(O_DIRECT, fcntl(again, F_GETFL) & O_DIRECT);
        CHECK_INT(0, fcntl(fd, F_GETFL) & O_DIRECT);
        CHECK_INT(10, fst_os_calls.pread(again, page, sizeof page, 0));
        CHECK_BYTES(source, page, 10);
        close(again);
    } else {
        CHECK(again == -EINVAL || again == -EOPNOTSUPP);
    }
    if (code == 0) CHECK((memory > 0) == (offset > 0));
    close(fd);
}

TEST(os, file_systems_in_memory_are_known) {
    fst_file_system system = FST_FS_OTHER;
    int fd = memfd_create("fst", MFD_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_INT(0, fst_os_calls.file_system(fd, &system));
    CHECK_INT(FST_FS_MEMORY, system);
    close(fd);
    fd = open("/proc/self/status", O_RDONLY);
    CHECK_INT(0, fst_os_calls.file_system(fd, &system));
    CHECK_INT(FST_FS_OTHER, system);
    close(fd);
}

static int owner_as(uid_t user, int fd) {
    uid_t before = geteuid();
    if (seteuid(user)) return -1;
    int owner = fst_os_calls.is_owner(fd);
    CHECK_INT(0, seteuid(before));
    return owner;
}

TEST(os, owners_are_told_from_strangers) {
    int fd = open_fresh("file", "x", 1);
    CHECK_INT(1, fst_os_calls.is_owner(fd));
    if (geteuid() == 0) {
        CHECK_INT(0, owner_as(12345, fd));
        CHECK_INT(0, fchown(fd, 12345, 12345));
        CHECK_INT(1, fst_os_calls.is_owner(fd)); /* CAP_FOWNER */
        CHECK_INT(1, owner_as(12345, fd));
        CHECK_INT(0, owner_as(12346, fd));
        CHECK_INT(0, fchown(fd, 65534, 65534)); /* in a container that is whoever has no number there */
        CHECK_INT(0, fst_os_calls.is_owner(fd));
    } else {
        int other = open("/proc/version", O_RDONLY);
        CHECK_INT(0, fst_os_calls.is_owner(other));
        close(other);
    }
    close(fd);
}

TEST(os, cachestat_and_mincore_agree) {
    static char data[8 * 4096];
    unsigned char pages[8];
    uint64_t cached = 99;
    fst_file_system system;
    int fd = open_fresh("file", data, sizeof data - 5);
    CHECK_INT(0, fst_os_calls.file_system(fd, &system));
    CHECK_INT(0, fsync(fd));
    for (int cold = 0; cold < 2; cold++) {
        if (cold) CHECK_INT(0, fst_os_calls.advise(fd, 0, 0, FST_ADVICE_DONTNEED));
        else CHECK_INT(sizeof data - 5, fst_os_calls.pread(fd, data, sizeof data, 0));
        void *map = fst_os_calls.map_file(fd, sizeof data - 5);
        CHECK(map);
        CHECK_INT(0, fst_os_calls.mincore(map, sizeof data - 5, pages));
        fst_os_calls.unmap(map, sizeof data - 5);
        CHECK(!is_mapped(map));
        size_t count = 0;
        for (int i = 0; i < 8; i++) count += pages[i] & 1;
        if (!cold) CHECK_INT(8, count);
        int code = fst_os_calls.cachestat(fd, 0, sizeof data - 5, &cached);
        CHECK(code == 0 || code == -ENOSYS || code == -EPERM);
        if (code == 0 && system == FST_FS_OTHER) CHECK_INT(count, cached);
        ssize_t got = fst_os_calls.pread_cached(fd, data, 4096, 4096);
        if (pages[1] & 1) CHECK(got == 4096 || got == -EOPNOTSUPP);
        else CHECK(got == -EAGAIN || got == -EOPNOTSUPP);
    }
    close(fd);
}

TEST(os, map_file_of_nothing) {
    int fd = open_fresh("file", "", 0);
    CHECK(!fst_os_calls.map_file(fd, 0));
    CHECK(!fst_os_calls.map_file(-1, 4096));
    CHECK(!fst_os_calls.map_file(fd, SIZE_MAX - 8191));
    close(fd);
}

TEST(os, questions_about_a_closed_descriptor_fail) {
    fst_file_system system;
    uint64_t pages;
    uint32_t memory, offset;
    char byte;
    CHECK_INT(-EBADF, fst_os_calls.file_system(-1, &system));
    CHECK_INT(-EBADF, fst_os_calls.is_owner(-1));
    CHECK_INT(-EBADF, fst_os_calls.pread_cached(-1, &byte, 1, 0));
    CHECK_INT(-EBADF, fst_os_calls.advise(-1, 0, 0, FST_ADVICE_WILLNEED));
    int code = fst_os_calls.cachestat(-1, 0, 1, &pages);
    CHECK(code == -EBADF || code == -ENOSYS || code == -EPERM);
    code = fst_os_calls.direct_alignment(-1, &memory, &offset);
    CHECK(code == -EBADF || code == -ENOSYS);
}

/* ---- The machine --------------------------------------------------------------------------------- */

static void with_texts(const char *const *texts) { fake_os_begin(&(fake_os_options){.texts = texts}); }

TEST(os, read_text_is_a_string) {
    char text[8];
    support_write(test_path("short"), "abc", 3);
    support_write(test_path("long"), "0123456789", 10);
    CHECK_INT(3, fst_os_calls.read_text(test_path("short"), text, sizeof text));
    CHECK_STR("abc", text);
    CHECK_INT(7, fst_os_calls.read_text(test_path("long"), text, sizeof text));
    CHECK_STR("0123456", text);
    CHECK_INT(-ENOENT, fst_os_calls.read_text(test_path("missing"), text, sizeof text));
    CHECK_INT(-EISDIR, fst_os_calls.read_text(test_directory(), text, sizeof text));
}

static uint64_t available_of(const char *meminfo) {
    const char *texts[] = {"/proc/meminfo", meminfo, NULL};
    with_texts(texts);
    uint64_t bytes = fst_os_calls.memory_available();
    fake_os_end();
    return bytes;
}

TEST(os, memory_available_is_that_of_meminfo) {
    CHECK_INT(12345678ull * 1024,
              available_of("MemTotal:       24684084 kB\nMemFree:        1 kB\nMemAvailable:   12345678 kB\n"
                           "Buffers:         1 kB\n"));
    CHECK_INT(0, available_of("MemTotal: 1 kB\n"));
    CHECK_INT(0, available_of(""));
    CHECK_INT(0, available_of("xMemAvailable: 5 kB\n"));
    uint64_t real = fst_os_calls.memory_available();
    CHECK(real > (1 << 20) && real < (uint64_t)1 << 50);
    with_texts((const char *[]){NULL});
    uint64_t none = fst_os_calls.memory_available();
    fake_os_end();
    CHECK_INT(0, none);
}

static int node_of(const char *address, const char *text) {
    const char *texts[] = {"/sys/bus/pci/devices/0000:af:00.0/numa_node", text, NULL};
    with_texts(texts);
    int node = fst_os_calls.pci_node(address);
    fake_os_end();
    return node;
}

TEST(os, pci_node_is_that_of_sysfs) {
    CHECK_INT(1, node_of("0000:af:00.0", "1\n"));
    CHECK_INT(1, node_of("0000:AF:00.0", "1\n")); /* as drivers write it */
    CHECK_INT(0, node_of("0000:AF:00.0", "0\n"));
    CHECK_INT(-1, node_of("0000:AF:00.0", "-1\n"));
    CHECK_INT(-1, node_of("0000:AF:00.0", ""));
    CHECK_INT(-1, node_of("0000:AF:00.0", "x"));
    CHECK_INT(-1, node_of("0000:AF:00.0", "99999\n"));
    CHECK_INT(-1, node_of("0000:17:00.0", "1\n"));
    CHECK_INT(-1, node_of("", "1\n"));
    CHECK_INT(-1, node_of("../../../af", "1\n"));
    CHECK_INT(-1, node_of("0000:af:00.0/numa_node/0000:af:00.0/numa_node", "1\n"));
}

TEST(os, cpu_lists_are_sets) {
    fst_cpus set;
    const size_t word = 8 * sizeof *set.bits;
    CHECK_INT(0, fst_os_cpu_list("0-2,5,64-65,8191\n", &set));
    for (size_t i = 0; i < FST_MAX_CPUS; i++)
        CHECK_INT(i <= 2 || i == 5 || i == 64 || i == 65 || i == 8191, set.bits[i / word] >> i % word & 1);
    CHECK_INT(0, fst_os_cpu_list("7", &set));
    CHECK_INT(128, set.bits[0]);
    CHECK_INT(0, fst_os_cpu_list("\n", &set)); /* a node with memory alone */
    CHECK_INT(0, set.bits[0]);
    static const char *const wrong[] = {
        "x",   "1,", "1-", "3-1", "-1", "1 2", "0-8192", ",1", "1,,2", "1--2", "99999999999999999999",
        "0x1", " 1"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK_INT(-EINVAL, fst_os_cpu_list(wrong[i], &set));
}

/* Runs on a node with these CPUs; what came of it, and of the thread's CPUs. */
static int run_on(const char *list, unsigned *cpus, int refuse) {
    const char *texts[] = {"/sys/devices/system/node/node3/cpulist", list, NULL};
    fst_cpus before;
    CHECK_INT(0, fst_os_calls.get_affinity(&before));
    fake_os_begin(&(fake_os_options){
        .texts = texts, .refuse = refuse ? 1u << FAKE_OS_SET_AFFINITY : 0, .refusal = EPERM});
    int code = fst_os_calls.run_on_node(3);
    fake_os_end();
    *cpus = fst_os_cpus();
    CHECK_INT(0, fst_os_calls.set_affinity(&before));
    return code;
}

TEST(os, run_on_node_stays_inside_the_callers_cpus) {
    unsigned all = fst_os_cpus(), cpus;
    fst_cpus mine;
    char first[32];
    int cpu = 0;
    CHECK_INT(0, fst_os_calls.get_affinity(&mine));
    while (!(mine.bits[cpu / 64] >> cpu % 64 & 1)) cpu++;
    snprintf(first, sizeof first, "%d,8190\n", cpu);
    CHECK_INT(0, run_on(first, &cpus, 0));
    CHECK_INT(1, cpus);
    CHECK_INT(0, run_on("0-8191\n", &cpus, 1)); /* all of them: nothing to set */
    CHECK_INT(all, cpus);
    CHECK_INT(-ENOENT, run_on("8190\n", &cpus, 0));
    CHECK_INT(all, cpus);
    CHECK_INT(-ENOENT, run_on("\n", &cpus, 0));
    CHECK_INT(-EINVAL, run_on("?", &cpus, 0));
    if (all > 1) CHECK_INT(-EPERM, run_on(first, &cpus, 1));
    CHECK_INT(all, cpus);
    CHECK(fst_os_calls.run_on_node(1000) < 0); /* no such node */
}

#define CACHE "/sys/devices/system/cpu/cpu%d/cache/index%d/%s"

TEST(os, cache_bytes_is_the_last_level_of_a_cpu_of_the_thread) {
    static char paths[8][96];
    static const char *const levels[] = {"2\n", "1\n", "1\n", "3\n"};
    static const char *const sizes[] = {"2048K\n", "48K\n", "32K\n", "105M\n"};
    const char *texts[17] = {NULL};
    fst_cpus mine;
    int cpu = 0;
    CHECK_INT(0, fst_os_calls.get_affinity(&mine));
    while (!(mine.bits[cpu / 64] >> cpu % 64 & 1)) cpu++;
    for (int i = 0; i < 4; i++) {
        snprintf(paths[2 * i], sizeof paths[0], CACHE, cpu, i, "level");
        snprintf(paths[2 * i + 1], sizeof paths[0], CACHE, cpu, i, "size");
        texts[4 * i] = paths[2 * i];
        texts[4 * i + 1] = levels[i];
        texts[4 * i + 2] = paths[2 * i + 1];
        texts[4 * i + 3] = sizes[i];
    }
    with_texts(texts);
    size_t bytes = fst_os_calls.cache_bytes();
    texts[12] = NULL; /* a machine without the third level */
    fake_os_end();
    CHECK_INT(105 << 20, bytes);
    with_texts(texts);
    bytes = fst_os_calls.cache_bytes();
    fake_os_end();
    CHECK_INT(2 << 20, bytes);
    with_texts((const char *[]){NULL});
    bytes = fst_os_calls.cache_bytes();
    fake_os_end();
    CHECK_INT(0, bytes);
}

TEST(os, memory_is_bound_to_a_node) {
    size_t size = (4 << 20) + 4096;
    char *memory = fst_os_calls.map(size);
    CHECK(memory);
    int code = fst_os_calls.bind_memory(memory, size, 0);
    CHECK(code == 0 || code == -EPERM || code == -ENOSYS); /* containers forbid it */
    memset(memory, 1, size);
    if (code == 0) CHECK_INT(-EINVAL, fst_os_calls.bind_memory(memory, size, 1000));
    CHECK_INT(-EINVAL, fst_os_calls.bind_memory(memory, size, -1));
    CHECK_INT(-EINVAL, fst_os_calls.bind_memory(memory, size, 1 << 20));
    fst_os_calls.unmap(memory, size);
}

/* ---- io_uring ------------------------------------------------------------------------------------ */

TEST(os, uring_reads_by_descriptor_and_by_place) {
    fst_uring *uring = NULL;
    char out[10];
    int result, code = fst_os_calls.uring_open(2, &uring);
    if (code) test_skip(0, "no io_uring here");
    int fd = open_fresh("file", source, 10);
    CHECK_INT(0, fst_os_calls.uring_files(uring, 4));
    CHECK_INT(0, fst_os_calls.uring_file(uring, 3, fd));
    for (int fixed = 0; fixed < 2; fixed++) {
        uint64_t tag = 0;
        fst_uring_read read = {.tag = 7, .fd = fixed ? 3 : fd, .fixed = fixed, .buffer = -1, .data = out};
        read.nbytes = 5;
        read.offset = 2;
        memset(out, 0, sizeof out);
        CHECK_INT(0, fst_os_calls.uring_read(uring, &read));
        CHECK_INT(0, fst_os_calls.uring_wait(uring, &tag, &result));
        CHECK_INT(7, tag);
        CHECK_INT(5, result);
        CHECK_BYTES(source + 2, out, 5);
    }
    CHECK_INT(0, fst_os_calls.uring_file(uring, 3, -1));
    fst_os_calls.uring_close(uring);
    close(fd);
}

TEST(os, uring_of_no_depth) {
    fst_uring *uring = NULL;
    CHECK(fst_os_calls.uring_open(0, &uring) < 0);
    CHECK(!uring);
}

TEST(os, uring_files_do_not_raise_the_callers_limit) {
    fst_uring *uring;
    struct rlimit before, low, after;
    if (fst_os_calls.uring_open(2, &uring)) test_skip(0, "no io_uring here");
    CHECK_INT(0, getrlimit(RLIMIT_NOFILE, &before));
    low = before;
    low.rlim_cur = 40;
    CHECK_INT(0, setrlimit(RLIMIT_NOFILE, &low));
    int code = fst_os_calls.uring_files(uring, 64);
    CHECK_INT(0, getrlimit(RLIMIT_NOFILE, &after));
    CHECK_INT(0, setrlimit(RLIMIT_NOFILE, &before));
    fst_os_calls.uring_close(uring);
    CHECK_INT(-EMFILE, code);
    CHECK_INT(40, after.rlim_cur);
}
