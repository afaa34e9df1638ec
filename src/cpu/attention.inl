// Causal attention of a block of query rows over the pages of one kv head, by online softmax:
// memory does not grow with the context. Included inside the anonymous namespace of each isa_*.cpp
// after rows.inl; must never know of threads, nor call an inline function of std.
//
//              strip: up to 64 keys of one page
//           +------------------+        +-----------+
//   queries | q . k  -> weight |   x    | values    |  -> merged into sums [queries, head_dim]
//   of tile |  [6 x 64] stack  |        | [64 x hd] |     (sums = sums * correction + product)
//           +------------------+        +-----------+
//
// A query is one row and one of the heads sharing the kv head: query = row * group + head. Tiles
// only decide which queries share a load of keys and values. Every query has its own chain of
// operations: over head_dim in order for a score, over its own visible keys in order for a strip's
// product, strip after strip from the start of a piece (piece_start), and piece after piece. Strips
// are cut from page and piece starts. So its result is bit-identical for every task, cut and batch.

constexpr std::int64_t kStripKeys = 64;
// Accumulators a tile may hold, in Vecs: 24 of 32 registers on AVX-512; 6 pairs of 16 on AVX2; the
// rest of the registers hold keys or values. alignof tells the three vector types apart.
constexpr int kTileVecs = alignof(Vec) == 64 ? 24 : alignof(Vec) == 32 ? 6 : 2;
constexpr int kTileQueries = kTileVecs < 6 ? kTileVecs : 6;
// Columns (Vecs) a tile of m queries takes at once.
constexpr int tile_columns(int m) { return kTileVecs / m >= 4 ? 4 : kTileVecs / m >= 2 ? 2 : 1; }

struct QueryBlock {
  std::int64_t head_dim;
  std::int64_t n_vecs;  // that cover head_dim
  std::int64_t n_queries;
  float* q;  // [n_queries, head_dim], times head_dim^-0.5
};

// What is known of each query's attention to the keys seen so far. One after the other in memory.
struct Sums {
  float* values;  // [n_queries, n_vecs * 16], vector j holding dims value_offset(j) + 0..15
  float* maxima;  // [n_queries] largest score; -infinity while no key was seen
  float* totals;  // [n_queries] sum of weights; 0 while no key was seen, else 1 or more, or NaN
};

// Rows of keys or values as they lie in a page.
template <class T>
struct Panel {
  const T* rows;
  std::int64_t stride;
  std::intptr_t ahead;  // bytes to the same place of the next strip, 0 where there is none
};

template <class T>
struct Strip {
  Panel<T> keys;    // [head_dim][page_size]
  Panel<T> values;  // [n_keys][head_dim, at least 16]
  std::int64_t n_keys;
};

// One tile at one strip.
struct Tile {
  int n_queries;
  float* q;  // of the block, at the tile's first query
  float* sums;
  std::int64_t visible[kTileQueries];  // keys of the strip each query sees, ascending
  float weights[kTileQueries * kStripKeys];
  float corrections[kLanes];
};

inline Vec load_kv(const float* p) { return Vec::load(p); }
inline Vec load_kv(const std::uint16_t* p) { return Vec::load_bf16(p); }
inline void fetch(const void* p, std::intptr_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::intptr_t>(p) + ahead), 0,
                     2);
}

// The last vector overlaps its neighbour when head_dim is no multiple of 16, so no load leaves its
// row.
inline std::int64_t value_offset(std::int64_t j, std::int64_t head_dim) {
  return (j + 1) * kLanes <= head_dim ? j * kLanes : head_dim - kLanes;
}

// out[m][n] = sum over k in order of a[m][k] * b[k][first + n], m < M, n < N * 16. Fetches the next
// strip meanwhile, a line for each line used: the hardware does not foresee where pages lie, and
// fetching a strip at one blow leaves nothing to overlap with. Measured on Zen 4, one row, pages in
// DRAM: 1.6 times the bytes per second with AVX-512, 3 times with AVX2. A prefetch never faults.
template <int M, int N, class T>
inline void multiply(Vec (&out)[M][N], const float* a, std::int64_t a_stride, const Panel<T>& b,
                     std::int64_t first, std::int64_t depth) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[m][n] = Vec::zero();
  }
  const T* source = b.rows + first;
  for (std::int64_t k = 0; k < depth; ++k, source += b.stride) {
    Vec row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      row[n] = load_kv(source + n * kLanes);
      fetch(source + n * kLanes, b.ahead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::set(a[m * a_stride + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) out[m][n] = fma(x, row[n], out[m][n]);
    }
  }
}

