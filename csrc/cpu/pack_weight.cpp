// SPDX-License-Identifier: Apache-2.0
// pack_weight, pack_weights and their backward passes on the CPU.
//
// Weights are seen as lines (common/pack_layout.h): packing gathers within lines, and all loops run
// over adjacent numbers. A matrix whose output features lie next to each other ("transposed") is
// worked on as what it is in memory, with the input features as rows.
#include "common/host_device.h"
#include "common/pack_layout.h"
#include "cpu/common.h"
#include "cpu/pack_weight.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

namespace l0k {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kGrain = 262144;      // numbers per task below which threads do not pay
constexpr int64_t kChunk = 32768;       // numbers per chunk of the backward pass, about
constexpr int64_t kMaxChunks = 64;      // each has its own sums, added in the order of the chunks
constexpr int64_t kProductsInSum = 64;  // products summed in float32 before they go to float64
constexpr int64_t kLanes = 16;          // sums of a line that grow side by side

// What is computed in: scales, products and short sums.
template <typename Weight>
using Compute = std::conditional_t<std::is_same_v<Weight, double>, double, float>;

// ---- rows and columns ----

// One axis of a weight: which features are packed, and by which gates they are scaled.
struct Axis {
  const char* index_name;
  const char* map_name;
  AxisList list;
  int64_t full;
  int64_t packed;
  bool selects;  // else all features are packed, in order
  bool scales;

  int64_t feature(int64_t i) const { return selects ? list.index[i] : i; }
  int64_t first_gate(int64_t feature) const { return list.gates[feature]; }
  int64_t second_gate(int64_t feature) const { return list.gates[list.step + feature]; }
};

Axis make_axis(const char* index_name, const char* map_name, const AxisList& list, int64_t full) {
  const int64_t packed = list.selects ? list.packed : full;
  Axis axis{index_name, map_name, list, full, packed, list.selects, list.scales};
  if (!list.selects) return axis;
  bool within = true;
  bool in_order = axis.packed == full;
  for (int64_t i = 0; i < axis.packed; ++i) {
    within &= list.index[i] >= 0 && list.index[i] < full;
    in_order &= list.index[i] == i;
  }
  require(within, index_name, ": expected indices from 0 to ", full - 1);
  axis.selects = !in_order;  // everything is open: whole lines are faster than gathers
  return axis;
}

template <typename S>
struct Gates {
  const S* z;
  int64_t count;  // with the one that is always open
};

// The scale of every packed feature.
template <typename S>
std::vector<S> scales_of(const Axis& axis, const Gates<S>& gates) {
  std::vector<S> scales(axis.packed, S(1));
  if (!axis.scales) return scales;
  for (int64_t i = 0; i < axis.packed; ++i) {
    const int64_t a = axis.first_gate(axis.feature(i));
    const int64_t b = axis.second_gate(axis.feature(i));
    require(a >= 0 && a < gates.count && b >= 0 && b < gates.count, axis.map_name,
            ": expected gates from 0 to ", gates.count - 1);
    scales[i] = gates.z[a] * gates.z[b];
  }
  return scales;
}

// 1 for every packed feature that is open, 0 for a dummy.
template <typename S>
std::vector<S> flags_of(const Axis& axis, const Gates<S>& gates) {
  std::vector<S> flags = scales_of(axis, gates);
  for (S& flag : flags) flag = flag != S(0) ? S(1) : S(0);
  return flags;
}

template <typename S>
std::vector<uint8_t> open_rows(const Axis& axis, const Gates<S>& gates) {
  const std::vector<S> scales = scales_of(axis, gates);
  std::vector<uint8_t> open(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) open[i] = scales[i] != S(0);
  return open;
}

// Repeats every entry for the numbers that an input feature has in a line.
template <typename T>
std::vector<T> repeated(const std::vector<T>& values, int64_t times) {
  if (times == 1) return values;
  std::vector<T> all(values.size() * times);
  for (size_t i = 0; i < values.size(); ++i) {
    std::fill_n(all.begin() + static_cast<int64_t>(i) * times, times, values[i]);
  }
  return all;
}

// Where the numbers of features lie in a line.
std::vector<int32_t> places(const std::vector<int64_t>& features, int64_t inner) {
  std::vector<int32_t> all(features.size() * inner);
  int32_t* next = all.data();
  for (int64_t feature : features) {
    for (int64_t b = 0; b < inner; ++b) *next++ = static_cast<int32_t>(feature * inner + b);
  }
  return all;
}

template <typename S>
std::vector<int32_t> closed_places(const std::vector<S>& scale) {
  std::vector<int32_t> closed;
  for (size_t i = 0; i < scale.size(); ++i) {
    if (scale[i] == S(0)) closed.push_back(static_cast<int32_t>(i));
  }
  return closed;
}

// ---- forward ----

struct Pack {
  const void* weight;
  void* packed;
  int64_t lines, full_line, packed_line;
  bool plain;               // whole lines, not scaled
  bool gathers;             // else whole lines, scaled
  const int64_t* row_full;  // packed -> full
  const uint8_t* row_open;
  const void* row_scale;  // one per packed row; null: only numbers of a line are scaled
  const int32_t* gather;  // places in a full line
  const void* scale;      // one per packed number of a line
  const int32_t* closed;  // places in a packed line whose scale is 0
  int64_t closed_numbers;
};

template <typename W, typename P>
L0K_HD void copy_line(const W* __restrict from, P* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<W, P>) {
    std::memcpy(to, from, count * sizeof(P));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<P>(from[i]);
  }
}

