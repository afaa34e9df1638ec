// Blocks of 128 tokens x 128 rows, 32 inputs at a time through four slots of shared memory; eight
// warps of 64 x 32 each.
#include "ops/matmul_plain.h"

#include "device/ptx.cuh"
#include "layout/tiles.h"

namespace camelid::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 128;  // tokens and rows of a block
constexpr int kInputs = 32;
constexpr int kPieces = kInputs / 8;  // of 16 bytes
constexpr int kTileBytes = kSide * kInputs * 2;
constexpr int kSlots = 4;
constexpr int kWarpTokens = 64, kWarpRows = 32;

// Where a row's piece lies, so that load_matrices meets all banks.
__device__ int place_of(int row, int piece) {
  return row * kPieces + (piece ^ (row / 2 % kPieces));
}

// Copies kSide rows of a matrix from row `first` on; zeros past its rows and inputs.
__device__ void load_tile(std::byte* to, const std::uint16_t* from, int stride, int n_rows,
                          int first, int input, int inputs) {
  for (int i = thread_index(); i < kSide * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int left = first + row < n_rows ? (inputs - input - piece * 8) * 2 : 0;
    const std::uint16_t* source =
        left > 0 ? from + std::int64_t{first + row} * stride + input + piece * 8 : from;
    copy_async(to + place_of(row, piece) * 16, source, left < 0 ? 0 : left < 16 ? left : 16);
  }
}

struct Sums {
  float at[kWarpTokens / 16][kWarpRows / 8][4];
};

// The warp's part of the product of a slot: 64 tokens from `token` on, 32 rows from `row` on.
__device__ void multiply(Sums& sums, const std::byte* tokens, const std::byte* rows, int token,
                         int row) {
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int step = 0; step < kInputs / 16; ++step) {
    std::uint32_t b[kWarpRows / 16][4];  // rows 0-7 and 8-15, of each the two halves of 8 inputs
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
      const int r = row + i * 16 + lane / 16 * 8 + lane % 8;
      load_matrices(b[i], rows + place_of(r, step * 2 + lane / 8 % 2) * 16);
    }
#pragma unroll
    for (int m = 0; m < kWarpTokens / 16; ++m) {
      std::uint32_t a[4];  // tokens 0-7 and 8-15 of the first 8 inputs, then of the second
      const int t = token + m * 16 + lane / 8 % 2 * 8 + lane % 8;
      load_matrices(a, tokens + place_of(t, step * 2 + lane / 16) * 16);
#pragma unroll
      for (int n = 0; n < kWarpRows / 8; ++n) {
        mma_bf16(sums.at[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

__device__ void write(const MatmulPlain& call, int token, int row, float value) {
  if (token >= call.n_tokens || row >= call.rows) return;
  const std::int64_t at = std::int64_t{token} * call.y_stride + row;
  if (call.output == Output::kStoreBf16) {
    static_cast<std::uint16_t*>(call.y)[at] =
        static_cast<std::uint16_t>(pack_bf16x2(value, 0.0f) & 0xffffu);
    return;
  }
  float* y = static_cast<float*>(call.y) + at;
  *y = call.output == Output::kAdd ? *y + value : value;
}

__global__ void __launch_bounds__(kThreads, 2) run_matmul_plain(const MatmulPlain call) {
  const int n_row_blocks = divide_up(call.rows, kSide);
  const int first_token = block_index() / n_row_blocks * kSide;
  const int first_row = block_index() % n_row_blocks * kSide;
  const int n_steps = divide_up(call.inputs, kInputs);
  const auto slot = [](int step) { return shared_memory() + step % kSlots * 2 * kTileBytes; };
  const auto load = [&](int step) {
    if (step < n_steps) {
      load_tile(slot(step), call.x, call.x_stride, call.n_tokens, first_token, step * kInputs,
                call.inputs);
      load_tile(slot(step) + kTileBytes, call.w, call.w_stride, call.rows, first_row,
                step * kInputs, call.inputs);
    }
    commit_copies();
  };
  wait_for_previous_kernel();
  for (int step = 0; step < kSlots - 1; ++step) load(step);
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int token = warp % 2 * kWarpTokens, row = warp / 2 * kWarpRows;
  Sums sums = {};
  for (int step = 0; step < n_steps; ++step) {
    wait_copies<kSlots - 2>();
    sync_block();
    load(step + kSlots - 1);
    multiply(sums, slot(step), slot(step) + kTileBytes, token, row);
  }
#pragma unroll
  for (int m = 0; m < kWarpTokens / 16; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        write(call, first_token + token + m * 16 + i / 2 * 8 + lane / 4,
              first_row + row + n * 8 + lane % 4 * 2 + i % 2, sums.at[m][n][i]);
      }
    }
  }
}

}  // namespace

void matmul_plain(const MatmulPlain& call, cudaStream_t stream) {
  if (call.n_tokens == 0) return;
  const auto aligned = [](const void* pointer, int stride) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && stride % 8 == 0;
  };
  if (!aligned(call.x, call.x_stride) || !aligned(call.w, call.w_stride) || call.rows <= 0 ||
      call.inputs <= 0 || call.output == Output::kSwiGlu) {
    fail(ErrorCode::kInternal, "[cuda] plain matmul: ", call.rows, " x ", call.inputs,
         " weights, rows every ", call.w_stride, " values, of x every ", call.x_stride,
         "; wanted are sizes above 0 and rows aligned to 16 bytes.");
  }
  Launch how;
  how.blocks = divide_up(call.n_tokens, kSide) * divide_up(call.rows, kSide);
  how.threads = kThreads;
  how.shared_bytes = kSlots * 2 * kTileBytes;
  how.stream = stream;
  launch("plain matmul", run_matmul_plain, how, call);
}

}  // namespace camelid::cuda
