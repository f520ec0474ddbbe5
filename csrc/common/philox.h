// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, from Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011), and the noise of the gates made of it.
#pragma once

#include "common/host_device.h"

namespace l0k {

// Four 32-bit words. In vector loops they are held as uint64_t, so that products need no shuffles.
template <typename Word>
struct Words4 {
  Word x, y, z, w;
};

struct PhiloxKey {
  uint32_t low, high;
};

template <typename Word>
L0K_HD Words4<Word> philox_round(Words4<Word> c, PhiloxKey key) {
  const uint64_t a = uint64_t{0xD2511F53u} * static_cast<uint32_t>(c.x);
  const uint64_t b = uint64_t{0xCD9E8D57u} * static_cast<uint32_t>(c.z);
  return {static_cast<Word>(b >> 32) ^ c.y ^ key.low, static_cast<uint32_t>(b),
          static_cast<Word>(a >> 32) ^ c.w ^ key.high, static_cast<uint32_t>(a)};
}

template <typename Word>
L0K_HD Words4<Word> philox4x32(Words4<Word> counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    counter = philox_round(counter, key);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return counter;
}

// Which noise a draw reads. `kind` names the purpose of a draw, `sample` numbers repeated ones.
struct NoiseStream {
  uint64_t seed;
  uint32_t step;
  uint32_t row;
  uint32_t kind;
  uint32_t sample;
};

constexpr int kNoiseBits = 23;
constexpr double kNoiseScale = 8388608.0;  // 2^23
constexpr int32_t kLastNoise = (1 << kNoiseBits) - 1;

// Words of gates 4 * block .. 4 * block + 3.
template <typename Word>
L0K_HD Words4<Word> noise_words(const NoiseStream& stream, uint32_t block) {
  const Words4<Word> counter{block, stream.row, stream.kind << 24 | stream.sample, stream.step};
  return philox4x32(counter,
                    {static_cast<uint32_t>(stream.seed), static_cast<uint32_t>(stream.seed >> 32)});
}

// The integer k of a word; the uniform number is u = (k + .5) 2^-23.
L0K_HD int32_t noise_k(uint64_t word) {
  return static_cast<int32_t>(static_cast<uint32_t>(word) >> (32 - kNoiseBits));
}

L0K_HD int32_t noise_of_gate(const NoiseStream& stream, int64_t gate) {
  const auto words = noise_words<uint32_t>(stream, static_cast<uint32_t>(gate / 4));
  // Not an array: a GPU would keep it in memory.
  const uint32_t even = gate % 4 < 2 ? words.x : words.z;
  const uint32_t odd = gate % 4 < 2 ? words.y : words.w;
  return noise_k(gate % 2 == 0 ? even : odd);
}

}  // namespace l0k
