// The linear of linear.inl with both sides as bfloat16, where the CPU multiplies those (AVX512-BF16).
//
// An instruction takes two neighbours along the depth: sum += x[k + 1] * w[k + 1], then sum += x[k] * w[k],
// each rounded to float32. So weights lie in pairs, (panel, depth / 2, kPanel, 2), and rows of x are rounded
// to bfloat16 a block at a time. As there, every output is one chain from the bias up through the depth, and
// no bit of it depends on the rows beside it: that is what drafts and --deterministic rest on.
//
// No CPU that has these instructions was at hand: the tiles are those of linear.inl, the speed is not
// measured.

#if defined(__AVX512BF16__)

constexpr int64_t kBf16Group = 2;
constexpr int64_t kPairRows = 192;  // of x, rounded at once
constexpr int64_t kLinearScratch = kPairRows * kDepthBlock / 2;

inline int64_t even(int64_t depth) { return (depth + 1) / 2 * 2; }

void pack_pairs(const float* weight, int64_t columns, int64_t depth, bf16* panels, int64_t panel) {
  const int64_t first = panel * kPanel;
  bf16* out = panels + panel * even(depth) * kPanel;
  for (int64_t k = 0; k < depth; k += 2, out += 2 * kPanel) {
    float pairs[2 * kPanel] = {};  // zero beside an odd last one, and in columns that are not there
    for (int64_t j = 0; j < kPanel && first + j < columns; ++j) {
      const float* from = weight + (first + j) * depth + k;
      pairs[2 * j] = from[0];
      if (k + 1 < depth) pairs[2 * j + 1] = from[1];
    }
    for (int64_t i = 0; i < 2 * kPanel; i += kLanes) store(out + i, load(pairs + i));
  }
}

// `rows` rows of x, `count` of their elements, to bfloat16 rows of even(count).
inline void round_rows(const float* x, int64_t x_stride, int64_t rows, int64_t count, bf16* out) {
  for (; rows-- > 0; x += x_stride, out += even(count)) {
    for_each_vec(count, [&](int64_t i, auto get, auto put) { put(out + i, get(x + i)); });
    if (count % 2) out[count].bits = 0;
  }
}

// As `multiply` of linear.inl; `x` are rounded rows x_stride apart, `depth` is even.
template <int ROWS, int PANELS>
inline void multiply_pairs(const bf16* x, int64_t x_stride, const bf16* panels, int64_t panel_stride,
                           int64_t depth, const float* start, int64_t start_stride, float* y,
                           int64_t y_stride) {
  Vec sums[ROWS][2 * PANELS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * PANELS; ++c)
      sums[r][c] = start ? load(start + r * start_stride + c * kLanes) : zero();
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k += 2) {
    Pairs weights[2 * PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const bf16* row = panels + p * panel_stride + k * kPanel;
      __builtin_prefetch(reinterpret_cast<const char*>(row) + kPrefetchFar);
      __builtin_prefetch(reinterpret_cast<const char*>(row) + kPrefetchFar + 64);
      weights[2 * p] = load_pairs(row);
      weights[2 * p + 1] = load_pairs(row + 2 * kLanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Pairs pair = splat_pair(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * PANELS; ++c) sums[r][c] = add_dot2(sums[r][c], pair, weights[c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * PANELS; ++c) store(y + r * y_stride + c * kLanes, sums[r][c]);
  }
}

inline void multiply_pair_rows(int64_t rows, const bf16* x, int64_t x_stride, const bf16* panel,
                               int64_t depth, const float* start, int64_t start_stride, float* y,
                               int64_t y_stride) {
#define VILA2_ROWS(n) \
  case n:             \
    return multiply_pairs<n, 1>(x, x_stride, panel, 0, depth, start, start_stride, y, y_stride)
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

// Rows [row, row + rows), rounded in `x` from depth_start on, against panels [panel, panel_end).
inline void multiply_pair_panels(const LinearJob& job, const bf16* x, int64_t row, int64_t rows,
                                 int64_t panel, int64_t panel_end, int64_t depth_start, int64_t depth) {
  const int64_t panel_size = even(job.depth) * kPanel;
  while (panel < panel_end) {
    const int64_t column = panel * kPanel, left = job.columns - column;
    const bf16* weights = static_cast<const bf16*>(job.panels) + panel * panel_size + depth_start * kPanel;
    float* y = job.y + row * job.columns + column;
    const float* start = depth_start ? y : job.bias ? job.bias + column : nullptr;
    const int64_t start_stride = depth_start ? job.columns : 0;
    // A row or two wait for the latency of their chains: run several panels side by side.
    if (rows <= 2 && panel_end - panel >= 4 && left >= 4 * kPanel) {
      (rows == 1 ? multiply_pairs<1, 4> : multiply_pairs<2, 4>)(x, depth, weights, panel_size, depth, start,
                                                                start_stride, y, job.columns);
      panel += 4;
      continue;
    }
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t tile = 0, at = 0; tile < tiles; ++tile) {
      const int64_t count = (rows - 1 - tile) / tiles + 1;  // of even height
      const float* from = start ? start + at * start_stride : nullptr;
      float* to = y + at * job.columns;
      if (left >= kPanel) {
        multiply_pair_rows(count, x + at * depth, depth, weights, depth, from, start_stride, to, job.columns);
      } else {  // the last columns: through a whole tile beside y
        float part[kTileRows * kPanel] = {};
        for (int64_t r = 0; from && r < count; ++r)
          for (int64_t c = 0; c < left; ++c) part[r * kPanel + c] = from[r * start_stride + c];
        multiply_pair_rows(count, x + at * depth, depth, weights, depth, part, kPanel, part, kPanel);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < left; ++c) to[r * job.columns + c] = part[r * kPanel + c];
      }
      at += count;
    }
    panel += 1;
  }
}

void linear_of_pairs(const LinearJob& job, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                     float* scratch) {
  bf16* x = reinterpret_cast<bf16*>(scratch);
  for (; row < row_end; row += kPairRows) {
    const int64_t rows = row_end - row < kPairRows ? row_end - row : kPairRows;
    // As much of the depth at once as the scratch holds: all of it for a few rows, whose sums then stay in
    // registers. Where a block ends a sum passes through y, which takes no bit from it.
    const int64_t most = kPairRows * kDepthBlock / rows / 2 * 2;
    for (int64_t k = 0; k < job.depth; k += most) {
      const int64_t depth = job.depth - k < most ? job.depth - k : most;
      round_rows(job.x + row * job.depth + k, job.depth, rows, depth, x);
      multiply_pair_panels(job, x, row, rows, panel, panel_end, k, even(depth));
    }
  }
}

void pack_any(const float* weight, int64_t columns, int64_t depth, void* panels, Storage storage,
              int64_t panel) {
  if (storage == Storage::kFloat32) return pack(weight, columns, depth, panels, storage, panel);
  pack_pairs(weight, columns, depth, static_cast<bf16*>(panels), panel);
}

void linear_any(const LinearJob& job, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                float* scratch) {
  (job.storage == Storage::kFloat32 ? linear : linear_of_pairs)(job, row, row_end, panel, panel_end, scratch);
}

#else

constexpr int64_t kBf16Group = 1;
constexpr int64_t kLinearScratch = kDepthBlock * kPanel;
constexpr auto* pack_any = pack;
constexpr auto* linear_any = linear;

#endif
