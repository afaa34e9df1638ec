// The emulated GPU: runs the fibers of a grid in an order that a seed chooses, lets them meet, and
// says who waits where when nothing can go on. It knows nothing of what kernels compute.

#include "machine.h"
#include "stream_work.h"

#include "../case.h"

#include <algorithm>
#include <deque>
#include <exception>
#include <map>
#include <numeric>
#include <random>
#include <utility>

#include "base/error.h"

namespace camelid::cuda::emulated {

Fiber* current = nullptr;
Grid grid{};
bool watched = false;

namespace {

// An H100 or H200: the limits that a launch is held to.
constexpr int kMaxThreads = 1024;
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kBlocksPerMultiprocessor = 32;
constexpr std::size_t kSharedOfSystem = 1024;  // of every block, beside its own
constexpr int kRegisters = 64 * 1024;          // of a multiprocessor
constexpr int kMostRegisters = 256;            // of a thread, as they are dealt

constexpr std::size_t kSharedGuard = 4 * 1024;
constexpr std::size_t kDeviceGuard = 64 * 1024;

// Looks at memory, for every thread that has not ended, in which nothing else happens.
constexpr std::int64_t kPatience = 1000;

enum class Copies { kLate, kEarly, kRandom };

struct Machine {
  std::uint64_t seed = 0;
  bool always_in_order = false;
  std::mt19937 random;

  // Of the grid that runs.
  void (*thread)(const void* call) = nullptr;
  const void* call = nullptr;
  Copies copies = Copies::kLate;
  double eagerness = 0;      // how often the warp that became ready last goes first
  std::vector<Warp*> ready;  // with threads that can go on
  Context scheduler;
  std::exception_ptr failure;
  int n_alive = 0;
  std::int64_t n_looks = 0;  // since something happened

  StreamWork work;

  Stacks stacks;
  std::map<const std::byte*, GuardedBytes> allocations;
  Memories memories;                          // those, and the shared memory of blocks
  std::map<const unsigned*, KnownPtr> flags;  // what their values tell who looks at them
  std::string error;
} machine;

bool in_order() { return machine.seed == 0 || machine.always_in_order; }
std::size_t below(std::size_t n) { return machine.random() % n; }
bool chance(double probability) {
  return static_cast<double>(machine.random()) < probability * 4294967296.0;
}

template <typename List>
void shuffle_unless_in_order(List& list) {
  if (in_order()) return;
  for (std::size_t n = list.size(); n > 1; --n) std::swap(list[n - 1], list[below(n)]);
}

template <typename... Parts>
[[noreturn]] void fail_launch(const Parts&... parts) {
  fail(ErrorCode::kInternal, "[cuda] ", grid.what, ": ", parts...);
}

std::string line_of(const Where& where) {
  std::string file = where.file_name();
  return cat(file.substr(file.find_last_of('/') + 1), ":", where.line());
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::string_view(a.file_name()) == b.file_name();
}

// ---- fibers ----

void wake(Fiber& fiber) {
  fiber.state = Fiber::kReady;
  if (fiber.warp->queued) return;
  fiber.warp->queued = true;
  machine.ready.push_back(fiber.warp);
}

void run_act(const Circle& warp, Act act, const Fiber& one) {
  if (warp.came < kLanes) {
    fail_launch("block ", one.block->index, ", thread ", one.thread, " (", line_of(one.where),
                "): ", one.what, " needs 32 threads, and only ", warp.came, " of its warp came");
  }
  void* lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = warp.first[i].brought;
  act(lanes);
}

// All that wait in the circle go on, if all that can come came.
void finish_if_complete(Circle& circle) {
  if (circle.came == 0 || circle.came < circle.alive) return;
  if (circle.act) run_act(circle, circle.act, *circle.last);
  circle.came = 0;
  machine.n_looks = 0;
  std::vector<History*> histories;
  for (Fiber* fiber = circle.first; fiber != circle.first + circle.size; ++fiber) {
    if (fiber->state != Fiber::kWaiting) continue;
    histories.push_back(&fiber->history);
    wake(*fiber);
  }
  // Shuffles and products exchange registers; they order no accesses to memory.
  if (watched && !circle.act) meet(histories);
}

void execute(Copy& copy) {
  if (copy.executed) return;
  std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.n_bytes));
  std::memset(copy.shared + copy.n_bytes, 0, static_cast<std::size_t>(16 - copy.n_bytes));
  copy.executed = true;
}

