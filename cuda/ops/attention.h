// Attention over paged keys and values: what a launch is made of, shared by the kernel for few
// queries (decode), the one for many (prefill), and Hopper's own for many. Who compares which
// queries with which keys, ops/attention_plan.h decides once for all layers of a step.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/kv_page.h"

namespace camelid::cuda {

// A tile of queries and the keys it is compared with, for every kv head. The queries of a span of
// tokens are numbered row * group + i: head kv_head * group + i of its row, where group =
// n_heads / n_kv_heads. So a tile may begin and end in the middle of a token.
struct AttentionItem {
  std::int32_t first_row;    // the span's first token among the step's
  std::int32_t first_index;  // the key index of that token
  std::int32_t page_list;    // where in page_table the span's pages begin
  std::int32_t first_query;  // of the span's
  std::int32_t n_queries;    // 1 to the kernel's kQueries
  std::int32_t first_key;    // a multiple of kKeyTile
  std::int32_t last_key;     // one past; causal queries see fewer, each up to its own token
  // Tiles whose keys are divided among several items: which of them this is, of how many, and the
  // place of the first one's partial result among all. n_parts 1: not divided.
  std::int32_t part;
  std::int32_t n_parts;
  std::int32_t first_part;
  std::int32_t
      counter;  // the first of the tile's, which count parts that are done, for each kv head
  std::int32_t padding;  // to 48 bytes
};

constexpr int kKeyTile = 64;      // keys that are loaded and multiplied together
constexpr int kFewQueries = 16;   // of an item of attend_few
constexpr int kManyQueries = 64;  // of an item of attend_many

// Partial results are combined in groups of so many, and then the groups: whoever comes last has at
// most twice so many to read, while all others wait. Each group has a counter, and the groups one.
constexpr int kCombinedParts = 16;
CAMELID_HOST_DEVICE constexpr int n_combined_groups(int n_parts) {
  return divide_up(n_parts, kCombinedParts);
}
CAMELID_HOST_DEVICE constexpr int n_counters_of(int n_parts) {
  const int n_groups = n_combined_groups(n_parts);
  return n_parts == 1 ? 0 : n_groups == 1 ? 1 : n_groups + 1;
}

struct Attention {
  KvPool pool;
  std::int32_t kv_layer = 0;
  std::int32_t n_heads = 0;
  bool causal = true;  // a query sees keys up to its own token; else all of the item's
  // Device memory, all of it; the counts too, so that a recorded launch serves every step. Items,
  // their number and page_table are not written by the kernel just before in the stream.
  const AttentionItem* items = nullptr;
  const std::int32_t* n_items = nullptr;
  const std::int32_t* page_table = nullptr;
  const std::uint16_t* q = nullptr;  // bf16 [n_tokens][q_stride], rows aligned to 16 bytes
  std::int64_t q_stride = 0;
  std::uint16_t* y = nullptr;  // bf16 [n_tokens][y_stride], as q
  std::int64_t y_stride = 0;
  float* partials = nullptr;     // attention_partial_floats() of them, aligned to 16 bytes
  unsigned* counters = nullptr;  // [counters of the plan][n_kv_heads], all 0 between launches
};

// For n_parts parts in all.
std::size_t attention_partial_floats(const KvShape& shape, std::int64_t n_parts);

// softmax(q k^T / sqrt(head_dim)) v, scores and sums in float32, probabilities rounded to bf16
// before the second product. head_dim: a multiple of 8 up to 256. An item's result does not depend
// on what else is in the list, and is the same every time. `multiprocessors`: of this GPU.
// Throws kUnsupported or kInternal where the call cannot be; waits for nothing.
void attend_few(const Attention& call, int multiprocessors, cudaStream_t stream);
// n_items on the host too: this one is never recorded.
void attend_many(const Attention& call, int n_items, int multiprocessors, cudaStream_t stream);

}  // namespace camelid::cuda
