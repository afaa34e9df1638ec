// Attention of few queries, at the rate at which keys and values can be read.
//
//   job     an item and a kv head; block b of a fixed grid takes job b, then one of every next row
//           of jobs, so that neighbours run at the same time and every block has its share
//   block   4 warps; of every 64 keys each warp takes 16, which lie in one page, for all 16 queries
//   ring    [stage][warp][keys | values][16 rows], then [warp][keys | values][16 scales]
//           A warp reads what its own lanes copied, so warps wait for one another only where jobs
//           begin and end. Copies run ahead across jobs: while one ends the next is on its way.
//   slots   [stage] of queries and items: a job begins in a stage of its own
//
// Each warp has a maximum, a sum and an accumulator of its own (online softmax), which meet in
// shared memory at the end of a job. Where keys of a tile are divided among jobs, partial results
// go to global memory, and the job that comes last combines them in their order.
#include <cmath>
#include <limits>

#include "device/kv.cuh"
#include "ops/attention.h"

namespace camelid::cuda {
namespace {

constexpr const char* kName = "attention of few queries";
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kItemWords = sizeof(AttentionItem) / 4;
constexpr float kNothing = -std::numeric_limits<float>::infinity();
static_assert(kWarps * kStepTokens == kKeyTile);
static_assert(sizeof(AttentionItem) == 48, "lanes read an item's words, copies 16 bytes of it");

template <KvFormat kFormat, int kDimOf, int kStagesOf>
struct FewShape {
  using Rows = KvRows<kFormat, kDimOf>;
  static constexpr int kDim = kDimOf;
  static constexpr int kStages = kStagesOf;
  static constexpr bool kScaled = kFormat != KvFormat::kBf16;
  static constexpr int kSideBytes = kStepTokens * Rows::kRowBytes;  // keys or values of a warp
  static constexpr int kScaleBytes = kScaled ? kStepTokens * 4 : 0;
  static constexpr int kScalesAt = kWarps * 2 * kSideBytes;
  static constexpr int kStageBytes = kScalesAt + kWarps * 2 * kScaleBytes;
  static constexpr int kQueryBytes = kFewQueries * kDim * 2;
  static constexpr int kQueriesAt = kStages * kStageBytes;
  static constexpr int kHeaderAt = kQueriesAt + kStages * kQueryBytes;
  static constexpr int kQuads = kDim / 16;            // float4s of a lane and half of its rows
  static constexpr int kWarpQuads = kQuads / kWarps;  // those that a warp adds up for all
  static_assert(kQuads * kWarp * 16 <= 2 * kSideBytes, "sums meet in the stage that is done");
  static_assert(kStageBytes % 512 == 0, "KvRows flips address bits");
  // Queries stay in registers for a whole job, where there is room for them.
  static constexpr bool kKeepsQueries = kDim <= 128;
  // A partial result: [half of the rows][quad][lane] float4, then [row] maximum and sum.
  static constexpr int kPartStatsAt = kFewQueries * kDim;
};

constexpr int part_floats(int dim) { return kFewQueries * (dim + 2); }

template <int kStages>
struct Header {
  AttentionItem items[kStages];
  float2 stats[kWarps][kFewQueries];  // maximum and sum of what a warp saw
  unsigned flag;
};

template <class Shape>
class Few {
 public:
  // `factor`: log2(e) / sqrt(head_dim).
  __device__ Few(const Attention& call, float factor)
      : call_(call),
        n_kv_heads_(call.pool.shape.n_kv_heads),
        n_jobs_(*call.n_items * n_kv_heads_),
        factor_(factor) {}

  __device__ void run() {
    ask_for_item();
    find_load();
    wait_for_previous_kernel();
    let_next_kernel_start();
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1; ++i) {
      load_keys();
      commit_copies();
    }
    int stage = 0, slot = 0;
#pragma unroll 1
    for (int round = 0; job_of(round) < n_jobs_; ++round) {
      wait_copies<Shape::kStages - 2>();
      sync_block();  // queries and item are there, and nobody reads the last job's sums
      begin(slot, job_of(round));
      const int last_key = item().last_key;
      int key = item().first_key + warp() * kStepTokens;
#pragma unroll 1
      for (int left = divide_up(last_key - item().first_key, kKeyTile);;) {
        load_keys();
        commit_copies();
        if (key < last_key) multiply(stage, key);
        if (--left == 0) break;
        key += kKeyTile;
        stage = next(stage);
        wait_copies<Shape::kStages - 2>();
        sync_warp();
      }
      finish(stage);
      stage = next(stage);
      slot = next(slot);
    }
  }

