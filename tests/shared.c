/* Loads whose ranks share the reading: what each gets is what it gets alone, and files are read once in all. Ranks are threads
 * here; over MPI: tests/mpi. */
#include "shared.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fake_comm.h"
#include "harness.h"
#include "loading.h"
#include "support.h"

enum { MOST_RANKS = 4 };

typedef struct rank_load {
    const char *path;
    fst_options options;
    fst_model *model;
    fst_status status;
    fst_error error;
} rank_load;

static void *load_main(void *arg) {
    rank_load *r = arg;
    const char *files[] = {r->path, NULL};
    memset(&r->error, 0, sizeof r->error);
    r->status = fst_load(files, &r->options, &r->model, &r->error);
    return NULL;
}

/* All ranks at once, each with a context of its own. */
static void load_ranks(rank_load *loads, unsigned ranks, fake_comm *comm) {
    pthread_t threads[MOST_RANKS];
    for (unsigned r = 0; r < ranks; r++) {
        loads[r].options.comm_kind = FST_COMM_MPI;
        loads[r].options.comm = fake_comm_rank(comm, r);
        if (!loads[r].options.timeout_ms) loads[r].options.timeout_ms = 20000;
        CHECK_INT(0, pthread_create(&threads[r], NULL, load_main, &loads[r]));
    }
    for (unsigned r = 0; r < ranks; r++) pthread_join(threads[r], NULL);
}

static const fst_shard_rule rules[] = {
    {"*.rows", 0, 1}, {"*.cols", 1, 1}, {"*.weight", 1, 1}, {"*.deep", 2, 1}, {"only.0.*", FST_REPLICATE, 1},
    {NULL, 0, 0}};

/* Some tensors of several megabytes of units, small ones between them, and a quantized weight whose scales lie far off. */
static const char *write_files(uint64_t seed) {
    static unsigned char data[300 * 1000 * 2 + 64];
    static const char *const shapes[] = {"[300,1000]", "[300,1000]", "[7]",  "[20,30,500]",
                                         "[1000]",     "[300,1000]", "[3,8]"};
    static const char *const names[] = {
        "a.rows", "b.cols", "c.norm", "d.deep", "e.norm", "m.weight", "m.weight_scale_inv"};
    static const char *const dtypes[] = {"BF16", "BF16", "F32", "BF16", "BF16", "F8_E4M3", "F32"};
    static const size_t sizes[] = {600000, 600000, 28, 600000, 2000, 300000, 96};
    const char *config =
        "{\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}";
    support_tensor tensors[7];
    static unsigned char *copies[7];
    support_random(data, sizeof data, seed);
    for (int i = 0; i < 7; i++) {
        free(copies[i]);
        copies[i] = malloc(sizes[i]);
        memcpy(copies[i], data + i, sizes[i]);
        tensors[i] = (support_tensor){names[i], dtypes[i], shapes[i], copies[i], sizes[i]};
    }
    support_checkpoint(test_path("model.safetensors"), NULL, tensors, 7, seed % 50);
    support_write(test_path("config.json"), config, strlen(config));
    return test_path("model.safetensors");
}

static void check_same(const fst_model *want, const fst_model *got) {
    CHECK_INT(fst_model_count(want), fst_model_count(got));
    for (size_t i = 0; i < fst_model_count(want); i++) {
        fst_tensor a, b;
        CHECK_INT(FST_OK, fst_model_at(want, i, &a));
        CHECK_INT(FST_OK, fst_model_at(got, i, &b));
        CHECK_STR(a.name, b.name);
        CHECK_INT(a.nbytes, b.nbytes);
        CHECK_BYTES(a.data, b.data, a.nbytes);
    }
}

/* As NCCL's: of device memory, which is the host's here, behind what is queued on the stream. */
static int gather_on_device(fst_comm_use *use, void *memory, size_t nbytes, fst_queue stream,
                            fst_comm_request *request) {
    const fst_gpu *gpu;
    char reason[256];
    fst_error error;
    int code, done = 0;
    if (fst_gpu_find(FST_DEVICE_GPU(0), &gpu, reason, sizeof reason, &error)) return 1;
    code = gpu->calls->stream_wait(gpu, stream);
    if (!code) code = fake_comm_calls->gather(use, memory, nbytes, NULL, request);
    while (!code && !done) code = fake_comm_calls->test(use, request, &done);
    return code;
}

