/* Device memory through CUDA's mapping calls, for large blocks: one of 256 MiB takes 0.06 ms so, 0.36 ms from CUDA's pools, whose
 * locks copies wait for (docs/measuring.md). Of the CUDA module alone. */
#ifndef FST_GPU_CUDA_MAP_H
#define FST_GPU_CUDA_MAP_H

#include <cuda_runtime.h>
#include <stdint.h>

/* From any thread, with the device current; codes are cudaError_t's. A block of at least `size` bytes. cudaErrorNotSupported
 * where the device or its driver cannot map. */
int fst_map_block(int device, uint64_t size, void **out);

/* Gives a block back in the order of the stream, and does not wait for it. 0: it is none of these. */
int fst_unmap_behind(void *block, cudaStream_t stream);

#endif
