// SPDX-License-Identifier: Apache-2.0
// pack_weight, pack_weights and their backward passes on NVIDIA GPUs.
//
// All weights of a call share a launch: the parameters of a kernel hold one item per weight, up to
// what they have room for (kMany), and every block finds its own. Weights are seen as lines
// (common/pack_layout.h). A block works on a piece of a line, in several lines; a thread keeps its
// places in the line, with what it needs to know of their columns, and goes from line to line. So
// lists, maps and gates are read once per block and not once per number.
//
// The backward pass writes every number of the full gradient once, zeros included, and one sum of
// products per block and place; a second launch adds these up for the gates. No atomics: every sum
// has one order.
//
// Nobody waits for the kernels, so they cannot raise. Features and gates out of bounds count as
// closed: nothing is read or written there. Lists must not repeat a feature.
#include "common/pack_layout.h"
#include "cuda/common.cuh"
#include "cuda/gate_sums.cuh"

#include <algorithm>
#include <tuple>

namespace l0k {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxLines = 512;     // of a block; it keeps a number for each
constexpr int kInFlight = 8;       // numbers that a thread loads before it stores any
constexpr int kPerThread = 32;     // numbers, at least, for which a thread looks up its columns
constexpr int64_t kChunks = 64;    // of a weight's lines: sums that the second launch adds
constexpr int kStrips = 4;         // of 32 columns that a warp looks at in one go
constexpr int64_t kMaxExtent = 1 << 30;  // of lines, in lines: they are counted in 32 bits
constexpr int kFew = 8;            // items of small launches, whose parameters are small too

// What is computed in: scales and products.
template <typename Weight>
using Compute = std::conditional_t<std::is_same_v<Weight, double>, double, float>;

// ---- what a launch is told ----

struct Strides {
  int64_t row, line, col, inner;
};

// One axis of a weight.
struct Features {
  const int64_t* index;  // packed -> full; may be null, see lists_all
  const int64_t* gates;  // the first gate of every feature; null: nothing is scaled
  int32_t full, packed;
};

// Whether all features are packed, in order. The index of an empty list may be null, too.
L0K_HD bool lists_all(const Features& axis) {
  return axis.index == nullptr && axis.packed == axis.full;
}

struct Item {
  const void* weight;
  const void* grad;    // of the packed weight, in the backward pass
  void* result;        // the packed weight, or the gradient of the full one; null: not wanted
  double* sums;        // [chunks, line], <grad, weight> at every place; null: not wanted
  Strides weight_at;   // and those of its gradient
  Strides grad_at;
  Features rows, cols;
  int32_t lines;       // per row
  int32_t inner;       // numbers in a line per column
  int32_t first_block;
  int32_t pieces;      // of a line; a block has one of them
  int32_t seats;       // threads side by side on a piece
  int32_t chunk_lines;  // lines of a block
  int32_t first_strip;
  bool vectors;        // each seat has as many numbers as are 16 bytes of the result, else one
  bool aligned;        // numbers that lie side by side in the source may be loaded together
};

template <int N>
struct Items {
  int32_t count;
  int32_t strips;  // 32 columns each, of the items that need sums
  Item item[N];
};

template <typename S>
struct Gates {
  const S* z;
  int64_t last;               // the gate that is always open
  int64_t row_step, col_step;  // from the first gate of a feature to its second
};

template <typename S, int N>
struct Work {
  Gates<S> gates;
  Items<N> items;
};

template <typename S, int N>
struct SumWork {
  Gates<S> gates;
  S* grad_z;
  bool adds;  // to what an earlier launch has found
  Items<N> items;
};

constexpr int kMany = (kMaxParamsBytes - sizeof(SumWork<double, 1>)) / sizeof(Item);

// The item whose blocks or strips have this one among them; `first` says where those start.
template <int N>
L0K_DEVICE int item_with(const Items<N>& items, int32_t Item::*first, int number) {
  int low = 0;
  int high = items.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (items.item[middle].*first <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The scale of a feature, 0 if it has none.
template <typename S>
L0K_DEVICE S scale_of(const Features& axis, const Gates<S>& gates, int64_t step, int64_t feature) {
  if (feature < 0 || feature >= axis.full) return S(0);
  if (axis.gates == nullptr) return S(1);
  const int64_t a = axis.gates[feature];
  const int64_t b = axis.gates[step + feature];
  const bool known = 0 <= a && a <= gates.last && 0 <= b && b <= gates.last;
  return known ? gates.z[a] * gates.z[b] : S(0);
}

L0K_DEVICE int64_t feature_of(const Features& axis, int packed) {
  return lists_all(axis) ? packed : axis.index[packed];
}

// ---- a block and its threads ----

struct Tile {
  int first_line, lines;
  int first_place, end_place;  // in these lines
  int chunk;
};

L0K_DEVICE Tile tile_of(const Item& item, int block, const Features& rows, const Features& cols,
                        int per_seat) {
  const int local = block - item.first_block;
  const int chunk = local / item.pieces;
  const int piece = local % item.pieces;
  const int width = item.seats * per_seat;
  const int first_line = chunk * item.chunk_lines;
  const int first_place = piece * width;
  return {first_line,
          min(item.chunk_lines, rows.packed * item.lines - first_line),
          first_place, min(first_place + width, cols.packed * item.inner), chunk};
}

struct Seat {
  int place;  // of the thread's first number in a line
  int side;   // its first line
  int sides;  // lines that a block works on at a time
  bool taken;
};

L0K_DEVICE Seat seat_of(const Item& item, const Tile& tile, int per_seat) {
  const int sides = kThreads / item.seats;
  const int side = static_cast<int>(threadIdx.x) / item.seats;
  const int place = tile.first_place + static_cast<int>(threadIdx.x) % item.seats * per_seat;
  return {place, side, sides, side < sides && place < tile.end_place};
}

// How many of V numbers side by side are loaded together.
template <typename T, int V>
constexpr int kPiece = V * sizeof(T) <= 16 ? V : 16 / static_cast<int>(sizeof(T));

// Numbers that lie side by side, at a multiple of their size.
template <typename S, typename T, int V>
L0K_DEVICE void load_run(const T* from, S (&to)[V]) {
  constexpr int kNumbers = kPiece<T, V>;
#pragma unroll
  for (int first = 0; first < V; first += kNumbers) {
    if constexpr (kNumbers * sizeof(T) == 16) {
      const auto piece = load16(from + first);
#pragma unroll
      for (int v = 0; v < kNumbers; ++v) to[first + v] = widen<S>(piece[v]);
    } else {
      const auto piece = *reinterpret_cast<const Vector<T, kNumbers>*>(from + first);
#pragma unroll
      for (int v = 0; v < kNumbers; ++v) to[first + v] = widen<S>(piece[v]);
    }
  }
}

// What a thread knows of its places in a line.
template <typename S, int V>
struct Columns {
  int64_t place[V];  // in a line of the source; -1 where the column is closed
  S scale[V];
  bool run;  // the places lie side by side and may be loaded together

  // `feature` counts in the source.
  L0K_DEVICE void set(int v, S its_scale, int64_t feature, int inner, const Strides& at) {
    const bool open = its_scale != S(0);
    place[v] = open ? feature * at.col + inner * at.inner : -1;
    scale[v] = open ? its_scale : S(1);
  }
};

// The numbers of a line at a thread's places; 0 where the line (start < 0) or the place is closed.
template <typename S, typename T, int V>
L0K_DEVICE void gather(const T* source, int64_t start, const Columns<S, V>& columns, S (&to)[V]) {
  if (V > 1 && columns.run && start >= 0) {
    load_run(source + start + columns.place[0], to);
    return;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool open = start >= 0 && columns.place[v] >= 0;
    to[v] = open ? widen<S>(source[start + columns.place[v]]) : S(0);
  }
}

// Whether places lie side by side, the first of them at a multiple of the numbers loaded together.
template <typename T, int V>
L0K_DEVICE bool is_run(const Item& item, const int64_t (&places)[V]) {
  bool run = item.aligned && places[0] >= 0 && places[0] % kPiece<T, V> == 0;
#pragma unroll
  for (int v = 1; v < V; ++v) run = run && places[v] == places[0] + v;
  return run;
}

// Closed lines are 0 whatever the gates of their columns are.
template <typename S, int V>
L0K_DEVICE void scale(S (&values)[V], const Columns<S, V>& columns, bool open) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = open ? values[v] * columns.scale[v] : S(0);
}

template <typename T, typename S, int V>
L0K_DEVICE void store(T* to, const S (&values)[V]) {
  if constexpr (V == 1) {
    *to = rounded<T>(values[0]);
  } else {
    Vector<T, V> vector;
#pragma unroll
    for (int v = 0; v < V; ++v) vector[v] = rounded<T>(values[v]);
    store16(to, vector);
  }
}

// ---- forward ----

// What the places of a packed line are in a full one.
template <typename W, typename S, int V>
L0K_DEVICE void find_full_places(const Item& item, const Gates<S>& gates, const Seat& seat,
                                 Columns<S, V>& columns) {
  int col = seat.place / item.inner;
  int inner = seat.place % item.inner;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t feature = feature_of(item.cols, col);
    const S scale = scale_of(item.cols, gates, gates.col_step, feature);
    columns.set(v, scale, feature, inner, item.weight_at);
    if (++inner == item.inner) {
      inner = 0;
      ++col;
    }
  }
  columns.run = is_run<W>(item, columns.place);
}

template <typename W, typename P, int V>
L0K_DEVICE void pack_tile(const Item& item, const Gates<Compute<W>>& gates, const Tile& tile,
                          const int64_t* starts) {
  using S = Compute<W>;
  const Seat seat = seat_of(item, tile, V);
  Columns<S, V> columns;
  if (seat.taken) find_full_places<W>(item, gates, seat, columns);
  __syncthreads();  // starts are written
  if (!seat.taken) return;
  const W* __restrict__ weight = static_cast<const W*>(item.weight);
  const int64_t line_size = static_cast<int64_t>(item.cols.packed) * item.inner;
  P* __restrict__ packed = static_cast<P*>(item.result) + tile.first_line * line_size + seat.place;
  constexpr int kBatch = kInFlight / V;
  for (int first = seat.side; first < tile.lines; first += seat.sides * kBatch) {
    S values[kBatch][V];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int line = first + k * seat.sides;
      gather(weight, line < tile.lines ? starts[line] : -1, columns, values[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int line = first + k * seat.sides;
      if (line >= tile.lines) break;
      scale(values[k], columns, starts[line] >= 0);
      store(packed + line * line_size, values[k]);
    }
  }
}

template <typename W, typename P, int N>
__global__ void L0K_BOUNDS(kThreads, 4) pack_items(const Work<Compute<W>, N> p) {
  L0K_SHARED(int64_t, starts, [kMaxLines]);  // of full lines, -1 where the row is closed
  constexpr int kVector = 16 / sizeof(P);
  const Item& item = p.items.item[item_with(p.items, &Item::first_block, blockIdx.x)];
  const Tile tile = tile_of(item, blockIdx.x, item.rows, item.cols, item.vectors ? kVector : 1);
  for (int i = threadIdx.x; i < tile.lines; i += kThreads) {
    const int row = (tile.first_line + i) / item.lines;
    const int line = (tile.first_line + i) % item.lines;
    const int64_t feature = feature_of(item.rows, row);
    const bool open = scale_of(item.rows, p.gates, p.gates.row_step, feature) != 0;
    starts[i] = open ? feature * item.weight_at.row + line * item.weight_at.line : -1;
  }
  if (item.vectors) {
    pack_tile<W, P, kVector>(item, p.gates, tile, starts);
  } else {
    pack_tile<W, P, 1>(item, p.gates, tile, starts);
  }
}

// ---- backward ----

// Consecutive features, and where each is in the packed list; -1: nowhere.
struct Slots {
  int first, count;
  int32_t* slot;
};

L0K_DEVICE Slots slots_of(int first_place, int end_place, int per_feature, int32_t* slot) {
  const int first = first_place / per_feature;
  return {first, (end_place - 1) / per_feature - first + 1, slot};
}

L0K_DEVICE void clear_slots(const Features& axis, const Slots& slots) {
  for (int i = threadIdx.x; i < slots.count; i += kThreads) {
    slots.slot[i] = lists_all(axis) ? slots.first + i : -1;
  }
}

L0K_DEVICE void fill_slots(const Features& axis, const Slots& slots) {
  if (lists_all(axis)) return;
  for (int i = threadIdx.x; i < axis.packed; i += kThreads) {
    const int64_t feature = axis.index[i];
    const bool here = slots.first <= feature && feature < slots.first + slots.count;
    if (here) slots.slot[feature - slots.first] = i;
  }
}

// A sum of no open column. Sums of open ones start at +0 and are -0 only by underflow, when taking
// them for this one changes nothing.
constexpr double kClosedSum = -0.0;

L0K_DEVICE bool is_closed_sum(double sum) {
  int64_t bits;
  memcpy(&bits, &sum, sizeof(bits));
  return bits == INT64_MIN;
}

// What the places of a full line are in a packed one.
template <typename P, typename S, int V>
L0K_DEVICE void find_packed_places(const Item& item, const Gates<S>& gates, const Seat& seat,
                                   const Slots& slots, Columns<S, V>& columns) {
  int col = seat.place / item.inner;
  int inner = seat.place % item.inner;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int32_t slot = slots.slot[col - slots.first];
    const S scale = slot < 0 ? S(0) : scale_of(item.cols, gates, gates.col_step, col);
    columns.set(v, scale, slot, inner, item.grad_at);
    if (++inner == item.inner) {
      inner = 0;
      ++col;
    }
  }
  columns.run = is_run<P>(item, columns.place);
}

template <typename W, typename P, int V>
L0K_DEVICE void unpack_tile(const Item& item, const Tile& tile, const Seat& seat,
                            const int64_t* starts, const Columns<Compute<W>, V>& columns,
                            double (&totals)[V]) {
  using S = Compute<W>;
#pragma unroll
  for (int v = 0; v < V; ++v) totals[v] = columns.place[v] >= 0 ? 0.0 : kClosedSum;
  const int col = seat.place / item.inner;
  const int inner = seat.place % item.inner;
  const int64_t here = col * item.weight_at.col + inner * item.weight_at.inner;
  const int64_t step = item.lines == 1 ? item.weight_at.row : item.weight_at.line;
  const int64_t offset = tile.first_line * step + here;
  const P* __restrict__ grad = static_cast<const P*>(item.grad);
  const W* __restrict__ weight = static_cast<const W*>(item.weight) + offset;
  W* __restrict__ result = static_cast<W*>(item.result);
  if (result != nullptr) result += offset;
  constexpr int kBatch = kInFlight / V;
  for (int first = seat.side; first < tile.lines; first += seat.sides * kBatch) {
    S grads[kBatch][V];
    S weights[kBatch][V] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int line = first + k * seat.sides;
      const int64_t start = line < tile.lines ? starts[line] : -1;
      gather(grad, start, columns, grads[k]);
      if (item.sums != nullptr && start >= 0) load_run(weight + line * step, weights[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int line = first + k * seat.sides;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        // What a closed column holds does not matter: 0 times an infinite weight would be NaN.
        if (columns.place[v] < 0) continue;
        totals[v] = fma(static_cast<double>(grads[k][v]), static_cast<double>(weights[k][v]),
                        totals[v]);
      }
      if (result == nullptr || line >= tile.lines) continue;
      scale(grads[k], columns, starts[line] >= 0);
      store(result + line * step, grads[k]);
    }
  }
}

// Adds what the threads side by side have found, and writes it to the tile's sums.
template <int V>
L0K_DEVICE void store_sums(const Item& item, const Tile& tile, const Seat& seat,
                           const double (&totals)[V], double* shared) {
  const int width = item.seats * V;
  if (seat.taken) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      shared[seat.side * width + seat.place - tile.first_place + v] = totals[v];
    }
  }
  __syncthreads();
  const int64_t line_size = static_cast<int64_t>(item.cols.full) * item.inner;
  double* sums = item.sums + tile.chunk * line_size + tile.first_place;
  for (int i = threadIdx.x; i < tile.end_place - tile.first_place; i += kThreads) {
    double sum = shared[i];
    for (int side = 1; side < seat.sides; ++side) sum += shared[side * width + i];
    sums[i] = sum;
  }
}

