// SPDX-License-Identifier: Apache-2.0
// gated_conv2d and its backward pass on the CPU: exact packed widths, PyTorch's convolutions.
#include "cpu/gated.h"

namespace l0k {
namespace {

using torch::headeronly::MemoryFormat;

struct Window {
  std::vector<int64_t> stride, padding, dilation;

  int64_t output(int64_t size, int64_t kernel, int64_t axis) const {
    return (size + 2 * padding[axis] - dilation[axis] * (kernel - 1) - 1) / stride[axis] + 1;
  }
};

// Images, channels_last; each pixel is a row of features.
struct Images {
  int64_t count, height, width;

  int64_t rows() const { return count * height * width; }

  Tensor empty(ScalarType dtype, int64_t channels) const {
    return torch::stable::empty({count, channels, height, width}, dtype, std::nullopt,
                                std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  }

  Tensor take(const Tensor& from, const Tensor& y, const GatedAxis& axis) const {
    const Tensor whole = torch::stable::contiguous(from, MemoryFormat::ChannelsLast);
    const Tensor of_relu =
        y.defined() ? torch::stable::contiguous(y, MemoryFormat::ChannelsLast) : y;
    const Tensor to = empty(from.scalar_type(), axis.packed);
    take_features(whole, of_relu, axis, rows(), from.size(1), to);
    return to;
  }

  Tensor spread(const Tensor& from, bool relu, const GatedAxis& axis, int64_t channels) const {
    const Tensor to = empty(from.scalar_type(), channels);
    const Tensor whole = torch::stable::contiguous(from, MemoryFormat::ChannelsLast);
    spread_features(whole, relu, axis, rows(), channels, to);
    return to;
  }
};

Images images_of(const Tensor& x) { return {x.size(0), x.size(2), x.size(3)}; }

Images outputs_of(const Tensor& x, const Tensor& weight, const Window& window) {
  return {x.size(0), window.output(x.size(2), weight.size(2), 0),
          window.output(x.size(3), weight.size(3), 1)};
}

Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::empty(sizes, dtype);
  return torch::stable::zero_(tensor);
}

// PyTorch refuses convolutions without channels: one channel of zeros stands for none.
Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Window& window) {
  if (x.size(1) == 0) {
    const Tensor no_x = zeros({x.size(0), 1, x.size(2), x.size(3)}, x.scalar_type());
    const Tensor no_weight =
        zeros({weight.size(0), 1, weight.size(2), weight.size(3)}, x.scalar_type());
    return convolution(no_x, no_weight, bias, window);
  }
  const std::vector<int64_t> no_output_padding{0, 0};
  return tensor_from(call("aten::convolution", x, weight, bias, window.stride, window.padding,
                          window.dilation, false, no_output_padding, int64_t{1})[0]);
}

Tensor gated_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z, Tensor index,
                    Tensor counts, Tensor maps, std::vector<int64_t> in_span,
                    std::vector<int64_t> out_span, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation,
                    std::string activation) {
  const NoGrad guard;
  const bool relu = is_relu(activation);
  const Window window{stride, padding, dilation};
  const PackedLayer layer(weight, z, index, counts, maps, in_span, out_span, x.size(1));
  const Images inputs = images_of(x), outputs = outputs_of(x, weight, window);
  Tensor packed = outputs.empty(x.scalar_type(), layer.out.packed);
  if (packed.numel() > 0) {
    packed = convolution(inputs.take(x, Tensor(), layer.in), layer.packed_weight(x.scalar_type()),
                         layer.packed_bias(bias, x.scalar_type()), window);
  }
  return outputs.spread(packed, relu, layer.out, weight.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_conv2d_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> y, Tensor z, Tensor index,
    Tensor counts, Tensor maps, std::vector<int64_t> in_span, std::vector<int64_t> out_span,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::string activation, bool need_x, bool need_weight, bool need_bias, bool need_z) {
  const NoGrad guard;
  const bool relu = is_relu(activation);
  require(!relu || y, "gated_conv2d_backward: expected y with relu; got none");
  const PackedLayer layer(weight, z, index, counts, maps, in_span, out_span, x.size(1));
  const Images inputs = images_of(x), outputs = images_of(grad);
  const Tensor upstream = outputs.take(grad, relu ? *y : Tensor(), layer.out);
  const Tensor packed_x = inputs.take(x, Tensor(), layer.in);
  const Tensor packed_weight = layer.packed_weight(x.scalar_type());
  const bool unpacks = need_weight || need_z;

  Tensor of_x = zeros({x.size(0), layer.in.packed, x.size(2), x.size(3)}, x.scalar_type());
  Tensor of_weight = zeros({layer.out.packed, layer.in.packed, weight.size(2), weight.size(3)},
                           x.scalar_type());
  if ((need_x || unpacks) && upstream.numel() > 0 && packed_x.numel() > 0) {
    const std::vector<int64_t> no_output_padding{0, 0};
    const std::array<bool, 3> wanted{need_x, unpacks, false};
    const auto found =
        call("aten::convolution_backward", upstream, packed_x, packed_weight, std::nullopt, stride,
             padding, dilation, false, no_output_padding, int64_t{1},
             torch::headeronly::HeaderOnlyArrayRef<bool>(wanted));
    const Tensor first = tensor_from(found[0]), second = tensor_from(found[1]);
    tensor_from(found[2]);
    if (need_x) of_x = first;
    if (unpacks) of_weight = second;
  }
  Tensor grad_x = uninitialized(x, {0});
  Tensor grad_weight = uninitialized(weight, {0});
  Tensor grad_bias = uninitialized(weight, {0});
  Tensor grad_z = uninitialized(layer.z, {0});
  if (need_x) grad_x = inputs.spread(of_x, false, layer.in, x.size(1));
  if (unpacks) {
    const auto [unpacked, gates] = layer.unpack(of_weight, need_weight, need_z);
    if (need_weight) grad_weight = unpacked;
    if (need_z) grad_z = gates;
  }
  if (need_bias) grad_bias = layer.unpack_bias(upstream, {0, 2, 3});
  return {grad_x, grad_weight, grad_bias, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("gated_conv2d_backward", TORCH_BOX(&gated_conv2d_backward));
}

}  // namespace l0k
