// Products of packed matrices with a few tokens, at the rate at which weights can be read: the
// blocks of a grid share all units of work evenly (layout/share.h), weights stream through a ring
// in shared memory several units ahead, tensor cores multiply even a single token, and group scales
// meet the float32 sums. It knows lists of matrices, nothing of models.
//
// A unit is 128 rows x 128 inputs: each of 8 warps owns 16 rows, and reads back from the ring only
// what its own lanes copied. Tokens are the 8-wide side of mma.m16n8k16; all warps share them.
#pragma once

#include "device/dequant.cuh"
#include "device/grid.cuh"
#include "layout/output.h"
#include "layout/share.h"

namespace camelid::cuda {

constexpr int kStreamWarps = 8;
constexpr int kStreamThreads = kStreamWarps * kWarp;
constexpr int kStreamRows = kStreamWarps * kTileRows;
constexpr int kTokenTile = 8;
// Two blocks fit a Hopper SM, and one any GPU. With 64 tokens sums take all registers of one block.
constexpr int kRingBytes = 90 * 1024;
constexpr int kRingBytesOf64 = 150 * 1024;

// Matrices of one shape, each with its tokens; lies in shared memory. The units of all of them,
// task by task and in a task row block by row block, are shared by the grid.
struct List {
  const TilePointers* table;  // of device memory
  const int* matrices;        // task -> place in the table; null: the same
  const int* starts;          // task -> first of its tokens; one more entry ends the last
  const int* gather;          // token -> row of x; null: the same
  const int* scatter;         // token -> row of y; null: the same
  const float* factors;       // token -> what gate and up are multiplied by; null: 1
  const std::uint16_t* x;     // bf16 [..][x_stride], rows aligned to 16 bytes
  void* y;                    // float32 or bf16 [..][y_stride]
  std::int32_t x_stride, y_stride;
  TileShape shape;
  Output output;
  std::int32_t n_tasks, n_row_blocks, n_chunks;
  std::int32_t first_result;  // counter of the first row block, of Parts::arrivals
  std::int32_t n_blocks;      // that have units at all
  Share share;                // this block's units
};

// Completes a list whose matrices, tokens and ends are set. By one thread.
__device__ inline void deal_list(List& list) {
  list.n_row_blocks = divide_up(list.shape.n_row_tiles(), kStreamWarps);
  list.n_chunks = list.shape.n_chunks();
  const int n_units = list.n_tasks * list.n_row_blocks * list.n_chunks;
  list.n_blocks = n_units < grid_size() ? n_units : grid_size();
  list.share =
      block_index() < list.n_blocks ? share_of(block_index(), list.n_blocks, n_units) : Share{0, 0};
}

template <Bits kBitsOf, Scales kScalesOf, int kTokenTilesOf>
struct StreamShape {
  static constexpr Bits kBits = kBitsOf;
  static constexpr Scales kScales = kScalesOf;
  static constexpr int kTokenTiles = kTokenTilesOf;
  static constexpr int kTokens = kTokenTiles * kTokenTile;
  static constexpr int kWarpBytes = kChunkTiles * tile_bytes(kBits);
  static constexpr int kWarpScaleBytes =  // room for the most entries there can be
      kTileRows * scale_bytes(kScales) * (kScales == Scales::kBf16 ? 1 : 4);
  static constexpr int kTokenBytes = kChunkInputs * 2;
  static constexpr int kScalesAt = kStreamWarps * kWarpBytes;
  static constexpr int kTokensAt = kScalesAt + kStreamWarps * kWarpScaleBytes;
  static constexpr int kSlotBytes = kTokensAt + kTokens * kTokenBytes;
  static constexpr int kBlocks = kTokens < 64 ? 2 : 1;  // on a multiprocessor
  static constexpr int kSlots = (kTokens < 64 ? kRingBytes : kRingBytesOf64) / kSlotBytes;
  static_assert(kSlots >= 3, "fewer slots hide nothing");
  static constexpr int kBytes = kSlots * kSlotBytes;
};

// Where the ring begins, behind what a kernel keeps in shared memory.
template <class Header>
constexpr std::size_t kStreamHeaderBytes = (sizeof(Header) + 127) / 128 * 128;

// The block's shared memory begins with a Header that has List lists[] and unsigned flag; the ring
// of Shape::kBytes follows. Addresses the compiler knows take no registers, which are few here.
template <class Shape, class Header>
class Stream {
 public:
  __device__ explicit Stream(const Parts& parts) : parts_(parts) {}

