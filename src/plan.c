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

#define MOST_GAP \
    ((uint64_t)64 << 10) /* bytes that are read along with their neighbours though nobody wants them */
#define USUAL_BATCH ((uint64_t)16 << 20)
#define BATCH_CODES ((uint64_t)512 << 20) /* bytes of codes in a batch */

typedef struct planner {
    const fst_header *headers;
    const char *const *paths;
    const fst_plan_options *options;
    fst_plan *plan;
    fst_error *error;
    size_t pieces_room, runs_room, chunks_room, blocks_room, batches_room;
    uint32_t batch;       /* that chunks belong to now; FST_NO_BATCH: none */
    int companions;       /* they bring its companions */
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
    p->open = NULL;
    p->open_jobs = 0;
}

static fst_status open_chunk(planner *p, uint32_t file, uint64_t offset, uint32_t block) {
    fst_plan *plan = p->plan;
    if (!room(&plan->chunks, plan->chunks_count, &p->chunks_room, sizeof *plan->chunks))
        return no_memory(p->error);
    p->open = &plan->chunks[plan->chunks_count++];
    *p->open = (fst_plan_chunk){.file = file,
                                .offset = offset,
                                .first_run = (uint32_t)plan->runs_count,
                                .batch = p->companions ? p->batch : FST_NO_BATCH,
                                .companions = p->companions,
                                .block = block};
    if (p->companions) plan->batches[p->batch].companion_chunks++;
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
    plan->converts |= kind == FST_RUN_CONVERT;
    return FST_OK;
}

/* Bytes between two pieces, of tensors that do not come here: it is sooner to read them along. */
static void add_gap(planner *p, uint32_t nbytes) {
    fst_plan_run *run = &p->plan->runs[p->plan->runs_count - 1];
    if (run->kind == FST_RUN_CONVERT) run->nbytes += nbytes;
    p->open->nbytes += nbytes;
    p->plan->bytes_read += nbytes;
}

/* True when a tensor's bytes from `offset` on may go into the open chunk: they follow what is in it, with a small gap
 * perhaps, and their block is the chunk's. So no chunk needs memory that only comes once an earlier one is done with. */
static int continues(const planner *p, const fst_plan_tensor *tensor, uint64_t offset) {
    const fst_plan_chunk *open = p->open;
    if (!open || open->file != tensor->file || offset < open->offset + open->nbytes) return 0;
    uint64_t gap = offset - open->offset - open->nbytes;
    if (gap && p->plan->batches_count == 0) return 0; /* companions alone are worth it */
    if (gap > MOST_GAP || open->nbytes + gap >= p->options->chunk_bytes) return 0;
    return tensor->block == FST_NO_BLOCK || open->block == FST_NO_BLOCK || tensor->block == open->block;
}

/* How much of `left` bytes goes into the open chunk, behind a gap: all, or what a cut allows, or nothing. */
static uint64_t fitting(const planner *p, uint64_t gap, uint64_t left, uint64_t cut) {
    uint64_t space = p->options->chunk_bytes - p->open->nbytes - gap;
    if (p->open_jobs >= p->options->chunk_bytes / JOBS_SHARE / sizeof(fst_batch_job)) return 0;
    return left <= space ? left : space / cut * cut;
}

/* Makes the open chunk one that takes bytes of the tensor from `offset` on, and says how many of `left`. */
static fst_status make_space(planner *p, const fst_plan_tensor *tensor, uint64_t offset, uint64_t left,
                             uint64_t cut, uint64_t *take) {
    uint64_t gap = 0;
    *take = 0;
    if (continues(p, tensor, offset)) {
        gap = offset - p->open->offset - p->open->nbytes;
        *take = fitting(p, gap, left, cut);
    }
    if (*take) {
        if (p->open->block == FST_NO_BLOCK) p->open->block = tensor->block;
        if (gap) add_gap(p, (uint32_t)gap);
        return FST_OK;
    }
    close_chunk(p);
    fst_status status = open_chunk(p, tensor->file, offset, tensor->block);
    if (!status) *take = fitting(p, 0, left, cut);
    return status;
}