void finish_copies_before(Fiber& fiber, int group) {
  auto copy = fiber.copies.begin();
  for (; copy != fiber.copies.end() && copy->group < group; ++copy) {
    execute(*copy);
    if (!watched) continue;
    GuardedBytes& shared = fiber.block->shared;
    shared.shadow().arrive(shared.offset_of(copy->shared), 16, fiber.history);
  }
  fiber.copies.erase(fiber.copies.begin(), copy);
}

void end(Fiber& fiber) {
  finish_copies_before(fiber, fiber.open_group + 1);
  fiber.state = Fiber::kEnded;
  machine.n_looks = 0;
  --machine.n_alive;
  --fiber.warp->alive;
  --fiber.block->alive;
  finish_if_complete(*fiber.warp);
  finish_if_complete(*fiber.block);
}

void suspend() { Context::swap(current->context, machine.scheduler); }

// Parameters that are __grid_constant__ have one address, which threads may tell one another. Here
// they lie on each thread's stack, so below where what comes after the thread's end is written.
__attribute__((noinline)) void run_thread() {
  [[maybe_unused]] volatile std::byte room[8 * 1024];
  room[0] = std::byte{};
  machine.thread(machine.call);
  room[0] = std::byte{};  // the room stays while the thread runs
}

void fiber_main() {
  try {
    run_thread();
    end(*current);
  } catch (...) {
    machine.failure = std::current_exception();
  }
  suspend();
}

void resume(Fiber& fiber) {
  current = &fiber;
  Context::swap(machine.scheduler, fiber.context);
  current = nullptr;
  if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
}

// ---- the order ----

Warp* next_warp() {
  std::size_t index = machine.ready.size() - 1;
  if (in_order()) {
    index = 0;
  } else if (!chance(machine.eagerness)) {
    index = below(machine.ready.size());
  }
  Warp* warp = machine.ready[index];
  machine.ready.erase(machine.ready.begin() + static_cast<std::ptrdiff_t>(index));
  return warp;
}

void run_warp(Warp& warp) {
  warp.queued = false;
  std::vector<Fiber*> lanes;
  for (Fiber* lane = warp.first; lane != warp.first + warp.size; ++lane) {
    if (lane->state == Fiber::kReady) lanes.push_back(lane);
  }
  shuffle_unless_in_order(lanes);
  for (Fiber* lane : lanes) resume(*lane);
}

// "block 3: 96 threads at sync_block (matmul.cu:40), 32 threads at shuffle (matmul.cu:51)"
std::string who_waits(const std::deque<Block>& blocks) {
  constexpr int kTold = 4;
  std::string told;
  int n_told = 0;
  for (const Block& block : blocks) {
    std::map<std::string, int> places;
    for (const Fiber& fiber : block.fibers) {
      if (fiber.state == Fiber::kEnded) continue;
      ++places[fiber.what ? cat(fiber.what, " (", line_of(fiber.where), ")") : "their start"];
    }
    if (places.empty()) continue;
    if (n_told++ == kTold) return told + "; and more blocks";
    told += cat(n_told == 1 ? "" : "; ", "block ", block.index, ": ");
    const char* separator = "";
    for (const auto& [where, count] : places) {
      told += cat(separator, count, count == 1 ? " thread at " : " threads at ", where);
      separator = ", ";
    }
  }
  return told;
}

