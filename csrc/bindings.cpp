// vila2._C: Python enters here and in bindings_*. Tensors come in as they are; each call checks type, shape
// and layout, releases the GIL and runs.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <string>

#include "bindings_tensor.h"
#include "bindings_top.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using vila2::cpu::PackedWeights;
using vila2::cpu::Storage;
using vila2::python::Dtype;
using vila2::python::fail;
using vila2::python::Tensor;

namespace {

using NormOp = void (*)(const vila2::cpu::NormJob&, int64_t);

void run_norm(NormOp op, const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor* bias,
              double eps, const Tensor& y) {
  x.contiguous();
  y.like(x).contiguous();
  for (const Tensor* vector : {&weight, bias}) {
    if (!vector) continue;
    vector->require(vector->dtype == x.dtype, "the type of x");
    vector->sized({x.width()}).contiguous();
  }
  if (residual) residual->like(x).contiguous();
  const vila2::cpu::NormJob job{x.data,      residual ? residual->data : nullptr,
                                weight.data, bias ? bias->data : nullptr,
                                y.data,      x.storage(),
                                x.width(),   static_cast<float>(eps)};
  const int64_t rows = x.rows();
  const py::gil_scoped_release release;
  op(job, rows);
}

void rms_norm(py::handle x, py::handle weight, double eps, py::handle y) {
  run_norm(vila2::cpu::rms_norm, {x, "x"}, nullptr, {weight, "weight"}, nullptr, eps, {y, "y"});
}

void add_rms_norm(py::handle x, py::handle residual, py::handle weight, double eps, py::handle y) {
  const Tensor sum(residual, "residual");
  run_norm(vila2::cpu::add_rms_norm, {x, "x"}, &sum, {weight, "weight"}, nullptr, eps, {y, "y"});
}

void layer_norm(py::handle x, py::handle weight, py::handle bias, double eps, py::handle y) {
  const Tensor shift(bias, "bias");
  run_norm(vila2::cpu::layer_norm, {x, "x"}, nullptr, {weight, "weight"}, &shift, eps, {y, "y"});
}

void add_layer_norm(py::handle x, py::handle residual, py::handle weight, py::handle bias, double eps,
                    py::handle y) {
  const Tensor sum(residual, "residual"), shift(bias, "bias");
  run_norm(vila2::cpu::add_layer_norm, {x, "x"}, &sum, {weight, "weight"}, &shift, eps, {y, "y"});
}

void silu_mul(py::handle gate_up_object, py::handle y_object) {
  const Tensor gate_up(gate_up_object, "gate_up"), y(y_object, "y");
  gate_up.contiguous();
  y.contiguous().require(y.dtype == gate_up.dtype, "the type of gate_up");
  gate_up.require(gate_up.width() == 2 * y.width() && gate_up.rows() == y.rows() &&
                      gate_up.shape.size() == y.shape.size(),
                  "twice the width of y, and its rows");
  const vila2::cpu::ActivationJob job{gate_up.data, y.data, y.storage(), y.width(), {}};
  const int64_t rows = y.rows();
  const py::gil_scoped_release release;
  vila2::cpu::silu_mul(job, rows);
}

void gelu(py::handle x_object, const std::string& kind, py::handle y_object) {
  const Tensor x(x_object, "x"), y(y_object, "y");
  if (kind != "gelu_pytorch_tanh" && kind != "quick_gelu") fail("kind", "gelu_pytorch_tanh or quick_gelu");
  x.contiguous();
  y.like(x).contiguous();
  const auto choice = kind == "quick_gelu" ? vila2::cpu::Gelu::kQuick : vila2::cpu::Gelu::kTanh;
  const vila2::cpu::ActivationJob job{x.data, y.data, x.storage(), x.width(), choice};
  const int64_t elements = x.rows() * x.width();
  const py::gil_scoped_release release;
  vila2::cpu::gelu(job, elements);
}

// Both caches alike; returns (num_blocks, kv_heads, block_size, dim).
std::array<int64_t, 4> cache_shape(const Tensor& k_cache, const Tensor& v_cache) {
  k_cache.dims(4).contiguous();
  v_cache.like(k_cache).contiguous();
  k_cache.require(k_cache.shape[1] > 0 && k_cache.shape[2] > 0 && k_cache.shape[3] > 0,
                  "heads, slots and a width");
  return {k_cache.shape[0], k_cache.shape[1], k_cache.shape[2], k_cache.shape[3]};
}

void rope_store(py::handle q_object, py::handle k_object, py::handle v_object, py::handle positions_object,
                py::handle slots_object, py::handle cos_object, py::handle sin_object,
                py::handle k_cache_object, py::handle v_cache_object, py::handle q_out_object) {
  const Tensor q(q_object, "q"), k(k_object, "k"), v(v_object, "v"), positions(positions_object, "positions"),
      slots(slots_object, "slots"), cos(cos_object, "cos"), sin(sin_object, "sin"),
      k_cache(k_cache_object, "k_cache"), v_cache(v_cache_object, "v_cache"), q_out(q_out_object, "q_out");
  const auto [num_blocks, kv_heads, block_size, dim] = cache_shape(k_cache, v_cache);
  q.dims(3);
  const int64_t tokens = q.shape[0], heads = q.shape[1];
  q.sized({tokens, heads, dim});
  k.sized({tokens, kv_heads, dim}).require(k.dtype == q.dtype, "the type of q");
  v.sized({tokens, kv_heads, dim}).require(v.dtype == q.dtype, "the type of q");
  q.require(dim % 2 == 0, "an even head dimension");
  q_out.like(q).contiguous();
  positions.is(Dtype::kInt64, "int64").sized({tokens}).contiguous();
  slots.is(Dtype::kInt64, "int64").sized({tokens}).contiguous();
  cos.is(Dtype::kFloat32, "float32").dims(2).contiguous().sized({cos.shape[0], dim / 2});
  sin.like(cos).contiguous();
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t position = positions.as<int64_t>()[t], slot = slots.as<int64_t>()[t];
    if (position < 0 || position >= cos.shape[0])
      fail("positions", "rows of cos, got " + std::to_string(position));
    if (slot < -1 || slot >= num_blocks * block_size)
      fail("slots", "slots of the cache, or -1 for none, got " + std::to_string(slot));
  }
  const vila2::cpu::RopeJob job{q.data,
                                k.data,
                                v.data,
                                q.row_stride(),
                                k.row_stride(),
                                v.row_stride(),
                                q.storage(),
                                positions.as<int64_t>(),
                                slots.as<int64_t>(),
                                cos.as<float>(),
                                sin.as<float>(),
                                k_cache.data,
                                v_cache.data,
                                k_cache.storage(),
                                q_out.data,
                                heads,
                                kv_heads,
                                dim,
                                block_size};
  const py::gil_scoped_release release;
  vila2::cpu::rope_store(job, tokens);
}

