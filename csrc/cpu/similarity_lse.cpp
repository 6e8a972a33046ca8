// Compiled once per instruction set (SSLFAST_ISA names it). Plain loops over a row of the tile, which the compiler
// vectorises; a tile is expected to stay in the L2 cache. Nothing here may instantiate code that other translation
// units share (no standard containers): the linker could then pick the AVX-512 copy on a machine without it.
#include "similarity_lse.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "exp2.h"
#include "mask.h"
#include "parallel.h"

namespace sslfast {
namespace {

// t_ij = factor * s[j] + offset[j]. For a row that the mask touches, the offset becomes -inf where excluded and s a
// number that keeps t at -inf whatever the scale and the inputs are.
template <class T>
inline const T* row_offset(const Mask<T>& mask, T excluded_s, int64_t i, T* s, const T* offset, T* masked) {
  if (!mask.touches(i)) return offset;
  std::memcpy(masked, offset, static_cast<size_t>(mask.cols) * sizeof(T));
  mask.fill(i, s, excluded_s);
  mask.fill(i, masked, -infinity<T>());
  return masked;
}

template <class T>
double max_norm(const T* x, int64_t rows, int64_t d, int threads, T* best_of) {
  using Wide = std::conditional_t<sizeof(T) == 4, double, long double>;  // squares neither overflow nor vanish in it
  const int parts = parts_for(rows, rows * d, threads);
  parallel_rows(rows, parts, [&](int part, int64_t begin, int64_t end) {
    T best = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = x + i * d;
      Wide sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < d; ++k) sum += static_cast<Wide>(row[k]) * static_cast<Wide>(row[k]);
      const T norm = static_cast<T>(__builtin_sqrtl(sum));
      best = norm > best || norm != norm ? norm : best;  // a NaN stays
    }
    best_of[part] = best;
  });
  T best = best_of[0];
  for (int part = 1; part < parts; ++part)
    best = best_of[part] > best || best_of[part] != best_of[part] ? best_of[part] : best;
  return best;
}

template <class T>
void prepare(SimilarityLse<T>& p) {
  p.factor = static_cast<T>(*p.scale * kLog2e);
  if (p.factor != p.factor) {  // NaN comes in as an offset, which excluded pairs do not have
    p.offset = p.factor;
    p.factor = 0;
  }
  p.excluded_s = p.factor - p.factor == 0 ? T(0) : p.factor > 0 ? T(-1) : T(1);
  const double a_norm = max_norm(p.a, p.m, p.d, p.threads, p.scratch);
  const double b_norm = p.b == p.a ? a_norm : max_norm(p.b, p.n, p.d, p.threads, p.scratch);
  T bias = 0;
  for (int64_t j = 0; p.bias && j < p.n; ++j) {
    const bool dropped = p.bias[j] == -infinity<T>();
    p.drops_columns = p.drops_columns || dropped;
    const T x = dropped ? T(0) : p.bias[j];
    const T size = x < 0 ? -x : x;
    bias = size > bias || size != size ? size : bias;
  }
  const double scale = *p.scale;
  const double bound = (scale < 0 ? -scale : scale) * a_norm * b_norm + bias;  // |scale <a, b> + bias| <= bound
  p.safe = 2 * bound < 80;                                                     // false for NaN
}

// (max, sum) of several parts of one log-sum-exp: sum 2^(max - finite_or_zero(new max)). An infinite maximum is
// replaced by 0 as a shift, so +inf gives inf, as torch.logsumexp does.
template <class T>
inline T rescale(T sum, T max, T new_max) {
  const T from = max == -infinity<T>() ? max : finite_or_zero(max);
  return sum * exp2_any(from - finite_or_zero(new_max));
}

template <class T>
inline void merge(T& max, T& sum, T other_max, T other_sum) {
  const T new_max = other_max > max ? other_max : max;
  sum = rescale(sum, max, new_max) + rescale(other_sum, other_max, new_max);
  max = new_max;
}

// Sum of 2^t over a row of the safe range, and onto the columns' sums. SMALL: no t is -inf.
template <bool SMALL, class T>
inline T sum_row(const T* __restrict s, const T* __restrict off, T factor, T* __restrict col_sum, int64_t cols) {
  T sum = 0;
  if (col_sum) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) {
      const T t = s[j] * factor + off[j];
      const T e = SMALL ? exp2_small(t) : exp2_any(t);
      sum += e;
      col_sum[j] += e;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) {
      const T t = s[j] * factor + off[j];
      sum += SMALL ? exp2_small(t) : exp2_any(t);
    }
  }
  return sum;
}

