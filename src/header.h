/* The safetensors header: bytes in, tensor table out, checked to the letter. docs/format.md lists
 * the rules, one named test case each. Pure: no I/O, no device. */
#ifndef FST_HEADER_H
#define FST_HEADER_H

#include "fst.h"
#include "status.h"

#define FST_HEADER_MAX 100000000u /* bytes of JSON, as in the reference */
#define FST_MAX_DIMS 64

typedef struct fst_entry {
    const char     *name;    /* NUL-terminated */
    uint32_t        name_length;
    uint32_t        ndim;
    const uint64_t *shape;
    fst_dtype       dtype;
    uint64_t        begin;   /* from the start of the data section */
    uint64_t        end;
} fst_entry;

typedef struct fst_header {
    uint64_t    data_start;   /* 8 + length of the JSON */
    uint64_t    file_size;
    size_t      count;
    fst_entry  *tensors;      /* by (begin, end), then as in the file */
    int         has_metadata; /* `__metadata__` is there and not null */
    size_t      metadata_count;
    fst_string *metadata;     /* key, value, key, value, …; in the order of the file */
    void       *memory;       /* what all of the above points into */
} fst_header;

/* The length of the JSON from a file's first bytes. `first` holds min(8, file_size) bytes.
 * FST_E_TRUNCATED, FST_E_HEADER_SIZE. */
fst_status fst_header_length(const unsigned char *first, uint64_t file_size, const char *path, int file,
                             uint64_t *length, fst_error *error);

/* Checks the JSON of a file of `file_size` bytes. On success *out owns memory: fst_header_free. On
 * failure *out is zero. `json` need not outlive the call and may be changed by it: it must have 8 writable
 * bytes of padding after `length`. Error offsets count from the start of the file. */
fst_status fst_header_parse(char *json, size_t length, uint64_t file_size, const char *path, int file,
                            fst_header *out, fst_error *error);

void fst_header_free(fst_header *header);

#endif
