/* UTF-8, strictly: no overlong forms, no surrogates, nothing over U+10FFFF. */
#ifndef FST_UTF8_H
#define FST_UTF8_H

#include <stddef.h>

/* Bytes of the character that `text` starts with, 1 to 4; 0 when it is not UTF-8. `left` > 0. */
static inline size_t fst_utf8_character(const unsigned char *text, size_t left) {
    unsigned char first = text[0];
    if (first < 0x80) return 1;
    if (first < 0xC2 || first > 0xF4) return 0;
    size_t size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (left < size) return 0;
    for (size_t i = 1; i < size; i++) {
        if ((text[i] & 0xC0) != 0x80) return 0;
    }
    if (first == 0xE0 && text[1] < 0xA0) return 0; /* overlong */
    if (first == 0xED && text[1] > 0x9F) return 0; /* surrogate */
    if (first == 0xF0 && text[1] < 0x90) return 0; /* overlong */
    if (first == 0xF4 && text[1] > 0x8F) return 0; /* over U+10FFFF */
    return size;
}

#endif
