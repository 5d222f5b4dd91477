// The functions between the matrices of a layer.
#pragma once

#include <cmath>

#include "simd.h"

namespace DUALFORM_ISA {

// Half of e^(z^2) erfc(z) as t (c_0 + c_1 t + ...) with t = 1 / (1 + SLOPE z): times e^(-z^2) it is off by 3.4e-11 at
// most, for z from 0 to 6.
constexpr int TAIL_TERMS = 9;
constexpr float TAIL_SLOPE = 0.35f;
constexpr float TAIL[TAIL_TERMS] = {0x1.95da56p-4f,  0x1.7e4a94p-4f, 0x1.073714p-3f,  -0x1.bf65f0p-5f, 0x1.8758dcp-2f,
                                    -0x1.bfd0b4p-2f, 0x1.e82c36p-2f, -0x1.cf5d90p-3f, 0x1.3a1320p-5f};

// x Phi(x), where Phi is the distribution function of the standard normal distribution.
INLINE vec<float> gelu(vec<float> x) {
  const vec<float> size = x < 0 ? -x : x, z = size * float(M_SQRT1_2),
                   t = 1.0f / fma(splat(TAIL_SLOPE), z, splat(1.0f));
  vec<float> p = splat(TAIL[TAIL_TERMS - 1]);
#pragma GCC unroll 16
  for (int i = TAIL_TERMS - 2; i >= 0; i--) p = fma(p, t, splat(TAIL[i]));
  const vec<float> beyond = p * t * exp2<float>(x * x * float(-0.5 * LOG2_E));  // Phi(-|x|)
  return x * (x > 0 ? 1.0f - beyond : beyond);
}
INLINE vec<double> gelu(vec<double> x) {
  for (int i = 0; i < LANES<double>; i++) x[i] *= 0.5 * std::erfc(-x[i] * M_SQRT1_2);
  return x;
}

// tanh(x), as accurate as 1 is.
template <class T>
INLINE vec<T> tanh(vec<T> x) {
  return T(1) - T(2) / (exp2<T>(x * T(2 * LOG2_E)) + T(1));
}

// The activation of a number of dualform.h.
template <class T>
INLINE vec<T> activate(int64_t kind, vec<T> x) {
  const vec<T> positive = x < 0 ? vec<T>{} : x;  // NaN stays NaN
  if (kind == GELU) return gelu(x);
  if (kind == GELU_TANH) {
    const vec<T> inner = fma(x * x * x, splat(T(0.044715)), x) * T(0.7978845608028654);  // sqrt(2 / pi)
    return x * T(0.5) * (tanh<T>(inner) + T(1));
  }
  if (kind == RELU) return positive;
  if (kind == RELU2) return positive * positive;
  return silu<T>(x);
}

}  // namespace DUALFORM_ISA
