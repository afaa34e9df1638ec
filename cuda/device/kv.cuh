// How a warp reads keys and values of 16 tokens, and its queries, from shared memory as fragments
// of mma.m16n8k16, for each format of the cache: formats of one byte become bf16 exactly on the
// way. It knows where a piece of 16 bytes of a row lies, so that no two lanes meet in a bank, and
// nothing of pages or softmax.
//
// Scores: queries are A, keys B, the sum runs over dims. Values: probabilities are A, values B, the
// sum runs over tokens. As B, 16 tokens of keys are two tiles of 8 columns; 16 tokens of values are
// one step, and every 8 dims a tile. Which dims a step or a tile means is free as long as queries
// and results agree, so bytes are taken in the order in which lanes can load 16 of them at once.
#pragma once

#include <type_traits>

#include "device/dequant.cuh"
#include "layout/kv_page.h"

namespace camelid::cuda {

constexpr int kStepTokens = 16;  // of the rows that a call reads

// Four bytes as two bf16 pairs: bytes 0 and 2, bytes 1 and 3.
template <KvFormat kFormat>
__device__ __forceinline__ void expand_bytes(std::uint32_t word, std::uint32_t& even,
                                             std::uint32_t& odd) {
  if constexpr (kFormat == KvFormat::kInt8) {
    even = from_int8<0>(word);
    odd = from_int8<1>(word);
  } else {
    // The 4 bits of an e4m3's exponent and the 3 of its mantissa, 4 bits to the right of where they
    // stand in the upper byte, are a bf16 too small by 2^(127 - 7); a subnormal one becomes one.
    // NaN becomes 480: a row that had one says so by its scale.
    constexpr std::uint32_t kUp120 = 0x7b807b80u, kSign = 0x80008000u, kRest = 0x07f007f0u;
    even = multiply_bf16x2(mask_or(word << 4, kRest, word << 8 & kSign), kUp120);
    odd = multiply_bf16x2(mask_or(word >> 4, kRest, word & kSign), kUp120);
  }
}

// Rows of kDim values: 64, 128 or 256. Rows lie at a multiple of 512 bytes of shared memory.
template <KvFormat kFormat, int kDim>
struct KvRows {
  static constexpr bool kBytes = kFormat != KvFormat::kBf16;
  static constexpr int kRowBytes = kBytes ? kDim : kDim * 2;
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kSteps = kDim / 16;  // of scores
  static constexpr int kTiles = kDim / 8;   // of values

  // Where a row's piece of 16 bytes lies.
  //   bf16: load_matrices reads one piece of 8 rows.
  //   Bytes: 8 lanes at a time read pieces 4i to 4i + 3 of rows 2r and 2r + 1 of keys, or pieces 2i
  //   and 2i + 1 of rows 0, 2, 4, 6 or 1, 3, 5, 7 of values. Rows of 64 bytes lie side by side.
  __device__ static constexpr int place(int row, int piece) {
    const int start = kBytes && kDim == 64 ? row / 2 * 128 : row * kRowBytes;
    return start + (piece ^ flipped(row)) * 16;
  }
  // From the address of a piece of row r to that of row r + row, which have no bit in common; a row
  // that is even where two lie side by side.
  __device__ static constexpr unsigned further(unsigned at, int row) {
    return (at ^ static_cast<unsigned>(flipped(row) * 16)) + static_cast<unsigned>(row * kRowBytes);
  }
  // The same of queries, bf16 whatever the format.
  __device__ static constexpr int query_place(int row, int piece) {
    return row * kDim * 2 + (piece ^ (row & 7)) * 16;
  }

  // The A fragment of 16 queries for a step of scores.
  __device__ __forceinline__ static void load_queries(std::uint32_t (&a)[4], unsigned queries,
                                                      int step) {
    const int lane = thread_index() % kWarp;
    if constexpr (!kBytes) {
      load_matrices(a, (queries + query_place(lane % 16, lane / 16)) ^ (step * 32));
    } else {
      // The dims of bytes 0 and 2, then 1 and 3, of the word that each_key_step takes.
      const int piece = lane % 4 * 2 + step / 4 * 8 + step % 4 / 2;
      const unsigned at = queries + query_place(lane / 4, piece) + step % 2 * 8;
      uint2 low, high;
      load_shared(low, at);
      load_shared(high, at + 8 * kDim * 2);
      a[0] = select_bytes(low.x, low.y, 0x5410);
      a[1] = select_bytes(high.x, high.y, 0x5410);
      a[2] = select_bytes(low.x, low.y, 0x7632);
      a[3] = select_bytes(high.x, high.y, 0x7632);
    }
  }

  // Calls f(step, b) for all steps of scores: b[0], b[1] are the fragment of tokens 0 to 7, the
  // others of tokens 8 to 15.
  template <class F>
  __device__ __forceinline__ static void each_key_step(unsigned keys, const F& f) {
    const int lane = thread_index() % kWarp;
    if constexpr (!kBytes) {
      const unsigned row = keys + place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        std::uint32_t b[4];
        load_matrices(b, row ^ (step * 32));
        f(step, b);
      }
    } else {
      // Lane (g, t) takes piece t + 4i of token g: 4 steps of 4 dims, each of them one word.
      const unsigned row = keys + place(lane / 4, lane % 4);
#pragma unroll
      for (int i = 0; i < kSteps / 4; ++i) {
        uint4 low, high;
        load_shared(low, row ^ (i * 64));
        load_shared(high, (row ^ (i * 64)) + 8 * kRowBytes);
        key_step(i * 4, low.x, high.x, f);
        key_step(i * 4 + 1, low.y, high.y, f);
        key_step(i * 4 + 2, low.z, high.z, f);
        key_step(i * 4 + 3, low.w, high.w, f);
      }
    }
  }

