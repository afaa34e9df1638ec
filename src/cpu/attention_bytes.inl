// The two products of a tile where keys and values are bytes with a scale for each token: exact sums
// of integers, so their order does not matter. Included by attention.inl after attention_tiles.inl.
//
// The other factor, a query or a strip's weights times the values' scales, becomes integers of 16
// bits with a scale of its own: with 8 bits its rounding would add as much error again as that of
// keys and values, and bandwidth, not arithmetic, limits what this type is for. Bytes are biased by
// 128, so `bias` takes 128 * (sum of the integers) from each sum.

// High * 256 + low of two signed bytes (simd_avx512.h).
constexpr float kLargestInteger = 32639.0f;

// Queries of a tile whose sums fit the registers, and vectors beside each other.
constexpr int kDotsQueries = kDotsTile < kTileQueries ? kDotsTile : kTileQueries;
constexpr int dots_columns(int m) { return kDotsTile / m >= 2 ? 2 : 1; }

// Rows of integers as FourIntegers::store left them.
struct IntegerRows {
  const std::byte* rows;
  std::int64_t n;  // of a row
};

// out[m][n] = sum over k of a[m][k] * b[k][first + n], m < M, n < N * 16. Fetches the next strip
// meanwhile.  Requires depth <= a.n, both multiples of 4.
template <int M, int N>
inline void multiply(Dots (&out)[M][N], const IntegerRows& a, const Panel<std::uint8_t>& b,
                     std::int64_t first, std::int64_t depth) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[m][n] = Dots::zero();
  }
  const std::uint8_t* source = b.rows + first * 4;
  for (std::int64_t k = 0; k < depth; k += 4, source += b.stride) {
    Bytes row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      row[n] = Bytes::load(source + n * 64);
      fetch(source + n * 64, b.ahead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const FourIntegers x = FourIntegers::load(a.rows + m * 2 * a.n, a.n, k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) out[m][n].add(row[n], x);
    }
  }
}

// Scores of M queries from `query` on at key vectors [first, first + N).
template <int M, int N>
inline void score_columns(Tile& tile, int query, const IntegerQueries& q,
                          const Strip<std::uint8_t>& strip, std::int64_t first) {
  Dots out[M][N];
  multiply<M, N>(out, {q.rows + (tile.first + query) * 2 * q.n, q.n}, strip.keys, first * kLanes,
                 q.depth);
  for (int m = 0; m < M; ++m) {
    const Vec scale = Vec::set(q.scales[tile.first + query + m]);
    float* scores = tile.weights + (query + m) * kStripKeys + first * kLanes;
    for (int n = 0; n < N; ++n) {
      const Vec key_scales = Vec::load(strip.key_scales + (first + n) * kLanes);
      const Vec sums = out[m][n].plus(q.biases[tile.first + query + m]);
      (sums * (key_scales * scale)).store(scores + n * kLanes);
    }
  }
}

template <int M>
void score_run(Tile& tile, int query, int run, const IntegerQueries& q,
               const Strip<std::uint8_t>& strip, std::int64_t n_vecs) {
  if constexpr (M > 1) {
    if (run < M) return score_run<M - 1>(tile, query, run, q, strip, n_vecs);
  }
  constexpr int kColumns = dots_columns(M);
  std::int64_t j = 0;
  for (; j + kColumns <= n_vecs; j += kColumns) {
    score_columns<M, kColumns>(tile, query, q, strip, j);
  }
  for (; j < n_vecs; ++j) score_columns<M, 1>(tile, query, q, strip, j);
}

void score(Tile& tile, const QueryBlock& block, const Strip<std::uint8_t>& strip,
           std::int64_t n_vecs) {
  for (int m = 0; m < tile.n_queries; m += kDotsQueries) {
    score_run<kDotsQueries>(tile, m, tile.n_queries - m, block.integers, strip, n_vecs);
  }
}

// Weights times the scales of values, as integers; those of keys not seen are 0.
struct IntegerWeights {
  alignas(64) std::byte rows[kTileQueries * 2 * kStripKeys];
  float scales[kTileQueries];
  std::int32_t biases[kTileQueries];
};

