// SPDX-License-Identifier: Apache-2.0
// What operators on rows of a weight share: rows lie one after another, each in one piece.
#pragma once

#include "common/host_device.h"
#include "common/tensors.h"
#include "cpu/common.h"

#include <optional>
#include <vector>

namespace l0k {

using torch::headeronly::ScalarType;

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
  require(last.scalar_type() == ScalarType::Long && last.dim() == 1 &&
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

inline ScalarType checked_type(const Tensor& weight) {
  const ScalarType type = weight.scalar_type();
  require(type == ScalarType::Double || type == ScalarType::Float,
          "weight: expected float64 or float32");
  return type;
}

// The rows that take part in the next step.
inline std::vector<int64_t> marked(const int64_t* last, const Rows& rows, int64_t now) {
  std::vector<int64_t> found;
  for (int64_t row = 0; row < rows.count; ++row) {
    if (last[row] == now + 1) found.push_back(row);
  }
  return found;
}

struct Behind {
  int64_t row, steps;
};

// The rows of a list, or all, that have missed at most `known` steps; sets the counters of those
// not yet marked.
inline std::vector<Behind> advance(const std::optional<Tensor>& list, int64_t* last,
                                   const Rows& rows, int64_t now, int64_t mark, int64_t known) {
  const Tensor index = list ? dense(*list) : Tensor();
  const int64_t count = list ? index.size(0) : rows.count;
  std::vector<Behind> behind;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = list ? data<int64_t>(index)[i] : i;
    require(row >= 0 && row < rows.count, "rows: expected them below ", rows.count, "; got ", row);
    const int64_t steps = now - last[row];
    require(steps <= known, "table: expected ", steps, " steps; got ", known);
    if (steps >= 0) behind.push_back({row, steps});
  }
  for (const Behind& b : behind) last[b.row] = mark;
  return behind;
}

template <typename F>
void for_rows(const Rows& rows, int64_t count, const F& run) {
  const int64_t grain = kRowGrain / (rows.size + 1) + 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

}  // namespace l0k
