#include "paths.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yyjson.h>

#include "os.h"

#define INDEX_NAME "model.safetensors.index.json"
#define INDEX_MAX 100000000u /* bytes, as for a header */

/* ---- Memory ---------------------------------------------------------------------------------- */

/* What a fst_paths points into: blocks in a list. */
typedef struct memory_block {
    struct memory_block *next;
    size_t used, size;
    char data[];
} memory_block;

static char *take(fst_paths *paths, size_t size) {
    memory_block *block = paths->memory;
    if (!block || block->size - block->used < size) {
        size_t room = size > 16384 ? size : 16384;
        memory_block *fresh = malloc(sizeof *fresh + room);
        if (!fresh) return NULL;
        fresh->next = block;
        fresh->used = 0;
        fresh->size = room;
        paths->memory = block = fresh;
    }
    char *memory = block->data + block->used;
    block->used += size;
    return memory;
}

/* Room for one more item in a list of `count`, which is full whenever count is a power of two. */
static int grow(void **list, size_t count, size_t item_size) {
    if (count & (count - 1)) return 1;
    size_t room = count ? 2 * count : 1;
    void *larger = room > SIZE_MAX / 2 / item_size ? NULL : realloc(*list, room * item_size);
    if (!larger) return 0;
    *list = larger;
    return 1;
}

