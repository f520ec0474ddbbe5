// SPDX-License-Identifier: Apache-2.0
// packed_norm and its backward pass on NVIDIA GPUs.
//
// Three launches each way: sums over chunks of the batch, what follows from them for each channel,
// then the values. Memory is the limit, so everything but the sums' last step is 16 bytes at a time.
//
// Rows (channels side by side) may have any width. As many of them as fill whole 16-byte vectors
// make a period: a thread that goes from period to period stays with the same channels and keeps
// their constants in registers. A last incomplete period is left to the kernels that finish sums.
//
// Planes (one channel each) may start anywhere in a vector, so threads go along the vectors that a
// plane touches and leave the numbers of other planes alone.
//
// A thread sums a few numbers in float32 and adds that to its sums in float64; blocks and chunks
// are added in an order that the shape alone decides.
#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/batch_norm.h"
#include "common/norm_layout.h"
#include "cuda/common.cuh"

namespace l0k {
namespace {

using norm::Geometry;
using torch::headeronly::ScalarType;

constexpr int kThreads = 256;
constexpr int64_t kSumBlocks = 264;    // two for each multiprocessor of an H200
constexpr int64_t kValueBlocks = 1056;
constexpr int kUnroll = 4;             // vectors that a thread asks for before it uses the first
constexpr int kFinishChannels = 8;     // of a block that finishes sums
constexpr int kFinishWorkers = kThreads / kFinishChannels;  // for each of them

// What is computed in.
template <typename X>
using Compute = std::conditional_t<std::is_same_v<X, double>, double, float>;

template <typename X>
constexpr int kVector = 16 / static_cast<int>(sizeof(X));

template <typename X>
L0K_DEVICE Compute<X> to_compute(X number) {
  if constexpr (std::is_same_v<X, double>) {
    return number;
  } else {
    return to_float(number);
  }
}

template <typename X>
L0K_DEVICE X from_compute(Compute<X> number) {
  if constexpr (std::is_same_v<X, double>) {
    return number;
  } else {
    return from_float<X>(number);
  }
}

// ---- who does what ----

struct Rows {
  int64_t channels;
  int64_t lanes;          // numbers of a period: whole rows, whole vectors
  int64_t periods;        // complete ones
  int64_t chunk_periods;  // of a block
  int64_t end;            // numbers in all
  int tile;               // vectors of each period that a block takes
  int tiles;
  int side_by_side;  // periods that a block takes at once

  __host__ __device__ int64_t tail() const { return periods * lanes; }
};

// The place of a thread among rows.
template <typename X>
struct RowPlace {
  int64_t lane;         // the first of its vector, in the period
  int64_t first, stop;  // periods
  int step;
  bool active;

  L0K_DEVICE explicit RowPlace(const Rows& rows) {
    const int side = static_cast<int>(threadIdx.x) / rows.tile;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * rows.tile + threadIdx.x % rows.tile;
    const int64_t start = blockIdx.y * rows.chunk_periods;
    lane = column * kVector<X>;
    step = rows.side_by_side;
    active = side < step && lane < rows.lanes;
    first = start + side;
    stop = active ? min(start + rows.chunk_periods, rows.periods) : 0;
  }
};

struct Planes {
  int64_t batch, channels, inner;
  int64_t vectors;  // that a plane touches, at most
  int64_t chunk_batch;
  int64_t end;  // numbers in all
};

// The vectors of a channel's planes, in steps of a block.
template <typename X>
struct PlaneCursor {
  const Planes& planes;
  int64_t samples, vectors;  // that a step is long
  int64_t sample, stop;
  int64_t vector;  // of the plane

  L0K_DEVICE explicit PlaneCursor(const Planes& p)
      : planes(p),
        samples(kThreads / p.vectors),
        vectors(kThreads % p.vectors),
        sample(blockIdx.y * p.chunk_batch + threadIdx.x / p.vectors),
        stop(min((blockIdx.y + 1) * p.chunk_batch, p.batch)),
        vector(threadIdx.x % p.vectors) {}

  L0K_DEVICE bool done() const { return sample >= stop; }

  L0K_DEVICE void advance() {
    sample += samples;
    vector += vectors;
    if (vector >= planes.vectors) {
      vector -= planes.vectors;
      ++sample;
    }
  }
};

// Numbers `begin` to `end` of the vector that starts at `at`.
struct Span {
  int64_t at;
  int begin, end;
};

template <typename X>
L0K_DEVICE Span span_of(const PlaneCursor<X>& cursor) {
  const Planes& p = cursor.planes;
  if (cursor.done()) return {0, 0, 0};
  const int64_t start = (cursor.sample * p.channels + blockIdx.x) * p.inner;
  const int64_t at = (start / kVector<X> + cursor.vector) * kVector<X>;
  const int64_t begin = max(start - at, int64_t{0});
  const int64_t end = min(start + p.inner - at, int64_t{kVector<X>});
  return {at, static_cast<int>(begin), static_cast<int>(max(end, begin))};
}

template <typename X>
L0K_DEVICE Vector16<X> load_span(const X* numbers, const Span& span, int64_t end) {
  Vector16<X> vector{};
  if (span.begin >= span.end) return vector;
  if (span.at + kVector<X> <= end) return load16(numbers + span.at);
#pragma unroll
  for (int l = 0; l < kVector<X>; ++l) {
    if (l >= span.begin && l < span.end) vector[l] = numbers[span.at + l];
  }
  return vector;
}

template <typename X>
L0K_DEVICE void store_span(X* numbers, const Span& span, const Vector16<X>& vector) {
  if (span.begin == 0 && span.end == kVector<X>) {
    store16(numbers + span.at, vector);
    return;
  }
#pragma unroll
  for (int l = 0; l < kVector<X>; ++l) {
    if (l >= span.begin && l < span.end) numbers[span.at + l] = vector[l];
  }
}

// ---- channels ----

// A parameter, in x's dtype or in float32.
template <typename X>
struct Parameter {
  const void* numbers;  // null: absent
  bool is_float;

