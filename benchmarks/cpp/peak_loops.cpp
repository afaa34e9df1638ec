#include "peak_loops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace camelid::benchmarks {

#if defined(__x86_64__)
namespace {

// Independent accumulators: enough to cover a latency of 5 cycles at two instructions a cycle, few
// enough for the 16 registers of AVX2.
constexpr int kChains = 12;

// The empty asm makes the operand look new each time, so nothing is hoisted or shared.
#define CAMELID_CHAINS(STEP) \
  STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)

#define CAMELID_PEAK_LOOP(NAME, TARGET, ACC, ZERO, IN, CONSTRAINT, NEXT)                 \
  __attribute__((target(TARGET), noinline)) void NAME(std::int64_t turns) {              \
    ACC c0 = ZERO, c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0;                          \
    ACC c6 = c0, c7 = c0, c8 = c0, c9 = c0, c10 = c0, c11 = c0;                          \
    IN a, b; /* not zeros, which are cheaper to multiply and may be folded away */       \
    __builtin_memset(&a, 0x3c, sizeof a);                                                \
    __builtin_memset(&b, 0x3c, sizeof b);                                                \
    asm volatile("" : "+" CONSTRAINT(b));                                                \
    for (; turns > 0; --turns) {                                                         \
      CAMELID_CHAINS(NEXT)                                                               \
    }                                                                                    \
    asm volatile("" ::CONSTRAINT(c0), CONSTRAINT(c1), CONSTRAINT(c2), CONSTRAINT(c3));   \
    asm volatile("" ::CONSTRAINT(c4), CONSTRAINT(c5), CONSTRAINT(c6), CONSTRAINT(c7));   \
    asm volatile("" ::CONSTRAINT(c8), CONSTRAINT(c9), CONSTRAINT(c10), CONSTRAINT(c11)); \
  }

#define CAMELID_FMA256(I)     \
  asm volatile("" : "+x"(a)); \
  c##I = _mm256_fmadd_ps(a, b, c##I);
CAMELID_PEAK_LOOP(run_fma256, "avx2,fma", __m256, _mm256_setzero_ps(), __m256, "x", CAMELID_FMA256)

// As a kernel would: bytes to 16-bit pairs, added up before they are widened.
#define CAMELID_MADDUBS(I)    \
  asm volatile("" : "+x"(a)); \
  c##I = _mm256_add_epi16(c##I, _mm256_maddubs_epi16(a, b));
CAMELID_PEAK_LOOP(run_maddubs256, "avx2", __m256i, _mm256_setzero_si256(), __m256i, "x",
                  CAMELID_MADDUBS)

#define CAMELID_FMA512(I)     \
  asm volatile("" : "+v"(a)); \
  c##I = _mm512_fmadd_ps(a, b, c##I);
CAMELID_PEAK_LOOP(run_fma512, "avx512f", __m512, _mm512_setzero_ps(), __m512, "v", CAMELID_FMA512)

#define CAMELID_VNNI256(I)    \
  asm volatile("" : "+v"(a)); \
  c##I = _mm256_dpbusd_epi32(c##I, a, b);
CAMELID_PEAK_LOOP(run_vnni256, "avx512f,avx512vl,avx512vnni", __m256i, _mm256_setzero_si256(),
                  __m256i, "v", CAMELID_VNNI256)

#define CAMELID_VNNI512(I)    \
  asm volatile("" : "+v"(a)); \
  c##I = _mm512_dpbusd_epi32(c##I, a, b);
CAMELID_PEAK_LOOP(run_vnni512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), __m512i, "v",
                  CAMELID_VNNI512)

#define CAMELID_BF16(I)       \
  asm volatile("" : "+v"(a)); \
  c##I = _mm512_dpbf16_ps(c##I, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
CAMELID_PEAK_LOOP(run_bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(), __m512i, "v",
                  CAMELID_BF16)

bool has_fma256() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx2() { return __builtin_cpu_supports("avx2"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
}
bool has_bf16() { return __builtin_cpu_supports("avx512bf16"); }

// Operations: chains x products of one instruction x 2.
constexpr PeakLoop kLoops[] = {
    {"fma256", Products::kFloat, kChains * 8 * 2, run_fma256, has_fma256},
    {"fma512", Products::kFloat, kChains * 16 * 2, run_fma512, has_avx512},
    {"bf16", Products::kBf16, kChains * 32 * 2, run_bf16, has_bf16},
    {"maddubs256", Products::kInt8, kChains * 32 * 2, run_maddubs256, has_avx2},
    {"vnni256", Products::kInt8, kChains * 32 * 2, run_vnni256, has_vnni},
    {"vnni512", Products::kInt8, kChains * 64 * 2, run_vnni512, has_vnni},
};

__attribute__((target("avx2"))) std::uint64_t read_avx2(const char* data, std::size_t bytes) {
  __m256i sums[8] = {};
  for (const char* end = data + bytes; data < end; data += 256) {
    for (int i = 0; i < 8; ++i) {
      const auto* from = reinterpret_cast<const __m256i*>(data + 32 * i);
      sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256(from));
    }
  }
  for (int i = 1; i < 8; ++i) sums[0] = _mm256_xor_si256(sums[0], sums[i]);
  return static_cast<std::uint64_t>(_mm256_extract_epi64(sums[0], 0));
}

}  // namespace
#endif  // x86-64

std::span<const PeakLoop> peak_loops() {
#if defined(__x86_64__)
  return kLoops;
#else
  return {};
#endif
}

std::uint64_t read_all(const void* data, std::size_t bytes) {
#if defined(__x86_64__)
  if (has_avx2()) return read_avx2(static_cast<const char*>(data), bytes);
#endif
  const auto* words = static_cast<const std::uint64_t*>(data);
  std::uint64_t sums[32] = {};
  for (std::size_t at = 0; at < bytes / 8; at += 32) {
    for (std::size_t i = 0; i < 32; ++i) sums[i] ^= words[at + i];
  }
  for (std::size_t i = 1; i < 32; ++i) sums[0] ^= sums[i];
  return sums[0];
}

}  // namespace camelid::benchmarks
