#include "step/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace camelid {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int kMostLogprobs = 1000;
// Tokens e^-40 times as likely as the best are not drawn: all 202,048 of them would together have a
// probability of 1e-12.
constexpr double kLeastRelative = -40.0;
// Bins of keep_best(). Logits spread over the 40 above leave 0.01 to each, some hundred tokens.
constexpr int kBins = 4096;

template <class Value>
void check_range(std::string_view name, Value value, bool fits, std::string_view wanted) {
  if (fits) return;  // false for NaN
  fail(ErrorCode::kInvalidRequest, "[sampling] ", name, " is ", value, ", expected ", wanted, ".");
}

void check_finite(std::string_view name, float value) {
  check_range(name, value, std::isfinite(value), "a finite number");
}

void check_token(std::string_view name, std::int32_t token, std::int64_t vocab_size) {
  if (token >= 0 && token < vocab_size) return;
  fail(ErrorCode::kInvalidRequest, "[sampling] ", name, " names token ", token,
       ", outside the vocabulary of ", vocab_size, ".");
}

// Returns the first token whose logit is not finite, -1 where all are.
std::int32_t find_not_finite(std::span<const float> logits) {
  // Adding one to an exponent of all ones carries into the sign. No early way out and no
  // comparison, so that compilers take several at once.
  constexpr std::uint32_t kExponent = 0x7f800000, kOne = 0x00800000, kCarry = 0x80000000;
  std::uint32_t carries = 0;
  for (const float x : logits) carries |= (std::bit_cast<std::uint32_t>(x) & kExponent) + kOne;
  if ((carries & kCarry) == 0) return -1;
  const auto bad =
      std::find_if_not(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
  return static_cast<std::int32_t>(bad - logits.begin());
}

// The first of the largest; none of them is NaN. Lanes of their own let compilers take several at
// once, which std::max_element does not.
std::size_t find_largest(std::span<const float> logits) {
  constexpr std::size_t kLanes = 16;
  float largest[kLanes];
  std::fill_n(largest, kLanes, kNever);
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float x = logits[i + lane];
      largest[lane] = x > largest[lane] ? x : largest[lane];
    }
  }
  float best = *std::max_element(largest, largest + kLanes);
  for (; i < logits.size(); ++i) best = std::max(best, logits[i]);
  return static_cast<std::size_t>(std::find(logits.begin(), logits.end(), best) - logits.begin());
}

// A well mixed 64-bit function of its input. Source: Steele, Lea, Flood 2014 (SplitMix64).
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Whether a ranks before b; `logprob` is any increasing function of the logit.
bool ranks_before(const TokenLogprob& a, const TokenLogprob& b) {
  return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
}

double log_sum_exp(std::span<const float> logits) {
  const float highest = logits[find_largest(logits)];
  double total = 0.0;
  for (float logit : logits) total += std::exp(logit - highest);
  return highest + std::log(total);
}

// The n most likely tokens of the model itself.
std::vector<TokenLogprob> most_likely(std::span<const float> logits, double normaliser, int n) {
  const std::size_t n_top = std::min(logits.size(), static_cast<std::size_t>(n));
  if (n_top == 0) return {};
  std::vector<TokenLogprob> top(logits.size());
  for (std::size_t i = 0; i < top.size(); ++i) top[i] = {static_cast<std::int32_t>(i), logits[i]};
  std::partial_sort(top.begin(), top.begin() + static_cast<std::ptrdiff_t>(n_top), top.end(),
                    ranks_before);
  top.resize(n_top);
  for (TokenLogprob& entry : top) entry.logprob = static_cast<float>(entry.logprob - normaliser);
  return top;
}

// Drops every token less likely than e^least of the best one's probability.
void drop_unlikely(std::span<float> logits, double best, double temperature, double least) {
  const double lowest = best + temperature * least;
  for (float& logit : logits) logit = logit >= lowest ? logit : kNever;
}

// Keeps the fewest best tokens whose sizes reach `target`, drops the others, and returns the sum of
// what is kept; a dropped token's size is 0. Sorting a vocabulary would take longer than a layer of
// the model: tokens are counted into bins by their logits, and only the bin in which the target is
// reached is sorted. Passes over all tokens avoid branches, which half of them would mispredict.
double keep_best(std::span<float> logits, std::span<const float> sizes, double target) {
  double best = -kLargest;
  double worst = kLargest;
  for (float logit : logits) {
    best = std::max<double>(best, logit);
    worst = std::min<double>(worst, logit == kNever ? kLargest : logit);
  }
  const double scale = best > worst ? (kBins - 1) / (best - worst) : 1.0;
  const auto bin_of = [&](float logit) {
    return static_cast<std::size_t>(std::min((best - logit) * scale, kBins - 1.0));
  };

  std::vector<double> bins(kBins);
  for (std::size_t i = 0; i < logits.size(); ++i) bins[bin_of(logits[i])] += sizes[i];
  double kept = 0.0;
  std::size_t edge = 0;
  while (edge < kBins && kept + bins[edge] < target) kept += bins[edge++];
  if (edge == kBins) return kept;

  std::vector<TokenLogprob> ranked;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (bin_of(logits[i]) != edge || sizes[i] == 0.0f) continue;
    ranked.push_back({static_cast<std::int32_t>(i), logits[i]});
  }
  std::sort(ranked.begin(), ranked.end(), ranks_before);
  std::size_t n_kept = 0;
  while (n_kept < ranked.size() && (n_kept == 0 || kept < target)) {
    kept += sizes[static_cast<std::size_t>(ranked[n_kept++].token)];
  }
  const float least = ranked[n_kept - 1].logprob;
  for (float& logit : logits) logit = logit >= least ? logit : kNever;
  for (; n_kept < ranked.size(); ++n_kept) {  // ties with the last one kept
    logits[static_cast<std::size_t>(ranked[n_kept].token)] = kNever;
  }
  return kept;
}

}  // namespace

