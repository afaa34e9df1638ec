// Finds the GPU that was asked for, and answers whether there is one this build can use.
#include <memory>

#include "backend/cuda.h"
#include "base/error.h"
#include "base/threads.h"
#include "device/gpu.h"
#include "host/cuda_backend.h"

namespace camelid {

bool cuda_available() { return cuda::count_gpus() > 0; }

std::unique_ptr<Backend> make_cuda_backend(int ordinal, int threads) {
  const int n_gpus = cuda::count_gpus();
  if (ordinal >= n_gpus) {
    fail(ErrorCode::kUnsupported, "[cuda] there is no GPU number ", ordinal, "; ", n_gpus,
         " can be used here", n_gpus == 0 ? " (is the driver installed?)" : "",
         ". Use device=\"cpu\".");
  }
  cuda::use_gpu(ordinal);
  const int capability = cuda::compute_capability();
  constexpr int kLeastCapability = 80;
  if (capability < kLeastCapability) {
    fail(ErrorCode::kUnsupported, "[cuda] GPU ", ordinal, " (", cuda::gpu_name(), ") has compute ",
         "capability ", capability / 10, ".", capability % 10,
         ", camelid needs 8.0 (Ampere) or later. Use device=\"cpu\".");
  }
  return std::make_unique<cuda::CudaBackend>(ordinal, threads == 0 ? default_threads() : threads);
}

}  // namespace camelid
