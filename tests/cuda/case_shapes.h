// Shapes of matrices, and calls of attention and of what stores for it, as tests hand them to C
// functions.
#pragma once

#include <cstdint>

#include "layout/tiles.h"
#include "ops/attention.h"
#include "ops/store_kv.h"

namespace camelid::cuda {

struct CaseShape {
  std::int32_t rows, inputs, entries, bits, scales, order;
};

inline TileShape shape_of(const CaseShape& s) {
  return {s.rows,
          s.inputs,
          s.entries,
          static_cast<Bits>(s.bits),
          static_cast<Scales>(s.scales),
          static_cast<RowOrder>(s.order)};
}

struct CaseAttention {
  std::int32_t page_size, n_layers, n_kv_heads, head_dim, format;
  std::int32_t kv_layer, n_heads, causal, multiprocessors;
  std::int64_t q_stride, y_stride;
};

inline KvShape kv_shape_of(const CaseAttention& c) {
  return {c.page_size, c.n_layers, c.n_kv_heads, c.head_dim, static_cast<KvFormat>(c.format)};
}

struct CaseKv {
  void* base;
  std::int32_t page_size, n_layers, n_kv_heads, head_dim, format;
  std::int32_t kv_layer, n_heads, n_tokens, qk_norm;
  float eps;
  const void* qkv;
  std::int64_t qkv_stride;
  void* q;
  std::int64_t q_stride;
  const void *places, *rotation, *query_scale;
};

inline KvShape kv_shape_of(const CaseKv& c) {
  return {c.page_size, c.n_layers, c.n_kv_heads, c.head_dim, static_cast<KvFormat>(c.format)};
}

inline StoreKv store_of(const CaseKv& c) {
  StoreKv call;
  call.pool = {static_cast<std::byte*>(c.base), kv_shape_of(c)};
  call.kv_layer = c.kv_layer;
  call.n_heads = c.n_heads;
  call.n_tokens = c.n_tokens;
  call.qkv = static_cast<const float*>(c.qkv);
  call.qkv_stride = c.qkv_stride;
  call.q = static_cast<std::uint16_t*>(c.q);
  call.q_stride = c.q_stride;
  call.places = static_cast<const KvPlace*>(c.places);
  call.rotation = static_cast<const float*>(c.rotation);
  call.qk_norm = c.qk_norm != 0;
  call.eps = c.eps;
  call.query_scale = static_cast<const float*>(c.query_scale);
  return call;
}

inline Attention attention_of(const CaseAttention& c, std::byte* pool, const AttentionItem* items,
                              const std::int32_t* page_table, const std::uint16_t* q,
                              std::uint16_t* y) {
  Attention call;
  call.pool = {pool, kv_shape_of(c)};
  call.kv_layer = c.kv_layer;
  call.n_heads = c.n_heads;
  call.causal = c.causal != 0;
  call.items = items;
  call.page_table = page_table;
  call.q = q;
  call.q_stride = c.q_stride;
  call.y = y;
  call.y_stride = c.y_stride;
  return call;
}

}  // namespace camelid::cuda
