/* fst: .safetensors checkpoints into device memory, converted on the way.
 *
 * Three rungs: one call (fst_load_cast), a call with options (fst_load), tensor by tensor as they become complete
 * (fst_stream_open). fst_open reads headers alone.
 *
 *     const char *files[] = {"model.safetensors", NULL};
 *     fst_model *model = fst_load_cast(files, FST_BF16);
 *     if (!model) { fprintf(stderr, "%s: %s\n", fst_last_error()->path, fst_last_error()->text); return 1; }
 *     fst_tensor tensor;
 *     fst_model_find(model, "lm_head.weight", &tensor);     // tensor.data is device memory
 *     fst_model_free(model);
 *
 * Conventions, unless a function says otherwise:
 *  - Sizes and offsets are bytes; shapes count elements; times are seconds.
 *  - Functions may be called from any thread. A model may be read from several threads at once;
 *    fst_model_free needs that nobody else uses the model any more.
 *  - Strings are UTF-8, end in a NUL, and belong to the model they were got from.
 *  - A failed call leaves its outputs NULL or zero and holds no memory, descriptor or thread but those
 *    that wait for the next load (fst_release_cached).
 *  - A process that forks may load in the child, as long as no other thread was in a call of the library at the fork; a
 *    stream belongs to the process that opened it (closing it in a child does nothing).
 *  - The library prints nothing, aborts never, installs no signal handler, reads no environment
 *    variable, and leaves the caller's current device and thread affinity as they were.
 */
#ifndef FST_H
#define FST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FST_API __attribute__((visibility("default")))
#else
#define FST_API
#endif

/* ---- Version --------------------------------------------------------------------------------- */

#define FST_VERSION_MAJOR 0
#define FST_VERSION_MINOR 1
#define FST_VERSION_PATCH 0

/* The version of the library that runs, "MAJOR.MINOR.PATCH"; static storage. */
FST_API const char *fst_version(void);

/* ---- Types of elements ----------------------------------------------------------------------- */

/* The names are those in files (safetensors 0.8). FST_NATIVE, as a target, means "as stored". */
typedef enum fst_dtype {
    FST_NATIVE = 0,
    FST_BOOL,        /* one byte, 0 or 1 */
    FST_F4,          /* E2M1, two elements a byte, the even one in the low half */
    FST_F6_E2M3,     /* four elements in three bytes */
    FST_F6_E3M2,     /* likewise */
    FST_U8,
    FST_I8,
    FST_F8_E5M2,     /* OCP */
    FST_F8_E4M3,     /* OCP, "E4M3FN": no infinity, NaN 7F and FF */
    FST_F8_E8M0,     /* an exponent alone: 2^(code - 127), FF is NaN */
    FST_F8_E4M3FNUZ, /* bias 8, NaN 80, no -0 (AMD MI300) */
    FST_F8_E5M2FNUZ, /* bias 16, likewise */
    FST_I16,
    FST_U16,
    FST_F16,
    FST_BF16,
    FST_I32,
    FST_U32,
    FST_F32,
    FST_C64,         /* two F32 */
    FST_F64,
    FST_I64,
    FST_U64,
    FST_DTYPE_COUNT  /* one more than the last */
} fst_dtype;

/* The name as in files ("BF16"; "NATIVE" for FST_NATIVE), or NULL for a value outside the list. */
FST_API const char *fst_dtype_name(fst_dtype dtype);

/* Bits an element takes: 4, 6, 8, 16, 32, 64; 0 for FST_NATIVE and values outside the list. */
FST_API unsigned fst_dtype_bits(fst_dtype dtype);

/* The dtype of that name, in any case ("bf16"); FST_NATIVE when there is none of that name. */
FST_API fst_dtype fst_dtype_from_name(const char *name);

/* 1 when a load can convert elements of `from` to `to`, or keep them (to == FST_NATIVE, or
 * to == from); else 0. Integers, BOOL and C64 are kept by every load, so for them it says 0. */
FST_API int fst_dtype_can_cast(fst_dtype from, fst_dtype to);

/* ---- Errors ---------------------------------------------------------------------------------- */

