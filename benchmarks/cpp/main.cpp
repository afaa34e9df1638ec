// The program: reads --threads=N, hands the rest to Google Benchmark, registers everything.
//
//   camelid_benchmarks --threads=2 --benchmark_filter='^peak_|^matmul/int4'
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "base/threads.h"
#include "common.h"
#include "cpu/backend.h"

namespace camelid::benchmarks {
namespace {

Settings chosen;

// Takes --threads=N out of the arguments.
void read_threads(int& argc, char** argv) {
  constexpr const char* kFlag = "--threads=";
  const std::size_t length = std::strlen(kFlag);
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], kFlag, length) == 0) {
      chosen.threads = std::atoi(argv[i] + length);
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  if (chosen.threads < 1) chosen.threads = default_threads();
}

}  // namespace

const Settings& settings() { return chosen; }

std::size_t cold_bytes() {
  // 64 MiB where the C library does not know, as in some containers.
  const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return 4 * (cache > 0 ? static_cast<std::size_t>(cache) : std::size_t{64} << 20);
}

std::size_t copies_for(std::size_t bytes) {
  return std::max<std::size_t>(1, (cold_bytes() + bytes - 1) / bytes);
}

void fill_bits(void* data, std::size_t bytes) {
  std::mt19937_64 random(1);
  auto* at = static_cast<unsigned char*>(data);
  for (std::size_t done = 0; done < bytes; done += 8) {
    const std::uint64_t bits = random();
    std::memcpy(at + done, &bits, std::min<std::size_t>(8, bytes - done));
  }
}

void fill_values(float* data, std::size_t n) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> values(-1.0f, 1.0f);
  for (std::size_t i = 0; i < n; ++i) data[i] = values(random);
}

std::unique_ptr<Backend> cpu_backend(std::string_view isa, bool fast) {
  BackendOptions options;
  options.device = "cpu";
  options.threads = settings().threads;
  options.fast = fast;
  return make_cpu_backend(options, isa);
}

void count(benchmark::State& state, const Work& work) {
  const auto rate = [](double each) {
    return benchmark::Counter(each, benchmark::Counter::kIsIterationInvariantRate);
  };
  if (work.bytes > 0) state.counters["GB/s"] = rate(work.bytes / 1e9);
  if (work.operations > 0) state.counters["GOP/s"] = rate(work.operations / 1e9);
  if (work.peak_gb_s > 0) state.counters["of_read"] = rate(work.bytes / 1e9 / work.peak_gb_s);
  if (work.peak_gop_s > 0) {
    state.counters["of_peak"] = rate(work.operations / 1e9 / work.peak_gop_s);
  }
}

}  // namespace camelid::benchmarks

int main(int argc, char** argv) {
  using namespace camelid::benchmarks;
  read_threads(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("camelid_threads", std::to_string(settings().threads));
  register_peaks();
  register_matmul();
  register_attention();
  register_norm();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
