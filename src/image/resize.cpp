#include "image/resize.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "base/error.h"

namespace camelid {
namespace {

// What one axis adds up: output i is the weighted sum of inputs [first[i], first[i] + count[i]).
struct Taps {
  int shift;                         // weights are multiples of 2^-shift
  std::int64_t per_output;           // weights kept for each output; those from count[i] on unused
  std::vector<std::int32_t> first;   // [n_out]
  std::vector<std::int32_t> count;   // [n_out], from 1 to per_output
  std::vector<std::int16_t> weight;  // [n_out, per_output]
  const std::int16_t* weights(std::int64_t i) const { return weight.data() + i * per_output; }
};

// The most bits of fraction with which the largest weight still fits 16 bits, at most 22: 8 bits of
// pixel and 2 of slack then fill the 32 of a sum.  Source: ATen, UpSampleKernel.cpp.
int weight_shift(double largest) {
  constexpr int kMaxShift = 22;
  int shift = 0;
  while (shift < kMaxShift && static_cast<int>(0.5 + largest * (2 << shift)) < (1 << 15)) ++shift;
  return shift;
}

// A triangle as wide as `scale` inputs to each side when shrinking, and one input when enlarging,
// its weights normalised. Every double operation is in ATen's order.
Taps make_taps(std::int64_t n_in, std::int64_t n_out) {
  const double scale = static_cast<double>(n_in) / static_cast<double>(n_out);
  const double support = std::max(scale, 1.0);
  const double inverse = 1.0 / support;
  const std::int64_t most = 2 * static_cast<std::int64_t>(support) + 3;
  Taps taps{0, std::min(most, n_in), {}, {}, {}};
  std::vector<double> exact(static_cast<std::size_t>(n_out * taps.per_output));
  double largest = 0;
  for (std::int64_t i = 0; i < n_out; ++i) {
    const double centre = scale * (static_cast<double>(i) + 0.5);
    const auto first = std::max(static_cast<std::int64_t>(centre - support + 0.5), std::int64_t{0});
    const auto last = std::min(static_cast<std::int64_t>(centre + support + 0.5), n_in);
    const std::int64_t count = std::min(last - first, taps.per_output);
    double* weights = exact.data() + i * taps.per_output;
    double total = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      const double x = (static_cast<double>(j + first) - centre + 0.5) * inverse;
      weights[j] = std::max(0.0, 1.0 - (x < 0 ? -x : x));
      total += weights[j];
    }
    for (std::int64_t j = 0; j < count; ++j) {
      if (total != 0) weights[j] /= total;
      largest = std::max(largest, weights[j]);
    }
    taps.first.push_back(static_cast<std::int32_t>(first));
    taps.count.push_back(static_cast<std::int32_t>(count));
  }
  taps.shift = weight_shift(largest);
  const double unit = 1 << taps.shift;
  for (const double w : exact) taps.weight.push_back(static_cast<std::int16_t>(0.5 + w * unit));
  return taps;
}

std::uint8_t to_pixel(std::int32_t sum, int shift) {
  return static_cast<std::uint8_t>(std::min(sum >> shift, 255));
}

// One row across. in: [n_in, 3], out: [n_out, 3].
void resize_row(const std::uint8_t* in, const Taps& taps, std::uint8_t* out) {
  const std::int32_t half = 1 << (taps.shift - 1);
  const auto n_out = static_cast<std::int64_t>(taps.first.size());
  for (std::int64_t i = 0; i < n_out; ++i, out += kImageChannels) {
    const std::uint8_t* pixel = in + taps.first[i] * kImageChannels;
    const std::int16_t* weights = taps.weights(i);
    std::int32_t red = half, green = half, blue = half;
    for (std::int32_t j = 0; j < taps.count[i]; ++j, pixel += kImageChannels) {
      red += weights[j] * pixel[0];
      green += weights[j] * pixel[1];
      blue += weights[j] * pixel[2];
    }
    out[0] = to_pixel(red, taps.shift);
    out[1] = to_pixel(green, taps.shift);
    out[2] = to_pixel(blue, taps.shift);
  }
}

// sums[c] += weight * row[c]. The baseline multiplies eight numbers at once if both have 16 bits.
void add_row(std::int16_t weight, const std::uint8_t* row, std::int64_t n, std::int32_t* sums) {
  for (std::int64_t c = 0; c < n; ++c) sums[c] += weight * static_cast<std::int16_t>(row[c]);
}

// The rows of `in`, each resized across when it is first asked for. Keeps the last `n_kept`.
class ResizedRows {
 public:
  ResizedRows(const ImageView& in, std::int64_t out_width, std::int64_t n_kept)
      : in_(in),
        same_(in.width == out_width),
        row_bytes_(out_width * kImageChannels),
        n_kept_(n_kept) {
    if (same_) return;
    taps_ = make_taps(in.width, out_width);
    kept_.resize(static_cast<std::size_t>(n_kept * row_bytes_));
  }