template <typename W, typename P, int V>
L0K_DEVICE void unpack_and_sum(const Item& item, const Gates<Compute<W>>& gates, const Tile& tile,
                               const int64_t* starts, const Slots& slots, double* shared) {
  const Seat seat = seat_of(item, tile, V);
  Columns<Compute<W>, V> columns;
  if (seat.taken) find_packed_places<P>(item, gates, seat, slots, columns);
  __syncthreads();  // starts are written
  double totals[V];
  if (seat.taken) unpack_tile<W, P, V>(item, tile, seat, starts, columns, totals);
  if (item.sums != nullptr) store_sums(item, tile, seat, totals, shared);
}

template <typename W, typename P, int N>
__global__ void L0K_BOUNDS(kThreads, 2) unpack_items(const Work<Compute<W>, N> p) {
  constexpr int kVector = 16 / sizeof(W);
  L0K_SHARED(int64_t, starts, [kMaxLines]);  // of packed lines, -1 where the row is closed
  L0K_SHARED(int32_t, row_slots, [kMaxLines]);
  L0K_SHARED(int32_t, col_slots, [kThreads * kVector]);
  L0K_SHARED(double, shared, [kThreads * kVector]);
  const Item& item = p.items.item[item_with(p.items, &Item::first_block, blockIdx.x)];
  const Features full_rows{nullptr, nullptr, item.rows.full, item.rows.full};
  const Features full_cols{nullptr, nullptr, item.cols.full, item.cols.full};
  const Tile tile = tile_of(item, blockIdx.x, full_rows, full_cols, item.vectors ? kVector : 1);
  const int end_line = tile.first_line + tile.lines;
  const Slots rows = slots_of(tile.first_line, end_line, item.lines, row_slots);
  const Slots cols = slots_of(tile.first_place, tile.end_place, item.inner, col_slots);
  clear_slots(item.rows, rows);
  clear_slots(item.cols, cols);
  __syncthreads();
  fill_slots(item.rows, rows);
  fill_slots(item.cols, cols);
  __syncthreads();
  for (int i = threadIdx.x; i < tile.lines; i += kThreads) {
    const int row = (tile.first_line + i) / item.lines;
    const int line = (tile.first_line + i) % item.lines;
    const int32_t slot = row_slots[row - rows.first];
    const bool open = slot >= 0 && scale_of(item.rows, p.gates, p.gates.row_step, row) != 0;
    starts[i] = open ? slot * item.grad_at.row + line * item.grad_at.line : -1;
  }
  if (item.vectors) {
    unpack_and_sum<W, P, kVector>(item, p.gates, tile, starts, cols, shared);
  } else {
    unpack_and_sum<W, P, 1>(item, p.gates, tile, starts, cols, shared);
  }
}

