// Attention of few queries, at the rate at which keys and values can be read.
//
// A block of 4 warps works on a job: an item and a kv head. Of every 64 keys each warp takes 16,
// which lie in one page, for all 16 queries (ops/attention_copies.cuh).
//
// Each warp has a maximum, a sum and an accumulator of its own (online softmax), which meet in
// shared memory at the end of a job. Where keys of a tile are divided among jobs, partial results
// go to global memory, and the job that comes last combines them in their order.
#include <cmath>
#include <limits>

#include "ops/attention_copies.cuh"

namespace camelid::cuda {
namespace {

constexpr const char* kName = "attention of few queries";
constexpr float kNothing = -std::numeric_limits<float>::infinity();

constexpr int part_floats(int dim) { return kFewQueries * (dim + 2); }

template <class Shape>
class Few {
 public:
  __device__ Few(const Attention& call, const KvStrides& strides, float factor)
      : call_(call),
        n_kv_heads_(call.pool.shape.n_kv_heads),
        factor_(factor),
        copies_(call, strides) {}

  __device__ void run() {
    wait_for_previous_kernel();
    let_next_kernel_start();
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1; ++i) {
      copies_.copy_next(i);
      commit_copies();
    }
    int stage = 0;
#pragma unroll 1
    for (; Shape::job_of(round_) < copies_.n_jobs(); ++round_) {
      wait_copies<Shape::kStages - 2>();
      sync_block();  // queries and item are there, and nobody reads the last job's sums
      begin();
#pragma unroll 1
      for (int tile = item().first_key;;) {
        copies_.copy_next(Shape::previous(stage));  // all have left that one
        commit_copies();
        const int key = tile + Shape::warp() * kStepTokens;
        if (key < item().last_key) multiply(stage, key);
        tile += kKeyTile;
        if (tile >= item().last_key) break;
        stage = Shape::next(stage);
        wait_copies<Shape::kStages - 2>();
        sync_warp();
      }
      finish(stage);
      stage = Shape::next(stage);
    }
  }

 private:
  using Rows = typename Shape::Rows;

  // ---- products ----

  __device__ const AttentionItem& item() const {
    return Shape::header().items[Shape::slot_of(round_)];
  }
  __device__ int head() const { return Shape::job_of(round_) % n_kv_heads_; }

