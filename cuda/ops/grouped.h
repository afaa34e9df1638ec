// Many rows times the matrices of many experts in one launch: what such a product is made of,
// and the kernel for every GPU from sm_80 on. sm90/grouped.h has the one for Hopper, with the
// same arguments. It owns the order in which output tiles are computed; where rows go,
// ops/route_many.h decides.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/output.h"
#include "layout/tiles.h"

namespace camelid::cuda {

constexpr int kTileTokens = 128;

// Visits that one group's matrix is multiplied by together: `n` of them from `first` on.
struct TokenTile {
  std::int32_t group;
  std::int32_t first;
  std::int32_t n;           // 1 to kTileTokens
  std::int32_t group_tile;  // the index of the group's first tile
  std::int32_t group_n;     // and how many it has
};

// A visit is one row of a product: some row of x times the matrix of one group, into some row of
// y. Everything is device memory; bf16 is held as its bits.
struct GroupedProduct {
  TileShape shape;                       // of every group's matrix
  const TilePointers* groups = nullptr;  // [n_groups]
  const std::uint16_t* x = nullptr;      // bf16 [.., shape.inputs], aligned to 16 bytes
  std::int64_t x_stride = 0;             // in values, a multiple of 8
  const std::int32_t* x_rows = nullptr;  // [n_visits], or null: row i is visit i's
  void* y = nullptr;                     // [.., shape.rows], or [.., shape.rows / 2] of kSwiGlu
  std::int64_t y_stride = 0;             // in values; even where y is bf16
  const std::int32_t* y_rows = nullptr;  // [n_visits], or null: row i is visit i's
  const float* factors = nullptr;        // [n_visits], or null: 1; kSwiGlu only
  // kAdd: no two visits may name the same row of y. kSwiGlu: silu(f gate) * (f up) with the
  // visit's factor f.
  Output output = Output::kStore;

  // Which visits: the tiles from *first_tile up to *last_tile of a list, as route_many makes it.
  // Or, where tiles is null, the visits 0..n_visits - 1 by the first group.
  const TokenTile* tiles = nullptr;
  const std::int32_t* first_tile = nullptr;
  const std::int32_t* last_tile = nullptr;
  std::int32_t n_visits = 0;  // of a list, nobody asks
};

// Throws kInternal where the kernels could not keep their promise for these shapes and addresses.
void check_product(const GroupedProduct& product);

// How many blocks to launch: at most one for each multiprocessor, 0 where there is nothing to do.
int grouped_blocks(const GroupedProduct& product, int block_row_tiles, int multiprocessors);

// Portable: mma.sync, one block for each multiprocessor. No visits are no work, and are not
// checked. Nothing is waited for.
void grouped_many(const GroupedProduct& product, int multiprocessors, cudaStream_t stream);

// ---- the order of output tiles ----

// One block's work: a tile of tokens times `row_block`, some number of neighbouring row tiles.
struct Job {
  std::int32_t tile;  // of its group
  std::int32_t row_block;
};

// Neighbouring jobs run at the same time, and what they have in common is read once from L2's
// point of view. A wave of about 132 jobs that takes R row blocks by T token tiles of 128 reads,
// of Scout's gate and up in int4 (256 rows: 0.66 MB; 128 tokens: 1.3 MB), 0.66 R + 1.3 T MB:
// least near R = 16.
constexpr int kBandBlocks = 16;

// Job number `local` of a group with n_tiles tiles of tokens: bands of row blocks, in each of them
// all tiles of tokens, for each of them the row blocks of the band. A band's weights, at most 10
// MB, stay in L2 while tokens stream past.
CAMELID_HOST_DEVICE constexpr Job job_of_group(int local, int n_tiles, int n_row_blocks) {
  const int band = local / (kBandBlocks * n_tiles);
  const int first = band * kBandBlocks;
  const int rest = local - first * n_tiles;
  const int left = n_row_blocks - first;
  const int width = left < kBandBlocks ? left : kBandBlocks;
  return {rest / width, first + rest % width};
}

// The tiles of one launch, whether listed or not.
struct TokenTiles {
  const TokenTile* list;
  std::int32_t first;
  std::int32_t last;  // one past
  std::int32_t n_visits;

  CAMELID_HOST_DEVICE TokenTile at(int tile) const {
    if (list != nullptr) return list[tile];
    const int row = tile * kTileTokens;
    const int left = n_visits - row;
    return {0, row, left < kTileTokens ? left : kTileTokens, 0, last};
  }
};

CAMELID_HOST_DEVICE inline TokenTiles token_tiles(const GroupedProduct& p) {
  if (p.tiles == nullptr) return {nullptr, 0, divide_up(p.n_visits, kTileTokens), p.n_visits};
  return {p.tiles, *p.first_tile, *p.last_tile, p.n_visits};
}

// What job number `number` of a launch is; false behind the last one.
CAMELID_HOST_DEVICE inline bool find_job(const GroupedProduct& p, int number, int n_row_blocks,
                                         TokenTile& tile, int& row_block) {
  const TokenTiles tiles = token_tiles(p);
  const int some = tiles.first + number / n_row_blocks;  // a tile of the job's group
  if (some >= tiles.last) return false;
  tile = tiles.at(some);
  const int before = (tile.group_tile - tiles.first) * n_row_blocks;
  const Job job = job_of_group(number - before, tile.group_n, n_row_blocks);
  tile = tiles.at(tile.group_tile + job.tile);
  row_block = job.row_block;
  return true;
}

}  // namespace camelid::cuda
