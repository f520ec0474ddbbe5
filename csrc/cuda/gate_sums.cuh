// SPDX-License-Identifier: Apache-2.0
// How blocks add what features give to the gradients of gates: without atomics, in one order.
#pragma once

#include "cuda/common.cuh"

namespace l0k {

// A block has one gate for each of its kThreads threads and looks for their features. Each of its
// warps has sums of its own, which are added in the end, and takes one value per lane at a time.
template <int kThreads>
struct GateSums {
  int64_t first_gate;  // of the block
  int64_t last;        // the gate that is always open: a constant
  double* sums;        // of this warp, one per gate of the block
  double* values;      // one per lane: what a feature adds ...
  int32_t* places;     // ... and to which gate; -1: none

  L0K_DEVICE int32_t place_of(int64_t gate) const {
    const bool here = first_gate <= gate && gate < first_gate + kThreads && gate < last;
    return here ? static_cast<int32_t>(gate - first_gate) : -1;
  }

  // Adds one value per lane. The first of several lanes with the same gate adds for all of them.
  L0K_DEVICE void add(int32_t place, double value) const {
    constexpr int kLanes = 32;
    const int lane = threadIdx.x % kLanes;
    values[lane] = value;
    places[lane] = place;
    __syncwarp();
    double total = 0;
    bool first = place >= 0;
#pragma unroll 4
    for (int other = 0; other < kLanes; ++other) {
      if (places[other] != place) continue;
      total += values[other];
      first = first && other >= lane;
    }
    if (first) sums[place] += total;
    __syncwarp();
  }
};

}  // namespace l0k
