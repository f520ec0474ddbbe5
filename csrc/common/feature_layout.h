// SPDX-License-Identifier: Apache-2.0
// How gate_apply sees activations on every device: dense in the strides of torch.empty_like, as
// [examples, before, features, inner] numbers in the order in which they lie in memory. With gates
// that all examples share there is one example, which is all of them. Where `inner` is 1, features
// lie side by side in rows (channels_last, features last); else each has planes of its own.
#pragma once

#include "common/tensors.h"

namespace l0k {
namespace features {

struct Geometry {
  int64_t examples, before, features, inner;

  bool rows() const { return inner == 1; }
  int64_t block() const { return before * features * inner; }  // numbers of an example
  int64_t numbers() const { return examples * block(); }
};

// The tensor in the strides of `dense`, of the same sizes.
inline Tensor laid_out_as(const Tensor& t, const Tensor& dense) {
  if (same_strides(t, dense)) return t;
  Tensor copy = torch::stable::empty_like(dense);
  torch::stable::copy_(copy, t);
  return copy;
}

// Of what torch.empty_like gives, at least one number.
inline Geometry geometry_of(const Tensor& dense, int64_t dim, bool per_example) {
  const int64_t examples = per_example ? dense.size(0) : 1;
  require(examples == 1 || dense.stride(0) * examples == dense.numel(),
          "gate_apply: expected examples one after the other, for gates per example");
  const int64_t features = dense.size(dim);
  const int64_t inner = features > 1 ? dense.stride(dim) : dense.numel() / examples;
  return {examples, dense.numel() / (examples * features * inner), features, inner};
}

inline bool is_per_example(const Tensor& z) { return z.dim() == 2; }

// Uninitialised, of the shape of gates.
inline Tensor empty_gates(const Tensor& z) {
  return is_per_example(z) ? uninitialized(z, {z.size(0), z.size(1)})
                           : uninitialized(z, {z.size(0)});
}

// Stands for a gradient nobody wants.
inline Tensor nothing(const Tensor& like) { return uninitialized(like, {0}); }

}  // namespace features
}  // namespace l0k
