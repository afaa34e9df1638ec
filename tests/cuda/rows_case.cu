// C functions over what works row by row and over the best logits, for tests.
#include <cstring>

#include "case.h"
#include "case_shapes.h"
#include "layout/e4m3.h"
#include "ops/rows.h"
#include "ops/scatter.h"
#include "ops/store_kv.h"
#include "ops/top_logits.h"

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

int case_rms_norm(const CaseRows* y, const CaseRows* x, const std::int32_t* rows, const float* gain,
                  float eps) {
  return caught([&] { rms_norm(rows_of(*y), rows_of(*x), rows, gain, eps, stream); });
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

// ---- keys and values ----

int case_store_kv(const CaseKv* c) {
  return caught([&] { store_kv(store_of(*c), stream); });
}

// sizes: bytes of a page, of a side, of a row, and from a side to its scales.
void case_store_kv_sizes(const CaseKv* c, std::int64_t* sizes) {
  const KvShape shape = kv_shape_of(*c);
  sizes[0] = shape.page_bytes();
  sizes[1] = shape.side_bytes();
  sizes[2] = shape.row_bytes();
  sizes[3] = shape.scales_at();
}

std::int64_t case_kv_keys_at(const CaseKv* c, int layer, int kv_head) {
  return kv_shape_of(*c).keys_at(layer, kv_head);
}

// What every byte of e4m3 means, and the bytes of n values, on the host.
void case_from_e4m3(float* values) {
  for (std::uint32_t code = 0; code < 256; ++code) values[code] = from_e4m3(code);
}
void case_to_e4m3(const float* values, std::uint8_t* codes, int n) {
  for (int i = 0; i < n; ++i) codes[i] = static_cast<std::uint8_t>(to_e4m3(values[i]));
}

// ---- the best logits ----

std::int64_t case_top_logits_bytes(int n_rows, int vocab) {
  return static_cast<std::int64_t>(top_logits_scratch_bytes(n_rows, vocab));
}

int case_top_logits(void* out, const float* logits, std::int64_t stride, const float* factors,
                    int n_rows, int vocab, std::byte* scratch, unsigned* counters) {
  return caught([&] {
    top_logits(static_cast<TopLogits*>(out), logits, stride, {factors, nullptr}, n_rows, vocab,
               scratch, counters, stream);
  });
}
int case_draw(void* out, const float* logits, std::int64_t stride, const float* factors,
              const float* uniforms, int n_rows, int vocab, std::byte* scratch,
              unsigned* counters) {
  return caught([&] {
    top_logits(static_cast<TopLogits*>(out), logits, stride, {factors, uniforms}, n_rows, vocab,
               scratch, counters, stream);
  });
}

// ---- what the host knows of a step ----

// n pieces of the host's memory, one after the other, to where each belongs on the device.
int case_scatter(const std::byte* from, std::byte* const* to, const std::int32_t* n_words,
                 std::int32_t n) {
  return caught([&] {
    Pieces pieces;
    pieces.n = n;
    std::size_t bytes = 0;
    for (std::int32_t i = 0; i < n && i < Pieces::kMost; ++i) {
      pieces.pieces[i] = {to[i], n_words[i]};
      bytes += static_cast<std::size_t>(n_words[i]) * Pieces::kBytes;
    }
    const PinnedMemory pinned = allocate_pinned(bytes + Pieces::kBytes);
    std::memcpy(pinned.get(), from, bytes);
    pieces.from = pinned.get();
    scatter(pieces, stream);
    finish(stream);
  });
}

}  // extern "C"
