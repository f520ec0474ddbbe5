// SPDX-License-Identifier: Apache-2.0
// sample_gates, its backward pass, arm_gradient, example_noise and open_lists on the CPU.
#include "common/gate_laws.h"
#include "cpu/common.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

namespace l0k {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTile = 256;    // gates whose intermediate values stay in the first-level cache
constexpr int64_t kChunk = 8192;  // gates per task; fixed, so that sums have one order
constexpr int64_t kMinWidth = 2;  // a packed width is never below this

enum Law : int64_t { kHardConcrete = 0, kBernoulli = 1, kAntithetic = 2 };

struct Draw {
  NoiseStream stream;
  Law law;
  HardConcrete concrete;
};

struct Tile {
  alignas(64) int32_t k[kTile];
  alignas(64) double log_alpha[kTile];
  alignas(64) double value[kTile];   // z forward, dz/dlog_alpha backward
  alignas(64) double weight[kTile];  // P(open) forward, its derivative backward
};

// ---- one tile ----
// Many short loops, which the compiler vectorises for each instruction set: in one long loop it
// would branch around the costly steps for saturated gates, and the steps would wait for each
// other.

L0K_HD void fill_noise(const NoiseStream& stream, int64_t first_gate, Tile& tile) {
  constexpr int64_t kBlocks = kTile / 4;
  const uint32_t first = static_cast<uint32_t>(first_gate / 4);
  uint64_t words[4][kBlocks];
  for (int64_t i = 0; i < kBlocks; ++i) {
    const auto block = noise_words<uint64_t>(stream, first + static_cast<uint32_t>(i));
    words[0][i] = block.x;
    words[1][i] = block.y;
    words[2][i] = block.z;
    words[3][i] = block.w;
  }
  for (int64_t i = 0; i < kBlocks; ++i) {
    for (int64_t lane = 0; lane < 4; ++lane) tile.k[4 * i + lane] = noise_k(words[lane][i]);
  }
}

// value = e^concrete_exponent.
L0K_HD void concrete_exponentials(const HardConcrete& law, Tile& tile) {
  for (int64_t i = 0; i < kTile; ++i) tile.value[i] = noise_logit(tile.k[i]);
  for (int64_t i = 0; i < kTile; ++i) {
    tile.value[i] = exp_fp64(concrete_exponent(law, tile.value[i], tile.log_alpha[i]));
  }
}

L0K_HD void concrete_exponentials(const Bernoulli&, Tile& tile) {
  for (int64_t i = 0; i < kTile; ++i) tile.value[i] = 0.0;
}

// weight = e^open_exponent.
template <typename LawType>
L0K_HD void open_exponentials(const LawType& law, Tile& tile) {
  for (int64_t i = 0; i < kTile; ++i) {
    tile.weight[i] = exp_fp64(open_exponent(law, tile.log_alpha[i]));
  }
}

template <typename LawType>
L0K_HD void values_of(const LawType& law, double tiny, Tile& tile) {
  concrete_exponentials(law, tile);
  open_exponentials(law, tile);
  for (int64_t i = 0; i < kTile; ++i) {
    const Odds p = odds(law, tile.log_alpha[i], tile.weight[i]);
    tile.value[i] = gate_value(law, tile.k[i], tile.value[i], thresholds(law, p), tiny);
    tile.weight[i] = p.open;
  }
}

template <typename LawType>
L0K_HD void slopes_of(const LawType& law, Tile& tile) {
  concrete_exponentials(law, tile);
  open_exponentials(law, tile);
  for (int64_t i = 0; i < kTile; ++i) {
    const Odds p = odds(law, tile.log_alpha[i], tile.weight[i]);
    tile.value[i] = gate_slope(law, tile.k[i], tile.value[i], thresholds(law, p));
    tile.weight[i] = p.open * p.closed;
  }
}

// Fills the tile's noise and log_alpha, with zeros for NaN and behind the last gate; counts NaN.
template <typename T>
L0K_HD int64_t load_tile(const Draw& draw, const T* __restrict log_alpha, int64_t first,
                         int64_t count, Tile& tile) {
  fill_noise(draw.stream, first, tile);
  int64_t nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double la = static_cast<double>(log_alpha[first + i]);
    nans += la != la;
    tile.log_alpha[i] = select(la != la, 0.0, la);
  }
  for (int64_t i = count; i < kTile; ++i) tile.log_alpha[i] = 0.0;
  return nans;
}

