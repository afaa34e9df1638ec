// Attention of many queries on any GPU from sm_80 on: scores, softmax and the sum of values in one
// pass over paged keys, by mma.sync ("FlashAttention-2", arXiv 2307.08691). What is computed, and
// of what: attention.h.

// ---- layout ----
//
//   block   64 queries of one kv head, 16 rows for each of 4 warps; keys in tiles of 64
//
//   halves  keys of tile 0, values of tile 0, keys of tile 1, ...: half n in slot n % kSlots of a
//           ring, as they lie in memory; a tile of 8-bit values is expanded to bf16 beside it
//   a half  [64 keys][kDim] bf16; piece p of 16 bytes of row r lies at r * kRowBytes +
//           (p ^ r % 8) * 16, so that eight rows' pieces meet all banks
//
//   a warp  s = q k^T   [16 x 64] float32, in the registers where mma leaves sums
//           p = exp2    the same registers, rounded in pairs, are operand A of p v
//           o += p v    [16 x kDim] float32
//
// One barrier for each half: when all came, the half is there and nobody reads the one before,
// whose slot the next copies may take. Three slots (two for kDim = 256, whose queries would not fit
// registers and lie in shared memory): 48 KB for kDim = 128, so three blocks share a
// multiprocessor of sm_80, and while one waits or exponentiates, the others multiply.
//
// Bound by the tensor cores at best, in practice by shared memory: 16 rows for each fragment of
// keys mean 4 cycles of loads for the 4 cycles of tensor cores (sm_80) that use it.

#include "ops/attention_many.cuh"

#include <cmath>

#include "ops/instances.h"

namespace camelid::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kScoreTiles = kKeyTile / 8;  // of 16 x 8 sums
static_assert(kManyQueries == kWarps * 16);

// What lies where in shared memory, in bytes.
template <int kDim, KvFormat kFormat>
struct Memory {
  static constexpr bool kScaled = kFormat != KvFormat::kBf16;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kHalfBytes = kKeyTile * kRowBytes;  // in bf16
  static constexpr int kStoredRow = kScaled ? kDim : kRowBytes;
  static constexpr int kSlots = kDim == 256 ? 2 : 3;
  static constexpr int kSlotBytes = kKeyTile * kStoredRow;
  // Two, unless less than the 99 KB that small GPUs have would remain for them.
  static constexpr int kExpanded = !kScaled ? 0 : kDim == 256 ? 1 : 2;
  static constexpr int kExpandedAt = kSlots * kSlotBytes;
  static constexpr bool kQueriesStay = kDim == 256;
  static constexpr int kQueriesBehind = kExpandedAt + kExpanded * kHalfBytes;
  // Queries on their way to registers lie where the last half to be copied will.
  static constexpr int kQueriesAt = kQueriesStay ? kQueriesBehind
                                    : kScaled    ? kExpandedAt + kHalfBytes
                                                 : (kSlots - 1) * kSlotBytes;
  static constexpr int kScalesAt = kQueriesBehind + (kQueriesStay ? kHalfBytes : 0);
  static constexpr int kScalesBytes = kKeyTile * 4;  // of a half
  // Of two tiles: keys' scales and then values'.
  static constexpr int kLimitsAt = kScalesAt + (kScaled ? 4 * kScalesBytes : 0);
  static constexpr int kBytes = kLimitsAt + kManyQueries * 4;
  static_assert(kBytes <= 99 * 1024);

  // Of each row, one past the last key it sees.
  __device__ static int& limit(int row) {
    return reinterpret_cast<int*>(shared_memory() + kLimitsAt)[row];
  }
  __device__ static unsigned row_piece(int row, int piece) {
    return static_cast<unsigned>(row * kRowBytes + (piece ^ row % 8) * 16);
  }
};

// ---- kernel: copies ----

// A ring of halves, and this thread's share of filling it: a piece of every kApart-th row.
template <int kDim, KvFormat kFormat>
struct Ring {
  using M = Memory<kDim, kFormat>;
  static constexpr int kPieces = M::kStoredRow / 16;
  static constexpr int kApart = kThreads / kPieces;
  static constexpr int kEach = kKeyTile / kApart;

