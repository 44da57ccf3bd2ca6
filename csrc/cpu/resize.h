// Resizing of RGB images, to the very bytes that Pillow makes.
//
// Pillow weighs the pixels of a window with integers of 22 bits, sums in int32 and rounds each of its two
// passes to bytes. So do these kernels; each weight is in two 16-bit parts, `high * 2^kLowBits + low`, whose
// products with pairs of pixels need one instruction, and sums of int32 are exact in any order.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace vila2::cpu {

inline constexpr int kWeightBits = 22;
inline constexpr int kLowBits = 11;
inline constexpr int64_t kTapGroup = 4;  // windows are padded to so many taps, with taps that weigh nothing
inline constexpr int64_t kReadBeyond = 16;  // bytes that mix_pixels may read past the end of its last window

// Two neighbouring taps of a window: of both the high parts, of both the low parts.
struct TapPair {
  int16_t high[2], low[2];
};

struct Windows {
  const int32_t* starts;  // (size)
  const TapPair* taps;    // (size, pairs)
  int64_t size, pairs;
};

struct ResizeKernels {
  int64_t rows;  // that mix_pixels takes at once
  // One row of `bytes` bytes from the 2 * pairs rows of its window.
  void (*mix_rows)(const uint8_t* const* rows, const TapPair* taps, int64_t pairs, uint8_t* out,
                   int64_t bytes);
  // `size` pixels of each of `rows` rows; may write one byte more.
  void (*mix_pixels)(const uint8_t* const* rows, const Windows& windows, uint8_t* const* out);
};

enum class Filter { kBilinear, kBicubic };

struct ResizeJob {
  const uint8_t* image;  // (height, width, 3)
  int64_t height, width;
  uint8_t* out;  // (new_height, new_width, 3)
  int64_t new_height, new_width;
  Filter filter;
  bool rows_first;  // the vertical pass before the horizontal one
};

// On the calling thread: images are prepared on many. Throws std::bad_alloc.
void resize(const ResizeJob& job);

}  // namespace vila2::cpu