/* The chunk needs the companions of the batch. */
static void need_batch(planner *p) {
    if (p->open->batch != FST_NO_BATCH) return;
    p->open->batch = p->batch;
    p->plan->batches[p->batch].weight_chunks++;
}

/* ---- Packed integers -------------------------------------------------------------------------------- */

/* What the codes of a packed weight are counted in, in bytes. */
static uint64_t unit_of(const fst_quantized *w) { return w->format == FST_FORMAT_INT4_ROWS ? 1 : 4; }

/* Bytes from one place where the codes of a packed weight may be cut to the next: where codes lie in two words, what has
 * them whole. Transposed ones are better cut between the tiles that kernels take, if a chunk has several. */
static fst_status packed_cut(planner *p, const fst_plan_tensor *tensor, const fst_entry *entry,
                             uint64_t *cut) {
    const fst_quantized *w = tensor->weight;
    int column = w->format == FST_FORMAT_GPTQ;
    int transposed = column || w->format == FST_FORMAT_AWQ || w->format == FST_FORMAT_INT4_QUARK;
    uint64_t step = entry->shape[entry->ndim - 1] * unit_of(w); /* a row of words */
    *cut = 512;
    if (32 % w->bits && !(w->flags & FST_Q_PADDED)) {
        *cut = column ? step * w->bits : step;
        if (*cut <= p->options->chunk_bytes) return FST_OK;
        fst_where where = {p->paths[tensor->file], (int)tensor->file,
                           (int64_t)(p->headers[tensor->file].data_start + entry->begin)};
        return fst_fail(
            p->error, FST_E_UNSUPPORTED, 0, &where,
            "tensor \"%s\": codes of %u bits lie in two words; that needs slot_bytes of at least %llu",
            entry->name, w->bits, (unsigned long long)*cut);
    }
    for (uint64_t tile = column ? 16 : 128; transposed && tile; tile /= 2)
        if (step && step <= p->options->chunk_bytes / 8 / tile) {
            *cut = step * tile;
            break;
        }
    return FST_OK;
}

/* Places are counted in words; the kernel finds those in the result. */
static void place_packed(const fst_plan_tensor *tensor, unsigned result_bits, uint64_t in_matrix,
                         fst_plan_piece *piece) {
    const fst_quantized *w = tensor->weight;
    piece->dst_offset = piece->matrix * w->rows * w->cols * result_bits / 8;
    piece->count = piece->nbytes / unit_of(w);
    piece->first = in_matrix / unit_of(w);
}

static fst_status add_tensor(planner *p, uint32_t index) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
    const fst_quantized *weight = tensor->weight;
    unsigned bits = weight ? weight->bits : fst_dtype_bits(entry->dtype);
    unsigned result_bits = fst_dtype_bits(tensor->dtype);
    uint64_t start = p->headers[tensor->file].data_start + entry->begin;
    uint64_t total = entry->end - entry->begin, done = 0, cut = CUT_ELEMENTS * bits / 8;
    uint64_t matrix = weight ? weight->rows * weight->cols * bits / 8 : total; /* bytes of one */
    int packed = weight && fst_scheme_is_packed(weight);
    if (packed && weight->stack) {
        fst_status status = packed_cut(p, tensor, entry, &cut);
        if (status) return status;
        matrix = total / weight->stack; /* rows may end in words that are not full */
    }
    while (done < total) {
        uint64_t in_matrix = weight ? done % matrix : done, left = matrix - in_matrix;
        uint64_t take;
        fst_status status = make_space(p, tensor, start + done, left, cut, &take);
        if (status) return status;
        uint32_t chunk = (uint32_t)(p->plan->chunks_count - 1);
        if (tensor->pieces++ == 0) tensor->first_chunk = chunk;
        tensor->chunks = chunk - tensor->first_chunk + 1;
        uint64_t before = done * 8 / bits; /* elements; done is a multiple of cut, or of a matrix */
        fst_plan_piece piece = {
            .tensor = index,
            .chunk_offset = p->open->nbytes,
            .nbytes = (uint32_t)take,
            .dst_offset = before * result_bits / 8,
            .count = take * 8 / bits,
            .first = weight ? in_matrix * 8 / bits : 0,
            .matrix = weight ? (uint32_t)(done / matrix) : 0,
        };
        if (packed) place_packed(tensor, result_bits, in_matrix, &piece);
        int kept = !weight && tensor->dtype == entry->dtype;
        fst_run_kind kind = kept && take >= p->options->place_bytes ? FST_RUN_PLACE : FST_RUN_CONVERT;
        status = add_piece(p, kind, &piece);
        if (status) return status;
        if (kind == FST_RUN_CONVERT && !weight) p->open_jobs++;
        if (weight) need_batch(p);
        done += take;
    }
    return FST_OK;
}

