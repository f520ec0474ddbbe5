// SPDX-License-Identifier: Apache-2.0
// Around the products of gated_gemm.cuh: lists and gates before them, the gradients of weight, bias
// and gates after them, and the launches that gated_linear and gated_conv2d share.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/gated_gemm.cuh"

namespace l0k {
namespace gated {

using torch::headeronly::ScalarType;

// ---- lists ----

// One listed axis of the weight, and the tables that resolve_lists makes of it.
template <typename S>
struct ListedAxis {
  const int64_t* index;              // packed -> full
  const int64_t* gates;              // the first gate of each feature
  const int64_t* other_gates;        // the second one
  Axis<S> axis;                      // whose place and scale are written
  int features;                      // 0: nothing to do
  int32_t* place;
  S* scale;
  int32_t* slot;  // full -> packed, -1 if closed or a dummy; null: not wanted
};

template <typename S>
struct ResolveParams {
  ListedAxis<S> axes[2];
  const S* z;
  int64_t gates;  // with the one that is always open
};

constexpr int kResolveThreads = 1024;

// Turns lists and gates into places and scales, once for all tiles that need them. What is out of
// bounds becomes a dummy. blockIdx.y is the axis; one block along x if slots are wanted.
template <typename S>
__global__ void L0K_BOUNDS(kResolveThreads, 1) resolve_lists(const ResolveParams<S> p) {
  const ListedAxis<S>& listed = p.axes[blockIdx.y];
  if (listed.features == 0) return;
  const int first = blockIdx.x * kResolveThreads + threadIdx.x;
  const int stride = gridDim.x * kResolveThreads;
  if (listed.slot != nullptr) {
    for (int f = first; f < listed.features; f += stride) listed.slot[f] = -1;
    __syncthreads();
  }
  const int width = listed.axis.width();
  for (int packed = first; packed < width; packed += stride) {
    const int64_t f = listed.index[packed];
    S scale = S(0);
    if (0 <= f && f < listed.features) {
      const int64_t a = listed.gates[f];
      const int64_t b = listed.other_gates[f];
      if (0 <= a && a < p.gates && 0 <= b && b < p.gates) scale = p.z[a] * p.z[b];
    }
    listed.place[packed] = static_cast<int32_t>(scale == S(0) ? 0 : f);
    listed.scale[packed] = scale;
    if (listed.slot != nullptr && scale != S(0)) listed.slot[f] = packed;
  }
}

// ---- gradients of weight, bias and gates ----

// The features of one axis, found by their place in the weight.
template <typename S>
struct FullAxis {
  int features;
  const int32_t* slot;  // null: all are packed, in order, not scaled
  const S* scale;       // of packed features

