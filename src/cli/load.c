/* fst load and fst convert: the latter is a load whose result is written. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cli.h"

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double rate(const fst_stats *stats) {
    return stats->seconds > 0 ? (double)stats->bytes_read / stats->seconds / 1e9 : 0;
}

static void print_json(const arguments *args, const fst_model *model, const fst_stats *stats,
                       double seconds_write, FILE *out) {
    yyjson_mut_doc *doc = must(yyjson_mut_doc_new(NULL));
    yyjson_mut_val *root = must(yyjson_mut_obj(doc));
    yyjson_mut_doc_set_root(doc, root);
    yyjson_mut_obj_add_uint(doc, root, "files", fst_model_file_count(model));
    yyjson_mut_obj_add_uint(doc, root, "tensors", fst_model_count(model));
    yyjson_mut_obj_add_uint(doc, root, "bytes_read", stats->bytes_read);
    yyjson_mut_obj_add_uint(doc, root, "bytes_out", stats->bytes_out);
    yyjson_mut_obj_add_real(doc, root, "seconds", stats->seconds);
    if (args->output) yyjson_mut_obj_add_real(doc, root, "seconds_write", seconds_write);
    yyjson_mut_obj_add_real(doc, root, "gb_per_s", rate(stats));
    json_add_text(doc, root, "device", stats->device);
    json_add_text(doc, root, "device_name", stats->device_name);
    json_add_text(doc, root, "device_reason", stats->device_reason);
    json_add_text(doc, root, "limit", stats->limit);
    yyjson_mut_obj_add_uint(doc, root, "peak_device_bytes", stats->peak_device_bytes);
    yyjson_mut_obj_add_uint(doc, root, "pinned_bytes", stats->pinned_bytes);
    yyjson_mut_obj_add_uint(doc, root, "threads", stats->threads);
    json_add_text(doc, root, "reader", stats->reader);
    yyjson_mut_obj_add_int(doc, root, "numa_node", stats->numa_node);
    const struct {
        const char *key;
        uint64_t value;
    } counts[] = {{"bytes_cached", stats->bytes_cached},
                  {"bytes_buffered", stats->bytes_buffered},
                  {"bytes_direct", stats->bytes_direct},
                  {"chunks", stats->chunks},
                  {"launches", stats->launches},
                  {"slots", stats->slots},
                  {"slots_unpinned", stats->slots_unpinned},
                  {"slot_bytes", stats->slot_bytes},
                  {"nan_scales", stats->nan_scales},
                  {"bare_weights", stats->bare_weights}};
    const struct {
        const char *key;
        double value;
    } times[] = {{"open_seconds", stats->open_seconds},        {"allocate_seconds", stats->allocate_seconds},
                 {"read_seconds", stats->read_seconds},        {"wait_seconds", stats->wait_seconds},
                 {"copy_seconds", stats->copy_seconds},        {"convert_seconds", stats->convert_seconds},
                 {"kernel_seconds", stats->kernel_seconds},    {"slots_busy", stats->slots_busy},
                 {"consumer_seconds", stats->consumer_seconds}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        yyjson_mut_obj_add_uint(doc, root, counts[i].key, counts[i].value);
    for (size_t i = 0; i < sizeof times / sizeof *times; i++)
        yyjson_mut_obj_add_real(doc, root, times[i].key, times[i].value);
    yyjson_mut_obj_add_uint(doc, root, "nans", stats->nans);
    yyjson_mut_obj_add_uint(doc, root, "bytes_needed", stats->bytes_needed);
    yyjson_mut_obj_add_uint(doc, root, "bytes_storage", stats->bytes_storage);
    yyjson_mut_obj_add_uint(doc, root, "shards_unused", stats->shards_unused);
    if (!yyjson_mut_obj_add_uint(doc, root, "tensors_ignored", stats->tensors_ignored)) must(NULL);
    json_print(doc, out);
}

/* Where the bytes came from, and how long each stage worked, as a share of the time that its threads had. */
static void print_stages(const fst_stats *stats, FILE *out) {
    char cached[32], buffered[32], direct[32];
    double all = stats->seconds * stats->threads, share = all > 0 ? 100 / all : 0;
    fprintf(out, "source   %s cached, %s buffered, %s direct; %s\n",
            format_bytes(cached, stats->bytes_cached), format_bytes(buffered, stats->bytes_buffered),
            format_bytes(direct, stats->bytes_direct), stats->reader);
    fprintf(out, "stages   open %.1f ms, allocate %.1f ms; threads: reading %.0f %%",
            stats->open_seconds * 1e3, stats->allocate_seconds * 1e3, stats->read_seconds * share);
    if (stats->kernel_seconds > 0) fprintf(out, ", converting %.0f %%", stats->kernel_seconds * share);
    if (stats->pinned_bytes)
        fprintf(
            out,
            ", waiting for copies %.0f %%; slots busy %.0f %%; copies %.0f %%, kernels %.0f %% of their streams",
            stats->wait_seconds * share, stats->slots_busy * 100, stats->copy_seconds * share,
            stats->convert_seconds * share);
    fprintf(out, "\n");
    if (stats->numa_node >= 0) fprintf(out, "node     %d: the ring and its threads\n", stats->numa_node);
    if (stats->slots_unpinned)
        fprintf(out, "note     %u bounce slots could not be pinned\n", stats->slots_unpinned);
}