// Whoever gives or takes registers is a warpgroup.
void check_registers(const Block& block) {
  constexpr std::size_t kWarpgroup = 4 * kLanes;
  for (std::size_t i = 0; i < block.fibers.size(); ++i) {
    const int mine = block.fibers[i].registers;
    const int first = block.fibers[i / kWarpgroup * kWarpgroup].registers;
    if (mine == first) continue;
    fail_launch("block ", block.index, ": warps of a warpgroup keep ", first, " and ", mine,
                " registers");
  }
}

void run_blocks(const std::vector<int>& indices) {
  std::deque<Block> blocks;
  std::size_t n_stacks = 0;
  machine.ready.clear();
  machine.n_alive = machine.n_looks = 0;
  for (const int index : indices) {
    Block& block = blocks.emplace_back(index, grid.threads, grid.shared_bytes);
    machine.n_alive += grid.threads;
    for (Fiber& fiber : block.fibers) {
      fiber.stack = machine.stacks.get(n_stacks++);
      fiber.context.start(fiber.stack, Stacks::kBytes, fiber_main);
      wake(fiber);
    }
  }
  while (!machine.ready.empty()) {
    run_warp(*next_warp());
    if (machine.n_looks > kPatience * machine.n_alive) {
      fail_launch("threads wait for memory that nobody changes: ", who_waits(blocks),
                  grid.together ? "" : " (blocks that wait for one another need Launch.together)");
    }
  }
  if (machine.n_alive > 0) fail_launch("no thread can go on: ", who_waits(blocks));
  for (const Block& block : blocks) {
    const std::string damage = block.shared.damage();
    if (!damage.empty()) fail_launch("block ", block.index, ": ", damage);
    check_registers(block);
  }
}

void check_limits() {
  if (grid.blocks < 1) fail_launch(grid.blocks, " blocks");
  if (grid.threads < 1 || grid.threads > kMaxThreads) fail_launch(grid.threads, " threads");
  if (grid.shared_bytes > settings.most_shared_bytes) {
    fail_launch(grid.shared_bytes, " bytes of shared memory, a block has ",
                settings.most_shared_bytes);
  }
  const int fit =
      settings.n_multiprocessors * blocks_per_multiprocessor(grid.threads, grid.shared_bytes);
  if (grid.together && grid.blocks > fit) {
    fail_launch(grid.blocks, " blocks together, but only ", fit, " fit");
  }
}

void check_allocations() {
  for (auto& [memory, bytes] : machine.allocations) {
    const std::string damage = bytes.damage();
    if (damage.empty()) continue;
    bytes.repair();  // is told once
    fail(ErrorCode::kInternal, damage);
  }
}

}  // namespace

Block::Block(int index, int n_threads, std::size_t shared_bytes)
    : index(index),
      shared("shared memory", shared_bytes, kSharedGuard),
      fibers(static_cast<std::size_t>(n_threads)),
      warps(static_cast<std::size_t>((n_threads + kLanes - 1) / kLanes)) {
  first = fibers.data();
  size = alive = n_threads;
  for (int thread = 0; thread < n_threads; ++thread) {
    Fiber& fiber = fibers[static_cast<std::size_t>(thread)];
    Warp& warp = warps[static_cast<std::size_t>(thread / kLanes)];
    if (warp.size == 0) warp.first = &fiber;
    warp.alive = ++warp.size;
    fiber.block = this;
    fiber.warp = &warp;
    fiber.thread = thread;
    fiber.registers = std::min(kRegisters / n_threads / 8 * 8, kMostRegisters);
    fiber.history.block = index;
    fiber.history.thread = thread;
    fiber.history.n_threads = n_threads;
  }
  machine.memories.add(shared);
}

Block::~Block() { machine.memories.remove(shared); }

void run(const Grid& what, void (*thread)(const void* call), const void* call) {
  grid = what;
  check_limits();
  machine.thread = thread;
  machine.call = call;
  machine.flags.clear();
  for (auto& [memory, bytes] : machine.allocations) bytes.forget_accesses();
  machine.copies = static_cast<Copies>(machine.seed % 3);
  constexpr double kEagerness[] = {0, 0.5, 0.95};
  machine.eagerness = kEagerness[below(3)];
  std::vector<int> order(static_cast<std::size_t>(grid.blocks));
  std::iota(order.begin(), order.end(), 0);
  shuffle_unless_in_order(order);
  if (grid.together) {
    run_blocks(order);
  } else {
    for (const int block : order) run_blocks({block});
  }
  try {
    check_allocations();
  } catch (const Error& error) {
    fail_launch(error.what());
  }
}

