// The twin of cuda/device/memory.h on the CPU: device memory is guarded, and a stream does its work
// at once or when it is waited for; machine.h decides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "device/launch.cuh"

namespace camelid::cuda {

struct FreeDevice {
  std::size_t bytes = 0;
  void operator()(std::byte* memory) const {
    emulated::finish_work(emulated::n_submitted());  // as the GPU does
    device_free(memory);
    emulated::give_bytes(bytes);
  }
};
struct FreePinned {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using DeviceMemory = std::unique_ptr<std::byte[], FreeDevice>;
using PinnedMemory = std::unique_ptr<std::byte[], FreePinned>;

inline std::uint64_t n_allocations = 0;

inline DeviceMemory allocate_device(std::size_t bytes) {
  ++n_allocations;
  emulated::take_bytes(bytes);
  return DeviceMemory(static_cast<std::byte*>(device_alloc(bytes)), FreeDevice{bytes});
}
inline PinnedMemory allocate_pinned(std::size_t bytes) {
  return PinnedMemory(static_cast<std::byte*>(std::malloc(bytes)));
}

inline void copy_to_device(std::byte* to, const std::byte* pinned, std::size_t bytes,
                           cudaStream_t) {
  emulated::check_copied("a copy to the device", to, bytes);
  emulated::submit([=] { std::memcpy(to, pinned, bytes); }, true);
}

inline void copy_to_host(std::byte* pinned, const std::byte* from, std::size_t bytes,
                         cudaStream_t) {
  emulated::check_copied("a copy to the host", from, bytes);
  emulated::count_download();
  emulated::submit([=] { std::memcpy(pinned, from, bytes); }, true);
}

inline void fill_zeros(std::byte* to, std::size_t bytes, cudaStream_t) {
  emulated::check_copied("a fill", to, bytes);
  emulated::submit([=] { std::memset(to, 0, bytes); }, true);
}

inline void finish(cudaStream_t) { emulated::finish_work(emulated::n_submitted()); }

class Event {
 public:
  void record(cudaStream_t) { n_before_ = emulated::n_submitted(); }
  void wait() { emulated::finish_work(n_before_); }

 private:
  std::int64_t n_before_ = 0;
};

}  // namespace camelid::cuda
