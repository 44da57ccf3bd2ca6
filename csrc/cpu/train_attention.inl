// Attention over packed segments, forward and backward, in float32.
//
// A tile is some rows of one segment times the query heads of one KV head. Its context, the prefix and then
// the segment's own rows, is taken kSegmentKeys keys at a time: keys are copied side by side and also turned,
// so that all five products run through one kernel over rows of vectors. What lies beyond a row's last key
// weighs 0.

// c (rows, columns) = or += a @ b over `depth`: a(i, k) lies at a[i * a_row + k * a_step].
template <int ROWS, int VECS>
inline void product_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                         int64_t depth, float* c, int64_t c_row, bool add) {
  Vec sums[ROWS][VECS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) sums[r][v] = add ? load(c + r * c_row + v * kLanes) : zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec line[VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) line[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Vec value = splat(a[r * a_row + k * a_step]);
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) sums[r][v] = fma(value, line[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
  }
}

template <int VECS>
inline void product_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b,
                         int64_t b_row, int64_t depth, float* c, int64_t c_row, bool add) {
#define VILA2_ROWS(n)                                                                                      \
  case n:                                                                                                  \
    if constexpr (n <= kTileRows) product_tile<n, VECS>(a, a_row, a_step, b, b_row, depth, c, c_row, add); \
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

// `columns` are whole vectors.
inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                    int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  int64_t column = 0;
  while (column < columns) {
    const bool pair = columns - column >= 2 * kLanes;
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
      const int64_t count = (rows - 1 - tile) / tiles + 1;
      const float* left = a + row * a_row;
      float* to = c + row * c_row + column;
      if (pair) {
        product_rows<2>(count, left, a_row, a_step, b + column, b_row, depth, to, c_row, add);
      } else {
        product_rows<1>(count, left, a_row, a_step, b + column, b_row, depth, to, c_row, add);
      }
      row += count;
    }
    column += pair ? 2 * kLanes : kLanes;
  }
}

inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// One token's heads, rotated (by minus the angle for a gradient) from rows of `dim` elements to rows of
// `dim`.
template <class In, class Out>
inline void turn_head(const In* from, Out* to, const float* cos, const float* sin, int64_t dim, float sign) {
  if (!cos) {
    for_each_vec(dim, [&](int64_t i, auto get, auto put) { put(to + i, get(from + i)); });
    return;
  }
  const int64_t half = dim / 2;
  const Vec direction = splat(sign);
  for_each_vec(half, [&](int64_t i, auto get, auto put) {
    const Vec first = get(from + i), second = get(from + half + i), c = get(cos + i);
    const Vec s = get(sin + i) * direction;
    put(to + i, round_to(from, first * c - second * s));
    put(to + half + i, round_to(from, second * c + first * s));
  });
}

struct Angle {
  const float *cos, *sin;
};
inline Angle angle_of(const SegmentJob& job, int64_t token) {
  if (!job.positions) return {nullptr, nullptr};
  const int64_t at = job.positions[token] * (job.dim / 2);
  return {job.cos + at, job.sin + at};
}

template <class T>
void segment_load_tokens(const SegmentJob& job, int64_t token, int64_t token_end) {
  for (; token < token_end; ++token) {
    const Angle angle = angle_of(job, token);
    const T* q = static_cast<const T*>(job.q_in) + token * job.q_stride;
    const T* k = static_cast<const T*>(job.k_in) + token * job.k_stride;
    const T* v = static_cast<const T*>(job.v_in) + token * job.v_stride;
    const int64_t plane = job.tokens * job.dim, at = token * job.dim;
    for (int64_t h = 0; h < job.heads; ++h)
      turn_head(q + h * job.dim, job.q + h * plane + at, angle.cos, angle.sin, job.dim, 1.f);
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      turn_head(k + h * job.dim, job.k + h * plane + at, angle.cos, angle.sin, job.dim, 1.f);
      turn_head(v + h * job.dim, job.v + h * plane + at, nullptr, nullptr, job.dim, 1.f);
    }
  }
}

template <class T>
void segment_store_tokens(const SegmentJob& job, int64_t token, int64_t token_end) {
  for (; token < token_end; ++token) {
    const Angle angle = angle_of(job, token);
    T* k = static_cast<T*>(job.k_grad) + token * job.k_grad_stride;
    T* v = static_cast<T*>(job.v_grad) + token * job.v_grad_stride;
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      const int64_t at = (h * job.tokens + token) * job.dim;
      turn_head(job.k_sums + at, k + h * job.dim, angle.cos, angle.sin, job.dim, -1.f);
      turn_head(job.v_sums + at, v + h * job.dim, nullptr, nullptr, job.dim, 1.f);
    }
  }
}

