/* bench_load's parts: what is measured, how often, and what came out. */
#ifndef FST_BENCH_LOAD_H
#define FST_BENCH_LOAD_H

#include "bench.h"
#include "fst.h"
#include "gpu.h"
#include "pipeline.h"

enum { LOAD_MAX_RUNS = 64, LOAD_MAX_CASTS = 8, LOAD_MAX_CASES = 160, LOAD_MAX_DOUBTS = 12, LOAD_MAX_SHARDS = 32 };
#define LOAD_UNKNOWN UINT64_MAX /* bytes that this machine does not tell */

/* ---- Options: load_options.c ---- */

typedef struct load_options {
    const char **paths;
    int device, verify, cold, advise, stream, tune; /* advise: cold by fadvise alone */
    unsigned threads, slots, runs, cold_runs, first;
    size_t slot_bytes;
    double seconds; /* for all of it; 0: as long as it takes */
    fst_dtype casts[LOAD_MAX_CASTS];
    fst_scale scales[LOAD_MAX_CASTS]; /* that are computed with each */
    size_t casts_count;
    const char *json, *timeline, *timeline_of, *tmpfs;
    const char *generate; /* a directory; NULL: none */
    uint64_t generate_bytes;
    fst_dtype dtype;
    unsigned files, small;
    unsigned rank, ranks;   /* 0 of 0: no parts */
    int tp, rows;           /* ready-made rules; with output projections cut along 0, too */
    int reads[2];           /* whether parts are read so: by fst_read_mode */
    fst_shard_rule shards[LOAD_MAX_SHARDS];
    size_t shards_count;
    int turns; /* cases are asked for on standard input */
    const char *nccl, *nccl_library; /* a file by which ranks meet, to share the reading; NULL: they do not */
    unsigned timeout;                /* seconds that such ranks wait for one another */
    int child; /* descriptor that a child writes its one sample to; -1: this is no child */
} load_options;

const char *load_scale_name(fst_scale scale);
/* 0 after a complaint on stderr. */
int load_parse(int argc, char **argv, load_options *o);

/* ---- Files: load_files.c, load_generate.c ---- */

typedef struct load_files {
    const char *const *given; /* what the library is told: a list that ends in NULL */
    char **paths;             /* what that comes to, likewise */
    uint64_t *sizes, bytes;
    size_t count;
    int in_memory; /* all of it on tmpfs */
} load_files;

void load_find_files(const char *const *given, load_files *out);
/* The same files in a new directory below `directory`; they are removed when the process ends. */
void load_copy_files(const load_files *from, const char *directory, load_files *out);

/* What all of `out`'s [offset, offset + size) of a file shall be. */
typedef void load_fill(const void *arg, size_t file, uint64_t offset, size_t size, unsigned char *out);
/* Writes files with as many threads as there are CPUs, and syncs them. */
void load_write_files(char *const *paths, const uint64_t *sizes, size_t count, load_fill *fill, const void *arg);

/* Empties the page cache of the files, or, where it may and shall, that of the machine; returns how. */
const char *load_drop(const load_files *files, int only_these);
/* Drops every second part of them, of up to 64 MiB. */
void load_drop_half(const load_files *files);
/* Bytes of the files that are not in memory, or LOAD_UNKNOWN. */
uint64_t load_uncached(const load_files *files);

/* A checkpoint of Llama-8B's shapes and of many small tensors, as the options ask for. */
void load_generate(const load_options *o);

/* ---- Parts: load_parts.c ---- */

/* What a case loads: all, this rank's part by the rules of the options, or by those of --rows. */
typedef enum load_part { LOAD_WHOLE, LOAD_PART, LOAD_ROWS, LOAD_PARTS } load_part;

/* A part of a tensor: pieces of `run` bytes, `step` apart from the tensor's byte `first` on. */
typedef struct load_slice {
    int32_t dim; /* FST_REPLICATE: all of it */
    uint64_t begin, end;
    uint64_t first, run, step, nbytes;
} load_slice;

struct load_bench;
/* Rules for each kind of part, and what the headers say that a part has. */
void load_find_parts(struct load_bench *b);
/* By the rules, and PyTorch's chunk; neither the library's. `whole` is the tensor, of any dtype. */
void load_slice_of(const struct load_bench *b, load_part part, const fst_tensor *whole, load_slice *out);
/* Of a model with quantized weights: what the library says which part it is. */
void load_slice_said(const fst_tensor *part, const fst_tensor *whole, load_slice *out);
/* Where byte `at` of the part lies in the tensor; *size is at most so many that follow. */
uint64_t load_slice_place(const load_slice *slice, uint64_t at, size_t *size);

/* ---- Cases: load_measure.c ---- */

