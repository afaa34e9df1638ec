// A row of logits as top_logits looks at it: groups, slices and parts, keys that order logits, and
// what the last block of a row shares. top_logits.cu says what these are for.
#pragma once

#include <limits>

#include "device/row.cuh"
#include "layout/tiles.h"
#include "ops/top_logits.h"

namespace camelid::cuda::top {

using Key = unsigned long long;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHalf = kWarp / 2;
constexpr int kChunk = kHalf * kFour;  // logits that a half-warp reads at once
constexpr int kSliceGroups = kThreads / kHalf;
constexpr int kFoursOfMaxima = 2;
constexpr int kMostGroups = kThreads * kFoursOfMaxima * kFour;
constexpr int kMostVocab = 1 << 30;  // columns past the end stay below 2^31

constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr int kMostKeys = 256;  // candidates that are counted against each other
constexpr int kAtOnce = 4;      // reads of chosen groups that are under way
constexpr int kMostSlices = 8;  // of a block
constexpr int kNone = 0x7fffffff;
constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
static_assert(kThreads / 4 == kMostTop, "load_parts: the threads are 128 sets of four");
static_assert(kMostKeys >= kMostTop && kMostKeys * 2 == kThreads, "rank: two threads for each");

struct Shape {
  std::int64_t stride;
  std::int32_t n_rows, vocab;
  std::int32_t group;  // logits of a group: kChunk << chunk_shift
  std::int32_t chunk_shift;
  std::int32_t n_groups;  // of a row
  std::int32_t n_slices;  // of a row
  std::int32_t slices;    // of a block
  std::int32_t n_blocks;  // of a row
};

// What the blocks of a row leave in its scratch.
struct Parts {
  float* largest;  // [n_slices * kSliceGroups]
  float* sums;     // [n_slices * kWarps]; NaN where a logit is not finite
  float* scaled;   // the same of the differences times the row's factor
};
constexpr int kSliceBytes = (kSliceGroups + 2 * kWarps) * 4;

__device__ inline Parts parts_of(const Shape& shape, std::byte* scratch, int row) {
  auto* largest =
      reinterpret_cast<float*>(scratch + std::int64_t{row} * shape.n_slices * kSliceBytes);
  float* sums = largest + shape.n_slices * kSliceGroups;
  return {largest, sums, sums + shape.n_slices * kWarps};
}

// ---- keys ----

// -0 is 0: ids decide between them.
__device__ inline Key key_of(float logit, int id) {
  const unsigned bits = __float_as_uint(logit + 0.0f);
  const unsigned ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return Key{ordered} << 32 | ~static_cast<unsigned>(id);
}
__device__ inline float logit_of(Key key) {
  const auto ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}
__device__ inline int id_of(Key key) { return static_cast<int>(~static_cast<unsigned>(key)); }
// The least key of a logit as good as the key's.
__device__ inline Key least_of_logit(Key key) { return key >> 32 << 32; }

__device__ inline bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

template <typename T>
__device__ inline T largest_of_lanes(T value, int lanes) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = max(value, shuffle_xor(value, mask));
  return value;
}

// ---- what the last block shares ----

struct Merge {
  unsigned bins[kBins];
  Key keys[kMostKeys];
  int groups[kMostKeys];
  unsigned better[kMostKeys];  // by the second half of the threads
  unsigned largest[kWarps], least[kWarps];
  int bad[kWarps];
  unsigned counts[kWarps];
  float sums[kWarps], scaled[kWarps];
  unsigned n_groups, n_keys;
  unsigned bin, before, after;  // see find_bin
  unsigned arrived;
  int drawn_part;      // see draw
  float left_in_part;  // of what draw is to come to
};

// The sums over lower lanes and this one.
template <typename T>
__device__ inline T running_sum(T value) {
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int far = 1; far < kWarp; far *= 2) {
    const T lower = shuffle(value, lane - far);
    if (lane >= far) value += lower;
  }
  return value;
}

}  // namespace camelid::cuda::top
