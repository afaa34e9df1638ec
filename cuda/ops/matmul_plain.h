// y = x w^T of bf16 matrices of any size, on every GPU from sm_80 on: what sm90/matmul_dense.h does
// faster on Hopper for aligned shapes.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/output.h"

namespace camelid::cuda {

struct MatmulPlain {
  const std::uint16_t* x = nullptr;  // bf16 [n_tokens][x_stride], rows aligned to 16 bytes
  const std::uint16_t* w = nullptr;  // bf16 [rows][w_stride], rows aligned to 16 bytes
  void* y = nullptr;                 // [n_tokens][y_stride]
  std::int32_t n_tokens = 0;
  std::int32_t rows = 0;
  std::int32_t inputs = 0;
  std::int32_t x_stride = 0;  // values, a multiple of 8
  std::int32_t w_stride = 0;  // values, a multiple of 8
  std::int32_t y_stride = 0;
  Output output = Output::kStore;  // all but kSwiGlu
};

// Sums in float32, each in the order of inputs: a token's results do not depend on the others.
// Throws kInternal where the call cannot be; waits for nothing.
void matmul_plain(const MatmulPlain& call, cudaStream_t stream);

}  // namespace camelid::cuda
