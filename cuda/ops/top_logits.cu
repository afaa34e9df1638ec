// The best logits of each row. top_logits.h says what the results are.

// ---- layout ----
//
//   row     | group 0 | group 1 | ..    up to 4096 groups of 64 logits (of 128, 256.. where the
//                                       vocabulary has more than 262,144)
//   slice   32 neighbouring groups, a half-warp for each: its largest logit, and for each warp the
//           sum of exp(logit - the largest of its two groups)
//   block   one slice of a row, or up to eight where there are many rows
//   merge   the row's last block to come. Of the groups those that may hold one of the best 128:
//           as many at least have a largest logit as good as theirs. Of their logits, read once
//           more, those as good; of these the best 128 by counting for each how many are better.
//
// No block selects anything before the last, and that looks at about 140 groups and logits: a
// histogram of the groups' largest, between bounds known from maxima of maxima, finds where the
// best end. One row is bound by latency: 800 KB of L2 or DRAM by all multiprocessors, then two
// reads and about ten meetings of one block.
//
// Everything is compared as 64-bit keys, no two of them equal: the logit's bits so that integers
// order them, then its id's complement. So there are no ties, and the order in which threads find
// something has no effect on the result. Which block comes last has none either.
//
// A token drawn from the whole row is found the same way from above: by running sums over the
// warps' parts, then over the logits of one part.

#include "ops/top_logits.h"

#include <algorithm>

#include "ops/draw.cuh"

namespace camelid::cuda {
namespace {

using namespace top;

// ---- every block: its groups ----

// What a thread found in its share of a group; sums are relative to the largest.
struct Found {
  float largest = kNever;
  float sum = 0.0f;
  float scaled = 0.0f;
};

__device__ void add(Found& found, const Four& v, int n, float factor) {
  float largest = found.largest;
  bool bad = false;
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    if (j < n) largest = max(largest, v.at[j]);
  }
  float sum = found.sum * exp_fast(found.largest - largest);
  float scaled = found.scaled * exp_fast((found.largest - largest) * factor);
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    if (j >= n) continue;
    sum += exp_fast(v.at[j] - largest);
    scaled += exp_fast((v.at[j] - largest) * factor);
    bad |= !is_finite(v.at[j]);
  }
  found = {largest, bad ? kNan : sum, scaled};
}

__device__ int column_of(const Shape& shape, int group) {
  return group * shape.group + thread_index() % kHalf * kFour;
}

// One slice, of which each thread has loaded its first four.
__device__ void sum_up(const Shape& shape, const Line& logits, const Parts& parts, int slice,
                       const Four& four, float factor) {
  const int group = slice * kSliceGroups + thread_index() / kHalf;
  const int column = column_of(shape, group);
  Found found;
  if (column < shape.vocab) add(found, four, shape.vocab - column, factor);
  for (int i = kChunk; i < shape.group && column + i < shape.vocab; i += kChunk) {
    add(found, load_four(logits, column + i), shape.vocab - column - i, factor);
  }
  const float of_group = largest_of_lanes(found.largest, kHalf);
  const float of_warp = max(of_group, shuffle_xor(of_group, kHalf));
  // A thread without logits has the sum 0, and no difference from the largest.
  const bool none = found.sum == 0.0f;
  const float apart = none ? 0.0f : found.largest - of_warp;
  const float sum = sum_of_warp(none ? 0.0f : found.sum * exp_fast(apart));
  const float scaled = sum_of_warp(none ? 0.0f : found.scaled * exp_fast(apart * factor));
  if (thread_index() % kHalf == 0) parts.largest[group] = of_group;
  if (thread_index() % kWarp != 0) return;
  parts.sums[group / 2] = sum;
  parts.scaled[group / 2] = scaled;
}

