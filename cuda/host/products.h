// Products of activations with packed matrices: which kernel takes which matrix and how many
// tokens, and the memory those kernels share. It knows no layers.
#pragma once

#include <cstdint>

#include "base/tensor.h"
#include "device/growing.h"
#include "host/gpu.h"
#include "host/matrix.h"
#include "host/norms.h"
#include "ops/grouped.h"
#include "ops/matmul_few.h"
#include "ops/store_kv.h"

namespace camelid::cuda {

// From so many tokens on, tensor cores have more to do than memory: kernels for many take over.
constexpr std::int64_t kMostFewTokens = 64;

// The instance for this GPU.
void grouped_many(const Gpu& gpu, const GroupedProduct& product);

class Products {
 public:
  Products(const Gpu& gpu, Norms& norms) : gpu_(gpu), norms_(norms) {}

  // Takes the memory that products of few tokens with such a matrix need, so that they never wait
  // for it.
  void prepare(const DeviceMatrix& matrix);
  Workspace workspace(const WorkspaceNeed& need);  // at least so large
  std::size_t bytes() const {                      // of all that it took
    return sums_.bytes() + counters_.bytes() + dense_workspace_.bytes();
  }

  // y = x w^T; y of operands is rounded.
  void multiply(const Tensor& y, const Tensor& x, const DeviceMatrix& w);
  // The same, and then what becomes of its heads.
  void project(const Tensor& qkv, const Tensor& x, const DeviceMatrix& w, const StoreKv& store);
  // y += x w^T, and then a norm of y, if any.
  void multiply_add(const Tensor& y, const Tensor& x, const DeviceMatrix& w, const Norm& then);
  // y = silu(gate) * up, operands, of a matrix packed as Stack::kGateUp.
  void multiply_gated(const Tensor& y, const Tensor& x, const DeviceMatrix& w);

 private:
  // Whether one kernel for few tokens takes each segment, and so halves of norms.
  static bool are_few(const Tensor& x, const DeviceMatrix& w);
  static MatmulFew few(void* to, const Tensor& y, const Tensor& x, const Segment& segment);
  NormEnd end_norm(const Tensor& x, const DeviceMatrix& w);
  void multiply(const Tensor& y, const Tensor& x, const Segment& segment, Output output,
                const NormEnd& norm_of_x, const NormStart& norm_of_y = {});
  void multiply_plain(void* y, const Tensor& rows_of_y, const Tensor& x, const PlainMatrix& w,
                      Output output);

  Gpu gpu_;
  Norms& norms_;
  GrowingMemory sums_, counters_, dense_workspace_;
};

}  // namespace camelid::cuda
