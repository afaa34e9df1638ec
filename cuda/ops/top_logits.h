// The best logits of each row, and the sum of all: what sampling needs to know of a vocabulary, in
// one launch and a few hundred bytes instead of a few hundred thousand.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/launch.cuh"

namespace camelid::cuda {

constexpr int kMostTop = 128;

// Of one row. Source of the order: the greater first, of equal ones the lower id.
struct TopLogits {
  float logits[kMostTop];  // best first
  std::int32_t tokens[kMostTop];
  // Over the row, in float32 sums of parts.
  float sum;                // of exp(logit - logits[0])
  float scaled_sum;         // of exp((logit - logits[0]) * factor)
  std::int32_t n;           // min(kMostTop, vocab)
  std::int32_t not_finite;  // the first id whose logit is not finite, -1 where all are
  std::int32_t drawn;       // from the whole row where it was asked for, else -1
  float drawn_logit;
};

// How rows are sampled, each by itself: [n_rows].
struct Sampling {
  const float* factors = nullptr;   // 1 / temperature, above 0. Null: 1
  const float* uniforms = nullptr;  // 0 to 1: which token is drawn; below 0, and null: none is
};

std::size_t top_logits_scratch_bytes(int n_rows, int vocab);

// out[n_rows] from logits float32 [n_rows][stride]. `counters`: n_rows of them, 0 between launches.
// The token drawn is the first up to which exp((logit - best) * factor), added up by ids, come to
// more than its uniform of their sum; in float32, so that one in some million may be a neighbour.
// The same bits every time. Waits for nothing.
void top_logits(TopLogits* out, const float* logits, std::int64_t stride, const Sampling& sampling,
                int n_rows, int vocab, std::byte* scratch, unsigned* counters, cudaStream_t stream);

}  // namespace camelid::cuda
