// Attention of one layer of Scout through Backend::attend, per cache type and instruction set: one
// token behind many (decode, bound by reading the cache) and 512 tokens (prefill, bound by
// arithmetic). Caches are cold each time.
#include <array>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "common.h"
#include "cpu/kernels.h"
#include "peaks.h"

namespace camelid::benchmarks {
namespace {

constexpr std::int64_t kHeads = 40;
constexpr std::int64_t kKvHeads = 8;
constexpr std::int64_t kHeadDim = 128;
constexpr std::int64_t kPageSize = 64;  // tokens

struct CacheType {
  const char* name;
  KvType type;
  double element_bytes;
  bool fast;
};
constexpr std::array kTypes = {
    CacheType{"f32", KvType::kF32, 4, false}, CacheType{"bf16", KvType::kBf16, 2, false},
    CacheType{"bf16-fast", KvType::kBf16, 2, true}, CacheType{"int8", KvType::kInt8, 1, false}};

// What bounds many rows. Of int8, whose other factor has 16 bits, each product is two.
double peak_gop_s(const CacheType& type) {
  if (type.type == KvType::kInt8) return int8_peak_gop_s() / 2;
  return type.fast ? bf16_peak_gop_s() : float_peak_gop_s();
}

// A cache of `n_tokens` in enough layers to be cold, and one step of `n_rows` at its end.
class Cache {
 public:
  Cache(Backend& backend, KvType type, std::int64_t n_tokens, std::int64_t n_rows) {
    KvPages& pages = plan_.global.pages;
    pages.page_size = kPageSize;
    pages.n_layers = 1;
    pages.n_kv_heads = kKvHeads;
    pages.head_dim = kHeadDim;
    pages.type = type;
    const std::int64_t n_pages = (n_tokens + kPageSize - 1) / kPageSize;
    const std::size_t layer_bytes = backend.page_bytes(pages) * static_cast<std::size_t>(n_pages);
    pages.n_layers = static_cast<std::int64_t>(copies_for(layer_bytes));
    pages.page_bytes = backend.page_bytes(pages);
    memory_ = backend.allocate(pages.page_bytes * static_cast<std::size_t>(n_pages));
    std::memset(memory_.data.get(), 0x3c, memory_.bytes);  // 0.012 as float32 and as bf16
    pages.base = memory_.data.get();
    table_.resize(static_cast<std::size_t>(n_pages));
    std::iota(table_.begin(), table_.end(), 0);
    plan_.global.n_heads = kHeads;
    plan_.global.spans = {{0, n_rows, n_tokens - n_rows, table_.data()}};
  }
  const StepPlan& plan() const { return plan_; }
  std::int64_t n_layers() const { return plan_.global.pages.n_layers; }

 private:
  Buffer memory_;
  std::vector<std::int32_t> table_;
  StepPlan plan_;
};

void attend(benchmark::State& state, const CacheType& type, std::string_view isa,
            std::int64_t n_tokens, std::int64_t n_rows) {
  const auto backend = cpu_backend(isa, type.fast);
  const Cache cache(*backend, type.type, n_tokens, n_rows);
  constexpr std::int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
  std::vector<float> qkv(static_cast<std::size_t>(n_rows * kQkv));
  std::vector<float> y(static_cast<std::size_t>(n_rows * kHeads * kHeadDim));
  fill_values(qkv.data(), qkv.size());
  AttentionLayer layer;
  backend->begin(cache.plan());
  for (auto _ : state) {
    backend->attend({y.data(), n_rows, kHeads * kHeadDim, kHeads * kHeadDim},
                    {qkv.data(), n_rows, kQkv, kQkv}, layer);
    layer.kv_layer = (layer.kv_layer + 1) % cache.n_layers();
  }
  Work work;
  work.bytes = 2.0 * type.element_bytes * static_cast<double>(n_tokens * kKvHeads * kHeadDim);
  // Each row sees the tokens before it and itself: scores and values, a multiply and an add each.
  const double pairs =
      static_cast<double>(n_rows) * (static_cast<double>(n_tokens) - 0.5 * (n_rows - 1.0));
  work.operations = 4.0 * pairs * static_cast<double>(kHeads * kHeadDim);
  work.peak_gb_s = read_peak_gb_s();
  work.peak_gop_s = peak_gop_s(type);
  count(state, work);
}

void add(const CacheType& type, std::string_view isa, std::int64_t n_tokens, std::int64_t n_rows) {
  const std::string name = "attend/" + std::string(type.name) + "/" + std::string(isa) +
                           "/tokens:" + std::to_string(n_tokens) +
                           "/rows:" + std::to_string(n_rows);
  const auto body = [=](benchmark::State& state) { attend(state, type, isa, n_tokens, n_rows); };
  benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime()->Unit(benchmark::kMillisecond);
}

}  // namespace

void register_attention() {
  for (const CacheType& type : kTypes) {
    for (const std::string_view isa : cpu::supported_isas()) {
      if (type.fast && isa != "avx512bf16") continue;
      for (const std::int64_t n_tokens : {512, 8192, 32768}) {
        if (isa == "scalar" && n_tokens > 512) continue;
        add(type, isa, n_tokens, 1);
        if (n_tokens <= 8192) add(type, isa, n_tokens, 512);
      }
    }
  }
}

}  // namespace camelid::benchmarks
