// The feed-forward part of a layer for few tokens, in one launch: router, top-k, the shared expert
// and the routed ones, their SwiGLU and their sum into the residual. Needs sm_80.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/split_norm.h"
#include "layout/tiles.h"
#include "ops/workspace.h"

namespace camelid::cuda {

// Weights of the experts of one layer. All have the same kind of tiles: bits and scales.
struct ExpertWeights {
  const std::uint16_t* router = nullptr;  // bf16 [n_experts][router_stride], rows as those of x
  std::int32_t router_stride = 0;
  const TilePointers* gate_up = nullptr;  // device memory, [n_experts]
  const TilePointers* down = nullptr;     // device memory, [n_experts]
  TileShape gate_up_shape;                // 2 ffn_dim x dim, RowOrder::kGateUp
  TileShape down_shape;                   // dim x ffn_dim
  TiledMatrix shared_gate_up;             // no rows where there is no shared expert
  TiledMatrix shared_down;
  std::int32_t n_experts = 0;
  std::int32_t top_k = 1;
};

struct ExpertsFew {
  ExpertWeights w;
  const std::uint16_t* x = nullptr;  // bf16 [n_tokens][x_stride], rows aligned to 16 bytes
  std::int32_t n_tokens = 0;
  std::int32_t x_stride = 0;  // values, a multiple of 8
  float* y = nullptr;         // [n_tokens][y_stride]: added to
  std::int32_t y_stride = 0;
  NormEnd norm_of_x;             // of x, where its rows were only begun
  NormStart norm_of_y;           // of y, where top_k is 1; its h may be x
  std::byte* scratch = nullptr;  // experts_few_scratch_bytes(), aligned to 16 bytes
  std::int32_t most_blocks = 0;  // of the grid; 0: as many as run at once. For tests.
};

// The most tokens one launch takes: 64 of INT4 without zero points on a GPU whose blocks may have
// 163 KB of shared memory, else 32. More go through ops/route_many.h and ops/grouped.h
// (host/feed_forward.cu).
int experts_few_limit(const ExpertWeights& w);
// Of calls of up to n_tokens, on this GPU.
WorkspaceNeed experts_few_needs(const ExpertWeights& w, int n_tokens);
std::size_t experts_few_scratch_bytes(const ExpertWeights& w, int n_tokens);

// y += shared(x) + sum over the top_k experts e of expert_e(sigmoid(logit_e) x). The same bits
// every time for the same tokens on one kind of GPU. Throws kInternal where the call cannot be;
// waits for nothing.
void experts_few(const ExpertsFew& call, const Workspace& workspace, cudaStream_t stream);

}  // namespace camelid::cuda
