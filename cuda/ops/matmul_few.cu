// The kernel is the stream of device/stream.cuh over a list of one matrix.
#include "ops/matmul_few.h"

#include "ops/matmul_few.cuh"

namespace camelid::cuda {
namespace {

struct Header : StreamHeader {
  List lists[1];
  int starts[2];
};

template <class Shape>
__global__ void __launch_bounds__(kStreamThreads, Shape::kBlocks)
    run_matmul_few(const __grid_constant__ MatmulFew call, const Parts parts) {
  run_only_list<Shape>(*reinterpret_cast<Header*>(shared_memory()), call, parts);
}

// ---- the host's side ----

constexpr const char* kName = "matmul of few tokens";

}  // namespace

WorkspaceNeed matmul_few_needs(const TileShape& shape, int n_tokens) {
  return {stream_sum_bytes<Header>(kName, shape, n_tokens,
                                   []<class Shape>(Shape) { return run_matmul_few<Shape>; }),
          n_counters_of(shape)};
}

void matmul_few(const MatmulFew& call, const Workspace& workspace, cudaStream_t stream) {
  if (call.n_tokens == 0) return;
  check_matmul_few(kName, call);
  check_workspace(kName, workspace, matmul_few_needs(call.w.shape, call.n_tokens));
  const int at_once = tokens_at_once<Header>(call.w.shape, call.n_tokens);
  const Parts parts = {reinterpret_cast<float4*>(workspace.sums), workspace.counters + 1};
  const std::size_t y_row =
      static_cast<std::size_t>(call.y_stride) *
      (call.output == Output::kStoreBf16 || call.output == Output::kSwiGlu ? sizeof(std::uint16_t)
                                                                           : sizeof(float));
  for (std::int32_t first = 0; first < call.n_tokens; first += at_once) {
    MatmulFew piece = call;
    piece.x += std::int64_t{first} * call.x_stride;
    piece.y = static_cast<std::byte*>(call.y) + static_cast<std::size_t>(first) * y_row;
    if (call.norm_of_x.squares != nullptr) {
      piece.norm_of_x.squares += std::int64_t{first} * call.norm_of_x.n_parts;
    }
    if (call.norm_of_y.gain != nullptr) {
      piece.norm_of_y.h += first * call.norm_of_y.h_stride;
      piece.norm_of_y.squares += std::int64_t{first} * n_norm_parts(call.w.shape.rows);
    }
    piece.n_tokens = call.n_tokens - first < at_once ? call.n_tokens - first : at_once;
    with_stream_shape(call.w.shape, at_once, [&]<class Shape>(Shape) {
      launch_stream<Shape, Header>(kName, run_matmul_few<Shape>, false, call.most_blocks, stream,
                                   piece, parts);
    });
  }
}

}  // namespace camelid::cuda
