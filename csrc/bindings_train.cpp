// Kernels of training: forward passes that keep what their gradients need, and the gradients.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_tensor.h"
#include "cpu/train.h"

namespace vila2::python {
namespace {

void norm_forward(py::handle x_object, py::object residual_object, py::handle weight_object, double eps,
                  py::object summed_object, py::handle y_object, py::handle scales_object) {
  const Tensor x(x_object, "x"), weight(weight_object, "weight"), y(y_object, "y"),
      scales(scales_object, "scales");
  x.contiguous();
  y.like(x).contiguous();
  weight.sized({x.width()}).contiguous().require(weight.dtype == x.dtype, "the type of x");
  scales.is(Dtype::kFloat32, "float32").sized({x.rows()}).contiguous();
  const void* residual = nullptr;
  void* summed = nullptr;
  if (!residual_object.is_none()) {
    residual = Tensor(residual_object, "residual").like(x).contiguous().data;
    summed = Tensor(summed_object, "summed").like(x).contiguous().data;
  }
  const cpu::NormForwardJob job{x.data,      residual,  weight.data,
                                summed,      y.data,    scales.as<float>(),
                                x.storage(), x.width(), static_cast<float>(eps)};
  const int64_t rows = x.rows();
  const py::gil_scoped_release release;
  cpu::norm_forward(job, rows);
}

void norm_grad(py::handle y_grad_object, py::object summed_grad_object, py::handle summed_object,
               py::handle weight_object, py::handle scales_object, py::handle x_grad_object,
               py::handle weight_grad_object) {
  const Tensor y_grad(y_grad_object, "y_grad"), summed(summed_object, "summed"),
      weight(weight_object, "weight"), scales(scales_object, "scales"), x_grad(x_grad_object, "x_grad"),
      weight_grad(weight_grad_object, "weight_grad");
  y_grad.contiguous();
  for (const Tensor* tensor : {&summed, &x_grad}) tensor->like(y_grad).contiguous();
  weight.sized({y_grad.width()}).contiguous().require(weight.dtype == y_grad.dtype, "the type of y_grad");
  weight_grad.like(weight).contiguous();
  scales.is(Dtype::kFloat32, "float32").sized({y_grad.rows()}).contiguous();
  const void* summed_grad = nullptr;
  if (!summed_grad_object.is_none()) {
    summed_grad = Tensor(summed_grad_object, "summed_grad").like(y_grad).contiguous().data;
  }
  const cpu::NormGradJob job{y_grad.data, summed_grad, summed.data,      weight.data,   scales.as<float>(),
                             x_grad.data, nullptr,     y_grad.storage(), y_grad.width()};
  const int64_t rows = y_grad.rows();
  const py::gil_scoped_release release;
  cpu::norm_grad(job, rows, weight_grad.data);
}

void silu_mul_grad(py::handle gate_up_object, py::handle y_grad_object, py::handle out_object) {
  const Tensor gate_up(gate_up_object, "gate_up"), y_grad(y_grad_object, "y_grad"), out(out_object, "out");
  gate_up.contiguous();
  out.like(gate_up).contiguous();
  y_grad.contiguous().require(y_grad.dtype == gate_up.dtype, "the type of gate_up");
  gate_up.require(gate_up.width() == 2 * y_grad.width() && gate_up.rows() == y_grad.rows(),
                  "twice the width of y_grad, and its rows");
  const cpu::ActivationGradJob job{gate_up.data, y_grad.data, out.data, y_grad.storage(), y_grad.width(), {}};
  const int64_t rows = y_grad.rows();
  const py::gil_scoped_release release;
  cpu::silu_mul_grad(job, rows);
}

// GELU of any kind (y_grad is None), or its gradient.
void gelu_grad(py::handle x_object, py::object y_grad_object, const std::string& kind,
               py::handle out_object) {
  const Tensor x(x_object, "x"), out(out_object, "out");
  using cpu::GeluGrad;
  if (kind != "gelu" && kind != "gelu_pytorch_tanh" && kind != "quick_gelu") {
    fail("kind", "gelu, gelu_pytorch_tanh or quick_gelu");
  }
  const GeluGrad choice = kind == "gelu"         ? GeluGrad::kExact
                          : kind == "quick_gelu" ? GeluGrad::kQuick
                                                 : GeluGrad::kTanh;
  x.contiguous();
  out.like(x).contiguous();
  const void* y_grad =
      y_grad_object.is_none() ? nullptr : Tensor(y_grad_object, "y_grad").like(x).contiguous().data;
  const cpu::ActivationGradJob job{x.data, y_grad, out.data, x.storage(), x.width(), choice};
  const int64_t elements = x.rows() * x.width();
  const py::gil_scoped_release release;
  cpu::gelu_grad(job, elements);
}

void softmax_error(py::handle logits_object, py::handle labels_object, py::handle losses_object) {
  const Tensor logits(logits_object, "logits"), labels(labels_object, "labels"),
      losses(losses_object, "losses");
  logits.is(Dtype::kFloat32, "float32").dims(2).contiguous();
  const int64_t rows = logits.shape[0], width = logits.width();
  labels.is(Dtype::kInt64, "int64").sized({rows}).contiguous();
  losses.is(Dtype::kFloat32, "float32").sized({rows}).contiguous();
  for (int64_t i = 0; i < rows; ++i) {
    if (labels.as<int64_t>()[i] >= width) {
      fail("labels", "columns of logits, got " + std::to_string(labels.as<int64_t>()[i]));
    }
  }
  const cpu::SoftmaxErrorJob job{logits.as<float>(), labels.as<int64_t>(), losses.as<float>(), width};
  const py::gil_scoped_release release;
  cpu::softmax_error(job, rows);
}

// Each segment within the tokens, own rows disjoint.
void check_segments(const cpu::Segment* segments, int64_t count, int64_t tokens) {
  std::vector<std::pair<int64_t, int64_t>> own;
  for (int64_t s = 0; s < count; ++s) {
    const auto& [start, end, prefix_start, prefix_end] = segments[s];
    if (start < 0 || start > end || end > tokens || prefix_start < 0 || prefix_start > prefix_end ||
        prefix_end > tokens) {
      fail("segments", "rows of q");
    }
    if (start < end) own.emplace_back(start, end);
  }
  std::sort(own.begin(), own.end());
  for (size_t i = 1; i < own.size(); ++i) {
    if (own[i].first < own[i - 1].second) fail("segments", "own rows that do not overlap");
  }
}

// What both directions share. q, k and v are the tensors of that direction: inputs, or their gradients.
struct SegmentArguments {
  Tensor q, k, v, segments, packed, log_sums, out;
  const int64_t* positions = nullptr;
  const float *cos = nullptr, *sin = nullptr;
  int64_t tokens, heads, kv_heads, dim;

