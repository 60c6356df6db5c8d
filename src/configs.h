/* The files beside a checkpoint that say how it is quantized: read, not understood (scheme.h does that). */
#ifndef FST_CONFIGS_H
#define FST_CONFIGS_H

#include "scheme.h"

typedef struct fst_configs {
    fst_config_text texts[FST_CONFIGS];
    char *memory[FST_CONFIGS][2];
} fst_configs;

/* Those that lie beside `file`, as it was named, or `given` in the place of config.json; "": none. One that is not there
 * is no error, unless it was given. fst_configs_free also after a failure. */
fst_status fst_configs_read(const char *file, const char *given, fst_configs *out, fst_error *error);
void       fst_configs_free(fst_configs *configs);

#endif
