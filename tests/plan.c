/* The plan, by itself: every stored byte is read once, lands once, and what cannot work is refused. */
#include "plan.h"

#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "harness.h"
#include "support.h"

#define MIB ((uint64_t)1 << 20)

static const char *const paths[] = {"a.safetensors", "b.safetensors"};

/* A header made by hand: tensors of one dimension, one behind the other. */
typedef struct maker {
    fst_header header;
    fst_entry entries[4096];
    uint64_t shapes[4096];
    char names[4096][8];
} maker;

static maker *maker_new(uint64_t data_start) {
    maker *m = calloc(1, sizeof *m);
    CHECK(m != NULL);
    m->header.data_start = data_start;
    m->header.tensors = m->entries;
    return m;
}

static void add(maker *m, fst_dtype dtype, uint64_t count) {
    size_t i = m->header.count++;
    uint64_t begin = i ? m->entries[i - 1].end : 0;
    for (int k = 6; k >= 0; k--) m->names[i][6 - k] = (char)('a' + (i >> (4 * k) & 15));
    m->shapes[i] = count;
    m->entries[i] =
        (fst_entry){m->names[i], 7, 1, &m->shapes[i], dtype, begin, begin + fst_dtype_bytes(dtype, count)};
    m->header.file_size = m->header.data_start + m->entries[i].end;
}

static const fst_plan_options plain = {
    .cast = FST_NATIVE, .chunk_bytes = 4 * MIB, .place_bytes = MIB / 4, .block_bytes = 1024 * MIB};

static fst_status make(const fst_header *headers, size_t files, const fst_plan_options *options,
                       fst_plan *plan) {
    fst_error error;
    return fst_plan_make(headers, paths, files, NULL, options, plan, &error);
}

/* What must hold for every plan: order, borders, no byte twice, none left out, no two results at one place. */
static void check_plan(const fst_plan *plan, const fst_header *headers, const fst_plan_options *options) {
    uint64_t *stored = calloc(plan->tensors_count + 1, sizeof *stored), bytes = 0;
    uint64_t *made = calloc(plan->tensors_count + 1, sizeof *made);
    CHECK(stored && made);
    for (size_t c = 0; c < plan->chunks_count; c++) {
        const fst_plan_chunk *chunk = &plan->chunks[c];
        uint32_t at = 0;
        CHECK(chunk->nbytes > 0 && chunk->nbytes <= options->chunk_bytes && chunk->runs > 0);
        CHECK(c == 0 || plan->chunks[c - 1].file < chunk->file || plan->chunks[c - 1].offset < chunk->offset);
        for (uint32_t r = 0; r < chunk->runs; r++) {
            const fst_plan_run *run = &plan->runs[chunk->first_run + r];
            CHECK_INT(at, run->chunk_offset);
            CHECK(run->kind == FST_RUN_CONVERT || run->pieces == 1);
            for (uint32_t i = 0; i < run->pieces; i++) {
                const fst_plan_piece *piece = &plan->pieces[run->first_piece + i];
                const fst_plan_tensor *tensor = &plan->tensors[piece->tensor];
                const fst_entry *entry = &headers[tensor->file].tensors[tensor->entry];
                CHECK_INT(at, piece->chunk_offset);
                CHECK_INT(chunk->file, tensor->file);
                CHECK_INT(headers[tensor->file].data_start + entry->begin + stored[piece->tensor],
                          chunk->offset + piece->chunk_offset);
                CHECK_INT(made[piece->tensor], piece->dst_offset);
                CHECK_INT(piece->nbytes, fst_dtype_bytes(entry->dtype, piece->count));
                stored[piece->tensor] += piece->nbytes;
                made[piece->tensor] += fst_dtype_bytes(tensor->dtype, piece->count);
                at += piece->nbytes;
            }
        }
        CHECK_INT(chunk->nbytes, at);
        bytes += at;
    }
    CHECK_INT(plan->bytes_read, bytes);
    uint64_t end = 0, out = 0;
    uint32_t block = 0;
    for (size_t i = 0; i < plan->tensors_count; i++) {
        const fst_plan_tensor *tensor = &plan->tensors[i];
        const fst_entry *entry = &headers[tensor->file].tensors[tensor->entry];
        CHECK_INT(entry->end - entry->begin, stored[i]);
        CHECK_INT(tensor->nbytes, made[i]);
        CHECK_INT(0, tensor->block_offset % FST_TENSOR_ALIGN);
        if (tensor->block != block) end = 0, block = tensor->block;
        CHECK(tensor->block_offset >= end);
        end = tensor->block_offset + tensor->nbytes;
        CHECK(end <= plan->blocks[tensor->block]);
        out += tensor->nbytes;
    }
    CHECK_INT(plan->bytes_out, out);
    free(stored);
    free(made);
}

