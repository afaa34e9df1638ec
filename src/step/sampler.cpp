#include "step/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace camelid {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kMostLogprobs = 1000;

void check_range(std::string_view name, float value, float least, float most) {
  if (value >= least && value <= most) return;  // false for NaN
  fail(ErrorCode::kInvalidRequest, "[sampling] ", name, " is ", value, ", expected ", least, " to ", most,
       ".");
}

void check_token(std::string_view name, std::int32_t token, std::int64_t vocab_size) {
  if (token >= 0 && token < vocab_size) return;
  fail(ErrorCode::kInvalidRequest, "[sampling] ", name, " names token ", token,
       ", outside the vocabulary of ", vocab_size, ".");
}

// A well mixed 64-bit function of its input. Source: Steele, Lea, Flood 2014 (SplitMix64).
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

bool better(float a, std::int32_t a_token, float b, std::int32_t b_token) {
  return a != b ? a > b : a_token < b_token;
}

double log_sum_exp(std::span<const float> logits) {
  const double highest = *std::max_element(logits.begin(), logits.end());
  double total = 0.0;
  for (float logit : logits) total += std::exp(static_cast<double>(logit) - highest);
  return highest + std::log(total);
}

void check_finite(std::span<const float> logits) {
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (std::isfinite(logits[i])) continue;
    fail(ErrorCode::kCheckpoint, "[sampling] the logit of token ", i,
         " is not finite. The checkpoint may be damaged, or its values overflow float32.");
  }
}

// The n most likely tokens of the model itself.
std::vector<TokenLogprob> most_likely(std::span<const float> logits, double normaliser, int n) {
  std::vector<std::int32_t> order(logits.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
  const auto end = order.begin() + std::min<std::ptrdiff_t>(n, std::ssize(order));
  std::partial_sort(order.begin(), end, order.end(), [&](std::int32_t a, std::int32_t b) {
    return better(logits[static_cast<std::size_t>(a)], a, logits[static_cast<std::size_t>(b)], b);
  });
  std::vector<TokenLogprob> top;
  for (auto it = order.begin(); it != end; ++it) {
    top.push_back({*it, static_cast<float>(logits[static_cast<std::size_t>(*it)] - normaliser)});
  }
  return top;
}

}  // namespace

Sampler::Sampler(SamplerParams params, std::int64_t vocab_size)
    : params_(std::move(params)), vocab_size_(vocab_size) {
  const float most = std::numeric_limits<float>::max();
  check_range("temperature", params_.temperature, 0.0f, most);
  check_range("top_p", params_.top_p, std::numeric_limits<float>::min(), 1.0f);
  check_range("min_p", params_.min_p, 0.0f, 1.0f);
  check_range("repetition_penalty", params_.repetition_penalty, std::numeric_limits<float>::min(), most);
  check_range("presence_penalty", params_.presence_penalty, -most, most);
  check_range("frequency_penalty", params_.frequency_penalty, -most, most);
  check_range("top_k", static_cast<float>(params_.top_k), 0.0f, most);
  check_range("logprobs", static_cast<float>(params_.n_logprobs), -1.0f, kMostLogprobs);
  for (const auto& [token, bias] : params_.logit_bias) {
    check_token("logit_bias", token, vocab_size);
    check_range("logit_bias", bias, -most, most);
  }
  for (std::int32_t token : params_.banned) check_token("banned", token, vocab_size);
  if (params_.repetition_penalty != 1.0f) seen_.resize(static_cast<std::size_t>(vocab_size), false);
}

void Sampler::observe_prompt(std::span<const std::int32_t> tokens) {
  if (seen_.empty()) return;
  for (std::int32_t token : tokens) seen_[static_cast<std::size_t>(token)] = true;
}

