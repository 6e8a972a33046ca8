// Compiled once per instruction set, as similarity_lse.cpp.
#include "exp2.h"
#include "mask.h"
#include "parallel.h"
#include "similarity_lse.h"

namespace sslfast {
namespace {

// log(1 + u) for 0 <= u <= 1: 2 atanh(q) = 2 q + 2 q^3 / 3 + ... of q = u / (2 + u) <= 1 / 3, with a relative error of
// 4e-9 (float), 2e-18 (double). Here atanh(q) / q by x = q^2.
inline float atanh_series(float x) {
  float p = 0.14078889181554540327f;
  p = p * x + 0.13982578872598634444f;
  p = p * x + 0.20012297615351873956f;
  p = p * x + 0.33333160820688886578f;
  return p * x + 1.0f;
}

inline double atanh_series(double x) {
  double p = 0.085220817813906990645;
  p = p * x + 0.041622532559304102879;
  p = p * x + 0.060550843640346088273;
  p = p * x + 0.066501870163373121685;
  p = p * x + 0.076933070211520038808;
  p = p * x + 0.090908704162524022551;
  p = p * x + 0.11111112040373836587;
  p = p * x + 0.14285714272727057267;
  p = p * x + 0.20000000000092873734;
  p = p * x + 0.33333333333333074797;
  return p * x + 1.0;
}

// Row sums of softplus(t_ij), of w_ij = sign_j / (1 + e^-t_ij) and of w_ij <a_i, b_j>, where t_ij = sign_j (scale
// <a_i, b_j> + bias_j); s becomes w times weight. SIGNED: sign is not 1 throughout.
template <bool SIGNED, class T>
inline void bce_row(T* __restrict s, const T* __restrict off, const T* __restrict sign, T factor, T weight, T& terms,
                    T& weights, T& moments, int64_t cols) {
  T term_sum = 0, weight_sum = 0, moment_sum = 0;
#pragma omp simd reduction(+ : term_sum, weight_sum, moment_sum)
  for (int64_t j = 0; j < cols; ++j) {
    T t = s[j] * factor + off[j];  // in base 2
    if (SIGNED) t *= sign[j];
    const T size = t < 0 ? -t : t;
    const T u = exp2_any(-size);
    const T inverse = 1 / ((1 + u) * (2 + u));
    const T q = u * (1 + u) * inverse;
    const T rest = u * (2 + u) * inverse;  // u / (1 + u), the smaller of the two probabilities
    T w = t > 0 ? 1 - rest : rest;
    term_sum += (t > 0 ? t : T(0)) * T(kLn2) + 2 * q * atanh_series(q * q);
    if (SIGNED) w *= sign[j];
    weight_sum += w;
    moment_sum += w * s[j];
    s[j] = weight * w;
  }
  terms += term_sum, weights += weight_sum, moments += moment_sum;
}

constexpr int64_t kStretch = 256;  // columns that are added one by one; stretches then add up: less rounding

template <class T>
void bce_tile(const SimilarityLse<T>& p, T* tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
  const Mask<T> mask(p, r0, c0, cols);
  const int parts = parts_for(rows, rows * cols, p.threads);
  const int64_t room = SimilarityLse<T>::scratch_size(cols);

  parallel_rows(rows, parts, [&](int part, int64_t begin, int64_t end) {
    T* const offset = p.scratch + part * room;
    T* const sign = offset + cols;
    column_offsets(p, c0, cols, offset);
    for (int64_t i = begin; i < end; ++i) {
      const bool touched = mask.touches(i);
      for (int64_t j = 0; touched && j < cols; ++j) sign[j] = 1;
      if (touched) mask.fill(i, sign, T(-1));
      const auto row = touched ? bce_row<true, T> : bce_row<false, T>;
      for (int64_t j = 0; j < cols; j += kStretch) {
        row(tile + i * cols + j, offset + j, sign + j, p.factor, p.row_weight[r0 + i], p.term_sum[r0 + i],
            p.weight_sum[r0 + i], p.moment_sum[r0 + i], cols - j < kStretch ? cols - j : kStretch);
      }
    }
  });
}

}  // namespace

namespace SSLFAST_ISA {

template <class T>
BceTile<T> similarity_bce() {
  return bce_tile<T>;
}

template BceTile<float> similarity_bce<float>();
template BceTile<double> similarity_bce<double>();

}  // namespace SSLFAST_ISA
}  // namespace sslfast
