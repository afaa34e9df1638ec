// From the sums of the QKV projection to queries that attention reads and to keys and values in
// their pages, in one launch: RoPE, QK norm, NoPE temperature, rounding or quantising.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/kv_page.h"

namespace camelid::cuda {

struct StoreKv {
  KvPool pool;
  std::int32_t kv_layer = 0;  // among the layers of the pool
  std::int32_t n_heads = 0;   // of queries
  std::int32_t n_tokens = 0;
  const float* qkv = nullptr;  // [n_tokens][qkv_stride]: queries of all heads, then keys, values
  std::int64_t qkv_stride = 0;
  std::uint16_t* q = nullptr;  // bf16 [n_tokens][q_stride], n_heads * head_dim of them are written
  std::int64_t q_stride = 0;   // a multiple of 8
  const KvPlace* places = nullptr;  // [n_tokens], device memory
  // RoPE on interleaved pairs (2i, 2i + 1): cos, sin [n_tokens][head_dim / 2][2]; null: none.
  const float* rotation = nullptr;
  bool qk_norm = false;                // after RoPE: weightless RMS norm of each q and k head
  float eps = 0.0f;                    // of the norm
  const float* query_scale = nullptr;  // [n_tokens], multiplies q; null: 1
};

// Of queries, keys and values.
CAMELID_HOST_DEVICE inline int n_heads_of(const StoreKv& call) {
  return call.n_heads + 2 * call.pool.shape.n_kv_heads;
}

// All in float32 until the one rounding at the end, to nearest even. Rows of e4m3 and int8 have as
// their scale the largest magnitude / 448 or / 127. Heads below 2^-100 are stored as zeros, with
// scale 1; where a value is not finite the scale is NaN. Waits for nothing.
void store_kv(const StoreKv& call, cudaStream_t stream);

}  // namespace camelid::cuda
