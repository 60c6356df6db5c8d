#include "plan.h"

#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "kernels.h"
#include "os.h"
#include "shard.h"

/* A tensor is cut only at multiples of so many elements: whole bytes for every dtype, and results of
 * neighbouring pieces start at multiples of 256 bytes. */
#define CUT_ELEMENTS 1024u

/* Chunks with more jobs than this are closed early: their list may take an eighth of a slot. */
#define JOBS_SHARE 8u

#define MOST_GAP \
    ((uint64_t)64 << 10) /* bytes that are read along with their neighbours though nobody wants them */
#define SMALL_SHARE 8u   /* of a chunk, that is small */
#define USUAL_BATCH ((uint64_t)16 << 20)
#define BATCH_CODES ((uint64_t)512 << 20) /* bytes of codes in a batch */

typedef struct planner {
    const fst_header *headers;
    const char *const *paths;
    const fst_plan_options *options;
    fst_plan *plan;
    fst_error *error;
    const fst_choice **chosen; /* of each tensor; NULL: there are no choices */
    uint32_t *kept; /* likewise: the part of a weight that stays quantized, by its codes; or FST_NO_CUT */
    size_t pieces_room, runs_room, chunks_room, blocks_room, batches_room, stripes_room, windows_room;
    size_t extents_room, cuts_room;
    uint64_t window_bytes, window_used; /* of windows; of the last one */
    uint32_t batch;                     /* that chunks belong to now; FST_NO_BATCH: none */
    int companions;                     /* they bring its companions */
    int gathers;                        /* some tensors are cut: chunks may be of many places of a file */
    fst_plan_chunk *open;               /* the chunk that still grows, or NULL */
    uint32_t open_jobs;                 /* CONVERT pieces in it */
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

/* Whether anything is quantized. */
static int has_weights(const planner *p) { return p->options->scheme && p->options->scheme->count; }

static const fst_cut *cut_of(const planner *p, const fst_plan_tensor *tensor) {
    return fst_plan_cut(p->plan, tensor);
}

/* What of a tensor is read, as an entry of its file: all of it, or a part. */
static const fst_entry *entry_of(const planner *p, const fst_plan_tensor *tensor) {
    const fst_cut *cut = cut_of(p, tensor);
    return cut ? &cut->local : &p->headers[tensor->file].tensors[tensor->entry];
}

static fst_where place_of(const planner *p, const fst_plan_tensor *tensor) {
    const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
    return (fst_where){p->paths[tensor->file], (int)tensor->file,
                       (int64_t)(p->headers[tensor->file].data_start + entry->begin)};
}

static const char *name_of(const planner *p, const fst_plan_tensor *tensor) {
    return p->headers[tensor->file].tensors[tensor->entry].name;
}

/* Where byte `at` of what is read of a tensor lies in its file. */
static uint64_t file_place(const planner *p, const fst_plan_tensor *tensor, uint64_t at) {
    const fst_cut *cut = cut_of(p, tensor);
    const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
    return p->headers[tensor->file].data_start + entry->begin + (cut ? fst_cut_place(cut, at) : at);
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

/* Divisions take most of the time that a small tensor does, and few are needed: most sizes are powers of two, most
 * tensors are one piece. */
static uint64_t count_of(uint64_t nbytes, unsigned bits) {
    return bits & (bits - 1) ? nbytes * 8 / bits : nbytes * 8 >> __builtin_ctz(bits);
}

static uint64_t remainder_of(uint64_t at, uint64_t size) { return at < size ? at : at % size; }

static uint64_t elements(const fst_entry *entry) {
    unsigned bits = fst_dtype_bits(entry->dtype);
    if (bits >= 8) return (entry->end - entry->begin) >> __builtin_ctz(bits / 8);
    return (entry->end - entry->begin) / fst_dtype_bits(entry->dtype) * 8 +
           (entry->end - entry->begin) % fst_dtype_bits(entry->dtype) * 8 / fst_dtype_bits(entry->dtype);
}

static uint64_t aligned(uint64_t nbytes) {
    return (nbytes + FST_TENSOR_ALIGN - 1) / FST_TENSOR_ALIGN * FST_TENSOR_ALIGN;
}

static fst_plan_tensor *scales_of(const planner *p, const fst_plan_tensor *tensor) {
    return tensor->scales == FST_NO_TENSOR ? NULL : &p->plan->tensors[tensor->scales];
}

/* The block that chunks of a tensor need: its own or, where it has memory of its own, that of its scales. */
static uint32_t block_of(const planner *p, const fst_plan_tensor *tensor) {
    const fst_plan_tensor *scales = scales_of(p, tensor);
    return tensor->block == FST_NO_BLOCK && scales ? scales->block : tensor->block;
}

/* A place for the result, and for its scales: behind the last one, or in a new block. The first part that comes finds
 * one for all that is fused. */
static fst_status place(planner *p, fst_plan_tensor *tensor) {
    fst_plan *plan = p->plan;
    if (tensor->fused != FST_NO_TENSOR) {
        fst_plan_tensor *whole = &plan->tensors[tensor->fused];
        fst_status status = whole->block == FST_NO_BLOCK ? place(p, whole) : FST_OK;
        tensor->block = whole->block;
        tensor->block_offset += whole->block_offset;
        return status;
    }
    fst_plan_tensor *scales = scales_of(p, tensor);
    uint64_t own = tensor->memory ? 0 : aligned(tensor->nbytes);
    uint64_t size = own + (scales ? aligned(scales->nbytes) : 0);
    if (tensor->memory && !scales) return FST_OK;
    if (own < tensor->nbytes && !tensor->memory) return no_memory(p->error);
    uint64_t *last = plan->blocks_count ? &plan->blocks[plan->blocks_count - 1] : NULL;
    if (!last || (size > 0 && *last > 0 && *last + size > p->options->block_bytes) || *last + size < size) {
        if (!room(&plan->blocks, plan->blocks_count, &p->blocks_room, sizeof *plan->blocks))
            return no_memory(p->error);
        last = &plan->blocks[plan->blocks_count++];
        *last = 0;
    }
    /* Empty tensors have an address, too, but no block of their own: it would be one that nobody fills. */
    if (!tensor->memory) {
        tensor->block = (uint32_t)(plan->blocks_count - 1);
        tensor->block_offset = *last;
    }
    if (scales) {
        scales->block = (uint32_t)(plan->blocks_count - 1);
        scales->block_offset = *last + own;
    }
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
                                .first_extent = (uint32_t)plan->extents_count,
                                .first_run = (uint32_t)plan->runs_count,
                                .batch = p->companions ? p->batch : FST_NO_BATCH,
                                .companions = p->companions,
                                .block = block};
    if (p->companions) plan->batches[p->batch].companion_chunks++;
    return FST_OK;
}

/* Bytes of the file that come next in the open chunk: segments, or, where one has them all, bytes in one. */
static fst_status add_extent(planner *p, uint64_t offset, uint32_t nbytes, uint64_t segment, uint64_t pitch) {
    fst_plan *plan = p->plan;
    fst_plan_extent *last = p->open->extents ? &plan->extents[plan->extents_count - 1] : NULL;
    if (segment >= nbytes) segment = nbytes, pitch = 0;
    if (last && last->pitch == 0 && pitch == 0 && last->offset + last->nbytes == offset) {
        last->segment = last->nbytes += nbytes;
        return FST_OK;
    }
    if (last && pitch && last->pitch == pitch && last->segment == segment &&
        last->offset + last->nbytes / segment * pitch == offset) {
        last->nbytes += nbytes;
        return FST_OK;
    }
    if (!room(&plan->extents, plan->extents_count, &p->extents_room, sizeof *plan->extents))
        return no_memory(p->error);
    plan->extents[plan->extents_count++] =
        (fst_plan_extent){offset, pitch, (uint32_t)segment, p->open->nbytes, nbytes};
    p->open->extents++;
    p->open->gathered = p->open->extents > 1 || pitch;
    return FST_OK;
}

/* A piece that begins with byte `at` of what is read of its tensor. */
static fst_status add_piece(planner *p, fst_run_kind kind, const fst_plan_piece *piece, uint64_t at) {
    fst_plan *plan = p->plan;
    const fst_plan_tensor *tensor = &plan->tensors[piece->tensor];
    const fst_cut *cut = cut_of(p, tensor);
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
    /* A piece is whole segments, or in one. */
    int whole = cut && at % cut->segment == 0;
    fst_status status = add_extent(p, file_place(p, tensor, at), piece->nbytes,
                                   whole ? cut->segment : piece->nbytes, cut ? cut->pitch : 0);
    if (status) return status;
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
    fst_plan_extent *last = &p->plan->extents[p->plan->extents_count - 1];
    if (run->kind == FST_RUN_CONVERT) run->nbytes += nbytes;
    last->segment = last->nbytes += nbytes;
    p->open->nbytes += nbytes;
    p->plan->bytes_read += nbytes;
}

/* ---- Stripes that are parked ---------------------------------------------------------------------- */

static uint64_t stripe_bytes(const fst_plan_tensor *tensor) {
    return aligned(fst_dtype_bytes(tensor->parked, tensor->stripe_rows * tensor->cols));
}

/* The size of windows: of the largest stripe, or larger, so that some chunks are under way at a time. */
static void size_windows(planner *p) {
    uint64_t wanted = p->options->window_bytes ? p->options->window_bytes : 4 * p->options->chunk_bytes;
    uint64_t largest = 0, all = 0;
    for (size_t i = 0; p->plan->counters_count && i < p->plan->stored_count; i++) {
        const fst_plan_tensor *tensor = &p->plan->tensors[i];
        if (!tensor->parked) continue;
        uint64_t size = stripe_bytes(tensor);
        if (size > largest) largest = size;
        all += aligned(fst_dtype_bytes(tensor->parked, tensor->nbytes)) + size;
    }
    if (wanted > all) wanted = all;
    p->window_bytes = wanted > largest ? wanted : largest;
}

/* The stripe that row `first_row` of a matrix begins, in the last window or a new one. */
static fst_status add_stripe(planner *p, uint32_t tensor, uint32_t matrix, uint64_t first_row) {
    fst_plan *plan = p->plan;
    const fst_plan_tensor *t = &plan->tensors[tensor];
    uint64_t size = stripe_bytes(t), left = t->rows - first_row;
    if (!room(&plan->stripes, plan->stripes_count, &p->stripes_room, sizeof *plan->stripes) ||
        !room(&plan->windows, plan->windows_count, &p->windows_room, sizeof *plan->windows))
        return no_memory(p->error);
    if (plan->windows_count == 0 || p->window_used + size > p->window_bytes) {
        plan->windows[plan->windows_count++] = 0;
        p->window_used = 0;
    }
    uint32_t window = (uint32_t)(plan->windows_count - 1);
    plan->stripes[plan->stripes_count++] =
        (fst_plan_stripe){.tensor = tensor,
                          .matrix = matrix,
                          .first_row = first_row,
                          .rows = left < t->stripe_rows ? left : t->stripe_rows,
                          .offset = window % 2 * p->window_bytes + p->window_used,
                          .window = window,
                          .first_chunk = (uint32_t)plan->chunks_count};
    plan->windows[window]++;
    p->window_used += size;
    plan->parked_bytes = window ? 2 * p->window_bytes : p->window_used;
    return FST_OK;
}

/* Whether the open chunk may bring some of the last stripe: what waits for a window must not hold up that very one. */
static int reaches_stripe(const planner *p) {
    const fst_plan_stripe *stripes = p->plan->stripes;
    return p->open->stripes == 0 ||
           stripes[p->plan->stripes_count - 1].window <= stripes[p->open->first_stripe].window + 1;
}

/* Where the last stripe begins in all of its tensor, in bytes. */
static uint64_t stripe_start(const planner *p, unsigned bits) {
    const fst_plan_stripe *stripe = &p->plan->stripes[p->plan->stripes_count - 1];
    const fst_plan_tensor *tensor = &p->plan->tensors[stripe->tensor];
    return (stripe->matrix * tensor->rows + stripe->first_row) * tensor->cols * bits / 8;
}

/* The open chunk has a piece of the last stripe. */
static void note_stripe(planner *p) {
    uint32_t last = (uint32_t)(p->plan->stripes_count - 1);
    fst_plan_stripe *stripe = &p->plan->stripes[last];
    uint32_t chunk = (uint32_t)(p->plan->chunks_count - 1);
    if (p->open->stripes == 0) p->open->first_stripe = last;
    p->open->stripes = last - p->open->first_stripe + 1;
    if (stripe->chunks == 0) stripe->first_chunk = chunk;
    stripe->chunks = chunk - stripe->first_chunk + 1;
}

/* Where the file goes on behind what is in the open chunk. */
static uint64_t end_of_open(const planner *p) {
    const fst_plan_extent *last = &p->plan->extents[p->plan->extents_count - 1];
    return last->pitch ? last->offset + (last->nbytes / last->segment - 1) * last->pitch + last->segment
                       : last->offset + last->nbytes;
}

/* True when `left` bytes of a tensor, from `offset` of its file on, may go into the open chunk: they follow what is in it, with
 * a small gap perhaps, which is read (*gap) or left out, and their block is the chunk's. So no chunk needs memory that only
 * comes once an earlier one is done with. */
static int continues(const planner *p, const fst_plan_tensor *tensor, uint64_t offset, uint64_t left,
                     uint64_t *gap) {
    const fst_plan_chunk *open = p->open;
    *gap = 0;
    if (!open || open->file != tensor->file || offset < end_of_open(p)) return 0;
    uint64_t between = offset - end_of_open(p), small = p->options->chunk_bytes / SMALL_SHARE;
    int segments = cut_of(p, tensor) && cut_of(p, tensor)->segment < cut_of(p, tensor)->nbytes;
    int gathers =
        p->gathers || p->companions; /* the latter lie beside their weights: each would take a slot */
    if (gathers && (between || segments || open->gathered)) {
        /* Many small parts; large ones are better alone, since only what is not gathered is read past the cache. */
        if (left > small && open->nbytes > small && !(segments && open->gathered)) return 0;
    } else if (between) {
        if (p->plan->batches_count == 0) return 0; /* companions alone are worth it */
        if (between > MOST_GAP || open->nbytes + between >= p->options->chunk_bytes) return 0;
        *gap = between;
    }
    if (tensor->parked && !reaches_stripe(p)) return 0;
    if (p->options->span_bytes && offset - open->offset >= p->options->span_bytes) return 0;
    uint32_t block = block_of(p, tensor);
    return block == FST_NO_BLOCK || open->block == FST_NO_BLOCK || block == open->block;
}

/* How much of `left` bytes goes into the open chunk, behind a gap: all, or what a cut allows, or nothing. */
static uint64_t fitting(const planner *p, uint64_t gap, uint64_t left, uint64_t cut) {
    uint64_t space = p->options->chunk_bytes - p->open->nbytes - gap;
    if (p->open_jobs >= p->options->chunk_bytes / JOBS_SHARE / sizeof(fst_batch_job)) return 0;
    return left <= space ? left : space / cut * cut;
}

/* As many whole segments as do not reach too far in the file, of `take` bytes, up to a place where they may be cut. 0: none;
 * of a chunk of its own it is `step` at least. */
static uint64_t within_span(const planner *p, const fst_plan_tensor *tensor, uint64_t offset, uint64_t take,
                            uint64_t step) {
    const fst_cut *cut = cut_of(p, tensor);
    uint64_t span = p->options->span_bytes, before = offset - p->open->offset;
    if (!span || !cut || cut->segment >= take) return take;
    if (before + cut->segment > span) return 0;
    uint64_t segments = (span - before - cut->segment) / cut->pitch + 1;
    if (segments >= take / cut->segment) return take;
    uint64_t most = segments * cut->segment / step * step;
    return most || before ? most : step < take ? step : take;
}

/* Makes the open chunk one that takes bytes of the tensor from byte `at` of what is read of it on, and says how many of
 * `left`. */
static fst_status make_space(planner *p, const fst_plan_tensor *tensor, uint64_t at, uint64_t left,
                             uint64_t cut, uint64_t *take) {
    uint64_t gap = 0, offset = file_place(p, tensor, at);
    *take = 0;
    if (continues(p, tensor, offset, left, &gap))
        *take = within_span(p, tensor, offset, fitting(p, gap, left, cut), cut);
    if (*take) {
        if (p->open->block == FST_NO_BLOCK) p->open->block = block_of(p, tensor);
        if (gap) add_gap(p, (uint32_t)gap);
        return FST_OK;
    }
    close_chunk(p);
    fst_status status = open_chunk(p, tensor->file, offset, block_of(p, tensor));
    if (!status) *take = within_span(p, tensor, offset, fitting(p, 0, left, cut), cut);
    return status;
}

/* The chunk needs the companions of the batch. */
static void need_batch(planner *p) {
    if (p->open->batch != FST_NO_BATCH) return;
    p->open->batch = p->batch;
    p->plan->batches[p->batch].weight_chunks++;
}

/* Rows that are under one scale. */
static uint64_t scaled_rows(const fst_plan_tensor *tensor) {
    uint64_t rows = tensor->scale == FST_QUANTIZE_ROW     ? 1
                    : tensor->scale == FST_QUANTIZE_BLOCK ? FST_QUANTIZE_TILE
                                                          : tensor->rows;
    return rows < tensor->rows ? rows : tensor->rows;
}

/* ---- Packed integers -------------------------------------------------------------------------------- */

/* What the codes of a packed weight are counted in, in bytes. */
static uint64_t unit_of(const fst_quantized *w) { return w->format == FST_FORMAT_INT4_ROWS ? 1 : 4; }

/* Bytes from one place where the codes of a packed weight may be cut to the next: where codes lie in two words, what has
 * them whole. Transposed ones are better cut between the tiles that kernels take, if a chunk has several. */
static fst_status refuse_slots(planner *p, const fst_plan_tensor *tensor, uint64_t least) {
    fst_where where = place_of(p, tensor);
    return fst_fail(
        p->error, FST_E_UNSUPPORTED, 0, &where,
        "tensor \"%s\": codes of %u bits lie in two words; that needs slot_bytes of at least %llu",
        name_of(p, tensor), tensor->weight->bits, (unsigned long long)least);
}

/* Whether codes lie in two words. */
static int straddles(const fst_quantized *w) {
    return fst_scheme_is_packed(w) && w->format != FST_FORMAT_INT4_ROWS && 32 % w->bits &&
           !(w->flags & FST_Q_PADDED);
}

static fst_status packed_cut(planner *p, const fst_plan_tensor *tensor, const fst_entry *entry,
                             uint64_t *cut) {
    const fst_quantized *w = tensor->weight;
    int column = w->format == FST_FORMAT_GPTQ;
    int transposed = column || w->format == FST_FORMAT_AWQ || w->format == FST_FORMAT_INT4_QUARK;
    uint64_t step = entry->shape[entry->ndim - 1] * unit_of(w); /* a row of words */
    *cut = 512;
    if (straddles(w)) {
        *cut = column ? step * w->bits : step;
        return *cut <= p->options->chunk_bytes ? FST_OK : refuse_slots(p, tensor, *cut);
    }
    for (uint64_t tile = column ? 16 : 128; transposed && tile; tile /= 2)
        if (step && step <= p->options->chunk_bytes / 8 / tile) {
            *cut = step * tile;
            break;
        }
    return FST_OK;
}

/* ---- Pieces ------------------------------------------------------------------------------------------ */

/* The open chunk is one that brings the tensor. */
static void note_chunk(planner *p, fst_plan_tensor *tensor) {
    uint32_t chunk = (uint32_t)(p->plan->chunks_count - 1);
    if (tensor->pieces++ == 0) tensor->first_chunk = chunk;
    tensor->chunks = chunk - tensor->first_chunk + 1;
}

/* What kernels count in all of the matrix: pieces are rows of what is read, or parts of one. */
static fst_status add_boxed(planner *p, uint32_t index) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    const fst_cut *cut = cut_of(p, tensor);
    const unsigned bits = tensor->weight ? tensor->weight->bits : fst_dtype_bits(cut->local.dtype);
    const uint64_t total = cut->nbytes, matrix = total / cut->matrices;
    const uint64_t rows = cut->row_bytes * cut->row_step;
    const int in_rows = rows > p->options->chunk_bytes; /* rows are cut */
    const uint64_t step = in_rows ? (uint64_t)CUT_ELEMENTS / 8 * bits : rows;
    if (in_rows && tensor->weight && straddles(tensor->weight)) return refuse_slots(p, tensor, rows);
    for (uint64_t done = 0, take; done < total; done += take) {
        uint64_t in_matrix = done % matrix, left = matrix - in_matrix;
        fst_status status = FST_OK;
        if (in_rows) left = cut->row_bytes - in_matrix % cut->row_bytes;
        if (tensor->parked && in_matrix == 0) /* a matrix is one stripe */
            status = add_stripe(p, index, (uint32_t)(done / matrix), 0);
        if (!status) status = make_space(p, tensor, done, left, step, &take);
        if (status) return status;
        note_chunk(p, tensor);
        fst_plan_piece piece = {.tensor = index,
                                .chunk_offset = p->open->nbytes,
                                .nbytes = (uint32_t)take,
                                .first = in_matrix,
                                .matrix = (uint32_t)(done / matrix),
                                .stripe = FST_NO_STRIPE};
        if (tensor->parked) {
            piece.stripe = (uint32_t)(p->plan->stripes_count - 1);
            note_stripe(p);
        }
        status = add_piece(p, FST_RUN_CONVERT, &piece, done);
        if (status) return status;
        if (tensor->weight) need_batch(p);
    }
    return FST_OK;
}

