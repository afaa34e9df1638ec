// The CPU's packed weight layout: panels of 16 output rows, a 32-bit word of each row side by side.
//
//   words   [n_panels][n_words][16]   lane r of a vector belongs to row panel * 16 + r and holds
//                                     values_per_word consecutive inputs, lowest bits first; of
//                                     int4 the low halves of the bytes hold inputs 0-3, the high
//                                     halves 4-7, so that a mask leaves four inputs as bytes
//   scales  [n_panels][n_groups][16]  as stored (bf16, f16 or f32), null for plain formats
//   zeros   [n_panels][n_groups][16]  uint8 zero points, offset-binary, or null: all 2^(bits-1)
//
// A broadcast input value times one unpacked vector feeds 16 outputs, so every output sums its
// inputs in index order whatever the number of rows: results do not depend on the batch. Rows past
// out_dim and inputs past in_dim are packed as zeros.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "base/dtype.h"
#include "quant/format.h"

namespace camelid::cpu {

constexpr std::int64_t kPanelRows = 16;

// Where input i of a word of eight int4 begins, in bits.
static constexpr int int4_shift(int i) { return i % 4 * 8 + i / 4 * 4; }

// One linear of a stack. Pointers are into the arena of the PackedMatrix that holds it.
struct Segment {
  WeightFormat format = WeightFormat::kF32;
  std::int64_t out_dim = 0;
  std::int64_t in_dim = 0;
  std::int64_t first_out = 0;   // column of y where this segment's outputs begin
  std::int64_t n_panels = 0;    // ceil(out_dim / 16)
  std::int64_t n_words = 0;     // ceil(in_dim / values_per_word)
  std::int64_t group_size = 0;  // scaled formats: a multiple of values_per_word, or in_dim
  std::int64_t n_groups = 0;
  DType scale_dtype = DType::kF32;
  const std::uint32_t* words = nullptr;
  const void* scales = nullptr;
  const std::uint8_t* zeros = nullptr;
};

class PackedMatrix final : public Matrix {
 public:
  std::vector<Segment> segments;
  Buffer storage;
  // Inputs that share one scale when activations are int8; 0 where they must stay float.
  std::int64_t activation_block = 0;
  bool plain_bf16 = false;  // all segments are bf16
  bool precise = false;     // int8 activations in two terms, the second what the first left
  std::int64_t n_panels() const {
    std::int64_t total = 0;
    for (const Segment& segment : segments) total += segment.n_panels;
    return total;
  }
};

}  // namespace camelid::cpu
