// SPDX-License-Identifier: Apache-2.0
// gate_apply and its backward pass on NVIDIA GPUs. A launch scales activations; backward it scales
// gradients, and sums their products with the activations over parts of each feature's rows or
// planes. A second launch adds these sums up for the gates. No atomics: every sum has one order.
//
// Where features lie side by side, a thread keeps its features, with their scales, and goes from one
// row to another. Else a warp has planes of one feature.
//
// Nobody waits for the kernels, so they cannot raise. Gates out of bounds count as closed: nothing
// is read there.
#include "common/feature_layout.h"
#include "cuda/common.cuh"
#include "cuda/gate_sums.cuh"

#include <algorithm>
#include <limits>
#include <tuple>

namespace l0k {
namespace {

using features::Geometry;

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kInFlight = 16;       // numbers that a thread loads before it stores any ...
constexpr int kMostBatches = 8;     // ... in so many pieces at most
constexpr int64_t kRows = 8;        // of a thread, at least, for which it looks up its features
constexpr int64_t kMaxParts = 256;  // of a feature: sums that the second launch adds
constexpr int kStrips = 4;          // of 32 features that a warp looks at in one go

// What is computed in.
template <typename X>
using Compute = std::conditional_t<std::is_same_v<X, double>, double, float>;

// How many pieces of V numbers a thread loads before it stores any.
template <int V>
constexpr int kBatch = kInFlight / V < kMostBatches ? kInFlight / V : kMostBatches;

// ---- gates ----

template <typename S>
struct Gates {
  const S* z;          // [examples, count]
  const int64_t* map;  // [2, features]
  int64_t count, features;

  L0K_DEVICE bool knows(int64_t gate) const { return 0 <= gate && gate < count; }

  // 0 where a gate is out of bounds.
  L0K_DEVICE S scale(int64_t example, int64_t a, int64_t b) const {
    const S* own = z + example * count;
    return knows(a) && knows(b) ? own[a] * own[b] : S(0);
  }

