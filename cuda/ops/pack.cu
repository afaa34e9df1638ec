// A piece on its way holds whole row tiles, row after row in the order of the tiles, each row with
// all that belongs to it:
//
//   words of values [inputs] | scales [groups] as stored | words of zero points [groups], or none
//
// The host copies bytes; the device finds each word of a tile, and each scale, by layout/tiles.h.
#include "ops/pack.h"

#include <algorithm>
#include <cstring>

#include "base/dtype.h"
#include "device/launch.cuh"

namespace camelid::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 1024;  // at most; a piece of 4 MB gives each thread four words

// ---- layout ----

// One linear of the stack.
struct Part {
  std::int32_t first_row = 0;  // in the stack
  std::int32_t group = 0;
  DType scale_dtype = DType::kBf16;
  bool has_zeros = false;
};

struct Piece {
  TileShape shape;
  Part parts[kMaxStack];
  std::int32_t n_parts = 0;
  std::int32_t row_bytes = 0, scales_at = 0, zeros_at = 0;  // of a row; multiples of 4
  std::int32_t first_tile = 0, n_tiles = 0;                 // row tiles of this piece
  const std::byte* rows = nullptr;                          // [n_tiles][kTileRows][row_bytes]
  std::byte* tiles = nullptr;
  std::byte* scales = nullptr;
};

CAMELID_HOST_DEVICE int part_of(const Piece& piece, int row) {
  int part = 0;
  while (part + 1 < piece.n_parts && piece.parts[part + 1].first_row <= row) ++part;
  return part;
}

// ---- kernel ----

// Row r of a row tile of the piece.
__device__ const std::byte* row_at(const Piece& piece, int tile, int r) {
  return piece.rows + (std::int64_t{tile} * kTileRows + r) * piece.row_bytes;
}

// The value's bits as tiles hold them; of what is not there those of 0.
__device__ std::uint32_t value_at(const Piece& piece, int tile, int r, int input) {
  const bool four = piece.shape.bits == Bits::k4;
  const bool is_there = input < piece.shape.inputs &&
                        source_row(piece.shape, piece.first_tile + tile, r) < piece.shape.rows;
  if (!is_there) return four ? 8u : 0u;
  const auto* words = reinterpret_cast<const std::uint32_t*>(row_at(piece, tile, r));
  if (four) return words[input / 8] >> (input % 8 * 4) & 15u;
  return (words[input / 4] >> (input % 4 * 8) & 255u) ^ 128u;
}

__device__ float scale_at(const Part& part, const std::byte* scales, int group) {
  if (part.scale_dtype == DType::kF32) return reinterpret_cast<const float*>(scales)[group];
  const std::uint16_t half = reinterpret_cast<const std::uint16_t*>(scales)[group];
  return part.scale_dtype == DType::kBf16 ? bf16_to_f32(half) : f16_to_f32(half);
}

// Of a row of the part: zero points of neighbouring rows share a word.
__device__ float zero_at(Bits bits, const std::byte* zeros, int group, int row) {
  const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(zeros)[group];
  if (bits == Bits::k4)
    return static_cast<float>(static_cast<int>(word >> (row % 8 * 4) & 15u) - 8);
  return static_cast<float>(static_cast<int>(word >> (row % 4 * 8) & 255u) - 128);
}

// Scale and zero point number i of the piece's: [row tile][chunk][entry][row].
__device__ void pack_scale(const Piece& piece, std::int64_t i) {
  const TileShape& shape = piece.shape;
  const int r = static_cast<int>(i % kTileRows);
  const int n_entries = shape.n_chunks() * shape.entries;
  const int entry = static_cast<int>(i / kTileRows % n_entries);
  const int tile = static_cast<int>(i / kTileRows / n_entries);
  const int row = source_row(shape, piece.first_tile + tile, r);
  const int input = entry * (kChunkInputs / shape.entries);
  float scale = 0.0f, zero = 0.0f;
  if (row < shape.rows && input < shape.inputs) {
    const Part& part = piece.parts[part_of(piece, row)];
    const std::byte* at = row_at(piece, tile, r);
    const int group = input / part.group;
    scale = scale_at(part, at + piece.scales_at, group);
    if (part.has_zeros) {
      zero = zero_at(shape.bits, at + piece.zeros_at, group, row - part.first_row);
    }
  }
  std::byte* to = piece.scales + piece.first_tile * shape.row_tile_scale_bytes() +
                  i * scale_bytes(shape.scales);
  if (shape.scales == Scales::kBf16) {
    *reinterpret_cast<std::uint16_t*>(to) = f32_to_bf16(scale);  // exact: it was bf16
  } else {
    *reinterpret_cast<float2*>(to) = float2{scale, zero};
  }
}

