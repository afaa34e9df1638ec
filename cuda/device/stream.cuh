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
#include "device/split_norm.cuh"
#include "device/swiglu.cuh"
#include "layout/output.h"
#include "layout/share.h"

namespace camelid::cuda {

constexpr int kStreamWarps = 8;
constexpr int kStreamThreads = kStreamWarps * kWarp;
constexpr int kStreamRows = kStreamWarps * kTileRows;
constexpr int kTokenTile = 8;
constexpr int kMostStreamTokens = 64;  // of one pass
static_assert(kStreamRows == kNormPart && kStreamThreads >= kMostStreamTokens * kNormLanes);
// What a block of every GPU from sm_80 on may ask for: 99 KB on sm_86, sm_89 and sm_120. So large a
// ring and the largest header fit that, and two blocks fit an SM of Hopper, one of an A100. With 64
// tokens sums take all registers of one block, and data centre GPUs alone have the memory.
constexpr int kLeastSharedBytes = 99 * 1024;
constexpr int kRingBytes = 85 * 1024;
constexpr int kRingBytesOf64 = 150 * 1024;

// Matrices of one shape, each with its tokens; lies in shared memory. The units of all of them,
// task by task and in a task row block by row block, are shared by the grid.
struct List {
  const TilePointers* table;  // of device memory
  const int* matrices;        // task -> place in the table; null: the same
  const int* starts;          // task -> first of its tokens; one more entry ends the last
  const int* gather;          // token -> row of x; null: the same
  const int* scatter;         // token -> row of y; null: the same
  const float* factors;       // token -> what its products are multiplied by; null: 1
  const std::uint16_t* x;     // bf16 [..][x_stride], rows aligned to 16 bytes
  void* y;                    // float32 or bf16 [..][y_stride]
  std::int32_t x_stride, y_stride;
  NormStart norm;  // of what kAdd completes
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
  // Chunks that one turn of the loop multiplies, where so many are left of a row block: with few
  // tokens and the smallest weights its other instructions would outweigh its products.
  static constexpr int kStep =
      kTokens <= 16 && kBits == Bits::k4 && kScales == Scales::kBf16 ? 2 : 1;
  static constexpr int kChunkBytes = kChunkTiles * tile_bytes(kBits);  // of a warp's rows
  static constexpr int kMostScaleBytes =  // of a chunk: room for the most entries there can be
      kTileRows * scale_bytes(kScales) * (kScales == Scales::kBf16 ? 1 : 4);
  static constexpr int kTokenBytes = kStep * kChunkInputs * 2;
  static constexpr int kScalesAt = kStreamWarps * kStep * kChunkBytes;
  static constexpr int kTokensAt = kScalesAt + kStreamWarps * kStep * kMostScaleBytes;
  static constexpr int kSlotBytes = kTokensAt + kTokens * kTokenBytes;
  static constexpr int kBlocks = kTokens < 64 ? 2 : 1;  // on a multiprocessor
  static constexpr int kSlots = (kTokens < 64 ? kRingBytes : kRingBytesOf64) / kSlotBytes;
  static_assert(kSlots >= 3, "fewer slots hide nothing");
  static_assert(kTokensAt % 256 == 0 && kSlotBytes % 256 == 0, "multiply_chunk flips address bits");
  static constexpr int kBytes = kSlots * kSlotBytes;
};

// Where the ring begins, behind what a kernel keeps in shared memory.
template <class Header>
constexpr std::size_t kStreamHeaderBytes = (sizeof(Header) + 255) / 256 * 256;

// What the headers of all kernels have, beside the lists. A kernel may have its own completed(),
// which the whole block calls when the sums of 128 rows of a list are written.
struct StreamHeader {
  __device__ void completed(int /*list*/, int /*row_block*/) {}

  float factors[kMostStreamTokens];                // of tokens: find_norm_factors
  float squares[kStreamWarps][kMostStreamTokens];  // of tokens, of a warp's rows
  unsigned flag;
};

// The block's shared memory begins with a Header, a StreamHeader that has List lists[] as well; the
// ring of Shape::kBytes follows.
//
// Instructions are what this loop runs short of: at the speed of HBM an SM has 1772 issue slots for
// the units of its 8 warps, and turning integers into bf16 takes half of them. So whatever stays
// the same along a row block is found once for it, by next_segment().
template <class Shape, class Header>
class Stream {
 public:
  __device__ explicit Stream(const Parts& parts)
      : parts_(parts), ring_(shared_address(shared_memory() + kStreamHeaderBytes<Header>)) {}

