// SPDX-License-Identifier: Apache-2.0
// packed_norm and its backward pass on the CPU.
//
// Activations are seen either as rows of numbers with the channels side by side (channels_last,
// [N, C]) or as planes of one channel each. Rows may be narrow and of any width, so several of them
// make a line, and what belongs to a channel is repeated along the line: all loops run over many
// adjacent numbers. Two sweeps forward (moments, values) and two backward (sums, gradients), each
// reading every number once.
//
// Parts of the values, fixed by the shape, are summed by themselves and then in order, so the
// results have the same bits for every number of threads.
#include "common/batch_norm.h"
#include "common/norm_layout.h"
#include "cpu/common.h"
#include "cpu/numbers.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

namespace l0k {
namespace {

using norm::Geometry;
using norm::kRelu;
using torch::headeronly::ScalarType;

constexpr int64_t kPart = 32768;     // numbers per part of the rows, about
constexpr int64_t kMaxParts = 128;   // of rows
constexpr int64_t kGrain = 32768;    // numbers per task below which threads do not pay
constexpr int64_t kLine = 128;       // numbers that rows are joined to, at least
constexpr int64_t kShiftValues = 8;  // whose mean the others are compared with
constexpr int64_t kLanes = 16;       // sums that a plane is spread over
constexpr int64_t kBlock = 1024;     // numbers of a plane that are asked for at a time
constexpr int64_t kAhead = 2048;     // numbers before they are used

// ---- lines and parts ----

// Rows in a line: whole ones.
int64_t rows_per_line(const Geometry& g) { return (kLine + g.channels - 1) / g.channels; }

struct Division {
  Geometry shape;
  int64_t line;       // numbers; only for rows, like the next
  int64_t part_rows;  // whole lines, but for the last part
  int64_t parts;      // of the values of a channel

  explicit Division(const Geometry& g) : shape(g), line(0), part_rows(0), parts(g.batch) {
    if (!g.rows) return;
    const int64_t rows = rows_per_line(g);
    const int64_t lines = (g.values() + rows - 1) / rows;
    line = rows * g.channels;
    part_rows = std::max(kPart / line + 1, (lines + kMaxParts - 1) / kMaxParts) * rows;
    parts = (g.values() + part_rows - 1) / part_rows;
  }

  int64_t part_values(int64_t part) const {
    return shape.rows ? std::min(part_rows, shape.values() - part * part_rows) : shape.inner;
  }

  // What threads share: parts of rows, or planes.
  int64_t tasks() const { return shape.rows ? parts : parts * shape.channels; }
  int64_t grain() const { return shape.rows ? 1 : std::max<int64_t>(1, kGrain / shape.inner); }
};

// ---- one sweep over the activations ----

struct Sweep {
  Division division;
  const void* x;
  const void* grad;
  void* result;
  bool relu;
  bool training;
  // Of each channel; along a line of rows each is repeated.
  const void *mean, *alpha, *beta, *grad_mean, *slope;
  const uint8_t* open;          // of each channel
  std::vector<int32_t> closed;  // dummies' places in a line of rows
  double* parts;                // [parts, channels, 2]
};

// A constant of each number of a line, or of all numbers of a plane.
template <typename S>
struct Along {
  const S* values;
  L0K_HD Along(const void* all, int64_t) : values(static_cast<const S*>(all)) {}
  L0K_HD S operator[](int64_t i) const { return values[i]; }
};

template <typename S>
struct Same {
  S value;
  L0K_HD Same(const void* all, int64_t channel)
      : value(all == nullptr ? S(0) : static_cast<const S*>(all)[channel]) {}
  L0K_HD S operator[](int64_t) const { return value; }
};

template <typename S, template <typename> class Constant>
struct Constants {
  Constant<S> mean, alpha, beta, grad_mean, slope;

  L0K_HD Constants(const Sweep& sweep, int64_t channel)
      : mean(sweep.mean, channel),
        alpha(sweep.alpha, channel),
        beta(sweep.beta, channel),
        grad_mean(sweep.grad_mean, channel),
        slope(sweep.slope, channel) {}
};

struct Scratch {
  std::vector<double> shift, first, second;
  explicit Scratch(const Sweep& sweep) {
    if (!sweep.division.shape.rows) return;
    for (auto* v : {&shift, &first, &second}) v->resize(sweep.division.line);
  }
};

struct Sums {
  double first, second;
};

// The sums of the lanes, in a fixed order.
L0K_HD Sums folded(double* first, double* second) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      first[lane] += first[lane + half];
      second[lane] += second[lane + half];
    }
  }
  return {first[0], second[0]};
}

