// SPDX-License-Identifier: Apache-2.0
// The laws of the gates. Decisions (closed, fully open) compare the integer noise k with
// thresholds computed once per gate in float64, so that every device decides alike.
#pragma once

#include <cmath>

#include "common/exp_log.h"
#include "common/philox.h"

namespace l0k {

// sigma(x) and sigma(-x), both accurate where they are small.
struct Odds {
  double open, closed;
};

L0K_HD Odds odds(double x) {
  const double e = exp_fp64(x);
  const double closed = 1.0 / (1.0 + e);
  return {select(x < 0.0, e * closed, 1.0 - closed), closed};
}

L0K_HD double sigmoid(double x) { return 1.0 / (1.0 + exp_fp64(-x)); }

// The number of k with u <= q: k < count_up_to(q). Truncation is floor here, as q >= 0.
L0K_HD int32_t count_up_to(double q) { return static_cast<int32_t>(q * kNoiseScale + 0.5); }

// The number of k with u < q, which is also the first k with u >= q.
L0K_HD int32_t count_below(double q) {
  const double x = q * kNoiseScale - 0.5;
  const int32_t whole = static_cast<int32_t>(x);
  return whole + (static_cast<double>(whole) < x ? 1 : 0);
}

// logit(u) = ln(u / (1 - u)), exact up to one division and one logarithm.
L0K_HD double noise_logit(int32_t k) {
  const double twice = 2.0 * k + 1.0;
  return log_fp64(twice / (2.0 * kNoiseScale - twice));
}

struct HardConcrete {
  double beta, gamma, zeta;
  double closed_shift;  // K0 = beta ln(-gamma / zeta): P(z = 0) = sigma(K0 - log_alpha)
  double open_shift;    // K1 = beta ln((1 - gamma) / (zeta - 1)): P(z = 1) = sigma(log_alpha - K1)
  double inverse_beta;
};

inline HardConcrete make_hard_concrete(double beta, double gamma, double zeta) {
  return {beta,
          gamma,
          zeta,
          beta * std::log(-gamma / zeta),
          beta * std::log((1.0 - gamma) / (zeta - 1.0)),
          1.0 / beta};
}

struct Thresholds {
  int32_t closed_below;  // z = 0 iff k < closed_below
  int32_t open_from;     // z = 1 iff k >= open_from
};

L0K_HD Odds open_odds(const HardConcrete& law, double log_alpha) {
  return odds(log_alpha - law.closed_shift);
}

L0K_HD Thresholds thresholds(const HardConcrete& law, double log_alpha, const Odds& odds_open) {
  const int32_t closed = count_up_to(odds_open.closed);
  const int32_t open = count_below(sigmoid(law.open_shift - log_alpha));
  return {closed, open < closed ? closed : open};
}

// s = sigma((logit(u) + log_alpha) / beta).
L0K_HD double concrete(const HardConcrete& law, int32_t k, double log_alpha) {
  return sigmoid((noise_logit(k) + log_alpha) * law.inverse_beta);
}

// z from s; a half-open gate stays within [tiny, 1] whatever rounding says.
L0K_HD double gate_value(const HardConcrete& law, int32_t k, double s, const Thresholds& t,
                         double tiny) {
  double z = s * (law.zeta - law.gamma) + law.gamma;
  z = select(z < tiny, tiny, z);
  z = select(z > 1.0, 1.0, z);
  z = select(k >= t.open_from, 1.0, z);
  return select(k < t.closed_below, 0.0, z);
}

// dz / dlog_alpha from s.
L0K_HD double gate_slope(const HardConcrete& law, int32_t k, double s, const Thresholds& t) {
  const double slope = (law.zeta - law.gamma) * law.inverse_beta * s * (1.0 - s);
  return select((k < t.closed_below) | (k >= t.open_from), 0.0, slope);
}

struct Bernoulli {};

L0K_HD Odds open_odds(const Bernoulli&, double log_alpha) { return odds(log_alpha); }

L0K_HD Thresholds thresholds(const Bernoulli&, double, const Odds& odds_open) {
  return {0, count_below(odds_open.open)};
}

L0K_HD double concrete(const Bernoulli&, int32_t, double) { return 0.0; }

L0K_HD double gate_value(const Bernoulli&, int32_t k, double, const Thresholds& t, double) {
  return k < t.open_from ? 1.0 : 0.0;
}

L0K_HD double gate_slope(const Bernoulli&, int32_t, double, const Thresholds&) { return 0.0; }

}  // namespace l0k
