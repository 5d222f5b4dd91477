// y = W x for a few rows x: every number of W is read once from memory, by one thread, and widened in registers. The
// order of a sum does not depend on the other rows; it is one for a single row, and another for several.
#pragma once

#include "gemm.h"
#include "tile.h"

namespace DUALFORM_ISA {
namespace dense {

// As many weights as a vector has lanes, widened to what is computed in.
INLINE vec<float> widen(const float* p) { return load(p); }
INLINE vec<double> widen(const double* p) { return load(p); }
#if defined(__AVX512F__)
INLINE vec<float> widen(const bfloat16* p) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
INLINE vec<float> widen(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE vec<float> widen(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__)
INLINE vec<float> widen(const bfloat16* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
INLINE vec<float> widen(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE vec<float> widen(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
template <class W>
INLINE vec<float> widen(const W* p) {
  float lanes[LANES<float>];
  for (int i = 0; i < LANES<float>; i++) lanes[i] = number(p[i]);
  return load(lanes);
}
INLINE vec<float> widen(const int8_t* p) {
  typedef int8_t bytes __attribute__((vector_size(LANES<float>)));
  bytes some;
  memcpy(&some, p, sizeof some);
  return __builtin_convertvector(some, vec<float>);
}
#endif

// The last `count` weights of a row; the other lanes are 0.
template <class T, class W>
INLINE vec<T> widen_some(const W* p, int64_t count) {
  T lanes[LANES<T>] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = number(p[i]);
  return load(lanes);
}

// Outputs that are summed at once, each a stream of memory of its own; rows of x that share what is read.
constexpr int OUTPUTS = 4, ROWS = WIDTH == 64 ? 6 : WIDTH == 32 ? 3 : 2;

// The sum over the lanes of each of four vectors.
#if defined(__AVX512F__)
INLINE void totals(const vec<float>* v, float* sums) {
  const __m512 all = (__m512)merge(v);
  const __m128 half = _mm_add_ps(_mm512_castps512_ps128(all), _mm512_extractf32x4_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(half, _mm512_extractf32x4_ps(all, 2)), _mm512_extractf32x4_ps(all, 3)));
}
#elif defined(__AVX2__)
INLINE void totals(const vec<float>* v, float* sums) {
  const __m256 all = (__m256)merge(v);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#else
INLINE void totals(const vec<float>* v, float* sums) {
  float lanes[LANES<float>];
  store(lanes, merge(v));
  for (int j = 0; j < 4; j++) {
    sums[j] = lanes[j];
    for (int i = 4; i < LANES<float>; i += 4) sums[j] += lanes[i + j];
  }
}
#endif
INLINE void totals(const vec<double>* v, double* sums) {
  for (int pair = 0; pair < 2; pair++) {
    double lanes[LANES<double>];
    store(lanes, merge(v + 2 * pair));
    for (int j = 0; j < 2; j++) {
      sums[2 * pair + j] = lanes[j];
      for (int i = 2; i < LANES<double>; i += 2) sums[2 * pair + j] += lanes[i + j];
    }
  }
}

// Rows of numbers, `stride` apart.
template <class T>
struct Lines {
  const T* data;
  int64_t stride;
  const T* operator[](int64_t i) const { return data + i * stride; }
};

// A row of whole numbers: number k stands for itself times scales[k / group].
struct Scaled {
  const int8_t* data;
  const float* scales;
  int64_t group;
};

struct ScaledLines {
  const int8_t* data;
  int64_t stride;
  const float* scales;
  int64_t groups, group;
  Scaled operator[](int64_t i) const { return {data + i * stride, scales + i * groups, group}; }
};

// A matrix of any of the dtypes; its rows lie `stride` apart.
struct Matrix {
  const void* data;
  int64_t dtype, stride;
  const void* scales;
  int64_t group;
};

// The number in column k of a row, in the dtype that is computed in.
template <class T, class W>
INLINE T column(const W* row, int64_t k) {
  return T(number(row[k]));
}
template <class T>
INLINE T column(const Scaled& row, int64_t k) {
  return T(row.data[k]) * row.scales[k / row.group];
}

// Zeros, one by one: where the compiler fills the whole array at once, it does so in memory, which takes as long as a
// short row of products.
template <int R, class V>
INLINE void clear(V (&sum)[R][OUTPUTS]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int m = 0; m < OUTPUTS; m++) sum[r][m] = V{};
}

// The sums of OUTPUTS rows of W with R rows of x. Meanwhile the next OUTPUTS rows of W are on their way to the cache,
// if these are the first rows of x: the processor's own prefetching, which begins anew with every row, leaves half of
// the memory's speed unused.
template <int R, class T, class W>
INLINE void tile(const W* const (&w)[OUTPUTS], Lines<T> x, int64_t depth, bool ahead, T (&sums)[R][OUTPUTS]) {
  constexpr int L = LANES<T>;
  vec<T> sum[R][OUTPUTS];
  clear(sum);
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    vec<T> column[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) column[r] = load(x[r] + k);
#pragma GCC unroll 8
    for (int m = 0; m < OUTPUTS; m++) {
      if (ahead) __builtin_prefetch(w[m] + k + OUTPUTS * depth, 0, 3);
      const vec<T> weights = widen(w[m] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r][m] = fma(weights, column[r], sum[r][m]);
    }
  }
  if (k < depth) {
    const int64_t count = depth - k;
    for (int m = 0; m < OUTPUTS; m++) {
      const vec<T> weights = widen_some<T>(w[m] + k, count);
      for (int r = 0; r < R; r++) sum[r][m] = fma(weights, load_some(x[r] + k, count), sum[r][m]);
    }
  }
  for (int r = 0; r < R; r++) totals(sum[r], sums[r]);
}

// The same of whole numbers, which get their scales as they are widened.
template <int R>
INLINE void tile(const Scaled (&w)[OUTPUTS], Lines<float> x, int64_t depth, bool ahead, float (&sums)[R][OUTPUTS]) {
  constexpr int L = LANES<float>;
  vec<float> sum[R][OUTPUTS];
  clear(sum);
  int64_t k = 0, g = 0, left = w[0].group;
  for (; k + L <= depth; k += L) {
    vec<float> column[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) column[r] = load(x[r] + k);
#pragma GCC unroll 8
    for (int m = 0; m < OUTPUTS; m++) {
      if (ahead && k % LINE == 0) __builtin_prefetch(w[m].data + k + OUTPUTS * depth, 0, 3);
      const vec<float> weights = widen(w[m].data + k) * w[m].scales[g];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r][m] = fma(weights, column[r], sum[r][m]);
    }
    if ((left -= L) == 0) g++, left = w[0].group;
  }
  if (k < depth) {
    for (int m = 0; m < OUTPUTS; m++) {
      const vec<float> weights = widen_some<float>(w[m].data + k, depth - k) * w[m].scales[g];
      for (int r = 0; r < R; r++) sum[r][m] = fma(weights, load_some(x[r] + k, depth - k), sum[r][m]);
    }
  }
  for (int r = 0; r < R; r++) totals(sum[r], sums[r]);
}

// The products of one row of W with one row of x, summed to a vector. W is read from its beginning to its end, which is
// what processors fetch ahead of best.
template <class T, class W>
INLINE vec<T> single(const W* w, const T* x, int64_t depth) {
  constexpr int L = LANES<T>, K = 4;
  vec<T> sum[K] = {};
  int64_t k = 0;
  for (; k + K * L <= depth; k += K * L) {
#pragma GCC unroll 4
    for (int i = 0; i < K; i++) sum[i] = fma(widen(w + k + i * L), load(x + k + i * L), sum[i]);
  }
  for (; k + L <= depth; k += L) sum[0] = fma(widen(w + k), load(x + k), sum[0]);
  if (k < depth) sum[1] = fma(widen_some<T>(w + k, depth - k), load_some(x + k, depth - k), sum[1]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The same of whole numbers: what INT8_CHUNK of them sum to gets the scale that they share.
INLINE vec<float> single(const Scaled& w, const float* x, int64_t depth) {
  constexpr int L = LANES<float>;
  vec<float> sum[4] = {};
  const float* scale = w.scales;
  int64_t k = 0, left = w.group;
  auto chunk = [&](vec<float>& to) __attribute__((always_inline)) {
    vec<float> part = widen(w.data + k) * load(x + k);
#pragma GCC unroll 8
    for (int i = L; i < INT8_CHUNK; i += L) part = fma(widen(w.data + k + i), load(x + k + i), part);
    to = fma(part, splat(*scale), to);
    k += INT8_CHUNK;
    if ((left -= INT8_CHUNK) == 0) scale++, left = w.group;
  };
  while (k + 2 * INT8_CHUNK <= depth) chunk(sum[0]), chunk(sum[1]);
  if (k + INT8_CHUNK <= depth) chunk(sum[0]);
  for (; k + L <= depth; k += L) sum[2] = fma(widen(w.data + k) * load(x + k), splat(*scale), sum[2]);
  if (k < depth) sum[3] = widen_some<float>(w.data + k, depth - k) * load_some(x + k, depth - k) * splat(*scale);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// give(output, row, sum) for `count` outputs from `at` on, at most OUTPUTS, and R rows from `row` on, then the others.
template <int R, class T, class W, class F>
INLINE void across(const W (&w)[OUTPUTS], Lines<T> x, int64_t depth, int64_t rows, int64_t at, int64_t count,
                   const F& give, int64_t row = 0) {
  for (; rows - row >= R; row += R) {
    T sums[R][OUTPUTS];
    tile<R>(w, Lines<T>{x[row], x.stride}, depth, row == 0, sums);
    for (int r = 0; r < R; r++)
      for (int64_t m = 0; m < count; m++) give(at + m, row + r, sums[r][m]);
  }
  if constexpr (R > 1)
    if (row < rows) across<R - 1>(w, x, depth, rows, at, count, give, row);
}

// give(output, row, sum) for the outputs [first, end) of W, whose rows have `depth` numbers, and every row of x.
template <class T, class Rows, class F>
INLINE void outputs(Rows weight, Lines<T> x, int64_t depth, int64_t rows, int64_t first, int64_t end, const F& give) {
  if (rows == 1) {
    for (int64_t at = first; at < end; at++) {
      const vec<T> sums[OUTPUTS] = {single(weight[at], x[0], depth)};
      T numbers[OUTPUTS];
      totals(sums, numbers);
      give(at, 0, numbers[0]);
    }
    return;
  }
  for (int64_t at = first; at < end; at += OUTPUTS) {
    const int64_t count = least(OUTPUTS, end - at);
    decltype(weight[0]) w[OUTPUTS];
    for (int m = 0; m < OUTPUTS; m++) w[m] = weight[at + least(m, count - 1)];  // the last one again: it is in a cache
    across<ROWS>(w, x, depth, rows, at, count, give);
  }
}

// f(rows) with the rows of a matrix, `depth` numbers each, as far as they are computed with in T.
template <class T, class F>
INLINE void rows_of(const Matrix& m, int64_t depth, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(Lines<double>{static_cast<const double*>(m.data), m.stride});
  } else {
    if (m.dtype == FLOAT32) f(Lines<float>{static_cast<const float*>(m.data), m.stride});
    if (m.dtype == BFLOAT16) f(Lines<bfloat16>{static_cast<const bfloat16*>(m.data), m.stride});
    if (m.dtype == FLOAT16) f(Lines<float16>{static_cast<const float16*>(m.data), m.stride});
    if (m.dtype == INT8) {
      const int64_t group = m.group < depth ? m.group : up(most(depth, 1), INT8_CHUNK),
                    groups = up(depth, group) / group;
      f(ScaledLines{static_cast<const int8_t*>(m.data), m.stride, static_cast<const float*>(m.scales), groups, group});
    }
  }
}

// The matrix turned: its rows, `outputs` of them with `depth` numbers each, become columns, and zeros follow up to a
// whole vector.
template <class T>
INLINE int64_t turned_size(int64_t depth, int64_t outputs) {
  return depth * up(outputs, LANES<T>);
}
template <class T>
INLINE void turn(const Matrix& m, int64_t depth, int64_t outputs, T* to) {
  const int64_t stride = up(outputs, LANES<T>);
  rows_of<T>(m, depth, [&](auto rows) {
    for (int64_t i = 0; i < stride; i++)
      for (int64_t k = 0; k < depth; k++) to[k * stride + i] = i < outputs ? column<T>(rows[i], k) : T(0);
  });
}

// give(output, row, sum) for all `outputs` of a matrix that was turned, and at most TILE rows of x. The order of a sum
// depends on nothing but its length.
template <class T, class F>
INLINE void outputs_of_turned(const T* turned, Lines<T> x, int64_t depth, int64_t rows, int64_t outputs,
                              const F& give) {
  constexpr int64_t STRIP = 8 * LANES<T>;
  const int64_t stride = up(outputs, LANES<T>);
  alignas(LINE) T sums[TILE * STRIP];
  for (int64_t at = 0; at < outputs; at += STRIP) {
    const int64_t count = least(STRIP, outputs - at);
    gemm<T>({x.data, x.stride, 1}, {turned + at, stride}, {sums, STRIP}, rows, depth, up(count, LANES<T>) / LANES<T>,
            T(0));
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < count; i++) give(at + i, row, sums[row * STRIP + i]);
  }
}

// Outputs [first, end) of every row. x (rows, D) are numbers of type T.
template <class T>
void forward(const Linear& s, const void* x, int64_t first, int64_t end) {
  const Lines<T> rows = {static_cast<const T*>(x), s.inputs};
  const Matrix matrix = {s.weight.data, s.weight.dtype, s.weight.row, s.scales, s.group};
  rows_of<T>(matrix, s.inputs, [&](auto weight) {
    auto give_to = [&](auto* y) {
      outputs(weight, rows, s.inputs, s.rows, first, end,
              [&](int64_t output, int64_t row, T sum) __attribute__((always_inline)) {
                if (s.bias) sum += static_cast<const T*>(s.bias)[output];
                put(y + row * s.y.row + output, sum);
              });
    };
    if (s.y.dtype == FLOAT32) give_to(static_cast<float*>(s.y.data));
    if (s.y.dtype == FLOAT64) give_to(static_cast<double*>(s.y.data));
    if (s.y.dtype == BFLOAT16) give_to(static_cast<bfloat16*>(s.y.data));
    if (s.y.dtype == FLOAT16) give_to(static_cast<float16*>(s.y.data));
  });
}

// The rows of x as numbers of type T, side by side from the beginning of the memory on; without it, the bytes they
// take.
template <class T>
int64_t read_rows(const Linear& s, void* memory) {
  Arena arena(memory);
  T* to = arena.take<T>(s.rows * s.inputs);
  if (!memory) return arena.used();
  for (int64_t row = 0; row < s.rows; row++) copy(s.x, {row, 0, 1, 0, s.inputs, s.inputs}, to + row * s.inputs);
  return 0;
}

}  // namespace dense
}  // namespace DUALFORM_ISA
