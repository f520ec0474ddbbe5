// SPDX-License-Identifier: Apache-2.0
// Matrix products over open features that are read in place: the kernels of gated_linear and
// gated_conv2d.
//
// A block computes one tile of the result and sums over steps of kDepth numbers. Per step it brings
// one tile of either operand to shared memory, while it multiplies the tiles brought before. Rows
// and columns of the weight are found by the lists on the device; what they are multiplied by is
// folded in on the way. Grids are made for capacities, sums and stores end at the counts.
//
// A convolution is the same product: a row is a pixel of the result, and there is one pass over
// the input features per place in the kernel, each with the operand's pixels shifted.
//
// Tensor cores multiply 16-bit numbers, fused multiply-adds the others, always into sums of
// `Sum<T>`. Every sum has one order, which depends on shapes and counts alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/mma.cuh"

namespace l0k {
namespace gated {

template <typename T>
inline constexpr bool kIsHalf = sizeof(T) == 2;

// What is summed and scaled in.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Numbers in a 16-byte access.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
L0K_DEVICE Sum<T> to_sum(T number) {
  if constexpr (std::is_same_v<T, double>) {
    return number;
  } else {
    return to_float(number);
  }
}

template <typename T>
L0K_DEVICE T from_sum(Sum<T> number) {
  if constexpr (std::is_same_v<T, double>) {
    return number;
  } else {
    return from_float<T>(number);
  }
}

// What numbers are kept in: two of 16 bits share a word, the first in the lower half.
template <typename T>
using Cell = std::conditional_t<kIsHalf<T>, uint32_t, T>;
template <typename T>
inline constexpr int kGroup = kIsHalf<T> ? 2 : 1;  // numbers per cell

template <typename T>
L0K_DEVICE Cell<T> join(const T* numbers) {
  if constexpr (kIsHalf<T>) {
    uint16_t low, high;
    memcpy(&low, numbers, 2);
    memcpy(&high, numbers + 1, 2);
    return low | static_cast<uint32_t>(high) << 16;
  } else {
    return *numbers;
  }
}

template <typename T>
L0K_DEVICE T number_of(Cell<T> cell, int i) {
  if constexpr (kIsHalf<T>) {
    const uint16_t bits = static_cast<uint16_t>(i % 2 == 0 ? cell : cell >> 16);
    T number;
    memcpy(&number, &bits, 2);
    return number;
  } else {
    return cell;
  }
}

// kVector numbers.
template <typename T>
using Cells = Vector16<Cell<T>>;

template <typename T>
L0K_DEVICE Cells<T> join_all(const T* numbers) {
  Cells<T> cells;
#pragma unroll
  for (int i = 0; i < kVector<T> / kGroup<T>; ++i) cells[i] = join(numbers + i * kGroup<T>);
  return cells;
}

// Calls change(number, i) for each number and keeps what it returns.
template <typename T, typename Change>
L0K_DEVICE Cells<T> changed(const Cells<T>& cells, const Change& change) {
  T numbers[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    numbers[i] = change(number_of<T>(cells[i / kGroup<T>], i), i);
  }
  return join_all(numbers);
}

// The shape of a block's work: a tile of kM x kN results, kDepth numbers summed per step.
template <int kM_, int kN_, int kDepth_, int kThreads_, int kBlocks_>
struct Tiling {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kBlocks = kBlocks_;  // per multiprocessor, to bound registers
};

// ---- operand tiles in shared memory ----

// kRows x kDepth numbers of one operand. 16-bit numbers stand in words of two that follow each
// other in depth, as mma.sync takes them. Lines are padded so that the threads of a warp, which
// read 8 rows by 4 words, meet no bank twice.
template <typename T, int kRows, int kDepth, bool kDeep>
struct Tile {
  static constexpr int kGroups = kDepth / kGroup<T>;
  // Whether a line is a row; else it is what all rows have at one depth.
  static constexpr bool kLineIsRow = kDeep && kIsHalf<T>;
  static constexpr int kLine = kLineIsRow ? kGroups + 4 : kRows + (kIsHalf<T> ? 8 : kVector<T>);
  static constexpr int kSize = kLine * (kLineIsRow ? kRows : kGroups);

  Cell<T>* cells;

  __device__ Cell<T>* at(int row, int group) const {
    return cells + (kLineIsRow ? row * kLine + group : group * kLine + row);
  }

  // kVector numbers of one row, from a group on.
  __device__ void put_deep(int row, int group, const Cells<T>& numbers) const {
    if constexpr (kLineIsRow) {
      store16(at(row, group), numbers);
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T> / kGroup<T>; ++i) *at(row, group + i) = numbers[i];
    }
  }

  // One group of kVector rows, from a row on: numbers[g] are their g-th ones.
  __device__ void put_wide(int row, int group, const Cells<T> (&numbers)[kGroup<T>]) const {
    static_assert(!kLineIsRow);
    if constexpr (kIsHalf<T>) {
      constexpr int kCells = kVector<T> / 2;
      Cells<T> part[2];
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const uint32_t first = numbers[0][i];
        const uint32_t second = numbers[1][i];
        part[2 * i / kCells][2 * i % kCells] = (first & 0xFFFF) | second << 16;
        part[2 * i / kCells][2 * i % kCells + 1] = first >> 16 | (second & 0xFFFF0000);
      }
      store16(at(row, group), part[0]);
      store16(at(row + kCells, group), part[1]);
    } else {
      store16(at(row, group), numbers[0]);
    }
  }

