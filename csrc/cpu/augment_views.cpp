// Compiled once per instruction set (SSLFAST_ISA names it); see similarity_lse.cpp for what that forbids.
//
// A thread makes one view at a time, in float32 planes that stay in its L2 cache: rows of the crop are widened and
// resized one by one into a ring, rows of the view are mixed from the ring, colours change in place, and the last step
// (the blur's columns, where there is a blur) normalises and writes a row.
#include "augment_views.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "parallel.h"
#include "view_steps.h"

namespace sslfast {
namespace {

constexpr int kFewTaps = 12;         // from here on the taps of a pixel fill vectors of their own
constexpr int64_t kReached = 8;      // rows of a smaller view that a row of the crop may reach, at most 5, and one more
constexpr double kDeviations = 5.5;  // what a Gaussian has beyond so many is less than half of float32's epsilon

struct Numbers {  // that were drawn for a view, made safe: whatever they are, no pixel outside the image is read
  int64_t top, left, height, width;
  bool flip, gray;
  int order;
  float factors[4], sigma, threshold;
  const float* matrix;
};

int64_t whole(float x, int64_t low, int64_t high) {
  if (!(x > static_cast<float>(low))) return low;
  return x >= static_cast<float>(high) ? high : static_cast<int64_t>(x);
}

Numbers numbers_of(const float* row, int64_t height, int64_t width) {
  Numbers n;
  n.top = whole(row[0], 0, height - 1), n.left = whole(row[1], 0, width - 1);
  n.height = whole(row[2], 1, height - n.top), n.width = whole(row[3], 1, width - n.left);
  n.flip = row[4] != 0, n.gray = row[10] != 0;
  n.order = static_cast<int>(whole(row[5], 0, 255));
  std::memcpy(n.factors, row + 6, sizeof n.factors);
  n.factors[3] -= std::round(n.factors[3]);  // whole turns of the hue
  n.sigma = row[11], n.threshold = row[12], n.matrix = row + 13;
  return n;
}

// Most taps of a pixel when an axis is resized: of an open interval twice the filter's reach wide.
int64_t most_taps(int64_t before, int64_t after, bool bicubic) {
  const int64_t least = bicubic ? 4 : 2;
  return before > after ? (least * before + after - 1) / after : least;
}

// The weights of pixel x along an axis, and where they begin; returns how many. Pillow's filters.
int weights_of(int64_t x, int64_t before, int64_t after, bool bicubic, int64_t* start, double* weights) {
  const double ratio = static_cast<double>(before) / static_cast<double>(after), shrink = ratio > 1 ? ratio : 1;
  const double center = static_cast<double>((2 * x + 1) * before) / static_cast<double>(2 * after);
  const double reach = (bicubic ? 2 : 1) * shrink;
  const int64_t first = static_cast<int64_t>(std::floor(center - reach - 0.5)) + 1;
  const int64_t last = static_cast<int64_t>(std::ceil(center + reach - 0.5)) - 1;
  const int64_t low = first < 0 ? 0 : first, high = last >= before ? before - 1 : last;
  double sum = 0;
  for (int64_t k = low; k <= high; ++k) {
    const double t = std::fabs(static_cast<double>(k) + 0.5 - center) / shrink;
    double w = t < 1 ? 1 - t : 0;
    if (bicubic) w = t < 1 ? (1.5 * t - 2.5) * t * t + 1 : t < 2 ? ((-0.5 * t + 2.5) * t - 4) * t + 2 : 0;
    weights[k - low] = w;
    sum += w;
  }
  for (int64_t k = low; k <= high; ++k) weights[k - low] /= sum;
  *start = low;
  return static_cast<int>(high - low + 1);
}

int64_t padded(int64_t n) { return (n + kWide - 1) / kWide * kWide; }

// The largest sizes that a view of the call may need.
struct Sizes {
  int64_t row = 0, exact = 0, taps = 0, weights = 0, ring = 0, plane = 0, width = 0;
  bool tall = false;  // crops may be higher than a view

  void grow(const ViewShape& v, int64_t height, int64_t width_of_image) {
    const auto at_least = [](int64_t& x, int64_t needed) { x = needed > x ? needed : x; };
    const bool bicubic = v.steps & kBicubic;
    const int64_t across = padded(most_taps(width_of_image, v.width, bicubic)), blurred = 2 * v.radius + 1;
    const int64_t down = most_taps(height, v.height, bicubic);
    at_least(row, padded(width_of_image + across));
    at_least(row, padded(v.width + blurred));
    at_least(exact, across), at_least(exact, down), at_least(exact, blurred);
    at_least(taps, kReached * down), at_least(taps, blurred);
    at_least(weights, across * v.width);
    // Rows come first in crops of up to so many of them.
    const int64_t first = v.height + 2 * (width_of_image > v.width ? width_of_image - v.width : 0);
    at_least(ring, most_taps(height < first ? height : first, v.height, bicubic) * 3 * v.width);
    tall = tall || height > v.height;
    at_least(plane, v.height * v.width);
    at_least(width, v.width);
  }
};

// What one thread works in.
struct Scratch {
  double* exact;
  const float** window;  // as many
  int32_t* starts;       // [width]
  float *row, *weights, *ring, *image, *other, *line, *taps;
  int64_t row_stride;

