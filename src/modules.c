/* Finds the library's modules. */
#include "modules.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

void *fst_module_open(const char *name, char *why, size_t size) {
    /* Beside the library in a build tree or a private prefix, then where it is installed. */
    static const char *const places[] = {"%.*slibfst-%s.so", "%.*sfst/libfst-%s.so",
                                         "%.*s../lib/libfst-%s.so", "%.*s../lib/fst/libfst-%s.so"};
    char path[4096];
    const char *message = NULL;
    Dl_info info;
    snprintf(why, size, "no module for it is installed");
    for (size_t i = 0; i < sizeof places / sizeof *places + 1; i++) {
        if (i == sizeof places / sizeof *places) {
            snprintf(path, sizeof path, "%s/libfst-%s.so", FST_MODULE_DIR, name);
        } else {
            const char *slash;
            if (!dladdr((const void *)places, &info) || !info.dli_fname) continue;
            slash = strrchr(info.dli_fname, '/');
            int directory = slash ? (int)(slash - info.dli_fname + 1) : 0;
            /* Without a slash dlopen would search the system's folders. */
            char prefix[4096];
            snprintf(prefix, sizeof prefix, "%s%.*s", slash ? "" : "./", directory, info.dli_fname);
            if (snprintf(path, sizeof path, places[i], (int)strlen(prefix), prefix, name) >= (int)sizeof path)
                continue;
        }
        FILE *there = fopen(path, "re");
        if (!there) continue;
        fclose(there);
        void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (module) return module;
        message = dlerror();
        snprintf(why, size, "its module does not load: %s", message ? message : "no reason given");
    }
    return NULL;
}
