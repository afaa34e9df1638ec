// Causal attention of a block of query rows over the pages of some kv heads, by online softmax:
// memory does not grow with the context. Included inside the anonymous namespace of isa_*.cpp after
// attention_tiles.inl and the attention_*.inl of the types of cache it is used for; must never know
// of threads, nor call an inline function of std.
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

// Merges one strip into every query of the block that sees some of it. `first_visible` is the
// number of keys query 0 sees of the strip (not clamped); each further row sees `more` more.
template <class T>
void attend_strip(const QueryBlock& block, const Sums& sums, const Strip<T>& strip,
                  std::int64_t first_visible, std::int64_t more, std::int64_t group,
                  Fetcher& fetcher) {
  Tile tile;
  tile.fetcher = &fetcher;
  for (std::int64_t first = 0; first < block.n_queries; first += kTileQueries) {
    const std::int64_t left = block.n_queries - first;
    tile.n_queries = static_cast<int>(left < kTileQueries ? left : kTileQueries);
    tile.first = first;
    tile.q = block.q + first * block.head_dim;
    tile.sums = sums.values + first * block.n_vecs * kLanes;
    for (int m = 0; m < tile.n_queries; ++m) {
      const std::int64_t seen = first_visible + (first + m) / group * more;
      tile.visible[m] = seen < 0 ? 0 : seen < strip.n_keys ? seen : strip.n_keys;
    }
    const std::int64_t most = tile.visible[tile.n_queries - 1];
    if (most == 0) continue;
    score(tile, block, strip, (most + kLanes - 1) / kLanes);
    weigh(tile, strip, sums.maxima + first, sums.totals + first);
    add_values(tile, strip);
  }
}

// Where a task's strips are: it goes through a page's keys for one kv head after the other, as they
// lie in memory, which is what the hardware reads best.
struct Place {
  std::int64_t page_key;  // the first of the page's that the task sees
  std::int64_t key;
  std::int64_t kv_head;
};

// What comes after n_keys at `place`; keys end at `end`.
inline Place next_place(const AttendTask& task, const Place& place, std::int64_t n_keys,
                        std::int64_t end) {
  const std::int64_t page_size = task.pages->page_size;
  const std::int64_t page_end = (place.key / page_size + 1) * page_size;
  const std::int64_t key = place.key + n_keys;
  if (key < (page_end < end ? page_end : end)) return {place.page_key, key, place.kv_head};
  if (place.kv_head + 1 < task.last_kv_head) {
    return {place.page_key, place.page_key, place.kv_head + 1};
  }
  return {key, key, task.first_kv_head};
}

inline KvBlock find_block(const AttendTask& task, const Place& place) {
  const KvPages& pages = *task.pages;
  const std::int32_t page = task.span->pages[place.key / pages.page_size];
  return find_kv_block(pages, page, task.kv_layer, place.kv_head, place.key % pages.page_size);
}

// The first n_keys of a block from its token on.
template <class T>
Strip<T> find_strip(const KvPages& pages, const KvBlock& block, std::int64_t n_keys) {
  const std::int64_t width = kv_width(pages.head_dim);
  const T* keys = reinterpret_cast<const T*>(block.keys) + block.token * kPerLane<T>;
  const T* values = reinterpret_cast<const T*>(block.values) + block.token * width;
  return {{keys, block.n_tokens * kPerLane<T>},
          {values, width * kPerLane<T>},
          block.key_scales + block.token,
          block.value_scales + block.token,
          n_keys};
}

// Lines of a strip that the softmax of the first tile fetches with each vector of weights, so that
// with those of its products all are fetched.
template <class T>
std::int64_t weights_share(const KvPages& pages, const QueryBlock& block) {
  const int n_queries =
      static_cast<int>(block.n_queries < kTileQueries ? block.n_queries : kTileQueries);
  const std::int64_t n_lines = kStripKeys * kv_token_bytes(pages) / 64;
  const std::int64_t left = n_lines - lines_of_products<T>(block, n_queries);
  const std::int64_t n_vectors = n_queries * kStripKeys / kLanes;
  return left > 0 ? (left + n_vectors - 1) / n_vectors : 0;
}