  // The sum of a row.
  __device__ Sum<T> sum(int row) const {
    Sum<T> sum = 0;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      sum += to_sum(number_of<T>(*at(row, i / kGroup<T>), i));
    }
    return sum;
  }
};

// ---- products ----

// The tile's sums on tensor cores: two warps along rows, the others along columns.
template <typename T, typename Shape>
class TensorCoreProduct {
 public:
  static constexpr int kRun = 2;  // adjacent results of a thread

  // Adds the product of two tiles; results from `rows` and `columns` on need not be right.
  template <typename A, typename B>
  __device__ void add(const A& a, const B& b, int rows, int columns) {
    if (first_row() >= rows || first_column() >= columns) return;
    const int row = first_row() + lane() / 4;
    const int column = first_column() + lane() / 4;
#pragma unroll
    for (int k = lane() % 4, step = 0; step < Shape::kDepth / 16; ++step, k += 8) {
      uint32_t of_b[kColumns][2];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        of_b[j][0] = *b.at(column + 8 * j, k);
        of_b[j][1] = *b.at(column + 8 * j, k + 4);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint32_t of_a[4] = {*a.at(row + 16 * i, k), *a.at(row + 16 * i + 8, k),
                                  *a.at(row + 16 * i, k + 4), *a.at(row + 16 * i + 8, k + 4)};
#pragma unroll
        for (int j = 0; j < kColumns; ++j) mma_m16n8k16<T>(sums_[i][j], of_a, of_b[j]);
      }
    }
  }

  // Calls use(row, column, sums) for every kRun adjacent results of this thread.
  template <typename Use>
  __device__ void for_each(const Use& use) const {
    const int row = first_row() + lane() / 4;
    const int column = first_column() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        use(row + 16 * i, column + 8 * j, &sums_[i][j][0]);
        use(row + 16 * i + 8, column + 8 * j, &sums_[i][j][2]);
      }
    }
  }

 private:
  static constexpr int kWarpM = Shape::kM / 2;
  static constexpr int kWarpN = Shape::kN / (Shape::kThreads / 64);
  static constexpr int kRows = kWarpM / 16;
  static constexpr int kColumns = kWarpN / 8;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int first_row() { return threadIdx.x / 32 % 2 * kWarpM; }
  __device__ static int first_column() { return threadIdx.x / 64 * kWarpN; }

  float sums_[kRows][kColumns][4] = {};
};

// The tile's sums by fused multiply-adds: kSide x kSide results per thread.
template <typename T, typename Shape>
class ScalarProduct {
 public:
  static constexpr int kRun = kVector<T>;

  template <typename A, typename B>
  __device__ void add(const A& a, const B& b, int, int) {
#pragma unroll
    for (int k = 0; k < Shape::kDepth; ++k) {
      T of_a[kSide], of_b[kSide];
#pragma unroll
      for (int i = 0; i < kSide; i += kRun) {
        load_run(a.at(row(i), k), of_a + i);
        load_run(b.at(column(i), k), of_b + i);
      }
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) sums_[i][j] = fused(of_a[i], of_b[j], sums_[i][j]);
      }
    }
  }

  template <typename Use>
  __device__ void for_each(const Use& use) const {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; j += kRun) use(row(i), column(j), &sums_[i][j]);
    }
  }

 private:
  static constexpr int kSide = std::is_same_v<T, double> ? 4 : 8;
  static constexpr int kAcross = Shape::kN / kSide;
  static constexpr int kDown = Shape::kM / kSide;
  static_assert(kAcross * kDown == Shape::kThreads);

  // A thread's results stand in runs of kRun, and runs of adjacent threads side by side.
  __device__ static int place(int thread, int threads, int i) {
    return (i / kRun * threads + thread) * kRun + i % kRun;
  }
  __device__ static int row(int i) { return place(threadIdx.x / kAcross, kDown, i); }
  __device__ static int column(int j) { return place(threadIdx.x % kAcross, kAcross, j); }

  __device__ static T fused(T a, T b, T sum) {
    if constexpr (std::is_same_v<T, double>) {
      return fma(a, b, sum);
    } else {
      return fmaf(a, b, sum);
    }
  }

  __device__ static void load_run(const T* from, T* to) {
    const Vector16<T> run = load16(from);
#pragma unroll
    for (int i = 0; i < kRun; ++i) to[i] = run[i];
  }

  T sums_[kSide][kSide] = {};
};

template <typename T, typename Shape>
using Product =
    std::conditional_t<kIsHalf<T>, TensorCoreProduct<T, Shape>, ScalarProduct<T, Shape>>;

// ---- rows of the result and of the operand ----

// Division of numbers below 2^31 by one that is known before.
class Divider {
 public:
  Divider() = default;
  explicit Divider(uint32_t divisor) : divisor_(divisor), shift_(0) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t above = (uint64_t{1} << shift_) - divisor;
    multiplier_ = static_cast<uint32_t>((above << 32) / divisor + 1);
  }

  __device__ int quotient(int number) const {
    const uint32_t n = static_cast<uint32_t>(number);
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier_ >> 32);
    return static_cast<int>((high + n) >> shift_);
  }
  __device__ int rest(int number, int its_quotient) const {
    return number - its_quotient * static_cast<int>(divisor_);
  }

 private:
  uint32_t divisor_, multiplier_, shift_;
};

