// Attention of many queries on Hopper: scores and sums of values by wgmma, softmax beside them
// ("FlashAttention-3", arXiv 2407.08608). What is computed, and of what: ops/attention.h.

// ---- layout ----
//
//   block   128 queries of one kv head: two consumer warpgroups of 64 rows, warp w of each has rows
//           16 w..; keys in tiles of 128. One producer warpgroup copies, 16 bytes at a time, which
//           follows pages for free. Persistent: it is halves ahead, across jobs too.
//
//   halves  keys of tile 0, values of tile 0, keys of tile 1, ...: one in each slot of a ring
//   a half  [kDim / 64 panels][128 keys][64 dims] bf16, swizzled as describe_rows() says: keys are
//           columns of q k^T, and the very same layout has them as inputs of p v
//
//   a consumer, in registers: q [64 x kDim] bf16; s [64 x 128] float32, p the same as bf16, which
//           is operand A of p v where it is; o [64 x kDim] float32
//
//   tile n      issue  s = q k_n^T, then o += p v_(n-1)     the other warpgroup's turn
//               wait for s; softmax of s                    while o += p v_(n-1) runs, and then
//               wait for o; rescale it; p = s               what the other warpgroup issued
//
// So a warpgroup's softmax hides behind its own p v and the other's products. The turns keep both
// from meeting at the tensor cores and then at the exponentials: a scheme of FlashAttention-3.
//
// Cycles of a tile and block: products 2 x 2 x 64 x 128 x 128 / 2048 = 2048 (kDim = 128).
//   MUFU      2 warps of each scheduler x 64 exp2, 8 cycles each: 1024
//   issue     counted in ptxas 13.0's code: a consumer warp 470 (64 each of max, fma, exp2, add and
//             rescaling, 32 packs, and what surrounds products and waits), of which each scheduler
//             has two, and a producer warp 330: 1270 of 2048
//   shared    products 64 bytes a cycle (one half read by each warpgroup), copies 32: 96 of 128
//   L2        64 KB: 32 bytes a cycle, where 132 SMs get at most 39
// All fit beside the products. What is lost: softmax of the first and products of the last tile of
// a job, borders, turns. FlashAttention-3 reaches 0.75 of the peak by the same structure.
//
// Registers of a consumer (kDim = 128): 64 of o, 64 of s, 32 of p, 32 of q, about 30 more.
//
// e4m3 and int8: the producer copies bytes beside the ring, expands what it copied itself into a
// slot, exactly, and hands the tile's scales over with its keys. Scales multiply s and p in
// float32; they take registers, so o is waited for before the softmax, and only the other
// warpgroup's products run beside it. A consumer warp issues 645, a producer warp 1420: 2710 for
// 2048 cycles of products, so these formats are bound by issuing, at 0.75 of the peak at most.

#include "sm90/attention_many.h"

#include <algorithm>

#include "ops/attention_many.cuh"
#include "ops/instances.h"
#include "sm90/hopper.cuh"

namespace camelid::cuda::sm90 {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kKeys = 128;  // of a tile
constexpr int kGroups = kKeys / kKeyGroup;
constexpr int kSteps = kKeys / 16;  // of p v
constexpr int kPanelBytes = kKeys * 128;
static_assert(kManyQueries == kConsumers * 64);

// What lies where in shared memory.
template <int kDim, KvFormat kFormat>
struct Ring {
  static constexpr bool kScaled = kFormat != KvFormat::kBf16;
  static constexpr int kProducerRegisters = kScaled ? 56 : 40;
  static constexpr int kConsumerRegisters = kScaled ? 224 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (kConsumers + 1) * registers_at_start(kThreads));
  static constexpr int kPanels = kDim / 64;
  static constexpr int kHalfBytes = kPanels * kPanelBytes;
  // A float32 for each key and then for each of the values, behind the keys.
  static constexpr int kScalesBytes = kScaled ? 2 * kKeys * 4 : 0;
  static constexpr int kSlotBytes = kHalfBytes + kScalesBytes;
  static constexpr int kSlots = kScaled ? 5 : 6;
  // Bytes that wait to be expanded: [128 keys][kDim] and scales, as memory has them.
  static constexpr int kStored = kScaled ? 3 : 0;
  static constexpr int kStoredRows = kKeys * kDim;
  static constexpr int kStoredBytes = kStoredRows + kScalesBytes;
  static constexpr int kStoredAt = kSlots * kSlotBytes;
  static constexpr int kBarriers = kStoredAt + kStored * kStoredBytes;
  static constexpr int kBytes = kBarriers + (2 * kSlots + kConsumers) * 8;
  static_assert(kSlotBytes % 1024 == 0 && kBytes <= 227 * 1024);

