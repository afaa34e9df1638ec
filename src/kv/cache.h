// Which pages each sequence holds: global layers' pages grow with it, local layers' pages cover its
// current chunk only and go back at the boundary. Plans where a step's tokens are written and read.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kv/pages.h"
#include "model/config.h"

namespace camelid {

struct KvCacheOptions {
  KvType type = KvType::kF32;
  std::int64_t page_size = 64;  // tokens
  std::size_t limit_bytes = 0;  // both pools together
};

// Tokens of one sequence that run together; never crosses a chunk boundary.
struct SequenceSlice {
  std::int64_t sequence = 0;
  std::int64_t n_tokens = 0;
};

class KvCache {
 public:
  KvCache(Backend& backend, const ModelConfig& config, const KvCacheOptions& options);

  // Returns a new sequence's id, at position 0 and without pages.
  std::int64_t open();
  void close(std::int64_t sequence);
  std::int64_t position(std::int64_t sequence) const { return find(sequence).position; }

  // Bytes of pages one sequence of `n_tokens` holds at its largest.
  std::size_t bytes_for(std::int64_t n_tokens) const;
  // The longest sequence that fits `bytes` alone.
  std::int64_t tokens_in(std::size_t bytes) const;
  std::size_t limit_bytes() const { return budget_.limit_bytes; }
  std::size_t used_bytes() const { return budget_.used_bytes; }
  std::int64_t page_size() const { return options_.page_size; }

  // Tokens of `sequence` that may run before its local pages must go: what is left of its chunk.
  std::int64_t left_in_chunk(std::int64_t sequence) const;

  // Throws kCapacity, before anything changes, when the pages for all `slices` (whole, chunks
  // crossed included) do not fit the budget.
  void check_capacity(std::span<const SequenceSlice> slices) const;
  bool fits(std::span<const SequenceSlice> slices) const {
    return bytes_with(slices) <= budget_.limit_bytes;
  }

  // Takes the pages of `slices` and says where each row goes. The plans point into the page lists:
  // they hold until the next call on this cache. tokens and query_scale are left to the caller.
  void plan(std::span<const SequenceSlice> slices, StepPlan& out);

  // The planned tokens are written. Local pages of sequences now at a chunk boundary are freed.
  void advance(std::span<const SequenceSlice> slices);

  void check_invariants() const;

 private:
  struct Sequence {
    std::int64_t position = 0;
    std::vector<std::int32_t> local_pages;   // of the current chunk
    std::vector<std::int32_t> global_pages;  // of everything
  };
  const Sequence& find(std::int64_t sequence) const;
  Sequence& find(std::int64_t sequence);
  std::int64_t index_in_chunk(std::int64_t position) const;
  std::int64_t pages_for(std::int64_t n_tokens) const;
  std::size_t bytes_with(std::span<const SequenceSlice> slices) const;  // used then, at most
  void plan_spans(KvPlan& plan, std::span<const SequenceSlice> slices, bool local);

  KvCacheOptions options_;
  std::int64_t chunk_;  // 0: never freed
  std::int64_t n_heads_;
  KvBudget budget_;
  PagePool local_;
  PagePool global_;
  std::vector<double> frequencies_;
  bool rotate_local_ = false;   // some local layer uses RoPE
  bool rotate_global_ = false;  // some global layer does
  std::map<std::int64_t, Sequence> sequences_;
  std::int64_t next_id_ = 1;
};

}  // namespace camelid
