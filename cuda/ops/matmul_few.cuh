// What kernels over a list of one matrix and a few tokens have in common.
#pragma once

#include "device/stream.cuh"
#include "ops/matmul_few.h"
#include "ops/stream_launch.cuh"

namespace camelid::cuda {

// The Header has `lists` and `starts`. By one thread.
template <class Header>
__device__ void set_only_list(Header& header, const MatmulFew& call) {
  List& list = header.lists[0];
  list = {};
  list.table = &call.w.at;
  list.starts = header.starts;
  list.factors = header.factors;
  list.x = call.x;
  list.y = call.y;
  list.x_stride = call.x_stride;
  list.y_stride = call.y_stride;
  list.norm = call.norm_of_y;
  list.shape = call.w.shape;
  list.output = call.output;
  list.n_tasks = 1;
  header.starts[0] = 0;
  header.starts[1] = call.n_tokens;
  deal_list(list);
}

// The kernels' body. `header` is the block's, with all it has beside the list.
template <class Shape, class Header>
__device__ void run_only_list(Header& header, const MatmulFew& call, const Parts& parts) {
  if (thread_index() == 0) set_only_list(header, call);
  sync_block();
  Stream<Shape, Header> stream(parts);
  stream.prefetch(1);
  wait_for_previous_kernel();
  let_next_kernel_start();
  find_norm_factors(call.norm_of_x, call.n_tokens, header.factors);
  stream.run(1, 1);
}

inline std::size_t n_counters_of(const TileShape& shape) {
  return static_cast<std::size_t>(divide_up(shape.n_row_tiles(), kStreamWarps)) + 1;
}

inline void check_matmul_few(const char* name, const MatmulFew& call) {
  const TileShape& shape = call.w.shape;
  require(call.n_tokens > 0, name, "there are no fewer than 0 tokens");
  check_shape(name, shape);
  check_tiles(name, call.w.at);
  check_rows(name, "x", call.x, shape.inputs, call.x_stride);
  check_output(name, call.output, shape.rows, shape.order, call.y, call.y_stride);
  check_norm(name, call.norm_of_y, call.output, shape.rows);
  require(call.norm_of_x.squares == nullptr || call.norm_of_y.gain == nullptr, name,
          "one call begins a norm or finishes one");
}

}  // namespace camelid::cuda
