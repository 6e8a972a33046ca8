// The elements of both masks are in ../patch_mask.h, which the CPU shares: what is here is how threads divide the work.
#include "patch_mask.h"

#include <cuda_runtime.h>

namespace sslfast {
namespace {

constexpr int kThreads = 256;

__device__ void place(int64_t image, int64_t length, int64_t keep, int64_t k, int64_t at, int64_t* ids_keep,
                      int64_t* ids_restore, float* mask) {
  ids_restore[image * length + at] = k;
  mask[image * length + at] = k < keep ? 0.f : 1.f;
  if (k < keep) ids_keep[image * keep + k] = at;
}

// Bitonic: keys are all different, since each has its patch in the low bits, so that equal noise stays in order.
__global__ void __launch_bounds__(kThreads) sort_noise(const float* __restrict__ noise, int64_t length, int64_t keep,
                                                       int size, int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  extern __shared__ uint64_t keys[];  // [size], a power of two
  const int64_t image = blockIdx.x;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const uint64_t key = i < length ? ordered(noise[image * length + i]) : 0x100000000ull;
    keys[i] = key << 16 | static_cast<uint64_t>(i);
  }
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < size / 2; t += kThreads) {
        const int low = 2 * t - t % step, high = low + step;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
      }
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < length; k += kThreads) {
    place(image, length, keep, k, static_cast<int64_t>(keys[k] & 0xffff), ids_keep, ids_restore, mask);
  }
}

__global__ void __launch_bounds__(kThreads)
    from_order(const int64_t* __restrict__ order, int64_t total, int64_t length, int64_t keep, int64_t* ids_keep,
               int64_t* ids_restore, float* mask) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    place(i / length, length, keep, i % length, order[i], ids_keep, ids_restore, mask);
  }
}

// The sum of a number of each thread, for all of them.
__device__ int64_t sum_of(int64_t mine) {
  __shared__ unsigned long long sum;
  __syncthreads();
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (mine) atomicAdd(&sum, static_cast<unsigned long long>(mine));  // whole numbers: the order does not matter
  __syncthreads();
  return static_cast<int64_t>(sum);
}

// Calls f(index) for the patches of a block, divided between the threads.
template <class F>
__device__ void each_patch(const Block& block, int64_t width, const F& f) {
  for (int64_t i = threadIdx.x; i < block.height * block.width; i += kThreads) {
    f((block.top + i / block.width) * width + block.left + i % block.width);
  }
}

// How many patches that are not masked have keys up to `key` and, of those with that key, indices up to `last`.
__device__ int64_t free_up_to(const float* mask, const float* noise, int64_t length, uint32_t key, int64_t last) {
  int64_t mine = 0;
  for (int64_t i = threadIdx.x; i < length; i += kThreads) {
    const uint32_t here = ordered(noise[i]);
    mine += mask[i] == 0 && (here < key || (here == key && i <= last));
  }
  return sum_of(mine);
}

__global__ void __launch_bounds__(kThreads)
    draw_blocks(int64_t tries, BlockRule rule, const double* __restrict__ draws, const float* __restrict__ noise,
                const int64_t* __restrict__ counts, float* masks) {
  const int64_t image = blockIdx.x, length = rule.height * rule.width;
  float* mask = masks + image * length;
  noise += image * length;
  for (int64_t i = threadIdx.x; i < length; i += kThreads) mask[i] = 0.f;
  int64_t left = !counts ? 1 : counts[image] < 0 ? 0 : counts[image] > length ? length : counts[image];
  for (int64_t t = 0; t < tries && left > 0; ++t) {
    const double* draw = draws + 4 * (image * tries + t);
    const double room = static_cast<double>(left);
    Block block = propose(rule, draw, counts && room < rule.most ? room : rule.most);
    bool good = inside(rule, block);
    if (!counts) {
      const int64_t area = block.height * block.width;
      good = good && area >= rule.least_area && area <= rule.most_area;
      if (!good && t + 1 < tries) continue;
      if (!good) block = cut_to_grid(rule, draw);
    }
    if (counts && !good) continue;
    int64_t more = 0;
    __syncthreads();  // other threads have written to the mask
    each_patch(block, rule.width, [&](int64_t i) { more += mask[i] == 0; });
    more = sum_of(more);
    if (counts && (more == 0 || more > left)) continue;
    each_patch(block, rule.width, [&](int64_t i) { mask[i] = 1.f; });
    left = counts ? left - more : 0;
  }
  if (left == 0) return;
  __syncthreads();
  // The free patches with the smallest noise: the lowest key, and then the lowest index, that has enough up to it.
  uint32_t low = 0, high = 0xffffffffu;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (free_up_to(mask, noise, length, middle, length) >= left) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  int64_t first = 0, last = length - 1;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (free_up_to(mask, noise, length, low, middle) >= left) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < length; i += kThreads) {
    const uint32_t here = ordered(noise[i]);
    if (here < low || (here == low && i <= last)) mask[i] = 1.f;
  }
}

const char* outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* random_patch_mask_cuda(int64_t batch, int64_t length, int64_t keep, const void* given, bool is_order,
                                   int64_t* ids_keep, int64_t* ids_restore, float* mask, void* stream) {
  if (batch <= 0 || length <= 0) return nullptr;
  if (batch > 0x7fffffff) return "more images than a grid has blocks";
  const auto on = static_cast<cudaStream_t>(stream);
  if (is_order) {
    const int64_t total = batch * length, blocks = (total + kThreads - 1) / kThreads;
    from_order<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, 0, on>>>(
        static_cast<const int64_t*>(given), total, length, keep, ids_keep, ids_restore, mask);
    return outcome();
  }
  if (length > kLongestSort) return "more patches than a block of threads sorts";
  int size = 2;
  while (size < length) size *= 2;
  sort_noise<<<static_cast<unsigned>(batch), kThreads, static_cast<size_t>(size) * sizeof(uint64_t), on>>>(
      static_cast<const float*>(given), length, keep, size, ids_keep, ids_restore, mask);
  return outcome();
}

const char* block_patch_mask_cuda(int64_t batch, int64_t tries, const BlockRule& rule, const double* draws,
                                  const float* noise, const int64_t* counts, float* mask, void* stream) {
  if (batch <= 0) return nullptr;
  if (batch > 0x7fffffff) return "more images than a grid has blocks";
  draw_blocks<<<static_cast<unsigned>(batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(tries, rule, draws,
                                                                                                noise, counts, mask);
  return outcome();
}

}  // namespace sslfast
