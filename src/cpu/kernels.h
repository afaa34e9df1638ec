// The table of functions an instruction set supplies. Each does one thread's share; cutting work
// into shares and waking threads is backend.cpp's. isa_*.cpp fill one table each from the same
// *.inl sources over their own 16-lane vector type (simd_*.h), so the algorithm is written once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "cpu/packed.h"

namespace camelid::cpu {

// Rows of activations as int8, a scale for each block of inputs: the value of input i of row r is
// values[r * stride + i] * scales[r * n_blocks + i / block].
struct Int8Rows {
  const std::int8_t* values = nullptr;  // zeros from in_dim to stride, a multiple of 64
  const float* scales = nullptr;
  const std::int32_t* sums = nullptr;  // of each block's values
  std::int64_t stride = 0;
  std::int64_t block = 0;  // the whole group of every scale of the weights, or a part of one
  std::int64_t n_blocks = 0;
};

// Rows of activations rounded to bf16.
struct Bf16Rows {
  const std::uint16_t* values = nullptr;  // zeros from in_dim to stride, a multiple of 64
  std::int64_t stride = 0;
};

// y[r][first_out + o] (+)= sum_i x[rows[r]][i] * w[o][i], for the outputs of panels [first, last)
// of `w`. x: f32 rows x_stride apart, or int8; y: f32 [n_rows, y_stride]. scratch:
// matmul_scratch_floats() of this segment and row count. For a given row and output the result is
// bit-identical for every n_rows.
struct MatmulTask {
  const Segment* w = nullptr;
  const float* x = nullptr;  // of matmul
  std::int64_t x_stride = 0;
  const Int8Rows* x8 = nullptr;        // of matmul_int8
  const Bf16Rows* x16 = nullptr;       // of matmul_bf16
  const std::int32_t* rows = nullptr;  // null: r + first_row
  std::int64_t first_row = 0;
  std::int64_t n_rows = 0;
  float* y = nullptr;
  std::int64_t y_stride = 0;
  bool accumulate = false;
};

// Attention of rows [first_row, first_row + n_rows) of one span, for some kv heads and all query
// heads that share them. q: f32 rows of the step's qkv tensor; y: f32 [n_tokens, n_heads *
// head_dim]. Keys come in pieces (piece_start), each summed on its own and merged in order: a task
// without `partials` does all of that; one with it leaves the sums of its own pieces there, and
// merge_attention() does the rest.
struct AttendTask {
  const KvPages* pages = nullptr;
  const KvSpan* span = nullptr;
  std::int64_t kv_layer = 0;
  std::int64_t first_kv_head = 0;
  std::int64_t last_kv_head = 0;  // exclusive
  std::int64_t n_heads = 0;
  bool causal = true;          // else every row sees all keys of the span
  std::int64_t first_row = 0;  // of the step
  std::int64_t n_rows = 0;
  const float* q = nullptr;  // row 0 of the step, head 0
  std::int64_t q_stride = 0;
  float* y = nullptr;
  std::int64_t y_stride = 0;
  std::int64_t first_piece = 0;
  std::int64_t last_piece = 0;  // exclusive
  std::int64_t n_pieces = 0;    // of all keys
  // f32 [n_kv_heads][n_pieces][attend_partial_floats()], of all heads and pieces.
  float* partials = nullptr;
};

// RoPE, QK norm and query scale of one row of the step's qkv tensor in place, then k and v to their
// page.
struct StoreTask {
  const KvPages* pages = nullptr;
  const AttentionLayer* layer = nullptr;
  std::int64_t n_heads = 0;         // of queries
  float* qkv = nullptr;             // [(n_heads + 2 n_kv_heads) * head_dim], this row
  const float* rotation = nullptr;  // [head_dim / 2, 2] cos, sin; null: no rotation
  float query_scale = 1.0f;
  std::int32_t page = 0;
  std::int64_t slot = 0;  // token within the page
};

// Up to 16 rows of a file, `n_bytes` each and `stride` bytes apart, at any address.
struct PackRows {
  const std::byte* first = nullptr;
  std::int64_t stride = 0;
  std::int64_t n_bytes = 0;
  std::int64_t n_rows = 0;
};

struct Kernels {
  const char* name;  // dispatch.cpp has them all
  std::size_t (*matmul_scratch_floats)(const Segment& w, std::int64_t n_rows);
  void (*matmul)(const MatmulTask& task, std::int64_t first_panel, std::int64_t last_panel,
                 float* scratch);
  // The same with int8 activations, for scaled formats: the integer sums of a block are exact.
  void (*matmul_int8)(const MatmulTask& task, std::int64_t first_panel, std::int64_t last_panel);
  // The same for plain bf16 weights with activations rounded to bf16; null, like round_row, where
  // the instruction set has no products of bf16.
  void (*matmul_bf16)(const MatmulTask& task, std::int64_t first_panel, std::int64_t last_panel);
  void (*round_row)(std::uint16_t* values, const float* x, std::int64_t n);
  // values[i] = round(x[i] / scale), scale = max |x| / 127 of each block of x[n]; n is padded with
  // zeros to a multiple of 64. A block that holds no finite numbers gets the scale NaN.
  void (*quantize_row)(std::int8_t* values, float* scales, std::int32_t* sums, const float* x,
                       std::int64_t n, std::int64_t block);
  // y[i] = one row of w as float32 [in_dim].
  void (*unpack_row)(float* y, const Segment& w, std::int64_t row);
  // y = cast(x * rsqrt(mean(x^2) + eps)) * gain over n values.
  void (*norm_row)(float* y, const float* x, const float* gain, std::int64_t n, float eps);
  // y = (x - mean(x)) * rsqrt(variance(x) + eps) * gain + bias over n values.
  void (*layer_norm_row)(float* y, const float* x, const float* gain, const float* bias,
                         std::int64_t n, float eps);
  void (*add_row)(float* y, const float* x, std::int64_t n);  // y += x
  void (*gelu_row)(float* y, std::int64_t n);                 // in place
  // y[i] = silu(factor * gate[i]) * (factor * up[i]).
  void (*silu_mul_row)(float* y, const float* gate, const float* up, float factor, std::int64_t n);
  void (*store_kv)(const StoreTask& task);
  std::size_t (*attend_scratch_floats)(const AttendTask& task);
  void (*attend)(const AttendTask& task, float* scratch);
  // The same for caches of bf16, with queries and softmax weights rounded to bf16; null where the
  // instruction set has no products of bf16.
  void (*attend_bf16)(const AttendTask& task, float* scratch);
  // Of one kv head and piece.
  std::size_t (*attend_partial_floats)(const AttendTask& task);
  // y from the partials of all pieces.
  void (*merge_attention)(const AttendTask& task);
  // One panel's words (packed.h), 64-byte aligned, from words as a file holds them; a last word cut
  // short is filled with zeros, like rows that are missing. False when a float is not finite.
  bool (*pack_words)(std::uint32_t* out, const PackRows& rows, WeightFormat format);
  // The same for its scales; false also for a type that scales may not have.
  bool (*pack_scales)(void* out, const PackRows& rows, DType dtype);
};

// dispatch.cpp: the best table this machine runs, or the one CAMELID_CPU_ISA names.
const Kernels& select_kernels();
// The table called `name`. Throws kUnsupported, naming the choices, when
// there is none or this machine cannot run it.
const Kernels& kernels_by_name(std::string_view name);
// The names this machine can run, best first.
std::vector<std::string_view> supported_isas();

// Each sets the functions it has a better way for. False when not compiled for this architecture.
bool add_scalar_kernels(Kernels& table);
bool add_avx2_kernels(Kernels& table);
bool add_avx512_kernels(Kernels& table);
bool add_avx512vnni_kernels(Kernels& table);
bool add_avx512bf16_kernels(Kernels& table);

// Where piece i of a sequence's keys begins. The same for every query, so that results depend on
// neither the cut into tasks nor on what else runs. 1024 keys are long enough to stream and to
// make merging cheap; from 64 Ki keys on pieces grow with their index, a 32nd to a 64th of the keys
// before them, so that ten million keys have 300 pieces rather than 10000.
static inline std::int64_t piece_start(std::int64_t i) {
  constexpr std::int64_t kKeys = 1024;
  if (i < 64) return i * kKeys;
  const std::int64_t doublings = (i - 64) / 32;
  return (kKeys << (doublings + 1)) * (i - 32 * (doublings + 1));
}
static inline std::int64_t count_pieces(std::int64_t n_keys) {
  std::int64_t n = 1;
  while (piece_start(n) < n_keys) ++n;
  return n;
}

// Where one layer's keys and values of one kv head lie in a page (KvPages::page_bytes, row-major),
// in blocks of 64 tokens, the last one of what is left, E being the elements that fill 32 bits:
//   [n_layers][n_kv_heads][blocks] { keys [width / E][tokens][E],   scales f32 [tokens],
//                                    values [tokens / E][width][E], scales f32 [tokens] }
// A block is what attention reads at once, so it is contiguous. A lane of 32 bits holds E
// consecutive terms of the sums of one token (keys: over head_dim) or one dimension (values: over
// tokens), as dot product instructions want them, and 16 lanes are 16 tokens or dimensions. Only
// int8 has scales: x = (byte - 128) * scale, biased because dot products of bytes are of unsigned
// by signed. Scales are float32, 8 bytes beside 256 at head_dim 128, so that all parts stay aligned
// to 64 bytes for every page size. (static: each ISA's file keeps its own copy.)
static inline std::int64_t kv_element_bytes(KvType type) {
  return type == KvType::kF32 ? 4 : type == KvType::kBf16 ? 2 : 1;
}
// Whole lanes and at least one vector: what lies past head_dim is never written, and never used.
static inline std::int64_t kv_width(std::int64_t head_dim) {
  return head_dim < 16 ? 16 : (head_dim + 3) / 4 * 4;
}
static inline std::int64_t kv_token_bytes(const KvPages& pages) {  // of one kv head
  const std::int64_t scale = pages.type == KvType::kInt8 ? 4 : 0;
  return 2 * (kv_width(pages.head_dim) * kv_element_bytes(pages.type) + scale);
}
static inline std::size_t kv_head_bytes(const KvPages& pages) {
  return static_cast<std::size_t>(pages.page_size * kv_token_bytes(pages));
}
struct KvBlock {
  std::byte* keys;
  float* key_scales;  // int8 only
  std::byte* values;
  float* value_scales;    // int8 only
  std::int64_t n_tokens;  // 64 or what the page has left, a multiple of 16
  std::int64_t token;     // of the slot asked for
};
static inline KvBlock find_kv_block(const KvPages& pages, std::int32_t page, std::int64_t layer,
                                    std::int64_t kv_head, std::int64_t slot) {
  constexpr std::int64_t kTokens = 64;
  const std::int64_t first = slot / kTokens * kTokens;
  const std::int64_t left = pages.page_size - first;
  const std::int64_t n_tokens = left < kTokens ? left : kTokens;
  std::byte* head =
      static_cast<std::byte*>(pages.base) + static_cast<std::size_t>(page) * pages.page_bytes +
      static_cast<std::size_t>(layer * pages.n_kv_heads + kv_head) * kv_head_bytes(pages);
  std::byte* keys = head + first * kv_token_bytes(pages);
  std::byte* values = keys + n_tokens * kv_token_bytes(pages) / 2;
  const std::int64_t scales = n_tokens * kv_width(pages.head_dim) * kv_element_bytes(pages.type);
  return {keys,     reinterpret_cast<float*>(keys + scales),
          values,   reinterpret_cast<float*>(values + scales),
          n_tokens, slot - first};
}

}  // namespace camelid::cpu