inline void to_integers(IntegerWeights& out, int m, Tile& tile, const float* value_scales) {
  float* row = tile.weights + m * kStripKeys;
  const std::int64_t visible = tile.visible[m];
  const std::int64_t padded = (visible + kLanes - 1) / kLanes * kLanes;
  for (std::int64_t k = 0; k < padded; k += kLanes) {
    (Vec::load(row + k) * Vec::load(value_scales + k)).store(row + k);
  }
  // Scales of tokens never written may be anything.
  for (std::int64_t k = visible; k < kStripKeys; ++k) row[k] = 0.0f;
  const IntegerScale s = integer_scale(row, kStripKeys, kLargestInteger);
  Vec total = Vec::zero();
  for (std::int64_t k = 0; k < kStripKeys; k += kLanes) {
    const Vec integers = to_integers(Vec::load(row + k), s);
    total = total + integers;
    FourIntegers::store(out.rows + m * 2 * kStripKeys, kStripKeys, k, integers);
  }
  out.scales[m] = s.scale;
  out.biases[m] = -128 * static_cast<std::int32_t>(sum(total));  // exact: below 2^24
}

template <int M, int N>
inline void value_columns(Tile& tile, int query, const IntegerWeights& weights,
                          const Panel<std::uint8_t>& values, std::int64_t j, std::int64_t depth) {
  const std::int64_t width = values.stride / 4;
  const std::int64_t n_vecs = (width + kLanes - 1) / kLanes;
  Dots out[M][N];
  multiply<M, N>(out, {weights.rows + query * 2 * kStripKeys, kStripKeys}, values,
                 value_offset(j, width), depth);
  for (int m = 0; m < M; ++m) {
    const Vec correction = Vec::set(tile.corrections[query + m]);
    const Vec scale = Vec::set(weights.scales[query + m]);
    float* sums = tile.sums + ((query + m) * n_vecs + j) * kLanes;
    for (int n = 0; n < N; ++n) {
      const Vec added = out[m][n].plus(weights.biases[query + m]) * scale;
      fma(Vec::load(sums + n * kLanes), correction, added).store(sums + n * kLanes);
    }
  }
}

template <int M>
void add_run(Tile& tile, int query, int run, const IntegerWeights& weights,
             const Panel<std::uint8_t>& values, std::int64_t depth) {
  if constexpr (M > 1) {
    if (run < M) return add_run<M - 1>(tile, query, run, weights, values, depth);
  }
  constexpr int kColumns = dots_columns(M);
  const std::int64_t width = values.stride / 4;
  const std::int64_t n_whole = width / kLanes;
  std::int64_t j = 0;
  for (; j + kColumns <= n_whole; j += kColumns) {
    value_columns<M, kColumns>(tile, query, weights, values, j, depth);
  }
  for (; j * kLanes < width; ++j) value_columns<M, 1>(tile, query, weights, values, j, depth);
}

// All queries that see a key of the strip go together: 0 times a byte is 0, whatever it is.
void add_values(Tile& tile, const Strip<std::uint8_t>& strip) {
  IntegerWeights weights;
  int first = 0;
  while (tile.visible[first] == 0) ++first;
  for (int m = first; m < tile.n_queries; ++m) to_integers(weights, m, tile, strip.value_scales);
  const std::int64_t depth = (tile.visible[tile.n_queries - 1] + 3) / 4 * 4;
  for (int m = first; m < tile.n_queries; m += kDotsQueries) {
    add_run<kDotsQueries>(tile, m, tile.n_queries - m, weights, strip.values, depth);
  }
}

// The block's queries, which load_block() has written as floats, as integers.
inline void convert_queries(const QueryBlock& block) {
  const IntegerQueries& out = block.integers;
  // Exact sums of integers in float32, and of products in 32 bits: 127 * head_dim * range < 2^31.
  const float range = 16777216.0f / static_cast<float>(block.head_dim);
  for (std::int64_t i = 0; i < block.n_queries; ++i) {
    const float* q = block.q + i * block.head_dim;
    const IntegerScale s =
        integer_scale(q, block.head_dim, range < kLargestInteger ? range : kLargestInteger);
    Vec total = Vec::zero();
    for (std::int64_t d = 0; d < out.n; d += kLanes) {
      const std::int64_t left = block.head_dim - d;
      const Vec x = left >= kLanes ? Vec::load(q + d) : load_first(q + d, left);
      const Vec integers = to_integers(x, s);
      total = total + integers;
      FourIntegers::store(out.rows + i * 2 * out.n, out.n, d, integers);
    }
    out.scales[i] = s.scale;
    out.biases[i] = -128 * static_cast<std::int32_t>(sum(total));
  }
}
