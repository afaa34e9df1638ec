// The flat arrays of one step: which sequences run which tokens, and what they want back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "step/sampler.h"

namespace camelid {

// What a sequence wants back from a step.
enum class Output : std::uint8_t {
  kNothing = 0,  // more of its prompt is to come
  kSample = 1,   // one token sampled after its last token
  kLogits = 2,   // the logits after each of its tokens
};

// For every entry the next tokens of one open sequence, in order, laid end to end.
struct StepRequest {
  std::span<const std::int64_t> sequences;  // [n]; none twice
  std::span<const std::int32_t> counts;     // [n] tokens of each, at least 1
  std::span<const std::int32_t> tokens;     // [sum of counts]
  std::span<const Output> outputs;          // [n]
  // Embeddings that stand for some of the tokens: features [n_features, dim], and for every token
  // the row that takes the place of its embedding, -1 where there is none. Both empty: none at all.
  std::span<const float> features;
  std::span<const std::int32_t> feature_rows;
};

struct StepResult {
  std::vector<Sampled> sampled;  // [n]; token -1 where nothing was asked for, or could be
  std::vector<float> logits;     // [tokens of all kLogits entries in order, vocab_size]
};

// One entry's progress through a step.
struct StepEntry {
  std::int64_t sequence = 0;
  Output output = Output::kNothing;
  std::span<const std::int32_t> tokens;        // still to run
  std::size_t index = 0;                       // in the request
  float* logits = nullptr;                     // where the next token's go, for kLogits
  std::span<const std::int32_t> feature_rows;  // of the tokens still to run, or empty
};

// Checks the arrays against each other, the vocabulary and the width of features; throws
// kInvalidRequest.
std::vector<StepEntry> check_request(const StepRequest& request, std::int64_t vocab_size,
                                     std::int64_t dim);

}  // namespace camelid