// One of the two sides of an image. Place q of the result's rows, at place t in the kernel, reads
// operand pixel q mul + (base + phase + t step) / per, and none if that is not a whole number; it
// is pixel q per + phase of the result. Forward, per is 1; in the other direction it is the
// convolution's stride, and the rows of a block have one phase, so that they read or skip together.
struct Side {
  int places;   // per phase
  int sources;  // pixels of the operand
  int targets;  // pixels of the result
  int mul, base, step, per;
  int kernel;
  int period;        // of the places in the kernel that are read
  int period_shift;  // period step / per
};

// The places in the kernel that one phase reads, and how far each shifts the pixels.
struct Taps {
  int first, end, period, shift, period_shift;

  Taps() = default;
  __device__ Taps(const Side& side, int phase)
      : first(0), end(side.kernel), period(side.period), period_shift(side.period_shift) {
    int numerator = side.base + phase;
    for (; first < end && numerator % side.per != 0; numerator += side.step) ++first;
    shift = numerator / side.per;
  }
  __device__ int count() const { return (end - first + period - 1) / period; }
};

// Rows of a matrix: row m of the result is made of row m of the operand.
struct PlainRows {
  int rows;

  using Row = int;
  struct Shift {};

  static constexpr int phases() { return 1; }
  __host__ __device__ int count() const { return rows; }
  __device__ PlainRows in_phase(int) const { return *this; }
  __device__ Row row(int m) const { return m < rows ? m : -1; }
  static __device__ Taps taps_high() { return one_tap(); }
  static __device__ Taps taps_wide() { return one_tap(); }
  static __device__ Shift shift(int, int) { return {}; }
  __device__ int source(Row row, Shift) const { return row; }
  __device__ int target(int m) const { return row(m); }

 private:
  static __device__ Taps one_tap() {
    Taps taps;
    taps.first = taps.shift = taps.period_shift = 0;
    taps.end = taps.period = 1;
    return taps;
  }
};

// Rows of an image: pixels of the result, made of pixels of the operand.
struct WindowRows {
  Side high, wide;
  int images;
  Divider by_wide, by_image;
  int phase_high, phase_wide;

  struct Row {
    int image;  // its first pixel in the operand, -1: no such row
    int high, wide;
  };
  struct Shift {
    int high, wide;
  };

  __host__ __device__ int phases() const { return high.per * wide.per; }
  __host__ __device__ int count() const { return images * high.places * wide.places; }  // per phase

  __device__ WindowRows in_phase(int phase) const {
    WindowRows window = *this;
    window.phase_high = phase / wide.per;
    window.phase_wide = phase % wide.per;
    return window;
  }
  __device__ Taps taps_high() const { return Taps(high, phase_high); }
  __device__ Taps taps_wide() const { return Taps(wide, phase_wide); }
  static __device__ Shift shift(int high, int wide) { return {high, wide}; }
  __device__ Row row(int m) const {
    if (m >= count()) return {-1, 0, 0};
    const int image = by_image.quotient(m);
    const int place = by_image.rest(m, image);
    const int q = by_wide.quotient(place);
    return {image * high.sources * wide.sources, q * high.mul, by_wide.rest(place, q) * wide.mul};
  }
  __device__ int source(Row row, Shift shift) const {
    const int h = row.high + shift.high;
    const int w = row.wide + shift.wide;
    const bool inside = row.image >= 0 && 0 <= h && h < high.sources && 0 <= w && w < wide.sources;
    return inside ? row.image + h * wide.sources + w : -1;
  }
  __device__ int target(int m) const {
    if (m >= count()) return -1;
    const int image = by_image.quotient(m);
    const int place = by_image.rest(m, image);
    const int q = by_wide.quotient(place);
    const int h = q * high.per + phase_high;
    const int w = by_wide.rest(place, q) * wide.per + phase_wide;
    return h < high.targets && w < wide.targets
               ? (image * high.targets + h) * wide.targets + w
               : -1;
  }
};

// ---- what a block sums over ----

// The steps of a product over features: for every place in the kernel that the block reads, the
// features kDepth at a time.
template <typename Rows, int kDepth>
class FeatureSteps {
 public:
  __device__ FeatureSteps(const Rows& rows, int features)
      : high_taps_(rows.taps_high()),
        wide_taps_(rows.taps_wide()),
        features_(features),
        count_((features + kDepth - 1) / kDepth * high_taps_.count() * wide_taps_.count()),
        high_(high_taps_.first),
        wide_(wide_taps_.first),
        high_shift_(high_taps_.shift),
        wide_shift_(wide_taps_.shift) {}

  __device__ int count() const { return count_; }
  __device__ int first() const { return first_; }  // feature
  __device__ int next_first() const { return first_ + kDepth < features_ ? first_ + kDepth : 0; }
  __device__ int high() const { return high_; }  // place in the kernel
  __device__ int wide() const { return wide_; }
  __device__ typename Rows::Shift shift() const { return Rows::shift(high_shift_, wide_shift_); }

  __device__ void advance() {
    first_ = next_first();
    if (first_ > 0) return;
    wide_ += wide_taps_.period;
    wide_shift_ += wide_taps_.period_shift;
    if (wide_ < wide_taps_.end) return;
    wide_ = wide_taps_.first;
    wide_shift_ = wide_taps_.shift;
    high_ += high_taps_.period;
    high_shift_ += high_taps_.period_shift;
  }

 private:
  Taps high_taps_, wide_taps_;
  int features_, count_;
  int first_ = 0, high_, wide_, high_shift_, wide_shift_;
};

// The steps of a product over rows: kDepth rows at a time, from `begin` to before `end`. The step's
// number is all the state they have.
template <int kDepth>
class RowSteps {
 public:
  __device__ RowSteps(int begin, int end)
      : begin_(begin), count_(begin < end ? (end - begin + kDepth - 1) / kDepth : 0) {}

