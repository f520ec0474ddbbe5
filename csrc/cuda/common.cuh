// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels share. Only this file and mma.cuh know who compiles: nvcc for GPUs, or a
// host compiler with -DL0K_HARNESS (tests/harness), which runs the same kernels on a CPU.
#pragma once

#include "common/host_device.h"
#include "common/tensors.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(L0K_HARNESS)
#include "cuda_on_cpu.h"
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#else
#error "CUDA sources: expected nvcc, or a host compiler with -DL0K_HARNESS"
#endif

// Functions of kernels only.
#define L0K_DEVICE __device__ __forceinline__

// Stands before a kernel's name: at most `threads` per block, at least `blocks_per_sm` resident.
#define L0K_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)

// Runs kernel(params) and checks that it started. A kernel has one argument, a trivially copyable
// struct by value; the name of a template with commas goes in parentheses.
#define L0K_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::l0k::launch(kernel, #kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#if defined(L0K_HARNESS)

#define L0K_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(l0kernels_harness, CPU, m)

// L0K_SHARED(float, tile, [32][33]) is an array of the block, L0K_SHARED(int, flag) one number.
// L0K_DYNAMIC_SHARED(float, tile) points to what the launch asked for. Both start at 16 bytes.
#define L0K_SHARED(type, name, ...)                                    \
  using name##_type = type __VA_ARGS__;                                \
  static char name##_place;                                            \
  name##_type& name = *static_cast<name##_type*>(                      \
      ::l0k::harness::static_shared(#name, &name##_place, sizeof(name##_type)))
#define L0K_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::l0k::harness::dynamic_shared())

#else

#define L0K_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(l0kernels, CUDA, m)

#define L0K_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define L0K_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char l0k_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(l0k_dynamic_shared)

// Only in PyTorch's CUDA library; weak, so that this one loads where PyTorch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#endif

namespace l0k {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// ---- launches ----

constexpr size_t kMaxParamsBytes = 32764;  // from compute capability 7.0 and CUDA 12.1 on

template <typename T>
struct AsIs {
  using Type = T;
};

#if defined(L0K_HARNESS)

struct Stream {};

inline Stream current_stream(const Tensor&) { return {}; }

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t) {}
};

template <typename Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            Stream, const typename AsIs<Params>::Type& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParamsBytes);
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, &params};
  const auto run = [](const void* c) {
    const Call& made = *static_cast<const Call*>(c);
    made.kernel(*made.params);
  };
  harness::launch(name, grid, block, shared_bytes, run, &call);
}

#else

using Stream = cudaStream_t;
using torch::stable::accelerator::DeviceGuard;

inline Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream != nullptr, "CUDA: PyTorch was built without it");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

inline void check_cuda(cudaError_t error, const char* kernel) {
  require(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

template <typename Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, const typename AsIs<Params>::Type& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParamsBytes);
  // Unasked, a block gets 48 KiB less its static shared memory.
  if (shared_bytes > 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               name);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  check_cuda(cudaGetLastError(), name);
}

#endif

// ---- warps and blocks ----

// The same bits in every lane, summed in one fixed order; all 32 lanes call it.
template <typename T>
L0K_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

// The sum over this lane and all before it.
L0K_DEVICE int warp_scan_inclusive(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// The sum over all threads before this one, and over the whole block; one-dimensional blocks of
// whole warps. All threads call it; it starts and ends with a barrier or what needs none.
L0K_DEVICE int block_scan_exclusive(int value, int& total) {
  L0K_SHARED(int, warp_totals, [32]);
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int inclusive = warp_scan_inclusive(value);
  __syncthreads();  // all have read the totals of an earlier call
  if (threadIdx.x % 32 == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before = total;
    total += warp_totals[w];
  }
  return before + inclusive - value;
}

// ---- memory ----

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
  __host__ __device__ T& operator[](int i) { return value[i]; }
  __host__ __device__ const T& operator[](int i) const { return value[i]; }
};

template <typename T>
using Vector16 = Vector<T, 16 / sizeof(T)>;

// 16 bytes at once, from and to addresses that are multiples of 16.
template <typename T>
L0K_DEVICE Vector16<T> load16(const T* from) {
#if defined(L0K_HARNESS)
  harness::require_aligned(from, 16);
#endif
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  Vector16<T> vector;
  memcpy(&vector, &raw, 16);
  return vector;
}

template <typename T>
L0K_DEVICE void store16(T* to, const Vector16<T>& vector) {
#if defined(L0K_HARNESS)
  harness::require_aligned(to, 16);
#endif
  uint4 raw;
  memcpy(&raw, &vector, 16);
  *reinterpret_cast<uint4*>(to) = raw;
}

// Whether threads may take `per_thread` of `count` numbers each, 16 bytes at once.
inline bool fits_vectors(int64_t count, int64_t per_thread,
                         std::initializer_list<const void*> pointers) {
  bool fits = count % per_thread == 0;
  for (const void* pointer : pointers) fits &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return fits;
}

// ---- numbers ----

L0K_HD float to_float(float value) { return value; }
L0K_HD float to_float(__half value) { return __half2float(value); }
L0K_HD float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to the nearest, ties to even.
template <typename T>
L0K_HD T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    static_assert(std::is_same_v<T, float>, "from_float: expected float, __half, __nv_bfloat16");
    return value;
  }
}

// To and from what is computed in.
template <typename S, typename T>
L0K_DEVICE S widen(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return to_float(value);
  }
}

template <typename T, typename S>
L0K_DEVICE T rounded(S value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return from_float<T>(value);
  }
}

// Calls run with a number of the tensor's dtype.
template <typename Run>
void with_dtype(const char* op, const Tensor& x, const Run& run) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Double) return run(double{});
  if (type == ScalarType::Float) return run(float{});
  if (type == ScalarType::BFloat16) return run(__nv_bfloat16{});
  require(type == ScalarType::Half, op, ": no kernel for this dtype");
  run(__half{});
}

template <typename W, typename R>
struct WeightTypes {
  using Weight = W;
  using Result = R;
};

// Calls run(WeightTypes<W, R>()) with the types of a weight and of what an operator makes of it.
template <typename Run>
void with_weight_types(const char* op, torch::headeronly::ScalarType weight,
                       torch::headeronly::ScalarType result, const Run& run) {
  using torch::headeronly::ScalarType;
  const auto is = [&](ScalarType w, ScalarType r) { return weight == w && result == r; };
  using Half = __half;
  using BFloat16 = __nv_bfloat16;
  if (is(ScalarType::Double, ScalarType::Double)) return run(WeightTypes<double, double>());
  if (is(ScalarType::Float, ScalarType::Float)) return run(WeightTypes<float, float>());
  if (is(ScalarType::Float, ScalarType::BFloat16)) return run(WeightTypes<float, BFloat16>());
  if (is(ScalarType::Float, ScalarType::Half)) return run(WeightTypes<float, Half>());
  if (is(ScalarType::BFloat16, ScalarType::BFloat16)) {
    return run(WeightTypes<BFloat16, BFloat16>());
  }
  if (is(ScalarType::Half, ScalarType::Half)) return run(WeightTypes<Half, Half>());
  require(false, op, ": no kernel for this pair of dtypes");
}

}  // namespace l0k
