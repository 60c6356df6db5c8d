/* The program: options, buffers, checks, and the loop over cases and sizes. */
#include "convert.h"

#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "fst.h"

#define MIB ((uint64_t)1 << 20)
enum {
    MAX_SIZES = 4,
    MAX_SETS = 64,
    BATCH_TENSORS = 20000,
    POISON = 16 << 20, /* bytes */
    WHOLE = 4 << 20,   /* elements, from here on */
    EDGE = 256 << 10,
    WINDOW = 64 << 10,
    WINDOWS = 8
};

static const char usage[] =
    "usage: bench_convert [--device auto|cpu|N] [--bytes N[K|M|G]] [--filter TEXT|GLOB] [--runs N]\n"
    "                     [--threads N] [--verify-only] [--json FILE] [--plot FILE.svg] [--list]\n";

typedef struct options {
    int device, verify_only, list;
    uint64_t bytes; /* 0: the default sizes */
    const char *filter, *json, *plot;
    unsigned runs, threads;
} options;

typedef struct bench {
    options o;
    const fst_gpu *gpu;
    fst_queue stream;
    convert_data *data;
    uint64_t src_room, dst_room, extra_room; /* of all sets */
    uint64_t src_filled;
    unsigned char *src, *dst, *extra, *poison; /* on the device */
    unsigned char *host, *want;                /* room for a window each */
} bench;

/* ---- Options ---- */

static int parse_number(const char *text, uint64_t *out) {
    char *end;
    if (*text < '0' || *text > '9') return 0;
    *out = strtoull(text, &end, 10);
    const char *units = "KMG", *unit = *end ? strchr(units, *end) : NULL;
    if (unit) {
        *out <<= 10 * (unit - units + 1);
        end++;
    }
    return *end == 0 && *out != 0;
}

static int parse_device(const char *text, int *out) {
    char *end;
    if (strcmp(text, "auto") == 0) *out = FST_DEVICE_AUTO;
    else if (strcmp(text, "cpu") == 0) *out = FST_DEVICE_CPU;
    else {
        const long index = strtol(text, &end, 10);
        if (*text < '0' || *text > '9' || *end || index > 255) return 0;
        *out = FST_DEVICE_GPU((int)index);
    }
    return 1;
}

static int parse_count(const char *text, unsigned most, unsigned *out) {
    uint64_t value;
    if (!parse_number(text, &value) || value > most) return 0;
    *out = (unsigned)value;
    return 1;
}

static int parse_value(options *o, const char *name, const char *value) {
    if (strcmp(name, "--device") == 0) return parse_device(value, &o->device);
    if (strcmp(name, "--bytes") == 0) return parse_number(value, &o->bytes) && o->bytes <= (uint64_t)1 << 36;
    if (strcmp(name, "--runs") == 0) return parse_count(value, 1000, &o->runs);
    if (strcmp(name, "--threads") == 0) return parse_count(value, CONVERT_MAX_PARTS, &o->threads);
    if (strcmp(name, "--filter") == 0) o->filter = value;
    else if (strcmp(name, "--json") == 0) o->json = value;
    else if (strcmp(name, "--plot") == 0) o->plot = value;
    else return 0;
    return 1;
}

static int parse(int argc, char **argv, options *o) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--verify-only") == 0) o->verify_only = 1;
        else if (strcmp(argv[i], "--list") == 0) o->list = 1;
        else if (i + 1 == argc || !parse_value(o, argv[i], argv[i + 1])) {
            fprintf(stderr, "bench_convert: wrong: %s%s%s\n%s", argv[i], i + 1 < argc ? " " : "",
                    i + 1 < argc ? argv[i + 1] : "", usage);
            return 0;
        } else i++;
    }
    return 1;
}

static int chosen(const char *filter, const convert_spec *spec) {
    char name[128], plain[128];
    convert_spec no_variant = *spec;
    *no_variant.variant = 0;
    convert_name(spec, name, sizeof name);
    convert_name(&no_variant, plain, sizeof plain);
    if (!filter) return 1;
    if (strpbrk(filter, "*?[")) return fnmatch(filter, name, 0) == 0 || fnmatch(filter, plain, 0) == 0;
    return strstr(name, filter) != NULL;
}

