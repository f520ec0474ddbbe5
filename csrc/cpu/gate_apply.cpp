// SPDX-License-Identifier: Apache-2.0
// gate_apply and its backward pass on the CPU: one sweep each.
//
// With gates that all examples share, threads take parts of the rows, or planes, each with sums of
// its own; with gates per example they take whole examples. Rows may be narrow, so several of them
// make a line, along which scales and sums are repeated. Parts are fixed by the shape, and added in
// order, so the results have the same bits for every number of threads.
#include "common/feature_layout.h"
#include "cpu/common.h"
#include "cpu/numbers.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace l0k {
namespace {

using features::Geometry;
using torch::headeronly::ScalarType;

constexpr int64_t kGrain = 65536;   // numbers that are worth a thread; of a part of the rows, about
constexpr int64_t kMaxParts = 128;  // of rows
constexpr int64_t kLine = 1024;   // numbers that rows are joined to, at least
constexpr int64_t kLanes = 16;      // sums that a plane is spread over
constexpr int64_t kBlock = 1024;    // numbers of a plane that are summed, then scaled

// ---- runs of numbers ----

template <typename X>
struct Run {
  const X* x;
  const X* grad;            // null: x is scaled; else it is, and its products with x are summed
  X* result;                // null: not wanted
  const Compute<X>* scale;  // of every number of a line, or one of a plane
  double* sums;             // likewise
  int64_t count;
  int64_t line;  // 0: a plane
};

template <typename S>
L0K_HD S scaled(S value, S scale) {
  return kept(scale != S(0), value * scale);
}

template <typename X>
L0K_HD void scale_line(const X* __restrict x, X* __restrict result, int64_t count,
                       const Compute<X>* __restrict scale) {
  for (int64_t i = 0; i < count; ++i) {
    result[i] = from_compute<X>(scaled(to_compute(x[i]), scale[i]));
  }
}

template <typename X>
L0K_HD void scale_plane(const X* __restrict x, X* __restrict result, int64_t count,
                        Compute<X> scale) {
  for (int64_t i = 0; i < count; ++i) {
    result[i] = from_compute<X>(scaled(to_compute(x[i]), scale));
  }
}

// Numbers of a run, from the start of a line on.
template <typename X>
L0K_HD void scale_numbers(const Run<X>& run, const X* from, int64_t first, int64_t count) {
  if (run.line == 0) {
    scale_plane(from + first, run.result + first, count, *run.scale);
    return;
  }
  for (const int64_t end = first + count; first < end; first += run.line) {
    scale_line(from + first, run.result + first, std::min(run.line, end - first), run.scale);
  }
}

template <typename X>
L0K_HD void scale_run(const Run<X>& run) {
  scale_numbers(run, run.x, 0, run.count);
}

// Sums over kLines lines at once: the sums are read and written once for all of them.
template <int kLines, typename X>
L0K_HD void sum_lines(const X* __restrict x, const X* __restrict grad, int64_t width, int64_t line,
                      double* __restrict sums) {
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0;
    for (int k = 0; k < kLines; ++k) {
      const int64_t at = k * line + i;
      sum += static_cast<double>(to_compute(grad[at])) * static_cast<double>(to_compute(x[at]));
    }
    sums[i] += sum;
  }
}

// The last line may be shorter.
template <typename X>
L0K_HD void sum_numbers(const X* x, const X* grad, int64_t count, int64_t line, double* sums) {
  for (; count >= 4 * line; count -= 4 * line, x += 4 * line, grad += 4 * line) {
    sum_lines<4>(x, grad, line, line, sums);
  }
  for (; count >= line; count -= line, x += line, grad += line) {
    sum_lines<1>(x, grad, line, line, sums);
  }
  sum_lines<1>(x, grad, count, line, sums);
}

// Gradients are scaled while they are in a cache. Writing them among the sums would take longer:
// compilers cannot know that lines do not overlap.
template <typename X>
L0K_HD void sum_run(const Run<X>& run) {
  const bool plane = run.line == 0;
  double lanes[kLanes] = {};
  const int64_t step = plane ? kBlock : 4 * run.line;
  for (int64_t at = 0; at < run.count; at += step) {
    const int64_t count = std::min(step, run.count - at);
    if (plane) {
      sum_numbers(run.x + at, run.grad + at, count, kLanes, lanes);
    } else {
      sum_numbers(run.x + at, run.grad + at, count, run.line, run.sums);
    }
    if (run.result != nullptr) scale_numbers(run, run.grad, at, count);
  }
  if (!plane) return;
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  *run.sums = lanes[0];
}

// ---- one pair of functions for each dtype, compiled for several instruction sets ----

#define L0K_DTYPES(X) X(f64, double) X(f32, float) X(bf16, BFloat16) X(f16, Half)

