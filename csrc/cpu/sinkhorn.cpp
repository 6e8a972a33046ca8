// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
#include "sinkhorn.h"

#include <cmath>

#include "exp2.h"
#include "lanes.h"
#include "parallel.h"

namespace sslfast {
namespace {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr int64_t kBlock = 2048;  // classes whose terms add up in the working dtype; blocks add up in double
constexpr int64_t kColumns = 256, kRows = 256;  // a tile of columns' sums: its logits are read from memory once

template <class T, class W>
struct Terms {
  const Sinkhorn& p;
  const W* v = static_cast<const W*>(p.v);
  const W* u = static_cast<const W*>(p.u);
  W scale = static_cast<W>(p.scale);

  const T* row(int64_t i) const { return static_cast<const T*>(p.logits) + i * p.stride; }
  W shift(int64_t i) const { return u ? u[i] : W(0); }
  W at(const T* x, int64_t k, W shift) const {
    const W value = static_cast<W>(widen(x[k])) * scale;
    return (v ? value + v[k] : value) + shift;  // rounded as without a shift, so that a row's terms sum to 1
  }
};

// The number to subtract before exp: not an infinity, whose difference with itself is no number.
template <class W>
W finite(W top) {
  return top - top == 0 ? top : W(0);
}

template <class T, class W>
void rows(const Sinkhorn& p, W* out) {
  const Terms<T, W> t{p};
  const auto log2e = static_cast<W>(kLog2e);
  parallel_rows(p.rows, parts_for(p.rows, p.rows * p.classes, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* __restrict x = t.row(i);
      const W shift = t.shift(i);
      Lanes<W> tops(t.at(x, 0, shift));
      each_lane(0, p.classes, [&](int64_t k, int lane) {
        const W value = t.at(x, k, shift);
        tops.at[lane] = value > tops.at[lane] ? value : tops.at[lane];
      });
      const W base = finite(tops.greatest());
      double sum = 0;
      for (int64_t from = 0; from < p.classes; from += kBlock) {
        const int64_t to = from + kBlock < p.classes ? from + kBlock : p.classes;
        Lanes<W> part(0);
        each_lane(from, to,
                  [&](int64_t k, int lane) { part.at[lane] += exp2_any((t.at(x, k, shift) - base) * log2e); });
        sum += static_cast<double>(part.sum());
      }
      out[i] = static_cast<W>(static_cast<double>(base) + kLn2 * std::log2(sum));
    }
  });
}

template <class T, class W>
void columns(const Sinkhorn& p, W* out) {
  const Terms<T, W> t{p};
  const auto log2e = static_cast<W>(kLog2e);
  const int64_t blocks = (p.classes + kColumns - 1) / kColumns;
  parallel_rows(blocks, parts_for(blocks, p.rows * p.classes, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, n = first + kColumns < p.classes ? kColumns : p.classes - first;
      W top[kColumns], base[kColumns], part[kColumns];
      double sum[kColumns];
      for (int64_t k = 0; k < n; ++k) top[k] = -INFINITY, sum[k] = 0;
      for (int64_t from = 0; from < p.rows; from += kRows) {
        const int64_t to = from + kRows < p.rows ? from + kRows : p.rows;
        W old[kColumns];
        for (int64_t k = 0; k < n; ++k) old[k] = top[k], part[k] = 0;
        for (int64_t i = from; i < to; ++i) {
          const T* __restrict x = t.row(i);
          const W shift = t.shift(i);
#pragma omp simd
          for (int64_t k = 0; k < n; ++k) {
            const W value = t.at(x, first + k, shift);
            top[k] = value > top[k] ? value : top[k];
          }
        }
        for (int64_t k = 0; k < n; ++k) base[k] = finite(top[k]);
        for (int64_t i = from; i < to; ++i) {
          const T* __restrict x = t.row(i);
          const W shift = t.shift(i);
#pragma omp simd
          for (int64_t k = 0; k < n; ++k) part[k] += exp2_any((t.at(x, first + k, shift) - base[k]) * log2e);
        }
        for (int64_t k = 0; k < n; ++k) {
          const double fall = static_cast<double>(finite(old[k])) - static_cast<double>(base[k]);
          sum[k] = (sum[k] == 0 ? 0 : sum[k] * std::exp2(fall * kLog2e)) + static_cast<double>(part[k]);
        }
      }
      for (int64_t k = 0; k < n; ++k)
        out[first + k] = static_cast<W>(static_cast<double>(finite(top[k])) + kLn2 * std::log2(sum[k]));
    }
  });
}

template <class T, class W>
void fill(const Sinkhorn& p, W* out) {
  const Terms<T, W> t{p};
  const auto log2e = static_cast<W>(kLog2e);
  parallel_rows(p.rows, parts_for(p.rows, p.rows * p.classes, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* __restrict x = t.row(i);
      W* __restrict y = out + i * p.classes;
      const W shift = t.shift(i);
#pragma omp simd
      for (int64_t k = 0; k < p.classes; ++k) y[k] = exp2_any(t.at(x, k, shift) * log2e);
    }
  });
}

// f(a number of the logits' type, one of the working type)
template <class F>
void for_dtype(Float dtype, const F& f) {
  switch (dtype) {
    case Float::f32:
      return f(float{}, float{});
    case Float::bf16:
      return f(Bf16{}, float{});
    case Float::f16:
      return f(F16{}, float{});
    case Float::f64:
      return f(double{}, double{});
  }
}

}  // namespace

namespace SSLFAST_ISA {

void sinkhorn_rows(const Sinkhorn& p, void* out) {
  for_dtype(p.dtype, [&](auto t, auto w) { rows<decltype(t)>(p, static_cast<decltype(w)*>(out)); });
}

void sinkhorn_columns(const Sinkhorn& p, void* out) {
  for_dtype(p.dtype, [&](auto t, auto w) { columns<decltype(t)>(p, static_cast<decltype(w)*>(out)); });
}

void sinkhorn_fill(const Sinkhorn& p, void* out) {
  for_dtype(p.dtype, [&](auto t, auto w) { fill<decltype(t)>(p, static_cast<decltype(w)*>(out)); });
}

}  // namespace SSLFAST_ISA
}  // namespace sslfast