static size_t choose(const char *filter, convert_spec specs[CONVERT_ROOM]) {
    size_t count = convert_list(specs), kept = 0;
    for (size_t i = 0; i < count; i++)
        if (chosen(filter, &specs[i])) specs[kept++] = specs[i];
    return kept;
}

/* The sizes of a case. A batch is 20,000 tensors unless --bytes says how much. */
static unsigned sizes_of(const bench *b, const convert_spec *spec, uint64_t sizes[MAX_SIZES]) {
    static const uint64_t gpu_sizes[MAX_SIZES] = {16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB};
    const unsigned bits = fst_dtype_bits((fst_dtype)spec->src) + fst_dtype_bits((fst_dtype)spec->dst);
    sizes[0] = b->o.bytes ? b->o.bytes : 64 * MIB;
    if (b->o.bytes) return 1;
    if (spec->kernel == CONVERT_BATCH) {
        sizes[0] = spec->row * BATCH_TENSORS * bits / 8;
        return 1;
    }
    if (b->gpu->host_access) return 1;
    memcpy(sizes, gpu_sizes, sizeof gpu_sizes);
    return MAX_SIZES;
}

/* ---- Buffers ---- */

static uint64_t round_up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

/* Bytes of one set: the source, the destination with its guards, and the scales, counter and jobs. A copy as
 * big as half of the traffic fits in both of the first two. */
static uint64_t src_window(const convert_case *c) {
    const uint64_t half = (c->bytes_read + c->bytes_written) / 2, own = c->src_size + c->spec.misaligned;
    return round_up(own > half ? own : half, 4096);
}

static uint64_t dst_window(const convert_case *c) {
    const uint64_t half = (c->bytes_read + c->bytes_written) / 2;
    return round_up((c->dst_size > half ? c->dst_size : half) + 2 * CONVERT_GUARD, 4096);
}

static uint64_t scales_window(const convert_case *c) { return round_up(c->companions, 256); }

static uint64_t extra_window(const convert_case *c) {
    return scales_window(c) + 256 + round_up(c->jobs * sizeof(fst_batch_job), 256);
}

/* As many sets as it takes to make the caches useless, and at least two. */
static unsigned sets_of(const bench *b, const convert_case *c) {
    const uint64_t most = b->gpu->host_access ? 384 * MIB : 512 * MIB;
    const uint64_t traffic = c->bytes_read + c->bytes_written;
    if (b->o.verify_only) return 1;
    if (traffic * 2 >= most) return 2;
    return most / traffic + 1 > MAX_SETS ? MAX_SETS : (unsigned)(most / traffic + 1);
}

static void must(const bench *b, int code, const char *what) {
    if (code) bench_die("%s: %s", what, code > 0 ? b->gpu->calls->describe(code) : "refused");
}

static void upload(const bench *b, void *to, const void *bytes, size_t size) {
    must(b, b->gpu->calls->to_device(b->gpu, b->stream, to, bytes, size), "a copy to the device");
    must(b, b->gpu->calls->stream_wait(b->gpu, b->stream), "a copy to the device");
}

static void download(const bench *b, void *to, const void *from, size_t size) {
    must(b, b->gpu->calls->to_host(b->gpu, b->stream, to, from, size), "a copy from the device");
    must(b, b->gpu->calls->stream_wait(b->gpu, b->stream), "a copy from the device");
}

static unsigned char *device_block(const bench *b, uint64_t size) {
    void *block;
    const int code = b->gpu->calls->alloc_block(b->gpu, size, &block);
    if (code)
        bench_die("%llu MiB on %s: %s; --bytes chooses a smaller size", (unsigned long long)(size / MIB),
                  b->gpu->label, b->gpu->calls->describe(code));
    return block;
}

