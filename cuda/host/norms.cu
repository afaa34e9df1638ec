// Norms that were begun, and what is done to those nobody can finish.
#include "host/norms.h"

#include <utility>

#include "base/error.h"

namespace camelid::cuda {
namespace {

const float* gain_of(const Norm& norm) { return static_cast<const float*>(norm.gain->data.get()); }

std::size_t square_bytes(std::int64_t n_tokens, std::int64_t dim) {
  const auto n_parts = static_cast<std::size_t>(n_norm_parts(static_cast<int>(dim)));
  return static_cast<std::size_t>(n_tokens) * n_parts * sizeof(float);
}

}  // namespace

Rows rows_of(const Tensor& x) {
  return {x.data, static_cast<std::int32_t>(x.n_rows), static_cast<std::int32_t>(x.dim),
          x.row_stride, x.role == Role::kSum ? Element::kF32 : Element::kBf16};
}

void Norms::prepare(std::int64_t n_tokens, std::int64_t dim) {
  squares_.at_least(square_bytes(n_tokens, dim));
}

void Norms::run(const Norm& norm, const Tensor& x, const std::int32_t* rows) {
  if (norm.gain == nullptr) return;
  if (is_begun(norm.y)) forget();
  rms_norm(rows_of(norm.y), rows_of(x), rows, gain_of(norm), norm.eps, stream_);
}

NormStart Norms::begin(const Norm& norm, const Tensor& x) {
  if (squares_.bytes() < square_bytes(x.n_rows, x.dim)) {  // products may be reading them
    fail(ErrorCode::kInternal, "[cuda] a norm of ", x.n_rows, " rows of ", x.dim,
         " values was not prepared.");
  }
  begun_ = norm;
  x_ = x;
  is_stale_ = false;
  return {gain_of(norm), static_cast<std::uint16_t*>(norm.y.data), norm.y.row_stride,
          reinterpret_cast<float*>(squares_.get())};
}

NormEnd Norms::end(const Tensor& h) const {
  if (!is_begun(h)) return {};
  const auto dim = static_cast<int>(h.dim);
  return {reinterpret_cast<const float*>(squares_.get()), n_norm_parts(dim),
          1.0f / static_cast<float>(dim), begun_.eps};
}

void Norms::finish(const Tensor& h) {
  if (!is_begun(h)) return;
  if (is_stale_) fail(ErrorCode::kInternal, "[cuda] the rows of a norm that was begun are gone.");
  run(std::exchange(begun_, {}), x_);
}

}  // namespace camelid::cuda