template <typename W, typename P, typename S>
L0K_HD void scale_line(const W* __restrict from, const S* __restrict scale, S row_scale,
                       P* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<P>(static_cast<S>(from[i]) * scale[i] * row_scale);
  }
}

template <typename W, typename P, typename S>
L0K_HD void gather_line(const W* __restrict from, const int32_t* __restrict gather,
                        const S* __restrict scale, S row_scale, P* __restrict to,
                        int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<P>(static_cast<S>(from[gather[i]]) * scale[i] * row_scale);
  }
}

// Products with a closed gate: 0 times a weight would be NaN where the weight is infinite.
template <typename T>
L0K_HD void clear(T* line, const int32_t* places, int64_t count) {
  for (int64_t i = 0; i < count; ++i) line[places[i]] = T(0.0f);
}

template <typename W, typename P>
L0K_HD void pack_rows(const Pack& p, int64_t begin, int64_t end) {
  using S = Compute<W>;
  const S* scale = static_cast<const S*>(p.scale);
  for (int64_t r = begin; r < end; ++r) {
    const W* from = static_cast<const W*>(p.weight) + p.row_full[r] * p.lines * p.full_line;
    P* to = static_cast<P*>(p.packed) + r * p.lines * p.packed_line;
    if (!p.row_open[r]) {
      std::memset(to, 0, p.lines * p.packed_line * sizeof(P));
    } else if (p.plain) {
      copy_line(from, to, p.lines * p.packed_line);
    } else {
      const S row_scale = p.row_scale ? static_cast<const S*>(p.row_scale)[r] : S(1);
      for (int64_t a = 0; a < p.lines; ++a, from += p.full_line, to += p.packed_line) {
        if (p.gathers) {
          gather_line(from, p.gather, scale, row_scale, to, p.packed_line);
        } else {
          scale_line(from, scale, row_scale, to, p.packed_line);
        }
        clear(to, p.closed, p.closed_numbers);
      }
    }
  }
}

// ---- backward ----

struct Unpack {
  const void* grad;
  const void* weight;
  void* grad_weight;  // null: not wanted
  double* sums;       // <grad, weight> of every input feature, [rows] if these are rows, else
                      // [chunks, cols]; null: not wanted
  int64_t rows, cols, lines, full_line, packed_line, inner;
  int64_t rows_per_chunk;
  const int64_t* row_slot;  // full -> packed, -1 where closed
  uint8_t* written;         // rows of grad_weight that are not known to be zero; null: all
  const void* row_scale;    // one per full row; null: rows are not input features
  bool plain;               // whole lines, not scaled
  bool gathers;             // else whole lines, scaled
  const int32_t* from;      // where open numbers lie in a packed line ...
  const int32_t* to;        // ... and in a full one
  int64_t open_numbers;
  const uint16_t* masks;  // open ones of 16 numbers of a full line; null: cannot be expanded
  const void* open_scale;  // one per open number
  const void* scale;      // one per number of a full line, 0 where closed
  const int32_t* closed;  // places in a full line whose scale is 0
  int64_t closed_numbers;
};

// Lays a packed line out in a full one; closed places of `line` are 0 and stay so.
template <typename P, typename S>
L0K_HD void spread_line(const Unpack& u, const P* __restrict grad, S* __restrict line) {
  if (u.gathers) {
    for (int64_t i = 0; i < u.open_numbers; ++i) line[u.to[i]] = static_cast<S>(grad[u.from[i]]);
  } else {
    for (int64_t i = 0; i < u.full_line; ++i) line[i] = static_cast<S>(grad[i]);
    clear(line, u.closed, u.closed_numbers);
  }
}

