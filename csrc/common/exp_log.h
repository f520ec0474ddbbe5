// SPDX-License-Identifier: Apache-2.0
// exp and log in float64 from additions, products, fma and bit operations, without branches:
// compilers vectorise them, and they give the same bits on every device as long as the compiler
// does not contract a * b + c by itself (gate decisions depend on it). Relative error: below 2^-51.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace l0k {

constexpr double kLn2High = 6.93147180369123816490e-01;  // low 20 bits zero: n * kLn2High is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kLog2E = 1.44269504088896338700e+00;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
constexpr double kExpLimit = 700.0;

L0K_HD int64_t to_bits(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

L0K_HD double from_bits(int64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

L0K_HD int64_t shift_left(int64_t bits, int places) {
  return static_cast<int64_t>(static_cast<uint64_t>(bits) << places);
}

// condition ? a : b as arithmetic: where a ternary has costly arms compilers branch, and do not
// vectorise.
L0K_HD double select(bool condition, double a, double b) {
  const int64_t mask = -static_cast<int64_t>(condition);
  return from_bits((to_bits(a) & mask) | (to_bits(b) & ~mask));
}

// e^x, constant beyond |x| = kExpLimit.
L0K_HD double exp_fp64(double x) {
  x = select(x < -kExpLimit, -kExpLimit, x);
  x = select(x > kExpLimit, kExpLimit, x);
  const double shifted = std::fma(x, kLog2E, kRound);  // its lowest bits hold the integer n
  const double n = shifted - kRound;
  const double r = std::fma(-n, kLn2Low, std::fma(-n, kLn2High, x));  // |r| <= ln(2) / 2
  // q = (e^r - 1 - r) / r^2, interpolated at Chebyshev points. Summed in pairs, which wait less
  // for each other than the steps of Horner's rule.
  const double r2 = r * r;
  const double r4 = r2 * r2;
  const double q01 = std::fma(0.16666666666666669, r, 0.5000000000000001);
  const double q23 = std::fma(0.008333333333330062, r, 0.04166666666662413);
  const double q45 = std::fma(0.00019841269863053618, r, 0.0013888888917213717);
  const double q67 = std::fma(2.7557268459997064e-06, r, 2.4801521295954376e-05);
  const double q89 = std::fma(2.510038549551032e-08, r, 2.7620088445409746e-07);
  const double q47 = std::fma(q67, r2, q45);
  const double q = std::fma(r4, std::fma(r4, q89, q47), std::fma(q23, r2, q01));
  const double e_r = 1.0 + std::fma(r2, q, r);
  return from_bits(to_bits(e_r) + shift_left(to_bits(shifted), 52));  // times 2^n
}

// ln(a / b) for a, b in [2^-500, 2^500].
L0K_HD double log_ratio(double a, double b) {
  constexpr int64_t kHalf = 0x0008000000000000;
  constexpr int64_t kExponent = -0x0010000000000000;  // all bits above the mantissa
  constexpr int64_t kOne = 0x3FF0000000000000;
  // The power of two 2^e next to a / b: after scaling b by it, a / b lies in [2/3, 3/2].
  const int64_t scale = (to_bits(a) - to_bits(b) + kHalf) & kExponent;
  const double scaled = from_bits(to_bits(b) + scale);
  const uint64_t biased = static_cast<uint64_t>(scale + kOne) >> 52;  // e + 1023
  const double e =
      from_bits(static_cast<int64_t>(biased) | 0x4330000000000000) - (4503599627370496.0 + 1023.0);
  const double s = (a - scaled) / (a + scaled);  // ln(a / scaled) = 2 atanh(s)
  const double t = s * s;
  // p = (atanh(s) / s - 1) / s^2, interpolated at Chebyshev points.
  const double t2 = t * t;
  const double p01 = std::fma(0.1999999999964694, t, 0.3333333333333348);
  const double p23 = std::fma(0.11111090564284265, t, 0.14285714424931004);
  const double p45 = std::fma(0.07640786424129725, t, 0.09092348993117236);
  const double p46 = std::fma(0.07568865412658467, t2, p45);
  const double p = std::fma(t2 * t2, p46, std::fma(p23, t2, p01));
  const double tail = std::fma(2.0 * s * t, p, e * kLn2Low);
  return std::fma(e, kLn2High, 2.0 * s + tail);
}

}  // namespace l0k
