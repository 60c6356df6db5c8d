/* Rows, transposes and OCP to FNUZ: boxes of all shapes against plain loops, what is written beside them, and wrong
 * arguments. Values of casts are kernels_oracle.c's. */
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "kernels_rig.h"

enum { room = 1 << 19 };

static uint8_t pattern[room];

/* Bytes of all values; F16 and BF16 made of them are mostly numbers. */
static const uint8_t *source(void) {
    uint32_t state = 99;
    for (size_t i = 0; i < room; i++) {
        state = state * 1664525u + 1013904223u;
        pattern[i] = (uint8_t)(state >> 24);
    }
    return pattern;
}

static uint32_t below(uint32_t *state, uint32_t n) {
    *state = *state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)(*state >> 8) * n >> 24);
}

/* One element from place `from` to place `to`, as the conversion of numeric.h makes it. */
static void put_one(uint8_t *dst, uint64_t to, int dst_dtype, const uint8_t *src, uint64_t from,
                    int src_dtype, unsigned flags) {
    const size_t src_size = fst_type_bits(src_dtype) / 8, dst_size = fst_type_bits(dst_dtype) / 8;
    uint64_t code = 0;
    memcpy(&code, src + from * src_size, src_size);
    if (src_dtype != dst_dtype) {
        const fst_float a = fst_float_of(src_dtype), b = fst_float_of(dst_dtype);
        code = fst_convert(code, a, b, fst_limit(a, b, !(flags & FST_K_NON_SATURATING)));
    }
    memcpy(dst + to * dst_size, &code, dst_size);
}

/* ---- Rows ---- */

/* Runs it from src + src_skew bytes to dst + RIG_GUARD + dst_skew, and compares all of the destination. */
static void check_rows(test_rig *rig, fst_rows_args args, size_t src_skew, size_t dst_skew) {
    static uint8_t want[room];
    const uint64_t rows_of[FST_ROWS_DIMS] = {0};
    uint64_t index[FST_ROWS_DIMS], rows = 1;
    memcpy(index, rows_of, sizeof index);
    memset(want, 0xA5, room);
    for (uint32_t d = 0; d < args.ndim; d++) rows *= args.extent[d];
    for (uint64_t row = 0; row < rows; row++) {
        uint64_t from = 0, to = 0;
        for (uint32_t d = 0; d < args.ndim; d++)
            from += index[d] * args.src_stride[d], to += index[d] * args.dst_stride[d];
        for (uint64_t col = 0; col < args.cols; col++)
            put_one(want + RIG_GUARD + dst_skew, to + col, args.dst_dtype, pattern + src_skew, from + col,
                    args.src_dtype, args.flags);
        for (uint32_t d = args.ndim; d-- > 0 && ++index[d] == args.extent[d];) index[d] = 0;
    }
    memset(rig->host, 0xA5, room);
    rig_upload(rig, rig->dst, rig->host, room);
    args.src = rig->src + src_skew;
    args.dst = rig->dst + RIG_GUARD + dst_skew;
    CHECK_INT(0, rig->gpu.kernels->rows(rig->stream, &args));
    rig_download(rig, room);
    if (memcmp(want, rig->host, room))
        test_note(__FILE__, __LINE__, "%s: %s to %s", rig->gpu.kernels->target,
                  rig_dtype_name(args.src_dtype), rig_dtype_name(args.dst_dtype));
    CHECK_BYTES(want, rig->host, room);
}

static void check_rows_everywhere(const fst_rows_args *args, size_t src_skew, size_t dst_skew) {
    test_rig rig;
    EACH_RIG(&rig, room) {
        rig_upload(&rig, rig.src, source(), room);
        check_rows(&rig, *args, src_skew, dst_skew);
    }
}

TEST(kernels_rows, columns_of_a_matrix) {
    const fst_rows_args args = {.cols = 100,
                                .ndim = 1,
                                .extent = {50},
                                .src_stride = {257},
                                .dst_stride = {100},
                                .src_dtype = FST_T_BF16,
                                .dst_dtype = FST_T_BF16};
    check_rows_everywhere(&args, 2 * 37, 0);
}