template <typename S>
struct Scratch {
  std::vector<S> line;
  std::vector<S> products;  // short sums
  std::vector<double> total;

  explicit Scratch(int64_t size) : line(size), products(size), total(size) {}
};

template <typename S>
L0K_HD void flush(Scratch<S>& scratch) {
  S* __restrict products = scratch.products.data();
  double* __restrict total = scratch.total.data();
  const int64_t size = static_cast<int64_t>(scratch.total.size());
  for (int64_t i = 0; i < size; ++i) {
    total[i] += static_cast<double>(products[i]);
    products[i] = S(0);
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
bool can_expand() { return machine_isa() == Isa::avx512; }

// Sixteen numbers of a full line at a time: what `unpack_line` does in three sweeps, in one.
__attribute__((target("avx512f,popcnt"))) inline void expand_line(
    const Unpack& u, const float* grad, const float* weight, float row_scale, float* grad_weight,
    float* products) {
  const float* scale = static_cast<const float*>(u.open_scale);
  const __m512 rows = _mm512_set1_ps(row_scale);
  for (int64_t i = 0; i < u.full_line; i += 16) {
    const __mmask16 mask = u.masks[i / 16];
    const int count = __builtin_popcount(mask);
    const auto within = static_cast<__mmask16>((1u << std::min<int64_t>(16, u.full_line - i)) - 1);
    const auto first = static_cast<__mmask16>((1u << count) - 1);
    const __m512 open = _mm512_maskz_loadu_ps(first, grad);
    if (grad_weight != nullptr) {
      const __m512 scaled = _mm512_mul_ps(open, _mm512_maskz_loadu_ps(first, scale));
      const __m512 full = _mm512_maskz_expand_ps(mask, _mm512_mul_ps(scaled, rows));
      _mm512_mask_storeu_ps(grad_weight + i, within, full);
    }
    if (products != nullptr) {
      const __m512 full = _mm512_maskz_expand_ps(mask, open);
      const __m512 product = _mm512_mul_ps(full, _mm512_maskz_loadu_ps(within, weight + i));
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(within, products + i), product);
      _mm512_mask_storeu_ps(products + i, within, sum);
    }
    grad += count;
    scale += count;
  }
}
#else
bool can_expand() { return false; }

inline void expand_line(const Unpack&, const float*, const float*, float, float*, float*) {}
#endif

template <typename W, typename P, typename S>
L0K_HD void unpack_line(const Unpack& u, const P* grad, const W* __restrict weight, S row_scale,
                        W* __restrict grad_weight, Scratch<S>& scratch) {
  if constexpr (std::is_same_v<W, float> && std::is_same_v<P, float>) {
    if (u.masks != nullptr) {
      const bool sums = u.sums != nullptr && u.row_scale == nullptr;
      float* products = sums ? scratch.products.data() : nullptr;
      return expand_line(u, grad, weight, row_scale, grad_weight, products);
    }
  }
  const S* __restrict scale = static_cast<const S*>(u.scale);
  S* __restrict line = scratch.line.data();
  spread_line(u, grad, line);
  if (grad_weight != nullptr) {
    for (int64_t i = 0; i < u.full_line; ++i) {
      grad_weight[i] = static_cast<W>(line[i] * scale[i] * row_scale);
    }
  }
  if (u.sums != nullptr && u.row_scale == nullptr) {
    S* __restrict products = scratch.products.data();
    for (int64_t i = 0; i < u.full_line; ++i) products[i] += line[i] * static_cast<S>(weight[i]);
  }
}

// <grad, weight> over the open numbers of a line, in short sums of neighbours.
template <typename W, typename P, typename S>
L0K_HD double dot_line(const Unpack& u, const P* __restrict grad, const W* __restrict weight) {
  double total = 0;
  for (int64_t begin = 0; begin < u.open_numbers; begin += kProductsInSum * kLanes) {
    const int64_t end = std::min(u.open_numbers, begin + kProductsInSum * kLanes);
    S sums[kLanes] = {};
    for (int64_t i = begin; i < end; ++i) {
      sums[i % kLanes] += static_cast<S>(grad[u.from[i]]) * static_cast<S>(weight[u.to[i]]);
    }
    for (S sum : sums) total += static_cast<double>(sum);
  }
  return total;
}

template <typename W, typename P>
L0K_HD void unpack_rows(const Unpack& u, int64_t chunk, Scratch<Compute<W>>& scratch) {
  using S = Compute<W>;
  const int64_t end = std::min(u.rows, (chunk + 1) * u.rows_per_chunk);
  const int64_t lines_per_flush = std::max<int64_t>(1, kProductsInSum / u.lines) * u.lines;
  int64_t lines_summed = 0;
  for (int64_t row = chunk * u.rows_per_chunk; row < end; ++row) {
    const int64_t start = row * u.lines * u.full_line;
    const W* weight = static_cast<const W*>(u.weight) + start;
    W* grad_weight = u.grad_weight == nullptr ? nullptr : static_cast<W*>(u.grad_weight) + start;
    const int64_t slot = u.row_slot[row];
    const bool is_zero = u.written != nullptr && !u.written[row];
    if (u.written != nullptr) u.written[row] = slot >= 0;
    if (slot < 0) {
      if (grad_weight != nullptr && !is_zero) {
        std::memset(grad_weight, 0, u.lines * u.full_line * sizeof(W));
      }
      continue;
    }
    const P* grad = static_cast<const P*>(u.grad) + slot * u.lines * u.packed_line;
    S row_scale = S(1);
    if (u.row_scale != nullptr) {
      row_scale = static_cast<const S*>(u.row_scale)[row];
      if (u.sums != nullptr) u.sums[row] = dot_line<W, P, S>(u, grad, weight);
    }
    if (u.plain) {
      copy_line(grad, grad_weight, u.lines * u.full_line);
      continue;
    }
    for (int64_t a = 0; a < u.lines; ++a) {
      unpack_line(u, grad + a * u.packed_line, weight + a * u.full_line, row_scale,
                  grad_weight == nullptr ? nullptr : grad_weight + a * u.full_line, scratch);
    }
    lines_summed += u.lines;
    if (u.sums != nullptr && u.row_scale == nullptr && lines_summed >= lines_per_flush) {
      flush(scratch);
      lines_summed = 0;
    }
  }
  if (u.sums != nullptr && u.row_scale == nullptr) flush(scratch);
}

template <typename S>
void store_sums(const Unpack& u, int64_t chunk, Scratch<S>& scratch) {
  for (int64_t i = 0; i < u.cols; ++i) {
    double sum = 0;
    for (int64_t b = 0; b < u.inner; ++b) sum += scratch.total[i * u.inner + b];
    u.sums[chunk * u.cols + i] = sum;
  }
  std::fill(scratch.total.begin(), scratch.total.end(), 0.0);
}

// ---- one pair of functions for each pair of dtypes, compiled for several instruction sets ----

#define L0K_DTYPES(X)             \
  X(f64, double, double)          \
  X(f32, float, float)            \
  X(f32_to_bf16, float, BFloat16) \
  X(f32_to_f16, float, Half)      \
  X(bf16, BFloat16, BFloat16)     \
  X(f16, Half, Half)

#define L0K_INSTANCE(name, W, P)                                                              \
  L0K_UP_TO_AVX2(pack_##name, (pack_rows<W, P>), (const Pack& p, int64_t begin, int64_t end), \
                 (p, begin, end))                                                             \
  L0K_UP_TO_AVX2(unpack_##name, (unpack_rows<W, P>),                                          \
                 (const Unpack& u, int64_t chunk, Scratch<Compute<W>>& scratch),              \
                 (u, chunk, scratch))
L0K_DTYPES(L0K_INSTANCE)

template <typename T>
constexpr ScalarType type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
}

