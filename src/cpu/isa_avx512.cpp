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

// 24 of 32 registers accumulate, 4 hold weights, 1 an input.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 4;

// Each builds on those before it, so blank lines keep them from being sorted.
#include "cpu/matmul.inl"

#include "cpu/rows.inl"

#include "cpu/attention.inl"

constexpr Kernels kTable = {
    .name = "avx512",
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

const Kernels* avx512_kernels() { return &kTable; }

}  // namespace camelid::cpu

#else

namespace camelid::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace camelid::cpu

#endif
