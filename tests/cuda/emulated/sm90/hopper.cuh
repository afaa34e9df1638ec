// The twin of cuda/sm90/hopper.cuh on the CPU. A product may be executed at once or only when it is
// waited for, with the registers and the shared memory of that moment; and an arrival that waits
// for copies comes when somebody needs it. Registers are counted, not used.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/ptx.cuh"

namespace camelid::cuda {

constexpr int kWarpgroup = 128;

// ---- barriers in shared memory ----

using Barrier = std::uint64_t;

namespace emulated {

inline BarrierState& state_of(const Barrier* barrier, const Where& where) {
  auto& barriers = current->block->barriers;
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail_here(where, "a barrier that was never initialised");
  return found->second;
}

inline void arrive_at(BarrierState& state, Fiber& fiber) {
  tell(&state.phases, fiber);
  if (++state.came < state.expected) return;
  state.came = 0;
  ++state.phases;
}

// Waits, others first, until done(); somebody's late arrival is made to come at each look.
template <typename Done>
void look_until(BarrierState& state, const Where& where, const Done& done) {
  while (load(&state.phases, where), !done()) {
    if (state.late.empty()) continue;
    const BarrierState::Late late = state.late.front();
    state.late.erase(state.late.begin());
    finish_copies_of(*late.by, late.copies);
    arrive_at(state, *late.by);
  }
}

}  // namespace emulated

inline void init_barrier(Barrier* barrier, int arrivals,
                         emulated::Where where = emulated::Where::current()) {
  if (!emulated::current->block->shared.holds(barrier, sizeof *barrier) ||
      reinterpret_cast<std::uintptr_t>(barrier) % sizeof *barrier != 0) {
    emulated::fail_here(where, "init_barrier needs 8 aligned bytes of shared memory");
  }
  *barrier = 0;
  emulated::current->block->barriers[barrier].expected = arrivals;
}

inline void arrive(Barrier* barrier, emulated::Where where = emulated::Where::current()) {
  emulated::BarrierState& state = emulated::state_of(barrier, where);
  emulated::arrive_at(state, *emulated::current);
  emulated::let_go("arrive", where);
}

// Uses the groups of commit_copies(): a thread has either those or this.
inline void arrive_when_copied(Barrier* barrier,
                               emulated::Where where = emulated::Where::current()) {
  emulated::Fiber& me = *emulated::current;
  emulated::BarrierState& state = emulated::state_of(barrier, where);
  ++me.open_group;
  if (!emulated::happens_now()) {
    state.late.push_back({&me, me.open_group});
    return;
  }
  emulated::finish_copies_of(me, me.open_group);
  emulated::arrive_at(state, me);
}

inline void wait_barrier(Barrier* barrier, unsigned parity,
                         emulated::Where where = emulated::Where::current()) {
  emulated::BarrierState& state = emulated::state_of(barrier, where);
  if (parity > 1) emulated::fail_here(where, "a parity that is neither 0 nor 1");
  emulated::look_until(state, where, [&] { return (state.phases & 1) != parity; });
  emulated::current->shown = false;
}

inline void wait_signal(Barrier* barrier, unsigned parity,
                        emulated::Where where = emulated::Where::current()) {
  const bool shown = emulated::current->shown;
  wait_barrier(barrier, parity, where);
  emulated::current->shown = shown;
}

// ---- products of a warpgroup ----

inline void show_to_products() { emulated::current->shown = true; }

using Rows = std::uint32_t;
inline Rows describe_rows(const void* shared, emulated::Where where = emulated::Where::current()) {
  const unsigned address = shared_address(shared, where);
  if (address % 1024 != 0) emulated::fail_here(where, "swizzled rows must begin at 1024 bytes");
  return address >> 4;
}
inline Rows advance(Rows rows, int n_bytes) { return rows + static_cast<Rows>(n_bytes / 16); }

inline Rows describe_columns(const void* shared, int panel_bytes,
                             emulated::Where where = emulated::Where::current()) {
  if (panel_bytes % 1024 != 0 || panel_bytes >= 1 << 18) {
    emulated::fail_here(where, "panels must be multiples of 1024 bytes apart");
  }
  return describe_rows(shared, where) | static_cast<Rows>(panel_bytes / 16) << 16;
}

namespace emulated {

// b[column][k] of a product: the swizzle is a function of address bits, 4-6 ^= 7-9.
inline void read_rows(float* b, const Product& product) {
  const std::byte* shared = current->block->shared.data();
  const unsigned first = ((product.rows & 0x3fff) << 4) - kSharedBase;
  const unsigned panel_bytes = (product.rows >> 16) << 4;
  for (unsigned column = 0; column < static_cast<unsigned>(product.columns); ++column) {
    for (unsigned k = 0; k < 16; ++k) {
      unsigned at =
          first + (product.by_inputs ? column / 64 * panel_bytes + k * 128 + column % 64 * 2
                                     : column * 128 + k * 2);
      at ^= (at >> 7 & 7) << 4;
      std::uint16_t bits;
      std::memcpy(&bits, shared + at, sizeof bits);
      b[column * 16 + k] = low_bf16(bits);
    }
  }
}

// A warp's part of one product: mine[lane] is its first unexecuted one.
inline void execute(Product* const* mine) {
  const int columns = mine[0]->columns;
  float a[16][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = low_bf16(mine[lane]->a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high_bf16(mine[lane]->a[i]);
    }
  }
  float b[256 * 16];
  read_rows(b, *mine[0]);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = mine[lane]->add ? mine[lane]->d[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column * 16 + k];
      mine[lane]->d[i] = sum;
    }
  }
}

