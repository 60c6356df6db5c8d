/* bench_load: whole loads against their ceilings, in one run. docs/measuring.md tells how and what of. */
#include "load.h"

int main(int argc, char **argv) { return load_main(argc, argv); }
