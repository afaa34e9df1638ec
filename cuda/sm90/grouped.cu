// Grouped products of many rows on Hopper: int4 and int8 weights times gathered bf16 rows by
// wgmma, with the scales in float32. ops/grouped.h says what is computed and in which order.

// ---- layout ----
//
//   output tile   256 rows (weights) x 128 columns (tokens); one block for each multiprocessor
//
//                     tokens 0..127
//      rows   0- 63   consumer 0, sums[0]     A consumer warpgroup has two subtiles of 64 rows; its
//      rows  64-127   consumer 0, sums[1]     warp w has row tile 4 s + w of them, s the subtile.
//      rows 128-191   consumer 1, sums[0]
//      rows 192-255   consumer 1, sums[1]
//
//   slot of the   x        2 x [128 tokens][64 inputs] bf16, swizzled as describe_rows() says
//   ring: a chunk weights  [2 k tiles][16 row tiles][tile], as they lie in memory
//   of 128 inputs scales   [16 row tiles][1 (bf16) or 4 (pairs) entries][16 rows]
//
// The producer warpgroup copies, 16 bytes at a time, which gathers rows for free; every consumer
// reads its own lane's piece of the weights, makes them bf16 in registers and multiplies by all
// tokens.
//
// Why 256 x 128 and not 128 x 256: weights are a quarter of x's size. In the 1024 cycles of tensor
// cores that 64 inputs take either way, 256 x 128 brings 16 + 8 KB to an SM (int4), 128 x 256
// brings 32 + 4 KB: 24 or 36 bytes per cycle, where L2 gives each of 132 SMs at most 39 (5120 in
// all). And experts waste fewer columns: a tile of at most 64 tokens takes half the time.
//
// Shared memory, bytes per cycle of 128 at full speed: products read x 64, copies write 24,
// weights are read 8: 96 (int8: 112).
//
// Registers of a consumer: 128 sums, 64 products of the chunk, 3 x 4 of a, 4 of packed weights,
// and about 20 of addresses: 224. So scales can wait for float32: each subtile's chunk is summed
// on its own (8 products of 64 x 128 x 16) and then added, scaled. That keeps weights exact in
// bf16; scaled before, each would be rounded, with errors of 2^-9 that no sum takes back. A second
// set of products does not fit, so a warpgroup's products pause there; the other's go on.
//
// Issue slots of a scheduler (2 consumer warps, 1 producer), per 128 inputs = 2048 cycles:
//   expand 2 warps x 64 words of a x 2.75 = 352; scale 2 x 128 = 256; wgmma, waits, loads < 150;
//   producer < 60: together 40 %, so that products are what is waited for. (ptxas 13.0: the loop
//   has 400 instructions for 16 products; no spills.)
// A warpgroup pauses about 200 cycles for each 512 of products; the other's 512 cover that.

#include "sm90/grouped.h"

#include <algorithm>

#include "device/dequant.cuh"
#include "ops/grouped_finish.cuh"
#include "ops/instances.h"
#include "sm90/hopper.cuh"

namespace camelid::cuda::sm90 {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kSubtiles = 2;   // of 64 rows, for each of them
constexpr int kSubtileTiles = 4;
constexpr int kBlockTiles = kConsumers * kSubtiles * kSubtileTiles;  // row tiles: 256 rows
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
// More, and the last to take some would wait forever.
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              (kConsumers + 1) * registers_at_start(kThreads));
constexpr int kRowBytes = kTileInputs * 2;
constexpr int kTokensBytes = kTileTokens * kRowBytes;  // of 64 inputs
constexpr int kChunkSteps = kChunkInputs / kStepInputs;
constexpr int kMostShared = 227 * 1024;

