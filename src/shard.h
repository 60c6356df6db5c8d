/* Which part of a tensor a rank has, and the rules for names. Pure: no I/O, no device. */
#ifndef FST_SHARD_H
#define FST_SHARD_H

#include "fst.h"

/* What rules say of a tensor. */
typedef struct fst_cut {
    int      skip;
    int32_t  dim;  /* or FST_REPLICATE */
    uint32_t unit; /* 1 or more */
} fst_cut;

/* A list of rules, made ready for many names. */
typedef struct fst_shards fst_shards;

/* What options say of parts: rank, ranks, shards, read. FST_E_ARG; FST_E_MEMORY. */
fst_status fst_shards_check(const fst_options *options, fst_error *error);

/* Of rules that were checked, and live as long. NULL: no memory. */
fst_shards *fst_shards_new(const fst_shard_rule *rules);
void        fst_shards_free(fst_shards *shards);

/* What they say of a tensor that goes by any of these names. Remembers which rules match. */
fst_cut fst_shards_find(fst_shards *shards, const fst_string *names, size_t count);

/* Whether any of them leaves something out. */
int fst_shards_skip(const fst_shards *shards);

/* How many match nothing so far; *first is the first one's glob. Those of fst_shard_rules do not count: they are for many
 * models. */
uint64_t fst_shards_unused(const fst_shards *shards, const char **first);

#endif
