// Rows of patches on the CPU: taken by index, put back, and cut out of images.
#pragma once
#include <cstdint>

#include "../floats.h"
#include "isa.h"

namespace sslfast {

// A [batch, rows, dim] array whose last dimension is contiguous.
struct Rows {
  const void* data;
  int64_t batch_stride, row_stride;  // elements
};

// out[b, i] = source[b, ids[b, i]] + pos[ids[b, i]]; with a fill
// out[b, i] = (ids[b, i] < rows ? source[b, ids[b, i]] : fill) + pos[i]; in place of a gather, where `own` is set,
// out[b, i] = source[b, i] + pos[ids[b, i]]. An id that is negative, or too large where there is no fill, gives NaN.
struct Take {
  int64_t batch, rows, count, dim;
  Rows source;
  const int64_t* ids;  // [batch, count]
  const void* fill;    // [dim] of out's dtype, or null
  const void* pos;     // [rows, dim], with a fill [count, dim]; of out's dtype; or null
  bool own;
  void* out;  // [batch, count, dim]
  int threads;
};

// The gradients: dsource[b, k] sums dout[b, i] over the i whose id is k, dpos[k] also over b; dfill sums those whose
// id is no row. Each may be null.
struct Put {
  int64_t batch, rows, count, dim;
  Rows dout;
  const int64_t* ids;
  void* dsource;  // [batch, rows, dim]
  double* dpos;   // [rows, dim]
  double* dfill;  // [threads, dim], zeros: partial sums
  int threads;
};

// cols[b, i, c, y, x] = images[b, c, r * patch + y, s * patch + x] for ids[b, i] = r * (width / patch) + s
struct Cut {
  int64_t batch, channels, height, width, patch, count;
  const void* images;
  int64_t strides[4];
  const int64_t* ids;
  void* cols;
  int threads;
};

// False where no memory is left or there is no kernel for the dtypes (from, to): both alike, or a 16-bit one and f32.
SSLFAST_PER_ISA(bool take_patches(const Take&, Float source, Float out);
                bool put_patches(const Put&, Float dout, Float dsource);
                bool cut_patches(const Cut&, Float images, Float cols);)

}  // namespace sslfast
