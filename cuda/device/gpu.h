// The GPUs of this machine and the one in use: how many there are, what it is called, what memory
// it has left, and the queue its work goes through.
#pragma once

#include <cstddef>
#include <string>

#include "device/launch.cuh"

namespace camelid::cuda {

// How many GPUs a process may use, and why none where it is so: without a driver, or with one too
// old for this build.
struct Gpus {
  int count = 0;
  std::string why_none;
};

// Never throws.
inline Gpus find_gpus() {
  Gpus found;
  const cudaError_t status = cudaGetDeviceCount(&found.count);
  if (status == cudaSuccess && found.count > 0) return found;
  cudaGetLastError();  // not sticky
  found.count = 0;
  found.why_none = cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status);
  if (status != cudaErrorInsufficientDriver) return found;
  int driver = 0;
  cudaDriverGetVersion(&driver);
  found.why_none =
      cat("the driver is for CUDA ", driver / 1000, ".", driver % 1000 / 10,
          " at most, this build needs ", CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10);
  return found;
}

// 90 for Hopper; 0 where the GPU does not say. It takes none of its memory.
inline int capability_of(int ordinal) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) != cudaSuccess) {
    cudaGetLastError();  // not sticky
    return 0;
  }
  return 10 * major + minor;
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
