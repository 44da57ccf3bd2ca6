// Training kernels that treat rows on their own: norms, activations, the softmax of the loss.

template <class T>
void norm_forward_rows(const NormForwardJob& job, int64_t row, int64_t row_end) {
  const T* weight = static_cast<const T*>(job.weight);
  for (; row < row_end; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    Vec squares = zero();
    if (job.residual) {
      const T* residual = static_cast<const T*>(job.residual) + row * job.width;
      T* summed = static_cast<T*>(job.summed) + row * job.width;
      for_each_vec(job.width, [&](int64_t i, auto get, auto put) {
        const Vec v = round_to(x, get(x + i) + get(residual + i));
        put(summed + i, v);
        squares = fma(v, v, squares);
      });
      x = summed;
    } else {
      for_each_vec(job.width, [&](int64_t i, auto get, auto) {
        const Vec v = get(x + i);
        squares = fma(v, v, squares);
      });
    }
    const float scale = 1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(job.width) + job.eps);
    job.scales[row] = scale;
    normalize_row(x, weight, static_cast<T*>(job.y) + row * job.width, job.width, scale);
  }
}

// With n = summed * scale and g = y_grad * weight: scale * (g - n * mean(g * n)).
template <class T>
void norm_grad_rows(const NormGradJob& job, int64_t row, int64_t row_end) {
  const T* weight = static_cast<const T*>(job.weight);
  float* weight_grad = job.weight_grads + row / kGradRows * job.width;
  for_each_vec(job.width, [&](int64_t i, auto, auto put) { put(weight_grad + i, zero()); });
  for (; row < row_end; ++row) {
    const int64_t at = row * job.width;
    const T *x = static_cast<const T*>(job.summed) + at, *y_grad = static_cast<const T*>(job.y_grad) + at;
    T* x_grad = static_cast<T*>(job.x_grad) + at;
    const Vec scale = splat(job.scales[row]);
    Vec products = zero();
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) {
      const Vec slope = get(y_grad + i), normal = get(x + i) * scale;
      products = fma(slope * get(weight + i), normal, products);
      put(weight_grad + i, fma(slope, normal, get(weight_grad + i)));
    });
    const Vec mean = splat(sum(products) / static_cast<float>(job.width));
    const T* summed_grad = job.summed_grad ? static_cast<const T*>(job.summed_grad) + at : nullptr;
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) {
      const Vec inner = get(y_grad + i) * get(weight + i) - get(x + i) * scale * mean;
      put(x_grad + i, summed_grad ? fma(scale, inner, get(summed_grad + i)) : scale * inner);
    });
  }
}

template <class T>
void silu_mul_grad_rows(const ActivationGradJob& job, int64_t row, int64_t row_end) {
  for (; row < row_end; ++row) {
    const T* gate = static_cast<const T*>(job.x) + row * 2 * job.width;
    const T* y_grad = static_cast<const T*>(job.y_grad) + row * job.width;
    T* out = static_cast<T*>(job.out) + row * 2 * job.width;
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) {
      const Vec g = get(gate + i), slope = get(y_grad + i), s = sigmoid(g);
      const Vec silu = g * s;
      put(out + i, slope * get(gate + job.width + i) * fma(silu, splat(1.f) - s, s));
      put(out + job.width + i, slope * silu);
    });
  }
}

// The value and the slope of x * F(x): F is a sigmoid, or the normal distribution within 1e-7 (Abramowitz and
// Stegun, 7.1.26).
struct Curve {
  Vec value, slope;
};

