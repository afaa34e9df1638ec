// One thread for each 16 bytes, so that all reads of the host's memory are under way at once.
#include "ops/scatter.h"

namespace camelid::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) scatter_kernel(const __grid_constant__ Pieces call) {
  std::int32_t word = block_index() * kThreads + thread_index();
  const auto* from = reinterpret_cast<const uint4*>(call.from) + word;
  for (int i = 0; i < call.n; ++i) {
    if (word < call.pieces[i].n_words) {
      reinterpret_cast<uint4*>(call.pieces[i].to)[word] = *from;
      return;
    }
    word -= call.pieces[i].n_words;
  }
}

}  // namespace

void scatter(const Pieces& pieces, cudaStream_t stream) {
  std::int64_t n_words = 0;
  for (int i = 0; i < pieces.n && i < Pieces::kMost; ++i) n_words += pieces.pieces[i].n_words;
  if (n_words == 0) return;
  if (pieces.n > Pieces::kMost || n_words > std::int64_t{1} << 30) {
    fail(ErrorCode::kInternal, "[cuda] scatter: ", pieces.n, " pieces of ", n_words,
         " words are too many.");
  }
  Launch how;
  how.blocks = static_cast<int>((n_words + kThreads - 1) / kThreads);
  how.threads = kThreads;
  how.stream = stream;
  launch("scatter", scatter_kernel, how, pieces);
}

}  // namespace camelid::cuda
