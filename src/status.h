/* Error records: how every failure is said. */
#ifndef FST_STATUS_H
#define FST_STATUS_H

#include "fst.h"

/* Which file an error is about. A NULL fst_where, or one with path NULL, means no file. */
typedef struct fst_where {
    const char *path;
    int         file;   /* index in the load; -1 when not known */
    int64_t     offset; /* byte in the file; -1 when not known */
} fst_where;

/* Fills in *error (which may be NULL) and returns `status`. The text is formatted as by printf, then
 * control characters, DEL and bytes that are not UTF-8 are escaped as \n, \t, \xNN; when it is too
 * long it is cut at a character's border and ends in "...". `code` is an errno or a device code. */
__attribute__((format(printf, 5, 6)))
fst_status fst_fail(fst_error *error, fst_status status, int code, const fst_where *where,
                    const char *format, ...);

/* Makes *error (may be NULL: nothing happens) this thread's last error. Public functions call it
 * on their way out. */
void fst_set_last_error(const fst_error *error);

/* Escapes `length` bytes as fst_fail does, into out (at most `size` bytes with its NUL). Returns out. */
const char *fst_escape(char *out, size_t size, const char *text, size_t length);

#endif