TEST(plan, no_tensors) {
    maker *m = maker_new(10);
    fst_plan plan;
    CHECK_INT(FST_OK, make(&m->header, 1, &plain, &plan));
    CHECK_INT(0, plan.chunks_count);
    CHECK_INT(0, plan.blocks_count);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, one_large_kept_tensor_goes_straight_to_its_place) {
    maker *m = maker_new(107);
    fst_plan plan;
    add(m, FST_BF16, 5 * MIB + 3);
    CHECK_INT(FST_OK, make(&m->header, 1, &plain, &plan));
    check_plan(&plan, &m->header, &plain);
    CHECK_INT(3, plan.chunks_count);
    CHECK_INT(FST_RUN_PLACE, plan.runs[0].kind);
    CHECK_INT(0, plan.chunks[0].jobs_bytes);
    CHECK_INT(0, plan.converts);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, a_cast_goes_through_staging_and_its_result_is_placed_by_its_own_size) {
    maker *m = maker_new(8);
    fst_plan_options options = plain;
    fst_plan plan;
    options.cast = FST_F32;
    add(m, FST_F8_E4M3, 9 * MIB + 1);
    add(m, FST_F64, 3 * MIB);
    CHECK_INT(FST_OK, make(&m->header, 1, &options, &plan));
    check_plan(&plan, &m->header, &options);
    CHECK_INT(FST_F32, plan.tensors[0].dtype);
    CHECK_INT((9 * MIB + 1) * 4, plan.tensors[0].nbytes);
    for (size_t i = 0; i < plan.runs_count; i++) CHECK_INT(FST_RUN_CONVERT, plan.runs[i].kind);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, many_small_tensors_share_chunks_and_one_run) {
    maker *m = maker_new(8);
    fst_plan plan;
    for (int i = 0; i < 1000; i++) add(m, FST_I32, 1024);
    CHECK_INT(FST_OK, make(&m->header, 1, &plain, &plan));
    check_plan(&plan, &m->header, &plain);
    CHECK_INT(1, plan.chunks_count);
    CHECK_INT(1, plan.runs_count);
    CHECK_INT(1000 * sizeof(fst_batch_job), plan.chunks[0].jobs_bytes);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, a_chunk_has_room_for_its_jobs) {
    maker *m = maker_new(8);
    fst_plan_options options = plain;
    fst_plan plan;
    options.chunk_bytes = 64 << 10;
    for (int i = 0; i < 4000; i++) add(m, FST_U8, 1);
    CHECK_INT(FST_OK, make(&m->header, 1, &options, &plan));
    check_plan(&plan, &m->header, &options);
    CHECK(plan.chunks_count > 1);
    for (size_t i = 0; i < plan.chunks_count; i++)
        CHECK(plan.chunks[i].jobs_bytes <= options.chunk_bytes / 8);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, small_kept_pieces_between_large_ones) {
    maker *m = maker_new(8);
    fst_plan plan;
    for (int i = 0; i < 6; i++) {
        add(m, FST_F32, 200000);
        add(m, FST_F32, 10);
    }
    CHECK_INT(FST_OK, make(&m->header, 1, &plain, &plan));
    check_plan(&plan, &m->header, &plain);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, every_dtype_kept_and_cut) {
    maker *m = maker_new(1001);
    fst_plan_options options = plain;
    fst_plan plan;
    options.chunk_bytes = 64 << 10;
    options.place_bytes = 16 << 10;
    for (int dtype = 1; dtype < FST_DTYPE_COUNT; dtype++) {
        add(m, (fst_dtype)dtype, 200000);
        add(m, (fst_dtype)dtype, 8);
    }
    CHECK_INT(FST_OK, make(&m->header, 1, &options, &plan));
    check_plan(&plan, &m->header, &options);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, integers_bool_complex_and_bare_scales_are_kept_in_a_cast) {
    static const fst_dtype kept[] = {FST_BOOL, FST_U8,  FST_I8,  FST_I16, FST_U16,    FST_I32,
                                     FST_U32,  FST_I64, FST_U64, FST_C64, FST_F8_E8M0};
    maker *m = maker_new(8);
    fst_plan_options options = plain;
    fst_plan plan;
    options.cast = FST_BF16;
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) add(m, kept[i], 100);
    CHECK_INT(FST_OK, make(&m->header, 1, &options, &plan));
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) CHECK_INT(kept[i], plan.tensors[i].dtype);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, empty_tensors_have_a_place_and_no_piece) {
    maker *m = maker_new(8);
    fst_plan plan;
    for (int i = 0; i < 3; i++) add(m, FST_F32, 0);
    CHECK_INT(FST_OK, make(&m->header, 1, &plain, &plan));
    check_plan(&plan, &m->header, &plain);
    CHECK_INT(0, plan.pieces_count);
    CHECK_INT(1, plan.blocks_count);
    CHECK_INT(0, plan.tensors[2].block_offset);
    CHECK_INT(FST_TENSOR_ALIGN, plan.blocks[0]);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, blocks_hold_what_fits_and_a_larger_tensor_has_its_own) {
    maker *m = maker_new(8);
    fst_plan_options options = plain;
    fst_plan plan;
    options.block_bytes = MIB;
    add(m, FST_U8, MIB / 2);
    add(m, FST_U8, MIB / 2);
    add(m, FST_U8, 1);
    add(m, FST_U8, 5 * MIB);
    add(m, FST_U8, 1);
    CHECK_INT(FST_OK, make(&m->header, 1, &options, &plan));
    check_plan(&plan, &m->header, &options);
    CHECK_INT(4, plan.blocks_count);
    CHECK_INT(0, plan.tensors[1].block);
    CHECK_INT(1, plan.tensors[2].block);
    CHECK_INT(2, plan.tensors[3].block);
    CHECK_INT(5 * MIB, plan.blocks[2]);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, a_chunk_never_spans_two_files) {
    maker *m = maker_new(8), *n = maker_new(16);
    fst_plan plan;
    add(m, FST_U8, 100);
    add(n, FST_U8, 100);
    fst_header both[2] = {m->header, n->header};
    CHECK_INT(FST_OK, make(both, 2, &plain, &plan));
    check_plan(&plan, both, &plain);
    CHECK_INT(2, plan.chunks_count);
    fst_plan_free(&plan);
    free(m);
    free(n);
}

