// Causal attention over paged keys and values, with an online softmax in float32.
//
// Keys are taken kKeyTile at a time from the start of the context. A row (a token's query head) sees the same
// tiles in the same order whoever shares its call, and masked scores weigh exactly 0, so its result depends
// on nothing else.

struct AttentionScratch {
  int64_t stride;  // head_dim, rounded up to whole vectors; what is beyond head_dim is zero
  float *queries, *sums, *keys, *values, *scores, *maxima, *totals;
};

constexpr int64_t kPaddedDim = (kMaxHeadDim + kLanes - 1) / kLanes * kLanes;
constexpr int64_t kAttentionScratch =
    (2 * kAttentionRows + 2 * kKeyTile) * kPaddedDim + kAttentionRows * (kKeyTile + 2);

template <class T>
inline void copy_padded(const T* from, float* to, int64_t count, int64_t stride) {
  for_each_vec(count, [&](int64_t i, auto get, auto) { store(to + i, get(from + i)); });
  for (int64_t i = (count + kLanes - 1) / kLanes * kLanes; i < stride; i += kLanes) store(to + i, zero());
}

// A row of keys or values, on its way to the cache.
template <class T>
inline void fetch(const T* line, int64_t stride) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < stride; i += kLine) __builtin_prefetch(line + i);
}

