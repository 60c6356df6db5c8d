/* Loads of parts: put together they are the whole, bit for bit. On the CPU device and on the fake GPU that runs late. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dtype.h"
#include "harness.h"
#include "loading.h"
#include "support.h"

/* ---- Random numbers ---- */

static uint64_t state;

static uint64_t below(uint64_t limit) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % limit;
}

static int one_in(unsigned n) { return below(n) == 0; }

/* ---- What is wanted of tensors ---- */

#define MOST 40u

typedef struct wish {
    char name[64]; /* of the tensor in the whole load */
    int32_t dim;
    uint64_t begin, end; /* 0, 0: by rank */
    uint32_t layout;
    const char *into;
    int32_t into_dim;
    uint64_t into_place;
} wish;

typedef struct wishes {
    wish list[MOST];
    size_t count;
} wishes;

static const wish *wish_for(const wishes *all, const char *name) {
    for (size_t i = 0; i < all->count; i++)
        if (!strcmp(all->list[i].name, name)) return &all->list[i];
    return NULL;
}

/* A rule is asked about the tensor that holds the codes: by its name's beginning. */
static int rule(void *arg, const fst_tensor *tensor, fst_rule *out) {
    const wishes *all = arg;
    for (size_t i = 0; i < all->count; i++) {
        const wish *w = &all->list[i];
        size_t length = strlen(w->name);
        if (length > 7 && !strcmp(w->name + length - 7, ".weight")) length -= 7;
        if (strncmp(tensor->name, w->name, length) ||
            (tensor->name[length] && !strchr("._", tensor->name[length])))
            continue;
        out->shard_dim = w->dim;
        out->shard_begin = w->begin;
        out->shard_end = w->end;
        out->layout = w->layout;
        out->into = w->into;
        out->into_dim = w->into_dim;
        out->into_place = w->into_place;
        return 0;
    }
    return 0;
}

/* ---- Elements ---- */

static uint64_t element(const unsigned char *data, unsigned bits, uint64_t i) {
    uint64_t at = i * bits, value = 0;
    if (bits >= 8) {
        memcpy(&value, data + i * (bits / 8), bits / 8);
        return value;
    }
    for (unsigned k = 0; k < bits; k++) value |= (uint64_t)(data[(at + k) / 8] >> ((at + k) % 8) & 1) << k;
    return value;
}

/* Where element `index` of the part is in the whole: the part's place, then its layout undone. `shape` is the whole's. */
static uint64_t source(const wish *w, uint32_t n, const uint64_t *shape, uint64_t begin, uint64_t end,
                       const uint64_t *at) {
    uint64_t place[FST_MAX_DIMS], flat = 0;
    for (uint32_t i = 0; i < n; i++) place[i] = at[i];
    if (w->layout & FST_TRANSPOSE) {
        place[n - 2] = at[n - 1];
        place[n - 1] = at[n - 2];
    }
    if (w->layout & FST_DEINTERLEAVE) {
        uint32_t d = n < 2 ? 0 : n - 2;
        uint64_t rows = w->dim == (int32_t)d ? end - begin : shape[d], half = rows - rows / 2;
        place[d] = place[d] < half ? 2 * place[d] : 2 * (place[d] - half) + 1;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (w->dim == (int32_t)i) place[i] += begin;
        flat = flat * shape[i] + place[i];
    }
    return flat;
}

/* Walks over all places of a shape. 0: that was the last. */
static int next_place(uint32_t n, const uint64_t *shape, uint64_t *at) {
    for (uint32_t i = n; i-- > 0;) {
        if (++at[i] < shape[i]) return 1;
        at[i] = 0;
    }
    return 0;
}

static void part_shape(const wish *w, const fst_tensor *whole, unsigned rank, unsigned ranks, uint64_t *shape,
                       uint64_t *begin, uint64_t *end) {
    uint32_t n = (uint32_t)whole->ndim;
    *begin = *end = 0;
    for (uint32_t i = 0; i < n; i++) shape[i] = whole->shape[i];
    if (w->dim >= 0) {
        *begin = w->begin, *end = w->end;
        if (w->end == 0) fst_shard_range(shape[w->dim], 1, rank, ranks, begin, end);
        shape[w->dim] = *end - *begin;
    }
    if (!(w->layout & FST_TRANSPOSE)) return;
    uint64_t last = shape[n - 1];
    shape[n - 1] = shape[n - 2];
    shape[n - 2] = last;
}

/* A part against the same elements of the whole; it may lie in a larger result, `offset` along dimension `wide`. */
static void check_part(const wish *w, const fst_tensor *whole, const fst_tensor *got, unsigned rank,
                       unsigned ranks, int32_t wide, uint64_t offset) {
    const unsigned bits = fst_dtype_bits(whole->dtype);
    uint64_t shape[FST_MAX_DIMS], begin, end, at[FST_MAX_DIMS] = {0};
    uint32_t n = (uint32_t)whole->ndim;
    part_shape(w, whole, rank, ranks, shape, &begin, &end);
    for (uint32_t i = 0; i < n; i++)
        if (shape[i] == 0) return;
    do {
        uint64_t flat = wide == -1 ? offset : 0;
        for (uint32_t i = 0; i < n; i++) {
            uint64_t extent = got->shape[wide == -1 ? i + 1 : i];
            flat = flat * extent + at[i] + (wide == (int32_t)i ? offset : 0);
        }
        uint64_t want = element(whole->data, bits, source(w, n, whole->shape, begin, end, at));
        uint64_t have = element(got->data, bits, flat);
        if (want != have)
            test_fail(
                __FILE__, __LINE__,
                "%s (%s, dim %d, %llu to %llu, layout %u, rank %u of %u): element %llu is %llx, not %llx",
                whole->name, fst_dtype_name(whole->stored_dtype), (int)w->dim, (unsigned long long)begin,
                (unsigned long long)end, w->layout, rank, ranks, (unsigned long long)flat,
                (unsigned long long)have, (unsigned long long)want);
    } while (next_place(n, shape, at));
}

