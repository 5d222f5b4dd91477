// What goes over a filtered series from its last step to the first: the gradient, and the smoother. Both carry a matrix
// through L = I - K C from a state to its prediction, L^T G L, and to the state before, A^T G A. Models of one
// observation and few states hold a series in every lane of a vector, as in the filter.
#pragma once

#include "kalman.h"

namespace DUALFORM_ISA {
namespace kalman {

// States, observations, and how far rows of matrices are apart; N and M = 1 are known to the compiler, or N is 0.
template <int N, int L>
struct Sizes {
  static constexpr int64_t n = N, m = 1, wide = N;
  explicit Sizes(const KalmanFilter&) {}
};
template <int L>
struct Sizes<0, L> {
  const int64_t n, m, wide;
  explicit Sizes(const KalmanFilter& s) : n(s.states), m(s.observed), wide(up(s.states, L)) {}
};

// Rows of matrices are zero behind the last column.
template <class T, class V, int N>
struct Reverse : Sizes<N, sizeof(V) == sizeof(T) ? LANES<T> : 1> {
  static constexpr bool ONE = sizeof(V) == sizeof(T);
  static constexpr int L = LANES<T>;
  using Size = Sizes<N, ONE ? L : 1>;
  using Size::n, Size::m, Size::wide;
  const KalmanFilter& s;
  Lanes<V, T> lanes{0, 1};
  // The model at a step, with what is missing made uninformative; the predicted covariance and the one before it.
  V *a, *q, *c, *r, *p, *before, *mean, *moved;
  // F = C P C^T + R as its factors L D L^T and its inverse, K^T, e = F^-1 v, and the mask.
  V *f, *d, *inverse, *gain, *e, *seen;
  V *g, *back, *turned, *u, *work, *other, *more, *again;  // what is carried, and room for products
  // A and A^T by their numbers that are not zero, where rows are vectors.
  static constexpr bool LISTS = ONE && N == 0;
  V* of_a[2];
  int32_t *indices[2], *counts[2];
  bool has_model = false;

  Reverse(const KalmanFilter& of, Arena& arena) : Size(of), s(of) {
    for (V** matrix : {&a, &q, &p, &before, &g, &turned, &work, &other}) *matrix = arena.take<V>(n * wide);
    for (V** rows : {&c, &gain, &more, &again}) *rows = arena.take<V>(m * wide);
    for (V** matrix : {&r, &f, &inverse}) *matrix = arena.take<V>(m * m);
    for (V** line : {&d, &e, &seen, &u}) *line = arena.take<V>(m);
    for (V** line : {&mean, &moved, &back}) *line = arena.take<V>(wide);
    for (int i = 0; LISTS && i < 2; i++) {
      of_a[i] = arena.take<V>(n * wide);
      indices[i] = arena.take<int32_t>(n * wide), counts[i] = arena.take<int32_t>(n);
    }
  }

  static V zero() { return V{}; }

