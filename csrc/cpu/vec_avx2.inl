// Vec for AVX2 with FMA: eight lanes.

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 weights, 1 broadcast: 15 of 16 registers

typedef __m256 Vec;

inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }

inline Vec load(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline void store(bf16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  // To nearest, ties to even.
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i half =
      _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

// Two vectors from one row of a bfloat16 panel, whose elements alternate between them.
inline void load_pair(const bf16* p, Vec& low, Vec& high) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  low = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  high = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // a NaN in b stays
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
inline Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec integral) {  // 2^n for n in [-127, 128]; 0 at -127
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(integral), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Vec v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
// A bit for each lane of `a` that is above `b`'s.
inline unsigned above(Vec a, Vec b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
inline void store_sums4(float* out, Vec a, Vec b, Vec c, Vec d) {
  const Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

// Bytes times bytes, in sums of int32: eight lanes, each of four neighbours.

constexpr int kByteSums = 12;  // vectors of sums in a tile
constexpr int kByteTileRows = 6;

typedef __m256i Ints;
struct NarrowWeights {
  __m256i bytes;
};

inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Vec to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints load_ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints splat_ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints subtract_product(Ints a, Ints b, Ints c) { return _mm256_sub_epi32(a, _mm256_mullo_epi32(b, c)); }
inline Ints splat_bytes(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
inline void load_weights(const int8_t* p, NarrowWeights& w) {
  w.bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
#if defined(__AVXVNNI__)
constexpr bool kSumsWait = true;    // five cycles from one product to the next
typedef NarrowWeights WideWeights;  // nothing saturates on the way
inline void add_dot4(Ints& sum, Ints x, const NarrowWeights& w) {
  sum = _mm256_dpbusd_avx_epi32(sum, x, w.bytes);
}
#else
constexpr bool kSumsWait = false;  // one addition
struct WideWeights {
  __m256i even, odd;
};
inline void load_weights(const int8_t* p, WideWeights& w) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  w.even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
  w.odd = _mm256_srai_epi16(bytes, 8);
}
// The empty asm keeps each addition behind its product: gcc otherwise hoists all products of a tile, and
// spills.
inline void add_dot4(Ints& sum, Ints x, const NarrowWeights& w) {
  const __m256i pairs = _mm256_maddubs_epi16(x, w.bytes);  // exact: see kNarrowPair
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  asm("" : "+x"(sum));
}
inline void add_dot4(Ints& sum, Ints x, const WideWeights& w) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), w.even));
  asm("" : "+x"(sum));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(x, 8), w.odd));
  asm("" : "+x"(sum));
}
#endif
inline void store_bytes(uint8_t* p, Vec v) {  // whole numbers in [0, 255]
  const __m256i wide = _mm256_cvtps_epi32(v);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
}

// Pairs of bytes, widened to 16 bits, times pairs of weights.

inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints add_dot2(Ints sum, Ints pairs, Ints weights) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, weights));
}
template <int N>
inline Ints shift_left(Ints v) {
  return _mm256_slli_epi32(v, N);
}
template <int N>
inline Ints shift_right(Ints v) {
  return _mm256_srai_epi32(v, N);
}
// 32 bytes of each; the order of the pairs is that which store_clipped undoes.
inline void load_pairs(const uint8_t* a, const uint8_t* b, Ints* pairs) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  const __m256i low = _mm256_unpacklo_epi8(x, y), high = _mm256_unpackhi_epi8(x, y);
  pairs[0] = _mm256_unpacklo_epi8(low, _mm256_setzero_si256());
  pairs[1] = _mm256_unpackhi_epi8(low, _mm256_setzero_si256());
  pairs[2] = _mm256_unpacklo_epi8(high, _mm256_setzero_si256());
  pairs[3] = _mm256_unpackhi_epi8(high, _mm256_setzero_si256());
}
inline void store_clipped(uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
}
// Pixels 0 and 1, and 2 and 3, from byte `at` of two rows: (R, R'), (G, G'), (B, B'), nothing.
inline void load_pixels(const uint8_t* const* rows, int64_t at, Ints& first, Ints& second) {
  const __m128i top = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0] + at));
  const __m128i bottom = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[1] + at));
  const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(top), bottom, 1);
  const __m128i order = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
  const __m128i next = _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  first = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
  second = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(next));
}
inline void store_pixels(uint8_t* const* rows, int64_t at, Ints v) {
  const __m256i words = _mm256_packs_epi32(v, v), bytes = _mm256_packus_epi16(words, words);
  const int32_t top = _mm_cvtsi128_si32(_mm256_castsi256_si128(bytes));
  const int32_t bottom = _mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1));
  __builtin_memcpy(rows[0] + at, &top, 4);
  __builtin_memcpy(rows[1] + at, &bottom, 4);
}
