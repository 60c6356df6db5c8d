#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

#define MAX_THREADS 1024
#define MAX_DEVICE 65535

/* Says what is wrong with the command line. */
__attribute__((format(printf, 1, 2))) static int usage_wrong(const char *format, ...) {
    char text[400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    report(NULL, FST_E_ARG, text);
    return EXIT_USAGE;
}

/* ---- Options --------------------------------------------------------------------------------- */

static int set_json(arguments *args, const char *value) {
    (void)value;
    args->json = 1;
    return EXIT_OK;
}

static int set_help(arguments *args, const char *value) {
    (void)value;
    args->command = COMMAND_HELP;
    return EXIT_OK;
}

#define SUFFIX ".safetensors"

static int ends_in_suffix(const char *name) {
    size_t length = strlen(name), suffix = strlen(SUFFIX);
    return length >= suffix && !strcmp(name + length - suffix, SUFFIX);
}

static int set_output(arguments *args, const char *value) {
    if (!*value) return usage_wrong("-o: the name is empty");
    args->output = value;
    args->to_directory = !ends_in_suffix(value);
    return EXIT_OK;
}

static int set_cast(arguments *args, const char *value) {
    args->cast = fst_dtype_from_name(value);
    if (args->cast == FST_NATIVE) return usage_wrong("--cast: there is no dtype '%s'; see fst --help", value);
    return EXIT_OK;
}

/* A plain decimal number from `least` to `most`, or -1. */
static long parse_number(const char *text, long least, long most) {
    if (*text < '0' || *text > '9') return -1;
    char *end;
    errno = 0;
    long number = strtol(text, &end, 10);
    return errno || *end || number < least || number > most ? -1 : number;
}

static int set_device(arguments *args, const char *value) {
    long number = parse_number(value, 0, MAX_DEVICE);
    if (!strcmp(value, "auto")) args->device = FST_DEVICE_AUTO;
    else if (!strcmp(value, "cpu")) args->device = FST_DEVICE_CPU;
    else if (number >= 0) args->device = FST_DEVICE_GPU((int)number);
    else return usage_wrong("--device: '%s' is neither auto, cpu nor the number of a GPU", value);
    return EXIT_OK;
}

/* Bytes: a number, also one as 5e9. */
static int set_shard_size(arguments *args, const char *value) {
    char *end;
    double bytes = strtod(value, &end);
    if (*value < '0' || *value > '9' || *end || strpbrk(value, "xX") || !(bytes >= 1 && bytes <= 1e18))
        return usage_wrong("--shard-size: '%s' is not a number of bytes from 1 to 1e18", value);
    args->shard_bytes = (uint64_t)bytes;
    return EXIT_OK;
}

static int set_threads(arguments *args, const char *value) {
    long number = parse_number(value, 1, MAX_THREADS);
    if (number < 0) return usage_wrong("--threads: '%s' is not a number from 1 to %d", value, MAX_THREADS);
    args->threads = (unsigned)number;
    return EXIT_OK;
}

/* Which of the words `value` is, or -1. */
static int parse_word(const char *value, const char *const *words, int count) {
    for (int i = 0; i < count; i++)
        if (!strcmp(value, words[i])) return i;
    return -1;
}

static int set_reader(arguments *args, const char *value) {
    static const char *const words[] = {"auto", "threads", "direct", "uring"}; /* as fst_reader_kind counts */
    int which = parse_word(value, words, 4);
    if (which < 0) return usage_wrong("--reader: '%s' is none of auto, threads, direct, uring", value);
    args->reader = (fst_reader_kind)which;
    return EXIT_OK;
}

static int set_cache(arguments *args, const char *value) {
    static const char *const words[] = {"auto", "keep", "avoid"}; /* as fst_cache counts */
    int which = parse_word(value, words, 3);
    if (which < 0) return usage_wrong("--cache: '%s' is none of auto, keep, avoid", value);
    args->cache = (fst_cache)which;
    return EXIT_OK;
}

static int set_scale(arguments *args, const char *value) {
    static const char *const words[] = {"tensor", "row", "block"}; /* as fst_scale counts, from 1 */
    int which = parse_word(value, words, 3);
    if (which < 0) return usage_wrong("--scale: '%s' is none of tensor, row, block", value);
    args->scale = (fst_scale)(which + 1);
    return EXIT_OK;
}

/* ---- Shards ---------------------------------------------------------------------------------- */

#define MAX_RANKS 65536
#define MAX_DIM 63

/* RANK/SIZE */
static int set_ranks(arguments *args, const char *option, const char *value) {
    const char *slash = strchr(value, '/');
    char *first = slash ? strndup(value, (size_t)(slash - value)) : NULL;
    long rank = first ? parse_number(first, 0, MAX_RANKS - 1) : -1;
    long ranks = slash ? parse_number(slash + 1, 1, MAX_RANKS) : -1;
    free(first);
    if (rank < 0 || ranks < 0)
        return usage_wrong("%s: '%s' is not RANK/SIZE, as 0/2; at most %d ranks", option, value, MAX_RANKS);
    if (rank >= ranks) return usage_wrong("%s: rank %ld of %ld: ranks count from 0", option, rank, ranks);
    if (args->ranks && (args->rank != (unsigned)rank || args->ranks != (unsigned)ranks))
        return usage_wrong("%s: rank %u of %u was given before", option, args->rank, args->ranks);
    args->rank = (unsigned)rank;
    args->ranks = (unsigned)ranks;
    return EXIT_OK;
}

static int set_rank(arguments *args, const char *value) { return set_ranks(args, "--rank", value); }

static int set_tp(arguments *args, const char *value) {
    args->is_tp = 1;
    return set_ranks(args, "--tp", value);
}

/* A rule for the first `length` bytes of `text`. */
static int add_shard(arguments *args, const char *option, const char *text, size_t length, int32_t dim,
                     uint32_t unit) {
    if (!length) return usage_wrong("%s: the pattern is empty", option);
    char *glob = must(strndup(text, length));
    args->shards = must(realloc(args->shards, (args->shards_count + 1) * sizeof *args->shards));
    args->shards[args->shards_count++] = (fst_shard_rule){glob, dim, unit};
    return EXIT_OK;
}

/* GLOB=DIM, GLOB=DIM/UNIT, GLOB=replicate. Names may have a '=': the last one counts. */
static int set_shard(arguments *args, const char *value) {
    const char *equals = strrchr(value, '='), *slash = equals ? strchr(equals, '/') : NULL;
    char *number = equals ? strndup(equals + 1, slash ? (size_t)(slash - equals) - 1 : strlen(equals)) : NULL;
    long dim = number ? parse_number(number, 0, MAX_DIM) : -1;
    long unit = slash ? parse_number(slash + 1, 1, UINT32_MAX) : 1;
    free(number);
    if (equals && !strcmp(equals + 1, "replicate")) dim = FST_REPLICATE;
    else if (dim < 0 || unit < 0)
        return usage_wrong("--shard: '%s' is not GLOB=DIM, GLOB=DIM/UNIT or GLOB=replicate; DIM is 0 to %d",
                           value, MAX_DIM);
    return add_shard(args, "--shard", value, (size_t)(equals - value), (int32_t)dim, (uint32_t)unit);
}

static int set_only(arguments *args, const char *value) {
    return add_shard(args, "--only", value, strlen(value), FST_ONLY, 0);
}

static int set_skip(arguments *args, const char *value) {
    return add_shard(args, "--skip", value, strlen(value), FST_SKIP, 0);
}

static int set_strict(arguments *args, const char *value) {
    (void)value;
    args->strict = 1;
    return EXIT_OK;
}

static int set_read(arguments *args, const char *value) {
    static const char *const words[] = {"auto", "exact"}; /* as fst_read_mode counts */
    int which = parse_word(value, words, 2);
    if (which < 0) return usage_wrong("--read: '%s' is none of auto, exact", value);
    args->read = (fst_read_mode)which;
    return EXIT_OK;
}

/* Two rules for the same pattern, of which one must be a mistake. */
static int contradict(const fst_shard_rule *a, const fst_shard_rule *b) {
    if (strcmp(a->glob, b->glob) != 0) return 0;
    int leaves_out = (a->dim <= FST_SKIP) + (b->dim <= FST_SKIP);
    return leaves_out == 1 ? 0 : a->dim != b->dim || a->unit != b->unit;
}

/* Checks the rules given, and appends the library's. */
static int finish_shards(arguments *args) {
    static const fst_shard_rule none = {NULL, 0, 0};
    const fst_shard_rule *more = args->is_tp ? fst_shard_rules() : &none;
    size_t count = 0;
    for (size_t i = 0; i < args->shards_count; i++)
        for (size_t k = 0; k < i; k++)
            if (contradict(&args->shards[i], &args->shards[k]))
                return usage_wrong("'%s' is given twice, and not the same", args->shards[i].glob);
    if (!args->shards_count && !args->is_tp) return EXIT_OK;
    while (more[count].glob) count++;
    args->shards = must(realloc(args->shards, (args->shards_count + count + 1) * sizeof *args->shards));
    memcpy(args->shards + args->shards_count, more, (count + 1) * sizeof *more);
    return EXIT_OK;
}

enum { FOR_INSPECT = 1 << COMMAND_INSPECT, FOR_LOAD = 1 << COMMAND_LOAD, FOR_CONVERT = 1 << COMMAND_CONVERT };

typedef struct option_rule {
    const char *name;
    unsigned commands;
    int has_value;
    int (*set)(arguments *args, const char *value);
} option_rule;

static const option_rule rules[] = {
    {"--help", FOR_INSPECT | FOR_LOAD | FOR_CONVERT, 0, set_help},
    {"-h", FOR_INSPECT | FOR_LOAD | FOR_CONVERT, 0, set_help},
    {"--json", FOR_INSPECT | FOR_LOAD | FOR_CONVERT, 0, set_json},
    {"--cast", FOR_LOAD | FOR_CONVERT, 1, set_cast},
    {"--scale", FOR_LOAD | FOR_CONVERT, 1, set_scale},
    {"--device", FOR_LOAD | FOR_CONVERT, 1, set_device},
    {"--threads", FOR_LOAD | FOR_CONVERT, 1, set_threads},
    {"--reader", FOR_LOAD | FOR_CONVERT, 1, set_reader},
    {"--cache", FOR_LOAD | FOR_CONVERT, 1, set_cache},
    {"--tp", FOR_LOAD | FOR_CONVERT, 1, set_tp},
    {"--rank", FOR_LOAD | FOR_CONVERT, 1, set_rank},
    {"--shard", FOR_LOAD | FOR_CONVERT, 1, set_shard},
    {"--only", FOR_LOAD | FOR_CONVERT, 1, set_only},
    {"--skip", FOR_LOAD | FOR_CONVERT, 1, set_skip},
    {"--strict", FOR_LOAD | FOR_CONVERT, 0, set_strict},
    {"--read", FOR_LOAD | FOR_CONVERT, 1, set_read},
    {"--shard-size", FOR_CONVERT, 1, set_shard_size},
    {"--output", FOR_CONVERT, 1, set_output},
    {"-o", FOR_CONVERT, 1, set_output},
};

static const option_rule *find_rule(const arguments *args, const char *name, size_t length) {
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (strlen(rules[i].name) == length && !memcmp(rules[i].name, name, length) &&
            rules[i].commands & 1u << args->command)
            return &rules[i];
    return NULL;
}

/* Takes the option argv[*at], and argv[*at + 1] when that is its value. */
static int parse_option(arguments *args, char **argv, int *at) {
    const char *text = argv[*at], *equals = strchr(text, '=');
    size_t length = equals && text[1] == '-' ? (size_t)(equals - text) : strlen(text);
    const option_rule *rule = find_rule(args, text, length);
    if (!rule) return usage_wrong("%s: there is no option %.*s; see fst --help", argv[1], (int)length, text);
    const char *value = text[length] ? equals + 1 : NULL;
    if (!rule->has_value && value) return usage_wrong("%s takes no value", rule->name);
    if (rule->has_value && !value) value = argv[++*at];
    if (rule->has_value && !value) return usage_wrong("%s needs a value", rule->name);
    return rule->set(args, value);
}

/* ---- The whole line -------------------------------------------------------------------------- */

static int parse_command(const char *name, arguments *args) {
    static const struct {
        const char *name;
        command command;
    } commands[] = {
        {"inspect", COMMAND_INSPECT},   {"load", COMMAND_LOAD}, {"convert", COMMAND_CONVERT},
        {"--help", COMMAND_HELP},       {"-h", COMMAND_HELP},   {"help", COMMAND_HELP},
        {"--version", COMMAND_VERSION},
    };
    if (!name) return usage_wrong("no command; see fst --help");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(name, commands[i].name)) {
            args->command = commands[i].command;
            return EXIT_OK;
        }
    return usage_wrong("there is no command '%s'; see fst --help", name);
}

