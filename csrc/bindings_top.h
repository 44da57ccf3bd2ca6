// The arguments of `top`, for weights of either kind.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings_tensor.h"
#include "cpu/top.h"

namespace vila2::python {

inline cpu::TopJob top_job(int64_t rows, int64_t columns, py::handle banned_object,
                           py::handle is_banned_object, py::handle values_object, py::handle columns_object) {
  const Tensor banned(banned_object, "banned"), is_banned(is_banned_object, "is_banned"),
      values(values_object, "values"), found(columns_object, "columns");
  values.is(Dtype::kFloat32, "float32").dims(2).contiguous();
  const int64_t count = values.shape[1];
  values.sized({rows, count});
  const int64_t most = std::min(columns, cpu::kMostTop);
  if (count < 1 || count > most) fail("values", "1 to " + std::to_string(most) + " columns");
  found.is(Dtype::kInt64, "int64").sized({rows, count}).contiguous();
  banned.is(Dtype::kInt64, "int64").dims(1).contiguous();
  is_banned.is(Dtype::kUint8, "uint8").sized({rows}).contiguous();
  return {count,
          banned.as<int64_t>(),
          banned.shape[0],
          is_banned.as<uint8_t>(),
          values.as<float>(),
          found.as<int64_t>()};
}

}  // namespace vila2::python