typedef enum fst_status {
    FST_OK = 0,
    FST_E_ARG,           /* an argument is wrong: nothing was touched */
    FST_E_MEMORY,        /* host memory ran out */
    FST_E_IO,            /* a system call on a file failed; `code` is its errno */
    FST_E_FILE_TYPE,     /* a path is not a regular file where one is needed */
    FST_E_TRUNCATED,     /* the file ends before its header does, or is under 8 bytes */
    FST_E_HEADER_SIZE,   /* the header's length is over 100,000,000 */
    FST_E_UTF8,          /* the header is not UTF-8 */
    FST_E_JSON,          /* the header is not JSON, or nested too deep */
    FST_E_HEADER,        /* JSON, but not what a header may hold: a field missing, repeated, mistyped */
    FST_E_DTYPE,         /* a dtype that safetensors does not know */
    FST_E_SHAPE,         /* more than 64 dimensions, or a product beyond 2^64 - 1 */
    FST_E_SIZE,          /* shape x dtype and the offsets disagree, or bits do not fill bytes */
    FST_E_OFFSETS,       /* a hole, an overlap, an end before its begin, bytes left over or lacking */
    FST_E_NAME,          /* a tensor's name is not allowed */
    FST_E_DUPLICATE,     /* the same tensor name twice, in one file or in two */
    FST_E_INDEX,         /* an index file (*.safetensors.index.json) is wrong, or disagrees with its files */
    FST_E_CHANGED,       /* a file changed between the opening and the end of the load */
    FST_E_NOT_FOUND,     /* no tensor of that name, no such key */
    FST_E_NO_CAST,       /* no kernel converts this dtype to the target */
    FST_E_NO_DEVICE,     /* the device asked for is not there, or does not work */
    FST_E_DEVICE,        /* a device call failed; `code` is the HIP or CUDA error */
    FST_E_DEVICE_MEMORY, /* device memory ran out */
    FST_E_CANCELLED,     /* the progress callback or the cancel flag said so */
    FST_E_CONFLICT,      /* two files give one metadata key different values */
    FST_E_NO_DATA,       /* the model was opened, not loaded: its tensors have no data */
    FST_E_DLPACK,        /* DLPack cannot express this tensor */
    FST_E_AGAIN,         /* a stream has nothing to give before tensors are released: not the end of it */
    FST_E_QUANTIZED,     /* a quantized weight and what should belong to it do not fit together */
    FST_E_UNSUPPORTED,   /* a format that is known, but not dequantized here; FST_NATIVE loads it as stored */
    FST_E_PEER,          /* another rank did not come, or went away */
    FST_STATUS_COUNT
} fst_status;

/* "FST_E_JSON"; "FST_E_UNKNOWN" for a value outside the list. */
FST_API const char *fst_status_name(fst_status status);

/* What went wrong. Plain data that the caller owns: copy it, keep it, throw it away. */
typedef struct fst_error {
    fst_status status;
    int        code;       /* errno, or the HIP or CUDA error, or (FST_E_PEER) another rank's fst_status; 0 when there
                              is none */
    int        file;       /* index into the files of the load; -1 when it is about no file */
    int64_t    offset;     /* byte in that file, from its start; -1 when it is about no byte */
    char       path[256];  /* the file's path, its tail when longer; "" when it is about no file */
    char       text[512];  /* one line, control characters escaped: what is wrong and where in `path` */
} fst_error;

/* The last error of a call in this thread; status FST_OK when none failed yet. Never NULL.
 * Stays valid, and unchanged, until this thread's next failing call. */
FST_API const fst_error *fst_last_error(void);

/* ---- Options --------------------------------------------------------------------------------- */

enum {
    FST_DEVICE_AUTO = 0, /* the first GPU that works, otherwise the CPU */
    FST_DEVICE_CPU  = 1
};
#define FST_DEVICE_GPU(n) (2 + (n)) /* the n-th GPU as HIP or CUDA counts them, from 0 */

enum {
    FST_NON_SATURATING = 1u << 0, /* out of range becomes Inf, or NaN where there is no Inf */
    FST_AS_READY       = 1u << 1, /* streams: as tensors become complete, not in the order of the files */
    FST_STRICT_SHARDS  = 1u << 2, /* a rule of `shards` that matches no tensor is FST_E_NOT_FOUND, those of fst_shard_rules
                                     aside */
    FST_ABORT_COMM     = 1u << 3  /* `comm` may be aborted when a rank does not come */
};

/* How files are read. */
typedef enum fst_reader_kind {
    FST_READER_AUTO = 0,
    FST_READER_THREADS,  /* pread in threads; with O_DIRECT where `cache` asks for it */
    FST_READER_DIRECT,   /* the same, with O_DIRECT for what is not cached */
    FST_READER_URING     /* io_uring for what is not cached, where the system has it */
} fst_reader_kind;

