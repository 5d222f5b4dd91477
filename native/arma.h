// The log-likelihood of stationary autoregressive moving averages, with its gradient and derivatives of that: series in
// the lanes of vectors, or one series in scalars. A Kalman filter of such a model needs no covariance: what two of its
// predicted covariances differ by has rank one. So a step is a hyperbolic rotation of two lines of r numbers, which
// begin as the autocovariances (Chandrasekhar's recursions, here the algorithm of Schur). The gradient goes back over
// sections of steps, which are computed again from their first state.
#pragma once

#include <limits>
#include <type_traits>

#include "kalman.h"

namespace DUALFORM_ISA {
namespace arma {

// A number and its derivative along a direction.
template <class V>
struct Dual {
  V x, d;
};
template <class V>
INLINE Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.x + b.x, a.d + b.d};
}
template <class V>
INLINE Dual<V> operator-(Dual<V> a, Dual<V> b) {
  return {a.x - b.x, a.d - b.d};
}
template <class V>
INLINE Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.x * b.x, a.x * b.d + a.d * b.x};
}
template <class V>
INLINE Dual<V> operator/(Dual<V> a, Dual<V> b) {
  const V quotient = a.x / b.x;
  return {quotient, (a.d - quotient * b.d) / b.x};
}
template <class V>
INLINE Dual<V>& operator+=(Dual<V>& a, Dual<V> b) {
  return a = a + b;
}
template <class V>
INLINE Dual<V>& operator-=(Dual<V>& a, Dual<V> b) {
  return a = a - b;
}

// With unit variance, P and K = A P C^T of the Kalman filter, F = C P C^T, and w with P' - P = -w w^T / F. The state is
// what is expected of the next r values by all shocks so far: A moves it up, and its last number is that of the
// autoregression.
template <class T, class V, bool DUAL>
struct Series {
  static constexpr int64_t SECTION = 32;                  // steps that are computed again at a time
  static constexpr int AT_ONCE = sizeof(T) == 8 ? 4 : 1;  // variances whose product has one logarithm
  static constexpr bool ONE = sizeof(V) == sizeof(T);
  using N = std::conditional_t<DUAL, Dual<V>, V>;
  using L = kalman::Lanes<V, T>;

  struct Step {
    N v, e, inverse, kappa, top;  // v = y - C m, e = v / F, 1 / F, w_0 / F, the last number of A w
  };

  const Arma& s;
  const int64_t p, q, r, length, reach, sections;
  L lanes{0, 1};
  N *phi, *theta, *levels, *squares, *pure, *both, *gamma;  // what the start is made of
  N *k, *w, *m, *starts, *tape;
  N *bphi, *btheta, *blevels, *bpure, *bboth, *bgamma, *bk, *bw, *bm;
  Step* steps;
  N f;
  V refused;  // NaN where there is no stationary distribution, else 0

  Series(const Arma& of, Arena& arena)
      : s(of),
        p(of.p),
        q(of.q),
        r(most(of.p, of.q + 1)),
        length(of.length),
        reach(of.p ? r + of.q : 0),
        sections(of.dvariance ? (of.length + SECTION - 1) / SECTION : 0) {
    const bool back = of.dvariance;
    phi = arena.take<N>(p), theta = arena.take<N>(q + 1), levels = arena.take<N>(p * p), squares = arena.take<N>(p);
    pure = arena.take<N>(r + q + 1), both = arena.take<N>(q + 1), gamma = arena.take<N>(r + 1);
    for (N** line : {&k, &w, &m}) *line = arena.take<N>(r);
    starts = arena.take<N>(sections * (3 * r + 1)), tape = arena.take<N>(back * SECTION * 3 * r);
    steps = arena.take<Step>(back ? SECTION : 1);
    bphi = arena.take<N>(back * p), btheta = arena.take<N>(back * (q + 1)), blevels = arena.take<N>(back * p * p);
    bpure = arena.take<N>(back * (r + q + 1)), bboth = arena.take<N>(back * (q + 1));
    bgamma = arena.take<N>(back * (r + 1));
    for (N** line : {&bk, &bw, &bm}) *line = arena.take<N>(back * r);
  }