void Sampler::apply_rules(std::vector<float>& logits) const {
  for (const auto& [token, bias] : params_.logit_bias) logits[static_cast<std::size_t>(token)] += bias;
  for (std::size_t i = 0; i < seen_.size(); ++i) {
    if (!seen_[i]) continue;
    logits[i] = logits[i] > 0.0f ? logits[i] / params_.repetition_penalty
                                 : logits[i] * params_.repetition_penalty;
  }
  for (const auto& [token, count] : output_counts_) {
    logits[static_cast<std::size_t>(token)] -=
        params_.presence_penalty + params_.frequency_penalty * static_cast<float>(count);
  }
  for (std::int32_t token : params_.banned) logits[static_cast<std::size_t>(token)] = kNever;
}

double Sampler::uniform() {
  const std::uint64_t bits = mix(mix(params_.seed) ^ mix(~n_sampled_));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// Keeps every candidate at least as good as the k-th, ties cut by id.
void Sampler::keep_top_k(std::vector<Candidate>& candidates) const {
  const auto k = static_cast<std::size_t>(params_.top_k);
  if (k == 0 || k >= candidates.size()) return;
  const auto by_rank = [](const Candidate& a, const Candidate& b) {
    return better(a.logit, a.token, b.logit, b.token);
  };
  std::nth_element(candidates.begin(), candidates.begin() + params_.top_k - 1, candidates.end(), by_rank);
  candidates.resize(k);
}

std::int32_t Sampler::draw(std::span<const float> logits) {
  const auto best = std::max_element(logits.begin(), logits.end());  // the first among equals
  if (*best == kNever) {
    fail(ErrorCode::kInvalidRequest, "[sampling] every token is banned. Allow at least one.");
  }
  if (params_.temperature == 0.0f) return static_cast<std::int32_t>(best - logits.begin());

  // Weights relative to the best token, so that nothing overflows; negligible ones are dropped.
  const double temperature = params_.temperature;
  const double least = params_.min_p > 0.0f ? std::log(static_cast<double>(params_.min_p)) : -80.0;
  std::vector<Candidate> candidates;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if ((static_cast<double>(logits[i]) - *best) / temperature >= least) {
      candidates.push_back({static_cast<std::int32_t>(i), logits[i]});
    }
  }
  keep_top_k(candidates);
  const bool sorted = params_.top_p < 1.0f;
  std::sort(candidates.begin(), candidates.end(), [&](const Candidate& a, const Candidate& b) {
    return sorted ? better(a.logit, a.token, b.logit, b.token) : a.token < b.token;
  });
  std::vector<double> cumulative;
  double total = 0.0;
  for (const Candidate& candidate : candidates) {
    total += std::exp((static_cast<double>(candidate.logit) - *best) / temperature);
    cumulative.push_back(total);
  }
  if (sorted) {  // the fewest tokens whose weight reaches top_p
    const auto end = std::lower_bound(cumulative.begin(), cumulative.end(), params_.top_p * total);
    cumulative.resize(std::min<std::size_t>(cumulative.size(),
                                            static_cast<std::size_t>(end - cumulative.begin()) + 1));
    total = cumulative.back();
  }
  const auto chosen = std::upper_bound(cumulative.begin(), cumulative.end(), uniform() * total);
  const auto index = std::min<std::ptrdiff_t>(chosen - cumulative.begin(), std::ssize(cumulative) - 1);
  return candidates[static_cast<std::size_t>(index)].token;
}

Sampled Sampler::sample(std::span<const float> logits) {
  check_finite(logits);
  adjusted_.assign(logits.begin(), logits.end());
  apply_rules(adjusted_);
  Sampled sampled;
  sampled.token = draw(adjusted_);
  if (params_.n_logprobs >= 0) {
    const double normaliser = log_sum_exp(logits);
    sampled.logprob = static_cast<float>(logits[static_cast<std::size_t>(sampled.token)] - normaliser);
    sampled.top = most_likely(logits, normaliser, params_.n_logprobs);
  }
  ++n_sampled_;
  const auto counted = std::find_if(output_counts_.begin(), output_counts_.end(),
                                    [&](const auto& entry) { return entry.first == sampled.token; });
  if (counted == output_counts_.end()) {
    output_counts_.emplace_back(sampled.token, 1);
  } else {
    ++counted->second;
  }
  if (!seen_.empty()) seen_[static_cast<std::size_t>(sampled.token)] = true;
  return sampled;
}

}  // namespace camelid