/* Whether what is read from storage shall stay in the page cache. */
typedef enum fst_cache {
    FST_CACHE_AUTO = 0, /* when it fits in half of the memory that is available */
    FST_CACHE_KEEP,
    FST_CACHE_AVOID     /* O_DIRECT, where the file system lets us; what is cached is copied nevertheless */
} fst_cache;

/* Scales that a load computes for weights that become F8_E4M3, F8_E5M2 or F8_E4M3FNUZ (docs/quantized.md): 2-D
 * weights and stacked experts become codes and a tensor of F32 scales more, that multiply. Tensors of one dimension,
 * embeddings, output heads and routers stay as stored, unless a rule says otherwise. */
typedef enum fst_scale {
    FST_QUANTIZE_NONE = 0, /* none: a plain cast */
    FST_QUANTIZE_TENSOR,   /* one a matrix: X.weight_scale, [] */
    FST_QUANTIZE_ROW,      /* one a row: X.weight_scale, [rows, 1] */
    FST_QUANTIZE_BLOCK     /* one for 128 x 128: X.weight_scale_inv, [rows / 128, columns / 128], rounded up */
} fst_scale;

/* Which tensors are cut among ranks, and along what; which are left out. A quantized weight is known by the name of its codes
 * in the file and by the one that it has dequantized; its companions (scales and so on) are where it is. FST_E_ARG: two rules
 * for the same glob that contradict one another. */
enum {
    FST_REPLICATE = -1, /* every rank has all of it */
    FST_SKIP      = -2, /* it is not loaded */
    FST_ONLY      = -3  /* where there are such rules, what none of them matches is not loaded */
};
typedef struct fst_shard_rule {
    const char *glob; /* of names, * any characters (dots too), ? one; NULL ends a list */
    int32_t     dim;  /* of the tensor that the load makes: 0 is the first one; or one of the above */
    uint32_t    unit; /* parts begin at multiples of so many; 0 is 1 */
} fst_shard_rule;

/* What is asked of the files for parts that are not contiguous in them. */
typedef enum fst_read_mode {
    FST_READ_AUTO = 0, /* whole rows where that is sooner: at most twice the bytes that are needed */
    FST_READ_EXACT     /* the bytes that are needed */
} fst_read_mode;

/* A communicator of the caller's over which ranks share the reading of files (docs/peers.md): each reads a part and
 * gets the others' parts from them. All ranks of it call with the same files and options, but for `rank`, and use it
 * for nothing else until the call returns; it stays the caller's.
 * When a rank fails, the others return FST_E_PEER with its fst_status as `code`, and the communicator can be used again.
 * When one does not come within `timeout_ms`, they return FST_E_PEER with a `code` of 0, and the communicator is out of
 * step: no other call may use it. With FST_ABORT_COMM, NCCL's has then been aborted, which has freed it. */
typedef enum fst_comm_kind {
    FST_COMM_NONE = 0,
    FST_COMM_NCCL, /* `comm` is a ncclComm_t, NCCL's or RCCL's, of the GPU that is loaded onto */
    FST_COMM_MPI   /* `comm` points to an MPI_Comm; for the CPU device. MPI was initialised with MPI_THREAD_FUNNELED or
                      more, and is called in the thread that called, alone */
} fst_comm_kind;

typedef struct fst_progress {
    uint64_t bytes_done;  /* bytes of the files that are in place, converted */
    uint64_t bytes_total;
    double   seconds;     /* since the call */
    double   bytes_per_second;
} fst_progress;

/* Called in the thread that called fst_load (fst_stream_next), some twenty times a second and once at the end.
 * A return other than 0 cancels the load (FST_E_CANCELLED). It must not call into that load. */
typedef int (*fst_progress_fn)(void *arg, const fst_progress *progress);

/* Where results go, in place of memory of the library's own. `allocate` is called from the thread that called or, with
 * streams, from the library's, never twice at a time; `release` from any thread, also beside `allocate`. `device` is the number of the GPU, -1 the CPU. */
typedef struct fst_allocator {
    /* Device memory of `nbytes`, at a multiple of 256 bytes, usable on every stream; NULL: there is none. */
    void *(*allocate)(void *arg, uint64_t nbytes, int device);
    /* Takes it back, with the last tensor in it, from any thread. */
    void  (*release)(void *arg, void *memory, uint64_t nbytes, int device);
    void   *arg;
} fst_allocator;

