// For a tile of products of rows, the hardest pairs of each row: the column of its own group with the smallest score
// and the column of another group with the largest, score_ij = tile_ij + offset_j.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sslfast {

template <class T>
struct HardestPairs {
  int64_t rows, cols, r0, c0;  // of the tile, and where it begins
  int threads;
  T* tile;                    // [rows, cols]; a row's own column is overwritten
  const T* offset;            // [n]
  const int32_t* groups;      // [n]
  T *far_score, *near_score;  // [n] the best scores so far, and their columns
  int32_t *far, *near;
};

SSLFAST_PER_ISA(template <class T> void hardest_pairs(const HardestPairs<T>& p);)

}  // namespace sslfast