using PackRows = void (*)(const Pack&, int64_t, int64_t);
template <typename S>
using UnpackRows = void (*)(const Unpack&, int64_t, Scratch<S>&);

PackRows pack_function(ScalarType weight, ScalarType packed) {
#define L0K_CHOOSE(name, W, P) \
  if (weight == type_of<W>() && packed == type_of<P>()) return pack_##name;
  L0K_DTYPES(L0K_CHOOSE)
#undef L0K_CHOOSE
  require(false, "pack_weight: no kernel for this pair of dtypes");
  return nullptr;
}

template <typename S>
UnpackRows<S> unpack_function(ScalarType weight, ScalarType packed) {
#define L0K_CHOOSE(name, W, P)                                                  \
  if constexpr (std::is_same_v<S, Compute<W>>) {                                \
    if (weight == type_of<W>() && packed == type_of<P>()) return unpack_##name; \
  }
  L0K_DTYPES(L0K_CHOOSE)
#undef L0K_CHOOSE
  require(false, "pack_weight_backward: no kernel for this pair of dtypes");
  return nullptr;
}

// ---- one weight ----

struct Arguments {
  Tensor weight;  // dense
  bool channels_last;
  bool transposed;  // rows are input features
  Shape shape;
  Tensor z;  // contiguous; undefined without gates
  Axis row, col;

