// Memory of the device and pinned memory of the host, copies between them, and events: what the
// host's side asks of CUDA besides launches, by names that an emulation on the CPU can give another
// meaning. It never computes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "device/full.h"
#include "device/gpu.h"
#include "device/launch.cuh"

namespace camelid::cuda {

// ---- memory, freed with its owner ----

struct FreeDevice {
  void operator()(std::byte* memory) const { cudaFree(memory); }
};
struct FreePinned {
  void operator()(std::byte* memory) const { cudaFreeHost(memory); }
};
using DeviceMemory = std::unique_ptr<std::byte[], FreeDevice>;
using PinnedMemory = std::unique_ptr<std::byte[], FreePinned>;

// How often device memory was taken: addresses that were recorded before may be gone since.
inline std::atomic<std::uint64_t> n_allocations{0};

// Aligned to 256 bytes; contents are anything.
inline DeviceMemory allocate_device(std::size_t bytes) {
  ++n_allocations;
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky
    fail_full(bytes, free_bytes());
  }
  check(status, "device memory");
  return DeviceMemory(static_cast<std::byte*>(memory));
}

// Of the host, and what the device copies from while the host goes on.
inline PinnedMemory allocate_pinned(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, bytes), "pinned memory");
  return PinnedMemory(static_cast<std::byte*>(memory));
}

// ---- work of a stream, in order with its launches ----

// From pinned memory, which must stay as it is until the copy is over.
inline void copy_to_device(std::byte* to, const std::byte* pinned, std::size_t bytes,
                           cudaStream_t stream) {
  check(cudaMemcpyAsync(to, pinned, bytes, cudaMemcpyHostToDevice, stream), "copy to the device");
}

// To pinned memory, which holds it once the stream was waited for.
inline void copy_to_host(std::byte* pinned, const std::byte* from, std::size_t bytes,
                         cudaStream_t stream) {
  check(cudaMemcpyAsync(pinned, from, bytes, cudaMemcpyDeviceToHost, stream), "copy to the host");
}

inline void fill_zeros(std::byte* to, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(to, 0, bytes, stream), "fill with zeros");
}

// Waits for all work of a stream, and throws where some of it failed.
inline void finish(cudaStream_t stream) { check(cudaStreamSynchronize(stream), "finish"); }

// A point in the work of a stream.
class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "event"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "event"); }
  // Waits until the stream came where record() was called last; at once before the first.
  void wait() { check(cudaEventSynchronize(event_), "event"); }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace camelid::cuda
