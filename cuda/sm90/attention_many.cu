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
//   issue     a warp: 64 x (max, fma, exp2, add) + 32 packs + 64 rescales + 16 products and about
//             60 of waits and shuffles = 430; two warps, and the producer's 32 copies and 130 of
//             addresses: 1020 of 2048
//   shared    products 64 bytes a cycle (one half read by each warpgroup), copies 32: 96 of 128
//   L2        64 KB: 32 bytes a cycle, where 132 SMs get at most 39
// All fit beside the products. What is lost: softmax of the first and products of the last tile of a
// job, borders, turns. FlashAttention-3 reaches 0.75 of the peak by the same structure.
//
// Registers of a consumer (kDim = 128): 64 of o, 64 of s, 32 of p, 32 of q, about 30 more.

#include "sm90/attention_many.h"

#include <algorithm>

#include "device/kv.cuh"
#include "ops/attention_many.cuh"
#include "sm90/hopper.cuh"

namespace camelid::cuda::sm90 {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr int kKeys = 128;  // of a tile
constexpr int kGroups = kKeys / kKeyGroup;
constexpr int kSteps = kKeys / 16;  // of p v
constexpr int kPanelBytes = kKeys * 128;
static_assert(kManyQueries == kConsumers * 64);

// What lies where in shared memory.
template <int kDim>
struct Ring {
  static constexpr int kPanels = kDim / 64;
  static constexpr int kSlotBytes = kPanels * kPanelBytes;
  static constexpr int kSlots = 6;
  static constexpr int kBarriers = kSlots * kSlotBytes;
  static constexpr int kBytes = kBarriers + (2 * kSlots + kConsumers) * 8;
  static_assert(kBytes <= 227 * 1024);