  const Axis& inputs() const { return transposed ? row : col; }

  // Whether all numbers of a line are packed as they are.
  bool is_plain() const { return !col.selects && !col.scales && !(transposed && row.scales); }

  // What the numbers of packed columns are multiplied by.
  template <typename S>
  std::vector<S> column_factors() const {
    return transposed ? flags_of(col, gates<S>()) : scales_of(col, gates<S>());
  }

  template <typename S>
  Gates<S> gates() const {
    return z.defined() ? Gates<S>{data<S>(z), z.size(0)} : Gates<S>{nullptr, 0};
  }
};

// A matrix stored [I, O], as a layer that multiplies by its weight from the right has it.
bool is_transposed(const Tensor& weight) {
  return weight.dim() == 2 && !has_layout(weight, false) && weight.stride(0) == 1 &&
         weight.stride(1) == weight.size(0);
}

Arguments make_arguments(const Tensor& weight, const Tensor& z, const AxisList& rows,
                         const AxisList& cols) {
  const bool channels_last = is_channels_last(weight);
  const bool transposed = is_transposed(weight);
  const Tensor stored = transposed ? torch::stable::transpose(weight, 0, 1) : weight;
  const Axis outputs = make_axis("rows", "row_map", rows, weight.size(0));
  const Axis inputs = make_axis("cols", "col_map", cols, weight.dim() > 1 ? weight.size(1) : 1);
  return {with_layout(stored, channels_last),
          channels_last,
          transposed,
          shape_of(stored, channels_last),
          z,
          transposed ? inputs : outputs,
          transposed ? outputs : inputs};
}

std::vector<int64_t> features_of(const Axis& axis) {
  std::vector<int64_t> features(axis.packed);
  for (int64_t i = 0; i < axis.packed; ++i) features[i] = axis.feature(i);
  return features;
}

template <typename S>
void run_pack(const Arguments& args, const Tensor& packed) {
  const Shape& shape = args.shape;
  const bool plain = args.is_plain();
  const std::vector<int64_t> row_full = features_of(args.row);
  const std::vector<uint8_t> row_open = open_rows(args.row, args.gates<S>());
  std::vector<S> row_scale;
  if (args.transposed) row_scale = scales_of(args.row, args.gates<S>());
  std::vector<int32_t> gather;
  std::vector<S> scale;
  if (args.col.selects) gather = places(features_of(args.col), shape.inner);
  if (!plain) scale = repeated(args.column_factors<S>(), shape.inner);
  const std::vector<int32_t> closed = closed_places(scale);

  Pack p{};
  p.weight = args.weight.const_data_ptr();
  p.packed = packed.mutable_data_ptr();
  p.lines = shape.lines;
  p.full_line = shape.line();
  p.packed_line = args.col.packed * shape.inner;
  p.plain = plain;
  p.gathers = args.col.selects;
  p.row_full = row_full.data();
  p.row_open = row_open.data();
  p.row_scale = args.transposed ? row_scale.data() : nullptr;
  p.gather = gather.data();
  p.scale = scale.data();
  p.closed = closed.data();
  p.closed_numbers = static_cast<int64_t>(closed.size());
  const PackRows run = pack_function(args.weight.scalar_type(), packed.scalar_type());
  const int64_t grain = kGrain / std::max<int64_t>(1, p.lines * p.packed_line) + 1;
  torch::stable::parallel_for(0, args.row.packed, grain,
                              [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

Tensor pack_one(const Arguments& args, ScalarType dtype) {
  const Tensor& weight = args.weight;
  std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  sizes[0] = args.row.packed;
  if (sizes.size() > 1) sizes[1] = args.col.packed;
  Tensor packed = torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
                                       format_of(args.channels_last));
  if (packed.numel() > 0 && weight.scalar_type() == ScalarType::Double) {
    run_pack<double>(args, packed);
  } else if (packed.numel() > 0) {
    run_pack<float>(args, packed);
  }
  return args.transposed ? torch::stable::transpose(packed, 0, 1) : packed;
}

// For every full row its place in the packed weight, -1 if it is closed or a dummy.
template <typename S>
std::vector<int64_t> row_slots(const Axis& row, const Gates<S>& gates) {
  const std::vector<uint8_t> open = open_rows(row, gates);
  std::vector<int64_t> slots(row.full, -1);
  int64_t repeats = 0;
  std::vector<uint8_t> seen(row.full, 0);
  for (int64_t r = 0; r < row.packed; ++r) {
    const int64_t feature = row.feature(r);
    repeats += seen[feature];
    seen[feature] = 1;
    if (open[r]) slots[feature] = r;
  }
  require(repeats == 0, row.index_name, ": expected distinct indices");
  return slots;
}

// The open columns, in packed order.
template <typename S>
struct OpenColumns {
  std::vector<int64_t> packed, full;
  std::vector<S> scale;
  std::vector<S> full_scale;  // of every full column, 0 where closed
};

template <typename S>
OpenColumns<S> open_columns(const Axis& col, const std::vector<S>& scales) {
  OpenColumns<S> open;
  open.full_scale.assign(col.full, S(0));
  std::vector<uint8_t> seen(col.full, 0);
  int64_t repeats = 0;
  for (int64_t c = 0; c < col.packed; ++c) {
    const int64_t feature = col.feature(c);
    repeats += seen[feature];
    seen[feature] = 1;
    if (scales[c] == S(0)) continue;
    open.packed.push_back(c);
    open.full.push_back(feature);
    open.scale.push_back(scales[c]);
    open.full_scale[feature] = scales[c];
  }
  require(repeats == 0, col.index_name, ": expected distinct indices");
  return open;
}

// Adds to the gradients of the gates.
template <typename S>
void add_gate_grads(const Axis& inputs, const Gates<S>& gates, const OpenColumns<S>& open,
                    const std::vector<double>& sums, int64_t chunks, std::vector<double>& grad_z) {
  for (int64_t feature : open.full) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * inputs.full + feature];
    const int64_t a = inputs.first_gate(feature);
    const int64_t b = inputs.second_gate(feature);
    grad_z[a] += sum * static_cast<double>(gates.z[b]);
    grad_z[b] += sum * static_cast<double>(gates.z[a]);
  }
}