// Adds up the sums along a line for each channel and stores them.
template <typename Store>
L0K_HD void store_part(const Sweep& sweep, int64_t part, const Scratch& scratch, Store store) {
  const Geometry& g = sweep.division.shape;
  for (int64_t c = 0; c < g.channels; ++c) {
    Sums sums{0.0, 0.0};
    for (int64_t i = c; i < sweep.division.line; i += g.channels) {
      sums.first += scratch.first[i];
      sums.second += scratch.second[i];
    }
    store(c, sums, sweep.parts + (part * g.channels + c) * 2);
  }
}

// ---- moments ----

// Mean and squared deviations of a part; `share` is that of one value.
L0K_HD void store_moments(double share, double shift, const Sums& sums, double* part) {
  const double mean = sums.first * share;
  const double rest = sums.second - sums.first * mean;
  part[0] = shift + mean;
  part[1] = rest < 0.0 ? 0.0 : rest;
}

// Sums over kRows lines at once: the sums are read and written once for all of them.
template <int kRows, typename X>
L0K_HD void add_moments(const X* __restrict x, int64_t width, int64_t pitch,
                        const double* __restrict shift, double* __restrict sum,
                        double* __restrict squares) {
  for (int64_t i = 0; i < width; ++i) {
    double s = 0, q = 0;
    for (int row = 0; row < kRows; ++row) {
      const double d = static_cast<double>(to_compute(x[row * pitch + i])) - shift[i];
      s += d;
      q += d * d;
    }
    sum[i] += s;
    squares[i] += q;
  }
}

// Sums `count` numbers in lines; the last line may be shorter.
template <typename X>
L0K_HD void sum_moments(const X* x, int64_t count, int64_t line, const double* shift, double* sum,
                        double* squares) {
  for (; count >= 4 * line; count -= 4 * line, x += 4 * line) {
    add_moments<4>(x, line, line, shift, sum, squares);
  }
  for (; count >= line; count -= line, x += line) {
    add_moments<1>(x, line, line, shift, sum, squares);
  }
  add_moments<1>(x, count, line, shift, sum, squares);
}

// The mean of a few rows.
template <typename X>
L0K_HD void find_shift(const X* x, int64_t rows, int64_t channels, int64_t line, double* shift) {
  std::fill_n(shift, channels, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c) {
      shift[c] += static_cast<double>(to_compute(x[row * channels + c]));
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    shift[c] = usable_shift(shift[c] / static_cast<double>(rows));
  }
  for (int64_t i = channels; i < line; ++i) shift[i] = shift[i - channels];
}

template <typename X>
L0K_HD void row_moments(const Sweep& sweep, int64_t part, Scratch& scratch) {
  const Division& division = sweep.division;
  const int64_t channels = division.shape.channels, line = division.line;
  const int64_t rows = division.part_values(part);
  const X* x = static_cast<const X*>(sweep.x) + part * division.part_rows * channels;
  double *shift = scratch.shift.data(), *sum = scratch.first.data();
  double* squares = scratch.second.data();
  find_shift(x, std::min(rows, kShiftValues), channels, line, shift);
  std::fill_n(sum, line, 0.0);
  std::fill_n(squares, line, 0.0);
  sum_moments(x, rows * channels, line, shift, sum, squares);
  const double share = 1.0 / static_cast<double>(rows);
  store_part(sweep, part, scratch, [&](int64_t c, const Sums& sums, double* stored) {
    store_moments(share, shift[c], sums, stored);
  });
}

template <typename X>
L0K_HD void plane_moments(const Sweep& sweep, int64_t plane) {
  const int64_t count = sweep.division.shape.inner;
  const X* x = static_cast<const X*>(sweep.x) + plane * count;
  double shift[kLanes], sum[kLanes] = {}, squares[kLanes] = {};
  find_shift(x, std::min(count, kShiftValues), 1, kLanes, shift);
  sum_moments(x, count, kLanes, shift, sum, squares);
  store_moments(1.0 / static_cast<double>(count), shift[0], folded(sum, squares),
                sweep.parts + plane * 2);
}

