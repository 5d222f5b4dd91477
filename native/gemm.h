// Products of matrices that lie in a core's cache.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {

// Where a left factor has numbers other than 0: everywhere, or up to the diagonal from the left or from the right. What
// is beyond the diagonal by less than GEMM_ROWS is read and must be 0.
enum class Band { FULL, LOWER, UPPER };

// The left factor: read number by number, so that one may stand for its transpose.
template <class T>
struct Left {
  const T* data;
  int64_t row, column;  // strides
  Band band;
};

// A tile of the product that is held in registers: its rows, and vectors of a row.
constexpr int GEMM_ROWS = 6, GEMM_VECTORS = WIDTH == 64 ? 4 : 2;

// A tile of c = beta c + a b, over the columns [begin, end) of a; where beta is 0, c is only written.
template <class T, int M, int V>
INLINE void gemm_tile(const Left<T>& a, Rows<const T> b, Rows<T> c, int64_t begin, int64_t end, T beta) {
  constexpr int L = LANES<T>;
  vec<T> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[m][v] = beta == T(0) ? vec<T>{} : load(c[m] + v * L) * beta;
  for (int64_t k = begin; k < end; k++) {
    vec<T> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) row[v] = load(b[k] + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const vec<T> x = splat(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[m][v] = fma(x, row[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(c[m] + v * L, sum[m][v]);
}

// The rows from m of a panel of V vectors, M at a time and what is left in one.
template <class T, int M, int V>
INLINE void gemm_rows(Left<T> a, Rows<const T> b, Rows<T> c, int64_t rows, int64_t depth, T beta, int64_t m = 0) {
  for (; rows - m >= M; m += M) {
    const int64_t begin = a.band == Band::UPPER ? m : 0, end = a.band == Band::LOWER ? least(depth, m + M) : depth;
    gemm_tile<T, M, V>({a.data + m * a.row, a.row, a.column, a.band}, b, {c[m], c.stride}, begin, end, beta);
  }
  if constexpr (M > 1)
    if (m < rows) gemm_rows<T, M - 1, V>(a, b, c, rows, depth, beta, m);
}

template <class T, int V>
INLINE void gemm_panels(Left<T> a, Rows<const T> b, Rows<T> c, int64_t rows, int64_t depth, int64_t vectors, T beta,
                        int64_t v = 0) {
  for (; vectors - v >= V; v += V) {
    const int64_t at = v * LANES<T>;
    gemm_rows<T, GEMM_ROWS, V>(a, {b.data + at, b.stride}, {c.data + at, c.stride}, rows, depth, beta);
  }
  if constexpr (V > 1) gemm_panels<T, V / 2>(a, b, c, rows, depth, vectors, beta, v);
}

// c = beta c + a b; a is (rows, depth), and a row of b and c has so many vectors.
template <class T>
__attribute__((noinline)) static void gemm(Left<T> a, Rows<const T> b, Rows<T> c, int64_t rows, int64_t depth,
                                           int64_t vectors, T beta) {
  gemm_panels<T, GEMM_VECTORS>(a, b, c, rows, depth, vectors, beta);
}

}  // namespace DUALFORM_ISA
