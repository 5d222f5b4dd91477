// The Kalman filter, a step after the other. Models of one observation and few states hold a series in every lane of a
// vector, or one series in scalars; others hold the rows of their covariance in vectors. An observation is taken by
// Joseph's form as two changes of rank one, so that the error of the gain enters squared and the covariance stays
// positive semi-definite; correlated ones are made independent first, by the factors of R. While the model of a series
// and the pattern of what is missing do not change, the covariance comes to rest. From where 64 steps together change
// it by no more than rounding does, or in lanes one step does not at all, the steps move the mean alone.
#pragma once

#include <cmath>

#include "tile.h"

namespace DUALFORM_ISA {
namespace kalman {

constexpr int FEW = 4;        // states of a series that lies in one lane
constexpr int64_t SPAN = 64;  // steps between two times of logarithms, and between covariances that are compared
constexpr double LOG_2PI = 1.8378770664093453;

// log(x) within about 2 ulp of its own or of 1, whichever is greater; NaN where x is not positive or not finite.
template <class T>
INLINE vec<T> logarithm(vec<T> x) {
  using bits = typename Simd<T>::bits;
  constexpr int MANTISSA = Exp2<T>::MANTISSA;
  const bits word = (bits)x, ones = (bits)splat(T(1));
  const vec<T> exponent = __builtin_convertvector((word >> MANTISSA) - (ones >> MANTISSA), vec<T>);
  const vec<T> f = (vec<T>)((word & (((bits{} + 1) << MANTISSA) - 1)) | ones) - T(1);
  vec<T> p = splat(Log1p<T>::C[Log1p<T>::TERMS - 1]);
#pragma GCC unroll 32
  for (int i = Log1p<T>::TERMS - 2; i >= 0; i--) p = fma(p, f, splat(Log1p<T>::C[i]));
  p = fma(exponent, splat(T(LN_2)), p * f);
  const vec<T> large = splat(sizeof(T) == 8 ? T(1.7976931348623157e308) : T(3.4028234663852886e38f));
  return (x > 0 && x <= large) ? p : splat(T(NAN));
}

// What is read of a View at one step, for one row.
template <class T>
INLINE const T* at(const View& view, int64_t row, int64_t t) {
  return static_cast<const T*>(view.data) + row * view.row + t * view.time;
}

// Series in lanes: V is a vector, or a number for a single series.
template <class V, class T>
struct Lanes {
  static constexpr int COUNT = sizeof(V) / sizeof(T);
  int64_t rows[COUNT];  // the row of every lane; those behind the last one repeat it
  int64_t count;        // lanes that are written

  Lanes(int64_t first, int64_t end) : count(least(end - first, COUNT)) {
    for (int i = 0; i < COUNT; i++) rows[i] = first + least(i, count - 1);
  }

  // Number i of what each lane has at p + row * stride.
  template <class U>
  INLINE V read(const U* p, int64_t stride, const Lanes& lanes) {
    T found[COUNT];
    for (int i = 0; i < COUNT; i++) found[i] = T(p[lanes.rows[i] * stride]);
    V v;
    memcpy(&v, found, sizeof v);
    return v;
  }
  INLINE void write(T* p, int64_t stride, V v, const Lanes& lanes) {
    T all[COUNT];
    memcpy(all, &v, sizeof v);
    for (int64_t i = 0; i < lanes.count; i++) p[lanes.rows[i] * stride] = all[i];
  }
};

constexpr int half(int i, int j) { return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i; }

// Whether a comparison holds in every lane.
INLINE bool everywhere(bool found) { return found; }
template <class M>
INLINE bool everywhere(M found) {
  auto all = found[0];
  for (size_t i = 1; i < sizeof(M) / sizeof all; i++) all &= found[i];
  return all;
}

// A model of N states and one observation, and what its filter carries.
template <class T, class V, int N>
struct Few {
  V a[N][N], shift[N], q[half(N, 0)], c[N], r;
  V mean[N], cov[half(N, 0)];

  // All of the model, or what of it varies in time.
  INLINE void read(Few& m, const KalmanFilter& s, const Lanes<V, T>& lanes, int64_t t, bool all) {
    auto number = [&](const View& view, int64_t i) {
      return Lanes<V, T>::read(static_cast<const T*>(view.data) + t * view.time + i, view.row, lanes);
    };
    if (all || s.a.time)
      for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) m.a[i][j] = number(s.a, i * N + j);
    if (all || s.shift.time)
      for (int i = 0; i < N; i++) m.shift[i] = number(s.shift, i);
    if (all || s.q.time)
      for (int i = 0; i < N; i++)
        for (int j = 0; j <= i; j++) m.q[half(i, j)] = number(s.q, i * N + j);
    if (all || s.c.time)
      for (int i = 0; i < N; i++) m.c[i] = number(s.c, i);
    if (all || s.r.time) m.r = number(s.r, 0);
  }