  L0K_DEVICE Compute<X> get(int64_t i, Compute<X> otherwise) const {
    if (numbers == nullptr) return otherwise;
    return is_float ? static_cast<Compute<X>>(static_cast<const float*>(numbers)[i])
                    : to_compute(static_cast<const X*>(numbers)[i]);
  }
};

// A buffer or a gradient of a parameter.
template <typename X>
struct Written {
  void* numbers;  // null: absent
  int64_t stride;
  bool is_float;

  L0K_DEVICE double get(int64_t i) const {
    return is_float ? static_cast<double>(static_cast<float*>(numbers)[i * stride])
                    : static_cast<double>(to_compute(static_cast<X*>(numbers)[i * stride]));
  }

  L0K_DEVICE void set(int64_t i, double value) const {
    const Compute<X> rounded = static_cast<Compute<X>>(value);
    if (is_float) {
      static_cast<float*>(numbers)[i * stride] = static_cast<float>(rounded);
    } else {
      static_cast<X*>(numbers)[i * stride] = from_compute<X>(rounded);
    }
  }
};

template <typename X>
struct Features {
  const int64_t* index;  // packed -> full
  const int64_t* map;    // [2, full]
  int64_t full;
  const Compute<X>* z;
  Parameter<X> weight, bias;

  L0K_DEVICE bool is_open(int64_t feature) const {
    return z[map[feature]] * z[map[full + feature]] != Compute<X>(0);
  }
};

// What turns a channel's numbers into results; zeros for dummies.
template <typename S>
struct Channel : NormConstants<S> {
  int open;
};

template <typename X>
L0K_DEVICE Channel<Compute<X>> make_channel(const Features<X>& features, int64_t feature,
                                            double mean, Compute<X> rstd) {
  using S = Compute<X>;
  const S weight = features.weight.get(feature, S(1));
  return {norm_constants<S>(mean, rstd, weight, features.bias.get(feature, S(0))), 1};
}

// ---- sums of a block ----

template <int V>
struct LaneSums {
  double first[V];
  double second[V];
};

// Adds the sums of all threads that share a channel and hands each total to store(slot, totals).
// Slots are channels if the block has whole periods, else lanes of its tile. All threads call it.
template <int V, typename Store>
L0K_DEVICE void reduce_rows(const Rows& rows, const LaneSums<V>& mine, const Store& store) {
  L0K_SHARED(double, first, [V * kThreads]);
  L0K_SHARED(double, second, [V * kThreads]);
  const int thread = threadIdx.x;
  const int side = thread / rows.tile;
#pragma unroll
  for (int l = 0; l < V; ++l) {
    first[l * kThreads + thread] = mine.first[l];
    second[l * kThreads + thread] = mine.second[l];
  }
  for (int left = rows.side_by_side; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (side < left - half) {
      const int other = thread + half * rows.tile;
#pragma unroll
      for (int l = 0; l < V; ++l) {
        first[l * kThreads + thread] += first[l * kThreads + other];
        second[l * kThreads + thread] += second[l * kThreads + other];
      }
    }
    left = half;
  }
  __syncthreads();
  const int64_t tile_lane = static_cast<int64_t>(blockIdx.x) * rows.tile * V;
  const int lanes = static_cast<int>(min(rows.lanes - tile_lane, int64_t{rows.tile} * V));
  const int slots = rows.tiles == 1 ? static_cast<int>(rows.channels) : lanes;
  for (int slot = thread; slot < slots; slot += kThreads) {
    double totals[2] = {0.0, 0.0};
    for (int lane = slot; lane < lanes; lane += slots) {
      totals[0] += first[lane % V * kThreads + lane / V];
      totals[1] += second[lane % V * kThreads + lane / V];
    }
    store(slot, totals);
  }
}

// Where a block of rows stores the sums of a slot: [chunks, slots of all tiles, 2].
L0K_DEVICE double* stored_at(const Rows& rows, int V, double* sums, int slot) {
  const int64_t slots = rows.tiles == 1 ? rows.channels : rows.lanes;
  return sums + 2 * (blockIdx.y * slots + static_cast<int64_t>(blockIdx.x) * rows.tile * V + slot);
}

// The sum over the block, in thread 0; the barriers let it be called again.
L0K_DEVICE double block_sum(double value) {
  L0K_SHARED(double, warps, [kThreads / 32]);
  const double of_warp = warp_sum(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = of_warp;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warps[warp];
  }
  __syncthreads();
  return sum;
}

// ---- moments ----

// Numbers that a thread has summed: differences from its own shift.
template <typename S>
struct ShiftedSum {
  double count, first, second;