typedef struct fst_tensor fst_tensor;

/* What is wanted of one tensor: filled in with the load's defaults, to be changed by an fst_rule_fn. */
typedef struct fst_rule {
    int       skip;         /* non-zero: the tensor is not loaded */
    fst_dtype cast;         /* as in the options; of no effect where tensors are kept anyway */
    void     *memory;       /* where the result goes: device memory of the caller's, at a multiple of its element's
                               size, that outlives the model and all DLPack tensors of it, and that no work
                               queued on any stream still uses; NULL: to the others */
    uint64_t  memory_bytes; /* how much is there: at least the result's size */
    fst_scale scale;        /* as in the options; where those leave a tensor as stored, it comes with FST_NATIVE and
                               FST_QUANTIZE_NONE. Of no effect with a `cast` that takes no scales */
    uint32_t  layout;       /* FST_TRANSPOSE, FST_DEINTERLEAVE */
    int32_t   shard_dim;    /* along which the tensor is cut: as in fst_shard_rule, which it begins with; or FST_REPLICATE */
    int32_t   into_dim;     /* of `into`: the dimension that parts follow one another in; -1: they are stacked in a new first one */
    uint64_t  shard_begin, shard_end; /* the part of shard_dim; both 0: that of options.rank. An empty one is n to n, n > 0 */
    const char *into;       /* the result that this tensor becomes a part of, copied; NULL: none, it is one of its own */
    uint64_t  into_place;   /* parts come in the order of this, those with the same one in that of tensors */
    uint64_t  reserved[2];
} fst_rule;

enum {
    FST_TRANSPOSE    = 1u << 0, /* the last two dimensions change places */
    FST_DEINTERLEAVE = 1u << 1  /* of the last dimension but one (a vector's only one) all even ones come first, then the odd
                                   ones: gate and up projections that alternate (gpt-oss) */
};

/* Called once for each tensor, in order, before any data is read; also for what `shards` leaves out (rule.skip is set). A return
 * other than 0 ends the load (FST_E_CANCELLED). `tensor` is as after fst_open. Companions of a quantized weight that is
 * skipped are skipped with it, and cut with it: their own shard_dim, layout and into count for nothing. */
typedef int (*fst_rule_fn)(void *arg, const fst_tensor *tensor, fst_rule *rule);

typedef struct fst_context fst_context;

/* Everything is optional: zero is the default, `size` alone must be set (FST_OPTIONS_INIT).
 * Grows only at its end. */
typedef struct fst_options {
    size_t          size;         /* sizeof(fst_options) */
    fst_dtype       cast;         /* target of the float tensors; FST_NATIVE keeps what is stored */
    int             device;       /* FST_DEVICE_AUTO, _CPU, _GPU(n) */
    unsigned        flags;        /* FST_NON_SATURATING, FST_AS_READY */
    unsigned        threads;      /* reader threads, more than 64 count as 64; 0: as many as suit the
                                     device, at most the CPUs */
    size_t          slot_bytes;   /* bytes of one bounce slot, 64 KiB to 64 MiB; 0: as suits the device */
    fst_progress_fn progress;
    void           *progress_arg;
    const volatile int *cancel;   /* when not NULL: set *cancel to non-zero (atomically) from any thread or signal
                                     handler, and the load ends with FST_E_CANCELLED */
    fst_reader_kind reader;
    fst_cache       cache;
    fst_context    *context;      /* whose threads and buffers are used; NULL: the process's own */
    const fst_allocator *allocator; /* copied; NULL: memory of the library's own */
    fst_rule_fn     rule;         /* NULL: every tensor as the options say */
    void           *rule_arg;
    void           *stream;       /* fst_stream_next: a hipStream_t or cudaStream_t on which the data is ready for work
                                     queued from then on, and that lives until
                                     fst_stream_close; NULL: ready for everybody */
    const char     *config;       /* the model's config.json, which tells how it is quantized; NULL: the one
                                     beside the first file, if there is one (hf_quant_config.json and
                                     quantize_config.json likewise); "": none, names decide */
    uint64_t        memory_bytes; /* streams: most device memory for results at one time; 0: 1 GiB, or the
                                     largest tensor's size when that is more */
    fst_scale       scale;        /* scales that are computed, with a `cast` to F8_E4M3, F8_E5M2, F8_E4M3FNUZ */
    unsigned        rank, ranks;  /* this is part `rank` of `ranks`; 0 of 0: of 1 */
    const fst_shard_rule *shards; /* what is cut, and what left out: of rules that match a name with a dim of 0 or more or
                                     FST_REPLICATE the first counts; FST_SKIP and FST_ONLY count in any place. NULL: nothing */
    fst_read_mode   read;
    fst_comm_kind   comm_kind;    /* what `comm` is; FST_COMM_NONE: every rank reads for itself */
    void           *comm;         /* `rank` and `ranks` are its own, or both 0 */
    unsigned        timeout_ms;   /* longest wait for another rank; 0: ten minutes */
} fst_options;