  __device__ int count() const { return count_; }
  __device__ int first(int step) const { return begin_ + step * kDepth; }
  __device__ void advance() {}

 private:
  int begin_, count_;
};

// ---- features ----

// The packed features of one axis of the weight.
template <typename S>
struct Axis {
  const int64_t* count;  // on the device; null: all features, in order, not scaled
  const int32_t* place;  // packed -> full
  const S* scale;        // of packed features; 0: a dummy
  int limit;             // no more are packed

  __device__ int width() const {
    if (count == nullptr) return limit;
    return *count < 0 ? 0 : *count < limit ? static_cast<int>(*count) : limit;
  }
};

// One packed feature; dummies, and those that do not exist, have place -1 and scale 0.
template <typename S>
struct Feature {
  int place = -1;  // in the weight
  S scale = 0;

  Feature() = default;
  __device__ Feature(const Axis<S>& axis, int packed, int width) {
    if (packed >= width) return;
    const S its_scale = axis.count == nullptr ? S(1) : axis.scale[packed];
    if (its_scale == S(0)) return;
    place = axis.count == nullptr ? packed : axis.place[packed];
    scale = its_scale;
  }
};

template <typename S, int kSize>
struct Features {
  int place[kSize];
  S scale[kSize];
};

// ---- operands ----

// A matrix whose rows are the pixels of an image, or plain rows.
template <typename T>
struct Pixels {
  const T* data;
  int line;      // numbers from one pixel to the next
  bool vectors;  // lines start at multiples of 16 bytes

  __device__ const T* at(int pixel, int first) const {
    return data + static_cast<int64_t>(pixel) * line + first;
  }

  // Numbers first .. first + kVector of a pixel, zeros if none is valid; those behind the valid
  // ones may be anything.
  __device__ Cells<T> read(int pixel, int first, int valid) const {
    const T* from = at(pixel, first);
    if (vectors && valid > 0) return load16(reinterpret_cast<const Cell<T>*>(from));
    T numbers[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) numbers[i] = i < valid ? from[i] : from_sum<T>(0);
    return join_all(numbers);
  }
};

// The operand that holds rows, summed over its features: x forward, the gradient backward.
template <typename T, typename Shape, typename Rows>
class RowOperand {
 public:
  using Tile = gated::Tile<T, Shape::kM, Shape::kDepth, true>;
  // Numbers that go to shared memory as they are get copied there, a step ahead of the weight.
  static constexpr bool kCopies = kIsHalf<T>;

  __device__ RowOperand(const Pixels<T>& numbers, const Rows& rows, int first_row, int width)
      : numbers_(numbers), rows_(rows), width_(width) {
#pragma unroll
    for (int i = 0; i < kReads; ++i) row_[i] = rows.row(first_row + row(i));
  }

  template <typename Steps>
  __device__ void copy(const Steps& at, const Tile& tile) const {
    const int first = at.first() + offset();
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const int pixel = rows_.source(row_[i], at.shift());
      const int valid = valid_of(pixel, first);
      if (numbers_.vectors) {
        const T* from = valid > 0 ? numbers_.at(pixel, first) : numbers_.data;
        copy_async_16(tile.at(row(i), group()), from, valid * static_cast<int>(sizeof(T)));
      } else {
        tile.put_deep(row(i), group(), numbers_.read(pixel, first, valid));
      }
    }
  }

  template <typename Steps>
  __device__ void fetch(const Steps& at, int) {
    const int first = at.first() + offset();
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const int pixel = rows_.source(row_[i], at.shift());
      valid_[i] = valid_of(pixel, first);
      read_[i] = numbers_.read(pixel, first, valid_[i]);
    }
  }

  __device__ void store(const Tile& tile, int) const {
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      tile.put_deep(row(i), group(), changed<T>(read_[i], [&](T number, int j) {
        return j < valid_[i] ? number : from_sum<T>(0);
      }));
    }
  }

 private:
  static constexpr int kPerRow = Shape::kDepth / kVector<T>;
  static constexpr int kReads = Shape::kM * kPerRow / Shape::kThreads;

  __device__ static int offset() { return threadIdx.x % kPerRow * kVector<T>; }
  __device__ static int group() { return offset() / kGroup<T>; }
  __device__ static int row(int i) {
    return threadIdx.x / kPerRow + i * (Shape::kThreads / kPerRow);
  }
  __device__ int valid_of(int pixel, int first) const {
    return pixel < 0 ? 0 : min(max(width_ - first, 0), kVector<T>);
  }

  const Pixels<T>& numbers_;
  const Rows& rows_;
  int width_;
  typename Rows::Row row_[kReads];
  Cells<T> read_[kReads];
  int valid_[kReads];
};

template <typename W>
struct Weight {
  const W* data;
  int64_t out, in, high, wide;  // strides
  bool vectors;  // inputs are not listed; lines of them are whole vectors and start like ones

  __device__ int out_bytes() const { return static_cast<int>(out) * static_cast<int>(sizeof(W)); }
  __device__ int in_bytes() const { return static_cast<int>(in) * static_cast<int>(sizeof(W)); }
  __device__ int64_t place(int64_t o, int64_t i, int64_t h, int64_t w) const {
    return o * out + i * in + h * high + w * wide;
  }
};

