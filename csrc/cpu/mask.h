// What the epilogues of a tile of similarities share: the pairs that ids mark, and the offsets of columns.
#pragma once
#include <cmath>
#include <cstdint>

#include "similarity_lse.h"

namespace sslfast {
namespace {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class T>
inline T infinity() {
  return static_cast<T>(INFINITY);
}

template <class T>
inline T finite_or_zero(T x) {
  return x - x == 0 ? x : T(0);
}

// Which pairs of a tile are left out. Most tiles of a large problem hold no such pair, which two ranges of ids show.
template <class T>
struct Mask {
  const int64_t* a_ids;  // the tile's own rows and columns, or null
  const int64_t* b_ids;
  int64_t lowest = 0, highest = -1;  // range of b_ids
  int64_t diagonal;                  // column of row 0's twin, for self-similarity
  int64_t cols;
  bool same, self;

  Mask(const SimilarityLse<T>& p, int64_t r0, int64_t c0, int64_t cols_)
      : a_ids(p.a_ids ? p.a_ids + r0 : nullptr),
        b_ids(p.b_ids ? p.b_ids + c0 : nullptr),
        diagonal(r0 - c0),
        cols(cols_),
        same(p.same),
        self(p.self) {
    if (!b_ids) return;
    lowest = highest = b_ids[0];
    for (int64_t j = 1; j < cols; ++j) {
      lowest = b_ids[j] < lowest ? b_ids[j] : lowest;
      highest = b_ids[j] > highest ? b_ids[j] : highest;
    }
  }

  bool touches(int64_t i) const {
    const bool twin = self && i + diagonal >= 0 && i + diagonal < cols;
    const bool may_be_equal = a_ids && a_ids[i] >= lowest && a_ids[i] <= highest;
    return twin || may_be_equal || (a_ids && same);
  }

  // value[j] = left_out for each excluded pair of row i.
  void fill(int64_t i, T* value, T left_out) const {
    if (a_ids) {
      const int64_t id = a_ids[i];
      if (same) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) value[j] = b_ids[j] == id ? value[j] : left_out;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) value[j] = b_ids[j] == id ? left_out : value[j];
      }
    }
    if (self && i + diagonal >= 0 && i + diagonal < cols) value[i + diagonal] = left_out;
  }
};

template <class T>
inline void column_offsets(const SimilarityLse<T>& p, int64_t c0, int64_t cols, T* offset) {
  for (int64_t j = 0; j < cols; ++j) offset[j] = p.offset + (p.bias ? p.bias[c0 + j] * T(kLog2e) : T(0));
}

}  // namespace
}  // namespace sslfast