/* How what is read of a tensor may be cut into pieces: bytes of one matrix, or of what comes as one; of a stripe; and
 * from one place where it may be cut to the next. */
typedef struct cutting {
    uint64_t total, matrix, stripe, step;
    int shaped, packed;
} cutting;

static fst_status find_cutting(planner *p, const fst_plan_tensor *tensor, unsigned bits, cutting *c) {
    const fst_entry *entry = entry_of(p, tensor);
    const fst_cut *cut = cut_of(p, tensor);
    const fst_quantized *weight = tensor->weight;
    uint64_t stack = cut ? cut->matrices : weight ? weight->stack : 1;
    *c = (cutting){.total = cut ? cut->nbytes : entry->end - entry->begin,
                   .step = (uint64_t)CUT_ELEMENTS * bits / 8,
                   .shaped = cut && cut->shaped,
                   .packed = weight && fst_scheme_is_packed(weight)};
    c->matrix = c->total;
    if (c->packed && stack) {
        fst_status status = packed_cut(p, tensor, entry, &c->step);
        if (status) return status;
        c->matrix = c->total / stack; /* rows may end in words that are not full */
    } else if (weight) {              /* bitsandbytes' may be odd */
        c->matrix = ((cut ? cut->rows * cut->cols : weight->rows * weight->cols) * bits + 7) / 8;
    }
    if (tensor->conversion == FST_CONVERT_QUANTIZE && !weight)
        c->matrix = tensor->rows * tensor->cols * bits / 8;
    if (c->shaped && c->total) c->matrix = c->total / cut->matrices;
    int in_stripes = tensor->parked && tensor->stripe_rows < tensor->rows;
    c->stripe = in_stripes ? tensor->stripe_rows * tensor->cols * bits / 8 : c->matrix;
    if (tensor->conversion == FST_CONVERT_QUANTIZE && !tensor->parked)
        c->step = scaled_rows(tensor) * tensor->cols * bits / 8;
    return FST_OK;
}

