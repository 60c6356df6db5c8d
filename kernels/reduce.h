// Launches a body that needs the maximum over its block: gather(block, thread, state), then, with the maximum
// of what all threads returned, finish(block, thread, state, maximum). hipCUB (rocPRIM) reduces on AMD, CUB
// on NVIDIA, a loop on the CPU. The maximum of integers is the same in any order: all devices agree.
#ifndef FST_REDUCE_H
#define FST_REDUCE_H

#include "launch.h"

#ifdef FST_CPU_LEVEL

namespace {

template <class Body> __attribute__((noinline)) void run_reduce(const Body &body, uint64_t blocks) {
    typename Body::State states[Body::threads];
    for (uint64_t block = 0; block < blocks; block++) {
        uint32_t maximum = 0;
        for (unsigned thread = 0; thread < Body::threads; thread++) {
            const uint32_t one = body.gather(block, thread, states[thread]);
            maximum = one > maximum ? one : maximum;
        }
        for (unsigned thread = 0; thread < Body::threads; thread++)
            body.finish(block, thread, states[thread], maximum);
    }
}

template <class Body> int launch_reduce(fst_queue, const Body &body, uint64_t blocks) {
    const PlainArithmetic plain;
    run_reduce(body, blocks);
    return FST_K_OK;
}

} // namespace

#else

#ifdef __CUDACC__
#include <cub/block/block_reduce.cuh>
#include <cuda/functional>
namespace fst_cub = cub;
#else
#include <hipcub/block/block_reduce.hpp>
namespace fst_cub = hipcub;
#endif

namespace {

// Registers for at least 4 waves a SIMD, or 1,024 threads a multiprocessor, whatever the scheduler would like to keep in
// flight. CUB has an instruction for its own operator alone.
#ifdef __CUDACC__
#define FST_REDUCE_BOUNDS __launch_bounds__(Body::threads, 1024 / Body::threads)
using Larger = ::cuda::maximum<>;
#else
#ifdef __HIP_DEVICE_COMPILE__
#define FST_REDUCE_BOUNDS __launch_bounds__(Body::threads) __attribute__((amdgpu_waves_per_eu(4)))
#else
#define FST_REDUCE_BOUNDS __launch_bounds__(Body::threads)
#endif
struct Larger {
    FST_INLINE uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};
#endif

template <class Body>
__global__ void FST_REDUCE_BOUNDS run_reduce(const Body body, uint64_t first) {
    using Reduce = fst_cub::BlockReduce<uint32_t, Body::threads>;
    __shared__ typename Reduce::TempStorage storage;
    __shared__ uint32_t shared_maximum;
    typename Body::State state;
    const uint64_t block = first + blockIdx.x;
    const uint32_t one = body.gather(block, threadIdx.x, state);
    const uint32_t maximum = Reduce(storage).Reduce(one, Larger());
    if (threadIdx.x == 0) shared_maximum = maximum;
    __syncthreads();
    body.finish(block, threadIdx.x, state, shared_maximum);
}

template <class Body> int launch_reduce(fst_queue stream, const Body &body, uint64_t blocks) {
    return launch_kernel<Body>(stream, run_reduce<Body>, body, blocks);
}

} // namespace
#endif
#endif
