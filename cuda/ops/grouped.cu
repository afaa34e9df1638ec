// Grouped products of many rows on any GPU from sm_80 on: int4 and int8 weights times gathered
// bf16 rows by mma.sync, with the scales in float32. What is computed, and in which order:
// grouped.h.

// ---- layout ----
//
//   output tile   128 rows (weights) x 128 columns (tokens), by 8 warps of 32 x 64: warp w has the
//                 row tiles 2 (w % 4).. and the tokens 64 (w / 4)..
//
//   slot of the   x        [128 tokens][64 inputs] bf16; piece p of 16 bytes of row r lies at
//   ring: 64               r * 128 + (p ^ r % 8) * 16, so that eight rows' pieces meet all banks
//   inputs        weights  [8 row tiles][tile], as they lie in memory
//
// Four slots: 80 KB (int4) or 96 KB (int8), which also fits GPUs with 99 KB for a block. Scales
// are read where they lie. A job starts with an empty ring: simple, and some percent slower than
// Hopper's.

#include "ops/grouped.h"

#include <algorithm>

#include "device/dequant.cuh"
#include "ops/checks.h"
#include "ops/grouped_finish.cuh"
#include "ops/instances.h"

namespace camelid::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockTiles = 8;  // row tiles
constexpr int kWarpTiles = 2;
constexpr int kWarpTokens = 64;
constexpr int kSlots = 4;
constexpr int kRowBytes = kTileInputs * 2;
constexpr int kTokensBytes = kTileTokens * kRowBytes;
constexpr int kTileSteps = kTileInputs / kStepInputs;

template <Bits kBits>
struct Ring {
  static constexpr int kSlotBytes = kTokensBytes + kBlockTiles * tile_bytes(kBits);
  static constexpr int kVisits = kSlots * kSlotBytes;
  static constexpr int kBytes = kVisits + static_cast<int>(sizeof(VisitRows));
};

// ---- kernel: copies ----

// One thread's share of a slot: the same piece of four tokens' rows, and of the weights.
template <Bits kBits>
struct Copies {
  static constexpr int kEach = kTileTokens * 8 / kThreads;
  static constexpr int kApart = kThreads / 8;  // tokens from one to the next
  std::int64_t row[kEach];                     // where it starts in x; -1: no such token

  __device__ void find(const GroupedProduct& p, const TokenTile& tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = thread_index() / 8 + i * kApart;
      const int visit = tile.first + token;
      row[i] = -1;
      if (token >= tile.n) continue;
      const std::int64_t from = p.x_rows == nullptr ? visit : p.x_rows[visit];
      row[i] = from * p.x_stride;
    }
  }
  // Row tiles past the matrix become zeros, and so do tokens and inputs that are not there.
  __device__ void start(std::byte* slot, const GroupedProduct& p, const std::byte* tiles,
                        int n_tiles, int k_tile) const {
    const int thread = thread_index();
    const int piece = thread % 8, in_eight = thread / 8 % 8;
    const int input = k_tile * kTileInputs + piece * 8;
    const int n_bytes = max(0, min(16, (p.shape.inputs - input) * 2));
    std::byte* to = slot + thread / 8 * kRowBytes + (piece ^ in_eight) * 16;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool is = row[i] >= 0 && n_bytes > 0;
      copy_async(to + i * kApart * kRowBytes, is ? p.x + row[i] + input : p.x, is ? n_bytes : 0);
    }
    constexpr int kPieces = tile_bytes(kBits) / 16;
#pragma unroll
    for (int at = thread; at < kBlockTiles * kPieces; at += kThreads) {
      const bool is = at / kPieces < n_tiles;
      const std::byte* from = tiles + at / kPieces * p.shape.row_tile_bytes() +
                              std::int64_t{k_tile} * tile_bytes(kBits) + at % kPieces * 16;
      copy_async(slot + kTokensBytes + at * 16, is ? from : tiles, is ? 16 : 0);
    }
  }
};

// ---- kernel: one warp's products ----

