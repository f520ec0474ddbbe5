// SPDX-License-Identifier: Apache-2.0
// What gated_linear and gated_conv2d share on the CPU.
//
// Both pack the weight, take the packed columns of x, let PyTorch multiply or convolve, and spread
// the result over the full width. Activations are seen as rows of features; a channels_last image
// has one row per pixel.
#pragma once

#include "common/tensors.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace l0k {

using torch::headeronly::ScalarType;

// An operator that is registered with PyTorch; the results lie at the front of what comes back.
template <typename... Arguments>
std::array<StableIValue, sizeof...(Arguments)> call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

inline Tensor tensor_from(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

// The operators called here must not record a graph: the gradient is our own.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// One axis of the weight. `index` and `map` are undefined if all its features are there.
struct GatedAxis {
  int64_t features;
  int64_t packed;
  Tensor index, map;
  std::vector<uint8_t> open;  // of every packed feature: whether it is not a dummy

  std::optional<Tensor> rows() const { return index.defined() ? std::optional(index) : std::nullopt; }
  std::optional<Tensor> gates() const { return map.defined() ? std::optional(map) : std::nullopt; }
};

// The flat lists of all ports, on the CPU and dense.
struct Lists {
  Tensor z, index, counts, maps;
};

template <typename S>
std::vector<uint8_t> open_features(const char* span, const GatedAxis& axis, const Tensor& z) {
  const int64_t* index = data<int64_t>(axis.index);
  const int64_t* map = data<int64_t>(axis.map);
  std::vector<uint8_t> open(axis.packed);
  for (int64_t i = 0; i < axis.packed; ++i) {
    require(index[i] >= 0 && index[i] < axis.features, span, ": expected features from 0 to ",
            axis.features - 1, "; got ", index[i]);
    const int64_t a = map[index[i]], b = map[axis.features + index[i]];
    require(a >= 0 && a < z.size(0) && b >= 0 && b < z.size(0), span,
            ": expected gates from 0 to ", z.size(0) - 1, "; got ", a, ", ", b);
    open[i] = data<S>(z)[a] * data<S>(z)[b] != S(0);
  }
  return open;
}

inline GatedAxis make_gated_axis(const char* name, const std::vector<int64_t>& span,
                                 int64_t features, int64_t capacity, Lists lists) {
  GatedAxis axis{features, features, Tensor(), Tensor(), std::vector<uint8_t>(features, 1)};
  if (span.empty()) return axis;
  axis.packed = data<int64_t>(lists.counts)[span[1]];
  require(axis.packed >= 0 && axis.packed <= std::min(features, capacity), name,
          ": expected a count from 0 to ", std::min(features, capacity), "; got ", axis.packed);
  axis.index = torch::stable::narrow(lists.index, 0, span[0], axis.packed);
  axis.map = dense(torch::stable::narrow(lists.maps, 1, span[0], features));
  axis.open = lists.z.scalar_type() == ScalarType::Double
                  ? open_features<double>(name, axis, lists.z)
                  : open_features<float>(name, axis, lists.z);
  return axis;
}

// A layer's packed weight with its axes.
struct PackedLayer {
  Tensor weight, z;
  GatedAxis in, out;

  PackedLayer(const Tensor& full, const Tensor& gates, const Tensor& index, const Tensor& counts,
              const Tensor& maps, const std::vector<int64_t>& in_span,
              const std::vector<int64_t>& out_span, int64_t in_capacity)
      : weight(full), z(dense(gates)) {
    const Lists lists{z, dense(index), dense(counts), maps};
    in = make_gated_axis("in_span", in_span, full.size(1), in_capacity, lists);
    out = make_gated_axis("out_span", out_span, full.size(0), full.size(0), lists);
  }

  Tensor packed_weight(ScalarType dtype) const {
    return tensor_from(call("l0kernels::pack_weight", weight, std::optional(z), out.rows(),
                            out.gates(), in.rows(), in.gates(), dtype)[0]);
  }

  std::optional<Tensor> packed_bias(const std::optional<Tensor>& bias, ScalarType dtype) const {
    if (!bias) return std::nullopt;
    return tensor_from(call("l0kernels::pack_weight", *bias, std::optional(z), out.rows(),
                            out.gates(), std::nullopt, std::nullopt, dtype)[0]);
  }

  // The gradients of weight and z from that of the packed weight.
  std::tuple<Tensor, Tensor> unpack(const Tensor& grad, bool need_weight, bool need_z) const {
    const auto found =
        call("l0kernels::pack_weight_backward", grad, weight, std::optional(z), out.rows(),
             out.gates(), in.rows(), in.gates(), need_weight, need_z);
    return {tensor_from(found[0]), tensor_from(found[1])};
  }

  // The gradient of the bias from that of the packed output, summed over all but the features.
  Tensor unpack_bias(const Tensor& grad, const std::vector<int64_t>& over) const {
    const Tensor total = torch::stable::sum(grad, over);
    const auto found =
        call("l0kernels::pack_weight_backward", total, uninitialized(weight, {out.features}),
             std::optional(z), out.rows(), out.gates(), std::nullopt, std::nullopt, true, false);
    tensor_from(found[1]);
    return tensor_from(found[0]);
  }
};

// ---- rows of features ----

// Calls `run` with a number of the tensor's type.
template <typename Run>
void with_numbers_of(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return run(double());
    case ScalarType::Float:
      return run(float());
    case ScalarType::BFloat16:
      return run(c10::BFloat16());
    case ScalarType::Half:
      return run(c10::Half());
    default:
      require(false, "expected a floating dtype");
  }
}

