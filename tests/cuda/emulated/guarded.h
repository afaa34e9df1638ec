// Memory that notices writes beside it: what kernels see as shared and as device memory. It holds
// NaNs at first, and another NaN in front of it and behind it. Knows nothing of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "base/error.h"
#include "watch.h"

namespace camelid::cuda::emulated {

class GuardedBytes {
 public:
  static constexpr std::size_t kAlign = 1024;  // what launch.cuh promises of shared memory

  // `name` tells in messages what it is: "shared memory". The guards on either side have `guard`
  // bytes, a multiple of kAlign; the one behind may have some more.
  GuardedBytes(std::string name, std::size_t bytes, std::size_t guard)
      : name_(std::move(name)), bytes_(bytes), guard_(guard) {
    end_ = (bytes + 2 * guard + kAlign - 1) / kAlign * kAlign;
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlign, end_)));
    if (!memory_) throw std::bad_alloc();
    std::memset(data(), 0xff, bytes_);
    repair();
  }

  std::byte* data() const { return memory_.get() + guard_; }
  const std::byte* begin() const { return memory_.get(); }  // of the guard
  std::size_t size() const { return bytes_; }

  bool holds(const void* pointer, std::size_t n_bytes) const {
    const std::size_t offset = offset_of(pointer);
    return offset <= bytes_ && n_bytes <= bytes_ - offset;
  }
  // Whether the address is this memory's at all, its guards included.
  bool near(const void* pointer) const { return offset_of(pointer) + guard_ < end_; }
  // Wraps around to a huge number for addresses in front.
  std::size_t offset_of(const void* pointer) const {
    return reinterpret_cast<std::uintptr_t>(pointer) - reinterpret_cast<std::uintptr_t>(data());
  }
  // "byte 100 of 64 bytes of shared memory"
  std::string place_of(const void* pointer) const {
    return cat("byte ", static_cast<std::int64_t>(offset_of(pointer)), " of ", bytes_, " bytes of ",
               name_);
  }

  void repair() {
    for (std::size_t i = 0; i < guard_; ++i) memory_[i] = guard_byte(i);
    for (std::size_t i = guard_ + bytes_; i < end_; ++i) memory_[i] = guard_byte(i);
  }
  // Empty, or what was written where nothing may be.
  std::string damage() const {
    for (const auto& [first, last] :
         {std::pair{std::size_t{0}, guard_}, std::pair{guard_ + bytes_, end_}}) {
      // Every byte of a guard is the one two before it.
      const std::byte* guard = memory_.get() + first;
      const bool whole = guard[0] == guard_byte(first) && guard[1] == guard_byte(first + 1) &&
                         std::memcmp(guard, guard + 2, last - first - 2) == 0;
      for (std::size_t i = first; !whole && i < last; ++i) {
        if (memory_[i] != guard_byte(i)) return cat("something wrote to ", place_of(&memory_[i]));
      }
    }
    return {};
  }

  // Who accessed it, from the first call on.
  Shadow& shadow() {
    if (!shadow_) shadow_ = std::make_unique<Shadow>(bytes_);
    return *shadow_;
  }
  void forget_accesses() { shadow_ = nullptr; }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  // 0xffa5 everywhere: NaN as bf16 and as float32, and not what memory is filled with.
  static std::byte guard_byte(std::size_t i) { return std::byte(i % 2 ? 0xff : 0xa5); }

  std::string name_;
  std::size_t bytes_;
  std::size_t guard_;
  std::size_t end_;  // of memory_
  std::unique_ptr<std::byte[], Free> memory_;
  std::unique_ptr<Shadow> shadow_;
};

// Finds the memory that an address belongs to, or lies next to.
class Memories {
 public:
  void add(GuardedBytes& memory) { by_begin_[memory.begin()] = &memory; }
  void remove(const GuardedBytes& memory) { by_begin_.erase(memory.begin()); }
  GuardedBytes* find(const void* pointer) const {
    auto after = by_begin_.upper_bound(static_cast<const std::byte*>(pointer));
    if (after == by_begin_.begin()) return nullptr;
    GuardedBytes* memory = std::prev(after)->second;
    return memory->near(pointer) ? memory : nullptr;
  }

 private:
  std::map<const std::byte*, GuardedBytes*> by_begin_;
};

}  // namespace camelid::cuda::emulated
