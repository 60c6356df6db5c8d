/* What a checkpoint directory holds beside its weights, and what becomes of it in a converted one. docs/convert.md has
 * the rules. */
#ifndef FST_CHECKPOINT_H
#define FST_CHECKPOINT_H

#include "output.h"

typedef struct fst_extras {
    size_t count;
    char **names; /* relative to the directory: files to be copied, sorted within each folder */
} fst_extras;

/* The files that are copied; `as_stored`: weights stay as they are. What is neither file nor directory is FST_E_FILE_TYPE.
 * fst_extras_free, also after a failure. */
fst_status fst_extras_find(const char *directory, int as_stored, fst_extras *out, fst_error *error);
void       fst_extras_free(fst_extras *extras);

/* Makes the folders that a relative name needs in `output`, then the file itself by way of `partial`. */
fst_status fst_extras_copy(const char *directory, const char *output, const char *name, const char *partial,
                           const volatile int *cancel, fst_error *error);

/* config.json as it fits the converted model; nothing where the directory has none. */
fst_status fst_convert_config(const fst_model *model, const char *directory, const fst_options *options, fst_text *out,
                              fst_error *error);

/* Malloc'ed "directory/name"; NULL: no memory. */
char *fst_join(const char *directory, const char *name);

#endif
