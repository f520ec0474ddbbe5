// SPDX-License-Identifier: Apache-2.0
// AdamW on the rows that are open, and the steps that the others have missed: `adam_rows`,
// `adam_rows_catch_up`.
#include "cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

namespace l0k {
namespace {

template <typename T>
struct Step {
  T sign;          // of the gradient
  bool from_mean;  // whether the mean is nearer to the old one than to the gradient
  T pull;          // of the farther one: 1 - beta1, or -beta1
  T keep2, rise2;  // beta2, 1 - beta2
  T size;          // lr / (1 - beta1^step)
  T root;          // sqrt(1 - beta2^step)
  T eps, shrink;   // shrink: 1 - lr weight_decay
};

template <typename T>
L0K_HD void step_row(const Step<T>& s, T* weight, T* mean, T* square, const T* grad,
                     int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const T g = s.sign * grad[i];
    const T m = (s.from_mean ? mean[i] : g) + s.pull * (g - mean[i]);
    const T v = s.keep2 * square[i] + s.rise2 * (g * g);
    mean[i] = m;
    square[i] = v;
    weight[i] = s.shrink * weight[i] - s.size * m / (std::sqrt(v) / s.root + s.eps);
  }
}

// One missed step: the weight loses `rate` m / (`root` sqrt(v) + eps), where m and v are those of
// before the first of them.
template <typename T>
struct Term {
  T rate, root, eps;
};

template <typename T>
struct Missed {
  const Term<T>* terms;
  int64_t count;
  T shrink;      // of the weight by its decay
  T keep1;       // product of all beta1
  double keep2;  // of all beta2: as float it may be zero, which would make NaN of infinity
};

// With gradients of zero m and v only shrink, by the same factors in all elements. What is left of
// the steps is a sum that needs one square root per element and one division per step.
template <typename T>
L0K_HD void catch_up_row(const Missed<T>& missed, T* weight, T* mean, T* square, int64_t size) {
  constexpr int64_t kBlock = 64;
  for (int64_t at = 0; at < size; at += kBlock) {
    const int64_t count = std::min(kBlock, size - at);
    T root[kBlock] = {};
    T sum[kBlock] = {};
    for (int64_t i = 0; i < count; ++i) root[i] = std::sqrt(square[at + i]);
    for (int64_t t = 0; t < missed.count; ++t) {
      const Term<T> term = missed.terms[t];
      for (int64_t i = 0; i < kBlock; ++i) sum[i] += term.rate / (term.root * root[i] + term.eps);
    }
    for (int64_t i = at; i < at + count; ++i) {
      weight[i] = missed.shrink * weight[i] - mean[i] * sum[i - at];
      mean[i] *= missed.keep1;
      square[i] = static_cast<T>(missed.keep2 * static_cast<double>(square[i]));
    }
  }
}

#define L0K_ROWS(name, T)                                                                          \
  L0K_FOR_EACH_ISA(step_##name, step_row<T>,                                                       \
                   (const Step<T>& s, T* weight, T* mean, T* square, const T* grad, int64_t size), \
                   (s, weight, mean, square, grad, size))                                          \
  L0K_FOR_EACH_ISA(catch_up_##name, catch_up_row<T>,                                               \
                   (const Missed<T>& m, T* weight, T* mean, T* square, int64_t size),              \
                   (m, weight, mean, square, size))
L0K_ROWS(f32, float)
L0K_ROWS(f64, double)
#undef L0K_ROWS

struct Moments {
  const Tensor& mean;
  const Tensor& square;
};

ScalarType checked(const Tensor& weight, const Moments& moments) {
  require_like(weight, moments.mean, "exp_avg");
  require_like(weight, moments.square, "exp_avg_sq");
  return checked_type(weight);
}

struct Options {
  double lr, beta1, beta2, eps, decay;
};

// What the powers of the betas have left to reach, as divisors of m and v.
struct Correction {
  double mean, square;
};

Correction correction(const Options& o, int64_t step) {
  const double t = static_cast<double>(step);
  return {1 - std::pow(o.beta1, t), 1 - std::pow(o.beta2, t)};
}

template <typename T, typename F>
void step(const Tensor& weight, const Moments& moments, const Tensor& grad, const Rows& rows,
          const std::vector<int64_t>& open, const Options& o, int64_t number, bool maximize, F run) {
  const Correction c = correction(o, number);
  // As torch.lerp: a sum that starts from the farther one cancels where the nearer one is small.
  const bool from_mean = o.beta1 > 0.5;
  const Step<T> s{maximize ? T(-1) : T(1),
                  from_mean,
                  static_cast<T>(from_mean ? 1 - o.beta1 : -o.beta1),
                  static_cast<T>(o.beta2),
                  static_cast<T>(1 - o.beta2),
                  static_cast<T>(o.lr / c.mean),
                  static_cast<T>(std::sqrt(c.square)),
                  static_cast<T>(o.eps),
                  static_cast<T>(1 - o.lr * o.decay)};
  T* w = out<T>(weight);
  T* m = out<T>(moments.mean);
  T* v = out<T>(moments.square);
  const T* g = data<T>(grad);
  for_rows(rows, static_cast<int64_t>(open.size()), [&](int64_t i) {
    const int64_t at = open[i] * rows.size;
    run(s, w + at, m + at, v + at, g + at, rows.size);
  });
}

void adam_rows(Tensor weight, Tensor exp_avg, Tensor exp_avg_sq, Tensor grad, Tensor last,
               int64_t now, int64_t number, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool maximize) {
  const Rows rows = rows_of(weight);
  const int64_t* counters = counters_of(last, rows);
  const Moments moments{exp_avg, exp_avg_sq};
  const ScalarType type = checked(weight, moments);
  require_like(weight, grad, "grad");
  const std::vector<int64_t> open = marked(counters, rows, now);
  const Options options{lr, beta1, beta2, eps, weight_decay};
  if (type == ScalarType::Double) {
    step<double>(weight, moments, grad, rows, open, options, number, maximize, step_f64);
  } else {
    step<float>(weight, moments, grad, rows, open, options, number, maximize, step_f32);
  }
}

// Several missed steps in one, for all rows that have missed them.
template <typename T>
struct Replay {
  std::vector<Term<T>> terms;
  T shrink, keep1;
  double keep2;

