/* Tensors of a model as DLPack 1.x tensors. One allocation holds the managed tensor, its shape and its
 * strides; it has a reference on the block, which is freed with the last of those. docs/dlpack.md. */
#include <dlpack/dlpack.h>

#include <stdlib.h>

#include "dtype.h"
#include "model.h"

#define F4_LANES 2 /* PyTorch's float4_e2m1fn_x2: a byte is one element of two lanes */
#define F4_REFUSED "DLPack has F4 in pairs along the last dimension, "

typedef struct {
    DLManagedTensorVersioned managed; /* first: the deleter frees what it points to */
    int64_t extents[];                /* ndim of the shape, then ndim of the strides */
} exported;

static void delete_export(DLManagedTensorVersioned *managed) {
    if (!managed) return;
    fst_block *block = managed->manager_ctx;
    free(managed); /* the struct is the allocation's first member */
    fst_block_drop(block);
}

static fst_status refuse(const fst_model *model, const fst_model_tensor *tensor, fst_status status,
                         const char *what, fst_error *error) {
    fst_where where = {model->paths.files[tensor->file], (int)tensor->file, -1};
    return fst_fail(error, status, 0, &where, "tensor \"%s\": %s", tensor->entry->name, what);
}

/* Elements a DLPack element stands for along the last dimension. */
static unsigned lanes_of(fst_dtype dtype) { return dtype == FST_F4 ? F4_LANES : 1; }

/* NULL, or why DLPack cannot have this tensor. Strides are row-major and count elements. An extent of 0
 * counts as 1 in them, as in PyTorch, so they are never 0 and shapes with many zeros are no special case. */
static const char *fill_extents(const fst_model_tensor *tensor, int64_t *shape, int64_t *strides) {
    const fst_entry *entry = tensor->entry;
    unsigned lanes = lanes_of(tensor->dtype);
    int64_t stride = 1;
    if (lanes > 1 && entry->ndim == 0) return F4_REFUSED "and there is none; read it through fst_tensor";
    for (uint32_t d = entry->ndim; d-- > 0;) {
        uint64_t extent = entry->shape[d];
        if (d + 1 == entry->ndim) {
            if (extent % lanes) return F4_REFUSED "which is odd; read it through fst_tensor";
            extent /= lanes;
        }
        if (extent > INT64_MAX) return "an extent is over 2^63 - 1, DLPack's largest";
        shape[d] = (int64_t)extent;
        strides[d] = stride;
        if (d > 0 && extent && __builtin_mul_overflow(stride, (int64_t)extent, &stride))
            return "a stride is over 2^63 - 1, DLPack's largest";
    }
    return NULL;
}

static DLTensor describe(const fst_model *model, const fst_model_tensor *tensor, int64_t *extents) {
    uint32_t ndim = tensor->entry->ndim;
    return (DLTensor){
        /* NULL when there are no bytes: dlpack.h wants it so. */
        .data = tensor->nbytes ? tensor->data : NULL,
        .device = {(DLDeviceType)model->gpu->dlpack_type, model->gpu->index},
        .ndim = (int32_t)ndim,
        .dtype = {(uint8_t)fst_dtype_dlpack_code(tensor->dtype), (uint8_t)fst_dtype_bits(tensor->dtype),
                  (uint16_t)lanes_of(tensor->dtype)},
        .shape = extents,
        .strides = extents + ndim,
    };
}

static fst_status export_tensor(const fst_model *model, size_t i, DLManagedTensorVersioned **out,
                                fst_error *error) {
    if (i >= model->count)
        return fst_fail(error, FST_E_ARG, 0, NULL, "tensor %zu is asked for, but the model has %zu", i,
                        model->count);
    const fst_model_tensor *tensor = &model->tensors[i];
    if (!model->gpu || (model->is_streamed && tensor->nbytes && !tensor->data))
        return refuse(model, tensor, FST_E_NO_DATA, "it was opened, not loaded; use fst_load", error);
    uint32_t ndim = tensor->entry->ndim;
    exported *made = malloc(sizeof *made + 2 * ndim * sizeof made->extents[0]);
    if (!made) return refuse(model, tensor, FST_E_MEMORY, "no memory for its DLPack tensor", error);
    const char *why = fill_extents(tensor, made->extents, made->extents + ndim);
    if (why) {
        free(made);
        return refuse(model, tensor, FST_E_DLPACK, why, error);
    }
    made->managed = (DLManagedTensorVersioned){
        .version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION},
        .manager_ctx = tensor->block,
        .deleter = delete_export,
        .dl_tensor = describe(model, tensor, made->extents),
    };
    if (tensor->block) fst_block_hold(tensor->block);
    *out = &made->managed;
    return FST_OK;
}

fst_status fst_model_dlpack(fst_model *model, size_t i, DLManagedTensorVersioned **out) {
    fst_error error;
    fst_status status;
    if (out) *out = NULL;
    if (!model || !out)
        status = fst_fail(&error, FST_E_ARG, 0, NULL, "fst_model_dlpack: %s is NULL", out ? "model" : "out");
    else status = export_tensor(model, i, out, &error);
    if (status) fst_set_last_error(&error);
    return status;
}
