// A stack of linears in device memory: INT4 and INT8 ones as tiles, all others as bf16 rows. It
// decides which of the two a source becomes; it multiplies nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "base/threads.h"
#include "device/uploader.h"
#include "layout/tiles.h"

namespace camelid::cuda {

// bf16 rows, `stride` values apart; rows of RowOrder::kGateUp lie as in tiles, 8 gates and 8 ups in
// turn, padded to whole tiles with zeros.
struct PlainMatrix {
  const std::uint16_t* at = nullptr;
  std::int32_t rows = 0;  // as the caller counts them
  std::int32_t inputs = 0;
  std::int32_t stride = 0;
  RowOrder order = RowOrder::kPlain;
};

// Some of the stack's linears, the outputs from first_row on.
struct Segment {
  std::int32_t first_row = 0;
  bool is_tiled = false;
  TiledMatrix tiled;
  const TilePointers* table = nullptr;  // tiled.at, in device memory
  PlainMatrix plain;
};

struct DeviceMatrix final : public Matrix {
  std::vector<Segment> segments;
  std::vector<DeviceMemory> memory;
};

// Groups that tiles cannot have (not a multiple of 32 inputs, nor a whole row) become bf16 too.
// Throws kCheckpoint where a plain value is not finite.
std::unique_ptr<DeviceMatrix> pack_matrix(std::span<const LinearSource> stack,
                                          std::span<const PackOptions> options, Stack kind,
                                          Uploader& uploader, ThreadPool& pool);

}  // namespace camelid::cuda
