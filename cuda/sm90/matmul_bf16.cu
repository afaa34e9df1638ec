// The instances of matmul_dense for bf16.
#include "sm90/matmul_dense.cuh"
#include "sm90/matmul_instances.h"

namespace camelid::cuda {

std::size_t bf16_workspace_bytes(const MatmulDense& call) {
  return with_gemm<cutlass::bfloat16_t, PlainEpilogue>(
      call, [&]<class G>(G) { return G::workspace_bytes(call); });
}

void bf16_matmul(const MatmulDense& call, void* workspace, cudaStream_t stream) {
  with_gemm<cutlass::bfloat16_t, PlainEpilogue>(
      call, [&]<class G>(G) { G::run(call, workspace, stream); });
}

}  // namespace camelid::cuda
