// What matmul_dense.cu chooses among; each is compiled in a file of its own, since that takes long.
#pragma once

#include "sm90/matmul_dense.h"

namespace camelid::cuda {

std::size_t bf16_workspace_bytes(const MatmulDense& call);
std::size_t fp8_workspace_bytes(const MatmulDense& call);
void bf16_matmul(const MatmulDense& call, void* workspace, cudaStream_t stream);
void fp8_matmul(const MatmulDense& call, void* workspace, cudaStream_t stream);

}  // namespace camelid::cuda
