// Pieces of pinned memory to where they belong on the device, in one launch: a step needs more than
// a dozen, and each copy by itself would take the host and the GPU over a microsecond.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/launch.cuh"

namespace camelid::cuda {

struct Pieces {
  static constexpr int kMost = 20;
  static constexpr std::size_t kBytes = 16;  // whole ones: pieces are padded to them on both sides
  struct Piece {
    std::byte* to = nullptr;  // aligned to 16 bytes
    std::int32_t n_words = 0;
  };
  const std::byte* from = nullptr;  // pinned: one piece after the other, aligned to 16 bytes
  std::int32_t n = 0;
  Piece pieces[kMost];
};

// `from` must stay as it is until the launch is over. Waits for nothing.
void scatter(const Pieces& pieces, cudaStream_t stream);

}  // namespace camelid::cuda