  SegmentArguments(py::handle q_object, py::handle k_object, py::handle v_object, py::object positions_object,
                   py::object cos_object, py::object sin_object, py::handle segments_object,
                   py::handle packed_object, py::handle log_sums_object, py::handle out_object)
      : q(q_object, "q"),
        k(k_object, "k"),
        v(v_object, "v"),
        segments(segments_object, "segments"),
        packed(packed_object, "packed"),
        log_sums(log_sums_object, "log_sums"),
        out(out_object, "out") {
    q.dims(3);
    k.dims(3);
    tokens = q.shape[0], heads = q.shape[1], kv_heads = k.shape[1], dim = q.shape[2];
    k.sized({tokens, kv_heads, dim}).require(k.dtype == q.dtype, "the type of q");
    v.like(k);
    q.require(dim > 0 && dim <= cpu::kMaxHeadDim, "a head dimension of at most 256");
    k.require(kv_heads > 0 && heads % kv_heads == 0, "a number of heads that divides those of q");
    segments.is(Dtype::kInt64, "int64").contiguous().sized({segments.shape[0], 4});
    check_segments(segments.as<cpu::Segment>(), segments.shape[0], tokens);
    packed.is(Dtype::kFloat32, "float32").contiguous().sized({heads + 2 * kv_heads, tokens, dim});
    log_sums.is(Dtype::kFloat32, "float32").contiguous().sized({heads, tokens});
    out.sized({tokens, heads * dim}).contiguous().require(out.dtype == q.dtype, "the type of q");
    if (!positions_object.is_none())
      rotate_by({positions_object, "positions"}, {cos_object, "cos"}, {sin_object, "sin"});
  }

