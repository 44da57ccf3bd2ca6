// Vec for any CPU: four lanes of the compiler's own vectors, so that the baseline's unit (SSE2, NEON) is
// used.

constexpr int kLanes = 4;
constexpr int kTileRows = 6;

typedef float Vec __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t UintVec __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(8), aligned(2), may_alias));

inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return splat(0.f); }
inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

inline Vec load(const bf16* p) {
  const UintVec wide = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), UintVec) << 16;
  return reinterpret_cast<const Vec&>(wide);
}

inline void store(bf16* p, Vec v) {
  const UintVec bits = reinterpret_cast<const UintVec&>(v);
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const IntVec number = v == v;
  const UintVec mask = reinterpret_cast<const UintVec&>(number);
  *reinterpret_cast<HalfVec*>(p) = __builtin_convertvector((rounded & mask) | (0x7fc0u & ~mask), HalfVec);
}

// Two vectors from one row of a bfloat16 panel, whose elements alternate between them.
inline void load_pair(const bf16* p, Vec& low, Vec& high) {
  const UintVec bits = *reinterpret_cast<const UintVec*>(p);
  const UintVec shifted = bits << 16, masked = bits & 0xffff0000u;
  low = reinterpret_cast<const Vec&>(shifted);
  high = reinterpret_cast<const Vec&>(masked);
}

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // a NaN in b stays
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec sqrt(Vec a) {
  return Vec{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
inline Vec round_even(Vec a) {  // exact for |a| < 2^22
  const Vec magic = splat(12582912.f);
  return (a + magic) - magic;
}
inline Vec power_of_two(Vec integral) {  // 2^n for n in [-127, 128]; 0 at -127
  const IntVec bits = (__builtin_convertvector(integral, IntVec) + 127) << 23;
  return reinterpret_cast<const Vec&>(bits);
}
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float largest(Vec v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
// A bit for each lane of `a` that is above `b`'s.
inline unsigned above(Vec a, Vec b) {
  const IntVec is_above = a > b;
  return (is_above[0] & 1u) | (is_above[1] & 2u) | (is_above[2] & 4u) | (is_above[3] & 8u);
}
inline void store_sums4(float* out, Vec a, Vec b, Vec c, Vec d) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

// Bytes times bytes, in sums of int32: four lanes, each of four neighbours.

constexpr int kByteSums = 8;  // vectors of sums in a tile
constexpr int kByteTileRows = 2;
constexpr bool kSumsWait = true;

typedef IntVec Ints;
struct NarrowWeights {
  IntVec parts[4];
};
typedef NarrowWeights WideWeights;  // nothing saturates on the way

inline Ints zero_ints() { return Ints{0, 0, 0, 0}; }
inline Vec to_float(Ints v) { return __builtin_convertvector(v, Vec); }
inline Ints load_ints(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
inline Ints splat_ints(int32_t x) { return Ints{x, x, x, x}; }
inline Ints subtract_product(Ints a, Ints b, Ints c) { return a - b * c; }
inline const uint8_t* splat_bytes(const uint8_t* p) { return p; }
inline void load_weights(const int8_t* p, NarrowWeights& w) {
  for (int i = 0; i < 4; ++i) w.parts[i] = IntVec{p[i], p[4 + i], p[8 + i], p[12 + i]};
}
inline void add_dot4(Ints& sum, const uint8_t* x, const NarrowWeights& w) {
  for (int i = 0; i < 4; ++i) sum += w.parts[i] * splat_ints(x[i]);
}
inline void store_bytes(uint8_t* p, Vec v) {  // whole numbers in [0, 255]
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
}

// Pairs of bytes, widened to 16 bits, times pairs of weights.

inline Ints add_ints(Ints a, Ints b) { return a + b; }
inline Ints add_dot2(Ints sum, Ints pairs, Ints weights) {
  return sum + (pairs & 0xffff) * ((weights << 16) >> 16) + (pairs >> 16) * (weights >> 16);
}
template <int N>
inline Ints shift_left(Ints v) {
  return v << N;
}
template <int N>
inline Ints shift_right(Ints v) {
  return v >> N;
}
inline void load_pairs(const uint8_t* a, const uint8_t* b, Ints* pairs) {  // 16 bytes of each
  for (int i = 0; i < 16; ++i) pairs[i / 4][i % 4] = a[i] | b[i] << 16;
}
inline void store_pixel(uint8_t* p, Ints v) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(v[i] < 0 ? 0 : v[i] > 255 ? 255 : v[i]);
}
inline void store_clipped(uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
  store_pixel(p, a), store_pixel(p + 4, b), store_pixel(p + 8, c), store_pixel(p + 12, d);
}
// Pixels 0 and 1, and 2 and 3, from byte `at` of a row: (R, R'), (G, G'), (B, B'), nothing.
inline void load_pixels(const uint8_t* const* rows, int64_t at, Ints& first, Ints& second) {
  const uint8_t* p = rows[0] + at;
  first = Ints{p[0] | p[3] << 16, p[1] | p[4] << 16, p[2] | p[5] << 16, 0};
  second = Ints{p[6] | p[9] << 16, p[7] | p[10] << 16, p[8] | p[11] << 16, 0};
}
inline void store_pixels(uint8_t* const* rows, int64_t at, Ints v) { store_pixel(rows[0] + at, v); }