// ---- one chunk ----

// Sums in eight lanes, which the compiler may keep in one register, then the lanes in order.
struct LaneSum {
  double lanes[8] = {};

  L0K_HD void add(const double* values, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += values[i + lane];
    }
    for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += values[i];
  }
  L0K_HD double total() const {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

template <typename T>
struct Forward {
  Draw draw;
  const T* log_alpha;
  const T* cost;
  T* z;
  double* expected;  // one sum per chunk
  int64_t* nans;     // one count per chunk
  int64_t gates;
};

template <typename T>
L0K_HD void forward_chunk(const Forward<T>& f, int64_t chunk) {
  const int64_t end = std::min(f.gates, (chunk + 1) * kChunk);
  const double tiny = static_cast<double>(std::numeric_limits<T>::min());
  int64_t nans = 0;
  Tile tile;
  LaneSum expected;
  for (int64_t first = chunk * kChunk; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    nans += load_tile(f.draw, f.log_alpha, first, count, tile);
    if (f.draw.law == kHardConcrete) {
      values_of(f.draw.concrete, tiny, tile);
    } else if (f.draw.law == kAntithetic) {
      values_of(Antithetic{}, tiny, tile);
    } else {
      values_of(Bernoulli{}, tiny, tile);
    }
    for (int64_t i = 0; i < count; ++i) f.z[first + i] = static_cast<T>(tile.value[i]);
    for (int64_t i = 0; i < count; ++i) tile.weight[i] *= static_cast<double>(f.cost[first + i]);
    expected.add(tile.weight, count);
  }
  f.expected[chunk] = expected.total();
  f.nans[chunk] = nans;
}

template <typename T>
struct Backward {
  Draw draw;
  const T* log_alpha;
  const T* cost;
  const T* grad_z;  // null: z was not used
  double grad_expected;
  T* grad;
  int64_t gates;
};

template <typename T>
L0K_HD void backward_chunk(const Backward<T>& b, int64_t chunk) {
  const int64_t end = std::min(b.gates, (chunk + 1) * kChunk);
  Tile tile;
  for (int64_t first = chunk * kChunk; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    load_tile(b.draw, b.log_alpha, first, count, tile);
    if (b.draw.law == kHardConcrete) {
      slopes_of(b.draw.concrete, tile);
    } else {
      slopes_of(Bernoulli{}, tile);  // Antithetic's are the same
    }
    for (int64_t i = 0; i < count; ++i) {
      tile.weight[i] *= b.grad_expected * static_cast<double>(b.cost[first + i]);
    }
    if (b.grad_z != nullptr) {
      // Selected, not multiplied: a saturated gate has gradient 0 even where grad_z is infinite.
      for (int64_t i = 0; i < count; ++i) {
        const double part = tile.value[i] * static_cast<double>(b.grad_z[first + i]);
        tile.weight[i] += select(tile.value[i] == 0.0, 0.0, part);
      }
    }
    for (int64_t i = 0; i < count; ++i) b.grad[first + i] = static_cast<T>(tile.weight[i]);
  }
}

template <typename T>
struct Arm {
  NoiseStream stream;
  double difference;
  const T* factor;
  T* grad;
  int64_t gates;
};

template <typename T>
L0K_HD void arm_chunk(const Arm<T>& a, int64_t chunk) {
  const int64_t end = std::min(a.gates, (chunk + 1) * kChunk);
  Tile tile;
  for (int64_t first = chunk * kChunk; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    fill_noise(a.stream, first, tile);
    for (int64_t i = 0; i < count; ++i) {
      const double factor = static_cast<double>(a.factor[first + i]);
      a.grad[first + i] = static_cast<T>(arm_gradient(a.difference, factor, tile.k[i]));
    }
  }
}

struct Noise {
  NoiseStream stream;  // of the first example
  int64_t stride;      // rows from one example to the next
  int64_t gates;
  int64_t chunks;  // of a row
  int32_t* k;
};

// Chunks of all rows are numbered through.
L0K_HD void noise_chunk(const Noise& n, int64_t chunk) {
  const int64_t example = chunk / n.chunks;
  const int64_t begin = chunk % n.chunks * kChunk;
  const int64_t end = std::min(n.gates, begin + kChunk);
  NoiseStream stream = n.stream;
  stream.row = static_cast<uint32_t>(stream.row + n.stride * example);
  Tile tile;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    fill_noise(stream, first, tile);
    std::copy_n(tile.k, count, n.k + example * n.gates + first);
  }
}

