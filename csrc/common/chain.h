// SPDX-License-Identifier: Apache-2.0
// What dep_chain needs on every device: its law, and who reads whom.
#pragma once

#include "common/exp_log.h"
#include "common/tensors.h"

#include <vector>

namespace l0k {

// ---- law ----

constexpr double kChainBound = 4.605170185988092;  // ln(100)

struct Tanh {
  double value;
  double slope;  // 1 - value^2, with all its digits where that has none left
};

L0K_HD Tanh tanh_fp64(double x) {
  const double size = std::fabs(x);
  const double e = exp_fp64(-2.0 * size);
  const double inverse = 1.0 / (1.0 + e);
  const double far = (1.0 - e) * inverse;
  // Next to 0, where 1 - e has few digits left: the Taylor series.
  const double x2 = size * size;
  const double tail = x2 * (17.0 / 315.0 - x2 * (62.0 / 2835.0));
  const double near = size - size * x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - tail));
  const double value = std::copysign(select(size < 0.03125, near, far), x);
  const double slope = select(2.0 * size > kExpLimit, 0.0, 4.0 * e * inverse * inverse);
  // exp_fp64 has no answer to NaN.
  return {select(x != x, x, value), select(x != x, x, slope)};
}

// A logit from its sum, and its derivative by the sum.
template <typename T>
L0K_HD void chain_law(double sum, T& logit, T& slope) {
  const Tanh found = tanh_fp64(sum);
  logit = static_cast<T>(kChainBound * found.value);
  slope = static_cast<T>(kChainBound * found.slope);
}

// ---- layers ----

struct ChainLayer {
  int64_t number;
  int64_t rows;    // logits that it makes
  int64_t cols;    // logits that it reads
  int64_t at;      // where its logits are in the flat vector
  int64_t source;  // where those are that it reads; -1: they are `first`
};

// The layers in the order in which they are computed.
inline std::vector<ChainLayer> chain_layers(const Tensor& first, const std::vector<Tensor>& weights,
                                            bool reverse) {
  require(!weights.empty(), "expected at least one weight");
  std::vector<ChainLayer> layers;
  int64_t at = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    require(weights[i].dim() == 2 && weights[i].scalar_type() == first.scalar_type(), "weights[", i,
            "]: expected a matrix of first's dtype");
    layers.push_back({static_cast<int64_t>(i), weights[i].size(0), weights[i].size(1), at, -1});
    at += weights[i].size(0);
  }
  if (reverse) std::vector<ChainLayer>(layers.rbegin(), layers.rend()).swap(layers);
  int64_t width = first.size(0);
  for (size_t k = 0; k < layers.size(); ++k) {
    require(layers[k].cols == width, "weights[", layers[k].number, "]: expected ", width,
            " columns; got ", layers[k].cols);
    if (k > 0) layers[k].source = layers[k - 1].at;
    width = layers[k].rows;
  }
  return layers;
}

inline int64_t chain_size(const std::vector<Tensor>& weights) {
  int64_t size = 0;
  for (const Tensor& weight : weights) size += weight.size(0);
  return size;
}

inline void require_biases(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  require(weights.size() == biases.size(), "expected one bias for each weight");
  for (size_t i = 0; i < weights.size(); ++i) {
    require(biases[i].dim() == 1 && biases[i].size(0) == weights[i].size(0) &&
                biases[i].scalar_type() == weights[i].scalar_type(),
            "biases[", i, "]: expected one number for each row of the weight, of its dtype");
  }
}

inline bool is_double_chain(const Tensor& first) {
  using torch::headeronly::ScalarType;
  const ScalarType type = first.scalar_type();
  require(type == ScalarType::Double || type == ScalarType::Float,
          "first: expected float32 or float64");
  return type == ScalarType::Double;
}

// What the backward pass writes: of first, of all biases in one vector, of each weight.
inline std::vector<Tensor> new_chain_gradients(const Tensor& logits, const Tensor& first,
                                               const std::vector<Tensor>& weights) {
  std::vector<Tensor> grads{uninitialized(first, {first.size(0)}),
                            uninitialized(logits, {logits.size(0)})};
  for (const Tensor& weight : weights) {
    grads.push_back(uninitialized(weight, {weight.size(0), weight.size(1)}));
  }
  return grads;
}

inline void require_vectors(const std::vector<Tensor>& vectors, const Tensor& first, int64_t size) {
  for (const Tensor& vector : vectors) {
    require(vector.dim() == 1 && vector.size(0) == size &&
                vector.scalar_type() == first.scalar_type(),
            "grad, logits, slopes: expected ", size, " numbers of first's dtype");
  }
}

}  // namespace l0k
