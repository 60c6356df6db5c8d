/* fst inspect: what the headers say. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

static fst_tensor tensor_at(const fst_model *model, size_t i) {
    fst_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    fst_model_at(model, i, &tensor);
    return tensor;
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static yyjson_mut_val *json_metadata(yyjson_mut_doc *doc, const fst_model *model, size_t file) {
    if (!fst_model_has_metadata(model, file)) return must(yyjson_mut_null(doc));
    yyjson_mut_val *object = must(yyjson_mut_obj(doc));
    for (size_t i = 0; i < fst_model_metadata_count(model, file); i++) {
        fst_string key, value;
        if (fst_model_metadata_at(model, file, i, &key, &value)) continue;
        yyjson_mut_obj_add(object, must(yyjson_mut_strn(doc, key.data, key.length)),
                           must(yyjson_mut_strn(doc, value.data, value.length)));
    }
    return object;
}

/* The format, the weight's name and the tensors that belong to it. */
static void json_quantization(yyjson_mut_doc *doc, yyjson_mut_val *object, const fst_model *model, size_t i) {
    fst_quantization q;
    if (fst_model_quantization(model, i, &q)) return;
    yyjson_mut_obj_add_str(doc, object, "format", q.format);
    yyjson_mut_obj_add_str(doc, object, "weight", q.name);
    yyjson_mut_val *companions = must(yyjson_mut_obj_add_arr(doc, object, "companions"));
    for (size_t k = 0; k < q.companions_count; k++)
        if (!yyjson_mut_arr_add_str(doc, companions, tensor_at(model, q.companions[k]).name)) must(NULL);
}

static yyjson_mut_val *json_tensor(yyjson_mut_doc *doc, const fst_model *model, size_t i) {
    fst_tensor found = tensor_at(model, i);
    const fst_tensor *tensor = &found;
    yyjson_mut_val *object = must(yyjson_mut_obj(doc));
    yyjson_mut_val *shape = must(yyjson_mut_arr_with_uint64(doc, tensor->shape, tensor->ndim));
    yyjson_mut_obj_add_str(doc, object, "name", tensor->name);
    yyjson_mut_obj_add_str(doc, object, "dtype", fst_dtype_name(tensor->stored_dtype));
    yyjson_mut_obj_add_val(doc, object, "shape", shape);
    yyjson_mut_obj_add_uint(doc, object, "offset", tensor->file_offset);
    if (!yyjson_mut_obj_add_uint(doc, object, "nbytes", tensor->file_nbytes)) must(NULL);
    json_quantization(doc, object, model, i);
    return object;
}

static void print_json(const fst_model *model, FILE *out) {
    yyjson_mut_doc *doc = must(yyjson_mut_doc_new(NULL));
    yyjson_mut_val *root = must(yyjson_mut_obj(doc)), *files = must(yyjson_mut_arr(doc));
    yyjson_mut_doc_set_root(doc, root);
    yyjson_mut_obj_add_val(doc, root, "files", files);
    size_t i = 0;
    for (size_t f = 0; f < fst_model_file_count(model); f++) {
        yyjson_mut_val *file = must(yyjson_mut_arr_add_obj(doc, files));
        json_add_text(doc, file, "path", fst_model_file_path(model, f));
        yyjson_mut_obj_add_val(doc, file, "metadata", json_metadata(doc, model, f));
        yyjson_mut_val *tensors = must(yyjson_mut_obj_add_arr(doc, file, "tensors"));
        for (; i < fst_model_count(model); i++) {
            fst_tensor tensor = tensor_at(model, i);
            if ((size_t)tensor.file != f) break;
            yyjson_mut_arr_append(tensors, json_tensor(doc, model, i));
        }
    }
    const fst_error *wrong = fst_model_quantization_error(model);
    if (wrong) json_add_text(doc, root, "quantization_error", wrong->text);
    json_print(doc, out);
}

/* ---- Columns --------------------------------------------------------------------------------- */

typedef struct row {
    char *name, *shape;
    const char *dtype;
    uint64_t nbytes;
    char *quantized; /* or "" */
} row;

static char *format_shape(const fst_tensor *tensor) {
    char *text = must(malloc(tensor->ndim * 22 + 3)), *end = text;
    *end++ = '[';
    for (size_t i = 0; i < tensor->ndim; i++)
        end += sprintf(end, "%s%" PRIu64, i ? ", " : "", tensor->shape[i]);
    strcpy(end, "]");
    return text;
}