  // As differences from another shift.
  L0K_DEVICE void rebase(S from, S to) {
    if (count == 0.0) return;
    const double by = static_cast<double>(from) - static_cast<double>(to);
    second += by * (2.0 * first + count * by);
    first += count * by;
  }
};

L0K_DEVICE void store_moments(double* stored, double shift, double count, double first,
                              double second) {
  const MomentSums moments{shift, count, first, second};
  stored[0] = moments.mean();
  stored[1] = moments.deviations();
}

template <typename X>
struct MomentsOfRows {
  Rows rows;
  const X* x;
  double* sums;
};

template <typename X>
__global__ void L0K_BOUNDS(kThreads, 2) row_moments(const MomentsOfRows<X> p) {
  using S = Compute<X>;
  constexpr int V = kVector<X>;
  L0K_SHARED(S, shifts, [V * kThreads]);
  const RowPlace<X> place(p.rows);
  S shift[V] = {};
  LaneSums<V> sums{};
  int64_t count = 0;
  for (int64_t period = place.first; period < place.stop; period += kUnroll * place.step) {
    Vector16<X> loaded[kUnroll];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = period + u * place.step;
      if (at >= place.stop) continue;
      loaded[u] = load16(p.x + at * p.rows.lanes + place.lane);
      valid = u + 1;
    }
#pragma unroll
    for (int l = 0; l < V; ++l) {
      if (count == 0) {  // the first few numbers' mean
        S sum = S(0);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (u < valid) sum += to_compute(loaded[u][l]);
        }
        shift[l] = static_cast<S>(usable_shift(static_cast<double>(sum / static_cast<S>(valid))));
      }
      S first = S(0), second = S(0);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u >= valid) continue;
        const S difference = to_compute(loaded[u][l]) - shift[l];
        first += difference;
        second += difference * difference;
      }
      sums.first[l] += static_cast<double>(first);
      sums.second[l] += static_cast<double>(second);
    }
    count += valid;
  }

  // One shift for every channel of the block: that of the threads with its first period.
  const int tile_lane = static_cast<int>(threadIdx.x) % p.rows.tile * V;
  const bool has_first = place.active && threadIdx.x < static_cast<unsigned>(p.rows.tile);
  if (has_first) {
#pragma unroll
    for (int l = 0; l < V; ++l) shifts[tile_lane + l] = shift[l];
  }
  __syncthreads();
  const int repeat = p.rows.tiles == 1 ? static_cast<int>(p.rows.channels) : V * kThreads;
  if (place.active) {
#pragma unroll
    for (int l = 0; l < V; ++l) {
      ShiftedSum<S> sum{static_cast<double>(count), sums.first[l], sums.second[l]};
      sum.rebase(shift[l], shifts[(tile_lane + l) % repeat]);
      sums.first[l] = sum.first;
      sums.second[l] = sum.second;
    }
  }
  const int64_t start = blockIdx.y * p.rows.chunk_periods;
  const int64_t periods = min(p.rows.chunk_periods, p.rows.periods - start);
  const int64_t replicas = p.rows.tiles == 1 ? p.rows.lanes / p.rows.channels : 1;
  reduce_rows<V>(p.rows, sums, [&](int slot, const double(&totals)[2]) {
    store_moments(stored_at(p.rows, V, p.sums, slot), static_cast<double>(shifts[slot]),
                  static_cast<double>(periods * replicas), totals[0], totals[1]);
  });
}

template <typename X>
struct MomentsOfPlanes {
  Planes planes;
  const X* x;
  double* sums;
};

template <typename X>
__global__ void L0K_BOUNDS(kThreads, 2) plane_moments(const MomentsOfPlanes<X> p) {
  using S = Compute<X>;
  constexpr int V = kVector<X>;
  L0K_SHARED(S, block_shift);
  S shift = S(0);
  ShiftedSum<S> sum{};
  for (PlaneCursor<X> cursor(p.planes); !cursor.done();) {
    Vector16<X> loaded[kUnroll];
    Span spans[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, cursor.advance()) {
      spans[u] = span_of(cursor);
      loaded[u] = load_span(p.x, spans[u], p.planes.end);
    }
    int valid = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) valid += spans[u].end - spans[u].begin;
    if (sum.count == 0.0 && valid > 0) {
      S total = S(0);
#pragma unroll
      for (int i = 0; i < kUnroll * V; ++i) {
        const Span& span = spans[i / V];
        if (i % V >= span.begin && i % V < span.end) total += to_compute(loaded[i / V][i % V]);
      }
      shift = static_cast<S>(usable_shift(static_cast<double>(total / static_cast<S>(valid))));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      S first = S(0), second = S(0);
#pragma unroll
      for (int l = 0; l < V; ++l) {
        if (l < spans[u].begin || l >= spans[u].end) continue;
        const S difference = to_compute(loaded[u][l]) - shift;
        first += difference;
        second += difference * difference;
      }
      sum.first += static_cast<double>(first);
      sum.second += static_cast<double>(second);
    }
    sum.count += static_cast<double>(valid);
  }
  if (threadIdx.x == 0) block_shift = shift;  // it has the first vector
  __syncthreads();
  sum.rebase(shift, block_shift);
  const double first = block_sum(sum.first);
  const double second = block_sum(sum.second);
  if (threadIdx.x != 0) return;
  const int64_t start = blockIdx.y * p.planes.chunk_batch;
  const int64_t samples = min(p.planes.chunk_batch, p.planes.batch - start);
  store_moments(p.sums + 2 * (blockIdx.y * p.planes.channels + blockIdx.x),
                static_cast<double>(shift), static_cast<double>(samples * p.planes.inner), first,
                second);
}

// ---- what follows for each channel ----

// The chunks' sums, [chunks, slots, 2]; slots repeat the channels.
struct Parts {
  const double* sums;
  int64_t channels, chunks, slots;
  double chunk_values, last_values;  // of a slot
  int64_t tail, end;                 // numbers, whole rows, that no chunk has

  L0K_DEVICE int64_t items() const { return chunks * (slots / channels); }
  L0K_DEVICE const double* item(int64_t i, int64_t channel) const {
    const int64_t repeats = slots / channels;
    return sums + 2 * (i / repeats * slots + i % repeats * channels + channel);
  }
  L0K_DEVICE double values(int64_t i) const {
    return i / (slots / channels) + 1 < chunks ? chunk_values : last_values;
  }
};