TEST(kernels_rows, packing_into_a_wider_matrix) {
    const fst_rows_args args = {.cols = 100,
                                .ndim = 1,
                                .extent = {50},
                                .src_stride = {100},
                                .dst_stride = {300},
                                .src_dtype = FST_T_F16,
                                .dst_dtype = FST_T_F32};
    check_rows_everywhere(&args, 1, 4);
}

TEST(kernels_rows, every_second_row_apart) {
    const fst_rows_args args = {.cols = 64,
                                .ndim = 2,
                                .extent = {2, 31},
                                .src_stride = {64, 128},
                                .dst_stride = {31 * 64, 64},
                                .src_dtype = FST_T_F8_E4M3,
                                .dst_dtype = FST_T_BF16};
    check_rows_everywhere(&args, 0, 0);
}

TEST(kernels_rows, rows_interleaved) {
    const fst_rows_args args = {.cols = 33,
                                .ndim = 2,
                                .extent = {2, 31},
                                .src_stride = {31 * 33, 33},
                                .dst_stride = {33, 66},
                                .src_dtype = FST_T_I32,
                                .dst_dtype = FST_T_I32};
    check_rows_everywhere(&args, 3, 4);
}

TEST(kernels_rows, one_row_without_dimensions) {
    const fst_rows_args args = {.cols = 1000, .src_dtype = FST_T_BF16, .dst_dtype = FST_T_F8_E5M2};
    check_rows_everywhere(&args, 1, 3);
}

TEST(kernels_rows, one_element_a_row) {
    const fst_rows_args args = {.cols = 1,
                                .ndim = 1,
                                .extent = {999},
                                .src_stride = {7},
                                .dst_stride = {1},
                                .src_dtype = FST_T_F32,
                                .dst_dtype = FST_T_F16};
    check_rows_everywhere(&args, 0, 2);
}

TEST(kernels_rows, all_dimensions_that_there_are) {
    const fst_rows_args args = {.cols = 3,
                                .ndim = 7,
                                .extent = {2, 3, 2, 1, 2, 3, 2},
                                .src_stride = {4000, 1200, 500, 1, 200, 50, 10},
                                .dst_stride = {216, 72, 36, 1, 18, 6, 3},
                                .src_dtype = FST_T_U16,
                                .dst_dtype = FST_T_U16};
    check_rows_everywhere(&args, 5, 6);
}

TEST(kernels_rows, source_rows_in_any_order) {
    const fst_rows_args args = {.cols = 20,
                                .ndim = 2,
                                .extent = {30, 40},
                                .src_stride = {20, 600},
                                .dst_stride = {800, 20},
                                .src_dtype = FST_T_U8,
                                .dst_dtype = FST_T_U8};
    check_rows_everywhere(&args, 0, 1);
}

TEST(kernels_rows, a_contiguous_box_is_one_row) {
    const fst_rows_args args = {.cols = 10,
                                .ndim = 3,
                                .extent = {7, 11, 13},
                                .src_stride = {1430, 130, 10},
                                .dst_stride = {1430, 130, 10},
                                .src_dtype = FST_T_F32,
                                .dst_dtype = FST_T_BF16};
    check_rows_everywhere(&args, 2, 6);
}

TEST(kernels_rows, half_bytes_that_fill_bytes) {
    const fst_rows_args args = {.cols = 34,
                                .ndim = 1,
                                .extent = {9},
                                .src_stride = {50},
                                .dst_stride = {34},
                                .src_dtype = FST_T_U8,
                                .dst_dtype = FST_T_U8};
    test_rig rig;
    check_rows_everywhere(&args, 0,
                          0); /* what the same copy of bytes gives: half of its strides and columns */
    EACH_RIG(&rig, room) {
        fst_rows_args half = args;
        rig_upload(&rig, rig.src, source(), room);
        half.src = rig.src, half.dst = rig.dst;
        CHECK_INT(0, rig.gpu.kernels->rows(rig.stream, &half));
        rig_download(&rig, 34 * 9);
        uint8_t want[34 * 9];
        memcpy(want, rig.host, sizeof want);
        memset(rig.host, 0, 4096);
        rig_upload(&rig, rig.dst, rig.host, 4096);
        half.cols *= 2, half.src_stride[0] *= 2, half.dst_stride[0] *= 2;
        half.src_dtype = half.dst_dtype = FST_T_F4;
        CHECK_INT(0, rig.gpu.kernels->rows(rig.stream, &half));
        rig_download(&rig, sizeof want);
        CHECK_BYTES(want, rig.host, sizeof want);
    }
}

