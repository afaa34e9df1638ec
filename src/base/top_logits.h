// What sampling needs to know of a row of logits where it may not look at all of them.
#pragma once

#include <cstdint>
#include <span>

namespace camelid {

struct TopLogits {
  std::span<const float> logits;         // best first
  std::span<const std::int32_t> tokens;  // theirs; of equal logits the lower id comes first
  double sum = 0.0;                      // of exp(logit - best) over the whole row
  double scaled_sum = 0.0;               // of exp((logit - best) / temperature)
  std::int32_t not_finite = -1;  // the first id whose logit is not finite: nothing else is set then
  std::int32_t drawn = -1;       // from the whole row, where the plan's sampling_uniform asked
  float drawn_logit = 0.0f;
};

}  // namespace camelid