  __device__ int packed(int f) const { return slot == nullptr ? f : slot[f]; }
  __device__ S scale_of(int packed) const { return slot == nullptr ? S(1) : scale[packed]; }
};

template <typename S, typename W>
struct ScatterParams {
  const S* sums;  // of weight_product
  int64_t line;
  int64_t rows;  // of a matrix of sums
  int slices, kernel_high, kernel_wide;
  const double* bias_sums;
  FullAxis<S> outputs, inputs;
  int outputs_per_block;
  Weight<W> weight, grad;  // the strides of either
  W* grad_weight;          // null: not wanted
  W* grad_bias;            // null: not wanted
  double* column_sums;     // [block along y][input], <sums, weight>; null: not wanted
};

constexpr int kScatterThreads = 64;

// Adds the slices and writes the gradients at full shape, zeros at closed places; a thread writes
// one input's column of the outputs of its block.
template <typename S, typename W>
__global__ void L0K_BOUNDS(kScatterThreads, 8) scatter_weight(const ScatterParams<S, W> p) {
  const int begin = blockIdx.y * p.outputs_per_block;
  const int end = min(p.outputs.features, begin + p.outputs_per_block);
  if (p.grad_bias != nullptr && blockIdx.x == 0) {
    for (int out = begin + threadIdx.x; out < end; out += kScatterThreads) {
      const int row = p.outputs.packed(out);
      double sum = 0;
      for (int slice = 0; row >= 0 && slice < p.slices; ++slice) {
        sum += p.bias_sums[slice * p.rows + row];
      }
      p.grad_bias[out] = from_sum<W>(static_cast<S>(sum));
    }
  }
  const int in = blockIdx.x * kScatterThreads + threadIdx.x;
  if (in >= p.inputs.features) return;
  const int column = p.inputs.packed(in);
  const S scale = column >= 0 ? p.inputs.scale_of(column) : S(0);
  const int64_t matrix = p.rows * p.line;
  const int64_t slice_size = matrix * p.kernel_high * p.kernel_wide;
  double dot = 0;
  for (int out = begin; out < end; ++out) {
    const int row = p.outputs.packed(out);
    const bool open = row >= 0 && column >= 0;
    const S* from = p.sums + (open ? row * p.line + column : 0);
    for (int high = 0; high < p.kernel_high; ++high) {
      for (int wide = 0; wide < p.kernel_wide; ++wide, from += matrix) {
        double sum = 0;
        for (int slice = 0; open && slice < p.slices; ++slice) sum += from[slice * slice_size];
        if (p.grad_weight != nullptr) {
          p.grad_weight[p.grad.place(out, in, high, wide)] =
              from_sum<W>(open ? static_cast<S>(sum) * scale : S(0));
        }
        if (open && p.column_sums != nullptr) {
          const W weight = p.weight.data[p.weight.place(out, in, high, wide)];
          dot += sum * static_cast<double>(to_sum(weight));
        }
      }
    }
  }
  if (p.column_sums != nullptr) {
    p.column_sums[static_cast<int64_t>(blockIdx.y) * p.inputs.features + in] = dot;
  }
}

template <typename S>
struct GateParams {
  const double* column_sums;  // [blocks][input]
  int blocks;
  FullAxis<S> inputs;
  const int64_t* gates[2];  // of each input
  const S* z;
  int64_t count;  // gates, with the last one, which is a constant
  S* grad_z;
};

constexpr int kGateThreads = 256;

// Adds up what the columns say about their gates; a thread owns one gate and meets the columns in
// their order. Chunks of columns without gates of this block are skipped.
template <typename S>
__global__ void L0K_BOUNDS(kGateThreads, 2) reduce_gates(const GateParams<S> p) {
  L0K_SHARED(double, parts, [kGateThreads]);
  L0K_SHARED(int, owners, [kGateThreads]);
  const int64_t first_gate = static_cast<int64_t>(blockIdx.x) * kGateThreads;
  double sum = 0;
  for (int side = 0; side < 2; ++side) {
    for (int first = 0; first < p.inputs.features; first += kGateThreads) {
      const int in = first + threadIdx.x;
      int owner = -1;
      double part = 0;
      if (in < p.inputs.features && p.inputs.packed(in) >= 0) {
        const int64_t gate = p.gates[side][in];
        if (first_gate <= gate && gate < first_gate + kGateThreads && gate + 1 < p.count) {
          owner = static_cast<int>(gate - first_gate);
          for (int block = 0; block < p.blocks; ++block) {
            part += p.column_sums[static_cast<int64_t>(block) * p.inputs.features + in];
          }
          part *= static_cast<double>(p.z[p.gates[1 - side][in]]);
        }
      }
      int found;
      block_scan_exclusive(owner >= 0 ? 1 : 0, found);
      if (found == 0) continue;
      owners[threadIdx.x] = owner;
      parts[threadIdx.x] = part;
      __syncthreads();
      for (int i = 0; i < kGateThreads; ++i) {
        if (owners[i] == static_cast<int>(threadIdx.x)) sum += parts[i];
      }
    }
  }
  const int64_t gate = first_gate + threadIdx.x;
  if (gate < p.count) p.grad_z[gate] = static_cast<S>(sum);
}

// ---- choices, made from shapes alone so that results do not depend on the device ----

// Tiles of a matrix product: Big where there is work for them, else Small.
template <typename T>
struct Tilings {
  using Big = Tiling<128, 128, 32, 256, 2>;
  using Small = Tiling<64, 64, 32, 128, 4>;
};
template <>
struct Tilings<float> {
  using Big = Tiling<128, 64, 16, 128, 3>;
  using Small = Big;
};
template <>
struct Tilings<double> {
  using Big = Tiling<64, 64, 16, 256, 1>;
  using Small = Big;
};

constexpr int64_t kFullDevice = 132;  // blocks that keep an H200 busy: one per multiprocessor
constexpr int64_t kSlicedBlocks = 4 * kFullDevice;
constexpr int64_t kScatterChunks = 16;  // of outputs; each has its own column sums

inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
inline int64_t at_least_one(int64_t number) { return std::max<int64_t>(number, 1); }

// Calls run(tiling).
template <typename T, typename Run>
void with_tiling(bool big, const Run& run) {
  if constexpr (std::is_same_v<typename Tilings<T>::Big, typename Tilings<T>::Small>) {
    run(typename Tilings<T>::Big{});
  } else if (big) {
    run(typename Tilings<T>::Big{});
  } else {
    run(typename Tilings<T>::Small{});
  }
}

inline int to_int(int64_t number) {
  require(number <= std::numeric_limits<int>::max() / 2,
          "expected fewer than 2^30 rows, features and tiles");
  return static_cast<int>(number);
}

// ---- arguments ----

// What both operators get, besides geometry.
struct Arguments {
  Tensor x, weight;
  std::optional<Tensor> bias;
  Tensor z, index, counts, maps;
  std::vector<int64_t> in_span, out_span;
  bool relu;

