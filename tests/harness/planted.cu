// SPDX-License-Identifier: Apache-2.0
// Small kernels with a bug each, which the harness must catch, and without it.
#include "cuda/mma.cuh"

namespace l0k {
namespace {

constexpr int kThreads = 64;

struct Params {
  const float* x;
  float* y;
  int64_t n;
  int* ticket;
};

Tensor run(void (*kernel)(Params), const Tensor& x, int blocks = 1, size_t shared_bytes = 0,
           int threads = kThreads) {
  const Tensor input = dense(x);
  Tensor y = uninitialized(input, {input.size(0)});
  int ticket = 0;
  L0K_LAUNCH(kernel, blocks, threads, shared_bytes, current_stream(x),
             {data<float>(input), out<float>(y), input.size(0), &ticket});
  return y;
}

// ---- order of threads ----

// The block's numbers in reverse.
template <bool kBug>
__global__ void reverse(const Params p) {
  L0K_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = p.x[threadIdx.x];
  if (!kBug) __syncthreads();
  p.y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// As above, one warp; the barrier is the warp's.
template <bool kBug>
__global__ void reverse_warp(const Params p) {
  L0K_SHARED(float, tile, [32]);
  tile[threadIdx.x] = p.x[threadIdx.x];
  if (!kBug) __syncwarp();
  p.y[threadIdx.x] = tile[31 - threadIdx.x];
}

// Sums over rounds that share one tile: the second barrier keeps it until all have read it.
template <bool kBug>
__global__ void rounds(const Params p) {
  L0K_SHARED(float, tile, [kThreads]);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = p.x[threadIdx.x] + round;
    __syncthreads();
    sum += tile[(threadIdx.x + 7) % kThreads];
    if (!kBug) __syncthreads();
  }
  p.y[threadIdx.x] = sum;
}

// The last block adds up what all have stored; without fences it may not see it.
template <bool kBug>
__global__ void last_block(const Params p) {
  L0K_SHARED(bool, is_last);
  if (threadIdx.x == 0) {
    p.y[blockIdx.x] = p.x[blockIdx.x];
    if (!kBug) __threadfence();
    is_last = atomicAdd(p.ticket, 1) == static_cast<int>(gridDim.x) - 1;
    if (!kBug) __threadfence();
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 1) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += p.y[b];
  p.y[0] = sum;
}

// Two blocks, one place.
template <bool kBug>
__global__ void same_place(const Params p) {
  if (threadIdx.x == 0) p.y[kBug ? 0 : blockIdx.x] = p.x[blockIdx.x];
}

// ---- divergence ----

template <bool kBug>
__global__ void skipped_barrier(const Params p) {
  L0K_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = p.x[threadIdx.x];
  if (!kBug || threadIdx.x != 5) __syncthreads();
  const float sum = warp_sum(tile[threadIdx.x ^ 32]);
  p.y[threadIdx.x] = sum;
  __syncwarp();
}

template <bool kBug>
__global__ void two_barriers(const Params p) {
  if (kBug && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.y[threadIdx.x] = p.x[threadIdx.x];
}

template <bool kBug>
__global__ void other_masks(const Params p) {
  const unsigned mask = kBug && threadIdx.x % 32 < 16 ? 0x0000FFFFu : kFullWarp;
  p.y[threadIdx.x] = __shfl_sync(mask, p.x[threadIdx.x], 0);
}

template <bool kBug>
__global__ void absent_lane(const Params p) {
  if (kBug && threadIdx.x == 3) return;
  p.y[threadIdx.x] = __shfl_sync(kFullWarp, p.x[threadIdx.x], 3);
}

// ---- bounds ----

template <bool kBug>
__global__ void write_dynamic(const Params p) {
  L0K_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + kBug] = p.x[threadIdx.x];
  p.y[threadIdx.x] = tile[threadIdx.x + kBug];
}

template <bool kBug>
__global__ void read_dynamic(const Params p) {
  L0K_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = p.x[threadIdx.x];
  __syncthreads();
  p.y[threadIdx.x] = tile[threadIdx.x + kBug];
}

template <bool kBug>
__global__ void write_static(const Params p) {
  L0K_SHARED(float, tile, [2][kThreads / 2]);
  float* flat = &tile[0][0];
  flat[threadIdx.x + kBug] = p.x[threadIdx.x];
  p.y[threadIdx.x] = flat[threadIdx.x + kBug];
}

template <bool kBug>
__global__ void read_static(const Params p) {
  L0K_SHARED(float, tile, [2][kThreads / 2]);
  const int row = threadIdx.x / 32;
  tile[row][threadIdx.x % 32] = p.x[threadIdx.x];
  __syncthreads();
  p.y[threadIdx.x] = tile[row][(threadIdx.x + kBug) % (32 + kBug)];  // row 0 reads into row 1
}

template <bool kBug>
__global__ void write_global(const Params p) {
  if (threadIdx.x < p.n + kBug) p.y[threadIdx.x] = 1.0f;
}

template <bool kBug>
__global__ void read_global(const Params p) {
  if (threadIdx.x < p.n) p.y[threadIdx.x] = p.x[threadIdx.x + kBug];
}

template <bool kBug>
__global__ void misaligned(const Params p) {
  if (threadIdx.x == 0) store16(p.y, load16(p.x + kBug));
}

// ---- memory that nobody has written ----

template <bool kBug>
__global__ void unwritten(const Params p) {
  L0K_SHARED(float, tile, [kThreads]);
  L0K_DYNAMIC_SHARED(float, more);
  if (!kBug || blockIdx.x == 0) tile[threadIdx.x] = more[threadIdx.x] = p.x[threadIdx.x];
  p.y[blockIdx.x * kThreads + threadIdx.x] =
      blockIdx.x % 2 == 0 ? tile[threadIdx.x] : more[threadIdx.x];
}

// ---- asynchronous copies ----

template <bool kBug>
__global__ void missing_wait(const Params p) {
  L0K_SHARED(float, tile, [4 * kThreads]);
  copy_async_16(&tile[4 * threadIdx.x], p.x + 4 * threadIdx.x);
  copy_async_commit();
  if (!kBug) copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) p.y[4 * threadIdx.x + i] = tile[4 * threadIdx.x + i];
}

// Two stages; waiting for all but one group is one too few for the last.
template <bool kBug>
__global__ void stages(const Params p) {
  L0K_SHARED(float, tile, [2][4 * kThreads]);
  for (int stage = 0; stage < 2; ++stage) {
    const int64_t first = 4 * (stage * kThreads + threadIdx.x);
    const int64_t left = p.n - first;
    const int valid = left >= 4 ? 16 : left > 0 ? static_cast<int>(left) * 4 : 0;
    copy_async_16(&tile[stage][4 * threadIdx.x], p.x + (valid == 0 ? 0 : first), valid);
    copy_async_commit();
  }
  for (int stage = 0; stage < 2; ++stage) {
    if (stage == 0 || kBug) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    for (int i = 0; i < 4; ++i) {
      const int64_t at = 4 * (stage * kThreads + threadIdx.x) + i;
      if (at < p.n) p.y[at] = tile[stage][4 * threadIdx.x + i];
    }
  }
}

// A stage is overwritten while other threads still read it.
template <bool kBug>
__global__ void reused_stage(const Params p) {
  L0K_SHARED(float, tile, [4 * kThreads]);
  const int mine = 4 * threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    copy_async_16(&tile[mine], p.x + (mine + 4 * round) % (4 * kThreads));
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    sum += tile[(mine + 4) % (4 * kThreads)];
    if (!kBug) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) p.y[mine + i] = sum;
}

