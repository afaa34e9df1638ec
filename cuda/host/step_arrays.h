// What the host knows of a step before it runs, in device memory: tokens, places, angles, page
// tables, and who attends to what. Addresses stay the same from step to step while they suffice, so
// that a recorded launch finds the next step's.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "device/growing.h"
#include "host/gpu.h"
#include "layout/kv_page.h"
#include "ops/attention_plan.h"
#include "ops/top_logits.h"

namespace camelid::cuda {

// Of all layers of a kind; device memory but for the counts.
struct KindArrays {
  KvPool pool;
  std::int32_t n_heads = 0;
  bool causal = true;
  const KvPlace* places = nullptr;
  const float* rotation = nullptr;
  const std::int32_t* page_table = nullptr;
  const AttentionItem* few = nullptr;
  const std::int32_t* n_few = nullptr;
  std::int32_t few_count = 0;  // the same on the host
  const AttentionItem* many = nullptr;
  std::int32_t n_many = 0;   // on the host
  bool hopper_many = false;  // for Hopper's attend_many
  float* partials = nullptr;
  unsigned* counters = nullptr;
};

KvShape kv_shape(const KvPages& pages);  // throws kUnsupported

class StepArrays {
 public:
  explicit StepArrays(const Gpu& gpu) : gpu_(gpu) {}

  // Sends what `plan` says; it may be gone when this returns.
  void set(const StepPlan& plan);

  std::int32_t n_tokens() const { return n_tokens_; }
  std::int32_t n_rows() const { return n_rows_; }
  const std::int32_t* tokens() const { return tokens_; }
  const std::int32_t* rows() const { return rows_; }
  const float* query_scale() const { return query_scale_; }
  const Sampling& sampling() const { return sampling_; }
  const KindArrays& kind(bool local) const { return kinds_[local ? 1 : 0]; }

 private:
  struct Staged {
    PinnedMemory memory;
    std::size_t bytes = 0;
    Event sent;
  };
  struct Section {
    const void* from;
    std::size_t bytes;
    GrowingMemory* to;
  };
  void describe(const KvPlan& plan, bool local);
  template <class T>
  const T* place(std::span<const T> values, GrowingMemory& to);
  void send();

  Gpu gpu_;
  std::array<Staged, 2> staged_;
  unsigned turn_ = 0;
  std::vector<Section> sections_;

  std::int32_t n_tokens_ = 0;
  std::int32_t n_rows_ = 0;
  const std::int32_t* tokens_ = nullptr;
  const std::int32_t* rows_ = nullptr;
  const float* query_scale_ = nullptr;
  Sampling sampling_;
  std::array<KindArrays, 2> kinds_;

  struct KindMemory {
    std::vector<AttentionSpan> spans;
    std::vector<KvPlace> places;
    std::vector<std::int32_t> page_table;
    AttentionPlan plan;
    std::int32_t n_few = 0;
    GrowingMemory places_at, rotation_at, page_table_at, few_at, n_few_at, many_at, partials_at,
        counters_at;
  };
  std::array<KindMemory, 2> memories_;
  GrowingMemory tokens_at_, rows_at_, query_scale_at_, factors_at_, uniforms_at_;
};

}  // namespace camelid::cuda
