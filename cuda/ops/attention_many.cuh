// What the kernels of attention of many queries share, here and on Hopper: which keys a query of a
// tile sees, where it and its result lie, and in which pages keys lie.
#pragma once

#include "device/kv.cuh"
#include "ops/attention.h"

namespace camelid::cuda {

constexpr int kKeyGroup = 16;  // neighbours in one page, since page_size is a multiple of it
constexpr int kTileGroups = kKeyTile / kKeyGroup;

// A call as its kernel gets it: with what would be computed again and again else.
struct ManyCall : Attention {
  std::int32_t item_count = 0;  // what n_items points at
  std::int32_t group = 0;       // query heads of a kv head
  float scale = 0.0f;           // of scores before exp2: log2(e) / sqrt(head_dim)
  std::int32_t row_bytes = 0;
  std::int64_t page_bytes = 0, side_bytes = 0, scales_at = 0;
  const std::byte* keys = nullptr;  // of the layer's first head in page 0

  ManyCall(const Attention& call, int n_items);

  // Of page 0, the keys (side 0) or values (1) of a head.
  __device__ const std::byte* side(int kv_head, int side) const {
    return keys + (2 * kv_head + side) * side_bytes;
  }
};

// A tile of queries and a kv head, whose rows are numbered from 0 on.
struct QueryTile {
  const ManyCall& call;
  std::int32_t number;  // of the item, which is read where it lies: registers are short
  std::int32_t kv_head;

  // Heads outermost: blocks that run at the same time share a head's keys in L2.
  __device__ QueryTile(const ManyCall& call_, int job)
      : call(call_), number(job % call_.item_count), kv_head(job / call_.item_count) {}

  __device__ const AttentionItem& item() const { return call.items[number]; }
  // Where row r is in q or y, given their stride.
  __device__ std::int64_t place(int r, std::int64_t stride) const {
    const int query = item().first_query + r;
    const int head = kv_head * call.group + query % call.group;
    return (item().first_row + query / call.group) * stride + head * call.pool.shape.head_dim;
  }
  // One past the last key that row r sees, never less than the row before; rows behind the tile see
  // what its last does.
  __device__ int limit(int r) const {
    if (!call.causal) return item().last_key;
    const int query = item().first_query + min(r, item().n_queries - 1);
    return min(item().last_key, item().first_index + query / call.group + 1);
  }
};

// Where kKeyGroup keys lie.
struct KeyPlace {
  std::int32_t page;
  std::int32_t slot;  // the first one's
};

// Of the keys from `key` on, a multiple of kKeyGroup. Nothing is read for keys past the item's.
__device__ inline KeyPlace find_keys(const Attention& call, const AttentionItem& item, int key) {
  const int page_size = call.pool.shape.page_size;
  if (key >= item.last_key) return {0, 0};
  return {call.page_table[item.page_list + key / page_size], key % page_size};
}

// Sixteen stored values, as two pieces of bf16.
template <KvFormat kFormat>
__device__ __forceinline__ void expand_piece(uint4 (&to)[2], const uint4& from) {
  const std::uint32_t words[4] = {from.x, from.y, from.z, from.w};
  std::uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint32_t even, odd;
    expand_bytes<kFormat>(words[i], even, odd);
    pairs[2 * i] = select_bytes(even, odd, 0x5410);
    pairs[2 * i + 1] = select_bytes(even, odd, 0x7632);
  }
  to[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  to[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
}

// Throws where `call` cannot be; ops/attention.h.
void check_attend_many(const Attention& call, int n_items);

}  // namespace camelid::cuda