typedef struct load_sample {
    double started; /* fst_os_now() */
    double seconds, cpu_seconds, first_tensor_seconds;
    uint64_t peak_device_bytes; /* beyond what was in use before; on the CPU device, of host memory */
    uint64_t host_growth;       /* of the most resident memory */
    uint64_t disk_bytes;        /* that the process had read from storage; LOAD_UNKNOWN */
    uint64_t uncached_bytes;    /* of the files, before */
    uint64_t asked_bytes;       /* by read calls, as the kernel counts; LOAD_UNKNOWN */
    fst_stats stats;            /* without its texts, but these: */
    char limit[16], reader[464];
} load_sample;

typedef enum load_state { LOAD_FIRST, LOAD_WARM, LOAD_COLD, LOAD_AFTER_COLD, LOAD_HALF } load_state;

typedef struct load_case {
    char name[64];
    const load_files *files;
    load_state state;
    fst_dtype cast;
    fst_scale scale;
    fst_reader_kind reader;
    fst_cache cache;
    int stream, is_tuning;
    load_part part;
    fst_read_mode read;
    int shared;     /* ranks share the reading */
    unsigned flags; /* of fst_options */
    unsigned threads, slots; /* 0: the library's choice */
    size_t slot_bytes;
    load_sample *samples;
    unsigned count;
    uint64_t watched_bytes; /* device memory at its peak, in a load that was watched */
} load_case;

/* ---- Ceilings ---- */

typedef enum load_ceiling {
    LOAD_COPY,
    LOAD_CACHE,
    LOAD_MEMORY,
    LOAD_DIRECT,
    LOAD_TMPFS,
    LOAD_TMPFS_MEMORY,
    LOAD_CEILINGS
} load_ceiling;

typedef struct load_rates {
    double values[LOAD_MAX_RUNS]; /* GB/s */
    unsigned count;
} load_rates;

typedef struct load_bench {
    load_options o;
    int argc;
    char **argv;
    const fst_gpu *gpu;
    char reason[256];
    const char *cold_by;
    double started;
    uint64_t available; /* device memory before the first load */
    load_files given, tmpfs;
    unsigned threads, slots; /* that the library uses, and the ceilings so too */
    size_t slot_bytes;
    load_case cases[LOAD_MAX_CASES];
    size_t count;
    load_rates ceilings[LOAD_CEILINGS];
    const fst_shard_rule *rules[LOAD_PARTS];
    uint64_t needed[LOAD_PARTS]; /* bytes of the files; 0: not known */
    uint64_t header_bytes;
    int quantized; /* some weights are */
    int watches;   /* device memory, all along each load */
    void *comm;    /* among the ranks, NULL: none */
    int nccl_version;
    double begins; /* fst_os_now() at which the next load begins; 0: at once */
    char doubts[LOAD_MAX_DOUBTS][256]; /* where the library's word and the system's differ */
    unsigned doubts_count;
} load_bench;

__attribute__((format(printf, 2, 3))) void load_doubt(load_bench *b, const char *format, ...);

/* Brings the files into the state that the case is about. */
void load_prepare(load_bench *b, const load_case *c);
void load_set_options(const load_bench *b, const load_case *c, fst_options *options);
/* One load, as the case's next sample; `trace` may be NULL. */
/* GB/s of reading files, as a load of them does. */
#define LOAD_STRIP ((size_t)512 << 10)
/* Of a copy to the device of as many bytes as a load has, within reason. */
double load_copy_rate(const load_bench *b);
double load_read_rate(const load_bench *b, const load_files *files, bench_read where);

void load_measure(load_bench *b, load_case *c, fst_trace *trace);
/* Where the library's word and the system's differ by over 2 %, it becomes a doubt. */
void load_check(load_bench *b, const load_case *c, const load_sample *s);

/* ---- load_verify.c ---- */

/* Loads once more and compares all bytes: with the files', and, after a cast, with what the CPU device makes of them. */
void load_verify(load_bench *b, const load_case *c);

/* ---- load_report.c ---- */

double load_rate(const load_bench *b, load_ceiling which); /* median; 0: not measured */
double load_seconds(const load_case *c);
double load_gb_per_s(const load_case *c); /* of bytes that were asked for */
void load_print(load_bench *b);
void load_json(const load_bench *b);

/* ---- load_timeline.c ---- */

/* A picture of who waits for whom: the first 100 ms of the load by thread and slot, and all of it. `copy_rate`: GB/s of
 * the link to the device; 0: there is none. */
void load_timeline(const char *path, const char *title, const load_sample *sample, const fst_trace *trace,
                   double copy_rate);

/* ---- load_turns.c ---- */

/* Until standard input ends: a line there is a case and when it begins; a line of JSON, what came out. */
void load_turns(load_bench *b);

/* ---- load_nccl.c ---- */

/* Makes b->comm with the processes of the other ranks, that do the same; the process ends where that fails. */
void load_join(load_bench *b);
/* The communicator's end. */
void load_part_company(load_bench *b);

/* ---- load_main.c ---- */

load_case *load_find_case(load_bench *b, const char *name);

int load_main(int argc, char **argv);

#endif
