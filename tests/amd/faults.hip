// Kernels that check_isa.py must find fault with, each for the one thing that its namespace says.
#include <hip/hip_runtime.h>
#include <stdint.h>

namespace {
namespace fault {

template <int Src, int Dst> struct Cast;

#define GLOBAL __attribute__((address_space(1)))

// 16 bytes at any multiple of 4, out of the one or two aligned ones that they lie in, as a right kernel loads them.
__device__ uint4 load(uint64_t from) {
    if (from % 16 == 0) {
#ifdef FST_FAULT_NARROW_ALIGNED // where most tensors lie, by 4 loads
        const volatile GLOBAL uint32_t *words = (const volatile GLOBAL uint32_t *)from;
        return make_uint4(words[0], words[1], words[2], words[3]);
#else
        return *(const GLOBAL uint4 *)from;
#endif
    }
    const GLOBAL uint4 *low = (const GLOBAL uint4 *)(from & ~15ull);
    const uint4 a = low[0], b = low[1];
    return make_uint4(a.y ^ b.y, a.z ^ b.z, a.w ^ b.w, a.x ^ b.x);
}

#if defined FST_FAULT_NONE || defined FST_FAULT_NARROW_ALIGNED // 16 bytes in, 16 bytes out
template <> struct Cast<18, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const { ((GLOBAL uint4 *)dst)[i] = load(src + 16ull * i); }
};
#endif

#ifdef FST_FAULT_NARROW_LOAD // F32 to BF16: 16 bytes are due on the side of the loads
template <> struct Cast<18, 15> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        ((GLOBAL uint16_t *)dst)[i] = (uint16_t)(((const GLOBAL uint32_t *)src)[i] >> 16);
    }
};
#endif

#ifdef FST_FAULT_NARROW_STORE // BF16 to F32
template <> struct Cast<15, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        ((GLOBAL uint32_t *)dst)[i] = (uint32_t)((const GLOBAL uint16_t *)src)[i] << 16;
    }
};
#endif

#ifdef FST_FAULT_FLAT // pointers out of memory, of which the compiler does not know that they are global
template <> struct Cast<18, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        uint4 *const *list = (uint4 *const *)src;
        list[1][i] = list[0][i];
        ((GLOBAL uint4 *)dst)[i] = load(src + 16ull * i);
    }
};
#endif

#ifdef FST_FAULT_SCRATCH // an array indexed by what is known only at run time
template <> struct Cast<18, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        uint4 v[8];
        for (unsigned k = 0; k < 8; k++) v[k] = ((const GLOBAL uint4 *)src)[i + k];
        for (unsigned k = 0; k < 8; k++) v[v[k].x % 8].y ^= v[k].z;
        for (unsigned k = 0; k < 8; k++) ((GLOBAL uint4 *)dst)[i + k] = v[v[k].w % 8];
    }
};
#endif

#ifdef FST_FAULT_SPILL // 512 values, all alive at once, in a block whose registers are short
#define FST_FAULT_THREADS 1024
template <> struct Cast<18, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        uint4 v[128];
#pragma unroll
        for (unsigned k = 0; k < 128; k++) v[k] = ((const GLOBAL uint4 *)src)[i + k * 64];
        __syncthreads();
#pragma unroll
        for (unsigned k = 0; k < 128; k++) ((GLOBAL uint4 *)dst)[i + k * 64] = v[127 - k];
    }
};
#endif

#ifdef FST_FAULT_SHARED // 48 KiB for a block of 64: one or two of them in a place with room for 32 waves
#define FST_FAULT_THREADS 64
template <> struct Cast<18, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        __shared__ uint4 tile[3072];
        for (unsigned k = threadIdx.x; k < 3072; k += 64) tile[k] = ((const GLOBAL uint4 *)src)[i + k];
        __syncthreads();
        for (unsigned k = threadIdx.x; k < 3072; k += 64) ((GLOBAL uint4 *)dst)[i + k] = tile[3071 - k];
    }
};
#endif

#ifdef FST_FAULT_CALL // a function that is not inlined
__device__ __attribute__((noinline)) uint4 turn(uint4 v) { return make_uint4(v.w, v.z, v.y, v.x); }
template <> struct Cast<18, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        ((GLOBAL uint4 *)dst)[i] = turn(load(src + 16ull * i));
    }
};
#endif

#ifdef FST_FAULT_TRAP // what AMD's own fp8 type becomes where it exists only in name
template <> struct Cast<18, 18> {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        ((GLOBAL uint4 *)dst)[i] = load(src + 16ull * i);
        if (i == 7) __builtin_trap();
    }
};
#endif

#ifdef FST_FAULT_UNKNOWN // a kernel that no rule knows
template <int Src, int Dst> struct Stranger {
    uint64_t src, dst;
    __device__ void operator()(unsigned i) const {
        ((GLOBAL uint4 *)dst)[i] = ((const GLOBAL uint4 *)src)[i];
    }
};
#define FST_FAULT_BODY fault::Stranger<18, 18>
#endif

} // namespace fault

#ifndef FST_FAULT_THREADS
#define FST_FAULT_THREADS 256
#endif

template <class Body> __global__ void __launch_bounds__(FST_FAULT_THREADS) run(const Body body) {
    body(blockIdx.x * FST_FAULT_THREADS + threadIdx.x);
}

#if defined FST_FAULT_NARROW_LOAD
#define FST_FAULT_BODY fault::Cast<18, 15>
#elif defined FST_FAULT_NARROW_STORE
#define FST_FAULT_BODY fault::Cast<15, 18>
#elif !defined FST_FAULT_BODY
#define FST_FAULT_BODY fault::Cast<18, 18>
#endif
template __global__ void run<FST_FAULT_BODY>(FST_FAULT_BODY);

} // namespace
