// The twin of cuda/device/gpu.h on the CPU: one GPU with one stream.
#pragma once

#include <cstddef>
#include <string>

#include "device/launch.cuh"

namespace camelid::cuda {

inline int count_gpus() { return 1; }
inline void use_gpu(int) {}
inline std::string gpu_name() { return "emulated"; }
inline std::size_t free_bytes() { return emulated::free_bytes(); }

class Stream {
 public:
  cudaStream_t get() const { return nullptr; }
};

}  // namespace camelid::cuda
