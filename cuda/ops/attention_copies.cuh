// How a block of attend_few holds its jobs, queries, keys and values in shared memory, and copies
// them there ahead of their use. It knows nothing of products.
//
//   job     an item and a kv head; block b of a fixed grid takes job b, then one of every next row
//           of jobs, so that neighbours run at the same time and every block has its share
//   ring    [stage][warp][keys | values][16 rows], then [warp][keys | values][16 scales]
//   slots   [stage] of queries and items: a job begins in a stage of its own
//
// A warp reads what its own lanes copied, so warps wait for one another only where jobs begin and
// end. Copies run ahead across jobs: while one ends the first keys of the next are on their way.
#pragma once

#include "device/kv.cuh"
#include "ops/attention.h"

namespace camelid::cuda {

constexpr int kFewWarps = 4;
constexpr int kFewThreads = kFewWarps * kWarp;
constexpr int kItemWords = sizeof(AttentionItem) / 4;
static_assert(kFewWarps * kStepTokens == kKeyTile);
static_assert(sizeof(AttentionItem) == 48, "lanes read an item's words, copies 16 bytes of it");

template <int kStages>
struct FewHeader {
  AttentionItem items[kStages];
  float2 stats[kFewWarps][kFewQueries];  // maximum and sum of what a warp saw
  unsigned flag;
};

template <KvFormat kFormat, int kDimOf, int kStagesOf>
struct FewShape {
  using Rows = KvRows<kFormat, kDimOf>;
  static constexpr int kDim = kDimOf;
  static constexpr int kStages = kStagesOf;
  static constexpr bool kScaled = kFormat != KvFormat::kBf16;
  static constexpr int kSideBytes = kStepTokens * Rows::kRowBytes;  // keys or values of a warp
  static constexpr int kScaleBytes = kScaled ? kStepTokens * 4 : 0;
  static constexpr int kScalesAt = kFewWarps * 2 * kSideBytes;
  static constexpr int kStageBytes = kScalesAt + kFewWarps * 2 * kScaleBytes;
  static constexpr int kQueryBytes = kFewQueries * kDim * 2;
  static constexpr int kQueriesAt = kStages * kStageBytes;
  static constexpr int kHeaderAt = kQueriesAt + kStages * kQueryBytes;
  static constexpr int kQuads = kDim / 16;               // float4s of a lane and half of its rows
  static constexpr int kWarpQuads = kQuads / kFewWarps;  // those that a warp adds up for all
  static_assert(kQuads * kWarp * 16 <= 2 * kSideBytes, "sums meet in the stage that is done");
  static_assert(kStageBytes % 512 == 0, "KvRows flips address bits");
  // On a multiprocessor, by registers: bytes take many instructions, which three hide from memory.
  static constexpr int kBlocks = kDim == 256 ? 1 : kScaled ? 3 : 2;
  // Queries stay in registers for a whole job, where there is room for them.
  static constexpr bool kKeepsQueries = kDim <= 128;
  // A partial result: [half of the rows][quad][lane] float4, then [row] maximum and sum.
  static constexpr int kPartStatsAt = kFewQueries * kDim;

  // ---- where things are ----