// Every block that the kernel will read exists, and every sequence's queries lie within its context.
void check_batch(const vila2::cpu::AttentionBatch& batch, int64_t tokens, int64_t num_blocks,
                 int64_t block_size) {
  if (batch.query_starts[0] != 0 || batch.query_starts[batch.sequences] != tokens) {
    fail("query_starts", "0 first and the number of rows of q last");
  }
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t queries = batch.query_starts[s + 1] - batch.query_starts[s], length = batch.context_lens[s];
    if (queries < 0) fail("query_starts", "rising numbers");
    if (queries == 0) continue;
    const int64_t blocks = (length + block_size - 1) / block_size;
    if (length < queries || blocks > batch.max_blocks) {
      fail("context_lens",
           "at least the sequence's queries and at most its table's blocks, got " + std::to_string(length));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t block = batch.block_tables[s * batch.max_blocks + b];
      if (block < 0 || block >= num_blocks)
        fail("block_tables", "blocks of the cache, got " + std::to_string(block));
    }
  }
}

void paged_attention(py::handle q_object, py::handle k_cache_object, py::handle v_cache_object,
                     py::handle tables_object, py::handle starts_object, py::handle lens_object, double scale,
                     py::handle out_object) {
  const Tensor q(q_object, "q"), k_cache(k_cache_object, "k_cache"), v_cache(v_cache_object, "v_cache"),
      tables(tables_object, "block_tables"), starts(starts_object, "query_starts"),
      lens(lens_object, "context_lens"), out(out_object, "out");
  const auto [num_blocks, kv_heads, block_size, dim] = cache_shape(k_cache, v_cache);
  q.dims(3);
  const int64_t tokens = q.shape[0], heads = q.shape[1];
  q.sized({tokens, heads, dim}).require(heads % kv_heads == 0, "a multiple of the cache's heads");
  q.require(dim <= vila2::cpu::kMaxHeadDim, "a head dimension of at most 256");
  out.sized({tokens, heads * dim}).contiguous().require(out.dtype == q.dtype, "the type of q");
  tables.is(Dtype::kInt32, "int32").dims(2).contiguous();
  lens.is(Dtype::kInt32, "int32").sized({tables.shape[0]}).contiguous();
  starts.is(Dtype::kInt32, "int32").sized({tables.shape[0] + 1}).contiguous();
  const vila2::cpu::AttentionBatch batch{tables.as<int32_t>(), starts.as<int32_t>(), lens.as<int32_t>(),
                                         tables.shape[0], tables.shape[1]};
  check_batch(batch, tokens, num_blocks, block_size);
  const vila2::cpu::AttentionJob job{
      q.data,   q.row_stride(), q.storage(), k_cache.data, v_cache.data, k_cache.storage(),
      out.data, heads,          kv_heads,    dim,          block_size,   static_cast<float>(scale)};
  const py::gil_scoped_release release;
  vila2::cpu::attention(job, batch);
}

