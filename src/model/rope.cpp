#include "model/rope.h"

#include <cmath>
#include <numbers>

namespace camelid {

std::vector<double> rope_frequencies(const ModelConfig& config) {
  std::vector<double> frequencies;
  for (std::int64_t pair = 0; pair < config.head_dim / 2; ++pair) {
    const double exponent = 2.0 * static_cast<double>(pair) / static_cast<double>(config.head_dim);
    double frequency = std::pow(config.rope_theta, -exponent);
    if (config.has_rope_scaling) {
      const RopeScaling& s = config.rope_scaling;
      const double wavelength = 2.0 * std::numbers::pi / frequency;
      const double turns = s.original_max_position / wavelength;  // within the original context
      if (turns < s.low_freq_factor) {
        frequency /= s.factor;
      } else if (turns <= s.high_freq_factor && s.high_freq_factor > s.low_freq_factor) {
        const double kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
        frequency *= kept + (1.0 - kept) / s.factor;
      }
    }
    frequencies.push_back(frequency);
  }
  return frequencies;
}

void append_rotation(std::vector<float>& out, const std::vector<double>& frequencies,
                     std::int64_t index) {
  for (double frequency : frequencies) {
    const double angle = static_cast<double>(index) * frequency;
    out.push_back(static_cast<float>(std::cos(angle)));
    out.push_back(static_cast<float>(std::sin(angle)));
  }
}

float query_temperature(const ModelConfig& config, std::int64_t position) {
  const double chunks = std::floor(static_cast<double>(position + 1) / config.floor_scale);
  return static_cast<float>(1.0 + config.attn_scale * std::log1p(chunks));
}

}  // namespace camelid
