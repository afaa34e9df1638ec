// The forward pass of Llama 4's language model over one step's rows.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace camelid {

// Embeddings [n_rows, dim] float32 for rows from first_row on, in the place of their tokens'.
struct EmbeddingRun {
  std::int64_t first_row = 0;
  std::int64_t n_rows = 0;
  const float* values = nullptr;
};

class Llama4 {
 public:
  Llama4(Backend& backend, const ModelConfig& config, const Weights& weights);

  // Runs `plan`, some of whose tokens' embeddings `features` replace, and writes float32 logits
  // [plan.rows.size(), vocab_size].
  void forward(const StepPlan& plan, std::span<const EmbeddingRun> features, float* logits);

  // Bytes of activations a step of `n_tokens` needs beside the backend's own scratch.
  std::size_t workspace_bytes(std::int64_t n_tokens) const;

 private:
  // The activations of one step.
  struct Rows {
    Tensor x, h, qkv, a;  // of its tokens: hidden, normed, projected, attended
    Tensor last, logits;  // of its plan's rows
  };
  void run(const Rows& rows, std::span<const EmbeddingRun> features);
  Tensor rows_of(Buffer& buffer, std::int64_t n_rows, std::int64_t dim, Role role);

  Backend& backend_;
  const ModelConfig& config_;
  const Weights& weights_;
  std::vector<AttentionLayer> attention_;  // [n_layers]
  Buffer hidden_, normed_, qkv_, attended_, last_, logits_;
};

}  // namespace camelid
