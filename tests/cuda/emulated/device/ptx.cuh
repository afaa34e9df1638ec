// The twin of cuda/device/ptx.cuh on the CPU: what its instructions do, spelled out, and with the
// freedom they have. A copy may arrive at once or only when it is waited for; machine.h decides.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/e4m3.h"

namespace camelid::cuda {

// As on the GPU never 0: a block's memory starts behind what the system keeps for itself.
constexpr unsigned kSharedBase = 1024;

inline unsigned shared_address(const void* pointer,
                               emulated::Where where = emulated::Where::current()) {
  const emulated::GuardedBytes& shared = emulated::current->block->shared;
  if (!shared.holds(pointer, 0)) emulated::fail_here(where, "not an address of shared memory");
  return kSharedBase + static_cast<unsigned>(shared.offset_of(pointer));
}

template <typename T>
T not_before(T value) {
  return value;
}

namespace emulated {

inline std::byte* at_shared(unsigned address) {
  return current->block->shared.data() + (address - kSharedBase);
}
// Where `from` is an address of the block's shared memory.
template <typename T>
void load_shared(T& value, unsigned from, const Where& where) {
  const std::byte* pointer = at_shared(from);
  check_shared("load_shared", pointer, sizeof(T), where);
  if (watched) report(pointer, sizeof(T), false, code_here());
  std::memcpy(&value, pointer, sizeof(T));
}

}  // namespace emulated

inline void load_shared(uint4& value, unsigned from,
                        emulated::Where where = emulated::Where::current()) {
  emulated::load_shared(value, from, where);
}
inline void load_shared(float2& value, unsigned from,
                        emulated::Where where = emulated::Where::current()) {
  emulated::load_shared(value, from, where);
}
inline void load_shared(uint2& value, unsigned from,
                        emulated::Where where = emulated::Where::current()) {
  emulated::load_shared(value, from, where);
}
inline void store_shared(unsigned to, const uint4& value,
                         emulated::Where where = emulated::Where::current()) {
  std::byte* pointer = emulated::at_shared(to);
  emulated::check_shared("store_shared", pointer, sizeof value, where);
  if (emulated::watched) emulated::report(pointer, sizeof value, true, emulated::code_here());
  std::memcpy(pointer, &value, sizeof value);
}
inline void load_shared(std::uint16_t& value, unsigned from,
                        emulated::Where where = emulated::Where::current()) {
  emulated::load_shared(value, from, where);
}

// ---- copies from global to shared memory, in flight until they are waited for ----

inline void copy_async(void* shared, const void* global, int n_bytes,
                       emulated::Where where = emulated::Where::current()) {
  emulated::start_copy(shared, global, n_bytes, where);
}
inline void copy_async(unsigned shared, const void* global, int n_bytes,
                       emulated::Where where = emulated::Where::current()) {
  copy_async(emulated::at_shared(shared), global, n_bytes, where);
}
inline void copy_async(unsigned shared, const void* global,
                       emulated::Where where = emulated::Where::current()) {
  emulated::start_copy(emulated::at_shared(shared), global, 16, where);
}
inline void commit_copies() { ++emulated::current->open_group; }

template <int kPending>
inline void wait_copies() {
  emulated::finish_copies(kPending);
}

// ---- products ----

inline float low_bf16(std::uint32_t pair) { return __uint_as_float(pair << 16); }
inline float high_bf16(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

namespace emulated {

// To the nearest, ties to even.
inline std::uint32_t round_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const std::uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct Mma {
  float* c;                // 4: row g at columns 2t, 2t + 1, then row g + 8
  const std::uint32_t* a;  // 4 pairs: rows g, g + 8 at columns 2t.., then both at 2t + 8..
  std::uint32_t b[2];      // pairs: column g at rows 2t.., 2t + 8..
};

// c[16 x 8] += a[16 x 16] b[16 x 8]. Products of bf16 are exact in float32.
UNWATCHED inline void multiply(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = low_bf16(mine.a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high_bf16(mine.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = low_bf16(mine.b[i]);
      b[2 * t + 8 * i + 1][g] = high_bf16(mine.b[i]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) mine.c[i] += a[row][k] * b[k][column];
    }
  }
}

}  // namespace emulated

inline void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                     emulated::Where where = emulated::Where::current()) {
  emulated::Mma mine{c, a, {b0, b1}};
  emulated::meet_warp("mma_bf16", where, &mine, emulated::multiply);
}

namespace emulated {

struct MatrixRow {
  const void* row;   // of 8 pairs' halves: 16 bytes
  std::uint32_t* r;  // 4
};

// Each lane reads its own row, wherever the values go.
UNWATCHED inline void load_rows(void* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const MatrixRow& mine = *static_cast<const MatrixRow*>(lanes[lane]);
    for (int m = 0; m < 4; ++m) {
      const auto* row = static_cast<const MatrixRow*>(lanes[8 * m + lane / 4])->row;
      std::memcpy(mine.r + m, static_cast<const std::byte*>(row) + lane % 4 * 4, 4);
    }
  }
}

UNWATCHED inline void load_columns(void* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const MatrixRow& mine = *static_cast<const MatrixRow*>(lanes[lane]);
    for (int m = 0; m < 4; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int row = lane % 4 * 2 + half;
        const auto* from = static_cast<const MatrixRow*>(lanes[8 * m + row])->row;
        std::memcpy(reinterpret_cast<std::byte*>(mine.r + m) + half * 2,
                    static_cast<const std::byte*>(from) + lane / 4 * 2, 2);
      }
    }
  }
}

}  // namespace emulated

