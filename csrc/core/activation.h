// activation.h: the activations and their derivatives, as functions of z, what they are applied to.
//
//   relu        max(z, 0)                    1 where z > 0
//   relu6       min(max(z, 0), 6)            1 where 0 < z < 6
//   leaky_relu  z > 0 ? z : 0.01 z           z > 0 ? 1 : 0.01
//   silu        z s, s = 1 / (1 + exp(-z))   s (1 + z (1 - s))
//   gelu        z F, F = Phi(z)              F + z phi(z)       (the exact one, not the tanh formula)
//
// A NaN goes through all of them. In float, exp and Phi are polynomials, good to 4e-7 absolutely;
// in double they are the C library's, lane by lane: float64 is not the type one runs fast in.
#pragma once
#include <initializer_list>

#include "simd.h"

extern "C" double exp(double);
extern "C" double erfc(double);

namespace fusebn::FUSEBN_TARGET {

template <class F>
FUSEBN_INLINE Vec<double> by_lane(Vec<double> v, F f) {
  double lane[8];
  __builtin_memcpy(lane, &v, sizeof v);
  for (double& value : lane) value = f(value);
  __builtin_memcpy(&v, lane, sizeof v);
  return v;
}

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2, by Taylor's polynomial of degree 7 (its remainder is 5e-9).
// Beyond +-87, where 2^n is no normal number, it is 0 or infinite.
template <class T>
FUSEBN_INLINE Vec<T> exponential(Vec<T> given) {
  using V = Vec<T>;
  const V low = splat<T>(-87.f), high = splat<T>(87.f);
  const V x = where_less(given, low, low, where_less(high, given, high, given));
  const V round = splat<T>(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = fma(x, splat<T>(1.44269504f), round);
  const V n = shifted - round;
  // ln(2) in two pieces: n times the first is exact.
  V r = fma(n, splat<T>(-0.693359375f), x);
  r = fma(n, splat<T>(2.12194440e-4f), r);
  V p = splat<T>(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
    p = fma(p, r, splat<T>(c));
  const V scale = each<T>([=](int i) {
    return (Register<float>)(((Bits)shifted.part[i] + 127) << 23);
  });
  const V infinite = splat<T>(__builtin_inff());
  return where_less(given, low, splat<T>(0), where_less(high, given, infinite, p * scale));
}
FUSEBN_INLINE Vec<double> exponential(Vec<double> x) {
  return by_lane(x, [](double v) { return exp(v); });
}

template <class T>
FUSEBN_INLINE Vec<T> sigmoid(Vec<T> z) {
  return splat<T>(1) / (splat<T>(1) + exponential(splat<T>(0) - z));
}

// Phi(z), the normal distribution. For z < 0 it is exp(-z^2 / 2) erfcx(|z| / sqrt(2)) / 2, where the
// scaled complementary error function is a polynomial in t = 1 / (1 + 0.4 |z| / sqrt(2)), the
// substitution of Abramowitz and Stegun 7.1.26, with ten terms for a relative error of 8e-9.
template <class T>
FUSEBN_INLINE Vec<T> normal_cdf(Vec<T> z) {
  const Vec<T> zero = splat<T>(0), one = splat<T>(1);
  const Vec<T> magnitude = where_less(z, zero, zero - z, z);
  const Vec<T> t = one / fma(magnitude, splat<T>(0.28284271f), one);
  Vec<T> p = splat<T>(-0.014797168783843517f);
  for (float c : {0.09900660812854767f, -0.24940574169158936f, 0.2737177312374115f,
                  -0.1421833485364914f, 0.13603311777114868f, 0.06483980268239975f,
                  0.10745955258607864f, 0.11247601360082626f, 0.11285345256328583f})
    p = fma(p, t, splat<T>(c));
  const Vec<T> tail = p * t * exponential(z * z * splat<T>(-0.5f));
  return where_less(z, zero, tail, one - tail);
}
FUSEBN_INLINE Vec<double> normal_cdf(Vec<double> z) {
  return by_lane(z, [](double v) { return 0.5 * erfc(v * -0.70710678118654752440); });
}

template <Activation A, class T>
FUSEBN_INLINE Vec<T> activate(Vec<T> z) {
  const Vec<T> zero = splat<T>(0), six = splat<T>(6);
  if constexpr (A == Activation::relu) return where_less(z, zero, zero, z);
  if constexpr (A == Activation::relu6)
    return where_less(z, zero, zero, where_less(six, z, six, z));
  if constexpr (A == Activation::leaky_relu) return where_less(z, zero, z * splat<T>(0.01), z);
  if constexpr (A == Activation::silu) return z * sigmoid(z);
  if constexpr (A == Activation::gelu) return z * normal_cdf(z);
  return z;
}

// Whether `chain` only chooses between dy and multiples of it: where dy is 0, z may then be anything.
template <Activation A>
inline constexpr bool kSelects = A == Activation::identity || A == Activation::relu ||
                                 A == Activation::relu6 || A == Activation::leaky_relu;

// dy * activation'(z).
template <Activation A, class T>
FUSEBN_INLINE Vec<T> chain(Vec<T> dy, Vec<T> z) {
  const Vec<T> zero = splat<T>(0), one = splat<T>(1);
  if constexpr (A == Activation::relu) return where_less(zero, z, dy, zero);
  if constexpr (A == Activation::relu6)
    return where_less(zero, z, where_less(z, splat<T>(6), dy, zero), zero);
  if constexpr (A == Activation::leaky_relu)
    return where_less(zero, z, dy, dy * splat<T>(0.01));
  if constexpr (A == Activation::silu) {
    const Vec<T> s = sigmoid(z);
    return dy * (s * fma(z, one - s, one));
  }
  if constexpr (A == Activation::gelu) {
    const Vec<T> density = exponential(z * z * splat<T>(-0.5)) * splat<T>(0.39894228040143267794);
    return dy * fma(z, density, normal_cdf(z));
  }
  return dy;
}

}  // namespace fusebn::FUSEBN_TARGET
