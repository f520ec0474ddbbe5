// SPDX-License-Identifier: Apache-2.0
// What packing weights needs on every device: how weights lie in memory, and the lists that say
// what of them is packed.
//
// Every weight is seen as [O, A, I, B]: O output features, A lines each, B numbers in a line per
// input feature. A channels_last weight has one line per kernel position and one number per input
// feature; any other weight is one line with all kernel positions of an input feature side by side.
#pragma once

#include "common/tensors.h"

#include <limits>
#include <optional>
#include <vector>

namespace l0k {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

// ---- layout ----

inline bool is_dense(const Tensor& t, bool channels_last) {
  const int64_t dims = t.dim();
  const int64_t last_channels[4] = {1, 3, 2, 0};  // fastest dimension first
  int64_t stride = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = channels_last ? last_channels[i] : dims - 1 - i;
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

inline bool has_layout(const Tensor& t, bool channels_last) {
  return t.numel() == 0 || is_dense(t, channels_last);
}

// Where one channel or one pixel leaves it open in memory, the strides say so, by which
// convolutions choose their layout.
inline bool is_channels_last(const Tensor& weight) {
  if (weight.dim() != 4 || !has_layout(weight, true)) return false;
  const bool strided_so = weight.stride(1) == 1 && weight.stride(3) == weight.size(1);
  return !has_layout(weight, false) ||
         (strided_so && weight.size(1) * weight.size(2) * weight.size(3) > 1);
}

inline MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor with_layout(const Tensor& t, bool channels_last) {
  return has_layout(t, channels_last) ? t : torch::stable::contiguous(t, format_of(channels_last));
}

struct Shape {
  int64_t rows;   // O
  int64_t cols;   // I
  int64_t lines;  // A
  int64_t inner;  // B

  int64_t line() const { return cols * inner; }
};

inline Shape shape_of(const Tensor& weight, bool channels_last) {
  int64_t kernel = 1;
  for (int64_t d = 2; d < weight.dim(); ++d) kernel *= weight.size(d);
  const int64_t cols = weight.dim() > 1 ? weight.size(1) : 1;
  const Shape shape = channels_last ? Shape{weight.size(0), cols, kernel, 1}
                                    : Shape{weight.size(0), cols, 1, kernel};
  require(shape.line() <= std::numeric_limits<int32_t>::max(),
          "pack_weight: expected fewer than 2^31 numbers per line");
  return shape;
}

// Uninitialised, of a weight's shape and in its layout.
inline Tensor empty_as(const Tensor& weight, bool channels_last, ScalarType dtype) {
  const std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  return torch::stable::empty(sizes, dtype, std::nullopt, weight.device(), std::nullopt,
                              format_of(channels_last));
}

// ---- lists ----

// What a caller says about one axis of a weight.
struct AxisList {
  bool selects;          // else all features are packed, in order
  bool scales;           // else nothing is scaled
  const int64_t* index;  // packed -> full
  int64_t packed;
  const int64_t* gates;  // the first gate of every feature
  int64_t step;          // from there to the second ones
};

inline Tensor dense_or_nothing(const std::optional<Tensor>& tensor) {
  return tensor ? dense(*tensor) : Tensor();
}

// The index and the map of one axis of one weight, and the memory that holds them.
struct OwnedList {
  Tensor index, map;

  OwnedList(const std::optional<Tensor>& given_index, const std::optional<Tensor>& given_map)
      : index(dense_or_nothing(given_index)), map(dense_or_nothing(given_map)) {}

  AxisList list() const {
    AxisList list{index.defined(), map.defined(), nullptr, 0, nullptr, 0};
    if (index.defined()) {
      list.index = data<int64_t>(index);
      list.packed = index.size(0);
    }
    if (map.defined()) {
      list.gates = data<int64_t>(map);
      list.step = map.size(1);
    }
    return list;
  }
};

// The lists and maps of all ports, and which of them belong to which weight.
class Ports {
 public:
  Ports(const Tensor& index, const Tensor& maps, const std::vector<int64_t>& spans, size_t weights)
      : index_(dense(index)), maps_(dense(maps)), spans_(spans) {
    require(spans.size() == 4 * weights, "spans: expected 4 numbers for each of ", weights,
            " weights; got ", spans.size());
    require(maps.dim() == 2 && maps.size(0) == 2 && maps.size(1) == index.size(0),
            "maps: expected shape [2, ", index.size(0), "]");
  }

  AxisList rows(size_t i, const Tensor& weight) const { return axis(4 * i, weight.size(0)); }
  AxisList cols(size_t i, const Tensor& weight) const {
    return axis(4 * i + 2, weight.dim() > 1 ? weight.size(1) : 1);
  }

 private:
  AxisList axis(size_t at, int64_t full) const {
    const int64_t start = spans_[at];
    const int64_t count = spans_[at + 1];
    if (start < 0) return {};
    require(start + full <= index_.size(0) && count >= 0 && count <= full,
            "spans: expected them inside of index and maps; got ", start, ", ", count);
    return {true,  true,
            data<int64_t>(index_) + start, count,
            data<int64_t>(maps_) + start,  maps_.size(1)};
  }

  Tensor index_, maps_;
  std::vector<int64_t> spans_;
};

inline void require_one_each(size_t weights, size_t grads, size_t flags) {
  require(grads == weights && flags == weights,
          "pack_weights_backward: expected a gradient and a flag for each of ", weights,
          " weights; got ", grads, " and ", flags);
}

// The empty tensor that stands for a gradient nobody wants.
inline Tensor nothing(const Tensor& like) { return uninitialized(like, {0}); }

}  // namespace l0k
