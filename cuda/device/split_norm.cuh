// The second half of a norm (layout/split_norm.h): what products of its rows are multiplied by.
#pragma once

#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "layout/split_norm.h"

namespace camelid::cuda {

constexpr int kNormLanes = 4;  // that share a token

// factors[token] = 1 / rms, or 1 where rows are whole. The last threads take the first tokens,
// since the first ones may copy those tokens meanwhile. The block has to meet before it reads them.
__device__ inline void find_norm_factors(const NormEnd& norm, int n_tokens, float* factors) {
  const int reversed = block_size() - 1 - thread_index();
  const int token = reversed / kNormLanes, lane = reversed % kNormLanes;
  const bool there = token < n_tokens;
  float sum = 0.0f;
  if (norm.squares != nullptr) {
    constexpr int kAtOnce = 16;  // reads under way: enough for 8192 values
    const float* squares = norm.squares + std::int64_t{there ? token : 0} * norm.n_parts;
    for (int first = lane; first < norm.n_parts; first += kNormLanes * kAtOnce) {
      float read[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int part = first + i * kNormLanes;
        read[i] = there && part < norm.n_parts ? load_shared_by_blocks(squares + part) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += read[i];
    }
    for (int mask = kNormLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    sum = 1.0f / sqrtf(sum * norm.share + norm.eps);
  } else {
    sum = 1.0f;
  }
  if (there && lane == 0) factors[token] = sum;
}

}  // namespace camelid::cuda