// The block's slices from `first` on. The next is read before one is summed up.
__device__ void sum_up(const Shape& shape, const Line& logits, const Parts& parts, int first,
                       float factor) {
  const int last = min(first + shape.slices, shape.n_slices);
  const auto load = [&](int slice) {
    const int group = slice * kSliceGroups + thread_index() / kHalf;
    return load_four(logits, slice < last ? column_of(shape, group) : shape.vocab);
  };
  Four next = load(first);
#pragma unroll 1
  for (int slice = first; slice < last; ++slice) {
    const Four four = next;
    next = load(slice + 1);
    sum_up(shape, logits, parts, slice, four, factor);
  }
}

// ---- the last block ----

// The first bin up to which there are `wanted` at least (else the last), how many there are before
// it and up to it; leaves the bins empty. Each thread looks at four.
__device__ void find_bin(Merge& merge, unsigned wanted) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  auto* four = reinterpret_cast<uint4*>(merge.bins) + thread_index();
  const uint4 n = *four;
  *four = uint4{0, 0, 0, 0};
  const unsigned counts[kFour] = {n.x, n.y, n.z, n.w};
  const unsigned all = n.x + n.y + n.z + n.w;
  unsigned before = running_sum(all) - all;
  if (lane == kWarp - 1) merge.counts[warp] = before + all;
  sync_block();
  unsigned lower = lane < warp ? merge.counts[lane] : 0;
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) lower += shuffle_xor(lower, mask);
  before += lower;
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    const bool is_last = thread_index() == kThreads - 1 && j == kFour - 1;
    const unsigned after = before + counts[j];
    if (before < wanted && (wanted <= after || is_last)) {
      merge.bin = static_cast<unsigned>(thread_index() * kFour + j);
      merge.before = before;
      merge.after = after;
    }
    before = after;
  }
  sync_block();
}

// The least shift that leaves a difference below kBins.
__device__ int shift_of(Key difference) {
  int shift = 0;
  if (difference >> 32 != 0) shift = 32 - kBinBits + 1;
  while (difference >> shift >= kBins) ++shift;
  return shift;
}

// A key down to which there are kMostTop at least and `most` at most, or all from `low` on where
// they are fewer. each(visit) calls visit(key), in all threads together for all keys there are.
// From `low` on there are kMostTop at least (or all), and above `high` none. Bins are empty before
// and after. Keys differ, so the bins of a later round hold fewer, in the end one each.
template <class Each>
__device__ Key find_floor(Merge& merge, Key low, Key high, unsigned most, const Each& each) {
  unsigned above = 0;  // keys that were found to be better
  for (;;) {
    const int shift = shift_of(high - low);
    each([&](Key key) {
      if (low <= key && key <= high) add_atomic(merge.bins + ((high - key) >> shift), 1u);
    });
    sync_block();
    find_bin(merge, kMostTop - above);
    const Key first = Key{merge.bin} << shift;  // of the bin, counted from `high` down
    const Key last = first + ((Key{1} << shift) - 1);
    const Key floor = high - low <= last ? low : high - last;
    if (above + merge.after <= most || above + merge.after < kMostTop) return floor;
    above += merge.before;
    low = floor;
    high -= first;
  }
}

// What a thread knows of a row's parts: of the groups 4t.. and 2048 + 4t...
struct Mine {
  Four largest[kFoursOfMaxima];

  __device__ static int group(int i, int j) { return (i * kThreads + thread_index()) * kFour + j; }
  template <class Visit>
  __device__ void each(int n_groups, const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kFoursOfMaxima; ++i) {
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        if (group(i, j) < n_groups) visit(key_of(largest[i].at[j], group(i, j)));
      }
    }
  }
};

// What all threads know of the row then.
struct Bounds {
  unsigned low, high;  // ordered bits: of a logit that is among the best, or 0; of the best
  int bad;             // the first warp's part with a logit that is not finite
};

// Loads the parts. 128 sets of four threads' groups have a largest each, so the least of these has
// 128 groups that are as good, if no set is empty.
__device__ Bounds load_parts(Merge& merge, const Shape& shape, const Parts& parts, Mine& mine,
                             Four& sums) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
