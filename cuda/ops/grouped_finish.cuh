// What becomes of a grouped product's sums: stored, added, or SwiGLU. One warp finishes a row
// tile's sums as tensor cores leave them; both kernels of grouped products end here. It
// multiplies nothing.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "device/swiglu.cuh"
#include "layout/tiles.h"
#include "ops/grouped.h"

namespace camelid::cuda {

// Of a tile of tokens, in shared memory.
struct VisitRows {
  std::int64_t at[kTileTokens];  // where its row of y starts, in values; kNoRow: no such visit
  float factor[kTileTokens];
  std::int32_t n;               // how many visits there are
  std::int32_t first_row_tile;  // of the job; here because registers are short
};
constexpr std::int64_t kNoRow = -1;

// Fills in one column; the threads of a tile do it together, each for its own.
__device__ inline void find_visit(VisitRows& visits, const GroupedProduct& p, const TokenTile& tile,
                                  int column) {
  const int visit = tile.first + column;
  visits.at[column] = kNoRow;
  visits.factor[column] = 1.0f;
  if (column >= tile.n) return;
  const std::int64_t row = p.y_rows == nullptr ? visit : p.y_rows[visit];
  visits.at[column] = row * p.y_stride;
  if (p.factors != nullptr) visits.factor[column] = p.factors[visit];
}

// Sums d of 16 rows by 8 columns for each j: lane (g, t) has d[4 j..] of rows g, g + 8 at the
// columns 8 j + 2 t + {0, 1}: (g, 0), (g, 1), (g + 8, 0), (g + 8, 1).
__device__ inline int column_of(int first_column, int j) {
  return first_column + 8 * j + thread_index() % 4 * 2;
}

template <int kValues>
__device__ inline void finish_f32(const GroupedProduct& p, const VisitRows& visits,
                                  int first_column, int row_tile, const float (&d)[kValues]) {
  constexpr int kAtOnce = kValues / 4 < 16 ? kValues / 4 : 16;  // loads in flight: 4 for each j
  const int row = row_tile * kTileRows + thread_index() % kWarp / 4;
  const bool has[2] = {row < p.shape.rows, row + 8 < p.shape.rows};
  float* y = static_cast<float*>(p.y) + row;
#pragma unroll
  for (int start = 0; start < kValues / 4; start += kAtOnce) {
    float old[4 * kAtOnce] = {};
    if (p.output == Output::kAdd) {
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        const std::int64_t at = visits.at[column_of(first_column, start + i / 2) + i % 2];
        if (at != kNoRow && has[0]) old[2 * i] = load_shared_by_blocks(y + at);
        if (at != kNoRow && has[1]) old[2 * i + 1] = load_shared_by_blocks(y + at + 8);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kAtOnce; ++i) {
      const int from = 4 * (start + i / 2) + i % 2;
      const std::int64_t at = visits.at[column_of(first_column, start + i / 2) + i % 2];
      if (at != kNoRow && has[0]) y[at] = old[2 * i] + d[from];
      if (at != kNoRow && has[1]) y[at + 8] = old[2 * i + 1] + d[from + 2];
    }
  }
}

// Writes the values of two neighbouring columns (tokens), each lane's of output row `row`. Lanes
// of even g write the first token's of two rows at a time, those of odd g the second's. Behind an
// odd number of rows a zero is written too.
__device__ inline void store_bf16(std::uint16_t* y, const VisitRows& visits, int column, int row,
                                  int n_rows, float first, float second) {
  const int odd = thread_index() / 4 % 2;
  const float other = shuffle_xor(odd != 0 ? first : second, 4);
  const std::int64_t at = visits.at[column + odd];
  const std::uint32_t pair = pack_bf16x2(odd != 0 ? other : first, odd != 0 ? second : other);
  if (at != kNoRow && row - odd < n_rows)
    *reinterpret_cast<std::uint32_t*>(y + at + row - odd) = pair;
}

template <int kValues>
__device__ inline void finish_bf16(const GroupedProduct& p, const VisitRows& visits,
                                   int first_column, int row_tile, const float (&d)[kValues]) {
  const int row = row_tile * kTileRows + thread_index() % kWarp / 4;
  auto* y = static_cast<std::uint16_t*>(p.y);
#pragma unroll
  for (int j = 0; j < kValues / 4; ++j) {
    const int column = column_of(first_column, j);
    store_bf16(y, visits, column, row, p.shape.rows, d[4 * j], d[4 * j + 1]);
    store_bf16(y, visits, column, row + 8, p.shape.rows, d[4 * j + 2], d[4 * j + 3]);
  }
}

template <int kValues>
__device__ inline void finish_swiglu(const GroupedProduct& p, const VisitRows& visits,
                                     int first_column, int row_tile, const float (&d)[kValues]) {
  const int channel = row_tile * (kTileRows / 2) + thread_index() % kWarp / 4;
  auto* y = static_cast<std::uint16_t*>(p.y);
#pragma unroll
  for (int j = 0; j < kValues / 4; ++j) {
    const int column = column_of(first_column, j);
    const float f = visits.factor[column], g = visits.factor[column + 1];
    const float first = swiglu(f * d[4 * j], f * d[4 * j + 2]);
    const float second = swiglu(g * d[4 * j + 1], g * d[4 * j + 3]);
    store_bf16(y, visits, column, channel, p.shape.rows / 2, first, second);
  }
}

// By a warp: finishes one row tile's columns from first_column on.
template <int kValues>
__device__ inline void finish(const GroupedProduct& p, const VisitRows& visits, int first_column,
                              int row_tile, const float (&d)[kValues]) {
  if (row_tile >= p.shape.n_row_tiles()) return;
  if (p.output == Output::kSwiGlu) {
    finish_swiglu(p, visits, first_column, row_tile, d);
  } else if (p.output == Output::kStoreBf16) {
    finish_bf16(p, visits, first_column, row_tile, d);
  } else {
    finish_f32(p, visits, first_column, row_tile, d);
  }
}

}  // namespace camelid::cuda