// The operand that holds the weight, its columns features of the result: outputs, summed over
// inputs (kForward), or the other way round. Gates of inputs multiply it. Columns that do not exist
// may hold anything: they only reach results that nobody reads.
template <typename T, typename W, typename Shape, bool kForward>
class WeightOperand {
 public:
  using Tile = gated::Tile<T, Shape::kN, Shape::kDepth, kForward>;
  using S = Sum<T>;
  using Summed = Features<S, Shape::kDepth>;
  using Columns = Features<S, Shape::kN>;  // those that do not exist have place 0, scale 0

  // `turns` are two tables of features; the first one is filled here. A barrier has to follow.
  __device__ WeightOperand(const Weight<W>& weight, const Axis<S>& summed, int width,
                           const Columns& columns, Summed* turns)
      : weight_(weight), summed_(summed), width_(width), columns_(columns), turns_(turns) {
    if (fills()) fill(0, Feature<S>(summed_, threadIdx.x, width_));
  }

  // Reads what the table of this step names, and the table of the next one.
  template <typename Steps>
  __device__ void fetch(const Steps& at, int step) {
    const W* from = weight_.data + weight_.place(0, 0, at.high(), at.wide());
    if (weight_.vectors) {
      fetch_vectors(from, turns_[step % 2]);
    } else {
      fetch_singly(from, turns_[step % 2]);
    }
    if (fills()) next_ = Feature<S>(summed_, at.next_first() + threadIdx.x, width_);
  }

  __device__ void store(const Tile& tile, int step) {
    if (weight_.vectors) {
      store_vectors(tile);
    } else {
      store_singly(tile, turns_[step % 2]);
    }
    if (fills()) fill((step + 1) % 2, next_);
  }

 private:
  static constexpr int kPair = kGroup<T>;
  static constexpr int kVec = kVector<T>;
  static constexpr int kNumbers = Shape::kN * Shape::kDepth / Shape::kThreads;

  // Singly, a thread reads kPair numbers of some columns (forward), or of one.
  static constexpr int kAdjacent = kForward ? Tile::kGroups : Shape::kN;
  static constexpr int kApart = Shape::kThreads / kAdjacent;
  __device__ static int column(int i) {
    return kForward ? threadIdx.x / kAdjacent + i * kApart : threadIdx.x % kAdjacent;
  }
  __device__ static int group(int i) {
    return kForward ? threadIdx.x % kAdjacent : threadIdx.x / kAdjacent + i * kApart;
  }

  // In vectors, kVec numbers of some columns (forward), or kPair of kVec adjacent columns.
  static constexpr int kVectors = (kForward ? Shape::kDepth : Shape::kN) / kVec;
  static constexpr int kVectorsApart = Shape::kThreads / kVectors;
  static constexpr int kReads = kNumbers / kVec;
  __device__ static int vector_first() { return threadIdx.x % kVectors * kVec; }
  __device__ static int vector_line(int i) {
    return kForward ? threadIdx.x / kVectors + i * kVectorsApart
                    : (threadIdx.x / kVectors + i / kPair * kVectorsApart) * kPair + i % kPair;
  }
  static constexpr int kCells = kVec / kGroup<W>;  // per vector

  __device__ static bool fills() { return threadIdx.x < Shape::kDepth; }
  __device__ void fill(int turn, const Feature<S>& feature) {
    turns_[turn].place[threadIdx.x] = feature.place;
    if (kForward) turns_[turn].scale[threadIdx.x] = feature.scale;
  }

  __device__ void fetch_singly(const W* from, const Summed& summed) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      const int place = summed.place[group(i / kPair) * kPair + i % kPair];
      const W* its_place = at(from, columns_.place[column(i / kPair)], place);
      read_[i] = place < 0 ? Cell<W>(0) : bits_of(its_place);
    }
  }

  // Strides of 32 bits, in bytes: the compiler makes one instruction of each product and sum.
  __device__ const W* at(const W* from, int column, int place) const {
    const int64_t line = kForward ? column : place;
    const int64_t feature = kForward ? place : column;
    const char* bytes = reinterpret_cast<const char*>(from) + feature * weight_.in_bytes();
    return reinterpret_cast<const W*>(bytes + line * weight_.out_bytes());
  }

  // A number alone in its cell.
  __device__ static Cell<W> bits_of(const W* from) {
    if constexpr (kIsHalf<W>) {
      return *reinterpret_cast<const uint16_t*>(from);
    } else {
      return *from;
    }
  }

  __device__ void store_singly(const Tile& tile, const Summed& summed) const {
#pragma unroll
    for (int i = 0; i < kNumbers; i += kPair) {
      T numbers[kPair];
#pragma unroll
      for (int g = 0; g < kPair; ++g) {
        const S scale = kForward ? summed.scale[group(i / kPair) * kPair + g]
                                 : columns_.scale[column(i / kPair)];
        numbers[g] = from_sum<T>(to_sum(number_of<W>(read_[i + g], 0)) * scale);
      }
      *tile.at(column(i / kPair), group(i / kPair)) = join(numbers);
    }
  }

  // Inputs are all there and not scaled.
  __device__ void fetch_vectors(const W* from, const Summed& summed) {
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const int place = summed.place[kForward ? vector_first() : vector_line(i)];
      const int column = columns_.place[kForward ? vector_line(i) : vector_first()];
      const W* its_place = at(from, column, place);
#pragma unroll
      for (int j = 0; j < kCells; j += kVector<Cell<W>>) {
        Vector16<Cell<W>> cells{};
        if (place >= 0) cells = load16(reinterpret_cast<const Cell<W>*>(its_place) + j);
#pragma unroll
        for (int c = 0; c < kVector<Cell<W>>; ++c) read_[i * kCells + j + c] = cells[c];
      }
    }
  }

  __device__ Cells<T> rounded(int read) const {
    Cells<T> cells;
#pragma unroll
    for (int i = 0; i < kVec / kPair; ++i) {
      if constexpr (std::is_same_v<T, W>) {
        cells[i] = read_[read * kCells + i];
      } else {
        T numbers[kPair];
#pragma unroll
        for (int g = 0; g < kPair; ++g) {
          numbers[g] = from_sum<T>(to_sum(read_[read * kCells + i * kPair + g]));
        }
        cells[i] = join(numbers);
      }
    }
    return cells;
  }

  __device__ void store_vectors(const Tile& tile) const {
    if constexpr (kForward) {
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        tile.put_deep(vector_line(i), vector_first() / kPair, rounded(i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kReads; i += kPair) {
        Cells<T> numbers[kPair];
#pragma unroll
        for (int g = 0; g < kPair; ++g) numbers[g] = rounded(i + g);
        tile.put_wide(vector_first(), vector_line(i) / kPair, numbers);
      }
    }
  }

  const Weight<W>& weight_;
  const Axis<S>& summed_;
  int width_;
  const Columns& columns_;
  Summed* turns_;
  Feature<S> next_;
  Cell<W> read_[kNumbers];
};

