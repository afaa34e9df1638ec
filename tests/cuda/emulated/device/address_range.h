// The twin of cuda/device/address_range.h on the CPU: its own pages stand for granules, and those
// that are not backed cannot be touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "device/memory.h"

namespace camelid::cuda {

class AddressRange {
 public:
  explicit AddressRange(std::size_t bytes)
      : granule_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        is_backed_(std::max<std::size_t>((bytes + granule_ - 1) / granule_, 1)) {
    void* base = mmap(nullptr, is_backed_.size() * granule_, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) fail(ErrorCode::kInternal, "the emulator found no addresses");
    base_ = static_cast<std::byte*>(base);
  }
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;
  ~AddressRange() {
    emulated::finish_work(emulated::n_submitted());
    for (std::size_t i = 0; i < is_backed_.size(); ++i) unback(i);
    munmap(base_, is_backed_.size() * granule_);
  }

  std::byte* data() const { return base_; }
  std::size_t granule_bytes() const { return granule_; }
  std::size_t n_granules() const { return is_backed_.size(); }
  bool is_backed(std::size_t i) const { return is_backed_[i]; }

  std::size_t backed_bytes() const {
    return static_cast<std::size_t>(std::ranges::count(is_backed_, true)) * granule_;
  }

  void back(std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last; ++i) {
      if (is_backed_[i]) continue;
      emulated::take_bytes(granule_);
      protect(i, PROT_READ | PROT_WRITE);
      std::memset(base_ + i * granule_, 0xff, granule_);  // NaNs, as device memory is at first
      is_backed_[i] = true;
    }
  }
  void unback(std::size_t i) {
    if (!is_backed_[i]) return;
    protect(i, PROT_NONE);
    madvise(base_ + i * granule_, granule_, MADV_DONTNEED);
    emulated::give_bytes(granule_);
    is_backed_[i] = false;
  }

 private:
  void protect(std::size_t i, int access) {
    if (mprotect(base_ + i * granule_, granule_, access) == 0) return;
    fail(ErrorCode::kInternal, "the emulator may not protect its memory");
  }

  std::size_t granule_;  // bytes
  std::byte* base_ = nullptr;
  std::vector<bool> is_backed_;
};

}  // namespace camelid::cuda