  INLINE N number(T x) {
    if constexpr (DUAL)
      return {V{} + x, V{}};
    else
      return V{} + x;
  }
  INLINE V value(N x) {
    if constexpr (DUAL)
      return x.x;
    else
      return x;
  }
  N read(const void* data, const void* way, int64_t stride, int64_t i) const {
    const V x = L::read(static_cast<const T*>(data) + i, stride, lanes);
    if constexpr (DUAL)
      return {x, L::read(static_cast<const T*>(way) + i, stride, lanes)};
    else
      return x;
  }
  // A gradient, or the derivative of one.
  void write(void* data, int64_t stride, int64_t i, N x) const {
    if (!data) return;
    if constexpr (DUAL)
      L::write(static_cast<T*>(data) + i, stride, x.d, lanes);
    else
      L::write(static_cast<T*>(data) + i, stride, x, lanes);
  }
  static void clear(N* line, int64_t count) {
    for (int64_t i = 0; i < count; i++) line[i] = number(0);
  }
  static void copy(const N* from, N* to, int64_t count) { memcpy(to, from, count * sizeof(N)); }
  // The sum over j of phi_j x_{r-j}.
  N next(const N* x) const {
    N sum = number(0);
    for (int64_t j = 1; j <= p; j++) sum += phi[j - 1] * x[r - j];
    return sum;
  }

  // The autocovariances 0 .. r: of the autoregression by itself, by its partial autocorrelations, and then of both.
  void start() {
    refused = V{};
    for (int64_t i = 0; i < p; i++) phi[i] = read(s.ar, s.ar_way, p, i);
    theta[0] = number(1);
    for (int64_t j = 0; j < q; j++) theta[j + 1] = read(s.ma, s.ma_way, q, j);
    pure[0] = number(1);
    if (p) copy(phi, levels + (p - 1) * p, p);
    for (int64_t n = p; n > 0; n--) {  // the best predictions by n values, from those by one more
      const N *now = levels + (n - 1) * p, last = now[n - 1], left = number(1) - last * last;
      refused += value(left) > 0 ? V{} : V{} + T(NAN);
      squares[n - 1] = number(1) / left;
      pure[0] = pure[0] * squares[n - 1];
      for (int64_t i = 1; i < n; i++)
        levels[(n - 2) * p + i - 1] = (now[i - 1] + last * now[n - i - 1]) * squares[n - 1];
    }
    for (int64_t n = 1; n <= r + q; n++) {
      const int64_t order = least(n, p);
      const N* by = levels + (order - 1) * p;
      pure[n] = number(0);
      for (int64_t i = 1; i <= order; i++) pure[n] += by[i - 1] * pure[n - i];
    }
    for (int64_t d = 0; d <= q; d++) {
      both[d] = number(0);
      for (int64_t j = 0; j <= q - d; j++) both[d] += theta[j] * theta[j + d];
    }
    for (int64_t n = 0; n <= r; n++) {
      gamma[n] = number(0);
      for (int64_t d = most(-q, n - reach); d <= least(q, n + reach); d++)
        gamma[n] += both[d < 0 ? -d : d] * pure[n < d ? d - n : n - d];
    }
    f = gamma[0];
    copy(gamma + 1, k, r), copy(gamma + 1, w, r);
    clear(m, r);
  }

