/* Error records: texts that are one clean line, whatever a file or path holds. */
#include "status.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "harness.h"

static const char *escaped(const char *text, size_t length) {
    static char out[512];
    return fst_escape(out, sizeof out, text, length);
}

static const char *cut(size_t size, const char *text) {
    static char out[64];
    memset(out, '#', sizeof out);
    fst_escape(out, size, text, strlen(text));
    CHECK(out[size] == '#');
    return out;
}

TEST(status, every_status_has_its_own_name) {
    CHECK_STR("FST_OK", fst_status_name(FST_OK));
    CHECK_STR("FST_E_ARG", fst_status_name(FST_E_ARG));
    CHECK_STR("FST_E_JSON", fst_status_name(FST_E_JSON));
    CHECK_STR("FST_E_PEER", fst_status_name((fst_status)(FST_STATUS_COUNT - 1)));
    for (int i = 1; i < FST_STATUS_COUNT; i++) {
        CHECK(strncmp(fst_status_name((fst_status)i), "FST_E_", 6) == 0);
        for (int k = 0; k < i; k++) {
            CHECK(strcmp(fst_status_name((fst_status)i), fst_status_name((fst_status)k)) != 0);
        }
    }
}

TEST(status, name_outside_the_list) {
    CHECK_STR("FST_E_UNKNOWN", fst_status_name(FST_STATUS_COUNT));
    CHECK_STR("FST_E_UNKNOWN", fst_status_name((fst_status)-1));
    CHECK_STR("FST_E_UNKNOWN", fst_status_name((fst_status)12345));
}

TEST(status, version_is_the_headers) {
    char want[32];
    snprintf(want, sizeof want, "%d.%d.%d", FST_VERSION_MAJOR, FST_VERSION_MINOR, FST_VERSION_PATCH);
    CHECK_STR(want, fst_version());
}

TEST(status, escape_leaves_text_alone) {
    CHECK_STR("caf\xC3\xA9 \\n \"x\"", escaped("caf\xC3\xA9 \\n \"x\"", 12));
}
TEST(status, escape_short_forms) { CHECK_STR("\\n\\t\\r", escaped("\n\t\r", 3)); }
TEST(status, escape_control_characters) { CHECK_STR("\\x00\\x1B[31m\\x7F", escaped("\0\x1B[31m\x7F", 7)); }
TEST(status, escape_c1_control_characters) {
    CHECK_STR("\\xC2\\x9B\xC2\xA0", escaped("\xC2\x9B\xC2\xA0", 4));
}
TEST(status, escape_bytes_that_are_not_utf8) {
    CHECK_STR("\\xFFa\\xC3", escaped("\xFF"
                                     "a\xC3",
                                     3));
    CHECK_STR("\\xED\\xA0\\x80", escaped("\xED\xA0\x80", 3));
    CHECK_STR("\\xC0\\x80", escaped("\xC0\x80", 2));
}
TEST(status, escape_stops_at_the_length) { CHECK_STR("\\xE2\\x82", escaped("\xE2\x82\xAC", 2)); }
TEST(status, escape_of_nothing) { CHECK_STR("", escaped("", 0)); }
TEST(status, escape_that_just_fits) { CHECK_STR("1234567", cut(8, "1234567")); }
TEST(status, escape_cut) { CHECK_STR("1234...", cut(8, "12345678")); }
TEST(status, escape_cut_at_a_characters_border) {
    CHECK_STR("123...", cut(8, "123\xE2\x82\xAC\xE2\x82\xAC"));
}
TEST(status, escape_cut_before_an_escape) { CHECK_STR("12...", cut(8, "12\x01\x02")); }
TEST(status, escape_into_little_room) {
    CHECK_STR("...", cut(4, "12345"));
    CHECK_STR("..", cut(3, "12345"));
    CHECK_STR("", cut(1, "12345"));
    char none = '#';
    CHECK(fst_escape(&none, 0, "1", 1) == &none);
    CHECK_INT('#', none);
}

TEST(status, fail_fills_the_record) {
    fst_error error;
    fst_where where = {"models/a.safetensors", 2, 77};
    CHECK_INT(FST_E_IO, fst_fail(&error, FST_E_IO, ENOENT, &where, "cannot open it: %s, %d", "gone", 5));
    CHECK_INT(FST_E_IO, error.status);
    CHECK_INT(ENOENT, error.code);
    CHECK_INT(2, error.file);
    CHECK_INT(77, error.offset);
    CHECK_STR("models/a.safetensors", error.path);
    CHECK_STR("cannot open it: gone, 5", error.text);
}