#pragma unroll
  for (int i = 0; i < kFoursOfMaxima; ++i) {
    const int group = Mine::group(i, 0);
    mine.largest[i] = Four{};
    if (group < shape.n_slices * kSliceGroups) {
      mine.largest[i] =
          four_of(load_shared_by_blocks(reinterpret_cast<const float4*>(parts.largest + group)));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int part = group / 2 + j;
      sums.at[2 * i + j] =
          part < shape.n_slices * kWarps ? load_shared_by_blocks(parts.sums + part) : 0.0f;
    }
  }
  unsigned high = 0;
  mine.each(shape.n_groups, [&](Key key) { high = max(high, static_cast<unsigned>(key >> 32)); });
  unsigned low = largest_of_lanes(high, 4);
  int bad = kNone;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (!is_finite(sums.at[i])) bad = Mine::group(i / 2, 0) / 2 + i % 2;
  }
  const auto of_lanes = [&] {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      high = max(high, shuffle_xor(high, mask));
      low = min(low, shuffle_xor(low, mask));
      bad = min(bad, shuffle_xor(bad, mask));
    }
  };
  of_lanes();
  if (lane == 0) {
    merge.largest[warp] = high;
    merge.least[warp] = low;
    merge.bad[warp] = bad;
  }
  sync_block();
  high = merge.largest[lane % kWarps];
  low = merge.least[lane % kWarps];
  bad = merge.bad[lane % kWarps];
  of_lanes();
  return {low, high, bad};
}

// The groups that may hold one of the best, to merge.groups; returns the least key of a logit that
// may be one.
__device__ Key choose_groups(Merge& merge, const Shape& shape, const Mine& mine,
                             const Bounds& bounds) {
  const auto each = [&](const auto& visit) { mine.each(shape.n_groups, visit); };
  const Key floor = find_floor(merge, Key{bounds.low} << 32, Key{bounds.high} << 32 | 0xffffffffu,
                               kMostKeys, each);
  each([&](Key key) {
    if (key >= floor) merge.groups[add_atomic(&merge.n_groups, 1u)] = id_of(key);
  });
  sync_block();
  return least_of_logit(floor);
}

// visit(key) for each logit of the chosen groups, some threads for some.
template <class Visit>
__device__ void each_chosen(const Merge& merge, const Shape& shape, const Line& logits,
                            const Visit& visit) {
  const int n = static_cast<int>(merge.n_groups) << shape.chunk_shift;
  const int half = thread_index() / kHalf, lane = thread_index() % kHalf;
  for (int first = half; first < n; first += kAtOnce * kSliceGroups) {
    Four v[kAtOnce];
    int column[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int chunk = first + i * kSliceGroups;
      column[i] = shape.vocab;
      if (chunk < n) {
        const int group = merge.groups[chunk >> shape.chunk_shift];
        const int in_group = chunk & ((1 << shape.chunk_shift) - 1);
        column[i] = group * shape.group + in_group * kChunk + lane * kFour;
      }
      v[i] = load_four(logits, column[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        if (column[i] + j < shape.vocab) visit(key_of(v[i].at[j], column[i] + j));
      }
    }
  }
}

// Keys from `floor` on to merge.keys, as far as they fit; all are counted.
__device__ void collect(Merge& merge, const Shape& shape, const Line& logits, Key floor) {
  each_chosen(merge, shape, logits, [&](Key key) {
    if (key < floor) return;
    const unsigned at = add_atomic(&merge.n_keys, 1u);
    if (at < kMostKeys) merge.keys[at] = key;
  });
  sync_block();
}

// Puts each key where it belongs: behind those that are greater, which two threads count.
__device__ void rank(const Merge& merge, unsigned* better, TopLogits& out) {
  const auto n = static_cast<int>(merge.n_keys);
  const int mine = thread_index() % kMostKeys, middle = divide_up(n, 2);
  const bool is_second = thread_index() >= kMostKeys;
  const Key key = mine < n ? merge.keys[mine] : 0;
  unsigned count = 0;
  if (mine < n) {
    const int last = is_second ? n : middle;
#pragma unroll 8
    for (int i = is_second ? middle : 0; i < last; ++i) count += merge.keys[i] > key ? 1 : 0;
  }
  if (is_second) better[mine] = count;
  sync_block();
  if (is_second || mine >= n) return;
  count += better[mine];
  if (count >= kMostTop) return;
  out.logits[count] = logit_of(key);
  out.tokens[count] = id_of(key);
}

// The first id from the warp's part `bad` on, by the first warp.
__device__ int find_not_finite(const Shape& shape, const Line& logits, int bad) {
  const int first = bad * 2 * shape.group;
  int found = kNone;
  for (int i = thread_index(); i < 2 * shape.group && i < shape.vocab - first; i += kWarp) {
    if (found == kNone && !is_finite(load_value(logits, first + i))) found = first + i;
  }
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) found = min(found, shuffle_xor(found, mask));
  return found;
}