  INLINE void predict_mean(Few& m) {
    V moved[N];
    for (int i = 0; i < N; i++) {
      moved[i] = m.shift[i];
      for (int j = 0; j < N; j++) moved[i] += m.a[i][j] * m.mean[j];
    }
    for (int i = 0; i < N; i++) m.mean[i] = moved[i];
  }

  INLINE void predict_cov(Few& m) {
    V ap[N][N];
    for (int i = 0; i < N; i++)
      for (int j = 0; j < N; j++) {
        ap[i][j] = m.a[i][0] * m.cov[half(0, j)];
        for (int k = 1; k < N; k++) ap[i][j] += m.a[i][k] * m.cov[half(k, j)];
      }
    for (int i = 0; i < N; i++)
      for (int j = 0; j <= i; j++) {
        V sum = m.q[half(i, j)];
        for (int k = 0; k < N; k++) sum += ap[i][k] * m.a[j][k];
        m.cov[half(i, j)] = sum;
      }
  }

  // The variance of the observation; `gain` is that of what is seen, and the covariance the one given it.
  INLINE V update_cov(Few& m, V seen, V* gain) {
    V b[N], size = m.r;
    for (int i = 0; i < N; i++) {
      b[i] = m.cov[half(i, 0)] * m.c[0];
      for (int j = 1; j < N; j++) b[i] += m.cov[half(i, j)] * m.c[j];
      size += m.c[i] * b[i];
    }
    for (int i = 0; i < N; i++) gain[i] = seen > 0 ? b[i] / size : seen;
    if constexpr (N == 1) {
      const V left = T(1) - gain[0] * m.c[0];
      m.cov[0] = left * left * m.cov[0] + gain[0] * gain[0] * m.r;
    } else {
      V next[N][N];
      for (int i = 0; i < N; i++) {
        V rest = m.r * gain[i];
        for (int j = 0; j < N; j++) {
          next[i][j] = m.cov[half(i, j)] - gain[i] * b[j];
          rest -= next[i][j] * m.c[j];
        }
        for (int j = 0; j < N; j++) next[i][j] += rest * gain[j];
      }
      for (int i = 0; i < N; i++)
        for (int j = 0; j <= i; j++) m.cov[half(i, j)] = (next[i][j] + next[j][i]) * T(0.5);
    }
    return size;
  }

