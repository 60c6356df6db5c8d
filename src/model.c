/* Models: blocks, names, access, ownership. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"
#include "scheme.h"

/* ---- Blocks ---------------------------------------------------------------------------------- */

void fst_block_hold(fst_block *block) {
    atomic_fetch_add_explicit(&block->references, 1, memory_order_relaxed);
}

static int device_number(const fst_gpu *gpu) { return gpu->host_access ? -1 : gpu->index; }

void fst_block_drop(fst_block *block) { fst_block_drop_behind(block, NULL); }

void fst_block_drop_behind(fst_block *block, fst_queue stream) {
    if (!block || atomic_fetch_sub_explicit(&block->references, 1, memory_order_acq_rel) != 1) return;
    const fst_allocator *own = &block->allocator;
    if (own->allocate) own->release(own->arg, block->data, block->nbytes, device_number(block->gpu));
    else if (stream) block->gpu->calls->free_behind(block->gpu, stream, block->data, block->nbytes);
    else block->gpu->calls->free_block(block->gpu, block->data, block->nbytes);
    if (block->budget) fst_budget_give(block->budget, block->nbytes);
    fst_budget_drop(block->budget);
    free(block);
}

/* The memory of a block. 0, or a code. */
static int get_memory(fst_block *block) {
    const fst_allocator *own = &block->allocator;
    if (!own->allocate) return block->gpu->calls->alloc_block(block->gpu, block->nbytes, &block->data);
    block->data = own->allocate(own->arg, block->nbytes, device_number(block->gpu));
    return block->data ? 0 : FST_GPU_OUT_OF_MEMORY;
}

fst_status fst_block_new(const fst_gpu *gpu, const fst_allocator *allocator, fst_budget *budget,
                         uint64_t nbytes, uint64_t wanted, fst_block **out, fst_error *error) {
    fst_block *block = calloc(1, sizeof *block);
    *out = NULL;
    if (!block) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
    if (budget && !fst_budget_take(budget, nbytes)) {
        free(block);
        return fst_fail(error, FST_E_CANCELLED, 0, NULL, "the load was stopped");
    }
    atomic_init(&block->references, 1);
    block->gpu = gpu;
    block->nbytes = nbytes;
    block->budget = fst_budget_hold(budget);
    if (allocator) block->allocator = *allocator;
    int code = get_memory(block);
    if (code == 0 && block->allocator.allocate && (uintptr_t)block->data % FST_TENSOR_ALIGN) {
        fst_block_drop(block);
        return fst_fail(error, FST_E_ARG, 0, NULL,
                        "the allocator gave memory that is not aligned to %u bytes", FST_TENSOR_ALIGN);
    }
    if (code) {
        uint64_t unused = fst_gpu_available(gpu);
        char what[160];
        if (budget) fst_budget_give(budget, nbytes);
        fst_budget_drop(block->budget);
        free(block);
        snprintf(what, sizeof what, "allocating %llu bytes for tensors (%llu in all, %llu are free)",
                 (unsigned long long)nbytes, (unsigned long long)wanted, (unsigned long long)unused);
        return fst_gpu_fail(error, gpu, code, what);
    }
    *out = block;
    return FST_OK;
}

/* ---- Names ----------------------------------------------------------------------------------- */

static uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }

static void sip_round(uint64_t v[4]) {
    v[0] += v[1], v[1] = rotate(v[1], 13) ^ v[0], v[0] = rotate(v[0], 32);
    v[2] += v[3], v[3] = rotate(v[3], 16) ^ v[2];
    v[0] += v[3], v[3] = rotate(v[3], 21) ^ v[0];
    v[2] += v[1], v[1] = rotate(v[1], 17) ^ v[2], v[2] = rotate(v[2], 32);
}

