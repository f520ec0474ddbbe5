// SPDX-License-Identifier: Apache-2.0
// sample_gates, its backward pass, arm_gradient, example_noise and open_lists on NVIDIA GPUs.
//
// Noise is a function of the gate's number, so any block can draw any gate without waiting for the
// block that stores its value. Models of up to kOneLaunch gates and features therefore need one
// launch: some blocks store values, and a block per port draws the gates of its own features once
// more and lists them; the first of these also adds up the expected cost of all gates. That one
// block's work grows with the model. Larger models get a second launch, which reads the values and
// one sum per block of the first: to do this in one launch, blocks would have to wait for each
// other, or to count who is last, and the counter would have to be zeroed by a launch of its own.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "common/gate_laws.h"
#include "cuda/common.cuh"

namespace l0k {
namespace {

using torch::headeronly::ScalarType;

constexpr int kWarp = 32;
constexpr int kSlice = 256;        // gates of a block, one per thread: fp64 units are the limit
constexpr int kMaxThreads = 1024;  // of a block that lists a port
constexpr int64_t kOneLaunch = 16384;
constexpr int64_t kMinWidth = 2;  // a packed width is never below this

constexpr int64_t kMaxStep = std::numeric_limits<uint32_t>::max();

template <typename T>
constexpr double kTiny = std::numeric_limits<T>::min();

template <typename T>
constexpr T kNoValue = std::numeric_limits<T>::quiet_NaN();

enum LawNumber : int64_t { kHardConcrete = 0, kBernoulli = 1, kAntithetic = 2 };

// What a count below zero says; nothing else can, as nobody waits for the kernels.
enum Error : int64_t { kNone = 0, kNan = -1, kSeed = -2, kStep = -3, kLayout = -4 };

template <typename T>
struct Strided {
  const T* data;
  int64_t stride;
  L0K_DEVICE T operator[](int64_t i) const { return data[i * stride]; }
};

// ---- one gate ----

L0K_DEVICE double exp_concrete(const HardConcrete& law, int32_t k, double log_alpha) {
  return exp_fp64(concrete_exponent(law, noise_logit(k), log_alpha));
}

L0K_DEVICE double exp_concrete(const Bernoulli&, int32_t, double) { return 0.0; }

template <typename Law>
L0K_DEVICE Odds odds_of(const Law& law, double log_alpha) {
  return odds(law, log_alpha, exp_fp64(open_exponent(law, log_alpha)));
}

L0K_DEVICE int64_t key_error(const Strided<int64_t>& key) {
  if (key[0] < 0) return kSeed;
  return key[1] < 0 || key[1] > kMaxStep ? kStep : kNone;
}

// The expected cost of some gates, and how many of them are NaN.
struct Cost {
  double sum;
  int64_t nans;
};

template <typename T, typename Law>
struct Draw {
  Strided<int64_t> key;
  Strided<T> log_alpha;
  Strided<T> cost;
  int64_t gates;
  Law law;
};

template <typename T>
struct Drawn {
  T value;
  double open;  // P(value != 0)
};

// Gates by number, drawn when asked for. NaN in log_alpha, and a bad key, make values NaN.
template <typename T, typename Law>
struct DrawnGates {
  const Draw<T, Law>& draw;
  NoiseStream stream;
  bool usable;

  L0K_DEVICE explicit DrawnGates(const Draw<T, Law>& d)
      : draw(d),
        stream{static_cast<uint64_t>(d.key[0]), static_cast<uint32_t>(d.key[1]), 0, 0, 0},
        usable(key_error(d.key) == kNone) {}

  L0K_DEVICE Drawn<T> drawn(int64_t gate) const {
    const double la = static_cast<double>(draw.log_alpha[gate]);
    if (la != la || !usable) return {kNoValue<T>, 0.0};
    const int32_t k = noise_of_gate(stream, gate);
    const Odds odds = odds_of(draw.law, la);
    const double e = exp_concrete(draw.law, k, la);
    return {static_cast<T>(gate_value(draw.law, k, e, thresholds(draw.law, odds), kTiny<T>)),
            odds.open};
  }