// Some keys of a tile's context. What is beyond `count` or the head's dimension is zero.
struct SegmentKeys {
  int64_t first, count, columns;       // columns: count in whole vectors
  float *keys, *values;                // (count, stride)
  float *turned_keys, *turned_values;  // (dim, columns)
};

struct SegmentScratch {
  int64_t stride;  // of a head: its dimension in whole vectors
  int64_t group;   // query heads per KV head
  SegmentKeys keys;
  float *key_grads, *value_grads;  // (count, stride)
  float *queries, *sums, *slopes;  // (group, rows, stride)
  float *maxima, *totals;          // (group, rows)
  float *weights, *errors;         // (rows, columns)
};

inline SegmentScratch lay_out(const SegmentJob& job, float* memory, int64_t* size) {
  SegmentScratch s;
  s.stride = whole_vectors(job.dim);
  s.group = job.heads / job.kv_heads;
  const int64_t rows = segment_tile_rows(s.group), columns = whole_vectors(kSegmentKeys);
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    const int64_t at = used;
    used += (count + 15) / 16 * 16;
    return memory ? memory + at : nullptr;
  };
  s.keys.keys = take(columns * s.stride);
  s.keys.values = take(columns * s.stride);
  s.keys.turned_keys = take(job.dim * columns);
  s.keys.turned_values = take(job.dim * columns);
  s.key_grads = take(columns * s.stride);
  s.value_grads = take(columns * s.stride);
  s.queries = take(s.group * rows * s.stride);
  s.sums = take(s.group * rows * s.stride);
  s.slopes = take(s.group * rows * s.stride);
  s.maxima = take(s.group * rows);
  s.totals = take(s.group * rows);
  s.weights = take(rows * columns);
  s.errors = take(rows * columns);
  if (size) *size = used;
  return s;
}

int64_t segment_scratch(const SegmentJob& job) {
  int64_t size = 0;
  lay_out(job, nullptr, &size);
  return size;
}

inline int64_t context_row(const Segment& segment, int64_t index) {
  const int64_t seen = segment.prefix_end - segment.prefix_start;
  return index < seen ? segment.prefix_start + index : segment.start + index - seen;
}

// Rows of (tokens, dim) at the context's indices, turned: (dim, columns).
inline void turn_rows(const float* plane, const Segment& segment, int64_t dim, const SegmentKeys& keys,
                      float* turned) {
  for (int64_t j = 0; j < keys.count; ++j) {
    const float* row = plane + context_row(segment, keys.first + j) * dim;
    for (int64_t d = 0; d < dim; ++d) turned[d * keys.columns + j] = row[d];
  }
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t j = keys.count; j < keys.columns; ++j) turned[d * keys.columns + j] = 0.f;
}

inline void copy_rows(const float* plane, const Segment& segment, int64_t dim, int64_t stride,
                      const SegmentKeys& keys, float* rows) {
  for (int64_t j = 0; j < keys.count; ++j)
    copy_padded(plane + context_row(segment, keys.first + j) * dim, rows + j * stride, dim, stride);
}

inline void begin_keys(SegmentKeys& keys, int64_t first, int64_t context) {
  keys.first = first;
  keys.count = context - first < kSegmentKeys ? context - first : kSegmentKeys;
  keys.columns = whole_vectors(keys.count);
}

// How many of the keys at hand the tile's row r sees.
inline int64_t visible_keys(const SegmentTile& tile, const SegmentKeys& keys, int64_t r) {
  const int64_t seen = tile.segment.prefix_end - tile.segment.prefix_start;
  const int64_t visible = seen + tile.row - tile.segment.start + r + 1 - keys.first;
  return visible < 0 ? 0 : visible < keys.count ? visible : keys.count;
}

// Scores of one row to weights, with the running maximum and total; rescales the row's running sums.
inline void soften_row(float* scores, int64_t columns, int64_t visible, float scale, float& maximum,
                       float& total, float* sums, int64_t stride) {
  for (int64_t j = visible; j < columns; ++j) scores[j] = -__builtin_inff();
  Vec highest = splat(maximum);
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Vec v = load(scores + j) * splat(scale);
    store(scores + j, v);
    highest = max(highest, v);
  }
  const float risen = largest(highest);
  float factor[kLanes];
  store(factor, exp2(splat(maximum) - splat(risen)));
  Vec added = zero();
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - splat(risen));
    store(scores + j, weight);
    added = added + weight;
  }
  total = total * factor[0] + sum(added);
  if (risen != maximum) {
    for (int64_t d = 0; d < stride; d += kLanes) store(sums + d, load(sums + d) * splat(factor[0]));
    maximum = risen;
  }
}