// ---- launches ----

template <bool kBug>
__global__ void shared_sizes(const Params p) {
  L0K_SHARED(float, tile, [kBug ? 13000 : 12000]);
  tile[threadIdx.x] = p.x[threadIdx.x];
  p.y[threadIdx.x] = tile[threadIdx.x];
}

// Name; blocks, bytes of dynamic shared memory and threads where they are not the usual.
#define L0K_PLANTED(X)                          \
  X(reverse)                                    \
  X(reverse_warp, 1, 0, 32)                     \
  X(rounds)                                     \
  X(last_block, 8)                              \
  X(same_place, 8)                              \
  X(skipped_barrier)                            \
  X(two_barriers)                               \
  X(other_masks)                                \
  X(absent_lane)                                \
  X(write_dynamic, 1, kThreads * sizeof(float)) \
  X(read_dynamic, 1, kThreads * sizeof(float))  \
  X(write_static)                               \
  X(read_static)                                \
  X(write_global)                               \
  X(read_global)                                \
  X(misaligned)                                 \
  X(unwritten, 4, kThreads * sizeof(float))     \
  X(missing_wait)                               \
  X(stages)                                     \
  X(reused_stage)                               \
  X(shared_sizes)

#define L0K_DEFINE(name, ...)                                                            \
  Tensor name##_op(Tensor x, bool bug) {                                                 \
    return bug ? run(name<true>, x, ##__VA_ARGS__) : run(name<false>, x, ##__VA_ARGS__); \
  }
L0K_PLANTED(L0K_DEFINE)

// ---- what must be right ----

Tensor launch_empty(Tensor x, int64_t blocks, int64_t threads, int64_t shared_bytes) {
  return run(write_global<false>, x, static_cast<int>(blocks), shared_bytes,
             static_cast<int>(threads));
}

struct MatrixParams {
  const void* a;
  const void* b;
  float* d;
};

