// SPDX-License-Identifier: Apache-2.0
// Tensor-core products and asynchronous copies (sm_80 and later), as the PTX ISA describes them.
#pragma once

#include "cuda/common.cuh"

namespace l0k {

// Fragments of mma.m16n8k16; lane = 4 g + t, pairs of 16-bit numbers in one register, the first
// in the lower half:
//   a[0] row g,     columns 2t, 2t + 1      a[2] row g,     columns 2t + 8, 2t + 9
//   a[1] row g + 8, columns 2t, 2t + 1      a[3] row g + 8, columns 2t + 8, 2t + 9
//   b[0] rows 2t, 2t + 1, column g          b[1] rows 2t + 8, 2t + 9, column g
//   d[0], d[1] row g, columns 2t, 2t + 1    d[2], d[3] row g + 8, same columns

// d += a b with float32 sums. T is __half or __nv_bfloat16; all 32 lanes call it.
template <typename T>
L0K_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8
// of matrix l / 8 (16 bytes, aligned) and gets in fragment[m] of matrix m the numbers 2t, 2t + 1
// of row g; transposed, the numbers g of rows 2t, 2t + 1. All 32 lanes call it.
L0K_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row);
L0K_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const void* row);

// Copies 16 bytes from global to shared memory, both aligned: the first `valid_bytes` (0 to 16)
// are read, the rest become 0. The data is there, for this thread, once a wait has returned.
L0K_DEVICE void copy_async_16(void* to_shared, const void* from_global, int valid_bytes = 16);

// Puts this thread's copies since the last commit into one group.
L0K_DEVICE void copy_async_commit();

// Waits until at most the N youngest groups of this thread are not complete.
template <int N>
L0K_DEVICE void copy_async_wait();

#if defined(L0K_HARNESS)

template <typename T>
L0K_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  harness::mma_m16n8k16<T>(d, a, b);
}

L0K_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
  harness::load_matrices<false>(fragment, row);
}

L0K_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  harness::load_matrices<true>(fragment, row);
}

L0K_DEVICE void copy_async_16(void* to_shared, const void* from_global, int valid_bytes) {
  harness::copy_async_16(to_shared, from_global, valid_bytes);
}

L0K_DEVICE void copy_async_commit() { harness::copy_async_commit(); }

template <int N>
L0K_DEVICE void copy_async_wait() {
  harness::copy_async_wait(N);
}

#else

template <typename T>
L0K_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

L0K_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

L0K_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

L0K_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

L0K_DEVICE void copy_async_16(void* to_shared, const void* from_global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to_shared)), "l"(__cvta_generic_to_global(from_global)),
                 "r"(valid_bytes)
               : "memory");
}

L0K_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
L0K_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

}  // namespace l0k
