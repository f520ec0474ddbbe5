// SPDX-License-Identifier: Apache-2.0
// dep_chain and its backward pass on NVIDIA GPUs.
//
// Each layer waits for the one before. Within a block that is a barrier, between blocks a launch:
// neighbours of few weights therefore share a launch of one block, and a layer of more has a launch
// of its own with as many blocks as it needs. Blocks that wait for each other would have to be
// resident all at once, which nothing promises.
#include <tuple>
#include <vector>

#include "common/chain.h"
#include "cuda/common.cuh"

namespace l0k {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 1024;  // many loads in flight: one block has a whole layer to read
constexpr int kWarps = kThreads / kWarp;
constexpr int kLayers = 32;               // of a launch
constexpr int64_t kOneBlock = 128 * 128;  // weights that a block may read in the time of a launch

// The layers of a launch: several with one block, or one with several.
template <typename Layer>
struct Run {
  Layer layers[kLayers];
  int count;
};

// ---- forward ----

template <typename T>
struct Rows {
  const T* weight;
  const T* bias;
  const T* input;
  T* logits;
  T* slopes;
  int64_t rows;
  int64_t cols;

  int64_t blocks() const { return (rows + kWarps - 1) / kWarps; }
};

// A warp for each row.
template <typename T>
L0K_DEVICE void make_rows(const Rows<T>& r) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int lane = threadIdx.x % kWarp;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (; row < r.rows; row += warps) {
    const T* weight = r.weight + row * r.cols;
    double sum = 0;
#pragma unroll 4
    for (int64_t c = lane; c < r.cols; c += kWarp) {
      sum += static_cast<double>(weight[c]) * static_cast<double>(r.input[c]);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      chain_law(sum + static_cast<double>(r.bias[row]), r.logits[row], r.slopes[row]);
    }
  }
}

template <typename T>
__global__ void L0K_BOUNDS(kThreads, 1) make_logits(const Run<Rows<T>> run) {
  for (int i = 0; i < run.count; ++i) {
    make_rows(run.layers[i]);
    __syncthreads();  // the next layer reads what this one made
  }
}

// ---- backward ----

template <typename T>
struct Columns {
  const T* weight;
  const T* input;
  const T* slopes;
  const T* grad;         // dL/dlogits, without what comes back along the chain
  const double* later;  // what comes back; null: nothing reads these logits
  T* grad_weight;
  T* grad_bias;
  double* earlier;  // what goes back; null: to `first`
  T* grad_first;
  int64_t rows;
  int64_t cols;

  L0K_DEVICE double delta(int64_t row) const {
    const double back = later == nullptr ? 0.0 : later[row];
    return (static_cast<double>(grad[row]) + back) * static_cast<double>(slopes[row]);
  }

  // There is one for layers without columns too: their biases have gradients.
  L0K_HD int64_t blocks() const { return cols == 0 ? 1 : (cols + kWarp - 1) / kWarp; }
};

// A lane for each column of a tile, a warp for every kWarps-th row.
template <typename T>
L0K_DEVICE void add_tile(const Columns<T>& c, int64_t tile) {
  L0K_SHARED(double, deltas, [kThreads]);
  L0K_SHARED(double, sums, [kWarps][kWarp]);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t column = tile * kWarp + lane;
  const bool inside = column < c.cols;
  const double input = inside ? static_cast<double>(c.input[column]) : 0.0;
  double sum = 0;
  for (int64_t first = 0; first < c.rows; first += kThreads) {
    const int64_t count = c.rows - first < kThreads ? c.rows - first : kThreads;
    if (threadIdx.x < count) {
      const double delta = c.delta(first + threadIdx.x);
      deltas[threadIdx.x] = delta;
      if (tile == 0) c.grad_bias[first + threadIdx.x] = static_cast<T>(delta);
    }
    __syncthreads();
#pragma unroll 4
    for (int64_t r = warp; r < count && inside; r += kWarps) {
      const int64_t at = (first + r) * c.cols + column;
      sum += static_cast<double>(c.weight[at]) * deltas[r];
      c.grad_weight[at] = static_cast<T>(deltas[r] * input);
    }
    __syncthreads();  // the next rows overwrite the deltas
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && inside) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
    if (c.earlier == nullptr) {
      c.grad_first[column] = static_cast<T>(total);
    } else {
      c.earlier[column] = total;
    }
  }
  __syncthreads();  // the next layer reads it, the next tile overwrites the sums
}

template <typename T>
__global__ void L0K_BOUNDS(kThreads, 1) chain_gradients(const Run<Columns<T>> run) {
  for (int i = 0; i < run.count; ++i) {
    const Columns<T>& columns = run.layers[i];
    for (int64_t tile = blockIdx.x; tile < columns.blocks(); tile += gridDim.x) {
      add_tile(columns, tile);
    }
  }
}