  Missed<T> missed() const {
    return {terms.data(), static_cast<int64_t>(terms.size()), shrink, keep1, keep2};
  }
};

// A step that has been made.
struct Past {
  Options options;
  Correction correction;
};

// In the type of the weight. As root, zero would make NaN of infinity: it is the least instead.
template <typename T>
Term<T> rounded(const Term<double>& term) {
  const T root = static_cast<T>(term.root);
  return {static_cast<T>(term.rate),
          term.root > 0 ? std::max(root, std::numeric_limits<T>::min()) : root,
          static_cast<T>(term.eps)};
}

template <typename T>
Replay<T> replay(const Past* steps, int64_t count) {
  std::vector<Term<double>> all(count);
  double keep1 = 1, keep2 = 1;
  for (int64_t t = 0; t < count; ++t) {
    const Options& o = steps[t].options;
    const Correction& c = steps[t].correction;
    keep1 *= o.beta1;
    keep2 *= o.beta2;
    all[t] = {o.lr / c.mean * keep1, std::sqrt(keep2 / c.square), o.eps};
  }
  double shrink = 1;
  for (int64_t t = count - 1; t >= 0; --t) {  // the decay of later steps takes part of each
    all[t].rate *= shrink;
    shrink *= 1 - steps[t].options.lr * steps[t].options.decay;
  }
  Replay<T> result{{}, static_cast<T>(shrink), static_cast<T>(keep1), keep2};
  // Numerators shrink faster than denominators. What all left out add is below the rounding of the
  // first term in every element: a denominator shrinks no more than the faster one of its parts.
  // fmax: a part that is zero in both has no ratio.
  const double nothing = std::numeric_limits<T>::epsilon() / (4.0 * static_cast<double>(count));
  const Term<double>* first = nullptr;  // that moves the weight
  for (const Term<double>& term : all) {
    if (term.rate == 0 && term.eps > 0) continue;  // without eps it may be 0 / 0
    if (first == nullptr && term.rate != 0) first = &term;
    if (first != nullptr) {
      const double shrunk = std::fmax(first->root / term.root, first->eps / term.eps);
      if (std::abs(term.rate / first->rate) * shrunk < nothing) continue;
    }
    result.terms.push_back(rounded<T>(term));
  }
  return result;
}

template <typename T, typename F>
void catch_up(const Tensor& weight, const Moments& moments, const Rows& rows,
              const std::vector<Behind>& behind, const Past* end, F run) {
  std::map<int64_t, Replay<T>> replays;
  for (const Behind& b : behind) {
    if (b.steps > 0 && replays.count(b.steps) == 0) {
      replays.emplace(b.steps, replay<T>(end - b.steps, b.steps));
    }
  }
  T* w = out<T>(weight);
  T* m = out<T>(moments.mean);
  T* v = out<T>(moments.square);
  for_rows(rows, static_cast<int64_t>(behind.size()), [&](int64_t i) {
    if (behind[i].steps == 0) return;
    const int64_t at = behind[i].row * rows.size;
    run(replays.at(behind[i].steps).missed(), w + at, m + at, v + at, rows.size);
  });
}

void adam_rows_catch_up(Tensor weight, Tensor exp_avg, Tensor exp_avg_sq, Tensor last,
                        std::optional<Tensor> list, Tensor table, int64_t now, int64_t number,
                        int64_t mark) {
  const Rows rows = rows_of(weight);
  int64_t* counters = counters_of(last, rows);
  const Moments moments{exp_avg, exp_avg_sq};
  const ScalarType type = checked(weight, moments);
  require(table.scalar_type() == ScalarType::Double && table.dim() == 2 && table.size(1) == 5,
          "table: expected float64 of shape [steps, 5]; got ", Shown{table});
  const Tensor settings = dense(table);
  const int64_t known = settings.size(0);
  const std::vector<Behind> behind =
      advance(list, counters, rows, now, mark, std::min(known, number));
  std::vector<Past> steps(known);
  for (int64_t t = 0; t < known; ++t) {
    const double* s = data<double>(settings) + 5 * t;
    const Options options{s[0], s[1], s[2], s[3], s[4]};
    steps[t] = {options, correction(options, number - (known - 1 - t))};
  }
  const Past* end = steps.data() + known;
  if (type == ScalarType::Double) {
    catch_up<double>(weight, moments, rows, behind, end, catch_up_f64);
  } else {
    catch_up<float>(weight, moments, rows, behind, end, catch_up_f32);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("adam_rows", TORCH_BOX(&adam_rows));
  m.impl("adam_rows_catch_up", TORCH_BOX(&adam_rows_catch_up));
}

}  // namespace l0k