// ---- gradients of the gates ----

L0K_DEVICE double sum_of_column(const Item& item, int col) {
  const int chunks = (item.rows.full * item.lines + item.chunk_lines - 1) / item.chunk_lines;
  const int64_t line_size = static_cast<int64_t>(item.cols.full) * item.inner;
  const double* sums = item.sums + static_cast<int64_t>(col) * item.inner;
  const int count = chunks * item.inner;
  double total = kClosedSum;
  for (int first = 0; first < count; first += kInFlight) {
    double parts[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int i = first + k;
      parts[k] = i < count ? sums[i / item.inner * line_size + i % item.inner] : kClosedSum;
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) total += parts[k];
  }
  return total;
}

// The columns of a strip, one per lane.
struct Strip {
  int item;
  int col;
  int64_t gates[2];
};

template <typename S, int N>
L0K_DEVICE Strip strip_at(const SumWork<S, N>& p, int number) {
  const int64_t none = p.gates.last;
  if (number >= p.items.strips) return {0, 0, {none, none}};
  const int i = item_with(p.items, &Item::first_strip, number);
  const Item& item = p.items.item[i];
  const int col = (number - item.first_strip) * kWarp + static_cast<int>(threadIdx.x) % kWarp;
  if (col >= item.cols.full) return {i, 0, {none, none}};
  return {i, col, {item.cols.gates[col], item.cols.gates[p.gates.col_step + col]}};
}

