// Matrix products through Backend::matmul: every format and instruction set, a few rows (decode,
// bound by reading) and many (prefill, bound by arithmetic). Weights are cold each time.
#include <array>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "common.h"
#include "cpu/kernels.h"
#include "peaks.h"
#include "quant/format.h"

namespace camelid::benchmarks {
namespace {

// Half of an expert's gate and up in Scout.
constexpr std::int64_t kOut = 8192;
constexpr std::int64_t kIn = 5120;
constexpr std::int64_t kGroup = 128;

// A matrix of one format as a checkpoint would hold it, with random contents.
class Source {
 public:
  explicit Source(WeightFormat format) {
    const FormatInfo& info = format_info(format);
    linear_.out_dim = kOut;
    linear_.in_dim = kIn;
    words_.resize(static_cast<std::size_t>(kOut * kIn / info.values_per_word()));
    if (info.scaled) {
      fill_bits(words_.data(), words_.size() * 4);
      scales_.assign(static_cast<std::size_t>(kOut * kIn / kGroup), 0x3b00);  // 2^-9
      linear_.bits = info.bits;
      linear_.group_size = kGroup;
      linear_.words = words_.data();
      linear_.scales = scales_.data();
      linear_.scale_dtype = DType::kBf16;
    } else {
      linear_.dtype = format == WeightFormat::kF32 ? DType::kF32 : DType::kBf16;
      // 0.0078 as bf16, twice in a word; as float32 nearly the same.
      for (std::uint32_t& word : words_) word = 0x3c003c00;
      linear_.data = words_.data();
      linear_.row_stride = kIn;
      linear_.col_stride = 1;
    }
    options_ = {format, kGroup};
  }

  // Copies that together are cold.
  std::vector<std::unique_ptr<Matrix>> pack(Backend& backend) const {
    std::vector<std::unique_ptr<Matrix>> copies;
    do {
      copies.push_back(backend.pack({&linear_, 1}, {&options_, 1}));
    } while (copies.size() < copies_for(copies.front()->bytes));
    return copies;
  }

 private:
  std::vector<std::uint32_t> words_;
  std::vector<std::uint16_t> scales_;
  LinearSource linear_;
  PackOptions options_;
};

// What bounds many rows: the products the backend makes of this format.
double peak_gop_s(WeightFormat format, bool fast) {
  if (!fast) return float_peak_gop_s();
  return format_info(format).scaled ? int8_peak_gop_s() : bf16_peak_gop_s();
}

void multiply(benchmark::State& state, WeightFormat format, std::string_view isa, bool fast,
              std::int64_t n_rows) {
  const auto backend = cpu_backend(isa, fast);
  const auto weights = Source(format).pack(*backend);
  std::vector<float> x(static_cast<std::size_t>(n_rows * kIn));
  std::vector<float> y(static_cast<std::size_t>(n_rows * kOut));
  fill_values(x.data(), x.size());
  const Tensor in{x.data(), n_rows, kIn, kIn};
  const Tensor out{y.data(), n_rows, kOut, kOut};
  std::size_t next = 0;
  for (auto _ : state) {
    backend->matmul(out, in, *weights[next]);
    next = (next + 1) % weights.size();
  }
  Work work;
  work.bytes = static_cast<double>(weights.front()->bytes);
  work.operations = 2.0 * static_cast<double>(n_rows * kIn * kOut);
  work.peak_gb_s = read_peak_gb_s();
  work.peak_gop_s = peak_gop_s(format, fast);
  count(state, work);
}

void add(WeightFormat format, std::string_view isa, bool fast) {
  for (const std::int64_t n_rows : {1, 4, 8, 32, 128, 512}) {
    // Minutes for a number nobody waits for.
    if (isa == "scalar" && n_rows > 8) continue;
    const std::string name = "matmul/" + std::string(format_info(format).name) + "/" +
                             std::string(isa) + (fast ? "/fast" : "/exact") +
                             "/rows:" + std::to_string(n_rows);
    const auto body = [=](benchmark::State& state) { multiply(state, format, isa, fast, n_rows); };
    benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime()->Unit(benchmark::kMillisecond);
  }
}

}  // namespace

void register_matmul() {
  constexpr std::array kFormats = {WeightFormat::kInt4, WeightFormat::kInt8, WeightFormat::kBf16,
                                   WeightFormat::kF32};
  for (const WeightFormat format : kFormats) {
    for (const std::string_view isa : cpu::supported_isas()) {
      const bool in_bf16 = format == WeightFormat::kBf16 && isa == "avx512bf16";
      if (format_info(format).scaled || in_bf16) add(format, isa, true);
      add(format, isa, false);
    }
  }
}

}  // namespace camelid::benchmarks
