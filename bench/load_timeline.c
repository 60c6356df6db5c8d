/* A picture of one load: who waits for whom. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "load.h"

enum {
    WIDTH = 1400,
    LEFT = 90,
    RIGHT = 40,
    BUCKETS = 280,
    TICKS_EACH = 60,
    TICKS = BUCKETS * TICKS_EACH,
    SHARES = 140,
    SHARES_TOP = 100,
    LINK_HEIGHT = 40,
    DETAIL_TOP = SHARES_TOP + SHARES + LINK_HEIGHT + 56
};
#define DETAIL 0.1 /* seconds that are shown slot by slot */

typedef enum state { IDLE, COPYING, MEMORY, READING, STORAGE, STATES } state;
static const char *const colours[STATES] = {"#eee", "#f2a33c", "#d64550", "#4c78a8", "#1d3557"};
static const char *const labels[STATES] = {
    "nothing to do, queueing, starting", "copy queued or under way (thread: waits for a slot)",
    "waits for device memory", "reads from the page cache", "reads from storage"};
#define LINK "#5a9367"
#define OPENING "#c9b8d8"

typedef struct bar {
    unsigned line; /* a thread's; behind the threads', a slot's */
    state state;
    double begin, end;
} bar;

typedef struct picture {
    FILE *file;
    bar *bars;
    size_t count, room;
    unsigned workers, slots;
    double seconds, link_busy;
    double *link; /* begins and ends of copies, if the link did one after the other at its full rate */
    size_t link_count;
    unsigned char *threads; /* TICKS states of each */
} picture;

/* ---- What happened ------------------------------------------------------------------------------------ */

static int by_begin(const void *x, const void *y) {
    double a = ((const fst_trace_record *)x)->begin, b = ((const fst_trace_record *)y)->begin;
    return (a > b) - (a < b);
}

static int by_line(const void *x, const void *y) {
    const bar *a = x, *b = y;
    if (a->line != b->line) return a->line < b->line ? -1 : 1;
    return (a->begin > b->begin) - (a->begin < b->begin);
}

static void add_bar(picture *p, unsigned line, state s, double begin, double end) {
    if (end > begin) p->bars[p->count++] = (bar){line, s, begin, end};
}

static void add_record(picture *p, const fst_trace_record *r, double start) {
    double begin = r->begin - start, end = r->end - start, full = r->full - start;
    if (r->kind == FST_TRACE_READ) {
        add_bar(p, r->worker, r->how == FST_HOW_CACHED ? READING : STORAGE, begin, end);
        return;
    }
    if (begin - full > 20e-6) add_bar(p, r->worker, MEMORY, full, begin);
    add_bar(p, p->workers + r->slot, COPYING, begin, end);
}

static void simulate_link(picture *p, const fst_trace_record *records, size_t count, double start,
                          double rate) {
    double until = 0;
    p->link = calloc(2 * count + 1, sizeof *p->link);
    if (!p->link) bench_die("out of memory");
    for (size_t i = 0; i < count && rate > 0; i++) {
        if (records[i].kind != FST_TRACE_COPY) continue;
        double queued = records[i].begin - start, begin = queued > until ? queued : until;
        until = begin + records[i].nbytes / (rate * 1e9);
        p->link[p->link_count++] = begin;
        p->link[p->link_count++] = until;
        p->link_busy += until - begin;
    }
}

static size_t tick_of(const picture *p, double time) {
    double at = time / p->seconds * TICKS + 0.5;
    return at <= 0 ? 0 : at >= TICKS ? TICKS : (size_t)at;
}

/* A thread that does nothing else, between what it did first and last, waits for a slot. */
static void paint_threads(picture *p) {
    p->threads = calloc(p->workers, TICKS);
    if (!p->threads) bench_die("out of memory");
    size_t until = 0;
    for (size_t i = 0; i < p->count && p->bars[i].line < p->workers; i++) {
        const bar *b = &p->bars[i];
        unsigned char *ticks = p->threads + (size_t)b->line * TICKS;
        size_t begin = tick_of(p, b->begin), end = tick_of(p, b->end);
        if (i && b->line == p->bars[i - 1].line)
            for (; until < begin; until++) ticks[until] = COPYING;
        for (size_t t = begin; t < end; t++) ticks[t] = (unsigned char)b->state;
        until = end;
    }
}

