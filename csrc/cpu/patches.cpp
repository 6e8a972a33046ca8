// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
#include "patches.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "parallel.h"

namespace sslfast {
namespace {

template <class T>
struct Work {
  using type = float;
};
template <>
struct Work<double> {
  using type = double;
};

template <class To, class From>
inline To convert(From x) {
  return Narrow<To>::from(widen(x));
}

template <class T>
inline T nan_of() {
  return Narrow<T>::from(static_cast<typename Work<T>::type>(NAN));
}

// out = source + pos, of `dim` elements; pos may be null
template <class S, class T>
inline void add_row(T* __restrict out, const S* __restrict source, const T* __restrict pos, int64_t dim) {
  using W = typename Work<T>::type;
  if (pos) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) out[d] = Narrow<T>::from(W(widen(source[d])) + W(widen(pos[d])));
  } else {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) out[d] = convert<T>(source[d]);
  }
}

template <class S, class T>
void take(const Take& p) {
  const int64_t all = p.batch * p.count;
  const auto* source = static_cast<const S*>(p.source.data);
  const auto* pos = static_cast<const T*>(p.pos);
  const auto* fill = static_cast<const T*>(p.fill);
  expect_writes(p.out, all * p.dim * static_cast<int64_t>(sizeof(T)));
  parallel_rows(all, parts_for(all, all * p.dim, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / p.count, i = at % p.count, id = p.ids[at];
      T* out = static_cast<T*>(p.out) + at * p.dim;
      if (id < 0 || (id >= p.rows && !fill)) {
        for (int64_t d = 0; d < p.dim; ++d) out[d] = nan_of<T>();
        continue;
      }
      const T* here = pos ? pos + (fill ? i : id) * p.dim : nullptr;
      if (id >= p.rows) {
        add_row<T, T>(out, fill, here, p.dim);
      } else {
        add_row<S, T>(out, source + b * p.source.batch_stride + (p.own ? i : id) * p.source.row_stride, here, p.dim);
      }
    }
  });
}

// For the ids of one image: the first place of each row, and of each place the next one of the same row; -1: none.
struct Places {
  explicit Places(const Put& p)
      : rows(p.rows),
        count(p.count),
        first(static_cast<int32_t*>(std::malloc(static_cast<size_t>(rows + count + 1) * 4))) {}
  ~Places() { std::free(first); }
  Places(const Places&) = delete;

  void read(const int64_t* ids) {
    std::memset(first, 0xff, static_cast<size_t>(rows) * sizeof(int32_t));
    int32_t* next = first + rows;
    for (int64_t i = count - 1; i >= 0; --i) {
      const int64_t id = ids[i];
      if (id < 0 || id >= rows) continue;
      next[i] = first[id];
      first[id] = static_cast<int32_t>(i);
    }
  }
  int64_t rows, count;
  int32_t* first;
};

template <class S, class T>
bool put_source(const Put& p) {
  using W = typename Work<S>::type;
  const int64_t all = p.batch * p.rows;
  bool complete = true;
  expect_writes(p.dsource, all * p.dim * static_cast<int64_t>(sizeof(T)));
  parallel_rows(all, parts_for(all, all * p.dim, p.threads), [&](int, int64_t begin, int64_t end) {
    Places places(p);
    W* sum = static_cast<W*>(std::malloc(static_cast<size_t>(p.dim + 1) * sizeof(W)));
    if (!places.first || !sum) complete = false;  // all that write, write the same
    for (int64_t at = begin; complete && at < end; ++at) {
      const int64_t b = at / p.rows, k = at % p.rows;
      if (at == begin || k == 0) places.read(p.ids + b * p.count);
      T* to = static_cast<T*>(p.dsource) + at * p.dim;
      const S* from = static_cast<const S*>(p.dout.data) + b * p.dout.batch_stride;
      int32_t i = places.first[k];
      if (i < 0) {
        std::memset(to, 0, static_cast<size_t>(p.dim) * sizeof(T));
        continue;
      }
      const int32_t* next = places.first + p.rows;
      if (next[i] < 0) {
        add_row<S, T>(to, from + i * p.dout.row_stride, static_cast<const T*>(nullptr), p.dim);
        continue;
      }
      for (int64_t d = 0; d < p.dim; ++d) sum[d] = 0;
      for (; i >= 0; i = next[i]) {
        const S* row = from + i * p.dout.row_stride;
#pragma omp simd
        for (int64_t d = 0; d < p.dim; ++d) sum[d] += widen(row[d]);
      }
#pragma omp simd
      for (int64_t d = 0; d < p.dim; ++d) to[d] = Narrow<T>::from(sum[d]);
    }
    std::free(sum);
  });
  return complete;
}