static void poison(const bench *b, unsigned char *to, uint64_t left) {
    while (left) {
        const uint64_t size = left < POISON ? left : POISON;
        must(b, b->gpu->calls->copy_on_device(b->gpu, b->stream, to, b->poison, (size_t)size),
             "a copy on the device");
        to += size;
        left -= size;
    }
}

static void allocate(bench *b, const convert_spec *specs, size_t count) {
    uint64_t sizes[MAX_SIZES];
    for (size_t i = 0; i < count; i++)
        for (unsigned k = 0, n = sizes_of(b, &specs[i], sizes); k < n; k++) {
            const convert_case c = convert_size(&specs[i], sizes[k]);
            const uint64_t sets = sets_of(b, &c), src = sets * src_window(&c), dst = sets * dst_window(&c);
            const uint64_t extra = sets * extra_window(&c);
            if (src > b->src_room) b->src_room = src;
            if (dst > b->dst_room) b->dst_room = dst;
            if (extra > b->extra_room) b->extra_room = extra;
        }
    b->src = device_block(b, b->src_room);
    b->dst = device_block(b, b->dst_room);
    b->extra = device_block(b, b->extra_room);
    b->poison = device_block(b, POISON);
    b->host = malloc((size_t)WHOLE * 8);
    b->want = malloc((size_t)WHOLE * 8);
    if (!b->host || !b->want) bench_die("out of memory");
    memset(b->host, CONVERT_POISON, WHOLE);
    for (uint64_t at = 0; at < POISON; at += WHOLE) upload(b, b->poison + at, b->host, WHOLE);
    poison(b, b->dst, b->dst_room); /* no page is touched for the first time while the clock runs */
}

static void release(bench *b) {
    b->gpu->calls->free_block(b->gpu, b->src, b->src_room);
    b->gpu->calls->free_block(b->gpu, b->dst, b->dst_room);
    b->gpu->calls->free_block(b->gpu, b->extra, b->extra_room);
    b->gpu->calls->free_block(b->gpu, b->poison, POISON);
    convert_data_free(b->data);
    free(b->host);
    free(b->want);
}

/* The sources of all sets. Other data than before are filled in as far as they are needed. */
static void fill_sources(bench *b, const convert_case *c, unsigned sets) {
    size_t period;
    if (b->data && !convert_data_fits(b->data, &c->spec)) {
        convert_data_free(b->data);
        b->data = NULL;
        b->src_filled = 0;
    }
    if (!b->data) b->data = convert_data_new(&c->spec);
    const unsigned char *bytes = convert_data_bytes(b->data, &period);
    const uint64_t end = sets * src_window(c);
    while (b->src_filled < end) {
        const uint64_t room = b->src_room - b->src_filled, size = room < period ? room : period;
        upload(b, b->src + b->src_filled, bytes, (size_t)size);
        b->src_filled += size;
    }
}

static void fill_scales(const bench *b, const convert_case *c, const convert_set *set) {
    unsigned char *companions = calloc(1, c->companions);
    if (!companions) bench_die("out of memory");
    convert_companions(c, companions);
    upload(b, set->scales, companions, c->companions);
    free(companions);
    if (c->spec.kernel == CONVERT_BNB_NF4) upload(b, set->nans, convert_nf4, sizeof convert_nf4);
    if (c->spec.kernel == CONVERT_NVFP4) upload(b, set->nans, &convert_global, sizeof convert_global);
}

static void fill_jobs(const bench *b, const convert_case *c, const convert_set *set) {
    fst_batch_job *jobs = calloc(c->jobs, sizeof *jobs);
    if (!jobs) bench_die("out of memory");
    convert_jobs(c, set, b->o.threads, jobs);
    upload(b, set->jobs, jobs, c->jobs * sizeof *jobs);
    free(jobs);
}

