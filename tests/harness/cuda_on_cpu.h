// SPDX-License-Identifier: Apache-2.0
// The part of CUDA C++ that the kernels use, for a host compiler. cuda_on_cpu.cpp runs each thread
// of a block as a fiber: one at a time, switching where threads meet. NVIDIA's headers supply the
// vector and the 16-bit types.
//
// Stricter than hardware where hardware would forgive what the CUDA guide forbids: threads of a
// block meet at one and the same __syncthreads, lanes of a warp in the same operation with the same
// mask, and no lane reads from one that is absent. Shared memory starts as NaN (all bits set), and
// so does the target of an asynchronous copy until its wait. Not modelled: timing, threads of
// different blocks side by side (blocks run one after another, in any order), weak memory order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ use_L0K_SHARED_instead
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace l0k::harness {

// ---- cuda_on_cpu.cpp ----

struct Thread {
  uint3 index;
  unsigned rank;  // in the block
};

extern const Thread* thread;  // the one that runs
extern uint3 block_index;
extern dim3 block_size, grid_size;

// Where a kernel waits; two calls of a function are two places, whatever the compiler makes of it.
struct Place {
  const char* file;
  int line;
};

[[noreturn]] void stop(const char* why);  // ends the launch with an error
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*run)(const void*), const void* call);

void* static_shared(const char* name, const void* declaration, size_t bytes);
void* dynamic_shared();

void block_barrier(Place place);
void warp_barrier(unsigned mask, Place place);

// What lanes hand to each other.
struct Words {
  uint32_t word[10];
};
Words shuffle(unsigned mask, const Words& mine, int source_lane, Place place);
unsigned ballot(unsigned mask, bool vote, Place place);
// `change` runs once, on what all 32 lanes brought; each lane gets what it leaves there.
Words exchange(const Words& mine, void (*change)(Words (&of_lane)[32]), Place place);

void pause();  // others may run
void fence();
void before_atomic(const void* address);
void after_atomic(const void* address);

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int valid_bytes;
};
void add_copy(const Copy& copy);
void commit_copies();
bool next_complete_copy(int youngest_groups, Copy& copy);

// ---- on top of it, compiled with the kernels so that sanitizers see their memory accesses ----

inline void require_aligned(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    stop("misaligned address: expected a multiple of the access's size");
  }
}

inline int lane() { return static_cast<int>(thread->rank % 32); }

template <typename T>
T shuffle(unsigned mask, T value, int source_lane, Place place) {
  constexpr bool half = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || half, "shuffle: no such type on a GPU");
  Words mine{};
  std::memcpy(mine.word, &value, sizeof(T));
  const Words theirs = shuffle(mask, mine, source_lane, place);
  std::memcpy(&value, theirs.word, sizeof(T));
  return value;
}

template <typename T, typename Change>
T change_atomically(T* address, Change change) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "atomics: no such type on a GPU");
  require_aligned(address, sizeof(T));
  pause();
  before_atomic(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, change(old), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return old;
}

// All bits set from the start to the wait: who reads too early finds NaN, and who still reads what
// was there before finds NaN as well.
inline void copy_async_16(void* to, const void* from, int valid_bytes) {
  require_aligned(to, 16);
  require_aligned(from, 16);
  if (valid_bytes < 0 || valid_bytes > 16) stop("copy_async_16: expected 0 to 16 valid bytes");
  unsigned char* bytes = static_cast<unsigned char*>(to);
  for (int i = 0; i < 16; ++i) bytes[i] = 0xFF;
  add_copy({bytes, static_cast<const unsigned char*>(from), valid_bytes});
}

inline void copy_async_commit() { commit_copies(); }

inline void copy_async_wait(int youngest_groups) {
  pause();
  Copy copy;
  while (next_complete_copy(youngest_groups, copy)) {
    for (int i = 0; i < 16; ++i) copy.to[i] = i < copy.valid_bytes ? copy.from[i] : 0;
  }
}

