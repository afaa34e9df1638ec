// The instances of matmul_dense for fp8.
#include "sm90/matmul_dense.cuh"
#include "sm90/matmul_instances.h"

namespace camelid::cuda {

std::size_t fp8_workspace_bytes(const MatmulDense& call) {
  return with_gemm<cutlass::float_e4m3_t, ScaledEpilogue>(
      call, [&]<class G>(G) { return G::workspace_bytes(call); });
}

void fp8_matmul(const MatmulDense& call, void* workspace, cudaStream_t stream) {
  with_gemm<cutlass::float_e4m3_t, ScaledEpilogue>(
      call, [&]<class G>(G) { G::run(call, workspace, stream); });
}

}  // namespace camelid::cuda
