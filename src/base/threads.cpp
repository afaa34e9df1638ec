// The thread pool, and how many threads it should have here.
#include "base/threads.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <sstream>
#include <string>

#include "base/cgroup.h"

#ifdef __linux__
#include <sched.h>
#endif

namespace camelid {
namespace {

// A thread looks again this often before it lets others run: about 30 us, longer than the serial
// gaps between the operations of a layer.
constexpr int kSpins = 2000;
// Then it offers its core to whoever wants it, and still looks, before it sleeps: longer than the
// sampling and scheduling between two steps, far shorter than the pause between requests. Waking a
// sleeper costs the caller 7 us, and the sleeper misses the first 15 us of work or more.
constexpr auto kAwake = std::chrono::milliseconds(1);
constexpr int kSpinsPerYield = 32;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a while for `ready` without sleeping; false when it gave up.
template <class Ready>
bool spin_until(Ready ready) {
  const auto look = [&](int times) {
    for (int i = 0; i < times; ++i) {
      if (ready()) return true;
      relax();
    }
    return false;
  };
  if (look(kSpins)) return true;
  const auto end = std::chrono::steady_clock::now() + kAwake;
  while (std::chrono::steady_clock::now() < end) {
    std::this_thread::yield();
    if (look(kSpinsPerYield)) return true;
  }
  return false;
}

#ifdef __linux__
// Cores behind the CPUs in this process's affinity mask; 0 when the mask cannot be read.
int physical_cores() {
  constexpr int kMaxCpus = 8192;
  cpu_set_t* mask = CPU_ALLOC(kMaxCpus);
  const std::size_t bytes = CPU_ALLOC_SIZE(kMaxCpus);
  CPU_ZERO_S(bytes, mask);
  std::set<std::string> cores;
  if (sched_getaffinity(0, bytes, mask) == 0) {
    for (int cpu = 0; cpu < kMaxCpus; ++cpu) {
      if (!CPU_ISSET_S(static_cast<std::size_t>(cpu), bytes, mask)) continue;
      const std::string id = std::to_string(cpu);
      const std::string siblings =
          read_small_file("/sys/devices/system/cpu/cpu" + id + "/topology/thread_siblings_list");
      cores.insert(siblings.empty() ? id : siblings);
    }
  }
  CPU_FREE(mask);
  return static_cast<int>(cores.size());
}

// Whole CPUs the control groups grant, rounded up so that a grant of 1.5 is used; 0 = no limit.
int cgroup_cpus() {
  double limit = 0.0;
  for (const std::string& folder : cgroup_folders("cpu")) {
    double quota = 0.0;
    double period = 0.0;
    std::istringstream v2(read_small_file(folder + "/cpu.max"));  // "max 100000" when unlimited
    if (!(v2 >> quota >> period)) {
      std::istringstream(read_small_file(folder + "/cpu.cfs_quota_us")) >> quota;
      std::istringstream(read_small_file(folder + "/cpu.cfs_period_us")) >> period;
    }
    if (quota <= 0.0 || period <= 0.0) continue;
    limit = limit == 0.0 ? quota / period : std::min(limit, quota / period);
  }
  return static_cast<int>(limit + 0.999);
}
#else
int physical_cores() { return 0; }
int cgroup_cpus() { return 0; }
#endif

}  // namespace

int default_threads() {
  int threads = physical_cores();
  if (threads == 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  const int granted = cgroup_cpus();
  if (granted > 0) threads = std::min(threads, granted);
  return std::max(threads, 1);
}

ThreadPool::ThreadPool(int n_threads) {
  for (int worker = 1; worker < n_threads; ++worker) {
    workers_.emplace_back([this, worker] { worker_loop(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const Job& job) {
  if (job.n_tasks <= 0) return;
  if (workers_.empty() || job.n_tasks == 1) {
    for (std::int64_t i = 0; i < job.n_tasks; ++i) job.invoke(job.context, i, 0);
    return;
  }
  const std::lock_guard one_job(caller_mutex_);
  job_ = job;
  next_task_.store(0, std::memory_order_relaxed);
  failure_ = nullptr;
  const std::uint64_t epoch = (gate_.load(std::memory_order_relaxed) >> kEpochShift) + 1;
  // Sequentially consistent, like the count of sleepers: either a worker that goes to sleep sees
  // the gate open, or this thread sees it asleep and wakes it.
  gate_.store((epoch << kEpochShift) | kOpen);
  if (sleepers_.load() > 0) {
    { const std::lock_guard lock(mutex_); }
    wake_.notify_all();
  }
  work(0);
  gate_.fetch_and(~kOpen);
  wait_until_empty();
  if (failure_) std::rethrow_exception(failure_);
}

void ThreadPool::work(int worker) {
  for (;;) {
    const std::int64_t i = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (i >= job_.n_tasks) return;
    try {
      job_.invoke(job_.context, i, worker);
    } catch (...) {
      const std::lock_guard lock(failure_mutex_);
      if (!failure_ || i < failed_task_) {
        failure_ = std::current_exception();
        failed_task_ = i;
      }
      next_task_.store(job_.n_tasks, std::memory_order_relaxed);
    }
  }
}

void ThreadPool::worker_loop(int worker) {
  std::uint64_t seen_epoch = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    if (try_enter(seen_epoch)) {
      work(worker);
      leave();
    } else {
      wait_for_job(seen_epoch);
    }
  }
}

bool ThreadPool::try_enter(std::uint64_t& seen_epoch) {
  std::uint64_t gate = gate_.load(std::memory_order_acquire);
  while ((gate & kOpen) != 0 && (gate >> kEpochShift) != seen_epoch) {
    if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
      seen_epoch = gate >> kEpochShift;
      return true;
    }
  }
  return false;
}

void ThreadPool::leave() {
  const std::uint64_t before = gate_.fetch_sub(1, std::memory_order_acq_rel);
  if ((before & kInside) == 1 && (before & kOpen) == 0) {
    const std::lock_guard lock(mutex_);
    empty_.notify_one();
  }
}

void ThreadPool::wait_for_job(std::uint64_t seen_epoch) {
  const auto has_news = [&] {
    const std::uint64_t gate = gate_.load();
    return ((gate & kOpen) != 0 && (gate >> kEpochShift) != seen_epoch) || stop_.load();
  };
  if (spin_until(has_news)) return;
  std::unique_lock lock(mutex_);
  ++sleepers_;
  wake_.wait(lock, has_news);
  --sleepers_;
}

void ThreadPool::wait_until_empty() {
  const auto is_empty = [&] { return (gate_.load(std::memory_order_acquire) & kInside) == 0; };
  if (spin_until(is_empty)) return;
  std::unique_lock lock(mutex_);
  empty_.wait(lock, is_empty);
}

}  // namespace camelid