// Scores of M queries at key vectors [first, first + N).
template <int M, int N, class T>
inline void score_columns(Tile& tile, const Strip<T>& strip, std::int64_t head_dim,
                          std::int64_t first) {
  Vec out[M][N];
  multiply<M, N>(out, tile.q, head_dim, strip.keys, first * kLanes, head_dim);
  for (int m = 0; m < M; ++m) {
    float* scores = tile.weights + m * kStripKeys + first * kLanes;
    for (int n = 0; n < N; ++n) out[m][n].store(scores + n * kLanes);
  }
}

// Scores of the whole tile (M is lowered to its number of queries) at n_vecs key vectors. Slots
// never written are read here too; their lanes are masked by weigh().
template <int M, class T>
void score(Tile& tile, const Strip<T>& strip, std::int64_t head_dim, std::int64_t n_vecs) {
  if constexpr (M > 1) {
    if (tile.n_queries < M) return score<M - 1>(tile, strip, head_dim, n_vecs);
  }
  constexpr int kColumns = tile_columns(M);
  std::int64_t j = 0;
  for (; j + kColumns <= n_vecs; j += kColumns) {
    score_columns<M, kColumns>(tile, strip, head_dim, j);
  }
  for (; j < n_vecs; ++j) score_columns<M, 1>(tile, strip, head_dim, j);
}

// Turns the scores of each query into softmax weights against its new maximum, exactly 0 past its
// last visible key, and finds the factor by which its earlier sums shrink. maxima, totals: the
// tile's.
inline void weigh(Tile& tile, float* maxima, float* totals) {
  constexpr float kInfinity = __builtin_inff();
  float strip_totals[kLanes] = {};
  for (float& correction : tile.corrections) correction = 0.0f;
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
    Vec total = Vec::zero();
    for (std::int64_t k = 0; k < padded; k += kLanes) {
      const Vec weight = exp(Vec::load(row + k) - Vec::set(new_maximum));
      weight.store(row + k);
      total = total + weight;
    }
    tile.corrections[m] = maxima[m] - new_maximum;
    strip_totals[m] = sum(total);
    maxima[m] = new_maximum;
  }
  exp(Vec::load(tile.corrections)).store(tile.corrections);
  for (int m = 0; m < tile.n_queries; ++m) {
    if (tile.visible[m] > 0) totals[m] = totals[m] * tile.corrections[m] + strip_totals[m];
  }
}

// A strip's product is summed from zero and merged once: 64 rounded additions, then one for each
// strip, rather than one for each key of a million.
template <int M, int N, class T>
inline void value_columns(Tile& tile, int query, const Panel<T>& values, std::int64_t j) {
  const std::int64_t head_dim = values.stride;
  const std::int64_t n_vecs = (head_dim + kLanes - 1) / kLanes;
  Vec out[M][N];
  multiply<M, N>(out, tile.weights + query * kStripKeys, kStripKeys, values,
                 value_offset(j, head_dim), tile.visible[query]);
  for (int m = 0; m < M; ++m) {
    const Vec correction = Vec::set(tile.corrections[query + m]);
    float* sums = tile.sums + ((query + m) * n_vecs + j) * kLanes;
    for (int n = 0; n < N; ++n) {
      fma(Vec::load(sums + n * kLanes), correction, out[m][n]).store(sums + n * kLanes);
    }
  }
}

// Merges the strip's values into queries [query, query + run), which all see the same keys. Reads
// no value past them: 0 * NaN would be NaN.
template <int M, class T>
void add_values(Tile& tile, int query, int run, const Panel<T>& values) {
  const std::int64_t head_dim = values.stride;
  if constexpr (M > 1) {
    if (run < M) return add_values<M - 1>(tile, query, run, values);
  }
  constexpr int kColumns = tile_columns(M);
  const std::int64_t n_whole = head_dim / kLanes;
  std::int64_t j = 0;
  for (; j + kColumns <= n_whole; j += kColumns) {
    value_columns<M, kColumns>(tile, query, values, j);
  }
  for (; j * kLanes < head_dim; ++j) value_columns<M, 1>(tile, query, values, j);
}

// Merges one strip into every query of the block that sees some of it. `first_visible` is the
// number of keys query 0 sees of the strip (not clamped); each further row sees one more.
template <class T>
void attend_strip(const QueryBlock& block, const Sums& sums, const Strip<T>& strip,
                  std::int64_t first_visible, std::int64_t group) {
  Tile tile;
  for (std::int64_t first = 0; first < block.n_queries; first += kTileQueries) {
    const std::int64_t left = block.n_queries - first;
    tile.n_queries = static_cast<int>(left < kTileQueries ? left : kTileQueries);
    tile.q = block.q + first * block.head_dim;
    tile.sums = sums.values + first * block.n_vecs * kLanes;
    for (int m = 0; m < tile.n_queries; ++m) {
      const std::int64_t seen = first_visible + (first + m) / group;
      tile.visible[m] = seen < 0 ? 0 : seen < strip.n_keys ? seen : strip.n_keys;
    }
    const std::int64_t most = tile.visible[tile.n_queries - 1];
    if (most == 0) continue;
    score<kTileQueries>(tile, strip, block.head_dim, (most + kLanes - 1) / kLanes);
    weigh(tile, sums.maxima + first, sums.totals + first);
    for (int m = 0, end = 0; m < tile.n_queries; m = end) {
      while (end < tile.n_queries && tile.visible[end] == tile.visible[m]) ++end;
      if (tile.visible[m] == 0) continue;
      add_values<kTileQueries>(tile, m, end - m, strip.values);
    }
  }
}

