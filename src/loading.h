/* A load under way: what it needs besides the model. open.c, load.c and stream.c. */
#ifndef FST_LOADING_H
#define FST_LOADING_H

#include "model.h"
#include "os.h"
#include "pipeline.h"
#include "plan.h"
#include "reader.h"

typedef struct fst_loading {
    fst_model *model;
    fst_error *error;
    fst_options options;
    fst_allocator allocator;
    double started;
    uint64_t storage_before; /* bytes that the process had read from storage by then; UINT64_MAX: not known */
    int opens_only;

    int *fds; /* -1: not open */
    fst_file_id *ids;
    fst_choice *choices; /* of each tensor of each file; NULL: all of them come, as stored */
    uint64_t **hashes;   /* of each file's names */
    size_t total;        /* tensors in all headers */
    const unsigned char *unwanted; /* of each tensor that counts and that the rule does not skip: it is skipped; or NULL */
    uint64_t header_bytes;

    fst_engine *engine;
    fst_engine_facts facts;
    fst_reader *reader;
    fst_peers *peers;   /* that share the reading, or NULL */
    fst_shared *shared;
    fst_range *ranges; /* what of the files is read */
    fst_plan plan;
    fst_load_job job;
    fst_parking parking;
    fst_budget *budget;
    double allocate_seconds;
} fst_loading;

static inline fst_status fst_no_memory(fst_error *error) {
    return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
}

static inline const char *fst_file_path(const fst_model *model, size_t file) {
    return model->paths.files[file];
}

/* ---- open.c ---- */

/* Opens all files and reads their headers into the model; l->model, error and options are set. */
fst_status fst_loading_open(fst_loading *l, const char *const *files);
/* A table for the names of the model's tensors, without any yet. FST_E_MEMORY. */
fst_status fst_loading_empty_names(fst_loading *l);
/* The table of names of the model's tensors as they are now. FST_E_DUPLICATE. */
fst_status fst_loading_fill_names(fst_loading *l);
/* The bytes of a small tensor of the model (an index as the scheme has it, before results are described), and a NUL
 * behind them; the caller frees. FST_E_QUANTIZED: more than 64 MiB; FST_E_IO, FST_E_CHANGED, FST_E_MEMORY. */
fst_status fst_loading_read_tensor(fst_loading *l, uint32_t tensor, unsigned char **out, fst_error *error);
/* Whether the files are what they were then. */
fst_status fst_loading_check_files(fst_loading *l);
void       fst_loading_close(fst_loading *l);

/* ---- choices.c ---- */

/* What is wanted of each of the model's tensors, which are all that the index lets count, by the options' shard rules and the
 * caller's rule; tensors that are left out are the model's no more. */
fst_status fst_loading_choose(fst_loading *l);
/* Whether any tensor is cut. */
int fst_loading_is_cut(const fst_loading *l);

/* ---- companions.c ---- */

/* What only small companions' bytes tell of the quantized weights that a load dequantizes: shapes of packed ones, and
 * whether the groups of their columns are there. FST_E_QUANTIZED, FST_E_IO, FST_E_CHANGED. */
fst_status fst_loading_read_companions(fst_loading *l, fst_error *error);

/* ---- load.c ---- */

/* Checks what the caller gave and fills in l->options. */
fst_status fst_loading_begin(fst_loading *l, const char *const *files, const fst_options *given);
/* Finds the device, takes an engine, plans with blocks of about `block_bytes`, and makes the job: all but its blocks. */
fst_status fst_loading_prepare(fst_loading *l, uint64_t block_bytes);
void       fst_loading_fill_stats(fst_loading *l, const fst_pipeline_stats *pipeline);
/* Gives back everything but the model. */
void       fst_loading_end(fst_loading *l);

/* ---- stream.c ---- */

/* fst_stream_open without the tensors that `unwanted` tells of, which is needed during the call alone. */
fst_status fst_stream_open_some(const char *const *files, const fst_options *options, const unsigned char *unwanted,
                                fst_stream **out, fst_error *error);
/* fst_stream_next for who releases tensors in other threads: *block is one reference to the memory that the tensor lies in;
 * NULL: in none. */
fst_status fst_stream_take(fst_stream *stream, fst_tensor *tensor, fst_block **block, fst_error *error);

#endif
