// What blocks of one launch need to work on a result together: a barrier of the whole grid, and
// sums of parts that are formed in the same order whoever comes last. It knows nothing of matrices.
#pragma once

#include "device/launch.cuh"
#include "device/ptx.cuh"

namespace camelid::cuda {

// Waits until every block of the grid has come here; what they wrote before is then seen by
// load_shared_by_blocks and copy_async. All blocks must run at once (Launch::together). The counter
// starts as 0 and may be used again: its top bit turns over each time.
__device__ inline void sync_grid(unsigned* counter) {
  sync_block();
  if (thread_index() == 0) {
    fence_blocks();
    constexpr unsigned kTop = 0x80000000u;
    const unsigned others = static_cast<unsigned>(grid_size()) - 1;
    const unsigned before = add_atomic(counter, block_index() == 0 ? kTop - others : 1u);
    while (((before ^ load_acquire(counter)) & kTop) == 0) {
    }
    fence_blocks();
  }
  sync_block();
}

// Where blocks leave sums that another block completes. A block leaves at most two for a list of
// work: of what it began in the middle, and of what it left unfinished. Two lists may be under way.
constexpr int kPartPlaces = 4;
struct Parts {
  float4* sums = nullptr;        // [block][kPartPlaces][n_sums][thread]
  unsigned* arrivals = nullptr;  // one for each result, all 0 between launches
};

// The blocks that hold a part of one result. The first has it from its start.
struct Sharers {
  int first_block = 0;
  int last_block = 0;
  int list = 0;  // which of the lists under way
};

__device__ inline float4* part_of(const Parts& parts, int n_sums, const Sharers& sharers,
                                  int block) {
  const int place = sharers.list % 2 * 2 + (block == sharers.first_block ? 1 : 0);
  return parts.sums + std::int64_t{block * kPartPlaces + place} * n_sums * block_size() +
         thread_index();
}

// Adds up what the sharers of a result hold, in the order of blocks. True in the block that came
// last: its `sums` are then complete. `flag` is a word of shared memory of the block's.
template <int kSums>
__device__ inline bool complete_sums(float4 (&sums)[kSums], const Parts& parts, int result,
                                     const Sharers& sharers, unsigned* flag) {
  float4* mine = part_of(parts, kSums, sharers, block_index());
#pragma unroll
  for (int i = 0; i < kSums; ++i) mine[i * block_size()] = sums[i];
  sync_block();
  if (thread_index() == 0) {
    fence_blocks();  // what the whole block wrote: it met before
    *flag = add_atomic(parts.arrivals + result, 1u);
    fence_blocks();
  }
  sync_block();
  const auto others = static_cast<unsigned>(sharers.last_block - sharers.first_block);
  if (*flag != others) return false;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
  for (int block = sharers.first_block; block <= sharers.last_block; ++block) {
    const float4* part = part_of(parts, kSums, sharers, block);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float4 other = load_shared_by_blocks(part + i * block_size());
      sums[i].x += other.x;
      sums[i].y += other.y;
      sums[i].z += other.z;
      sums[i].w += other.w;
    }
  }
  if (thread_index() == 0) parts.arrivals[result] = 0;
  return true;
}

}  // namespace camelid::cuda
