// What one row needs besides matrix products: norms, SiLU and GELU, int8 activations, and finishing
// a row of q, k, v (RoPE, QK norm, query scale) on its way to a KV page. Included inside the
// anonymous namespace of each isa_*.cpp after vectors.inl; must never know of threads, nor call an
// inline function of std (the linker could keep the copy compiled for the wider instruction set).

// 1 / sqrt(mean(x^2) + eps) over n values. Four interleaved sums hide the latency of addition;
// which sum a value joins depends on its index only.
inline float inverse_rms(const float* x, std::int64_t n, float eps) {
  Vec squares[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Vec v = Vec::load(x + i + j * kLanes);
      squares[j] = fma(v, v, squares[j]);
    }
  }
  for (int j = 0; i < n; ++j, i += kLanes) {
    const Vec v = n - i >= kLanes ? Vec::load(x + i) : load_first(x + i, n - i);
    squares[j] = fma(v, v, squares[j]);
  }
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
}

// y[i] = (x[i] / rms(x)) * gain[i], in float32 as transformers' Llama4TextRMSNorm. y may be x.
void norm_row(float* y, const float* x, const float* gain, std::int64_t n, float eps) {
  const Vec inverse = Vec::set(inverse_rms(x, n, eps));
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    ((Vec::load(x + i) * inverse) * Vec::load(gain + i)).store(y + i);
  }
  if (i < n) {
    const Vec scaled = (load_first(x + i, n - i) * inverse) * load_first(gain + i, n - i);
    scaled.store_first(y + i, static_cast<int>(n - i));
  }
}

inline Vec load_up_to(const float* x, std::int64_t n) {
  return n >= kLanes ? Vec::load(x) : load_first(x, n);
}
inline void store_up_to(Vec v, float* y, std::int64_t n) {
  if (n >= kLanes) {
    v.store(y);
  } else {
    v.store_first(y, static_cast<int>(n));
  }
}

// Lanes [0, n) of v, the rest zero.
inline Vec keep_first(Vec v, std::int64_t n) {
  if (n >= kLanes) return v;
  float lanes[kLanes];
  v.store(lanes);
  return load_first(lanes, n);
}

// The mean first, then the variance around it: their one-pass form cancels where the mean is large.
void layer_norm_row(float* y, const float* x, const float* gain, const float* bias, std::int64_t n,
                    float eps) {
  Vec total = Vec::zero();
  for (std::int64_t i = 0; i < n; i += kLanes) total = total + load_up_to(x + i, n - i);
  const Vec mean = Vec::set(sum(total) / static_cast<float>(n));
  Vec squares = Vec::zero();
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec off = keep_first(load_up_to(x + i, n - i) - mean, n - i);
    squares = fma(off, off, squares);
  }
  const Vec inverse = Vec::set(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps));
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec scaled = (load_up_to(x + i, n - i) - mean) * inverse;
    store_up_to(fma(scaled, load_up_to(gain + i, n - i), load_up_to(bias + i, n - i)), y + i,
                n - i);
  }
}

void add_row(float* y, const float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store_up_to(load_up_to(y + i, n - i) + load_up_to(x + i, n - i), y + i, n - i);
  }
}

// gelu(x) = x / 2 * (1 + erf(x / sqrt 2)), erf within 1.5e-7: 1 - t (a1 + t (a2 + ...)) e^-z^2,
// t = 1 / (1 + p |z|). Source: Abramowitz and Stegun 7.1.26.
inline Vec gelu(Vec x) {
  const Vec z = max(x, Vec::zero() - x) * Vec::set(0.70710678f);
  const Vec t = Vec::set(1.0f) / fma(Vec::set(0.3275911f), z, Vec::set(1.0f));
  Vec p = Vec::set(1.061405429f);
  p = fma(p, t, Vec::set(-1.453152027f));
  p = fma(p, t, Vec::set(1.421413741f));
  p = fma(p, t, Vec::set(-0.284496736f));
  p = fma(p, t, Vec::set(0.254829592f));
  const Vec tail = p * t * exp(Vec::zero() - z * z);  // 1 - erf(z)
  // x / 2 * (2 - tail) for positive x, x / 2 * tail for negative: max(x, 0) - |x| / 2 * tail.
  return max(x, Vec::zero()) - z * Vec::set(0.70710678f) * tail;
}

