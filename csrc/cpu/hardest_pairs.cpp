// Compiled once per instruction set, as similarity_lse.cpp.
#include "hardest_pairs.h"

#include <cmath>

#include "lanes.h"
#include "parallel.h"

namespace sslfast {
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
      const int32_t group = p.groups[row];
      T far_score[kLanes], near_score[kLanes];
      int32_t far[kLanes], near[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        far_score[lane] = infinite, near_score[lane] = -infinite;
        far[lane] = near[lane] = -1;
      }
      each_lane(0, p.cols, [&](int64_t j, int lane) {
        const T score = s[j] + offset[j];
        const bool same = groups[j] == group;
        const bool farther = same && score < far_score[lane], nearer = !same && score > near_score[lane];
        far_score[lane] = farther ? score : far_score[lane];
        far[lane] = farther ? static_cast<int32_t>(j) : far[lane];
        near_score[lane] = nearer ? score : near_score[lane];
        near[lane] = nearer ? static_cast<int32_t>(j) : near[lane];
      });
      T least = infinite, most = -infinite;
      int32_t least_at = -1, most_at = -1;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool less = far_score[lane] < least || (far_score[lane] == least && far[lane] < least_at);
        const bool more = near_score[lane] > most || (near_score[lane] == most && near[lane] < most_at);
        if (less) least = far_score[lane], least_at = far[lane];
        if (more) most = near_score[lane], most_at = near[lane];
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
