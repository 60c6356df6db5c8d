/* What a cast does to a model's values: a table of some tensors before and after.
 *
 *     fst_demo MODEL.safetensors
 *
 * Before: loaded as stored, on the CPU. After: loaded as BF16 on the first GPU that works, otherwise the CPU;
 * saved from there, and the saved file loaded as stored on the CPU, so that its values can be printed. */
#include <fst.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { rows = 8, values = 4 };

static fst_model *load(const char *path, fst_dtype cast, int device) {
    const char *const files[] = {path, NULL};
    fst_options options = FST_OPTIONS_INIT;
    fst_model *model;
    fst_error error;
    options.cast = cast;
    options.device = device;
    if (fst_load(files, &options, &model, &error) != FST_OK) {
        fprintf(stderr, "fst_demo: %s: %s: %s\n", path, fst_status_name(error.status), error.text);
        return NULL;
    }
    return model;
}

/* `model` as it is on its device, in host memory. */
static fst_model *on_host(const fst_model *model, const char *path) {
    fst_error error;
    if (fst_save(model, path, NULL, &error) != FST_OK) {
        fprintf(stderr, "fst_demo: %s: %s: %s\n", path, fst_status_name(error.status), error.text);
        return NULL;
    }
    return load(path, FST_NATIVE, FST_DEVICE_CPU);
}

static uint64_t elements(const fst_tensor *tensor) {
    uint64_t count = 1;
    for (size_t d = 0; d < tensor->ndim; d++) count *= tensor->shape[d];
    return count;
}

static void print_value(const fst_tensor *tensor, uint64_t i) {
    const unsigned char *data = tensor->data;
    uint32_t bits = 0;
    int64_t integer;
    float number;
    switch (tensor->dtype) {
    case FST_BF16:
        memcpy((unsigned char *)&bits + 2, data + 2 * i, 2); /* the upper half of an F32, on x86-64 */
        memcpy(&number, &bits, sizeof number);
        printf(" %13.9g", (double)number);
        break;
    case FST_F32:
        memcpy(&number, data + 4 * i, sizeof number);
        printf(" %13.9g", (double)number);
        break;
    case FST_I64:
        memcpy(&integer, data + 8 * i, sizeof integer);
        printf(" %13" PRId64, integer);
        break;
    default: printf(" %13s", "...");
    }
}

static void print_tensor(const fst_tensor *tensor) {
    const uint64_t count = elements(tensor);
    printf("  %-5s", fst_dtype_name(tensor->dtype));
    for (uint64_t i = 0; i < count && i < values; i++) print_value(tensor, i);
    putchar('\n');
}

static int print_row(const fst_model *before, const fst_model *after, size_t i) {
    fst_tensor a, b;
    if (fst_model_at(before, i, &a) != FST_OK || fst_model_find(after, a.name, &b) != FST_OK) {
        fprintf(stderr, "fst_demo: %s\n", fst_last_error()->text);
        return 0;
    }
    printf("%s [", a.name);
    for (size_t d = 0; d < a.ndim; d++) printf("%s%" PRIu64, d ? ", " : "", a.shape[d]);
    printf("] %s -> %s\n", fst_dtype_name(a.dtype), fst_dtype_name(b.dtype));
    print_tensor(&a);
    print_tensor(&b);
    return 1;
}

static int print_table(const fst_model *before, const fst_model *after) {
    const size_t count = fst_model_count(before);
    for (size_t row = 0; row < rows && row < count; row++)
        if (!print_row(before, after, count <= rows ? row : row * (count - 1) / (rows - 1))) return 0;
    return 1;
}

int main(int argc, char **argv) {
    const char *folder = getenv("TMPDIR");
    char path[4096];
    int file = -1, right = 0;
    if (argc != 2) {
        fprintf(stderr, "usage: fst_demo MODEL.safetensors\n");
        return 2;
    }
    fst_model *before = load(argv[1], FST_NATIVE, FST_DEVICE_CPU);
    fst_model *cast = before ? load(argv[1], FST_BF16, FST_DEVICE_AUTO) : NULL;
    const int length = snprintf(path, sizeof path, "%s/fst-demo-XXXXXX", folder && *folder ? folder : "/tmp");
    if (cast && length < (int)sizeof path) file = mkstemp(path);
    if (file >= 0) {
        close(file);
        fst_model *after = on_host(cast, path);
        right = after && print_table(before, after);
        fst_model_free(after);
        unlink(path);
    } else if (cast) {
        fprintf(stderr, "fst_demo: %s: %s\n", path, strerror(errno));
    }
    fst_model_free(cast);
    fst_model_free(before);
    return right ? 0 : 1;
}