/* A file, or a directory, which comes of one. */
static int check_output(const arguments *args) {
    if (!args->output) return usage_wrong("convert: -o OUT is missing");
    if (args->to_directory && args->paths_count != 1)
        return usage_wrong(
            "convert: one directory becomes one; the name of a file that many become ends in " SUFFIX);
    if (!args->to_directory && args->shard_bytes)
        return usage_wrong("--shard-size: a file has no shards; -o with the name of a directory has");
    return EXIT_OK;
}

static int parse_rest(arguments *args, int argc, char **argv) {
    int options = 1;
    for (int i = 2; i < argc && args->command != COMMAND_HELP; i++) {
        if (options && !strcmp(argv[i], "--")) {
            options = 0;
        } else if (options && argv[i][0] == '-' && argv[i][1]) {
            int status = parse_option(args, argv, &i);
            if (status) return status;
        } else {
            args->paths[args->paths_count++] = argv[i];
        }
    }
    if (args->command == COMMAND_HELP) return EXIT_OK;
    int takes_scales =
        args->cast == FST_F8_E4M3 || args->cast == FST_F8_E5M2 || args->cast == FST_F8_E4M3FNUZ;
    if (args->scale && !takes_scales)
        return usage_wrong("--scale goes with --cast F8_E4M3, F8_E5M2 or F8_E4M3FNUZ");
    if (!args->paths_count) return usage_wrong("%s: no path is given; see fst --help", argv[1]);
    int status = finish_shards(args);
    if (status) return status;
    return args->command == COMMAND_CONVERT ? check_output(args) : EXIT_OK;
}

int arguments_parse(int argc, char **argv, arguments *out) {
    memset(out, 0, sizeof *out);
    int status = parse_command(argc > 1 ? argv[1] : NULL, out);
    if (status || out->command == COMMAND_HELP || out->command == COMMAND_VERSION) return status;
    out->paths = must(calloc((size_t)argc, sizeof *out->paths));
    status = parse_rest(out, argc, argv);
    if (status) arguments_free(out);
    return status;
}

void arguments_free(arguments *args) {
    for (size_t i = 0; i < args->shards_count; i++) free((void *)args->shards[i].glob);
    free(args->shards);
    args->shards = NULL;
    args->shards_count = 0;
    free(args->paths);
    args->paths = NULL;
}