L0K_FOR_EACH_ISA(forward_f32, forward_chunk, (const Forward<float>& f, int64_t chunk), (f, chunk))
L0K_FOR_EACH_ISA(forward_f64, forward_chunk, (const Forward<double>& f, int64_t chunk), (f, chunk))
L0K_FOR_EACH_ISA(backward_f32, backward_chunk, (const Backward<float>& b, int64_t chunk),
                 (b, chunk))
L0K_FOR_EACH_ISA(backward_f64, backward_chunk, (const Backward<double>& b, int64_t chunk),
                 (b, chunk))
L0K_FOR_EACH_ISA(arm_f32, arm_chunk, (const Arm<float>& a, int64_t chunk), (a, chunk))
L0K_FOR_EACH_ISA(arm_f64, arm_chunk, (const Arm<double>& a, int64_t chunk), (a, chunk))
L0K_FOR_EACH_ISA(noise_k32, noise_chunk, (const Noise& n, int64_t chunk), (n, chunk))

void run_chunk(const Forward<float>& f, int64_t chunk) { forward_f32(f, chunk); }
void run_chunk(const Forward<double>& f, int64_t chunk) { forward_f64(f, chunk); }
void run_chunk(const Backward<float>& b, int64_t chunk) { backward_f32(b, chunk); }
void run_chunk(const Backward<double>& b, int64_t chunk) { backward_f64(b, chunk); }
void run_chunk(const Arm<float>& a, int64_t chunk) { arm_f32(a, chunk); }
void run_chunk(const Arm<double>& a, int64_t chunk) { arm_f64(a, chunk); }

int64_t chunks_of(int64_t gates) { return (gates + kChunk - 1) / kChunk; }

template <typename Task>
void run_chunks(const Task& task) {
  torch::stable::parallel_for(0, chunks_of(task.gates), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) run_chunk(task, chunk);
  });
}

template <typename T>
[[noreturn]] void fail_on_nan(const T* log_alpha, int64_t gates, int64_t nans) {
  int64_t first = 0;
  while (log_alpha[first] == log_alpha[first]) ++first;
  fail("log_alpha: expected no NaN; got ", nans, " of ", gates, ", first at ", first);
}

NoiseStream make_stream(const Tensor& key) {
  const int64_t seed = data<int64_t>(key)[0];
  const int64_t step = data<int64_t>(key)[key.stride(0)];
  if (seed < 0) fail("seed: expected 0 <= seed < 2^63; got ", seed);
  if (step < 0 || step > std::numeric_limits<uint32_t>::max()) {
    fail("step: expected 0 <= step < 2^32; got ", step);
  }
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), 0, 0, 0};
}