static fst_rows_args random_box(uint32_t *state, int src_dtype, int dst_dtype) {
    fst_rows_args args = {.cols = below(state, 5) ? below(state, 150) + 1 : below(state, 9),
                          .ndim = below(state, 4),
                          .src_dtype = src_dtype,
                          .dst_dtype = dst_dtype,
                          .flags = below(state, 2)};
    uint64_t src_step = args.cols, dst_step = args.cols;
    for (uint32_t d = args.ndim; d-- > 0;) {
        args.extent[d] = below(state, 8) ? below(state, 8) + 1 : below(state, 2);
        args.src_stride[d] = src_step + below(state, 2) * below(state, 20);
        args.dst_stride[d] = dst_step + below(state, 2) * below(state, 20);
        src_step = args.src_stride[d] * (args.extent[d] ? args.extent[d] : 1);
        dst_step = args.dst_stride[d] * (args.extent[d] ? args.extent[d] : 1);
    }
    return args;
}

TEST(kernels_rows, boxes_of_every_pair) {
    uint32_t state = 1;
    test_rig rig;
    EACH_RIG(&rig, room) {
        rig_upload(&rig, rig.src, source(), room);
        for (int s = 0; s < RIG_FLOATS; s++)
            for (int d = 0; d < RIG_FLOATS; d++)
                for (int i = 0; i < 4; i++) {
                    const fst_rows_args args = random_box(&state, rig_floats[s], rig_floats[d]);
                    const size_t size = fst_type_bits(rig_floats[d]) / 8;
                    uint64_t most = args.cols;
                    for (uint32_t k = 0; k < args.ndim; k++)
                        most +=
                            args.extent[k] * (args.src_stride[k] > args.dst_stride[k] ? args.src_stride[k]
                                                                                      : args.dst_stride[k]);
                    if (most * 8 + 256 > room) continue;
                    check_rows(&rig, args, below(&state, 17), below(&state, 17) / size * size);
                }
    }
}

/* Rows that touch the start and the end of the source. */
TEST(kernels_rows, no_byte_outside_the_source_is_read) {
    test_rig rig;
    EACH_RIG(&rig, room) {
        if (!rig.gpu.host_access) continue;
        for (size_t cols = 1; cols < 70; cols += 4)
            for (size_t skew = 0; skew < 16; skew++) {
                const size_t size = (4 * 80 + cols) * 2;
                uint8_t *memory = calloc(1, size); /* AddressSanitizer looks */
                CHECK(memory);
                const fst_rows_args args = {.src = memory,
                                            .dst = rig.dst + skew * 2,
                                            .cols = cols,
                                            .ndim = 1,
                                            .extent = {5},
                                            .src_stride = {80},
                                            .dst_stride = {cols},
                                            .src_dtype = FST_T_F16,
                                            .dst_dtype = skew % 2 ? FST_T_F16 : FST_T_BF16};
                CHECK_INT(0, rig.gpu.kernels->rows(NULL, &args));
                free(memory);
            }
    }
}

static void check_rows_refused(int want, const fst_rows_args *args) {
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        fst_rows_args a = *args;
        memset(rig.host, 0xA5, 4096);
        rig_upload(&rig, rig.dst, rig.host, 4096);
        if (a.src) a.src = rig.src;
        if (a.dst) a.dst = rig.dst + ((uintptr_t)a.dst - 1);
        CHECK_INT(want, rig.gpu.kernels->rows(rig.stream, &a));
        rig_download(&rig, 4096);
        for (size_t i = 0; i < 4096; i++) CHECK_INT(0xA5, rig.host[i]);
    }
}

/* Of addresses, only NULL or not counts, and by how much that of the destination is beyond 1. */
#define SOME ((void *)1)
#define GOOD_ROWS                                                                              \
    .src = SOME, .dst = SOME, .cols = 10, .ndim = 2, .extent = {3, 4}, .src_stride = {40, 10}, \
    .dst_stride = {40, 10}, .src_dtype = FST_T_F16, .dst_dtype = FST_T_F32