/* Bytes from `done` on that a piece may have, and where they may be cut. */
static uint64_t bytes_left(const planner *p, const fst_plan_tensor *tensor, const cutting *c, uint64_t done,
                           uint64_t *step) {
    const fst_cut *cut = cut_of(p, tensor);
    uint64_t in_matrix = remainder_of(done, c->matrix), left = c->stripe - remainder_of(in_matrix, c->stripe);
    if (left > c->matrix - in_matrix) left = c->matrix - in_matrix; /* the last stripe of a matrix */
    *step = c->step;
    if (!cut || tensor->weight || cut->segment >= cut->nbytes) return left;
    /* Whole segments, or a part of one. */
    uint64_t rest = cut->segment - done % cut->segment;
    if (cut->segment <= p->options->chunk_bytes) *step = cut->segment;
    else if (left > rest) left = rest;
    return left;
}

/* Where the codes of a piece begin in their matrix, for kernels that know what comes before. */
static uint64_t first_of_weight(const fst_plan_tensor *tensor, const fst_cut *cut, const cutting *c,
                                uint64_t in_matrix) {
    const fst_quantized *w = tensor->weight;
    uint64_t before = cut ? cut->row : 0; /* rows */
    if (!c->packed) return in_matrix * 8 / w->bits + before * w->cols;
    return in_matrix / unit_of(w) + (cut ? before * (c->matrix / cut->rows) / unit_of(w) : 0);
}

