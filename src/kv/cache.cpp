#include "kv/cache.h"

#include <algorithm>

#include "base/error.h"
#include "model/rope.h"

namespace camelid {
namespace {

KvPages page_shape(const ModelConfig& config, const KvCacheOptions& options,
                   std::int64_t n_layers) {
  KvPages pages;
  pages.page_size = options.page_size;
  pages.n_layers = n_layers;
  pages.n_kv_heads = config.n_kv_heads;
  pages.head_dim = config.head_dim;
  pages.type = options.type;
  return pages;
}

}  // namespace

KvCache::KvCache(Backend& backend, const ModelConfig& config, const KvCacheOptions& options)
    : options_(options),
      chunk_(config.chunk),
      n_heads_(config.n_heads),
      budget_{options.limit_bytes, 0},
      local_(backend, page_shape(config, options, config.n_local_layers()), budget_),
      global_(backend, page_shape(config, options, config.n_layers - config.n_local_layers()),
              budget_),
      frequencies_(rope_frequencies(config)) {
  for (std::int64_t layer = 0; layer < config.n_layers; ++layer) {
    if (!config.is_rope_layer[static_cast<std::size_t>(layer)]) continue;
    (config.is_local_layer(layer) ? rotate_local_ : rotate_global_) = true;
  }
}

std::int64_t KvCache::open() {
  sequences_.emplace(next_id_, Sequence{});
  return next_id_++;
}

void KvCache::close(std::int64_t sequence) {
  Sequence& s = find(sequence);
  for (std::int32_t page : s.local_pages) local_.give(page);
  for (std::int32_t page : s.global_pages) global_.give(page);
  sequences_.erase(sequence);
}

const KvCache::Sequence& KvCache::find(std::int64_t sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    fail(ErrorCode::kInvalidRequest, "[kv] sequence ", sequence, " is not open");
  }
  return found->second;
}

KvCache::Sequence& KvCache::find(std::int64_t sequence) {
  return const_cast<Sequence&>(static_cast<const KvCache*>(this)->find(sequence));
}

std::int64_t KvCache::index_in_chunk(std::int64_t position) const {
  return camelid::index_in_chunk(position, chunk_);
}

std::int64_t KvCache::pages_for(std::int64_t n_tokens) const {
  return (n_tokens + options_.page_size - 1) / options_.page_size;
}

std::size_t KvCache::bytes_for(std::int64_t n_tokens) const {
  const std::int64_t n_local = chunk_ > 0 ? std::min(n_tokens, chunk_) : n_tokens;
  return static_cast<std::size_t>(pages_for(n_tokens)) * global_.page_bytes() +
         static_cast<std::size_t>(pages_for(n_local)) * local_.page_bytes();
}