TEST(status, fail_about_no_file) {
    static const fst_where nowhere = {NULL, 4, 9};
    const fst_where *const both[] = {NULL, &nowhere};
    for (int i = 0; i < 2; i++) {
        fst_error error;
        CHECK_INT(FST_E_ARG, fst_fail(&error, FST_E_ARG, 0, both[i], "no"));
        CHECK_INT(-1, error.file);
        CHECK_INT(-1, error.offset);
        CHECK_STR("", error.path);
    }
}

TEST(status, fail_without_a_record) {
    CHECK_INT(FST_E_MEMORY, fst_fail(NULL, FST_E_MEMORY, 0, NULL, "%s", "nobody reads this"));
}

TEST(status, fail_escapes_the_text) {
    fst_error error;
    fst_fail(&error, FST_E_HEADER, 0, NULL, "tensor \"%s\"", "a\nb\x1B");
    CHECK_STR("tensor \"a\\nb\\x1B\"", error.text);
}

TEST(status, fail_cuts_a_long_text) {
    fst_error error;
    char name[3000];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = 0;
    fst_fail(&error, FST_E_HEADER, 0, NULL, "x%s", name);
    CHECK_INT(sizeof error.text - 1, strlen(error.text));
    CHECK_STR("nnn...", error.text + sizeof error.text - 1 - 6);
}

TEST(status, fail_cuts_a_long_text_at_a_characters_border) {
    for (int shift = 0; shift < 3; shift++) {
        fst_error error;
        char name[3001] = "";
        for (int i = 0; i < 1000; i++) memcpy(name + 3 * i, "\xE2\x82\xAC", 4);
        fst_fail(&error, FST_E_HEADER, 0, NULL, "%.*s%s", shift, "xx", name);
        CHECK(strlen(error.text) < sizeof error.text);
        CHECK(strstr(error.text, "\\x") == NULL);
        CHECK_STR("\xE2\x82\xAC...", error.text + strlen(error.text) - 6);
    }
}

TEST(status, fail_keeps_the_tail_of_a_long_path) {
    fst_error error;
    char path[1000];
    memset(path, 'd', sizeof path);
    strcpy(path + sizeof path - 20, "/model.safetensors");
    fst_where where = {path, 0, -1};
    fst_fail(&error, FST_E_IO, EIO, &where, "x");
    CHECK_INT(sizeof error.path - 1, strlen(error.path));
    CHECK_STR("d/model.safetensors", error.path + strlen(error.path) - 19);
    CHECK_INT(-1, error.offset);
}

TEST(status, fail_cuts_a_path_at_a_characters_border) {
    fst_error error;
    char path[601] = "";
    for (int i = 0; i < 200; i++) memcpy(path + 3 * i, "\xE2\x82\xAC", 4);
    path[597] = 'x'; /* 255 bytes from the end would now be inside a character */
    path[598] = 0;
    fst_where where = {path, 0, -1};
    fst_fail(&error, FST_E_IO, EIO, &where, "x");
    CHECK_INT(253, strlen(error.path));
    CHECK(memcmp(error.path, "\xE2\x82\xAC", 3) == 0);
}

static void *first_error_of_a_thread(void *out) {
    *(fst_error *)out = *fst_last_error();
    fst_error error;
    fst_fail(&error, FST_E_JSON, 0, NULL, "another thread's");
    fst_set_last_error(&error);
    return NULL;
}

TEST(status, last_error_is_the_threads_own) {
    fst_error error, seen;
    pthread_t thread;
    fst_fail(&error, FST_E_NOT_FOUND, 0, NULL, "this thread's");
    fst_set_last_error(&error);
    CHECK_INT(0, pthread_create(&thread, NULL, first_error_of_a_thread, &seen));
    pthread_join(thread, NULL);
    CHECK_INT(FST_OK, seen.status);
    CHECK_INT(-1, seen.file);
    CHECK_INT(-1, seen.offset);
    CHECK_STR("", seen.text);
    CHECK_STR("this thread's", fst_last_error()->text);
    CHECK_INT(FST_E_NOT_FOUND, fst_last_error()->status);
}

TEST(status, last_error_stays_until_the_next) {
    fst_error error;
    fst_fail(&error, FST_E_NAME, 0, NULL, "one");
    fst_set_last_error(&error);
    fst_set_last_error(NULL);
    CHECK_STR("one", fst_last_error()->text);
    fst_set_last_error(fst_last_error());
    CHECK_STR("one", fst_last_error()->text);
}