  // Lays it out from `memory` on, or for nullptr only counts; returns the bytes.
  int64_t lay_out(char* memory, const Sizes& s) {
    int64_t bytes = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
      if (memory) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + bytes);
      bytes += (count * static_cast<int64_t>(sizeof *pointer) + 63) / 64 * 64;
    };
    row_stride = s.row;
    take(exact, s.exact), take(window, s.exact), take(starts, s.width);
    take(row, 3 * row_stride), take(weights, s.weights);
    take(ring, s.tall && s.ring < kReached * 3 * row_stride ? kReached * 3 * row_stride : s.ring);
    take(image, 3 * s.plane), take(other, 3 * s.plane), take(line, s.width), take(taps, s.taps);
    return bytes;
  }
};

struct Image {
  const uint8_t* pixels;
  int64_t height, width;
  int planes;  // 3 or 1, of the view before its channels are written
};

// Row y of the crop as float32 planes in s.row.
void read_row(const AugmentViews& p, const Image& image, const Numbers& n, int64_t y, Scratch& s) {
  const int64_t row_stride = p.row_stride < 0 ? image.width * p.column_stride : p.row_stride;
  const uint8_t* from = image.pixels + (n.top + y) * row_stride + n.left * p.column_stride;
  const int channels = p.channels < 3 ? 1 : 3;
  for (int c = 0; c < channels; ++c) {
    widen_row(from + c * p.channel_stride, p.column_stride, n.width, s.row + c * s.row_stride);
  }
  if (channels > image.planes) gray_row(s.row, s.row + s.row_stride, s.row + 2 * s.row_stride, n.width, s.row);
}

// Where Pillow 13 resizes along columns first.
bool columns_first(int64_t height, int64_t width, int64_t after_height, int64_t after_width) {
  return height - after_height > 2 * (width > after_width ? width - after_width : 0);
}

// Rows of the crop resized to the view's width: their weights are in s.weights, those of a tap next to each other
// where there are few, otherwise those of a pixel.
struct Across {
  int64_t width, taps, room;
  bool few;

  Across(const Numbers& n, const ViewShape& v, Scratch& s) : width(v.width) {
    const bool bicubic = v.steps & kBicubic;
    taps = most_taps(n.width, width, bicubic), room = padded(taps), few = taps < kFewTaps;
    std::memset(s.weights, 0, static_cast<size_t>((few ? taps : room) * width) * 4);
    for (int64_t x = 0; x < width; ++x) {
      int64_t start;
      const int count = weights_of(x, n.width, width, bicubic, &start, s.exact);
      const int64_t at = n.flip ? width - 1 - x : x;
      s.starts[at] = static_cast<int32_t>(start);
      for (int k = 0; k < count; ++k) s.weights[few ? k * width + at : at * room + k] = static_cast<float>(s.exact[k]);
    }
  }

  // `room` numbers past the end of a row are read, with weights of 0.
  void end(float* rows, int planes, int64_t stride, int64_t n) const {
    for (int c = 0; c < planes; ++c) std::memset(rows + c * stride + n, 0, static_cast<size_t>(room) * 4);
  }

  // One row of each plane; to[c * to_stride ...], clipped.
  void resize(const float* rows, int planes, const Scratch& s, float* to, int64_t to_stride) const {
    for (int c = 0; c < planes; ++c, rows += s.row_stride, to += to_stride) {
      if (few) {
        gather_row(rows, s.starts, s.weights, static_cast<int>(taps), width, to);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x] = dot(rows + s.starts[x], s.weights + x * room, room);
      }
      clip_row(to, width);
    }
  }
};

