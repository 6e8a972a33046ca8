// Masks of patches on the CPU, one image at a time.
#pragma once
#include <cstdint>

#include "../patch_mask.h"
#include "isa.h"

namespace sslfast {

// The stable order of each image's noise: its first `keep` patches are kept.
struct RandomPatchMask {
  int64_t batch, length, keep;
  const void* noise;     // [batch, length] float or double
  int64_t* ids_keep;     // [batch, keep]
  int64_t* ids_restore;  // [batch, length]: the place of each patch in that order
  float* mask;           // [batch, length]: 1 = removed
  int threads;
};

// Blocks until `counts` patches are masked, the last of them one by one in the order of the noise; or one block.
struct BlockPatchMask {
  int64_t batch, tries;
  BlockRule rule;
  const double* draws;    // [batch, tries, 4], see propose()
  const float* noise;     // [batch, height * width]
  const int64_t* counts;  // [batch], or null: one block of an area in the rule's range
  float* mask;            // [batch, height * width]
  int threads;
};

SSLFAST_PER_ISA(bool random_patch_mask(const RandomPatchMask&, bool is_double);
                bool block_patch_mask(const BlockPatchMask&);)

}  // namespace sslfast