/* ---- Drawing ------------------------------------------------------------------------------------------- */

static const double inner = WIDTH - LEFT - RIGHT;

static void put_text(picture *p, double x, double y, const char *anchor, const char *text) {
    fprintf(p->file, "<text x=\"%.0f\" y=\"%.0f\" text-anchor=\"%s\">", x, y, anchor);
    for (; *text; text++) {
        if (*text == '<') fputs("&lt;", p->file);
        else if (*text == '&') fputs("&amp;", p->file);
        else fputc(*text, p->file);
    }
    fputs("</text>\n", p->file);
}

static void put_axis(picture *p, double top, double bottom, double seconds) {
    double step = 1e-6;
    for (unsigned i = 0; seconds / step > 12; i++) step *= i % 3 == 1 ? 2.5 : 2;
    for (double t = 0; t <= seconds * 1.0001; t += step) {
        char label[32];
        double x = LEFT + t / seconds * inner;
        snprintf(label, sizeof label, "%g ms", t * 1e3 > 1e-9 ? t * 1e3 : 0);
        fprintf(p->file, "<path d=\"M%.1f %.0fV%.0f\" stroke=\"#999\" stroke-width=\".5\"/>\n", x, top,
                bottom);
        put_text(p, x, bottom + 14, "middle", label);
    }
}

/* Tenths of a pixel, or compact pictures would have uneven bars. */
static long tenths(double time, double seconds) {
    return (long)((time < 0 ? 0 : time > seconds ? seconds : time) / seconds * inner * 10 + 0.5);
}

typedef struct stroke {
    long at;
    int drawing;
} stroke;

static void begin_bars(picture *p, stroke *pen, double y, double height, const char *colour) {
    *pen = (stroke){0, 0};
    fprintf(p->file,
            "<path transform=\"translate(%d %.1f)scale(.1 1)\" stroke=\"%s\" stroke-width=\"%.1f\" d=\"M0 0",
            LEFT, y + height / 2, colour, height);
}

static void put_bar(picture *p, stroke *pen, double begin, double end, double seconds) {
    long from = tenths(begin, seconds), to = tenths(end, seconds);
    if (begin >= seconds) return;
    if (from < pen->at) from = pen->at;
    if (to <= from) to = from + 1;
    if (from != pen->at || !pen->drawing) fprintf(p->file, "m%ld 0", from - pen->at);
    fprintf(p->file, "h%ld", to - from);
    *pen = (stroke){to, 1};
}

static void end_bars(picture *p) { fputs("\"/>\n", p->file); }

static void put_open(picture *p, double top, double height, double open_seconds, double seconds) {
    fprintf(p->file, "<rect x=\"%d\" y=\"%.0f\" width=\"%.1f\" height=\"%.0f\" fill=\"%s\"/>\n", LEFT, top,
            (double)tenths(open_seconds, seconds) / 10, height, OPENING);
}

static void put_link(picture *p, double y, double height, double seconds) {
    stroke pen;
    if (!p->link_count) return;
    put_text(p, LEFT - 6, y + height - 3, "end", "link");
    begin_bars(p, &pen, y, height, LINK);
    for (size_t i = 0; i < p->link_count; i += 2) {
        double begin = p->link[i], end = p->link[i + 1];
        while (i + 2 < p->link_count && p->link[i + 2] - end < seconds / inner / 10)
            end = p->link[i += 2, i + 1];
        put_bar(p, &pen, begin, end, seconds);
    }
    end_bars(p);
}

/* How busy the link is, bucket by bucket. */
static void put_link_shares(picture *p, double bottom, double height) {
    double busy[BUCKETS] = {0}, each = p->seconds / BUCKETS;
    if (!p->link_count) return;
    for (size_t i = 0; i < p->link_count; i += 2)
        for (unsigned b = (unsigned)(p->link[i] / each); b < BUCKETS && b * each < p->link[i + 1]; b++) {
            double from = p->link[i] > b * each ? p->link[i] : b * each;
            double to = p->link[i + 1] < (b + 1) * each ? p->link[i + 1] : (b + 1) * each;
            busy[b] += (to - from) / each;
        }
    put_text(p, LEFT - 6, bottom - height / 2 + 4, "end", "link's use");
    fprintf(p->file,
            "<rect x=\"%d\" y=\"%.0f\" width=\"%.0f\" height=\"%.0f\" fill=\"%s\"/>\n"
            "<path transform=\"translate(%d %.0f)\" fill=\"%s\" d=\"M0 0",
            LEFT, bottom - height, inner, height, colours[IDLE], LEFT, bottom, LINK);
    for (unsigned b = 0; b < BUCKETS; b++)
        fprintf(p->file, "V%.1fH%.1f", -busy[b] * height, (b + 1) * inner / BUCKETS);
    fputs("V0Z\"/>\n", p->file);
}

