// The Clock of one stream. Events between calls cost about a microsecond each, and keep the end of
// one kernel from overlapping the start of the next.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "backend/clock.h"
#include "device/clock.h"
#include "device/gpu.h"
#include "device/memory.h"

namespace camelid::cuda {

class StreamClock final : public Clock {
 public:
  StreamClock(int ordinal, cudaStream_t stream) : ordinal_(ordinal), stream_(stream) {}
  ~StreamClock() override {
    gate_.open();
    try {
      finish(stream_);
    } catch (...) {  // an error of earlier work, which its own caller learns of
    }
  }

  void hold() override {
    use_gpu(ordinal_);  // callers come from any thread, and before the step's first call
    gate_.close(stream_);
  }
  void release() override { gate_.open(); }
  void mark() override {
    if (n_marks_ == moments_.size()) moments_.push_back(std::make_unique<Moment>());
    moments_[n_marks_++]->record(stream_);
  }
  std::vector<double> take() override {
    std::vector<double> us;
    if (n_marks_ > 0) moments_[n_marks_ - 1]->wait();
    for (std::size_t i = 1; i < n_marks_; ++i)
      us.push_back(moments_[i]->us_since(*moments_[i - 1]));
    n_marks_ = 0;
    return us;
  }

 private:
  int ordinal_;
  cudaStream_t stream_;
  Gate gate_;
  std::vector<std::unique_ptr<Moment>> moments_;  // made once, used again
  std::size_t n_marks_ = 0;
};

}  // namespace camelid::cuda
