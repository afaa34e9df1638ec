#include "step/step.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/error.h"
#include "model/rope.h"

namespace camelid {

namespace {

// Rows of one wave of which all logits are wanted: those of Llama 4 take 0.8 MB each on the device.
constexpr std::int64_t kMostLogits = 512;

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
                                       std::span<const float> features, const KvCache& cache,
                                       const Samplers& samplers) const {
  Wave wave;
  for (const StepEntry& entry : entries) {
    const auto left = static_cast<std::int64_t>(entry.tokens.size());
    std::int64_t n = std::min(left, cache.left_in_chunk(entry.sequence));
    if (entry.output == Output::kLogits) {
      const auto rows = static_cast<std::int64_t>(wave.rows.size());
      n = std::min(n, std::max<std::int64_t>(kMostLogits - rows, 1));
    }
    const std::int64_t position = cache.position(entry.sequence);
    const Sampler& sampler = samplers.at(entry.sequence);
    for (std::int64_t i = 0; i < n; ++i) {
      const bool is_last = i + 1 == left;
      if (entry.output == Output::kLogits || (entry.output == Output::kSample && is_last)) {
        wave.rows.push_back(static_cast<std::int32_t>(wave.tokens.size()));
        wave.sampling_scale.push_back(sampler.scale());
        wave.sampling_uniform.push_back(sampler.draws_plainly() ? sampler.uniform() : -1.0f);
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
    wave.wants_logits |= entry.output == Output::kLogits;
  }
  return wave;
}

void StepRunner::start(Wave& wave, KvCache& cache) {
  StepPlan plan;
  plan.tokens = wave.tokens;
  plan.rows = wave.rows;
  plan.repeatable = wave.features.empty();
  plan.query_scale = std::move(wave.query_scale);
  plan.sampling_scale = std::move(wave.sampling_scale);
  plan.sampling_uniform = std::move(wave.sampling_uniform);
  cache.plan(wave.slices, plan);
  model_.start(plan, wave.features);
}

Sampled StepRunner::sample(Sampler& sampler, std::int64_t row) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  if (!top_.empty()) {
    if (std::optional<Sampled> sampled = sampler.sample(top_[static_cast<std::size_t>(row)])) {
      return *std::move(sampled);
    }
    logits_.resize(vocab);
    model_.download_logits(row, 1, logits_.data());
    return sampler.sample(logits_);
  }
  return sampler.sample({logits_.data() + static_cast<std::size_t>(row) * vocab, vocab});
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

// Waits for the wave, and hands its logits to the entries that have a part in it.
void StepRunner::finish_wave(const Wave& wave, std::vector<StepEntry>& entries, Samplers& samplers,
                             StepResult& result) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  top_.clear();
  if (finds_top_ && !wave.wants_logits && !wave.rows.empty()) {
    top_ = model_.top();
  } else {
    logits_.resize(wave.rows.size() * vocab);
    model_.download_logits(0, static_cast<std::int64_t>(wave.rows.size()), logits_.data());
  }
  std::int64_t row = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    StepEntry& entry = entries[i];
    const auto n = static_cast<std::size_t>(wave.slices[i].n_tokens);
    Sampler& sampler = samplers.at(entry.sequence);
    sampler.observe_prompt(entry.tokens.first(n));
    entry.tokens = entry.tokens.subspan(n);
    if (!entry.feature_rows.empty()) entry.feature_rows = entry.feature_rows.subspan(n);
    if (entry.output == Output::kLogits) {
      const float* from = logits_.data() + static_cast<std::size_t>(row) * vocab;
      entry.logits = std::copy_n(from, n * vocab, entry.logits);
      row += static_cast<std::int64_t>(n);
    } else if (entry.output == Output::kSample && entry.tokens.empty()) {
      result.sampled[entry.index] = sample(sampler, row++);
    }
  }
}

// Gives entries what was started ahead for them, if it is what they ask for.
void StepRunner::take_ahead(std::vector<StepEntry>& entries, KvCache& cache, Samplers& samplers,
                            StepResult& result) {
  if (ahead_.empty()) return;
  const std::vector<StepEntry> ahead = std::exchange(ahead_, {});
  const auto row_of = [&](const StepEntry& entry) {
    const auto found = std::find_if(ahead.begin(), ahead.end(), [&](const StepEntry& other) {
      return other.sequence == entry.sequence;
    });
    const bool same = found != ahead.end() && entry.output == Output::kSample &&
                      entry.tokens.size() == 1 && entry.tokens[0] == found->tokens[0] &&
                      (entry.feature_rows.empty() || entry.feature_rows[0] < 0);
    return same ? found - ahead.begin() : -1;
  };
  top_.clear();
  std::vector<SequenceSlice> taken;
  std::erase_if(entries, [&](const StepEntry& entry) {
    const std::int64_t row = row_of(entry);
    if (row < 0) return false;
    if (top_.empty()) top_ = model_.top();
    Sampler& sampler = samplers.at(entry.sequence);
    sampler.observe_prompt(entry.tokens);
    result.sampled[entry.index] = sample(sampler, row);
    taken.push_back({entry.sequence, 1});
    return true;
  });
  cache.advance(taken);
}

void StepRunner::run_ahead(std::span<const StepEntry> entries, const StepResult& result,
                           KvCache& cache, const Samplers& samplers) {
  tokens_.clear();
  std::vector<SequenceSlice> slices;
  for (const StepEntry& entry : entries) {
    const Sampled& sampled = result.sampled[entry.index];
    if (entry.output != Output::kSample || entry.tokens.size() != 1 || sampled.token < 0) return;
    tokens_.push_back(sampled.token);
    slices.push_back({entry.sequence, 1});
  }
  if (!cache.fits(slices)) return;
  std::vector<StepEntry> next;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    next.push_back({entries[i].sequence, Output::kSample, {&tokens_[i], 1}, i, nullptr, {}});
  }
  try {
    Wave wave = next_wave(next, {}, cache, samplers);
    start(wave, cache);
  } catch (const Error&) {
    return;  // this step is done; whoever asks for the next one will be told
  }
  ahead_ = std::move(next);
}

StepResult StepRunner::run(std::vector<StepEntry> entries, std::span<const float> features,
                           KvCache& cache, Samplers& samplers) {
  std::vector<SequenceSlice> whole;
  for (const StepEntry& entry : entries) {
    whole.push_back({entry.sequence, static_cast<std::int64_t>(entry.tokens.size())});
  }
  cache.check_capacity(whole);

  StepResult result = make_result(entries);
  const std::vector<StepEntry> asked = entries;
  take_ahead(entries, cache, samplers, result);
  while (!entries.empty()) {
    Wave wave = next_wave(entries, features, cache, samplers);
    start(wave, cache);
    finish_wave(wave, entries, samplers, result);
    cache.advance(wave.slices);
    std::erase_if(entries, [](const StepEntry& entry) { return entry.tokens.empty(); });
  }
  if (finds_top_) run_ahead(asked, result, cache, samplers);
  return result;
}

}  // namespace camelid
