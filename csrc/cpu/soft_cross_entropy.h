// `soft_cross_entropy` on the CPU: views of images against the sum of their targets, one row of classes at a time.
#pragma once
#include <cstdint>

#include "../floats.h"
#include "isa.h"

namespace sslfast {

// Row (v, b) of the logits meets the targets t of the same image b, with skip all but t = v:
//   Q_vb = sum_t q_tb,  W_vb = sum_k Q_vbk,  loss_vb = W_vb log sum_k exp(scale s_vbk) - scale <Q_vb, s_vb>
// where q_tb is a row of `targets`, or with softmax that of target_scale * (row - center).
struct SoftCrossEntropy {
  int64_t views, targets, batch, classes;
  const void *logits, *target;                   // [views, batch, classes], [targets, batch, classes]
  int64_t logits_strides[2], target_strides[2];  // of views and images, in elements; classes are contiguous
  Float logits_dtype, target_dtype;
  const void* center;  // [classes] of the working dtype, or null
  double scale, target_scale;
  bool softmax, skip;
  void* state;  // [views, batch, 2]: the greatest logit (least for a negative scale) and log2 sum_k 2^(...) above it
  void* mass;   // [views, batch]: W
  void* target_state;  // [targets, batch, 2], with softmax
  void* room;          // [min(threads, rows), targets + 1, classes] of the working dtype
  int threads;
};

// loss [views, batch], and the states; all of the working dtype.
SSLFAST_PER_ISA(void soft_cross_entropy(const SoftCrossEntropy&, void* loss);)
// dlogits of the logits' dtype and strides (and perhaps their memory) = upstream_vb scale (W_vb softmax_vb - Q_vb).
// `classes` may be a slice of those that the states are of.
SSLFAST_PER_ISA(void soft_cross_entropy_backward(const SoftCrossEntropy&, const void* upstream, void* dlogits,
                                                 const int64_t dlogits_strides[2]);)

}  // namespace sslfast
