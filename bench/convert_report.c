/* Results as a table, as JSON, as a picture. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "convert.h"
#include "fst.h"

static const char *dtype_name(int dtype) { return fst_dtype_name((fst_dtype)dtype); }
static double traffic(const convert_case *c) { return (double)(c->bytes_read + c->bytes_written); }

double convert_gb_per_s(const convert_result *r) { return r->ms > 0 ? traffic(&r->what) / r->ms / 1e6 : 0; }

/* Of the copies in the largest size. */
double convert_copy_gb_per_s(const convert_result *results, size_t count) {
    double *rates = calloc(count + 1, sizeof *rates), rate = 0;
    uint64_t largest = 0;
    size_t rates_count = 0;
    if (!rates) bench_die("out of memory");
    for (size_t i = 0; i < count; i++)
        if (results[i].what.bytes > largest) largest = results[i].what.bytes;
    for (size_t i = 0; i < count; i++)
        if (results[i].what.bytes == largest && results[i].copy_ms > 0)
            rates[rates_count++] = traffic(&results[i].what) / results[i].copy_ms / 1e6;
    if (rates_count) rate = bench_median(rates, rates_count);
    free(rates);
    return rate;
}

void convert_print_head(void) {
    printf("%-18s %-11s %-11s %-34s %9s %9s %8s %6s\n", "kernel", "src", "dst", "", "MiB", "ms", "GB/s",
           "share");
}

void convert_print(const convert_result *r) {
    const convert_spec *s = &r->what.spec;
    printf("%-18s %-11s %-11s %-34s %9.1f", convert_kernel_name(s->kernel), dtype_name(s->src),
           dtype_name(s->dst), s->variant, traffic(&r->what) / 1048576);
    if (r->ms > 0) printf(" %9.4f %8.1f %6.3f", r->ms, convert_gb_per_s(r), r->copy_ms / r->ms);
    printf("%s\n", !r->ok ? "  WRONG" : r->ms > 0 ? "" : "  right");
    fflush(stdout);
}

static void json_result(FILE *file, const convert_result *r) {
    const convert_spec *s = &r->what.spec;
    fprintf(
        file,
        "    {\"kernel\": \"%s\", \"src\": \"%s\", \"dst\": \"%s\", \"variant\": \"%s\", \"bytes\": %llu, "
        "\"bytes_read\": %llu, \"bytes_written\": %llu, ",
        convert_kernel_name(s->kernel), dtype_name(s->src), dtype_name(s->dst), s->variant,
        (unsigned long long)r->what.bytes, (unsigned long long)r->what.bytes_read,
        (unsigned long long)r->what.bytes_written);
    if (r->ms > 0)
        fprintf(file,
                "\"ms\": %.6f, \"gb_per_s\": %.3f, \"share_of_copy\": %.4f, \"copy_ms\": %.6f, "
                "\"launches\": %u, ",
                r->ms, convert_gb_per_s(r), r->copy_ms / r->ms, r->copy_ms, r->launches);
    else fprintf(file, "\"ms\": null, \"gb_per_s\": null, \"share_of_copy\": null, ");
    fprintf(file, "\"ok\": %s}", r->ok ? "true" : "false");
}

static FILE *create(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) bench_die("cannot write %s", path);
    return file;
}

void convert_json(const char *path, const fst_gpu *gpu, unsigned threads, const convert_result *results,
                  size_t count) {
    char machine[512], commit[64], date[32];
    FILE *file = create(path);
    bench_machine(machine, sizeof machine, gpu);
    bench_commit(commit, sizeof commit);
    bench_date(date, sizeof date);
    fprintf(file, "{\n  \"machine\": ");
    bench_json_string(file, machine);
    fprintf(file, ",\n  \"device\": \"%s\",\n  \"date\": \"%s\",\n  \"commit\": ", gpu->label, date);
    bench_json_string(file, commit);
    fprintf(file,
            ",\n  \"target\": \"%s\",\n  \"threads\": %u,\n  \"copy_gb_per_s\": %.3f,\n  \"results\": [\n",
            gpu->kernels->target, threads, convert_copy_gb_per_s(results, count));
    for (size_t i = 0; i < count; i++) {
        json_result(file, &results[i]);
        fputs(i + 1 < count ? ",\n" : "\n", file);
    }
    fprintf(file, "  ]\n}\n");
    if (fclose(file)) bench_die("cannot write %s", path);
}

