// The largest entries of a product's rows, without the product: of a head over a vocabulary only the best
// columns are wanted, and they are found tile by tile while the tile is in the cache.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace vila2::cpu {

class PackedWeights;

inline constexpr int64_t kMostTop = 128;

// For each row the `count` largest columns, the largest first, of equal ones the lowest first. NaN counts as
// minus infinity, and so do the `banned` columns in rows with is_banned.
struct TopJob {
  int64_t count;          // at most kMostTop and the number of columns
  const int64_t* banned;  // rising
  int64_t num_banned;
  const uint8_t* is_banned;  // (rows)
  float* values;             // (rows, count)
  int64_t* columns;          // (rows, count)
};

// Of x @ weight.T + bias: each value is that of PackedWeights::multiply, to the last bit.
void top(const PackedWeights& weights, const float* x, int64_t rows, const TopJob& out);
// Of job.x times the weights of `job`, whose y and finish are not used.
void byte_top(const ByteLinearJob& job, int64_t rows, const TopJob& out);

}  // namespace vila2::cpu
