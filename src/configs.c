/* The files beside a checkpoint that say how it is quantized. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "configs.h"
#include "os.h"
#include "status.h"

#define CONFIG_MAX ((uint64_t)16 << 20)

static const char *const names[FST_CONFIGS] = {"config.json", "hf_quant_config.json", "quantize_config.json"};

static fst_status failed(const char *path, int code, const char *what, fst_error *error) {
    fst_where where = {path, -1, -1};
    return fst_fail(error, FST_E_IO, -code, &where, "%s: %s; the option 'config' names another, or none",
                    what, strerror(-code));
}

static fst_status read_open(int fd, fst_config_text *out, char **text, fst_error *error) {
    fst_where where = {out->path, -1, -1};
    fst_file_id id;
    fst_file_type type;
    int code = fst_os_calls.identify(fd, &id, &type);
    if (code < 0) return failed(out->path, code, "looking at the configuration", error);
    if (type != FST_FILE_REGULAR || id.size > CONFIG_MAX)
        return fst_fail(error, FST_E_FILE_TYPE, 0, &where,
                        "the configuration is no regular file of at most 16 MiB");
    *text = malloc((size_t)id.size + 1);
    if (!*text) return fst_fail(error, FST_E_MEMORY, 0, &where, "out of memory");
    ssize_t got = fst_os_read_all(fd, *text, (size_t)id.size, 0);
    if (got < 0) return failed(out->path, (int)got, "reading the configuration", error);
    out->text = *text;
    out->length = (size_t)got;
    return FST_OK;
}

static fst_status read_one(fst_configs *configs, int which, int must_be, fst_error *error) {
    fst_config_text *out = &configs->texts[which];
    int fd = fst_os_calls.open_read(out->path);
    if (fd < 0)
        return !must_be && (fd == -ENOENT || fd == -ENOTDIR)
                   ? FST_OK
                   : failed(out->path, fd, "opening the configuration", error);
    fst_status status = read_open(fd, out, &configs->memory[which][1], error);
    fst_os_calls.close(fd);
    return status;
}

fst_status fst_configs_read(const char *file, const char *given, fst_configs *out, fst_error *error) {
    const char *slash = file ? strrchr(file, '/') : NULL;
    size_t directory = slash ? (size_t)(slash - file) + 1 : 0;
    fst_status status = FST_OK;
    memset(out, 0, sizeof *out);
    if (given && !*given) return FST_OK;
    for (int i = 0; i < (given ? 1 : FST_CONFIGS) && !status; i++) {
        size_t length = given ? strlen(given) : directory + strlen(names[i]);
        char *path = out->memory[i][0] = malloc(length + 1);
        if (!path) return fst_fail(error, FST_E_MEMORY, 0, NULL, "out of memory");
        if (given) memcpy(path, given, length + 1);
        else if (file) memcpy(path, file, directory), strcpy(path + directory, names[i]);
        out->texts[i].path = path;
        status = read_one(out, i, given != NULL, error);
    }
    return status;
}

void fst_configs_free(fst_configs *configs) {
    for (int i = 0; i < FST_CONFIGS; i++)
        for (int k = 0; k < 2; k++) free(configs->memory[i][k]);
    memset(configs, 0, sizeof *configs);
}