__device__ void write_facts(const Shape& shape, TopLogits& out, float sum, float scaled,
                            int not_finite) {
  if (thread_index() != 0) return;
  out.sum = sum;
  out.scaled_sum = scaled;
  out.n = min(shape.vocab, kMostTop);
  out.not_finite = not_finite;
  out.drawn = -1;
  out.drawn_logit = 0.0f;
}

__device__ void merge_row(Merge& merge, const Shape& shape, const Line& logits, const Parts& parts,
                          float factor, float uniform, TopLogits& out) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  reinterpret_cast<uint4*>(merge.bins)[thread_index()] = uint4{0, 0, 0, 0};
  if (thread_index() == 0) merge.n_groups = merge.n_keys = 0;
  Mine mine;
  Four sums;
  const Bounds bounds = load_parts(merge, shape, parts, mine, sums);
  if (bounds.bad != kNone) {
    if (warp == 0) write_facts(shape, out, 0.0f, 0.0f, find_not_finite(shape, logits, bounds.bad));
    return;
  }
  const float best = logit_of(Key{bounds.high} << 32);
  float sum = 0.0f, scaled = 0.0f;
#pragma unroll
  for (int i = 0; i < kFoursOfMaxima; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float largest = max(mine.largest[i].at[2 * j], mine.largest[i].at[2 * j + 1]);
      const float part = sums.at[2 * i + j];
      if (part == 0.0f) continue;  // no groups there
      sum += part * exp_fast(largest - best);
      const int at = Mine::group(i, 0) / 2 + j;
      scaled += load_shared_by_blocks(parts.scaled + at) * exp_fast((largest - best) * factor);
    }
  }
  sum = sum_of_warp(sum);
  scaled = sum_of_warp(scaled);
  if (lane == 0) {
    merge.sums[warp] = sum;
    merge.scaled[warp] = scaled;
  }
  Key floor = choose_groups(merge, shape, mine, bounds);
#pragma unroll 1
  for (;;) {
    collect(merge, shape, logits, floor);
    if (merge.n_keys <= kMostKeys) break;
    const Key high = Key{bounds.high} << 32 | 0xffffffffu;
    floor = find_floor(merge, floor, high, kMostKeys,
                       [&](const auto& visit) { each_chosen(merge, shape, logits, visit); });
    if (thread_index() == 0) merge.n_keys = 0;
    sync_block();
  }
  rank(merge, merge.better, out);
  if (warp == 0) {
    sum = sum_of_warp(lane < kWarps ? merge.sums[lane] : 0.0f);
    scaled = sum_of_warp(lane < kWarps ? merge.scaled[lane] : 0.0f);
    write_facts(shape, out, sum, scaled, -1);
  }
  if (uniform < 0.0f) return;
  sync_block();
  draw(merge, shape, logits, parts, best, factor, uniform, out);
}