  L0K_DEVICE S scale_of(int64_t example, int64_t feature) const {
    return scale(example, map[feature], map[features + feature]);
  }
};

// ---- numbers ----

// One number, or as many as are 16 bytes, at a multiple of these.
template <typename X, int V>
L0K_DEVICE void load(const X* from, Compute<X> (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = widen<Compute<X>>(*from);
  } else {
    const auto piece = load16(from);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = widen<Compute<X>>(piece[v]);
  }
}

template <typename X, int V>
L0K_DEVICE void store(X* to, const Compute<X> (&values)[V]) {
  if constexpr (V == 1) {
    *to = rounded<X>(values[0]);
  } else {
    Vector16<X> piece;
#pragma unroll
    for (int v = 0; v < V; ++v) piece[v] = rounded<X>(values[v]);
    store16(to, piece);
  }
}

template <typename S>
L0K_DEVICE S scaled(S value, S scale) {
  return scale != S(0) ? value * scale : S(0);
}

template <typename X>
struct Work {
  Gates<Compute<X>> gates;
  Geometry shape;
  const X* x;
  const X* grad;  // null: forward
  X* result;      // null: not wanted
  double* sums;   // [examples, parts, features]; null: forward
  int64_t part;   // rows, or planes of a feature, in a part
  int64_t parts;
  int64_t pieces;  // of a row; a block has one of them
  int seats;       // threads side by side on a piece
};

// Scales V numbers at `first`, then at steps from there, `count` times, and adds to their sums.
template <typename X, int V, bool kSum>
L0K_DEVICE void sweep(const Work<X>& p, int64_t first, int64_t step, int64_t count,
                      const Compute<X> (&scale)[V], double (&totals)[V]) {
  using S = Compute<X>;
  const X* __restrict__ x = p.x + first;
  const X* __restrict__ grad = kSum ? p.grad + first : nullptr;
  for (int64_t i = 0; i < count; i += kBatch<V>) {
    S values[kBatch<V>][V], grads[kBatch<V>][V];
#pragma unroll
    for (int k = 0; k < kBatch<V>; ++k) {
      if (i + k >= count) break;
      load(x + (i + k) * step, values[k]);
      if constexpr (kSum) load(grad + (i + k) * step, grads[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch<V>; ++k) {
      if (i + k >= count) break;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if constexpr (kSum) {
          totals[v] = fma(static_cast<double>(grads[k][v]), static_cast<double>(values[k][v]),
                          totals[v]);
          values[k][v] = grads[k][v];
        }
        values[k][v] = scaled(values[k][v], scale[v]);
      }
      if (!kSum || p.result != nullptr) store(p.result + first + (i + k) * step, values[k]);
    }
  }
}

// ---- features side by side ----

// Adds what the threads on the same features have found, row by row of threads.
template <typename X, int V>
L0K_DEVICE void store_sums(const Work<X>& p, bool taken, const double (&totals)[V],
                           int64_t first_feature, double* sums) {
  L0K_SHARED(double, shared, [kThreads * V]);
  const int sides = kThreads / p.seats;
  const int width = p.seats * V;
  if (taken) {
#pragma unroll
    for (int v = 0; v < V; ++v) shared[threadIdx.x * V + v] = totals[v];
  }
  __syncthreads();
  const int64_t left = p.shape.features - first_feature;
  for (int i = threadIdx.x; i < width && i < left; i += kThreads) {
    double sum = shared[i];
    for (int side = 1; side < sides; ++side) sum += shared[side * width + i];
    sums[first_feature + i] = sum;
  }
}

template <typename X, int V, bool kSum>
__global__ void L0K_BOUNDS(kThreads, 2) scale_rows(const Work<X> p) {
  const int64_t features = p.shape.features, before = p.shape.before;
  const int64_t task = blockIdx.x / p.pieces;
  const int64_t part = task % p.parts, example = task / p.parts;
  const int64_t first_feature = blockIdx.x % p.pieces * p.seats * V;
  const int sides = kThreads / p.seats;
  const int side = static_cast<int>(threadIdx.x) / p.seats;
  const int64_t feature = first_feature + static_cast<int>(threadIdx.x) % p.seats * V;
  const bool taken = side < sides && feature < features;
  double totals[V] = {};
  if (taken) {
    Compute<X> scale[V];
#pragma unroll
    for (int v = 0; v < V; ++v) scale[v] = p.gates.scale_of(example, feature + v);
    const int64_t row = part * p.part + side;
    const int64_t end = min((part + 1) * p.part, before);
    const int64_t rows = row < end ? (end - row + sides - 1) / sides : 0;
    sweep<X, V, kSum>(p, (example * before + row) * features + feature, sides * features, rows,
                      scale, totals);
  }
  if constexpr (kSum) {
    store_sums<X, V>(p, taken, totals, first_feature, p.sums + task * features);
  }
}

// ---- planes of one feature ----

template <typename X, int V, bool kSum>
__global__ void L0K_BOUNDS(kThreads, 2) scale_planes(const Work<X> p) {
  const int64_t features = p.shape.features, before = p.shape.before, inner = p.shape.inner;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t task = number / features;  // a part of an example
  const int64_t feature = number % features;
  const int64_t example = task / p.parts;
  if (example >= p.shape.examples) return;
  const int64_t begin = task % p.parts * p.part;
  const int64_t end = min(begin + p.part, before);
  const int64_t place = static_cast<int64_t>(threadIdx.x) % kWarp * V;
  const int64_t count = place < inner ? (inner - place + kWarp * V - 1) / (kWarp * V) : 0;
  const Compute<X> own = p.gates.scale_of(example, feature);
  Compute<X> scale[V];
#pragma unroll
  for (int v = 0; v < V; ++v) scale[v] = own;
  double totals[V] = {};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = (example * before + i) * features + feature;
    sweep<X, V, kSum>(p, plane * inner + place, kWarp * V, count, scale, totals);
  }
  if constexpr (kSum) {
    double total = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) total += totals[v];
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) p.sums[number] = total;
  }
}

// ---- gradients of the gates ----

template <typename S>
struct SumWork {
  Gates<S> gates;
  const double* sums;  // [examples, parts, features]
  int64_t parts;
  int64_t blocks;  // of the gates of an example
  S* grad_z;
};

