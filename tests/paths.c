#include "paths.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness.h"
#include "os.h"
#include "support.h"

#define INDEX "model.safetensors.index.json"

static fst_error error;

static fst_status resolve(fst_paths *paths, const char *one, const char *two) {
    const char *const list[] = {one, two, NULL};
    memset(&error, 0, sizeof error);
    return fst_paths_resolve(list, paths, &error);
}

/* Writes an index of this text and resolves it; on success the result is freed. */
static fst_status resolve_index(const char *text, size_t length) {
    const char *path = test_path("x.index.json");
    support_write(path, text, length);
    fst_paths paths;
    fst_status status = resolve(&paths, path, NULL);
    if (!status) fst_paths_free(&paths);
    else CHECK(!paths.count && !paths.files && !paths.listed && !paths.memory);
    if (status) CHECK_STR(path, error.path);
    return status;
}

#define CHECK_INDEX(want, text) CHECK_INT(want, resolve_index(text, sizeof text - 1))

static void touch(const char *name) { support_write(test_path(name), "", 0); }

/* The index of the case's directory. */
static void write_index(const char *text) { support_write(test_path(INDEX), text, strlen(text)); }

/* ---- Files ----------------------------------------------------------------------------------- */

TEST(paths, file_is_itself) {
    touch("a");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path("a"), NULL));
    CHECK_INT(1, paths.count);
    CHECK_STR(test_path("a"), paths.files[0]);
    CHECK(!paths.files[1]);
    CHECK_INT(0, paths.listed_count);
    CHECK_INT(0, paths.indexed[0]);
    fst_paths_free(&paths);
}

TEST(paths, file_needs_no_ending) {
    touch("weights.bin");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path("weights.bin"), NULL));
    CHECK_INT(1, paths.count);
    fst_paths_free(&paths);
}

TEST(paths, order_is_the_callers) {
    touch("b");
    touch("a");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path("b"), test_path("a")));
    CHECK_STR(test_path("b"), paths.files[0]);
    CHECK_STR(test_path("a"), paths.files[1]);
    fst_paths_free(&paths);
}

TEST(paths, file_named_twice_is_there_twice) {
    touch("a");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path("a"), test_path("a")));
    CHECK_INT(2, paths.count);
    fst_paths_free(&paths);
}

TEST(paths, no_path_at_all) {
    const char *const none[] = {NULL};
    fst_paths paths;
    CHECK_INT(FST_E_ARG, fst_paths_resolve(none, &paths, &error));
    CHECK_INT(FST_E_ARG, fst_paths_resolve(NULL, &paths, &error));
}

TEST(paths, missing_path) {
    fst_paths paths;
    CHECK_INT(FST_E_IO, resolve(&paths, test_path("missing"), NULL));
    CHECK_INT(ENOENT, error.code);
    CHECK_STR(test_path("missing"), error.path);
    CHECK_INT(-1, error.file);
}

TEST(paths, empty_path) {
    fst_paths paths;
    CHECK_INT(FST_E_IO, resolve(&paths, "", NULL));
    CHECK_INT(ENOENT, error.code);
}

TEST(paths, second_path_missing) {
    touch("a");
    fst_paths paths;
    CHECK_INT(FST_E_IO, resolve(&paths, test_path("a"), test_path("missing")));
    CHECK(!paths.files && !paths.memory);
}

TEST(paths, file_used_as_a_directory) {
    touch("a");
    fst_paths paths;
    CHECK_INT(FST_E_IO, resolve(&paths, test_path("a/b"), NULL));
    CHECK_INT(ENOTDIR, error.code);
}

TEST(paths, fifo_is_refused) {
    CHECK_INT(0, mkfifo(test_path("fifo"), 0600));
    fst_paths paths;
    CHECK_INT(FST_E_FILE_TYPE, resolve(&paths, test_path("fifo"), NULL));
}

TEST(paths, device_is_refused) {
    fst_paths paths;
    CHECK_INT(FST_E_FILE_TYPE, resolve(&paths, "/dev/null", NULL));
}

TEST(paths, errors_need_no_record) {
    const char *const list[] = {test_path("missing"), NULL};
    fst_paths paths;
    CHECK_INT(FST_E_IO, fst_paths_resolve(list, &paths, NULL));
}

