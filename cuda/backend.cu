// The CUDA backend's factory. It owns the answer to "is there a GPU this build can use?"; today the
// answer is always no: kernels are there, but nothing that calls them for a model. It says so
// instead of falling back.

#include <memory>

#include "backend/backend.h"
#include "backend/cuda.h"
#include "base/error.h"

namespace camelid {

bool cuda_available() { return false; }

std::unique_ptr<Backend> make_cuda_backend(int /*device*/) {
  fail(ErrorCode::kUnsupported, "[cuda] no backend for GPUs is written yet; use device='cpu'.");
}

}  // namespace camelid
