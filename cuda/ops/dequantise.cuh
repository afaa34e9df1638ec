// From packed weights to the A fragments of tensor core products: int4 and int8 become bf16 exactly,
// two at a time. Scales are not applied here: they follow in float32, after the products.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "layout/tiles.h"

namespace camelid::cuda {

// In bf16 the numbers 128..255 are 0x4300 + 0..127: bits put below 0x4300 count from 128.
constexpr std::uint32_t kFrom128 = 0x43004300;

// Steps of 16 inputs whose weights lie in one 16-byte piece of a lane.
CAMELID_HOST_DEVICE constexpr int steps_of_piece(Bits bits) { return bits == Bits::k4 ? 4 : 2; }

// What is subtracted of the weights of rows g and g + 8, as bf16 pairs of equal halves. Zero points
// are whole numbers, offset-binary: 8 in int4 and 128 in int8 where weights are symmetric.
struct Zeros {
  std::uint32_t of[2];
};
template <Bits kBits>
__device__ inline std::uint32_t zero_pair(float zero_point) {
  // int4: 128 is what the bits count from. int8: tiles hold two's complement.
  const float zero = kBits == Bits::k4 ? 128.0f + zero_point : zero_point - 128.0f;
  return pack_bf16x2(zero, zero);
}

// a[i] of one step: word >> shift leaves two values at the feet of the halves (tiles.h).
// kZeros: with zero points; without them int4 stands for -8..7 and int8 for itself.
template <Bits kBits, bool kZeros>
__device__ inline void expand(std::uint32_t (&a)[4], const uint4& piece, int step,
                              const Zeros& zeros) {
  const std::uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBits == Bits::k4) {
      const std::uint32_t shifted = words[step % 4] >> (4 * i);
      const std::uint32_t minus = kZeros ? zeros.of[i % 2] : 0x43084308u;  // 136
      a[i] = subtract_bf16x2(mask_or(shifted, 0x000f000fu, kFrom128), minus);
    } else {
      // low seven bits - (sign bit ? 128 : 0), both counted from 128: 0x80 above 0x4300 is 256
      const std::uint32_t shifted = words[step % 2 * 2 + i / 2] >> (8 * (i % 2));
      const std::uint32_t low = mask_or(shifted, 0x007f007fu, kFrom128);
      const std::uint32_t sign = mask_or(shifted, 0x00800080u, kFrom128);
      a[i] = subtract_bf16x2(low, sign);
      if constexpr (kZeros) a[i] = subtract_bf16x2(a[i], zeros.of[i % 2]);
    }
  }
}

}  // namespace camelid::cuda