// ---- kernel ----

__global__ void __launch_bounds__(kThreads, 2)
    top_logits_kernel(TopLogits* out, const float* logits, const Sampling sampling,
                      const Shape shape, std::byte* scratch, unsigned* counters) {
  let_next_kernel_start();
  Merge& merge = *reinterpret_cast<Merge*>(shared_memory());
  const int row = block_index() / shape.n_blocks;
  const Line line = line_of(const_cast<float*>(logits), row * shape.stride, shape.vocab, false);
  const Parts parts = parts_of(shape, scratch, row);
  wait_for_previous_kernel();
  const float factor = sampling.factors == nullptr ? 1.0f : sampling.factors[row];
  sum_up(shape, line, parts, (block_index() - row * shape.n_blocks) * shape.slices, factor);
  sync_block();
  if (thread_index() == 0) {
    fence_blocks();  // what the whole block wrote: it met before
    merge.arrived = add_atomic(counters + row, 1u);
    fence_blocks();
  }
  sync_block();
  if (merge.arrived != static_cast<unsigned>(shape.n_blocks) - 1) return;
  if (thread_index() == 0) counters[row] = 0;
  const float uniform = sampling.uniforms == nullptr ? -1.0f : sampling.uniforms[row];
  merge_row(merge, shape, line, parts, factor, uniform, out[row]);
}

// ---- choose and launch ----

Shape shape_of(std::int64_t stride, int n_rows, int vocab) {
  Shape shape{stride, n_rows, vocab, kChunk, 0, 0, 0, 1, 0};
  while (divide_up(vocab, shape.group) > kMostGroups) shape.group = kChunk << ++shape.chunk_shift;
  shape.n_groups = divide_up(vocab, shape.group);
  shape.n_slices = divide_up(shape.n_groups, kSliceGroups);
  return shape;
}

// Two blocks run on a multiprocessor at once; where there would be many more than that, each takes
// several slices, since a block waits longer for others to know that it is done than it works.
int slices_of_block(const Shape& shape) {
  const std::int64_t enough = std::int64_t{multiprocessors()} * 2;
  const std::int64_t slices = std::int64_t{shape.n_rows} * shape.n_slices / enough;
  return static_cast<int>(std::clamp<std::int64_t>(slices, 1, kMostSlices));
}

void require(bool holds, const char* wanted) {
  if (!holds) fail(ErrorCode::kInternal, "[cuda] top_logits: ", wanted, ".");
}

}  // namespace

std::size_t top_logits_scratch_bytes(int n_rows, int vocab) {
  const Shape shape = shape_of(vocab, n_rows, vocab);
  return static_cast<std::size_t>(n_rows) * static_cast<std::size_t>(shape.n_slices) * kSliceBytes;
}

void top_logits(TopLogits* out, const float* logits, std::int64_t stride, const Sampling& sampling,
                int n_rows, int vocab, std::byte* scratch, unsigned* counters,
                cudaStream_t stream) {
  if (n_rows <= 0) return;
  require(vocab > 0 && vocab <= kMostVocab, "a vocabulary has 1 to 2^30 tokens");
  require(reinterpret_cast<std::uintptr_t>(scratch) % 16 == 0, "scratch is aligned to 16 bytes");
  Shape shape = shape_of(stride, n_rows, vocab);
  shape.slices = slices_of_block(shape);
  shape.n_blocks = divide_up(shape.n_slices, shape.slices);
  require(std::int64_t{n_rows} * shape.n_blocks < kNone, "fewer rows are taken at once");
  Launch how;
  how.blocks = n_rows * shape.n_blocks;
  how.threads = kThreads;
  how.shared_bytes = sizeof(Merge);
  how.stream = stream;
  how.overlaps = true;
  launch("top_logits", top_logits_kernel, how, out, logits, sampling, shape, scratch, counters);
}

}  // namespace camelid::cuda
