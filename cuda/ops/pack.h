// From quantised matrices of a checkpoint (compressed-tensors pack-quantized) to tiles in device
// memory. Needs sm_80. Plain matrices are not its business.
#pragma once

#include <cstddef>
#include <span>

#include "device/uploader.h"
#include "layout/tiles.h"
#include "quant/format.h"

namespace camelid::cuda {

constexpr int kMaxStack = 4;  // linears that share their inputs: q, k and v; gate and up

// The tiles of a stack of linears with the same inputs. With RowOrder::kGateUp it is gate and up.
//
//   Scales::kBf16   bf16 scales, no zero points, groups of a multiple of 128 or of a whole row
//   Scales::kPairs  all else: a multiple of 32 or a whole row; every value is kept to the bit
//
// Throws kUnsupported, with the matrix and what is possible, where there is no such layout.
TileShape packed_shape(std::span<const LinearSource> stack, RowOrder order);

// Packs a stack into shape.bytes() of tiles and shape.all_scale_bytes() of scales. The sources have
// been read when it returns; the device may still be at work.
void pack(std::span<const LinearSource> stack, const TileShape& shape, std::byte* tiles,
          std::byte* scales, Uploader& uploader);

}  // namespace camelid::cuda