 private:
  using Rows = typename Shape::Rows;

  __device__ static int warp() { return thread_index() / kWarp; }
  __device__ static int lane() { return thread_index() % kWarp; }
  __device__ static int next(int stage) { return stage + 1 == Shape::kStages ? 0 : stage + 1; }
  __device__ static Header<Shape::kStages>& header() {
    return *reinterpret_cast<Header<Shape::kStages>*>(shared_memory() + Shape::kHeaderAt);
  }
  // Every second row of jobs is dealt backwards: the longest come first.
  __device__ static int job_of(int round) {
    const int block = round % 2 == 0 ? block_index() : grid_size() - 1 - block_index();
    return round * grid_size() + block;
  }
  // Keys of a warp; its values follow kSideBytes later.
  __device__ static unsigned rows_at(int stage) {
    return shared_address(shared_memory()) + stage * Shape::kStageBytes +
           warp() * 2 * Shape::kSideBytes;
  }
  __device__ static unsigned scales_at(int stage) {
    return shared_address(shared_memory()) + stage * Shape::kStageBytes + Shape::kScalesAt +
           warp() * 2 * Shape::kScaleBytes;
  }
  __device__ static unsigned queries_at(int slot) {
    return shared_address(shared_memory()) + Shape::kQueriesAt + slot * Shape::kQueryBytes;
  }

  // ---- copies ahead ----

  // What loads do not wait for: the item after the one whose keys are copied, and the pages of the
  // next keys, were asked for a turn of the loop earlier.
  struct Load {
    int round = 0;          // of the job after this one
    int word = 0;           // of that job's item, lane's
    int left = 0;           // tiles of this job to copy
    bool begins = false;    // none of them was copied yet
    int key = 0, last = 0;  // this warp's next, and one past the item's
    int page_list = 0, first_page = 0;
    int ids = 0;              // of page first_page + lane
    int page = 0, token = 0;  // of `key`: page from first_page on
    int head = 0;
    int first_row = 0, first_query = 0, n_queries = 0;
    int stage = 0, slot = 0;
  };

  __device__ void ask_for_item() {
    const int job = job_of(load_.round);
    if (job < n_jobs_ && lane() < kItemWords) {
      load_.word = reinterpret_cast<const int*>(call_.items + job / n_kv_heads_)[lane()];
    }
  }

  __device__ void ask_for_pages() {
    const int page = load_.first_page + lane();
    if (std::int64_t{page} * call_.pool.shape.page_size < load_.last) {
      load_.ids = call_.page_table[load_.page_list + page];
    }
  }

  // Goes to the next job, where there is one.
  __device__ void find_load() {
    const int job = job_of(load_.round);
    if (job >= n_jobs_) return;
    load_.first_row = shuffle(load_.word, 0);
    load_.page_list = shuffle(load_.word, 2);
    load_.first_query = shuffle(load_.word, 3);
    load_.n_queries = shuffle(load_.word, 4);
    const int first_key = shuffle(load_.word, 5);
    load_.last = shuffle(load_.word, 6);
    load_.head = job % n_kv_heads_;
    load_.key = first_key + warp() * kStepTokens;
    load_.left = divide_up(load_.last - first_key, kKeyTile);
    load_.begins = true;
    load_.first_page = first_key / call_.pool.shape.page_size;
    load_.page = 0;
    load_.token = load_.key - load_.first_page * call_.pool.shape.page_size;
    ++load_.round;
    ask_for_pages();
    ask_for_item();
    find_page();
  }

