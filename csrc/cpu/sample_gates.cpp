// SPDX-License-Identifier: Apache-2.0
// sample_gates, its backward pass, and open_lists on the CPU.
#include "common/gate_laws.h"
#include "cpu/common.h"

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <vector>

namespace l0k {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTile = 256;    // gates whose intermediate values stay in the first-level cache
constexpr int64_t kChunk = 8192;  // gates per task; fixed, so that sums have one order
constexpr int64_t kMinWidth = 2;  // a packed width is never below this

enum Law : int64_t { kHardConcrete = 0, kBernoulli = 1 };

struct Draw {
  NoiseStream stream;
  Law law;
  HardConcrete concrete;
  double tiny;  // the smallest normal number of the gates' dtype
};

struct Tile {
  alignas(64) int32_t k[kTile];
  alignas(64) int32_t closed_below[kTile];
  alignas(64) int32_t open_from[kTile];
  alignas(64) double log_alpha[kTile];
  alignas(64) double value[kTile];   // s, then z forward, dz/dlog_alpha backward
  alignas(64) double weight[kTile];  // P(open) forward, its derivative backward
};

// ---- one tile: plain loops that the compiler vectorises for each instruction set ----

L0K_CLONES("avx2", "avx512f")
void fill_noise(const NoiseStream& stream, int64_t first_gate, int64_t count,
                int32_t* __restrict k) {
  const uint32_t first = static_cast<uint32_t>(first_gate / 4);
  const int64_t blocks = (count + 3) / 4;
  for (int64_t i = 0; i < blocks; ++i) {
    const Words4 words = noise_words(stream, first + static_cast<uint32_t>(i));
    k[4 * i] = noise_k(words.x);
    k[4 * i + 1] = noise_k(words.y);
    k[4 * i + 2] = noise_k(words.z);
    k[4 * i + 3] = noise_k(words.w);
  }
}

// Each quantity has its own loop: in one loop the compiler would branch around the costly ones
// for saturated gates instead of vectorising.
template <typename LawType>
L0K_HD void prepare(const LawType& law, bool backward, Tile& tile) {
  for (int64_t i = 0; i < kTile; ++i) {
    tile.value[i] = concrete(law, tile.k[i], tile.log_alpha[i]);
  }
  for (int64_t i = 0; i < kTile; ++i) {
    const Odds p = odds(law, tile.log_alpha[i]);
    const Thresholds t = thresholds(law, p);
    tile.closed_below[i] = t.closed_below;
    tile.open_from[i] = t.open_from;
    tile.weight[i] = backward ? p.open * p.closed : p.open;
  }
}

template <typename LawType>
L0K_HD void values_of(const LawType& law, double tiny, Tile& tile) {
  prepare(law, false, tile);
  for (int64_t i = 0; i < kTile; ++i) {
    const Thresholds t{tile.closed_below[i], tile.open_from[i]};
    tile.value[i] = gate_value(law, tile.k[i], tile.value[i], t, tiny);
  }
}

template <typename LawType>
L0K_HD void slopes_of(const LawType& law, Tile& tile) {
  prepare(law, true, tile);
  for (int64_t i = 0; i < kTile; ++i) {
    const Thresholds t{tile.closed_below[i], tile.open_from[i]};
    tile.value[i] = gate_slope(law, tile.k[i], tile.value[i], t);
  }
}

L0K_CLONES("avx2", "avx512f")
void hard_concrete_values(const HardConcrete& law, double tiny, Tile& tile) {
  values_of(law, tiny, tile);
}

L0K_CLONES("avx2", "avx512f")
void hard_concrete_slopes(const HardConcrete& law, Tile& tile) { slopes_of(law, tile); }

L0K_CLONES("avx2", "avx512f")
void bernoulli_values(double tiny, Tile& tile) { values_of(Bernoulli{}, tiny, tile); }

L0K_CLONES("avx2", "avx512f")
void bernoulli_slopes(Tile& tile) { slopes_of(Bernoulli{}, tile); }

// ---- all gates ----

template <typename T>
void load_tile(const Draw& draw, const T* log_alpha, int64_t first, int64_t count, Tile& tile) {
  fill_noise(draw.stream, first, count, tile.k);
  for (int64_t i = 0; i < count; ++i) tile.log_alpha[i] = static_cast<double>(log_alpha[first + i]);
  for (int64_t i = count; i < kTile; ++i) tile.log_alpha[i] = 0.0;
}

// Sums in eight lanes, which the compiler may keep in one register, then the lanes in order.
struct LaneSum {
  std::array<double, 8> lanes{};

