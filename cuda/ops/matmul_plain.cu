// Blocks of 128 tokens x 128 rows, 32 inputs at a time through four slots of shared memory; eight
// warps of 64 x 32 each.
#include "ops/matmul_plain.h"

#include "device/ptx.cuh"
#include "device/swiglu.cuh"
#include "layout/tiles.h"
#include "ops/checks.h"

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

// Copies kSide rows from `input` on: thread i takes a piece of every 64th row from row i / 4 on,
// and rows[k] says where that row starts, null where there is none. Zeros past rows and inputs.
constexpr int kRowsOfThread = kSide * kPieces / kThreads;
using ThreadRows = const std::uint16_t* [kRowsOfThread];
__device__ void load_tile(std::byte* to, const ThreadRows& rows, int input, int inputs,
                          const void* anywhere) {
  const int piece = thread_index() % kPieces;
#pragma unroll
  for (int k = 0; k < kRowsOfThread; ++k) {
    const int row = thread_index() / kPieces + k * (kThreads / kPieces);
    const int left = rows[k] != nullptr ? (inputs - input - piece * 8) * 2 : 0;
    const void* source = left > 0 ? rows[k] + input + piece * 8 : anywhere;
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

// One block's work: tokens (visits) first to first + n - 1 of a group, times kSide rows of w.
struct Job {
  const std::uint16_t* w;
  int first, n;
  int first_row;
};

__device__ bool find_job(const MatmulPlain& call, int number, int n_row_blocks, Job& job) {
  const int index = number / n_row_blocks;
  job.first_row = number % n_row_blocks * kSide;
  if (call.tiles == nullptr) {
    job.w = call.w;
    job.first = index * kSide;
    job.n = call.n_tokens - job.first;
    return job.n > 0;
  }
  if (*call.first_tile + index >= *call.last_tile) return false;
  const TokenTile tile = call.tiles[*call.first_tile + index];
  job.w = call.groups[tile.group];
  job.first = tile.first;
  job.n = tile.n;
  return true;
}

__device__ std::int64_t y_at(const MatmulPlain& call, int visit) {
  return (call.y_rows == nullptr ? visit : call.y_rows[visit]) * std::int64_t{call.y_stride};
}

__device__ void write(const MatmulPlain& call, std::int64_t at, int row, float value) {
  if (row >= call.rows) return;
  if (call.output == Output::kStoreBf16) {
    static_cast<std::uint16_t*>(call.y)[at + row] = to_bf16(value);
    return;
  }
  float* y = static_cast<float*>(call.y) + at + row;
  *y = call.output == Output::kAdd ? *y + value : value;
}

// Rows of 16 from `row` on are 8 gates, then the ups of the same channels.
__device__ void write_swiglu(const MatmulPlain& call, std::int64_t at, int row, float factor,
                             float gate, float up) {
  const int channel = row / kTileRows * (kTileRows / 2) + row % kTileRows;
  if (channel >= call.rows / 2) return;
  static_cast<std::uint16_t*>(call.y)[at + channel] = to_bf16(swiglu(factor * gate, factor * up));
}

// The warp's sums: 64 tokens from `token` on, 32 rows from `row` on.
__device__ void finish(const MatmulPlain& call, const Job& job, const Sums& sums, int token,
                       int row) {
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int m = 0; m < kWarpTokens / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of_tile = token + m * 16 + half * 8 + lane / 4;
      if (of_tile >= job.n) continue;
      const std::int64_t at = y_at(call, job.first + of_tile);
      const float factor = call.factors == nullptr ? 1.0f : call.factors[job.first + of_tile];
#pragma unroll
      for (int n = 0; n < kWarpRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at_row = job.first_row + row + n * 8 + lane % 4 * 2 + i;
          const float value = sums.at[m][n][half * 2 + i];
          if (call.output != Output::kSwiGlu) {
            write(call, at, at_row, value);
          } else if (n % 2 == 0) {
            write_swiglu(call, at, at_row, factor, value, sums.at[m][n + 1][half * 2 + i]);
          }
        }
      }
    }
  }
}