static int is_sound(fst_comm_use *use, fst_comm_request *request, int *done) {
    (void)use, (void)request, (void)done;
    return 0;
}

static void use_on_device(void) {
    static fst_comm_calls on_device;
    on_device = *fake_comm_calls;
    on_device.on_device = 1;
    on_device.gather = gather_on_device;
    on_device.test = is_sound;
    fst_peers_set_fake(&on_device);
}

static void check_loads(int on_gpu, size_t unit) {
    size_t usual = fst_shared_unit;
    for (unsigned ranks = 1; ranks <= MOST_RANKS; ranks++) {
        const char *path = write_files(ranks);
        rank_load loads[MOST_RANKS] = {0};
        fst_model *alone[MOST_RANKS];
        uint64_t read = 0, all;
        fst_stats stats = {.size = sizeof stats};
        for (unsigned r = 0; r < ranks; r++) {
            loads[r].path = path;
            loads[r].options = support_options(FST_DEVICE_CPU);
            loads[r].options.cast = FST_F32;
            loads[r].options.shards = rules;
            loads[r].options.rank = r;
            loads[r].options.ranks = ranks;
            CHECK_INT(FST_OK, fst_load(support_list(path), &loads[r].options, &alone[r], NULL));
            loads[r].options.device = on_gpu ? FST_DEVICE_GPU(0) : FST_DEVICE_CPU;
        }
        fst_shared_unit = unit;
        if (on_gpu) fake_gpu_begin(&(fake_gpu_options){.seed = ranks});
        fake_comm *comm = fake_comm_new(ranks, &(fake_comm_options){.late = 2});
        if (on_gpu) use_on_device();
        load_ranks(loads, ranks, comm);
        for (unsigned r = 0; r < ranks; r++) {
            if (loads[r].status) test_fail(__FILE__, __LINE__, "rank %u: %s", r, loads[r].error.text);
            check_same(alone[r], loads[r].model);
            CHECK_INT(FST_OK, fst_model_stats(loads[r].model, &stats));
            read += stats.bytes_read;
            fst_model_free(loads[r].model);
            fst_model_free(alone[r]);
        }
        /* Once in all, but for headers and scales. */
        FILE *file = fopen(path, "rb");
        CHECK(file && fseek(file, 0, SEEK_END) == 0);
        all = (uint64_t)ftell(file);
        fclose(file);
        CHECK(read >= all && read <= all + ranks * 4096);
        fake_comm_free(comm);
        fst_release_cached();
        if (on_gpu) fake_gpu_end();
        fst_shared_unit = usual;
    }
}

TEST(shared, every_rank_gets_its_part) {
    check_loads(0, 4096);
    check_loads(0, 64 << 10);
}

TEST(shared, every_rank_gets_its_part_on_gpus) { check_loads(1, 16 << 10); }

static ssize_t (*usual_pread)(int fd, void *buffer, size_t size, uint64_t offset);
static atomic_int reading, most_reading;

static ssize_t slow_pread(int fd, void *buffer, size_t size, uint64_t offset) {
    if (size != fst_shared_part) return usual_pread(fd, buffer, size, offset);
    int now = atomic_fetch_add(&reading, 1) + 1, most = atomic_load(&most_reading);
    while (now > most && !atomic_compare_exchange_weak(&most_reading, &most, now)) continue;
    usleep(1000);
    ssize_t got = usual_pread(fd, buffer, size, offset);
    atomic_fetch_sub(&reading, 1);
    return got;
}

