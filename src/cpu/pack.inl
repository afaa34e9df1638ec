// The inner loops of packing: 16 rows of a file, at any address, become a panel (packed.h), 16
// words of each row at a time through registers. Included inside the anonymous namespace of each
// isa_*.cpp after simd_*.h and panels.inl; must never know of threads, nor what the numbers mean.

// The exponent bits of the floats in a word, their lowest bits, and the bits a carry out of an
// exponent reaches: adding the lowest bit carries from exactly the exponents that are all ones,
// those of infinities and NaN. All zero: integers, which are always finite.
struct Exponents {
  std::uint32_t bits = 0;
  std::uint32_t units = 0;
  std::uint32_t carries = 0;
};
constexpr Exponents kNoExponents = {};
constexpr Exponents kExponentsF32 = {0x7f800000u, 0x00800000u, 0x80000000u};
constexpr Exponents kExponentsBf16 = {0x7f807f80u, 0x00800080u, 0x80008000u};
constexpr Exponents kExponentsF16 = {0x7c007c00u, 0x04000400u, 0x80008000u};

constexpr std::int64_t kBlockBytes = 4 * kLanes;

// Bytes [first, first + n) of each row, at most kBlockBytes, the rest zero.
inline void load_edge(Words (&block)[kLanes], const PackRows& rows, std::int64_t first,
                      std::int64_t n) {
  for (int lane = 0; lane < kLanes; ++lane) {
    std::byte bytes[kBlockBytes] = {};
    if (lane < rows.n_rows) {
      __builtin_memcpy(bytes, rows.first + lane * rows.stride + first, static_cast<std::size_t>(n));
    }
    block[lane] = Words::load_bytes(bytes);
  }
}

inline void load_block(Words (&block)[kLanes], const PackRows& rows, std::int64_t first) {
  const std::int64_t n = least(kBlockBytes, rows.n_bytes - first);
  if (n < kBlockBytes || rows.n_rows < kLanes) return load_edge(block, rows, first, n);
  for (int lane = 0; lane < kLanes; ++lane) {
    block[lane] = Words::load_bytes(rows.first + lane * rows.stride + first);
  }
}

// Rows are short streams, over before the hardware has learnt them; the next 16 rows usually lie
// right behind these. Rows of 2560 bytes: 10 % faster with two threads, 15-40 % with one.
inline void prefetch_next_panel(const PackRows& rows, std::int64_t first) {
  for (int i = 0; i < kLanes; ++i) {
    __builtin_prefetch(rows.first + kLanes * (rows.stride + first) + i * kBlockBytes, 0, 2);
  }
}

template <bool kSpread>
bool pack_blocks(std::uint32_t* out, const PackRows& rows, Exponents exponents) {
  Words flags = Words::zero();
  for (std::int64_t first = 0; first < rows.n_bytes; first += kBlockBytes) {
    Words block[kLanes];
    prefetch_next_panel(rows, first);
    load_block(block, rows, first);
    transpose(block);
    const std::int64_t n_words = least(kLanes, (rows.n_bytes - first + 3) / 4);
    for (std::int64_t w = 0; w < n_words; ++w, out += kLanes) {
      if constexpr (kSpread) {
        spread_nibbles(block[w]).store(out);
      } else {
        flags = flag_carries(flags, block[w], exponents.bits, exponents.units);
        block[w].store(out);
      }
    }
  }
  return !any(flags, exponents.carries);
}

bool pack_words(std::uint32_t* out, const PackRows& rows, WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
      return pack_blocks<true>(out, rows, kNoExponents);
    case WeightFormat::kF32:
      return pack_blocks<false>(out, rows, kExponentsF32);
    case WeightFormat::kBf16:
      return pack_blocks<false>(out, rows, kExponentsBf16);
    case WeightFormat::kF16:
      return pack_blocks<false>(out, rows, kExponentsF16);
    default:
      return pack_blocks<false>(out, rows, kNoExponents);
  }
}

// 16-bit numbers travel in words of their own, so that both widths are transposed alike.
bool pack_halves(std::uint16_t* out, const PackRows& rows, Exponents exponents) {
  Words flags = Words::zero();
  const std::int64_t n_values = rows.n_bytes / 2;
  for (std::int64_t first = 0; first < n_values; first += kLanes) {
    const std::int64_t n = least(kLanes, n_values - first);
    Words block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      std::uint16_t values[kLanes] = {};
      if (lane < rows.n_rows) {
        __builtin_memcpy(values, rows.first + lane * rows.stride + 2 * first,
                         static_cast<std::size_t>(2 * n));
      }
      block[lane] = Words::load_u16(values);
    }
    transpose(block);
    for (std::int64_t i = 0; i < n; ++i, out += kLanes) {
      flags = flag_carries(flags, block[i], exponents.bits & 0xffffu, exponents.units & 0xffffu);
      block[i].store_u16(out);
    }
  }
  return !any(flags, exponents.carries & 0xffffu);
}

bool pack_scales(void* out, const PackRows& rows, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return pack_blocks<false>(static_cast<std::uint32_t*>(out), rows, kExponentsF32);
    case DType::kBf16:
      return pack_halves(static_cast<std::uint16_t*>(out), rows, kExponentsBf16);
    case DType::kF16:
      return pack_halves(static_cast<std::uint16_t*>(out), rows, kExponentsF16);
    default:
      return false;
  }
}