  void add(const double* values, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += values[i + lane];
    }
    for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += values[i];
  }
  double total() const {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

template <typename T>
double values_of_chunk(const Draw& draw, const T* log_alpha, const T* cost, T* z, int64_t begin,
                       int64_t end) {
  Tile tile;
  std::fill(tile.k, tile.k + kTile, 0);
  LaneSum expected;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    load_tile(draw, log_alpha, first, count, tile);
    if (draw.law == kHardConcrete) {
      hard_concrete_values(draw.concrete, draw.tiny, tile);
    } else {
      bernoulli_values(draw.tiny, tile);
    }
    for (int64_t i = 0; i < count; ++i) {
      z[first + i] = static_cast<T>(tile.value[i]);
      tile.weight[i] *= static_cast<double>(cost[first + i]);
    }
    expected.add(tile.weight, count);
  }
  return expected.total();
}

template <typename T>
void grads_of_chunk(const Draw& draw, const T* log_alpha, const T* cost, const T* grad_z,
                    double grad_expected, T* grad, int64_t begin, int64_t end) {
  Tile tile;
  std::fill(tile.k, tile.k + kTile, 0);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    load_tile(draw, log_alpha, first, count, tile);
    if (draw.law == kHardConcrete) {
      hard_concrete_slopes(draw.concrete, tile);
    } else {
      bernoulli_slopes(tile);
    }
    for (int64_t i = 0; i < count; ++i) {
      tile.weight[i] *= grad_expected * static_cast<double>(cost[first + i]);
    }
    if (grad_z != nullptr) {
      // Selected, not multiplied: a saturated gate has gradient 0 even where grad_z is infinite.
      for (int64_t i = 0; i < count; ++i) {
        const double slope = tile.value[i];
        const double part = slope * static_cast<double>(grad_z[first + i]);
        tile.weight[i] += select(slope == 0.0, 0.0, part);
      }
    }
    for (int64_t i = 0; i < count; ++i) grad[first + i] = static_cast<T>(tile.weight[i]);
  }
}

template <typename F>
void for_chunks(int64_t gates, const F& run) {
  const int64_t chunks = (gates + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      run(chunk, chunk * kChunk, std::min(gates, (chunk + 1) * kChunk));
    }
  });
}

template <typename T>
void check_no_nan(const T* values, int64_t count) {
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad += values[i] != values[i];
  if (bad == 0) return;
  int64_t first = 0;
  while (values[first] == values[first]) ++first;
  fail("log_alpha: expected no NaN; got ", bad, " of ", count, ", first at ", first);
}

template <typename T>
Draw make_draw(const Tensor& key, int64_t law, double beta, double gamma, double zeta) {
  const int64_t seed = data<int64_t>(key)[0];
  const int64_t step = data<int64_t>(key)[key.stride(0)];
  if (seed < 0) fail("seed: expected 0 <= seed < 2^63; got ", seed);
  if (step < 0 || step > std::numeric_limits<uint32_t>::max()) {
    fail("step: expected 0 <= step < 2^32; got ", step);
  }
  Draw draw{};
  draw.stream = {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), 0, 0, 0};
  draw.law = static_cast<Law>(law);
  draw.concrete = make_hard_concrete(beta, gamma, zeta);
  draw.tiny = static_cast<double>(std::numeric_limits<T>::min());
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

L0K_CLONES("avx2", "avx512f")
bool all_within(const int64_t* __restrict gates, int64_t count, uint64_t largest) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(gates[i]) > largest;
  return outside == 0;
}

L0K_CLONES("avx2", "avx512f")
bool any_other(const int64_t* __restrict gates, int64_t count, int64_t value) {
  uint64_t other = 0;
  for (int64_t i = 0; i < count; ++i) other |= static_cast<uint64_t>(gates[i] ^ value);
  return other != 0;
}

// Adds the lowest-numbered spare elements until min(kMinWidth, available) are wanted.
void fill_up(uint8_t* wanted, const uint8_t* spare, int64_t size, int64_t have, int64_t available) {
  int64_t missing = std::min(kMinWidth, available) - have;
  for (int64_t i = 0; i < size && missing > 0; ++i) {
    if (wanted[i] || !spare[i]) continue;
    wanted[i] = 1;
    --missing;
  }
}

int64_t count_set(const uint8_t* flags, int64_t size) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += flags[i];
  return count;
}

// Open gates and dummies of every group, then the gate that is always open.
template <typename T>
std::vector<uint8_t> kept_gates(const T* z, int64_t gates, const Layout& layout) {
  std::vector<uint8_t> kept(gates + 1);
  for (int64_t j = 0; j < gates; ++j) kept[j] = z[j] != T(0);
  kept[gates] = 1;
  const std::vector<uint8_t> any(gates, 1);
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t begin = layout.group_offsets[g];
    const int64_t size = layout.group_offsets[g + 1] - begin;
    fill_up(&kept[begin], any.data(), size, count_set(&kept[begin], size), size);
  }
  return kept;
}