  // Starts to copy the weights of the first units of the lists before `known`.
  __device__ void prefetch(int known) {
#pragma unroll 1
    while (n_ahead_ < Shape::kSlots - 1 && find_weights(known)) load_weights();
    commit_copies();
  }

  // Works off the lists before `end`, whose tokens are there, and copies ahead weights of lists
  // before `known`, which are set. The block meets inside.
  __device__ void run(int end, int known) {
#pragma unroll 1
    for (int i = 0; i < Shape::kSlots - 1; ++i) {
      if (n_ahead_ == i && find_weights(known)) load_weights();
      if (find_tokens(end)) load_tokens();
      commit_copies();
    }
    // Here and not members: they are nobody's between two runs, and registers are few.
    Sums sums;
    int n_tiles = 0;
    while (true) {
      if (now_.left == 0) {
        if (!next_segment(now_, end)) break;
        n_tiles = divide_up(n_tokens(now_), kTokenTile);
        // A warp past the last row multiplies by nothing.
        if (now_.row_block * kStreamWarps + warp() >= list_at(now_).shape.n_row_tiles()) {
          n_tiles = 0;
        }
#pragma unroll
        for (int i = 0; i < Shape::kTokenTiles; ++i) sums[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
      }
      wait_copies<Shape::kSlots - 2>();
      sync_block();  // all have copied this unit, and left the one before
      if (find_weights(known)) load_weights();  // no more than kSlots - 1 are ahead of this one
      if (find_tokens(end)) load_tokens();
      commit_copies();
      if (n_tiles > 0) {
        multiply_chunk<0>(sums, n_tiles);
        if (Shape::kStep > 1 && now_.left > 1) multiply_chunk<Shape::kStep - 1>(sums, n_tiles);
      }
      --n_ahead_;
      step(now_);
      if (now_.left == 0 && complete(sums)) write(sums);
    }
  }

 private:
  using Sums = float4[Shape::kTokenTiles];
  // 16-byte pieces of the tokens of a unit that a thread copies.
  static constexpr int kPieces =
      divide_up(Shape::kTokens * Shape::kTokenBytes / 16, kStreamThreads);
  static constexpr int kTokenPieces = Shape::kTokenBytes / 16;

  // A place in the units of all lists. Its segment: the units of one row block that are this
  // block's.
  struct Cursor {
    int list = -1;
    int unit = 0;  // of the list, behind the segment
    int task = 0, row_block = 0;
    int chunk = 0;  // the segment's first
    int left = 0;   // units of the segment
    int slot = 0;   // of the ring, in bytes; each holds up to kStep units
  };

  // Goes to the next segment of the lists before `end`, where there is one.
  __device__ static bool next_segment(Cursor& cursor, int end) {
    while (cursor.list < 0 || cursor.unit == list_at(cursor).share.last) {
      if (cursor.list + 1 >= end) return false;
      ++cursor.list;
      cursor.unit = list_at(cursor).share.first;
    }
    const List& list = list_at(cursor);
    const int row_block = cursor.unit / list.n_chunks;
    cursor.chunk = cursor.unit - row_block * list.n_chunks;
    cursor.task = row_block / list.n_row_blocks;
    cursor.row_block = row_block - cursor.task * list.n_row_blocks;
    const int end_of_block = cursor.unit + list.n_chunks - cursor.chunk;
    const int segment_end = end_of_block < list.share.last ? end_of_block : list.share.last;
    cursor.left = segment_end - cursor.unit;
    cursor.unit = segment_end;
    return true;
  }

  // Past what one turn of the loop takes.
  __device__ static void step(Cursor& cursor) {
    cursor.left = cursor.left > Shape::kStep ? cursor.left - Shape::kStep : 0;
    cursor.slot += Shape::kSlotBytes;
    if (cursor.slot == Shape::kBytes) cursor.slot = 0;
  }

  __device__ static Header& header() { return *reinterpret_cast<Header*>(shared_memory()); }
  __device__ static const List& list_at(const Cursor& cursor) {
    return header().lists[cursor.list];
  }
  __device__ unsigned slot_at(const Cursor& cursor) const {
    return ring_ + static_cast<unsigned>(cursor.slot);
  }
  __device__ static int first_token(const Cursor& cursor) {
    return list_at(cursor).starts[cursor.task];
  }
  __device__ static int n_tokens(const Cursor& cursor) {
    return list_at(cursor).starts[cursor.task + 1] - first_token(cursor);
  }
  __device__ static int warp() { return thread_index() / kWarp; }
  __device__ static int lane() { return thread_index() % kWarp; }

  // True where a unit's weights are to be copied; finds where this lane's part of them lies.
  __device__ bool find_weights(int end) {
    if (weights_.left > 0) return true;
    if (!next_segment(weights_, end)) return false;
    const List& list = list_at(weights_);
    const int matrix = list.matrices == nullptr ? weights_.task : list.matrices[weights_.task];
    const TilePointers at = list.table[matrix];
    const int row_tile = weights_.row_block * kStreamWarps + warp();
    scale_step_ = list.shape.chunk_scale_bytes();
    tiles_ = at.tiles + row_tile * list.shape.row_tile_bytes() +
             std::int64_t{weights_.chunk} * Shape::kChunkBytes + lane() * 16;
    scales_ = at.scales + row_tile * list.shape.row_tile_scale_bytes() +
              std::int64_t{weights_.chunk} * scale_step_ + lane() * 16;
    if (row_tile >= list.shape.n_row_tiles()) tiles_ = nullptr;
    return true;
  }

  __device__ void load_weights() {
    if (tiles_ != nullptr) {
      constexpr int kWarpBytes = Shape::kStep * Shape::kChunkBytes;
      const unsigned offset = static_cast<unsigned>(lane()) * 16;
      const unsigned to = slot_at(weights_) + warp() * kWarpBytes + offset;
      // Of the last units of a segment, what lies behind them belongs to others and stays there.
      const int chunks = weights_.left < Shape::kStep ? weights_.left : Shape::kStep;
#pragma unroll
      for (int i = 0; i < kWarpBytes / (kWarp * 16); ++i) {
        if (i * kWarp * 16 < Shape::kChunkBytes || chunks > 1) {
          copy_async(to + i * kWarp * 16, tiles_ + i * kWarp * 16);
        }
      }
      tiles_ += kWarpBytes;
      const unsigned scales = slot_at(weights_) + Shape::kScalesAt +
                              warp() * Shape::kStep * Shape::kMostScaleBytes + offset;
#pragma unroll
      for (int i = 0; i < divide_up(Shape::kStep * Shape::kMostScaleBytes, kWarp * 16); ++i) {
        if (lane() * 16 + i * kWarp * 16 < chunks * scale_step_) {
          copy_async(scales + i * kWarp * 16, scales_ + i * kWarp * 16);
        }
      }
      scales_ += Shape::kStep * scale_step_;
    }
    ++n_ahead_;
    step(weights_);
  }

  // True where a unit's tokens are to be copied; finds where this thread's pieces of them lie.
  __device__ bool find_tokens(int end) {
    if (tokens_.left > 0) return true;
    if (!next_segment(tokens_, end)) return false;
    const List& list = list_at(tokens_);
    const int first = first_token(tokens_), n = n_tokens(tokens_);
    x_ = list.x;
    const int input = tokens_.chunk * kChunkInputs + thread_index() % kTokenPieces * 8;
    left_ = list.shape.inputs - input;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int token = (thread_index() + i * kStreamThreads) / kTokenPieces;
      const bool there = token < n;
      const int row = !there || list.gather == nullptr ? first + token : list.gather[first + token];
      from_[i] = there ? row * list.x_stride + input : -1;
    }
    return true;
  }