// Channel and worker of a thread; the threads of a channel add up for worker 0.
struct FinishPlace {
  int64_t channel;
  int worker;

  L0K_DEVICE FinishPlace()
      : channel(static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x % kFinishChannels),
        worker(threadIdx.x / kFinishChannels) {}
};

template <int kCount>
L0K_DEVICE void add_workers(double (&values)[kCount]) {
  L0K_SHARED(double, all, [kCount][kThreads]);
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) all[i][thread] = values[i];
  for (int half = kThreads / 2; half >= kFinishChannels; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
#pragma unroll
    for (int i = 0; i < kCount; ++i) all[i][thread] += all[i][thread + half];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = all[i][thread];
}

template <typename X>
struct FinishMoments {
  Parts parts;
  const X* x;
  Features<X> features;
  Written<X> running_mean, running_var;
  bool training;
  double momentum, eps, values;  // of each channel
  double* mean;
  Compute<X>* rstd;
  Channel<Compute<X>>* channels;
};

template <typename X>
L0K_DEVICE MomentSums sum_moments(const FinishMoments<X>& p, const FinishPlace& place) {
  const Parts& parts = p.parts;
  const int64_t items = parts.items();
  const X* tail = p.x + parts.tail + place.channel;
  const double shift =
      items > 0 ? parts.item(0, place.channel)[0] : static_cast<double>(to_compute(tail[0]));
  MomentSums sums{usable_shift(shift), 0.0, 0.0, 0.0};
  for (int64_t i = place.worker; i < items; i += kFinishWorkers) {
    const double* stored = parts.item(i, place.channel);
    sums.add(parts.values(i), stored[0], stored[1]);
  }
  const int64_t at = place.worker * parts.channels;  // fewer rows than workers
  if (parts.tail + at < parts.end) sums.add(1.0, static_cast<double>(to_compute(tail[at])), 0.0);
  return sums;
}

template <typename X>
__global__ void L0K_BOUNDS(kThreads, 2) finish_moments(const FinishMoments<X> p) {
  using S = Compute<X>;
  const FinishPlace place;
  const int64_t c = place.channel;
  const bool exists = c < p.parts.channels;
  MomentSums sums{};
  if (p.training) {
    if (exists) sums = sum_moments(p, place);
    double collected[3] = {sums.count, sums.sum, sums.squares};
    add_workers(collected);
    sums = {sums.shift, collected[0], collected[1], collected[2]};
  }
  if (!exists || place.worker != 0) return;
  const int64_t feature = p.features.index[c];
  if (!p.features.is_open(feature)) {
    p.mean[c] = 0.0;
    p.rstd[c] = S(0);
    p.channels[c] = {};
    return;
  }
  double mean, variance;
  if (p.training) {
    mean = sums.mean();
    const double deviations = sums.deviations();
    variance = deviations / p.values;
    if (p.running_mean.numbers != nullptr) {
      const double unbiased = deviations / (p.values - 1.0);
      p.running_mean.set(feature,
                         running_average(p.running_mean.get(feature), mean, p.momentum));
      p.running_var.set(feature,
                        running_average(p.running_var.get(feature), unbiased, p.momentum));
    }
  } else {
    mean = p.running_mean.get(feature);
    variance = p.running_var.get(feature);
  }
  p.mean[c] = mean;
  p.rstd[c] = static_cast<S>(reciprocal_deviation(variance, p.eps));
  p.channels[c] = make_channel(p.features, feature, mean, p.rstd[c]);
}

// ---- values and gradients, number by number ----

struct Activation {
  bool relu;
};

// The gradient before the activation.
template <typename S>
L0K_DEVICE S grad_before(const Activation& activation, const Channel<S>& c, S x, S grad) {
  if (!activation.relu) return grad;
  return passes_relu(normalized(x, c.mean, c.alpha, c.beta)) ? grad : S(0);
}

enum class Value { forward, grad_training, grad_eval };

template <Value kValue, typename S>
L0K_DEVICE S value_of(const Activation& activation, const Channel<S>& c, S x, S grad) {
  S value;
  if constexpr (kValue == Value::forward) {
    value = normalized(x, c.mean, c.alpha, c.beta);
    if (activation.relu) value = relu(value);
  } else {
    const S g = grad_before(activation, c, x, grad);
    value = kValue == Value::grad_training
                ? norm_grad(g, x, c.mean, c.alpha, c.grad_mean, c.slope)
                : g * c.alpha;
  }
  return c.open ? value : S(0);
}

template <typename X>
struct Values {
  const X* x;
  const X* grad;  // null: forward
  X* result;
  const Channel<Compute<X>>* channels;
  Activation activation;
};

template <typename X>
struct ValuesOfRows {
  Rows rows;
  Values<X> values;
};

template <typename X>
struct ValuesOfPlanes {
  Planes planes;
  Values<X> values;
};

template <Value kValue, typename X>
L0K_DEVICE X result_of(const Values<X>& v, const Channel<Compute<X>>& c, X x, X grad) {
  return from_compute<X>(value_of<kValue>(v.activation, c, to_compute(x), to_compute(grad)));
}

template <Value kValue>
constexpr int kValueUnroll = kValue == Value::forward ? kUnroll : kUnroll / 2;

