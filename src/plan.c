#include "plan.h"

#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "kernels.h"

/* A tensor is cut only at multiples of so many elements: whole bytes for every dtype, and results of
 * neighbouring pieces start at multiples of 256 bytes. */
#define CUT_ELEMENTS 1024u

/* Chunks with more jobs than this are closed early: their list may take an eighth of a slot. */
#define JOBS_SHARE 8u

typedef struct planner {
    const fst_header *headers;
    const char *const *paths;
    const fst_plan_options *options;
    fst_plan *plan;
    fst_error *error;
    size_t pieces_room, runs_room, chunks_room, blocks_room;
    fst_plan_chunk *open; /* the chunk that still grows, or NULL */
    uint32_t open_jobs;   /* CONVERT pieces in it */
} planner;

static fst_status no_memory(fst_error *error) {
    return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory while planning");
}

/* Room for one more of `size` bytes in *array; the indexes of pieces and runs are 32 bits wide. */
static int room(void *array, size_t count, size_t *capacity, size_t size) {
    void **memory = array;
    if (count < *capacity) return 1;
    size_t wanted = *capacity ? *capacity * 2 : 64;
    void *larger = wanted <= UINT32_MAX ? realloc(*memory, wanted * size) : NULL;
    if (!larger) return 0;
    *memory = larger;
    *capacity = wanted;
    return 1;
}

static fst_status choose_dtype(planner *p, const fst_entry *entry, uint32_t file, fst_dtype cast,
                               fst_dtype *dtype) {
    fst_where where = {p->paths[file], (int)file, (int64_t)(p->headers[file].data_start + entry->begin)};
    *dtype = entry->dtype;
    if (cast == FST_NATIVE || !fst_dtype_is_castable(entry->dtype)) return FST_OK;
    if (!fst_kernels_have((int)entry->dtype, (int)cast))
        return fst_fail(
            p->error, FST_E_NO_CAST, 0, &where,
            "tensor \"%s\" is %s, which no kernel casts to %s; load it as stored, or leave it out",
            entry->name, fst_dtype_name(entry->dtype), fst_dtype_name(cast));
    *dtype = cast;
    return FST_OK;
}

static uint64_t elements(const fst_entry *entry) {
    return (entry->end - entry->begin) / fst_dtype_bits(entry->dtype) * 8 +
           (entry->end - entry->begin) % fst_dtype_bits(entry->dtype) * 8 / fst_dtype_bits(entry->dtype);
}

/* A place for the result: behind the last one, or in a new block. */
static fst_status place(planner *p, fst_plan_tensor *tensor) {
    fst_plan *plan = p->plan;
    uint64_t size = (tensor->nbytes + FST_TENSOR_ALIGN - 1) / FST_TENSOR_ALIGN * FST_TENSOR_ALIGN;
    if (size < tensor->nbytes) return no_memory(p->error);
    uint64_t *last = plan->blocks_count ? &plan->blocks[plan->blocks_count - 1] : NULL;
    if (!last || (size > 0 && *last > 0 && *last + size > p->options->block_bytes) || *last + size < size) {
        if (!room(&plan->blocks, plan->blocks_count, &p->blocks_room, sizeof *plan->blocks))
            return no_memory(p->error);
        last = &plan->blocks[plan->blocks_count++];
        *last = 0;
    }
    tensor->block = (uint32_t)(plan->blocks_count - 1);
    /* Empty tensors have an address, too, but no block of their own: it would be one that nobody fills. */
    tensor->block_offset = *last;
    *last += size;
    plan->bytes_blocks += size;
    return FST_OK;
}