#define FST_OPTIONS_INIT                                                                         \
    {sizeof(fst_options), FST_NATIVE, FST_DEVICE_AUTO, 0, 0, 0, NULL, NULL, NULL, FST_READER_AUTO, \
     FST_CACHE_AUTO, NULL, NULL, NULL, NULL, NULL, NULL, 0, FST_QUANTIZE_NONE, 0, 0, NULL,       \
     FST_READ_AUTO,                                                                                \
     FST_COMM_NONE, NULL, 0}

/* ---- Loading --------------------------------------------------------------------------------- */

typedef struct fst_model fst_model;

/* Rules for the usual decoder models (Llama, Qwen, Mistral, DeepSeek, gpt-oss names) and tensor parallelism: docs/shards.md
 * has the table. Static storage, ends with a NULL glob. */
FST_API const fst_shard_rule *fst_shard_rules(void);

/* The part of `extent` that is `rank`'s of `ranks`: torch.chunk's, in whole units. The last ones may be empty. */
FST_API void fst_shard_range(uint64_t extent, uint64_t unit, unsigned rank, unsigned ranks, uint64_t *begin,
                             uint64_t *end);

/* `files` is a list that ends in NULL. Each entry is a .safetensors file, a directory
 * (model.safetensors.index.json in it, otherwise all its *.safetensors files by name), or an index
 * file (*.index.json). Tensors come in the order of the files, in each by their offset.
 *
 * What a load does to values: float tensors (F64, F32, F16, BF16, the F8 types but a bare F8_E8M0, F6, F4)
 * become `cast`, rounded to nearest, ties to even, saturating unless FST_NON_SATURATING is set;
 * BOOL, integers, C64 and F8_E8M0 are kept, and so are scales of activations and of the KV cache (by
 * their names). NaN becomes one code with the source's sign. A float tensor that no kernel takes to the
 * target is FST_E_NO_CAST before anything is read. A quantized weight (docs/quantized.md) becomes the
 * target through its scales, which are then no tensors of the model; FST_E_UNSUPPORTED, FST_E_QUANTIZED,
 * also before anything is read. FST_NATIVE keeps everything.
 *
 * With `scale`, weights become codes of `cast` and a tensor of F32 scales that follows each (docs/quantized.md); other tensors
 * stay as stored. Without it, weights of OCP codes under scales become FNUZ ones with their bits, and the scales are doubled. */

/* Loads onto the first GPU that works, otherwise the CPU. NULL on failure: see fst_last_error. */
FST_API fst_model *fst_load_cast(const char *const *files, fst_dtype target);

/* The same with options (NULL: all defaults). *out is the model, or NULL. `error` may be NULL; it is
 * fst_last_error's in any case. Returns after everything is in place: no further synchronising. */
FST_API fst_status fst_load(const char *const *files, const fst_options *options, fst_model **out,
                            fst_error *error);

/* Reads and checks the headers alone; touches no device. The tensors have no data, and `cast`, `rule` and `shards` of the
 * options are not applied. */
FST_API fst_status fst_open(const char *const *files, const fst_options *options, fst_model **out,
                            fst_error *error);

/* Frees the model; memory that DLPack tensors still use is freed with the last of them. NULL is
 * allowed. On a GPU the memory goes back in the order of the null stream: work on tensors that was
 * queued on blocking streams is safe, work on non-blocking streams must be finished first. */
FST_API void fst_model_free(fst_model *model);

/* Loads, failed ones too, leave their threads, pinned buffers and staging ring on the device for the
 * next load with the same context. This gives back those of the process's own that no load uses at the moment.
 *
 * On a CUDA device memory of freed models is kept for the next load as well, until nothing is left of any context there.
 * CUDA gives it to whatever else in the process allocates and would get none (cudaMalloc, PyTorch); for other processes it
 * is in use. */