Sampler::Sampler(SamplerParams params, std::int64_t vocab_size)
    : params_(std::move(params)), vocab_size_(vocab_size) {
  check();
}

void Sampler::check() const {
  const SamplerParams& p = params_;
  check_range("temperature", p.temperature, p.temperature >= 0.0f && p.temperature <= kLargest,
              "a finite number from 0");
  check_range("top_k", p.top_k, p.top_k >= 0, "0 (all) or more");
  check_range("top_p", p.top_p, p.top_p > 0.0f && p.top_p <= 1.0f, "more than 0, at most 1");
  check_range("min_p", p.min_p, p.min_p >= 0.0f && p.min_p <= 1.0f, "0 to 1");
  check_range("repetition_penalty", p.repetition_penalty,
              p.repetition_penalty > 0.0f && p.repetition_penalty <= kLargest,
              "a finite number above 0");
  check_finite("presence_penalty", p.presence_penalty);
  check_finite("frequency_penalty", p.frequency_penalty);
  check_range("logprobs", p.n_logprobs, p.n_logprobs >= -1 && p.n_logprobs <= kMostLogprobs,
              cat("-1 (none) to ", kMostLogprobs));
  for (const auto& [token, bias] : p.logit_bias) {
    check_token("logit_bias", token, vocab_size_);
    check_finite("logit_bias", bias);
  }
  for (std::int32_t token : p.banned) check_token("banned", token, vocab_size_);
  std::vector<std::int32_t> banned = p.banned;
  std::sort(banned.begin(), banned.end());
  if (std::unique(banned.begin(), banned.end()) - banned.begin() == vocab_size_) {
    fail(ErrorCode::kInvalidRequest, "[sampling] every token is banned. Allow at least one.");
  }
}

void Sampler::observe_prompt(std::span<const std::int32_t> tokens) {
  if (params_.repetition_penalty == 1.0f) return;
  for (std::int32_t token : tokens) counts_.try_emplace(token, 0);
}

template <class Find>
bool Sampler::apply_rules(const Find& find) const {
  const SamplerParams& p = params_;
  // Rules may overflow float32; what they leave stays finite, so that draw() may subtract.
  const auto limited = [](double x) {
    return static_cast<float>(std::clamp<double>(x, -kLargest, kLargest));
  };
  bool all_known = true;
  for (const auto& [token, bias] : p.logit_bias) {
    if (float* logit = find(token)) {
      *logit = limited(static_cast<double>(*logit) + bias);
    } else {
      all_known &= bias <= 0.0f;
    }
  }
  const double repetition = p.repetition_penalty;
  const bool raises = repetition < 1.0 || p.presence_penalty < 0.0f || p.frequency_penalty < 0.0f;
  for (const auto& [token, count] : counts_) {
    float* logit = find(token);
    if (logit == nullptr) {
      all_known &= !raises;
      continue;
    }
    double x = *logit > 0.0f ? *logit / repetition : *logit * repetition;
    if (count > 0) {
      x -= p.presence_penalty + static_cast<double>(p.frequency_penalty) * count;
    }
    *logit = limited(x);
  }
  for (std::int32_t token : p.banned) {
    if (float* logit = find(token)) *logit = kNever;
  }
  return all_known;
}

float Sampler::scale() const {
  return params_.temperature > 0.0f ? std::min(1.0f / params_.temperature, kLargest) : 1.0f;
}

bool Sampler::draws_plainly() const {
  return params_.temperature > 0.0f && params_.top_k == 0 && params_.top_p == 1.0f &&
         params_.min_p == 0.0f && !has_rules();
}