  __device__ static std::byte* slot(int i) { return shared_memory() + i * kSlotBytes; }
  __device__ static std::byte* stored(unsigned n) {
    return shared_memory() + kStoredAt + n % std::max(kStored, 1) * kStoredBytes;
  }
  __device__ static Barrier* barrier(int i) {
    return reinterpret_cast<Barrier*>(shared_memory() + kBarriers) + i;
  }
  __device__ static Barrier* full(int i) { return barrier(i); }            // all of it is there
  __device__ static Barrier* empty(int i) { return barrier(kSlots + i); }  // nobody reads it
  // The other consumer has issued its products.
  __device__ static Barrier* turn(int consumer) { return barrier(2 * kSlots + consumer); }

  __device__ static void init() {
    for (int i = 0; i < kSlots; ++i) {
      init_barrier(full(i), kWarpgroup);
      init_barrier(empty(i), kConsumers * kWarpgroup / kWarp);
    }
    for (int i = 0; i < kConsumers; ++i) init_barrier(turn(i), kWarpgroup / kWarp);
  }

  // Where the n-th half lies, counted over all jobs, and the parity of its phase there.
  struct Place {
    int slot;
    unsigned parity;
    __device__ explicit Place(unsigned n)
        : slot(static_cast<int>(n % kSlots)), parity(n / kSlots & 1) {}
  };
};

// The jobs of this block: there and back again, so that none gets the longest of each round.
struct Jobs {
  int n_jobs;
  int round = 0;
  __device__ bool next(int& job) {
    const int in_round = round % 2 == 0 ? block_index() : grid_size() - 1 - block_index();
    job = round++ * grid_size() + in_round;
    return job < n_jobs;
  }
};

// ---- kernel: the producer ----

// A thread's share of a half: a piece of 16 bytes as memory has it, of every kApart-th row. Of
// bytes, eight lanes have four pieces of an even row and four of the next: so they meet all banks
// with what they expanded.
template <int kDim, KvFormat kFormat>
struct Share {
  static constexpr bool kScaled = kFormat != KvFormat::kBf16;
  static constexpr int kPieces = kScaled ? kDim / 16 : 8;  // of a row, or of its part in a panel
  static constexpr int kApart = kWarpgroup / kPieces;
  static constexpr int kEach = kKeys / kApart;
  static_assert(kApart % kKeyGroup == 0);
  int piece, row;
  __device__ Share() {
    const int thread = not_before(thread_index());
    constexpr bool kPaired = kScaled && kPieces == 8;
    piece = kPaired ? thread % 4 + thread / 8 % 2 * 4 : thread % kPieces;
    row = kPaired ? thread / 16 * 2 + thread / 4 % 2 : thread / kPieces;
  }
};

// The halves of all jobs of this block, one after the other, as the producer copies them.
template <int kDim, KvFormat kFormat>
struct Source {
  using R = Ring<kDim, kFormat>;
  const ManyCall& call;
  Jobs jobs;
  int number = 0, kv_head = 0;  // of the job
  int first_key = 0;            // of the tile
  int side = 1;                 // 0 keys, 1 values
  bool is = false;              // there is a half
  // Lane l has those of the tile's keys 16 (l % 8)..; `next`: of the tile after, found early since
  // memory answers late.
  KeyPlace now{}, next{};

  __device__ explicit Source(const ManyCall& c)
      : call(c), jobs{c.item_count * c.pool.shape.n_kv_heads} {}

