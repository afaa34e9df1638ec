// RMS norms between products. A norm takes no launch where the product that completes its rows and
// those that multiply them can do it in halves (layout/split_norm.h): which is found out only as
// they are called, one after the other.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "device/growing.h"
#include "layout/split_norm.h"
#include "ops/rows.h"

namespace camelid::cuda {

Rows rows_of(const Tensor& x);

class Norms {
 public:
  explicit Norms(cudaStream_t stream) : stream_(stream) {}

  // Takes the memory that norms of up to n_tokens rows need.
  void prepare(std::int64_t n_tokens, std::int64_t dim);
  std::size_t bytes() const { return squares_.bytes(); }

  // A norm of x[rows[i]], rows null: of x[i], by a launch. None where there is no gain.
  void run(const Norm& norm, const Tensor& x, const std::int32_t* rows = nullptr);
  // What the product that completes x has to write for a norm; takes no memory.
  NormStart begin(const Norm& norm, const Tensor& x);
  // How products of h finish it, if only its norm's first half was done.
  NormEnd end(const Tensor& h) const;
  // Finishes it by a launch, for products that cannot, before anything is added to its rows.
  void finish(const Tensor& h);
  // Something is added to y.
  void added_to(const Tensor& y) { is_stale_ |= x_.data == y.data; }
  void forget() { begun_ = {}; }

 private:
  bool is_begun(const Tensor& h) const { return begun_.gain != nullptr && begun_.y.data == h.data; }

  cudaStream_t stream_;
  Norm begun_;             // gain null: none
  Tensor x_;               // its rows
  bool is_stale_ = false;  // they are no longer what they were
  GrowingMemory squares_;
};

}  // namespace camelid::cuda
