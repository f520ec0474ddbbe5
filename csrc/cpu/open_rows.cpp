// SPDX-License-Identifier: Apache-2.0
// Which rows an optimizer has to update: `open_rows`.
#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace l0k {
namespace {

// All bits of a block at once, but for the signs: -0 is zero, and NaN is not.
template <typename T, typename Bits>
L0K_HD bool any_nonzero(const T* numbers, int64_t size) {
  constexpr int64_t kBlock = 1024;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max() >> 1;
  for (int64_t at = 0; at < size; at += kBlock) {
    const int64_t end = std::min(at + kBlock, size);
    Bits found = 0;
    for (int64_t i = at; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, numbers + i, sizeof bits);
      found |= bits;
    }
    if (found & kMagnitude) return true;
  }
  return false;
}

L0K_FOR_EACH_ISA(any_f32, (any_nonzero<float, uint32_t>), (const float* numbers, int64_t size), (numbers, size))
L0K_FOR_EACH_ISA(any_f64, (any_nonzero<double, uint64_t>), (const double* numbers, int64_t size),
                 (numbers, size))

template <typename T>
int64_t run(const Tensor& grad, int64_t* last, const Rows& rows, int64_t now,
            const uint8_t* written, bool (*any)(const T*, int64_t)) {
  const T* numbers = data<T>(grad);
  std::vector<uint8_t> found(rows.count, 0);
  for_rows(rows, rows.count, [&](int64_t row) {
    const bool is_read = last[row] <= now && (written == nullptr || written[row]);
    if (is_read) found[row] = any(numbers + row * rows.size, rows.size);
  });
  int64_t stale = 0;
  for (int64_t row = 0; row < rows.count; ++row) {
    if (!found[row]) continue;
    if (last[row] < now) {
      ++stale;
    } else {
      last[row] = now + 1;
    }
  }
  return stale;
}

int64_t open_rows(Tensor grad, Tensor last, int64_t now, std::optional<Tensor> written) {
  const Rows rows = rows_of(grad);
  int64_t* counters = counters_of(last, rows);
  const uint8_t* known = nullptr;
  if (written) {
    require(written->scalar_type() == ScalarType::Bool && written->is_contiguous() &&
                written->numel() == rows.count,
            "written: expected contiguous bool of shape [", rows.count, "]; got ", Shown{*written});
    known = static_cast<const uint8_t*>(written->const_data_ptr());
  }
  if (grad.scalar_type() == ScalarType::Double) {
    return run<double>(grad, counters, rows, now, known, any_f64);
  }
  require(grad.scalar_type() == ScalarType::Float, "grad: expected float64 or float32; got ",
          Shown{grad});
  return run<float>(grad, counters, rows, now, known, any_f32);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l0kernels, CPU, m) { m.impl("open_rows", TORCH_BOX(&open_rows)); }

}  // namespace l0k