  __device__ const AttentionItem& item() const { return call.items[number]; }
  __device__ KeyPlace find(int key) const {
    return find_keys(call, item(), key + not_before(thread_index()) % kGroups * kKeyGroup);
  }
  // Goes on to the next half; false: that was all.
  __device__ bool advance() {
    side ^= 1;
    if (is && side == 1) return true;
    if (is) first_key += kKeys;
    if (!is || first_key >= item().last_key) {
      int job;
      is = jobs.next(job);
      if (!is) return false;
      number = job % call.item_count;
      kv_head = job / call.item_count;
      first_key = item().first_key;
      next = find(first_key);
    }
    now = next;
    next = find(first_key + kKeys);
    return true;
  }
  __device__ void copy(std::byte* to) const {
    const int n_keys = item().last_key - first_key;
    if (n_keys >= kKeys && call.pool.shape.head_dim == kDim) {
      copy_rows<true>(shared_address(to), n_keys);
    } else {
      copy_rows<false>(shared_address(to), n_keys);
    }
  }
  // kWhole: all keys of the tile are the item's, and have kDim dimensions. Else keys past the
  // item's, and dimensions past the head's, become zeros.
  template <bool kWhole>
  __device__ __forceinline__ void copy_rows(unsigned to, int n_keys) const {
    using S = Share<kDim, kFormat>;
    [[maybe_unused]] constexpr int kTogether = kWhole ? S::kEach : 1;
    const S mine;
    const int n_bytes = call.pool.shape.head_dim * (R::kScaled ? 1 : 2) - mine.piece * 16;
    const std::int64_t place = now.page * call.page_bytes + now.slot * call.row_bytes;
    const std::byte* from =
        call.side(kv_head, side) + mine.row % kKeyGroup * call.row_bytes + mine.piece * 16;
    to += static_cast<unsigned>(R::kScaled ? thread_index() * 16
                                           : mine.row * 128 + (mine.piece ^ mine.row % 8) * 16);
    const int first_group = S::kApart > kKeyGroup ? mine.row / kKeyGroup : 0;
#pragma unroll kTogether
    for (int i = 0; i < S::kEach; ++i) {
      const std::byte* key = from + shuffle(place, first_group + i * (S::kApart / kKeyGroup));
      const int left = mine.row + i * S::kApart < n_keys ? n_bytes : 0;
#pragma unroll
      for (int panel = 0; panel < (R::kScaled ? 1 : R::kPanels); ++panel) {
        const int n = kWhole ? 16 : max(0, min(16, left - panel * 128));
        copy_async(to + i * kWarpgroup * 16 + panel * kPanelBytes,
                   n > 0 ? key + panel * 128 : call.pool.base, n);
      }
    }
  }
  // Scales of keys and values of the tile, four at a time.
  __device__ void copy_scales(std::byte* to) const {
    constexpr int kPieces = kKeys / 4;
    if (thread_index() >= 2 * kPieces) return;
    const int thread = not_before(thread_index()), row = thread % kPieces * 4;
    const std::int64_t place = shuffle(now.page * call.page_bytes + now.slot * 4, row / kKeyGroup);
    const int n_bytes = max(0, min(16, (item().last_key - first_key - row) * 4));
    const std::byte* from =
        call.side(kv_head, thread / kPieces) + call.scales_at + place + row % kKeyGroup * 4;
    copy_async(to + thread * 16, n_bytes > 0 ? from : call.pool.base, n_bytes);
  }
};

// What this thread copied, from bytes to bf16 in the panels of a slot.
template <int kDim, KvFormat kFormat>
__device__ __forceinline__ void expand_half(unsigned to, unsigned from, bool scales) {
  using R = Ring<kDim, kFormat>;
  using S = Share<kDim, kFormat>;
  const S mine;
  const int thread = thread_index(), piece = mine.piece * 2;
  const unsigned first_row = to + piece / 8 * kPanelBytes + mine.row * 128;
  from += static_cast<unsigned>(thread * 16);
#pragma unroll 2
  for (int i = 0; i < S::kEach; ++i) {
    uint4 stored, values[2];
    load_shared(stored, from + i * kWarpgroup * 16);
    expand_piece<kFormat>(values, stored);
    const unsigned row = first_row + i * S::kApart * 128;
    store_shared(row + (piece % 8 ^ mine.row % 8) * 16, values[0]);
    store_shared(row + ((piece + 1) % 8 ^ mine.row % 8) * 16, values[1]);
  }
  if (scales && thread < R::kScalesBytes / 16) {
    uint4 four;
    load_shared(four, from + R::kStoredRows);
    store_shared(to + R::kHalfBytes + thread * 16, four);
  }
}

