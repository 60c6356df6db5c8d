/* Tensor by tensor: fst_stream_open, next, close. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "loading.h"

#define USUAL_MEMORY ((uint64_t)1 << 30)
#define MOST_BLOCK ((uint64_t)64 << 20)

struct fst_stream {
    fst_loading loading;
    fst_error error; /* of the loading; sticky */
    fst_tracking tracking;
    uint32_t *left_in_block; /* tensors of each block that were not given yet */
    fst_block *lent;         /* of the tensor that is there until the next call, or NULL */
    size_t given;
    pid_t process;
    int running; /* the pipeline was begun and not ended */
};

/* ---- Opening ------------------------------------------------------------------------------------- */

static const char *largest_of_block(const fst_loading *l, size_t block) {
    const fst_plan_tensor *largest = NULL;
    for (size_t i = 0; i < l->plan.tensors_count; i++) {
        const fst_plan_tensor *tensor = &l->plan.tensors[i];
        if (tensor->block == block && (!largest || tensor->nbytes > largest->nbytes)) largest = tensor;
    }
    return largest ? l->model->headers[largest->file].tensors[largest->entry].name : "";
}

/* The bound on memory: what the caller gave, if the largest block fits. */
static fst_status set_limit(fst_loading *l) {
    uint64_t limit = l->options.memory_bytes ? l->options.memory_bytes : USUAL_MEMORY;
    for (size_t i = 0; i < l->plan.blocks_count; i++) {
        if (l->plan.blocks[i] <= limit) continue;
        if (l->options.memory_bytes)
            return fst_fail(l->error, FST_E_ARG, 0, NULL,
                            "tensor \"%s\" takes %llu bytes, more than the stream's bound of %llu",
                            largest_of_block(l, i), (unsigned long long)l->plan.blocks[i],
                            (unsigned long long)limit);
        limit = l->plan.blocks[i];
    }
    if (l->plan.bytes_pending > limit && l->options.memory_bytes)
        return fst_fail(
            l->error, FST_E_ARG, 0, NULL,
            "results that are fused take %llu bytes until their parts are there, more than the stream's "
            "bound of %llu",
            (unsigned long long)l->plan.bytes_pending, (unsigned long long)limit);
    if (l->plan.bytes_pending > limit) limit = l->plan.bytes_pending;
    l->budget->limit = limit;
    return FST_OK;
}

static fst_status make_tracking(fst_stream *s) {
    fst_loading *l = &s->loading;
    const fst_plan *plan = &l->plan;
    fst_tracking *t = &s->tracking;
    t->left = calloc(plan->tensors_count + 1, sizeof *t->left);
    t->ready = calloc(plan->tensors_count + 1, sizeof *t->ready);
    s->left_in_block = calloc(plan->blocks_count + 1, sizeof *s->left_in_block);
    if (!t->left || !t->ready || !s->left_in_block) return fst_no_memory(l->error);
    for (uint32_t i = 0; i < plan->tensors_count; i++) {
        const fst_plan_tensor *tensor = &plan->tensors[i];
        if (tensor->result == FST_NO_TENSOR) { /* a companion: nobody waits for it */
            atomic_init(&t->left[i], UINT32_MAX);
            continue;
        }
        atomic_init(&t->left[i], tensor->pieces);
        if (tensor->pieces == 0) t->ready[t->ready_count++] = i;
        if (tensor->block != FST_NO_BLOCK) s->left_in_block[tensor->block]++;
    }
    l->job.tracking = t;
    return FST_OK;
}

/* Enters the device, and leaves it. */
static fst_status on_device(fst_stream *s, fst_status (*what)(fst_stream *)) {
    fst_loading *l = &s->loading;
    const fst_gpu *gpu = l->model->gpu;
    int saved, code = gpu->calls->enter(gpu, &saved);
    if (code) return fst_gpu_fail(l->error, gpu, code, "choosing the device");
    fst_status status = what(s);
    gpu->calls->leave(gpu, saved);
    return status;
}

static fst_status begin(fst_stream *s) {
    fst_status status = fst_pipeline_begin(s->loading.engine, &s->loading.job, s->loading.error);
    s->running = status == FST_OK;
    return status;
}

static fst_status open_stream(fst_stream *s, const char *const *files, const fst_options *options) {
    fst_loading *l = &s->loading;
    l->error = &s->error;
    fst_status status = fst_loading_begin(l, files, options);
    if (!status && l->options.comm_kind != FST_COMM_NONE)
        status = fst_fail(l->error, FST_E_ARG, 0, NULL,
                          "a stream does not share its reading: its consumer would hold up other ranks");
    if (!status) status = fst_loading_open(l, files);
    if (!status && !(l->budget = fst_budget_new(UINT64_MAX))) status = fst_no_memory(l->error);
    if (status) return status;
    uint64_t block = (l->options.memory_bytes ? l->options.memory_bytes : USUAL_MEMORY) / 4;
    status = fst_loading_prepare(l, block < MOST_BLOCK ? block : MOST_BLOCK);
    if (!status) status = set_limit(l);
    if (!status) status = make_tracking(s);
    l->model->is_streamed = 1;
    return status ? status : on_device(s, begin);
}

fst_status fst_stream_open_some(const char *const *files, const fst_options *options,
                                const unsigned char *unwanted, fst_stream **out, fst_error *error) {
    fst_error mine = {.status = FST_OK, .file = -1, .offset = -1};
    fst_stream *s = out ? calloc(1, sizeof *s) : NULL;
    fst_status status;
    if (out) *out = NULL;
    if (!out) {
        status = fst_fail(&mine, FST_E_ARG, 0, NULL, "there is no place for the stream");
    } else if (!s) {
        status = fst_no_memory(&mine);
    } else {
        s->error = mine;
        s->process = getpid();
        s->loading.unwanted = unwanted;
        status = open_stream(s, files, options);
        mine = s->error;
    }
    if (!status) {
        *out = s;
        return FST_OK;
    }
    fst_stream_close(s);
    fst_set_last_error(&mine);
    if (error) *error = mine;
    return status;
}