  __device__ void begin() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_[half] = kNothing;
      sum_[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Rows::kTiles; ++i) o_[i][0] = o_[i][1] = o_[i][2] = o_[i][3] = 0.0f;
    if constexpr (Shape::kKeepsQueries) {
#pragma unroll
      for (int step = 0; step < Rows::kSteps; ++step) {
        Rows::load_queries(q_[step], Shape::queries_at(Shape::slot_of(round_)), step);
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
    const unsigned rows = Shape::rows_at(stage);
    Rows::each_key_step(rows, [&](int step, const std::uint32_t(&b)[4]) {
      if constexpr (Shape::kKeepsQueries) {
        mma_bf16(s[0], q_[step], b[0], b[1]);
        mma_bf16(s[1], q_[step], b[2], b[3]);
      } else {
        std::uint32_t a[4];
        Rows::load_queries(a, Shape::queries_at(Shape::slot_of(round_)), step);
        mma_bf16(s[0], a, b[0], b[1]);
        mma_bf16(s[1], a, b[2], b[3]);
      }
    });
    const unsigned scales = Shape::scales_at(stage) + Shape::lane() % 4 * 8;
    scale(s, scales);
    if (key + kStepTokens > item().last_key ||
        (call_.causal && key + kStepTokens > item().first_index + 1)) {
      hide(s, key);
    }
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

  // Keys that a query does not see. Only a span's last ones, so limits are worked out anew.
  __device__ void hide(Scores& s, int key) const {
    const int row = Shape::lane() / 4;
    const int limit[2] = {limit_of(row), limit_of(row + 8)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = key + i / 4 * 8 + Shape::lane() % 4 * 2 + i % 2;
      if (at >= limit[i / 2 % 2]) s[i / 4][i % 4] = kNothing;
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

  // Adds up what n have, each beside its own maximum: stats(i) gives maximum and sum of part i,
  // quads(i, j) its quad j.
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
  __device__ bool has_row(int half) const {
    return half * 8 + Shape::lane() / 4 < item().n_queries;
  }

  // Brings the warps' sums together, in the stage that is done.
  __device__ void finish(int stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum_[half] += shuffle_xor(sum_[half], 1);
      sum_[half] += shuffle_xor(sum_[half], 2);
      if (Shape::lane() % 4 == 0) {
        Shape::header().stats[Shape::warp()][half * 8 + Shape::lane() / 4] =
            float2{max_[half], sum_[half]};
      }
    }
    std::byte* const sums = shared_memory() + stage * Shape::kStageBytes;
    const auto quads_of = [&](int w) {
      return reinterpret_cast<float4*>(sums + w * 2 * Shape::kSideBytes) + Shape::lane();
    };
    sync_warp();  // all lanes have read their values
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == n_halves()) break;
      if (half > 0) sync_block();
#pragma unroll
      for (int i = 0; i < Shape::kQuads; ++i) {
        quads_of(Shape::warp())[i * kWarp] = Rows::quad(o_[2 * i], o_[2 * i + 1], half);
      }
      sync_block();
      const int row = half * 8 + Shape::lane() / 4;
      const Result result = combined(
          kFewWarps, [&](int w) { return Shape::header().stats[w][row]; },
          [&](int w, int j) {
            return quads_of(w)[(Shape::warp() * Shape::kWarpQuads + j) * kWarp];
          });
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
    const int query = item().first_query + half * 8 + Shape::lane() / 4, token = query / group;
    std::uint16_t* y = call_.y + (item().first_row + token) * call_.y_stride +
                       (head() * group + query - token * group) * head_dim;
    const float factor = 1.0f / result.sum;
#pragma unroll
    for (int j = 0; j < Shape::kWarpQuads; ++j) {
      const int tile = (Shape::warp() * Shape::kWarpQuads + j) * 2;
      const int first = Rows::output_dim(Shape::lane(), tile, 0);
      const int second = Rows::output_dim(Shape::lane(), tile, 1);
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
    return call_.partials + (std::int64_t{item().first_part + part} * n_kv_heads_ + head()) *
                                part_floats(Shape::kDim);
  }
  // Where a quad, and maximum and sum of this lane's row, lie in a part: in floats.
  __device__ static unsigned quad_at(int half, int quad) {
    return static_cast<unsigned>((half * Shape::kQuads + quad) * kWarp + Shape::lane()) * 4u;
  }
  __device__ static unsigned stats_at(int half) {
    return static_cast<unsigned>(Shape::kPartStatsAt + (half * 8 + Shape::lane() / 4) * 2);
  }

  __device__ void leave(const Result& result, int part, int half) const {
    if (!has_row(half)) return;
    float* const to = part_at(part);
#pragma unroll
    for (int j = 0; j < Shape::kWarpQuads; ++j) {
      *reinterpret_cast<float4*>(to + quad_at(half, Shape::warp() * Shape::kWarpQuads + j)) =
          result.quads[j];
    }
    if (Shape::warp() == 0 && Shape::lane() % 4 == 0) {
      *reinterpret_cast<float2*>(to + stats_at(half)) = float2{result.top, result.sum};
    }
  }

  // Combines the parts of the group where it is complete, and the groups where all are.
  __device__ void complete() {
    const int n_groups = n_combined_groups(item().n_parts);
    const int group = item().part / kCombinedParts, first = group * kCombinedParts;
    const int n = min(kCombinedParts, item().n_parts - first);
    unsigned* const counters = call_.counters + std::int64_t{item().counter} * n_kv_heads_ + head();
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
      Shape::header().flag = add_atomic(counter, 1u);
      fence_blocks();
    }
    sync_block();
    if (Shape::header().flag + 1 != static_cast<unsigned>(n)) return false;
    if (thread_index() == 0) *counter = 0;
    return true;
  }

  // Of n parts, `step` apart: the result, or what takes the first one's place.
  __device__ void combine(int first, int step, int n, bool final) {
    const float* const parts = part_at(first);
    const int apart = step * n_kv_heads_ * part_floats(Shape::kDim);
#pragma unroll 1
    for (int half = 0; half < n_halves(); ++half) {
      const float* const stats = parts + stats_at(half);
      const float* const quads = parts + quad_at(half, Shape::warp() * Shape::kWarpQuads);
      Result result = {};
      if (has_row(half)) {
        result = combined(
            n,
            [&](int i) {
              return float2{load_shared_by_blocks(stats + i * apart),
                            load_shared_by_blocks(stats + i * apart + 1)};
            },
            [&](int i, int j) {
              const float* const quad = quads + i * apart + j * kWarp * 4;
              return load_shared_by_blocks(reinterpret_cast<const float4*>(quad));
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
  int n_kv_heads_;
  float factor_;  // log2(e) / sqrt(head_dim)
  FewCopies<Shape> copies_;
  // Of the job in work.
  int round_ = 0;
  float max_[2], sum_[2];  // of rows g and g + 8: of this warp's keys, and this lane's
  float o_[Rows::kTiles][4];
  std::uint32_t q_[Shape::kKeepsQueries ? Rows::kSteps : 1][4];
};

template <class Shape>
__global__ void __launch_bounds__(kFewThreads, Shape::kBlocks)
    run_attention_few(const __grid_constant__ Attention call,
                      const __grid_constant__ KvStrides strides, float factor) {
  Few<Shape>(call, strides, factor).run();
}

// ---- choose ----

// Calls f(FewShape<...>{}) with instances that suit, those with most copies in flight first, until
// it returns true. A Hopper SM has room for two blocks of most, and then 64 KB or more in flight;
// with 256 dims of bf16 for one. Two stages are for GPUs with less shared memory.
template <class F>
bool with_few_shape(KvFormat format, int dim, const F& f) {
  const auto of_bytes = [&]<KvFormat kFormat>() {
    if (dim == 64) return f(FewShape<kFormat, 64, 6>{});
    if (dim == 128) return f(FewShape<kFormat, 128, 3>{});
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
  const KvStrides strides = strides_of(shape, call.kv_layer);
  const bool done =
      with_few_shape(shape.format, padded_head_dim(shape.head_dim), [&]<class Shape>(Shape) {
        Launch how;
        how.threads = kFewThreads;
        how.shared_bytes = Shape::kHeaderAt + sizeof(FewHeader<Shape::kStages>);
        how.stream = stream;
        how.overlaps = true;
        how.blocks = multiprocessors *
                     blocks_that_fit(run_attention_few<Shape>, how.threads, how.shared_bytes);
        if (how.blocks == 0) return false;
        launch(kName, run_attention_few<Shape>, how, call, strides, factor);
        return true;
      });
  if (!done) {
    fail(ErrorCode::kUnsupported, "[cuda] ", kName, ": this GPU's shared memory has no room for ",
         kKeyTile, " keys and values of ", shape.head_dim, " dims twice.");
  }
}

}  // namespace camelid::cuda