template <typename Run>
void for_rows(int64_t rows, int64_t width, const Run& run) {
  const int64_t grain = 65536 / std::max<int64_t>(width, 1) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

// What relu makes of a number; NaN stays.
template <typename T>
T rectified(T value) {
  return value <= T(0) ? T(0) : value;
}

// Copies the packed features of each row to `to` [rows, packed], zeros at dummies and, where `y`
// is defined, where relu gave 0. `from` and `y` are [rows, width].
inline void take_features(const Tensor& from, const Tensor& y, const GatedAxis& axis, int64_t rows,
                          int64_t width, const Tensor& to) {
  with_numbers_of(from, [&](auto number) {
    using T = decltype(number);
    const T* source = data<T>(from);
    const T* output = y.defined() ? data<T>(y) : nullptr;
    T* target = out<T>(to);
    for_rows(rows, axis.packed, [&](int64_t row) {
      for (int64_t i = 0; i < axis.packed; ++i) {
        const int64_t place = row * width + i;
        const bool stopped = output != nullptr && output[place] <= T(0);
        target[row * axis.packed + i] = axis.open[i] && !stopped ? source[place] : T(0);
      }
    });
  });
}

// Writes rows of packed features to `to` [rows, width], zeros at dummies and behind.
inline void spread_features(const Tensor& from, bool relu, const GatedAxis& axis, int64_t rows,
                            int64_t width, const Tensor& to) {
  with_numbers_of(from, [&](auto number) {
    using T = decltype(number);
    const T* source = data<T>(from);
    T* target = out<T>(to);
    for_rows(rows, width, [&](int64_t row) {
      T* end = target + row * width;
      for (int64_t i = 0; i < axis.packed; ++i) {
        const T value = source[row * axis.packed + i];
        *end++ = !axis.open[i] ? T(0) : relu ? rectified(value) : value;
      }
      std::fill(end, target + (row + 1) * width, T(0));
    });
  });
}

inline bool is_relu(const std::string& activation) {
  if (activation == "relu") return true;
  if (activation != "none") fail("activation: expected none or relu; got ", activation);
  return false;
}

}  // namespace l0k
