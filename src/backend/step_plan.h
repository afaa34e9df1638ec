// What is known of a step before it runs: its tokens, where keys and values go, who sees which, and
// what one layer's attention has of its own. Knows no backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace camelid {

// kFp8, kInt8: each token's keys and values of a head as numbers of a byte and one scale each.
enum class KvType : std::uint8_t { kF32, kBf16, kFp8, kInt8 };

// The pages of one kind of layer. A page holds `page_size` consecutive tokens of every layer of the
// kind; inside a page the order is the backend's (page_bytes() says how large it wants one).
struct KvPages {
  void* base = nullptr;
  std::size_t page_bytes = 0;
  std::int64_t page_size = 0;  // tokens
  std::int64_t n_layers = 0;
  std::int64_t n_kv_heads = 0;
  std::int64_t head_dim = 0;
  KvType type = KvType::kF32;
};

// Consecutive tokens of one sequence in this step, and the keys they may see: all from index 0 of
// `pages` up to their own. For local layers index 0 is the start of the tokens' chunk.
struct KvSpan {
  std::int64_t first_row = 0;  // of the step's tokens
  std::int64_t n_rows = 0;
  std::int64_t first_index = 0;         // row first_row is written at this index
  const std::int32_t* pages = nullptr;  // key i lies in pages[i / page_size]
};

// One kind of attention layer in one step: local ones see their own chunk, global ones everything.
struct KvPlan {
  KvPages pages;
  std::int64_t n_heads = 0;     // of queries
  bool causal = true;           // else every row of a span sees all of the span's keys
  std::vector<KvSpan> spans;    // cover all rows of the step, in order
  std::vector<float> rotation;  // [n_tokens, head_dim / 2, 2]: cos, sin of each row's key index
};

// One step, built once and used by all its layers. Rows are the step's tokens.
struct StepPlan {
  // All calls of the step depend on how many tokens and rows there are, and on nothing else.
  bool repeatable = false;
  std::span<const std::int32_t> tokens;  // [n_tokens]
  std::span<const std::int32_t> rows;    // what select_rows() selects
  KvPlan local;
  KvPlan global;
  std::vector<float> query_scale;  // [n_tokens]: NoPE temperature, 1 where it is off
  // [rows], for find_top(): 1 / temperature of sampling, and where in 0 to 1 the token lies that is
  // drawn from the whole row, below 0 where none is to be.
  std::vector<float> sampling_scale;
  std::vector<float> sampling_uniform;
};

// What distinguishes one layer's attention from another's.
struct AttentionLayer {
  bool local = false;          // KvPlan local, else global
  bool rotate = false;         // RoPE on interleaved pairs (2i, 2i+1) by the plan's rotation
  bool qk_norm = false;        // after RoPE: weightless RMS norm of each q and k head
  bool scale_queries = false;  // multiply q by StepPlan::query_scale (NoPE temperature)
  std::int64_t kv_layer = 0;   // index among the layers of its kind
  float eps = 0.0f;
};

}  // namespace camelid