template <int kDim, KvFormat kFormat>
__device__ void produce(const ManyCall& call) {
  using R = Ring<kDim, kFormat>;
  Source<kDim, kFormat> source(call);
  if constexpr (!R::kScaled) {
    for (unsigned half = 0; source.advance(); ++half) {
      const typename R::Place at(half);
      wait_barrier(R::empty(at.slot), at.parity ^ 1);
      source.copy(R::slot(at.slot));
      arrive_when_copied(R::full(at.slot));
    }
  } else {
    unsigned n_started = 0;
    for (unsigned n = 0;; ++n) {  // starts half n and expands the one before the one before
      if (n >= R::kStored - 1) {
        const unsigned half = n - (R::kStored - 1);
        if (half == n_started) return;
        wait_copies<R::kStored - 2>();
        const typename R::Place at(half);
        wait_barrier(R::empty(at.slot), at.parity ^ 1);
        expand_half<kDim, kFormat>(shared_address(R::slot(at.slot)),
                                   shared_address(R::stored(half)), half % 2 == 0);
        arrive(R::full(at.slot));
      }
      if (source.advance()) {
        source.copy(R::stored(n));
        if (source.side == 0) source.copy_scales(R::stored(n) + R::kStoredRows);
        ++n_started;
      }
      commit_copies();
    }
  }
}

// ---- kernel: a consumer ----

// The softmax so far of this lane's rows g and g + 8.
struct Softmax {
  int limit[2];   // one past the last key they see
  float most[2];  // the largest score
  float sum[2];   // of this lane's columns alone
};

// The A fragments of this warp's 16 queries; those behind the tile, and dimensions behind the
// head's, are zeros.
template <int kDim>
__device__ __forceinline__ void load_queries(std::uint32_t (&q)[kDim / 16][4],
                                             const QueryTile& tile, int first_row) {
  const ManyCall& call = tile.call;
  const int column = thread_index() % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    const bool is = row < tile.item().n_queries;
    const std::uint16_t* from = call.q + (is ? tile.place(row, call.q_stride) : 0) + column;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const bool some = is && i * 8 < call.pool.shape.head_dim;
      q[i / 2][i % 2 * 2 + r] = some ? *reinterpret_cast<const std::uint32_t*>(from + i * 8) : 0;
    }
  }
}

// Starts s = q k^T.
template <int kDim>
__device__ __forceinline__ void start_scores(float (&s)[kKeys / 2],
                                             const std::uint32_t (&q)[kDim / 16][4],
                                             const std::byte* slot) {
  const Rows keys = describe_rows(slot);
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    multiply_async<kKeys>(s, q[step], advance(keys, step / 4 * kPanelBytes + step % 4 * 32),
                          step > 0);
  }
  commit_products();
}

// Starts o += p v.
template <int kDim>
__device__ __forceinline__ void start_values(float (&o)[kDim / 2],
                                             const std::uint32_t (&p)[kSteps][4],
                                             const std::byte* slot) {
  const Rows values = describe_columns(slot, kPanelBytes);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_columns_async<kDim>(o, p[step], advance(values, step * 16 * 128), true);
  }
  commit_products();
}

// Each key's column by its scale.
__device__ __forceinline__ void multiply_by(float (&s)[kKeys / 2], unsigned scales) {
  const unsigned at = scales + static_cast<unsigned>(thread_index() % 4 * 8);
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    float2 both;
    load_shared(both, at + j * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[4 * j + i] *= i % 2 == 0 ? both.x : both.y;
  }
}

// Scores become weights; `change` is what sums so far are to be multiplied by. kBorder: some row
// does not see some key. `scale`: of scores, log2(e) included; `scales`: of keys, in shared memory.
template <bool kBorder, bool kScaled>
__device__ __forceinline__ void soften(float (&s)[kKeys / 2], Softmax& rows, float (&change)[2],
                                       int first_key, float scale, unsigned scales) {
  const int column = thread_index() % 4 * 2;
  if constexpr (kScaled) multiply_by(s, scales);
  float most[2] = {rows.most[0], rows.most[1]};
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    const int key = first_key + i / 4 * 8 + column + i % 2;
    if (kBorder && key >= rows.limit[i / 2 % 2]) s[i] = -INFINITY;
    most[i / 2 % 2] = max(most[i / 2 % 2], s[i]);
  }
  float from[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = max(most[r], shuffle_xor(most[r], 1));
    most[r] = max(most[r], shuffle_xor(most[r], 2));
    from[r] = kBorder && most[r] == -INFINITY ? 0.0f : most[r] * scale;  // sees nothing yet
    change[r] = exp2_fast(rows.most[r] * scale - from[r]);
    rows.most[r] = most[r];
    rows.sum[r] *= change[r];
  }
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    s[i] = exp2_fast(s[i] * scale - from[i / 2 % 2]);
    rows.sum[i / 2 % 2] += s[i];
  }
}

