// Steps of a view on float32 planes; compiled for each instruction set. Loops over pixels are plain functions: a
// lambda around them would keep them from being vectorised.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../floats.h"

namespace sslfast {
namespace {

constexpr float kRed = 0.299f, kGreen = 0.587f, kBlue = 0.114f;
#if defined(__AVX512F__)
constexpr int kWide = 16;  // floats of a vector
#elif defined(__AVX2__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kWide)));
typedef float Loose __attribute__((vector_size(4 * kWide), aligned(4), may_alias));  // wherever it lies

// out[x] = sum of taps weights[k] * rows[k][x]; four vectors at a time stay in registers.
inline void mix(const float* const* rows, const float* weights, int taps, int64_t n, float* out) {
  int64_t x = 0;
  for (; x + 4 * kWide <= n; x += 4 * kWide) {
    Vector a = {}, b = {}, c = {}, d = {};
    for (int k = 0; k < taps; ++k) {
      const Loose* row = reinterpret_cast<const Loose*>(rows[k] + x);
      const float w = weights[k];
      a += w * row[0], b += w * row[1], c += w * row[2], d += w * row[3];
    }
    Loose* to = reinterpret_cast<Loose*>(out + x);
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
  }
  for (; x + kWide <= n; x += kWide) {
    Vector a = {};
    for (int k = 0; k < taps; ++k) a += weights[k] * *reinterpret_cast<const Loose*>(rows[k] + x);
    *reinterpret_cast<Loose*>(out + x) = a;
  }
  for (; x < n; ++x) {
    float sum = 0;
    for (int k = 0; k < taps; ++k) sum += weights[k] * rows[k][x];
    out[x] = sum;
  }
}

// The sum of n products, n a multiple of kWide.
inline float dot(const float* x, const float* y, int64_t n) {
  Vector sum = {};
  for (int64_t k = 0; k < n; k += kWide) {
    sum += *reinterpret_cast<const Loose*>(x + k) * *reinterpret_cast<const Loose*>(y + k);
  }
  float total = 0;
  for (int i = 0; i < kWide; ++i) total += sum[i];
  return total;
}

// out[x] = sum of taps weights[k][x] * row[starts[x] + k]
inline void gather_row(const float* row, const int32_t* starts, const float* weights, int taps, int64_t n,
                       float* __restrict out) {
  if (taps == 2) {
#pragma omp simd
    for (int64_t x = 0; x < n; ++x) {
      const float* from = row + starts[x];
      out[x] = weights[x] * from[0] + weights[n + x] * from[1];
    }
    return;
  }
#pragma omp simd
  for (int64_t x = 0; x < n; ++x) out[x] = weights[x] * row[starts[x]];
  for (int k = 1; k < taps; ++k) {
#pragma omp simd
    for (int64_t x = 0; x < n; ++x) out[x] += weights[k * n + x] * row[starts[x] + k];
  }
}

inline float clip(float x) { return x < 0 ? 0.f : x > 1 ? 1.f : x; }

inline void clip_row(float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = clip(x[i]);
}

// n pixels of one channel, in [0, 1].
inline void widen_row(const uint8_t* from, int64_t stride, int64_t n, float* __restrict to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]) * (1 / 255.f);
  } else if (stride == 3) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[3 * i]) * (1 / 255.f);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * stride]) * (1 / 255.f);
  }
}

inline void add_row(const float* x, float weight, int64_t n, float* __restrict sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * x[i];
}

inline void gray_row(const float* r, const float* g, const float* b, int64_t n, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = kRed * r[i] + kGreen * g[i] + kBlue * b[i];
}

inline void drop_colours(float* __restrict r, float* __restrict g, float* __restrict b, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float y = kRed * r[i] + kGreen * g[i] + kBlue * b[i];
    r[i] = y, g[i] = y, b[i] = y;
  }
}

// x = clip(factor * x + shift): brightness, and contrast with shift = (1 - factor) * mean
inline void scale_plane(float* x, int64_t n, float factor, float shift) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = clip(factor * x[i] + shift);
}