  L0K_DEVICE T value(int64_t gate) const {
    return gate == draw.gates ? T(1) : drawn(gate).value;
  }

  // value(gate) != 0 at half the price: whether it is does not depend on the exponential.
  L0K_DEVICE bool is_open(int64_t gate) const {
    const double la = static_cast<double>(draw.log_alpha[gate]);
    if (la != la || !usable) return true;
    const Thresholds t = thresholds(draw.law, odds_of(draw.law, la));
    return gate_value(draw.law, noise_of_gate(stream, gate), 0.0, t, 1.0) != 0.0;
  }

  L0K_DEVICE int64_t costs() const { return draw.gates; }

  L0K_DEVICE Cost cost(int64_t gate) const {
    const double la = static_cast<double>(draw.log_alpha[gate]);
    if (la != la) return {0.0, 1};
    return {odds_of(draw.law, la).open * static_cast<double>(draw.cost[gate]), 0};
  }
};

// Gates that an earlier launch stored, with one cost per slice of them.
template <typename T>
struct StoredGates {
  Strided<T> z;
  const Cost* sums;
  int64_t slices;

  L0K_DEVICE T value(int64_t gate) const { return z[gate]; }
  L0K_DEVICE bool is_open(int64_t gate) const { return z[gate] != T(0); }
  L0K_DEVICE int64_t costs() const { return slices; }
  L0K_DEVICE Cost cost(int64_t slice) const { return sums[slice]; }
};

// ---- sums ----

// The sum over the block, in an order that only its size decides; once per kernel.
L0K_DEVICE double block_sum(double value) {
  L0K_SHARED(double, warps, [kMaxThreads / kWarp]);
  const double of_warp = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  double sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += warps[warp];
  return sum;
}

L0K_DEVICE int64_t block_count(bool flag) {
  int total;
  block_scan_exclusive(flag ? 1 : 0, total);
  return total;
}

template <typename T>
struct Total {
  T* expected;  // null: not asked for
  Strided<int64_t> key;
};

// Writes the expected cost of all gates; returns what is wrong with the draw.
template <typename T, typename Gates>
L0K_DEVICE int64_t add_costs(const Total<T>& total, const Gates& gates) {
  Cost mine{0.0, 0};
  for (int64_t i = threadIdx.x; i < gates.costs(); i += blockDim.x) {
    const Cost part = gates.cost(i);
    mine.sum += part.sum;
    mine.nans += part.nans;
  }
  const double sum = block_sum(mine.sum);
  const bool has_nan = block_count(mine.nans > 0) > 0;
  int64_t error = key_error(total.key);
  if (error == kNone && has_nan) error = kNan;
  if (threadIdx.x == 0) *total.expected = error == kNone ? static_cast<T>(sum) : kNoValue<T>;
  return error;
}

// ---- open lists ----

struct Layout {
  const int64_t* group_offsets;
  int64_t groups;
  int64_t gates;
  const int64_t* born;   // the producer's gate of each feature
  const int64_t* extra;  // its gate without a producer
  int64_t features;
  const int64_t* port_offsets;
  int64_t ports;
};

struct Lists {
  int64_t* index;
  int64_t* position;
  int64_t* counts;
};

struct Span {
  int64_t begin, end;
};

// The group of a gate; empty if it is in none, or not in one that ends with the gates.
L0K_DEVICE Span group_of(const Layout& layout, int64_t gate) {
  int64_t low = 0;
  int64_t high = layout.groups;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (layout.group_offsets[middle + 1] <= gate) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == layout.groups) return {0, 0};
  const Span group{layout.group_offsets[low], layout.group_offsets[low + 1]};
  return group.begin < 0 || group.begin > gate || group.end > layout.gates ? Span{0, 0} : group;
}

// The number of open gates from begin on, counted by a warp until there are kMinWidth.
template <typename Gates>
L0K_DEVICE int64_t count_open(const Gates& gates, Span group) {
  int64_t open = 0;
  for (int64_t first = group.begin; first < group.end && open < kMinWidth; first += kWarp) {
    const int64_t gate = first + threadIdx.x % kWarp;
    open += __popc(__ballot_sync(kFullWarp, gate < group.end && gates.is_open(gate)));
  }
  return open;
}

// Whether a closed gate is kept because its group has too few open ones: the number of closed
// gates before it and of all open ones is below kMinWidth. So it is the first or second of its
// group. Whole warps call this.
template <typename Gates>
L0K_DEVICE bool is_dummy(const Gates& gates, const Layout& layout, int64_t gate, bool closed,
                         bool& legal) {
  Span group{0, 0};
  if (closed) {
    group = group_of(layout, gate);
    legal &= group.end > 0;
  }
  const bool candidate = closed && group.end > 0 && gate - group.begin < kMinWidth;
  bool dummy = false;
  unsigned pending = __ballot_sync(kFullWarp, candidate);
  while (pending != 0) {
    const int leader = __ffs(static_cast<int>(pending)) - 1;
    const Span asked{__shfl_sync(kFullWarp, group.begin, leader),
                     __shfl_sync(kFullWarp, group.end, leader)};
    const int64_t open = count_open(gates, asked);
    const bool answered = candidate && group.begin == asked.begin;
    if (answered) {
      const int64_t before = gate > group.begin && !gates.is_open(group.begin) ? 1 : 0;
      dummy = before + open < kMinWidth;
    }
    pending &= ~__ballot_sync(kFullWarp, answered);
  }
  return dummy;
}

L0K_DEVICE bool in_range(const Layout& layout, int64_t gate) {
  return 0 <= gate && gate <= layout.gates;
}

L0K_DEVICE bool has_extra(const Layout& layout, Span port) {
  for (int64_t first = port.begin; first < port.end; first += blockDim.x) {
    const int64_t f = first + threadIdx.x;
    if (block_count(f < port.end && layout.extra[f] != layout.gates) > 0) return true;
  }
  return false;
}

// A port with extra gates of which fewer than kMinWidth features are packed although more arrive.
// As in groups, the ones to add are among the first that arrive; early has these.
L0K_DEVICE void fill_up(const int64_t* early, int64_t packed, int64_t width, int64_t* index,
                               int64_t* position) {
  if (packed == 0) {
    for (int64_t i = 0; i < width; ++i) {
      index[i] = early[i];
      position[i] = i;
    }
  } else if (position[0] == 0) {
    index[1] = early[1];
    position[1] = 1;
  } else {
    index[1] = index[0];
    position[1] = position[0];
    index[0] = early[0];
    position[0] = 0;
  }
}

// Lists the packed features of a port by one block; returns how many there are, or kLayout.
template <typename Gates>
L0K_DEVICE int64_t list_features(const Gates& gates, const Layout& layout, const Lists& lists,
                                 Span port) {
  L0K_SHARED(int64_t, early, [kMinWidth]);  // the first features that arrive
  const bool selects = has_extra(layout, port);
  int64_t* index = lists.index + port.begin;
  int64_t* position = lists.position + port.begin;
  int64_t packed = 0;
  int64_t arrived = 0;
  bool legal = true;
  for (int64_t first = port.begin; first < port.end; first += blockDim.x) {
    const int64_t f = first + threadIdx.x;
    const bool inside = f < port.end;
    int64_t born = inside ? layout.born[f] : layout.gates;
    int64_t extra = inside ? layout.extra[f] : layout.gates;
    legal &= in_range(layout, born) && in_range(layout, extra);
    if (!legal) born = extra = layout.gates;
    const bool open = born == layout.gates || gates.is_open(born);
    const bool dummy = is_dummy(gates, layout, born, !open, legal);
    const bool arrives = inside && (open || dummy);
    const bool packs =
        arrives && (!selects || gates.value(born) * gates.value(extra) != 0);
    // One scan for both ranks: a block has fewer than 2^16 threads.
    int both;
    const int before = block_scan_exclusive((arrives ? 1 << 16 : 0) | (packs ? 1 : 0), both);
    const int64_t rank = arrived + (before >> 16);
    if (arrives && rank < kMinWidth) early[rank] = f - port.begin;
    if (packs) {
      const int64_t place = packed + (before & 0xFFFF);
      index[place] = f - port.begin;
      position[place] = rank;
    }
    packed += both & 0xFFFF;
    arrived += both >> 16;
  }
  const bool all_legal = block_count(!legal) == 0;  // also: early and the lists are written
  const int64_t width = arrived < kMinWidth ? arrived : kMinWidth;
  if (packed < width) {
    if (threadIdx.x == 0) fill_up(early, packed, width, index, position);
    packed = width;
  }
  for (int64_t i = packed + threadIdx.x; i < port.end - port.begin; i += blockDim.x) {
    index[i] = 0;
    position[i] = 0;
  }
  return all_legal ? packed : static_cast<int64_t>(kLayout);
}

L0K_DEVICE bool is_legal(const Layout& layout, int64_t port, Span span) {
  return 0 <= span.begin && span.begin <= span.end && span.end <= layout.features &&
         (port > 0 || span.begin == 0) &&
         (port + 1 < layout.ports || span.end == layout.features);
}

template <typename T>
struct Listing {
  Layout layout;
  Lists lists;
  Total<T> total;
};

// What block `port` of a listing does; there is a first one even if there are no ports.
template <typename T, typename Gates>
L0K_DEVICE void list_port(const Listing<T>& listing, const Gates& gates, int64_t port) {
  const Layout& layout = listing.layout;
  int64_t error = kNone;
  if (port == 0 && listing.total.expected != nullptr) error = add_costs(listing.total, gates);
  if (port == layout.ports) return;
  const Span span{layout.port_offsets[port], layout.port_offsets[port + 1]};
  int64_t count = kLayout;
  if (is_legal(layout, port, span)) count = list_features(gates, layout, listing.lists, span);
  if (threadIdx.x == 0) listing.lists.counts[port] = error != kNone ? error : count;
}

// ---- kernels ----

template <typename T, typename Law>
struct DrawAndList {
  Draw<T, Law> draw;
  T* z;
  Listing<T> listing;
  int64_t list_blocks;
};

template <typename T, typename Law>
__global__ void L0K_BOUNDS(kMaxThreads, 1) draw_and_list(const DrawAndList<T, Law> p) {
  const DrawnGates<T, Law> gates(p.draw);
  if (blockIdx.x < p.list_blocks) {
    list_port(p.listing, gates, blockIdx.x);
    return;
  }
  const int64_t gate = (blockIdx.x - p.list_blocks) * kSlice + threadIdx.x;
  if (threadIdx.x < kSlice && gate <= p.draw.gates) p.z[gate] = gates.value(gate);
}

template <typename T, typename Law>
struct DrawValues {
  Draw<T, Law> draw;
  T* z;
  Cost* sums;
};

template <typename T, typename Law>
__global__ void L0K_BOUNDS(kSlice, 1) draw_values(const DrawValues<T, Law> p) {
  const DrawnGates<T, Law> gates(p.draw);
  const int64_t gate = static_cast<int64_t>(blockIdx.x) * kSlice + threadIdx.x;
  Drawn<T> mine{T(1), 0.0};
  if (gate < p.draw.gates) {
    mine = gates.drawn(gate);
    mine.open *= static_cast<double>(p.draw.cost[gate]);
  }
  if (gate <= p.draw.gates) p.z[gate] = mine.value;
  const double sum = block_sum(mine.open);
  const int64_t nans = block_count(mine.value != mine.value);
  if (threadIdx.x == 0) p.sums[blockIdx.x] = {sum, nans};
}

template <typename T>
struct ListStored {
  StoredGates<T> gates;
  Listing<T> listing;
};

template <typename T>
__global__ void L0K_BOUNDS(kMaxThreads, 1) list_stored(const ListStored<T> p) {
  list_port(p.listing, p.gates, blockIdx.x);
}

template <typename T, typename Law>
struct Slopes {
  Draw<T, Law> draw;
  Strided<T> grad_z;        // null: z was not used
  const T* grad_expected;  // null: the expected cost was not used
  T* grad;
};

template <typename T, typename Law>
__global__ void L0K_BOUNDS(kSlice, 1) gate_slopes(const Slopes<T, Law> p) {
  const DrawnGates<T, Law> gates(p.draw);
  const Law& law = p.draw.law;
  const int64_t gate = static_cast<int64_t>(blockIdx.x) * kSlice + threadIdx.x;
  if (gate >= p.draw.gates) return;
  const double la = static_cast<double>(p.draw.log_alpha[gate]);
  if (la != la || !gates.usable) {
    p.grad[gate] = kNoValue<T>;
    return;
  }
  const int32_t k = noise_of_gate(gates.stream, gate);
  const Odds odds = odds_of(law, la);
  const double scale = p.grad_expected == nullptr ? 0.0 : static_cast<double>(*p.grad_expected);
  double grad = odds.open * odds.closed * (scale * static_cast<double>(p.draw.cost[gate]));
  if (p.grad_z.data != nullptr) {
    const double slope = gate_slope(law, k, exp_concrete(law, k, la), thresholds(law, odds));
    // Selected, not multiplied: a saturated gate has gradient 0 even where grad_z is infinite.
    if (slope != 0.0) grad += slope * static_cast<double>(p.grad_z[gate]);
  }
  p.grad[gate] = static_cast<T>(grad);
}

template <typename T>
struct Arm {
  Strided<int64_t> key;
  const T* difference;
  Strided<T> factor;
  T* grad;
  int64_t gates;
};

template <typename T>
__global__ void L0K_BOUNDS(kSlice, 1) arm_gradients(const Arm<T> p) {
  const int64_t gate = static_cast<int64_t>(blockIdx.x) * kSlice + threadIdx.x;
  if (gate >= p.gates) return;
  if (key_error(p.key) != kNone) {
    p.grad[gate] = kNoValue<T>;
    return;
  }
  const NoiseStream stream{static_cast<uint64_t>(p.key[0]), static_cast<uint32_t>(p.key[1]), 0, 0,
                           0};
  p.grad[gate] = static_cast<T>(arm_gradient(static_cast<double>(*p.difference),
                                             static_cast<double>(p.factor[gate]),
                                             noise_of_gate(stream, gate)));
}

struct Noise {
  Strided<int64_t> key;
  int64_t first;   // row of the first example
  int64_t stride;  // rows from one example to the next
  int64_t gates;
  int64_t blocks;  // of four numbers, in a row
  int64_t total;   // blocks of all rows
  int32_t* k;
};

// A thread for each block of four numbers.
__global__ void L0K_BOUNDS(kSlice, 1) example_noises(const Noise p) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kSlice + threadIdx.x;
  if (place >= p.total) return;
  const int64_t example = place / p.blocks;
  const int64_t block = place % p.blocks;
  const NoiseStream stream{static_cast<uint64_t>(p.key[0]), static_cast<uint32_t>(p.key[1]),
                           static_cast<uint32_t>(p.first + p.stride * example), 0, 0};
  const auto words = noise_words<uint32_t>(stream, static_cast<uint32_t>(block));
  const bool usable = key_error(p.key) == kNone;
  const int64_t left = p.gates - 4 * block;
  int32_t* to = p.k + example * p.gates + 4 * block;
  to[0] = usable ? noise_k(words.x) : -1;
  if (left > 1) to[1] = usable ? noise_k(words.y) : -1;
  if (left > 2) to[2] = usable ? noise_k(words.z) : -1;
  if (left > 3) to[3] = usable ? noise_k(words.w) : -1;
}

