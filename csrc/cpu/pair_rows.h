// `pair_rows`: the rows of both sides of N positive pairs as one array z [2, n, d], each divided by its L2 norm where
// asked, and the similarity of each pair. One pass over the inputs where PyTorch makes about six.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sslfast {

template <class T>
struct PairRows {
  int64_t n, d;
  int threads;
  T eps;    // a norm below this counts as this
  T* z;     // [2, n, d]
  T* norm;  // [2, n], or null: rows are not normalised
};

template <class T>
struct PairRowsKernels {
  // z_s = x_s / norm_s, positive_i = <z_0i, z_1i>
  void (*forward)(const PairRows<T>&, const T* x, const T* y, T* positive);
  // g_s = dz_s + dpositive z_(1-s);  dx_s = (g_s - z_s <g_s, z_s>) / norm_s, where eps replaced the norm g_s / eps
  void (*backward)(const PairRows<T>&, const T* dz, const T* dpositive, T* dx, T* dy);
};

SSLFAST_PER_ISA(template <class T> const PairRowsKernels<T>& pair_rows();)

template <class T>
const PairRowsKernels<T>& pair_rows_kernels(Isa isa) {
  return SSLFAST_CHOOSE(isa, pair_rows<T>());
}

}  // namespace sslfast
