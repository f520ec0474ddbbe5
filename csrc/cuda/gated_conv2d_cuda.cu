// SPDX-License-Identifier: Apache-2.0
// gated_conv2d and its backward pass on NVIDIA GPUs, as products over shifted images; the kernels
// are in gated_gemm.cuh.
#include <numeric>

#include "cuda/gated_layer.cuh"

namespace l0k {
namespace {

using gated::Arguments;
using gated::Divider;
using gated::Geometry;
using gated::GradientTensors;
using gated::parts;
using gated::Side;
using gated::to_int;
using gated::WindowRows;
using torch::headeronly::MemoryFormat;
using Ints = std::vector<int64_t>;

bool is_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

Tensor channels_last(const Tensor& t) {
  if (t.numel() == 0 || is_channels_last(t)) return t;
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

Tensor new_image(const Tensor& like, const Ints& sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

// A convolution along one side of an image.
struct Line {
  int64_t size, kernel, stride, padding, dilation;

  int64_t outputs() const {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }
  Side forward() const {
    const int places = to_int(outputs());
    const int step = to_int(dilation);
    return {places, to_int(size), places,         to_int(stride), -to_int(padding), step,
            1,      to_int(kernel), 1, step};
  }
  Side backward() const {
    const int places = to_int(parts(size, stride));
    const int64_t period = stride / std::gcd(stride, dilation);
    return {places,
            to_int(outputs()),
            to_int(size),
            1,
            to_int(padding),
            -to_int(dilation),
            to_int(stride),
            to_int(kernel),
            to_int(period),
            -to_int(period * dilation / stride)};
  }
};

struct Convolution {
  int64_t images;
  Line high, wide;

  Convolution(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
              const Ints& dilation)
      : images(x.size(0)),
        high{x.size(2), weight.size(2), stride[0], padding[0], dilation[0]},
        wide{x.size(3), weight.size(3), stride[1], padding[1], dilation[1]} {}

  static WindowRows window(const Side& high, const Side& wide, int64_t images) {
    to_int(images * std::max(high.places, high.sources) * std::max(wide.places, wide.sources));
    return {high,
            wide,
            to_int(images),
            Divider(static_cast<uint32_t>(std::max(wide.places, 1))),
            Divider(static_cast<uint32_t>(std::max(high.places * wide.places, 1))),
            0,
            0};
  }

  Geometry<WindowRows> geometry(int64_t in_capacity) const {
    return {to_int(in_capacity),
            window(high.forward(), wide.forward(), images),
            window(high.backward(), wide.backward(), images),
            to_int(images * high.outputs() * wide.outputs()),
            to_int(high.kernel),
            to_int(wide.kernel)};
  }
};

Tensor gated_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor z, Tensor index,
                    Tensor counts, Tensor maps, Ints in_span, Ints out_span, Ints stride,
                    Ints padding, Ints dilation, std::string activation) {
  const DeviceGuard guard(x.get_device_index());
  const Arguments args = gated::make_arguments(channels_last(x), weight, bias, z, index, counts,
                                               maps, in_span, out_span, activation);
  const Convolution convolution(x, weight, stride, padding, dilation);
  const Tensor y = new_image(x, {x.size(0), weight.size(0), convolution.high.outputs(),
                                 convolution.wide.outputs()});
  gated::run_forward(args, convolution.geometry(x.size(1)), y);
  return y;
}

GradientTensors gated_conv2d_backward(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> y,
                                      Tensor z, Tensor index, Tensor counts, Tensor maps,
                                      Ints in_span, Ints out_span, Ints stride, Ints padding,
                                      Ints dilation, std::string activation, bool need_x,
                                      bool need_weight, bool need_bias, bool need_z) {
  const DeviceGuard guard(x.get_device_index());
  const Arguments args = gated::make_arguments(channels_last(x), weight, std::nullopt, z, index,
                                               counts, maps, in_span, out_span, activation);
  const Convolution convolution(x, weight, stride, padding, dilation);
  if (y) y = channels_last(*y);
  const Tensor grad_x =
      need_x ? new_image(x, {x.size(0), x.size(1), x.size(2), x.size(3)}) : uninitialized(x, {0});
  return gated::run_backward(args, convolution.geometry(x.size(1)), channels_last(grad), y, grad_x,
                             need_x, need_weight, need_bias, need_z);
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("gated_conv2d_backward", TORCH_BOX(&gated_conv2d_backward));
}

}  // namespace l0k
