#include "peaks.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "base/threads.h"
#include "common.h"
#include "peak_loops.h"

namespace camelid::benchmarks {
namespace {

constexpr std::size_t kPiece = std::size_t{4} << 20;  // bytes a thread takes at once
constexpr std::int64_t kTurns = 1 << 20;              // of a loop; about 2 ms

// Memory far larger than the caches, on huge pages, with contents: untouched pages would all be the
// one page of zeros.
const std::vector<char*>& pieces() {
  static const Buffer memory = [] {
    Buffer buffer = cpu_backend({})->allocate(std::max(cold_bytes(), std::size_t{512} << 20));
    std::memset(buffer.data.get(), 1, buffer.bytes);
    return buffer;
  }();
  static const std::vector<char*> all = [] {
    std::vector<char*> found;
    auto* base = static_cast<char*>(memory.data.get());
    for (std::size_t at = 0; at + kPiece <= memory.bytes; at += kPiece) found.push_back(base + at);
    return found;
  }();
  return all;
}

void read_once(ThreadPool& pool) {
  const auto n = static_cast<std::int64_t>(pieces().size());
  pool.parallel_for(n, [](std::int64_t i, int) {
    benchmark::DoNotOptimize(read_all(pieces()[static_cast<std::size_t>(i)], kPiece));
  });
}

void loop_once(ThreadPool& pool, const PeakLoop& loop) {
  pool.parallel_for(pool.n_threads(), [&](std::int64_t, int) { loop.run(kTurns); });
}

// The best of some runs: a peak is what the machine can do when nobody disturbs it.
template <class Run>
double best_rate(double work, Run run) {
  double best = 0;
  run();
  for (int i = 0; i < 15; ++i) {
    const auto started = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    best = std::max(best, work / seconds.count());
  }
  return best / 1e9;
}

double best_loop_gop_s(Products products) {
  ThreadPool pool(settings().threads);
  double best = 0;
  for (const PeakLoop& loop : peak_loops()) {
    if (loop.products != products || !loop.supported()) continue;
    const double work = loop.operations * static_cast<double>(kTurns) * pool.n_threads();
    best = std::max(best, best_rate(work, [&] { loop_once(pool, loop); }));
  }
  return best;
}

void add_read(int threads) {
  const std::string name = "peak_read/" + std::to_string(threads);
  const auto body = [threads](benchmark::State& state) {
    ThreadPool pool(threads);
    read_once(pool);  // the first fills the memory
    for (auto _ : state) read_once(pool);
    count(state, {.bytes = static_cast<double>(pieces().size() * kPiece)});
  };
  benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime();
}

void add_loop(const PeakLoop& loop, int threads) {
  const std::string name = "peak_" + std::string(loop.name) + "/" + std::to_string(threads);
  const auto body = [loop, threads](benchmark::State& state) {
    ThreadPool pool(threads);
    for (auto _ : state) loop_once(pool, loop);
    count(state, {.operations = loop.operations * static_cast<double>(kTurns) * threads});
  };
  benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime();
}

}  // namespace

double read_peak_gb_s() {
  static const double peak = [] {
    ThreadPool pool(settings().threads);
    return best_rate(static_cast<double>(pieces().size() * kPiece), [&] { read_once(pool); });
  }();
  return peak;
}

double int8_peak_gop_s() {
  static const double peak = best_loop_gop_s(Products::kInt8);
  return peak;
}

double float_peak_gop_s() {
  static const double peak = best_loop_gop_s(Products::kFloat);
  return peak;
}

double bf16_peak_gop_s() {
  static const double peak = best_loop_gop_s(Products::kBf16);
  return peak;
}

void register_peaks() {
  std::vector<int> counts = {1};
  if (settings().threads > 1) counts.push_back(settings().threads);
  for (const int threads : counts) {
    add_read(threads);
    for (const PeakLoop& loop : peak_loops()) {
      if (loop.supported()) add_loop(loop, threads);
    }
  }
}

}  // namespace camelid::benchmarks