  // out += factor x, of one row.
  INLINE void add(V* out, V factor, const V* x, int64_t width) {
    if constexpr (ONE && N == 0) {
      for (int64_t k = 0; k < width; k += L) store(out + k, fma(splat(factor), load(x + k), load(out + k)));
    } else {
      for (int64_t k = 0; k < width; k++) out[k] += factor * x[k];
    }
  }
  INLINE bool is_zero(V x) {
    if constexpr (ONE) return x == 0;
    return false;
  }
  V dot(const V* x, const V* y) const {
    V sum = zero();
    for (int64_t k = 0; k < n; k++) sum += x[k] * y[k];
    return sum;
  }
  void clear(V* x, int64_t numbers) const {
    for (int64_t i = 0; i < numbers; i++) x[i] = zero();
  }
  // out = X Y of `rows` rows, of Y with n.
  void product(const V* x, const V* y, V* out, int64_t rows) const {
    if constexpr (LISTS) {
      products<T>(x, nullptr, nullptr, y, nullptr, out, rows, n, wide);
    } else {
      clear(out, rows * wide);
      for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < n; k++) add(out + i * wide, x[i * wide + k], y + k * wide, wide);
    }
  }
  // out = A Y, or A^T Y.
  template <bool TURNED>
  void product_a(const V* y, V* out) const {
    if constexpr (LISTS) {
      products<T>(of_a[TURNED], indices[TURNED], counts[TURNED], y, nullptr, out, n, n, wide);
    } else if (TURNED) {
      clear(out, n * wide);
      add_turned(a, y, out, n, T(1));
    } else {
      product(a, y, out, n);
    }
  }
  // out += factor X^T Y, of as many rows each.
  void add_turned(const V* x, const V* y, V* out, int64_t rows, T factor) const {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < n; j++)
        if (!is_zero(x[i * wide + j])) add(out + j * wide, x[i * wide + j] * factor, y + i * wide, wide);
  }
  void turn(const V* x, V* out) const {
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < n; j++) out[j * wide + i] = x[i * wide + j];
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = n; j < wide; j++) out[i * wide + j] = zero();
  }
  void symmetric(V* x) const {
    for (int64_t i = 1; i < n; i++)
      for (int64_t j = 0; j < i; j++) x[i * wide + j] = x[j * wide + i] = (x[i * wide + j] + x[j * wide + i]) * T(0.5);
  }

  // `rows` x `columns` numbers of each lane, that lie `at` numbers behind data + lane * row; whether a single series
  // had the same ones.
  INLINE bool read(const void* data, int64_t row, int64_t at, V* to, int64_t rows, int64_t columns, int64_t stride,
                   const Lanes<V, T>& lanes) {
    const T* from = static_cast<const T*>(data) + at;
    if constexpr (ONE) from += lanes.rows[0] * row;
    bool differs = !ONE;
    typename Simd<T>::bits changes = {};
    for (int64_t i = 0; i < rows; i++) {
      V* __restrict line = to + i * stride;
      const T* __restrict given = from + i * columns;
      if constexpr (ONE) {
        int64_t j = 0;
        for (; LISTS && j + L <= columns; j += L) {
          changes |= load(given + j) != load(line + j);
          store(line + j, load(given + j));
        }
        for (; j < columns; j++) differs |= line[j] != given[j], line[j] = given[j];
      } else {
        for (int64_t j = 0; j < columns; j++) line[j] = Lanes<V, T>::read(given + j, row, lanes);
      }
      for (int64_t j = columns; j < stride; j++) line[j] = V{};
    }
    for (int i = 0; LISTS && i < L; i++) differs |= changes[i] != 0;
    return !differs;
  }
  // Of a view, or of a contiguous tensor (rows, T, ...), at step t.
  bool read(const View& view, int64_t t, V* to, int64_t rows, int64_t columns, int64_t stride) const {
    return read(view.data, view.row, t * view.time, to, rows, columns, stride, lanes);
  }
  bool read(const void* data, int64_t t, V* to, int64_t rows, int64_t columns, int64_t stride) const {
    return read(data, s.length * rows * columns, t * rows * columns, to, rows, columns, stride, lanes);
  }
  void write(void* data, int64_t length, int64_t t, const V* from, int64_t rows, int64_t columns,
             int64_t stride) const {
    if (!data) return;
    T* to = static_cast<T*>(data) + t * rows * columns;
    const int64_t row = length * rows * columns;
    if constexpr (ONE) to += lanes.rows[0] * row;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) {
        if constexpr (ONE)
          to[i * columns + j] = from[i * stride + j];
        else
          Lanes<V, T>::write(to + i * columns + j, row, from[i * stride + j], lanes);
      }
  }
  void write_matrix(void* data, int64_t t, const V* from) const { write(data, s.length, t, from, n, n, wide); }
  void write_line(void* data, int64_t t, const V* from) const { write(data, s.length, t, from, 1, n, wide); }

  // The state before step t, that of the filter.
  bool read_before(int64_t t) {
    if (t > 0) {
      read(s.means, t - 1, mean, 1, n, wide);
      return read(s.covs, t - 1, before, n, n, wide);
    }
    read(s.mean, n, 0, mean, 1, n, wide, lanes);
    return read(s.cov, n * n, 0, before, n, n, wide, lanes);
  }
  bool constant() const { return !s.a.time && !s.q.time && !s.c.time && !s.r.time; }

  void read_transition(int64_t t, bool noise) {
    if (!has_model || s.a.time) {
      read(s.a, t, a, n, n, wide);
      if constexpr (LISTS) {
        turn(a, turned);
        list(a, 0), list(turned, 1);
      }
    }
    if (noise && (!has_model || s.q.time)) read(s.q, t, q, n, n, wide);
    has_model = true;
  }

  void list(const V* x, int which) {
    for (int64_t i = 0; i < n; i++) {
      int32_t& count = counts[which][i] = 0;
      for (int64_t j = 0; j < n; j++)
        if (!is_zero(x[i * wide + j]))
          of_a[which][i * wide + count] = x[i * wide + j], indices[which][i * wide + count] = int32_t(j), count++;
    }
  }

  // C, R and the mask of step t; whether the mask is that of the step read before.
  bool read_observation(int64_t t) {
    bool same = true;
    for (int64_t i = 0; i < m; i++) {
      const V now = Lanes<V, T>::read(s.seen + t * m + i, s.length * m, lanes);
      if constexpr (ONE) same = same && now == seen[i];
      seen[i] = now;
    }
    if (ONE && same && has_model && !s.c.time && !s.r.time) return true;
    read(s.c, t, c, m, n, wide), read(s.r, t, r, m, m, m);
    for (int64_t i = 0; i < m; i++) {
      for (int64_t j = 0; j < n; j++) c[i * wide + j] = seen[i] > 0 ? c[i * wide + j] : zero();
      for (int64_t j = 0; j < m; j++) {
        const V both = seen[i] * seen[j];
        r[i * m + j] = both > 0 ? r[i * m + j] : zero() + T(i == j);
      }
    }
    return ONE && same;
  }

  // F, its inverse, and K^T = F^-1 C P.
  void gains() {
    product(c, p, gain, m);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < m; j++) {
        V sum = r[i * m + j];
        for (int64_t k = 0; k < n; k++) sum += gain[i * wide + k] * c[j * wide + k];
        f[i * m + j] = sum, inverse[i * m + j] = zero() + T(i == j);
      }
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j <= i; j++) {
        V sum = f[i * m + j];
        for (int64_t k = 0; k < j; k++) sum -= f[i * m + k] * d[k] * f[j * m + k];
        (i == j ? d[i] : f[i * m + j]) = i == j ? sum : sum / d[j];
      }
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < i; j++) {
        for (int64_t k = 0; k < n; k++) gain[i * wide + k] -= f[i * m + j] * gain[j * wide + k];
        for (int64_t k = 0; k < m; k++) inverse[i * m + k] -= f[i * m + j] * inverse[j * m + k];
      }
    for (int64_t i = m - 1; i >= 0; i--) {
      for (int64_t k = 0; k < n; k++) gain[i * wide + k] = gain[i * wide + k] / d[i];
      for (int64_t k = 0; k < m; k++) inverse[i * m + k] = inverse[i * m + k] / d[i];
      for (int64_t j = i + 1; j < m; j++) {
        for (int64_t k = 0; k < n; k++) gain[i * wide + k] -= f[j * m + i] * gain[j * wide + k];
        for (int64_t k = 0; k < m; k++) inverse[i * m + k] -= f[j * m + i] * inverse[j * m + k];
      }
    }
  }

  // e = F^-1 (y - C m) of step t; `moved` is the predicted mean.
  void innovation(int64_t t) {
    read(s.predicted_means, t, moved, 1, n, wide);
    for (int64_t i = 0; i < m; i++) e[i] = zero();
    for (int64_t i = 0; i < m; i++) {
      const V y = Lanes<V, T>::read(static_cast<const T*>(s.y.data) + t * s.y.time + i, s.y.row, lanes);
      const V v = seen[i] > 0 ? y - dot(c + i * wide, moved) : zero();
      for (int64_t j = 0; j < m; j++) e[j] += inverse[j * m + i] * v;
    }
  }

  // G = L^T G L, and `more` is K^T G of the G before. One factor after the other, so that the error of the first
  // product shrinks by the second.
  void through_gain() {
    product(gain, g, more, m);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < m; j++) add(g + i * wide, -more[j * wide + i], c + j * wide, wide);
    product(gain, g, again, m);
    add_turned(c, again, g, m, T(-1));
  }

  // G = A^T G A, by `turned` = G A, and back = A^T back.
  void through_transition() {
    product_a<true>(g, other);
    turn(other, turned);
    product_a<true>(turned, g);
    symmetric(g);
    through_transition(back);
  }
  void through_transition(V* line) {
    product(line, a, other, 1);
    for (int64_t k = 0; k < wide; k++) line[k] = other[k];
  }

  // back = L^T back + weight C^T e, by u = weight e - K^T back.
  void through_observation(V weight) {
    for (int64_t i = 0; i < m; i++) u[i] = weight * e[i] - dot(gain + i * wide, back);
    for (int64_t i = 0; i < m; i++) add(back, u[i], c + i * wide, wide);
  }
};

