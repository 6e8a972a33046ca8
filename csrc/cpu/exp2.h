// 2^t on floats and doubles, written so that compilers vectorise a loop around it.
//
// t = n + r with n the nearest integer and |r| <= 1/2; 2^r is a polynomial, 2^n is built in the exponent bits.
// Relative error of the polynomial: 5.1e-9 (float), 8.5e-18 (double), so the result is good to about one rounding.
// Results below the smallest normal number are 0 and those above 2^127.5 (2^1023.5) are infinity; NaN stays NaN.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// 2^n and 2^r apart, for |t| <= 128. `bits` holds n in its low bits.
inline float exp2_parts(float t, uint32_t& bits) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds t to an integer, kept in the low bits
  const float shifted = t + magic;
  const float r = t - (shifted - magic);
  bits = bit_cast<uint32_t>(shifted);
  float p = 1.5453162945e-4f;
  p = p * r + 1.33908633663e-3f;
  p = p * r + 9.61808255728e-3f;
  p = p * r + 5.550357114219e-2f;
  p = p * r + 0.24022650760568f;
  p = p * r + 0.69314718802623f;
  return p * r + 1.0f;
}

inline double exp2_parts(double t, uint64_t& bits) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = t + magic;
  const double r = t - (shifted - magic);
  bits = bit_cast<uint64_t>(shifted);
  double p = 4.4549605981867756446e-10;
  p = p * r + 7.0725859492692236999e-9;
  p = p * r + 1.0178062445845771752e-7;
  p = p * r + 1.3215442587921689653e-6;
  p = p * r + 1.5252733829836118399e-5;
  p = p * r + 1.5403530441736050155e-4;
  p = p * r + 1.333355814641693531e-3;
  p = p * r + 9.6181291076068885273e-3;
  p = p * r + 5.5504108664821594339e-2;
  p = p * r + 0.2402265069591009822;
  p = p * r + 0.69314718055994530942;
  return p * r + 1.0;
}

// Any t.
inline float exp2_any(float t) {
  t = -127.0f > t ? -127.0f : t;  // in this operand order a NaN passes
  t = 128.0f < t ? 128.0f : t;
  uint32_t bits;
  const float p = exp2_parts(t, bits);
  return p * bit_cast<float>((bits << 23) + (127u << 23));  // n = -127 gives 0, n = 128 infinity
}

inline double exp2_any(double t) {
  t = -1023.0 > t ? -1023.0 : t;
  t = 1024.0 < t ? 1024.0 : t;
  uint64_t bits;
  const double p = exp2_parts(t, bits);
  return p * bit_cast<double>((bits << 52) + (uint64_t(1023) << 52));
}

// |t| < 125 only (and so no infinity and no NaN): n is added to the exponent of 2^r.
inline float exp2_small(float t) {
  uint32_t bits;
  const float p = exp2_parts(t, bits);
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bits << 23));
}

inline double exp2_small(double t) {
  uint64_t bits;
  const double p = exp2_parts(t, bits);
  return bit_cast<double>(bit_cast<uint64_t>(p) + (bits << 52));
}

}  // namespace
