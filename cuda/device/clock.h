// Moments in the work of a stream, and a gate that holds it up: what the host measures calls with,
// by names that an emulation on the CPU can give another meaning.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "device/launch.cuh"

namespace camelid::cuda {

// When the stream came to where record() was called.
class Moment {
 public:
  Moment() { check(cudaEventCreate(&event_), "event"); }
  Moment(const Moment&) = delete;
  Moment& operator=(const Moment&) = delete;
  ~Moment() { cudaEventDestroy(event_); }

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "event"); }
  void wait() { check(cudaEventSynchronize(event_), "event"); }
  // Both have come.
  double us_since(const Moment& before) const {
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, before.event_, event_), "event");
    return 1000.0 * milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// The stream waits at close() for open(), but no longer than kMostHeld: whoever waits for the
// stream without opening only waits longer. Outlives what the stream was asked for.
class Gate {
 public:
  void close(cudaStream_t stream) {
    {
      const std::lock_guard lock(mutex_);
      is_open_ = false;
    }
    check(cudaLaunchHostFunc(stream, &Gate::wait, this), "gate");
  }
  void open() {
    {
      const std::lock_guard lock(mutex_);
      is_open_ = true;
    }
    opened_.notify_all();
  }

 private:
  // The calls of a step are asked for in some milliseconds.
  static constexpr std::chrono::milliseconds kMostHeld{100};
  static void CUDART_CB wait(void* data) {
    auto& gate = *static_cast<Gate*>(data);
    std::unique_lock lock(gate.mutex_);
    gate.opened_.wait_for(lock, kMostHeld, [&] { return gate.is_open_; });
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  bool is_open_ = true;
};

}  // namespace camelid::cuda
