// Routing of many tokens: top-k, a counting sort by expert that keeps the order of tokens, the
// list of token tiles, and the sum over visits. route_many.h says what the results mean.

// ---- layout ----
//
//   choose    block b: tokens 128 b..; a warp for each token, lane l has the logits l, l + 32, ..
//             then thread e counts the block's visits of expert e           -> counts[b][e]
//   list      one block; thread e adds up counts[..][e], each replaced by what came before it;
//             then starts[e], tiles and tile_ends
//   scatter   block b again; thread e numbers the block's visits of expert e, in their order
//
// No atomics: a thread for each expert reads the block's list, at most 1024 entries, from front to
// back. That takes a few microseconds and makes the order the same every time.

#include "ops/route_many.h"

#include "device/ptx.cuh"
#include "device/routing.cuh"
#include "ops/checks.h"

namespace camelid::cuda {
namespace {

constexpr int kThreads = kMaxExperts;       // a thread for each expert
constexpr int kMine = kMaxExperts / kWarp;  // logits of a lane

struct Choice {
  float logit;
  int expert;
};

__device__ inline bool is_better(const Choice& one, const Choice& other) {
  if (one.expert < 0 || other.expert < 0) return one.expert >= 0;
  return one.logit > other.logit || (one.logit == other.logit && one.expert < other.expert);
}

// ---- kernel: choose ----

// The best of a warp's logits that are not taken. Whatever the logits are, NaN too, it is an
// expert that was not chosen before, and the same for all lanes.
__device__ inline Choice best_of_warp(const float (&logits)[kMine], unsigned taken, int n_experts) {
  const int lane = thread_index() % kWarp;
  Choice best{0.0f, -1};
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const Choice one{logits[i], lane + i * kWarp};
    if (one.expert < n_experts && (taken >> i & 1) == 0 && is_better(one, best)) best = one;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Choice other{shuffle_xor(best.logit, mask), shuffle_xor(best.expert, mask)};
    if (is_better(other, best)) best = other;
  }
  return {shuffle(best.logit, 0), shuffle(best.expert, 0)};
}

// One token, by a warp: writes its experts in ascending order.
__device__ inline void choose(const RouteShape& shape, const float* token_logits, int* experts,
                              float* scores) {
  const int lane = thread_index() % kWarp;
  float logits[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int expert = lane + i * kWarp;
    logits[i] = expert < shape.n_experts ? token_logits[expert] : 0.0f;
  }
  unsigned taken = 0;
  Choice mine{0.0f, kMaxExperts};  // lane j keeps the j-th
  for (int j = 0; j < shape.top_k; ++j) {
    const Choice best = best_of_warp(logits, taken, shape.n_experts);
    if (best.expert % kWarp == lane) taken |= 1u << (best.expert / kWarp);
    if (lane == j) mine = best;
  }
  int rank = 0;
  for (int j = 0; j < shape.top_k; ++j) rank += shuffle(mine.expert, j) < mine.expert ? 1 : 0;
  if (lane >= shape.top_k) return;
  experts[rank] = mine.expert;
  scores[rank] = sigmoid(mine.logit);
}

// The entries of a block's list of chosen experts.
__device__ inline int entries_of_block(const RouteShape& shape, int block) {
  return min(kRouteTokens, shape.n_tokens - block * kRouteTokens) * shape.top_k;
}

__global__ void __launch_bounds__(kThreads)
    choose_kernel(const RouteShape shape, const float* logits, const Routes to) {
  const int warp = thread_index() / kWarp;
  const int first = block_index() * kRouteTokens;
  const int last = min(first + kRouteTokens, shape.n_tokens);
  auto* chosen = reinterpret_cast<int*>(shared_memory());
  for (int token = first + warp; token < last; token += kThreads / kWarp) {
    const std::int64_t at = std::int64_t{token} * shape.top_k;
    choose(shape, logits + std::int64_t{token} * shape.n_experts,
           chosen + (token - first) * shape.top_k, to.scores + at);
  }
  sync_block();
  const int n = entries_of_block(shape, block_index());
  const std::int64_t at = std::int64_t{first} * shape.top_k;
  for (int i = thread_index(); i < n; i += kThreads) to.experts[at + i] = chosen[i];
  const int expert = thread_index();
  if (expert >= shape.n_experts) return;
  int count = 0;
  for (int i = 0; i < n; ++i) count += chosen[i] == expert ? 1 : 0;
  to.counts[std::int64_t{block_index()} * shape.n_experts + expert] = count;
}

// ---- kernel: list ----

struct Listing {
  int n[kMaxExperts];          // visits of each expert
  int first[kMaxExperts];      // the first of them
  int tiles[kMaxExperts + 1];  // the first tile of each; then how many there are
};

// The last expert whose tiles begin at or before `tile`; those without tiles begin where the next
// does, so it is the one that has it.
__device__ inline int expert_of_tile(const Listing& listing, int n_experts, int tile) {
  int low = 0, high = n_experts;  // tiles[low] <= tile < tiles[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (listing.tiles[middle] <= tile ? low : high) = middle;
  }
  return low;
}

