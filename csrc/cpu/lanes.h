// Sums and maxima over a row, with a partial result per lane: an ordinary loop over lanes vectorises in every context,
// whereas a reduction's clause is lost where the compiler clones the loop around it.
#pragma once
#include <cstdint>

namespace sslfast {
namespace {

constexpr int kLanes = 32;

// Adds f(k) of begin <= k < end to lanes: f(k, lane) with lane = (k - begin) % kLanes, in order of k.
template <class F>
inline void each_lane(int64_t begin, int64_t end, const F& f) {
  int64_t k = begin;
  for (; k + kLanes <= end; k += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) f(k + lane, lane);
  }
  for (int lane = 0; k < end; ++k, ++lane) f(k, lane);
}

template <class W>
struct Lanes {
  W at[kLanes];

  explicit Lanes(W start) {
    for (W& x : at) x = start;
  }

  W sum() const {
    W part[kLanes];
    for (int i = 0; i < kLanes; ++i) part[i] = at[i];
    for (int n = kLanes / 2; n; n /= 2)
      for (int i = 0; i < n; ++i) part[i] += part[i + n];
    return part[0];
  }

  // Of the lanes, a NaN left out where it is not the first.
  W greatest() const {
    W top = at[0];
    for (W x : at) top = x > top ? x : top;
    return top;
  }
};

}  // namespace
}  // namespace sslfast