template <typename S>
L0K_DEVICE void add_strip(const GateSums<kThreads>& gate_sums, const Gates<S>& gates,
                          const Item& item, const Strip& strip) {
  const int32_t place[2] = {gate_sums.place_of(strip.gates[0]),
                            gate_sums.place_of(strip.gates[1])};
  const bool here = place[0] >= 0 || place[1] >= 0;
  if (!__any_sync(kFullWarp, here)) return;
  const double sum = here ? sum_of_column(item, strip.col) : kClosedSum;
  const bool open = !is_closed_sum(sum);  // so that both gates are known ones
#pragma unroll
  for (int mine = 0; mine < 2; ++mine) {
    const bool adds = open && place[mine] >= 0;
    const double other = adds ? static_cast<double>(gates.z[strip.gates[1 - mine]]) : 0.0;
    gate_sums.add(adds ? place[mine] : -1, sum * other);
  }
}

// A block looks for its gates in the columns of all weights; a warp looks at 32 at a time.
template <typename S, int N>
__global__ void L0K_BOUNDS(kThreads, 2) sum_gates(const SumWork<S, N> p) {
  L0K_SHARED(double, sums, [kWarps][kThreads]);
  L0K_SHARED(double, values, [kWarps][kWarp]);
  L0K_SHARED(int32_t, places, [kWarps][kWarp]);
  const int warp = threadIdx.x / kWarp;
  const int64_t first_gate = static_cast<int64_t>(blockIdx.x) * kThreads;
  for (int w = 0; w < kWarps; ++w) sums[w][threadIdx.x] = 0;
  __syncthreads();
  const GateSums<kThreads> gate_sums{first_gate, p.gates.last, sums[warp], values[warp],
                                     places[warp]};
  // Strips side by side, which are likely to have gates side by side, go to different warps.
  for (int first = warp; first < p.items.strips; first += kWarps * kStrips) {
    Strip strips[kStrips];
#pragma unroll
    for (int k = 0; k < kStrips; ++k) strips[k] = strip_at(p, first + k * kWarps);
#pragma unroll
    for (int k = 0; k < kStrips; ++k) {
      add_strip(gate_sums, p.gates, p.items.item[strips[k].item], strips[k]);
    }
  }
  __syncthreads();
  const int64_t gate = first_gate + threadIdx.x;
  if (gate > p.gates.last) return;
  double total = p.adds ? static_cast<double>(p.grad_z[gate]) : 0.0;
  for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
  p.grad_z[gate] = static_cast<S>(total);
}

