/* HIP's names for the CUDA runtime's calls: those that fst uses. C and C++, CUDA 12 and 13.
 * (AMD's own header for this does not compile with CUDA 13.) */
#ifndef FST_CUDA_HIP_RUNTIME_H
#define FST_CUDA_HIP_RUNTIME_H

#include <cuda_runtime.h>

typedef cudaError_t           hipError_t;
typedef cudaStream_t          hipStream_t;
typedef cudaEvent_t           hipEvent_t;
typedef cudaMemPool_t         hipMemPool_t;
typedef enum cudaDeviceAttr   hipDeviceAttribute_t;
typedef struct cudaDeviceProp hipDeviceProp_t;
typedef struct cudaFuncAttributes      hipFuncAttributes;
typedef struct cudaPointerAttributes   hipPointerAttribute_t;
typedef struct cudaMemPoolProps        hipMemPoolProps;

#define hipSuccess                  cudaSuccess
#define hipErrorInvalidValue        cudaErrorInvalidValue
#define hipErrorOutOfMemory         cudaErrorMemoryAllocation
#define hipErrorNotReady            cudaErrorNotReady
#define hipErrorUnknown             cudaErrorUnknown
#define hipErrorNoDevice            cudaErrorNoDevice
#define hipErrorInvalidDevice       cudaErrorInvalidDevice
#define hipErrorInsufficientDriver  cudaErrorInsufficientDriver
#define hipErrorNotSupported        cudaErrorNotSupported
#define hipErrorHostMemoryAlreadyRegistered cudaErrorHostMemoryAlreadyRegistered
#define hipGetErrorString           cudaGetErrorString
#define hipGetErrorName             cudaGetErrorName
#define hipGetLastError             cudaGetLastError
#define hipPeekAtLastError          cudaPeekAtLastError

#define hipRuntimeGetVersion        cudaRuntimeGetVersion
#define hipDriverGetVersion         cudaDriverGetVersion
#define hipGetDeviceCount           cudaGetDeviceCount
#define hipGetDevice                cudaGetDevice
#define hipSetDevice                cudaSetDevice
#define hipGetDeviceProperties      cudaGetDeviceProperties
#define hipDeviceGetPCIBusId        cudaDeviceGetPCIBusId
#define hipDeviceGetAttribute       cudaDeviceGetAttribute
#define hipDeviceAttributeComputeCapabilityMajor cudaDevAttrComputeCapabilityMajor
#define hipDeviceAttributeComputeCapabilityMinor cudaDevAttrComputeCapabilityMinor
#define hipDeviceAttributeMultiprocessorCount    cudaDevAttrMultiProcessorCount
#define hipDeviceAttributeMemoryPoolsSupported   cudaDevAttrMemoryPoolsSupported
#define hipDeviceAttributeHostNumaId             cudaDevAttrHostNumaId
#define hipDeviceSynchronize        cudaDeviceSynchronize

#define hipMalloc                   cudaMalloc
#define hipFree                     cudaFree
#define hipMallocAsync              cudaMallocAsync
#define hipFreeAsync                cudaFreeAsync
#define hipMemGetInfo               cudaMemGetInfo
#define hipPointerGetAttributes     cudaPointerGetAttributes
#define hipHostMalloc               cudaHostAlloc
#define hipHostFree                 cudaFreeHost
#define hipHostMallocDefault        cudaHostAllocDefault
#define hipHostRegister             cudaHostRegister
#define hipHostUnregister           cudaHostUnregister
#define hipHostRegisterDefault      cudaHostRegisterDefault
#define hipHostRegisterPortable     cudaHostRegisterPortable

#define hipDeviceGetDefaultMemPool  cudaDeviceGetDefaultMemPool
#define hipMemPoolCreate            cudaMemPoolCreate
#define hipMemPoolDestroy           cudaMemPoolDestroy
#define hipMemPoolTrimTo            cudaMemPoolTrimTo
#define hipMemPoolSetAttribute      cudaMemPoolSetAttribute
#define hipMemPoolGetAttribute      cudaMemPoolGetAttribute
#define hipMallocFromPoolAsync      cudaMallocFromPoolAsync
#define hipMemPoolAttrReleaseThreshold    cudaMemPoolAttrReleaseThreshold
#define hipMemPoolAttrReservedMemCurrent  cudaMemPoolAttrReservedMemCurrent
#define hipMemPoolAttrUsedMemCurrent      cudaMemPoolAttrUsedMemCurrent
#define hipMemAllocationTypePinned  cudaMemAllocationTypePinned
#define hipMemLocationTypeDevice    cudaMemLocationTypeDevice
#define hipMemHandleTypeNone        cudaMemHandleTypeNone

#define hipMemcpy                   cudaMemcpy
#define hipMemcpyAsync              cudaMemcpyAsync
#define hipMemset                   cudaMemset
#define hipMemsetAsync              cudaMemsetAsync
#define hipMemcpyHostToDevice       cudaMemcpyHostToDevice
#define hipMemcpyDeviceToHost       cudaMemcpyDeviceToHost
#define hipMemcpyDeviceToDevice     cudaMemcpyDeviceToDevice
#define hipMemcpyDefault            cudaMemcpyDefault

#define hipStreamCreate             cudaStreamCreate
#define hipStreamCreateWithFlags    cudaStreamCreateWithFlags
#define hipStreamDestroy            cudaStreamDestroy
#define hipStreamSynchronize        cudaStreamSynchronize
#define hipStreamQuery              cudaStreamQuery
#define hipStreamWaitEvent          cudaStreamWaitEvent
#define hipStreamNonBlocking        cudaStreamNonBlocking
#define hipEventCreate              cudaEventCreate
#define hipEventCreateWithFlags     cudaEventCreateWithFlags
#define hipEventDestroy             cudaEventDestroy
#define hipEventRecord              cudaEventRecord
#define hipEventSynchronize         cudaEventSynchronize
#define hipEventQuery               cudaEventQuery
#define hipEventElapsedTime         cudaEventElapsedTime
#define hipEventDefault             cudaEventDefault
#define hipEventDisableTiming       cudaEventDisableTiming
#define hipEventBlockingSync        cudaEventBlockingSync

#define hipLaunchKernel             cudaLaunchKernel
#define hipFuncGetAttributes        cudaFuncGetAttributes

#endif
