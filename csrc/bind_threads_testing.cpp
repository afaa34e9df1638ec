// Threads and locks of src/base for tests/src/test_threads.py and test_fair_mutex.py.
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/fair_mutex.h"
#include "base/threads.h"
#include "bind.h"

namespace py = pybind11;

namespace camelid {
namespace {

// Runs `n_tasks` tasks that count their own runs; task `failing` throws. Returns the counts.
std::vector<int> run_tasks(int threads, std::int64_t n_tasks, std::int64_t failing, int repeats) {
  ThreadPool pool(threads);
  std::vector<int> runs(static_cast<std::size_t>(n_tasks));
  for (int repeat = 0; repeat < repeats; ++repeat) {
    pool.parallel_for(n_tasks, [&](std::int64_t i, int) {
      if (i == failing) fail(ErrorCode::kInternal, "[testing] task ", i, " fails");
      ++runs[static_cast<std::size_t>(i)];
    });
  }
  return runs;
}

// Takes a FairMutex, lets another thread wait for it, gives it back and asks for it again at once.
// Returns in how many of `n_rounds` the other, who waited, came first.
int turns_kept(int n_rounds) {
  int n_kept = 0;
  for (int round = 0; round < n_rounds; ++round) {
    FairMutex mutex;
    bool had_its_turn = false;  // guarded by mutex
    std::atomic<bool> is_asking = false;
    mutex.lock();
    std::thread other([&] {
      is_asking = true;
      const std::lock_guard lock(mutex);
      had_its_turn = true;
    });
    while (!is_asking) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // from asking to waiting
    mutex.unlock();
    mutex.lock();
    n_kept += had_its_turn ? 1 : 0;
    mutex.unlock();
    other.join();
  }
  return n_kept;
}

}  // namespace

void bind_threads_testing(py::module_& testing) {
  testing.def("run_tasks", &run_tasks, py::arg("threads"), py::arg("n_tasks"),
              py::arg("failing") = -1, py::arg("repeats") = 1);
  testing.def("turns_kept", &turns_kept, py::arg("n_rounds"),
              py::call_guard<py::gil_scoped_release>());
}

}  // namespace camelid
