// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
#include "patch_mask.h"

#include <cstdlib>

#include "parallel.h"

namespace sslfast {
namespace {

template <class K>
struct Item {
  K key;
  uint32_t at;
};

struct Scratch {
  explicit Scratch(int64_t bytes) : data(std::malloc(static_cast<size_t>(bytes))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  void* data;
};

// Sorts by key, equal ones in the order in which they stand, and returns where the result is: in x or in y.
template <class K>
Item<K>* stable_sort(Item<K>* x, Item<K>* y, int64_t n) {
  if (n <= 48) {
    for (int64_t i = 1; i < n; ++i) {
      const Item<K> item = x[i];
      int64_t j = i;
      for (; j > 0 && x[j - 1].key > item.key; --j) x[j] = x[j - 1];
      x[j] = item;
    }
    return x;
  }
  constexpr int kDigits = sizeof(K);  // of 8 bits
  uint32_t counts[kDigits][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int d = 0; d < kDigits; ++d) ++counts[d][x[i].key >> (8 * d) & 255];
  }
  for (int d = 0; d < kDigits; ++d) {
    uint32_t* count = counts[d];
    if (count[x[0].key >> (8 * d) & 255] == n) continue;  // all have the same digit
    uint32_t before = 0;
    for (int k = 0; k < 256; ++k) {
      const uint32_t here = count[k];
      count[k] = before;
      before += here;
    }
    for (int64_t i = 0; i < n; ++i) y[count[x[i].key >> (8 * d) & 255]++] = x[i];
    Item<K>* swapped = x;
    x = y, y = swapped;
  }
  return x;
}

template <class F, class K>
bool random_mask(const RandomPatchMask& p) {
  const int64_t length = p.length;
  const int parts = parts_for(p.batch, 16 * p.batch * length, p.threads);
  const Scratch scratch(2 * parts * length * static_cast<int64_t>(sizeof(Item<K>)));
  if (!scratch.data && length) return false;
  parallel_rows(p.batch, parts, [&](int part, int64_t begin, int64_t end) {
    Item<K>* const x = static_cast<Item<K>*>(scratch.data) + 2 * part * length;
    for (int64_t b = begin; b < end; ++b) {
      const F* noise = static_cast<const F*>(p.noise) + b * length;
      for (int64_t i = 0; i < length; ++i) x[i] = {ordered(noise[i]), static_cast<uint32_t>(i)};
      const Item<K>* sorted = stable_sort(x, x + length, length);
      int64_t* restore = p.ids_restore + b * length;
      float* mask = p.mask + b * length;
      for (int64_t k = 0; k < length; ++k) {
        restore[sorted[k].at] = k;
        mask[sorted[k].at] = k < p.keep ? 0.f : 1.f;
      }
      for (int64_t k = 0; k < p.keep; ++k) p.ids_keep[b * p.keep + k] = sorted[k].at;
    }
  });
  return true;
}

int64_t unmasked_in(const float* mask, const Block& block, int64_t width) {
  float masked = 0;
  for (int64_t y = block.top; y < block.top + block.height; ++y) {
    for (int64_t x = block.left; x < block.left + block.width; ++x) masked += mask[y * width + x];
  }
  return block.height * block.width - static_cast<int64_t>(masked);
}

void fill(float* mask, const Block& block, int64_t width) {
  for (int64_t y = block.top; y < block.top + block.height; ++y) {
    for (int64_t x = block.left; x < block.left + block.width; ++x) mask[y * width + x] = 1.f;
  }
}

void one_block(const BlockRule& rule, const double* draws, int64_t tries, float* mask) {
  for (int64_t t = 0; t < tries; ++t) {
    const Block block = propose(rule, draws + 4 * t, rule.most);
    const int64_t area = block.height * block.width;
    if (inside(rule, block) && area >= rule.least_area && area <= rule.most_area) {
      return fill(mask, block, rule.width);
    }
  }
  fill(mask, cut_to_grid(rule, draws + 4 * (tries - 1)), rule.width);
}

void many_blocks(const BlockPatchMask& p, const double* draws, const float* noise, int64_t left, float* mask,
                 Item<uint32_t>* x) {
  const int64_t length = p.rule.height * p.rule.width;
  left = left < 0 ? 0 : left > length ? length : left;
  for (int64_t t = 0; t < p.tries && left > 0; ++t) {
    const double room = static_cast<double>(left);
    const Block block = propose(p.rule, draws + 4 * t, room < p.rule.most ? room : p.rule.most);
    if (!inside(p.rule, block)) continue;
    const int64_t more = unmasked_in(mask, block, p.rule.width);
    if (more == 0 || more > left) continue;
    fill(mask, block, p.rule.width);
    left -= more;
  }
  if (left == 0) return;
  int64_t n = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (mask[i] == 0) x[n++] = {ordered(noise[i]), static_cast<uint32_t>(i)};
  }
  const Item<uint32_t>* sorted = stable_sort(x, x + length, n);
  for (int64_t k = 0; k < left; ++k) mask[sorted[k].at] = 1.f;
}

}  // namespace

namespace SSLFAST_ISA {

bool random_patch_mask(const RandomPatchMask& p, bool is_double) {
  return is_double ? random_mask<double, uint64_t>(p) : random_mask<float, uint32_t>(p);
}

bool block_patch_mask(const BlockPatchMask& p) {
  const int64_t length = p.rule.height * p.rule.width;
  const int parts = parts_for(p.batch, 16 * p.batch * length, p.threads);
  const Scratch scratch(2 * parts * length * static_cast<int64_t>(sizeof(Item<uint32_t>)));
  if (!scratch.data && length) return false;
  parallel_rows(p.batch, parts, [&](int part, int64_t begin, int64_t end) {
    Item<uint32_t>* const x = static_cast<Item<uint32_t>*>(scratch.data) + 2 * part * length;
    for (int64_t b = begin; b < end; ++b) {
      const double* draws = p.draws + 4 * p.tries * b;
      float* mask = p.mask + b * length;
      for (int64_t i = 0; i < length; ++i) mask[i] = 0.f;
      if (p.counts) {
        many_blocks(p, draws, p.noise + b * length, p.counts[b], mask, x);
      } else {
        one_block(p.rule, draws, p.tries, mask);
      }
    }
  });
  return true;
}

}  // namespace SSLFAST_ISA
}  // namespace sslfast
