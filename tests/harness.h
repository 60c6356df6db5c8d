/* Test cases in C, run by GoogleTest (main.cc).
 *
 *     TEST(header, hole_between_tensors) {
 *         CHECK_INT(FST_E_OFFSETS, parse("..."));
 *     }
 *
 * A failed CHECK is reported with file and line and ends the case. */
#ifndef FST_TESTS_HARNESS_H
#define FST_TESTS_HARNESS_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*test_fn)(void);
void test_register(const char *suite, const char *name, const char *file, int line, test_fn fn);

/* Reports a failure and leaves the case. In threads other than the case's own: test_note, and go on. */
__attribute__((noreturn, format(printf, 3, 4)))
void test_fail(const char *file, int line, const char *format, ...);
__attribute__((format(printf, 3, 4)))
void test_note(const char *file, int line, const char *format, ...);
/* Ends the case as skipped; fails it when FST_TEST_DEVICE is set and `needs_device`. */
__attribute__((noreturn)) void test_skip(int needs_device, const char *why);

/* An empty directory for this case, removed with all in it when the case ends. */
const char *test_directory(void);
/* The same path for each `name` in it; valid to the end of the case. */
const char *test_path(const char *name);

void test_check_int(const char *file, int line, const char *text, long long want, long long got);
void test_check_str(const char *file, int line, const char *text, const char *want, const char *got);
void test_check_bytes(const char *file, int line, const char *text, const void *want, const void *got,
                      size_t size);

#define TEST(suite, name)                                                                 \
    static void test_##suite##_##name(void);                                              \
    __attribute__((constructor)) static void test_register_##suite##_##name(void) {       \
        test_register(#suite, #name, __FILE__, __LINE__, test_##suite##_##name);          \
    }                                                                                     \
    static void test_##suite##_##name(void)

#define CHECK(condition) \
    do { if (!(condition)) test_fail(__FILE__, __LINE__, "%s", #condition); } while (0)
#define CHECK_INT(want, got) \
    test_check_int(__FILE__, __LINE__, #got, (long long)(want), (long long)(got))
#define CHECK_STR(want, got) test_check_str(__FILE__, __LINE__, #got, want, got)
#define CHECK_BYTES(want, got, size) test_check_bytes(__FILE__, __LINE__, #got, want, got, size)

#ifdef __cplusplus
}
#endif
#endif
