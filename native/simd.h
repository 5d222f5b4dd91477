// Vectors of one width, chosen by the flags of the translation unit: GCC/Clang vector extensions, and intrinsics only
// where an instruction has no portable spelling. Everything lies in the namespace of its instruction set, so that the
// linker never mixes two of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "dualform.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For functions in headers that are compiled once for each instruction set.
#define INLINE static inline __attribute__((always_inline))

namespace DUALFORM_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif

constexpr int LINE = 64;  // bytes of a cache line

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float type __attribute__((vector_size(WIDTH)));
  typedef float loose __attribute__((vector_size(WIDTH), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(WIDTH)));
};

template <>
struct Simd<double> {
  typedef double type __attribute__((vector_size(WIDTH)));
  typedef double loose __attribute__((vector_size(WIDTH), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(WIDTH)));
};

template <class T>
using vec = typename Simd<T>::type;

template <class T>
constexpr int LANES = WIDTH / int(sizeof(T));

template <class T>
INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::loose*>(p);
}

template <class T>
INLINE void store(T* p, vec<T> v) {
  *reinterpret_cast<typename Simd<T>::loose*>(p) = v;
}

template <class T>
INLINE vec<T> splat(T x) {
  return x - vec<T>{};  // exact for every x, NaN and -0 among them
}

// Stores that bypass the caches, for whole cache lines that nobody reads soon: what they held before is not fetched
// first. The address must be a multiple of the vector's width.
#if defined(__AVX512F__)
INLINE void stream(float* p, vec<float> v) { _mm512_stream_ps(p, v); }
INLINE void stream(double* p, vec<double> v) { _mm512_stream_pd(p, v); }
#elif defined(__AVX2__)
INLINE void stream(float* p, vec<float> v) { _mm256_stream_ps(p, v); }
INLINE void stream(double* p, vec<double> v) { _mm256_stream_pd(p, v); }
#elif defined(__x86_64__)
INLINE void stream(float* p, vec<float> v) { _mm_stream_ps(p, v); }
INLINE void stream(double* p, vec<double> v) { _mm_stream_pd(p, v); }
#else
INLINE void stream(float* p, vec<float> v) { store(p, v); }
INLINE void stream(double* p, vec<double> v) { store(p, v); }
#endif
// After the last of them: other threads see what was stored.
INLINE void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// a * b + c; the flag -ffp-contract=fast makes it one instruction where there is one.
template <class V>
INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// Q vectors are summed over their lanes at once: in every 16 bytes of the result, lane j is a sum of lanes of vector j.
template <class T>
constexpr int Q = 16 / int(sizeof(T));

// From every 16 bytes of a and of b the lower (upper) half, the elements of both in turn.
template <class T, bool UPPER>
INLINE vec<T> interleave(vec<T> a, vec<T> b) {
#if defined(__clang__)
  vec<T> found;
  for (int i = 0; i < LANES<T>; i++) {
    int from = i / Q<T> * Q<T> + i % Q<T> / 2 + (UPPER ? Q<T> / 2 : 0);
    found[i] = i % 2 ? b[from] : a[from];
  }
  return found;
#else
  typename Simd<T>::bits from;
  for (int i = 0; i < LANES<T>; i++)
    from[i] = i / Q<T> * Q<T> + i % Q<T> / 2 + (UPPER ? Q<T> / 2 : 0) + (i % 2 ? LANES<T> : 0);
  return __builtin_shuffle(a, b, from);
#endif
}
INLINE vec<double> merge(const vec<double>* v) {
  return interleave<double, false>(v[0], v[1]) + interleave<double, true>(v[0], v[1]);
}
INLINE vec<float> merge(const vec<float>* v) {
  vec<float> a = interleave<float, false>(v[0], v[1]) + interleave<float, true>(v[0], v[1]);
  vec<float> b = interleave<float, false>(v[2], v[3]) + interleave<float, true>(v[2], v[3]);
  vec<double> low = interleave<double, false>((vec<double>)a, (vec<double>)b);
  vec<double> high = interleave<double, true>((vec<double>)a, (vec<double>)b);
  return (vec<float>)low + (vec<float>)high;
}

