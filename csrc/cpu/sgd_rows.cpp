// SPDX-License-Identifier: Apache-2.0
// SGD on the rows that are open, and the steps that the others have missed: `sgd_rows`,
// `sgd_rows_catch_up`.
#include "cpu/rows.h"

namespace l0k {
namespace {

template <typename T>
struct Step {
  T sign;  // of the gradient
  T lr, momentum, damping, decay;
  bool nesterov;
};

// velocity is null without momentum.
template <typename T>
L0K_HD void step_row(const Step<T>& s, T* weight, T* velocity, const T* grad, int64_t size) {
  if (velocity == nullptr) {
    for (int64_t i = 0; i < size; ++i) {
      const T w = weight[i];
      weight[i] = w - s.lr * (s.sign * grad[i] + s.decay * w);
    }
  } else if (s.nesterov) {
    for (int64_t i = 0; i < size; ++i) {
      const T w = weight[i];
      const T d = s.sign * grad[i] + s.decay * w;
      const T v = s.momentum * velocity[i] + s.damping * d;
      velocity[i] = v;
      weight[i] = w - s.lr * (d + s.momentum * v);
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const T w = weight[i];
      const T v = s.momentum * velocity[i] + s.damping * (s.sign * grad[i] + s.decay * w);
      velocity[i] = v;
      weight[i] = w - s.lr * v;
    }
  }
}

// (w, v) becomes (w, v) + (a w + b v, c w + d v - v): the change of w is small beside w, so that
// rounding a, b and the change costs less than rounding the sum does.
template <typename T>
struct Missed {
  T a, b, c, d;
};

template <typename T>
L0K_HD void catch_up_row(const Missed<T>& m, T* weight, T* velocity, int64_t size) {
  if (velocity == nullptr) {
    for (int64_t i = 0; i < size; ++i) weight[i] += m.a * weight[i];
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const T w = weight[i];
    const T v = velocity[i];
    weight[i] = w + (m.a * w + m.b * v);
    velocity[i] = m.c * w + m.d * v;
  }
}

#define L0K_ROWS(name, T)                                                                         \
  L0K_FOR_EACH_ISA(step_##name, step_row<T>,                                                      \
                   (const Step<T>& s, T* weight, T* velocity, const T* grad, int64_t size),       \
                   (s, weight, velocity, grad, size))                                             \
  L0K_FOR_EACH_ISA(catch_up_##name, catch_up_row<T>,                                              \
                   (const Missed<T>& m, T* weight, T* velocity, int64_t size),                    \
                   (m, weight, velocity, size))
L0K_ROWS(f32, float)
L0K_ROWS(f64, double)
#undef L0K_ROWS

template <typename T>
T* numbers_of(const std::optional<Tensor>& tensor) {
  return tensor ? out<T>(*tensor) : nullptr;
}

template <typename T>
T* at(T* numbers, int64_t row, const Rows& rows) {
  return numbers == nullptr ? nullptr : numbers + row * rows.size;
}

struct Options {
  double lr, momentum, dampening, decay;
  bool nesterov, maximize;
};

template <typename T, typename F>
void step(const Tensor& weight, const std::optional<Tensor>& velocity, const Tensor& grad,
          const Rows& rows, const std::vector<int64_t>& open, const Options& o, F run) {
  const Step<T> s{o.maximize ? T(-1) : T(1),      static_cast<T>(o.lr),
                  static_cast<T>(o.momentum),     static_cast<T>(1 - o.dampening),
                  static_cast<T>(o.decay),        o.nesterov};
  T* w = out<T>(weight);
  T* v = numbers_of<T>(velocity);
  const T* g = data<T>(grad);
  for_rows(rows, static_cast<int64_t>(open.size()), [&](int64_t i) {
    run(s, w + open[i] * rows.size, at(v, open[i], rows), at(g, open[i], rows), rows.size);
  });
}

void sgd_rows(Tensor weight, std::optional<Tensor> velocity, Tensor grad, Tensor last, int64_t now,
              double lr, double momentum, double dampening, double weight_decay, bool nesterov,
              bool maximize) {
  const Rows rows = rows_of(weight);
  const int64_t* counters = counters_of(last, rows);
  const ScalarType type = checked_type(weight);
  if (velocity) require_like(weight, *velocity, "velocity");
  require_like(weight, grad, "grad");
  const std::vector<int64_t> open = marked(counters, rows, now);
  const Options options{lr, momentum, dampening, weight_decay, nesterov, maximize};
  if (type == ScalarType::Double) {
    step<double>(weight, velocity, grad, rows, open, options, step_f64);
  } else {
    step<float>(weight, velocity, grad, rows, open, options, step_f32);
  }
}

template <typename T, typename F>
void catch_up(const Tensor& weight, const std::optional<Tensor>& velocity, const Rows& rows,
              const std::vector<Behind>& behind, const double* table, F run) {
  T* w = out<T>(weight);
  T* v = numbers_of<T>(velocity);
  for_rows(rows, static_cast<int64_t>(behind.size()), [&](int64_t i) {
    if (behind[i].steps == 0) return;
    const double* m = table + 4 * behind[i].steps;
    const Missed<T> missed{static_cast<T>(m[0] - 1), static_cast<T>(m[1]), static_cast<T>(m[2]),
                           static_cast<T>(m[3])};
    run(missed, at(w, behind[i].row, rows), at(v, behind[i].row, rows), rows.size);
  });
}

void sgd_rows_catch_up(Tensor weight, std::optional<Tensor> velocity, Tensor last,
                       std::optional<Tensor> list, Tensor table, int64_t now, int64_t mark) {
  const Rows rows = rows_of(weight);
  int64_t* counters = counters_of(last, rows);
  const ScalarType type = checked_type(weight);
  if (velocity) require_like(weight, *velocity, "velocity");
  const Tensor matrices = dense(table);
  require(matrices.scalar_type() == ScalarType::Double && matrices.dim() == 3 &&
              matrices.size(1) == 2 && matrices.size(2) == 2,
          "table: expected float64 of shape [steps, 2, 2]; got ", Shown{matrices});
  const std::vector<Behind> behind =
      advance(list, counters, rows, now, mark, matrices.size(0) - 1);
  const double* m = data<double>(matrices);
  if (type == ScalarType::Double) {
    catch_up<double>(weight, velocity, rows, behind, m, catch_up_f64);
  } else {
    catch_up<float>(weight, velocity, rows, behind, m, catch_up_f32);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) {
  m.impl("sgd_rows", TORCH_BOX(&sgd_rows));
  m.impl("sgd_rows_catch_up", TORCH_BOX(&sgd_rows_catch_up));
}

}  // namespace l0k