#define REFUSE_ROWS(name, want, ...)      \
    TEST(kernels_rows_refuse, name) {     \
        fst_rows_args args = {GOOD_ROWS}; \
        __VA_ARGS__;                      \
        check_rows_refused(want, &args);  \
    }

REFUSE_ROWS(no_source, FST_K_NULL, args.src = NULL)
REFUSE_ROWS(no_destination, FST_K_NULL, args.dst = NULL)
REFUSE_ROWS(destination_off_its_element, FST_K_ALIGN, args.dst = (uint8_t *)SOME + 2)
REFUSE_ROWS(integer_to_float, FST_K_NO_KERNEL, args.src_dtype = FST_T_I32)
REFUSE_ROWS(narrow_types, FST_K_NO_KERNEL, args.src_dtype = FST_T_F4)
REFUSE_ROWS(dtype_outside_the_list, FST_K_NO_KERNEL, args.src_dtype = args.dst_dtype = 77)
REFUSE_ROWS(too_many_dimensions, FST_K_SIZE, args.ndim = 8)
REFUSE_ROWS(source_rows_that_overlap, FST_K_STRIDE, args.src_stride[1] = 9)
REFUSE_ROWS(source_stride_0, FST_K_STRIDE, args.src_stride[1] = 0)
REFUSE_ROWS(slow_source_stride_shorter_than_a_row, FST_K_STRIDE, args.src_stride[0] = 9)
REFUSE_ROWS(destination_rows_that_overlap, FST_K_STRIDE, args.dst_stride[1] = 9)
REFUSE_ROWS(destination_matrices_that_overlap, FST_K_STRIDE, args.dst_stride[0] = 39)
REFUSE_ROWS(destination_dimensions_on_one_another, FST_K_STRIDE, args.dst_stride[0] = 10)
REFUSE_ROWS(too_many_rows, FST_K_SIZE, args.extent[0] = args.extent[1] = 1ull << 33)
REFUSE_ROWS(a_stride_whose_bytes_overflow, FST_K_SIZE, args.src_stride[0] = 1ull << 63)
REFUSE_ROWS(a_source_beyond_the_address_space, FST_K_SIZE, args.src_stride[0] = 1ull << 62)
REFUSE_ROWS(a_destination_beyond_the_address_space, FST_K_SIZE, args.dst_stride[0] = 1ull << 61)
REFUSE_ROWS(columns_whose_bytes_overflow, FST_K_SIZE, args.cols = 1ull << 63; args.ndim = 0)
REFUSE_ROWS(half_bytes_at_the_end_of_a_row, FST_K_SIZE, args.src_dtype = args.dst_dtype = FST_T_F4;
            args.cols = 9)
REFUSE_ROWS(half_bytes_in_a_stride, FST_K_SIZE, args.src_dtype = args.dst_dtype = FST_T_F4;
            args.src_stride[1] = 11)
REFUSE_ROWS(nothing_to_do_without_columns, FST_K_OK, args.cols = 0; args.src = NULL)
REFUSE_ROWS(nothing_to_do_in_an_empty_dimension, FST_K_OK, args.extent[0] = 0; args.dst = NULL)

TEST(kernels_rows, a_step_that_is_never_made_may_be_anything) {
    const fst_rows_args args = {.cols = 20,
                                .ndim = 2,
                                .extent = {1, 3},
                                .src_stride = {0, 25},
                                .dst_stride = {3, 20},
                                .src_dtype = FST_T_F16,
                                .dst_dtype = FST_T_F16};
    check_rows_everywhere(&args, 0, 0);
}

/* ---- Transposes ---- */

static void check_transpose(test_rig *rig, fst_transpose_args args, size_t src_skew, size_t dst_skew) {
    static uint8_t want[room];
    memset(want, 0xA5, room);
    for (uint64_t b = 0; b < args.batch; b++)
        for (uint64_t r = 0; r < args.rows; r++)
            for (uint64_t c = 0; c < args.cols; c++)
                put_one(want + RIG_GUARD + dst_skew, b * args.dst_batch_stride + c * args.dst_stride + r,
                        args.dst_dtype, pattern + src_skew,
                        b * args.src_batch_stride + r * args.src_stride + c, args.src_dtype, args.flags);
    memset(rig->host, 0xA5, room);
    rig_upload(rig, rig->dst, rig->host, room);
    args.src = rig->src + src_skew;
    args.dst = rig->dst + RIG_GUARD + dst_skew;
    CHECK_INT(0, rig->gpu.kernels->transpose(rig->stream, &args));
    rig_download(rig, room);
    if (memcmp(want, rig->host, room))
        test_note(__FILE__, __LINE__, "%s: %s to %s", rig->gpu.kernels->target,
                  rig_dtype_name(args.src_dtype), rig_dtype_name(args.dst_dtype));
    CHECK_BYTES(want, rig->host, room);
}

