// Floating dtypes of tensors, for CPU and GPU alike: 16-bit ones are widened to float32 for arithmetic and rounded
// back.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define SSLFAST_HD __host__ __device__ __forceinline__
#else
#define SSLFAST_HD inline
#endif

namespace sslfast {

enum class Float { f32, bf16, f16, f64 };  // as sslfast/ops/_backend.py numbers them

// Each translation unit has its own copy of what follows, compiled for its own instruction set.
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class To, class From>
SSLFAST_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

SSLFAST_HD float widen(float x) { return x; }
SSLFAST_HD double widen(double x) { return x; }
SSLFAST_HD float widen(Bf16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

SSLFAST_HD float widen(F16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;  // exponent and digits in place
  const uint32_t normal = shifted + ((127 - 15) << 23);
  const uint32_t special = shifted + ((255 - 31) << 23);  // infinity, NaN
  // A subnormal is its digits times 2^-24: put them behind 2^-14 and take 2^-14 off again.
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(shifted + (113u << 23)) - bits_as<float>(113u << 23));
  const uint32_t bits = shifted >= (31u << 23) ? special : shifted < (1u << 23) ? small : normal;
  return bits_as<float>(bits | sign);
#endif
}

// Nearest, ties to even.
template <class T>
struct Narrow;

template <>
struct Narrow<float> {
  SSLFAST_HD static float from(double x) { return static_cast<float>(x); }
};

template <>
struct Narrow<double> {
  SSLFAST_HD static double from(double x) { return x; }
};

template <>
struct Narrow<Bf16> {
  SSLFAST_HD static Bf16 from(double x) { return from(static_cast<float>(x)); }
  SSLFAST_HD static Bf16 from(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
  }
};

template <>
struct Narrow<F16> {
  SSLFAST_HD static F16 from(double x) { return from(static_cast<float>(x)); }
  SSLFAST_HD static F16 from(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t all = bits_as<uint32_t>(x), sign = all & 0x80000000u, bits = all ^ sign;
    const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    // Adding 0.5 lets the addition itself round a subnormal's digits into the last places.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - (126u << 23);
    const uint32_t normal = (bits - ((127u - 15u) << 23) + 0xfffu + ((bits >> 13) & 1)) >> 13;
    const uint32_t magnitude = bits >= (143u << 23) ? special : bits < (113u << 23) ? small : normal;
    return {static_cast<uint16_t>(magnitude | (sign >> 16))};
#endif
  }
};

}  // namespace
}  // namespace sslfast
