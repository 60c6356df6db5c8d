#include "sample.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "harness.h"
#include "kernels.h"
#include "support.h"

typedef struct item {
    char name[16], shape[32];
    fst_dtype dtype;
    uint64_t count, nbytes;
    unsigned char *data;
} item;

static struct {
    item items[SAMPLE_MAX];
    size_t count;
    uint64_t seed;
} sample;

void sample_begin(uint64_t seed) {
    for (size_t i = 0; i < sample.count; i++) free(sample.items[i].data);
    sample.count = 0;
    sample.seed = seed;
}

size_t sample_add(fst_dtype dtype, uint64_t count) {
    CHECK(sample.count < SAMPLE_MAX);
    item *it = &sample.items[sample.count];
    *it = (item){.dtype = dtype, .count = count, .nbytes = fst_dtype_bytes(dtype, count)};
    it->data = malloc(it->nbytes + 1);
    CHECK(it->data);
    support_random(it->data, it->nbytes, sample.seed * 1000003 + sample.count);
    if (dtype == FST_BOOL)
        for (uint64_t i = 0; i < count; i++) it->data[i] &= 1;
    sprintf(it->name, "t.%zu", sample.count);
    sprintf(it->shape, "[%llu]", (unsigned long long)count);
    return sample.count++;
}

void sample_shape(size_t index, const char *shape) {
    snprintf(sample.items[index].shape, sizeof sample.items[index].shape, "%s", shape);
}

size_t sample_count(void) { return sample.count; }

size_t sample_write(const char *path, size_t first, size_t end, size_t padding) {
    static support_tensor tensors[SAMPLE_MAX];
    for (size_t i = first; i < end; i++) {
        const item *it = &sample.items[i];
        tensors[i] = (support_tensor){it->name, fst_dtype_name(it->dtype), it->shape, it->data, it->nbytes};
    }
    return support_checkpoint(path, NULL, tensors + first, end - first, padding);
}

uint64_t sample_stored_bytes(size_t index) { return sample.items[index].nbytes; }

fst_dtype sample_result_dtype(size_t index, fst_dtype cast) {
    fst_dtype dtype = sample.items[index].dtype;
    return cast != FST_NATIVE && fst_dtype_is_castable(dtype) ? cast : dtype;
}

uint64_t sample_result_bytes(size_t index, fst_dtype cast) {
    return fst_dtype_bytes(sample_result_dtype(index, cast), sample.items[index].count);
}

size_t sample_index(const fst_tensor *tensor) {
    size_t index = SAMPLE_MAX;
    return tensor->name && sscanf(tensor->name, "t.%zu", &index) == 1 && index < sample.count ? index
                                                                                              : SAMPLE_MAX;
}

/* The library frees nothing of ours: this memory goes by its own. */
static const char *compare_cast(const item *it, const fst_tensor *tensor) {
    unsigned char *expected = malloc(tensor->nbytes + 1);
    fst_cast_args args = {it->data, expected, it->count, (int)it->dtype, (int)tensor->dtype, 0};
    const char *wrong = NULL;
    if (!expected || fst_kernels_cpu()->cast(NULL, &args)) wrong = "nothing to compare it with";
    else if (memcmp(expected, tensor->data, tensor->nbytes) != 0) wrong = "its bytes";
    free(expected);
    return wrong;
}

const char *sample_compare(const fst_tensor *tensor, fst_dtype cast) {
    size_t index = sample_index(tensor);
    if (index == SAMPLE_MAX) return "its name";
    const item *it = &sample.items[index];
    if (tensor->dtype != sample_result_dtype(index, cast)) return "its dtype";
    if (tensor->stored_dtype != it->dtype) return "its stored dtype";
    if (tensor->nbytes != sample_result_bytes(index, cast)) return "its size";
    if (tensor->file_nbytes != it->nbytes) return "its size in the file";
    if (tensor->nbytes == 0) return NULL;
    if (!tensor->data) return "it has no data";
    if (tensor->dtype != it->dtype) return compare_cast(it, tensor);
    return memcmp(it->data, tensor->data, it->nbytes) == 0 ? NULL : "its bytes";
}

void sample_check(const fst_model *model, fst_dtype cast) {
    CHECK_INT(sample.count, fst_model_count(model));
    for (size_t i = 0; i < sample.count; i++) {
        fst_tensor tensor;
        CHECK_INT(FST_OK, fst_model_at(model, i, &tensor));
        const char *wrong = sample_compare(&tensor, cast);
        if (wrong) test_fail(__FILE__, __LINE__, "tensor \"%s\": %s", tensor.name, wrong);
        CHECK_INT(i, sample_index(&tensor));
    }
}
