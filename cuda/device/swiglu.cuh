// How gate and up meet, the same in every kernel that has both.
#pragma once

#include "device/ptx.cuh"

namespace camelid::cuda {

// silu(gate) * up. Where gate is below -87, exp is above 2^126 and the quotient 0, as it should be.
__device__ inline float swiglu(float gate, float up) {
  return divide_fast(gate, 1.0f + exp_fast(-gate)) * up;
}

__device__ inline std::uint16_t to_bf16(float value) {
  return static_cast<std::uint16_t>(pack_bf16x2(value, 0.0f) & 0xffffu);
}

}  // namespace camelid::cuda