__global__ void __launch_bounds__(kThreads) pack_piece(const __grid_constant__ Piece piece) {
  const TileShape& shape = piece.shape;
  const int words = tile_bytes(shape.bits) / 4;
  const std::int64_t row_tile_words = std::int64_t{shape.n_k_tiles()} * words;
  const std::int64_t first = std::int64_t{block_index()} * block_size() + thread_index();
  const std::int64_t step = std::int64_t{grid_size()} * block_size();
  auto* to = reinterpret_cast<std::uint32_t*>(piece.tiles) + piece.first_tile * row_tile_words;
  for (std::int64_t i = first; i < piece.n_tiles * row_tile_words; i += step) {
    const int tile = static_cast<int>(i / row_tile_words);
    const int k_tile = static_cast<int>(i % row_tile_words / words);
    to[i] = make_word(shape.bits, static_cast<int>(i % words), [&](int r, int input) {
      return value_at(piece, tile, r, k_tile * kTileInputs + input);
    });
  }
  const std::int64_t n_scales =
      piece.n_tiles * (shape.row_tile_scale_bytes() / scale_bytes(shape.scales));
  for (std::int64_t i = first; i < n_scales; i += step) pack_scale(piece, i);
}

// ---- choose ----

bool is_whole_row(const LinearSource& source) { return source.group_size >= source.in_dim; }

// Scales that a row of a source has in a chunk; 0 where chunks cannot have them.
int entries_of(const LinearSource& source) {
  if (is_whole_row(source) || source.group_size % kChunkInputs == 0) return 1;
  if (source.group_size <= 0 || source.group_size % 32 != 0) return 0;
  return source.group_size % 64 == 0 ? 2 : 4;
}

void check_source(const LinearSource& source, const LinearSource& first) {
  const auto refuse = [&](const auto&... why) {
    fail(ErrorCode::kUnsupported, "[cuda] ", source.name, " in ", source.file, " ", why...);
  };
  if (source.bits != 4 && source.bits != 8) refuse("has no packed values of 4 or 8 bits.");
  if (source.bits != first.bits || source.in_dim != first.in_dim) {
    refuse("has ", source.bits, " bits and ", source.in_dim, " inputs, and ", first.name,
           " beside it ", first.bits, " and ", first.in_dim, "; they must be the same.");
  }
  if (entries_of(source) == 0) {
    refuse("has groups of ", source.group_size,
           " values; the GPU takes multiples of 32, or one group for a row.");
  }
}

// ---- launch ----

Piece describe(std::span<const LinearSource> stack, const TileShape& shape, std::byte* tiles,
               std::byte* scales) {
  Piece piece;
  piece.shape = shape;
  piece.tiles = tiles;
  piece.scales = scales;
  std::int64_t row = 0, scale_bytes = 0, zero_bytes = 0;
  for (const LinearSource& source : stack) {
    const std::int64_t group = is_whole_row(source) ? source.in_dim : source.group_size;
    const std::int64_t n_groups = (source.in_dim + group - 1) / group;
    piece.parts[piece.n_parts++] = {static_cast<std::int32_t>(row),
                                    static_cast<std::int32_t>(group), source.scale_dtype,
                                    source.zero_points != nullptr};
    row += source.out_dim;
    const auto bytes = n_groups * static_cast<std::int64_t>(dtype_bytes(source.scale_dtype));
    scale_bytes = std::max(scale_bytes, (bytes + 3) / 4 * 4);
    if (source.zero_points != nullptr) zero_bytes = std::max(zero_bytes, n_groups * 4);
  }
  piece.scales_at = divide_up(shape.inputs, shape.bits == Bits::k4 ? 8 : 4) * 4;
  piece.zeros_at = piece.scales_at + static_cast<std::int32_t>(scale_bytes);
  piece.row_bytes = piece.zeros_at + static_cast<std::int32_t>(zero_bytes);
  return piece;
}