  INLINE void write(const V* mean, const V* cov, void* means, void* covs, int64_t t, int64_t length,
                    const Lanes<V, T>& lanes) {
    for (int i = 0; i < N; i++) {
      Lanes<V, T>::write(static_cast<T*>(means) + t * N + i, length * N, mean[i], lanes);
      for (int j = 0; j < N; j++)
        Lanes<V, T>::write(static_cast<T*>(covs) + (t * N + i) * N + j, length * N * N, cov[half(i, j)], lanes);
    }
  }
};

// Some series of N states and one observation.
template <class T, class V, int N>
void few(const KalmanFilter& s, int64_t first, int64_t end) {
  using M = Few<T, V, N>;
  constexpr bool ONE = sizeof(V) == sizeof(T);
  const Lanes<V, T> lanes(first, end);
  const int64_t length = s.length;
  const bool constant = !s.a.time && !s.q.time && !s.c.time && !s.r.time;
  const bool varies = !constant || s.shift.time;
  M m;
  V gain[N], size = {}, settled[half(N, 0)], predicted[half(N, 0)];
  for (int i = 0; i < N; i++) {
    m.mean[i] = Lanes<V, T>::read(static_cast<const T*>(s.mean) + i, N, lanes);
    for (int j = 0; j <= i; j++)
      m.cov[half(i, j)] = Lanes<V, T>::read(static_cast<const T*>(s.cov) + i * N + j, N * N, lanes);
  }
  M::read(m, s, lanes, 0, true);
  V sizes[SPAN], squares[SPAN], seen[SPAN], ys[SPAN];
  bool still = false;  // whether another step leaves the covariance as it is
  bool moved[SPAN];
  for (int64_t begin = 0; begin < length; begin += SPAN) {
    const int64_t steps = least(SPAN, length - begin);
    uint8_t whole = 1;  // whether nothing is missing
    for (int64_t row : lanes.rows)
      for (int64_t k = 0; k < steps; k++) whole &= s.seen[row * length + begin + k];
    for (int64_t k = 0; k < steps; k++) {
      seen[k] = whole ? V{} + T(1) : Lanes<V, T>::read(s.seen + begin + k, length, lanes);
      ys[k] = Lanes<V, T>::read(at<T>(s.y, 0, begin + k), s.y.row, lanes);
    }
    for (int64_t k = 0; k < steps; k++) {
      const int64_t t = begin + k;
      if (varies && t > 0) M::read(m, s, lanes, t, false);
      M::predict_mean(m);
      V v = ys[k];
      for (int i = 0; i < N; i++) v -= m.c[i] * m.mean[i];
      const bool known = whole || everywhere(seen[k] > 0);
      moved[k] = !(still && known);
      if (moved[k]) {
        for (int i = 0; i < half(N, 0); i++) settled[i] = m.cov[i];
        M::predict_cov(m);
        for (int i = 0; i < half(N, 0); i++) predicted[i] = m.cov[i];
        size = M::update_cov(m, seen[k], gain);
        still = constant && known;
        for (int i = 0; i < half(N, 0); i++) still = still && everywhere(settled[i] == m.cov[i]);
      }
      if (s.means) M::write(m.mean, predicted, s.predicted_means, s.predicted_covs, t, length, lanes);
      for (int i = 0; i < N; i++) m.mean[i] += seen[k] > 0 ? gain[i] * v : V{};
      if (s.means) M::write(m.mean, m.cov, s.means, s.covs, t, length, lanes);
      sizes[k] = size, squares[k] = v * v;
    }
    T* out = static_cast<T*>(s.loglik) + begin;
    if constexpr (ONE) {
      T found[SPAN];
      for (int64_t k = steps; k < up(steps, LANES<T>); k++) sizes[k] = 1, squares[k] = 0, seen[k] = 0;
      for (int64_t k = 0; k < steps; k += LANES<T>) {
        const vec<T> variance = load(sizes + k);
        const vec<T> term = (logarithm<T>(variance) + load(squares + k) / variance + T(LOG_2PI)) * T(-0.5);
        store(found + k, load(seen + k) > 0 ? term : vec<T>{});
      }
      memcpy(out + lanes.rows[0] * length, found, steps * sizeof(T));
    } else {
      V constants, inverse;
      for (int64_t k = 0; k < steps; k++) {
        if (k == 0 || moved[k]) constants = logarithm<T>(sizes[k]) + T(LOG_2PI), inverse = T(1) / sizes[k];
        const V term = (constants + squares[k] * inverse) * T(-0.5);
        Lanes<V, T>::write(out + k, length, seen[k] > 0 ? term : V{}, lanes);
      }
    }
  }
  M::write(m.mean, m.cov, s.last_mean, s.last_cov, 0, 1, lanes);
}

template <class T, int N>
void all_few(const KalmanFilter& s, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; i += LANES<T>) end - i == 1 ? few<T, T, N>(s, i, end) : few<T, vec<T>, N>(s, i, end);
}

// Row i of `out`, which has `rows` of them, is row i of `start`, or zero, plus the sum over j of the coefficients times
// the rows of x. A row has `wide` numbers, whole vectors. The coefficients of a row are those of its list, (index,
// value), or all N.
template <class T, int VECTORS>
INLINE void product(const T* values, const int32_t* indices, const int32_t* counts, const T* x, const T* start, T* out,
                    int64_t rows, int64_t n, int64_t wide, int64_t column) {
  constexpr int L = LANES<T>;
  for (int64_t i = 0; i < rows; i++) {
    const T* value = values + i * wide;
    const int64_t count = counts ? counts[i] : n;
    vec<T> sum[VECTORS];
    for (int k = 0; k < VECTORS; k++) sum[k] = start ? load(start + i * wide + column + k * L) : vec<T>{};
    for (int64_t j = 0; j < count; j++) {
      const T* row = x + (counts ? indices[i * wide + j] : j) * wide + column;
      for (int k = 0; k < VECTORS; k++) sum[k] = fma(splat(value[j]), load(row + k * L), sum[k]);
    }
    for (int k = 0; k < VECTORS; k++) store(out + i * wide + column + k * L, sum[k]);
  }
}
template <class T>
INLINE void products(const T* values, const int32_t* indices, const int32_t* counts, const T* x, const T* start, T* out,
                     int64_t rows, int64_t n, int64_t wide) {
  const int64_t vectors = wide / LANES<T>;
  for (int64_t k = 0; k < vectors; k += 4) {
    const int64_t column = k * LANES<T>;
    switch (least(vectors - k, 4)) {
      case 1:
        product<T, 1>(values, indices, counts, x, start, out, rows, n, wide, column);
        break;
      case 2:
        product<T, 2>(values, indices, counts, x, start, out, rows, n, wide, column);
        break;
      case 3:
        product<T, 3>(values, indices, counts, x, start, out, rows, n, wide, column);
        break;
      default:
        product<T, 4>(values, indices, counts, x, start, out, rows, n, wide, column);
    }
  }
}

