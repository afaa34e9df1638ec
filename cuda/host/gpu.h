// What of a GPU decides between kernels, and the queue they go through.
#pragma once

#include "device/launch.cuh"

namespace camelid::cuda {

struct Gpu {
  int multiprocessors = 0;
  int capability = 0;  // 90 for Hopper
  cudaStream_t stream = nullptr;

  bool is_hopper() const { return capability == 90; }
};

}  // namespace camelid::cuda
