// Memory that notices writes beside it: what kernels see as shared and as device memory. Filled with
// NaNs at first, and with another NaN in front of it and behind it. Knows nothing of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "base/error.h"

namespace camelid::cuda::emulated {

class GuardedBytes {
 public:
  static constexpr std::size_t kAlign = 1024;  // what launch.cuh promises of shared memory
  static constexpr std::size_t kGuard = 4096;  // on either side, at least

  explicit GuardedBytes(std::size_t bytes) : bytes_(bytes) {
    const std::size_t whole = (bytes + 2 * kGuard + kAlign - 1) / kAlign * kAlign;
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlign, whole)));
    if (!memory_) throw std::bad_alloc();
    end_ = whole;
    std::memset(data(), 0xff, bytes_);
    repair();
  }

  std::byte* data() const { return memory_.get() + kGuard; }
  std::size_t size() const { return bytes_; }

  bool holds(const void* pointer, std::size_t n_bytes) const {
    const std::size_t offset = offset_of(pointer);
    return offset <= bytes_ && n_bytes <= bytes_ - offset;
  }
  // Whether the address is this memory's at all, its guards included.
  bool near(const void* pointer) const { return offset_of(pointer) + kGuard < end_; }
  // Wraps around to a huge number for addresses in front.
  std::size_t offset_of(const void* pointer) const {
    return reinterpret_cast<std::uintptr_t>(pointer) - reinterpret_cast<std::uintptr_t>(data());
  }

  void repair() {
    for (std::size_t i = 0; i < kGuard; ++i) memory_[i] = guard_byte(i);
    for (std::size_t i = kGuard + bytes_; i < end_; ++i) memory_[i] = guard_byte(i);
  }
  // Empty, or what was written where nothing may be.
  std::string damage() const {
    for (std::size_t i = kGuard; i-- > 0;) {
      if (memory_[i] != guard_byte(i)) return cat("a write ", kGuard - i, " bytes before", whom());
    }
    for (std::size_t i = kGuard + bytes_; i < end_; ++i) {
      if (memory_[i] != guard_byte(i)) {
        return cat("a write at byte ", i - kGuard, ", behind the end of", whom());
      }
    }
    return {};
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::string whom() const { return cat(" a memory of ", bytes_, " bytes"); }
  // 0xffa5 everywhere: NaN as bf16 and as float32, and not what memory is filled with.
  static std::byte guard_byte(std::size_t i) { return std::byte(i % 2 ? 0xff : 0xa5); }

  std::size_t bytes_;
  std::size_t end_;  // of memory_
  std::unique_ptr<std::byte[], Free> memory_;
};

}  // namespace camelid::cuda::emulated