  __device__ static std::byte* slot(int i) { return shared_memory() + i * kSlotBytes; }
  __device__ static Barrier* barrier(int i) {
    return reinterpret_cast<Barrier*>(shared_memory() + kBarriers) + i;
  }
  __device__ static Barrier* full(int i) { return barrier(i); }            // all copies arrived
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
};

// Where in the ring the n-th half lies, counted over all jobs, and the parity of its phase there.
template <int kDim>
struct Place {
  int slot;
  unsigned parity;
  __device__ explicit Place(unsigned n)
      : slot(static_cast<int>(n % Ring<kDim>::kSlots)), parity(n / Ring<kDim>::kSlots & 1) {}
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

__device__ inline int n_key_tiles(const QueryTile& tile) {
  return divide_up(tile.item().last_key - tile.item().first_key, kKeys);
}

// ---- kernel: the producer ----

// Copies a half. `from`: this thread's piece of its row of page 0; `place`: lane l has that of keys
// 16 (l % 8)... Keys from n_keys on and dimensions past the head's become zeros.
template <int kDim>
__device__ __forceinline__ void copy_half(std::byte* slot, const Attention& call,
                                          const std::byte* from, std::int64_t place, int n_keys) {
  const int thread = thread_index(), piece = thread % 8, row = thread / 8;
  const int n_bytes = call.pool.shape.head_dim * 2 - piece * 16;
  std::byte* to = slot + row * 128 + (piece ^ row % 8) * 16;
#pragma unroll 4
  for (int i = 0; i < kGroups; ++i) {
    const std::byte* group = from + shuffle(place, i);
    const bool is = i * kKeyGroup + row < n_keys;
#pragma unroll
    for (int panel = 0; panel < Ring<kDim>::kPanels; ++panel) {
      const bool some = is && panel * 128 < n_bytes;
      copy_async(to + panel * kPanelBytes + i * kKeyGroup * 128,
                 some ? group + panel * 128 : call.pool.base, some ? 16 : 0);
    }
  }
}

template <int kDim>
__device__ void produce(const Attention& call, int n_items) {
  const KvShape& shape = call.pool.shape;
  const int group = thread_index() % kGroups * kKeyGroup;
  unsigned half = 0;
  int job;
  for (Jobs jobs{n_items * shape.n_kv_heads}; jobs.next(job);) {
    const QueryTile tile(call, job, n_items);
    const std::byte* from = call.pool.base + shape.keys_at(call.kv_layer, tile.kv_head) +
                            thread_index() / 8 * shape.row_bytes() + thread_index() % 8 * 16;
    const int last_key = tile.item().last_key;
    int first_key = tile.item().first_key;
    KeyPlace next = find_keys(call, tile.item(), first_key + group);
    for (; first_key < last_key; first_key += kKeys) {
      const std::int64_t place = next.page * shape.page_bytes() + next.slot * shape.row_bytes();
      next = find_keys(call, tile.item(), first_key + kKeys + group);
#pragma unroll 1
      for (int side = 0; side < 2; ++side, ++half) {
        const Place<kDim> at(half);
        wait_barrier(Ring<kDim>::empty(at.slot), at.parity ^ 1);
        copy_half<kDim>(Ring<kDim>::slot(at.slot), call, from + side * shape.side_bytes(), place,
                        last_key - first_key);
        arrive_when_copied(Ring<kDim>::full(at.slot));
      }
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
  const Attention& call = tile.call;
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
                                             const std::uint32_t (&q)[kDim / 16][4], int slot) {
  const Rows keys = describe_rows(Ring<kDim>::slot(slot));
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
                                             const std::uint32_t (&p)[kSteps][4], int slot) {
  const Rows values = describe_columns(Ring<kDim>::slot(slot), kPanelBytes);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_columns_async<kDim>(o, p[step], advance(values, step * 16 * 128), true);
  }
  commit_products();
}

// Scores become weights; `change` is what sums so far are to be multiplied by. kBorder: some row
// does not see some key. `scale`: of scores, log2(e) included.
template <bool kBorder>
__device__ __forceinline__ void soften(float (&s)[kKeys / 2], Softmax& rows, float (&change)[2],
                                       int first_key, float scale) {
  const int column = thread_index() % 4 * 2;
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

__device__ __forceinline__ void soften_tile(float (&s)[kKeys / 2], Softmax& rows,
                                            float (&change)[2], int first_key, float scale) {
  // Of the warp's rows the first sees least.
  if (first_key + kKeys <= shuffle(rows.limit[0], 0)) {
    soften<false>(s, rows, change, first_key, scale);
  } else {
    soften<true>(s, rows, change, first_key, scale);
  }
}

__device__ __forceinline__ void pack_weights(std::uint32_t (&p)[kSteps][4],
                                             const float (&s)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) p[i / 4][i % 4] = pack_bf16x2(s[2 * i], s[2 * i + 1]);
}

template <int kDim>
__device__ __forceinline__ void store_rows(const QueryTile& tile, int first_row,
                                           const Softmax& rows, const float (&o)[kDim / 2]) {
  const Attention& call = tile.call;
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
template <int kDim>
struct Order {
  int consumer;
  unsigned n_turns = 0;

  __device__ void wait_turn() {
    wait_barrier(Ring<kDim>::turn(consumer), (n_turns & 1) ^ (consumer == 0 ? 1 : 0));
    ++n_turns;
    show_to_products();  // what copies wrote that were waited for
    start_products();
  }
  __device__ void pass_turn() const { arrive_once(Ring<kDim>::turn(1 - consumer)); }
  __device__ static void release(const Place<kDim>& at) { arrive_once(Ring<kDim>::empty(at.slot)); }
  __device__ static void wait_full(const Place<kDim>& at) {
    wait_barrier(Ring<kDim>::full(at.slot), at.parity);
  }
  __device__ static void arrive_once(Barrier* barrier) {  // by the warp
    sync_warp();
    if (thread_index() % kWarp == 0) arrive(barrier);
  }
};

// half: that of the job's first keys.
template <int kDim>
__device__ __forceinline__ void consume_job(const QueryTile& tile, Order<kDim>& order,
                                            unsigned half, float scale) {
  const int lane = thread_index() % kWarp;
  const int first_row = order.consumer * 64 + thread_index() % kWarpgroup / kWarp * 16 + lane / 4;
  std::uint32_t q[kDim / 16][4], p[kSteps][4];
  float s[kKeys / 2], o[kDim / 2], change[2];
  load_queries<kDim>(q, tile, first_row);
  Softmax rows{
      {tile.limit(first_row), tile.limit(first_row + 8)}, {-INFINITY, -INFINITY}, {0.0f, 0.0f}};
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;

  Place<kDim> keys(half);
  order.wait_full(keys);
  order.wait_turn();
  start_scores<kDim>(s, q, keys.slot);
  order.pass_turn();
  wait_products<0>();
  hold(s);
  order.release(keys);
  int first_key = tile.item().first_key;
  soften_tile(s, rows, change, first_key, scale);
  pack_weights(p, s);
  const int last_key = tile.item().last_key;
  for (first_key += kKeys; first_key < last_key; first_key += kKeys, half += 2) {
    const Place<kDim> values(half + 1);
    keys = Place<kDim>(half + 2);
    order.wait_full(values);
    order.wait_full(keys);
    order.wait_turn();
    start_scores<kDim>(s, q, keys.slot);
    start_values<kDim>(o, p, values.slot);
    order.pass_turn();
    wait_products<1>();
    hold(s);
    order.release(keys);
    soften_tile(s, rows, change, first_key, scale);
    wait_products<0>();
    hold(o);
    hold(s);
    order.release(values);
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] *= change[i / 2 % 2];
    pack_weights(p, s);
  }
  const Place<kDim> values(half + 1);
  order.wait_full(values);
  order.wait_turn();
  start_values<kDim>(o, p, values.slot);
  order.pass_turn();
  wait_products<0>();
  hold(o);
  order.release(values);
  store_rows<kDim>(tile, first_row, rows, o);
}

template <int kDim>
__device__ void consume(const Attention& call, int n_items, float scale) {
  Order<kDim> order{thread_index() / kWarpgroup - 1};
  unsigned half = 0;
  int job;
  for (Jobs jobs{n_items * call.pool.shape.n_kv_heads}; jobs.next(job);) {
    const QueryTile tile(call, job, n_items);
    consume_job<kDim>(tile, order, half, scale);
    half += 2 * static_cast<unsigned>(n_key_tiles(tile));
  }
}

// One block of three warpgroups for each multiprocessor.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attend_many_kernel(const __grid_constant__ Attention call, int n_items, float scale) {
  if (thread_index() == 0) Ring<kDim>::init();
  sync_block();
  if (thread_index() < kWarpgroup) {
    give_registers<kProducerRegisters>();
    produce<kDim>(call, n_items);
  } else {
    take_registers<kConsumerRegisters>();
    consume<kDim>(call, n_items, scale);
  }
}

// ---- choose and launch ----

template <int kDim>
void launch_kernel(const Attention& call, int n_items, const Launch& sized) {
  Launch how = sized;
  how.shared_bytes = Ring<kDim>::kBytes;
  launch("attend_many", attend_many_kernel<kDim>, how, call, n_items, score_scale(call.pool.shape));
}

}  // namespace

bool attend_many_fits(const KvShape& shape) {
  const int instance = padded_head_dim(shape.head_dim);
  return shape.format == KvFormat::kBf16 && (instance == 64 || instance == 128);
}

void attend_many(const Attention& call, int n_items, int multiprocessors, cudaStream_t stream) {
  check_attend_many(call, n_items);
  if (!attend_many_fits(call.pool.shape)) {
    fail(ErrorCode::kUnsupported,
         "[cuda] attend_many: Hopper's own reads bf16 of head_dim up to 128.");
  }
  if (n_items == 0) return;
  Launch how;
  how.blocks = std::min(n_items * call.pool.shape.n_kv_heads, multiprocessors);
  how.threads = kThreads;
  how.stream = stream;
  (padded_head_dim(call.pool.shape.head_dim) == 64 ? launch_kernel<64>
                                                   : launch_kernel<128>)(call, n_items, how);
}

}  // namespace camelid::cuda::sm90
