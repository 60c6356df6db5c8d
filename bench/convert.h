/* bench_convert's parts: the list of cases, their data and reference, running them, reports. */
#ifndef FST_BENCH_CONVERT_H
#define FST_BENCH_CONVERT_H

#include <stdint.h>
#include <stdio.h>

#include "gpu.h"

typedef enum convert_kernel {
    CONVERT_CAST,
    CONVERT_SCALE_TENSOR,
    CONVERT_SCALE_ROW,
    CONVERT_SCALE_GROUP,
    CONVERT_SCALE_BLOCK,
    CONVERT_QUANTIZE_TENSOR,
    CONVERT_QUANTIZE_ROW,
    CONVERT_QUANTIZE_BLOCK,
    CONVERT_REALIGN,
    CONVERT_SLICE,
    CONVERT_PACK,
    CONVERT_TRANSPOSE,
    CONVERT_DEINTERLEAVE,
    CONVERT_BATCH,
    CONVERT_BNB_NF4,    /* scales for runs of `group`, a table in the place of the counter */
    CONVERT_BNB_INT8,
    CONVERT_INT8_ZEROS, /* a scale and a zero point a row */
    CONVERT_FP8_BLOCK,  /* as scale_block, in a model's shape */
    CONVERT_FP8_COLUMN,
    CONVERT_MXFP4,      /* as scale_group */
    CONVERT_NVFP4,      /* F8_E4M3 scales under one of F32, in the place of the counter */
    CONVERT_GPTQ,       /* this one and those behind it: packed integers */
    CONVERT_AWQ,
    CONVERT_PACKED,     /* compressed-tensors' */
    CONVERT_INT4_ROWS,
    CONVERT_INT4_QUARK,
    CONVERT_KERNELS
} convert_kernel;

enum {
    CONVERT_ROOM = 512,
    CONVERT_BLOCK = 128,
    CONVERT_GUARD = 256,
    CONVERT_POISON = 0xA5,
    CONVERT_MAX_PARTS = 64
};

typedef struct convert_spec {
    convert_kernel kernel;
    int      src, dst, scale; /* dtypes */
    uint64_t row;             /* elements: of a row, of a batch's tensor; 0 where there are no rows */
    uint64_t wide;            /* elements from a row to the next on the wider side (slice, pack) */
    uint64_t group;           /* elements under one scale of a row (scale_group) */
    unsigned misaligned;      /* bytes that the source begins after a 256-byte boundary */
    unsigned flags;
    int      keep_bits;       /* fp8 to FNUZ by bits: fst_fnuz_args */
    unsigned bits;            /* of a code that is packed into words of `src`, otherwise 0 */
    int      zeros, padded;   /* packed zero points; no code in two words */
    int      act_order;       /* g_idx says which group a column is of */
    int      nested;          /* bnb_nf4: scales are codes themselves */
    char     variant[48];     /* what sets it apart from cases of the same kernel and types, or "" */
} convert_spec;

/* A spec in one size. The result is rows x cols, dst_stride elements from a row to the next. */
typedef struct convert_case {
    convert_spec spec;
    uint64_t bytes; /* of traffic, as asked for */
    uint64_t rows, cols, src_stride, dst_stride;
    uint64_t src_size, dst_size; /* bytes that the buffers span, gaps between rows included */
    uint64_t scales, jobs;       /* counts */
    uint64_t second_at, third_at, companions; /* bytes: behind the scales zero points, or nested scales; behind these
                                               * g_idx, or the map of nested ones; all of them */
    uint64_t bytes_read, bytes_written; /* the least that the kernel must move */
} convert_case;

/* Where one set of buffers is on the device. */
typedef struct convert_set {
    unsigned char *src, *dst;
    unsigned char *scales; /* read by scale_* and dequant_*, written by quantize_*; what is behind them too */
    uint64_t      *nans;
    fst_batch_job *jobs;   /* in device memory */
} convert_set;

typedef struct convert_result {
    convert_case what;
    double   ms, copy_ms; /* medians; 0 when not timed */
    unsigned launches;    /* between two events */
    int      ok;
} convert_result;

/* ---- convert_list.c ---- */

