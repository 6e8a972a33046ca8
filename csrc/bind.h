// What the bindings share. Addresses come in as integers from sslfast/ops/_backend.py, which has checked device, dtype,
// contiguity and size of the tensors behind them; positions inside those tensors are checked in the bindings.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "floats.h"

namespace sslfast {

void bind_augment_views(pybind11::module_& m);
void bind_patches(pybind11::module_& m);
void bind_sinkhorn(pybind11::module_& m);
void bind_soft_cross_entropy(pybind11::module_& m);

using Strides = std::array<int64_t, 4>;
using Address = std::tuple<uintptr_t, int64_t, int64_t>;  // of rows: with strides of batch and row

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Float float_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("no such floating dtype");
  return static_cast<Float>(code);
}

template <class... Sizes>
void not_negative(Sizes... sizes) {
  if (((sizes < 0) || ...)) throw std::invalid_argument("sizes must be positive");
}

}  // namespace sslfast