// An operand of the weight's gradient: kRows of its features, summed over rows. Numbers of features
// behind the packed ones may be anything: they only reach sums that nobody reads.
template <typename T, typename Shape, int kRows, typename Rows>
class FeatureOperand {
 public:
  using Tile = gated::Tile<T, kRows, Shape::kDepth, false>;
  static constexpr bool kCopies = false;

  __device__ FeatureOperand(const Pixels<T>& numbers, const Rows& rows, typename Rows::Shift shift,
                            int first, int width)
      : numbers_(numbers), rows_(rows), shift_(shift), first_(first), width_(width) {}

  template <typename Steps>
  __device__ void fetch(const Steps& steps, int step) {
    const int first = first_ + feature();
    const int there = min(max(width_ - first, 0), kVector<T>);
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
#pragma unroll
      for (int g = 0; g < kPair; ++g) {
        const int m = steps.first(step) + group(i) * kPair + g;
        const int pixel = rows_.source(rows_.row(m), shift_);
        read_[i][g] = numbers_.read(pixel, first, pixel < 0 ? 0 : there);
      }
    }
  }

  __device__ void store(const Tile& tile, int) const {
#pragma unroll
    for (int i = 0; i < kReads; ++i) tile.put_wide(feature(), group(i), read_[i]);
  }

 private:
  static constexpr int kPair = kGroup<T>;
  static constexpr int kAcross = kRows / kVector<T>;
  static constexpr int kApart = Shape::kThreads / kAcross;
  static constexpr int kReads = Tile::kGroups / kApart;
  static_assert(kReads * kApart == Tile::kGroups);

  __device__ static int feature() { return threadIdx.x % kAcross * kVector<T>; }
  __device__ static int group(int i) { return threadIdx.x / kAcross + i * kApart; }

  const Pixels<T>& numbers_;
  const Rows& rows_;
  typename Rows::Shift shift_;
  int first_, width_;
  Cells<T> read_[kReads][kPair];
};

// ---- the main loop ----

// Two tiles of either operand, the one at hand and the next, and one more of A that is copied.
template <typename A, typename B>
struct Stages {
  static constexpr int kOfA = A::kCopies ? 3 : 2;
  static constexpr int kBytes = (kOfA * A::Tile::kSize + 2 * B::Tile::kSize) *
                                static_cast<int>(sizeof(*A::Tile::cells));

  decltype(A::Tile::cells) memory;

  __device__ typename A::Tile a(int step) const { return {memory + step % kOfA * A::Tile::kSize}; }
  __device__ typename B::Tile b(int step) const {
    return {memory + kOfA * A::Tile::kSize + step % 2 * B::Tile::kSize};
  }
};

// Fetches one step of both operands after the other; an A that is copied is one step ahead.
template <typename A, typename B, typename Steps>
class Fetches {
 public:
  __device__ Fetches(A& a, B& b, const Steps& steps, const Stages<A, B>& stages)
      : a_(a), b_(b), stages_(stages), steps_(steps), ahead_(steps) {
    if constexpr (A::kCopies) lead(0);
  }

  __device__ void operator()(int step) {
    if constexpr (A::kCopies) lead(step + 1);
    if (step >= steps_.count()) return;
    if constexpr (!A::kCopies) a_.fetch(steps_, step);
    b_.fetch(steps_, step);
    steps_.advance();
  }

  // After the tiles of `step` were used: puts those of the next one in place.
  __device__ void store(int step) {
    if (step < steps_.count()) {
      if constexpr (!A::kCopies) a_.store(stages_.a(step), step);
      b_.store(stages_.b(step), step);
    }
    if constexpr (A::kCopies) copy_async_wait<1>();
    __syncthreads();
  }

 private:
  __device__ void lead(int step) {
    if (step < ahead_.count()) {
      a_.copy(ahead_, stages_.a(step));
      ahead_.advance();
    }
    copy_async_commit();
  }

  A& a_;
  B& b_;
  const Stages<A, B>& stages_;
  Steps steps_;  // of B, and of A if it is not ahead
  Steps ahead_;
};