  // From the gradient of the autocovariances to those of phi and theta.
  void start_back() {
    clear(bboth, q + 1), clear(bpure, r + q + 1), clear(btheta, q + 1), clear(blevels, p * p);
    for (int64_t n = 0; n <= r; n++)
      for (int64_t d = most(-q, n - reach); d <= least(q, n + reach); d++) {
        const int64_t i = d < 0 ? -d : d, j = n < d ? d - n : n - d;
        bboth[i] += bgamma[n] * pure[j];
        bpure[j] += bgamma[n] * both[i];
      }
    for (int64_t d = 0; d <= q; d++)
      for (int64_t j = 0; j <= q - d; j++) {
        btheta[j] += bboth[d] * theta[j + d];
        btheta[j + d] += bboth[d] * theta[j];
      }
    for (int64_t n = r + q; n > 0; n--) {
      const int64_t order = least(n, p), at = (order - 1) * p;
      for (int64_t i = 1; i <= order; i++) {
        blevels[at + i - 1] += bpure[n] * pure[n - i];
        bpure[n - i] += bpure[n] * levels[at + i - 1];
      }
    }
    for (int64_t n = 1; n <= p; n++) {
      const int64_t at = (n - 1) * p, below = at - p;
      const N last = levels[at + n - 1], square = squares[n - 1], twice = number(2) * last * square;
      N slope = bpure[0] * pure[0] * twice;
      for (int64_t i = 1; i < n; i++) {
        const N b = blevels[below + i - 1];
        blevels[at + i - 1] += b * square;
        blevels[at + n - i - 1] += b * square * last;
        slope += b * (square * levels[at + n - i - 1] + twice * levels[below + i - 1]);
      }
      blevels[at + n - 1] += slope;
    }
    for (int64_t i = 0; i < p; i++) bphi[i] += blevels[(p - 1) * p + i];
  }

  INLINE void step(Series& z, int64_t t, Step& now) {
    N* __restrict k = z.k, * __restrict w = z.w, * __restrict m = z.m;
    const int64_t last = z.r - 1;
    now.v = z.read(z.s.y, z.s.y_way, z.length, t) - m[0];
    now.inverse = number(1) / z.f;
    now.e = now.v * now.inverse, now.kappa = w[0] * now.inverse, now.top = z.next(w);
    z.f -= now.kappa * w[0];
    const N e = now.e, kappa = now.kappa, ahead = z.next(m);
    for (int64_t i = 0; i < last; i++) {
      const N moved = w[i + 1], gain = k[i];
      m[i] = m[i + 1] + e * gain;
      k[i] = gain - kappa * moved;
      w[i] = moved - kappa * gain;
    }
    const N gain = k[last];
    m[last] = ahead + e * gain, k[last] = gain - kappa * now.top, w[last] = now.top - kappa * gain;
  }

  INLINE V logarithm(V x) {
    if constexpr (ONE)
      return x > 0 && x <= std::numeric_limits<T>::max() ? std::log(x) : T(NAN);
    else
      return kalman::logarithm<T>(x);
  }

  void run(int64_t first, int64_t end) {
    lanes = L(first, end);
    start();
    const N half = number(-0.5), precision = number(1) / read(s.variance, s.variance_way, 1, 0);
    N sum = number(0);
    V logs = V{}, product = V{} + T(1);
    Step now;
    for (int64_t t = 0; t < length; t++) {
      if (sections && t % SECTION == 0) {
        N* at = starts + t / SECTION * (3 * r + 1);
        copy(k, at, r), copy(w, at + r, r), copy(m, at + 2 * r, r), at[3 * r] = f;
      }
      product = product * value(f);
      if (t % AT_ONCE == AT_ONCE - 1) logs += logarithm(product), product = V{} + T(1);
      step(*this, t, now);
      sum += now.v * now.e;
    }
    if (s.loglik) {
      logs += logarithm(product) - T(length) * (logarithm(value(precision)) - T(kalman::LOG_2PI));
      L::write(static_cast<T*>(s.loglik), 1, (logs + value(sum * precision)) * T(-0.5) + refused, lanes);
    }
    if (sections) back(half, precision, sum);
  }

