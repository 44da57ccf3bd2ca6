// Kernels that treat rows on their own: norms, activations, rotary positions.

inline Vec round_to(const float*, Vec v) { return v; }
inline Vec round_to(const bf16*, Vec v) {
  bf16 lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}

template <class T>
inline void normalize_row(const T* x, const T* weight, T* y, int64_t width, float scale) {
  for_each_vec(width, [&](int64_t i, auto get, auto put) {
    // Rounds to the input type before the weight, as the reference does.
    put(y + i, round_to(x, get(x + i) * splat(scale)) * get(weight + i));
  });
}

template <class T>
void rms_norm_rows(const NormJob& job, int64_t row, int64_t row_end) {
  for (; row < row_end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    Vec squares = zero();
    for_each_vec(job.width, [&](int64_t i, auto get, auto) {
      const Vec v = get(x + i);
      squares = fma(v, v, squares);
    });
    const float scale = 1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(job.width) + job.eps);
    normalize_row(x, static_cast<const T*>(job.weight), static_cast<T*>(job.y) + row * job.width, job.width,
                  scale);
  }
}

template <class T>
void add_rms_norm_rows(const NormJob& job, int64_t row, int64_t row_end) {
  for (; row < row_end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    T* residual = static_cast<T*>(job.residual) + row * job.width;
    Vec squares = zero();
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) {
      const Vec v = round_to(x, get(x + i) + get(residual + i));
      put(residual + i, v);
      squares = fma(v, v, squares);
    });
    const float scale = 1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(job.width) + job.eps);
    normalize_row<T>(residual, static_cast<const T*>(job.weight), static_cast<T*>(job.y) + row * job.width,
                     job.width, scale);
  }
}

template <class T>
void layer_norm_rows(const NormJob& job, int64_t row, int64_t row_end) {
  const T* weight = static_cast<const T*>(job.weight);
  const T* bias = static_cast<const T*>(job.bias);
  const int64_t whole = job.width / kLanes * kLanes;
  for (; row < row_end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    T* y = static_cast<T*>(job.y) + row * job.width;
    Vec total = zero();
    for_each_vec(job.width, [&](int64_t i, auto get, auto) { total = total + get(x + i); });
    const Vec mean = splat(sum(total) / static_cast<float>(job.width));
    Vec squares = zero();
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec d = load(x + i) - mean;
      squares = fma(d, d, squares);
    }
    float variance = sum(squares);
    if (whole < job.width) {  // the lanes beyond the row are not at the mean: leave them out
      float lanes[kLanes];
      const Vec d = load_part(x + whole, job.width - whole) - mean;
      store(lanes, d);
      for (int64_t i = whole; i < job.width; ++i) variance += lanes[i - whole] * lanes[i - whole];
    }
    const Vec scale = splat(1.f / __builtin_sqrtf(variance / static_cast<float>(job.width) + job.eps));
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) {
      put(y + i, fma((get(x + i) - mean) * scale, get(weight + i), get(bias + i)));
    });
  }
}

template <class T>
void add_layer_norm_rows(const NormJob& job, int64_t row, int64_t row_end) {
  NormJob sum = job;
  sum.x = job.residual;
  for (; row < row_end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    T* residual = static_cast<T*>(job.residual) + row * job.width;
    for_each_vec(job.width,
                 [&](int64_t i, auto get, auto put) { put(residual + i, get(x + i) + get(residual + i)); });
    layer_norm_rows<T>(sum, row,
                       row + 1);  // from the L1 cache: the bits of an addition and a norm on their own
  }
}

template <class T>
void silu_mul_rows(const ActivationJob& job, int64_t row, int64_t row_end) {
  for (; row < row_end; ++row) {
    const T* gate = static_cast<const T*>(job.x) + row * 2 * job.width;
    const T* up = gate + job.width;
    T* y = static_cast<T*>(job.y) + row * job.width;
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) {
      const Vec g = get(gate + i);
      put(y + i, round_to(gate, g * sigmoid(g)) * get(up + i));
    });
  }
}

inline Vec gelu_of(Gelu kind, Vec v) {
  if (kind == Gelu::kQuick) return v * sigmoid(v * splat(1.702f));
  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
  return v * sigmoid(v * fma(v * v, splat(2.f * 0.7978845608f * 0.044715f), splat(2.f * 0.7978845608f)));
}

