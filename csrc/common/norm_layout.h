// SPDX-License-Identifier: Apache-2.0
// How packed_norm sees activations on every device: as rows of numbers with the channels side by
// side (channels_last, [N, C]) or as planes of one channel each.
#pragma once

#include "common/tensors.h"

#include <optional>
#include <vector>

namespace l0k {
namespace norm {

using torch::headeronly::MemoryFormat;

enum Activation : int64_t { kNone = 0, kRelu = 1 };

inline bool is_known(int64_t activation) { return activation == kNone || activation == kRelu; }

struct Geometry {
  bool rows;  // [batch * inner, channels] in memory, else [batch, channels, inner]
  int64_t batch, channels, inner;

  int64_t values() const { return batch * inner; }  // of each channel
  int64_t numbers() const { return values() * channels; }
};

inline bool is_dense(const Tensor& t, bool channels_last) {
  const int64_t dims = t.dim();
  int64_t stride = 1;
  for (int64_t i = 0; i < dims; ++i) {  // fastest dimension first
    const int64_t last_channels = i == 0 ? 1 : i + 1 == dims ? 0 : dims - i;
    const int64_t d = channels_last ? last_channels : dims - 1 - i;
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

// Channels side by side with gaps between the rows, a slice of channels say, count as well.
inline bool is_channels_last(const Tensor& x) {
  return (x.dim() == 4 || x.dim() == 5) && x.stride(1) == 1 && !is_dense(x, false);
}

inline MemoryFormat format_of(const Tensor& x, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

inline Tensor with_layout(const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last)) return t;
  return torch::stable::contiguous(t, format_of(t, channels_last));
}

inline Tensor empty_like(const Tensor& x, bool channels_last) {
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              format_of(x, channels_last));
}

inline Geometry geometry_of(const Tensor& x, bool channels_last) {
  int64_t inner = 1;
  for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
  return {channels_last || inner == 1, x.size(0), x.size(1), inner};
}

// Stands for a gradient nobody wants.
inline Tensor nothing(const Tensor& like) { return uninitialized(like, {0}); }

}  // namespace norm
}  // namespace l0k
