// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
#include "masked_patch_mse.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "parallel.h"

namespace sslfast {
namespace {

constexpr double kEps = 1e-6;  // of norm_pix

inline float widen(uint8_t x) { return static_cast<float>(x); }

// A row of a patch: n pixels of each channel, channels next to each other.
template <int C, class I, class W>
inline void interleave(const I* __restrict from, int64_t channel_stride, const W* __restrict scale,
                       const W* __restrict shift, W* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t x = 0; x < n; ++x) {
    for (int c = 0; c < C; ++c)
      to[C * x + c] = static_cast<W>(widen(from[c * channel_stride + x])) * scale[c] + shift[c];
  }
}

// The target of one patch in (y, x, channel) order.
template <class I, class W>
void load(const MaskedPatches& p, int64_t b, int64_t l, const W* scale, const W* shift, W* to) {
  const int64_t across = p.width / p.patch, n = p.patch, channels = p.channels;
  const int64_t sc = p.strides[1], sh = p.strides[2], sw = p.strides[3];
  const I* corner = static_cast<const I*>(p.images) + b * p.strides[0] + l / across * n * sh + l % across * n * sw;
  for (int64_t y = 0; y < n; ++y, to += n * channels) {
    const I* row = corner + y * sh;
    if (sw == 1 && channels == 3) {
      interleave<3>(row, sc, scale, shift, to, n);
    } else if (sw == 1 && channels == 1) {
      interleave<1>(row, sc, scale, shift, to, n);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t x = 0; x < n; ++x)
          to[x * channels + c] = static_cast<W>(widen(row[c * sc + x * sw])) * scale[c] + shift[c];
      }
    }
  }
}

template <class W>
using Loader = void (*)(const MaskedPatches&, int64_t, int64_t, const W*, const W*, W*);

template <class W>
Loader<W> loader(const MaskedPatches& p) {
  if (p.bytes) return load<uint8_t, W>;
  switch (p.image_dtype) {
    case Float::bf16:
      return load<Bf16, W>;
    case Float::f16:
      return load<F16, W>;
    case Float::f64:
      return load<double, W>;
    default:
      return load<float, W>;
  }
}

// t <- (t - mean) / sqrt(var + eps), var over n - 1
template <class W>
void standardize(W* __restrict t, int64_t n) {
  W sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += t[i];
  const W mean = sum / static_cast<W>(n);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (t[i] - mean) * (t[i] - mean);
  const W std = std::sqrt(squares / static_cast<W>(n - 1) + static_cast<W>(kEps));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) t[i] = (t[i] - mean) / std;
}

// The sum of the errors of one patch; dpred = gain * derivative of the error.
template <bool kAbsolute, class T, class W>
W compare(const T* __restrict pred, const W* __restrict target, T* __restrict dpred, W gain, int64_t n) {
  W sum = 0;
  if (!dpred) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const W d = static_cast<W>(widen(pred[i])) - target[i];
      sum += kAbsolute ? std::fabs(d) : d * d;
    }
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const W d = static_cast<W>(widen(pred[i])) - target[i];
    sum += kAbsolute ? std::fabs(d) : d * d;
    const W sign = d > 0 ? W(1) : d < 0 ? W(-1) : d;  // a NaN stays
    dpred[i] = Narrow<T>::from(kAbsolute ? gain * sign : 2 * gain * d);
  }
  return sum;
}

template <class T, class W>
double run(const MaskedPatches& p) {
  const int64_t patches = p.height / p.patch * (p.width / p.patch), all = p.batch * patches;
  const int64_t n = p.patch * p.patch * p.channels;
  const auto* weight = static_cast<const W*>(p.weight);
  const auto* pred = static_cast<const T*>(p.pred);
  auto* dpred = static_cast<T*>(p.dpred);
  const Loader<W> load_patch = loader<W>(p);
  double total = 0;
  for (int64_t i = 0; i < all; ++i) total += static_cast<double>(weight[i]);
  const double each = total == 0 ? 0 : 1 / (total * static_cast<double>(n));

  const int parts = parts_for(all, all * n, p.threads);
  W* const room = static_cast<W*>(std::malloc(static_cast<size_t>(parts * n + 2 * p.channels + 1) * sizeof(W)));
  if (!room) return NAN;
  W *const scale = room + parts * n, *const shift = scale + p.channels;
  for (int64_t c = 0; c < p.channels; ++c) scale[c] = static_cast<W>(p.scale[c]), shift[c] = static_cast<W>(p.shift[c]);
  if (dpred) expect_writes(dpred, all * n * static_cast<int64_t>(sizeof(T)));
  parallel_rows(all, parts, [&](int part, int64_t begin, int64_t end) {
    W* const target = room + part * n;
    double sum = 0;
    for (int64_t at = begin; at < end; ++at) {
      const W w = weight[at];
      T* const gradient = dpred ? dpred + at * n : nullptr;
      if (w == 0) {
        if (gradient) std::memset(gradient, 0, static_cast<size_t>(n) * sizeof(T));
        continue;
      }
      const int64_t b = at / patches, l = at % patches;
      load_patch(p, b, l, scale, shift, target);
      if (p.norm_pix) standardize(target, n);
      const T* const row = pred + b * p.pred_batch_stride + l * p.pred_row_stride;
      const W gain = static_cast<W>(static_cast<double>(w) * each * p.upstream);
      const W error =
          p.absolute ? compare<true>(row, target, gradient, gain, n) : compare<false>(row, target, gradient, gain, n);
      sum += static_cast<double>(w) * static_cast<double>(error);
    }
    p.sums[part] = sum;
  });
  std::free(room);
  double sum = 0;
  for (int part = 0; part < parts; ++part) sum += p.sums[part];
  p.sums[p.threads] = total;
  return total == 0 ? 0 : sum * each;
}

}  // namespace

namespace SSLFAST_ISA {

double masked_patch_mse(const MaskedPatches& p, Float pred) {
  switch (pred) {
    case Float::f32:
      return run<float, float>(p);
    case Float::bf16:
      return run<Bf16, float>(p);
    case Float::f16:
      return run<F16, float>(p);
    case Float::f64:
      return run<double, double>(p);
  }
  return NAN;
}

}  // namespace SSLFAST_ISA
}  // namespace sslfast