/* Who waits for a unit reads a part of it. */
TEST(shared, units_are_read_by_several_threads) {
    size_t usual = fst_shared_part;
    fst_shared_part = 4096;
    check_loads(0, 64 << 10);
    check_loads(1, 64 << 10);
    atomic_store(&most_reading, 0);
    usual_pread = fst_os_calls.pread;
    fst_os_calls.pread = slow_pread;
    check_loads(1, 64 << 10);
    fst_os_calls.pread = usual_pread;
    fst_shared_part = usual;
    CHECK(atomic_load(&most_reading) > MOST_RANKS); /* each rank's one thread would be as many */
}

/* ---- What goes wrong ---- */

static void expect_failures(rank_load *loads, unsigned ranks, unsigned failing, fst_status status) {
    for (unsigned r = 0; r < ranks; r++) {
        CHECK(loads[r].model == NULL);
        CHECK_INT(r == failing ? status : FST_E_PEER, loads[r].status);
        if (r != failing) CHECK_INT(status, loads[r].error.code);
    }
}

static int ends_at_once(void *arg, const fst_progress *progress) {
    (void)progress;
    return *(int *)arg;
}

TEST(shared, a_rank_that_is_cancelled_ends_all) {
    int ends[3] = {0, 1, 0};
    rank_load loads[3] = {0};
    const char *path = write_files(1);
    size_t usual = fst_shared_unit;
    fst_shared_unit = 4096;
    fake_comm *comm = fake_comm_new(3, &(fake_comm_options){0});
    for (unsigned r = 0; r < 3; r++) {
        loads[r] = (rank_load){.path = path, .options = support_options(FST_DEVICE_CPU)};
        loads[r].options.shards = rules;
        loads[r].options.cast = FST_BF16;
        loads[r].options.progress = ends_at_once;
        loads[r].options.progress_arg = &ends[r];
    }
    load_ranks(loads, 3, comm);
    /* It may have been done by then. */
    if (loads[1].status) expect_failures(loads, 3, 1, FST_E_CANCELLED);
    for (unsigned r = 0; r < 3; r++) fst_model_free(loads[r].model);
    fake_comm_free(comm);
    fst_release_cached();
    fst_shared_unit = usual;
}

TEST(shared, a_rank_that_cannot_plan_ends_all) {
    static const fst_shard_rule wrong[] = {{"a.rows", 5, 1}, {NULL, 0, 0}};
    rank_load loads[3] = {0};
    const char *path = write_files(1);
    fake_comm *comm = fake_comm_new(3, &(fake_comm_options){0});
    for (unsigned r = 0; r < 3; r++) {
        loads[r] = (rank_load){.path = path, .options = support_options(FST_DEVICE_CPU)};
        loads[r].options.cast = FST_BF16;
        loads[r].options.shards = r == 2 ? wrong : rules;
    }
    load_ranks(loads, 3, comm);
    expect_failures(loads, 3, 2, FST_E_ARG);
    fake_comm_free(comm);
    fst_release_cached();
}

TEST(shared, a_rank_that_finds_no_file_ends_all) {
    rank_load loads[3] = {0};
    const char *path = write_files(1);
    fake_comm *comm = fake_comm_new(3, &(fake_comm_options){0});
    for (unsigned r = 0; r < 3; r++)
        loads[r] = (rank_load){.path = r == 1 ? "no such file.safetensors" : path,
                               .options = support_options(FST_DEVICE_CPU)};
    load_ranks(loads, 3, comm);
    expect_failures(loads, 3, 1, FST_E_IO);
    CHECK_INT(2, loads[1].error.code); /* its own error has its own */
    fake_comm_free(comm);
    fst_release_cached();
}

TEST(shared, a_rank_with_other_files) {
    rank_load loads[2] = {0};
    const char *path = write_files(1);
    static const unsigned char few[100];
    const support_tensor tensor = {"t", "U8", "[100]", few, 100};
    support_checkpoint(test_path("other.safetensors"), NULL, &tensor, 1, 0);
    fake_comm *comm = fake_comm_new(2, &(fake_comm_options){0});
    for (unsigned r = 0; r < 2; r++)
        loads[r] = (rank_load){.path = r ? test_path("other.safetensors") : path,
                               .options = support_options(FST_DEVICE_CPU)};
    load_ranks(loads, 2, comm);
    for (unsigned r = 0; r < 2; r++) CHECK_INT(FST_E_ARG, loads[r].status);
    fake_comm_free(comm);
    fst_release_cached();
}

