// What is said when a GPU's memory does not suffice.
#pragma once

#include <cstddef>

#include "base/error.h"

namespace camelid::cuda {

[[noreturn]] inline void fail_full(std::size_t wanted, std::size_t free) {
  fail(ErrorCode::kCapacity, "[cuda] the GPU's memory is full: ", wanted, " bytes are wanted, ",
       free,
       " are free. Stop what else uses this GPU, or load with a lower memory=, kv_cache=\"fp8\" ",
       "or smaller weights=.");
}

}  // namespace camelid::cuda
