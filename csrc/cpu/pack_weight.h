// SPDX-License-Identifier: Apache-2.0
// The backward pass of pack_weights with memory for the gradients that is given.
#pragma once

#include "common/tensors.h"

#include <cstdint>
#include <vector>

namespace l0k {

// See `unpack_rows`.
Tensor unpack_weights_into(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                           const Tensor& z, const Tensor& index, const Tensor& maps,
                           const std::vector<int64_t>& spans, const std::vector<Tensor>& into,
                           const std::vector<Tensor>& written, bool need_z);

}  // namespace l0k