template <Value kValue, typename X>
__global__ void L0K_BOUNDS(kThreads, 2) row_values(const ValuesOfRows<X> p) {
  using S = Compute<X>;
  constexpr int V = kVector<X>;
  constexpr int kLoads = kValueUnroll<kValue>;
  const RowPlace<X> place(p.rows);
  if (!place.active) return;
  Channel<S> channel[V];
  int64_t c = place.lane % p.rows.channels;
#pragma unroll
  for (int l = 0; l < V; ++l) {
    channel[l] = p.values.channels[c];
    if (++c == p.rows.channels) c = 0;
  }
  for (int64_t period = place.first; period < place.stop; period += kLoads * place.step) {
    Vector16<X> x[kLoads], grad[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t at = (period + u * place.step) * p.rows.lanes + place.lane;
      if (period + u * place.step >= place.stop) continue;
      x[u] = load16(p.values.x + at);
      grad[u] = kValue == Value::forward ? x[u] : load16(p.values.grad + at);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (period + u * place.step >= place.stop) continue;
      Vector16<X> result;
#pragma unroll
      for (int l = 0; l < V; ++l) {
        result[l] = result_of<kValue>(p.values, channel[l], x[u][l], grad[u][l]);
      }
      store16(p.values.result + (period + u * place.step) * p.rows.lanes + place.lane, result);
    }
  }
  if (blockIdx.y + 1 < gridDim.y || threadIdx.x >= static_cast<unsigned>(p.rows.tile)) return;
#pragma unroll
  for (int l = 0; l < V; ++l) {
    const int64_t at = p.rows.tail() + place.lane + l;
    if (at >= p.rows.end) continue;
    const X grad = kValue == Value::forward ? p.values.x[at] : p.values.grad[at];
    p.values.result[at] = result_of<kValue>(p.values, channel[l], p.values.x[at], grad);
  }
}

template <Value kValue, typename X>
__global__ void L0K_BOUNDS(kThreads, 2) plane_values(const ValuesOfPlanes<X> p) {
  constexpr int V = kVector<X>;
  constexpr int kLoads = kValueUnroll<kValue>;
  const Channel<Compute<X>> channel = p.values.channels[blockIdx.x];
  for (PlaneCursor<X> cursor(p.planes); !cursor.done();) {
    Vector16<X> x[kLoads], grad[kLoads];
    Span spans[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u, cursor.advance()) {
      spans[u] = span_of(cursor);
      x[u] = load_span(p.values.x, spans[u], p.planes.end);
      grad[u] = kValue == Value::forward ? x[u] : load_span(p.values.grad, spans[u], p.planes.end);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      Vector16<X> result;
#pragma unroll
      for (int l = 0; l < V; ++l) {
        result[l] = result_of<kValue>(p.values, channel, x[u][l], grad[u][l]);
      }
      store_span(p.values.result, spans[u], result);
    }
  }
}

// ---- sums of the backward pass: grad, and grad (x - mean) ----

template <typename X>
struct Grads {
  const X* x;
  const X* grad;
  Features<X> features;
  const double* mean;
  const Compute<X>* rstd;
  Activation activation;
  double* sums;
  // Closed features have zeros here; open ones follow when the sums are finished.
  Written<X> grad_weight, grad_bias;

  L0K_DEVICE Channel<Compute<X>> channel(int64_t c) const {
    return make_channel(features, features.index[c], mean[c], rstd[c]);
  }
};

template <typename X>
struct GradsOfRows {
  Rows rows;
  Grads<X> grads;
};

template <typename X>
struct GradsOfPlanes {
  Planes planes;
  Grads<X> grads;
};

template <typename X>
L0K_DEVICE void clear_gradients(const Grads<X>& grads) {
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * kThreads;
  for (int64_t f = block * kThreads + threadIdx.x; f < grads.features.full; f += threads) {
    if (grads.grad_weight.numbers != nullptr) grads.grad_weight.set(f, 0.0);
    if (grads.grad_bias.numbers != nullptr) grads.grad_bias.set(f, 0.0);
  }
}

template <typename X>
__global__ void L0K_BOUNDS(kThreads, 2) row_grads(const GradsOfRows<X> p) {
  using S = Compute<X>;
  constexpr int V = kVector<X>;
  constexpr int kLoads = kUnroll / 2;
  clear_gradients(p.grads);
  const RowPlace<X> place(p.rows);
  Channel<S> channel[V];
  int64_t c = place.lane % p.rows.channels;
#pragma unroll
  for (int l = 0; l < V; ++l) {
    if (place.active) channel[l] = p.grads.channel(c);
    if (++c == p.rows.channels) c = 0;
  }
  LaneSums<V> sums{};
  for (int64_t period = place.first; period < place.stop; period += kLoads * place.step) {
    Vector16<X> x[kLoads], grad[kLoads];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t at = (period + u * place.step) * p.rows.lanes + place.lane;
      if (period + u * place.step >= place.stop) continue;
      x[u] = load16(p.grads.x + at);
      grad[u] = load16(p.grads.grad + at);
      valid = u + 1;
    }
#pragma unroll
    for (int l = 0; l < V; ++l) {
      S first = S(0), second = S(0);
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        if (u >= valid) continue;
        const S value = to_compute(x[u][l]);
        const S g = grad_before(p.grads.activation, channel[l], value, to_compute(grad[u][l]));
        first += g;
        second += g * (value - channel[l].mean);
      }
      sums.first[l] += static_cast<double>(first);
      sums.second[l] += static_cast<double>(second);
    }
  }
  reduce_rows<V>(p.rows, sums, [&](int slot, const double(&totals)[2]) {
    double* stored = stored_at(p.rows, V, p.grads.sums, slot);
    stored[0] = totals[0];
    stored[1] = totals[1];
  });
}

