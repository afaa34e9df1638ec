// What a build with or without CUDA supplies: cuda/ or no_cuda.cpp, never both.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace camelid {

// True when this build has the CUDA backend and the machine has a device it runs on. Never throws.
bool cuda_available();
// Throws kUnsupported with one sentence when there is no such device or no CUDA in this build.
// `threads` pack weights; 0: physical cores this process may use.
std::unique_ptr<Backend> make_cuda_backend(int ordinal, int threads);

}  // namespace camelid