// Of every 16 numbers of a line which are open; empty where the open numbers of a packed line do not
// follow each other from its start in the order of the full line, or the machine cannot expand.
std::vector<uint16_t> open_masks(const std::vector<int32_t>& from, const std::vector<int32_t>& to,
                                 int64_t full_line) {
  for (size_t i = 0; i < from.size(); ++i) {
    if (from[i] != static_cast<int32_t>(i) || (i > 0 && to[i] <= to[i - 1])) return {};
  }
  if (!can_expand()) return {};
  std::vector<uint16_t> masks((full_line + 15) / 16);
  for (int32_t place : to) masks[place / 16] |= static_cast<uint16_t>(1u << (place % 16));
  return masks;
}

int64_t rows_per_chunk(const Shape& shape) {
  const int64_t row = std::max<int64_t>(1, shape.lines * shape.line());
  // A chunk with fewer lines than a short sum has would go to float64 more often than others.
  const int64_t sum = kProductsInSum / std::max<int64_t>(1, shape.lines);
  return std::max({int64_t{1}, kChunk / row, (shape.rows + kMaxChunks - 1) / kMaxChunks, sum});
}

// grad_weight is undefined and grad_z null if they are not wanted.
template <typename S>
void run_unpack(const Arguments& args, const Tensor& grad, const Tensor& grad_weight,
                uint8_t* written, std::vector<double>* grad_z) {
  const Shape& shape = args.shape;
  const Axis& inputs = args.inputs();
  const bool sums_wanted = grad_z != nullptr && inputs.scales;
  const std::vector<int64_t> slots = row_slots(args.row, args.gates<S>());
  const OpenColumns<S> open = open_columns(args.col, args.column_factors<S>());
  OpenColumns<S> input_rows;
  if (args.transposed) input_rows = open_columns(args.row, scales_of(args.row, args.gates<S>()));
  const OpenColumns<S>& open_inputs = args.transposed ? input_rows : open;
  const std::vector<S> scale = repeated(open.full_scale, shape.inner);
  const std::vector<S> open_scale = repeated(open.scale, shape.inner);
  const std::vector<int32_t> closed = closed_places(scale);
  const std::vector<int32_t> from = places(open.packed, shape.inner);
  const std::vector<int32_t> to = places(open.full, shape.inner);
  std::vector<uint16_t> masks;
  if (args.col.selects) masks = open_masks(from, to, shape.line());

  Unpack u{};
  u.grad = grad.const_data_ptr();
  u.weight = args.weight.const_data_ptr();
  u.grad_weight = grad_weight.defined() ? grad_weight.mutable_data_ptr() : nullptr;
  u.rows = shape.rows;
  u.cols = shape.cols;
  u.lines = shape.lines;
  u.full_line = shape.line();
  u.packed_line = args.col.packed * shape.inner;
  u.inner = shape.inner;
  u.rows_per_chunk = rows_per_chunk(shape);
  u.row_slot = slots.data();
  u.written = written;
  u.row_scale = args.transposed ? open_inputs.full_scale.data() : nullptr;
  u.plain = args.is_plain();
  u.gathers = args.col.selects;
  u.from = from.data();
  u.to = to.data();
  u.open_numbers = static_cast<int64_t>(from.size());
  u.open_scale = open_scale.data();
  u.masks = masks.empty() ? nullptr : masks.data();
  u.scale = scale.data();
  u.closed = closed.data();
  u.closed_numbers = static_cast<int64_t>(closed.size());

  const int64_t chunks = (shape.rows + u.rows_per_chunk - 1) / u.rows_per_chunk;
  // Every row of input features lies in one chunk.
  const int64_t parts = args.transposed ? 1 : chunks;
  std::vector<double> sums(sums_wanted ? parts * inputs.full : 0);
  u.sums = sums_wanted ? sums.data() : nullptr;
  const auto run = unpack_function<S>(args.weight.scalar_type(), grad.scalar_type());
  if (u.grad_weight != nullptr || sums_wanted) {
    const int64_t chunk_numbers = u.rows_per_chunk * shape.lines * shape.line();
    const int64_t grain = kGrain / std::max<int64_t>(1, chunk_numbers) + 1;
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      Scratch<S> scratch(u.plain ? 0 : u.full_line);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        run(u, chunk, scratch);
        if (sums_wanted && !args.transposed) store_sums(u, chunk, scratch);
      }
    });
  }
  if (sums_wanted) {
    add_gate_grads(inputs, args.gates<S>(), open_inputs, sums, parts, *grad_z);
  }
}