template <typename X>
__global__ void L0K_BOUNDS(kThreads, 2) plane_grads(const GradsOfPlanes<X> p) {
  using S = Compute<X>;
  constexpr int V = kVector<X>;
  constexpr int kLoads = kUnroll / 2;
  clear_gradients(p.grads);
  const Channel<S> channel = p.grads.channel(blockIdx.x);
  double first_sum = 0.0, second_sum = 0.0;
  for (PlaneCursor<X> cursor(p.planes); !cursor.done();) {
    Vector16<X> x[kLoads], grad[kLoads];
    Span spans[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u, cursor.advance()) {
      spans[u] = span_of(cursor);
      x[u] = load_span(p.grads.x, spans[u], p.planes.end);
      grad[u] = load_span(p.grads.grad, spans[u], p.planes.end);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      S first = S(0), second = S(0);
#pragma unroll
      for (int l = 0; l < V; ++l) {
        if (l < spans[u].begin || l >= spans[u].end) continue;
        const S value = to_compute(x[u][l]);
        const S g = grad_before(p.grads.activation, channel, value, to_compute(grad[u][l]));
        first += g;
        second += g * (value - channel.mean);
      }
      first_sum += static_cast<double>(first);
      second_sum += static_cast<double>(second);
    }
  }
  const double first = block_sum(first_sum);
  const double second = block_sum(second_sum);
  if (threadIdx.x != 0) return;
  double* stored = p.grads.sums + 2 * (blockIdx.y * p.planes.channels + blockIdx.x);
  stored[0] = first;
  stored[1] = second;
}

template <typename X>
struct FinishGrads {
  Parts parts;
  Grads<X> grads;
  bool has_sums;
  double values;  // of each channel
  Channel<Compute<X>>* channels;
};

template <typename X>
L0K_DEVICE void sum_grads(const FinishGrads<X>& p, const FinishPlace& place,
                          const Channel<Compute<X>>& channel, double (&sums)[2]) {
  using S = Compute<X>;
  for (int64_t i = place.worker; i < p.parts.items(); i += kFinishWorkers) {
    const double* stored = p.parts.item(i, place.channel);
    sums[0] += stored[0];
    sums[1] += stored[1];
  }
  const int64_t at = p.parts.tail + place.worker * p.parts.channels + place.channel;
  if (at >= p.parts.end) return;
  const S x = to_compute(p.grads.x[at]);
  const S g = grad_before(p.grads.activation, channel, x, to_compute(p.grads.grad[at]));
  sums[0] += static_cast<double>(g);
  sums[1] += static_cast<double>(g * (x - channel.mean));
}

template <typename X>
__global__ void L0K_BOUNDS(kThreads, 2) finish_grads(const FinishGrads<X> p) {
  using S = Compute<X>;
  const FinishPlace place;
  const int64_t c = place.channel;
  const bool exists = c < p.parts.channels;
  Channel<S> channel{};
  if (exists) channel = p.grads.channel(c);
  double sums[2] = {0.0, 0.0};
  if (p.has_sums) {
    if (exists) sum_grads(p, place, channel, sums);
    add_workers(sums);
  }
  if (!exists || place.worker != 0) return;
  const int64_t feature = p.grads.features.index[c];
  if (!p.grads.features.is_open(feature)) {
    p.channels[c] = {};
    return;
  }
  const double mean = p.grads.mean[c];
  const S rstd = p.grads.rstd[c];
  const GradSums all = with_all_digits<S>({sums[0], sums[1]}, mean);
  if (p.grads.grad_weight.numbers != nullptr) {
    p.grads.grad_weight.set(feature, all.product * static_cast<double>(rstd));
  }
  if (p.grads.grad_bias.numbers != nullptr) p.grads.grad_bias.set(feature, all.grad);
  use_sums<S>(channel, all, p.values, mean, rstd);
  p.channels[c] = channel;
}

// ---- plans ----

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a sweep over the numbers is cut into blocks.
struct Plan {
  Geometry shape;
  Rows rows;
  Planes planes;
  dim3 grid;
};

template <typename X>
Plan plan_rows(const Geometry& g, int64_t blocks) {
  constexpr int64_t V = kVector<X>;
  Rows rows{};
  rows.channels = g.channels;
  rows.lanes = g.channels * (V / std::gcd(g.channels, V));
  rows.end = g.numbers();
  rows.periods = rows.end / rows.lanes;
  const int64_t vectors = rows.lanes / V;
  rows.tiles = static_cast<int>(divide_up(vectors, kThreads));
  rows.tile = static_cast<int>(divide_up(vectors, rows.tiles));
  rows.side_by_side = kThreads / rows.tile;
  const int64_t most = std::max<int64_t>(1, divide_up(rows.periods, rows.side_by_side * kUnroll));
  const int64_t wanted = std::clamp<int64_t>(blocks / rows.tiles, 1, most);
  rows.chunk_periods = std::max<int64_t>(1, divide_up(rows.periods, wanted));
  const int64_t chunks = std::max<int64_t>(1, divide_up(rows.periods, rows.chunk_periods));
  return {g, rows, {}, dim3(rows.tiles, static_cast<unsigned>(chunks))};
}

template <typename X>
Plan plan_planes(const Geometry& g, int64_t blocks) {
  constexpr int64_t V = kVector<X>;
  Planes planes{g.batch, g.channels, g.inner, 0, 0, g.numbers()};
  planes.vectors = g.inner % V == 0 ? g.inner / V : (g.inner + V - 2) / V + 1;
  const int64_t most = std::max<int64_t>(
      1, std::min(g.batch, divide_up(g.batch * planes.vectors, kThreads * kUnroll)));
  planes.chunk_batch = divide_up(g.batch, std::clamp<int64_t>(blocks / g.channels, 1, most));
  const int64_t chunks = divide_up(g.batch, planes.chunk_batch);
  return {g, {}, planes, dim3(static_cast<unsigned>(g.channels), static_cast<unsigned>(chunks))};
}

template <typename X>
Plan make_plan(const Geometry& g, int64_t blocks) {
  return g.rows ? plan_rows<X>(g, blocks) : plan_planes<X>(g, blocks);
}

