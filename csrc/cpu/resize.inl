// Weighted sums of rows, and of neighbouring pixels: the two passes of a resize. See resize.h.

struct PixelSums {
  Ints high = zero_ints(), low = splat_ints(1 << (kWeightBits - 1));  // half, so that the shift rounds
};

inline void add_taps(PixelSums& sums, Ints pixels, Ints high, Ints low) {
  sums.high = add_dot2(sums.high, pixels, high);
  sums.low = add_dot2(sums.low, pixels, low);
}

inline Ints total(const PixelSums& sums) {
  return shift_right<kWeightBits>(add_ints(shift_left<kLowBits>(sums.high), sums.low));
}

inline Ints splat_taps(const int16_t* two) {
  int32_t both;
  __builtin_memcpy(&both, two, 4);
  return splat_ints(both);
}

void mix_rows(const uint8_t* const* rows, const TapPair* taps, int64_t pairs, uint8_t* out, int64_t bytes) {
  constexpr int64_t kBlock = 4 * kLanes;
  const auto block = [&](int64_t i) {
    PixelSums sums[4];
    for (int64_t pair = 0; pair < pairs; ++pair) {
      Ints pixels[4];
      load_pairs(rows[2 * pair] + i, rows[2 * pair + 1] + i, pixels);
      const Ints high = splat_taps(taps[pair].high), low = splat_taps(taps[pair].low);
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) add_taps(sums[part], pixels[part], high, low);
    }
    store_clipped(out + i, total(sums[0]), total(sums[1]), total(sums[2]), total(sums[3]));
  };
  int64_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) block(i);
  if (i == bytes) return;
  if (bytes >= kBlock) {
    block(bytes - kBlock);  // once more over bytes that are done
    return;
  }
  for (; i < bytes; ++i) {
    int32_t sum = 1 << (kWeightBits - 1);
    for (int64_t tap = 0; tap < 2 * pairs; ++tap) {
      const TapPair& pair = taps[tap / 2];
      sum += rows[tap][i] * (pair.high[tap % 2] * (1 << kLowBits) + pair.low[tap % 2]);
    }
    sum >>= kWeightBits;
    out[i] = static_cast<uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
  }
}

constexpr int kPixelRows = kLanes / 4;  // a vector holds one pixel, padded to four lanes, of so many rows
constexpr int kPixelVecs = 2;

void mix_pixels(const uint8_t* const* rows, const Windows& windows, uint8_t* const* out) {
  const TapPair* taps = windows.taps;
  for (int64_t x = 0; x < windows.size; ++x, taps += windows.pairs) {
    PixelSums sums[kPixelVecs];
    int64_t at = 3 * static_cast<int64_t>(windows.starts[x]);
    for (int64_t pair = 0; pair < windows.pairs; pair += 2, at += 3 * kTapGroup) {
      const Ints high0 = splat_taps(taps[pair].high), high1 = splat_taps(taps[pair + 1].high);
      const Ints low0 = splat_taps(taps[pair].low), low1 = splat_taps(taps[pair + 1].low);
#pragma GCC unroll 2
      for (int v = 0; v < kPixelVecs; ++v) {
        Ints first, second;
        load_pixels(rows + v * kPixelRows, at, first, second);
        add_taps(sums[v], first, high0, low0);
        add_taps(sums[v], second, high1, low1);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kPixelVecs; ++v) store_pixels(out + v * kPixelRows, 3 * x, total(sums[v]));
  }
}

const ResizeKernels kResize = {kPixelVecs * kPixelRows, mix_rows, mix_pixels};