inline std::int64_t group_of(const AttendTask& task) {
  return task.n_heads / task.pages->n_kv_heads;
}
inline std::int64_t first_index_of(const AttendTask& task) {
  return task.span->first_index + (task.first_row - task.span->first_row);
}
// Of the task's last row.
inline std::int64_t keys_of(const AttendTask& task) {
  return task.causal ? first_index_of(task) + task.n_rows
                     : task.span->first_index + task.span->n_rows;
}

inline std::int64_t vecs_of(const AttendTask& task) {
  return (kv_width(task.pages->head_dim) + kLanes - 1) / kLanes;
}
inline std::int64_t queries_of(const AttendTask& task) { return task.n_rows * group_of(task); }

inline std::int64_t kv_heads_of(const AttendTask& task) {
  return task.last_kv_head - task.first_kv_head;
}

inline std::size_t attend_partial_floats(const AttendTask& task) {
  return static_cast<std::size_t>(queries_of(task) * (vecs_of(task) * kLanes + 2));
}

// Floats that the integers of one query take: a row of 16-bit values, its scale and its bias.
inline std::int64_t integer_floats(const AttendTask& task) {
  return task.pages->type == KvType::kInt8 ? vecs_of(task) * kLanes / 2 + 2 : 0;
}

// Floats of one kv head's queries.
inline std::int64_t query_floats(const AttendTask& task) {
  return queries_of(task) * (task.pages->head_dim + integer_floats(task));
}

// Queries of every kv head, then the sums of all pieces so far, then those of one piece.
inline std::size_t attend_scratch_floats(const AttendTask& task) {
  const std::size_t of_a_head =
      static_cast<std::size_t>(query_floats(task)) + 2 * attend_partial_floats(task);
  return static_cast<std::size_t>(kv_heads_of(task)) * of_a_head;
}

inline Sums place_sums(const AttendTask& task, float* memory) {
  float* maxima = memory + queries_of(task) * vecs_of(task) * kLanes;
  return {memory, maxima, maxima + queries_of(task)};
}