static const wish plain_wish = {.dim = FST_REPLICATE};

/* Every result of a part's load. */
static void check_model(const fst_model *whole, const fst_model *part, const wishes *all, unsigned rank,
                        unsigned ranks) {
    size_t fused = 0;
    for (size_t i = 0; i < fst_model_count(whole); i++) {
        fst_tensor want, got;
        uint64_t shape[FST_MAX_DIMS], begin, end, offset = 0;
        CHECK_INT(FST_OK, fst_model_at(whole, i, &want));
        const wish *w = wish_for(all, want.name);
        if (!w) w = &plain_wish;
        if (w->into) {
            CHECK_INT(FST_OK, fst_model_find(part, w->into, &got));
            for (size_t k = 0; k < all->count; k++) {
                const wish *other = &all->list[k];
                fst_tensor before;
                if (!other->into || strcmp(other->into, w->into) || other->into_place >= w->into_place)
                    continue;
                CHECK_INT(FST_OK, fst_model_find(whole, other->name, &before));
                part_shape(other, &before, rank, ranks, shape, &begin, &end);
                offset += w->into_dim < 0 ? 1 : shape[w->into_dim];
            }
            check_part(w, &want, &got, rank, ranks, w->into_dim, offset);
            fused++;
            continue;
        }
        if (fst_model_find(part, want.name, &got)) test_fail(__FILE__, __LINE__, "%s is missing", want.name);
        CHECK_INT(want.dtype, got.dtype);
        CHECK_INT(want.ndim, got.ndim);
        part_shape(w, &want, rank, ranks, shape, &begin, &end);
        uint64_t count = 1;
        for (size_t k = 0; k < want.ndim; k++) {
            CHECK_INT(shape[k], got.shape[k]);
            count *= shape[k];
        }
        CHECK_INT(fst_dtype_bytes(want.dtype, count), got.nbytes);
        int cut = w->dim >= 0 && !(begin == 0 && end == want.shape[w->dim]);
        CHECK_INT(cut ? w->dim : FST_REPLICATE, got.shard_dim);
        CHECK_INT(cut ? begin : 0, got.shard_begin);
        CHECK_INT(cut ? want.shape[w->dim] : 0, got.shard_extent);
        check_part(w, &want, &got, rank, ranks, -2, 0);
    }
    if (!fused) CHECK_INT(fst_model_count(whole), fst_model_count(part));
}

static fst_model *load(const char *path, const fst_options *options) {
    fst_model *model;
    fst_error error;
    if (fst_load(support_list(path), options, &model, &error))
        test_fail(__FILE__, __LINE__, "%s: %s", path, error.text);
    return model;
}

/* All ranks' parts, on a device of either kind. */
static void check_ranks(const char *path, const fst_options *base, const fst_model *whole, wishes *all,
                        unsigned ranks) {
    for (unsigned rank = 0; rank < ranks; rank++) {
        fst_options options = *base;
        int on_gpu = one_in(3);
        options.rank = rank;
        options.ranks = ranks;
        options.rule = rule;
        options.rule_arg = all;
        options.device = on_gpu ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU;
        options.read = one_in(2) ? FST_READ_EXACT : FST_READ_AUTO;
        if (on_gpu) fake_gpu_begin(&(fake_gpu_options){.seed = state});
        fst_model *part = load(path, &options);
        check_model(whole, part, all, rank, ranks);
        fst_stats stats = {.size = sizeof stats};
        CHECK_INT(FST_OK, fst_model_stats(part, &stats));
        CHECK(stats.bytes_needed <= stats.bytes_read);
        fst_model_free(part);
        if (on_gpu) {
            fst_release_cached();
            fake_gpu_end();
        }
    }
}

/* ---- Plain tensors ---- */

static const char *const dtypes[] = {"BOOL", "U8",  "I8",   "F8_E5M2", "F8_E4M3", "I16",
                                     "U16",  "F16", "BF16", "I32",     "F32",     "C64",
                                     "F64",  "I64", "F4",   "F6_E2M3", "F6_E3M2", "F8_E8M0"};

static uint64_t extent(void) {
    static const uint64_t usual[] = {0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 64, 97, 128};
    return usual[below(sizeof usual / sizeof *usual)];
}

typedef struct random_file {
    support_tensor tensors[MOST];
    char names[MOST][64], shapes[MOST][128];
    uint64_t extents[MOST][5];
    unsigned ndim[MOST];
    unsigned char *data[MOST];
    size_t count;
} random_file;

/* Random elements of the next tensor, whose shape is there. */
static void fill(random_file *f, const char *dtype, uint64_t count) {
    size_t i = f->count++, size = count * fst_dtype_bits(fst_dtype_from_name(dtype)) / 8;
    snprintf(f->names[i], sizeof f->names[i], "tensor%zu", i);
    f->data[i] = malloc(size + 1);
    support_random(f->data[i], size, state + i);
    if (!strcmp(dtype, "BOOL"))
        for (uint64_t k = 0; k < count; k++) f->data[i][k] &= 1;
    f->tensors[i] = (support_tensor){f->names[i], dtype, f->shapes[i], f->data[i], size};
}

