// Device memory that kernels on few tokens share between their blocks, and how much of it they
// need. One launch uses it at a time. Between launches `counters` are 0 but for the first, which
// belongs to the barrier of a grid (sync_grid) whoever uses it: its top bit may stay.
#pragma once

#include <cstddef>

namespace camelid::cuda {

struct Workspace {
  std::byte* sums = nullptr;  // aligned to 16 bytes
  std::size_t sum_bytes = 0;
  unsigned* counters = nullptr;  // zeroed once, when allocated
  std::size_t n_counters = 0;
};

struct WorkspaceNeed {
  std::size_t sum_bytes = 0;
  std::size_t n_counters = 0;
};

}  // namespace camelid::cuda