/* "fp8-block: x.weight_scale_inv", or "". */
static char *format_quantization(const fst_model *model, size_t i) {
    fst_quantization q;
    if (fst_model_quantization(model, i, &q)) return must(strdup(""));
    size_t room = strlen(q.format) + 3;
    for (size_t k = 0; k < q.companions_count; k++)
        room += strlen(tensor_at(model, q.companions[k]).name) + 2;
    char *plain = must(malloc(room));
    strcpy(plain, q.format);
    for (size_t k = 0; k < q.companions_count; k++) {
        strcat(plain, k ? ", " : ": ");
        strcat(plain, tensor_at(model, q.companions[k]).name);
    }
    char *text = escaped(plain, strlen(plain));
    free(plain);
    return text;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static void print_cell(FILE *out, const char *text, size_t width) {
    fprintf(out, "%s%*s  ", text, (int)(width - text_width(text)), "");
}

static void print_rows(const row *rows, size_t count, FILE *out) {
    size_t names = strlen("name"), dtypes = strlen("dtype"), shapes = strlen("shape");
    for (size_t i = 0; i < count; i++) {
        names = larger(names, text_width(rows[i].name));
        dtypes = larger(dtypes, strlen(rows[i].dtype));
        shapes = larger(shapes, strlen(rows[i].shape));
    }
    for (size_t i = 0; i <= count; i++) {
        fputs("  ", out);
        print_cell(out, i ? rows[i - 1].name : "name", names);
        print_cell(out, i ? rows[i - 1].dtype : "dtype", dtypes);
        print_cell(out, i ? rows[i - 1].shape : "shape", shapes);
        if (i)
            fprintf(out, "%14" PRIu64 "%s%s\n", rows[i - 1].nbytes, *rows[i - 1].quantized ? "  " : "",
                    rows[i - 1].quantized);
        else fprintf(out, "%14s\n", "bytes");
    }
}

static void print_metadata(const fst_model *model, size_t file, FILE *out) {
    for (size_t i = 0; i < fst_model_metadata_count(model, file); i++) {
        fst_string key, value;
        if (fst_model_metadata_at(model, file, i, &key, &value)) continue;
        char *left = escaped(key.data, key.length), *right = escaped(value.data, value.length);
        fprintf(out, "  metadata %s: %s\n", left, right);
        free(left);
        free(right);
    }
}

/* Tensors `first` up to `end` are those of the file. */
static void print_file(const fst_model *model, size_t file, size_t first, size_t end, FILE *out) {
    const char *path = fst_model_file_path(model, file);
    char *name = escaped(path, strlen(path)), size[32];
    row *rows = must(calloc(end - first + 1, sizeof *rows));
    uint64_t total = 0;
    for (size_t i = first; i < end; i++) {
        fst_tensor tensor = tensor_at(model, i);
        rows[i - first] =
            (row){escaped(tensor.name, strlen(tensor.name)), format_shape(&tensor),
                  fst_dtype_name(tensor.stored_dtype), tensor.file_nbytes, format_quantization(model, i)};
        total += tensor.file_nbytes;
    }
    fprintf(out, "%s: %zu tensor%s, %s\n", name, end - first, end - first == 1 ? "" : "s",
            format_bytes(size, total));
    print_metadata(model, file, out);
    if (end > first) print_rows(rows, end - first, out);
    for (size_t i = 0; i < end - first; i++) {
        free(rows[i].name);
        free(rows[i].shape);
        free(rows[i].quantized);
    }
    free(rows);
    free(name);
}

static void print_columns(const fst_model *model, FILE *out) {
    size_t first = 0, count = fst_model_count(model);
    for (size_t f = 0; f < fst_model_file_count(model); f++) {
        size_t end = first;
        while (end < count && (size_t)tensor_at(model, end).file == f) end++;
        if (f) fputc('\n', out);
        print_file(model, f, first, end, out);
        first = end;
    }
    const fst_error *wrong = fst_model_quantization_error(model);
    if (wrong) fprintf(out, "\nnot to be dequantized: %s: %s\n", fst_status_name(wrong->status), wrong->text);
}

int run_inspect(const arguments *args, FILE *out) {
    fst_model *model;
    fst_error error;
    if (fst_open(args->paths, NULL, &model, &error)) {
        report_error(&error);
        return EXIT_WRONG;
    }
    if (args->json) print_json(model, out);
    else print_columns(model, out);
    fst_model_free(model);
    return EXIT_OK;
}