#define L0K_INSTANCE(name, X)                                                     \
  L0K_FOR_EACH_ISA(scale_##name, (scale_run<X>), (const Run<X>& run), (run))      \
  L0K_FOR_EACH_ISA(sum_##name, (sum_run<X>), (const Run<X>& run), (run))          \
  void work_on(const Run<X>& run) { run.grad == nullptr ? scale_##name(run) : sum_##name(run); }
L0K_DTYPES(L0K_INSTANCE)
#undef L0K_INSTANCE

// Calls work(X()) for the dtype that activations have.
template <typename Work>
void with_type(ScalarType type, const Work& work) {
#define L0K_CHOOSE(name, X) \
  if (type == torch::headeronly::CppTypeToScalarType<X>::value) return work(X());
  L0K_DTYPES(L0K_CHOOSE)
#undef L0K_CHOOSE
  require(false, "gate_apply: no kernel for this dtype");
}
#undef L0K_DTYPES

// ---- gates ----

template <typename S>
class Gates {
 public:
  Gates(const Tensor& z, const Tensor& gate_map)
      : z_(dense(z)),
        map_(dense(gate_map)),
        count_(z.size(z.dim() - 1)),
        features_(gate_map.size(1)),
        first_(data<int64_t>(map_)),
        second_(first_ + features_) {
    for (int64_t i = 0; i < 2 * features_; ++i) {
      require(0 <= first_[i] && first_[i] < count_, "gate_map: expected gates from 0 to ",
              count_ - 1, "; got ", first_[i]);
    }
    in_order_ = true;
    for (int64_t f = 0; f < features_; ++f) {
      in_order_ &= first_[f] == first_[0] + f && second_[f] == count_ - 1;
    }
  }

  // The scales of the features of an example, again and again for all of `scale`.
  void find_scales(int64_t example, std::vector<S>& scale) const {
    const S* z = data<S>(z_) + example * count_;
    if (in_order_) {
      const S* own = z + first_[0];
      const S last = z[count_ - 1];
      for (int64_t f = 0; f < features_; ++f) scale[f] = own[f] * last;
    } else {
      for (int64_t f = 0; f < features_; ++f) scale[f] = z[first_[f]] * z[second_[f]];
    }
    for (size_t i = features_; i < scale.size(); ++i) scale[i] = scale[i - features_];
  }

  // The gradient of the gates of an example from the sums of its features; `totals` is scratch.
  void find_gradient(int64_t example, const std::vector<S>& scale, const double* sums,
                     std::vector<double>& totals, S* gradient) const {
    const S* z = data<S>(z_) + example * count_;
    gradient += example * count_;
    if (in_order_) {
      std::fill_n(gradient, count_, S(0));
      const double last = static_cast<double>(z[count_ - 1]);
      S* own = gradient + first_[0];
      for (int64_t f = 0; f < features_; ++f) {
        own[f] = kept(scale[f] != S(0), static_cast<S>(sums[f] * last));
      }
    } else {
      totals.assign(count_, 0.0);
      for (int64_t f = 0; f < features_; ++f) {
        if (scale[f] == S(0)) continue;
        totals[first_[f]] += sums[f] * static_cast<double>(z[second_[f]]);
        totals[second_[f]] += sums[f] * static_cast<double>(z[first_[f]]);
      }
      for (int64_t i = 0; i < count_; ++i) gradient[i] = static_cast<S>(totals[i]);
    }
    gradient[count_ - 1] = S(0);  // always open: a constant
  }

 private:
  Tensor z_, map_;
  int64_t count_, features_;
  const int64_t *first_, *second_;
  bool in_order_;  // each feature has a gate of its own, in order, beside the last one
};

// Adds up [k, features] numbers for each feature, in place.
void fold(double* sums, int64_t count, int64_t features) {
  for (int64_t at = features; at < count; at += features) {
    for (int64_t f = 0; f < features; ++f) sums[f] += sums[at + f];
  }
}

// ---- sweeps ----

template <typename X>
struct Sweep {
  Geometry shape;
  const Gates<Compute<X>>& gates;
  const X* x;
  const X* grad;         // null: forward
  X* result;             // null: not wanted
  Compute<X>* gradient;  // of the gates; null: forward

  // Numbers in a line of rows; a whole number of rows.
  int64_t line() const {
    return std::min((kLine + shape.features - 1) / shape.features, shape.before) * shape.features;
  }

  // Scales that a run needs.
  int64_t scales() const { return shape.rows() ? line() : shape.features; }

  // Sums that an example has if one task works on it.
  int64_t sums() const { return shape.rows() ? line() : shape.before * shape.features; }

  Run<X> run(int64_t first, int64_t count, const Compute<X>* scale, double* sums) const {
    return {x + first,
            grad == nullptr ? nullptr : grad + first,
            result == nullptr ? nullptr : result + first,
            scale,
            sums,
            count,
            shape.rows() ? line() : 0};
  }

  // `sums` are those of the planes; null: forward.
  void planes(int64_t begin, int64_t end, const std::vector<Compute<X>>& scale,
              double* sums) const {
    for (int64_t plane = begin; plane < end; ++plane) {
      work_on(run(plane * shape.inner, shape.inner, &scale[plane % shape.features], sums));
      if (sums != nullptr) ++sums;
    }
  }

  double* at(std::vector<double>& sums, int64_t i) const {
    return grad == nullptr ? nullptr : sums.data() + i;
  }
};

template <typename X>
void run_rows(const Sweep<X>& sweep, const std::vector<Compute<X>>& scale,
              std::vector<double>& sums) {
  const int64_t numbers = sweep.shape.numbers(), line = sweep.line();
  const int64_t lines = (numbers + line - 1) / line;
  const int64_t part = std::max(kGrain / line + 1, (lines + kMaxParts - 1) / kMaxParts) * line;
  const int64_t parts = (numbers + part - 1) / part;
  if (sweep.grad != nullptr) sums.resize(parts * line);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = std::min(part, numbers - i * part);
      work_on(sweep.run(i * part, count, scale.data(), sweep.at(sums, i * line)));
    }
  });
}

