// y = x w^T of a packed INT4 or INT8 matrix and up to 64 tokens at a time: decode's linear layers.
// Needs sm_80.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/output.h"
#include "layout/split_norm.h"
#include "layout/tiles.h"
#include "ops/workspace.h"

namespace camelid::cuda {

struct MatmulFew {
  TiledMatrix w;
  const std::uint16_t* x = nullptr;  // bf16 [n_tokens][x_stride], rows aligned to 16 bytes
  std::int32_t n_tokens = 0;
  std::int32_t x_stride = 0;  // values, a multiple of 8
  void* y = nullptr;          // [n_tokens][y_stride]
  std::int32_t y_stride = 0;
  Output output = Output::kStore;
  NormEnd norm_of_x;             // of x, where its rows were only begun
  NormStart norm_of_y;           // of y, with kAdd; not in one call with norm_of_x
  std::int32_t most_blocks = 0;  // of the grid; 0: as many as run at once. For tests.
};

// Of calls of up to n_tokens, on this GPU.
WorkspaceNeed matmul_few_needs(const TileShape& shape, int n_tokens);

// The same bits every time on one kind of GPU, for the same number of tokens up to the next power
// of two. Throws kInternal where the call cannot be or its launch fails; waits for nothing.
void matmul_few(const MatmulFew& call, const Workspace& workspace, cudaStream_t stream);

}  // namespace camelid::cuda
