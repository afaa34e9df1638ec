// What the bf16 dot products of Cooper Lake, Sapphire Rapids and Zen 4 add to AVX-512 with VNNI.
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

#if defined(__AVX512BF16__)

namespace camelid::cpu {
namespace {

#include "cpu/simd_avx512.h"

#include "cpu/panels.inl"

#include "cpu/bf16.inl"

#include "cpu/vectors.inl"

#include "cpu/attention_tiles.inl"

#include "cpu/attention_bf16.inl"

#include "cpu/attention.inl"

}  // namespace

bool add_avx512bf16_kernels(Kernels& table) {
  table.name = "avx512bf16";
  table.matmul_bf16 = matmul_bf16;
  table.round_row = round_row;
  table.attend_bf16 = attend_pieces<Bf16>;
  return true;
}

}  // namespace camelid::cpu

#else

namespace camelid::cpu {
bool add_avx512bf16_kernels(Kernels&) { return false; }
}  // namespace camelid::cpu

#endif
