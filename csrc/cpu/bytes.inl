// Products of bytes: activations quantised row by row, weights column by column, sums in int32.
//
// The sums are exact whatever the order, so tiles and threads choose only who computes what. A row of x is
//   x[k] = (byte[k] - zero) * scale,   sum_k x[k] w[k] = (sum_k byte[k] w[k] - zero * sum_k w[k]) * scales.

constexpr int kPanelInts = kBytePanel / kLanes;  // vectors of sums to a panel
constexpr float kLeastRange = 1e-30f;            // rows that span less than this are zero
constexpr float kMostRange = 3e38f;              // and more, or not finite, are NaN

// Finds a row's range, zero included, and rounds it to 256 steps.
inline void quantize_row(const float* x, int64_t width, const ByteRows& out, int64_t row) {
  Vec least = zero(), most = zero(), check = zero();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec v = load(x + i);
    least = min(v, least);
    most = max(v, most);
    check = fma(v, zero(), check);  // NaN if v is not finite
  }
  if (i < width) {
    const Vec v = load_part(x + i, width - i);
    least = min(v, least);
    most = max(v, most);
    check = fma(v, zero(), check);
  }
  const float low = -largest(zero() - least), range = largest(most) - low;
  const bool is_number = sum(check) == 0.f && range < kMostRange;
  const float inverse = is_number && range > kLeastRange ? 255.f / range : 0.f;
  const Vec offset = round_even(splat(-low * inverse));
  float offsets[kLanes];
  store(offsets, offset);
  out.scales[row] = !is_number ? __builtin_nanf("") : inverse > 0.f ? range / 255.f : 0.f;
  out.zeros[row] = is_number ? static_cast<int32_t>(offsets[0]) : 0;
  uint8_t* bytes = out.bytes + row * out.stride;
  const auto step = [&](Vec v) {
    // The order of the operands makes 0 of a NaN.
    return min(max(round_even(v * splat(inverse)) + offset, zero()), splat(255.f));
  };
  for (i = 0; i + kLanes <= width; i += kLanes) store_bytes(bytes + i, step(load(x + i)));
  if (i < width) {
    uint8_t part[kLanes];
    store_bytes(part, step(load_part(x + i, width - i)));
    for (int64_t j = i; j < width; ++j) bytes[j] = part[j - i];
  }
  for (int64_t j = width; j < out.stride; ++j) bytes[j] = 0;
}

