// Matrix products of int8 activations with packed int4 and int8 weights. Included inside the
// anonymous namespace of each isa_*.cpp after panels.inl; must never know of threads.
//
//   total[r][o] = sum over blocks, in order, of
//                 (sum_i a[r][i] (q[o][i] - zero)) * a_scale * w_scale
//
// q is unsigned, so the zero point moves out of the sum: each begins at -zero * (sum of the block's
// activations) and is exact in 32 bits. Only the fold into `total` rounds, once for each block and
// in their order: the bits do not depend on rows, panels or cuts, nor on the instruction set where
// fma is fused.

// Words whose products fit the narrowest sums (Dots of simd_avx2.h).
constexpr int kDotWords = 4;
// How far ahead one row, which is bound by memory, asks for words and scales: 6 KiB was measured
// best where two cores could read 83 GB/s (0.78 of it without, 0.88 with); a prefetch never faults.
constexpr std::int64_t kAheadWords = 96;
constexpr std::int64_t kAheadGroups = 16;

template <WeightFormat F, int R, int P>
struct IntegerTile {
  const std::int8_t* x[R];
  const std::uint32_t* words[P];
  Ints sums[R][P];
};

// Adds N words to every sum. Few sums are kept in several chains each, or the latency of one
// product after another, not memory, would set the pace.
template <WeightFormat F, int N, int R, int P>
inline __attribute__((always_inline)) void add_int_words(IntegerTile<F, R, P>& t,
                                                         std::int64_t first) {
  constexpr int kChains = N == 1 || R * P > 4 ? 1 : R * P > 2 ? 2 : 4;
  constexpr int kHalves = Packing<F>::kPerWord / 4;
  Dots<F> dots[kChains][R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      dots[0][r][p] = Dots<F>::begin(t.sums[r][p]);
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) dots[c][r][p] = Dots<F>::begin(Ints::set(0));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N * kHalves; ++i) {
    const std::int64_t word = first + i / kHalves;
    if constexpr (R * P == 1) {
      if (i % kHalves == 0) __builtin_prefetch(t.words[0] + (word + kAheadWords) * kLanes, 0, 3);
    }
    Words w[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      w[p] = Words::load(t.words[p] + word * kLanes);
      if constexpr (F == WeightFormat::kInt4) {
        w[p] = i % kHalves == 0 ? low_nibbles(w[p]) : high_nibbles(w[p]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const std::int8_t* x = t.x[r] + word * Packing<F>::kPerWord + i % kHalves * 4;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) dots[i % kChains][r][p].add(w[p], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      t.sums[r][p] = dots[0][r][p].end();
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) t.sums[r][p] = t.sums[r][p] + dots[c][r][p].end();
    }
  }
}

// The words that will be wanted next, and how many lines of them to ask for with each block.
struct Ahead {
  const std::uint32_t* words;
  std::int64_t lines_per_block;
  void fetch() {
    for (std::int64_t i = 0; i < lines_per_block; ++i, words += kLanes) {
      __builtin_prefetch(words, 0, 2);
    }
  }
};