// Rows of fewer than 16 values cannot be loaded whole from a page without leaving it: heads that
// small are widened here, once for each strip. Not a speed any model needs.
template <class T>
void widen_values(T* wide, const T* values, std::int64_t n_keys, std::int64_t head_dim) {
  for (std::int64_t key = 0; key < n_keys; ++key) {
    for (std::int64_t d = 0; d < kLanes; ++d) {
      wide[key * kLanes + d] = d < head_dim ? values[key * head_dim + d] : T{0};
    }
  }
}

// The strip that begins at key index `start` of the sequence and ends before `end`.
template <class T>
Strip<T> find_strip(const AttendTask& task, std::int64_t start, std::int64_t end) {
  const KvPages& pages = *task.pages;
  const std::int32_t page = task.span->pages[start / pages.page_size];
  const std::int64_t key = start % pages.page_size;
  std::int64_t n_keys = pages.page_size - key;
  if (n_keys > kStripKeys) n_keys = kStripKeys;
  if (n_keys > end - start) n_keys = end - start;
  const T* keys =
      reinterpret_cast<const T*>(kv_head_base(pages, page, task.kv_layer, task.kv_head));
  const T* values = keys + (pages.page_size + key) * pages.head_dim;
  return {{keys + key, pages.page_size, 0}, {values, pages.head_dim, 0}, n_keys};
}

template <class T>
std::intptr_t bytes_between(const Panel<T>& from, const Panel<T>& to) {
  return reinterpret_cast<std::intptr_t>(to.rows) - reinterpret_cast<std::intptr_t>(from.rows);
}

inline std::int64_t group_of(const AttendTask& task) {
  return task.n_heads / task.pages->n_kv_heads;
}
inline std::int64_t first_index_of(const AttendTask& task) {
  return task.span->first_index + (task.first_row - task.span->first_row);
}

// Keys of one piece, strip by strip. `last_key`: where the task's keys end, up to which strips of
// the next piece are fetched.
template <class T>
void attend_piece(const AttendTask& task, const QueryBlock& block, const Sums& sums,
                  std::int64_t piece, std::int64_t last_key) {
  const std::int64_t visible = first_index_of(task) + 1;  // to the block's first row
  const std::int64_t next_piece = piece_start(piece + 1);
  const std::int64_t end = next_piece < last_key ? next_piece : last_key;
  T wide[kStripKeys * kLanes];
  Strip<T> next = find_strip<T>(task, piece_start(piece), end);
  for (std::int64_t start = piece_start(piece); start < end;) {
    Strip<T> strip = next;
    const std::int64_t strip_end = start + strip.n_keys;
    if (strip_end < last_key) {
      next = find_strip<T>(task, strip_end, strip_end < end ? end : last_key);
      strip.keys.ahead = bytes_between(strip.keys, next.keys);
      strip.values.ahead = bytes_between(strip.values, next.values);
    }
    if (block.head_dim < kLanes) {
      widen_values(wide, strip.values.rows, strip.n_keys, block.head_dim);
      strip.values = {wide, kLanes, 0};
    }
    attend_strip(block, sums, strip, visible - start, group_of(task));
    start = strip_end;
  }
}

inline std::int64_t vecs_of(const AttendTask& task) {
  return (task.pages->head_dim + kLanes - 1) / kLanes;
}
inline std::int64_t queries_of(const AttendTask& task) { return task.n_rows * group_of(task); }

std::size_t attend_partial_floats(const AttendTask& task) {
  return static_cast<std::size_t>(queries_of(task) * (vecs_of(task) * kLanes + 2));
}

std::size_t attend_scratch_floats(const AttendTask& task) {
  const std::size_t q = static_cast<std::size_t>(queries_of(task) * task.pages->head_dim);
  return q + 2 * attend_partial_floats(task);
}

inline Sums place_sums(const AttendTask& task, float* memory) {
  float* maxima = memory + queries_of(task) * vecs_of(task) * kLanes;
  return {memory, maxima, maxima + queries_of(task)};
}

