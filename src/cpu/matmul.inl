// Matrix products over packed panels (packed.h). Included by each isa_*.cpp inside its anonymous
// namespace after panels.inl; that file also sets kTileRows x kTilePanels, the accumulators that
// fit its registers. Two ways to the same numbers:
//   direct  few rows: words are unpacked in registers and used at once; bound by memory
//   tiled   many rows: a block of inputs is unpacked to float scratch once, for all rows
// Both form, for each output, acc = fma(x, w, acc) over the inputs in index order; scaled formats
// do so per group with w = q - zero_point (exact) and then total = fma(scale, acc, total). That
// order never depends on rows, panels or blocks, so neither do the bits of the result.

constexpr std::int64_t kDirectRows = 4 * kTileRows;  // up to here unpacking in registers wins
constexpr std::int64_t kBlockInputs = 128;           // 128 inputs x 4 panels x 16 floats are 32 KiB
constexpr std::int64_t kBlockRows = 192;  // a multiple of kTileRows; partial sums stay in L2

// ---- direct -------------------------------------------------------------------------------------

// Where R rows and P panels have got to.
template <int R, int P>
struct DirectTile {
  const float* x[R];
  const std::uint32_t* words[P];
  Vec zero[P];
  Vec acc[R][P];
};

// Adds inputs [first, first + n) of one word, n <= values per word. Known n unrolls.
template <WeightFormat F, bool kZeros, int R, int P>
inline __attribute__((always_inline)) void add_word(DirectTile<R, P>& t, std::int64_t word, int n) {
  Words packed[P];
  for (int p = 0; p < P; ++p) packed[p] = Words::load(t.words[p] + word * kLanes);
  const std::int64_t first = word * Packing<F>::kPerWord;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    Vec w[P];
    for (int p = 0; p < P; ++p) {
      w[p] = value<F>(packed[p], i);
      if constexpr (kZeros) w[p] = w[p] - t.zero[p];
    }
    for (int r = 0; r < R; ++r) {
      const Vec x = Vec::set(t.x[r][first + i]);
      for (int p = 0; p < P; ++p) t.acc[r][p] = fma(x, w[p], t.acc[r][p]);
    }
  }
}

// Adds inputs [first, last); first lies on a word boundary.
template <WeightFormat F, bool kZeros, int R, int P>
inline __attribute__((always_inline)) void add_inputs(DirectTile<R, P>& t, std::int64_t first,
                                                      std::int64_t last) {
  constexpr int kPerWord = Packing<F>::kPerWord;
  const std::int64_t whole = last / kPerWord;
  for (std::int64_t word = first / kPerWord; word < whole; ++word) {
    add_word<F, kZeros>(t, word, kPerWord);
  }
  if (last % kPerWord != 0) add_word<F, kZeros>(t, whole, static_cast<int>(last % kPerWord));
}

