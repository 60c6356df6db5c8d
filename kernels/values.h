// What the codes of bitsandbytes' 4 bits mean.
#ifndef FST_VALUES_H
#define FST_VALUES_H

#include "pack.h"

namespace {

// NF4's and FP4's values, for a checkpoint that does not bring its own.
#ifndef FST_CPU_LEVEL
__device__
#endif
const uint32_t bnb4_values[2][16] = {{0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
                                 0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000},
                                {0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000, 0x3EAAAAAB, 0x3F000000, 0x3E2AAAAB, 0x3E800000,
                                 0x00000000, 0xBBAAAAAB, 0xBF2AAAAB, 0xBF800000, 0xBEAAAAAB, 0xBF000000, 0xBE2AAAAB, 0xBE800000}};

// F32 bits, by the checkpoint's own map or, without one (0), by the table.
FST_FN uint32_t value_of(uint64_t map, unsigned fp4, uint32_t code) {
    return global<const uint32_t>(map ? map : reinterpret_cast<uint64_t>(bnb4_values[fp4]))[code];
}

} // namespace
#endif