// ---- one weight on the host ----

// The strides of a tensor seen as lines; nothing if its kernel positions are not evenly spaced.
std::optional<Strides> strides_of(const Tensor& t, bool channels_last) {
  int64_t step = 0;
  int64_t positions = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (positions == 1) step = t.stride(d);
    if (t.stride(d) != step * positions) return std::nullopt;
    positions *= t.size(d);
  }
  const int64_t col = t.dim() > 1 ? t.stride(1) : 0;
  return channels_last ? Strides{t.stride(0), step, col, 0} : Strides{t.stride(0), 0, col, step};
}

Tensor copied(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(t, format_of(channels_last));
}

// The tensor, or a copy whose kernel positions are evenly spaced.
Tensor evenly_spaced(const Tensor& t, bool channels_last) {
  return strides_of(t, channels_last) ? t : copied(t, channels_last);
}

bool is_multiple(const void* address, int64_t of) {
  return reinterpret_cast<uintptr_t>(address) % of == 0;
}

// One weight, what of it is packed, and what is made of it.
struct Problem {
  Tensor weight;
  AxisList rows, cols;
  bool channels_last;
  Shape shape;

  Problem(const Tensor& its_weight, const AxisList& its_rows, const AxisList& its_cols)
      : weight(its_weight),
        rows(its_rows),
        cols(its_cols),
        channels_last(is_channels_last(its_weight)),
        shape(shape_of(its_weight, channels_last)) {
    require(shape.rows * shape.lines <= kMaxExtent && shape.line() <= kMaxExtent,
            "pack_weight: expected at most 2^30 lines, and at most 2^30 numbers in each");
  }

  int64_t packed_rows() const { return rows.selects ? rows.packed : shape.rows; }
  int64_t packed_cols() const { return cols.selects ? cols.packed : shape.cols; }
};

Features features_of(const AxisList& list, int64_t full) {
  return {list.selects ? list.index : nullptr, list.scales ? list.gates : nullptr,
          static_cast<int32_t>(full), static_cast<int32_t>(list.selects ? list.packed : full)};
}

