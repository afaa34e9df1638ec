// Where keys and values lie in a page of device memory. Host and device share it; it knows nothing
// of sequences.
//
//   page   [layer of its kind][kv head][keys | values][token of the page][head_dim]
//
// A row of head_dim values is padded to 16 bytes, with zeros when it is written. Formats of one
// byte have a float32 scale for every row, after the rows: value = what is stored * scale.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/tiles.h"

namespace camelid::cuda {

// INT4 would be one more line here, one in row_bytes(), and its conversion in device/kv.cuh.
enum class KvFormat : std::uint8_t { kBf16, kE4m3, kInt8 };

struct KvShape {
  std::int32_t page_size = 0;  // tokens, a multiple of 16
  std::int32_t n_layers = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;  // a multiple of 8
  KvFormat format = KvFormat::kBf16;

  CAMELID_HOST_DEVICE constexpr bool scaled() const { return format != KvFormat::kBf16; }
  CAMELID_HOST_DEVICE constexpr int row_bytes() const {
    return divide_up(head_dim * (format == KvFormat::kBf16 ? 2 : 1), 16) * 16;
  }
  // Of keys or values of one head: page_size rows, then their scales.
  CAMELID_HOST_DEVICE constexpr std::int64_t side_bytes() const {
    return std::int64_t{page_size} * (row_bytes() + (scaled() ? 4 : 0));
  }
  CAMELID_HOST_DEVICE constexpr std::int64_t page_bytes() const {
    return side_bytes() * 2 * n_kv_heads * n_layers;
  }
  // From the start of a page to the keys of a head; its values follow side_bytes() later.
  CAMELID_HOST_DEVICE constexpr std::int64_t keys_at(int layer, int kv_head) const {
    return side_bytes() * 2 * (std::int64_t{layer} * n_kv_heads + kv_head);
  }
  // From the start of keys or values to the scales of their rows.
  CAMELID_HOST_DEVICE constexpr std::int64_t scales_at() const {
    return std::int64_t{page_size} * row_bytes();
  }
};

// The pages of one kind of layer: page p begins at base + p * shape.page_bytes().
struct KvPool {
  std::byte* base = nullptr;
  KvShape shape;
};

// Where one token of a step is written.
struct KvPlace {
  std::int32_t page;
  std::int32_t slot;  // of the page's tokens
};

}  // namespace camelid::cuda
