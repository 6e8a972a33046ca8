// The Python module sslfast._C. Addresses come in as integers from sslfast/ops/_backend.py, which has checked device,
// dtype, contiguity and size of the tensors behind them; positions inside those tensors are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "cpu/ema.h"
#include "cpu/hardest_pairs.h"
#include "cpu/isa.h"
#include "cpu/pair_rows.h"
#include "cpu/parallel.h"
#include "cpu/similarity_lse.h"
#if defined(SSLFAST_CUDA)
#include "cuda/ema.h"
#endif

namespace py = pybind11;
using namespace sslfast;

namespace {

// One call of the op on the CPU: what its tiles share. The tensors behind the addresses must outlive the object.
template <class T>
class SimilarityLseTiles {
 public:
  SimilarityLseTiles(int64_t m, int64_t n, int64_t d, uintptr_t a, uintptr_t b, uintptr_t scale, uintptr_t bias,
                     uintptr_t a_ids, uintptr_t b_ids, bool same, bool self, bool symmetric, int64_t max_cols,
                     int threads)
      : kernels_(similarity_lse_kernels<T>(active_isa())), max_cols_(max_cols) {
    if (m < 0 || n < 0 || d < 0 || max_cols < 1 || threads < 1) throw std::invalid_argument("sizes must be positive");
    // An empty tensor has no address, and then there is no pair to look up either.
    if (m > 0 && n > 0 && (a_ids == 0) != (b_ids == 0)) throw std::invalid_argument("a_ids and b_ids come together");
    p_.m = m, p_.n = n, p_.d = d;
    p_.a = at<T>(a), p_.b = at<T>(b), p_.scale = at<T>(scale), p_.bias = at<T>(bias);
    p_.a_ids = at<int64_t>(a_ids), p_.b_ids = at<int64_t>(b_ids);
    p_.same = same, p_.self = self, p_.symmetric = symmetric, p_.threads = threads;
    scratch_.resize(static_cast<size_t>(threads) * SimilarityLse<T>::scratch_size(max_cols));
    p_.scratch = scratch_.data();
    py::gil_scoped_release unlocked;
    kernels_.prepare(p_);
  }

  // row_state [2, m] and col_state [2, n] (or 0): running maxima and sums, filled here.
  void begin_forward(uintptr_t row_state, uintptr_t col_state) {
    const auto begin = [](uintptr_t state, int64_t count, T*& max, T*& sum) {
      max = at<T>(state), sum = state ? max + count : nullptr;
      if (!state) return;
      std::fill_n(max, count, -std::numeric_limits<T>::infinity());
      std::fill_n(sum, count, T(0));
    };
    begin(row_state, p_.m, p_.row_max, p_.row_sum);
    begin(col_state, p_.n, p_.col_max, p_.col_sum);
    stage_ = Stage::forward;
  }

  void forward(uintptr_t tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
    check(Stage::forward, r0, rows, c0, cols);
    py::gil_scoped_release unlocked;
    kernels_.forward_tile(p_, at<T>(tile), r0, rows, c0, cols);
  }

  void finish_forward(uintptr_t row_lse, uintptr_t col_lse) {
    check(Stage::forward, 0, 0, 0, 0);
    py::gil_scoped_release unlocked;
    kernels_.finish(p_, p_.row_max, p_.row_sum, at<T>(row_lse), p_.m);
    if (p_.col_sum && col_lse) kernels_.finish(p_, p_.col_max, p_.col_sum, at<T>(col_lse), p_.n);
  }

  // row_work [2, m] and col_work [2, n] are room for weights and shifts; h, col_lse, col_work and dbias may be 0.
  void begin_backward(uintptr_t g, uintptr_t row_lse, uintptr_t row_work, uintptr_t h, uintptr_t col_lse,
                      uintptr_t col_work, uintptr_t dbias) {
    p_.row_weight = at<T>(row_work), p_.row_shift = p_.row_weight + p_.m;
    p_.col_weight = at<T>(col_work), p_.col_shift = col_work ? p_.col_weight + p_.n : nullptr;
    p_.dbias = at<T>(dbias);
    stage_ = Stage::backward;
    const auto fill = [&] {
      const bool rows = kernels_.weights(p_, at<T>(g), at<T>(row_lse), p_.row_weight, p_.row_shift, p_.m);
      return (!h || kernels_.weights(p_, at<T>(h), at<T>(col_lse), p_.col_weight, p_.col_shift, p_.n)) && rows;
    };
    py::gil_scoped_release unlocked;
    if (fill()) return;
    p_.safe = false;  // a very large upstream gradient
    fill();
  }

  void backward(uintptr_t tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
    check(Stage::backward, r0, rows, c0, cols);
    py::gil_scoped_release unlocked;
    kernels_.backward_tile(p_, at<T>(tile), r0, rows, c0, cols);
  }