/* ---- What becomes of each tensor ------------------------------------------------------------------- */

/* The weight that a tensor holds the codes of, if it is to be dequantized. */
static const fst_quantized *weight_of(const planner *p, size_t index, fst_dtype cast) {
    const fst_scheme *scheme = p->options->scheme;
    return scheme && cast != FST_NATIVE && scheme->roles[index] == FST_ROLE_CODES
               ? &scheme->weights[scheme->owner[index]]
               : NULL;
}

static fst_status set_result(planner *p, fst_plan_tensor *tensor, const fst_entry *entry, fst_dtype cast) {
    uint64_t count = elements(entry);
    if (tensor->weight) {
        const fst_quantized *w = tensor->weight;
        fst_where where = {p->paths[tensor->file], (int)tensor->file,
                           (int64_t)(p->headers[tensor->file].data_start + entry->begin)};
        if (cast != FST_F32 && cast != FST_F16 && cast != FST_BF16)
            return fst_fail(p->error, FST_E_UNSUPPORTED, 0, &where,
                            "tensor \"%s\" (%s) is not dequantized to %s: F32, F16 and BF16 there are",
                            entry->name, fst_format_name(w->format), fst_dtype_name(cast));
        if (!fst_scheme_has_kernel(w))
            return fst_fail(p->error, FST_E_UNSUPPORTED, 0, &where,
                            "tensor \"%s\": %s is not dequantized by this version; load it as stored",
                            entry->name, fst_format_name(w->format));
        tensor->dtype = cast;
        count = w->stack * w->rows * w->cols;
    } else {
        fst_status status = choose_dtype(p, entry, tensor->file, cast, &tensor->dtype);
        if (status) return status;
    }
    if (count > UINT64_MAX / 64) return no_memory(p->error);
    tensor->nbytes = fst_dtype_bytes(tensor->dtype, count);
    return FST_OK;
}

static fst_status choose_results(planner *p, uint32_t file, const fst_choice *choices) {
    const fst_header *header = &p->headers[file];
    for (size_t i = 0; i < header->count; i++) {
        const fst_entry *entry = &header->tensors[i];
        if (choices && choices[i].skip) {
            p->plan->ignored++;
            continue;
        }
        size_t index = p->plan->tensors_count++;
        fst_plan_tensor *tensor = &p->plan->tensors[index];
        fst_dtype cast = choices ? choices[i].cast : p->options->cast;
        *tensor = (fst_plan_tensor){
            .file = file, .entry = (uint32_t)i, .block = FST_NO_BLOCK, .batch = FST_NO_BATCH};
        tensor->memory = choices ? choices[i].memory : NULL;
        tensor->weight = weight_of(p, index, cast);
        fst_status status = set_result(p, tensor, entry, cast);
        if (!status && tensor->memory) status = check_memory(p, tensor, entry, &choices[i]);
        if (status) return status;
    }
    return FST_OK;
}

/* ---- Batches ------------------------------------------------------------------------------------------ */