static void add_random(random_file *f, const char *dtype) {
    size_t i = f->count;
    unsigned bits = fst_dtype_bits(fst_dtype_from_name(dtype));
    uint64_t count;
    do {
        f->ndim[i] = (unsigned)below(5);
        count = 1;
        int length = snprintf(f->shapes[i], sizeof f->shapes[i], "[");
        for (unsigned k = 0; k < f->ndim[i]; k++) {
            count *= f->extents[i][k] = f->ndim[i] > 2 && k < 2 ? below(5) : extent();
            length += snprintf(f->shapes[i] + length, sizeof f->shapes[i] - (size_t)length, "%s%llu",
                               k ? "," : "", (unsigned long long)f->extents[i][k]);
        }
        snprintf(f->shapes[i] + length, sizeof f->shapes[i] - (size_t)length, "]");
    } while (count * bits % 8 || count > 40000);
    fill(f, dtype, count);
}

static void free_file(random_file *f) {
    for (size_t i = 0; i < f->count; i++) free(f->data[i]);
}

/* Whether a part of elements of less than a byte is refused, as it must be. */
static int is_refused(const fst_tensor *whole, const wish *w, unsigned rank, unsigned ranks) {
    const unsigned bits = fst_dtype_bits(whole->stored_dtype);
    uint64_t shape[FST_MAX_DIMS], begin, end, outer = 1, inner = 1, all = 1;
    int kept = whole->dtype == whole->stored_dtype, n = (int)whole->ndim;
    part_shape(w, whole, rank, ranks, shape, &begin, &end);
    for (int i = 0; i < n; i++) {
        all *= shape[i];
        if (i < w->dim) outer *= whole->shape[i];
        if (i > w->dim) inner *= whole->shape[i];
    }
    if (bits >= 8 || all == 0) return 0;
    int whole_part = w->dim < 0 || (begin == 0 && end == whole->shape[w->dim]);
    if (whole_part && !w->layout) return 0;
    int in_bytes = !whole_part && ((outer > 1 && whole->shape[w->dim] * inner * bits % 8) ||
                                   begin * inner * bits % 8 || (end - begin) * inner * bits % 8);
    if (w->layout) return kept || n != 2;
    return in_bytes && kept;
}

static void random_wish(wish *w, const char *name, unsigned ndim, const uint64_t *extents) {
    memset(w, 0, sizeof *w);
    snprintf(w->name, sizeof w->name, "%s", name);
    w->dim = ndim && !one_in(4) ? (int32_t)below(ndim) : FST_REPLICATE;
    w->into_dim = -1;
    if (w->dim >= 0 && one_in(3)) {
        w->begin = below(extents[w->dim] + 1);
        w->end = w->begin + below(extents[w->dim] - w->begin + 1);
    }
    if (ndim >= 2 && one_in(3)) w->layout |= FST_TRANSPOSE;
    if (ndim >= 1 && one_in(4)) w->layout |= FST_DEINTERLEAVE;
}

TEST(shards, random_parts_of_random_tensors) {
    static const fst_dtype casts[] = {FST_NATIVE, FST_NATIVE, FST_BF16, FST_F16, FST_F32, FST_F8_E4M3};
    for (uint64_t seed = 1; seed <= 250; seed++) {
        random_file f = {.count = 0};
        wishes all = {.count = 0};
        state = seed * 77777;
        const char *path = test_path("model.safetensors");
        fst_options options = support_options(FST_DEVICE_CPU);
        options.cast = casts[below(sizeof casts / sizeof *casts)];
        unsigned ranks = 1 + (unsigned)below(8);
        size_t count = 1 + below(8);
        while (f.count < count) {
            const char *dtype = dtypes[below(sizeof dtypes / sizeof *dtypes)];
            if (fst_dtype_bits(fst_dtype_from_name(dtype)) < 8 && options.cast == FST_F8_E4M3) continue;
            add_random(&f, dtype);
        }
        support_checkpoint(path, NULL, f.tensors, f.count, below(100));
        fst_model *whole = load(path, &options);
        for (size_t i = 0; i < f.count; i++) {
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_model_find(whole, f.names[i], &tensor));
            wish *w = &all.list[all.count++];
            random_wish(w, f.names[i], f.ndim[i], f.extents[i]);
            for (unsigned rank = 0; rank < ranks; rank++)
                if (is_refused(&tensor, w, rank, ranks))
                    w->dim = FST_REPLICATE, w->layout = 0, w->begin = w->end = 0;
        }
        check_ranks(path, &options, whole, &all, ranks);
        fst_model_free(whole);
        free_file(&f);
    }
}

/* ---- Results that are fused ---- */