template <typename X>
L0K_HD void moments(const Sweep& sweep, int64_t begin, int64_t end, Scratch& scratch) {
  for (int64_t task = begin; task < end; ++task) {
    if (sweep.division.shape.rows) {
      row_moments<X>(sweep, task, scratch);
    } else {
      plane_moments<X>(sweep, task);
    }
  }
}

// ---- values and gradients, number by number ----

template <bool kRectify, typename X, typename K>
L0K_HD void forward_line(const X* __restrict x, const X*, X* __restrict y, int64_t count,
                         const K& k) {
  for (int64_t i = 0; i < count; ++i) {
    const Compute<X> value = normalized(to_compute(x[i]), k.mean[i], k.alpha[i], k.beta[i]);
    y[i] = from_compute<X>(kRectify ? relu(value) : value);
  }
}

// The gradient before the activation.
template <bool kRectify, typename X, typename K>
L0K_HD Compute<X> grad_before(const X* x, const X* grad, int64_t at, int64_t i, const K& k) {
  const Compute<X> g = to_compute(grad[at]);
  if constexpr (!kRectify) return g;
  return kept(passes_relu(normalized(to_compute(x[at]), k.mean[i], k.alpha[i], k.beta[i])), g);
}

template <bool kRectify, bool kTraining, typename X, typename K>
L0K_HD void backward_line(const X* __restrict x, const X* __restrict grad, X* __restrict grad_x,
                          int64_t count, const K& k) {
  using S = Compute<X>;
  for (int64_t i = 0; i < count; ++i) {
    const S g = grad_before<kRectify>(x, grad, i, i, k);
    const S result = kTraining ? norm_grad(g, to_compute(x[i]), k.mean[i], k.alpha[i],
                                           k.grad_mean[i], k.slope[i])
                               : g * k.alpha[i];
    grad_x[i] = from_compute<X>(result);
  }
}

// Compilers for AVX-512 load gradients under ReLU's mask, so only after x has come: with nothing
// asked for earlier, a sweep through memory takes more than twice as long.
template <typename X>
L0K_HD void ask_for(const X* numbers, int64_t count) {
  constexpr int64_t kCacheLine = 64 / static_cast<int64_t>(sizeof(X));
  for (int64_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(numbers + kAhead + i);
}

enum class Value { forward, grad_training, grad_eval };

template <Value kValue, bool kRectify, typename X, typename K>
L0K_HD void value_line(const X* x, const X* grad, X* result, int64_t count, const K& k) {
  if constexpr (kValue == Value::forward) {
    forward_line<kRectify>(x, grad, result, count, k);
  } else {
    if constexpr (kRectify) ask_for(grad, count);
    backward_line<kRectify, kValue == Value::grad_training>(x, grad, result, count, k);
  }
}

template <Value kValue, bool kRectify, typename X, typename K>
L0K_HD void value_plane(const X* x, const X* grad, X* result, int64_t count, const K& k) {
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t numbers = std::min(kBlock, count - i);
    value_line<kValue, kRectify>(x + i, grad + i, result + i, numbers, k);
  }
}

template <Value kValue, bool kRectify, typename X>
L0K_HD void value_tasks(const Sweep& sweep, int64_t begin, int64_t end) {
  using S = Compute<X>;
  const Geometry& g = sweep.division.shape;
  const X* x = static_cast<const X*>(sweep.x);
  const X* grad = kValue == Value::forward ? x : static_cast<const X*>(sweep.grad);
  X* result = static_cast<X*>(sweep.result);
  if (!g.rows) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t channel = plane % g.channels, at = plane * g.inner;
      if (sweep.open[channel] != 0) {
        value_plane<kValue, kRectify>(x + at, grad + at, result + at, g.inner,
                                      Constants<S, Same>(sweep, channel));
      } else {
        std::memset(static_cast<void*>(result + at), 0, g.inner * sizeof(X));
      }
    }
    return;
  }
  const Constants<S, Along> constants(sweep, 0);
  const int64_t line = sweep.division.line;
  const int64_t stop = std::min(end * sweep.division.part_rows * g.channels, g.numbers());
  for (int64_t at = begin * sweep.division.part_rows * g.channels; at < stop; at += line) {
    const int64_t count = std::min(line, stop - at);
    value_line<kValue, kRectify>(x + at, grad + at, result + at, count, constants);
    for (int32_t place : sweep.closed) {
      if (place < count) result[at + place] = X(0.0f);
    }
  }
}

