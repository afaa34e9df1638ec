// The host's side of kernels over device/stream.cuh: which instance suits a matrix, how large the
// grid and its workspace are, and what a caller may not ask.
#pragma once

#include <cstdint>

#include "device/stream.cuh"
#include "ops/workspace.h"

namespace camelid::cuda {

constexpr int kMaxStreamBlocks = 512;  // of a grid; workspaces are made for so many

// Tokens of one pass over the weights: 8, 16, 32 or 64; at most 32 where slots are larger, or where
// a block has less shared memory than data centre GPUs give it.
inline int tokens_at_once(const TileShape& shape, int n_tokens) {
  const bool small = shape.bits == Bits::k4 && shape.scales == Scales::kBf16;
  const int most = small && shared_memory_limit() > kRingBytesOf64 + 16 * 1024 ? 64 : 32;
  int tokens = kTokenTile;
  while (tokens < n_tokens && tokens < most) tokens *= 2;
  return tokens;
}

inline std::size_t stream_sum_bytes(int n_token_tiles) {
  return static_cast<std::size_t>(kMaxStreamBlocks) * kPartPlaces * kStreamThreads *
         sizeof(float4) * static_cast<std::size_t>(n_token_tiles);
}

inline void check_workspace(const char* name, const Workspace& workspace,
                            const WorkspaceNeed& need) {
  if (workspace.sum_bytes < need.sum_bytes || workspace.n_counters < need.n_counters) {
    fail(ErrorCode::kInternal, "[cuda] ", name, ": the workspace has ", workspace.sum_bytes,
         " bytes and ", workspace.n_counters, " counters; needed are ", need.sum_bytes, " and ",
         need.n_counters, ".");
  }
}

inline void check_stream_inputs(const char* name, const TileShape& shape, const std::uint16_t* x,
                                int x_stride) {
  const bool entries = shape.entries == 1 || (shape.scales == Scales::kPairs &&
                                              (shape.entries == 2 || shape.entries == 4));
  const bool aligned = reinterpret_cast<std::uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0;
  if (shape.rows <= 0 || shape.inputs <= 0 || !entries || !aligned) {
    fail(ErrorCode::kInternal, "[cuda] ", name, ": ", shape.rows, " x ", shape.inputs,
         " weights with ", shape.entries, " scales a chunk, rows of x every ", x_stride,
         " values; wanted are sizes above 0, 1, 2 or 4 scales, rows aligned to 16 bytes.");
  }
}

// Calls f(StreamShape<...>{}) with the instance for a matrix and so many tokens a pass.
template <class F>
void with_stream_shape(const TileShape& shape, int tokens, const F& f) {
  const auto with_tokens = [&]<Bits kBits, Scales kScales>() {
    if (tokens == 8) return f(StreamShape<kBits, kScales, 1>{});
    if (tokens == 16) return f(StreamShape<kBits, kScales, 2>{});
    if (tokens == 32) return f(StreamShape<kBits, kScales, 4>{});
    if constexpr (kBits == Bits::k4 && kScales == Scales::kBf16) {
      return f(StreamShape<kBits, kScales, 8>{});
    }
  };
  if (shape.bits == Bits::k4) {
    if (shape.scales == Scales::kBf16) {
      with_tokens.template operator()<Bits::k4, Scales::kBf16>();
    } else {
      with_tokens.template operator()<Bits::k4, Scales::kPairs>();
    }
  } else if (shape.scales == Scales::kBf16) {
    with_tokens.template operator()<Bits::k8, Scales::kBf16>();
  } else {
    with_tokens.template operator()<Bits::k8, Scales::kPairs>();
  }
}

// Launches a kernel over streams on as many blocks as fit the device at once.
template <class Shape, class Header, typename... Parameters, typename... Arguments>
void launch_stream(const char* name, void (*kernel)(Parameters...), bool together,
                   cudaStream_t stream, Arguments&&... arguments) {
  Launch how;
  how.threads = kStreamThreads;
  how.shared_bytes = kStreamHeaderBytes<Header> + Shape::kBytes;
  how.stream = stream;
  how.together = together;
  how.overlaps = !together;
  const int fit = blocks_that_fit(kernel, how.threads, how.shared_bytes) * multiprocessors();
  if (fit == 0) {
    fail(ErrorCode::kUnsupported, "[cuda] ", name, ": this GPU has no room for ", how.shared_bytes,
         " bytes of shared memory and ", how.threads, " threads in a block.");
  }
  how.blocks = fit < kMaxStreamBlocks ? fit : kMaxStreamBlocks;
  launch(name, kernel, how, std::forward<Arguments>(arguments)...);
}

}  // namespace camelid::cuda