Item make_item(const Problem& problem, const Tensor& weight) {
  Item item{};
  item.weight = weight.const_data_ptr();
  item.weight_at = *strides_of(weight, problem.channels_last);
  item.rows = features_of(problem.rows, problem.shape.rows);
  item.cols = features_of(problem.cols, problem.shape.cols);
  item.lines = static_cast<int32_t>(problem.shape.lines);
  item.inner = static_cast<int32_t>(problem.shape.inner);
  return item;
}

// Whether runs of `numbers` that start at multiples of it can be loaded together.
bool is_aligned(const void* address, const Strides& at, int64_t numbers, int64_t size) {
  return is_multiple(address, numbers * size) && at.row % numbers == 0 && at.line % numbers == 0;
}

// Whether all numbers of a line lie side by side.
bool has_whole_lines(const Shape& shape, const Strides& at) {
  return (shape.inner == 1 || at.inner == 1) && (shape.cols == 1 || at.col == shape.inner);
}

struct Planned {
  Item item;
  int64_t blocks;
};

// Divides lines among blocks: `chunks` of them at most, unless that is too many lines for one.
Planned plan(Item item, int64_t lines, int64_t line_size, int64_t per_seat, int64_t chunks) {
  const auto parts = [](int64_t whole, int64_t size) { return (whole + size - 1) / size; };
  const int64_t seats = parts(line_size, per_seat);
  item.pieces = static_cast<int32_t>(parts(seats, kThreads));
  item.seats = static_cast<int32_t>(parts(seats, item.pieces));
  const int64_t least = kThreads / item.seats * (kPerThread / per_seat);
  const int64_t wanted = std::max(least, parts(lines, chunks));
  item.chunk_lines = static_cast<int32_t>(std::min<int64_t>(wanted, kMaxLines));
  return {item, item.pieces * parts(lines, item.chunk_lines)};
}

// ---- launches ----

// Calls launch(items, blocks, first): once for few items, else once for as many as fit.
template <typename Launch>
void in_groups(const std::vector<Planned>& plans, const Launch& launch) {
  const auto launch_from = [&](size_t first, auto items) {
    int64_t blocks = 0;
    const size_t room = sizeof(items.item) / sizeof(Item);
    const size_t end = std::min(plans.size(), first + room);
    for (size_t i = first; i < end; ++i) {
      Item& item = items.item[items.count++];
      item = plans[i].item;
      item.first_block = static_cast<int32_t>(blocks);
      item.first_strip = items.strips;
      blocks += plans[i].blocks;
      if (item.sums != nullptr) items.strips += (item.cols.full + kWarp - 1) / kWarp;
    }
    require(blocks <= std::numeric_limits<int32_t>::max(), "pack_weight: too many blocks");
    launch(items, static_cast<unsigned>(blocks), first == 0);
    return end;
  };
  if (plans.size() <= kFew) {
    launch_from(0, Items<kFew>{});
  } else {
    for (size_t first = 0; first < plans.size();) first = launch_from(first, Items<kMany>{});
  }
}

// What all weights of a call share.
struct Shared {
  Tensor z;  // dense; undefined without gates
  int64_t row_step, col_step;
  Stream stream;

  template <typename S>
  Gates<S> gates() const {
    if (!z.defined()) return {nullptr, -1, 0, 0};
    return {data<S>(z), z.size(0) - 1, row_step, col_step};
  }
};

template <typename W, typename P>
void launch_pack(const std::vector<Planned>& plans, const Shared& shared) {
  using S = Compute<W>;
  in_groups(plans, [&](const auto& items, unsigned blocks, bool) {
    constexpr int kItems = sizeof(items.item) / sizeof(Item);
    if (blocks == 0) return;
    const Work<S, kItems> work{shared.gates<S>(), items};
    L0K_LAUNCH((pack_items<W, P, kItems>), blocks, kThreads, 0, shared.stream, work);
  });
}

template <typename W, typename P>
void launch_unpack(const std::vector<Planned>& plans, const Shared& shared, const Tensor& grad_z) {
  using S = Compute<W>;
  in_groups(plans, [&](const auto& items, unsigned blocks, bool first) {
    constexpr int kItems = sizeof(items.item) / sizeof(Item);
    const Gates<S> gates = shared.gates<S>();
    if (blocks > 0) {
      const Work<S, kItems> work{gates, items};
      L0K_LAUNCH((unpack_items<W, P, kItems>), blocks, kThreads, 0, shared.stream, work);
    }
    if (!grad_z.defined()) return;
    const SumWork<S, kItems> work{gates, out<S>(grad_z), !first, items};
    const unsigned gate_blocks = static_cast<unsigned>(gates.last / kThreads + 1);
    L0K_LAUNCH((sum_gates<S, kItems>), gate_blocks, kThreads, 0, shared.stream, work);
  });
}

// ---- all weights on the host ----

// Strides that the kernels cannot follow are copied; the copies live until the launches are made.
using Copies = std::vector<Tensor>;