inline void load_matrices(std::uint32_t (&r)[4], const void* row,
                          emulated::Where where = emulated::Where::current()) {
  emulated::check_shared("load_matrices", row, 16, where);
  if (emulated::watched) emulated::report(row, 16, false, emulated::code_here());
  emulated::MatrixRow mine{row, r};
  emulated::meet_warp("load_matrices", where, &mine, emulated::load_rows);
}

inline void load_matrices(std::uint32_t (&r)[4], unsigned row,
                          emulated::Where where = emulated::Where::current()) {
  load_matrices(r, emulated::at_shared(row), where);
}

inline void load_matrices_transposed(std::uint32_t (&r)[4], unsigned address,
                                     emulated::Where where = emulated::Where::current()) {
  const void* row = emulated::at_shared(address);
  emulated::check_shared("load_matrices_transposed", row, 16, where);
  if (emulated::watched) emulated::report(row, 16, false, emulated::code_here());
  emulated::MatrixRow mine{row, r};
  emulated::meet_warp("load_matrices_transposed", where, &mine, emulated::load_columns);
}

inline std::uint32_t pack_bf16x2(float low, float high) {
  return emulated::round_bf16(high) << 16 | emulated::round_bf16(low);
}
inline std::uint32_t pack_e4m3x2(float low, float high) {
  return to_e4m3(high) << 8 | to_e4m3(low);
}
inline std::uint32_t subtract_bf16x2(std::uint32_t a, std::uint32_t b) {
  return pack_bf16x2(low_bf16(a) - low_bf16(b), high_bf16(a) - high_bf16(b));
}
inline std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  return pack_bf16x2(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b));
}
inline std::uint32_t select_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const int from = static_cast<int>(selector >> (4 * i) & 7);
    result |= static_cast<std::uint32_t>(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}
inline std::uint32_t mask_or(std::uint32_t value, std::uint32_t mask, std::uint32_t bits) {
  return (value & mask) | bits;
}

inline float exp_fast(float x) { return std::exp(x); }
inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float divide_fast(float a, float b) { return a / b; }

// ---- memory that blocks share ----

inline float4 load_shared_by_blocks(const float4* pointer) { return *pointer; }
inline float load_shared_by_blocks(const float* pointer) { return *pointer; }

inline void fence_blocks() { emulated::fence(); }

inline unsigned add_atomic(unsigned* counter, unsigned amount,
                           emulated::Where where = emulated::Where::current()) {
  return emulated::add(counter, amount, where);
}
inline unsigned load_acquire(const unsigned* flag,
                             emulated::Where where = emulated::Where::current()) {
  return emulated::load(flag, where);
}

// ---- kernels one after the other: they always are ----

inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

}  // namespace camelid::cuda