// The crop, resized into planes of s.image: along rows into a ring, from which a row of the view is mixed.
void rows_then_columns(const AugmentViews& p, const ViewShape& v, const Image& image, const Numbers& n, Scratch& s) {
  const bool bicubic = v.steps & kBicubic;
  const Across across(n, v, s);
  const int64_t w = v.width, line = image.planes * w, rows = most_taps(n.height, v.height, bicubic);
  across.end(s.row, image.planes, s.row_stride, n.width);
  int64_t next = 0;
  for (int64_t y = 0; y < v.height; ++y) {
    int64_t start;
    const int count = weights_of(y, n.height, v.height, bicubic, &start, s.exact);
    for (; next < start + count; ++next) {
      read_row(p, image, n, next, s);
      across.resize(s.row, image.planes, s, s.ring + next % rows * line, w);
    }
    for (int k = 0; k < count; ++k) {
      s.window[k] = s.ring + (start + k) % rows * line;
      s.taps[k] = static_cast<float>(s.exact[k]);
    }
    mix(s.window, s.taps, count, line, s.other);  // a row of each plane
    clip_row(s.other, line);
    for (int c = 0; c < image.planes; ++c) {
      std::memcpy(s.image + (c * v.height + y) * w, s.other + c * w, static_cast<size_t>(w) * 4);
    }
  }
}

// The same in the other order, of crops that are higher than the view: a row is read once and added to the few rows of
// the view within whose reach it is.
void columns_then_rows(const AugmentViews& p, const ViewShape& v, const Image& image, const Numbers& n, Scratch& s) {
  const bool bicubic = v.steps & kBicubic;
  const Across across(n, v, s);
  const int64_t w = v.width, line = 3 * s.row_stride, taps = most_taps(n.height, v.height, bicubic);
  int64_t starts[kReached], ends[kReached];
  int64_t done = 0, begun = 0;  // rows of the view
  const auto begin = [&](int64_t y) {
    const int64_t slot = y % kReached;
    const int count = weights_of(y, n.height, v.height, bicubic, &starts[slot], s.exact);
    ends[slot] = starts[slot] + count;
    for (int k = 0; k < count; ++k) s.taps[slot * taps + k] = static_cast<float>(s.exact[k]);
    std::memset(s.ring + slot * line, 0, static_cast<size_t>(line) * 4);
  };
  begin(0);
  for (int64_t y = 0; y < n.height && done < v.height; ++y) {
    read_row(p, image, n, y, s);
    while (begun < v.height && starts[begun % kReached] <= y) {
      if (++begun < v.height) begin(begun);  // one ahead, to know where it starts
    }
    for (int64_t i = done; i < begun; ++i) {
      const int64_t slot = i % kReached;
      const float weight = s.taps[slot * taps + y - starts[slot]];
      for (int c = 0; c < image.planes; ++c) {
        add_row(s.row + c * s.row_stride, weight, n.width, s.ring + slot * line + c * s.row_stride);
      }
    }
    for (; done < begun && ends[done % kReached] == y + 1; ++done) {
      float* rows = s.ring + done % kReached * line;
      for (int c = 0; c < image.planes; ++c) clip_row(rows + c * s.row_stride, n.width);
      across.resize(rows, image.planes, s, s.image + done * w, v.height * w);
    }
  }
}

void jitter(const ViewShape& v, int planes, const Numbers& n, Scratch& s) {
  const int64_t pixels = v.height * v.width;
  float *r = s.image, *g = r + pixels, *b = g + pixels;
  for (int i = 0; i < 4; ++i) {
    const int step = n.order >> 2 * i & 3;
    const float factor = n.factors[step];
    if (factor == (step == 3 ? 0.f : 1.f)) continue;
    if (step == 0) {
      scale_plane(r, planes * pixels, factor, 0);
    } else if (step == 1) {
      double sum = 0;
      for (int64_t y = 0; y < v.height; ++y) {
        const int64_t at = y * v.width;
        if (planes == 3) gray_row(r + at, g + at, b + at, v.width, s.line);
        sum += sum_row(planes == 3 ? s.line : r + at, v.width);
      }
      const float mean = static_cast<float>(sum / static_cast<double>(pixels));
      scale_plane(r, planes * pixels, factor, (1 - factor) * mean);
    } else if (planes == 3) {
      if (step == 2) saturate(r, g, b, pixels, factor);
      if (step == 3) turn_hue(r, g, b, pixels, factor);
    }
  }
}

