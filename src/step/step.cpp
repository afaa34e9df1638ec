#include "step/step.h"

#include <algorithm>
#include <utility>

#include "model/rope.h"

namespace camelid {

namespace {

// Notes that a feature replaces the embedding of `row`; neighbours in both go together.
void add_feature(std::vector<EmbeddingRun>& runs, std::int64_t row, const float* values,
                 std::int64_t dim) {
  if (!runs.empty()) {
    EmbeddingRun& last = runs.back();
    if (last.first_row + last.n_rows == row && last.values + last.n_rows * dim == values) {
      ++last.n_rows;
      return;
    }
  }
  runs.push_back({row, 1, values});
}

}  // namespace

StepRunner::Wave StepRunner::next_wave(std::span<const StepEntry> entries,
                                       std::span<const float> features,
                                       const KvCache& cache) const {
  Wave wave;
  for (const StepEntry& entry : entries) {
    const auto left = static_cast<std::int64_t>(entry.tokens.size());
    const std::int64_t n = std::min(left, cache.left_in_chunk(entry.sequence));
    const std::int64_t position = cache.position(entry.sequence);
    for (std::int64_t i = 0; i < n; ++i) {
      const bool is_last = i + 1 == left;
      if (entry.output == Output::kLogits || (entry.output == Output::kSample && is_last)) {
        wave.rows.push_back(static_cast<std::int32_t>(wave.tokens.size()));
      }
      const std::int32_t feature =
          entry.feature_rows.empty() ? -1 : entry.feature_rows[static_cast<std::size_t>(i)];
      if (feature >= 0) {
        add_feature(wave.features, static_cast<std::int64_t>(wave.tokens.size()),
                    features.data() + feature * config_.dim, config_.dim);
      }
      wave.tokens.push_back(entry.tokens[static_cast<std::size_t>(i)]);
      wave.query_scale.push_back(
          config_.temperature_tuning ? query_temperature(config_, position + i) : 1.0f);
    }
    wave.slices.push_back({entry.sequence, n});
  }
  return wave;
}

void StepRunner::run_wave(Wave wave, KvCache& cache) {
  StepPlan plan;
  plan.tokens = wave.tokens;
  plan.rows = wave.rows;
  plan.repeatable = wave.features.empty();
  plan.query_scale = std::move(wave.query_scale);
  cache.plan(wave.slices, plan);
  logits_.resize(wave.rows.size() * static_cast<std::size_t>(config_.vocab_size));
  model_.forward(plan, wave.features, logits_.data());
  cache.advance(wave.slices);
}

StepResult StepRunner::make_result(std::span<StepEntry> entries) const {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  StepResult result;
  result.sampled.resize(entries.size(), Sampled{-1, 0.0f, {}, -1});
  std::size_t n_rows = 0;
  for (const StepEntry& entry : entries) {
    if (entry.output == Output::kLogits) n_rows += entry.tokens.size();
  }
  result.logits.resize(n_rows * vocab);
  float* next = result.logits.data();
  for (StepEntry& entry : entries) {
    if (entry.output != Output::kLogits) continue;
    entry.logits = next;
    next += entry.tokens.size() * vocab;
  }
  return result;
}

StepResult StepRunner::run(std::vector<StepEntry> entries, std::span<const float> features,
                           KvCache& cache, std::map<std::int64_t, Sampler>& samplers) {
  std::vector<SequenceSlice> whole;
  for (const StepEntry& entry : entries) {
    whole.push_back({entry.sequence, static_cast<std::int64_t>(entry.tokens.size())});
  }
  cache.check_capacity(whole);

  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  StepResult result = make_result(entries);
  while (!entries.empty()) {
    Wave wave = next_wave(entries, features, cache);
    const std::vector<SequenceSlice> slices = wave.slices;
    run_wave(std::move(wave), cache);
    const float* logits = logits_.data();
    for (std::size_t i = 0; i < entries.size(); ++i) {
      StepEntry& entry = entries[i];
      const auto n = static_cast<std::size_t>(slices[i].n_tokens);
      Sampler& sampler = samplers.at(entry.sequence);
      sampler.observe_prompt(entry.tokens.first(n));
      entry.tokens = entry.tokens.subspan(n);
      if (!entry.feature_rows.empty()) entry.feature_rows = entry.feature_rows.subspan(n);
      if (entry.output == Output::kLogits) {
        entry.logits = std::copy_n(logits, n * vocab, entry.logits);
        logits += n * vocab;
      } else if (entry.output == Output::kSample && entry.tokens.empty()) {
        result.sampled[entry.index] = sampler.sample({logits, vocab});
        logits += vocab;
      }
    }
    std::erase_if(entries, [](const StepEntry& entry) { return entry.tokens.empty(); });
  }
  return result;
}

}  // namespace camelid