template <typename S>
L0K_DEVICE double sum_of_feature(const SumWork<S>& p, int64_t example, int64_t feature) {
  const double* sums = p.sums + example * p.parts * p.gates.features + feature;
  double total = 0;
  for (int64_t first = 0; first < p.parts; first += kMostBatches) {
    double parts[kMostBatches];
#pragma unroll
    for (int k = 0; k < kMostBatches; ++k) {
      parts[k] = first + k < p.parts ? sums[(first + k) * p.gates.features] : 0.0;
    }
#pragma unroll
    for (int k = 0; k < kMostBatches; ++k) total += parts[k];
  }
  return total;
}

template <typename S>
L0K_DEVICE void add_strip(const GateSums<kThreads>& gate_sums, const SumWork<S>& p,
                          int64_t example, int64_t feature, const int64_t (&gates)[2]) {
  const int32_t place[2] = {gate_sums.place_of(gates[0]), gate_sums.place_of(gates[1])};
  const bool here = place[0] >= 0 || place[1] >= 0;
  if (!__any_sync(kFullWarp, here)) return;
  const bool open = here && p.gates.scale(example, gates[0], gates[1]) != S(0);
  const double sum = open ? sum_of_feature(p, example, feature) : 0.0;
#pragma unroll
  for (int mine = 0; mine < 2; ++mine) {
    const bool adds = open && place[mine] >= 0;
    if (!__any_sync(kFullWarp, adds)) continue;
    const S other = adds ? p.gates.z[example * p.gates.count + gates[1 - mine]] : S(0);
    gate_sums.add(adds ? place[mine] : -1, sum * static_cast<double>(other));
  }
}

// A block looks for its gates in all features; a warp looks at 32 at a time.
template <typename S>
__global__ void L0K_BOUNDS(kThreads, 2) sum_gates(const SumWork<S> p) {
  L0K_SHARED(double, sums, [kWarps][kThreads]);
  L0K_SHARED(double, values, [kWarps][kWarp]);
  L0K_SHARED(int32_t, places, [kWarps][kWarp]);
  const int warp = threadIdx.x / kWarp;
  const int64_t example = blockIdx.x / p.blocks;
  const int64_t first_gate = blockIdx.x % p.blocks * kThreads;
  const int64_t last = p.gates.count - 1;
  for (int w = 0; w < kWarps; ++w) sums[w][threadIdx.x] = 0;
  __syncthreads();
  const GateSums<kThreads> gate_sums{first_gate, last, sums[warp], values[warp], places[warp]};
  // Strips side by side, which are likely to have gates side by side, go to different warps.
  for (int64_t first = threadIdx.x; first - threadIdx.x % kWarp < p.gates.features;
       first += kStrips * kThreads) {
    int64_t gates[kStrips][2];
#pragma unroll
    for (int k = 0; k < kStrips; ++k) {
      const int64_t feature = first + k * kThreads;
      const bool inside = feature < p.gates.features;
      gates[k][0] = inside ? p.gates.map[feature] : last;
      gates[k][1] = inside ? p.gates.map[p.gates.features + feature] : last;
    }
#pragma unroll
    for (int k = 0; k < kStrips; ++k) {
      add_strip(gate_sums, p, example, first + k * kThreads, gates[k]);
    }
  }
  __syncthreads();
  const int64_t gate = first_gate + threadIdx.x;
  if (gate > last) return;
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
  p.grad_z[example * p.gates.count + gate] = static_cast<S>(total);
}

// ---- launches ----

int64_t parts_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

unsigned as_grid(int64_t blocks) {
  require(blocks <= std::numeric_limits<int32_t>::max(), "gate_apply: too many blocks");
  return static_cast<unsigned>(blocks);
}

// Divides the rows or planes of a feature among blocks or warps.
template <typename X>
void divide(Work<X>& work, int per_thread) {
  const Geometry& shape = work.shape;
  int64_t least = 1;
  if (shape.rows()) {
    const int64_t seats = parts_of(shape.features, per_thread);
    work.pieces = parts_of(seats, kThreads);
    work.seats = static_cast<int>(parts_of(seats, work.pieces));
    least = kThreads / work.seats * kRows;
  }
  work.part = std::max(least, parts_of(shape.before, kMaxParts));
  work.parts = parts_of(shape.before, work.part);
}

