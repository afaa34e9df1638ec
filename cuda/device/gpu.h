// The GPUs of this machine and the one in use: how many there are, what it is called, what memory
// it has left, and the queue its work goes through.
#pragma once

#include <cstddef>
#include <string>

#include "device/launch.cuh"

namespace camelid::cuda {

// 0 also where there is no driver. Never throws.
inline int count_gpus() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // not sticky
  return 0;
}

// For the calls of this thread.
inline void use_gpu(int ordinal) { check(cudaSetDevice(ordinal), "choose the GPU"); }

inline std::string gpu_name() {
  int device = 0;
  cudaDeviceProp properties{};
  check(cudaGetDevice(&device), "device");
  check(cudaGetDeviceProperties(&properties, device), "device");
  return properties.name;
}

inline std::size_t free_bytes() {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "free memory");
  return free;
}

// Waits for nothing but its own work, unlike the default stream, and so can be recorded.
class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace camelid::cuda
