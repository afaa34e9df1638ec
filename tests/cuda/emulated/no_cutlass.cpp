// In the place of cuda/sm90/matmul_dense.cu, which is CUTLASS's and cannot be emulated: it takes
// nothing, so that its callers go the other way.
#include "base/error.h"
#include "sm90/matmul_dense.h"

namespace camelid::cuda {

bool matmul_dense_fits(const MatmulDense&) { return false; }
std::size_t matmul_dense_workspace_bytes(const MatmulDense&) { return 0; }
void matmul_dense(const MatmulDense&, void*, cudaStream_t) {
  fail(ErrorCode::kInternal, "[emulated] CUTLASS cannot be emulated.");
}

}  // namespace camelid::cuda
