// The emulated GPU as the twins of cuda/device/ see it: fibers that stand for threads, where they
// meet, their copies in flight, and how a grid of them is run. fibers.cpp has the other half.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "guarded.h"
#include "settings.h"

namespace camelid::cuda::emulated {

constexpr int kLanes = 32;  // threads of a warp

// Where in a kernel something happens; a default argument, so that nobody has to say it.
using Where = std::source_location;

struct Block;
struct Fiber;
struct Warp;

struct Copy {
  std::byte* shared;  // 16 bytes
  const std::byte* global;
  int n_bytes;  // of them; the others become zeros
  int group;
  bool executed;
};

// A warpgroup's product as one of its threads asked for it; sm90/hopper.cuh executes it.
struct Product {
  float* d;                // its part of the sums
  const std::uint32_t* a;  // of the fragment, in registers: read when the product is executed
  std::uint32_t rows;      // describes b
  bool by_inputs;          // as describe_columns() does
  int columns;
  bool add;
  int group;
};

// A barrier in shared memory.
struct BarrierState {
  int expected = 0;
  int came = 0;
  unsigned phases = 0;  // completed
  struct Late {
    Fiber* by;
    int copies;  // groups of its copies that come first
  };
  std::vector<Late> late;  // arrivals that wait for copies
};

// One thread of the GPU. Runs until it waits for others, lets others go, or ends.
struct Fiber {
  Context context;
  std::byte* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;  // in the block
  enum { kReady, kWaiting, kEnded } state = kReady;

  // What it waits for, while it is kWaiting.
  const char* what = nullptr;
  Where where;
  void* brought = nullptr;

  std::vector<Copy> copies;  // in flight, oldest first
  int open_group = 0;        // of copies: those before it are committed

  std::vector<Product> products;  // not yet executed, oldest first
  int open_products = 0;          // the group of products that is open
  bool may_multiply = false;      // start_products() was called after the last wait for products
  std::vector<const std::uint32_t*> multiplied;  // the a's of products since start_products()
  bool shown = true;  // show_to_products() was called after the last wait for others

  int registers = 0;  // that it keeps

  History history;  // kept while accesses are reported
};

// What the last thread to come does for all: lanes[i] is what lane i brought. Acts are UNWATCHED,
// since they would report as that thread's what they do for the others.
using Act = void (*)(void* const* lanes);
#define UNWATCHED __attribute__((no_sanitize("thread")))

// Threads that wait for one another: a block's or a warp's. They are neighbours in memory.
struct Circle {
  Fiber* first = nullptr;
  int size = 0;
  int alive = 0;          // did not end yet
  int came = 0;           // wait for the others
  Fiber* last = nullptr;  // the latest of those
  Act act = nullptr;
};

struct Warp : Circle {
  bool queued = false;  // to be run
};

struct Block : Circle {
  Block(int index, int n_threads, std::size_t shared_bytes);
  ~Block();
  Block(const Block&) = delete;  // its fibers know where it is
  int index;
  GuardedBytes shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, BarrierState> barriers;  // by their place in shared memory
  int spare_registers = 0;                       // given by threads and not taken
};

struct Grid {
  const char* what;
  int blocks;
  int threads;
  std::size_t shared_bytes;
  bool together;
};

// Who is running, and in what grid.
extern Fiber* current;
extern Grid grid;

// Whether kernels were compiled to report their accesses (see emulated_build.py), to be checked.
extern bool watched;

// Runs thread(call) in all threads of a grid, to their end. Throws Error when one of them does,
// when no thread can go on, and when memory was written that is nobody's.
void run(const Grid& grid, void (*thread)(const void* call), const void* call);

// Does the work of the one stream there is, in order, at once or when somebody waits for it. Work
// that `may_wait` does so as the seed says, and what comes after it waits with it.
void submit(std::function<void()> work, bool may_wait);
std::int64_t n_submitted();

// Between the two, work is not done but written down, in order; replay() does it once more.
using Record = std::vector<std::pair<std::function<void()>, bool>>;
void start_recording();
Record finish_recording();
void replay(const Record& record);
void finish_work(std::int64_t n);  // the first n that were ever submitted

// Waits until all threads of the warp (or of the block) that did not end are here. With an act, all
// 32 have to come. Lanes of one warp must come to the same place.
void meet_warp(const char* what, const Where& where, void* brought = nullptr, Act act = nullptr);
void meet_block(const char* what, const Where& where);

// Words that threads of all blocks read and write at once; others may go first after each. When all
// threads only look, for long, the grid is stopped.
unsigned add(unsigned* counter, unsigned amount, const Where& where);
unsigned load(const unsigned* flag, const Where& where);
void fence();
// Others may go first: after something that they may see, and where what is looked for is not
// there.
void let_go(const char* what, const Where& where);
void look(const char* what, const Where& where);

// An access to memory by compiled code at `code`; checked before it happens.
void report(const void* pointer, std::size_t n_bytes, bool writes, const void* code);

// Where the code is that this was called from.
__attribute__((noinline)) inline const void* code_here() { return __builtin_return_address(0); }

// Holds an instruction to its addresses: inside the block's shared memory, multiples of
// their size.
void check_shared(const char* what, const void* pointer, std::size_t n_bytes, const Where& where);

void start_copy(void* shared, const void* global, int n_bytes, const Where& where);
void finish_copies(int n_pending);                  // all but the latest n_pending groups
void finish_copies_of(Fiber& fiber, int n_groups);  // the first n_groups it committed

// Whether what may happen now or later, when it is waited for, happens now.
bool happens_now();
// What a thread did is known to those who see the flag by load() from now on.
void tell(const unsigned* flag, Fiber& fiber);

// Holds what the host asks to be copied or filled to one piece of device memory, as a driver may.
// Only memory of device_alloc() is known; others' may be anything.
void check_copied(const char* what, const void* device, std::size_t n_bytes);

// Where this thread is, for messages; and an error that starts with it.
std::string place(const Where& where);
[[noreturn]] void fail_here(const Where& where, const std::string& message);

int blocks_per_multiprocessor(int threads, std::size_t shared_bytes);

}  // namespace camelid::cuda::emulated

// What tests call; functions that return int return 1 after an error, which device_error() tells.
extern "C" {
const char* device_error();
// 0: threads and blocks in order. Otherwise another order for each seed. Copies are executed as
// late as allowed, at once, or one or the other at random, for seed % 3 = 0, 1, 2.
void emulated_seed(std::uint64_t seed);
void emulated_in_order(int always);     // threads whatever the seed: several times as fast
void* device_alloc(std::size_t bytes);  // counts as nothing
int device_free(void* memory);
int device_copy(void* to, const void* from, std::size_t bytes);
int check_guards();
}