// Sums of one kv head after the other, `stride` floats apart.
struct HeadSums {
  float* first;
  std::int64_t stride;
};
inline Sums sums_of(const AttendTask& task, const HeadSums& sums, std::int64_t kv_head) {
  return place_sums(task, sums.first + (kv_head - task.first_kv_head) * sums.stride);
}
inline HeadSums partial_sums(const AttendTask& task, std::int64_t piece) {
  const auto floats = static_cast<std::int64_t>(attend_partial_floats(task));
  const std::int64_t stride = task.n_pieces * floats;
  return {task.partials + task.first_kv_head * stride + piece * floats, stride};
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

inline void place_integers(const AttendTask& task, QueryBlock& block) {
  float* integers = block.q + block.n_queries * block.head_dim;
  block.integers.n = vecs_of(task) * kLanes;
  block.integers.depth = (block.head_dim + 3) / 4 * 4;
  block.integers.rows = reinterpret_cast<std::byte*>(integers);
  block.integers.scales = integers + block.n_queries * block.integers.n / 2;
  block.integers.biases = reinterpret_cast<std::int32_t*>(block.integers.scales + block.n_queries);
}

// The block's queries as what keys of type T are multiplied by.
template <class T>
void prepare_queries(const QueryBlock&, const T*) {}

// scratch: of the task's first kv head.
inline QueryBlock place_block(const AttendTask& task, std::int64_t kv_head, float* scratch) {
  float* q = scratch + (kv_head - task.first_kv_head) * query_floats(task);
  QueryBlock block = {task.pages->head_dim, vecs_of(task), queries_of(task), q, {}};
  if (task.pages->type == KvType::kInt8) place_integers(task, block);
  return block;
}

template <class T>
void load_queries(const AttendTask& task, std::int64_t kv_head, const QueryBlock& block) {
  const std::int64_t group = group_of(task);
  const std::int64_t head_dim = task.pages->head_dim;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  for (std::int64_t i = 0; i < block.n_queries; ++i) {
    const std::int64_t head = kv_head * group + i % group;
    const float* q = task.q + (task.first_row + i / group) * task.q_stride + head * head_dim;
    for (std::int64_t d = 0; d < head_dim; ++d) block.q[i * head_dim + d] = q[d] * scale;
  }
  prepare_queries(block, static_cast<const T*>(nullptr));
}

inline void store_result(const AttendTask& task, std::int64_t kv_head, const Sums& sums) {
  const std::int64_t group = group_of(task);
  const std::int64_t head_dim = task.pages->head_dim;
  const std::int64_t width = kv_width(head_dim);
  for (std::int64_t i = 0; i < queries_of(task); ++i) {
    const std::int64_t head = kv_head * group + i % group;
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

// Keys of one piece, strip by strip. scratch: the queries. `last_key`: where the task's keys end,
// up to which strips of the next piece are fetched.
template <class T>
void attend_piece(const AttendTask& task, const HeadSums& sums, std::int64_t piece,
                  std::int64_t last_key, float* scratch) {
  // To the block's first row, and what each further one sees besides.
  const std::int64_t visible = task.causal ? first_index_of(task) + 1 : keys_of(task);
  const std::int64_t more = task.causal ? 1 : 0;
  const std::int64_t next_piece = piece_start(piece + 1);
  const std::int64_t end = next_piece < last_key ? next_piece : last_key;
  Place place = {piece_start(piece), piece_start(piece), task.first_kv_head};
  KvBlock next = find_block(task, place);
  while (place.key < end) {
    const KvBlock here = next;
    const std::int64_t left = here.n_tokens - here.token;
    const std::int64_t n_keys = left < end - place.key ? left : end - place.key;
    const Place following = next_place(task, place, n_keys, end);
    const QueryBlock block = place_block(task, place.kv_head, scratch);
    Fetcher fetcher = {here.keys, here.keys, 0};
    if (following.key < last_key) {
      next = find_block(task, following);
      const std::int64_t n_bytes = next.n_tokens * kv_token_bytes(*task.pages);
      fetcher = {next.keys, next.keys + n_bytes - 64, weights_share<T>(*task.pages, block)};
    }
    attend_strip(block, sums_of(task, sums, place.kv_head),
                 find_strip<T>(*task.pages, here, n_keys), visible - place.key, more,
                 group_of(task), fetcher);
    place = following;
  }
}

template <class T>
void attend_pieces(const AttendTask& task, float* scratch) {
  const auto partial = static_cast<std::int64_t>(attend_partial_floats(task));
  const HeadSums merged = {scratch + kv_heads_of(task) * query_floats(task), partial};
  const HeadSums of_piece = {merged.first + kv_heads_of(task) * partial, partial};
  for (std::int64_t h = task.first_kv_head; h < task.last_kv_head; ++h) {
    load_queries<T>(task, h, place_block(task, h, scratch));
  }
  const std::int64_t n_keys = keys_of(task);
  const std::int64_t run_end = piece_start(task.last_piece);
  const std::int64_t last_key = run_end < n_keys ? run_end : n_keys;
  for (std::int64_t piece = task.first_piece; piece < task.last_piece; ++piece) {
    const bool is_partial = task.partials != nullptr;
    const HeadSums part = is_partial ? partial_sums(task, piece) : piece > 0 ? of_piece : merged;
    for (std::int64_t h = task.first_kv_head; h < task.last_kv_head; ++h) {
      clear(task, sums_of(task, part, h));
    }
    attend_piece<T>(task, part, piece, last_key, scratch);
    if (is_partial || piece == 0) continue;
    for (std::int64_t h = task.first_kv_head; h < task.last_kv_head; ++h) {
      merge(task, sums_of(task, merged, h), sums_of(task, part, h));
    }
  }
  if (task.partials != nullptr) return;
  for (std::int64_t h = task.first_kv_head; h < task.last_kv_head; ++h) {
    store_result(task, h, sums_of(task, merged, h));
  }
}

inline void merge_attention(const AttendTask& task) {
  for (std::int64_t h = task.first_kv_head; h < task.last_kv_head; ++h) {
    const Sums merged = sums_of(task, partial_sums(task, 0), h);
    for (std::int64_t piece = 1; piece < task.n_pieces; ++piece) {
      merge(task, merged, sums_of(task, partial_sums(task, piece), h));
    }
    store_result(task, h, merged);
  }
}