// Computes gradients into `dense`, laid out as args.weight, unless it is undefined.
void unpack_to(const Arguments& args, const Tensor& grad, const Tensor& dense, uint8_t* written,
               std::vector<double>* grad_z) {
  const Tensor packed = args.transposed ? torch::stable::transpose(grad, 0, 1) : grad;
  const Tensor upstream = with_layout(packed, args.channels_last);
  if (args.weight.scalar_type() == ScalarType::Double) {
    run_unpack<double>(args, upstream, dense, written, grad_z);
  } else {
    run_unpack<float>(args, upstream, dense, written, grad_z);
  }
}

// The gradient of a weight in the layout that the weight has.
Tensor unpack_one(const Arguments& args, const Tensor& weight, const Tensor& grad,
                  bool need_weight, std::vector<double>* grad_z) {
  const Tensor dense = need_weight ? torch::stable::empty_like(args.weight) : Tensor();
  unpack_to(args, grad, dense, nullptr, grad_z);
  if (!need_weight) return nothing(weight);
  if (args.transposed) return torch::stable::transpose(dense, 0, 1);
  if (has_layout(weight, args.channels_last)) return dense;
  Tensor grad_weight = torch::stable::empty_like(weight);
  torch::stable::copy_(grad_weight, dense);
  return grad_weight;
}

// The gradients of the gates, summed in float64.
class GateGrads {
 public:
  GateGrads(const Tensor& z, bool needed) : z_(z), needed_(needed) {
    if (needed) sums_.assign(z.size(0), 0.0);
  }

  std::vector<double>* sums() { return needed_ ? &sums_ : nullptr; }

  // The last gate, always open, is a constant.
  Tensor tensor() const {
    const Tensor grad = uninitialized(z_, {z_.size(0)});
    if (z_.scalar_type() == ScalarType::Double) {
      store(out<double>(grad));
    } else {
      store(out<float>(grad));
    }
    return grad;
  }

 private:
  template <typename S>
  void store(S* grad) const {
    for (size_t j = 0; j < sums_.size(); ++j) grad[j] = static_cast<S>(sums_[j]);
    if (!sums_.empty()) grad[sums_.size() - 1] = S(0);
  }

