// Weights in bytes, and what is multiplied with them.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "bindings_tensor.h"
#include "bindings_top.h"
#include "cpu/quantized.h"

namespace vila2::python {
namespace {

using cpu::ByteLinearJob;
using cpu::Finish;
using cpu::NormJob;
using cpu::Source;

Finish finish_of(const std::string& name) {
  if (name == "none") return Finish::kNone;
  if (name == "add") return Finish::kAdd;
  if (name == "gelu_pytorch_tanh") return Finish::kGeluTanh;
  if (name == "quick_gelu") return Finish::kGeluQuick;
  if (name == "silu_mul") return Finish::kSiluMul;
  fail("finish", "none, add, gelu_pytorch_tanh, quick_gelu or silu_mul, got " + name);
}

int64_t checked_turn(int64_t turn, int64_t width) {
  const bool is_power = turn >= 1 && turn <= cpu::kMostTurn && (turn & (turn - 1)) == 0;
  if (!is_power || (turn > 1 && width % (turn * cpu::kTurnStride)))
    fail("turn", "a power of two up to 64 that, times 16, divides the width, got " + std::to_string(turn));
  return turn;
}

// Tensors of packed weights, which it keeps alive: they may lie in a mapped file.
class ByteWeights {
 public:
  ByteWeights(py::object panels, py::object scales, py::object sums, py::object bias, int64_t columns,
              int64_t depth, bool is_narrow, int64_t turn)
      : panels_(std::move(panels)),
        scales_(std::move(scales)),
        sums_(std::move(sums)),
        bias_(std::move(bias)),
        columns_(columns),
        depth_(depth),
        is_narrow_(is_narrow),
        turn_(checked_turn(turn, depth)) {
    if (columns < 1 || depth < 1) fail("columns, depth", "positive numbers");
    if (depth > kMostDepth) fail("depth", "at most 65536: a sum of more could pass 2^31");
    const int64_t count = (columns + cpu::kBytePanel - 1) / cpu::kBytePanel, width = count * cpu::kBytePanel;
    const int64_t groups = cpu::byte_stride(depth) / cpu::kByteGroup;
    job_.panels = Tensor(panels_, "panels")
                      .is(Dtype::kInt8, "int8")
                      .sized({count, groups, cpu::kBytePanel, cpu::kByteGroup})
                      .contiguous()
                      .as<int8_t>();
    job_.scales = vector(scales_, "scales", Dtype::kFloat32, "float32", width).as<float>();
    job_.sums = vector(sums_, "sums", Dtype::kInt32, "int32", width).as<int32_t>();
    job_.bias =
        bias_.is_none() ? nullptr : vector(bias_, "bias", Dtype::kFloat32, "float32", width).as<float>();
    job_.columns = columns;
    job_.is_narrow = is_narrow;
    if (is_narrow) check_narrow(count * cpu::byte_stride(depth) * cpu::kBytePanel);
  }

  void multiply(py::handle x_object, py::handle y_object, const std::string& finish,
                py::handle residual) const {
    const Tensor x(x_object, "x");
    NormJob norm{};
    run(x, Source::kRows, norm, y_object, finish, residual);
  }

  void multiply_rms_norm(py::handle x_object, py::handle sum_object, py::handle weight_object, double eps,
                         py::handle y_object, const std::string& finish) const {
    const Tensor x(x_object, "x"), sum(sum_object, "residual"), weight(weight_object, "weight");
    sum.like(x).contiguous();
    weight.is(Dtype::kFloat32, "float32").sized({depth_}).contiguous();
    NormJob norm{};
    norm.residual = sum.data, norm.weight = weight.data, norm.eps = static_cast<float>(eps);
    run(x, Source::kAddRmsNorm, norm, y_object, finish, py::none());
  }

  void multiply_layer_norm(py::handle x_object, py::handle weight_object, py::handle bias_object, double eps,
                           py::handle y_object, const std::string& finish) const {
    const Tensor x(x_object, "x"), weight(weight_object, "weight"), bias(bias_object, "bias");
    weight.is(Dtype::kFloat32, "float32").sized({depth_}).contiguous();
    bias.is(Dtype::kFloat32, "float32").sized({depth_}).contiguous();
    NormJob norm{};
    norm.weight = weight.data, norm.bias = bias.data, norm.eps = static_cast<float>(eps);
    run(x, Source::kLayerNorm, norm, y_object, finish, py::none());
  }

  void top(py::handle x_object, py::handle banned, py::handle is_banned, py::handle values,
           py::handle columns) const {
    const Tensor x(x_object, "x");
    x.is(Dtype::kFloat32, "float32")
        .dims(2)
        .contiguous()
        .require(x.width() == depth_, "the depth of the weights");
    const int64_t rows = x.rows();
    const cpu::TopJob out = top_job(rows, columns_, banned, is_banned, values, columns);
    NormJob norm{};
    norm.x = x.data, norm.width = depth_, norm.storage = Storage::kFloat32;
    ByteLinearJob job = job_;
    const py::gil_scoped_release release;
    job.x = cpu::byte_scratch(rows, depth_);
    cpu::quantize({Source::kRows, norm, job.x, turn_}, rows);
    cpu::byte_top(job, rows, out);
  }

