// From a batch to logits and sampled tokens: cuts a step at chunk boundaries, plans its KV pages,
// runs the model, and samples the rows that asked for it.
//
// Where the host only sees the best logits, and the device works while the host does, it runs
// ahead: after a step of decoding alone it starts the next one with the tokens just sampled, before
// anybody asks. Who then asks for just that finds it done or under way; what nobody asks for is
// forgotten, and the keys it left are overwritten by whatever comes at their position.
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
  StepRunner(const ModelConfig& config, Llama4& model, const Backend& backend)
      : config_(config), model_(model), finds_top_(backend.finds_top()) {}

  // Runs `entries` to the end, advancing `cache` and the sequences' samplers. Throws kCapacity
  // before anything changes when the pages do not fit. Logits that are not finite are told by
  // Sampled: they end their own sequence only.
  // `features`: of the request the entries were made from.
  StepResult run(std::vector<StepEntry> entries, std::span<const float> features, KvCache& cache,
                 std::map<std::int64_t, Sampler>& samplers);

 private:
  using Samplers = std::map<std::int64_t, Sampler>;
  // The part of a step in which no sequence crosses a chunk boundary, so that each holds the local
  // pages of one chunk only.
  struct Wave {
    std::vector<SequenceSlice> slices;  // [entries still running]
    std::vector<std::int32_t> tokens;   // [n_tokens]
    std::vector<std::int32_t> rows;     // of `tokens`, whose logits are wanted
    std::vector<float> query_scale;     // [n_tokens]
    std::vector<float> sampling_scale;  // [rows]
    std::vector<float> sampling_uniform;
    std::vector<EmbeddingRun> features;  // what replaces embeddings
    bool wants_logits = false;           // all of them, by somebody
  };
  Wave next_wave(std::span<const StepEntry> entries, std::span<const float> features,
                 const KvCache& cache, const Samplers& samplers) const;
  void start(Wave& wave, KvCache& cache);
  Sampled sample(Sampler& sampler, std::int64_t row);  // of the wave started last
  void finish_wave(const Wave& wave, std::vector<StepEntry>& entries, Samplers& samplers,
                   StepResult& result);
  StepResult make_result(std::span<StepEntry> entries) const;
  void take_ahead(std::vector<StepEntry>& entries, KvCache& cache, Samplers& samplers,
                  StepResult& result);
  void run_ahead(std::span<const StepEntry> entries, const StepResult& result, KvCache& cache,
                 const Samplers& samplers);

  const ModelConfig& config_;
  Llama4& model_;
  bool finds_top_;
  std::vector<TopLogits> top_;        // of the rows of the wave started last, once waited for
  std::vector<float> logits_;         // the same rows' logits [rows, vocab_size], or one of them
  std::vector<StepEntry> ahead_;      // what was started ahead, one token each
  std::vector<std::int32_t> tokens_;  // theirs
};

}  // namespace camelid