static void fill_sets(bench *b, const convert_case *c, convert_set *sets, unsigned count) {
    const uint64_t zero = 0;
    fill_sources(b, c, count);
    for (unsigned i = 0; i < count; i++) {
        unsigned char *extra = b->extra + i * extra_window(c);
        sets[i].src = b->src + i * src_window(c) + c->spec.misaligned;
        sets[i].dst = b->dst + i * dst_window(c) + CONVERT_GUARD;
        sets[i].scales = extra;
        sets[i].nans = (uint64_t *)(void *)(extra + scales_window(c));
        sets[i].jobs = (fst_batch_job *)(void *)(extra + scales_window(c) + 256);
        upload(b, sets[i].nans, &zero, sizeof zero);
        if (convert_is_scale(c->spec.kernel)) fill_scales(b, c, &sets[i]);
        if (c->jobs) fill_jobs(b, c, &sets[i]);
    }
}

/* ---- Checks ---- */

static int complain(const convert_case *c, const char *what, uint64_t where, uint64_t want, uint64_t got) {
    char name[128];
    convert_name(&c->spec, name, sizeof name);
    fprintf(stderr, "bench_convert: %s, %llu bytes: %s %llu is %llX, should be %llX\n", name,
            (unsigned long long)c->bytes, what, (unsigned long long)where, (unsigned long long)got,
            (unsigned long long)want);
    return 0;
}

static int check_elements(const bench *b, const convert_case *c, const convert_set *set, convert_reference *r,
                          uint64_t first, uint64_t count) {
    const size_t size = fst_dtype_bits((fst_dtype)c->spec.dst) / 8;
    download(b, b->host, set->dst + first * size, count * size);
    convert_expect(r, first, count, b->want);
    if (memcmp(b->host, b->want, count * size) == 0) return 1;
    for (uint64_t i = 0;; i++) {
        uint64_t want = 0, got = 0;
        memcpy(&want, b->want + i * size, size);
        memcpy(&got, b->host + i * size, size);
        if (want != got) return complain(c, "element", first + i, want, got);
    }
}

static int check_guards(const bench *b, const convert_case *c, const convert_set *set) {
    const unsigned char *const guards[] = {set->dst - CONVERT_GUARD, set->dst + c->dst_size};
    for (unsigned g = 0; g < 2; g++) {
        download(b, b->host, guards[g], CONVERT_GUARD);
        for (unsigned i = 0; i < CONVERT_GUARD; i++)
            if (b->host[i] != CONVERT_POISON)
                return complain(c, g ? "byte behind the result," : "byte before the result,", i,
                                CONVERT_POISON, b->host[i]);
    }
    return 1;
}

/* All of a small result; of others both ends and some windows between. */
static int check_result(const bench *b, const convert_case *c, const convert_set *set, convert_reference *r) {
    const uint64_t elements = c->dst_size * 8 / fst_dtype_bits((fst_dtype)c->spec.dst);
    if (elements <= WHOLE) return check_elements(b, c, set, r, 0, elements);
    int ok = check_elements(b, c, set, r, 0, EDGE) && check_elements(b, c, set, r, elements - EDGE, EDGE);
    for (uint64_t i = 0; i < WINDOWS && ok; i++) { /* at odd places */
        const uint64_t first = (elements - WINDOW) / WINDOWS * i + (i * 7919 + 13) % 4001;
        ok = check_elements(b, c, set, r, first, WINDOW);
    }
    return ok;
}

/* The scales that quantize made, up to 256 of them spread over all. */
static int check_scales(const bench *b, const convert_case *c, const convert_set *set, convert_reference *r) {
    const uint64_t step = c->scales / 256 + 1;
    for (uint64_t i = 0; i < c->scales; i += step) {
        uint32_t got, want = convert_expect_scale(r, i);
        download(b, &got, set->scales + i * 4, sizeof got);
        if (got != want) return complain(c, "scale", i, want, got);
    }
    return 1;
}

static int check_nans(const bench *b, const convert_case *c, const convert_set *set,
                      const convert_reference *r) {
    const uint64_t want = convert_expect_nans(r);
    uint64_t got;
    download(b, &got, set->nans, sizeof got);
    return got == want || complain(c, "the counter of NaNs,", 0, want, got);
}