  __device__ void load_tokens() {
    const int bytes = left_ < 0 ? 0 : left_ < 8 ? left_ * 2 : 16;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (from_[i] >= 0) {
        const int token = (thread_index() + i * kStreamThreads) / kTokenPieces;
        const int place = place_of(token, thread_index() % kTokenPieces);
        copy_async(slot_at(tokens_) + Shape::kTokensAt + token * Shape::kTokenBytes + place * 16,
                   bytes == 0 ? x_ : x_ + from_[i], bytes);
        from_[i] += Shape::kStep * kChunkInputs;
      }
    }
    left_ -= Shape::kStep * kChunkInputs;
    step(tokens_);
  }

  // Where a token's piece of 8 inputs lies, so that load_matrices meets all banks.
  __device__ static int place_of(int token, int piece) { return piece ^ (token % 8); }

  // Adds a chunk of the slot to the sums.
  template <int kChunk>
  __device__ void multiply_chunk(Sums& sums, int n_tiles) {
    const unsigned slot = slot_at(now_);
    const unsigned words =
        slot + (warp() * Shape::kStep + kChunk) * Shape::kChunkBytes + lane() * 16;
    // Row l % 8 of matrix l / 8 of the first token tile and pair of steps; others differ in one
    // bit.
    const unsigned tokens = slot + Shape::kTokensAt + lane() % 8 * Shape::kTokenBytes +
                            place_of(lane(), lane() / 8) * 16;
    // Pairs scale two steps of one tile at a time: fewer registers than all tiles would take.
    constexpr bool kPairs = Shape::kScales == Scales::kPairs;
    float parts[kPairs ? 1 : Shape::kTokenTiles][4] = {};
    float2 low = {1.0f, 0.0f}, high = low;  // scale and zero point of rows g and g + 8
    uint4 loaded;                           // int4: four k16 steps; int8: two
#pragma unroll
    for (int pair = 0; pair < kChunkInputs / 32; ++pair) {  // of k16 steps
      if constexpr (kPairs) load_pairs(low, high, kChunk, pair);
      if (Shape::kBits == Bits::k8 || pair % 2 == 0) {
        load_shared(loaded, words + (Shape::kBits == Bits::k8 ? pair : pair / 2) * 512);
      }
      std::uint32_t a[2][4];
      const Zeros zeros = {{zero_pair<Shape::kBits>(low.y), zero_pair<Shape::kBits>(high.y)}};
      expand<Shape::kBits, kPairs>(a[0], loaded, pair * 2, zeros);
      expand<Shape::kBits, kPairs>(a[1], loaded, pair * 2 + 1, zeros);
#pragma unroll
      for (int i = 0; i < Shape::kTokenTiles; ++i) {
        if (i >= n_tiles) break;
        std::uint32_t b[4];
        load_matrices(b, (tokens ^ (pair * 64)) + kChunk * kChunkInputs * 2 +
                             i * kTokenTile * Shape::kTokenBytes);
        float(&part)[4] = parts[kPairs ? 0 : i];
        mma_bf16(part, a[0], b[0], b[1]);
        mma_bf16(part, a[1], b[2], b[3]);
        if constexpr (kPairs) add_scaled(sums[i], part, low.x, high.x);
      }
    }
    if constexpr (!kPairs) {
      const unsigned scales = slot + Shape::kScalesAt +
                              (warp() * Shape::kStep + kChunk) * Shape::kMostScaleBytes +
                              lane() / 4 * 2;
      std::uint16_t first, second;
      load_shared(first, scales);
      load_shared(second, scales + 8 * 2);
#pragma unroll
      for (int i = 0; i < Shape::kTokenTiles; ++i) {
        add_scaled(sums[i], parts[i], low_bf16(first), low_bf16(second));
      }
    }
  }