int64_t slots_of(const Plan& plan) {
  if (!plan.shape.rows) return plan.shape.channels;
  return plan.rows.tiles == 1 ? plan.rows.channels : plan.rows.lanes;
}

Parts parts_of(const Plan& plan, const double* sums) {
  Parts parts{sums, plan.shape.channels, plan.grid.y, slots_of(plan), 0.0, 0.0, 0, 0};
  int64_t total, chunk, values;  // values of a slot in one of them
  if (plan.shape.rows) {
    total = plan.rows.periods;
    chunk = plan.rows.chunk_periods;
    values = plan.rows.lanes / parts.slots;
    parts.tail = plan.rows.tail();
    parts.end = plan.rows.end;
    if (total == 0) parts.chunks = 0;
  } else {
    total = plan.planes.batch;
    chunk = plan.planes.chunk_batch;
    values = plan.planes.inner;
  }
  const int64_t last = total - std::max<int64_t>(0, parts.chunks - 1) * chunk;
  parts.chunk_values = static_cast<double>(chunk * values);
  parts.last_values = static_cast<double>(last * values);
  return parts;
}

// ---- launches ----

// Sums and channels, between the launches.
template <typename X>
struct Workspace {
  using C = Channel<Compute<X>>;
  Tensor memory;
  double* sums;
  C* channels;

  Workspace(const Tensor& x, const Plan& plan, bool has_sums) {
    const int64_t numbers = has_sums ? 2 * plan.grid.y * slots_of(plan) : 0;
    const int64_t bytes = plan.shape.channels * static_cast<int64_t>(sizeof(C));
    memory = torch::stable::new_empty(x, {numbers + divide_up(bytes, sizeof(double))},
                                      ScalarType::Double);
    sums = out<double>(memory);
    channels = reinterpret_cast<C*>(sums + numbers);
  }
};

dim3 finish_grid(const Plan& plan) {
  return dim3(static_cast<unsigned>(divide_up(plan.shape.channels, kFinishChannels)));
}

template <Value kValue, typename X>
void launch_values(const Geometry& g, const Values<X>& values, Stream stream) {
  const Plan plan = make_plan<X>(g, kValueBlocks);
  if (g.rows) {
    const ValuesOfRows<X> params{plan.rows, values};
    L0K_LAUNCH((row_values<kValue, X>), plan.grid, dim3(kThreads), 0, stream, params);
  } else {
    const ValuesOfPlanes<X> params{plan.planes, values};
    L0K_LAUNCH((plane_values<kValue, X>), plan.grid, dim3(kThreads), 0, stream, params);
  }
}

template <typename X>
void launch_moments(const Plan& plan, const X* x, double* sums, Stream stream) {
  if (!plan.shape.rows) {
    const MomentsOfPlanes<X> params{plan.planes, x, sums};
    L0K_LAUNCH((plane_moments<X>), plan.grid, dim3(kThreads), 0, stream, params);
  } else if (plan.rows.periods > 0) {
    const MomentsOfRows<X> params{plan.rows, x, sums};
    L0K_LAUNCH((row_moments<X>), plan.grid, dim3(kThreads), 0, stream, params);
  }
}

template <typename X>
void launch_grads(const Plan& plan, const Grads<X>& grads, Stream stream) {
  if (plan.shape.rows) {
    const GradsOfRows<X> params{plan.rows, grads};
    L0K_LAUNCH((row_grads<X>), plan.grid, dim3(kThreads), 0, stream, params);
  } else {
    const GradsOfPlanes<X> params{plan.planes, grads};
    L0K_LAUNCH((plane_grads<X>), plan.grid, dim3(kThreads), 0, stream, params);
  }
}

// ---- operators ----

// Dense in x's layout and at a multiple of 16 bytes; a copy if need be.
Tensor prepared(const Tensor& t, bool channels_last) {
  const Tensor dense_t = norm::with_layout(t, channels_last);
  const auto address = reinterpret_cast<uintptr_t>(dense_t.const_data_ptr());
  return address % 16 == 0 ? dense_t : torch::stable::clone(dense_t);
}

template <typename X>
Parameter<X> parameter(const Tensor& t) {
  if (!t.defined()) return {nullptr, false};
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Float};
}

template <typename X>
Written<X> written(const Tensor& t) {
  if (!t.defined()) return {nullptr, 0, false};
  return {t.mutable_data_ptr(), t.stride(0), t.scalar_type() == ScalarType::Float};
}

// The lists, parameters and gates of the features, dense.
struct FeatureTensors {
  Tensor index, z, map, weight, bias;

  FeatureTensors(const Tensor& i, const Tensor& gates, const Tensor& m,
                 const std::optional<Tensor>& w, const std::optional<Tensor>& b)
      : index(dense(i)), z(dense(gates)), map(dense(m)) {
    if (w) weight = dense(*w);
    if (b) bias = dense(*b);
  }

  template <typename X>
  Features<X> features() const {
    return {data<int64_t>(index),   data<int64_t>(map),   map.size(1), data<Compute<X>>(z),
            parameter<X>(weight), parameter<X>(bias)};
  }
};

struct Forward {
  Geometry shape;
  Tensor x, y, mean, rstd;
  FeatureTensors features;
  Tensor running_mean, running_var;
  bool training;
  double momentum, eps;
  Activation activation;
};