// Copies what belongs to a row of the stack.
void copy_row(std::byte* to, const Piece& piece, std::span<const LinearSource> stack, int row) {
  const int index = part_of(piece, row);
  const LinearSource& source = stack[static_cast<std::size_t>(index)];
  const Part& part = piece.parts[index];
  const auto local = static_cast<std::size_t>(row - part.first_row);
  const auto copy = [](std::byte* at, const void* rows, std::size_t i, std::size_t bytes) {
    std::memcpy(at, static_cast<const std::byte*>(rows) + i * bytes, bytes);
  };
  const auto n_groups = static_cast<std::size_t>(divide_up(piece.shape.inputs, part.group));
  copy(to, source.words, local, static_cast<std::size_t>(piece.scales_at));
  copy(to + piece.scales_at, source.scales, local, n_groups * dtype_bytes(part.scale_dtype));
  if (part.has_zeros) {
    const std::size_t rows_a_word = piece.shape.bits == Bits::k4 ? 8 : 4;
    copy(to + piece.zeros_at, source.zero_points, local / rows_a_word, n_groups * 4);
  }
}

}  // namespace

TileShape packed_shape(std::span<const LinearSource> stack, RowOrder order) {
  const bool pair = stack.size() == 2 && stack[0].out_dim == stack[1].out_dim;
  if (stack.empty() || stack.size() > kMaxStack || (order == RowOrder::kGateUp && !pair)) {
    fail(ErrorCode::kInternal, "[cuda] ", stack.size(), " linears to pack; wanted are 1 to ",
         kMaxStack, ", and for gate and up two of one size.");
  }
  TileShape shape;
  shape.order = order;
  for (const LinearSource& source : stack) {
    check_source(source, stack[0]);
    shape.rows += static_cast<std::int32_t>(source.out_dim);
    shape.entries = std::max(shape.entries, entries_of(source));
    if (source.scale_dtype != DType::kBf16 || source.zero_points != nullptr) {
      shape.scales = Scales::kPairs;
    }
  }
  if (shape.entries > 1) shape.scales = Scales::kPairs;
  shape.inputs = static_cast<std::int32_t>(stack[0].in_dim);
  shape.bits = stack[0].bits == 4 ? Bits::k4 : Bits::k8;
  return shape;
}

void pack(std::span<const LinearSource> stack, const TileShape& shape, std::byte* tiles,
          std::byte* scales, Uploader& uploader) {
  Piece piece = describe(stack, shape, tiles, scales);
  const std::size_t tile_row_bytes = static_cast<std::size_t>(piece.row_bytes) * kTileRows;
  const auto at_once = static_cast<std::int32_t>(uploader.piece_bytes() / tile_row_bytes);
  if (at_once == 0) {
    fail(ErrorCode::kUnsupported, "[cuda] ", stack[0].name, ": 16 rows of ", shape.inputs,
         " inputs are ", tile_row_bytes, " bytes; at most ", uploader.piece_bytes(),
         " go to the GPU at once.");
  }
  for (; piece.first_tile < shape.n_row_tiles(); piece.first_tile += piece.n_tiles) {
    piece.n_tiles = std::min(at_once, shape.n_row_tiles() - piece.first_tile);
    std::byte* to = uploader.next();
    for (int i = 0; i < piece.n_tiles * kTileRows; ++i) {
      const int row = source_row(shape, piece.first_tile + i / kTileRows, i % kTileRows);
      if (row < shape.rows) copy_row(to + std::int64_t{i} * piece.row_bytes, piece, stack, row);
    }
    piece.rows = uploader.send(static_cast<std::size_t>(piece.n_tiles) * tile_row_bytes);
    const std::int64_t words = piece.n_tiles * shape.row_tile_bytes() / 4;
    const auto blocks = std::min<std::int64_t>((words + kThreads - 1) / kThreads, kBlocks);
    launch("pack", pack_piece,
           {.blocks = static_cast<int>(blocks), .threads = kThreads, .stream = uploader.stream()},
           piece);
  }
}

}  // namespace camelid::cuda