// Writes the planes, blurred, solarized and normalised.
template <class T>
void finish(const ViewShape& v, int planes, const Numbers& n, Scratch& s, T* out) {
  const int64_t h = v.height, w = v.width;
  const float threshold = v.steps & kSolarize ? n.threshold : INFINITY;
  const bool blurred = v.steps & kBlur && n.sigma > 0;
  int64_t radius = 0;
  if (blurred) {
    const double reach = std::floor(kDeviations * static_cast<double>(n.sigma));
    radius = reach < v.radius ? static_cast<int64_t>(reach) : v.radius;
    const double variance = static_cast<double>(n.sigma) * n.sigma;
    double sum = 0;
    for (int64_t k = -radius; k <= radius; ++k)
      sum += s.exact[k + radius] = std::exp(-0.5 * static_cast<double>(k * k) / variance);
    for (int64_t k = 0; k <= 2 * radius; ++k) s.taps[k] = static_cast<float>(s.exact[k] / sum);
  }
  const int taps = static_cast<int>(2 * radius + 1);
  for (int c = 0; c < planes; ++c) {
    const float* plane = s.image + c * h * w;
    if (blurred) {
      for (int64_t y = 0; y < h; ++y, plane += w) {
        float* row = s.row + radius;
        std::memcpy(row, plane, static_cast<size_t>(w) * 4);
        for (int64_t k = 1; k <= radius; ++k)
          row[-k] = plane[reflected(-k, w)], row[w - 1 + k] = plane[reflected(w - 1 + k, w)];
        for (int k = 0; k < taps; ++k) s.window[k] = s.row + k;
        mix(s.window, s.taps, taps, w, s.other + y * w);
      }
    }
    for (int64_t y = 0; y < h; ++y) {
      const float* row = s.image + (c * h + y) * w;
      if (blurred) {
        for (int k = 0; k < taps; ++k) s.window[k] = s.other + reflected(y + k - radius, h) * w;
        mix(s.window, s.taps, taps, w, s.line);
        row = s.line;
      }
      for (int k = c; k < (planes == 1 ? v.channels : c + 1); ++k) {
        finish_row(row, w, threshold, v.scale[k], v.shift[k], out + (k * h + y) * w);
      }
    }
  }
}

template <class T>
void make_view(const AugmentViews& p, const ViewShape& v, const float* params, int64_t b, Scratch& s) {
  const int64_t height = p.sizes[2 * b], width = p.sizes[2 * b + 1];
  const Image image{p.data + p.offsets[b], height, width, p.channels < 3 || v.channels == 1 ? 1 : 3};
  const Numbers n = numbers_of(params + b * kViewParams, height, width);
  const int64_t pixels = v.height * v.width;
  const bool turned = columns_first(n.height, n.width, v.height, v.width);
  (turned ? columns_then_rows : rows_then_columns)(p, v, image, n, s);
  static const float kNothing[6] = {1, 0, 0, 0, 1, 0};
  if (v.steps & kAffine && std::memcmp(n.matrix, kNothing, sizeof kNothing) != 0) {
    for (int c = 0; c < image.planes; ++c) {
      warp_plane(s.image + c * pixels, v.height, v.width, n.matrix, s.other + c * pixels);
    }
    std::swap(s.image, s.other);
  }
  const bool gray = v.steps & kGray && n.gray && image.planes == 3;
  if (gray && v.steps & kGrayFirst) drop_colours(s.image, s.image + pixels, s.image + 2 * pixels, pixels);
  if (v.steps & kJitter) jitter(v, image.planes, n, s);
  if (gray && !(v.steps & kGrayFirst)) drop_colours(s.image, s.image + pixels, s.image + 2 * pixels, pixels);
  finish(v, image.planes, n, s, static_cast<T*>(v.out) + b * v.channels * pixels);
}

template <class T>
void make_views(const AugmentViews& p, std::atomic<int64_t>& next, Scratch& s) {
  const int64_t items = p.batch * p.views;  // the views of an image one after another
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
    const int64_t view = i % p.views;
    make_view<T>(p, p.shapes[view], p.params + view * p.batch * kViewParams, i / p.views, s);
  }
}

}  // namespace

namespace SSLFAST_ISA {

bool augment_views(const AugmentViews& p) {
  if (p.dtype == Float::f64) return false;
  if (!p.batch) return true;
  Sizes sizes;
  int64_t work = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.views; ++i) sizes.grow(p.shapes[i], p.sizes[2 * b], p.sizes[2 * b + 1]);
  }
  for (int64_t i = 0; i < p.views; ++i) work += p.batch * p.shapes[i].height * p.shapes[i].width * 16;
  const int parts = parts_for(p.batch * p.views, work, p.threads);
  const int64_t bytes = Scratch().lay_out(nullptr, sizes);
  char* memory = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes * parts)));
  if (!memory) return false;
  const int64_t number = p.dtype == Float::f32 ? 4 : 2;
  for (int64_t i = 0; i < p.views; ++i) {
    const ViewShape& v = p.shapes[i];
    expect_writes(v.out, p.batch * v.channels * v.height * v.width * number);
  }
  std::atomic<int64_t> next{0};
  parallel_rows(parts, parts, [&](int part, int64_t, int64_t) {
    Scratch s;
    s.lay_out(memory + part * bytes, sizes);
    if (p.dtype == Float::f32) make_views<float>(p, next, s);
    if (p.dtype == Float::bf16) make_views<Bf16>(p, next, s);
    if (p.dtype == Float::f16) make_views<F16>(p, next, s);
  });
  std::free(memory);
  return true;
}

}  // namespace SSLFAST_ISA
}  // namespace sslfast