  // Starts to copy the weights of the first units of the lists before `known`.
  __device__ void prefetch(int known) {
    while (n_weights_ < n_done_ + Shape::kSlots - 1 && ready(weights_, known)) load_weights();
    commit_copies();
  }

  // Works off the lists before `end`, whose tokens are there, and copies ahead weights of lists
  // before `known`, which are set. The block meets inside.
  __device__ void run(int end, int known) {
    for (int i = 0; i < Shape::kSlots - 1; ++i) {
      if (n_weights_ == n_done_ + i && ready(weights_, known)) load_weights();
      if (ready(tokens_, end)) load_tokens(n_done_ + i);
      commit_copies();
    }
    // Here and not members: they are nobody's between two runs, and registers are few.
    Sums sums;
    int first_chunk = 0;
    while (ready(now_, end)) {
      wait_copies<Shape::kSlots - 2>();
      sync_block();  // all have copied this unit, and left the one before
      if (n_weights_ < n_done_ + Shape::kSlots && ready(weights_, known)) load_weights();
      if (ready(tokens_, end)) load_tokens(n_done_ + Shape::kSlots - 1);
      commit_copies();
      multiply(sums, first_chunk);
    }
  }

 private:
  using Sums = float4[Shape::kTokenTiles];

  // A place in the units of all lists.
  struct Cursor {
    int list = -1;
    int unit = 0;
    int task = 0, row_block = 0, chunk = 0;
  };

  // True where the cursor stands on a unit of a list before `end`; goes on to the next such list.
  __device__ bool ready(Cursor& cursor, int end) {
    while (cursor.list < 0 || cursor.unit == list_at(cursor).share.last) {
      if (cursor.list + 1 >= end) return false;
      ++cursor.list;
      const List& list = list_at(cursor);
      cursor.unit = list.share.first;
      if (list.share.first == list.share.last) continue;  // its sizes may be 0
      const int row_block = cursor.unit / list.n_chunks;
      cursor.chunk = cursor.unit - row_block * list.n_chunks;
      cursor.task = row_block / list.n_row_blocks;
      cursor.row_block = row_block - cursor.task * list.n_row_blocks;
    }
    return true;
  }

  __device__ void advance(Cursor& cursor) {
    const List& list = list_at(cursor);
    ++cursor.unit;
    if (++cursor.chunk < list.n_chunks) return;
    cursor.chunk = 0;
    if (++cursor.row_block < list.n_row_blocks) return;
    cursor.row_block = 0;
    ++cursor.task;
  }

  __device__ static Header& header() { return *reinterpret_cast<Header*>(shared_memory()); }
  __device__ static const List& list_at(const Cursor& cursor) {
    return header().lists[cursor.list];
  }
  __device__ static std::byte* slot(int unit) {
    return shared_memory() + kStreamHeaderBytes<Header> + unit % Shape::kSlots * Shape::kSlotBytes;
  }

  __device__ void load_weights() {
    const List& list = list_at(weights_);
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int row_tile = weights_.row_block * kStreamWarps + warp;
    std::byte* to = slot(n_weights_);
    if (row_tile < list.shape.n_row_tiles()) {
      const int matrix = list.matrices == nullptr ? weights_.task : list.matrices[weights_.task];
      const TilePointers at = list.table[matrix];
      const std::byte* tiles = at.tiles + row_tile * list.shape.row_tile_bytes() +
                               std::int64_t{weights_.chunk} * Shape::kWarpBytes;
#pragma unroll
      for (int i = 0; i < Shape::kWarpBytes / (kWarp * 16); ++i) {
        const int offset = (i * kWarp + lane) * 16;
        copy_async_once(to + warp * Shape::kWarpBytes + offset, tiles + offset);
      }
      const int bytes = list.shape.chunk_scale_bytes();
      if (lane * 16 < bytes) {
        const std::byte* scales = at.scales + row_tile * list.shape.row_tile_scale_bytes() +
                                  std::int64_t{weights_.chunk} * bytes;
        copy_async_once(to + Shape::kScalesAt + warp * Shape::kWarpScaleBytes + lane * 16,
                        scales + lane * 16);
      }
    }
    ++n_weights_;
    advance(weights_);
  }

