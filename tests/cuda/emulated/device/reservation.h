// The twin of cuda/device/reservation.h on the CPU: all of it is backed at once.
#pragma once

#include "device/memory.h"

namespace camelid::cuda {

class Reservation {
 public:
  explicit Reservation(std::size_t bytes) : memory_(allocate_device(bytes)) {}
  void* data() const { return memory_.get(); }
  void commit(void*, std::size_t) {}
  void discard(void*, std::size_t) {}
  bool reclaim() { return false; }

 private:
  DeviceMemory memory_;
};

}  // namespace camelid::cuda
