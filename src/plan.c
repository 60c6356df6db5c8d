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
    size_t pieces_room, runs_room, chunks_room, blocks_room, batches_room, stripes_room, windows_room;
    uint64_t window_bytes, window_used; /* of windows; of the last one */
    uint32_t batch;                     /* that chunks belong to now; FST_NO_BATCH: none */
    int companions;                     /* they bring its companions */
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

/* A place for the result, and for its scales: behind the last one, or in a new block. */
static fst_status place(planner *p, fst_plan_tensor *tensor) {
    fst_plan *plan = p->plan;
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

/* ---- Stripes that are parked ---------------------------------------------------------------------- */

static uint64_t stripe_bytes(const fst_plan_tensor *tensor) {
    return aligned(fst_dtype_bytes(tensor->parked, tensor->stripe_rows * tensor->cols));
}

/* The size of windows: of the largest stripe, or larger, so that some chunks are under way at a time. */
static void size_windows(planner *p) {
    uint64_t wanted = p->options->window_bytes ? p->options->window_bytes : 8 * p->options->chunk_bytes;
    uint64_t largest = 0, all = 0;
    for (size_t i = 0; i < p->plan->stored_count; i++) {
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

/* True when a tensor's bytes from `offset` on may go into the open chunk: they follow what is in it, with a small gap
 * perhaps, and their block is the chunk's. So no chunk needs memory that only comes once an earlier one is done with. */
static int continues(const planner *p, const fst_plan_tensor *tensor, uint64_t offset) {
    const fst_plan_chunk *open = p->open;
    if (!open || open->file != tensor->file || offset < open->offset + open->nbytes) return 0;
    uint64_t gap = offset - open->offset - open->nbytes;
    if (gap && p->plan->batches_count == 0) return 0; /* companions alone are worth it */
    if (gap > MOST_GAP || open->nbytes + gap >= p->options->chunk_bytes) return 0;
    if (tensor->parked && !reaches_stripe(p)) return 0;
    uint32_t block = block_of(p, tensor);
    return block == FST_NO_BLOCK || open->block == FST_NO_BLOCK || block == open->block;
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
        if (p->open->block == FST_NO_BLOCK) p->open->block = block_of(p, tensor);
        if (gap) add_gap(p, (uint32_t)gap);
        return FST_OK;
    }
    close_chunk(p);
    fst_status status = open_chunk(p, tensor->file, offset, block_of(p, tensor));
    if (!status) *take = fitting(p, 0, left, cut);
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
    int quantized = tensor->conversion == FST_CONVERT_QUANTIZE;
    fst_dtype dtype = tensor->parked ? tensor->parked : tensor->dtype; /* that pieces become */
    unsigned bits = weight ? weight->bits : fst_dtype_bits(entry->dtype);
    unsigned result_bits = fst_dtype_bits(dtype);
    uint64_t start = p->headers[tensor->file].data_start + entry->begin;
    uint64_t total = entry->end - entry->begin, done = 0, cut = CUT_ELEMENTS * bits / 8;
    uint64_t count = weight ? weight->rows * weight->cols : 0; /* of one matrix; bitsandbytes' may be odd */
    uint64_t matrix = weight ? (count * bits + 7) / 8 : total; /* bytes of one */
    int packed = weight && fst_scheme_is_packed(weight);
    if (packed && weight->stack) {
        fst_status status = packed_cut(p, tensor, entry, &cut);
        if (status) return status;
        matrix = total / weight->stack; /* rows may end in words that are not full */
    }
    if (quantized && !weight) matrix = tensor->rows * tensor->cols * bits / 8;
    int in_stripes = tensor->parked && tensor->stripe_rows < tensor->rows;
    uint64_t stripe = in_stripes ? tensor->stripe_rows * tensor->cols * bits / 8 : matrix;
    if (quantized && !tensor->parked) cut = scaled_rows(tensor) * tensor->cols * bits / 8;
    while (done < total) {
        uint64_t in_matrix = weight || quantized ? done % matrix : done, in_stripe = in_matrix % stripe;
        uint64_t left = stripe - in_stripe, take = 0;
        fst_status status = FST_OK;
        if (left > matrix - in_matrix) left = matrix - in_matrix; /* the last stripe of a matrix */
        if (tensor->parked && in_stripe == 0)
            status = add_stripe(p, index, (uint32_t)(done / matrix), in_matrix * 8 / bits / tensor->cols);
        if (!status) status = make_space(p, tensor, start + done, left, cut, &take);
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
            .first = weight || quantized ? in_matrix * 8 / bits : 0,
            .matrix = weight || quantized ? (uint32_t)(done / matrix) : 0,
            .stripe = FST_NO_STRIPE,
        };
        if (packed) place_packed(tensor, result_bits, in_matrix, &piece);
        if (weight && !packed && piece.count > count - piece.first) piece.count = count - piece.first;
        if (tensor->parked) {
            piece.stripe = (uint32_t)(p->plan->stripes_count - 1);
            piece.dst_offset -= stripe_start(p, result_bits);
            note_stripe(p);
        }
        int kept = !weight && dtype == entry->dtype;
        fst_run_kind kind = kept && take >= p->options->place_bytes ? FST_RUN_PLACE : FST_RUN_CONVERT;
        status = add_piece(p, kind, &piece);
        if (status) return status;
        if (kind == FST_RUN_CONVERT && !fst_plan_is_alone(tensor)) p->open_jobs++;
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
        if (tensor->conversion != FST_CONVERT_QUANTIZE && cast != FST_F32 && cast != FST_F16 &&
            cast != FST_BF16)
            return fst_fail(p->error, FST_E_UNSUPPORTED, 0, &where,
                            "tensor \"%s\" (%s) is not dequantized to %s: F32, F16 and BF16 there are",
                            entry->name, fst_format_name(w->format), fst_dtype_name(cast));
        tensor->dtype = cast;
        count = w->stack * w->rows * w->cols;
    } else if (tensor->conversion == FST_CONVERT_QUANTIZE || tensor->conversion == FST_CONVERT_FNUZ) {
        tensor->dtype = cast;
    } else {
        fst_status status = choose_dtype(p, entry, tensor->file, cast, &tensor->dtype);
        if (status) return status;
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
    if (tensor->conversion == FST_CONVERT_FNUZ) tensor->counter = p->plan->counters_count++;
    if (tensor->conversion != FST_CONVERT_QUANTIZE) return FST_OK;
    tensor->counter = p->plan->counters_count++;
    tensor->scale = scale;
    if (w) tensor->rows = w->rows, tensor->cols = w->cols;
    else fst_quantize_shape(entry, &stack, &tensor->rows, &tensor->cols);
    uint64_t unit = scaled_rows(tensor);
    int direct = !w && (entry->dtype == FST_F32 || entry->dtype == FST_F16 || entry->dtype == FST_BF16);
    if (direct && fst_dtype_bytes(entry->dtype, unit * tensor->cols) <= p->options->chunk_bytes)
        return FST_OK;
    tensor->parked = direct ? entry->dtype : FST_F32;
    uint64_t units = p->options->chunk_bytes / fst_dtype_bytes(tensor->parked, unit * tensor->cols) + 1;
    tensor->stripe_rows = tensor->rows;
    if ((!w || is_row_by_row(w)) && units < tensor->rows / unit) tensor->stripe_rows = units * unit;
    return FST_OK;
}

/* The tensors of computed scales, behind all others. */
static fst_status add_scales(planner *p) {
    fst_plan *plan = p->plan;
    size_t count = plan->stored_count;
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
        fst_scale scale = choices ? choices[i].scale : p->options->scale;
        *tensor = (fst_plan_tensor){.file = file,
                                    .entry = (uint32_t)i,
                                    .block = FST_NO_BLOCK,
                                    .batch = FST_NO_BATCH,
                                    .scales = FST_NO_TENSOR,
                                    .counter = FST_NO_COUNTER};
        tensor->memory = choices ? choices[i].memory : NULL;
        fst_status status = choose_conversion(p, index, entry, &cast, scale);
        if (!status && tensor->conversion != FST_CONVERT_FNUZ) tensor->weight = weight_of(p, index, cast);
        if (!status) status = set_result(p, tensor, entry, cast);
        if (!status) status = set_quantized(p, tensor, entry, scale);
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
    for (size_t i = first; i < plan->stored_count; i++) {
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

/* A companion is stored as it is, whatever floats become, and other tensors move up. */
static void keep_companions(planner *p) {
    uint32_t results = 0;
    for (size_t i = 0; i < p->plan->stored_count; i++) {
        fst_plan_tensor *tensor = &p->plan->tensors[i];
        tensor->result = is_companion(p, i) ? FST_NO_TENSOR : results++;
        if (scales_of(p, tensor)) scales_of(p, tensor)->result = results++;
        if (tensor->result != FST_NO_TENSOR) continue;
        const fst_entry *entry = &p->headers[tensor->file].tensors[tensor->entry];
        tensor->dtype = entry->dtype;
        tensor->nbytes = entry->end - entry->begin;
        tensor->memory = NULL;
        tensor->scale_codes = scale_codes_of(p, i);
    }
}

static fst_status plan_tensors(planner *p) {
    fst_plan *plan = p->plan;
    fst_status status = FST_OK;
    keep_companions(p);
    size_windows(p);
    for (size_t first = 0, end; first < plan->stored_count && !status; first = end) {
        end = batch_end(p, first);
        status = add_companions(p, first, end);
        for (size_t i = first; i < end && !status; i++) {
            fst_plan_tensor *tensor = &plan->tensors[i];
            if (tensor->result == FST_NO_TENSOR) continue;
            fst_plan_tensor *scales = scales_of(p, tensor);
            plan->bytes_out += tensor->nbytes + (scales ? scales->nbytes : 0);
            status = place(p, tensor);
            if (!status) status = add_tensor(p, (uint32_t)i);
            if (scales) scales->first_chunk = tensor->first_chunk, scales->chunks = tensor->chunks;
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
    out->stored_count = out->tensors_count;
    if (!status) status = add_scales(&p);
    if (!status) choose_doubled(&p);
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
    free(plan->stripes);
    free(plan->windows);
    memset(plan, 0, sizeof *plan);
}
