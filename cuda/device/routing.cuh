// Which expert each token of a small step visits, worked out by one block in its shared memory: the
// top-k of the router's logits, then the visits sorted by expert. Every block of a grid may do it
// for itself, since all find the same. `route_many` does it for many tokens.
#pragma once

#include "device/ptx.cuh"
#include "layout/experts.h"

namespace camelid::cuda {

constexpr int kMaxRoutedTokens = 64;
constexpr int kMaxRoutedVisits = kMaxRoutedTokens * kMaxTopK;

// Visits are numbered in the order of experts, and for one expert in the order of tokens.
struct Routing {
  int n_hit;                              // experts that are visited at all
  int hit[kMaxExperts];                   // which, in order
  int starts[kMaxExperts + 1];            // of the hit experts' visits; then the number of visits
  int token[kMaxRoutedVisits];            // of a visit
  float factor[kMaxRoutedVisits];         // of a visit: the sigmoid of its logit
  std::int16_t place[kMaxRoutedVisits];   // token * top_k + j -> its visit; by expert, ascending
  std::int16_t count[kMaxExperts];        // while sorting: visits of each expert
  std::int16_t chosen[kMaxRoutedVisits];  // while sorting: token * top_k + j -> expert
  float chosen_factor[kMaxRoutedVisits];
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

// A warp chooses for one token: the largest logits, the lower expert where they are equal.
__device__ inline void choose_experts(Routing& routing, const float* logits, int n_experts,
                                      int top_k, int token) {
  const int lane = thread_index() % kWarp;
  for (int j = 0; j < top_k; ++j) {
    float best = 0.0f;
    int expert = -1;
    constexpr int kAtOnce = 4;  // reads under way: all of 128 experts
    for (int first = lane; first < n_experts; first += kAtOnce * kWarp) {
      float read[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int e = first + i * kWarp;
        read[i] = e < n_experts ? load_shared_by_blocks(logits + e) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int e = first + i * kWarp;
        bool out = e >= n_experts;
#pragma unroll 1
        for (int k = 0; k < j; ++k) out |= routing.chosen[token * top_k + k] == e;
        if (!out && (expert < 0 || read[i] > best)) {
          best = read[i];
          expert = e;
        }
      }
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const float other = shuffle_xor(best, mask);
      const int other_expert = shuffle_xor(expert, mask);
      const bool better = other > best || (other == best && other_expert < expert);
      if (other_expert >= 0 && (expert < 0 || better)) {
        best = other;
        expert = other_expert;
      }
    }
    if (lane == 0) {
      routing.chosen[token * top_k + j] = static_cast<std::int16_t>(expert);
      routing.chosen_factor[token * top_k + j] = sigmoid(best);
    }
    sync_warp();
  }
}

// Fills `routing` from logits [n_tokens, n_experts]. All threads of the block take part; it ends
// with a meeting.
__device__ inline void route(Routing& routing, const float* logits, int n_tokens, int n_experts,
                             int top_k) {
  const int n_warps = block_size() / kWarp;
  for (int token = thread_index() / kWarp; token < n_tokens; token += n_warps) {
    choose_experts(routing, logits + std::int64_t{token} * n_experts, n_experts, top_k, token);
  }
  sync_block();
  const int n_visits = n_tokens * top_k;
  for (int e = thread_index(); e < n_experts; e += block_size()) {
    int count = 0;
    for (int i = 0; i < n_visits; ++i) count += routing.chosen[i] == e ? 1 : 0;
    routing.count[e] = static_cast<std::int16_t>(count);
  }
  sync_block();
  for (int e = thread_index(); e < n_experts; e += block_size()) {
    int first = 0, n_hit = 0;
    for (int lower = 0; lower < e; ++lower) {
      first += routing.count[lower];
      n_hit += routing.count[lower] > 0 ? 1 : 0;
    }
    const bool is_hit = routing.count[e] > 0;
    if (is_hit) {
      routing.hit[n_hit] = e;
      routing.starts[n_hit] = first;
    }
    if (e + 1 == n_experts) {
      routing.n_hit = n_hit + (is_hit ? 1 : 0);
      routing.starts[routing.n_hit] = n_visits;
    }
    if (!is_hit) continue;
    for (int i = 0; i < n_visits; ++i) {
      if (routing.chosen[i] != e) continue;
      routing.token[first] = i / top_k;
      routing.factor[first] = routing.chosen_factor[i];
      routing.place[i] = static_cast<std::int16_t>(first++);
    }
  }
  sync_block();
}

}  // namespace camelid::cuda