void image_patches(py::handle images_object, int64_t patch, py::handle tables_object, py::handle out_object) {
  const Tensor images(images_object, "images"), tables(tables_object, "tables"), out(out_object, "out");
  images.is(Dtype::kUint8, "uint8").dims(4).contiguous().require(images.shape[3] == 3, "3 channels last");
  if (patch < 1) fail("patch", "a positive size");
  tables.sized({3, 256}).contiguous().require(tables.dtype == out.dtype, "the type of out");
  const int64_t count = images.shape[0], height = images.shape[1], width = images.shape[2];
  out.sized({count, (height / patch) * (width / patch), 3 * patch * patch}).contiguous();
  const vila2::cpu::PatchJob job{images.as<uint8_t>(), count,    height,       width, patch,
                                 tables.data,          out.data, out.storage()};
  const py::gil_scoped_release release;
  vila2::cpu::image_patches(job);
}

Storage storage_of(const std::string& name) {
  if (name != "float32" && name != "bfloat16") fail("storage", "float32 or bfloat16, got " + name);
  return name == "float32" ? Storage::kFloat32 : Storage::kBfloat16;
}

PackedWeights pack(py::handle weight_object, py::object bias_object, const std::string& storage) {
  const Tensor weight(weight_object, "weight");
  weight.is(Dtype::kFloat32, "float32").dims(2).contiguous();
  weight.require(weight.shape[0] > 0 && weight.shape[1] > 0, "rows and columns");
  const float* bias = nullptr;
  if (!bias_object.is_none()) {
    bias = Tensor(bias_object, "bias")
               .is(Dtype::kFloat32, "float32")
               .sized({weight.shape[0]})
               .contiguous()
               .as<float>();
  }
  const Storage kind = storage_of(storage);
  const py::gil_scoped_release release;
  return {weight.as<float>(), bias, weight.shape[0], weight.shape[1], kind};
}

PackedWeights packed_over(py::handle panels_object, py::handle bias_object, int64_t columns, int64_t depth,
                          const std::string& storage) {
  const Tensor panels(panels_object, "panels");
  if (columns < 1 || depth < 1) fail("columns, depth", "positive numbers");
  const Storage kind = storage_of(storage);
  const PackedWeights sizes = PackedWeights::over(nullptr, nullptr, columns, depth, kind);
  panels.is(Dtype::kUint8, "uint8").sized({sizes.bytes()}).contiguous();
  const float* bias = nullptr;
  if (!bias_object.is_none()) {
    bias = Tensor(bias_object, "bias")
               .is(Dtype::kFloat32, "float32")
               .sized({sizes.padded_columns()})
               .contiguous()
               .as<float>();
  }
  return PackedWeights::over(panels.data, bias, columns, depth, kind);
}

