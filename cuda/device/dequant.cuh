// Packed integers to bf16 pairs, exactly and without a conversion instruction: an integer under the
// exponent of 128 is 128 + itself. The order of values is layout/tiles.h's.
#pragma once

#include "device/ptx.cuh"
#include "layout/tiles.h"

namespace camelid::cuda {

constexpr std::uint32_t kExponent128 = 0x43004300u;  // two bf16 128s, whose last bit counts one

// A bf16 pair of `value` twice; exact for whole numbers up to 256.
__device__ inline std::uint32_t both_bf16(float value) { return pack_bf16x2(value, value); }

// Fragment a[i] of a step from its word of int4: q + 8 is stored. `offset` holds, as a bf16 pair,
// 128 plus what to subtract: 136, or 128 + 8 + zero point.
template <int i>
__device__ inline std::uint32_t from_int4(std::uint32_t word, std::uint32_t offset) {
  return subtract_bf16x2(mask_or(word >> (4 * i), 0x000f000fu, kExponent128), offset);
}

// Fragment a[i] of a step from its word of int8: the sign bit under the same exponent is 128 too.
template <int i>
__device__ inline std::uint32_t from_int8(std::uint32_t word) {
  const std::uint32_t bytes = word >> (8 * (i % 2));
  return subtract_bf16x2(mask_or(bytes, 0x007f007fu, kExponent128),
                         mask_or(bytes, 0x00800080u, kExponent128));
}

}  // namespace camelid::cuda
