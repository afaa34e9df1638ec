// Between plain float32 rows and the interchange form of a quantised matrix (compressed-tensors
// pack-quantized). The readable truth every packed layout is tested against.
#pragma once

#include <cstdint>

#include "quant/format.h"

namespace camelid {

// Writes rows [first_row, first_row + n_rows) of `source` as float32 [n_rows, in_dim],
// dequantising. Throws kCheckpoint naming the tensor and position when a value or a scale is not
// finite.
void read_rows(const LinearSource& source, std::int64_t first_row, std::int64_t n_rows, float* out);

// Scales of rows [first_row, first_row + n_rows) as float32 [n_rows, n_groups]. Throws kCheckpoint
// when one is not finite.
void read_scales(const LinearSource& source, std::int64_t first_row, std::int64_t n_rows,
                 float* out);

// The zero point of one group in offset-binary: 2^(bits-1) when the source is symmetric.
std::uint32_t zero_point(const LinearSource& source, std::int64_t row, std::int64_t group);

// Quantises float32 rows [n_rows, in_dim], symmetric, per group of `group_size` along in_dim.
// words: int32 [n_rows, ceil(in_dim / values_per_word)], tail filled with zero points;
// scales: bf16 bits [n_rows, n_groups].  scale = max|w| / ((2^bits - 1) / 2), rounded to bf16, then
// q = round-half-even(w / scale) clamped to [-2^(bits-1), 2^(bits-1) - 1].  Source of the rule:
// compressed-tensors, symmetric int with min-max observer. A group whose scale would
// round to zero gets scale 1 and q = 0 throughout.
void quantize_rows(const float* rows, std::int64_t n_rows, std::int64_t in_dim, int bits,
                   std::int64_t group_size, std::int32_t* words, std::uint16_t* scales);

}  // namespace camelid
