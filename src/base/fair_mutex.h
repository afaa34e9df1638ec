// A mutex that serves its waiters in the order in which they came. After std::mutex whoever unlocks
// and locks again at once usually wins, and a thread that encodes image after image, a second each,
// would keep everybody's next step waiting. Knows nothing of what it guards.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace camelid {

class FairMutex {
 public:
  void lock() {
    std::unique_lock lock(mutex_);
    const std::uint64_t ticket = next_++;
    turn_.wait(lock, [&] { return ticket == serving_; });
  }

  void unlock() {
    {
      const std::lock_guard lock(mutex_);
      ++serving_;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  std::uint64_t next_ = 0;     // ticket of whoever comes next
  std::uint64_t serving_ = 0;  // ticket of whoever holds the mutex, or may take it
};

}  // namespace camelid