Draw make_draw(const Tensor& key, int64_t law, double beta, double gamma, double zeta) {
  Draw draw{};
  draw.stream = make_stream(key);
  draw.law = static_cast<Law>(law);
  draw.concrete = make_hard_concrete(beta, gamma, zeta);
  return draw;
}

// ---- open lists ----

struct Layout {
  const int64_t* group_offsets;
  int64_t groups;
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

void check_offsets(const char* name, const int64_t* offsets, int64_t segments, int64_t size) {
  bool ordered = offsets[0] == 0 && offsets[segments] == size;
  for (int64_t i = 0; i < segments; ++i) ordered &= offsets[i] <= offsets[i + 1];
  require(ordered, name, ": expected ascending offsets from 0 to ", size);
}

L0K_HD bool all_within(const int64_t* gates, int64_t count, uint64_t largest) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(gates[i]) > largest;
  return outside == 0;
}

L0K_HD bool any_other(const int64_t* gates, int64_t count, int64_t value) {
  uint64_t other = 0;
  for (int64_t i = 0; i < count; ++i) other |= static_cast<uint64_t>(gates[i] ^ value);
  return other != 0;
}

// Adds the lowest-numbered spare elements until min(kMinWidth, available) are wanted; spare is null
// where all elements are.
L0K_HD void fill_up(uint8_t* wanted, const uint8_t* spare, int64_t size, int64_t have,
                    int64_t available) {
  int64_t missing = std::min(kMinWidth, available) - have;
  for (int64_t i = 0; i < size && missing > 0; ++i) {
    if (wanted[i] || (spare != nullptr && !spare[i])) continue;
    wanted[i] = 1;
    --missing;
  }
}

L0K_HD int64_t count_set(const uint8_t* flags, int64_t size) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += flags[i];
  return count;
}

// Open gates and dummies of every group, then the gate that is always open.
template <typename T>
L0K_HD std::vector<uint8_t> kept_gates(const T* z, int64_t gates, const Layout& layout) {
  std::vector<uint8_t> kept(gates + 1);
  for (int64_t j = 0; j < gates; ++j) kept[j] = z[j] != T(0);
  kept[gates] = 1;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t begin = layout.group_offsets[g];
    const int64_t size = layout.group_offsets[g + 1] - begin;
    fill_up(&kept[begin], nullptr, size, count_set(&kept[begin], size), size);
  }
  return kept;
}

// A port where everything that arrives is packed.
L0K_HD int64_t list_arriving(const uint8_t* kept, const int64_t* born, int64_t size, int64_t* index,
                             int64_t* position) {
  int64_t count = 0;
  for (int64_t f = 0; f < size; ++f) {
    index[count] = f;
    count += kept[born[f]];
  }
  for (int64_t i = 0; i < count; ++i) position[i] = i;
  return count;
}

// A port with extra gates, where some features that arrive are not packed.
template <typename T>
L0K_HD int64_t list_selected(const T* z, const uint8_t* kept, const int64_t* born,
                             const int64_t* extra, int64_t size, int64_t* index,
                             int64_t* position) {
  std::vector<uint8_t> arriving(size), wanted(size);
  for (int64_t f = 0; f < size; ++f) {
    arriving[f] = kept[born[f]];
    wanted[f] = arriving[f] && z[born[f]] * z[extra[f]] != T(0);
  }
  fill_up(wanted.data(), arriving.data(), size, count_set(wanted.data(), size),
          count_set(arriving.data(), size));
  int64_t count = 0;
  int64_t rank = 0;
  for (int64_t f = 0; f < size; ++f) {
    index[count] = f;
    position[count] = rank;
    count += wanted[f];
    rank += arriving[f];
  }
  return count;
}