FST_API void fst_release_cached(void);

/* A context of one's own: nobody else's loads use its threads and buffers (two sets of them are kept at most; loads at
 * the same time use one each). NULL when memory ran out. */
FST_API fst_context *fst_context_new(void);
/* Gives back what no load uses at the moment. */
FST_API void fst_context_release(fst_context *context);
/* Frees it; no load may use it any more, models that came through it may live on. NULL is allowed. */
FST_API void fst_context_free(fst_context *context);

/* ---- What a model holds ---------------------------------------------------------------------- */

struct fst_tensor {
    const char    *name;
    fst_dtype      dtype;         /* of `data` */
    fst_dtype      stored_dtype;  /* in the file */
    size_t         ndim;          /* 0 to 64; 0 is one element */
    const uint64_t *shape;        /* ndim extents, the last one fastest (row-major) */
    void          *data;          /* on the model's device, 256-byte aligned; NULL after fst_open */
    uint64_t       nbytes;        /* of `data`; after fst_open, of the tensor in the file */
    int            file;          /* index of the file it came from */
    uint64_t       file_offset;   /* where its bytes start in that file */
    uint64_t       file_nbytes;   /* and how many they are, also of a tensor of which only a part was loaded; 0: scales that
                                     were computed, of the weight there */
    int32_t        shard_dim;     /* along which it was cut; FST_REPLICATE: it is whole */
    uint32_t       unused;
    uint64_t       shard_begin;   /* what part it is: from here on, */
    uint64_t       shard_extent;  /* of so many in all */
    uint64_t       reserved[5];
};

FST_API size_t fst_model_count(const fst_model *model);

/* The i-th tensor; FST_E_ARG when there are not that many. */
FST_API fst_status fst_model_at(const fst_model *model, size_t i, fst_tensor *out);

/* The tensor of that name; FST_E_NOT_FOUND when there is none. */
FST_API fst_status fst_model_find(const fst_model *model, const char *name, fst_tensor *out);

/* Its index, or (size_t)-1. */
FST_API size_t fst_model_index(const fst_model *model, const char *name);

/* The files that the paths of the load came to, in order; NULL past the end. */
FST_API size_t      fst_model_file_count(const fst_model *model);
FST_API const char *fst_model_file_path(const fst_model *model, size_t file);

/* `__metadata__` of one file: pairs of strings in the order of the file. Strings may hold NULs, so
 * they come with their lengths; one more NUL follows. Returns 0 pairs when the file has none;
 * fst_model_has_metadata tells an empty map from none at all. */
typedef struct fst_string {
    const char *data;
    size_t      length;
} fst_string;
FST_API int        fst_model_has_metadata(const fst_model *model, size_t file);
FST_API size_t     fst_model_metadata_count(const fst_model *model, size_t file);
FST_API fst_status fst_model_metadata_at(const fst_model *model, size_t file, size_t i,
                                         fst_string *key, fst_string *value);

/* How a tensor is quantized, as its files' names, shapes and config.json tell. */
typedef struct fst_quantization {
    const char   *format;     /* "fp8-block", "mxfp4", "gptq", ...: docs/quantized.md */
    const char   *name;       /* of the weight, as in the model that is not quantized */
    size_t        companions_count;
    const size_t *companions; /* scales, zero points and so on: indexes of tensors */
    uint64_t      reserved[4];
} fst_quantization;

/* Of the i-th tensor, when it holds the codes of a quantized weight; FST_E_NOT_FOUND when it does not, or when the model
 * was not opened by fst_open. What is wrong with a model's quantization, fst_model_quantization_error tells: NULL when
 * nothing is. */
FST_API fst_status fst_model_quantization(const fst_model *model, size_t i, fst_quantization *out);
FST_API const fst_error *fst_model_quantization_error(const fst_model *model);

/* ---- What a load did ------------------------------------------------------------------------- */

