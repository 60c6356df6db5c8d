/* Reads files, each behind its size (8 bytes, little-endian), from the file named; prints a line each:
 *
 *     FST_OK  name,dtype,shape,begin,end ...  metadata   names and metadata in hexadecimal
 *     FST_E_JSON 17                                      the status and the byte
 *
 * headers.py compares the lines with the reference's verdicts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "header.h"

static void print_hex(const char *text, size_t length) {
    for (size_t i = 0; i < length; i++) printf("%02x", (unsigned char)text[i]);
}

static void print_header(const fst_header *header) {
    printf("FST_OK");
    for (size_t i = 0; i < header->count; i++) {
        const fst_entry *entry = &header->tensors[i];
        printf(" ");
        print_hex(entry->name, entry->name_length);
        printf(",%s,", fst_dtype_name(entry->dtype));
        for (uint32_t dim = 0; dim < entry->ndim; dim++) {
            printf("%s%llu", dim ? "x" : "", (unsigned long long)entry->shape[dim]);
        }
        printf(",%llu,%llu", (unsigned long long)entry->begin, (unsigned long long)entry->end);
    }
    printf(header->has_metadata ? " {" : " -");
    for (size_t i = 0; i < header->metadata_count; i++) {
        for (size_t part = 0; part < 2; part++) {
            print_hex(header->metadata[2 * i + part].data, header->metadata[2 * i + part].length);
            printf("%s", part ? ";" : "=");
        }
    }
    printf("\n");
}

/* One case. The JSON gets memory of exactly its size and padding: a sanitizer sees a read past it. */
static int judge(const unsigned char *bytes, uint64_t size) {
    fst_header header;
    fst_error error;
    uint64_t length;
    fst_status status = fst_header_length(bytes, size, "case", 0, &length, &error);
    if (!status) {
        char *json = malloc(length + 8);
        if (!json) return 1;
        memcpy(json, bytes + 8, length);
        status = fst_header_parse(json, length, size, "case", 0, &header, &error);
        free(json);
    }
    if (status) {
        printf("%s %lld\n", fst_status_name(status), (long long)error.offset);
        return error.status != status || error.offset < 0 || (uint64_t)error.offset > size || !*error.text;
    }
    print_header(&header);
    fst_header_free(&header);
    return 0;
}

int main(int argc, char **argv) {
    FILE *cases = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!cases) {
        fprintf(stderr, "usage: header_verdict FILE\n");
        return 2;
    }
    int failed = 0;
    uint64_t size;
    while (!failed && fread(&size, sizeof size, 1, cases) == 1) {
        unsigned char *bytes = malloc(size ? size : 1);
        failed = !bytes || fread(bytes, 1, size, cases) != size || judge(bytes, size);
        free(bytes);
    }
    fclose(cases);
    return failed;
}