// What lies where in shared memory: the ring, and what consumers need to know of two jobs, since
// the producer is ahead of them.
template <Bits kBits, Scales kScales>
struct Ring {
  // Pairs as if each had 32 inputs, the smallest group, whatever memory has.
  static constexpr int kEntries = kScales == Scales::kBf16 ? 1 : 4;
  static constexpr int kTileScaleBytes = kEntries * kTileRows * scale_bytes(kScales);
  static constexpr int kWeights = kChunkTiles * kTokensBytes;  // offset
  static constexpr int kKTileBytes = kBlockTiles * tile_bytes(kBits);
  static constexpr int kScalesAt = kWeights + kChunkTiles * kKTileBytes;
  static constexpr int kSlotBytes =
      divide_up(kScalesAt + kBlockTiles * kTileScaleBytes, 1024) * 1024;
  static constexpr int kJobs = 2;
  static constexpr int kRest = kJobs * static_cast<int>(sizeof(VisitRows)) + 2 * (4 + kJobs) * 8;
  static constexpr int kSlots = std::min((kMostShared - kRest) / kSlotBytes, 4);
  static constexpr int kVisits = kSlots * kSlotBytes;
  static constexpr int kBarriers = kVisits + kJobs * static_cast<int>(sizeof(VisitRows));
  static constexpr int kBytes = kBarriers + 2 * (kSlots + kJobs) * 8;
  static_assert(kSlots >= 3);

  __device__ static std::byte* slot(int i) { return shared_memory() + i * kSlotBytes; }
  __device__ static VisitRows& job(int i) {
    return reinterpret_cast<VisitRows*>(shared_memory() + kVisits)[i];
  }
  __device__ static Barrier* barrier(int i) {
    return reinterpret_cast<Barrier*>(shared_memory() + kBarriers) + i;
  }
  __device__ static Barrier* full(int i) { return barrier(i); }            // all copies arrived
  __device__ static Barrier* empty(int i) { return barrier(kSlots + i); }  // nobody reads it
  __device__ static Barrier* found(int i) { return barrier(2 * kSlots + i); }
  __device__ static Barrier* done(int i) { return barrier(2 * kSlots + kJobs + i); }

  __device__ static void init() {
    for (int i = 0; i < kSlots; ++i) {
      init_barrier(full(i), kWarpgroup);                        // producer threads
      init_barrier(empty(i), kConsumers * kWarpgroup / kWarp);  // consumer warps
    }
    for (int i = 0; i < kJobs; ++i) {
      init_barrier(found(i), kWarpgroup);
      init_barrier(done(i), kConsumers * kWarpgroup / kWarp);
    }
  }
};

// How far a thread is in a ring of kPlaces: one number, since registers are short.
template <int kPlaces>
struct Turn {
  unsigned count = 0;
  __device__ int place() const { return static_cast<int>(count % kPlaces); }
  __device__ unsigned parity() const { return count / kPlaces & 1; }  // of the place's phase
};

// ---- kernel: the producer ----

// One thread's share of a slot's rows: the same piece of 16 bytes of eight tokens, of each k tile.
struct TokenCopies {
  static constexpr int kEach = kTileTokens * 8 / kWarpgroup;
  static constexpr int kApart = kWarpgroup / 8;  // tokens from one to the next
  std::uint32_t row[kEach];                      // where it starts in x, in 16 bytes
  std::uint32_t is;  // bit i: there is an i-th one; the others become zeros. kHalf: or nothing
  static constexpr std::uint32_t kHalf = 1u << kEach;  // where they are of the second half

  __device__ void find(const GroupedProduct& p, const TokenTile& tile) {
    is = tile.n <= kTileTokens / 2 ? kHalf : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = thread_index() / 8 + i * kApart;
      const int visit = tile.first + min(token, tile.n - 1);
      const std::int64_t from = p.x_rows == nullptr ? visit : p.x_rows[visit];
      row[i] = static_cast<std::uint32_t>(from * (p.x_stride / 8));
      is |= (token < tile.n ? 1u : 0u) << i;
    }
  }
  __device__ void start(std::byte* slot, const GroupedProduct& p, int chunk) const {
    const int thread = thread_index();
    const int piece = thread % 8, in_eight = thread / 8 % 8;
    std::byte* to = slot + thread / 8 * kRowBytes + (piece ^ in_eight) * 16;
#pragma unroll 1
    for (int tile = 0; tile < kChunkTiles; ++tile) {
      const int input = chunk * kChunkInputs + tile * kTileInputs + piece * 8;
      const int n_bytes = max(0, min(16, (p.shape.inputs - input) * 2));
      const std::uint16_t* from = n_bytes > 0 ? p.x + input : p.x;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i == kEach / 2 && (is & kHalf) != 0) break;
        copy_async(to + i * kApart * kRowBytes, from + std::int64_t{row[i]} * 8,
                   (is >> i & 1) != 0 ? n_bytes : 0);
      }
      to += kTokensBytes;
    }
  }
};

