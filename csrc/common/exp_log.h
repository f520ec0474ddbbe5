// SPDX-License-Identifier: Apache-2.0
// exp and log in float64 from plain additions, multiplications and bit operations, without
// branches: compilers vectorise them, and they give the same bits on every device as long as
// the compiler does not contract a * b + c (gate decisions depend on it). Error: below 2 ulp.
#pragma once

#include "common/host_device.h"

namespace l0k {

constexpr double kLn2High = 6.93147180369123816490e-01;  // low 20 bits zero: n * kLn2High is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kLog2E = 1.44269504088896338700e+00;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer

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

// condition ? a : b as arithmetic: where a ternary has costly arms compilers branch, and do not
// vectorise.
L0K_HD double select(bool condition, double a, double b) {
  const int64_t mask = -static_cast<int64_t>(condition);
  return from_bits((to_bits(a) & mask) | (to_bits(b) & ~mask));
}

// 2^n for the exponents of normal numbers.
L0K_HD double power_of_two(int64_t n) { return from_bits((n + 1023) << 52); }

// e^x; overflow gives infinity, underflow denormals and 0, infinite x what they should.
L0K_HD double exp_fp64(double x) {
  x = select(x < -746.0, -746.0, x);
  x = select(x > 710.0, 710.0, x);
  const double shifted = x * kLog2E + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // 2^n in two factors: n itself may lie outside the exponents of normal numbers.
  const int64_t whole = to_bits(shifted) - to_bits(kRound);
  const int64_t half = to_bits(n * 0.5 + kRound) - to_bits(kRound);
  return p * power_of_two(half) * power_of_two(whole - half);
}

// ln x for positive normal x.
L0K_HD double log_fp64(double x) {
  constexpr int64_t kSqrtHalf = 0x3FE6A09E667F3BCD;  // bits of sqrt(1/2)
  constexpr int64_t kOne = 0x3FF0000000000000;
  const int64_t bits = to_bits(x);
  // The exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)), plus 1023 to keep it positive.
  const uint64_t biased = static_cast<uint64_t>(bits - kSqrtHalf + kOne) >> 52;
  const double e = from_bits(static_cast<int64_t>(biased) | 0x4330000000000000) -
                   (4503599627370496.0 + 1023.0);
  const double m = from_bits(bits - (static_cast<int64_t>(biased << 52) - kOne));
  const double f = m - 1.0;
  const double s = f / (2.0 + f);
  const double s2 = s * s;
  double p = 1.0 / 21.0;
  p = p * s2 + 1.0 / 19.0;
  p = p * s2 + 1.0 / 17.0;
  p = p * s2 + 1.0 / 15.0;
  p = p * s2 + 1.0 / 13.0;
  p = p * s2 + 1.0 / 11.0;
  p = p * s2 + 1.0 / 9.0;
  p = p * s2 + 1.0 / 7.0;
  p = p * s2 + 1.0 / 5.0;
  p = p * s2 + 1.0 / 3.0;
  const double tail = 2.0 * s * s2 * p + e * kLn2Low;
  return e * kLn2High + (2.0 * s + tail);
}

}  // namespace l0k
