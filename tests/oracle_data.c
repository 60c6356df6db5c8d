/* Checkpoints that the formats' own libraries wrote, against what these make of them: tests/oracle/libraries.py,
 * tests/data. */
#include <stdio.h>
#include <string.h>

#include "harness.h"
#include "support.h"

static const char *file_of(const char *name, const char *file) {
    static char path[2][1024];
    static int which;
    which = !which;
    snprintf(path[which], sizeof path[which], "%s/%s/%s.safetensors", FST_TEST_DATA, name, file);
    return path[which];
}

static fst_model *load(const char *path, fst_dtype cast, int device) {
    fst_options options = support_options(device);
    fst_model *model;
    fst_error error;
    options.cast = cast;
    if (fst_load(support_list(path), &options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s: %s", path, error.text);
    return model;
}

/* Code 8 is -0 (E2M1), or what the table in the file says (bitsandbytes). ModelOpt's tables have 0 for it, and
 * bitsandbytes' own code makes -0 of what is 0 in its table: there the sign of 0 is not compared. */
static int has_any_zero(const char *name) {
    return strncmp(name, "bnb-fp4", 7) == 0 || strcmp(name, "modelopt-nvfp4") == 0;
}

static int is_same(const unsigned char *want, const unsigned char *got, size_t size, int any_zero) {
    int zeros = any_zero;
    for (size_t i = 0; i < size; i++) zeros &= !((want[i] | got[i]) & (i + 1 < size ? 0xFF : 0x7F));
    return zeros || memcmp(want, got, size) == 0;
}

/* Each weight in the precision that its library computed in. */
static void compare(const char *name, int device) {
    fst_model *expected = load(file_of(name, "expected"), FST_NATIVE, FST_DEVICE_CPU);
    for (size_t i = 0; i < fst_model_count(expected); i++) {
        fst_tensor want, got;
        CHECK_INT(FST_OK, fst_model_at(expected, i, &want));
        fst_model *model = load(file_of(name, "model"), want.dtype, device);
        if (fst_model_find(model, want.name, &got))
            test_fail(__FILE__, __LINE__, "%s: there is no \"%s\"", name, want.name);
        CHECK_INT(want.ndim, got.ndim);
        for (uint32_t k = 0; k < want.ndim; k++) CHECK_INT(want.shape[k], got.shape[k]);
        CHECK_INT(want.nbytes, got.nbytes);
        const size_t size = fst_dtype_bits(want.dtype) / 8;
        for (size_t k = 0; k < want.nbytes; k += size)
            if (!is_same((const unsigned char *)want.data + k, (const unsigned char *)got.data + k, size,
                         has_any_zero(name)))
                test_fail(__FILE__, __LINE__, "%s: element %zu of \"%s\" is not its library's", name,
                          k / size, want.name);
        fst_model_free(model);
    }
    fst_model_free(expected);
}

TEST(oracle_data, weights_are_what_their_libraries_make_of_them) {
    for (size_t i = 0; i < SUPPORT_LIBRARIES; i++)
        for (int device = FST_DEVICE_CPU; device <= FST_DEVICE_GPU(0); device++) {
            fake_gpu_begin(&(fake_gpu_options){.seed = i});
            compare(support_libraries[i], device);
            fake_gpu_end();
        }
}
