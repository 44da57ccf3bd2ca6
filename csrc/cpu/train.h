// What training needs beyond inference: forward passes that keep what their gradients read, and the
// gradients.
//
// Sums over rows (of a norm's weight) are made per kGradRows rows and then added in order, and a segment's
// gradients are made by one thread: the same inputs give the same bits on any number of threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace vila2::cpu {

inline constexpr int64_t kGradRows = 256;
inline constexpr int64_t kSegmentKeys = 128;  // keys per step of a segment's softmax

// y = rms_norm(summed) with summed = x + residual. Without a residual, `summed` is not written: it is x.
struct NormForwardJob {
  const void *x, *residual, *weight;
  void *summed, *y;
  float* scales;  // (rows): 1 / root mean square
  Storage storage;
  int64_t width;
  float eps;
};

// x_grad = summed_grad + the norm's; weight_grads (parts, width) float32, part p of rows p * kGradRows on.
struct NormGradJob {
  const void *y_grad, *summed_grad, *summed, *weight;  // summed_grad may be null
  const float* scales;
  void* x_grad;
  float* weight_grads;
  Storage storage;
  int64_t width;
};

enum class GeluGrad { kTanh, kQuick, kExact };

struct ActivationGradJob {
  const void* x;       // silu_mul: (rows, 2 * width), gelu: (rows, width)
  const void* y_grad;  // (rows, width); null to write gelu itself
  void* out;           // as x
  Storage storage;
  int64_t width;
  GeluGrad kind;
};

// Logits (rows, width) become softmax minus one at the label; a negative label makes its row and loss zero.
struct SoftmaxErrorJob {
  float* logits;
  const int64_t* labels;
  float* losses;
  int64_t width;
};

struct Segment {
  int64_t start, end, prefix_start, prefix_end;
};

// Rotary attention over packed segments. `q`, `k`, `v` (heads | kv_heads, tokens, dim) are rotated float32
// copies.
struct SegmentJob {
  const void *q_in, *k_in, *v_in;  // (tokens, heads | kv_heads, dim), rows `*_stride` elements apart
  int64_t q_stride, k_stride, v_stride;
  const int64_t* positions;  // (tokens), null for no rotation
  const float *cos, *sin;    // (positions, dim / 2)
  float *q, *k, *v;
  float* log_sums;         // (heads, tokens): base 2, of the scaled scores
  void* out;               // (tokens, heads * dim)
  Storage storage;         // of q_in, k_in, v_in, out and all gradients but the next two
  float *k_sums, *v_sums;  // (kv_heads, tokens, dim)
  const void* out_grad;    // (tokens, heads * dim)
  void *q_grad, *k_grad, *v_grad;
  int64_t q_grad_stride, k_grad_stride, v_grad_stride;
  int64_t tokens, heads, kv_heads, dim;
  float scale;
};

// Rows of one segment times the query heads of one KV head.
struct SegmentTile {
  Segment segment;
  int64_t row, rows, kv_head;
};

struct TrainKernels {
  void (*norm_forward)(const NormForwardJob& job, int64_t row, int64_t row_end);
  void (*norm_grad)(const NormGradJob& job, int64_t row, int64_t row_end);  // of one part
  void (*silu_mul_grad)(const ActivationGradJob& job, int64_t row, int64_t row_end);
  void (*gelu_grad)(const ActivationGradJob& job, int64_t row, int64_t row_end);
  void (*softmax_error)(const SoftmaxErrorJob& job, int64_t row, int64_t row_end);
  void (*segment_load)(const SegmentJob& job, int64_t token, int64_t token_end);
  int64_t (*segment_scratch)(const SegmentJob& job);  // floats
  void (*segment_forward)(const SegmentJob& job, const SegmentTile& tile, float* scratch);
  void (*segment_backward)(const SegmentJob& job, const SegmentTile& tile, float* scratch);
  void (*segment_store)(const SegmentJob& job, int64_t token, int64_t token_end);
};

// Rows of a tile: enough that packing its keys is little beside the products, few enough for the L2 cache.
// Static: an inline function could be shared between the files of two instruction sets.
static inline int64_t segment_tile_rows(int64_t heads_per_kv_head) {
  const int64_t rows = 128 / heads_per_kv_head;
  return rows < 16 ? 16 : rows > 64 ? 64 : rows;
}

void norm_forward(const NormForwardJob& job, int64_t rows);
// `weight_grad` (width) in the type of the job.
void norm_grad(const NormGradJob& job, int64_t rows, void* weight_grad);
void silu_mul_grad(const ActivationGradJob& job, int64_t rows);
void gelu_grad(const ActivationGradJob& job, int64_t elements);
void softmax_error(const SoftmaxErrorJob& job, int64_t rows);
// The own rows of the segments are disjoint and lie in the tokens.
void segment_forward(const SegmentJob& job, const Segment* segments, int64_t count);
void segment_backward(const SegmentJob& job, const Segment* segments, int64_t count);

}  // namespace vila2::cpu
