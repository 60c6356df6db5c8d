/* Parts of the library that are loaded at run time, because what they need is not on every machine. */
#ifndef FST_MODULES_H
#define FST_MODULES_H

#include <stddef.h>

/* libfst-NAME.so of this library, for dlsym; it stays loaded. NULL: `why` says why not. */
void *fst_module_open(const char *name, char *why, size_t size);

#endif