template <class T>
void forward_rows_safe(const SimilarityLse<T>& p, T* tile, const Mask<T>& mask, const T* offset, T* masked, T* col_sum,
                       int64_t r0, int64_t begin, int64_t end) {
  const int64_t cols = mask.cols;
  for (int64_t i = begin; i < end; ++i) {
    T* const s = tile + i * cols;
    const T* const off = row_offset(mask, p.excluded_s, i, s, offset, masked);
    const bool small = off == offset && !p.drops_columns;
    p.row_sum[r0 + i] +=
        small ? sum_row<true>(s, off, p.factor, col_sum, cols) : sum_row<false>(s, off, p.factor, col_sum, cols);
  }
}

// Two passes over the rows: logits in place and maxima, then sums.
template <class T>
void forward_rows_running_max(const SimilarityLse<T>& p, T* __restrict tile, const Mask<T>& mask, const T* offset,
                              T* masked, T* __restrict col_max, T* __restrict col_sum, int64_t r0, int64_t begin,
                              int64_t end) {
  const int64_t cols = mask.cols;
  const T factor = p.factor;
  for (int64_t i = begin; i < end; ++i) {
    T* __restrict t = tile + i * cols;
    const T* __restrict off = row_offset(mask, p.excluded_s, i, t, offset, masked);
    T max = -infinity<T>();
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < cols; ++j) {
      t[j] = t[j] * factor + off[j];
      max = t[j] > max ? t[j] : max;
    }
    if (col_sum) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) col_max[j] = t[j] > col_max[j] ? t[j] : col_max[j];
    }
    const T shift = finite_or_zero(max);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) sum += exp2_any(t[j] - shift);
    merge(p.row_max[r0 + i], p.row_sum[r0 + i], max, sum);
  }
  if (!col_sum) return;
  for (int64_t i = begin; i < end; ++i) {
    const T* __restrict t = tile + i * cols;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) col_sum[j] += exp2_any(t[j] - finite_or_zero(col_max[j]));
  }
}

// Log-sum-exps of columns, as (max, sum): adds those of one group of rows to those of others.
template <class T>
void fold(bool safe, T* __restrict max, T* __restrict sum, const T* __restrict other_max, const T* __restrict other_sum,
          int64_t cols) {
  if (safe) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) sum[j] += other_sum[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) merge(max[j], sum[j], other_max[j], other_sum[j]);
  }
}

template <class T>
void clear(T* max, T* sum, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) max[j] = -infinity<T>(), sum[j] = 0;
}

constexpr int64_t kStrip = 32;  // rows that are added one by one to a column's sum; strips then add up: less rounding

template <class T>
void forward_tile(const SimilarityLse<T>& p, T* tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
  const Mask<T> mask(p, r0, c0, cols);
  const bool mirrored = p.symmetric && r0 != c0;  // the columns of this tile are rows of its mirror image
  T* const max_to = mirrored ? p.row_max + c0 : p.col_max ? p.col_max + c0 : nullptr;
  T* const sum_to = mirrored ? p.row_sum + c0 : p.col_sum ? p.col_sum + c0 : nullptr;
  const int parts = parts_for(rows, rows * cols, p.threads);
  const int64_t room = SimilarityLse<T>::scratch_size(cols);

  parallel_rows(rows, parts, [&](int part, int64_t begin, int64_t end) {
    T* const offset = p.scratch + part * room;
    T* const masked = offset + cols;
    T* const col_max = masked + cols;
    T* const col_sum = col_max + cols;
    T* const strip_max = col_sum + cols;
    T* const strip_sum = sum_to ? strip_max + cols : nullptr;
    column_offsets(p, c0, cols, offset);
    if (sum_to) clear(col_max, col_sum, cols);
    for (int64_t first = begin; first < end; first += kStrip) {
      const int64_t last = first + kStrip < end ? first + kStrip : end;
      if (sum_to) clear(strip_max, strip_sum, cols);
      if (p.safe) {
        forward_rows_safe(p, tile, mask, offset, masked, strip_sum, r0, first, last);
      } else {
        forward_rows_running_max(p, tile, mask, offset, masked, strip_max, strip_sum, r0, first, last);
      }
      if (sum_to) fold(p.safe, col_max, col_sum, strip_max, strip_sum, cols);
    }
  });

  for (int part = 0; sum_to && part < parts; ++part) {  // in fixed order
    const T* const col_max = p.scratch + part * room + 2 * cols;
    fold(p.safe, max_to, sum_to, col_max, col_max + cols, cols);
  }
}

