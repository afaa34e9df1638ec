// One strip of keys and values against one tile of queries: scores, softmax weights, sums of
// values. Included by attention.inl, which says what strips and tiles are; must never know of pages
// or tasks.

constexpr std::int64_t kStripKeys = 64;  // a block of a page (KvBlock)
// Accumulators a tile may hold, in Vecs: 24 of 32 registers on AVX-512; 6 pairs of 16 on AVX2; the
// rest of the registers hold keys or values. alignof tells the three vector types apart.
constexpr int kTileVecs = alignof(Vec) == 64 ? 24 : alignof(Vec) == 32 ? 6 : 2;
constexpr int kTileQueries = kTileVecs < 6 ? kTileVecs : 6;
// Columns (Vecs) a tile of m queries takes at once.
constexpr int tile_columns(int m) { return kTileVecs / m >= 4 ? 4 : kTileVecs / m >= 2 ? 2 : 1; }

// Queries as integers, for keys of bytes (attention_bytes.inl).
struct IntegerQueries {
  std::byte* rows = nullptr;       // [n_queries] of FourIntegers::store
  std::int64_t n = 0;              // integers of a row: head_dim and zeros
  std::int64_t depth = 0;          // head_dim in whole lanes
  float* scales = nullptr;         // [n_queries], times head_dim^-0.5
  std::int32_t* biases = nullptr;  // [n_queries]
};

struct QueryBlock {
  std::int64_t head_dim;
  std::int64_t n_vecs;  // that cover a row of values
  std::int64_t n_queries;
  float* q;  // [n_queries, head_dim], times head_dim^-0.5
  IntegerQueries integers;
};

// What is known of each query's attention to the keys seen so far. One after the other in memory.
struct Sums {
  float* values;  // [n_queries, n_vecs * 16], vector j holding dims value_offset(j) + 0..15
  float* maxima;  // [n_queries] largest score; -infinity while no key was seen
  float* totals;  // [n_queries] sum of weights; 0 while no key was seen, else 1 or more, or NaN
};

// Elements of one term of the sums as they lie in a page: a row holds kPerLane<T> terms of every
// token (keys) or dimension (values), see find_kv_block.
template <class T>
constexpr int kPerLane = 4 / sizeof(T);
template <class T>
struct Panel {
  const T* rows;
  std::int64_t stride;
};

template <class T>
struct Strip {
  Panel<T> keys;    // over head_dim
  Panel<T> values;  // over tokens
  const float* key_scales;
  const float* value_scales;
  std::int64_t n_keys;
};

// Fetches the next strip while this one is computed: the hardware does
// not foresee where pages lie. Evenly over all the work, softmax included, or memory idles then;
// a strip at one blow leaves nothing to overlap with. A prefetch never faults.
struct Fetcher {
  const std::byte* next = nullptr;
  const std::byte* last = nullptr;  // line; fetched again and again at the end, which costs nothing
  std::int64_t share = 0;           // lines for each vector of weights

  inline void take(int n_lines) {
#pragma GCC unroll 8
    for (int i = 0; i < n_lines; ++i) {
      __builtin_prefetch(next, 0, 3);
      next = next + 64 < last ? next + 64 : last;
    }
  }
  inline void take_share() {
    for (std::int64_t i = 0; i < share && next < last; ++i) take(1);
  }
};

// Weights times the scales of values, as integers; those of keys not seen are 0
// (attention_bytes.inl).
struct IntegerWeights {
  alignas(64) std::byte rows[kTileQueries * 2 * kStripKeys];
  float scales[kLanes];
  std::int32_t biases[kTileQueries];
};

// One tile at one strip.
struct Tile {
  int n_queries;
  std::int64_t first;  // query of the block
  float* q;            // of the block, at the tile's first query, like sums
  float* sums;
  std::int64_t visible[kTileQueries];  // keys of the strip each query sees, ascending
  float weights[kTileQueries * kStripKeys];
  float corrections[kLanes];  // by which earlier sums shrink
  IntegerWeights integers;
  Fetcher* fetcher;
};