// A port where everything that arrives is packed.
int64_t list_arriving(const uint8_t* kept, const int64_t* born, int64_t size, int64_t* index,
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
int64_t list_selected(const T* z, const uint8_t* kept, const int64_t* born, const int64_t* extra,
                      int64_t size, int64_t* index, int64_t* position) {
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
void fill_lists(const T* z, int64_t gates, const Layout& layout, const Lists& lists) {
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
    const int64_t count =
        any_other(extra, size, gates)
            ? list_selected(z, kept.data(), born, extra, size, index, position)
            : list_arriving(kept.data(), born, size, index, position);
    std::fill(index + count, index + size, 0);
    std::fill(position + count, position + size, 0);
    lists.counts[p] = count;
  }
}

// ---- operators ----

using ListTensors = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
ListTensors make_lists(const T* z, int64_t gates, const Tensor& group_offsets, const Tensor& maps,
                       const Tensor& port_offsets) {
  const Tensor groups = dense(group_offsets);
  const Tensor features = dense(maps);
  const Tensor ports = dense(port_offsets);
  const int64_t width = maps.size(1);
  const Layout layout{data<int64_t>(groups),   groups.size(0) - 1,   data<int64_t>(features),
                      data<int64_t>(features) + width, width, data<int64_t>(ports),
                      ports.size(0) - 1};
  Tensor index = torch::stable::new_empty(maps, {width});
  Tensor position = torch::stable::new_empty(maps, {width});
  Tensor counts = torch::stable::new_empty(maps, {layout.ports});
  fill_lists(z, gates, layout, {out<int64_t>(index), out<int64_t>(position), out<int64_t>(counts)});
  return {index, position, counts};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample(
    const Tensor& log_alpha, const Tensor& key, const Tensor& cost, const Tensor& group_offsets,
    const Tensor& maps, const Tensor& port_offsets, int64_t law, double beta, double gamma,
    double zeta) {
  const Draw draw = make_draw<T>(key, law, beta, gamma, zeta);
  const Tensor la = dense(log_alpha);
  const Tensor costs = dense(cost);
  const int64_t gates = la.size(0);
  check_no_nan(data<T>(la), gates);
  Tensor z = torch::stable::new_empty(la, {gates + 1});
  Tensor expected = torch::stable::new_empty(la, {});
  std::vector<double> partial((gates + kChunk - 1) / kChunk);
  for_chunks(gates, [&](int64_t chunk, int64_t begin, int64_t end) {
    partial[chunk] = values_of_chunk(draw, data<T>(la), data<T>(costs), out<T>(z), begin, end);
  });
  out<T>(z)[gates] = T(1);
  double sum = 0;
  for (double part : partial) sum += part;
  *out<T>(expected) = static_cast<T>(sum);
  return std::tuple_cat(std::make_tuple(z, expected),
                        make_lists(data<T>(z), gates, group_offsets, maps, port_offsets));
}

template <typename T>
Tensor sample_backward(const Tensor& log_alpha, const Tensor& key, const Tensor& cost,
                       const std::optional<Tensor>& grad_z,
                       const std::optional<Tensor>& grad_expected, int64_t law, double beta,
                       double gamma, double zeta) {
  const Draw draw = make_draw<T>(key, law, beta, gamma, zeta);
  const Tensor la = dense(log_alpha);
  const Tensor costs = dense(cost);
  const Tensor upstream = grad_z ? dense(*grad_z) : Tensor();
  const T* upstream_data = grad_z ? data<T>(upstream) : nullptr;
  const double scale = grad_expected ? static_cast<double>(*data<T>(*grad_expected)) : 0.0;
  const int64_t gates = la.size(0);
  Tensor grad = torch::stable::new_empty(la, {gates});
  for_chunks(gates, [&](int64_t, int64_t begin, int64_t end) {
    grads_of_chunk(draw, data<T>(la), data<T>(costs), upstream_data, scale, out<T>(grad), begin,
                   end);
  });
  return grad;
}

bool is_double(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Double || type == ScalarType::Float,
          "expected float32 or float64 gates");
  return type == ScalarType::Double;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_gates(
    Tensor log_alpha, Tensor key, Tensor cost, Tensor group_offsets, Tensor maps,
    Tensor port_offsets, int64_t law, double beta, double gamma, double zeta) {
  const auto run = is_double(log_alpha) ? sample<double> : sample<float>;
  return run(log_alpha, key, cost, group_offsets, maps, port_offsets, law, beta, gamma, zeta);
}

Tensor sample_gates_backward(Tensor log_alpha, Tensor key, Tensor cost,
                             std::optional<Tensor> grad_z, std::optional<Tensor> grad_expected,
                             int64_t law, double beta, double gamma, double zeta) {
  const auto run = is_double(log_alpha) ? sample_backward<double> : sample_backward<float>;
  return run(log_alpha, key, cost, grad_z, grad_expected, law, beta, gamma, zeta);
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
  m.impl("open_lists", TORCH_BOX(&open_lists));
}

}  // namespace l0k