static double line_height(const picture *p) {
    double height = 420.0 / (p->workers + p->slots);
    return height > 14 ? 14 : height < 2 ? 2 : height;
}

static double lines_height(const picture *p) {
    return line_height(p) * (p->workers + p->slots + 2.0 / 3) + 24;
}

/* One line a thread, then one a slot. */
static void put_lines(picture *p, double top, double seconds, double open_seconds) {
    unsigned lines = p->workers + p->slots;
    double height = line_height(p), gap = height / 3, bottom = top + lines_height(p), y = top;
    size_t i = 0;
    put_open(p, top, bottom - top, open_seconds, seconds);
    put_axis(p, top, bottom, seconds);
    for (unsigned line = 0; line < lines; line++, y += height) {
        char label[32];
        size_t from = i;
        unsigned in_group = line < p->workers ? line : line - p->workers;
        if (in_group == 0) y += gap;
        if (height > 10 || in_group % 4 == 0) {
            snprintf(label, sizeof label, "%s %u", line < p->workers ? "thread" : "slot", in_group);
            put_text(p, LEFT - 6, y + height / 2 + 4, "end", label);
        }
        while (i < p->count && p->bars[i].line == line) i++;
        for (state s = COPYING; s < STATES; s++) {
            stroke pen;
            size_t k = from;
            while (k < i && (p->bars[k].state != s || p->bars[k].begin >= seconds)) k++;
            if (k == i) continue;
            begin_bars(p, &pen, y, height * 0.9, colours[s]);
            for (; k < i; k++)
                if (p->bars[k].state == s) put_bar(p, &pen, p->bars[k].begin, p->bars[k].end, seconds);
            end_bars(p);
        }
    }
    put_link(p, bottom - 18, 14, seconds);
}

/* How many of the threads are in states of at least `least`, bucket by bucket. */
static void put_area(picture *p, double bottom, state least) {
    fprintf(p->file, "<path transform=\"translate(%d %.0f)\" fill=\"%s\" d=\"M0 0", LEFT, bottom,
            colours[least]);
    for (unsigned b = 0; b < BUCKETS; b++) {
        size_t in = 0;
        for (unsigned w = 0; w < p->workers; w++)
            for (unsigned t = 0; t < TICKS_EACH; t++)
                in += p->threads[(size_t)w * TICKS + (size_t)b * TICKS_EACH + t] >= least;
        fprintf(p->file, "V%.0fH%.1f", -(double)in / (p->workers * TICKS_EACH) * SHARES,
                (b + 1) * inner / BUCKETS);
    }
    fputs("V0Z\"/>\n", p->file);
}

/* What part of the threads does what, all over the load. */
static void put_shares(picture *p, double top, double open_seconds) {
    double bottom = top + SHARES + LINK_HEIGHT + 10;
    fprintf(p->file, "<rect x=\"%d\" y=\"%.0f\" width=\"%.0f\" height=\"%d\" fill=\"%s\"/>\n", LEFT, top,
            inner, SHARES, colours[IDLE]);
    for (state s = COPYING; s < STATES; s++) put_area(p, top + SHARES, s);
    put_open(p, top, SHARES, open_seconds, p->seconds);
    put_axis(p, top, bottom, p->seconds);
    put_text(p, LEFT - 6, top + 10, "end", "all threads");
    put_text(p, LEFT - 6, top + SHARES, "end", "none");
    put_link_shares(p, bottom - 4, LINK_HEIGHT);
}

static void put_swatch(picture *p, double *x, double y, const char *colour, const char *label) {
    fprintf(p->file, "<rect x=\"%.0f\" y=\"%.0f\" width=\"12\" height=\"10\" fill=\"%s\"/>\n", *x, y - 9,
            colour);
    put_text(p, *x + 16, y, "start", label);
    *x += 34 + 6.0 * (double)strlen(label);
}

