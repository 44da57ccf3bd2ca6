// y = x @ weight.T + bias over packed weights.
//
// A panel holds kPanel columns: for each depth k, their kPanel weights side by side (as bfloat16 the two
// vectors of a row alternate, see load_pair). Every output is one chain of fused multiply-adds from the bias
// up through k = 0, 1, ...: the tiles, blocks and threads below only choose which chains run beside each
// other, so no output bit depends on them.

constexpr int kPanel = 2 * kLanes;
// Bytes that weights are fetched ahead: a few rows stream them faster than the hardware foresees, and more
// rows would otherwise compute and wait in turns.
constexpr int kPrefetch = 512, kPrefetchFar = 2048;

// What is fetched while something else is multiplied, `step` bytes further at each step of the depth: a
// stream of rows of T, or one tile's share of it.
template <class T>
struct Stream {
  const char* at;
  static constexpr int64_t step = kPanel * sizeof(T);
};
struct Share {
  const char* at;
  int64_t step;
};

inline void load_weights(const float* p, Vec& low, Vec& high) {
  low = load(p);
  high = load(p + kLanes);
}
inline void load_weights(const bf16* p, Vec& low, Vec& high) { load_pair(p, low, high); }

void pack(const float* weight, int64_t columns, int64_t depth, void* panels, Storage storage, int64_t panel) {
  const int64_t first = panel * kPanel;
  for (int64_t k = 0; k < depth; ++k) {
    float row[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) row[j] = first + j < columns ? weight[(first + j) * depth + k] : 0.f;
    const int64_t at = (panel * depth + k) * kPanel;
    if (storage == Storage::kFloat32) {
      store(static_cast<float*>(panels) + at, load(row));
      store(static_cast<float*>(panels) + at + kLanes, load(row + kLanes));
    } else {
      float mixed[kPanel];
      for (int64_t j = 0; j < kLanes; ++j) mixed[2 * j] = row[j], mixed[2 * j + 1] = row[kLanes + j];
      store(static_cast<bf16*>(panels) + at, load(mixed));
      store(static_cast<bf16*>(panels) + at + kLanes, load(mixed + kLanes));
    }
  }
}

// ROWS rows of x against PANELS panels over `depth` steps. The sums start from `start` (rows start_stride
// apart; null is zero), which is the bias, or y itself after an earlier block of the depth. Meanwhile the
// weights at `ahead` are fetched.
template <int ROWS, int PANELS, class T, class Ahead>
inline void multiply(const float* x, int64_t x_stride, const T* panels, int64_t panel_stride, Ahead ahead,
                     int64_t depth, const float* start, int64_t start_stride, float* y, int64_t y_stride) {
  Vec sums[ROWS][2 * PANELS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * PANELS; ++c)
      sums[r][c] = start ? load(start + r * start_stride + c * kLanes) : zero();
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec weights[2 * PANELS];
    if (PANELS == 1) __builtin_prefetch(ahead.at + k * ahead.step);
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const T* row = panels + p * panel_stride + k * kPanel;
      if (PANELS > 1) __builtin_prefetch(reinterpret_cast<const char*>(row) + kPrefetch);
      load_weights(row, weights[2 * p], weights[2 * p + 1]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Vec value = splat(x[r * x_stride + k]);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * PANELS; ++c) sums[r][c] = fma(value, weights[c], sums[r][c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * PANELS; ++c) store(y + r * y_stride + c * kLanes, sums[r][c]);
  }
}

template <class T, class Ahead>
inline void multiply_rows(int64_t rows, const float* x, int64_t x_stride, const T* panel, Ahead ahead,
                          int64_t depth, const float* start, int64_t start_stride, float* y,
                          int64_t y_stride) {
#define VILA2_ROWS(n)                                                                        \
  case n:                                                                                    \
    if constexpr (n <= kTileRows)                                                            \
      multiply<n, 1>(x, x_stride, panel, 0, ahead, depth, start, start_stride, y, y_stride); \
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

template <class T, class Ahead>
inline void multiply_tile(const LinearJob& job, int64_t row, int64_t rows, const T* weights, Ahead ahead,
                          int64_t panel, int64_t depth_start, int64_t depth) {
  const int64_t column = panel * kPanel;
  const int64_t columns = job.columns - column < kPanel ? job.columns - column : kPanel;
  const float* x = job.x + row * job.depth + depth_start;
  float* y = job.y + row * job.columns + column;
  const float* start = depth_start ? y : job.bias ? job.bias + column : nullptr;
  const int64_t start_stride = depth_start ? job.columns : 0;
  if (columns == kPanel) {
    multiply_rows(rows, x, job.depth, weights, ahead, depth, start, start_stride, y, job.columns);
    return;
  }
  // The last columns: through a whole tile beside y.
  float part[kTileRows * kPanel] = {};
  for (int64_t r = 0; start && r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) part[r * kPanel + c] = start[r * start_stride + c];
  multiply_rows(rows, x, job.depth, weights, ahead, depth, part, kPanel, part, kPanel);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) y[r * job.columns + c] = part[r * kPanel + c];
}