// Sums products of the operands over all steps; each(tile of A) sees every tile of A once.
template <typename A, typename B, typename Steps, typename Product, typename Each>
L0K_DEVICE void sum_products(A& a, B& b, const Steps& steps, const Stages<A, B>& stages, int rows,
                             int columns, Product& product, const Each& each) {
  Fetches<A, B, Steps> fetch(a, b, steps, stages);
  fetch(0);
  fetch.store(0);
  for (int step = 0; step < steps.count(); ++step) {
    fetch(step + 1);
    product.add(stages.a(step), stages.b(step), rows, columns);
    each(stages.a(step));
    fetch.store(step + 1);
  }
}

// ---- gradients behind an activation ----

template <typename T>
struct ReluParams {
  Pixels<T> grad, y;  // lines of `capacity` numbers
  int vectors;        // of all rows
  int capacity;
  Divider by_row;        // vectors per row
  Axis<Sum<T>> outputs;  // only the count
  T* to;                 // like grad; outputs behind the packed ones stay as they are
};

constexpr int kReluThreads = 256;

// Gradients, zeroed where relu gave 0; a thread owns one vector.
template <typename T>
__global__ void L0K_BOUNDS(kReluThreads, 4) relu_gradient(const ReluParams<T> p) {
  const int vector = blockIdx.x * kReluThreads + threadIdx.x;
  const int row = p.by_row.quotient(vector);
  const int first = p.by_row.rest(vector, row) * kVector<T>;
  if (vector >= p.vectors || first >= p.outputs.width()) return;
  const int valid = min(p.capacity - first, kVector<T>);
  const Cells<T> y = p.y.read(row, first, valid);
  const Cells<T> grads = changed<T>(p.grad.read(row, first, valid), [&](T grad, int i) {
    const bool closed = to_sum(number_of<T>(y[i / kGroup<T>], i)) <= Sum<T>(0);
    return closed ? from_sum<T>(0) : grad;
  });
  T* to = p.to + static_cast<int64_t>(row) * p.capacity + first;
  if (p.grad.vectors && p.y.vectors) {
    store16(reinterpret_cast<Cell<T>*>(to), grads);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < valid) to[i] = number_of<T>(grads[i / kGroup<T>], i);
    }
  }
}

// ---- forward, and backward to the input ----

template <typename T, typename W, typename Rows>
struct LayerParams {
  Pixels<T> from;
  Weight<W> weight;
  const W* bias;  // forward; null: none
  bool relu;      // forward
  Axis<Sum<T>> summed, columns;
  Rows rows;
  T* to;
  int capacity;  // numbers per pixel of the result
  bool vectors;  // its pixels are whole vectors and start like ones
};

template <typename T, typename W, typename Shape, typename Rows, bool kForward>
struct Layer {
  using A = RowOperand<T, Shape, Rows>;
  using B = WeightOperand<T, W, Shape, kForward>;
  using Tiles = Stages<A, B>;
  static constexpr int kLine = Shape::kN + kVector<T>;  // of the result in shared memory
  static constexpr int kResultBytes = Shape::kM * kLine * static_cast<int>(sizeof(T));
  static constexpr int kBytes = Tiles::kBytes > kResultBytes ? Tiles::kBytes : kResultBytes;
};

// Writes a tile of results, one vector or number after the other.
template <typename T, typename Shape, typename Rows>
L0K_DEVICE void write_tile(const T* tile, int line, const Rows& rows, int first_row,
                           int first_column, T* to, int capacity, bool vectors) {
  constexpr int kPerRow = Shape::kN / kVector<T>;
  for (int i = threadIdx.x; i < Shape::kM * kPerRow; i += Shape::kThreads) {
    const int pixel = rows.target(first_row + i / kPerRow);
    const int offset = i % kPerRow * kVector<T>;
    const int column = first_column + offset;
    if (pixel < 0 || column >= capacity) continue;
    const Vector16<T> results = load16(tile + i / kPerRow * line + offset);
    T* its_place = to + static_cast<int64_t>(pixel) * capacity + column;
    if (vectors) {
      store16(its_place, results);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        if (column + j < capacity) its_place[j] = results[j];
      }
    }
  }
}

// What a sum becomes: outputs get bias and activation, closed features are 0.
template <bool kForward, typename S>
L0K_DEVICE S finished(S sum, bool open, S bias, bool relu) {
  if (!open) return S(0);
  if (!kForward) return sum;
  sum += bias;
  return relu && sum <= S(0) ? S(0) : sum;
}

