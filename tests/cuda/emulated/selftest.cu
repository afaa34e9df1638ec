// Small kernels that test_emulator.py holds the emulator to: right ones, and ones with the mistakes
// that it must catch. Nothing here is part of the engine.

#include "../case.h"
#include "device/launch.cuh"
#include "device/memory.h"
#include "device/ptx.cuh"

namespace camelid::cuda {
namespace {

// ---- a matrix product: y[m, n] f32 = x[m, k] bf16 * w[n, k] bf16, tiles of 64 x 64 x 32 ----

enum Bug { kNoBug, kNoWait, kNoSyncBefore, kNoSyncAfter };

constexpr int kTile = 64;
constexpr int kDepth = 32;               // of a tile, in bf16
constexpr int kStride = kDepth + 8;      // elements; rows stay aligned to 16 bytes
constexpr int kStage = kTile * kStride;  // elements of one operand's stage
constexpr int kStages = 2;
constexpr std::size_t kMatmulBytes = std::size_t{2} * kStages * kStage * 2;

struct MatmulArguments {
  float* y;
  const std::uint16_t* x;
  const std::uint16_t* w;
  int m, n, k;
};

__device__ void start_stage(std::uint16_t* stage, const std::uint16_t* from, int k) {
  const int row = thread_index() / 4, column = thread_index() % 4 * 8;
  copy_async(stage + row * kStride + column, from + row * k + column, 16);
}

__device__ std::uint32_t pair_at(const std::uint16_t* tile, int row, int column) {
  return *reinterpret_cast<const std::uint32_t*>(tile + row * kStride + column);
}

template <Bug kBug>
__global__ void __launch_bounds__(256) matmul(const __grid_constant__ MatmulArguments arguments) {
  auto* x_stages = reinterpret_cast<std::uint16_t*>(shared_memory());
  std::uint16_t* w_stages = x_stages + kStages * kStage;
  const int warp = thread_index() / kWarp, g = thread_index() % kWarp / 4, t = thread_index() % 4;
  const int k = arguments.k, n_steps = k / kDepth;
  const int tiles_across = arguments.n / kTile, n_tiles = arguments.m / kTile * tiles_across;
  // A warp owns 16 rows and 32 columns of the tile.
  const int row = warp % 4 * 16, column = warp / 4 * 32;

  for (int tile = block_index(); tile < n_tiles; tile += grid_size()) {
    const std::uint16_t* x = arguments.x + tile / tiles_across * kTile * k;
    const std::uint16_t* w = arguments.w + tile % tiles_across * kTile * k;
    float sums[4][4] = {};
    start_stage(x_stages, x, k);
    start_stage(w_stages, w, k);
    commit_copies();
    for (int step = 0; step < n_steps; ++step) {
      if (step + 1 < n_steps) {
        const int next = (step + 1) % kStages * kStage;
        start_stage(x_stages + next, x + (step + 1) * kDepth, k);
        start_stage(w_stages + next, w + (step + 1) * kDepth, k);
      }
      commit_copies();
      if (kBug != kNoWait) wait_copies<1>();
      if (kBug != kNoSyncBefore) sync_block();
      const std::uint16_t* a_tile = x_stages + step % kStages * kStage;
      const std::uint16_t* b_tile = w_stages + step % kStages * kStage;
      for (int i = 0; i < kDepth; i += 16) {
        const std::uint32_t a[4] = {
            pair_at(a_tile, row + g, i + 2 * t), pair_at(a_tile, row + g + 8, i + 2 * t),
            pair_at(a_tile, row + g, i + 2 * t + 8), pair_at(a_tile, row + g + 8, i + 2 * t + 8)};
        for (int part = 0; part < 4; ++part) {
          const int output = column + part * 8 + g;
          mma_bf16(sums[part], a, pair_at(b_tile, output, i + 2 * t),
                   pair_at(b_tile, output, i + 2 * t + 8));
        }
      }
      if (kBug != kNoSyncAfter) sync_block();
    }
    float* y =
        arguments.y + tile / tiles_across * kTile * arguments.n + tile % tiles_across * kTile;
    for (int part = 0; part < 4; ++part) {
      for (int i = 0; i < 4; ++i) {
        y[(row + g + i / 2 * 8) * arguments.n + column + part * 8 + 2 * t + i % 2] = sums[part][i];
      }
    }
  }
}

// ---- meetings ----

__global__ void exchange(int* from_next, float* sums) {
  const int thread = thread_index(), lane = thread % kWarp;
  from_next[thread] = shuffle(thread, lane + 1);
  float sum = static_cast<float>(thread);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  sums[thread] = sum;
}

// Row i of four 8 x 8 matrices is at 16 i bytes; y: [lane][4] pairs.
template <bool kTransposed>
__global__ void load_fragments(const std::uint16_t* x, std::uint32_t* y) {
  auto* rows = reinterpret_cast<std::uint16_t*>(shared_memory());
  for (int i = 0; i < 8; ++i) rows[thread_index() * 8 + i] = x[thread_index() * 8 + i];
  sync_warp();
  std::uint32_t r[4];
  if (kTransposed) {
    load_matrices_transposed(r, shared_address(rows + thread_index() * 8));
  } else {
    load_matrices(r, rows + thread_index() * 8);
  }
  for (int i = 0; i < 4; ++i) y[thread_index() * 4 + i] = r[i];
}

__global__ void shuffle_by_half() {
  if (thread_index() % kWarp < 16) shuffle(1, 0);
}
__global__ void shuffle_at_two_places() {
  if (thread_index() % 2) {
    shuffle(1, 0);
  } else {
    shuffle(2, 0);
  }
}
__global__ void shuffle_without_some(int n_leave) {
  if (thread_index() < n_leave) return;
  sync_block();
  shuffle(1, 0);
}
__global__ void sync_block_by_some() {
  if (thread_index() < 40) {
    sync_block();
  } else {
    sync_warp();
    if (thread_index() >= 64) sync_block();
    shuffle(1, 0);
  }
}
__global__ void meet_across_warps() {
  if (thread_index() < kWarp) sync_block();
}

// Each thread passes a value to its mirror image.
template <bool kSync>
__global__ void reverse(int* y) {
  int* values = reinterpret_cast<int*>(shared_memory());
  values[thread_index()] = thread_index();
  if (kSync) sync_block();
  y[thread_index()] = values[block_size() - 1 - thread_index()];
}

struct Numbers {
  int n[64];
};

// Thread 0 tells where its parameters are, and ends before others look.
__global__ void tell_address(const __grid_constant__ Numbers numbers, int* y) {
  auto** told = reinterpret_cast<const Numbers**>(shared_memory());
  if (thread_index() == 0) *told = &numbers;
  sync_block();
  if (thread_index() == 0) return;
  sync_block();
  y[thread_index()] = (*told)->n[thread_index()];
}

// ---- copies ----

// Two copies to 32 bytes of each thread, one after the other. y: [thread][32] bytes before either
// is waited for, then [thread][32] after the first was waited for, then after both.
__global__ void copy_and_look(const std::uint8_t* x, std::uint8_t* y, int n_bytes) {
  std::uint8_t* mine = reinterpret_cast<std::uint8_t*>(shared_memory()) + thread_index() * 32;
  const auto look = [&](int time) {
    for (int i = 0; i < 32; ++i) y[(time * block_size() + thread_index()) * 32 + i] = mine[i];
  };
  copy_async(mine, x + thread_index() * 32, n_bytes);
  commit_copies();
  copy_async(shared_address(mine + 16), x + thread_index() * 32 + 16);
  commit_copies();
  wait_copies<2>();
  look(0);
  wait_copies<1>();
  look(1);
  wait_copies<0>();
  look(2);
}

__global__ void copy_between(const std::byte* x, int from, int to, int n_bytes) {
  copy_async(shared_memory() + to, x + from, n_bytes);
}

// ---- memory ----

__global__ void write_shared(int offset) { shared_memory()[offset] = std::byte{1}; }
__global__ void write_device(std::byte* memory, int offset) { memory[offset] = std::byte{1}; }
__global__ void read_shared(std::byte* y, int n_bytes) {
  for (int i = 0; i < n_bytes; ++i) y[i] = shared_memory()[i];
}

// ---- blocks ----

// The last thread to come opens the barrier for all blocks; each then sees what all wrote.
__global__ void grid_barrier(unsigned* state, int* values, int* sums) {
  unsigned* came = state;
  unsigned* open = state + 1;
  if (thread_index() == 0) {
    values[block_index()] = block_index() + 1;
    fence_blocks();
    const unsigned before = add_atomic(came, 1);
    fence_blocks();
    if (before == static_cast<unsigned>(grid_size()) - 1) add_atomic(open, 1);
    while (load_acquire(open) == 0) {
    }
  }
  sync_block();
  int sum = 0;
  for (int i = 0; i < grid_size(); ++i) sum += values[i];
  if (thread_index() == 0) sums[block_index()] = sum;
}

__global__ void log_order(unsigned* n_came, int* order) {
  order[add_atomic(n_came, 1)] = block_index();
}

// Tells others before the value is there.
__global__ void flag_too_early(unsigned* flag, int* value, int* seen) {
  if (block_index() == 0) {
    fence_blocks();
    add_atomic(flag, 1);
    *value = 7;
  } else {
    while (load_acquire(flag) == 0) {
    }
    *seen = *value;
  }
}

// ---- accesses that need an order ----

// The last block to come adds up what all wrote. Steps that are not in `steps` are left out; 16 has
// all threads fence before they meet, which is not the same as one after it.
__global__ void hand_over(int steps, int* values, unsigned* n_came, int* sums) {
  auto* before = reinterpret_cast<unsigned*>(shared_memory());
  values[block_index() * block_size() + thread_index()] = block_index() + thread_index();
  if (steps & 16) fence_blocks();
  if (steps & 4) sync_block();
  if (thread_index() == 0) {
    if (steps & 1) fence_blocks();
    *before = add_atomic(n_came, 1);
    if (steps & 2) fence_blocks();
  }
  if (steps & 8) sync_block();
  if (*before != static_cast<unsigned>(grid_size()) - 1) return;
  int sum = 0;
  for (int i = 0; i < grid_size(); ++i) sum += values[i * block_size() + thread_index()];
  sums[thread_index()] = sum;
}

__global__ void read_at(const std::byte* x, int offset, float* y) {
  *y = *reinterpret_cast<const float*>(x + offset);
}
__global__ void read_four_at(const std::byte* x, int offset, float4* y) {
  *y = *reinterpret_cast<const float4*>(x + offset);
}

__global__ void undefined(int kind, int value, int* y) {
  const int four[4] = {value, 1, 2, 3};
  if (kind == 0) *y = four[value];
  if (kind == 1) *y = 1 << value;
  if (kind == 2) *y = value + 1;
  if (kind == 3) *y = value * value;
  if (kind == 4) *y = 1 / value;
  if (kind == 5) *y = static_cast<int>(4.0f * static_cast<float>(value));
}

template <bool kSync>
__global__ void neighbour(int* y) {
  int* values = reinterpret_cast<int*>(shared_memory());
  values[thread_index()] = thread_index();
  if (kSync) {
    sync_warp();
  } else {
    shuffle(0, 0);
  }
  y[thread_index()] = values[(thread_index() + 1) % kWarp];
}

__global__ void write_by_blocks(std::uint8_t* y, int stride) { y[block_index() * stride] = 1; }

}  // namespace
}  // namespace camelid::cuda

