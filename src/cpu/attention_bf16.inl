// Attention where keys and values are bf16 and so is what they are multiplied by, a query or a
// strip's weights: one instruction adds two products to each of 16 float32 sums. Included by
// isa_avx512bf16.cpp after attention_tiles.inl; must never know of pages or tasks.
//
// Every sum is one chain over pairs in order, whatever the tile, so bits depend on nothing else.
// The softmax divides by the sum of the rounded weights: it is those that the values are given.

// An element of the cache that is multiplied as it is; a std::uint16_t is widened first.
struct Bf16 {
  std::uint16_t bits;
};

// Writes x as bf16 where a row of floats has its floats i / 2 to i / 2 + 7, and returns that: a row
// is rounded in place from its first float to its last.
inline __m256bh round_in_place(float* row, std::int64_t i, __m512 x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  auto* to = reinterpret_cast<std::byte*>(row) + 2 * i;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)rounded);
  return rounded;
}

// 2^x within 3e-6 of it, a thousandth of what rounding to bf16 adds; exactly 1 at 0, +0 at
// -infinity.
// x = n + r, n = floor(x), polynomial of r fitted to the least relative error on [0, 1).
inline __m512 exp2(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.342669e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.224247e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4128021e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9304484e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// As the weigh() of floats; weights are rounded in place.
void weigh(Tile& tile, const Strip<Bf16>&, float* maxima, float* totals) {
  find_maxima(tile, maxima);
  const __m512 log2_e = _mm512_set1_ps(1.44269504f);
  const auto ones = (__m256bh)_mm256_set1_epi16(0x3f80);
  for (int m = 0; m < tile.n_queries; ++m) {
    if (tile.visible[m] == 0) continue;
    float* row = tile.weights + m * kStripKeys;
    const __m512 maximum = _mm512_set1_ps(maxima[m]);
    __m256 total = _mm256_setzero_ps();
    for (std::int64_t k = 0; k < tile.visible[m]; k += kLanes) {
      const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(row + k), maximum);
      const __m256bh weights = round_in_place(row, k, exp2(_mm512_mul_ps(below, log2_e)));
      total = _mm256_dpbf16_ps(total, weights, ones);
      tile.fetcher->take_share();
    }
    totals[m] = totals[m] * tile.corrections[m] + sum({_mm512_zextps256_ps512(total)});
  }
}

// The block's queries, rounded in place, a zero after the last.
inline void prepare_queries(const QueryBlock& block, const Bf16*) {
  const std::int64_t n = block.head_dim;
  for (std::int64_t i = 0; i < block.n_queries; ++i) {
    float* q = block.q + i * n;
    float last[kLanes] = {};
    for (std::int64_t d = n / kLanes * kLanes; d < n; ++d) last[d % kLanes] = q[d];
    for (std::int64_t d = 0; d + kLanes <= n; d += kLanes) {
      round_in_place(q, d, _mm512_loadu_ps(q + d));
    }
    round_in_place(last, 0, _mm512_loadu_ps(last));
    // An even number of them: what n leaves and the zero.
    const std::int64_t left = (n % kLanes + 1) / 2 * 2;
    auto* end = reinterpret_cast<std::byte*>(q) + 2 * (n / kLanes * kLanes);
    __builtin_memcpy(end, last, static_cast<std::size_t>(2 * left));
  }
}

// Elements 2 pair and 2 pair + 1 of a rounded row, for all lanes.
inline __m512i load_pair(const float* row, std::int64_t pair) {
  std::int32_t two;
  __builtin_memcpy(&two, row + pair, sizeof(two));
  return _mm512_set1_epi32(two);
}

// out[m][n] = sum over k in order of a[m][k] * b[k][first + n], m < M, n < N * 16. Rows of a are
// rounded; an odd depth needs a zero after it.
template <int M, int N>
inline void multiply(Vec (&out)[M][N], const float* a, std::int64_t a_stride, const Panel<Bf16>& b,
                     std::int64_t first, std::int64_t depth, Fetcher& fetcher) {
  __m512 sums[M][N];  // of this function alone: GCC 12 then keeps them in registers
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  Fetcher ahead = fetcher;
  const Bf16* source = b.rows + first * 2;
  for (std::int64_t pair = 0; pair < (depth + 1) / 2; ++pair, source += b.stride) {
    ahead.take(fetches(N));
    __m512i row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = _mm512_loadu_si512(source + n * 2 * kLanes);
    if (2 * pair + 1 == depth) {
      // The term past the depth may be of a token never written: 0 * NaN would be NaN.
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) row[n] = _mm512_and_si512(row[n], _mm512_set1_epi32(0xffff));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto x = (__m512bh)load_pair(a + m * a_stride, pair);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)row[n], x);
    }
  }
  fetcher = ahead;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[m][n] = {sums[m][n]};
  }
}
