// The element of `ema_update_`, for CPU and GPU alike: t <- m t + (1 - m) s, in float32, or in float64 where either is.
#pragma once
#include <cstdint>

#include "floats.h"

namespace sslfast {

// What the kernels walk: one row per tensor, or per piece of one.
struct Segment {
  int64_t target, source;  // addresses
  int64_t count;           // elements
};

// A momentum as both factors; 1 - m is taken in double, since m is near 1.
template <class W>
struct Momentum {
  W keep, take;
  SSLFAST_HD explicit Momentum(double m) : keep(static_cast<W>(m)), take(static_cast<W>(1 - m)) {}
};

namespace {  // each translation unit has its own copy

// float64 where either side is.
template <class T, class S>
struct WorkOf {
  using type = float;
};
template <class S>
struct WorkOf<double, S> {
  using type = double;
};
template <class T>
struct WorkOf<T, double> {
  using type = double;
};
template <>
struct WorkOf<double, double> {
  using type = double;
};

// Exact at both ends, for finite numbers: t for m = 1, s for m = 0. `take` is the same for all elements: no branch is
// left in a loop.
template <class W, class T, class S>
SSLFAST_HD T ema(T target, S source, Momentum<W> m) {
  const W t = static_cast<W>(widen(target)), s = static_cast<W>(widen(source)), step = s - t;
  return Narrow<T>::from(m.take < W(0.5) ? t + m.take * step : s - m.keep * step);
}

}  // namespace
}  // namespace sslfast
