// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels share: one function for several instruction sets.
#pragma once

#include "common/tensors.h"

#include <cstdlib>
#include <optional>
#include <string_view>

// Functions compiled for several instruction sets. L0K_FOR_EACH_ISA defines `name`, a constant
// pointer to `body` compiled for the widest set that this machine has; ATEN_CPU_CAPABILITY
// (default, avx2, avx512) limits it as it limits PyTorch. `body` must be L0K_HD, that is, inlined.
// Results do not depend on the choice: products are fused with sums where, and only where, the
// source says fma. L0K_UP_TO_AVX2 is for loops with indexed loads and stores, which are slower as
// AVX-512 instructions than one by one.
#if defined(__x86_64__) && defined(__GNUC__)
#define L0K_VARIANT(target_isa, name, body, parameters, arguments) \
  __attribute__((target(target_isa))) auto name parameters { return body arguments; }
#define L0K_UP_TO_AVX2(name, body, parameters, arguments)           \
  auto name##_plain parameters { return body arguments; }           \
  L0K_VARIANT("avx2,fma", name##_avx2, body, parameters, arguments) \
  const auto name = l0k::choose(name##_plain, name##_avx2, name##_avx2);
#define L0K_FOR_EACH_ISA(name, body, parameters, arguments)                              \
  auto name##_plain parameters { return body arguments; }                                \
  L0K_VARIANT("avx2,fma", name##_avx2, body, parameters, arguments)                      \
  L0K_VARIANT("avx512f,avx512dq,avx512vl,avx512bw,fma", name##_avx512, body, parameters, \
              arguments)                                                                 \
  const auto name = l0k::choose(name##_plain, name##_avx2, name##_avx512);
#else
#define L0K_UP_TO_AVX2(name, body, parameters, arguments) \
  auto name parameters { return body arguments; }
#define L0K_FOR_EACH_ISA L0K_UP_TO_AVX2
#endif

namespace l0k {

#if defined(__x86_64__) && defined(__GNUC__)
enum class Isa { plain, avx2, avx512 };

inline Isa machine_isa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view wanted = limit == nullptr ? "avx512" : limit;
  if (avx2 && avx512 && wanted != "avx2" && wanted != "default") return Isa::avx512;
  return avx2 && wanted != "default" ? Isa::avx2 : Isa::plain;
}

template <typename Function>
Function* choose(Function* plain, Function* avx2, Function* avx512) {
  const Isa isa = machine_isa();
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : plain;
}
#endif

}  // namespace l0k
