// SPDX-License-Identifier: Apache-2.0
// What operators on rows of a weight share: rows lie one after another, each in one piece.
#pragma once

#include "common/host_device.h"
#include "common/tensors.h"
#include "cpu/common.h"

#include <vector>

namespace l0k {

constexpr int64_t kRowGrain = 1 << 14;  // numbers that are worth a thread

struct Rows {
  int64_t count;
  int64_t size;  // numbers per row
};

inline Rows rows_of(const Tensor& weight) {
  require(weight.dim() > 0, "weight: expected at least one dimension");
  const int64_t count = weight.size(0);
  return {count, count == 0 ? 0 : weight.numel() / count};
}

// The counter of each row: the number of optimizer steps that it has seen.
inline int64_t* counters_of(const Tensor& last, const Rows& rows) {
  require(last.scalar_type() == torch::headeronly::ScalarType::Long && last.dim() == 1 &&
              last.size(0) == rows.count && last.is_contiguous(),
          "last: expected contiguous int64 of shape [", rows.count, "]");
  return out<int64_t>(last);
}

// Numbers of one tensor must be where those of the weight are.
inline void require_like(const Tensor& weight, const Tensor& other, const char* name) {
  bool like = other.dim() == weight.dim() && other.scalar_type() == weight.scalar_type();
  for (int64_t d = 0; like && d < weight.dim(); ++d) {
    like = other.size(d) == weight.size(d) &&
           (weight.size(d) == 1 || other.stride(d) == weight.stride(d));
  }
  require(like, name, ": expected dtype, shape and strides of the weight");
}

template <typename F>
void for_rows(const Rows& rows, int64_t count, const F& run) {
  const int64_t grain = kRowGrain / (rows.size + 1) + 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

}  // namespace l0k
