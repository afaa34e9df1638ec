// Device memory that grows with what is asked of it.
#pragma once

#include <algorithm>
#include <cstddef>

#include "device/memory.h"

namespace camelid::cuda {

// What it held is lost when it grows.
class GrowingMemory {
 public:
  // At least so many bytes, never none.
  std::byte* at_least(std::size_t bytes) {
    if (bytes_ >= bytes && memory_) return memory_.get();
    std::size_t wanted = std::max<std::size_t>(bytes_, kLeast);
    while (wanted < bytes) wanted *= 2;
    memory_.reset();  // first free, then take: the two never coexist
    bytes_ = 0;
    memory_ = allocate_device(wanted);
    bytes_ = wanted;
    ++n_moves_;
    return memory_.get();
  }
  // The same, of zeros when it is new.
  std::byte* at_least_zeroed(std::size_t bytes, cudaStream_t stream) {
    const int before = n_moves_;
    std::byte* at = at_least(bytes);
    if (n_moves_ != before) fill_zeros(at, bytes_, stream);
    return at;
  }
  std::byte* get() const { return memory_.get(); }
  std::size_t bytes() const { return bytes_; }
  int n_moves() const { return n_moves_; }  // how often its address has changed

 private:
  static constexpr std::size_t kLeast = 256;
  DeviceMemory memory_;
  std::size_t bytes_ = 0;
  int n_moves_ = 0;
};

}  // namespace camelid::cuda
