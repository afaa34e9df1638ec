// A token drawn from the whole row by the last of its blocks: by running sums over the parts that
// warps left, then over the logits of one part.
#pragma once

#include "ops/top_logits.cuh"

namespace camelid::cuda::top {

// What a warp's part weighs, relative to the best logit.
__device__ inline float weight_of(const Shape& shape, const Parts& parts, int part, float best,
                                  float factor) {
  if (part >= shape.n_slices * kWarps) return 0.0f;
  const float scaled = load_shared_by_blocks(parts.scaled + part);
  if (scaled == 0.0f) return 0.0f;  // no groups there
  const float largest = max(load_shared_by_blocks(parts.largest + 2 * part),
                            load_shared_by_blocks(parts.largest + 2 * part + 1));
  return scaled * exp_fast((largest - best) * factor);
}

// The part in which the running sum of all comes to more than `uniform` of it, and what is left of
// that there, to merge. Each thread has four parts side by side.
__device__ inline void find_part(Merge& merge, const Shape& shape, const Parts& parts, float best,
                                 float factor, float uniform) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int first = thread_index() * kFour;
  float weights[kFour];
  float mine = 0.0f;
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    weights[j] = weight_of(shape, parts, first + j, best, factor);
    mine += weights[j];
  }
  const float up_to_mine = running_sum(mine);
  if (lane == kWarp - 1) merge.scaled[warp] = up_to_mine;
  sync_block();
  const float of_warps = running_sum(lane < kWarps ? merge.scaled[lane] : 0.0f);
  const float total = shuffle(of_warps, kWarp - 1);
  const float lower = shuffle(of_warps, warp - 1);
  float before = (warp > 0 ? lower : 0.0f) + (up_to_mine - mine);
  const float target = uniform * total;
  // Rounding may leave none whose sum is beyond the target, or two: it is the last that begins
  // before it.
  int part = -1;
  float left = 0.0f;
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    if (weights[j] > 0.0f && before <= target) {
      part = first + j;
      left = target - before;
    }
    before += weights[j];
  }
  const int of_warp = largest_of_lanes(part, kWarp);
  if (lane == 0) merge.bad[warp] = of_warp;
  sync_block();
  const int drawn = largest_of_lanes(merge.bad[lane % kWarps], kWarp);
  if (part == drawn) merge.left_in_part = left;
  if (thread_index() == 0) merge.drawn_part = drawn;
  sync_block();
}

// By the first warp. The last token of the part that weighs anything, where rounding passed all.
__device__ inline void draw_in_part(const Merge& merge, const Shape& shape, const Line& logits,
                                    float best, float factor, TopLogits& out) {
  const int lane = thread_index() % kWarp;
  const int begin = merge.drawn_part * 2 * shape.group;
  const int end = min(begin + 2 * shape.group, shape.vocab);
  float left = merge.left_in_part;
  Key drawn = 0;  // the complement of the place first, so that the greatest is the first
  Key last = 0;
  for (int at = begin; at < end && drawn == 0; at += kWarp * kFour) {
    const int column = at + lane * kFour;
    const Four v = load_four(logits, column < end ? column : shape.vocab);
    float weights[kFour];
    float mine = 0.0f;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      weights[j] = column + j < end ? exp_fast((v.at[j] - best) * factor) : 0.0f;
      mine += weights[j];
    }
    const float up_to_mine = running_sum(mine);
    float sum = up_to_mine - mine;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      sum += weights[j];
      if (weights[j] == 0.0f) continue;
      const Key bits = __float_as_uint(v.at[j]);
      last = max(last, static_cast<Key>(column + j + 1) << 32 | bits);
      if (sum > left) {
        drawn = max(drawn, static_cast<Key>(~static_cast<unsigned>(column + j)) << 32 | bits);
      }
    }
    drawn = largest_of_lanes(drawn, kWarp);
    left -= shuffle(up_to_mine, kWarp - 1);
  }
  last = largest_of_lanes(last, kWarp);
  if (lane != 0) return;
  const Key found = drawn != 0 ? drawn : last;
  const auto id = static_cast<unsigned>(found >> 32);
  out.drawn = static_cast<std::int32_t>(drawn != 0 ? ~id : id - 1);
  out.drawn_logit = __uint_as_float(static_cast<unsigned>(found));
}

// By the whole block, to out.drawn and out.drawn_logit.
__device__ inline void draw(Merge& merge, const Shape& shape, const Line& logits,
                            const Parts& parts, float best, float factor, float uniform,
                            TopLogits& out) {
  find_part(merge, shape, parts, best, factor, uniform);
  if (thread_index() < kWarp) draw_in_part(merge, shape, logits, best, factor, out);
}

}  // namespace camelid::cuda::top
