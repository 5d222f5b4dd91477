// The smoother of Bryson and Frazier, over a series that was filtered: the filter's moments become those given all
// observations, in their place.
#pragma once

#include <algorithm>
#include <utility>

#include "kalman_reverse.h"

namespace DUALFORM_ISA {
namespace kalman {

// The smoother: `back` and `g` are r and N, with the smoothed moments m + P r and P - P N P. Where the past knows so
// little of a state that this loses digits, the state follows from the next one, an observation A h + c + q of it
// (Rauch, Tung and Striebel), number by number, which divides by nothing but variances.
template <class T, class V, int N>
struct Smoother : Reverse<T, V, N> {
  using Base = Reverse<T, V, N>;
  using Base::a, Base::c, Base::p, Base::before, Base::mean, Base::moved, Base::g, Base::back, Base::q;
  using Base::n, Base::m, Base::wide, Base::s, Base::lanes, Base::inverse, Base::turned, Base::work;
  using Base::other, Base::more, Base::ONE;
  static constexpr double LOSS = 1e3;  // of a variance by what is observed later
  V *next_mean, *next_cov, *now_mean, *now_cov, *lag, *factors, *rows, *gains_of_next, *variances, *b, *settled_g;

  Smoother(const KalmanFilter& of, Arena& arena) : Base(of, arena) {
    for (V** matrix : {&next_cov, &now_cov, &lag, &rows, &gains_of_next, &factors, &settled_g})
      *matrix = arena.take<V>(n * wide);
    for (V** line : {&next_mean, &now_mean, &variances, &b}) *line = arena.take<V>(wide);
  }

  // N before the observation.
  void observe() {
    this->through_gain();
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < m; j++)
        for (int64_t k = 0; k < n; k++)
          this->add(g + k * wide, c[i * wide + k] * inverse[i * m + j], c + j * wide, wide);
    this->through_observation(V{} + T(1));
  }

  // The smoothed mean of the state before a step.
  void smooth_mean() {
    this->product(back, before, now_mean, 1);
    for (int64_t i = 0; i < n; i++) now_mean[i] += mean[i];
  }

  // The covariance of the state before a step, P - (A P)^T N (A P), and of that after it with that before, (I - P' N) A
  // P, by the predicted P' and N before the observation. Whether a lane has lost digits, and in `variances[0]` which
  // one.
  bool smooth_covs() {
    V *ap = rows, *turned_ap = gains_of_next;
    this->template product_a<false>(before, ap);
    this->turn(ap, turned_ap);
    this->product(g, ap, work, n);
    this->product(turned_ap, work, other, n);
    V lost = V{};
    for (int64_t i = 0; i < n; i++) {
      for (int64_t j = 0; j < wide; j++) now_cov[i * wide + j] = before[i * wide + j] - other[i * wide + j];
      lost = now_cov[i * wide + i] * T(LOSS) < before[i * wide + i] ? V{} + T(1) : lost;
    }
    this->symmetric(now_cov);
    this->product(p, work, other, n);
    for (int64_t i = 0; i < n * wide; i++) lag[i] = ap[i] - other[i];
    variances[0] = lost;
    T all[Lanes<V, T>::COUNT];
    memcpy(all, &lost, sizeof lost);
    for (T x : all)
      if (x > 0) return true;
    return false;
  }