// Words 0 to 3 of a lane are its part of a, 4 and 5 of b, 6 to 9 of d.
template <typename T>
void multiply_matrices(Words (&of_lane)[32]) {
  const auto number = [](uint32_t pair, int i) {
    const uint16_t bits = static_cast<uint16_t>(i % 2 == 0 ? pair : pair >> 16);
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<float>(value);
  };
  float a[16][16], b[16][8];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 16; ++i) {
      a[i][k] = number(of_lane[i % 8 * 4 + k % 8 / 2].word[i / 8 + 2 * (k / 8)], k);
    }
    for (int j = 0; j < 8; ++j) b[k][j] = number(of_lane[j * 4 + k % 8 / 2].word[4 + k / 8], k);
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      uint32_t& word = of_lane[i % 8 * 4 + j / 2].word[6 + i / 8 * 2 + j % 2];
      float sum;
      std::memcpy(&sum, &word, sizeof(sum));
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k][j];
      std::memcpy(&word, &sum, sizeof(sum));
    }
  }
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Place place = {__builtin_FILE(), __builtin_LINE()}) {
  Words mine{{a[0], a[1], a[2], a[3], b[0], b[1]}};
  std::memcpy(mine.word + 6, d, sizeof(d));
  mine = exchange(mine, multiply_matrices<T>, place);
  std::memcpy(d, mine.word + 6, sizeof(d));
}

// Words 0 to 3 of a lane are its row, then what it gets of each matrix.
template <bool transposed>
void spread_matrices(Words (&of_lane)[32]) {
  Words rows[32];
  std::copy(of_lane, of_lane + 32, rows);
  const auto number = [&](int row, int i) { return rows[row].word[i / 2] >> 16 * (i % 2) & 0xFFFF; };
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4;
    const int t = l % 4;
    for (int m = 0; m < 4; ++m) {
      const int row = 8 * m;
      of_lane[l].word[m] = transposed
                               ? number(row + 2 * t, g) | number(row + 2 * t + 1, g) << 16
                               : rows[row + g].word[t];
    }
  }
}

template <bool transposed>
void load_matrices(uint32_t (&fragment)[4], const void* row,
                   Place place = {__builtin_FILE(), __builtin_LINE()}) {
  require_aligned(row, 16);
  Words mine{};
  for (int i = 0; i < 4; ++i) mine.word[i] = static_cast<const uint32_t*>(row)[i];
  mine = exchange(mine, spread_matrices<transposed>, place);
  std::copy(mine.word, mine.word + 4, fragment);
}

}  // namespace l0k::harness

// ---- CUDA's own names ----

#define threadIdx (::l0k::harness::thread->index)
#define blockIdx (::l0k::harness::block_index)
#define blockDim (::l0k::harness::block_size)
#define gridDim (::l0k::harness::grid_size)

constexpr int warpSize = 32;

// The default arguments are evaluated where the kernel calls.
#define L0K_PLACE ::l0k::harness::Place place = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(L0K_PLACE) { l0k::harness::block_barrier(place); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, L0K_PLACE) {
  l0k::harness::warp_barrier(mask, place);
}
inline void __threadfence() { l0k::harness::fence(); }

inline unsigned __ballot_sync(unsigned mask, int vote, L0K_PLACE) {
  return l0k::harness::ballot(mask, vote != 0, place);
}
inline int __any_sync(unsigned mask, int vote, L0K_PLACE) {
  return l0k::harness::ballot(mask, vote != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, L0K_PLACE) {
  return l0k::harness::ballot(mask, vote == 0, place) == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, L0K_PLACE) {
  const int first = l0k::harness::lane() & ~(width - 1);
  return l0k::harness::shuffle(mask, value, first | (source & (width - 1)), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, L0K_PLACE) {
  const int mine = l0k::harness::lane();
  const int other = mine ^ bits;  // of an earlier segment it may be, of a later one not
  const bool inside = other <= (mine | (width - 1));
  return l0k::harness::shuffle(mask, value, inside ? other : mine, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, L0K_PLACE) {
  const int mine = l0k::harness::lane();
  const bool inside = (mine & (width - 1)) >= static_cast<int>(distance);
  return l0k::harness::shuffle(mask, value, inside ? mine - static_cast<int>(distance) : mine,
                               place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, L0K_PLACE) {
  const int mine = l0k::harness::lane();
  const bool inside = (mine & (width - 1)) + static_cast<int>(distance) < width;
  return l0k::harness::shuffle(mask, value, inside ? mine + static_cast<int>(distance) : mine,
                               place);
}

#undef L0K_PLACE

// Integers only: results must not depend on the order of threads.
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return l0k::harness::change_atomically(address, [=](T old) {
    T sum;
    __builtin_add_overflow(old, value, &sum);  // wraps around
    return sum;
  });
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return l0k::harness::change_atomically(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return l0k::harness::change_atomically(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return l0k::harness::change_atomically(address,
                                         [=](T old) { return old == expected ? value : old; });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

using std::max;
using std::min;

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