Tensor empty_packed(const Problem& problem, ScalarType dtype) {
  const Tensor& weight = problem.weight;
  std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  sizes[0] = problem.packed_rows();
  if (sizes.size() > 1) sizes[1] = problem.packed_cols();
  return torch::stable::empty(sizes, dtype, std::nullopt, weight.device(), std::nullopt,
                              format_of(problem.channels_last));
}

Planned plan_pack(const Problem& problem, const Tensor& packed, Copies& copies) {
  copies.push_back(evenly_spaced(problem.weight, problem.channels_last));
  const Tensor& weight = copies.back();
  Item item = make_item(problem, weight);
  item.result = packed.mutable_data_ptr();
  const int64_t line_size = problem.packed_cols() * problem.shape.inner;
  const int64_t vector = 16 / static_cast<int64_t>(packed.element_size());
  const int64_t size = static_cast<int64_t>(weight.element_size());
  item.vectors = line_size % vector == 0 && is_multiple(item.result, 16);
  item.aligned = is_aligned(item.weight, item.weight_at, 16 / size, size);
  const int64_t lines = problem.packed_rows() * problem.shape.lines;
  return plan(item, lines, line_size, item.vectors ? vector : 1, lines);  // no sums: any chunks
}

std::vector<Tensor> pack(const std::vector<Problem>& problems, const Shared& shared,
                         ScalarType dtype) {
  std::vector<Tensor> results;
  std::vector<Planned> plans;
  Copies copies;
  for (const Problem& problem : problems) {
    results.push_back(empty_packed(problem, dtype));
    if (results.back().numel() > 0) plans.push_back(plan_pack(problem, results.back(), copies));
  }
  if (plans.empty()) return results;
  with_weight_types("pack_weight", problems[0].weight.scalar_type(), dtype, [&](auto types) {
    using T = decltype(types);
    launch_pack<typename T::Weight, typename T::Result>(plans, shared);
  });
  return results;
}

// A weight and its gradient, in the same strides, which lines can follow.
struct Gradient {
  Tensor weight;
  Tensor result;  // undefined: not wanted
  Tensor asked;   // has the strides that were asked for; the result itself unless these differ

  Gradient(const Problem& problem, bool wanted) : weight(problem.weight) {
    if (wanted) asked = torch::stable::empty_like(weight);
    result = asked;
    const auto at = strides_of(weight, problem.channels_last);
    const bool lines = at && (problem.shape.lines == 1 || problem.shape.rows == 1 ||
                              at->row == at->line * problem.shape.lines);
    if (lines && (!wanted || same_strides(weight, asked))) return;
    weight = copied(weight, problem.channels_last);
    if (wanted) result = torch::stable::empty_like(weight);
  }

  void finish() const {
    Tensor target = asked;
    if (asked.defined() && asked.get() != result.get()) torch::stable::copy_(target, result);
  }
};

Planned plan_unpack(const Problem& problem, const Tensor& grad, const Gradient& gradient,
                    Copies& copies) {
  const Tensor& weight = gradient.weight;
  copies.push_back(evenly_spaced(grad, problem.channels_last));
  const Tensor& upstream = copies.back();
  Item item = make_item(problem, weight);
  item.grad = upstream.const_data_ptr();
  item.grad_at = *strides_of(upstream, problem.channels_last);
  item.result = gradient.result.defined() ? gradient.result.mutable_data_ptr() : nullptr;
  const int64_t line_size = problem.shape.line();
  const int64_t size = static_cast<int64_t>(weight.element_size());
  const int64_t vector = 16 / size;
  item.vectors = has_whole_lines(problem.shape, item.weight_at) && line_size % vector == 0 &&
                 is_aligned(item.weight, item.weight_at, vector, size) &&
                 is_multiple(item.result, 16);
  item.aligned = is_aligned(item.grad, item.grad_at, vector,
                            static_cast<int64_t>(upstream.element_size()));
  return plan(item, problem.shape.rows * problem.shape.lines, line_size,
              item.vectors ? vector : 1, kChunks);
}

struct Needs {
  std::vector<bool> weights;
  bool z;
};

// Lets every item that the gates' gradients need have room for its sums.
Tensor with_sums(std::vector<Planned>& plans, const std::vector<bool>& wanted, const Tensor& z) {
  int64_t total = 0;
  std::vector<int64_t> first(plans.size());
  for (size_t i = 0; i < plans.size(); ++i) {
    const Item& item = plans[i].item;
    first[i] = total;
    if (wanted[i]) {
      const int64_t line_size = static_cast<int64_t>(item.cols.full) * item.inner;
      total += plans[i].blocks / item.pieces * line_size;
    }
  }
  if (total == 0) return Tensor();
  Tensor sums = torch::stable::new_empty(z, {total}, ScalarType::Double);
  for (size_t i = 0; i < plans.size(); ++i) {
    if (wanted[i]) plans[i].item.sums = out<double>(sums) + first[i];
  }
  return sums;
}