  Tensor z_;
  bool needed_;
  std::vector<double> sums_;
};

// ---- operators ----

Tensor pack_weight(Tensor weight, std::optional<Tensor> z, std::optional<Tensor> rows,
                   std::optional<Tensor> row_map, std::optional<Tensor> cols,
                   std::optional<Tensor> col_map, ScalarType dtype) {
  const OwnedList row(rows, row_map);
  const OwnedList col(cols, col_map);
  return pack_one(make_arguments(weight, dense_or_nothing(z), row.list(), col.list()), dtype);
}

std::tuple<Tensor, Tensor> pack_weight_backward(Tensor grad, Tensor weight, std::optional<Tensor> z,
                                                std::optional<Tensor> rows,
                                                std::optional<Tensor> row_map,
                                                std::optional<Tensor> cols,
                                                std::optional<Tensor> col_map, bool need_weight,
                                                bool need_z) {
  const OwnedList row(rows, row_map);
  const OwnedList col(cols, col_map);
  const Tensor gates = dense_or_nothing(z);
  GateGrads grad_z(gates, need_z);
  const Arguments args = make_arguments(weight, gates, row.list(), col.list());
  const Tensor grad_weight = unpack_one(args, weight, grad, need_weight, grad_z.sums());
  return {grad_weight, need_z ? grad_z.tensor() : nothing(weight)};
}

Arguments make_arguments(const Tensor& weight, const Tensor& z, const Ports& ports, size_t i) {
  return make_arguments(weight, z, ports.rows(i, weight), ports.cols(i, weight));
}

std::vector<Tensor> pack_weights(std::vector<Tensor> weights, Tensor z, Tensor index, Tensor maps,
                                 std::vector<int64_t> spans, ScalarType dtype) {
  const Ports ports(index, maps, spans, weights.size());
  const Tensor gates = dense(z);
  std::vector<Tensor> packed;
  for (size_t i = 0; i < weights.size(); ++i) {
    packed.push_back(pack_one(make_arguments(weights[i], gates, ports, i), dtype));
  }
  return packed;
}

std::vector<Tensor> pack_weights_backward(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                          Tensor z, Tensor index, Tensor maps,
                                          std::vector<int64_t> spans,
                                          std::vector<bool> need_weights, bool need_z) {
  require_one_each(weights.size(), grads.size(), need_weights.size());
  const Ports ports(index, maps, spans, weights.size());
  const Tensor gates = dense(z);
  GateGrads grad_z(gates, need_z);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Arguments args = make_arguments(weights[i], gates, ports, i);
    results.push_back(unpack_one(args, weights[i], grads[i], need_weights[i], grad_z.sums()));
  }
  results.push_back(need_z ? grad_z.tensor() : nothing(z));
  return results;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim() && a.scalar_type() == b.scalar_type();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same && same_strides(a, b);
}

}  // namespace

Tensor unpack_weights_into(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                           const Tensor& z, const Tensor& index, const Tensor& maps,
                           const std::vector<int64_t>& spans, const std::vector<Tensor>& into,
                           const std::vector<Tensor>& written, bool need_z) {
  const Ports ports(index, maps, spans, weights.size());
  const Tensor gates = dense(z);
  GateGrads grad_z(gates, need_z);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Arguments args = make_arguments(weights[i], gates, ports, i);
    const Tensor& grad = grads[i];
    bool fits = grad.dim() == weights[i].dim() &&
                grad.size(0) == (args.transposed ? args.col : args.row).packed;
    for (int64_t d = 1; fits && d < grad.dim(); ++d) {
      fits = grad.size(d) == (d == 1 ? args.inputs().packed : weights[i].size(d));
    }
    require(fits, "grads: expected the shape of what was packed");
    const Tensor stored = args.transposed ? torch::stable::transpose(into[i], 0, 1) : into[i];
    require(same_layout(args.weight, stored), "into: expected the layout of its weight");
    require(written[i].scalar_type() == ScalarType::Bool && written[i].is_contiguous() &&
                written[i].numel() == args.shape.rows,
            "written: expected contiguous bool of shape [", args.shape.rows, "]");
    auto* rows = static_cast<uint8_t*>(written[i].mutable_data_ptr());
    unpack_to(args, grad, stored, rows, grad_z.sums());
  }
  return need_z ? grad_z.tensor() : nothing(z);
}

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("pack_weight_backward", TORCH_BOX(&pack_weight_backward));
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("pack_weights_backward", TORCH_BOX(&pack_weights_backward));
}

}  // namespace l0k