typedef struct fst_stats {
    size_t      size;              /* sizeof(fst_stats), set by the caller */
    uint64_t    bytes_read;        /* asked of the files, headers included */
    uint64_t    bytes_out;         /* of all tensors, without padding */
    double      seconds;           /* from the entry of fst_load to its return */
    const char *device;            /* "cpu", "hip:0", "cuda:0" */
    const char *device_name;       /* as the driver tells it; the processor's for the CPU */
    const char *device_reason;     /* why this device; what was wrong with GPUs passed over */
    const char *limit;             /* what the load waited for most: "read", "copy", "kernel",
                                      "allocation" or "consumer" */
    uint64_t    peak_device_bytes; /* final blocks and staging ring at their most */
    uint64_t    pinned_bytes;      /* of the bounce ring; 0 on the CPU */
    unsigned    threads;
    unsigned    slots;             /* bounce slots */
    size_t      slot_bytes;
    uint64_t    chunks;            /* pieces that the files were read in */
    uint64_t    launches;          /* of kernels */
    double      read_seconds;      /* summed over threads: in reads */
    double      wait_seconds;      /* summed over threads: for a free slot */
    double      kernel_seconds;    /* on the CPU device, summed over threads; 0 on a GPU */
    double      open_seconds;      /* opening, reading and checking headers, planning */
    double      allocate_seconds;  /* final blocks, rings and threads */
    uint64_t    tensors_ignored;   /* in the files, but not in their index, or skipped by a rule */
    uint64_t    bytes_cached;      /* of bytes_read: copied out of the page cache */
    uint64_t    bytes_buffered;    /* read from storage into the page cache, or not known to be there */
    uint64_t    bytes_direct;      /* read past the page cache (O_DIRECT) */
    const char *reader;            /* how they were read, and how it was known what is cached */
    double      copy_seconds;      /* copies to the device, by a sample that it timed */
    double      convert_seconds;   /* the same for kernels, summed over streams */
    double      consumer_seconds;  /* summed over threads: waited for memory, that a stream's consumer held */
    double      slots_busy;        /* mean share of the bounce slots whose copies were under way */
    unsigned    slots_unpinned;    /* bounce slots that could not be pinned: left out, if there are others; and
                                      what is read for other ranks, if it could not be */
    int         numa_node;         /* of the ring and its threads; -1: any */
    uint64_t    nans;              /* NaNs among the values that scales were computed for: their codes are NaN */
    uint64_t    nan_scales;        /* NaN among the scales of dequantized weights (E8M0: 255): what is under them is NaN */
    uint64_t    bare_weights;      /* 8-bit float weights that have no scale, in a cast: taken as they are */
    uint64_t    bytes_needed;      /* of the files, that results are made of; bytes_read has headers, and what came along */
    uint64_t    bytes_storage;     /* that this process caused to be read from storage meanwhile, as the system counts; UINT64_MAX:
                                      it does not tell */
    uint64_t    shards_unused;     /* rules of options.shards that match no tensor; those of fst_shard_rules do not count */
} fst_stats;

/* Fills in *out up to out->size. After fst_open most of it is zero. */
FST_API fst_status fst_model_stats(const fst_model *model, fst_stats *out);

/* ---- Tensor by tensor --------------------------------------------------------------------------- */

struct DLManagedTensorVersioned; /* DLPack's own; its header is not needed here */

typedef struct fst_stream fst_stream;

/* Begins to load in the background and returns. No more than options.memory_bytes are held on the device by tensors
 * that were not released: readers wait then. One thread at a time may use a stream. FST_E_ARG: a tensor is larger
 * than memory_bytes. */
FST_API fst_status fst_stream_open(const char *const *files, const fst_options *options, fst_stream **out,
                                   fst_error *error);

/* The next tensor that is complete; *tensor has a NULL name after the last one. With `dlpack`, *dlpack owns the data
 * until its deleter has run, also after fst_stream_close; without (NULL), it is there until the next call with this
 * stream. Memory goes back block by block, when the last tensor in one is released. Data is ready for every stream, or
 * on options.stream. Waits; FST_E_AGAIN when nothing can come because the tensors that were taken hold all of
 * memory_bytes: release some, call again. A tensor that cannot be exported (FST_E_DLPACK, FST_E_MEMORY) comes again with
 * the next call. After any other failure the stream gives the same error on every call. Without `dlpack`, work that was
 * queued on a non-blocking stream must be finished before the next call. The
 * files are compared with what they were before the last tensor is given, which may be FST_E_CHANGED. */
FST_API fst_status fst_stream_next(fst_stream *stream, fst_tensor *tensor,
                                   struct DLManagedTensorVersioned **dlpack, fst_error *error);

/* Names, shapes, files and metadata, as after fst_open. Lives as long as the stream. Its statistics are complete after
 * the last tensor. */
FST_API const fst_model *fst_stream_model(const fst_stream *stream);

