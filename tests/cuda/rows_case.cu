// C functions over what works row by row and over the best logits, for tests.
#include "case.h"
#include "ops/rows.h"

using namespace camelid::cuda;

extern "C" {

struct CaseRows {
  void* data;
  std::int32_t n_rows, dim;
  std::int64_t stride;
  std::int32_t bf16;
};

static Rows rows_of(const CaseRows& r) {
  return {r.data, r.n_rows, r.dim, r.stride, r.bf16 != 0 ? Element::kBf16 : Element::kF32};
}

int case_embed_plain(const CaseRows* y, const std::int32_t* tokens, const std::uint16_t* table,
                     std::int64_t stride) {
  return caught([&] {
    Table t;
    t.plain = table;
    t.stride = stride;
    embed(rows_of(*y), tokens, t, stream);
  });
}

struct CaseTable {
  std::int32_t rows, inputs, entries, bits, scales, order;
};

int case_embed_tiled(const CaseRows* y, const std::int32_t* tokens, const CaseTable* s,
                     const std::byte* tiles, const std::byte* scales) {
  return caught([&] {
    Table t;
    t.tiled = {{s->rows, s->inputs, s->entries, static_cast<Bits>(s->bits),
                static_cast<Scales>(s->scales), static_cast<RowOrder>(s->order)},
               {tiles, scales}};
    embed(rows_of(*y), tokens, t, stream);
  });
}

int case_rms_norm(const CaseRows* y, const CaseRows* x, const float* gain, float eps) {
  return caught([&] { rms_norm(rows_of(*y), rows_of(*x), gain, eps, stream); });
}

int case_layer_norm(const CaseRows* y, const CaseRows* x, const float* gain, const float* bias,
                    float eps) {
  return caught([&] { layer_norm(rows_of(*y), rows_of(*x), gain, bias, eps, stream); });
}

int case_add_bias(const CaseRows* y, const float* bias) {
  return caught([&] { add_bias(rows_of(*y), bias, stream); });
}

int case_gelu(const CaseRows* y) {
  return caught([&] { gelu(rows_of(*y), stream); });
}

int case_copy_rows(const CaseRows* y, const CaseRows* x, const std::int32_t* rows) {
  return caught([&] { copy_rows(rows_of(*y), rows_of(*x), rows, stream); });
}

}  // extern "C"
