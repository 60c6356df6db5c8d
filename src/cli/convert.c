/* fst convert to a directory. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

static fst_status convert(const arguments *args, fst_convert_stats *stats, fst_error *error) {
    progress bar = progress_new("convert");
    fst_options options = options_for(args, &bar);
    fst_convert_options more = {sizeof more, args->shard_bytes};
    fst_status status = fst_convert_directory(args->paths[0], args->output, &options, &more, stats, error);
    progress_clear(&bar);
    return status;
}

static double rate(const fst_convert_stats *stats) {
    return stats->seconds > 0 ? (double)stats->bytes_out / stats->seconds / 1e9 : 0;
}

static void print_json(const fst_convert_stats *stats, FILE *out) {
    yyjson_mut_doc *doc = must(yyjson_mut_doc_new(NULL));
    yyjson_mut_val *root = must(yyjson_mut_obj(doc));
    yyjson_mut_doc_set_root(doc, root);
    yyjson_mut_obj_add_uint(doc, root, "tensors", stats->tensors);
    yyjson_mut_obj_add_uint(doc, root, "shards", stats->shards);
    yyjson_mut_obj_add_uint(doc, root, "shards_kept", stats->shards_kept);
    yyjson_mut_obj_add_uint(doc, root, "files_copied", stats->files_copied);
    yyjson_mut_obj_add_uint(doc, root, "bytes_read", stats->bytes_read);
    yyjson_mut_obj_add_uint(doc, root, "bytes_out", stats->bytes_out);
    yyjson_mut_obj_add_real(doc, root, "seconds", stats->seconds);
    yyjson_mut_obj_add_real(doc, root, "write_seconds", stats->write_seconds);
    yyjson_mut_obj_add_real(doc, root, "sync_seconds", stats->sync_seconds);
    yyjson_mut_obj_add_real(doc, root, "gb_per_s", rate(stats));
    yyjson_mut_obj_add_uint(doc, root, "peak_bytes", stats->peak_bytes);
    yyjson_mut_obj_add_uint(doc, root, "nans", stats->nans);
    yyjson_mut_obj_add_uint(doc, root, "nan_scales", stats->nan_scales);
    yyjson_mut_obj_add_uint(doc, root, "bare_weights", stats->bare_weights);
    yyjson_mut_obj_add_uint(doc, root, "bytes_needed", stats->bytes_needed);
    yyjson_mut_obj_add_uint(doc, root, "bytes_storage", stats->bytes_storage);
    yyjson_mut_obj_add_uint(doc, root, "shards_unused", stats->shards_unused);
    json_add_text(doc, root, "device", stats->device);
    json_add_text(doc, root, "device_name", stats->device_name);
    json_print(doc, out);
}

static void print_lines(const arguments *args, const fst_convert_stats *stats, FILE *out) {
    char bytes[32], *name = escaped(args->output, strlen(args->output));
    fprintf(out, "device   %s (%s)\n", stats->device, stats->device_name);
    fprintf(out, "read     %s\n", format_bytes(bytes, stats->bytes_read));
    fprintf(out, "written  %s: %" PRIu64 " tensors, %s in %" PRIu64 " files", name, stats->tensors,
            format_bytes(bytes, stats->bytes_out), stats->shards);
    if (stats->shards_kept) fprintf(out, ", of which %" PRIu64 " were there", stats->shards_kept);
    fprintf(out, "; %" PRIu64 " other files copied\n", stats->files_copied);
    fprintf(out, "time     %.3f s: %.2f GB/s; writing %.3f s, waiting for the storage %.3f s\n",
            stats->seconds, rate(stats), stats->write_seconds, stats->sync_seconds);
    report_weights(stats->nans, stats->nan_scales, stats->bare_weights, out);
    fprintf(out, "memory   %s at the peak\n", format_bytes(bytes, stats->peak_bytes));
    free(name);
}

int run_convert(const arguments *args, FILE *out) {
    interrupt_install();
    fst_convert_stats stats = {.size = sizeof stats};
    fst_error error;
    if (convert(args, &stats, &error)) return report_failed(&error);
    if (!args->json) warn_unused(stats.shards_unused);
    if (args->json) print_json(&stats, out);
    else print_lines(args, &stats, out);
    return EXIT_OK;
}
