#include <signal.h>
#include <stddef.h>

#include "cli.h"

static volatile int caught;

/* Readers look at it in their threads. */
static void catch_signal(int signal) { __atomic_store_n(&caught, signal, __ATOMIC_RELAXED); }

void interrupt_install(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction old, action = {.sa_handler = catch_signal, .sa_flags = (int)SA_RESETHAND};
        /* What is ignored stays so: nohup, and a shell's background jobs. */
        if (!sigaction(signals[i], NULL, &old) && old.sa_handler != SIG_IGN)
            sigaction(signals[i], &action, NULL);
    }
}

const volatile int *interrupt_flag(void) { return &caught; }