  const ManyCall& call;
  const QueryTile& tile;
  unsigned shared = shared_address(shared_memory());
  int n_halves;
  int half = 0;  // the next to be used
  // Lane l has those of the tile's keys 16 (l % 4).. ; `next`: of the tile after, found early since
  // memory answers late.
  KeyPlace now{}, next{};

  __device__ Ring(const QueryTile& t) : call(t.call), tile(t) {
    n_halves = 2 * divide_up(t.item().last_key - t.item().first_key, kKeyTile);
    next =
        find_keys(call, tile.item(), t.item().first_key + thread_index() % kTileGroups * kKeyGroup);
#pragma unroll 1
    for (int n = 0; n < M::kSlots - 1; ++n) {
      start(n);
      commit_copies();
    }
  }

  __device__ void start(int n) {
    if (n >= n_halves) return;
    const int thread = not_before(thread_index());
    const int first_key = tile.item().first_key + n / 2 * kKeyTile;
    const int n_keys = tile.item().last_key - first_key;
    if (n % 2 == 0) {
      now = next;
      next = find_keys(call, tile.item(), first_key + kKeyTile + thread % kTileGroups * kKeyGroup);
      if constexpr (M::kScaled) start_scales(n / 2 % 2, n_keys);
    }
    const unsigned slot = shared + n % M::kSlots * M::kSlotBytes;
    const std::byte* from = call.side(tile.kv_head, n % 2);
    if (n_keys >= kKeyTile && call.pool.shape.head_dim == kDim) {
      copy_rows<true>(slot, from, thread, n_keys);
    } else {
      copy_rows<false>(slot, from, thread, n_keys);
    }
  }
  // kWhole: all keys of the tile are the item's, and have kDim dimensions. Else keys past the
  // item's, and dimensions past the head's, become zeros.
  template <bool kWhole>
  __device__ void copy_rows(unsigned slot, const std::byte* from, int thread, int n_keys) const {
    [[maybe_unused]] constexpr int kTogether = kWhole ? kEach : 2;
    const int piece = thread % kPieces, row = thread / kPieces;
    const std::int64_t place = now.page * call.page_bytes + now.slot * call.row_bytes;
    const int n_bytes = call.pool.shape.head_dim * (M::kScaled ? 1 : 2) - piece * 16;
    const unsigned to = M::kScaled ? static_cast<unsigned>(thread * 16) : M::row_piece(row, piece);
    from += piece * 16 + row % kKeyGroup * call.row_bytes;
#pragma unroll kTogether
    for (int i = 0; i < kEach; ++i) {
      const int on = i * kApart;  // rows
      const int group = (kApart > kKeyGroup ? row / kKeyGroup : 0) + on / kKeyGroup;
      const std::byte* at = from + shuffle(place, group) + on % kKeyGroup * call.row_bytes;
      const int n = kWhole ? 16 : row + on < n_keys ? max(0, min(16, n_bytes)) : 0;
      const int swizzle = M::kScaled ? 0 : on % 8 * 16;
      copy_async(slot + (to ^ swizzle) + on * M::kStoredRow, n > 0 ? at : call.pool.base, n);
    }
  }
  // Of keys and values of a tile, by one warp, four at a time.
  __device__ void start_scales(int in_ring, int n_keys) {
    if (thread_index() >= kWarp) return;
    const int which = thread_index() / 16, row = thread_index() % 16 * 4;
    const std::int64_t place = shuffle(now.page * call.page_bytes + now.slot * 4, row / kKeyGroup);
    const int n_bytes = max(0, min(16, (n_keys - row) * 4));
    const std::byte* from =
        call.side(tile.kv_head, which) + call.scales_at + place + row % kKeyGroup * 4;
    copy_async(scales(in_ring) + static_cast<unsigned>(which * M::kScalesBytes + row * 4),
               n_bytes > 0 ? from : call.pool.base, n_bytes);
  }
  __device__ unsigned scales(int in_ring) const {
    return shared + M::kScalesAt + in_ring * 2 * M::kScalesBytes;
  }
  // What this thread copied.
  __device__ void expand(unsigned to, unsigned from) const {
    const int thread = not_before(thread_index());
    const int piece = thread % kPieces, first_row = thread / kPieces;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first_row + i * kApart;
      uint4 stored, values[2];
      load_shared(stored, from + static_cast<unsigned>(row * M::kStoredRow + piece * 16));
      expand_piece<kFormat>(values, stored);
      store_shared(to + M::row_piece(row, 2 * piece), values[0]);
      store_shared(to + M::row_piece(row, 2 * piece + 1), values[1]);
    }
  }
  // Waits for the next half and returns where it lies, for all until they call this again.
  __device__ unsigned use() {
    const int n = half++;
    const unsigned slot = shared + n % M::kSlots * M::kSlotBytes;
    unsigned found = slot;
    wait_copies<M::kSlots - 2>();
    if constexpr (M::kScaled) {
      found = shared + M::kExpandedAt + n % M::kExpanded * M::kHalfBytes;
      if (M::kExpanded == 1) sync_block();
      expand(found, slot);
    }
    sync_block();
    start(n + M::kSlots - 1);
    commit_copies();
    return found;
  }
};

