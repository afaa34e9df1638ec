// Moments on a device's own timeline: what TimedBackend measures calls with. Knows nothing of what
// is measured.
#pragma once

#include <chrono>
#include <cstddef>
#include <vector>

namespace camelid {

class Clock {
 public:
  virtual ~Clock() = default;
  // What is asked of the device from here on waits until release(), though never for long: so that
  // it runs in a row however slowly it was asked for.
  virtual void hold() = 0;
  virtual void release() = 0;
  // The moment at which the device has done all that was asked of it before.
  virtual void mark() = 0;
  // Microseconds from each mark to the next, which are then forgotten. Waits for the last one.
  virtual std::vector<double> take() = 0;
};

// Of a device that has done each call when it returns.
class HostClock final : public Clock {
 public:
  void hold() override {}
  void release() override {}
  void mark() override { marks_.push_back(std::chrono::steady_clock::now()); }
  std::vector<double> take() override {
    std::vector<double> us;
    for (std::size_t i = 1; i < marks_.size(); ++i) {
      us.push_back(std::chrono::duration<double, std::micro>(marks_[i] - marks_[i - 1]).count());
    }
    marks_.clear();
    return us;
  }

 private:
  std::vector<std::chrono::steady_clock::time_point> marks_;
};

}  // namespace camelid