template <class S>
inline void add_to(double* __restrict sum, const S* __restrict row, int64_t dim) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) sum[d] += static_cast<double>(widen(row[d]));
}

template <class S>
inline const S* dout_row(const Put& p, int64_t b, int64_t i) {
  return static_cast<const S*>(p.dout.data) + b * p.dout.batch_stride + i * p.dout.row_stride;
}

// Each thread owns some rows of the sum, and goes through the images in order.
template <class S>
void put_pos(const Put& p) {
  parallel_rows(p.rows, parts_for(p.rows, p.batch * p.count * p.dim, p.threads), [&](int, int64_t begin, int64_t end) {
    std::memset(p.dpos + begin * p.dim, 0, static_cast<size_t>((end - begin) * p.dim) * sizeof(double));
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < p.count; ++i) {
        const int64_t id = p.ids[b * p.count + i];
        if (id >= begin && id < end) add_to(p.dpos + id * p.dim, dout_row<S>(p, b, i), p.dim);
      }
    }
  });
}

template <class S>
void put_fill(const Put& p) {
  const int64_t all = p.batch * p.count;
  parallel_rows(all, parts_for(all, all * p.dim, p.threads), [&](int part, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      if (p.ids[at] >= p.rows) add_to(p.dfill + part * p.dim, dout_row<S>(p, at / p.count, at % p.count), p.dim);
    }
  });
}

template <class S, class T>
bool put(const Put& p) {
  if (p.dpos) put_pos<S>(p);
  if (p.dfill) put_fill<S>(p);
  return !p.dsource || put_source<S, T>(p);
}

template <class S, class T>
bool cut(const Cut& p) {
  const int64_t all = p.batch * p.count, across = p.width / p.patch, patches = p.height / p.patch * across;
  const int64_t dim = p.channels * p.patch * p.patch;
  const int64_t sc = p.strides[1], sh = p.strides[2], sw = p.strides[3];
  expect_writes(p.cols, all * dim * static_cast<int64_t>(sizeof(T)));
  parallel_rows(all, parts_for(all, all * dim, p.threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t id = p.ids[at];
      T* __restrict to = static_cast<T*>(p.cols) + at * dim;
      if (id < 0 || id >= patches) {
        for (int64_t d = 0; d < dim; ++d) to[d] = nan_of<T>();
        continue;
      }
      const S* corner = static_cast<const S*>(p.images) + at / p.count * p.strides[0] + id / across * p.patch * sh +
                        id % across * p.patch * sw;
      for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t y = 0; y < p.patch; ++y, to += p.patch) {
          const S* __restrict from = corner + c * sc + y * sh;
          if (sw == 1) {
#pragma omp simd
            for (int64_t x = 0; x < p.patch; ++x) to[x] = convert<T>(from[x]);
          } else {
            for (int64_t x = 0; x < p.patch; ++x) to[x] = convert<T>(from[x * sw]);
          }
        }
      }
    }
  });
  return true;
}

// Calls f with a value of either type; false where the pair has no kernel.
template <class F>
bool for_types(Float from, Float to, const F& f) {
  if (from == to) {
    switch (from) {
      case Float::f32:
        return f(float(), float());
      case Float::bf16:
        return f(Bf16(), Bf16());
      case Float::f16:
        return f(F16(), F16());
      case Float::f64:
        return f(double(), double());
    }
  }
  if (from == Float::f32 && to == Float::bf16) return f(float(), Bf16());
  if (from == Float::f32 && to == Float::f16) return f(float(), F16());
  if (from == Float::bf16 && to == Float::f32) return f(Bf16(), float());
  if (from == Float::f16 && to == Float::f32) return f(F16(), float());
  return false;
}

}  // namespace

namespace SSLFAST_ISA {

bool take_patches(const Take& p, Float source, Float out) {
  return for_types(source, out, [&](auto s, auto t) {
    take<decltype(s), decltype(t)>(p);
    return true;
  });
}

bool put_patches(const Put& p, Float dout, Float dsource) {
  return for_types(dout, dsource, [&](auto s, auto t) { return put<decltype(s), decltype(t)>(p); });
}

bool cut_patches(const Cut& p, Float images, Float cols) {
  return for_types(images, cols, [&](auto s, auto t) { return cut<decltype(s), decltype(t)>(p); });
}

}  // namespace SSLFAST_ISA
}  // namespace sslfast