template <bool kScaled>
__device__ __forceinline__ void soften_tile(float (&s)[kKeys / 2], Softmax& rows,
                                            float (&change)[2], int first_key, float scale,
                                            unsigned scales) {
  // Of the warp's rows the first sees least.
  if (first_key + kKeys <= shuffle(rows.limit[0], 0)) {
    soften<false, kScaled>(s, rows, change, first_key, scale, scales);
  } else {
    soften<true, kScaled>(s, rows, change, first_key, scale, scales);
  }
}

// `scales`: of keys, behind which are those of values.
template <bool kScaled>
__device__ __forceinline__ void pack_weights(std::uint32_t (&p)[kSteps][4], float (&s)[kKeys / 2],
                                             unsigned scales) {
  if constexpr (kScaled) multiply_by(s, scales + kKeys * 4);
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) p[i / 4][i % 4] = pack_bf16x2(s[2 * i], s[2 * i + 1]);
}

template <int kDim>
__device__ __forceinline__ void store_rows(const QueryTile& tile, int first_row,
                                           const Softmax& rows, const float (&o)[kDim / 2]) {
  const ManyCall& call = tile.call;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int row = first_row + 8 * r;
    if (row >= tile.item().n_queries) continue;
    const float part = divide_fast(1.0f, sum);
    std::uint16_t* y = call.y + tile.place(row, call.y_stride) + thread_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      if (j * 8 >= call.pool.shape.head_dim) break;
      *reinterpret_cast<std::uint32_t*>(y + j * 8) =
          pack_bf16x2(o[4 * j + 2 * r] * part, o[4 * j + 2 * r + 1] * part);
    }
  }
}

// A consumer's part in the order of things: its turns at the tensor cores, and slots it is done
// with.
template <class R>
struct Order {
  int consumer;
  unsigned n_turns = 0;

  // Until the halves are there, and products see them.
  template <class... Place>
  __device__ static void wait_full(const Place&... at) {
    (wait_barrier(R::full(at.slot), at.parity), ...);
    show_to_products();  // here, where the other consumer does not wait for it
  }
  // Until it is this consumer's turn to start products.
  __device__ void wait_turn() {
    wait_signal(R::turn(consumer), (n_turns & 1) ^ (consumer == 0 ? 1 : 0));
    ++n_turns;
    start_products();
  }
  __device__ void pass_turn() const { arrive_once(R::turn(1 - consumer)); }
  __device__ static void release(const typename R::Place& at) { arrive_once(R::empty(at.slot)); }
  __device__ static void arrive_once(Barrier* barrier) {  // by the warp
    sync_warp();
    if (thread_index() % kWarp == 0) arrive(barrier);
  }
};

