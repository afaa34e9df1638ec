// What becomes of a product's sums; host and device share it.
#pragma once

#include <cstdint>

namespace camelid::cuda {

enum class Output : std::uint8_t {
  kStore,      // float32
  kStoreBf16,  // rounded
  kAdd,        // to the float32 that is there
  kSwiGlu,     // bf16 silu(gate) * up of a matrix of RowOrder::kGateUp: half as many columns
};

}  // namespace camelid::cuda