// A series of any size. Rows of matrices are `wide` numbers apart, and zero behind the last column.
template <class T>
struct Many {
  int64_t n, m, wide;
  // The model: A by its numbers that are not zero, and transposed; Q; the rows of C that are seen, made independent of
  // each other, by their numbers that are not zero; their variances; and L of the seen part of R = L D L^T.
  T *a, *turned, *q, *c, *given_c, *r, *l, *variances;
  int32_t *a_indices, *a_counts, *c_indices, *c_counts, *which;
  int64_t seen;
  bool correlated;
  T *mean, *moved, *cov, *work, *before, *gains, *sizes, *b, *y, *least_sizes;

  Many(const KalmanFilter& s, Arena& arena) : n(s.states), m(s.observed), wide(up(s.states, LANES<T>)) {
    for (T** matrix : {&a, &turned, &q, &cov, &work, &before}) *matrix = arena.take<T>(n * wide);
    for (T** rows : {&c, &given_c, &gains}) *rows = arena.take<T>(m * wide);
    r = arena.take<T>(m * m), l = arena.take<T>(m * m);
    for (T** line : {&variances, &sizes, &y, &least_sizes}) *line = arena.take<T>(m);
    for (T** line : {&mean, &moved, &b}) *line = arena.take<T>(wide);
    a_indices = arena.take<int32_t>(n * wide), a_counts = arena.take<int32_t>(n);
    c_indices = arena.take<int32_t>(m * wide), c_counts = arena.take<int32_t>(m);
    which = arena.take<int32_t>(m);
  }

