// Rows of a checkpoint's matrix as float32, and the way back to quantised words.
#include "quant/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace camelid {
namespace {

// Columns of a transposed source converted before moving on: 64 columns x 64 rows of float32 output
// are 16 KiB, so the scattered side of the copy stays in the first-level cache.
constexpr std::int64_t kColumnBlock = 64;

struct LoadF32 {
  static constexpr std::size_t kBytes = 4;
  static float at(const std::byte* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
};
struct LoadF16 {
  static constexpr std::size_t kBytes = 2;
  static float at(const std::byte* p) {
    std::uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return f16_to_f32(bits);
  }
};
struct LoadBf16 {
  static constexpr std::size_t kBytes = 2;
  static float at(const std::byte* p) {
    std::uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bf16_to_f32(bits);
  }
};

// Calls action(Load) with the loader of `dtype`, so that loops hold no switch.
template <class Action>
void with_loader(DType dtype, std::string_view what, const LinearSource& source, Action action) {
  switch (dtype) {
    case DType::kF32:
      return action(LoadF32{});
    case DType::kF16:
      return action(LoadF16{});
    case DType::kBf16:
      return action(LoadBf16{});
    default:
      fail(ErrorCode::kUnsupported, "[weights] ", source.name, " in ", source.file, " has ", what,
           " of type ", dtype_name(dtype), ", expected F32, F16 or BF16.");
  }
}

template <class Load>
void convert_in_row_order(const LinearSource& s, std::int64_t first_row, std::int64_t n_rows,
                          float* out) {
  const std::int64_t step = s.col_stride * static_cast<std::int64_t>(Load::kBytes);
  for (std::int64_t r = 0; r < n_rows; ++r, out += s.in_dim) {
    const std::byte* p = static_cast<const std::byte*>(s.data) +
                         (first_row + r) * s.row_stride * static_cast<std::int64_t>(Load::kBytes);
    if (s.col_stride == 1) {
      for (std::int64_t c = 0; c < s.in_dim; ++c) {
        out[c] = Load::at(p + c * static_cast<std::int64_t>(Load::kBytes));
      }
    } else {
      for (std::int64_t c = 0; c < s.in_dim; ++c) out[c] = Load::at(p + c * step);
    }
  }
}

// Fused experts are stored input-major: neighbours in memory are rows. Reads go through memory in
// the stored order, one short run per column.
template <class Load>
void convert_in_column_order(const LinearSource& s, std::int64_t first_row, std::int64_t n_rows,
                             float* out) {
  constexpr auto kBytes = static_cast<std::int64_t>(Load::kBytes);
  const std::byte* base = static_cast<const std::byte*>(s.data) + first_row * s.row_stride * kBytes;
  for (std::int64_t block = 0; block < s.in_dim; block += kColumnBlock) {
    const std::int64_t end = std::min(block + kColumnBlock, s.in_dim);
    for (std::int64_t c = block; c < end; ++c) {
      const std::byte* p = base + c * s.col_stride * kBytes;
      for (std::int64_t r = 0; r < n_rows; ++r) {
        out[r * s.in_dim + c] = Load::at(p + r * s.row_stride * kBytes);
      }
    }
  }
}

bool all_finite(const float* values, std::int64_t n) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<std::int32_t>(values[i]) & 0x7fffffff);
  }
  return largest < 0x7f800000;
}

[[noreturn]] void refuse_value(const LinearSource& source, float value, std::string_view what,
                               std::int64_t row, std::int64_t col) {
  fail(ErrorCode::kCheckpoint, "[weights] ", source.name, " in ", source.file, " holds ",
       std::isnan(value) ? "a NaN" : "an infinity", what, " at [", row, ", ", col,
       "]. The file is damaged or was badly converted; download it again.");
}

// `values` are the rows from first_row on, each `dim` long.
void require_finite(const LinearSource& source, const float* values, std::int64_t first_row,
                    std::int64_t n_rows, std::int64_t dim, std::string_view what) {
  for (std::int64_t r = 0; r < n_rows; ++r, values += dim) {
    if (all_finite(values, dim)) continue;
    for (std::int64_t c = 0; c < dim; ++c) {
      if (!std::isfinite(values[c])) refuse_value(source, values[c], what, first_row + r, c);
    }
  }
}

void read_plain(const LinearSource& source, std::int64_t first_row, std::int64_t n_rows,
                float* out) {
  with_loader(source.dtype, "values", source, [&](auto load) {
    using Load = decltype(load);
    if (source.row_stride < source.col_stride) {
      convert_in_column_order<Load>(source, first_row, n_rows, out);
    } else {
      convert_in_row_order<Load>(source, first_row, n_rows, out);
    }
  });
  require_finite(source, out, first_row, n_rows, source.in_dim, "");
}

template <int kBits>
void dequantise_row(const LinearSource& source, std::int64_t row, const float* scales, float* out) {
  constexpr std::int64_t kPerWord = 32 / kBits;
  constexpr std::uint32_t kMask = (1u << kBits) - 1u;
  const std::int64_t n_words = (source.in_dim + kPerWord - 1) / kPerWord;
  const std::byte* words = static_cast<const std::byte*>(source.words) + row * n_words * 4;
  std::vector<float> zeros(static_cast<std::size_t>(source.n_groups()));
  for (std::int64_t g = 0; g < source.n_groups(); ++g) {
    zeros[static_cast<std::size_t>(g)] = static_cast<float>(zero_point(source, row, g));
  }
  for (std::int64_t c = 0; c < source.in_dim; ++c) {
    std::uint32_t word;
    std::memcpy(&word, words + c / kPerWord * 4, sizeof word);
    const std::uint32_t q = (word >> (kBits * (c % kPerWord))) & kMask;
    const auto g = static_cast<std::size_t>(c / source.group_size);
    out[c] = (static_cast<float>(q) - zeros[g]) * scales[g];
  }
}

