// The twin of cuda/device/clock.h on the CPU: a moment is when its stream has done what came
// before, and nothing need be held up, since nothing runs in between.
#pragma once

#include <chrono>

#include "device/launch.cuh"

namespace camelid::cuda {

class Moment {
 public:
  void record(cudaStream_t) {
    emulated::finish_work(emulated::n_submitted());
    at_ = std::chrono::steady_clock::now();
  }
  void wait() {}
  double us_since(const Moment& before) const {
    return std::chrono::duration<double, std::micro>(at_ - before.at_).count();
  }

 private:
  std::chrono::steady_clock::time_point at_;
};

class Gate {
 public:
  void close(cudaStream_t) {}
  void open() {}
};

}  // namespace camelid::cuda
