#include "kv/pages.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace camelid {

PagePool::PagePool(Backend& backend, KvPages shape, KvBudget& budget)
    : backend_(backend), budget_(budget), pages_(shape) {
  if (pages_.n_layers == 0) {
    pages_.page_bytes = 0;
    capacity_ = std::numeric_limits<std::int32_t>::max();
    return;
  }
  pages_.page_bytes = backend.page_bytes(pages_);
  const std::size_t most = budget.limit_bytes / pages_.page_bytes;
  capacity_ = static_cast<std::int64_t>(
      std::min<std::size_t>(most, std::numeric_limits<std::int32_t>::max()));
  storage_ = backend.reserve(static_cast<std::size_t>(capacity_) * pages_.page_bytes);
  pages_.base = storage_.data.get();
}

std::int32_t PagePool::take() {
  if (budget_.used_bytes + pages_.page_bytes > budget_.limit_bytes) {
    fail(ErrorCode::kInternal, "[kv] a page was taken beyond the budget of ", budget_.limit_bytes,
         " bytes");
  }
  const bool reuse = !free_.empty();
  if (!reuse && n_touched_ >= capacity_) {
    fail(ErrorCode::kInternal, "[kv] the page pool is exhausted");
  }
  const std::int32_t page = reuse ? free_.back() : static_cast<std::int32_t>(n_touched_);
  if (pages_.page_bytes > 0) backend_.commit(place_of(page), pages_.page_bytes);  // may throw
  budget_.used_bytes += pages_.page_bytes;
  reuse ? free_.pop_back() : static_cast<void>(++n_touched_);
  return page;
}

std::byte* PagePool::place_of(std::int32_t page) const {
  return static_cast<std::byte*>(pages_.base) + static_cast<std::size_t>(page) * pages_.page_bytes;
}

void PagePool::give(std::int32_t page) {
  budget_.used_bytes -= pages_.page_bytes;
  free_.push_back(page);
  // The other pool may need the bytes: a free page must not keep memory the budget thinks is free.
  if (pages_.page_bytes > 0) {
    backend_.discard(place_of(page), pages_.page_bytes);
  }
}

void PagePool::check_invariants() const {
  std::vector<bool> is_free(static_cast<std::size_t>(n_touched_), false);
  for (std::int32_t page : free_) {
    const auto index = static_cast<std::size_t>(page);
    if (page < 0 || page >= n_touched_ || is_free[index]) {
      fail(ErrorCode::kInternal, "[kv] page ", page, " is free twice or was never handed out");
    }
    is_free[index] = true;
  }
}

}  // namespace camelid