// d [16, 8] += a [16, 16] b [16, 8], with the fragments of a and b from shared memory.
template <typename T>
__global__ void product(const MatrixParams p) {
  L0K_SHARED(T, a, [16][16]);
  L0K_SHARED(T, b, [16][8]);
  const int lane = threadIdx.x;
  copy_async_16(&a[lane / 2][lane % 2 * 8], static_cast<const T*>(p.a) + 8 * lane);
  if (lane < 16) copy_async_16(&b[lane][0], static_cast<const T*>(p.b) + 8 * lane);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t of_a[4], of_b[4];
  load_matrices(of_a, &a[lane % 16][lane / 16 * 8]);
  load_matrices_transposed(of_b, &b[lane % 16][0]);
  float* d = p.d + lane / 4 * 8 + lane % 4 * 2;
  float sums[4] = {d[0], d[1], d[64], d[65]};
  const uint32_t halves[2] = {of_b[0], of_b[1]};
  mma_m16n8k16<T>(sums, of_a, halves);
  d[0] = sums[0];
  d[1] = sums[1];
  d[64] = sums[2];
  d[65] = sums[3];
}

Tensor add_product(Tensor a, Tensor b, Tensor d) {
  Tensor sum = torch::stable::clone(d);
  const MatrixParams params{a.const_data_ptr(), b.const_data_ptr(), out<float>(sum)};
  if (a.scalar_type() == torch::headeronly::ScalarType::Half) {
    L0K_LAUNCH(product<__half>, 1, 32, 0, current_stream(a), params);
  } else {
    L0K_LAUNCH(product<__nv_bfloat16>, 1, 32, 0, current_stream(a), params);
  }
  return sum;
}

// y[i] = how many before i are positive; behind them the block's total and each warp's sum.
__global__ void scan(const Params p) {
  int total;
  const int before = block_scan_exclusive(p.x[threadIdx.x] > 0, total);
  const int again = block_scan_exclusive(1, total);  // directly behind another
  const float sum = warp_sum(p.x[threadIdx.x]);
  p.y[threadIdx.x] = before + (again == static_cast<int>(threadIdx.x) ? 0 : 1000);
  const int size = blockDim.x;
  if (threadIdx.x == 0) p.y[size] = total;
  if (threadIdx.x % 32 == 0) p.y[size + 1 + threadIdx.x / 32] = sum;
}

Tensor scan_op(Tensor x, int64_t threads) {
  return run(scan, x, 1, 0, static_cast<int>(threads));
}

__global__ void shuffles(const Params p) {
  const unsigned lane = threadIdx.x;
  const float x = p.x[lane];
  p.y[lane] = __shfl_sync(kFullWarp, x, 5);
  p.y[32 + lane] = __shfl_sync(kFullWarp, x, 5, 8);
  p.y[64 + lane] = __shfl_xor_sync(kFullWarp, x, 3);
  p.y[96 + lane] = __shfl_up_sync(kFullWarp, x, 2, 16);
  p.y[128 + lane] = __shfl_down_sync(kFullWarp, x, 2, 16);
  p.y[160 + lane] = __popc(__ballot_sync(kFullWarp, x > 7));
  p.y[192 + lane] = __any_sync(kFullWarp, x > 30) + 2 * __all_sync(kFullWarp, x > 0);
  if (lane < 8) p.y[224 + lane] = __shfl_sync(0xFFu, x, lane ^ 1);
}

Tensor shuffles_op(Tensor x) { return run(shuffles, x, 1, 0, 32); }

// Four counters that every thread of every block changes.
__global__ void atomics(const Params p) {
  int* counters = p.ticket;
  const int rank = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&counters[0], 1);
  atomicMax(&counters[1], rank);
  atomicMin(&counters[2], -rank);
  int seen = 0;
  for (int old = -1; old != seen;) {
    old = seen;
    seen = atomicCAS(&counters[3], old, old + 2);
  }
}

Tensor atomics_op(Tensor x, int64_t blocks) {
  Tensor counters = torch::stable::clone(x);
  L0K_LAUNCH(atomics, static_cast<int>(blocks), kThreads, 0, current_stream(x),
             {nullptr, nullptr, 0, out<int>(counters)});
  return counters;
}

}  // namespace

L0K_CUDA_IMPL(m) {
#define L0K_REGISTER(name, ...) m.impl(#name, TORCH_BOX(&name##_op));
  L0K_PLANTED(L0K_REGISTER)
  m.impl("launch", TORCH_BOX(&launch_empty));
  m.impl("add_product", TORCH_BOX(&add_product));
  m.impl("scan", TORCH_BOX(&scan_op));
  m.impl("atomics", TORCH_BOX(&atomics_op));
  m.impl("shuffles", TORCH_BOX(&shuffles_op));
}

}  // namespace l0k
