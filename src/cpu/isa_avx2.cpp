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

// 12 of 16 registers accumulate (two to a vector), 2 hold weights, 1 an input.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;

// Each builds on those before it, so blank lines keep them from being sorted.
#include "cpu/matmul.inl"

#include "cpu/rows.inl"

#include "cpu/attention.inl"

constexpr Kernels kTable = {
    .name = "avx2",
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

const Kernels* avx2_kernels() { return &kTable; }

}  // namespace camelid::cpu

#else

namespace camelid::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace camelid::cpu

#endif
