// Hands the C test cases to GoogleTest. A failing case leaves by longjmp: cases are C, so there are no
// destructors to skip.
#define GTEST_DONT_DEFINE_TEST 1 // TEST is the harness's
#include <gtest/gtest.h>

#include <ftw.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "harness.h"

namespace {

struct Case {
    const char *suite, *name, *file;
    int line;
    test_fn fn;
};

std::vector<Case> &cases() {
    static std::vector<Case> all;
    return all;
}

jmp_buf leave;
std::string directory;
std::vector<std::string *> paths;

std::string format(const char *text, va_list args) {
    char buffer[4096];
    std::vsnprintf(buffer, sizeof buffer, text, args);
    return buffer;
}

int remove_one(const char *path, const struct stat *, int, struct FTW *) { return remove(path); }

class Runner : public ::testing::Test {
  public:
    explicit Runner(test_fn fn) : fn_(fn) {}
    void TestBody() override {
        if (setjmp(leave) == 0) fn_();
    }
    void TearDown() override {
        if (!directory.empty()) nftw(directory.c_str(), remove_one, 16, FTW_DEPTH | FTW_PHYS);
        directory.clear();
        for (std::string *path : paths) delete path;
        paths.clear();
    }

  private:
    test_fn fn_;
};

}  // namespace

extern "C" {

void test_register(const char *suite, const char *name, const char *file, int line, test_fn fn) {
    cases().push_back({suite, name, file, line, fn});
}

void test_note(const char *file, int line, const char *text, ...) {
    va_list args;
    va_start(args, text);
    std::string message = format(text, args);
    va_end(args);
    ADD_FAILURE_AT(file, line) << message;
}

void test_fail(const char *file, int line, const char *text, ...) {
    {
        va_list args;
        va_start(args, text);
        std::string message = format(text, args);
        va_end(args);
        ADD_FAILURE_AT(file, line) << message;
    }
    longjmp(leave, 1);
}

void test_skip(int needs_device, const char *why) {
    if (needs_device && std::getenv("FST_TEST_DEVICE"))
        test_fail(__FILE__, __LINE__, "FST_TEST_DEVICE is set, but: %s", why);
    [why] { GTEST_SKIP() << why; }();
    longjmp(leave, 1);
}

const char *test_directory(void) {
    if (directory.empty()) {
        const char *base = std::getenv("TMPDIR");
        std::string name = std::string(base && *base ? base : "/tmp") + "/fst-test-XXXXXX";
        if (!mkdtemp(&name[0])) test_fail(__FILE__, __LINE__, "cannot make %s", name.c_str());
        directory = name;
    }
    return directory.c_str();
}

const char *test_path(const char *name) {
    paths.push_back(new std::string(std::string(test_directory()) + "/" + name));
    return paths.back()->c_str();
}

void test_check_int(const char *file, int line, const char *text, long long want, long long got) {
    if (want != got) test_fail(file, line, "%s: want %lld, got %lld", text, want, got);
}

void test_check_str(const char *file, int line, const char *text, const char *want, const char *got) {
    if (std::string(want ? want : "(null)") != (got ? got : "(null)"))
        test_fail(file, line, "%s: want \"%s\", got \"%s\"", text, want ? want : "(null)", got ? got : "(null)");
}

void test_check_bytes(const char *file, int line, const char *text, const void *want, const void *got,
                      size_t size) {
    const unsigned char *a = static_cast<const unsigned char *>(want);
    const unsigned char *b = static_cast<const unsigned char *>(got);
    for (size_t i = 0; i < size; i++)
        if (a[i] != b[i]) test_fail(file, line, "%s: byte %zu: want %02X, got %02X", text, i, a[i], b[i]);
}

}  // extern "C"

int main(int argc, char **argv) {
    ::testing::InitGoogleTest(&argc, argv);
    for (const Case &c : cases())
        ::testing::RegisterTest(c.suite, c.name, nullptr, nullptr, c.file, c.line,
                                [fn = c.fn]() -> Runner * { return new Runner(fn); });
    return RUN_ALL_TESTS();
}
