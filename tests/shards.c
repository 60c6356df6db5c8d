/* Loads of parts: put together they are the whole, bit for bit. On the CPU device and on the fake GPU that runs late. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

/* All ranks' parts, on a device of either kind. `fails`: what may be refused is. */
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
    snprintf(f->names[i], sizeof f->names[i], "tensor%zu", i);
    f->data[i] = malloc(count * bits / 8 + 1);
    support_random(f->data[i], count * bits / 8, state + i);
    if (!strcmp(dtype, "BOOL"))
        for (uint64_t k = 0; k < count; k++) f->data[i][k] &= 1;
    f->tensors[i] = (support_tensor){f->names[i], dtype, f->shapes[i], f->data[i], count * bits / 8};
    f->count++;
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
static void add_group(random_file *f, wishes *all, const char *into, unsigned ranks) {
    const char *dtype = dtypes[below(14)]; /* of whole bytes */
    unsigned ndim = 1 + (unsigned)below(3), parts = 1 + (unsigned)below(4);
    int32_t along = (int32_t)below(ndim + 1) - 1; /* -1: stacked */
    uint64_t shape[3];
    wish like;
    for (unsigned i = 0; i < ndim; i++) shape[i] = 1 + below(20);
    random_wish(&like, "", ndim, shape);
    like.begin = like.end = 0;
    if (like.layout & FST_TRANSPOSE && along >= 0 && ndim == 3 && along == 0) like.layout = 0;
    if (ndim == 3 && along == 0 && shape[0] > 1) like.layout &= ~0u;
    for (unsigned p = 0; p < parts; p++) {
        size_t i = f->count;
        uint64_t count = 1;
        unsigned bits = fst_dtype_bits(fst_dtype_from_name(dtype));
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
        snprintf(f->names[i], sizeof f->names[i], "tensor%zu", i);
        f->data[i] = malloc(count * bits / 8 + 1);
        support_random(f->data[i], count * bits / 8, state + i);
        if (!strcmp(dtype, "BOOL"))
            for (uint64_t k = 0; k < count; k++) f->data[i][k] &= 1;
        f->tensors[i] = (support_tensor){f->names[i], dtype, f->shapes[i], f->data[i], count * bits / 8};
        f->count++;
        wish *w = &all->list[all->count++];
        *w = like;
        snprintf(w->name, sizeof w->name, "%s", f->names[i]);
        w->into = into;
        w->into_dim = along;
        w->into_place = p * 10 + 5;
    }
    (void)ranks;
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
            add_group(&f, &all, names[g], ranks);
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

static const char *const kinds[] = {"awq",
                                    "bnb-fp4",
                                    "bnb-fp4-nested",
                                    "bnb-int8",
                                    "bnb-nf4",
                                    "bnb-nf4-nested",
                                    "ct-fp8-block",
                                    "ct-fp8-channel",
                                    "ct-fp8-tensor",
                                    "ct-int8-channel",
                                    "ct-int8-zeros",
                                    "ct-mxfp4",
                                    "ct-mxfp8",
                                    "ct-nvfp4",
                                    "ct-packed-3",
                                    "ct-packed-4",
                                    "ct-packed-4-zeros",
                                    "ct-packed-8",
                                    "gptq-2",
                                    "gptq-3",
                                    "gptq-4",
                                    "gptq-4-order",
                                    "gptq-8",
                                    "gptqmodel-fp8-block",
                                    "gptqmodel-fp8-row",
                                    "hf-fp4-experts",
                                    "hf-fp8-block",
                                    "hf-fp8-e8m0",
                                    "hf-mxfp4",
                                    "modelopt-mxfp8",
                                    "modelopt-nvfp4",
                                    "quark-int4",
                                    "quark-mxfp4"};

TEST(shards, random_parts_of_quantized_weights) {
    static const fst_dtype casts[] = {FST_BF16, FST_F16, FST_F32};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        char path[1024];
        state = k * 1234567 + 99;
        snprintf(path, sizeof path, "%s/%s/model.safetensors", FST_TEST_DATA, kinds[k]);
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