double Sampler::uniform() const {
  const std::uint64_t bits = mix(mix(params_.seed) ^ mix(~n_sampled_));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

std::int32_t Sampler::draw(std::span<float> logits, const Rest* rest) const {
  const std::size_t best_of_all = find_largest(logits);
  if (params_.temperature == 0.0f) return static_cast<std::int32_t>(best_of_all);

  const double best = logits[best_of_all];
  const double temperature = params_.temperature;
  const double by_min_p = std::log(static_cast<double>(params_.min_p));  // -infinity for 0
  const double least = std::max(by_min_p, kLeastRelative);
  bool lacks = rest != nullptr && rest->most >= best + temperature * least;
  drop_unlikely(logits, best, temperature, least);
  std::vector<float> weights(logits.size());
  if (params_.top_k > 0) {
    if (lacks && static_cast<std::size_t>(params_.top_k) > logits.size()) return -1;
    lacks = false;
    for (std::size_t i = 0; i < logits.size(); ++i) weights[i] = logits[i] != kNever;
    keep_best(logits, weights, params_.top_k);
  }
  double total = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    weights[i] = std::exp(static_cast<float>((logits[i] - best) / temperature));
    total += weights[i];
  }
  if (lacks) {  // top-p counts what min-p leaves, and of the rest that is not known
    const bool known = rest->total > 0.0 && params_.min_p == 0.0f && params_.top_p < 1.0f;
    if (!known || total < params_.top_p * rest->total) return -1;
    total = rest->total;
  }
  if (params_.top_p < 1.0f) total = keep_best(logits, weights, params_.top_p * total);

  double left = uniform() * total;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    left -= logits[i] == kNever ? 0.0f : weights[i];
    if (left < 0.0) return static_cast<std::int32_t>(i);
  }
  return static_cast<std::int32_t>(best_of_all);  // rounding left a little
}

Sampled Sampler::sample(std::span<const float> logits) {
  if (const std::int32_t bad = find_not_finite(logits); bad >= 0) return {-1, 0.0f, {}, bad};
  std::vector<float> adjusted(logits.begin(), logits.end());
  apply_rules([&](std::int32_t token) { return &adjusted[static_cast<std::size_t>(token)]; });
  Sampled sampled;
  sampled.token = draw(adjusted, nullptr);
  if (params_.n_logprobs >= 0) {
    const double normaliser = log_sum_exp(logits);
    sampled.logprob =
        static_cast<float>(logits[static_cast<std::size_t>(sampled.token)] - normaliser);
    sampled.top = most_likely(logits, normaliser, params_.n_logprobs);
  }
  finish(sampled);
  return sampled;
}

bool Sampler::penalises() const {
  return params_.repetition_penalty != 1.0f || params_.presence_penalty != 0.0f ||
         params_.frequency_penalty != 0.0f;
}

bool Sampler::has_rules() const {
  return penalises() || !params_.logit_bias.empty() || !params_.banned.empty();
}

void Sampler::finish(Sampled& sampled) {
  ++n_sampled_;
  if (penalises()) ++counts_[sampled.token];
}

std::optional<Sampled> Sampler::sample(const TopLogits& top) {
  if (top.not_finite >= 0) return Sampled{-1, 0.0f, {}, top.not_finite};
  const std::size_t n = top.tokens.size();
  if (params_.n_logprobs > static_cast<int>(n)) return std::nullopt;

  std::vector<std::size_t> by_id(n);  // draw() goes through tokens in this order
  std::iota(by_id.begin(), by_id.end(), std::size_t{0});
  std::sort(by_id.begin(), by_id.end(),
            [&](std::size_t a, std::size_t b) { return top.tokens[a] < top.tokens[b]; });
  std::vector<float> logits(n);
  std::transform(by_id.begin(), by_id.end(), logits.begin(),
                 [&](std::size_t i) { return top.logits[i]; });
  const auto find = [&](std::int32_t token) -> float* {
    const auto at = std::lower_bound(
        by_id.begin(), by_id.end(), token,
        [&](std::size_t i, std::int32_t wanted) { return top.tokens[i] < wanted; });
    const bool found = at != by_id.end() && top.tokens[*at] == token;
    return found ? &logits[static_cast<std::size_t>(at - by_id.begin())] : nullptr;
  };
  if (!apply_rules(find)) return std::nullopt;
  Rest rest{top.logits.back(), top.scaled_sum};
  const bool has_rest = n < static_cast<std::size_t>(vocab_size_);
  if (has_rest && has_rules()) {
    // The best are now those that rules left above all that is not known, and the sum changed.
    std::size_t n_kept = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (logits[i] <= rest.most) continue;
      logits[n_kept] = logits[i];
      by_id[n_kept++] = by_id[i];
    }
    if (n_kept == 0) return std::nullopt;
    logits.resize(n_kept);
    rest.total = 0.0;
  }
  const std::int32_t drawn = draw(logits, has_rest ? &rest : nullptr);
  Sampled sampled;
  float logit = 0.0f;
  if (drawn >= 0) {
    const std::size_t index = by_id[static_cast<std::size_t>(drawn)];
    sampled.token = top.tokens[index];
    logit = top.logits[index];
  } else if (draws_plainly() && top.drawn >= 0) {
    sampled.token = top.drawn;
    logit = top.drawn_logit;
  } else {
    return std::nullopt;
  }
  if (params_.n_logprobs >= 0) {
    const double normaliser = top.logits.front() + std::log(top.sum);
    const auto logprob = [&](float of) { return static_cast<float>(of - normaliser); };
    sampled.logprob = logprob(logit);
    for (std::size_t i = 0; i < static_cast<std::size_t>(params_.n_logprobs); ++i) {
      sampled.top.push_back({top.tokens[i], logprob(top.logits[i])});
    }
  }
  finish(sampled);
  return sampled;
}

}  // namespace camelid