/* Tensors of one dtype that differ in one dimension at most, in files' order at random. */
static void add_group(random_file *f, wishes *all, const char *into) {
    const char *dtype = dtypes[below(14)]; /* of whole bytes */
    unsigned ndim = 1 + (unsigned)below(3), parts = 1 + (unsigned)below(4);
    int32_t along = (int32_t)below(ndim + 1) - 1; /* -1: stacked */
    uint64_t shape[3];
    wish like;
    for (unsigned i = 0; i < ndim; i++) shape[i] = 1 + below(20);
    random_wish(&like, "", ndim, shape);
    like.begin = like.end = 0;
    for (unsigned p = 0; p < parts; p++) {
        size_t i = f->count;
        uint64_t count = 1;
        f->ndim[i] = ndim;
        int length = snprintf(f->shapes[i], sizeof f->shapes[i], "[");
        for (unsigned k = 0; k < ndim; k++) {
            /* The dimension of the file that is `along` in the result. */
            int32_t stored = along;
            if (like.layout & FST_TRANSPOSE && along >= (int32_t)ndim - 2)
                stored = along == (int32_t)ndim - 1 ? (int32_t)ndim - 2 : (int32_t)ndim - 1;
            f->extents[i][k] = stored == (int32_t)k ? 1 + below(30) : shape[k];
            count *= f->extents[i][k];
            length += snprintf(f->shapes[i] + length, sizeof f->shapes[i] - (size_t)length, "%s%llu",
                               k ? "," : "", (unsigned long long)f->extents[i][k]);
        }
        snprintf(f->shapes[i] + length, sizeof f->shapes[i] - (size_t)length, "]");
        fill(f, dtype, count);
        wish *w = &all->list[all->count++];
        *w = like;
        snprintf(w->name, sizeof w->name, "%s", f->names[i]);
        w->into = into;
        w->into_dim = along;
        w->into_place = p * 10 + 5;
    }
}

TEST(shards, random_parts_of_results_that_are_fused) {
    static const fst_dtype casts[] = {FST_NATIVE, FST_NATIVE, FST_BF16, FST_F32, FST_F8_E4M3};
    static const char *const names[] = {"fused.a", "fused.b", "fused.c"};
    unsigned done = 0;
    for (uint64_t seed = 1; seed <= 400; seed++) {
        random_file f = {.count = 0};
        wishes all = {.count = 0};
        state = seed * 55555;
        const char *path = test_path("model.safetensors");
        fst_options options = support_options(FST_DEVICE_CPU);
        options.cast = casts[below(sizeof casts / sizeof *casts)];
        unsigned ranks = 1 + (unsigned)below(5), groups = 1 + (unsigned)below(3);
        for (unsigned g = 0; g < groups; g++) {
            if (one_in(2)) add_random(&f, "I32");
            add_group(&f, &all, names[g]);
        }
        /* Parts need not come in the order of the files. */
        for (size_t i = f.count; i > 1; i--) {
            size_t k = below(i);
            support_tensor swap = f.tensors[i - 1];
            f.tensors[i - 1] = f.tensors[k];
            f.tensors[k] = swap;
        }
        support_checkpoint(path, NULL, f.tensors, f.count, below(100));
        fst_model *whole = load(path, &options);
        /* A part of what is not one of the last two dimensions only fits where nothing comes before. */
        fst_options first = options;
        fst_model *part;
        fst_error error;
        first.rule = rule;
        first.rule_arg = &all;
        fst_status status = fst_load(support_list(path), &first, &part, &error);
        if (status) CHECK_INT(FST_E_UNSUPPORTED, status);
        else done++, fst_model_free(part), check_ranks(path, &options, whole, &all, ranks);
        fst_model_free(whole);
        free_file(&f);
    }
    CHECK(done > 300);
}

/* ---- Quantized weights ---- */

TEST(shards, random_parts_of_quantized_weights) {
    static const fst_dtype casts[] = {FST_BF16, FST_F16, FST_F32};
    for (size_t k = 0; k < SUPPORT_LIBRARIES; k++) {
        char path[1024];
        state = k * 1234567 + 99;
        snprintf(path, sizeof path, "%s/%s/model.safetensors", FST_TEST_DATA, support_libraries[k]);
        fst_options options = support_options(FST_DEVICE_CPU);
        for (unsigned round = 0; round < 12; round++) {
            options.cast = casts[round % 3];
            fst_model *whole = load(path, &options);
            wishes all = {.count = 0};
            for (size_t i = 0; i < fst_model_count(whole) && all.count < MOST; i++) {
                fst_tensor tensor;
                CHECK_INT(FST_OK, fst_model_at(whole, i, &tensor));
                if (tensor.ndim < 2) continue;
                random_wish(&all.list[all.count++], tensor.name, (unsigned)tensor.ndim, tensor.shape);
            }
            check_ranks(path, &options, whole, &all, 1 + round % 8);
            fst_model_free(whole);
        }
    }
}

/* ---- Quantized weights that chunks cut ---- */

typedef struct quantized {
    const char *codes, *codes_dtype, *scale, *scale_dtype, *config;
    unsigned bits;       /* of a code */
    unsigned high, wide; /* under one scale; 0: all */
    int blocks;          /* codes are [rows, cols / 32, 16] */
} quantized;

/* Large enough that codes are many chunks, with scales that are cut along both ways. */
static void add_quantized(random_file *f, const quantized *q, uint64_t rows, uint64_t cols) {
    for (int scales = 0; scales < 2; scales++) {
        size_t i = f->count++;
        uint64_t down = q->high ? (rows + q->high - 1) / q->high : 1,
                 across = q->wide ? (cols + q->wide - 1) / q->wide : 1;
        uint64_t bytes = scales ? down * across * fst_dtype_bits(fst_dtype_from_name(q->scale_dtype)) / 8
                                : rows * cols * q->bits / 8;
        if (scales)
            snprintf(f->shapes[i], sizeof f->shapes[i], "[%llu,%llu]", (unsigned long long)down,
                     (unsigned long long)across);
        else if (q->blocks)
            snprintf(f->shapes[i], sizeof f->shapes[i], "[%llu,%llu,16]", (unsigned long long)rows,
                     (unsigned long long)cols / 32);
        else
            snprintf(f->shapes[i], sizeof f->shapes[i], "[%llu,%llu]", (unsigned long long)rows,
                     (unsigned long long)(q->bits == 4 && strcmp(q->codes_dtype, "F4") ? cols / 2 : cols));
        f->data[i] = malloc(bytes + 1);
        support_random(f->data[i], bytes, state + i);
        for (uint64_t k = 0; scales && k < bytes; k++)
            if (!strcmp(q->scale_dtype, "F32") && k % 4 == 3) f->data[i][k] = 0x3C;
        f->tensors[i] =
            (support_tensor){scales ? q->scale : q->codes, scales ? q->scale_dtype : q->codes_dtype,
                             f->shapes[i], f->data[i], bytes};
    }
}