inline void clear(const AttendTask& task, const Sums& sums) {
  for (std::int64_t i = 0; i < queries_of(task) * vecs_of(task); ++i) {
    Vec::zero().store(sums.values + i * kLanes);
  }
  for (std::int64_t i = 0; i < queries_of(task); ++i) {
    sums.maxima[i] = -__builtin_inff();
    sums.totals[i] = 0.0f;
  }
}

// into: the pieces up to `part`, of which every query saw the first.
inline void merge(const AttendTask& task, const Sums& into, const Sums& part) {
  const std::int64_t n_vecs = vecs_of(task);
  for (std::int64_t i = 0; i < queries_of(task); ++i) {
    if (part.totals[i] == 0.0f) continue;
    const bool larger = part.maxima[i] > into.maxima[i];
    const float new_maximum = larger ? part.maxima[i] : into.maxima[i];
    const Vec shrink_into = exp(Vec::set(into.maxima[i] - new_maximum));
    const Vec shrink_part = exp(Vec::set(part.maxima[i] - new_maximum));
    float factors[2 * kLanes];
    shrink_into.store(factors);
    shrink_part.store(factors + kLanes);
    into.maxima[i] = new_maximum;
    into.totals[i] = into.totals[i] * factors[0] + part.totals[i] * factors[kLanes];
    for (std::int64_t j = i * n_vecs; j < (i + 1) * n_vecs; ++j) {
      const Vec grown = Vec::load(part.values + j * kLanes) * shrink_part;
      fma(Vec::load(into.values + j * kLanes), shrink_into, grown).store(into.values + j * kLanes);
    }
  }
}

inline QueryBlock load_block(const AttendTask& task, float* scratch) {
  const std::int64_t group = group_of(task);
  const std::int64_t head_dim = task.pages->head_dim;
  const QueryBlock block = {head_dim, vecs_of(task), queries_of(task), scratch};
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  for (std::int64_t i = 0; i < block.n_queries; ++i) {
    const std::int64_t head = task.kv_head * group + i % group;
    const float* q = task.q + (task.first_row + i / group) * task.q_stride + head * head_dim;
    for (std::int64_t d = 0; d < head_dim; ++d) block.q[i * head_dim + d] = q[d] * scale;
  }
  return block;
}

inline void store_result(const AttendTask& task, const Sums& sums) {
  const std::int64_t group = group_of(task);
  const std::int64_t head_dim = task.pages->head_dim;
  const std::int64_t width = head_dim < kLanes ? kLanes : head_dim;
  for (std::int64_t i = 0; i < queries_of(task); ++i) {
    const std::int64_t head = task.kv_head * group + i % group;
    float* y = task.y + (task.first_row + i / group) * task.y_stride + head * head_dim;
    const float* values = sums.values + i * vecs_of(task) * kLanes;
    for (std::int64_t j = 0; j < vecs_of(task); ++j) {
      const std::int64_t offset = value_offset(j, width);
      for (std::int64_t d = 0; d < kLanes && offset + d < head_dim; ++d) {
        y[offset + d] = values[j * kLanes + d] / sums.totals[i];
      }
    }
  }
}

template <class T>
void attend_pieces(const AttendTask& task, float* scratch) {
  const QueryBlock block = load_block(task, scratch);
  const Sums merged = place_sums(task, block.q + block.n_queries * block.head_dim);
  const auto partial = static_cast<std::int64_t>(attend_partial_floats(task));
  const std::int64_t n_keys = first_index_of(task) + task.n_rows;
  const std::int64_t run_end = piece_start(task.last_piece);
  const std::int64_t last_key = run_end < n_keys ? run_end : n_keys;
  for (std::int64_t piece = task.first_piece; piece < task.last_piece; ++piece) {
    Sums part = merged;
    if (task.partials != nullptr) {
      part = place_sums(task, task.partials + piece * partial);
    } else if (piece > 0) {
      part = place_sums(task, merged.values + partial);
    }
    clear(task, part);
    attend_piece<T>(task, block, part, piece, last_key);
    if (task.partials == nullptr && piece > 0) merge(task, merged, part);
  }
  if (task.partials == nullptr) store_result(task, merged);
}

void attend(const AttendTask& task, float* scratch) {
  if (task.pages->type == KvType::kF32) {
    attend_pieces<float>(task, scratch);
  } else {
    attend_pieces<std::uint16_t>(task, scratch);
  }
}

void merge_attention(const AttendTask& task) {
  const auto partial = static_cast<std::int64_t>(attend_partial_floats(task));
  const Sums merged = place_sums(task, task.partials);
  for (std::int64_t piece = 1; piece < task.last_piece; ++piece) {
    merge(task, merged, place_sums(task, task.partials + piece * partial));
  }
  store_result(task, merged);
}
