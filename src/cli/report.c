#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "../utf8.h"
#include "cli.h"

void *must(void *memory) {
    if (memory) return memory;
    fputs("fst: FST_E_MEMORY: no memory\n", stderr);
    exit(EXIT_WRONG);
}

/* ---- Text ------------------------------------------------------------------------------------ */

/* Terminals obey U+0080 to U+009F as they do the ASCII control characters. */
static int is_control(const unsigned char *text, size_t size) {
    return size == 1 ? *text < 0x20 || *text == 0x7F : size == 2 && text[0] == 0xC2 && text[1] < 0xA0;
}

static size_t escape_byte(char *out, unsigned char byte) {
    const char *letter = byte == '\n' ? "\\n" : byte == '\t' ? "\\t" : byte == '\r' ? "\\r" : NULL;
    return (size_t)(letter ? sprintf(out, "%s", letter) : sprintf(out, "\\x%02X", byte));
}

char *escaped(const char *text, size_t length) {
    const unsigned char *bytes = (const unsigned char *)text;
    char *copy = must(malloc(4 * length + 1)), *end = copy;
    for (size_t i = 0; i < length;) {
        size_t size = fst_utf8_character(bytes + i, length - i);
        if (!size || is_control(bytes + i, size)) {
            end += escape_byte(end, bytes[i++]);
        } else {
            memcpy(end, text + i, size);
            end += size;
            i += size;
        }
    }
    *end = 0;
    return copy;
}

char *valid_utf8(const char *text, size_t *length) {
    const unsigned char *bytes = (const unsigned char *)text;
    char *copy = must(malloc(3 * *length + 1)), *end = copy;
    for (size_t i = 0; i < *length;) {
        size_t size = fst_utf8_character(bytes + i, *length - i);
        memcpy(end, size ? text + i : "\xEF\xBF\xBD", size ? size : 3);
        end += size ? size : 3;
        i += size ? size : 1;
    }
    *end = 0;
    *length = (size_t)(end - copy);
    return copy;
}

size_t text_width(const char *text) {
    size_t width = 0;
    for (; *text; text++) width += ((unsigned char)*text & 0xC0) != 0x80;
    return width;
}

const char *format_bytes(char out[32], uint64_t bytes) {
    static const char *const units[] = {"kB", "MB", "GB", "TB", "PB", "EB"};
    double value = (double)bytes / 1000;
    size_t unit = 0;
    for (; value >= 999.995 && unit < 5; unit++) value /= 1000;
    if (bytes < 1000) snprintf(out, 32, "%u bytes", (unsigned)bytes);
    else snprintf(out, 32, "%.2f %s", value, units[unit]);
    return out;
}

/* ---- Errors ---------------------------------------------------------------------------------- */

void report(const char *path, fst_status status, const char *text) {
    char *about = path && *path ? escaped(path, strlen(path)) : NULL, *what = escaped(text, strlen(text));
    fprintf(stderr, "fst: %s%s%s: %s\n", about ? about : "", about ? ": " : "", fst_status_name(status),
            what);
    free(about);
    free(what);
}

void report_error(const fst_error *error) {
    char text[sizeof error->text + 40];
    if (error->offset >= 0)
        snprintf(text, sizeof text, "%s (byte %lld)", error->text, (long long)error->offset);
    else snprintf(text, sizeof text, "%s", error->text);
    report(error->path, error->status, text);
}

void warn_unused(uint64_t count) {
    if (count)
        fprintf(stderr, "fst: warning: %llu of --shard, --only and --skip match%s no tensor\n",
                (unsigned long long)count, count == 1 ? "es" : "");
}

int report_failed(const fst_error *error) {
    report_error(error);
    int signal = *interrupt_flag();
    return error->status == FST_E_CANCELLED && signal ? EXIT_SIGNAL + signal : EXIT_WRONG;
}

/* ---- JSON ------------------------------------------------------------------------------------ */

void json_add_text(yyjson_mut_doc *doc, yyjson_mut_val *object, const char *key, const char *text) {
    size_t length = text ? strlen(text) : 0;
    char *copy = valid_utf8(text ? text : "", &length);
    if (!yyjson_mut_obj_add_strncpy(doc, object, key, copy, length)) must(NULL);
    free(copy);
}

void json_print(yyjson_mut_doc *doc, FILE *out) {
    size_t length;
    char *text = must(yyjson_mut_write(doc, YYJSON_WRITE_NOFLAG, &length));
    fwrite(text, 1, length, out);
    fputc('\n', out);
    free(text);
    yyjson_mut_doc_free(doc);
}

void report_weights(uint64_t nans, uint64_t nan_scales, uint64_t bare_weights, FILE *out) {
    if (nans) fprintf(out, "note     %" PRIu64 " NaNs in quantized weights\n", nans);
    if (nan_scales)
        fprintf(out, "warning  %" PRIu64 " scales are NaN, and so is what they scale\n", nan_scales);
    if (bare_weights)
        fprintf(out, "warning  %" PRIu64 " 8-bit float weights have no scale: taken as they are\n",
                bare_weights);
}