void read_quantised(const LinearSource& source, std::int64_t first_row, std::int64_t n_rows,
                    float* out) {
  std::vector<float> scales(static_cast<std::size_t>(n_rows * source.n_groups()));
  read_scales(source, first_row, n_rows, scales.data());
  for (std::int64_t r = 0; r < n_rows; ++r) {
    const float* row_scales = scales.data() + r * source.n_groups();
    float* row_out = out + r * source.in_dim;
    if (source.bits == 4) {
      dequantise_row<4>(source, first_row + r, row_scales, row_out);
    } else if (source.bits == 8) {
      dequantise_row<8>(source, first_row + r, row_scales, row_out);
    } else {
      fail(ErrorCode::kUnsupported, "[weights] ", source.name, " in ", source.file, " has ",
           source.bits, "-bit values, expected 4 or 8.");
    }
  }
}

// max |w| over finite values. Bits of non-negative floats order like integers, and integers let the
// compiler use vectors.
float largest_magnitude(const float* w, std::int64_t n) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<std::int32_t>(w[i]) & 0x7fffffff);
  }
  return std::bit_cast<float>(largest);
}

// One group of one row: writes q in offset-binary, returns its scale as bf16 bits.
std::uint16_t quantize_group(const float* w, std::int64_t n, int bits, std::int32_t* q) {
  const auto largest_q = static_cast<float>((1 << (bits - 1)) - 1);
  const float smallest_q = -largest_q - 1.0f;
  std::uint16_t scale_bits = f32_to_bf16(largest_magnitude(w, n) / (largest_q + 0.5f));
  if (scale_bits == 0) scale_bits = f32_to_bf16(1.0f);
  const float scale = bf16_to_f32(scale_bits);
  for (std::int64_t i = 0; i < n; ++i) {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, ties to even.
    float rounded = (w[i] / scale + 12582912.0f) - 12582912.0f;
    rounded = rounded < smallest_q ? smallest_q : rounded;
    rounded = rounded > largest_q ? largest_q : rounded;
    q[i] = static_cast<std::int32_t>(rounded - smallest_q);
  }
  return scale_bits;
}

// words: kBits of each q side by side, lowest bits first; q holds whole words.
template <int kBits>
void join_words(const std::int32_t* q, std::int64_t n_words, std::int32_t* words) {
  constexpr int kPerWord = 32 / kBits;
  for (std::int64_t w = 0; w < n_words; ++w, q += kPerWord) {
    std::uint32_t word = 0;
    for (int i = 0; i < kPerWord; ++i) word |= static_cast<std::uint32_t>(q[i]) << (kBits * i);
    words[w] = static_cast<std::int32_t>(word);
  }
}

}  // namespace

std::uint32_t zero_point(const LinearSource& source, std::int64_t row, std::int64_t group) {
  if (source.zero_points == nullptr) return 1u << (source.bits - 1);
  const std::int64_t per_word = 32 / source.bits;
  std::uint32_t word;
  std::memcpy(&word,
              static_cast<const std::byte*>(source.zero_points) +
                  ((row / per_word) * source.n_groups() + group) * 4,
              sizeof word);
  return (word >> (source.bits * static_cast<int>(row % per_word))) & ((1u << source.bits) - 1u);
}

void read_scales(const LinearSource& source, std::int64_t first_row, std::int64_t n_rows,
                 float* out) {
  const std::int64_t n = n_rows * source.n_groups();
  with_loader(source.scale_dtype, "scales", source, [&](auto load) {
    using Load = decltype(load);
    constexpr auto kBytes = static_cast<std::int64_t>(Load::kBytes);
    const std::byte* p =
        static_cast<const std::byte*>(source.scales) + first_row * source.n_groups() * kBytes;
    for (std::int64_t i = 0; i < n; ++i) out[i] = Load::at(p + i * kBytes);
  });
  require_finite(source, out, first_row, n_rows, source.n_groups(), " scale");
}

void read_rows(const LinearSource& source, std::int64_t first_row, std::int64_t n_rows,
               float* out) {
  if (source.bits == 0) {
    read_plain(source, first_row, n_rows, out);
  } else {
    read_quantised(source, first_row, n_rows, out);
  }
}

void quantize_rows(const float* rows, std::int64_t n_rows, std::int64_t in_dim, int bits,
                   std::int64_t group_size, std::int32_t* words, std::uint16_t* scales) {
  const std::int64_t per_word = 32 / bits;
  const std::int64_t n_words = (in_dim + per_word - 1) / per_word;
  const std::int64_t n_groups = (in_dim + group_size - 1) / group_size;
  // One row of q; what lies past in_dim stays the zero point.
  std::vector<std::int32_t> q(static_cast<std::size_t>(n_words * per_word), 1 << (bits - 1));
  for (std::int64_t r = 0; r < n_rows; ++r, rows += in_dim, words += n_words, scales += n_groups) {
    for (std::int64_t g = 0; g < n_groups; ++g) {
      const std::int64_t first = g * group_size;
      const std::int64_t n = std::min(group_size, in_dim - first);
      scales[g] = quantize_group(rows + first, n, bits, q.data() + first);
    }
    if (bits == 4) {
      join_words<4>(q.data(), n_words, words);
    } else {
      join_words<8>(q.data(), n_words, words);
    }
  }
}

}  // namespace camelid