template <WeightFormat F, bool kZeros, int R, int P>
void integer_tile(const MatmulTask& task, std::int64_t row, std::int64_t panel, Ahead& ahead) {
  constexpr std::int32_t kHalf = 1 << (Packing<F>::kBits - 1);
  constexpr std::int64_t kPerWord = Packing<F>::kPerWord;
  const Segment& w = *task.w;
  const Int8Rows& x = *task.x8;
  IntegerTile<F, R, P> t;
  const float* scales[R];
  const std::int32_t* block_sums[R];
  Vec total[R][P];
  for (int r = 0; r < R; ++r) {
    const std::int64_t from = source_row(task, row + r);
    t.x[r] = x.values + from * x.stride;
    scales[r] = x.scales + from * x.n_blocks;
    block_sums[r] = x.sums + from * x.n_blocks;
    for (int p = 0; p < P; ++p) {
      total[r][p] = Vec::zero();
      // Written once all inputs are read: the line's way from memory is hidden by then.
      __builtin_prefetch(task.y + (row + r) * task.y_stride + w.first_out + (panel + p) * kLanes,
                         1);
    }
  }
  for (int p = 0; p < P; ++p) t.words[p] = panel_words(w, panel + p);
  for (std::int64_t b = 0; b < x.n_blocks; ++b) {
    const std::int64_t group = b * x.block / w.group_size;
    ahead.fetch();
    for (int p = 0; p < P; ++p) {
      Ints zeros = Ints::set(kHalf);
      if constexpr (kZeros)
        zeros = Ints::load_u8(w.zeros + ((panel + p) * w.n_groups + group) * kLanes);
      for (int r = 0; r < R; ++r) {
        t.sums[r][p] =
            kZeros ? Ints::set(-block_sums[r][b]) * zeros : Ints::set(-block_sums[r][b] * kHalf);
      }
    }
    if constexpr (R * P == 1) {
      const std::int64_t ahead = (panel * w.n_groups + group + kAheadGroups) * kLanes;
      __builtin_prefetch(static_cast<const std::uint16_t*>(w.scales) + ahead, 0, 3);
    }
    const std::int64_t end = least((b + 1) * x.block, w.in_dim);
    const std::int64_t last = (end + kPerWord - 1) / kPerWord;
    std::int64_t word = b * x.block / kPerWord;
    for (; word + kDotWords <= last; word += kDotWords) add_int_words<F, kDotWords>(t, word);
    for (; word < last; ++word) add_int_words<F, 1>(t, word);
    for (int p = 0; p < P; ++p) {
      const Vec w_scale = group_scale(w, panel + p, group);
      for (int r = 0; r < R; ++r) {
        const Vec scaled = to_floats(t.sums[r][p]) * Vec::set(scales[r][b]);
        total[r][p] = fma(scaled, w_scale, total[r][p]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) {
      const std::int64_t out = (panel + p) * kLanes;
      finish(task.y + (row + r) * task.y_stride + w.first_out + out, total[r][p], w.out_dim - out,
             task.accumulate);
    }
  }
}

// Panels [first, last) of n_rows <= R rows.
template <WeightFormat F, bool kZeros, int R>
void integer_rows(const MatmulTask& task, std::int64_t row, std::int64_t n_rows, std::int64_t first,
                  std::int64_t last, Ahead& ahead) {
  if constexpr (R > 1) {
    if (n_rows < R) return integer_rows<F, kZeros, R - 1>(task, row, n_rows, first, last, ahead);
  }
  // One row is bound by memory, which likes to be read in one stream.
  constexpr int kPanels = R == 1 ? 1 : kIntegerPanels;
  std::int64_t panel = first;
  for (; panel + kPanels <= last; panel += kPanels) {
    integer_tile<F, kZeros, R, kPanels>(task, row, panel, ahead);
  }
  if constexpr (kPanels > 1) {
    for (; panel < last; ++panel) integer_tile<F, kZeros, R, 1>(task, row, panel, ahead);
  }
}

// Rows in passes as even as may be over a few panels, whose words come from memory once: each block
// of each pass asks for a share of the next panels' words.
template <WeightFormat F, bool kZeros>
void integer_all(const MatmulTask& task, std::int64_t first, std::int64_t last) {
  const Segment& w = *task.w;
  const std::int64_t passes = (task.n_rows + kIntegerRows - 1) / kIntegerRows;
  const std::int64_t width = task.n_rows == 1 ? last - first : kIntegerPanels;
  for (std::int64_t panel = first; panel < last; panel += width) {
    const std::int64_t end = least(panel + width, last);
    // A single pass meets its words in the order the hardware foresees.
    const std::int64_t n_lines = passes == 1 ? 0 : least(width, last - end) * w.n_words;
    const std::int64_t n_blocks = passes * task.x8->n_blocks;
    Ahead ahead{panel_words(w, end), (n_lines + n_blocks - 1) / n_blocks};
    std::int64_t row = 0;
    for (std::int64_t pass = 0; pass < passes; ++pass) {
      const std::int64_t next_row = task.n_rows * (pass + 1) / passes;
      integer_rows<F, kZeros, kIntegerRows>(task, row, next_row - row, panel, end, ahead);
      row = next_row;
    }
  }
}

void matmul_int8(const MatmulTask& task, std::int64_t first_panel, std::int64_t last_panel) {
  const bool zeros = task.w->zeros != nullptr;
  if (task.w->format == WeightFormat::kInt4) {
    zeros ? integer_all<WeightFormat::kInt4, true>(task, first_panel, last_panel)
          : integer_all<WeightFormat::kInt4, false>(task, first_panel, last_panel);
  } else {
    zeros ? integer_all<WeightFormat::kInt8, true>(task, first_panel, last_panel)
          : integer_all<WeightFormat::kInt8, false>(task, first_panel, last_panel);
  }
}