// The gradient: `back` and `g` are that of the mean and of the covariance.
template <class T, class V, int N>
struct Gradient : Reverse<T, V, N> {
  using Base = Reverse<T, V, N>;
  using Base::a, Base::c, Base::p, Base::before, Base::mean, Base::moved, Base::e, Base::u, Base::g, Base::back;
  using Base::n, Base::m, Base::wide, Base::s, Base::lanes, Base::gain, Base::inverse, Base::turned, Base::work;
  using Base::other, Base::more, Base::seen;
  V *dr, *dc, *after, *line, *old;

  Gradient(const KalmanFilter& of, Arena& arena) : Base(of, arena) {
    dr = arena.take<V>(m * m), dc = arena.take<V>(m * wide), after = arena.take<V>(n * wide);
    line = arena.take<V>(wide), old = arena.take<V>(wide);
  }

  // Gradients that come from the moments of step t.
  void add_moments(const void* lines, const void* matrices, int64_t t) {
    if (!lines) return;
    this->read(lines, t, line, 1, n, wide), this->read(matrices, t, other, n, n, wide);
    this->add(back, V{} + T(1), line, wide);
    this->symmetric(other);
    for (int64_t i = 0; i < n * wide; i++) g[i] += other[i];
  }

  // Those of R, C and y, and `back` and `g` before the observation of step t; after it, `mean` and `after` are.
  void observe(int64_t t) {
    const V weight = Lanes<V, T>::read(static_cast<const T*>(s.dloglik) + t, s.length, lanes);
    for (int64_t k = 0; k < wide; k++) old[k] = back[k];
    this->through_observation(weight);
    this->through_gain();  // `more` is K^T G, of the G after the observation
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < m; j++) {
        const V ki = weight * e[i] - u[i], kj = weight * e[j] - u[j];  // K^T back
        const V pairs = weight * (e[i] * e[j] - inverse[i * m + j]) - ki * e[j] - e[i] * kj;
        dr[i * m + j] = this->dot(more + i * wide, gain + j * wide) + pairs * T(0.5);
      }
    // G += (z x^T + x z^T + weight x x^T) / 2 - weight C^T F^-1 C / 2, with z = L^T back and x = C^T e
    this->clear(line, wide);
    for (int64_t i = 0; i < m; i++) this->add(line, e[i], c + i * wide, wide);
    for (int64_t i = 0; i < n; i++) {
      // back is L^T back + weight x by now
      this->add(g + i * wide, line[i] * T(0.5), back, wide);
      this->add(g + i * wide, (back[i] - weight * line[i]) * T(0.5), line, wide);
    }
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < m; j++) {
        const V factor = inverse[i * m + j] * weight * T(-0.5);
        for (int64_t k = 0; k < n; k++) this->add(g + k * wide, c[i * wide + k] * factor, c + j * wide, wide);
      }
    this->symmetric(g);
    write_observation(t, weight);
  }

  void write_observation(int64_t t, V weight) {
    if (s.dy)
      for (int64_t i = 0; i < m; i++)
        Lanes<V, T>::write(static_cast<T*>(s.dy) + t * m + i, s.length * m, seen[i] > 0 ? -u[i] : V{}, lanes);
    if (s.dc) {
      this->product(more, after, dc, m);  // K^T G P
      for (int64_t k = 0; k < n; k++) line[k] = this->dot(after + k * wide, old);
      for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < n; k++) {
          const V rest = e[i] * line[k] - T(2) * dc[i * wide + k] - weight * gain[i * wide + k];
          dc[i * wide + k] = seen[i] > 0 ? u[i] * mean[k] + rest : V{};
        }
      this->write(s.dc, s.length, t, dc, m, n, wide);
    }
    if (s.dr) {
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < m; j++) dr[i * m + j] = seen[i] * seen[j] > 0 ? dr[i * m + j] : V{};
      this->write(s.dr, s.length, t, dr, m, m, m);
    }
  }

  void run(int64_t first, int64_t end) {
    lanes = Lanes<V, T>(first, end);
    this->has_model = false;
    this->read(s.dlast_mean, n, 0, back, 1, n, wide, lanes);
    this->read(s.dlast_cov, n * n, 0, g, n, n, wide, lanes);
    this->symmetric(g);
    this->read_before(s.length);
    for (int64_t t = s.length - 1; t >= 0; t--) {
      add_moments(s.dmeans, s.dcovs, t);
      for (int64_t i = 0; i < n * wide; i++) after[i] = before[i];
      const bool same = this->read(s.predicted_covs, t, p, n, n, wide), seen_same = this->read_observation(t);
      if (!same || !seen_same || s.c.time || s.r.time || t == s.length - 1) this->gains();
      this->read_transition(t, false), this->innovation(t);
      observe(t);
      add_moments(s.dpredicted_means, s.dpredicted_covs, t);
      this->write_line(s.dshift, t, back), this->write_matrix(s.dq, t, g);
      for (int64_t k = 0; k < wide; k++) old[k] = back[k];
      this->through_transition();
      this->read_before(t);
      if (s.da) {
        this->product(turned, before, work, n);
        for (int64_t i = 0; i < n; i++)
          for (int64_t j = 0; j < n; j++) work[i * wide + j] = T(2) * work[i * wide + j] + old[i] * mean[j];
        this->write_matrix(s.da, t, work);
      }
    }
    this->write(s.dmean, 1, 0, back, 1, n, wide);
    this->write(s.dcov, 1, 0, g, n, n, wide);
  }
};

