// Grouped products on Hopper's warpgroup products; the arguments and the order of work are those
// of ops/grouped.h.
#pragma once

#include "ops/grouped.h"

namespace camelid::cuda::sm90 {

// For GPUs of compute capability 9.0 only. `multiprocessors`: of this GPU; each gets one block.
// Nothing is waited for.
void grouped_many(const GroupedProduct& product, int multiprocessors, cudaStream_t stream);

}  // namespace camelid::cuda::sm90
