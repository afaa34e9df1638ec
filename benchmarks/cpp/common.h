// What the microbenchmarks share: the choices of the command line, memory with contents, and the
// counters every benchmark prints. Must never know a kernel.
#pragma once

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "backend/backend.h"

namespace camelid::benchmarks {

struct Settings {
  int threads = 0;  // of kernels, and of the peaks they are compared to
};
const Settings& settings();

// Bytes a benchmark must walk through before it may come back to the same ones: 4x the last cache.
std::size_t cold_bytes();

// How many copies of `bytes` are cold; at least 1.
std::size_t copies_for(std::size_t bytes);

// Random bits from a fixed seed.
void fill_bits(void* data, std::size_t bytes);
// Random values in [-1, 1).
void fill_values(float* data, std::size_t n);

// fast: as in BackendOptions.
std::unique_ptr<Backend> cpu_backend(std::string_view isa, bool fast = false);

// The least work of one iteration, and the names of the peaks (peaks.h) it is held against.
struct Work {
  double bytes = 0;
  double operations = 0;  // a multiply and an add are two
  double peak_gb_s = 0;   // 0: not measured on this machine
  double peak_gop_s = 0;
};
// Adds the counters GB/s, GOP/s, of_read and of_peak.
void count(benchmark::State& state, const Work& work);

void register_peaks();
void register_matmul();
void register_attention();
void register_norm();

}  // namespace camelid::benchmarks