/* Places of packed integers are counted in words; the kernel finds those in the result. */
static void place_weight(const fst_plan_tensor *tensor, const fst_cut *cut, const cutting *c,
                         uint64_t in_matrix, unsigned result_bits, fst_plan_piece *piece) {
    const fst_quantized *w = tensor->weight;
    uint64_t count = cut ? cut->rows * cut->cols : w->rows * w->cols; /* of one matrix */
    piece->first = first_of_weight(tensor, cut, c, in_matrix);
    if (c->packed) {
        piece->dst_offset = piece->matrix * count * result_bits / 8;
        piece->count = piece->nbytes / unit_of(w);
    } else if (piece->count > count - in_matrix * 8 / w->bits) {
        piece->count = count - in_matrix * 8 / w->bits;
    }
}

static fst_status add_tensor(planner *p, uint32_t index) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    const fst_entry *entry = entry_of(p, tensor);
    const fst_cut *cut = cut_of(p, tensor);
    const fst_quantized *weight = tensor->weight;
    int quantized = tensor->conversion == FST_CONVERT_QUANTIZE;
    fst_dtype dtype = tensor->parked ? tensor->parked : tensor->dtype; /* that pieces become */
    unsigned bits = weight ? weight->bits : fst_dtype_bits(entry->dtype);
    unsigned result_bits = fst_dtype_bits(dtype);
    cutting c;
    if (cut && cut->boxed) return cut->nbytes ? add_boxed(p, index) : FST_OK;
    fst_status status = find_cutting(p, tensor, bits, &c);
    int matrices = weight || quantized || c.shaped;
    for (uint64_t done = 0, take, step; done < c.total && !status; done += take) {
        uint64_t in_matrix = remainder_of(done, c.matrix), left = bytes_left(p, tensor, &c, done, &step);
        if (tensor->parked && in_matrix % c.stripe == 0)
            status = add_stripe(p, index, (uint32_t)(done / c.matrix), in_matrix * 8 / bits / tensor->cols);
        if (!status) status = make_space(p, tensor, done, left, step, &take);
        if (status) break;
        note_chunk(p, tensor);
        uint64_t before = count_of(done, bits); /* elements; done is a multiple of cut, or of a matrix */
        fst_plan_piece piece = {
            .tensor = index,
            .chunk_offset = p->open->nbytes,
            .nbytes = (uint32_t)take,
            .dst_offset = c.shaped ? 0 : before * result_bits / 8,
            .count = count_of(take, bits),
            .first = matrices ? count_of(in_matrix, bits) : 0,
            .matrix = matrices ? (uint32_t)(done / c.matrix) : 0,
            .stripe = FST_NO_STRIPE,
        };
        if (weight) place_weight(tensor, cut, &c, in_matrix, result_bits, &piece);
        if (tensor->parked) {
            piece.stripe = (uint32_t)(p->plan->stripes_count - 1);
            piece.dst_offset -= stripe_start(p, result_bits);
            note_stripe(p);
        }
        int kept = !weight && !c.shaped && dtype == entry->dtype;
        fst_run_kind kind = kept && take >= p->options->place_bytes ? FST_RUN_PLACE : FST_RUN_CONVERT;
        status = add_piece(p, kind, &piece, done);
        if (status) break;
        if (kind == FST_RUN_CONVERT && !fst_plan_is_alone(p->plan, tensor)) p->open_jobs++;
        if (weight) need_batch(p);
    }
    return status;
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
    const fst_cut *cut = cut_of(p, tensor);
    uint64_t count = cut ? cut->matrices * cut->rows * cut->cols : elements(entry);
    if (tensor->weight) {
        const fst_quantized *w = tensor->weight;
        fst_where where = {p->paths[tensor->file], (int)tensor->file,
                           (int64_t)(p->headers[tensor->file].data_start + entry->begin)};
        if (tensor->conversion != FST_CONVERT_QUANTIZE && cast != FST_F32 && cast != FST_F16 &&
            cast != FST_BF16)
            return fst_fail(p->error, FST_E_UNSUPPORTED, 0, &where,
                            "tensor \"%s\" (%s) is not dequantized to %s: F32, F16 and BF16 there are",
                            entry->name, fst_format_name(w->format), fst_dtype_name(cast));
        tensor->dtype = cast;
        if (!cut) count = w->stack * w->rows * w->cols;
    } else if (tensor->conversion == FST_CONVERT_QUANTIZE || tensor->conversion == FST_CONVERT_FNUZ) {
        tensor->dtype = cast;
    } else {
        fst_dtype dtype;
        fst_status status = choose_dtype(p, entry, tensor->file, cast, &dtype);
        if (status) return status;
        tensor->dtype = dtype;
    }
    if (count > UINT64_MAX / 64) return no_memory(p->error);
    tensor->nbytes = fst_dtype_bytes(tensor->dtype, count);
    return FST_OK;
}

/* ---- Computed scales, and FNUZ ---------------------------------------------------------------------- */

static int role_of(const planner *p, size_t index) {
    return p->options->scheme ? p->options->scheme->roles[index] : FST_ROLE_PLAIN;
}

/* OCP codes whose bits may be kept: the type that they are then. */
static fst_dtype fnuz_of(fst_dtype dtype) {
    return dtype == FST_F8_E4M3 ? FST_F8_E4M3FNUZ : dtype == FST_F8_E5M2 ? FST_F8_E5M2FNUZ : FST_NATIVE;
}

/* A quantized weight: what is so already is kept, OCP codes become FNUZ with their bits, the rest is dequantized. */
static fst_status choose_of_codes(planner *p, size_t index, const fst_entry *entry, fst_dtype *cast,
                                  fst_scale scale) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    const fst_quantized *w = &p->options->scheme->weights[p->options->scheme->owner[index]];
    int same_scales = scale == FST_QUANTIZE_NONE || scale == fst_quantize_kind_of(w);
    if (*cast == fnuz_of(entry->dtype) && w->bits == 8 && same_scales) {
        fst_where where = {p->paths[tensor->file], (int)tensor->file,
                           (int64_t)(p->headers[tensor->file].data_start + entry->begin)};
        if (w->flags & FST_Q_DIVIDE)
            return fst_fail(p->error, FST_E_UNSUPPORTED, 0, &where,
                            "tensor \"%s\" is divided by its scales: it is not made %s", entry->name,
                            fst_dtype_name(*cast));
        tensor->conversion = FST_CONVERT_FNUZ;
    } else if (scale && *cast == entry->dtype && same_scales) {
        *cast = FST_NATIVE;
    } else if (scale) {
        tensor->conversion = FST_CONVERT_QUANTIZE;
        if (w->stack * w->rows * w->cols == 0) { /* nothing has no scales */
            tensor->conversion = FST_CONVERT_CAST;
            *cast = FST_NATIVE;
        }
    }
    return FST_OK;
}