__device__ void run_job(const MatmulPlain& call, const Job& job, int n_w_rows) {
  ThreadRows tokens, rows;
#pragma unroll
  for (int k = 0; k < kRowsOfThread; ++k) {
    const int of_tile = thread_index() / kPieces + k * (kThreads / kPieces);
    const int visit = job.first + of_tile;
    const int row = job.first_row + of_tile;
    tokens[k] = nullptr;
    if (of_tile < job.n) {
      const std::int64_t x_row = call.x_rows == nullptr ? visit : call.x_rows[visit];
      tokens[k] = call.x + x_row * call.x_stride;
    }
    rows[k] = row < n_w_rows ? job.w + std::int64_t{row} * call.w_stride : nullptr;
  }
  const int n_steps = divide_up(call.inputs, kInputs);
  const auto slot = [](int step) { return shared_memory() + step % kSlots * 2 * kTileBytes; };
  const auto load = [&](int step) {
    if (step < n_steps) {
      load_tile(slot(step), tokens, step * kInputs, call.inputs, call.x);
      load_tile(slot(step) + kTileBytes, rows, step * kInputs, call.inputs, call.x);
    }
    commit_copies();
  };
  for (int step = 0; step < kSlots - 1; ++step) load(step);
  const int warp = thread_index() / kWarp;
  const int token = warp % 2 * kWarpTokens, row = warp / 2 * kWarpRows;
  Sums sums = {};
  for (int step = 0; step < n_steps; ++step) {
    wait_copies<kSlots - 2>();
    sync_block();
    load(step + kSlots - 1);
    multiply(sums, slot(step), slot(step) + kTileBytes, token, row);
  }
  finish(call, job, sums, token, row);
}

__global__ void __launch_bounds__(kThreads, 2)
    run_matmul_plain(const __grid_constant__ MatmulPlain call) {
  const bool paired = call.output == Output::kSwiGlu;
  const int n_w_rows = paired ? divide_up(call.rows, kTileRows) * kTileRows : call.rows;
  const int n_row_blocks = divide_up(n_w_rows, kSide);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Job job;
  for (int number = block_index(); find_job(call, number, n_row_blocks, job);
       number += grid_size()) {
    run_job(call, job, n_w_rows);
    sync_block();  // before the next job's copies
  }
}

// ---- choose and launch ----

constexpr const char* kName = "plain matmul";

void check_call(const MatmulPlain& call) {
  if (call.n_tokens < 0 || call.rows <= 0 || call.inputs <= 0) {
    fail(ErrorCode::kInternal, "[cuda] ", kName, ": ", call.n_tokens, " tokens by ", call.rows,
         " x ", call.inputs, " weights; wanted are sizes above 0.");
  }
  check_rows(kName, "x", call.x, call.inputs, call.x_stride);
  // Of many matrices those in device memory are aligned as the first is.
  const bool listed = call.tiles != nullptr;
  check_rows(kName, "w", listed ? call.x : call.w, call.inputs, call.w_stride);
  require(listed == (call.groups != nullptr) &&
              (!listed || (call.first_tile != nullptr && call.last_tile != nullptr)),
          kName, "a list of tiles comes with its ends and the matrices of its groups");
  const bool gated = call.output == Output::kSwiGlu;
  check_output(kName, call.output, call.rows, gated ? RowOrder::kGateUp : RowOrder::kPlain, call.y,
               call.y_stride);
}

}  // namespace

void matmul_plain(const MatmulPlain& call, cudaStream_t stream) {
  if (call.n_tokens == 0) return;
  check_call(call);
  Launch how;
  // How many tiles a list has, only the device knows: two blocks for each multiprocessor share it.
  how.blocks = call.tiles != nullptr
                   ? 2 * multiprocessors()
                   : divide_up(call.n_tokens, kSide) * divide_up(call.rows + kTileRows - 1, kSide);
  how.threads = kThreads;
  how.shared_bytes = kSlots * 2 * kTileBytes;
  how.stream = stream;
  how.overlaps = true;
  launch(kName, run_matmul_plain, how, call);
}

}  // namespace camelid::cuda
