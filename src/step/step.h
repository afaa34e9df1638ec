// From a batch to logits and sampled tokens: cuts a step at chunk boundaries, plans its KV pages,
// runs the model, and samples the rows that asked for it.
#pragma once

#include <map>
#include <span>
#include <vector>

#include "kv/cache.h"
#include "model/llama4.h"
#include "step/batch.h"
#include "step/sampler.h"

namespace camelid {

class StepRunner {
 public:
  StepRunner(const ModelConfig& config, Llama4& model) : config_(config), model_(model) {}

  // Runs `entries` to the end, advancing `cache` and the sequences' samplers. Throws kCapacity
  // before anything changes when the pages do not fit. Logits that are not finite are told by
  // Sampled: they end their own sequence only.
  // `features`: of the request the entries were made from.
  StepResult run(std::vector<StepEntry> entries, std::span<const float> features, KvCache& cache,
                 std::map<std::int64_t, Sampler>& samplers);

 private:
  // The part of a step in which no sequence crosses a chunk boundary, so that each holds the local
  // pages of one chunk only.
  struct Wave {
    std::vector<SequenceSlice> slices;   // [entries still running]
    std::vector<std::int32_t> tokens;    // [n_tokens]
    std::vector<std::int32_t> rows;      // of `tokens`, whose logits are wanted
    std::vector<float> query_scale;      // [n_tokens]
    std::vector<EmbeddingRun> features;  // what replaces embeddings
  };
  Wave next_wave(std::span<const StepEntry> entries, std::span<const float> features,
                 const KvCache& cache) const;
  void run_wave(Wave wave, KvCache& cache);
  StepResult make_result(std::span<StepEntry> entries) const;

  const ModelConfig& config_;
  Llama4& model_;
  std::vector<float> logits_;  // [rows of the wave, vocab_size]
};

}  // namespace camelid