template <class T>
void segment_forward_tile(const SegmentJob& job, const SegmentTile& tile, float* memory) {
  SegmentScratch s = lay_out(job, memory, nullptr);
  SegmentKeys& keys = s.keys;
  const int64_t plane = job.tokens * job.dim, rows = tile.rows;
  for (int64_t i = 0; i < s.group * rows; ++i) {
    s.maxima[i] = -__builtin_inff();
    s.totals[i] = 0.f;
    for (int64_t d = 0; d < s.stride; d += kLanes) store(s.sums + i * s.stride + d, zero());
  }
  const Segment& segment = tile.segment;
  const int64_t context = segment.prefix_end - segment.prefix_start + tile.row + rows - segment.start;
  // log2(e) goes into the scale: the softmax is taken in powers of two.
  const float scale = job.scale * kLog2e;
  for (int64_t first = 0; first < context; first += kSegmentKeys) {
    begin_keys(keys, first, context);
    turn_rows(job.k + tile.kv_head * plane, segment, job.dim, keys, keys.turned_keys);
    copy_rows(job.v + tile.kv_head * plane, segment, job.dim, s.stride, keys, keys.values);
    for (int64_t g = 0; g < s.group; ++g) {
      const float* q = job.q + (tile.kv_head * s.group + g) * plane + tile.row * job.dim;
      float* sums = s.sums + g * rows * s.stride;
      product(rows, keys.columns, job.dim, q, job.dim, 1, keys.turned_keys, keys.columns, s.weights,
              keys.columns, false);
      for (int64_t r = 0; r < rows; ++r) {
        soften_row(s.weights + r * keys.columns, keys.columns, visible_keys(tile, keys, r), scale,
                   s.maxima[g * rows + r], s.totals[g * rows + r], sums + r * s.stride, s.stride);
      }
      product(rows, s.stride, keys.count, s.weights, keys.columns, 1, keys.values, s.stride, sums, s.stride,
              true);
    }
  }
  for (int64_t g = 0; g < s.group; ++g) {
    const int64_t head = tile.kv_head * s.group + g;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = g * rows + r;
      const float* sums = s.sums + i * s.stride;
      T* out = static_cast<T*>(job.out) + ((tile.row + r) * job.heads + head) * job.dim;
      const Vec share = splat(1.f / s.totals[i]);
      for_each_vec(job.dim, [&](int64_t d, auto, auto put) { put(out + d, load(sums + d) * share); });
      job.log_sums[head * job.tokens + tile.row + r] = s.maxima[i] + __builtin_logf(s.totals[i]) * kLog2e;
    }
  }
}

// Scores to weights, then the products with the values' turned rows to the scores' gradient, row by row.
inline void differentiate_row(float* weights, float* errors, int64_t columns, int64_t visible, float scale,
                              float softmax_scale, float log_sum, float delta) {
  const Vec shift = splat(log_sum), factor = splat(softmax_scale), mean = splat(delta), slope = splat(scale);
  for (int64_t j = visible; j < columns; ++j) weights[j] = -__builtin_inff();
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Vec weight = exp2(load(weights + j) * factor - shift);
    store(weights + j, weight);
    store(errors + j, weight * (load(errors + j) - mean) * slope);
  }
}

inline void add_rows(const float* rows, int64_t stride, const Segment& segment, int64_t dim,
                     const SegmentKeys& keys, float* plane) {
  for (int64_t j = 0; j < keys.count; ++j) {
    float* to = plane + context_row(segment, keys.first + j) * dim;
    const float* from = rows + j * stride;
    for_each_vec(dim, [&](int64_t d, auto get, auto put) { put(to + d, get(to + d) + load(from + d)); });
  }
}