  // A warp's 16 keys begin at a multiple of 16, so one page has them all.
  __device__ void find_page() {
    const int page_size = call_.pool.shape.page_size;
    while (load_.token >= page_size) {
      load_.token -= page_size;
      ++load_.page;
    }
    if (load_.page >= kWarp) {
      load_.first_page += load_.page;
      load_.page = 0;
      ask_for_pages();
    }
  }

  // Copies this warp's keys and values of the next tile, if there is one.
  __device__ void load_keys() {
    if (load_.left == 0) return;
    if (load_.begins) load_queries();
    const int n = load_.last - load_.key;
    const int id = shuffle(load_.ids, load_.page);
    if (n > 0) {
      const KvShape& shape = call_.pool.shape;
      const std::byte* side =
          call_.pool.base + id * shape.page_bytes() + shape.keys_at(call_.kv_layer, load_.head);
      const unsigned to = rows_at(load_.stage), scales_to = scales_at(load_.stage);
      copy_side(to, scales_to, side, n);
      copy_side(to + Shape::kSideBytes, scales_to + Shape::kScaleBytes, side + shape.side_bytes(),
                n);
    }
    load_.key += kKeyTile;
    load_.token += kKeyTile;
    load_.stage = next(load_.stage);
    if (--load_.left == 0) {
      load_.slot = next(load_.slot);
      find_load();
    } else {
      find_page();
    }
  }

  // Copies n rows of keys or values; of further ones, and of dims past head_dim, zeros: what lies in
  // memory there may be NaN, and 0 * NaN is not 0.
  __device__ void copy_side(unsigned to, unsigned scales_to, const std::byte* side, int n) {
    const KvShape& shape = call_.pool.shape;
    const int row_bytes = shape.row_bytes();
    const int first = lane() / Rows::kPieces, piece = lane() % Rows::kPieces;
    const std::byte* from = side + (load_.token + first) * row_bytes + piece * 16;
    constexpr int kRows = kWarp / Rows::kPieces;  // that the warp copies at once
    const int bytes = shape.head_dim * (Shape::kScaled ? 1 : 2) - piece * 16;
    if (n >= kStepTokens && shape.head_dim == Shape::kDim) {
#pragma unroll
      for (int row = 0; row < kStepTokens; row += kRows) {
        copy_async_once(to + Rows::place(first + row, piece), from);
        from += kRows * row_bytes;
      }
    } else {
#pragma unroll 1
      for (int row = 0; row < kStepTokens; row += kRows) {
        const int n_bytes = first + row < n ? min(max(bytes, 0), 16) : 0;
        copy_async(to + Rows::place(first + row, piece), n_bytes == 0 ? side : from, n_bytes);
        from += kRows * row_bytes;
      }
    }
    if constexpr (Shape::kScaled) {
      if (lane() < Shape::kScaleBytes / 16) {
        copy_async(scales_to + lane() * 16,
                   side + shape.scales_at() + load_.token * 4 + lane() * 16,
                   min(max(n * 4 - lane() * 16, 0), 16));
      }
    }
  }

  // By all warps together: the job's queries, zeros around them, and its item.
  __device__ void load_queries() {
    load_.begins = false;
    const int head_dim = call_.pool.shape.head_dim, group = call_.n_heads / n_kv_heads_;
    constexpr int kPieces = Shape::kDim / 8;
#pragma unroll 1
    for (int i = thread_index(); i < kFewQueries * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool there = row < load_.n_queries && piece * 8 < head_dim;
      const int query = load_.first_query + row, token = query / group;
      const std::uint16_t* from = call_.q;
      if (there) {
        from += (load_.first_row + token) * call_.q_stride +
                (load_.head * group + query - token * group) * head_dim + piece * 8;
      }
      copy_async(queries_at(load_.slot) + Rows::query_place(row, piece), from, there ? 16 : 0);
    }
    if (thread_index() < kItemWords / 4) {
      const int item = job_of(load_.round - 1) / n_kv_heads_;
      copy_async(reinterpret_cast<std::byte*>(&header().items[load_.slot]) + thread_index() * 16,
                 reinterpret_cast<const std::byte*>(call_.items + item) + thread_index() * 16, 16);
    }
  }

  // ---- products ----