  int outputs() const { return to_int(weight.size(0)); }
  int inputs() const { return to_int(weight.size(1)); }
};

inline Arguments make_arguments(const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias, const Tensor& z,
                                const Tensor& index, const Tensor& counts, const Tensor& maps,
                                const std::vector<int64_t>& in_span,
                                const std::vector<int64_t>& out_span,
                                const std::string& activation) {
  require(activation == "none" || activation == "relu", "activation: expected none or relu; got ",
          activation);
  return {x,           weight,       bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt,
          dense(z),    dense(index), dense(counts),
          dense(maps), in_span,      out_span,
          activation == "relu"};
}

// How a layer's rows lie. Rows is PlainRows or WindowRows.
template <typename Rows>
struct Geometry {
  int in_capacity;  // numbers per row of x
  Rows forward;     // rows of y, reading x
  Rows backward;    // rows of x's gradient, reading y's
  int output_rows;  // of y
  int kernel_high, kernel_wide;
};

template <typename T, typename W>
struct Types {};

// Calls run(Types<T, W>) with the types of numbers and of the weight.
template <typename Run>
void with_types(const Tensor& x, const Tensor& weight, const Run& run) {
  const ScalarType t = x.scalar_type();
  const ScalarType w = weight.scalar_type();
  if (t == ScalarType::Double && w == t) return run(Types<double, double>{});
  if (t == ScalarType::Float && w == t) return run(Types<float, float>{});
  if (t == ScalarType::BFloat16 && w == t) return run(Types<__nv_bfloat16, __nv_bfloat16>{});
  if (t == ScalarType::BFloat16 && w == ScalarType::Float) {
    return run(Types<__nv_bfloat16, float>{});
  }
  if (t == ScalarType::Half && w == t) return run(Types<__half, __half>{});
  if (t == ScalarType::Half && w == ScalarType::Float) return run(Types<__half, float>{});
  require(false, "no kernel for this pair of dtypes");
}

inline bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

template <typename T>
bool in_vectors(const Tensor& tensor, int64_t line) {
  return aligned(tensor) && line % kVector<T> == 0;
}

template <typename T>
Pixels<T> pixels(const Tensor& tensor, int line) {
  return {data<T>(tensor), line, in_vectors<T>(tensor, line)};
}

template <typename T, typename W>
Weight<W> strided(const Tensor& weight, bool inputs_listed) {
  const auto kernel_stride = [&](int64_t dim) -> int64_t {
    return weight.dim() == 4 && weight.size(dim) > 1 ? weight.stride(dim) : 0;
  };
  Weight<W> strided{data<W>(weight),  weight.stride(0), weight.stride(1),
                    kernel_stride(2), kernel_stride(3), false};
  constexpr int64_t kMost = std::numeric_limits<int>::max() / static_cast<int64_t>(sizeof(W));
  require(strided.out <= kMost && strided.in <= kMost,
          "weight: expected strides of less than 2^31 bytes");
  // kVector is a power of two: what divides this divides each of them.
  const int64_t lines = weight.size(1) | strided.out | strided.high | strided.wide;
  strided.vectors =
      !inputs_listed && strided.in == 1 && lines % kVector<T> == 0 && aligned(weight);
  return strided;
}

// ---- lists ----

// Places, scales and slots of both axes, made by one launch.
template <typename S>
class Lists {
 public:
  Lists(const Arguments& args, int in_capacity, bool wants_slots) {
    const int64_t inputs = args.inputs();
    const int64_t features = inputs + args.outputs();
    const int64_t ints = wants_slots ? 2 * features : features;
    const bool any = !args.in_span.empty() || !args.out_span.empty();
    places_ = uninitialized(args.index, {any ? parts(ints, 2) : 0});
    scales_ = uninitialized(args.z, {any ? features : 0});
    int32_t* place = reinterpret_cast<int32_t*>(out<int64_t>(places_));
    int32_t* slot = wants_slots ? place + features : nullptr;
    ResolveParams<S> p{{}, data<S>(args.z), args.z.size(0)};
    p.axes[0] = listed(args, args.in_span, args.inputs(), std::min(args.inputs(), in_capacity),
                       place, out<S>(scales_), slot);
    p.axes[1] = listed(args, args.out_span, args.outputs(), args.outputs(), place + inputs,
                       out<S>(scales_) + inputs, wants_slots ? slot + inputs : nullptr);
    listed_ = {p.axes[0], p.axes[1]};
    const int longest = std::max(p.axes[0].features, p.axes[1].features);
    if (longest == 0) return;
    const int64_t blocks = wants_slots ? 1 : parts(longest, kResolveThreads);
    L0K_LAUNCH(resolve_lists<S>, dim3(blocks, 2), kResolveThreads, 0, current_stream(args.x), p);
  }

