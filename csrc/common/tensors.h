// SPDX-License-Identifier: Apache-2.0
// What operators of every device share: errors and tensor shorthands.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

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

// torch::stable::new_empty, at a third of its cost.
inline Tensor uninitialized(const Tensor& like, std::initializer_list<int64_t> sizes) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(),
                                                   static_cast<int64_t>(sizes.size()), nullptr,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

// Of tensors of the same sizes.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
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