  __device__ const AttentionItem& item() const { return header().items[slot_]; }

  __device__ void begin(int slot, int job) {
    slot_ = slot;
    head_ = job % n_kv_heads_;
    all_see_ = limit_of(0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      limit_[half] = limit_of(lane() / 4 + half * 8);
      max_[half] = kNothing;
      sum_[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Rows::kTiles; ++i) o_[i][0] = o_[i][1] = o_[i][2] = o_[i][3] = 0.0f;
    if constexpr (Shape::kKeepsQueries) {
#pragma unroll
      for (int step = 0; step < Rows::kSteps; ++step) {
        Rows::load_queries(q_[step], queries_at(slot_), step);
      }
    }
  }

  // One past the last key that a query sees.
  __device__ int limit_of(int row) const {
    if (!call_.causal) return item().last_key;
    const int token = (item().first_query + row) / (call_.n_heads / n_kv_heads_);
    return min(item().first_index + token + 1, item().last_key);
  }

  // Scores of a lane: rows g and g + 8, keys 2t, 2t + 1 and 2t + 8, 2t + 9.
  using Scores = float[2][4];

  // This warp's 16 keys and values of a stage.
  __device__ void multiply(int stage, int key) {
    Scores s = {};
    const unsigned rows = rows_at(stage);
    Rows::each_key_step(rows, [&](int step, const std::uint32_t(&b)[4]) {
      if constexpr (Shape::kKeepsQueries) {
        mma_bf16(s[0], q_[step], b[0], b[1]);
        mma_bf16(s[1], q_[step], b[2], b[3]);
      } else {
        std::uint32_t a[4];
        Rows::load_queries(a, queries_at(slot_), step);
        mma_bf16(s[0], a, b[0], b[1]);
        mma_bf16(s[1], a, b[2], b[3]);
      }
    });
    const unsigned scales = scales_at(stage) + lane() % 4 * 8;
    scale(s, scales);
    if (key + kStepTokens > all_see_) hide(s, key);
    softmax(s);
    std::uint32_t p[4];
    round(p, s, scales + Shape::kScaleBytes);
    Rows::each_value_tile(
        rows + Shape::kSideBytes,
        [&](int tile, std::uint32_t b0, std::uint32_t b1) { mma_bf16(o_[tile], p, b0, b1); });
  }

  // To powers of 2: by log2(e) / sqrt(head_dim), and by what keys were divided by.
  __device__ void scale(Scores& s, unsigned scales) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float2 by = {factor_, factor_};
      if constexpr (Shape::kScaled) {
        load_shared(by, scales + tile * 32);
        by.x *= factor_;
        by.y *= factor_;
      }
      s[tile][0] *= by.x;
      s[tile][1] *= by.y;
      s[tile][2] *= by.x;
      s[tile][3] *= by.y;
    }
  }