// half: that of the job's first keys.
template <int kDim, KvFormat kFormat>
__device__ __forceinline__ void consume_job(const QueryTile& tile,
                                            Order<Ring<kDim, kFormat>>& order, unsigned half,
                                            float scale) {
  using R = Ring<kDim, kFormat>;
  using Place = typename R::Place;
  constexpr bool kScaled = R::kScaled;
  const auto scales = [](const Place& keys) {
    return shared_address(R::slot(keys.slot)) + R::kHalfBytes;
  };
  const int lane = thread_index() % kWarp;
  const int first_row = order.consumer * 64 + thread_index() % kWarpgroup / kWarp * 16 + lane / 4;
  std::uint32_t q[kDim / 16][4], p[kSteps][4];
  float s[kKeys / 2], o[kDim / 2], change[2];
  load_queries<kDim>(q, tile, first_row);
  Softmax rows{
      {tile.limit(first_row), tile.limit(first_row + 8)}, {-INFINITY, -INFINITY}, {0.0f, 0.0f}};
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;

  Place keys(half);
  order.wait_full(keys);
  order.wait_turn();
  start_scores<kDim>(s, q, R::slot(keys.slot));
  order.pass_turn();
  wait_products<0>();
  hold(s);
  int first_key = tile.item().first_key;
  soften_tile<kScaled>(s, rows, change, first_key, scale, scales(keys));
  pack_weights<kScaled>(p, s, scales(keys));
  order.release(keys);
  const int last_key = tile.item().last_key;
  for (first_key += kKeys; first_key < last_key; first_key += kKeys, half += 2) {
    const Place values(half + 1);
    keys = Place(half + 2);
    order.wait_full(values, keys);
    order.wait_turn();
    start_scores<kDim>(s, q, R::slot(keys.slot));
    start_values<kDim>(o, p, R::slot(values.slot));
    order.pass_turn();
    wait_products<kScaled ? 0 : 1>();  // for o too: scales need registers, and p has them
    hold(s);
    order.release(kScaled ? values : keys);
    soften_tile<kScaled>(s, rows, change, first_key, scale, scales(keys));
    wait_products<0>();
    hold(o);
    hold(s);
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] *= change[i / 2 % 2];
    pack_weights<kScaled>(p, s, scales(keys));
    order.release(kScaled ? keys : values);
  }
  const Place values(half + 1);
  order.wait_full(values);
  order.wait_turn();
  start_values<kDim>(o, p, R::slot(values.slot));
  order.pass_turn();
  wait_products<0>();
  hold(o);
  order.release(values);
  store_rows<kDim>(tile, first_row, rows, o);
}

template <int kDim, KvFormat kFormat>
__device__ void consume(const ManyCall& call) {
  Order<Ring<kDim, kFormat>> order{thread_index() / kWarpgroup - 1};
  unsigned half = 0;
  int job;
  for (Jobs jobs{call.item_count * call.pool.shape.n_kv_heads}; jobs.next(job);) {
    const QueryTile tile(call, job);
    consume_job<kDim, kFormat>(tile, order, half, call.scale);
    const int n_keys = tile.item().last_key - tile.item().first_key;
    half += 2 * static_cast<unsigned>(divide_up(n_keys, kKeys));
  }
}

// One block of three warpgroups for each multiprocessor.
template <int kDim, KvFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1)
    attend_many_kernel(const __grid_constant__ ManyCall call) {
  if (thread_index() == 0) Ring<kDim, kFormat>::init();
  sync_block();
  if (thread_index() < kWarpgroup) {
    give_registers<Ring<kDim, kFormat>::kProducerRegisters>();
    produce<kDim, kFormat>(call);
  } else {
    take_registers<Ring<kDim, kFormat>::kConsumerRegisters>();
    consume<kDim, kFormat>(call);
  }
}

// ---- choose and launch ----

template <int kDim, KvFormat kFormat>
void launch_kernel(const ManyCall& call, const Launch& sized) {
  Launch how = sized;
  how.shared_bytes = Ring<kDim, kFormat>::kBytes;
  launch("attend_many", attend_many_kernel<kDim, kFormat>, how, call);
}

}  // namespace

bool attend_many_fits(const KvShape& shape) {
  const int instance = padded_head_dim(shape.head_dim);
  return instance == 64 || instance == 128;
}

void attend_many(const Attention& call, int n_items, int multiprocessors, cudaStream_t stream) {
  check_attend_many(call, n_items);
  if (!attend_many_fits(call.pool.shape)) {
    fail(ErrorCode::kUnsupported, "[cuda] attend_many: Hopper's own has head_dim up to 128.");
  }
  if (n_items == 0) return;
  Launch how;
  how.blocks = std::min(n_items * call.pool.shape.n_kv_heads, multiprocessors);
  how.threads = kThreads;
  how.stream = stream;
  const ManyCall many(call, n_items);
  with_kv_format(call.pool.shape.format, [&]<KvFormat kFormat>() {
    (padded_head_dim(call.pool.shape.head_dim) == 64 ? launch_kernel<64, kFormat>
                                                     : launch_kernel<128, kFormat>)(many, how);
  });
}

}  // namespace camelid::cuda::sm90