// ---- kernel: queries ----

template <int kDim, KvFormat kFormat>
struct Queries {
  using M = Memory<kDim, kFormat>;
  static constexpr int kSteps = kDim / 16;
  std::uint32_t a[M::kQueriesStay ? 1 : kSteps][4];
  unsigned at;  // this lane's row for load_matrices

  // Before anything else is copied.
  __device__ void start(const QueryTile& tile) {
    const ManyCall& call = tile.call;
    constexpr int kPieces = kDim / 8;
    constexpr int kApart = kThreads / kPieces;
    const int thread = thread_index(), piece = thread % kPieces;
    const unsigned to = shared_address(shared_memory()) + M::kQueriesAt;
#pragma unroll 2
    for (int row = thread / kPieces; row < kManyQueries; row += kApart) {
      const bool is = row < tile.item().n_queries && piece * 8 < call.pool.shape.head_dim;
      const std::uint16_t* from = is ? call.q + tile.place(row, call.q_stride) + piece * 8 : call.q;
      copy_async(to + M::row_piece(row, piece), from, is ? 16 : 0);
    }
    commit_copies();
    const int lane = thread % kWarp, warp = thread / kWarp;
    at = to + M::row_piece(warp * 16 + lane % 16, lane / 16);
  }
  // kLater: groups of copies that began after start().
  template <int kLater>
  __device__ void finish() {
    wait_copies<kLater>();
    sync_block();
    if constexpr (!M::kQueriesStay) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_matrices(a[step], at ^ (step * 32));
    }
  }
  __device__ __forceinline__ const std::uint32_t (&fragment(int step))[4] {
    if constexpr (!M::kQueriesStay) return a[step];
    load_matrices(a[0], at ^ (step * 32));
    return a[0];
  }
};

// ---- kernel: products and softmax ----

// s = q k^T; `keys`: the half's first byte.
template <int kDim, KvFormat kFormat>
__device__ __forceinline__ void multiply_keys(float (&s)[kScoreTiles][4], Queries<kDim, kFormat>& q,
                                              unsigned keys) {
  using M = Memory<kDim, kFormat>;
  const int lane = not_before(thread_index()) % kWarp;
  const unsigned at = keys + M::row_piece(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < kScoreTiles; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const auto& a = q.fragment(step);
#pragma unroll
    for (int j = 0; j < kScoreTiles; j += 2) {
      std::uint32_t b[4];  // keys 8 j.., both halves of the step's dimensions; then keys 8 j + 8..
      load_matrices(b, (at ^ (step * 32)) + j * 8 * M::kRowBytes);
      mma_bf16(s[j], a, b[0], b[1]);
      mma_bf16(s[j + 1], a, b[2], b[3]);
    }
  }
}

// o += p v.
template <int kDim, KvFormat kFormat>
__device__ __forceinline__ void multiply_values(float (&o)[kDim / 8][4],
                                                const std::uint32_t (&p)[kKeyTile / 16][4],
                                                unsigned values) {
  using M = Memory<kDim, kFormat>;
  const int lane = not_before(thread_index()) % kWarp;
  const unsigned at = values + M::row_piece(lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < kKeyTile / 16; ++step) {
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 2) {
      std::uint32_t b[4];  // dimensions 8 j.., both halves of the step's keys; then 8 j + 8..
      load_matrices_transposed(b, (at ^ (j * 16)) + step * 16 * M::kRowBytes);
      mma_bf16(o[j], p[step], b[0], b[1]);
      mma_bf16(o[j + 1], p[step], b[2], b[3]);
    }
  }
}