  int64_t columns() const { return columns_; }
  int64_t depth() const { return depth_; }
  bool is_narrow() const { return is_narrow_; }

 private:
  static constexpr int64_t kMostDepth = 65536;  // 255 * 128 * 65536 < 2^31

  // Weights that are called narrow and are not would give wrong sums without a word (see kNarrowPair). Reads
  // all of them once; from a mapped file that is what the first step would read anyway.
  void check_narrow(int64_t count) const {
    bool are_narrow;
    {
      const py::gil_scoped_release release;
      are_narrow = cpu::are_narrow(job_.panels, count);
    }
    if (!are_narrow) fail("is_narrow", "weights whose pairs keep 128, got panels with others");
  }

  static Tensor vector(py::handle object, const char* name, Dtype dtype, const char* expected, int64_t size) {
    Tensor tensor(object, name);
    tensor.is(dtype, expected).sized({size}).contiguous();
    return tensor;
  }

  void run(const Tensor& x, Source source, NormJob norm, py::handle y_object, const std::string& finish,
           py::handle residual_object) const {
    const Tensor y(y_object, "y");
    ByteLinearJob job = job_;
    job.finish = finish_of(finish);
    x.is(Dtype::kFloat32, "float32").contiguous().require(x.width() == depth_, "the depth of the weights");
    y.is(Dtype::kFloat32, "float32").contiguous();
    if (job.finish == Finish::kSiluMul && columns_ % cpu::kBytePanel)
      fail("finish", "whole panels for silu_mul");
    const int64_t width = job.finish == Finish::kSiluMul ? columns_ / 2 : columns_;
    y.require(y.width() == width && y.rows() == x.rows(), "the rows of x and the columns of the product");
    if (job.finish == Finish::kAdd) {
      const Tensor residual(residual_object, "residual");
      residual.is(Dtype::kFloat32, "float32").contiguous();
      residual.require(residual.width() == width && residual.rows() == y.rows(), "the shape of y");
      job.residual = residual.as<float>();
    } else if (!residual_object.is_none()) {
      fail("residual", "None unless the finish is add");
    }
    job.y = y.as<float>();
    norm.x = x.data;
    norm.width = depth_;
    norm.storage = Storage::kFloat32;
    const int64_t rows = x.rows();
    const py::gil_scoped_release release;
    job.x = cpu::byte_scratch(rows, depth_);
    cpu::quantize({source, norm, job.x, turn_}, rows);
    cpu::byte_linear(job, rows);
  }

  py::object panels_, scales_, sums_, bias_;
  int64_t columns_, depth_;
  bool is_narrow_;
  int64_t turn_;
  ByteLinearJob job_{};
};

void quantize(py::handle x_object, py::handle bytes_object, py::handle scales_object, py::handle zeros_object,
              int64_t turn) {
  const Tensor x(x_object, "x"), bytes(bytes_object, "bytes"), scales(scales_object, "scales"),
      zeros(zeros_object, "zeros");
  x.is(Dtype::kFloat32, "float32").dims(2).contiguous();
  const int64_t rows = x.rows(), width = x.width(), stride = cpu::byte_stride(width);
  bytes.is(Dtype::kUint8, "uint8").sized({rows, stride}).contiguous();
  scales.is(Dtype::kFloat32, "float32").sized({rows}).contiguous();
  zeros.is(Dtype::kInt32, "int32").sized({rows}).contiguous();
  checked_turn(turn, width);
  NormJob norm{};
  norm.x = x.data;
  norm.width = width;
  const cpu::ByteRows out{bytes.as<uint8_t>(), scales.as<float>(), zeros.as<int32_t>(), stride};
  const py::gil_scoped_release release;
  cpu::quantize({Source::kRows, norm, out, turn}, rows);
}

}  // namespace

void bind_bytes(py::module_& m) {
  m.def("quantize", quantize, py::arg("x"), py::arg("bytes"), py::arg("scales"), py::arg("zeros"),
        py::arg("turn") = 1);
  py::class_<ByteWeights>(m, "ByteWeights")
      .def(py::init<py::object, py::object, py::object, py::object, int64_t, int64_t, bool, int64_t>(),
           py::arg("panels"), py::arg("scales"), py::arg("sums"), py::arg("bias"), py::arg("columns"),
           py::arg("depth"), py::arg("is_narrow"), py::arg("turn") = 1)
      .def("multiply", &ByteWeights::multiply)
      .def("top", &ByteWeights::top)
      .def("multiply_rms_norm", &ByteWeights::multiply_rms_norm)
      .def("multiply_layer_norm", &ByteWeights::multiply_layer_norm)
      .def_property_readonly("columns", &ByteWeights::columns)
      .def_property_readonly("depth", &ByteWeights::depth)
      .def_property_readonly("is_narrow", &ByteWeights::is_narrow);
}

}  // namespace vila2::python
