// Stands in for cuda/ in builds without it.
#include "backend/cuda.h"
#include "base/error.h"

namespace camelid {

bool cuda_available() { return false; }

std::unique_ptr<Backend> make_cuda_backend(int, int) {
  fail(ErrorCode::kUnsupported,
       "[device] this build of camelid has no CUDA backend; use device 'cpu', or install a wheel "
       "built with CUDA.");
}

}  // namespace camelid
