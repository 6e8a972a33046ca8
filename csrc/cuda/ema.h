// `ema_update_` on NVIDIA GPUs: one launch for all tensors of one pair of dtypes.
#pragma once
#include <cstdint>

#include "../ema.h"

namespace sslfast {

// Runs on `stream` (a cudaStream_t) of the current device. The momentum is the number, or, where momentum_at is not
// null, what that device address holds (a double, or a float where momentum_is_f32) when the kernel runs. Returns
// null, or what CUDA says went wrong.
const char* ema_update_cuda(const Segment* segments, int64_t count, Float target, Float source, double momentum,
                            const void* momentum_at, bool momentum_is_f32, void* stream);

}  // namespace sslfast