template <typename T>
L0K_HD void fill_lists(const T* z, int64_t gates, const Layout& layout, const Lists& lists) {
  check_offsets("group_offsets", layout.group_offsets, layout.groups, gates);
  check_offsets("port_offsets", layout.port_offsets, layout.ports, layout.features);
  require(all_within(layout.born, layout.features, gates) &&
              all_within(layout.extra, layout.features, gates),
          "maps: expected gates from 0 to ", gates);
  const std::vector<uint8_t> kept = kept_gates(z, gates, layout);
  for (int64_t p = 0; p < layout.ports; ++p) {
    const int64_t begin = layout.port_offsets[p];
    const int64_t size = layout.port_offsets[p + 1] - begin;
    const int64_t* born = layout.born + begin;
    const int64_t* extra = layout.extra + begin;
    int64_t* index = lists.index + begin;
    int64_t* position = lists.position + begin;
    const int64_t count = any_other(extra, size, gates)
                              ? list_selected(z, kept.data(), born, extra, size, index, position)
                              : list_arriving(kept.data(), born, size, index, position);
    std::fill(index + count, index + size, 0);
    std::fill(position + count, position + size, 0);
    lists.counts[p] = count;
  }
}

L0K_FOR_EACH_ISA(fill_lists_f32, fill_lists,
                 (const float* z, int64_t gates, const Layout& layout, const Lists& lists),
                 (z, gates, layout, lists))
L0K_FOR_EACH_ISA(fill_lists_f64, fill_lists,
                 (const double* z, int64_t gates, const Layout& layout, const Lists& lists),
                 (z, gates, layout, lists))

// ---- operators ----

using ListTensors = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
ListTensors make_lists(const T* z, int64_t gates, const Tensor& group_offsets, const Tensor& maps,
                       const Tensor& port_offsets) {
  const Tensor groups = dense(group_offsets);
  const Tensor features = dense(maps);
  const Tensor ports = dense(port_offsets);
  const int64_t width = maps.size(1);
  const Layout layout{data<int64_t>(groups),
                      groups.size(0) - 1,
                      data<int64_t>(features),
                      data<int64_t>(features) + width,
                      width,
                      data<int64_t>(ports),
                      ports.size(0) - 1};
  Tensor index = uninitialized(maps, {width});
  Tensor position = uninitialized(maps, {width});
  Tensor counts = uninitialized(maps, {layout.ports});
  const Lists lists{out<int64_t>(index), out<int64_t>(position), out<int64_t>(counts)};
  if constexpr (std::is_same_v<T, double>) {
    fill_lists_f64(z, gates, layout, lists);
  } else {
    fill_lists_f32(z, gates, layout, lists);
  }
  return {index, position, counts};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample(const Tensor& log_alpha,
                                                          const Tensor& key, const Tensor& cost,
                                                          const Tensor& group_offsets,
                                                          const Tensor& maps,
                                                          const Tensor& port_offsets, int64_t law,
                                                          double beta, double gamma, double zeta) {
  const Draw draw = make_draw(key, law, beta, gamma, zeta);
  const Tensor la = dense(log_alpha);
  const Tensor costs = dense(cost);
  const int64_t gates = la.size(0);
  Tensor z = uninitialized(la, {gates + 1});
  Tensor expected = uninitialized(la, {});
  std::vector<double> sums(chunks_of(gates));
  std::vector<int64_t> nans(chunks_of(gates));
  run_chunks(
      Forward<T>{draw, data<T>(la), data<T>(costs), out<T>(z), sums.data(), nans.data(), gates});
  const int64_t all_nans = std::accumulate(nans.begin(), nans.end(), int64_t{0});
  if (all_nans > 0) fail_on_nan(data<T>(la), gates, all_nans);
  out<T>(z)[gates] = T(1);
  *out<T>(expected) = static_cast<T>(std::accumulate(sums.begin(), sums.end(), 0.0));
  return std::tuple_cat(std::make_tuple(z, expected),
                        make_lists(data<T>(z), gates, group_offsets, maps, port_offsets));
}

template <typename T>
Tensor sample_backward(const Tensor& log_alpha, const Tensor& key, const Tensor& cost,
                       const std::optional<Tensor>& grad_z,
                       const std::optional<Tensor>& grad_expected, int64_t law, double beta,
                       double gamma, double zeta) {
  const Draw draw = make_draw(key, law, beta, gamma, zeta);
  const Tensor la = dense(log_alpha);
  const Tensor costs = dense(cost);
  const Tensor upstream = grad_z ? dense(*grad_z) : Tensor();
  const T* upstream_data = grad_z ? data<T>(upstream) : nullptr;
  const double scale = grad_expected ? static_cast<double>(*data<T>(*grad_expected)) : 0.0;
  const int64_t gates = la.size(0);
  Tensor grad = uninitialized(la, {gates});
  run_chunks(
      Backward<T>{draw, data<T>(la), data<T>(costs), upstream_data, scale, out<T>(grad), gates});
  return grad;
}

template <typename T>
Tensor arm(const Tensor& difference, const Tensor& factor, const Tensor& key) {
  const NoiseStream stream = make_stream(key);
  const Tensor factors = dense(factor);
  const int64_t gates = factors.size(0);
  Tensor grad = uninitialized(factors, {gates});
  const double scale = static_cast<double>(*data<T>(difference));
  run_chunks(Arm<T>{stream, scale, data<T>(factors), out<T>(grad), gates});
  return grad;
}

Tensor example_noise(Tensor key, int64_t examples, int64_t gates, int64_t first, int64_t stride) {
  NoiseStream stream = make_stream(key);
  stream.row = static_cast<uint32_t>(first);
  const Tensor k = torch::stable::new_empty(key, {examples, gates}, ScalarType::Int);
  const Noise noise{stream, stride, gates, chunks_of(gates), out<int32_t>(k)};
  torch::stable::parallel_for(0, examples * noise.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) noise_k32(noise, chunk);
  });
  return k;
}

