// RMS norm of rows of Scout's width through Backend::norm, per instruction set; rows are cold where
// there are many, in cache where there is one.
#include <algorithm>
#include <string>
#include <vector>

#include "common.h"
#include "cpu/kernels.h"
#include "peaks.h"

namespace camelid::benchmarks {
namespace {

constexpr std::int64_t kDim = 5120;

void norm(benchmark::State& state, std::string_view isa, std::int64_t n_rows) {
  const auto backend = cpu_backend(isa);
  std::vector<float> x(static_cast<std::size_t>(n_rows * kDim));
  std::vector<float> y(x.size());
  fill_values(x.data(), x.size());
  const std::vector<float> ones(static_cast<std::size_t>(kDim), 1.0f);
  const Buffer gain = backend->upload(ones);
  for (auto _ : state) {
    backend->norm({x.data(), n_rows, kDim, kDim}, {{y.data(), n_rows, kDim, kDim}, &gain, 1e-5f});
  }
  // Read and written once each.
  Work work;
  work.bytes = 8.0 * static_cast<double>(n_rows * kDim);
  work.peak_gb_s = read_peak_gb_s();
  count(state, work);
}

}  // namespace

void register_norm() {
  for (const std::string_view isa : cpu::supported_isas()) {
    for (const std::int64_t n_rows : {1, 512, 16384}) {
      const std::string name = "norm/" + std::string(isa) + "/rows:" + std::to_string(n_rows);
      const auto body = [=](benchmark::State& state) { norm(state, isa, n_rows); };
      benchmark::RegisterBenchmark(name.c_str(), body)
          ->UseRealTime()
          ->Unit(benchmark::kMicrosecond);
    }
  }
}

}  // namespace camelid::benchmarks
