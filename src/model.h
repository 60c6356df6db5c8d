/* A model: what was opened or loaded, and who owns it. */
#ifndef FST_MODEL_H
#define FST_MODEL_H

#include <stdatomic.h>

#include "gpu.h"
#include "header.h"
#include "paths.h"
#include "pipeline.h"

/* A block of device memory. Freed with its last reference: the model's, or a DLPack tensor's. */
typedef struct fst_block {
    atomic_size_t  references;
    const fst_gpu *gpu;
    void          *data;
    uint64_t       nbytes;
    fst_allocator  allocator;     /* that the memory is from; .allocate NULL: the device's own */
    fst_budget    *budget;        /* that it counts for, or NULL */
} fst_block;

/* Size of the blocks that tensors share; a larger tensor has its own. Tests make it small. */
extern uint64_t fst_block_bytes;
/* Of windows of weights that wait for their scales; 0: as suits the slots. Likewise. */
extern uint64_t fst_window_bytes;
/* Of the companions that are read together, before weights that need them; 0: 16 MiB. Likewise. */
extern uint64_t fst_batch_bytes;

/* `budget` and `allocator` may be NULL. May wait for the budget. `wanted`: bytes in all that the load wants. */
fst_status fst_block_new(const fst_gpu *gpu, const fst_allocator *allocator, fst_budget *budget, uint64_t nbytes,
                         uint64_t wanted, fst_block **out, fst_error *error);
void fst_block_hold(fst_block *block);
void fst_block_drop(fst_block *block); /* NULL is allowed */
/* The same; if it is the last, the memory goes back behind what is queued on the caller's stream. */
void fst_block_drop_behind(fst_block *block, fst_queue stream);

typedef struct fst_model_tensor {
    const fst_entry *entry;
    uint32_t         file;
    fst_dtype        dtype;
    fst_block       *block;       /* that its data is in; NULL: it has none, or it is in memory of the caller's */
    void            *data;
    uint64_t         nbytes;
    uint64_t         hash;        /* of its name */
    uint32_t         planned;     /* the plan's tensor that it comes from */
    int32_t          shard_dim;   /* along which it is cut, */
    uint64_t         shard_begin, shard_extent; /* if the latter is not 0 */
} fst_model_tensor;

/* Of a tensor that is not in its file as it is here: a weight that was dequantized, scales that were computed. */
typedef struct fst_model_made {
    fst_entry entry;
    uint64_t  shape[8];
} fst_model_made;

typedef struct fst_model_name {
    uint32_t index; /* of the tensor, and 1; 0: free */
    uint32_t tag;   /* the upper half of its hash */
} fst_model_name;

struct fst_model {
    fst_paths         paths;
    fst_header       *headers;    /* of each file */
    fst_model_made   *made;
    char             *made_names; /* of scales and of what is fused; those of weights are the scheme's */
    uint64_t         *made_shapes; /* of parts and of what is fused */
    size_t            count;
    fst_model_tensor *tensors;
    fst_model_name   *names;      /* open-addressing hash table */
    size_t            names_size; /* a power of two */
    uint64_t          hash_key[2];
    size_t            blocks_count;
    fst_block       **blocks;
    const fst_gpu    *gpu;        /* NULL after fst_open */
    int               is_streamed; /* a tensor has data while it is given, no longer */
    struct fst_scheme *scheme;      /* how it is quantized; NULL: nobody asked */
    fst_error         quantization_error;
    fst_stats         stats;
    char              device_reason[256];
    char              reader[512]; /* for the statistics */
};

void   fst_describe_tensor(const fst_model *model, const fst_model_tensor *tensor, fst_tensor *out);
/* SipHash-1-3 (Aumasson and Bernstein) under the model's own random key: names come from files, and a file made to
 * let all its names collide would take hours. */
uint64_t fst_model_hash(const fst_model *model, const char *name, size_t length);
/* The slot of the table that has this name, or the free one where it would go. */
size_t fst_model_slot(const fst_model *model, uint64_t hash, const char *name, size_t length);

#endif
