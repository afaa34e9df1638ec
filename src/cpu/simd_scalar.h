// 16 float lanes as plain C++: the readable reference, and what runs on any machine. Included only
// by isa_scalar.cpp, inside its own anonymous namespace. The interface is described in
// simd_avx512.h. fma here is a rounded multiply then an add: the baseline x86-64 has no fused
// instruction.

struct Vec {
  float v[16];
  static Vec set(float x) {
    Vec r;
    for (float& lane : r.v) lane = x;
    return r;
  }
  static Vec zero() { return set(0.0f); }
  template <class T, class Convert>
  static Vec convert(const T* p, Convert to_float) {
    Vec r;
    for (int i = 0; i < 16; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  static Vec load(const float* p) {
    return convert(p, [](float x) { return x; });
  }
  static Vec load_bf16(const std::uint16_t* p) { return convert(p, bf16_to_f32); }
  static Vec load_bf16_of_pairs(const std::uint16_t* p, int i) {
    Vec r;
    for (int lane = 0; lane < 16; ++lane) r.v[lane] = bf16_to_f32(p[2 * lane + i]);
    return r;
  }
  static Vec load_f16(const std::uint16_t* p) { return convert(p, f16_to_f32); }
  static Vec load_u8(const std::uint8_t* p) {
    return convert(p, [](std::uint8_t x) { return static_cast<float>(x); });
  }
  void store(float* p) const { store_first(p, 16); }
  // Lanes [0, n) only.
  void store_first(float* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};
template <class Op>
inline Vec each(Vec a, Vec b, Op op) {
  for (int i = 0; i < 16; ++i) a.v[i] = op(a.v[i], b.v[i]);
  return a;
}
inline Vec operator+(Vec a, Vec b) {
  return each(a, b, [](float x, float y) { return x + y; });
}
inline Vec operator-(Vec a, Vec b) {
  return each(a, b, [](float x, float y) { return x - y; });
}
inline Vec operator*(Vec a, Vec b) {
  return each(a, b, [](float x, float y) { return x * y; });
}
inline Vec operator/(Vec a, Vec b) {
  return each(a, b, [](float x, float y) { return x / y; });
}
inline Vec max(Vec a, Vec b) {
  return each(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline Vec min(Vec a, Vec b) {
  return each(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
// Same tree as the vector reductions: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
inline float sum(Vec a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
inline float maximum(Vec a) {
  for (int i = 1; i < 16; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
  return a.v[0];
}
// Ties to even, for |a| < 2^22: adding and subtracting 1.5 * 2^23 leaves the rounded integer.
inline Vec round_nearest(Vec a) {
  for (float& lane : a.v) lane = (lane + 12582912.0f) - 12582912.0f;
  return a;
}
// 2^n for integral n in [-126, 127].
inline Vec exp2_integral(Vec n) {
  for (float& lane : n.v) {
    lane = std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<int>(lane) + 127) << 23);
  }
  return n;
}

struct Words {
  std::uint32_t v[16];
  static Words load(const std::uint32_t* p) {
    Words r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  static Words zero() { return {}; }
  static Words load_bytes(const void* p) {
    Words r;
    __builtin_memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static Words load_u16(const std::uint16_t* p) {
    Words r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  void store(std::uint32_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = v[i];
  }
  void store_u16(std::uint16_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint16_t>(v[i]);
  }
};

inline void transpose(Words (&w)[16]) {
  for (int row = 0; row < 16; ++row) {
    for (int lane = 0; lane < row; ++lane) {
      const std::uint32_t word = w[row].v[lane];
      w[row].v[lane] = w[lane].v[row];
      w[lane].v[row] = word;
    }
  }
}

inline Words spread_nibbles(Words w) {
  const auto to_bytes = [](std::uint32_t four) {
    four = (four | four << 8) & 0x00ff00ffu;
    return (four | four << 4) & 0x0f0f0f0fu;
  };
  for (std::uint32_t& word : w.v) word = to_bytes(word & 0xffffu) | to_bytes(word >> 16) << 4;
  return w;
}

inline Words flag_carries(Words flags, Words w, std::uint32_t mask, std::uint32_t addend) {
  for (int i = 0; i < 16; ++i) flags.v[i] |= (w.v[i] & mask) + addend;
  return flags;
}
inline bool any(Words w, std::uint32_t mask) {
  std::uint32_t all = 0;
  for (const std::uint32_t word : w.v) all |= word;
  return (all & mask) != 0;
}

template <WeightFormat F>
inline float value_of(std::uint32_t word, int i) {
  if constexpr (F == WeightFormat::kF32) {
    return std::bit_cast<float>(word);
  } else if constexpr (F == WeightFormat::kBf16) {
    return bf16_to_f32(static_cast<std::uint16_t>(word >> (16 * i)));
  } else if constexpr (F == WeightFormat::kF16) {
    return f16_to_f32(static_cast<std::uint16_t>(word >> (16 * i)));
  } else {
    constexpr int kBits = F == WeightFormat::kInt8 ? 8 : 4;
    const int shift = F == WeightFormat::kInt8 ? 8 * i : int4_shift(i);
    const int q = static_cast<int>((word >> shift) & ((1u << kBits) - 1u));
    return static_cast<float>(q - (1 << (kBits - 1)));
  }
}

template <WeightFormat F>
inline Vec value(Words w, int i) {
  Vec r;
  for (int lane = 0; lane < 16; ++lane) r.v[lane] = value_of<F>(w.v[lane], i);
  return r;
}

inline Words low_nibbles(Words w) {
  for (std::uint32_t& word : w.v) word &= 0x0f0f0f0fu;
  return w;
}
inline Words high_nibbles(Words w) {
  for (std::uint32_t& word : w.v) word = word >> 4 & 0x0f0f0f0fu;
  return w;
}

struct Ints {
  std::int32_t v[16];
  static Ints set(std::int32_t x) {
    Ints r;
    for (std::int32_t& lane : r.v) lane = x;
    return r;
  }
  static Ints load_u8(const std::uint8_t* p) {
    Ints r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
};
inline Ints operator+(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints operator*(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Vec to_floats(Ints a) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
// The integers nearest to each lane, which must lie in [-128, 127], as bytes.
inline void store_i8(Vec a, std::int8_t* p) {
  a = round_nearest(a);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}

template <WeightFormat F>
struct Dots {
  Ints sum;
  static Dots begin(Ints a) { return {a}; }
  void add(Words w, const std::int8_t* x) {
    for (int lane = 0; lane < 16; ++lane) {
      for (int byte = 0; byte < 4; ++byte) {
        sum.v[lane] += static_cast<std::int32_t>(w.v[lane] >> (8 * byte) & 255u) * x[byte];
      }
    }
  }
  Ints end() const { return sum; }
};

constexpr int kDotsTile = 2;
struct Bytes {
  const std::uint8_t* p;
  static Bytes load(const std::uint8_t* p) { return {p}; }
};
struct FourIntegers {
  std::int16_t x[4];
  static void store(std::byte* row, std::int64_t, std::int64_t i, Vec x) {
    for (int lane = 0; lane < 16; ++lane) {
      const auto integer = static_cast<std::int16_t>(x.v[lane]);
      __builtin_memcpy(row + 2 * (i + lane), &integer, sizeof(integer));
    }
  }
  static FourIntegers load(const std::byte* row, std::int64_t, std::int64_t i) {
    FourIntegers r;
    __builtin_memcpy(r.x, row + 2 * i, sizeof(r.x));
    return r;
  }
};
struct ByteDots {
  std::uint32_t v[16];
  static ByteDots zero() { return {}; }
  void add(Bytes b, FourIntegers x) {
    for (int i = 0; i < 64; ++i) v[i / 4] += static_cast<std::uint32_t>(b.p[i] * x.x[i % 4]);
  }
  Vec plus(std::int32_t bias) const {
    Vec r;
    for (int i = 0; i < 16; ++i) {
      r.v[i] =
          static_cast<float>(static_cast<std::int32_t>(v[i] + static_cast<std::uint32_t>(bias)));
    }
    return r;
  }
};
