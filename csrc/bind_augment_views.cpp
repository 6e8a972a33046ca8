// Binding of augment_views.
#include <algorithm>
#include <string>
#include <vector>

#include "bind.h"
#include "cpu/augment_views.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace sslfast {
namespace {

constexpr int64_t kLargestSide = 65535, kLargestImage = int64_t{1} << 28;

// layout: channels, strides of channel, row (-1: rows follow each other) and column; extent: bytes from data on.
// shapes: height, width, channels, steps, radius of each view; scales: its channels' scale, then their shift.
void augment_views_cpu(uintptr_t data, int64_t extent, const std::array<int64_t, 4>& layout, uintptr_t offsets,
                       uintptr_t sizes, uintptr_t params, const std::vector<std::array<int64_t, 5>>& shapes,
                       const std::vector<std::vector<float>>& scales, const std::vector<uintptr_t>& outputs, int dtype,
                       int64_t batch, int threads) {
  const auto [channels, channel_stride, row_stride, column_stride] = layout;
  not_negative(extent, channels - 1, 4 - channels, channel_stride, row_stride + 1, column_stride, batch, threads - 1);
  if (scales.size() != shapes.size() || outputs.size() != shapes.size()) throw std::invalid_argument("one per view");
  std::vector<ViewShape> views;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const auto [height, width, out_channels, steps, radius] = shapes[i];
    not_negative(height - 1, width - 1, kLargestSide - height, kLargestSide - width, steps, radius,
                 kLargestSide - radius);
    if ((out_channels != 1 && out_channels != 3) || static_cast<int64_t>(scales[i].size()) != 2 * out_channels) {
      throw std::invalid_argument("a view has 1 or 3 channels, and a scale and a shift for each");
    }
    ViewShape v{height,
                width,
                static_cast<int>(out_channels),
                static_cast<int>(steps),
                static_cast<int>(radius),
                {},
                {},
                at<void>(outputs[i])};
    std::copy_n(scales[i].begin(), out_channels, v.scale);
    std::copy_n(scales[i].begin() + out_channels, out_channels, v.shift);
    views.push_back(v);
  }
  const AugmentViews p{batch,
                       at<uint8_t>(data),
                       at<int64_t>(offsets),
                       at<int64_t>(sizes),
                       static_cast<int>(channels),
                       channel_stride,
                       row_stride,
                       column_stride,
                       at<float>(params),
                       views.data(),
                       static_cast<int64_t>(views.size()),
                       float_of(dtype),
                       threads};
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t height = p.sizes[2 * b], width = p.sizes[2 * b + 1];
    if (height < 1 || width < 1 || height > kLargestSide || width > kLargestSide || height * width > kLargestImage) {
      throw std::invalid_argument("images: expected 1 to 65535 pixels a side, and at most 2^28, got " +
                                  std::to_string(height) + " x " + std::to_string(width));
    }
    const int64_t row = row_stride < 0 ? width * column_stride : row_stride;
    const int64_t last = (height - 1) * row + (width - 1) * column_stride + (channels - 1) * channel_stride;
    if (p.offsets[b] < 0 || p.offsets[b] >= extent || last >= extent - p.offsets[b]) {
      throw std::invalid_argument("images: expected all of them within their " + std::to_string(extent) +
                                  " bytes, got one of " + std::to_string(height) + " x " + std::to_string(width) +
                                  " pixels from " + std::to_string(p.offsets[b]) + " on");
    }
  }
  py::gil_scoped_release unlocked;
  if (!SSLFAST_CHOOSE(active_isa(), augment_views(p))) {
    throw std::runtime_error("augment_views: no kernel for this dtype, or no memory left");
  }
}

}  // namespace

void bind_augment_views(py::module_& m) { m.def("augment_views", &augment_views_cpu); }

}  // namespace sslfast
