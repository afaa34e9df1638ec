// 16 float lanes as two AVX2 registers (AVX2, FMA, F16C). Included only by isa_avx2.cpp, inside its
// own anonymous namespace. The interface is described in simd_avx512.h.

struct Vec {
  __m256 lo, hi;
  static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Vec load_bf16(const std::uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
  static Vec load_bf16_of_pairs(const std::uint16_t* p, int i) {
    return {bf16_of_pairs(p, i), bf16_of_pairs(p + 16, i)};
  }
  static Vec load_f16(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static Vec load_u8(const std::uint8_t* p) { return {widen_u8(p), widen_u8(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  // Lanes [0, n) only.
  void store_first(float* p, int n) const {
    float all[16];
    store(all);
    for (int i = 0; i < n; ++i) p[i] = all[i];
  }

 private:
  static __m256 widen_bf16(const std::uint16_t* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static __m256 bf16_of_pairs(const std::uint16_t* p, int i) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(
        i == 0 ? _mm256_slli_epi32(pairs, 16)
               : _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static __m256 widen_u8(const std::uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};
inline Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// Same tree as the AVX-512 reduction: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
inline float sum(Vec a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float maximum(Vec a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline Vec round_nearest(Vec a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline __m256 exp2_integral8(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// 2^n for integral n in [-126, 127].
inline Vec exp2_integral(Vec n) { return {exp2_integral8(n.lo), exp2_integral8(n.hi)}; }

struct Words {
  __m256i lo, hi;
  static Words load(const std::uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
  }
  static Words zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Words load_bytes(const void* p) {
    const auto* halves = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  static Words load_u16(const std::uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  void store(std::uint32_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), hi);
  }
  void store_u16(std::uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8));
  }
};

// Eight rows of eight words; see simd_avx512.h.
inline void transpose8(__m256i (&w)[8]) {
  __m256i pairs[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(w[i], w[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(w[i], w[i + 1]);
  }
  __m256i fours[8];
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    w[c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x20);
    w[4 + c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x31);
  }
}

// Quarters are transposed one by one; the two off the diagonal change places.
inline void transpose(Words (&w)[16]) {
  __m256i quarters[4][8];
  for (int i = 0; i < 8; ++i) {
    quarters[0][i] = w[i].lo;
    quarters[1][i] = w[i].hi;
    quarters[2][i] = w[8 + i].lo;
    quarters[3][i] = w[8 + i].hi;
  }
  for (__m256i(&quarter)[8] : quarters) transpose8(quarter);
  for (int i = 0; i < 8; ++i) {
    w[i] = {quarters[0][i], quarters[2][i]};
    w[8 + i] = {quarters[1][i], quarters[3][i]};
  }
}

inline __m256i spread_nibbles8(__m256i w) {
  const auto to_bytes = [](__m256i four) {
    four = _mm256_and_si256(_mm256_or_si256(four, _mm256_slli_epi32(four, 8)),
                            _mm256_set1_epi32(0x00ff00ff));
    return _mm256_and_si256(_mm256_or_si256(four, _mm256_slli_epi32(four, 4)),
                            _mm256_set1_epi8(15));
  };
  const __m256i low = to_bytes(_mm256_and_si256(w, _mm256_set1_epi32(0xffff)));
  return _mm256_or_si256(low, _mm256_slli_epi32(to_bytes(_mm256_srli_epi32(w, 16)), 4));
}
inline Words spread_nibbles(Words w) { return {spread_nibbles8(w.lo), spread_nibbles8(w.hi)}; }

inline Words flag_carries(Words flags, Words w, std::uint32_t mask, std::uint32_t addend) {
  const __m256i m = _mm256_set1_epi32(static_cast<int>(mask));
  const __m256i a = _mm256_set1_epi32(static_cast<int>(addend));
  return {_mm256_or_si256(flags.lo, _mm256_add_epi32(_mm256_and_si256(w.lo, m), a)),
          _mm256_or_si256(flags.hi, _mm256_add_epi32(_mm256_and_si256(w.hi, m), a))};
}
inline bool any(Words w, std::uint32_t mask) {
  const __m256i m = _mm256_set1_epi32(static_cast<int>(mask));
  return _mm256_testz_si256(_mm256_or_si256(w.lo, w.hi), m) == 0;
}

// See simd_avx512.h.
inline __m256 small_integer(__m256i w, int shift, int mask, int half) {
  const float base = static_cast<float>(1 << (23 - shift));
  const __m256i digit = _mm256_and_si256(w, _mm256_set1_epi32(mask << shift));
  const __m256 joined = _mm256_or_ps(_mm256_castsi256_ps(digit), _mm256_set1_ps(base));
  return _mm256_sub_ps(joined, _mm256_set1_ps(base + static_cast<float>(half)));
}

template <WeightFormat F>
inline __m256 value8(__m256i w, int i) {
  if constexpr (F == WeightFormat::kF32) {
    return _mm256_castsi256_ps(w);
  } else if constexpr (F == WeightFormat::kBf16) {
    return _mm256_castsi256_ps(
        i == 0 ? _mm256_slli_epi32(w, 16)
               : _mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  } else if constexpr (F == WeightFormat::kF16) {
    const __m256i half =
        i == 0 ? _mm256_and_si256(w, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(w, 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return _mm256_cvtph_ps(packed);
  } else if constexpr (F == WeightFormat::kInt8) {
    return small_integer(i < 2 ? w : _mm256_srli_epi32(w, 16), i % 2 * 8, 255, 128);
  } else {
    const int shift = int4_shift(i);
    return shift < 20 ? small_integer(w, shift, 15, 8)
                      : small_integer(_mm256_srli_epi32(w, 16), shift - 16, 15, 8);
  }
}

template <WeightFormat F>
inline Vec value(Words w, int i) {
  return {value8<F>(w.lo, i), value8<F>(w.hi, i)};
}

inline Words low_nibbles(Words w) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w.lo, mask), _mm256_and_si256(w.hi, mask)};
}
inline Words high_nibbles(Words w) {
  return low_nibbles({_mm256_srli_epi32(w.lo, 4), _mm256_srli_epi32(w.hi, 4)});
}

struct Ints {
  __m256i lo, hi;
  static Ints set(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static Ints load_u8(const std::uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
  }
};
inline Ints operator+(Ints a, Ints b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline Ints operator*(Ints a, Ints b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// The integers nearest to each lane, which must lie in [-128, 127], as bytes.
inline void store_i8(Vec a, std::int8_t* p) {
  const __m256i pairs = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline __m256i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

template <WeightFormat F>
struct Dots;
// 8 products of 15 * 128, two at a time, stay below 2^15.
template <>
struct Dots<WeightFormat::kInt4> {
  Ints sum;
  __m256i lo, hi;  // of pairs, 16 bits each
  static Dots begin(Ints a) { return {a, _mm256_setzero_si256(), _mm256_setzero_si256()}; }
  void add(Words w, const std::int8_t* x) {
    const __m256i four = broadcast4(x);
    lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(w.lo, four));
    hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(w.hi, four));
  }
  Ints end() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(lo, ones)),
            _mm256_add_epi32(sum.hi, _mm256_madd_epi16(hi, ones))};
  }
};
// Bytes above 127 could overflow 16 bits: even and odd ones are widened and multiplied apart.
template <>
struct Dots<WeightFormat::kInt8> {
  Ints sum;
  static Dots begin(Ints a) { return {a}; }
  static __m256i add8(__m256i v, __m256i w, __m256i even, __m256i odd) {
    v = _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), even));
    return _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd));
  }
  void add(Words w, const std::int8_t* x) {
    const __m256i four = broadcast4(x);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
    const __m256i odd = _mm256_srai_epi16(four, 8);
    sum = {add8(sum.lo, w.lo, even, odd), add8(sum.hi, w.hi, even, odd)};
  }
  Ints end() const { return sum; }
};

// Bytes and integers meet as 16-bit values, even terms and odd ones apart: a saturating product of
// bytes would not be exact.
constexpr int kDotsTile = 3;  // two registers each; bytes take four, integers two
struct Bytes {
  __m256i even[2], odd[2];  // terms 0, 2 and 1, 3 of 8 lanes each
  static Bytes load(const std::uint8_t* p) {
    Bytes r;
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
      r.even[i] = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
      r.odd[i] = _mm256_srli_epi16(bytes, 8);
    }
    return r;
  }
};
// A row holds integers 0, 2, 1, 3 of each four.
struct FourIntegers {
  __m256i even, odd;
  static void store(std::byte* row, std::int64_t, std::int64_t i, Vec x) {
    __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));
    packed = _mm256_permute4x64_epi64(packed, 0xd8);
    packed = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(packed, 0xd8), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * i), packed);
  }
  static FourIntegers load(const std::byte* row, std::int64_t, std::int64_t i) {
    return {broadcast(row + 2 * i), broadcast(row + 2 * i + 4)};
  }

 private:
  static __m256i broadcast(const std::byte* p) {
    int two;
    __builtin_memcpy(&two, p, sizeof(two));
    return _mm256_set1_epi32(two);
  }
};
struct ByteDots {
  __m256i v[2];  // of 8 lanes each
  static ByteDots zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  void add(const Bytes& b, FourIntegers x) {
    for (int i = 0; i < 2; ++i) {
      v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(b.even[i], x.even));
      v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(b.odd[i], x.odd));
    }
  }
  Vec plus(std::int32_t bias) const {
    const __m256i add = _mm256_set1_epi32(bias);
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(v[0], add)),
            _mm256_cvtepi32_ps(_mm256_add_epi32(v[1], add))};
  }
};