void copy_packed(const PackedWeights& weights, py::handle panels_object, py::handle bias_object) {
  const Tensor panels(panels_object, "panels");
  panels.is(Dtype::kUint8, "uint8").sized({weights.bytes()}).contiguous();
  std::memcpy(panels.data, weights.panels(), static_cast<size_t>(weights.bytes()));
  if (bias_object.is_none() != !weights.bias()) fail("bias", "None exactly where the weights have none");
  if (!weights.bias()) return;
  const Tensor bias(bias_object, "bias");
  bias.is(Dtype::kFloat32, "float32").sized({weights.padded_columns()}).contiguous();
  std::memcpy(bias.data, weights.bias(), static_cast<size_t>(weights.padded_columns()) * sizeof(float));
}

void linear(const PackedWeights& weights, py::handle x_object, py::handle y_object) {
  const Tensor x(x_object, "x"), y(y_object, "y");
  x.is(Dtype::kFloat32, "float32")
      .contiguous()
      .require(x.width() == weights.depth(), "the depth of the weights");
  y.is(Dtype::kFloat32, "float32").contiguous();
  y.require(y.width() == weights.columns() && y.rows() == x.rows(),
            "the rows of x and the columns of the weights");
  const int64_t rows = x.rows();
  const py::gil_scoped_release release;
  weights.multiply(x.as<float>(), y.as<float>(), rows);
}

void top(const PackedWeights& weights, py::handle x_object, py::handle banned, py::handle is_banned,
         py::handle values, py::handle columns) {
  const Tensor x(x_object, "x");
  x.is(Dtype::kFloat32, "float32").dims(2).contiguous();
  x.require(x.width() == weights.depth(), "the depth of the weights");
  const int64_t rows = x.rows();
  const auto job = vila2::python::top_job(rows, weights.columns(), banned, is_banned, values, columns);
  const py::gil_scoped_release release;
  vila2::cpu::top(weights, x.as<float>(), rows, job);
}

py::dict cpu_features() {
  const vila2::cpu::Features features = vila2::cpu::features();
  py::dict flags;
  flags["avx2"] = features.avx2;
  flags["avx2_vnni"] = features.avx2_vnni;
  flags["avx512"] = features.avx512;
  flags["avx512_vnni"] = features.avx512_vnni;
  flags["avx512_bf16"] = features.avx512_bf16;
  flags["amx_bf16"] = features.amx_bf16;
  return flags;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of vila2. Call them through vila2.ops, which chooses between them and torch.";
  m.def("isa", [] { return vila2::cpu::kernels().isa; });
  m.def("cpu_features", cpu_features);
  m.def("set_num_threads", vila2::cpu::set_num_threads, py::arg("count"));
  m.def("num_threads", vila2::cpu::num_threads);
  m.def("rms_norm", rms_norm);
  m.def("add_rms_norm", add_rms_norm);
  m.def("layer_norm", layer_norm);
  m.def("add_layer_norm", add_layer_norm);
  m.def("silu_mul", silu_mul);
  m.def("gelu", gelu);
  m.def("rope_store", rope_store);
  m.def("paged_attention", paged_attention);
  m.def("image_patches", image_patches);
  m.def("panel_width", [] { return vila2::cpu::kernels().panel_width; });
  m.def("bf16_group", [] { return vila2::cpu::kernels().bf16_group; });
  py::class_<PackedWeights>(m, "PackedWeights")
      .def(py::init(&pack), py::arg("weight"), py::arg("bias"), py::arg("storage"))
      .def_static("over", packed_over, py::keep_alive<0, 1>(), py::keep_alive<0, 2>(), py::arg("panels"),
                  py::arg("bias"), py::arg("columns"), py::arg("depth"), py::arg("storage"))
      .def("copy_to", copy_packed, py::arg("panels"), py::arg("bias"))
      .def("multiply", linear)
      .def("top", top)
      .def_property_readonly("columns", &PackedWeights::columns)
      .def_property_readonly("padded_columns", &PackedWeights::padded_columns)
      .def_property_readonly("depth", &PackedWeights::depth)
      .def_property_readonly("bytes", &PackedWeights::bytes)
      .def_property_readonly("has_bias", [](const PackedWeights& w) { return w.bias() != nullptr; })
      .def_property_readonly("storage", [](const PackedWeights& w) {
        return w.storage() == Storage::kFloat32 ? "float32" : "bfloat16";
      });
  vila2::python::bind_bytes(m);
  vila2::python::bind_tokens(m);
  vila2::python::bind_images(m);
  vila2::python::bind_training(m);
}