template <typename X>
void run_planes(const Sweep<X>& sweep, const std::vector<Compute<X>>& scale,
                std::vector<double>& sums) {
  const int64_t planes = sweep.shape.before * sweep.shape.features;
  if (sweep.grad != nullptr) sums.resize(planes);
  const int64_t grain = std::max<int64_t>(1, kGrain / sweep.shape.inner);
  torch::stable::parallel_for(0, planes, grain, [&](int64_t begin, int64_t end) {
    sweep.planes(begin, end, scale, sweep.at(sums, begin));
  });
}

template <typename X>
void run_shared(const Sweep<X>& sweep) {
  std::vector<Compute<X>> scale(sweep.scales());
  sweep.gates.find_scales(0, scale);
  std::vector<double> sums, totals;
  sweep.shape.rows() ? run_rows(sweep, scale, sums) : run_planes(sweep, scale, sums);
  if (sweep.grad == nullptr) return;
  fold(sums.data(), static_cast<int64_t>(sums.size()), sweep.shape.features);
  sweep.gates.find_gradient(0, scale, sums.data(), totals, sweep.gradient);
}

template <typename X>
void run_examples(const Sweep<X>& sweep) {
  const Geometry& shape = sweep.shape;
  const int64_t block = shape.block(), planes = shape.before * shape.features;
  const int64_t grain = std::max<int64_t>(1, kGrain / block);
  torch::stable::parallel_for(0, shape.examples, grain, [&](int64_t begin, int64_t end) {
    std::vector<Compute<X>> scale(sweep.scales());
    std::vector<double> sums, totals;
    for (int64_t example = begin; example < end; ++example) {
      sweep.gates.find_scales(example, scale);
      if (sweep.grad != nullptr) sums.assign(sweep.sums(), 0.0);
      if (shape.rows()) {
        work_on(sweep.run(example * block, block, scale.data(), sweep.at(sums, 0)));
      } else {
        sweep.planes(example * planes, (example + 1) * planes, scale, sweep.at(sums, 0));
      }
      if (sweep.grad == nullptr) continue;
      fold(sums.data(), static_cast<int64_t>(sums.size()), shape.features);
      sweep.gates.find_gradient(example, scale, sums.data(), totals, sweep.gradient);
    }
  });
}

template <typename X>
void run(const Sweep<X>& sweep, bool per_example) {
  per_example ? run_examples(sweep) : run_shared(sweep);
}

// ---- operators ----

Tensor gate_apply(Tensor x, Tensor z, Tensor gate_map, int64_t dim) {
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const bool per_example = features::is_per_example(z);
  const Tensor stored = features::laid_out_as(x, y);
  const Geometry shape = features::geometry_of(y, dim, per_example);
  with_type(x.scalar_type(), [&](auto number) {
    using X = decltype(number);
    const Gates<Compute<X>> gates(z, gate_map);
    run(Sweep<X>{shape, gates, data<X>(stored), nullptr, out<X>(y), nullptr}, per_example);
  });
  return y;
}

std::tuple<Tensor, Tensor> gate_apply_backward(Tensor grad, Tensor x, Tensor z, Tensor gate_map,
                                               int64_t dim, bool need_x) {
  const Tensor like = torch::stable::empty_like(x);
  const Tensor grad_x = need_x ? like : features::nothing(x);
  Tensor grad_z = features::empty_gates(z);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_z)};
  const bool per_example = features::is_per_example(z);
  const Tensor stored = features::laid_out_as(x, like);
  const Tensor upstream = features::laid_out_as(grad, like);
  const Geometry shape = features::geometry_of(like, dim, per_example);
  with_type(x.scalar_type(), [&](auto number) {
    using X = decltype(number);
    using S = Compute<X>;
    const Gates<S> gates(z, gate_map);
    X* result = need_x ? out<X>(grad_x) : nullptr;
    run(Sweep<X>{shape, gates, data<X>(stored), data<X>(upstream), result, out<S>(grad_z)},
        per_example);
  });
  return {grad_x, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("gate_apply", TORCH_BOX(&gate_apply));
  m.impl("gate_apply_backward", TORCH_BOX(&gate_apply_backward));
}

}  // namespace l0k
