// A step's arrays, written into one piece of pinned memory and sent from there.
#include "host/step_arrays.h"

#include <algorithm>
#include <cstring>

#include "ops/scatter.h"
#include "sm90/attention_many.h"

namespace camelid::cuda {
namespace {

std::size_t words_of(std::size_t bytes) { return (bytes + Pieces::kBytes - 1) / Pieces::kBytes; }

}  // namespace

KvShape kv_shape(const KvPages& pages) {
  KvShape shape;
  shape.page_size = static_cast<std::int32_t>(pages.page_size);
  shape.n_layers = static_cast<std::int32_t>(pages.n_layers);
  shape.n_kv_heads = static_cast<std::int32_t>(pages.n_kv_heads);
  shape.head_dim = static_cast<std::int32_t>(pages.head_dim);
  switch (pages.type) {
    case KvType::kBf16:
      shape.format = KvFormat::kBf16;
      break;
    case KvType::kFp8:
      shape.format = KvFormat::kE4m3;
      break;
    case KvType::kInt8:
      shape.format = KvFormat::kInt8;
      break;
    case KvType::kF32:
      fail(ErrorCode::kUnsupported,
           "[cuda] kv_cache=\"f32\" is for the CPU; a GPU takes bf16, fp8 or int8.");
  }
  constexpr std::int64_t kMostHeadDim = 256;
  if (pages.head_dim % 8 != 0 || pages.head_dim > kMostHeadDim || pages.page_size % 16 != 0) {
    fail(ErrorCode::kUnsupported, "[cuda] heads of ", pages.head_dim, " values in pages of ",
         pages.page_size, " tokens; a GPU takes multiples of 8 up to ", kMostHeadDim,
         ", and of 16 tokens. Use device=\"cpu\".");
  }
  return shape;
}

template <class T>
const T* StepArrays::place(std::span<const T> values, GrowingMemory& to) {
  std::byte* at = to.at_least(words_of(values.size_bytes()) * Pieces::kBytes);
  if (!values.empty()) sections_.push_back({values.data(), values.size_bytes(), &to});
  return reinterpret_cast<const T*>(at);
}

// Copies all sections to pinned memory, from where the GPU fetches them.
void StepArrays::send() {
  if (sections_.size() > Pieces::kMost) {
    fail(ErrorCode::kInternal, "[cuda] a step has ", sections_.size(), " arrays, at most ",
         Pieces::kMost, " go up at once.");
  }
  Staged& staged = staged_[turn_];
  turn_ ^= 1u;
  staged.sent.wait();  // the step before last
  std::size_t bytes = 0;
  for (const Section& section : sections_) bytes += words_of(section.bytes) * Pieces::kBytes;
  if (staged.bytes < bytes) {
    staged.bytes = 2 * bytes;
    staged.memory = allocate_pinned(staged.bytes);
  }
  Pieces pieces;
  pieces.from = staged.memory.get();
  std::byte* next = staged.memory.get();
  for (const Section& section : sections_) {
    std::memcpy(next, section.from, section.bytes);
    const std::size_t n_words = words_of(section.bytes);
    pieces.pieces[pieces.n++] = {section.to->get(), static_cast<std::int32_t>(n_words)};
    next += n_words * Pieces::kBytes;
  }
  scatter(pieces, gpu_.stream);
  staged.sent.record(gpu_.stream);
}

void StepArrays::describe(const KvPlan& plan, bool local) {
  KindArrays& kind = kinds_[local ? 1 : 0];
  KindMemory& memory = memories_[local ? 1 : 0];
  kind = {};
  if (plan.pages.n_layers == 0) return;
  kind.pool = {static_cast<std::byte*>(plan.pages.base), kv_shape(plan.pages)};
  kind.n_heads = static_cast<std::int32_t>(plan.n_heads);
  kind.causal = plan.causal;

  memory.spans.clear();
  memory.places.clear();
  memory.page_table.clear();
  const std::int64_t page_size = plan.pages.page_size;
  for (const KvSpan& span : plan.spans) {
    const std::int64_t n_pages = (span.first_index + span.n_rows + page_size - 1) / page_size;
    memory.spans.push_back({static_cast<std::int32_t>(span.first_row),
                            static_cast<std::int32_t>(span.n_rows),
                            static_cast<std::int32_t>(span.first_index),
                            static_cast<std::int32_t>(memory.page_table.size())});
    memory.page_table.insert(memory.page_table.end(), span.pages, span.pages + n_pages);
    for (std::int64_t i = span.first_index; i < span.first_index + span.n_rows; ++i) {
      memory.places.push_back(
          {span.pages[i / page_size], static_cast<std::int32_t>(i % page_size)});
    }
  }
  const auto group = static_cast<int>(plan.n_heads / plan.pages.n_kv_heads);
  kind.hopper_many = gpu_.is_hopper() && sm90::attend_many_fits(kind.pool.shape);
  plan_attention(memory.plan, memory.spans, group, plan.causal,
                 kind.hopper_many ? sm90::kManyQueries : kManyQueries);
  memory.n_few = static_cast<std::int32_t>(memory.plan.few.size());

  kind.places = place<KvPlace>(memory.places, memory.places_at);
  kind.rotation = place<float>(plan.rotation, memory.rotation_at);
  kind.page_table = place<std::int32_t>(memory.page_table, memory.page_table_at);
  kind.few = place<AttentionItem>(memory.plan.few, memory.few_at);
  kind.n_few = place<std::int32_t>({&memory.n_few, 1}, memory.n_few_at);
  kind.few_count = memory.n_few;
  kind.many = place<AttentionItem>(memory.plan.many, memory.many_at);
  kind.n_many = static_cast<std::int32_t>(memory.plan.many.size());
  kind.partials = reinterpret_cast<float*>(memory.partials_at.at_least(
      attention_partial_floats(kind.pool.shape, memory.plan.n_parts) * sizeof(float)));
  const std::size_t n_counters = static_cast<std::size_t>(memory.plan.n_counters) *
                                 static_cast<std::size_t>(plan.pages.n_kv_heads);
  kind.counters = reinterpret_cast<unsigned*>(
      memory.counters_at.at_least_zeroed(n_counters * sizeof(unsigned), gpu_.stream));
}

void StepArrays::set(const StepPlan& plan) {
  sections_.clear();  // of the step before, or of one that threw on the way
  n_tokens_ = static_cast<std::int32_t>(plan.tokens.size());
  n_rows_ = static_cast<std::int32_t>(plan.rows.size());
  tokens_ = place<std::int32_t>(plan.tokens, tokens_at_);
  rows_ = place<std::int32_t>(plan.rows, rows_at_);
  query_scale_ = place<float>(plan.query_scale, query_scale_at_);
  sampling_ = {};
  if (!plan.sampling_scale.empty()) {
    sampling_ = {place<float>(plan.sampling_scale, factors_at_),
                 place<float>(plan.sampling_uniform, uniforms_at_)};
  }
  describe(plan.local, true);
  describe(plan.global, false);
  send();
}

}  // namespace camelid::cuda