// The softmax so far of this lane's rows g and g + 8.
struct Rows {
  float most[2];  // the largest score
  float sum[2];   // of this lane's columns alone
};

// Scores of a tile become weights of its values, and sums so far are brought to the new largest
// score. kBorder: some row does not see some key. `scale`: of scores, log2(e) included; `scales`:
// of keys and values in shared memory, where they have some.
template <int kDim, KvFormat kFormat, bool kBorder>
__device__ __forceinline__ void soften(float (&s)[kScoreTiles][4], float (&o)[kDim / 8][4],
                                       std::uint32_t (&p)[kKeyTile / 16][4], Rows& rows,
                                       int first_key, float scale, unsigned scales) {
  using M = Memory<kDim, kFormat>;
  const int thread = not_before(thread_index()), column = thread % 4 * 2;
  const int row = thread / kWarp * 16 + thread % kWarp / 4;
  const int limits[2] = {kBorder ? M::limit(row) : 0, kBorder ? M::limit(row + 8) : 0};
  scales += static_cast<unsigned>(column * 4);
  float most[2] = {rows.most[0], rows.most[1]};
#pragma unroll
  for (int j = 0; j < kScoreTiles; ++j) {
    float2 of_keys = {1.0f, 1.0f};
    if constexpr (M::kScaled) load_shared(of_keys, scales + j * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (M::kScaled) s[j][i] *= i % 2 == 0 ? of_keys.x : of_keys.y;
      if (kBorder && first_key + j * 8 + column + i % 2 >= limits[i / 2]) s[j][i] = -INFINITY;
      most[i / 2] = max(most[i / 2], s[j][i]);
    }
  }
  float from[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = max(most[r], shuffle_xor(most[r], 1));
    most[r] = max(most[r], shuffle_xor(most[r], 2));
    from[r] = kBorder && most[r] == -INFINITY ? 0.0f : most[r] * scale;  // sees nothing yet
    const float change = exp2_fast(rows.most[r] * scale - from[r]);
    rows.most[r] = most[r];
    rows.sum[r] *= change;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      o[j][2 * r] *= change;
      o[j][2 * r + 1] *= change;
    }
  }
#pragma unroll
  for (int j = 0; j < kScoreTiles; ++j) {
    float2 of_values = {1.0f, 1.0f};
    if constexpr (M::kScaled) load_shared(of_values, scales + M::kScalesBytes + j * 32);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float low = exp2_fast(s[j][2 * r] * scale - from[r]);
      float high = exp2_fast(s[j][2 * r + 1] * scale - from[r]);
      rows.sum[r] += low + high;
      if constexpr (M::kScaled) low *= of_values.x, high *= of_values.y;
      p[j / 2][j % 2 * 2 + r] = pack_bf16x2(low, high);
    }
  }
}

// ---- kernel ----

template <int kDim>
__device__ void store_result(const QueryTile& tile, const Rows& rows,
                             const float (&o)[kDim / 8][4]) {
  const ManyCall& call = tile.call;
  const int thread = not_before(thread_index());
  const int lane = thread % kWarp, first = thread / kWarp * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int row = first + 8 * r;
    if (row >= tile.item().n_queries) continue;
    const float part = divide_fast(1.0f, sum);
    std::uint16_t* y = call.y + tile.place(row, call.y_stride) + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      if (j * 8 >= call.pool.shape.head_dim) break;
      *reinterpret_cast<std::uint32_t*>(y + j * 8) =
          pack_bf16x2(o[j][2 * r] * part, o[j][2 * r + 1] * part);
    }
  }
}

// Blocks that share a multiprocessor of sm_80, if their registers let them. Shared memory for
// 8 bits has room for one less.
template <int kDim, KvFormat kFormat>
constexpr int blocks_together() {
  if (kDim == 256) return 1;
  return (kDim == 64 ? 4 : 3) - (Memory<kDim, kFormat>::kScaled ? 1 : 0);
}

