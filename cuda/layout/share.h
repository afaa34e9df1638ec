// How a list of equal work units is dealt to blocks: neighbouring units in one piece, no block with
// more than one unit above another, whatever the borders of the matrices ("stream-K"). Host and
// device share it; it knows nothing of what a unit is.
#pragma once

#include <cstdint>

#include "layout/tiles.h"

namespace camelid::cuda {

struct Share {
  std::int32_t first = 0;
  std::int32_t last = 0;  // one past
};

CAMELID_HOST_DEVICE constexpr Share share_of(int block, int n_blocks, std::int64_t n_units) {
  return {static_cast<std::int32_t>(n_units * block / n_blocks),
          static_cast<std::int32_t>(n_units * (block + 1) / n_blocks)};
}

// The block that has a unit.
CAMELID_HOST_DEVICE constexpr int owner_of(std::int64_t unit, int n_blocks, std::int64_t n_units) {
  return static_cast<int>(((unit + 1) * n_blocks - 1) / n_units);
}

}  // namespace camelid::cuda