// Executes a warp's products of the groups before `group`.
inline void execute_before(void* const* lanes, int group) {
  Fiber* fibers[kLanes];
  for (int i = 0; i < kLanes; ++i) fibers[i] = static_cast<Fiber*>(lanes[i]);
  const std::size_t n = fibers[0]->products.size();
  std::size_t done = 0;
  for (; done < n && fibers[0]->products[done].group < group; ++done) {
    Product* mine[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      mine[i] = &fibers[i]->products.at(done);
      if (mine[i]->rows != mine[0]->rows || mine[i]->add != mine[0]->add) {
        fail(ErrorCode::kInternal, "[cuda] lanes of a warp multiply by different rows");
      }
    }
    execute(mine);
  }
  for (Fiber* fiber : fibers) {
    const auto first = fiber->products.begin();
    fiber->products.erase(first, first + static_cast<std::ptrdiff_t>(done));
  }
}

}  // namespace emulated

inline void start_products() {
  emulated::current->may_multiply = true;
  emulated::current->multiplied.clear();
}

namespace emulated {

template <int kColumns>
void start_product(const char* what, float (&d)[kColumns / 2], const std::uint32_t (&a)[4], Rows b,
                   bool by_inputs, bool add, const Where& where) {
  static_assert(kColumns == 64 || kColumns == 128 || kColumns == 256);
  Fiber& me = *current;
  // The same registers a second time: they were changed in between, what else would it be for.
  const bool again =
      std::find(me.multiplied.begin(), me.multiplied.end(), a) != me.multiplied.end();
  if (!me.may_multiply || again) {
    fail_here(where, "a product without start_products() before it");
  }
  me.multiplied.push_back(a);
  if (!me.shown) fail_here(where, "a product of what show_to_products() did not show");
  me.products.push_back({d, a, b, by_inputs, kColumns, add, me.open_products});
  meet_warp(what, where, &me, [](void* const* lanes) {
    if (!happens_now()) return;
    execute_before(lanes, static_cast<Fiber*>(lanes[0])->open_products + 1);
  });
}

}  // namespace emulated

template <int kColumns>
void multiply_async(float (&d)[kColumns / 2], const std::uint32_t (&a)[4], Rows b, bool add,
                    emulated::Where where = emulated::Where::current()) {
  emulated::start_product<kColumns>("multiply_async", d, a, b, false, add, where);
}
template <int kColumns>
void multiply_columns_async(float (&d)[kColumns / 2], const std::uint32_t (&a)[4], Rows b, bool add,
                            emulated::Where where = emulated::Where::current()) {
  emulated::start_product<kColumns>("multiply_columns_async", d, a, b, true, add, where);
}

inline void commit_products() { ++emulated::current->open_products; }

template <int kPending>
void wait_products(emulated::Where where = emulated::Where::current()) {
  emulated::current->may_multiply = false;
  emulated::meet_warp("wait_products", where, emulated::current, [](void* const* lanes) {
    emulated::execute_before(lanes,
                             static_cast<emulated::Fiber*>(lanes[0])->open_products - kPending);
  });
}

template <int kValues>
void hold(float (&)[kValues]) {}

// ---- registers ----

constexpr int registers_at_start(int threads) { return 65536 / threads / 8 * 8; }

namespace emulated {

// This thread keeps `count` from here on. A thread that takes more waits until others gave enough.
inline void set_registers(const char* what, int count, bool takes, const Where& where) {
  Block& block = *current->block;
  int& mine = current->registers;
  if (takes ? count < mine : count > mine) {
    fail_here(where, cat(what, " to ", count, ", which has ", mine));
  }
  meet_warp(what, where);
  const int more = count - mine;
  while (block.spare_registers < more) look(what, where);
  block.spare_registers -= more;
  mine = count;
}

}  // namespace emulated

template <int kRegisters>
void give_registers(emulated::Where where = emulated::Where::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulated::set_registers("give_registers", kRegisters, false, where);
}
template <int kRegisters>
void take_registers(emulated::Where where = emulated::Where::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulated::set_registers("take_registers", kRegisters, true, where);
}

}  // namespace camelid::cuda