/* ---- Directories ----------------------------------------------------------------------------- */

TEST(paths, directory_without_index_has_its_checkpoints_by_name) {
    touch("b.safetensors");
    touch("a.safetensors");
    touch("B.safetensors");
    touch("a.safetensors.bak");
    touch("config.json");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_directory(), NULL));
    CHECK_INT(3, paths.count);
    CHECK_STR(test_path("B.safetensors"), paths.files[0]);
    CHECK_STR(test_path("a.safetensors"), paths.files[1]);
    CHECK_STR(test_path("b.safetensors"), paths.files[2]);
    CHECK_INT(0, paths.indexed[0]);
    fst_paths_free(&paths);
}

TEST(paths, directory_with_a_slash_at_the_end) {
    touch("a.safetensors");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path(""), NULL));
    CHECK_STR(test_path("a.safetensors"), paths.files[0]);
    fst_paths_free(&paths);
}

TEST(paths, directory_skips_hidden_files) {
    touch(".a.safetensors");
    touch(".safetensors");
    touch("b.safetensors");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_directory(), NULL));
    CHECK_INT(1, paths.count);
    fst_paths_free(&paths);
}

TEST(paths, directory_skips_directories) {
    CHECK_INT(0, mkdir(test_path("a.safetensors"), 0700));
    touch("b.safetensors");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_directory(), NULL));
    CHECK_INT(1, paths.count);
    CHECK_STR(test_path("b.safetensors"), paths.files[0]);
    fst_paths_free(&paths);
}

TEST(paths, directory_keeps_a_dangling_link) {
    CHECK_INT(0, symlink("nowhere", test_path("a.safetensors")));
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_directory(), NULL));
    CHECK_INT(1, paths.count);
    fst_paths_free(&paths);
}

TEST(paths, directory_without_checkpoints) {
    touch("config.json");
    fst_paths paths;
    CHECK_INT(FST_E_IO, resolve(&paths, test_directory(), NULL));
    CHECK_INT(ENOENT, error.code);
}

TEST(paths, directory_with_an_index_has_what_that_lists) {
    write_index("{\"metadata\":{},\"weight_map\":{\"t\":\"b.safetensors\"}}");
    touch("a.safetensors");
    touch("b.safetensors");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_directory(), NULL));
    CHECK_INT(1, paths.count);
    CHECK_STR(test_path("b.safetensors"), paths.files[0]);
    CHECK_INT(1, paths.indexed[0]);
    fst_paths_free(&paths);
}

TEST(paths, directory_with_a_bad_index_is_not_taken_without_it) {
    write_index("{}");
    touch("a.safetensors");
    fst_paths paths;
    CHECK_INT(FST_E_INDEX, resolve(&paths, test_directory(), NULL));
}

TEST(paths, directory_with_a_dangling_index_is_not_taken_without_it) {
    CHECK_INT(0, symlink("nowhere", test_path(INDEX)));
    touch("a.safetensors");
    fst_paths paths;
    CHECK_INT(FST_E_IO, resolve(&paths, test_directory(), NULL));
    CHECK_STR(test_path(INDEX), error.path);
}

TEST(paths, directory_in_the_place_of_an_index) {
    CHECK_INT(0, mkdir(test_path(INDEX), 0700));
    touch("a.safetensors");
    fst_paths paths;
    CHECK_INT(FST_E_FILE_TYPE, resolve(&paths, test_directory(), NULL));
}

static int list_fails(const char *path, char ***names) {
    (void)path, (void)names;
    return -EACCES;
}

TEST(paths, directory_that_cannot_be_listed) {
    fst_os before = fst_os_calls;
    fst_os_calls.list = list_fails;
    fst_paths paths;
    fst_status status = resolve(&paths, test_directory(), NULL);
    fst_os_calls = before;
    CHECK_INT(FST_E_IO, status);
    CHECK_INT(EACCES, error.code);
}

/* ---- Index files ----------------------------------------------------------------------------- */

