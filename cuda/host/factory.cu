// Finds the GPU that was asked for, and answers whether there is one this build can use.
#include <memory>

#include "backend/cuda.h"
#include "base/error.h"
#include "base/threads.h"
#include "device/gpu.h"
#include "host/cuda_backend.h"

namespace camelid {

namespace {

constexpr int kLeastCapability = 80;

}  // namespace

bool cuda_available() {
  return cuda::find_gpus().count > 0 && cuda::capability_of(0) >= kLeastCapability;
}

std::unique_ptr<Backend> make_cuda_backend(int ordinal, int threads) {
  const cuda::Gpus gpus = cuda::find_gpus();
  if (gpus.count == 0) {
    fail(ErrorCode::kUnsupported, "[cuda] there is no GPU that can be used: ", gpus.why_none,
         ". Use device=\"cpu\".");
  }
  if (ordinal >= gpus.count) {
    fail(ErrorCode::kUnsupported, "[cuda] there is no GPU number ", ordinal, "; ", gpus.count,
         " can be used here, the first is number 0.");
  }
  const int capability = cuda::capability_of(ordinal);
  if (capability < kLeastCapability) {
    cuda::use_gpu(ordinal);
    fail(ErrorCode::kUnsupported, "[cuda] GPU ", ordinal, " (", cuda::gpu_name(), ") has compute ",
         "capability ", capability / 10, ".", capability % 10,
         ", camelid needs 8.0 (Ampere) or later. Use device=\"cpu\".");
  }
  return std::make_unique<cuda::CudaBackend>(ordinal, threads == 0 ? default_threads() : threads);
}

}  // namespace camelid