template <typename X, int V, bool kSum>
void launch_scale(const Work<X>& work, Stream stream) {
  const Geometry& shape = work.shape;
  const int64_t tasks = shape.examples * work.parts;
  if (shape.rows()) {
    L0K_LAUNCH((scale_rows<X, V, kSum>), as_grid(tasks * work.pieces), kThreads, 0, stream, work);
  } else {
    const unsigned blocks = as_grid(parts_of(tasks * shape.features, kWarps));
    L0K_LAUNCH((scale_planes<X, V, kSum>), blocks, kThreads, 0, stream, work);
  }
}

// Scales, and returns the sums in the backward pass.
template <typename X, bool kSum>
Tensor run_scale(Work<X>& work, const Tensor& z, Stream stream) {
  const Geometry& shape = work.shape;
  constexpr int kVector = 16 / sizeof(X);
  const bool vectors = fits_vectors(shape.rows() ? shape.features : shape.inner, kVector,
                                    {work.x, work.grad, work.result});
  divide(work, vectors ? kVector : 1);
  Tensor sums;
  if constexpr (kSum) {
    const int64_t count = shape.examples * work.parts * shape.features;
    sums = torch::stable::new_empty(z, {count}, torch::headeronly::ScalarType::Double);
    work.sums = out<double>(sums);
  }
  if (vectors) {
    launch_scale<X, kVector, kSum>(work, stream);
  } else {
    launch_scale<X, 1, kSum>(work, stream);
  }
  return sums;
}

// ---- operators ----

template <typename S>
Gates<S> gates_of(const Tensor& z, const Tensor& gate_map) {
  return {data<S>(z), data<int64_t>(gate_map), z.size(z.dim() - 1), gate_map.size(1)};
}

Tensor gate_apply(Tensor x, Tensor z, Tensor gate_map, int64_t dim) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const Tensor stored = features::laid_out_as(x, y);
  const Tensor values = dense(z), gates = dense(gate_map);
  const Stream stream = current_stream(x);
  const Geometry shape = features::geometry_of(y, dim, features::is_per_example(z));
  with_dtype("gate_apply", x, [&](auto number) {
    using X = decltype(number);
    Work<X> work{gates_of<Compute<X>>(values, gates), shape, data<X>(stored), nullptr, out<X>(y)};
    run_scale<X, false>(work, z, stream);
  });
  return y;
}

std::tuple<Tensor, Tensor> gate_apply_backward(Tensor grad, Tensor x, Tensor z, Tensor gate_map,
                                               int64_t dim, bool need_x) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor like = torch::stable::empty_like(x);
  const Tensor grad_x = need_x ? like : features::nothing(x);
  Tensor grad_z = features::empty_gates(z);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_z)};
  const Tensor stored = features::laid_out_as(x, like);
  const Tensor upstream = features::laid_out_as(grad, like);
  const Tensor values = dense(z), gates = dense(gate_map);
  const Stream stream = current_stream(x);
  const Geometry shape = features::geometry_of(like, dim, features::is_per_example(z));
  with_dtype("gate_apply", x, [&](auto number) {
    using X = decltype(number);
    using S = Compute<X>;
    Work<X> work{gates_of<S>(values, gates), shape, data<X>(stored), data<X>(upstream),
                 need_x ? out<X>(grad_x) : nullptr};
    const Tensor sums = run_scale<X, true>(work, z, stream);
    const int64_t blocks = parts_of(work.gates.count, kThreads);
    const SumWork<S> adding{work.gates, data<double>(sums), work.parts, blocks, out<S>(grad_z)};
    L0K_LAUNCH(sum_gates<S>, as_grid(shape.examples * blocks), kThreads, 0, stream, adding);
  });
  return {grad_x, grad_z};
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("gate_apply", TORCH_BOX(&gate_apply));
  m.impl("gate_apply_backward", TORCH_BOX(&gate_apply_backward));
}

}  // namespace l0k