template <class T>
void finish(const SimilarityLse<T>& p, const T* max, const T* sum, T* lse, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double shift = p.safe ? T(0) : finite_or_zero(max[i]);
    lse[i] = static_cast<T>(kLn2 * shift + std::log(static_cast<double>(sum[i])));
  }
}

template <class T>
bool weights(const SimilarityLse<T>& p, const T* g, const T* lse, T* weight, T* shift, int64_t count) {
  bool fits = true;
  for (int64_t i = 0; i < count; ++i) {
    const bool none = lse[i] == -infinity<T>();  // no pair: no gradient
    const T t = lse[i] * T(kLog2e);
    weight[i] = none ? T(0) : p.safe ? static_cast<T>(g[i] * std::exp2(-static_cast<double>(t))) : g[i];
    shift[i] = p.safe ? T(0) : none ? infinity<T>() : t;
    const T size = weight[i] < 0 ? -weight[i] : weight[i];
    fits = fits && (size - size == 0) && (size >= std::numeric_limits<T>::min() || g[i] == 0 || none);
  }
  return fits || !p.safe;
}

// SMALL: the safe range, and no t is -inf.
template <bool SMALL, class T>
inline void backward_row(const SimilarityLse<T>& p, T* __restrict s, const T* __restrict off, T weight, T shift,
                         const T* __restrict col_weight, const T* __restrict col_shift, int64_t cols) {
  const T factor = p.factor;
  if (!col_weight) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T t = s[j] * factor + off[j] - shift;
      s[j] = weight * (SMALL ? exp2_small(t) : exp2_any(t));
    }
  } else if (p.safe) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T t = s[j] * factor + off[j];
      s[j] = (weight + col_weight[j]) * (SMALL ? exp2_small(t) : exp2_any(t));
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T t = s[j] * factor + off[j];
      s[j] = weight * exp2_any(t - shift) + col_weight[j] * exp2_any(t - col_shift[j]);
    }
  }
}

template <class T>
void backward_tile(const SimilarityLse<T>& p, T* tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
  const Mask<T> mask(p, r0, c0, cols);
  const T* const col_weight = p.symmetric ? p.row_weight + c0 : p.col_weight ? p.col_weight + c0 : nullptr;
  const T* const col_shift = p.symmetric ? p.row_shift + c0 : p.col_shift ? p.col_shift + c0 : nullptr;
  const int parts = parts_for(rows, rows * cols, p.threads);
  const int64_t room = SimilarityLse<T>::scratch_size(cols);

  parallel_rows(rows, parts, [&](int part, int64_t begin, int64_t end) {
    T* const offset = p.scratch + part * room;
    T* const masked = offset + cols;
    T* __restrict const bias_sum = masked + cols;
    column_offsets(p, c0, cols, offset);
    for (int64_t j = 0; p.dbias && j < cols; ++j) bias_sum[j] = 0;
    for (int64_t i = begin; i < end; ++i) {
      T* const s = tile + i * cols;
      const T* const off = row_offset(mask, p.excluded_s, i, s, offset, masked);
      const auto row = p.safe && off == offset && !p.drops_columns ? backward_row<true, T> : backward_row<false, T>;
      row(p, s, off, p.row_weight[r0 + i], p.row_shift[r0 + i], col_weight, col_shift, cols);
      if (mask.touches(i)) mask.fill(i, s, T(0));  // 0, even where a weight is not finite
      if (!p.dbias) continue;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) bias_sum[j] += s[j];
    }
  });

  for (int part = 0; p.dbias && part < parts; ++part) {
    const T* const bias_sum = p.scratch + part * room + 2 * cols;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) p.dbias[c0 + j] += bias_sum[j];
  }
}

template <class T>
void exp2_all(const T* x, T* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = exp2_any(x[i]);
}

}  // namespace

namespace SSLFAST_ISA {

template <class T>
const SimilarityLseKernels<T>& similarity_lse() {
  static constexpr SimilarityLseKernels<T> kernels{prepare<T>, forward_tile<T>,  finish<T>,
                                                   weights<T>, backward_tile<T>, exp2_all<T>};
  return kernels;
}

template const SimilarityLseKernels<float>& similarity_lse<float>();
template const SimilarityLseKernels<double>& similarity_lse<double>();

}  // namespace SSLFAST_ISA
}  // namespace sslfast