static void check_transposes(int src, int dst, const uint64_t (*shapes)[3], size_t count) {
    uint32_t state = 5;
    test_rig rig;
    EACH_RIG(&rig, room) {
        rig_upload(&rig, rig.src, source(), room);
        for (size_t i = 0; i < count; i++)
            for (uint32_t gap = 0; gap < 2; gap++) {
                const uint64_t batch = shapes[i][0], rows = shapes[i][1], cols = shapes[i][2];
                const uint64_t src_stride = cols + gap * below(&state, 9),
                               dst_stride = rows + gap * below(&state, 9);
                const fst_transpose_args args = {NULL,
                                                 NULL,
                                                 batch,
                                                 rows,
                                                 cols,
                                                 src_stride,
                                                 dst_stride,
                                                 rows * src_stride + gap,
                                                 cols * dst_stride + gap * 3,
                                                 src,
                                                 dst,
                                                 gap};
                const size_t size = fst_type_bits(dst) / 8;
                if ((batch * rows * src_stride + batch) * fst_type_bits(src) / 8 + 64 > room ||
                    (batch * cols * dst_stride + 3 * batch) * size + 256 > room)
                    continue;
                check_transpose(&rig, args, gap ? below(&state, 17) : 0,
                                gap ? below(&state, 17) / size * size : 0);
            }
    }
}

/* Batch, rows, columns: primes, one of each, none, whole tiles, and one beside them. */
static const uint64_t shapes[][3] = {
    {1, 1, 1},     {1, 1, 300},   {1, 300, 1}, {2, 7, 5},    {1, 128, 128}, {1, 64, 256},
    {1, 129, 127}, {1, 127, 129}, {3, 31, 67}, {1, 17, 401}, {1, 401, 17},  {1, 16, 16},
    {5, 33, 32},   {1, 0, 7},     {1, 7, 0},   {0, 7, 7},    {1, 191, 193},
};
enum { shapes_count = sizeof shapes / sizeof *shapes };

TEST(kernels_transpose, elements_of_1_byte) { check_transposes(FST_T_I8, FST_T_I8, shapes, shapes_count); }
TEST(kernels_transpose, elements_of_2_bytes) {
    check_transposes(FST_T_BF16, FST_T_BF16, shapes, shapes_count);
}
TEST(kernels_transpose, elements_of_4_bytes) { check_transposes(FST_T_F32, FST_T_F32, shapes, shapes_count); }
TEST(kernels_transpose, elements_of_8_bytes) { check_transposes(FST_T_C64, FST_T_C64, shapes, shapes_count); }

TEST(kernels_transpose, every_pair) {
    static const uint64_t few[][3] = {{1, 131, 65}, {2, 37, 130}, {1, 3, 3}};
    for (int s = 0; s < RIG_FLOATS; s++)
        for (int d = 0; d < RIG_FLOATS; d++) check_transposes(rig_floats[s], rig_floats[d], few, 3);
}

TEST(kernels_transpose, twice_gives_the_first) {
    test_rig rig;
    EACH_RIG(&rig, room) {
        const fst_transpose_args there = {rig.src, rig.dst, 1, 151,       211,       211,
                                          160,     0,       0, FST_T_U16, FST_T_U16, 0};
        const fst_transpose_args back = {rig.dst, rig.src, 1, 211,       151,       160,
                                         211,     0,       0, FST_T_U16, FST_T_U16, 0};
        rig_upload(&rig, rig.src, source(), room);
        CHECK_INT(0, rig.gpu.kernels->transpose(rig.stream, &there));
        CHECK_INT(0, rig.gpu.kernels->transpose(rig.stream, &back));
        const fst_cast_args copy = {rig.src, rig.dst, 151 * 211, FST_T_U16, FST_T_U16, 0};
        CHECK_INT(0, rig.gpu.kernels->cast(rig.stream, &copy));
        rig_download(&rig, 151 * 211 * 2);
        CHECK_BYTES(pattern, rig.host, 151 * 211 * 2);
    }
}

