// All but the products of floats, with the integer dot products of VNNI: Cascade Lake, Zen 4.
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

#if defined(__AVX512VNNI__)

namespace camelid::cpu {
namespace {

#include "cpu/simd_avx512.h"

// 24 of 32 registers accumulate, 4 hold weights, 1 an input.
constexpr int kIntegerRows = 6;
constexpr int kIntegerPanels = 4;

#include "cpu/panels.inl"

#include "cpu/vectors.inl"

#include "cpu/rows.inl"

#include "cpu/integer.inl"

#include "cpu/attention_tiles.inl"

#include "cpu/attention_bytes.inl"

#include "cpu/attention.inl"

#include "cpu/attend.inl"

}  // namespace

bool add_avx512vnni_kernels(Kernels& table) {
  table.name = "avx512vnni";
  table.matmul_int8 = matmul_int8;
  table.quantize_row = quantize_row;
  table.norm_row = norm_row;
  table.layer_norm_row = layer_norm_row;
  table.add_row = add_row;
  table.gelu_row = gelu_row;
  table.silu_mul_row = silu_mul_row;
  table.store_kv = store_kv;
  table.attend_scratch_floats = attend_scratch_floats;
  table.attend = attend;
  table.attend_partial_floats = attend_partial_floats;
  table.merge_attention = merge_attention;
  return true;
}

}  // namespace camelid::cpu

#else

namespace camelid::cpu {
bool add_avx512vnni_kernels(Kernels&) { return false; }
}  // namespace camelid::cpu

#endif