  void back(N half, N precision, N sum) {
    const N weight = half * precision;
    write(s.dvariance, 1, 0, weight * (number(T(length)) - sum * precision));
    clear(bk, r), clear(bw, r), clear(bm, r), clear(bphi, p);
    N bf = number(0);
    for (int64_t section = sections - 1; section >= 0; section--) {
      const int64_t begin = section * SECTION, count = least(SECTION, length - begin);
      const N* at = starts + section * (3 * r + 1);
      copy(at, k, r), copy(at + r, w, r), copy(at + 2 * r, m, r), f = at[3 * r];
      for (int64_t i = 0; i < count; i++) {
        N* to = tape + i * 3 * r;
        copy(k, to, r), copy(w, to + r, r);
        if (p) copy(m, to + 2 * r, r);
        step(*this, begin + i, steps[i]);
      }
      for (int64_t i = count - 1; i >= 0; i--) step_back(begin + i, steps[i], tape + i * 3 * r, half, weight, bf);
    }
    copy(bk, bgamma + 1, r), bgamma[0] = bf;
    for (int64_t i = 0; i < r; i++) bgamma[i + 1] += bw[i];
    start_back();
    for (int64_t i = 0; i < p; i++) write(s.dar, p, i, bphi[i]);
    for (int64_t j = 0; j < q; j++) write(s.dma, q, j, btheta[j + 1]);
  }

  void step_back(int64_t t, const Step& now, const N* at, N half, N weight, N& bf) {
    N* __restrict bk = this->bk, * __restrict bw = this->bw, * __restrict bm = this->bm;
    const N* __restrict k = at, * __restrict w = at + r, *m = at + 2 * r;
    const int64_t last = r - 1;
    const N e = now.e, kappa = now.kappa;
    N be = number(0), bkappa = number(0);
    const N behind = bw[last] - kappa * bk[last], ahead = bm[last];
    be += bm[last] * k[last], bkappa += bk[last] * now.top + bw[last] * k[last];
    bk[last] = bk[last] + e * bm[last] - kappa * bw[last];
    for (int64_t i = last - 1; i >= 0; i--) {
      const N gk = bk[i], gw = bw[i], gm = bm[i], gain = k[i];
      be += gm * gain, bkappa += gk * w[i + 1] + gw * gain;
      bk[i] = gk + e * gm - kappa * gw;
      bw[i + 1] = gw - kappa * gk;
      bm[i + 1] = gm;
    }
    bkappa = number(0) - bkappa - bf * w[0];
    be += weight * now.v;
    const N bv = be * now.inverse + weight * e, binverse = be * now.v + bkappa * w[0];
    bw[0] = bkappa * now.inverse - kappa * bf;
    bm[0] = number(0) - bv;
    bf = bf + now.inverse * (half - binverse * now.inverse);
    for (int64_t j = 1; j <= p; j++) {
      bw[r - j] += phi[j - 1] * behind, bm[r - j] += phi[j - 1] * ahead;
      bphi[j - 1] += behind * w[r - j] + ahead * m[r - j];
    }
    write(s.dy, length, t, bv);
  }
};

template <class T, bool DUAL>
int64_t run(const Arma& s, int64_t first, int64_t end, void* memory) {
  if (!memory) {
    Arena arena(nullptr);
    Series<T, vec<T>, DUAL> sizes(s, arena);
    return arena.used();
  }
  for (int64_t i = first; i < end; i += LANES<T>) {
    Arena arena(memory);
    if (end - i == 1)
      Series<T, T, DUAL>(s, arena).run(i, end);
    else
      Series<T, vec<T>, DUAL>(s, arena).run(i, end);
  }
  return 0;
}

// The series [first, end).
template <class T>
int64_t forward(const Arma& s, int64_t first, int64_t end, void* memory) {
  return s.y_way ? run<T, true>(s, first, end, memory) : run<T, false>(s, first, end, memory);
}

}  // namespace arma
}  // namespace DUALFORM_ISA
