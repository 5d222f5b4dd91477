// Products of matrices that lie in a core's cache.
#pragma once

#include "tile.h"

namespace DUALFORM_ISA {

// Where the left factor counts: everywhere, or up to and with the diagonal from the left (LOWER) or from the right
// (UPPER), where it is square. What lies beyond the diagonal is not read, so that what is not finite in the right
// factor goes no further than it should.
enum class Band { FULL, LOWER, UPPER };

// The left factor: read number by number, so that one may stand for its transpose.
template <class T>
struct Left {
  const T* data;
  int64_t row, column;  // strides
};

// A tile of the product that is held in registers: its rows, and vectors of a row.
constexpr int GEMM_ROWS = 6, GEMM_VECTORS = WIDTH == 64 ? 4 : 2;

// Adds column k of a times row k of b to the rows [FIRST, END) of a tile.
template <class T, int V, int FIRST, int END, int M>
INLINE void gemm_column(const Left<T>& a, Rows<const T> b, int64_t k, vec<T> (&sum)[M][V]) {
  vec<T> row[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) row[v] = load(b[k] + v * LANES<T>);
#pragma GCC unroll 8
  for (int m = FIRST; m < END; m++) {
    const vec<T> x = splat(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[m][v] = fma(x, row[v], sum[m][v]);
  }
}

// The columns [K, M) of a tile on the diagonal, which begins at column `at` of a.
template <class T, int V, Band BAND, int M, int K = 0>
INLINE void gemm_diagonal(const Left<T>& a, Rows<const T> b, int64_t at, vec<T> (&sum)[M][V]) {
  constexpr int FIRST = BAND == Band::LOWER ? K : 0, END = BAND == Band::LOWER ? M : K + 1;
  gemm_column<T, V, FIRST, END>(a, b, at + K, sum);
  if constexpr (K + 1 < M) gemm_diagonal<T, V, BAND, M, K + 1>(a, b, at, sum);
}

// M rows from row `at` of c = beta c + a b, V vectors of each; where beta is 0, c is only written.
template <class T, int M, int V, Band BAND>
INLINE void gemm_tile(const Left<T>& a, Rows<const T> b, Rows<T> c, int64_t at, int64_t depth, T beta) {
  constexpr int L = LANES<T>;
  vec<T> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[m][v] = beta == T(0) ? vec<T>{} : load(c[m] + v * L) * beta;
  const int64_t begin = BAND == Band::UPPER ? at + M : 0, end = BAND == Band::LOWER ? at : depth;
  for (int64_t k = begin; k < end; k++) gemm_column<T, V, 0, M>(a, b, k, sum);
  if constexpr (BAND != Band::FULL) gemm_diagonal<T, V, BAND>(a, b, at, sum);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(c[m] + v * L, sum[m][v]);
}

// The rows from m, V vectors of each: M rows at a time, and what is left at once.
template <class T, int M, int V, Band BAND>
INLINE void gemm_rows(Left<T> a, Rows<const T> b, Rows<T> c, int64_t rows, int64_t depth, T beta, int64_t m = 0) {
  for (; rows - m >= M; m += M)
    gemm_tile<T, M, V, BAND>({a.data + m * a.row, a.row, a.column}, b, {c[m], c.stride}, m, depth, beta);
  if constexpr (M > 1)
    if (m < rows) gemm_rows<T, M - 1, V, BAND>(a, b, c, rows, depth, beta, m);
}

// The columns from vector v: V vectors at a time, then half as many.
template <class T, int V, Band BAND>
INLINE void gemm_columns(Left<T> a, Rows<const T> b, Rows<T> c, int64_t rows, int64_t depth, int64_t vectors, T beta,
                         int64_t v = 0) {
  for (; vectors - v >= V; v += V) {
    const int64_t at = v * LANES<T>;
    gemm_rows<T, GEMM_ROWS, V, BAND>(a, {b.data + at, b.stride}, {c.data + at, c.stride}, rows, depth, beta);
  }
  if constexpr (V > 1) gemm_columns<T, V / 2, BAND>(a, b, c, rows, depth, vectors, beta, v);
}

// c = beta c + a b; a is (rows, depth), and a row of b and of c has so many vectors.
template <class T, Band BAND = Band::FULL>
__attribute__((noinline)) static void gemm(Left<T> a, Rows<const T> b, Rows<T> c, int64_t rows, int64_t depth,
                                           int64_t vectors, T beta) {
  gemm_columns<T, GEMM_VECTORS, BAND>(a, b, c, rows, depth, vectors, beta);
}

}  // namespace DUALFORM_ISA