static int check(const bench *b, const convert_timer *t, const convert_case *c, const convert_set *set) {
    convert_reference *r = convert_reference_new(c, b->data);
    poison(b, set->dst - CONVERT_GUARD, c->dst_size + 2 * CONVERT_GUARD);
    if (convert_is_quantize(c->spec.kernel)) poison(b, set->scales, c->scales * 4);
    const int code = convert_once(t, c, set);
    int ok = code == 0;
    if (code) {
        char name[128];
        convert_name(&c->spec, name, sizeof name);
        fprintf(stderr, "bench_convert: %s: %s (%d)\n", name,
                code > 0 ? b->gpu->calls->describe(code) : "refused", code);
    }
    ok = ok && check_result(b, c, set, r) && check_guards(b, c, set);
    if (ok && convert_is_quantize(c->spec.kernel)) ok = check_scales(b, c, set, r);
    if (ok && (convert_is_quantize(c->spec.kernel) || c->spec.keep_bits)) ok = check_nans(b, c, set, r);
    convert_reference_free(r);
    return ok;
}

/* ---- The loop ---- */

static convert_result measure(bench *b, const convert_timer *t, const convert_case *c) {
    convert_set sets[MAX_SETS];
    const unsigned count = sets_of(b, c);
    convert_result result = {.what = *c};
    fill_sets(b, c, sets, count);
    result.ok = check(b, t, c, &sets[0]);
    if (!b->o.verify_only && result.ok) must(b, convert_time(t, c, sets, count, &result), "a timed launch");
    return result;
}

static int run(bench *b, const convert_spec *specs, size_t specs_count) {
    const convert_timer timer = {b->gpu, b->stream, b->o.runs, b->o.threads};
    convert_result *results = calloc(specs_count * MAX_SIZES, sizeof *results);
    size_t count = 0, wrong = 0;
    uint64_t sizes[MAX_SIZES];
    if (!results) bench_die("out of memory");
    printf("%s (%s), %s, threads: %u\n", b->gpu->label, b->gpu->name, b->gpu->kernels->target, b->o.threads);
    convert_print_head();
    for (size_t i = 0; i < specs_count; i++)
        for (unsigned k = 0, n = sizes_of(b, &specs[i], sizes); k < n; k++) {
            const convert_case c = convert_size(&specs[i], sizes[k]);
            results[count] = measure(b, &timer, &c);
            wrong += !results[count].ok;
            convert_print(&results[count++]);
        }
    printf("copy: %.1f GB/s; %zu results, %zu wrong\n", convert_copy_gb_per_s(results, count), count, wrong);
    if (b->o.json) convert_json(b->o.json, b->gpu, b->o.threads, results, count);
    if (b->o.plot) convert_plot(b->o.plot, b->gpu, results, count);
    free(results);
    return wrong ? 1 : 0;
}

int convert_main(int argc, char **argv) {
    static convert_spec specs[CONVERT_ROOM];
    bench b = {.o = {.runs = 21, .threads = 1}};
    char name[128], reason[256];
    fst_error error;
    int saved;
    if (!parse(argc, argv, &b.o)) return 2;
    const size_t count = choose(b.o.filter, specs);
    if (count == 0) {
        fprintf(stderr, "bench_convert: nothing is called %s; --list shows what there is\n", b.o.filter);
        return 2;
    }
    for (size_t i = 0; i < count && b.o.list; i++) {
        convert_name(&specs[i], name, sizeof name);
        puts(name);
    }
    if (b.o.list) return 0;
    if (fst_gpu_find(b.o.device, &b.gpu, reason, sizeof reason, &error)) bench_die("%s", error.text);
    if (b.gpu->calls->enter(b.gpu, &saved)) bench_die("cannot use %s", b.gpu->label);
    if (!b.gpu->host_access) b.o.threads = 1;
    must(&b, b.gpu->calls->stream_new(b.gpu, &b.stream), "a stream");
    allocate(&b, specs, count);
    const int code = run(&b, specs, count);
    release(&b);
    b.gpu->calls->stream_free(b.gpu, b.stream);
    b.gpu->calls->leave(b.gpu, saved);
    return code;
}
