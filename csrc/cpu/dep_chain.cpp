// SPDX-License-Identifier: Apache-2.0
// dep_chain and its backward pass on the CPU.
#include "common/chain.h"
#include "cpu/common.h"

#include <algorithm>
#include <tuple>

namespace l0k {
namespace {

constexpr int64_t kLanes = 16;           // sums of a row that run side by side
constexpr int64_t kColumns = 64;         // of a task of the backward pass
constexpr int64_t kTaskWeights = 16384;  // weights that are worth a task

// ---- forward ----

template <typename T>
struct Rows {
  const T* weight;
  const T* bias;
  const T* input;
  T* logits;
  T* slopes;
  int64_t cols;
};

template <typename T>
L0K_HD double dot(const T* row, const T* input, int64_t cols) {
  double lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(row[c + lane]) * static_cast<double>(input[c + lane]);
    }
  }
  for (int64_t lane = 0; c < cols; ++c, ++lane) {
    lanes[lane] += static_cast<double>(row[c]) * static_cast<double>(input[c]);
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
L0K_HD void make_rows(const Rows<T>& r, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const double sum = dot(r.weight + row * r.cols, r.input, r.cols);
    chain_law(sum + static_cast<double>(r.bias[row]), r.logits[row], r.slopes[row]);
  }
}

L0K_FOR_EACH_ISA(make_rows_f32, make_rows, (const Rows<float>& r, int64_t begin, int64_t end),
                 (r, begin, end))
L0K_FOR_EACH_ISA(make_rows_f64, make_rows, (const Rows<double>& r, int64_t begin, int64_t end),
                 (r, begin, end))

void run(const Rows<float>& r, int64_t begin, int64_t end) { make_rows_f32(r, begin, end); }
void run(const Rows<double>& r, int64_t begin, int64_t end) { make_rows_f64(r, begin, end); }

template <typename T>
std::tuple<Tensor, Tensor> chain(const Tensor& first, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, bool reverse) {
  const std::vector<ChainLayer> layers = chain_layers(first, weights, reverse);
  const Tensor start = dense(first);
  const Tensor logits = uninitialized(first, {chain_size(weights)});
  const Tensor slopes = uninitialized(first, {logits.size(0)});
  for (const ChainLayer& layer : layers) {
    const Tensor weight = dense(weights[layer.number]);
    const Tensor bias = dense(biases[layer.number]);
    const T* input = layer.source < 0 ? data<T>(start) : data<T>(logits) + layer.source;
    const Rows<T> rows{data<T>(weight), data<T>(bias), input, out<T>(logits) + layer.at,
                       out<T>(slopes) + layer.at, layer.cols};
    const int64_t grain = std::max<int64_t>(1, kTaskWeights / std::max<int64_t>(1, layer.cols));
    torch::stable::parallel_for(0, layer.rows, grain,
                                [&](int64_t begin, int64_t end) { run(rows, begin, end); });
  }
  return {logits, slopes};
}

// ---- backward ----

template <typename T>
struct Columns {
  const T* weight;
  const T* input;
  const double* delta;  // of the rows
  T* grad_weight;
  double* back;  // W^T delta
  int64_t rows;
  int64_t cols;
};

template <typename T>
L0K_HD void add_columns(const Columns<T>& c, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  double input[kColumns];
  double sums[kColumns] = {};
  for (int64_t i = 0; i < count; ++i) input[i] = static_cast<double>(c.input[begin + i]);
  for (int64_t row = 0; row < c.rows; ++row) {
    const T* weight = c.weight + row * c.cols + begin;
    T* grad = c.grad_weight + row * c.cols + begin;
    const double delta = c.delta[row];
    for (int64_t i = 0; i < count; ++i) {
      sums[i] += static_cast<double>(weight[i]) * delta;
      grad[i] = static_cast<T>(delta * input[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) c.back[begin + i] = sums[i];
}

L0K_FOR_EACH_ISA(add_columns_f32, add_columns,
                 (const Columns<float>& c, int64_t begin, int64_t end), (c, begin, end))
L0K_FOR_EACH_ISA(add_columns_f64, add_columns,
                 (const Columns<double>& c, int64_t begin, int64_t end), (c, begin, end))

void run(const Columns<float>& c, int64_t begin, int64_t end) { add_columns_f32(c, begin, end); }
void run(const Columns<double>& c, int64_t begin, int64_t end) { add_columns_f64(c, begin, end); }

template <typename T>
void run_columns(const Columns<T>& columns) {
  const int64_t tasks = (columns.cols + kColumns - 1) / kColumns;
  const int64_t task = kColumns * std::max<int64_t>(1, columns.rows);
  const int64_t grain = std::max<int64_t>(1, kTaskWeights / task);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run(columns, i * kColumns, std::min(columns.cols, (i + 1) * kColumns));
    }
  });
}

template <typename T>
std::vector<Tensor> chain_backward(const Tensor& grad, const Tensor& logits,
                                   const Tensor& slopes, const Tensor& first,
                                   const std::vector<Tensor>& weights, bool reverse) {
  const std::vector<ChainLayer> layers = chain_layers(first, weights, reverse);
  const Tensor start = dense(first);
  const Tensor upstream = dense(grad);
  const Tensor made = dense(logits);
  const Tensor steep = dense(slopes);
  const std::vector<Tensor> grads = new_chain_gradients(logits, first, weights);
  // Of each logit: dL/dlogit, then dL/dsum.
  std::vector<double> delta(made.size(0));
  for (size_t j = 0; j < delta.size(); ++j) delta[j] = static_cast<double>(data<T>(upstream)[j]);
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) {
    for (int64_t j = layer->at; j < layer->at + layer->rows; ++j) {
      delta[j] *= static_cast<double>(data<T>(steep)[j]);
      out<T>(grads[1])[j] = static_cast<T>(delta[j]);
    }
    const Tensor weight = dense(weights[layer->number]);
    const bool is_first = layer->source < 0;
    std::vector<double> back(layer->cols);
    run_columns(Columns<T>{data<T>(weight),
                           is_first ? data<T>(start) : data<T>(made) + layer->source,
                           delta.data() + layer->at, out<T>(grads[2 + layer->number]), back.data(),
                           layer->rows, layer->cols});
    for (int64_t c = 0; c < layer->cols; ++c) {
      if (is_first) {
        out<T>(grads[0])[c] = static_cast<T>(back[c]);
      } else {
        delta[layer->source + c] += back[c];
      }
    }
  }
  return grads;
}

// ---- operators ----

std::tuple<Tensor, Tensor> dep_chain(Tensor first, std::vector<Tensor> weights,
                                     std::vector<Tensor> biases, bool reverse) {
  require_biases(weights, biases);
  const auto run = is_double_chain(first) ? chain<double> : chain<float>;
  return run(first, weights, biases, reverse);
}

std::vector<Tensor> dep_chain_backward(Tensor grad, Tensor logits, Tensor slopes, Tensor first,
                                       std::vector<Tensor> weights, bool reverse) {
  require_vectors({grad, logits, slopes}, first, chain_size(weights));
  const auto run = is_double_chain(first) ? chain_backward<double> : chain_backward<float>;
  return run(grad, logits, slopes, first, weights, reverse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("dep_chain", TORCH_BOX(&dep_chain));
  m.impl("dep_chain_backward", TORCH_BOX(&dep_chain_backward));
}

}  // namespace l0k
