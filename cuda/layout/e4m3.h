// Bytes of e4m3 (OCP's FP8 with one NaN and no infinities: sign, 4 bits of exponent, 3 of mantissa)
// and float32, exactly, for host and device and GPUs that have no instruction for it.
#pragma once

#include <bit>
#include <cstdint>

#include "layout/tiles.h"

namespace camelid::cuda {

constexpr float kMostE4m3 = 448.0f;

// To nearest even; beyond 448 is 448 with its sign, NaN stays NaN. As cvt.rn.satfinite does.
CAMELID_HOST_DEVICE constexpr std::uint32_t to_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (magnitude >= std::bit_cast<std::uint32_t>(kMostE4m3)) return sign | 0x7eu;
  if (magnitude < std::bit_cast<std::uint32_t>(0x1p-6f)) {
    // Multiples of 2^-9, which is what the last bit of 2^14 counts; the sum rounds as it should.
    const float sum = std::bit_cast<float>(magnitude) + 0x1p14f;
    return sign | (std::bit_cast<std::uint32_t>(sum) - std::bit_cast<std::uint32_t>(0x1p14f));
  }
  const std::uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return sign | ((rounded >> 20) - ((127u - 7u) << 3));
}

CAMELID_HOST_DEVICE constexpr float from_e4m3(std::uint32_t code) {
  const std::uint32_t magnitude = code & 0x7fu;
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                    : std::bit_cast<float>((magnitude << 20) + ((127u - 7u) << 23));
  const std::uint32_t bits = magnitude == 0x7fu ? 0x7fc00000u : std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>(bits | (code & 0x80u) << 24);
}

}  // namespace camelid::cuda