// ---- operators ----

int threads_for(int64_t elements) {
  const int64_t whole_warps = (elements + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(std::clamp<int64_t>(whole_warps, kWarp, kMaxThreads));
}

template <typename T>
Strided<T> strided(const Tensor& vector) {
  return {data<T>(vector), vector.stride(0)};
}

using ListTensors = std::tuple<Tensor, Tensor, Tensor>;

// The results of a listing and what its kernel needs to make them.
struct NewLists {
  Tensor groups, features, ports;  // dense
  Tensor index, position, counts;
  Layout layout;

  NewLists(int64_t gates, const Tensor& group_offsets, const Tensor& maps,
           const Tensor& port_offsets)
      : groups(dense(group_offsets)),
        features(dense(maps)),
        ports(dense(port_offsets)),
        index(uninitialized(maps, {maps.size(1)})),
        position(uninitialized(maps, {maps.size(1)})),
        counts(uninitialized(maps, {port_offsets.size(0) - 1})),
        layout{data<int64_t>(groups),
               groups.size(0) - 1,
               gates,
               data<int64_t>(features),
               data<int64_t>(features) + maps.size(1),
               maps.size(1),
               data<int64_t>(ports),
               ports.size(0) - 1} {}

  Lists lists() const {
    return {out<int64_t>(index), out<int64_t>(position), out<int64_t>(counts)};
  }
  ListTensors tensors() const { return {index, position, counts}; }
};

template <typename T, typename Law>
Draw<T, Law> make_draw(const Law& law, const Tensor& log_alpha, const Tensor& key,
                       const Tensor& cost) {
  return {strided<int64_t>(key), strided<T>(log_alpha), strided<T>(cost), log_alpha.size(0), law};
}

template <typename T, typename Law>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample(const Law& law, const Tensor& log_alpha,
                                                          const Tensor& key, const Tensor& cost,
                                                          const Tensor& group_offsets,
                                                          const Tensor& maps,
                                                          const Tensor& port_offsets) {
  const Draw<T, Law> draw = make_draw<T>(law, log_alpha, key, cost);
  const int64_t slices = draw.gates / kSlice + 1;  // z has one entry more than there are gates
  Tensor z = uninitialized(log_alpha, {draw.gates + 1});
  Tensor expected = uninitialized(log_alpha, {});
  const NewLists made(draw.gates, group_offsets, maps, port_offsets);
  const Listing<T> listing{made.layout, made.lists(), {out<T>(expected), draw.key}};
  const int64_t list_blocks = std::max<int64_t>(made.layout.ports, 1);
  const int threads = threads_for(std::max(draw.gates + 1, made.layout.features));
  const auto stream = current_stream(log_alpha);
  if (std::max(draw.gates, made.layout.features) <= kOneLaunch) {
    const DrawAndList<T, Law> params{draw, out<T>(z), listing, list_blocks};
    L0K_LAUNCH((draw_and_list<T, Law>), list_blocks + slices, threads, 0, stream, params);
  } else {
    const Tensor scratch = uninitialized(maps, {2 * slices});
    static_assert(sizeof(Cost) == 2 * sizeof(int64_t));
    Cost* sums = reinterpret_cast<Cost*>(out<int64_t>(scratch));
    L0K_LAUNCH((draw_values<T, Law>), slices, kSlice, 0, stream,
               (DrawValues<T, Law>{draw, out<T>(z), sums}));
    const StoredGates<T> gates{{out<T>(z), 1}, sums, slices};
    L0K_LAUNCH(list_stored<T>, list_blocks, threads, 0, stream, (ListStored<T>{gates, listing}));
  }
  return std::tuple_cat(std::make_tuple(z, expected), made.tensors());
}

template <typename T, typename Law>
Tensor slopes(const Law& law, const Tensor& log_alpha, const Tensor& key, const Tensor& cost,
              const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_expected) {
  const Draw<T, Law> draw = make_draw<T>(law, log_alpha, key, cost);
  Tensor grad = uninitialized(log_alpha, {draw.gates});
  if (draw.gates == 0) return grad;
  const Slopes<T, Law> params{draw, grad_z ? strided<T>(*grad_z) : Strided<T>{nullptr, 0},
                              grad_expected ? data<T>(*grad_expected) : nullptr, out<T>(grad)};
  L0K_LAUNCH((gate_slopes<T, Law>), (draw.gates + kSlice - 1) / kSlice, kSlice, 0,
             current_stream(log_alpha), params);
  return grad;
}

template <typename T>
Tensor arm(const Tensor& difference, const Tensor& factor, const Tensor& key) {
  const int64_t gates = factor.size(0);
  Tensor grad = uninitialized(factor, {gates});
  if (gates == 0) return grad;
  const Arm<T> params{strided<int64_t>(key), data<T>(difference), strided<T>(factor), out<T>(grad),
                      gates};
  L0K_LAUNCH(arm_gradients<T>, (gates + kSlice - 1) / kSlice, kSlice, 0, current_stream(factor),
             params);
  return grad;
}

template <typename T>
ListTensors list(const Tensor& z, const Tensor& group_offsets, const Tensor& maps,
                 const Tensor& port_offsets) {
  const NewLists made(z.size(0) - 1, group_offsets, maps, port_offsets);
  if (made.layout.ports == 0) return made.tensors();
  const ListStored<T> params{{strided<T>(z), nullptr, 0},
                             {made.layout, made.lists(), {nullptr, {nullptr, 0}}}};
  L0K_LAUNCH(list_stored<T>, made.layout.ports, threads_for(made.layout.features), 0,
             current_stream(z), params);
  return made.tensors();
}

bool is_double(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Double || type == ScalarType::Float,
          "expected float32 or float64 gates");
  return type == ScalarType::Double;
}

