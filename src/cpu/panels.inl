// What matrix products over packed panels (packed.h) share: where words, scales and zero points of
// a panel lie, and how a finished dot product is written. Included inside the anonymous namespace
// of each isa_*.cpp after simd_*.h.

constexpr int kLanes = 16;

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <WeightFormat F>
struct Packing {
  static constexpr int kBits = F == WeightFormat::kF32    ? 32
                               : F == WeightFormat::kInt8 ? 8
                               : F == WeightFormat::kInt4 ? 4
                                                          : 16;
  static constexpr int kPerWord = 32 / kBits;
  static constexpr bool kScaled = kBits < 16;
};

inline const std::uint32_t* panel_words(const Segment& w, std::int64_t panel) {
  return w.words + panel * w.n_words * kLanes;
}

inline Vec group_scale(const Segment& w, std::int64_t panel, std::int64_t group) {
  const std::int64_t at = (panel * w.n_groups + group) * kLanes;
  switch (w.scale_dtype) {
    case DType::kBf16:
      return Vec::load_bf16(static_cast<const std::uint16_t*>(w.scales) + at);
    case DType::kF16:
      return Vec::load_f16(static_cast<const std::uint16_t*>(w.scales) + at);
    default:
      return Vec::load(static_cast<const float*>(w.scales) + at);
  }
}

// What to subtract from value<F>(), which already has 2^(bits-1) subtracted.
template <WeightFormat F>
inline Vec group_zero(const Segment& w, std::int64_t panel, std::int64_t group) {
  const Vec half = Vec::set(static_cast<float>(1 << (Packing<F>::kBits - 1)));
  return Vec::load_u8(w.zeros + (panel * w.n_groups + group) * kLanes) - half;
}

// Which row of x row `r` of the task is.
inline std::int64_t source_row(const MatmulTask& task, std::int64_t r) {
  return task.rows == nullptr ? task.first_row + r : task.rows[r];
}

// Writes (or adds) the lanes of a finished dot product that are outputs.
inline void finish(float* y, Vec dot, std::int64_t n_outputs, bool accumulate) {
  const int n = static_cast<int>(least(n_outputs, kLanes));
  if (accumulate) {
    if (n == kLanes) {
      dot = Vec::load(y) + dot;
    } else {
      float old[kLanes] = {};
      for (int i = 0; i < n; ++i) old[i] = y[i];
      dot = Vec::load(old) + dot;
    }
  }
  if (n == kLanes) {
    dot.store(y);
  } else {
    dot.store_first(y, n);
  }
}