/* A stream could wait for a block that nothing in the chunk needs. */
TEST(plan, a_chunk_has_the_block_of_what_is_in_it) {
    maker *m = maker_new(8);
    static unsigned char memory[64 << 10];
    const fst_choice choices[] = {{.memory = memory, .memory_bytes = sizeof memory}, {.skip = 0}};
    fst_plan_options options = plain;
    fst_plan plan;
    fst_error error;
    options.chunk_bytes = sizeof memory;
    add(m, FST_U8, sizeof memory - 512); /* what is left is less than a cut */
    add(m, FST_U8, 100000);
    CHECK_INT(FST_OK, fst_plan_make(&m->header, paths, 1, choices, &options, &plan, &error));
    CHECK_INT(1, plan.blocks_count);
    CHECK(plan.chunks[0].block == FST_NO_BLOCK);
    CHECK_INT(0, plan.chunks[1].block);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, tensors_left_out_are_not_read) {
    maker *m = maker_new(8);
    static const fst_choice choices[] = {{.skip = 0}, {.skip = 1}, {.skip = 0}};
    fst_plan plan;
    fst_error error;
    for (int i = 0; i < 3; i++) add(m, FST_U8, 1000);
    CHECK_INT(FST_OK, fst_plan_make(&m->header, paths, 1, choices, &plain, &plan, &error));
    CHECK_INT(2, plan.tensors_count);
    CHECK_INT(1, plan.ignored);
    CHECK_INT(2, plan.chunks_count);
    CHECK_INT(2000, plan.bytes_read);
    CHECK_INT(2008, plan.chunks[1].offset);
    fst_plan_free(&plan);
    free(m);
}

