// Compiled once per instruction set, as similarity_lse.cpp.
#include "hardest_pairs.h"

#include <cmath>

#include "lanes.h"
#include "parallel.h"

namespace sslfast {
namespace {

// The best of each lane of a row: columns k with k % kLanes = lane. Not a lambda: a loop around one is not vectorised.
template <class T>
struct Best {
  T far_score[kLanes], near_score[kLanes];
  int32_t far[kLanes], near[kLanes];
};

template <class T>
inline void scan(const T* __restrict s, const T* __restrict offset, const int32_t* __restrict groups, int32_t group,
                 T infinite, int32_t first, int lanes, Best<T>& __restrict best) {
#pragma omp simd
  for (int lane = 0; lane < lanes; ++lane) {
    const T score = s[first + lane] + offset[first + lane];
    const bool same = groups[first + lane] == group;
    const T own = same ? score : infinite, other = same ? -infinite : score;
    best.far[lane] = own < best.far_score[lane] ? first + lane : best.far[lane];
    best.far_score[lane] = own < best.far_score[lane] ? own : best.far_score[lane];
    best.near[lane] = other > best.near_score[lane] ? first + lane : best.near[lane];
    best.near_score[lane] = other > best.near_score[lane] ? other : best.near_score[lane];
  }
}

template <class T>
void scan_row(const T* s, const T* offset, const int32_t* groups, int32_t group, T infinite, int32_t cols,
              Best<T>& best) {
  for (int lane = 0; lane < kLanes; ++lane) {
    best.far_score[lane] = infinite, best.near_score[lane] = -infinite;
    best.far[lane] = best.near[lane] = -1;
  }
  int32_t first = 0;
  for (; first + kLanes <= cols; first += kLanes) scan(s, offset, groups, group, infinite, first, kLanes, best);
  scan(s, offset, groups, group, infinite, first, cols - first, best);
}

}  // namespace

namespace SSLFAST_ISA {

// Strictly better scores win, so of equal ones the first column does, whatever the tiles and threads.
template <class T>
void hardest_pairs(const HardestPairs<T>& p) {
  const int parts = parts_for(p.rows, p.rows * p.cols, p.threads);
  parallel_rows(p.rows, parts, [&](int, int64_t begin, int64_t end) {
    const T* const offset = p.offset + p.c0;
    const int32_t* const groups = p.groups + p.c0;
    const T infinite = static_cast<T>(INFINITY);
    for (int64_t i = begin; i < end; ++i) {
      T* const s = p.tile + i * p.cols;
      const int64_t row = p.r0 + i, own = row - p.c0;
      if (own >= 0 && own < p.cols) s[own] = infinite;  // its group's smallest score is never its own
      Best<T> best;
      scan_row(s, offset, groups, p.groups[row], infinite, static_cast<int32_t>(p.cols), best);
      T least = infinite, most = -infinite;
      int32_t least_at = -1, most_at = -1;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool less = best.far_score[lane] < least || (best.far_score[lane] == least && best.far[lane] < least_at);
        const bool more = best.near_score[lane] > most || (best.near_score[lane] == most && best.near[lane] < most_at);
        if (less) least = best.far_score[lane], least_at = best.far[lane];
        if (more) most = best.near_score[lane], most_at = best.near[lane];
      }
      if (least < p.far_score[row]) p.far_score[row] = least, p.far[row] = static_cast<int32_t>(p.c0) + least_at;
      if (most > p.near_score[row]) p.near_score[row] = most, p.near[row] = static_cast<int32_t>(p.c0) + most_at;
    }
  });
}

template void hardest_pairs<float>(const HardestPairs<float>&);
template void hardest_pairs<double>(const HardestPairs<double>&);

}  // namespace SSLFAST_ISA
}  // namespace sslfast
