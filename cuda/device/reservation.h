// A range of device addresses of which only the parts in use are backed by memory. Pages of the KV
// cache lie in it: two pools each reserve what they could need at most, and share what there is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "device/address_range.h"

namespace camelid::cuda {

class Reservation {
 public:
  explicit Reservation(std::size_t bytes) : range_(bytes), n_users_(range_.n_granules()) {}

  std::byte* data() const { return range_.data(); }

  std::size_t bytes() const { return range_.n_granules() * range_.granule_bytes(); }
  std::size_t backed_bytes() const { return range_.backed_bytes(); }

  // Backs the bytes from `data` on with memory, of any contents. Throws kCapacity; what it
  // backed before it did is nobody's, as after discard().
  void commit(void* data, std::size_t bytes) {
    const auto [first, last] = granules_of(data, bytes);
    range_.back(first, last);
    for (std::size_t i = first; i < last; ++i) ++n_users_[i];
  }

  // Those bytes are no longer needed. Their memory stays until reclaim().
  void discard(void* data, std::size_t bytes) {
    const auto [first, last] = granules_of(data, bytes);
    for (std::size_t i = first; i < last; ++i) --n_users_[i];
  }

  // Gives back the memory that nobody uses; true if there was any. The device must be idle.
  bool reclaim() {
    bool any = false;
    for (std::size_t i = 0; i < n_users_.size(); ++i) {
      if (!range_.is_backed(i) || n_users_[i] > 0) continue;
      range_.unback(i);
      any = true;
    }
    return any;
  }

 private:
  std::pair<std::size_t, std::size_t> granules_of(void* data, std::size_t bytes) const {
    const auto at = static_cast<std::size_t>(static_cast<std::byte*>(data) - range_.data());
    const std::size_t granule = range_.granule_bytes();
    return {at / granule, (at + bytes + granule - 1) / granule};
  }

  AddressRange range_;
  std::vector<std::int32_t> n_users_;  // pages that lie in each granule, in whole or in part
};

}  // namespace camelid::cuda
