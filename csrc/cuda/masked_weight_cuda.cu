// SPDX-License-Identifier: Apache-2.0
// masked_weight and its backward pass on NVIDIA GPUs: one launch each over all numbers, in the order
// in which the weight has them in memory. beta is read on the device: nobody waits for it, and a
// captured graph follows it.
#include "common/pack_layout.h"
#include "common/soft_gate.h"
#include "cuda/common.cuh"

#include <limits>
#include <tuple>

namespace l0k {
namespace {

constexpr int kThreads = 256;

// What is computed in: scores, gates and products.
template <typename Weight>
using Compute = std::conditional_t<std::is_same_v<Weight, double>, double, float>;

template <typename S>
struct Masking {
  const S* beta;
  S scale, closed_below;
  int64_t count;
  const void* weight;
  const S* scores;
  void* masked;
};

template <typename S>
struct Unmasking {
  const S* beta;
  S scale, closed_below;
  int64_t count;
  const void* grad;
  const void* weight;
  const S* scores;
  void* grad_weight;  // null: not wanted
  S* grad_scores;     // null: not wanted
};

template <typename S>
L0K_DEVICE GateAt<S> at(const SoftGate<S>& gate, S score) {
  return is_step(gate) ? step_at(gate, score) : gate_at(gate, score);
}

// The first of the numbers of a thread.
template <int V>
L0K_DEVICE int64_t place() {
  return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
}

// V numbers side by side; if these are several, they start at a multiple of 16 bytes or of their
// size.
template <typename S, typename T, int V>
L0K_DEVICE void load(const T* from, S (&to)[V]) {
  constexpr int kPiece = V * sizeof(T) <= 16 ? V : 16 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int first = 0; first < V; first += kPiece) {
    Vector<T, kPiece> piece;
    if constexpr (sizeof(piece) == 16) {
      piece = load16(from + first);
    } else {
      piece = *reinterpret_cast<const Vector<T, kPiece>*>(from + first);
    }
#pragma unroll
    for (int v = 0; v < kPiece; ++v) to[first + v] = widen<S>(piece[v]);
  }
}

template <typename S, typename T, int V>
L0K_DEVICE void store(T* to, const S (&values)[V]) {
  constexpr int kPiece = V * sizeof(T) <= 16 ? V : 16 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int first = 0; first < V; first += kPiece) {
    Vector<T, kPiece> piece;
#pragma unroll
    for (int v = 0; v < kPiece; ++v) piece[v] = rounded<T>(values[first + v]);
    if constexpr (sizeof(piece) == 16) {
      store16(to + first, piece);
    } else {
      *reinterpret_cast<Vector<T, kPiece>*>(to + first) = piece;
    }
  }
}

template <typename W, typename P, int V>
__global__ void L0K_BOUNDS(kThreads, 4) mask_numbers(const Masking<Compute<W>> p) {
  using S = Compute<W>;
  const int64_t first = place<V>();
  if (first >= p.count) return;
  const SoftGate<S> gate{*p.beta, p.scale, p.closed_below};
  S values[V], scores[V];
  load(static_cast<const W*>(p.weight) + first, values);
  load(p.scores + first, scores);
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = times_gate(values[v], at(gate, scores[v]));
  store(static_cast<P*>(p.masked) + first, values);
}

template <typename W, typename P, int V>
__global__ void L0K_BOUNDS(kThreads, 4) unmask_numbers(const Unmasking<Compute<W>> p) {
  using S = Compute<W>;
  const int64_t first = place<V>();
  if (first >= p.count) return;
  const SoftGate<S> gate{*p.beta, p.scale, p.closed_below};
  S grads[V], scores[V], values[V], grad_scores[V];
  load(static_cast<const P*>(p.grad) + first, grads);
  load(p.scores + first, scores);
  if (p.grad_scores != nullptr) load(static_cast<const W*>(p.weight) + first, values);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const GateAt<S> found = at(gate, scores[v]);
    if (p.grad_scores != nullptr) grad_scores[v] = grad_of_score(grads[v], values[v], found);
    grads[v] = times_gate(grads[v], found);
  }
  if (p.grad_weight != nullptr) store(static_cast<W*>(p.grad_weight) + first, grads);
  if (p.grad_scores != nullptr) store(p.grad_scores + first, grad_scores);
}