template <typename X>
void run_forward(const Forward& f) {
  using S = Compute<X>;
  const Stream stream = current_stream(f.x);
  const Plan plan = make_plan<X>(f.shape, kSumBlocks);
  const Workspace<X> workspace(f.x, plan, f.training);
  if (f.training) launch_moments(plan, data<X>(f.x), workspace.sums, stream);
  const Features<X> features = f.features.features<X>();
  const FinishMoments<X> finish{parts_of(plan, workspace.sums),
                                data<X>(f.x),
                                features,
                                written<X>(f.running_mean),
                                written<X>(f.running_var),
                                f.training,
                                f.momentum,
                                f.eps,
                                static_cast<double>(f.shape.values()),
                                out<double>(f.mean),
                                out<S>(f.rstd),
                                workspace.channels};
  L0K_LAUNCH((finish_moments<X>), finish_grid(plan), dim3(kThreads), 0, stream, finish);
  const Values<X> values{data<X>(f.x), nullptr, out<X>(f.y), workspace.channels, f.activation};
  launch_values<Value::forward>(f.shape, values, stream);
}

struct Backward {
  Geometry shape;
  Tensor grad, x, mean, rstd;
  FeatureTensors features;
  Tensor grad_x, grad_weight, grad_bias;  // undefined: not wanted
  bool training;
  Activation activation;
};

template <typename X>
void run_backward(const Backward& b) {
  using S = Compute<X>;
  const bool of_parameters = b.grad_weight.defined() || b.grad_bias.defined();
  const bool has_sums = of_parameters || (b.training && b.grad_x.defined());
  if (!has_sums && !b.grad_x.defined()) return;
  const Stream stream = current_stream(b.x);
  const Plan plan = make_plan<X>(b.shape, kSumBlocks);
  const Workspace<X> workspace(b.x, plan, has_sums);
  const Grads<X> grads{data<X>(b.x),
                       data<X>(b.grad),
                       b.features.features<X>(),
                       data<double>(b.mean),
                       data<S>(b.rstd),
                       b.activation,
                       workspace.sums,
                       written<X>(b.grad_weight),
                       written<X>(b.grad_bias)};
  if (has_sums) launch_grads(plan, grads, stream);
  const FinishGrads<X> finish{parts_of(plan, workspace.sums), grads, has_sums,
                              static_cast<double>(b.shape.values()), workspace.channels};
  L0K_LAUNCH((finish_grads<X>), finish_grid(plan), dim3(kThreads), 0, stream, finish);
  if (!b.grad_x.defined()) return;
  const Values<X> values{data<X>(b.x), data<X>(b.grad), out<X>(b.grad_x), workspace.channels,
                         b.activation};
  if (b.training) {
    launch_values<Value::grad_training>(b.shape, values, stream);
  } else {
    launch_values<Value::grad_eval>(b.shape, values, stream);
  }
}

Activation activation_of(int64_t number) {
  require(norm::is_known(number), "packed_norm: expected activation 0 or 1, got ", number);
  return {number == norm::kRelu};
}

std::tuple<Tensor, Tensor, Tensor> packed_norm(
    Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var, Tensor index, Tensor z,
    Tensor map, bool training, double momentum, double eps, int64_t activation) {
  const DeviceGuard guard(x.get_device_index());
  require(training || running_mean,
          "packed_norm: expected running statistics where training is false");
  const bool channels_last = norm::is_channels_last(x);
  const Geometry g = norm::geometry_of(x, channels_last);
  const Tensor y = norm::empty_like(x, channels_last);
  Tensor mean = torch::stable::new_empty(z, {g.channels}, ScalarType::Double);
  Tensor rstd = uninitialized(z, {g.channels});
  if (g.numbers() == 0) return {y, torch::stable::zero_(mean), torch::stable::zero_(rstd)};
  const Forward forward{g,
                        prepared(x, channels_last),
                        y,
                        mean,
                        rstd,
                        FeatureTensors(index, z, map, weight, bias),
                        running_mean.value_or(Tensor()),
                        running_var.value_or(Tensor()),
                        training,
                        momentum,
                        eps,
                        activation_of(activation)};
  with_dtype("packed_norm", x, [&](auto number) { run_forward<decltype(number)>(forward); });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> packed_norm_backward(
    Tensor grad, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean,
    Tensor rstd, Tensor index, Tensor z, Tensor map, bool training, int64_t activation,
    bool need_x, bool need_weight, bool need_bias) {
  const DeviceGuard guard(x.get_device_index());
  const bool channels_last = norm::is_channels_last(x);
  const Geometry g = norm::geometry_of(x, channels_last);
  const auto gradient_of = [&](const std::optional<Tensor>& parameter, bool wanted) {
    return wanted && parameter ? uninitialized(*parameter, {parameter->size(0)}) : Tensor();
  };
  Tensor grad_x = need_x ? norm::empty_like(x, channels_last) : Tensor();
  Tensor grad_weight = gradient_of(weight, need_weight);
  Tensor grad_bias = gradient_of(bias, need_bias);
  if (g.numbers() > 0) {
    const Backward backward{g,
                            prepared(grad, channels_last),
                            prepared(x, channels_last),
                            dense(mean),
                            dense(rstd),
                            FeatureTensors(index, z, map, weight, bias),
                            grad_x,
                            grad_weight,
                            grad_bias,
                            training,
                            activation_of(activation)};
    with_dtype("packed_norm", x, [&](auto number) { run_backward<decltype(number)>(backward); });
  } else {
    for (Tensor* t : {&grad_weight, &grad_bias}) {
      if (t->defined()) torch::stable::zero_(*t);
    }
  }
  const auto or_nothing = [&](const Tensor& t) { return t.defined() ? t : norm::nothing(x); };
  return {or_nothing(grad_x), or_nothing(grad_weight), or_nothing(grad_bias)};
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("packed_norm", TORCH_BOX(&packed_norm));
  m.impl("packed_norm_backward", TORCH_BOX(&packed_norm_backward));
}

}  // namespace l0k
