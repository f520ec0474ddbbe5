// SPDX-License-Identifier: Apache-2.0
// masked_weight and its backward pass on the CPU: one loop over all numbers, in the order in which
// the weight has them in memory.
#include "common/pack_layout.h"
#include "common/soft_gate.h"
#include "cpu/common.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>
#include <type_traits>
#include <vector>

namespace l0k {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

// What is computed in: scores, gates and products.
template <typename Weight>
using Compute = std::conditional_t<std::is_same_v<Weight, double>, double, float>;

template <typename S>
struct Masking {
  SoftGate<S> gate;
  const void* weight;
  const S* scores;
  void* masked;
};

template <typename S>
struct Unmasking {
  SoftGate<S> gate;
  const void* grad;
  const void* weight;
  const S* scores;
  void* grad_weight;  // null: not wanted
  S* grad_scores;     // null: not wanted
};

template <bool kStep, typename S>
L0K_HD GateAt<S> at(const SoftGate<S>& gate, S score) {
  if constexpr (kStep) {
    return step_at(gate, score);
  } else {
    return gate_at(gate, score);
  }
}

template <typename W, typename P, bool kStep>
L0K_HD void mask_loop(const Masking<Compute<W>>& m, int64_t begin, int64_t end) {
  using S = Compute<W>;
  const SoftGate<S> gate = m.gate;
  const W* __restrict weight = static_cast<const W*>(m.weight);
  const S* __restrict scores = m.scores;
  P* __restrict masked = static_cast<P*>(m.masked);
  for (int64_t i = begin; i < end; ++i) {
    masked[i] = static_cast<P>(times_gate(static_cast<S>(weight[i]), at<kStep>(gate, scores[i])));
  }
}

template <typename W, typename P>
L0K_HD void mask(const Masking<Compute<W>>& m, int64_t begin, int64_t end) {
  is_step(m.gate) ? mask_loop<W, P, true>(m, begin, end) : mask_loop<W, P, false>(m, begin, end);
}

template <typename W, typename P, bool kStep, bool kWeight, bool kScores>
L0K_HD void unmask_loop(const Unmasking<Compute<W>>& u, int64_t begin, int64_t end) {
  using S = Compute<W>;
  const SoftGate<S> gate = u.gate;
  const P* __restrict grads = static_cast<const P*>(u.grad);
  const W* __restrict weight = static_cast<const W*>(u.weight);
  const S* __restrict scores = u.scores;
  W* __restrict grad_weight = static_cast<W*>(u.grad_weight);
  S* __restrict grad_scores = u.grad_scores;
  for (int64_t i = begin; i < end; ++i) {
    const GateAt<S> found = at<kStep>(gate, scores[i]);
    const S grad = static_cast<S>(grads[i]);
    if constexpr (kWeight) grad_weight[i] = static_cast<W>(times_gate(grad, found));
    if constexpr (kScores) grad_scores[i] = grad_of_score(grad, static_cast<S>(weight[i]), found);
  }
}

template <typename W, typename P, bool kStep>
L0K_HD void unmask_some(const Unmasking<Compute<W>>& u, int64_t begin, int64_t end) {
  if (u.grad_scores == nullptr) {
    unmask_loop<W, P, kStep, true, false>(u, begin, end);
  } else if (u.grad_weight == nullptr) {
    unmask_loop<W, P, kStep, false, true>(u, begin, end);
  } else {
    unmask_loop<W, P, kStep, true, true>(u, begin, end);
  }
}

template <typename W, typename P>
L0K_HD void unmask(const Unmasking<Compute<W>>& u, int64_t begin, int64_t end) {
  is_step(u.gate) ? unmask_some<W, P, true>(u, begin, end)
                  : unmask_some<W, P, false>(u, begin, end);
}

// ---- one pair of functions for each pair of dtypes, compiled for several instruction sets ----

#define L0K_DTYPES(X)             \
  X(f64_f64, double, double)      \
  X(f32_f32, float, float)        \
  X(f32_bf16, float, BFloat16)    \
  X(f32_f16, float, Half)         \
  X(bf16_bf16, BFloat16, BFloat16) \
  X(f16_f16, Half, Half)

#define L0K_INSTANCE(name, W, P)                                                         \
  L0K_FOR_EACH_ISA(mask_##name, (mask<W, P>),                                            \
                   (const Masking<Compute<W>>& m, int64_t begin, int64_t end),           \
                   (m, begin, end))                                                      \
  L0K_FOR_EACH_ISA(unmask_##name, (unmask<W, P>),                                        \
                   (const Unmasking<Compute<W>>& u, int64_t begin, int64_t end),         \
                   (u, begin, end))
L0K_DTYPES(L0K_INSTANCE)
#undef L0K_INSTANCE

template <typename T>
constexpr ScalarType type_of = torch::headeronly::CppTypeToScalarType<T>::value;

template <typename W, typename P>
struct Types {
  using Weight = W;
  using Masked = P;
};

// Calls run(Types<W, P>(), mask, unmask) with the dtypes and the functions for them.
template <typename Run>
void with_types(ScalarType weight, ScalarType masked, const Run& run) {
#define L0K_CHOOSE(name, W, P)                             \
  if (weight == type_of<W> && masked == type_of<P>) {      \
    return run(Types<W, P>(), mask_##name, unmask_##name); \
  }
  L0K_DTYPES(L0K_CHOOSE)
#undef L0K_CHOOSE
  require(false, "masked_weight: no kernel for this pair of dtypes");
}
#undef L0K_DTYPES

template <typename S>
SoftGate<S> gate_of(const Tensor& beta, double scale, double closed_below) {
  return {*data<S>(beta), static_cast<S>(scale), static_cast<S>(closed_below)};
}

template <typename Params, typename F>
void run_over(int64_t count, const Params& params, F run) {
  torch::stable::parallel_for(0, count, kGrain,
                              [&](int64_t begin, int64_t end) { run(params, begin, end); });
}

Tensor masked_weight(Tensor weight, Tensor scores, Tensor beta, double scale, double closed_below,
                     ScalarType dtype) {
  const bool channels_last = is_channels_last(weight);
  const Tensor stored = with_layout(weight, channels_last);
  const Tensor stored_scores = with_layout(scores, channels_last);
  Tensor masked = empty_as(weight, channels_last, dtype);
  with_types(weight.scalar_type(), dtype, [&](auto types, auto mask, auto) {
    using S = Compute<typename decltype(types)::Weight>;
    const Masking<S> masking{gate_of<S>(beta, scale, closed_below), stored.const_data_ptr(),
                             data<S>(stored_scores), masked.mutable_data_ptr()};
    run_over(weight.numel(), masking, mask);
  });
  return masked;
}

std::tuple<Tensor, Tensor> masked_weight_backward(Tensor grad, Tensor weight, Tensor scores,
                                                  Tensor beta, double scale, double closed_below,
                                                  bool need_weight, bool need_scores) {
  const bool channels_last = is_channels_last(weight);
  const Tensor upstream = with_layout(grad, channels_last);
  const Tensor stored = with_layout(weight, channels_last);
  const Tensor stored_scores = with_layout(scores, channels_last);
  Tensor grad_weight = need_weight ? empty_as(weight, channels_last, weight.scalar_type())
                                   : nothing(weight);
  Tensor grad_scores = need_scores ? empty_as(weight, channels_last, scores.scalar_type())
                                   : nothing(scores);
  if (!need_weight && !need_scores) return {grad_weight, grad_scores};
  with_types(weight.scalar_type(), grad.scalar_type(), [&](auto types, auto, auto unmask) {
    using S = Compute<typename decltype(types)::Weight>;
    const Unmasking<S> unmasking{gate_of<S>(beta, scale, closed_below),
                                 upstream.const_data_ptr(),
                                 stored.const_data_ptr(),
                                 data<S>(stored_scores),
                                 need_weight ? grad_weight.mutable_data_ptr() : nullptr,
                                 need_scores ? out<S>(grad_scores) : nullptr};
    run_over(weight.numel(), unmasking, unmask);
  });
  return {grad_weight, grad_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("masked_weight", TORCH_BOX(&masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&masked_weight_backward));
}

}  // namespace l0k
