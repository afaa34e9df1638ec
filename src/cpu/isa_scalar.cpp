// Plain C++, for any machine, and the reference the other tables are tested against.
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

namespace camelid::cpu {
namespace {

#include "cpu/simd_scalar.h"

// Half of what 16 SSE registers hold; four to a vector, so larger tiles spill.
constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;

// Each builds on those before it, so blank lines keep them from being sorted.
#include "cpu/matmul.inl"

#include "cpu/rows.inl"

#include "cpu/attention.inl"

constexpr Kernels kTable = {
    .name = "scalar",
    .matmul_scratch_floats = matmul_scratch_floats,
    .matmul = matmul,
    .unpack_row = unpack_row,
    .norm_row = norm_row,
    .silu_mul_row = silu_mul_row,
    .store_kv = store_kv,
    .attend_scratch_floats = attend_scratch_floats,
    .attend = attend,
    .attend_partial_floats = attend_partial_floats,
    .merge_attention = merge_attention,
};

}  // namespace

const Kernels& scalar_kernels() { return kTable; }

}  // namespace camelid::cpu
