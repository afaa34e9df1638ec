// AVX-512 F, BW, DQ and VL: servers from 2017 on, Zen 4 and later.
// Compiled with flags of its own, so nothing here may instantiate inline functions or templates of
// another header: the linker could keep this copy for machines that lack the instructions.
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 header for a mistake
// (gcc.gnu.org/PR105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

namespace camelid::cpu {
namespace {

#include "cpu/simd_avx512.h"

constexpr const char* kTableName = "avx512";
// 24 of 32 registers accumulate, 4 hold weights, 1 an input.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 4;

constexpr int kIntegerRows = 6;
constexpr int kIntegerPanels = 4;

#include "cpu/table.inl"

}  // namespace

bool add_avx512_kernels(Kernels& table) {
  table = kTable;
  return true;
}

}  // namespace camelid::cpu

#else

namespace camelid::cpu {
bool add_avx512_kernels(Kernels&) { return false; }
}  // namespace camelid::cpu

#endif
