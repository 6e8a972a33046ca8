// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
#include "pair_rows.h"

#include <cmath>

#include "parallel.h"

namespace sslfast {
namespace {

template <class T>
inline T dot(const T* __restrict x, const T* __restrict y, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += x[k] * y[k];
  return sum;
}

template <class T>
void normalize_row(const T* __restrict x, T* __restrict z, T* norm, T eps, int64_t d) {
  double sum = 0;  // squares of float32 numbers do not overflow in double
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(x[k]);
  const T length = static_cast<T>(std::sqrt(sum));
  const T divisor = length < eps ? eps : length;  // a NaN stays
  *norm = divisor;
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) z[k] = x[k] / divisor;
}

template <class T>
void forward(const PairRows<T>& p, const T* x, const T* y, T* positive) {
  const T* const sides[] = {x, y};
  parallel_rows(p.n, parts_for(p.n, 2 * p.n * p.d, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int s = 0; s < 2; ++s) {
        const T* __restrict from = sides[s] + i * p.d;
        T* __restrict to = p.z + (s * p.n + i) * p.d;
        if (p.norm) {
          normalize_row(from, to, p.norm + s * p.n + i, p.eps, p.d);
        } else {
          for (int64_t k = 0; k < p.d; ++k) to[k] = from[k];
        }
      }
      positive[i] = dot(p.z + i * p.d, p.z + (p.n + i) * p.d, p.d);
    }
  });
}

template <class T>
void backward(const PairRows<T>& p, const T* dz, const T* dpositive, T* dx, T* dy) {
  T* const sides[] = {dx, dy};
  parallel_rows(p.n, parts_for(p.n, 2 * p.n * p.d, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int s = 0; s < 2; ++s) {
        const T* __restrict upstream = dz + (s * p.n + i) * p.d;
        const T* __restrict z = p.z + (s * p.n + i) * p.d;
        const T* __restrict other = p.z + ((1 - s) * p.n + i) * p.d;
        T* __restrict g = sides[s] + i * p.d;
        const T dp = dpositive[i];
        T inner = 0;
#pragma omp simd reduction(+ : inner)
        for (int64_t k = 0; k < p.d; ++k) {
          g[k] = upstream[k] + dp * other[k];
          inner += g[k] * z[k];
        }
        if (!p.norm) continue;
        const T norm = p.norm[s * p.n + i];
        inner = norm == p.eps ? T(0) : inner;
#pragma omp simd
        for (int64_t k = 0; k < p.d; ++k) g[k] = (g[k] - z[k] * inner) / norm;
      }
    }
  });
}

}  // namespace

namespace SSLFAST_ISA {

template <class T>
const PairRowsKernels<T>& pair_rows() {
  static constexpr PairRowsKernels<T> kernels{forward<T>, backward<T>};
  return kernels;
}

template const PairRowsKernels<float>& pair_rows<float>();
template const PairRowsKernels<double>& pair_rows<double>();

}  // namespace SSLFAST_ISA
}  // namespace sslfast
