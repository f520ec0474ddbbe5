// SPDX-License-Identifier: Apache-2.0
// Gradients of packed weights in memory that is used again: `unpack_rows`.
#include "cpu/pack_weight.h"

#include "cpu/common.h"

#include <vector>

namespace l0k {
namespace {

Tensor unpack_rows(std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor z, Tensor index,
                   Tensor maps, std::vector<int64_t> spans, std::vector<Tensor> into,
                   std::vector<Tensor> written, bool need_z) {
  require(grads.size() == weights.size() && into.size() == weights.size() &&
              written.size() == weights.size(),
          "unpack_rows: expected one grad, into and written for each of ", weights.size(),
          " weights");
  return unpack_weights_into(grads, weights, z, index, maps, spans, into, written, need_z);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) { m.impl("unpack_rows", TORCH_BOX(&unpack_rows)); }

}  // namespace l0k
