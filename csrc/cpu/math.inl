// What every kernel shares: parts of a vector, exponentials, sigmoids.

constexpr float kLog2e = 1.44269504088896340736f;

inline Vec load_part(const float* p, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline Vec load_part(const bf16* p, int64_t count) {
  bf16 lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
inline void store_part(T* p, Vec v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Calls body(i, load, store) for whole vectors, then once for the part that is left.
template <class Body>
inline void for_each_vec(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    body(i, [](const auto* p) { return load(p); }, [](auto* p, Vec v) { store(p, v); });
  }
  if (i < count) {
    const int64_t left = count - i;
    body(
        i, [left](const auto* p) { return load_part(p, left); },
        [left](auto* p, Vec v) { store_part(p, v, left); });
  }
}

// 2^x within 2 ulp: exactly 1 at 0 and exactly 0 from -126.5 down, which masked attention scores rely on.
inline Vec exp2(Vec x) {
  x = min(splat(128.f), max(splat(-127.f), x));
  const Vec n = round_even(x);
  const Vec f = x - n;
  Vec p = splat(1.52527338e-5f);  // ln(2)^k / k!, k = 7 .. 1
  p = fma(p, f, splat(1.54035304e-4f));
  p = fma(p, f, splat(1.33335581e-3f));
  p = fma(p, f, splat(9.61812911e-3f));
  p = fma(p, f, splat(5.55041087e-2f));
  p = fma(p, f, splat(2.40226507e-1f));
  p = fma(p, f, splat(6.93147181e-1f));
  p = fma(p, f, splat(1.f));
  return p * power_of_two(n);
}

inline Vec sigmoid(Vec x) { return splat(1.f) / (splat(1.f) + exp2(x * splat(-kLog2e))); }
