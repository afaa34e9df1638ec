// What rows and attention do with one vector: load a part of one, e^x. Included inside the
// anonymous namespace of each isa_*.cpp after panels.inl.

// Lanes [0, n) of p, the rest zero. Reads nothing past p[n - 1].
inline Vec load_first(const float* p, std::int64_t n) {
  float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return Vec::load(lanes);
}

// e^x within 2 ulp on [-87, 88]; +0 below -87.7, +infinity above 88.73, NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2, polynomial of r from Cephes (expf). The high part of ln 2 has
// nine significant bits, so n * high is exact even where fma rounds its product (the scalar table).
// exp2_integral(-127) is a zero exponent field, hence exactly 0: no lane needs a comparison.
inline Vec exp(Vec x) {
  // Operand order matters: max and min give their second operand when either is NaN.
  x = min(Vec::set(89.0f), max(Vec::set(-88.0f), x));
  Vec n = round_nearest(x * Vec::set(1.44269504f));
  n = max(min(n, Vec::set(127.0f)), Vec::set(-127.0f));
  Vec r = fma(n, Vec::set(-0.693359375f), x);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = fma(p, r, Vec::set(1.3981999507e-3f));
  p = fma(p, r, Vec::set(8.3334519073e-3f));
  p = fma(p, r, Vec::set(4.1665795894e-2f));
  p = fma(p, r, Vec::set(1.6666665459e-1f));
  p = fma(p, r, Vec::set(5.0000001201e-1f));
  p = fma(p, r * r, r) + Vec::set(1.0f);
  return p * exp2_integral(n);
}