// A vector of pieces of 16 bytes, which lie `stride` numbers apart in memory; and back.
#if defined(__AVX512F__)
INLINE vec<float> load_pieces(const float* p, int64_t stride) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * stride), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * stride), 3);
}
INLINE vec<double> load_pieces(const double* p, int64_t stride) {
  __m512d v = _mm512_castpd128_pd512(_mm_loadu_pd(p));
  v = _mm512_insertf64x2(v, _mm_loadu_pd(p + stride), 1);
  v = _mm512_insertf64x2(v, _mm_loadu_pd(p + 2 * stride), 2);
  return _mm512_insertf64x2(v, _mm_loadu_pd(p + 3 * stride), 3);
}
INLINE void store_pieces(float* p, int64_t stride, vec<float> v) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(v));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(v, 1));
  _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps(v, 2));
  _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps(v, 3));
}
INLINE void store_pieces(double* p, int64_t stride, vec<double> v) {
  _mm_storeu_pd(p, _mm512_castpd512_pd128(v));
  _mm_storeu_pd(p + stride, _mm512_extractf64x2_pd(v, 1));
  _mm_storeu_pd(p + 2 * stride, _mm512_extractf64x2_pd(v, 2));
  _mm_storeu_pd(p + 3 * stride, _mm512_extractf64x2_pd(v, 3));
}
#elif defined(__AVX2__)
INLINE vec<float> load_pieces(const float* p, int64_t stride) { return _mm256_loadu2_m128(p + stride, p); }
INLINE vec<double> load_pieces(const double* p, int64_t stride) { return _mm256_loadu2_m128d(p + stride, p); }
INLINE void store_pieces(float* p, int64_t stride, vec<float> v) { _mm256_storeu2_m128(p + stride, p, v); }
INLINE void store_pieces(double* p, int64_t stride, vec<double> v) { _mm256_storeu2_m128d(p + stride, p, v); }
#else
template <class T>
INLINE vec<T> load_pieces(const T* p, int64_t) {
  return load(p);
}
template <class T>
INLINE void store_pieces(T* p, int64_t, vec<T> v) {
  store(p, v);
}
#endif

// Turns the Q x Q numbers in every 16 bytes of Q vectors: lane j of vector i and lane i of vector j change places.
INLINE void turn(vec<double>* v) {
  const vec<double> a = v[0];
  v[0] = interleave<double, false>(a, v[1]), v[1] = interleave<double, true>(a, v[1]);
}
INLINE void turn(vec<float>* v) {
  const vec<double> a = (vec<double>)interleave<float, false>(v[0], v[1]);
  const vec<double> b = (vec<double>)interleave<float, true>(v[0], v[1]);
  const vec<double> c = (vec<double>)interleave<float, false>(v[2], v[3]);
  const vec<double> d = (vec<double>)interleave<float, true>(v[2], v[3]);
  v[0] = (vec<float>)interleave<double, false>(a, c), v[1] = (vec<float>)interleave<double, true>(a, c);
  v[2] = (vec<float>)interleave<double, false>(b, d), v[3] = (vec<float>)interleave<double, true>(b, d);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }  // to a multiple

// Polynomials p(f) = 1 + f (c_0 + c_1 f + ...) for 2^f on [-1/2, 1/2], of least relative error: 2.0e-9 and 3.4e-18.
// p(0) = 1 exactly, so that slow decays, which are raised to high powers by the recurrence, are the most exact.
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int TERMS = 6, MANTISSA = 23;
  static constexpr float LOW = -126, HIGH = 128, ROUND = 0x1.8p23f;
  static constexpr float C[TERMS] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                                     0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbap-13f};
};

