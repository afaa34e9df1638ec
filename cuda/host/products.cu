// Which kernel multiplies: by the kind of matrix, the number of tokens and the GPU.
#include "host/products.h"

#include <algorithm>

#include "ops/matmul_plain.h"
#include "ops/project_kv.h"
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

bool Products::are_few(const Tensor& x, const DeviceMatrix& w) {
  return x.n_rows <= kMostFewTokens &&
         std::all_of(w.segments.begin(), w.segments.end(),
                     [](const Segment& segment) { return segment.is_tiled; });
}

NormEnd Products::end_norm(const Tensor& x, const DeviceMatrix& w) {
  if (are_few(x, w)) return norms_.end(x);
  norms_.finish(x);
  return {};
}

MatmulFew Products::few(void* to, const Tensor& y, const Tensor& x, const Segment& segment) {
  MatmulFew call;
  call.w = segment.tiled;
  call.x = static_cast<const std::uint16_t*>(x.data);
  call.n_tokens = static_cast<std::int32_t>(x.n_rows);
  call.x_stride = static_cast<std::int32_t>(x.row_stride);
  call.y = to;
  call.y_stride = static_cast<std::int32_t>(y.row_stride);
  return call;
}

void Products::multiply(const Tensor& y, const Tensor& x, const Segment& segment, Output output,
                        const NormEnd& norm_of_x, const NormStart& norm_of_y) {
  const std::size_t element = y.role == Role::kSum ? sizeof(float) : sizeof(std::uint16_t);
  void* to =
      static_cast<std::byte*>(y.data) + static_cast<std::size_t>(segment.first_row) * element;
  if (!segment.is_tiled) {
    multiply_plain(to, y, x, segment.plain, output);
    return;
  }
  const TileShape& shape = segment.tiled.shape;
  if (x.n_rows <= kMostFewTokens) {
    MatmulFew call = few(to, y, x, segment);
    call.output = output;
    call.norm_of_x = norm_of_x;
    call.norm_of_y = norm_of_y;
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

void Products::multiply(const Tensor& y, const Tensor& x, const DeviceMatrix& w) {
  const Output output = y.role == Role::kSum ? Output::kStore : Output::kStoreBf16;
  const NormEnd norm_of_x = end_norm(x, w);
  for (const Segment& segment : w.segments) multiply(y, x, segment, output, norm_of_x);
}

void Products::project(const Tensor& qkv, const Tensor& x, const DeviceMatrix& w,
                       const StoreKv& store) {
  if (x.n_rows > kMostProjectedTokens || !are_few(x, w) || w.segments.size() > 1 ||
      !project_kv_fits(store)) {
    multiply(qkv, x, w);
    store_kv(store, gpu_.stream);
    return;
  }
  const Segment& segment = w.segments.front();
  MatmulFew product = few(qkv.data, qkv, x, segment);
  product.norm_of_x = end_norm(x, w);
  project_kv(product, store, workspace(project_kv_needs(segment.tiled.shape)), gpu_.stream);
}

void Products::multiply_add(const Tensor& y, const Tensor& x, const DeviceMatrix& w,
                            const Norm& then) {
  norms_.finish(x);
  norms_.added_to(y);
  // Squares are of the parts of one matrix.
  if (then.gain != nullptr && are_few(x, w) && w.segments.size() == 1) {
    multiply(y, x, w.segments.front(), Output::kAdd, {}, norms_.begin(then, y));
    return;
  }
  for (const Segment& segment : w.segments) multiply(y, x, segment, Output::kAdd, {});
  norms_.run(then, y);
}

void Products::multiply_gated(const Tensor& y, const Tensor& x, const DeviceMatrix& w) {
  multiply(y, x, w.segments.front(), Output::kSwiGlu, end_norm(x, w));
}

}  // namespace camelid::cuda
