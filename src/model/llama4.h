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

  // Starts `plan`, some of whose tokens' embeddings `features` replace. What it points to may go
  // when this returns.
  void start(const StepPlan& plan, std::span<const EmbeddingRun> features);
  // The best logits of the rows of the plan that was started last. Waits for them.
  std::vector<TopLogits> top() { return backend_.top(); }
  // Float32 logits [n_rows, vocab_size] of some of those rows. Waits for them.
  void download_logits(std::int64_t first_row, std::int64_t n_rows, float* out);

  // Bytes of activations a step of `n_tokens` needs beside the backend's own scratch.
  std::size_t workspace_bytes(std::int64_t n_tokens) const;

 private:
  // The activations of one step.
  struct Rows {
    Tensor x, h, qkv, a;  // of its tokens: hidden, normed, projected, attended
    Tensor logits;        // of its plan's rows
  };
  void run(const Rows& rows, std::span<const EmbeddingRun> features);
  Tensor rows_of(Buffer& buffer, std::int64_t n_rows, std::int64_t dim, Role role);

  Backend& backend_;
  const ModelConfig& config_;
  const Weights& weights_;
  std::vector<AttentionLayer> attention_;  // [n_layers]
  Rows rows_;                              // of the step started last
  Buffer hidden_, normed_, qkv_, attended_, logits_;
};

}  // namespace camelid