// Copies kPieces x n_tiles pieces of 16 bytes, by all threads, to neighbouring places. `from`:
// this thread's piece of row tile 0; the next row tile's is `apart` further. Row tiles past the
// matrix, from n_tiles on, become zeros; their sums go nowhere.
template <int kPieces>
__device__ __forceinline__ void copy_row_tiles(std::byte* to, const std::byte* from, int apart,
                                               int n_tiles) {
  constexpr int kAll = kBlockTiles * kPieces;
  const int thread = thread_index();
  to += thread * 16;
#pragma unroll 4
  for (int first = 0; first < kAll; first += kWarpgroup) {
    if (kAll < kWarpgroup && thread >= kAll) break;
    const int row_tile = thread / kPieces + first / kPieces;
    copy_async(to + first * 16, from + row_tile * apart, row_tile < n_tiles ? 16 : 0);
  }
}

template <Bits kBits, Scales kScales>
__device__ void copy_weights(std::byte* slot, const TileShape& shape, const std::byte* tiles,
                             const std::byte* scales, int n_tiles) {
  using R = Ring<kBits, kScales>;
  constexpr int kTilePieces = tile_bytes(kBits) / 16;
  const int thread = thread_index();
#pragma unroll 1
  for (int tile = 0; tile < kChunkTiles; ++tile) {
    copy_row_tiles<kTilePieces>(slot + R::kWeights + tile * R::kKTileBytes,
                                tiles + tile * tile_bytes(kBits) + thread % kTilePieces * 16,
                                static_cast<int>(shape.row_tile_bytes()), n_tiles);
  }
  constexpr int kScalePieces = R::kTileScaleBytes / 16;
  constexpr int kEntryPieces = kScalePieces / R::kEntries;
  const int entry = thread % kScalePieces / kEntryPieces * shape.entries / R::kEntries;
  const int piece = entry * kEntryPieces + thread % kEntryPieces;
  copy_row_tiles<kScalePieces>(slot + R::kScalesAt, scales + piece * 16,
                               static_cast<int>(shape.row_tile_scale_bytes()), n_tiles);
}

// Tells consumers of a job; no tokens: that there is none any more.
__device__ inline void tell_job(VisitRows& visits, const GroupedProduct& p, const TokenTile& tile,
                                int row_block) {
  find_visit(visits, p, tile, thread_index());
  if (thread_index() > 0) return;
  visits.n = tile.n;
  visits.first_row_tile = row_block * kBlockTiles;
}

template <Bits kBits, Scales kScales>
__device__ void produce_job(const GroupedProduct& p, const TokenTile& tile, int row_block,
                            Turn<Ring<kBits, kScales>::kSlots>& turn) {
  using R = Ring<kBits, kScales>;
  TokenCopies tokens;
  tokens.find(p, tile);
  const int first_tile = row_block * kBlockTiles;
  const TilePointers w = p.groups[tile.group];
  const std::byte* tiles = w.tiles + first_tile * p.shape.row_tile_bytes();
  const std::byte* scales = w.scales + first_tile * p.shape.row_tile_scale_bytes();
  for (int chunk = 0; chunk < p.shape.n_chunks(); ++chunk) {
    wait_barrier(R::empty(turn.place()), turn.parity() ^ 1);
    std::byte* slot = R::slot(turn.place());
    copy_weights<kBits, kScales>(slot, p.shape, tiles, scales, p.shape.n_row_tiles() - first_tile);
    tokens.start(slot, p, chunk);
    arrive_when_copied(R::full(turn.place()));
    tiles += kChunkTiles * tile_bytes(kBits);
    scales += p.shape.chunk_scale_bytes();
    ++turn.count;
  }
}

