// C functions over attention and its plan, for tests.
#include <algorithm>
#include <span>

#include "case.h"
#include "case_shapes.h"
#include "ops/attention_plan.h"

using namespace camelid;
using namespace camelid::cuda;

extern "C" {

// Bytes of a page, of a row, of the keys of a head; where those of kv_layer's first head begin and
// where their scales follow; floats of a partial result.
void case_kv_sizes(const CaseAttention* c, std::int64_t* sizes) {
  const KvShape shape = kv_shape_of(*c);
  sizes[0] = shape.page_bytes();
  sizes[1] = shape.row_bytes();
  sizes[2] = shape.side_bytes();
  sizes[3] = shape.keys_at(c->kv_layer, 0);
  sizes[4] = shape.scales_at();
  sizes[5] = static_cast<std::int64_t>(attention_partial_floats(shape, 1));
}

// Spans: first_row, n_rows, first_index, page_list. Numbers: items of few, of many, parts,
// counters. Items are written where there is a pointer.
int case_plan_attention(const AttentionSpan* spans, std::int32_t n_spans, std::int32_t group,
                        std::int32_t causal, std::int64_t* numbers, AttentionItem* few,
                        AttentionItem* many) {
  return caught([&] {
    AttentionPlan plan;
    plan_attention(plan, std::span(spans, static_cast<std::size_t>(n_spans)), group, causal != 0);
    numbers[0] = static_cast<std::int64_t>(plan.few.size());
    numbers[1] = static_cast<std::int64_t>(plan.many.size());
    numbers[2] = plan.n_parts;
    numbers[3] = plan.n_counters;
    if (few != nullptr) std::copy(plan.few.begin(), plan.few.end(), few);
    if (many != nullptr) std::copy(plan.many.begin(), plan.many.end(), many);
  });
}

// `which`: 0 attend_few.
int run_attention(std::int32_t which, const CaseAttention* c, std::byte* pool,
                  const AttentionItem* items, const std::int32_t* n_items,
                  const std::int32_t* page_table, const std::uint16_t* q, std::uint16_t* y,
                  float* partials, unsigned* counters) {
  return caught([&] {
    Attention call = attention_of(*c, pool, items, page_table, q, y);
    call.n_items = n_items;
    call.partials = partials;
    call.counters = counters;
    if (which != 0) fail(ErrorCode::kInternal, "no attention ", which);
    attend_few(call, c->multiprocessors, stream);
  });
}

}  // extern "C"
