// Epilogues of the blocked `similarity_lse` and `similarity_bce`: the caller multiplies a block of rows of a by a block
// of rows of b (tile = a[r0:r0+rows] b[c0:c0+cols]^T, row-major), and these turn the tile into row and column
// log-sum-exps (forward) or, in place, into the weights of the gradient's matrix products (backward).
//
// All logits below are in base 2: t_ij = log2(e) (scale <a_i, b_j> + bias_j), over the allowed pairs.
//   safe range    |t| < 58 is known from the norms: one 2^t serves rows, columns and gradients, nothing subtracted
//   otherwise     a running maximum per row and per column (forward), one exponential per direction (backward)
#pragma once
#include <cstdint>

#include "isa.h"

namespace sslfast {

template <class T>
struct SimilarityLse {
  int64_t m, n, d;               // a [m, d], b [n, d]
  const T *a, *b;                // contiguous; only `prepare` reads them
  const T* scale;                // one element
  const T* bias;                 // [n] or null
  const int64_t *a_ids, *b_ids;  // [m], [n], or both null
  bool same;                     // keep only the pairs with equal ids, instead of leaving them out
  bool self;                     // b is a: row i never meets column i
  bool symmetric;                // self without a bias: a tile above the diagonal also stands for its mirror image
  int threads;

  // Filled by `prepare`.
  T factor = 0;      // log2(e) * scale, 0 where that is NaN
  T offset = 0;      // added to each allowed pair: 0, or NaN where the scale is
  T excluded_s = 0;  // a product for excluded pairs: factor * excluded_s + (-inf) is -inf
  bool safe = false;
  bool drops_columns = false;  // some bias is -inf

  // Forward: sums of 2^(t - max), with max the running maximum (0 in the safe range). Columns may be null.
  T *row_max = nullptr, *row_sum = nullptr;  // [m]
  T *col_max = nullptr, *col_sum = nullptr;  // [n]

  // Backward: G_ij = row_weight_i 2^(t - row_shift_i) + col_weight_j 2^(t - col_shift_j); columns may be null.
  T *row_weight = nullptr, *row_shift = nullptr;  // [m]
  T *col_weight = nullptr, *col_shift = nullptr;  // [n]
  T* dbias = nullptr;                             // [n] or null: accumulates the column sums of G

  // Binary cross-entropies (`similarity_bce`), added to per row: their sums, those of the weights y sigmoid(y s), which
  // times row_weight_i are G, and those of the weights times <a, b>.
  T *term_sum = nullptr, *weight_sum = nullptr, *moment_sum = nullptr;  // [m]

  // Room for each thread to work in: `scratch_size` elements per thread.
  T* scratch = nullptr;
  static int64_t scratch_size(int64_t max_cols) { return 6 * max_cols; }
};

// The kernels of one instruction set.
template <class T>
struct SimilarityLseKernels {
  // factor and safe from max ||a_i||, max ||b_j|| and max |bias_j|.
  void (*prepare)(SimilarityLse<T>&);
  void (*forward_tile)(const SimilarityLse<T>&, T* tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols);
  // lse[i] = ln(2) (max_i + log2(sum_i)).
  void (*finish)(const SimilarityLse<T>&, const T* max, const T* sum, T* lse, int64_t count);
  // weight and shift from the gradient g of a log-sum-exp and its value; returns false if a weight leaves the
  // numbers of full precision in the safe range, after which the caller clears `safe` and asks again.
  bool (*weights)(const SimilarityLse<T>&, const T* g, const T* lse, T* weight, T* shift, int64_t count);
  void (*backward_tile)(const SimilarityLse<T>&, T* tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols);
  void (*exp2)(const T* x, T* y, int64_t count);
};

// The epilogue of `similarity_bce`: adds a tile to the sums of its rows, and makes it G.
template <class T>
using BceTile = void (*)(const SimilarityLse<T>&, T* tile, int64_t r0, int64_t rows, int64_t c0, int64_t cols);

SSLFAST_PER_ISA(template <class T> const SimilarityLseKernels<T>& similarity_lse();)
SSLFAST_PER_ISA(template <class T> BceTile<T> similarity_bce();)

template <class T>
const SimilarityLseKernels<T>& similarity_lse_kernels(Isa isa) {
  return SSLFAST_CHOOSE(isa, similarity_lse<T>());
}

template <class T>
BceTile<T> bce_tile_kernel(Isa isa) {
  return SSLFAST_CHOOSE(isa, similarity_bce<T>());
}

}  // namespace sslfast
