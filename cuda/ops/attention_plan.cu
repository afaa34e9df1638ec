// How the queries of spans become tiles, and the keys of tiles become pieces.
#include "ops/attention_plan.h"

#include <algorithm>

namespace camelid::cuda {
namespace {

// Keys of a piece. 256 keys are 4 tiles of 64, which hides what an item costs besides; short pieces
// share the keys of one sequence evenly among all multiprocessors. From 64 Ki keys on pieces grow,
// so that combining them stays cheap beside reading them.
constexpr int kPieceKeys = 256;
constexpr int kMostPieces = 256;

// Depends on the keys of the span alone.
int piece_keys(int n_keys) {
  return std::max(kPieceKeys, divide_up(divide_up(n_keys, kMostPieces), kKeyTile) * kKeyTile);
}

// The tile of `size` queries that begins at first_query, compared with all keys it may see.
AttentionItem make_tile(const AttentionSpan& span, int group, bool causal, int first_query,
                        int size) {
  AttentionItem item{};
  item.first_row = span.first_row;
  item.first_index = span.first_index;
  item.page_list = span.page_list;
  item.first_query = first_query;
  item.n_queries = std::min(size, span.n_rows * group - first_query);
  const int last_row = (first_query + item.n_queries - 1) / group;
  item.last_key = span.first_index + (causal ? last_row + 1 : span.n_rows);
  item.n_parts = 1;
  return item;
}

// Neighbours in the list run at the same time. So the tiles of a span that read the same keys stand
// side by side, and find them in the cache.
void add_few(AttentionPlan& plan, const AttentionSpan& span, int group, bool causal) {
  const int piece = piece_keys(span.first_index + span.n_rows);
  AttentionItem tiles[kMostFewQueries / kFewQueries];
  int n_tiles = 0, most_parts = 0;
  for (int query = 0; query < span.n_rows * group; query += kFewQueries) {
    AttentionItem& tile = tiles[n_tiles++];
    tile = make_tile(span, group, causal, query, kFewQueries);
    tile.n_parts = divide_up(tile.last_key, piece);
    most_parts = std::max(most_parts, tile.n_parts);
    if (tile.n_parts == 1) continue;
    tile.first_part = static_cast<std::int32_t>(plan.n_parts);
    tile.counter = plan.n_counters;
    plan.n_parts += tile.n_parts;
    plan.n_counters += n_counters_of(tile.n_parts);
  }
  for (int part = 0; part < most_parts; ++part) {
    for (int i = 0; i < n_tiles; ++i) {
      if (part >= tiles[i].n_parts) continue;
      AttentionItem& item = plan.few.emplace_back(tiles[i]);
      item.part = part;
      item.first_key = part * piece;
      item.last_key = std::min(item.last_key, (part + 1) * piece);
    }
  }
}

// So that what is dealt last, and may be done by some while others are idle, is small.
void longest_first(std::vector<AttentionItem>& items) {
  std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
    return a.last_key - a.first_key > b.last_key - b.first_key;
  });
}

}  // namespace

void plan_attention(AttentionPlan& plan, std::span<const AttentionSpan> spans, int group,
                    bool causal, int many_queries) {
  plan.few.clear();
  plan.many.clear();
  plan.n_parts = 0;
  plan.n_counters = 0;
  for (const AttentionSpan& span : spans) {
    if (span.n_rows * group <= kMostFewQueries) {
      add_few(plan, span, group, causal);
      continue;
    }
    for (int query = 0; query < span.n_rows * group; query += many_queries) {
      plan.many.push_back(make_tile(span, group, causal, query, many_queries));
    }
  }
  longest_first(plan.few);
  longest_first(plan.many);
}

}  // namespace camelid::cuda
