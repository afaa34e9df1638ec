// A pool of threads that runs numbered tasks. Whoever calls parallel_for works too, so a pool of
// one thread starts none. Threads stay awake for a millisecond after a job, then sleep. Which
// thread runs a task is never visible in a result: tasks must write to places of their own. Knows
// nothing of what tasks do.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace camelid {

// Physical cores this process may use: CPU affinity, hyperthread siblings counted once, and the
// control group's CPU quota. At least 1.
int default_threads();

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs task(i, worker) for every i in [0, n_tasks), handed out in order to whoever is free;
  // worker is in [0, n_threads()) and no two tasks with one worker overlap. Returns when all are
  // done. The first exception by task number is rethrown here, and tasks not yet begun are dropped.
  // Not for use inside a task.
  template <class Task>
  void parallel_for(std::int64_t n_tasks, Task&& task) {
    run({n_tasks, const_cast<void*>(static_cast<const void*>(&task)),
         [](void* context, std::int64_t index, int worker) {
           (*static_cast<std::remove_reference_t<Task>*>(context))(index, worker);
         }});
  }

 private:
  struct Job {
    std::int64_t n_tasks = 0;
    void* context = nullptr;
    void (*invoke)(void* context, std::int64_t index, int worker) = nullptr;
  };

  void run(const Job& job);
  void work(int worker);
  void worker_loop(int worker);
  bool try_enter(std::uint64_t& seen_epoch);
  void leave();
  void wait_for_job(std::uint64_t seen_epoch);
  void wait_until_empty();

  // gate_: workers inside the job in the low 32 bits, kOpen, and above it the number of the job. A
  // worker may read job_ only between entering through the open gate and leaving; the caller
  // changes job_ only when the gate is shut and nobody is inside. Late wakers find it shut and are
  // not waited for.
  static constexpr std::uint64_t kInside = (std::uint64_t{1} << 32) - 1;
  static constexpr std::uint64_t kOpen = std::uint64_t{1} << 32;
  static constexpr int kEpochShift = 33;
  std::atomic<std::uint64_t> gate_{0};
  Job job_;
  alignas(64) std::atomic<std::int64_t> next_task_{0};

  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable empty_;

  std::mutex failure_mutex_;
  std::exception_ptr failure_;
  std::int64_t failed_task_ = 0;

  std::mutex caller_mutex_;  // one job at a time
  std::vector<std::thread> workers_;
};

}  // namespace camelid