template <Bits kBits, Scales kScales>
__device__ void produce(const GroupedProduct& p) {
  using R = Ring<kBits, kScales>;
  const int n_row_blocks = divide_up(p.shape.n_row_tiles(), kBlockTiles);
  Turn<R::kSlots> turn;
  Turn<R::kJobs> job;
  bool is = true;
  for (int number = block_index(); is; number += grid_size()) {
    TokenTile tile;
    int row_block = 0;
    is = find_job(p, number, n_row_blocks, tile, row_block);
    if (!is) tile.n = 0;
    wait_barrier(R::done(job.place()), job.parity() ^ 1);
    tell_job(R::job(job.place()), p, tile, row_block);
    arrive(R::found(job.place()));
    ++job.count;
    if (is) produce_job<kBits, kScales>(p, tile, row_block, turn);
  }
}

// ---- kernel: a consumer ----

__device__ inline float scale_of_row(const std::byte* scales, int row) {
  const auto bits = reinterpret_cast<const std::uint16_t*>(scales)[row];
  return low_bf16(bits);
}

// What a slot holds as memory does, of rows g and g + 8 from input `step` * 16 of the chunk on.
struct RowScales {
  float of[2];
};
template <Scales kScales>
__device__ __forceinline__ RowScales read_scales(const std::byte* scales, int step) {
  const int g = thread_index() % kWarp / 4;
  if constexpr (kScales == Scales::kBf16) {
    return {scale_of_row(scales, g), scale_of_row(scales, g + 8)};
  } else {
    const auto* pairs = reinterpret_cast<const float2*>(scales) + step / 2 * kTileRows;
    return {pairs[g].x, pairs[g + 8].x};
  }
}
template <Bits kBits>
__device__ __forceinline__ Zeros read_zeros(const std::byte* scales, int step) {
  const int g = thread_index() % kWarp / 4;
  const auto* pairs = reinterpret_cast<const float2*>(scales) + step / 2 * kTileRows;
  return {zero_pair<kBits>(pairs[g].y), zero_pair<kBits>(pairs[g + 8].y)};
}

// total += scale * products, those of row g and of row g + 8.
template <int kValues>
__device__ __forceinline__ void add_scaled(float (&total)[kValues],
                                           const float (&products)[kValues],
                                           const RowScales& scale) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) total[i] = total[i] + scale.of[i / 2 % 2] * products[i];
}

// One subtile's chunk: total += scales * (weights x rows). `weights` and `scales`: of this
// warp's row tile, in the slot.
template <Bits kBits, Scales kScales, int kColumns>
__device__ __forceinline__ void multiply_chunk(float (&total)[kColumns / 2], Rows rows,
                                               const std::byte* weights, const std::byte* scales) {
  constexpr int kInFlight = kScales == Scales::kBf16 ? 3 : 2;
  constexpr bool kZeros = kScales == Scales::kPairs;
  // Groups may be as small as 32 inputs; larger ones are added in pieces too.
  constexpr int kScaleSteps = kZeros ? 2 : kChunkSteps;
  constexpr int kPieceSteps = steps_of_piece(kBits);
  const int lane = thread_index() % kWarp;
  const auto piece_at = [&](int step) {
    const int tile = step * kStepInputs / kTileInputs;
    const int in_tile = step % (kTileInputs / kStepInputs) / kPieceSteps;
    return *reinterpret_cast<const uint4*>(weights + tile * Ring<kBits, kScales>::kKTileBytes +
                                           in_tile * 512 + lane * 16);
  };
  float products[kColumns / 2];
  std::uint32_t a[kInFlight][4];
  uint4 piece = piece_at(0);
  Zeros zeros{};
#pragma unroll
  for (int step = 0; step < kChunkSteps; ++step) {
    const int since = step % kScaleSteps;
    if (kZeros && since == 0) zeros = read_zeros<kBits>(scales, step);
    if (since >= kInFlight) wait_products<kInFlight - 1>();
    expand<kBits, kZeros>(a[step % kInFlight], piece, step, zeros);
    const bool read_on = (step + 1) % kPieceSteps == 0 && step + 1 < kChunkSteps;
    if (read_on) piece = piece_at(step + 1);  // arrives while the product runs
    start_products();
    const int n_bytes =
        step * kStepInputs / kTileInputs * kTokensBytes + step * kStepInputs % kTileInputs * 2;
    multiply_async<kColumns>(products, a[step % kInFlight], advance(rows, n_bytes), since != 0);
    commit_products();
    if (since == kScaleSteps - 1) {
      const RowScales scale = read_scales<kScales>(scales, step);
      wait_products<0>();
      hold(products);
      add_scaled(total, products, scale);
    }
  }
}

