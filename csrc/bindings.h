// The parts of vila2._C.
#pragma once

#include <pybind11/pybind11.h>

namespace vila2::python {

void bind_bytes(pybind11::module_& m);
void bind_images(pybind11::module_& m);
void bind_tokens(pybind11::module_& m);
void bind_training(pybind11::module_& m);

}  // namespace vila2::python