// ---- the stream ----

void submit(std::function<void()> work, bool may_wait) {
  const auto copies = static_cast<Copies>(machine.seed % 3);
  const bool waits = copies == Copies::kLate || (copies == Copies::kRandom && below(2) == 0);
  machine.work.submit(std::move(work), may_wait, may_wait && waits);
}
std::int64_t n_submitted() { return machine.work.n_submitted(); }
void finish_work(std::int64_t n) { machine.work.finish(n); }
void start_recording() { machine.work.record(); }
Record finish_recording() { return machine.work.recorded(); }
void replay(const Record& record) {
  for (const auto& [work, may_wait] : record) submit(work, may_wait);
}

// ---- what threads ask for ----

// Threads of a warp go through a kernel together where they meet.
void check_same_place(const char* what, const Where& where) {
  const Warp& warp = *current->warp;
  for (const Fiber* lane = warp.first; lane != warp.first + warp.size; ++lane) {
    if (lane->state != Fiber::kWaiting) continue;
    if (same(lane->where, where)) return;  // and so are the others
    fail_here(where, cat("came to ", what, " while thread ", lane->thread, " of its warp waits at ",
                         lane->what, " (", line_of(lane->where), ")"));
  }
}

void meet(Circle& circle, const char* what, const Where& where, void* brought, Act act) {
  check_same_place(what, where);
  current->what = what;
  current->where = where;
  current->brought = brought;
  current->state = Fiber::kWaiting;
  ++circle.came;
  circle.last = current;
  circle.act = act;
  finish_if_complete(circle);
  suspend();
}

void meet_block(const char* what, const Where& where) {
  meet(*current->block, what, where, nullptr, nullptr);
}

void meet_warp(const char* what, const Where& where, void* brought, Act act) {
  meet(*current->warp, what, where, brought, act);
}

namespace {

// After something that others may see. A grid in which all threads only look, for long, is stopped.
void let_others_go(const char* what, const Where& where, bool looked) {
  machine.n_looks = looked ? machine.n_looks + 1 : 0;
  current->what = what;
  current->where = where;
  wake(*current);
  suspend();
}

}  // namespace

unsigned add(unsigned* counter, unsigned amount, const Where& where) {
  const unsigned before = *counter;
  *counter += amount;
  if (watched) {
    KnownPtr& told = machine.flags[counter];
    current->history.looked = join(current->history.looked, told);
    told = join(told, current->history.fenced);
  }
  let_others_go("add_atomic", where, amount == 0);
  return before;
}

unsigned load(const unsigned* flag, const Where& where) {
  let_others_go("load_acquire", where, true);
  if (watched) current->history.known = join(current->history.known, machine.flags[flag]);
  return *flag;
}

void tell(const unsigned* flag, Fiber& fiber) {
  machine.n_looks = 0;
  if (!watched) return;
  KnownPtr& told = machine.flags[flag];
  told = join(told, fiber.history.tell());
}

void let_go(const char* what, const Where& where) { let_others_go(what, where, false); }
void look(const char* what, const Where& where) { let_others_go(what, where, true); }

void fence() {
  if (watched) current->history.fence();
}

bool happens_now() {
  return machine.copies == Copies::kEarly || (machine.copies == Copies::kRandom && below(2) == 0);
}

}  // namespace camelid::cuda::emulated

#include "accesses.inl"

namespace camelid::cuda::emulated {

// ---- copies ----

namespace {

void check_multiple(const char* what, const void* pointer, std::size_t of, const Where& where) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % of == 0) return;
  fail_here(where, cat(what, " of an address that is no multiple of ", of));
}