/* What kind of conversion a tensor gets, and whether it stays as stored after all (*cast). */
static fst_status choose_conversion(planner *p, size_t index, const fst_entry *entry, fst_dtype *cast,
                                    fst_scale scale) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    uint64_t stack, rows, cols;
    int role = role_of(p, index);
    if (role == FST_ROLE_COMPANION) *cast = FST_NATIVE;
    if (!fst_quantize_has(*cast)) scale = FST_QUANTIZE_NONE;
    if (role == FST_ROLE_CODES && *cast != FST_NATIVE) return choose_of_codes(p, index, entry, cast, scale);
    if (!scale || role != FST_ROLE_PLAIN || !fst_dtype_is_castable(entry->dtype) || entry->dtype == *cast)
        return FST_OK;
    if (fst_quantize_shape(entry, &stack, &rows, &cols) && fst_dtype_bits(entry->dtype) >= 8) {
        tensor->conversion = FST_CONVERT_QUANTIZE;
        return FST_OK;
    }
    fst_where where = {p->paths[tensor->file], (int)tensor->file,
                       (int64_t)(p->headers[tensor->file].data_start + entry->begin)};
    if (fst_dtype_bits(entry->dtype) > 8 && entry->ndim != 2 && entry->ndim != 3)
        return fst_fail(
            p->error, FST_E_ARG, 0, &where,
            "tensor \"%s\" has %u dimensions: scales are computed for matrices and stacks of them",
            entry->name, entry->ndim);
    *cast = FST_NATIVE; /* no elements, or none of a weight's types */
    return FST_OK;
}

/* Whether rows of codes are rows of the weight, in their order. */
static int is_row_by_row(const fst_quantized *w) {
    switch (w->format) {
    case FST_FORMAT_FP8_TENSOR:
    case FST_FORMAT_FP8_ROW:
    case FST_FORMAT_FP8_GROUP:
    case FST_FORMAT_FP8_BLOCK:
    case FST_FORMAT_MXFP8:
    case FST_FORMAT_MXFP4:
    case FST_FORMAT_NVFP4:
    case FST_FORMAT_INT8: return 1;
    default: return 0;
    }
}

/* Whether what is quantized must be parked first, and how. Dequantized weights become F32: no rounding but those of the
 * formula and of the codes. */
static fst_status set_quantized(planner *p, fst_plan_tensor *tensor, const fst_entry *entry,
                                fst_scale scale) {
    const fst_quantized *w = tensor->weight;
    uint64_t stack;
    if (tensor->conversion == FST_CONVERT_QUANTIZE && tensor->nbytes == 0)
        tensor->conversion = FST_CONVERT_CAST; /* an empty part: nothing has no scales */
    if (tensor->conversion == FST_CONVERT_FNUZ) tensor->counter = p->plan->counters_count++;
    if (tensor->conversion != FST_CONVERT_QUANTIZE) return FST_OK;
    tensor->counter = p->plan->counters_count++;
    tensor->scale = scale;
    const fst_cut *cut = cut_of(p, tensor);
    if (w) tensor->rows = cut ? cut->rows : w->rows, tensor->cols = w->cols;
    else fst_quantize_shape(entry, &stack, &tensor->rows, &tensor->cols);
    uint64_t unit = scaled_rows(tensor);
    int direct = !w && (entry->dtype == FST_F32 || entry->dtype == FST_F16 || entry->dtype == FST_BF16);
    if (direct && fst_dtype_bytes(entry->dtype, unit * tensor->cols) <= p->options->chunk_bytes)
        return FST_OK;
    tensor->parked = direct ? entry->dtype : FST_F32;
    uint64_t units = p->options->chunk_bytes / fst_dtype_bytes(tensor->parked, unit * tensor->cols) + 1;
    tensor->stripe_rows = tensor->rows;
    if ((!w || (is_row_by_row(w) && !(cut && cut->boxed))) && units < tensor->rows / unit)
        tensor->stripe_rows = units * unit;
    return FST_OK;
}

/* The tensors of computed scales, behind all others. */
static fst_status add_scales(planner *p) {
    fst_plan *plan = p->plan;
    size_t count = plan->stored_count;
    if (plan->counters_count == 0) return FST_OK; /* each of those below has one */
    for (size_t i = 0; i < plan->stored_count; i++)
        count += plan->tensors[i].conversion == FST_CONVERT_QUANTIZE;
    if (count == plan->stored_count) return FST_OK;
    fst_plan_tensor *more = count < FST_NO_TENSOR ? realloc(plan->tensors, count * sizeof *more) : NULL;
    if (!more) return no_memory(p->error);
    plan->tensors = more;
    for (size_t i = 0; i < plan->stored_count; i++) {
        fst_plan_tensor *tensor = &more[i];
        if (tensor->conversion != FST_CONVERT_QUANTIZE) continue;
        uint64_t stack = tensor->nbytes / (tensor->rows * tensor->cols);
        uint64_t each = fst_quantize_scale_rows(tensor->scale, tensor->rows) *
                        fst_quantize_scale_cols(tensor->scale, tensor->cols);
        tensor->scales = (uint32_t)plan->tensors_count++;
        more[tensor->scales] = (fst_plan_tensor){.file = tensor->file,
                                                 .entry = tensor->entry,
                                                 .dtype = FST_F32,
                                                 .nbytes = 4 * stack * each,
                                                 .block = FST_NO_BLOCK,
                                                 .batch = FST_NO_BATCH,
                                                 .pieces = 1, /* it is complete with its weight */
                                                 .cut = FST_NO_CUT,
                                                 .fused = FST_NO_TENSOR,
                                                 .scales = FST_NO_TENSOR,
                                                 .counter = FST_NO_COUNTER};
    }
    return FST_OK;
}

static int is_float(fst_dtype dtype) {
    return dtype == FST_F64 || dtype == FST_F32 || dtype == FST_F16 || dtype == FST_BF16;
}

/* What scales codes that become FNUZ: the weights' own scales, and those of activations and of the KV cache, which are
 * codes of such a type, too. */
static void choose_doubled(planner *p) {
    const fst_scheme *scheme = p->options->scheme;
    fst_plan *plan = p->plan;
    int to_fnuz = 0;
    for (size_t i = 0; scheme && i < plan->stored_count; i++) {
        const fst_plan_tensor *tensor = &plan->tensors[i];
        const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
        to_fnuz |= scheme->roles[i] == FST_ROLE_CODES && fnuz_of(entry->dtype) == tensor->dtype;
    }
    for (size_t i = 0; to_fnuz && i < plan->stored_count; i++) {
        fst_plan_tensor *tensor = &plan->tensors[i];
        const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
        const fst_quantized *w =
            scheme->roles[i] == FST_ROLE_COMPANION ? &scheme->weights[scheme->owner[i]] : NULL;
        int of_weight = w && w->companions[FST_COMPANION_SCALE] == i &&
                        plan->tensors[w->codes].conversion == FST_CONVERT_FNUZ;
        int of_others =
            scheme->roles[i] == FST_ROLE_KEPT && is_float(entry->dtype) && fst_quantize_scales_codes(entry);
        if (!of_weight && !of_others) continue;
        tensor->conversion = FST_CONVERT_DOUBLE;
        plan->doubles = 1;
    }
}

/* ---- Parts ------------------------------------------------------------------------------------------- */

/* Computed scales of a part are those of the whole where no other rank has what is under them. */
static fst_status check_scaled_part(planner *p, const fst_plan_tensor *tensor, const fst_choice *choice,
                                    uint32_t ndim, int32_t dim, uint64_t begin, uint64_t end,
                                    uint64_t extent) {
    fst_where where = place_of(p, tensor);
    const char *why = NULL;
    int rows = dim >= 0 && (uint32_t)dim + 2 == ndim, cols = dim >= 0 && (uint32_t)dim + 1 == ndim;
    int in_tiles = begin % FST_QUANTIZE_TILE == 0 && (end % FST_QUANTIZE_TILE == 0 || end == extent);
    if (tensor->conversion != FST_CONVERT_QUANTIZE) return FST_OK;
    if (choice->layout || choice->into)
        why = "scales are computed for weights as they are stored, that are no part";
    else if (cols || (rows && choice->scale == FST_QUANTIZE_TENSOR))
        why = "its scales need what other ranks have";
    else if (rows && choice->scale == FST_QUANTIZE_BLOCK && !in_tiles)
        why = "its scales of 128 rows need what other ranks have";
    if (!why) return FST_OK;
    return fst_fail(p->error, FST_E_UNSUPPORTED, 0, &where, "tensor \"%s\": %s", name_of(p, tensor), why);
}

