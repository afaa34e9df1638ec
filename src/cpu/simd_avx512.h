// 16 float lanes on AVX-512 (F, BW, DQ, VL). Included only by isa_avx512.cpp, inside its own
// anonymous namespace so that nothing compiled for AVX-512 can be linked anywhere else.
// The interface, shared by simd_avx2.h and simd_scalar.h:
//   Vec: set zero load load_bf16 load_f16 load_u8 store store_first, + - * / max min,
//        fma(a, b, c) = a * b + c, round_nearest, exp2_integral,
//        sum and maximum over lanes in a fixed order
//   Words: load; value<Format>(w, i): value i of each word as floats (q - 2^(bits-1) when scaled),
//        low_nibbles and high_nibbles: the two halves of each byte, as bytes;
//        for packing: zero, load_bytes, load_u16 (one to a word) and their stores, transpose,
//        spread_nibbles: eight int4, lowest bits first, as packed.h wants them,
//        flag_carries: flags | ((w & mask) + addend), any: whether a word has a bit of mask
//   Ints: 16 int32 lanes: set load_u8, + *, to_floats
//   Dots<Format>: sums of products of unsigned bytes with four int8 that all lanes share; begin
//        from Ints, add at most kDotWords words, end as Ints. Exact for int4 below 16 and any int8.
//        load_bf16_of_pairs(p, i): element i of each of 16 pairs
//   Sums of products of bytes with integers up to kLargestInteger, exact while the true sum fits 32
//   bits: Bytes: load, 16 lanes of 4 bytes. FourIntegers: store(row, n, i, x), integers i to i + 15
//   of a row of n that takes 2 n bytes; load(row, n, i), integers i to i + 3. ByteDots: zero;
//   add(bytes, integers): lane += their products; plus(bias): as floats. kDotsTile: ByteDots that
//   fit the registers.