// Only memory of device_alloc() is known; others' may be anything.
void check_source(const void* global, int n_bytes, const Where& where) {
  check_multiple("copy_async", global, 16, where);
  const GuardedBytes* memory = machine.memories.find(global);
  if (memory && !memory->holds(global, static_cast<std::size_t>(n_bytes))) {
    fail_here(where, cat("copy_async from ", memory->place_of(global)));
  }
}

}  // namespace

void check_shared(const char* what, const void* pointer, std::size_t n_bytes, const Where& where) {
  const GuardedBytes& memory = current->block->shared;
  if (!memory.holds(pointer, n_bytes)) {
    fail_here(where, cat(what, " at ", memory.place_of(pointer)));
  }
  check_multiple(what, pointer, n_bytes, where);
}

void start_copy(void* shared, const void* global, int n_bytes, const Where& where) {
  if (n_bytes < 0 || n_bytes > 16) fail_here(where, cat("copy_async of ", n_bytes, " bytes"));
  check_shared("copy_async", shared, 16, where);
  if (n_bytes > 0) check_source(global, n_bytes, where);
  if (watched) {
    const void* code = __builtin_return_address(0);
    if (n_bytes > 0) access(global, static_cast<std::size_t>(n_bytes), kReads, code);
    access(shared, 16, kWritesLater, code);
  }
  Copy& copy = current->copies.emplace_back(Copy{static_cast<std::byte*>(shared),
                                                 static_cast<const std::byte*>(global), n_bytes,
                                                 current->open_group, false});
  if (happens_now()) execute(copy);
}

void finish_copies(int n_pending) {
  finish_copies_before(*current, current->open_group - n_pending);
}

void finish_copies_of(Fiber& fiber, int n_groups) { finish_copies_before(fiber, n_groups); }

void check_copied(const char* what, const void* device, std::size_t n_bytes) {
  const GuardedBytes* memory = machine.memories.find(device);
  if (memory && !memory->holds(device, n_bytes)) {
    fail(ErrorCode::kInternal, what, " of ", n_bytes, " bytes at ", memory->place_of(device));
  }
}

std::string place(const Where& where) {
  return cat("block ", current->block->index, ", thread ", current->thread, " (", line_of(where),
             ")");
}

void fail_here(const Where& where, const std::string& message) {
  fail_launch(place(where), ": ", message);
}

int blocks_per_multiprocessor(int threads, std::size_t shared_bytes) {
  const std::size_t by_shared =
      (settings.most_shared_bytes + kSharedOfSystem) / (shared_bytes + kSharedOfSystem);
  return std::min(
      {kThreadsPerMultiprocessor / threads, kBlocksPerMultiprocessor, static_cast<int>(by_shared)});
}

}  // namespace camelid::cuda::emulated

void camelid::cuda::remember_error(const char* message) { emulated::machine.error = message; }

using namespace camelid;
using namespace camelid::cuda;
using namespace camelid::cuda::emulated;

extern "C" {

const char* device_error() { return machine.error.c_str(); }

void emulated_seed(std::uint64_t seed) {
  machine.seed = seed;
  machine.random.seed(static_cast<std::uint32_t>(seed));
}

void emulated_in_order(int always) { machine.always_in_order = always != 0; }

void* device_alloc(std::size_t bytes) {
  GuardedBytes memory("device memory", bytes, kDeviceGuard);
  std::byte* data = memory.data();
  machine.memories.add(machine.allocations.emplace(data, std::move(memory)).first->second);
  return data;
}

int device_free(void* memory) {
  return caught([&] {
    const auto found = machine.allocations.find(static_cast<std::byte*>(memory));
    if (found == machine.allocations.end()) {
      fail(ErrorCode::kInternal, "device_free of what device_alloc never gave");
    }
    const std::string damage = found->second.damage();
    machine.memories.remove(found->second);
    machine.allocations.erase(found);
    if (!damage.empty()) fail(ErrorCode::kInternal, damage);
  });
}

int device_copy(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  return 0;
}

int check_guards() {
  return caught([] { check_allocations(); });
}
}