// ROWS queries against groups of four keys; every score is one chain over the dimension, then one tree of
// sums.
template <int ROWS, int GROUPS, class T>
inline void score(const float* queries, int64_t stride, const T* const* keys, float* scores) {
  Vec sums[ROWS][4 * GROUPS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < 4 * GROUPS; ++j) sums[r][j] = zero();
  }
  for (int64_t d = 0; d < stride; d += kLanes) {
    Vec query[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) query[r] = load(queries + r * stride + d);
#pragma GCC unroll 8
    for (int j = 0; j < 4 * GROUPS; ++j) {
      const Vec key = load(keys[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][j] = fma(query[r], key, sums[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int g = 0; g < GROUPS; ++g) {
      Vec* s = sums[r] + 4 * g;
      store_sums4(scores + r * kKeyTile + 4 * g, s[0], s[1], s[2], s[3]);
    }
  }
}

// sums += weights @ values for ROWS rows and VECS vectors of the dimension.
template <int ROWS, int VECS, class T>
inline void accumulate(const float* weights, const T* const* values, int64_t count, int64_t d, float* sums,
                       int64_t stride, const T* const* next) {
  Vec total[ROWS][VECS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < VECS; ++c) total[r][c] = load(sums + r * stride + d + c * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    if (next) fetch(next[j], stride);
    Vec weight[ROWS];  // with one value at a time, 3 x 4 sums just fit into 16 registers
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) weight[r] = splat(weights[r * kKeyTile + j]);
#pragma GCC unroll 4
    for (int c = 0; c < VECS; ++c) {
      const Vec value = load(values[j] + d + c * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) total[r][c] = fma(weight[r], value, total[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < VECS; ++c) store(sums + r * stride + d + c * kLanes, total[r][c]);
  }
}

template <int ROWS, class T>
inline void score_rows(const AttentionScratch& s, int64_t row, const T* const* keys, int64_t count,
                       const T* const* next) {
  const float* queries = s.queries + row * s.stride;
  float* scores = s.scores + row * kKeyTile;
  int64_t j = 0;
  if (ROWS == 1) {
    for (; j + 4 < count; j += 8) score<1, 2>(queries, s.stride, keys + j, scores + j);
  }
  for (; j < count; j += 4) {
    for (int64_t i = j; next && i < j + 4; ++i) fetch(next[i], s.stride);
    score<ROWS, 1>(queries, s.stride, keys + j, scores + j);
  }
}

template <int ROWS, class T>
inline void accumulate_rows(const AttentionScratch& s, int64_t row, const T* const* values, int64_t count,
                            const T* const* next) {
  const float* weights = s.scores + row * kKeyTile;
  float* sums = s.sums + row * s.stride;
  int64_t d = 0;
  for (; d + 4 * kLanes <= s.stride; d += 4 * kLanes)
    accumulate<ROWS, 4>(weights, values, count, d, sums, s.stride, d ? nullptr : next);
  for (; d + 2 * kLanes <= s.stride; d += 2 * kLanes)
    accumulate<ROWS, 2>(weights, values, count, d, sums, s.stride, d ? nullptr : next);
  for (; d < s.stride; d += kLanes)
    accumulate<ROWS, 1>(weights, values, count, d, sums, s.stride, d ? nullptr : next);
}

// Scores of one row to weights; keys from `visible` on are masked. Rescales the row's running sums.
inline void soften(const AttentionScratch& s, int64_t row, int64_t visible, float scale) {
  float* scores = s.scores + row * kKeyTile;
  for (int64_t j = visible < 0 ? 0 : visible; j < kKeyTile; ++j) scores[j] = -__builtin_inff();
  Vec highest = splat(s.maxima[row]);
  for (int64_t j = 0; j < kKeyTile; j += kLanes) {
    const Vec v = load(scores + j) * splat(scale);
    store(scores + j, v);
    highest = max(highest, v);
  }
  const float maximum = largest(highest);
  float factor[kLanes];
  store(factor, exp2(splat(s.maxima[row]) - splat(maximum)));
  Vec total = zero();
  for (int64_t j = 0; j < kKeyTile; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - splat(maximum));
    store(scores + j, weight);
    total = total + weight;
  }
  s.totals[row] = s.totals[row] * factor[0] + sum(total);
  if (maximum != s.maxima[row]) {
    float* sums = s.sums + row * s.stride;
    for (int64_t d = 0; d < s.stride; d += kLanes) store(sums + d, load(sums + d) * splat(factor[0]));
    s.maxima[row] = maximum;
  }
}

// A few rows read each key once and would wait for it: while they compute the scores the values are fetched,
// and meanwhile the `next` keys (null: none).
template <class T>
inline void attend_keys(const AttentionScratch& s, int64_t rows, int64_t heads, int64_t first_visible,
                        const T* const* keys, const T* const* values, int64_t count, float scale,
                        const T* const* next) {
  const T* const* soon = rows <= 3 ? values : nullptr;
  int64_t row = 0;
  for (; row + 3 <= rows; row += 3) score_rows<3>(s, row, keys, count, soon);
  if (rows - row == 2) score_rows<2>(s, row, keys, count, soon);
  if (rows - row == 1) score_rows<1>(s, row, keys, count, soon);
  for (row = 0; row < rows; ++row) {
    const int64_t visible = first_visible + row / heads;
    soften(s, row, visible < count ? visible : count, scale);
  }
  row = 0;
  for (; row + 3 <= rows; row += 3) accumulate_rows<3>(s, row, values, count, next);
  if (rows - row == 2) accumulate_rows<2>(s, row, values, count, next);
  if (rows - row == 1) accumulate_rows<1>(s, row, values, count, next);
}

// Where the keys from `first` on lie in the cache. Groups of four may run past the last one: it is repeated.
inline void find_keys(const AttentionJob& job, const AttentionTile& tile, int64_t kv_head, int64_t first,
                      int64_t count, int64_t* offsets) {
  const int32_t* block = tile.block_table + first / job.block_size;
  int64_t slot = first % job.block_size;
  for (int64_t j = 0; j < count; ++block, slot = 0) {
    int64_t at = ((*block * job.kv_heads + kv_head) * job.block_size + slot) * job.dim;
    for (; slot < job.block_size && j < count; ++slot, at += job.dim) offsets[j++] = at;
  }
  for (int64_t j = count; j < kKeyTile; ++j) offsets[j] = offsets[count - 1];
}

// `offsets` of this tile's keys, and of the next one's (null: there is none).
inline void attend_tile(const AttentionJob& job, const AttentionTile& tile, const AttentionScratch& s,
                        int64_t first, int64_t count, const int64_t* offsets, const int64_t* next) {
  const int64_t rows = tile.tokens * tile.heads;
  const int64_t first_visible = tile.position + 1 - first;
  // log2(e) goes into the scale: the softmax is taken in powers of two.
  const float scale = job.scale * kLog2e;
  const float *keys[kKeyTile], *values[kKeyTile], *next_keys[kKeyTile];
  if (rows > 3) next = nullptr;
  if (job.cache_storage == Storage::kFloat32 && s.stride == job.dim) {
    for (int64_t j = 0; j < kKeyTile; ++j) {
      keys[j] = static_cast<const float*>(job.k_cache) + offsets[j];
      values[j] = static_cast<const float*>(job.v_cache) + offsets[j];
      if (next) next_keys[j] = static_cast<const float*>(job.k_cache) + next[j];
    }
  } else if (job.cache_storage == Storage::kBfloat16 && s.stride == job.dim && rows <= 3) {
    const bf16 *narrow_keys[kKeyTile], *narrow_values[kKeyTile], *narrow_next[kKeyTile];
    for (int64_t j = 0; j < kKeyTile; ++j) {
      narrow_keys[j] = static_cast<const bf16*>(job.k_cache) + offsets[j];
      narrow_values[j] = static_cast<const bf16*>(job.v_cache) + offsets[j];
      if (next) narrow_next[j] = static_cast<const bf16*>(job.k_cache) + next[j];
    }
    attend_keys(s, rows, tile.heads, first_visible, narrow_keys, narrow_values, count, scale,
                next ? narrow_next : nullptr);
    return;
  } else {
    next = nullptr;  // rows are widened one after another: the hardware sees them coming
    for (int64_t j = 0; j < kKeyTile; ++j) {
      const int64_t line = j < count ? j : count - 1;
      keys[j] = s.keys + line * s.stride;
      values[j] = s.values + line * s.stride;
    }
    for (int64_t j = 0; j < count; ++j) {
      if (job.cache_storage == Storage::kFloat32) {
        copy_padded(static_cast<const float*>(job.k_cache) + offsets[j], s.keys + j * s.stride, job.dim,
                    s.stride);
        copy_padded(static_cast<const float*>(job.v_cache) + offsets[j], s.values + j * s.stride, job.dim,
                    s.stride);
      } else {
        copy_padded(static_cast<const bf16*>(job.k_cache) + offsets[j], s.keys + j * s.stride, job.dim,
                    s.stride);
        copy_padded(static_cast<const bf16*>(job.v_cache) + offsets[j], s.values + j * s.stride, job.dim,
                    s.stride);
      }
    }
  }
  attend_keys(s, rows, tile.heads, first_visible, keys, values, count, scale, next ? next_keys : nullptr);
}

template <class T>
void attention_rows(const AttentionJob& job, const AttentionTile& tile, float* scratch) {
  AttentionScratch s;
  s.stride = (job.dim + kLanes - 1) / kLanes * kLanes;
  s.queries = scratch;
  s.sums = s.queries + kAttentionRows * s.stride;
  s.keys = s.sums + kAttentionRows * s.stride;
  s.values = s.keys + kKeyTile * s.stride;
  s.scores = s.values + kKeyTile * s.stride;
  s.maxima = s.scores + kAttentionRows * kKeyTile;
  s.totals = s.maxima + kAttentionRows;
  const int64_t rows = tile.tokens * tile.heads;
  for (int64_t row = 0; row < rows; ++row) {
    const T* q = static_cast<const T*>(job.q) + (tile.token + row / tile.heads) * job.q_stride +
                 (tile.head + row % tile.heads) * job.dim;
    copy_padded(q, s.queries + row * s.stride, job.dim, s.stride);
    for (int64_t d = 0; d < s.stride; d += kLanes) store(s.sums + row * s.stride + d, zero());
    s.maxima[row] = -__builtin_inff();
    s.totals[row] = 0.f;
  }
  const int64_t context = tile.position + tile.tokens;
  const int64_t kv_head = tile.head / (job.heads / job.kv_heads);
  const auto keys_at = [&](int64_t first) { return context - first < kKeyTile ? context - first : kKeyTile; };
  int64_t places[2][kKeyTile];
  find_keys(job, tile, kv_head, 0, keys_at(0), places[0]);
  for (int64_t first = 0, turn = 0; first < context; first += kKeyTile, turn = 1 - turn) {
    const int64_t next = first + kKeyTile;
    if (next < context) find_keys(job, tile, kv_head, next, keys_at(next), places[1 - turn]);
    attend_tile(job, tile, s, first, keys_at(first), places[turn],
                next < context ? places[1 - turn] : nullptr);
  }
  for (int64_t row = 0; row < rows; ++row) {
    T* out = static_cast<T*>(job.out) +
             ((tile.token + row / tile.heads) * job.heads + tile.head + row % tile.heads) * job.dim;
    const Vec scale = splat(1.f / s.totals[row]);
    const float* sums = s.sums + row * s.stride;
    for_each_vec(job.dim, [&](int64_t i, auto, auto put) { put(out + i, load(sums + i) * scale); });
  }
}

void attention(const AttentionJob& job, const AttentionTile& tile, float* scratch) {
  (job.storage == Storage::kFloat32 ? attention_rows<float> : attention_rows<bf16>)(job, tile, scratch);
}
