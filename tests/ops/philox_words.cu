// SPDX-License-Identifier: Apache-2.0
// Philox words in bulk, for test_philox.py: by a CUDA kernel that runs on the CPU, and by C++ loops
// over 64-bit places, as the CPU operators have them.
#include "common/philox.h"
#include "cuda/common.cuh"

namespace {

constexpr int kThreads = 256;

struct Request {
  l0k::NoiseStream stream;
  int64_t blocks;
  uint32_t* words;
};

__global__ void L0K_BOUNDS(kThreads, 1) write_words(const Request p) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= p.blocks) return;
  const auto words = l0k::noise_words<uint32_t>(p.stream, static_cast<uint32_t>(block));
  p.words[4 * block] = words.x;
  p.words[4 * block + 1] = words.y;
  p.words[4 * block + 2] = words.z;
  p.words[4 * block + 3] = words.w;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void cuda_words(uint64_t seed, uint32_t step,
                                                                  int64_t blocks,
                                                                  uint32_t* words) {
  const Request request{{seed, step, 0, 0, 0}, blocks, words};
  L0K_LAUNCH(write_words, (blocks + kThreads - 1) / kThreads, kThreads, 0, l0k::Stream{}, request);
}

extern "C" __attribute__((visibility("default"))) void cpu_words(uint64_t seed, uint32_t step,
                                                                 int64_t blocks, uint32_t* words) {
  for (int64_t block = 0; block < blocks; ++block) {
    const auto four =
        l0k::noise_words<uint64_t>({seed, step, 0, 0, 0}, static_cast<uint32_t>(block));
    words[4 * block] = static_cast<uint32_t>(four.x);
    words[4 * block + 1] = static_cast<uint32_t>(four.y);
    words[4 * block + 2] = static_cast<uint32_t>(four.z);
    words[4 * block + 3] = static_cast<uint32_t>(four.w);
  }
}
