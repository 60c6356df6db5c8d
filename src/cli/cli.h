/* The fst command: what its parts share. It knows the library through fst.h alone. */
#ifndef FST_CLI_H
#define FST_CLI_H

#include <stdio.h>
#include <yyjson.h>

#include "fst.h"

enum { EXIT_OK = 0, EXIT_WRONG = 1, EXIT_USAGE = 2, EXIT_SIGNAL = 128 /* + the signal */ };

/* ---- args.c ---------------------------------------------------------------------------------- */

typedef enum command { COMMAND_INSPECT, COMMAND_LOAD, COMMAND_CONVERT, COMMAND_HELP, COMMAND_VERSION } command;

typedef struct arguments {
    command      command;
    int          json;
    fst_dtype    cast;
    fst_scale    scale;
    int          device;
    unsigned     threads;
    fst_reader_kind reader;
    fst_cache    cache;
    const char  *output; /* NULL when not given */
    int          to_directory; /* `output` is one */
    uint64_t     shard_bytes;
    unsigned     rank, ranks;
    int          is_tp;      /* with the library's rules behind those given */
    int          strict;
    fst_read_mode read;
    fst_shard_rule *shards;  /* as given, then the library's, then one with a NULL glob; NULL: none. Their globs, but the
                                library's, are freed by arguments_free, as is the list */
    size_t       shards_count; /* of those given */
    const char **paths;  /* NULL-terminated; freed by arguments_free */
    size_t       paths_count;
} arguments;

/* EXIT_OK, or EXIT_USAGE after a line on stderr. Touches no path and no device. */
int  arguments_parse(int argc, char **argv, arguments *out);
void arguments_free(arguments *args);

/* ---- The commands: an exit status; on success their output is in `out`, else a line on stderr -- */

int run_inspect(const arguments *args, FILE *out);
int run_load(const arguments *args, FILE *out); /* load and convert: the latter writes a file as well */
int run_convert(const arguments *args, FILE *out); /* convert to a directory */

/* ---- report.c -------------------------------------------------------------------------------- */

/* One line on stderr, "fst: PATH: FST_E_NAME: text"; without PATH when it is NULL or empty. */
void report(const char *path, fst_status status, const char *text);
void report_error(const fst_error *error);
/* The same; returns the exit status that fits. */
int  report_failed(const fst_error *error);

/* Lines on what is odd about weights: NaNs that were quantized, scales that are NaN, weights without a scale. */
void report_weights(uint64_t nans, uint64_t nan_scales, uint64_t bare_weights, FILE *out);

/* `memory`, or the end of the process with a line on stderr when it is NULL. */
void *must(void *memory);

/* A malloc'ed copy with control characters and bytes that are not UTF-8 as \n, \t, \xNN. */
char *escaped(const char *text, size_t length);

/* A malloc'ed copy with U+FFFD for each byte that is not UTF-8; *length becomes that of the copy. */
char *valid_utf8(const char *text, size_t *length);

/* Columns that a terminal needs for UTF-8 text, taking every character as one. */
size_t text_width(const char *text);

/* A line on stderr for rules that match nothing. */
void warn_unused(uint64_t count);

/* "1.50 GB"; returns out. */
const char *format_bytes(char out[32], uint64_t bytes);

/* yyjson_mut_obj_add_* for text that need not be UTF-8. */
void json_add_text(yyjson_mut_doc *doc, yyjson_mut_val *object, const char *key, const char *text);
/* The document and a newline; frees it. */
void json_print(yyjson_mut_doc *doc, FILE *out);

/* ---- progress.c ------------------------------------------------------------------------------ */

typedef struct progress {
    const char *label;
    int         terminal; /* stderr is one */
    size_t      drawn;    /* columns on the terminal now */
} progress;

progress progress_new(const char *label);
int      progress_tick(void *arg, const fst_progress *now); /* an fst_progress_fn */
void     progress_clear(progress *bar);

/* What the arguments ask for, with `bar` as progress; Ctrl-C cancels. */
fst_options options_for(const arguments *args, progress *bar);

/* ---- interrupt.c ----------------------------------------------------------------------------- */

/* From here on Ctrl-C (also SIGTERM and SIGHUP) sets what interrupt_flag points to. The second one kills. */
void interrupt_install(void);
const volatile int *interrupt_flag(void); /* 0, or the signal */

#endif
