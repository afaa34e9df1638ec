// Chooses one sequence's next token from its logits. The rules and their order are vLLM's: logit
// bias, penalties, temperature, min-p, top-k, top-p; among equal logits the lower id ranks first.
// Random numbers are a function of the seed and of how many tokens were sampled, so the same seed
// gives the same text whatever else runs. Must never know of models, batches or text.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/top_logits.h"

namespace camelid {

struct SamplerParams {
  float temperature = 1.0f;  // 0: the most likely token, the lowest id among equals
  int top_k = 0;             // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;  // on tokens of prompt and output
  float presence_penalty = 0.0f;    // on tokens of the output
  float frequency_penalty = 0.0f;   // per occurrence in the output
  std::uint64_t seed = 0;
  int n_logprobs = -1;  // -1: none, 0: of the sampled token, n: of the n most likely too
  std::vector<std::pair<std::int32_t, float>> logit_bias;
  std::vector<std::int32_t> banned;  // never sampled
};

struct TokenLogprob {
  std::int32_t token = 0;
  float logprob = 0.0f;
};

struct Sampled {
  std::int32_t token = 0;
  float logprob = 0.0f;           // of the model itself, before any rule; 0 when not asked for
  std::vector<TokenLogprob> top;  // best first
  // The first token whose logit is not finite: nothing was sampled. -1 where all are. Not thrown,
  // because the other sequences of a step have nothing to do with it.
  std::int32_t not_finite = -1;
};

class Sampler {
 public:
  // Throws kInvalidRequest naming the parameter, got and wanted.
  Sampler(SamplerParams params, std::int64_t vocab_size);

  // The repetition penalty counts what was read as well as what was written. Requires tokens of the
  // vocabulary.
  void observe_prompt(std::span<const std::int32_t> tokens);

  // logits: [vocab_size].
  Sampled sample(std::span<const float> logits);
  // The same from the best logits, where they decide; nothing where all have to be looked at.
  std::optional<Sampled> sample(const TopLogits& top);

  float scale() const;  // 1 / temperature, finite; 1 where no random number decides
  // Whether the model's probabilities alone decide, of all tokens, at a temperature above 0: the
  // token is then the first up to which they add up to more than uniform(), of the next sample().
  bool draws_plainly() const;
  double uniform() const;

 private:
  void check() const;
  // find(token) is where its logit stands, or null; false where a rule may raise one that is not
  // found.
  template <class Find>
  bool apply_rules(const Find& find) const;
  // What lies beyond the logits that draw() sees.
  struct Rest {
    float most = 0.0f;  // no logit there is above
    // Of all weights e^((logit - best) / temperature), seen ones too; 0 where it is not known.
    double total = 0.0;
  };
  // The index of the token drawn; -1 where that depends on `rest`. Works in place.
  std::int32_t draw(std::span<float> logits, const Rest* rest) const;
  bool penalises() const;
  bool has_rules() const;  // that change logits
  void finish(Sampled& sampled);

  SamplerParams params_;
  std::int64_t vocab_size_;
  // Tokens the penalties know, with their number in the output: 0 for those only of the prompt.
  std::unordered_map<std::int32_t, int> counts_;
  std::uint64_t n_sampled_ = 0;
};

}  // namespace camelid