// Term i of each of 16 lanes.
inline Vec load_term(const float* p, int) { return Vec::load(p); }
inline Vec load_term(const std::uint16_t* p, int i) { return Vec::load_bf16_of_pairs(p, i); }
// The last vector overlaps its neighbour when the width is no multiple of 16, so no load leaves its
// row.
inline std::int64_t value_offset(std::int64_t j, std::int64_t width) {
  return (j + 1) * kLanes <= width ? j * kLanes : width - kLanes;
}

// out[m][n] += sum over i < kTerms of a[m][i] * term i of vector n of the row at `source`.
template <int kTerms, int M, int N, class T>
inline void multiply_row(Vec (&out)[M][N], const float* a, std::int64_t a_stride, const T* source) {
#pragma GCC unroll 8
  for (int i = 0; i < kTerms; ++i) {
    Vec row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load_term(source + n * kLanes * kPerLane<T>, i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::set(a[m * a_stride + i]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) out[m][n] = fma(x, row[n], out[m][n]);
    }
  }
}

// Lines to fetch with each row of N vectors: some are left for the softmax.
constexpr int fetches(int n) { return n > 1 ? n - 1 : 1; }

// Lines of the two products of one tile with a strip of 64 keys, in `runs` of n columns.
inline std::int64_t product_lines(const QueryBlock& block, int runs, int n, std::int64_t per_lane) {
  const std::int64_t key_rows = block.head_dim / per_lane * (kStripKeys / kLanes / n);
  const std::int64_t value_rows = kStripKeys / per_lane * (block.n_vecs / n);
  return runs * (key_rows + value_rows) * fetches(n);
}
template <class T>
std::int64_t lines_of_products(const QueryBlock& block, int n_queries) {
  return product_lines(block, 1, tile_columns(n_queries), kPerLane<T>);
}

// out[m][n] = sum over k in order of a[m][k] * b[k][first + n], m < M, n < N * 16.
template <int M, int N, class T>
inline void multiply(Vec (&out)[M][N], const float* a, std::int64_t a_stride, const Panel<T>& b,
                     std::int64_t first, std::int64_t depth, Fetcher& fetcher) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[m][n] = Vec::zero();
  }
  Fetcher ahead = fetcher;
  const T* source = b.rows + first * kPerLane<T>;
  std::int64_t k = 0;
  for (; k + kPerLane<T> <= depth; k += kPerLane<T>, source += b.stride) {
    ahead.take(fetches(N));
    multiply_row<kPerLane<T>>(out, a + k, a_stride, source);
  }
  fetcher = ahead;
  // A term past the depth may be of a token never written: 0 * NaN would be NaN.
  if (k < depth) multiply_row<1>(out, a + k, a_stride, source);
}

// Scores of M queries at key vectors [first, first + N).
template <int M, int N, class T>
inline void score_columns(Tile& tile, const Strip<T>& strip, std::int64_t head_dim,
                          std::int64_t first) {
  Vec out[M][N];
  multiply<M, N>(out, tile.q, head_dim, strip.keys, first * kLanes, head_dim, *tile.fetcher);
  for (int m = 0; m < M; ++m) {
    float* scores = tile.weights + m * kStripKeys + first * kLanes;
    for (int n = 0; n < N; ++n) out[m][n].store(scores + n * kLanes);
  }
}

// Scores of the whole tile (M is lowered to its number of queries) at n_vecs key vectors. Slots
// never written are read here too; their lanes are masked by weigh().
template <int M, class T>
void score_tile(Tile& tile, const Strip<T>& strip, std::int64_t head_dim, std::int64_t n_vecs) {
  if constexpr (M > 1) {
    if (tile.n_queries < M) return score_tile<M - 1>(tile, strip, head_dim, n_vecs);
  }
  constexpr int kColumns = tile_columns(M);
  std::int64_t j = 0;
  for (; j + kColumns <= n_vecs; j += kColumns) {
    score_columns<M, kColumns>(tile, strip, head_dim, j);
  }
  for (; j < n_vecs; ++j) score_columns<M, 1>(tile, strip, head_dim, j);
}

template <class T>
void score(Tile& tile, const QueryBlock& block, const Strip<T>& strip, std::int64_t n_vecs) {
  score_tile<kTileQueries>(tile, strip, block.head_dim, n_vecs);
}

