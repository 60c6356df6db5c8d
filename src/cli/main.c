/* fst: looks into, loads and converts .safetensors checkpoints. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"

static const char usage[] =
    "usage: fst inspect [--json] PATH...\n"
    "       fst load [OPTION]... PATH...\n"
    "       fst convert [OPTION]... -o OUT.safetensors PATH...\n"
    "       fst convert [OPTION]... -o OUTDIR DIR\n"
    "       fst --help | --version\n"
    "\n"
    "inspect  prints the names, dtypes, shapes and sizes of tensors; reads headers alone\n"
    "load     loads onto a device, prints what that took\n"
    "convert  writes one .safetensors file, or a checkpoint directory of a checkpoint directory\n"
    "\n"
    "PATH     a .safetensors file, a directory (its model.safetensors.index.json, otherwise all its\n"
    "         .safetensors files), or an index file (*.json)\n"
    "\n"
    "--cast DTYPE   what float tensors become: F64, F32, F16, BF16, F8_E4M3, F8_E5M2,\n"
    "               F8_E4M3FNUZ, F8_E5M2FNUZ, in any case; without it, tensors stay as stored\n"
    "--scale        tensor, row or block: weights become F8_E4M3, F8_E5M2 or F8_E4M3FNUZ under computed\n"
    "               scales, one for each tensor, row or block of 128 x 128\n"
    "--device       auto: the first GPU that works, otherwise the CPU; cpu; or the number of a GPU\n"
    "--threads N    threads that read\n"
    "--reader       auto, threads (pread), direct (O_DIRECT) or uring (io_uring), for what is not cached\n"
    "--cache        whether what is read stays in the page cache: auto (when it fits), keep or avoid\n"
    "--tp RANK/SIZE loads this rank's part, by rules for Llama, Qwen, Mistral, DeepSeek, gpt-oss and the like\n"
    "--shard GLOB=DIM  what matches GLOB (* any characters, ? one) is cut along its dimension DIM, from 0;\n"
    "               GLOB=DIM/UNIT at multiples of UNIT; GLOB=replicate not at all. Before the rules of --tp;\n"
    "               of several that match the first counts\n"
    "--rank RANK/SIZE  for --shard without --tp\n"
    "--only GLOB    leaves out what matches no --only; --skip GLOB leaves out what matches\n"
    "--strict       a pattern that matches nothing is an error\n"
    "--read         auto, or exact: reads no more than the parts of files that are needed\n"
    "--json         prints one JSON object\n"
    "-o OUT         a name that ends in .safetensors: the file to write; one that exists is replaced once\n"
    "               the new one is complete. Any other: the directory to make, or to go on with after a run\n"
    "               that was ended\n"
    "--shard-size N bytes of tensors in one file of the directory, 5e9 without it\n"
    "--             ends the options: what follows are paths\n"
    "\n"
    "Exit status: 0; 1 when something failed; 2 when the command line is wrong; 130 after Ctrl-C.\n";

/* A file must not become descriptor 0, 1 or 2 because the caller had closed those. Writing to these
 * stand-ins fails, as it would have. */
static void occupy_standard_descriptors(void) {
    int fd;
    do fd = open("/dev/null", O_RDONLY);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0) close(fd);
}

/* A failed write is an error like others: it is not to end the process. */
static void ignore_write_signals(void) {
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
}

static int write_stdout(const char *data, size_t size) {
    while (size) {
        ssize_t put = write(STDOUT_FILENO, data, size);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) {
            report("standard output", FST_E_IO, put ? strerror(errno) : "nothing can be written");
            return EXIT_WRONG;
        }
        data += put;
        size -= (size_t)put;
    }
    return EXIT_OK;
}

static int run(const arguments *args, FILE *out) {
    switch (args->command) {
    case COMMAND_INSPECT: return run_inspect(args, out);
    case COMMAND_LOAD: return run_load(args, out);
    case COMMAND_CONVERT: return args->to_directory ? run_convert(args, out) : run_load(args, out);
    case COMMAND_HELP: return fputs(usage, out) < 0;
    case COMMAND_VERSION: return fprintf(out, "fst %s\n", fst_version()) < 0;
    }
    return EXIT_USAGE;
}

int main(int argc, char **argv) {
    occupy_standard_descriptors();
    ignore_write_signals();
    arguments args;
    int status = arguments_parse(argc, argv, &args);
    if (status) return status;
    /* Output is collected: nothing appears on stdout unless all went well. */
    char *text = NULL;
    size_t size = 0;
    FILE *out = must(open_memstream(&text, &size));
    status = run(&args, out);
    arguments_free(&args);
    if (fclose(out)) must(NULL);
    if (!status) status = write_stdout(text, size);
    free(text);
    return status;
}
