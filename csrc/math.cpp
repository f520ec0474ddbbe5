// SPDX-License-Identifier: Apache-2.0
// Python binding of the scalar mathematics the kernels run, so that tests check that very code.
#include <pybind11/pybind11.h>

#include <limits>
#include <tuple>

#include "common/gate_laws.h"

namespace py = pybind11;

namespace {

using Words = std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>;

Words philox4x32(Words counter, std::tuple<uint32_t, uint32_t> key) {
  const auto [x, y, z, w] = counter;
  const auto [low, high] = key;
  const auto words = l0k::philox4x32(l0k::Words4<uint32_t>{x, y, z, w}, {low, high});
  return {words.x, words.y, words.z, words.w};
}

int32_t noise_k(uint64_t seed, uint32_t step, int64_t gate, uint32_t row, uint32_t kind,
                uint32_t sample) {
  return l0k::noise_of_gate({seed, step, row, kind, sample}, gate);
}

template <typename Law>
l0k::Thresholds thresholds_of(const Law& law, double log_alpha) {
  const double exp_open = l0k::exp_fp64(l0k::open_exponent(law, log_alpha));
  return l0k::thresholds(law, l0k::odds(law, log_alpha, exp_open));
}

double exp_concrete(const l0k::HardConcrete& law, int32_t k, double log_alpha) {
  return l0k::exp_fp64(l0k::concrete_exponent(law, l0k::noise_logit(k), log_alpha));
}

std::tuple<int32_t, int32_t> hard_concrete_thresholds(double log_alpha, double beta, double gamma,
                                                      double zeta) {
  const auto [closed, open] = thresholds_of(l0k::make_hard_concrete(beta, gamma, zeta), log_alpha);
  return {closed, open};
}

int32_t bernoulli_threshold(double log_alpha) {
  return thresholds_of(l0k::Bernoulli{}, log_alpha).open_from;
}

double hard_concrete_value(int32_t k, double log_alpha, double beta, double gamma, double zeta,
                           double tiny) {
  const l0k::HardConcrete law = l0k::make_hard_concrete(beta, gamma, zeta);
  const l0k::Thresholds t = thresholds_of(law, log_alpha);
  return l0k::gate_value(law, k, exp_concrete(law, k, log_alpha), t, tiny);
}

double hard_concrete_slope(int32_t k, double log_alpha, double beta, double gamma, double zeta) {
  const l0k::HardConcrete law = l0k::make_hard_concrete(beta, gamma, zeta);
  const l0k::Thresholds t = thresholds_of(law, log_alpha);
  return l0k::gate_slope(law, k, exp_concrete(law, k, log_alpha), t);
}

}  // namespace

PYBIND11_MODULE(_math, m) {
  m.doc() = "The scalar mathematics that the kernels run.";
  const auto beta = py::arg("beta") = 2.0 / 3.0;
  const auto gamma = py::arg("gamma") = -0.1;
  const auto zeta = py::arg("zeta") = 1.1;
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
  m.def("noise_k", &noise_k, py::arg("seed"), py::arg("step"), py::arg("gate"), py::arg("row") = 0,
        py::arg("kind") = 0, py::arg("sample") = 0);
  m.def("exp", &l0k::exp_fp64, py::arg("x"));
  m.def("log_ratio", &l0k::log_ratio, py::arg("a"), py::arg("b"));
  m.def("hard_concrete_thresholds", &hard_concrete_thresholds, py::arg("log_alpha"), beta, gamma,
        zeta);
  m.def("bernoulli_threshold", &bernoulli_threshold, py::arg("log_alpha"));
  m.def("hard_concrete_value", &hard_concrete_value, py::arg("k"), py::arg("log_alpha"), beta,
        gamma, zeta, py::arg("tiny") = std::numeric_limits<double>::min());
  m.def("hard_concrete_slope", &hard_concrete_slope, py::arg("k"), py::arg("log_alpha"), beta,
        gamma, zeta);
}
