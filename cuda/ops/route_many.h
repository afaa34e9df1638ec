// Which expert each of many tokens visits, as grouped products want it: top-k of the router's
// logits, visits sorted by expert, and the list of token tiles; and the sum of what a token's
// visits brought. All on the device, the same bits every time. It knows neither weights nor
// products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/launch.cuh"
#include "layout/experts.h"
#include "ops/grouped.h"

namespace camelid::cuda {

struct RouteShape {
  std::int32_t n_tokens = 0;
  std::int32_t n_experts = 0;  // at most 256
  std::int32_t top_k = 1;      // at most 8, and at most n_experts
  // All tokens visit a shared expert too, with factor 1. It is group 0 then, expert e is group
  // e + 1; without it expert e is group e.
  bool shared = false;

  std::int64_t n_visits() const { return std::int64_t{n_tokens} * (top_k + (shared ? 1 : 0)); }
};

// Visits are numbered: first the shared expert's, in the order of tokens; then those of the routed
// experts, in the order of experts, and for one expert in the order of tokens. Device memory.
struct Routes {
  std::int32_t* token = nullptr;   // [n_visits]
  float* factor = nullptr;         // [n_visits]: 1 for the shared expert, else sigmoid(logit)
  std::int32_t* visits = nullptr;  // [n_tokens][top_k]: routed visits of a token, by expert
  TokenTile* tiles = nullptr;
  // Of tiles: where the shared expert's begin (0), where they end, where all end. So a product
  // over all has first_tile = tile_ends, last_tile = tile_ends + 2.
  std::int32_t* tile_ends = nullptr;  // [3]

  // While sorting, for each block of kRouteTokens tokens.
  std::int32_t* experts = nullptr;  // [n_tokens][top_k], ascending
  float* scores = nullptr;          // [n_tokens][top_k]
  std::int32_t* counts = nullptr;   // [n_blocks][n_experts]; then how many come before the block's
  std::int32_t* starts = nullptr;   // [n_experts]: the first visit of each
};

constexpr int kRouteTokens = 128;

// How much device memory routes take, and where in it (aligned to 16 bytes) they lie.
std::size_t routes_bytes(const RouteShape& shape);
Routes routes_in(const RouteShape& shape, std::byte* memory);

// Fills routes from logits [n_tokens][n_experts] float32. Of equal logits the lower expert wins.
void route_many(const RouteShape& shape, const float* logits, const Routes& routes,
                cudaStream_t stream);

// y[token] += the rows of its visits: the shared expert's first, then by expert. rows: [n_visits],
// y: [n_tokens], both float32, dim values, their strides and addresses multiples of four values.
struct CombineRows {
  const float* rows = nullptr;
  std::int64_t rows_stride = 0;
  float* y = nullptr;
  std::int64_t y_stride = 0;
  std::int32_t dim = 0;
};
void combine_rows(const RouteShape& shape, const Routes& routes, const CombineRows& call,
                  cudaStream_t stream);

}  // namespace camelid::cuda