template <class T>
void segment_backward_tile(const SegmentJob& job, const SegmentTile& tile, float* memory) {
  SegmentScratch s = lay_out(job, memory, nullptr);
  SegmentKeys& keys = s.keys;
  const int64_t plane = job.tokens * job.dim, rows = tile.rows, dim = job.dim, stride = s.stride;
  for (int64_t g = 0; g < s.group; ++g) {
    const int64_t head = tile.kv_head * s.group + g;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = g * rows + r, at = ((tile.row + r) * job.heads + head) * dim;
      copy_padded(job.q + head * plane + (tile.row + r) * dim, s.queries + i * stride, dim, stride);
      copy_padded(static_cast<const T*>(job.out_grad) + at, s.slopes + i * stride, dim, stride);
      const T *out = static_cast<const T*>(job.out) + at, *grad = static_cast<const T*>(job.out_grad) + at;
      Vec products = zero();
      for_each_vec(dim,
                   [&](int64_t d, auto get, auto) { products = fma(get(out + d), get(grad + d), products); });
      s.totals[i] = sum(products);
      s.maxima[i] = job.log_sums[head * job.tokens + tile.row + r];
      for (int64_t d = 0; d < stride; d += kLanes) store(s.sums + i * stride + d, zero());
    }
  }
  const Segment& segment = tile.segment;
  const int64_t context = segment.prefix_end - segment.prefix_start + tile.row + rows - segment.start;
  for (int64_t first = 0; first < context; first += kSegmentKeys) {
    begin_keys(keys, first, context);
    const float *k = job.k + tile.kv_head * plane, *v = job.v + tile.kv_head * plane;
    copy_rows(k, segment, dim, stride, keys, keys.keys);
    turn_rows(k, segment, dim, keys, keys.turned_keys);
    turn_rows(v, segment, dim, keys, keys.turned_values);
    for (int64_t g = 0; g < s.group; ++g) {
      const float *queries = s.queries + g * rows * stride, *slopes = s.slopes + g * rows * stride;
      product(rows, keys.columns, dim, queries, stride, 1, keys.turned_keys, keys.columns, s.weights,
              keys.columns, false);
      product(rows, keys.columns, dim, slopes, stride, 1, keys.turned_values, keys.columns, s.errors,
              keys.columns, false);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * keys.columns;
        differentiate_row(s.weights + at, s.errors + at, keys.columns, visible_keys(tile, keys, r), job.scale,
                          job.scale * kLog2e, s.maxima[g * rows + r], s.totals[g * rows + r]);
      }
      product(rows, stride, keys.count, s.errors, keys.columns, 1, keys.keys, stride,
              s.sums + g * rows * stride, stride, true);
      product(keys.count, stride, rows, s.errors, 1, keys.columns, queries, stride, s.key_grads, stride,
              g > 0);
      product(keys.count, stride, rows, s.weights, 1, keys.columns, slopes, stride, s.value_grads, stride,
              g > 0);
    }
    add_rows(s.key_grads, stride, segment, dim, keys, job.k_sums + tile.kv_head * plane);
    add_rows(s.value_grads, stride, segment, dim, keys, job.v_sums + tile.kv_head * plane);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Angle angle = angle_of(job, tile.row + r);
    T* to = static_cast<T*>(job.q_grad) + (tile.row + r) * job.q_grad_stride + tile.kv_head * s.group * dim;
    for (int64_t g = 0; g < s.group; ++g)
      turn_head(s.sums + (g * rows + r) * stride, to + g * dim, angle.cos, angle.sin, dim, -1.f);
  }
}

void segment_load(const SegmentJob& job, int64_t token, int64_t token_end) {
  (job.storage == Storage::kFloat32 ? segment_load_tokens<float> : segment_load_tokens<bf16>)(job, token,
                                                                                              token_end);
}
void segment_store(const SegmentJob& job, int64_t token, int64_t token_end) {
  (job.storage == Storage::kFloat32 ? segment_store_tokens<float> : segment_store_tokens<bf16>)(job, token,
                                                                                                token_end);
}
void segment_forward(const SegmentJob& job, const SegmentTile& tile, float* scratch) {
  (job.storage == Storage::kFloat32 ? segment_forward_tile<float> : segment_forward_tile<bf16>)(job, tile,
                                                                                                scratch);
}
void segment_backward(const SegmentJob& job, const SegmentTile& tile, float* scratch) {
  (job.storage == Storage::kFloat32 ? segment_backward_tile<float> : segment_backward_tile<bf16>)(job, tile,
                                                                                                  scratch);
}

const TrainKernels kTrain = {
    norm_forward, norm_grad,       silu_mul_grad,   gelu_grad,        softmax_error,
    segment_load, segment_scratch, segment_forward, segment_backward, segment_store,
};