template <bool kRectify, typename X>
L0K_HD void values_of(const Sweep& sweep, int64_t begin, int64_t end) {
  if (sweep.grad == nullptr) {
    value_tasks<Value::forward, kRectify, X>(sweep, begin, end);
  } else if (sweep.training) {
    value_tasks<Value::grad_training, kRectify, X>(sweep, begin, end);
  } else {
    value_tasks<Value::grad_eval, kRectify, X>(sweep, begin, end);
  }
}

template <typename X>
L0K_HD void values(const Sweep& sweep, int64_t begin, int64_t end) {
  if (sweep.relu) {
    values_of<true, X>(sweep, begin, end);
  } else {
    values_of<false, X>(sweep, begin, end);
  }
}

// ---- sums of the backward pass: grad, and grad (x - mean) ----

template <int kRows, bool kRectify, typename X, typename K>
L0K_HD void add_grads(const X* __restrict x, const X* __restrict grad, int64_t width, int64_t pitch,
                      const K& k, double* __restrict sum, double* __restrict products) {
  for (int64_t i = 0; i < width; ++i) {
    double s = 0, p = 0;
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = row * pitch + i;
      const double g = static_cast<double>(grad_before<kRectify>(x, grad, at, i, k));
      s += g;
      p += g * (static_cast<double>(to_compute(x[at])) - static_cast<double>(k.mean[i]));
    }
    sum[i] += s;
    products[i] += p;
  }
}

template <bool kRectify, typename X, typename K>
L0K_HD void sum_grads(const X* x, const X* grad, int64_t count, int64_t line, const K& k,
                      double* sum, double* products) {
  for (; count >= 4 * line; count -= 4 * line, x += 4 * line, grad += 4 * line) {
    if constexpr (kRectify) ask_for(grad, 4 * line);
    add_grads<4, kRectify>(x, grad, line, line, k, sum, products);
  }
  for (; count >= line; count -= line, x += line, grad += line) {
    add_grads<1, kRectify>(x, grad, line, line, k, sum, products);
  }
  add_grads<1, kRectify>(x, grad, count, line, k, sum, products);
}

template <bool kRectify, typename X>
L0K_HD void row_grads(const Sweep& sweep, int64_t part, Scratch& scratch) {
  const Division& division = sweep.division;
  const int64_t channels = division.shape.channels, line = division.line;
  const int64_t start = part * division.part_rows * channels;
  double *sum = scratch.first.data(), *products = scratch.second.data();
  std::fill_n(sum, line, 0.0);
  std::fill_n(products, line, 0.0);
  sum_grads<kRectify>(static_cast<const X*>(sweep.x) + start,
                      static_cast<const X*>(sweep.grad) + start,
                      division.part_values(part) * channels, line,
                      Constants<Compute<X>, Along>(sweep, 0), sum, products);
  store_part(sweep, part, scratch, [](int64_t, const Sums& sums, double* stored) {
    stored[0] = sums.first;
    stored[1] = sums.second;
  });
}

template <bool kRectify, typename X>
L0K_HD void plane_grads(const Sweep& sweep, int64_t plane) {
  const Geometry& g = sweep.division.shape;
  double sum[kLanes] = {}, products[kLanes] = {};
  sum_grads<kRectify>(static_cast<const X*>(sweep.x) + plane * g.inner,
                      static_cast<const X*>(sweep.grad) + plane * g.inner, g.inner, kLanes,
                      Constants<Compute<X>, Same>(sweep, plane % g.channels), sum, products);
  const Sums sums = folded(sum, products);
  sweep.parts[plane * 2] = sums.first;
  sweep.parts[plane * 2 + 1] = sums.second;
}

template <bool kRectify, typename X>
L0K_HD void grads_of(const Sweep& sweep, int64_t begin, int64_t end, Scratch& scratch) {
  for (int64_t task = begin; task < end; ++task) {
    if (sweep.division.shape.rows) {
      row_grads<kRectify, X>(sweep, task, scratch);
    } else {
      plane_grads<kRectify, X>(sweep, task);
    }
  }
}