void fst_paths_free(fst_paths *paths) {
    for (memory_block *block = paths->memory, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(paths->files);
    free(paths->listed);
    free(paths->indexed);
    memset(paths, 0, sizeof *paths);
}

static fst_where about(const char *path) { return (fst_where){path, -1, -1}; }

static fst_status no_memory(const char *path, fst_error *error) {
    fst_where where = about(path);
    return fst_fail(error, FST_E_MEMORY, ENOMEM, &where, "no memory for the list of files");
}

static fst_status io_failed(const char *path, const char *what, int code, fst_error *error) {
    fst_where where = about(path);
    return fst_fail(error, FST_E_IO, -code, &where, "cannot %s: %s", what, strerror(-code));
}

/* ---- Files ----------------------------------------------------------------------------------- */

/* Adds the file `name` in the directory that is the first `length` bytes of `directory`. */
static fst_status add_file(fst_paths *paths, const char *directory, size_t length, const char *name,
                           int indexed, fst_error *error) {
    size_t name_size = strlen(name) + 1;
    char *path = take(paths, length + name_size);
    if (!path || paths->count >= INT32_MAX || !grow((void **)&paths->files, paths->count, sizeof(char *)) ||
        !grow((void **)&paths->indexed, paths->count, 1))
        return no_memory(name, error);
    memcpy(path, directory, length);
    memcpy(path + length, name, name_size);
    paths->files[paths->count] = path;
    paths->indexed[paths->count] = (unsigned char)indexed;
    paths->count++;
    return FST_OK;
}

static int ends_with(const char *text, const char *end) {
    size_t length = strlen(text), end_length = strlen(end);
    return length >= end_length && !strcmp(text + length - end_length, end);
}

/* ---- Index ----------------------------------------------------------------------------------- */

typedef struct index_file {
    const char *path;
    size_t directory; /* bytes of path up to its last '/', with it */
    yyjson_doc *doc;
    size_t count;
    struct index_item {
        const char *name, *file;
        size_t length;
    } * items;
} index_file;

static fst_status index_wrong(const index_file *index, int64_t offset, fst_error *error, const char *what) {
    fst_where where = {index->path, -1, offset};
    return fst_fail(error, FST_E_INDEX, 0, &where, "%s", what);
}

static fst_status read_open_index(index_file *index, int fd, fst_error *error) {
    fst_file_id id;
    fst_file_type type;
    int rc = fst_os_calls.identify(fd, &id, &type);
    if (rc < 0) return io_failed(index->path, "stat", rc, error);
    if (type != FST_FILE_REGULAR) {
        fst_where where = about(index->path);
        return fst_fail(error, FST_E_FILE_TYPE, 0, &where, "the index is not a regular file");
    }
    if (id.size > INDEX_MAX) return index_wrong(index, -1, error, "the index is over 100,000,000 bytes");
    char *text = malloc(id.size + 1);
    if (!text) return no_memory(index->path, error);
    ssize_t got = fst_os_read_all(fd, text, id.size, 0);
    yyjson_read_err wrong = {0};
    if (got >= 0) index->doc = yyjson_read_opts(text, (size_t)got, YYJSON_READ_NOFLAG, NULL, &wrong);
    free(text);
    if (got < 0) return io_failed(index->path, "read", (int)got, error);
    if (index->doc) return FST_OK;
    if (wrong.code == YYJSON_READ_ERROR_MEMORY_ALLOCATION) return no_memory(index->path, error);
    fst_where where = {index->path, -1, (int64_t)wrong.pos};
    return fst_fail(error, FST_E_INDEX, 0, &where, "the index is not JSON: %s",
                    wrong.msg ? wrong.msg : "it is empty");
}

static fst_status read_index(index_file *index, fst_error *error) {
    int fd = fst_os_calls.open_read(index->path);
    if (fd < 0) return io_failed(index->path, "open", fd, error);
    fst_status status = read_open_index(index, fd, error);
    fst_os_calls.close(fd);
    return status;
}

static fst_status find_weight_map(const index_file *index, yyjson_val **map, fst_error *error) {
    yyjson_val *root = yyjson_doc_get_root(index->doc), *key;
    if (!yyjson_is_obj(root)) return index_wrong(index, -1, error, "the index is not a JSON object");
    *map = NULL;
    yyjson_obj_iter iter = yyjson_obj_iter_with(root);
    while ((key = yyjson_obj_iter_next(&iter))) {
        if (!yyjson_equals_str(key, "weight_map")) continue;
        if (*map) return index_wrong(index, -1, error, "the index has two weight_map");
        *map = yyjson_obj_iter_get_val(key);
    }
    if (!*map) return index_wrong(index, -1, error, "the index has no weight_map");
    if (!yyjson_is_obj(*map)) return index_wrong(index, -1, error, "weight_map is not a JSON object");
    if (!yyjson_obj_size(*map)) return index_wrong(index, -1, error, "weight_map names no tensor");
    return FST_OK;
}

/* A file of an index lies beside it, whatever the index says. */
static int is_file_name(const char *name, size_t length) {
    return length && strlen(name) == length && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}

static fst_status read_items(index_file *index, yyjson_val *map, fst_error *error) {
    index->items = calloc(yyjson_obj_size(map), sizeof *index->items);
    if (!index->items) return no_memory(index->path, error);
    fst_where where = about(index->path);
    yyjson_obj_iter iter = yyjson_obj_iter_with(map);
    for (yyjson_val *key; (key = yyjson_obj_iter_next(&iter));) {
        yyjson_val *value = yyjson_obj_iter_get_val(key);
        const char *name = yyjson_get_str(key), *file = yyjson_get_str(value);
        size_t length = yyjson_get_len(key);
        if (strlen(name) != length || length > UINT32_MAX)
            return fst_fail(error, FST_E_INDEX, 0, &where, "weight_map: the name '%s...' has a NUL", name);
        if (!file)
            return fst_fail(error, FST_E_INDEX, 0, &where, "weight_map: the file of '%s' is no string", name);
        if (!is_file_name(file, yyjson_get_len(value)))
            return fst_fail(error, FST_E_INDEX, 0, &where,
                            "weight_map: the file of '%s' is '%s', not a name in the index's own directory",
                            name, file);
        index->items[index->count++] = (struct index_item){name, file, length};
    }
    return FST_OK;
}

/* Most indexes are sorted already. */
static void sort(void *items, size_t count, size_t size, int (*compare)(const void *, const void *)) {
    const char *item = items;
    for (size_t i = 1; i < count; i++, item += size) {
        if (compare(item, item + size) <= 0) continue;
        qsort(items, count, size, compare);
        return;
    }
}

static int compare_item_names(const void *a, const void *b) {
    return strcmp(((const struct index_item *)a)->name, ((const struct index_item *)b)->name);
}

static int compare_files(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static fst_status refuse_repeated(index_file *index, fst_error *error) {
    sort(index->items, index->count, sizeof *index->items, compare_item_names);
    fst_where where = about(index->path);
    for (size_t i = 1; i < index->count; i++)
        if (!compare_item_names(&index->items[i - 1], &index->items[i]))
            return fst_fail(error, FST_E_INDEX, 0, &where, "weight_map names the tensor '%s' twice",
                            index->items[i].name);
    return FST_OK;
}

static fst_status add_listed(fst_paths *paths, const struct index_item *item, size_t file, fst_error *error) {
    char *name = take(paths, item->length + 1);
    if (!name || !grow((void **)&paths->listed, paths->listed_count, sizeof *paths->listed))
        return no_memory(NULL, error);
    memcpy(name, item->name, item->length + 1);
    paths->listed[paths->listed_count++] = (struct fst_listed){name, (uint32_t)item->length, (uint32_t)file};
    return FST_OK;
}

/* Whether an item is in another file than the one before it. */
static int turns_to_file(const index_file *index, size_t i) {
    return i == 0 || strcmp(index->items[i - 1].file, index->items[i].file) != 0;
}

/* Adds each file once, in the order of names, and what the index says is in it. Items stay in the order of theirs. */
static fst_status add_items(fst_paths *paths, index_file *index, fst_error *error) {
    size_t count = 0, kept = 0, before = paths->count;
    const char **files = malloc(index->count * sizeof *files), *const *found = files;
    fst_status status = files ? FST_OK : no_memory(index->path, error);
    for (size_t i = 0; i < index->count && !status; i++)
        if (turns_to_file(index, i)) files[count++] = index->items[i].file;
    sort(files, count, sizeof *files, compare_files);
    for (size_t i = 0; i < count && !status; i++) {
        if (kept && strcmp(files[kept - 1], files[i]) == 0) continue;
        files[kept++] = files[i];
        status = add_file(paths, index->path, index->directory, files[i], 1, error);
    }
    for (size_t i = 0; i < index->count && !status; i++) {
        if (turns_to_file(index, i))
            found = bsearch(&index->items[i].file, files, kept, sizeof *files, compare_files);
        status = add_listed(paths, &index->items[i], before + (size_t)(found - files), error);
    }
    free((void *)files);
    return status;
}

static fst_status add_index(fst_paths *paths, const char *path, fst_error *error) {
    const char *slash = strrchr(path, '/');
    index_file index = {.path = path, .directory = slash ? (size_t)(slash - path) + 1 : 0};
    yyjson_val *map = NULL;
    fst_status status = read_index(&index, error);
    if (!status) status = find_weight_map(&index, &map, error);
    if (!status) status = read_items(&index, map, error);
    if (!status) status = refuse_repeated(&index, error);
    if (!status) status = add_items(paths, &index, error);
    free(index.items);
    yyjson_doc_free(index.doc);
    return status;
}

/* ---- Directories ----------------------------------------------------------------------------- */

static int is_checkpoint_name(const char *name) { return name[0] != '.' && ends_with(name, ".safetensors"); }

static fst_status add_listed_files(fst_paths *paths, const char *directory, char *const *names,
                                   fst_error *error) {
    size_t before = paths->count;
    for (size_t i = 0; names[i]; i++) {
        if (!is_checkpoint_name(names[i])) continue;
        fst_status status = add_file(paths, directory, strlen(directory), names[i], 0, error);
        if (status) return status;
        /* What cannot be looked at stays in the list: opening it says why. */
        fst_file_type type;
        if (!fst_os_calls.stat_type(paths->files[paths->count - 1], &type) && type == FST_FILE_DIRECTORY)
            paths->count--;
    }
    if (paths->count > before) return FST_OK;
    fst_where where = about(directory);
    return fst_fail(error, FST_E_IO, ENOENT, &where, "the directory has neither %s nor any .safetensors file",
                    INDEX_NAME);
}

static fst_status add_directory(fst_paths *paths, const char *path, fst_error *error) {
    size_t length = strlen(path);
    char *directory = take(paths, length + sizeof "/" INDEX_NAME);
    if (!directory) return no_memory(path, error);
    memcpy(directory, path, length);
    if (path[length - 1] != '/') directory[length++] = '/';
    directory[length] = 0;
    char **names;
    int rc = fst_os_calls.list(path, &names);
    if (rc < 0) return io_failed(path, "list the directory", rc, error);
    size_t i = 0;
    while (names[i] && strcmp(names[i], INDEX_NAME)) i++;
    fst_status status;
    if (names[i]) {
        memcpy(directory + length, INDEX_NAME, sizeof INDEX_NAME);
        status = add_index(paths, directory, error);
    } else {
        status = add_listed_files(paths, directory, names, error);
    }
    free(names);
    return status;
}

/* ---- All of it ------------------------------------------------------------------------------- */

static fst_status add_path(fst_paths *paths, const char *path, fst_error *error) {
    fst_file_type type;
    int rc = fst_os_calls.stat_type(path, &type);
    if (rc < 0) return io_failed(path, "open", rc, error);
    if (type == FST_FILE_DIRECTORY) return add_directory(paths, path, error);
    if (type != FST_FILE_REGULAR) {
        fst_where where = about(path);
        return fst_fail(error, FST_E_FILE_TYPE, 0, &where, "neither a regular file nor a directory");
    }
    if (ends_with(path, ".json")) return add_index(paths, path, error);
    return add_file(paths, path, 0, path, 0, error);
}

static int compare_listed(const void *a, const void *b) {
    const struct fst_listed *x = a, *y = b;
    int order = strcmp(x->name, y->name);
    return order ? order : (x->file > y->file) - (x->file < y->file);
}

/* A name that two indexes list is in two files: a duplicate, whatever is in the headers. */
static fst_status sort_listed(fst_paths *paths, fst_error *error) {
    sort(paths->listed, paths->listed_count, sizeof *paths->listed, compare_listed);
    for (size_t i = 1; i < paths->listed_count; i++) {
        const struct fst_listed *first = &paths->listed[i - 1], *second = first + 1;
        if (strcmp(first->name, second->name)) continue;
        fst_where where = {paths->files[second->file], (int)second->file, -1};
        return fst_fail(error, FST_E_DUPLICATE, 0, &where, "tensor '%s' is also in %s, says another index",
                        first->name, paths->files[first->file]);
    }
    return FST_OK;
}

static fst_status resolve(const char *const *list, fst_paths *paths, fst_error *error) {
    if (!list || !*list) return fst_fail(error, FST_E_ARG, 0, NULL, "no file is given");
    for (size_t i = 0; list[i]; i++) {
        fst_status status = add_path(paths, list[i], error);
        if (status) return status;
    }
    if (!grow((void **)&paths->files, paths->count, sizeof(char *))) return no_memory(NULL, error);
    paths->files[paths->count] = NULL;
    return sort_listed(paths, error);
}

fst_status fst_paths_resolve(const char *const *list, fst_paths *out, fst_error *error) {
    memset(out, 0, sizeof *out);
    fst_status status = resolve(list, out, error);
    if (status) fst_paths_free(out);
    return status;
}