/* Whether the caller's memory will do for the result. */
static fst_status check_memory(planner *p, const fst_plan_tensor *tensor, const fst_entry *entry,
                               const fst_choice *choice) {
    unsigned bits = fst_dtype_bits(tensor->dtype), align = bits < 8 ? 1 : bits / 8;
    fst_where where = {p->paths[tensor->file], (int)tensor->file,
                       (int64_t)(p->headers[tensor->file].data_start + entry->begin)};
    if (choice->memory_bytes < tensor->nbytes)
        return fst_fail(p->error, FST_E_ARG, 0, &where,
                        "tensor \"%s\": the memory given for it has %llu bytes, it needs %llu", entry->name,
                        (unsigned long long)choice->memory_bytes, (unsigned long long)tensor->nbytes);
    if ((uintptr_t)choice->memory % align)
        return fst_fail(p->error, FST_E_ARG, 0, &where,
                        "tensor \"%s\": the memory given for it is not aligned to %u bytes", entry->name,
                        align);
    return FST_OK;
}

static void close_chunk(planner *p) {
    if (!p->open) return;
    p->open->jobs_bytes = p->open_jobs * (uint32_t)sizeof(fst_batch_job);
    if (p->open->jobs_bytes > p->plan->max_jobs_bytes) p->plan->max_jobs_bytes = p->open->jobs_bytes;
    p->open = NULL;
    p->open_jobs = 0;
}

static fst_status open_chunk(planner *p, uint32_t file, uint64_t offset, uint32_t block) {
    fst_plan *plan = p->plan;
    if (!room(&plan->chunks, plan->chunks_count, &p->chunks_room, sizeof *plan->chunks))
        return no_memory(p->error);
    p->open = &plan->chunks[plan->chunks_count++];
    *p->open = (fst_plan_chunk){
        .file = file, .offset = offset, .first_run = (uint32_t)plan->runs_count, .block = block};
    return FST_OK;
}

static fst_status add_piece(planner *p, fst_run_kind kind, const fst_plan_piece *piece) {
    fst_plan *plan = p->plan;
    fst_plan_run *run = p->open->runs ? &plan->runs[plan->runs_count - 1] : NULL;
    if (!run || kind == FST_RUN_PLACE || run->kind != kind) {
        if (!room(&plan->runs, plan->runs_count, &p->runs_room, sizeof *plan->runs))
            return no_memory(p->error);
        run = &plan->runs[plan->runs_count++];
        *run = (fst_plan_run){kind, (uint32_t)plan->pieces_count, 0, piece->chunk_offset, 0};
        p->open->runs++;
    }
    if (!room(&plan->pieces, plan->pieces_count, &p->pieces_room, sizeof *plan->pieces))
        return no_memory(p->error);
    plan->pieces[plan->pieces_count++] = *piece;
    run->pieces++;
    run->nbytes += piece->nbytes;
    p->open->nbytes += piece->nbytes;
    plan->bytes_read += piece->nbytes;
    if (kind == FST_RUN_CONVERT) p->open_jobs++;
    return FST_OK;
}

/* True when a tensor's bytes from `offset` on may go into the open chunk: they follow what is in it, and their block is
 * the chunk's. So no chunk needs memory that only comes once an earlier one is done with. */
static int continues(planner *p, const fst_plan_tensor *tensor, uint64_t offset) {
    fst_plan_chunk *open = p->open;
    if (!open || open->file != tensor->file || open->offset + open->nbytes != offset) return 0;
    if (open->block == FST_NO_BLOCK) open->block = tensor->block;
    return tensor->block == FST_NO_BLOCK || tensor->block == open->block;
}

/* How much of `left` bytes goes into the open chunk: all, or what a cut allows, or nothing. */
static uint64_t fitting(const planner *p, uint64_t left, uint64_t cut) {
    uint64_t space = p->options->chunk_bytes - p->open->nbytes;
    if (p->open_jobs >= p->options->chunk_bytes / JOBS_SHARE / sizeof(fst_batch_job)) return 0;
    return left <= space ? left : space / cut * cut;
}