// One panel, over [depth_start, depth_start + depth) of the depth, for `rows` rows in tiles of even height.
// Each tile fetches its share of what is `ahead`, so that memory works while all of them compute.
template <class T, class U>
inline void multiply_panel(const LinearJob& job, int64_t row, int64_t rows, const T* weights, Stream<U> ahead,
                           int64_t panel, int64_t depth_start, int64_t depth) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  if (tiles == 1) {
    multiply_tile(job, row, rows, weights, ahead, panel, depth_start, depth);
    return;
  }
  Share share{ahead.at, ahead.step / tiles};
  for (int64_t tile = 0; tile < tiles; ++tile, share.at += depth * share.step) {
    const int64_t count = (rows - 1 - tile) / tiles + 1;
    multiply_tile(job, row, count, weights, share, panel, depth_start, depth);
    row += count;
  }
}

inline const float* as_float(const float* weights, int64_t, float*) { return weights; }
inline const float* as_float(const bf16* weights, int64_t depth, float* scratch) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec low, high;
    load_pair(weights + k * kPanel, low, high);
    store(scratch + k * kPanel, low);
    store(scratch + k * kPanel + kLanes, high);
  }
  return scratch;
}

template <class T>
inline void linear_panels(const LinearJob& job, int64_t row, int64_t row_end, int64_t panel,
                          int64_t panel_end, float* scratch) {
  const T* panels = static_cast<const T*>(job.panels);
  const int64_t rows = row_end - row, panel_size = job.depth * kPanel;
  if (rows <= kTileRows) {
    // A few rows wait for memory and for the latency of their chains: run several panels side by side.
    const float* x = job.x + row * job.depth;
    while (panel < panel_end) {
      const int64_t column = panel * kPanel;
      const int64_t whole = (job.columns - column) / kPanel;
      const int64_t left = panel_end - panel < whole ? panel_end - panel : whole;
      const float* start = job.bias ? job.bias + column : nullptr;
      float* y = job.y + row * job.columns + column;
      const T* weights = panels + panel * panel_size;
      if (rows == 1 && left >= 4) {
        multiply<1, 4>(x, job.depth, weights, panel_size, Stream<T>{}, job.depth, start, 0, y, job.columns);
        panel += 4;
      } else if (rows == 2 && left >= 2) {
        multiply<2, 2>(x, job.depth, weights, panel_size, Stream<T>{}, job.depth, start, 0, y, job.columns);
        panel += 2;
      } else {
        const Stream<T> ahead{reinterpret_cast<const char*>(weights) + kPrefetchFar};
        multiply_panel(job, row, rows, weights, ahead, panel, 0, job.depth);
        panel += 1;
      }
    }
    return;
  }
  for (int64_t k = 0; k < job.depth; k += kDepthBlock) {
    const int64_t depth = job.depth - k < kDepthBlock ? job.depth - k : kDepthBlock;
    for (int64_t p = panel; p < panel_end; ++p) {
      const T* weights = panels + p * panel_size + k * kPanel;
      const T* next = p + 1 < panel_end ? weights + panel_size : weights;
      const Stream<T> ahead{reinterpret_cast<const char*>(next)};
      if (rows > 2 * kTileRows) {
        multiply_panel(job, row, rows, as_float(weights, depth, scratch), ahead, p, k, depth);
      } else {
        multiply_panel(job, row, rows, weights, ahead, p, k, depth);
      }
    }
  }
}

void linear(const LinearJob& job, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
            float* scratch) {
  (job.storage == Storage::kFloat32 ? linear_panels<float> : linear_panels<bf16>)(job, row, row_end, panel,
                                                                                  panel_end, scratch);
}