TEST(paths, index_lists_files_once_by_name) {
    write_index("{\"weight_map\":{\"z\":\"2\",\"b\":\"10\",\"a\":\"2\",\"c\":\"1\"}}");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path(INDEX), NULL));
    CHECK_INT(3, paths.count);
    CHECK_STR(test_path("1"), paths.files[0]);
    CHECK_STR(test_path("10"), paths.files[1]);
    CHECK_STR(test_path("2"), paths.files[2]);
    static const struct fst_listed want[] = {{"a", 1, 2}, {"b", 1, 1}, {"c", 1, 0}, {"z", 1, 2}};
    CHECK_INT(4, paths.listed_count);
    for (size_t i = 0; i < 4; i++) {
        CHECK_STR(want[i].name, paths.listed[i].name);
        CHECK_INT(want[i].length, paths.listed[i].length);
        CHECK_INT(want[i].file, paths.listed[i].file);
    }
    fst_paths_free(&paths);
}

TEST(paths, index_in_the_working_directory) {
    char before[4096];
    CHECK(getcwd(before, sizeof before));
    write_index("{\"weight_map\":{\"t\":\"a.safetensors\"}}");
    CHECK_INT(0, chdir(test_directory()));
    fst_paths paths;
    fst_status status = resolve(&paths, INDEX, NULL);
    CHECK_INT(0, chdir(before));
    CHECK_INT(FST_OK, status);
    CHECK_STR("a.safetensors", paths.files[0]);
    fst_paths_free(&paths);
}

TEST(paths, index_by_way_of_a_link_stays_beside_the_link) {
    CHECK_INT(0, mkdir(test_path("blobs"), 0700));
    const char *text = "{\"weight_map\":{\"t\":\"a.safetensors\"}}";
    support_write(test_path("blobs/1"), text, strlen(text));
    CHECK_INT(0, symlink("blobs/1", test_path(INDEX)));
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path(INDEX), NULL));
    CHECK_STR(test_path("a.safetensors"), paths.files[0]);
    fst_paths_free(&paths);
}

TEST(paths, file_after_an_index_is_not_indexed) {
    write_index("{\"weight_map\":{\"t\":\"a.safetensors\"}}");
    touch("b");
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path(INDEX), test_path("b")));
    CHECK_INT(1, paths.indexed[0]);
    CHECK_INT(0, paths.indexed[1]);
    fst_paths_free(&paths);
}

TEST(paths, index_of_a_great_many_tensors) {
    enum { COUNT = 20000 };
    char *text = malloc(COUNT * 64), *end = text;
    CHECK(text);
    end += sprintf(end, "{\"weight_map\":{");
    for (int i = 0; i < COUNT; i++)
        end += sprintf(end, "%s\"t%d\":\"%d.safetensors\"", i ? "," : "", i, i % 100);
    end += sprintf(end, "}}");
    write_index(text);
    free(text);
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path(INDEX), NULL));
    CHECK_INT(100, paths.count);
    CHECK_INT(COUNT, paths.listed_count);
    char want[64];
    for (size_t i = 0; i < COUNT; i++) {
        if (i) CHECK(strcmp(paths.listed[i - 1].name, paths.listed[i].name) < 0);
        sprintf(want, "%d.safetensors", atoi(paths.listed[i].name + 1) % 100);
        CHECK_STR(test_path(want), paths.files[paths.listed[i].file]);
    }
    fst_paths_free(&paths);
}

TEST(paths, two_indexes_with_one_name) {
    write_index("{\"weight_map\":{\"t\":\"a.safetensors\"}}");
    const char *text = "{\"weight_map\":{\"t\":\"b.safetensors\"}}";
    support_write(test_path("other.json"), text, strlen(text));
    fst_paths paths;
    CHECK_INT(FST_E_DUPLICATE, resolve(&paths, test_path(INDEX), test_path("other.json")));
    CHECK_STR(test_path("b.safetensors"), error.path);
    CHECK(strstr(error.text, test_path("a.safetensors")));
}

