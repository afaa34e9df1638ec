// Rotary angles in double precision, from the position within the chunk. Only differences of
// positions matter inside a chunk, so the first token of every chunk may as well stand at 0: the
// angles are as exact at position 10,485,759 as at 0.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace camelid {

// Radians per token of each pair (2i, 2i + 1): theta^(-2i / head_dim), scaled by the llama3 rule.
// Wavelengths below original / high_freq_factor are kept, above original / low_freq_factor divided
// by `factor`, between them blended; with equal factors there is no between, and no division by
// zero. Source: transformers modeling_rope_utils.py, llama3.
std::vector<double> rope_frequencies(const ModelConfig& config);

// Where a position stands in its chunk; without chunks (chunk 0) in the sequence.
constexpr std::int64_t index_in_chunk(std::int64_t position, std::int64_t chunk) {
  return chunk > 0 ? position % chunk : position;
}

// Appends cos, sin of `index` * frequency for every pair: [head_dim / 2, 2] float32.
void append_rotation(std::vector<float>& out, const std::vector<double>& frequencies,
                     std::int64_t index);

// The factor on the queries of layers without RoPE:
// 1 + attn_scale * log1p(floor((position + 1) / floor_scale)).
// Source: transformers modeling_llama4.py, attn_temperature_tuning.
float query_temperature(const ModelConfig& config, std::int64_t position);

}  // namespace camelid
