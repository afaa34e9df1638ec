// The one place with inline assembly for every GPU from sm_80 on: copies that do not wait, tensor
// core products, packed bf16 arithmetic, and memory that blocks share. hopper.cuh has what only
// sm_90a knows. Nothing here knows a shape or a layout.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/e4m3.h"

namespace camelid::cuda {

// Shared memory by its own addresses, 32 bits wide: half the registers and sums of a pointer.
__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
// The same value; what is computed from it is computed after this. Compilers would do it before a
// loop, and keep dozens of addresses in registers.
template <typename T>
__device__ __forceinline__ T not_before(T value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ inline void load_shared(uint4& value, unsigned from) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from)
               : "memory");
}
__device__ inline void load_shared(float2& value, unsigned from) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];\n"
               : "=f"(value.x), "=f"(value.y)
               : "r"(from)
               : "memory");
}
__device__ inline void load_shared(uint2& value, unsigned from) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];\n"
               : "=r"(value.x), "=r"(value.y)
               : "r"(from)
               : "memory");
}
__device__ inline void store_shared(unsigned to, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}
__device__ inline void load_shared(std::uint16_t& value, unsigned from) {
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(value) : "r"(from) : "memory");
}

// ---- copies from global to shared memory, in flight until they are waited for ----

// Copies 16 bytes, those from `n_bytes` on as zeros. Both addresses are multiples of 16; the source
// is not read where n_bytes is 0. Past L1, since other blocks may have written it.
__device__ inline void copy_async(unsigned shared, const void* global, int n_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(n_bytes)
               : "memory");
}
__device__ inline void copy_async(void* shared, const void* global, int n_bytes) {
  copy_async(shared_address(shared), global, n_bytes);
}

// All 16 bytes. Nothing tells L2 that nobody will read weights a second time: ptxas 12.9 to 13.2
// loses the register of such a hint where the shared address has a part that is the same in the
// whole warp (desc[UR1], which nobody wrote), and the copy is then an illegal instruction.
__device__ inline void copy_async(unsigned shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global) : "memory");
}

// Closes the group of this thread's copies since the last call; an empty group counts too.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- products ----

// c[16 x 8] += a[16 x 16] b[16 x 8] by a warp, bf16 in, float32 sums. With g = lane / 4, t = lane %
// 4: a holds rows g, g + 8 at columns 2t.. and again at columns 2t + 8..; b rows 2t.. and 2t + 8..
// of column g; c row g and row g + 8 at columns 2t, 2t + 1.
__device__ inline void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Loads four 8 x 8 matrices of 16-bit values from shared memory, by a warp: lane l supplies the
// address of row l % 8 of matrix l / 8 (16 bytes, aligned), and r[m] of lane l becomes the pair at
// columns 2 (l % 4).. of row l / 4 of matrix m.
__device__ inline void load_matrices(std::uint32_t (&r)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
  load_matrices(r, shared_address(row));
}

// The same, transposed on the way: r[m] of lane l becomes the pair at rows 2 (l % 4).. of column
// l / 4 of matrix m.
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// a * b of two bf16 pairs, subnormal ones too. Before Hopper there is only a * b + c, and with -0
// for c it is the same.
__device__ inline std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
  return result;
}

// a - b of two bf16 pairs.
__device__ inline std::uint32_t subtract_bf16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t result;
#if __CUDA_ARCH__ >= 900
  asm("sub.rn.bf16x2 %0, %1, %2;\n" : "=r"(result) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(b), "r"(0xbf80bf80u), "r"(a));
#endif
  return result;
}

// (value & mask) | bits in one instruction.
__device__ inline std::uint32_t mask_or(std::uint32_t value, std::uint32_t mask,
                                        std::uint32_t bits) {
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

// Four of the eight bytes of a (0 to 3) and b (4 to 7), as the selector's digits name them.
__device__ inline std::uint32_t select_bytes(std::uint32_t a, std::uint32_t b,
                                             std::uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Two float32 rounded to a bf16 pair, `low` in the low half.
__device__ inline std::uint32_t pack_bf16x2(float low, float high) {
  std::uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
// Two float32 as bytes of e4m3, to nearest even, `low` in the lowest; see layout/e4m3.h.
__device__ inline std::uint32_t pack_e4m3x2(float low, float high) {
#if __CUDA_ARCH__ >= 890
  std::uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(result) : "f"(high), "f"(low));
  return result;
#else
  return to_e4m3(high) << 8 | to_e4m3(low);
#endif
}
__device__ inline float low_bf16(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(std::uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

__device__ inline float exp_fast(float x) { return __expf(x); }
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}
// a / b to 2 ulp; 0 where b is above 2^126.
__device__ inline float divide_fast(float a, float b) { return __fdividef(a, b); }

// ---- memory that blocks share ----

__device__ inline float4 load_shared_by_blocks(const float4* pointer) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(pointer)
               : "memory");
  return v;
}
__device__ inline float load_shared_by_blocks(const float* pointer) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];\n" : "=f"(v) : "l"(pointer) : "memory");
  return v;
}

// What this thread wrote before is seen by whoever sees what it writes after, and calls this after
// it saw that. Not __threadfence(), which orders all fences of the GPU too and takes longer.
__device__ inline void fence_blocks() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }

__device__ inline unsigned add_atomic(unsigned* counter, unsigned amount) {
  return atomicAdd(counter, amount);
}
__device__ inline unsigned load_acquire(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// ---- kernels one after the other ----

// From here on the next kernel of the stream may start; and: the one before is finished and seen.
// Both do nothing where the launch did not ask for it, or before Hopper.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace camelid::cuda