  const Axis<S>& inputs() const { return listed_[0].axis; }
  const Axis<S>& outputs() const { return listed_[1].axis; }
  FullAxis<S> full_inputs(int features) const { return full(listed_[0], features); }
  FullAxis<S> full_outputs(int features) const { return full(listed_[1], features); }

 private:
  static ListedAxis<S> listed(const Arguments& args, const std::vector<int64_t>& span, int features,
                              int limit, int32_t* place, S* scale, int32_t* slot) {
    if (span.empty()) return {{}, {}, {}, {nullptr, nullptr, nullptr, limit}, 0, {}, {}, {}};
    const int64_t* gates = data<int64_t>(args.maps) + span[0];
    const Axis<S> axis{data<int64_t>(args.counts) + span[1], place, scale, limit};
    return {data<int64_t>(args.index) + span[0], gates, gates + args.maps.size(1), axis, features,
            place, scale, slot};
  }
  static FullAxis<S> full(const ListedAxis<S>& listed, int features) {
    return {features, listed.slot, listed.scale};
  }

  Tensor places_, scales_;
  std::array<ListedAxis<S>, 2> listed_;
};

// ---- launches ----

template <bool kForward, typename T, typename W, typename Rows>
void launch_layer(const LayerParams<T, W, Rows>& p, Stream stream) {
  const int64_t rows = p.rows.count();
  const auto tiles = [&](auto tiling) {
    using Shape = decltype(tiling);
    return parts(rows, Shape::kM) * p.rows.phases() * parts(p.capacity, Shape::kN);
  };
  const bool big = p.capacity > Tilings<T>::Small::kN &&
                   tiles(typename Tilings<T>::Big{}) >= kFullDevice;
  with_tiling<T>(big, [&](auto tiling) {
    using Shape = decltype(tiling);
    constexpr int kBytes = Layer<T, W, Shape, Rows, kForward>::kBytes;
    if (tiles(tiling) == 0) return;
    L0K_LAUNCH((layer_product<T, W, Shape, Rows, kForward>), to_int(tiles(tiling)), Shape::kThreads,
               kBytes, stream, p);
  });
}

template <typename T, typename W, typename Rows>
void run_forward(Types<T, W>, const Arguments& args, const Geometry<Rows>& geometry,
                 const Tensor& y) {
  if (y.numel() == 0) return;
  const Lists<Sum<T>> lists(args, geometry.in_capacity, false);
  LayerParams<T, W, Rows> p{};
  p.from = pixels<T>(args.x, geometry.in_capacity);
  p.weight = strided<T, W>(args.weight, !args.in_span.empty());
  p.bias = args.bias ? data<W>(*args.bias) : nullptr;
  p.relu = args.relu;
  p.summed = lists.inputs();
  p.columns = lists.outputs();
  p.rows = geometry.forward;
  p.to = out<T>(y);
  p.capacity = args.outputs();
  p.vectors = in_vectors<T>(y, p.capacity);
  launch_layer<true>(p, current_stream(args.x));
}

// y: dense, or channels_last; rows of `outputs` numbers.
template <typename Rows>
void run_forward(const Arguments& args, const Geometry<Rows>& geometry, const Tensor& y) {
  with_types(args.x, args.weight, [&](auto types) { run_forward(types, args, geometry, y); });
}

// Which gradients are wanted; those that are not stay empty.
struct Gradients {
  Tensor x, weight, bias, z;
  bool need_x, need_weight, need_bias, need_z;
};

template <typename T, typename W, typename Rows>
class Backward {
 public:
  using S = Sum<T>;

