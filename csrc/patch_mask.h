// What one patch, or one block, of the masks is made of, for CPU and GPU alike.
#pragma once
#include <cmath>
#include <cstdint>

#include "floats.h"

namespace sslfast {

// Where block_patch_mask draws its blocks from. An area is a number of patches.
struct BlockRule {
  int64_t height, width;          // of the grid, in patches
  double least, most;             // area of a block
  int64_t least_area, most_area;  // the whole numbers in that range; of a mask of one block
};

struct Block {
  int64_t top, left, height, width;
};

namespace {  // each translation unit has its own copy

// Bits in the order of the numbers: -0 equals 0, and NaN comes behind all others, as torch.sort has it.
SSLFAST_HD uint32_t ordered(float x) {
  const uint32_t bits = x == 0 ? 0u : bits_as<uint32_t>(x);
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return x != x ? 0xffffffffu : key;
}

SSLFAST_HD uint64_t ordered(double x) {
  const uint64_t bits = x == 0 ? 0u : bits_as<uint64_t>(x);
  const uint64_t key = bits >> 63 ? ~bits : bits | 0x8000000000000000u;
  return x != x ? 0xffffffffffffffffu : key;
}

// The place of a side among those where it fits: floor(draw * places), inside the grid whatever the draw is.
SSLFAST_HD int64_t place_of(double draw, int64_t side, int64_t size) {
  const double last = static_cast<double>(size - side);
  return static_cast<int64_t>(fmax(0.0, fmin(floor(draw * (last + 1)), last)));
}

SSLFAST_HD int64_t nearest(double x) { return x < 1e9 ? static_cast<int64_t>(floor(x + 0.5)) : 1000000000; }

// One draw: uniform numbers in [0, 1) for area, top and left, and the square root of the aspect ratio (height over
// width). `most` is the largest area.
SSLFAST_HD Block propose(const BlockRule& rule, const double* draw, double most) {
  const double side = sqrt(rule.least + draw[0] * (most - rule.least));
  Block block{0, 0, nearest(side * draw[1]), nearest(side / draw[1])};
  block.top = place_of(draw[2], block.height, rule.height);
  block.left = place_of(draw[3], block.width, rule.width);
  return block;
}

SSLFAST_HD bool inside(const BlockRule& rule, const Block& block) {
  return block.height > 0 && block.width > 0 && block.height <= rule.height && block.width <= rule.width;
}

// The block that a mask of one block falls back to, where no draw has suited: cut to the grid.
SSLFAST_HD Block cut_to_grid(const BlockRule& rule, const double* draw) {
  Block block = propose(rule, draw, rule.most);
  const auto clamp = [](int64_t size, int64_t high) { return size < 1 ? 1 : size > high ? high : size; };
  block.height = clamp(block.height, rule.height), block.width = clamp(block.width, rule.width);
  block.top = place_of(draw[2], block.height, rule.height);
  block.left = place_of(draw[3], block.width, rule.width);
  return block;
}

}  // namespace
}  // namespace sslfast