static void put_legend(picture *p, double y, double rate) {
    char label[64];
    double x = LEFT;
    put_swatch(p, &x, y, colours[READING], labels[READING]);
    put_swatch(p, &x, y, colours[STORAGE], labels[STORAGE]);
    if (rate == 0) put_text(p, x, y, "start", "(and converts)");
    x = LEFT;
    y += 16;
    if (rate > 0) put_swatch(p, &x, y, colours[COPYING], labels[COPYING]);
    put_swatch(p, &x, y, colours[MEMORY], labels[MEMORY]);
    put_swatch(p, &x, y, colours[IDLE], labels[IDLE]);
    put_swatch(p, &x, y, OPENING, "opens and plans");
    snprintf(label, sizeof label, "link, if it copies at %.1f GB/s", rate);
    if (rate > 0) put_swatch(p, &x, y, LINK, label);
}

static void put_summary(picture *p, double y, const load_sample *s) {
    size_t in[STATES] = {0}, all = (size_t)p->workers * TICKS;
    char text[512];
    for (size_t t = 0; t < all; t++) in[p->threads[t]]++;
    double percent = 100.0 / (double)all;
    int length = snprintf(
        text, sizeof text,
        "Of the threads' time: %.0f %% reading, %.0f %% waiting for copies, %.0f %% for memory, %.0f "
        "%% the rest. Limit: %s.",
        (double)(in[READING] + in[STORAGE]) * percent, (double)in[COPYING] * percent,
        (double)in[MEMORY] * percent, (double)in[IDLE] * percent, s->limit);
    if (p->link_count)
        snprintf(text + length, sizeof text - (size_t)length, " The link is busy for %.0f %% of the load.",
                 p->link_busy / p->seconds * 100);
    put_text(p, LEFT, y, "start", text);
}

static void count_lines(picture *p, const fst_trace_record *records, size_t count) {
    p->workers = p->slots = 1;
    for (size_t i = 0; i < count; i++) {
        if (records[i].worker >= p->workers) p->workers = records[i].worker + 1;
        if (records[i].slot >= p->slots) p->slots = records[i].slot + 1;
    }
}

void load_timeline(const char *path, const char *title, const load_sample *sample, const fst_trace *trace,
                   double copy_rate) {
    size_t count = atomic_load(&trace->count);
    char heading[96];
    if (count > trace->room) count = trace->room;
    picture p = {.file = fopen(path, "w"), .seconds = sample->seconds};
    if (!p.file) bench_die("cannot write %s", path);
    p.bars = calloc(3 * count + 1, sizeof *p.bars);
    if (!p.bars) bench_die("out of memory");
    count_lines(&p, trace->records, count);
    for (size_t i = 0; i < count; i++) add_record(&p, &trace->records[i], sample->started);
    qsort(trace->records, count, sizeof *trace->records, by_begin);
    simulate_link(&p, trace->records, count, sample->started, copy_rate);
    qsort(p.bars, p.count, sizeof *p.bars, by_line);
    paint_threads(&p);
    double detail = sample->seconds < DETAIL ? sample->seconds : DETAIL;
    fprintf(p.file,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%.0f\" "
            "font-family=\"sans-serif\" font-size=\"11\" fill=\"#222\">\n"
            "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
            WIDTH, DETAIL_TOP + lines_height(&p) + 24);
    put_text(&p, LEFT, 18, "start", title);
    put_summary(&p, 34, sample);
    put_legend(&p, 54, copy_rate);
    snprintf(heading, sizeof heading, "All %.1f ms: what part of the threads does what", p.seconds * 1e3);
    put_text(&p, LEFT, SHARES_TOP - 6, "start", heading);
    put_shares(&p, SHARES_TOP, sample->stats.open_seconds);
    snprintf(heading, sizeof heading, "The first %.1f ms: a line for each thread, and for each slot",
             detail * 1e3);
    put_text(&p, LEFT, DETAIL_TOP - 6, "start", heading);
    put_lines(&p, DETAIL_TOP, detail, sample->stats.open_seconds);
    fputs("</svg>\n", p.file);
    if (fclose(p.file)) bench_die("cannot write %s", path);
    free(p.bars);
    free(p.link);
    free(p.threads);
}
