// Fixed-size KV pages from one reservation of address space; unused pages cost no memory. Two
// pools (local and global layers) draw on one budget of bytes. Knows nothing of sequences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"

namespace camelid {

// Bytes that all pools together may hold.
struct KvBudget {
  std::size_t limit_bytes = 0;
  std::size_t used_bytes = 0;
};

class PagePool {
 public:
  // `shape` gives everything but base and page_bytes. A pool of zero layers hands out pages of zero
  // bytes, so that callers need no special case.
  PagePool(Backend& backend, KvPages shape, KvBudget& budget);

  const KvPages& pages() const { return pages_; }
  std::size_t page_bytes() const { return pages_.page_bytes; }

  // Both throw nothing but bugs: callers check the budget first (KvCache::reserve).
  std::int32_t take();
  void give(std::int32_t page);

  std::int64_t n_used() const { return n_touched_ - static_cast<std::int64_t>(free_.size()); }
  // Throws kInternal when a page is lost or free twice. For tests.
  void check_invariants() const;

 private:
  std::byte* place_of(std::int32_t page) const;

  Backend& backend_;
  KvBudget& budget_;
  KvPages pages_;
  Buffer storage_;
  std::int64_t capacity_ = 0;       // pages in the reservation
  std::int64_t n_touched_ = 0;      // pages ever handed out; the rest was never written
  std::vector<std::int32_t> free_;  // touched, now unused; last in, first out
};

}  // namespace camelid
