// What a block does with a row of values: threads take four neighbours each, as float32 whatever
// they are stored as and wherever the row lies, and add up what they found, in the same order every
// time.
#pragma once

#include "device/ptx.cuh"

namespace camelid::cuda {

constexpr int kFour = 4;

struct Four {
  float at[kFour];
};

// Values that lie side by side in memory.
struct Line {
  std::byte* data;
  int n;
  bool is_bf16;
  bool vectors;  // the four values from any multiple of four on may be accessed at once
};

__device__ inline Line line_of(void* data, std::int64_t first, int n, bool is_bf16) {
  auto* at = static_cast<std::byte*>(data) + first * (is_bf16 ? 2 : 4);
  const bool aligned = reinterpret_cast<std::uintptr_t>(at) % (is_bf16 ? 8 : 16) == 0;
  return {at, n, is_bf16, aligned && n % kFour == 0};
}
// A line that is only read.
__device__ inline Line line_of(const float* data, int n) {
  return line_of(const_cast<float*>(data), 0, n, false);
}
__device__ inline Line line_of(const std::uint16_t* data, std::int64_t first, int n) {
  return line_of(const_cast<std::uint16_t*>(data), first, n, true);
}

__device__ inline Four four_of(const float4& v) { return {{v.x, v.y, v.z, v.w}}; }
__device__ inline Four four_of(const uint2& pairs) {
  return {{low_bf16(pairs.x), high_bf16(pairs.x), low_bf16(pairs.y), high_bf16(pairs.y)}};
}

// ---- loads and stores ----

template <typename T>
__device__ inline T& at_column(const Line& line, int column) {
  const int bytes = line.is_bf16 ? 2 : 4;
  return *reinterpret_cast<T*>(line.data + std::int64_t{column} * bytes);
}

// Where T is what four values are stored as. All loads are under way before any is waited for.
template <typename T, int kFours>
__device__ inline void load_vectors(Four (&to)[kFours], const Line& line, int column, int step) {
  T loaded[kFours];
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    loaded[i] = T{};
    if (column + i * step < line.n) loaded[i] = at_column<const T>(line, column + i * step);
  }
#pragma unroll
  for (int i = 0; i < kFours; ++i) to[i] = four_of(loaded[i]);
}

__device__ inline float load_value(const Line& line, int column) {
  if (column >= line.n) return 0.0f;
  return line.is_bf16 ? low_bf16(at_column<const std::uint16_t>(line, column))
                      : at_column<const float>(line, column);
}

// Fours from `column` on, `step` apart; zeros past the end of the line.
template <int kFours>
__device__ inline void load_fours(Four (&to)[kFours], const Line& line, int column, int step) {
  if (line.vectors && line.is_bf16) {
    load_vectors<uint2>(to, line, column, step);
  } else if (line.vectors) {
    load_vectors<float4>(to, line, column, step);
  } else {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
#pragma unroll
      for (int j = 0; j < kFour; ++j) to[i].at[j] = load_value(line, column + i * step + j);
    }
  }
}
__device__ inline Four load_four(const Line& line, int column) {
  Four v[1];
  load_fours(v, line, column, 0);
  return v[0];
}

// Those of the four that are not past the end of the line; bf16 to nearest even.
__device__ inline void store_four(const Line& line, int column, const Four& v) {
  const std::uint32_t low = pack_bf16x2(v.at[0], v.at[1]), high = pack_bf16x2(v.at[2], v.at[3]);
  if (line.vectors) {
    if (column >= line.n) return;
    if (line.is_bf16) {
      at_column<uint2>(line, column) = uint2{low, high};
    } else {
      at_column<float4>(line, column) = float4{v.at[0], v.at[1], v.at[2], v.at[3]};
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    if (column + j >= line.n) continue;
    if (line.is_bf16) {
      const std::uint32_t pair = (j < 2 ? low : high) >> (16 * (j % 2));
      at_column<std::uint16_t>(line, column + j) = static_cast<std::uint16_t>(pair & 0xffffu);
    } else {
      at_column<float>(line, column + j) = v.at[j];
    }
  }
}

// ---- sums ----

__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The sum of every thread's value, the same in all of them. `of_warps`: kWarp words of shared
// memory that nobody else uses; the threads meet once.
__device__ inline float sum_of_block(float value, float* of_warps) {
  value = sum_of_warp(value);
  const int lane = thread_index() % kWarp;
  if (lane == 0) of_warps[thread_index() / kWarp] = value;
  sync_block();
  return sum_of_warp(lane < block_size() / kWarp ? of_warps[lane] : 0.0f);
}

}  // namespace camelid::cuda
