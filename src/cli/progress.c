#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "cli.h"

#define LINE_MAX_COLUMNS 200
#define BAR_MAX 40
#define BAR_MIN 8

progress progress_new(const char *label) { return (progress){label, isatty(STDERR_FILENO), 0}; }

static size_t terminal_columns(void) {
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) || !size.ws_col) return 80;
    return size.ws_col < LINE_MAX_COLUMNS ? size.ws_col : LINE_MAX_COLUMNS;
}

/* "  45%  1.20 GB of 2.60 GB  3.41 GB/s  0:12 left" */
static void format_figures(char *out, size_t size, const fst_progress *now) {
    char done[32], total[32], rate[32];
    double speed = now->seconds > 0 ? (double)now->bytes_done / now->seconds : 0;
    double share = now->bytes_total ? (double)now->bytes_done / (double)now->bytes_total : 1;
    double left = speed > 0 ? (double)(now->bytes_total - now->bytes_done) / speed : 0;
    unsigned seconds = left < 359999 ? (unsigned)(left + 0.5) : 359999;
    format_bytes(done, now->bytes_done);
    format_bytes(total, now->bytes_total);
    format_bytes(rate, (uint64_t)speed);
    snprintf(out, size, "%3.0f%%  %s of %s  %s/s  %u:%02u left", 100 * share, done, total, rate, seconds / 60,
             seconds % 60);
}

/* "[####    ] ", as wide as there is room for; nothing in a narrow terminal. */
static void format_bar(char *out, size_t room, const fst_progress *now) {
    size_t width = room > BAR_MAX ? BAR_MAX : room;
    *out = 0;
    if (width < BAR_MIN) return;
    size_t cells = width - 3, full = cells;
    if (now->bytes_total) full = (size_t)((double)now->bytes_done / (double)now->bytes_total * (double)cells);
    *out++ = '[';
    memset(out, '#', full);
    memset(out + full, ' ', cells - full);
    memcpy(out + cells, "] ", 3);
}

int progress_tick(void *arg, const fst_progress *now) {
    progress *bar = arg;
    if (!bar->terminal) return 0;
    char figures[160], cells[BAR_MAX + 1], line[LINE_MAX_COLUMNS + 1];
    size_t columns = terminal_columns() - 1; /* the last one would wrap the line in some terminals */
    format_figures(figures, sizeof figures, now);
    size_t text = strlen(bar->label) + 1 + strlen(figures);
    format_bar(cells, columns > text ? columns - text : 0, now);
    snprintf(line, columns + 1, "%s %s%s", bar->label, cells, figures);
    size_t width = strlen(line);
    fprintf(stderr, "\r%s%*s", line, (int)(bar->drawn > width ? bar->drawn - width : 0), "");
    fflush(stderr);
    bar->drawn = width;
    return 0;
}

void progress_clear(progress *bar) {
    if (!bar->drawn) return;
    fprintf(stderr, "\r%*s\r", (int)bar->drawn, "");
    fflush(stderr);
    bar->drawn = 0;
}

fst_options options_for(const arguments *args, progress *bar) {
    fst_options options = FST_OPTIONS_INIT;
    options.cast = args->cast;
    options.scale = args->scale;
    options.device = args->device;
    options.threads = args->threads;
    options.reader = args->reader;
    options.cache = args->cache;
    options.rank = args->rank;
    options.ranks = args->ranks;
    options.shards = args->shards;
    options.read = args->read;
    if (args->strict) options.flags |= FST_STRICT_SHARDS;
    options.progress = progress_tick;
    options.progress_arg = bar;
    options.cancel = interrupt_flag();
    return options;
}