static fst_status refuse_part(planner *p, const fst_plan_tensor *tensor, fst_status status, const char *why) {
    fst_where where = place_of(p, tensor);
    return fst_fail(p->error, status, 0, &where, "tensor \"%s\": %s", name_of(p, tensor), why);
}

static fst_status add_cut(planner *p, fst_cut **out) {
    if (!room(&p->plan->cuts, p->plan->cuts_count, &p->cuts_room, sizeof *p->plan->cuts))
        return no_memory(p->error);
    *out = &p->plan->cuts[p->plan->cuts_count];
    return FST_OK;
}

/* The part of a tensor that belongs to a part of a weight that stays quantized: of its codes (FST_COMPANIONS) or of a
 * companion. */
static fst_status cut_kept_tensor(planner *p, size_t index, const fst_quantized *w, unsigned which,
                                  uint32_t part, int converts) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
    fst_where where = place_of(p, tensor);
    int32_t dim;
    uint64_t begin, end;
    fst_cut *cut = NULL;
    const char *why = fst_cut_kept(w, which, &p->plan->cuts[part], entry, &dim, &begin, &end);
    if (why)
        return fst_fail(p->error, FST_E_UNSUPPORTED, 0, &where,
                        "tensor \"%s\": \"%.200s\" stays quantized, and %s: dequantize it, or cut elsewhere",
                        name_of(p, tensor), w->name, why);
    if (dim < 0) return FST_OK;
    fst_status status = add_cut(p, &cut);
    if (!status) status = fst_cut_plain(entry, dim, begin, end, 0, converts, 0, &where, cut, p->error);
    if (!status) tensor->cut = (uint32_t)p->plan->cuts_count++;
    return status;
}

/* A weight that stays quantized: dimensions are its own, not those of its codes. Its companions are cut likewise, once all
 * are known. */
static fst_status cut_kept(planner *p, size_t index, const fst_entry *entry, const fst_choice *choice,
                           fst_dtype cast) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    const fst_quantized *w = &p->options->scheme->weights[p->options->scheme->owner[index]];
    fst_where where = place_of(p, tensor);
    uint64_t begin = choice->begin, end = choice->end;
    int32_t dim = choice->shard_dim;
    fst_cut *part = NULL;
    if (choice->layout || choice->into)
        return refuse_part(p, tensor, FST_E_UNSUPPORTED,
                           "it is quantized and stays so: its layout is as stored");
    if (dim < 0 || (w->ndim == 0 && begin == 0 && end == 0 && p->options->ranks <= 1)) return FST_OK;
    if (w->ndim == 0)
        return refuse_part(p, tensor, FST_E_UNSUPPORTED,
                           "it is quantized and stays so, with its shape in another tensor: it is not cut");
    if ((uint32_t)dim < w->ndim) {
        if (begin == 0 && end == 0)
            fst_shard_range(w->shape[dim], choice->unit, p->options->rank, p->options->ranks, &begin, &end);
        if (begin == 0 && end == w->shape[dim]) return FST_OK;
    }
    fst_status status = add_cut(p, &part);
    if (!status) status = fst_cut_weight(w, entry, dim, begin, end, 0, &where, part, p->error);
    if (status) return status;
    uint32_t which = (uint32_t)p->plan->cuts_count++;
    p->kept[index] = which;
    p->gathers = 1;
    return cut_kept_tensor(p, index, w, FST_COMPANIONS, which, cast != FST_NATIVE);
}

/* What of a tensor is wanted, if that is not all of it as it is. Of companions their weights decide. */
static fst_status cut_tensor(planner *p, size_t index, const fst_entry *entry, const fst_choice *choice,
                             fst_dtype cast) {
    fst_plan *plan = p->plan;
    fst_plan_tensor *tensor = &plan->tensors[index];
    const fst_quantized *w = tensor->weight;
    const uint64_t *shape = w ? w->shape : entry->shape;
    const uint32_t ndim = w ? w->ndim : entry->ndim;
    int32_t dim = choice->shard_dim;
    uint64_t begin = choice->begin, end = choice->end, extent = 0;
    fst_where where = place_of(p, tensor);
    if (role_of(p, index) == FST_ROLE_COMPANION) return FST_OK;
    if (!w && role_of(p, index) == FST_ROLE_CODES) return cut_kept(p, index, entry, choice, cast);
    if (dim >= 0 && (uint32_t)dim < ndim) {
        extent = shape[dim];
        if (begin == 0 && end == 0)
            fst_shard_range(extent, choice->unit, p->options->rank, p->options->ranks, &begin, &end);
        if (begin == 0 && end == extent) dim = FST_REPLICATE;
    }
    if (dim < 0 && !choice->layout && !choice->into) return FST_OK;
    fst_status status = check_scaled_part(p, tensor, choice, ndim, dim, begin, end, extent);
    if (status) return status;
    fst_cut *cut = NULL;
    status = add_cut(p, &cut);
    if (status) return status;
    int converts = cast != FST_NATIVE && cast != entry->dtype && fst_dtype_is_castable(entry->dtype);
    uint64_t least = choice->into || tensor->conversion ? 0 : p->options->segment_bytes;
    if (w) status = fst_cut_weight(w, entry, dim, begin, end, choice->layout, &where, cut, p->error);
    else
        status =
            fst_cut_plain(entry, dim, begin, end, choice->layout, converts, least, &where, cut, p->error);
    if (status) return status;
    tensor->cut = (uint32_t)plan->cuts_count++;
    p->gathers |= dim >= 0;
    return FST_OK;
}

static fst_status choose_results(planner *p, uint32_t file, const fst_choice *choices) {
    const fst_header *header = &p->headers[file];
    const fst_plan_tensor none = {.file = file,
                                  .block = FST_NO_BLOCK,
                                  .batch = FST_NO_BATCH,
                                  .scales = FST_NO_TENSOR,
                                  .counter = FST_NO_COUNTER,
                                  .cut = FST_NO_CUT,
                                  .fused = FST_NO_TENSOR};
    for (size_t i = 0; i < header->count; i++) {
        const fst_entry *entry = &header->tensors[i];
        if (choices && choices[i].skip) {
            p->plan->ignored++;
            continue;
        }
        size_t index = p->plan->tensors_count++;
        fst_plan_tensor *tensor = &p->plan->tensors[index];
        fst_dtype cast = choices ? choices[i].cast : p->options->cast;
        fst_scale scale = choices ? choices[i].scale : p->options->scale;
        *tensor = none;
        tensor->entry = (uint32_t)i;
        tensor->result = (uint32_t)index; /* as long as all become one */
        tensor->memory = choices ? choices[i].memory : NULL;
        p->plan->bytes_needed += entry->end - entry->begin;
        if (choices) p->chosen[index] = &choices[i], p->kept[index] = FST_NO_CUT;
        fst_status status = choose_conversion(p, index, entry, &cast, scale);
        if (!status && tensor->conversion != FST_CONVERT_FNUZ) tensor->weight = weight_of(p, index, cast);
        if (!status && choices) status = cut_tensor(p, index, entry, &choices[i], cast);
        if (!status) status = set_result(p, tensor, entry_of(p, tensor), cast);
        if (!status) status = set_quantized(p, tensor, entry_of(p, tensor), scale);
        if (!status && tensor->memory &&
            role_of(p, index) != FST_ROLE_COMPANION) /* they: once they are cut */
            status = check_memory(p, tensor, entry, &choices[i]);
        if (status) return status;
    }
    return FST_OK;
}

/* ---- Results that are fused ----------------------------------------------------------------------------- */

typedef struct part {
    const char *into;
    uint64_t place;
    uint32_t index;
} part;

