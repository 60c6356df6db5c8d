/* A conversion of a directory under way. convert.c plans it and feeds convert_writer.c, whose thread writes. */
#ifndef FST_CONVERT_H
#define FST_CONVERT_H

#include <pthread.h>

#include "journal.h"

typedef struct fst_shard {
    size_t   first, count; /* results in it: neighbours */
    uint64_t header_bytes, nbytes;
    int      kept;         /* finished by an earlier run */
} fst_shard;

#define FST_WRITER_QUEUE 256u

/* A result on its way to the writer. */
typedef struct fst_written {
    size_t      result;
    const void *data;
    fst_block  *block; /* a reference, or NULL */
} fst_written;

typedef struct fst_shard_writer {
    pthread_t       thread;
    pthread_mutex_t lock;
    pthread_cond_t  changed;
    fst_written     queue[FST_WRITER_QUEUE];
    size_t          put, taken, done; /* results so far: in the queue, out of it, written */
    int             ended;            /* nothing more comes */
    int             abandoned;        /* what is in the queue is not written */
    int             failed;
    /* The thread's own. */
    fst_error error;                  /* the first failure; nothing is written after it */
    fst_sink  sink;
    fst_hash *hash;
    size_t    shard;
    int       fd;                     /* -1: no file is open */
    uint64_t  offset;                 /* bytes of the file so far */
    double    write_seconds, sync_seconds;
} fst_shard_writer;

typedef struct fst_convert_job {
    fst_error  *error;
    fst_options options;     /* of the load */
    uint64_t    shard_bytes;
    const char *directory;
    char       *source;      /* where it really is */
    char       *output;
    char       *state;       /* folder in it, for what is not complete, and the journal */
    char       *journal_path, *partial, *shard_partial, *lock_path;
    int         lock;        /* -1: not locked */

    fst_model  *model;       /* what comes out, without data */
    size_t      sources;     /* tensors that it is made of */
    uint64_t    pending;     /* memory that is held until the last part of something fused is there */
    uint32_t  **needs;       /* of each result: sources; the count comes first */
    unsigned char *skip;     /* of each source: all that is made of it is there */

    fst_text    metadata;
    size_t      shards_count;
    fst_shard  *shards;
    uint32_t   *shard_of;    /* of each result */
    fst_journal journal;     /* its first files are the shards */

    fst_shard_writer writer;
    uint64_t    bytes_total;
    uint64_t    bytes_done;  /* atomic */
    double      started, told;
} fst_convert_job;

/* convert.c: the header of a file. */
fst_status fst_shard_header(const fst_convert_job *c, size_t shard, fst_text *out, fst_error *error);

/* Begins the thread. After a success there must be a fst_writer_end. */
fst_status fst_writer_begin(fst_convert_job *c);
/* Takes the next result, in order; 0 when there is no room yet. */
int fst_writer_put(fst_shard_writer *w, size_t result, fst_block *block, const void *data);
/* Waits a little for it to have done more than `done` results; how many it has, or SIZE_MAX after a failure. */
size_t fst_writer_wait(fst_shard_writer *w, size_t done);
int fst_writer_failed(fst_shard_writer *w);
int fst_writer_is_idle(fst_shard_writer *w); /* all that was put is written, or it failed */
/* Lets it write what it was given, or, with `abandon`, not; ends the thread. */
fst_status fst_writer_end(fst_convert_job *c, int abandon);

#endif