template <WeightFormat F, bool kZeros, int R, int P>
void direct_tile(const MatmulTask& task, std::int64_t row, std::int64_t panel) {
  const Segment& w = *task.w;
  DirectTile<R, P> t;
  Vec total[R][P];
  for (int r = 0; r < R; ++r) t.x[r] = task.x + source_row(task, row + r) * task.x_stride;
  for (int p = 0; p < P; ++p) t.words[p] = panel_words(w, panel + p);
  for (auto& of_row : total) {
    for (Vec& sum : of_row) sum = Vec::zero();
  }
  const std::int64_t n_groups = Packing<F>::kScaled ? w.n_groups : 1;
  const std::int64_t group_size = Packing<F>::kScaled ? w.group_size : w.in_dim;
  for (std::int64_t g = 0; g < n_groups; ++g) {
    for (auto& of_row : t.acc) {
      for (Vec& sum : of_row) sum = Vec::zero();
    }
    if constexpr (kZeros) {
      for (int p = 0; p < P; ++p) t.zero[p] = group_zero<F>(w, panel + p, g);
    }
    add_inputs<F, kZeros>(t, g * group_size, least((g + 1) * group_size, w.in_dim));
    if constexpr (Packing<F>::kScaled) {
      for (int p = 0; p < P; ++p) {
        const Vec scale = group_scale(w, panel + p, g);
        for (int r = 0; r < R; ++r) total[r][p] = fma(scale, t.acc[r][p], total[r][p]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) {
      const std::int64_t out = (panel + p) * kLanes;
      finish(task.y + (row + r) * task.y_stride + w.first_out + out,
             Packing<F>::kScaled ? total[r][p] : t.acc[r][p], w.out_dim - out, task.accumulate);
    }
  }
}

template <WeightFormat F, bool kZeros, int R>
void direct_rows(const MatmulTask& task, std::int64_t row, std::int64_t first, std::int64_t last) {
  constexpr int kFit = kTileRows * kTilePanels / R;  // panels whose sums fit the registers
  constexpr int kWide = kFit >= 4 && kTilePanels > 1 ? 4 : kFit >= 2 ? 2 : 1;
  std::int64_t panel = first;
  for (; panel + kWide <= last; panel += kWide) {
    direct_tile<F, kZeros, R, kWide>(task, row, panel);
  }
  for (; panel < last; ++panel) direct_tile<F, kZeros, R, 1>(task, row, panel);
}

template <WeightFormat F, bool kZeros, int R>
void direct_some(const MatmulTask& task, std::int64_t row, std::int64_t n_rows, std::int64_t first,
                 std::int64_t last) {
  if (n_rows == R) {
    direct_rows<F, kZeros, R>(task, row, first, last);
  } else if constexpr (R > 1) {
    direct_some<F, kZeros, R - 1>(task, row, n_rows, first, last);
  }
}

// Rows in passes of at most kTileRows, as even as may be. Later passes find the four panels' words
// in the cache.
template <WeightFormat F, bool kZeros>
void direct_all(const MatmulTask& task, std::int64_t first, std::int64_t last) {
  const std::int64_t passes = (task.n_rows + kTileRows - 1) / kTileRows;
  const std::int64_t step = (task.n_rows + passes - 1) / passes;
  const std::int64_t width = passes == 1 ? last - first : 4;
  for (std::int64_t panel = first; panel < last; panel += width) {
    for (std::int64_t row = 0; row < task.n_rows; row += step) {
      direct_some<F, kZeros, kTileRows>(task, row, least(step, task.n_rows - row), panel,
                                        least(panel + width, last));
    }
  }
}

// ---- tiled --------------------------------------------------------------------------------------

// Partial sums [kBlockRows][kTilePanels][16], then totals likewise, then the unpacked weights
// [kTilePanels][kBlockInputs][16], then scales [kTilePanels][kBlockInputs / 4][16].
constexpr std::int64_t kSumStride = kTilePanels * kLanes;
constexpr std::int64_t kSumFloats = kBlockRows * kSumStride;
constexpr std::int64_t kWeightFloats = kTilePanels * kBlockInputs * kLanes;
constexpr std::int64_t kScaleFloats = kWeightFloats / 4;

// One run of inputs inside one group, for R rows and P panels.
struct TileStep {
  const float* x[kTileRows];
  const float* w;         // [n][16] for each panel
  std::int64_t w_stride;  // floats from one panel to the next
  std::int64_t n;         // inputs
  bool begins;            // the group: sums start at zero, else from `partial`
  bool ends;  // the group, and there are scales: fold into `total`, else store to `partial`
  bool first_group;
  const float* scales;  // [16] for each panel, scale_stride apart
  std::int64_t scale_stride;
  float* partial;  // rows kSumStride apart
  float* total;
};

template <int R, int P>
void multiply_tile(const TileStep& s) {
  Vec acc[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) {
      acc[r][p] = s.begins ? Vec::zero() : Vec::load(s.partial + r * kSumStride + p * kLanes);
    }
  }
  const float* w = s.w;
  for (std::int64_t i = 0; i < s.n; ++i, w += kLanes) {
    Vec column[P];
    for (int p = 0; p < P; ++p) column[p] = Vec::load(w + p * s.w_stride);
    for (int r = 0; r < R; ++r) {
      const Vec value = Vec::set(s.x[r][i]);
      for (int p = 0; p < P; ++p) acc[r][p] = fma(value, column[p], acc[r][p]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) {
      const std::int64_t at = r * kSumStride + p * kLanes;
      if (!s.ends) {
        acc[r][p].store(s.partial + at);
        continue;
      }
      const Vec total = s.first_group ? Vec::zero() : Vec::load(s.total + at);
      fma(Vec::load(s.scales + p * s.scale_stride), acc[r][p], total).store(s.total + at);
    }
  }
}

template <int R, int P>
void multiply_rows(TileStep step, std::int64_t n_rows) {
  if (n_rows >= R) {
    multiply_tile<R, P>(step);
  } else if constexpr (R > 1) {
    multiply_rows<R - 1, P>(step, n_rows);
  }
}

// Unpacks inputs [first, last) of one panel as floats without their scale; first is on a word
// boundary.
template <WeightFormat F, bool kZeros>
void unpack_panel(const Segment& w, std::int64_t panel, std::int64_t first, std::int64_t last,
                  float* out) {
  constexpr int kPerWord = Packing<F>::kPerWord;
  const std::uint32_t* words = panel_words(w, panel);
  std::int64_t next_group = kZeros ? first / w.group_size : 0;
  Vec zero = Vec::zero();
  for (std::int64_t i = first; i < last; i += kPerWord) {
    if constexpr (kZeros) {
      if (i == first || i == next_group * w.group_size) {
        zero = group_zero<F>(w, panel, next_group);
        ++next_group;
      }
    }
    const Words packed = Words::load(words + i / kPerWord * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < kPerWord; ++k, out += kLanes) {
      Vec v = value<F>(packed, k);
      if constexpr (kZeros) v = v - zero;
      v.store(out);
    }
  }
}

// Multiplies one block of inputs [first, last) of P panels by all rows of the block.
template <WeightFormat F, bool kZeros, int P>
void multiply_block(const MatmulTask& task, std::int64_t panel, std::int64_t first,
                    std::int64_t last, float* scratch) {
  const Segment& w = *task.w;
  float* partial = scratch;
  float* total = partial + kSumFloats;
  float* weights = total + kSumFloats;
  float* scales = weights + kWeightFloats;
  const std::int64_t group_size = Packing<F>::kScaled ? w.group_size : w.in_dim;
  const std::int64_t first_group = first / group_size;
  TileStep step{};
  step.scale_stride = kScaleFloats / kTilePanels;
  step.w_stride = kWeightFloats / kTilePanels;
  const float* tile = weights;
  if constexpr (F == WeightFormat::kF32) {  // already what unpacking would give
    tile = reinterpret_cast<const float*>(panel_words(w, panel)) + first * kLanes;
    step.w_stride = w.n_words * kLanes;
  } else {
    for (int p = 0; p < P; ++p) {
      unpack_panel<F, kZeros>(w, panel + p, first, last, weights + p * step.w_stride);
    }
  }
  if constexpr (Packing<F>::kScaled) {
    for (int p = 0; p < P; ++p) {
      for (std::int64_t g = first_group; g * group_size < last; ++g) {
        group_scale(w, panel + p, g)
            .store(scales + p * step.scale_stride + (g - first_group) * kLanes);
      }
    }
  }
  for (std::int64_t row = 0; row < task.n_rows; row += kTileRows) {
    step.partial = partial + row * kSumStride;
    step.total = total + row * kSumStride;
    for (std::int64_t i = first; i < last;) {
      const std::int64_t group = i / group_size;
      const std::int64_t end = least((group + 1) * group_size, last);
      for (std::int64_t r = 0; r < least(kTileRows, task.n_rows - row); ++r) {
        step.x[r] = task.x + source_row(task, row + r) * task.x_stride + i;
      }
      step.w = tile + (i - first) * kLanes;
      step.n = end - i;
      step.begins = i == group * group_size;
      step.ends = Packing<F>::kScaled && end == least((group + 1) * group_size, w.in_dim);
      step.first_group = group == 0;
      step.scales = scales + (group - first_group) * kLanes;
      multiply_rows<kTileRows, P>(step, task.n_rows - row);
      i = end;
    }
  }
}

template <WeightFormat F, bool kZeros, int P>
void tiled_panels(const MatmulTask& task, std::int64_t panel, float* scratch) {
  const Segment& w = *task.w;
  for (std::int64_t first = 0; first < w.in_dim; first += kBlockInputs) {
    const std::int64_t last = least(first + kBlockInputs, w.in_dim);
    multiply_block<F, kZeros, P>(task, panel, first, last, scratch);
  }
  const float* sums = scratch + (Packing<F>::kScaled ? kSumFloats : 0);
  for (std::int64_t row = 0; row < task.n_rows; ++row, sums += kSumStride) {
    for (int p = 0; p < P; ++p) {
      const std::int64_t out = (panel + p) * kLanes;
      finish(task.y + row * task.y_stride + w.first_out + out, Vec::load(sums + p * kLanes),
             w.out_dim - out, task.accumulate);
    }
  }
}

template <WeightFormat F, bool kZeros>
void tiled_rows(MatmulTask task, std::int64_t first, std::int64_t last, float* scratch) {
  std::int64_t panel = first;
  for (; panel + kTilePanels <= last; panel += kTilePanels) {
    tiled_panels<F, kZeros, kTilePanels>(task, panel, scratch);
  }
  for (; panel < last; ++panel) tiled_panels<F, kZeros, 1>(task, panel, scratch);
}

// ---- choose -------------------------------------------------------------------------------------

template <WeightFormat F, bool kZeros>
void matmul_as(const MatmulTask& task, std::int64_t first, std::int64_t last, float* scratch) {
  if (task.n_rows <= kDirectRows) {
    return direct_all<F, kZeros>(task, first, last);
  }
  for (std::int64_t row = 0; row < task.n_rows; row += kBlockRows) {
    MatmulTask block = task;
    if (task.rows != nullptr) block.rows += row;
    block.first_row += row;
    block.y += row * task.y_stride;
    block.n_rows = least(kBlockRows, task.n_rows - row);
    tiled_rows<F, kZeros>(block, first, last, scratch);
  }
}

std::size_t matmul_scratch_floats(const Segment&, std::int64_t n_rows) {
  if (n_rows <= kDirectRows) return 0;
  return static_cast<std::size_t>(2 * kSumFloats + kWeightFloats + kScaleFloats);
}

void matmul(const MatmulTask& task, std::int64_t first_panel, std::int64_t last_panel,
            float* scratch) {
  const bool zeros = task.w->zeros != nullptr;
  switch (task.w->format) {
    case WeightFormat::kF32:
      return matmul_as<WeightFormat::kF32, false>(task, first_panel, last_panel, scratch);
    case WeightFormat::kF16:
      return matmul_as<WeightFormat::kF16, false>(task, first_panel, last_panel, scratch);
    case WeightFormat::kBf16:
      return matmul_as<WeightFormat::kBf16, false>(task, first_panel, last_panel, scratch);
    case WeightFormat::kInt8:
      return zeros ? matmul_as<WeightFormat::kInt8, true>(task, first_panel, last_panel, scratch)
                   : matmul_as<WeightFormat::kInt8, false>(task, first_panel, last_panel, scratch);
    case WeightFormat::kInt4:
      return zeros ? matmul_as<WeightFormat::kInt4, true>(task, first_panel, last_panel, scratch)
                   : matmul_as<WeightFormat::kInt4, false>(task, first_panel, last_panel, scratch);
  }
}

// ---- one row ------------------------------------------------------------------------------------

template <WeightFormat F>
void unpack_row_as(float* y, const Segment& w, std::int64_t row) {
  constexpr int kPerWord = Packing<F>::kPerWord;
  const std::int64_t panel = row / kLanes;
  const std::int64_t lane = row % kLanes;
  const std::uint32_t* words = panel_words(w, panel);
  for (std::int64_t i = 0; i < w.in_dim; ++i) {
    float lanes[kLanes];
    Vec v = value<F>(Words::load(words + i / kPerWord * kLanes), static_cast<int>(i % kPerWord));
    if constexpr (Packing<F>::kScaled) {
      const std::int64_t group = i / w.group_size;
      if (w.zeros != nullptr) v = v - group_zero<F>(w, panel, group);
      v = v * group_scale(w, panel, group);
    }
    v.store(lanes);
    y[i] = lanes[lane];
  }
}

void unpack_row(float* y, const Segment& w, std::int64_t row) {
  switch (w.format) {
    case WeightFormat::kF32:
      return unpack_row_as<WeightFormat::kF32>(y, w, row);
    case WeightFormat::kF16:
      return unpack_row_as<WeightFormat::kF16>(y, w, row);
    case WeightFormat::kBf16:
      return unpack_row_as<WeightFormat::kBf16>(y, w, row);
    case WeightFormat::kInt8:
      return unpack_row_as<WeightFormat::kInt8>(y, w, row);
    case WeightFormat::kInt4:
      return unpack_row_as<WeightFormat::kInt4>(y, w, row);
  }
}
