// y = x w^T of plain matrices on Hopper's tensor cores: bf16 linears of many tokens, and FP8 ones
// with a scale for each token and each row. Needs sm_90a; ops/matmul_plain.h runs everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/launch.cuh"
#include "layout/output.h"

namespace camelid::cuda {

enum class Plain : std::uint8_t { kBf16, kE4m3 };

struct MatmulDense {
  Plain type = Plain::kBf16;  // of x and w
  const void* x = nullptr;    // [n_tokens][x_stride]
  const void* w = nullptr;    // [rows][w_stride]
  void* y = nullptr;          // [n_tokens][y_stride]
  std::int32_t n_tokens = 0;
  std::int32_t rows = 0;
  std::int32_t inputs = 0;
  std::int32_t x_stride = 0;
  std::int32_t w_stride = 0;
  std::int32_t y_stride = 0;
  Output output = Output::kStore;   // all but kSwiGlu
  const float* x_scales = nullptr;  // [n_tokens], kE4m3 alone
  const float* w_scales = nullptr;  // [rows], kE4m3 alone
};

// Whether matmul_dense takes the call: its output, and that rows of x, w and y begin at multiples
// of 16 bytes.
bool matmul_dense_fits(const MatmulDense& call);

// Device memory the call needs, aligned to 256 bytes.
std::size_t matmul_dense_workspace_bytes(const MatmulDense& call);

// Sums in float32; FP8 sums are added up in full precision every few products, since Hopper's FP8
// accumulators keep fewer bits. Deterministic. Throws kInternal; waits for nothing.
void matmul_dense(const MatmulDense& call, void* workspace, cudaStream_t stream);

}  // namespace camelid::cuda