  // g [m]: gradients of the row sums, read while tiles come; sums [3, m]: of terms, of weights and of weights times
  // products, filled here.
  void begin_bce(uintptr_t g, uintptr_t sums) {
    p_.row_weight = at<T>(g), p_.term_sum = at<T>(sums), p_.weight_sum = p_.term_sum + p_.m;
    p_.moment_sum = p_.weight_sum + p_.m;
    std::fill_n(p_.term_sum, 3 * p_.m, T(0));
    stage_ = Stage::bce;
  }

  void bce(uintptr_t tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
    check(Stage::bce, r0, rows, c0, cols);
    py::gil_scoped_release unlocked;
    bce_tile_(p_, at<T>(tile), r0, rows, c0, cols);
  }

  bool safe() const { return p_.safe; }

 private:
  enum class Stage { prepared, forward, backward, bce };

  void check(Stage stage, int64_t r0, int64_t rows, int64_t c0, int64_t cols) const {
    if (stage != stage_) throw std::logic_error("begin_forward, begin_backward or begin_bce comes first");
    const bool inside = r0 >= 0 && rows >= 0 && rows <= p_.m - r0 && c0 >= 0 && cols >= 0 && cols <= p_.n - c0;
    if (!inside || cols > max_cols_) throw std::out_of_range("tile outside of the matrix");
  }

  const SimilarityLseKernels<T>& kernels_;
  const BceTile<T> bce_tile_ = bce_tile_kernel<T>(active_isa());
  SimilarityLse<T> p_{};
  std::vector<T> scratch_;
  int64_t max_cols_;
  Stage stage_ = Stage::prepared;
};

template <class T>
void bind_similarity_lse(py::module_& m, const char* name) {
  using Tiles = SimilarityLseTiles<T>;
  py::class_<Tiles>(m, name)
      .def(py::init<int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, bool,
                    bool, bool, int64_t, int>(),
           py::arg("m"), py::arg("n"), py::arg("d"), py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("bias"),
           py::arg("a_ids"), py::arg("b_ids"), py::arg("same"), py::arg("self"), py::arg("symmetric"),
           py::arg("max_cols"), py::arg("threads"))
      .def("begin_forward", &Tiles::begin_forward)
      .def("forward", &Tiles::forward)
      .def("finish_forward", &Tiles::finish_forward)
      .def("begin_backward", &Tiles::begin_backward)
      .def("backward", &Tiles::backward)
      .def("begin_bce", &Tiles::begin_bce)
      .def("bce", &Tiles::bce)
      .def_property_readonly("safe", &Tiles::safe);
}

template <class T>
PairRows<T> pair_rows_of(int64_t n, int64_t d, uintptr_t z, uintptr_t norm, double eps, int threads) {
  if (n < 0 || d < 0 || threads < 1) throw std::invalid_argument("sizes must be positive");
  return {n, d, threads, static_cast<T>(eps), at<T>(z), at<T>(norm)};
}

template <class T>
void pair_rows_fwd(int64_t n, int64_t d, uintptr_t x, uintptr_t y, uintptr_t z, uintptr_t norm, uintptr_t positive,
                   double eps, int threads) {
  const PairRows<T> p = pair_rows_of<T>(n, d, z, norm, eps, threads);
  pair_rows_kernels<T>(active_isa()).forward(p, at<T>(x), at<T>(y), at<T>(positive));
}

template <class T>
void pair_rows_bwd(int64_t n, int64_t d, uintptr_t dz, uintptr_t dpositive, uintptr_t z, uintptr_t norm, uintptr_t dx,
                   uintptr_t dy, double eps, int threads) {
  const PairRows<T> p = pair_rows_of<T>(n, d, z, norm, eps, threads);
  pair_rows_kernels<T>(active_isa()).backward(p, at<T>(dz), at<T>(dpositive), at<T>(dx), at<T>(dy));
}

// scores, found [2, n]: those of the farthest columns, then those of the nearest.
template <class T>
void find_hardest(int64_t n, int64_t rows, int64_t cols, int64_t r0, int64_t c0, uintptr_t tile, uintptr_t offset,
                  uintptr_t groups, uintptr_t scores, uintptr_t found, int threads) {
  const bool inside = r0 >= 0 && rows >= 0 && rows <= n - r0 && c0 >= 0 && cols >= 0 && cols <= n - c0;
  if (!inside || n > std::numeric_limits<int32_t>::max()) throw std::out_of_range("tile outside of the matrix");
  if (threads < 1) throw std::invalid_argument("sizes must be positive");
  const HardestPairs<T> p{rows,
                          cols,
                          r0,
                          c0,
                          threads,
                          at<T>(tile),
                          at<T>(offset),
                          at<int32_t>(groups),
                          at<T>(scores),
                          at<T>(scores) + n,
                          at<int32_t>(found),
                          at<int32_t>(found) + n};
  SSLFAST_CHOOSE(active_isa(), hardest_pairs(p));
}

// The rows of the table are addresses that the caller has checked, as for all other addresses here.
void ema_update_cpu(uintptr_t table, int64_t count, int target, int source, double momentum, int threads) {
  if (count < 0 || threads < 1) throw std::invalid_argument("sizes must be positive");
  SSLFAST_CHOOSE(active_isa(),
                 ema_update({at<Segment>(table), count, momentum, threads}, float_of(target), float_of(source)));
}

#if defined(SSLFAST_CUDA)
void ema_update_on_gpu(uintptr_t table, int64_t count, int target, int source, double momentum, uintptr_t momentum_at,
                       bool momentum_is_f32, uintptr_t stream) {
  const char* error = ema_update_cuda(at<Segment>(table), count, float_of(target), float_of(source), momentum,
                                      at<void>(momentum_at), momentum_is_f32, at<void>(stream));
  if (error) throw std::runtime_error(std::string("ema_update_: ") + error);
}
#endif

// What DLPack (https://github.com/dmlc/dlpack, version 1.2) fixes of the functions by which a tensor library tells
// others about its tensors; PyTorch offers them from 2.10 on.
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_id, dims;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, Tensor* out);  // fills `out` without owning anything; -1 with a Python exception set
  void* stream;
};

}  // namespace dlpack