__device__ inline TokenTile tile_of_group(int group, int first, int n, int group_tile, int index) {
  return {group, first + index * kTileTokens, min(kTileTokens, n - index * kTileTokens), group_tile,
          divide_up(n, kTileTokens)};
}

__global__ void __launch_bounds__(kThreads) list_kernel(const RouteShape shape, const Routes to) {
  Listing& listing = *reinterpret_cast<Listing*>(shared_memory());
  const int expert = thread_index();
  const int n_blocks = divide_up(shape.n_tokens, kRouteTokens);
  int n = 0;
  if (expert < shape.n_experts) {
    constexpr int kAtOnce = 16;  // loads in flight: one after the other would take 0.5 us each
    for (int start = 0; start < n_blocks; start += kAtOnce) {
      std::int32_t* counts = to.counts + std::int64_t{start} * shape.n_experts + expert;
      int count[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        count[i] = start + i < n_blocks ? counts[i * shape.n_experts] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (start + i < n_blocks) counts[i * shape.n_experts] = n;
        n += count[i];
      }
    }
    listing.n[expert] = n;
  }
  sync_block();
  const int shared_tiles = shape.shared ? divide_up(shape.n_tokens, kTileTokens) : 0;
  int first = shape.shared ? shape.n_tokens : 0, first_tile = shared_tiles;
  for (int lower = 0; lower < min(expert, shape.n_experts); ++lower) {
    first += listing.n[lower];
    first_tile += divide_up(listing.n[lower], kTileTokens);
  }
  if (expert < shape.n_experts) {
    to.starts[expert] = first;
    listing.first[expert] = first;
    listing.tiles[expert] = first_tile;
    if (expert == shape.n_experts - 1) {
      const int all = first_tile + divide_up(n, kTileTokens);
      listing.tiles[shape.n_experts] = all;
      to.tile_ends[0] = 0;
      to.tile_ends[1] = shared_tiles;
      to.tile_ends[2] = all;
    }
  }
  sync_block();
  for (int tile = thread_index(); tile < shared_tiles; tile += kThreads) {
    to.tiles[tile] = tile_of_group(0, 0, shape.n_tokens, 0, tile);
  }
  for (int tile = shared_tiles + thread_index(); tile < listing.tiles[shape.n_experts];
       tile += kThreads) {
    const int e = expert_of_tile(listing, shape.n_experts, tile);
    to.tiles[tile] = tile_of_group(e + (shape.shared ? 1 : 0), listing.first[e], listing.n[e],
                                   listing.tiles[e], tile - listing.tiles[e]);
  }
}

// ---- kernel: scatter ----

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const RouteShape shape, const Routes to) {
  const int first = block_index() * kRouteTokens;
  const int n = entries_of_block(shape, block_index());
  const std::int64_t at = std::int64_t{first} * shape.top_k;
  auto* chosen = reinterpret_cast<int*>(shared_memory());
  for (int i = thread_index(); i < n; i += kThreads) chosen[i] = to.experts[at + i];
  sync_block();
  const int token = first + thread_index();
  if (shape.shared && thread_index() < kRouteTokens && token < shape.n_tokens) {
    to.token[token] = token;
    to.factor[token] = 1.0f;
  }
  const int expert = thread_index();
  if (expert >= shape.n_experts) return;
  int visit = to.starts[expert] + to.counts[std::int64_t{block_index()} * shape.n_experts + expert];
  for (int i = 0; i < n; ++i) {
    if (chosen[i] != expert) continue;
    to.token[visit] = first + i / shape.top_k;
    to.factor[visit] = to.scores[at + i];
    to.visits[at + i] = visit++;
  }
}

// ---- kernel: combine ----