  void copy(const T* from, T* to, int64_t rows) const {
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < n; j++) to[i * wide + j] = from[i * n + j];
      for (int64_t j = n; j < wide; j++) to[i * wide + j] = 0;
    }
  }

  // The numbers of a row that are not zero, in front of each other.
  void compress(const T* from, T* values, int32_t* indices, int32_t* count) const {
    *count = 0;
    for (int64_t j = 0; j < n; j++)
      if (from[j] != 0) values[*count] = from[j], indices[*count] = int32_t(j), ++*count;
  }

  void read_a(const T* from) {
    for (int64_t i = 0; i < n; i++) compress(from + i * n, a + i * wide, a_indices + i * wide, a_counts + i);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < wide; j++) turned[i * wide + j] = j < n ? from[j * n + i] : T(0);
  }

  // What is seen of C and R.
  void choose(const uint8_t* mask) {
    seen = 0;
    for (int64_t i = 0; i < m; i++)
      if (mask[i]) which[seen++] = int32_t(i);
    correlated = false;
    for (int64_t i = 0; i < seen; i++)
      for (int64_t j = 0; j < i; j++) correlated = correlated || r[which[i] * m + which[j]] != 0;
    for (int64_t i = 0; i < seen; i++)
      for (int64_t j = 0; j <= i; j++) l[i * m + j] = r[which[i] * m + which[j]];
    for (int64_t i = 0; i < seen; i++) memcpy(b, given_c + which[i] * wide, wide * sizeof(T)), spread(i);
  }

  // Row i of L and of L^-1 C, from row i of C in b.
  void spread(int64_t i) {
    const T floor = T(m) * (sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7f)) * l[i * m + i];
    T variance = l[i * m + i];
    if (correlated)
      for (int64_t j = 0; j < i; j++) {
        T sum = l[i * m + j];
        for (int64_t k = 0; k < j; k++) sum -= l[i * m + k] * l[j * m + k] * variances[k];
        const T factor = variances[j] > 0 ? sum / variances[j] : T(0);
        l[i * m + j] = factor;
        variance -= factor * factor * variances[j];
        for (int32_t k = 0; k < c_counts[j]; k++) b[c_indices[j * wide + k]] -= factor * c[j * wide + k];
      }
    variances[i] = correlated && !(variance > floor) ? T(0) : variance;
    compress(b, c + i * wide, c_indices + i * wide, c_counts + i);
  }

  void symmetric() const {
    for (int64_t i = 1; i < n; i++)
      for (int64_t j = 0; j < i; j++)
        cov[i * wide + j] = cov[j * wide + i] = (cov[i * wide + j] + cov[j * wide + i]) * T(0.5);
  }

  void predict_mean(const T* shift) {
    for (int64_t i = 0; i < n; i++) {
      T sum = shift[i];
      for (int32_t j = 0; j < a_counts[i]; j++) sum += a[i * wide + j] * mean[a_indices[i * wide + j]];
      moved[i] = sum;
    }
    memcpy(mean, moved, n * sizeof(T));
  }

  void predict_cov() {
    products<T>(a, a_indices, a_counts, cov, nullptr, work, n, n, wide);
    products<T>(work, nullptr, nullptr, turned, q, cov, n, n, wide);
    symmetric();
  }

  // Whether the covariance is the one in `before`, but for rounding: within n units in the last place of the
  // standard deviations.
  bool settled() const {
    const T units = T(n) * (sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7f));
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j <= i; j++) {
        const T scale = std::sqrt(cov[i * wide + i]) * std::sqrt(cov[j * wide + j]);
        if (!(std::abs(cov[i * wide + j] - before[i * wide + j]) <= units * scale)) return false;
      }
    return true;
  }

  // c_i cov into b, and c_i cov c_i^T.
  T seen_by(int64_t i) const {
    constexpr int L = LANES<T>;
    const int32_t* at = c_indices + i * wide;
    for (int64_t k = 0; k < wide; k += L) {
      vec<T> sum = {};
      for (int32_t j = 0; j < c_counts[i]; j++) sum = fma(splat(c[i * wide + j]), load(cov + at[j] * wide + k), sum);
      store(b + k, sum);
    }
    T size = 0;
    for (int32_t j = 0; j < c_counts[i]; j++) size += c[i * wide + j] * b[at[j]];
    return size;
  }

  // The least variances that the observations must have, given those before: those of rounding.
  void bounds() {
    const T eps = sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7f);
    for (int64_t i = 0; i < seen; i++) {
      T size = r[which[i] * m + which[i]];
      const T* row = given_c + which[i] * wide;
      if (seen == 1) {
        least_sizes[i] = 0;
        continue;
      }
      for (int64_t j = 0; j < n; j++)
        if (row[j] != 0) {
          T sum = 0;
          for (int64_t k = 0; k < n; k++) sum += cov[j * wide + k] * row[k];
          size += row[j] * sum;
        }
      least_sizes[i] = 16 * eps * size;
    }
  }

  // False where one has no variance.
  bool update_cov() {
    constexpr int L = LANES<T>;
    bounds();
    for (int64_t i = 0; i < seen; i++) {
      const T* value = c + i * wide;
      const int32_t *at = c_indices + i * wide, count = c_counts[i];
      const T size = seen_by(i) + variances[i];
      if (!(size > least_sizes[i])) return false;
      T* gain = gains + i * wide;
      for (int64_t k = 0; k < wide; k += L) store(gain + k, load(b + k) / splat(size));
      sizes[i] = size;
      for (int64_t j = 0; j < n; j++) {
        T *row = cov + j * wide, rest = variances[i] * gain[j];
        for (int32_t k = 0; k < count; k++) rest -= (row[at[k]] - gain[j] * b[at[k]]) * value[k];
        for (int64_t k = 0; k < wide; k += L) {
          const vec<T> half = load(row + k) - splat(gain[j]) * load(b + k);
          store(row + k, fma(splat(rest), load(gain + k), half));
        }
      }
      symmetric();
    }
    return true;
  }

  // The sum of squared innovations over their variances.
  T update_mean(const T* given) {
    T distance = 0;
    for (int64_t i = 0; i < seen; i++) {
      y[i] = given[which[i]];
      if (correlated)
        for (int64_t j = 0; j < i; j++) y[i] -= l[i * m + j] * y[j];
    }
    for (int64_t i = 0; i < seen; i++) {
      T v = y[i];
      for (int32_t k = 0; k < c_counts[i]; k++) v -= c[i * wide + k] * mean[c_indices[i * wide + k]];
      for (int64_t k = 0; k < n; k++) mean[k] += gains[i * wide + k] * v;
      distance += v * v / sizes[i];
    }
    return distance;
  }

  void write(const T* covs, void* to_mean, void* to_cov, int64_t step) const {
    memcpy(static_cast<T*>(to_mean) + step * n, mean, n * sizeof(T));
    for (int64_t i = 0; i < n; i++)
      memcpy(static_cast<T*>(to_cov) + (step * n + i) * n, covs + i * wide, n * sizeof(T));
  }
};