void gelu_row(float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store_up_to(gelu(load_up_to(y + i, n - i)), y + i, n - i);
  }
}

// silu(g) u = g / (1 + e^-g) * u.
inline Vec silu_mul(Vec gate, Vec up) {
  return gate / (Vec::set(1.0f) + exp(Vec::zero() - gate)) * up;
}

// y[i] = silu(factor * gate[i]) * (factor * up[i]): a router's factor on an expert's input, taken
// through two linear maps. y may be gate or up.
void silu_mul_row(float* y, const float* gate, const float* up, float factor, std::int64_t n) {
  const Vec f = Vec::set(factor);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    silu_mul(Vec::load(gate + i) * f, Vec::load(up + i) * f).store(y + i);
  }
  if (i < n) {
    silu_mul(load_first(gate + i, n - i) * f, load_first(up + i, n - i) * f)
        .store_first(y + i, static_cast<int>(n - i));
  }
}

// Quantises one block; returns the sum of its values.
inline std::int32_t quantize_block(std::int8_t* values, float* scale, const float* x,
                                   std::int64_t n) {
  Vec largest = Vec::zero();
  Vec not_finite = Vec::zero();  // 0 * x: NaN where x is infinite or NaN, which max would hide
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load_up_to(x + i, n - i);
    largest = max(largest, max(v, Vec::zero() - v));
    not_finite = fma(v, Vec::zero(), not_finite);
  }
  const float most = maximum(largest);
  const Vec inverse = Vec::set(most > 0.0f ? 127.0f / most : 0.0f);
  Vec total = Vec::zero();
  for (std::int64_t i = 0; i < n; i += kLanes) {
    // Operand order matters: max and min give their second operand when either is NaN.
    const Vec scaled = load_up_to(x + i, n - i) * inverse;
    const Vec q = round_nearest(min(max(scaled, Vec::set(-127.0f)), Vec::set(127.0f)));
    total = total + q;
    if (n - i >= kLanes) {
      store_i8(q, values + i);
    } else {
      std::int8_t lanes[kLanes];
      store_i8(q, lanes);
      for (std::int64_t k = 0; k < n - i; ++k) values[i + k] = lanes[k];
    }
  }
  *scale = most / 127.0f + sum(not_finite);
  return static_cast<std::int32_t>(sum(total));
}

void quantize_row(std::int8_t* values, float* scales, std::int32_t* sums, const float* x,
                  std::int64_t n, std::int64_t block) {
  for (std::int64_t b = 0; b * block < n; ++b) {
    const std::int64_t first = b * block;
    sums[b] = quantize_block(values + first, scales + b, x + first, least(block, n - first));
  }
  for (std::int64_t i = n; i % 64 != 0; ++i) values[i] = 0;
}

// Rotates pairs (2i, 2i + 1) as complex numbers. rotation: [head_dim / 2, 2] cos, sin.
inline void rotate_head(float* x, const float* rotation, std::int64_t head_dim) {
  for (std::int64_t i = 0; i < head_dim; i += 2) {
    const float real = x[i];
    const float imaginary = x[i + 1];
    const float cosine = rotation[i];
    const float sine = rotation[i + 1];
    x[i] = real * cosine - imaginary * sine;
    x[i + 1] = real * sine + imaginary * cosine;
  }
}

inline void scale_head(float* x, float factor, std::int64_t head_dim) {
  for (std::int64_t i = 0; i < head_dim; ++i) x[i] *= factor;
}

inline void write_kv(float* p, float x) { *p = x; }
// Rounds to nearest, ties to even; NaN stays NaN (as f32_to_bf16, which being inline may not be
// called here).
inline void write_kv(std::uint16_t* p, float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *p = static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u
                                         : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One head of k and v to its token of a page.
template <class T>
void write_head(const StoreTask& task, std::int64_t kv_head, const float* k, const float* v) {
  constexpr std::int64_t kPerLane = 4 / sizeof(T);
  const KvPages& pages = *task.pages;
  const KvBlock block = find_kv_block(pages, task.page, task.layer->kv_layer, kv_head, task.slot);
  T* keys = reinterpret_cast<T*>(block.keys) + block.token * kPerLane;
  T* values = reinterpret_cast<T*>(block.values) + block.token % kPerLane +
              block.token / kPerLane * kPerLane * kv_width(pages.head_dim);
  for (std::int64_t d = 0; d < pages.head_dim; ++d) {
    write_kv(keys + d / kPerLane * kPerLane * block.n_tokens + d % kPerLane, k[d]);
    write_kv(values + d * kPerLane, v[d]);
  }
}

// The largest magnitude of n values; NaN when one of them is not finite.
inline float magnitude(const float* x, std::int64_t n) {
  Vec largest = Vec::zero();
  Vec check = Vec::zero();
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec v = n - i >= kLanes ? Vec::load(x + i) : load_first(x + i, n - i);
    largest = max(largest, max(v, Vec::zero() - v));
    check = fma(v, Vec::zero(), check);
  }
  return maximum(largest) + sum(check);
}

