// Random views of uint8 images; sslfast/ops/augment_views.py has the definition of each step.
#pragma once
#include <cstdint>

#include "../floats.h"
#include "isa.h"

namespace sslfast {

// Bits of ViewShape::steps.
enum ViewStep { kBicubic = 1, kJitter = 2, kGray = 4, kGrayFirst = 8, kBlur = 16, kSolarize = 32, kAffine = 64 };

constexpr int64_t kViewParams = 19;  // numbers of a view that were drawn

struct ViewShape {
  int64_t height, width;
  int channels, steps, radius;
  float scale[3], shift[3];
  void* out;  // [batch, channels, height, width]
};

struct AugmentViews {
  int64_t batch;
  const uint8_t* data;
  const int64_t* offsets;  // [batch]
  const int64_t* sizes;    // [batch, 2]: height, width
  int channels;
  int64_t channel_stride, row_stride, column_stride;  // row_stride -1: rows follow each other
  const float* params;                                // [views, batch, kViewParams]
  const ViewShape* shapes;                            // [views]
  int64_t views;
  Float dtype;
  int threads;
};

// False if there is no memory left, or no kernel for the dtype.
SSLFAST_PER_ISA(bool augment_views(const AugmentViews& p);)

}  // namespace sslfast
