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

// ---- the A fragment of a step from a lane's 16 bytes; scales follow in float32 ----

// Steps of 16 inputs whose weights lie in one 16-byte piece of a lane.
CAMELID_HOST_DEVICE constexpr int steps_of_piece(Bits bits) { return bits == Bits::k4 ? 4 : 2; }

// Zero points of rows g and g + 8 as pairs: what is subtracted from the bits (int4) or values
// (int8).
struct Zeros {
  std::uint32_t of[2];
};
template <Bits kBits>
__device__ inline std::uint32_t zero_pair(float zero_point) {
  return both_bf16(kBits == Bits::k4 ? 136.0f + zero_point : zero_point);
}

template <int i, Bits kBits, bool kZeros>
__device__ __forceinline__ std::uint32_t expand_pair(const uint4& piece, int step,
                                                     const Zeros& zeros) {
  const std::uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  if constexpr (kBits == Bits::k4) {
    return from_int4<i>(words[step % 4], kZeros ? zeros.of[i % 2] : 0x43084308u /* 136 */);
  } else {
    const std::uint32_t pair = from_int8<i>(words[step % 2 * 2 + i / 2]);
    return kZeros ? subtract_bf16x2(pair, zeros.of[i % 2]) : pair;
  }
}

// The A fragment of a step, exact: weights minus their zero points (kZeros), or as they are.
template <Bits kBits, bool kZeros>
__device__ __forceinline__ void expand(std::uint32_t (&a)[4], const uint4& piece, int step,
                                       const Zeros& zeros) {
  a[0] = expand_pair<0, kBits, kZeros>(piece, step, zeros);
  a[1] = expand_pair<1, kBits, kZeros>(piece, step, zeros);
  a[2] = expand_pair<2, kBits, kZeros>(piece, step, zeros);
  a[3] = expand_pair<3, kBits, kZeros>(piece, step, zeros);
}

}  // namespace camelid::cuda