// The series [first, end), by a Gradient or a Smoother.
template <template <class, class, int> class Run, class T, int N>
void few_back(const KalmanFilter& s, int64_t first, int64_t end, void* memory) {
  for (int64_t i = first; i < end; i += LANES<T>) {
    Arena arena(memory);
    if (end - i == 1)
      Run<T, T, N>(s, arena).run(i, end);
    else
      Run<T, vec<T>, N>(s, arena).run(i, end);
  }
}

template <template <class, class, int> class Run, class T>
int64_t reverse(const KalmanFilter& s, int64_t first, int64_t end, void* memory) {
  const bool is_few = s.observed == 1 && s.states <= FEW;
  if (!memory) {
    Arena single(nullptr), lanes(nullptr);
    Run<T, T, 0> one(s, single);
    if (is_few) Run<T, vec<T>, 0> several(s, lanes);
    return single.used() > lanes.used() ? single.used() : lanes.used();
  }
  if (is_few && s.states == 1) {
    few_back<Run, T, 1>(s, first, end, memory);
  } else if (is_few && s.states == 2) {
    few_back<Run, T, 2>(s, first, end, memory);
  } else if (is_few) {
    few_back<Run, T, 0>(s, first, end, memory);
  } else {
    Arena arena(memory);
    Run<T, T, 0> run(s, arena);
    for (int64_t row = first; row < end; row++) run.run(row, row + 1);
  }
  return 0;
}

template <class T>
int64_t backward(const KalmanFilter& s, int64_t first, int64_t end, void* memory) {
  return reverse<Gradient, T>(s, first, end, memory);
}

}  // namespace kalman
}  // namespace DUALFORM_ISA
