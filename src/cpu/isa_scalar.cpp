// Plain C++, for any machine, and the reference the other tables are tested against.
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

namespace camelid::cpu {
namespace {

#include "cpu/simd_scalar.h"

constexpr const char* kTableName = "scalar";
// Half of what 16 SSE registers hold; four to a vector, so larger tiles spill.
constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;

constexpr int kIntegerRows = 2;
constexpr int kIntegerPanels = 1;

#include "cpu/table.inl"

}  // namespace

bool add_scalar_kernels(Kernels& table) {
  table = kTable;
  return true;
}

}  // namespace camelid::cpu
