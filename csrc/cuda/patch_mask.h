// Masks of patches on NVIDIA GPUs: one block of threads per image. Both run on `stream` (a cudaStream_t) of the current
// device and return null, or what CUDA says went wrong.
#pragma once
#include <cstdint>

#include "../patch_mask.h"

namespace sslfast {

constexpr int64_t kLongestSort = 4096;  // patches of an image that a block of threads sorts, as MASK_SORT in tuning.py

// given [batch, length]: float noise, or (is_order) int64 patches in its order; the rest as in cpu/patch_mask.h.
const char* random_patch_mask_cuda(int64_t batch, int64_t length, int64_t keep, const void* given, bool is_order,
                                   int64_t* ids_keep, int64_t* ids_restore, float* mask, void* stream);

const char* block_patch_mask_cuda(int64_t batch, int64_t tries, const BlockRule& rule, const double* draws,
                                  const float* noise, const int64_t* counts, float* mask, void* stream);

}  // namespace sslfast
