// What every op here shares: argument checks, the launch, and a warp's helpers.
//
// Each op is one .cu file and exports one function; its meaning is the function of the same name in sglang_dflash/kernels.
// Outputs are given by the caller. No op allocates, waits, or reads a value on the host, so all may be captured.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <initializer_list>

namespace dflash {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarpsPerBlock = 4;  // where warps work alone

// Element types as tensors name them.
template <typename T> struct TypeOf;
template <> struct TypeOf<int64_t> { static constexpr DLDataType value{kDLInt, 64, 1}; };
template <> struct TypeOf<int32_t> { static constexpr DLDataType value{kDLInt, 32, 1}; };
template <> struct TypeOf<float> { static constexpr DLDataType value{kDLFloat, 32, 1}; };
template <> struct TypeOf<__half> { static constexpr DLDataType value{kDLFloat, 16, 1}; };
template <> struct TypeOf<__nv_bfloat16> { static constexpr DLDataType value{kDLBfloat, 16, 1}; };
template <> struct TypeOf<bool> { static constexpr DLDataType value{kDLBool, 8, 1}; };

inline bool same_type(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

// The data of a contiguous tensor of this element type and shape; an error names the tensor.
template <typename T>
T* data(const TensorView& tensor, const char* name, std::initializer_list<int64_t> shape) {
  TVM_FFI_ICHECK(same_type(tensor.dtype(), TypeOf<T>::value)) << name << " has another element type";
  TVM_FFI_ICHECK_EQ(tensor.ndim(), static_cast<int>(shape.size())) << name << " has another number of dimensions";
  int64_t stride = 1;
  for (int i = tensor.ndim() - 1; i >= 0; --i) {
    const int64_t size = shape.begin()[i];
    TVM_FFI_ICHECK_EQ(tensor.size(i), size) << name << " has another size in dimension " << i;
    TVM_FFI_ICHECK(size == 1 || tensor.stride(i) == stride) << name << " is not contiguous";
    stride *= size;
  }
  return static_cast<T*>(tensor.data_ptr());
}

inline cudaStream_t stream_of(const TensorView& tensor) {
  const DLDevice device = tensor.device();
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

#ifndef DFLASH_ON_CPU
#define DFLASH_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t stream, Args... args) {
  shared = (shared + 15) / 16 * 16;  // loops are unrolled to whole vectors, which read up to there
  if (shared > 48 * 1024) {
    TVM_FFI_ICHECK_EQ(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), cudaSuccess)
        << "needs " << shared << " bytes of shared memory, more than this device has";
  }
  kernel<<<grid, threads, shared, stream>>>(static_cast<Params>(args)...);
  const cudaError_t error = cudaGetLastError();
  TVM_FFI_ICHECK_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float(float x) { return x; }
template <> __device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

// All lanes' values joined, for all lanes.
template <typename T, typename Join>
__device__ inline T over_warp(T x, Join join) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

template <typename T>
__device__ inline T warp_sum(T x) {
  return over_warp(x, [](T a, T b) { return a + b; });
}

__device__ inline float warp_max(float x) {
  return over_warp(x, [](float a, float b) { return fmaxf(a, b); });
}

// Of integers one instruction, from compute capability 8.0 on.
#if __CUDA_ARCH__ >= 800
__device__ inline int warp_max(int x) { return __reduce_max_sync(kAll, x); }
__device__ inline unsigned warp_min(unsigned x) { return __reduce_min_sync(kAll, x); }
#else
__device__ inline int warp_max(int x) {
  return over_warp(x, [](int a, int b) { return max(a, b); });
}
__device__ inline unsigned warp_min(unsigned x) {
  return over_warp(x, [](unsigned a, unsigned b) { return min(a, b); });
}
#endif

}  // namespace dflash
