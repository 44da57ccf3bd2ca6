// Images as buffers (NumPy arrays), before they become tensors.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "cpu/resize.h"

namespace vila2::python {
namespace {

namespace py = pybind11;

constexpr int64_t kMostSide = 1 << 24;  // int32 offsets, and sizes that a float holds, as in Pillow

struct Image {
  py::buffer_info info;
  int64_t height, width;

  Image(const py::buffer& buffer, const char* name, bool writable) : info(buffer.request(writable)) {
    const auto fail = [&](const char* expected) {
      throw py::value_error(std::string(name) + ": expected " + expected);
    };
    if (info.ndim != 3 || info.shape[2] != 3 || info.format != py::format_descriptor<uint8_t>::format()) {
      fail("uint8 (height, width, 3)");
    }
    height = info.shape[0], width = info.shape[1];
    if (height < 1 || width < 1 || height > kMostSide || width > kMostSide) {
      fail("sides of 1 to 2^24 pixels");
    }
    const bool is_dense = info.strides[2] == 1 && (width == 1 || info.strides[1] == 3);
    if (!is_dense || (height > 1 && info.strides[0] != 3 * width)) {
      fail("a contiguous array");
    }
  }
};

void resize(const py::buffer& image_buffer, const py::buffer& out_buffer, const std::string& interpolation,
            bool rows_first) {
  const Image image(image_buffer, "image", false), out(out_buffer, "out", true);
  if (interpolation != "bilinear" && interpolation != "bicubic") {
    throw py::value_error("interpolation: expected bilinear or bicubic, got " + interpolation);
  }
  const cpu::ResizeJob job{static_cast<const uint8_t*>(image.info.ptr),
                           image.height,
                           image.width,
                           static_cast<uint8_t*>(out.info.ptr),
                           out.height,
                           out.width,
                           interpolation == "bilinear" ? cpu::Filter::kBilinear : cpu::Filter::kBicubic,
                           rows_first};
  const py::gil_scoped_release release;
  cpu::resize(job);
}

}  // namespace

void bind_images(py::module_& m) {
  m.def("resize", resize, py::arg("image"), py::arg("out"), py::arg("interpolation"), py::arg("rows_first"));
}

}  // namespace vila2::python