struct WarpSums {
  float total[kWarpTiles][kWarpTokens / 2];
  float part[kWarpTiles][kWarpTokens / 2];  // of the inputs since scales were last applied

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kWarpTokens / 2; ++i) {
#pragma unroll
      for (int r = 0; r < kWarpTiles; ++r) total[r][i] = part[r][i] = 0.0f;
    }
  }
  // total += scale * part, and part begins anew; scales of rows g and g + 8.
  __device__ void add_scaled(int r, float scale0, float scale8) {
#pragma unroll
    for (int i = 0; i < kWarpTokens / 2; ++i) {
      total[r][i] = total[r][i] + (i / 2 % 2 == 0 ? scale0 : scale8) * part[r][i];
      part[r][i] = 0.0f;
    }
  }
  // part += a x (tokens, inputs of the step); `rows`: the warp's tokens in the slot.
  __device__ void multiply(const std::uint32_t (&a)[kWarpTiles][4], const std::byte* rows,
                           int step) {
    const int lane = thread_index() % kWarp;
    const int token = lane / 16 * 8 + lane % 8, piece = step * 2 + lane / 8 % 2;
    const std::byte* at = rows + token * kRowBytes + (piece ^ token % 8) * 16;
#pragma unroll
    for (int j = 0; j < kWarpTokens / 8; j += 2) {
      std::uint32_t b[4];  // both halves of the inputs of tokens 8 j.., then of 8 j + 8..
      load_matrices(b, at + j * 8 * kRowBytes);
#pragma unroll
      for (int r = 0; r < kWarpTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float c[4];
          const int first = 4 * (j + half);
#pragma unroll
          for (int i = 0; i < 4; ++i) c[i] = part[r][first + i];
          mma_bf16(c, a[r], b[2 * half], b[2 * half + 1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) part[r][first + i] = c[i];
        }
      }
    }
  }
};

// Multiplies a slot's 64 inputs. `scales`: of the warp's first row tile.
template <Bits kBits, Scales kScales>
__device__ __forceinline__ void multiply_slot(WarpSums& sums, const std::byte* rows,
                                              const std::byte* weights, const std::byte* scales,
                                              const TileShape& shape, int k_tile, int n_tiles) {
  constexpr bool kZeros = kScales == Scales::kPairs;
  const int lane = thread_index() % kWarp, g = lane / 4;
  const std::byte* chunk = scales + std::int64_t{k_tile / kChunkTiles} * shape.chunk_scale_bytes();
  uint4 piece[kWarpTiles];
  float2 low[kWarpTiles], high[kWarpTiles];  // scale and zero point of rows g and g + 8
  Zeros zeros[kWarpTiles] = {};
#pragma unroll
  for (int step = 0; step < kTileSteps; ++step) {
    std::uint32_t a[kWarpTiles][4];
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r) {
      if (step % steps_of_piece(kBits) == 0) {
        piece[r] = *reinterpret_cast<const uint4*>(weights + r * tile_bytes(kBits) + lane * 16 +
                                                   step / steps_of_piece(kBits) * 512);
      }
      if (kZeros && step % 2 == 0 && r < n_tiles) {
        const int quarter = k_tile % kChunkTiles * 2 + step / 2;
        const auto* pairs =
            reinterpret_cast<const float2*>(chunk + r * shape.row_tile_scale_bytes()) +
            quarter * shape.entries / 4 * kTileRows;
        low[r] = pairs[g];
        high[r] = pairs[g + 8];
        zeros[r] = {{zero_pair<kBits>(low[r].y), zero_pair<kBits>(high[r].y)}};
      }
      expand<kBits, kZeros>(a[r], piece[r], step, zeros[r]);
    }
    sums.multiply(a, rows, step);
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r) {
      if (kZeros && step % 2 == 1 && r < n_tiles) sums.add_scaled(r, low[r].x, high[r].x);
    }
  }
  if constexpr (!kZeros) {
    if (k_tile % kChunkTiles != kChunkTiles - 1) return;
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r) {
      if (r >= n_tiles) continue;
      const auto* row =
          reinterpret_cast<const std::uint16_t*>(chunk + r * shape.row_tile_scale_bytes());
      sums.add_scaled(r, low_bf16(row[g]), low_bf16(row[g + 8]));
    }
  }
}

// ---- kernel ----

