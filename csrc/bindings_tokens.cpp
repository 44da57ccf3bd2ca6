// Tokens: their embeddings, and loops among them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "bindings.h"
#include "bindings_tensor.h"
#include "cpu/ops.h"

namespace vila2::python {
namespace {

void embed(py::handle ids_object, py::handle table_object, py::handle out_object) {
  const Tensor ids(ids_object, "ids"), table(table_object, "table"), out(out_object, "out");
  ids.is(Dtype::kInt64, "int64").dims(1).contiguous();
  table.dims(2).contiguous();
  const int64_t count = ids.shape[0], rows = table.shape[0], width = table.width();
  out.sized({count, width}).contiguous();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t id = ids.as<int64_t>()[t];
    if (id < 0 || id >= rows)
      fail("ids", "rows of the table, which has " + std::to_string(rows) + ", got " + std::to_string(id));
  }
  const cpu::EmbedJob job{ids.as<int64_t>(), table.data, table.storage(), out.data, out.storage(), width};
  const py::gil_scoped_release release;
  cpu::embed(job, count);
}

// `tokens` is a list: reading what is needed of it takes less than making an array of it, and the whole less
// than giving the GIL away and getting it back, so it is kept.
int64_t find_loop(const py::buffer& runs_object, const py::list& tokens, int64_t min_repeats,
                  int64_t min_tokens) {
  const py::buffer_info runs = runs_object.request(true);
  if (runs.ndim != 1 || !runs.item_type_is_equivalent_to<int32_t>() || runs.strides[0] != 4)
    fail("runs", "a contiguous int32 array of one axis");
  if (min_repeats < 1 || min_tokens < 1) fail("min_repeats, min_tokens", "positive numbers");
  const int64_t periods = runs.shape[0], length = static_cast<int64_t>(tokens.size());
  if (length < 1) fail("tokens", "one or more");
  const auto token = [&](int64_t place) {
    const long long id = PyLong_AsLongLong(PyList_GET_ITEM(tokens.ptr(), static_cast<Py_ssize_t>(place)));
    if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (id < 0 || id > std::numeric_limits<int32_t>::max())
      fail("tokens", "numbers of 31 bits, got " + std::to_string(id));
    return static_cast<int32_t>(id);
  };
  const int64_t count = std::min(periods, length - 1);
  std::vector<int32_t> earlier(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) earlier[static_cast<size_t>(i)] = token(length - 2 - i);
  return cpu::kernels().find_loop({static_cast<int32_t*>(runs.ptr), earlier.data(), token(length - 1), count,
                                   periods, min_repeats, min_tokens});
}

}  // namespace

void bind_tokens(py::module_& m) {
  m.def("embed", embed);
  m.def("find_loop", find_loop);
}

}  // namespace vila2::python