static void check_transpose_refused(int want, const fst_transpose_args *args) {
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        fst_transpose_args a = *args;
        memset(rig.host, 0xA5, 4096);
        rig_upload(&rig, rig.dst, rig.host, 4096);
        if (a.src) a.src = rig.src;
        if (a.dst) a.dst = rig.dst + ((uintptr_t)a.dst - 1);
        CHECK_INT(want, rig.gpu.kernels->transpose(rig.stream, &a));
        rig_download(&rig, 4096);
        for (size_t i = 0; i < 4096; i++) CHECK_INT(0xA5, rig.host[i]);
    }
}

#define REFUSE_TRANSPOSE(name, want, ...)                                                             \
    TEST(kernels_transpose_refuse, name) {                                                            \
        fst_transpose_args args = {SOME, SOME, 2, 10, 20, 20, 10, 200, 200, FST_T_F16, FST_T_F32, 0}; \
        __VA_ARGS__;                                                                                  \
        check_transpose_refused(want, &args);                                                         \
    }

REFUSE_TRANSPOSE(no_source, FST_K_NULL, args.src = NULL)
REFUSE_TRANSPOSE(no_destination, FST_K_NULL, args.dst = NULL)
REFUSE_TRANSPOSE(destination_off_its_element, FST_K_ALIGN, args.dst = (uint8_t *)SOME + 2)
REFUSE_TRANSPOSE(float_to_integer, FST_K_NO_KERNEL, args.dst_dtype = FST_T_I32)
REFUSE_TRANSPOSE(elements_of_less_than_a_byte, FST_K_NO_KERNEL, args.src_dtype = args.dst_dtype = FST_T_F4)
REFUSE_TRANSPOSE(source_stride_shorter_than_a_row, FST_K_STRIDE, args.src_stride = 19)
REFUSE_TRANSPOSE(destination_stride_shorter_than_a_row, FST_K_STRIDE, args.dst_stride = 9)
REFUSE_TRANSPOSE(source_matrices_that_overlap, FST_K_STRIDE, args.src_batch_stride = 199)
REFUSE_TRANSPOSE(destination_matrices_that_overlap, FST_K_STRIDE, args.dst_batch_stride = 199)
REFUSE_TRANSPOSE(a_source_that_overflows, FST_K_SIZE, args.src_stride = 1ull << 62)
REFUSE_TRANSPOSE(a_destination_that_overflows, FST_K_SIZE, args.dst_stride = 1ull << 60)
REFUSE_TRANSPOSE(matrices_that_overflow, FST_K_SIZE, args.batch = 1ull << 62)
REFUSE_TRANSPOSE(nothing_to_do_without_rows, FST_K_OK, args.rows = 0; args.src = NULL)

/* ---- More than 2^32 elements, on a GPU that has the memory ---- */

enum { piece = 64 << 20 };
#define HUGE_BYTES ((1ull << 32) + (4ull << 20))

static void set_byte(test_rig *rig, uint8_t *device, uint8_t value) {
    CHECK_INT(0, rig->gpu.calls->to_device(&rig->gpu, rig->stream, device, &value, 1));
    CHECK_INT(0, rig->gpu.calls->stream_wait(&rig->gpu, rig->stream));
}

static int get_byte(test_rig *rig, const uint8_t *device) {
    uint8_t value;
    CHECK_INT(0, rig->gpu.calls->to_host(&rig->gpu, rig->stream, &value, device, 1));
    CHECK_INT(0, rig->gpu.calls->stream_wait(&rig->gpu, rig->stream));
    return value;
}