TEST(shared, a_rank_that_does_not_come) {
    rank_load load = {0};
    fake_comm *comm = fake_comm_new(2, &(fake_comm_options){0});
    load = (rank_load){.path = write_files(1), .options = support_options(FST_DEVICE_CPU)};
    load.options.timeout_ms = 100;
    load_ranks(&load, 1, comm);
    CHECK_INT(FST_E_PEER, load.status);
    CHECK_INT(0, load.error.code);
    CHECK(load.model == NULL);
    fst_release_cached();
    (void)comm; /* the rank that never came may still be waited for */
}

/* No failure, and said: the ring's slots, and what is read for other ranks. */
TEST(shared, memory_that_cannot_be_pinned) {
    enum { SLOTS = 8 }; /* of an engine with support_options */
    rank_load load = {.path = write_files(1), .options = support_options(FST_DEVICE_GPU(0))};
    fst_options alone = support_options(FST_DEVICE_CPU);
    fst_stats stats = {.size = sizeof stats};
    fst_model *want;
    CHECK_INT(FST_OK, fst_load(support_list(load.path), &alone, &want, NULL));
    fake_gpu_begin(&(fake_gpu_options){.seed = 1, .pins_at_most = 1}); /* the words of ranks */
    fake_comm *comm = fake_comm_new(1, &(fake_comm_options){0});
    use_on_device();
    load_ranks(&load, 1, comm);
    CHECK_INT(FST_OK, load.status);
    check_same(want, load.model);
    CHECK_INT(FST_OK, fst_model_stats(load.model, &stats));
    CHECK_INT(SLOTS + FST_SHARED_ROUNDS, stats.slots_unpinned);
    fst_model_free(load.model);
    fst_model_free(want);
    fake_comm_free(comm);
    fst_release_cached();
    fake_gpu_end();
}

/* Scales of FNUZ codes are doubled on the host, which has them only where a rank reads for itself. */
TEST(shared, scales_are_not_doubled_on_gpus) {
    rank_load load = {.path = write_files(1), .options = support_options(FST_DEVICE_GPU(0))};
    fake_gpu_begin(&(fake_gpu_options){.seed = 1});
    fake_comm *comm = fake_comm_new(1, &(fake_comm_options){0});
    use_on_device();
    load.options.cast = FST_F8_E4M3FNUZ;
    load_ranks(&load, 1, comm);
    CHECK_INT(FST_E_UNSUPPORTED, load.status);
    if (!strstr(load.error.text, "FNUZ")) test_fail(__FILE__, __LINE__, "%s", load.error.text);
    fake_comm_free(comm);
    fst_release_cached();
    fake_gpu_end();
}

TEST(shared, a_conversion_does_not_share) {
    fst_options options = support_options(FST_DEVICE_CPU);
    fake_comm *comm = fake_comm_new(1, &(fake_comm_options){0});
    fst_error error;
    char output[1024];
    write_files(1);
    snprintf(output, sizeof output, "%s", test_path("out"));
    options.comm_kind = FST_COMM_MPI;
    options.comm = fake_comm_rank(comm, 0);
    CHECK_INT(FST_E_ARG, fst_convert_directory(test_directory(), output, &options, NULL, NULL, &error));
    CHECK(access(output, F_OK) != 0);
    fake_comm_free(comm);
}

TEST(shared, a_stream_does_not_share) {
    fst_options options = support_options(FST_DEVICE_CPU);
    fake_comm *comm = fake_comm_new(1, &(fake_comm_options){0});
    fst_stream *stream;
    fst_error error;
    options.comm_kind = FST_COMM_MPI;
    options.comm = fake_comm_rank(comm, 0);
    CHECK_INT(FST_E_ARG, fst_stream_open(support_list(write_files(1)), &options, &stream, &error));
    fake_comm_free(comm);
}
