// From a lane's 16 bytes of packed weights to the A fragments of products of many tokens. Scales
// are not applied here: they follow in float32.
#pragma once

#include <cstdint>

#include "device/dequant.cuh"

namespace camelid::cuda {

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