  __device__ static int warp() { return thread_index() / kWarp; }
  __device__ static int lane() { return thread_index() % kWarp; }
  __device__ static int next(int stage) { return stage + 1 == kStages ? 0 : stage + 1; }
  __device__ static int previous(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ static FewHeader<kStages>& header() {
    return *reinterpret_cast<FewHeader<kStages>*>(shared_memory() + kHeaderAt);
  }
  // Every second row of jobs is dealt backwards: the longest come first.
  __device__ static int job_of(int round) {
    const int block = round % 2 == 0 ? block_index() : grid_size() - 1 - block_index();
    return round * grid_size() + block;
  }
  // Keys of a warp; its values follow kSideBytes later.
  __device__ static unsigned rows_at(int stage) {
    return shared_address(shared_memory()) + stage * kStageBytes + warp() * 2 * kSideBytes;
  }
  __device__ static unsigned scales_at(int stage) {
    return shared_address(shared_memory()) + stage * kStageBytes + kScalesAt +
           warp() * 2 * kScaleBytes;
  }
  __device__ static int slot_of(int round) { return round % kStages; }
  __device__ static unsigned queries_at(int slot) {
    return shared_address(shared_memory()) + kQueriesAt + slot * kQueryBytes;
  }
};

// What KvShape would work out for every tile, worked out once on the host: in bytes.
struct KvStrides {
  std::int64_t page = 0;   // from a page to the next
  std::int64_t layer = 0;  // from a page to the keys of this layer's first head
  std::int64_t head = 0;   // from keys of a head to the next one's
  std::int32_t side = 0;   // from keys to values
  std::int32_t scales = 0;
  std::int32_t row = 0;
};

inline KvStrides strides_of(const KvShape& shape, int layer) {
  return {shape.page_bytes(),
          shape.keys_at(layer, 0),
          2 * shape.side_bytes(),
          static_cast<std::int32_t>(shape.side_bytes()),
          static_cast<std::int32_t>(shape.scales_at()),
          shape.row_bytes()};
}

// The copies of a block, in the order in which it works: all threads call the same functions.
template <class Shape>
class FewCopies {
 public:
  // Asks for the first item and its pages, which no kernel writes.
  __device__ FewCopies(const Attention& call, const KvStrides& strides)
      : call_(call),
        strides_(strides),
        n_kv_heads_(call.pool.shape.n_kv_heads),
        n_jobs_(*call.n_items * n_kv_heads_) {
    ask_for_item();
    find_job();
  }

  __device__ int n_jobs() const { return n_jobs_; }

  // Copies this warp's keys and values of the next tile, if there is one, to a stage.
  __device__ void copy_next(int stage) {
    const int last_key = item_word(kLastKey);
    if (tile_ >= last_key) return;
    if (tile_ == item_word(kFirstKey)) copy_queries();
    const int n = last_key - tile_ - Shape::warp() * kStepTokens;
    const int id = shuffle(id_, page_);
    if (n > 0) {
      const std::byte* keys =
          call_.pool.base + strides_.layer + id * strides_.page + head_ * strides_.head;
      const unsigned to = Shape::rows_at(stage), scales_to = Shape::scales_at(stage);
      copy_side(to, scales_to, keys, n);
      copy_side(to + Shape::kSideBytes, scales_to + Shape::kScaleBytes, keys + strides_.side, n);
    }
    tile_ += kKeyTile;
    token_ += kKeyTile;
    if (tile_ >= last_key) {
      find_job();
    } else {
      find_page();
    }
  }

 private:
  using Rows = typename Shape::Rows;

  __device__ void ask_for_item() {
    const int job = Shape::job_of(round_);
    if (job < n_jobs_ && Shape::lane() < kItemWords) {
      next_ = reinterpret_cast<const int*>(call_.items + job / n_kv_heads_)[Shape::lane()];
    }
  }

  __device__ void ask_for_pages() {
    const int page = first_page_ + Shape::lane();
    const int list = item_word(kPageList), last_key = item_word(kLastKey);
    if (std::int64_t{page} * call_.pool.shape.page_size < last_key) {
      id_ = call_.page_table[list + page];
    }
  }

  enum Word {
    kFirstRow = 0,
    kPageList = 2,
    kFirstQuery = 3,
    kQueries = 4,
    kFirstKey = 5,
    kLastKey = 6
  };
  __device__ int item_word(Word which) const { return shuffle(word_, which); }

  // Goes to the next job, where there is one.
  __device__ void find_job() {
    const int job = Shape::job_of(round_);
    if (job >= n_jobs_) return;
    word_ = next_;
    head_ = job % n_kv_heads_;
    tile_ = item_word(kFirstKey);
    first_page_ = tile_ / call_.pool.shape.page_size;
    page_ = 0;
    token_ = tile_ - first_page_ * call_.pool.shape.page_size + Shape::warp() * kStepTokens;
    ++round_;
    ask_for_pages();
    ask_for_item();
    find_page();
  }

