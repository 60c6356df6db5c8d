// Launches a body: a struct with members blocks and `void operator()(uint64_t block, unsigned thread) const`,
// and a constant `threads`. On a GPU as a kernel, on the CPU as loops (host.h). Nothing here has external
// linkage: each file is compiled for several targets that end up in one program.
#ifndef FST_LAUNCH_H
#define FST_LAUNCH_H

#include "kernels.h"

#ifdef FST_CPU_LEVEL
#include "host.h"
#else
#include <hip/hip_runtime.h>

#include "numeric.h"

#define FST_SYMBOL(name) name##_gpu

namespace {

template <class Body> __global__ void __launch_bounds__(Body::threads) run(const Body body, uint64_t first) {
    body(first + blockIdx.x, threadIdx.x);
}

// AMD counts the threads of a launch in 32 bits: more go in several launches.
template <class Body>
int launch_kernel(fst_queue stream, void (*kernel)(Body, uint64_t), const Body &body, uint64_t blocks) {
    constexpr uint64_t most = 0x80000000u / Body::threads;
    for (uint64_t first = 0; first < blocks; first += most) {
        const uint64_t n = blocks - first < most ? blocks - first : most;
        void *args[] = {const_cast<Body *>(&body), &first};
        const hipError_t error =
            hipLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(static_cast<unsigned>(n)),
                            dim3(Body::threads), args, 0, static_cast<hipStream_t>(stream));
        if (error != hipSuccess) return static_cast<int>(error);
    }
    return FST_K_OK;
}

template <class Body> int launch(fst_queue stream, const Body &body, uint64_t blocks) {
    return launch_kernel<Body>(stream, run<Body>, body, blocks);
}

// What registers must leave room for: blocks a multiprocessor on NVIDIA, waves a SIMD on AMD.
#ifdef __CUDACC__
template <class Body> constexpr int resident = Body::blocks_resident;
#else
template <class Body> constexpr int resident = 4;
#endif

// A body in two phases, `before` and `after` a barrier, that share a Body::Shared. A constant more: `blocks_resident`.
template <class Body>
__global__ void __launch_bounds__(Body::threads, resident<Body>) run_phases(const Body body, uint64_t first) {
    __shared__ typename Body::Shared shared;
    body.before(first + blockIdx.x, threadIdx.x, shared);
    __syncthreads();
    body.after(first + blockIdx.x, threadIdx.x, shared);
}

template <class Body> int launch_phases(fst_queue stream, const Body &body, uint64_t blocks) {
    return launch_kernel<Body>(stream, run_phases<Body>, body, blocks);
}

} // namespace
#endif

namespace {

// Whether bodies take whole ranges by element (the CPU), or vectors (a GPU, and its shape in tests).
#ifdef FST_BY_ELEMENT
constexpr bool by_element = true;
#else
constexpr bool by_element = false;
#endif

} // namespace
#endif