TEST(plan, random_tables_are_covered_exactly) {
    for (uint64_t seed = 1; seed <= 200; seed++) {
        unsigned char dice[4096];
        maker *m = maker_new(8 + seed % 100);
        fst_plan_options options = {.cast = seed % 3 ? FST_NATIVE : FST_F16,
                                    .chunk_bytes = (64 + seed % 7 * 32) << 10,
                                    .place_bytes = (1 + seed % 40) << 10,
                                    .block_bytes = (seed % 5 + 1) * MIB / 4};
        fst_plan plan;
        support_random(dice, sizeof dice, seed);
        for (int i = 0; i < 300; i++) {
            fst_dtype dtype = (fst_dtype)(1 + dice[i] % (FST_DTYPE_COUNT - 1));
            uint64_t count = dice[i + 1000] % 4 ? dice[i + 2000] * 8u : dice[i + 2000] * 1024u;
            if (options.cast && fst_dtype_is_castable(dtype) && !fst_dtype_can_cast(dtype, options.cast))
                continue;
            add(m, dtype, count);
        }
        CHECK_INT(FST_OK, make(&m->header, 1, &options, &plan));
        check_plan(&plan, &m->header, &options);
        fst_plan_free(&plan);
        free(m);
    }
}

/* ---- What goes wrong ---- */

TEST(plan, a_float_without_a_kernel_is_refused_by_name) {
    maker *m = maker_new(108);
    fst_plan_options options = plain;
    fst_plan plan;
    fst_error error;
    options.cast = FST_F8_E8M0;
    add(m, FST_U8, 50);
    add(m, FST_F32, 4);
    CHECK_INT(FST_E_NO_CAST, fst_plan_make(&m->header, paths, 1, NULL, &options, &plan, &error));
    CHECK(strstr(error.text, "aaaaaab") && strstr(error.text, "F32") && strstr(error.text, "F8_E8M0"));
    CHECK_INT(158, error.offset);
    CHECK_STR("a.safetensors", error.path);
    CHECK_INT(0, plan.chunks_count);
    CHECK(plan.tensors == NULL);
    free(m);
}

TEST(plan, a_cast_to_an_integer_is_refused) {
    maker *m = maker_new(8);
    fst_plan_options options = plain;
    fst_plan plan;
    options.cast = FST_I32;
    add(m, FST_F32, 4);
    CHECK_INT(FST_E_NO_CAST, make(&m->header, 1, &options, &plan));
    free(m);
}

TEST(plan, chunks_that_hold_no_element_are_refused) {
    maker *m = maker_new(8);
    fst_plan_options options = plain;
    fst_plan plan;
    options.chunk_bytes = 4096;
    add(m, FST_F32, 4);
    CHECK_INT(FST_E_ARG, make(&m->header, 1, &options, &plan));
    options.chunk_bytes = UINT32_MAX;
    CHECK_INT(FST_E_ARG, make(&m->header, 1, &options, &plan));
    free(m);
}

TEST(plan, a_result_beyond_all_memory_is_refused) {
    maker *m = maker_new(8);
    fst_plan_options options = plain;
    fst_plan plan;
    options.cast = FST_F64;
    add(m, FST_F8_E4M3, (uint64_t)1 << 62);
    CHECK_INT(FST_E_MEMORY, make(&m->header, 1, &options, &plan));
    free(m);
}
