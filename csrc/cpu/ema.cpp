// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
#include "ema.h"

#include "parallel.h"

namespace sslfast {
namespace {

template <class T, class S>
void piece(const Segment& segment, int64_t begin, int64_t end, double momentum) {
  using W = typename WorkOf<T, S>::type;
  const Momentum<W> m(momentum);
  T* __restrict t = reinterpret_cast<T*>(segment.target);
  const S* __restrict s = reinterpret_cast<const S*>(segment.source);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) t[i] = ema(t[i], s[i], m);
}

template <class T, class S>
void update(const Ema& p) {
  int64_t total = 0;
  for (int64_t k = 0; k < p.count; ++k) total += p.segments[k].count;
  parallel_rows(total, parts_for(total, total, p.threads), [&](int, int64_t begin, int64_t end) {
    int64_t first = 0;  // of the segment, counted through all of them
    for (int64_t k = 0; k < p.count && first < end; ++k) {
      const int64_t past = first + p.segments[k].count;
      const int64_t from = begin > first ? begin : first, to = end < past ? end : past;
      if (from < to) piece<T, S>(p.segments[k], from - first, to - first, p.momentum);
      first = past;
    }
  });
}

template <class T>
void from(const Ema& p, Float source) {
  switch (source) {
    case Float::f32:
      return update<T, float>(p);
    case Float::bf16:
      return update<T, Bf16>(p);
    case Float::f16:
      return update<T, F16>(p);
    case Float::f64:
      return update<T, double>(p);
  }
}

}  // namespace

namespace SSLFAST_ISA {

void ema_update(const Ema& p, Float target, Float source) {
  switch (target) {
    case Float::f32:
      return from<float>(p, source);
    case Float::bf16:
      return from<Bf16>(p, source);
    case Float::f16:
      return from<F16>(p, source);
    case Float::f64:
      return from<double>(p, source);
  }
}

}  // namespace SSLFAST_ISA
}  // namespace sslfast