// N vectors, each `step` floats from the last, through log2(N) stages of a Hadamard transform.
template <int N>
inline void turn_vectors(const float* x, float* y, int64_t step) {
  Vec v[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) v[i] = load(x + i * step);
#pragma GCC unroll 3
  for (int h = 1; h < N; h *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (i & h) continue;
      const Vec a = v[i], b = v[i + h];
      v[i] = a + b, v[i + h] = a - b;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(y + i * step, v[i]);
}

// The stages from `first` to `first` * N of every block of a row, from x to y (which may be x).
template <int N>
inline void turn_stages(const float* x, float* y, int64_t width, int64_t first) {
  const int64_t step = first * kTurnStride;
  for (int64_t block = 0; block < width; block += N * step) {
    for (int64_t i = block; i < block + step; i += kLanes) turn_vectors<N>(x + i, y + i, step);
  }
}

// The stages run from neighbours outwards, so the sums are the same however many a pass takes.
inline void turn_row(const float* x, float* y, int64_t width, int64_t turn) {
  for (int64_t done = 1; done < turn; x = y) {
    const int64_t left = turn / done;
    if (left >= 8) {
      turn_stages<8>(x, y, width, done), done *= 8;
    } else if (left == 4) {
      turn_stages<4>(x, y, width, done), done *= 4;
    } else {
      turn_stages<2>(x, y, width, done), done *= 2;
    }
  }
}

void quantize(const QuantizeJob& job, int64_t row, int64_t row_end, float* scratch) {
  NormJob norm = job.norm;
  norm.y = scratch;
  for (; row < row_end; ++row) {
    norm.x = static_cast<const float*>(job.norm.x) + row * norm.width;
    if (job.source == Source::kRows) {
      const float* x = static_cast<const float*>(norm.x);
      if (job.turn > 1) turn_row(x, scratch, norm.width, job.turn);
      quantize_row(job.turn > 1 ? scratch : x, norm.width, job.out, row);
      continue;
    }
    if (job.source == Source::kAddRmsNorm) {
      norm.residual = static_cast<float*>(job.norm.residual) + row * norm.width;
      add_rms_norm_rows<float>(norm, 0, 1);
    } else {
      layer_norm_rows<float>(norm, 0, 1);
    }
    if (job.turn > 1) turn_row(scratch, scratch, norm.width, job.turn);
    quantize_row(scratch, norm.width, job.out, row);
  }
}

// What is fetched while something else is multiplied: the stream itself, `by` bytes further on; or one tile's
// share of the next panels, from `at` bytes beyond these on, `step` further at each group of the depth.
struct ByteStream {
  int64_t by;
  int64_t operator()(int64_t k) const { return k * kBytePanel + by; }
};
struct ByteShare {
  int64_t at, step;
  int64_t operator()(int64_t k) const { return at + k / kByteGroup * step; }
};

// ROWS rows against PANELS panels, scales and bias applied, to `y` (rows y_stride apart). Meanwhile the
// weights `ahead(k)` bytes beyond the start of each panel are fetched.
template <int ROWS, int PANELS, class Weights, class Ahead>
inline void multiply_bytes(const ByteLinearJob& job, int64_t row, int64_t panel, Ahead ahead, float* y,
                           int64_t y_stride) {
  constexpr int kInts = PANELS * kPanelInts;
  const int64_t stride = job.x.stride, panel_size = stride * kBytePanel;
  const uint8_t* x = job.x.bytes + row * stride;
  const int8_t* panels = job.panels + panel * panel_size;
  Ints sums[ROWS][kInts];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kInts; ++c) sums[r][c] = zero_ints();
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < stride; k += kByteGroup) {
    Weights weights[kInts];
#pragma GCC unroll 8
    for (int c = 0; c < kInts; ++c) {
      const int8_t* at =
          panels + c / kPanelInts * panel_size + k * kBytePanel + c % kPanelInts * kLanes * kByteGroup;
      if (c % kPanelInts == 0) __builtin_prefetch(panels + c / kPanelInts * panel_size + ahead(k));
      load_weights(at, weights[c]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const auto bytes = splat_bytes(x + r * stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < kInts; ++c) add_dot4(sums[r][c], bytes, weights[c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    const Ints offset = splat_ints(job.x.zeros[row + r]);
    const Vec scale = splat(job.x.scales[row + r]);
#pragma GCC unroll 8
    for (int c = 0; c < kInts; ++c) {
      const int64_t at = panel * kBytePanel + c * kLanes;
      const Vec sum = to_float(subtract_product(sums[r][c], offset, load_ints(job.sums + at)));
      Vec value = sum * load(job.scales + at) * scale;
      if (job.bias) value = value + load(job.bias + at);
      store(y + r * y_stride + c * kLanes, value);
    }
  }
}

// The last step of one row of a tile: `count` columns from `values` to y.
inline void finish_row(const ByteLinearJob& job, int64_t row, int64_t column, int64_t count,
                       const float* values) {
  if (job.finish == Finish::kSiluMul) {
    constexpr int kHalf = kBytePanel / 2;
    float gates[4 * kHalf], ups[4 * kHalf];
    for (int64_t i = 0; i < count; i += kBytePanel) {
      __builtin_memcpy(gates + i / 2, values + i, kHalf * sizeof(float));
      __builtin_memcpy(ups + i / 2, values + i + kHalf, kHalf * sizeof(float));
    }
    float* y = job.y + (row * job.columns + column) / 2;
    for_each_vec(count / 2, [&](int64_t i, auto get, auto put) {
      const Vec gate = get(gates + i);
      put(y + i, gate * sigmoid(gate) * get(ups + i));
    });
    return;
  }
  float* y = job.y + row * job.columns + column;
  const float* residual = job.residual + row * job.columns + column;
  for_each_vec(count, [&](int64_t i, auto get, auto put) {
    Vec v = get(values + i);
    if (job.finish == Finish::kAdd) v = v + get(residual + i);
    if (job.finish == Finish::kGeluTanh) v = gelu_of(Gelu::kTanh, v);
    if (job.finish == Finish::kGeluQuick) v = gelu_of(Gelu::kQuick, v);
    put(y + i, v);
  });
}

template <int ROWS, int PANELS, class Weights, class Ahead>
inline void byte_tile(const ByteLinearJob& job, int64_t row, int64_t panel, Ahead ahead) {
  constexpr int64_t kWidth = PANELS * kBytePanel;
  const int64_t column = panel * kBytePanel, left = job.columns - column;
  if (job.finish == Finish::kNone && left >= kWidth) {
    multiply_bytes<ROWS, PANELS, Weights>(job, row, panel, ahead, job.y + row * job.columns + column,
                                          job.columns);
    return;
  }
  float tile[ROWS * kWidth];
  multiply_bytes<ROWS, PANELS, Weights>(job, row, panel, ahead, tile, kWidth);
  for (int r = 0; r < ROWS; ++r) {
    finish_row(job, row + r, column, left < kWidth ? left : kWidth, tile + r * kWidth);
  }
}

// Panels that a tile of so many rows takes side by side: as many sums as the registers hold, where sums wait
// for one another. Elsewhere one panel, whose weights come as a single stream.
constexpr int byte_panels(int rows) {
  if (rows > 1 && !kSumsWait) return 1;
  const int fit = kByteSums / (rows * kPanelInts);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <int ROWS, class Weights, class Ahead>
inline void byte_rows(const ByteLinearJob& job, int64_t row, int64_t panel, int64_t panel_end, Ahead ahead) {
  constexpr int kSide = byte_panels(ROWS);
  for (; panel + kSide <= panel_end; panel += kSide) byte_tile<ROWS, kSide, Weights>(job, row, panel, ahead);
  for (; panel < panel_end; ++panel) byte_tile<ROWS, 1, Weights>(job, row, panel, ahead);
}

// Up to kByteTileRows rows against panels [panel, panel_end).
template <class Weights, class Ahead>
inline void byte_rows_of(int64_t rows, const ByteLinearJob& job, int64_t row, int64_t panel,
                         int64_t panel_end, Ahead ahead) {
#define VILA2_ROWS(n)                                                                           \
  case n:                                                                                       \
    if constexpr (n <= kByteTileRows) byte_rows<n, Weights>(job, row, panel, panel_end, ahead); \
    return
  switch (rows) {
    VILA2_ROWS(1);
    VILA2_ROWS(2);
    VILA2_ROWS(3);
    VILA2_ROWS(4);
    VILA2_ROWS(5);
    VILA2_ROWS(6);
    VILA2_ROWS(7);
    VILA2_ROWS(8);
    VILA2_ROWS(9);
    VILA2_ROWS(10);
    VILA2_ROWS(11);
    VILA2_ROWS(12);
  }
#undef VILA2_ROWS
}

template <class Weights>
inline void byte_linear_panels(const ByteLinearJob& job, int64_t row, int64_t row_end, int64_t panel,
                               int64_t panel_end) {
  const int64_t rows = row_end - row, tiles = (rows + kByteTileRows - 1) / kByteTileRows;
  if (tiles == 1) {
    const ByteStream ahead{rows == 1 ? kPrefetch : kPrefetchFar};
    byte_rows_of<Weights>(rows, job, row, panel, panel_end, ahead);
    return;
  }
  // Panels side by side as the full tile takes them, each group against all rows: the group stays in a cache.
  // Each tile fetches its share of the next group, so that memory works while all of them compute.
  constexpr int64_t kSide = byte_panels(kByteTileRows);
  const int64_t panel_size = job.x.stride * kBytePanel;
  for (; panel < panel_end; panel += kSide) {
    const int64_t last = panel + kSide < panel_end ? panel + kSide : panel_end;
    for (int64_t tile = 0, at = row; tile < tiles; ++tile) {
      const int64_t count = (rows - 1 - tile) / tiles + 1;  // of even height
      const ByteShare ahead{kSide * panel_size + tile * panel_size / tiles, kByteGroup * kBytePanel / tiles};
      byte_rows_of<Weights>(count, job, at, panel, last, ahead);
      at += count;
    }
  }
}

void byte_linear(const ByteLinearJob& job, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  (job.is_narrow ? byte_linear_panels<NarrowWeights> : byte_linear_panels<WideWeights>)(job, row, row_end,
                                                                                        panel, panel_end);
}
