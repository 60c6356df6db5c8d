/* What files are made of: text that grows, the header of a .safetensors file, and data that comes from a device. save.c
 * and convert.c. */
#ifndef FST_OUTPUT_H
#define FST_OUTPUT_H

#include "model.h"

#define FST_DATA_ALIGN 4096u /* data starts at a multiple of it */

/* ---- Text ------------------------------------------------------------------------------------ */

/* Grows as needed. `failed` once memory ran out: then nothing is added any more. */
typedef struct fst_text {
    char  *data;
    size_t used, room;
    int    failed;
} fst_text;

void fst_put(fst_text *text, const char *data, size_t size);
/* At most 127 bytes at a time. */
__attribute__((format(printf, 2, 3))) void fst_put_format(fst_text *text, const char *format, ...);
/* A JSON string. The data is UTF-8 already; what JSON wants escaped is escaped. */
void fst_put_string(fst_text *text, const char *data, size_t length);

/* ---- Headers --------------------------------------------------------------------------------- */

/* Begins with an empty text; `metadata` as fst_merge_metadata made it. */
void fst_put_header_begin(fst_text *text, const fst_text *metadata);
void fst_put_tensor(fst_text *text, const fst_model_tensor *tensor, uint64_t begin);
/* The length, and spaces up to where the data starts. FST_E_MEMORY, FST_E_HEADER_SIZE. */
fst_status fst_put_header_end(fst_text *text, const char *path, fst_error *error);

/* `"__metadata__":{...}` of all files of the model, or nothing when none has any. A key with two values is FST_E_CONFLICT, or
 * left out, with `for_torch`: then there is a "format", too, "pt" where the files have none. */
fst_status fst_merge_metadata(const fst_model *model, const char *path, int for_torch, fst_text *out,
                              fst_error *error);

/* ---- Data ------------------------------------------------------------------------------------ */

#define FST_SINK_BUFFER ((size_t)8 << 20)

typedef struct fst_sink_slot {
    void     *memory;
    int       pinned;
    fst_event filled;
    size_t    used;
} fst_sink_slot;

/* Takes data from a device and hands it on, in order, in pieces that the CPU can read. From a GPU it goes through two
 * pinned buffers: while one is handed on, the device fills the other. */
typedef struct fst_sink {
    const fst_gpu *gpu;
    size_t         piece_bytes; /* most bytes at a time */
    fst_status   (*take)(void *arg, const void *data, size_t size);
    void          *arg;
    const char    *path;        /* for errors */
    fst_error     *error;
    int            entered, saved;
    fst_queue      stream;
    fst_sink_slot  slots[2];
    unsigned       current;     /* slot that is being filled */
    int            busy;        /* copies may be under way */
} fst_sink;

/* gpu, piece_bytes, take, arg, path, error are set, all else is zero. One thread may use a sink; the same must close it. */
fst_status fst_sink_open(fst_sink *sink);
fst_status fst_sink_put(fst_sink *sink, const void *data, uint64_t nbytes);
/* What was put is read: its memory may go. */
fst_status fst_sink_settle(fst_sink *sink);
/* What was put is handed on. */
fst_status fst_sink_flush(fst_sink *sink);
/* Also after a failure; nothing is on its way into the buffers afterwards. */
void       fst_sink_close(fst_sink *sink);

#endif
