// The host's side of kernels over device/stream.cuh: which instance suits a matrix, how large the
// grid and its workspace are, and what a caller may not ask.
#pragma once

#include <cstdint>

#include "device/stream.cuh"
#include "ops/checks.h"
#include "ops/instances.h"
#include "ops/workspace.h"

namespace camelid::cuda {

// Calls f(StreamShape<...>{}) with the instance for a matrix and so many tokens a pass.
template <class F>
auto with_stream_shape(const TileShape& shape, int tokens, const F& f) {
  const auto with_tokens = [&]<Bits kBits, Scales kScales>() {
    if constexpr (kBits == Bits::k4 && kScales == Scales::kBf16) {
      if (tokens > 32) return f(StreamShape<kBits, kScales, 8>{});
    }
    if (tokens > 16) return f(StreamShape<kBits, kScales, 4>{});
    if (tokens > 8) return f(StreamShape<kBits, kScales, 2>{});
    return f(StreamShape<kBits, kScales, 1>{});
  };
  return with_tile_format(shape, with_tokens);
}

template <class Shape, class Header>
constexpr std::size_t kStreamBytes = kStreamHeaderBytes<Header> + Shape::kBytes;

// The most tokens of one pass over the weights by a kernel with such a Header: 64 of int4 without
// zero points where a block has the memory, as on an A100 or H100; else 32, for which slots of the
// larger weights are small enough.
template <class Header>
int most_tokens_at_once(const TileShape& shape) {
  using Largest = StreamShape<Bits::k4, Scales::kBf16, 8>;
  const bool small = shape.bits == Bits::k4 && shape.scales == Scales::kBf16;
  return small && kStreamBytes<Largest, Header> <= shared_memory_limit() ? 64 : 32;
}

// Tokens of one pass: 8, 16, 32 or 64.
template <class Header>
int tokens_at_once(const TileShape& shape, int n_tokens) {
  const int most = most_tokens_at_once<Header>(shape);
  int tokens = kTokenTile;
  while (tokens < n_tokens && tokens < most) tokens *= 2;
  return tokens;
}

// Of a grid: as many blocks as the device runs at once, and no more than `most`, where it is not 0.
template <class Shape, class Header, typename... Parameters>
int stream_blocks(const char* name, void (*kernel)(Parameters...), int most) {
  constexpr std::size_t kBytes = kStreamBytes<Shape, Header>;
  static_assert(Shape::kTokens > 32 || kBytes <= kLeastSharedBytes);
  const int fit = blocks_that_fit(kernel, kStreamThreads, kBytes) * multiprocessors();
  if (fit == 0) {
    fail(ErrorCode::kUnsupported, "[cuda] ", name, ": this GPU has no room for ", kBytes,
         " bytes of shared memory and ", kStreamThreads, " threads in a block.");
  }
  return most > 0 && most < fit ? most : fit;
}

// Bytes of the sums that the blocks of a kernel leave each other.
template <class Shape, class Header, typename... Parameters>
std::size_t sum_bytes_of(const char* name, void (*kernel)(Parameters...)) {
  const int blocks = stream_blocks<Shape, Header>(name, kernel, 0);
  return static_cast<std::size_t>(blocks) * kPartPlaces * kStreamThreads * sizeof(float4) *
         Shape::kTokenTiles;
}

// The same of the kernels for calls of up to n_tokens: kernel_of(Shape{}) is the instance for a
// shape.
template <class Header, class KernelOf>
std::size_t stream_sum_bytes(const char* name, const TileShape& shape, int n_tokens,
                             const KernelOf& kernel_of) {
  const int at_once = tokens_at_once<Header>(shape, n_tokens);
  std::size_t bytes = 0;
  for (int tokens = kTokenTile; tokens <= at_once; tokens *= 2) {
    const std::size_t wanted = with_stream_shape(shape, tokens, [&]<class Shape>(Shape each) {
      return sum_bytes_of<Shape, Header>(name, kernel_of(each));
    });
    bytes = bytes < wanted ? wanted : bytes;
  }
  return bytes;
}

inline void check_workspace(const char* name, const Workspace& workspace,
                            const WorkspaceNeed& need) {
  require(
      workspace.sums != nullptr && is_aligned(workspace.sums, 16) && workspace.counters != nullptr,
      name, "a workspace must be there, aligned to 16 bytes");
  if (workspace.sum_bytes < need.sum_bytes || workspace.n_counters < need.n_counters) {
    fail(ErrorCode::kInternal, "[cuda] ", name, ": the workspace has ", workspace.sum_bytes,
         " bytes and ", workspace.n_counters, " counters; needed are ", need.sum_bytes, " and ",
         need.n_counters, ".");
  }
}

// Launches a kernel over streams on as many blocks as stream_blocks() says.
template <class Shape, class Header, typename... Parameters, typename... Arguments>
void launch_stream(const char* name, void (*kernel)(Parameters...), bool together, int most_blocks,
                   cudaStream_t stream, Arguments&&... arguments) {
  Launch how;
  how.blocks = stream_blocks<Shape, Header>(name, kernel, most_blocks);
  how.threads = kStreamThreads;
  how.shared_bytes = kStreamBytes<Shape, Header>;
  how.stream = stream;
  how.together = together;
  how.overlaps = true;
  launch(name, kernel, how, std::forward<Arguments>(arguments)...);
}

}  // namespace camelid::cuda