static const quantized floats[] = {
    {"m.weight", "F8_E4M3", "m.weight_scale_inv", "F32",
     "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}", 8, 128, 128, 0},
    {"m.weight", "F8_E4M3", "m.weight_scale", "F32", NULL, 8, 1, 0, 0},
    {"m.weight", "I8", "m.weight_scale", "F32", NULL, 8, 1, 0, 0},
    {"m.weight_blocks", "U8", "m.weight_scales", "U8", NULL, 4, 1, 32, 1},
};

static void write_config(const char *config) {
    remove(test_path("config.json"));
    if (config) support_write(test_path("config.json"), config, strlen(config));
}

TEST(shards, parts_of_large_quantized_weights) {
    for (size_t k = 0; k < sizeof floats / sizeof *floats; k++)
        for (unsigned round = 0; round < 6; round++) {
            random_file f = {.count = 0};
            state = k * 999 + round;
            uint64_t rows = 300 + below(300), cols = 32 * (1 + below(40));
            const char *path = test_path("model.safetensors");
            fst_options options = support_options(FST_DEVICE_CPU);
            options.cast = round % 2 ? FST_F32 : FST_BF16;
            add_quantized(&f, &floats[k], rows, cols);
            support_checkpoint(path, NULL, f.tensors, f.count, below(100));
            write_config(floats[k].config);
            fst_model *whole = load(path, &options);
            wishes all = {.count = 1};
            uint64_t extents[2] = {rows, cols};
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_model_at(whole, 0, &tensor));
            random_wish(&all.list[0], tensor.name, 2, extents);
            check_ranks(path, &options, whole, &all, 1 + (unsigned)below(8));
            fst_model_free(whole);
            free_file(&f);
        }
}

/* ---- What stays quantized ---- */

static fst_status load_kept(const char *path, int32_t dim, uint64_t begin, uint64_t end, fst_model **model,
                            fst_error *error) {
    static wishes all;
    fst_options options = support_options(FST_DEVICE_CPU);
    memset(&all, 0, sizeof all);
    all.count = 1;
    all.list[0] = (wish){.name = "m.weight", .dim = dim, .begin = begin, .end = end, .into_dim = -1};
    options.rule = rule;
    options.rule_arg = &all;
    return fst_load(support_list(path), &options, model, error);
}

