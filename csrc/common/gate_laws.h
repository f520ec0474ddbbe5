// SPDX-License-Identifier: Apache-2.0
// The laws of the gates. Decisions (closed, fully open) compare the integer noise k with
// thresholds computed once per gate in float64, so that every device decides alike.
#pragma once

#include <cmath>

#include "common/exp_log.h"
#include "common/philox.h"

namespace l0k {

// The number of k with u <= q: k < count_up_to(q). Truncation is floor here, as q >= 0.
L0K_HD int32_t count_up_to(double q) { return static_cast<int32_t>(std::fma(q, kNoiseScale, 0.5)); }

// The number of k with u < q, which is also the first k with u >= q.
L0K_HD int32_t count_below(double q) {
  const double x = std::fma(q, kNoiseScale, -0.5);
  const int32_t whole = static_cast<int32_t>(x);
  return whole + (static_cast<double>(whole) < x ? 1 : 0);
}

// logit(u) = ln(u / (1 - u)); both are odd multiples of 2^-24.
L0K_HD double noise_logit(int32_t k) {
  const double twice = std::fma(2.0, static_cast<double>(k), 1.0);
  return log_ratio(twice, 2.0 * kNoiseScale - twice);
}

// What a gate may become, both tails accurate; exactly 0 beyond |log_alpha - shift| = 690.
struct Odds {
  double open;      // P(z != 0)
  double closed;    // P(z = 0)
  double not_full;  // P(z < 1)
};

// From x and the odds e^x of being open; `ratio` times these are the odds of being fully open.
L0K_HD Odds odds_from(double x, double e, double ratio) {
  const double a = 1.0 + e;
  const double b = std::fma(e, ratio, 1.0);
  const double inverse = 1.0 / (a * b);  // one division for both
  const double closed = select(x > 690.0, 0.0, b * inverse);
  const double open = select(x < 0.0, e * closed, 1.0 - closed);
  return {select(x < -690.0, 0.0, open), closed, a * inverse};
}

struct Thresholds {
  int32_t closed_below;  // z = 0 iff k < closed_below
  int32_t open_from;     // z = 1 iff k >= open_from
};

// z = clip(s (zeta - gamma) + gamma, 0, 1) with s = sigma((logit(u) + log_alpha) / beta).
struct HardConcrete {
  double gamma, width;  // width = zeta - gamma
  double inverse_beta;
  double shift;       // K0 = beta ln(-gamma / zeta): P(z = 0) = sigma(K0 - log_alpha)
  double full_ratio;  // e^(K0 - K1), K1 = beta ln((1 - gamma) / (zeta - 1)):
                      // P(z = 1) = sigma(log_alpha - K1)
};

inline HardConcrete make_hard_concrete(double beta, double gamma, double zeta) {
  const double shift = beta * std::log(-gamma / zeta);
  const double full_shift = beta * std::log((1.0 - gamma) / (zeta - 1.0));
  return {gamma, zeta - gamma, 1.0 / beta, shift, std::exp(shift - full_shift)};
}

// The exponentials are arguments below, so that vector loops can compute them ahead.
L0K_HD double open_exponent(const HardConcrete& law, double log_alpha) {
  return log_alpha - law.shift;
}

L0K_HD Odds odds(const HardConcrete& law, double log_alpha, double exp_open) {
  return odds_from(open_exponent(law, log_alpha), exp_open, law.full_ratio);
}

L0K_HD double concrete_exponent(const HardConcrete& law, double logit, double log_alpha) {
  return -(logit + log_alpha) * law.inverse_beta;
}

L0K_HD Thresholds thresholds(const HardConcrete&, const Odds& p) {
  const int32_t closed = count_up_to(p.closed);
  const int32_t open = count_below(p.not_full);
  return {closed, open < closed ? closed : open};
}

// z from e^concrete_exponent; a half-open gate stays within [tiny, 1] whatever rounding says.
L0K_HD double gate_value(const HardConcrete& law, int32_t k, double exp_concrete,
                         const Thresholds& t, double tiny) {
  const double s = 1.0 / (1.0 + exp_concrete);
  double z = std::fma(s, law.width, law.gamma);
  z = select(z < tiny, tiny, z);
  z = select(z > 1.0, 1.0, z);
  z = select(k >= t.open_from, 1.0, z);
  return select(k < t.closed_below, 0.0, z);
}

// dz / dlog_alpha from e^concrete_exponent.
L0K_HD double gate_slope(const HardConcrete& law, int32_t k, double exp_concrete,
                         const Thresholds& t) {
  const double s = 1.0 / (1.0 + exp_concrete);
  const double slope = law.width * law.inverse_beta * s * (1.0 - s);
  return select((k < t.closed_below) | (k >= t.open_from), 0.0, slope);
}

// z = 1 with probability sigma(log_alpha), else 0; no gradient reaches log_alpha through z.
struct Bernoulli {};

L0K_HD double open_exponent(const Bernoulli&, double log_alpha) { return log_alpha; }

L0K_HD Odds odds(const Bernoulli&, double log_alpha, double exp_open) {
  return odds_from(log_alpha, exp_open, 1.0);
}

L0K_HD Thresholds thresholds(const Bernoulli&, const Odds& p) { return {0, count_below(p.open)}; }

L0K_HD double gate_value(const Bernoulli&, int32_t k, double, const Thresholds& t, double) {
  return select(k < t.open_from, 1.0, 0.0);
}

L0K_HD double gate_slope(const Bernoulli&, int32_t, double, const Thresholds&) { return 0.0; }

// Bernoulli's other draw from the same noise, with 1 - u for u.
struct Antithetic : Bernoulli {};

L0K_HD double gate_value(const Antithetic&, int32_t k, double, const Thresholds& t, double) {
  return select(kLastNoise - k < t.open_from, 1.0, 0.0);
}

// One gate's share of an estimate from binary draws, difference factor (u - 1/2). Selected, not
// multiplied: a gate without a factor gets 0 even where the difference is infinite.
L0K_HD double arm_gradient(double difference, double factor, int32_t k) {
  const double u_less_half = (static_cast<double>(k) - (0.5 * kNoiseScale - 0.5)) / kNoiseScale;
  return select(factor == 0.0, 0.0, difference * factor * u_less_half);
}

}  // namespace l0k