inline Curve gelu_curve(Vec x, GeluGrad kind) {
  if (kind == GeluGrad::kExact) {
    const Vec size = max(x, zero() - x);
    const Vec bell = exp2(x * x * splat(-0.5f * kLog2e));
    const Vec t = splat(1.f) / fma(size, splat(0.3275911f * 0.70710678f), splat(1.f));
    Vec p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const Vec half = splat(0.5f) - splat(0.5f) * p * t * bell;
    const Vec sign = max(splat(-1.f), min(splat(1.f), x * splat(1e30f)));
    const Vec below = fma(sign, half, splat(0.5f));
    // Where the bell has run out x may be infinite.
    const Vec near = max(splat(-20.f), min(splat(20.f), x));
    return {x * below, fma(near, bell * splat(0.3989422804f), below)};
  }
  const bool quick = kind == GeluGrad::kQuick;
  const float first = quick ? 1.702f : 2.f * 0.7978845608f;
  const float third = quick ? 0.f : 2.f * 0.7978845608f * 0.044715f;
  const Vec square = min(splat(1e30f), x * x);  // an infinite one times a third of 0 would be no number
  const Vec s = sigmoid(x * fma(square, splat(third), splat(first)));
  const Vec near = max(splat(-20.f), min(splat(20.f), x));  // beyond it s is 0 or 1, and a cube may overflow
  const Vec rise = near * fma(near * near, splat(3.f * third), splat(first));
  return {x * s, fma(rise * s, splat(1.f) - s, s)};
}

template <class T>
void gelu_grad_rows(const ActivationGradJob& job, int64_t row, int64_t row_end) {
  const int64_t at = row * job.width;
  const T* x = static_cast<const T*>(job.x) + at;
  T* out = static_cast<T*>(job.out) + at;
  const T* y_grad = job.y_grad ? static_cast<const T*>(job.y_grad) + at : nullptr;
  for_each_vec((row_end - row) * job.width, [&](int64_t i, auto get, auto put) {
    const Curve curve = gelu_curve(get(x + i), job.kind);
    put(out + i, y_grad ? get(y_grad + i) * curve.slope : curve.value);
  });
}

void norm_forward(const NormForwardJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? norm_forward_rows<float> : norm_forward_rows<bf16>)(job, row, row_end);
}
void norm_grad(const NormGradJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? norm_grad_rows<float> : norm_grad_rows<bf16>)(job, row, row_end);
}
void silu_mul_grad(const ActivationGradJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? silu_mul_grad_rows<float> : silu_mul_grad_rows<bf16>)(job, row,
                                                                                            row_end);
}
void gelu_grad(const ActivationGradJob& job, int64_t row, int64_t row_end) {
  (job.storage == Storage::kFloat32 ? gelu_grad_rows<float> : gelu_grad_rows<bf16>)(job, row, row_end);
}

void softmax_error(const SoftmaxErrorJob& job, int64_t row, int64_t row_end) {
  for (; row < row_end; ++row) {
    float* logits = job.logits + row * job.width;
    const int64_t label = job.labels[row];
    if (label < 0) {
      job.losses[row] = 0.f;
      for_each_vec(job.width, [&](int64_t i, auto, auto put) { put(logits + i, zero()); });
      continue;
    }
    const float chosen = logits[label];
    const int64_t whole = job.width / kLanes * kLanes;
    Vec highest = splat(logits[0]);
    for (int64_t i = 0; i < whole; i += kLanes) highest = max(highest, load(logits + i));
    float maximum = largest(highest);
    for (int64_t i = whole; i < job.width; ++i) maximum = logits[i] > maximum ? logits[i] : maximum;
    const Vec log2e = splat(kLog2e), top = splat(maximum);
    Vec total = zero();
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec weight = exp2((load(logits + i) - top) * log2e);
      store(logits + i, weight);
      total = total + weight;
    }
    float weights = sum(total);
    if (whole < job.width) {
      float lanes[kLanes];
      store(lanes, exp2((load_part(logits + whole, job.width - whole) - top) * log2e));
      for (int64_t i = whole; i < job.width; ++i) weights += logits[i] = lanes[i - whole];
    }
    const Vec scale = splat(1.f / weights);
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) { put(logits + i, get(logits + i) * scale); });
    logits[label] -= 1.f;
    job.losses[row] = __builtin_logf(weights) + maximum - chosen;
  }
}
