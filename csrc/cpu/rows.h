// SPDX-License-Identifier: Apache-2.0
// What operators on rows of a weight share: rows lie one after another, each in one piece.
#pragma once

#include "common/host_device.h"
#include "common/tensors.h"
#include "cpu/common.h"

#include <optional>
#include <ostream>
#include <vector>

namespace l0k {

using torch::headeronly::ScalarType;

constexpr int64_t kRowGrain = 1 << 14;  // numbers that are worth a thread

struct Rows {
  int64_t count;
  int64_t size;  // numbers per row
};

// What an error says about a tensor.
struct Shown {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& text, const Shown& shown) {
  const Tensor& tensor = shown.tensor;
  text << torch::headeronly::toString(tensor.scalar_type()) << " of shape [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d == 0 ? "" : ", ") << tensor.size(d);
  text << "] and strides [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d == 0 ? "" : ", ") << tensor.stride(d);
  return text << "]";
}

inline Rows rows_of(const Tensor& weight) {
  require(weight.dim() > 0, "weight: expected at least one dimension");
  const int64_t count = weight.size(0);
  return {count, count == 0 ? 0 : weight.numel() / count};
}

// The counter of each row: the number of optimizer steps that it has seen.
inline int64_t* counters_of(const Tensor& last, const Rows& rows) {
  require(last.scalar_type() == ScalarType::Long && last.dim() == 1 &&
              last.size(0) == rows.count && last.is_contiguous(),
          "last: expected contiguous int64 of shape [", rows.count, "]; got ", Shown{last});
  return out<int64_t>(last);
}

// Numbers of one tensor must be where those of the weight are.
inline void require_like(const Tensor& weight, const Tensor& other, const char* name) {
  bool like = other.dim() == weight.dim() && other.scalar_type() == weight.scalar_type();
  for (int64_t d = 0; like && d < weight.dim(); ++d) {
    like = other.size(d) == weight.size(d) &&
           (weight.size(d) == 1 || other.stride(d) == weight.stride(d));
  }
  require(like, name, ": expected ", Shown{weight}, "; got ", Shown{other});
}

inline ScalarType checked_type(const Tensor& weight) {
  const ScalarType type = weight.scalar_type();
  require(type == ScalarType::Double || type == ScalarType::Float,
          "weight: expected float64 or float32; got ", Shown{weight});
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

// The rows of a list, or all, that are not marked yet, and sets their counters. They may have missed
// `known` steps.
inline std::vector<Behind> advance(const std::optional<Tensor>& list, int64_t* last,
                                   const Rows& rows, int64_t now, int64_t mark, int64_t known) {
  if (list) {
    require(list->scalar_type() == ScalarType::Long && list->dim() == 1,
            "rows: expected int64 of one dimension; got ", Shown{*list});
  }
  const Tensor index = list ? dense(*list) : Tensor();
  const int64_t count = list ? index.size(0) : rows.count;
  std::vector<Behind> behind;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = list ? data<int64_t>(index)[i] : i;
    require(row >= 0 && row < rows.count, "rows: expected indices of ", rows.count, " rows; got ", row);
    const int64_t steps = now - last[row];
    require(steps <= known, "last: expected at most ", known, " missed steps; got ", steps);
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