TEST(shards, codes_that_are_kept_come_with_their_scales) {
    random_file f = {.count = 0};
    const char *path = test_path("model.safetensors");
    add_quantized(&f, &floats[0], 512, 384);
    support_checkpoint(path, NULL, f.tensors, f.count, 1);
    write_config(floats[0].config);
    for (int32_t dim = 0; dim < 2; dim++) {
        fst_model *model;
        fst_error error;
        fst_tensor codes, scales;
        if (load_kept(path, dim, 128, 384, &model, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
        CHECK_INT(FST_OK, fst_model_find(model, "m.weight", &codes));
        CHECK_INT(FST_OK, fst_model_find(model, "m.weight_scale_inv", &scales));
        CHECK_INT(256, codes.shape[dim]);
        CHECK_INT(2, scales.shape[dim]);
        for (uint64_t r = 0; r < codes.shape[0]; r++)
            for (uint64_t c = 0; c < codes.shape[1]; c++) {
                uint64_t from = dim ? r * 384 + c + 128 : (r + 128) * 384 + c;
                CHECK_INT(f.data[0][from], ((unsigned char *)codes.data)[r * codes.shape[1] + c]);
            }
        for (uint64_t r = 0; r < scales.shape[0]; r++)
            for (uint64_t c = 0; c < scales.shape[1]; c++) {
                uint64_t from = dim ? r * 3 + c + 1 : (r + 1) * 3 + c;
                CHECK_BYTES(f.data[1] + 4 * from,
                            (unsigned char *)scales.data + 4 * (r * scales.shape[1] + c), 4);
            }
        fst_model_free(model);
    }
    free_file(&f);
}

TEST(shards, a_border_in_a_block_of_what_is_kept) {
    random_file f = {.count = 0};
    const char *path = test_path("model.safetensors");
    fst_model *model;
    fst_error error;
    add_quantized(&f, &floats[0], 512, 384);
    support_checkpoint(path, NULL, f.tensors, f.count, 1);
    write_config(floats[0].config);
    CHECK_INT(FST_E_UNSUPPORTED, load_kept(path, 0, 100, 384, &model, &error));
    if (!strstr(error.text, "m.weight") || !strstr(error.text, "cuts a block"))
        test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK(model == NULL);
    free_file(&f);
}

/* A part as long as what is stored has blocks is a part all the same. */
TEST(shards, parts_of_what_is_kept_are_counted_in_the_weight) {
    random_file f = {.count = 0};
    const char *path = test_path("model.safetensors");
    fst_model *model;
    fst_error error;
    fst_tensor codes, scales;
    add_quantized(&f, &floats[3], 8, 1024); /* [8,32,16] and [8,32] */
    support_checkpoint(path, NULL, f.tensors, f.count, 1);
    write_config(floats[3].config);
    if (load_kept(path, 1, 0, 32, &model, &error)) test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK_INT(FST_OK, fst_model_find(model, "m.weight_blocks", &codes));
    CHECK_INT(FST_OK, fst_model_find(model, "m.weight_scales", &scales));
    CHECK_INT(8 * 16, codes.nbytes);
    CHECK_INT(8, scales.nbytes);
    for (size_t row = 0; row < 8; row++) {
        CHECK_BYTES(f.data[0] + row * 512, (unsigned char *)codes.data + row * 16, 16);
        CHECK_INT(f.data[1][row * 32], ((unsigned char *)scales.data)[row]);
    }
    fst_model_free(model);
    free_file(&f);
}

TEST(shards, what_is_kept_and_packed_is_cut_at_whole_words) {
    static const struct {
        const char *kind;
        int32_t dim;
        uint64_t begin, end;
        fst_status status;
    } cases[] = {{"gptq-4", 0, 8, 16, FST_OK},
                 {"gptq-4", 0, 4, 16, FST_E_UNSUPPORTED},
                 {"awq", 0, 8, 16, FST_OK},
                 {"awq", 0, 4, 16, FST_E_UNSUPPORTED},
                 {"ct-packed-4", 0, 1, 2, FST_E_UNSUPPORTED}, /* its shape is a tensor */
                 {"bnb-nf4", 0, 1, 2, FST_E_UNSUPPORTED},
                 {"hf-mxfp4", 1, 2, 4, FST_OK}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[1024];
        wishes all = {.count = 0};
        fst_options options = support_options(FST_DEVICE_CPU);
        fst_error error;
        fst_model *model;
        snprintf(path, sizeof path, "%s/%s/model.safetensors", FST_TEST_DATA, cases[i].kind);
        options.cast = FST_BF16;
        fst_model *whole = load(path, &options);
        for (size_t k = 0; k < fst_model_count(whole); k++) {
            fst_tensor tensor;
            CHECK_INT(FST_OK, fst_model_at(whole, k, &tensor));
            wish *w = &all.list[all.count++];
            *w = (wish){.dim = cases[i].dim, .begin = cases[i].begin, .end = cases[i].end, .into_dim = -1};
            snprintf(w->name, sizeof w->name, "%s", tensor.name);
            if (tensor.ndim < 2) w->dim = FST_REPLICATE, w->begin = w->end = 0;
        }
        fst_model_free(whole);
        options.cast = FST_NATIVE;
        options.rule = rule;
        options.rule_arg = &all;
        fst_status status = fst_load(support_list(path), &options, &model, &error);
        if (status != cases[i].status)
            test_fail(__FILE__, __LINE__, "%s: %s %s", cases[i].kind, fst_status_name(status),
                      status ? error.text : "");
        fst_model_free(model);
    }
}

/* ---- What goes wrong ---- */

static const unsigned char zeros[4096];
static const support_tensor three[] = {
    {"a", "BF16", "[8,16]", zeros, 256}, {"b", "BF16", "[4,16]", zeros, 128},
    {"c", "F32", "[4,12]", zeros, 192},  {"d", "BF16", "[4]", zeros, 8},
    {"e", "F4", "[3,2]", zeros, 3},      {"m.weight", "BF16", "[8,16]", zeros, 256}};

/* A load with these wishes fails before anything of the tensors is read, and says so. */
static void check_wrong(fst_status status, const char *what, const wish *list, size_t count, fst_dtype cast,
                        fst_scale scale) {
    const char *path = test_path("wrong.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    wishes all = {.count = count};
    fst_model *model = (fst_model *)&all;
    fst_error error;
    support_checkpoint(path, NULL, three, sizeof three / sizeof *three, 0);
    memcpy(all.list, list, count * sizeof *list);
    options.cast = cast;
    options.scale = scale;
    options.rule = rule;
    options.rule_arg = &all;
    unsigned descriptors = support_open_descriptors();
    fst_status got = fst_load(support_list(path), &options, &model, &error);
    if (got != status) test_fail(__FILE__, __LINE__, "%s: %s", what, fst_status_name(got));
    CHECK(model == NULL);
    if (!strstr(error.text, what)) test_fail(__FILE__, __LINE__, "%s", error.text);
    CHECK_STR(path + strlen(path) - 17, error.path + strlen(error.path) - 17);
    CHECK(error.offset > 0);
    CHECK_INT(descriptors, support_open_descriptors());
}

TEST(shards, a_dimension_that_is_not_there) {
    check_wrong(FST_E_ARG, "\"a\" has 2 dimensions", &(wish){.name = "a", .dim = 2, .into_dim = -1}, 1,
                FST_NATIVE, 0);
    check_wrong(FST_E_ARG, "\"d\" has 1 dimensions", &(wish){.name = "d", .dim = 1, .into_dim = -1}, 1,
                FST_NATIVE, 0);
}

TEST(shards, a_range_outside) {
    check_wrong(FST_E_ARG, "4 to 9 is no part of dimension 0, which has 8",
                &(wish){.name = "a", .dim = 0, .begin = 4, .end = 9, .into_dim = -1}, 1, FST_NATIVE, 0);
    check_wrong(FST_E_ARG, "ends before it begins",
                &(wish){.name = "a", .dim = 0, .begin = 5, .end = 4, .into_dim = -1}, 1, FST_NATIVE, 0);
}

TEST(shards, what_cannot_be_transposed) {
    check_wrong(FST_E_ARG, "\"d\" has 1 dimensions: it cannot be transposed",
                &(wish){.name = "d", .dim = -1, .layout = FST_TRANSPOSE, .into_dim = -1}, 1, FST_NATIVE, 0);
}

TEST(shards, parts_of_less_than_a_byte) {
    check_wrong(FST_E_UNSUPPORTED, "\"e\" has elements of 4 bits",
                &(wish){.name = "e", .dim = 1, .begin = 0, .end = 1, .into_dim = -1}, 1, FST_NATIVE, 0);
}

TEST(shards, parts_of_different_dtypes) {
    const wish list[] = {{.name = "b", .dim = -1, .into = "f", .into_dim = 0},
                         {.name = "c", .dim = -1, .into = "f", .into_dim = 1, .into_place = 1}};
    check_wrong(FST_E_ARG, "\"c\" becomes F32, \"b\" BF16", list, 2, FST_NATIVE, 0);
}

TEST(shards, parts_of_different_widths) {
    const wish list[] = {{.name = "b", .dim = -1, .into = "f", .into_dim = 0},
                         {.name = "c", .dim = -1, .into = "f", .into_dim = 0, .into_place = 1}};
    check_wrong(FST_E_ARG, "\"c\" and \"b\" differ in more than", list, 2, FST_BF16, 0);
}

TEST(shards, parts_that_do_not_agree_on_the_dimension) {
    const wish list[] = {{.name = "a", .dim = -1, .into = "f", .into_dim = 0},
                         {.name = "b", .dim = -1, .into = "f", .into_dim = 1, .into_place = 1}};
    check_wrong(FST_E_ARG, "differ in more than", list, 2, FST_NATIVE, 0);
}

TEST(shards, a_dimension_that_parts_lack) {
    check_wrong(FST_E_ARG, "a dimension that it lacks",
                &(wish){.name = "a", .dim = -1, .into = "f", .into_dim = 2}, 1, FST_NATIVE, 0);
}

TEST(shards, scales_that_need_other_ranks) {
    check_wrong(FST_E_UNSUPPORTED, "\"m.weight\": its scales need what other ranks have",
                &(wish){.name = "m.weight", .dim = 1, .begin = 0, .end = 8, .into_dim = -1}, 1, FST_F8_E4M3,
                FST_QUANTIZE_ROW);
    check_wrong(FST_E_UNSUPPORTED, "\"m.weight\": its scales need what other ranks have",
                &(wish){.name = "m.weight", .dim = 0, .begin = 0, .end = 4, .into_dim = -1}, 1, FST_F8_E4M3,
                FST_QUANTIZE_TENSOR);
    check_wrong(FST_E_UNSUPPORTED, "\"m.weight\": its scales of 128 rows need",
                &(wish){.name = "m.weight", .dim = 0, .begin = 0, .end = 4, .into_dim = -1}, 1, FST_F8_E4M3,
                FST_QUANTIZE_BLOCK);
}

TEST(shards, a_result_with_the_name_of_another) {
    const char *path = test_path("wrong.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    wishes all = {.count = 1, .list = {{.name = "a", .dim = -1, .into = "b", .into_dim = 0}}};
    fst_model *model;
    fst_error error;
    support_checkpoint(path, NULL, three, 3, 0);
    options.rule = rule;
    options.rule_arg = &all;
    CHECK_INT(FST_E_DUPLICATE, fst_load(support_list(path), &options, &model, &error));
}

/* Columns 100 to 140 of 1,000 rows: a read for each. */
static fst_status load_columns(const fake_os_options *os, int on_gpu, size_t *start, fst_error *error) {
    static unsigned char many[400000];
    const support_tensor tensor = {"a", "U8", "[1000,400]", many, sizeof many};
    fst_options options = support_options(on_gpu ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
    wishes all = {.count = 1, .list = {{.name = "a", .dim = 1, .begin = 100, .end = 140, .into_dim = -1}}};
    fst_model *model;
    *start = support_checkpoint(test_path("short.safetensors"), NULL, &tensor, 1, 0);
    options.rule = rule;
    options.rule_arg = &all;
    options.read = FST_READ_EXACT;
    fake_os_begin(os);
    if (on_gpu) fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fst_status status = fst_load(support_list(test_path("short.safetensors")), &options, &model, error);
    CHECK(model == NULL);
    fst_release_cached();
    if (on_gpu) fake_gpu_end();
    fake_os_end();
    if (!strstr(error->text, "\"a\"")) test_fail(__FILE__, __LINE__, "%s", error->text);
    return status;
}

TEST(shards, a_read_that_fails_inside_of_a_part) {
    for (int on_gpu = 0; on_gpu < 2; on_gpu++) {
        size_t start;
        fst_error error;
        const fake_os_options os = {.kind = FAKE_OS_NEEDED, .fail_at = 700, .error = 5};
        CHECK_INT(FST_E_IO, load_columns(&os, on_gpu, &start, &error));
        CHECK_INT(5, error.code);
        CHECK(error.offset >= (int64_t)start + 100 && (error.offset - (int64_t)start - 100) % 400 == 0);
    }
}

static size_t data_start, ends_at; /* the latter from there on */

static void cut_short(void) {
    CHECK_INT(0, truncate(test_path("short.safetensors"), (off_t)(data_start + ends_at)));
}

/* The error has the first byte that is not there. */
TEST(shards, a_file_that_ends_inside_of_a_part) {
    static const size_t ends[][2] = {{200 * 400 + 110, 200 * 400 + 110}, {200 * 400 + 20, 200 * 400 + 100}};
    for (int i = 0; i < 4; i++) {
        fst_error error;
        const fake_os_options os = {.after = 4000, .hook = cut_short};
        ends_at = ends[i / 2][0];
        CHECK_INT(FST_E_CHANGED, load_columns(&os, i % 2, &data_start, &error));
        CHECK_INT(data_start + ends[i / 2][1], error.offset);
    }
}

/* ---- Bytes, streams, files ---- */

TEST(shards, bytes_that_are_asked_for) {
    static unsigned char data[96 * 4096];
    const support_tensor tensors[] = {{"column", "BF16", "[96,2048]", data, sizeof data},
                                      {"row", "BF16", "[96,2048]", data, sizeof data}};
    const char *path = test_path("model.safetensors");
    support_checkpoint(path, NULL, tensors, 2, 0);
    for (int exact = 0; exact < 2; exact++)
        for (unsigned ranks = 2; ranks <= 8; ranks *= 2) {
            fst_options options = support_options(FST_DEVICE_CPU);
            wishes all = {.count = 2,
                          .list = {{.name = "column", .dim = 1, .into_dim = -1},
                                   {.name = "row", .dim = 0, .into_dim = -1}}};
            fst_stats stats = {.size = sizeof stats}, opened = {.size = sizeof opened};
            fst_model *headers;
            options.rule = rule;
            options.rule_arg = &all;
            options.rank = ranks - 1;
            options.ranks = ranks;
            options.read = exact ? FST_READ_EXACT : FST_READ_AUTO;
            CHECK_INT(FST_OK, fst_open(support_list(path), NULL, &headers, NULL));
            CHECK_INT(FST_OK, fst_model_stats(headers, &opened));
            fst_model_free(headers);
            fst_model *part = load(path, &options);
            CHECK_INT(FST_OK, fst_model_stats(part, &stats));
            fst_model_free(part);
            uint64_t needed = 2 * sizeof data / ranks, asked = stats.bytes_read - opened.bytes_read;
            CHECK_INT(needed, stats.bytes_needed);
            CHECK(asked >= needed && asked <= 2 * needed);
            if (exact) CHECK_INT(needed, asked);
        }
}

TEST(shards, a_stream_gives_what_is_fused_once_all_of_it_is_there) {
    static unsigned char data[3][64 * 1024];
    static const char *const names[] = {"x.q", "other", "x.k"};
    support_tensor tensors[3];
    const char *path = test_path("model.safetensors");
    for (int i = 0; i < 3; i++) {
        support_random(data[i], sizeof data[i], (uint64_t)i);
        tensors[i] = (support_tensor){names[i], "U8", "[64,1024]", data[i], sizeof data[i]};
    }
    support_checkpoint(path, NULL, tensors, 3, 0);
    for (int i = 0; i < 4; i++) {
        int on_gpu = i & 1, as_ready = i & 2;
        fst_options options = support_options(on_gpu ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU);
        wishes all = {.count = 2,
                      .list = {{.name = "x.q", .dim = 0, .into = "x.qk", .into_dim = 0, .into_place = 1},
                               {.name = "x.k", .dim = 0, .into = "x.qk", .into_dim = 0, .into_place = 2}}};
        fst_stream *stream;
        fst_error error;
        fst_tensor tensor;
        unsigned given = 0;
        options.rule = rule;
        options.rule_arg = &all;
        options.rank = 1;
        options.ranks = 2;
        options.memory_bytes = 160 << 10;
        if (as_ready) options.flags |= FST_AS_READY;
        if (on_gpu) fake_gpu_begin(&(fake_gpu_options){.seed = (uint64_t)i});
        if (fst_stream_open(support_list(path), &options, &stream, &error))
            test_fail(__FILE__, __LINE__, "%s", error.text);
        for (;;) {
            CHECK_INT(FST_OK, fst_stream_next(stream, &tensor, NULL, &error));
            if (!tensor.name) break;
            given++;
            if (strcmp(tensor.name, "x.qk")) {
                CHECK_BYTES(data[1], tensor.data, sizeof data[1]);
                continue;
            }
            CHECK_INT(64, tensor.shape[0]);
            CHECK_BYTES(data[0] + 32 * 1024, tensor.data, 32 * 1024);
            CHECK_BYTES(data[2] + 32 * 1024, (unsigned char *)tensor.data + 32 * 1024, 32 * 1024);
        }
        CHECK_INT(2, given);
        fst_stream_close(stream);
        if (on_gpu) {
            fst_release_cached();
            fake_gpu_end();
        }
    }
}

TEST(shards, a_stream_without_room_for_what_is_fused) {
    static unsigned char data[3][64 * 1024];
    const support_tensor tensors[] = {{"x.q", "U8", "[64,1024]", data[0], sizeof data[0]},
                                      {"other", "U8", "[64,1024]", data[1], sizeof data[1]},
                                      {"x.k", "U8", "[64,1024]", data[2], sizeof data[2]}};
    const char *path = test_path("model.safetensors");
    fst_options options = support_options(FST_DEVICE_CPU);
    wishes all = {.count = 2,
                  .list = {{.name = "x.q", .dim = -1, .into = "x.qk", .into_dim = 0},
                           {.name = "x.k", .dim = -1, .into = "x.qk", .into_dim = 0}}};
    fst_stream *stream;
    fst_error error;
    support_checkpoint(path, NULL, tensors, 3, 0);
    options.rule = rule;
    options.rule_arg = &all;
    options.memory_bytes = 150 << 10; /* the two, but not the one between them */
    CHECK_INT(FST_E_ARG, fst_stream_open(support_list(path), &options, &stream, &error));
    if (!strstr(error.text, "fused")) test_fail(__FILE__, __LINE__, "%s", error.text);
}
