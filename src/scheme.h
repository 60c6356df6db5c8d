/* Which tensors are quantized weights, how, and what belongs to them: from config.json and its like, and from names,
 * dtypes and shapes. docs/quantized.md lists the formats. No I/O: texts in, tables out. */
#ifndef FST_SCHEME_H
#define FST_SCHEME_H

#include "fst.h"

/* A format, its name in inspect, what it is. */
#define FST_FORMAT_LIST(X)                                                            \
    X(FP8_TENSOR, "fp8-tensor", "8-bit floats, one scale")                             \
    X(FP8_ROW, "fp8-row", "8-bit floats, a scale a row")                               \
    X(FP8_COLUMN, "fp8-column", "8-bit floats, a scale a column")                      \
    X(FP8_GROUP, "fp8-group", "8-bit floats, a scale for each group of a row")         \
    X(FP8_BLOCK, "fp8-block", "8-bit floats, a scale a block of rows x columns")       \
    X(INT8, "int8", "8-bit integers, scales, perhaps zero points")                     \
    X(MXFP8, "mxfp8", "E4M3, an E8M0 scale for 32 elements")                           \
    X(MXFP4, "mxfp4", "E2M1 in pairs, an E8M0 scale for 32 elements")                  \
    X(NVFP4, "nvfp4", "E2M1 in pairs, an E4M3 scale for 16 elements, one for all")     \
    X(PACKED, "int-packed", "integers of 1 to 8 bits, packed along a row")             \
    X(GPTQ, "gptq", "integers of 2, 3, 4 or 8 bits, packed along a column, transposed") \
    X(AWQ, "awq", "4-bit integers in AWQ's order, packed along a row, transposed")     \
    X(AWQ_GEMV, "awq-gemv", "4-bit integers, packed along a row")                      \
    X(INT4_ROWS, "int4-rows", "4-bit integers, two rows in a byte (ModelOpt)")         \
    X(INT4_QUARK, "int4-quark", "4-bit integers, packed along a row, transposed (Quark)") \
    X(BNB_NF4, "bnb-nf4", "4-bit codes of a table, a scale for a run of elements")     \
    X(BNB_FP4, "bnb-fp4", "the same with another table")                               \
    X(BNB_INT8, "bnb-int8", "8-bit integers, a scale a row, over 127")

typedef enum fst_format {
    FST_FORMAT_NONE,
#define X(name, ...) FST_FORMAT_##name,
    FST_FORMAT_LIST(X)
#undef X
    FST_FORMAT_COUNT
} fst_format;

/* "fp8-block"; "" for FST_FORMAT_NONE. */
const char *fst_format_name(fst_format format);

struct fst_quantized;
/* Whether its codes are integers in words, or two rows to a byte: of the kernels `packed`. */
int fst_scheme_is_packed(const struct fst_quantized *weight);

/* A name made of another one: its first `length` bytes, then `suffix`. */
typedef struct fst_scheme_name {
    size_t      length;
    const char *suffix;
} fst_scheme_name;

/* By names alone, for those who ask before the scheme is found. The k-th name that codes may have to which a tensor called
 * `name` belongs, if there are such; *takes_any: codes of any dtype. 0: there is no k-th. */
int fst_scheme_owner_name(const char *name, size_t length, size_t k, fst_scheme_name *out, int *takes_any);
int fst_scheme_may_be_codes(fst_dtype dtype);
/* What the weight is called whose codes are called `name`; 0: the same. */
int fst_scheme_weight_name(const char *name, size_t length, fst_scheme_name *out);

/* What a companion is for. */
typedef enum fst_companion {
    FST_COMPANION_SCALE,
    FST_COMPANION_GLOBAL,     /* a scale of scales, one for the tensor (NVFP4) */
    FST_COMPANION_ZERO,
    FST_COMPANION_GROUPS,     /* g_idx: the group of each column */
    FST_COMPANION_SHAPE,
    FST_COMPANION_MAP,        /* the values of codes */
    FST_COMPANION_NESTED,     /* scales of the scales, and the values of their codes */
    FST_COMPANION_NESTED_MAP,
    FST_COMPANION_STATE,      /* JSON */
    FST_COMPANIONS
} fst_companion;