template <Bits kBits, Scales kScales>
__device__ void run_job(const GroupedProduct& p, const TokenTile& tile, int first_tile) {
  using R = Ring<kBits>;
  std::byte* shared = shared_memory();
  VisitRows& visits = *reinterpret_cast<VisitRows*>(shared + R::kVisits);
  const int warp = thread_index() / kWarp;
  const int my_tile = warp % 4 * kWarpTiles, my_token = warp / 4 * kWarpTokens;
  const TilePointers w = p.groups[tile.group];
  const std::byte* tiles = w.tiles + first_tile * p.shape.row_tile_bytes();
  const std::byte* scales = w.scales + (first_tile + my_tile) * p.shape.row_tile_scale_bytes();
  const int n_tiles = p.shape.n_row_tiles() - first_tile;
  const int n_k_tiles = p.shape.n_k_tiles();
  Copies<kBits> copies;
  copies.find(p, tile);
  if (thread_index() < kTileTokens) find_visit(visits, p, tile, thread_index());
  for (int k = 0; k < kSlots - 1; ++k) {
    if (k < n_k_tiles) copies.start(shared + k * R::kSlotBytes, p, tiles, n_tiles, k);
    commit_copies();
  }
  WarpSums sums;
  sums.clear();
  const bool busy = my_token < tile.n && my_tile < n_tiles;
  for (int k = 0; k < n_k_tiles; ++k) {
    wait_copies<kSlots - 2>();
    sync_block();  // tile k is there, and nobody reads tile k - 1 any more
    const int ahead = k + kSlots - 1;
    if (ahead < n_k_tiles) {
      copies.start(shared + ahead % kSlots * R::kSlotBytes, p, tiles, n_tiles, ahead);
    }
    commit_copies();
    const std::byte* slot = shared + k % kSlots * R::kSlotBytes;
    if (busy) {
      multiply_slot<kBits, kScales>(sums, slot + my_token * kRowBytes,
                                    slot + kTokensBytes + my_tile * tile_bytes(kBits), scales,
                                    p.shape, k, n_tiles - my_tile);
    }
  }
  if (!busy) return;
#pragma unroll
  for (int r = 0; r < kWarpTiles; ++r) {
    finish(p, visits, my_token, first_tile + my_tile + r, sums.total[r]);
  }
}

// y = w x for all visits of p. One block for each multiprocessor, persistent. Bound by the tensor
// cores from about 64 tokens for each expert on.
template <Bits kBits, Scales kScales>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_many_kernel(const __grid_constant__ GroupedProduct p) {
  TokenTile tile;
  int row_block;
  for (int number = block_index();
       find_job(p, number, divide_up(p.shape.n_row_tiles(), kBlockTiles), tile, row_block);
       number += grid_size()) {
    run_job<kBits, kScales>(p, tile, row_block * kBlockTiles);
    sync_block();
  }
}

// ---- choose and launch ----

template <Bits kBits, Scales kScales>
void launch_kernel(const GroupedProduct& p, const Launch& sized, cudaStream_t stream) {
  Launch how = sized;
  how.shared_bytes = Ring<kBits>::kBytes;
  how.stream = stream;
  launch("grouped_many", grouped_many_kernel<kBits, kScales>, how, p);
}

}  // namespace

void check_product(const GroupedProduct& p) {
  constexpr const char* kName = "grouped_many";
  const TileShape& shape = p.shape;
  require(p.n_visits >= 0, kName, "there are no fewer than 0 visits");
  check_shape(kName, shape);
  check_rows(kName, "x", p.x, shape.inputs, p.x_stride);
  check_output(kName, p.output, shape.rows, shape.order, p.y, p.y_stride);
  const bool pairs = p.output == Output::kStoreBf16 || p.output == Output::kSwiGlu;
  require(!pairs || (p.y_stride % 2 == 0 && is_aligned(p.y, 4)), kName,
          "rows of bf16 are written in pairs");
  require(p.groups != nullptr &&
              (p.tiles == nullptr || (p.first_tile != nullptr && p.last_tile != nullptr)),
          kName, "matrices must be there, and a list of tiles comes with its ends");
}

int grouped_blocks(const GroupedProduct& p, int block_row_tiles, int multiprocessors) {
  if (p.tiles != nullptr) return multiprocessors;
  const std::int64_t n_jobs = std::int64_t{divide_up(p.n_visits, kTileTokens)} *
                              divide_up(p.shape.n_row_tiles(), block_row_tiles);
  return static_cast<int>(std::min<std::int64_t>(n_jobs, multiprocessors));
}

void grouped_many(const GroupedProduct& p, int multiprocessors, cudaStream_t stream) {
  Launch how;
  how.threads = kThreads;
  how.blocks = grouped_blocks(p, kBlockTiles, multiprocessors);
  if (how.blocks == 0) return;
  check_product(p);
  with_tile_format(p.shape, [&]<Bits kBits, Scales kScales>() {
    launch_kernel<kBits, kScales>(p, how, stream);
  });
}

}  // namespace camelid::cuda