// The gradients of the weights, and of z at the end (undefined if not wanted).
std::vector<Tensor> unpack(const std::vector<Problem>& problems, const std::vector<Tensor>& grads,
                           const Shared& shared, const Needs& needs) {
  std::vector<Tensor> results;
  std::vector<Gradient> gradients;
  std::vector<Planned> plans;
  std::vector<bool> sums_wanted;
  Copies copies;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& problem = problems[i];
    gradients.emplace_back(problem, needs.weights[i]);
    const Gradient& gradient = gradients.back();
    results.push_back(needs.weights[i] ? gradient.asked : nothing(problem.weight));
    const bool sums = needs.z && problem.cols.scales && grads[i].numel() > 0;
    if (problem.weight.numel() == 0 || !(needs.weights[i] || sums)) continue;
    plans.push_back(plan_unpack(problem, grads[i], gradient, copies));
    sums_wanted.push_back(sums);
  }
  Tensor grad_z = needs.z ? uninitialized(shared.z, {shared.z.size(0)}) : Tensor();
  const Tensor sums = with_sums(plans, sums_wanted, shared.z);
  if (!plans.empty()) {
    const ScalarType weight = problems[0].weight.scalar_type();
    with_weight_types("pack_weight", weight, grads[0].scalar_type(), [&](auto types) {
      using T = decltype(types);
      launch_unpack<typename T::Weight, typename T::Result>(plans, shared,
                                                            sums.defined() ? grad_z : Tensor());
    });
  }
  if (needs.z && !sums.defined()) torch::stable::zero_(grad_z);
  for (const Gradient& gradient : gradients) gradient.finish();
  results.push_back(grad_z);
  return results;
}

// ---- operators ----

void require_same_types(const std::vector<Tensor>& tensors, const char* name) {
  for (const Tensor& tensor : tensors) {
    require(tensor.scalar_type() == tensors[0].scalar_type(), name, ": expected one dtype for all");
  }
}

Tensor pack_weight(Tensor weight, std::optional<Tensor> z, std::optional<Tensor> rows,
                   std::optional<Tensor> row_map, std::optional<Tensor> cols,
                   std::optional<Tensor> col_map, ScalarType dtype) {
  const DeviceGuard guard(weight.get_device_index());
  const OwnedList row(rows, row_map);
  const OwnedList col(cols, col_map);
  const Shared shared{dense_or_nothing(z), row.list().step, col.list().step,
                      current_stream(weight)};
  return pack({Problem(weight, row.list(), col.list())}, shared, dtype)[0];
}

std::tuple<Tensor, Tensor> pack_weight_backward(Tensor grad, Tensor weight, std::optional<Tensor> z,
                                                std::optional<Tensor> rows,
                                                std::optional<Tensor> row_map,
                                                std::optional<Tensor> cols,
                                                std::optional<Tensor> col_map, bool need_weight,
                                                bool need_z) {
  const DeviceGuard guard(weight.get_device_index());
  const OwnedList row(rows, row_map);
  const OwnedList col(cols, col_map);
  const Shared shared{dense_or_nothing(z), row.list().step, col.list().step,
                      current_stream(weight)};
  const Problem problem(weight, row.list(), col.list());
  const std::vector<Tensor> found = unpack({problem}, {grad}, shared, {{need_weight}, need_z});
  return {found[0], need_z ? found[1] : nothing(weight)};
}

std::vector<Problem> problems_of(const std::vector<Tensor>& weights, const Ports& ports) {
  require_same_types(weights, "weights");
  std::vector<Problem> problems;
  for (size_t i = 0; i < weights.size(); ++i) {
    problems.emplace_back(weights[i], ports.rows(i, weights[i]), ports.cols(i, weights[i]));
  }
  return problems;
}

std::vector<Tensor> pack_weights(std::vector<Tensor> weights, Tensor z, Tensor index, Tensor maps,
                                 std::vector<int64_t> spans, ScalarType dtype) {
  const DeviceGuard guard(z.get_device_index());
  const Ports ports(index, maps, spans, weights.size());
  const Shared shared{dense(z), maps.size(1), maps.size(1), current_stream(z)};
  return pack(problems_of(weights, ports), shared, dtype);
}

std::vector<Tensor> pack_weights_backward(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                          Tensor z, Tensor index, Tensor maps,
                                          std::vector<int64_t> spans,
                                          std::vector<bool> need_weights, bool need_z) {
  const DeviceGuard guard(z.get_device_index());
  require_one_each(weights.size(), grads.size(), need_weights.size());
  require_same_types(grads, "grads");
  const Ports ports(index, maps, spans, weights.size());
  const Shared shared{dense(z), maps.size(1), maps.size(1), current_stream(z)};
  std::vector<Tensor> found =
      unpack(problems_of(weights, ports), grads, shared, {need_weights, need_z});
  if (!need_z) found.back() = nothing(z);
  return found;
}

}  // namespace

L0K_CUDA_IMPL(m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("pack_weight_backward", TORCH_BOX(&pack_weight_backward));
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("pack_weights_backward", TORCH_BOX(&pack_weights_backward));
}

}  // namespace l0k