template <typename T, typename W, typename Shape, typename Rows, bool kForward>
__global__ void L0K_BOUNDS(Shape::kThreads, Shape::kBlocks)
    layer_product(const LayerParams<T, W, Rows> p) {
  using Its = Layer<T, W, Shape, Rows, kForward>;
  using S = Sum<T>;
  L0K_SHARED(typename Its::B::Columns, columns);
  L0K_SHARED(typename Its::B::Summed, turns, [2]);
  L0K_SHARED(S, bias, [Shape::kN]);
  L0K_DYNAMIC_SHARED(Cell<T>, memory);

  // Tiles of one row of tiles follow each other, so that the rows they share stay in the cache.
  const int across = (p.capacity + Shape::kN - 1) / Shape::kN;
  const int per_phase = (p.rows.count() - 1) / Shape::kM + 1;
  const int tile = blockIdx.x / across;
  const int first_column = (blockIdx.x - tile * across) * Shape::kN;
  const Rows rows = p.rows.in_phase(tile / per_phase);
  const int first_row = tile % per_phase * Shape::kM;
  const int width = p.columns.width();
  const int used = width - first_column;
  if (threadIdx.x < Shape::kN) {
    const Feature<S> feature(p.columns, first_column + threadIdx.x, width);
    columns.place[threadIdx.x] = max(feature.place, 0);
    columns.scale[threadIdx.x] = feature.scale;
    const bool has_bias = kForward && p.bias != nullptr && feature.place >= 0;
    bias[threadIdx.x] = has_bias ? to_sum(p.bias[feature.place]) : S(0);
  }
  const int summed = used > 0 ? p.summed.width() : 0;
  typename Its::A a(p.from, rows, first_row, summed);
  typename Its::B b(p.weight, p.summed, summed, columns, turns);
  __syncthreads();
  Product<T, Shape> product;
  const FeatureSteps<Rows, Shape::kDepth> steps(rows, summed);
  sum_products(a, b, steps, typename Its::Tiles{memory}, p.rows.count() - first_row, used, product,
               [](const typename Its::A::Tile&) {});

  T* results = reinterpret_cast<T*>(memory);
  product.for_each([&](int row, int column, const S* sums) {
    constexpr int kRun = Product<T, Shape>::kRun;
    Vector<T, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const bool open = columns.scale[column + i] != S(0);
      run[i] = from_sum<T>(finished<kForward>(sums[i], open, bias[column + i], p.relu));
    }
    *reinterpret_cast<Vector<T, kRun>*>(results + row * Its::kLine + column) = run;
  });
  __syncthreads();
  write_tile<T, Shape>(results, Its::kLine, rows, first_row, first_column, p.to, p.capacity,
                       p.vectors);
}

// ---- backward to the weight ----

// Unscaled sums, packed: sums[slice][place in the kernel][output][input], where every slice adds up
// its share of the rows; scatter_weight adds the slices.
template <typename T, typename Rows>
struct WeightGradParams {
  Pixels<T> grad, x;
  Axis<Sum<T>> outputs, inputs;
  PlainRows rows;  // of grad
  Rows window;     // from its rows to the pixels of x
  int rows_per_slice;
  int places;  // in the kernel
  Sum<T>* sums;
  int64_t line;   // inputs, and some more
  double* bias;  // [slice][output]; null: not wanted
};

template <typename T, typename Shape, typename Rows>
struct WeightGrad {
  using A = FeatureOperand<T, Shape, Shape::kM, PlainRows>;
  using B = FeatureOperand<T, Shape, Shape::kN, Rows>;
  using Tiles = Stages<A, B>;
};

// How far a place in the kernel shifts pixels, forward.
inline __device__ PlainRows::Shift shift_of(const PlainRows&, int) { return {}; }
inline __device__ WindowRows::Shift shift_of(const WindowRows& window, int place) {
  const int high = place / window.wide.kernel;
  const int wide = place - high * window.wide.kernel;
  return {window.high.base + high * window.high.step, window.wide.base + wide * window.wide.step};
}

// blockIdx: tile of inputs, tile of outputs, slice and place in the kernel.
template <typename T, typename Shape, typename Rows>
__global__ void L0K_BOUNDS(Shape::kThreads, Shape::kBlocks)
    weight_product(const WeightGradParams<T, Rows> p) {
  using Its = WeightGrad<T, Shape, Rows>;
  using S = Sum<T>;
  L0K_DYNAMIC_SHARED(Cell<T>, memory);

  const int first_output = blockIdx.y * Shape::kM;
  const int first_input = blockIdx.x * Shape::kN;
  const int outputs = p.outputs.width() - first_output;
  const int inputs = p.inputs.width() - first_input;
  const int slice = blockIdx.z / p.places;
  const int place = blockIdx.z - slice * p.places;
  const bool sums_bias = p.bias != nullptr && first_input == 0 && place == 0;
  if (outputs <= 0 || (inputs <= 0 && !sums_bias)) return;

  const Rows window = p.window.in_phase(0);
  typename Its::A a(p.grad, p.rows, {}, first_output, first_output + outputs);
  typename Its::B b(p.x, window, shift_of(window, place), first_input, first_input + inputs);
  const int begin = slice * p.rows_per_slice;
  const int end = min(p.rows.rows, begin + p.rows_per_slice);
  L0K_SHARED(double, bias, [Shape::kM]);  // a thread's own number: it has no register to spare
  if (threadIdx.x < Shape::kM) bias[threadIdx.x] = 0;
  Product<T, Shape> product;
  sum_products(a, b, RowSteps<Shape::kDepth>(begin, end), typename Its::Tiles{memory}, outputs,
               inputs, product, [&](const typename Its::A::Tile& grads) {
                 if (sums_bias && threadIdx.x < Shape::kM) {
                   bias[threadIdx.x] += grads.sum(threadIdx.x);
                 }
               });

  const int64_t matrix = static_cast<int64_t>(blockIdx.z) * p.outputs.limit + first_output;
  S* sums = p.sums + matrix * p.line + first_input;
  product.for_each([&](int row, int column, const S* its_sums) {
    constexpr int kRun = Product<T, Shape>::kRun;
    if (row >= outputs || column >= inputs) return;
    Vector<S, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = its_sums[i];
    *reinterpret_cast<Vector<S, kRun>*>(sums + row * p.line + column) = run;
  });
  if (sums_bias && threadIdx.x < min(outputs, Shape::kM)) {
    p.bias[static_cast<int64_t>(slice) * p.outputs.limit + first_output + threadIdx.x] =
        bias[threadIdx.x];
  }
}

}  // namespace gated
}  // namespace l0k