  // Keys that a query does not see. A key that is not there has no score that counts.
  __device__ void hide(Scores& s, int key) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = key + i / 4 * 8 + lane() % 4 * 2 + i % 2;
      if (at >= limit_[i / 2 % 2]) s[i / 4][i % 4] = kNothing;
    }
  }

  // Turns scores into probabilities beside the largest score so far.
  __device__ void softmax(Scores& s) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = half * 2;
      float top = max(max(s[0][i], s[0][i + 1]), max(s[1][i], s[1][i + 1]));
      top = max(top, shuffle_xor(top, 1));
      top = max(max_[half], max(top, shuffle_xor(top, 2)));
      const float base = top == kNothing ? 0.0f : top;
      factor[half] = exp2_fast(max_[half] - base);
      max_[half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        s[tile][i] = exp2_fast(s[tile][i] - base);
        s[tile][i + 1] = exp2_fast(s[tile][i + 1] - base);
        sum += s[tile][i] + s[tile][i + 1];
      }
      sum_[half] = sum_[half] * factor[half] + sum;
    }
    // Seldom after the first keys, and where it is not so nothing changes.
    if (!any_of_warp(factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < Rows::kTiles; ++i) {
      o_[i][0] *= factor[0];
      o_[i][1] *= factor[0];
      o_[i][2] *= factor[1];
      o_[i][3] *= factor[1];
    }
  }

  // Probabilities as the A fragment of one step, times what values were divided by.
  __device__ static void round(std::uint32_t (&p)[4], const Scores& s, unsigned scales) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float2 by = {1.0f, 1.0f};
      if constexpr (Shape::kScaled) load_shared(by, scales + tile * 32);
      p[tile * 2] = pack_bf16x2(s[tile][0] * by.x, s[tile][1] * by.y);
      p[tile * 2 + 1] = pack_bf16x2(s[tile][2] * by.x, s[tile][3] * by.y);
    }
  }

  // ---- results ----

  // A row's maximum, sum and this lane's four sums of two tiles each; a warp has a quarter of them.
  struct Result {
    float top, sum;
    float4 quads[Shape::kWarpQuads];
  };

  // Adds up what several have, each beside its own maximum: f(i) gives part i's maximum and sum,
  // g(i, j) its quad j.
  template <class Stats, class Quads>
  __device__ static Result combined(int n, const Stats& stats, const Quads& quads) {
    Result result = {kNothing, 0.0f, {}};
#pragma unroll 4
    for (int i = 0; i < n; ++i) result.top = max(result.top, stats(i).x);
    const float base = result.top == kNothing ? 0.0f : result.top;
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      const float2 part = stats(i);
      const float factor = exp2_fast(part.x - base);
      result.sum += factor * part.y;
#pragma unroll
      for (int j = 0; j < Shape::kWarpQuads; ++j) {
        const float4 quad = quads(i, j);
        result.quads[j].x += factor * quad.x;
        result.quads[j].y += factor * quad.y;
        result.quads[j].z += factor * quad.z;
        result.quads[j].w += factor * quad.w;
      }
    }
    return result;
  }

  // The rows of the halves that there are: 8 queries at most are the first half alone.
  __device__ int n_halves() const { return item().n_queries > 8 ? 2 : 1; }
  __device__ bool has_row(int half) const { return half * 8 + lane() / 4 < item().n_queries; }

  // Brings the warps' sums together, in the stage that is done.
  __device__ void finish(int stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum_[half] += shuffle_xor(sum_[half], 1);
      sum_[half] += shuffle_xor(sum_[half], 2);
      if (lane() % 4 == 0) {
        header().stats[warp()][half * 8 + lane() / 4] = float2{max_[half], sum_[half]};
      }
    }
    std::byte* const sums = shared_memory() + stage * Shape::kStageBytes;
    const auto quads_of = [&](int w) {
      return reinterpret_cast<float4*>(sums + w * 2 * Shape::kSideBytes) + lane();
    };
    sync_warp();  // all lanes have read their values
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == n_halves()) break;
      if (half > 0) sync_block();
