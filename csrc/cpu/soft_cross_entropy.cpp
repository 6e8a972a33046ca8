// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
#include "soft_cross_entropy.h"

#include <cmath>

#include "exp2.h"
#include "lanes.h"
#include "parallel.h"

namespace sslfast {
namespace {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr int64_t kBlock = 2048;  // classes whose terms add up in the working dtype; blocks add up in double

// Of a row x - center: the value from which all others fall, in the direction of `rate` (2 to the power of
// rate * value is its weight), and log2 sum_k 2^(rate (value_k - top)).
template <class W>
struct State {
  W top, log2_sum;
};

template <class T, class W>
inline W value(const T* x, const W* center, int64_t k) {
  const W v = static_cast<W>(widen(x[k]));
  return center ? v - center[k] : v;
}

// The value of greatest weight.
template <class T, class W>
W top_of(const T* __restrict x, const W* __restrict center, bool least, int64_t n) {
  const W sign = least ? W(-1) : W(1);
  Lanes<W> tops(sign * value(x, center, 0));
  each_lane(0, n, [&](int64_t k, int lane) {
    const W v = sign * value(x, center, k);
    tops.at[lane] = v > tops.at[lane] ? v : tops.at[lane];
  });
  return sign * tops.greatest();
}

template <class T, class W>
State<W> state_of(const T* __restrict x, const W* __restrict center, W rate, int64_t n) {
  const W top = top_of(x, center, rate < 0, n);
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Lanes<W> part(0);
    each_lane(begin, end, [&](int64_t k, int lane) { part.at[lane] += exp2_any((value(x, center, k) - top) * rate); });
    sum += static_cast<double>(part.sum());
  }
  return {top, static_cast<W>(std::log2(sum))};
}

// State and terms of one row against Q: `weighted` = sum_k Q_k (top - x_k) rate, none of whose terms is negative.
template <class T, class W>
struct Row {
  State<W> state;
  double mass, weighted;

  Row(const T* __restrict x, const W* __restrict q, W rate, int64_t n) : mass(0), weighted(0) {
    const W top = top_of<T, W>(x, nullptr, rate < 0, n);
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = begin + kBlock < n ? begin + kBlock : n;
      Lanes<W> part(0), inner(0), total(0);
      each_lane(begin, end, [&](int64_t k, int lane) {
        const W power = (static_cast<W>(widen(x[k])) - top) * rate;
        part.at[lane] += exp2_any(power);
        inner.at[lane] += q[k] * power;
        total.at[lane] += q[k];
      });
      sum += static_cast<double>(part.sum()), weighted -= static_cast<double>(inner.sum());
      mass += static_cast<double>(total.sum());
    }
    state = {top, static_cast<W>(std::log2(sum))};
  }

  double loss() const { return kLn2 * (mass * static_cast<double>(state.log2_sum) + weighted); }
};

// The sums of targets of one image, which its views share.
template <class U, class W>
class Targets {
 public:
  Targets(const SoftCrossEntropy& p, int part)
      : p_(p), room_(static_cast<W*>(p.room) + part * (p.targets + 1) * p.classes) {}

  // Q of view v of image b; valid until the next call.
  const W* of(int64_t v, int64_t b) {
    if (b != image_) load(b), image_ = b;
    const bool own = p_.skip && v < p_.targets;
    if (p_.targets - own == 1) return row(own ? 1 - v : 0);
    if (own || !has_all_) sum(own ? v : -1), has_all_ = !own;
    return row(p_.targets);
  }

 private:
  W* row(int64_t t) const { return room_ + t * p_.classes; }

  void load(int64_t b) {
    const auto rate = static_cast<W>(p_.target_scale * kLog2e);
    const W* const center = static_cast<const W*>(p_.center);
    for (int64_t t = 0; t < p_.targets; ++t) {
      const U* __restrict x = static_cast<const U*>(p_.target) + t * p_.target_strides[0] + b * p_.target_strides[1];
      W* __restrict q = row(t);
      if (p_.softmax) {
        const State<W> s = static_cast<const State<W>*>(p_.target_state)[t * p_.batch + b];
#pragma omp simd
        for (int64_t k = 0; k < p_.classes; ++k) q[k] = exp2_any((value(x, center, k) - s.top) * rate - s.log2_sum);
      } else {
#pragma omp simd
        for (int64_t k = 0; k < p_.classes; ++k) q[k] = static_cast<W>(widen(x[k]));
      }
    }
    has_all_ = false;
  }