// Raises each query's maximum to the strip's and masks the keys it does not see. maxima: the
// tile's.
inline void find_maxima(Tile& tile, float* maxima) {
  constexpr float kInfinity = __builtin_inff();
  for (int m = 0; m < kLanes; ++m) tile.corrections[m] = 0.0f;
  for (int m = 0; m < tile.n_queries; ++m) {
    if (tile.visible[m] == 0) continue;
    float* row = tile.weights + m * kStripKeys;
    const std::int64_t padded = (tile.visible[m] + kLanes - 1) / kLanes * kLanes;
    for (std::int64_t k = tile.visible[m]; k < padded; ++k) row[k] = -kInfinity;
    Vec largest = Vec::load(row);
    for (std::int64_t k = kLanes; k < padded; k += kLanes) {
      largest = max(largest, Vec::load(row + k));
    }
    const float strip_maximum = maximum(largest);
    const float new_maximum = strip_maximum > maxima[m] ? strip_maximum : maxima[m];
    tile.corrections[m] = maxima[m] - new_maximum;
    maxima[m] = new_maximum;
  }
  exp(Vec::load(tile.corrections)).store(tile.corrections);
}

// Turns the scores of each query into softmax weights against its new maximum, exactly 0 past its
// last visible key. maxima, totals: the tile's.
template <class T>
void weigh(Tile& tile, const Strip<T>&, float* maxima, float* totals) {
  find_maxima(tile, maxima);
  for (int m = 0; m < tile.n_queries; ++m) {
    if (tile.visible[m] == 0) continue;
    float* row = tile.weights + m * kStripKeys;
    Vec total = Vec::zero();
    for (std::int64_t k = 0; k < tile.visible[m]; k += kLanes) {
      const Vec weight = exp(Vec::load(row + k) - Vec::set(maxima[m]));
      weight.store(row + k);
      total = total + weight;
      tile.fetcher->take_share();
    }
    totals[m] = totals[m] * tile.corrections[m] + sum(total);
  }
}

// A strip's product is summed from zero and merged once: 64 rounded additions, then one for each
// strip, rather than one for each key of a million.
template <int M, int N, class T>
inline void value_columns(Tile& tile, int query, const Panel<T>& values, std::int64_t j) {
  const std::int64_t width = values.stride / kPerLane<T>;
  const std::int64_t n_vecs = (width + kLanes - 1) / kLanes;
  Vec out[M][N];
  multiply<M, N>(out, tile.weights + query * kStripKeys, kStripKeys, values, value_offset(j, width),
                 tile.visible[query], *tile.fetcher);
  for (int m = 0; m < M; ++m) {
    const Vec correction = Vec::set(tile.corrections[query + m]);
    float* sums = tile.sums + ((query + m) * n_vecs + j) * kLanes;
    for (int n = 0; n < N; ++n) {
      fma(Vec::load(sums + n * kLanes), correction, out[m][n]).store(sums + n * kLanes);
    }
  }
}

// Merges the strip's values into queries [query, query + run), which all see the same keys.
template <int M, class T>
void add_run(Tile& tile, int query, int run, const Panel<T>& values) {
  if constexpr (M > 1) {
    if (run < M) return add_run<M - 1>(tile, query, run, values);
  }
  constexpr int kColumns = tile_columns(M);
  const std::int64_t width = values.stride / kPerLane<T>;
  const std::int64_t n_whole = width / kLanes;
  std::int64_t j = 0;
  for (; j + kColumns <= n_whole; j += kColumns) {
    value_columns<M, kColumns>(tile, query, values, j);
  }
  for (; j * kLanes < width; ++j) value_columns<M, 1>(tile, query, values, j);
}

// Reads no value past those a query sees: 0 * NaN would be NaN.
template <class T>
void add_values(Tile& tile, const Strip<T>& strip) {
  for (int m = 0, end = 0; m < tile.n_queries; m = end) {
    while (end < tile.n_queries && tile.visible[end] == tile.visible[m]) ++end;
    if (tile.visible[m] > 0) add_run<kTileQueries>(tile, m, end - m, strip.values);
  }
}