static void print_lines(const arguments *args, const fst_model *model, const fst_stats *stats,
                        double seconds_write, FILE *out) {
    char bytes[32], peak[32];
    fprintf(out, "device   %s (%s): %s\n", stats->device, stats->device_name, stats->device_reason);
    fprintf(out, "files    %zu\n", fst_model_file_count(model));
    fprintf(out, "tensors  %zu", fst_model_count(model));
    if (stats->tensors_ignored)
        fprintf(out, ", %" PRIu64 " ignored: not in the index%s", stats->tensors_ignored,
                args->shards ? ", or left out" : "");
    format_bytes(bytes, stats->bytes_read);
    fprintf(out, "\nread     %s in %.3f s: %.2f GB/s with %u threads, limited by: %s\n", bytes,
            stats->seconds, rate(stats), stats->threads, stats->limit);
    print_stages(stats, out);
    fprintf(out, "result   %s%s%s%s\n", format_bytes(bytes, stats->bytes_out),
            args->scale  ? ", weights as "
            : args->cast ? ", floats as "
                         : "",
            args->cast ? fst_dtype_name(args->cast) : "", args->scale ? " under computed scales" : "");
    report_weights(stats->nans, stats->nan_scales, stats->bare_weights, out);
    fprintf(out, "memory   %s on the device at the peak", format_bytes(peak, stats->peak_device_bytes));
    fprintf(out, ", %s pinned\n", format_bytes(bytes, stats->pinned_bytes));
    if (args->output) {
        char *name = escaped(args->output, strlen(args->output));
        fprintf(out, "written  %s in %.3f s\n", name, seconds_write);
        free(name);
    }
}

static fst_status load(const arguments *args, fst_model **model, fst_error *error) {
    progress bar = progress_new("load");
    fst_options options = options_for(args, &bar);
    fst_status status = fst_load(args->paths, &options, model, error);
    progress_clear(&bar);
    return status;
}

static fst_status save(const arguments *args, const fst_model *model, double *seconds, fst_error *error) {
    progress bar = progress_new("write");
    fst_save_options options = {sizeof options, progress_tick, &bar, interrupt_flag()};
    double started = now();
    fst_status status = fst_save(model, args->output, &options, error);
    *seconds = now() - started;
    progress_clear(&bar);
    return status;
}

int run_load(const arguments *args, FILE *out) {
    interrupt_install();
    fst_model *model;
    fst_error error;
    if (load(args, &model, &error)) return report_failed(&error);
    double seconds_write = 0;
    if (args->output && save(args, model, &seconds_write, &error)) {
        fst_model_free(model);
        return report_failed(&error);
    }
    fst_stats stats = {.size = sizeof stats};
    fst_model_stats(model, &stats);
    if (!args->json) warn_unused(stats.shards_unused);
    if (args->json) print_json(args, model, &stats, seconds_write, out);
    else print_lines(args, model, &stats, seconds_write, out);
    fst_model_free(model);
    return EXIT_OK;
}
