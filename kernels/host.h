// Runs a body on the CPU, in the thread that calls: its blocks one after the other, a block's threads as
// a loop. FST_CPU_LEVEL (2, 3, 4) is the level of x86-64 that this file is compiled for.
#ifndef FST_HOST_H
#define FST_HOST_H

#include "kernels.h"
#include "numeric.h"

// Bodies take whole ranges by element, which compilers vectorise. Tests also want them in a GPU's shape, by
// vectors of 16 bytes with ragged ends: FST_DEVICE_SHAPE.
#ifndef FST_DEVICE_SHAPE
#define FST_BY_ELEMENT
#else
// They look at memory that holds words of other types, bytes above all.
struct __attribute__((may_alias, aligned(8))) uint2 { uint32_t x, y; };
struct __attribute__((may_alias, aligned(16))) uint4 { uint32_t x, y, z, w; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
#endif

#define FST_JOIN_(name, level) name##_v##level
#define FST_JOIN(name, level) FST_JOIN_(name, level)
#define FST_SYMBOL(name) FST_JOIN(name, FST_CPU_LEVEL)

namespace {

template <class Body> __attribute__((noinline)) void run(const Body &body, uint64_t blocks) {
    for (uint64_t block = 0; block < blocks; block++)
        for (unsigned thread = 0; thread < Body::threads; thread++) body(block, thread);
}

// The caller's rounding mode and flushing of subnormals must not show in the results.
class PlainArithmetic {
  public:
    PlainArithmetic() { __builtin_ia32_ldmxcsr(0x1F80); } // to nearest, subnormals kept, exceptions masked
    ~PlainArithmetic() { __builtin_ia32_ldmxcsr(saved_); }
    PlainArithmetic(const PlainArithmetic &) = delete;
    PlainArithmetic &operator=(const PlainArithmetic &) = delete;

  private:
    const unsigned saved_ = __builtin_ia32_stmxcsr();
};

template <class Body> int launch(fst_queue, const Body &body, uint64_t blocks) {
    const PlainArithmetic plain;
    run(body, blocks);
    return FST_K_OK;
}

template <class Body> __attribute__((noinline)) void run_phases(const Body &body, uint64_t blocks) {
    // Zeroed, as a tile at the edge reads (and does not store) words that nothing wrote.
    typename Body::Shared shared = {};
    for (uint64_t block = 0; block < blocks; block++) {
        for (unsigned thread = 0; thread < Body::threads; thread++) body.before(block, thread, shared);
        for (unsigned thread = 0; thread < Body::threads; thread++) body.after(block, thread, shared);
    }
}

template <class Body> int launch_phases(fst_queue, const Body &body, uint64_t blocks) {
    const PlainArithmetic plain;
    run_phases(body, blocks);
    return FST_K_OK;
}

} // namespace
#endif