enum {
    FST_Q_DIVIDE = 1u << 0,         /* by the scale (fp8), or by the global one (NVFP4) */
    FST_Q_ZERO_PLUS_ONE = 1u << 1,  /* zero points are stored less one (GPTQ v1) */
    FST_Q_CARRY = 1u << 2,          /* and one is added to whole words (GPTQModel) */
    FST_Q_OFFSET = 1u << 3,         /* codes are stored plus 2^(bits - 1) */
    FST_Q_SIGNED = 1u << 4,         /* codes are two's complement */
    FST_Q_AWQ_ORDER = 1u << 5,      /* of the codes in a word */
    FST_Q_BYTE_ZEROS = 1u << 6,     /* zero points are bytes, one for each scale */
    FST_Q_PADDED = 1u << 7,         /* no code lies in two words (companions.c finds out) */
    FST_Q_PLAIN_GROUPS = 1u << 8    /* g_idx says what is so without it, or that it counts for nothing (likewise) */
};

#define FST_NO_TENSOR UINT32_MAX

typedef struct fst_quantized {
    fst_format format;
    uint32_t   codes;                      /* the tensor that holds them: index in the model */
    uint32_t   companions[FST_COMPANIONS]; /* likewise; FST_NO_TENSOR: none */
    size_t     companions_count, list[FST_COMPANIONS]; /* those there are */
    char      *name;                       /* of the weight, as the unquantized model would have it */
    uint32_t   ndim;                       /* of the weight: 2, or more with stacked matrices */
    uint64_t   shape[8];
    uint64_t   stack, rows, cols;          /* so many matrices of rows x cols */
    uint64_t   block_rows, block_cols;     /* elements under one scale; rows 0: all of them */
    unsigned   bits, flags;
    int        has_state;                  /* the rest is in a small companion, to be read before planning (state.h) */
    uint64_t   nested_block;               /* bitsandbytes: scales under one scale of theirs, */
    float      nested_offset;              /* and what is added to them */
} fst_quantized;

/* What becomes of a tensor of the model. */
typedef enum fst_role {
    FST_ROLE_PLAIN,     /* cast like others */
    FST_ROLE_CODES,     /* of a quantized weight */
    FST_ROLE_COMPANION, /* goes into a weight */
    FST_ROLE_KEPT       /* an activation's or the KV cache's scale: as stored */
} fst_role;

typedef struct fst_scheme {
    char           method[48];  /* what the configuration calls it; "" when there is none */
    size_t         count;
    fst_quantized *weights;
    uint8_t       *roles;       /* fst_role of each tensor */
    uint32_t      *owner;       /* of codes and companions: the weight; FST_NO_TENSOR of others */
    uint64_t       bare;        /* 8-bit float weights without a scale: taken as they are */
} fst_scheme;

/* The texts of config.json, hf_quant_config.json and quantize_config.json; NULL: there is none. They need not end in
 * NUL. */
typedef struct fst_config_text {
    const char *path; /* for errors */
    const char *text;
    size_t      length;
} fst_config_text;
enum { FST_CONFIG, FST_CONFIG_MODELOPT, FST_CONFIG_GPTQ, FST_CONFIGS };

/* FST_E_QUANTIZED: what is there does not fit together; FST_E_UNSUPPORTED: it is known, but not dequantized here;
 * FST_E_JSON: a configuration is none; FST_E_MEMORY. On failure *out is zero. */
fst_status fst_scheme_find(const fst_model *model, const fst_config_text configs[FST_CONFIGS], fst_scheme *out,
                           fst_error *error);
void       fst_scheme_free(fst_scheme *scheme);

#endif