template <class T>
void gelu_rows(const ActivationJob& job, int64_t row, int64_t row_end) {
  const T* x = static_cast<const T*>(job.x) + row * job.width;
  T* y = static_cast<T*>(job.y) + row * job.width;
  for_each_vec((row_end - row) * job.width,
               [&](int64_t i, auto get, auto put) { put(y + i, gelu_of(job.kind, get(x + i))); });
}

template <class In, class Out>
inline void rotate(const In* x, Out* y, const float* cos, const float* sin, int64_t half) {
  for_each_vec(half, [&](int64_t i, auto get, auto put) {
    const Vec first = get(x + i), second = get(x + half + i), c = get(cos + i), s = get(sin + i);
    put(y + i, round_to(x, first * c - second * s));
    put(y + half + i, round_to(x, second * c + first * s));
  });
}

template <class In, class Cache>
void rope_store_tokens(const RopeJob& job, int64_t token, int64_t token_end) {
  const int64_t half = job.dim / 2;
  for (; token < token_end; ++token) {
    const In* q = static_cast<const In*>(job.q) + token * job.q_stride;
    const In* k = static_cast<const In*>(job.k) + token * job.k_stride;
    const In* v = static_cast<const In*>(job.v) + token * job.v_stride;
    const float* cos = job.cos + job.positions[token] * half;
    const float* sin = job.sin + job.positions[token] * half;
    In* q_out = static_cast<In*>(job.q_out) + token * job.heads * job.dim;
    for (int64_t h = 0; h < job.heads; ++h) rotate(q + h * job.dim, q_out + h * job.dim, cos, sin, half);
    if (job.slots[token] < 0) continue;
    const int64_t block = job.slots[token] / job.block_size, offset = job.slots[token] % job.block_size;
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      const int64_t at = ((block * job.kv_heads + h) * job.block_size + offset) * job.dim;
      rotate(k + h * job.dim, static_cast<Cache*>(job.k_cache) + at, cos, sin, half);
      Cache* to = static_cast<Cache*>(job.v_cache) + at;
      const In* from = v + h * job.dim;
      for_each_vec(job.dim, [&](int64_t i, auto get, auto put) { put(to + i, get(from + i)); });
    }
  }
}

void rms_norm(const NormJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? rms_norm_rows<float> : rms_norm_rows<bf16>)(job, row, row_end);
}
void add_rms_norm(const NormJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? add_rms_norm_rows<float> : add_rms_norm_rows<bf16>)(job, row, row_end);
}
void layer_norm(const NormJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? layer_norm_rows<float> : layer_norm_rows<bf16>)(job, row, row_end);
}
void add_layer_norm(const NormJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? add_layer_norm_rows<float> : add_layer_norm_rows<bf16>)(job, row,
                                                                                              row_end);
}
void silu_mul(const ActivationJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? silu_mul_rows<float> : silu_mul_rows<bf16>)(job, row, row_end);
}
void gelu(const ActivationJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? gelu_rows<float> : gelu_rows<bf16>)(job, row, row_end);
}
void rope_store(const RopeJob& job, int64_t token, int64_t token_end) {
  const bool cache32 = job.cache_storage == Storage::kFloat32;
  if (job.storage == Storage::kFloat32) {
    (cache32 ? rope_store_tokens<float, float> : rope_store_tokens<float, bf16>)(job, token, token_end);
  } else {
    (cache32 ? rope_store_tokens<bf16, float> : rope_store_tokens<bf16, bf16>)(job, token, token_end);
  }
}

int64_t first_above(const float* row, int64_t count, float limit) {
  const Vec most = splat(limit);
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    const unsigned any = above(load(row + i), most) | above(load(row + i + kLanes), most) |
                         above(load(row + i + 2 * kLanes), most) | above(load(row + i + 3 * kLanes), most);
    if (any) break;
  }
  for (; i + kLanes <= count; i += kLanes) {
    if (const unsigned lanes = above(load(row + i), most)) return i + __builtin_ctz(lanes);
  }
  for (; i < count; ++i) {
    if (row[i] > limit) return i;
  }
  return count;
}
