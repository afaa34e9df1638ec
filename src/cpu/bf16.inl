// Matrix products of bf16 activations with bf16 weights. Included inside the anonymous namespace of
// isa_avx512bf16.cpp after panels.inl; must never know of threads.
//
// One instruction adds two products to each of 16 float32 sums. Every output has one chain of them
// over its inputs in order, so the bits do not depend on rows, panels or cuts.

constexpr int kBf16Rows = 6;
constexpr int kBf16Panels = 4;

inline __m512bh broadcast_pair(const std::uint16_t* x) {
  std::int32_t two;
  __builtin_memcpy(&two, x, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}

template <int R, int P>
void bf16_tile(const MatmulTask& task, std::int64_t row, std::int64_t panel) {
  const Segment& w = *task.w;
  const std::uint16_t* x[R];
  const std::uint32_t* words[P];
  __m512 sums[R][P];
  for (int r = 0; r < R; ++r) {
    x[r] = task.x16->values + source_row(task, row + r) * task.x16->stride;
    for (int p = 0; p < P; ++p) sums[r][p] = _mm512_setzero_ps();
  }
  for (int p = 0; p < P; ++p) words[p] = panel_words(w, panel + p);
  for (std::int64_t word = 0; word < w.n_words; ++word) {
    __m512bh pairs[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) pairs[p] = (__m512bh)_mm512_loadu_si512(words[p] + word * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh value = broadcast_pair(x[r] + 2 * word);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], pairs[p], value);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) {
      const std::int64_t out = (panel + p) * kLanes;
      finish(task.y + (row + r) * task.y_stride + w.first_out + out, Vec{sums[r][p]},
             w.out_dim - out, task.accumulate);
    }
  }
}

// Panels [first, last) of n_rows <= R rows.
template <int R>
void bf16_rows(const MatmulTask& task, std::int64_t row, std::int64_t n_rows, std::int64_t first,
               std::int64_t last) {
  if constexpr (R > 1) {
    if (n_rows < R) return bf16_rows<R - 1>(task, row, n_rows, first, last);
  }
  std::int64_t panel = first;
  for (; panel + kBf16Panels <= last; panel += kBf16Panels) {
    bf16_tile<R, kBf16Panels>(task, row, panel);
  }
  for (; panel < last; ++panel) bf16_tile<R, 1>(task, row, panel);
}

void matmul_bf16(const MatmulTask& task, std::int64_t first, std::int64_t last) {
  const std::int64_t passes = (task.n_rows + kBf16Rows - 1) / kBf16Rows;
  for (std::int64_t panel = first; panel < last; panel += kBf16Panels) {
    std::int64_t row = 0;
    for (std::int64_t pass = 0; pass < passes; ++pass) {
      const std::int64_t next_row = task.n_rows * (pass + 1) / passes;
      bf16_rows<kBf16Rows>(task, row, next_row - row, panel, least(panel + kBf16Panels, last));
      row = next_row;
    }
  }
}

void round_row(std::uint16_t* values, const float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const std::int64_t left = n - i;
    const auto lanes = static_cast<__mmask16>(left >= kLanes ? 0xffffu : (1u << left) - 1u);
    const __m512 wide = _mm512_maskz_loadu_ps(lanes, x + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), (__m256i)_mm512_cvtneps_pbh(wide));
  }
  for (std::int64_t i = (n + kLanes - 1) / kLanes * kLanes; i % 64 != 0; ++i) values[i] = 0;
}