  Backward(const Arguments& args, const Geometry<Rows>& geometry, const Tensor& grad,
           const std::optional<Tensor>& y, const Gradients& to)
      : args_(args),
        geometry_(geometry),
        to_(to),
        lists_(args, geometry.in_capacity, to.need_weight || to.need_bias || to.need_z),
        stream_(current_stream(args.x)),
        behind_relu_(y ? uninitialized(grad, {grad.numel()}) : grad),
        grad_(pixels<T>(behind_relu_, args.outputs())) {
    if (y && grad.numel() > 0) mask(grad, *y);
  }

  void run() const {
    if (to_.need_x && to_.x.numel() > 0) run_input();
    if (to_.need_weight || to_.need_bias || to_.need_z) run_weight();
  }

 private:
  void mask(const Tensor& grad, const Tensor& y) const {
    const int outputs = args_.outputs();
    const int64_t per_row = parts(outputs, kVector<T>);
    const int vectors = to_int(geometry_.output_rows * per_row);
    const ReluParams<T> p{pixels<T>(grad, outputs),
                          pixels<T>(y, outputs),
                          vectors,
                          outputs,
                          Divider(static_cast<uint32_t>(per_row)),
                          lists_.outputs(),
                          out<T>(behind_relu_)};
    const int64_t blocks = parts(vectors, kReluThreads);
    L0K_LAUNCH(relu_gradient<T>, blocks, kReluThreads, 0, stream_, p);
  }

  void run_input() const {
    LayerParams<T, W, Rows> p{};
    p.from = grad_;
    p.weight = strided<T, W>(args_.weight, !args_.in_span.empty());
    p.summed = lists_.outputs();
    p.columns = lists_.inputs();
    p.rows = geometry_.backward;
    p.to = out<T>(to_.x);
    p.capacity = geometry_.in_capacity;
    p.vectors = in_vectors<T>(to_.x, p.capacity);
    launch_layer<false>(p, stream_);
  }

  // Gates of inputs that are not listed get no gradient.
  bool wants_columns() const { return to_.need_z && !args_.in_span.empty(); }
  // For the bias alone, no products are needed.
  int summed_inputs() const { return to_.need_weight || wants_columns() ? args_.inputs() : 0; }

  void run_weight() const {
    const bool big =
        args_.outputs() > Tilings<T>::Small::kM && summed_inputs() > Tilings<T>::Small::kN;
    with_tiling<T>(big, [&](auto tiling) { run_weight(tiling); });
  }

  template <typename Shape>
  void run_weight(Shape) const {
    const int64_t outputs = args_.outputs();
    const int64_t inputs = summed_inputs();
    const int64_t rows = geometry_.output_rows;
    WeightGradParams<T, Rows> p{};
    p.grad = grad_;
    p.x = pixels<T>(args_.x, geometry_.in_capacity);
    p.inputs = lists_.inputs();
    p.inputs.limit = std::min(p.inputs.limit, summed_inputs());
    p.outputs = lists_.outputs();
    p.rows = {geometry_.output_rows};
    p.window = geometry_.forward;
    p.places = geometry_.kernel_high * geometry_.kernel_wide;
    const int64_t across = at_least_one(parts(p.inputs.limit, Shape::kN));
    const int64_t down = parts(outputs, Shape::kM);

    // Enough slices for all multiprocessors, as long as each has some rows to sum.
    const int64_t wanted = parts(kSlicedBlocks, at_least_one(across * down * p.places));
    const int64_t most = at_least_one(parts(rows, 8 * Shape::kDepth));
    const int64_t steps = parts(parts(rows, std::min(wanted, most)), Shape::kDepth);
    p.rows_per_slice = to_int(at_least_one(steps) * Shape::kDepth);
    const int slices = to_int(at_least_one(parts(rows, p.rows_per_slice)));

    p.line = parts(inputs, 4) * 4;
    const Tensor sums = uninitialized(args_.z, {slices * p.places * outputs * p.line});
    const Tensor doubles = uninitialized(
        args_.index, {slices * outputs + kScatterChunks * inputs});  // of 8 bytes, as int64 has
    double* bias_sums = reinterpret_cast<double*>(out<int64_t>(doubles));
    p.sums = out<S>(sums);
    p.bias = to_.need_bias ? bias_sums : nullptr;
    if (down > 0) {
      L0K_LAUNCH((weight_product<T, Shape, Rows>), dim3(across, down, slices * p.places),
                 Shape::kThreads, (WeightGrad<T, Shape, Rows>::Tiles::kBytes), stream_, p);
    }
    scatter(p, slices, bias_sums, bias_sums + slices * outputs);
  }