  __device__ void load_tokens(int unit) {
    const List& list = list_at(tokens_);
    const int first = list.starts[tokens_.task];
    const int n_tokens = list.starts[tokens_.task + 1] - first;
    std::byte* to = slot(unit) + Shape::kTokensAt;
    constexpr int kPieces = Shape::kTokenBytes / 16;
    for (int i = thread_index(); i < n_tokens * kPieces; i += kStreamThreads) {
      const int token = i / kPieces, piece = i % kPieces;
      const int row = list.gather == nullptr ? first + token : list.gather[first + token];
      const int input = tokens_.chunk * kChunkInputs + piece * 8;
      const int left = (list.shape.inputs - input) * 2;  // bytes, may be less than none
      const std::uint16_t* from = list.x + std::int64_t{row} * list.x_stride;
      copy_async(to + token * Shape::kTokenBytes + place_of(token, piece) * 16,
                 left > 0 ? from + input : from,
                 left < 0    ? 0
                 : left < 16 ? left
                             : 16);
    }
    advance(tokens_);
  }

  // Where a token's piece of 8 inputs lies, so that load_matrices meets all banks.
  __device__ static int place_of(int token, int piece) { return piece ^ (token % 8); }

  // `first_chunk` is the first of the row block that this block has.
  __device__ void multiply(Sums& sums, int& first_chunk) {
    const List& list = list_at(now_);
    const int warp = thread_index() / kWarp;
    const int first = list.starts[now_.task];
    const int n_tokens = list.starts[now_.task + 1] - first;
    if (now_.chunk == 0 || now_.unit == list.share.first) {
      first_chunk = now_.chunk;
#pragma unroll
      for (int i = 0; i < Shape::kTokenTiles; ++i) sums[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    if (now_.row_block * kStreamWarps + warp < list.shape.n_row_tiles()) {
      multiply_chunk(sums, slot(n_done_), divide_up(n_tokens, kTokenTile), list.shape.entries);
    }
    if (now_.chunk + 1 == list.n_chunks || now_.unit + 1 == list.share.last) {
      if (complete(list, sums, first_chunk)) write(list, sums, first, n_tokens);
    }
    ++n_done_;
    advance(now_);
  }

  __device__ void multiply_chunk(Sums& sums, const std::byte* slot, int n_tiles, int entries) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const std::byte* words = slot + warp * Shape::kWarpBytes + lane * 16;
    const std::byte* scales = slot + Shape::kScalesAt + warp * Shape::kWarpScaleBytes;
    float part[Shape::kTokenTiles][4] = {};
    float2 low = {1.0f, 0.0f}, high = low;  // scale and zero point of rows g and g + 8
#pragma unroll
    for (int pair = 0; pair < kChunkInputs / 32; ++pair) {  // of k16 steps
      if constexpr (Shape::kScales == Scales::kPairs) {
        const auto* entry = reinterpret_cast<const float2*>(scales) +
                            pair * entries / (kChunkInputs / 32) * kTileRows;
        low = entry[lane / 4];
        high = entry[lane / 4 + 8];
      }
      std::uint32_t a[2][4];
      unpack(a, words, pair, low.y, high.y);
#pragma unroll
      for (int i = 0; i < Shape::kTokenTiles; ++i) {
        if (i >= n_tiles) break;
        const int token = i * kTokenTile + lane % 8;
        const std::byte* row = slot + Shape::kTokensAt + token * Shape::kTokenBytes;
        std::uint32_t b[4];
        load_matrices(b, row + place_of(token, pair * 4 + lane / 8) * 16);
        mma_bf16(part[i], a[0], b[0], b[1]);
        mma_bf16(part[i], a[1], b[2], b[3]);
      }
      if constexpr (Shape::kScales == Scales::kPairs) add_scaled(sums, part, low.x, high.x);
    }
    if constexpr (Shape::kScales == Scales::kBf16) {
      const auto* rows = reinterpret_cast<const std::uint16_t*>(scales);
      add_scaled(sums, part, low_bf16(rows[lane / 4]), low_bf16(rows[lane / 4 + 8]));
    }
  }

  // The fragments of two k16 steps.
  __device__ static void unpack(std::uint32_t (&a)[2][4], const std::byte* words, int pair,
                                float zero_low, float zero_high) {
    if constexpr (Shape::kBits == Bits::k4) {
      std::uint32_t offset_low = 0x43084308u, offset_high = offset_low;  // 136
      if constexpr (Shape::kScales == Scales::kPairs) {
        offset_low = both_bf16(136.0f + zero_low);
        offset_high = both_bf16(136.0f + zero_high);
      }
      const auto two = *reinterpret_cast<const uint2*>(words + pair / 2 * 512 + pair % 2 * 8);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const std::uint32_t word = step == 0 ? two.x : two.y;
        a[step][0] = from_int4<0>(word, offset_low);
        a[step][1] = from_int4<1>(word, offset_high);
        a[step][2] = from_int4<2>(word, offset_low);
        a[step][3] = from_int4<3>(word, offset_high);
      }
    } else {
      const auto four = *reinterpret_cast<const uint4*>(words + pair * 512);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const std::uint32_t first = step == 0 ? four.x : four.z;
        const std::uint32_t second = step == 0 ? four.y : four.w;
        a[step][0] = from_int8<0>(first);
        a[step][1] = from_int8<1>(first);
        a[step][2] = from_int8<2>(second);
        a[step][3] = from_int8<3>(second);
        if constexpr (Shape::kScales == Scales::kPairs) {
          a[step][0] = subtract_bf16x2(a[step][0], both_bf16(zero_low));
          a[step][1] = subtract_bf16x2(a[step][1], both_bf16(zero_high));
          a[step][2] = subtract_bf16x2(a[step][2], both_bf16(zero_low));
          a[step][3] = subtract_bf16x2(a[step][3], both_bf16(zero_high));
        }
      }
    }
  }

