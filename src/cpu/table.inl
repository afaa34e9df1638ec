// All kernels of one instruction set and their table. Included by each isa_*.cpp inside its
// anonymous namespace, after simd_*.h, kTableName and the sizes of its tiles.

// Each builds on those before it, so blank lines keep them from being sorted.
#include "cpu/panels.inl"

#include "cpu/matmul.inl"

#include "cpu/vectors.inl"

#include "cpu/rows.inl"

#include "cpu/integer.inl"

#include "cpu/attention_tiles.inl"

#include "cpu/attention_bytes.inl"

#include "cpu/attention.inl"

#include "cpu/attend.inl"

#include "cpu/pack.inl"

constexpr Kernels kTable = {
    .name = kTableName,
    .matmul_scratch_floats = matmul_scratch_floats,
    .matmul = matmul,
    .matmul_int8 = matmul_int8,
    .matmul_bf16 = nullptr,
    .round_row = nullptr,
    .quantize_row = quantize_row,
    .unpack_row = unpack_row,
    .norm_row = norm_row,
    .layer_norm_row = layer_norm_row,
    .add_row = add_row,
    .gelu_row = gelu_row,
    .silu_mul_row = silu_mul_row,
    .store_kv = store_kv,
    .attend_scratch_floats = attend_scratch_floats,
    .attend = attend,
    .attend_bf16 = nullptr,
    .attend_partial_floats = attend_partial_floats,
    .merge_attention = merge_attention,
    .pack_words = pack_words,
    .pack_scales = pack_scales,
};
