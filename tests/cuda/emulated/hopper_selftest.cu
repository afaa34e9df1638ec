// Kernels that use each name of cuda/sm90/hopper.cuh, right or with one mistake, for tests of its
// twin.
#include <cstdint>

#include "../case.h"
#include "layout/tiles.h"
#include "sm90/hopper.cuh"

namespace camelid::cuda {
namespace {

enum Bug : int {
  kNone,
  kNoStart,        // of products
  kNotShown,       // what copies wrote
  kNoWait,         // for products, before their sums are read
  kEarlyFragment,  // changes a while a product runs
  kNoBarrier,      // reads what may not be there
  kEarlyRelease,   // lets the slot be filled while products read it
};

constexpr int kSlots = 2;
constexpr int kMostSteps = 4;  // of columns_kernel

struct Case {
  Bug bug;
  const std::uint16_t* a;  // [n_steps][64][16] bf16
  const std::uint16_t* b;  // [n_steps][columns][64] bf16, of which 16 at `offset` are multiplied
  float* d;                // [64][columns]
  int n_steps;
  int offset;
};

template <int kColumns>
__device__ void produce(const Case& c, std::byte* slots, Barrier* full, Barrier* empty) {
  const int lane = thread_index() % kWarp;
  for (int step = 0; step < c.n_steps; ++step) {
    wait_barrier(empty + step % kSlots, step / kSlots % 2 ^ 1);
    for (int piece = lane; piece < kColumns * 8; piece += kWarp) {
      const int row = piece / 8;
      copy_async(slots + step % kSlots * kColumns * 128 + row * 128 + (piece % 8 ^ row % 8) * 16,
                 c.b + (std::int64_t{step} * kColumns + row) * 64 + piece % 8 * 8, 16);
    }
    arrive_when_copied(full + step % kSlots);
  }
}

template <int kColumns>
__device__ void consume(const Case& c, std::byte* slots, Barrier* full, Barrier* empty) {
  const int warp = thread_index() / kWarp, g = thread_index() % kWarp / 4, t = thread_index() % 4;
  float d[kColumns / 2] = {};
  std::uint32_t a[2][4];
  for (int step = 0; step < c.n_steps; ++step) {
    std::byte* slot = slots + step % kSlots * kColumns * 128;
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + g + i % 2 * 8, k = 2 * t + i / 2 * 8;
      const auto* pair = c.a + (step * 64 + row) * 16 + k;
      a[step % 2][i] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
    }
    if (c.bug != kNoBarrier) wait_barrier(full + step % kSlots, step / kSlots % 2);
    if (c.bug != kNotShown) show_to_products();
    if (c.bug != kNoStart) start_products();
    multiply_async<kColumns>(d, a[step % 2], advance(describe_rows(slot), c.offset * 2), step > 0);
    commit_products();
    if (c.bug == kEarlyFragment) a[step % 2][0] = 0;
    if (c.bug == kEarlyRelease) arrive(empty + step % kSlots);
    if (c.bug != kNoWait) wait_products<0>();
    if (c.bug != kEarlyRelease) arrive(empty + step % kSlots);
  }
  hold(d);
  sync_some(1, kWarpgroup);
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = warp * 16 + g + i / 2 % 2 * 8;
    c.d[row * kColumns + i / 4 * 8 + 2 * t + i % 2] = d[i];
  }
  wait_products<0>();
}

template <int kColumns>
__global__ void products_kernel(const Case c) {
  std::byte* slots = shared_memory();
  auto* full = reinterpret_cast<Barrier*>(slots + kSlots * kColumns * 128);
  Barrier* empty = full + kSlots;
  if (thread_index() == 0) {
    for (int i = 0; i < kSlots; ++i) {
      init_barrier(full + i, kWarp);
      init_barrier(empty + i, kWarpgroup);
    }
  }
  sync_block();
  if (thread_index() >= kWarpgroup) {
    give_registers<40>();
    produce<kColumns>(c, slots, full, empty);
  } else {
    take_registers<232>();
    consume<kColumns>(c, slots, full, empty);
  }
}

// d[64 x kColumns] = a[64 x 16 n_steps] b[16 n_steps x kColumns], b as it is: a row for each input.
template <int kColumns>
__global__ void columns_kernel(const Case c) {
  const int warp = thread_index() / kWarp, g = thread_index() % kWarp / 4, t = thread_index() % 4;
  const int n_inputs = c.n_steps * 16, panel_bytes = divide_up(n_inputs, 8) * 1024;
  for (int at = thread_index(); at < n_inputs * kColumns / 8; at += kWarpgroup) {
    const int input = at / (kColumns / 8), piece = at % (kColumns / 8);
    copy_async(
        shared_memory() + piece / 8 * panel_bytes + input * 128 + (piece % 8 ^ input % 8) * 16,
        c.b + at * 8, 16);
  }
  commit_copies();
  wait_copies<0>();
  sync_block();
  float d[kColumns / 2];
  std::uint32_t a[kMostSteps][4];
  for (int step = 0; step < c.n_steps; ++step) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + g + i % 2 * 8, k = 2 * t + i / 2 * 8;
      const auto* pair = c.a + (step * 64 + row) * 16 + k;
      a[step][i] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
    }
  }
  show_to_products();
  start_products();
  const Rows b = describe_columns(shared_memory(), panel_bytes);
#pragma unroll
  for (int step = 0; step < kMostSteps; ++step) {
    if (step < c.n_steps) {
      multiply_columns_async<kColumns>(d, a[step], advance(b, step * 2048), step > 0);
    }
  }
  commit_products();
  wait_products<0>();
  hold(d);
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = warp * 16 + g + i / 2 % 2 * 8;
    c.d[row * kColumns + i / 4 * 8 + 2 * t + i % 2] = d[i];
  }
}

__global__ void barrier_kernel(int arrivals) {
  auto* barrier = reinterpret_cast<Barrier*>(shared_memory());
  if (thread_index() == 0) init_barrier(barrier, arrivals);
  sync_block();
  arrive(barrier);
  wait_barrier(barrier, 0);
}

}  // namespace
}  // namespace camelid::cuda

using namespace camelid::cuda;

extern "C" {

int test_products(int columns, int bug, const std::uint16_t* a, const std::uint16_t* b, float* d,
                  int n_steps, int offset) {
  return caught([&] {
    const Case c{static_cast<Bug>(bug), a, b, d, n_steps, offset};
    Launch how;
    how.threads = kWarpgroup + kWarp;
    how.shared_bytes = static_cast<std::size_t>(kSlots * columns * 128 + 4 * kSlots * 4);
    const auto kernel = columns == 64    ? products_kernel<64>
                        : columns == 128 ? products_kernel<128>
                                         : products_kernel<256>;
    launch("products", kernel, how, c);
  });
}

// b: [n_steps * 16][columns]
int test_columns(int columns, const std::uint16_t* a, const std::uint16_t* b, float* d,
                 int n_steps) {
  return caught([&] {
    const Case c{kNone, a, b, d, n_steps, 0};
    Launch how;
    how.threads = kWarpgroup;
    how.shared_bytes = static_cast<std::size_t>(n_steps * 2048 * columns / 64);
    const auto kernel = columns == 64    ? columns_kernel<64>
                        : columns == 128 ? columns_kernel<128>
                                         : columns_kernel<256>;
    launch("columns", kernel, how, c);
  });
}

int test_barrier(int threads, int arrivals) {
  return caught([&] {
    Launch how;
    how.threads = threads;
    how.shared_bytes = 8;
    launch("barrier", barrier_kernel, how, arrivals);
  });
}

}  // extern "C"
