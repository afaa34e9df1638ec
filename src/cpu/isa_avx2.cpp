// AVX2, FMA and F16C: x86-64 machines from 2013 on.
// Compiled with flags of its own, so nothing here may instantiate inline functions or templates of
// another header: the linker could keep this copy for machines that lack the instructions.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

namespace camelid::cpu {
namespace {

#include "cpu/simd_avx2.h"

constexpr const char* kTableName = "avx2";
// 12 of 16 registers accumulate (two to a vector), 2 hold weights, 1 an input.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;

constexpr int kIntegerRows = 3;
constexpr int kIntegerPanels = 1;

#include "cpu/table.inl"

}  // namespace

bool add_avx2_kernels(Kernels& table) {
  table = kTable;
  return true;
}

}  // namespace camelid::cpu

#else

namespace camelid::cpu {
bool add_avx2_kernels(Kernels&) { return false; }
}  // namespace camelid::cpu

#endif