template <typename X>
L0K_HD void grads(const Sweep& sweep, int64_t begin, int64_t end, Scratch& scratch) {
  if (sweep.relu) {
    grads_of<true, X>(sweep, begin, end, scratch);
  } else {
    grads_of<false, X>(sweep, begin, end, scratch);
  }
}

// ---- one set of functions for each dtype, compiled for several instruction sets ----

#define L0K_DTYPES(X) X(f64, double) X(f32, float) X(bf16, BFloat16) X(f16, Half)

#define L0K_INSTANCE(name, X)                                                                    \
  L0K_FOR_EACH_ISA(moments_##name, (moments<X>),                                                 \
                   (const Sweep& sweep, int64_t begin, int64_t end, Scratch& scratch),           \
                   (sweep, begin, end, scratch))                                                 \
  L0K_FOR_EACH_ISA(values_##name, (values<X>), (const Sweep& sweep, int64_t begin, int64_t end), \
                   (sweep, begin, end))                                                          \
  L0K_FOR_EACH_ISA(grads_##name, (grads<X>),                                                     \
                   (const Sweep& sweep, int64_t begin, int64_t end, Scratch& scratch),           \
                   (sweep, begin, end, scratch))
L0K_DTYPES(L0K_INSTANCE)

template <typename T>
constexpr ScalarType type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
}

struct Kernels {
  void (*moments)(const Sweep&, int64_t, int64_t, Scratch&);
  void (*values)(const Sweep&, int64_t, int64_t);
  void (*grads)(const Sweep&, int64_t, int64_t, Scratch&);
};

