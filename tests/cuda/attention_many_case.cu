// C functions over attention of many queries, for tests.
#include "case.h"
#include "ops/attention.h"
#include "sm90/attention_many.h"

using namespace camelid::cuda;

extern "C" {

// As attention_case.cu has it.
struct CaseMany {
  std::int32_t page_size, n_layers, n_kv_heads, head_dim, format;
  std::int32_t kv_layer, n_heads, causal, multiprocessors;
  std::int64_t q_stride, y_stride;
};

int case_attend_many(const CaseMany* c, std::int32_t hopper, std::int32_t n_items, std::byte* pool,
                     const AttentionItem* items, const std::int32_t* page_table,
                     const std::uint16_t* q, std::uint16_t* y) {
  return caught([&] {
    Attention call;
    call.pool.base = pool;
    call.pool.shape = {c->page_size, c->n_layers, c->n_kv_heads, c->head_dim,
                       static_cast<KvFormat>(c->format)};
    call.kv_layer = c->kv_layer;
    call.n_heads = c->n_heads;
    call.causal = c->causal != 0;
    call.items = items;
    call.page_table = page_table;
    call.q = q;
    call.q_stride = c->q_stride;
    call.y = y;
    call.y_stride = c->y_stride;
    (hopper != 0 ? sm90::attend_many : attend_many)(call, n_items, c->multiprocessors, stream);
  });
}

}  // extern "C"
