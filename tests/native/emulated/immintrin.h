// AVX-512 (F, BW), AVX512-VNNI, AVX-VNNI and AVX512-BF16 on a CPU that has AVX2 alone, for `make test-isas`.
//
// Stands before the compiler's own header of this name. It declares what the kernels use once more, in their
// namespace, where it is found first: what has a counterpart in AVX2 is that, on each half; the rest is
// written out as Intel's guide to the instructions defines it, in plain loops.
#pragma once
#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(VILA2_EMULATE_VNNI)  // the kernels ask for the compiler's own words
#define __AVX512VNNI__ 1
#define __AVXVNNI__ 1
#endif
#if defined(VILA2_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

// Only orders instructions, and names registers that are not there.
#define asm(...) static_assert(true)

namespace vila2::cpu {

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef uint16_t __mmask16;

template <typename To, typename From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename Half>
struct Pair {
  Half low, high;
};
template <typename Half, typename Whole, typename... Rest, typename Of>
inline Whole by_halves(Of of, const Whole& first, const Rest&... rest) {
  return as<Whole>(Pair<Half>{of(as<Pair<Half>>(first).low, as<Pair<Half>>(rest).low...),
                              of(as<Pair<Half>>(first).high, as<Pair<Half>>(rest).high...)});
}
template <typename Element>
struct Lanes {
  Element at[64 / sizeof(Element)];
};

// What AVX2 has too, on 256 bits.

#define VILA2_INTS(name)                                                                       \
  inline __m512i _mm512_##name(__m512i a, __m512i b) {                                         \
    return by_halves<__m256i>([](__m256i x, __m256i y) { return _mm256_##name(x, y); }, a, b); \
  }
VILA2_INTS(add_epi32)
VILA2_INTS(sub_epi32)
VILA2_INTS(mullo_epi32)
VILA2_INTS(max_epi32)
VILA2_INTS(madd_epi16)
VILA2_INTS(maddubs_epi16)
VILA2_INTS(packs_epi32)
VILA2_INTS(packus_epi16)
VILA2_INTS(shuffle_epi8)
VILA2_INTS(unpacklo_epi8)
VILA2_INTS(unpackhi_epi8)
#undef VILA2_INTS

#define VILA2_SHIFT(name)                                                                 \
  inline __m512i _mm512_##name(__m512i a, int count) {                                    \
    return by_halves<__m256i>([count](__m256i x) { return _mm256_##name(x, count); }, a); \
  }
VILA2_SHIFT(slli_epi16)
VILA2_SHIFT(srli_epi16)
VILA2_SHIFT(srai_epi16)
VILA2_SHIFT(slli_epi32)
VILA2_SHIFT(srli_epi32)
VILA2_SHIFT(srai_epi32)
#undef VILA2_SHIFT

#define VILA2_FLOATS(name)                                                                  \
  inline __m512 _mm512_##name(__m512 a, __m512 b) {                                         \
    return by_halves<__m256>([](__m256 x, __m256 y) { return _mm256_##name(x, y); }, a, b); \
  }
VILA2_FLOATS(max_ps)
VILA2_FLOATS(min_ps)
#undef VILA2_FLOATS

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m256>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
inline __m512 _mm512_sqrt_ps(__m512 a) {
  return by_halves<__m256>([](__m256 x) { return _mm256_sqrt_ps(x); }, a);
}
template <int kRounding>
inline __m512 round_to(__m512 a) {
  return by_halves<__m256>([](__m256 x) { return _mm256_round_ps(x, kRounding); }, a);
}
#define _mm512_roundscale_ps(a, rounding) round_to<rounding>(a)
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return as<__m512i>(by_halves<__m256>([](__m256 x) { return as<__m256>(_mm256_cvtps_epi32(x)); }, a));
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return as<__m512>(by_halves<__m256i>([](__m256i x) { return as<__m256i>(_mm256_cvtepi32_ps(x)); }, a));
}

// What moves bits only.

inline __m512 _mm512_castsi512_ps(__m512i a) { return as<__m512>(a); }
inline __m512i _mm512_castps_si512(__m512 a) { return as<__m512i>(a); }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float x) { return __m512{} + x; }
inline __m512i _mm512_set1_epi32(int x) {
  const __m256i half = _mm256_set1_epi32(x);
  return as<__m512i>(Pair<__m256i>{half, half});
}
inline __m512i _mm512_set1_epi16(short x) {
  const __m256i half = _mm256_set1_epi16(x);
  return as<__m512i>(Pair<__m256i>{half, half});
}
inline __m512i _mm512_broadcast_i32x4(__m128i a) {
  const __m256i half = _mm256_broadcastsi128_si256(a);
  return as<__m512i>(Pair<__m256i>{half, half});
}
inline __m512i _mm512_castsi256_si512(__m256i a) {
  return as<__m512i>(Pair<__m256i>{a, a});
}  // above: anything
inline __m512i _mm512_inserti64x4(__m512i a, __m256i half, int place) {
  Pair<__m256i> both = as<Pair<__m256i>>(a);
  (place ? both.high : both.low) = half;
  return as<__m512i>(both);
}
inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline __m512i _mm512_loadu_si512(const void* p) { return as<__m512i>(_mm512_loadu_ps(p)); }
inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof(a)); }

