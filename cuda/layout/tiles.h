// How INT4 and INT8 weights lie in device memory: tiles of 16 rows by 64 inputs in the order in
// which a warp's mma.m16n8k16 (and, four warps side by side, a warpgroup's wgmma) wants them in
// registers. Plain functions that host and device share, so that a test decodes on the CPU what a
// GPU packs.
//
//   tiles   [row tile][k tile of 64]     512 bytes of int4: 32 lanes x 4 words, one per k16 step;
//                                        1024 of int8: 2 x 32 lanes x 4 words, two per k16 step
//   scales  [row tile][chunk of 128][entry][16 rows]
//           kBf16: one bf16 for each row of a chunk; no zero points
//           kPairs: (scale, zero point) as two float32, 1, 2 or 4 entries a chunk
//
// Rows past the matrix and inputs past its width are zeros.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define CAMELID_HOST_DEVICE __host__ __device__
#else
#define CAMELID_HOST_DEVICE
#endif

namespace camelid::cuda {

constexpr int kTileRows = 16;
constexpr int kTileInputs = 64;
constexpr int kStepInputs = 16;
constexpr int kChunkInputs = 128;  // what one scale of the fast kind covers
constexpr int kChunkTiles = kChunkInputs / kTileInputs;

enum class Bits : std::uint8_t { k4, k8 };
enum class Scales : std::uint8_t { kBf16, kPairs };
// kGateUp: rows 0-7 of a tile are gates, rows 8-15 the ups of the same channels, so that both meet
// in one lane.
enum class RowOrder : std::uint8_t { kPlain, kGateUp };

CAMELID_HOST_DEVICE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
CAMELID_HOST_DEVICE constexpr int tile_bytes(Bits bits) { return bits == Bits::k4 ? 512 : 1024; }
CAMELID_HOST_DEVICE constexpr int scale_bytes(Scales scales) {
  return scales == Scales::kBf16 ? 2 : 8;
}

// What kernels need to know of a matrix besides where it lies.
struct TileShape {
  std::int32_t rows = 0;     // as the caller counts them: gates and ups together
  std::int32_t inputs = 0;   // along the sum
  std::int32_t entries = 1;  // scales of a row in a chunk
  Bits bits = Bits::k4;
  Scales scales = Scales::kBf16;
  RowOrder order = RowOrder::kPlain;

  CAMELID_HOST_DEVICE constexpr int n_row_tiles() const {
    return order == RowOrder::kPlain ? divide_up(rows, kTileRows)
                                     : divide_up(rows / 2, kTileRows / 2);
  }
  CAMELID_HOST_DEVICE constexpr int n_chunks() const { return divide_up(inputs, kChunkInputs); }
  CAMELID_HOST_DEVICE constexpr int n_k_tiles() const { return n_chunks() * kChunkTiles; }
  CAMELID_HOST_DEVICE constexpr std::int64_t row_tile_bytes() const {
    return std::int64_t{n_k_tiles()} * tile_bytes(bits);
  }
  CAMELID_HOST_DEVICE constexpr int chunk_scale_bytes() const {  // of one row tile
    return entries * kTileRows * scale_bytes(scales);
  }
  CAMELID_HOST_DEVICE constexpr std::int64_t row_tile_scale_bytes() const {
    return std::int64_t{n_chunks()} * chunk_scale_bytes();
  }
  CAMELID_HOST_DEVICE constexpr std::int64_t bytes() const {
    return n_row_tiles() * row_tile_bytes();
  }
  CAMELID_HOST_DEVICE constexpr std::int64_t all_scale_bytes() const {
    return n_row_tiles() * row_tile_scale_bytes();
  }
};

// Where a matrix lies in device memory; aligned to 16 bytes.
struct TilePointers {
  const std::byte* tiles = nullptr;
  const std::byte* scales = nullptr;
};

struct TiledMatrix {
  TileShape shape;
  TilePointers at;
};

// The row of the source that lies in row r of a row tile; may lie past the matrix.
CAMELID_HOST_DEVICE constexpr int source_row(const TileShape& shape, int row_tile, int r) {
  if (shape.order == RowOrder::kPlain) return row_tile * kTileRows + r;
  const int half = kTileRows / 2;
  const int channel = row_tile * half + r % half;
  if (channel >= shape.rows / 2) return shape.rows;
  return r < half ? channel : shape.rows / 2 + channel;
}

// ---- one 32-bit word of a tile ----
// a[i] of the fragment of step `step` holds rows g and g + 8 (i odd) at two neighbouring inputs.

CAMELID_HOST_DEVICE constexpr int fragment_row(int lane, int i) { return lane / 4 + 8 * (i % 2); }
// The first of two neighbouring inputs of the tile.
CAMELID_HOST_DEVICE constexpr int fragment_input(int lane, int step, int i) {
  return step * kStepInputs + i / 2 * 8 + lane % 4 * 2;
}

// Byte offset in a tile of the word that holds a[i] of a step.
CAMELID_HOST_DEVICE constexpr int word_offset(Bits bits, int lane, int step, int i) {
  if (bits == Bits::k4) return lane * 16 + step * 4;
  return step / 2 * 512 + lane * 16 + step % 2 * 8 + i / 2 * 4;
}
// The first value's lowest bit in its word; the second's is 16 further. So a shift and a mask leave
// both values at the feet of a bf16 pair.
CAMELID_HOST_DEVICE constexpr int word_shift(Bits bits, int i) {
  return bits == Bits::k4 ? 4 * i : 8 * (i % 2);
}

// The word at `index` (in words) of the tile: get(row of tile, input of tile) gives a value's bits,
// offset-binary for int4 (q + 8), two's complement for int8.
template <typename Get>
CAMELID_HOST_DEVICE constexpr std::uint32_t make_word(Bits bits, int index, const Get& get) {
  std::uint32_t word = 0;
  const int lane = bits == Bits::k4 ? index / 4 : index % 128 / 4;
  const int step = bits == Bits::k4 ? index % 4 : index / 128 * 2 + index % 4 / 2;
  const int first = bits == Bits::k4 ? 0 : index % 2 * 2;
  const int n = bits == Bits::k4 ? 4 : 2;
  for (int i = first; i < first + n; ++i) {
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t value = get(fragment_row(lane, i), fragment_input(lane, step, i) + half);
      word |= value << (word_shift(bits, i) + 16 * half);
    }
  }
  return word;
}

// The value of a matrix's row and input as its tiles hold it.
CAMELID_HOST_DEVICE inline int tiled_value(const TiledMatrix& w, int row_tile, int r, int input) {
  const int k = input % kTileInputs;
  const int lane = r % 8 * 4 + k % 8 / 2;
  const int step = k / kStepInputs;
  const int i = r / 8 + k % kStepInputs / 8 * 2;
  const std::byte* tile = w.at.tiles + row_tile * w.shape.row_tile_bytes() +
                          std::int64_t{input / kTileInputs} * tile_bytes(w.shape.bits);
  const std::byte* at = tile + word_offset(w.shape.bits, lane, step, i);
  const auto word = *reinterpret_cast<const std::uint32_t*>(at);
  const std::uint32_t value = word >> (word_shift(w.shape.bits, i) + 16 * (k % 2));
  return w.shape.bits == Bits::k4 ? static_cast<int>(value & 15u) - 8
                                  : static_cast<int>(static_cast<std::int8_t>(value & 255u));
}

}  // namespace camelid::cuda