static fst_status add_tensor(planner *p, uint32_t index, const fst_entry *entry) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    unsigned bits = fst_dtype_bits(entry->dtype), result_bits = fst_dtype_bits(tensor->dtype);
    uint64_t start = p->headers[tensor->file].data_start + entry->begin;
    uint64_t total = entry->end - entry->begin, done = 0, cut = CUT_ELEMENTS * bits / 8;
    while (done < total) {
        uint64_t take = continues(p, tensor, start + done) ? fitting(p, total - done, cut) : 0;
        if (take == 0) {
            close_chunk(p);
            fst_status status = open_chunk(p, tensor->file, start + done, tensor->block);
            if (status) return status;
            take = fitting(p, total - done, cut);
        }
        if (tensor->chunks++ == 0) tensor->first_chunk = (uint32_t)(p->plan->chunks_count - 1);
        uint64_t before = done * 8 / bits; /* elements; done is a multiple of cut */
        fst_plan_piece piece = {
            .tensor = index,
            .chunk_offset = p->open->nbytes,
            .nbytes = (uint32_t)take,
            .dst_offset = before * result_bits / 8,
            .count = take * 8 / bits,
        };
        int kept = tensor->dtype == entry->dtype;
        fst_status status =
            add_piece(p, kept && take >= p->options->place_bytes ? FST_RUN_PLACE : FST_RUN_CONVERT, &piece);
        if (status) return status;
        done += take;
    }
    return FST_OK;
}

static fst_status plan_file(planner *p, uint32_t file, const fst_choice *choices) {
    const fst_header *header = &p->headers[file];
    for (size_t i = 0; i < header->count; i++) {
        const fst_entry *entry = &header->tensors[i];
        if (choices && choices[i].skip) {
            p->plan->ignored++;
            continue;
        }
        uint32_t index = (uint32_t)p->plan->tensors_count;
        fst_plan_tensor *tensor = &p->plan->tensors[index];
        *tensor = (fst_plan_tensor){.file = file, .entry = (uint32_t)i, .block = FST_NO_BLOCK};
        tensor->memory = choices ? choices[i].memory : NULL;
        fst_dtype cast = choices ? choices[i].cast : p->options->cast;
        fst_status status = choose_dtype(p, entry, file, cast, &tensor->dtype);
        if (status) return status;
        uint64_t count = elements(entry);
        if (count > UINT64_MAX / 64) return no_memory(p->error);
        tensor->nbytes = fst_dtype_bytes(tensor->dtype, count);
        p->plan->tensors_count++;
        p->plan->bytes_out += tensor->nbytes;
        status = tensor->memory ? check_memory(p, tensor, entry, &choices[i]) : place(p, tensor);
        if (!status) status = add_tensor(p, index, entry);
        if (status) return status;
    }
    return FST_OK;
}

fst_status fst_plan_make(const fst_header *headers, const char *const *paths, size_t files,
                         const fst_choice *choices, const fst_plan_options *options, fst_plan *out,
                         fst_error *error) {
    planner p = {.headers = headers, .paths = paths, .options = options, .plan = out, .error = error};
    fst_status status = FST_OK;
    size_t count = 0;
    memset(out, 0, sizeof *out);
    if (options->chunk_bytes < CUT_ELEMENTS * 8 || options->chunk_bytes > UINT32_MAX / 2)
        return fst_fail(error, FST_E_ARG, 0, NULL, "chunks of %llu bytes: want 8 KiB to 2 GiB",
                        (unsigned long long)options->chunk_bytes);
    for (size_t i = 0; i < files; i++) count += headers[i].count;
    out->tensors = count <= UINT32_MAX ? calloc(count ? count : 1, sizeof *out->tensors) : NULL;
    if (!out->tensors) return no_memory(error);
    for (size_t i = 0; i < files && !status; i++) {
        status = plan_file(&p, (uint32_t)i, choices);
        if (choices) choices += headers[i].count;
    }
    close_chunk(&p);
    if (out->blocks_count && out->blocks[0] == 0) /* they are all empty */
        out->bytes_blocks = out->blocks[0] = FST_TENSOR_ALIGN;
    if (status) fst_plan_free(out);
    return status;
}

void fst_plan_free(fst_plan *plan) {
    free(plan->tensors);
    free(plan->pieces);
    free(plan->runs);
    free(plan->chunks);
    free(plan->blocks);
    memset(plan, 0, sizeof *plan);
}