  void sum(int64_t without) {
    W* __restrict to = row(p_.targets);
    for (int64_t k = 0; k < p_.classes; ++k) to[k] = 0;
    for (int64_t t = 0; t < p_.targets; ++t) {
      if (t == without) continue;
      const W* __restrict q = row(t);
#pragma omp simd
      for (int64_t k = 0; k < p_.classes; ++k) to[k] += q[k];
    }
  }

  const SoftCrossEntropy& p_;
  W* const room_;
  int64_t image_ = -1;
  bool has_all_ = false;
};

// f(v, b, logits, Q) for each row of logits.
template <class T, class U, class W, class F>
void each_view(const SoftCrossEntropy& p, const F& f) {
  const int64_t rows = p.views * p.batch;
  parallel_rows(rows, parts_for(rows, rows * p.classes, p.threads), [&](int part, int64_t begin, int64_t end) {
    Targets<U, W> targets(p, part);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / p.views, v = at % p.views;
      const T* const x = static_cast<const T*>(p.logits) + v * p.logits_strides[0] + b * p.logits_strides[1];
      f(v, b, x, targets.of(v, b));
    }
  });
}

template <class U, class W>
void target_states(const SoftCrossEntropy& p) {
  const auto rate = static_cast<W>(p.target_scale * kLog2e);
  const int64_t rows = p.targets * p.batch;
  parallel_rows(rows, parts_for(rows, rows * p.classes, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = at / p.batch, b = at % p.batch;
      const U* const x = static_cast<const U*>(p.target) + t * p.target_strides[0] + b * p.target_strides[1];
      static_cast<State<W>*>(p.target_state)[at] = state_of(x, static_cast<const W*>(p.center), rate, p.classes);
    }
  });
}

template <class T, class U, class W>
void forward(const SoftCrossEntropy& p, void* loss) {
  if (p.softmax) target_states<U, W>(p);
  const auto rate = static_cast<W>(p.scale * kLog2e);
  each_view<T, U, W>(p, [&](int64_t v, int64_t b, const T* x, const W* q) {
    const Row<T, W> row(x, q, rate, p.classes);
    const int64_t at = v * p.batch + b;
    static_cast<State<W>*>(p.state)[at] = row.state;
    static_cast<W*>(p.mass)[at] = static_cast<W>(row.mass);
    static_cast<W*>(loss)[at] = static_cast<W>(row.loss());
  });
}

template <class T, class U, class W>
void backward(const SoftCrossEntropy& p, const W* upstream, T* dlogits, const int64_t* strides) {
  const auto rate = static_cast<W>(p.scale * kLog2e);
  each_view<T, U, W>(p, [&](int64_t v, int64_t b, const T* x, const W* q) {
    const int64_t at = v * p.batch + b;
    T* const dx = dlogits + v * strides[0] + b * strides[1];
    const State<W> s = static_cast<const State<W>*>(p.state)[at];
    const W mass = static_cast<const W*>(p.mass)[at];
    const W gain = upstream[at] * static_cast<W>(p.scale);
#pragma omp simd
    for (int64_t k = 0; k < p.classes; ++k) {
      const W share = exp2_any((static_cast<W>(widen(x[k])) - s.top) * rate - s.log2_sum);
      dx[k] = Narrow<T>::from(gain * (mass * share - q[k]));
    }
  });
}

// f(a number of the logits' type, one of the targets', one of the working type)
template <class F>
void for_dtypes(const SoftCrossEntropy& p, const F& f) {
  const auto with = [&](auto logits, auto work) {
    switch (p.target_dtype) {
      case Float::f32:
        return f(logits, float{}, work);
      case Float::bf16:
        return f(logits, Bf16{}, work);
      case Float::f16:
        return f(logits, F16{}, work);
      case Float::f64:
        return f(logits, double{}, work);
    }
  };
  switch (p.logits_dtype) {
    case Float::f32:
      return with(float{}, float{});
    case Float::bf16:
      return with(Bf16{}, float{});
    case Float::f16:
      return with(F16{}, float{});
    case Float::f64:
      return with(double{}, double{});
  }
}

}  // namespace

namespace SSLFAST_ISA {

void soft_cross_entropy(const SoftCrossEntropy& p, void* loss) {
  for_dtypes(p, [&](auto t, auto u, auto w) { forward<decltype(t), decltype(u), decltype(w)>(p, loss); });
}

void soft_cross_entropy_backward(const SoftCrossEntropy& p, const void* upstream, void* dlogits,
                                 const int64_t strides[2]) {
  for_dtypes(p, [&](auto t, auto u, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    backward<T, decltype(u), W>(p, static_cast<const W*>(upstream), static_cast<T*>(dlogits), strides);
  });
}

}  // namespace SSLFAST_ISA
}  // namespace sslfast