// One output tile, of at most kColumns tokens.
template <Bits kBits, Scales kScales, int kColumns>
__device__ __forceinline__ void consume_job(const GroupedProduct& p, const VisitRows& visits,
                                            Turn<Ring<kBits, kScales>::kSlots>& turn) {
  using R = Ring<kBits, kScales>;
  const int consumer = thread_index() / kWarpgroup - 1;
  const int warp = thread_index() % kWarpgroup / kWarp;
  const int my_tile = consumer * kSubtiles * kSubtileTiles + warp;  // of the block; of subtile 0
  const int n_chunks = p.shape.n_chunks();
  float sums[kSubtiles][kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    sums[0][i] = 0.0f;
    sums[1][i] = 0.0f;
  }
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    const std::byte* slot = R::slot(turn.place());
    const std::byte* weights = slot + R::kWeights + my_tile * tile_bytes(kBits);
    const std::byte* scales = slot + R::kScalesAt + my_tile * R::kTileScaleBytes;
    wait_barrier(R::full(turn.place()), turn.parity());
    show_to_products();  // what copies wrote
#pragma unroll
    for (int s = 0; s < kSubtiles; ++s) {
      multiply_chunk<kBits, kScales, kColumns>(sums[s], describe_rows(slot),
                                               weights + s * kSubtileTiles * tile_bytes(kBits),
                                               scales + s * kSubtileTiles * R::kTileScaleBytes);
    }
    sync_warp();
    if (thread_index() % kWarp == 0) arrive(R::empty(turn.place()));
    ++turn.count;
  }
#pragma unroll
  for (int s = 0; s < kSubtiles; ++s) {
    finish(p, visits, 0, visits.first_row_tile + my_tile + s * kSubtileTiles, sums[s]);
  }
}

template <Bits kBits, Scales kScales>
__device__ void consume(const GroupedProduct& p) {
  using R = Ring<kBits, kScales>;
  Turn<R::kSlots> turn;
  for (Turn<R::kJobs> job;; ++job.count) {
    const VisitRows& visits = R::job(job.place());
    wait_barrier(R::found(job.place()), job.parity());
    if (visits.n == 0) return;
    if (visits.n <= kTileTokens / 2) {
      consume_job<kBits, kScales, kTileTokens / 2>(p, visits, turn);
    } else {
      consume_job<kBits, kScales, kTileTokens>(p, visits, turn);
    }
    sync_warp();
    if (thread_index() % kWarp == 0) arrive(R::done(job.place()));
  }
}

// y = w x for all visits of p; ops/grouped.h. One block of three warpgroups for each
// multiprocessor, persistent. Bound by the tensor cores from about 64 tokens for each expert on.
template <Bits kBits, Scales kScales>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_many_kernel(const __grid_constant__ GroupedProduct p) {
  if (thread_index() == 0) Ring<kBits, kScales>::init();
  sync_block();
  if (thread_index() < kWarpgroup) {
    give_registers<kProducerRegisters>();
    produce<kBits, kScales>(p);
  } else {
    take_registers<kConsumerRegisters>();
    consume<kBits, kScales>(p);
  }
}

// ---- choose and launch ----

template <Bits kBits, Scales kScales>
void launch_kernel(const GroupedProduct& p, const Launch& sized, cudaStream_t stream) {
  Launch how = sized;
  how.shared_bytes = Ring<kBits, kScales>::kBytes;
  how.stream = stream;
  launch("grouped_many", grouped_many_kernel<kBits, kScales>, how, p);
}

}  // namespace

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

}  // namespace camelid::cuda::sm90