/* Ends the stream, also in the middle of it. Tensors that were taken as DLPack stay. NULL is allowed. */
FST_API void fst_stream_close(fst_stream *stream);

/* ---- DLPack ---------------------------------------------------------------------------------- */

/* The i-th tensor as a DLPack 1.x tensor that keeps its memory alive, also after fst_model_free.
 * The caller runs its deleter once, from any thread. Strides are always set, byte_offset is 0, and
 * the data is ready. F4 is exported as PyTorch takes it: bits 4, lanes 2, the last extent halved.
 * FST_E_DLPACK: an F4 tensor whose last extent is odd, or that has none. FST_E_NO_DATA: after
 * fst_open. */
FST_API fst_status fst_model_dlpack(fst_model *model, size_t i, struct DLManagedTensorVersioned **out);

/* ---- Saving ---------------------------------------------------------------------------------- */

typedef struct fst_save_options {
    size_t          size;         /* sizeof(fst_save_options) */
    fst_progress_fn progress;     /* bytes written; a return other than 0 cancels */
    void           *progress_arg;
    const volatile int *cancel;
} fst_save_options;

/* Writes a loaded model as one .safetensors file: tensors in the model's order, `__metadata__` of
 * all files merged (FST_E_CONFLICT when two disagree on a key), data from a multiple of 4,096 bytes
 * on (the header is padded with spaces). It is written beside `path` under a temporary name, synced
 * and renamed: `path` is the whole new file or what it was before. `options` may be NULL. */
FST_API fst_status fst_save(const fst_model *model, const char *path, const fst_save_options *options,
                            fst_error *error);

/* ---- Converting ------------------------------------------------------------------------------- */

typedef struct fst_convert_options {
    size_t   size;        /* sizeof(fst_convert_options) */
    uint64_t shard_bytes; /* most bytes of tensors in one file; a larger tensor has a file of its own; 0: 5,000,000,000 */
} fst_convert_options;

typedef struct fst_convert_stats {
    size_t      size;          /* sizeof(fst_convert_stats), set by the caller */
    uint64_t    tensors;       /* in the output */
    uint64_t    bytes_out;     /* of theirs, without headers */
    uint64_t    shards;        /* files with tensors */
    uint64_t    shards_kept;   /* of them, that an earlier run had finished */
    uint64_t    files_copied;  /* other files of the directory */
    uint64_t    bytes_read;    /* of files with tensors, headers included; what was read to check kept shards is not in it */
    double      seconds;
    double      write_seconds; /* in writing and hashing, beside everything else */
    double      sync_seconds;  /* in waiting for the storage to have finished files */
    uint64_t    peak_bytes;    /* memory for results and rings at the most */
    const char *device;        /* "cpu", "hip:0", "cuda:0" */
    const char *device_name;
    uint64_t    nans;          /* NaNs among the values that scales were computed for, by this run */
    uint64_t    bytes_needed;  /* the next three as in fst_stats */
    uint64_t    bytes_storage;
    uint64_t    shards_unused;
    uint64_t    nan_scales;    /* the next two as well; of what this run converted */
    uint64_t    bare_weights;
} fst_convert_stats;

/* Makes a checkpoint directory of a checkpoint directory, converted as fst_load would with these options: files
 * model-00001-of-0000N.safetensors, model.safetensors.index.json, config.json as it fits the result, and all other files of
 * `directory` but weights (docs/convert.md). Tensors are written as they come: memory is bounded by options.memory_bytes (0:
 * 256 MiB, or somewhat more than the largest tensor). `output` is made, or is empty, or holds what an earlier call with the same
 * inputs and options left there when it was ended: then finished files are checked and kept. It is never `directory`,
 * nor inside it, nor around it. Files have temporary names until they are complete and synced; index and config.json come
 * last. `options` are those of a load: `cast`, `scale`, `rule` (without `memory`), `progress` (of bytes of results), `cancel` and so
 * on; `stream` and FST_AS_READY are ignored. `options`, `convert`, `stats` and `error` may be NULL.
 * FST_E_ARG, FST_E_FILE_TYPE, what fst_load says of unsupported formats: before anything is written. FST_E_IO with
 * ENOSPC, FST_E_CANCELLED, ...: what is finished stays for the next call. */
FST_API fst_status fst_convert_directory(const char *directory, const char *output, const fst_options *options,
                               const fst_convert_options *convert, fst_convert_stats *stats, fst_error *error);

#ifdef __cplusplus
}
#endif
#endif
