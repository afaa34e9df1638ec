// C functions over attention of many queries, for tests.
#include "case.h"
#include "case_shapes.h"
#include "sm90/attention_many.h"

using namespace camelid::cuda;

extern "C" {

int case_attend_many(const CaseAttention* c, std::int32_t hopper, std::int32_t n_items,
                     std::byte* pool, const AttentionItem* items, const std::int32_t* page_table,
                     const std::uint16_t* q, std::uint16_t* y) {
  return caught([&] {
    const Attention call = attention_of(*c, pool, items, page_table, q, y);
    (hopper != 0 ? sm90::attend_many : attend_many)(call, n_items, c->multiprocessors, stream);
  });
}

}  // extern "C"