static void check_huge(test_rig *rig, uint8_t *src, uint8_t *dst) {
    const fst_kernels *kernels = rig->gpu.kernels;
    const uint64_t side = (1u << 16) + 1, count = side * (side - 1); /* columns of a matrix of side x side */
    memset(rig->host, 0x30, piece);
    for (uint64_t at = 0; at < HUGE_BYTES; at += piece)
        rig_upload(rig, src + at, rig->host, HUGE_BYTES - at < piece ? (size_t)(HUGE_BYTES - at) : piece);

    const fst_cast_args cast = {src, dst, (1ull << 32) + 37, FST_T_F8_E4M3, FST_T_F8_E5M2, 0};
    set_byte(rig, src + (1ull << 32) + 36, 0xB8);
    CHECK_INT(0, kernels->cast(rig->stream, &cast));
    CHECK_INT(0xBC, get_byte(rig, dst + (1ull << 32) + 36));
    CHECK_INT(0x38, get_byte(rig, dst + (1ull << 32) + 35));
    CHECK_INT(0x38, get_byte(rig, dst));

    const fst_rows_args rows = {.src = src,
                                .dst = dst,
                                .cols = side - 1,
                                .ndim = 1,
                                .extent = {side},
                                .src_stride = {side},
                                .dst_stride = {side - 1},
                                .src_dtype = FST_T_U8,
                                .dst_dtype = FST_T_U8};
    set_byte(rig, src + (side - 1) * side + side - 2, 0x77); /* the last row's last */
    CHECK_INT(0, kernels->rows(rig->stream, &rows));
    CHECK_INT(0x77, get_byte(rig, dst + count - 1));
    CHECK_INT(0x30, get_byte(rig, dst + count - 2));

    const fst_transpose_args transpose = {src,  dst, 1, side,     side - 1, side,
                                          side, 0,   0, FST_T_U8, FST_T_U8, 0};
    CHECK_INT(0, kernels->transpose(rig->stream, &transpose));
    CHECK_INT(0x77, get_byte(rig, dst + count - 1));
    CHECK_INT(0x30, get_byte(rig, dst + count - 2));
}

TEST(kernels_huge, more_elements_than_32_bits_count) {
    test_rig rig;
    int found = 0;
    EACH_RIG(&rig, piece) {
        const fst_gpu_calls *calls = rig.gpu.calls;
        void *src = NULL, *dst = NULL;
        if (rig.gpu.host_access) continue;
        found = 1;
        if (calls->alloc_block(&rig.gpu, HUGE_BYTES, &src) == 0 &&
            calls->alloc_block(&rig.gpu, HUGE_BYTES, &dst) == 0)
            check_huge(&rig, src, dst);
        else test_skip(1, "not enough device memory");
        calls->free_block(&rig.gpu, src, HUGE_BYTES);
        calls->free_block(&rig.gpu, dst, HUGE_BYTES);
    }
    if (!found) test_skip(1, "no GPU");
}

/* ---- OCP to FNUZ ---- */

static void check_fnuz(int src, const uint8_t *in, size_t count, uint64_t bad) {
    test_rig rig;
    EACH_RIG(&rig, 16384)
    for (size_t src_skew = 0; src_skew < 16; src_skew += 5)
        for (size_t dst_skew = 0; dst_skew < 16; dst_skew += 3) {
            uint8_t *dst = rig.dst + 64 + RIG_GUARD + dst_skew;
            memset(rig.host, 0, 64);
            memset(rig.host + 64, 0xA5, 8192);
            rig_upload(&rig, rig.dst, rig.host, 8192);
            rig_upload(&rig, rig.src + src_skew, in, count);
            const fst_fnuz_args args = {rig.src + src_skew, dst, count, src, (uint64_t *)(void *)rig.dst};
            CHECK_INT(0, rig.gpu.kernels->fnuz(rig.stream, &args));
            CHECK_INT(0, rig.gpu.kernels->fnuz(rig.stream, &args));
            rig_download(&rig, 8192);
            uint64_t counted;
            memcpy(&counted, rig.host, 8);
            CHECK_INT(2 * bad, counted);
            for (size_t i = 64; i < 8192; i++) {
                const size_t at = i - 64 - RIG_GUARD - dst_skew; /* wraps below the result */
                CHECK_INT(at >= count ? 0xA5 : in[at] == 0x80 ? 0 : in[at], rig.host[i]);
            }
        }
}

