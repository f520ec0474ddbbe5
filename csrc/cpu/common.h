// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels share: errors, tensor shorthands, one function for several instruction sets.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

// Compiles a function for plain x86-64 and for the instruction sets named; the dynamic loader
// picks one per machine. Results do not depend on the choice: fused multiply-add is off for all.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define L0K_CLONES(...) __attribute__((target_clones("default", __VA_ARGS__)))
#endif
#endif
#ifndef L0K_CLONES
#define L0K_CLONES(...)
#endif

namespace l0k {

using torch::stable::Tensor;

// Bad values; Python sees a ValueError.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A broken contract between this library and its callers; Python sees a RuntimeError.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Asks the tensor first: a call through PyTorch's dispatcher costs more than most uses.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace l0k