template <class T>
void many(const KalmanFilter& s, int64_t row, Many<T>& f) {
  const int64_t n = s.states, m = s.observed, length = s.length, size = n * f.wide * int64_t(sizeof(T));
  T* loglik = static_cast<T*>(s.loglik) + row * length;
  memcpy(f.mean, static_cast<const T*>(s.mean) + row * n, n * sizeof(T));
  f.copy(static_cast<const T*>(s.cov) + row * n * n, f.cov, n);
  f.symmetric();
  int64_t alike = 0;   // steps of the same model before
  bool still = false;  // whether the covariance has come to rest
  T logs = 0;
  for (int64_t t = 0; t < length; t++) {
    // Whether a part of the model is not that of the step before.
    auto changed = [&](const View& view, int64_t numbers) {
      if (t == 0) return true;
      return view.time && memcmp(at<T>(view, row, t), at<T>(view, row, t - 1), numbers * sizeof(T)) != 0;
    };
    const uint8_t* mask = s.seen + (row * length + t) * m;
    const bool a = changed(s.a, n * n), q = changed(s.q, n * n), c = changed(s.c, m * n), r = changed(s.r, m * m);
    if (a) f.read_a(at<T>(s.a, row, t));
    if (q) f.copy(at<T>(s.q, row, t), f.q, n);
    if (c) f.copy(at<T>(s.c, row, t), f.given_c, m);
    if (r) memcpy(f.r, at<T>(s.r, row, t), m * m * sizeof(T));
    const bool chosen = c || r || memcmp(mask, mask - m, m) != 0;
    if (chosen) f.choose(mask);
    if (a || q || chosen) still = false, alike = 0;
    f.predict_mean(at<T>(s.shift, row, t));
    if (!still) {
      f.predict_cov();
      if (s.means) f.write(f.cov, s.predicted_means, s.predicted_covs, row * length + t);
      if (!f.update_cov()) {
        for (int64_t k = t; k < length; k++) loglik[k] = T(NAN);
        break;
      }
      logs = T(f.seen) * T(LOG_2PI);
      for (int64_t i = 0; i < f.seen; i++) logs += std::log(f.sizes[i]);
      if (++alike % SPAN == 0) {
        still = alike > SPAN && f.settled();
        memcpy(f.before, f.cov, size);
      }
    } else if (s.means) {
      const T* last = static_cast<const T*>(s.predicted_covs) + (row * length + t - 1) * n * n;
      memcpy(static_cast<T*>(s.predicted_means) + (row * length + t) * n, f.mean, n * sizeof(T));
      memcpy(static_cast<T*>(s.predicted_covs) + (row * length + t) * n * n, last, n * n * sizeof(T));
    }
    loglik[t] = (f.update_mean(at<T>(s.y, row, t)) + logs) * T(-0.5);
    if (s.means) f.write(f.cov, s.means, s.covs, row * length + t);
  }
  f.write(f.cov, s.last_mean, s.last_cov, row);
}

// The series [first, end).
template <class T>
int64_t forward(const KalmanFilter& s, int64_t first, int64_t end, void* memory) {
  Arena arena(memory);
  Many<T> f(s, arena);
  if (!memory) return arena.used();
  if (s.observed == 1 && s.states <= FEW) {
    switch (s.states) {
      case 1:
        all_few<T, 1>(s, first, end);
        break;
      case 2:
        all_few<T, 2>(s, first, end);
        break;
      case 3:
        all_few<T, 3>(s, first, end);
        break;
      default:
        all_few<T, 4>(s, first, end);
    }
    return 0;
  }
  for (int64_t row = first; row < end; row++) many<T>(s, row, f);
  return 0;
}

}  // namespace kalman
}  // namespace DUALFORM_ISA
