// SPDX-License-Identifier: Apache-2.0
// Marks functions that both the host and a device compile.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define L0K_HD __host__ __device__ __forceinline__
#else
// Inlining is forced because a function compiled for one instruction set may only use wider
// vectors of another in code that was inlined into it.
#define L0K_HD inline __attribute__((always_inline))
#endif
