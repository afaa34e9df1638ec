// Which kernel multiplies: by the kind of matrix, the number of tokens and the GPU.
#include "host/products.h"

#include "ops/matmul_plain.h"
#include "sm90/grouped.h"
#include "sm90/matmul_dense.h"

namespace camelid::cuda {

void grouped_many(const Gpu& gpu, const GroupedProduct& product) {
  if (gpu.is_hopper()) {
    sm90::grouped_many(product, gpu.multiprocessors, gpu.stream);
  } else {
    grouped_many(product, gpu.multiprocessors, gpu.stream);
  }
}

Workspace Products::workspace(const WorkspaceNeed& need) {
  Workspace workspace;
  workspace.sums = sums_.at_least(need.sum_bytes);
  workspace.sum_bytes = sums_.bytes();
  workspace.counters = reinterpret_cast<unsigned*>(
      counters_.at_least_zeroed(need.n_counters * sizeof(unsigned), gpu_.stream));
  workspace.n_counters = counters_.bytes() / sizeof(unsigned);
  return workspace;
}

void Products::prepare(const DeviceMatrix& matrix) {
  for (const Segment& segment : matrix.segments) {
    if (!segment.is_tiled) continue;
    workspace(matmul_few_needs(segment.tiled.shape, static_cast<int>(kMostFewTokens)));
  }
}

void Products::multiply_plain(void* y, const Tensor& rows_of_y, const Tensor& x,
                              const PlainMatrix& w, Output output) {
  const auto describe = [&](auto& call) {  // MatmulDense and MatmulPlain have the same names
    call.x = static_cast<const std::uint16_t*>(x.data);
    call.w = w.at;
    call.y = y;
    call.n_tokens = static_cast<std::int32_t>(x.n_rows);
    call.rows = w.rows;
    call.inputs = w.inputs;
    call.x_stride = static_cast<std::int32_t>(x.row_stride);
    call.w_stride = w.stride;
    call.y_stride = static_cast<std::int32_t>(rows_of_y.row_stride);
    call.output = output;
  };
  if (gpu_.is_hopper() && x.n_rows > kMostFewTokens && output != Output::kSwiGlu) {
    MatmulDense call;
    describe(call);
    if (matmul_dense_fits(call)) {
      matmul_dense(call, dense_workspace_.at_least(matmul_dense_workspace_bytes(call)),
                   gpu_.stream);
      return;
    }
  }
  MatmulPlain call;
  describe(call);
  matmul_plain(call, gpu_.stream);
}

void Products::multiply(const Tensor& y, const Tensor& x, const Segment& segment, Output output) {
  const std::size_t element = y.role == Role::kSum ? sizeof(float) : sizeof(std::uint16_t);
  void* to =
      static_cast<std::byte*>(y.data) + static_cast<std::size_t>(segment.first_row) * element;
  if (!segment.is_tiled) {
    multiply_plain(to, y, x, segment.plain, output);
    return;
  }
  const TileShape& shape = segment.tiled.shape;
  if (x.n_rows <= kMostFewTokens) {
    MatmulFew call;
    call.w = segment.tiled;
    call.x = static_cast<const std::uint16_t*>(x.data);
    call.n_tokens = static_cast<std::int32_t>(x.n_rows);
    call.x_stride = static_cast<std::int32_t>(x.row_stride);
    call.y = to;
    call.y_stride = static_cast<std::int32_t>(y.row_stride);
    call.output = output;
    matmul_few(call, workspace(matmul_few_needs(shape, call.n_tokens)), gpu_.stream);
    return;
  }
  GroupedProduct call;
  call.shape = shape;
  call.groups = segment.table;
  call.x = static_cast<const std::uint16_t*>(x.data);
  call.x_stride = x.row_stride;
  call.y = to;
  call.y_stride = y.row_stride;
  call.output = output;
  call.n_visits = static_cast<std::int32_t>(x.n_rows);
  grouped_many(gpu_, call);
}

void Products::multiply(const Tensor& y, const Tensor& x, const DeviceMatrix& w, bool add) {
  const Output output = add                    ? Output::kAdd
                        : y.role == Role::kSum ? Output::kStore
                                               : Output::kStoreBf16;
  for (const Segment& segment : w.segments) multiply(y, x, segment, output);
}

void Products::multiply_gated(const Tensor& y, const Tensor& x, const DeviceMatrix& w) {
  multiply(y, x, w.segments.front(), Output::kSwiGlu);
}

}  // namespace camelid::cuda