  void rotate_by(const Tensor& at, const Tensor& cosines, const Tensor& sines) {
    q.require(dim % 2 == 0, "an even head dimension");
    at.is(Dtype::kInt64, "int64").sized({tokens}).contiguous();
    cosines.is(Dtype::kFloat32, "float32").dims(2).contiguous().sized({cosines.shape[0], dim / 2});
    sines.like(cosines).contiguous();
    positions = at.as<int64_t>(), cos = cosines.as<float>(), sin = sines.as<float>();
    for (int64_t t = 0; t < tokens; ++t) {
      if (positions[t] < 0 || positions[t] >= cosines.shape[0]) {
        fail("positions", "rows of cos, got " + std::to_string(positions[t]));
      }
    }
  }

  cpu::SegmentJob job(double scale) const {
    cpu::SegmentJob job{};
    job.positions = positions, job.cos = cos, job.sin = sin;
    job.q = packed.as<float>();
    job.k = job.q + heads * tokens * dim;
    job.v = job.k + kv_heads * tokens * dim;
    job.log_sums = log_sums.as<float>();
    job.out = out.data;
    job.storage = q.storage();
    job.tokens = tokens, job.heads = heads, job.kv_heads = kv_heads, job.dim = dim;
    job.scale = static_cast<float>(scale);
    return job;
  }
};

void segment_attention(py::handle q, py::handle k, py::handle v, py::object positions, py::object cos,
                       py::object sin, py::handle segments, double scale, py::handle packed,
                       py::handle log_sums, py::handle out) {
  const SegmentArguments given(q, k, v, positions, cos, sin, segments, packed, log_sums, out);
  cpu::SegmentJob job = given.job(scale);
  job.q_in = given.q.data, job.k_in = given.k.data, job.v_in = given.v.data;
  job.q_stride = given.q.row_stride(), job.k_stride = given.k.row_stride(),
  job.v_stride = given.v.row_stride();
  const int64_t count = given.segments.shape[0];
  const auto* rows = given.segments.as<cpu::Segment>();
  const py::gil_scoped_release release;
  cpu::segment_forward(job, rows, count);
}

void segment_attention_grad(py::handle out_grad_object, py::object positions, py::object cos, py::object sin,
                            py::handle segments, double scale, py::handle packed, py::handle log_sums,
                            py::handle out, py::handle sums_object, py::handle q_grad, py::handle k_grad,
                            py::handle v_grad) {
  const SegmentArguments given(q_grad, k_grad, v_grad, positions, cos, sin, segments, packed, log_sums, out);
  const Tensor out_grad(out_grad_object, "out_grad"), sums(sums_object, "sums");
  out_grad.like(given.out).contiguous();
  sums.is(Dtype::kFloat32, "float32").contiguous().sized({2 * given.kv_heads, given.tokens, given.dim});
  cpu::SegmentJob job = given.job(scale);
  job.out_grad = out_grad.data;
  job.k_sums = sums.as<float>();
  job.v_sums = job.k_sums + given.kv_heads * given.tokens * given.dim;
  job.q_grad = given.q.data, job.k_grad = given.k.data, job.v_grad = given.v.data;
  job.q_grad_stride = given.q.row_stride();
  job.k_grad_stride = given.k.row_stride();
  job.v_grad_stride = given.v.row_stride();
  const int64_t count = given.segments.shape[0];
  const auto* rows = given.segments.as<cpu::Segment>();
  const py::gil_scoped_release release;
  cpu::segment_backward(job, rows, count);
}

}  // namespace

void bind_training(py::module_& m) {
  m.def("norm_forward", norm_forward);
  m.def("norm_grad", norm_grad);
  m.def("silu_mul_grad", silu_mul_grad);
  m.def("gelu_grad", gelu_grad);
  m.def("softmax_error", softmax_error);
  m.def("segment_attention", segment_attention);
  m.def("segment_attention_grad", segment_attention_grad);
}

}  // namespace vila2::python
