// A warp for each head of each token (store_head.cuh). Bound by latency for few tokens; for many by
// DRAM: 4 bytes read and 1 or 2 written for each value.
#include "ops/store_kv.h"

#include "ops/store_head.cuh"

namespace camelid::cuda {
namespace {

constexpr int kWarps = 4;  // of a block

__global__ void __launch_bounds__(kWarps* kWarp) store_kv_kernel(const StoreKv call) {
  let_next_kernel_start();
  const int n_all = n_heads_of(call);
  const std::int64_t warp = std::int64_t{block_index()} * kWarps + thread_index() / kWarp;
  if (warp >= std::int64_t{call.n_tokens} * n_all) return;
  wait_for_previous_kernel();
  store_head(call, warp / n_all, static_cast<int>(warp % n_all));
}

}  // namespace

void store_kv(const StoreKv& call, cudaStream_t stream) {
  if (call.n_tokens <= 0) return;
  check_store("store_kv", call);
  const std::int64_t n_warps = std::int64_t{call.n_tokens} * n_heads_of(call);
  Launch how;
  how.blocks = static_cast<int>((n_warps + kWarps - 1) / kWarps);
  how.threads = kWarps * kWarp;
  how.stream = stream;
  how.overlaps = true;
  launch("store_kv", store_kv_kernel, how, call);
}

}  // namespace camelid::cuda
