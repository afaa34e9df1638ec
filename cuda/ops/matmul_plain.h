// y = x w^T of bf16 matrices of any size, of one or of many experts, on every GPU from sm_80 on:
// what sm90/matmul_dense.h does faster on Hopper for one matrix of aligned shape.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/output.h"
#include "layout/tiles.h"
#include "ops/grouped.h"

namespace camelid::cuda {

struct MatmulPlain {
  const std::uint16_t* x = nullptr;  // bf16 [n_tokens][x_stride], rows aligned to 16 bytes
  const std::uint16_t* w = nullptr;  // bf16 [rows][w_stride], rows aligned to 16 bytes
  void* y = nullptr;                 // [n_tokens][y_stride]
  std::int32_t n_tokens = 0;
  std::int32_t rows = 0;
  std::int32_t inputs = 0;
  std::int32_t x_stride = 0;  // values, a multiple of 8
  std::int32_t w_stride = 0;  // values, a multiple of 8
  std::int32_t y_stride = 0;
  Output output =
      Output::kStore;  // kSwiGlu: rows of w lie as RowOrder::kGateUp says, to whole tiles

  // Of many matrices: the visits of GroupedProduct, and n_tokens is the most there can be. Device
  // memory.
  const std::uint16_t* const* groups = nullptr;  // [n_groups]; null: w
  const TokenTile* tiles = nullptr;
  const std::int32_t* first_tile = nullptr;
  const std::int32_t* last_tile = nullptr;
  const std::int32_t* x_rows = nullptr;  // [n_visits], or null: row i is visit i's
  const std::int32_t* y_rows = nullptr;  // [n_visits], or null
  const float* factors = nullptr;        // [n_visits], or null: 1; kSwiGlu only
};

// Sums in float32, each in the order of inputs: a token's results do not depend on the others.
// Throws kInternal where the call cannot be; waits for nothing.
void matmul_plain(const MatmulPlain& call, cudaStream_t stream);

}  // namespace camelid::cuda