  // Scales and zero points of rows g and g + 8 for a pair of k16 steps.
  __device__ void load_pairs(float2& low, float2& high, int chunk, int pair) const {
    const int entries = list_at(now_).shape.entries;
    const int entry = chunk * entries + pair * entries / (kChunkInputs / 32);
    const unsigned at = slot_at(now_) + Shape::kScalesAt +
                        warp() * Shape::kStep * Shape::kMostScaleBytes +
                        (entry * kTileRows + lane() / 4) * 8;
    load_shared(low, at);
    load_shared(high, at + 8 * 8);
  }

  // Adds what was summed without scales, and starts again.
  __device__ static void add_scaled(float4& sum, float (&part)[4], float low, float high) {
    sum.x += low * part[0];
    sum.y += low * part[1];
    sum.z += high * part[2];
    sum.w += high * part[3];
    part[0] = part[1] = part[2] = part[3] = 0.0f;
  }

  // True where the segment's sums are those of all chunks; else another block completes them.
  __device__ bool complete(Sums& sums) {
    const List& list = list_at(now_);
    const int result = now_.task * list.n_row_blocks + now_.row_block;
    const int first_unit = result * list.n_chunks;
    if (now_.chunk == 0 && now_.unit == first_unit + list.n_chunks) return true;
    const int n_units = list.n_tasks * list.n_row_blocks * list.n_chunks;
    const Sharers sharers = {owner_of(first_unit, list.n_blocks, n_units),
                             owner_of(first_unit + list.n_chunks - 1, list.n_blocks, n_units),
                             now_.list};
    return complete_sums(sums, parts_, list.first_result + result, sharers, &header().flag);
  }