#pragma unroll
      for (int i = 0; i < Shape::kQuads; ++i) {
        quads_of(warp())[i * kWarp] = Rows::quad(o_[2 * i], o_[2 * i + 1], half);
      }
      sync_block();
      const int row = half * 8 + lane() / 4;
      const Result result = combined(
          kWarps, [&](int w) { return header().stats[w][row]; },
          [&](int w, int j) { return quads_of(w)[(warp() * Shape::kWarpQuads + j) * kWarp]; });
      if (item().n_parts == 1) {
        write(result, half);
      } else {
        leave(result, item().part, half);
      }
    }
    if (item().n_parts > 1) complete();
  }

  __device__ void write(const Result& result, int half) const {
    if (!has_row(half)) return;
    const int head_dim = call_.pool.shape.head_dim, group = call_.n_heads / n_kv_heads_;
    const int query = item().first_query + half * 8 + lane() / 4, token = query / group;
    std::uint16_t* y = call_.y + (item().first_row + token) * call_.y_stride +
                       (head_ * group + query - token * group) * head_dim;
    const float factor = 1.0f / result.sum;
#pragma unroll
    for (int j = 0; j < Shape::kWarpQuads; ++j) {
      const int tile = (warp() * Shape::kWarpQuads + j) * 2;
      const int first = Rows::output_dim(lane(), tile, 0);
      const int second = Rows::output_dim(lane(), tile, 1);
      const float4 quad = result.quads[j];
      if (first < head_dim) store_pair(y + first, quad.x * factor, quad.y * factor);
      if (second < head_dim) store_pair(y + second, quad.z * factor, quad.w * factor);
    }
  }
  __device__ static void store_pair(std::uint16_t* to, float low, float high) {
    *reinterpret_cast<std::uint32_t*>(to) = pack_bf16x2(low, high);
  }

  // ---- parts of results ----

  __device__ float* part_at(int part) const {
    return call_.partials + (std::int64_t{item().first_part + part} * n_kv_heads_ + head_) *
                                part_floats(Shape::kDim);
  }
  __device__ static int quad_at(int half, int quad) {  // in floats
    return ((half * Shape::kQuads + quad) * kWarp + lane()) * 4;
  }

  __device__ void leave(const Result& result, int part, int half) const {
    if (!has_row(half)) return;
    float* const to = part_at(part);
#pragma unroll
    for (int j = 0; j < Shape::kWarpQuads; ++j) {
      *reinterpret_cast<float4*>(to + quad_at(half, warp() * Shape::kWarpQuads + j)) =
          result.quads[j];
    }
    if (warp() == 0 && lane() % 4 == 0) {
      *reinterpret_cast<float2*>(to + Shape::kPartStatsAt + (half * 8 + lane() / 4) * 2) =
          float2{result.top, result.sum};
    }
  }

  // Combines the parts of the group where it is complete, and the groups where all are.
  __device__ void complete() {
    const int n_groups = n_combined_groups(item().n_parts);
    const int group = item().part / kCombinedParts, first = group * kCombinedParts;
    const int n = min(kCombinedParts, item().n_parts - first);
    unsigned* const counters = call_.counters + std::int64_t{item().counter} * n_kv_heads_ + head_;
    if (!is_last(counters + group * n_kv_heads_, n)) return;
    combine(first, 1, n, n_groups == 1);
    if (n_groups == 1 || !is_last(counters + n_groups * n_kv_heads_, n_groups)) return;
    combine(0, kCombinedParts, n_groups, true);
  }

  // Whether all others of n blocks have been here; what they left is then there to be read.
  __device__ bool is_last(unsigned* counter, int n) {
    sync_block();
    if (thread_index() == 0) {
      fence_blocks();  // what the whole block wrote: it met before
      header().flag = add_atomic(counter, 1u);
      fence_blocks();
    }
    sync_block();
    if (header().flag + 1 != static_cast<unsigned>(n)) return false;
    if (thread_index() == 0) *counter = 0;
    return true;
  }

  // Of n parts, `step` apart: the result, or what takes the first one's place.
  __device__ void combine(int first, int step, int n, bool final) {
#pragma unroll 1
    for (int half = 0; half < n_halves(); ++half) {
      Result result = {};
      if (has_row(half)) {
        result = combined(
            n,
            [&](int i) {
              const float* stats =
                  part_at(first + i * step) + Shape::kPartStatsAt + (half * 8 + lane() / 4) * 2;
              return float2{load_shared_by_blocks(stats), load_shared_by_blocks(stats + 1)};
            },
            [&](int i, int j) {
              return load_shared_by_blocks(reinterpret_cast<const float4*>(
                  part_at(first + i * step) + quad_at(half, warp() * Shape::kWarpQuads + j)));
            });
      }
      if (final) {
        write(result, half);
      } else {
        sync_block();  // all have read what is replaced
        leave(result, first, half);
      }
    }
  }

  const Attention& call_;
  int n_kv_heads_, n_jobs_;
  float factor_;
  Load load_;
  // Of the job in work.
  int slot_ = 0, head_ = 0;
  int all_see_ = 0;        // limit_ of the tile's first query
  int limit_[2];           // one past the last key that rows g and g + 8 see
  float max_[2], sum_[2];  // of these rows: of this warp's keys, and this lane's
  float o_[Rows::kTiles][4];
  std::uint32_t q_[Shape::kKeepsQueries ? Rows::kSteps : 1][4];
};

