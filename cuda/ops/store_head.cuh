// One head of one token, by a warp: from the sums of the QKV projection to the queries that
// attention reads, or to its row in a page. store_kv.h says what happens to it.
//
// A lane has the fours 4 lane.. and 128 + 4 lane.. of head_dim, as float32 in registers; rotated
// pairs lie in one lane, and only sums and maxima leave it. All that a warp reads is asked for at
// once.
#pragma once

#include "base/error.h"
#include "device/row.cuh"
#include "ops/store_kv.h"

namespace camelid::cuda {

constexpr int kHeadFours = 2;
constexpr int kMostHeadDim = kHeadFours * kWarp * kFour;
// The largest magnitude of a head that is stored as zeros: there scales would become denormal.
constexpr float kSmallest = 0x1p-100f;

// What a lane holds of a head; zeros past its end.
struct Head {
  Four at[kHeadFours];
};

__device__ inline int column_of(int four) {
  return (four * kWarp + thread_index() % kWarp) * kFour;
}

__device__ inline Head load_head(const float* from, int head_dim) {
  Head head;
  load_fours(head.at, line_of(from, head_dim), column_of(0), kWarp * kFour);
  return head;
}

// ---- steps ----

template <class Change>
__device__ inline void each(Head& head, const Change& change) {
#pragma unroll
  for (int i = 0; i < kHeadFours; ++i) {
#pragma unroll
    for (int j = 0; j < kFour; ++j) head.at[i].at[j] = change(head.at[i].at[j]);
  }
}

// Pairs as complex numbers; rotation: cos, sin of each.
__device__ inline void rotate(Head& head, const Head& rotation) {
#pragma unroll
  for (int i = 0; i < kHeadFours; ++i) {
#pragma unroll
    for (int j = 0; j < kFour; j += 2) {
      const float real = head.at[i].at[j], imaginary = head.at[i].at[j + 1];
      const float cosine = rotation.at[i].at[j], sine = rotation.at[i].at[j + 1];
      head.at[i].at[j] = real * cosine - imaginary * sine;
      head.at[i].at[j + 1] = real * sine + imaginary * cosine;
    }
  }
}

__device__ inline void normalise(Head& head, int head_dim, float eps) {
  float squares = 0.0f;
  each(head, [&](float v) {
    squares += v * v;
    return v;
  });
  const float mean = sum_of_warp(squares) / static_cast<float>(head_dim);
  const float inverse = 1.0f / sqrtf(mean + eps);
  each(head, [&](float v) { return v * inverse; });
}

// The largest magnitude; NaN where a value is NaN, whose bits are above all others.
__device__ inline float largest_of(Head& head) {
  unsigned largest = 0;
  each(head, [&](float v) {
    largest = max(largest, __float_as_uint(v) & 0x7fffffffu);
    return v;
  });
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    largest = max(largest, shuffle_xor(largest, mask));
  return __uint_as_float(largest);
}

// ---- places ----

// The row of a token in a page, and its scale.
struct KvRow {
  std::byte* values;
  float* scale;
};
__device__ inline KvRow find_row(const StoreKv& call, const KvPlace& place, int kv_head,
                                 bool is_value) {
  const KvShape& shape = call.pool.shape;
  std::byte* side = call.pool.base + place.page * shape.page_bytes() +
                    shape.keys_at(call.kv_layer, kv_head) + (is_value ? shape.side_bytes() : 0);
  return {side + std::int64_t{place.slot} * shape.row_bytes(),
          reinterpret_cast<float*>(side + shape.scales_at()) + place.slot};
}

__device__ inline void store_bf16(std::byte* row, const Head& head, int head_dim) {
#pragma unroll
  for (int i = 0; i < kHeadFours; ++i) {
    if (column_of(i) >= head_dim) continue;
    const Four& v = head.at[i];
    *reinterpret_cast<uint2*>(row + column_of(i) * 2) =
        uint2{pack_bf16x2(v.at[0], v.at[1]), pack_bf16x2(v.at[2], v.at[3])};
  }
}

__device__ inline std::uint32_t to_int8(float value) {
  return static_cast<std::uint32_t>(static_cast<int>(rintf(value))) & 255u;
}

__device__ inline std::uint32_t pack_bytes(const Four& v, KvFormat format) {
  if (format == KvFormat::kE4m3) {
    return pack_e4m3x2(v.at[0], v.at[1]) | pack_e4m3x2(v.at[2], v.at[3]) << 16;
  }
  return to_int8(v.at[0]) | to_int8(v.at[1]) << 8 | to_int8(v.at[2]) << 16 | to_int8(v.at[3]) << 24;
}

// Bytes and their scale, which is NaN where a value is not finite. Zeros behind the row up to its
// 16 bytes.
__device__ inline void store_scaled(const KvRow& row, Head& head, const KvShape& shape) {
  const float most = shape.format == KvFormat::kE4m3 ? kMostE4m3 : 127.0f;
  const float largest = largest_of(head);
  const bool finite = __float_as_uint(largest) < 0x7f800000u;
  const bool zeros = !finite || largest < kSmallest;
  const float inverse = zeros ? 0.0f : most / largest;
  // The largest may come out an ulp above `most`, which rounding takes away.
  each(head, [&](float v) { return zeros ? 0.0f : v * inverse; });
#pragma unroll
  for (int i = 0; i < kHeadFours; ++i) {
    if (column_of(i) >= shape.row_bytes()) continue;
    *reinterpret_cast<std::uint32_t*>(row.values + column_of(i)) =
        pack_bytes(head.at[i], shape.format);
  }
  if (thread_index() % kWarp != 0) return;
  *row.scale = !finite ? __uint_as_float(0x7fc00000u) : zeros ? 1.0f : largest / most;
}

// Queries of all heads come first, then keys, then values: `index` counts them.
__device__ inline void store_head(const StoreKv& call, std::int64_t token, int index) {
  const KvShape& shape = call.pool.shape;
  const int n_rotated = call.n_heads + shape.n_kv_heads;
  const bool is_query = index < call.n_heads, is_value = index >= n_rotated;
  const KvPlace place = call.places[token];
  const float factor = call.query_scale != nullptr ? call.query_scale[token] : 1.0f;
  Head head = load_head(call.qkv + token * call.qkv_stride + std::int64_t{index} * shape.head_dim,
                        shape.head_dim);
  if (!is_value && call.rotation != nullptr) {
    rotate(head, load_head(call.rotation + token * shape.head_dim, shape.head_dim));
  }
  if (!is_value && call.qk_norm) normalise(head, shape.head_dim, call.eps);
  if (is_query) {
    if (call.query_scale != nullptr) each(head, [&](float v) { return v * factor; });
    const std::int64_t at = token * call.q_stride + std::int64_t{index} * shape.head_dim;
    store_bf16(reinterpret_cast<std::byte*>(call.q + at), head, shape.head_dim);
    return;
  }
  const int kv_head = index - (is_value ? n_rotated : call.n_heads);
  const KvRow row = find_row(call, place, kv_head, is_value);
  if (shape.format == KvFormat::kBf16) {
    store_bf16(row.values, head, shape.head_dim);
  } else {
    store_scaled(row, head, shape);
  }
}

// Throws kInternal where heads cannot be stored.
inline void check_store(const char* op, const StoreKv& call) {
  const KvShape& shape = call.pool.shape;
  const bool aligned = reinterpret_cast<std::uintptr_t>(call.q) % 8 == 0 && call.q_stride % 4 == 0;
  if (shape.head_dim <= 0 || shape.head_dim % 8 != 0 || shape.head_dim > kMostHeadDim || !aligned) {
    fail(ErrorCode::kInternal, "[cuda] ", op, ": heads of ", shape.head_dim,
         " values, queries every ", call.q_stride, "; wanted are multiples of 8 up to ",
         kMostHeadDim, " and rows aligned to 8 bytes.");
  }
}

}  // namespace camelid::cuda