// One block for each token. Bound by DRAM: (2 + n visits) * 4 * dim bytes for each.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const RouteShape shape, const Routes routes, const CombineRows call) {
  const std::int64_t token = block_index();
  const std::int32_t* visits = routes.visits + token * shape.top_k;
  for (int i = thread_index() * 4; i < call.dim; i += kThreads * 4) {
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    for (int j = shape.shared ? -1 : 0; j < shape.top_k; ++j) {
      const std::int64_t visit = j < 0 ? token : visits[j];
      const auto row = *reinterpret_cast<const float4*>(call.rows + visit * call.rows_stride + i);
      sum = {sum.x + row.x, sum.y + row.y, sum.z + row.z, sum.w + row.w};
    }
    auto* y = reinterpret_cast<float4*>(call.y + token * call.y_stride + i);
    const float4 old = *y;
    *y = {old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w};
  }
}

// ---- launch ----

constexpr const char* kName = "route_many";

void check_route(const RouteShape& shape) {
  require(shape.n_tokens > 0, kName, "there are no fewer than 0 tokens");
  require(shape.n_experts > 0 && shape.n_experts <= kMaxExperts, kName,
          "1 to 256 experts are known");
  require(shape.top_k > 0 && shape.top_k <= kMaxTopK && shape.top_k <= shape.n_experts, kName,
          "1 to 8 experts for each token are known");
  require(shape.n_visits() < (std::int64_t{1} << 31), kName, "too many visits");
}

Launch sized(int blocks, std::size_t shared_bytes, cudaStream_t stream) {
  Launch how;
  how.blocks = blocks;
  how.threads = kThreads;
  how.shared_bytes = shared_bytes;
  how.stream = stream;
  return how;
}

// Deals out memory, or only counts it where memory is null.
class Places {
 public:
  explicit Places(std::byte* memory) : memory_(memory) {}
  template <typename T>
  T* take(std::int64_t count) {
    std::byte* at = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (static_cast<std::size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(at);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  std::size_t bytes_ = 0;
};

Routes take_places(const RouteShape& shape, Places& places) {
  const std::int64_t n_routed = std::int64_t{shape.n_tokens} * shape.top_k;
  const std::int64_t n_blocks = divide_up(shape.n_tokens, kRouteTokens);
  Routes routes;
  routes.token = places.take<std::int32_t>(shape.n_visits());
  routes.factor = places.take<float>(shape.n_visits());
  routes.visits = places.take<std::int32_t>(n_routed);
  // Every group may have one tile that is not full.
  routes.tiles = places.take<TokenTile>(shape.n_visits() / kTileTokens + shape.n_experts + 1);
  routes.tile_ends = places.take<std::int32_t>(3);
  routes.experts = places.take<std::int32_t>(n_routed);
  routes.scores = places.take<float>(n_routed);
  routes.counts = places.take<std::int32_t>(n_blocks * shape.n_experts);
  routes.starts = places.take<std::int32_t>(shape.n_experts);
  return routes;
}

}  // namespace

std::size_t routes_bytes(const RouteShape& shape) {
  Places places(nullptr);
  take_places(shape, places);
  return places.bytes();
}

Routes routes_in(const RouteShape& shape, std::byte* memory) {
  Places places(memory);
  return take_places(shape, places);
}

void route_many(const RouteShape& shape, const float* logits, const Routes& routes,
                cudaStream_t stream) {
  if (shape.n_tokens == 0) return;
  check_route(shape);
  require(logits != nullptr && routes.token != nullptr, kName, "logits and routes must be there");
  const int n_blocks = divide_up(shape.n_tokens, kRouteTokens);
  const std::size_t list_bytes = static_cast<std::size_t>(kRouteTokens * shape.top_k) * sizeof(int);
  launch("route_many: choose", choose_kernel, sized(n_blocks, list_bytes, stream), shape, logits,
         routes);
  launch("route_many: list", list_kernel, sized(1, sizeof(Listing), stream), shape, routes);
  launch("route_many: scatter", scatter_kernel, sized(n_blocks, list_bytes, stream), shape, routes);
}

void combine_rows(const RouteShape& shape, const Routes& routes, const CombineRows& call,
                  cudaStream_t stream) {
  constexpr const char* kCombine = "combine_rows";
  if (shape.n_tokens == 0) return;
  check_route(shape);
  require(call.rows != nullptr && call.y != nullptr && routes.visits != nullptr, kCombine,
          "rows, y and routes must be there");
  require(call.dim > 0 && call.rows_stride >= call.dim && call.y_stride >= call.dim, kCombine,
          "rows may not overlap");
  require(call.dim % 4 == 0 && call.rows_stride % 4 == 0 && call.y_stride % 4 == 0 &&
              is_aligned(call.rows, 16) && is_aligned(call.y, 16),
          kCombine, "rows are added four values at a time");
  launch(kCombine, combine_kernel, sized(shape.n_tokens, 0, stream), shape, routes, call);
}

}  // namespace camelid::cuda
