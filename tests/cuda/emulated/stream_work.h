// The work of the one stream there is: done in order, at once or when somebody waits for it, or
// only written down, to be done later and again.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <utility>

#include "machine.h"

namespace camelid::cuda::emulated {

class StreamWork {
 public:
  // `may_wait` is kept where work is written down; work that `waits` is done by finish().
  void submit(std::function<void()> work, bool may_wait, bool waits) {
    if (recording_) {
      record_.emplace_back(std::move(work), may_wait);
      return;
    }
    work_.push_back(std::move(work));
    if (work_.size() == 1 && !waits) finish(n_submitted());
  }

  std::int64_t n_submitted() const { return n_done_ + static_cast<std::int64_t>(work_.size()); }

  void finish(std::int64_t n) {  // the first n that were ever submitted
    while (n_done_ < n) {
      const std::function<void()> work = std::move(work_.front());
      work_.pop_front();
      ++n_done_;
      try {
        work();
      } catch (...) {  // nothing of what would have followed happens
        n_done_ = n_submitted();
        work_.clear();
        throw;
      }
    }
  }

  void record() { recording_ = true; }
  Record recorded() {
    recording_ = false;
    return std::exchange(record_, {});
  }

 private:
  std::deque<std::function<void()>> work_;  // that waits
  std::int64_t n_done_ = 0;                 // of all that was submitted
  bool recording_ = false;
  Record record_;
};

}  // namespace camelid::cuda::emulated
