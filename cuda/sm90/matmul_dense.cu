// Which instance a dense product takes, and what none takes.
#include "sm90/matmul_dense.h"

#include "ops/checks.h"
#include "sm90/matmul_instances.h"

namespace camelid::cuda {
namespace {

constexpr const char* kName = "dense matmul";

}  // namespace

bool matmul_dense_fits(const MatmulDense& call) {
  const int element = call.type == Plain::kBf16 ? 2 : 1;
  const int element_y = call.output == Output::kStoreBf16 ? 2 : 4;
  const auto aligned = [](const void* pointer, int stride, int bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && stride * bytes % 16 == 0;
  };
  const bool output = call.output == Output::kAdd || call.output == Output::kStoreBf16 ||
                      (call.output == Output::kStore && call.type == Plain::kBf16);
  return output && aligned(call.x, call.x_stride, element) &&
         aligned(call.w, call.w_stride, element) && aligned(call.y, call.y_stride, element_y) &&
         call.inputs * element % 16 == 0 && call.rows * element_y % 16 == 0;
}

std::size_t matmul_dense_workspace_bytes(const MatmulDense& call) {
  return call.type == Plain::kBf16 ? bf16_workspace_bytes(call) : fp8_workspace_bytes(call);
}

void matmul_dense(const MatmulDense& call, void* workspace, cudaStream_t stream) {
  if (call.n_tokens == 0) return;
  const bool there = call.x != nullptr && call.w != nullptr && call.y != nullptr;
  require(call.n_tokens > 0 && call.rows > 0 && call.inputs > 0 && there, kName,
          "x, w and y must be there, and none of them empty");
  require(
      call.x_stride >= call.inputs && call.w_stride >= call.inputs && call.y_stride >= call.rows,
      kName, "rows may not overlap");
  require(call.type == Plain::kBf16 || (call.x_scales != nullptr && call.w_scales != nullptr),
          kName, "FP8 has a scale for each token and each row");
  if (!matmul_dense_fits(call)) {
    fail(ErrorCode::kInternal, "[cuda] ", kName, " of ", call.n_tokens, " tokens, ", call.rows,
         " x ", call.inputs,
         ": rows must begin at multiples of 16 bytes, and FP8 sums are added or "
         "stored as bf16.");
  }
  if (call.type == Plain::kBf16) return bf16_matmul(call, workspace, stream);
  fp8_matmul(call, workspace, stream);
}

}  // namespace camelid::cuda
