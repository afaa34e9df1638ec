// The two products of a tile where keys and values are bytes with a scale for each token: exact
// sums of integers, so their order does not matter. Included by attention.inl after
// attention_tiles.inl; must never know of pages or tasks.
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

template <>
std::int64_t lines_of_products<std::uint8_t>(const QueryBlock& block, int n_queries) {
  const int m = n_queries < kDotsQueries ? n_queries : kDotsQueries;
  // Three lines for two rows (multiply): about what memory gives meanwhile, and requests beyond
  // that stall.
  return product_lines(block, (n_queries + m - 1) / m, dots_columns(m), 4) * 3 / 2;
}

// Rows of integers as FourIntegers::store left them.
struct IntegerRows {
  const std::byte* rows;
  std::int64_t n;  // of a row
};

// out[m][n] = sum over k of a[m][k] * b[k][first + n], m < M, n < N * 16.
// Requires depth <= a.n, both multiples of 4.
template <int M, int N>
inline void multiply(ByteDots (&out)[M][N], const IntegerRows& a, const Panel<std::uint8_t>& b,
                     std::int64_t first, std::int64_t depth, Fetcher& fetcher) {
  ByteDots sums[M][N];  // of this function alone: GCC 12 then keeps them in registers
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = ByteDots::zero();
  }
  const std::uint8_t* source = b.rows + first * 4;
  const std::byte* x = a.rows;
  Fetcher ahead = fetcher;
  for (std::int64_t k = 0; k < depth; k += 4, source += b.stride) {
    ahead.take(1);
    if (k % 8 != 0) ahead.take(1);
    Bytes row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = Bytes::load(source + n * 64);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const FourIntegers four = FourIntegers::load(x + m * 2 * a.n, a.n, k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n].add(row[n], four);
    }
  }
  fetcher = ahead;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[m][n] = sums[m][n];
  }
}

// Lanes [0, n) of v, the rest zero.
inline Vec first_lanes(Vec v, std::int64_t n) {
  float lanes[kLanes];
  v.store(lanes);
  return load_first(lanes, n);
}

// Scores of M queries from `query` on at key vectors [first, first + N).
template <int M, int N>
inline void score_columns(Tile& tile, int query, const IntegerQueries& q,
                          const Strip<std::uint8_t>& strip, std::int64_t first) {
  ByteDots out[M][N];
  multiply<M, N>(out, {q.rows + (tile.first + query) * 2 * q.n, q.n}, strip.keys, first * kLanes,
                 q.depth, *tile.fetcher);
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

// Softmax weights of one query times the scales of the values, in the place of its scores. Returns
// the largest of them, NaN when one is not finite; adds the weights to `total`.
inline float scale_weights(Tile& tile, int m, const Strip<std::uint8_t>& strip, float maximum_score,
                           Vec& total) {
  float* row = tile.weights + m * kStripKeys;
  Vec largest = Vec::zero();
  Vec check = Vec::zero();
  for (std::int64_t k = 0; k < tile.visible[m]; k += kLanes) {
    const Vec weight = exp(Vec::load(row + k) - Vec::set(maximum_score));
    total = total + weight;
    Vec scaled = weight * Vec::load(strip.value_scales + k);
    // Scales of tokens never written may be anything.
    if (tile.visible[m] - k < kLanes) scaled = first_lanes(scaled, tile.visible[m] - k);
    scaled.store(row + k);
    largest = max(largest, scaled);
    check = fma(scaled, Vec::zero(), check);
    tile.fetcher->take_share();
  }
  return maximum(largest) + sum(check);
}

// As the weigh() of floats; then weights times scales become integers, whose range is that of the
// strip's largest. One that is NaN makes the scale NaN, so its integer may be anything.
void weigh(Tile& tile, const Strip<std::uint8_t>& strip, float* maxima, float* totals) {
  find_maxima(tile, maxima);
  IntegerWeights& out = tile.integers;
  for (int m = 0; m < kLanes; ++m) out.scales[m] = 0.0f;
  for (int m = 0; m < tile.n_queries; ++m) {
    if (tile.visible[m] == 0) continue;
    Vec total = Vec::zero();
    out.scales[m] = scale_weights(tile, m, strip, maxima[m], total);
    totals[m] = totals[m] * tile.corrections[m] + sum(total);
  }
  // Operand order matters: max gives its second operand when that is NaN. The limit keeps range /
  // peak finite.
  const Vec peaks = max(Vec::set(1e-30f), Vec::load(out.scales));
  float inverses[kLanes];
  (Vec::set(kLargestInteger) / peaks).store(inverses);
  (peaks * Vec::set(1.0f / kLargestInteger)).store(out.scales);
  for (int m = 0; m < tile.n_queries; ++m) {
    if (tile.visible[m] == 0) continue;
    const float* row = tile.weights + m * kStripKeys;
    std::byte* integers = out.rows + m * 2 * kStripKeys;
    const Vec inverse = Vec::set(inverses[m]);
    Vec bias = Vec::zero();
    std::int64_t k = 0;
    for (; k < tile.visible[m]; k += kLanes) {
      const Vec integer = round_nearest(Vec::load(row + k) * inverse);
      bias = bias + integer;
      FourIntegers::store(integers, kStripKeys, k, integer);
    }
    for (; k < kStripKeys; k += kLanes) {
      FourIntegers::store(integers, kStripKeys, k, Vec::zero());
    }
    // Exact: below 2^24. NaN, which no integer is, has made the scale NaN already.
    const float of_row = sum(bias);
    out.biases[m] = of_row == of_row ? -128 * static_cast<std::int32_t>(of_row) : 0;
  }
}

template <int M, int N>
inline void value_columns(Tile& tile, int query, const Panel<std::uint8_t>& values, std::int64_t j,
                          std::int64_t depth) {
  const IntegerWeights& weights = tile.integers;
  const std::int64_t width = values.stride / 4;
  const std::int64_t n_vecs = (width + kLanes - 1) / kLanes;
  ByteDots out[M][N];
  multiply<M, N>(out, {weights.rows + query * 2 * kStripKeys, kStripKeys}, values,
                 value_offset(j, width), depth, *tile.fetcher);
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
void add_run(Tile& tile, int query, int run, const Panel<std::uint8_t>& values,
             std::int64_t depth) {
  if constexpr (M > 1) {
    if (run < M) return add_run<M - 1>(tile, query, run, values, depth);
  }
  constexpr int kColumns = dots_columns(M);
  const std::int64_t width = values.stride / 4;
  const std::int64_t n_whole = width / kLanes;
  std::int64_t j = 0;
  for (; j + kColumns <= n_whole; j += kColumns) {
    value_columns<M, kColumns>(tile, query, values, j, depth);
  }
  for (; j * kLanes < width; ++j) value_columns<M, 1>(tile, query, values, j, depth);
}

// All queries that see a key of the strip go together: 0 times a byte is 0, whatever it is.
void add_values(Tile& tile, const Strip<std::uint8_t>& strip) {
  int first = 0;
  while (tile.visible[first] == 0) ++first;
  const std::int64_t depth = (tile.visible[tile.n_queries - 1] + 3) / 4 * 4;
  for (int m = first; m < tile.n_queries; m += kDotsQueries) {
    add_run<kDotsQueries>(tile, m, tile.n_queries - m, strip.values, depth);
  }
}

// The block's queries, which load_block() has written as floats, as integers.
inline void prepare_queries(const QueryBlock& block, const std::uint8_t*) {
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
