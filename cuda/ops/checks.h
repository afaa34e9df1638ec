// What products may not be asked for, whichever kernel they go to: a caller's mistakes become an
// Error before they become wrong memory. Only the host knows it; it costs nothing beside a launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "layout/output.h"
#include "layout/split_norm.h"
#include "layout/tiles.h"

namespace camelid::cuda {

inline bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// `op` names the kernel, `wanted` says what does not hold.
inline void require(bool holds, const char* op, const char* wanted) {
  if (!holds) fail(ErrorCode::kInternal, "[cuda] ", op, ": ", wanted, ".");
}

inline void check_shape(const char* op, const TileShape& shape) {
  const bool pairs = shape.scales == Scales::kPairs;
  const bool entries = shape.entries == 1 || (pairs && (shape.entries == 2 || shape.entries == 4));
  const bool halves = shape.order == RowOrder::kPlain || shape.rows % 2 == 0;
  // 2^26 bytes of a row tile: kernels count bytes between rows in 32 bits.
  if (shape.rows <= 0 || shape.inputs <= 0 || !entries || !halves ||
      shape.row_tile_bytes() >= (1 << 26)) {
    fail(ErrorCode::kInternal, "[cuda] ", op, ": ", shape.rows, " x ", shape.inputs,
         " weights with ", shape.entries,
         " scales for 128 inputs; wanted are sizes above 0, as many ",
         "gates as ups, 1, 2 or 4 scales, of bf16 1, and inputs for which 16 rows stay below 64 "
         "MB.");
  }
}

inline void check_tiles(const char* op, const TilePointers& at) {
  require(at.tiles != nullptr && at.scales != nullptr && is_aligned(at.tiles, 16) &&
              is_aligned(at.scales, 16),
          op, "tiles and scales must be there, aligned to 16 bytes");
}

// Rows of bf16, `stride` values apart, that are copied 16 bytes at a time.
inline void check_rows(const char* op, const char* name, const void* rows, int inputs,
                       std::int64_t stride) {
  if (rows == nullptr || !is_aligned(rows, 16) || stride % 8 != 0 || stride < inputs) {
    fail(ErrorCode::kInternal, "[cuda] ", op, ": rows of ", name, " every ", stride, " values",
         rows == nullptr ? " of no memory" : "", "; wanted are rows of ", inputs,
         " values, aligned to 16 bytes.");
  }
}

// y of a product whose matrix has so many rows in such an order.
inline void check_output(const char* op, Output output, int rows, RowOrder order, const void* y,
                         std::int64_t stride) {
  require(output <= Output::kSwiGlu, op, "an output that nobody knows");
  require((output == Output::kSwiGlu) == (order == RowOrder::kGateUp), op,
          "gates and ups in one matrix are for SwiGLU, and nothing else is");
  require(output != Output::kSwiGlu || rows % 2 == 0, op, "SwiGLU needs as many gates as ups");
  const int columns = output == Output::kSwiGlu ? rows / 2 : rows;
  const std::size_t bytes = output == Output::kStore || output == Output::kAdd ? 4 : 2;
  if (y == nullptr || !is_aligned(y, bytes) || stride < columns) {
    fail(ErrorCode::kInternal, "[cuda] ", op, ": rows of y every ", stride, " values",
         y == nullptr ? " of no memory" : "", "; wanted are rows of ", columns,
         " values, aligned to ", bytes, " bytes.");
  }
}

// What a product of so many rows begins.
inline void check_norm(const char* op, const NormStart& norm, Output output, int rows) {
  if (norm.gain == nullptr) return;
  require(output == Output::kAdd, op, "a norm follows what is added to, and nothing else");
  require(norm.h != nullptr && norm.squares != nullptr && norm.h_stride >= rows, op,
          "a norm needs rows to write, as wide as y, and a place for squares");
}

}  // namespace camelid::cuda
