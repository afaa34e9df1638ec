// The twin of cuda/device/launch.cuh on the CPU: the same names, where threads are fibers
// (machine.h). It also gives the words of CUDA that kernels use a meaning, mostly none.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "base/error.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- words of CUDA ----

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }

using std::max;
using std::min;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };

namespace camelid::cuda {

// ---- where a thread is ----

constexpr int kWarp = emulated::kLanes;
constexpr unsigned kWholeWarp = 0xffffffffu;

inline int thread_index() { return emulated::current->thread; }
inline int block_index() { return emulated::current->block->index; }
inline int block_size() { return emulated::grid.threads; }
inline int grid_size() { return emulated::grid.blocks; }

inline std::byte* shared_memory() { return emulated::current->block->shared.data(); }

// ---- how threads meet ----

inline void sync_block(emulated::Where where = emulated::Where::current()) {
  emulated::meet_block("sync_block", where);
}
inline void sync_warp(emulated::Where where = emulated::Where::current()) {
  emulated::meet_warp("sync_warp", where);
}

namespace emulated {

// Of every lane the value of the lane it asks for.
template <typename T>
T exchange(const char* what, T value, int from, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  struct Brought {
    T value;
    int from;
  } mine{value, from};
  meet_warp(what, where, &mine, [](void* const* lanes) UNWATCHED {
    T values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = static_cast<Brought*>(lanes[i])->value;
    for (int i = 0; i < kLanes; ++i) {
      Brought& lane = *static_cast<Brought*>(lanes[i]);
      lane.value = values[lane.from];
    }
  });
  return mine.value;
}

}  // namespace emulated

template <typename T>
T shuffle(T value, int lane, emulated::Where where = emulated::Where::current()) {
  return emulated::exchange("shuffle", value, lane & (kWarp - 1), where);
}
template <typename T>
T shuffle_xor(T value, int mask, emulated::Where where = emulated::Where::current()) {
  const int lane = thread_index() % kWarp;
  if (mask < 0 || mask >= kWarp) emulated::fail_here(where, cat("shuffle_xor by ", mask));
  return emulated::exchange("shuffle_xor", value, lane ^ mask, where);
}

inline bool any_of_warp(bool value, emulated::Where where = emulated::Where::current()) {
  unsigned mine = value ? 1u : 0u;
  emulated::meet_warp("any_of_warp", where, &mine, [](void* const* lanes) UNWATCHED {
    unsigned any = 0;
    for (int i = 0; i < emulated::kLanes; ++i) any |= *static_cast<unsigned*>(lanes[i]);
    for (int i = 0; i < emulated::kLanes; ++i) *static_cast<unsigned*>(lanes[i]) = any;
  });
  return mine != 0;
}

// ---- how a kernel is launched ----

inline void check(cudaError_t, const char*) {}

inline std::size_t shared_memory_limit() { return emulated::shared_memory_limit(); }

inline int compute_capability() { return emulated::compute_capability(); }

inline int multiprocessors() { return emulated::multiprocessors(); }

template <typename... Parameters>
int blocks_that_fit(void (*)(Parameters...), int threads, std::size_t shared_bytes) {
  return emulated::blocks_per_multiprocessor(threads, shared_bytes);
}

struct Launch {
  int blocks = 1;
  int threads = kWarp;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool together = false;
  bool overlaps = false;  // one kernel after the other, here
};

namespace emulated {

// A kernel and its arguments, of which every thread gets copies.
template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  UNWATCHED static void run(const void* call) {
    run(*static_cast<const Call*>(call), std::index_sequence_for<Parameters...>{});
  }
  template <std::size_t... i>
  UNWATCHED static void run(const Call& call, std::index_sequence<i...>) {
    call.kernel(std::get<i>(call.arguments)...);
  }
};

}  // namespace emulated

inline bool ask_less_of_launches() { return false; }

// Runs the kernel to its end, after what the stream has not done yet.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Launch& how,
            Arguments&&... arguments) {
  using Call = emulated::Call<Parameters...>;
  emulated::count_launch();
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  emulated::submit(
      [=] {
        emulated::run({what, how.blocks, how.threads, how.shared_bytes, how.together}, Call::run,
                      &call);
      },
      false);
}

}  // namespace camelid::cuda
