// What only Hopper (sm_90a) knows: barriers in shared memory that copies arrive at, products by a
// whole warpgroup that do not wait, and registers handed from one warpgroup to another. Like
// ptx.cuh it knows no shape and no kernel; tests/cuda/emulated/sm90/hopper.cuh is its twin.
#pragma once

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "device/ptx.cuh"

namespace camelid::cuda {

constexpr int kWarpgroup = 128;  // threads: four warps, the first a multiple of four

// ---- barriers in shared memory ----
// A barrier counts arrivals; with the last one expected its phase completes, and the count starts
// anew. Phases are told apart by parity: the first has parity 0.

using Barrier = std::uint64_t;

// By one thread, before sync_block() shows the barrier to the others.
__device__ inline void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// What this thread did before is seen by whoever waited for the phase.
__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives as soon as all copies that this thread has started are there; the thread goes on.
__device__ inline void arrive_when_copied(Barrier* barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier))
      : "memory");
}

// Waits until the phase of this parity is complete. The phase before a barrier's first one
// counts as complete: waiting for parity 1 of a new barrier returns at once.
__device__ inline void wait_barrier(Barrier* barrier, unsigned parity) {
  const unsigned address = shared_address(barrier);
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  }
}

// The same of a barrier that only says whose turn it is: what others wrote before they arrived is
// not read after it.
__device__ inline void wait_signal(Barrier* barrier, unsigned parity) {
  wait_barrier(barrier, parity);
}

// ---- products of a warpgroup ----
// The tensor cores read shared memory by a path of their own, the "async proxy".

// What this thread sees in shared memory, products started after this see too.
__device__ inline void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Describes b to multiply_async: rows of 64 bf16 (128 bytes), one for each column of the product,
// pieces of 16 bytes swizzled: piece p of row r lies at r * 128 + (p ^ r % 8) * 16. The first
// row is aligned to 1024 bytes. It is the lower half of a matrix descriptor: bits 0-13, address
// / 16.
using Rows = std::uint32_t;
__device__ inline Rows describe_rows(const void* shared) {
  return (shared_address(shared) & 0x3ffffu) >> 4;
}
// The upper half: bits 32-45, distance of eight rows / 16; 62-63, 1: swizzle of 128 bytes. Source:
// PTX ISA, "Matrix Descriptor Format".
constexpr std::uint32_t kRowsUpper = 1u << 30 | 1024 / 16;

// The same rows `n_bytes` further: a multiple of 1024, plus 32 for each 16 inputs. The compiler is
// made to compute it where it is needed; it would keep dozens of them in registers otherwise.
__device__ __forceinline__ Rows advance(Rows rows, int n_bytes) {
  asm volatile("" : "+r"(rows));
  return rows + static_cast<Rows>(n_bytes / 16);
}

// Describes b to multiply_columns_async: rows of 64 bf16 again, but one for each input of the
// product, with the inputs' values for its first 64 columns; those for the next 64 lie panel_bytes
// further, and so on. Advancing by 2048 is to the next 16 inputs. Bits 16-29 of the descriptor have
// panel_bytes / 16, the "leading dimension byte offset"; the other half is the same: eight inputs
// are 1024 bytes. Source: make_gmma_desc<Major::MN> in CUTLASS's
// cute/atom/mma_traits_sm90_gmma.hpp, whose canonical layout B128 is ((8,8,m),(8,k)) :
// ((1,8,LBO),(64,SBO)) in columns and inputs.
__device__ inline Rows describe_columns(const void* shared, int panel_bytes) {
  return describe_rows(shared) | static_cast<Rows>(panel_bytes / 16) << 16;
}

namespace hopper {

using cute::SM90::GMMA::Major;

template <int kColumns, Major kMajor>
struct Product;
template <Major kMajor>
struct Product<64, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, kMajor>;
};
template <Major kMajor>
struct Product<128, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, kMajor>;
};
template <Major kMajor>
struct Product<256, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<Major::K, kMajor>;
};

template <int kColumns, Major kMajor, std::size_t... kIndex>
__device__ __forceinline__ void multiply(float (&d)[kColumns / 2], const std::uint32_t (&a)[4],
                                         Rows b, bool add,
                                         std::index_sequence<kIndex...> /*of d*/) {
  using cute::SM90::GMMA::ScaleOut;
  const std::uint64_t rows = std::uint64_t{kRowsUpper} << 32 | b;
  Product<kColumns, kMajor>::Type::fma(a[0], a[1], a[2], a[3], rows, d[kIndex]...,
                                       add ? ScaleOut::One : ScaleOut::Zero);
}

}  // namespace hopper

// Between a thread's own accesses of a and d, after a wait above all, and the next product.
// Products that add to the same d one after the other need it once.
__device__ inline void start_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Starts d[64 x kColumns] = (add ? d : 0) + a[64 x 16] b[16 x kColumns] by a warpgroup, bf16 in,
// float32 sums. Warp w has rows 16 w..; in it a is as in mma_bf16, and so is d[4 j..] for the
// columns 8 j..8 j + 7. Neither a nor d may be touched, nor b overwritten, before the product
// was waited for.
template <int kColumns>
__device__ __forceinline__ void multiply_async(float (&d)[kColumns / 2],
                                               const std::uint32_t (&a)[4], Rows b, bool add) {
  hopper::multiply<kColumns, hopper::Major::K>(d, a, b, add,
                                               std::make_index_sequence<kColumns / 2>());
}
// The same, b described by describe_columns().
template <int kColumns>
__device__ __forceinline__ void multiply_columns_async(float (&d)[kColumns / 2],
                                                       const std::uint32_t (&a)[4], Rows b,
                                                       bool add) {
  hopper::multiply<kColumns, hopper::Major::MN>(d, a, b, add,
                                                std::make_index_sequence<kColumns / 2>());
}

// Closes the group of products since the last call.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending of the latest groups are unfinished.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// After a wait, before d is read: keeps the compiler from reading it earlier.
template <int kValues>
__device__ __forceinline__ void hold(float (&d)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- registers ----

// What each thread of a block alone on its multiprocessor begins with, if it is compiled for that:
// an even share of 64 K. It is all there is to give and to take.
constexpr int registers_at_start(int threads) { return 65536 / threads / 8 * 8; }

// By all warps of a warpgroup: its threads keep kRegisters, a multiple of 8, from here on. Those
// who take more wait until others gave enough.
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace camelid::cuda