// ---- launches ----

unsigned blocks_of(int64_t count, int64_t per_thread) {
  const int64_t per_block = kThreads * per_thread;
  const int64_t blocks = (count + per_block - 1) / per_block;
  require(blocks <= std::numeric_limits<int32_t>::max(), "masked_weight: too many blocks");
  return static_cast<unsigned>(blocks);
}

Tensor masked_weight(Tensor weight, Tensor scores, Tensor beta, double scale, double closed_below,
                     ScalarType dtype) {
  const DeviceGuard guard(weight.get_device_index());
  const bool channels_last = is_channels_last(weight);
  const Tensor stored = with_layout(weight, channels_last);
  const Tensor stored_scores = with_layout(scores, channels_last);
  Tensor masked = empty_as(weight, channels_last, dtype);
  const int64_t count = weight.numel();
  if (count == 0) return masked;
  const Stream stream = current_stream(weight);
  with_weight_types("masked_weight", weight.scalar_type(), dtype, [&](auto types) {
    using W = typename decltype(types)::Weight;
    using P = typename decltype(types)::Result;
    using S = Compute<W>;
    constexpr int kVector = 16 / sizeof(W);
    const Masking<S> p{data<S>(beta),           static_cast<S>(scale),
                       static_cast<S>(closed_below), count,
                       stored.const_data_ptr(), data<S>(stored_scores),
                       masked.mutable_data_ptr()};
    if (fits_vectors(count, kVector, {p.weight, p.scores, p.masked})) {
      L0K_LAUNCH((mask_numbers<W, P, kVector>), blocks_of(count, kVector), kThreads, 0, stream, p);
    } else {
      L0K_LAUNCH((mask_numbers<W, P, 1>), blocks_of(count, 1), kThreads, 0, stream, p);
    }
  });
  return masked;
}

std::tuple<Tensor, Tensor> masked_weight_backward(Tensor grad, Tensor weight, Tensor scores,
                                                  Tensor beta, double scale, double closed_below,
                                                  bool need_weight, bool need_scores) {
  const DeviceGuard guard(weight.get_device_index());
  const bool channels_last = is_channels_last(weight);
  const Tensor upstream = with_layout(grad, channels_last);
  const Tensor stored = with_layout(weight, channels_last);
  const Tensor stored_scores = with_layout(scores, channels_last);
  Tensor grad_weight = need_weight ? empty_as(weight, channels_last, weight.scalar_type())
                                   : nothing(weight);
  Tensor grad_scores = need_scores ? empty_as(weight, channels_last, scores.scalar_type())
                                   : nothing(scores);
  const int64_t count = weight.numel();
  if (count == 0 || (!need_weight && !need_scores)) return {grad_weight, grad_scores};
  const Stream stream = current_stream(weight);
  with_weight_types("masked_weight", weight.scalar_type(), grad.scalar_type(), [&](auto types) {
    using W = typename decltype(types)::Weight;
    using P = typename decltype(types)::Result;
    using S = Compute<W>;
    constexpr int kVector = 16 / sizeof(W);
    const Unmasking<S> p{data<S>(beta),
                         static_cast<S>(scale),
                         static_cast<S>(closed_below),
                         count,
                         upstream.const_data_ptr(),
                         stored.const_data_ptr(),
                         data<S>(stored_scores),
                         need_weight ? grad_weight.mutable_data_ptr() : nullptr,
                         need_scores ? out<S>(grad_scores) : nullptr};
    if (fits_vectors(count, kVector, {p.grad, p.weight, p.scores, p.grad_weight, p.grad_scores})) {
      L0K_LAUNCH((unmask_numbers<W, P, kVector>), blocks_of(count, kVector), kThreads, 0, stream,
                 p);
    } else {
      L0K_LAUNCH((unmask_numbers<W, P, 1>), blocks_of(count, 1), kThreads, 0, stream, p);
    }
  });
  return {grad_weight, grad_scores};
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("masked_weight", TORCH_BOX(&masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&masked_weight_backward));
}

}  // namespace l0k