  void scatter(const WeightGradParams<T, Rows>& from, int slices, const double* bias_sums,
               double* column_sums) const {
    const int outputs = args_.outputs();
    const int inputs = summed_inputs();
    ScatterParams<S, W> p{};
    p.sums = from.sums;
    p.line = from.line;
    p.rows = outputs;
    p.slices = slices;
    p.kernel_high = geometry_.kernel_high;
    p.kernel_wide = geometry_.kernel_wide;
    p.bias_sums = bias_sums;
    p.outputs = lists_.full_outputs(outputs);
    p.inputs = lists_.full_inputs(inputs);
    p.outputs_per_block = to_int(at_least_one(parts(outputs, kScatterChunks)));
    p.weight = strided<T, W>(args_.weight, false);
    if (to_.need_weight) p.grad = strided<T, W>(to_.weight, false);
    p.grad_weight = to_.need_weight ? out<W>(to_.weight) : nullptr;
    p.grad_bias = to_.need_bias ? out<W>(to_.bias) : nullptr;
    p.column_sums = wants_columns() ? column_sums : nullptr;
    const int blocks = to_int(parts(outputs, p.outputs_per_block));
    if (blocks > 0) {
      const int64_t across = at_least_one(parts(inputs, kScatterThreads));
      L0K_LAUNCH((scatter_weight<S, W>), dim3(across, blocks), kScatterThreads, 0, stream_, p);
    }
    if (to_.need_z) reduce(p, blocks);
  }

  void reduce(const ScatterParams<S, W>& from, int blocks) const {
    GateParams<S> p{};
    p.column_sums = from.column_sums;
    p.blocks = blocks;
    if (wants_columns()) {
      p.inputs = from.inputs;
      p.gates[0] = data<int64_t>(args_.maps) + args_.in_span[0];
      p.gates[1] = p.gates[0] + args_.maps.size(1);
    }
    p.z = data<S>(args_.z);
    p.count = args_.z.size(0);
    p.grad_z = out<S>(to_.z);
    L0K_LAUNCH(reduce_gates<S>, parts(p.count, kGateThreads), kGateThreads, 0, stream_, p);
  }

  const Arguments& args_;
  const Geometry<Rows>& geometry_;
  const Gradients& to_;
  Lists<S> lists_;
  Stream stream_;
  Tensor behind_relu_;  // the gradient before the activation
  Pixels<T> grad_;
};

template <typename T, typename W, typename Rows>
void run_backward(Types<T, W>, const Arguments& args, const Geometry<Rows>& geometry,
                  const Tensor& grad, const std::optional<Tensor>& y, const Gradients& to) {
  Backward<T, W, Rows>(args, geometry, grad, y, to).run();
}

using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// grad, y and grad_x: rows as in x and y of run_forward.
template <typename Rows>
GradientTensors run_backward(const Arguments& args, const Geometry<Rows>& geometry,
                             const Tensor& grad, const std::optional<Tensor>& y,
                             const Tensor& grad_x, bool need_x, bool need_weight, bool need_bias,
                             bool need_z) {
  const Gradients to{grad_x,
                     need_weight ? torch::stable::empty_like(args.weight)
                                 : uninitialized(args.weight, {0}),
                     uninitialized(args.weight, {need_bias ? args.weight.size(0) : 0}),
                     uninitialized(args.z, {need_z ? args.z.size(0) : 0}),
                     need_x,
                     need_weight,
                     need_bias,
                     need_z};
  with_types(args.x, args.weight, [&](auto types) {
    run_backward(types, args, geometry, grad, args.relu ? y : std::nullopt, to);
  });
  return {to.x, to.weight, to.bias, to.z};
}

}  // namespace gated
}  // namespace l0k
