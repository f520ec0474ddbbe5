// SPDX-License-Identifier: Apache-2.0
// gated_linear and its backward pass on NVIDIA GPUs; the kernels are in gated_gemm.cuh.
#include "cuda/gated_layer.cuh"

namespace l0k {
namespace {

using gated::Arguments;
using gated::Geometry;
using gated::GradientTensors;
using gated::PlainRows;
using Ints = std::vector<int64_t>;

// x: dense, [..., features].
Geometry<PlainRows> geometry_of(const Arguments& args) {
  const int64_t features = args.x.size(args.x.dim() - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < args.x.dim(); ++d) rows *= args.x.size(d);
  const PlainRows plain{gated::to_int(rows)};
  return {gated::to_int(features), plain, plain, plain.rows, 1, 1};
}

Tensor gated_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z, Tensor index,
                    Tensor counts, Tensor maps, Ints in_span, Ints out_span,
                    std::string activation) {
  const DeviceGuard guard(x.get_device_index());
  const Arguments args = gated::make_arguments(dense(x), weight, bias, z, index, counts, maps,
                                               in_span, out_span, activation);
  Ints sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, sizes);
  gated::run_forward(args, geometry_of(args), y);
  return y;
}

GradientTensors gated_linear_backward(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> y,
                                      Tensor z, Tensor index, Tensor counts, Tensor maps,
                                      Ints in_span, Ints out_span, std::string activation,
                                      bool need_x, bool need_weight, bool need_bias, bool need_z) {
  const DeviceGuard guard(x.get_device_index());
  const Arguments args = gated::make_arguments(dense(x), weight, std::nullopt, z, index, counts,
                                               maps, in_span, out_span, activation);
  if (y) y = dense(*y);
  const Tensor grad_x = need_x ? torch::stable::new_empty(x, x.sizes())
                               : uninitialized(x, {0});
  return gated::run_backward(args, geometry_of(args), dense(grad), y, grad_x, need_x, need_weight,
                             need_bias, need_z);
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
  m.impl("gated_linear_backward", TORCH_BOX(&gated_linear_backward));
}

}  // namespace l0k