// How n values become integers up to `range`: integer = x * inverse, rounded; x = integer * scale.
// Values too small to be worth it become 0, values that are not finite make the scale NaN.
struct IntegerScale {
  float scale;
  float inverse;
};
inline IntegerScale integer_scale(const float* x, std::int64_t n, float range) {
  constexpr float kSmallest = 1e-30f;  // range / kSmallest is still finite
  const float largest = magnitude(x, n);
  return {largest / range, largest > kSmallest ? range / largest : 0.0f};
}
// Lanes of v as integers; all 0 where the scale is NaN.
inline Vec to_integers(Vec v, const IntegerScale& s) {
  if (s.inverse == 0.0f) return Vec::zero();
  return round_nearest(v * Vec::set(s.inverse));
}

// Writes byte d of x [n] to place(d). Returns the scale.
template <class Place>
inline float write_bytes(const float* x, std::int64_t n, Place place) {
  const IntegerScale s = integer_scale(x, n, 127.0f);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes];
    const std::int64_t left = n - i < kLanes ? n - i : kLanes;
    to_integers(load_first(x + i, left), s).store(lanes);
    for (std::int64_t d = 0; d < left; ++d) {
      *place(i + d) = static_cast<std::uint8_t>(128 + static_cast<int>(lanes[d]));
    }
  }
  return s.scale;
}

// write_head for int8.
inline void write_head_bytes(const StoreTask& task, std::int64_t kv_head, const float* k,
                             const float* v) {
  const KvPages& pages = *task.pages;
  const KvBlock block = find_kv_block(pages, task.page, task.layer->kv_layer, kv_head, task.slot);
  auto* keys = reinterpret_cast<std::uint8_t*>(block.keys) + block.token * 4;
  auto* values = reinterpret_cast<std::uint8_t*>(block.values) + block.token % 4 +
                 block.token / 4 * 4 * kv_width(pages.head_dim);
  const std::int64_t row = 4 * block.n_tokens;
  block.key_scales[block.token] =
      write_bytes(k, pages.head_dim, [&](std::int64_t d) { return keys + d / 4 * row + d % 4; });
  block.value_scales[block.token] =
      write_bytes(v, pages.head_dim, [&](std::int64_t d) { return values + d * 4; });
}

// Source of the order of steps: transformers modeling_llama4.py, Llama4TextAttention.
void store_kv(const StoreTask& task) {
  const AttentionLayer& layer = *task.layer;
  const std::int64_t head_dim = task.pages->head_dim;
  const std::int64_t n_kv_heads = task.pages->n_kv_heads;
  for (std::int64_t head = 0; head < task.n_heads + n_kv_heads; ++head) {  // q heads, then k heads
    float* x = task.qkv + head * head_dim;
    if (task.rotation != nullptr) rotate_head(x, task.rotation, head_dim);
    if (layer.qk_norm) scale_head(x, inverse_rms(x, head_dim, layer.eps), head_dim);
    if (layer.scale_queries && head < task.n_heads) scale_head(x, task.query_scale, head_dim);
  }
  for (std::int64_t kv_head = 0; kv_head < n_kv_heads; ++kv_head) {
    const float* k = task.qkv + (task.n_heads + kv_head) * head_dim;
    const float* v = k + n_kv_heads * head_dim;
    if (task.pages->type == KvType::kF32) {
      write_head<float>(task, kv_head, k, v);
    } else if (task.pages->type == KvType::kBf16) {
      write_head<std::uint16_t>(task, kv_head, k, v);
    } else {
      write_head_bytes(task, kv_head, k, v);
    }
  }
}