  // Adds what was summed without scales, and starts again.
  __device__ void add_scaled(Sums& sums, float (&part)[Shape::kTokenTiles][4], float low,
                             float high) {
#pragma unroll
    for (int i = 0; i < Shape::kTokenTiles; ++i) {
      sums[i].x += low * part[i][0];
      sums[i].y += low * part[i][1];
      sums[i].z += high * part[i][2];
      sums[i].w += high * part[i][3];
      part[i][0] = part[i][1] = part[i][2] = part[i][3] = 0.0f;
    }
  }

  // True where the sums are those of all chunks; else another block completes them.
  __device__ bool complete(const List& list, Sums& sums, int first_chunk) {
    if (first_chunk == 0 && now_.chunk + 1 == list.n_chunks) return true;
    const int result = now_.task * list.n_row_blocks + now_.row_block;
    const int n_units = list.n_tasks * list.n_row_blocks * list.n_chunks;
    const int first_unit = result * list.n_chunks;
    const Sharers sharers = {owner_of(first_unit, list.n_blocks, n_units),
                             owner_of(first_unit + list.n_chunks - 1, list.n_blocks, n_units),
                             now_.list};
    return complete_sums(sums, parts_, list.first_result + result, sharers, &header().flag);
  }

  __device__ void write(const List& list, const Sums& sums, int first, int n_tokens) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int row_tile = now_.row_block * kStreamWarps + warp;
#pragma unroll
    for (int i = 0; i < Shape::kTokenTiles; ++i) {
      const int token = i * kTokenTile + lane % 4 * 2;
      if (token < n_tokens) write_token(list, row_tile, first + token, sums[i].x, sums[i].z);
      if (token + 1 < n_tokens) {
        write_token(list, row_tile, first + token + 1, sums[i].y, sums[i].w);
      }
    }
  }

  // Two sums of a token: of rows g and g + 8 of the tile.
  __device__ static void write_token(const List& list, int row_tile, int token, float low,
                                     float high) {
    const int g = thread_index() % kWarp / 4;
    const int y_row = list.scatter == nullptr ? token : list.scatter[token];
    const std::int64_t at = std::int64_t{y_row} * list.y_stride;
    if (list.output == Output::kSwiGlu) {
      const int channel = row_tile * (kTileRows / 2) + g;
      if (channel >= list.shape.rows / 2) return;
      const float factor = list.factors == nullptr ? 1.0f : list.factors[token];
      store_bf16(static_cast<std::uint16_t*>(list.y) + at + channel,
                 swiglu(factor * low, factor * high));
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_tile * kTileRows + g + half * 8;
      const float value = half == 0 ? low : high;
      if (row >= list.shape.rows) return;
      if (list.output == Output::kStoreBf16) {
        store_bf16(static_cast<std::uint16_t*>(list.y) + at + row, value);
      } else {
        float* y = static_cast<float*>(list.y) + at + row;
        *y = list.output == Output::kAdd ? load_shared_by_blocks(y) + value : value;
      }
    }
  }

  __device__ static float swiglu(float gate, float up) {
    return gate / (1.0f + exp_fast(-gate)) * up;
  }
  __device__ static void store_bf16(std::uint16_t* to, float value) {
    *to = static_cast<std::uint16_t>(pack_bf16x2(value, 0.0f) & 0xffffu);
  }

  Parts parts_;
  Cursor weights_, tokens_, now_;
  int n_weights_ = 0;  // units whose weights were asked for, and that are done
  int n_done_ = 0;
};

}  // namespace camelid::cuda
