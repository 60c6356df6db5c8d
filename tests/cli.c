/* The fst command, run as a user does. */
#include "fst.h"

#include <errno.h>
#include <fcntl.h>
#include <pty.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <yyjson.h>

#include "harness.h"
#include "support.h"

extern char **environ;

/* ---- Running it ------------------------------------------------------------------------------ */

static char out[1 << 20], err[1 << 14];
static size_t out_size;

static size_t read_text(const char *path, char *text, size_t room) {
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    ssize_t size = read(fd, text, room - 1);
    close(fd);
    CHECK(size >= 0);
    text[size] = 0;
    return (size_t)size;
}

static pid_t spawn(const char *const *args, const posix_spawn_file_actions_t *actions) {
    pid_t child;
    int rc = posix_spawn(&child, FST_TEST_COMMAND, actions, NULL, (char *const *)(uintptr_t)args, environ);
    if (rc) test_fail(__FILE__, __LINE__, "cannot run %s: %s", FST_TEST_COMMAND, strerror(rc));
    return child;
}

/* Its exit status, or minus the signal that ended it. */
static int wait_for(pid_t child) {
    int status;
    CHECK_INT(child, waitpid(child, &status, 0));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* Runs it with stdout going to the file `to`, or into `out` when that is NULL; stderr goes into `err`. */
static int run_to(const char *to, const char *const *args) {
    const char *out_path = test_path("stdout"), *err_path = test_path("stderr");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, to ? to : out_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_addopen(&actions, 2, err_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    int status = wait_for(spawn(args, &actions));
    posix_spawn_file_actions_destroy(&actions);
    out_size = to ? 0 : read_text(out_path, out, sizeof out);
    out[out_size] = 0;
    read_text(err_path, err, sizeof err);
    unlink(out_path);
    unlink(err_path);
    return status;
}

#define ARGS(...) ((const char *const[]){"fst", __VA_ARGS__, NULL})
#define RUN(...) run_to(NULL, ARGS(__VA_ARGS__))

/* The command failed as it should: nothing on stdout, one line on stderr that starts like this. */
static void check_failed(int want, int status, const char *start) {
    if (status != want) test_fail(__FILE__, __LINE__, "want exit status %d, got %d: %s", want, status, err);
    CHECK_INT(0, out_size);
    if (strncmp(start, err, strlen(start)))
        test_fail(__FILE__, __LINE__, "want stderr to start with \"%s\", got \"%s\"", start, err);
    const char *newline = strchr(err, '\n');
    CHECK(newline && !newline[1]);
}

static void check_good(int status) {
    if (status) test_fail(__FILE__, __LINE__, "exit status %d: %s", status, err);
    CHECK_STR("", err);
}

static const char *text(const char *format, const char *path) {
    static char line[1024];
    snprintf(line, sizeof line, format, path);
    return line;
}

/* ---- Checkpoints ----------------------------------------------------------------------------- */

static const float floats[6] = {0, 1, -2, 0.5f, 65504, 3};
static const unsigned char bytes[5] = {1, 2, 3, 4, 5};
static const support_tensor small[] = {
    {"floats", "F32", "[2,3]", floats, sizeof floats},
    {"bytes", "U8", "[5]", bytes, sizeof bytes},
};

static const char *small_file(void) {
    support_checkpoint(test_path("in"), "{\"format\":\"pt\"}", small, 2, 0);
    return test_path("in");
}

/* A checkpoint of zeros that takes no room on the disk. */
static const char *sparse_file(const char *name, const char *dtype, const char *shape, uint64_t nbytes) {
    char json[256] = {0};
    int length = sprintf(json + 8, "{\"a\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[0,%llu]}}", dtype,
                         shape, (unsigned long long)nbytes);
    json[0] = (char)length;
    support_write(test_path(name), json, 8 + (size_t)length);
    CHECK_INT(0, truncate(test_path(name), 8 + length + (off_t)nbytes));
    return test_path(name);
}

static yyjson_doc *parsed(void) {
    yyjson_doc *doc = yyjson_read(out, out_size, 0);
    if (!doc) test_fail(__FILE__, __LINE__, "not JSON: %s", out);
    return doc;
}

static uint64_t uint_at(yyjson_doc *doc, const char *pointer) {
    yyjson_val *value = yyjson_doc_ptr_get(doc, pointer);
    if (!yyjson_is_uint(value)) test_fail(__FILE__, __LINE__, "%s is no integer", pointer);
    return yyjson_get_uint(value);
}

static double real_at(yyjson_doc *doc, const char *pointer) {
    yyjson_val *value = yyjson_doc_ptr_get(doc, pointer);
    if (!yyjson_is_num(value)) test_fail(__FILE__, __LINE__, "%s is no number", pointer);
    return yyjson_get_num(value);
}

static const char *text_at(yyjson_doc *doc, const char *pointer) {
    const char *value = yyjson_get_str(yyjson_doc_ptr_get(doc, pointer));
    if (!value) test_fail(__FILE__, __LINE__, "%s is no string", pointer);
    return value;
}

/* ---- The command line ------------------------------------------------------------------------ */

TEST(cli, version) {
    check_good(RUN("--version"));
    CHECK_STR("fst 0.1.0\n", out);
}

TEST(cli, help_lists_the_commands) {
    static const char *const ways[][2] = {
        {"--help", NULL}, {"-h", NULL}, {"help", NULL}, {"load", "--help"}, {"inspect", "-h"}};
    for (size_t i = 0; i < 5; i++) {
        check_good(RUN(ways[i][0], ways[i][1]));
        CHECK(strstr(out, "inspect") && strstr(out, "load") && strstr(out, "convert") &&
              strstr(out, "--cast") && strstr(out, "--tp"));
    }
}

TEST(cli, no_command) {
    check_failed(2, run_to(NULL, (const char *const[]){"fst", NULL}), "fst: FST_E_ARG: no command");
}
TEST(cli, unknown_command) {
    check_failed(2, RUN("explode", "x"), "fst: FST_E_ARG: there is no command 'explode'");
}
TEST(cli, no_path) {
    check_failed(2, RUN("inspect"), "fst: FST_E_ARG: inspect: no path");
    check_failed(2, RUN("load", "--json"), "fst: FST_E_ARG: load: no path");
    check_failed(2, RUN("convert", "-o", "x"), "fst: FST_E_ARG: convert: no path");
}
TEST(cli, unknown_option) {
    check_failed(2, RUN("load", "--fast", "x"), "fst: FST_E_ARG: load: there is no option --fast");
    check_failed(2, RUN("load", "-x", "x"), "fst: FST_E_ARG: load: there is no option -x");
}
TEST(cli, option_of_another_command) {
    check_failed(2, RUN("inspect", "--cast", "bf16", "x"),
                 "fst: FST_E_ARG: inspect: there is no option --cast");
    check_failed(2, RUN("load", "-o", "y", "x"), "fst: FST_E_ARG: load: there is no option -o");
}
TEST(cli, option_without_its_value) {
    check_failed(2, RUN("load", "x", "--cast"), "fst: FST_E_ARG: --cast needs a value");
    check_failed(2, RUN("convert", "x", "-o"), "fst: FST_E_ARG: -o needs a value");
}
TEST(cli, option_with_a_value_too_many) {
    check_failed(2, RUN("inspect", "--json=yes", "x"), "fst: FST_E_ARG: --json takes no value");
}
TEST(cli, unknown_dtype_is_found_before_the_path) {
    check_failed(2, RUN("load", "--cast", "bf17", "/nowhere"),
                 "fst: FST_E_ARG: --cast: there is no dtype 'bf17'");
    check_failed(2, RUN("load", "--cast=native", "/nowhere"), "fst: FST_E_ARG: --cast:");
    check_failed(2, RUN("load", "--cast=", "/nowhere"), "fst: FST_E_ARG: --cast:");
}
TEST(cli, wrong_device) {
    static const char *const wrong[] = {"gpu", "", "-1", "1x", " 1", "+1", "99999999999999999999"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        check_failed(2, RUN("load", "--device", wrong[i], "/nowhere"), "fst: FST_E_ARG: --device:");
}
TEST(cli, wrong_threads) {
    static const char *const wrong[] = {"0", "", "-1", "1.5", "two", "1025", "99999999999999999999"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        check_failed(2, RUN("load", "--threads", wrong[i], "/nowhere"), "fst: FST_E_ARG: --threads:");
}
TEST(cli, convert_needs_an_output) {
    check_failed(2, RUN("convert", small_file()), "fst: FST_E_ARG: convert: -o");
    check_failed(2, RUN("convert", "-o", "", small_file()), "fst: FST_E_ARG: -o:");
}
TEST(cli, one_directory_becomes_one) {
    check_failed(2, RUN("convert", "-o", "out", "x", "y"),
                 "fst: FST_E_ARG: convert: one directory becomes one");
}
TEST(cli, wrong_ranks) {
    static const char *const wrong[] = {"",     "0",   "/",    "0/",    "/2",   "2/2",  "3/2",
                                        "-1/2", "0/0", "0/-1", "1.0/2", "0/2x", " 0/2", "0/65537"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        check_failed(2, RUN("load", "--tp", wrong[i], "/nowhere"), "fst: FST_E_ARG: --tp:");
        check_failed(2, RUN("convert", "--rank", wrong[i], "-o", "out", "/nowhere"),
                     "fst: FST_E_ARG: --rank:");
    }
    check_failed(2, RUN("load", "--tp", "0/2", "--rank", "1/2", "/nowhere"),
                 "fst: FST_E_ARG: --rank: rank 0 of 2 was given before");
    check_failed(2, RUN("inspect", "--tp", "0/2", "/nowhere"),
                 "fst: FST_E_ARG: inspect: there is no option --tp");
}
TEST(cli, wrong_shards) {
    static const char *const wrong[] = {
        "",    "x",     "x=",    "=0",   "x=-1",        "x=64",    "x=0/",
        "x=a", "x=0/0", "x=0/b", "x=/8", "x=Replicate", "x=0/8/8", "x=0/4294967296"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        check_failed(2, RUN("load", "--shard", wrong[i], "/nowhere"), "fst: FST_E_ARG: --shard:");
    check_failed(2, RUN("load", "--only", "", "/nowhere"), "fst: FST_E_ARG: --only: the pattern is empty");
    check_failed(2, RUN("load", "--skip=", "/nowhere"), "fst: FST_E_ARG: --skip: the pattern is empty");
    check_failed(2, RUN("load", "--read", "some", "/nowhere"), "fst: FST_E_ARG: --read: 'some'");
    check_failed(2, RUN("load", "--strict=1", "/nowhere"), "fst: FST_E_ARG: --strict takes no value");
}
TEST(cli, shards_that_contradict) {
    const char *why = "fst: FST_E_ARG: 'a.*' is given twice";
    check_failed(2, RUN("load", "--shard", "a.*=0", "--shard", "b=1", "--shard", "a.*=1", "/nowhere"), why);
    check_failed(2, RUN("load", "--shard", "a.*=0", "--shard", "a.*=0/2", "/nowhere"), why);
    check_failed(2, RUN("load", "--shard", "a.*=0", "--shard", "a.*=replicate", "/nowhere"), why);
    check_failed(2, RUN("load", "--only", "a.*", "--skip", "a.*", "/nowhere"), why);
    /* The same twice is no contradiction, nor one of --tp's own that is overruled: the path comes next. */
    check_failed(1, RUN("load", "--shard", "a.*=0", "--shard", "a.*=0/1", "/nowhere"),
                 "fst: /nowhere: FST_E_IO");
    check_failed(1, RUN("load", "--tp", "0/1", "--shard", "*.q_proj.weight=1", "/nowhere"),
                 "fst: /nowhere: FST_E_IO");
}
TEST(cli, wrong_shard_size) {
    static const char *const wrong[] = {"0", "", "-1", "0.5", "5GB", "inf", "nan", "0x10", "1e19", " 1"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        check_failed(2, RUN("convert", "--shard-size", wrong[i], "-o", "out", "/nowhere"),
                     "fst: FST_E_ARG: --shard-size:");
    check_failed(2, RUN("convert", "--shard-size", "5e9", "-o", "x.safetensors", "/nowhere"),
                 "fst: FST_E_ARG: --shard-size: a file has no shards");
}
TEST(cli, control_characters_of_an_argument_are_escaped) {
    check_failed(2, RUN("load", "--cast", "\x1b[31m\n", "x"),
                 "fst: FST_E_ARG: --cast: there is no dtype '\\x1B[31m\\n'");
}

TEST(cli, options_after_the_path) {
    check_good(RUN("load", small_file(), "--json", "--device", "cpu"));
    yyjson_doc_free(parsed());
}

TEST(cli, dashes_end_the_options) {
    char before[4096];
    CHECK(getcwd(before, sizeof before));
    support_checkpoint(test_path("--json"), NULL, small, 2, 0);
    CHECK_INT(0, chdir(test_directory()));
    int status = RUN("inspect", "--", "--json");
    CHECK_INT(0, chdir(before));
    check_good(status);
    CHECK_INT(0, strncmp("--json: 2 tensors", out, 17));
}

/* ---- inspect --------------------------------------------------------------------------------- */

TEST(cli, inspect_prints_columns) {
    check_good(RUN("inspect", small_file()));
    char want[1024];
    sprintf(want,
            "%s: 2 tensors, 29 bytes\n"
            "  metadata format: pt\n"
            "  name    dtype  shape            bytes\n"
            "  floats  F32    [2, 3]              24\n"
            "  bytes   U8     [5]                  5\n",
            test_path("in"));
    CHECK_STR(want, out);
}

TEST(cli, inspect_json_has_the_keys_of_the_design) {
    size_t start = support_checkpoint(test_path("in"), "{\"format\":\"pt\"}", small, 2, 7);
    support_checkpoint(test_path("none"), NULL, NULL, 0, 0);
    check_good(RUN("inspect", "--json", test_path("in"), test_path("none")));
    yyjson_doc *doc = parsed();
    CHECK_STR(test_path("in"), text_at(doc, "/files/0/path"));
    CHECK_STR("pt", text_at(doc, "/files/0/metadata/format"));
    CHECK_INT(2, yyjson_arr_size(yyjson_doc_ptr_get(doc, "/files/0/tensors")));
    CHECK_STR("floats", text_at(doc, "/files/0/tensors/0/name"));
    CHECK_STR("F32", text_at(doc, "/files/0/tensors/0/dtype"));
    CHECK_INT(2, yyjson_arr_size(yyjson_doc_ptr_get(doc, "/files/0/tensors/0/shape")));
    CHECK_INT(3, uint_at(doc, "/files/0/tensors/0/shape/1"));
    CHECK_INT(start, uint_at(doc, "/files/0/tensors/0/offset"));
    CHECK_INT(24, uint_at(doc, "/files/0/tensors/0/nbytes"));
    CHECK_INT(start + 24, uint_at(doc, "/files/0/tensors/1/offset"));
    CHECK(yyjson_is_null(yyjson_doc_ptr_get(doc, "/files/1/metadata")));
    CHECK_INT(0, yyjson_arr_size(yyjson_doc_ptr_get(doc, "/files/1/tensors")));
    yyjson_doc_free(doc);
}

TEST(cli, inspect_reads_headers_alone) {
    check_good(RUN("inspect", "--json", sparse_file("huge", "U8", "[1099511627776]", (uint64_t)1 << 40)));
    yyjson_doc *doc = parsed();
    CHECK_INT((long long)1 << 40, uint_at(doc, "/files/0/tensors/0/nbytes"));
    yyjson_doc_free(doc);
}

TEST(cli, inspect_escapes_names) {
    static const support_tensor tensors[] = {{"a\\n\\u001b[31m\\u009b", "U8", "[1]", bytes, 1}};
    support_checkpoint(test_path("in"), "{\"k\":\"\\u0000\\t\"}", tensors, 1, 0);
    check_good(RUN("inspect", test_path("in")));
    CHECK(strstr(out, "  a\\n\\x1B[31m\\xC2\\x9B  U8"));
    CHECK(strstr(out, "metadata k: \\x00\\t\n"));
    check_good(RUN("inspect", "--json", test_path("in")));
    yyjson_doc *doc = parsed();
    CHECK_STR("a\n\x1B[31m\xC2\x9B", text_at(doc, "/files/0/tensors/0/name"));
    CHECK_INT(2, yyjson_get_len(yyjson_doc_ptr_get(doc, "/files/0/metadata/k")));
    yyjson_doc_free(doc);
}

TEST(cli, json_is_valid_for_a_path_that_is_not_utf8) {
    support_checkpoint(test_path("a\xFF\xC3"), NULL, small, 2, 0);
    check_good(RUN("inspect", "--json", test_path("a\xFF\xC3")));
    yyjson_doc *doc = parsed();
    CHECK_STR(test_path("a\xEF\xBF\xBD\xEF\xBF\xBD"), text_at(doc, "/files/0/path"));
    yyjson_doc_free(doc);
}

TEST(cli, inspect_of_a_directory) {
    support_checkpoint(test_path("b.safetensors"), NULL, small, 1, 0);
    support_checkpoint(test_path("a.safetensors"), NULL, small + 1, 1, 0);
    check_good(RUN("inspect", "--json", test_directory()));
    yyjson_doc *doc = parsed();
    CHECK_STR("bytes", text_at(doc, "/files/0/tensors/0/name"));
    CHECK_STR("floats", text_at(doc, "/files/1/tensors/0/name"));
    yyjson_doc_free(doc);
}

/* ---- What goes wrong with a path ------------------------------------------------------------- */

TEST(cli, missing_path) {
    check_failed(1, RUN("inspect", test_path("missing")), text("fst: %s: FST_E_IO: ", test_path("missing")));
    CHECK(strstr(err, "No such file or directory"));
    check_failed(1, RUN("load", "--device", "cpu", test_path("missing")),
                 text("fst: %s: FST_E_IO: ", test_path("missing")));
}

TEST(cli, directory_with_nothing_in_it) {
    CHECK_INT(0, mkdir(test_path("empty"), 0700));
    check_failed(1, RUN("inspect", test_path("empty")), text("fst: %s/: FST_E_IO: ", test_path("empty")));
}

TEST(cli, broken_header_names_the_byte) {
    support_write(test_path("in"), "\x03\0\0\0\0\0\0\0{]}", 11);
    check_failed(1, RUN("inspect", "--json", test_path("in")),
                 text("fst: %s: FST_E_JSON: ", test_path("in")));
    CHECK(strstr(err, "byte 9)"));
}

TEST(cli, second_of_two_paths_is_named) {
    support_write(test_path("bad"), "", 0);
    check_failed(1, RUN("inspect", small_file(), test_path("bad")),
                 text("fst: %s: FST_E_TRUNCATED: ", test_path("bad")));
}

TEST(cli, control_characters_of_a_path_are_escaped) {
    check_failed(1, RUN("inspect", test_path("a\n\x1b[2J")),
                 text("fst: %s: FST_E_IO: ", test_path("a\\n\\x1B[2J")));
}

TEST(cli, a_tensor_in_two_files) {
    support_checkpoint(test_path("other"), NULL, small, 1, 0);
    check_failed(1, RUN("load", "--device=cpu", small_file(), test_path("other")),
                 text("fst: %s: FST_E_DUPLICATE: ", test_path("other")));
    CHECK(strstr(err, "floats"));
}

TEST(cli, fifo_does_not_hang) {
    CHECK_INT(0, mkfifo(test_path("fifo"), 0600));
    check_failed(1, RUN("load", test_path("fifo")), text("fst: %s: FST_E_FILE_TYPE: ", test_path("fifo")));
}

/* ---- load ------------------------------------------------------------------------------------ */

TEST(cli, load_prints_what_it_did) {
    check_good(RUN("load", "--device", "cpu", small_file()));
    static const char *const lines[] = {"device   cpu (", "\nfiles    1\n",        "\ntensors  2\n",
                                        "\nread     ",    "\nresult   29 bytes\n", "\nmemory   "};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        if (!strstr(out, lines[i])) test_fail(__FILE__, __LINE__, "no \"%s\" in: %s", lines[i], out);
}

TEST(cli, load_json_has_the_keys_of_the_design) {
    size_t start = support_checkpoint(test_path("in"), NULL, small, 2, 0);
    check_good(RUN("load", "--device", "cpu", "--threads", "1", "--cast", "bf16", "--json", test_path("in")));
    yyjson_doc *doc = parsed();
    CHECK_INT(1, uint_at(doc, "/files"));
    CHECK_INT(2, uint_at(doc, "/tensors"));
    CHECK_INT(start + 29, uint_at(doc, "/bytes_read"));
    CHECK_INT(17, uint_at(doc, "/bytes_out"));
    double seconds = real_at(doc, "/seconds"), rate = real_at(doc, "/gb_per_s");
    CHECK(seconds > 0);
    CHECK(rate * seconds * 1e9 > (double)(start + 29) * 0.999 &&
          rate * seconds * 1e9 < (double)(start + 29) * 1.001);
    CHECK_STR("cpu", text_at(doc, "/device"));
    CHECK(*text_at(doc, "/device_name") && *text_at(doc, "/device_reason") && *text_at(doc, "/limit"));
    CHECK(uint_at(doc, "/peak_device_bytes") >= 17);
    uint_at(doc, "/pinned_bytes");
    CHECK(!yyjson_doc_ptr_get(doc, "/seconds_write"));
    yyjson_doc_free(doc);
}

TEST(cli, dtype_in_any_case) {
    static const char *const ways[] = {"bf16", "BF16", "Bf16", "f8_e4m3", "F8_E5M2"};
    static const int sizes[] = {17, 17, 17, 11, 11};
    for (size_t i = 0; i < 5; i++) {
        check_good(RUN("load", "--device", "cpu", "--json", "--cast", ways[i], small_file()));
        yyjson_doc *doc = parsed();
        CHECK_INT(sizes[i], uint_at(doc, "/bytes_out"));
        yyjson_doc_free(doc);
    }
}

TEST(cli, cast_without_a_kernel) {
    check_failed(1, RUN("load", "--device", "cpu", "--cast", "f6_e2m3", small_file()),
                 text("fst: %s: FST_E_NO_CAST: ", test_path("in")));
    CHECK(strstr(err, "floats"));
}

TEST(cli, device_that_is_not_there) {
    check_failed(1, RUN("load", "--device", "999", small_file()), "fst: FST_E_NO_DEVICE: ");
}

TEST(cli, file_too_short_for_its_tensors) {
    CHECK_INT(0, truncate(small_file(), 100));
    check_failed(1, RUN("load", "--device", "cpu", test_path("in")),
                 text("fst: %s: FST_E_", test_path("in")));
}

static const float matrix[6] = {1, -2, 4, 3, 0, -3};
static const support_tensor weights[] = {{"m.weight", "F32", "[2,3]", matrix, sizeof matrix},
                                         {"m.bias", "F32", "[3]", matrix, 12}};

static const char *weights_file(void) {
    support_checkpoint(test_path("weights"), NULL, weights, 2, 0);
    return test_path("weights");
}

TEST(cli, wrong_scale) {
    check_failed(2, RUN("load", "--cast", "f8_e4m3", "--scale", "column", "missing"),
                 "fst: FST_E_ARG: --scale: 'column'");
    check_failed(2, RUN("load", "--scale", "row", "missing"), "fst: FST_E_ARG: --scale goes with");
    check_failed(2, RUN("load", "--scale", "row", "--cast", "bf16", "missing"),
                 "fst: FST_E_ARG: --scale goes with");
    check_failed(2, RUN("convert", "--scale", "row", "--cast", "f8_e5m2fnuz", "-o", "out", "missing"),
                 "fst: FST_E_ARG: --scale goes with");
}

TEST(cli, load_computes_scales) {
    check_good(
        RUN("load", "--device", "cpu", "--scale", "row", "--cast", "f8_e4m3", "--json", weights_file()));
    yyjson_doc *doc = parsed();
    CHECK_INT(3, uint_at(doc, "/tensors"));
    CHECK_INT(6 + 2 * 4 + 12, uint_at(doc, "/bytes_out"));
    CHECK_INT(0, uint_at(doc, "/nans"));
    yyjson_doc_free(doc);
    check_good(RUN("load", "--device", "cpu", "--cast=F8_E4M3", "--scale=block", weights_file()));
    CHECK(strstr(out, "weights as F8_E4M3 under computed scales") && !strstr(out, "NaN"));
}

TEST(cli, nans_in_weights_are_noted) {
    static const uint32_t some[4] = {0x7FC00000, 0, 0x7FC00000, 0};
    const support_tensor tensors[] = {{"m.weight", "F32", "[2,2]", some, 16}};
    support_checkpoint(test_path("in"), NULL, tensors, 1, 0);
    check_good(RUN("load", "--device", "cpu", "--scale", "tensor", "--cast", "f8_e4m3", test_path("in")));
    CHECK(strstr(out, "\nnote     2 NaNs in quantized weights\n"));
}

/* ---- convert --------------------------------------------------------------------------------- */

TEST(cli, convert_writes_a_checkpoint) {
    static const uint16_t bf16[6] = {0, 0x3F80, 0xC000, 0x3F00, 0x4780, 0x4040};
    check_good(RUN("convert", "--device", "cpu", "--json", "--cast", "bf16", "-o",
                   test_path("out.safetensors"), small_file()));
    yyjson_doc *doc = parsed();
    CHECK(real_at(doc, "/seconds_write") > 0);
    CHECK_INT(17, uint_at(doc, "/bytes_out"));
    yyjson_doc_free(doc);
    check_good(RUN("inspect", "--json", test_path("out.safetensors")));
    doc = parsed();
    CHECK_STR("pt", text_at(doc, "/files/0/metadata/format"));
    CHECK_STR("BF16", text_at(doc, "/files/0/tensors/0/dtype"));
    CHECK_INT(4096, uint_at(doc, "/files/0/tensors/0/offset"));
    yyjson_doc_free(doc);
    char file[8192];
    CHECK_INT(4096 + 17, read_text(test_path("out.safetensors"), file, sizeof file));
    CHECK_BYTES(bf16, file + 4096, sizeof bf16);
    CHECK_BYTES(bytes, file + 4096 + sizeof bf16, sizeof bytes);
}

/* And loads as what it was: 4 / 448 times codes is 4 again, and the others are powers of two of it or round near it. */
TEST(cli, convert_computes_scales) {
    static const char *const kinds[] = {"tensor", "row", "block"}, *const names[] = {"m.weight_scale",
                                                                                     "m.weight_scale",
                                                                                     "m.weight_scale_inv"};
    for (int i = 0; i < 3; i++) {
        check_good(RUN("convert", "--device", "cpu", "--cast", "f8_e4m3", "--scale", kinds[i], "-o",
                       test_path("out.safetensors"), weights_file()));
        check_good(RUN("inspect", "--json", test_path("out.safetensors")));
        yyjson_doc *doc = parsed();
        CHECK_STR("m.weight", text_at(doc, "/files/0/tensors/0/name"));
        CHECK_STR("F8_E4M3", text_at(doc, "/files/0/tensors/0/dtype"));
        CHECK_STR(i == 1 ? "fp8-row" : "fp8-tensor", text_at(doc, "/files/0/tensors/0/format"));
        CHECK_STR(names[i], text_at(doc, "/files/0/tensors/1/name"));
        CHECK_STR("F32", text_at(doc, "/files/0/tensors/1/dtype"));
        CHECK_STR("F32", text_at(doc, "/files/0/tensors/2/dtype"));
        yyjson_doc_free(doc);
        check_good(RUN("convert", "--device", "cpu", "--cast", "f32", "-o", test_path("back.safetensors"),
                       test_path("out.safetensors")));
        char file[8192];
        float back[6];
        CHECK_INT(4096 + sizeof matrix + 12, read_text(test_path("back.safetensors"), file, sizeof file));
        memcpy(back, file + 4096, sizeof back);
        for (int k = 0; k < 6; k++) {
            float difference = back[k] - matrix[k];
            CHECK(difference < 0.2F && difference > -0.2F);
        }
        CHECK(back[2] == 4 && back[4] == 0);
    }
}

/* A directory with small_file's tensors. */
static const char *small_directory(void) {
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    support_checkpoint(test_path("in/a.safetensors"), "{\"format\":\"pt\"}", small, 2, 0);
    return test_path("in");
}

TEST(cli, tensors_are_left_out) {
    small_directory();
    const char *path = test_path("in");
    check_good(RUN("load", "--device", "cpu", "--json", "--skip", "byt*", path));
    yyjson_doc *doc = parsed();
    CHECK_INT(1, uint_at(doc, "/tensors"));
    CHECK_INT(24, uint_at(doc, "/bytes_out"));
    CHECK_INT(1, uint_at(doc, "/tensors_ignored"));
    CHECK_INT(0, uint_at(doc, "/shards_unused"));
    uint_at(doc, "/bytes_needed");
    uint_at(doc, "/bytes_storage");
    yyjson_doc_free(doc);
    check_good(RUN("load", "--device", "cpu", "--only", "?ytes", "--read", "exact", "--tp", "0/1", path));
    CHECK(strstr(out, "tensors  1, 1 ignored: not in the index, or left out\n"));
    check_good(
        RUN("convert", "--device", "cpu", "--only", "bytes", "-o", test_path("out.safetensors"), path));
    check_good(RUN("inspect", "--json", test_path("out.safetensors")));
    doc = parsed();
    CHECK_STR("bytes", text_at(doc, "/files/0/tensors/0/name"));
    CHECK(!yyjson_doc_ptr_get(doc, "/files/0/tensors/1"));
    yyjson_doc_free(doc);
    check_good(RUN("convert", "--device", "cpu", "--json", "--rank", "0/1", "--skip", "bytes", "--skip",
                   "none", "-o", test_path("out"), path));
    doc = parsed();
    CHECK_INT(1, uint_at(doc, "/tensors"));
    CHECK_INT(1, uint_at(doc, "/shards_unused"));
    uint_at(doc, "/bytes_needed");
    uint_at(doc, "/bytes_storage");
    yyjson_doc_free(doc);
}

TEST(cli, patterns_that_match_nothing) {
    small_directory();
    const char *path = test_path("in");
    CHECK_INT(0, RUN("load", "--device", "cpu", "--tp", "0/1", "--shard", "none=0", path));
    CHECK_STR("fst: warning: 1 of --shard, --only and --skip matches no tensor\n", err);
    CHECK_INT(0,
              RUN("convert", "--device", "cpu", "--skip", "n", "--skip", "m", "-o", test_path("out"), path));
    CHECK_STR("fst: warning: 2 of --shard, --only and --skip match no tensor\n", err);
    check_good(RUN("load", "--device", "cpu", "--json", "--skip", "none", path));
    yyjson_doc *doc = parsed();
    CHECK_INT(1, uint_at(doc, "/shards_unused"));
    yyjson_doc_free(doc);
    check_failed(1, RUN("load", "--device", "cpu", "--strict", "--skip", "none", path),
                 "fst: FST_E_NOT_FOUND: the shard rule \"none\" matches no tensor");
    check_failed(
        1, RUN("convert", "--device", "cpu", "--strict", "--skip", "none", "-o", test_path("out2"), path),
        "fst: FST_E_NOT_FOUND: the shard rule \"none\" matches no tensor");
    struct stat there;
    CHECK(stat(test_path("out2"), &there) != 0);
    check_good(RUN("load", "--device", "cpu", "--strict", "--tp", "0/1", path));
}

TEST(cli, convert_to_a_directory) {
    small_directory();
    check_good(RUN("convert", "--device", "cpu", "--json", "--cast", "bf16", "--shard-size", "1.2e1", "-o",
                   test_path("out/"), test_path("in")));
    yyjson_doc *doc = parsed();
    CHECK_INT(2, uint_at(doc, "/shards"));
    CHECK_INT(0, uint_at(doc, "/shards_kept"));
    CHECK_INT(2, uint_at(doc, "/tensors"));
    CHECK_INT(17, uint_at(doc, "/bytes_out"));
    CHECK_STR("cpu", text_at(doc, "/device"));
    yyjson_doc_free(doc);
    check_good(RUN("inspect", "--json", test_path("out")));
    doc = parsed();
    CHECK_STR("BF16", text_at(doc, "/files/0/tensors/0/dtype"));
    CHECK_STR("bytes", text_at(doc, "/files/1/tensors/0/name"));
    yyjson_doc_free(doc);
    check_failed(1, RUN("convert", "--device", "cpu", "-o", test_path("out"), test_path("in")),
                 text("fst: %s: FST_E_ARG: it is not empty", test_path("out")));
}

TEST(cli, convert_to_a_directory_prints_what_it_did) {
    small_directory();
    check_good(RUN("convert", "--device", "cpu", "-o", test_path("out"), test_path("in")));
    CHECK(strstr(out, "device   cpu ("));
    CHECK(strstr(out, ": 2 tensors, 29 bytes in 1 files; 0 other files copied\n"));
}

/* The second time there is room. */
TEST(cli, convert_to_a_directory_on_a_full_file_system) {
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    sparse_file("in/a.safetensors", "U8", "[1048576]", 1 << 20);
    CHECK_INT(0, mkdir(test_path("d"), 0700));
    if (mount("none", test_path("d"), "tmpfs", 0, "size=512k")) test_skip(0, "cannot mount a tmpfs");
    int status = RUN("convert", "--device", "cpu", "-o", test_path("d/out"), test_path("in"));
    int half = access(test_path("d/out/model-00001-of-00001.safetensors"), F_OK) == 0;
    int full = strstr(err, "No space left on device") != NULL;
    int grown = mount("none", test_path("d"), "tmpfs", MS_REMOUNT, "size=8m");
    int again = RUN("convert", "--device", "cpu", "-o", test_path("d/out"), test_path("in"));
    struct stat st;
    int there = stat(test_path("d/out/model-00001-of-00001.safetensors"), &st);
    CHECK_INT(0, umount(test_path("d")));
    CHECK_INT(1, status);
    CHECK(full && !half);
    CHECK_INT(0, grown);
    CHECK_INT(0, again);
    CHECK_INT(0, there);
    CHECK_INT(4096 + (1 << 20), st.st_size);
}

TEST(cli, convert_over_its_input) {
    const char *path = test_path("in.safetensors");
    support_checkpoint(path, NULL, small, 2, 0);
    check_good(RUN("convert", "--device", "cpu", "-o", path, path));
    CHECK(strstr(out, "\nwritten  "));
    check_good(RUN("convert", "--device", "cpu", "--output", path, path));
    check_good(RUN("inspect", path));
}

TEST(cli, convert_to_a_place_that_is_missing) {
    check_failed(1, RUN("convert", "--device", "cpu", "-o", test_path("no/out.safetensors"), small_file()),
                 text("fst: %s: FST_E_IO: ", test_path("no/out.safetensors")));
}

TEST(cli, convert_to_a_device_file) {
    const char *null = test_path("null.safetensors");
    CHECK_INT(0, symlink("/dev/null", null));
    check_failed(1, RUN("convert", "--device", "cpu", "-o", null, small_file()),
                 text("fst: %s: FST_E_FILE_TYPE: ", null));
}

TEST(cli, convert_with_conflicting_metadata) {
    support_checkpoint(test_path("1"), "{\"k\":\"a\"}", small, 1, 0);
    support_checkpoint(test_path("2"), "{\"k\":\"b\"}", small + 1, 1, 0);
    check_failed(
        1,
        RUN("convert", "--device", "cpu", "-o", test_path("out.safetensors"), test_path("1"), test_path("2")),
        text("fst: %s: FST_E_CONFLICT: ", test_path("out.safetensors")));
    CHECK_INT(-1, access(test_path("out.safetensors"), F_OK));
}

/* The old file is whole, and nothing else is left beside it. */
static void check_old_output(const char *directory) {
    char path[512], old[64];
    snprintf(path, sizeof path, "%s/out.safetensors", directory);
    read_text(path, old, sizeof old);
    CHECK_STR("old", old);
    char **names;
    CHECK_INT(0, fst_os_calls.list(directory, &names));
    CHECK(names[0] && !names[1]);
    free(names);
}

TEST(cli, convert_over_the_limit_of_file_sizes) {
    const char *input = sparse_file("in", "U8", "[1048576]", 1 << 20);
    CHECK_INT(0, mkdir(test_path("d"), 0700));
    support_write(test_path("d/out.safetensors"), "old", 3);
    struct rlimit before, limit;
    CHECK_INT(0, getrlimit(RLIMIT_FSIZE, &before));
    limit = before;
    limit.rlim_cur = 500000;
    CHECK_INT(0, setrlimit(RLIMIT_FSIZE, &limit));
    int status = RUN("convert", "--device", "cpu", "-o", test_path("d/out.safetensors"), input);
    CHECK_INT(0, setrlimit(RLIMIT_FSIZE, &before));
    check_failed(1, status, text("fst: %s: FST_E_IO: ", test_path("d/out.safetensors")));
    check_old_output(test_path("d"));
}

TEST(cli, convert_onto_a_full_file_system) {
    const char *input = sparse_file("in", "U8", "[1048576]", 1 << 20);
    CHECK_INT(0, mkdir(test_path("d"), 0700));
    if (mount("none", test_path("d"), "tmpfs", 0, "size=512k")) test_skip(0, "cannot mount a tmpfs");
    support_write(test_path("d/out.safetensors"), "old", 3);
    int status = RUN("convert", "--device", "cpu", "-o", test_path("d/out.safetensors"), input);
    char old[64];
    read_text(test_path("d/out.safetensors"), old, sizeof old);
    char **names;
    int rc = fst_os_calls.list(test_path("d"), &names);
    int alone = !rc && names[0] && !names[1];
    if (!rc) free(names);
    CHECK_INT(0, umount(test_path("d")));
    check_failed(1, status, text("fst: %s: FST_E_IO: ", test_path("d/out.safetensors")));
    CHECK(strstr(err, "No space left on device"));
    CHECK_STR("old", old);
    CHECK(alone);
}

/* ---- Standard output and signals ------------------------------------------------------------- */

TEST(cli, full_standard_output) {
    out_size = 0;
    check_failed(1, run_to("/dev/full", ARGS("inspect", small_file())),
                 "fst: standard output: FST_E_IO: No space");
    check_failed(1, run_to("/dev/full", ARGS("--help")), "fst: standard output: FST_E_IO: No space");
}

TEST(cli, closed_standard_output) {
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    for (int fd = 0; fd < 3; fd++) posix_spawn_file_actions_addclose(&actions, fd);
    small_file();
    pid_t child = spawn(
        ARGS("convert", "--device", "cpu", "-o", test_path("out.safetensors"), test_path("in")), &actions);
    posix_spawn_file_actions_destroy(&actions);
    CHECK_INT(1, wait_for(child));
    char file[8192];
    CHECK_INT(4096 + 29, read_text(test_path("out.safetensors"), file,
                                   sizeof file)); /* and nothing else was written into it */
}

TEST(cli, reader_of_standard_output_is_gone) {
    int ends[2];
    CHECK_INT(0, pipe2(ends, O_CLOEXEC));
    close(ends[0]);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_addopen(&actions, 2, test_path("stderr"), O_WRONLY | O_CREAT, 0600);
    pid_t child = spawn(ARGS("inspect", small_file()), &actions);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    int status = wait_for(child);
    out_size = 0;
    read_text(test_path("stderr"), err, sizeof err);
    check_failed(1, status, "fst: standard output: FST_E_IO: Broken pipe");
}

/* What a terminal got so far; reads until `want` has appeared, or the other side is closed. */
typedef struct terminal {
    int fd;
    char text[1 << 16];
    size_t used;
} terminal;

static int read_terminal(terminal *t, const char *want) {
    while (t->used < sizeof t->text - 1 && !(want && strstr(t->text, want))) {
        ssize_t got = read(t->fd, t->text + t->used, sizeof t->text - 1 - t->used);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;
        t->used += (size_t)got;
        t->text[t->used] = 0;
    }
    return want && strstr(t->text, want);
}

/* Runs it with stderr on a terminal of so many columns. */
static pid_t spawn_on_terminal(terminal *t, unsigned short columns, const char *const *args) {
    struct winsize size = {.ws_row = 24, .ws_col = columns};
    int side;
    memset(t, 0, sizeof *t);
    CHECK_INT(0, openpty(&t->fd, &side, NULL, NULL, &size));
    fcntl(t->fd, F_SETFD, FD_CLOEXEC);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, test_path("stdout"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, side, 2);
    posix_spawn_file_actions_addclose(&actions, side);
    pid_t child = spawn(args, &actions);
    posix_spawn_file_actions_destroy(&actions);
    close(side);
    return child;
}

#define SLOW_BYTES ((uint64_t)8 << 30)
#define SLOW_SHAPE "[1073741824]" /* of F64: some seconds of zeros, cast to one byte each */

static void check_interrupted(int signal, int want) {
    static terminal t;
    CHECK_INT(0, mkdir(test_path("d"), 0700));
    support_write(test_path("d/out.safetensors"), "old", 3);
    sparse_file("in", "F64", SLOW_SHAPE, SLOW_BYTES);
    pid_t child = spawn_on_terminal(&t, 80,
                                    ARGS("convert", "--device", "cpu", "--cast", "f8_e4m3", "-o",
                                         test_path("d/out.safetensors"), test_path("in")));
    int drawn = read_terminal(&t, "%"); /* it is in the middle of the load */
    kill(child, signal);
    read_terminal(&t, NULL);
    close(t.fd);
    CHECK_INT(want, wait_for(child));
    CHECK(drawn);
    CHECK(strstr(t.text, "FST_E_CANCELLED"));
    out_size = read_text(test_path("stdout"), out, sizeof out);
    CHECK_INT(0, out_size);
    check_old_output(test_path("d"));
}

TEST(cli, ctrl_c_leaves_no_half_file_in_a_directory) {
    static terminal t;
    CHECK_INT(0, mkdir(test_path("in"), 0700));
    sparse_file("in/a.safetensors", "F64", SLOW_SHAPE, SLOW_BYTES);
    pid_t child = spawn_on_terminal(
        &t, 80,
        ARGS("convert", "--device", "cpu", "--cast", "f8_e4m3", "-o", test_path("out"), test_path("in")));
    int drawn = read_terminal(&t, "%");
    kill(child, SIGINT);
    read_terminal(&t, NULL);
    close(t.fd);
    CHECK_INT(130, wait_for(child));
    CHECK(drawn);
    CHECK(strstr(t.text, "FST_E_CANCELLED"));
    char **names;
    CHECK_INT(0, fst_os_calls.list(test_path("out"), &names));
    CHECK_STR(".fst-convert", names[0]);
    CHECK(!names[1]);
    free(names);
}

TEST(cli, ctrl_c_leaves_nothing_behind) { check_interrupted(SIGINT, 130); }
TEST(cli, terminated_leaves_nothing_behind) { check_interrupted(SIGTERM, 143); }

TEST(cli, ctrl_c_ends_a_load) {
    static terminal t;
    sparse_file("in", "F64", SLOW_SHAPE, SLOW_BYTES);
    pid_t child =
        spawn_on_terminal(&t, 80, ARGS("load", "--device", "cpu", "--cast", "f8_e4m3", test_path("in")));
    int drawn = read_terminal(&t, "%");
    kill(child, SIGINT);
    read_terminal(&t, NULL);
    close(t.fd);
    CHECK_INT(130, wait_for(child));
    CHECK(drawn);
    CHECK(strstr(t.text, "FST_E_CANCELLED"));
}

/* Where a descriptor of another process leads; "" when it is not open. */
static const char *descriptor_of(pid_t process, int fd) {
    static char target[512];
    char link[64];
    snprintf(link, sizeof link, "/proc/%d/fd/%d", (int)process, fd);
    ssize_t size = readlink(link, target, sizeof target - 1);
    target[size > 0 ? size : 0] = 0;
    return target;
}

TEST(cli, files_never_become_standard_descriptors) {
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    for (int fd = 0; fd < 3; fd++) posix_spawn_file_actions_addclose(&actions, fd);
    sparse_file("in", "F64", SLOW_SHAPE, SLOW_BYTES);
    pid_t child = spawn(ARGS("load", "--device", "cpu", "--cast", "f8_e4m3", test_path("in")), &actions);
    posix_spawn_file_actions_destroy(&actions);
    const char *input = test_path("in");
    int fd = 0, alive = 1, occupied = 0;
    while (alive && strcmp(descriptor_of(child, fd), input)) {
        fd = (fd + 1) % 16;
        alive = waitpid(child, NULL, WNOHANG) == 0;
    }
    for (fd = 0; fd < 3; fd++) occupied += !strcmp("/dev/null", descriptor_of(child, fd));
    if (alive) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    CHECK(alive);
    CHECK_INT(3, occupied);
}

/* The last line that was drawn must be overwritten by blanks. */
TEST(cli, progress_bar_fits_the_terminal_and_goes_away) {
    static const unsigned short widths[] = {200, 80, 40, 10};
    sparse_file("in", "U8", "[536870912]", (uint64_t)512 << 20);
    for (size_t i = 0; i < 4; i++) {
        static terminal t;
        pid_t child = spawn_on_terminal(&t, widths[i], ARGS("load", "--device", "cpu", test_path("in")));
        read_terminal(&t, NULL);
        close(t.fd);
        CHECK_INT(0, wait_for(child));
        CHECK_INT(0, strncmp("\rload ", t.text, 6));
        CHECK_INT('\r', t.text[t.used - 1]);
        CHECK(!strchr(t.text, '\n'));
        size_t column = 0;
        for (const char *at = t.text; *at; at++) {
            column = *at == '\r' ? 0 : column + 1;
            CHECK(column < widths[i]);
        }
        char *last = t.text + t.used - 1;
        for (last--; *last != '\r'; last--) CHECK_INT(' ', *last);
        CHECK((i < 2) == !!strstr(t.text, "[#"));
    }
}

TEST(cli, no_progress_bar_without_a_terminal) {
    sparse_file("in", "U8", "[268435456]", (uint64_t)256 << 20);
    check_good(RUN("load", "--device", "cpu", test_path("in")));
}
