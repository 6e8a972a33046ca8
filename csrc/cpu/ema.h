// `ema_update_` on the CPU: one pass over all tensors of one pair of dtypes, cut evenly between the threads.
#pragma once
#include <cstdint>

#include "../ema.h"
#include "isa.h"

namespace sslfast {

struct Ema {
  const Segment* segments;
  int64_t count;
  double momentum;
  int threads;
};

SSLFAST_PER_ISA(void ema_update(const Ema&, Float target, Float source);)

}  // namespace sslfast