  // A lane has rows g and g + 8 of the tile, of two tokens of each token tile.
  __device__ void write(const Sums& sums) {
    const List& list = list_at(now_);
    const int first = first_token(now_), n = n_tokens(now_);
    const int row = (now_.row_block * kStreamWarps + warp()) * kTileRows + lane() / 4;
    const bool norm_follows = list.norm.gain != nullptr;
    const auto gain_of = [&](int r) {
      return norm_follows && r < list.shape.rows ? list.norm.gain[r] : 0.0f;
    };
    const float2 gain = {gain_of(row), gain_of(row + 8)};
    // One read after the other would take as long as the product did.
    constexpr int kAtOnce = Shape::kTokenTiles < 4 ? Shape::kTokenTiles : 4;
#pragma unroll
    for (int from = 0; from < Shape::kTokenTiles; from += kAtOnce) {
      float4 y[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int token = (from + i) * kTokenTile + lane() % 4 * 2;
        const float2 left = load_y(list, row, first, n, token);
        const float2 right = load_y(list, row, first, n, token + 1);
        y[i] = {left.x, right.x, left.y, right.y};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int token = (from + i) * kTokenTile + lane() % 4 * 2;
        const float4 sum = sums[from + i];
        float2 squares = {0.0f, 0.0f};
        if (token < n) {
          squares.x = write_token(list, row, first + token, {sum.x, sum.z}, {y[i].x, y[i].z}, gain);
        }
        if (token + 1 < n) {
          squares.y =
              write_token(list, row, first + token + 1, {sum.y, sum.w}, {y[i].y, y[i].w}, gain);
        }
        if (norm_follows) leave_squares(squares, token);
      }
    }
    if (norm_follows) add_squares(list, first, n);
    header().completed(now_.list, now_.row_block);
  }

  __device__ static std::int64_t row_of_y(const List& list, int token) {
    return list.scatter == nullptr ? token : list.scatter[token];
  }

  // What is added to: rows `row` and `row` + 8 of a token; else zeros.
  __device__ static float2 load_y(const List& list, int row, int first, int n, int token) {
    float2 y = {0.0f, 0.0f};
    if (list.output != Output::kAdd || token >= n) return y;
    const float* at =
        static_cast<const float*>(list.y) + row_of_y(list, first + token) * list.y_stride + row;
    if (row < list.shape.rows) y.x = load_shared_by_blocks(at);
    if (row + 8 < list.shape.rows) y.y = load_shared_by_blocks(at + 8);
    return y;
  }

  // The sums of rows `row` and `row` + 8 and what they are added to. Returns the squares of what a
  // norm follows.
  __device__ static float write_token(const List& list, int row, int token, float2 sum, float2 y,
                                      float2 gain) {
    const std::int64_t y_row = row_of_y(list, token);
    const std::int64_t at = y_row * list.y_stride;
    const float factor = list.factors == nullptr ? 1.0f : list.factors[token];
    if (list.output == Output::kSwiGlu) {
      const int channel = row / kTileRows * (kTileRows / 2) + row % kTileRows;
      if (channel < list.shape.rows / 2) {
        static_cast<std::uint16_t*>(list.y)[at + channel] =
            to_bf16(swiglu(factor * sum.x, factor * sum.y));
      }
      return 0.0f;
    }
    float squares = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8;
      if (r >= list.shape.rows) break;
      const float value = factor * (half == 0 ? sum.x : sum.y);
      if (list.output == Output::kStoreBf16) {
        static_cast<std::uint16_t*>(list.y)[at + r] = to_bf16(value);
        continue;
      }
      const float result = (half == 0 ? y.x : y.y) + value;  // kStore: 0 + value
      static_cast<float*>(list.y)[at + r] = result;
      if (list.norm.gain == nullptr) continue;
      list.norm.h[y_row * list.norm.h_stride + r] = to_bf16((half == 0 ? gain.x : gain.y) * result);
      squares += result * result;
    }
    return squares;
  }

  // Of this warp's rows, for add_squares().
  __device__ static void leave_squares(float2 squares, int token) {
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) {
      squares.x += shuffle_xor(squares.x, mask);
      squares.y += shuffle_xor(squares.y, mask);
    }
    if (lane() >= 4) return;
    header().squares[warp()][token] = squares.x;
    header().squares[warp()][token + 1] = squares.y;
  }

  // Of all rows of the block. The block meets inside, and again before it leaves others.
  __device__ void add_squares(const List& list, int first, int n) const {
    sync_block();
    if (thread_index() >= n) return;
    float sum = 0.0f;
    for (const auto& of_warp : header().squares) sum += of_warp[thread_index()];
    list.norm.squares[row_of_y(list, first + thread_index()) * n_norm_parts(list.shape.rows) +
                      now_.row_block] = sum;
  }

  Parts parts_;
  unsigned ring_;  // an address of shared memory
  Cursor weights_, tokens_, now_;
  int n_ahead_ = 0;                   // units whose weights were asked for and that are not done
  const std::byte* tiles_ = nullptr;  // this lane's part of the next unit's; null past the last row
  const std::byte* scales_ = nullptr;
  int scale_step_ = 0;
  const std::uint16_t* x_ = nullptr;
  int from_[kPieces];  // in x_, of this thread's pieces of the next unit's tokens; -1: none
  int left_ = 0;       // inputs from the pieces on
};

}  // namespace camelid::cuda