inline double sum_row(const float* x, int64_t n) {
  float lane[kWide] = {};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
#pragma omp simd
    for (int k = 0; k < kWide; ++k) lane[k] += x[i + k];
  }
  double sum = 0;
  for (int k = 0; k < kWide; ++k) sum += lane[k];
  for (; i < n; ++i) sum += x[i];
  return sum;
}

inline void saturate(float* __restrict r, float* __restrict g, float* __restrict b, int64_t n, float factor) {
  const float rest = 1 - factor;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float y = rest * (kRed * r[i] + kGreen * g[i] + kBlue * b[i]);
    r[i] = clip(factor * r[i] + y), g[i] = clip(factor * g[i] + y), b[i] = clip(factor * b[i] + y);
  }
}

// One channel of a colour: k sixths of a turn from where the channel is greatest.
inline float channel(float value, float chroma, float k) {
  k = k < 0 ? k + 6 : k;
  k = k >= 6 ? k - 6 : k;
  k = k >= 6 ? k - 6 : k;
  const float m = k < 4 - k ? k : 4 - k;
  return value - chroma * clip(m);
}

// turns in [-0.5, 0.5]
inline void turn_hue(float* __restrict r, float* __restrict g, float* __restrict b, int64_t n, float turns) {
  const float by = 6 * turns;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = r[i], y = g[i], z = b[i];
    const float xy = x > y ? x : y, low = x < y ? x : y;
    const float value = xy > z ? xy : z, chroma = value - (low < z ? low : z);
    const float inverse = chroma > 0 ? 1 / chroma : 0;
    const float first = (y - z) * inverse, second = (z - x) * inverse + 2, third = (x - y) * inverse + 4;
    const float sixth = (value == x ? first : value == y ? second : third) + by;
    r[i] = channel(value, chroma, sixth + 5);
    g[i] = channel(value, chroma, sixth + 3);
    b[i] = channel(value, chroma, sixth + 1);
  }
}

// Bilinear, 0 outside the plane; matrix: places in the view from the centre -> places in the plane from its centre.
inline void warp_plane(const float* x, int64_t height, int64_t width, const float* matrix, float* out) {
  const float cy = static_cast<float>(height - 1) / 2, cx = static_cast<float>(width - 1) / 2;
  const float h = static_cast<float>(height), w = static_cast<float>(width);
  for (int64_t i = 0; i < height; ++i) {
    const float y = static_cast<float>(i) - cy;
    for (int64_t j = 0; j < width; ++j) {
      const float across = static_cast<float>(j) - cx;
      float column = matrix[0] * across + matrix[1] * y + matrix[2] + cx;
      float row = matrix[3] * across + matrix[4] * y + matrix[5] + cy;
      column = !(column > -2) ? -2 : column > w ? w : column;
      row = !(row > -2) ? -2 : row > h ? h : row;
      const float left = std::floor(column), top = std::floor(row);
      const float right_share = column - left, low_share = row - top;
      const int64_t l = static_cast<int64_t>(left), t = static_cast<int64_t>(top);
      float sum = 0;
      for (int64_t down = 0; down < 2; ++down) {
        for (int64_t right = 0; right < 2; ++right) {
          const int64_t a = t + down, b = l + right;
          if (a < 0 || a >= height || b < 0 || b >= width) continue;
          sum += (down ? low_share : 1 - low_share) * (right ? right_share : 1 - right_share) * x[a * width + b];
        }
      }
      out[i * width + j] = sum;
    }
  }
}

// Where pixel i of n is found, reflected at the ends as often as it takes.
inline int64_t reflected(int64_t i, int64_t n) {
  if (n == 1) return 0;
  const int64_t period = 2 * (n - 1);
  i = (i % period + period) % period;
  return i < period - i ? i : period - i;
}

// out = scale * (x, or 1 - x from the threshold on) + shift; x may be outside [0, 1] by a rounding
template <class T>
inline void finish_row(const float* x, int64_t n, float threshold, float scale, float shift, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float y = clip(x[i]), z = (y >= threshold ? 1 - y : y) * scale + shift;
    out[i] = Narrow<T>::from(z);
  }
}

template <>
inline void finish_row<float>(const float* x, int64_t n, float threshold, float scale, float shift, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float y = clip(x[i]);
    out[i] = (y >= threshold ? 1 - y : y) * scale + shift;
  }
}

}  // namespace
}  // namespace sslfast
