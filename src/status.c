/* Statuses, error records, and the version. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "utf8.h"

#define TEXT_OF(value) #value
#define VERSION_TEXT(major, minor, patch) TEXT_OF(major) "." TEXT_OF(minor) "." TEXT_OF(patch)

const char *fst_version(void) {
    return VERSION_TEXT(FST_VERSION_MAJOR, FST_VERSION_MINOR, FST_VERSION_PATCH);
}

#define NAME(status) [status] = #status
static const char *const names[] = {
    NAME(FST_OK),          NAME(FST_E_ARG),         NAME(FST_E_MEMORY),        NAME(FST_E_IO),
    NAME(FST_E_FILE_TYPE), NAME(FST_E_TRUNCATED),   NAME(FST_E_HEADER_SIZE),   NAME(FST_E_UTF8),
    NAME(FST_E_JSON),      NAME(FST_E_HEADER),      NAME(FST_E_DTYPE),         NAME(FST_E_SHAPE),
    NAME(FST_E_SIZE),      NAME(FST_E_OFFSETS),     NAME(FST_E_NAME),          NAME(FST_E_DUPLICATE),
    NAME(FST_E_INDEX),     NAME(FST_E_CHANGED),     NAME(FST_E_NOT_FOUND),     NAME(FST_E_NO_CAST),
    NAME(FST_E_NO_DEVICE), NAME(FST_E_DEVICE),      NAME(FST_E_DEVICE_MEMORY), NAME(FST_E_CANCELLED),
    NAME(FST_E_CONFLICT),  NAME(FST_E_NO_DATA),     NAME(FST_E_DLPACK),        NAME(FST_E_AGAIN),
    NAME(FST_E_QUANTIZED), NAME(FST_E_UNSUPPORTED), NAME(FST_E_PEER),
};
_Static_assert(sizeof names / sizeof *names == FST_STATUS_COUNT, "a status has no name");

const char *fst_status_name(fst_status status) {
    return (unsigned)status < FST_STATUS_COUNT ? names[status] : "FST_E_UNKNOWN";
}

/* Puts the escape of one byte into out (at most 4 bytes). */
static size_t escape_byte(char out[4], unsigned char byte) {
    static const char digits[] = "0123456789ABCDEF";
    const char *letter = byte == '\n' ? "n" : byte == '\t' ? "t" : byte == '\r' ? "r" : NULL;
    out[0] = '\\';
    if (letter) {
        out[1] = *letter;
        return 2;
    }
    out[1] = 'x';
    out[2] = digits[byte >> 4];
    out[3] = digits[byte & 15];
    return 4;
}

/* Terminals obey U+0080 to U+009F as they do the ASCII control characters. */
static int is_control(const unsigned char *text, size_t size) {
    return size == 1 ? text[0] < 0x20 || text[0] == 0x7F : size == 2 && text[0] == 0xC2 && text[1] < 0xA0;
}

const char *fst_escape(char *out, size_t size, const char *text, size_t length) {
    const unsigned char *bytes = (const unsigned char *)text;
    size_t used = 0, cut = 0; /* cut: the last border that leaves room for "..." */
    if (size == 0) return out;
    for (size_t i = 0; i < length;) {
        char unit[4];
        size_t taken = fst_utf8_character(bytes + i, length - i), put = taken;
        if (taken == 0 || is_control(bytes + i, taken)) {
            taken = 1;
            put = escape_byte(unit, bytes[i]);
        } else {
            memcpy(unit, bytes + i, taken);
        }
        if (used + put >= size) {
            for (int dots = 0; dots < 3 && cut + 1 < size; dots++) out[cut++] = '.';
            out[cut] = 0;
            return out;
        }
        memcpy(out + used, unit, put);
        used += put;
        i += taken;
        if (used + 4 <= size) cut = used;
    }
    out[used] = 0;
    return out;
}

/* The tail of `path`, from a character's border. */
static void copy_path(char *out, size_t size, const char *path) {
    size_t length = strlen(path);
    if (length >= size) {
        path += length - (size - 1);
        while (((unsigned char)*path & 0xC0) == 0x80) path++;
    }
    snprintf(out, size, "%s", path);
}

fst_status fst_fail(fst_error *error, fst_status status, int code, const fst_where *where, const char *format,
                    ...) {
    if (!error) return status;
    char raw[sizeof error->text + 16]; /* what does not fit here would not fit escaped either */
    va_list args;
    va_start(args, format);
    int length = vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    int about_file = where && where->path;
    memset(error, 0, sizeof *error);
    error->status = status;
    error->code = code;
    error->file = about_file ? where->file : -1;
    error->offset = about_file ? where->offset : -1;
    if (about_file) copy_path(error->path, sizeof error->path, where->path);
    if (length < 0) length = 0;
    if ((size_t)length >= sizeof raw) length = sizeof raw - 1;
    fst_escape(error->text, sizeof error->text, raw, (size_t)length);
    return status;
}

static _Thread_local fst_error last_error = {FST_OK, 0, -1, -1, "", ""};

void fst_set_last_error(const fst_error *error) {
    if (error) last_error = *error;
}

const fst_error *fst_last_error(void) { return &last_error; }