// What only AVX-512 has.

inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const auto from = as<Pair<__m128i>>(a);
  return as<__m512i>(Pair<__m256i>{_mm256_cvtepu16_epi32(from.low), _mm256_cvtepu16_epi32(from.high)});
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {  // the low halves
  const auto from = as<Lanes<int32_t>>(a);
  int16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int16_t>(from.at[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
}
inline __m128i _mm512_cvtusepi32_epi8(__m512i a) {  // as unsigned numbers, clipped
  const auto from = as<Lanes<uint32_t>>(a);
  uint8_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(from.at[i] > 255 ? 255 : from.at[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(to));
}
inline __m512i _mm512_mask_set1_epi32(__m512i a, __mmask16 mask, int x) {
  auto lanes = as<Lanes<int32_t>>(a);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) lanes.at[i] = x;
  }
  return as<__m512i>(lanes);
}
template <int kHow>
inline __mmask16 compare(__m512 a, __m512 b) {
  const auto x = as<Pair<__m256>>(a), y = as<Pair<__m256>>(b);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, kHow));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, kHow));
  return static_cast<__mmask16>(low | high << 8);
}
#define _mm512_cmp_ps_mask(a, b, how) compare<how>(a, b)
// The order of these two sums is the compiler's; halves first, as gcc and clang do.
inline float _mm512_reduce_add_ps(__m512 a) {
  auto lanes = as<Lanes<float>>(a);
  for (int step = 8; step; step /= 2) {
    for (int i = 0; i < step; ++i) lanes.at[i] += lanes.at[i + step];
  }
  return lanes.at[0];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  const auto lanes = as<Lanes<float>>(a);
  float most = lanes.at[0];
  for (float x : lanes.at) most = x > most ? x : most;
  return most;
}

// VNNI: four products of a byte with a signed byte, or two of 16 bits, join a sum of 32 bits, which wraps.

template <typename Whole>
inline Whole dot4(Whole sum, Whole x, Whole w) {
  uint32_t sums[sizeof(Whole) / 4];
  uint8_t bytes[sizeof(Whole)];
  int8_t weights[sizeof(Whole)];
  std::memcpy(sums, &sum, sizeof(sums));
  std::memcpy(bytes, &x, sizeof(bytes));
  std::memcpy(weights, &w, sizeof(weights));
  for (size_t i = 0; i < sizeof(Whole); ++i) sums[i / 4] += static_cast<uint32_t>(bytes[i] * weights[i]);
  std::memcpy(&sum, sums, sizeof(sums));
  return sum;
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i x, __m512i w) { return dot4(sum, x, w); }
inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i x, __m256i w) { return dot4(sum, x, w); }
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i x, __m512i w) {
  const auto a = as<Lanes<int16_t>>(x), b = as<Lanes<int16_t>>(w);
  auto sums = as<Lanes<uint32_t>>(sum);
  for (int i = 0; i < 32; ++i) sums.at[i / 2] += static_cast<uint32_t>(a.at[i] * b.at[i]);
  return as<__m512i>(sums);
}

// BF16: two products join a sum of float32, the upper one first, each addition rounded to the nearest, ties
// to even, whatever the rounding mode. What is too small for a normal number is zero, before and after.

inline float without_denormal(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.f, x) : x;
}
inline float of_bf16(uint16_t bits) { return without_denormal(as<float>(static_cast<uint32_t>(bits) << 16)); }
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh w) {
  const auto a = as<Lanes<uint16_t>>(x), b = as<Lanes<uint16_t>>(w);
  auto sums = as<Lanes<float>>(sum);
  for (int i = 0; i < 16; ++i) {
    for (int half = 1; half >= 0; --half) {
      const float joined = __builtin_fmaf(of_bf16(a.at[2 * i + half]), of_bf16(b.at[2 * i + half]),
                                          without_denormal(sums.at[i]));
      sums.at[i] = without_denormal(joined);
    }
  }
  return as<__m512>(sums);
}

}  // namespace vila2::cpu
