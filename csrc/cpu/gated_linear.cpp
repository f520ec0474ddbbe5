// SPDX-License-Identifier: Apache-2.0
// gated_linear and its backward pass on the CPU: exact packed widths, PyTorch's matrix products.
#include "cpu/gated.h"

namespace l0k {
namespace {

// Not through the dispatcher, which would cast under autocast.
Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor result = uninitialized(a, {a.size(0), b.size(1)});
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), a.get(), b.get()));
  return result;
}

Tensor product_and_bias(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  if (!bias) return product(a, b);
  const Tensor result = uninitialized(a, {a.size(0), b.size(1)});
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(result.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
  return result;
}

// x and the gradients as rows of features.
struct Rows {
  int64_t count = 1;
  std::vector<int64_t> shape;  // of the dimensions before the features

  explicit Rows(const Tensor& x) : shape(x.sizes().begin(), x.sizes().end() - 1) {
    for (int64_t size : shape) count *= size;
  }

  Tensor take(const Tensor& from, const Tensor& y, const GatedAxis& axis) const {
    const Tensor whole = dense(from);
    Tensor to = uninitialized(whole, {count, axis.packed});
    take_features(whole, y.defined() ? dense(y) : y, axis, count, from.size(-1), to);
    return to;
  }

  Tensor spread(const Tensor& from, bool relu, const GatedAxis& axis, int64_t width) const {
    std::vector<int64_t> sizes = shape;
    sizes.push_back(width);
    const Tensor to = torch::stable::new_empty(from, sizes);
    spread_features(from, relu, axis, count, width, to);
    return to;
  }
};

Tensor gated_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z, Tensor index,
                    Tensor counts, Tensor maps, std::vector<int64_t> in_span,
                    std::vector<int64_t> out_span, std::string activation) {
  const NoGrad guard;
  const bool relu = is_relu(activation);
  const PackedLayer layer(weight, z, index, counts, maps, in_span, out_span, x.size(-1));
  const Rows rows(x);
  const Tensor packed_weight = layer.packed_weight(x.scalar_type());
  const Tensor y = product_and_bias(rows.take(x, Tensor(), layer.in),
                                    torch::stable::transpose(packed_weight, 0, 1),
                                    layer.packed_bias(bias, x.scalar_type()));
  return rows.spread(y, relu, layer.out, weight.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_linear_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> y, Tensor z, Tensor index,
    Tensor counts, Tensor maps, std::vector<int64_t> in_span, std::vector<int64_t> out_span,
    std::string activation, bool need_x, bool need_weight, bool need_bias, bool need_z) {
  const NoGrad guard;
  const bool relu = is_relu(activation);
  require(!relu || y, "gated_linear_backward: expected y with relu; got none");
  const PackedLayer layer(weight, z, index, counts, maps, in_span, out_span, x.size(-1));
  const Rows rows(x);
  const Tensor upstream = rows.take(grad, relu ? *y : Tensor(), layer.out);
  Tensor grad_x = uninitialized(x, {0});
  Tensor grad_weight = uninitialized(weight, {0});
  Tensor grad_bias = uninitialized(weight, {0});
  Tensor grad_z = uninitialized(layer.z, {0});
  if (need_x) {
    const Tensor packed = product(upstream, layer.packed_weight(x.scalar_type()));
    grad_x = rows.spread(packed, false, layer.in, x.size(-1));
  }
  if (need_weight || need_z) {
    const Tensor packed = product(torch::stable::transpose(upstream, 0, 1),
                                  rows.take(x, Tensor(), layer.in));
    const auto [of_weight, of_z] = layer.unpack(packed, need_weight, need_z);
    if (need_weight) grad_weight = of_weight;
    if (need_z) grad_z = of_z;
  }
  if (need_bias) grad_bias = layer.unpack_bias(upstream, {0});
  return {grad_x, grad_weight, grad_bias, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
  m.impl("gated_linear_backward", TORCH_BOX(&gated_linear_backward));
}

}  // namespace l0k
