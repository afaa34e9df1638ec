// From checkpoint matrices to the CPU's panels (packed.h). Knows nothing of products.
#pragma once

#include <memory>
#include <span>

#include "base/threads.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"

namespace camelid::cpu {

// Packs a stack of linears that share in_dim. A source already quantised in the wanted format keeps
// its own groups, scales and zero points to the bit; every other pair goes through float32.
// Throws kCheckpoint on values that are not finite, kUnsupported on groups that cut a word.
std::unique_ptr<PackedMatrix> pack_matrix(std::span<const LinearSource> stack,
                                          std::span<const PackOptions> options,
                                          const Kernels& kernels, ThreadPool& pool);

}  // namespace camelid::cpu