struct Vec {
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_bf16(const std::uint16_t* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load_bf16_of_pairs(const std::uint16_t* p, int i) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(
        i == 0 ? _mm512_slli_epi32(pairs, 16)
               : _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static Vec load_f16(const std::uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load_u8(const std::uint8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Lanes [0, n) only.
  void store_first(float* p, int n) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec round_nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for integral n in [-126, 127].
inline Vec exp2_integral(Vec n) {
  const __m512i bits =
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_castsi512_ps(bits)};
}

struct Words {
  __m512i v;
  static Words load(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  static Words zero() { return {_mm512_setzero_si512()}; }
  static Words load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
  static Words load_u16(const std::uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(std::uint32_t* p) const { _mm512_storeu_si512(p, v); }
  void store_u16(std::uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
};

// Word i of row r becomes word r of row i: pairs, fours, then quarters of a register change places.
inline void transpose(Words (&w)[16]) {
  __m512i pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(w[i].v, w[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_epi32(w[i].v, w[i + 1].v);
  }
  __m512i fours[16];  // [4 a + c]: word 4 q + c of rows 4 a .. 4 a + 3 in quarter q
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    w[c].v = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    w[4 + c].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    w[8 + c].v = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    w[12 + c].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// In a byte of two neighbouring int4 the first stays and the second moves up a byte.
inline __m512i nibbles_to_bytes(__m512i four) {
  four = _mm512_and_si512(_mm512_or_si512(four, _mm512_slli_epi32(four, 8)),
                          _mm512_set1_epi32(0x00ff00ff));
  return _mm512_and_si512(_mm512_or_si512(four, _mm512_slli_epi32(four, 4)), _mm512_set1_epi8(15));
}
inline Words spread_nibbles(Words w) {
  const __m512i low = nibbles_to_bytes(_mm512_and_si512(w.v, _mm512_set1_epi32(0xffff)));
  const __m512i high = nibbles_to_bytes(_mm512_srli_epi32(w.v, 16));
  return {_mm512_or_si512(low, _mm512_slli_epi32(high, 4))};
}

inline Words flag_carries(Words flags, Words w, std::uint32_t mask, std::uint32_t addend) {
  const __m512i field = _mm512_and_si512(w.v, _mm512_set1_epi32(static_cast<int>(mask)));
  const __m512i sum = _mm512_add_epi32(field, _mm512_set1_epi32(static_cast<int>(addend)));
  return {_mm512_or_si512(flags.v, sum)};
}
inline bool any(Words w, std::uint32_t mask) {
  return _mm512_test_epi32_mask(w.v, _mm512_set1_epi32(static_cast<int>(mask))) != 0;
}

// The bits `kMask << shift` of each word, an unsigned number below 2^bits, minus `half`. Put under
// the exponent of 2^(23 - shift) those bits count units, so one subtraction leaves the exact float:
// no conversion, and three different execution ports.  Requires shift + bits <= 23.
inline __m512 small_integer(__m512i w, int shift, int mask, int half) {
  const float base = static_cast<float>(1 << (23 - shift));
  const __m512i bits = _mm512_castps_si512(_mm512_set1_ps(base));
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i joined =
      _mm512_ternarylogic_epi32(w, _mm512_set1_epi32(mask << shift), bits, kAndOr);
  return _mm512_sub_ps(_mm512_castsi512_ps(joined),
                       _mm512_set1_ps(base + static_cast<float>(half)));
}

template <WeightFormat F>
inline Vec value(Words w, int i) {
  if constexpr (F == WeightFormat::kF32) {
    return {_mm512_castsi512_ps(w.v)};
  } else if constexpr (F == WeightFormat::kBf16) {
    return {_mm512_castsi512_ps(
        i == 0 ? _mm512_slli_epi32(w.v, 16)
               : _mm512_and_si512(w.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  } else if constexpr (F == WeightFormat::kF16) {
    const __m512i half = i == 0 ? w.v : _mm512_srli_epi32(w.v, 16);
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half))};
  } else if constexpr (F == WeightFormat::kInt8) {
    return {small_integer(i < 2 ? w.v : _mm512_srli_epi32(w.v, 16), i % 2 * 8, 255, 128)};
  } else if (i % 4 == 1) {
    return {small_integer(w.v, int4_shift(i), 15, 8)};
  } else {
    // A table lookup, which reads only the low four bits of each lane. One value in four is formed
    // otherwise to spread the work over the execution ports.
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm512_permutexvar_ps(
        i == 0 ? w.v : _mm512_srli_epi32(w.v, static_cast<unsigned>(int4_shift(i))), table)};
  }
}

inline Words low_nibbles(Words w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
inline Words high_nibbles(Words w) {
  return {_mm512_and_si512(_mm512_srli_epi32(w.v, 4), _mm512_set1_epi8(15))};
}

struct Ints {
  __m512i v;
  static Ints set(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
  static Ints load_u8(const std::uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
};
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
// The integers nearest to each lane, which must lie in [-128, 127], as bytes.
inline void store_i8(Vec a, std::int8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline __m512i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

#ifdef __AVX512VNNI__
template <WeightFormat F>
struct Dots {
  __m512i v;
  static Dots begin(Ints a) { return {a.v}; }
  void add(Words w, const std::int8_t* x) { v = _mm512_dpbusd_epi32(v, w.v, broadcast4(x)); }
  Ints end() const { return {v}; }
};
#else
template <WeightFormat F>
struct Dots;
// 8 products of 15 * 128, two at a time, stay below 2^15.
template <>
struct Dots<WeightFormat::kInt4> {
  __m512i v, pairs;
  static Dots begin(Ints a) { return {a.v, _mm512_setzero_si512()}; }
  void add(Words w, const std::int8_t* x) {
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w.v, broadcast4(x)));
  }
  Ints end() const { return {_mm512_add_epi32(v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))}; }
};
// Bytes above 127 could overflow 16 bits: even and odd ones are widened and multiplied apart.
template <>
struct Dots<WeightFormat::kInt8> {
  __m512i v;
  static Dots begin(Ints a) { return {a.v}; }
  void add(Words w, const std::int8_t* x) {
    const __m512i four = broadcast4(x);
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8);
    const __m512i odd = _mm512_srai_epi16(four, 8);
    const __m512i low = _mm512_and_si512(w.v, _mm512_set1_epi16(255));
    v = _mm512_add_epi32(v, _mm512_madd_epi16(low, even));
    v = _mm512_add_epi32(v, _mm512_madd_epi16(_mm512_srli_epi16(w.v, 8), odd));
  }
  Ints end() const { return {v}; }
};
#endif

constexpr int kDotsTile = 12;
#if defined(__AVX512VNNI__)
// An integer is high * 256 + low, two signed bytes: VNNI multiplies bytes only, but four at a time.
struct Bytes {
  __m512i v;
  static Bytes load(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
};
struct FourIntegers {
  __m512i low, high;
  static void store(std::byte* row, std::int64_t n, std::int64_t i, Vec x) {
    const __m512i integers = _mm512_cvtps_epi32(x.v);
    const __m128i low = _mm512_cvtepi32_epi8(integers);
    const __m512i rest = _mm512_sub_epi32(integers, _mm512_cvtepi8_epi32(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + n + i),
                     _mm512_cvtepi32_epi8(_mm512_srai_epi32(rest, 8)));
  }
  static FourIntegers load(const std::byte* row, std::int64_t n, std::int64_t i) {
    return {broadcast(row + i), broadcast(row + n + i)};
  }

 private:
  static __m512i broadcast(const std::byte* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof(four));
    return _mm512_set1_epi32(four);
  }
};
struct ByteDots {
  __m512i low, high;
  static ByteDots zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  void add(Bytes b, FourIntegers x) {
    add_products(low, b.v, x.low);
    add_products(high, b.v, x.high);
  }
  Vec plus(std::int32_t bias) const {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_set1_epi32(bias)))};
  }

 private:
  // _mm512_dpbusd_epi32, of which GCC 12 writes every result to memory inside a loop.
  static void add_products(__m512i& sums, __m512i bytes, __m512i integers) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(integers));
  }
};
#else
// Bytes and integers meet as 16-bit values.
struct Bytes {
  __m512i v[2];
  static Bytes load(const std::uint8_t* p) {
    const auto* halves = reinterpret_cast<const __m256i*>(p);
    return {{_mm512_cvtepu8_epi16(_mm256_loadu_si256(halves)),
             _mm512_cvtepu8_epi16(_mm256_loadu_si256(halves + 1))}};
  }
};
struct FourIntegers {
  __m512i v;
  static void store(std::byte* row, std::int64_t, std::int64_t i, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * i),
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
  }
  static FourIntegers load(const std::byte* row, std::int64_t, std::int64_t i) {
    long long four;
    __builtin_memcpy(&four, row + 2 * i, sizeof(four));
    return {_mm512_set1_epi64(four)};
  }
};
struct ByteDots {
  __m512i v[2];  // of 8 lanes each: terms 0, 1 and terms 2, 3 apart
  static ByteDots zero() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
  void add(const Bytes& b, FourIntegers x) {
    v[0] = _mm512_add_epi32(v[0], _mm512_madd_epi16(b.v[0], x.v));
    v[1] = _mm512_add_epi32(v[1], _mm512_madd_epi16(b.v[1], x.v));
  }
  Vec plus(std::int32_t bias) const {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_permutex2var_epi32(v[0], even, v[1]),
                                         _mm512_permutex2var_epi32(v[0], odd, v[1]));
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_set1_epi32(bias)))};
  }
};
#endif
