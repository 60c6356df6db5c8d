/* What a conversion to a directory writes down, so that another run can go on: a line with all that decides what comes out
 * (versions, options, the plan, the inputs), then a line for each file of the output. */
#ifndef FST_JOURNAL_H
#define FST_JOURNAL_H

#include "output.h"

typedef struct fst_journal_file {
    char    *name;
    uint64_t size, hash; /* of a finished file with tensors: bytes, XXH3 of all of them */
    int      done;
} fst_journal_file;

typedef struct fst_journal {
    char             *head; /* the first line; NULL: there is no journal */
    size_t            head_length;
    size_t            count;
    fst_journal_file *files;
} fst_journal;

/* A journal that is not there, or not as one should be, has no head. FST_E_IO, FST_E_MEMORY. fst_journal_free, also after a
 * failure. */
fst_status fst_journal_read(const char *path, fst_journal *out, fst_error *error);
void       fst_journal_free(fst_journal *journal);
/* Replaces the file by way of `partial`. */
fst_status fst_journal_write(const char *path, const char *partial, const fst_journal *journal, fst_error *error);

/* Writes, syncs and renames a whole small file. */
fst_status fst_replace_file(const char *path, const char *partial, const fst_text *text, fst_error *error);

/* Path, size and times of a file, as JSON; nothing when it is not there. */
fst_status fst_put_identity(fst_text *text, const char *path, fst_error *error);

/* XXH3, 64 bits. */
typedef struct fst_hash fst_hash;
fst_hash *fst_hash_new(void); /* NULL: no memory */
void      fst_hash_begin(fst_hash *hash);
void      fst_hash_add(fst_hash *hash, const void *data, size_t size);
uint64_t  fst_hash_end(const fst_hash *hash);
void      fst_hash_free(fst_hash *hash);

#endif