template <>
struct Exp2<double> {
  static constexpr int TERMS = 11, MANTISSA = 52;
  static constexpr double LOW = -1022, HIGH = 1024, ROUND = 0x1.8p52;
  static constexpr double C[TERMS] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5a4p-3,  0x1.c6b08d7049fe8p-5,
                                      0x1.3b2ab6fba0119p-7,  0x1.5d87fe78cd6d4p-10, 0x1.4309130ed8da0p-13,
                                      0x1.ffcbfba97fab8p-17, 0x1.62bfc79d2fa58p-20, 0x1.b5267ce2583c7p-24,
                                      0x1.e61b4fc4ab239p-28, 0x1.e79bb37875897p-32};
};

#if defined(__AVX512F__)
INLINE vec<float> fraction(vec<float> x) { return _mm512_reduce_ps(x, 8); }
INLINE vec<double> fraction(vec<double> x) { return _mm512_reduce_pd(x, 8); }
INLINE vec<float> scale(vec<float> p, vec<float> n) { return _mm512_scalef_ps(p, n); }
INLINE vec<double> scale(vec<double> p, vec<double> n) { return _mm512_scalef_pd(p, n); }
#else
// x within [low, high]; NaN stays NaN.
#if defined(__AVX2__)
INLINE vec<float> clamp(vec<float> x, vec<float> low, vec<float> high) {
  return _mm256_min_ps(high, _mm256_max_ps(low, x));
}
INLINE vec<double> clamp(vec<double> x, vec<double> low, vec<double> high) {
  return _mm256_min_pd(high, _mm256_max_pd(low, x));
}
#elif defined(__x86_64__)
INLINE vec<float> clamp(vec<float> x, vec<float> low, vec<float> high) { return _mm_min_ps(high, _mm_max_ps(low, x)); }
INLINE vec<double> clamp(vec<double> x, vec<double> low, vec<double> high) {
  return _mm_min_pd(high, _mm_max_pd(low, x));
}
#else
template <class V>
INLINE V clamp(V x, V low, V high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
#endif
#endif

// 2^x within about 1 ulp (float) or 2 (double). Below the normal numbers it is 0, or the least of them; above the
// greatest it is infinity.
template <class T>
INLINE vec<T> exp2(vec<T> x) {
  using E = Exp2<T>;
#if defined(__AVX512F__)
  vec<T> f = fraction(x);
#else
  x = clamp(x, splat(E::LOW), splat(E::HIGH));
  vec<T> shifted = x + E::ROUND;  // the integer nearest to x now lies in the lowest bits
  vec<T> f = x - (shifted - E::ROUND);
#endif
  vec<T> p = splat(E::C[E::TERMS - 1]);
#pragma GCC unroll 16
  for (int i = E::TERMS - 2; i >= 0; i--) p = fma(p, f, splat(E::C[i]));
  p = fma(p, f, splat(T(1)));
#if defined(__AVX512F__)
  return scale(p, x - f);
#else
  using bits = typename Simd<T>::bits;
  return (vec<T>)((bits)p + ((bits)shifted << E::MANTISSA));
#endif
}

// Numbers as tensors hold them, to numbers to compute with, and back: to 16 bits by rounding to nearest, ties to even.
// No step of a conversion makes a denormal float or double, which would count as 0 while kernels run.
INLINE float number(float x) { return x; }
INLINE double number(double x) { return x; }
INLINE float number(int8_t x) { return float(x); }
INLINE float number(bfloat16 x) {
  uint32_t word = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(float* p, double x) { *p = float(x); }
INLINE void put(double* p, double x) { *p = x; }
INLINE void put(bfloat16* p, float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  p->bits = uint16_t(value == value ? rounded : 0x7fc0);
}
INLINE void put(bfloat16* p, double x) { put(p, float(x)); }
INLINE float number(float16 x) {
  const uint32_t magnitude = x.bits & 0x7fff, sign = uint32_t(x.bits >> 15) << 31;
  uint32_t word = (magnitude << 13) + (magnitude < 0x7c00 ? uint32_t(127 - 15) << 23 : uint32_t(255 - 31) << 23);
  if (magnitude < 0x0400) {
    float small = float(magnitude) * 0x1p-24f;
    memcpy(&word, &small, 4);
  }
  word |= sign;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
INLINE void put(float16* p, float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  const uint32_t sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
  uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) - (uint32_t(127 - 15) << 23)) >> 13;
  if (magnitude < 0x38800000) {  // below 2^-14: in steps of 2^-24, which are those of floats in [1/2, 1)
    float small = (value < 0 ? -value : value) + 0.5f;
    memcpy(&rounded, &small, 4);
    rounded -= 0x3f000000;
  }
  if (magnitude >= 0x477ff000) rounded = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  p->bits = uint16_t(sign | rounded);
}
INLINE void put(float16* p, double x) { put(p, float(x)); }

// log(1 + x) / x = c_0 + c_1 x + ... on [0, 1], of least relative error: 4.7e-9 and 9.1e-18.
template <class T>
struct Log1p;

template <>
struct Log1p<float> {
  static constexpr int TERMS = 10;
  static constexpr float C[TERMS] = {0x1.0000000000000p+0f,  -0x1.ffffbe0000000p-2f, 0x1.554c7e0000000p-2f,
                                     -0x1.ff0f7c0000000p-3f, 0x1.92f65c0000000p-3f,  -0x1.3974b80000000p-3f,
                                     0x1.b251220000000p-4f,  -0x1.d298600000000p-5f, 0x1.453a5a0000000p-6f,
                                     -0x1.a92b0e0000000p-9f};
};

template <>
struct Log1p<double> {
  static constexpr int TERMS = 21;
  static constexpr double C[TERMS] = {0x1.0000000000000p+0,  -0x1.fffffffffff6dp-2,  0x1.555555554ff66p-2,
                                      -0x1.fffffffd7fa81p-3, 0x1.9999994a5df6ap-3,   -0x1.55554f4ec6fd0p-3,
                                      0x1.2491fa775bc4bp-3,  -0x1.fffa4c6923d83p-4,  0x1.c6f553c2b2bc7p-4,
                                      -0x1.98cd2976d0fe0p-4, 0x1.711cdf0f99c55p-4,   -0x1.4ad82d94e92aap-4,
                                      0x1.1fdd4b50b75dep-4,  -0x1.d61e6adf28da5p-5,  0x1.596c1ba3e7abap-5,
                                      -0x1.b42f21a89f863p-6, 0x1.c2bfb5f62abc9p-7,   -0x1.68923d0cf8c98p-8,
                                      0x1.9e9cb1f2641f5p-10, -0x1.2ed0a6dab90bep-12, 0x1.a4187b4c4aac1p-16};
};

// The value of a function at x, and its derivative there.
template <class T>
struct Curve {
  vec<T> value, slope;
};

// log(1 + e^x).
template <class T>
INLINE Curve<T> softplus_curve(vec<T> x) {
  vec<T> t = exp2<T>((x > 0 ? -x : x) * T(LOG2_E)), p = splat(Log1p<T>::C[Log1p<T>::TERMS - 1]);
#pragma GCC unroll 32
  for (int i = Log1p<T>::TERMS - 2; i >= 0; i--) p = fma(p, t, splat(Log1p<T>::C[i]));
  return {fma(p, t, x > 0 ? x : vec<T>{}), (x > 0 ? splat(T(1)) : t) / (t + T(1))};
}
template <class T>
INLINE vec<T> softplus(vec<T> x) {
  return softplus_curve<T>(x).value;
}

// x / (1 + e^-x).
template <class T>
INLINE Curve<T> silu_curve(vec<T> x) {
  vec<T> sigmoid = T(1) / (exp2<T>(x * T(-LOG2_E)) + T(1)), value = x * sigmoid;
  return {value, fma(value, T(1) - sigmoid, sigmoid)};
}
template <class T>
INLINE vec<T> silu(vec<T> x) {
  return x / (exp2<T>(x * T(-LOG2_E)) + T(1));
}

}  // namespace DUALFORM_ISA