using namespace camelid::cuda;

extern "C" {

int test_matmul(int bug, float* y, const std::uint16_t* x, const std::uint16_t* w, int m, int n,
                int k) {
  constexpr decltype(&matmul<kNoBug>) kKernels[] = {matmul<kNoBug>, matmul<kNoWait>,
                                                    matmul<kNoSyncBefore>, matmul<kNoSyncAfter>};
  return caught([&] {
    launch("matmul", kKernels[bug], {.blocks = 5, .threads = 256, .shared_bytes = kMatmulBytes},
           MatmulArguments{y, x, w, m, n, k});
  });
}

int test_exchange(int n_threads, int* from_next, float* sums) {
  return caught([&] { launch("exchange", exchange, {.threads = n_threads}, from_next, sums); });
}
// Of 100 bytes of device memory, from `offset` on: a copy from there, one to there, or a fill.
int test_host_copy(int which, int offset, int bytes) {
  return caught([&] {
    const DeviceMemory memory = allocate_device(100);
    const PinnedMemory host = allocate_pinned(1 << 10);
    std::memset(host.get(), 0, 1 << 10);
    std::byte* const at = memory.get() + offset;
    if (which == 0) copy_to_host(host.get(), at, static_cast<std::size_t>(bytes), nullptr);
    if (which == 1) copy_to_device(at, host.get(), static_cast<std::size_t>(bytes), nullptr);
    if (which == 2) fill_zeros(at, static_cast<std::size_t>(bytes), nullptr);
    finish(nullptr);
  });
}
int test_load_fragments(int transposed, const std::uint16_t* x, std::uint32_t* y) {
  return caught([&] {
    launch("load", transposed ? load_fragments<true> : load_fragments<false>, {.shared_bytes = 512},
           x, y);
  });
}
int test_shuffle_by_half() {
  return caught([] { launch("by_half", shuffle_by_half, {.blocks = 3, .threads = 64}); });
}
int test_shuffle_at_two_places() {
  return caught([] { launch("two_places", shuffle_at_two_places, {.threads = 64}); });
}
int test_shuffle_without_some(int n_leave) {
  return caught([&] { launch("without_some", shuffle_without_some, {.threads = 32}, n_leave); });
}
int test_sync_block_by_some() {
  return caught([] { launch("by_some", sync_block_by_some, {.threads = 96}); });
}
int test_meet_across_warps() {
  return caught([] { launch("across", meet_across_warps, {.threads = 96}); });
}
int test_reverse(int sync, int* y) {
  return caught([&] {
    launch("reverse", sync ? reverse<true> : reverse<false>,
           {.threads = 128, .shared_bytes = 128 * sizeof(int)}, y);
  });
}

int test_tell_address(int* y) {
  Numbers numbers;
  for (int i = 0; i < 64; ++i) numbers.n[i] = i;
  return caught([&] {
    launch("tell", tell_address, {.threads = 64, .shared_bytes = sizeof(void*)}, numbers, y);
  });
}

int test_copy_and_look(const std::uint8_t* x, std::uint8_t* y, int n_bytes) {
  return caught([&] {
    launch("look", copy_and_look, {.threads = 64, .shared_bytes = 64 * 32}, x, y, n_bytes);
  });
}
int test_copy_between(const std::byte* x, int from, int to, int n_bytes) {
  return caught([&] {
    launch("copy", copy_between, {.threads = 1, .shared_bytes = 64}, x, from, to, n_bytes);
  });
}

int test_write_shared(int n_bytes, int offset) {
  return caught([&] {
    launch("write", write_shared,
           {.blocks = 2, .threads = 1, .shared_bytes = static_cast<std::size_t>(n_bytes)}, offset);
  });
}
int test_write_device(std::byte* memory, int offset) {
  return caught([&] { launch("write", write_device, {.threads = 1}, memory, offset); });
}
int test_read_shared(std::byte* y, int n_bytes) {
  return caught([&] {
    launch("read", read_shared, {.threads = 1, .shared_bytes = static_cast<std::size_t>(n_bytes)},
           y, n_bytes);
  });
}
int test_launch(int blocks, int threads, int shared_bytes, int together) {
  return caught([&] {
    const auto nothing = [](int) {};
    void (*kernel)(int) = nothing;
    launch("nothing", kernel,
           {.blocks = blocks,
            .threads = threads,
            .shared_bytes = static_cast<std::size_t>(shared_bytes),
            .together = together != 0},
           1);
  });
}
int test_blocks_that_fit(int threads, int shared_bytes) {
  return multiprocessors() *
         blocks_that_fit(meet_across_warps, threads, static_cast<std::size_t>(shared_bytes));
}

int test_grid_barrier(int n_blocks, int together, unsigned* state, int* values, int* sums) {
  return caught([&] {
    launch("barrier", grid_barrier, {.blocks = n_blocks, .threads = 64, .together = together != 0},
           state, values, sums);
  });
}
int test_log_order(int n_blocks, unsigned* n_came, int* order) {
  return caught(
      [&] { launch("order", log_order, {.blocks = n_blocks, .threads = 1}, n_came, order); });
}
int test_flag_too_early(unsigned* flag, int* value, int* seen) {
  return caught([&] {
    launch("flag", flag_too_early, {.blocks = 2, .threads = 1, .together = true}, flag, value,
           seen);
  });
}

int test_hand_over(int steps, int* values, unsigned* n_came, int* sums) {
  return caught([&] {
    launch("hand_over", hand_over, {.blocks = 6, .threads = 64, .shared_bytes = 4}, steps, values,
           n_came, sums);
  });
}
int test_read_at(const std::byte* x, int offset, float* y) {
  return caught([&] { launch("read_at", read_at, {.threads = 1}, x, offset, y); });
}
int test_read_four_at(const std::byte* x, int offset, float4* y) {
  return caught([&] { launch("read_four_at", read_four_at, {.threads = 1}, x, offset, y); });
}
int test_undefined(int kind, int value, int* y) {
  return caught([&] { launch("undefined", undefined, {.threads = 1}, kind, value, y); });
}
int test_neighbour(int sync, int* y) {
  return caught([&] {
    launch("neighbour", sync ? neighbour<true> : neighbour<false>, {.shared_bytes = 128}, y);
  });
}
int test_write_by_blocks(std::uint8_t* y, int stride) {
  return caught(
      [&] { launch("by_blocks", write_by_blocks, {.blocks = 4, .threads = 1}, y, stride); });
}
}