// ---- launches ----

template <typename Layer, typename Launch>
void launch_runs(const std::vector<Layer>& layers, const Launch& launch) {
  Run<Layer> run{};
  const auto flush = [&](int64_t blocks) {
    if (run.count > 0) launch(run, blocks);
    run.count = 0;
  };
  for (const Layer& layer : layers) {
    const bool is_large = layer.rows * layer.cols > kOneBlock;
    if (is_large || run.count == kLayers) flush(1);
    run.layers[run.count++] = layer;
    if (is_large) flush(layer.blocks());
  }
  flush(1);
}

// The copies that are read in place of tensors that are not contiguous.
std::vector<Tensor> all_dense(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> found;
  for (const Tensor& tensor : tensors) found.push_back(dense(tensor));
  return found;
}

template <typename T>
std::tuple<Tensor, Tensor> chain(const Tensor& first, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, bool reverse) {
  const std::vector<Tensor> w = all_dense(weights);
  const std::vector<Tensor> b = all_dense(biases);
  const Tensor start = dense(first);
  const Tensor logits = uninitialized(first, {chain_size(weights)});
  const Tensor slopes = uninitialized(first, {logits.size(0)});
  std::vector<Rows<T>> layers;
  for (const ChainLayer& layer : chain_layers(first, weights, reverse)) {
    layers.push_back({data<T>(w[layer.number]), data<T>(b[layer.number]),
                      layer.source < 0 ? data<T>(start) : data<T>(logits) + layer.source,
                      out<T>(logits) + layer.at, out<T>(slopes) + layer.at, layer.rows,
                      layer.cols});
  }
  const auto stream = current_stream(first);
  launch_runs(layers, [&](const Run<Rows<T>>& run, int64_t blocks) {
    L0K_LAUNCH(make_logits<T>, blocks, kThreads, 0, stream, run);
  });
  return {logits, slopes};
}

template <typename T>
std::vector<Tensor> chain_backward(const Tensor& grad, const Tensor& logits,
                                   const Tensor& slopes, const Tensor& first,
                                   const std::vector<Tensor>& weights, bool reverse) {
  const std::vector<ChainLayer> order = chain_layers(first, weights, reverse);
  const std::vector<Tensor> w = all_dense(weights);
  const Tensor start = dense(first);
  const Tensor upstream = dense(grad);
  const Tensor made = dense(logits);
  const Tensor steep = dense(slopes);
  const std::vector<Tensor> grads = new_chain_gradients(logits, first, weights);
  const Tensor scratch =
      torch::stable::new_empty(logits, {logits.size(0)}, torch::headeronly::ScalarType::Double);
  double* back = out<double>(scratch);
  std::vector<Columns<T>> layers;
  for (size_t k = order.size(); k-- > 0;) {
    const ChainLayer& layer = order[k];
    const bool is_first = layer.source < 0;
    layers.push_back({data<T>(w[layer.number]),
                      is_first ? data<T>(start) : data<T>(made) + layer.source,
                      data<T>(steep) + layer.at, data<T>(upstream) + layer.at,
                      k + 1 == order.size() ? nullptr : back + layer.at,
                      out<T>(grads[2 + layer.number]), out<T>(grads[1]) + layer.at,
                      is_first ? nullptr : back + layer.source, out<T>(grads[0]), layer.rows,
                      layer.cols});
  }
  const auto stream = current_stream(first);
  launch_runs(layers, [&](const Run<Columns<T>>& run, int64_t blocks) {
    L0K_LAUNCH(chain_gradients<T>, blocks, kThreads, 0, stream, run);
  });
  return grads;
}

// ---- operators ----

std::tuple<Tensor, Tensor> dep_chain(Tensor first, std::vector<Tensor> weights,
                                     std::vector<Tensor> biases, bool reverse) {
  const DeviceGuard guard(first.get_device_index());
  require_biases(weights, biases);
  const auto run = is_double_chain(first) ? chain<double> : chain<float>;
  return run(first, weights, biases, reverse);
}

std::vector<Tensor> dep_chain_backward(Tensor grad, Tensor logits, Tensor slopes, Tensor first,
                                       std::vector<Tensor> weights, bool reverse) {
  const DeviceGuard guard(first.get_device_index());
  require_vectors({grad, logits, slopes}, first, chain_size(weights));
  const auto run = is_double_chain(first) ? chain_backward<double> : chain_backward<float>;
  return run(grad, logits, slopes, first, weights, reverse);
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("dep_chain", TORCH_BOX(&dep_chain));
  m.impl("dep_chain_backward", TORCH_BOX(&dep_chain_backward));
}

}  // namespace l0k