static int compare_indexes(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Gives the companions of the weights among tensors [first, end) memory in a new batch, and plans to read them. Tensors
 * are in the order of files and offsets: so are their indexes. */
static fst_status add_companions(planner *p, size_t first, size_t end) {
    fst_plan *plan = p->plan;
    size_t count = 0, capacity = 0;
    uint32_t *list = NULL;
    fst_status status = FST_OK;
    for (size_t i = first; i < end; i++) {
        const fst_quantized *w = plan->tensors[i].weight;
        for (size_t k = 0; w && k < w->companions_count; k++) {
            if (!room(&list, count, &capacity, sizeof *list)) {
                free(list);
                return no_memory(p->error);
            }
            list[count++] = (uint32_t)w->list[k];
        }
    }
    if (count && !room(&plan->batches, plan->batches_count, &p->batches_room, sizeof *plan->batches))
        status = no_memory(p->error);
    if (count && !status) {
        qsort(list, count, sizeof *list, compare_indexes);
        close_chunk(p);
        p->batch = (uint32_t)plan->batches_count++;
        p->companions = 1;
        fst_plan_batch *batch = &plan->batches[p->batch];
        *batch = (fst_plan_batch){.nbytes = 0};
        for (size_t i = 0; i < count && !status; i++) {
            fst_plan_tensor *tensor = &plan->tensors[list[i]];
            tensor->batch = p->batch;
            tensor->block_offset = batch->nbytes;
            batch->nbytes += (tensor->nbytes + FST_TENSOR_ALIGN - 1) / FST_TENSOR_ALIGN * FST_TENSOR_ALIGN;
            status = add_tensor(p, list[i]);
        }
        close_chunk(p);
        p->companions = 0;
    }
    free(list);
    return status;
}

/* How far a batch goes that begins with tensor `first`. */
static size_t batch_end(const planner *p, size_t first) {
    const fst_plan *plan = p->plan;
    uint64_t most = p->options->batch_bytes ? p->options->batch_bytes : USUAL_BATCH, companions = 0,
             codes = 0;
    for (size_t i = first; i < plan->tensors_count; i++) {
        const fst_quantized *w = plan->tensors[i].weight;
        if (!w) continue;
        uint64_t more = 0;
        for (size_t k = 0; k < w->companions_count; k++) more += plan->tensors[w->list[k]].nbytes;
        if (codes && (companions + more > most || codes > BATCH_CODES)) return i;
        companions += more;
        codes += plan->tensors[i].nbytes;
    }
    return plan->tensors_count;
}

static int is_companion(const planner *p, size_t index) {
    const fst_scheme *scheme = p->options->scheme;
    if (!scheme || scheme->roles[index] != FST_ROLE_COMPANION) return 0;
    return p->plan->tensors[scheme->weights[scheme->owner[index]].codes].weight != NULL; /* else it is kept */
}

/* A companion is stored as it is, whatever floats become, and other tensors move up. */
static void keep_companions(planner *p) {
    uint32_t results = 0;
    for (size_t i = 0; i < p->plan->tensors_count; i++) {
        fst_plan_tensor *tensor = &p->plan->tensors[i];
        tensor->result = is_companion(p, i) ? FST_NO_TENSOR : results++;
        if (tensor->result != FST_NO_TENSOR) continue;
        const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
        tensor->dtype = entry->dtype;
        tensor->nbytes = entry->end - entry->begin;
        tensor->memory = NULL;
    }
}

static fst_status plan_tensors(planner *p) {
    fst_plan *plan = p->plan;
    fst_status status = FST_OK;
    keep_companions(p);
    for (size_t first = 0, end; first < plan->tensors_count && !status; first = end) {
        end = batch_end(p, first);
        status = add_companions(p, first, end);
        for (size_t i = first; i < end && !status; i++) {
            fst_plan_tensor *tensor = &plan->tensors[i];
            if (tensor->result == FST_NO_TENSOR) continue;
            plan->bytes_out += tensor->nbytes;
            if (!tensor->memory) status = place(p, tensor);
            if (!status) status = add_tensor(p, (uint32_t)i);
        }
    }
    return status;
}

fst_status fst_plan_make(const fst_header *headers, const char *const *paths, size_t files,
                         const fst_choice *choices, const fst_plan_options *options, fst_plan *out,
                         fst_error *error) {
    planner p = {.headers = headers,
                 .paths = paths,
                 .options = options,
                 .plan = out,
                 .error = error,
                 .batch = FST_NO_BATCH};
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
        status = choose_results(&p, (uint32_t)i, choices);
        if (choices) choices += headers[i].count;
    }
    if (!status) status = plan_tensors(&p);
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
    free(plan->batches);
    memset(plan, 0, sizeof *plan);
}