  // A warp's 16 keys begin at a multiple of 16, so one page has them all.
  __device__ void find_page() {
    const int page_size = call_.pool.shape.page_size;
    while (token_ >= page_size) {
      token_ -= page_size;
      ++page_;
    }
    if (page_ >= kWarp) {
      first_page_ += page_;
      page_ = 0;
      ask_for_pages();
    }
  }

  // Copies n rows of keys or values; of further ones, and of dims past head_dim, zeros: what lies
  // there in memory may be NaN, and 0 * NaN is not 0.
  __device__ void copy_side(unsigned to, unsigned scales_to, const std::byte* side, int n) {
    const int head_dim = call_.pool.shape.head_dim;
    constexpr int kRows = kWarp / Rows::kPieces;  // that the warp copies at once
    const int first = Shape::lane() / Rows::kPieces, piece = Shape::lane() % Rows::kPieces;
    const unsigned place = to + Rows::place(first, piece);
    const auto offset = static_cast<unsigned>((token_ + first) * strides_.row + piece * 16);
    const std::byte* from = side + offset;
    if (n >= kStepTokens && head_dim == Shape::kDim) {
#pragma unroll
      for (int row = 0; row < kStepTokens; row += kRows) {
        copy_async(Rows::further(place, row), from + row * Rows::kRowBytes);
      }
    } else {
      const int bytes = head_dim * (Shape::kScaled ? 1 : 2) - piece * 16;
#pragma unroll 1
      for (int row = 0; row < kStepTokens; row += kRows) {
        const int n_bytes = first + row < n ? min(max(bytes, 0), 16) : 0;
        copy_async(Rows::further(place, row), n_bytes == 0 ? side : from, n_bytes);
        from += kRows * strides_.row;
      }
    }
    if constexpr (Shape::kScaled) {
      if (Shape::lane() < Shape::kScaleBytes / 16) {
        const int at = Shape::lane() * 16;
        copy_async(scales_to + at, side + static_cast<unsigned>(strides_.scales + token_ * 4 + at),
                   min(max(n * 4 - at, 0), 16));
      }
    }
  }

  // By all warps together: the job's queries, zeros around them, and its item.
  __device__ void copy_queries() {
    const int slot = Shape::slot_of(round_ - 1), n_queries = item_word(kQueries);
    const int first_query = item_word(kFirstQuery), first_row = item_word(kFirstRow);
    const int head_dim = call_.pool.shape.head_dim, group = call_.n_heads / n_kv_heads_;
    constexpr int kPieces = Shape::kDim / 8;
#pragma unroll 1
    for (int i = thread_index(); i < kFewQueries * kPieces; i += kFewThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool there = row < n_queries && piece * 8 < head_dim;
      const int query = first_query + row, token = query / group;
      const std::uint16_t* from = call_.q;
      if (there) {
        from += (first_row + token) * call_.q_stride +
                (head_ * group + query - token * group) * head_dim + piece * 8;
      }
      copy_async(Shape::queries_at(slot) + Rows::query_place(row, piece), from, there ? 16 : 0);
    }
    if (thread_index() < kItemWords / 4) {
      const int item = Shape::job_of(round_ - 1) / n_kv_heads_;
      copy_async(reinterpret_cast<std::byte*>(&Shape::header().items[slot]) + thread_index() * 16,
                 reinterpret_cast<const std::byte*>(call_.items + item) + thread_index() * 16, 16);
    }
  }

  const Attention& call_;
  const KvStrides& strides_;
  int n_kv_heads_, n_jobs_;
  // An item's words are spread over the lanes, which takes one register and not seven. The item
  // after this one, and the pages of the next keys, were asked for a turn of the loop before they
  // are needed.
  int round_ = 0;  // of the job after this one
  int next_ = 0;   // lane's word of that job's item
  int word_ = 0;   // and of this one's
  int head_ = 0;
  int tile_ = 0;                 // first of the next 64 keys; the item's last or more: no other job
  int page_ = 0, token_ = 0;     // where this warp's keys of it lie: page from first_page_ on
  int first_page_ = 0, id_ = 0;  // lane's entry of the page table is of page first_page_ + lane
};

}  // namespace camelid::cuda
