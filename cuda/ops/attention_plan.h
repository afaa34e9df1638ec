// Divides the attention of one step into items of nearly equal work, once for all layers of a kind.
// Plain host code: it launches nothing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention.h"

namespace camelid::cuda {

// Consecutive tokens of one sequence in a step. They see all keys from index 0 on: up to their own
// if causal, else up to the last token's.
struct AttentionSpan {
  std::int32_t first_row = 0;  // of the step's tokens
  std::int32_t n_rows = 0;
  std::int32_t first_index = 0;  // key index of first_row
  std::int32_t page_list = 0;    // where in the page table the span's pages begin
};

struct AttentionPlan {
  std::vector<AttentionItem> few;   // for attend_few; in both those with most keys come first
  std::vector<AttentionItem> many;  // for attend_many
  std::int64_t n_parts = 0;         // partial results of `few`
  std::int32_t n_counters = 0;  // of tiles of `few` whose keys are divided; each for every kv head
};

// Spans of at most so many queries go to attend_few.
constexpr int kMostFewQueries = 64;

// `group`: query heads of a kv head. `many_queries`: of an item of `many`, as many as the kernel
// takes that will run it. How a span is divided depends on nothing but the span, so its results do
// not depend on what else is in the step.
void plan_attention(AttentionPlan& plan, std::span<const AttentionSpan> spans, int group,
                    bool causal, int many_queries = kManyQueries);

}  // namespace camelid::cuda
