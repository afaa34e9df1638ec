// An RMS norm that takes no launch: h = y / rms(y) * gain, of rows y that a product completes and
// others multiply. The first writes gain * y and sums of squares; the others multiply their sums by
// 1 / rms(y), which is the same for a whole row.
#pragma once

#include <cstdint>

#include "layout/tiles.h"

namespace camelid::cuda {

constexpr int kNormPart = 128;  // rows of a matrix, whose sums of a token one block completes

CAMELID_HOST_DEVICE constexpr int n_norm_parts(int dim) { return divide_up(dim, kNormPart); }

struct NormStart {
  const float* gain = nullptr;  // [dim]; null: no norm follows
  std::uint16_t* h = nullptr;   // bf16 [n_tokens][h_stride]
  std::int64_t h_stride = 0;
  float* squares = nullptr;  // [n_tokens][n_norm_parts(dim)]: of y
};

struct NormEnd {
  const float* squares = nullptr;  // null: what is multiplied is whole
  std::int32_t n_parts = 0;
  float share = 0.0f;  // 1 / dim
  float eps = 0.0f;
};

}  // namespace camelid::cuda