  // Lanes that have lost digits take the moments given the next state.
  void condition(V lost) {
    const T eps = sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7f);
    // Q = factors D factors^T, and A in those coordinates, in which the numbers of the next state are independent
    for (int64_t i = 0; i < n; i++) {
      V left = q[i * wide + i];
      for (int64_t k = 0; k < wide; k++) rows[i * wide + k] = a[i * wide + k];
      for (int64_t j = 0; j < i; j++) {
        V sum = q[i * wide + j];
        for (int64_t k = 0; k < j; k++) sum -= factors[i * wide + k] * factors[j * wide + k] * variances[k];
        const V factor = variances[j] > 0 ? sum / variances[j] : V{};
        factors[i * wide + j] = factor;
        left -= factor * factor * variances[j];
        this->add(rows + i * wide, -factor, rows + j * wide, wide);
      }
      variances[i] = left > q[i * wide + i] * T(n) * eps ? left : V{};
    }
    for (int64_t i = 0; i < n * wide; i++) work[i] = before[i];
    this->clear(gains_of_next, n * wide);
    for (int64_t i = 0; i < n; i++) {
      const V* row = rows + i * wide;
      V size = variances[i], least = variances[i];
      for (int64_t k = 0; k < n; k++) {
        b[k] = this->dot(work + k * wide, row);
        size += row[k] * b[k];
        least += row[k] * this->dot(before + k * wide, row);
      }
      const V found = size > least * T(16) * eps ? V{} + T(1) : V{};
      V* k_of = other;
      for (int64_t k = 0; k < wide; k++) k_of[k] = V{};
      for (int64_t k = 0; k < n; k++) k_of[k] = found > 0 ? b[k] / size : V{};
      for (int64_t j = 0; j < n; j++) {
        V* line = work + j * wide;
        for (int64_t k = 0; k < n; k++) line[k] -= k_of[j] * b[k];
        const V rest = variances[i] * k_of[j] - this->dot(line, row);
        this->add(line, rest, k_of, wide);
      }
      this->symmetric(work);
      for (int64_t j = 0; j < i; j++)
        this->add(gains_of_next + j * wide, -this->dot(gains_of_next + j * wide, row), k_of, wide);
      this->add(gains_of_next + i * wide, V{} + T(1), k_of, wide);
    }
    for (int64_t i = n - 1; i >= 0; i--)
      for (int64_t j = 0; j < i; j++)
        this->add(gains_of_next + j * wide, -factors[i * wide + j], gains_of_next + i * wide, wide);
    this->product(next_cov, gains_of_next, other, n);
    this->add_turned(gains_of_next, other, work, n, T(1));
    this->symmetric(work);
    for (int64_t k = 0; k < n; k++) b[k] = mean[k];
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < n; k++) b[k] += gains_of_next[i * wide + k] * (next_mean[i] - moved[i]);
    for (int64_t i = 0; i < n; i++) {
      now_mean[i] = lost > 0 ? b[i] : now_mean[i];
      for (int64_t j = 0; j < n; j++) {
        now_cov[i * wide + j] = lost > 0 ? work[i * wide + j] : now_cov[i * wide + j];
        lag[i * wide + j] = lost > 0 ? other[i * wide + j] : lag[i * wide + j];
      }
    }
  }

  // As in the filter: within n units in the last place of the roots of the diagonal.
  bool settled() const {
    if constexpr (ONE) {
      const T units = T(n) * (sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7f));
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
          const T scale = std::sqrt(g[i * wide + i]) * std::sqrt(g[j * wide + j]);
          if (!(std::abs(g[i * wide + j] - settled_g[i * wide + j]) <= units * scale)) return false;
        }
    }
    return ONE;
  }

  void run(int64_t first, int64_t end) {
    lanes = Lanes<V, T>(first, end);
    this->has_model = false;
    this->clear(g, n * wide), this->clear(back, wide);
    this->read_before(s.length);
    for (int64_t i = 0; i < wide; i++) next_mean[i] = mean[i];
    for (int64_t i = 0; i < n * wide; i++) next_cov[i] = before[i];
    int64_t alike = 0;   // steps of the same model and covariances before
    bool still = false;  // whether N has come to rest
    for (int64_t t = s.length - 1; t >= 0; t--) {
      const bool covs = this->read(s.predicted_covs, t, p, n, n, wide), states = this->read_before(t);
      const bool same = this->read_observation(t) && covs && states && this->constant() && t > 0 && t < s.length - 1;
      if (!same) alike = 0, still = false;
      this->read_transition(t, !still);
      if (!still) this->gains();
      this->innovation(t);
      if (still) {
        this->through_observation(V{} + T(1));
        this->through_transition(back);
        smooth_mean();
      } else {
        observe();
        const bool lost = smooth_covs();
        this->through_transition();
        smooth_mean();
        if (lost) condition(variances[0]);
        if (same && ++alike % SPAN == 0) {
          still = alike > SPAN && !lost && settled();
          for (int64_t i = 0; i < n * wide; i++) settled_g[i] = g[i];
        }
      }
      this->write_matrix(s.predicted_covs, t, lag);
      if (t > 0) {
        this->write_line(s.means, t - 1, now_mean), this->write_matrix(s.covs, t - 1, now_cov);
      } else {
        this->write(s.first_mean, 1, 0, now_mean, 1, n, wide), this->write(s.first_cov, 1, 0, now_cov, n, n, wide);
      }
      std::swap(next_mean, now_mean), std::swap(next_cov, now_cov);
      if (still) std::copy(next_cov, next_cov + n * wide, now_cov);
    }
  }
};

inline int64_t smooth(const KalmanFilter& s, int64_t first, int64_t end, void* memory) {
  return reverse<Smoother, double>(s, first, end, memory);
}

}  // namespace kalman
}  // namespace DUALFORM_ISA
