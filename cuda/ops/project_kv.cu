// The stream of device/stream.cuh over a list of one matrix. The block that completes 128 rows has
// one head or several of all tokens: its warps read them back and store them.
#include "ops/project_kv.h"

#include "ops/matmul_few.cuh"
#include "ops/store_head.cuh"

namespace camelid::cuda {
namespace {

struct Header : StreamHeader {
  List lists[1];
  int starts[2];
  StoreKv store;

  __device__ void completed(int, int row_block) {
    sync_block();  // the sums that other warps wrote are seen
    const int n_heads = kStreamRows / store.pool.shape.head_dim;  // of the block
    const int n_all = n_heads_of(store);
    for (int i = thread_index() / kWarp; i < n_heads * store.n_tokens; i += kStreamWarps) {
      const int index = row_block * n_heads + i % n_heads;
      if (index < n_all) store_head(store, i / n_heads, index);
    }
  }
};

template <class Shape>
__global__ void __launch_bounds__(kStreamThreads, Shape::kBlocks)
    run_project_kv(const __grid_constant__ MatmulFew call, const __grid_constant__ StoreKv store,
                   const Parts parts) {
  auto& header = *reinterpret_cast<Header*>(shared_memory());
  if (thread_index() == 0) header.store = store;
  run_only_list<Shape>(header, call, parts);
}

// ---- the host's side ----

constexpr const char* kName = "projection to queries, keys and values";

template <class F>
auto with_shape(const TileShape& shape, const F& f) {
  return with_tile_format(shape, [&]<Bits kBits, Scales kScales>() {
    return f(StreamShape<kBits, kScales, kMostProjectedTokens / kTokenTile>{});
  });
}

void check_call(const MatmulFew& product, const StoreKv& store) {
  check_matmul_few(kName, product);
  check_store(kName, store);
  const std::int64_t rows = std::int64_t{n_heads_of(store)} * store.pool.shape.head_dim;
  if (!project_kv_fits(store) || product.n_tokens > kMostProjectedTokens ||
      product.n_tokens != store.n_tokens || product.output != Output::kStore ||
      product.y != store.qkv || product.y_stride != store.qkv_stride ||
      product.w.shape.rows != rows) {
    fail(ErrorCode::kInternal, "[cuda] ", kName, ": ", product.n_tokens, " tokens by ",
         product.w.shape.rows, " rows, and ", store.n_tokens, " tokens of ", n_heads_of(store),
         " heads of ", store.pool.shape.head_dim, " values; wanted are up to ",
         kMostProjectedTokens, " tokens in one place, and heads of a size that divides 128.");
  }
}

}  // namespace

bool project_kv_fits(const StoreKv& store) {
  const int head_dim = store.pool.shape.head_dim;
  return head_dim >= 8 && kStreamRows % head_dim == 0;
}

WorkspaceNeed project_kv_needs(const TileShape& shape) {
  const std::size_t sum_bytes = with_shape(shape, [&]<class Shape>(Shape) {
    return sum_bytes_of<Shape, Header>(kName, run_project_kv<Shape>);
  });
  return {sum_bytes, n_counters_of(shape)};
}

void project_kv(const MatmulFew& product, const StoreKv& store, const Workspace& workspace,
                cudaStream_t stream) {
  if (product.n_tokens == 0) return;
  check_call(product, store);
  check_workspace(kName, workspace, project_kv_needs(product.w.shape));
  const Parts parts = {reinterpret_cast<float4*>(workspace.sums), workspace.counters + 1};
  with_shape(product.w.shape, [&]<class Shape>(Shape) {
    launch_stream<Shape, Header>(kName, run_project_kv<Shape>, false, product.most_blocks, stream,
                                 product, store, parts);
  });
}

}  // namespace camelid::cuda