fst_status fst_stream_open(const char *const *files, const fst_options *options, fst_stream **out,
                           fst_error *error) {
    return fst_stream_open_some(files, options, NULL, out, error);
}

/* ---- The next tensor ------------------------------------------------------------------------------- */

/* Everything has arrived, or failed. */
static fst_status end(fst_stream *s) {
    fst_loading *l = &s->loading;
    fst_pipeline_stats stats;
    if (!s->running) return FST_OK;
    s->running = 0;
    fst_status status = fst_pipeline_end(l->engine, &l->job, 0, &stats, l->error);
    if (!status) status = fst_loading_check_files(l);
    if (!status) fst_loading_fill_stats(l, &stats);
    return status;
}

/* Which tensor is next, its data ready. */
static fst_status wait_for_next(fst_stream *s, uint32_t *which, fst_error *error) {
    fst_loading *l = &s->loading;
    const fst_gpu *gpu = l->model->gpu;
    int saved, code = gpu->calls->enter(gpu, &saved);
    if (code) return fst_gpu_fail(error, gpu, code, "choosing the device");
    *which = l->options.flags & FST_AS_READY ? FST_ANY_TENSOR : l->model->tensors[s->given].planned;
    fst_status status = fst_pipeline_next(l->engine, &l->job, s->given, which, l->options.stream, error);
    gpu->calls->leave(gpu, saved);
    return status;
}

/* Gives a tensor to the consumer: from then on its block lives as long as they want, and as tensors in it are still to
 * be given. */
static fst_status give(fst_stream *s, uint32_t which, fst_tensor *out,
                       struct DLManagedTensorVersioned **dlpack, fst_error *error) {
    fst_model *model = s->loading.model;
    const fst_plan_tensor *planned = &s->loading.plan.tensors[which];
    uint32_t index = planned->result;
    fst_model_tensor *tensor = &model->tensors[index];
    /* An empty tensor may come before its block does. */
    int in_block = planned->block != FST_NO_BLOCK;
    int there = in_block && atomic_load(&s->loading.job.blocks[planned->block]);
    tensor->block = there ? model->blocks[planned->block] : NULL;
    tensor->data =
        tensor->block ? (unsigned char *)tensor->block->data + planned->block_offset : planned->memory;
    fst_status status = dlpack ? fst_model_dlpack(model, index, dlpack) : FST_OK;
    if (status) {
        *error = *fst_last_error();
        tensor->block = NULL; /* it comes again */
        tensor->data = NULL;
        return status;
    }
    fst_describe_tensor(model, tensor, out);
    if (!dlpack && tensor->block) {
        s->lent = tensor->block;
        fst_block_hold(s->lent);
    }
    tensor->block = NULL;
    tensor->data = NULL;
    if (in_block && --s->left_in_block[planned->block] == 0 && there) {
        fst_block_drop_behind(model->blocks[planned->block], s->loading.options.stream);
        model->blocks[planned->block] = NULL;
    }
    s->given++;
    return FST_OK;
}

static fst_status next(fst_stream *s, fst_tensor *out, struct DLManagedTensorVersioned **dlpack,
                       fst_error *error) {
    const size_t count = s->loading.model->count;
    uint32_t which;
    fst_block_drop_behind(s->lent, s->loading.options.stream);
    s->lent = NULL;
    *error = s->error;
    if (error->status) return error->status;
    fst_status status = FST_OK;
    int last = s->given + 1 >= count;
    if (s->given < count) status = wait_for_next(s, &which, error);
    if (status == FST_E_AGAIN) return status;
    if (!status && last) {
        status = on_device(s, end);
        *error = s->error;
    }
    if (status) {
        s->error = *error;
        return status;
    }
    return s->given < count ? give(s, which, out, dlpack, error) : FST_OK;
}

fst_status fst_stream_next(fst_stream *s, fst_tensor *tensor, struct DLManagedTensorVersioned **dlpack,
                           fst_error *error) {
    fst_error mine = {.status = FST_OK, .file = -1, .offset = -1};
    if (tensor) memset(tensor, 0, sizeof *tensor);
    if (dlpack) *dlpack = NULL;
    fst_status status = s && tensor
                            ? next(s, tensor, dlpack, &mine)
                            : fst_fail(&mine, FST_E_ARG, 0, NULL, "no stream, or no place for the tensor");
    if (!status) return FST_OK;
    fst_set_last_error(&mine);
    if (error) *error = mine;
    return status;
}

fst_status fst_stream_take(fst_stream *s, fst_tensor *tensor, fst_block **block, fst_error *error) {
    fst_status status = fst_stream_next(s, tensor, NULL, error);
    *block = s->lent;
    s->lent = NULL;
    return status;
}

const fst_model *fst_stream_model(const fst_stream *s) { return s ? s->loading.model : NULL; }

void fst_stream_close(fst_stream *s) {
    fst_pipeline_stats stats;
    if (!s || s->process != getpid()) return; /* its threads are not in a child */
    if (s->running) fst_pipeline_end(s->loading.engine, &s->loading.job, 1, &stats, NULL);
    fst_block_drop_behind(s->lent, s->loading.options.stream);
    fst_loading_end(&s->loading);
    fst_model_free(s->loading.model);
    free((void *)s->tracking.left);
    free(s->tracking.ready);
    free(s->left_in_block);
    free(s);
}
