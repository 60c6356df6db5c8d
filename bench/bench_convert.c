/* bench_convert: every kernel, checked against a reference, then timed against a copy of as many bytes.
 *
 *     bench_convert [--device auto|cpu|N] [--bytes N[K|M|G]] [--filter TEXT|GLOB] [--runs N] [--threads N]
 *                   [--verify-only] [--json FILE] [--plot FILE.svg] [--list]
 *
 * docs/measuring.md says what is measured and how. */
#include "convert.h"

int main(int argc, char **argv) { return convert_main(argc, argv); }
