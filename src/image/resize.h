// Antialiased bilinear resize of 8-bit images with 16-bit weights: integers all the way, so every
// machine gives the pixels that torchvision gives for uint8 on AVX2 and AVX-512, which is where the
// published models' preprocessing runs. Knows nothing of files, tiles or models.
#pragma once

#include <cstdint>

namespace camelid {

// Red, green and blue, interleaved.
inline constexpr std::int64_t kImageChannels = 3;

// The longest side of any image here. Keeps sizes and 32-bit sums far from overflow: a sum is at
// most 255 * (2^22 + 2^20 / 2), as each of the weights was rounded up by at most a half.
inline constexpr std::int64_t kMaxImageSide = std::int64_t{1} << 20;

// uint8 [height, width, 3], rows `row_bytes` apart.
struct ImageView {
  const std::uint8_t* pixels;
  std::int64_t height;
  std::int64_t width;
  std::int64_t row_bytes;
};

struct ImageSpan {
  std::uint8_t* pixels;
  std::int64_t height;
  std::int64_t width;
  std::int64_t row_bytes;
};

// Fills `out` with `in`, resized; the two must not overlap. Rows first, then columns, each rounded
// to 8 bits. Throws kInvalidRequest when a side is not within 1 and kMaxImageSide, or a row does
// not hold its pixels.
void resize_image(const ImageView& in, const ImageSpan& out);

}  // namespace camelid