// Calls put(number) for all there is to know of the tensors in a list: which objects they are, address, device, dtype,
// shape and strides. None may stand among them. False where one is no plain tensor, or where put returned false.
template <class Put>
bool each_number(const py::list& tensors, const py::capsule& exchange, const Put& put) {
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->major != 1) return false;
  for (const py::handle tensor : tensors) {
    if (!put(reinterpret_cast<int64_t>(tensor.ptr()))) return false;
    if (tensor.is_none()) continue;
    dlpack::Tensor t{};
    if (api->view(tensor.ptr(), &t) != 0) {
      PyErr_Clear();
      return false;
    }
    bool more = put(reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset)) &&
                put(static_cast<int64_t>(t.device_type) << 32 | static_cast<uint32_t>(t.device_id)) &&
                put(static_cast<int64_t>(t.kind) << 40 | static_cast<int64_t>(t.bits) << 32 | t.dims);
    for (int32_t i = 0; more && i < t.dims; ++i) more = put(t.shape[i]) && put(t.strides ? t.strides[i] : -1);
    if (!more) return false;
  }
  return true;
}

// Those numbers as bytes, or None.
py::object describe(const py::list& tensors, const py::capsule& exchange) {
  std::vector<int64_t> found;
  found.reserve(6 * tensors.size());
  const auto put = [&](int64_t number) {
    found.push_back(number);
    return true;
  };
  if (!each_number(tensors, exchange, put)) return py::none();
  return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(int64_t));
}

// Whether describe would give these bytes.
bool matches(const py::list& tensors, const py::capsule& exchange, const py::bytes& described) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(described.ptr(), &data, &size) != 0) throw py::error_already_set();
  const char *next = data, *end = data + size;
  const auto put = [&](int64_t number) {
    if (next == end || std::memcmp(next, &number, sizeof(number)) != 0) return false;
    next += sizeof(number);
    return true;
  };
  return each_number(tensors, exchange, put) && next == end;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa_supported(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

template <class T>
void exp2_into(uintptr_t x, uintptr_t y, int64_t count) {
  similarity_lse_kernels<T>(active_isa()).exp2(at<T>(x), at<T>(y), count);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of sslfast. Internal: sslfast.ops is the interface.";
  m.def("cpu_isa", [] { return std::string(isa_name(active_isa())); }, "Instruction set that the CPU kernels use now.");
  m.def("cpu_isas", &supported_isas, "Instruction sets compiled in that this CPU has.");
  m.def("shares_openmp_pool", &shares_openmp_pool, "Whether CPU kernels run on PyTorch's own thread pool.");
  m.def("exp2_f32", &exp2_into<float>, "y[i] = 2^x[i] as the kernels compute it.");
  m.def("exp2_f64", &exp2_into<double>, "y[i] = 2^x[i] as the kernels compute it.");
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("pair_rows_fwd_f32", &pair_rows_fwd<float>, unlocked);
  m.def("pair_rows_fwd_f64", &pair_rows_fwd<double>, unlocked);
  m.def("pair_rows_bwd_f32", &pair_rows_bwd<float>, unlocked);
  m.def("pair_rows_bwd_f64", &pair_rows_bwd<double>, unlocked);
  m.def("hardest_pairs_f32", &find_hardest<float>, unlocked);
  m.def("hardest_pairs_f64", &find_hardest<double>, unlocked);
  m.def("describe", &describe);
  m.def("matches", &matches);
  m.def("ema_update", &ema_update_cpu, unlocked);
#if defined(SSLFAST_CUDA)
  m.def("ema_update_cuda", &ema_update_on_gpu, unlocked);
#endif
  bind_patches(m);
  bind_augment_views(m);
  bind_sinkhorn(m);
  bind_soft_cross_entropy(m);
  bind_similarity_lse<float>(m, "SimilarityLseF32");
  bind_similarity_lse<double>(m, "SimilarityLseF64");
}