TEST(kernels_fnuz, every_code_of_E4M3) {
    uint8_t all[1280];
    for (size_t i = 0; i < sizeof all; i++) all[i] = (uint8_t)(i * 41);
    check_fnuz(FST_T_F8_E4M3, all, sizeof all, 2 * 5);
}

TEST(kernels_fnuz, every_code_of_E5M2_Inf_is_no_number_either) {
    uint8_t all[1280];
    for (size_t i = 0; i < sizeof all; i++) all[i] = (uint8_t)(i * 41);
    check_fnuz(FST_T_F8_E5M2, all, sizeof all, 8 * 5);
}

TEST(kernels_fnuz, counts_of_all_sizes) {
    uint8_t codes[70];
    memset(codes, 0xFF, sizeof codes);
    for (size_t count = 0; count < sizeof codes; count++) check_fnuz(FST_T_F8_E4M3, codes, count, count);
}

/* The vectors of the format's description: 0.001 x E4M3 is 0.002 x FNUZ, bit for bit. */
TEST(kernels_fnuz, values_are_half_of_what_they_were) {
    static const uint8_t codes[] = {0x38, 0x7E, 0xA3, 0x01};
    static const uint32_t want[] = {0x3A83126F, 0x3EE56042, 0xB9343959, 0x3603126F};
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        uint32_t values[4];
        rig_upload(&rig, rig.src, codes, 4);
        memset(rig.host, 0, 8);
        rig_upload(&rig, rig.src + 64, rig.host, 8);
        const fst_fnuz_args args = {rig.src, rig.src + 16, 4, FST_T_F8_E4M3,
                                    (uint64_t *)(void *)(rig.src + 64)};
        CHECK_INT(0, rig.gpu.kernels->fnuz(rig.stream, &args));
        const fst_cast_args cast = {rig.src + 16, rig.dst, 4, FST_T_F8_E4M3FNUZ, FST_T_F32, 0};
        CHECK_INT(0, rig.gpu.kernels->cast(rig.stream, &cast));
        rig_download(&rig, sizeof values);
        memcpy(values, rig.host, sizeof values);
        for (int i = 0; i < 4; i++) {
            const float product = fst_float_of_bits32(values[i]) * fst_float_of_bits32(0x3B03126F);
            CHECK_INT(want[i], fst_bits_of_float32(product));
        }
    }
}

static void check_fnuz_refused(int want, fst_fnuz_args args) {
    test_rig rig;
    EACH_RIG(&rig, 4096) {
        fst_fnuz_args a = args;
        memset(rig.host, 0xA5, 4096);
        rig_upload(&rig, rig.dst, rig.host, 4096);
        if (a.src) a.src = rig.src;
        if (a.dst) a.dst = rig.dst + 1024;
        if (a.nans) a.nans = (uint64_t *)(void *)(rig.dst + ((uintptr_t)a.nans - 1));
        CHECK_INT(want, rig.gpu.kernels->fnuz(rig.stream, &a));
        rig_download(&rig, 4096);
        for (size_t i = 0; i < 4096; i++) CHECK_INT(0xA5, rig.host[i]);
    }
}

#define REFUSE_FNUZ(name, want, ...)                                 \
    TEST(kernels_fnuz_refuse, name) {                                \
        fst_fnuz_args args = {SOME, SOME, 100, FST_T_F8_E4M3, SOME}; \
        __VA_ARGS__;                                                 \
        check_fnuz_refused(want, args);                              \
    }

REFUSE_FNUZ(no_source, FST_K_NULL, args.src = NULL)
REFUSE_FNUZ(no_destination, FST_K_NULL, args.dst = NULL)
REFUSE_FNUZ(no_counter, FST_K_NULL, args.nans = NULL)
REFUSE_FNUZ(a_counter_off_8_bytes, FST_K_ALIGN, args.nans = (uint64_t *)5)
REFUSE_FNUZ(what_is_FNUZ_already, FST_K_NO_KERNEL, args.src_dtype = FST_T_F8_E4M3FNUZ)
REFUSE_FNUZ(no_fp8, FST_K_NO_KERNEL, args.src_dtype = FST_T_U8)
REFUSE_FNUZ(end_beyond_the_address_space, FST_K_SIZE, args.count = UINT64_MAX - 64)
REFUSE_FNUZ(nothing_to_do, FST_K_OK, args.count = 0; args.nans = NULL)