static int compare_parts(const void *a, const void *b) {
    const part *x = a, *y = b;
    int order = strcmp(x->into, y->into);
    if (order) return order;
    if (x->place != y->place) return x->place < y->place ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

/* Whether a part is like the first but along the dimension that they follow one another in. */
static fst_status check_part(planner *p, const part *first, const part *other, int32_t dim) {
    const fst_plan_tensor *a = &p->plan->tensors[first->index], *b = &p->plan->tensors[other->index];
    const fst_cut *x = cut_of(p, a), *y = cut_of(p, b);
    fst_where where = place_of(p, b);
    int fits = x->ndim == y->ndim && p->chosen[other->index]->into_dim == dim;
    for (uint32_t i = 0; fits && i < x->ndim; i++)
        fits = (dim >= 0 && i == (uint32_t)dim) || fst_cut_extent(x, i) == fst_cut_extent(y, i);
    if (a->dtype != b->dtype)
        return fst_fail(p->error, FST_E_ARG, 0, &where,
                        "tensor \"%s\" becomes %s, \"%.120s\" %s: they cannot both be parts of \"%.120s\"",
                        name_of(p, b), fst_dtype_name(b->dtype), name_of(p, a), fst_dtype_name(a->dtype),
                        first->into);
    if (!fits)
        return fst_fail(
            p->error, FST_E_ARG, 0, &where,
            "tensor \"%s\" and \"%.120s\" differ in more than what they follow one another in, in "
            "\"%.120s\"",
            name_of(p, b), name_of(p, a), first->into);
    if (a->memory || b->memory)
        return refuse_part(p, a->memory ? a : b, FST_E_ARG,
                           "a part of another result has no memory of its own");
    return FST_OK;
}

/* Where the parts of a result lie in it: one behind the other, or with steps between their rows. */
static fst_status place_parts(planner *p, const part *parts, size_t count, int32_t dim,
                              fst_plan_tensor *whole, fst_cut *shape) {
    const unsigned bits = fst_dtype_bits(whole->dtype);
    const fst_cut *first = cut_of(p, &p->plan->tensors[parts[0].index]);
    uint64_t before = 1, inner = 1, done = 0, total = 0;
    for (uint32_t i = 0; dim > 0 && i < (uint32_t)dim; i++) before *= fst_cut_extent(first, i);
    for (uint32_t i = dim < 0 ? 0 : (uint32_t)dim + 1; i < first->ndim; i++)
        inner *= fst_cut_extent(first, i);
    for (size_t i = 0; i < count; i++) {
        const fst_plan_tensor *tensor = &p->plan->tensors[parts[i].index];
        if (__builtin_add_overflow(total, dim < 0 ? 1 : fst_cut_extent(cut_of(p, tensor), (uint32_t)dim),
                                   &total))
            return refuse_part(p, tensor, FST_E_ARG, "the result's extent would be more than 2^64 - 1");
    }
    for (size_t i = 0; i < count; i++) {
        fst_plan_tensor *tensor = &p->plan->tensors[parts[i].index];
        fst_cut *cut = &p->plan->cuts[tensor->cut];
        uint64_t extent = dim < 0 ? 1 : fst_cut_extent(cut, (uint32_t)dim);
        /* Boxed ones count as one matrix, whatever dimensions there are: its rows are theirs where the last one is cut. */
        int in_rows = cut->ndim == 2 || (cut->dim + 1 == (int32_t)cut->ndim && dim == cut->dim);
        int narrow = !tensor->weight && fst_dtype_bits(cut->local.dtype) < 8 && !(cut->boxed && in_rows);
        if (before > 1 && (narrow || bits < 8 || !fst_cut_widen(cut, (uint32_t)dim, total)))
            return refuse_part(p, tensor, FST_E_UNSUPPORTED,
                               "parts follow one another in one of the last two dimensions, in whole bytes");
        if (before > 1 && tensor->weight) fst_cut_box(tensor->weight, cut);
        if (done * inner * bits % 8)
            return refuse_part(p, tensor, FST_E_UNSUPPORTED,
                               "it would not begin at a whole byte of the result");
        tensor->block_offset = done * inner * bits / 8;
        done += extent;
    }
    uint32_t n = 0;
    shape->ndim = first->ndim + (dim < 0);
    shape->dim = FST_REPLICATE;
    if (!(shape->shape = malloc((shape->ndim + 1) * sizeof *shape->shape))) return no_memory(p->error);
    if (dim < 0) shape->shape[n++] = total;
    for (uint32_t i = 0; i < first->ndim; i++)
        shape->shape[n++] = dim >= 0 && i == (uint32_t)dim ? total : fst_cut_extent(first, i);
    whole->nbytes = fst_dtype_bytes(whole->dtype, before * total * inner);
    return FST_OK;
}

/* One result of parts. */
static fst_status fuse(planner *p, const part *parts, size_t count) {
    fst_plan *plan = p->plan;
    const fst_plan_tensor *first = &plan->tensors[parts[0].index];
    const int32_t dim = p->chosen[parts[0].index]->into_dim;
    const uint32_t index = (uint32_t)plan->tensors_count, ndim = cut_of(p, first)->ndim;
    if (dim < -1 || (dim >= 0 && (uint32_t)dim >= ndim) || (dim < 0 && ndim == FST_MAX_DIMS))
        return refuse_part(p, first, FST_E_ARG,
                           "parts do not follow one another in a dimension that it lacks");
    for (size_t i = 0; i < count; i++) {
        fst_status status = check_part(p, &parts[0], &parts[i], dim);
        if (status) return status;
    }
    fst_cut *shape = NULL;
    fst_status status = add_cut(p, &shape);
    if (status) return status;
    fst_plan_tensor whole = {.file = first->file,
                             .entry = first->entry,
                             .dtype = first->dtype,
                             .block = FST_NO_BLOCK,
                             .batch = FST_NO_BATCH,
                             .scales = FST_NO_TENSOR,
                             .counter = FST_NO_COUNTER,
                             .cut = (uint32_t)plan->cuts_count,
                             .fused = FST_NO_TENSOR,
                             .next_part = parts[0].index,
                             .into = parts[0].into};
    plan->cuts_count++;
    memset(shape, 0, sizeof *shape);
    status = place_parts(p, parts, count, dim, &whole, shape);
    if (status) return status;
    for (size_t i = 0; i < count; i++) {
        fst_plan_tensor *tensor = &plan->tensors[parts[i].index];
        tensor->fused = index;
        tensor->next_part = i + 1 < count ? parts[i + 1].index : FST_NO_TENSOR;
        if (parts[i].index > whole.last_part) whole.last_part = parts[i].index;
    }
    plan->tensors[plan->tensors_count++] = whole;
    return FST_OK;
}

static fst_status fuse_all(planner *p) {
    fst_plan *plan = p->plan;
    size_t count = 0, capacity = 0;
    part *parts = NULL;
    fst_status status = FST_OK;
    for (size_t i = 0; p->chosen && i < plan->stored_count && !status; i++) {
        if (plan->tensors[i].cut == FST_NO_CUT || !p->chosen[i]->into) continue;
        if (!room(&parts, count, &capacity, sizeof *parts)) status = no_memory(p->error);
        else parts[count++] = (part){p->chosen[i]->into, p->chosen[i]->into_place, (uint32_t)i};
    }
    fst_plan_tensor *more =
        count && !status ? realloc(plan->tensors, (plan->tensors_count + count) * sizeof *more) : NULL;
    if (more) {
        plan->tensors = more;
        qsort(parts, count, sizeof *parts, compare_parts);
    } else if (count && !status) {
        status = no_memory(p->error);
    }
    for (size_t i = 0, end; i < count && !status; i = end) {
        for (end = i + 1; end < count && !strcmp(parts[i].into, parts[end].into);) end++;
        status = fuse(p, &parts[i], end - i);
    }
    free(parts);
    return status;
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
    for (size_t i = first; has_weights(p) && i < end; i++) {
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
            batch->nbytes += aligned(tensor->nbytes);
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
    for (size_t i = first; has_weights(p) && i < plan->stored_count; i++) {
        const fst_quantized *w = plan->tensors[i].weight;
        if (!w) continue;
        uint64_t more = 0;
        for (size_t k = 0; k < w->companions_count; k++) more += plan->tensors[w->list[k]].nbytes;
        if (codes && (companions + more > most || codes > BATCH_CODES)) return i;
        companions += more;
        codes += plan->tensors[i].nbytes;
    }
    return plan->stored_count;
}

static int is_companion(const planner *p, size_t index) {
    const fst_scheme *scheme = p->options->scheme;
    if (!scheme || scheme->roles[index] != FST_ROLE_COMPANION) return 0;
    return p->plan->tensors[scheme->weights[scheme->owner[index]].codes].weight != NULL; /* else it is kept */
}

/* What the codes of a companion mean, if it holds scales. */
static fst_dtype scale_codes_of(const planner *p, size_t index) {
    static const fst_companion kinds[] = {FST_COMPANION_SCALE, FST_COMPANION_GLOBAL, FST_COMPANION_NESTED};
    const fst_quantized *w = &p->options->scheme->weights[p->options->scheme->owner[index]];
    fst_dtype dtype = p->plan->tensors[index].dtype;
    int codes = dtype == FST_U8 && w->companions[FST_COMPANION_NESTED] != FST_NO_TENSOR;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (w->companions[kinds[i]] == index)
            return codes ? FST_NATIVE : dtype == FST_U8 ? FST_F8_E8M0 : dtype;
    return FST_NATIVE;
}

/* What of a companion a part of its weight needs, or, where that stays quantized, goes along with it. */
static fst_status cut_companion(planner *p, size_t index) {
    fst_plan_tensor *tensor = &p->plan->tensors[index];
    const fst_quantized *w = &p->options->scheme->weights[p->options->scheme->owner[index]];
    const fst_plan_tensor *codes = &p->plan->tensors[w->codes];
    unsigned which = 0;
    while (which + 1 < FST_COMPANIONS && w->companions[which] != index) which++;
    if (codes->weight && codes->cut != FST_NO_CUT) {
        fst_cut *cut = NULL, of_weight = *cut_of(p, codes);
        uint64_t most = p->options->segment_bytes ? of_weight.needed : 0;
        fst_status status = add_cut(p, &cut);
        if (status) return status;
        if (fst_cut_companion(w, (fst_companion)which, &of_weight, entry_of(p, tensor), most, cut))
            tensor->cut = (uint32_t)p->plan->cuts_count++;
    } else if (p->kept && p->kept[w->codes] != FST_NO_CUT) {
        fst_status status = cut_kept_tensor(p, index, w, which, p->kept[w->codes],
                                            tensor->dtype != entry_of(p, tensor)->dtype);
        const fst_cut *cut = cut_of(p, tensor);
        if (status || !cut) return status;
        tensor->nbytes = fst_dtype_bytes(tensor->dtype, cut->matrices * cut->rows * cut->cols);
    }
    return FST_OK;
}

/* A companion is stored as it is, whatever floats become, and other tensors move up. */
static fst_status keep_companions(planner *p) {
    uint32_t results = 0;
    int all_plain = !has_weights(p) && p->plan->tensors_count == p->plan->stored_count;
    for (size_t i = 0; i < p->plan->stored_count && !all_plain; i++) {
        fst_status status = role_of(p, i) == FST_ROLE_COMPANION ? cut_companion(p, i) : FST_OK;
        if (status) return status;
        fst_plan_tensor *tensor = &p->plan->tensors[i];
        int is_part = tensor->fused != FST_NO_TENSOR, consumed = is_companion(p, i);
        tensor->result = is_part || consumed ? FST_NO_TENSOR : results++;
        if (is_part && p->plan->tensors[tensor->fused].last_part == i)
            p->plan->tensors[tensor->fused].result = results++;
        if (scales_of(p, tensor)) scales_of(p, tensor)->result = results++;
        const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
        if (!consumed && tensor->memory && role_of(p, i) == FST_ROLE_COMPANION)
            status = check_memory(p, tensor, entry, p->chosen[i]);
        if (status) return status;
        if (!consumed) continue;
        const fst_cut *cut = cut_of(p, tensor);
        tensor->dtype = entry->dtype;
        tensor->nbytes = cut ? cut->nbytes : entry->end - entry->begin;
        tensor->memory = NULL;
        tensor->scale_codes = scale_codes_of(p, i);
    }
    return FST_OK;
}

/* The most memory that a stream needs for what is fused: from where it begins to where its last part comes. */
static void note_pending(fst_plan *plan, uint32_t first_block) {
    uint64_t all = 0;
    for (size_t i = first_block; i < plan->blocks_count; i++) all += plan->blocks[i];
    if (all > plan->bytes_pending) plan->bytes_pending = all;
}

/* What comes of tensors [first, end). */
static fst_status plan_results(planner *p, size_t first, size_t end) {
    fst_plan *plan = p->plan;
    fst_status status = FST_OK;
    for (size_t i = first; i < end && !status; i++) {
        fst_plan_tensor *tensor = &plan->tensors[i];
        if (is_companion(p, i)) continue;
        fst_plan_tensor *scales = scales_of(p, tensor);
        plan->bytes_out += tensor->nbytes + (scales ? scales->nbytes : 0);
        status = place(p, tensor);
        if (!status) status = add_tensor(p, (uint32_t)i);
        if (scales) scales->first_chunk = tensor->first_chunk, scales->chunks = tensor->chunks;
        if (tensor->fused == FST_NO_TENSOR || status) continue;
        fst_plan_tensor *whole = &plan->tensors[tensor->fused];
        whole->pieces += tensor->pieces;
        if (whole->last_part == i) note_pending(plan, whole->block);
    }
    return status;
}

/* A batch's companions come before the weights of the batch before it: they are on the device when its first weight is, and
 * nothing waits for them. */
static fst_status plan_tensors(planner *p) {
    fst_plan *plan = p->plan;
    fst_status status = keep_companions(p);
    size_windows(p);
    size_t first = 0, end = batch_end(p, 0);
    if (!status) status = add_companions(p, first, end);
    while (first < plan->stored_count && !status) {
        size_t next_end = batch_end(p, end);
        uint32_t batch = p->batch;
        status = add_companions(p, end, next_end);
        uint32_t next_batch = p->batch;
        p->batch = batch;
        if (!status) status = plan_results(p, first, end);
        close_chunk(p); /* it belongs to this batch alone */
        p->batch = next_batch;
        first = end;
        end = next_end;
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
    out->tensors = count <= UINT32_MAX ? fst_os_array((count + 1) * sizeof *out->tensors) : NULL;
    p.pieces_room = count + count / 8 + 64; /* most often enough: growing would move them */
    out->pieces = fst_os_array(p.pieces_room * sizeof *out->pieces);
    if (!out->tensors || !out->pieces) {
        fst_plan_free(out);
        return no_memory(error);
    }
    if (choices) {
        p.chosen = malloc((count + 1) * sizeof *p.chosen);
        p.kept = malloc((count + 1) * sizeof *p.kept);
        if (!p.chosen || !p.kept) status = no_memory(error);
    }
    for (size_t i = 0; i < files && !status; i++) {
        status = choose_results(&p, (uint32_t)i, choices);
        if (choices) choices += headers[i].count;
    }
    out->stored_count = out->tensors_count;
    if (!status) status = add_scales(&p);
    if (!status) status = fuse_all(&p);
    if (!status) choose_doubled(&p);
    if (!status) status = plan_tensors(&p);
    close_chunk(&p);
    for (size_t i = 0; out->cuts_count && i < out->stored_count; i++) {
        const fst_plan_tensor *tensor = &out->tensors[i];
        const fst_entry *entry = &headers[tensor->file].tensors[tensor->entry];
        const fst_cut *cut = fst_plan_cut(out, tensor);
        if (cut) out->bytes_needed += cut->needed - (entry->end - entry->begin);
    }
    free(p.chosen);
    free(p.kept);
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
    free(plan->stripes);
    free(plan->windows);
    free(plan->extents);
    for (size_t i = 0; i < plan->cuts_count; i++) fst_cut_free(&plan->cuts[i]);
    free(plan->cuts);
    memset(plan, 0, sizeof *plan);
}
