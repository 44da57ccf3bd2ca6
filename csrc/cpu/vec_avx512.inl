// Vec for AVX-512 (F, BW, VL): sixteen lanes.

constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 weights, 1 broadcast: 27 of 32 registers

typedef __m512 Vec;

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }

inline Vec load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(bf16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  // To nearest, ties to even.
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  rounded = _mm512_mask_set1_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), 0x7fc0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

// Two vectors from one row of a bfloat16 panel, whose elements alternate between them.
inline void load_pair(const bf16* p, Vec& low, Vec& high) {
  const __m512i bits = _mm512_loadu_si512(p);
  low = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // a NaN in b stays
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec power_of_two(Vec integral) {  // 2^n for n in [-127, 128]; 0 at -127
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(integral), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
// A bit for each lane of `a` that is above `b`'s.
inline unsigned above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline void store_sums4(float* out, Vec a, Vec b, Vec c, Vec d) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

#if defined(__AVX512BF16__)
// Pairs of bfloat16, in sums of float32: sixteen lanes, each of two neighbours. What is too small for a
// normal number counts as zero, and so does such a sum.

typedef __m512bh Pairs;

inline Pairs load_pairs(const bf16* p) { return (Pairs)_mm512_loadu_si512(p); }
inline Pairs splat_pair(const bf16* p) {
  int32_t two;
  __builtin_memcpy(&two, p, 4);
  return (Pairs)_mm512_set1_epi32(two);
}
inline Vec add_dot2(Vec sum, Pairs x, Pairs w) { return _mm512_dpbf16_ps(sum, x, w); }
#endif

// Bytes times bytes, in sums of int32: sixteen lanes, each of four neighbours.

constexpr int kByteSums = 24;  // vectors of sums in a tile
constexpr int kByteTileRows = 12;
constexpr bool kSumsWait = true;

typedef __m512i Ints;
struct NarrowWeights {
  __m512i bytes;
};

inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Vec to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Ints splat_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints subtract_product(Ints a, Ints b, Ints c) { return _mm512_sub_epi32(a, _mm512_mullo_epi32(b, c)); }
inline Ints splat_bytes(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
inline void load_weights(const int8_t* p, NarrowWeights& w) { w.bytes = _mm512_loadu_si512(p); }
#if defined(__AVX512VNNI__)
typedef NarrowWeights WideWeights;  // nothing saturates on the way
inline void add_dot4(Ints& sum, Ints x, const NarrowWeights& w) {
  sum = _mm512_dpbusd_epi32(sum, x, w.bytes);
}
#else
struct WideWeights {
  __m512i even, odd;
};
inline void load_weights(const int8_t* p, WideWeights& w) {
  const __m512i bytes = _mm512_loadu_si512(p);
  w.even = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
  w.odd = _mm512_srai_epi16(bytes, 8);
}
// The empty asm keeps each addition behind its product: gcc otherwise hoists all products of a tile, and
// spills.
inline void add_dot4(Ints& sum, Ints x, const NarrowWeights& w) {
  const __m512i pairs = _mm512_maddubs_epi16(x, w.bytes);  // exact: see kNarrowPair
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  asm("" : "+v"(sum));
}
inline void add_dot4(Ints& sum, Ints x, const WideWeights& w) {
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_and_si512(x, _mm512_set1_epi16(255)), w.even));
  asm("" : "+v"(sum));
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_srli_epi16(x, 8), w.odd));
  asm("" : "+v"(sum));
}
#endif
inline void store_bytes(uint8_t* p, Vec v) {  // whole numbers in [0, 255]
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
}

// Pairs of bytes, widened to 16 bits, times pairs of weights.

inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints add_dot2(Ints sum, Ints pairs, Ints weights) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, pairs, weights);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, weights));
#endif
}
template <int N>
inline Ints shift_left(Ints v) {
  return _mm512_slli_epi32(v, N);
}
template <int N>
inline Ints shift_right(Ints v) {
  return _mm512_srai_epi32(v, N);
}
// 64 bytes of each; the order of the pairs is that which store_clipped undoes.
inline void load_pairs(const uint8_t* a, const uint8_t* b, Ints* pairs) {
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  const __m512i low = _mm512_unpacklo_epi8(x, y), high = _mm512_unpackhi_epi8(x, y);
  pairs[0] = _mm512_unpacklo_epi8(low, _mm512_setzero_si512());
  pairs[1] = _mm512_unpackhi_epi8(low, _mm512_setzero_si512());
  pairs[2] = _mm512_unpacklo_epi8(high, _mm512_setzero_si512());
  pairs[3] = _mm512_unpackhi_epi8(high, _mm512_setzero_si512());
}
inline void store_clipped(uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
  _mm512_storeu_si512(p, _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}
// Pixels 0 and 1, and 2 and 3, from byte `at` of four rows: (R, R'), (G, G'), (B, B'), nothing.
inline void load_pixels(const uint8_t* const* rows, int64_t at, Ints& first, Ints& second) {
  const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at)); };
  const __m256i top = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
  const __m256i bottom = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
  const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(top), bottom, 1);
  const __m128i order = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
  const __m128i next = _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  first = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(order));
  second = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(next));
}
inline void store_pixels(uint8_t* const* rows, int64_t at, Ints v) {
  const __m512i positive = _mm512_max_epi32(v, _mm512_setzero_si512());
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtusepi32_epi8(positive));
  for (int i = 0; i < 4; ++i) __builtin_memcpy(rows[i] + at, bytes + 4 * i, 4);
}
