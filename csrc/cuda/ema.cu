// One block per segment. A segment is a piece of a tensor, small enough that many blocks share the memory's bandwidth.
#include "ema.h"

#include <cuda_runtime.h>

namespace sslfast {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    update(const Segment* __restrict__ segments, double number, const void* at, bool at_is_f32) {
  using W = typename WorkOf<T, S>::type;
  constexpr int N = 16 / (sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S));  // the wider side moves 16 bytes at a time
  const Segment segment = segments[blockIdx.x];
  const double value = !at ? number : at_is_f32 ? *static_cast<const float*>(at) : *static_cast<const double*>(at);
  const Momentum<W> m(value);
  T* __restrict__ target = reinterpret_cast<T*>(segment.target);
  const S* __restrict__ source = reinterpret_cast<const S*>(segment.source);

  int64_t done = 0;
  if (segment.target % sizeof(Pack<T, N>) == 0 && segment.source % sizeof(Pack<S, N>) == 0) {
    const int64_t packs = segment.count / N;
    auto* __restrict__ to = reinterpret_cast<Pack<T, N>*>(target);
    const auto* __restrict__ from = reinterpret_cast<const Pack<S, N>*>(source);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
      Pack<T, N> t = to[i];
      const Pack<S, N> s = from[i];
#pragma unroll
      for (int k = 0; k < N; ++k) t.x[k] = ema(t.x[k], s.x[k], m);
      to[i] = t;
    }
    done = packs * N;
  }
  for (int64_t i = done + threadIdx.x; i < segment.count; i += kThreads) target[i] = ema(target[i], source[i], m);
}

template <class T>
void launch(Float source, unsigned blocks, cudaStream_t stream, const Segment* segments, double momentum,
            const void* at, bool at_is_f32) {
  switch (source) {
    case Float::f32:
      return update<T, float><<<blocks, kThreads, 0, stream>>>(segments, momentum, at, at_is_f32);
    case Float::bf16:
      return update<T, Bf16><<<blocks, kThreads, 0, stream>>>(segments, momentum, at, at_is_f32);
    case Float::f16:
      return update<T, F16><<<blocks, kThreads, 0, stream>>>(segments, momentum, at, at_is_f32);
    case Float::f64:
      return update<T, double><<<blocks, kThreads, 0, stream>>>(segments, momentum, at, at_is_f32);
  }
}

}  // namespace

const char* ema_update_cuda(const Segment* segments, int64_t count, Float target, Float source, double momentum,
                            const void* at, bool at_is_f32, void* stream) {
  if (count <= 0) return nullptr;
  if (count > 0x7fffffff) return "more segments than a grid has blocks";
  const auto blocks = static_cast<unsigned>(count);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (target) {
    case Float::f32:
      launch<float>(source, blocks, on, segments, momentum, at, at_is_f32);
      break;
    case Float::bf16:
      launch<Bf16>(source, blocks, on, segments, momentum, at, at_is_f32);
      break;
    case Float::f16:
      launch<F16>(source, blocks, on, segments, momentum, at, at_is_f32);
      break;
    case Float::f64:
      launch<double>(source, blocks, on, segments, momentum, at, at_is_f32);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace sslfast