template <int kDim, KvFormat kFormat>
__global__ void __launch_bounds__(kThreads, (blocks_together<kDim, kFormat>()))
    attend_many_kernel(const __grid_constant__ ManyCall call) {
  using M = Memory<kDim, kFormat>;
  const QueryTile tile(call, block_index());
  Queries<kDim, kFormat> queries;
  queries.start(tile);
  if (thread_index() < kManyQueries) M::limit(thread_index()) = tile.limit(thread_index());
  Ring<kDim, kFormat> ring(tile);
  queries.template finish<M::kSlots - 1>();

  Rows rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  float o[kDim / 8][4] = {};
  while (ring.half < ring.n_halves) {
    const int n = ring.half / 2, first_key = tile.item().first_key + n * kKeyTile;
    const int first_row = thread_index() / kWarp * 16;
    const bool busy = first_key < M::limit(first_row + 15);
    std::uint32_t p[kKeyTile / 16][4];
    const unsigned keys = ring.use();
    if (busy) {
      float s[kScoreTiles][4];
      multiply_keys(s, queries, keys);
      const unsigned scales = ring.scales(n % 2);
      if (first_key + kKeyTile <= M::limit(first_row)) {
        soften<kDim, kFormat, false>(s, o, p, rows, first_key, call.scale, scales);
      } else {
        soften<kDim, kFormat, true>(s, o, p, rows, first_key, call.scale, scales);
      }
    }
    const unsigned values = ring.use();
    if (busy) multiply_values<kDim, kFormat>(o, p, values);
  }
  store_result<kDim>(tile, rows, o);
}

// ---- choose and launch ----

template <int kDim, KvFormat kFormat>
void launch_kernel(const ManyCall& call, cudaStream_t stream) {
  Launch how;
  how.blocks = call.item_count * call.pool.shape.n_kv_heads;
  how.threads = kThreads;
  how.shared_bytes = Memory<kDim, kFormat>::kBytes;
  how.stream = stream;
  launch("attend_many", attend_many_kernel<kDim, kFormat>, how, call);
}

}  // namespace

ManyCall::ManyCall(const Attention& call, int n_items)
    : Attention(call),
      item_count(n_items),
      group(call.n_heads / call.pool.shape.n_kv_heads),
      scale(1.44269504f /* log2(e) */ / std::sqrt(static_cast<float>(call.pool.shape.head_dim))),
      row_bytes(call.pool.shape.row_bytes()),
      page_bytes(call.pool.shape.page_bytes()),
      side_bytes(call.pool.shape.side_bytes()),
      scales_at(call.pool.shape.scales_at()),
      keys(call.pool.base + call.pool.shape.keys_at(call.kv_layer, 0)) {}

void check_attend_many(const Attention& call, int n_items) {
  const KvShape& shape = call.pool.shape;
  const auto require = [](bool is, const char* what) {
    if (!is) fail(ErrorCode::kInternal, "[cuda] attend_many: ", what, ".");
  };
  const auto is_aligned = [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  };
  if (shape.head_dim <= 0 || shape.head_dim % 8 != 0 || shape.head_dim > 256) {
    fail(ErrorCode::kUnsupported, "[cuda] attend_many: head_dim is ", shape.head_dim,
         ", and must be a multiple of 8 up to 256.");
  }
  require(shape.page_size > 0 && shape.page_size % kKeyGroup == 0,
          "pages must have a multiple of 16 tokens");
  require(shape.n_kv_heads > 0 && call.n_heads % shape.n_kv_heads == 0,
          "query heads must be a multiple of key heads");
  require(call.kv_layer >= 0 && call.kv_layer < shape.n_layers, "no such layer in the pool");
  require(call.q_stride % 8 == 0 && call.y_stride % 8 == 0 && is_aligned(call.q) &&
              is_aligned(call.y) && is_aligned(call.pool.base),
          "rows of q and y must be aligned to 16 bytes");
  require(n_items >= 0 && n_items <= (1 << 30) / shape.n_kv_heads, "too many items");
}

void attend_many(const Attention& call, int n_items, int /*multiprocessors*/, cudaStream_t stream) {
  check_attend_many(call, n_items);
  if (n_items == 0) return;
  const ManyCall many(call, n_items);
  const int instance = padded_head_dim(call.pool.shape.head_dim);
  with_kv_format(call.pool.shape.format, [&]<KvFormat kFormat>() {
    (instance == 64    ? launch_kernel<64, kFormat>
     : instance == 128 ? launch_kernel<128, kFormat>
                       : launch_kernel<256, kFormat>)(many, stream);
  });
}

}  // namespace camelid::cuda
