/* Paths as a user gives them (file, directory, index) -> the list of files to open. */
#ifndef FST_PATHS_H
#define FST_PATHS_H

#include "status.h"

typedef struct fst_paths {
    size_t  count;
    char  **files;          /* NULL-terminated list */
    /* What an index says: tensor name -> position in files. Empty without one. Sorted by name. */
    size_t  listed_count;
    struct fst_listed { const char *name; uint32_t length; uint32_t file; } *listed;
    unsigned char *indexed; /* per file: 1 when it came by way of an index, which then decides */
    void   *memory;
} fst_paths;

/* A file named twice is opened twice (its tensors are then duplicates). A directory without any
 * .safetensors file, an index that is not JSON, has no weight_map of strings, or names a file with
 * '/' or "..": an error. fst_paths_free after success. */
fst_status fst_paths_resolve(const char *const *paths, fst_paths *out, fst_error *error);
void       fst_paths_free(fst_paths *paths);

#endif