TEST(paths, two_indexes_each_with_files) {
    const char *text = "{\"weight_map\":{\"s\":\"d.safetensors\",\"u\":\"c.safetensors\"}}";
    const char *want[][2] = {
        {"s", "d.safetensors"}, {"t", "b.safetensors"}, {"u", "c.safetensors"}, {"v", "a.safetensors"}};
    write_index("{\"weight_map\":{\"v\":\"a.safetensors\",\"t\":\"b.safetensors\"}}");
    support_write(test_path("other.json"), text, strlen(text));
    fst_paths paths;
    CHECK_INT(FST_OK, resolve(&paths, test_path(INDEX), test_path("other.json")));
    CHECK_INT(4, paths.count);
    CHECK_INT(4, paths.listed_count);
    for (size_t i = 0; i < 4; i++) {
        CHECK_STR(want[i][0], paths.listed[i].name);
        CHECK_STR(test_path(want[i][1]), paths.files[paths.listed[i].file]);
    }
    fst_paths_free(&paths);
}

TEST(paths, index_that_is_empty) { CHECK_INDEX(FST_E_INDEX, ""); }
TEST(paths, index_that_is_not_json) {
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"a\"}");
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"a\",}}");
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"a\"}} x");
}
TEST(paths, index_error_names_the_byte) {
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\"?");
    CHECK_INT(13, error.offset);
}
TEST(paths, index_with_a_byte_order_mark) {
    CHECK_INDEX(FST_E_INDEX, "\xEF\xBB\xBF{\"weight_map\":{\"t\":\"a\"}}");
}
TEST(paths, index_that_is_not_utf8) { CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"\xFF\":\"a\"}}"); }
TEST(paths, index_that_is_an_array) { CHECK_INDEX(FST_E_INDEX, "[]"); }
TEST(paths, index_without_weight_map) { CHECK_INDEX(FST_E_INDEX, "{\"metadata\":{}}"); }
TEST(paths, index_with_weight_map_of_another_type) { CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":[\"a\"]}"); }
TEST(paths, index_with_an_empty_weight_map) { CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{}}"); }
TEST(paths, index_with_two_weight_maps) {
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"a\"},\"weight_map\":{\"t\":\"a\"}}");
}
TEST(paths, index_with_a_tensor_twice) {
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"a\",\"u\":\"a\",\"t\":\"b\"}}");
    CHECK(strstr(error.text, "'t'"));
}
TEST(paths, index_with_a_file_that_is_no_string) { CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":1}}"); }
TEST(paths, index_with_an_empty_file_name) { CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"\"}}"); }
TEST(paths, index_with_a_file_in_another_directory) {
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"d/a\"}}");
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"../a\"}}");
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"/etc/passwd\"}}");
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"a\\u002fb\"}}");
}
TEST(paths, index_with_a_directory_for_a_file) {
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"..\"}}");
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\".\"}}");
}
TEST(paths, index_with_a_file_name_that_only_looks_dangerous) {
    CHECK_INDEX(FST_OK, "{\"weight_map\":{\"t\":\"..a..b\"}}");
}
TEST(paths, index_with_a_nul_in_a_name) {
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\\u0000\":\"a\"}}");
    CHECK_INDEX(FST_E_INDEX, "{\"weight_map\":{\"t\":\"a\\u0000b\"}}");
}

TEST(paths, index_over_the_limit_is_not_read) {
    touch("x.json");
    CHECK_INT(0, truncate(test_path("x.json"), 100000001));
    fst_paths paths;
    CHECK_INT(FST_E_INDEX, resolve(&paths, test_path("x.json"), NULL));
}

TEST(paths, index_is_read_again_after_interruptions) {
    write_index("{\"weight_map\":{\"t\":\"a.safetensors\"}}");
    fake_os_begin(&(fake_os_options){.short_reads = 1});
    fst_paths paths;
    fst_status status = resolve(&paths, test_path(INDEX), NULL);
    fake_os_end();
    CHECK_INT(FST_OK, status);
    fst_paths_free(&paths);
}

TEST(paths, each_failing_call_on_an_index_is_reported) {
    write_index("{\"weight_map\":{\"t\":\"a.safetensors\"}}");
    for (int at = 1; at <= 3; at++) {
        fake_os_begin(&(fake_os_options){.fail_at = at, .error = EIO});
        fst_paths paths;
        fst_status status = resolve(&paths, test_path(INDEX), NULL);
        int seen = fake_os_calls();
        fake_os_end();
        CHECK_INT(at, seen);
        CHECK_INT(FST_E_IO, status);
        CHECK_INT(EIO, error.code);
    }
}
