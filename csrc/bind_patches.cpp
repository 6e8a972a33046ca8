// Bindings of masks, rows of patches and their errors.
#include <algorithm>
#include <cmath>
#include <vector>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/masked_patch_mse.h"
#include "cpu/patch_mask.h"
#include "cpu/patches.h"
#if defined(SSLFAST_CUDA)
#include "cuda/patch_mask.h"
#endif

namespace py = pybind11;

namespace sslfast {
namespace {

void served(bool done, const char* op) {
  if (!done) throw std::runtime_error(std::string(op) + ": no kernel for these dtypes, or no memory left");
}

Rows rows_at(const Address& address) {
  return {at<void>(std::get<0>(address)), std::get<1>(address), std::get<2>(address)};
}

RandomPatchMask random_mask_of(int64_t batch, int64_t length, int64_t keep, uintptr_t noise, uintptr_t ids_keep,
                               uintptr_t ids_restore, uintptr_t mask, int threads) {
  not_negative(batch, length, keep, length - keep, threads - 1, (int64_t{1} << 31) - 1 - length);
  return {batch,           length, keep, at<void>(noise), at<int64_t>(ids_keep), at<int64_t>(ids_restore),
          at<float>(mask), threads};
}

void random_patch_mask_cpu(int64_t batch, int64_t length, int64_t keep, uintptr_t noise, bool is_double,
                           uintptr_t ids_keep, uintptr_t ids_restore, uintptr_t mask, int threads) {
  const RandomPatchMask p = random_mask_of(batch, length, keep, noise, ids_keep, ids_restore, mask, threads);
  served(SSLFAST_CHOOSE(active_isa(), random_patch_mask(p, is_double)), "random_patch_mask");
}

BlockPatchMask block_mask_of(int64_t batch, int64_t tries, const std::array<int64_t, 4>& sizes, double least,
                             double most, uintptr_t draws, uintptr_t noise, uintptr_t counts, uintptr_t mask,
                             int threads) {
  const auto [height, width, least_area, most_area] = sizes;
  not_negative(batch, tries - 1, height - 1, width - 1, threads - 1, (int64_t{1} << 20) - height * width);
  return {batch,
          tries,
          {height, width, least, most, least_area, most_area},
          at<double>(draws),
          at<float>(noise),
          at<int64_t>(counts),
          at<float>(mask),
          threads};
}

void block_patch_mask_cpu(int64_t batch, int64_t tries, const std::array<int64_t, 4>& sizes, double least, double most,
                          uintptr_t draws, uintptr_t noise, uintptr_t counts, uintptr_t mask, int threads) {
  const BlockPatchMask p = block_mask_of(batch, tries, sizes, least, most, draws, noise, counts, mask, threads);
  served(SSLFAST_CHOOSE(active_isa(), block_patch_mask(p)), "block_patch_mask");
}

void take_patches_cpu(const Strides& sizes, const Address& source, int source_dtype, uintptr_t ids, uintptr_t fill,
                      uintptr_t pos, bool own, uintptr_t out, int out_dtype, int threads) {
  const auto [batch, rows, count, dim] = sizes;
  not_negative(batch, rows, count, dim, threads - 1);
  const Take p{batch,          rows,          count, dim,           rows_at(source), at<int64_t>(ids),
               at<void>(fill), at<void>(pos), own,   at<void>(out), threads};
  served(SSLFAST_CHOOSE(active_isa(), take_patches(p, float_of(source_dtype), float_of(out_dtype))), "take_patches");
}

void put_patches_cpu(const Strides& sizes, const Address& dout, int dout_dtype, uintptr_t ids, uintptr_t dsource,
                     int dsource_dtype, uintptr_t dpos, uintptr_t dfill, int threads) {
  const auto [batch, rows, count, dim] = sizes;
  not_negative(batch, rows, count, dim, threads - 1, (int64_t{1} << 31) - 1 - count);
  const Put p{
      batch,  rows, count, dim, rows_at(dout), at<int64_t>(ids), at<void>(dsource), at<double>(dpos), at<double>(dfill),
      threads};
  served(SSLFAST_CHOOSE(active_isa(), put_patches(p, float_of(dout_dtype), float_of(dsource_dtype))), "put_patches");
}

// sizes: batch, channels, height, width, patch, count
void cut_patches_cpu(const std::array<int64_t, 6>& sizes, uintptr_t images, const Strides& strides, int images_dtype,
                     uintptr_t ids, uintptr_t cols, int cols_dtype, int threads) {
  const auto [batch, channels, height, width, patch, count] = sizes;
  not_negative(batch, channels, height, width, patch - 1, count, threads - 1);
  Cut p{batch, channels, height, width, patch, count, at<void>(images), {}, at<int64_t>(ids), at<void>(cols), threads};
  std::copy(strides.begin(), strides.end(), p.strides);
  served(SSLFAST_CHOOSE(active_isa(), cut_patches(p, float_of(images_dtype), float_of(cols_dtype))), "cut_patches");
}

// sizes: batch, channels, height, width, patch; images_dtype -1: uint8. scale and shift per channel.
double masked_patch_mse_cpu(const std::array<int64_t, 5>& sizes, uintptr_t images, const Strides& strides,
                            int images_dtype, const std::vector<double>& scale, const std::vector<double>& shift,
                            const Address& pred, int pred_dtype, uintptr_t weight, bool norm_pix, bool absolute,
                            uintptr_t dpred, double upstream, int threads) {
  const auto [batch, channels, height, width, patch] = sizes;
  not_negative(batch, channels, height, width, patch - 1, threads - 1);
  if (static_cast<int64_t>(scale.size()) != channels || static_cast<int64_t>(shift.size()) != channels) {
    throw std::invalid_argument("scale and shift: one per channel");
  }
  std::vector<double> sums(static_cast<size_t>(threads) + 1);
  const bool bytes = images_dtype < 0;
  MaskedPatches p{batch,
                  channels,
                  height,
                  width,
                  patch,
                  at<void>(images),
                  {},
                  bytes,
                  bytes ? Float::f32 : float_of(images_dtype),
                  scale.data(),
                  shift.data(),
                  at<void>(std::get<0>(pred)),
                  std::get<1>(pred),
                  std::get<2>(pred),
                  at<void>(weight),
                  norm_pix,
                  absolute,
                  at<void>(dpred),
                  upstream,
                  sums.data(),
                  threads};
  std::copy(strides.begin(), strides.end(), p.strides);
  py::gil_scoped_release unlocked;
  return SSLFAST_CHOOSE(active_isa(), masked_patch_mse(p, float_of(pred_dtype)));
}

#if defined(SSLFAST_CUDA)
void random_patch_mask_on_gpu(int64_t batch, int64_t length, int64_t keep, uintptr_t given, bool is_order,
                              uintptr_t ids_keep, uintptr_t ids_restore, uintptr_t mask, uintptr_t stream) {
  const RandomPatchMask p = random_mask_of(batch, length, keep, given, ids_keep, ids_restore, mask, 1);
  const char* error = random_patch_mask_cuda(p.batch, p.length, p.keep, p.noise, is_order, p.ids_keep, p.ids_restore,
                                             p.mask, at<void>(stream));
  if (error) throw std::runtime_error(std::string("random_patch_mask: ") + error);
}

void block_patch_mask_on_gpu(int64_t batch, int64_t tries, const std::array<int64_t, 4>& sizes, double least,
                             double most, uintptr_t draws, uintptr_t noise, uintptr_t counts, uintptr_t mask,
                             uintptr_t stream) {
  const BlockPatchMask p = block_mask_of(batch, tries, sizes, least, most, draws, noise, counts, mask, 1);
  const char* error =
      block_patch_mask_cuda(p.batch, p.tries, p.rule, p.draws, p.noise, p.counts, p.mask, at<void>(stream));
  if (error) throw std::runtime_error(std::string("block_patch_mask: ") + error);
}
#endif

}  // namespace

void bind_patches(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("random_patch_mask", &random_patch_mask_cpu, unlocked);
  m.def("block_patch_mask", &block_patch_mask_cpu, unlocked);
  m.def("take_patches", &take_patches_cpu, unlocked);
  m.def("put_patches", &put_patches_cpu, unlocked);
  m.def("cut_patches", &cut_patches_cpu, unlocked);
  m.def("masked_patch_mse", &masked_patch_mse_cpu);
#if defined(SSLFAST_CUDA)
  m.def("random_patch_mask_cuda", &random_patch_mask_on_gpu, unlocked);
  m.def("block_patch_mask_cuda", &block_patch_mask_on_gpu, unlocked);
#endif
}

}  // namespace sslfast