template <class Shape>
__global__ void __launch_bounds__(kThreads, 1)
    run_attention_few(const __grid_constant__ Attention call, float factor) {
  Few<Shape>(call, factor).run();
}

// ---- choose ----

// Calls f(FewShape<...>{}) with instances that suit, those with most copies in flight first, until
// it returns true. A Hopper SM has room for two blocks of most, and then 64 KB or more in flight;
// with 256 dims of bf16 for one. Two stages are for GPUs with less shared memory.
template <class F>
bool with_few_shape(KvFormat format, int dim, const F& f) {
  const auto of_bytes = [&]<KvFormat kFormat>() {
    if (dim == 64) return f(FewShape<kFormat, 64, 6>{});
    if (dim == 128) return f(FewShape<kFormat, 128, 4>{});
    return f(FewShape<kFormat, 256, 2>{});
  };
  if (format == KvFormat::kE4m3) return of_bytes.template operator()<KvFormat::kE4m3>();
  if (format == KvFormat::kInt8) return of_bytes.template operator()<KvFormat::kInt8>();
  if (dim == 64) return f(FewShape<KvFormat::kBf16, 64, 5>{});
  if (dim == 128) {
    return f(FewShape<KvFormat::kBf16, 128, 3>{}) || f(FewShape<KvFormat::kBf16, 128, 2>{});
  }
  return f(FewShape<KvFormat::kBf16, 256, 3>{}) || f(FewShape<KvFormat::kBf16, 256, 2>{});
}

// ---- launch ----

bool aligned(const void* pointer, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && stride % 8 == 0;
}

void check_call(const Attention& call) {
  const KvShape& shape = call.pool.shape;
  if (padded_head_dim(shape.head_dim) == 0 || shape.page_size <= 0 ||
      shape.page_size % kStepTokens != 0) {
    fail(ErrorCode::kUnsupported, "[cuda] ", kName, ": head_dim ", shape.head_dim, " and pages of ",
         shape.page_size, " tokens; wanted are multiples of 8 up to 256, and of 16.");
  }
  if (shape.n_kv_heads <= 0 || call.n_heads <= 0 || call.n_heads % shape.n_kv_heads != 0 ||
      !aligned(call.q, call.q_stride) || !aligned(call.y, call.y_stride) ||
      !aligned(call.items, 0) || !aligned(call.partials, 0) || !aligned(call.pool.base, 0)) {
    fail(ErrorCode::kInternal, "[cuda] ", kName, ": ", call.n_heads, " heads for ",
         shape.n_kv_heads, " of keys, rows of q and y every ", call.q_stride, " and ",
         call.y_stride,
         " values; wanted are a whole number of heads for each, and memory aligned to 16 bytes.");
  }
}

}  // namespace

std::size_t attention_partial_floats(const KvShape& shape, std::int64_t n_parts) {
  return static_cast<std::size_t>(n_parts * shape.n_kv_heads) *
         static_cast<std::size_t>(part_floats(padded_head_dim(shape.head_dim)));
}

void attend_few(const Attention& call, int multiprocessors, cudaStream_t stream) {
  check_call(call);
  const KvShape& shape = call.pool.shape;
  const float factor = 1.44269504f / std::sqrt(static_cast<float>(shape.head_dim));
  const bool done =
      with_few_shape(shape.format, padded_head_dim(shape.head_dim), [&]<class Shape>(Shape) {
        Launch how;
        how.threads = kThreads;
        how.shared_bytes = Shape::kHeaderAt + sizeof(Header<Shape::kStages>);
        how.stream = stream;
        how.overlaps = true;
        how.blocks = multiprocessors *
                     blocks_that_fit(run_attention_few<Shape>, how.threads, how.shared_bytes);
        if (how.blocks == 0) return false;
        launch(kName, run_attention_few<Shape>, how, call, factor);
        return true;
      });
  if (!done) {
    fail(ErrorCode::kUnsupported, "[cuda] ", kName, ": this GPU's shared memory has no room for ",
         kKeyTile, " keys and values of ", shape.head_dim, " dims twice.");
  }
}

}  // namespace camelid::cuda
