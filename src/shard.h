/* Which part of a tensor a rank has, and the rules for names. Pure: no I/O, no device. */
#ifndef FST_SHARD_H
#define FST_SHARD_H

#include "fst.h"

#endif