uint64_t fst_model_hash(const fst_model *model, const char *name, size_t length) {
    uint64_t k0 = model->hash_key[0], k1 = model->hash_key[1], word;
    uint64_t v[4] = {k0 ^ 0x736f6d6570736575u, k1 ^ 0x646f72616e646f6du, k0 ^ 0x6c7967656e657261u,
                     k1 ^ 0x7465646279746573u};
    for (size_t left = length;; name += 8, left -= 8) {
        int last = left < 8;
        word = last ? (uint64_t)length << 56 : 0;
        for (size_t i = 0; last && i < left; i++) word |= (uint64_t)(unsigned char)name[i] << (8 * i);
        if (!last) memcpy(&word, name, 8);
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
        if (last) break;
    }
    v[2] ^= 0xFF;
    for (int i = 0; i < 3; i++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

size_t fst_model_slot(const fst_model *model, uint64_t hash, const char *name, size_t length) {
    size_t at = (size_t)hash & (model->names_size - 1);
    for (; model->names[at].index; at = (at + 1) & (model->names_size - 1)) {
        if (model->names[at].tag != (uint32_t)(hash >> 32)) continue;
        const fst_entry *entry = model->tensors[model->names[at].index - 1].entry;
        if (entry->name_length == length && memcmp(entry->name, name, length) == 0) break;
    }
    return at;
}

/* ---- Ownership -------------------------------------------------------------------------------- */

void fst_model_free(fst_model *model) {
    if (!model) return;
    for (size_t i = 0; i < model->blocks_count; i++) fst_block_drop(model->blocks[i]);
    for (size_t i = 0; model->headers && i < model->paths.count; i++) fst_header_free(&model->headers[i]);
    fst_paths_free(&model->paths);
    free(model->headers);
    free(model->tensors);
    free(model->made);
    free(model->made_names);
    free(model->made_shapes);
    if (model->scheme) fst_scheme_free(model->scheme);
    free(model->scheme);
    free(model->names);
    free(model->blocks);
    free(model);
}

/* ---- Access ---------------------------------------------------------------------------------- */

static fst_status fail_access(fst_status status, const char *text, const char *name) {
    fst_error error;
    fst_fail(&error, status, 0, NULL, text, name);
    fst_set_last_error(&error);
    return status;
}

void fst_describe_tensor(const fst_model *model, const fst_model_tensor *tensor, fst_tensor *out) {
    const fst_entry *entry = tensor->entry;
    *out = (fst_tensor){
        .name = entry->name,
        .dtype = tensor->dtype,
        .stored_dtype = entry->dtype,
        .ndim = entry->ndim,
        .shape = entry->shape,
        .data = tensor->data,
        .nbytes = tensor->nbytes,
        .file = (int)tensor->file,
        .file_offset = model->headers[tensor->file].data_start + entry->begin,
        .file_nbytes = entry->end - entry->begin,
        .shard_dim = tensor->shard_extent ? tensor->shard_dim : FST_REPLICATE,
        .shard_begin = tensor->shard_begin,
        .shard_extent = tensor->shard_extent,
    };
}

size_t fst_model_count(const fst_model *model) { return model ? model->count : 0; }

fst_status fst_model_at(const fst_model *model, size_t i, fst_tensor *out) {
    if (out) memset(out, 0, sizeof *out);
    if (!model || !out || i >= model->count)
        return fail_access(FST_E_ARG, "%s: no model, no place for the result, or no such index",
                           "fst_model_at");
    fst_describe_tensor(model, &model->tensors[i], out);
    return FST_OK;
}

size_t fst_model_index(const fst_model *model, const char *name) {
    if (!model || !name) return (size_t)-1;
    size_t length = strlen(name);
    uint64_t hash = fst_model_hash(model, name, length);
    uint32_t found = model->names[fst_model_slot(model, hash, name, length)].index;
    return found ? found - 1 : (size_t)-1;
}

fst_status fst_model_find(const fst_model *model, const char *name, fst_tensor *out) {
    size_t i = fst_model_index(model, name);
    if (out) memset(out, 0, sizeof *out);
    if (!model || !name || !out)
        return fail_access(FST_E_ARG, "%s: no model, no name, or no place for the result", "fst_model_find");
    if (i == (size_t)-1) return fail_access(FST_E_NOT_FOUND, "there is no tensor \"%s\"", name);
    return fst_model_at(model, i, out);
}

size_t fst_model_file_count(const fst_model *model) { return model ? model->paths.count : 0; }

const char *fst_model_file_path(const fst_model *model, size_t file) {
    return model && file < model->paths.count ? model->paths.files[file] : NULL;
}

int fst_model_has_metadata(const fst_model *model, size_t file) {
    return model && file < model->paths.count && model->headers[file].has_metadata;
}

size_t fst_model_metadata_count(const fst_model *model, size_t file) {
    return model && file < model->paths.count ? model->headers[file].metadata_count : 0;
}

fst_status fst_model_metadata_at(const fst_model *model, size_t file, size_t i, fst_string *key,
                                 fst_string *value) {
    if (key) *key = (fst_string){NULL, 0};
    if (value) *value = (fst_string){NULL, 0};
    if (!key || !value || i >= fst_model_metadata_count(model, file))
        return fail_access(FST_E_ARG, "%s: no such file or pair, or no place for it",
                           "fst_model_metadata_at");
    *key = model->headers[file].metadata[2 * i];
    *value = model->headers[file].metadata[2 * i + 1];
    return FST_OK;
}

fst_status fst_model_quantization(const fst_model *model, size_t i, fst_quantization *out) {
    if (out) memset(out, 0, sizeof *out);
    if (!model || !out || i >= model->count)
        return fail_access(FST_E_ARG, "%s: no model, no place for the result, or no such index",
                           "fst_model_quantization");
    const fst_scheme *scheme = model->gpu ? NULL : model->scheme; /* a load may have dequantized them */
    if (!scheme || !scheme->roles || scheme->roles[i] != FST_ROLE_CODES)
        return fail_access(FST_E_NOT_FOUND, "tensor \"%s\" holds no codes of a quantized weight",
                           model->tensors[i].entry->name);
    const fst_quantized *weight = &scheme->weights[scheme->owner[i]];
    *out = (fst_quantization){.format = fst_format_name(weight->format),
                              .name = weight->name,
                              .companions_count = weight->companions_count,
                              .companions = weight->list};
    return FST_OK;
}

const fst_error *fst_model_quantization_error(const fst_model *model) {
    return model && model->quantization_error.status ? &model->quantization_error : NULL;
}

fst_status fst_model_stats(const fst_model *model, fst_stats *out) {
    if (!model || !out || out->size < sizeof out->size)
        return fail_access(FST_E_ARG, "%s: no model, or the size of the statistics is not set",
                           "fst_model_stats");
    size_t size = out->size;
    size_t known = size < sizeof model->stats ? size : sizeof model->stats;
    memset(out, 0, size);
    memcpy(out, &model->stats, known);
    out->size = size;
    return FST_OK;
}