std::int64_t KvCache::tokens_in(std::size_t bytes) const {
  // bytes_for is monotonic and constant within a page: bisect over whole pages.
  std::int64_t low = 0;
  std::int64_t high = std::int64_t{1} << 40;
  while (low < high) {
    const std::int64_t middle = low + (high - low + 1) / 2;
    if (bytes_for(middle * options_.page_size) <= bytes) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low * options_.page_size;
}

std::int64_t KvCache::left_in_chunk(std::int64_t sequence) const {
  if (chunk_ == 0) return std::int64_t{1} << 62;
  return chunk_ - index_in_chunk(find(sequence).position);
}

std::size_t KvCache::bytes_with(std::span<const SequenceSlice> slices) const {
  std::size_t needed = budget_.used_bytes;
  for (const SequenceSlice& slice : slices) {
    const Sequence& s = find(slice.sequence);
    const std::int64_t held_global = static_cast<std::int64_t>(s.global_pages.size());
    const std::int64_t held_local = static_cast<std::int64_t>(s.local_pages.size());
    const std::int64_t index = index_in_chunk(s.position);
    const std::int64_t in_chunk =
        chunk_ > 0 ? std::min(index + slice.n_tokens, chunk_) : index + slice.n_tokens;
    // After a boundary the next chunk starts from no pages, and needs no more than a whole chunk.
    std::int64_t most_local = pages_for(in_chunk);
    if (chunk_ > 0 && index + slice.n_tokens > chunk_) {
      most_local =
          std::max(most_local, pages_for(std::min(index + slice.n_tokens - chunk_, chunk_)));
    }
    const std::int64_t most_global = pages_for(s.position + slice.n_tokens);
    needed += static_cast<std::size_t>(std::max<std::int64_t>(most_global - held_global, 0)) *
              global_.page_bytes();
    needed += static_cast<std::size_t>(std::max<std::int64_t>(most_local - held_local, 0)) *
              local_.page_bytes();
  }
  return needed;
}

void KvCache::check_capacity(std::span<const SequenceSlice> slices) const {
  const std::size_t needed = bytes_with(slices);
  if (needed > budget_.limit_bytes) {
    fail(ErrorCode::kCapacity, "[kv] the step needs ", needed, " bytes of KV pages, ",
         budget_.limit_bytes, " exist. Raise memory=, or run fewer or shorter sequences.");
  }
}

void KvCache::plan_spans(KvPlan& plan, std::span<const SequenceSlice> slices, bool local) {
  PagePool& pool = local ? local_ : global_;
  const bool rotate = local ? rotate_local_ : rotate_global_;
  plan.pages = pool.pages();
  plan.n_heads = n_heads_;
  plan.spans.clear();
  plan.rotation.clear();
  std::int64_t row = 0;
  for (const SequenceSlice& slice : slices) {
    Sequence& s = find(slice.sequence);
    std::vector<std::int32_t>& pages = local ? s.local_pages : s.global_pages;
    const std::int64_t first = local ? index_in_chunk(s.position) : s.position;
    while (static_cast<std::int64_t>(pages.size()) < pages_for(first + slice.n_tokens)) {
      pages.push_back(pool.take());
    }
    plan.spans.push_back({row, slice.n_tokens, first, pages.data()});
    if (rotate) {
      for (std::int64_t i = 0; i < slice.n_tokens; ++i) {
        append_rotation(plan.rotation, frequencies_, first + i);
      }
    }
    row += slice.n_tokens;
  }
}

void KvCache::plan(std::span<const SequenceSlice> slices, StepPlan& out) {
  for (const SequenceSlice& slice : slices) {
    if (slice.n_tokens < 1 || slice.n_tokens > left_in_chunk(slice.sequence)) {
      fail(ErrorCode::kInternal, "[kv] a slice of ", slice.n_tokens,
           " tokens crosses a chunk boundary");
    }
  }
  plan_spans(out.local, slices, true);
  plan_spans(out.global, slices, false);
}

void KvCache::advance(std::span<const SequenceSlice> slices) {
  for (const SequenceSlice& slice : slices) {
    Sequence& s = find(slice.sequence);
    s.position += slice.n_tokens;
    if (chunk_ == 0 || index_in_chunk(s.position) != 0) continue;
    for (std::int32_t page : s.local_pages) local_.give(page);
    s.local_pages.clear();
  }
}

void KvCache::check_invariants() const {
  local_.check_invariants();
  global_.check_invariants();
  std::int64_t n_local = 0;
  std::int64_t n_global = 0;
  for (const auto& [id, s] : sequences_) {
    n_local += static_cast<std::int64_t>(s.local_pages.size());
    n_global += static_cast<std::int64_t>(s.global_pages.size());
    const bool enough =
        static_cast<std::int64_t>(s.local_pages.size()) >= pages_for(index_in_chunk(s.position)) &&
        static_cast<std::int64_t>(s.global_pages.size()) >= pages_for(s.position);
    if (!enough) fail(ErrorCode::kInternal, "[kv] sequence ", id, " lacks pages for its tokens");
  }
  if (n_local != local_.n_used() || n_global != global_.n_used()) {
    fail(ErrorCode::kInternal, "[kv] pages leak: ", local_.n_used(), " local used, ", n_local,
         " held; ", global_.n_used(), " global used, ", n_global, " held");
  }
}

}  // namespace camelid
