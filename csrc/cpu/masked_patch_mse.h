// `masked_patch_mse` on the CPU: target, error and gradient of one patch at a time.
#pragma once
#include <cstdint>

#include "../floats.h"
#include "isa.h"

namespace sslfast {

struct MaskedPatches {
  int64_t batch, channels, height, width, patch;
  const void* images;
  int64_t strides[4];           // elements
  bool bytes;                   // images are uint8
  Float image_dtype;            // otherwise
  const double *scale, *shift;  // [channels]: a pixel's value is scale * pixel + shift
  const void* pred;             // [batch, patches, patch * patch * channels], in (y, x, channel) order
  int64_t pred_batch_stride, pred_row_stride;
  const void* weight;       // [batch, patches] of the working dtype: 1 = masked
  bool norm_pix, absolute;  // absolute: the error is |d| instead of d^2
  void* dpred;              // contiguous, of pred's dtype, or null
  double upstream;          // factor of dpred
  double* sums;             // [threads + 1]: room; the last becomes the weights' sum
  int threads;
};

// Returns the loss; NaN where memory runs out.
SSLFAST_PER_ISA(double masked_patch_mse(const MaskedPatches&, Float pred);)

}  // namespace sslfast
