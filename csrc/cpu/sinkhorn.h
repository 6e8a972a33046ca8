// One pass of Sinkhorn's balancing over logits on the CPU; the scaled matrix is never stored.
#pragma once
#include <cstdint>

#include "../floats.h"
#include "isa.h"

namespace sslfast {

// t_ik = scale x_ik + v_k + u_i
struct Sinkhorn {
  int64_t rows, classes;
  const void* logits;  // [rows, classes], classes contiguous
  int64_t stride;      // of rows, in elements
  Float dtype;
  double scale;
  const void *v, *u;  // [classes], [rows] of the working dtype; null: 0
  int threads;
};

// Results are of the working dtype: double for f64, otherwise float.
SSLFAST_PER_ISA(void sinkhorn_rows(const Sinkhorn&, void* out);)     // [rows]: log sum_k exp t_ik
SSLFAST_PER_ISA(void sinkhorn_columns(const Sinkhorn&, void* out);)  // [classes]: log sum_i exp t_ik
SSLFAST_PER_ISA(void sinkhorn_fill(const Sinkhorn&, void* out);)     // [rows, classes]: exp t_ik

}  // namespace sslfast
