// Binding of Sinkhorn's passes.
#include "bind.h"
#include "cpu/isa.h"
#include "cpu/sinkhorn.h"

namespace py = pybind11;

namespace sslfast {
namespace {

// logits: address, strides of rows and classes
void pass(const std::string& over, int64_t rows, int64_t classes, const Address& logits, int dtype, double scale,
          uintptr_t v, uintptr_t u, uintptr_t out, int threads) {
  not_negative(rows, classes - 1, threads - 1);
  if (std::get<2>(logits) != 1) throw std::invalid_argument("classes must be contiguous");
  const Sinkhorn p{
      rows,        classes, at<void>(std::get<0>(logits)), std::get<1>(logits), float_of(dtype), scale, at<void>(v),
      at<void>(u), threads};
  if (over == "classes") {
    SSLFAST_CHOOSE(active_isa(), sinkhorn_rows(p, at<void>(out)));
  } else if (over == "rows") {
    SSLFAST_CHOOSE(active_isa(), sinkhorn_columns(p, at<void>(out)));
  } else if (over != "none") {
    throw std::invalid_argument("over: expected classes, rows or none, got " + over);
  } else {
    SSLFAST_CHOOSE(active_isa(), sinkhorn_fill(p, at<void>(out)));
  }
}

}  // namespace

void bind_sinkhorn(py::module_& m) { m.def("sinkhorn", &pass, py::call_guard<py::gil_scoped_release>()); }

}  // namespace sslfast
