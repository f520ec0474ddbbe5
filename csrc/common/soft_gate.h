// SPDX-License-Identifier: Apache-2.0
// Gates of Continuous Sparsification, scale sigmoid(beta s), on every device: the same operations
// in the same order, so the same bits as long as the compiler does not contract a * b + c by itself.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common/exp_log.h"

namespace l0k {

// As select of exp_log.h.
L0K_HD float select(bool condition, float a, float b) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  uint32_t a_bits, b_bits;
  memcpy(&a_bits, &a, sizeof(a_bits));
  memcpy(&b_bits, &b, sizeof(b_bits));
  const uint32_t bits = (a_bits & mask) | (b_bits & ~mask);
  float chosen;
  memcpy(&chosen, &bits, sizeof(chosen));
  return chosen;
}

// Beyond -limit and limit a sigmoid is 0 and 1. For float32 e^-limit is still a normal number.
template <typename S>
constexpr S kGateLimit = std::is_same_v<S, double> ? 700.0 : 87.0;

// e^x for -kGateLimit <= x <= 0. Relative error: below 2^-22.
L0K_HD float exp_of_negative(float x) {
  constexpr float kRoundFloat = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = std::fma(x, 1.44269504f, kRoundFloat);  // its lowest bits hold n
  const float n = shifted - kRoundFloat;
  // ln 2 in two parts, the first with 9 bits: n times it is exact.
  const float r = std::fma(-n, -2.12194440e-4f, std::fma(-n, 0.693359375f, x));
  // q = (e^r - 1 - r) / r^2, interpolated at Chebyshev points.
  float q = std::fma(0.00019891981f, r, 0.0013934541f);
  q = std::fma(q, r, 0.0083333105f);
  q = std::fma(q, r, 0.041666456f);
  q = std::fma(q, r, 0.16666667f);
  q = std::fma(q, r, 0.5f);
  const float e_r = 1.0f + std::fma(r * r, q, r);
  uint32_t bits, power;
  memcpy(&bits, &e_r, sizeof(bits));
  memcpy(&power, &shifted, sizeof(power));
  bits += power << 23;  // times 2^n
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

L0K_HD double exp_of_negative(double x) { return exp_fp64(x); }

template <typename S>
struct SoftGate {
  S beta, scale;
  S closed_below;  // beta s of the least gate that is not closed; at least -kGateLimit
};

template <typename S>
struct GateAt {
  S value;  // 0 where it is closed
  S slope;  // in s
};

// A NaN in s makes both NaN.
template <typename S>
L0K_HD GateAt<S> gate_at(const SoftGate<S>& gate, S s) {
  const S x = s * gate.beta;
  const S size = std::fabs(x);
  const bool saturated = size > kGateLimit<S>;
  const S bounded = select(saturated, kGateLimit<S>, size);
  // A NaN whose bits are all set would become a number; GPUs make such ones in float32.
  const S e = select(saturated, S(0), exp_of_negative(-bounded)) + S(0) * bounded;
  const S inverse = S(1) / (S(1) + e);
  const S value = select(x < S(0), e * inverse, inverse) * gate.scale;
  const S slope = e * inverse * inverse * (gate.beta * gate.scale);
  return {select(x < gate.closed_below, S(0), value), slope};
}

// For an infinite beta.
template <typename S>
L0K_HD GateAt<S> step_at(const SoftGate<S>& gate, S s) {
  return {select(s > S(0), gate.scale, S(0)), S(0)};
}

template <typename S>
L0K_HD bool is_step(const SoftGate<S>& gate) {
  constexpr S kLargest = std::numeric_limits<S>::max();
  return gate.beta > kLargest;
}

// 0 where the gate is closed, whatever it multiplies.
template <typename S>
L0K_HD S times_gate(S number, const GateAt<S>& at) {
  return select(at.value != S(0), number * at.value, S(0));
}

template <typename S>
L0K_HD S grad_of_score(S grad, S weight, const GateAt<S>& at) {
  return select(at.value != S(0), grad * weight * at.slope, S(0));
}

}  // namespace l0k