  // Calls f(tile, b0, b1) for all tiles of values.
  template <class F>
  __device__ __forceinline__ static void each_value_tile(unsigned values, const F& f) {
    const int lane = thread_index() % kWarp;
    if constexpr (!kBytes) {
      const unsigned row = values + place(lane % 16, lane / 16);
#pragma unroll
      for (int i = 0; i < kTiles / 2; ++i) {
        std::uint32_t b[4];
        load_matrices_transposed(b, row ^ (i * 32));
        f(2 * i, b[0], b[1]);
        f(2 * i + 1, b[2], b[3]);
      }
    } else {
      // Lane (g, t) takes dims from 16g on (8g of 64) of tokens 2t, 2t + 1, 2t + 8 and 2t + 9: each
      // is column g of another tile. Words of two tokens, interleaved, expand to pairs of tokens.
      const int token = lane % 4 * 2, g = lane / 4;
      const int piece = kDim == 64 ? g / 2 : g, within = kDim == 64 ? g % 2 * 8 : 0;
      const unsigned even = values + place(token, piece) + within;
      const unsigned odd = values + place(token + 1, piece) + within;
      using Words = std::conditional_t<kDim == 64, uint2, uint4>;
#pragma unroll
      for (int i = 0; i < divide_up(kDim, 128); ++i) {
        Words words[4];
        load_shared(words[0], even + i * 128);
        load_shared(words[1], odd + i * 128);
        load_shared(words[2], even + i * 128 + 8 * kRowBytes);
        load_shared(words[3], odd + i * 128 + 8 * kRowBytes);
        value_tiles(i * 16, words[0].x, words[1].x, words[2].x, words[3].x, f);
        value_tiles(i * 16 + 4, words[0].y, words[1].y, words[2].y, words[3].y, f);
        if constexpr (kDim != 64) {
          value_tiles(i * 16 + 8, words[0].z, words[1].z, words[2].z, words[3].z, f);
          value_tiles(i * 16 + 12, words[0].w, words[1].w, words[2].w, words[3].w, f);
        }
      }
    }
  }

  // Of two neighbouring tiles of sums (tile even), a lane's four of a row: two at output_dim(tile,
  // 0), two at output_dim(tile, 1), each a dim and the next one. half: 0 for row g, 1 for g + 8.
  __device__ __forceinline__ static float4 quad(const float (&first)[4], const float (&second)[4],
                                                int half) {
    if constexpr (!kBytes) {
      return half == 0 ? float4{first[0], first[1], second[0], second[1]}
                       : float4{first[2], first[3], second[2], second[3]};
    } else {
      return half == 0 ? float4{first[0], second[0], first[1], second[1]}
                       : float4{first[2], second[2], first[3], second[3]};
    }
  }
  __device__ static constexpr int output_dim(int lane, int tile, int pair) {
    if constexpr (!kBytes) {
      return (tile + pair) * 8 + lane % 4 * 2;
    } else {
      const int column = lane % 4 * 2 + pair;
      return kDim == 64 ? column * 8 + tile : tile / 16 * 128 + column * 16 + tile % 16;
    }
  }

 private:
  // Which bits of a piece's number are flipped in a row.
  __device__ static constexpr int flipped(int row) {
    return kBytes ? (row & 6) ^ ((row & 1) << 2) : row & 7;
  }

  template <class F>
  __device__ __forceinline__ static void key_step(int step, std::uint32_t low, std::uint32_t high,
                                                  const F& f) {
    std::uint32_t b[4];
    expand_bytes<kFormat>(low, b[0], b[1]);
    expand_bytes<kFormat>(high, b[2], b[3]);
    f(step, b);
  }

  // Four tiles from 4 dims of 4 tokens.
  template <class F>
  __device__ __forceinline__ static void value_tiles(int tile, std::uint32_t token0,
                                                     std::uint32_t token1, std::uint32_t token8,
                                                     std::uint32_t token9, const F& f) {
    std::uint32_t b0[4], b1[4];
    expand_bytes<kFormat>(select_bytes(token0, token1, 0x5410), b0[0], b0[1]);
    expand_bytes<kFormat>(select_bytes(token8, token9, 0x5410), b1[0], b1[1]);
    expand_bytes<kFormat>(select_bytes(token0, token1, 0x7632), b0[2], b0[3]);
    expand_bytes<kFormat>(select_bytes(token8, token9, 0x7632), b1[2], b1[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) f(tile + i, b0[i], b1[i]);
  }
};

// The instance for a head_dim, padded with zeros to it; 0 where there is none.
CAMELID_HOST_DEVICE constexpr int padded_head_dim(int head_dim) {
  return head_dim <= 0 || head_dim % 8 != 0 || head_dim > 256 ? 0
         : head_dim <= 64                                     ? 64
         : head_dim <= 128                                    ? 128
                                                              : 256;
}

}  // namespace camelid::cuda
