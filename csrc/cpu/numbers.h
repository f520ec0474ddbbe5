// SPDX-License-Identifier: Apache-2.0
// The numbers that activations are made of, and what is computed in; conversions that compilers
// make vectors of.
#pragma once

#include "common/host_device.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace l0k {

using c10::BFloat16;
using c10::Half;

// What is computed in.
template <typename X>
using Compute = std::conditional_t<std::is_same_v<X, double>, double, float>;

template <typename To, typename From>
L0K_HD To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// value, or 0 if not `keep`. A condition would do as well, but floating-point work that only one of
// its branches needs stops compilers from using vectors.
template <typename S>
L0K_HD S kept(bool keep, S value) {
  using Bits = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;
  return same_bits<S>(same_bits<Bits>(value) & (Bits{0} - static_cast<Bits>(keep)));
}

template <typename X>
L0K_HD Compute<X> to_compute(X number) {
  return static_cast<Compute<X>>(number);
}

template <typename X>
L0K_HD X from_compute(Compute<X> number) {
  return static_cast<X>(number);
}

// As c10's conversions of Half, which have branches. Exponents differ by 112.
constexpr uint32_t kHalfBias = 112u << 23;

L0K_HD float to_compute(Half number) {
  const uint32_t magnitude = number.x & 0x7FFFu;
  const uint32_t special = magnitude >= 0x7C00u ? kHalfBias : 0u;  // Inf, NaN
  const float usual = same_bits<float>((magnitude << 13) + kHalfBias + special);
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const bool is_tiny = magnitude < 0x400u;
  const uint32_t bits =
      same_bits<uint32_t>(kept(is_tiny, tiny)) | same_bits<uint32_t>(kept(!is_tiny, usual));
  return same_bits<float>(bits | static_cast<uint32_t>(number.x & 0x8000u) << 16);
}

// To nearest, ties to even.
template <>
L0K_HD Half from_compute<Half>(float number) {
  const uint32_t bits = same_bits<uint32_t>(number);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t usual = (magnitude - kHalfBias + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  // The last digit of 0.5 is worth as much as the last one of tiny halves.
  const uint32_t tiny =
      same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - same_bits<uint32_t>(0.5f);
  const uint32_t is_tiny = 0u - static_cast<uint32_t>(magnitude < 0x38800000u);
  uint32_t result = (tiny & is_tiny) | (usual & ~is_tiny);
  result = magnitude >= 0x47800000u ? 0x7C00u : result;
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return Half(static_cast<uint16_t>(result | (bits >> 16 & 0x8000u)), Half::from_bits());
}

}  // namespace l0k