  // Rows are asked for in windows whose beginnings and ends never go back, at most n_kept long.
  const std::uint8_t* row(std::int64_t y) {
    if (same_) return in_.pixels + y * in_.row_bytes;
    for (done_ = std::max(done_, y - n_kept_ + 1); done_ <= y; ++done_) {
      resize_row(in_.pixels + done_ * in_.row_bytes, taps_, slot(done_));
    }
    return slot(y);
  }

 private:
  std::uint8_t* slot(std::int64_t y) { return kept_.data() + (y % n_kept_) * row_bytes_; }

  ImageView in_;
  bool same_;
  std::int64_t row_bytes_;
  std::int64_t n_kept_;
  std::int64_t done_ = 0;  // rows before this one have been resized, or are not needed
  Taps taps_;
  std::vector<std::uint8_t> kept_;  // [n_kept, out_width, 3], row y in slot y % n_kept
};

void check_side(const char* what, std::int64_t height, std::int64_t width, std::int64_t row_bytes) {
  if (height < 1 || width < 1 || height > kMaxImageSide || width > kMaxImageSide) {
    fail(ErrorCode::kInvalidRequest, "[image] ", what, " is ", width, " x ", height,
         " pixels, expected sides from 1 to ", kMaxImageSide, ".");
  }
  if (row_bytes < width * kImageChannels) {
    fail(ErrorCode::kInvalidRequest, "[image] ", what, " has rows of ", row_bytes,
         " bytes, expected at least ", width * kImageChannels, ".");
  }
}

}  // namespace

void resize_image(const ImageView& in, const ImageSpan& out) {
  check_side("the image", in.height, in.width, in.row_bytes);
  check_side("the resized image", out.height, out.width, out.row_bytes);
  const std::int64_t n = out.width * kImageChannels;
  if (in.height == out.height) {
    ResizedRows rows(in, out.width, 1);
    for (std::int64_t y = 0; y < out.height; ++y) {
      std::memcpy(out.pixels + y * out.row_bytes, rows.row(y), static_cast<std::size_t>(n));
    }
    return;
  }
  const Taps taps = make_taps(in.height, out.height);
  ResizedRows rows(in, out.width, taps.per_output);
  std::vector<std::int32_t> sums(static_cast<std::size_t>(n));
  for (std::int64_t y = 0; y < out.height; ++y) {
    std::fill(sums.begin(), sums.end(), 1 << (taps.shift - 1));
    for (std::int32_t j = 0; j < taps.count[y]; ++j) {
      add_row(taps.weights(y)[j], rows.row(taps.first[y] + j), n, sums.data());
    }
    std::uint8_t* row = out.pixels + y * out.row_bytes;
    for (std::int64_t c = 0; c < n; ++c) row[c] = to_pixel(sums[c], taps.shift);
  }
}

}  // namespace camelid