bool is_double(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Double || type == ScalarType::Float,
          "expected float32 or float64 gates");
  return type == ScalarType::Double;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_gates(Tensor log_alpha, Tensor key,
                                                                Tensor cost, Tensor group_offsets,
                                                                Tensor maps, Tensor port_offsets,
                                                                int64_t law, double beta,
                                                                double gamma, double zeta) {
  const auto run = is_double(log_alpha) ? sample<double> : sample<float>;
  return run(log_alpha, key, cost, group_offsets, maps, port_offsets, law, beta, gamma, zeta);
}

Tensor sample_gates_backward(Tensor log_alpha, Tensor key, Tensor cost,
                             std::optional<Tensor> grad_z, std::optional<Tensor> grad_expected,
                             int64_t law, double beta, double gamma, double zeta) {
  const auto run = is_double(log_alpha) ? sample_backward<double> : sample_backward<float>;
  return run(log_alpha, key, cost, grad_z, grad_expected, law, beta, gamma, zeta);
}

Tensor arm_gradient_cpu(Tensor difference, Tensor factor, Tensor key) {
  return is_double(factor) ? arm<double>(difference, factor, key)
                           : arm<float>(difference, factor, key);
}

ListTensors open_lists(Tensor z, Tensor group_offsets, Tensor maps, Tensor port_offsets) {
  const Tensor gates = dense(z);
  const int64_t count = gates.size(0) - 1;
  return is_double(z) ? make_lists(data<double>(gates), count, group_offsets, maps, port_offsets)
                      : make_lists(data<float>(gates), count, group_offsets, maps, port_offsets);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("sample_gates", TORCH_BOX(&sample_gates));
  m.impl("sample_gates_backward", TORCH_BOX(&sample_gates_backward));
  m.impl("arm_gradient", TORCH_BOX(&arm_gradient_cpu));
  m.impl("example_noise", TORCH_BOX(&example_noise));
  m.impl("open_lists", TORCH_BOX(&open_lists));
}

}  // namespace l0k
