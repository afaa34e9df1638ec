// The twin of cuda/device/gpu.h on the CPU: one GPU with one stream.
#pragma once

#include <cstddef>
#include <string>

#include "device/launch.cuh"

namespace camelid::cuda {

struct Gpus {
  int count = 0;
  std::string why_none;
};
inline Gpus find_gpus() { return {1, ""}; }
inline int capability_of(int) { return emulated::compute_capability(); }
inline void use_gpu(int) {}
inline std::string gpu_name() { return "emulated"; }
inline std::size_t free_bytes() { return emulated::free_bytes(); }

class Stream {
 public:
  cudaStream_t get() const { return nullptr; }
};

}  // namespace camelid::cuda
