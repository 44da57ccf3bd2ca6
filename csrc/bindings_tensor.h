// A torch tensor as an argument: anything with torch's data_ptr, shape, stride and dtype. torch itself is
// neither linked nor included.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace vila2::python {

namespace py = pybind11;
using cpu::Storage;

enum class Dtype { kFloat32, kBfloat16, kUint8, kInt8, kInt32, kInt64, kOther };

// torch's dtypes are singletons that live as long as the interpreter: their names are read once.
inline Dtype dtype_of(PyObject* dtype) {
  static std::vector<std::pair<PyObject*, Dtype>> known;
  for (const auto& [object, value] : known) {
    if (object == dtype) return value;
  }
  const std::string name = py::str(py::handle(dtype));
  const Dtype value = name == "torch.float32"    ? Dtype::kFloat32
                      : name == "torch.bfloat16" ? Dtype::kBfloat16
                      : name == "torch.uint8"    ? Dtype::kUint8
                      : name == "torch.int8"     ? Dtype::kInt8
                      : name == "torch.int32"    ? Dtype::kInt32
                      : name == "torch.int64"    ? Dtype::kInt64
                                                 : Dtype::kOther;
  Py_INCREF(dtype);
  known.emplace_back(dtype, value);
  return value;
}

[[noreturn]] inline void fail(const char* name, const std::string& expected) {
  throw py::value_error(std::string(name) + ": expected " + expected);
}

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

inline py::object get(py::handle object, PyObject* name, const char* argument) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) {
    PyErr_Clear();
    fail(argument, "a torch tensor");
  }
  return py::reinterpret_steal<py::object>(value);
}

inline py::object call(py::handle object, PyObject* method) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// Sizes without a heap allocation: a decoding step makes thousands of these.
class Shape {
 public:
  Shape() = default;
  explicit Shape(PyObject* tuple) : count_(static_cast<size_t>(PyTuple_GET_SIZE(tuple))) {
    for (size_t i = 0; i < std::min(count_, kMost); ++i) {
      sizes_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i)));
    }
  }
  static constexpr size_t kMost = 8;
  size_t size() const { return count_; }
  int64_t operator[](size_t i) const { return sizes_[i]; }
  bool operator==(const Shape& other) const { return equals(other.sizes_, other.count_); }
  bool equals(const int64_t* sizes, size_t count) const {
    return count == count_ && std::equal(sizes_, sizes_ + count_, sizes);
  }

 private:
  int64_t sizes_[kMost] = {};
  size_t count_ = 0;
};

struct Tensor {
  const char* name;
  py::handle object;
  Shape shape;
  Dtype dtype;
  void* data;

  Tensor(py::handle handle, const char* argument) : name(argument), object(handle) {
    static PyObject *const shape_name = interned("shape"), *const dtype_name = interned("dtype"),
                           *const pointer_name = interned("data_ptr"), *const cpu_name = interned("is_cpu");
    if (get(handle, cpu_name, name).ptr() != Py_True) fail(name, "a tensor on the CPU");
    shape = Shape(get(handle, shape_name, name).ptr());
    if (shape.size() > Shape::kMost) fail(name, "at most 8 dimensions");
    dtype = dtype_of(get(handle, dtype_name, name).ptr());
    data = PyLong_AsVoidPtr(call(handle, pointer_name).ptr());
  }

  std::string describe() const {
    return std::string(py::str(object.attr("dtype"))) + " " +
           std::string(py::str(py::tuple(object.attr("shape"))));
  }
  void require(bool condition, const char* expected) const {
    if (!condition) fail(name, std::string(expected) + ", got " + describe());
  }
  const Tensor& is(Dtype wanted, const char* expected) const {
    require(dtype == wanted, expected);
    return *this;
  }
  const Tensor& contiguous() const {
    static PyObject* const method = interned("is_contiguous");
    require(call(object, method).ptr() == Py_True, "a contiguous tensor");
    return *this;
  }
  const Tensor& sized(std::initializer_list<int64_t> wanted) const {
    if (!shape.equals(wanted.begin(), wanted.size())) {
      std::string expected = "shape (";
      for (const int64_t size : wanted) expected += std::to_string(size) + ", ";
      require(false, (expected.substr(0, expected.size() - (wanted.size() ? 2 : 0)) + ")").c_str());
    }
    return *this;
  }
  const Tensor& dims(size_t count) const {
    require(shape.size() == count, count == 2   ? "2 dimensions"
                                   : count == 3 ? "3 dimensions"
                                                : "4 dimensions");
    return *this;
  }
  const Tensor& like(const Tensor& other) const {
    if (dtype != other.dtype || !(shape == other.shape)) {
      require(false, (std::string("the type and shape of ") + other.name).c_str());
    }
    return *this;
  }
  Storage storage() const {
    require(dtype == Dtype::kFloat32 || dtype == Dtype::kBfloat16, "float32 or bfloat16");
    return dtype == Dtype::kFloat32 ? Storage::kFloat32 : Storage::kBfloat16;
  }
  // Elements between rows of a (rows, heads, dim) tensor whose (heads, dim) part is dense.
  int64_t row_stride() const {
    static PyObject* const method = interned("stride");
    dims(3);
    const py::object strides = call(object, method);
    const auto at = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i)); };
    require((shape[2] <= 1 || at(2) == 1) && (shape[1] <= 1 || at(1) == shape[2]),
            "dense heads within each row");
    return at(0);
  }
  int64_t width() const {
    require(shape.size() > 0 && shape[shape.size() - 1] > 0, "a last axis that is not empty");
    return shape[shape.size() - 1];
  }
  int64_t rows() const {
    int64_t count = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];
    return count;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace vila2::python