// Calls run(law, zero) with a zero of the gates' type.
template <typename Run>
auto with_types(const Tensor& gates, int64_t law, double beta, double gamma, double zeta,
                const Run& run) {
  const auto with_law = [&](auto zero) {
    if (law == kBernoulli) return run(Bernoulli{}, zero);
    if (law == kAntithetic) return run(Antithetic{}, zero);
    return run(make_hard_concrete(beta, gamma, zeta), zero);
  };
  return is_double(gates) ? with_law(0.0) : with_law(0.0f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_gates(Tensor log_alpha, Tensor key,
                                                                Tensor cost, Tensor group_offsets,
                                                                Tensor maps, Tensor port_offsets,
                                                                int64_t law, double beta,
                                                                double gamma, double zeta) {
  const DeviceGuard guard(log_alpha.get_device_index());
  return with_types(log_alpha, law, beta, gamma, zeta, [&](const auto& its_law, auto zero) {
    return sample<decltype(zero)>(its_law, log_alpha, key, cost, group_offsets, maps, port_offsets);
  });
}

Tensor sample_gates_backward(Tensor log_alpha, Tensor key, Tensor cost,
                             std::optional<Tensor> grad_z, std::optional<Tensor> grad_expected,
                             int64_t law, double beta, double gamma, double zeta) {
  const DeviceGuard guard(log_alpha.get_device_index());
  return with_types(log_alpha, law, beta, gamma, zeta, [&](const auto& its_law, auto zero) {
    return slopes<decltype(zero)>(its_law, log_alpha, key, cost, grad_z, grad_expected);
  });
}

Tensor arm_gradient_cuda(Tensor difference, Tensor factor, Tensor key) {
  const DeviceGuard guard(factor.get_device_index());
  return is_double(factor) ? arm<double>(difference, factor, key)
                           : arm<float>(difference, factor, key);
}

Tensor example_noise(Tensor key, int64_t examples, int64_t gates, int64_t first, int64_t stride) {
  const DeviceGuard guard(key.get_device_index());
  const Tensor k = torch::stable::new_empty(key, {examples, gates}, ScalarType::Int);
  const int64_t blocks = (gates + 3) / 4;
  const Noise params{strided<int64_t>(key), first,  stride, gates, blocks, examples * blocks,
                     out<int32_t>(k)};
  const int64_t launched = (params.total + kSlice - 1) / kSlice;
  require(launched <= std::numeric_limits<int32_t>::max(), "example_noise: too many numbers");
  if (launched > 0) {
    L0K_LAUNCH(example_noises, static_cast<unsigned>(launched), kSlice, 0, current_stream(key),
               params);
  }
  return k;
}

ListTensors open_lists(Tensor z, Tensor group_offsets, Tensor maps, Tensor port_offsets) {
  const DeviceGuard guard(z.get_device_index());
  return is_double(z) ? list<double>(z, group_offsets, maps, port_offsets)
                      : list<float>(z, group_offsets, maps, port_offsets);
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("sample_gates", TORCH_BOX(&sample_gates));
  m.impl("sample_gates_backward", TORCH_BOX(&sample_gates_backward));
  m.impl("arm_gradient", TORCH_BOX(&arm_gradient_cuda));
  m.impl("example_noise", TORCH_BOX(&example_noise));
  m.impl("open_lists", TORCH_BOX(&open_lists));
}

}  // namespace l0k
