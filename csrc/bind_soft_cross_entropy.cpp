// Binding of soft_cross_entropy.
#include <algorithm>
#include <memory>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/soft_cross_entropy.h"

namespace py = pybind11;

namespace sslfast {
namespace {

// One call of the op on the CPU; forward and backward share it. The tensors behind the addresses must outlive it.
struct Call {
  // sizes: views, targets, batch, classes; logits and target: address, strides of views and images
  Call(const std::array<int64_t, 4>& sizes, const Address& logits, int logits_dtype, const Address& target,
       int target_dtype, uintptr_t center, double scale, double target_scale, bool softmax, bool skip, uintptr_t state,
       uintptr_t mass, uintptr_t target_state, int threads) {
    const auto [views, targets, batch, classes] = sizes;
    not_negative(views, targets - 1, batch, classes - 1, threads - 1);
    p.views = views, p.targets = targets, p.batch = batch, p.classes = classes;
    p.logits = at<void>(std::get<0>(logits)), p.target = at<void>(std::get<0>(target));
    p.logits_strides[0] = std::get<1>(logits), p.logits_strides[1] = std::get<2>(logits);
    p.target_strides[0] = std::get<1>(target), p.target_strides[1] = std::get<2>(target);
    p.logits_dtype = float_of(logits_dtype), p.target_dtype = float_of(target_dtype);
    p.center = at<void>(center), p.scale = scale, p.target_scale = target_scale;
    p.softmax = softmax, p.skip = skip, p.threads = threads;
    p.state = at<void>(state), p.mass = at<void>(mass), p.target_state = at<void>(target_state);
    const size_t size = p.logits_dtype == Float::f64 ? sizeof(double) : sizeof(float);
    const int64_t parts = std::min<int64_t>(threads, views * batch);
    room.reset(new char[static_cast<size_t>(parts * (targets + 1) * classes) * size]);
    p.room = room.get();
  }

  SoftCrossEntropy p{};
  std::unique_ptr<char[]> room;
};

void forward(Call& call, uintptr_t loss) { SSLFAST_CHOOSE(active_isa(), soft_cross_entropy(call.p, at<void>(loss))); }

void backward(Call& call, uintptr_t upstream, const Address& dlogits) {
  const int64_t strides[2] = {std::get<1>(dlogits), std::get<2>(dlogits)};
  SSLFAST_CHOOSE(active_isa(),
                 soft_cross_entropy_backward(call.p, at<void>(upstream), at<void>(std::get<0>(dlogits)), strides));
}

}  // namespace

void bind_soft_cross_entropy(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Call>(m, "SoftCrossEntropy")
      .def(py::init<const std::array<int64_t, 4>&, const Address&, int, const Address&, int, uintptr_t, double, double,
                    bool, bool, uintptr_t, uintptr_t, uintptr_t, int>())
      .def("forward", &forward, unlocked)
      .def("backward", &backward, unlocked);
}

}  // namespace sslfast