Kernels kernels_for(ScalarType type) {
#define L0K_CHOOSE(name, X) \
  if (type == type_of<X>()) return {moments_##name, values_##name, grads_##name};
  L0K_DTYPES(L0K_CHOOSE)
#undef L0K_CHOOSE
  require(false, "packed_norm: no kernel for this dtype");
  return {};
}

template <typename Run>
void in_parallel(const Division& division, const Run& run) {
  torch::stable::parallel_for(0, division.tasks(), division.grain(), run);
}

void run_reduction(void (*kernel)(const Sweep&, int64_t, int64_t, Scratch&), const Sweep& sweep) {
  in_parallel(sweep.division, [&](int64_t begin, int64_t end) {
    Scratch scratch(sweep);
    kernel(sweep, begin, end, scratch);
  });
}

// ---- features ----

// A vector of any strides and of the dtype of x or float32, read and written as float64.
class Vector {
 public:
  Vector() = default;
  static Vector read(const std::optional<Tensor>& t) {
    return t ? Vector(*t, const_cast<void*>(t->const_data_ptr())) : Vector();
  }
  static Vector written(const std::optional<Tensor>& t) {
    return t ? Vector(*t, t->mutable_data_ptr()) : Vector();
  }

  bool defined() const { return data_ != nullptr; }

  double get(int64_t i) const {
#define L0K_READ(name, T) \
  if (type_ == type_of<T>()) return static_cast<Compute<T>>(static_cast<T*>(data_)[i * stride_]);
    L0K_DTYPES(L0K_READ)
#undef L0K_READ
    return 0.0;
  }

  void set(int64_t i, double value) const {
#define L0K_WRITE(name, T)                                                          \
  if (type_ == type_of<T>()) {                                                      \
    static_cast<T*>(data_)[i * stride_] = static_cast<T>(static_cast<Compute<T>>(value)); \
  }
    L0K_DTYPES(L0K_WRITE)
#undef L0K_WRITE
  }

 private:
  Vector(const Tensor& t, void* data)
      : tensor_(t), data_(data), stride_(t.stride(0)), type_(t.scalar_type()) {}

  Tensor tensor_;
  void* data_ = nullptr;
  int64_t stride_ = 0;
  ScalarType type_ = ScalarType::Double;
};

// The features of the packed channels, and which of them are open.
struct Features {
  std::vector<int64_t> full;
  std::vector<uint8_t> open;
};

template <typename S>
void find_open(const Tensor& z, const int64_t* gates, int64_t width, Features& features) {
  const S* values = data<S>(z);
  const int64_t count = z.size(0);
  for (size_t c = 0; c < features.full.size(); ++c) {
    const int64_t a = gates[features.full[c]], b = gates[width + features.full[c]];
    const bool within = a >= 0 && a < count && b >= 0 && b < count;
    require(within, "map: expected gates from 0 to ", count - 1);
    features.open[c] = values[a] * values[b] != S(0);
  }
}

Features features_of(const Tensor& index, const Tensor& z, const Tensor& map) {
  const Tensor places = dense(index), gates = dense(map), values = dense(z);
  const int64_t* from = data<int64_t>(places);
  const int64_t width = map.size(1);
  Features features{std::vector<int64_t>(from, from + index.size(0)),
                    std::vector<uint8_t>(index.size(0))};
  std::vector<uint8_t> seen(width, 0);
  for (int64_t feature : features.full) {
    require(feature >= 0 && feature < width, "index: expected indices from 0 to ", width - 1);
    require(!seen[feature], "index: expected distinct indices");
    seen[feature] = 1;
  }
  if (z.scalar_type() == ScalarType::Double) {
    find_open<double>(values, data<int64_t>(gates), width, features);
  } else {
    find_open<float>(values, data<int64_t>(gates), width, features);
  }
  return features;
}

// ---- constants ----

// Of each packed channel; dummies have zeros.
template <typename S>
using Channels = std::vector<NormConstants<S>>;

template <typename S>
NormConstants<S> make_channel(double mean, S rstd, int64_t feature, const Vector& weight,
                              const Vector& bias) {
  return norm_constants<S>(mean, rstd,
                           weight.defined() ? static_cast<S>(weight.get(feature)) : S(1),
                           bias.defined() ? static_cast<S>(bias.get(feature)) : S(0));
}

// The same, for each number of a line of rows, or as they are for planes.
template <typename S>
struct Lines {
  std::vector<S> mean, alpha, beta, grad_mean, slope;

  Lines(const Channels<S>& channels, const Division& division) {
    const size_t count = channels.size();
    const size_t numbers = division.shape.rows ? division.line : count;
    for (auto* v : {&mean, &alpha, &beta, &grad_mean, &slope}) v->resize(numbers);
    for (size_t i = 0; i < numbers; ++i) {
      const NormConstants<S>& channel = channels[i % count];
      mean[i] = channel.mean;
      alpha[i] = channel.alpha;
      beta[i] = channel.beta;
      grad_mean[i] = channel.grad_mean;
      slope[i] = channel.slope;
    }
  }

  void use_for(Sweep& sweep) const {
    sweep.mean = mean.data();
    sweep.alpha = alpha.data();
    sweep.beta = beta.data();
    sweep.grad_mean = grad_mean.data();
    sweep.slope = slope.data();
  }
};

template <typename S>
void run_values(const Kernels& kernels, Sweep& sweep, const Channels<S>& channels) {
  const Lines<S> lines(channels, sweep.division);
  lines.use_for(sweep);
  in_parallel(sweep.division,
              [&](int64_t begin, int64_t end) { kernels.values(sweep, begin, end); });
}

Sweep make_sweep(const Geometry& g, const Tensor& x, const Features& features, int64_t activation,
                 bool training) {
  require(norm::is_known(activation), "packed_norm: expected activation 0 or 1, got ", activation);
  Sweep sweep{Division(g)};
  sweep.x = x.const_data_ptr();
  sweep.relu = activation == kRelu;
  sweep.training = training;
  sweep.open = features.open.data();
  for (int64_t i = 0; i < sweep.division.line; ++i) {
    if (!features.open[i % g.channels]) sweep.closed.push_back(static_cast<int32_t>(i));
  }
  return sweep;
}

// ---- operators ----

// Of every channel.
std::vector<MomentSums> merged_moments(const Division& division, const std::vector<double>& parts) {
  std::vector<MomentSums> all(division.shape.channels);
  const double* stored = parts.data();
  for (size_t c = 0; c < all.size(); ++c) all[c] = {usable_shift(stored[c * 2]), 0.0, 0.0, 0.0};
  for (int64_t part = 0; part < division.parts; ++part) {
    const double values = static_cast<double>(division.part_values(part));
    for (MomentSums& channel : all) {
      channel.add(values, stored[0], stored[1]);
      stored += 2;
    }
  }
  return all;
}

std::vector<GradSums> merged_sums(const Division& division, const std::vector<double>& parts) {
  std::vector<GradSums> all(division.shape.channels, {0.0, 0.0});
  const double* stored = parts.data();
  for (int64_t part = 0; part < division.parts; ++part) {
    for (GradSums& channel : all) {
      channel.grad += stored[0];
      channel.product += stored[1];
      stored += 2;
    }
  }
  return all;
}

struct Statistics {
  Vector weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps;
};

// Mean and reciprocal deviation of every open channel; updates the running statistics.
template <typename S>
void find_statistics(const Statistics& from, const Division& division,
                     const std::vector<double>& parts, const Features& features, double* mean,
                     S* rstd) {
  const double n = static_cast<double>(division.shape.values());
  std::vector<MomentSums> moments;
  if (from.training) moments = merged_moments(division, parts);
  for (size_t c = 0; c < features.full.size(); ++c) {
    mean[c] = 0.0;
    rstd[c] = S(0);
    if (!features.open[c]) continue;
    const int64_t f = features.full[c];
    if (!from.training) {
      mean[c] = from.running_mean.get(f);
      rstd[c] = static_cast<S>(reciprocal_deviation(from.running_var.get(f), from.eps));
      continue;
    }
    const double deviations = moments[c].deviations();
    mean[c] = moments[c].mean();
    rstd[c] = static_cast<S>(reciprocal_deviation(deviations / n, from.eps));
    if (!from.running_mean.defined()) continue;
    const double m = from.momentum;
    from.running_mean.set(f, running_average(from.running_mean.get(f), mean[c], m));
    from.running_var.set(f, running_average(from.running_var.get(f), deviations / (n - 1.0), m));
  }
}

template <typename S>
Channels<S> make_channels(const Features& features, const double* mean, const S* rstd,
                          const Vector& weight, const Vector& bias) {
  Channels<S> channels(features.full.size());
  for (size_t c = 0; c < channels.size(); ++c) {
    if (!features.open[c]) continue;
    channels[c] = make_channel(mean[c], rstd[c], features.full[c], weight, bias);
  }
  return channels;
}

template <typename S>
void run_forward(Sweep& sweep, const Statistics& from, const Features& features, const Tensor& x,
                 double* mean, S* rstd) {
  const Kernels kernels = kernels_for(x.scalar_type());
  const int64_t channels = sweep.division.shape.channels;
  std::vector<double> parts(from.training ? sweep.division.parts * channels * 2 : 0);
  sweep.parts = parts.data();
  if (from.training) run_reduction(kernels.moments, sweep);
  find_statistics(from, sweep.division, parts, features, mean, rstd);
  run_values(kernels, sweep, make_channels(features, mean, rstd, from.weight, from.bias));
}

std::tuple<Tensor, Tensor, Tensor> packed_norm(
    Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var, Tensor index, Tensor z,
    Tensor map, bool training, double momentum, double eps, int64_t activation) {
  const bool channels_last = norm::is_channels_last(x);
  const Tensor dense_x = norm::with_layout(x, channels_last);
  const Geometry g = norm::geometry_of(x, channels_last);
  const Tensor y = norm::empty_like(x, channels_last);
  Tensor mean = torch::stable::new_empty(z, {g.channels}, ScalarType::Double);
  Tensor rstd = uninitialized(z, {g.channels});
  if (g.numbers() == 0) return {y, torch::stable::zero_(mean), torch::stable::zero_(rstd)};
  const Features features = features_of(index, z, map);
  // In eval mode nothing is written, and the running statistics may be shared.
  const auto running = training ? Vector::written : Vector::read;
  const Statistics from{Vector::read(weight), Vector::read(bias), running(running_mean),
                        running(running_var), training,           momentum,
                        eps};
  require(training || from.running_mean.defined(),
          "packed_norm: expected running statistics where training is false");
  Sweep sweep = make_sweep(g, dense_x, features, activation, training);
  sweep.result = y.mutable_data_ptr();
  if (x.scalar_type() == ScalarType::Double) {
    run_forward(sweep, from, features, x, out<double>(mean), out<double>(rstd));
  } else {
    run_forward(sweep, from, features, x, out<double>(mean), out<float>(rstd));
  }
  return {y, mean, rstd};
}

struct Gradients {
  Tensor x;             // undefined: not wanted
  Vector weight, bias;  // likewise; zeros
};

// The parameters' gradients, and what the gradient of x needs of the sums.
template <typename S>
void finish_sums(const Sweep& sweep, const std::vector<double>& parts, const Features& features,
                 const double* mean, const S* rstd, const Gradients& gradients,
                 Channels<S>& channels) {
  const double n = static_cast<double>(sweep.division.shape.values());
  const std::vector<GradSums> all = merged_sums(sweep.division, parts);
  for (size_t c = 0; c < all.size(); ++c) {
    if (!features.open[c]) continue;
    const GradSums sums = with_all_digits<S>(all[c], mean[c]);
    const int64_t f = features.full[c];
    const double scale = static_cast<double>(rstd[c]);
    if (gradients.weight.defined()) gradients.weight.set(f, sums.product * scale);
    if (gradients.bias.defined()) gradients.bias.set(f, sums.grad);
    use_sums(channels[c], sums, n, mean[c], rstd[c]);
  }
}

template <typename S>
void run_backward(Sweep& sweep, const Features& features, const Tensor& x, const Vector& weight,
                  const Vector& bias, const double* mean, const S* rstd,
                  const Gradients& gradients) {
  const Kernels kernels = kernels_for(x.scalar_type());
  Channels<S> channels = make_channels(features, mean, rstd, weight, bias);
  const bool of_parameters = gradients.weight.defined() || gradients.bias.defined();
  if (of_parameters || (sweep.training && gradients.x.defined())) {
    const Lines<S> lines(channels, sweep.division);
    lines.use_for(sweep);
    std::vector<double> parts(sweep.division.parts * sweep.division.shape.channels * 2);
    sweep.parts = parts.data();
    run_reduction(kernels.grads, sweep);
    finish_sums(sweep, parts, features, mean, rstd, gradients, channels);
  }
  if (!gradients.x.defined()) return;
  sweep.result = gradients.x.mutable_data_ptr();
  run_values(kernels, sweep, channels);
}

Tensor zeros_or_nothing(const std::optional<Tensor>& like, bool wanted, const Tensor& x) {
  if (!wanted || !like) return norm::nothing(x);
  Tensor zeros = uninitialized(*like, {like->size(0)});
  return torch::stable::zero_(zeros);
}

std::tuple<Tensor, Tensor, Tensor> packed_norm_backward(
    Tensor grad, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean,
    Tensor rstd, Tensor index, Tensor z, Tensor map, bool training, int64_t activation,
    bool need_x, bool need_weight, bool need_bias) {
  const bool channels_last = norm::is_channels_last(x);
  const Geometry g = norm::geometry_of(x, channels_last);
  const Tensor grad_x = need_x ? norm::empty_like(x, channels_last) : norm::nothing(x);
  const Tensor grad_weight = zeros_or_nothing(weight, need_weight, x);
  const Tensor grad_bias = zeros_or_nothing(bias, need_bias, x);
  if (g.numbers() == 0) return {grad_x, grad_weight, grad_bias};
  const Tensor dense_x = norm::with_layout(x, channels_last);
  const Tensor dense_grad = norm::with_layout(grad, channels_last);
  const Features features = features_of(index, z, map);
  Sweep sweep = make_sweep(g, dense_x, features, activation, training);
  sweep.grad = dense_grad.const_data_ptr();
  const auto written = [](const Tensor& grad, bool wanted) {
    return wanted ? Vector::written(grad) : Vector();
  };
  const Gradients gradients{need_x ? grad_x : Tensor(), written(grad_weight, need_weight && weight),
                            written(grad_bias, need_bias && bias)};
  const Tensor means = dense(mean), rstds = dense(rstd);
  const Vector w = Vector::read(weight), b = Vector::read(bias);
  if (x.scalar_type() == ScalarType::Double) {
    run_backward(sweep, features, x, w, b, data<double>(means), data<double>(rstds), gradients);
  } else {
    run_backward(sweep, features, x, w, b, data<double>(means), data<float>(rstds), gradients);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("packed_norm", TORCH_BOX(&packed_norm));
  m.impl("packed_norm_backward", TORCH_BOX(&packed_norm_backward));
}

}  // namespace l0k