const char *convert_kernel_name(convert_kernel kernel);
size_t convert_list(convert_spec specs[CONVERT_ROOM]);
/* "slice BF16->F16 rows of 512 B" */
void convert_name(const convert_spec *spec, char *text, size_t size);
convert_case convert_size(const convert_spec *spec, uint64_t bytes);
uint64_t convert_source_index(const convert_case *c, uint64_t row, uint64_t col);
int convert_is_scale(convert_kernel kernel);
int convert_is_quantize(convert_kernel kernel);
int convert_is_packed(convert_kernel kernel);

/* ---- convert_packed.c: packed integers, by their formats' definitions ---- */

uint64_t convert_packed_unit(const convert_case *c);       /* bytes that a part may begin at a multiple of */
uint64_t convert_packed_size(const convert_case *c);       /* bytes of the codes */
uint64_t convert_packed_zeros_size(const convert_case *c); /* of zero points */
uint32_t convert_zero_word(uint64_t index);
uint32_t convert_group(const convert_case *c, uint64_t col);
/* Code less zero point of an element, and the index of its scale. `word(of, i)` is word (int4_rows: byte) i of the codes. */
typedef uint32_t convert_word(const void *of, uint64_t index);
int32_t convert_packed_code(const convert_case *c, uint64_t row, uint64_t col, convert_word *word, const void *of);
uint64_t convert_packed_scale(const convert_case *c, uint64_t row, uint64_t col);

/* ---- convert_reference.c: the data, and what must come out ---- */

/* What sources hold: a block of bytes, repeated. Its length is 8 times a prime, so that no stride meets the
 * same bytes again. Random bits; for quantize numbers with few NaN and Inf (without any where one scale is
 * for all). */
typedef struct convert_data convert_data;
convert_data *convert_data_new(const convert_spec *spec);
void convert_data_free(convert_data *data);
int  convert_data_fits(const convert_data *data, const convert_spec *spec);
const unsigned char *convert_data_bytes(const convert_data *data, size_t *size);

uint32_t convert_scale(int dtype, uint64_t index); /* the code of a scale that is given */
extern const uint32_t convert_nf4[16];             /* bitsandbytes' table, F32 bits */
enum { CONVERT_NESTED = 256 };                     /* scales under one nested one */
extern const float convert_offset;                 /* of nested scales */
extern const uint32_t convert_global;              /* nvfp4's global scale, F32 bits */
/* The scales and what is behind them. */
void convert_companions(const convert_case *c, unsigned char *bytes);

typedef struct convert_reference convert_reference;
convert_reference *convert_reference_new(const convert_case *c, const convert_data *data);
void convert_reference_free(convert_reference *r);
/* Elements [first, first + count) of the destination of set 0, poison between rows. */
void convert_expect(convert_reference *r, uint64_t first, uint64_t count, unsigned char *out);
/* For quantize: scale `index`. For quantize and bits kept: what the counter of NaNs must say. */
uint32_t convert_expect_scale(convert_reference *r, uint64_t index);
uint64_t convert_expect_nans(const convert_reference *r);

/* ---- convert_run.c ---- */

/* Launches part `part` of `parts` (on the CPU, one a thread). 0, an FST_K_*, or the device's error. */
int convert_launch(const fst_gpu *gpu, fst_queue stream, const convert_case *c, const convert_set *set,
                   unsigned part, unsigned parts);
/* The job list of a batch in `parts` parts, as the kernel reads it. */
void convert_jobs(const convert_case *c, const convert_set *set, unsigned parts, fst_batch_job *jobs);

typedef struct convert_timer {
    const fst_gpu *gpu;
    fst_queue stream;
    unsigned   runs, threads;
} convert_timer;

/* Times the kernel against a copy of as many bytes in the same buffers. 0 or an error code. */
int convert_time(const convert_timer *t, const convert_case *c, const convert_set *sets, unsigned count,
                 convert_result *result);
/* The kernel alone, once, on one set. */
int convert_once(const convert_timer *t, const convert_case *c, const convert_set *set);

/* ---- convert_report.c ---- */

void convert_print_head(void);
void convert_print(const convert_result *r);
double convert_gb_per_s(const convert_result *r);
double convert_copy_gb_per_s(const convert_result *results, size_t count);
void convert_json(const char *path, const fst_gpu *gpu, unsigned threads, const convert_result *results,
                  size_t count);
void convert_plot(const char *path, const fst_gpu *gpu, const convert_result *results, size_t count);

/* ---- convert.c ---- */

/* The whole program. 0; 1: a result is wrong or something failed; 2: bad arguments. */
int convert_main(int argc, char **argv);

#endif