/* ---- The picture: a bar a case, in its largest size, and the copy as a line ---- */

enum { LABEL = 430, UNIT = 480, BAR = 12, STEP = 16, TOP = 56, GAP = 10 };

/* Whether it is the last, which is the largest, size of its case. */
static int is_drawn(const convert_result *results, size_t count, size_t i) {
    char name[128], next[128];
    if (results[i].ms <= 0) return 0;
    if (i + 1 == count) return 1;
    convert_name(&results[i].what.spec, name, sizeof name);
    convert_name(&results[i + 1].what.spec, next, sizeof next);
    return strcmp(name, next) != 0;
}

static void text(FILE *file, double x, double y, const char *anchor, const char *string) {
    fprintf(file, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    for (; *string; string++) {
        if (*string == '>') fputs("&gt;", file);
        else if (*string == '<') fputs("&lt;", file);
        else if (*string == '&') fputs("&amp;", file);
        else fputc(*string, file);
    }
    fputs("</text>\n", file);
}

static void bar(FILE *file, const convert_result *r, double y) {
    char label[160];
    const double share = r->copy_ms / r->ms, width = (share < 1.25 ? share : 1.25) * UNIT;
    convert_name(&r->what.spec, label, sizeof label);
    text(file, LABEL - 8, y + BAR - 2, "end", label);
    fprintf(file, "<rect x=\"%d\" y=\"%.1f\" width=\"%.1f\" height=\"%d\" fill=\"hsl(%d 45%% 55%%)\"/>\n",
            LABEL, y, width, BAR, (int)r->what.spec.kernel * 360 / CONVERT_KERNELS);
    snprintf(label, sizeof label, "%.2f, %.0f GB/s", share, convert_gb_per_s(r));
    fputs("<g class=\"value\">", file);
    text(file, LABEL + 6, y + BAR - 2, "start", label);
    fputs("</g>\n", file);
}

static void axis(FILE *file, double bottom) {
    for (int tenth = 0; tenth <= 12; tenth += 2) {
        char label[16];
        const double x = LABEL + UNIT * tenth / 10.0;
        snprintf(label, sizeof label, "%.1f", tenth / 10.0);
        fprintf(file, "<path d=\"M%.1f %d V%.1f\" stroke=\"#ccc\"/>\n", x, TOP - 8, bottom);
        text(file, x, TOP - 12, "middle", label);
    }
}

void convert_plot(const char *path, const fst_gpu *gpu, const convert_result *results, size_t count) {
    char title[256];
    double y = TOP, bottom = TOP;
    int kernel = -1;
    FILE *file = create(path);
    for (size_t i = 0; i < count; i++) {
        if (!is_drawn(results, count, i)) continue;
        bottom += STEP + (kernel >= 0 && kernel != (int)results[i].what.spec.kernel ? GAP : 0);
        kernel = (int)results[i].what.spec.kernel;
    }
    fprintf(
        file,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%.0f\" font-family=\"sans-serif\" "
        "font-size=\"11\">\n<style>.value text{font-size:9px}</style>\n"
        "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
        LABEL + UNIT * 5 / 4 + 20, bottom + 16);
    snprintf(title, sizeof title, "Share of the copy on %s (%s), %.0f GB/s read and written", gpu->name,
             gpu->label, convert_copy_gb_per_s(results, count));
    text(file, LABEL, 18, "start", title);
    axis(file, bottom);
    kernel = -1;
    for (size_t i = 0; i < count; i++) {
        if (!is_drawn(results, count, i)) continue;
        y += kernel >= 0 && kernel != (int)results[i].what.spec.kernel ? GAP : 0;
        kernel = (int)results[i].what.spec.kernel;
        bar(file, &results[i], y);
        y += STEP;
    }
    fprintf(file, "<path d=\"M%d %d V%.1f\" stroke=\"#c00\" stroke-width=\"1.5\"/>\n</svg>\n", LABEL + UNIT,
            TOP - 8, bottom);
    if (fclose(file)) bench_die("cannot write %s", path);
}
