// What a weight format is: how many values share a 32-bit word, and whether groups carry a scale.
// Also the source a matrix is packed from. Knows nothing of any device's packed layout.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/dtype.h"

namespace camelid {

enum class WeightFormat : std::uint8_t { kF32, kF16, kBf16, kInt8, kInt4 };

struct FormatInfo {
  WeightFormat format;
  std::string_view name;  // "f32", "f16", "bf16", "int8", "int4"
  int bits;               // per value
  bool scaled;            // groups of values share a scale (and maybe a zero point)
  int values_per_word() const { return 32 / bits; }
};

// The table of formats (formats.cpp).
const FormatInfo& format_info(WeightFormat format);
// Throws kUnsupported, naming the formats there are.
WeightFormat format_from_name(std::string_view name);

// One linear layer [out_dim, in_dim] as a checkpoint holds it, either plain or quantised.
// Quantised (compressed-tensors pack-quantized):
// value = (q - zero_point) * scale[row][col / group_size], with q stored offset-binary
// (q + 2^(bits-1)), values_per_word() of them in each int32, lowest bits first.
struct LinearSource {
  std::string name;  // for messages
  std::string file;
  std::int64_t out_dim = 0;
  std::int64_t in_dim = 0;

  // Plain: element (row, col) at data[row * row_stride + col * col_stride].
  DType dtype = DType::kF32;
  const void* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t col_stride = 0;

  // Quantised, when bits != 0 (4 or 8):
  int bits = 0;
  std::int64_t group_size = 0;   // values along in_dim; in_dim when per channel
  const void* words = nullptr;   // int32 [out_dim, ceil(in_dim / values_per_word)]
  const void* scales = nullptr;  // [out_dim, n_groups] of scale_dtype
  DType scale_dtype = DType::kF32;
  const void* zero_points = nullptr;  // int32 [ceil(out_dim / values_per_word), n_groups], or null

  std::int64_t n_groups() const { return (in_dim + group_size - 1) / group_size; }
};

// How a plain matrix is to be held: the format, and for scaled formats the group size along in_dim
// (0 = one group per row). A source that is already quantised in `format` keeps its own groups.
struct PackOptions {
  WeightFormat format = WeightFormat::kF32;
  std::int64_t group_size = 128;
  bool precise = false;  // where activations are quantised, keep these to twice the bits
};

}  // namespace camelid
